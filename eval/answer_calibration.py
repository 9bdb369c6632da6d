"""Calibration of whole answers: is an answer right as often as its confidence says, and does confidence tell right from
wrong?

A confidence is one of three numbers in [0, 1], of an answer that is right or wrong by one rule, which is named:

- sequence: the model's probability of the answer's tokens, its end included where it ended by itself: exp(sum log p);
- token: the same a token, exp(mean log p), so that long answers are not unsure for being long;
- agreement: the share of the sampled answers whose value is the greedy answer's, by the same rule.

What they are worth, with c the confidence and y 1 where the answer is right (`figures`):

- ECE of 10 bins (lo, hi], 0 in the first (Naeini et al., 2015), with a bootstrap interval over answers, see
  `eval.stats.ece_interval`. It is biased upwards on few problems; the interval's lower end makes up for it.
- Brier: mean (c - y)^2, 0 to 1, as reliability - resolution + uncertainty (Murphy, 1973) + within. The first three are
  of the 10 bins; within is what the spread of confidences inside bins adds (Stephenson et al., 2008, in one number).
- AUROC: the chance that a right answer has a higher confidence than a wrong one, a tie counting half.
- Risk-coverage: the share of wrong answers among the most confident part; AURC is its mean over all parts (Geifman and
  El-Yaniv, 2017). Answers of equal confidence come in an order drawn at random: their expectation is taken.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from eval import stats
from schedules.textlines import read_rows

KINDS = ("sequence", "token", "agreement")
BINS = 10


class Judged(NamedTuple):
    """Answers of one file by one rule."""

    confidence: np.ndarray  # [N] float64, 0 to 1
    right: np.ndarray  # [N] bool


def judged(confidence: Sequence[float], right: Sequence[bool]) -> Judged:
    """Raises ValueError for no answers, other lengths, and confidences outside [0, 1]."""
    c, y = np.asarray(confidence, dtype=np.float64), np.asarray(right, dtype=bool)
    if c.ndim != 1 or c.shape != y.shape or not len(c):
        raise ValueError(f"{c.shape} confidences and {y.shape} verdicts, expected one of each an answer")
    if not ((c >= 0) & (c <= 1)).all():
        raise ValueError(f"confidences from {c.min()} to {c.max()}, expected 0 to 1")
    return Judged(c, y)


def bins_of(confidence: np.ndarray, bins: int = BINS) -> np.ndarray:
    """The bin of each, [N] int64: i for (i / bins, (i + 1) / bins], 0 for 0."""
    return np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)


def reliability(answers: Judged, bins: int = BINS) -> list[tuple[int, float, float]]:
    """(number, mean confidence, accuracy) of each bin that holds an answer."""
    at = bins_of(answers.confidence, bins)
    held = ((at == i) for i in range(bins))
    return [
        (int(m.sum()), float(answers.confidence[m].mean()), float(answers.right[m].mean())) for m in held if m.any()
    ]


def ece(answers: Judged, bins: int = BINS) -> float:
    return sum(n * abs(c - y) for n, c, y in reliability(answers, bins)) / len(answers.right)


def ece_interval(answers: Judged, *, alpha: float = 0.05, seed: int = 0) -> list[float | None]:
    """`eval.stats.ece_interval` with each answer a block; [None, None] for too few."""
    n = len(answers.right)
    gaps = np.zeros((n, BINS))
    gaps[np.arange(n), bins_of(answers.confidence)] = answers.confidence - answers.right
    ends = stats.ece_interval(gaps, np.ones(n), alpha=alpha, seed=seed)
    return [None if math.isnan(end) else end for end in ends]


def brier(answers: Judged) -> dict[str, float]:
    """The Brier score and its parts, of which it is reliability - resolution + uncertainty + within."""
    score, accuracy, n = (
        float(((answers.confidence - answers.right) ** 2).mean()),
        answers.right.mean(),
        len(answers.right),
    )
    parts = {
        "reliability": sum(k * (c - y) ** 2 for k, c, y in reliability(answers)) / n,
        "resolution": float(sum(k * (y - accuracy) ** 2 for k, _, y in reliability(answers)) / n),
        "uncertainty": float(accuracy * (1 - accuracy)),
    }
    rest = score - (parts["reliability"] - parts["resolution"] + parts["uncertainty"])
    return {"brier": score} | {f"brier_{name}": v for name, v in parts.items()} | {"brier_within": rest}


def auroc(answers: Judged) -> float | None:
    """None where all answers are right, or all wrong."""
    right = int(answers.right.sum())
    wrong = len(answers.right) - right
    if not right or not wrong:
        return None
    _, group, count = np.unique(answers.confidence, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(count) - (count - 1) / 2)[group]  # from 1, the mean over ties
    return float((ranks[answers.right].sum() - right * (right + 1) / 2) / (right * wrong))


def kept_means(confidence: np.ndarray, quality: np.ndarray) -> np.ndarray:
    """[N]: the mean quality [N] of the k most confident, for k from 1; of equal confidences in an order drawn at random
    the expectation."""
    _, group = np.unique(-confidence, return_inverse=True)  # group 0 is the most confident
    count = np.bincount(group)
    return np.repeat(np.bincount(group, weights=quality) / count, count).cumsum() / np.arange(1, len(quality) + 1)


def rejection_ratio(confidence: Sequence[float], quality: Sequence[float]) -> float | None:
    """Prediction-rejection ratio, over all shares that are rejected: with A the mean of `kept_means`,

        (A(confidence) - mean quality) / (A(quality) - mean quality)

    1 where the worst are rejected first, 0 for chance, below it for worse than chance (Malinin et al., 2017; of
    generated text Fadeeva et al., LM-Polygraph, 2023). Both [N], of any scale; None where all qualities are equal."""
    sure, good = np.asarray(confidence, dtype=np.float64), np.asarray(quality, dtype=np.float64)
    best = kept_means(good, good).mean() - good.mean()
    return float((kept_means(sure, good).mean() - good.mean()) / best) if np.ptp(good) > 0 else None


def risk_coverage(answers: Judged) -> tuple[np.ndarray, np.ndarray]:
    """(coverage [N], risk [N]): of the k most confident answers the share of all, and of wrong ones."""
    kept = np.arange(1, len(answers.right) + 1)
    return kept / len(kept), kept_means(answers.confidence, ~answers.right)


def figures(answers: Judged, *, seed: int = 0) -> dict:
    """Everything above, by key."""
    found = {"accuracy": float(answers.right.mean()), "confidence": float(answers.confidence.mean())}
    found |= {"ece10": ece(answers), "ece10_ci95": ece_interval(answers, seed=seed)} | brier(answers)
    return found | {"auroc": auroc(answers), "aurc": float(risk_coverage(answers)[1].mean())}


def confidence_of(log_p: float, tokens: int) -> dict[str, float]:
    """``log_p``: summed over an answer's ``tokens``, nats."""
    return {"sequence": math.exp(min(0.0, log_p)), "token": math.exp(min(0.0, log_p / max(1, tokens)))}


def entries(verdicts: Sequence[dict], rule: str) -> dict:
    """Entries of summary.json of greedy ``verdicts`` that carry a confidence: answers_KIND_KEY, and the rule."""
    out = {"answers_rule": rule}
    for kind, answers in by_kind(verdicts, rule).items():
        out |= {f"answers_{kind}_{key}": value for key, value in figures(answers).items()}
    return out


def by_kind(verdicts: Sequence[dict], rule: str | None = None) -> dict[str, Judged]:
    """kind -> the greedy answers that have such a confidence. ``rule``: None is each verdict's main one, code or
    strict."""
    out = {}
    for kind in KINDS:
        rows = [v for v in verdicts if not v.get("sample") and kind in (v.get("confidence") or {})]
        if rows:
            rights = [v["correct"][rule or ("code" if "code" in v["correct"] else "strict")] for v in rows]
            out[kind] = judged([v["confidence"][kind] for v in rows], rights)
    return out


def read_confidences(path: Path) -> dict[str, Judged]:
    """kind -> the greedy answers of a verdicts.jsonl, by its main rule; {} where there is none, or no confidence in it.
    Raises ValueError naming a broken file."""
    try:
        return by_kind([row for _, row in read_rows(path, nan=True)]) if path.exists() else {}
    except (AttributeError, KeyError, TypeError):
        raise ValueError(f"{path} is no file of verdicts; expected id, correct and confidence") from None
