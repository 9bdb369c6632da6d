"""What a few seeds allow us to say: paired differences, Student's t, bootstrap, Holm, and a verdict.

Runs of two arms with the same seed share initialisation and data order, so their difference is the unit
of analysis: `paired` and `verdict` work on one delta a seed. Statistics that are not defined (a standard
deviation of one value) are nan. Non-finite inputs raise ValueError: a diverged run is a finding to report,
and must not become, or drop out of, an average.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

DIRECTIONS = ("at most", "at least")


class Summary(NamedTuple):
    mean: float
    sd: float  # n - 1 in the denominator; nan for n = 1
    n: int


class Paired(NamedTuple):
    mean: float  # of the deltas a - b
    sd: float
    n: int
    t: float  # mean / (sd / sqrt(n))
    p: float  # two-sided, n - 1 degrees of freedom
    low: float  # Student-t interval of the mean
    high: float
    boot_low: float  # percentile bootstrap interval of the mean
    boot_high: float


def summarize(values: Sequence[float]) -> Summary:
    """Mean, sample standard deviation and number of values. Raises ValueError if empty or not finite."""
    values = [float(value) for value in values]
    if not values:
        raise ValueError("no values to summarize, expected at least one")
    for i, value in enumerate(values):
        if not math.isfinite(value):
            raise ValueError(f"value {i} is {value}; report a diverged or unmeasured run beside the table, not in it")
    n = len(values)
    # Exact sums: equal values have sd 0 whatever their digits.
    mean = math.fsum(values) / n
    mean += math.fsum(value - mean for value in values) / n
    sd = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1)) if n > 1 else math.nan
    return Summary(mean, sd, n)


def paired(
    a: Sequence[float] | Mapping[int, float],
    b: Sequence[float] | Mapping[int, float],
    *,
    alpha: float = 0.05,
    resamples: int = 10_000,
    seed: int = 0,
) -> Paired:
    """Arm ``a`` minus arm ``b``, seed by seed: mean, sd, paired t-test, and two intervals of 1 - alpha.

    Both are sequences in the same order of seeds, or mappings seed -> value. Raises ValueError when lengths
    or seeds differ. With n < 2 everything but mean and n is nan.

    At n = 3 the bootstrap says next to nothing: one resample in 27 repeats the smallest delta three times,
    more than the 2.5 % cut off on each side, so its 95 % interval is exactly the range of the deltas and
    covers the true mean far less often than 95 %. Read the t interval, or run more seeds.
    """
    deltas = _deltas(a, b)
    mean, sd, n = summarize(deltas)
    t, p = _t_test(mean, sd, n)
    low, high = t_interval(deltas, alpha=alpha)
    boot_low, boot_high = bootstrap_interval(deltas, alpha=alpha, resamples=resamples, seed=seed)
    return Paired(mean, sd, n, t, p, low, high, boot_low, boot_high)


def verdict(deltas: Sequence[float], threshold: float, direction: str = "at most", *, alpha: float = 0.05) -> str:
    """Is the claim "the mean delta is ``direction`` ``threshold``" met? One delta a seed.

    ``direction`` is "at most" or "at least", and ``alpha`` that of the two-sided Student-t interval of
    the mean (for several claims, divide it as Holm does). Returns

    - "met" when the whole interval satisfies the claim, its end on the threshold included;
    - "not met" when the whole interval violates it;
    - "not powered" when the interval holds the threshold, and always for fewer than two seeds: the data
      cannot tell, whatever the mean.

    Example: perplexity within 0.3 of CE is verdict(ppl_dpsm - ppl_ce, 0.3, "at most").
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"unknown direction {direction!r}, expected one of {', '.join(map(repr, DIRECTIONS))}")
    low, high = t_interval(deltas, alpha=alpha)
    if math.isnan(low):
        return "not powered"
    if direction == "at least":
        low, high, threshold = -high, -low, -threshold
    return "met" if high <= threshold else "not met" if low > threshold else "not powered"


def powered(deltas: Sequence[float], *, alpha: float = 0.05) -> bool:
    """Can these seeds tell the mean delta from zero: |mean| / sd > `required_ratio`(n)? False for n < 2."""
    mean, sd, n = summarize(deltas)
    return n > 1 and abs(mean) > sd * required_ratio(n, alpha=alpha)


def required_ratio(n: int, *, alpha: float = 0.05) -> float:
    """|mean| / sd of n paired deltas above which a two-sided t-test rejects zero: t_crit(n - 1) / sqrt(n).

    2.48 at n = 3, 1.24 at n = 5, 0.72 at n = 10; infinite below 2.
    """
    return t_critical(n - 1, alpha=alpha) / math.sqrt(n) if n > 1 else math.inf


def t_interval(deltas: Sequence[float], *, alpha: float = 0.05) -> tuple[float, float]:
    """Student-t interval of the mean at confidence 1 - alpha; (nan, nan) for n < 2."""
    mean, sd, n = summarize(deltas)
    if n < 2:
        return math.nan, math.nan
    half = t_critical(n - 1, alpha=alpha) * sd / math.sqrt(n)
    return mean - half, mean + half


def bootstrap_interval(
    deltas: Sequence[float], *, alpha: float = 0.05, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean (Efron, 1979), reproducible by ``seed``; nan for n < 2."""
    n = summarize(deltas).n
    if n < 2:
        return math.nan, math.nan
    picks = np.random.default_rng(seed).integers(0, n, size=(resamples, n))
    means = np.asarray(deltas, dtype=np.float64)[picks].mean(axis=1)
    low, high = np.quantile(means, [alpha / 2, 1 - alpha / 2])
    return float(low), float(high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values (Scandinavian Journal of Statistics, 1979), in the given order.

    Reject those at most alpha, and the chance of any false rejection among them is at most alpha. A nan (a
    test that could not be made) stays nan and does not count. Raises ValueError outside [0, 1].
    """
    for p in p_values:
        if not (math.isnan(p) or 0 <= p <= 1):
            raise ValueError(f"p-value {p} is not in [0, 1]")
    order = sorted((i for i, p in enumerate(p_values) if not math.isnan(p)), key=lambda i: p_values[i])
    adjusted, largest = [math.nan] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def t_two_sided(t: float, df: float) -> float:
    """P(|T| >= |t|) for Student's t with ``df`` > 0 degrees of freedom: I_{df / (df + t^2)}(df/2, 1/2)
    (Abramowitz & Stegun 26.7.1)."""
    if math.isinf(t):
        return 0.0
    x = df / (df + t * t)
    return incomplete_beta(df / 2, 0.5, x, t * t / (df + t * t))


def t_critical(df: float, *, alpha: float = 0.05) -> float:
    """The t with `t_two_sided`(t, df) = alpha, the 1 - alpha/2 quantile, by bisection.

    Raises ValueError unless 0 < alpha < 1.
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha={alpha}, expected a number between 0 and 1, such as 0.05")
    low, high = 0.0, 1.0
    while t_two_sided(high, df) > alpha:
        low, high = high, 2 * high
    while low < (middle := (low + high) / 2) < high:  # until the two are neighbouring floats
        low, high = (middle, high) if t_two_sided(middle, df) > alpha else (low, middle)
    return high


def incomplete_beta(a: float, b: float, x: float, y: float | None = None) -> float:
    """Regularised incomplete beta function I_x(a, b), a and b > 0, x in [0, 1]; ``y`` is 1 - x where the
    caller knows it without cancellation.

    Continued fraction of Abramowitz & Stegun 26.5.8, evaluated by Lentz's method, on the side of the mean
    where it converges fast; relative error below 1e-12 for the arguments of a t-test.
    """
    y = 1 - x if y is None else y
    if x <= 0 or y <= 0:
        return float(y <= 0)
    if x > (a + 1) / (a + b + 2):
        return 1 - incomplete_beta(b, a, y, x)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log(y)
    tiny = 1e-300  # Lentz: stands in for a denominator of zero
    c, d = 1.0, 1 / ((1 - (a + b) * x / (a + 1)) or tiny)
    fraction = d
    for m in range(1, 10_000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d = 1 / ((1 + term * d) or tiny)
            c = (1 + term / c) or tiny
            fraction *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return math.exp(log_front) * fraction / a


def _t_test(mean: float, sd: float, n: int) -> tuple[float, float]:
    if n < 2 or (sd == 0 and mean == 0):
        return math.nan, math.nan if n < 2 else 1.0
    t = mean / (sd / math.sqrt(n)) if sd else math.copysign(math.inf, mean)
    return t, t_two_sided(t, n - 1)


def _deltas(a, b) -> list[float]:
    if isinstance(a, Mapping) != isinstance(b, Mapping):
        raise ValueError("one arm is a mapping of seeds and the other is not, expected two of a kind")
    if isinstance(a, Mapping):
        if set(a) != set(b):
            raise ValueError(f"arms have different seeds, {sorted(a)} and {sorted(b)}; pair runs of the same seed")
        a, b = [a[seed] for seed in a], [b[seed] for seed in a]
    if len(a) != len(b):
        raise ValueError(f"arms have {len(a)} and {len(b)} values, expected one of each per seed")
    return [x - y for x, y in zip(a, b, strict=True)]
