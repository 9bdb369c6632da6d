"""train_lm.py stopped, killed, resumed and made longer; losses and weights that are not finite."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys

import torch
from lm_runs import ROOT, fails, rows, same_run, train, weights

import train_lm
from data.windows import Windows
from runtime.folder import load_checkpoint


def test_a_stopped_run_resumes_exactly(lm_run, tmp_path, monkeypatch, capsys):
    """SIGTERM in the middle of a logging window; dropout, label noise, alpha, optimizer and best-so-far go on."""
    flags, whole = lm_run
    original = Windows.batch_indices

    def stop_after_7(self, step, *args):
        if step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, step, *args)

    with monkeypatch.context() as m:
        m.setattr(Windows, "batch_indices", stop_after_7)
        assert train(flags, tmp_path / "run") == 143  # 128 + SIGTERM
    assert "--resume" in capsys.readouterr().out
    assert not (tmp_path / "run" / "summary.json").exists()
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 7
    assert train(flags, tmp_path / "run", "--resume") == 0
    same_run(whole, tmp_path / "run")


def test_a_signal_in_a_validation_ends_it_and_resume_makes_it_first(lm_run, tmp_path, monkeypatch):
    """SIGTERM while step 8 is validated: saved at step 8 without a row of it; and then all as in the whole run."""
    flags, whole = lm_run
    original, made = train_lm.forwards, []

    def signalled(*args):
        made.append(1)
        if len(made) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    with monkeypatch.context() as m:
        m.setattr(train_lm, "forwards", signalled)
        assert train(flags, tmp_path / "run") == 143
    saved = load_checkpoint(tmp_path / "run" / "last.pt")
    assert saved["step"] == 8 and saved["owed"] and [r["step"] for r in rows(tmp_path / "run", "val")] == [4]
    assert load_checkpoint(tmp_path / "run" / "best.pt")["step"] == 4
    assert train(flags, tmp_path / "run", "--resume") == 0
    same_run(whole, tmp_path / "run")


def test_a_signal_in_the_final_evaluation_keeps_what_is_done(lm_run, tmp_path, monkeypatch, capsys):
    """Ctrl-C in the test set: one line, and --resume measures that set alone, to the numbers of the whole run."""
    flags, whole = lm_run
    original, began = train_lm.forwards, []

    def stopped(model, windows, *args):
        began.append(windows)
        if stops and windows is not began[0]:  # the validation set
            os.kill(os.getpid(), signal.SIGINT)
        yield from original(model, windows, *args)

    monkeypatch.setattr(train_lm, "forwards", stopped)
    out, stops = tmp_path / "run", True
    assert train(flags, out) == 130
    said = capsys.readouterr().err
    assert "SIGINT: stopped; the same command with --resume goes on" in said and "Traceback" not in said
    assert (out / "evaluation.json").exists() and not (out / "summary.json").exists()
    began.clear()
    stops = False
    assert train(flags, out, "--resume") == 0
    assert len(began) == 1 and not (out / "evaluation.json").exists()
    same_run(whole, out)
    assert json.loads((whole / "calibration.json").read_text()) == json.loads((out / "calibration.json").read_text())


KILLED = """
import io, os, sys, torch, train_lm
real, calls = torch.save, 0
def half(state, f):
    global calls
    calls += 1
    if calls == {call}:                      # cut off in the middle of writing a checkpoint
        buffer = io.BytesIO()
        real(state, buffer)
        f.write(buffer.getvalue()[: buffer.tell() // 2])
        f.flush()
        os.kill(os.getpid(), 9)
    real(state, f)
torch.save = half
train_lm.main(sys.argv[1:])
"""


def test_kill_9_during_a_checkpoint_write_loses_nothing_that_was_saved(lm_run, tmp_path):
    flags, whole = lm_run
    out = tmp_path / "run"
    # Saves come in pairs, best.pt and last.pt; the fourth is last.pt at step 8, so last.pt of step 4 must survive.
    code = subprocess.run(
        [sys.executable, "-c", KILLED.format(call=4), *flags, "--out", str(out)],
        cwd=ROOT,
        capture_output=True,
        timeout=120,
    ).returncode
    assert code == -9
    assert load_checkpoint(out / "last.pt")["step"] == 4
    assert train(flags, out, "--resume") == 0
    same_run(whole, out)
    assert not list(out.glob("*.tmp*"))


def test_a_run_of_a_constant_learning_rate_can_get_more_steps(lm_base, tmp_path, capsys):
    """To the metrics and weights of a run that was to have them from the start; any other schedule says why not."""
    flags = [*lm_base, "--schedule", "constant", "--lr-warmup", "0"]
    assert train(flags, tmp_path / "long", "--steps", 16) == 0
    assert train(flags, tmp_path / "run") == 0
    assert train(flags, tmp_path / "run", "--steps", 16, "--resume") == 0
    assert "--steps was 12, is 16 from here on" in capsys.readouterr().out
    assert [r["loss"] for r in rows(tmp_path / "run", "train")] == [r["loss"] for r in rows(tmp_path / "long", "train")]
    assert all(torch.equal(w, weights(tmp_path / "long")[name]) for name, w in weights(tmp_path / "run").items())
    assert json.loads((tmp_path / "run" / "config.json").read_text())["steps"] == 16
    fails(capsys, r"steps was 16, now 12", flags, tmp_path / "run", "--resume")
    dpsm = [*flags, "--loss", "dpsm", "--warmup", "1"]
    for more in (lm_base, dpsm):
        assert train(more, tmp_path / "planned") == 0
        says = "--steps was 12, now 24: only a run with --schedule constant, .*--init-from"
        fails(capsys, says, more, tmp_path / "planned", "--steps", 24, "--resume")
        shutil.rmtree(tmp_path / "planned")


def test_weights_that_turn_non_finite_are_not_saved(lm_base, tmp_path, monkeypatch, capsys):
    """In the step of a validation, after its finite loss; the checkpoint of before stays, and its name is said."""
    original, steps = train_lm.take_step, iter(range(1, 100))

    def broken(optimizer, parameters, *args):
        parameters = list(parameters)
        norm = original(optimizer, parameters, *args)
        if next(steps) == 8:
            parameters[3].data[0] = math.nan
        return norm

    monkeypatch.setattr(train_lm, "take_step", broken)
    assert train(lm_base, tmp_path / "run") == 1
    assert re.search(r"not finite and were not saved; stopped at step 8. Last good.*last\.pt", capsys.readouterr().err)
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 4
    assert not (tmp_path / "run" / "summary.json").exists()


def test_steps_that_are_skipped_at_every_validation_leave_a_run_whole(lm_base, tmp_path, monkeypatch):
    original = train_lm.make_score

    def make_score(*args, **kwargs):
        score, calls = original(*args, **kwargs), iter(range(1, 1000))
        return lambda m: score(m) * (math.nan if next(calls) % 4 == 0 else 1)

    monkeypatch.setattr(train_lm, "make_score", make_score)
    assert train(lm_base, tmp_path / "run") == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["skipped_steps"] == 3


def test_non_finite_loss_skips_then_stops(lm_base, tmp_path, capsys):
    """One bad step is skipped and counted; three in a row end the run and name the last good checkpoint."""
    out = tmp_path / "run"
    poisoned = set()
    original = train_lm.make_score

    def make_score(*args, **kwargs):
        score, calls = original(*args, **kwargs), iter(range(10**9))
        return lambda m: score(m) * (math.nan if next(calls) in poisoned else 1)

    train_lm.make_score = make_score
    try:
        poisoned |= {5}
        assert train(lm_base, out / "one") == 0
        poisoned |= {6, 7}
        assert train(lm_base, out / "three") == 1
    finally:
        train_lm.make_score = original
    summary = json.loads((out / "one" / "summary.json").read_text())
    assert summary["skipped_steps"] == summary["divergences"] == 1
    assert all(torch.isfinite(w).all() for w in weights(out / "one").values())
    assert re.search(r"three steps running.*Last good checkpoint: .*last\.pt", capsys.readouterr().err)
    assert load_checkpoint(out / "three" / "last.pt")["step"] == 4
    assert not (out / "three" / "summary.json").exists()
