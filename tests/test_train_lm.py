"""train_lm.py end to end on a tiny corpus: resume, parallelism, bad input, what a run leaves behind."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train_lm
from data.windows import Windows
from eval import metrics
from kernels.losses import alpha_at
from runtime.folder import load_checkpoint, read_metrics

ROOT = Path(__file__).parent.parent
TIMING = {"train_seconds", "tokens_per_second"}
SUMMARY_KEYS = """
loss alpha_schedule steps seed parameters tokens_seen val_nll val_ppl val_bits_per_byte val_ece10 val_ece100
val_ece10_mass val_brier val_spherical val_accuracy temperature val_nll_t val_ece10_t test_nll test_ppl
test_ece10 test_brier tokens_per_second ms_per_step_median peak_memory_bytes train_seconds flops_per_token mfu
energy_joules divergences clip_rate
""".split()


@pytest.fixture(scope="session")
def base(corpus, tmp_path_factory):
    """Flags of a run that takes about a second."""
    cache = tmp_path_factory.mktemp("cache")
    return (
        f"--data {corpus} --cache {cache} --tokenizer bpe:320 --model nano --seq-len 32 --batch 8 --steps 12 --lr 3e-3 "
        "--eval-every 4 --log-every 3 --sample-tokens 12 --device cpu".split()
    )


def train(flags, out, *more) -> int:
    return train_lm.main([*flags, "--out", str(out), *map(str, more)])


def rows(out, kind) -> list[dict]:
    """Metrics without what depends on the clock."""
    return [{k: v for k, v in r.items() if k not in TIMING} for r in read_metrics(Path(out) / "metrics.jsonl", kind)]


def weights(out, name="last.pt") -> dict:
    return load_checkpoint(Path(out) / name)["model"]


def torchrun(ranks, flags, out, *more):
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "train_lm.py"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*line, *flags, "--out", str(out), *map(str, more)],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
    )


# -- what a run leaves behind --------------------------------------------------------------------


@pytest.fixture(scope="session")
def dpsm_run(base, tmp_path_factory):
    """An uninterrupted DPSM run with everything random switched on."""
    out = tmp_path_factory.mktemp("runs") / "dpsm"
    noisy = [*base, "--loss", "dpsm", "--warmup", "0.5", "--dropout", "0.1", "--label-noise", "0.2"]
    assert train(noisy, out) == 0
    return noisy, out


def test_run_folder_is_complete(dpsm_run):
    _, out = dpsm_run
    summary = json.loads((out / "summary.json").read_text())
    assert not set(SUMMARY_KEYS) - set(summary)
    assert summary["loss"] == "dpsm" and summary["steps"] == 12
    measured = set(SUMMARY_KEYS) - {"mfu", "energy_joules"}  # there is no GPU to measure those two on
    assert not [k for k in measured if summary[k] is None]
    assert summary["val_nll_t"] <= summary["val_nll"] + 1e-6
    assert summary["tokens_seen"] <= 12 * 8 * 32  # the padded end of the data is no token
    for name in (
        "config.json",
        "environment.json",
        "calibration.json",
        "samples.json",
        "source/train_lm.py",
        "last.pt",
        "best.pt",
    ):
        assert (out / name).is_file(), name
    bins = json.loads((out / "calibration.json").read_text())
    assert sum(bins["val"]["raw"]["count"]) == summary["val_tokens"]


def test_alpha_follows_the_optimizer_step(dpsm_run, tmp_path):
    """More micro-batches and more evaluations do not move it, and the checkpoint holds it."""
    flags, out = dpsm_run
    assert train(flags, tmp_path / "micro", "--micro-batch", 2, "--eval-every", 2) == 0
    for folder in (out, tmp_path / "micro"):
        assert len(rows(folder, "train")) > 5
        for r in rows(folder, "train"):
            assert r["alpha"] == pytest.approx(alpha_at(r["step"] - 1, 12, warmup=0.5), rel=1e-6)  # fp32
        assert load_checkpoint(folder / "last.pt")["alpha"] == alpha_at(12, 12, warmup=0.5) == 1.0


def test_losses_are_golden(base, tmp_path):
    """Training losses of two scores, recorded on this code. They pin the whole path: data order, initialisation, loss,
    optimizer. The tolerance leaves room for another CPU's rounding, carried through 12 steps."""
    golden = {
        "ce": [5.38228, 4.78069, 5.95823, 4.21862, 4.07643, 3.90722],
        "brier": [0.99315, 0.98347, 0.98379, 0.96739, 0.95716, 0.94785],
    }
    for loss, expected in golden.items():
        assert train(base, tmp_path / loss, "--loss", loss) == 0
        assert [r["loss"] for r in rows(tmp_path / loss, "train")] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    "flags",
    [
        "spherical",
        "focal --gamma 1",
        "smoothing --eps 0.2",
        "brier --tail-smoothing 0.1",
        "dpsm --alpha-schedule fixed --alpha-max 0",
    ],
)
def test_every_loss_learns(flags, base, tmp_path):
    assert train(base, tmp_path / "run", "--lr-warmup", 0, "--loss", *flags.split()) == 0
    nll = [r["nll"] for r in rows(tmp_path / "run", "val")]
    assert nll[-1] < math.log(320) and nll[-1] < nll[0]  # better than uniform, and getting better


def test_dpsm_at_alpha_0_is_ce_and_at_1_is_brier(base, tmp_path):
    for alpha, loss in ((0, "ce"), (1, "brier")):
        assert train(base, tmp_path / loss, "--loss", loss) == 0
        assert (
            train(base, tmp_path / f"dpsm{alpha}", "--loss", "dpsm", "--alpha-schedule", "fixed", "--alpha-max", alpha)
            == 0
        )
        a, b = weights(tmp_path / loss), weights(tmp_path / f"dpsm{alpha}")
        assert all(torch.equal(a[k], b[k]) for k in a)


# -- exactness -----------------------------------------------------------------------------------


def same_run(a, b) -> None:
    """Metrics (the clock's apart) and final weights are equal, bit for bit."""
    for kind in ("train", "val"):
        assert rows(a, kind) == rows(b, kind)
    wa, wb = weights(a), weights(b)
    assert all(torch.equal(wa[k], wb[k]) for k in wa)
    sa, sb = (json.loads((x / "summary.json").read_text()) for x in (a, b))
    clock = {"tokens_per_second", "ms_per_step_median", "train_seconds", "peak_memory_bytes"}
    assert {k: v for k, v in sa.items() if k not in clock} == {k: v for k, v in sb.items() if k not in clock}


def test_a_stopped_run_resumes_exactly(dpsm_run, tmp_path, monkeypatch, capsys):
    """SIGTERM in the middle of a logging window; dropout, label noise, alpha, optimizer and best-so-far go on."""
    flags, whole = dpsm_run
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


def test_a_signal_in_the_final_evaluation_keeps_what_is_done(dpsm_run, tmp_path, monkeypatch, capsys):
    """Ctrl-C in the test set: one line, and --resume measures that set alone, to the numbers of the whole run."""
    flags, whole = dpsm_run
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


def test_kill_9_during_a_checkpoint_write_loses_nothing_that_was_saved(dpsm_run, tmp_path):
    flags, whole = dpsm_run
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


def close(a, b) -> None:
    """fp32 rounding of sums taken in another order, carried through 12 steps of AdamW: 1e-4 of the loss."""
    for kind, key in (("train", "loss"), ("train", "grad_norm"), ("val", "nll"), ("val", "ece10")):
        assert [r[key] for r in rows(a, kind)] == pytest.approx([r[key] for r in rows(b, kind)], rel=1e-4, abs=1e-5)


def test_batch_ranks_and_accumulation_give_one_loss_curve(base, tmp_path):
    """8 x 1 rank, 4 x 2 ranks, accumulation 2 x 4, and FSDP2 on 2 ranks. The data end in a padded window, so a wrong
    normalisation (mean of means) shows."""
    flags = [*base, "--loss", "dpsm", "--warmup", "0.5", "--label-noise", "0.1"]
    assert train(flags, tmp_path / "one") == 0
    assert train(flags, tmp_path / "accumulated", "--micro-batch", 4) == 0
    close(tmp_path / "one", tmp_path / "accumulated")
    for name, more in (
        ("ddp", ()),
        ("accumulated_ddp", ("--micro-batch", 2)),
        ("fsdp", ("--fsdp",)),
        ("accumulated_fsdp", ("--fsdp", "--micro-batch", 2)),
    ):
        ran = torchrun(2, flags, tmp_path / name, *more)
        assert ran.returncode == 0, ran.stderr[-3000:]
        close(tmp_path / "one", tmp_path / name)


def test_a_checkpoint_can_be_continued_on_other_ranks(base, tmp_path):
    """Written by FSDP2 on 2 ranks and continued by one process, and the other way round."""
    flags = [*base, "--loss", "dpsm", "--warmup", "0.5"]
    assert train(flags, tmp_path / "one") == 0
    shutil.copytree(tmp_path / "one", tmp_path / "to_fsdp")
    for name, more in (("fsdp", ()), ("to_fsdp", ("--resume", "--resume-from", tmp_path / "one" / "previous.pt"))):
        ran = torchrun(2, flags, tmp_path / name, "--fsdp", *more)
        assert ran.returncode == 0, ran.stderr[-3000:]
    assert load_checkpoint(tmp_path / "fsdp" / "previous.pt")["step"] == 8
    assert train(flags, tmp_path / "fsdp", "--resume", "--resume-from", tmp_path / "fsdp" / "previous.pt") == 0
    close(tmp_path / "one", tmp_path / "fsdp")
    close(tmp_path / "one", tmp_path / "to_fsdp")


def test_a_run_of_a_constant_learning_rate_can_get_more_steps(base, tmp_path, capsys):
    """To the metrics and weights of a run that was to have them from the start; any other schedule says why not."""
    flags = [*base, "--schedule", "constant", "--lr-warmup", "0"]
    assert train(flags, tmp_path / "long", "--steps", 16) == 0
    assert train(flags, tmp_path / "run") == 0
    assert train(flags, tmp_path / "run", "--steps", 16, "--resume") == 0
    assert "--steps was 12, is 16 from here on" in capsys.readouterr().out
    assert [r["loss"] for r in rows(tmp_path / "run", "train")] == [r["loss"] for r in rows(tmp_path / "long", "train")]
    assert all(torch.equal(w, weights(tmp_path / "long")[name]) for name, w in weights(tmp_path / "run").items())
    assert json.loads((tmp_path / "run" / "config.json").read_text())["steps"] == 16
    fails(capsys, r"steps was 16, now 12", flags, tmp_path / "run", "--resume")
    dpsm = [*flags, "--loss", "dpsm", "--warmup", "1"]
    for more in (base, dpsm):
        assert train(more, tmp_path / "planned") == 0
        says = "--steps was 12, now 24: only a run with --schedule constant, .*--init-from"
        fails(capsys, says, more, tmp_path / "planned", "--steps", 24, "--resume")
        shutil.rmtree(tmp_path / "planned")


def test_activation_checkpointing_changes_nothing(base, tmp_path):
    assert train(base, tmp_path / "plain") == 0
    assert train(base, tmp_path / "recomputed", "--checkpoint-activations") == 0
    close(tmp_path / "plain", tmp_path / "recomputed")


def test_evaluation_reads_the_whole_set_whatever_the_batch(base, tmp_path):
    assert train(base, tmp_path / "a") == 0
    assert train(base, tmp_path / "b", "--micro-batch", 4) == 0
    a, b = (json.loads((tmp_path / x / "summary.json").read_text()) for x in "ab")
    assert a["val_tokens"] == b["val_tokens"]
    assert a["test_nll"] == pytest.approx(b["test_nll"], rel=1e-4)


# -- options -------------------------------------------------------------------------------------


def test_patience_and_best_weights(base, tmp_path, monkeypatch):
    """Validations at steps 4, 8, 12, 16 with a scripted NLL: the second is the best, two worse ones end the run."""
    original, script = train_lm.Meter.judge, iter([5.0, 4.0, 4.5, 4.2])
    monkeypatch.setattr(train_lm.Meter, "judge", lambda self, m: original(self, m | {"nll": next(script, m["nll"])}))
    out = tmp_path / "run"
    assert train(base, out, "--steps", 60, "--patience", 2, "--report", "best") == 0
    summary = json.loads((out / "summary.json").read_text())
    assert [r["step"] for r in rows(out, "val")] == [4, 8, 12, 16]
    assert summary["stopped_early"] == "early_stop" and summary["steps"] == 16
    assert summary["reported_step"] == summary["best_step"] == 8 and summary["best_val_nll"] == 4.0
    assert load_checkpoint(out / "last.pt")["step"] == 16
    # The reported numbers are of the best weights, not of the last.
    assert train(base, tmp_path / "same", "--steps", 60, "--eval-every", 8, "--patience", 1) == 0
    val = next(r for r in rows(tmp_path / "same", "val") if r["step"] == 8)
    assert summary["val_ppl"] == pytest.approx(val["ppl"], rel=1e-6)


def test_a_metric_that_is_added_to_the_table_is_everywhere(base, tmp_path, monkeypatch, capsys):
    """One entry of eval.metrics, and it is in the log's rows, the bar, the validation line and the summary. The report
    is in tests/eval/test_metrics.py."""
    places = "train line final table"
    new = metrics.Metric("ece25", "ECE", "25 bins", "lower", shown=places, bar="e25 {:.3f}", of=lambda c, _: c.ece(25))
    monkeypatch.setattr(metrics, "TOKENS", (*metrics.TOKENS, new))
    out = tmp_path / "run"
    assert train(base, out) == 0
    said, summary = capsys.readouterr().err, json.loads((out / "summary.json").read_text())
    assert all(0 <= r["ece25"] <= 1 for kind in ("train", "val") for r in rows(out, kind))
    assert summary["val_ece25"] == rows(out, "val")[-1]["ece25"] and 0 <= summary["test_ece25_t"] <= 1
    assert f"e25 {rows(out, 'train')[-1]['ece25']:.3f}" in said and f"ece25 {summary['val_ece25']:.4f}" in said


def test_label_noise_happens_as_asked(base, tmp_path):
    assert train(base, tmp_path / "run", "--label-noise", 0.25, "--label-noise-steps", 0.5) == 0
    flipped = [r["flipped_tokens"] for r in rows(tmp_path / "run", "train")]
    assert 0 < sum(flipped) < 0.25 * 12 * 8 * 32


def test_out_of_domain_set_and_wandb_offline(base, corpus, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    out = tmp_path / "run"
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text((ROOT / "LICENSE").read_text())
    assert train(base, out, "--ood", tmp_path / "text", "--wandb", "scorecast") == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["ood_nll"] > summary["test_nll"]  # a licence is not arithmetic
    assert list(out.glob("wandb/offline-run-*/*.wandb"))


def test_export_loads_in_transformers_and_back(dpsm_run, base, tmp_path):
    """A trained checkpoint as a Hugging Face folder: same logits, same text, and a start for another run."""
    transformers = pytest.importorskip("transformers")
    from model import gpt2_hub as hub
    from model.gpt2 import GPT2, GPT2Config

    _, out = dpsm_run
    assert hub.main([str(out / "best.pt"), str(tmp_path / "hf")]) in (0, None)
    checkpoint = load_checkpoint(out / "best.pt")
    ours = GPT2(GPT2Config(**checkpoint["model_config"])).eval()
    ours.load_state_dict(checkpoint["model"])
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf").eval()
    x = torch.randint(0, 320, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(x) @ ours.head_weight.t(), theirs(x).logits, atol=1e-4, rtol=1e-4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert (
        tokenizer.decode(tokenizer("twenty-one times two is forty-two.")["input_ids"])
        == "twenty-one times two is forty-two."
    )

    assert train(base, tmp_path / "run", "--init-from", tmp_path / "hf", "--steps", 1, "--lr", 0) == 0
    for name, w in weights(tmp_path / "run").items():
        torch.testing.assert_close(w, checkpoint["model"][name])


# -- bad input -----------------------------------------------------------------------------------


def fails(capsys, match, flags, out, *more) -> None:
    """Exit code 2, one line on stderr that matches, and no run folder."""
    before = sorted(out.rglob("*")) if out.exists() else None
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        train(flags, out, *more)
    err = capsys.readouterr().err
    assert stopped.value.code == 2
    assert re.search(match, err), err
    # One line, the last; before it only notes of caches that had to be made.
    errors = [line for line in err.strip().splitlines() if ": error: " in line]
    assert errors == err.strip().splitlines()[-1:] and "Traceback" not in err, err
    assert (sorted(out.rglob("*")) if out.exists() else None) == before


@pytest.mark.parametrize(
    "match, more",
    [
        (r"no-such-data", ("--data", "no-such-data")),
        (r"seq(uence)?.*long", ("--seq-len", 1000000)),
        (r"--warmup 1.5 is outside \[0, 1\]", ("--warmup", 1.5)),
        (r"--warmup nan", ("--warmup", "nan")),
        (r"--alpha-max -0.1 is outside", ("--alpha-max", -0.1)),
        (r"--alpha-start 2.0 is outside", ("--alpha-start", 2)),
        (r"--steps 0", ("--steps", 0)),
        (r"--seed -1", ("--seed", -1)),
        (r"--loss.*invalid choice.*hinge", ("--loss", "hinge")),
        (r"unrecognized arguments: --los", ("--los", "ce")),
        (r"tail-smoothing", ("--loss", "ce", "--tail-smoothing", 0.1)),
        (r"--fsdp needs more than one rank", ("--fsdp",)),
        (r"no run in", ("--resume",)),
        (r"triton needs a CUDA device", ("--kernels", "triton")),
    ],
)
def test_bad_flags(match, more, base, tmp_path, capsys):
    fails(capsys, match, base, tmp_path / "run", *more)


def test_bad_text(base, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    fails(capsys, "empty", base, tmp_path / "run", "--data", tmp_path / "empty")
    (tmp_path / "blank").mkdir()
    (tmp_path / "blank" / "a.txt").write_text("")
    fails(capsys, "blank", base, tmp_path / "run", "--data", tmp_path / "blank")


def test_a_folder_in_use_is_refused(dpsm_run, base, tmp_path, capsys):
    flags, out = dpsm_run
    fails(capsys, "already holds a run", flags, out)
    fails(capsys, "of a different run.*lr was 0.003, now 0.1", flags, out, "--resume", "--lr", 0.1)
    fails(capsys, "of a different run.*model was 'nano', now 'gpt2'", flags, out, "--resume", "--model", "gpt2")
    fails(capsys, "best.pt holds weights only", flags, out, "--resume", "--resume-from", out / "best.pt")
    assert train(base, tmp_path / "other") == 0
    fails(
        capsys,
        "dpsm/last.pt is of a different run",
        base,
        tmp_path / "other",
        "--resume",
        "--resume-from",
        out / "last.pt",
    )
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    fails(capsys, "not an empty folder", base, tmp_path / "mine")


def test_broken_checkpoints_are_named(base, tmp_path, capsys):
    out = tmp_path / "run"
    assert train(base, out) == 0
    good = (out / "last.pt").read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 0x40
    for bad in (good[: len(good) // 2], good[:-1], bytes(flipped), b""):
        (out / "last.pt").write_bytes(bad)
        fails(capsys, r"last\.pt is truncated or corrupt; an older good one is .*previous\.pt", base, out, "--resume")
    assert train(base, out, "--resume", "--resume-from", out / "previous.pt") == 0
    assert load_checkpoint(out / "last.pt")["step"] == 12


def test_changed_text_is_noticed(base, corpus, tmp_path, capsys):
    flags = [str(tmp_path / "text") if f == str(corpus) else f for f in base]
    shutil.copytree(corpus, tmp_path / "text")
    assert train(flags, tmp_path / "run") == 0
    with open(tmp_path / "text" / "train.txt", "a") as f:
        f.write("one times one is one.\n")
    fails(capsys, "not the text that .* was trained on", flags, tmp_path / "run", "--resume")


def test_a_run_of_ours_is_a_start(base, dpsm_run, tmp_path, capsys):
    """Its folder or a checkpoint gives its weights; another tokenizer is refused before anything is trained."""
    kept = load_checkpoint(dpsm_run[1] / "best.pt")["model"]
    for start in (dpsm_run[1], dpsm_run[1] / "best.pt"):
        out = tmp_path / f"from-{start.name}"
        assert train(base, out, "--init-from", start, "--steps", 1, "--lr", 0) == 0
        assert all(torch.equal(w, kept[name]) for name, w in weights(out).items())
    for size in ("bpe:319", "bpe:400"):
        flags = [size if f == "bpe:320" else f for f in base]
        says = rf"--tokenizer {size} is not that of --init-from .*: the tokens differ"
        fails(capsys, says, flags, tmp_path / "run", "--init-from", dpsm_run[1])
    torch.save({"model": {}}, tmp_path / "other.pt")
    fails(capsys, "is no checkpoint of a GPT-2 of ours", base, tmp_path / "run", "--init-from", tmp_path / "other.pt")


def test_what_the_samples_cannot_use_is_found_out_before_training(base, tmp_path, capsys):
    fails(capsys, r"--prompt '\\udcff' has no tokens", base, tmp_path / "run", "--prompt", "\udcff")
    files = {"vocab.json": {}, "merges.txt": "#version: 0.2\n"}
    from data.tokenizer import _byte_characters

    files["vocab.json"] = {c: i for i, c in enumerate(_byte_characters())} | {"<|endoftext|>": 300}
    (tmp_path / "gap").mkdir()
    (tmp_path / "gap" / "vocab.json").write_text(json.dumps(files["vocab.json"]))
    (tmp_path / "gap" / "merges.txt").write_text(files["merges.txt"])
    flags = [str(tmp_path / "gap") if f == "bpe:320" else f for f in base]
    fails(capsys, r"not all ids below 301 are tokens of it .*without gaps", flags, tmp_path / "run")


def test_tokenizer_larger_than_the_model(base, dpsm_run, tmp_path, capsys):
    from model import gpt2_hub as hub

    hub.main([str(dpsm_run[1] / "best.pt"), str(tmp_path / "hf")])
    flags = ["bpe:400" if f == "bpe:320" else f for f in base]
    fails(capsys, "bpe:400 is not that of --init-from", flags, tmp_path / "run", "--init-from", tmp_path / "hf")


def test_ranks_must_divide_the_batch(base, tmp_path):
    ran = torchrun(2, base, tmp_path / "run", "--batch", 7)
    assert ran.returncode != 0 and "--batch 7 is not divisible by the 2 ranks" in ran.stderr
    assert not (tmp_path / "run").exists()


def test_weights_that_turn_non_finite_are_not_saved(base, tmp_path, monkeypatch, capsys):
    """In the step of a validation, after its finite loss; the checkpoint of before stays, and its name is said."""
    original, steps = train_lm.take_step, iter(range(1, 100))

    def broken(optimizer, parameters, *args):
        parameters = list(parameters)
        norm = original(optimizer, parameters, *args)
        if next(steps) == 8:
            parameters[3].data[0] = math.nan
        return norm

    monkeypatch.setattr(train_lm, "take_step", broken)
    assert train(base, tmp_path / "run") == 1
    assert re.search(r"not finite and were not saved; stopped at step 8. Last good.*last\.pt", capsys.readouterr().err)
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 4
    assert not (tmp_path / "run" / "summary.json").exists()


def test_steps_that_are_skipped_at_every_validation_leave_a_run_whole(base, tmp_path, monkeypatch):
    original = train_lm.make_score

    def make_score(*args, **kwargs):
        score, calls = original(*args, **kwargs), iter(range(1, 1000))
        return lambda m: score(m) * (math.nan if next(calls) % 4 == 0 else 1)

    monkeypatch.setattr(train_lm, "make_score", make_score)
    assert train(base, tmp_path / "run") == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["skipped_steps"] == 3


def test_non_finite_loss_skips_then_stops(base, tmp_path, capsys):
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
        assert train(base, out / "one") == 0
        poisoned |= {6, 7}
        assert train(base, out / "three") == 1
    finally:
        train_lm.make_score = original
    summary = json.loads((out / "one" / "summary.json").read_text())
    assert summary["skipped_steps"] == summary["divergences"] == 1
    assert all(torch.isfinite(w).all() for w in weights(out / "one").values())
    assert re.search(r"three steps running.*Last good checkpoint: .*last\.pt", capsys.readouterr().err)
    assert load_checkpoint(out / "three" / "last.pt")["step"] == 4
    assert not (out / "three" / "summary.json").exists()
