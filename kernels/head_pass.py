"""One pass over a linear head in chunks of tokens: a chunk's logits, their moments, the score and its derivatives, the
gradient over the logits' own storage, and from it the chunk's rows of d_hidden and its part of d_weight."""

import contextlib

import torch
from torch import Tensor

from .chunks import cuda_chunk, padded_rows, products_widen, row_stride
from .impl import brought, check_logits, check_targets, choose_impl, fused_form, with_class_weights
from .moments import (
    Moments,
    Partials,
    Stats,
    as_moments,
    check_fisher,
    fisher_of,
    gradient_coefficients,
    make_link,
    mask_stats,
    new_stats,
    score_partials,
)
from .topk import TopK, check_top, fill_top, new_top, with_top

# Bytes of logits a chunk on CPU (CUDA: chunks.py). The weight, and d_weight in training, is read anew for each: beside
# 128 MiB, 64 took 0 to 4 % longer at 2048 x 50257 and 511 x 49152 (the best of seven, one thread), 32 took 0 to 11 %,
# 16 took 14 to 27 %. At 2048 x 8192 none differed.
CPU_BUDGET = 64 * 2**20
ALL = slice(None)


class HeadPass:
    """The checked inputs of one pass, and the buffers that it reuses. Arguments as in ``linear_score``; ``order`` is
    that of the score, ``trained`` whether the weight gets a gradient, ``wide`` whether that has to be the fp32 sum, and
    ``vocab`` the length of a row of logits where it is not the number of the weight's rows.

    Rows outside of the loss are left out, where that takes no wait: ``index`` has the numbers of those that stay, None
    for all, and the vectors and buffers here are theirs. What goes back to the caller is of all rows again."""

    def __init__(
        self,
        hidden,
        weight,
        targets,
        *,
        ignore_index,
        impl,
        chunk=None,
        memory=None,
        accum_dtype=None,
        trained=False,
        wide=False,
        bias=None,
        weights=None,
        class_weights=None,
        tail=0.0,
        order=None,
        scale=1.0,
        softcap=None,
        predictions=False,
        topk=0,
        tokens=None,
        vocab=None,
        skip=True,
    ):
        if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
            shapes = f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
            raise ValueError(f"hidden must be [N, D] and weight [V, D], got {shapes}; flatten batch and time")
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk must be a positive number of tokens, got {chunk}")
        if memory is not None and memory < 1:
            raise ValueError(f"memory must be a positive number of bytes, got {memory}; None is the default")
        if accum_dtype not in (None, torch.bfloat16):
            raise ValueError(f"accum_dtype={accum_dtype}: expected torch.bfloat16, or None for fp32")
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must be [V], one a row of weight, {len(weight)}; got {tuple(bias.shape)}")
        device = hidden.device
        if torch.is_autocast_enabled(device.type):
            hidden = hidden.to(torch.get_autocast_dtype(device.type))
        if accum_dtype and not hidden.dtype == weight.dtype == accum_dtype:
            raise ValueError(
                f"accum_dtype={accum_dtype} is for bf16, got {hidden.dtype} and a weight in {weight.dtype}"
            )
        self.module = choose_impl(impl, hidden)
        self.hidden, self.vocab, self.weight_rows, self.tail = hidden, vocab or len(weight), len(weight), tail
        self.order, self.link = brought(order, hidden.device), make_link(scale, softcap)
        self.grad_dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        check_logits(hidden.new_empty(0, self.vocab), self.module)
        self.targets, self.valid, self.mask = check_targets(targets, len(hidden), self.vocab, ignore_index, device)
        weights = with_class_weights(weights, class_weights, self.targets, self.vocab)
        self.h = hidden.detach()
        self.index, self.right_count = self.rows_in_loss(tokens) if skip else (None, None)
        if self.index is not None:
            self.h, self.targets = self.h[self.index], self.targets[self.index]
            weights = None if weights is None else weights[self.index]
            self.mask = None
        self.n = len(self.h)
        self.stats, self.correct = new_stats(hidden, self.n)
        self.predicted = torch.empty_like(self.targets) if predictions else None
        self.top_module = check_top(topk, self.vocab, impl, self.module) if topk else None
        self.top = new_top(hidden, self.n, topk) if topk else None  # its log_p less lse
        self.weights = None if weights is None else weights.detach().to(self.stats.dtype)
        self.can_keep_w = hidden.dtype == self.stats.dtype and self.module.CAN_KEEP_W and not self.link.softcap
        # With a vocabulary of its own a pass makes its own logits, see parallel.
        self.padded = len(weight) if vocab else padded_rows(self.vocab, hidden.itemsize, device)
        self.stride = row_stride(self.vocab) if hidden.is_cuda else max(self.vocab, self.padded)
        direct = trained and not wide and weight.dtype == hidden.dtype == torch.bfloat16
        if chunk is None and hidden.is_cuda:
            sizes = self.n, self.vocab, hidden.shape[1], hidden.itemsize, weight.itemsize
            chunk = cuda_chunk(*sizes, device, trained and not accum_dtype, direct, memory)
        elif chunk is None:
            most = max(1, (memory or CPU_BUDGET) // (self.stride * hidden.itemsize))
            chunk = -(-self.n // max(1, -(-self.n // most)))  # chunks of equal size
        chunk = max(1, min(chunk, self.n))
        self.chunks = [slice(i, min(i + chunk, self.n)) for i in range(0, self.n, chunk)]
        # A product sums in fp32: where it is all of d_weight, it is rounded there to the gradient. fp16 might overflow.
        self.direct = direct and (bool(accum_dtype) or len(self.chunks) == 1)
        # bf16 has fp32's range: "mean" divides before the gradient, and backward finds it done. fp16 might underflow.
        self.divides_first = not wide and hidden.dtype == torch.bfloat16
        self.weight = self.padded_with_zeros(weight)
        self.bias = None if bias is None else self.padded_with_zeros(bias)
        self.buffer, self.can_fuse, self.form = None, True, None

    def rows_in_loss(self, tokens: int | None) -> tuple[Tensor | None, Tensor | None]:
        """(the numbers of the rows in the loss, whether ``tokens`` is how many there are), (None, None) where all rows
        are taken: all are in the loss, or that would have to be asked of a GPU."""
        if tokens is not None and not 0 <= tokens <= len(self.valid):
            raise ValueError(
                f"tokens must be the number of targets in the loss, at most {len(self.valid)}; got {tokens}"
            )
        if self.valid.is_cuda:
            if tokens is None or tokens == len(self.valid):
                return None, None
            rows = torch.nonzero_static(self.valid, size=tokens, fill_value=0)[:, 0]
            return rows, self.valid.sum() == tokens
        rows = None if self.mask is None else self.mask.nonzero()[:, 0]
        found = len(self.valid) if rows is None else len(rows)
        if tokens not in (None, found):
            raise ValueError(f"tokens={tokens}, but {found} targets are in the loss; count those that are not ignored")
        return rows, None

    def of_all_rows(self, x: Tensor | None, dim: int = 0) -> Tensor | None:
        """``x`` of the rows in the loss, with 0 for the others."""
        if self.index is None or x is None:
            return x
        shape = list(x.shape)
        shape[dim] = len(self.valid)
        return x.new_zeros(shape).index_copy_(dim, self.index, x)

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
            losses = self.weighted(self.in_loss(losses))
            if self.right_count is not None:  # a wrong number must not pass for a loss
                losses = torch.where(self.right_count, losses, torch.nan)
            return self.of_all_rows(losses), self.all_moments(fishers), kept

    def reduced(self, score, reduction: str, denominator: Tensor | None, fisher: bool, wants):
        """(loss, Moments, gradients, denominator by which they are still to be divided or None): one pass over the
        chunks."""
        grads = self.new_grads(wants)
        if reduction == "mean" and self.divides_first:
            with self.quiet():
                denominator = self.count() if denominator is None else brought(denominator, self.h.device)
                ones = 1.0 if self.weights is None else self.weights
                self.weights = (ones / denominator).to(self.stats.dtype).expand(self.n)
            reduction, denominator = "sum", None
        losses, moments, _ = self.losses(score, fisher, grads if any(wants) else None)
        with self.quiet():
            total = losses.sum()
            if reduction == "mean":
                # A copy, as the caller may refill its tensor before backward.
                denominator = self.count() if denominator is None else brought(denominator, total.device).clone()
                total = total / denominator
            self.finished(grads)
        return total, moments, grads, denominator

    def new_vector(self) -> Tensor:
        return torch.empty(self.n, dtype=self.stats.dtype, device=self.h.device)

    def count(self) -> Tensor:
        """What "mean" divides by: tokens in the loss, or their weights; 1 for none."""
        if self.weights is None:
            return self.valid.sum().clamp_min(1)
        count = self.in_loss(self.weights).sum()
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
        self.fill_top(logits, rows)
        more = self.tail, self.link.softcap, self.predicted is not None
        if self.can_fuse and (form := fused_form(score, self.module, logits.device, *more)):
            if self.form is None:  # a knob on the device as it is now: the caller may refill it before backward
                name, knob = form
                self.form = name, knob.clone() if isinstance(knob, Tensor) else knob
            self.fused(logits, rows, losses, fishers, logits if gradient else None, self.weights)
            return None
        self.forward(logits, rows, keep_w)
        numbers = self.index[rows] if self.index is not None else range(rows.start, rows.stop)
        losses[rows], partials = score_partials(self.moments(rows), score, (numbers, self.targets[rows]))
        if fishers is not None:
            check_fisher(partials)
            fishers[rows] = self.in_loss(fisher_of(self.stats_of(rows), partials, self.order), rows)
        return partials.map(lambda g: self.weighted(g, rows))

    def fused(self, logits, rows, losses, fishers, out, weights) -> None:
        """The chunk by one kernel. The Fisher is written whether it is wanted or not."""
        if fishers is None:
            fishers = self.new_vector()
        vectors = dict(mask=self.mask, weights=weights, correct=self.correct, losses=losses, fisher=fishers)
        vectors = {name: None if x is None else x[rows] for name, x in vectors.items()}
        how = dict(order=self.order, link=self.link)
        self.module.fused_score(
            *self.form, logits, self.targets[rows], stats=self.stats[:, rows], out=out, **vectors, **how
        )

    def padded_with_zeros(self, x: Tensor) -> Tensor:
        """The weight or bias as the products take it: in the dtype of ``hidden``, with ``padded`` rows."""
        x = x.detach()
        if len(x) == self.padded:
            return x.to(self.h.dtype)
        wider = self.h.new_empty(self.padded, *x.shape[1:])
        wider[: len(x)] = x
        wider[len(x) :] = 0
        return wider

    def in_products(self, logits: Tensor) -> Tensor:
        """A chunk's logits with the columns of the padding: 0, as their weights are, and never written to."""
        if logits.shape[1] >= self.padded:
            return logits
        return logits.as_strided((len(logits), self.padded), logits.stride())

    def rows_of_buffer(self, rows: slice) -> Tensor:
        """Storage for the logits of a chunk, the same for every chunk."""
        if self.buffer is None:
            self.buffer = self.h.new_empty(self.chunks[0].stop, self.stride)[:, : self.vocab]
        return self.buffer[: rows.stop - rows.start]

    def logits(self, rows: slice) -> Tensor:
        out = self.rows_of_buffer(rows)
        if self.bias is None:
            torch.mm(self.h[rows], self.weight.t(), out=self.in_products(out))
        else:
            torch.addmm(self.bias, self.h[rows], self.weight.t(), out=self.in_products(out))
        return out

    def logits_again(self, rows: slice, index: Tensor) -> Tensor:
        logits = self.h[rows][index] @ self.weight.t()
        return (logits if self.bias is None else logits + self.bias)[:, : self.vocab]

    def mask_of(self, rows: slice) -> Tensor | None:
        return None if self.mask is None else self.mask[rows]

    def stats_of(self, rows: slice) -> Stats:
        return Stats(*self.stats[:, rows])

    def forward(self, logits: Tensor, rows: slice, keep_w: bool = False) -> None:
        stats, correct = self.stats[:, rows], self.correct[rows]
        predicted = None if self.predicted is None else self.predicted[rows]
        extra = dict(keep_w=True, rows_again=lambda i: self.logits_again(rows, i)) if keep_w else {}
        how = dict(order=self.order, link=self.link, predicted=predicted)
        self.module.forward(logits, self.targets[rows], stats, correct, self.tail, **how, **extra)
        mask_stats(stats, correct, self.mask_of(rows), predicted)

    def fill_top(self, logits: Tensor, rows: slice) -> None:
        """The likeliest tokens of a chunk, where they are asked for, before anything is written over its logits."""
        if self.top is not None:
            none = self.stats.new_zeros(len(logits))
            fill_top(logits, none, self.mask_of(rows), self.link, TopK(*(x[rows] for x in self.top)), self.top_module)

    def moments(self, rows: slice) -> Moments:
        """Of a chunk."""
        valid = torch.ones_like(self.correct[rows]) if self.mask is None else self.mask[rows]
        stats = self.stats_of(rows)
        more = with_top(TopK(*(x[rows] for x in self.top)), stats.lse) if self.top else {}
        return as_moments(stats, self.correct[rows], valid, self.vocab, self.tail, self.order, **more)

    def all_moments(self, fisher: Tensor | None = None) -> Moments:
        """Of all rows, those outside of the loss included."""
        stats, correct = self.of_all_rows(self.stats, 1), self.of_all_rows(self.correct)
        more = dict(fisher=self.of_all_rows(fisher), predicted=self.of_all_rows(self.predicted))
        top = TopK(*map(self.of_all_rows, self.top)) if self.top else None
        more |= with_top(top, Stats(*stats).lse)
        return as_moments(Stats(*stats), correct, self.valid, self.vocab, self.tail, self.order, **more)

    def new_grads(self, wants) -> list[Tensor | None]:
        """Buffers for d_hidden, d_weight [padded, D] in fp32 (fp64 for fp64; bf16 if direct), and d_bias in fp32."""
        d_hidden = torch.empty_like(self.h) if wants[0] else None
        new = torch.empty if self.n else torch.zeros  # the first chunk overwrites, see accumulate
        wide = dict(dtype=self.stats.dtype, device=self.h.device)
        narrow = wide | dict(dtype=self.h.dtype)
        d_weight = new(self.weight.shape, **narrow if self.direct else wide) if wants[1] else None
        return [d_hidden, d_weight, torch.zeros(self.vocab, **wide) if wants[2] else None]

    def finished(self, grads) -> None:
        """Makes of the buffers what the caller gets."""
        grads[0] = self.of_all_rows(grads[0])
        if grads[1] is not None:
            grads[1] = grads[1][: self.weight_rows]

    def gradient(self, logits: Tensor, rows: slice, partials: Partials | None, kept_w: bool = False) -> None:
        """Turns the chunk's logits into their gradient, where ``score`` has not."""
        if partials is None:
            return
        stats, extra = self.stats_of(rows), dict(kept_w=True) if kept_w else {}
        coefficients = gradient_coefficients(stats, partials, self.order, self.link)
        inputs = (logits, self.targets[rows], self.mask_of(rows), stats, coefficients)
        self.module.gradient(*inputs, self.tail, logits, order=self.order, link=self.link, **extra)

    def accumulate(self, logits: Tensor, rows: slice, grads) -> None:
        """Adds what follows from the gradient of a chunk's logits to ``grads``."""
        d_hidden, d_weight, d_bias = grads
        if d_bias is not None:
            d_bias += logits.sum(0, dtype=d_bias.dtype)
        logits = self.in_products(logits)
        if d_hidden is not None:
            torch.mm(logits, self.weight, out=d_hidden[rows])
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
            upstream = upstream.to(self.stats.dtype)
            upstream = upstream if self.index is None else upstream[self.index]
            scale = self.weighted(upstream)
            for rows, partials in zip(self.chunks, kept, strict=True):
                logits = self.logits(rows)
                if partials is None:
                    self.fused(logits, rows, self.new_vector(), None, logits, scale)
                else:
                    self.gradient(logits, rows, partials.map(upstream[rows].mul))
                self.accumulate(logits, rows, grads)
            self.finished(grads)
        return [None if g is None else g.to(d) for g, d in zip(grads, self.grad_dtypes, strict=True)]


def scaled(
    grads, grad: Tensor, denominator: Tensor | None, dtypes, inplace: bool = True, rescale=None
) -> list[Tensor | None]:
    """The gradients of the sum, times upstream over the denominator, in their inputs' dtypes. ``rescale`` is
    triton_impl's, which does nothing where that is 1."""
    # Together, as either alone can underflow in fp16.
    scale = grad if denominator is None else grad / denominator

    def one(g: Tensor, dtype: torch.dtype) -> Tensor:
        if inplace and rescale and g.dtype == dtype and g.dim() == 2:
            rescale(g, scale)
            return g
        if inplace:  # one read, one write
            return torch.mul(g, scale, out=g if g.dtype == dtype else torch.empty_like(g, dtype=dtype))
        return (g * scale).to(dtype)

    return [None if g is None else one(g, dtype) for g, dtype in zip(grads, dtypes, strict=True)]
