"""A score of logits that are there already, and the same as a loss module for other code bases."""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kernels.moments import (
    Moments,
    Stats,
    as_moments,
    check_logits,
    check_targets,
    choose_impl,
    new_stats,
    softmax_moments,
    token_fisher,
)

REDUCTIONS = ("mean", "sum", "none")


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

    logits [N, V] and targets [N] as in ``softmax_moments``; score, weights, reduction, denominator, tail and
    fisher as in ``linear_score``, which saves the logits themselves where they come from a linear head.

    On a GPU a named score with reduction "mean" or "sum" is one kernel: where a row fits on chip, one read
    of the logits, and one write of their gradient in the forward. ``inplace`` writes it over the logits'
    own storage, which are then destroyed as soon as the call returns (elsewhere by backward). Backward can
    run once.

    Raises ValueError as ``softmax_moments`` does, and for a reduction or denominator that do not fit.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"unknown reduction {reduction!r}; expected one of {', '.join(REDUCTIONS)}")
    if denominator is not None and reduction != "mean":
        raise ValueError(f"denominator is for reduction='mean', got reduction={reduction!r}; divide the loss yourself")
    if weights is not None and weights.shape != logits.shape[:1]:
        raise ValueError(f"weights must be [N], one a token, {len(logits)}; got {tuple(weights.shape)}")
    module = choose_impl(impl, logits)
    valid = targets != ignore_index
    factor = valid.float() if weights is None else torch.where(valid, weights.detach().float(), 0.0)
    if reduction == "mean" and denominator is None:
        denominator = factor.sum()
        denominator = torch.where(denominator == 0, 1.0, denominator)
    grad = torch.is_grad_enabled() and logits.requires_grad
    named = not tail and getattr(score, "fused", (None,))[0] in getattr(module, "SCORES", ())
    if named and grad and reduction != "none" and not torch.compiler.is_compiling():
        scale = factor if denominator is None else factor / denominator
        total, *stats, correct, fishers = _Fused.apply(logits, targets, scale, score, ignore_index, inplace, module)
        moments = as_moments(Stats(*stats), correct, valid, logits.shape[1], 0.0)
        moments.fisher = fishers if fisher else None
        return total, moments
    moments = softmax_moments(
        logits, targets, ignore_index=ignore_index, tail=tail, inplace_backward=inplace and grad, impl=impl
    )
    for value in (moments.log_p, moments.r1, moments.r2, moments.mean_log_p, moments.tail_log_p):
        if value is not None and value.requires_grad:  # 0 times an infinite slope is no gradient
            value.register_hook(lambda g: g if g is None else torch.where(factor == 0, 0.0, g))
    losses = torch.where(factor == 0, 0.0, score(moments) * factor)
    total = losses if reduction == "none" else losses.sum()
    if reduction == "mean":
        total = total / denominator
    detached = {k: v.detach() if isinstance(v, Tensor) else v for k, v in vars(moments).items()}
    moments = Moments(**detached)
    if fisher:
        moments.fisher = token_fisher(moments, score)
    return total, moments


class _Fused(torch.autograd.Function):
    """sum(scale * losses), its gradient computed in the forward."""

    @staticmethod
    def forward(ctx, logits, targets, scale, score, ignore_index, inplace, module):
        check_logits(logits, module)
        n, vocab = logits.shape
        targets, _, mask = check_targets(targets, n, vocab, ignore_index, logits.device)
        z = logits.detach()
        if z.stride(1) != 1 or z.stride(0) < vocab:
            z = z.contiguous()
        stats, correct = new_stats(z, n)
        losses, fishers = torch.empty_like(stats[0]), torch.empty_like(stats[0])
        out = z if inplace else torch.empty_strided(z.shape, z.stride(), dtype=z.dtype, device=z.device)
        name, knob = score.fused
        knob = knob if isinstance(knob, Tensor) else torch.full((), float(knob), device=z.device)
        module.fused_score(name, knob, z, targets, mask, scale, stats, correct, losses, fishers, out)
        if inplace and z.data_ptr() == logits.data_ptr():
            torch.autograd.graph.increment_version(logits)
        ctx.gradient, ctx.module = out, module
        total = torch.where(scale == 0, 0.0, losses * scale).sum()
        rows = stats.unbind(0)
        ctx.mark_non_differentiable(*rows, correct, fishers)
        ctx.set_materialize_grads(False)
        return total, *rows, correct, fishers

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        if ctx.gradient is None:
            raise RuntimeError("logits_score's gradient was handed out already; use reduction='none' to go back twice")
        gradient, ctx.gradient = ctx.gradient, None
        if grad is None:
            return (None,) * 7
        ctx.module.rescale(gradient, grad)
        return gradient, *(None,) * 6


class ProperScoreLoss(nn.Module):
    """A score as a loss module, in the place of ``nn.CrossEntropyLoss``, and as HF Trainer's loss.

        loss_fn = ProperScoreLoss("dpsm", warmup=0.1)
        loss = loss_fn(logits, targets)                       # [..., V] and [...]
        Trainer(..., compute_loss_func=loss_fn.trainer_loss)  # causal=False for encoder-decoders

    ``score``: a name of losses.LOSSES with its knobs (gamma, eps, tail; alpha for DPSM), or any function of
    the Moments. DPSM's alpha is a buffer: it is saved with the module, ``set_step(step, total)`` moves it
    along losses.alpha_at's ramp (warmup, schedule, alpha_max, start) before each optimizer step, and it
    stays where it is without. ``causal``: whether ``trainer_loss`` shifts the labels by one token, as a
    decoder-only model predicts the next one; an encoder-decoder's labels are in place already.

    Raises ValueError for an unknown name or knob out of place.
    """

    def __init__(
        self,
        score="dpsm",
        *,
        alpha: float = 1.0,
        gamma: float = 2.0,
        eps: float = 0.1,
        tail: float = 0.0,
        warmup: float = 0.1,
        schedule: str = "linear",
        alpha_max: float = 1.0,
        start: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "mean",
        causal: bool = True,
        impl: str = "auto",
    ):
        super().__init__()
        if reduction not in REDUCTIONS:
            raise ValueError(f"unknown reduction {reduction!r}; expected one of {', '.join(REDUCTIONS)}")
        if tail and not isinstance(score, str):
            raise ValueError("tail is for a named score; build yours with losses.tail_smoothed")
        self.register_buffer("alpha", torch.tensor(float(alpha)))
        self.given, self.knobs = score, dict(gamma=gamma, eps=eps, tail=tail)
        self.built = (None, None)
        self.score()  # a wrong name fails here
        self.ramp = dict(warmup=warmup, schedule=schedule, alpha_max=alpha_max, start=start)
        self.ignore_index, self.reduction, self.tail, self.causal, self.impl = (
            ignore_index,
            reduction,
            tail,
            causal,
            impl,
        )
        self.moments: Moments | None = None  # of the last call, for diagnostics

    def score(self):
        """The function of the Moments, reading this module's alpha."""
        if not isinstance(self.given, str):
            return self.given
        from kernels.losses import make_score  # which imports this package

        if self.built[0] != id(self.alpha):  # .to() and copy.deepcopy give the module another tensor
            self.built = id(self.alpha), make_score(self.given, alpha=self.alpha, **self.knobs)
        return self.built[1]

    def __getstate__(self):
        return self.__dict__ | {"built": (None, None), "moments": None}

    def set_step(self, step: int, total: int) -> float:
        """Sets alpha for optimizer step ``step`` (0-based) of ``total``, and returns it."""
        from kernels.losses import alpha_at

        value = alpha_at(step, total, **self.ramp)
        self.alpha.fill_(value)
        return value

    def forward(self, logits: Tensor, targets: Tensor, denominator: Tensor | None = None) -> Tensor:
        """logits [..., V], targets [...]: the loss, 0-d, or [...] with reduction "none"."""
        flat = targets.reshape(-1)
        loss, self.moments = logits_score(
            logits.reshape(-1, logits.shape[-1]),
            flat,
            self.score(),
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            denominator=denominator,
            tail=self.tail,
            impl=self.impl,
        )
        return loss.view_as(targets) if self.reduction == "none" else loss

    def trainer_loss(self, outputs, labels: Tensor, num_items_in_batch=None) -> Tensor:
        """For ``transformers.Trainer(compute_loss_func=...)``: outputs with ``logits`` [B, T, V], labels
        [B, T]. ``num_items_in_batch``: tokens in the loss of the whole batch of an optimizer step, which
        the sum is divided by, so that accumulated steps weigh every token alike. The Trainer counts labels
        before the shift: mask the first label of each row, which predicts nothing."""
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs.logits
        if self.causal:
            labels = nn.functional.pad(labels[..., 1:], (0, 1), value=self.ignore_index)
        denominator = None
        if num_items_in_batch is not None:
            denominator = torch.as_tensor(num_items_in_batch, device=logits.device).float()
        if self.reduction != "mean":
            raise ValueError(f"trainer_loss divides by the number of tokens; got reduction={self.reduction!r}")
        return self(logits, labels.to(logits.device), denominator)
