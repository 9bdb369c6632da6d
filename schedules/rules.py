"""Learning-rate schedules as plain functions of the optimizer step, and the formulas of the rules that measure.

A new schedule is one entry of `FORMULAS`."""

import math
from collections.abc import Sequence
from typing import NamedTuple


class At(NamedTuple):
    """A step after the warm-up, as a formula sees it."""

    x: float  # how much of the way after the warm-up has been gone, in [0, 1]
    step: int
    total: int
    rise: float  # steps of the warm-up
    decay: float  # share of the run
    power: float
    shape: str  # of wsd's fall, one of SHAPES


def passed(step: float, begin: float, total: int) -> float:
    """How much of the way from step ``begin`` to the end has been gone, in [0, 1]."""
    return min(max((step - begin) / max(total - begin, 1), 0.0), 1.0)


BISECTIONS = 60  # of block_multipliers

# From name to what is left of a learning rate that falls, when a share x of its fall has been gone:
#   sqrt          1 - sqrt(x); Hägele et al. (2024), "Scaling Laws and Compute-Optimal Training Beyond Fixed Training
#                 Durations"
#   power         1 - x^0.4, of public records of modded-nanogpt's third track (its pull requests 343, 345 and 351)
SHAPES = {
    "linear": lambda x: 1 - x,
    "sqrt": lambda x: 1 - math.sqrt(x),
    "power": lambda x: 1 - x**0.4,
    "cosine": lambda x: 0.5 * (1 + math.cos(math.pi * x)),
}

# From name to the share of the peak after the warm-up, before it is raised above the floor:
#   cosine        Loshchilov and Hutter (2017)
#   wsd           warm-up, stable, decay: in ``shape`` over the last ``decay * total`` steps; Hu et al. (2024)
#   rex           stays high and falls late; Chen et al. (2022), "REX: Revisiting Budgeted Training with an Improved
#                 Schedule"
#   polynomial    fairseq's polynomial_decay with end_learning_rate 0
#   inverse-sqrt  sqrt(w / step) after w steps of warm-up; google-research/pegasus, estimator_utils.py
FORMULAS = {
    "cosine": lambda at: SHAPES["cosine"](at.x),
    "linear": lambda at: 1 - at.x,
    "constant": lambda at: 1.0,
    "wsd": lambda at: SHAPES[at.shape](passed(at.step, max(at.rise, (1 - at.decay) * at.total), at.total)),
    "rex": lambda at: (1 - at.x) / (1 - 0.5 * at.x),
    "polynomial": lambda at: (1 - at.x) ** at.power,
    "inverse-sqrt": lambda at: math.sqrt(max(at.rise, 1) / max(at.step, 1)),
}
SCHEDULES = tuple(FORMULAS)
ADAPTIVE = ("snac", "bacon", "fot", "fot-literal")  # they measure the run: fot.FoT
SCHEDULE_FREE = "schedule-free"  # an optimizer of its own under a constant learning rate: averaging.py
GREEDY = "greedy"  # it follows the loss: greedy.py
RULES = (*SCHEDULES, *ADAPTIVE, GREEDY, SCHEDULE_FREE)


def check_shape(shape: str) -> str:
    """``shape`` itself. Raises ValueError where it is none of SHAPES."""
    if shape not in SHAPES:
        raise ValueError(f"decay shape {shape!r}: expected one of {', '.join(SHAPES)}")
    return shape


def lr_factor(
    name: str, step: int, total: int, *, warmup=0.0, floor=0.0, decay=0.2, power=1.0, shape="linear"
) -> float:
    """The share of the peak learning rate before step ``step`` (0-based) of ``total``, in [0, 1].

    It rises linearly over the first ``warmup * total`` steps, then follows the formula of `FORMULAS`, scaled to fall to
    ``floor`` instead of 0. ``decay`` is wsd's share of the run and ``shape`` how it falls there, ``power`` polynomial's
    exponent. The learning rate of schedule-free is constant. Raises ValueError for an unknown name or shape."""
    if name not in (*SCHEDULES, SCHEDULE_FREE):
        raise ValueError(f"unknown schedule {name!r}; expected one of {', '.join((*SCHEDULES, SCHEDULE_FREE))}")
    rise = warmup * total
    if step < rise:
        return (step + 1) / (math.ceil(rise) + 1)
    formula = FORMULAS["constant" if name == SCHEDULE_FREE else name]
    at = At(passed(step, rise, total), step, total, rise, decay, power, check_shape(shape))
    return floor + (1 - floor) * formula(at)


def snac_factor(noise: float, signal: float) -> float:
    """SNAC's share of the peak learning rate, in [1/100, 1]:

        1 / (1 + B_noise / B),      B_noise / B = noise / signal = (tr(Sigma) / B) / |G|^2

    B_noise is the simple noise scale of McCandlish et al. (2018). SNAC has no public definition. This is our reading:
    the learning rate is scaled by the signal's share of the squared gradient. The lowest share is ours too, because at
    0 nothing moves; it also stands where the signal is lost in the noise."""
    noise = max(noise, 0.0)
    share = signal / (signal + noise) if signal > 0 and math.isfinite(signal + noise) else 0.0
    return min(max(share, 0.01), 1.0)


def bacon_factor(eta: float, reference: float) -> float:
    """BACON's factor on a linear decay: clip(eta / reference, 1/2, 2).

    ``eta`` is the step that gains most of the noisy quadratic now; 0 and inf are allowed. ``reference`` is the same for
    the sums over the run so far. BACON has no public definition. This is our reading: a budget's linear decay, bent by
    curvature. The factor is 1 where the reference sets no scale."""
    if not 0 < reference < math.inf or math.isnan(eta):
        return 1.0
    return min(max(eta / reference, 0.5), 2.0)


def gate_of(h: float | None) -> float:
    """The Fisher gate: continuous, stateless, in [0.7, 1.5]; 1 where h was not measured."""
    if h is None or not math.isfinite(h):
        return 1.0
    return min(1 + 0.5 * (1 - h) / 0.3, 1.5) if h < 1 else max(1 - (h - 1), 0.7)


def block_multipliers(rms: Sequence[Sequence[float]]) -> list[float]:
    """Multipliers in [1/2, 2] of geometric mean 1, from each block's RMS gradients of prompt and answer.

    They follow shares, not sizes: Adam already divides by a block's size. All are 1 where a block has no gradient."""
    if not rms or not all(math.isfinite(p) and math.isfinite(a) and a > 0 for p, a in rms):
        return [1.0] * len(rms)
    logs = [-0.5 * math.log2(1 + (p / a) ** 2) for p, a in rms]
    low, high = -max(logs) - 1, -min(logs) + 1  # the shift at which the clipped logs have mean 0
    for _ in range(BISECTIONS):
        middle = 0.5 * (low + high)
        total = sum(min(max(v + middle, -1.0), 1.0) for v in logs)
        low, high = (low, middle) if total > 0 else (middle, high)
    return [2.0 ** min(max(v + low, -1.0), 1.0) for v in logs]


def best_step(slope: float, curvature: float) -> float:
    """The eta that gains most of eta slope - eta^2 curvature / 2: 0 where the slope does not fall, inf where the
    curvature sets no bound."""
    if not slope > 0:
        return 0.0
    return slope / curvature if curvature > 0 else math.inf


def can_gain(target: float, slope: float, curvature: float) -> bool:
    """Whether some eta > 0 has eta slope - eta^2 curvature / 2 = target."""
    return slope > 0 and slope**2 - 2 * curvature * target >= 0
