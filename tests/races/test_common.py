"""races/common.py: what every race relies on."""

import csv
import sys

import pytest
import torch

from races import common


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
