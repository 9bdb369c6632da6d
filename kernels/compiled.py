"""linear_score inside torch.compile(fullgraph=True): custom operators that the compiler does not look into.

An operator takes the number that ``compilable`` gave the score. The compiler guards it: another score compiles another
graph. Tensors that a score reads, such as DPSM's alpha, are read when the operator runs: fill them outside.
"""

import itertools
import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .head_pass import HeadPass, scaled
from .moments import Moments, Stats, as_moments, new_stats, order_of
from .topk import TopK, with_top

_SCORES = weakref.WeakValueDictionary()
_numbers = itertools.count()


class _Options(NamedTuple):
    """What both operators take beside tensors, in the order of their schema."""

    score: int  # its number in _SCORES
    wants: list[bool]  # whether hidden, weight and bias get a gradient
    reduction: str
    fisher: bool
    ignore_index: int
    tail: float
    scale: float
    softcap: float | None
    predictions: bool
    topk: int
    tokens: int | None
    chunk: int | None
    memory: int | None
    impl: str


# The last tensor is the denominator of the forward, the upstream gradient of the backward.
_TENSORS = (
    "Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, Tensor? weights, Tensor? class_weights, Tensor? last"
)
_OPTIONS = (
    "int score, bool[] wants, str reduction, bool fisher, int ignore_index, float tail, float scale, float? softcap, "
    "bool predictions, int topk, int? tokens, int? chunk, int? memory, str impl"
)


def _operator(name: str, outputs: int):
    schema = f"({_TENSORS}, {_OPTIONS}) -> ({', '.join(['Tensor'] * outputs)})"
    return torch.library.custom_op(f"scorecast::{name}", mutates_args=(), schema=schema)


def compilable(score: Callable[[Moments], Tensor]) -> Callable[[Moments], Tensor]:
    """``score`` itself, any callable that takes attributes, known to linear_score inside torch.compile by its attribute
    ``number``. Call this outside of the compiled function; the scores of losses.py are known already."""
    score.number = next(_numbers)
    _SCORES[score.number] = score
    return score


def traced_linear_score(tensors, score, **options) -> tuple[Tensor, Moments]:
    """linear_score while the compiler traces; ``tensors`` are in the order of _TENSORS, the last is the denominator."""
    if not hasattr(score, "number"):
        raise ValueError("inside torch.compile a score must be marked, outside of it: kernels.compilable(score)")
    hidden, weight, targets, bias, *_ = tensors
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):  # here, where autograd sees it and the operator's fake knows its dtype
        hidden = hidden.to(torch.get_autocast_dtype(kind))
        tensors = hidden, *tensors[1:]
    grad = torch.is_grad_enabled()
    wants = [grad and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    o = _Options(score=score.number, wants=wants, **options)
    total, stats, correct, fishers, predicted, *top = _linear_score(*tensors, *o)[: 5 + len(TopK._fields)]
    more = dict(fisher=fishers if o.fisher else None, predicted=predicted if o.predictions else None)
    if o.topk:
        more |= with_top(TopK(*top), torch.zeros_like(stats[0]))
    valid = targets != o.ignore_index
    return total, as_moments(Stats(*stats), correct, valid, weight.shape[0], o.tail, order_of(score), **more)


def _with_autograd():
    """Inside an operator autograd is switched off; a score's derivatives need it."""
    return torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)


def _open(arguments) -> tuple[HeadPass, Callable, Tensor | None, _Options]:
    """(pass, score, the last tensor, options) of an operator's arguments."""
    hidden, weight, targets, bias, weights, class_weights, last = arguments[:7]
    o = _Options(*arguments[7:])
    score = _SCORES[o.score]
    how = dict(
        bias=bias, weights=weights, class_weights=class_weights, order=order_of(score), ignore_index=o.ignore_index
    )
    names = ("tail", "scale", "softcap", "predictions", "topk", "tokens", "chunk", "memory", "impl")
    how |= {name: getattr(o, name) for name in names} | dict(trained=o.wants[1], wide=True)
    return HeadPass(hidden, weight, targets, **how), score, last, o


@_operator("linear_score", outputs=12)
def _linear_score(*arguments):
    """(loss, stats, correct, fisher, predicted, top_log_p, top_ids, top_entropy, d_hidden, d_weight, d_bias,
    denominator), empty tensors for what does not apply. The gradients are those of the sum; sums over chunks are
    fp32."""
    head, score, denominator, o = _open(arguments)
    with _with_autograd(), torch.no_grad():
        if o.reduction == "none":
            (total, moments, _), grads = head.losses(score, o.fisher), (None,) * 3
        else:
            total, moments, grads, denominator = head.reduced(score, o.reduction, denominator, o.fisher, o.wants)
    denominator = None if o.reduction != "mean" else denominator.to(head.stats.dtype)
    m = moments
    rest = m.fisher, m.predicted, m.top_log_p, m.top_ids, m.top_entropy, *grads, denominator
    rest = (head.h.new_empty(0) if x is None else x for x in rest)
    return total, head.of_all_rows(head.stats, 1), head.of_all_rows(head.correct), *rest


@_linear_score.register_fake
def _(hidden, weight, targets, bias, weights, class_weights, denominator, *options):
    o, n = _Options(*options), hidden.shape[0]
    narrow, wide = hidden.dtype, torch.float64 if hidden.dtype == torch.float64 else torch.float32
    summed = o.reduction != "none"

    def new(shape, there: bool | int = True, dtype=wide):
        return hidden.new_empty(shape if there else 0, dtype=dtype if there else narrow)

    shapes = zip((hidden.shape, weight.shape, weight.shape[:1]), (narrow, wide, wide), o.wants, strict=True)
    grads = [new(shape, wanted and summed, dtype) for shape, dtype, wanted in shapes]
    outputs = new(() if summed else n), *new_stats(hidden, n), new(n, o.fisher), new(n, o.predictions, torch.int64)
    top = new((n, o.topk), o.topk), new((n, o.topk), o.topk, torch.int64), new(n, o.topk)
    return *outputs, *top, *grads, new((), o.reduction == "mean")


@_operator("linear_score_backward", outputs=3)
def _linear_score_backward(*arguments):
    """(d_hidden, d_weight, d_bias) of reduction "none", from the logits computed again."""
    head, score, upstream, o = _open(arguments)
    with _with_autograd(), torch.no_grad():
        _, _, kept = head.losses(score, False)
        grads = head.gradient_of(score, kept, upstream, o.wants)
    return tuple(head.h.new_empty(0) if g is None else g for g in grads)


@_linear_score_backward.register_fake
def _(hidden, weight, targets, bias, weights, class_weights, upstream, *options):
    wants = _Options(*options).wants
    inputs = (hidden, weight, bias)
    return tuple(torch.empty_like(x) if w else hidden.new_empty(0) for x, w in zip(inputs, wants, strict=True))


def _setup(ctx, inputs, output):
    *tensors, _ = inputs[:7]
    ctx.options = _Options(*inputs[7:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*(tensors if ctx.options.reduction == "none" else output[8:]))
    ctx.dtypes = [None if x is None else x.dtype for x in (*tensors[:2], tensors[3])]  # hidden, weight, bias


def _backward(ctx, grad, *_):
    o = ctx.options
    if o.reduction == "none":
        grads = _linear_score_backward(*ctx.saved_tensors, grad, *o)
    else:
        *grads, denominator = ctx.saved_tensors
    grads = [g if w else None for g, w in zip(grads, o.wants, strict=True)]
    if o.reduction != "none":
        grads = scaled(grads, grad, denominator if o.reduction == "mean" else None, ctx.dtypes, inplace=False)
    return *grads[:2], None, grads[2], *(None,) * (3 + len(o))


_linear_score.register_autograd(_backward, setup_context=_setup)
