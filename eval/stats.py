"""What a few seeds allow us to say: paired differences, Student's t, bootstrap, Holm, McNemar, and a verdict.

Runs of two arms with the same seed share initialisation and data order. Their difference is the unit of analysis:
`paired` and `verdict` work on one delta a seed. A statistic that is not defined, such as the standard deviation of one
value, is nan. Non-finite inputs raise ValueError: a diverged run is a finding to report, and must neither become nor
drop out of an average.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

BySeed = Sequence[float] | Mapping[int, float]  # a value a seed, in an order of seeds or by seed


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


def paired(a: BySeed, b: BySeed, *, alpha: float = 0.05, resamples: int = 10_000, seed: int = 0) -> Paired:
    """Arm ``a`` minus arm ``b``, seed by seed: mean, sd, paired t-test, and two intervals of 1 - alpha.

    Raises ValueError when lengths or seeds differ. For n < 2 everything but mean and n is nan. Deltas that are all 0
    have t = nan and p = 1; deltas that all have another value have t = inf or -inf and p = 0.

    At n = 3 the bootstrap says next to nothing. One resample in 27 repeats the smallest delta three times, more than
    the 2.5 % cut off on each side: its 95 % interval is the range of the deltas, and covers the true mean far less
    often than 95 %. Read the t interval, or run more seeds."""
    deltas = _deltas(a, b)
    mean, sd, n = summarize(deltas)
    if n < 2:
        t, p = math.nan, math.nan
    elif sd == 0:
        t, p = (math.copysign(math.inf, mean), 0.0) if mean else (math.nan, 1.0)
    else:
        t = mean / (sd / math.sqrt(n))
        p = 2 * float(stats.t.sf(abs(t), n - 1))
    bootstrap = bootstrap_interval(deltas, alpha=alpha, resamples=resamples, seed=seed)
    return Paired(mean, sd, n, t, p, *t_interval(deltas, alpha=alpha), *bootstrap)


def verdict(deltas: Sequence[float], threshold: float, direction: str = "at most", *, alpha: float = 0.05) -> str:
    """Is the claim "the mean delta is ``direction`` ``threshold``" met? One delta a seed.

    "met" when the whole two-sided Student-t interval of the mean satisfies the claim, its end on the threshold
    included; "not met" when all of it violates the claim; else, and for fewer than two seeds, "not powered": the data
    cannot tell. ``direction`` is "at most" or "at least". For several claims divide ``alpha`` as Holm does.

    Example: perplexity within 0.3 of CE is verdict(ppl_dpsm - ppl_ce, 0.3, "at most")."""
    if direction not in ("at most", "at least"):
        raise ValueError(f"unknown direction {direction!r}, expected one of 'at most', 'at least'")
    low, high = t_interval(deltas, alpha=alpha)
    if math.isnan(low):
        return "not powered"
    if direction == "at least":
        low, high, threshold = -high, -low, -threshold
    return "met" if high <= threshold else "not met" if low > threshold else "not powered"


def required_ratio(n: int, *, alpha: float = 0.05) -> float:
    """|mean| / sd of n paired deltas above which a two-sided t-test rejects zero: t_crit(n - 1) / sqrt(n).

    2.48 at n = 3, 1.24 at n = 5, 0.72 at n = 10; inf for n < 2. Raises ValueError unless 0 < alpha < 1."""
    if not 0 < alpha < 1:
        raise ValueError(f"alpha={alpha}, expected a number between 0 and 1, such as 0.05")
    return float(stats.t.isf(alpha / 2, n - 1)) / math.sqrt(n) if n > 1 else math.inf


def t_interval(deltas: Sequence[float], *, alpha: float = 0.05) -> tuple[float, float]:
    """Student-t interval of the mean at confidence 1 - alpha; (nan, nan) for n < 2."""
    mean, sd, n = summarize(deltas)
    if n < 2:
        return math.nan, math.nan
    half = required_ratio(n, alpha=alpha) * sd
    return mean - half, mean + half


def bootstrap_interval(
    deltas: Sequence[float], *, alpha: float = 0.05, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean (Efron, 1979), reproducible by ``seed``; nan for n < 2.

    Not scipy.stats.bootstrap, which draws in another order: intervals in run folders would move."""
    n = summarize(deltas).n
    if n < 2:
        return math.nan, math.nan
    picks = np.random.default_rng(seed).integers(0, n, size=(resamples, n))
    means = np.asarray(deltas, dtype=np.float64)[picks].mean(axis=1)
    low, high = np.quantile(means, [alpha / 2, 1 - alpha / 2])
    return float(low), float(high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values (Scandinavian Journal of Statistics, 1979), in the given order.

    Reject those at most alpha, and the chance of any false rejection among them is at most alpha. A nan is a test that
    could not be made: it stays nan and does not count. Raises ValueError outside [0, 1]."""
    p = np.asarray(p_values, dtype=np.float64)
    for value in p[(p < 0) | (p > 1)]:
        raise ValueError(f"p-value {value} is not in [0, 1]")
    order = np.argsort(p, kind="stable")  # nan last
    tests = np.count_nonzero(~np.isnan(p)) - np.arange(len(p))  # that are not yet rejected, at each rank
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(np.minimum(1.0, tests * p[order]))
    return adjusted.tolist()


def mcnemar_exact(only_a: int, only_b: int) -> float:
    """Two-sided exact p of McNemar's test: ``only_a`` and ``only_b`` problems that one side alone has right.

    Under equality each of them is either side's with chance 1/2, which a binomial test checks. 1 where the sides never
    differ. Raises ValueError for negative counts."""
    if only_a < 0 or only_b < 0:
        raise ValueError(f"only_a={only_a}, only_b={only_b}: expected counts")
    n = only_a + only_b
    return float(stats.binomtest(only_a, n).pvalue) if n else 1.0


def _deltas(a: BySeed, b: BySeed) -> list[float]:
    if isinstance(a, Mapping) != isinstance(b, Mapping):
        raise ValueError("one arm is a mapping of seeds and the other is not, expected two of a kind")
    if isinstance(a, Mapping):
        if set(a) != set(b):
            raise ValueError(f"arms have different seeds, {sorted(a)} and {sorted(b)}; pair runs of the same seed")
        a, b = [a[seed] for seed in a], [b[seed] for seed in a]
    if len(a) != len(b):
        raise ValueError(f"arms have {len(a)} and {len(b)} values, expected one of each per seed")
    return [x - y for x, y in zip(a, b, strict=True)]
