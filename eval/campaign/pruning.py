"""Stops runs that will hardly win, so that their hours go to others.

``forecast``: at fixed shares of its steps a run is asked whether it may still end better than the best that has ended;
where that has a chance of less than 2 % it is stopped. ``asha``: successive halving at a fixed share (the stopping
form of Li et al., 2020, "A System for Massively Parallel Hyperparameter Tuning"): a run whose loss there is not among
the best third of those that have come so far is stopped. `python -m schedules prune` plays both on recorded grids;
there ASHA lost the best run with earlier rungs than a third.

Only runs that answer one question, whose settings are equal, are compared, by the NLL of training. Ray's Tune and PBT
are left out: they own the loop and move weights between runs, and a script here owns its loop.
"""

import math
from collections.abc import Callable

from eval.campaign.progress import Run
from eval.campaign.recipe import Job, keeps
from schedules.learn import LAST, final_loss
from schedules.logs import Curve
from schedules.pruning import CHECKS, ETA, hopeless

RUNG = 1 / ETA
RULES = ("forecast", "asha")
COMPARED = ("ce", "brier", "dpsm")  # the losses that the criteria of the report compare


def kept(recipe: dict, todo: list[Job]) -> set[str]:
    """The names of the cells that are never pruned: those of the recipe's ``keep``. Without it, in a recipe of several
    losses, those of the losses that the report's criteria compare, and in one of a single loss none."""
    several = len({cell.config.get("loss") for cell in todo}) > 1
    names = recipe.get("keep", COMPARED if several else ())
    return {cell.name for cell in todo if any(keeps(name, cell) for name in names)}


def loss_at(curve: Curve, step: float, steps: int) -> float:
    """The mean NLL of the last points up to ``step``; inf where there are none."""
    late = curve.loss[(curve.step <= step) & (curve.step > step - max(LAST * steps, 0.1 * step))]
    return float(late.mean()) if len(late) else math.inf


class Pruner:
    """``rule``: one of RULES, or "" for none. ``kept``: names of runs that are never stopped. ``question(run)`` is
    equal for runs that are compared."""

    def __init__(self, rule: str, kept: set[str], question: Callable[[Run], object]):
        self.rule, self.kept, self.question = rule, kept, question
        self.asked: dict[str, float] = {}  # the share of its steps at which a run was last asked

    def why(self, run: Run, runs: list[Run]) -> str:
        """Why ``run``, which is on its way, is to be stopped; "" where it is not."""
        checks = [c for c in (CHECKS if self.rule == "forecast" else (RUNG,)) if c <= run.share < 1]
        if not self.rule or run.name in self.kept or run.curve is None or not checks:
            return ""
        if self.asked.get(run.name, 0.0) >= checks[-1]:
            return ""
        self.asked[run.name] = checks[-1]
        rivals = [r for r in runs if r is not run and r.curve is not None and self.question(r) == self.question(run)]
        return self._by_forecast(run, rivals) if self.rule == "forecast" else self._by_rung(run, rivals)

    def _by_forecast(self, run: Run, rivals: list[Run]) -> str:
        finals = [(final_loss(r.curve)[1], r.name) for r in rivals if r.state == "finished"]
        best, name = min(((loss, name) for loss, name in finals if math.isfinite(loss)), default=(math.inf, ""))
        if not hopeless(run.forecast, best):
            return ""
        chance = run.forecast.better_than(best)
        return f"P(better than {best:.4g} of {name}) = {chance:.2g} at {run.share:.0%}: {run.forecast}"

    def _by_rung(self, run: Run, rivals: list[Run]) -> str:
        there = [r for r in rivals if r.share >= RUNG]
        at = {r.name: loss_at(r.curve, RUNG * r.steps, r.steps) for r in (run, *there)}
        ahead = sum(loss < at[run.name] for loss in at.values())
        if len(at) < ETA or ahead < len(at) // ETA:
            return ""
        return f"NLL {at[run.name]:.4g} at {RUNG:.0%} is number {ahead + 1} of {len(at)}, not among the best 1 / {ETA}"
