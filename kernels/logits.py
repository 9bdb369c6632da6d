"""logits_score: a score of logits that are there already."""

import torch
from torch import Tensor

from .impl import brought, check_logits, check_reduction, check_targets, choose_impl, fused_form, with_class_weights
from .moments import Moments, Partials, Stats, as_moments, check_limit, make_link, new_stats, order_of, token_fisher
from .softmax import GradientKnown, empty_twin, softmax_moments, with_own_rows
from .topk import topk_of


def logits_score(
    logits: Tensor,
    targets: Tensor,
    score,
    *,
    weights: Tensor | None = None,
    class_weights: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    denominator: Tensor | None = None,
    tail: float = 0.0,
    scale: float = 1.0,
    softcap: float | None = None,
    fisher: bool = False,
    predictions: bool = False,
    topk: int = 0,
    inplace: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Moments]:
    """The score of softmax(logits) at the targets, and the detached moments of every token.

    logits [N, V] and targets [N] as in ``softmax_moments``; score, weights, class_weights, reduction, denominator,
    tail, scale, softcap, fisher, predictions and topk as in ``linear_score``, which saves the logits themselves where
    they come from a linear head.

    On a GPU a named score with reduction "mean" or "sum" is one kernel. Where a row fits on chip, it reads the logits
    once and writes their gradient once, in the forward. ``inplace`` writes it over the logits' own storage, which is
    destroyed when the call returns (elsewhere in backward). Backward can run once. Raises ValueError as
    ``softmax_moments`` does, and for a reduction, denominator or weights that do not fit."""
    check_reduction(reduction, denominator, weights, logits)
    module = choose_impl(impl, logits)
    valid = targets != ignore_index
    order, denominator = (brought(given, logits.device) for given in (order_of(score), denominator))
    link, topk = make_link(scale, softcap), topk_of(score, topk, logits.shape[-1])
    if class_weights is not None:
        check_logits(logits, module)
        known, *_ = check_targets(targets, len(logits), logits.shape[1], ignore_index, logits.device)
        weights = with_class_weights(weights, class_weights, known, logits.shape[1])
    factor = valid.float() if weights is None else torch.where(valid, weights.detach().float(), 0.0)
    if reduction == "mean" and denominator is None:
        denominator = factor.sum()
        denominator = torch.where(denominator == 0, 1.0, denominator)
    grad = torch.is_grad_enabled() and logits.requires_grad
    fused = fused_form(score, module, logits.device, tail, softcap, predictions, topk)
    if fused and grad and reduction != "none" and not torch.compiler.is_compiling():
        share = factor if denominator is None else factor / denominator
        how = dict(order=order, link=link)
        total, gradient, moments = _fused_sum(logits, targets, share, fused, how, ignore_index, inplace, module)

        def rescaled(upstream):
            module.rescale(gradient, upstream)
            return (gradient,)

        if not fisher:
            moments.fisher = None
        return GradientKnown.apply(total, rescaled, True, logits), moments
    how = dict(ignore_index=ignore_index, tail=tail, inplace_backward=inplace and grad, impl=impl)
    how |= dict(order=order, scale=scale, softcap=softcap, predictions=predictions, topk=topk)
    moments = softmax_moments(logits, targets, **how)
    for name in Partials._fields:
        value = getattr(moments, name)
        if value is None or not value.requires_grad:
            continue
        if torch.compiler.is_compiling():  # which knows no hooks; each passes on 0 where the factor is 0
            setattr(moments, name, torch.where(factor == 0, value.detach(), value))
        else:  # 0 times an infinite slope is no gradient
            value.register_hook(lambda g: g if g is None else torch.where(factor == 0, 0.0, g))
    each = score(moments)
    if not torch.compiler.is_compiling():
        check_limit(each, moments, (range(len(targets)), targets))
    losses = torch.where(factor == 0, 0.0, each * factor)
    total = losses if reduction == "none" else losses.sum()
    if reduction == "mean":
        total = total / denominator
    moments = moments.detach()
    if fisher:
        moments.fisher = token_fisher(moments, score)
    return total, moments


@torch.no_grad()
def _fused_sum(logits, targets, share, fused, how, ignore_index, inplace, module) -> tuple[Tensor, Tensor, Moments]:
    """(sum(share * losses), its gradient [N, V], moments). ``fused``: the score's name and knob; ``how``: its order and
    the link."""
    check_logits(logits, module)
    targets, valid, mask = check_targets(targets, len(logits), logits.shape[1], ignore_index, logits.device)
    z = with_own_rows(logits.detach())
    stats, correct = new_stats(z, len(z))
    losses, fishers = torch.empty_like(stats[0]), torch.empty_like(stats[0])
    gradient = z if inplace else empty_twin(z)
    outputs = dict(stats=stats, correct=correct, losses=losses, fisher=fishers, out=gradient)
    module.fused_score(*fused, z, targets, mask, share, **outputs, **how)
    if inplace and z.data_ptr() == logits.data_ptr():
        torch.autograd.graph.increment_version(logits)
    moments = as_moments(Stats(*stats), correct, valid, logits.shape[1], 0.0, how["order"], fisher=fishers)
    return torch.where(share == 0, 0.0, losses * share).sum(), gradient, moments
