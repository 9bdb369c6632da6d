"""finetune_seq2seq.py: flags and data that it refuses, and numbers that are none."""

import math
import re

import pytest
import torch
from seq2seq_runs import fails, train, weights, write_set

import finetune_seq2seq

pytestmark = pytest.mark.usefixtures("small_summarisers")


@pytest.mark.parametrize(
    "match, more",
    [
        (r"no data 'no-such-data'", ("--data", "no-such-data")),
        (r"--noise-references 1.5 is outside \[0, 1\]", ("--noise-references", 1.5)),
        (r"--noise-references nan", ("--noise-references", "nan")),
        (r"swaps summaries within a batch", ("--noise-references", 0.1, "--batch", 1)),
        (r"max_new_tokens=12 is below min_new_tokens=20", ("--min-new-tokens", 20)),
        (r"--max-source 4000 is more than the 128 positions", ("--max-source", 4000)),
        (r"--batch 65 is more than the 64 training pairs", ("--batch", 65)),
        (r"--fold 6/5", ("--fold", "6/5")),
        (r"--loss.*invalid choice.*smoothing", ("--loss", "smoothing")),
        (r"--label-smoothing is read by --loss ce or dpsm alone", ("--loss", "brier", "--label-smoothing", 0.1)),
        (r"--unigram-gain 1.0 needs its limit", ("--label-smoothing", 0.1, "--unigram-gain", 1)),
        (r"--unigram 0.1 is for --path mix", ("--loss", "dpsm", "--path", "order", "--unigram", 0.1)),
        (r"--unigram is read by", ("--loss", "brier", "--unigram", 0.1)),
        (r"--unigram 1.0 is outside \[0, 1\)", ("--unigram", 1)),
        (
            r"--unigram 0.1 smooths already; leave out --label-smoothing 0.2",
            "--unigram .1 --label-smoothing .2".split(),
        ),
        (r"and not both", ("--model", "facebook/bart-base")),
        (r"--size.*invalid choice", ("--size", "bart-huge")),
        (r"unknown tokenizer", ("--tokenizer", "nothing")),
        (r"--warmup 1.5 is outside", ("--warmup", 1.5)),
        (r"FoT parts 'envelop'", ("--schedule", "fot", "--fot-parts", "envelop")),
        (r"--schedule.*invalid choice", ("--schedule", "cosign")),
        (r"--fot-window 0 must be at least 1", ("--fot-window", 0)),
        (r"--lr-warmup 1 leaves no step", ("--schedule", "fot", "--lr-warmup", 1)),
        (r"--steps 0", ("--steps", 0)),
        (r"bert-score", ("--bertscore", "no-such-model")),
        (r"is a bart: --preset pegasus", ("--preset", "pegasus")),
        (r"no run in", ("--resume",)),
    ],
)
def test_bad_flags(match, more, seq2seq_base, tmp_path, capsys):
    fails(capsys, match, seq2seq_base, tmp_path / "run", *more)


def test_bad_data(seq2seq_base, tmp_path, capsys):
    sums = write_set(tmp_path / "set", 8, 2, 2)
    (sums / "train.jsonl").write_text('{"text": "a", "highlights": "b"}\n')
    fails(capsys, "train.jsonl, line 1 has no column article", seq2seq_base, tmp_path / "run", "--data", sums)
    (sums / "validation.jsonl").unlink()
    write_set(tmp_path / "short", 8, 2, 2)
    fails(
        capsys, "rows were left out", seq2seq_base, tmp_path / "run", "--data", tmp_path / "short", "--min-words", 5000
    )
    (tmp_path / "short" / "validation.jsonl").unlink()
    fails(capsys, "no validation split.*--fold", seq2seq_base, tmp_path / "run", "--data", tmp_path / "short")


def test_non_finite_loss_skips_then_stops(seq2seq_base, tmp_path, capsys, monkeypatch):
    """Three bad steps in a row end the run and name the last good checkpoint."""
    original, calls = finetune_seq2seq.score_of, iter(range(10**9))

    def score_of(*args):
        score = original(*args)
        return lambda m: score(m) * (math.nan if next(calls) in range(8, 14) else 1)  # two micro-batches a step

    monkeypatch.setattr(finetune_seq2seq, "score_of", score_of)
    assert train(seq2seq_base, tmp_path / "run") == 1
    assert re.search(r"three steps running.*Last good checkpoint: .*last\.pt", capsys.readouterr().err)
    assert all(torch.isfinite(w).all() for w in weights(tmp_path / "run").values())
