"""finetune_seq2seq.py end to end on summaries that the test writes: resume, parallelism, presets."""

import dataclasses
import functools
import json
import logging
import math
import os
import re
import signal
import sys
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from on_ranks import on_ranks
from seq2seq_runs import CLOCK, fails, predictions, rows, summary_of, train, weights, write_set
from signals import terminated_in_validation

import eval.seq2seq
import eval.summaries
import finetune_seq2seq
from data.summaries import Bucketed, SummaryTokenizer, collate, encode_pairs, load_summaries
from eval.heldout import evaluate, final_metrics
from kernels import UnigramSmoothing, linear_score
from kernels.losses import alpha_at, brier, ce
from model.seq2seq import Seq2Seq, bart_config, training_flops
from model.seq2seq_hub import export, save_seq2seq
from recipes.presets import PRESETS, preset_values
from runtime.cli import parse_config
from runtime.folder import Pieces, load_checkpoint
from runtime.machine import World, start_world
from runtime.optim import rule_of
from schedules.gradient_stats import GradientStats

pytestmark = pytest.mark.usefixtures("small_summarisers")
SUMMARY_KEYS = """
loss label_smoothing steps seed parameters tokens_seen best_step val_nll val_ppl val_ece10 val_ece100 val_brier
val_spherical val_accuracy temperature val_nll_t val_ece10_t test_nll test_ece10 test_ece10_t test_rouge1
test_rouge1_low test_rouge1_high test_rouge2 test_rougeL test_rougeLsum test_files2rouge_1 test_files2rouge_2
test_files2rouge_L test_distinct_1 test_distinct_2 test_words
test_length_ratio test_ended test_summary_tokens test_generate_tokens_per_second padding swapped_references data
tokens_per_second ms_per_step_median peak_memory_bytes train_seconds flops_per_token divergences clip_rate
""".split()


# -- what a run leaves behind --------------------------------------------------------------------


@pytest.fixture(scope="module")
def dpsm_flags(seq2seq_base):
    """Everything random switched on, and a share of the unigram that follows the validations."""
    more = "--loss dpsm --warmup 0.5 --dropout 0.1 --attention-dropout 0.1 --noise-references 0.15"
    more += " --unigram 0.25 --unigram-gain 20"
    return [*seq2seq_base, *more.split()]


@pytest.fixture(scope="module")
def dpsm_run(small_summarisers, dpsm_flags, tmp_path_factory):
    """An uninterrupted DPSM run."""
    out = tmp_path_factory.mktemp("runs") / "dpsm"
    assert train(dpsm_flags, out) == 0
    return out


def test_run_folder_is_complete(dpsm_run, capsys):
    out = dpsm_run
    summary, config = summary_of(out), json.loads((out / "config.json").read_text())
    assert not [k for k in SUMMARY_KEYS if summary.get(k) is None]
    # A preset's values are all written out; the order is the loss's own.
    assert [k for k, v in config.items() if v is None] == ["order"]
    assert config["lr"] == 3e-3 and config["weight_decay"] == 0.01 and config["script"] == "finetune_seq2seq.py"
    assert summary["swapped_references"] == round(0.15 * 8 * 9)
    assert summary["val_nll_t"] <= summary["val_nll"] + 1e-6
    assert summary["data"]["train"]["pairs"] == 64 and not summary["partial"] and summary["padding"] < 0.1
    assert summary["test_rouge1_low"] <= summary["test_rouge1"] <= summary["test_rouge1_high"]
    for name in ("environment.json", "calibration.json", "source/finetune_seq2seq.py", "last.pt", "best.pt"):
        assert (out / name).is_file(), name
    made = predictions(out)
    assert [r["index"] for r in made] == list(range(10)) and made[3]["id"] == "test-2006"
    assert all(1 <= r["tokens"] <= 12 for r in made) and not list(out.glob("*.part*"))
    assert sum(r["rougeLsum"] for r in made) / 10 == pytest.approx(summary["test_rougeLsum"], abs=1e-12)
    scores = [r["log_p"] / r["tokens"] ** config["length_penalty"] for r in made]
    assert scores == pytest.approx([r["score"] for r in made], rel=1e-12) and max(scores) < 0
    assert {f"test_{k}_{kind}" for k in ("spearman", "prr") for kind in ("sequence", "token")} <= set(summary)
    nll = [r["nll"] for r in rows(out, "val")]
    assert nll[-1] < nll[0] and nll[-1] < math.log(303)


def test_the_report_reads_it(dpsm_run, undrawn, tmp_path):
    from eval.report import terminal as report

    assert report.main([str(dpsm_run), "--out", str(tmp_path / "report")]) in (0, None)
    assert "dpsm" in (tmp_path / "report" / "report.md").read_text()


def test_load_finetuned_is_the_reported_model(dpsm_run, sums, tmp_path):
    """Validation again, from the run folder alone: the same numbers."""
    model, tokenizer, kept = eval.seq2seq.load_finetuned(dpsm_run)
    assert not model.training and kept["config"]["loss"] == "dpsm"
    part = load_summaries(sums, ("validation",), min_words=20)["validation"]
    pairs = encode_pairs(part, tokenizer, tmp_path, 96, 48)
    world = World(0, 1, torch.device("cpu"))
    again = evaluate(model, finetune_seq2seq.forwards(model, pairs, 5, world), world).raw.compute()
    assert again["nll"] == pytest.approx(summary_of(dpsm_run)["val_nll"], rel=1e-5)  # fp32, other padding
    assert isinstance(again, dict) and isinstance(tokenizer, SummaryTokenizer)


@pytest.mark.parametrize("flags", ["brier", "ce --label-smoothing 0.1", "spherical --tail-smoothing 0.1"])
def test_losses_learn(flags, seq2seq_base, tmp_path):
    assert train(seq2seq_base, tmp_path / "run", "--loss", *flags.split(), "--lr-warmup", 0, "--test-examples", 2) == 0
    nll = [r["nll"] for r in rows(tmp_path / "run", "val")]
    assert nll[-1] < nll[0] and nll[-1] < math.log(303)
    assert summary_of(tmp_path / "run")["test_examples"] == 2


def test_scores_with_label_smoothing_are_torchs():
    torch.manual_seed(0)
    hidden, weight = torch.randn(12, 8), torch.randn(20, 8)
    y = torch.randint(0, 20, (12,))
    y[3] = -100
    logits = hidden @ weight.t()
    smoothed = F.cross_entropy(logits, y, label_smoothing=0.1)
    onehot = F.one_hot(y.clamp(min=0), 20)
    brier_N = ((logits.softmax(-1) - onehot) ** 2).sum(-1)
    expected = {"ce": smoothed, "dpsm": 0.7 * smoothed + 0.3 * brier_N[y != -100].mean()}
    for loss, value in expected.items():
        cfg = finetune_seq2seq.Config(loss=loss, label_smoothing=0.1)
        score = finetune_seq2seq.score_of(cfg, torch.tensor(0.3))
        torch.testing.assert_close(linear_score(hidden, weight, y, score)[0], value)  # fp32 defaults
    plain = finetune_seq2seq.score_of(finetune_seq2seq.Config(loss="dpsm", label_smoothing=0.0), torch.tensor(0.3))
    got = linear_score(hidden, weight, y, plain)[0]
    torch.testing.assert_close(got, linear_score(hidden, weight, y, lambda m: 0.7 * ce(m) + 0.3 * brier(m))[0])


def test_a_log_line_is_said_once(capsys):
    """Although a package (absl, through rouge-score) has given the root logger a handler of its own."""
    root = logging.StreamHandler()
    logging.getLogger().addHandler(root)
    try:
        start_world("cpu")
        logging.getLogger("scorecast").info("a line")
    finally:
        logging.getLogger().removeHandler(root)
    assert capsys.readouterr().err == "a line\n"


# -- the unigram ---------------------------------------------------------------------------------


def test_the_share_of_the_unigram_follows_over_confidence(dpsm_run):
    """After a validation it rises by gain times (confidence - accuracy), within [0, the limit], and alpha has the rest
    of the loss."""
    share, expected, val = 0.0, {}, {r["step"]: r for r in rows(dpsm_run, "val")}
    for step in range(1, 10):
        expected[step] = share
        if step in val:
            share = min(max(share + 20 * (val[step]["confidence"] - val[step]["accuracy"]), 0.0), 0.25)
    logged = rows(dpsm_run, "train")
    assert [r["unigram"] for r in logged] == pytest.approx([expected[r["step"]] for r in logged])
    assert 0 == expected[3] < expected[4] < expected[7] < 0.25 and {3, 4, 8} <= {r["step"] for r in logged}
    for r in logged:
        assert r["alpha"] == pytest.approx((1 - r["unigram"]) * alpha_at(r["step"] - 1, 9, warmup=0.5), rel=1e-6)
    assert load_checkpoint(dpsm_run / "last.pt")["unigram"] == pytest.approx(share)


def test_the_loss_is_smoothed_towards_the_targets_frequencies(seq2seq_base, dpsm_run, sums, tmp_path):
    """The loss of a step at lr 0, of two micro-batches under a bias of the logits, against its definition in float64:
    (1 - u) CE + u CE(q, p), with q the add-one frequencies of the summaries' tokens."""
    model, tokenizer, _ = eval.seq2seq.load_finetuned(dpsm_run)
    model.config = dataclasses.replace(model.config, logits_bias=True)
    bias = torch.randn(1, model.config.vocab_size, generator=torch.Generator().manual_seed(0))
    model.register_buffer("final_logits_bias", bias)
    export(dpsm_run, tmp_path / "hf")
    save_seq2seq(model, tmp_path / "biased", {p.name: p.read_bytes() for p in (tmp_path / "hf").glob("tokenizer*")})
    at = seq2seq_base.index("--size")
    start = [*seq2seq_base[:at], *seq2seq_base[at + 5 :], "--model", str(tmp_path / "biased")]
    more = "--lr 0 --steps 1 --seed 5 --loss ce --unigram 0.3 --test-examples 1"
    assert train(start, tmp_path / "run", *more.split()) == 0
    pairs = encode_pairs(load_summaries(sums, ("train",), min_words=20)["train"], tokenizer, tmp_path, 96, 48)
    targets = np.concatenate([pairs.ids(1, i) for i in range(len(pairs))])
    q = torch.from_numpy(np.bincount(targets, minlength=tokenizer.vocab_size) + 1.0)
    q /= q.sum()
    source, mask, y = collate(pairs, Bucketed(pairs, 8, 5).indices(0))
    with torch.no_grad():
        hidden = model(source, mask, model.shift_right(y))[y != -100]
    log_p = torch.log_softmax(hidden.double() @ model.head_weight.double().t() + bias.double(), -1)
    ce, smooth = F.nll_loss(log_p, y[y != -100]).item(), -(log_p @ q).mean().item()
    (logged,) = rows(tmp_path / "run", "train")
    assert logged["nll"] == pytest.approx(ce, rel=1e-5)  # fp32
    assert logged["loss"] == pytest.approx(0.7 * ce + 0.3 * smooth, rel=1e-5) and logged["unigram"] == 0.3
    assert abs(smooth - ce) > 1e-2


# -- exactness -----------------------------------------------------------------------------------


def same_run(a, b) -> None:
    """Metrics (the clock's apart), final weights, summaries and bins are equal, bit for bit."""
    for kind in ("train", "val"):
        assert rows(a, kind) == rows(b, kind)
    wa, wb = weights(a), weights(b)
    assert all(torch.equal(wa[k], wb[k]) for k in wa)
    assert predictions(a) == predictions(b)
    sa, sb = ({k: v for k, v in summary_of(x).items() if k not in CLOCK and "per_second" not in k} for x in (a, b))
    assert sa == sb


def test_a_stopped_run_resumes_exactly(dpsm_flags, dpsm_run, tmp_path, monkeypatch, capsys):
    """SIGTERM in the middle of a logging window; dropout, noise, alpha, optimizer and best-so-far go on."""
    original = Bucketed.indices

    def stop_after_5(self, step):
        if step == 4 and sys._getframe(1).f_code.co_name == "main":
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, step)

    with monkeypatch.context() as m:
        m.setattr(Bucketed, "indices", stop_after_5)
        assert train(dpsm_flags, tmp_path / "run") == 143
    assert "--resume" in capsys.readouterr().out
    assert not (tmp_path / "run" / "summary.json").exists()
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 5
    assert train(dpsm_flags, tmp_path / "run", "--resume") == 0
    same_run(dpsm_run, tmp_path / "run")


def test_a_signal_in_a_validation_ends_it_and_resume_makes_it_first(dpsm_flags, dpsm_run, tmp_path, monkeypatch):
    """SIGTERM while step 6 is validated: what was measured by then moves nothing, the share of the unigram neither."""
    with terminated_in_validation(monkeypatch, finetune_seq2seq, 2):
        assert train(dpsm_flags, tmp_path / "run") == 143
    saved = load_checkpoint(tmp_path / "run" / "last.pt")
    assert saved["step"] == 6 and saved["owed"] and saved["unigram"] == rows(dpsm_run, "train")[2]["unigram"]
    assert train(dpsm_flags, tmp_path / "run", "--resume") == 0
    same_run(dpsm_run, tmp_path / "run")


def test_a_kill_during_generation_loses_one_batch(dpsm_flags, dpsm_run, tmp_path, monkeypatch):
    """Killed in the third batch of three, half a line written; --resume makes that batch only."""
    original, sizes = eval.summaries.generate, []

    def generate(model, source, *rest):
        sizes.append(len(source))
        if len(sizes) == 3:
            raise KeyboardInterrupt
        return original(model, source, *rest)

    monkeypatch.setattr(eval.summaries, "generate", generate)
    with pytest.raises(KeyboardInterrupt):
        train(dpsm_flags, tmp_path / "run")
    part = tmp_path / "run" / "predictions-test.part0.jsonl"
    assert len(part.read_text().splitlines()) == 8 and not (tmp_path / "run" / "predictions-test.jsonl").exists()
    with open(part, "a") as f:
        f.write('{"index": 9, "pred')
    assert train(dpsm_flags, tmp_path / "run", "--resume") == 0
    assert sizes == [4, 4, 2, 2]
    same_run(dpsm_run, tmp_path / "run")


@pytest.mark.parametrize("rule", ["fot", "greedy"])
def test_rules_that_measure_resume_exactly(rule, seq2seq_base, tmp_path, monkeypatch):
    """Stopped between two decisions; what was measured, the plan and the iterate go on bit for bit. Here the rule that
    keeps most and averages of weights; tests/schedules/test_fot.py has every rule."""
    more = "--loss dpsm --dropout 0.1 --steps 16 --eval-every 8 --lr-warmup 0.25 --test-examples 2".split()
    # The whole batch in one forward is split where a step is measured.
    more += {"fot": "--fot-window 4 --micro-batch 8", "greedy": "--optimizer muon --tail-average 0.5"}[rule].split()
    flags = [*seq2seq_base, *more, "--schedule", rule]
    assert train(flags, tmp_path / "whole") == 0
    original = Bucketed.indices

    def stop_after_10(self, step):
        if step == 9 and sys._getframe(1).f_code.co_name == "main":
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, step)

    with monkeypatch.context() as m:
        m.setattr(Bucketed, "indices", stop_after_10)
        assert train(flags, tmp_path / "run") == 143
    assert train(flags, tmp_path / "run", "--resume") == 0
    same_run(tmp_path / "whole", tmp_path / "run")
    decisions, nll = rows(tmp_path / "whole", "fot"), [r["nll"] for r in rows(tmp_path / "whole", "val")]
    assert decisions == rows(tmp_path / "run", "fot") and nll[-1] < nll[0]
    if rule == "greedy":  # the checkpoint has the averages, which were evaluated, and the iterate
        kept = load_checkpoint(tmp_path / "run" / "last.pt")
        iterate = kept["optimizer"]["iterate"]
        assert not decisions and any(not torch.equal(w, iterate[k]) for k, w in kept["model"].items())
    else:
        assert [r["step"] for r in decisions] == [4, 8, 12]
        assert summary_of(tmp_path / "run")["fot_decisions"] == 3
        learning_rates = {r["lr"] for r in rows(tmp_path / "run", "train")}
        assert max(learning_rates) <= 2 * 3e-3 and len(learning_rates) > 3


def test_a_measured_part_is_of_every_length(seq2seq_base, tmp_path, monkeypatch):
    """FoT compares a part of the batch with the whole: two parts where there was one, its share that of the loss."""
    shares, original = [], GradientStats.micro

    def micro(self, share):
        shares.append(share)
        original(self, share)

    monkeypatch.setattr(GradientStats, "micro", micro)
    more = "--schedule fot --fot-window 2 --steps 6 --micro-batch 8 --test-examples 1".split()
    assert train([*seq2seq_base, *more], tmp_path / "run") == 0
    assert len(shares) == 2 and all(0.4 < share < 0.6 for share in shares)  # alternating rows of one sorted batch


def close(a, b) -> None:
    """fp32 rounding of sums taken in another order, carried through 9 steps of AdamW: 1e-4 of the loss."""
    for kind, key in (
        ("train", "loss"),
        ("train", "unigram"),
        ("train", "grad_norm"),
        ("val", "nll"),
        ("val", "ece10"),
    ):
        assert [r[key] for r in rows(a, kind)] == pytest.approx([r[key] for r in rows(b, kind)], rel=1e-4, abs=1e-5)


def with_small_bart(argv) -> int:
    """The script on a rank, whose process knows nothing of this module's fixtures, and what the unigram's share is."""
    finetune_seq2seq.SIZES["bart-tiny"] = functools.partial(bart_config, 1, 32, 2, max_position_embeddings=128)
    follow = UnigramSmoothing.follow

    def said(self, numbers):
        follow(self, numbers)
        print(f"share {self.share!r}\n", end="", flush=True)

    UnigramSmoothing.follow = said
    return finetune_seq2seq.main(argv)


def test_batch_ranks_and_accumulation_give_one_loss_curve(seq2seq_base, tmp_path):
    """Micro-batches of 8, 4 and 1, which are padded differently, layers run again in backward, and two ranks. Targets
    differ in length, so a wrong normalisation (mean of means) shows."""
    flags = [*seq2seq_base, "--loss", "dpsm", "--warmup", "0.5", "--noise-references", "0.3", "--steps", "6"]
    flags += ["--unigram", "0.25", "--unigram-gain", "20"]
    assert train(flags, tmp_path / "four") == 0
    for name, more in (("8", ()), ("1", ()), ("4", ("--checkpoint-activations",))):
        assert train(flags, tmp_path / name, "--micro-batch", name, *more) == 0
        close(tmp_path / "four", tmp_path / name)
    said = on_ranks(2, with_small_bart, [*flags, "--out", str(tmp_path / "ddp")])
    assert [said.count(f"step {step}: validation") for step in (3, 6)] == [1, 1]
    close(tmp_path / "four", tmp_path / "ddp")
    shares = Counter(re.findall(r"share (\S+)", said))  # both ranks have the same two
    assert set(shares.values()) == {2} and {0 < float(share) < 0.25 for share in shares} == {True}
    assert [r["prediction"] for r in predictions(tmp_path / "ddp")] == [
        r["prediction"] for r in predictions(tmp_path / "four")
    ]


def test_a_folder_in_use_is_refused(dpsm_run, seq2seq_base, dpsm_flags, tmp_path, capsys):
    fails(capsys, "already holds a run", dpsm_flags, dpsm_run)
    fails(capsys, "beams was 2, now 3", dpsm_flags, dpsm_run, "--resume", "--beams", 3)
    fails(capsys, "noise_references was 0.15", seq2seq_base, dpsm_run, "--resume", "--loss", "dpsm", "--dropout", 0.1)


# -- options -------------------------------------------------------------------------------------


def resolved(*flags):
    return parse_config(finetune_seq2seq.Config, list(flags), complete=finetune_seq2seq.complete)


def lr_at(cfg, step):
    """The learning rate that the script's rule has after ``step`` steps."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=cfg.lr)
    rule = rule_of(cfg, optimizer, World(0, 1, torch.device("cpu")), power=cfg.lr_power)
    rule.restore(None, step)
    return rule.lr


def test_presets():
    bart, xsum = resolved(), resolved("--data", "xsum")
    assert (bart.lr, bart.label_smoothing, bart.beams, bart.length_penalty, bart.clip) == (3e-5, 0.1, 4, 2.0, 0.1)
    assert (xsum.beams, xsum.length_penalty, xsum.max_new_tokens, xsum.lr) == (6, 1.0, 61, 3e-5)
    assert resolved("--loss", "dpsm").label_smoothing == 0  # it is the CE baseline's
    assert resolved("--loss", "dpsm", "--label-smoothing", "0.1").label_smoothing == 0.1
    assert resolved("--unigram", "0.4").label_smoothing == 0  # which takes its place
    assert resolved("--data", "mine/xsum").beams == bart.beams  # whatever is in a folder that is called so
    for field in dataclasses.fields(finetune_seq2seq.Config):  # --help says the default of each preset
        if field.default is None and field.name != "order":
            values = [preset_values(preset, "")[field.name] for preset in PRESETS]
            said = [part.split(" of ")[0] for part in field.metadata["help"].rpartition("default: ")[2].split(", ")]
            assert said == [f"{v:g}" if isinstance(v, float) else str(v) for v in values], field.name
    assert resolved("--lr", "1e-5").lr == 1e-5 and resolved("--lr", "0").lr == 0
    pegasus = resolved("--preset", "pegasus", "--model", "x", "--data", "xsum")
    assert (pegasus.beams, pegasus.max_source, pegasus.max_target, pegasus.lr) == (8, 512, 64, 1e-4)
    assert pegasus.lr_warmup * pegasus.steps == pytest.approx(10000) and pegasus.length_penalty == 0.6
    assert xsum.lr_warmup * xsum.steps == pytest.approx(500) and xsum.batch < bart.batch
    for name in PRESETS:
        assert set(preset_values(name, "xsum")) == set(preset_values("bart", "cnn_dailymail"))


def test_polynomial_decay_is_fairseqs():
    """(1 - (step - warmup) / (total - warmup))^power of the peak, after a linear warm-up (fairseq's
    polynomial_decay with end_learning_rate 0)."""
    cfg = resolved("--steps", "1000", "--lr", "1", "--lr-warmup", "0.1", "--lr-power", "2")
    for step in (100, 333, 999):
        expected = (1 - (step - 100) / 900) ** 2
        assert lr_at(cfg, step) == pytest.approx(expected, rel=1e-9)
    cfg = resolved("--preset", "pegasus", "--model", "x", "--steps", "1000", "--lr", "1", "--lr-warmup", "0.1")
    for step in (100, 333, 999):  # google-research/pegasus: constant times 1 / sqrt(step), 1 where the warm-up ends
        assert lr_at(cfg, step) == pytest.approx(math.sqrt(100 / step), rel=1e-9)
    ramp = [lr_at(cfg, step) for step in range(100)]
    assert ramp == sorted(ramp) and 0 < ramp[0] < 0.02


def test_a_model_folder_is_a_start_and_must_fit_its_tokenizer(seq2seq_base, dpsm_run, sums, tmp_path, capsys):
    """The run's model saved in Hugging Face's layout: at lr 0 another run reports its numbers."""
    export(dpsm_run, tmp_path / "hf")
    files = {p.name: p.read_bytes() for p in (tmp_path / "hf").glob("tokenizer*")}
    at = seq2seq_base.index("--size")
    start = [*seq2seq_base[:at], *seq2seq_base[at + 5 :], "--model", str(tmp_path / "hf")]
    assert train(start, tmp_path / "run", "--lr", 0, "--steps", 1) == 0
    a, b = summary_of(dpsm_run), summary_of(tmp_path / "run")
    assert a["val_nll"] == pytest.approx(b["val_nll"], rel=1e-6)
    assert [r["prediction"] for r in predictions(dpsm_run)] == [r["prediction"] for r in predictions(tmp_path / "run")]
    fails(capsys, "is a bart: --preset pegasus", start, tmp_path / "bad", "--preset", "pegasus")
    # Broken in the ways that a download breaks.
    other = Seq2Seq(bart_config(1, 32, 2, max_position_embeddings=128, vocab_size=290))
    save_seq2seq(other, tmp_path / "other", files)
    start[-1] = str(tmp_path / "other")
    fails(capsys, "has \\d+ tokens, the model only 290|ends a text with|another's", start, tmp_path / "bad")
    (tmp_path / "hf" / "model.safetensors").write_bytes((tmp_path / "hf" / "model.safetensors").read_bytes()[:5000])
    start[-1] = str(tmp_path / "hf")
    fails(capsys, "model.safetensors is damaged", start, tmp_path / "bad")
    (tmp_path / "hf" / "config.json").unlink()
    fails(capsys, "has no config.json", start, tmp_path / "bad")


def test_pegasus_and_a_second_set(seq2seq_base, sums, tmp_path, capsys, monkeypatch):
    """PEGASUS's shape, zero-shot on another set, which says that it is a sample."""
    monkeypatch.setenv("LM_DATA", str(tmp_path))
    second = write_set(tmp_path / "xsum", 1, 1, 5)
    flags = [f.replace("bart-tiny", "pegasus-tiny") for f in seq2seq_base]
    assert train(flags, tmp_path / "run", "--eval-data", second, "--steps", 3) == 0
    assert "5 of 11,334 rows" in capsys.readouterr().out
    summary = summary_of(tmp_path / "run")
    assert summary["partial"] and summary["data"]["ood"]["partial"] == "a sample: 5 of 11,334 rows"
    assert summary["ood_examples"] == 5 and summary["ood_rouge1"] is not None and summary["ood_ece10"] is not None


def test_a_fold_leaves_the_test_set_alone(seq2seq_base, tmp_path):
    assert train(seq2seq_base, tmp_path / "run", "--fold", "2/5", "--steps", 3) == 0
    summary = summary_of(tmp_path / "run")
    assert summary["test_nll"] is None and "test_rouge1" not in summary
    assert summary["val_examples"] == 13 and summary["fold"] == "2/5"  # ranks 1, 6, ..., 61 of 64


def test_profile(seq2seq_base, tmp_path, capsys, monkeypatch):
    """A share that follows costs what it does at its limit."""
    shares, term = [], UnigramSmoothing.term
    monkeypatch.setattr(UnigramSmoothing, "term", lambda u, *a, **k: shares.append(u.share) or term(u, *a, **k))
    assert train(seq2seq_base, tmp_path / "run", "--profile", 3, "--unigram", 0.25, "--unigram-gain", 2) == 0
    assert shares == [0.25] * (eval.seq2seq.PROFILE_WARM_UP + 3)
    cost = json.loads((tmp_path / "run" / "profile.json").read_text())
    assert cost["pairs"] == 4 and cost["ms_forward_backward"] > 0 and cost["tokens_per_second"] > 0
    assert cost["peak_memory_bytes"] > 0 and cost["joules_per_step"] is None and cost["gpu_utilisation"] is None
    assert not (tmp_path / "run" / "last.pt").exists() and "tokens_per_second" in capsys.readouterr().out


def test_flops_are_those_of_the_products():
    """Against torch's own counter of matrix products, forward once; ours counts a training step, three times that."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    config = bart_config(2, 32, 2, vocab_size=40, max_position_embeddings=64)
    model, source, target = Seq2Seq(config), torch.ones(1, 24, dtype=torch.long), torch.ones(1, 9, dtype=torch.long)
    # The counter knows attention only by its products, as the MATH backend runs it.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(source, None, target) @ model.head_weight.t()
    assert training_flops(config, 24, 9) == 3 * counter.get_total_flops()


def test_a_fixed_bias_of_the_logits_counts(seq2seq_base, dpsm_run, sums, tmp_path):
    """final_logits_bias: evaluation sees it, and so does the temperature; against cross-entropy on whole logits."""
    model, tokenizer, _ = eval.seq2seq.load_finetuned(dpsm_run)
    model.config = dataclasses.replace(model.config, logits_bias=True)
    bias = torch.randn(1, model.config.vocab_size, generator=torch.Generator().manual_seed(0))
    model.register_buffer("final_logits_bias", bias)
    part = load_summaries(sums, ("validation",), min_words=20)["validation"]
    pairs = encode_pairs(part, tokenizer, tmp_path, 96, 48)
    world, keep = World(0, 1, torch.device("cpu")), []
    forwards = functools.partial(finetune_seq2seq.forwards, model, pairs, 8, world)
    got = evaluate(model, forwards(), world, keep=keep).raw.compute()["nll"]
    hidden, y = (torch.cat(part) for part in zip(*keep, strict=True))
    expected = F.cross_entropy(hidden @ model.head_weight.t() + bias, y).item()
    assert got == pytest.approx(expected, rel=1e-5)  # fp32
    assert got != pytest.approx(F.cross_entropy(hidden @ model.head_weight.t(), y).item(), rel=1e-2)
    pieces = Pieces(tmp_path / "evaluation.json", "last 12", world)
    entries, _ = final_metrics(model, dict(val=forwards, test=None, ood=None), world, pieces=pieces)
    assert entries["val_nll"] == pytest.approx(expected, rel=1e-5) and entries["val_nll_t"] < entries["val_nll"]
