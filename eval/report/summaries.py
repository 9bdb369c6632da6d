"""Tables of the report for runs that generate summaries: arms compared text by text, and what confidence is worth."""

import math
from functools import partial
from pathlib import Path

from eval import metrics
from eval.report.runs import Arm, Run, reference
from eval.report.tables import NOTES, Cell, Table, ends_under, label_cell, metric_table, p_text, section, table_of
from eval.stats import holm, paired
from eval.summaries import ROUGE, rouge_scores
from schedules.textlines import read_rows

Scores = dict[tuple, list[float | None]]  # (index, id) of a text -> its ROUGE, by name in ROUGE


def summary_blocks(arms: list[Arm], split: str, name: str) -> list[tuple]:
    """Blocks of the report on ``split``, which is called ``name``; none where nothing was generated. Raises ValueError
    naming a broken file of predictions."""
    blocks = section(f"Summaries compared by text, {name}", paired_table(arms, split), kind="h3")
    had = [arm for arm in arms if any(arm.measured(m, split) for m in metrics.SUMMARY_CONFIDENCE)]
    lead, interval = {"n|seeds": [len(arm.finished) for arm in had]}, partial(ends_under, split=split)
    note = NOTES["summary_confidence"]
    worth = metric_table(had, lead, metrics.SUMMARY_CONFIDENCE, split, interval=interval, note=note)
    return blocks + section(f"Confidence of summaries, {name}", worth, kind="h3")


def scores_of(run: Run, split: str) -> Scores:
    """ROUGE of each text; computed where the run did not write it, and {} where it generated nothing."""
    path = run.path / f"predictions-{split}.jsonl"
    if not path.is_file():
        return {}
    try:
        rows = [row for _, row in read_rows(path, nan=True)]
        keys = [(row["index"], row.get("id")) for row in rows]
        if all("rougeLsum" in row for row in rows):
            return {key: [row[name] for name in ROUGE] for key, row in zip(keys, rows, strict=True)}
        texts = [[row[name] for row in rows] for name in ("prediction", "reference")]
        found = rouge_scores(*texts, words=run.config.get("rouge_words") or "ascii")
        return dict(zip(keys, map(list, zip(*(found[name] for name in ROUGE), strict=True)), strict=True))
    except (AttributeError, KeyError, TypeError) as e:
        raise ValueError(f"{path} holds no summaries ({e}); remove it, or let the run write it again") from e


def paired_table(arms: list[Arm], split: str) -> Table | None:
    """Every arm minus CE over the texts that both have summarised, in the mean of the seeds that both finished."""
    known: dict[Path, Scores] = {}

    def scores(run: Run) -> Scores:
        if run.path not in known:
            known[run.path] = scores_of(run, split)
        return known[run.path]

    rows, tests = [], []
    for arm in arms:
        ce = reference(arm, arms, "ce")[0] if arm.values(f"{split}_rouge1") else None
        theirs = {} if ce in (None, arm) else {run.seed: run for run in ce.finished}
        pairs = [(scores(run), scores(theirs[run.seed])) for run in arm.finished if run.seed in theirs]
        pairs = [pair for pair in pairs if all(pair)]
        keys = set.intersection(*(set(side) for pair in pairs for side in pair)) if pairs else set()
        found = []
        for i in range(len(ROUGE)):
            values = [[(a[key][i], b[key][i]) for a, b in pairs] for key in sorted(keys)]
            whole = [v for v in values if not any(None in pair for pair in v)]
            sides = [[math.fsum(pair[side] for pair in v) / len(v) for v in whole] for side in (0, 1)]
            found.append(paired(*sides, resamples=1000) if len(whole) > 1 else None)
        if any(found):
            rows.append([label_cell(arm), ce.label, len(pairs), max(t.n for t in found if t)])
            tests.append(found)
    adjusted = iter(holm([t.p if t else math.nan for found in tests for t in found]))
    for row, found in zip(rows, tests, strict=True):
        for t, p in zip(found, adjusted, strict=False):
            under = t and f"[{t.boot_low:+.2f}, {t.boot_high:+.2f}], p {p_text(p, '= ')}"
            row.append(Cell(f"{t.mean:+.2f}", under) if t else "-")
    heads = [m for m in metrics.SUMMARIES if m.key in ROUGE]
    return table_of(["arm", "minus", "n|seeds", "texts", *heads], rows, 2, NOTES["paired_texts"])
