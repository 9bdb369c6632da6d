"""train_lm.py stopped, killed, resumed and made longer; losses and weights that are not finite."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from lm_runs import ROOT, fails, rows, same_run, train, weights
from signals import terminated_in_validation

import train_lm
from data.windows import Windows
from runtime.checkpoint import load_checkpoint, save_checkpoint


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
    with terminated_in_validation(monkeypatch, train_lm, 2):
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


DIES_ONCE = """
import os, sys
sys.path.insert(0, {root!r})
import train_lm
steps, real = iter(range(1, 100)), train_lm.optim.take_step
def take_step(*args):
    if next(steps) == 6 and (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == ("1", "0"):
        os.kill(os.getpid(), 9)
    return real(*args)
train_lm.optim.take_step = take_step
sys.exit(train_lm.main())
"""


def test_torchrun_starts_ranks_again_and_they_go_on(lm_base, tmp_path):
    """--max-restarts, one of two ranks killed after step 4 was saved: the losses of one process, to fp32's rounding."""
    script, out = tmp_path / "dies_once.py", tmp_path / "run"
    script.write_text(DIES_ONCE.format(root=str(ROOT)))
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    how = dict(cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240)
    ran = subprocess.run([*line, str(script), *lm_base, "--out", str(out)], **how)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert [row["event"] for row in rows(out, "event")] == ["resumed"]
    assert train(lm_base, tmp_path / "one") == 0
    for kind, key in (("train", "loss"), ("val", "nll")):
        assert [r[key] for r in rows(out, kind)] == pytest.approx(
            [r[key] for r in rows(tmp_path / "one", kind)], rel=1e-4
        )


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
    original, steps = train_lm.optim.take_step, iter(range(1, 100))

    def broken(optimizer, parameters, *args):
        parameters = list(parameters)
        norm = original(optimizer, parameters, *args)
        if next(steps) == 8:
            parameters[3].data[0] = math.nan
        return norm

    monkeypatch.setattr(train_lm.optim, "take_step", broken)
    assert train(lm_base, tmp_path / "run") == 1
    assert re.search(r"not finite and were not saved; stopped at step 8. Last good.*last\.pt", capsys.readouterr().err)
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 4
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_checkpoint_whose_moments_are_not_finite_is_not_gone_on_from(lm_base, tmp_path, capsys):
    """A second moment of inf would freeze its weight without a word. One line, and the older checkpoint is good."""
    out = tmp_path / "run"
    assert train(lm_base, out) == 0
    state = load_checkpoint(out / "last.pt")
    moment = next(iter(state["optimizer"]["state"].values()))["exp_avg_sq"]
    for value in (math.inf, math.nan):
        moment.view(-1)[1] = value
        save_checkpoint(out / "last.pt", state)
        fails(
            capsys, r"last\.pt cannot be gone on from: optimizer: .*exp_avg_sq is not finite", lm_base, out, "--resume"
        )
    assert train(lm_base, out, "--resume", "--resume-from", out / "previous.pt") == 0


def test_moments_that_turn_non_finite_are_not_saved(lm_base, tmp_path, monkeypatch, capsys):
    original, steps = train_lm.optim.take_step, iter(range(1, 100))

    def broken(optimizer, parameters, *args):
        norm = original(optimizer, parameters, *args)
        if next(steps) == 8:
            next(iter(optimizer.state.values()))["exp_avg_sq"].view(-1)[1] = math.inf
        return norm

    monkeypatch.setattr(train_lm.optim, "take_step", broken)
    assert train(lm_base, tmp_path / "run") == 1
    assert "the optimizer's moments" in capsys.readouterr().err
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 4


@pytest.mark.parametrize("fault", ["gradient", "overflow", "logits", "no target"])
def test_a_step_that_cannot_be_taken_changes_nothing_and_is_counted(lm_base, tmp_path, monkeypatch, fault):
    """A gradient of inf at a finite loss; one whose norm overflows; logits of inf; a batch in which nothing is to be
    foreseen. As a run whose learning rate is 0 in that step would go on, but for the moments, which stay too."""
    seen, steps = [], iter(range(1, 100))
    original, get = train_lm.optim.take_step, Windows.get

    def take_step(optimizer, parameters, *args):
        parameters, step = list(parameters), next(steps)
        if step == 5 and fault in ("gradient", "overflow"):
            parameters[2].grad.view(-1)[0] = {"gradient": math.inf, "overflow": 3e38}[fault]
            parameters[2].grad.view(-1)[1] = 3e38
        before = [p.detach().clone() for p in parameters]
        moments = [s["exp_avg"].clone() for s in optimizer.state.values()]
        norm = original(optimizer, parameters, *args)
        same = all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))
        same &= all(torch.equal(s["exp_avg"], m) for s, m in zip(optimizer.state.values(), moments, strict=False))
        seen.append(same)
        if step == 4 and fault == "logits":
            parameters[0].data *= 1e30  # the tied head: the next step's logits are inf
        if step == 5 and fault == "logits":
            parameters[0].data /= 1e30
        return norm

    def no_target(windows, index):
        x, y = get(windows, index)
        return x, torch.full_like(y, -100) if len(seen) == 4 and len(index) == 8 else y

    monkeypatch.setattr(train_lm.optim, "take_step", take_step)
    if fault == "no target":
        monkeypatch.setattr(Windows, "get", no_target)
    assert train([*lm_base, "--eval-every", "6"], tmp_path / "run") == 0
    assert seen[:6] == [False] * 4 + [True, False]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["skipped_steps"] == summary["divergences"] == 1 and summary["steps"] == 12
    assert rows(tmp_path / "run", "train")[1]["steps"] == 2 and rows(tmp_path / "run", "train")[-1]["skipped"] == 1


def test_a_spike_is_counted_and_trained_through(lm_base, tmp_path, monkeypatch):
    """A loss above twice its average for 32 steps running is one divergence; nothing is skipped for it."""
    original = train_lm.make_score

    def make_score(*args, **kwargs):
        score, calls = original(*args, **kwargs), iter(range(1, 1000))
        return lambda m: score(m) * (10 if 10 < next(calls) <= 45 else 1)

    monkeypatch.setattr(train_lm, "make_score", make_score)
    assert train([*lm_base, "--eval-every", "60"], tmp_path / "run", "--steps", 60) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["divergences"], summary["skipped_steps"]) == (1, 0)


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
