"""Replays recorded loss curves: how far were forecasts made on the way from where the run ended?

    python -m schedules backtest curves/*.csv --out runs/backtest
    python -m schedules backtest curves/**/*.csv --plans plans.json --leave-out

A curve is a csv with a header or a jsonl file with `step`, a loss and, where known, the learning rate. The final loss
is the mean over the points in the last 2 % of the steps. Every method is asked for the loss at their mean step. `fot`
is given the learning rates to come, as a scheduler knows them; `fot-blind` holds the last one.
"""

import argparse
import csv
import fnmatch
import io
import itertools
import math
import os
from collections import defaultdict, namedtuple
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .forecast import Forecast, Forecaster, Prior, literal_forecast, student_quantile
from .rules import lr_factor
from .style import INK, PALETTE, png, styled, thousands
from .textlines import read_csv, read_json, read_rows

FRACTIONS = (0.1, 0.25, 0.5, 0.75)
SHIPPED = None  # the forecaster chooses by the regime
FLOORS = (0.0005, 0.001, 0.0015, 0.002, 0.003)
FAN_COLOURS = (PALETTE[4], PALETTE[3], PALETTE[0], PALETTE[2])  # from the first fraction to the last
ACROSS, PAGE = 3, 12  # panels in a row and in a picture
LAST = 0.02  # of the steps make the final loss
WIDE = student_quantile(0.975)  # half of the 95 % interval, in sds
STEP_NAMES = ("step", "_step")
LOSS_NAMES = ("loss", "val_loss", "train_loss")
LR_NAMES = ("lr", "learning_rate", "optim/learning_rate_group0")


class Curve(NamedTuple):
    name: str
    family: str  # the folder in which it differs from the other files
    step: np.ndarray  # [N] float64, increasing
    loss: np.ndarray  # [N] float64, may hold nan and inf
    lr: np.ndarray | None  # [N] float64


class Row(NamedTuple):
    """One forecast."""

    file: str
    family: str
    method: str
    fraction: float  # of the last step
    step: float  # of the last point that was seen
    end: float  # the step asked for
    final: float
    forecast: float | None
    sd: float | None
    planned: bool  # whether it used the learning rates to come
    reason: str

    @property
    def error(self) -> float | None:
        """Signed, in per cent of the final loss."""
        return None if self.forecast is None else 100 * (self.forecast - self.final) / abs(self.final)


def read_curve(path: str | Path, *, loss: str | None = None, family: str = "", plan: dict | None = None) -> Curve:
    """A csv (with a header) or jsonl file as a curve.

    ``loss``: its column; by default the first of loss, val_loss, train_loss and *CrossEntropyLoss that is there. Rows
    of a jsonl file that lack it, or are of another "kind" than the first that has it, are passed over. ``plan``:
    arguments of `lr_factor` ("schedule" for its name), for a file without learning rates. Raises ValueError with the
    line number for a line that cannot be read and for steps that do not increase."""
    path = Path(path)
    rows = list(read_csv(path) if path.suffix == ".csv" else _jsonl_rows(path))
    names = {name: None for _, row in rows for name in row}
    losses = (*LOSS_NAMES, *(n for n in names if n.endswith("CrossEntropyLoss")))
    wanted = (STEP_NAMES, (loss,) if loss else losses, LR_NAMES)
    found = [next((name for name in known if name in names), None) for known in wanted]
    if None in found[:2]:
        expected = loss or f"one of {', '.join(LOSS_NAMES)}, *CrossEntropyLoss"
        raise ValueError(f"{path}: columns {', '.join(names) or 'none'}; expected step and {expected}")
    if path.suffix != ".csv":
        rows = [(number, row) for number, row in rows if row.get(found[1]) is not None]
        rows = [(number, row) for number, row in rows if row.get("kind") == rows[0][1].get("kind")]
    points, last = [], -math.inf
    for number, row in rows:
        where = f"{path}, line {number}"
        step, value, *lr = (_number(where, name, row.get(name)) for name in found if name)
        if not last < step < math.inf:
            after = f" after step {last:g}" if points else ""
            raise ValueError(f"{where}: step {step:g}{after}; expected steps that increase")
        if lr and not 0 <= lr[0] < math.inf:
            raise ValueError(f"{where}: learning rate {lr[0]}; expected a finite number, 0 or more")
        points.append((step, value, *lr))
        last = step
    if len(points) < 2:
        raise ValueError(f"{path}: {len(points)} points, expected at least 2")
    steps, losses, *lrs = np.array(points).T
    if not lrs and plan:
        name, how = plan.get("schedule", "wsd"), {k: v for k, v in plan.items() if k != "schedule"}
        try:
            lrs = [np.array([lr_factor(name, step, last, **how) for step in steps])]
        except TypeError:
            raise ValueError(f"plan {plan}; expected schedule, warmup, floor, decay and power") from None
    return Curve(path.stem, family, steps, losses, lrs[0] if lrs else None)


def _jsonl_rows(path: Path) -> Iterator[tuple[int, dict]]:
    for number, row in read_rows(path, nan=True):
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: {str(row)[:40]!r} is not a JSON object")
        yield number, row


def _number(where: str, name: str, value) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{where}: {name} is {value!r}, expected a number") from None


def read_curves(files: list[str], *, loss: str | None = None, plans: dict | None = None) -> list[Curve]:
    """All ``files``; ``plans`` maps patterns of paths to plans (see `read_curve`), the first that matches holds."""
    parents = [Path(file).resolve().parent for file in files]
    common = Path(os.path.commonpath(parents)) if parents else Path()
    curves = []
    for file, parent in zip(files, parents, strict=True):
        family = next(iter(parent.relative_to(common).parts), common.name)
        plan = next((plan for pattern, plan in (plans or {}).items() if fnmatch.fnmatch(file, pattern)), None)
        curves.append(read_curve(file, loss=loss, family=family, plan=plan))
    return curves


def final_loss(curve: Curve) -> tuple[float, float, int]:
    """(step, final loss, number of points in its mean): the points in the last 2 % of the steps."""
    last = np.flatnonzero(curve.step > (1 - LAST) * curve.step[-1])
    return float(curve.step[last].mean()), float(curve.loss[last].mean()), len(last)


def halfway(curve: Curve, fraction: float, prior: Prior | None = SHIPPED) -> tuple[Forecaster, np.ndarray | None]:
    """The forecaster when ``fraction`` of the steps are done, and the learning rates to come until `final_loss`."""
    end, _, _ = final_loss(curve)
    seen = int(np.searchsorted(curve.step, fraction * curve.step[-1], side="right"))
    forecaster = Forecaster(prior=prior)
    forecaster.extend(curve.step[:seen], curve.loss[:seen], None if curve.lr is None else curve.lr[:seen])
    if curve.lr is None or not seen:
        return forecaster, None
    return forecaster, np.interp(np.linspace(curve.step[seen - 1], end, 1025)[1:], curve.step, curve.lr)


def fot_at(curve: Curve, fraction: float, *, planned: bool, prior: Prior | None) -> Forecast:
    """The forecast that `Forecaster` would have made when ``fraction`` of the steps were done."""
    end, _, width = final_loss(curve)
    forecaster, plan = halfway(curve, fraction, prior)
    return forecaster.forecast(end, plan if planned else None, window=width)


def slope(step: np.ndarray, loss: np.ndarray, end: float) -> float:
    """The least-squares line through the last fifth of the points."""
    tail = max(len(step) // 5, 2)
    per_step, now = np.polyfit(step[-tail:] - step[-1], loss[-tail:], 1)
    return float(now + per_step * (end - step[-1]))


def power(step: np.ndarray, loss: np.ndarray, end: float) -> float:
    """a (t + b)^-alpha by least squares in log space; nan for too few points and for losses that are not positive."""
    if len(step) < 4 or (loss <= 0).any():
        return math.nan
    fits = []
    for b in [1.0, *np.geomspace(0.003, 1.0, 9) * step[-1]]:
        A = np.stack([np.ones_like(step), np.log(step + b)], 1)
        x, *_ = np.linalg.lstsq(A, np.log(loss), rcond=None)
        fits.append((float(((A @ x - np.log(loss)) ** 2).sum()), math.exp(x[0] + x[1] * math.log(end + b))))
    return min(fits)[1]


# The loss at ``end`` from the finite points so far; nan for none. Persistence is the mean over the ``last`` steps.
RIVALS = {
    "persistence": lambda step, loss, end, last: float(loss[step > step[-1] - last].mean()),
    "slope": lambda step, loss, end, last: slope(step, loss, end),
    "literal": lambda step, loss, end, last: literal_forecast(step, loss, end),
    "power": lambda step, loss, end, last: power(step, loss, end),
}
METHODS = ("fot", "fot-blind", *RIVALS)


def replay(curve: Curve, prior: Prior | None = SHIPPED, fractions=FRACTIONS, methods=METHODS) -> list[Row]:
    """Every method's forecast of the final loss at every fraction of the run."""
    end, final, _ = final_loss(curve)
    if not math.isfinite(final):
        raise ValueError(f"{curve.name}: the final loss is {final}, there is nothing to be near to")
    rows = []
    for fraction, method in itertools.product(fractions, methods):
        keep = (curve.step <= fraction * curve.step[-1]) & np.isfinite(curve.loss)
        step, loss = curve.step[keep], curve.loss[keep]
        now = float(step[-1]) if len(step) else math.nan
        if method not in RIVALS:
            forecast = fot_at(curve, fraction, planned=method == "fot", prior=prior)
            made = forecast.mean, forecast.sd, forecast.planned, forecast.reason
        elif len(step) < 2:
            made = None, None, False, f"{len(step)} points"
        else:
            value = RIVALS[method](step, loss, end, LAST * curve.step[-1])
            made = (value, None, False, "") if math.isfinite(value) else (None, None, False, "left the law's domain")
        rows.append(Row(curve.name, curve.family, method, fraction, now, end, final, *made))
    return rows


Summary = namedtuple("Summary", "n none median worst bias ratio cover68 cover95")


def summarize(rows: list[Row], rows_all: list[Row]) -> Summary:
    """What the forecasts ``rows`` (of one method, from one fraction) are worth.

    ``n`` were made and ``none`` were not. ``median`` and ``worst`` are of the absolute error and ``bias`` is the mean
    error, in per cent of the final loss. ``ratio``: median over that of persistence on the same curves, which is looked
    up in ``rows_all``. ``cover68``, ``cover95``: shares of finals inside the intervals. nan where there is none."""
    made = [row for row in rows if row.forecast is not None]
    if not made:
        return Summary(0, len(rows), *[math.nan] * 6)
    errors = np.array([row.error for row in made])
    same = {(row.file, row.family, row.fraction) for row in made}
    base = [abs(r.error) for r in rows_all if r.method == "persistence" and (r.file, r.family, r.fraction) in same]
    # An sd of 0 is an interval too, and covers nothing but the point.
    misses = [(abs(row.forecast - row.final), row.sd) for row in made if row.sd is not None]
    cover = [float(np.mean([e <= limit * sd for e, sd in misses])) if misses else math.nan for limit in (1.0, WIDE)]
    median, worst = float(np.median(np.abs(errors))), float(np.abs(errors).max())
    ratio = median / max(float(np.median(base)), 1e-12) if base else math.nan
    return Summary(len(made), len(rows) - len(made), median, worst, float(errors.mean()), ratio, *cover)


def summary_text(rows: list[Row]) -> str:
    """The summary of every method at every fraction as text."""
    lines = ["at    method       n  none  median %  worst %   bias %  /persist  in 68 %  in 95 %"]
    for fraction, method in itertools.product(FRACTIONS, METHODS):
        if group := [row for row in rows if (row.fraction, row.method) == (fraction, method)]:
            s = summarize(group, rows)
            name = method + ("*" if any(row.planned for row in group) else "")
            cells = [_cell(s.median, "9", 2), _cell(s.worst, "8", 2), _cell(s.bias, "+8", 2), _cell(s.ratio, "9", 2)]
            cells += [_cell(100 * share, "8", 0) for share in (s.cover68, s.cover95)]
            lines.append(f"{fraction:<5.0%} {name:<11} {s.n:>2} {s.none:>5} " + " ".join(cells))
    return "\n".join(lines)


def groups_text(rows: list[Row], method: str = "fot") -> str:
    """A line for every family: at each fraction the share of its curves that ``method`` had a forecast for, the median
    absolute error in per cent, and the shares of finals inside the 68 % and the 95 % interval, all in per cent."""
    head = "".join(f" | {f'from {fraction:.0%}':<23}" for fraction in FRACTIONS)
    cells = " | share   med.   68   95 " * len(FRACTIONS)
    lines = [f"{method:<24} n{head}".rstrip(), f"{'':<26}{cells}".rstrip()]
    for family in dict.fromkeys(row.family for row in rows):
        mine = [row for row in rows if (row.family, row.method) == (family, method)]
        text = f"{family[:22]:<22} {len(mine) // len(FRACTIONS):>3}"
        for fraction in FRACTIONS:
            group = [row for row in mine if row.fraction == fraction]
            s = summarize(group, [])
            inside = [_cell(100 * share, "5", 0) for share in (s.cover68, s.cover95)]
            text += f" | {100 * s.n / len(group):4.0f}% {_cell(s.median, '6', 2)}" + "".join(inside)
        lines.append(text)
    return "\n".join(lines)


def _cell(value: float, width: str, digits: int) -> str:
    if math.isnan(value):
        return "-".rjust(int(width))
    return f"{value:{width}.{digits}f}" if abs(value) < 1e4 else f"{value:{width}.1e}"


@styled
def fans(curves: list[Curve]) -> bytes:
    """A panel a curve: the loss, and from each fraction of it the forecast with the 68 % and the 95 % interval."""
    from matplotlib.figure import Figure

    rows = math.ceil(len(curves) / ACROSS)
    figure = Figure(figsize=(4.6 * ACROSS, 2.9 * rows + 0.5), dpi=110, layout="constrained")
    panels = figure.subplots(rows, ACROSS, squeeze=False).ravel()
    for panel, curve in zip(panels, curves, strict=False):
        end, final, _ = final_loss(curve)
        panel.plot(curve.step, curve.loss, color="#b5b5b5", linewidth=0.8, label="recorded")
        bounds = [final]
        for fraction, colour in zip(FRACTIONS, FAN_COLOURS, strict=True):
            forecast = fot_at(curve, fraction, planned=True, prior=SHIPPED)
            if forecast.mean is None:
                continue
            step, mean, sd = forecast.curve.T
            for width, alpha in ((WIDE, 0.13), (1.0, 0.25)):
                panel.fill_between(step, mean - width * sd, mean + width * sd, color=colour, alpha=alpha, linewidth=0)
            panel.plot(step, mean, color=colour, linewidth=1.4, label=f"from {fraction:.0%}")
            bounds += [mean.min(), mean[0]]
        panel.plot(end, final, "o", color=INK, markersize=4, label="final")
        finite = curve.loss[np.isfinite(curve.loss) & (curve.step > FRACTIONS[0] * curve.step[-1])]
        low, high = min(bounds), max(*bounds, *(np.quantile(finite, [0.9]) if len(finite) else []))
        margin = 0.12 * (high - low) + 1e-9
        panel.set_ylim(low - margin, high + margin)
        panel.set_title(f"{curve.family}: {curve.name}"[:52], fontsize=8)
        panel.xaxis.set_major_formatter(thousands)
    for panel in panels[len(curves) :]:
        panel.set_visible(False)
    handles = {label: h for p in panels for h, label in zip(*p.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles))
    return png(figure)


def learn_prior(curves: list[Curve]) -> Prior:
    """The shipped prior with what ``curves`` teach; every family weighs the same.

    The mean and sd of k / loss are from whole runs whose learning rate came down by at least 30 %, fitted with no prior
    on k. The floor of the sd is then the smallest of `FLOORS` with which 68 % of the finals are inside one standard
    deviation of the forecasts at half and at three quarters. Raises ValueError when no learning rate came down."""
    shares = defaultdict(list)
    for curve in curves:
        if curve.lr is None or curve.lr[-1] > 0.7 * curve.lr.max():
            continue
        forecast = halfway(curve, 1.0, Prior()._replace(k_sd=10.0))[0].forecast(curve.step[-1] + 1)
        if forecast.mean is not None:
            shares[curve.family].append(forecast.parameters["k"] / forecast.mean)
    if not shares:
        raise ValueError("no curve with a learning rate that came down, nothing to learn a prior from")
    k_mean = _family_mean(shares)
    k_sd = math.sqrt(_family_mean({family: (np.array(k) - k_mean) ** 2 for family, k in shares.items()}))
    prior = Prior()._replace(k_mean=k_mean, k_sd=max(k_sd, 0.001))
    known = [curve for curve in curves if curve.lr is not None]
    stops = [(curve, *halfway(curve, fraction, prior)) for curve in known for fraction in (0.5, 0.75)]
    for floor in FLOORS:
        inside = defaultdict(list)
        for curve, forecaster, plan in stops:
            end, final, width = final_loss(curve)
            forecaster.prior = prior._replace(floor=floor)
            forecast = forecaster.forecast(end, plan, window=width)
            if forecast.mean is not None:
                inside[curve.family].append(abs(forecast.mean - final) < forecast.sd)
        if inside and _family_mean(inside) >= 0.68:
            break
    return prior._replace(floor=floor)


def _family_mean(values: dict[str, Sequence]) -> float:
    """The mean over families of their means."""
    return float(np.mean([np.mean(v) for v in values.values()]))


def left_out(curves: list[Curve]) -> dict[str, Prior]:
    """For every family the prior that the other families teach. Raises ValueError for fewer than two."""
    families = list(dict.fromkeys(curve.family for curve in curves))
    if len(families) < 2:
        raise ValueError(f"--leave-out needs curves from two folders or more, all are in {families[0]}")
    return {family: learn_prior([curve for curve in curves if curve.family != family]) for family in families}


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", help="csv or jsonl curves")
    parser.add_argument("--out", default="runs/backtest", help="folder for the results (default: runs/backtest)")
    parser.add_argument("--loss", help="column of the loss (default: loss, val_loss, train_loss, *CrossEntropyLoss)")
    parser.add_argument("--plans", help="json: pattern of paths -> schedule, warmup, floor, ...; for files without lr")
    parser.add_argument("--leave-out", action="store_true", help="again, each family with a prior learnt on the others")


def run(args: argparse.Namespace) -> None:
    curves = read_curves(args.files, loss=args.loss, plans=_read_plans(args.plans) if args.plans else {})
    priors = {"prior: as shipped": {curve.family: SHIPPED for curve in curves}}
    if args.leave_out:
        priors["prior: learnt on the other families"] = left_out(curves)
    out = Path(args.out)
    for (title, prior), name in zip(priors.items(), ("forecasts.csv", "forecasts-left-out.csv"), strict=False):
        rows = [row for curve in curves for row in replay(curve, prior[curve.family])]
        print(f"\n{title}; {len(curves)} curves (* = given the learning rates to come)\n{summary_text(rows)}")
        for family, p in prior.items() if 1 < len(prior) < 10 and args.leave_out else ():
            mine = [row for row in rows if row.family == family and row.method.startswith("fot")]
            learnt = f"k = {p.k_mean:.4f} +- {p.k_sd:.4f}, floor {p.floor:g} of the loss" if p else "prior as shipped"
            print(f"\n{family} ({learnt})\n{summary_text(mine)}")
        for method in ("fot", "fot-blind"):
            print(f"\n{groups_text(rows, method)}")
        write_rows(rows, out / name)
    for page, first in enumerate(range(0, len(curves), PAGE), 1):
        write_atomically(out / f"fans-{page}.png", fans(curves[first : first + PAGE]))
    print(f"\nevery forecast and the fans are in {out}/")


def write_rows(rows: list[Row], path: Path) -> None:
    """Every forecast as a line of csv; an empty field where there is none."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*Row._fields, "error_percent"])
    writer.writerows([*row, row.error] for row in rows)
    write_atomically(path, text.getvalue().encode())


def write_atomically(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data)
    os.replace(partial, path)


def _read_plans(path: str) -> dict:
    plans = read_json(path)
    if not isinstance(plans, dict) or not all(isinstance(plan, dict) for plan in plans.values()):
        raise ValueError(f'{path}: expected an object such as {{"*run1*": {{"schedule": "wsd", "decay": 0.2}}}}')
    return plans
