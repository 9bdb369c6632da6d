"""races/fot_overhead.py on shapes for a CPU: the table adds up, both sides get the same, and what FoT costs is seen
wherever it is put."""

import csv
import time

import pytest
import torch

from races import fot_overhead as overhead
from schedules.forecast import Forecaster
from schedules.fot import FoT

PICO = "--shape pico --steps 16 --window 8 --device cpu".split()


def measured(flags: list[str], folder) -> dict[str, dict]:
    assert overhead.main([*flags, "--csv", str(folder / "cost.csv")]) == 0
    with open(folder / "cost.csv", newline="") as file:
        return {row["part"]: row for row in csv.DictReader(file)}


@pytest.mark.parametrize("shape", ["pico", "qwen3-tiny"])
def test_the_table(shape, tmp_path, capsys):
    rows = measured([*PICO, "--shape", shape], tmp_path)
    assert list(rows) == ["step", "step, CPU time", "timed alone", *overhead.STEP_PARTS]
    value = {name: {k: float(row[k] or 0) for k in overhead.COLUMNS[1:]} for name, row in rows.items()}
    for name in ("step", "step, CPU time"):
        assert value[name]["low_percent"] <= value[name]["added_percent"] <= value[name]["high_percent"]
    for part in overhead.FOT_PARTS:
        assert value[part]["linear_ms"] == 0 < value[part]["fot_ms"]
    # The parts are the whole step: its median is of steps that decide nothing, the parts' sum is the mean of all.
    for side in ("linear_ms", "fot_ms"):
        parts, median = sum(value[part][side] for part in overhead.STEP_PARTS), value["step, CPU time"][side]
        assert 0.5 * median < parts < 10 * median
    same = rows["step"]
    assert same["shape"] == shape and same["window"] == "8" and same["device"].startswith("CPU")
    assert "torch" in same["versions"] and same["syncs_fot"] == ""  # only a GPU can count them
    assert ("claim: under 1.0 %" in capsys.readouterr().out) and same["base"] == ("" if shape == "pico" else "fp32")


@pytest.mark.parametrize("shape", ["pico", "qwen3-tiny"])
def test_both_sides_begin_alike_and_see_the_same_data(shape, monkeypatch, tmp_path):
    seen, weights, original = {"linear": [], "fot": []}, {}, overhead.train_step

    def spy(side, batch, args):
        weights.setdefault(side.name, [p.detach().clone() for p in side.model.parameters()])
        seen[side.name].append(batch if isinstance(batch, torch.Tensor) else batch.tokens_RT)
        original(side, batch, args)

    monkeypatch.setattr(overhead, "train_step", spy)
    measured([*PICO, "--shape", shape], tmp_path)
    assert len(seen["linear"]) == len(seen["fot"]) == 8 + 4 + 16
    assert all(torch.equal(a, b) for a, b in zip(seen["linear"], seen["fot"], strict=True))
    assert not torch.equal(seen["fot"][0], seen["fot"][1])
    assert all(torch.equal(a, b) for a, b in zip(weights["linear"], weights["fot"], strict=True))


def test_rows_and_seconds_end_it_early(tmp_path, capsys):
    rows = measured([*PICO, "--steps", "24", "--rows", "1", "--seconds", "1e-9"], tmp_path)
    assert list(rows) == ["step"] and float(rows["step"]["fot_ms"]) > 0
    said = capsys.readouterr()
    left = 2 + 1 + len(overhead.PARTS)  # windows of three, the CPU time of a step, its parts
    assert f"left out by --seconds or --rows: {left}, the first of them window 2" in said.err
    assert "median of 1 windows" in said.out


def test_parts_that_fail_leave_the_step(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(overhead.Clock, "take", lambda clock: 1 / 0)
    file = tmp_path / "cost.csv"
    assert overhead.main([*PICO, "--csv", str(file)]) == 1
    said = capsys.readouterr()
    assert "the parts of a step: ZeroDivisionError" in said.err and "FoT adds" in said.out
    with open(file, newline="") as opened:
        assert [row["part"] for row in csv.DictReader(opened)] == ["step", "step, CPU time"]


def busy(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


@pytest.mark.parametrize("slow, row", [(time.sleep, "step"), (busy, "step, CPU time")])
def test_a_slow_observe_is_seen(slow, row, monkeypatch, tmp_path):
    original = FoT.observe
    monkeypatch.setattr(FoT, "observe", lambda *args, **how: (slow(0.05), original(*args, **how)))
    rows = measured(PICO, tmp_path)
    # Every step takes 50 ms longer, or 100 where its batch is split; half of 50 is left for what others do meanwhile.
    step = rows[row]
    assert float(step["fot_ms"]) - float(step["linear_ms"]) > 25
    assert float(step["added_percent"]) > 100 * 25 / float(step["linear_ms"])
    if slow is busy:
        assert float(rows["observe"]["fot_ms"]) >= 50 > float(rows["gradient statistics"]["fot_ms"])
        assert float(rows["timed alone"]["fot_ms"]) >= 50


def test_a_slow_decision_is_spread_over_its_window(monkeypatch, tmp_path):
    original = Forecaster.forecast
    monkeypatch.setattr(Forecaster, "forecast", lambda *args: (busy(0.8), original(*args))[1])
    rows = measured(PICO, tmp_path)
    # One or more forecasts in 8 steps: 100 ms a step at least, which the median step does not show.
    step = rows["step, CPU time"]
    assert float(rows["forecasts"]["fot_ms"]) >= 100 > float(step["fot_ms"])
    assert float(step["added_percent"]) > 100 * 50 / float(step["linear_ms"])


def test_interval_and_judgement():
    share, low, high = overhead.interval([0.1, 0.2, 0.3, 0.4, 5.0])
    assert share == 0.3 and 0.1 <= low < 0.3 < high <= 5.0
    assert overhead.interval([0.1, 0.1]) == [0.1, 0.1, 0.1]
    assert overhead.judge(0.05, 0.15, 0.2, 5) == "held" and overhead.judge(0.25, 0.3, 0.2, 5) == "failed"
    assert overhead.judge(0.1, 0.3, 0.2, 5).startswith("open") and overhead.judge(0.1, 0.1, 0.2, 4)[:4] == "open"


@pytest.mark.parametrize(
    "match, more",
    [
        ("--steps 20: expected a multiple of --window 8", "--steps 20"),
        ("--steps 8: expected a multiple of --window 8, two or more", "--steps 8"),
        ("--window 9: expected an even number", "--window 9"),
        ("--window 4: expected at least 8", "--window 4"),
        ("--batch 1: expected at least 2", "--batch 1"),
        ("--batch 8 is not a multiple of --micro-batch 3", "--micro-batch 3"),
        ("--rank 0: expected at least 1", "--rank 0"),
        pytest.param(
            "torch sees no CUDA",
            "--device cuda",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
)
def test_bad_flags(match, more, capsys):
    with pytest.raises(SystemExit) as stopped:
        overhead.main([*PICO, *more.split()])
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and match in err and len(err.strip().splitlines()) == 1
