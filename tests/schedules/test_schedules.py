"""Learning-rate schedules: their ends, their shapes, and the picture of them."""

import itertools
import math

import numpy as np
import pytest
import torch

from schedules import plot
from schedules.__main__ import main
from schedules.averaging import averaged, schedule_free_adamw
from schedules.rules import ADAPTIVE, SCHEDULES, bacon_factor, lr_factor, snac_factor


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
