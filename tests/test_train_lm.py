"""train_lm.py end to end on a tiny corpus: what a run leaves behind, parallelism, options."""

import json
import math
import shutil

import pytest
import torch
from lm_runs import ROOT, rows, same_run, train, two_nodes, weights
from on_ranks import on_ranks
from signals import terminated_in_validation

import train_lm
from eval import metrics
from kernels.losses import alpha_at
from runtime.folder import load_checkpoint

SUMMARY_KEYS = """
loss alpha_schedule steps seed parameters tokens_seen val_nll val_ppl val_bits_per_byte val_ece10 val_ece100
val_ece10_mass val_brier val_spherical val_accuracy temperature val_nll_t val_ece10_t test_nll test_ppl
test_ece10 test_brier tokens_per_second ms_per_step_median peak_memory_bytes train_seconds flops_per_token mfu
energy_joules divergences clip_rate
""".split()


# -- what a run leaves behind --------------------------------------------------------------------


def test_run_folder_is_complete(lm_run):
    _, out = lm_run
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


def test_alpha_follows_the_optimizer_step(lm_run, tmp_path):
    """More micro-batches and more evaluations do not move it, and the checkpoint holds it."""
    flags, out = lm_run
    assert train(flags, tmp_path / "micro", "--micro-batch", 2, "--eval-every", 2) == 0
    for folder in (out, tmp_path / "micro"):
        assert len(rows(folder, "train")) > 5
        for r in rows(folder, "train"):
            assert r["alpha"] == pytest.approx(alpha_at(r["step"] - 1, 12, warmup=0.5), rel=1e-6)  # fp32
        assert load_checkpoint(folder / "last.pt")["alpha"] == alpha_at(12, 12, warmup=0.5) == 1.0


@pytest.fixture(scope="module")
def plain_runs(lm_base, tmp_path_factory):
    """Folders of uninterrupted runs of two scores with no option, by their loss."""
    folder = tmp_path_factory.mktemp("plain")
    for loss in ("ce", "brier"):
        assert train(lm_base, folder / loss, "--loss", loss) == 0
    return {loss: folder / loss for loss in ("ce", "brier")}


def test_losses_are_golden(plain_runs):
    """Training losses of two scores, recorded on this code. They pin the whole path: data order, initialisation, loss,
    optimizer. The tolerance leaves room for another CPU's rounding, carried through 12 steps."""
    golden = {
        "ce": [5.38228, 4.78069, 5.95823, 4.21862, 4.07643, 3.90722],
        "brier": [0.99315, 0.98347, 0.98379, 0.96739, 0.95716, 0.94785],
    }
    for loss, expected in golden.items():
        assert [r["loss"] for r in rows(plain_runs[loss], "train")] == pytest.approx(expected, rel=1e-3)


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
def test_every_loss_learns(flags, lm_base, tmp_path):
    assert train(lm_base, tmp_path / "run", "--lr-warmup", 0, "--loss", *flags.split()) == 0
    nll = [r["nll"] for r in rows(tmp_path / "run", "val")]
    assert nll[-1] < math.log(320) and nll[-1] < nll[0]  # better than uniform, and getting better


def test_dpsm_at_alpha_0_is_ce_and_at_1_is_brier(plain_runs, lm_base, tmp_path):
    for alpha, loss in ((0, "ce"), (1, "brier")):
        fixed = ("--loss", "dpsm", "--alpha-schedule", "fixed", "--alpha-max", alpha)
        assert train(lm_base, tmp_path / f"dpsm{alpha}", *fixed) == 0
        a, b = weights(plain_runs[loss]), weights(tmp_path / f"dpsm{alpha}")
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_the_share_of_the_unigram_follows_over_confidence_and_resumes(lm_base, tmp_path, monkeypatch):
    """After a validation it rises by gain times (confidence - accuracy), within [0, the limit], and alpha has the rest
    of the loss. SIGTERM in a validation: what was measured by then moves nothing, and the run that goes on makes it
    first, to the whole run's numbers."""
    noisy = ["--loss", "dpsm", "--warmup", "0.5", "--unigram", "0.3", "--unigram-gain", "0.5", "--eval-every", "2"]
    assert train(lm_base, tmp_path / "run", *noisy, "--lr", 3e-2, "--log-every", 1) == 0
    share, expected, val = 0.0, {}, {r["step"]: r for r in rows(tmp_path / "run", "val")}
    for step in range(1, 13):
        expected[step] = share
        if step in val:
            share = min(max(share + 0.5 * (val[step]["confidence"] - val[step]["accuracy"]), 0.0), 0.3)
    logged = rows(tmp_path / "run", "train")
    assert {r["step"]: r["unigram"] for r in logged} == pytest.approx(expected)
    assert len(set(expected.values())) > 3 and 0.0 in expected.values()
    for r in logged:
        assert r["alpha"] == pytest.approx((1 - r["unigram"]) * alpha_at(r["step"] - 1, 12, warmup=0.5), rel=1e-6)
    at = next(step for step in val if 0 < expected[step] < expected.get(step + 1, 0) < 0.3)
    with terminated_in_validation(monkeypatch, train_lm, at // 2):
        assert train(lm_base, tmp_path / "again", *noisy, "--lr", 3e-2, "--log-every", 1) == 143
    saved = load_checkpoint(tmp_path / "again" / "last.pt")
    assert saved["step"] == at and saved["owed"] and saved["unigram"] == pytest.approx(expected[at])
    assert train(lm_base, tmp_path / "again", *noisy, "--lr", 3e-2, "--log-every", 1, "--resume") == 0
    same_run(tmp_path / "run", tmp_path / "again")


# -- exactness -----------------------------------------------------------------------------------


def close(a, b) -> None:
    """fp32 rounding of sums taken in another order, carried through 12 steps of AdamW: 1e-4 of the loss."""
    for kind, key in (("train", "loss"), ("train", "grad_norm"), ("val", "nll"), ("val", "ece10")):
        assert [r[key] for r in rows(a, kind)] == pytest.approx([r[key] for r in rows(b, kind)], rel=1e-4, abs=1e-5)


@pytest.fixture(scope="module")
def by_one_and_by_fsdp(lm_base, tmp_path_factory):
    """(flags, folder): a run by one process in "one", and by FSDP2 on 2 ranks, accumulation 2, in "fsdp". The data end
    in a padded window, so a wrong normalisation (mean of means) shows. FoT measures, and its envelope alone sets the
    learning rates: the same on any ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    flags = [*lm_base, "--loss", "dpsm", "--warmup", "0.5", "--label-noise", "0.1", "--unigram", "0.1"]
    flags += ["--schedule", "fot", "--fot-parts", "envelope", "--fot-window", "4"]
    assert train(flags, folder / "one") == 0
    said = on_ranks(2, train_lm.main, [*flags, "--out", str(folder / "fsdp"), "--fsdp", "--micro-batch", "2"])
    assert [said.count(f"step {step}: validation") for step in (4, 8, 12)] == [1, 1, 1]
    return flags, folder


def test_batch_ranks_and_accumulation_give_one_loss_curve(by_one_and_by_fsdp, tmp_path):
    """8 x 1 rank, accumulation 2 x 4, FSDP2 on 2 ranks, and DDP's 4 ranks on two nodes, under torchrun."""
    flags, before = by_one_and_by_fsdp
    assert train(flags, tmp_path / "accumulated", "--micro-batch", 4) == 0
    for code, said in two_nodes(2, flags, tmp_path / "nodes", "--micro-batch", 1):
        assert code == 0, said[-3000:]
    runs = {folder.name: folder for folder in (*before.iterdir(), *tmp_path.iterdir()) if folder.is_dir()}
    summaries = {name: json.loads((folder / "summary.json").read_text()) for name, folder in runs.items()}
    assert summaries["nodes"]["world_size"] == 4 and len(summaries) == 4
    for name, found in summaries.items():
        close(runs["one"], runs[name])
        for key in ("temperature", "val_nll", "val_nll_t", "test_nll", "test_ece10", "test_brier_t", "test_accuracy"):
            assert found[key] == pytest.approx(summaries["one"][key], rel=1e-3, abs=1e-4), (name, key)
        for band, ours in found["bands"].items():
            theirs = summaries["one"]["bands"][band]
            assert {**ours, "val": 0, "test": 0} == {**theirs, "val": 0, "test": 0}
            assert ours["test"]["tokens"] == theirs["test"]["tokens"] > 0
            assert ours["test"] == pytest.approx(theirs["test"], rel=1e-3, abs=1e-4), (name, band)
        measured = [[r for r in rows(runs[run], "fot") if r["after"] is not None] for run in ("one", name)]
        assert measured[0]
        for a, b in zip(*measured, strict=True):
            # The same gradients in another order of summation; ranks and micro-batches halve their own rows, so the
            # noise is another sample of the same thing.
            assert (b["after"], b["g2"] + b["noise"]) == pytest.approx((a["after"], a["g2"] + a["noise"]), rel=1e-3)


def test_a_checkpoint_can_be_continued_on_other_ranks(by_one_and_by_fsdp, tmp_path):
    """Written by FSDP2 on 2 ranks and continued by one process, and the other way round."""
    flags, before = by_one_and_by_fsdp
    for name in ("one", "fsdp"):
        shutil.copytree(before / name, tmp_path / name)
    assert load_checkpoint(tmp_path / "fsdp" / "previous.pt")["step"] == 8
    assert train(flags, tmp_path / "fsdp", "--resume", "--resume-from", tmp_path / "fsdp" / "previous.pt") == 0
    more = ("--fsdp", "--resume", "--resume-from", str(tmp_path / "one" / "previous.pt"))
    on_ranks(2, train_lm.main, [*flags, "--out", str(tmp_path / "one"), *more])
    for name in ("one", "fsdp"):
        close(before / "one", tmp_path / name)


def test_activation_checkpointing_changes_nothing(plain_runs, lm_base, tmp_path):
    assert train(lm_base, tmp_path / "recomputed", "--checkpoint-activations") == 0
    close(plain_runs["ce"], tmp_path / "recomputed")


def test_evaluation_reads_the_whole_set_whatever_the_batch(plain_runs, lm_base, tmp_path):
    assert train(lm_base, tmp_path / "run", "--micro-batch", 4) == 0
    a, b = (json.loads((run / "summary.json").read_text()) for run in (plain_runs["ce"], tmp_path / "run"))
    assert a["val_tokens"] == b["val_tokens"]
    assert a["test_nll"] == pytest.approx(b["test_nll"], rel=1e-4)


def test_fp8_trains_with_other_numbers_and_ends_where_the_run_without_does(lm_base, tmp_path):
    plain, quick = tmp_path / "plain", tmp_path / "quick"
    for out, more in ((plain, ()), (quick, ("--fp8",))):
        assert train(lm_base, out, "--lr", 3e-4, *more) == 0
    off = [abs(a["loss"] - b["loss"]) for a, b in zip(rows(plain, "train"), rows(quick, "train"), strict=True)]
    assert 0 < max(off) < 0.02
    a, b = (json.loads((run / "summary.json").read_text()) for run in (plain, quick))
    assert 0 < abs(a["val_nll"] - b["val_nll"]) < 0.01


# -- options -------------------------------------------------------------------------------------


def test_patience_and_best_weights(lm_base, tmp_path, monkeypatch):
    """Validations at steps 4, 8, 12, 16 with a scripted NLL: the second is the best, two worse ones end the run."""
    original, script = train_lm.Meter.judge, iter([5.0, 4.0, 4.5, 4.2])
    monkeypatch.setattr(train_lm.Meter, "judge", lambda self, m: original(self, m | {"nll": next(script, m["nll"])}))
    out = tmp_path / "run"
    assert train(lm_base, out, "--steps", 60, "--patience", 2, "--report", "best") == 0
    summary = json.loads((out / "summary.json").read_text())
    assert [r["step"] for r in rows(out, "val")] == [4, 8, 12, 16]
    assert summary["stopped_early"] == "early_stop" and summary["steps"] == 16
    assert summary["reported_step"] == summary["best_step"] == 8 and summary["best_val_nll"] == 4.0
    assert load_checkpoint(out / "last.pt")["step"] == 16
    # The reported numbers are of the best weights, not of the last.
    assert train(lm_base, tmp_path / "same", "--steps", 60, "--eval-every", 8, "--patience", 1) == 0
    val = next(r for r in rows(tmp_path / "same", "val") if r["step"] == 8)
    assert summary["val_ppl"] == pytest.approx(val["ppl"], rel=1e-6)


def test_a_metric_that_is_added_to_the_table_is_everywhere(lm_base, tmp_path, monkeypatch, capsys):
    """One entry of eval.metrics, and it is in the log's rows, the bar, the validation line and the summary. The report
    is in tests/eval/test_metrics.py."""
    places = "train line final table"
    new = metrics.Metric("ece25", "ECE", "25 bins", "lower", shown=places, bar="e25 {:.3f}", of=lambda c, _: c.ece(25))
    monkeypatch.setattr(metrics, "TOKENS", (*metrics.TOKENS, new))
    out = tmp_path / "run"
    assert train(lm_base, out) == 0
    said, summary = capsys.readouterr().err, json.loads((out / "summary.json").read_text())
    assert all(0 <= r["ece25"] <= 1 for kind in ("train", "val") for r in rows(out, kind))
    assert summary["val_ece25"] == rows(out, "val")[-1]["ece25"] and 0 <= summary["test_ece25_t"] <= 1
    assert f"e25 {rows(out, 'train')[-1]['ece25']:.3f}" in said and f"ece25 {summary['val_ece25']:.4f}" in said


def test_label_noise_happens_as_asked(lm_base, tmp_path):
    assert train(lm_base, tmp_path / "run", "--label-noise", 0.25, "--label-noise-steps", 0.5) == 0
    flipped = [r["flipped_tokens"] for r in rows(tmp_path / "run", "train")]
    assert 0 < sum(flipped) < 0.25 * 12 * 8 * 32


def test_out_of_domain_set_and_wandb_offline(lm_base, corpus, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    out = tmp_path / "run"
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text((ROOT / "LICENSE").read_text())
    assert train(lm_base, out, "--ood", tmp_path / "text", "--wandb", "scorecast") == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["ood_nll"] > summary["test_nll"]  # a licence is not arithmetic
    assert list(out.glob("wandb/offline-run-*/*.wandb"))


def test_export_loads_in_transformers_and_back(lm_run, lm_base, tmp_path):
    """A trained checkpoint as a Hugging Face folder: same logits, same text, and a start for another run."""
    transformers = pytest.importorskip("transformers")
    from model import gpt2_hub as hub
    from model.gpt2 import GPT2, GPT2Config

    _, out = lm_run
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

    assert train(lm_base, tmp_path / "run", "--init-from", tmp_path / "hf", "--steps", 1, "--lr", 0) == 0
    for name, w in weights(tmp_path / "run").items():
        torch.testing.assert_close(w, checkpoint["model"][name])
