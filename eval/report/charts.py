"""What the report's charts show, said once: page.js draws it to be read by hovering, plots.py as PNG and SVG.

A chart is lines of numbers and two axes. An arm is `eval.report.runs.Arm`; a line of an arm has its label and colour.
"""

import statistics
from typing import NamedTuple

from eval import metrics
from eval.answer_calibration import reliability as bins_reliability
from eval.answer_calibration import risk_coverage
from eval.heldout import BANDS
from eval.report.runs import Arm, Run, finite
from kernels import Calibration
from schedules.style import FAINT

MOST_POINTS = 300  # of a line; of more they are every n-th, and the last
TICKS = 5  # of a logarithmic axis, or more
QUALITY = 0.95  # of CE's final quality: perplexity divided by this is marked, as criterion 4 of DPSM times it


class Line(NamedTuple):
    """``low``, ``high``: a band round ``y``, or (). ``notes``: a text a point, or ()."""

    label: str
    colour: str
    x: list[float]
    y: list[float]
    low: list[float] = ()
    high: list[float] = ()
    dash: object = "-"  # a style of matplotlib's; on the page solid or dashed
    width: float = 1.7
    dots: bool = False
    joined: bool = True  # False: dots alone
    notes: list[str] = ()


class Chart(NamedTuple):
    title: str
    x: str  # label of the axis
    y: str
    lines: list[Line]
    log: str = ""  # the letters of the logarithmic axes
    view: tuple[float, float] | None = None  # of y, where it is not all of it
    marks: list[tuple[float, str]] = ()  # y, label


def every_nth(values: list, most: int) -> list:
    """At most ``most`` of the values, evenly, and the last one; done twice it is as done once."""
    n = -(-(len(values) - 1) // most)
    return [*values[:-1:n], *values[-1:]] if n > 1 else values


def thinned(line: Line, most: int = MOST_POINTS) -> Line:
    """The line with at most ``most`` points and the last one."""
    fields = ("x", "y", "low", "high", "notes")
    return line._replace(**{name: every_nth(getattr(line, name), most) for name in fields})


def log_ticks(low: float, high: float) -> list[float]:
    """Ticks of a logarithmic axis between two positive ends: `TICKS` or more, of the roundest numbers that give so
    many, so that no part of the axis goes without one."""
    decades = range(-20, 21)
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)):
        found = [m * 10.0**k for k in decades for m in steps if low <= m * 10.0**k <= high]
        if len(found) >= TICKS:
            return found
    step = next(m * 10.0**k for k in decades for m in (1, 2, 5) if (high - low) / (m * 10.0**k) <= 2 * TICKS)
    return [step * k for k in range(int(low / step), int(high / step) + 1) if low <= step * k <= high]


def points(run: Run, kind: str, x: str, y: str, most: int = MOST_POINTS) -> list[tuple[int, float, float]]:
    """(step, x, y) of the rows of ``kind`` in which both are finite numbers; of more than ``most`` rows every n-th,
    and the last."""
    rows = getattr(run, kind)
    rows = ((row.get("step"), row.get(x), row.get(y)) for row in every_nth(rows, most))
    return [row for row in rows if None not in map(finite, row)]


def band(runs: list[Run], kind: str, x: str, y: str) -> tuple[list, list, list, list]:
    """Over the steps that all ``runs`` have, thinned: mean x, mean y, smallest and largest y."""
    by_step = [{row["step"]: row for row in getattr(run, kind)} for run in runs]
    steps = every_nth(sorted(set.intersection(*map(set, by_step))), MOST_POINTS) if by_step else []
    found = [[(finite(rows[step].get(x)), finite(rows[step].get(y))) for rows in by_step] for step in steps]
    found = [at for at in found if not any(None in pair for pair in at)]
    xs, ys = ([[pair[i] for pair in at] for at in found] for i in (0, 1))
    return [*map(statistics.fmean, xs)], [*map(statistics.fmean, ys)], [*map(min, ys)], [*map(max, ys)]


def arm_lines(arm: Arm, kind: str, x: str, y: str, scale: float = 1) -> list[Line]:
    """Mean and range of the finished runs; unfinished ones, or runs that share no steps, one thin line each."""
    xs, *ys = band(arm.finished, kind, x, y)
    shared, out = len(xs) >= 2 or len(arm.finished) == 1, []
    if shared and xs:
        ys, low, high = ([scale * v for v in values] for values in ys)
        low, high = (low, high) if len(arm.finished) > 1 else ((), ())
        out.append(Line(arm.label, arm.colour, xs, ys, low, high, arm.style, dots=kind == "val" and len(xs) <= 25))
    for run in (run for run in arm.runs if not run.finished or not shared):
        if rows := points(run, kind, x, y):
            notes = [f"{run.path.name}{'' if run.finished else ', ' + run.state}"] * len(rows)
            xs, ys = [r[1] for r in rows], [scale * r[2] for r in rows]
            out.append(Line(arm.label, arm.colour, xs, ys, dash=arm.style, width=0.9, notes=notes))
    return out


def frame(arms: list[Arm], kind: str, y: str, skip: float) -> tuple[float, float] | None:
    """Smallest and largest value after the first ``skip`` of each run's steps, or None.

    The fall from initialisation does not flatten a view of these."""
    found = [rows for arm in arms for run in arm.runs if (rows := points(run, kind, "step", y))]
    values = [value for rows in found for step, _, value in rows if step > skip * rows[-1][0]]
    return (min(values), max(values)) if values else None


class Panel(NamedTuple):
    """One of a group of charts: ``y`` over ``x`` of rows of one kind."""

    y: str
    title: str
    label: str = ""
    x: str = "step"
    x_label: str = "optimizer step"
    view: str = "all"  # "log", "late" (without the fall from initialisation), "ratio" (0 to the largest, %), "share"
    skip: float = 0.0  # of the steps, not looked at for the limits of the view


SECONDS = {"x": "train_seconds", "x_label": "training time (s)"}
EPOCH = {"x": "epoch", "x_label": "times through the training set"}
PANELS = {  # of rows of a kind
    "val": [
        Panel("ppl", "Perplexity by time", "validation perplexity", **SECONDS, view="log", skip=0.2),
        Panel("ppl", "Perplexity by step", "validation perplexity", view="log", skip=0.2),
        Panel("ece10", "ECE by time", "validation ECE, 10 bins (%)", **SECONDS, view="ratio", skip=0.2),
        Panel("ece10", "ECE by step", "validation ECE, 10 bins (%)", view="ratio", skip=0.2),
    ],
    "epoch": [  # of rows of kind val
        Panel("nll", "NLL by epoch", "held-out NLL (nats a token)", **EPOCH, view="late"),
        Panel("ece10", "ECE by epoch", "held-out ECE, 10 bins (%)", **EPOCH, view="ratio"),
    ],
    "train": [
        Panel("loss", "Loss", "training loss, each its own score", view="late", skip=0.05),
        Panel("nll", "NLL", "training NLL (nats a token)", view="late", skip=0.05),
        Panel("alpha", "Alpha", "alpha, share of Brier", view="share"),
        Panel("lr", "Learning rate", "learning rate"),
        Panel("grad_norm", "Gradient norm", "gradient norm before clipping", view="log"),
        Panel("clip_rate", "Clip rate", "steps clipped (%)", view="share"),
    ],
}


def panel_chart(panel: Panel, arms: list[Arm], kind: str) -> Chart | None:
    """Every arm's curve, and a view that shows them; None where nothing was recorded."""
    drawn = [arm for arm in arms if panel.y != "alpha" or arm.loss == "dpsm"]  # others have none, and log 0
    scale = 100 if "(%)" in panel.label else 1
    lines = [line for arm in drawn for line in arm_lines(arm, kind, panel.x, panel.y, scale)]
    limits = frame(drawn, kind, panel.y, panel.skip)
    if limits is None or not lines:
        return None
    (low, high), view, log = (scale * limits[0], scale * limits[1]), None, ""
    if panel.view == "log" and low > 0:
        log, margin = "y", max((high / low) ** 0.06, 1.005)
        view = (low / margin, min(high, 30 * low) * margin) if panel.skip else None  # a diverging run leaves the frame
    elif panel.view == "late":
        margin = 0.05 * (high - low) or 0.1
        view = low - margin, high + margin
    elif panel.view in ("ratio", "share"):
        view = (0, high * 1.08 or 1) if panel.view == "ratio" else (-0.03 * scale, 1.05 * scale)
    marks = quality_mark(arms) if panel.y == "ppl" else []
    return Chart(panel.title, panel.x_label, panel.label, lines, log, view, marks)


def quality_mark(arms: list[Arm]) -> list[tuple[float, str]]:
    """The perplexity at which an arm has 95 % of CE's final quality, where there is one CE arm."""
    ces = [arm for arm in arms if arm.loss == "ce" and arm.finished]
    ces = [arm for arm in ces if arm.plain] or ces
    last = [curve[-1][1] for run in ces[0].finished if (curve := run.curve())] if len(ces) == 1 else []
    return [(statistics.fmean(last) / QUALITY, "95 % of CE's final")] if last and len(arms) > 1 else []


def curves(arms: list[Arm], kind: str, name: str = "") -> list[Chart]:
    """Validation perplexity and ECE over seconds and steps (``kind`` "val"), by epoch (``name`` "epoch"), or what
    training records ("train")."""
    return [chart for panel in PANELS[name or kind] if (chart := panel_chart(panel, arms, kind))]


def pooled(arm: Arm, split: str, which: str, bins: int) -> tuple[dict, float] | None:
    """Reliability of the bins of all finished runs added up, and the mean of the runs' own ECE (as in the tables)."""
    each = [c for run in arm.finished if (c := run.calibration.get((split, which))) and c.count.sum() > 0]
    if not each:
        return None
    parts = [c.bins(bins) for c in each]
    total = {key: [sum(column) for column in zip(*(part[key] for part in parts), strict=True)] for key in parts[0]}
    return Calibration.from_bins(total).reliability(bins), statistics.fmean(c.ece(bins) for c in each)


PERFECT = Line("perfect", FAINT, [0, 1], [0, 1], dash="--", width=1)


WHEN = {"raw": "Reliability before temperature", "scaled": "Reliability after temperature"}
OFTEN = {band: f"Reliability of {band} targets" for band in BANDS}  # before temperature


def reliability(arms: list[Arm], split: str, titles: dict[str, str] = WHEN, bins: int = 10) -> list[Chart]:
    """Accuracy by confidence of each part in ``titles``, of the bins that hold tokens, with their counts."""
    out = []
    for which, title in titles.items():
        lines = []
        for arm in arms:
            curve, ece = pooled(arm, split, which, bins) or ({}, None)
            found = [*zip(*(curve.get(key, ()) for key in ("count", "confidence", "accuracy")), strict=True)]
            if found := [row for row in found if row[0]]:
                counts, xs, ys = map(list, zip(*found, strict=True))
                notes = [f"{n:,} tokens, ECE {100 * ece:.2f} %" for n in counts]
                lines.append(Line(arm.label, arm.colour, xs, ys, dash=arm.style, dots=True, notes=notes))
        if lines:
            out.append(Chart(title, "confidence", "accuracy", [*lines, PERFECT], view=(0, 1)))
    return out


def frontier(arms: list[Arm], split: str) -> list[Chart]:
    """ECE over perplexity, a dot a seed, and the arms that no other beats in both means."""
    keys, lines, means = [f"{split}_ppl", f"{split}_ece10"], [], []
    for arm in (arm for arm in arms if all(arm.values(key) for key in keys)):
        both = [(run.number(keys[0]), run.number(keys[1]), f"seed {run.seed}") for run in arm.finished]
        both = sorted((x, 100 * y, text) for x, y, text in both if x is not None and y is not None)
        xs, ys, notes = map(list, zip(*both, strict=True))
        lines.append(Line(arm.label, arm.colour, xs, ys, dots=True, joined=False, notes=notes))
        means.append((statistics.fmean(xs), statistics.fmean(ys), arm.label))
    if len(lines) < 2:
        return []
    best = [m for m in sorted(means) if not any(o[0] <= m[0] and o[1] <= m[1] and o[:2] != m[:2] for o in means)]
    xs, ys, notes = map(list, zip(*best, strict=True))
    edge = Line("frontier of the means", FAINT, xs, ys, dash="--", width=1, notes=notes)
    return [Chart("ECE over perplexity", "perplexity", "ECE, 10 bins (%)", [*lines, edge], log="x")]


def answer_confidence(found: list[tuple], before: list[tuple], kinds: tuple[str, ...]) -> list[Chart]:
    """Two charts a kind of confidence: risk over coverage, and accuracy by confidence.

    ``found``: (arm, kind -> Judged); ``before``: the same before training, dotted."""
    out = []
    for kind in (kind for kind in kinds if any(kind in by for _, by in found)):
        drawn = [(arm, by[kind], arm.style, "") for arm, by in found if kind in by]
        drawn += [(arm, by[kind], ":", " before training") for arm, by in before if kind in by]
        risk, bars = [], []
        for arm, answers, style, when in drawn:
            of, look = (arm.label + when, arm.colour), {"dash": style}
            xs, ys = risk_coverage(answers)
            risk.append(thinned(Line(*of, list(map(float, xs)), [100 * float(y) for y in ys], **look)))
            count, xs, ys = map(list, zip(*bins_reliability(answers), strict=True))
            notes = [f"{n:,} answers" for n in count]
            bars.append(Line(*of, xs, [100 * y for y in ys], width=1, dots=True, notes=notes, **look))
        perfect = PERFECT._replace(y=[0, 100])
        out.append(
            Chart(f"Risk by coverage: {kind}", "coverage, most confident first", "wrong (%)", risk, view=(0, 103))
        )
        out.append(Chart(f"Reliability: {kind}", "confidence", "right (%)", [*bars, perfect], view=(0, 103)))
    return out


def as_json(charts: list[Chart], off: frozenset[str] = frozenset()) -> dict:
    """A group of charts for page.js, numbers to five digits. ``off``: labels that are not drawn at first."""

    def numbers(values) -> list:
        return [float(f"{v:.5g}") for v in values]

    legend, out = {}, []
    for chart in charts:
        lines = []
        for line in map(thinned, chart.lines):
            legend.setdefault(line.label, line.colour)
            fields = {k: numbers(getattr(line, k)) for k in ("x", "y", "low", "high")}
            dashed = line.dash != "-"
            about = dict(label=line.label, width=line.width, dash=dashed, dots=line.dots, joined=line.joined)
            lines.append(about | fields | {"colour": line.colour, "notes": list(line.notes)})
        parts = {"title": chart.title, "x": chart.x, "y": chart.y, "log": chart.log, "marks": list(chart.marks)}
        out.append(parts | {"view": chart.view and numbers(chart.view), "lines": lines})
    shown = [{"label": label, "colour": colour, "off": label in off} for label, colour in legend.items()]
    return {"legend": shown, "charts": out}


class HeatMap(NamedTuple):
    """A metric over two settings. ``rows``: y -> a cell for each of ``xs``: text, how good it is in [0, 1], whether it
    is the best; ("-", None, False) where nothing was measured."""

    title: str
    x: str
    y: str
    xs: list[float]
    rows: dict[float, list[tuple[str, float | None, bool]]]


def heat_metrics(cells: dict[tuple, dict]) -> list[metrics.Metric]:
    """The metrics of a grid's cells, in the order of their tables."""
    return [m for m in (*metrics.SUMMARIES, *metrics.TOKENS) if any(m.key in cell for cell in cells.values())]


def heat_maps(x: str, y: str, cells: dict[tuple, dict]) -> list[HeatMap]:
    """``cells`` maps (x, y) to {metric's key: value}, each of which may be None or inf."""
    xs, ys, out = sorted({x for x, _ in cells}), sorted({y for _, y in cells}, reverse=True), []
    for metric in heat_metrics(cells):
        found = {at: finite(cell.get(metric.key)) for at, cell in cells.items()}
        known = [v for v in found.values() if v is not None]
        more = metric.better == "higher"
        low, high = (min(known), max(known)) if known else (0, 0)

        def cell(v: float | None, metric=metric, more=more, low=low, high=high) -> tuple:
            if v is None:
                return "-", None, False
            share = (v - low) / (high - low) if high > low else 1.0
            good = share if more or high == low else 1 - share
            return metric.format(metric.scale * v), good, good == 1.0

        rows = {at: [cell(found.get((k, at))) for k in xs] for at in ys}
        out.append(HeatMap(f"{metric.name}, {metric.unit} {'↑' if more else '↓'}", x, y, xs, rows))
    return out
