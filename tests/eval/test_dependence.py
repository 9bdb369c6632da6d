"""eval.dependence: shuffled articles are another's summaries, and a model that reads its article is told from one that
does not."""

import json

import numpy as np
import pytest
from refusals import refused

from eval.dependence import dependence, derangements, main
from eval.summaries import rouge_scores

TEXTS = [f"the {animal} in {place} sleeps" for animal in ("cat", "dog", "hen", "cow") for place in ("rome", "york")]


def test_nothing_stays_in_a_shuffle():
    for n in (2, 3, 8, 50):
        for places in derangements(n, 6):
            assert sorted(places.tolist()) == list(range(n)) and (places != np.arange(n)).all()
    assert len({tuple(places) for places in derangements(50, 6)}) == 6
    with pytest.raises(ValueError, match="two or more"):
        derangements(1, 1)


def test_a_model_that_reads_is_told_from_one_that_does_not():
    read = {found.name: found for found in dependence(TEXTS, TEXTS)}
    assert all(found.own == 100 and found.low > 0 for found in read.values())
    places = derangements(len(TEXTS), 1)[0]
    by_hand = rouge_scores([TEXTS[i] for i in places], TEXTS)["rougeL"]
    one = {found.name: found for found in dependence(TEXTS, TEXTS, shuffles=1)}["rougeL"]
    assert one.shuffled == pytest.approx(np.mean(by_hand), abs=1e-12) and one.low <= 100 - one.shuffled <= one.high
    same = dependence(["the animal sleeps"] * len(TEXTS), TEXTS)
    assert all(found.own == pytest.approx(found.shuffled, abs=1e-12) for found in same)  # ROUGE of equal texts, summed


def test_the_command(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    rows = [{"prediction": text, "reference": text} for text in TEXTS]
    (run / "predictions-val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main([str(run), "--shuffles", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("predictions-val.jsonl: 8 summaries, 8 different") and len(lines) == 6
    assert lines[5].split()[:2] == ["rougeLsum", "100.00"] and float(lines[5].split()[2]) < 90
    refused(capsys, "--shuffles 0", lambda: main([str(run), "--shuffles", "0"]), run)
    refused(capsys, "predictions-test.jsonl", lambda: main([str(tmp_path)]), run)
    (run / "predictions-test.jsonl").write_text('{"prediction": "a"}\n')
    refused(capsys, "line 1 is no row of predictions", lambda: main([str(run)]), run)
