"""races/common.py: what every race relies on."""

import csv
import sys

import pytest
import torch

from races import common, peft_gsm8k


def test_memory_ends_a_batch_is_halved(monkeypatch):
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    tried = []

    def run(batch):
        tried.append(batch)
        if batch > 8:
            raise torch.OutOfMemoryError

    assert common.largest_that_fits(run, 64, "") == 8 and tried == [64, 32, 16, 8]
    with pytest.raises(ValueError, match="not one fits"):
        common.largest_that_fits(lambda _: run(9), 4, "not one fits")


def test_a_ratio_is_the_median_over_rounds():
    rows = [
        {"round": i, "side": side, "ms": ms}
        for i, pair in enumerate([(2, 1), (9, 3), (8, 2)])
        for side, ms in zip("ab", pair, strict=True)
    ]
    assert common.median_ratio(iter(rows), "ms", "a", "b") == 3


def test_commands_and_what_they_print():
    line = common.command("-c", "import sys; print(sys.argv[1:])", seq_len=8, out="x y")
    assert line[0] == sys.executable and common.output_of(line, "").strip() == "['--seq-len', '8', '--out', 'x y']"
    with pytest.raises(ValueError, match="it failed: last words"):
        common.output_of(common.command("-c", "raise SystemExit('first\\nlast words')"), "it failed")


def test_a_csv_has_the_same_columns_in_every_row(tmp_path):
    path = tmp_path / "new" / "race.csv"
    common.write_csv(path, [{"a": 1, "b": "x,y"}, {"a": 2}], common.here_and_now(torch.device("cpu")))
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["a"], row["b"]) for row in rows] == [("1", "x,y"), ("2", "")]
    assert list(rows[0]) == ["a", "b", "device", "versions", "date"] and rows[1]["versions"].startswith("torch 2")


def test_a_turn_that_fails_is_a_row_and_the_file_is_whole_after_each(tmp_path, capsys):
    path = tmp_path / "race.csv"
    rows = common.Turns(path, {"where": "here"})

    def fails():
        with open(path, newline="") as file:  # what was measured before is on file already
            assert [row["ms"] for row in csv.DictReader(file)] == ["3"]
        raise RuntimeError("a kernel of theirs\nand its trace")

    assert rows.take({"side": "a"}, lambda: {"ms": 3}) == {"side": "a", "ms": 3} and rows.ended() == 0
    assert rows.take({"side": "b"}, fails) is None and rows.ended() == 1
    assert rows.take({"side": "c"}, lambda: {"ms": 4})
    with open(path, newline="") as file:
        found = [(row["side"], row["ms"], row["failed"], row["where"]) for row in csv.DictReader(file)]
    assert found == [
        ("a", "3", "", "here"),
        ("b", "", "RuntimeError: a kernel of theirs", "here"),
        ("c", "4", "", "here"),
    ]
    assert "b RuntimeError: a kernel of theirs" in capsys.readouterr().err


def test_no_turn_begins_after_the_time_is_over(tmp_path, monkeypatch, capsys):
    now = iter([100.0, 109.0, 111.0])
    monkeypatch.setattr(common.limits.time, "monotonic", lambda: next(now))
    rows = common.Turns(tmp_path / "race.csv", {}, seconds=10)
    assert rows.take({"round": 1, "side": "a"}, lambda: {"ms": 1})
    assert rows.take({"round": 1, "side": "b"}, lambda: {"ms": 1}) is None
    assert len(rows) == 1 and rows.ended() == 0
    assert capsys.readouterr().err == "left out by --seconds or --rows: 1, the first of them 1 b\n"
    assert common.median_ratio(rows, "ms", "a", "b") is None


def test_no_turn_begins_after_so_many_rows(tmp_path, capsys):
    rows = common.Turns(tmp_path / "race.csv", {}, rows=2)
    rows.take({"side": "a"}, lambda: {"ms": 1 / 0})  # a row as well
    taken = [rows.take({"side": side}, lambda: {"ms": 1}) for side in "bcd"]
    assert taken == [{"side": "b", "ms": 1}, None, None] and len(rows) == 2 and rows.ended() == 1
    assert "left out by --seconds or --rows: 2, the first of them c" in capsys.readouterr().err


def test_parts_by_name():
    assert common.chosen("", "xy") == ["x", "y"] and common.chosen("y, x", "xyz") == ["x", "y"]
    with pytest.raises(ValueError, match="--only q: expected some of x, y"):
        common.chosen("y,q", "xy")


def test_lora_s_memory_is_compared_at_one_micro_batch(tmp_path, monkeypatch, capsys):
    asked = []

    def run_turn(turn, argv, model):
        asked.append((turn, argv[-2:] if "--micro-batch" in argv else []))
        if turn == "evaluate:theirs":
            raise ValueError("it does not fit")
        batch = 2 if turn.endswith("theirs") or "--micro-batch" in argv else 4
        return {"batch": batch, "tokens_per_second": 1.0, "seconds": 1.0, "peak_memory_bytes": 10 * batch}

    monkeypatch.setattr(peft_gsm8k, "run_turn", run_turn)
    flags = "--shape tiny --base fp32 --device cpu --rounds 1 --prompts 2 --out"
    assert peft_gsm8k.main([*flags.split(), str(tmp_path / "race")]) == 1
    again = ["--micro-batch", "2"]
    trained = [("train:theirs", []), ("train:ours", []), ("train:theirs", again), ("train:ours", again)]
    assert asked == [*trained, ("evaluate:theirs", []), ("evaluate:ours", [])]
    said = capsys.readouterr().out
    assert "train: peak memory is not compared, as no round has an equal batch (theirs 2, ours 4)" in said
    assert "train: tokens/s, ours over theirs 1.000" in said and said.count("peak memory, ours over theirs") == 1
    assert "train, equal micro-batch: peak memory, ours over theirs 1.000" in said
    with open(tmp_path / "race" / "race.csv", newline="") as file:
        assert [row["failed"] for row in csv.DictReader(file)] == ["", "", "", "", "ValueError: it does not fit", ""]
    assert peft_gsm8k.main([*flags.split(), str(tmp_path / "short"), "--rows", "3"]) == 0
    assert "left out by --seconds or --rows: 3, the first of them 1 train, equal" in capsys.readouterr().err
