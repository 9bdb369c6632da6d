"""The report says what training on after the best validation cost."""

import math

from invented_runs import arms_of, write_run

from eval.report.overfit import overfit_blocks

RISING = [(100, 10.0, 40.0), (200, 20.0, 30.0), (300, 30.0, 33.0)]


def test_best_and_last_validation_of_each_arm(tmp_path):
    other = [(100, 10.0, 30.0), (200, 20.0, 32.0), (300, 30.0, 35.0)]
    folders = [write_run(tmp_path / "1", summary={}, curve=RISING)]
    folders.append(write_run(tmp_path / "2", config={"seed": 2}, summary={}, curve=other))
    folders.append(write_run(tmp_path / "b", config={"loss": "brier"}, summary={}, curve=RISING[:2]))
    (_, title), (_, table) = overfit_blocks(arms_of(*folders))
    ce, brier = (dict(zip([head.text for head in table.head], row, strict=True)) for row in table.rows)
    assert title == "At the best and at the last validation"
    assert ce["best at"].text == "100 to 200" and brier["best at"].text == "200"
    assert (ce["PPL best"].text, ce["PPL last"].text) == ("30.00", "34.00")  # means of 30, 30 and of 33, 35
    assert ce["PPL last"].sub == f"± {math.sqrt(2):.2f}"
    assert brier["PPL best"].text == brier["PPL last"].text == "30.00"


def test_runs_that_end_at_their_best_need_no_table(tmp_path):
    assert overfit_blocks(arms_of(write_run(tmp_path / "a", summary={}, curve=RISING[:2]))) == []
