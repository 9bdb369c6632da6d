"""races/transformers_seq2seq.py on a shape for a CPU: it runs, what it writes adds up, and bad flags are one line."""

import csv
import json
import statistics

import pytest
import torch

from model.seq2seq import SIZES, Seq2Seq
from races import transformers_seq2seq as race

TINY = "bart-tiny --batch 2 --source 24 --target 8 --vocab 200 --steps 2 --warm 1 --rounds 2 --beams 2 --new-tokens 6"


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    pytest.importorskip("transformers")
    out = tmp_path_factory.mktemp("race") / "out"
    assert race.main([*TINY.split(), "--generate-batch", "2", "--device", "cpu", "--out", str(out)]) == 0
    return out


def test_every_side_is_timed_in_every_round(ran):
    rows = list(csv.DictReader((ran / "race.csv").read_text().splitlines()))
    sides = [(row["round"], row["task"], row["side"]) for row in rows]
    turns = [("train", "transformers"), ("train", "ce"), ("train", "dpsm"), ("generate", "transformers")]
    assert sides == [(i, *turn) for i in "01" for turn in [*turns, ("generate", "ce")]]
    for row in rows:
        tokens = 2 * (24 + 8) if row["task"] == "train" else 2 * 6
        assert float(row["tokens_per_second"]) == pytest.approx(1000 * tokens / float(row["ms"]))
        assert row["peak_memory_bytes"] == "" and row["dtype"] == "float32"  # RSS is no side's own
    speed = {(row["round"], row["side"]): float(row["tokens_per_second"]) for row in rows if row["task"] == "train"}
    found = json.loads((ran / "race.json").read_text())
    ratio = statistics.median(speed[i, "ce"] / speed[i, "transformers"] for i in "01")
    assert found["train_ce_over_transformers"] == pytest.approx(ratio) and found["generate_over_transformers"] > 0


def test_a_turn_that_fails_and_rows(tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")

    def turn(task, side, *_):
        if side == "ce":
            raise RuntimeError("no such kernel")
        return 2.0, None

    monkeypatch.setattr(race, "turn", turn)
    out = tmp_path / "race"
    assert race.main([*TINY.split(), "--device", "cpu", "--rows", "4", "--out", str(out)]) == 1
    rows = list(csv.DictReader((out / "race.csv").read_text().splitlines()))
    assert [(row["side"], row["failed"]) for row in rows[:3]] == [
        ("transformers", ""),
        ("ce", "RuntimeError: no such kernel"),
        ("dpsm", ""),
    ]
    assert len(rows) == 4 and "left out by --seconds or --rows: 6" in capsys.readouterr().err


def test_both_models_are_of_one_size():
    """The same number of parameters and the same rates of dropout, or the race is none."""
    pytest.importorskip("transformers")
    config = SIZES["bart-tiny"](vocab_size=200, dropout=0.1, attention_dropout=0.1)
    theirs = race.their_model(config, torch.float32, "cpu")
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in Seq2Seq(config).parameters())
    kept = theirs.config
    assert (kept.dropout, kept.attention_dropout, kept.activation_dropout) == (0.1, 0.1, 0.0)
    assert kept._attn_implementation == "sdpa" and kept.scale_embedding is False


@pytest.mark.parametrize(
    "match, more",
    [
        ("--rounds 0: expected at least 1", "--rounds 0"),
        ("--beams 1: expected at least 2", "--beams 1"),
        ("5000 tokens are more than the 1024 positions", "--source 5000"),
        ("exists; give another --out", "--out tests"),
    ],
)
def test_bad_flags(match, more, tmp_path, capsys):
    flags = [
        *TINY.split(),
        "--device",
        "cpu",
        *([] if "--out" in more else ["--out", str(tmp_path / "r")]),
        *more.split(),
    ]
    with pytest.raises(SystemExit) as stopped:
        race.main(flags)
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and match in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "r").exists()
