"""Loss curves of known laws, and a forecaster that has seen one."""

import numpy as np

from schedules.forecast import CLOCK, Forecaster

STEPS = np.arange(1, 1001)


def feed(steps, losses, lrs=None, **options):
    forecaster = Forecaster(**options)
    forecaster.extend(list(steps), losses, lrs)
    return forecaster


def falling(steps, c=2.5, a=4.0, b=30.0, alpha=0.5):
    return c + a * (np.asarray(steps) + b) ** -alpha


def annealed(lr, k=0.1, every=1):
    """A run of the law itself with instant annealing, from a learning rate for every ``every``-th step."""
    S = every * np.cumsum(np.asarray(lr) ** CLOCK)
    return 2.6 + 5 * (S + 50) ** -0.5 - k * (1 - np.asarray(lr)) * (S / S[-1]) ** 0.3
