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

The noise of slope and after does not shrink with lr, so that of a step of a warm-up's first learning rates this says
next to nothing. A sample weighs lr^2 in the means of slope and after, which makes the curvature that of least squares,
the sum of lr (slope - after) over that of lr^2, and keeps slope and curvature means over the same steps.

Without micro-batches N comes from Adam's mean, with kappa the sum of the squared weights of the gradients in m:

    |m|^2 = |G|^2 + kappa N

and likewise G'P G. That calls noise what changes from step to step. Where steps overshoot, the slope then comes out too
low, below 0 rather than above what it is.

SGD and Muon have no P, but a formula for their direction u(g) for a gradient g. Their slope comes from what they would
do with the micro-batch alone, and u(g) of the step waits in the optimizer's state, in bfloat16, for the next gradient:

    slope = g_s'u(g_r),      after = g'u of the last step

This needs micro-batches. u(g_r) has a little more noise than u(g), which Muon's scale turns into a smaller slope.

All are linear in sums over the parameters, so samples, ranks and shards are averaged before anything is divided. The
sums stay on the device. A sample takes one pass over gradients and moments at one step and half of one at the next;
on CUDA triton_stats is that pass, in one kernel: 32 bytes a parameter in all instead of 180.
"""

import logging
import math
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import repeat

import torch
from torch import Tensor

from .directions import direction, kinds, moments

log = logging.getLogger("scorecast")

STATISTICS = ("samples", "g2", "noise", "step2", "batch2", "lr2", "slope", "after", "drop")  # the last three by lr^2
LAST = "last_direction"  # in the optimizer's state of a parameter, between the halves of a sample
# Parameters that are read at a time: on a GPU few kernels, on a CPU temporaries that stay in a core's cache.
CHUNK = {"cuda": 1 << 26, "cpu": 1 << 16}


class GradientStats:
    """Samples of an optimizer's gradients; of one that directions.py cannot read there are none. ``ranks``:
    data-parallel ranks, whose `sums` add up to what `means` takes."""

    def __init__(self, optimizer: torch.optim.Optimizer, ranks: int = 1):
        self.optimizer, self.ranks = optimizer, ranks
        self.sums = torch.zeros(len(STATISTICS), dtype=torch.float64, device=self._parameters()[0].device)
        self.pending = torch.zeros_like(self.sums[:6])  # a sample that waits for its next step
        self.sharded = any(hasattr(p, "to_local") for p in self._parameters())
        self.small: tuple[float, list[Tensor | None]] | None = None  # share and gradients of a micro-batch
        self.kinds = kinds(optimizer)  # of the groups
        self.told = False

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _groups(self, small: list[Tensor | None] | None) -> Iterator[tuple[tuple[float, ...], list, Tensor]]:
        """((beta1, beta2, eps), (gradient, mean, square, and the micro-batch's gradient if there is) of each parameter
        that Adam has begun to move, steps so far); one for all groups of these settings."""
        found, steps, parts = {}, {}, iter(small or repeat(None))
        for kind, group in zip(self.kinds, self.optimizer.param_groups, strict=True):
            key = tuple(map(float, (*group["betas"], group["eps"]))) if kind == "adam" else ()
            for p in group["params"]:
                state, part = self.optimizer.state.get(p), next(parts)
                if kind != "adam" or p.grad is None or not state or (small is not None and part is None):
                    continue
                if (both := moments(state)) is not None:
                    tensors = [_flat(x) for x in (p.grad, *both)]
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
        if begin and small is None and "formula" in self.kinds:
            begin = False
            if not self.told:
                name = type(self.optimizer).__name__
                log.warning("fot: %s is measured where a batch comes in micro-batches alone: not here", name)
            self.told = True
        # From the part that was kept to the micro-batch's own gradient: DDP multiplies each rank's by their number.
        scale = 1.0 if share is None else 1 / (share * self.ranks)
        parts = []
        for (beta1, beta2, eps), held, step in self._groups(small):
            # 1 / P = sqrt(v / bias) + eps = s (sqrt(v) + eps / s): s goes to the sums instead of to each element.
            beta2 = max(beta2, 1e-12)  # it is divided by
            s, new_s = (1 - beta2**step).rsqrt(), math.sqrt(beta2) * (1 - beta2 ** (step + 1)).rsqrt()
            new = (1 / beta2 - 1) * (1.0 if share is None else scale**2 * share)
            found = _dots_of(self.sums.device)(held, eps / s, eps / new_s, new, begin)
            gm, *more = found.unbind()
            if begin:
                gg, oo, opo, mpmp, xpg = more
                opo = opo * scale**2 / (s if share is None else new_s)
                more = [gg, oo * scale**2, opo, mpmp / s**2, xpg * scale / new_s]
            parts.append((beta1, step, gm / s, *more))
        clip = torch.ones_like(self.sums[0]) if clipped_by is None else clipped_by.to(self.sums)
        along = self._by_formula(begin, share, small, scale, clip)
        if not parts and along is None:
            return
        found = getattr(self.optimizer, "found_inf", None)
        skipped = torch.zeros_like(self.sums[0]) if found is None else found.to(self.sums)
        # A shard's sums are its part of the whole, a replica's are the whole: weighted so, both add up to it.
        weight = torch.full_like(self.pending, 1.0 if self.sharded else 1 / self.ranks)
        weight[0] = 1 / self.ranks
        after = sum((gm / (1 - beta1**step) for beta1, step, gm, *_ in parts), 0 if along is None else along[0])
        after = clip * after * weight[1]
        if lr > 0:
            n, g2, noise, slope, step2, batch2 = self.pending.unbind()
            weighted = [lr**2 * n, lr**2 * slope, lr**2 * after, lr * (slope - after)]
            ended = torch.stack([n, g2, noise, step2, batch2, *weighted])
            good = torch.isfinite(ended).all() & (n > 0) & (skipped == 0)
            self.sums += torch.where(good, ended, 0.0)
        self.pending.zero_()
        if not begin:
            return
        total = torch.zeros_like(self.pending[1:])
        if along is not None:
            _, gg, oo, slope, step2 = along
            noise = (oo - gg * clip**2) / (1 / share - 1)
            total += torch.stack([gg * clip**2 - noise, noise, slope, step2, gg * clip**2])
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

    def _by_formula(self, begin: bool, share, small, scale: float, clip: Tensor) -> Tensor | None:
        """Sums over SGD's and Muon's parameters: [g'u] of the sample that ends, and where one begins |g|^2, |g_r|^2,
        g_s'u(g_r) and |u|^2. None where there are none."""
        found, parts = [], iter(small or repeat(None))
        for kind, group in zip(self.kinds, self.optimizer.param_groups, strict=True):
            for p in group["params"]:
                part = next(parts)
                if kind != "formula":
                    continue
                last = self.optimizer.state[p].pop(LAST, None)
                if p.grad is None or (begin and part is None):
                    continue
                g = _flat(p.grad)
                row = [torch.zeros_like(g[0]) if last is None else torch.dot(g, _flat(last))]
                if begin:
                    state, o = self.optimizer.state[p], part.float() * scale
                    clipped = (o / clip.float()).view_as(p)  # as the optimizer would see it
                    u, of_part = (_flat(direction(group, state, p, x)) for x in (p.grad, clipped))
                    rest = (g * clip.float() - share * o) / (1 - share)
                    row += [torch.dot(g, g), torch.dot(o, o), torch.dot(rest, of_part), torch.dot(u, u)]
                    state[LAST] = u.view_as(p).bfloat16()
                found.append(torch.stack(row))
        return torch.stack(found).sum(0, dtype=torch.float64) if found else None

    @staticmethod
    def means(sums: list[float]) -> dict[str, float] | None:
        """Means of the samples by name, from `sums`, summed over ranks, on the host; None without a sample. Those of
        slope, after and drop are still multiplied by lr2's: `unweighted` divides them."""
        n = sums[0]
        return {k: v / n for k, v in zip(STATISTICS[1:], sums[1:], strict=True)} | {"samples": n} if n > 0 else None

    @staticmethod
    def unweighted(means: dict[str, float]) -> dict[str, float]:
        """``means``, or averages of such, with slope and after as they are and "curvature" in drop's place."""
        by = {k: means[k] / means["lr2"] for k in ("slope", "after", "drop")}
        return means | {"slope": by["slope"], "after": by["after"], "curvature": by["drop"]}


def _dots_of(device: torch.device):
    """``_dots``, or its twin of one kernel on CUDA where there is Triton."""
    if device.type == "cuda" and find_spec("triton"):
        from .triton_stats import dots

        return dots
    return _dots


def _dots(held: list[list[Tensor]], eps: Tensor, new_eps: Tensor, new: float, begin: bool) -> Tensor:
    """Over all parameters' (g, m, v, and o of the micro-batch if there is), fp64: g'P m, and with ``begin`` also |g|^2,
    |x|^2, x'P x, |P m|^2 and o'P' g.

    P = 1 / (sqrt(v) + eps) and P' = 1 / (sqrt(v + new o^2) + new_eps), nearly the step's own; x'P x is of P' for the
    micro-batch. Without one o is g, and x is m."""
    dots = []
    for g, m, v, *micro in _chunks(held, CHUNK[held[0][0].device.type]):
        mp = v.sqrt().add_(eps)
        torch.div(m, mp, out=mp)  # independent of g
        dots.append([torch.dot(mp, g)])
        if begin:
            o = micro[0].float() if micro else g
            op = torch.addcmul(v, o, o, value=new).sqrt_().add_(new_eps)
            torch.div(o, op, out=op)
            other = o if micro else m
            dots[-1] += [torch.dot(g, g), torch.dot(other, other)]
            dots[-1] += [torch.dot(op if micro else mp, other), torch.dot(mp, mp), torch.dot(op, g)]
    return torch.stack([torch.stack(d) for d in dots]).sum(0, dtype=torch.float64)


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
