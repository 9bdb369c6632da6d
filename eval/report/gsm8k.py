"""Tables of the report for runs that answer GSM8K: pass@1 of every arm, and arms compared problem by problem."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

from eval.gsm8k import mcnemar_exact
from eval.report.build import Table, spread, table
from eval.report.columns import Cell, Column
from eval.report.runs import Arm, Run
from eval.stats import holm, paired

ANSWERS = (
    Column("pass_at_1_strict", "pass@1", "strict, %", "higher", 100, 2),
    Column("pass_at_1_flexible", "pass@1", "flexible, %", "higher", 100, 2),
    Column("pass_at_1_code", "pass@1", "programs, %", "higher", 100, 2),
    Column("invalid_programs", "invalid", "programs", "lower", 1, 0),
    Column("outputs_at_limit", "cut off", "% of answers", "lower", 100, 1),
    Column("eval_seconds", "evaluation", "s", "lower", 1, 1),
    Column("generated_tokens_per_second", "generation", "tokens/s", "higher", 1, 0),
    Column("divergences", "diverged", "times", "lower", 1, 0),
    Column("skipped_steps", "skipped", "steps", "lower", 1, 0),
)
NOTE = (
    "Greedy answers. Mean ± standard deviation over seeds; of one seed the 95 % bootstrap interval over problems. "
    "Strict and flexible are lm-evaluation-harness' extractions; programs are run, and an invalid one is wrong. "
    "What is called validation above is the part of train that was held out."
)
PAIRED_NOTE = (
    "Problem by problem, of the seeds that both finished, each arm by its own main rule: programs where it writes "
    "them, else strict. Interval: 95 % bootstrap over problems. Won and lost: problems that the arm has right more "
    "often than the other, and less often. p: of one seed McNemar's exact test; of several the paired t-test over "
    "problems of the means over seeds, which says nothing of other seeds. Holm-corrected over the rows."
)


def answer_blocks(arms: list[Arm]) -> list[tuple]:
    """Blocks of the report, none where no run has answered GSM8K. Raises ValueError naming a broken verdicts.jsonl."""
    done = [a for a in arms if any(a.values(c.key) for c in ANSWERS[:3])]
    if not done:
        return []
    blocks = [("h", "GSM8K, pass@1"), ("table", answer_table(done))]
    found = paired_table(done)
    return blocks + ([("h3", "Arms compared by problem"), ("table", found)] if found else [])


def answer_table(arms: list[Arm]) -> Table:
    columns = [c for c in ANSWERS if any(arm.values(c.key) for arm in arms)]
    rows = []
    for arm in arms:
        cells = [Cell(arm.label, colour=arm.colour), Cell(str(len(arm.finished)))]
        for column in columns:
            values = {seed: column.scale * v for seed, v in arm.values(column.key).items()}
            cell = spread(column, values, len(arm.finished))
            interval = arm.finished[0].summary.get(f"{column.key}_ci95") if len(values) == 1 else None
            if interval and None not in interval:  # of one problem there is none
                low, high = (column.format(column.scale * v) for v in interval)
                cell = cell._replace(sub=f"[{low}, {high}]")
            cells.append(cell)
        rows.append(cells)
    return table("arm, seeds", rows, columns=tuple(columns), note=NOTE)


def paired_table(arms: list[Arm]) -> Table | None:
    """Every arm minus the reference: CE under a cosine where there is one, else the first arm."""
    graded = [(arm, {run.seed: right(run) for run in arm.finished}) for arm in arms]
    graded = [(arm, by) for arm, by in graded if all(by.values())]
    reference = next((g for g in graded if g[0].loss == "ce" and g[0].config.get("schedule") == "cosine"), None)
    reference = reference or next(iter(graded), None)
    rows, tests = [], []
    for arm, by in graded:
        seeds = [s for s in by if reference[0] is not arm and s in reference[1]]
        ids = sorted({i for s in seeds for i in by[s]} & {i for s in seeds for i in reference[1][s]})
        if len(ids) < 2:
            continue
        mine, theirs = (
            [sum(side[s].get(i, False) for s in seeds) / len(seeds) for i in ids] for side in (by, reference[1])
        )
        found = paired([100 * v for v in mine], [100 * v for v in theirs], resamples=2000)
        only = [sum(a > b for a, b in zip(*pair, strict=True)) for pair in ((mine, theirs), (theirs, mine))]
        tests.append(mcnemar_exact(*only) if len(seeds) == 1 else found.p)
        words = [
            Cell(arm.label, colour=arm.colour),
            Cell(reference[0].label),
            Cell(str(len(seeds))),
            Cell(str(len(ids))),
        ]
        interval = f"[{found.boot_low:+.2f}, {found.boot_high:+.2f}]"
        rows.append([*words, Cell(f"{found.mean:+.2f}", interval), Cell(str(only[0])), Cell(str(only[1]))])
    if not rows:
        return None
    for row, p in zip(rows, holm(tests), strict=True):
        row.append(Cell("-" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"))
    head = "arm, minus, seeds, problems, difference in pp, won, lost, p"
    return table(head, rows, left=2, note=PAIRED_NOTE)


def right(run: Run) -> Mapping[str, bool]:
    """Whether each problem's greedy answer is right by the run's main rule; empty without a verdicts.jsonl."""
    path = Path(run.path) / "verdicts.jsonl"
    out = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n") if path.exists() else [], 1):
        if not line:
            continue
        try:
            row = json.loads(line)
            if not row.get("sample"):
                out[row["id"]] = bool(row["correct"]["code" if "code" in row["correct"] else "strict"])
        except (json.JSONDecodeError, AttributeError, KeyError, TypeError):
            raise ValueError(f"{path} line {number} is no verdict; expected id and correct by rule") from None
    return out
