"""Propriety of the scores, their ranges, the alpha schedule, and ProperScoreLoss as a module and in HF's Trainer."""

import copy
import math
import pickle
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from formulas import DEVICE, ORDERS, moments_of, power_cases
from named_scores import custom

from kernels import ProperScoreLoss, linear_score, logits_score, losses, softmax_moments

PROPER = {
    "ce": losses.ce,
    "brier": losses.brier,
    "spherical": losses.spherical,
    "dpsm 0": losses.dpsm(0.0),
    "dpsm 0.3": losses.dpsm(0.3),
    "dpsm 1": losses.dpsm(1.0),
    "dpsm by order": losses.dpsm(0.3, "order", 3.0),
    **{f"power {g}": losses.power(g) for g in ORDERS},
}
# As trained, with their weight held constant, proper; as functions of p not.
WEIGHTED = {"entropy_gated": losses.entropy_gated, "eaft": losses.eaft, "mile": losses.mile(1.0)}
# Improper in both ways.
ELSEWHERE = {"dft": losses.dft, "deft": losses.deft, "ce_above": losses.ce_above(0.1), "ce_below": losses.ce_below(0.1)}
IMPROPER = {
    "focal": (losses.focal(2.0), 0.0),
    "smoothing": (losses.smoothing(0.1), 0.0),
    "gce": (losses.gce(0.7), 0.0),
    "gce 1": (losses.gce(1.0), 0.0),
    "brier tail": (losses.tail_smoothed("brier", 0.3), 0.3),
    "spherical tail": (losses.tail_smoothed("spherical", 0.3), 0.3),
}


def expected_loss(score, logits, q, tail=0.0):
    """E_{y ~ q} score(softmax(logits), y) for one row of logits [V]."""
    V, order = len(q), getattr(score, "order", None)
    rows, targets = logits.expand(V, V).contiguous(), torch.arange(V)
    if order is not None or score is losses.eaft:
        return (q * score(moments_of(rows, targets, order))).sum()
    return (q * score(softmax_moments(rows, targets, tail=tail))).sum()


def random_logits(seed, V=12, scale=1.5):
    return torch.randn(V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


@pytest.mark.parametrize("name", PROPER)
@pytest.mark.parametrize("seed", range(5))
def test_proper_scores_are_least_at_the_truth(name, seed):
    score, truth = PROPER[name], random_logits(seed).requires_grad_()
    q = truth.detach().softmax(-1)
    best = expected_loss(score, truth, q)
    (grad,) = torch.autograd.grad(best, truth)
    assert grad.abs().max() < 1e-14  # a stationary point, to the rounding of float64
    for other in range(20):
        # From far away to very near: at 0.01 the excess is some 1e-5 of the loss.
        for distance in (2.0, 0.3, 0.01):
            elsewhere = truth.detach() + distance * random_logits(100 + 50 * seed + other)
            assert expected_loss(score, elsewhere, q) > best.detach()


@pytest.mark.parametrize("name", IMPROPER)
def test_improper_losses_are_least_elsewhere(name):
    score, tail = IMPROPER[name]
    truth = random_logits(0).requires_grad_()
    q = truth.detach().softmax(-1)
    at_truth = expected_loss(score, truth, q, tail)
    (grad,) = torch.autograd.grad(at_truth, truth)
    assert grad.abs().max() > 1e-3
    assert expected_loss(score, truth.detach() - 0.1 * grad, q, tail) < at_truth.detach()


@pytest.mark.parametrize("name", WEIGHTED)
@pytest.mark.parametrize("seed", range(5))
def test_a_weight_that_no_target_changes_leads_to_the_truth(name, seed):
    """The expected gradient vanishes at the truth, and elsewhere descends towards it."""
    truth = random_logits(seed).requires_grad_()
    q = truth.detach().softmax(-1)
    (grad,) = torch.autograd.grad(expected_loss(WEIGHTED[name], truth, q), truth)
    assert grad.abs().max() < 1e-14
    for other in range(20):
        for distance in (2.0, 0.3, 0.01):
            move = distance * random_logits(100 + 50 * seed + other)
            elsewhere = (truth.detach() + move).requires_grad_()
            (grad,) = torch.autograd.grad(expected_loss(WEIGHTED[name], elsewhere, q), elsewhere)
            assert grad @ move > 0


@pytest.mark.parametrize("name", [*WEIGHTED, *ELSEWHERE])
def test_losses_with_weights_are_not_scores(name):
    """Some sharper or flatter forecast has a lower expectation than the truth."""
    score, truth = {**WEIGHTED, **ELSEWHERE}[name], random_logits(0)
    q = truth.softmax(-1)
    assert min(expected_loss(score, t * truth, q) for t in (0.0, 0.3, 0.6, 1.5, 4.0)) < expected_loss(score, truth, q)


@pytest.mark.parametrize("name", ELSEWHERE)
def test_these_do_not_lead_to_the_truth(name):
    truth = random_logits(0).requires_grad_()
    (grad,) = torch.autograd.grad(expected_loss(ELSEWHERE[name], truth, truth.detach().softmax(-1)), truth)
    assert grad.abs().max() > 1e-3


def test_every_loss_is_said_to_be_proper_or_not():
    said = {name.split()[0] for name in (*PROPER, *WEIGHTED, *ELSEWHERE, *IMPROPER)}
    assert said == set(losses.LOSSES)


def test_readme_has_a_row_for_every_loss_with_its_knobs():
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", readme.split("## Losses")[1].split("\n## ")[0], re.M))
    assert list(rows) == list(losses.LOSSES)
    for name, row in rows.items():
        knobs = re.findall(r"`(\w+) = ([^`]+)`", row.split(" | ")[1])
        assert dict(knobs) == {knob: str(value) for knob, value in losses.SCORES[name].knobs.items()}, name


BOUNDS = {
    "brier": (losses.brier, 2),
    "spherical": (losses.spherical, 1),
    "power 1.5": (losses.power(1.5), 2),
    "power 3": (losses.power(3.0), 0.5),
    "gce": (losses.gce(0.5), 2),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_bounded_scores_reach_their_bounds(name):
    score, high = BOUNDS[name]
    sure = torch.tensor([[60.0, 0.0, 0.0]])
    order = getattr(score, "order", 2.0)
    right, wrong = (score(moments_of(sure, torch.tensor([y]), order)).item() for y in (0, 1))
    assert right == pytest.approx(0, abs=1e-6) and wrong == pytest.approx(high, abs=1e-6)


def test_brier_has_its_plus_one():
    logits, targets = torch.randn(6, 9), torch.arange(6)
    p = logits.softmax(-1)
    want = p.square().sum(-1) - 2 * p[range(6), targets] + 1
    assert torch.allclose(losses.brier(softmax_moments(logits, targets)), want, atol=1e-6)


def test_dpsm_runs_from_ce_to_brier():
    m = softmax_moments(torch.randn(6, 9), torch.arange(6))
    assert torch.equal(losses.dpsm(0.0)(m), losses.ce(m)) and torch.equal(losses.dpsm(1.0)(m), losses.brier(m))
    alpha = torch.tensor(0.0)
    score = losses.dpsm(alpha)
    alpha.fill_(0.25)
    assert torch.allclose(score(m), 0.75 * losses.ce(m) + 0.25 * losses.brier(m))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.float64, 1e-12)], ids=["fp32", "fp64"])
def test_power_score_keeps_its_digits(dtype, tolerance):
    for order, m, want in power_cases((*ORDERS, 40.5)):
        leaves = [x.to(dtype).requires_grad_() for x in (m.log_p, m.s)]
        # Near 1 an order in fp32 is another one: as a tensor in the moments' dtype it is the caller's.
        for given in (order, torch.tensor(order, dtype=torch.float64, device=DEVICE)):
            m32 = type(m)(log_p=leaves[0], r1=m.r1.to(dtype), r2=leaves[1], s=leaves[1])
            loss = losses._power(m32, given)
            got = loss.detach(), *torch.autograd.grad(loss.sum(), leaves)
            for g, exact in zip(got, want, strict=True):
                torch.testing.assert_close(g.double(), exact, rtol=tolerance, atol=1e-35, msg=lambda x: f"{order}: {x}")  # noqa: B023


def test_power_score_runs_from_ce_to_half_of_brier_and_on():
    z, targets = torch.randn(6, 9, dtype=torch.float64) * 3, torch.arange(6)
    m = moments_of(z, targets, 1 + 1e-6)
    torch.testing.assert_close(losses.power(1 + 1e-6)(m), losses.ce(m), rtol=1e-5, atol=0)
    assert torch.equal(losses.power(2.0)(m), 0.5 * losses.brier(m)) and not hasattr(losses.power(2), "order")
    assert losses.power(1.5).order == 1.5 and losses.power(1.5).fused == ("power", 1.5)
    torch.testing.assert_close(losses.power(torch.tensor(2.0))(moments_of(z, targets, 2.0)), 0.5 * losses.brier(m))
    for bad in (1.0, 0.5, -2, math.inf, math.nan):
        with pytest.raises(ValueError, match="order of the power score must be a finite number above 1"):
            losses.power(bad)
    with pytest.raises(ValueError, match="moments of its order"):
        losses.power(1.5)(moments_of(z, targets))
    order = torch.tensor(3.0)
    score = losses.power(order)
    order.fill_(0.0)
    assert score.order == torch.tensor(losses.LEAST_ORDER) > 1 and score.fused == ("power", score.order)


def test_dpsm_moves_its_order():
    z, targets, alpha = torch.randn(6, 9) * 3, torch.arange(6), torch.zeros(())
    score = losses.dpsm(alpha, path="order")
    for value in (0.0, 0.25, 1.0):
        alpha.fill_(value)
        order = max(1 + value, losses.LEAST_ORDER)
        assert score.order.item() == pytest.approx(order, rel=1e-7) and score.fused[1].item() == score.order.item()
        m = moments_of(z, targets, order)
        torch.testing.assert_close(score(m), losses.power(order)(m), rtol=2e-6, atol=1e-7)
        torch.testing.assert_close(losses.dpsm(value, "order")(m), losses.power(order)(m))
        want = {0.0: losses.ce(m), 1.0: 0.5 * losses.brier(m)}.get(value)
        assert want is None or torch.allclose(score(m), want, rtol=2e-5, atol=1e-6)
    alpha.fill_(0.5)
    assert losses.dpsm(alpha, "order", 4.0).order == 2.5 and losses.dpsm(0.5, "order", 4.0).order == 2.5
    module = ProperScoreLoss("dpsm", path="order", order=3.0, warmup=0.5)
    module.set_step(25, 100)
    assert module.score().order == 2 and copy.deepcopy(module).score().order == 2
    for bad, why in ((dict(path="chord"), "unknown path 'chord'"), (dict(path="order", order=1.0), "above 1")):
        with pytest.raises(ValueError, match=why):
            losses.dpsm(alpha, **bad)


def test_losses_of_the_field_meet_ce():
    m = moments_of(torch.randn(60, 9, dtype=torch.float64) * 2, torch.arange(60) % 9)
    for score in (losses.mile(0.0), losses.ce_above(0.0), losses.ce_below(1.0)):
        torch.testing.assert_close(score(m), losses.ce(m))
    torch.testing.assert_close(losses.gce(1e-7)(m), losses.ce(m), rtol=1e-5, atol=0)
    torch.testing.assert_close(losses.gce(1.0)(m), m.r1)
    torch.testing.assert_close(losses.ce_above(0.1)(m) + losses.ce_below(0.1)(m), losses.ce(m))
    even = moments_of(torch.zeros(4, 7, dtype=torch.float64), torch.arange(4))
    torch.testing.assert_close(losses.entropy_gated(even), losses.ce(even))  # an even row has all its weight
    even = moments_of(torch.zeros(4, 20, dtype=torch.float64), torch.arange(4))
    torch.testing.assert_close(losses.eaft(even), losses.ce(even))
    z = torch.randn(6, 9, dtype=torch.float64, requires_grad=True)
    m = moments_of(z, torch.arange(6))
    want, got = (torch.autograd.grad(loss.sum(), z, retain_graph=True)[0] for loss in (m.r1, losses.dft(m)))
    torch.testing.assert_close(got, want)
    with pytest.raises(ValueError, match="top_entropy"):
        losses.eaft(softmax_moments(torch.randn(1, 9), torch.tensor([0])))
    for make, bad in ((losses.gce, 0.0), (losses.gce, 1.5), (losses.ce_above, -0.1), (losses.ce_below, 10)):
        with pytest.raises(ValueError, match=f"got {bad}"):
            make(bad)


@pytest.mark.parametrize("name", ["gce", "dft", "deft", "entropy_gated", "mile", "ce_above", "ce_below", "power"])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_an_impossible_target_has_a_finite_gradient(name, impl):
    logits = torch.zeros(2, 5, device=DEVICE)
    logits[0, 2] = -torch.inf
    logits[1, 1:] = -torch.inf  # one token has everything, and it is not the target
    z = logits.requires_grad_()
    score = losses.power(2.0) if name == "power" else losses.make_score(name)
    loss, _ = logits_score(z, torch.tensor([2, 3], device=DEVICE), score, impl=impl)
    loss.backward()
    assert not loss.isnan() and z.grad.isfinite().all()


def test_focal_is_ce_at_gamma_zero_and_finite_below_one():
    logits = torch.randn(6, 9)
    logits[0, 0] = 200.0  # p_y rounds to 1
    logits.requires_grad_()
    m = softmax_moments(logits, torch.arange(6))
    assert torch.allclose(losses.focal(0.0)(m), losses.ce(m))
    losses.focal(0.5)(m).sum().backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("name", [*PROPER, *WEIGHTED, *IMPROPER, "dft", "deft"])
def test_tokens_outside_the_loss_score_zero(name):
    score, tail = IMPROPER[name] if name in IMPROPER else ({**PROPER, **WEIGHTED, **ELSEWHERE}[name], 0.0)
    logits = torch.randn(4, 9, requires_grad=True)
    m = softmax_moments(logits, torch.tensor([-100, 3, -100, 4]), tail=tail)
    m.s, m.top_entropy = m.r2, m.entropy  # 0 where the token is ignored, as all moments are
    score(m).sum().backward()
    assert (score(m)[[0, 2]] == 0).all() and (score(m)[[1, 3]] != 0).all()
    assert (logits.grad[[0, 2]] == 0).all() and logits.grad.isfinite().all()


def test_a_score_of_ones_own_is_one_line():
    hidden, weight = torch.randn(10, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    targets = torch.randint(30, (10,))
    loss, m = linear_score(hidden, weight, targets, lambda m: losses.ce(m) + losses.spherical(m))
    p = (hidden @ weight.t()).softmax(-1)
    p_y = p[range(10), targets]
    want = (-p_y.log() + 1 - p_y / p.norm(dim=-1)).mean()
    assert torch.allclose(loss, want, atol=1e-5) and m.vocab_size == 30
    grads = [torch.autograd.grad(x, (hidden, weight)) for x in (loss, want)]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*grads, strict=True))


def test_names_and_knobs():
    m = softmax_moments(torch.randn(6, 9), torch.arange(6), tail=0.2)
    m.s, m.top_entropy = m.r2, m.entropy
    for name in losses.LOSSES:
        assert losses.make_score(name)(m).shape == (6,)
    assert torch.equal(losses.make_score("dpsm", alpha=0.2)(m), losses.dpsm(0.2)(m))
    assert torch.equal(losses.make_score("focal", gamma=1.0)(m), losses.focal(1.0)(m))
    assert torch.equal(losses.make_score("smoothing", eps=0.3)(m), losses.smoothing(0.3)(m))
    assert torch.equal(losses.make_score("mile", gamma=None)(m), losses.mile(1.0)(m))  # None is the default
    assert torch.equal(losses.make_score("brier", tail=0.2)(m), losses.tail_smoothed("brier", 0.2)(m))
    for bad in (dict(name="hinge"), dict(name="ce", tail=0.1)):
        with pytest.raises(ValueError, match="hinge|tail smoothing"):
            losses.make_score(**bad)
    with pytest.raises(ValueError, match="tail smoothing"):
        losses.tail_smoothed("ce", 0.1)
    with pytest.raises(ValueError, match="tail=0.2"):
        losses.tail_smoothed("brier", 0.2)(softmax_moments(torch.randn(1, 9), torch.tensor([0])))


def test_each_loss_says_which_knobs_it_reads():
    read = {name: losses.knobs_of(name) for name in losses.LOSSES}
    assert read == {
        "ce": (),
        "brier": ("tail",),
        "spherical": ("tail",),
        "power": ("order",),
        "dpsm": ("alpha", "path", "order"),
        "focal": ("gamma",),
        "smoothing": ("eps",),
        "gce": ("q",),
        "dft": (),
        "deft": (),
        "entropy_gated": (),
        "eaft": (),
        "mile": ("gamma",),
        "ce_above": ("threshold",),
        "ce_below": ("threshold",),
    }
    m = softmax_moments(torch.linspace(-2, 2, 54).view(6, 9).sin(), torch.arange(6), tail=0.2)
    m.s, m.top_entropy = m.r2, m.entropy
    values = dict(alpha=0.3, gamma=0.3, eps=0.3, tail=0.3, order=1.7, path="order", q=0.3, threshold=0.12)
    for name, knobs in read.items():
        plain = losses.make_score(name)(m)
        for knob, value in values.items():
            if (knob == "tail" and knob not in knobs) or (name == "dpsm" and knob == "order"):
                continue  # refused, see above; or only read on one path
            assert torch.equal(losses.make_score(name, **{knob: value})(m), plain) == (knob not in knobs), (name, knob)
    with pytest.raises(ValueError, match="unknown loss 'hinge'"):
        losses.knobs_of("hinge")
    for make in (losses.make_score, losses.ProperScoreLoss):
        with pytest.raises(
            ValueError, match="unknown knob 'gama'; expected one of tail, order, alpha, path, gamma, eps, q"
        ):
            make("focal", gama=2.0)


def test_a_new_score_is_one_entry_of_the_table(monkeypatch):
    monkeypatch.setitem(losses.SCORES, "pseudo", losses.Score(lambda m: m.r2))
    monkeypatch.setitem(losses.SCORES, "mixed", losses.Score(lambda beta: lambda m: m.r1 + beta * m.r2, {"beta": 0.5}))
    hidden, weight, targets = torch.randn(6, 8), torch.randn(9, 8), torch.arange(6)
    m = softmax_moments(hidden @ weight.t(), targets)
    for score, want in (
        (losses.make_score("pseudo", alpha=0.1), m.r2),
        (losses.make_score("mixed"), m.r1 + 0.5 * m.r2),
        (losses.make_score("mixed", beta=2.0), m.r1 + 2 * m.r2),
    ):
        torch.testing.assert_close(linear_score(hidden, weight, targets, score)[0], want.mean())
        compiled = torch.compile(linear_score, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(hidden, weight, targets, score)[0], want.mean())
    loss = losses.ProperScoreLoss("mixed", beta=2.0)(hidden @ weight.t(), targets)
    torch.testing.assert_close(loss, (m.r1 + 2 * m.r2).mean())
    assert losses.knobs_of("mixed") == ("beta",)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_alpha_rises_from_zero_to_its_maximum(schedule):
    alphas = [losses.alpha_at(t, 1000, warmup=0.2, schedule=schedule, alpha_max=0.8) for t in range(1001)]
    assert alphas[0] == 0 and alphas[100] == pytest.approx(0.4) and alphas[200:] == [pytest.approx(0.8)] * 801
    assert all(a <= b for a, b in zip(alphas, alphas[1:], strict=False))


def test_alpha_starts_where_it_is_told():
    def at(t):
        return losses.alpha_at(t, 1000, warmup=0.1, start=0.5)

    assert at(0) == at(500) == 0 and at(550) == pytest.approx(0.5) and at(600) == at(999) == 1


def test_alpha_edges():
    assert losses.alpha_at(0, 10, warmup=0.0) == 1  # nothing to wait for
    assert losses.alpha_at(4, 10, warmup=0.0, start=0.5) == 0 and losses.alpha_at(5, 10, warmup=0.0, start=0.5) == 1
    assert losses.alpha_at(0, 10, schedule="fixed", alpha_max=0.7) == 0.7
    assert losses.alpha_at(0, 10) == 0 and losses.alpha_at(1, 10) == 1  # the default warm-up is a tenth
    cosine = losses.alpha_at(25, 1000, warmup=0.1, schedule="cosine")
    assert cosine == pytest.approx(0.5 * (1 - math.cos(math.pi / 4)))
    with pytest.raises(ValueError, match="schedule"):
        losses.alpha_at(0, 10, schedule="step")


# --- as a module, and as the HF Trainer's loss ----------------------------------------------------------


def test_module_is_a_drop_in_for_cross_entropy():
    logits = torch.randn(2, 7, 19, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    targets = torch.randint(19, (2, 7), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    targets[0, 3] = -100
    for reduction in ("mean", "sum", "none"):
        got = ProperScoreLoss("ce", reduction=reduction)(logits, targets)
        want = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)
        torch.testing.assert_close(got, want.view_as(targets) if reduction == "none" else want, rtol=1e-5, atol=1e-6)


def test_module_carries_its_alpha():
    logits, targets = torch.randn(6, 19, device=DEVICE), torch.arange(6, device=DEVICE)
    module = ProperScoreLoss("dpsm", warmup=0.5).to(DEVICE)
    assert module.set_step(0, 100) == 0 and module(logits, targets) == ProperScoreLoss("ce")(logits, targets)
    assert module.set_step(25, 100) == 0.5
    copied = pickle.loads(pickle.dumps(copy.deepcopy(module)))
    module.set_step(99, 100)
    assert module(logits, targets) == ProperScoreLoss("brier")(logits, targets)
    torch.testing.assert_close(copied(logits, targets), losses.dpsm(0.5)(softmax_moments(logits, targets)).mean())
    other = ProperScoreLoss("dpsm").to(DEVICE)
    other.load_state_dict(copied.state_dict())
    assert other(logits, targets) == copied(logits, targets)
    with pytest.raises(ValueError, match="unknown loss"):
        ProperScoreLoss("brier_score")
    assert ProperScoreLoss(custom)(logits, targets) == custom(softmax_moments(logits, targets)).mean()


def test_hf_trainer_gives_the_loss_curve_of_our_own_loop(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

    torch.manual_seed(0)
    shape = dict(
        vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0))
    twin = copy.deepcopy(model)
    tokens = torch.randint(50, (24, 12), generator=torch.Generator().manual_seed(1))
    labels = tokens.clone()
    for i in range(24):
        labels[i, : 1 + i % 7] = -100  # batches of unequal weight, or a mean of means would do
    rows = [dict(input_ids=t, labels=y) for t, y in zip(tokens, labels, strict=True)]
    loss_fn = ProperScoreLoss("dpsm", warmup=0.5)

    class Ramp(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            loss_fn.set_step(state.global_step, state.max_steps)

    arguments = TrainingArguments(
        tmp_path,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        max_steps=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=DEVICE == "cpu",
        optim="adamw_torch",
        weight_decay=0.0,
        max_grad_norm=0,
        disable_tqdm=True,
        train_sampling_strategy="sequential",
    )
    trainer = Trainer(model, arguments, train_dataset=rows, compute_loss_func=loss_fn.trainer_loss, callbacks=[Ramp()])
    trainer.train()
    curve = [row["loss"] for row in trainer.state.log_history if "loss" in row]

    twin.to(DEVICE).train()
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=0.0)
    ours, alpha = [], torch.zeros((), device=DEVICE)
    score = losses.dpsm(alpha)
    for step in range(4):
        alpha.fill_(losses.alpha_at(step, 4, warmup=0.5))
        x, y = (t[6 * step : 6 * step + 6].to(DEVICE) for t in (tokens, labels))
        hidden = twin.transformer(x).last_hidden_state[:, :-1].flatten(0, 1)
        loss, _ = linear_score(hidden, twin.lm_head.weight, y[:, 1:].flatten(), score)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ours.append(loss.item())
    # The Trainer logs to 4 decimals (or more, by version).
    assert curve == pytest.approx(ours, abs=6e-5)


def test_encoder_decoder_labels_are_not_shifted():
    logits, labels = torch.randn(2, 5, 11), torch.randint(11, (2, 5))
    outputs = dict(logits=logits)
    got = ProperScoreLoss("ce", causal=False).trainer_loss(outputs, labels, num_items_in_batch=7)
    want = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / 7
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    shifted = ProperScoreLoss("ce").trainer_loss(outputs, labels)
    want = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(shifted, want, rtol=1e-5, atol=1e-6)
