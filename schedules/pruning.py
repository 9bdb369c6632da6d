"""Stops runs that a forecast says will not win, and what that would have saved on recorded grids.

    python -m schedules prune runs --out runs/prune

`hopeless` is what a campaign calls on the way. The command plays recorded grids, each family of curves one, in many
random orders: the runs come one after the other, the first to its end, and each later one is asked at shares of its
steps whether it may still end better than the best so far. Beside it stands ASHA (Li et al., 2020, "A System for
Massively Parallel Hyperparameter Tuning") with one worker on the same grids in the same orders.
"""

import argparse
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .backtest import add_columns, columns, read_all
from .forecast import Forecast, Forecaster
from .learn import LAST, feed, final_loss, stop_at
from .logs import Curve

CHECKS = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9)  # of its steps: when a run is asked
CHANCES = (0.01, 0.02, 0.05, 0.1)  # below which it is stopped
ETA, RUNGS = 3, 3  # ASHA: one in ETA is promoted, up to RUNGS times


def hopeless(forecast: Forecast, best: float, chance: float = 0.02) -> bool:
    """Whether the probability that the run ends below ``best``, the lowest final loss so far, is less than ``chance``.

    Never without a forecast, nor before a run has ended (``best`` infinite). Raises ValueError for a chance outside
    (0, 1)."""
    if not 0 < chance < 1:
        raise ValueError(f"chance={chance}, expected more than 0 and less than 1")
    won = forecast.better_than(best)
    return won is not None and won < chance


class Arm(NamedTuple):
    """A recorded run as both rules see it."""

    final: float
    forecasts: list[Forecast]  # at CHECKS
    rungs: list[float]  # the loss at ASHA's rungs, the last is the end's


class Played(NamedTuple):
    """What a rule made of one order of the runs; compute in whole runs."""

    compute: float
    final: float  # the best loss among the runs that it let end


def arm_of(curve: Curve) -> Arm:
    _, final, _ = final_loss(curve)
    forecasts = []
    for share in CHECKS:
        stop = stop_at(curve, share)
        forecaster = feed(Forecaster(epoch=curve.epoch, finetune=curve.finetune), curve, stop.seen)
        forecasts.append(forecaster.forecast(stop.end, stop.plan, window=stop.width))
    rungs = []
    for k in range(RUNGS, -1, -1):
        at = curve.step[-1] / ETA**k
        late = curve.loss[(curve.step <= at) & (curve.step > at - max(LAST * curve.step[-1], 0.1 * at))]
        rungs.append(float(np.nanmean(late)) if np.isfinite(late).any() else math.inf)
    return Arm(final, forecasts, [*rungs[:-1], final])


def play_forecasts(arms: Sequence[Arm], order: Sequence[int], chance: float) -> Played:
    """One run after the other; a run is stopped at the first of CHECKS at which it is hopeless."""
    compute, best = 0.0, math.inf
    for i in order:
        for share, forecast in zip(CHECKS, arms[i].forecasts, strict=True):
            if hopeless(forecast, best, chance):
                compute += share
                break
        else:
            compute += 1.0
            best = min(best, arms[i].final)
    return Played(compute, best)


def play_asha(arms: Sequence[Arm], order: Sequence[int], rungs: int = RUNGS) -> Played:
    """One worker, the first rung at ETA^-``rungs`` of a run: it promotes from the highest rung that has one in its best
    1 / ETA, else begins the next run, and ends when there is neither. If nothing came to its end, the best run of the
    highest rung is then finished."""
    shares, first = [ETA**-k for k in range(rungs, -1, -1)], RUNGS - rungs  # of a run; that of Arm.rungs
    at: list[list[int]] = [[] for _ in shares]  # the runs that have come to a rung
    promoted: list[set] = [set() for _ in shares]
    compute, waiting = 0.0, list(order)[::-1]
    while True:
        for k in range(rungs - 1, -1, -1):
            best = sorted(at[k], key=lambda i: arms[i].rungs[first + k])[: len(at[k]) // ETA]
            if free := [i for i in best if i not in promoted[k]]:
                promoted[k].add(free[0])
                at[k + 1].append(free[0])
                compute += shares[k + 1] - shares[k]
                break
        else:
            if not waiting:
                break
            at[0].append(waiting.pop())
            compute += shares[0]
    if not at[-1]:
        k = max(k for k in range(rungs) if at[k])
        winner = min(at[k], key=lambda i: arms[i].rungs[first + k])
        compute += 1 - shares[k]
        at[-1].append(winner)
    return Played(compute, min(arms[i].final for i in at[-1]))


def table(arms: Sequence[Arm], orders: int = 1000, seed: int = 0) -> list[tuple[str, float, float, float, float]]:
    """(rule, compute saved, best arm lost, mean and worst regret in per cent of the best final) over random orders."""
    rng = np.random.default_rng(seed)
    drawn = [rng.permutation(len(arms)) for _ in range(orders)]
    best = min(arm.final for arm in arms)
    rules = [(f"forecast, P < {chance:g}", play_forecasts, chance) for chance in CHANCES]
    rules += [(f"ASHA from 1/{ETA**rungs}", play_asha, rungs) for rungs in range(RUNGS, 0, -1)]
    rows = []
    for name, play, setting in rules:
        played = [play(arms, order, setting) for order in drawn]
        saved = 1 - np.mean([p.compute for p in played]) / len(arms)
        regrets = np.array([100 * (p.final - best) / abs(best) for p in played])
        rows.append((name, float(saved), float((regrets > 0).mean()), float(regrets.mean()), float(regrets.max())))
    return rows


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", help="logs, or folders of them; a folder is a grid")
    parser.add_argument("--orders", type=int, default=1000, help="random orders of the runs (default: 1000)")
    add_columns(parser)


def run(args: argparse.Namespace) -> None:
    if args.orders < 1:
        raise ValueError(f"--orders {args.orders}, expected at least 1")
    curves = [curve for curve in read_all(args.files, **columns(args)) if math.isfinite(final_loss(curve)[1])]
    grids = {family: [c for c in curves if c.family == family] for family in dict.fromkeys(c.family for c in curves)}
    if not any(len(grid) > 1 for grid in grids.values()):
        raise ValueError("no folder with two runs that ended in a finite loss, there is nothing to prune")
    print(f"{'grid':<26} runs  {'rule':<20} saved %  best lost %  regret %  worst %")
    for family, grid in grids.items():
        if len(grid) > 1:
            arms = [arm_of(curve) for curve in grid]
            for name, saved, lost, regret, worst in table(arms, args.orders):
                print(
                    f"{family[:26]:<26} {len(grid):>4}  {name:<20} {100 * saved:7.1f} {100 * lost:12.1f} "
                    f"{regret:9.3f} {worst:8.2f}"
                )
