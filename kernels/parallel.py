"""linear_score with the vocabulary split over ranks, for heads that outgrow one device.

Every rank holds all hidden states and its own rows of the weight. It reduces its part of each row of logits to moments,
and after one all-reduce of these it knows those of the whole row, and the gradient of its own logits. Let q_k be the
softmax over rank k's entries without the target, and share_k = exp(lse_k - logsumexp_k lse_k) its part of the
off-target mass. Then

    p_j = r1 share_k q_j            r_m = r1^m sum_k share_k^m sum_j q_j^m
    d = logsumexp_k lse_k - z_y     r1 = sigmoid(d), log_p = logsigmoid(-d)

and nothing cancels that does not in one process.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .head_pass import HeadPass, scaled
from .impl import REDUCTIONS
from .moments import Coefficients, Moments, Partials, Stats, gradient_coefficients, mask_stats, order_of
from .softmax import GradientKnown


def parallel_linear_score(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    score,
    *,
    group: dist.ProcessGroup | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    scale: float = 1.0,
    softcap: float | None = None,
    fisher: bool = False,
    chunk: int | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Moments]:
    """``linear_score`` for a weight [V / ranks, D] that holds this rank's rows of the head, in rank order.

    hidden [N, D] and targets [N], in terms of the whole vocabulary, are the same on all ranks of ``group``; parts may
    differ in size. ``scale`` and ``softcap`` as in ``linear_score``. The loss and the Moments (without tail_log_p) come
    out the same on every rank. d_weight is that of this rank's rows. d_hidden is complete on every rank: do not reduce
    it again. The gradient is computed in the forward; reduction "mean" or "sum". Raises ValueError for other
    reductions, and as ``linear_score`` does."""
    if reduction not in REDUCTIONS[:2]:
        raise ValueError(f"reduction={reduction!r}: expected 'mean' or 'sum' where the vocabulary is split over ranks")
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    sizes = torch.zeros(ranks, dtype=torch.long, device=weight.device)
    sizes[rank] = len(weight)
    dist.all_reduce(sizes, group=group)
    first, vocab = int(sizes[:rank].sum()), int(sizes.sum())
    valid = targets != ignore_index
    wrong = targets[valid & ((targets < 0) | (targets >= vocab))]
    if len(wrong):
        raise ValueError(f"target {wrong[0].item()} is outside [0, {vocab}), the vocabulary of all ranks together")
    how = dict(ignore_index=ignore_index, order=order_of(score), scale=scale, softcap=softcap, chunk=chunk, impl=impl)
    wants = tuple(torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight)) + (False,)
    head = _PartPass(hidden, weight, targets, first, group, trained=wants[1], **how)
    total, moments, grads, count = head.reduced(score, reduction, None, fisher, wants)
    if grads[0] is not None:
        dist.all_reduce(grads[0], group=group)
    if any(wants):
        how = dict(dtypes=head.grad_dtypes, rescale=getattr(head.module, "rescale", None))  # not head, with its buffers
        total = GradientKnown.apply(total, lambda up: scaled(grads, up, count, **how), True, hidden, weight, None)
    return total, moments


class _PartPass(HeadPass):
    """A pass over one rank's rows, of which the first is row ``first`` of the head.

    Its logits have one column more, of -inf, which stands in for the target: the kernels reduce the entries beside it.
    """

    def __init__(self, hidden, weight, targets, first: int, group, *, ignore_index: int, **how):
        local = torch.where(targets == ignore_index, ignore_index, len(weight))
        super().__init__(hidden, weight, local, ignore_index=ignore_index, vocab=len(weight) + 1, skip=False, **how)
        self.global_targets = torch.where(targets == ignore_index, -1, targets.long())
        self.first, self.group = first, group
        self.mask, self.can_fuse, self.can_keep_w = self.valid, False, False

    def logits(self, rows: slice) -> Tensor:
        """[n, V_k + 1], -inf in the last column and at the target where it is this rank's; fills self.mine
        (which rows have it), self.at (where) and self.z_y."""
        logits = self.rows_of_buffer(rows)
        torch.mm(self.h[rows], self.weight.t(), out=logits[:, :-1])
        logits[:, -1] = -torch.inf
        at = self.global_targets[rows] - self.first
        self.mine = (at >= 0) & (at < self.vocab - 1)
        self.at = torch.where(self.mine, at, self.vocab - 1)[:, None]
        self.given_z_y = logits.gather(1, self.at)[:, 0].to(self.stats.dtype)  # -inf where it is another rank's
        self.z_y = self.link.apply_(self.given_z_y.clone())
        logits.scatter_(1, self.at, -torch.inf)
        return logits

    def forward(self, logits: Tensor, rows: slice, keep_w: bool = False) -> None:
        """Fills the chunk's stats with those of the whole rows, and self.share: this rank's of the off-target mass."""
        local = torch.empty_like(self.stats[:, rows])
        ignored = torch.empty_like(self.correct[rows])
        last = torch.full_like(self.targets[rows], self.vocab - 1)
        self.module.forward(logits, last, local, ignored, 0.0, order=self.order, link=self.link)
        self.local = s = Stats(*local)
        zero = torch.zeros_like(s.r1)
        none = s.support == 0  # no entry here: the kernels' numbers for such a row are those of a sure target
        sums = dict(w2=s.r2, w3=s.r3, w4=s.r4, entropy=s.entropy, log_sum=s.mean_log_p * s.support, support=s.support)
        if self.order is not None:
            sums["s"] = s.s
        # What this rank contributes for each token, all of its own entries without the target.
        sent = {name: torch.where(none, zero, x) for name, x in sums.items()} | dict(
            lse=torch.where(none, -torch.inf, s.row_max + s.row_sum.log()),
            top=torch.where(none, -torch.inf, s.row_max),
            z_y=torch.where(self.mine, self.z_y, -torch.inf),
            before=logits.argmax(-1) + self.first < self.global_targets[rows],  # in a tie the first wins
        )
        parts = self.from_all_ranks(sent)
        z_y = parts["z_y"].amax(0)
        lse = parts["lse"].logsumexp(0)
        alone = lse == -torch.inf
        share = torch.where(parts["lse"] == -torch.inf, 0.0, (parts["lse"] - lse).exp())
        d = torch.where(alone, -torch.inf, lse - z_y)
        r1, p_y, log_p, log_r1 = torch.sigmoid(d), torch.sigmoid(-d), F.logsigmoid(-d), F.logsigmoid(d)
        orders = dict(w2=2, w3=3, w4=4)
        if self.order is not None:
            orders |= dict(w3=self.order + 1, w4=2 * self.order, s=self.order)
        powers = {name: r1**k * (share**k * parts[name]).sum(0) for name, k in orders.items()}
        y_live = z_y != -torch.inf
        support = parts["support"].sum(0) + y_live
        # log p_j = log q_j + log share_k + log r1; a rank without mass has share 0 and no such entry.
        log_share = torch.where(share > 0, share.log(), 0.0)
        off = torch.where(alone, 0.0, log_r1)
        entropy = (share * (parts["entropy"] - log_share)).sum(0)
        sums = (parts["log_sum"] + parts["support"] * (log_share + off)).sum(0) + torch.where(y_live, log_p, 0.0)
        confidence = torch.where(parts["lse"] == -torch.inf, 0.0, (parts["top"] - lse).exp()).amax(0)
        values = dict(log_p=log_p, r1=r1, p_y=p_y, support=support, lse=torch.logaddexp(lse, z_y))
        values |= dict(r2=powers["w2"], r3=powers["w3"], r4=powers["w4"], s=powers.get("s", zero))
        values |= dict(mean_log_p=sums / support, confidence=torch.maximum(p_y, r1 * confidence))
        values |= dict(entropy=r1 * (entropy - off) - p_y * torch.where(y_live, log_p, 0.0))
        self.stats[:, rows] = torch.stack(Stats(*(zero,) * len(Stats._fields))._replace(**values))
        best = parts["top"].amax(0)
        tied = (parts["top"] == best) & (best == z_y) & (parts["before"] > 0)
        self.correct[rows] = alone | (z_y > best) | ((z_y == best) & ~tied.any(0))
        self.share = share[dist.get_rank(self.group)]
        mask_stats(self.stats[:, rows], self.correct[rows], self.mask[rows])

    def from_all_ranks(self, mine: dict[str, Tensor]) -> dict[str, Tensor]:
        """{name: [ranks, n]} from this rank's {name: [n]}, by one all-reduce."""
        sent = torch.stack([x.to(self.stats.dtype) for x in mine.values()])
        everyone = sent.new_zeros(dist.get_world_size(self.group), *sent.shape)
        everyone[dist.get_rank(self.group)] = sent
        # A sum in which all other parts are 0; -inf + 0 is -inf.
        dist.all_reduce(everyone, group=self.group)
        return dict(zip(mine, everyone.unbind(1), strict=True))

    def gradient(self, logits: Tensor, rows: slice, partials: Partials, kept_w: bool = False) -> None:
        """Over the logits: p_j (a + c p_j) + b off target, the target's own entry where it is this rank's."""
        stats = self.stats_of(rows)
        a, c, b, _, h, target = gradient_coefficients(stats, partials, self.order, self.link)
        if self.link.softcap:
            target = torch.where(
                self.mine & (self.given_z_y > -torch.inf), target * self.link.slope(self.given_z_y), 0.0
            )
        mass = stats.r1 * self.share  # p_j = mass * q_j
        if h is not None:
            a, h = a + h * torch.where(mass > 0, mass.log(), 0.0), h * mass
        c = None if c is None else c * mass ** (2 if self.order is None else self.order)
        part = Coefficients(a * mass, c, b, None, h, torch.zeros_like(a))
        last, mask = torch.full_like(self.targets[rows], self.vocab - 1), self.mask[rows]
        how = dict(order=self.order, link=self.link)
        self.module.gradient(logits, last, mask, self.local, part, 0.0, logits, **how)
        logits.masked_fill_((self.local.support == 0)[:, None], 0.0)
        logits.scatter_(1, self.at, torch.where(mask, target, 0.0)[:, None].to(logits.dtype))

    def accumulate(self, logits: Tensor, rows: slice, grads) -> None:
        super().accumulate(logits[:, :-1], rows, grads)
