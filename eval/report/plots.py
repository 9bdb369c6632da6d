"""The report's pictures, for papers: PNG with the same figure as SVG, None where there is nothing to draw.

Charts are drawn as charts.py describes them. Figures are built without pyplot: no display is needed, no state is
shared.
"""

import colorsys
import io
import math
import textwrap

import matplotlib
import numpy as np
from matplotlib import ticker
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from eval.report.charts import Chart, heat_metrics, log_ticks, pooled
from schedules.style import FAINT, INK, STYLES, styled, thousands


class Picture(bytes):
    """A PNG file. ``svg``: the same figure as an SVG file."""

    svg: bytes


# Of each score, from Okabe & Ito's palette (see schedules/style.py).
HUES = dict(ce="#333333", dpsm="#D55E00", brier="#0072B2", spherical="#009E73", focal="#CC79A7", smoothing="#E69F00")
OTHER = "#56B4E9"


def assign_colours(arms: list) -> None:
    """Sets ``colour`` and ``style`` of every arm: the hue says the loss, shade and dashes which of its arms."""
    for loss in {arm.loss for arm in arms}:
        same = [arm for arm in arms if arm.loss == loss]
        h, lightness, s = colorsys.rgb_to_hls(*to_rgb(HUES.get(loss, OTHER)))
        for k, arm in enumerate(same):  # one arm has the hue itself, several go from dark to light
            shade = lightness if len(same) == 1 else 0.7 * lightness + (0.72 - 0.7 * lightness) * k / (len(same) - 1)
            arm.colour = to_hex(colorsys.hls_to_rgb(h, shade, s))
            arm.style = STYLES[k % len(STYLES)]


@styled
def draw(charts: list[Chart]) -> Picture | None:
    """A group of charts, two side by side, with one legend."""
    if not charts:
        return None
    columns = min(len(charts), 2)
    fig = figure(5 * columns + (2.5 if columns == 1 else 0), 0.9 + 3.2 * -(-len(charts) // columns))
    axes = [*fig.subplots(-(-len(charts) // columns), columns, squeeze=False).flat]
    for ax in axes[len(charts) :]:
        ax.set_visible(False)
    handles: dict[str, Line2D] = {}
    for ax, chart in zip(axes, charts, strict=False):
        draw_chart(ax, chart)
        for line in chart.lines:
            marker = "o" if line.dots else ""
            look = {"color": line.colour, "linestyle": line.dash if line.joined else "", "marker": marker}
            handles.setdefault(line.label, Line2D([], [], linewidth=2, markersize=4, label=line.label, **look))
    widest = max(map(len, handles), default=1)
    columns = max(1, min(len(handles), (55 * columns) // (widest + 8)))
    fig.legend(handles=handles.values(), loc="outside upper center", ncols=columns)
    return png(fig)


def draw_chart(ax, chart: Chart) -> None:
    """The lines of one chart, its view and ticks."""
    for line in chart.lines:
        marker = {"marker": "o", "markersize": 3.2} if line.dots else {}
        style = line.dash if line.joined else ""
        ax.plot(line.x, line.y, color=line.colour, linestyle=style, linewidth=line.width, **marker)
        if line.low:
            ax.fill_between(line.x, line.low, line.high, color=line.colour, alpha=0.18, linewidth=0)
    for y, label in chart.marks:
        ax.axhline(y, color=FAINT, linewidth=0.9, linestyle=(0, (2, 2)))
        ax.annotate(
            label, (0.01, y), xycoords=("axes fraction", "data"), ha="left", va="bottom", color=FAINT, fontsize=8
        )
    ax.set(title=chart.title, xlabel=chart.x, ylabel=chart.y)
    for name, axis in (("x", ax.xaxis), ("y", ax.yaxis)):
        axis.set_major_formatter(ticker.FuncFormatter(thousands))
        if name in chart.log:
            getattr(ax, f"set_{name}scale")("log")
    if chart.view:
        ax.set_ylim(*chart.view)
    for name, axis in (("x", ax.xaxis), ("y", ax.yaxis)):
        if name in chart.log:  # after the limits, which it needs
            axis.set_major_locator(ticker.FixedLocator(log_ticks(*sorted(getattr(ax, f"get_{name}lim")()))))
            axis.set_major_formatter(ticker.FuncFormatter(thousands))
            axis.set_minor_locator(ticker.NullLocator())


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
def reliability(arms: list, split: str, bins: int = 10) -> Picture | None:
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
def heat_maps(name: str, x_name: str, y_name: str, cells: dict[tuple, dict], split: str = "validation") -> Picture:
    """A panel for each metric of ``cells``, over two settings; the best is bold, and brighter is better.

    ``cells`` maps (x, y) to {metric's key: value}, each of which may be None or inf."""
    xs, ys = sorted({x for x, _ in cells}), sorted({y for _, y in cells})
    panels = heat_metrics(cells)
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


def figure(width: float, height: float) -> Figure:
    """A figure of inches, laid out without overlaps."""
    return Figure(figsize=(width, height), layout="constrained")


def png(fig: Figure) -> Picture:
    """Both files; the SVG's text is text, and the same figure gives the same bytes."""
    files = io.BytesIO(), io.BytesIO()
    fig.savefig(files[0], format="png", dpi=140, facecolor="white")
    fig.set_layout_engine("none")  # it is laid out, which takes half of the time
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "scorecast"}):
        fig.savefig(files[1], format="svg", facecolor="white", metadata={"Date": None})
    picture = Picture(files[0].getvalue())
    picture.svg = files[1].getvalue()
    return picture
