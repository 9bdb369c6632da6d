"""The report's tables. A table is rows of cells; its columns of metrics are those that eval.metrics shows there."""

import dataclasses
import json
import math
from functools import partial
from pathlib import Path
from typing import NamedTuple

from eval import metrics
from eval.heldout import BANDS
from eval.metrics import Metric
from eval.report.claims import Verdict
from eval.report.runs import Arm, differing, reference, setting_differences, system_differences
from eval.stats import ece_interval_of_bins, holm, interquartile_mean, paired, stratified_bootstrap, summarize
from schedules.textlines import read_toml

_TEXTS = read_toml(Path(__file__).with_name("notes.toml"))
NOTES = {name: text.replace("\n", " ") for name, text in _TEXTS.items()}  # what stands under tables and figures

ARROWS = {"lower": "\u00a0↓", "higher": "\u00a0↑", "": ""}
TONES = {"met": "good", "not met": "bad", "not powered": "unsure", "yes": "good", "no": "bad"}


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
    foot: int = 0  # rows at the end that are of all the others, and stay there


def table_of(heads, rows, left: int = 1, note: str = "", foot: int = 0) -> Table | None:
    """A table of ``heads``, each a text, "text|unit" or a metric, and rows of cells or texts; None without rows."""
    heads = (f"{h.name}|{h.unit}{ARROWS[h.better]}" if isinstance(h, Metric) else h for h in heads)
    rows = [[c if isinstance(c, Cell) else Cell(str(c)) for c in row] for row in rows]
    return Table([Cell(*map(str.strip, head.split("|"))) for head in heads], rows, left, note, foot) if rows else None


def section(heading: str, *parts, kind: str = "h") -> list[tuple]:
    """Blocks of the page: a heading over ``parts``, blocks and tables, or to be unfolded (``kind`` "fold").

    A part may be None or empty; nothing where all are."""
    blocks = [("table", part) if isinstance(part, Table) else part for part in parts if part]
    if kind == "fold" and blocks:
        return [("fold", heading, blocks)]
    return [(kind, heading), *blocks] if blocks else []


def label_cell(arm: Arm) -> Cell:
    return Cell(arm.label, colour=arm.colour)


def toned(text: str, bold: bool = False) -> Cell:
    """An answer or a verdict; only those of TONES are coloured, and may be bold."""
    tone = TONES.get(text, "")
    return Cell(text, bold=bold and bool(tone), tone=tone)


def mean_cell(metric: Metric, values: dict, runs: int) -> Cell:
    """Mean and, of several seeds, ± sd; says so where fewer than the arm's ``runs`` have a value."""
    if not values:
        return Cell("-")
    s = summarize(values.values())
    parts = [f"± {metric.format(s.sd)}"] * (s.n > 1) + [f"n = {s.n}"] * (s.n < runs)
    return Cell(metric.format(s.mean), ", ".join(parts))


def best_row(metric: Metric, values: list[dict]) -> int | None:
    """The row whose mean is best by more than the two standard deviations of it and of every other, or None."""
    found = [(i, summarize(v.values())) for i, v in enumerate(values) if v]
    if len(found) < 2 or not metric.better:
        return None
    sign = 1 if metric.better == "lower" else -1
    (i, first), *others = sorted(found, key=lambda s: sign * s[1].mean)
    # The sd of one seed is nan: then nothing is clear.
    clear = all(sign * (other.mean - first.mean) > first.sd + other.sd for _, other in others)
    return i if clear else None


def metric_table(arms: list[Arm], lead: dict, columns, split: str, *, bold=False, interval=None, note=""):
    """A row an arm: its label, its cells of ``lead`` (heading -> texts), and a metric a column where any arm has it.

    ``bold`` marks the best of a column. ``interval`` takes (arm, metric) and says what stands under a value of one
    seed, or ""."""
    columns = [m for m in columns if any(arm.measured(m, split) for arm in arms)]
    body = [[label_cell(arm), *texts] for arm, *texts in zip(arms, *lead.values(), strict=True)]
    for metric in columns:
        values = [arm.measured(metric, split) for arm in arms]
        best = best_row(metric, values) if bold else None
        for i, (arm, v) in enumerate(zip(arms, values, strict=True)):
            cell = mean_cell(metric, v, len(arm.finished))._replace(bold=i == best)
            under = interval(arm, metric) if interval and len(v) == 1 else ""
            body[i].append(cell._replace(sub=under or cell.sub))
    return table_of(["arm", *lead, *columns], body, note=note)


def final_rows(arms: list[Arm]) -> list[Arm]:
    """Arms that have finished; after a CE arm what temperature makes of it."""
    rows = []
    for arm in (arm for arm in arms if arm.finished):
        rows.append(arm)
        if arm.loss == "ce" and arm.values("val_nll_t"):
            rows.append(dataclasses.replace(arm, label=f"{arm.label} + temperature", tempered=True))
    return rows


def ece_under(arm: Arm, metric: Metric, split: str) -> str:
    """The interval of an ECE of one seed: the run's own, over blocks, else one over tokens from its bins."""
    if metric.key != "ece10":
        return ""
    run, found, how = arm.finished[0], None, ""
    ends = run.summary.get(f"{split}_ece10{'_t' * arm.tempered}_ci95") or [None]
    if None in ends and (found := run.calibration.get((split, "scaled" if arm.tempered else "raw"))):
        ends, how = ece_interval_of_bins(*found.bins().values(), resamples=500), " by token"
    return "" if None in ends else "[{}, {}]".format(*(metric.format(metric.scale * v) for v in ends)) + how


def final_table(arms: list[Arm], split: str) -> Table | None:
    """A row an arm. Nothing is bold where settings differ, because then no arm is better."""
    rows, columns = final_rows(arms), metrics.shown(metrics.TOKENS + metrics.TEMPERED, "table")
    if not any(row.measured(m, split) for row in rows for m in columns if m.key != "temperature"):
        return None
    lead, note = {"n|seeds": [len(row.finished) for row in rows]}, NOTES["final"] if split == "val" else ""
    bold, interval = not setting_differences(*rows), partial(ece_under, split=split)
    return metric_table(rows, lead, columns, split, bold=bold, interval=interval, note=note)


def band_table(arms: list[Arm], split: str) -> Table | None:
    """Rows of each arm by how often the training text has the target; None where no run says so."""
    rows, columns = [], metrics.shown(metrics.TOKENS, "band")
    for arm in final_rows(arms):
        for band in (band for band in BANDS if arm.values(tokens := f"{split}_{band}_tokens")):
            about = next(run.summary["bands"][band] for run in arm.finished if run.number(tokens) is not None)
            text = ["{:,} to {:,}".format(*about["times"]), f"{about['types']:,}", f"{arm.mean(tokens):,.0f}"]
            found = (mean_cell(m, arm.measured(m, f"{split}_{band}"), len(arm.finished)) for m in columns)
            rows.append([label_cell(arm), band, *text, *found])
    heads = "arm", "targets", "times|in the training text", "different", "tokens|of the set", *columns
    return table_of(heads, rows, 2, NOTES["bands"] if split == "val" else "")


def ends_under(arm: Arm, metric: Metric, split: str) -> str:
    """The interval under ``metric``_low and _high of an arm with one seed, "" without."""
    ends = [arm.values(f"{split}_{metric.key}_{end}") for end in ("low", "high")]
    return " to ".join(metric.format(metric.scale * next(iter(end.values()))) for end in ends) if all(ends) else ""


def summary_table(arms: list[Arm], split: str) -> Table | None:
    """What was generated for ``split``, a row an arm. None where nothing was.

    Of one seed a ROUGE has the bootstrap interval over texts that the run computed, of several ± sd over seeds."""
    arms, interval = [arm for arm in arms if arm.values(f"{split}_rouge1")], partial(ends_under, split=split)
    lead = {"texts": [f"{arm.mean(f'{split}_examples'):,.0f}" for arm in arms]}
    columns, bold = metrics.shown(metrics.SUMMARIES, "table"), not setting_differences(*arms)
    note = NOTES["summary"] + "".join(f" BERTScore: {name}." for name in said(arms, f"{split}_bertscore_hash"))
    return metric_table(arms, lead, columns, split, bold=bold, interval=interval, note=note)


def said(arms: list[Arm], key: str) -> list[str]:
    """What the summaries hold under ``key``, each once."""
    return sorted({str(v) for arm in arms for run in arm.finished if (v := run.summary.get(key)) is not None})


def p_text(p: float, equals: str = "") -> str:
    return "< 0.001" if p < 0.001 else f"{equals}{p:.3f}"


def shared(mine: dict, theirs: dict) -> tuple[list, list]:
    """The values of both over the seeds that both have."""
    seeds = [s for s in mine if s in theirs]
    return [mine[s] for s in seeds], [theirs[s] for s in seeds]


def delta_table(arms: list[Arm]) -> Table | None:
    """Differences from CE over shared seeds, with p by paired t-test, Holm-corrected over all of the table."""
    always = metrics.shown(metrics.TOKENS + metrics.TEMPERED, "delta")
    columns = always + metrics.shown(metrics.SUMMARIES, "delta")
    body, tests = [], []
    for row in final_rows(arms):
        ce = reference(row, arms, "ce")[0]
        if not ce or ce is row:
            continue
        sides = {m: shared(row.measured(m), ce.measured(m)) for m in columns}
        if found := {m: paired(*pair) for m, pair in sides.items() if len(pair[0]) > 1}:
            body.append([label_cell(row), ce.label, max(t.n for t in found.values())])
            tests.append(found)
    columns = [m for m in columns if m in always or any(m in found for found in tests)]
    adjusted = iter(holm([found[m].p if m in found else math.nan for found in tests for m in columns]))
    for cells, found in zip(body, tests, strict=True):
        for metric in columns:
            t, p = found.get(metric), next(adjusted)
            size = t and f"{'+' if t.mean >= 0 else '-'}{metric.format(abs(t.mean))} ± {metric.format(t.sd)}"
            cells.append(Cell(size, f"p {p_text(p, '= ')}") if t else "-")
    return table_of(["arm", "minus", "n|seeds", *columns], body, 2, NOTES["delta"])


def settings_table(arms: list[Arm]) -> Table | None:
    """Of arms that ran in two settings or more, each beside CE there: the interquartile mean over settings and seeds of
    the change from CE in per cent, with its stratified bootstrap interval."""
    columns, groups, rows = metrics.shown(metrics.TOKENS, "delta"), {}, []
    for arm in (arm for arm in arms if arm.finished and arm.loss != "ce"):
        ce = reference(arm, arms, "ce")[0]
        knobs = {k: v for k, v in arm.config.items() if arm.roles.get(k) != "setting"}
        if ce:
            groups.setdefault(json.dumps(knobs, sort_keys=True), []).append((arm, ce))
    for found in (found for found in groups.values() if len(found) > 1):
        first = found[0][0]
        peers = [arm for arm in arms if arm.loss == first.loss]
        label = first.label_of(first.loss, [k for k in differing(peers) if first.roles.get(k) != "setting"])
        row = [Cell(label, colour=first.colour), len(found)]
        for metric in columns:
            sides = [zip(*shared(arm.measured(metric), ce.measured(metric)), strict=True) for arm, ce in found]
            changes = [[100 * (x / y - 1) for x, y in side if y] for side in sides]
            values = [v for seeds in changes for v in seeds]
            low, high = stratified_bootstrap(changes) if all(changes) else (math.nan, math.nan)
            interval = "" if math.isnan(low) else f"[{low:+.1f}, {high:+.1f}]"
            row.append(Cell(f"{interquartile_mean(values):+.1f}", interval) if values else "-")
        rows.append(row)
    heads = (f"{m.name}|{m.unit.split(',')[0]}, change in %{ARROWS[m.better]}" for m in columns)
    return table_of(["arm", "settings", *heads], rows, note=NOTES["settings"])


def cost_table(arms: list[Arm]) -> Table | None:
    """Speed, memory and energy, with the ratio to CE where both ran under the same conditions."""
    arms, columns = [arm for arm in arms if arm.finished], metrics.shown(metrics.COST, "table")

    def cost(arm: Arm, ce: Arm | None, metric: Metric) -> Cell:
        cell = mean_cell(metric, arm.measured(metric, ""), len(arm.finished))
        base = ce.mean(metric.key) if ce and ce.values(metric.key) else 0
        ratio = f"{arm.mean(metric.key) / base:.3f} × CE" if base and cell.text != "-" else ""
        return Cell(f"{cell.text} {cell.sub}".strip(), ratio)

    body = []
    for arm in arms:
        ce = reference(arm, arms, "ce")[0]
        ce = None if ce is arm or not ce or system_differences(arm, ce) else ce
        body.append([label_cell(arm), *(cost(arm, ce, metric) for metric in columns)])
    kinds = ", ".join(said(arms, "peak_memory_of"))
    return table_of(
        ["arm", *columns], body, note=NOTES["cost"] + (f" Peak memory is that of: {kinds}." if kinds else "")
    )


def verdict_table(found: list[Verdict]) -> Table | None:
    heads = "#", "criterion", "definition", "against", "value", "threshold", "holds here", "verdict"
    rows = []
    for v in found:
        tested = [f"n = {v.count}"] * bool(v.values) + [f"p {p_text(v.p, '= ')}"] * (not math.isnan(v.p))
        value, limit = Cell(v.value, ", ".join(tested)), Cell(v.threshold, v.power[0])
        verdict = toned(v.verdict, bold=True)._replace(sub=v.power[1])
        rows.append([*v.criterion[:3], v.against, value, limit, toned(v.holds), verdict])
    return table_of(heads, rows, left=8)
