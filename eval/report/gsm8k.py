"""Tables of the report for runs that answer GSM8K: pass@1 of every arm, and arms compared problem by problem."""

import math
import operator
from functools import partial

import numpy as np

from eval import metrics
from eval.answer_calibration import KINDS, Judged, read_confidences
from eval.metrics import Metric
from eval.report.runs import Arm, Run
from eval.report.tables import NOTES, Cell, Table, label_cell, metric_table, p_text, said, section, table_of
from eval.stats import holm, mcnemar_exact, paired, proportion_interval, rate_difference_interval
from eval.verdicts import read_verdicts


def gsm8k_blocks(arms: list[Arm]) -> list[tuple]:
    """Blocks of the report, none where no run has answered GSM8K. Raises ValueError naming a broken verdicts.jsonl."""
    rates = [m.key for m in metrics.ANSWERS if m.name == "pass@1"]
    done = [arm for arm in arms if any(arm.values(key) for key in rates)]
    blocks = section("GSM8K, pass@1", answer_table(done))
    return blocks + section("Arms compared by problem", paired_table(done), kind="h3") + confidence_blocks(done)


def confidence_blocks(arms: list[Arm]) -> list[tuple]:
    """Tables of what each kind of confidence is worth, after training and, where it was measured, before."""
    blocks = []
    for kind, columns in metrics.ANSWER_CONFIDENCE.items():
        for when, split in (("after training", ""), ("before training", "before")):
            had = [arm for arm in arms if any(arm.measured(m, split) for m in columns)]
            lead = {"n|seeds": [len(arm.finished) for arm in had]}
            lead["rule"] = [", ".join(said([arm], f"{split}_answers_rule".lstrip("_"))) for arm in had]
            table = metric_table(had, lead, columns, split, interval=partial(interval_of, split=split))
            blocks += section(f"Confidence of answers: {kind}, {when}", table, kind="h3")
    return [*blocks, ("p", NOTES["confidence"])] if blocks else []


def interval_of(arm: Arm, metric: Metric, split: str) -> str:
    """The interval of an arm with one seed; of one problem there is none.

    That of pass@1 is Wilson's, of what the run counted: older runs wrote a bootstrap's, which is [0, 0] where no answer
    is right. Where they do not say of how many problems, theirs is shown if it has a width."""
    run, key = arm.finished[0], f"{split}_{metric.key}".lstrip("_")
    ends, rate, problems = run.summary.get(f"{key}_ci95") or [None], run.number(key), run.number("eval_problems")
    if metric.name == "pass@1" and rate is not None:
        ends = [None] if len({*ends}) == 1 else ends
        ends = proportion_interval(round(rate * problems), int(problems)) if problems and problems > 1 else ends
    return "" if None in ends else "[{}, {}]".format(*(metric.format(metric.scale * v) for v in ends))


def confidences(arms: list[Arm], folder: str = "") -> list[tuple[Arm, dict[str, Judged]]]:
    """Each arm with its answers by kind of confidence, of all finished runs together; in ``folder`` "before" those from
    before training."""
    found = []
    for arm in arms:
        runs = [read_confidences(run.path / folder / "verdicts.jsonl") for run in arm.finished]
        pooled = {kind: [by[kind] for by in runs if kind in by] for kind in KINDS}
        found.append((arm, {k: Judged(*map(np.concatenate, zip(*of, strict=True))) for k, of in pooled.items() if of}))
    return [(arm, by) for arm, by in found if by]


def answer_table(arms: list[Arm]) -> Table | None:
    lead = {"n|seeds": [len(arm.finished) for arm in arms]}
    interval, columns = partial(interval_of, split=""), metrics.shown(metrics.ANSWERS, "table")
    return metric_table(arms, lead, columns, "", interval=interval, note=NOTES["answers"])


def paired_table(arms: list[Arm]) -> Table | None:
    """Every arm minus the base: CE under a cosine where there is one, else the first arm."""
    graded = [(arm, {run.seed: right(run) for run in arm.finished}) for arm in arms]
    graded = [(arm, by) for arm, by in graded if all(by.values())]
    if not graded:
        return None
    is_base = [arm.loss == "ce" and arm.config.get("schedule") == "cosine" for arm, _ in graded]
    base, base_by = graded[is_base.index(True) if any(is_base) else 0]
    rows, tests = [], []
    for arm, by in graded:
        seeds = [seed for seed in by if arm is not base and seed in base_by]
        ids = sorted({i for s in seeds for i in by[s]} & {i for s in seeds for i in base_by[s]})
        if len(ids) < 2:
            continue
        mine, theirs = ([sum(side[s].get(i, False) for s in seeds) / len(seeds) for i in ids] for side in (by, base_by))
        found, (low, high) = paired(mine, theirs, resamples=1), rate_difference_interval(mine, theirs)
        won, lost = sum(map(operator.gt, mine, theirs)), sum(map(operator.lt, mine, theirs))
        tests.append(mcnemar_exact(won, lost) if len(seeds) == 1 else found.p)
        difference = Cell(f"{100 * found.mean:+.2f}", f"[{100 * low:+.2f}, {100 * high:+.2f}]")
        rows.append([label_cell(arm), base.label, len(seeds), len(ids), difference, won, lost])
    for row, p in zip(rows, holm(tests), strict=True):
        row.append("-" if math.isnan(p) else p_text(p))
    heads = "arm", "minus", "n|seeds", "problems", "difference in pp", "won", "lost", "p"
    return table_of(heads, rows, 2, NOTES["paired"])


def right(run: Run) -> dict[str, bool]:
    """Whether each problem's greedy answer is right by the run's main rule; empty without a verdicts.jsonl."""
    path = run.path / "verdicts.jsonl"
    found = read_verdicts(path) if path.exists() else {}
    return found.get("code") or found.get("strict") or {}
