"""The forecasts that runs logged on their way, against the loss that they reached: errors and coverage."""

import statistics
from typing import NamedTuple

from eval.report import plots
from eval.report.runs import Arm, Run, finite
from eval.report.tables import NOTES, Cell, Table, section, table_of
from schedules.forecast import student_quantile
from schedules.learn import FRACTIONS, LAST

WIDE = student_quantile(0.975)  # half of the 95 % interval, in sds


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


def reached(run: Run) -> float | None:
    """The mean NLL of training over the last 2 % of the steps, or the last log line where that is longer; None for a
    run that did not come to its last step."""
    total = finite(run.config.get("steps"))
    rows = [row for row in run.train if finite(row.get("nll")) is not None]
    if not rows or not total or rows[-1]["step"] < total:
        return None
    late = [row for row in rows if row["step"] > (1 - LAST) * total]
    return statistics.fmean(row["nll"] for row in late)


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


def forecast_table(grades: list[Graded]) -> Table | None:
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
    return table_of(heads, rows, note=NOTES["forecasts"]) if grades else None


def forecast_blocks(arms: list[Arm]) -> tuple[list[tuple], dict[str, bytes]]:
    """Blocks of the report and the figure, none where no run that ended has logged a forecast."""
    graded = [(arm.colour, graded_at) for arm in arms for run in arm.runs for graded_at in grade(run)]
    if not graded:
        return [], {}
    points = [(colour, g.fraction, g.reached, g.mean, WIDE * g.sd) for colour, g in graded if g.mean is not None]
    figure = {"forecasts": plots.forecasts(points)} if points else {}
    picture = (
        "figure",
        "forecasts",
        "What was forecast, with its 95 % interval, over what was reached; a colour an arm.",
    )
    return section("Forecasts", picture if points else None, forecast_table([grade for _, grade in graded])), figure
