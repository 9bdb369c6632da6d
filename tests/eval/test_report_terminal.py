"""The report's command prints a table that fits, and answers broken input with one line."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from invented_runs import falling, three_losses, write_run

from eval.report import terminal

ROOT = Path(__file__).resolve().parents[2]


def test_the_command_prints_a_table_that_fits(undrawn, tmp_path, capsys):
    folders = three_losses(tmp_path, seeds=(1, 2))
    folders.append(write_run(tmp_path / "w", config={"loss": "dpsm", "warmup": 0.333, "alpha_max": 0.5}, summary={}))
    assert terminal.main([*map(str, folders), "--out", str(tmp_path / "out"), "--title", "t"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert str(tmp_path / "out/report.html") in lines[0] and str(tmp_path / "out/report.md") in lines[1]
    assert max(map(len, lines[2:])) <= 110
    ce = next(line for line in lines if line.startswith("ce "))
    assert re.split(r"  +", ce) == [
        "ce",
        "2",
        "29.99 +- 0.01",
        "3.99 +- 0.01",
        "0.8000",
        "3.3909",
        "1.00 +- 0.00",
        "20,000",
    ]
    assert any(line.startswith("2 ECE at least 25 %") and line.endswith("yes   met") for line in lines)
    assert "1 more DPSM arms in the report" in lines


def test_unfinished_runs_alone_make_a_report_of_curves(tmp_path):
    """As people type it, with its pictures drawn, where there is no display."""
    folder = write_run(tmp_path / "run", config={"loss": "dpsm"}, curve=falling(30)[:3])
    with open(folder / "metrics.jsonl", "a") as f:
        f.write('{"kind": "train", "step": 400, "lo')  # killed while it wrote
    command = [sys.executable, "-m", "eval.report", str(folder), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"MPLBACKEND": ""})
    assert done.returncode == 0 and "is half-written, as a kill leaves it; left out" in done.stderr, done.stderr
    assert "no final numbers yet" in (tmp_path / "out/report.md").read_text()
    assert (tmp_path / "out/curves.png").stat().st_size > 10_000
    assert "missing: no finished run with --loss dpsm" in done.stdout


def break_config(run):
    (run / "config.json").unlink()
    return "is not a run folder"


def break_metrics(run):
    (run / "metrics.jsonl").unlink()
    return "metrics.jsonl holds no train or val rows"


def break_line(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[3] = lines[3][:20]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return "metrics.jsonl, line 4: not JSON"


def break_last_line_of_a_finished_run(run):
    with open(run / "metrics.jsonl", "a") as f:
        f.write('{"kind": "val"')
    return "metrics.jsonl, line 21: not JSON"


def break_row(run):
    (run / "metrics.jsonl").write_text('{"kind": "val", "step": 1}\n{"step": 2}\n')
    return "metrics.jsonl, line 2: no row"


def break_summary(run):
    (run / "summary.json").write_text('{\n "val_ppl": 3,\n}')
    return "summary.json, line 3: not JSON"


def break_samples(run):
    (run / "samples.json").write_text("{}")
    return "samples.json: holds an object, expected a list"


def break_calibration(run):
    (run / "calibration.json").write_text('{"val": {"raw": {"count": [1, 2], "correct_sum": [1]}}}')
    return "calibration.json: bins have lengths"


BREAKS = [break_config, break_metrics, break_line, break_last_line_of_a_finished_run, break_row, break_summary]


@pytest.mark.parametrize("damage", [*BREAKS, break_samples, break_calibration])
def test_broken_input_is_one_line_and_writes_nothing(tmp_path, capsys, damage):
    good, bad = write_run(tmp_path / "good", summary={}), write_run(tmp_path / "bad", config={"seed": 2}, summary={})
    message = damage(bad)
    with pytest.raises(SystemExit) as e:
        terminal.main([str(good), str(bad), "--out", str(tmp_path / "out")])
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.count("\n") == 1 and message in err
    assert str(bad) in err
    assert not (tmp_path / "out").exists()


def test_a_folder_of_runs_and_a_file_as_out_are_explained(tmp_path, capsys):
    run = write_run(tmp_path / "runs/one", summary={})
    (tmp_path / "file").write_text("")
    for argv, message in (
        ([str(tmp_path / "runs"), "--out", str(tmp_path / "out")], f"such as {run}"),
        ([str(run), "--out", str(tmp_path / "file")], "is a file; give a folder"),
        ([str(run)], "--out"),
    ):
        with pytest.raises(SystemExit) as e:
            terminal.main(argv)
        err = capsys.readouterr().err
        assert e.value.code == 2 and err.count("\n") == 1 and message in err
