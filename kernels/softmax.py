"""softmax_moments: the Moments of logits as an autograd function."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .compiled_softmax import traced_softmax_moments
from .impl import brought, check_logits, check_targets, choose_impl
from .moments import (
    WITHOUT_GRADIENT,
    Moments,
    Partials,
    Stats,
    as_moments,
    check_gradients,
    check_order,
    gradient_coefficients,
    make_link,
    mask_stats,
    new_stats,
    no_gradient,
)
from .topk import topk_log_probs


def softmax_moments(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    tail: float = 0.0,
    order: Tensor | float | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    predictions: bool = False,
    topk: int = 0,
    inplace_backward: bool = False,
    impl: str = "auto",
) -> Moments:
    """Moments of softmax(logits) at the targets, differentiable with respect to the logits.

    logits [N, V] fp32, bf16 or fp16 (fp64: torch only), targets [N] integers in [0, V) or ignore_index. Arithmetic
    and moments are fp32 (fp64 for fp64). Beside the logits this takes O(N) memory: the backward computes p again.
    Rows may be strided; logits that are not contiguous along V are copied.

    ``tail`` > 0 fills tail_log_p. ``order`` > 1, a number or a 0-d tensor on the device, is the power g of Moments.s,
    by default 2. The softmax is that of softcap * tanh(scale * logits / softcap), or of scale * logits; the gradient is
    with respect to the logits as given. ``predictions`` fills Moments.predicted, ``topk`` the fields of so many of the
    likeliest tokens. ``inplace_backward`` writes the gradient over the logits, which nothing else may need; not inside
    torch.compile.

    ``impl`` is "triton", "torch", or "auto": Triton for CUDA tensors, torch for others. Raises ValueError for wrong
    shapes, dtypes, order, scale, softcap or impl, and on CPU for targets out of range; on CUDA that would wait for the
    device. Backward raises ValueError where a moment was used that has no gradient."""
    module = choose_impl(impl, logits)
    check_logits(logits, module)
    given = targets
    targets, valid, mask = check_targets(targets, len(logits), logits.shape[1], ignore_index, logits.device)
    order = brought(check_order(order), logits.device)
    how = dict(tail=tail, order=order, link=make_link(scale, softcap))
    if torch.compiler.is_compiling():
        values, correct, ids = traced_softmax_moments(
            logits, given, **how, predictions=predictions, ignore_index=ignore_index, impl=impl
        )
    else:
        ids = torch.empty_like(targets) if predictions else None
        *values, correct = _SoftmaxMoments.apply(logits, targets, mask, how, ids, inplace_backward, module)
    more = dict(predicted=ids)
    if topk:
        how = dict(lse=Stats(*values).lse.detach(), mask=mask, scale=scale, softcap=softcap, impl=impl)
        top = topk_log_probs(logits.detach(), topk, **how)
        more |= dict(top_ids=top.ids, top_log_p=_WithoutGradient.apply(logits, "top_log_p", top.log_p))
        more |= dict(top_entropy=_WithoutGradient.apply(logits, "top_entropy", top.entropy))
    return as_moments(Stats(*values), correct, valid, logits.shape[1], tail, order, **more)


def with_own_rows(logits: Tensor) -> Tensor:
    """``logits`` contiguous along V, each row in a storage of its own: a broadcast row could not be written to."""
    return logits.contiguous() if logits.stride(1) != 1 or logits.stride(0) < logits.shape[1] else logits


def empty_twin(x: Tensor) -> Tensor:
    """An uninitialised tensor of x's shape, strides, dtype and device."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)


class _WithoutGradient(torch.autograd.Function):
    """``value`` as it is, with a backward that says that it has no gradient."""

    @staticmethod
    def forward(ctx, logits, name, value):
        ctx.name = name
        return value.view_as(value)

    @staticmethod
    def backward(ctx, upstream):
        raise ValueError(no_gradient(ctx.name))


class GradientKnown(torch.autograd.Function):
    """Attaches to ``loss`` the gradients of ``leaves`` that gradients(upstream) gives. With ``once`` backward can run
    once, as it uses up what they are made of; else it raises where a leaf was changed in place since."""

    @staticmethod
    def forward(ctx, loss, gradients, once, *leaves):
        ctx.gradients, ctx.once = gradients, once
        if not once:
            ctx.save_for_backward(*leaves)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        gradients = ctx.gradients
        if gradients is None:
            raise RuntimeError("the loss's gradient was handed out already; use reduction='none' to go back twice")
        if ctx.once:
            ctx.gradients = None
        else:
            ctx.saved_tensors  # noqa: B018  looks whether they were changed
        return None, None, None, *gradients(upstream)


class _SoftmaxMoments(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, mask, how, ids, inplace_backward, module):
        logits = with_own_rows(logits)
        stats, correct = new_stats(logits, len(logits))
        module.forward(logits, targets, stats, correct, **how, predicted=ids)
        mask_stats(stats, correct, mask, ids)
        ctx.save_for_backward(logits, targets, mask, stats)
        ctx.how, ctx.inplace_backward, ctx.module = how, inplace_backward, module
        ctx.set_materialize_grads(False)
        rows = Stats(*stats.unbind(0))
        public = (*Partials._fields, *WITHOUT_GRADIENT)  # backward says where one of the latter was used
        ctx.mark_non_differentiable(*(x for name, x in rows._asdict().items() if name not in public), correct)
        return *rows, correct

    @staticmethod
    @once_differentiable
    def backward(ctx, *upstream):
        upstream = dict(zip(Stats._fields, upstream, strict=False))
        partials = Partials(*(upstream[name] for name in Partials._fields))
        order, link = ctx.how["order"], ctx.how["link"]
        check_gradients(upstream, order)
        if all(g is None for g in partials):
            return (None,) * 7
        logits, targets, mask, stats = ctx.saved_tensors
        logits, stats = logits.detach(), Stats(*stats)
        out = logits if ctx.inplace_backward else empty_twin(logits)
        coefficients = gradient_coefficients(stats, partials, order, link)
        ctx.module.gradient(logits, targets, mask, stats, coefficients, out=out, **ctx.how)
        return out, *(None,) * 6
