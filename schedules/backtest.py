"""Replays recorded loss curves: how far were forecasts made on the way from where the run ended?

    python -m schedules backtest runs other_runs/trainer_state.json --out runs/backtest
    python -m schedules backtest curves --plans plans.json --leave-out --leave-run-out

Curves are read from the logs that people have (logs.py), files and folders of them. The final loss is the mean over the
points in the last 2 % of the steps. Every method of METHODS is asked for the loss at their mean step. The learning
rates in a log are the plan that `fot` is given; --plans says them where the log has none.
"""

import argparse
import csv
import fnmatch
import io
import itertools
import math
import os
import sys
import textwrap
from collections import Counter, namedtuple
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .forecast import FINETUNING, Forecast, Forecaster, Prior, literal_forecast, student_quantile
from .learn import FRACTIONS, LAST, feed, final_loss, learn_prior, stop_at
from .logs import Curve, log_files, read_curves
from .rules import lr_factor
from .style import INK, PALETTE, png, styled, thousands
from .textlines import read_json

SHIPPED = None  # the forecaster chooses by the regime
FAN_COLOURS = (PALETTE[4], PALETTE[3], PALETTE[0], PALETTE[2])  # from the first fraction to the last
ACROSS, PAGE = 3, 12  # panels in a row and in a picture
WIDE = student_quantile(0.975)  # half of the 95 % interval, in sds


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


def legend() -> str:
    """What the methods and the columns of the tables are."""
    says = {f"{name}": what for name, what in METHODS.items()} | {
        "n, none": "curves with a forecast, and without one",
        "%": "of the final loss; bias is the mean error, median and worst are of its size",
        "/persist": "the median error over that of persistence on the same curves",
        "in 68 %": "the share of the finals inside that interval, in per cent; in 95 % likewise",
    }
    return "\n".join(f"  {name:<12} {what}" for name, what in says.items())


def read_all(
    paths: list[str], *, plans: dict | None = None, step: str = "", loss: str = "", lr: str = "", run: str = ""
) -> list[Curve]:
    """The curves of files and of the logs in folders (see logs.py), each with its family.

    ``plans`` maps patterns of paths to arguments of `lr_factor` ("schedule" for its name) for logs without learning
    rates; the first that matches holds. A file in a folder that has no curve is passed over, and said."""
    files = log_files(paths)
    parents = [(file if _own_name(file) else file.parent).resolve().parent for file in files]
    common = Path(os.path.commonpath(parents)) if parents else Path()
    curves = []
    origins = []
    for file, parent in zip(files, parents, strict=True):
        family = next(iter(parent.relative_to(common).parts), common.name)
        try:
            found = read_curves(file, step=step, loss=loss, lr=lr, run=run, family=family)
        except ValueError as error:
            if str(file) in map(str, paths):
                raise
            print(f"passed over: {error}", file=sys.stderr)
            continue
        plan = next((plan for pattern, plan in (plans or {}).items() if fnmatch.fnmatch(str(file), pattern)), None)
        curves += [_planned(curve, plan) if plan and curve.lr is None else curve for curve in found]
        origins += [file.resolve().relative_to(common) if common in file.resolve().parents else file] * len(found)
    if not curves:
        raise ValueError(f"{', '.join(paths)}: no curve in any of {len(files)} files")
    alike = Counter((curve.family, curve.name) for curve in curves)
    return [  # two that are called alike by where they are
        curve if alike[curve.family, curve.name] == 1 else curve._replace(name=f"{origin.with_suffix('')}")
        for curve, origin in zip(curves, origins, strict=True)
    ]


def _own_name(file: Path) -> bool:
    """Whether the file's own name says which run it is, not its folder's."""
    return not file.name.startswith(("metrics.", "trainer_"))


def _planned(curve: Curve, plan: dict) -> Curve:
    name, how = plan.get("schedule", "wsd"), {k: v for k, v in plan.items() if k != "schedule"}
    try:
        return curve._replace(lr=np.array([lr_factor(name, step, curve.step[-1], **how) for step in curve.step]))
    except TypeError:
        raise ValueError(f"plan {plan}; expected schedule, warmup, floor, decay and power") from None


def fot_at(curve: Curve, fraction: float, *, planned: bool, prior: Prior | None) -> Forecast:
    """The forecast that `Forecaster` would have made when ``fraction`` of the steps were done."""
    stop = stop_at(curve, fraction)
    forecaster = feed(Forecaster(prior=prior, epoch=curve.epoch, finetune=curve.finetune), curve, stop.seen)
    return forecaster.forecast(stop.end, stop.plan if planned else None, window=stop.width)


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
METHODS = {  # name -> what it is
    "fot": "the forecaster, given the learning rates to come (fot*: where the log or --plans has them)",
    "fot-blind": "the same, which holds the last learning rate",
    "persistence": f"the mean over the last {LAST:.0%} of the steps so far",
    "slope": "the line through the last fifth of the points",
    "literal": "a (t + b)^-alpha through the last 150 points, FoT's rule as proposed",
    "power": "a (t + b)^-alpha through all points",
}


def replay(curve: Curve, prior: Prior | None = SHIPPED, fractions=FRACTIONS, methods=METHODS) -> list[Row]:
    """Every method's forecast of the final loss at every fraction of the run."""
    end, final, _ = final_loss(curve)
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
    from matplotlib.patches import Patch

    rows = math.ceil(len(curves) / ACROSS)
    figure = Figure(figsize=(4.6 * ACROSS, 2.9 * rows + 0.5), dpi=110, layout="constrained")
    panels = figure.subplots(rows, ACROSS, squeeze=False).ravel()
    for panel, curve in zip(panels, curves, strict=False):
        end, final, _ = final_loss(curve)
        panel.plot(curve.step, curve.loss, color="#b5b5b5", linewidth=0.6, zorder=0.5, label="recorded")
        bounds = [final]
        for fraction, colour in zip(FRACTIONS, FAN_COLOURS, strict=True):
            forecast = fot_at(curve, fraction, planned=True, prior=SHIPPED)
            if forecast.mean is None:
                continue
            draw_fan(panel, forecast, colour, f"from {fraction:.0%}")
            bounds += [forecast.curve[:, 1].min(), forecast.curve[0, 1]]
        panel.plot(end, final, "o", color=INK, markersize=4, label="final")
        finite = curve.loss[np.isfinite(curve.loss) & (curve.step > FRACTIONS[0] * curve.step[-1])]
        low, high = min(bounds), max(*bounds, *(np.quantile(finite, [0.9]) if len(finite) else []))
        margin = 0.12 * (high - low) + 1e-9
        panel.set_ylim(low - margin, high + margin)
        panel.set_title(title(curve), fontsize=8)
        panel.set_xlabel("optimizer step", fontsize=8)
        panel.set_ylabel("loss", fontsize=8)
        panel.xaxis.set_major_formatter(thousands)
    for panel in panels[len(curves) :]:
        panel.set_visible(False)
    handles = {label: h for p in panels for h, label in zip(*p.get_legend_handles_labels(), strict=True)}
    handles["68 % and 95 % interval"] = Patch(color=INK, alpha=0.2, linewidth=0)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles))
    return png(figure)


def title(curve: Curve) -> str:
    """The family and the whole name of a curve, in as many lines as that takes."""
    return "\n".join(textwrap.wrap(f"{curve.family}: {curve.name}", 56))


def draw_fan(panel, forecast: Forecast, colour: str, label: str) -> None:
    """The forecast's mean and its 68 % and 95 % intervals from now to the end."""
    step, mean, sd = forecast.curve.T
    for width, alpha in ((WIDE, 0.13), (1.0, 0.25)):
        panel.fill_between(step, mean - width * sd, mean + width * sd, color=colour, alpha=alpha, linewidth=0)
    panel.plot(step, mean, color=colour, linewidth=1.4, label=label)


def left_out(curves: list[Curve]) -> dict[str, Prior]:
    """For every family the prior that the other families teach. Raises ValueError for fewer than two."""
    families = list(dict.fromkeys(curve.family for curve in curves))
    if len(families) < 2:
        raise ValueError(f"--leave-out needs curves from two folders or more, all are in {families[0]}")
    return {family: _learnt([curve for curve in curves if curve.family != family]) for family in families}


def leave_one_out(curves: list[Curve]) -> list[tuple[Curve, Prior]]:
    """Each curve with the prior that five others of its family teach, those before it in the list and, at its head, the
    last ones. Families of fewer than three are left out."""
    jobs, pairs = [], []
    for family in dict.fromkeys(curve.family for curve in curves):
        runs = [curve for curve in curves if curve.family == family]
        others = [[*runs[i + 1 :], *runs[:i]][-5:] for i in range(len(runs))]
        jobs += zip(runs, others, strict=True) if len(runs) > 2 else []
    if not jobs:
        raise ValueError("--leave-run-out needs families of three runs or more")
    for curve, five in jobs:
        pairs.append((curve, _learnt(five)))
        print(f"{len(pairs)} of {len(jobs)} priors learnt", file=sys.stderr)
    return pairs


def _learnt(curves: list[Curve]) -> Prior:
    return learn_prior(curves, (Prior(), FINETUNING), lambda epoch: Forecaster(epoch=epoch))


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", help="logs, or folders of them")
    parser.add_argument("--out", default="runs/backtest", help="folder for the results (default: runs/backtest)")
    add_columns(parser)
    parser.add_argument("--plans", help="json: pattern of paths -> schedule, warmup, floor, ...; for files without lr")
    parser.add_argument("--leave-out", action="store_true", help="again, each family with a prior learnt on the others")
    parser.add_argument(
        "--leave-run-out", action="store_true", help="again, each run with a prior learnt on five others of its family"
    )


def add_columns(parser: argparse.ArgumentParser) -> None:
    """The flags that name columns, as `read_all` takes them."""
    for name, what in (("step", "step"), ("loss", "loss"), ("lr", "learning rate")):
        parser.add_argument(f"--{name}", default="", help=f"column of the {what} (default: by the usual names)")
    parser.add_argument("--run", dest="only", default="", help="of a file with several runs, this one")


def columns(args: argparse.Namespace) -> dict[str, str]:
    """What `add_columns` added, as keywords of `read_all`."""
    return {"step": args.step, "loss": args.loss, "lr": args.lr, "run": args.only}


def run(args: argparse.Namespace) -> None:
    curves = read_all(args.files, plans=_read_plans(args.plans) if args.plans else {}, **columns(args))
    finals = [final_loss(curve)[1] for curve in curves]
    if not any(map(math.isfinite, finals)):
        raise ValueError(f"{curves[0].name}: the final loss is {finals[0]}, there is nothing to be near to")
    for curve, final in zip(curves, finals, strict=True):
        notes = [*curve.notes] + [f"passed over, the final loss is {final}"] * (not math.isfinite(final))
        if notes:
            print(f"{curve.family}, {curve.name}: {', '.join(notes)}")
    curves = [curve for curve, final in zip(curves, finals, strict=True) if math.isfinite(final)]
    tries = [("prior: as shipped", "forecasts.csv", [(curve, SHIPPED) for curve in curves])]
    if args.leave_out:
        priors = left_out(curves)
        for family, p in priors.items():
            print(f"for {family}, learnt on the others: {p}")
        pairs = [(curve, priors[curve.family]) for curve in curves]
        tries.append(("prior: learnt on the other families", "forecasts-left-out.csv", pairs))
    if args.leave_run_out:
        pairs = leave_one_out(curves)
        tries.append(("prior: learnt on five other runs of the family", "forecasts-run-left-out.csv", pairs))
    out = Path(args.out)
    if blind := sum(curve.lr is None for curve in curves):
        print(f"{blind} of {len(curves)} curves have no learning rates for fot to be given; --plans says them")
    for prior_of, name, pairs in tries:
        rows = [row for curve, prior in pairs for row in replay(curve, prior)]
        print(f"\n{prior_of}; {len(pairs)} curves\n{summary_text(rows)}")
        for method in ("fot", "fot-blind"):
            print(f"\n{groups_text(rows, method)}")
        write_rows(rows, out / name)
    for page, first in enumerate(range(0, len(curves), PAGE), 1):
        write_atomically(out / f"fans-{page}.png", fans(curves[first : first + PAGE]))
    print(f"\n{legend()}\n\nevery forecast and the fans are in {out}/")


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
    plans = read_json(path, dict)
    if not all(isinstance(plan, dict) for plan in plans.values()):
        raise ValueError(f'{path}: expected an object such as {{"*run1*": {{"schedule": "wsd", "decay": 0.2}}}}')
    return plans
