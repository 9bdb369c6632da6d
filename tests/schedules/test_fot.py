"""FoT: its measurements against known quadratics, its rule, its bounds, exact state, and the loops it runs in."""

import contextlib
import json
import logging
import math
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from lm_runs import rows, train

import schedules.fot
from data.windows import Windows
from runtime.folder import load_checkpoint
from schedules.fot import HOLDS, PARTS, RANGE, FoT, best_step, block_multipliers, can_gain, gate_of, parse_parts
from schedules.gradient_stats import GradientStats
from schedules.rules import ADAPTIVE, SHAPES, lr_factor

ROOT = Path(__file__).parents[2]

# ----------------------------------------------------------------------------------------------
# measurements


def quadratic(steps, lr, noise, micro, clip=None, begin=0, far=3.0):
    """Adam on sum h w^2 / 2 with white noise in the gradient: (measured means, true means)."""
    generator = torch.Generator().manual_seed(0)
    h = torch.logspace(-2, 1, 400)
    w = torch.nn.Parameter(far * torch.randn(400, generator=generator))
    optimizer = torch.optim.Adam([w], lr=lr, betas=(0.9, 0.99))
    stats, truth, n, by = GradientStats(optimizer), torch.zeros(3, dtype=torch.float64), 0, None
    for t in range(steps):
        G = h * w.detach()
        parts = [G + 2 * noise * torch.randn(400, generator=generator) for _ in range(4)]
        w.grad = parts[0] / 4
        measured = t >= begin and t % 2 == 0
        if measured and micro:
            stats.micro(0.25)
        w.grad = sum(parts) / 4
        if clip:
            by = (torch.nn.utils.clip_grad_norm_([w], clip) / clip).clamp(min=1)
        stats.sample(measured, lr, by)
        old = w.detach().clone()
        optimizer.step()
        if measured:
            u = (old - w.detach()) / lr
            truth += torch.stack([G @ G, G @ u, u @ (h * u)]).double()
            n += 1
    measured = stats.unweighted(stats.means(stats.sums.tolist()))
    return measured, dict(zip(("g2", "slope", "curvature"), (truth / n).tolist(), strict=True))


def test_signal_noise_and_best_step_of_a_noisy_quadratic():
    got, true = quadratic(800, 0.03, 0.3, micro=True, begin=100, far=0.3)
    # 350 samples of 400 coordinates; N = 400 * 0.3^2. Sampling error of |g_r|^2: sqrt(2 / 400 / 350) = 0.4 % of N / r,
    # which is 0.5 % of N here.
    assert got["noise"] == pytest.approx(36, rel=0.02)
    assert got["g2"] == pytest.approx(true["g2"], abs=0.02 * 36)
    # P is approximated, and 350 samples of the slope have an error of some 15 %; m's bounds are factors of 2.
    assert got["slope"] / got["curvature"] == pytest.approx(true["slope"] / true["curvature"], rel=0.4)
    assert got["after"] < 0 < got["slope"]  # 0.03 is more than the best step here


def test_without_micro_batches_overshooting_is_seen_as_no_slope():
    got, true = quadratic(700, 0.03, 0.3, micro=False, begin=100, far=0.3)
    assert got["noise"] == pytest.approx(36, rel=0.1) and true["slope"] > 0 > got["slope"]
    early, true = quadratic(150, 0.003, 0.1, micro=False)  # far from the minimum: the slope is plain to see
    assert early["slope"] == pytest.approx(true["slope"], rel=0.05)


@pytest.mark.parametrize("clip", [None, 10.0])
def test_clipped_or_not_it_is_the_unclipped_gradient_that_is_measured(clip):
    got, true = quadratic(150, 0.003, 0.1, micro=True, clip=clip)
    assert true["g2"] > 10 * 10.0**2  # it was clipped to a third and less
    # The transient has hardly any noise: what is left is the approximation of P, which lags by a step. Measured: 5 %.
    assert (got["g2"], got["slope"]) == pytest.approx((true["g2"], true["slope"]), rel=0.1)


def test_identical_micro_batches_have_no_noise():
    got, _ = quadratic(20, 1e-3, 0.0, micro=True)
    assert abs(got["noise"]) < 0.01 * got["g2"]  # bfloat16's rounding, squared and summed, is far below


# ----------------------------------------------------------------------------------------------
# the pieces of the rule


def hypothesis():
    return pytest.importorskip("hypothesis", reason="pip install hypothesis")


def test_a_step_gains_the_target_or_the_best_one_gains_less():
    h = hypothesis()
    floats = h.strategies.floats

    @h.settings(max_examples=100, deadline=None, derandomize=True)
    @h.given(floats(1e-3, 1e3), floats(-1e3, 1e3), floats(0, 10, allow_subnormal=False))
    def check(slope, curvature, target):
        best = best_step(slope, curvature)
        if can_gain(target, slope, curvature):
            eta = 2 * target / (slope + math.sqrt(slope**2 - 2 * curvature * target))  # the least that gains it
            gained = eta * slope - 0.5 * eta**2 * curvature
            assert eta <= best * (1 + 1e-12)
            # Rounding: of the terms, and of a root close to the double one.
            assert gained == pytest.approx(target, rel=1e-6, abs=1e-9 * slope * eta)
        else:
            assert target > (best * slope - 0.5 * best**2 * curvature) * (1 - 1e-12)

    check()
    assert best_step(-1.0, 1.0) == 0.0 and not can_gain(0.1, -1.0, 1.0)
    assert best_step(1.0, -1.0) == math.inf and can_gain(9.0, 1.0, -1.0)


def test_gate_is_bounded_falls_and_has_no_jump():
    h = [i / 1000 for i in range(3000)]
    gates = [gate_of(x) for x in h]
    assert all(0.7 <= g <= 1.5 for g in gates) and all(
        0 <= a - b < 0.002 for a, b in zip(gates, gates[1:], strict=False)
    )
    assert [gate_of(x) for x in (0.7, 1.0, 1.3)] == pytest.approx([1.5, 1.0, 0.7]) and gate_of(None) == 1.0
    assert gate_of(math.inf) == gate_of(math.nan) == 1.0


def test_block_multipliers_have_geometric_mean_1():
    h = hypothesis()
    rms = h.strategies.floats(1e-12, 1e6)

    @h.settings(max_examples=100, deadline=None, derandomize=True)
    @h.given(h.strategies.lists(h.strategies.tuples(rms, rms), min_size=1, max_size=30))
    def check(rows):
        blocks = block_multipliers(rows)
        assert all(0.5 <= b <= 2 for b in blocks)
        assert sum(map(math.log, blocks)) == pytest.approx(0, abs=1e-9 * len(blocks))  # 60 bisections
        by_share = [b for _, b in sorted(zip([a / p for p, a in rows], blocks, strict=True))]
        assert all(x <= y * (1 + 1e-9) for x, y in zip(by_share, by_share[1:], strict=False))

    check()
    assert block_multipliers([(1.0, 1.0), (1.0, 0.0)]) == [1.0, 1.0] and block_multipliers([]) == []
    assert block_multipliers([(1.0, math.nan)]) == [1.0]


# ----------------------------------------------------------------------------------------------
# the scheduler


def drive(
    rule, losses, total, *, scale=1.0, start=0, stop=None, state=None, reduce=None, seen=None, late=False, **options
):
    """Adam on a noisy bowl under ``rule``, told of ``losses``: (learning rates, scheduler, state at the end)."""
    generator = torch.Generator().manual_seed(1)
    w = torch.nn.Parameter(torch.ones(6))
    optimizer = torch.optim.AdamW([{"params": [w], "block": 0}], lr=0.1)
    fot = FoT(optimizer, total, rule=rule, every=4, warmup=0.1, reduce=reduce, **options)
    fot.late = late
    if state:
        w.data.copy_(state["w"])
        optimizer.load_state_dict(state["optimizer"])
        fot.load_state_dict(state["fot"])
    noise, fisher = torch.randn(total, 2, 6, generator=generator), torch.rand(total, 5, generator=generator)
    lrs = []
    for t in range(start, total if stop is None else stop):
        parts = scale * (w.detach() + noise[t])
        lrs.append(optimizer.param_groups[0]["lr"])
        assert lrs[-1] == fot.get_last_lr()[0]
        w.grad = parts[0] / 2
        fot.observe(losses[t], 1, share=0.5)
        w.grad = (parts[0] + parts[1]) / 2
        fot.observe(2 * losses[t], 2, fisher=fisher[t], prompt=torch.arange(5) < 2, answer=torch.arange(5) > 2)
        optimizer.step()
        decision = fot.step()
        if decision and seen is not None:
            seen.append(decision | {"step": t + 1})
    return lrs, fot, {"w": w.detach().clone(), "optimizer": optimizer.state_dict(), "fot": fot.state_dict()}


def falling(n):
    return [2 + 3 / (1 + t) ** 0.5 for t in range(n)]


@pytest.mark.parametrize("rule", ADAPTIVE)
def test_any_history_gives_a_learning_rate_in_range(rule):
    h = hypothesis()
    losses = h.strategies.floats(allow_nan=True, allow_infinity=True) | h.strategies.floats(0, 10)
    top = 0.1 * RANGE * 1.5 if rule == "fot" else 0.2  # peak, m and gate; bacon's factor

    @h.settings(max_examples=12, deadline=None, derandomize=True)
    @h.given(
        h.strategies.lists(losses, min_size=8, max_size=8) | h.strategies.just(falling(8)),
        h.strategies.sampled_from([0.0, 1e-30, 1e-8, 1.0, 1e8, 1e30, math.nan]),
        h.strategies.floats(0, 2),
    )
    def check(some, scale, slope):
        curve = [v * (1 + slope * t) for t, v in enumerate(some * 6)]
        lrs, fot, _ = drive(rule, curve, 48, scale=scale)
        assert all(0 < lr <= top for lr in lrs)  # nan fails too
        assert 0 <= fot.get_last_lr()[0] <= top

    check()


@pytest.mark.parametrize("rule", ADAPTIVE)
def test_on_a_gpu_the_same_is_decided_a_step_later(rule):
    now, late = [], []
    with_now, _, _ = drive(rule, falling(60), 60, seen=now)
    with_late, _, _ = drive(rule, falling(60), 60, seen=late, late=True)
    assert [d["step"] for d in now] == list(range(4, 60, 4)) and [d["step"] for d in late] == list(range(5, 60, 4))
    at = next(t for t, (a, b) in enumerate(zip(with_now, with_late, strict=True)) if a != b)
    before = [d["step"] for d in now if d["step"] <= at]
    assert before[-1] == at, "the step after a decision is the first that differs"
    for a, b in zip(now[: len(before)], late, strict=False):
        assert a | {"step": 0} == b | {"step": 0}, "what is read is of the same steps"


@pytest.mark.parametrize("rule", ADAPTIVE)
@pytest.mark.parametrize("cut, late", [(1, False), (9, False), (32, False), (42, False), (32, True), (33, True)])
def test_resumed_anywhere_the_learning_rates_are_the_same_bits(rule, cut, late):
    """Step 9 is between the two halves of a sample, 32 a decision, which on a GPU is made at step 33."""
    whole, _, end = drive(rule, falling(60), 60, late=late)
    first, _, state = drive(rule, falling(60), 60, stop=cut, late=late)
    state["fot"] = json.loads(json.dumps(state["fot"]))  # plain numbers and no others
    assert ("sent" in state["fot"]) == (late and cut == 32)
    second, _, resumed = drive(rule, falling(60), 60, start=cut, state=state, late=late)
    assert first + second == whole
    assert json.dumps(resumed["fot"]) == json.dumps(end["fot"]) and torch.equal(resumed["w"], end["w"])
    assert len(set(whole)) > 7  # more than the warm-up: something was decided


def test_the_envelope_alone_is_linear_to_zero():
    lrs, fot, _ = drive("fot", falling(40), 40, parts=("envelope",))
    assert lrs == [0.1 * lr_factor("linear", t, 40, warmup=0.1) for t in range(40)]
    assert fot.get_last_lr() == [0.0] and fot.counts["decisions"] == 9
    for shape, fall in SHAPES.items():
        lrs, _, _ = drive("fot", falling(40), 40, parts=("envelope",), shape=shape)
        assert lrs[4:] == [0.1 * fall(t / 36) for t in range(36)]
    with pytest.raises(ValueError, match="decay shape 'round'"):
        drive("fot", falling(40), 40, shape="round")
    lrs, _, _ = drive("fot", falling(40), 40, parts=())
    assert lrs[4:] == [0.1] * 36


@pytest.mark.parametrize("total", [200, 400])
def test_m_begins_low_rises_slowly_and_follows_the_best_step(total):
    """From the logged decisions: m is twice the best step over the peak, in its range, and no faster than DOUBLING, or
    than an eighth of a shorter run where the best step is finite."""
    lrs, fot, _ = drive("fot", falling(total), total, parts=("envelope", "noise", "gate"), stop=197, seen=(rows := []))
    assert lrs[:4] == [0.1 / RANGE * lr_factor("linear", t, total, warmup=0.1) for t in range(4)]
    m, free = 1 / RANGE, 0
    for d in rows:
        measured = d["eta_opt"] is not None and math.isfinite(d["eta_opt"])
        rise = 2 ** (4 / (min(40, total / 8) if measured else 40))
        aim = min(max(2 * d["eta_opt"] / 0.1, 1 / RANGE), RANGE) if d["eta_opt"] is not None else 1.0
        free += aim < m * rise
        m = min(aim, m * rise)
        assert d["gate"] == gate_of(d["h"]) and d["multiplier"] == pytest.approx(m * d["gate"], rel=1e-12)
        assert d["bound"] == (aim in (RANGE, 1 / RANGE))
        if d["eta_opt"] is not None:
            best = d["slope"] / d["curvature"] if d["curvature"] > 0 else math.inf
            assert d["eta_opt"] == pytest.approx(best if d["slope"] > 0 else 0.0)
    assert 5 < free < len(rows) - 5  # both the limit and the measurement were seen at work
    assert lrs[196] == pytest.approx(0.1 * m * d["gate"] * lr_factor("linear", 196, total, warmup=0.1), rel=1e-12)
    assert fot.weight == pytest.approx(1 - 0.9 ** (len(rows) - 1), rel=1e-12)  # the first saw no whole sample


def test_without_the_noise_part_or_a_decision_m_is_1():
    lrs, _, _ = drive("fot", falling(40), 40, parts=("envelope", "forecast"), stop=3)
    assert lrs == [0.1 * lr_factor("linear", t, 40, warmup=0.1) for t in range(3)]
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    assert FoT(optimizer, 20, every=20).get_last_lr() == [0.1]  # W is the whole run: it would stay at the bottom


def test_where_nothing_can_be_measured_m_goes_to_1_and_stays():
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    fot = FoT(optimizer, 400, every=5, parts=("noise",))
    for _ in range(200):
        optimizer.param_groups[0]["params"][0].grad = torch.full((2,), math.nan)  # no sample is finite
        optimizer.step()
        fot.step()
    assert fot.get_last_lr() == [0.1] and fot.decision["eta_opt"] is None


def test_the_forecast_holds_the_learning_rate_while_that_ends_lower():
    """On a curve that falls for long, a sure forecast holds, and near the end it decays to zero; on a flat one there
    is nothing to hold for."""
    rows = []
    lrs, fot, _ = drive(
        "fot", [2 + 3 / (1 + t / 20) for t in range(400)], 400, parts=("envelope", "forecast"), seen=rows
    )
    sure = [d for d in rows if d["target"] is not None]
    planned = [d for d in rows if d["hold"] is not None]
    assert len(planned) > 10 and all(d["D"] > 0 for d in sure)
    assert all(d["sd_D"] >= 0.5 * d["D"] for d in rows if d["target"] is None and d["D"] and d["step"] > 40)
    after = lrs[40:]  # the warm-up
    assert all(a >= b for a, b in zip(after, after[1:], strict=False))  # it holds, it never rises
    assert sum(a == b for a, b in zip(after, after[1:], strict=False)) > 200
    assert fot.get_last_lr() == [0.0] and lrs[-1] < 0.05 * max(lrs)
    for d in planned[:3]:  # the plan it logs is one of the shares of the steps that were left
        step = d["step"]
        assert any(d["hold"] == pytest.approx(step + share * (400 - step)) for share in HOLDS)
    # The target: what this step has to gain, D over the envelope to come in units of the present one.
    d = planned[0]
    ahead = [drive_share(d, t) for t in range(d["step"], 400)]
    assert d["target"] == pytest.approx(d["D"] / sum(ahead), rel=0.02)  # the sum is taken at 64 points

    lrs, fot, _ = drive("fot", [2.0] * 400, 400, parts=("envelope", "forecast"))
    assert lrs == [0.1 * lr_factor("linear", t, 400, warmup=0.1) for t in range(400)]
    _, fot, _ = drive("fot", falling(400), 400, parts=("envelope", "forecast"), stop=300, same_units=False)
    assert fot.decision["hold"] is fot.decision["target"] is None


def drive_share(d, t):
    """The envelope at step t over that at the decision, when the plan is to hold until d["hold"] of 400."""
    return min(1.0, (400 - t) / (400 - d["hold"]))


def test_the_literal_rule_number_for_number():
    from schedules.forecast import literal_forecast

    losses = [3 * (1 + t) ** -0.02 for t in range(60)]
    lrs, fot, _ = drive("fot-literal", losses, 60, stop=41, scale=5.0)
    t = list(range(1, 41))
    D = literal_forecast(t, losses[:40], 40) - literal_forecast(t, losses[:40], 60)
    d = fot.decision
    x = GradientStats.unweighted({k: v / fot.weight for k, v in fot.average.items()})
    assert d["D"] == pytest.approx(D, rel=1e-12) and d["target"] == pytest.approx(D / 20, rel=1e-12)
    bound = 2 * (x["noise"] + x["curvature"] / x["step2"]) * D / 20 / x["batch2"] * d["gate"]
    assert lrs[40] == pytest.approx(0.1 * min(max(bound / 0.1, 0.01), 1.0), rel=1e-9)
    assert (d["bound"], fot.counts["clipped"] > 0) == (not 0.001 <= bound <= 0.1, True)
    # Its gate compounds, ours does not.
    gates, gate = [1.5 if x < 0.7 else 0.7 if x > 1.3 else 1.0 for x in (0.5, 0.5, 2.0)], 1.0
    for h, factor in zip((0.5, 0.5, 2.0), gates, strict=True):
        fot._literal(40, True, {}, {"h": h})
        gate *= factor
    assert fot.literal_gate == pytest.approx(d["gate"] * gate)


def test_bacon_bends_by_what_was_measured_over_the_whole_run():
    """At the first measured decision the run so far is that window, and the factor is 1; later it is not."""
    _, fot, _ = drive("bacon", falling(60), 60, stop=50, seen=(decided := []))
    factors = [d["multiplier"] for d in decided if d["eta_opt"] is not None]
    assert factors[0] == pytest.approx(1.0, rel=1e-9) and max(factors) > 1.2
    slope, drop = fot.reference
    last = decided[-1]
    assert last["multiplier"] == pytest.approx(min(max(last["eta_opt"] / (slope / drop), 0.5), 2.0), rel=1e-12)


def test_blocks_move_their_own_groups_only():
    a, b, c = (torch.nn.Parameter(torch.ones(3)) for _ in range(3))
    groups = [{"params": [a], "block": 0}, {"params": [b], "block": 1}, {"params": [c]}]
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    fot = FoT(optimizer, 20, every=2, parts=("envelope", "blocks"), block_rms=lambda: torch.tensor([[1.0, 3], [1, 1]]))
    for t in range(6):
        for p in (a, b, c):
            p.grad = torch.randn(3)
        optimizer.step()
        fot.step()
        first, second, plain = fot.get_last_lr()
        assert plain == 0.1 * lr_factor("linear", t + 1, 20)
        assert first == second == plain if t < 3 else first > plain > second
        assert first * second == pytest.approx(plain**2, rel=1e-9)  # 60 bisections


def test_one_synchronisation_a_window():
    calls = []
    _, fot, _ = drive("fot", falling(40), 40, reduce=lambda x: calls.append(1) or x, stop=39)
    assert fot.counts["decisions"] == 9 and len(calls) == 9 + 4  # and state_dict, of four buffers, at the end


def test_a_long_window_an_unreadable_optimizer_and_bad_settings(caplog):
    p = torch.nn.Parameter(torch.ones(2))
    with caplog.at_level(logging.WARNING, "scorecast"):
        fot = FoT(torch.optim.RMSprop([p], lr=0.1), 12, every=64)
        assert "W = 64 is not shorter than the run of 12 steps" in caplog.text
        assert "RMSprop keeps no readable moments" in caplog.text
    for t in range(30):  # and beyond the end
        p.grad = torch.ones(2)
        fot.optimizer.step()
        fot.step()
        assert fot.get_last_lr() == [0.1 * lr_factor("linear", t + 1, 12)] and not fot.splits
    adam = torch.optim.AdamW([p])
    for options, says in [
        (dict(total=0), "total=0"),
        (dict(total=10, every=0), "every=0"),
        (dict(total=10, warmup=1.5), r"warmup=1.5: expected a share in \[0, 1\)"),
        (dict(total=10, beta=1.0), "beta=1.0"),
        (dict(total=10, rule="fott"), "rule 'fott': expected one of snac"),
        (dict(total=10, parts=("noise", "gates")), "FoT parts 'noise,gates': expected some of envelope"),
    ]:
        with pytest.raises(ValueError, match=says):
            FoT(adam, **options)
    assert parse_parts("none") == () and parse_parts("gate, noise") == ("gate", "noise")
    assert parse_parts(",".join(PARTS)) == PARTS
    with pytest.raises(ValueError, match="or none"):
        parse_parts("")
    state = drive("fot", falling(8), 8, stop=6)[2]
    with pytest.raises(ValueError, match="FoT's state is of other settings or code"):
        drive("fot", falling(8), 8, start=6, state=state, shape="sqrt")
    del state["fot"]["settings"]["measures"]  # as before samples had weights
    with pytest.raises(ValueError, match="FoT's state is of other settings or code"):
        drive("fot", falling(8), 8, start=6, state=state)
    # As before short runs had a rise, and short windows samples, of their own.
    for total, every, says in ((8, 4, "doubling 40.0 for 1.0"), (400, 8, "sample_every 8 for 4"), (400, 32, "")):
        state = FoT(adam, total, every=every).state_dict()
        del state["settings"]["doubling"], state["settings"]["sample_every"]
        with pytest.raises(ValueError, match=rf"\({says}\)") if says else contextlib.nullcontext():
            FoT(adam, total, every=every).load_state_dict(state)
    # And before the forecast knew of a loss that is still high: where it begins as an untrained model's.
    for rule, began, says in (("fot", 6.2, "early 0.0 for 0.015"), ("fot", 1.3, ""), ("snac", 6.2, "")):
        state = FoT(adam, 400, rule=rule).state_dict()
        del state["settings"]["early"]
        state["forecaster"]["began"] = began
        with pytest.raises(ValueError, match=rf"\({says}\)") if says else contextlib.nullcontext():
            FoT(adam, 400, rule=rule).load_state_dict(state)
    state = drive("fot", falling(8), 8)[2]["fot"]
    with pytest.raises(ValueError, match="FoT's state is of other settings or code"):
        FoT(adam, 10).load_state_dict(state)
    with pytest.raises(ValueError, match="no state of FoT"):
        FoT(adam, 10).load_state_dict({"last_epoch": 3})


def test_steps_that_nobody_observed_are_no_points():
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
    fot = FoT(optimizer, 100, every=5)
    for _ in range(5):
        optimizer.param_groups[0]["params"][0].grad = torch.ones(2)
        optimizer.step()
        fot.step()
    assert fot.forecaster.points == 0 and fot.decision["reason"].startswith("0 points") and str(fot) == "no forecast"


def test_transformers_trainer_takes_it(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config)
    data = [{"input_ids": torch.arange(i, i + 12) % 32, "labels": torch.arange(i, i + 12) % 32} for i in range(64)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    fot = FoT(optimizer, 40, every=8)
    fot.watch(model)
    args = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=40,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        report_to=[],
        logging_steps=1,
        save_steps=20,
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model, args, train_dataset=data, optimizers=(optimizer, fot))
    trainer.train()
    assert fot.last_epoch == 40 and fot.counts["decisions"] == 4 and fot.get_last_lr() == [0.0]
    assert fot.forecaster.points == 32 and fot.decision["slope"] is not None
    logged = [r["loss"] for r in trainer.state.log_history if "loss" in r]
    assert fot.forecaster.recent == pytest.approx(logged[:32], rel=1e-3)  # the Trainer's own, over accumulated batches
    saved = torch.load(tmp_path / "checkpoint-20" / "scheduler.pt", weights_only=True)
    assert saved["last_epoch"] == 20


# ----------------------------------------------------------------------------------------------
# train_lm.py


@pytest.fixture(scope="module")
def base(lm_base):
    return [*lm_base, *"--steps 30 --eval-every 15 --log-every 5 --sample-tokens 4".split()]


WINDOW = ("--fot-window", "4")
AVERAGES = {"schedule-free": (), "greedy": "--optimizer muon --tail-average 0.5".split()}  # which decide in no windows


OVER_ITS_AVERAGES = "fot --optimizer schedule-free"


@pytest.mark.parametrize("rule", ["fot", OVER_ITS_AVERAGES, "fot-literal", "schedule-free", "greedy"])
def test_train_lm_resumes_exactly_and_logs_each_decision(rule, base, tmp_path, monkeypatch, capsys):
    if "schedule-free" in rule:
        pytest.importorskip("schedulefree", reason="schedulefree is not installed")
    flags = [*base, "--schedule", *rule.split(), *AVERAGES.get(rule, WINDOW)]
    flags += [] if rule == "fot" else ["--steps", "16", "--eval-every", "8"]
    assert train(flags, tmp_path / "whole") == 0
    original = Windows.batch_indices

    def stop(self, step, *args):
        if step == 8:  # between the halves of a sample, in the middle of a window
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, step, *args)

    with monkeypatch.context() as m:
        m.setattr(Windows, "batch_indices", stop)
        assert train(flags, tmp_path / "cut") == 128 + signal.SIGTERM
    assert load_checkpoint(tmp_path / "cut" / "last.pt")["step"] == 9
    if rule == "fot":  # a later FoT that measures otherwise says so, and leaves the run as it is
        with monkeypatch.context() as m, pytest.raises(SystemExit) as refused:
            m.setattr(schedules.fot, "STATISTICS", schedules.fot.STATISTICS[::-1])
            train(flags, tmp_path / "cut", "--resume")
        assert refused.value.code == 2
        assert "error: FoT's state is of other settings or code (measures" in capsys.readouterr().err
    assert train(flags, tmp_path / "cut", "--resume") == 0
    for kind in ("train", "fot", "val"):
        assert rows(tmp_path / "cut", kind) == rows(tmp_path / "whole", kind)
    if rule in AVERAGES or rule == OVER_ITS_AVERAGES:  # these are what is evaluated and kept, the iterates what goes on
        state = load_checkpoint(tmp_path / "whole" / "last.pt")
        iterate = state["optimizer"]["iterate"]
        assert iterate.keys() == state["model"].keys()
        assert any(not torch.equal(iterate[k], w) for k, w in state["model"].items())
        summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
        assert summary["val_nll"] == pytest.approx(rows(tmp_path / "whole", "val")[-1]["nll"], rel=1e-6)
    decided = rows(tmp_path / "whole", "fot")
    if rule in AVERAGES:
        return
    if rule == OVER_ITS_AVERAGES:  # the learning rate is the peak times m, to the end
        assert [r["lr"] for r in decided] == [3e-3 * r["multiplier"] for r in decided]
        assert len({r["multiplier"] for r in decided}) == len(decided) == 3
    assert [r["step"] for r in decided] == list(range(4, 29 if rule == "fot" else 13, 4))
    assert {"forecast", "sd", "D", "target", "g2", "noise", "curvature", "bound", "gate", "lr"} <= set(decided[-1])
    assert 0 < decided[-1]["noise"] < math.inf
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert summary[f"{rule.split()[0]}_decisions"] == len(decided)


def test_train_lm_forecasts_the_nll_and_takes_the_old_flag(base, tmp_path, capsys):
    """Under another score than CE the forecast, of the NLL, does not steer."""
    assert train(base, tmp_path / "snac", "--lr-schedule", "snac", "--steps", 9, *WINDOW) == 0
    assert rows(tmp_path / "snac", "fot")[-1]["lr"] == rows(tmp_path / "snac", "train")[-1]["lr"] < 3e-3
    capsys.readouterr()
    assert train(base, tmp_path / "dpsm", "--schedule", "fot", "--loss", "dpsm", *WINDOW) == 0
    assert re.search(r"step \d+/30, loss \S+, forecast \d\.\d+ \+- 0\.\d+, ", capsys.readouterr().err)
    last, trained = rows(tmp_path / "dpsm", "fot")[-1], rows(tmp_path / "dpsm", "train")[-1]
    assert abs(last["forecast"] - trained["nll"]) < 0.5 < last["forecast"] - trained["loss"]
    assert last["target"] is None


@pytest.mark.parametrize(
    "more, says",
    [
        (("--schedule", "fott"), "argument --schedule/--lr-schedule: invalid choice: 'fott'"),
        (("--schedule", "fot", "--fot-parts", "noise,gates"), "FoT parts 'noise,gates': expected some of envelope"),
        (("--schedule", "fot", "--fot-window", 0), "--fot-window 0 must be at least 1"),
        (("--schedule", "fot", "--fot-beta", 1), r"--fot-beta 1.0 is outside \[0, 1\)"),
        (("--schedule", "fot", "--lr-warmup", 1), "--lr-warmup 1 leaves no step"),
    ],
)
def test_bad_flags_are_one_line(more, says, base, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train(base, tmp_path / "run", *more)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and re.search(says, error) and error.strip().count("\n") == 0
    assert not (tmp_path / "run").exists()
