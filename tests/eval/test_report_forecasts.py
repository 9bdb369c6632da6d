"""Forecasts that runs logged, graded by what they reached, from run folders with invented numbers."""

import json
import math

from invented_runs import arms_of, write_run

from eval.report import build as rp
from eval.report.forecasts import WIDE, forecast_table, forecasts_of, grade, run_table

REACHED = 3.0


def folder(root, name, forecasts, last=1000, nll=REACHED, seed=1):
    """A run of 1000 steps with (step, forecast, sd) in its log."""
    path = root / name
    write_run(path, config={"schedule": "fot", "steps": 1000, "seed": seed}, curve=[(last, 20.0, 20.0)])
    rows = [{"kind": "fot", "step": s, "forecast": mean, "sd": sd, "reason": ""} for s, mean, sd in forecasts]
    rows += [{"kind": "train", "step": step, "loss": nll, "nll": nll} for step in (last - 10, last)]
    with open(path / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def runs_of(*folders):
    return [run for arm in arms_of(*folders) for run in arm.runs]


def test_the_last_forecast_by_a_share_of_the_steps_is_graded(tmp_path):
    made = [(50, 9.0, 0.1), (100, 3.3, 0.2), (240, None, None), (500, 3.06, 0.05), (700, 3.06, 0.05), (900, 7.0, 0.1)]
    [run] = runs_of(folder(tmp_path, "a", made))
    grades = grade(run)
    assert [g.mean for g in grades] == [3.3, None, 3.06, 3.06]  # at 10, 25, 50 and 75 %; what comes later is not early
    assert grades[0].reached == REACHED and math.isclose(grades[0].error, 10.0)
    rows = {row[0].text: row for row in forecast_table(grades).rows}
    assert [c.text for c in rows["10%"]] == ["10%", "1 of 1", "10.00", "+10.00", "0", "100"]  # 1.5 sds
    assert [c.text for c in rows["25%"]][1:] == ["0 of 1", "-", "-", "-", "-"]
    assert rows["50%"][2].text == "2.00" and rows["50%"][4].text == "0" and rows["50%"][5].text == "100"
    assert rows["all"][1].text == "3 of 4" and rows["all"][2].sub == "worst 10.0"


def test_runs_without_forecasts_or_an_end_are_not_graded(tmp_path):
    none = [(s, None, None) for s in (100, 500)]
    runs = runs_of(folder(tmp_path, "literal", none), folder(tmp_path, "short", [(100, 3.0, 0.1)], last=800, seed=2))
    assert [grade(run) for run in runs] == [[], []]
    assert forecasts_of(arms_of(folder(tmp_path, "short2", none, last=800))) == []


def test_the_report_shows_predicted_against_reached_over_all_runs(tmp_path):
    folders = [folder(tmp_path, f"r{i}", [(100, 3 + i / 10, 0.15), (500, 3.0, 0.1)], seed=i) for i in range(4)]
    report = rp.build(folders, "forecasts")
    assert ("h", "Forecasts of every run") in report.blocks and report.figures["forecasts"]()[:4] == b"\x89PNG"
    table = next(b[1] for b in report.blocks if b[0] == "table" and b[1].head[0].text == "made at")
    assert [c.text for c in table.rows[0]] == ["10%", "4 of 4", "5.00", "+5.00", "50", "100"]  # 0, 0.1, 0.2 and 0.3 off


def test_a_run_that_logged_none_is_forecast_afterwards_from_its_own_log(tmp_path):
    """A power law in the step, with its learning rates: the forecaster knows it, and is told no more than was known."""
    path = write_run(tmp_path / "plain", config={"steps": 1000}, curve=[(1000, 20.0, math.exp(3))])
    loss = {step: 2.0 + 6.0 * step**-0.5 for step in range(10, 1010, 10)}
    rows = [{"kind": "train", "step": step, "loss": v, "nll": v, "lr": 1e-3} for step, v in loss.items()]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    logged = folder(tmp_path, "logged", [(500, 3.06, 0.05)], seed=2)
    plain, other = forecasts_of(arms_of(path, logged))
    assert (plain.logged, other.logged) == (False, True)
    late = plain.grades[-1]
    assert late.reached == (loss[990] + loss[1000]) / 2 and abs(late.error) < 1 and late.inside(WIDE)
    cells = run_table([plain, other]).rows
    assert [c.text for c in cells[0][2:4]] == ["afterwards", f"{late.reached:.3f}"]
    assert cells[1][6].text == f"3.060 ± {WIDE * 0.05:.3f}" and cells[1][6].sub == "+2.00 %, inside"
    spoilt = {step: v if step <= 750 else 9.0 for step, v in loss.items()}  # what came later is not known at 75 %
    rows = [{"kind": "train", "step": step, "loss": v, "nll": v, "lr": 1e-3} for step, v in spoilt.items()]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    [again] = forecasts_of(arms_of(path))
    assert again.grades[-1].mean == late.mean and again.grades[-1].reached == 9.0
