"""Recorded runs stopped on the way, and the prior that would have forecast their ends best from there."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from .law import SCALE
from .logs import Curve

FRACTIONS = (0.1, 0.25, 0.5, 0.75)
LAST = 0.02  # of the steps make the final loss
# What is tried for each field of the prior, in this order, twice.
TRIED = {
    "bend": (-0.02, -0.01, 0.01, 0.02, 0.04, 0.06),
    "k_mean": (0.0, 0.01, 0.02, 0.03, 0.045, 0.06),
    "k_sd": (0.004, 0.008, 0.02),
    "a_mean": (0.05, 0.1, 0.2, 0.3),
    "a_sd": (0.03, 0.2),
    "alpha": (0.3, 0.45, 0.9, 1.2),
    "tau": (30.0, 300.0),
    "floor": (0.001, 0.004, 0.008),
    "young": (0.003, 0.007, 0.03),
    "drift": (0.0, 0.005, 0.02, 0.06),
    "plateau": (0.0,),
}
MARGIN = 0.03  # of the score, by which a value must be better than the one before
NO_FORECAST = 4.0  # the score of a stop without a forecast


class Stop(NamedTuple):
    """A curve when a fraction of its steps are done."""

    seen: int  # points
    end: float  # the step whose loss is asked for
    final: float  # the loss there: the mean over the last 2 % of the steps
    width: int  # the points in that mean
    plan: np.ndarray | None  # [1024] learning rates from there to the end, where the log has them


def final_loss(curve: Curve) -> tuple[float, float, int]:
    """(step, final loss, number of points in its mean): the points in the last 2 % of the steps."""
    last = np.flatnonzero(curve.step > (1 - LAST) * curve.step[-1])
    return float(curve.step[last].mean()), float(curve.loss[last].mean()), len(last)


def stop_at(curve: Curve, fraction: float) -> Stop:
    """The curve when ``fraction`` of its last step is done."""
    end, final, width = final_loss(curve)
    seen = int(np.searchsorted(curve.step, fraction * curve.step[-1], side="right"))
    plan = None
    if curve.lr is not None and seen:
        plan = np.interp(np.linspace(curve.step[seen - 1], end, 1025)[1:], curve.step, curve.lr)
    return Stop(seen, end, final, width, plan)


def feed(forecaster, curve: Curve, seen: int):
    """The forecaster with the first ``seen`` points of ``curve``."""
    forecaster.extend(curve.step[:seen], curve.loss[:seen], None if curve.lr is None else curve.lr[:seen])
    return forecaster


def learn_prior(curves: Sequence[Curve], bases: Sequence, make: Callable):
    """The prior whose forecasts of ``curves`` at FRACTIONS would have had the best mean logarithmic score.

    Coordinate descent from the better of ``bases`` over TRIED; a value is taken where it gains MARGIN. ``make``
    (epoch) gives an empty forecaster. Raises ValueError for fewer than two curves that end in a finite loss."""
    curves = [curve for curve in curves if math.isfinite(final_loss(curve)[1])]
    if len(curves) < 2:
        raise ValueError(f"{len(curves)} finished runs with a finite loss, at least 2 are needed to learn a prior from")
    stops = []
    for curve in curves:
        for fraction in FRACTIONS:
            stop = stop_at(curve, fraction)
            stops.append((feed(make(curve.epoch), curve, stop.seen), stop))

    def score(prior) -> float:
        """Student's t with 4 degrees of freedom, of the error relative to the loss; lower is better."""
        total = 0.0
        for forecaster, stop in stops:
            forecaster.prior = prior
            forecast = forecaster.forecast(stop.end, stop.plan, window=stop.width)
            if forecast.mean is None:
                total += NO_FORECAST
            else:
                z = SCALE * (stop.final - forecast.mean) / forecast.sd
                total += math.log(forecast.sd / abs(stop.final)) + 2.5 * math.log1p(z * z / 4)
        return total / len(stops)

    best, prior = min((score(base), i) for i, base in enumerate(bases))
    prior = bases[prior]
    for _ in range(2):
        for field, values in TRIED.items():
            tried = [(score(prior._replace(**{field: value})), value) for value in values]
            if min(tried)[0] < best - MARGIN:
                best, value = min(tried)
                prior = prior._replace(**{field: value})
    return prior
