"""One pass over a linear head in chunks of tokens: a chunk's logits, their moments, the score and its derivatives, the
gradient over the logits' own storage, and from it the chunk's rows of d_hidden and its part of d_weight."""

import contextlib

import torch
from torch import Tensor

from .chunks import cuda_chunk, products_widen, row_stride
from .impl import check_logits, check_targets, choose_impl, fused_form
from .moments import (
    Moments,
    Partials,
    Stats,
    as_moments,
    fisher_of,
    gradient_coefficients,
    mask_stats,
    new_stats,
    score_partials,
)

# Bytes of logits a chunk on CPU (CUDA: chunks.py). Less would read and write the fp32 d_weight too often.
CPU_BUDGET = 128 * 2**20
ALL = slice(None)


class HeadPass:
    """The checked inputs of one pass, and the buffers that it reuses. Arguments as in ``linear_score``; ``vocab`` is
    the length of a row of logits where it is not the number of the weight's rows."""

    def __init__(
        self, hidden, weight, targets, *, ignore_index, chunk, impl, bias=None, weights=None, tail=0.0, vocab=None
    ):
        if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
            shapes = f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
            raise ValueError(f"hidden must be [N, D] and weight [V, D], got {shapes}; flatten batch and time")
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk must be a positive number of tokens, got {chunk}")
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must be [V], one a row of weight, {len(weight)}; got {tuple(bias.shape)}")
        device = hidden.device
        if torch.is_autocast_enabled(device.type):
            hidden = hidden.to(torch.get_autocast_dtype(device.type))
        self.module = choose_impl(impl, hidden)
        self.hidden, self.n, self.vocab, self.tail = hidden, len(hidden), vocab or len(weight), tail
        self.grad_dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        check_logits(hidden.new_empty(0, self.vocab), self.module)
        self.targets, self.valid, self.mask = check_targets(targets, self.n, self.vocab, ignore_index, device)
        self.stats, self.correct = new_stats(hidden, self.n)
        self.weights = None if weights is None else weights.detach().to(self.stats.dtype)
        self.can_keep_w = hidden.dtype == self.stats.dtype and self.module.CAN_KEEP_W
        self.stride = row_stride(self.vocab) if hidden.is_cuda else self.vocab
        if chunk is None and hidden.is_cuda:
            chunk = cuda_chunk(self.n, self.vocab, hidden.shape[1], hidden.itemsize, weight.itemsize, device)
        elif chunk is None:
            most = max(1, CPU_BUDGET // (self.stride * hidden.itemsize))
            chunk = -(-self.n // max(1, -(-self.n // most)))  # chunks of equal size
        chunk = max(1, min(chunk, self.n))
        self.chunks = [slice(i, min(i + chunk, self.n)) for i in range(0, self.n, chunk)]
        self.weight, self.h = weight.detach().to(hidden.dtype), hidden.detach()
        self.bias = None if bias is None else bias.detach().to(hidden.dtype)
        self.buffer, self.can_fuse = None, True

    @contextlib.contextmanager
    def quiet(self):
        """No gradient, no autocast, and the buffer given back at the end."""
        with torch.no_grad(), torch.autocast(self.h.device.type, enabled=False):
            yield
        self.buffer = None

    def losses(self, score, fisher: bool, grads=None):
        """(weighted losses [N], Moments, what ``gradient_of`` needs) of all chunks; fills ``grads`` with those of the
        losses' sum."""
        losses, fishers, kept = self.new_vector(), self.new_vector() if fisher else None, []
        gradient = grads is not None
        keep_w = gradient and self.can_keep_w  # w left in the logits' storage saves the gradient's exponentials
        with self.quiet():
            for rows in self.chunks:
                logits = self.logits(rows)
                partials = self.score(logits, rows, score, losses, fishers, gradient, keep_w)
                if gradient:
                    self.gradient(logits, rows, partials, keep_w)
                    self.accumulate(logits, rows, grads)
                kept.append(partials)
            return self.weighted(self.in_loss(losses)), self.moments(fisher=fishers), kept

    def reduced(self, score, reduction: str, denominator: Tensor | None, fisher: bool, wants):
        """(loss, Moments, gradients of the weighted SUM, denominator): one pass over the chunks."""
        grads = self.new_grads(wants)
        losses, moments, _ = self.losses(score, fisher, grads if any(wants) else None)
        with self.quiet():
            total = losses.sum()
            if reduction == "mean":
                # A copy, as the caller may refill its tensor before backward.
                denominator = self.count() if denominator is None else denominator.clone()
                total = total / denominator
        return total, moments, grads, denominator

    def new_vector(self) -> Tensor:
        return torch.empty(self.n, dtype=self.stats.dtype, device=self.h.device)

    def count(self) -> Tensor:
        """What "mean" divides by: tokens in the loss, or their weights; 1 for none."""
        if self.weights is None:
            return self.valid.sum().clamp_min(1)
        count = torch.where(self.valid, self.weights, 0.0).sum()
        return torch.where(count == 0, 1.0, count)

    def in_loss(self, values: Tensor, rows: slice = ALL) -> Tensor:
        """``values``, 0 outside the loss: a score need not be 0 where the moments are."""
        return values if self.mask is None else torch.where(self.mask[rows], values, 0.0)

    def weighted(self, values: Tensor, rows: slice = ALL) -> Tensor:
        """values * weights, 0 where the weight is 0 even if the value is not finite."""
        if self.weights is None:
            return values
        w = self.weights[rows]
        return torch.where(w == 0, 0.0, values * w)

    def score(self, logits, rows, score, losses, fishers, gradient=False, keep_w=False):
        """Fills stats, losses and Fisher of a chunk. Gives the weighted partials, or None where one kernel did it all,
        with ``gradient`` the weighted gradient over the logits too."""
        fused = self.can_fuse and fused_form(score, self.module, self.tail)
        if fused:
            self.fused(fused, logits, rows, losses, fishers, logits if gradient else None, self.weights)
            return None
        self.forward(logits, rows, keep_w)
        losses[rows], partials = score_partials(self.moments(rows), score)
        if fishers is not None:
            fishers[rows] = self.in_loss(fisher_of(self.stats_of(rows), partials), rows)
        return partials.map(lambda g: self.weighted(g, rows))

    def fused(self, form, logits, rows, losses, fishers, out, weights) -> None:
        """The chunk by one kernel. The Fisher is written whether it is wanted or not."""
        if fishers is None:
            fishers = self.new_vector()
        vectors = dict(mask=self.mask, weights=weights, correct=self.correct, losses=losses, fisher=fishers)
        vectors = {name: None if x is None else x[rows] for name, x in vectors.items()}
        self.module.fused_score(*form, logits, self.targets[rows], stats=self.stats[:, rows], out=out, **vectors)

    def rows_of_buffer(self, rows: slice) -> Tensor:
        """Storage for the logits of a chunk, the same for every chunk."""
        if self.buffer is None:
            self.buffer = self.h.new_empty(self.chunks[0].stop, self.stride)[:, : self.vocab]
        return self.buffer[: rows.stop - rows.start]

    def logits(self, rows: slice) -> Tensor:
        out = self.rows_of_buffer(rows)
        if self.bias is None:
            return torch.mm(self.h[rows], self.weight.t(), out=out)
        return torch.addmm(self.bias, self.h[rows], self.weight.t(), out=out)

    def logits_again(self, rows: slice, index: Tensor) -> Tensor:
        logits = self.h[rows][index] @ self.weight.t()
        return logits if self.bias is None else logits + self.bias

    def mask_of(self, rows: slice) -> Tensor | None:
        return None if self.mask is None else self.mask[rows]

    def stats_of(self, rows: slice) -> Stats:
        return Stats(*self.stats[:, rows])

    def forward(self, logits: Tensor, rows: slice, keep_w: bool = False) -> None:
        stats, correct = self.stats[:, rows], self.correct[rows]
        extra = dict(keep_w=True, rows_again=lambda i: self.logits_again(rows, i)) if keep_w else {}
        self.module.forward(logits, self.targets[rows], stats, correct, self.tail, **extra)
        mask_stats(stats, correct, self.mask_of(rows))

    def moments(self, rows: slice = ALL, fisher: Tensor | None = None) -> Moments:
        return as_moments(self.stats_of(rows), self.correct[rows], self.valid[rows], self.vocab, self.tail, fisher)

    def new_grads(self, wants) -> list[Tensor | None]:
        """Buffers for d_hidden, d_weight in fp32 (fp64 for fp64), and d_bias likewise."""
        d_hidden = torch.empty_like(self.h) if wants[0] else None
        new = torch.empty if self.n else torch.zeros  # the first chunk overwrites, see accumulate
        wide = dict(dtype=self.stats.dtype, device=self.h.device)
        d_weight = new(self.weight.shape, **wide) if wants[1] else None
        return [d_hidden, d_weight, torch.zeros(len(self.weight), **wide) if wants[2] else None]

    def gradient(self, logits: Tensor, rows: slice, partials: Partials | None, kept_w: bool = False) -> None:
        """Turns the chunk's logits into their gradient, where ``score`` has not."""
        if partials is None:
            return
        stats, extra = self.stats_of(rows), dict(kept_w=True) if kept_w else {}
        inputs = (logits, self.targets[rows], self.mask_of(rows), stats, gradient_coefficients(stats, partials))
        self.module.gradient(*inputs, self.tail, logits, **extra)

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
        same = g.dtype == d_weight.dtype
        if same or products_widen(g.device):  # the sum in the product's own epilogue: no second [V, D] tensor
            out = dict(out=d_weight) if same else dict(out=d_weight, out_dtype=torch.float32)
            torch.mm(g, h, **out) if first else torch.addmm(d_weight, g, h, **out)
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
                    self.fused(score.fused, logits, rows, self.new_vector(), None, logits, scale)
                else:
                    self.gradient(logits, rows, partials.map(upstream[rows].mul))
                self.accumulate(logits, rows, grads)
        return [None if g is None else g.to(d) for g, d in zip(grads, self.grad_dtypes, strict=True)]


def scaled(grads, grad: Tensor, denominator: Tensor | None, dtypes, inplace: bool = True) -> list[Tensor | None]:
    """The gradients of the sum, times upstream over the denominator, in their inputs' dtypes."""
    # Together, as either alone can underflow in fp16.
    scale = grad if denominator is None else grad / denominator

    def one(g: Tensor, dtype: torch.dtype) -> Tensor:
        if inplace:  # one read, one write
            return torch.mul(g, scale, out=g if g.dtype == dtype else torch.empty_like(g, dtype=dtype))
        return (g * scale).to(dtype)

    return [None if g is None else one(g, dtype) for g, dtype in zip(grads, dtypes, strict=True)]
