"""linear_score inside torch.compile(fullgraph=True): custom operators that the compiler does not look into.

A score is a Python function, which an operator cannot take; it takes the number under which
``compilable`` has it. The number is read from the score while the graph is traced, and guarded there, so
that another score compiles another graph. Tensors that a score reads, such as DPSM's alpha, are read when
the operator runs: fill them outside of the compiled function.
"""

import itertools
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from kernels.head import Head, scaled
from kernels.moments import Moments, Stats, as_moments, new_stats

_SCORES = weakref.WeakValueDictionary()
_numbers = itertools.count()


def compilable(score: Callable[[Moments], Tensor]) -> Callable[[Moments], Tensor]:
    """``score``, known to linear_score inside torch.compile. Use outside of the compiled function; the
    scores of losses.py have it already. Returns the score itself, which may be any callable that takes
    attributes."""
    score.number = next(_numbers)
    _SCORES[score.number] = score
    return score


def traced_linear_score(
    hidden, weight, targets, score, bias, weights, denominator, ignore_index, reduction, tail, fisher, chunk, impl
):
    """linear_score while the compiler traces."""
    number = getattr(score, "number", -1)
    if number < 0:
        raise ValueError(
            "inside torch.compile a score must be marked: score = kernels.compilable(score), outside of it"
        )
    grad = torch.is_grad_enabled()
    wants = [grad and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    total, stats, correct, fishers, *_ = _linear_score(
        hidden, weight, targets, bias, weights, denominator, number, ignore_index, reduction, tail, fisher, chunk or 0,
        impl, wants,
    )  # fmt: skip
    moments = as_moments(Stats(*stats.unbind(0)), correct, targets != ignore_index, weight.shape[0], tail)
    moments.fisher = fishers if fisher else None
    return total, moments


def _autograd():
    """Inside an operator autograd is out of reach; a score's derivatives need it."""
    return torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)


def _head(hidden, weight, targets, bias, weights, ignore_index, tail, chunk, impl) -> Head:
    return Head(hidden, weight, targets, ignore_index, tail, chunk or None, impl, bias, weights)


@torch.library.custom_op("scorecast::linear_score", mutates_args=())
def _linear_score(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    weights: Tensor | None,
    denominator: Tensor | None,
    score: int,
    ignore_index: int,
    reduction: str,
    tail: float,
    fisher: bool,
    chunk: int,
    impl: str,
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, stats, correct, fisher, d_hidden, d_weight, d_bias, denominator); what is not there is empty.
    The gradients are those of the sum, in fp32 where they are sums over chunks."""
    head = _head(hidden, weight, targets, bias, weights, ignore_index, tail, chunk, impl)
    none = hidden.new_empty(0)
    with _autograd(), torch.no_grad():
        if reduction == "none":
            losses, moments, _ = head.losses(_SCORES[score], fisher, keep=False)
            total, grads, denominator = head.weighted(losses), (None,) * 3, None
        else:
            total, moments, grads, denominator = head.reduced(_SCORES[score], reduction, denominator, fisher, wants)
    grads = [none.clone() if g is None else g for g in grads]
    fishers = moments.fisher if fisher else none.clone()
    denominator = none.clone() if denominator is None else denominator.to(head.stats.dtype)
    return total, head.stats, head.correct, fishers, *grads, denominator


@_linear_score.register_fake
def _(
    hidden,
    weight,
    targets,
    bias,
    weights,
    denominator,
    score,
    ignore_index,
    reduction,
    tail,
    fisher,
    chunk,
    impl,
    wants,
):
    n, wide = hidden.shape[0], torch.float64 if hidden.dtype == torch.float64 else torch.float32
    stats, correct = new_stats(hidden, n)
    total = hidden.new_empty(n if reduction == "none" else (), dtype=wide)
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    grads = [
        hidden.new_empty(shape, dtype=hidden.dtype if i == 0 else wide)
        if wants[i] and reduction != "none"
        else hidden.new_empty(0)
        for i, shape in enumerate(shapes)
    ]
    fishers = hidden.new_empty(n, dtype=wide) if fisher else hidden.new_empty(0)
    denominator = hidden.new_empty((), dtype=wide) if reduction == "mean" else hidden.new_empty(0)
    return total, stats, correct, fishers, *grads, denominator


@torch.library.custom_op("scorecast::linear_score_backward", mutates_args=())
def _linear_score_backward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    weights: Tensor | None,
    upstream: Tensor,
    score: int,
    ignore_index: int,
    tail: float,
    chunk: int,
    impl: str,
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """(d_hidden, d_weight, d_bias) of reduction "none", from the logits computed again."""
    head = _head(hidden, weight, targets, bias, weights, ignore_index, tail, chunk, impl)
    with _autograd(), torch.no_grad():
        _, _, kept = head.losses(_SCORES[score], False, keep=True)
        grads = head.gradient_of(_SCORES[score], kept, upstream, wants)
    return tuple(hidden.new_empty(0) if g is None else g for g in grads)


@_linear_score_backward.register_fake
def _(hidden, weight, targets, bias, weights, upstream, score, ignore_index, tail, chunk, impl, wants):
    inputs = (hidden, weight, bias)
    return tuple(torch.empty_like(x) if w else hidden.new_empty(0) for x, w in zip(inputs, wants, strict=True))


def _setup(ctx, inputs, output):
    hidden, weight, targets, bias, weights, _, *ctx.rest, ctx.wants = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.reduction = ctx.rest[2]
    if ctx.reduction == "none":
        ctx.save_for_backward(hidden, weight, targets, bias, weights)
    else:
        ctx.save_for_backward(*output[4:])
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)


def _backward(ctx, grad, *_):
    nothing = (None,) * 9
    if ctx.reduction == "none":
        hidden, weight, targets, bias, weights = ctx.saved_tensors
        score, ignore_index, _, tail, _, chunk, impl = ctx.rest
        grads = _linear_score_backward(
            hidden, weight, targets, bias, weights, grad, score, ignore_index, tail, chunk, impl, ctx.wants
        )
        grads = [g if w else None for g, w in zip(grads, ctx.wants, strict=True)]
    else:
        *grads, denominator = ctx.saved_tensors
        grads = [g if w else None for g, w in zip(grads, ctx.wants, strict=True)]
        grads = scaled(grads, grad, denominator if ctx.reduction == "mean" else None, ctx.dtypes, inplace=False)
    d_hidden, d_weight, d_bias = grads
    return d_hidden, d_weight, None, d_bias, None, *nothing


_linear_score.register_autograd(_backward, setup_context=_setup)
