"""Where will this run end? One answer from its log, with a picture of it, or the reason why there is none.

    python -m schedules forecast runs/NAME --at 20000 --schedule cosine
    python -m schedules forecast trainer_state.json                      # which knows its last step
    python -m schedules forecast wandb.csv --run warm-sun-12 --at 20000 --learn runs/earlier

Without --schedule the one is taken that the learning rates so far have followed, linear or cosine; where there is none
the last rate is held, and where the log has no rates it is allowed for that they come down.
"""

import argparse
from pathlib import Path

import numpy as np

from .backtest import add_columns, columns, draw_fan, read_all, write_atomically
from .forecast import Forecast, Forecaster
from .learn import LAST, feed
from .logs import Curve
from .rules import SCHEDULES, lr_factor
from .style import PALETTE, png, styled, thousands


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="a log, or a run folder")
    parser.add_argument(
        "--at", type=float, help="the step whose loss is asked for (default: the last of the run, if known)"
    )
    parser.add_argument(
        "--schedule", choices=SCHEDULES, help="of the learning rates to come; its peak is that of the log"
    )
    for name, what in (("warmup", 0.0), ("floor", 0.0), ("decay", 0.2)):
        parser.add_argument(f"--{name}", type=float, default=what, help=f"of the schedule, a share (default: {what:g})")
    parser.add_argument("--epoch", type=float, help="steps in an epoch (default: as the log says, or as the loss does)")
    parser.add_argument(
        "--finetune",
        action=argparse.BooleanOptionalAction,
        help="whether it is fine-tuning (default: as our run or the data say)",
    )
    parser.add_argument("--learn", nargs="+", default=[], metavar="RUN", help="finished runs like it, to learn from")
    parser.add_argument("--out", default="forecast.png", help="the picture (default: forecast.png)")
    add_columns(parser)


def run(args: argparse.Namespace) -> None:
    curves = read_all([args.file], **columns(args))
    if len(curves) > 1:
        names = ", ".join(curve.name.rpartition(":")[2] for curve in curves[:20])
        raise ValueError(f"{args.file} has {len(curves)} runs, give the log of one, or --run NAME: {names}")
    curve = curves[0]
    end = args.at or curve.total
    if end is None:
        raise ValueError(f"{args.file} does not say how long the run is; say at which step: --at STEP")
    for flag in ("warmup", "floor", "decay"):
        if not 0 <= getattr(args, flag) <= 1:
            raise ValueError(f"--{flag} {getattr(args, flag)}, expected a share in [0, 1]")
    finetune = curve.finetune if args.finetune is None else args.finetune
    options = {"epoch": args.epoch or curve.epoch, "finetune": finetune}
    forecaster = Forecaster.from_runs(args.learn, **options) if args.learn else Forecaster(**options)
    feed(forecaster, curve, len(curve.step))
    if args.schedule and curve.lr is None:
        raise ValueError(f"--schedule {args.schedule}: {args.file} has no learning rates to begin from; --lr COLUMN")
    plan, name, how = None, args.schedule, {"warmup": args.warmup, "floor": args.floor, "decay": args.decay}
    if name is None:
        name, how = followed(curve, end) or (None, {})
    if name is not None:
        steps = np.linspace(curve.step[-1], max(end, curve.step[-1] + 1), 1025)[1:]
        plan = [forecaster.peak * lr_factor(name, step, end, **how) for step in steps]
    width = max(int((curve.step > curve.step[-1] - LAST * end).sum()), 1)
    forecast = forecaster.forecast(end, plan, window=width)
    print(f"{curve.name}: {len(curve.step)} points, the last at step {curve.step[-1]:g}", end="")
    print(f" ({', '.join(curve.notes)})" if curve.notes else "")
    for note in forecast.notes:
        print(note)
    if curve.lr is not None:
        print(f"learning rate: {name or 'the last one is held; --schedule NAME says how it goes on'}")
    if forecast.mean is None:
        print(forecast)
        return
    low, high = forecast.interval(0.95)
    print(f"{forecast} at step {end:g} (68 %); 95 %: {low:.4g} to {high:.4g}")
    write_atomically(Path(args.out), fan(curve, forecast))
    print(f"wrote {args.out}")


def followed(curve: Curve, end: float) -> tuple[str, dict[str, float]] | None:
    """The schedule to ``end`` that the learning rates have followed after their peak, with its floor; None where they
    have not come down yet, or differ from every one tried by more than 3 % of the peak."""
    if curve.lr is None or not curve.lr.max() > 0 or not end > curve.step[-1]:
        return None
    lr, top = curve.lr / curve.lr.max(), int(np.argmax(curve.lr))
    if lr[-1] > 0.9:
        return None
    tried = []
    for name, floor in (("linear", 0.0), ("cosine", 0.0), ("linear", 0.1), ("cosine", 0.1)):
        how = {"warmup": float(curve.step[top] / end) if top else 0.0, "floor": floor}
        expected = np.array([lr_factor(name, step, end, **how) for step in curve.step[top:]])
        tried.append((float(np.abs(expected - lr[top:]).max()), name, how))
    gap, name, how = min(tried, key=lambda one: one[0])
    return (name, how) if gap < 0.03 else None


@styled
def fan(curve: Curve, forecast: Forecast) -> bytes:
    """The loss so far and the forecast, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 3.6), dpi=150, layout="constrained")
    panel = figure.subplots()
    panel.plot(curve.step, curve.loss, color="#b5b5b5", linewidth=0.8, label="recorded")
    draw_fan(panel, forecast, PALETTE[0], f"{forecast} (68 % and 95 %)")
    late = curve.loss[np.isfinite(curve.loss) & (curve.step > 0.05 * curve.step[-1])]
    high = max(float(np.quantile(late, 0.98)) if len(late) else forecast.mean, forecast.curve[0, 1])
    low = min(forecast.interval(0.95)[0], float(late.min()) if len(late) else forecast.mean)
    panel.set_ylim(low - 0.05 * (high - low), high + 0.1 * (high - low))
    panel.set(xlabel="step", ylabel="loss")
    panel.xaxis.set_major_formatter(thousands)
    panel.legend()
    return png(figure)
