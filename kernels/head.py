"""Scores over a linear head, logits = hidden @ weight.T, without ever holding the [N, V] logits."""

from collections.abc import Callable

import torch
from torch import Tensor

from .compiled import traced_linear_score
from .head_pass import HeadPass, scaled
from .impl import check_reduction
from .moments import Moments
from .softmax import GradientKnown
from .topk import TopK, check_top, fill_top, new_top


def linear_score(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    score: Callable[[Moments], Tensor],
    *,
    bias: Tensor | None = None,
    weights: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    denominator: Tensor | None = None,
    tail: float = 0.0,
    fisher: bool = False,
    chunk: int | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Moments]:
    """The score of a linear head's predictions, and the detached moments of every token.

    hidden [N, D], weight [V, D], bias [V] or None, targets [N] as in ``softmax_moments``. The matrix products run in
    the dtype of ``hidden`` (in autocast's under autocast), to which weight and bias are cast once. Gradients have the
    dtypes of hidden, weight and bias; those of weight and bias are summed over chunks in fp32.

    ``score`` maps Moments to a loss per token, each token by itself. Tensors that it reads beside, such as a 0-d alpha,
    receive no gradient. On a GPU a named score (losses.named) is one kernel. ``tail`` > 0 fills tail_log_p. ``fisher``
    fills Moments.fisher with |d score/dz|^2 of each token, without a pass over the logits.

    ``weights`` [N], without gradient: a factor for each token's loss and gradient. A token of weight 0, such as a
    prompt's, has its moments and Fisher, and no part in the loss. ``chunk``: tokens at a time, by default what fits a
    fixed budget on CPU, and chunks.chunk_rows on CUDA.

    ``reduction`` "mean" divides the sum of weights * losses by ``denominator``, a 0-d tensor on the device; by default
    the sum of the weights in the loss (without weights, the number of tokens; 1 where that is 0). "mean" and "sum"
    compute the gradient in the forward: backward only scales it and can run once. "none" gives the weighted loss of
    each token, [N] fp32, and computes the logits again in backward. Raises ValueError for arguments that do not fit
    together; targets are checked on CPU only. Inside torch.compile the score must be marked (kernels.compilable)."""
    check_reduction(reduction, denominator, weights, hidden)
    how = dict(ignore_index=ignore_index, tail=tail, chunk=chunk, impl=impl)
    if torch.compiler.is_compiling():
        tensors = (hidden, weight, targets, bias, weights, denominator)
        return traced_linear_score(tensors, score, reduction=reduction, fisher=fisher, **how)
    head = HeadPass(hidden, weight, targets, bias=bias, weights=weights, **how)
    leaves = (head.hidden, weight, bias)
    wants = tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in leaves)
    if reduction == "none":
        total, moments, kept = head.losses(score, fisher)
        if any(wants):
            total = GradientKnown.apply(total, lambda up: head.gradient_of(score, kept, up, wants), False, *leaves)
        return total, moments
    total, moments, grads, denominator = head.reduced(score, reduction, denominator, fisher, wants)
    if any(wants):
        dtypes = head.grad_dtypes  # not head, which would keep its buffers until backward
        total = GradientKnown.apply(total, lambda up: scaled(grads, up, denominator, dtypes), True, *leaves)
    return total, moments


def linear_moments(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float | Tensor = 1.0,
    ignore_index: int = -100,
    chunk: int | None = None,
    impl: str = "auto",
) -> Moments:
    """Moments of softmax(scale * (hidden @ weight.T + bias)) at the targets, without gradient. Arguments as in
    ``linear_score``; ``scale`` is 1 / temperature."""
    head = HeadPass(hidden, weight, targets, bias=bias, ignore_index=ignore_index, chunk=chunk, impl=impl)
    with head.quiet():
        for rows in head.chunks:
            logits = head.logits(rows)
            if isinstance(scale, Tensor) or scale != 1:
                logits.mul_(scale)
            head.forward(logits, rows)
    return head.moments()


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
    head = HeadPass(hidden, weight, targets, bias=bias, ignore_index=-100, chunk=chunk, impl=impl)
    module = check_top(k, head.vocab, scale, softcap, impl, head.module)
    out = new_top(head.h, head.n, k)
    with head.quiet():
        for rows in head.chunks:
            fill_top(head.logits(rows), None, None, scale, softcap, TopK(*(x[rows] for x in out)), module)
    return out
