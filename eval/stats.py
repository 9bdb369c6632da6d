"""What a few seeds allow us to say: paired differences, Student's t, bootstrap, Holm, McNemar, power, and a verdict.

Runs of two arms with the same seed share initialisation and data order. Their difference is the unit of analysis:
`paired` and `verdict` work on one delta a seed. A statistic that is not defined, such as the standard deviation of one
value, is nan. Non-finite inputs raise ValueError: a diverged run is a finding to report, and must neither become nor
drop out of an average.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize, stats

MOST_SEEDS = 1000  # that `seeds_needed` looks for
FEWEST_BLOCKS = 10  # that `ece_interval` resamples
ECE_RESAMPLES = 2000

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
    cannot tell. ``direction`` is "at most" or "at least". For several claims ``alpha`` is their `holm_level`.

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


def claim_p(deltas: Sequence[float], threshold: float) -> float:
    """Two-sided p of the mean delta being ``threshold``, by Student's t: `verdict` decides where it is at most alpha.

    nan for fewer than two seeds. 0 for deltas without spread, which leave nothing to chance."""
    mean, sd, n = summarize(deltas)
    if n < 2 or sd == 0:
        return math.nan if n < 2 else 0.0
    return 2 * float(stats.t.sf(abs(mean - threshold) / (sd / math.sqrt(n)), n - 1))


def holm_level(p_values: Sequence[float], alpha: float = 0.05) -> float:
    """The level at which Holm's procedure ends: it rejects those p-values that are at most this, and no other.

    alpha / (m - r), where r of the m tests are rejected; alpha where all are, or where there is none. nan does not
    count. Raises ValueError as `holm` does."""
    left = [adjusted > alpha for adjusted in holm(p_values) if not math.isnan(adjusted)].count(True)
    return alpha / max(1, left)


def t_power(ratio: float, n: int, *, alpha: float = 0.05) -> float:
    """The chance that a two-sided paired t-test over n seeds finds a true mean delta of ``ratio`` standard deviations,
    and on its side of zero: the upper tail of the noncentral t (Cohen, 1988, chapter 2). 0 for n < 2."""
    return float(stats.nct.sf(stats.t.isf(alpha / 2, n - 1), n - 1, abs(ratio) * math.sqrt(n))) if n > 1 else 0.0


def detectable(n: int, *, power: float = 0.8, alpha: float = 0.05) -> float:
    """The smallest |mean| / sd of the deltas that n seeds find with chance ``power``, see `t_power`; inf for n < 2.

    3.26 at n = 3, 1.68 at n = 5, 1.00 at n = 10. Raises ValueError unless alpha / 2 < power < 1."""
    if not alpha / 2 < power < 1:
        raise ValueError(f"power={power}, expected a number between {alpha / 2:g} and 1, such as 0.8")
    if n < 2:
        return math.inf
    top = required_ratio(n, alpha=alpha)
    while t_power(top, n, alpha=alpha) < power:
        top *= 2
    return float(optimize.brentq(lambda ratio: t_power(ratio, n, alpha=alpha) - power, 0, top, rtol=1e-9))


def seeds_needed(ratio: float, *, power: float = 0.8, alpha: float = 0.05) -> int | None:
    """The fewest seeds that find a true mean delta of ``ratio`` standard deviations with chance ``power``, 2 or more.

    None for more than `MOST_SEEDS`. Where ratio comes from the seeds at hand, this is as uncertain as they are."""
    if t_power(ratio, MOST_SEEDS, alpha=alpha) < power:
        return None
    low, high = 1, MOST_SEEDS  # too few, enough
    while high - low > 1:
        n = (low + high) // 2
        low, high = (low, n) if t_power(ratio, n, alpha=alpha) >= power else (n, high)
    return high


def interquartile_mean(values: Sequence[float], axis: int | None = None) -> float | np.ndarray:
    """Mean of what is left without the lowest and the highest quarter, each rounded down to whole values; of all
    ``values``, or along an ``axis``.

    Over the scores of all runs and tasks together it is the IQM of Agarwal et al., "Deep Reinforcement Learning at the
    Edge of the Statistical Precipice", 2021, and `rliable`'s. Raises ValueError if empty or not finite."""
    summarize(np.ravel(values))
    return stats.trim_mean(values, 0.25, axis=axis)


def stratified_bootstrap(
    strata: Sequence[Sequence[float]],
    statistic: Callable = interquartile_mean,
    *,
    alpha: float = 0.05,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of ``statistic`` of all values, where runs are drawn within their task alone.

    ``strata``: the values of each task, one a run; tasks may have different numbers of runs. ``statistic`` takes values
    [resamples, runs] and ``axis=1``, as `numpy.mean` does. The interval says how far other seeds would move the
    statistic on these tasks, and nothing of other tasks (Agarwal et al., 2021). (nan, nan) where a task has fewer than
    two runs. Raises ValueError where there is no task, and for values that are not finite."""
    if not strata:
        raise ValueError("no tasks to resample, expected at least one")
    if min(summarize(values).n for values in strata) < 2:
        return math.nan, math.nan
    random = np.random.default_rng(seed)
    draws = [np.asarray(v, dtype=np.float64)[random.integers(0, len(v), size=(resamples, len(v)))] for v in strata]
    low, high = np.quantile(statistic(np.concatenate(draws, axis=1), axis=1), [alpha / 2, 1 - alpha / 2])
    return float(low), float(high)


def wilson(rate: float, n: float, *, alpha: float = 0.05) -> tuple[float, float]:
    """Wilson's score interval (1927) of a share ``rate`` of ``n``, above 0, whole or effective."""
    z = float(stats.norm.isf(alpha / 2))
    middle, scale = rate + z * z / (2 * n), 1 + z * z / n
    half = z * math.sqrt(max(rate * (1 - rate), 0) / n + (z / (2 * n)) ** 2)
    return max((middle - half) / scale, 0.0), min((middle + half) / scale, 1.0)


def proportion_interval(right: int, n: int, *, alpha: float = 0.05) -> tuple[float, float]:
    """`wilson` of a proportion, as Brown, Cai and DasGupta (2001) advise for small n.

    It has a width where none or all are right, [0, 0.038] for 0 of 96, where a bootstrap has none. Raises ValueError
    unless 0 <= right <= n and n >= 1."""
    if n < 1 or not 0 <= right <= n:
        raise ValueError(f"{right} of {n}: expected a count between 0 and a number of trials of 1 or more")
    return wilson(right / n, n, alpha=alpha)


def rate_interval(
    values: Sequence[float], *, alpha: float = 0.05, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Interval of the mean of ``values`` in [0, 1], one a problem: Wilson's where each is 0 or 1, as pass@1 of one
    answer, else the bootstrap over problems, as of pass@k. (nan, nan) for fewer than two. ValueError outside [0, 1]."""
    if any(not 0 <= v <= 1 for v in values):
        raise ValueError(f"rates from {min(values)} to {max(values)}, expected 0 to 1")
    if len(values) > 1 and all(v in (0, 1) for v in values):
        return proportion_interval(round(math.fsum(values)), len(values), alpha=alpha)
    return bootstrap_interval(values, alpha=alpha, resamples=resamples, seed=seed)


def rate_difference_interval(
    a: Sequence[float], b: Sequence[float], *, alpha: float = 0.05, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Paired bootstrap interval over problems of the mean of a - b, rates in [0, 1], one of each a problem.

    Where all differences are one d, the bootstrap would be [d, d]. Then at most `proportion_interval`'s upper end for 0
    of n problems, w, differ otherwise, and the mean lies in [d - w (d + 1), d + w (1 - d)]. (nan, nan) for fewer than
    two problems. Raises ValueError as `paired` does."""
    deltas = _deltas(a, b)
    if len(deltas) > 1 and len(set(deltas)) == 1:
        d, w = deltas[0], proportion_interval(0, len(deltas), alpha=alpha)[1]
        return d - w * (d + 1), d + w * (1 - d)
    return bootstrap_interval(deltas, alpha=alpha, resamples=resamples, seed=seed)


def ece_interval(
    gaps: np.ndarray, counts: np.ndarray, *, alpha: float = 0.05, resamples: int = ECE_RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """Bootstrap interval of an expected calibration error, over blocks that are drawn whole.

    ``gaps`` [K, B] float: of each block (a document, a batch, one answer) and bin the sum of confidence - correct, and
    ``counts`` [K] its tokens; the ECE is the sum over bins of |sum of gaps| / tokens, 0 to 1. Ends as `_ece_ends` has
    them. (nan, nan) for fewer than `FEWEST_BLOCKS`. Raises ValueError for other shapes and for blocks without tokens.
    """
    gaps, counts = np.asarray(gaps, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    if gaps.ndim != 2 or counts.shape != gaps.shape[:1]:
        raise ValueError(f"gaps {list(gaps.shape)} and counts {list(counts.shape)}, expected [K, B] and [K]")
    if not (counts > 0).all():
        raise ValueError("a block without tokens; leave it out")
    k = len(counts)
    if k < FEWEST_BLOCKS:
        return math.nan, math.nan
    random, drawn, rows = np.random.default_rng(seed), [], max(1, 2**22 // k)
    for begin in range(0, resamples, rows):  # a few at a time: [rows, K] numbers are held
        times = random.multinomial(k, np.full(k, 1 / k), size=min(rows, resamples - begin))
        drawn.append(times @ gaps / (times @ counts)[:, None])
    return _ece_ends(np.concatenate(drawn), gaps.sum(0) / counts.sum(), alpha)


def ece_interval_of_bins(
    count: Sequence[int],
    confidence_sum: Sequence[float],
    correct_sum: Sequence[int],
    bins: int = 10,
    *,
    alpha: float = 0.05,
    resamples: int = ECE_RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """The same from the sums of fine bins alone, as `kernels.Calibration.bins` has them, merged to ``bins``.

    Tokens are drawn as if they were independent: their number in each fine bin is multinomial, the correct among them
    binomial, and the mean confidence of a bin stays. Tokens of a text depend on each other, so this is too narrow; take
    `ece_interval` where there are blocks. Raises ValueError for no tokens, and where ``bins`` does not divide."""
    n_B, sure_B, right_B = (np.asarray(x, dtype=np.float64) for x in (count, confidence_sum, correct_sum))
    n = int(n_B.sum())
    if n < 1 or len(n_B) % bins:
        raise ValueError(f"{n} tokens in {len(n_B)} bins, expected tokens, and bins that {bins} divides")
    random, held = np.random.default_rng(seed), np.maximum(n_B, 1)
    counts = random.multinomial(n, n_B / n, size=resamples)
    gaps = counts * (sure_B / held) - random.binomial(counts, np.clip(right_B / held, 0, 1))
    merged = gaps.reshape(resamples, bins, -1).sum(2) / n
    return _ece_ends(merged, (sure_B - right_B).reshape(bins, -1).sum(1) / n, alpha)


def _ece_ends(drawn: np.ndarray, observed: np.ndarray, alpha: float) -> tuple[float, float]:
    """Ends of an interval of sum |gap|, from resampled gaps [R, B] of the bins and the observed ones [B].

    An ECE is biased upwards, and a resampled one twice. So the upper end is the percentile of the resamples; the lower
    end is theirs less twice their mean's excess over the observed ECE, and 0 where an ECE as large as the observed one
    is no rarer than alpha once every bin's gap is taken away (the consistency test of Broecker and Smith, 2007, with a
    centred bootstrap). In simulations of 20 and 100 blocks that share a shift the 95 % interval held the true ECE in 89
    to 98 % of the trials, from 0 to 0.1; the plain percentile interval in 0 to 98 %."""
    ece, found = np.abs(observed).sum(), np.abs(drawn).sum(1)
    low, high = np.quantile(found, [alpha / 2, 1 - alpha / 2])
    calibrated = np.quantile(np.abs(drawn - observed).sum(1), 1 - alpha)
    return 0.0 if ece <= calibrated else max(0.0, float(low - 2 * (found.mean() - ece))), float(high)


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
