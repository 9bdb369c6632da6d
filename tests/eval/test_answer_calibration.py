"""Calibration of whole answers: by hand, and against the definitions."""

import itertools
import json
import math

import numpy as np
import pytest

from eval import answer_calibration as calibration
from eval import metrics
from eval.answer_calibration import auroc, brier, ece, ece_interval, figures, judged, reliability, risk_coverage


@pytest.fixture
def answers():
    """400 answers whose confidence is too high by a third, with many ties."""
    random = np.random.default_rng(0)
    confidence = random.integers(0, 31, size=400) / 30
    return judged(confidence, random.random(400) < confidence * 2 / 3)


def test_by_hand():
    four = judged([0.95, 0.95, 0.15, 0.0], [True, False, True, False])
    assert reliability(four) == [(1, 0.0, 0.0), (1, 0.15, 1.0), (2, 0.95, 0.5)]
    assert ece(four) == pytest.approx((0 + 0.85 + 2 * 0.45) / 4)
    assert auroc(four) == pytest.approx((0.5 + 1 + 0 + 1) / 4)  # two right, two wrong: a tie, won, lost, won
    coverage, risk = risk_coverage(four)
    assert coverage.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert risk == pytest.approx([0.5, 0.5, 1 / 3, 0.5])  # of the tie half is expected wrong
    assert figures(four)["aurc"] == pytest.approx((0.5 + 0.5 + 1 / 3 + 0.5) / 4)


def test_a_bin_holds_its_upper_end():
    assert calibration.bins_of(np.array([0, 0.1, 0.1000001, 0.3, 0.7, 1.0])).tolist() == [0, 0, 1, 2, 6, 9]


def test_brier_is_the_sum_of_its_parts(answers):
    found = brier(answers)
    parts = found["brier_reliability"] - found["brier_resolution"] + found["brier_uncertainty"]
    assert found["brier"] == pytest.approx(parts + found["brier_within"], abs=1e-12)
    # Within: of a bin the variance of the confidence, less twice its covariance with being right.
    bins, within = calibration.bins_of(answers.confidence), 0.0
    for i in range(10):
        c, y = answers.confidence[bins == i], answers.right[bins == i]
        within += ((c - c.mean()) ** 2 - 2 * (c - c.mean()) * (y - y.mean())).sum() / len(answers.right)
    assert found["brier_within"] == pytest.approx(within, abs=1e-12)
    # Confidences that are the same within a bin leave nothing within it.
    coarse = brier(judged((calibration.bins_of(answers.confidence) + 0.5) / 10, answers.right))
    assert coarse["brier_within"] == pytest.approx(0, abs=1e-12) and coarse["brier_resolution"] > 0.01
    assert brier(judged([0.5] * 4, [1, 0, 1, 0])) == pytest.approx(
        dict(brier=0.25, brier_reliability=0, brier_resolution=0, brier_uncertainty=0.25, brier_within=0)
    )


def test_auroc_is_the_chance_of_the_right_order(answers):
    pairs = itertools.product(answers.confidence[answers.right], answers.confidence[~answers.right])
    assert auroc(answers) == pytest.approx(np.mean([(a > b) + 0.5 * (a == b) for a, b in pairs]))
    assert auroc(judged([0.2, 0.3], [True, True])) is None
    assert auroc(judged([0.2, 0.3], [False, True])) == 1.0


def test_risk_is_the_mean_over_orders_of_equal_confidence(answers):
    random, n = np.random.default_rng(1), len(answers.right)
    drawn = []
    for _ in range(2000):
        order = np.lexsort((random.random(n), -answers.confidence))
        drawn.append(np.cumsum(~answers.right[order]) / np.arange(1, n + 1))
    # The first answer is wrong or not: sd 0.5 / sqrt(2000) = 0.011.
    assert risk_coverage(answers)[1] == pytest.approx(np.mean(drawn, axis=0), abs=0.05)
    assert risk_coverage(answers)[1][-1] == pytest.approx(1 - answers.right.mean())


def test_the_rejection_ratio_by_hand():
    """Qualities 8, 4, 0 by falling confidence: kept means 8, 6, 4, of which 6 is the mean, over a base of 4. In another
    order, and with ties at their expectation."""
    ratio, quality = calibration.rejection_ratio, [8.0, 4.0, 0.0]
    assert ratio([3, 2, 1], quality) == 1 and ratio([7, 7, 7], quality) == 0
    assert ratio([1, 2, 3], quality) == pytest.approx((2 - 4) / (6 - 4))  # 0, 2, 4
    assert ratio([2, 3, 1], quality) == pytest.approx(((4 + 6 + 4) / 3 - 4) / (6 - 4))
    assert ratio([2, 2, 1], quality) == pytest.approx(((6 + 6 + 4) / 3 - 4) / (6 - 4))
    assert ratio([1, 2, 3], [5.0] * 3) is None


def test_the_interval_of_the_ece(answers):
    low, high = ece_interval(answers)
    assert low < ece(answers) < high and ece_interval(answers) == [low, high] != ece_interval(answers, seed=1)
    assert ece_interval(judged([0.5], [True])) == [None, None]
    # Its upper end is the percentile of the figure itself over resampled answers. Such a percentile of 2,000 has a
    # Monte-Carlo error of 0.06 sd: four of them, for the difference of two, 0.34.
    random, again = np.random.default_rng(0), []
    for _ in range(2000):
        pick = random.integers(0, 400, size=400)
        again.append(ece(judged(answers.confidence[pick], answers.right[pick])))
    assert high == pytest.approx(np.quantile(again, 0.975), abs=0.34 * np.std(again))
    # Gaps of other signs in other bins do not cancel: 0.2 where 60 % are right, 0.8 where 40 % are.
    mixed = judged(np.repeat([0.2, 0.8], 200), [i % 5 < 3 for i in range(200)] + [i % 5 < 2 for i in range(200)])
    assert ece_interval(mixed)[0] > 0.3
    # A model that knows its chances: nothing speaks against an ECE of 0, and the measured one is not 0.
    sure = random.random(400)
    assert ece_interval(judged(sure, random.random(400) < sure))[0] == 0


def test_what_the_table_of_metrics_names_is_measured(answers):
    keys = {m.key for m in metrics.ANSWER_CONFIDENCE["token"]}
    assert keys == {f"answers_token_{key}" for key in figures(answers) if key != "ece10_ci95"}
    assert tuple(metrics.ANSWER_CONFIDENCE) == calibration.KINDS


def test_confidence_of_a_sequence():
    found = calibration.confidence_of(math.log(0.25), 2)
    assert found == pytest.approx(dict(sequence=0.25, token=0.5))
    assert calibration.confidence_of(-1e9, 3) == dict(sequence=0.0, token=0.0)
    assert calibration.confidence_of(1e-9, 1) == dict(sequence=1.0, token=1.0)  # rounding above log 1


@pytest.mark.parametrize("confidence, right", [([], []), ([0.5], [True, False]), ([1.1], [True]), ([math.nan], [True])])
def test_no_confidences(confidence, right):
    with pytest.raises(ValueError, match="expected"):
        judged(confidence, right)


def test_a_file_of_verdicts(tmp_path):
    path = tmp_path / "verdicts.jsonl"
    assert calibration.read_confidences(path) == {}
    row = {"id": "test/0", "sample": 0, "correct": {"strict": True, "flexible": False}, "confidence": {"token": 0.5}}
    path.write_text(json.dumps(row) + "\n" + json.dumps(row | {"sample": 1}) + "\n")
    (kind, answers), *rest = calibration.read_confidences(path).items()
    assert kind == "token" and answers.confidence.tolist() == [0.5] and answers.right.tolist() == [True] and not rest
    path.write_text('{"id": 1, "confidence": {"token": 0.5}}\n')
    with pytest.raises(ValueError, match="verdicts.jsonl is no file of verdicts"):
        calibration.read_confidences(path)
