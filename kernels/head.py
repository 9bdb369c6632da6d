"""Scores over a linear head, logits = hidden @ weight.T, without ever holding the [N, V] logits.

Tokens go through in chunks: logits of a chunk, their moments, the score and its partial derivatives
on [n] vectors, the gradient over the logits' own storage, and from it the chunk's rows of d_hidden
and its part of d_weight.
"""

import contextlib
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from kernels.chunks import cuda_chunk, products_widen, row_stride
from kernels.moments import (
    Moments,
    Partials,
    Stats,
    as_moments,
    check_logits,
    check_targets,
    choose_impl,
    fisher_of,
    gradient_coefficients,
    mask_stats,
    new_stats,
    score_partials,
)

REDUCTIONS = ("mean", "sum", "none")

# Bytes of logits a chunk on CPU; for CUDA see chunks.py. Small enough to be no burden beside the model, large
# enough that the matrix products run at full speed and the fp32 d_weight is not read and written too often.
CPU_BUDGET = 128 * 2**20


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

    hidden [N, D], weight [V, D], bias [V] or None, targets [N] as in ``softmax_moments``. The matrix
    products run in the dtype of ``hidden`` (in autocast's under autocast), to which weight and bias are
    cast once; gradients come back in the dtypes of hidden, weight and bias, those of weight and bias
    summed over chunks in fp32.

    ``score`` maps Moments to a loss per token, each token by itself; it may read tensors of its own,
    such as a 0-d alpha, but they receive no gradient. ``tail`` > 0 fills tail_log_p for it. A named score
    (losses.named) takes one kernel from logits to gradient on a GPU. ``fisher`` fills Moments.fisher with
    |d score/dz|^2 of each token, from the moments, with no pass over the logits.

    ``weights`` [N], without gradient: a factor for each token's loss and gradient. A token of weight 0
    has its moments and Fisher, and no part in the loss: prompt tokens, for example.

    reduction "mean" divides the sum of weights * losses by ``denominator``, a 0-d tensor on the device,
    or by the sum of the weights in the loss (without weights, the number of tokens; by 1 where that is
    0); "sum" does not divide. Both compute the gradient in the forward, so that backward only scales it
    and can run once. "none" returns the weighted loss of each token, [N] fp32, and computes the logits
    again in backward.

    ``chunk`` is the number of tokens at a time, by default what fits a fixed budget on CPU and what
    chunks.chunk_rows chooses on CUDA: within 300 MB beside inputs and gradients, except where the fp32 sum of
    d_weight beside a 16-bit gradient takes more by itself (4 V D bytes; 622 MB at 151936 x 1024).

    Raises ValueError for arguments that do not fit together; targets are checked on CPU only. Inside
    torch.compile the score must have been made outside of the compiled function (kernels.compilable).
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"unknown reduction {reduction!r}; expected one of {', '.join(REDUCTIONS)}")
    if denominator is not None and reduction != "mean":
        raise ValueError(f"denominator is for reduction='mean', got reduction={reduction!r}; divide the loss yourself")
    if torch.compiler.is_compiling():
        from kernels.compiled import traced_linear_score

        return traced_linear_score(
            hidden,
            weight,
            targets,
            score,
            bias,
            weights,
            denominator,
            ignore_index,
            reduction,
            tail,
            fisher,
            chunk,
            impl,
        )
    head = Head(hidden, weight, targets, ignore_index, tail, chunk, impl, bias, weights)
    hidden = head.hidden
    leaves = (hidden, weight, bias)
    wants = tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in leaves)
    if reduction == "none":
        losses, moments, kept = head.losses(score, fisher, keep=any(wants))
        total = head.weighted(losses)
        if any(wants):
            total = _Recompute.apply(hidden, weight, bias, total, head, score, kept, wants)
        return total, moments
    total, moments, grads, denominator = head.reduced(score, reduction, denominator, fisher, wants)
    if any(wants):
        total = GradientInForward.apply(hidden, weight, bias, total, *grads, denominator)
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
    """Moments of softmax(scale * (hidden @ weight.T + bias)) at the targets, without gradient.

    Arguments as in ``linear_score``; ``scale`` is 1 / temperature.
    """
    head = Head(hidden, weight, targets, ignore_index, 0.0, chunk, impl, bias)
    with head.quiet():
        for rows in head.chunks:
            logits = head.logits(rows)
            if isinstance(scale, Tensor) or scale != 1:
                logits.mul_(scale)
            head.forward(logits, rows, keep_w=False)
    return head.moments(slice(None))


class Head:
    """One pass over the chunks of a linear head: its checked inputs and the buffers it reuses."""

    def __init__(self, hidden, weight, targets, ignore_index, tail, chunk, impl, bias=None, weights=None):
        if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
            shapes = f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
            raise ValueError(f"hidden must be [N, D] and weight [V, D], got {shapes}; flatten batch and time")
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk must be a positive number of tokens, got {chunk}")
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must be [V], one a row of weight, {len(weight)}; got {tuple(bias.shape)}")
        if weights is not None and weights.shape != hidden.shape[:1]:
            raise ValueError(f"weights must be [N], one a token, {len(hidden)}; got {tuple(weights.shape)}")
        device = hidden.device
        if torch.is_autocast_enabled(device.type):
            hidden = hidden.to(torch.get_autocast_dtype(device.type))
        self.module: ModuleType = choose_impl(impl, hidden)
        self.hidden, self.n, self.vocab, self.tail = hidden, len(hidden), len(weight), tail
        self.grad_dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        check_logits(hidden.new_empty(0, self.vocab), self.module)
        self.targets, self.valid, self.mask = check_targets(targets, self.n, self.vocab, ignore_index, device)
        self.stats, self.correct = new_stats(hidden, self.n)
        self.weights = None if weights is None else weights.detach().to(self.stats.dtype)
        self.can_keep_w = hidden.dtype == self.stats.dtype and self.module.CAN_KEEP_W
        self.stride = row_stride(self.vocab) if hidden.is_cuda else self.vocab
        if chunk is None and hidden.is_cuda:
            sizes = hidden.element_size(), weight.element_size()
            chunk = cuda_chunk(self.n, self.vocab, hidden.shape[1], *sizes, device)
        elif chunk is None:
            most = max(1, CPU_BUDGET // (self.stride * hidden.element_size()))
            chunk = -(-self.n // max(1, -(-self.n // most)))  # chunks of equal size
        chunk = max(1, min(chunk, self.n))
        self.chunks = [slice(i, min(i + chunk, self.n)) for i in range(0, self.n, chunk)]
        self.weight, self.h = weight.detach().to(hidden.dtype), hidden.detach()
        self.bias = None if bias is None else bias.detach().to(hidden.dtype)
        self.buffer = None

    @contextlib.contextmanager
    def quiet(self):
        """No gradient, no autocast, and the buffer given back at the end."""
        with torch.no_grad(), torch.autocast(self.h.device.type, enabled=False):
            yield
        self.buffer = None

    def losses(self, score, fisher: bool, keep: bool):
        """(losses [N] without weights, Moments, what ``gradient_of`` needs) of all chunks."""
        losses, fishers, kept = self.new_vector(), self.new_vector() if fisher else None, []
        with self.quiet():
            for rows in self.chunks:
                kept.append(self.score(self.logits(rows), rows, score, losses, fishers, None)[0])
        return self.in_loss(losses), self.moments(slice(None), fishers), kept if keep else None

    def reduced(self, score, reduction: str, denominator: Tensor | None, fisher: bool, wants):
        """(loss, Moments, gradients of the weighted SUM, denominator): one pass over the chunks."""
        losses, fishers = self.new_vector(), self.new_vector() if fisher else None
        grads = self.new_grads(wants)
        with self.quiet():
            if reduction == "mean":  # a copy: the caller may refill its tensor before backward
                denominator = self.count() if denominator is None else denominator.clone()
            for rows in self.chunks:
                logits = self.logits(rows)
                # w left in the logits' storage saves the second exponential of the gradient.
                keep_w = any(wants) and self.can_keep_w
                partials, done = self.score(
                    logits, rows, score, losses, fishers, logits if any(wants) else None, keep_w
                )
                if any(wants):
                    if not done:
                        self.gradient(logits, rows, partials, keep_w)
                    self.accumulate(logits, rows, grads)
            total = self.weighted(self.in_loss(losses)).sum()
            if reduction == "mean":
                total = total / denominator
        return total, self.moments(slice(None), fishers), grads, denominator

    def new_vector(self) -> Tensor:
        return torch.empty(self.n, dtype=self.stats.dtype, device=self.h.device)

    def count(self) -> Tensor:
        """What "mean" divides by: tokens in the loss, or their weights; 1 for none."""
        if self.weights is None:
            return self.valid.sum().clamp_min(1)
        count = torch.where(self.valid, self.weights, 0.0).sum()
        return torch.where(count == 0, 1.0, count)

    def in_loss(self, losses: Tensor) -> Tensor:
        # A score need not be 0 where the moments are.
        return losses if self.mask is None else torch.where(self.mask, losses, 0.0)

    def weighted(self, values: Tensor, rows: slice = slice(None)) -> Tensor:
        """values * weights, 0 where the weight is 0 even if the value is not finite."""
        if self.weights is None:
            return values
        w = self.weights[rows]
        return torch.where(w == 0, 0.0, values * w)

    def score(self, logits, rows, score, losses, fishers, out, keep_w=False):
        """Stats, losses and Fisher of a chunk: (partials, False), or (None, True) where one kernel did it
        all, the weighted gradient over ``out`` included."""
        name, knob = getattr(score, "fused", (None, None))
        if not self.tail and name in getattr(self.module, "SCORES", ()):
            self.fused(name, knob, logits, rows, losses, fishers, out, self.weights)
            return None, True
        self.forward(logits, rows, keep_w)
        losses[rows], partials = score_partials(self.moments(rows), score)
        if fishers is not None:
            stats = Stats(*self.stats[:, rows].unbind(0))
            mask = self.mask_of(rows)
            fisher = fisher_of(stats, partials)
            fishers[rows] = fisher if mask is None else torch.where(mask, fisher, 0.0)
        return Partials(*(None if g is None else self.weighted(g, rows) for g in partials)), False

    def fused(self, name, knob, logits, rows, losses, fishers, out, weights) -> None:
        if not isinstance(knob, Tensor):
            knob = torch.full((), float(knob), device=logits.device)
        spare = torch.empty_like(losses[rows]) if fishers is None else fishers[rows]
        stats, correct = self.stats[:, rows], self.correct[rows]
        weights = None if weights is None else weights[rows]
        self.module.fused_score(
            name,
            knob,
            logits,
            self.targets[rows],
            self.mask_of(rows),
            weights,
            stats,
            correct,
            losses[rows],
            spare,
            out,
        )

    def logits(self, rows: slice) -> Tensor:
        if self.buffer is None:
            self.buffer = self.h.new_empty(self.chunks[0].stop, self.stride)[:, : self.vocab]
        out = self.buffer[: rows.stop - rows.start]
        if self.bias is None:
            return torch.mm(self.h[rows], self.weight.t(), out=out)
        return torch.addmm(self.bias, self.h[rows], self.weight.t(), out=out)

    def logits_again(self, rows: slice, index: Tensor) -> Tensor:
        logits = self.h[rows][index] @ self.weight.t()
        return logits if self.bias is None else logits + self.bias

    def mask_of(self, rows: slice) -> Tensor | None:
        return None if self.mask is None else self.mask[rows]

    def forward(self, logits: Tensor, rows: slice, keep_w: bool) -> None:
        stats, correct, y = self.stats[:, rows], self.correct[rows], self.targets[rows]
        extra = {}
        if keep_w:
            extra = dict(keep_w=True, rows_again=lambda i: self.logits_again(rows, i))
        self.module.forward(logits, y, stats, correct, self.tail, **extra)
        mask_stats(stats, correct, self.mask_of(rows))

    def moments(self, rows: slice, fisher: Tensor | None = None) -> Moments:
        stats = Stats(*self.stats[:, rows].unbind(0))
        moments = as_moments(stats, self.correct[rows], self.valid[rows], self.vocab, self.tail)
        moments.fisher = fisher
        return moments

    def new_grads(self, wants) -> list[Tensor | None]:
        """Buffers for d_hidden, d_weight in fp32 (fp64 for fp64), and d_bias likewise."""
        d_hidden = torch.empty_like(self.h) if wants[0] else None
        new = torch.empty if self.n else torch.zeros  # the first chunk overwrites, see accumulate
        wide = dict(dtype=self.stats.dtype, device=self.h.device)
        d_weight = new((self.vocab, self.h.shape[1]), **wide) if wants[1] else None
        return [d_hidden, d_weight, torch.zeros(self.vocab, **wide) if wants[2] else None]

    def gradient(self, logits: Tensor, rows: slice, partials: Partials, kept_w: bool) -> None:
        """Turns the chunk's logits into their gradient."""
        mask, stats = self.mask_of(rows), Stats(*self.stats[:, rows].unbind(0))
        coefficients = gradient_coefficients(stats, partials)
        extra = dict(kept_w=True) if kept_w else {}
        self.module.gradient(logits, self.targets[rows], mask, stats, coefficients, self.tail, logits, **extra)

    def accumulate(self, logits: Tensor, rows: slice, grads) -> None:
        """Adds what follows from the gradient of a chunk's logits to ``grads``."""
        d_hidden, d_weight, d_bias = grads
        if d_hidden is not None:
            torch.mm(logits, self.weight, out=d_hidden[rows])
        if d_bias is not None:
            d_bias += logits.sum(0, dtype=d_bias.dtype)
        if d_weight is None:
            return
        g, h, first = logits.t(), self.h[rows], rows.start == 0
        if g.dtype == d_weight.dtype:
            torch.mm(g, h, out=d_weight) if first else d_weight.addmm_(g, h)
        elif products_widen(g.device):  # the sum in the product's own epilogue: no second [V, D] tensor
            if first:
                torch.mm(g, h, out_dtype=torch.float32, out=d_weight)
            else:
                torch.addmm(d_weight, g, h, out_dtype=torch.float32, out=d_weight)
        else:
            d_weight.copy_(g @ h) if first else d_weight.add_(g @ h)

    def gradient_of(self, score, kept, upstream: Tensor, wants) -> list[Tensor | None]:
        """Gradients of sum(upstream * weights * losses), from the logits computed once more."""
        grads = self.new_grads(wants)
        with self.quiet():
            scale = self.weighted(upstream.to(self.stats.dtype))
            for rows, partials in zip(self.chunks, kept, strict=True):
                logits = self.logits(rows)
                if partials is None:
                    spare = self.new_vector()
                    self.fused(*score.fused, logits, rows, spare, None, logits, scale)
                else:
                    up = upstream[rows]
                    self.gradient(logits, rows, Partials(*(None if g is None else g * up for g in partials)), False)
                self.accumulate(logits, rows, grads)
        return self.cast(grads)

    def cast(self, grads) -> list[Tensor | None]:
        return [None if g is None else g.to(d) for g, d in zip(grads, self.grad_dtypes, strict=True)]


class GradientInForward(torch.autograd.Function):
    """Attaches gradients of ``sum`` that are known already to ``loss`` = sum / denominator."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, loss, d_hidden, d_weight, d_bias, denominator):
        ctx.grads, ctx.denominator = (d_hidden, d_weight, d_bias), denominator
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return loss.clone()

    @staticmethod
    def backward(ctx, grad):
        if ctx.grads is None:
            raise RuntimeError("linear_score's gradient was handed out already; use reduction='none' to go back twice")
        grads, ctx.grads = ctx.grads, None
        return (*scaled(grads, grad, ctx.denominator, ctx.dtypes), *(None,) * 5)


def scaled(grads, grad: Tensor, denominator: Tensor | None, dtypes, inplace: bool = True) -> list[Tensor | None]:
    """The gradients of the sum, times upstream over the denominator, in their inputs' dtypes."""
    # Together, as either alone can underflow in fp16.
    scale = grad if denominator is None else grad / denominator

    def one(g: Tensor, dtype: torch.dtype) -> Tensor:
        if not inplace:
            return (g * scale).to(dtype)
        if g.dtype == dtype:
            return g.mul_(scale)
        return torch.mul(g, scale, out=torch.empty_like(g, dtype=dtype))  # one read, one write

    return [None if g is None else one(g, dtype) for g, dtype in zip(grads, dtypes, strict=True)]


class _Recompute(torch.autograd.Function):
    """Attaches to the ``losses`` [N] a backward that computes the logits again, chunk by chunk."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, losses, head, score, kept, wants):
        ctx.save_for_backward(hidden, weight, bias)
        ctx.head, ctx.score, ctx.kept, ctx.wants = head, score, kept, wants
        return losses.clone()

    @staticmethod
    def backward(ctx, upstream):
        ctx.saved_tensors  # noqa: B018  raises where hidden or weight were changed in place since
        return (*ctx.head.gradient_of(ctx.score, ctx.kept, upstream, ctx.wants), *(None,) * 5)
