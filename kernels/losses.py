"""Proper scoring rules as functions of the Moments of one softmax row, and DPSM's alpha schedule.

A score takes a ``kernels.Moments`` (fp32 vectors of length N, one entry per token) and returns the
loss of each token, ``[N]`` fp32, lower is better. It is ordinary PyTorch on small vectors: autograd
gives the partial derivatives, and the kernels turn those into the gradient over the vocabulary.
A score of your own is one line, for example the sum of CE and spherical:

    loss, moments = linear_score(hidden, weight, targets, lambda m: ce(m) + spherical(m))

The scores of LOSSES carry the name under which kernels/triton_scores.py has them as well (``named``), so
that on a GPU one kernel takes them from logits to gradient. A score without a name runs through the
moments, with the same result.

Throughout, p = softmax(logits), y the target, and r_k = sum_{j != y} p_j^k the OFF-TARGET moments,
so that 1 - p_y is r1, without cancellation as p_y -> 1.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from kernels import compilable

LOSSES = ("ce", "brier", "spherical", "dpsm", "focal", "smoothing")
ALPHA_SCHEDULES = ("linear", "cosine", "fixed")


def named(name: str, score: Callable[..., Tensor], knob: Tensor | float = 0.0) -> Callable[..., Tensor]:
    """``score``, marked as the score ``name`` of kernels/triton_scores.py with its parameter ``knob``."""
    score.fused = (name, knob)
    return compilable(score)


def ce(m) -> Tensor:
    """Cross-entropy, the logarithmic score: -log p_y, in nats."""
    return -m.log_p


def brier(m) -> Tensor:
    """Brier score sum_j (p_j - [j = y])^2 = sum p^2 - 2 p_y + 1, between 0 and 2 (Brier, 1950)."""
    return m.r1 * m.r1 + m.r2


def spherical(m) -> Tensor:
    """Spherical score as a loss, 1 - p_y / ||p||_2, between 0 and 1 (Good, 1971).

    Written r2 / (n (n + p_y)) with n = ||p||_2, which does not cancel as p_y -> 1.
    """
    p = m.log_p.exp()
    norm = (p * p + m.r2).sqrt()
    return m.r2 / (norm * (norm + p))


for _score in (ce, brier, spherical):
    named(_score.__name__, _score)


def focal(gamma: float) -> Callable[..., Tensor]:
    """Focal loss (1 - p_y)^gamma * CE (Lin et al., 2017). Proper only at gamma = 0."""

    def score(m):
        # The floor keeps r1^(gamma - 1) finite for gamma < 1 where p_y rounds to 1.
        return m.r1.clamp_min(torch.finfo(torch.float32).tiny) ** gamma * ce(m)

    return named("focal", score, gamma)


def smoothing(eps: float) -> Callable[..., Tensor]:
    """Label smoothing: (1 - eps) * CE against y plus eps * CE against the uniform distribution
    (Szegedy et al., 2016)."""
    return named("smoothing", lambda m: (1 - eps) * ce(m) - eps * m.mean_log_p, eps)


def dpsm(alpha: Tensor | float) -> Callable[..., Tensor]:
    """Dynamic Proper-Score Mixing: (1 - alpha) * CE + alpha * Brier.

    ``alpha`` is a float or a 0-d tensor; a tensor on the device is read when the score is
    evaluated, so filling it in place moves the mixture without a new closure and without a
    synchronisation. Proper for every alpha in [0, 1], as a convex mixture of proper scores.
    """
    return named("dpsm", lambda m: (1 - alpha) * ce(m) + alpha * brier(m), alpha)


def tail_smoothed(base: str, eps: float) -> Callable[..., Tensor]:
    """Score smoothing with a logarithmic tail for ``base`` 'brier' or 'spherical'.

    (1 - eps) * S(p, y) + eps * mean_j S(p, j) - (eps / V) * sum_{j: p_j < eps / V} log p_j

    The last term pushes up tokens that fall under the smoothed target eps / V, where bounded scores
    have almost no gradient; its mask is held constant in the gradient. From Shao et al., "Language
    Generation with Strictly Proper Scoring Rules", ICML 2024, section 4.3, as in the authors' code.
    Needs moments taken with ``tail=eps``.
    """

    def score(m):
        if m.tail_log_p is None:
            raise ValueError(f"tail smoothing needs softmax_moments(..., tail={eps})")
        p = m.log_p.exp()
        norm2 = p * p + m.r2  # ||p||^2
        if base == "brier":
            target, uniform = brier(m), norm2 - 2 / m.vocab_size + 1
        else:
            target, uniform = spherical(m), 1 - norm2.rsqrt() / m.vocab_size
        # A token outside the loss has log_p = r1 = r2 = 0: its uniform part must be 0 as well.
        uniform = torch.where(m.valid, uniform, torch.zeros_like(uniform))
        return (1 - eps) * target + eps * uniform - eps * m.tail_log_p

    if base not in ("brier", "spherical"):
        raise ValueError(f"tail smoothing is defined for brier and spherical, not {base!r}")
    return compilable(score)


def make_score(
    name: str,
    *,
    alpha: Tensor | float = 1.0,
    gamma: float = 2.0,
    eps: float = 0.1,
    tail: float = 0.0,
) -> Callable[..., Tensor]:
    """The named score with its knobs. Raises ValueError for an unknown name.

    ``alpha`` is used by dpsm, ``gamma`` by focal, ``eps`` by smoothing, ``tail`` (0 is off) by brier
    and spherical.
    """
    if name not in LOSSES:
        raise ValueError(f"unknown loss {name!r}; expected one of {', '.join(LOSSES)}")
    if tail and name not in ("brier", "spherical"):
        raise ValueError(f"tail smoothing is defined for brier and spherical, not {name!r}")
    if tail:
        return tail_smoothed(name, tail)
    return {
        "ce": ce,
        "brier": brier,
        "spherical": spherical,
        "dpsm": dpsm(alpha),
        "focal": focal(gamma),
        "smoothing": smoothing(eps),
    }[name]


def alpha_at(
    step: int,
    total: int,
    *,
    warmup: float = 0.1,
    schedule: str = "linear",
    alpha_max: float = 1.0,
    start: float = 0.0,
) -> float:
    """DPSM's alpha before OPTIMIZER step ``step`` (0-based) of ``total``.

    alpha_max * ramp((step - start * total) / (warmup * total)), the ramp linear or half a cosine and
    clipped to [0, 1]; ``fixed`` is alpha_max at every step. ``warmup`` and ``start`` are fractions of
    ``total``; with warmup = 0 alpha jumps to alpha_max at ``start``. A function of its arguments
    alone: micro-batches, evaluation and restarts cannot move it.
    """
    if schedule not in ALPHA_SCHEDULES:
        raise ValueError(f"unknown alpha schedule {schedule!r}; expected one of {', '.join(ALPHA_SCHEDULES)}")
    if schedule == "fixed":
        return alpha_max
    since, length = step - start * total, warmup * total
    x = min(max(since / length, 0.0), 1.0) if length > 0 else float(since >= 0)
    return alpha_max * (x if schedule == "linear" else 0.5 * (1 - math.cos(math.pi * x)))
