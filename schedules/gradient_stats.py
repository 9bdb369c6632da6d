"""What the gradients of a run say of its learning rate, at next to no cost: signal, noise, slope and curvature.

Let g be the gradient of a batch of B, G its expectation and N = tr(Sigma) / B the expected |g - G|^2. Adam moves the
weights by -lr u with

    u = P m,      P = 1 / (sqrt(v) + eps),      m and v the bias-corrected moments

|G|^2 and N come from the norms of the batch and of one micro-batch, a share r of it (McCandlish et al., 2018, "An
Empirical Model of Large-Batch Training", appendix A.1). In expectation

    |g|^2 = |G|^2 + N,      |g_r|^2 = |G|^2 + N / r

The slope G'u before a step has u = P (a m_old + c g), in expectation a g'P m_old + c g'P g. But g'P g meets the noise
of g twice, so g_r'P g_s takes its place, with g_s the rest of the batch. For the first product P is the last step's.
For the second, r g_r^2 stands for g^2 in the new v. With the old v, rare gradients such as an embedding's row would
count far too much; with g^2 itself, P would be correlated with the product of the noises of g_r and g_s.

The slope after the same step is the next batch's g'u, because that batch is new to u. The curvature along it is what
the step took off its slope:

    u'Hu = (slope - after) / lr

Without micro-batches N comes from Adam's mean, with kappa the sum of the squared weights of the gradients in m:

    |m|^2 = |G|^2 + kappa N

and likewise G'P G. That calls noise what changes from step to step. Where steps overshoot, the slope then comes out too
low, below 0 rather than above what it is.

All are linear in sums over the parameters, so samples, ranks and shards are averaged before anything is divided. The
sums stay on the device. A sample takes one pass over gradients and moments at one step and half of one at the next.
"""

import math
from collections.abc import Iterator
from itertools import repeat

import torch
from torch import Tensor

STATISTICS = ("samples", "g2", "noise", "slope", "after", "curvature", "step2", "batch2")
# Parameters that are read at a time: on a GPU few kernels, on a CPU temporaries that stay in a core's cache.
CHUNK = {"cuda": 1 << 26, "cpu": 1 << 16}


class GradientStats:
    """Samples of an Adam's gradients. ``ranks``: data-parallel ranks, whose `sums` add up to what `means` takes."""

    def __init__(self, optimizer: torch.optim.Optimizer, ranks: int = 1):
        self.optimizer, self.ranks = optimizer, ranks
        self.sums = torch.zeros(len(STATISTICS), dtype=torch.float64, device=self._parameters()[0].device)
        self.pending = torch.zeros_like(self.sums[:6])  # a sample that waits for its next step
        self.sharded = any(hasattr(p, "to_local") for p in self._parameters())
        self.small: tuple[float, list[Tensor | None]] | None = None  # share and gradients of a micro-batch

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _groups(self, small: list[Tensor | None] | None) -> Iterator[tuple[tuple[float, ...], list, Tensor]]:
        """((beta1, beta2, eps), (gradient, mean, square, and the micro-batch's gradient if there is) of each parameter
        that Adam has begun to move, steps so far); one for all groups of these settings."""
        found, steps, parts = {}, {}, iter(small or repeat(None))
        for group in self.optimizer.param_groups:
            key = tuple(map(float, (*group["betas"], group["eps"])))
            for p in group["params"]:
                state, part = self.optimizer.state.get(p), next(parts)
                if p.grad is not None and state and "exp_avg_sq" in state and (small is None or part is not None):
                    tensors = [_flat(x) for x in (p.grad, state["exp_avg"], state["exp_avg_sq"])]
                    found.setdefault(key, []).append(tensors + ([] if small is None else [part]))
                    steps[key] = torch.as_tensor(state["step"])
        for key, held in found.items():
            yield key, held, steps[key].to(self.sums.device, torch.float64, non_blocking=True)

    @torch.no_grad()
    def micro(self, share: float) -> None:
        """After the first micro-batch's backward, before the second's. ``share``: its part of the tokens that the batch
        has on all ranks. ``.grad`` must hold that micro-batch's part of the batch's gradient (DDP: under no_sync)."""
        if not 0 < share < 1:
            return
        # In bfloat16 until the step, for the memory: its rounding is 2^-9 of an element and has no sign.
        self.small = share, [None if p.grad is None else _flat(p.grad).bfloat16() for p in self._parameters()]

    @torch.no_grad()
    def sample(self, begin: bool, lr: float, clipped_by: Tensor | None = None) -> None:
        """Before an optimizer step: ends the sample that the last step has begun, if any, and begins one if asked.

        ``lr``: of the last step. ``clipped_by``: what clipping has divided the gradient by, 1 or more; all
        measurements are of the unclipped gradient. A sample with a value that is not finite, or that the optimizer
        will skip (``found_inf``), is left out."""
        (share, small), self.small = (self.small if begin else None) or (None, None), None
        # From the part that was kept to the micro-batch's own gradient: DDP multiplies each rank's by their number.
        scale = 1.0 if share is None else 1 / (share * self.ranks)
        parts = []
        for (beta1, beta2, eps), held, step in self._groups(small):
            # 1 / P = sqrt(v / bias) + eps = s (sqrt(v) + eps / s): s goes to the sums instead of to each element.
            beta2 = max(beta2, 1e-12)  # it is divided by
            s, new_s = (1 - beta2**step).rsqrt(), math.sqrt(beta2) * (1 - beta2 ** (step + 1)).rsqrt()
            new, dots = (1 / beta2 - 1) * (1.0 if share is None else scale**2 * share), []
            for g, m, v, *micro in _chunks(held, CHUNK[self.sums.device.type]):
                mp = v.sqrt().add_(eps / s)
                torch.div(m, mp, out=mp)  # independent of g
                dots.append([torch.dot(mp, g)])
                if begin:
                    o = micro[0].float() if micro else g
                    op = torch.addcmul(v, o, o, value=new).sqrt_().add_(eps / new_s)
                    torch.div(o, op, out=op)  # nearly the step's own P; see the top
                    other = o if micro else m
                    dots[-1] += [torch.dot(g, g), torch.dot(other, other)]
                    dots[-1] += [torch.dot(op if micro else mp, other), torch.dot(mp, mp), torch.dot(op, g)]
            gm, *more = torch.stack([torch.stack(d) for d in dots]).sum(0, dtype=torch.float64).unbind()
            if begin:
                gg, oo, opo, mpmp, xpg = more
                opo = opo * scale**2 / (s if share is None else new_s)
                more = [gg, oo * scale**2, opo, mpmp / s**2, xpg * scale / new_s]
            parts.append((beta1, step, gm / s, *more))
        if not parts:
            return
        found = getattr(self.optimizer, "found_inf", None)
        skipped = torch.zeros_like(self.sums[0]) if found is None else found.to(self.sums)
        # A shard's sums are its part of the whole, a replica's are the whole: weighted so, both add up to it.
        weight = torch.full_like(self.pending, 1.0 if self.sharded else 1 / self.ranks)
        weight[0] = 1 / self.ranks
        clip = torch.ones_like(skipped) if clipped_by is None else clipped_by.to(skipped)
        after = clip * sum(gm / (1 - beta1**step) for beta1, step, gm, *_ in parts) * weight[1]
        if lr > 0:
            n, g2, noise, slope, step2, batch2 = self.pending.unbind()
            ended = torch.stack([n, g2, noise, slope, after, (slope - after) / lr, step2, batch2])
            good = torch.isfinite(ended).all() & (n > 0) & (skipped == 0)
            self.sums += torch.where(good, ended, 0.0)
        self.pending.zero_()
        if not begin:
            return
        total = torch.zeros_like(self.pending[1:])
        # o: the micro-batch's gradient, else Adam's mean; x: o or g
        for beta1, step, gm, gg, oo, opo, mpmp, xpg in parts:
            power = beta1**step
            bias, next_bias = 1 - power, 1 - power * beta1
            if small is not None:
                noise = (oo - gg * clip**2) / (1 / share - 1)
                signal_p = (xpg * clip - share * opo) / (1 - share)  # the micro-batch and the rest of the batch
            else:  # kappa is the sum of the squared weights (1 - beta1) beta1^i / bias; it is 1 after one step
                kappa = (1 - beta1) * (1 + power) / ((1 + beta1) * bias)
                noise = clip**2 * (gg - oo / bias**2) / (1 - kappa)
                signal_p = clip**2 * (opo / bias**2 - kappa * xpg) / (1 - kappa)
            # G'u, u = P (beta1 bias m_old + (1 - beta1) g) / next_bias: its g was clipped, the slope's was not.
            slope = (beta1 * gm * clip + (1 - beta1) * signal_p / clip) / next_bias
            total += torch.stack([gg * clip**2 - noise, noise, slope, mpmp / bias**2, gg * clip**2])
        begun = torch.cat([torch.ones_like(total[:1]), total]) * weight
        self.pending = torch.where(torch.isfinite(begun).all() & (skipped == 0), begun, 0.0)

    @staticmethod
    def means(sums: list[float]) -> dict[str, float] | None:
        """Means of the samples by name, from `sums`, summed over ranks, on the host; None without a sample."""
        n = sums[0]
        return {k: v / n for k, v in zip(STATISTICS[1:], sums[1:], strict=True)} | {"samples": n} if n > 0 else None


def _flat(x: Tensor) -> Tensor:
    x = x.to_local() if hasattr(x, "to_local") else x
    return x.detach().reshape(-1).float()


def _chunks(held: list[list[Tensor]], limit: int) -> Iterator[list[Tensor]]:
    """The tensors of all parameters one after the other, in vectors of at most ``limit`` elements."""
    waiting, size = [], 0
    for tensors in held:
        for pieces in zip(*(x.split(limit) for x in tensors), strict=True):
            if size + pieces[0].numel() > limit:
                yield [x[0] if len(x) == 1 else torch.cat(x) for x in zip(*waiting, strict=True)]
                waiting, size = [], 0
            waiting.append(pieces)
            size += pieces[0].numel()
    if waiting:
        yield [x[0] if len(x) == 1 else torch.cat(x) for x in zip(*waiting, strict=True)]
