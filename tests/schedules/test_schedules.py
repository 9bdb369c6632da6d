"""Learning-rate schedules: their ends, their shapes, and the picture of them."""

import itertools
import math

import numpy as np
import pytest
import torch

from schedules import plot
from schedules.__main__ import main
from schedules.averaging import TailAverage, averaged, schedule_free_adamw
from schedules.greedy import Greedy
from schedules.rules import ADAPTIVE, SCHEDULES, SHAPES, bacon_factor, lr_factor, snac_factor
from schedules.schedule_free_plus import ScheduleFreePlus


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("warmup", [0.0, 0.07, 0.5])
def test_every_schedule_rises_once_then_never_again(name, warmup):
    total = 97
    lr = [lr_factor(name, step, total, warmup=warmup, floor=0.1) for step in range(total)]
    rise = math.ceil(warmup * total)
    assert all(0 < x <= 1 for x in lr)
    assert all(a < b for a, b in zip(lr[:rise], lr[1 : rise + 1], strict=True))
    assert all(a >= b for a, b in zip(lr[rise:], lr[rise + 1 :], strict=False))


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name not in ("constant", "inverse-sqrt")])
@pytest.mark.parametrize("floor", [0.0, 0.25])
def test_decaying_schedules_end_at_the_floor_and_stay(name, floor):
    assert lr_factor(name, 0, 100, floor=floor) == 1.0
    assert lr_factor(name, 100, 100, floor=floor) == lr_factor(name, 250, 100, floor=floor) == floor
    assert lr_factor(name, 99, 100, floor=floor) > floor


def test_rex_is_above_linear_and_matches_its_published_form():
    for step in range(1, 100):
        x = step / 100
        # Chen et al.: lr0 (1 - x) / (1/2 + 1/2 (1 - x)); 1e-15 is rounding.
        assert lr_factor("rex", step, 100) == pytest.approx((1 - x) / (0.5 + 0.5 * (1 - x)), rel=1e-15)
        assert lr_factor("rex", step, 100) > lr_factor("linear", step, 100)


def test_wsd_decays_over_its_share_alone():
    lr = [lr_factor("wsd", step, 100, decay=0.3) for step in range(101)]
    assert lr[:71] == [1.0] * 71 and lr[85] == pytest.approx(0.5, rel=1e-12)


@pytest.mark.parametrize(
    "shape, half", [("linear", 0.5), ("sqrt", 1 - 0.5**0.5), ("power", 1 - 0.5**0.4), ("cosine", 0.5)]
)
def test_wsd_falls_in_the_shape_asked_for(shape, half):
    lr = [lr_factor("wsd", step, 100, decay=0.3, shape=shape) for step in range(101)]
    assert lr[:71] == [1.0] * 71 and lr[85] == pytest.approx(half, rel=1e-12) and lr[100] == pytest.approx(0, abs=1e-15)
    assert all(a > b for a, b in zip(lr[70:], lr[71:], strict=False))
    with pytest.raises(ValueError, match="decay shape 'square': expected one of linear, sqrt, power, cosine"):
        lr_factor("wsd", 0, 10, shape="square")
    assert set(SHAPES) == {"linear", "sqrt", "power", "cosine"}


def test_polynomial_is_what_is_left_to_a_power_and_inverse_sqrt_begins_at_the_peak():
    for step in range(10, 100):
        linear, root = lr_factor("linear", step, 100, warmup=0.1), math.sqrt(10 / step)
        assert lr_factor("polynomial", step, 100, warmup=0.1) == linear
        assert lr_factor("polynomial", step, 100, warmup=0.1, power=2.0, floor=0.1) == 0.1 + 0.9 * linear**2
        assert lr_factor("inverse-sqrt", step, 100, warmup=0.1) == root
    assert lr_factor("inverse-sqrt", 10, 100, warmup=0.1) == 1 == lr_factor("inverse-sqrt", 0, 100)


def test_snac_is_the_signals_share_of_the_gradient():
    assert snac_factor(noise=3.0, signal=1.0) == 0.25  # B_noise = 3 B
    assert snac_factor(0.0, 1.0) == snac_factor(-0.1, 1.0) == 1.0  # an unbiased estimate of 0 may be below it
    assert snac_factor(1e9, 1.0) == snac_factor(1.0, 0.0) == snac_factor(1.0, -1.0) == 0.01
    assert snac_factor(math.nan, 1.0) == snac_factor(1.0, math.inf) == 0.01


def test_bacon_follows_the_best_step_within_a_factor_of_2():
    assert bacon_factor(0.03, 0.02) == pytest.approx(1.5, rel=1e-15)
    assert (bacon_factor(0.0, 0.02), bacon_factor(math.inf, 0.02)) == (0.5, 2.0)
    assert bacon_factor(1.0, 0.0) == bacon_factor(1.0, math.inf) == bacon_factor(math.nan, 1.0) == 1.0


def test_unknown_schedule():
    with pytest.raises(ValueError, match="unknown schedule 'rexx'; expected one of cosine"):
        lr_factor("rexx", 0, 10)


def test_the_plot_has_every_schedule_and_fot_and_no_line_on_another(monkeypatch):
    monkeypatch.setattr(plot, "png", lambda figure: figure)
    monkeypatch.setattr(plot, "RUN", 40)
    left, right = plot.draw(100, 0.05, 0.0, 0.2).axes
    labels = [text.get_text() for text in left.get_legend().get_texts()]
    assert {label.partition(",")[0] for label in labels} == set(SCHEDULES)
    lines = {line.get_label(): line for line in left.get_lines()}
    for a, b in itertools.combinations(lines.values(), 2):
        same = np.mean(np.asarray(a.get_ydata()) == np.asarray(b.get_ydata()))
        assert same < 0.5 or a.get_linestyle() != b.get_linestyle(), (a.get_label(), b.get_label())
    measured = {text.get_text().partition(",")[0] for text in right.get_legend().get_texts()}
    assert measured == set(ADAPTIVE)
    assert all(axes.get_xlabel() and axes.get_ylabel() and axes.get_title(loc="left") for axes in (left, right))


def test_plot_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plot, "RUN", 32)
    main(["plot", "--out", str(tmp_path / "new" / "lr.png"), "--steps", "50"])
    assert (tmp_path / "new" / "lr.png").read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["lr.png"]
    with pytest.raises(SystemExit) as stop:
        main(["plot", "--decay", "1.5"])
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_schedule_free_averages_inside_and_goes_on_with_the_same_bits():
    """Under a constant learning rate the averages are the plain mean of all iterates z so far."""
    pytest.importorskip("schedulefree", reason="schedulefree is not installed")
    torch.manual_seed(0)
    w = torch.nn.Parameter(torch.randn(7))
    optimizer = schedule_free_adamw([w], 0.1, betas=(0.9, 0.95))
    zs = []
    for _ in range(9):
        w.grad = w.detach() - 1 + 0.3 * torch.randn(7)
        optimizer.step()
        zs.append(optimizer.state[w]["z"].clone())
        before = w.detach().clone()
        with averaged(optimizer):
            # Equal weights, as the learning rate is constant; 1e-6 is fp32 rounding of nine steps.
            torch.testing.assert_close(w.detach(), torch.stack(zs).mean(0), rtol=1e-6, atol=1e-6)
        assert torch.equal(before, w.detach())


def test_the_tail_average_is_the_mean_of_the_last_weights_and_goes_on_from_its_state():
    w = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([w], 0.1)
    tail, seen = TailAverage(optimizer, 6.5), []
    for t in range(10):
        with averaged(optimizer):
            expected = torch.stack(seen[6:]).mean(0) if t > 6 else w.detach()
            torch.testing.assert_close(w.detach(), expected, rtol=1e-6, atol=1e-7)  # fp32 rounding of three means
        if t == 8:
            state = tail.state_dict()
            tail = TailAverage(optimizer, 6.5)
            tail.load_state_dict(state)
        w.data += torch.arange(3) + t
        tail.step()
        seen.append(w.detach().clone())
    assert tail.count == 4 and tail.done == 10 and torch.equal(w.detach(), seen[-1])
    torch.testing.assert_close(tail.mean[0], torch.stack(seen[6:]).mean(0), rtol=1e-6, atol=0)


def test_averaged_is_nothing_for_another_optimizer():
    w = torch.nn.Parameter(torch.ones(3))
    with averaged(torch.optim.AdamW([w])):
        assert torch.equal(w.detach(), torch.ones(3))


def test_schedule_free_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "schedulefree", None)
    with pytest.raises(ValueError, match="pip install schedulefree"):
        schedule_free_adamw([torch.nn.Parameter(torch.ones(1))], 0.1, betas=(0.9, 0.95))


def test_every_formula_rises_in_its_warm_up_and_never_after():
    for name in SCHEDULES:
        factors = [lr_factor(name, s, 100, warmup=0.1, floor=0.1) for s in range(100)]
        assert all(0 < f <= 1 for f in factors) and max(factors) == pytest.approx(1, abs=0.02)
        assert factors[:10] == sorted(factors[:10])  # warm-up rises
        assert factors[10:] == sorted(factors[10:], reverse=True)  # and the rest never does
    assert lr_factor("cosine", 55, 100, warmup=0.1) == pytest.approx(0.5)
    assert lr_factor("linear", 100, 100, floor=0.1) == pytest.approx(0.1)
    assert lr_factor("wsd", 79, 100) == 1 and lr_factor("wsd", 90, 100) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="cubic"):
        lr_factor("cubic", 0, 1)


def test_greedy_is_transformers_rule_with_bounds_of_its_own():
    """Loss by loss the learning rates of transformers.optimization.GreedyLR, smoothed over the same window."""
    theirs = pytest.importorskip("transformers.optimization").GreedyLR
    generator = torch.Generator().manual_seed(0)
    curve = 5 - torch.arange(400) / 100 + 0.05 * torch.randn(400, generator=generator)
    curve[250:] += torch.linspace(0, 4, 150)  # and it rises again
    p, q = torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(1))
    ours, other = torch.optim.SGD([p], 0.1), torch.optim.SGD([q], 0.1)
    rule = Greedy(ours, 400, window=20, low=0.05, high=2.0)
    scheduler = theirs(other, smooth=True, window_size=20, min_lr=0.005, max_lr=0.2)
    lrs = []
    for t, loss in enumerate(curve.tolist()):
        rule.observe(torch.tensor(7 * loss, dtype=torch.float64), 7)
        rule.step()
        scheduler.step(loss)
        lrs.append(ours.param_groups[0]["lr"])
        assert lrs[-1] == pytest.approx(other.param_groups[0]["lr"], rel=1e-9), t
        if t == 123:  # as after a resumption
            state, rule = rule.state_dict(), Greedy(torch.optim.SGD([p], 0.1), 400, window=20, low=0.05, high=2.0)
            rule.optimizer = ours
            rule.restore(state, t + 1)
    assert max(lrs) == 0.2 and lrs[-1] < 0.15 and rule.counts["raised"] > 5 < rule.counts["lowered"]


def test_greedy_rises_with_its_warm_up_and_leaves_out_what_is_not_finite():
    p = torch.nn.Parameter(torch.ones(1))
    rule = Greedy(optimizer := torch.optim.SGD([p], 0.1), 100, warmup=0.1)
    lrs = []
    for t in range(20):
        lrs.append(optimizer.param_groups[0]["lr"])
        rule.observe(math.nan if t == 12 else 5 - t / 10)
        rule.step()
    assert lrs[:11] == [0.1 * lr_factor("constant", t, 100, warmup=0.1) for t in range(11)] and rule.lr == 0.1
    assert rule.counts == {"raised": 0, "lowered": 0, "not_finite": 1} and rule.good == 9


def regression(make, steps=80, clip=None):
    """(losses, weights in training, averages) of a small net under ``make(parameters)``."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4)).double()
    X, seen = torch.randn(256, 8).double(), []
    Y = X[:, :4] - X[:, 4:]
    optimizer = make(net.parameters())
    for _ in range(steps):
        rows = torch.randint(0, 256, (32,))
        loss = (net(X[rows]) - Y[rows]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        if clip:
            optimizer.clipped_by = (torch.nn.utils.clip_grad_norm_(net.parameters(), clip) / clip).clamp(min=1)
        if hasattr(optimizer, "step_func"):
            optimizer.step_func(loss.item())
        else:
            optimizer.loss = loss.detach()
            optimizer.step()
        seen.append(loss.item())
    iterate = [p.detach().clone() for p in net.parameters()]
    with averaged(optimizer):
        return seen, iterate, [p.detach().clone() for p in net.parameters()]


def test_schedule_free_plus_learns_by_its_own_step_and_evaluates_averages():
    seen, iterate, mean = regression(lambda p: ScheduleFreePlus(p, 0.2, average_after=5))
    assert sum(seen[-10:]) < 0.8 * sum(seen[:10])
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(iterate, mean, strict=True))
    # Clipped or not, Polyak's step is that of the unclipped gradient, and Adam's direction forgets a constant factor:
    # what is left is eps and how clipping varies from step to step.
    clipped, _, _ = regression(lambda p: ScheduleFreePlus(p, 0.2, average_after=5), clip=1e-3)
    assert clipped[-1] == pytest.approx(seen[-1], rel=0.2)
    with pytest.raises(ValueError, match="set its attribute loss before each step"):
        ScheduleFreePlus([torch.nn.Parameter(torch.ones(1))]).step()
    with pytest.raises(ValueError, match="weight_decay=-1"):
        ScheduleFreePlus([torch.nn.Parameter(torch.ones(1))], weight_decay=-1)


def test_schedule_free_plus_first_step_by_hand():
    """f = 3, g = (2, -1), from w = (1, 1): a = 3 / (sqrt(pi / 2) 3), u = sign g, x = z in the first step."""
    w = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = ScheduleFreePlus([w], lr=0.5, weight_decay=2.0, eps=0.0)
    w.grad, optimizer.loss = torch.tensor([2.0, -1.0], dtype=torch.float64), 3.0
    optimizer.step()
    a = 0.5 * 3 / (math.sqrt(math.pi / 2) * 3)
    expected = 1 - 2 * a * a - a * torch.tensor([1.0, -1.0], dtype=torch.float64)
    torch.testing.assert_close(w.detach(), expected, rtol=1e-12, atol=0)


def test_schedule_free_plus_is_the_authors():
    """Where their package has it: 1.4.1 on PyPI does not."""
    theirs = getattr(pytest.importorskip("schedulefree"), "AdamCScheduleFreePlusPaper", None)
    if theirs is None:
        pytest.skip("this release of schedulefree has no AdamCScheduleFreePlusPaper")

    def make(p):
        optimizer = theirs(p, lr=0.7, weight_decay=3.0, c_warmup=5)
        optimizer.train()
        return optimizer

    for got, expected in zip(
        regression(make), regression(lambda p: ScheduleFreePlus(p, 0.7, weight_decay=3.0, average_after=5)), strict=True
    ):
        for a, b in zip(got, expected, strict=True):
            assert a == pytest.approx(b, rel=1e-9) if isinstance(a, float) else torch.allclose(a, b, rtol=1e-9)
