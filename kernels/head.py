"""Scores over a linear head, logits = hidden @ weight.T, without ever holding the [N, V] logits."""

from collections.abc import Callable

import torch
from torch import Tensor

from .compiled import traced_linear_score
from .head_pass import HeadPass, scaled
from .impl import check_reduction
from .losses import ce
from .moments import Moments, check_order, order_of
from .softmax import GradientKnown
from .topk import TopK, check_top, fill_top, new_top, topk_of


def linear_score(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    score: Callable[[Moments], Tensor],
    *,
    bias: Tensor | None = None,
    weights: Tensor | None = None,
    class_weights: Tensor | None = None,
    ignore_index: int = -100,
    tokens: int | None = None,
    reduction: str = "mean",
    denominator: Tensor | None = None,
    tail: float = 0.0,
    scale: float = 1.0,
    softcap: float | None = None,
    fisher: bool = False,
    predictions: bool = False,
    topk: int = 0,
    chunk: int | None = None,
    memory: int | None = None,
    accum_dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Moments]:
    """The score of a linear head's predictions, and the detached moments of every token.

    hidden [N, D], weight [V, D], bias [V] or None, targets [N] as in ``softmax_moments``. The matrix products run in
    the dtype of ``hidden`` (in autocast's under autocast), to which weight and bias are cast once. Gradients have the
    dtypes of hidden, weight and bias; those of weight and bias are summed over chunks in fp32. ``accum_dtype``
    torch.bfloat16, for hidden and weight in bf16, sums d_weight in bf16 instead: half of its bytes, no fp32 copy of it,
    and a rounding for each chunk (chunks.py).

    ``score`` maps Moments to a loss per token, each token by itself. Tensors that it reads beside, such as a 0-d alpha,
    receive no gradient. On a GPU a named score (losses.named) is one kernel. ``tail`` > 0 fills tail_log_p. ``scale``
    and ``softcap`` as in ``softmax_moments``. ``fisher`` fills Moments.fisher with |d score/dz|^2 of each token,
    without a pass over the logits; ``predictions`` fills Moments.predicted. ``topk``: top_log_p, top_ids and
    top_entropy are of so many of the likeliest tokens, by a kernel of its own.

    ``weights`` [N], without gradient: a factor for each token's loss and gradient. A token of weight 0, such as a
    prompt's, has its moments and Fisher, and no part in the loss. ``class_weights`` [V]: a factor more, that of the
    target's class. ``chunk``: tokens at a time, by default what fits in ``memory`` bytes. On CPU these hold a chunk's
    logits, by default head_pass.CPU_BUDGET; on CUDA all that there is beside inputs and gradients, by default
    chunks.ALLOWANCE, and chunks.chunk_rows chooses.

    Ignored rows are left out before the head, and cost nothing, on CPU; on a GPU where ``tokens`` says how many targets
    are in the loss, as the device is not asked. A wrong number there gives a loss of NaN.

    ``reduction`` "mean" divides the sum of weights * losses by ``denominator``, a 0-d tensor on the device; by default
    the sum of the weights in the loss (without weights, the number of tokens; 1 where that is 0). "mean" and "sum"
    compute the gradient in the forward: backward only scales it and can run once. "none" gives the weighted loss of
    each token, [N] fp32, and computes the logits again in backward. Raises ValueError for arguments that do not fit
    together; targets are checked on CPU only. Inside torch.compile the score must be marked (kernels.compilable)."""
    check_reduction(reduction, denominator, weights, hidden)
    how = dict(ignore_index=ignore_index, tail=tail, scale=scale, softcap=softcap, predictions=predictions)
    how |= dict(topk=topk_of(score, topk, len(weight)), tokens=tokens, chunk=chunk, memory=memory, impl=impl)
    if torch.compiler.is_compiling():
        if accum_dtype:
            raise ValueError(f"accum_dtype={accum_dtype}: inside torch.compile d_weight is summed in fp32")
        tensors = (hidden, weight, targets, bias, weights, class_weights, denominator)
        return traced_linear_score(tensors, score, reduction=reduction, fisher=fisher, **how)
    wants = tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias))
    given = dict(bias=bias, weights=weights, class_weights=class_weights, order=order_of(score), trained=wants[1])
    head = HeadPass(hidden, weight, targets, accum_dtype=accum_dtype, **given, **how)
    leaves = (head.hidden, weight, bias)
    if reduction == "none":
        total, moments, kept = head.losses(score, fisher)
        if any(wants):
            total = GradientKnown.apply(total, lambda up: head.gradient_of(score, kept, up, wants), False, *leaves)
        return total, moments
    total, moments, grads, denominator = head.reduced(score, reduction, denominator, fisher, wants)
    if any(wants):
        how = dict(dtypes=head.grad_dtypes, rescale=getattr(head.module, "rescale", None))  # not head, with its buffers
        total = GradientKnown.apply(total, lambda up: scaled(grads, up, denominator, **how), True, *leaves)
    return total, moments


def linear_sequence_log_p(hidden: Tensor, weight: Tensor, targets: Tensor, **how) -> tuple[Tensor, Moments]:
    """The log-probability of each sequence, [B], with its gradient, and the detached moments of its B * T tokens.

    hidden [B, T, D], targets [B, T] as they are to be predicted, ignore_index where nothing is; the sum is over the
    others, in nats. For preference losses and policy gradients, or to rank answers. ``how``: arguments of
    ``linear_score`` but its score, weights, reduction and denominator. Backward computes the logits again. Raises
    ValueError for shapes that do not fit."""
    if hidden.dim() != 3 or targets.shape != hidden.shape[:2]:
        shapes = f"{tuple(hidden.shape)} and {tuple(targets.shape)}"
        raise ValueError(f"hidden must be [B, T, D] and targets [B, T], got {shapes}")
    nll, moments = linear_score(hidden.flatten(0, 1), weight, targets.flatten(), ce, reduction="none", **how)
    return -nll.view(targets.shape).sum(1), moments


def linear_moments(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float | Tensor = 1.0,
    softcap: float | None = None,
    order: Tensor | float | None = None,
    ignore_index: int = -100,
    tokens: int | None = None,
    tail: float = 0.0,
    predictions: bool = False,
    topk: int = 0,
    chunk: int | None = None,
    memory: int | None = None,
    impl: str = "auto",
) -> Moments:
    """Moments of the softmax at the targets, without gradient. Arguments as in ``linear_score`` and
    ``softmax_moments``. A temperature T is scale / T and softcap / T; without a softcap ``scale`` may be a 0-d tensor
    on the device."""
    if isinstance(scale, Tensor) and softcap is not None:
        raise ValueError("with a softcap scale must be a number")
    number = 1.0 if isinstance(scale, Tensor) else scale
    how = dict(ignore_index=ignore_index, tokens=tokens, tail=tail, predictions=predictions, chunk=chunk, impl=impl)
    how |= dict(order=check_order(order), scale=number, softcap=softcap, topk=topk, memory=memory)
    head = HeadPass(hidden, weight, targets, bias=bias, **how)
    with head.quiet():
        for rows in head.chunks:
            logits = head.logits(rows)
            if isinstance(scale, Tensor):
                logits.mul_(scale)
            head.fill_top(logits, rows)
            head.forward(logits, rows)
    return head.all_moments()


@torch.no_grad()
def linear_topk(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk: int | None = None,
    impl: str = "auto",
) -> TopK:
    """``topk_log_probs`` of the logits hidden @ weight.T + bias, of which at most ``chunk`` rows are held at a time.

    hidden [N, D], weight [V, D], bias [V] or None and ``chunk`` as in ``linear_score``, the others as in
    ``topk_log_probs``. For distillation from a teacher, or to read what a model expects."""
    targets = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)  # the head asks for some
    how = dict(bias=bias, scale=scale, softcap=softcap, chunk=chunk, impl=impl)
    head = HeadPass(hidden, weight, targets, ignore_index=-100, **how)
    module, out = check_top(k, head.vocab, impl, head.module), new_top(head.h, head.n, k)
    with head.quiet():
        for rows in head.chunks:
            fill_top(head.logits(rows), None, None, head.link, TopK(*(x[rows] for x in out)), module)
    return out
