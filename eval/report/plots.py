"""The report's pictures: each is a function from arms to PNG bytes, None where there is nothing to draw.

An arm is `eval.report.runs.Arm`. Figures are built without pyplot: no display is needed, no state is shared.
"""

import colorsys
import io
import itertools
import math
import statistics
import textwrap
from typing import NamedTuple

import numpy as np
from matplotlib import ticker
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from eval import metrics
from eval.answer_calibration import reliability as bins_reliability
from eval.answer_calibration import risk_coverage
from eval.report.runs import finite
from kernels import Calibration
from schedules.style import FAINT, INK, PALETTE, styled, thousands

# Of each score, from Okabe & Ito's palette (see schedules/style.py).
HUES = dict(ce="#333333", dpsm="#D55E00", brier="#0072B2", spherical="#009E73", focal="#CC79A7", smoothing="#E69F00")
OTHER = "#56B4E9"
STYLES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.2, 1.5)))


def assign_colours(arms: list) -> None:
    """Sets ``colour`` and ``style`` of every arm: the hue says the loss, shade and dashes which of its arms."""
    for loss in {arm.loss for arm in arms}:
        same = [arm for arm in arms if arm.loss == loss]
        h, lightness, s = colorsys.rgb_to_hls(*to_rgb(HUES.get(loss, OTHER)))
        for k, arm in enumerate(same):  # one arm has the hue itself, several go from dark to light
            shade = lightness if len(same) == 1 else 0.7 * lightness + (0.72 - 0.7 * lightness) * k / (len(same) - 1)
            arm.colour = to_hex(colorsys.hls_to_rgb(h, shade, s))
            arm.style = STYLES[k % len(STYLES)]


def points(run, kind: str, x: str, y: str) -> list[tuple[int, float, float]]:
    """(step, x, y) of the rows of ``kind`` in which both are finite numbers."""
    rows = ((row.get("step"), row.get(x), row.get(y)) for row in getattr(run, kind))
    return [row for row in rows if None not in map(finite, row)]


def band(runs: list, kind: str, x: str, y: str) -> tuple[list, list, list, list]:
    """Over the steps that all ``runs`` have: mean x, mean y, smallest and largest y."""
    by_step = [{step: (a, b) for step, a, b in points(run, kind, x, y)} for run in runs]
    steps = sorted(set.intersection(*map(set, by_step))) if by_step else []
    xs, ys = ([[found[step][i] for found in by_step] for step in steps] for i in (0, 1))
    return [*map(statistics.fmean, xs)], [*map(statistics.fmean, ys)], [*map(min, ys)], [*map(max, ys)]


def draw_arm(ax, arm, kind: str, x: str, y: str) -> None:
    """Mean and range of the finished runs; unfinished ones, or runs that share no steps, one thin line each."""
    xs, ys, low, high = band(arm.finished, kind, x, y)
    shared = len(xs) >= 2 or len(arm.finished) == 1
    look = {"color": arm.colour, "linestyle": arm.style}
    if shared and xs:
        dots = {"marker": "o", "markersize": 3.2} if kind == "val" and len(xs) <= 25 else {}
        ax.plot(xs, ys, linewidth=1.7, **look, **dots)
        if len(arm.finished) > 1:
            ax.fill_between(xs, low, high, color=arm.colour, alpha=0.18, linewidth=0)
    for run in (run for run in arm.runs if not run.finished or not shared):
        rows = points(run, kind, x, y)
        ax.plot([r[1] for r in rows], [r[2] for r in rows], linewidth=0.9, alpha=0.7, **look)
        if rows and not run.finished:
            ax.plot(rows[-1][1], rows[-1][2], "x", color=arm.colour, markersize=6)


def frame(arms: list, kind: str, y: str, skip: float) -> tuple[float, float] | None:
    """Smallest and largest value after the first ``skip`` of each run's steps, or None.

    The fall from initialisation does not flatten a view of these."""
    found = [rows for arm in arms for run in arm.runs if (rows := points(run, kind, "step", y))]
    values = [value for rows in found for step, _, value in rows if step > skip * rows[-1][0]]
    return (min(values), max(values)) if values else None


class Panel(NamedTuple):
    """One of a figure's plots: ``y`` over ``x`` of rows of one kind."""

    y: str
    title: str
    label: str = ""
    x: str = "step"
    x_label: str = "optimizer step"
    view: str = "all"  # "log", "late" (without the fall from initialisation), "ratio" (0 to the largest, %), "share"
    skip: float = 0.0  # of the steps, not looked at for the limits of the view


SECONDS = {"x": "train_seconds", "x_label": "training time (s)"}
EPOCH = {"x": "epoch", "x_label": "times through the training set"}
PANELS = {  # of rows of a kind, two side by side
    "val": [
        Panel("ppl", "Perplexity by time", "validation perplexity", **SECONDS, view="log", skip=0.2),
        Panel("ppl", "Perplexity by step", view="log", skip=0.2),
        Panel("ece10", "ECE by time", "validation ECE, 10 bins (%)", **SECONDS, view="ratio", skip=0.2),
        Panel("ece10", "ECE by step", view="ratio", skip=0.2),
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
        Panel("clip_rate", "Clip rate", "share of steps clipped (%)", view="share"),
    ],
}
PERCENT = ticker.FuncFormatter(lambda v, _: f"{100 * v:g}")


def draw_panel(ax, panel: Panel, arms: list, kind: str) -> None:
    """Every arm's curve, and a view that shows them."""
    drawn = [arm for arm in arms if panel.y != "alpha" or arm.loss == "dpsm"]  # others have none, and log 0
    for arm in drawn:
        draw_arm(ax, arm, kind, panel.x, panel.y)
    ax.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.label, xlim=(0, None))
    ax.xaxis.set_major_formatter(ticker.FuncFormatter(thousands))
    limits = frame(drawn, kind, panel.y, panel.skip)
    if limits is None:
        ax.text(0.5, 0.5, "not recorded", transform=ax.transAxes, ha="center", va="center", color=FAINT)
        ax.set(xticks=[], yticks=[])
        ax.grid(False)
        return
    low, high = limits
    if panel.view == "log" and low > 0:
        ax.set_yscale("log")
        if panel.skip:
            high = min(high, 30 * low)  # a diverging run leaves the frame
            margin = max((high / low) ** 0.06, 1.005)
            ax.set_ylim(low / margin, high * margin)
        low, high = ax.get_ylim()
        few = ticker.MaxNLocator(6, steps=[1, 2, 2.5, 5, 10])
        ax.yaxis.set_major_locator(few if high / low < 12 else ticker.LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(ticker.FuncFormatter(thousands))
        ax.yaxis.set_minor_locator(ticker.NullLocator())
    elif panel.view == "late":
        margin = 0.05 * (high - low) or 0.1
        ax.set_ylim(low - margin, high + margin)
    elif panel.view in ("ratio", "share"):
        ax.set_ylim(*{"ratio": (0, high * 1.08 or 1), "share": (-0.03, 1.05)}[panel.view])
    if "(%)" in panel.label or panel.view == "ratio":
        ax.yaxis.set_major_formatter(PERCENT)


@styled
def curves(arms: list, kind: str, name: str = "") -> bytes | None:
    """Validation perplexity and ECE over seconds and steps (``kind`` "val"), by epoch (``name`` "epoch"), or what
    training records ("train")."""
    panels, sharey = PANELS[name or kind], "row" if kind == "val" and not name else False
    if not any(points(run, kind, panel.x, panel.y) for arm in arms for run in arm.runs for panel in panels):
        return None
    fig = figure(10, (17 + 4 * len(panels)) / 5)
    axes = fig.subplots(len(panels) // 2, 2, sharey=sharey)
    for ax, panel in zip(axes.flat, panels, strict=True):
        draw_panel(ax, panel, arms, kind)
    handles = [Line2D([], [], color=a.colour, linestyle=a.style, linewidth=2, label=a.label) for a in arms]
    if any(not run.finished for arm in arms for run in arm.runs):
        handles.append(Line2D([], [], color=FAINT, linewidth=0.9, marker="x", label="unfinished run"))
    widest = max(len(h.get_label()) for h in handles)
    fig.legend(handles=handles, loc="outside upper center", ncols=max(1, min(len(handles), 110 // (widest + 8))))
    return png(fig)


def pooled(arm, split: str, which: str, bins: int) -> tuple[dict, float] | None:
    """Reliability of the bins of all finished runs added up, and the mean of the runs' own ECE (as in the tables)."""
    each = [c for run in arm.finished if (c := run.calibration.get((split, which))) and c.count.sum() > 0]
    if not each:
        return None
    parts = [c.bins(bins) for c in each]
    total = {key: [sum(column) for column in zip(*(part[key] for part in parts), strict=True)] for key in parts[0]}
    return Calibration.from_bins(total).reliability(bins), statistics.fmean(c.ece(bins) for c in each)


PERFECT = {"color": INK, "linestyle": (0, (4, 2))}
GAP = {"facecolor": "#dcdcdccc", "edgecolor": "#555555", "hatch": "/////"}


def draw_reliability(ax, below, curve: dict, bins: int, colour: str) -> None:
    """Accuracy by confidence and its gap to the diagonal on ``ax``, counts on ``below``."""
    columns = (curve[key] for key in ("lo", "count", "confidence", "accuracy"))
    for low, count, confidence, accuracy in zip(*columns, strict=True):
        if count:
            box = {"x": low + 0.5 / bins, "width": 0.92 / bins}
            solid = {"color": colour, "alpha": 0.85, "linewidth": 0} | box
            ax.bar(height=accuracy, zorder=2, **solid)
            ax.bar(height=confidence - accuracy, bottom=accuracy, linewidth=0.6, zorder=3, **GAP, **box)
            ax.hlines(accuracy, low, low + 1 / bins, color=colour, linewidth=2.2, zorder=5)
            below.bar(height=count, **solid)
    below.set_ylim(bottom=0.7)


@styled
def reliability(arms: list, split: str, bins: int = 10) -> bytes | None:
    """A column an arm: accuracy by confidence, its gap to the diagonal, and counts, before and after temperature."""
    drawn = [(arm, [pooled(arm, split, which, bins) for which in ("raw", "scaled")]) for arm in arms]
    drawn = [(arm, pair) for arm, pair in drawn if any(pair)]
    if not drawn:
        return None
    fig = figure(max(2.35 * len(drawn) + 0.5, 5), 7.6)
    heights = {"height_ratios": (3, 1, 3, 1)}
    grid = fig.subplots(4, len(drawn), sharex=True, sharey="row", squeeze=False, gridspec_kw=heights)
    ends, names = [0, 0.5, 1], ["0", "0.5", "1"]
    for col, (arm, pair) in enumerate(drawn):
        for ax, below, state, found in zip(grid[::2, col], grid[1::2, col], ("before", "after"), pair, strict=True):
            ax.plot([0, 1], [0, 1], linewidth=0.9, zorder=4, **PERFECT)
            ax.set(xlim=(0, 1), ylim=(0, 1), xticks=ends, yticks=ends, xticklabels=names, yticklabels=names)
            below.set_yscale("log")
            below.yaxis.set_minor_locator(ticker.NullLocator())
            below.yaxis.set_major_locator(ticker.LogLocator(numticks=4))
            for axis in (ax, below) if col else ():
                axis.tick_params(left=False)
            lines = [textwrap.fill(arm.label, 26)] * (state == "before")
            if found is None:
                ax.text(0.5, 0.5, "not recorded", ha="center", color=FAINT)
            else:
                draw_reliability(ax, below, found[0], bins, arm.colour)
                lines.append(f"{state} T: ECE {100 * found[1]:.2f} %")
            ax.set_title("\n".join(lines), fontsize=9)
        grid[3][col].set_xlabel("confidence")
    for row, label in zip(grid, 2 * ("accuracy", "tokens"), strict=True):
        row[0].set_ylabel(label)
    accuracy = Line2D([], [], color=FAINT, linewidth=2.2, label="accuracy")
    handles = [Line2D([], [], label="perfect", **PERFECT), accuracy, Patch(label="gap to the mean confidence", **GAP)]
    fig.legend(handles=handles, loc="outside lower center", ncols=3)
    return png(fig)


@styled
def answer_confidence(found: list[tuple], before: list[tuple], kinds: tuple[str, ...]) -> bytes | None:
    """A row a kind of confidence: risk over coverage, and accuracy by confidence.

    ``found``: (arm, kind -> Judged); ``before``: the same before training, dotted."""
    kinds = [kind for kind in kinds if any(kind in by for _, by in found)]
    if not kinds:
        return None
    fig = figure(9, 3.3 * len(kinds) + 0.5)
    grid = fig.subplots(len(kinds), 2, squeeze=False)
    for (risk, bars), kind in zip(grid, kinds, strict=True):
        bars.plot([0, 1], [0, 1], linewidth=0.9, **PERFECT)
        drawn = [(arm, by[kind], arm.style) for arm, by in found if kind in by]
        drawn += [(arm, by[kind], ":") for arm, by in before if kind in by]
        for arm, answers, style in drawn:
            look = {"color": arm.colour, "linestyle": style}
            risk.plot(*risk_coverage(answers), linewidth=1.6, **look)
            count, confidence, accuracy = zip(*bins_reliability(answers), strict=True)
            bars.plot(confidence, accuracy, linewidth=1.0, **look)
            bars.scatter(confidence, accuracy, s=[8 + 90 * n / sum(count) for n in count], color=arm.colour, zorder=3)
        risk.set(title=f"Risk by coverage: {kind}", xlabel="coverage, most confident first", ylabel="wrong (%)")
        risk.set(xlim=(0, 1), ylim=(0, 1.03))
        bars.set(title=f"Reliability: {kind}", xlabel="confidence", ylabel="right (%)", xlim=(0, 1), ylim=(0, 1.03))
        for ax in (risk, bars):
            ax.yaxis.set_major_formatter(PERCENT)
    handles = [Line2D([], [], color=a.colour, linestyle=a.style, linewidth=2, label=a.label) for a, _ in found]
    handles += [Line2D([], [], color=FAINT, linestyle=":", linewidth=2, label="before training")] * bool(before)
    fig.legend(handles=handles, loc="outside upper center", ncols=min(len(handles), 4))
    return png(fig)


@styled
def heat_maps(name: str, x_name: str, y_name: str, cells: dict[tuple, dict], split: str = "validation") -> bytes:
    """A panel for each metric of ``cells``, over two settings; the best is bold, and brighter is better.

    ``cells`` maps (x, y) to {metric's key: value}, each of which may be None or inf."""
    xs, ys = sorted({x for x, _ in cells}), sorted({y for _, y in cells})
    panels = [m for m in (*metrics.SUMMARIES, *metrics.TOKENS) if any(m.key in cell for cell in cells.values())]
    columns = min(len(panels), 3)
    lines = math.ceil(len(panels) / columns)
    width, height = columns * (0.85 * len(xs) + 1.6), lines * max(0.6 * len(ys) + 1.7, 3.2 if lines == 1 else 2.4)
    fig = figure(max(width, 3.5 * columns), height)
    grid = fig.subplots(lines, columns, squeeze=False)
    for ax in grid.flat[len(panels) :]:
        ax.set_visible(False)
    for ax, metric in zip(grid.flat, panels, strict=False):
        values = metric.scale * np.array([[cells.get((x, y), {}).get(metric.key) for x in xs] for y in ys], dtype=float)
        known = values[np.isfinite(values)] if np.isfinite(values).any() else [0, 1]
        low, high, more = min(known), max(known), metric.better == "higher"
        ax.imshow(values, cmap="cividis" if more else "cividis_r", aspect="auto", origin="lower", vmin=low, vmax=high)
        for (i, j), v in np.ndenumerate(values):
            share = (v - low) / (high - low) if high > low else 0
            dark = math.isfinite(v) and (share < 0.45 if more else share > 0.55)
            look = {"color": "white" if dark else INK, "fontsize": 8.5}
            look["fontweight"] = "bold" if v == (high if more else low) else "normal"
            ax.text(j, i, metric.format(v) if math.isfinite(v) else "-", ha="center", va="center", **look)
        ax.set_xticks(range(len(xs)), [f"{x:g}" for x in xs])
        ax.set_yticks(range(len(ys)), [f"{y:g}" for y in ys])
        ax.set(xlabel=x_name, ylabel=y_name, title=f"{metric.name}, {metric.unit} {'↑' if more else '↓'}")
        ax.grid(False)
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
    fig.suptitle(f"{name}: {split}", x=0.01, ha="left", fontsize=10)
    return png(fig)


@styled
def bowl(rules: list) -> bytes:
    """Validation NLL over the peak learning rate, a line a rule (eval.report.bowl.Rule)."""
    fig = figure(8.2, 4.6)
    ax = fig.subplots()
    dashes = itertools.cycle(STYLES)  # tell the rules of ours apart, colours the others
    for k, rule in enumerate(rules):
        if rule.config["schedule"] == "fot":
            look = {"color": INK, "linewidth": 2.2, "linestyle": next(dashes)}
        else:
            style = STYLES[k // len(PALETTE) % len(STYLES)]
            look = {"color": PALETTE[k % len(PALETTE)], "linewidth": 1.3, "linestyle": style}
        peaks = [lr for lr in rule.peaks if math.isfinite(rule.mean(lr))]
        ax.plot(peaks, [rule.mean(lr) for lr in peaks], label=rule.label, marker="o", markersize=3.5, **look)
        low, high = ([f(rule.nll(lr).values()) for lr in peaks] for f in (min, max))
        ax.fill_between(peaks, low, high, color=look["color"], alpha=0.12, linewidth=0)
    ax.set_xscale("log")
    peaks = sorted({lr for r in rules for lr in r.peaks})
    ax.set_xticks(peaks, [f"{lr:g}" for lr in peaks])
    ax.xaxis.set_minor_locator(ticker.NullLocator())
    known = [v for r in rules for lr in r.peaks for v in r.nll(lr).values() if math.isfinite(v)]
    if known:
        margin = 0.03 * (max(known) - min(known))
        ax.set_ylim(min(known) - margin, max(known) + margin)
    ax.set(xlabel="peak learning rate", ylabel="validation NLL (nats a token)")
    fig.legend(loc="outside right center")
    return png(fig)


@styled
def forecasts(points: list[tuple[str, float, float, float, float]]) -> bytes:
    """Forecasts over what was reached: (colour, fraction of the run, reached, forecast, half of the interval)."""
    fractions = sorted({fraction for _, fraction, *_ in points})
    fig = figure(2.4 * len(fractions) + 0.6, 2.9)
    panels = fig.subplots(1, len(fractions), squeeze=False, sharex=True, sharey=True)[0]
    ends = min(p[2] for p in points), max(p[2] for p in points)
    for ax, fraction in zip(panels, fractions, strict=True):
        ax.plot(ends, ends, color=FAINT, linewidth=1)
        for colour, _, x, y, half in (p for p in points if p[1] == fraction):
            ax.errorbar(x, y, half, color=colour or INK, marker="o", markersize=3, linewidth=0.9)
        ax.set(title=f"made at {fraction:.0%}", xlabel="reached (NLL)")
    panels[0].set_ylabel("forecast")
    return png(fig)


def figure(width: float, height: float) -> Figure:
    """A figure of inches, laid out without overlaps."""
    return Figure(figsize=(width, height), layout="constrained")


def png(fig: Figure) -> bytes:
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=140, facecolor="white")
    return buffer.getvalue()
