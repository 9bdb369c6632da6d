"""Propriety of the scores, their ranges, the alpha schedule, and ProperScoreLoss as a module and in HF's Trainer."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from formulas import DEVICE
from named_scores import custom

from kernels import ProperScoreLoss, linear_score, losses, softmax_moments

PROPER = {
    "ce": losses.ce,
    "brier": losses.brier,
    "spherical": losses.spherical,
    "dpsm 0": losses.dpsm(0.0),
    "dpsm 0.3": losses.dpsm(0.3),
    "dpsm 1": losses.dpsm(1.0),
}
IMPROPER = {
    "focal": (losses.focal(2.0), 0.0),
    "smoothing": (losses.smoothing(0.1), 0.0),
    "brier tail": (losses.tail_smoothed("brier", 0.3), 0.3),
    "spherical tail": (losses.tail_smoothed("spherical", 0.3), 0.3),
}


def expected_loss(score, logits, q, tail=0.0):
    """E_{y ~ q} score(softmax(logits), y) for one row of logits [V]."""
    V = len(q)
    m = softmax_moments(logits.expand(V, V).contiguous(), torch.arange(V), tail=tail)
    return (q * score(m)).sum()


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


@pytest.mark.parametrize("name, low, high", [("brier", 0, 2), ("spherical", 0, 1)])
def test_bounded_scores_reach_their_bounds(name, low, high):
    sure = torch.tensor([[60.0, 0.0, 0.0]])
    right, wrong = (losses.make_score(name)(softmax_moments(sure, torch.tensor([y]))).item() for y in (0, 1))
    assert right == pytest.approx(low, abs=1e-6) and wrong == pytest.approx(high, abs=1e-6)


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


def test_focal_is_ce_at_gamma_zero_and_finite_below_one():
    logits = torch.randn(6, 9)
    logits[0, 0] = 200.0  # p_y rounds to 1
    logits.requires_grad_()
    m = softmax_moments(logits, torch.arange(6))
    assert torch.allclose(losses.focal(0.0)(m), losses.ce(m))
    losses.focal(0.5)(m).sum().backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("name", [*PROPER, *IMPROPER])
def test_tokens_outside_the_loss_score_zero(name):
    score, tail = (PROPER[name], 0.0) if name in PROPER else IMPROPER[name]
    logits = torch.randn(4, 9, requires_grad=True)
    m = softmax_moments(logits, torch.tensor([-100, 3, -100, 4]), tail=tail)
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
    for name in losses.LOSSES:
        assert losses.make_score(name)(m).shape == (6,)
    assert torch.equal(losses.make_score("dpsm", alpha=0.2)(m), losses.dpsm(0.2)(m))
    assert torch.equal(losses.make_score("focal", gamma=1.0)(m), losses.focal(1.0)(m))
    assert torch.equal(losses.make_score("smoothing", eps=0.3)(m), losses.smoothing(0.3)(m))
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
        "dpsm": ("alpha",),
        "focal": ("gamma",),
        "smoothing": ("eps",),
    }
    m = softmax_moments(torch.randn(6, 9), torch.arange(6), tail=0.2)
    for name, knobs in read.items():
        plain = losses.make_score(name)(m)
        for knob in ("alpha", "gamma", "eps", "tail"):
            if knob == "tail" and knob not in knobs:
                continue  # refused, see above
            assert torch.equal(losses.make_score(name, **{knob: 0.3})(m), plain) == (knob not in knobs)
    with pytest.raises(ValueError, match="unknown loss 'hinge'"):
        losses.knobs_of("hinge")
    for make in (losses.make_score, losses.ProperScoreLoss):
        with pytest.raises(ValueError, match="unknown knob 'gama'; expected one of tail, alpha, gamma, eps"):
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
