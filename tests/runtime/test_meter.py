"""The Meter: what a row holds, when one is due, the best so far, patience, divergence, and its state."""

import json
import math
import os
from types import SimpleNamespace

import pytest
import torch

from eval import metrics
from kernels import Calibration, softmax_moments
from runtime.folder import RunFolder
from runtime.machine import World, peak_memory
from runtime.meter import DivergenceWatch, Meter
from runtime.process import Stopped

CPU = torch.device("cpu")


def watched(losses) -> dict:
    watch = DivergenceWatch(CPU)
    for loss in losses:
        loss = torch.tensor(loss)
        watch.update(loss, torch.isfinite(loss))
    return watch.read()


def test_divergence_is_counted_as_defined():
    assert watched([2.0] * 100)["divergences"] == 0
    assert watched([2.0] * 50 + [5.0] * 31 + [2.0])["divergences"] == 0  # 31 steps above twice the average: not yet
    assert watched([2.0] * 50 + [5.0] * 32)["divergences"] == 1
    assert watched([2.0] * 50 + [5.0] * 100)["divergences"] == 1  # one event, however long
    seen = watched([2.0, math.nan, 2.0, math.inf, math.nan, math.nan, 2.0])
    assert seen["divergences"] == seen["skipped"] == 4 and seen["worst_streak"] == 3 and seen["streak"] == 0


def new_meter(tmp_path, **changes) -> Meter:
    cfg = SimpleNamespace(**{"steps": 12, "log_every": 2, "eval_every": 6, "patience": 0} | changes)
    run = RunFolder(tmp_path, World(0, 1, CPU))
    return Meter(run, Calibration(), metrics, cfg, counted=("flipped",))


def step(meter: Meter, loss: float = 2.0, norm: float = 0.5, flipped: int = 3) -> None:
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(meter.step))
    moments = softmax_moments(logits, torch.arange(5))
    meter.add(torch.tensor(loss / 2), moments)
    meter.add(torch.tensor(loss / 2), moments)
    meter.end_step(torch.tensor(norm), 1.0, tokens=10, flipped=flipped)


@pytest.fixture
def meter(tmp_path):
    meter = new_meter(tmp_path)
    meter.start()
    yield meter
    meter.end()


def test_a_row_has_means_over_its_steps(meter):
    step(meter, loss=2.0, norm=0.5)
    assert not meter.due()
    step(meter, loss=4.0, norm=1.5)
    assert meter.due() and meter.at_log and not meter.at_eval
    row = meter.row(alpha=0.25, lr=1e-3)
    assert row["loss"] == 3.0 and row["grad_norm"] == 1.0 and row["clip_rate"] == 0.5 and row["steps"] == 2
    assert row["flipped"] == 6 and row["alpha"] == 0.25 and row["tokens_per_second"] > 0
    assert {m.key for m in metrics.shown(metrics.TOKENS, "train")} <= set(row)
    assert meter.tokens == 20 and "loss 3.000" in meter.bar.postfix and ", alpha 0.25, " in meter.bar.desc
    for _ in range(2):
        step(meter, loss=1.0)
    assert meter.due() and meter.row(alpha=0, lr=0)["loss"] == 1.0  # the window began anew


@pytest.mark.parametrize("report, code", [("last", None), ("best", 1)])
def test_a_run_that_is_to_report_best_weights_fails_without(tmp_path, capsys, report, code):
    meter = new_meter(tmp_path, report=report)
    meter.start()
    for _ in range(12):
        step(meter)
    meter.due()
    meter.judge({"nll": math.nan, "ppl": 0, "ece10": 0, "brier": 0})
    assert meter.end() == code
    assert ("no validation had a finite NLL" in capsys.readouterr().err) == bool(code)
    found = meter.summary(1.0, torch.float32)
    assert found["best_step"] is found["best_val_nll"] is None


def test_steps_that_are_not_finite_are_skipped_and_end_a_hopeless_run(meter):
    step(meter)
    step(meter, loss=math.nan)
    assert meter.due()
    row = meter.row(alpha=0, lr=0)
    assert row["steps"] == 1 and row["skipped"] == 1 and row["loss"] == 2.0 and meter.ending is None and meter.running
    for _ in range(3):
        step(meter, norm=math.inf)
    step(meter)
    assert meter.due()
    meter.row(alpha=0, lr=0)
    assert meter.ending == "diverged" and not meter.running


def test_no_row_where_no_step_was_finite(meter):
    for _ in range(2):
        step(meter, loss=math.nan)
    assert meter.due() and meter.row(alpha=0, lr=0) is None


def test_best_stale_and_patience(tmp_path, capsys):
    meter, others = new_meter(tmp_path, patience=2), {"ppl": 1.0, "ece10": 0.1, "brier": 0.5}
    meter.start()
    meter.step = 4
    assert meter.judge(others | {"nll": 5.0}) and meter.best == {"step": 4, "nll": 5.0}
    meter.step = 8
    assert not meter.judge(others | {"nll": 5.5}) and meter.ending is None
    assert not meter.judge(others | {"nll": 5.0}) and meter.ending == "early_stop"
    meter.end()
    assert "step 8: validation ppl 1.0000, nll 5.5000, ece10 0.1000, brier 0.5000" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("last_loss", "nll", "weight", "saved", "ending"),
    [
        (1.0, 2.0, 1.0, True, None),
        (math.nan, 2.0, 1.0, True, None),  # the step was skipped: its weights are those of before
        (1.0, math.nan, 1.0, False, None),  # may go on to better ones
        (1.0, 2.0, math.inf, False, "not_finite"),
        (1.0, 2.0, math.nan, False, "not_finite"),
    ],
)
def test_weights_are_saved_where_they_and_their_validation_are_finite(
    meter, last_loss, nll, weight, saved, ending, capsys
):
    model = torch.nn.Linear(3, 3)
    model.frozen = torch.nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False)  # as NF4's
    with torch.no_grad():
        model.weight[1, 1] = weight
    for i in range(6):
        step(meter, loss=last_loss if i == 5 else 1.0)
    assert meter.due() and meter.at_eval
    meter.row(alpha=0, lr=0)
    meter.judge({"nll": nll, "ppl": 1.0, "ece10": 0.1, "brier": 0.5})
    assert meter.saves(model) is saved and meter.ending == ending
    assert ("step 6: no checkpoint" in capsys.readouterr().err) is (not saved and ending is None)
    if not saved:  # those of the last step are what the final evaluation is of: there are none
        meter.step = meter.steps
        assert not meter.saves(model) and meter.ending == "not_finite"
        assert meter.run.ended(meter.ending, 12, None) == 1
        assert "not finite and were not saved; stopped at step 12. No checkpoint" in capsys.readouterr().err


def test_a_signal_stops_at_the_next_step(meter):
    step(meter)
    meter.stop.signal = "SIGTERM"
    assert meter.due() and meter.stopping and meter.row(alpha=0, lr=0) is None  # no line is due, and the window goes on
    assert meter.ending == "stopped" and meter.saves(torch.nn.Linear(1, 1)) and meter.sums[0] == 1


def test_state_goes_on_where_it_was(tmp_path):
    whole, cut = new_meter(tmp_path), new_meter(tmp_path)
    for m in (whole, cut):
        m.start()
        step(m)
        step(m)
        step(m)
    state = cut.state_dict()
    cut.end()
    resumed = new_meter(tmp_path)
    resumed.load_state_dict(state)
    resumed.start()
    assert (resumed.step, resumed.tokens) == (3, 30)
    rows = []
    for m in (resumed, whole):  # the last to take the signals gives them back first
        step(m)
        assert m.due()
        row = m.row(alpha=0, lr=0)
        rows.append({k: v for k, v in row.items() if k != "tokens_per_second"})
        m.end()
    assert rows[0] == rows[1] and json.dumps(rows[0])


class Ranks:
    """A world of two ranks whose other one has ``signal`` and takes ``seconds`` for a step."""

    rank, size, device, main = 0, 2, CPU, True

    def __init__(self):
        self.signal, self.seconds, self.asked = 0, 0.5, 0

    def all_reduce(self, x, op=None):
        if x.numel() == 2 and op is not None:
            self.asked += 1
            x = torch.maximum(x, torch.tensor([self.signal, self.seconds], dtype=x.dtype))
        return x


def test_ranks_agree_to_stop_between_log_lines_and_know_the_signal(tmp_path):
    """A signal that has reached another rank alone stops this one within seconds, however far the next line is."""
    meter, world = new_meter(tmp_path, log_every=1000, eval_every=1000, steps=1000), Ranks()
    meter.world = meter.run.world = world
    meter.start()
    asked = []
    for _ in range(25):
        meter.step += 1
        assert not meter.due()
        asked.append(world.asked)
    assert asked[0] == 1 and asked[-1] == 3  # after a step, and then every 5 s of the slower rank's 0.5 s a step
    world.signal = 15
    while not meter.due():
        meter.step += 1
    assert meter.stopping and meter.stop.signal == "SIGTERM" and meter.step <= 35
    meter.row(alpha=0, lr=0)
    assert meter.ending == "stopped" and meter.end() == 143


def test_ranks_agree_to_leave_a_validation_and_owe_it(tmp_path):
    """A signal of another rank ends it between two forwards, though this rank has one forward less than that one; the
    numbers count for nothing, and the checkpoint says that the validation is still to be made."""
    meter, world = new_meter(tmp_path, eval_every=1), Ranks()
    meter.world = meter.run.world = world
    meter.start()
    step(meter)
    assert meter.due() and meter.at_eval and not meter.stopping
    assert list(meter.watched([1, 2], count=3)) == [1, 2] and not meter.owed
    world.seconds, world.signal, seen = 100.0, 15, []  # a forward takes long: asked after each
    for forward in meter.watched(range(10), count=11):
        seen.append(forward)
    assert seen == [0] and meter.owed
    assert not meter.judge({"nll": 1.0}) and meter.ending == "stopped" and meter.stop.signal == "SIGTERM"
    assert meter.best["step"] is None and meter.saves(torch.nn.Linear(1, 1)) and not meter.run.rows("val")
    meter.world = World(0, 1, CPU)
    state = meter.state_dict()
    meter.end()
    resumed, made = new_meter(tmp_path, eval_every=1), []
    resumed.load_state_dict(state)
    resumed.start(lambda: made.append(resumed.at_eval))
    resumed.end()
    assert made == [True]


def test_a_signal_after_the_last_step_is_not_lost(tmp_path):
    meter = new_meter(tmp_path)
    meter.start()
    meter.stop.signal = "SIGINT"
    with pytest.raises(Stopped, match="SIGINT"):
        meter.end()


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="only Linux forgets a peak")
def test_peak_memory_is_that_of_the_loop_alone(tmp_path):
    """400 MB before the loop are not training's, 100 MB in it are; the rest of the process is in both."""
    before = torch.ones(100_000_000)  # fp32
    high = peak_memory(CPU)
    del before
    meter = new_meter(tmp_path)
    meter.start()
    begun = peak_memory(CPU)
    inside = torch.ones(25_000_000)
    step(meter)
    del inside
    meter.end()
    assert begun < high - 350e6 and 90e6 < meter.memory - begun < 150e6
    assert meter.summary(1.0, torch.float32)["peak_memory_of"] == "process resident set of the loop alone"
