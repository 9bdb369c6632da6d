"""A campaign of real runs of train_lm.py, two at a time: folders, logs, record, report, dry run."""

import json
import re
from types import SimpleNamespace

import pytest

from eval.campaign import __main__ as campaign


@pytest.fixture
def grid(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    path = tmp_path / "two.toml"
    path.write_text(
        f'script = "train_lm.py"\nout = "{tmp_path / "runs"}"\n[flags]\ndata = "{corpus}"\n'
        f'cache = "{tmp_path / "cache"}"\n'
        'tokenizer = "bpe:320"\nmodel = "pico"\nseq_len = 32\nbatch = 4\nsteps = 3\nsample_tokens = 2\ndevice = "cpu"\n'
        "log_every = 1\n[grid]\nseed = [1, 2, 3]\n"
    )
    return path


def test_a_grid_of_small_runs_and_its_report(grid, tmp_path, monkeypatch, capfd):
    assert campaign.main([f"{grid}", "--jobs", "2", "--device", "cpu"]) == 0
    done = [tmp_path / "runs" / f"seed{seed}" for seed in (1, 2, 3)]
    assert all((d / "summary.json").exists() for d in done)
    assert all("validation ppl" in (d.parent / f"{d.name}.log").read_text() for d in done)
    assert (tmp_path / "runs" / "report" / "report.md").exists()
    assert "3 of 3 finished" in capfd.readouterr().out
    before = [(d / "summary.json").stat().st_mtime_ns for d in done]
    (tmp_path / "runs" / "campaign.json").unlink()  # as of before there was one
    monkeypatch.setattr(campaign.subprocess, "call", lambda line: 0)
    assert campaign.main([f"{grid}", "--jobs", "2"]) == 0
    assert before == [(d / "summary.json").stat().st_mtime_ns for d in done]
    runs = json.loads((tmp_path / "runs" / "campaign.json").read_text())["runs"]
    rows = [json.loads((d / "metrics.jsonl").read_text().splitlines()[-1]) for d in done]
    trained = [round(row["train_seconds"], 3) for row in rows]
    assert [run["seconds"] for run in runs.values()] == pytest.approx(trained, abs=0.01)


def test_a_dry_run_measures_each_size_once(grid, tmp_path, capfd):
    """Seeds cost alike, other batches do not."""
    text = grid.read_text().replace("batch = 4\n", "").replace("[1, 2, 3]", "[1, 2]")
    grid.write_text(f"{text}batch = [4, 8]\n")
    assert campaign.main([f"{grid}", "--dry-run"]) == 0
    said = capfd.readouterr().out
    assert said.startswith("runs: 4, sizes: 2; nothing is written\n") and not (tmp_path / "runs").exists()
    assert "2 x seed1-batch4 and alike: seed2-batch4\n" in said and "2 x seed1-batch8" in said
    assert len(re.findall(r"  all of it     (384|768) tokens", said)) == 2
    for key in ("FLOPs", "a step", "the whole", "memory"):
        assert len(re.findall(f"^  {key} ", said, re.MULTILINE)) == 2
    assert re.search(r"^all runs: \d.*, without final evaluations; 1 at a time about ", said, re.MULTILINE)


def test_a_size_that_cannot_be_asked_is_told(grid, monkeypatch, capsys):
    failed = SimpleNamespace(returncode=2, stdout="", stderr="warns\ntrain_lm.py: error: no text\n")
    monkeypatch.setattr(campaign.subprocess, "run", lambda *line, **how: failed)
    assert campaign.main([f"{grid}", "--dry-run"]) == 1
    said = capsys.readouterr().out
    assert "not measured  exit code 2: train_lm.py: error: no text" in said and "all runs" not in said
