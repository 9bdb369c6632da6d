"""Moments of softmax rows: the contract between the scores (losses.py) and the kernels (torch_impl, triton_impl).

Let p = softmax(z), y the target, r_k = sum_{j != y} p_j^k, and g0, g1, g2 the partial derivatives of a loss
f(log_p, r1, r2). From d log_p/dz_k = [k = y] - p_k and d p_j/dz_k = p_j ([j = k] - p_k) its gradient is

    dL/dz_j = p_j (a + c p_j),  j != y        a = -g0 + g1 p_y - 2 g2 r2,    c = 2 g2
    dL/dz_y = -(a r1 + c r2)

With derivatives gm at ``mean_log_p`` and gt at ``tail_log_p``, in a row of n logits, k of them in the tail,

    a loses gm + k gt/n,    every entry gains b = gm/n,    every tail entry gains t = gt/n

and the target's entry stays minus the sum of the others. So an implementation only reduces a row to its moments and
writes p_j (a + c p_j) + b + t [p_j in tail]: torch_impl.forward and gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass
class Moments:
    """What a score may read about each token: vectors [N], fp32 (fp64 for fp64 logits).

    A token outside the loss (target == ignore_index) has 0 or False everywhere and gradient 0. A logit of -inf is an
    entry outside the vocabulary: mean_log_p, tail_log_p and entropy leave it out, with ``support`` in the place of V.
    """

    # Differentiable:
    log_p: Tensor  # log p_y, in nats
    r1: Tensor  # sum_{j != y} p_j, which is 1 - p_y without cancellation
    r2: Tensor  # sum_{j != y} p_j^2
    mean_log_p: Tensor  # mean over j of log p_j
    # Detached:
    r3: Tensor  # off-target sums of p_j^3 and p_j^4, for the Fisher
    r4: Tensor
    entropy: Tensor  # -sum_j p_j log p_j, in nats
    confidence: Tensor  # max_j p_j
    correct: Tensor  # bool: argmax == target, the first index wins a tie
    valid: Tensor  # bool: target != ignore_index
    vocab_size: int  # V, the length of a row
    # (1/V) sum_{j: p_j < tail/V} log p_j, differentiable with its mask held constant; None unless asked for.
    tail_log_p: Tensor | None = None
    support: Tensor | None = None  # number of logits above -inf
    fisher: Tensor | None = None  # |dL/dz|^2 of the score that linear_score was given; None unless asked for


class Stats(NamedTuple):
    """What a forward leaves behind about each token: the rows of one [15, N] buffer, ``Stats(*buffer)``."""

    log_p: Tensor
    r1: Tensor
    r2: Tensor
    mean_log_p: Tensor
    tail_log_p: Tensor
    r3: Tensor
    r4: Tensor
    entropy: Tensor
    confidence: Tensor
    support: Tensor
    p_y: Tensor
    tail_count: Tensor  # entries in the tail, the target included; undefined, as tail_log_p, without a tail
    tail_off: Tensor  # the same without the target
    row_max: Tensor  # off target: max_j z_j and sum_j exp(z_j - max), so that w_j = exp(z_j - max) / sum
    row_sum: Tensor


IN_BOTH = tuple(name for name in Stats._fields if name in Moments.__dataclass_fields__)


class Partials(NamedTuple):
    """dL/d(moment) per token; None where the loss does not use the moment."""

    log_p: Tensor | None
    r1: Tensor | None
    r2: Tensor | None
    mean_log_p: Tensor | None = None
    tail_log_p: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> "Partials":
        return Partials(*(None if g is None else function(g) for g in self))


class Coefficients(NamedTuple):
    """The gradient of a row: p_j (a + c p_j) + b + t [p_j in tail] off target, ``target`` at y."""

    a: Tensor
    c: Tensor | None
    b: Tensor | None
    t: Tensor | None
    target: Tensor


def gradient_coefficients(s: Stats, partials: Partials) -> Coefficients:
    """Coefficients of the row gradients, as derived at the head of this module. Those of tokens outside the loss may be
    infinite or NaN: ``gradient`` and token_fisher mask rows."""
    a = -partials.log_p if partials.log_p is not None else torch.zeros_like(s.r1)
    b = c = t = None
    if partials.r1 is not None:
        a = a + partials.r1 * s.p_y
    if partials.r2 is not None:
        c = 2 * partials.r2
        a = a - c * s.r2
    others = 0  # what b and t add to the sum of the off-target entries
    if partials.mean_log_p is not None:
        b = partials.mean_log_p / s.support
        a = a - partials.mean_log_p
        others = (s.support - 1) * b
    if partials.tail_log_p is not None:
        t = partials.tail_log_p / s.support
        a = a - s.tail_count * t
        others = others + s.tail_off * t
    target = -(a * s.r1 + others) if c is None else -(a * s.r1 + c * s.r2 + others)
    return Coefficients(a, c, b, t, target)


def token_fisher(moments: Moments, score: Callable[[Moments], Tensor]) -> Tensor:
    """|dL/dz|^2 per token, [N]: the squared norm of the score's gradient over the vocabulary.

    With the coefficients at the head of this module it follows from the moments: the square of the target's entry plus

        sum_{j != y} (p_j (a + c p_j) + b)^2
            = a^2 r2 + 2 a c r3 + c^2 r4 + 2 b (a r1 + c r2) + (n - 1) b^2

    Raises ValueError for a score that reads tail_log_p: its gradient needs sums over the tail beside the moments."""
    _, partials = score_partials(moments, score)
    if partials.tail_log_p is not None:
        raise ValueError("token_fisher is not defined for a score that reads tail_log_p; leave out tail smoothing")
    m, zeros = moments, Stats(*torch.zeros_like(moments.r1).expand(len(Stats._fields), -1))
    support = m.support if m.support is not None else torch.full_like(m.r1, m.vocab_size)
    p_y = torch.where(m.valid, m.log_p.detach().exp(), 0.0)
    known = dict(r1=m.r1.detach(), r2=m.r2.detach(), r3=m.r3, r4=m.r4, support=support, p_y=p_y)
    return torch.where(m.valid, fisher_of(zeros._replace(**known), partials), 0.0).detach()


def fisher_of(s: Stats, partials: Partials) -> Tensor:
    """|dL/dz|^2 [N] as in ``token_fisher``; undefined for tokens outside the loss."""
    a, c, b, _, target = gradient_coefficients(s, partials)
    c, b = (torch.zeros_like(a) if x is None else x for x in (c, b))
    off = a * a * s.r2 + 2 * a * c * s.r3 + c * c * s.r4 + 2 * b * (a * s.r1 + c * s.r2) + (s.support - 1) * b * b
    return off + target * target


def score_partials(moments: Moments, score: Callable[[Moments], Tensor]) -> tuple[Tensor, Partials]:
    """Loss per token [N], detached, and its partial derivatives at the moments. The score must treat tokens
    independently. Raises ValueError where it does not return [N]."""
    given = {n: getattr(moments, n) for n in Partials._fields}
    with torch.enable_grad():
        leaves = {n: x.detach().requires_grad_() for n, x in given.items() if x is not None}
        loss = score(Moments(**vars(moments) | leaves))
        if not isinstance(loss, Tensor) or loss.shape != moments.r1.shape:
            got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"a score must return one loss a token, shape {tuple(moments.r1.shape)}; got {got}")
        grads = dict.fromkeys(given)
        if loss.requires_grad:
            found = torch.autograd.grad(loss, list(leaves.values()), torch.ones_like(loss), allow_unused=True)
            grads |= zip(leaves, found, strict=True)
    return loss.detach(), Partials(**grads)


def as_moments(stats: Stats, correct: Tensor, valid: Tensor, vocab_size: int, tail: float, fisher=None) -> Moments:
    """The public view of ``stats``."""
    values = {name: getattr(stats, name) for name in IN_BOTH if tail or name != "tail_log_p"}
    return Moments(**values, correct=correct, valid=valid, vocab_size=vocab_size, fisher=fisher)


def new_stats(like: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Uninitialised buffers for ``tokens`` rows: stats [15, N] fp32 (fp64 for fp64), correct [N] bool."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    stats = torch.empty(len(Stats._fields), tokens, dtype=dtype, device=like.device)
    return stats, torch.empty(tokens, dtype=torch.bool, device=like.device)


def mask_stats(stats: Tensor, correct: Tensor, mask: Tensor | None) -> None:
    """Zeroes the tokens outside the loss, in place."""
    if mask is not None:
        stats.masked_fill_(~mask, 0.0)
        correct.logical_and_(mask)
