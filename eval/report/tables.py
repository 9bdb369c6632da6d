"""The report's tables. A table is rows of cells; its columns of metrics are those that eval.metrics shows there."""

import math
from typing import NamedTuple

from eval import metrics
from eval.metrics import Metric
from eval.report.claims import Verdict
from eval.report.runs import Arm, reference, setting_differences, system_differences
from eval.stats import holm, paired, summarize

ARROWS = {"lower": "\u00a0↓", "higher": "\u00a0↑", "": ""}
TONES = {"met": "good", "not met": "bad", "not powered": "unsure", "yes": "good", "no": "bad"}
FINAL_NOTE = (
    "Mean ± standard deviation over seeds. ↓ lower is better, ↑ higher is better. Bold: the best value, where it "
    "is further from every other than their two standard deviations together, which takes two seeds of each arm. "
    "T is fitted on validation."
)
SUMMARY_NOTE = (
    "Of the generated summaries. ROUGE: rouge-score with stemming, Lsum on newline-split sentences; R1, R2 and RL as "
    "files2rouge has them, BART's published convention. Under a ROUGE of one seed: its 95 % bootstrap interval."
)
DELTA_NOTE = (
    "Mean ± standard deviation of the differences seed by seed. p: two-sided paired t-test, Holm-corrected over "
    "the arms within each column (not over columns)."
)
COST_NOTE = "Training only, without evaluation and checkpoints. A dash: not measured on this device."


class Cell(NamedTuple):
    text: str
    sub: str = ""  # smaller, after or under the text
    bold: bool = False
    tone: str = ""  # "good", "bad" or "unsure"
    colour: str = ""  # of the arm, as in the figures


class Table(NamedTuple):
    head: list[Cell]
    rows: list[list[Cell]]
    left: int = 1  # columns of words, the others hold numbers
    note: str = ""


class Row(NamedTuple):
    """An arm in a table, or what temperature makes of it (``after``)."""

    arm: Arm
    after: bool = False

    @property
    def label(self) -> str:
        return f"{self.arm.label} + temperature" if self.after else self.arm.label

    def values(self, metric: Metric, split: str = "val") -> dict:
        """seed -> value in the metric's unit. ``split``: val, test or ood; "" for a number that is of no set."""
        key = f"{split}_{metric.key}" if split and metric.key != "temperature" else metric.key
        if self.after and metric.key != "temperature":
            if key.endswith("_t"):
                return {}
            key += "_t"
        return {seed: metric.scale * v for seed, v in self.arm.values(key).items()}


def heads(*names: str, columns: tuple[Metric, ...] = ()) -> list[Cell]:
    """Headings: of ``names``, each a name or "name|unit", then of metrics."""
    cells = [Cell(*name.split("|")) for name in names]
    return cells + [Cell(m.name, f"{m.unit}{ARROWS[m.better]}".strip()) for m in columns]


def label_cell(row: Arm | Row) -> Cell:
    return Cell(row.label, colour=row.arm.colour if isinstance(row, Row) else row.colour)


def mean_cell(metric: Metric, values: dict, runs: int) -> Cell:
    """Mean and, of several seeds, ± sd; says so where fewer than the arm's ``runs`` have a value."""
    if not values:
        return Cell("-")
    s = summarize(list(values.values()))
    parts = [f"± {metric.format(s.sd)}"] * (s.n > 1) + [f"n = {s.n}"] * (s.n < runs)
    return Cell(metric.format(s.mean), ", ".join(parts))


def best_row(metric: Metric, values: list[dict]) -> int | None:
    """The row whose mean is best by more than the two standard deviations of it and of every other, or None."""
    found = [(i, summarize(list(v.values()))) for i, v in enumerate(values) if v]
    if len(found) < 2 or not metric.better:
        return None
    sign = 1 if metric.better == "lower" else -1
    (i, first), *others = sorted(found, key=lambda s: sign * s[1].mean)
    # The sd of one seed is nan: then nothing is clear.
    clear = all(sign * (other.mean - first.mean) > first.sd + other.sd for _, other in others)
    return i if clear else None


def metric_table(rows: list[Row], lead: dict, columns, split: str, *, bold=False, interval=None, note="") -> Table:
    """A row a `Row`: its label, its cells of ``lead`` (heading -> texts), and a metric a column where any row has it.

    ``bold`` marks the best of a column. ``interval`` takes (arm, metric) and says what stands under a value of one
    seed, or "".
    """
    columns = tuple(m for m in columns if any(row.values(m, split) for row in rows))
    body = [[label_cell(row), *map(Cell, texts)] for row, *texts in zip(rows, *lead.values(), strict=True)]
    for metric in columns:
        values = [row.values(metric, split) for row in rows]
        best = best_row(metric, values) if bold else None
        for i, (row, v) in enumerate(zip(rows, values, strict=True)):
            cell = mean_cell(metric, v, len(row.arm.finished))._replace(bold=i == best)
            under = interval(row.arm, metric) if interval and len(v) == 1 else ""
            body[i].append(cell._replace(sub=under) if under else cell)
    return Table(heads("arm", *lead, columns=columns), body, note=note)


def final_rows(arms: list[Arm]) -> list[Row]:
    """Arms that have finished; after a CE arm what temperature makes of it."""
    rows = []
    for arm in arms:
        rows += [Row(arm)] * bool(arm.finished)
        rows += [Row(arm, after=True)] * (arm.loss == "ce" and bool(arm.values("val_nll_t")))
    return rows


def final_table(arms: list[Arm], split: str) -> Table | None:
    """A row an arm. Nothing is bold where settings differ, because then no arm is better."""
    rows = final_rows(arms)
    columns = metrics.shown(metrics.TOKENS, "table") + metrics.shown(metrics.TEMPERED, "table")
    if not any(row.values(m, split) for row in rows for m in columns if m.key != "temperature"):
        return None
    seeds = [str(len(row.arm.finished)) for row in rows]
    bold = not setting_differences(*(row.arm for row in rows))
    return metric_table(rows, {"seeds": seeds}, columns, split, bold=bold, note=FINAL_NOTE if split == "val" else "")


def summary_table(arms: list[Arm], split: str) -> Table | None:
    """What was generated for ``split``, a row an arm. None where nothing was.

    Of one seed a ROUGE has the bootstrap interval over texts that the run computed, of several ± sd over seeds.
    """
    arms = [arm for arm in arms if arm.values(f"{split}_rouge1")]
    if not arms:
        return None

    def interval(arm: Arm, metric: Metric) -> str:
        ends = [arm.values(f"{split}_{metric.key}_{end}") for end in ("low", "high")]
        return " to ".join(metric.format(metric.scale * next(iter(end.values()))) for end in ends) if all(ends) else ""

    hashes = {str(run.summary.get(f"{split}_bertscore_hash")) for arm in arms for run in arm.finished} - {"None"}
    return metric_table(
        [Row(arm) for arm in arms],
        {"texts": [f"{arm.mean(f'{split}_examples'):,.0f}" for arm in arms]},
        metrics.shown(metrics.SUMMARIES, "table"),
        split,
        bold=not setting_differences(*arms),
        interval=interval,
        note=SUMMARY_NOTE + "".join(f" BERTScore: {name}." for name in sorted(hashes)),
    )


def p_text(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def delta_table(arms: list[Arm]) -> Table | None:
    """Differences from CE over shared seeds, with p by paired t-test, Holm-corrected over the arms of a column."""
    always = metrics.shown(metrics.TOKENS, "delta") + metrics.shown(metrics.TEMPERED, "delta")
    columns = always + metrics.shown(metrics.SUMMARIES, "delta")
    body, tests = [], []
    for row in final_rows(arms):
        ce = reference(row.arm, arms, "ce")[0]
        if not ce or (ce is row.arm and not row.after):
            continue
        line = []
        for metric in columns:
            mine, theirs = row.values(metric), Row(ce).values(metric)
            seeds = [s for s in mine if s in theirs]
            line.append(paired([mine[s] for s in seeds], [theirs[s] for s in seeds]) if len(seeds) > 1 else None)
        if any(line):
            n = max(t.n for t in line if t)
            body.append([label_cell(row), Cell(ce.label), Cell(str(n))])
            tests.append(line)
    if not body:
        return None
    kept = []
    for metric, column in zip(columns, zip(*tests, strict=True), strict=True):
        if metric not in always and not any(column):
            continue
        kept.append(metric)
        corrected = holm([t.p if t else math.nan for t in column])
        for cells, t, p in zip(body, column, corrected, strict=True):
            size = f"{'+' if t.mean >= 0 else '-'}{metric.format(abs(t.mean))} ± {metric.format(t.sd)}" if t else "-"
            cells.append(Cell(size, "" if not t else f"p {p_text(p)}" if p < 0.001 else f"p = {p_text(p)}"))
    return Table(heads("arm", "minus", "pairs", columns=kept), body, 2, DELTA_NOTE)


def cost_table(arms: list[Arm]) -> Table:
    """Speed, memory and energy, with the ratio to CE where both ran under the same conditions."""
    columns = metrics.shown(metrics.COST, "table")
    body = []
    for arm in (a for a in arms if a.finished):
        ce = reference(arm, arms, "ce")[0]
        ce = None if ce is arm or not ce or system_differences(arm, ce) else ce
        cells = [label_cell(arm)]
        for metric in columns:
            cell = mean_cell(metric, Row(arm).values(metric, ""), len(arm.finished))
            base = ce.mean(metric.key) if ce and ce.values(metric.key) else 0
            ratio = f"{arm.mean(metric.key) / base:.3f} × CE" if base and cell.text != "-" else ""
            cells.append(Cell(f"{cell.text} {cell.sub}".strip(), ratio))
        body.append(cells)
    kinds = {str(run.summary.get("peak_memory_of")) for arm in arms for run in arm.finished} - {"None"}
    note = COST_NOTE + (f" Peak memory is that of: {', '.join(sorted(kinds))}." if kinds else "")
    return Table(heads("arm", columns=columns), body, note=note)


def verdict_table(found: list[Verdict]) -> Table:
    body = []
    for v in found:
        words = (str(v.criterion.number), v.criterion.name, v.criterion.definition, v.against)
        value = Cell(v.value, f"n = {v.count}" if v.values else "")
        holds, state = TONES.get(v.holds, ""), TONES.get(v.verdict, "")
        body.append([*map(Cell, words), value, Cell(v.threshold), Cell(v.holds, tone=holds)])
        body[-1].append(Cell(v.verdict, bold=bool(state), tone=state))
    names = "#", "criterion", "definition", "against", "value", "threshold", "holds here", "verdict"
    return Table(heads(*names), body, left=8)
