"""Arms that summarise are compared text by text, over the seeds that both have."""

import json

import numpy as np
import pytest
import scipy.stats
from invented_runs import SUMMARY, arms_of, row, write_run

from eval.report import build as rp
from eval.report.summaries import paired_table, summary_blocks
from eval.stats import bootstrap_interval
from eval.summaries import ROUGE, rouge_scores

REFERENCE = "the cat sat on the mat"
TEXTS = ("the cat sat on the mat", "the cat sat", "a dog ran", "on the mat the cat sat", "")


def run(folder, loss, seed, texts, known=None, **summary):
    """A run that wrote ``texts``; ``known``: their ROUGE, where it wrote that too."""
    write_run(folder, config={"loss": loss, "seed": seed}, summary=SUMMARY | summary)
    rows = [{"index": i, "id": f"a{i}", "prediction": t, "reference": REFERENCE} for i, t in enumerate(texts)]
    rows = [r | (dict.fromkeys(ROUGE, known[i]) if known else {}) for i, r in enumerate(rows)]
    (folder / "predictions-val.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def test_arms_are_paired_by_text_in_the_mean_of_their_seeds(tmp_path):
    """Scores that the runs wrote, by hand: dpsm has 10, 20, 60, 30 and ce 10, 10, 20, 20 in the mean of two seeds.
    Texts that one side lacks, or that were not measured, are left out."""
    folders = [
        run(tmp_path / "c1", "ce", 1, TEXTS, [0, 10, 20, 30, None]),
        run(tmp_path / "c2", "ce", 2, TEXTS, [20, 10, 20, 10, 50]),
        run(tmp_path / "c3", "ce", 3, TEXTS, [99] * 5),  # a seed that dpsm lacks
        run(tmp_path / "d1", "dpsm", 1, TEXTS, [10, 20, 60, 30, 5]),
        run(tmp_path / "d2", "dpsm", 2, (*TEXTS, "more"), [10, 20, 60, 30, 5, 70]),
    ]
    line = row(paired_table(arms_of(*folders), "val"), "dpsm")
    deltas = [0.0, 10.0, 40.0, 10.0]
    low, high = bootstrap_interval(deltas, resamples=1000)
    p = min(1, 4 * scipy.stats.ttest_1samp(deltas, 0).pvalue)  # four columns
    assert (line["minus"].text, line["n seeds"].text, line["texts"].text) == ("ce", "2", "4")
    assert line["ROUGE-1 F1, % ↑"][:2] == ("+15.00", f"[{low:+.2f}, {high:+.2f}], p = {p:.3f}")


def test_rouge_is_computed_where_a_run_did_not_write_it(tmp_path):
    ce, dpsm = TEXTS[::-1], TEXTS
    arms = arms_of(run(tmp_path / "c", "ce", 1, ce), run(tmp_path / "d", "dpsm", 1, dpsm))
    line = row(paired_table(arms, "val"), "dpsm")
    mine, theirs = (rouge_scores(texts, [REFERENCE] * 5) for texts in (dpsm, ce))
    for name, head in (("rouge2", "ROUGE-2 F1, % ↑"), ("rougeLsum", "ROUGE-Lsum F1, % ↑")):
        assert line[head].text == f"{np.mean(mine[name]) - np.mean(theirs[name]):+.2f}"
    (tmp_path / "c" / "predictions-val.jsonl").write_text('{"index": 0, "id": "a0"}\n')
    with pytest.raises(ValueError, match="predictions-val.jsonl holds no summaries"):
        paired_table(arms, "val")


def test_the_page_shows_both_tables_where_there_is_something_to_show(tmp_path):
    worth = {"val_spearman_token": 0.31, "val_spearman_token_low": 0.2, "val_spearman_token_high": 0.4}
    folders = [run(tmp_path / "c", "ce", 1, TEXTS), run(tmp_path / "d", "dpsm", 1, TEXTS[::-1], **worth)]
    report = rp.build(folders)
    heads = [b[1] for b in report.blocks if b[0] == "h3"]
    assert "Summaries compared by text, validation" in heads and "Confidence of summaries, validation" in heads
    [_, (_, table)] = summary_blocks(report.arms, "val", "v")[2:]
    assert [c.text for c in table.rows[0][:2]] == ["dpsm", "1"] and len(table.rows) == 1
    assert row(table, "dpsm")["Spearman log p a token ↑"][:2] == ("0.310", "0.200 to 0.400")
    assert summary_blocks(arms_of(write_run(tmp_path / "x", summary={})), "val", "v") == []
