"""Statistics across seeds: Student's t against scipy and closed forms, Holm against closed testing, verdicts."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats

from eval.stats import bootstrap_interval, holm, mcnemar_exact, paired, required_ratio, summarize, t_interval, verdict


def test_summarize():
    assert summarize([1, 2, 4]) == pytest.approx((7 / 3, math.sqrt(7 / 3), 3), rel=1e-15)
    mean, sd, n = summarize([2.5])
    assert (mean, n) == (2.5, 1) and math.isnan(sd)
    for value in np.random.default_rng(0).normal(size=200):  # equal values: no spread out of rounding
        for n in (2, 3, 5, 7):
            assert summarize([value] * n) == (value, 0.0, n)


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf, 1.0]])
def test_summarize_refuses_what_has_no_mean(values):
    with pytest.raises(ValueError, match="no values|value . is (nan|inf)"):
        summarize(values)


@pytest.mark.parametrize("n", [2, 3, 4, 5, 8, 31, 500])
def test_student_t_matches_scipy(n):
    """Of deltas with mean t / sqrt(n) and sd 1: scipy's own t-test and intervals, at 1e-9 relative."""
    shape = np.linspace(-1, 1, n)
    shape /= np.std(shape, ddof=1)
    for t in np.logspace(-2, 3, 20):
        deltas = shape + t / math.sqrt(n)
        ours, theirs = paired(deltas, np.zeros(n), resamples=10), scipy.stats.ttest_1samp(deltas, 0)
        assert (ours.t, ours.p) == pytest.approx((theirs.statistic, theirs.pvalue), rel=1e-9, abs=1e-290)
        for alpha in (0.5, 0.05, 0.01, 1e-6):
            expected = tuple(theirs.confidence_interval(1 - alpha))
            assert t_interval(deltas, alpha=alpha) == pytest.approx(expected, abs=1e-9 * expected[1])


def test_student_t_closed_forms():
    """One degree of freedom is Cauchy's distribution; of two, A&S 26.7.4."""
    for t in (1e-3, 0.7, 1.0, 3.0, 1e3):
        deltas = [t / math.sqrt(2) + x for x in (-math.sqrt(0.5), math.sqrt(0.5))]  # sd 1, n = 2
        assert paired(deltas, [0, 0]).p == pytest.approx(2 / math.pi * math.atan(1 / t), rel=1e-10)
        deltas = [t / math.sqrt(3) + x for x in (-1, 0, 1)]
        assert paired(deltas, [0, 0, 0]).p == pytest.approx(2 / (2 + t * t + t * math.sqrt(2 + t * t)), rel=1e-10)
    assert required_ratio(3) == pytest.approx(0.95 * math.sqrt(2 / 0.0975) / math.sqrt(3), rel=1e-10)  # tables: 4.303


def test_paired_matches_scipy():
    rng = np.random.default_rng(1)
    for n in (2, 3, 5, 12):
        a, b = rng.normal(20, 1, n), rng.normal(20.3, 1, n)
        ours, theirs = paired(a, b), scipy.stats.ttest_rel(a, b)
        assert (ours.t, ours.p) == pytest.approx((theirs.statistic, theirs.pvalue), rel=1e-10)
        assert (ours.low, ours.high) == pytest.approx(tuple(theirs.confidence_interval(0.95)), rel=1e-10)
        assert (ours.mean, ours.sd, ours.n) == pytest.approx((np.mean(a - b), np.std(a - b, ddof=1), n), rel=1e-12)


def test_paired_pairs_by_seed():
    a, b = {0: 1.0, 1: 2.0, 2: 4.0}, {2: 3.5, 0: 0.5, 1: 1.5}
    assert paired(a, b).mean == 0.5 and paired(a, b).sd == 0.0  # in stored order sd would not be 0
    with pytest.raises(ValueError, match="different seeds"):
        paired(a, {0: 1.0, 1: 2.0, 3: 4.0})
    with pytest.raises(ValueError, match="3 and 2 values"):
        paired([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match="two of a kind"):
        paired(a, [1, 2, 3])


def test_paired_without_spread_or_with_one_seed():
    same, shifted, single = paired([1, 2, 3], [1, 2, 3]), paired([2, 3, 4], [1, 2, 3]), paired([2], [1])
    assert same.p == 1.0 and math.isnan(same.t)
    assert shifted.p == 0.0 and shifted.t == math.inf and (shifted.low, shifted.high) == (1, 1)
    assert single.mean == 1.0 and all(math.isnan(x) for x in single if x not in (1.0, 1))


def test_bootstrap_is_seeded_and_close_to_scipys():
    deltas = np.random.default_rng(2).normal(0.3, 1, 25)
    assert bootstrap_interval(deltas, seed=3) == bootstrap_interval(deltas, seed=3)
    assert bootstrap_interval(deltas, seed=3) != bootstrap_interval(deltas, seed=4)
    theirs = scipy.stats.bootstrap((deltas,), np.mean, method="percentile", n_resamples=10_000, rng=5)
    # A 2.5 % quantile of 10,000 means has a Monte-Carlo error of sd * sqrt(.025 * .975 / 1e4) / density at
    # 1.96 = 0.027 sd (sd of the mean, 0.2 here); four such errors, for the difference of two, 0.03.
    assert bootstrap_interval(deltas) == pytest.approx(tuple(theirs.confidence_interval), abs=0.03)


def test_bootstrap_of_three_is_their_range():
    rng = np.random.default_rng(0)
    for seed in range(20):
        deltas = rng.normal(size=3)
        assert bootstrap_interval(deltas, seed=seed) == pytest.approx((deltas.min(), deltas.max()), rel=1e-12)


def test_holm_is_closed_testing_with_bonferroni():
    rng = np.random.default_rng(0)
    for m in (1, 2, 3, 5):
        for _ in range(20):
            p = rng.uniform(size=m) ** 3
            subsets = [s for size in range(1, m + 1) for s in itertools.combinations(range(m), size)]
            expected = [max(min(1, len(s) * min(p[j] for j in s)) for s in subsets if i in s) for i in range(m)]
            assert holm(p) == pytest.approx(expected, rel=1e-14)
    assert holm([0.01, math.nan, 0.04])[::2] == [0.02, 0.04] and math.isnan(holm([0.01, math.nan])[1])
    assert holm([]) == []
    with pytest.raises(ValueError, match=r"1\.5 is not in"):
        holm([0.1, 1.5])


def test_mcnemar_is_exact():
    """2 against 7 by hand, and the sum of binomial terms elsewhere."""
    assert mcnemar_exact(2, 7) == mcnemar_exact(7, 2) == pytest.approx(2 * (1 + 9 + 36) / 2**9, rel=1e-12)
    for a, b in itertools.product(range(12), repeat=2):
        tail = sum(math.comb(a + b, i) for i in range(min(a, b) + 1)) / 2 ** (a + b)
        assert mcnemar_exact(a, b) == pytest.approx(min(1, 2 * tail), rel=1e-12)
    assert mcnemar_exact(0, 0) == mcnemar_exact(4, 4) == 1.0
    with pytest.raises(ValueError, match="only_b=-1"):
        mcnemar_exact(3, -1)


def test_three_seeds_need_a_ratio_of_2_48():
    assert required_ratio(3) == pytest.approx(2.484, abs=5e-4)
    assert required_ratio(5) == pytest.approx(1.242, abs=5e-4)
    assert required_ratio(1) == math.inf
    for ratio, state in ((2.49, "not met"), (2.48, "not powered")):  # of three deltas with mean 1 and sd 1 / ratio
        assert verdict([1.0 + 1 / ratio, 1.0, 1.0 - 1 / ratio], 0.0) == state
    assert verdict([5.0], 0.0) == "not powered"
    with pytest.raises(ValueError, match="alpha=0"):
        t_interval([1, 2, 3], alpha=0)


def test_verdict():
    tight, wide = [0.10, 0.12, 0.11], [-0.5, 0.1, 0.9]
    assert verdict(tight, 0.3) == "met" and verdict(tight, 0.05) == "not met"
    assert verdict(tight, 0.05, "at least") == "met" and verdict(tight, 0.3, "at least") == "not met"
    assert verdict(tight, 0.11) == verdict(tight, 0.11, "at least") == "not powered"
    assert verdict(wide, 0.3) == verdict(wide, 0.3, "at least") == "not powered"
    assert verdict([-9.0], 0.3) == "not powered"  # one seed, however good
    low, high = t_interval(tight)
    assert verdict(tight, high) == "met" and verdict(tight, low, "at least") == "met"  # the end counts
    assert verdict(tight, low) == verdict(tight, high, "at least") == "not powered"
    assert verdict([0, 0, 0], 0) == "met"  # counts, such as divergences
    with pytest.raises(ValueError, match="unknown direction 'below'"):
        verdict(tight, 0.3, "below")
    with pytest.raises(ValueError, match="value 1 is nan"):
        verdict([0.1, math.nan, 0.1], 0.3)


def test_verdict_is_wrong_as_seldom_as_alpha_says():
    """On the threshold itself, each of the two definite answers comes with probability alpha / 2."""
    rng, trials = np.random.default_rng(0), 4000
    answers = [verdict(deltas, 0.0, alpha=0.2) for deltas in rng.normal(size=(trials, 3))]
    for answer in ("met", "not met"):
        # binomial: 4 sd of a rate of 0.1 in 4000 trials
        assert answers.count(answer) / trials == pytest.approx(0.1, abs=4 * math.sqrt(0.09 / trials))


def test_mcnemar_matches_scipy():
    for a, b in ((0, 0), (1, 0), (5, 5), (0, 10), (12, 25), (300, 380)):
        p = mcnemar_exact(a, b)
        assert p == mcnemar_exact(b, a) and (p == 1) == (abs(a - b) <= 1)
    scipy_stats = pytest.importorskip("scipy.stats", reason="scipy is the reference here")
    for a, b in ((1, 0), (0, 10), (12, 25), (300, 380), (2, 1000)):
        # 1e-10 relative is what scipy's own binomial tail is good for.
        assert mcnemar_exact(a, b) == pytest.approx(scipy_stats.binomtest(a, a + b).pvalue, rel=1e-10)
    with pytest.raises(ValueError, match="expected counts"):
        mcnemar_exact(-1, 3)
