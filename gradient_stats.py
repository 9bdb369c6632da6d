"""What the gradients of a run say of its learning rate, at next to no cost: signal, noise, slope and curvature.

Let g be the batch's gradient, G its expectation and N = tr(Sigma) / B the expected |g - G|^2 of a batch of B. Adam
moves the weights by -lr u, u = P m, with m and v the bias-corrected moments and P = 1 / (sqrt(v) + eps). Measured are

    |G|^2 and N     from the norms of one micro-batch, a share r of the batch, and of the batch: in expectation
                    |g_r|^2 = |G|^2 + N / r and |g|^2 = |G|^2 + N (McCandlish et al., 2018, "An Empirical Model of
                    Large-Batch Training", appendix A.1)
    slope  G'u      along a step, before it: u = P (a m_old + c g), so a g'P m_old + c g'P g in expectation, but g'P g
                    meets the noise of g twice: there g_r'P g_s stands, g_s the rest of the batch. P is the last step's
                    for the first product. For the second, r g_r^2 stands for g^2 in the new v: with the old v rare
                    gradients, an embedding's row, would count far too much, and with g^2 itself P is correlated
                    with the product of the noises of g_r and g_s.
    after  G'u      along the same step, after it: the next batch's g'u, as that batch is new to u
    curvature u'Hu  (slope - after) / lr: what the step took off its slope

Without micro-batches N comes from Adam's mean: |m|^2 = |G|^2 + kappa N, kappa the sum of the squared weights of the
gradients in m; likewise G'P G. That calls noise what changes from step to step, so where steps overshoot the slope
comes out too low, below 0 rather than above what it is.

All are linear in sums over the parameters, so samples, ranks and shards are averaged before anything is divided. The
sums stay on the device. A sample takes one pass over gradients and moments at one step and half of one at the next.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

FIELDS = ("samples", "g2", "noise", "slope", "after", "curvature", "step2", "batch2")
CHUNK = 1 << 26  # parameters whose temporaries are held at a time


class GradientStats:
    """Samples of an Adam's gradients. ``ranks``: data-parallel ranks, whose `sums` add up to what `means` takes."""

    def __init__(self, optimizer: torch.optim.Optimizer, ranks: int = 1):
        self.optimizer, self.ranks = optimizer, ranks
        device = next(p.device for group in optimizer.param_groups for p in group["params"])
        self.sums = torch.zeros(len(FIELDS), dtype=torch.float64, device=device)
        self.pending = torch.zeros(6, dtype=torch.float64, device=device)  # a sample that waits for its next step
        self.sharded = any(hasattr(p, "to_local") for group in optimizer.param_groups for p in group["params"])
        self.small: tuple[float, list[Tensor | None]] | None = None  # share and gradients of a micro-batch

    def _groups(
        self, small: list[Tensor | None] | None
    ) -> Iterator[tuple[dict, list[tuple[list[Tensor], ...]], Tensor]]:
        """(group, chunks of (gradients, mean, square, the micro-batch's gradients if there are), steps so far) of the
        groups that Adam has begun to move."""
        place = 0
        for group in self.optimizer.param_groups:
            held, step = [], None
            for p in group["params"]:
                state, part = self.optimizer.state.get(p), small and small[place]
                place += 1
                if p.grad is not None and state and "exp_avg_sq" in state and (small is None or part is not None):
                    held.append([_flat(x) for x in (p.grad, state["exp_avg"], state["exp_avg_sq"])])
                    held[-1] += [] if small is None else [part.float()]
                    step = torch.as_tensor(state["step"])
            if not held:
                continue
            chunks, size = [[]], 0
            for tensors in held:
                if size and size + tensors[0].numel() > CHUNK:
                    chunks.append([])
                    size = 0
                size += tensors[0].numel()
                chunks[-1].append(tensors)
            lists = [tuple(list(x) for x in zip(*chunk, strict=True)) for chunk in chunks]
            yield group, lists, step.to(self.sums.device, torch.float64, non_blocking=True)

    @torch.no_grad()
    def micro(self, share: float) -> None:
        """After the first micro-batch's backward, before the second's. ``share``: its part of the tokens that the batch
        has on all ranks. ``.grad`` must hold that micro-batch's part of the batch's gradient (DDP: under no_sync)."""
        if not 0 < share < 1:
            return
        # Of the micro-batch itself: DDP multiplies each rank's part by their number. In bfloat16 until the step, for
        # the memory: its rounding is 2^-9 of an element and has no sign.
        self.small = (
            share,
            [
                None if p.grad is None else (_flat(p.grad) / (share * self.ranks)).bfloat16()
                for group in self.optimizer.param_groups
                for p in group["params"]
            ],
        )

    @torch.no_grad()
    def sample(self, begin: bool, lr: float, clipped_by: Tensor | None = None) -> None:
        """Before an optimizer step: ends the sample that the last step has begun, if any, and begins one if asked.

        ``lr``: of the last step. ``clipped_by``: what clipping has divided the gradient by, 1 or more; all
        measurements are of the unclipped gradient. A sample with a value that is not finite, or that the optimizer
        will skip (``found_inf``), is left out.
        """
        (share, small), self.small = self.small or (None, None), None
        parts = []
        for group, chunks, step in self._groups(small if begin else None):
            beta2, dots = float(group["betas"][1]), []
            for g, m, v, *micro in chunks:
                before = _root(v, beta2, step, float(group["eps"]))  # independent of g
                dots.append([_dot(g, g), _dot(torch._foreach_div(g, before), m)])
                if not begin:
                    continue
                mp = torch._foreach_div(m, before)
                v = torch._foreach_mul(v, beta2)
                new = (1 - beta2) * (share if micro else 1.0)
                torch._foreach_addcmul_(v, *((micro[0], micro[0]) if micro else (g, g)), value=new)
                root = _root(v, beta2, step + 1, float(group["eps"]))  # nearly the step's own; see the top
                other = micro[0] if micro else m
                op = torch._foreach_div(micro[0], root) if micro else mp
                dots[-1] += [_dot(other, other), _dot(op, other), _dot(mp, mp)]
                dots[-1].append(_dot(op, g) if micro else _dot(torch._foreach_div(g, root), g))
            parts.append((float(group["betas"][0]), step, *(sum(d) for d in zip(*dots, strict=True))))
        if not parts:
            return
        found = getattr(self.optimizer, "found_inf", None)
        skipped = torch.zeros_like(self.sums[0]) if found is None else found.to(self.sums)
        # A shard's sums are its part of the whole, a replica's are the whole: weighted so, both add up to it.
        weight = torch.full_like(self.pending, 1.0 if self.sharded else 1 / self.ranks)
        weight[0] = 1 / self.ranks
        clip = torch.ones_like(skipped) if clipped_by is None else clipped_by.to(skipped)
        after = clip * sum(gm / (1 - beta1**step) for beta1, step, _, gm, *_ in parts) * weight[1]
        if lr > 0:
            n, g2, noise, slope, step2, batch2 = self.pending.unbind()
            ended = torch.stack([n, g2, noise, slope, after, (slope - after) / lr, step2, batch2])
            good = torch.isfinite(ended).all() & (n > 0) & (skipped == 0)
            self.sums += torch.where(good, ended, 0.0)
        self.pending.zero_()
        if not begin:
            return
        total = torch.zeros_like(self.pending[1:])
        for (
            beta1,
            step,
            gg,
            gm,
            oo,
            opo,
            mpmp,
            xpg,
        ) in parts:  # o: the micro-batch's gradient, else Adam's mean; x: o or g
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
        return {k: v / n for k, v in zip(FIELDS[1:], sums[1:], strict=True)} | {"samples": n} if n > 0 else None


def _flat(x: Tensor) -> Tensor:
    x = x.to_local() if hasattr(x, "to_local") else x
    return x.detach().reshape(-1).float()


def _root(v: list[Tensor], beta2: float, step: Tensor, eps: float) -> list[Tensor]:
    """sqrt(v / bias correction) + eps: one over P."""
    root = torch._foreach_sqrt(v)
    torch._foreach_mul_(root, (1 - beta2**step).rsqrt().float())
    torch._foreach_add_(root, eps)
    return root


def _dot(a: list[Tensor], b: list[Tensor]) -> Tensor:
    return torch.stack([torch.dot(x, y) for x, y in zip(a, b, strict=True)]).sum(dtype=torch.float64)


def keeps_moments(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer's moments can be read: torch's Adam and AdamW, not a quantised or factored one."""
    return isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW)
