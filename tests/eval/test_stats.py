"""Statistics across seeds: Student's t against scipy and closed forms, Holm against closed testing, power, verdicts;
intervals of proportions and of the ECE."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats

from eval.stats import (
    bootstrap_interval,
    claim_p,
    detectable,
    ece_interval,
    ece_interval_of_bins,
    holm,
    holm_level,
    interquartile_mean,
    mcnemar_exact,
    paired,
    proportion_interval,
    rate_difference_interval,
    rate_interval,
    required_ratio,
    seeds_needed,
    stratified_bootstrap,
    summarize,
    t_interval,
    t_power,
    verdict,
)


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


def test_power_is_the_noncentral_ts_and_published():
    """Seeds for 80 % at Cohen's small, medium and large effect: 199, 34 and 15 (G*Power, paired t, two-sided); the
    detectable ratios are those of statsmodels' TTestPower, and what simulated tests find."""
    assert [seeds_needed(ratio) for ratio in (0.2, 0.5, 0.8, -0.8)] == [199, 34, 15, 15]
    assert seeds_needed(0.01) is None and seeds_needed(0) is None and seeds_needed(100) == 2
    for n, ratio in ((3, 3.2640436), (5, 1.6819971), (10, 0.9960019)):
        assert detectable(n) == pytest.approx(ratio, rel=1e-6)
        assert t_power(ratio, n) == pytest.approx(0.8, rel=1e-6)
    rng, trials, n = np.random.default_rng(0), 20_000, 4
    deltas = rng.normal(detectable(n, power=0.6, alpha=0.02), 1, size=(trials, n))
    found = scipy.stats.ttest_1samp(deltas, 0, axis=1, alternative="greater").pvalue <= 0.01
    assert found.mean() == pytest.approx(0.6, abs=4 * math.sqrt(0.24 / trials))  # binomial, 4 sd
    assert detectable(1) == math.inf and t_power(3, 1) == 0
    with pytest.raises(ValueError, match="power=1.5"):
        detectable(3, power=1.5)


def test_a_claims_p_decides_as_its_interval_does():
    rng = np.random.default_rng(0)
    for _ in range(50):
        deltas, threshold = rng.normal(0.8, 1, 4), rng.normal()
        assert claim_p(deltas, threshold) == pytest.approx(scipy.stats.ttest_1samp(deltas, threshold).pvalue, rel=1e-9)
        assert (claim_p(deltas, threshold) <= 0.05) == (verdict(deltas, threshold) != "not powered")
    assert math.isnan(claim_p([1.0], 0)) and claim_p([1, 1, 1], 1) == claim_p([1, 1, 1], 0) == 0


def test_the_level_of_holm_rejects_what_holm_rejects():
    rng = np.random.default_rng(0)
    for m in (1, 2, 5, 9):
        for _ in range(30):
            p = rng.uniform(size=m) ** 4
            assert [v <= holm_level(p) for v in p] == [v <= 0.05 for v in holm(p)]
    assert holm_level([]) == holm_level([math.nan]) == holm_level([0.01, math.nan]) == 0.05
    assert holm_level([0.001, 0.04, 0.5, 0.02]) == 0.05 / 3  # 0.001 <= 0.05 / 4; then 0.02 > 0.05 / 3


def test_interquartile_mean_by_hand():
    """Agarwal et al.: of 20 scores the middle 10. rliable 1.2 gives the same for its [runs, tasks]."""
    scores = np.random.default_rng(0).permutation(20)
    assert interquartile_mean(scores) == np.mean(range(5, 15)) and interquartile_mean([1, 2, 9]) == 4
    assert interquartile_mean([0, 1, 2, 900]) == 1.5
    with pytest.raises(ValueError, match="value 1 is nan"):
        interquartile_mean([1, math.nan])


def test_stratified_bootstrap_draws_within_tasks():
    """Equal runs within tasks far apart: no interval at all, where a plain bootstrap has a wide one. A mean's width is
    that of the normal law of sum of variances within tasks."""
    mean = np.mean
    assert stratified_bootstrap([[0, 0, 0], [9, 9]], mean) == pytest.approx((3.6, 3.6))
    rng = np.random.default_rng(1)
    tasks = [rng.normal(100 * i, 1 + i, size=12) for i in range(3)]
    sd = math.sqrt(sum(np.var(v) / len(v) for v in tasks)) / 3
    low, high = stratified_bootstrap(tasks, mean, resamples=10_000)
    assert high - low == pytest.approx(2 * 1.96 * sd, rel=0.05)  # 4 Monte-Carlo errors of two quantiles
    assert stratified_bootstrap(tasks, mean, seed=3) == stratified_bootstrap(tasks, mean, seed=3)
    assert all(map(math.isnan, stratified_bootstrap([[1.0, 2.0], [3.0]], mean)))
    with pytest.raises(ValueError, match="no tasks"):
        stratified_bootstrap([])


def test_stratified_bootstrap_of_the_iqm_is_rliables():
    """What rliable 1.2's get_interval_estimates gave for these scores with 20,000 repetitions, percentile method."""
    scores = np.random.default_rng(3).normal(size=(5, 4))  # runs, tasks
    assert interquartile_mean(scores.ravel()) == pytest.approx(-0.2705236751111956, rel=1e-12)
    # The Monte-Carlo error of such a quantile is 0.003 (see above; the sd of the IQM is 0.155): 4 sd of two of them.
    assert stratified_bootstrap(scores.T.tolist(), resamples=20_000) == pytest.approx((-0.538, 0.067), abs=0.017)


def test_a_proportion_of_none_or_all_has_an_interval():
    """scipy's, and the closed form at the ends, z^2 / (n + z^2)."""
    z = scipy.stats.norm.isf(0.025)
    for right, n in ((0, 96), (96, 96), (1, 96), (15, 50), (3, 7), (1319, 1319)):
        for alpha in (0.05, 0.2):
            theirs = scipy.stats.binomtest(right, n).proportion_ci(1 - alpha, method="wilson")
            assert proportion_interval(right, n, alpha=alpha) == pytest.approx(tuple(theirs), abs=1e-12)
    assert proportion_interval(0, 96) == pytest.approx((0, z * z / (96 + z * z)), abs=1e-15)
    # Newcombe (1998), table I: 81 of 263 has 0.2553 to 0.3662, 0 of 20 has 0 to 0.1611.
    assert proportion_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert proportion_interval(0, 20) == pytest.approx((0, 0.1611), abs=5e-5)
    for right, n in ((-1, 3), (4, 3), (0, 0)):
        with pytest.raises(ValueError, match=f"{right} of {n}"):
            proportion_interval(right, n)


def test_rates_have_wilsons_interval_or_the_bootstraps():
    assert rate_interval([0.0] * 96) == proportion_interval(0, 96)
    assert rate_interval([1.0, 0.0, 1.0]) == proportion_interval(2, 3)
    rates = [0.2, 0.0, 1.0, 0.6]
    assert rate_interval(rates) == bootstrap_interval(rates, resamples=2000)
    assert all(map(math.isnan, rate_interval([1.0])))
    with pytest.raises(ValueError, match="rates from 0 to 2"):
        rate_interval([0, 2])


def test_a_difference_of_rates_that_never_differ_has_an_interval():
    zeros, ones = [0.0] * 96, [1.0] * 96
    w = proportion_interval(0, 96)[1]
    assert rate_difference_interval(zeros, zeros) == rate_difference_interval(ones, ones) == (-w, w)
    assert rate_difference_interval(ones, zeros) == pytest.approx((1 - 2 * w, 1))
    assert rate_difference_interval(zeros, ones) == pytest.approx((-1, 2 * w - 1))
    a = [1.0] * 30 + [0.0] * 66
    assert rate_difference_interval(a, zeros) == bootstrap_interval(a, resamples=2000)
    assert all(map(math.isnan, rate_difference_interval([1.0], [0.0])))


def tokens(rng, overconfidence: float, blocks: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Confidences and whether right, [blocks, size]; blocks share a shift of their accuracy, as documents do."""
    sure = rng.beta(1, 2, size=(blocks, size))
    shift = 4 * sure * (1 - sure) * rng.normal(0, 0.03, size=(blocks, 1))
    return sure, rng.random((blocks, size)) < np.clip(sure * (1 - overconfidence) + shift, 0, 1)


def binned(weights: np.ndarray, at: np.ndarray, bins: int) -> np.ndarray:
    """Sums of [blocks, size] by block and bin, [blocks, bins]."""
    out = np.zeros((len(at), bins))
    np.add.at(out, (np.arange(len(at))[:, None], at), weights)
    return out


@pytest.mark.parametrize("overconfidence", [0.0, 0.03, 0.3])
def test_an_interval_of_the_ece_holds_the_true_one(overconfidence):
    """Also for a calibrated model, whose ECE is 0 and whose measured one never is. The ECE of a model that is too sure
    by a factor is that factor times the mean confidence, a third."""
    rng, trials, held = np.random.default_rng(0), 100, 0
    for _ in range(trials):
        sure, right = tokens(rng, overconfidence, 40, 200)
        at = np.clip(np.ceil(sure * 10).astype(int) - 1, 0, 9)
        low, high = ece_interval(binned(sure - right, at, 10), np.full(40, 200), resamples=300)
        held += low <= overconfidence / 3 <= high
    assert held >= 86  # 95 % less 4 sd of a binomial


def test_blocks_that_share_a_shift_widen_the_interval():
    """Tokens drawn as independent give a narrower one; of tokens that are, the two agree."""
    rng = np.random.default_rng(0)
    for shared in (True, False):
        sure, right = tokens(rng, 0.3, 200, 500)
        if not shared:
            order = rng.permutation(sure.size)  # blocks of strangers
            sure, right = (x.ravel()[order].reshape(sure.shape) for x in (sure, right))
        at = np.clip(np.ceil(sure * 300).astype(int) - 1, 0, 299)
        low, high = ece_interval(binned(sure - right, at // 30, 10), np.full(200, 500))
        sums = (binned(w, at, 300).sum(0) for w in (np.ones_like(sure), sure, right))
        bins_low, bins_high = ece_interval_of_bins(*sums)
        ratio = (high - low) / (bins_high - bins_low)
        assert ratio > 1.3 if shared else ratio == pytest.approx(1, abs=0.15)  # 2,000 resamples each


def test_the_number_of_tokens_in_a_bin_is_drawn_too():
    """400 tokens at 0.5, all right, and 400 at 0.9, all wrong: the ECE is 0.5 + 0.4 x the second's binomial share."""
    count, sure, right = np.zeros((3, 10))
    count[[4, 8]], sure[[4, 8]], right[4] = 400, (200, 360), 400
    half = 1.96 * 0.4 * math.sqrt(0.25 / 800)
    # Its lower end takes off twice a bias, which is 0 here but for 3 Monte-Carlo errors of the mean, 0.0003 each.
    assert ece_interval_of_bins(count, sure, right) == pytest.approx((0.7 - half, 0.7 + half), abs=0.0015)


def test_an_interval_of_the_ece_refuses_what_it_cannot_have():
    assert all(map(math.isnan, ece_interval(np.ones((9, 10)), np.ones(9))))
    with pytest.raises(ValueError, match="without tokens"):
        ece_interval(np.ones((12, 10)), np.zeros(12))
    with pytest.raises(ValueError, match=r"gaps \[12\]"):
        ece_interval(np.ones(12), np.ones(12))
    with pytest.raises(ValueError, match="0 tokens in 10 bins"):
        ece_interval_of_bins([0] * 10, [0] * 10, [0] * 10)
