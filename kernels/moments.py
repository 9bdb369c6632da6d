"""Moments of softmax rows, the contract between the scores (losses.py) and the kernels.

With p = softmax(z), y the target and r_k = sum_{j != y} p_j^k, a loss f(log_p, r1, r2) whose partial
derivatives are g0, g1, g2 has the gradient

    dL/dz_j = p_j (a + c p_j),  j != y        a = -g0 + g1 p_y - 2 g2 r2,    c = 2 g2
    dL/dz_y = -(a r1 + c r2)

(from d log_p/dz_k = [k = y] - p_k and d p_j/dz_k = p_j ([j = k] - p_k)). With partials gm and gt for
``mean_log_p`` and ``tail_log_p``, n logits in the row and k of them in the tail, a loses gm + k gt/n,
every entry gains b = gm/n, every tail entry t = gt/n, and the target's entry stays minus the sum of
the others. So the implementations (torch_impl, triton_impl) only know how to reduce a row to its
moments and how to write p_j (a + c p_j) + b + t [p_j in tail]; each offers

    forward(logits, targets, stats, correct, tail, ...)       fills Stats and ``correct``
    gradient(logits, targets, mask, stats, coefficients, tail, out, ...)
"""

import functools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IMPLS = ("auto", "triton", "torch")


@dataclass
class Moments:
    """What a score may read about each token: vectors [N], fp32 (fp64 for fp64 logits).

    log_p         log p_y, in nats                                       differentiable
    r1, r2        sum_{j != y} p_j^k; r1 is 1 - p_y without cancellation differentiable
    mean_log_p    mean over j of log p_j                                 differentiable
    r3, r4        off-target sums, for the Fisher                        detached
    entropy       -sum_j p_j log p_j, in nats                            detached
    confidence    max_j p_j                                              detached
    correct       bool: argmax == target, the first index wins a tie
    valid         bool: target != ignore_index
    vocab_size    V, the length of a row
    tail_log_p    (1/V) sum_{j: p_j < tail/V} log p_j, its mask held constant in the gradient;
                  None unless asked for                                  differentiable
    support       number of logits above -inf                            detached
    fisher        |dL/dz|^2 of the score that linear_score was given; None unless asked for, detached

    A token outside the loss (target == ignore_index) has 0 or False everywhere and gradient 0.

    A logit of -inf is an entry outside the vocabulary: p = 0, and mean_log_p, tail_log_p and entropy
    leave it out, so that V in their formulas is ``support`` and a head padded with -inf gives what
    the head without padding gives.
    """

    log_p: Tensor
    r1: Tensor
    r2: Tensor
    mean_log_p: Tensor
    r3: Tensor
    r4: Tensor
    entropy: Tensor
    confidence: Tensor
    correct: Tensor
    valid: Tensor
    vocab_size: int
    tail_log_p: Tensor | None = None
    support: Tensor | None = None
    fisher: Tensor | None = None


class Stats(NamedTuple):
    """Per-token numbers a forward leaves behind, as the rows of one [15, N] buffer."""

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


class Partials(NamedTuple):
    """dL/d(moment) per token; None where the loss does not use the moment."""

    log_p: Tensor | None
    r1: Tensor | None
    r2: Tensor | None
    mean_log_p: Tensor | None = None
    tail_log_p: Tensor | None = None


class Coefficients(NamedTuple):
    """The gradient of a row: p_j (a + c p_j) + b + t [p_j in tail] off target, ``target`` at y."""

    a: Tensor
    c: Tensor | None
    b: Tensor | None
    t: Tensor | None
    target: Tensor


def softmax_moments(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    tail: float = 0.0,
    inplace_backward: bool = False,
    impl: str = "auto",
) -> Moments:
    """Moments of softmax(logits) at the targets, differentiable with respect to the logits.

    logits [N, V] fp32, bf16 or fp16 (fp64: torch only), targets [N] integers in [0, V) or ignore_index.
    The arithmetic is fp32 and the moments are fp32 whatever the logits are. Besides the logits,
    O(N) memory: the backward computes p again from them. Rows may be strided; logits that are not
    contiguous along V are copied.

    ``inplace_backward`` writes the gradient over the logits' own storage, which is then destroyed:
    for logits that nothing else needs, such as a head's output. ``tail`` > 0 fills tail_log_p.
    ``impl`` is "triton", "torch", or "auto": Triton for CUDA tensors, torch for others.

    Raises ValueError for wrong shapes, dtypes or impl, and on CPU for targets out of range; on CUDA
    targets are not checked, as that would wait for the device.
    """
    module = choose_impl(impl, logits)
    check_logits(logits, module)
    targets, valid, mask = check_targets(targets, len(logits), logits.shape[1], ignore_index, logits.device)
    *values, correct = _SoftmaxMoments.apply(logits, targets, mask, tail, inplace_backward, module)
    return as_moments(Stats(*values), correct, valid, logits.shape[1], tail)


class _SoftmaxMoments(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, mask, tail, inplace_backward, module):
        # A broadcast row has no storage of its own to write to.
        if logits.stride(1) != 1 or logits.stride(0) < logits.shape[1]:
            logits = logits.contiguous()
        stats, correct = new_stats(logits, len(logits))
        module.forward(logits, targets, stats, correct, tail)
        mask_stats(stats, correct, mask)
        ctx.save_for_backward(logits, targets, mask, stats)
        ctx.tail, ctx.inplace_backward, ctx.module = tail, inplace_backward, module
        ctx.set_materialize_grads(False)
        rows = Stats(*stats.unbind(0))
        ctx.mark_non_differentiable(*rows[5:], correct)  # from r3 on
        return *rows, correct

    @staticmethod
    @once_differentiable
    def backward(ctx, log_p, r1, r2, mean_log_p, tail_log_p, *_):
        if all(g is None for g in (log_p, r1, r2, mean_log_p, tail_log_p)):
            return (None,) * 6
        logits, targets, mask, stats = ctx.saved_tensors
        out = (
            logits.detach()
            if ctx.inplace_backward
            else torch.empty_strided(logits.shape, logits.stride(), dtype=logits.dtype, device=logits.device)
        )
        stats = Stats(*stats.unbind(0))
        coefficients = gradient_coefficients(stats, Partials(log_p, r1, r2, mean_log_p, tail_log_p))
        ctx.module.gradient(logits.detach(), targets, mask, stats, coefficients, ctx.tail, out)
        return out, None, None, None, None, None


def gradient_coefficients(s: Stats, partials: Partials) -> Coefficients:
    """Coefficients of the row gradients, as derived at the head of this module.

    Those of tokens outside the loss may be infinite or NaN: ``gradient`` and token_fisher mask rows.
    """
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
    """|dL/dz|^2 per token, [N]: the squared norm of the loss's gradient over the vocabulary.

    ``score`` maps Moments to the loss of each token. Its partials come from autograd on [N] vectors
    and the norm follows from the moments, with the coefficients at the head of this module:

        sum_{j != y} (p_j (a + c p_j) + b)^2
            = a^2 r2 + 2 a c r3 + c^2 r4 + 2 b (a r1 + c r2) + (n - 1) b^2

    plus the square of the target's entry. Raises ValueError for a score that reads tail_log_p: its
    gradient needs sums over the tail that are not among the moments.
    """
    _, partials = score_partials(moments, score)
    if partials.tail_log_p is not None:
        raise ValueError("token_fisher is not defined for a score that reads tail_log_p; leave out tail smoothing")
    m, zero = moments, torch.zeros_like(moments.r1)
    support = m.support if m.support is not None else torch.full_like(m.r1, m.vocab_size)
    p_y = torch.where(m.valid, m.log_p.detach().exp(), zero)
    known = dict(r1=m.r1.detach(), r2=m.r2.detach(), r3=m.r3, r4=m.r4, support=support, p_y=p_y)
    fisher = fisher_of(Stats(*(zero,) * 15)._replace(**known), partials)
    return torch.where(m.valid, fisher, 0.0).detach()


def fisher_of(s: Stats, partials: Partials) -> Tensor:
    """|dL/dz|^2 [N] as in ``token_fisher``; undefined for tokens outside the loss."""
    a, c, b, _, target = gradient_coefficients(s, partials)
    c, b = (torch.zeros_like(a) if x is None else x for x in (c, b))
    off = a * a * s.r2 + 2 * a * c * s.r3 + c * c * s.r4 + 2 * b * (a * s.r1 + c * s.r2) + (s.support - 1) * b * b
    return off + target * target


def score_partials(moments: Moments, score: Callable[[Moments], Tensor]) -> tuple[Tensor, Partials]:
    """Loss per token [N], detached, and its partial derivatives at the moments.

    The score must treat tokens independently. Raises ValueError where it does not return [N].
    """
    names = [n for n in Partials._fields if getattr(moments, n) is not None]
    with torch.enable_grad():
        leaves = {n: getattr(moments, n).detach().requires_grad_() for n in names}
        loss = score(Moments(**{**vars(moments), **leaves}))
        if not isinstance(loss, Tensor) or loss.shape != moments.r1.shape:
            got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"a score must return one loss a token, shape {tuple(moments.r1.shape)}; got {got}")
        grads = [None] * len(names)
        if loss.requires_grad:
            ones = torch.ones_like(loss)
            grads = torch.autograd.grad(loss, list(leaves.values()), ones, allow_unused=True)
    return loss.detach(), Partials(**{n: None for n in Partials._fields} | dict(zip(names, grads, strict=True)))


def as_moments(stats: Stats, correct: Tensor, valid: Tensor, vocab_size: int, tail: float) -> Moments:
    """The public view of ``stats``."""
    s = stats
    return Moments(
        log_p=s.log_p,
        r1=s.r1,
        r2=s.r2,
        mean_log_p=s.mean_log_p,
        r3=s.r3,
        r4=s.r4,
        entropy=s.entropy,
        confidence=s.confidence,
        correct=correct,
        valid=valid,
        vocab_size=vocab_size,
        tail_log_p=s.tail_log_p if tail else None,
        support=s.support,
    )


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


def check_logits(logits: Tensor, module: ModuleType) -> None:
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits must be [N, V] with V >= 1, got shape {tuple(logits.shape)}; flatten batch and time")
    if logits.dtype not in module.DTYPES:
        raise ValueError(f"logits must be one of {', '.join(map(str, module.DTYPES))}, got {logits.dtype}")


def check_targets(
    targets: Tensor, n: int, vocab: int, ignore_index: int, device
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Targets as int64 with 0 for the ignored ones; which are in the loss; and the same as a mask.

    The mask is None where all tokens are known to be in the loss, which on CUDA is never known
    without waiting for the device.
    """
    if targets.shape != (n,) or targets.is_floating_point() or targets.dtype == torch.bool:
        got = f"{tuple(targets.shape)} {targets.dtype}"
        raise ValueError(f"targets must be integers of shape ({n},), one a row of logits; got {got}")
    if targets.device != device:
        raise ValueError(f"targets are on {targets.device} and the logits on {device}; move them together")
    valid = targets != ignore_index
    targets = targets.long()
    if n and not targets.is_cuda:
        low, high = (x.item() for x in targets.aminmax())
        if low >= 0 and high < vocab and not low <= ignore_index <= high:
            return targets, valid, None
        wrong = targets[valid & ((targets < 0) | (targets >= vocab))]
        if len(wrong):
            where = f"[0, {vocab}) or ignore_index={ignore_index}"
            raise ValueError(f"target {wrong[0].item()} is outside {where}; check the tokenizer against the head")
    return torch.where(valid, targets, 0), valid, valid


def choose_impl(impl: str, tensor: Tensor) -> ModuleType:
    """The module behind ``impl``. Raises ValueError for a name or a device that cannot be had."""
    if impl not in IMPLS:
        raise ValueError(f"unknown impl {impl!r}; expected one of {', '.join(IMPLS)}")
    name, why = impl, "asked for"
    if impl == "auto":
        name, why = _automatic(tensor.device.type, tensor.dtype == torch.float64)
    elif impl == "triton" and not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        hint = "use impl='torch', or TRITON_INTERPRET=1 to interpret the kernels"
        raise ValueError(f"impl='triton' needs CUDA tensors, got {tensor.device}; {hint}")
    if impl == "auto":
        _announce(name, why)
    if name == "triton":
        from kernels import triton_impl

        return triton_impl
    from kernels import torch_impl

    return torch_impl


@functools.cache
def _automatic(device_type: str, double: bool) -> tuple[str, str]:
    if device_type != "cuda":
        return "torch", f"tensors are on {device_type}"
    if double:
        return "torch", "tensors are float64"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "torch", "triton is not installed"
    return "triton", "tensors are on cuda"


@functools.cache
def _announce(name: str, why: str) -> None:
    logging.getLogger("scorecast").info("kernels: impl='auto' uses %s (%s)", name, why)
