"""The forecasts of every run against the loss that it reached: errors and coverage.

A run whose rule measures logs its forecasts on the way. Of the others the report makes them afterwards, from the log up
to there and the learning rates of the whole run, which the run had planned."""

import statistics
from typing import NamedTuple

import numpy as np

from eval.report.charts import Chart, Line
from eval.report.runs import Arm, Run, finite
from eval.report.tables import NOTES, Cell, Table, section, table_of
from schedules.forecast import Forecaster, student_quantile
from schedules.learn import FRACTIONS, LAST, feed, stop_at
from schedules.logs import Curve, began_trained

WIDE = student_quantile(0.975)  # half of the 95 % interval, in sds
MOST_ROWS = 30  # of the table of runs, before it is folded


class Graded(NamedTuple):
    """The last forecast that a run made by a fraction of its steps; ``mean`` is None where it had none."""

    fraction: float
    mean: float | None
    sd: float | None
    reached: float

    @property
    def error(self) -> float:
        """Signed, in per cent of what was reached."""
        return 100 * (self.mean - self.reached) / abs(self.reached)

    def inside(self, width: float) -> bool:
        return abs(self.mean - self.reached) <= width * self.sd


class Forecasts(NamedTuple):
    """Of one run that came to its last step."""

    arm: Arm
    run: Run
    logged: bool  # on the way; else made afterwards
    grades: list[Graded]  # one a fraction of FRACTIONS


def reached(run: Run) -> float | None:
    """The mean NLL of training over the last 2 % of the steps, or the last log line where that is longer; None for a
    run that did not come to its last step."""
    total = finite(run.config.get("steps"))
    if not total or not run.train or run.train[-1]["step"] < total:
        return None
    late = [finite(row.get("nll")) for row in run.train if row["step"] > (1 - LAST) * total]
    late = [v for v in late if v is not None]
    return statistics.fmean(late) if late else None


def grade(run: Run) -> list[Graded]:
    """A grade for each of FRACTIONS; none for a run that logged no forecasts, or has not ended."""
    final = reached(run)
    if final is None or not any(finite(row.get("forecast")) is not None for row in run.fot):
        return []
    out = []
    for fraction in FRACTIONS:
        early = [row for row in run.fot if row["step"] <= fraction * run.config["steps"]]
        mean, sd = (finite(early[-1].get(key)) for key in ("forecast", "sd")) if early else (None, None)
        out.append(Graded(fraction, *((mean, sd) if mean is not None and sd else (None, None)), final))
    return out


def grade_afterwards(run: Run) -> list[Graded]:
    """The same of a run that logged none, as the forecaster would have said at each of FRACTIONS."""
    if reached(run) is None:
        return []
    rows = [row for row in run.train if finite(row.get("nll")) is not None]
    columns = ([finite(row.get(k)) for row in rows] for k in ("step", "nll", "lr"))
    steps, losses, lrs = (np.array(column, dtype=np.float64) for column in columns)
    curve = Curve(run.path.name, "", steps, losses, None if np.isnan(lrs).any() else lrs)
    out = []
    for fraction in FRACTIONS:
        stop = stop_at(curve, fraction)
        forecaster = feed(Forecaster(finetune=began_trained(run.config)), curve, stop.seen)
        made = forecaster.forecast(stop.end, stop.plan, window=stop.width)
        out.append(Graded(fraction, made.mean, made.sd, stop.final))
    return out


def forecasts_of(arms: list[Arm]) -> list[Forecasts]:
    """Of every run that came to its last step and has a log to forecast from."""
    found = []
    for arm, run in ((a, r) for a in arms for r in a.runs):
        logged = grade(run)
        if grades := logged or grade_afterwards(run):
            found.append(Forecasts(arm, run, bool(logged), grades))
    return found


def forecast_table(grades: list[Graded], note: str = NOTES["forecasts"]) -> Table | None:
    """Errors and coverage by the fraction of the run, and over all."""
    rows = []
    for fraction in (*FRACTIONS, None):
        group = [g for g in grades if fraction in (g.fraction, None)]
        made = [g for g in group if g.mean is not None]
        name = "all" if fraction is None else f"{fraction:.0%}"
        if not made:
            rows.append([name, f"0 of {len(group)}", *"----"])
            continue
        errors = [abs(g.error) for g in made]
        inside = [f"{100 * statistics.fmean(g.inside(width) for g in made):.0f}" for width in (1.0, WIDE)]
        bias = f"{statistics.fmean(g.error for g in made):+.2f}"
        error = Cell(f"{statistics.median(errors):.2f}", f"worst {max(errors):.1f}")
        rows.append([name, f"{len(made)} of {len(group)}", error, bias, *inside])
    heads = "made at", "forecasts", "error|median, %", "bias|mean, %", "in 68 %|%", "in 95 %|%"
    return table_of(heads, rows, note=note, foot=1) if grades else None


def run_table(found: list[Forecasts]) -> Table | None:
    """A row a run: each forecast, its error, and whether its 95 % interval held what was reached."""

    def cell(g: Graded) -> Cell:
        if g.mean is None:
            return Cell("none")
        held = "inside" if g.inside(WIDE) else "outside"
        tone = "good" if held == "inside" else "bad"
        return Cell(f"{g.mean:.3f} ± {WIDE * g.sd:.3f}", f"{g.error:+.2f} %, {held}", tone=tone)

    rows = [
        [Cell(f.run.path.as_posix(), colour=f.arm.colour), f.arm.label, "logged" if f.logged else "afterwards"]
        + [f"{f.grades[0].reached:.3f}", *map(cell, f.grades)]
        for f in found
    ]
    heads = "run", "arm", "made", "reached|NLL", *(f"at {fraction:.0%}|NLL ± 95 %" for fraction in FRACTIONS)
    return table_of(heads, rows, left=3)


def fan_chart(found: list[Forecasts]) -> Chart | None:
    """Error of every forecast over the share of the run, with its 95 % interval where it was logged on the way."""
    lines = []
    for f in found:
        total, final = f.run.config["steps"], f.grades[0].reached
        rows = [(g.fraction * total, g.mean, g.sd) for g in f.grades]
        if f.logged:
            rows = [(row["step"], finite(row.get("forecast")), finite(row.get("sd"))) for row in f.run.fot]
        rows = [(step, mean, sd) for step, mean, sd in rows if mean is not None and sd]
        if not rows:
            continue
        ends = [[100 * (mean + k * WIDE * sd - final) / abs(final) for _, mean, sd in rows] for k in (0, -1, 1)]
        notes = [f"{f.run.path.name}: {mean:.4g} ± {WIDE * sd:.2g}, reached {final:.4g}" for _, mean, sd in rows]
        xs = [100 * step / total for step, *_ in rows]
        look = dict(dash=f.arm.style, width=1, dots=not f.logged, notes=notes)
        lines.append(
            Line(f.arm.label, f.arm.colour, xs, *(ends if f.logged and len(found) <= 12 else ends[:1]), **look)
        )
    if not lines:
        return None
    late = [abs(y) for line in lines for x, y in zip(line.x, line.y, strict=True) if x >= 20]
    view = (-1.3 * max(late), 1.3 * max(late)) if late and max(late) > 0 else None
    title, marks = "Error of each forecast", [(0, "what was reached")]
    return Chart(title, "share of the steps done (%)", "forecast - reached (%)", lines, view=view, marks=marks)


def forecast_blocks(arms: list[Arm], figure) -> list[tuple]:
    """Blocks of the report, none where no run that ended can be forecast. ``figure``: `build.Report.charts`."""
    found = forecasts_of(arms)
    chart = fan_chart(found)
    parts = [figure("forecasts", [chart], NOTES["forecasts_figure"])] if chart else []
    for logged, kind in ((True, "logged on the way"), (False, "made afterwards")):
        grades = [g for f in found if f.logged == logged for g in f.grades]
        note = NOTES["forecasts"] if logged else NOTES["forecasts_afterwards"]
        parts += section(f"Forecasts {kind}", forecast_table(grades, note), kind="h3")
    table = run_table(found)
    parts += section("Run by run", table, kind="fold" if len(found) > MOST_ROWS else "h3")
    return section("Forecasts of every run", *parts) if found else []
