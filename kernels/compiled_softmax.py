"""softmax_moments inside torch.compile(fullgraph=True): operators that the compiler does not look into, as in compiled.

The score on the moments, vectors of length N, is left to the compiler.
"""

import torch
from torch import Tensor

from .impl import check_targets, choose_impl
from .moments import (
    WITHOUT_GRADIENT,
    Partials,
    Stats,
    check_gradients,
    gradient_coefficients,
    make_link,
    mask_stats,
    new_stats,
)

# The rows of Stats that a score may ask a gradient of, some in vain: outputs of their own. They come first in Stats.
ASKED = Stats._fields[: len(Partials._fields) + len([n for n in WITHOUT_GRADIENT if n in Stats._fields])]
_HOW = "Tensor? order, float tail, float scale, float softcap, int ignore_index, str impl"


def _operator(name: str, arguments: str, outputs: int):
    schema = f"({arguments}, {_HOW}) -> ({', '.join(['Tensor'] * outputs)})"
    return torch.library.custom_op(f"scorecast::{name}", mutates_args=(), schema=schema)


def traced_softmax_moments(logits, targets, order, tail, link, predictions, ignore_index, impl):
    """(Stats, correct, ids or None) while the compiler traces; ``order``: a number, a 0-d tensor, or None for 2."""
    if order is not None and not isinstance(order, Tensor):
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        order = torch.full((), order, dtype=wide, device=logits.device)
    how = order, tail, link.scale, link.softcap, ignore_index, impl
    *asked, stats, correct, ids = _softmax_moments(logits, targets, predictions, *how)
    return Stats(*asked, *stats[len(asked) :]), correct, ids if predictions else None


@_operator("softmax_moments", "Tensor logits, Tensor targets, bool predictions", outputs=len(ASKED) + 3)
def _softmax_moments(logits, targets, predictions, order, tail, scale, softcap, ignore_index, impl):
    """Each of ASKED, all of Stats in one tensor, correct, and the predictions or an empty tensor."""
    targets, _, mask = check_targets(targets, len(logits), logits.shape[1], ignore_index, logits.device)
    stats, correct = new_stats(logits, len(logits))
    ids = torch.empty_like(targets) if predictions else None
    how = dict(order=order, link=make_link(scale, softcap or None), predicted=ids)
    choose_impl(impl, logits).forward(logits.contiguous(), targets, stats, correct, tail, **how)
    mask_stats(stats, correct, mask, ids)
    asked = (x.clone() for x in stats[: len(ASKED)])  # outputs share no memory
    return *asked, stats, correct, ids if predictions else targets.new_empty(0)


@_softmax_moments.register_fake
def _(logits, targets, predictions, *how):
    n = logits.shape[0]
    stats, correct = new_stats(logits, n)
    ids = targets.new_empty(n if predictions else 0, dtype=torch.int64)
    return *(torch.empty_like(x) for x in stats[: len(ASKED)]), stats, correct, ids


_UPSTREAM = ", ".join(f"Tensor? d_{name}" for name in Partials._fields)


@_operator("softmax_gradient", f"Tensor logits, Tensor targets, Tensor stats, {_UPSTREAM}", outputs=1)
def _softmax_gradient(logits, targets, stats, *more):
    *partials, order, tail, scale, softcap, ignore_index, impl = more
    targets, _, mask = check_targets(targets, len(logits), logits.shape[1], ignore_index, logits.device)
    link, stats, logits = make_link(scale, softcap or None), Stats(*stats), logits.contiguous()
    coefficients, out = gradient_coefficients(stats, Partials(*partials), order, link), torch.empty_like(logits)
    how = dict(order=order, link=link)
    choose_impl(impl, logits).gradient(logits, targets, mask, stats, coefficients, tail, out, **how)
    return out


@_softmax_gradient.register_fake
def _(logits, *_):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _setup(ctx, inputs, output):
    logits, targets, _, order, *ctx.how = inputs
    *_, stats, correct, ids = output
    ctx.mark_non_differentiable(stats, correct, ids)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, targets, stats, order)


def _backward(ctx, *upstream):
    logits, targets, stats, order = ctx.saved_tensors
    upstream = dict(zip(ASKED, upstream, strict=False))
    check_gradients(upstream, order)
    partials = [upstream[name] for name in Partials._fields]
    if all(g is None for g in partials):
        return (None,) * 9
    return _softmax_gradient(logits, targets, stats, *partials, order, *ctx.how), *(None,) * 8


_softmax_moments.register_autograd(_backward, setup_context=_setup)
