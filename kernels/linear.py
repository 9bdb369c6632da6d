"""Scores over a linear head, logits = hidden @ weight.T, without ever holding the [N, V] logits.

Tokens go through in chunks: logits of a chunk, their moments, the score and its partial derivatives
on [n] vectors, the gradient over the logits' own storage, and from it the chunk's rows of d_hidden
and its part of d_weight.
"""

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from kernels.moments import (
    Moments,
    Partials,
    Stats,
    as_moments,
    check_logits,
    check_targets,
    choose_impl,
    gradient_coefficients,
    mask_stats,
    new_stats,
    score_partials,
)

REDUCTIONS = ("mean", "sum", "none")

# Bytes of logits a chunk. Small enough to be no burden beside the model, large enough that the
# matrix products run at full speed and the fp32 d_weight is not read and written too often.
CPU_BUDGET = 128 * 2**20
CUDA_BUDGET = 512 * 2**20


def linear_score(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    score: Callable[[Moments], Tensor],
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    denominator: Tensor | None = None,
    tail: float = 0.0,
    chunk: int | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Moments]:
    """The score of a linear head's predictions, and the detached moments of every token.

    hidden [N, D], weight [V, D], targets [N] as in ``softmax_moments``. The matrix products run in the
    dtype of ``hidden`` (in autocast's under autocast), to which the weight is cast once; gradients come
    back in the dtypes of hidden and weight, d_weight summed over chunks in fp32.

    ``score`` maps Moments to a loss per token, each token by itself; it may read tensors of its own,
    such as a 0-d alpha, but they receive no gradient. ``tail`` > 0 fills tail_log_p for it.

    reduction "mean" divides the sum by ``denominator``, a 0-d tensor on the device, or by the number
    of tokens in the loss (by 1 where there is none); "sum" does not divide. Both compute the gradient
    in the forward, so that backward only scales it and can run once. "none" returns the loss of each
    token, [N] fp32, and computes the logits again in backward.

    ``chunk`` is the number of tokens at a time, by default what fits a fixed budget. Raises ValueError
    for arguments that do not fit together; targets are checked on CPU only.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"unknown reduction {reduction!r}; expected one of {', '.join(REDUCTIONS)}")
    if denominator is not None and reduction != "mean":
        raise ValueError(f"denominator is for reduction='mean', got reduction={reduction!r}; divide the loss yourself")
    head = _Head(hidden, weight, targets, ignore_index, tail, chunk, impl)
    hidden = head.hidden
    grad = torch.is_grad_enabled()
    wants = (grad and hidden.requires_grad, grad and weight.requires_grad)
    losses = torch.empty(len(hidden), dtype=head.stats.dtype, device=hidden.device)
    kept = []
    grads = head.new_grads(wants) if reduction != "none" else None
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        if reduction == "mean":  # a copy: the caller may refill its tensor before backward
            denominator = head.valid.sum().clamp_min(1) if denominator is None else denominator.clone()
        for rows in head.chunks:
            # w left in the logits' storage saves the second exponential of the gradient.
            keep_w = grads is not None and any(wants) and head.can_keep_w
            logits = head.logits(rows)
            head.forward(logits, rows, keep_w)
            losses[rows], partials = score_partials(head.moments(rows), score)
            if not any(wants):
                continue
            if grads is None:
                kept.append(partials)
            else:
                head.backward(logits, rows, partials, grads, keep_w)
        if head.mask is not None:
            losses = torch.where(head.mask, losses, 0.0)  # a score need not be 0 where the moments are
        total = losses if reduction == "none" else losses.sum()
        if reduction == "mean":
            total = total / denominator
    head.buffer = None
    if any(wants):
        if grads is None:
            total = _Recompute.apply(hidden, weight, total, head, kept, wants)
        else:
            total = _GradientInForward.apply(hidden, weight, total, *grads, denominator)
    return total, head.moments(slice(None))


def linear_moments(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    scale: float | Tensor = 1.0,
    ignore_index: int = -100,
    chunk: int | None = None,
    impl: str = "auto",
) -> Moments:
    """Moments of softmax(scale * hidden @ weight.T) at the targets, without gradient.

    Arguments as in ``linear_score``; ``scale`` is 1 / temperature.
    """
    head = _Head(hidden, weight, targets, ignore_index, 0.0, chunk, impl)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        for rows in head.chunks:
            logits = head.logits(rows)
            if isinstance(scale, Tensor) or scale != 1:
                logits.mul_(scale)
            head.forward(logits, rows, keep_w=False)
    return head.moments(slice(None))


class _Head:
    """One pass over the chunks of a linear head: its checked inputs and the buffers it reuses."""

    def __init__(self, hidden, weight, targets, ignore_index, tail, chunk, impl):
        if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
            shapes = f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
            raise ValueError(f"hidden must be [N, D] and weight [V, D], got {shapes}; flatten batch and time")
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk must be a positive number of tokens, got {chunk}")
        device = hidden.device
        if torch.is_autocast_enabled(device.type):
            hidden = hidden.to(torch.get_autocast_dtype(device.type))
        self.module: ModuleType = choose_impl(impl, hidden)
        self.hidden, self.n, self.vocab, self.tail = hidden, len(hidden), len(weight), tail
        self.weight_dtype = weight.dtype
        check_logits(hidden.new_empty(0, self.vocab), self.module)
        self.targets, self.valid, self.mask = check_targets(targets, self.n, self.vocab, ignore_index, device)
        self.stats, self.correct = new_stats(hidden, self.n)
        self.can_keep_w = hidden.dtype == self.stats.dtype and self.module.CAN_KEEP_W
        if chunk is None:
            budget = CUDA_BUDGET if hidden.is_cuda else CPU_BUDGET
            most = max(1, budget // (self.vocab * hidden.element_size()))
            chunk = -(-self.n // max(1, -(-self.n // most)))  # chunks of equal size
        chunk = max(1, min(chunk, self.n))
        self.chunks = [slice(i, min(i + chunk, self.n)) for i in range(0, self.n, chunk)]
        self.weight, self.h = weight.detach().to(hidden.dtype), hidden.detach()
        self.buffer = None

    def logits(self, rows: slice) -> Tensor:
        if self.buffer is None:
            self.buffer = self.h.new_empty(self.chunks[0].stop, self.vocab)
        return torch.mm(self.h[rows], self.weight.t(), out=self.buffer[: rows.stop - rows.start])

    def mask_of(self, rows: slice) -> Tensor | None:
        return None if self.mask is None else self.mask[rows]

    def forward(self, logits: Tensor, rows: slice, keep_w: bool) -> None:
        stats, correct, y = self.stats[:, rows], self.correct[rows], self.targets[rows]
        extra = {}
        if keep_w:
            extra = dict(keep_w=True, rows_again=lambda i: self.h[rows][i] @ self.weight.t())
        self.module.forward(logits, y, stats, correct, self.tail, **extra)
        mask_stats(stats, correct, self.mask_of(rows))

    def moments(self, rows: slice) -> Moments:
        stats = Stats(*self.stats[:, rows].unbind(0))
        return as_moments(stats, self.correct[rows], self.valid[rows], self.vocab, self.tail)

    def new_grads(self, wants) -> list[Tensor | None]:
        """Buffers for d_hidden, and d_weight in fp32 (fp64 for fp64)."""
        d_hidden = torch.empty_like(self.h) if wants[0] else None
        shape = (self.vocab, self.h.shape[1])
        overwritten = self.h.dtype == self.stats.dtype and self.n > 0  # by the first chunk, see backward
        new = torch.empty if overwritten else torch.zeros
        d_weight = new(shape, dtype=self.stats.dtype, device=self.h.device) if wants[1] else None
        return [d_hidden, d_weight]

    def backward(self, logits: Tensor, rows: slice, partials: Partials, grads, kept_w: bool) -> None:
        """Turns the chunk's logits into their gradient and adds what follows to ``grads``."""
        d_hidden, d_weight = grads
        mask, stats = self.mask_of(rows), Stats(*self.stats[:, rows].unbind(0))
        coefficients = gradient_coefficients(stats, partials)
        extra = dict(kept_w=True) if kept_w else {}
        self.module.gradient(logits, self.targets[rows], mask, stats, coefficients, self.tail, logits, **extra)
        if d_hidden is not None:
            torch.mm(logits, self.weight, out=d_hidden[rows])
        if d_weight is None:
            return
        if logits.dtype == d_weight.dtype:
            if rows.start == 0:
                torch.mm(logits.t(), self.h[rows], out=d_weight)
            else:
                d_weight.addmm_(logits.t(), self.h[rows])
        elif logits.is_cuda:
            d_weight.add_(torch.mm(logits.t(), self.h[rows], out_dtype=torch.float32))
        else:
            d_weight.add_(logits.t() @ self.h[rows])


class _GradientInForward(torch.autograd.Function):
    """Attaches gradients of ``sum`` that are known already to ``loss`` = sum / denominator."""

    @staticmethod
    def forward(ctx, hidden, weight, loss, d_hidden, d_weight, denominator):
        ctx.grads, ctx.denominator, ctx.weight_dtype = (d_hidden, d_weight), denominator, weight.dtype
        return loss.clone()

    @staticmethod
    def backward(ctx, grad):
        if ctx.grads is None:
            raise RuntimeError("linear_score's gradient was handed out already; use reduction='none' to go back twice")
        d_hidden, d_weight = ctx.grads
        ctx.grads = None
        # The upstream scalar and the denominator together, as either alone can underflow in fp16.
        scale = grad if ctx.denominator is None else grad / ctx.denominator
        if d_hidden is not None:
            d_hidden = d_hidden.mul_(scale)
        if d_weight is not None:
            d_weight = d_weight.mul_(scale).to(ctx.weight_dtype)
        return d_hidden, d_weight, None, None, None, None


class _Recompute(torch.autograd.Function):
    """Attaches to the ``losses`` [N] a backward that computes the logits again, chunk by chunk."""

    @staticmethod
    def forward(ctx, hidden, weight, losses, head, kept, wants):
        ctx.save_for_backward(hidden, weight)
        ctx.head, ctx.kept, ctx.wants = head, kept, wants
        return losses.clone()

    @staticmethod
    def backward(ctx, upstream):
        ctx.saved_tensors  # noqa: B018  raises where hidden or weight were changed in place since
        head = ctx.head
        grads = head.new_grads(ctx.wants)
        with torch.no_grad(), torch.autocast(upstream.device.type, enabled=False):
            for rows, partials in zip(head.chunks, ctx.kept, strict=True):
                weighted = Partials(*(None if g is None else g * upstream[rows] for g in partials))
                head.backward(head.logits(rows), rows, weighted, grads, kept_w=False)
        head.buffer = None
        d_hidden, d_weight = grads
        return d_hidden, None if d_weight is None else d_weight.to(head.weight_dtype), None, None, None, None
