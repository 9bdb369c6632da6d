"""logits_score: a score of logits that are there already."""

import torch
from torch import Tensor

from .impl import check_logits, check_reduction, check_targets, choose_impl, fused_form
from .moments import Moments, Partials, Stats, as_moments, new_stats, token_fisher
from .softmax import GradientKnown, empty_twin, softmax_moments, with_own_rows


def logits_score(
    logits: Tensor,
    targets: Tensor,
    score,
    *,
    weights: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    denominator: Tensor | None = None,
    tail: float = 0.0,
    fisher: bool = False,
    inplace: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Moments]:
    """The score of softmax(logits) at the targets, and the detached moments of every token.

    logits [N, V] and targets [N] as in ``softmax_moments``; score, weights, reduction, denominator, tail and fisher
    as in ``linear_score``, which saves the logits themselves where they come from a linear head.

    On a GPU a named score with reduction "mean" or "sum" is one kernel. Where a row fits on chip, it reads the logits
    once and writes their gradient once, in the forward. ``inplace`` writes it over the logits' own storage, which is
    destroyed when the call returns (elsewhere in backward). Backward can run once. Raises ValueError as
    ``softmax_moments`` does, and for a reduction, denominator or weights that do not fit."""
    check_reduction(reduction, denominator, weights, logits)
    module = choose_impl(impl, logits)
    valid = targets != ignore_index
    factor = valid.float() if weights is None else torch.where(valid, weights.detach().float(), 0.0)
    if reduction == "mean" and denominator is None:
        denominator = factor.sum()
        denominator = torch.where(denominator == 0, 1.0, denominator)
    grad = torch.is_grad_enabled() and logits.requires_grad
    fused = fused_form(score, module, tail)
    if fused and grad and reduction != "none" and not torch.compiler.is_compiling():
        scale = factor if denominator is None else factor / denominator
        total, gradient, moments = _fused_sum(logits, targets, scale, fused, ignore_index, inplace, module)

        def rescaled(upstream):
            module.rescale(gradient, upstream)
            return (gradient,)

        if not fisher:
            moments.fisher = None
        return GradientKnown.apply(total, rescaled, True, logits), moments
    how = dict(ignore_index=ignore_index, tail=tail, inplace_backward=inplace and grad, impl=impl)
    moments = softmax_moments(logits, targets, **how)
    for value in (getattr(moments, name) for name in Partials._fields):
        if value is not None and value.requires_grad:  # 0 times an infinite slope is no gradient
            value.register_hook(lambda g: g if g is None else torch.where(factor == 0, 0.0, g))
    losses = torch.where(factor == 0, 0.0, score(moments) * factor)
    total = losses if reduction == "none" else losses.sum()
    if reduction == "mean":
        total = total / denominator
    moments = Moments(**{k: v.detach() if isinstance(v, Tensor) else v for k, v in vars(moments).items()})
    if fisher:
        moments.fisher = token_fisher(moments, score)
    return total, moments


@torch.no_grad()
def _fused_sum(logits, targets, scale, fused, ignore_index, inplace, module) -> tuple[Tensor, Tensor, Moments]:
    """(sum(scale * losses), its gradient [N, V], moments). ``fused``: the score's name and knob."""
    check_logits(logits, module)
    targets, valid, mask = check_targets(targets, len(logits), logits.shape[1], ignore_index, logits.device)
    z = with_own_rows(logits.detach())
    stats, correct = new_stats(z, len(z))
    losses, fishers = torch.empty_like(stats[0]), torch.empty_like(stats[0])
    gradient = z if inplace else empty_twin(z)
    outputs = dict(stats=stats, correct=correct, losses=losses, fisher=fishers, out=gradient)
    module.fused_score(*fused, z, targets, mask, scale, **outputs)
    if inplace and z.data_ptr() == logits.data_ptr():
        torch.autograd.graph.increment_version(logits)
    moments = as_moments(Stats(*stats), correct, valid, logits.shape[1], 0.0, fishers)
    return torch.where(scale == 0, 0.0, losses * scale).sum(), gradient, moments
