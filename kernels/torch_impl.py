"""The moments and the row gradient in plain PyTorch: the CPU path, and the specification of the others.

Without the target's logit, softmax gives w_j = p_j / r1. Everything follows from it without cancellation:

    d = logsumexp_{j != y}(z) - z_y     r1 = sigmoid(d), p_y = sigmoid(-d), log_p = logsigmoid(-d)
    r_k = r1^k sum_j w_j^k

The rows go through in groups whose scratch stays in one core's cache. On CPU a group is one thread's work from end to
end: threads that shared each pass would mostly wait for each other.
"""

import functools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import Tensor

from .moments import PLAIN, Stats

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CAN_KEEP_W = True

# Elements a group: three fp32 buffers of 0.5 MB fit the 2 MB of level-2 cache of a server core. Several threads take
# twice as much, for Python's lock. On CUDA a group only has to be large enough to hide the launches.
CPU_ELEMENTS = 2**17
CUDA_ELEMENTS = 2**26

# w below this adds nothing to the sums of powers, but its powers would be denormal, and a CPU some 20 times slower.
_W_FLOOR = 1e-9
# exp of less would be denormal once squared; it adds nothing to a sum whose largest term is 1.
_LOG_POWER_FLOOR = -40.0
_LOG_FLOOR = -100.0  # log p_j of p_j = 0, finite: it is multiplied by p_j
# A row whose factors are below this has a gradient far under any rounding; left alone, it is denormal.
_FACTOR_FLOOR = 1e-28
# Where |log sum exp z| is beyond this, sum w z loses digits, and the row is done again.
_LSE_MAX = 256.0


def forward(
    logits, targets, stats, correct, tail, *, order=None, link=PLAIN, predicted=None, keep_w=False, rows_again=None
) -> None:
    """Fills ``stats`` [17, N] (the rows of moments.Stats), ``correct`` and, unless None, ``predicted`` [N] from logits
    [N, V], of which ``link`` makes those of the softmax.

    ``keep_w`` leaves w in the logits' storage, 0 at the target, for ``gradient`` to go on from. It takes logits in the
    dtype of stats; ``rows_again(index)`` must then give back the logits of the few rows that need more care."""
    vocab = logits.shape[1]
    y = targets[:, None]
    z_y = link.apply_(logits.detach().gather(1, y).to(stats.dtype))[:, 0]
    raw = torch.empty(13 if tail else 10, len(logits), dtype=stats.dtype, device=logits.device)
    low = torch.finfo(stats.dtype).min
    size = _group_size(logits)
    ids = [None] * len(logits.split(size)) if predicted is None else predicted.split(size)

    def work(buffers, z, y_, z_y_, rows, ids_):
        w, q, *copy = buffers if len(z) == size else [b[: len(z)] for b in buffers]
        z_top, w_top, z_sum, wz, w2, w3, w4, q1, q2, qw, *tails = rows.unbind(0)
        if not keep_w:
            z = copy[0].copy_(z)
        link.apply_(z)
        # Finite rather than -inf, so that a row with no other entry is not 0/0.
        z.scatter_(1, y_, low)
        if ids_ is not None:
            torch.argmax(z, -1, out=ids_)
        torch.amax(z, -1, out=z_top)
        torch.softmax(z, -1, out=w)
        torch.amax(w, -1, out=w_top)
        w.scatter_(1, y_, 0.0)
        if order is not None:  # (w / w_top)^order, before z is 0 at the target
            torch.sub(z, z_top[:, None], out=q).mul_(order).clamp_min_(_LOG_POWER_FLOOR).exp_().scatter_(1, y_, 0.0)
            torch.sum(q, -1, out=q1)
            torch.linalg.vector_norm(q, dim=-1, out=q2)
            torch.sum(q.mul_(w), -1, out=qw)
        z.scatter_(1, y_, 0.0)
        torch.sum(z, -1, out=z_sum)
        torch.sum(torch.mul(w, z, out=q), -1, out=wz)
        if tail:
            _tail_sums(z, w, y_, z_y_, z_top, w_top, tail, tails)
        if keep_w:
            z.copy_(w)
        w.clamp_min_(_W_FLOOR)
        torch.sum(torch.mul(w, w, out=q), -1, out=w2)
        if order is None:
            torch.linalg.vector_norm(q, dim=-1, out=w4)
            torch.sum(q.mul_(w), -1, out=w3)

    groups = zip(logits.detach().split(size), y.split(size), z_y.split(size), raw.split(size, 1), ids, strict=True)
    _for_each_group(work, list(groups), size, logits, stats.dtype, 2 if keep_w else 3)
    z_top, w_top, z_sum, wz, w2, w3, w4, q1, q2, qw, *tails = raw.unbind(0)
    tail_log_p, tail_count, tail_off = tails or [torch.zeros_like(z_y)] * 3
    log_w_top = w_top.log()
    d = (z_top - z_y) - log_w_top
    r1, p_y = torch.sigmoid(d), torch.sigmoid(-d)
    log_r1, log_p = F.logsigmoid(d), F.logsigmoid(-d)
    total = z_sum + z_y
    r1_squared = r1 * r1
    values = dict(log_p=log_p, r1=r1, p_y=p_y, row_max=z_top, row_sum=1 / w_top, support=torch.full_like(r1, vocab))
    if order is None:
        values |= dict(s=r1, r3=r1_squared * r1 * w3, r4=(r1_squared * w4).square_())
    else:
        top = (order * (log_r1 + log_w_top)).exp()  # of the largest p_j off target
        values |= dict(s=top * q1, r3=top * r1 * qw, r4=(top * q2).square_())
    # Where p_y = 0, log_p is -inf and the target adds nothing.
    lse = torch.where(p_y > 0, z_y - log_p, z_top - log_w_top)
    values |= dict(r2=r1_squared * w2, lse=lse, mean_log_p=total / vocab - lse)
    values |= dict(confidence=torch.maximum(p_y, r1 * w_top))
    values |= dict(entropy=r1 * (z_top - log_w_top - wz - log_r1) - p_y * log_p)
    values |= dict(tail_log_p=tail_log_p, tail_count=tail_count, tail_off=tail_off)
    torch.stack(Stats(**values), out=stats)
    torch.gt(z_y, z_top, out=correct)
    if predicted is not None:
        torch.where(correct, targets, predicted, out=predicted)
    # Again: ties, -inf among the logits (total * 0 is NaN), large offsets; on CUDA every row, as finding the few would
    # wait for the device.
    plain = ((total * 0 + lse).abs() < _LSE_MAX) & (z_y != z_top)
    if logits.is_cuda or not bool(plain.all()):
        index = torch.arange(len(plain), device=plain.device) if logits.is_cuda else (~plain).nonzero()[:, 0]
        for i in index.split(size):
            z = link.apply_((rows_again(i) if keep_w else logits[i]).to(stats.dtype))
            top = _careful(z, targets[i], i, Stats(*stats.unbind(0)), correct)
            if predicted is not None:
                predicted[i] = top


def _tail_sums(z, w, y, z_y, z_top, w_top, tail, out) -> None:
    """Into the three vectors of ``out``: tail_log_p, the number of entries in the tail, and that without the target."""
    log_w_top = w_top.log()
    d = (z_top - z_y) - log_w_top
    live = z > -torch.inf
    support = live.sum(-1)
    inside = (w * torch.sigmoid(d)[:, None] < (tail / support)[:, None]) & live
    mask = inside.scatter_(1, y, False)
    tail_off, target_in = mask.sum(-1), torch.sigmoid(-d) < tail / support
    # log p_j = (z_j - z_top) + (z_top - lse), and z_top - lse = log w_top + log r1.
    sums = torch.where(mask, z - z_top[:, None], 0.0).sum(-1) + tail_off * (log_w_top + F.logsigmoid(d))
    sums = sums + torch.where(target_in, F.logsigmoid(-d), 0.0)
    for row, value in zip(out, (sums / support, tail_off + target_in, tail_off), strict=True):
        row.copy_(value)


def _careful(z, targets, index, stats: Stats, correct: Tensor) -> Tensor:
    """The rows ``index`` again: -inf left out, sums relative to the row's maximum, ties by first index. Returns the
    places of their maxima."""
    live = z > -torch.inf
    support = live.sum(-1).to(z.dtype)
    # log p_j = (z_j - max z) + log max p
    log_p = z - z.amax(-1, keepdim=True) + stats.confidence[index].log()[:, None]
    p, log_p = log_p.exp(), torch.where(live | log_p.isnan(), log_p, 0.0)
    stats.entropy[index] = -(p * log_p).sum(-1)
    stats.mean_log_p[index] = log_p.sum(-1) / support
    stats.support[index] = support
    top = z.argmax(-1)
    correct[index] = top == targets
    return top


def gradient(
    logits, targets, mask, stats: Stats, coefficients, tail, out, *, order=None, link=PLAIN, kept_w=False
) -> None:
    """Writes the gradient of the rows to ``out`` [N, V], which may be the logits themselves; 0 where ``mask`` is False.
    ``kept_w``: the logits' storage holds w, as ``forward(keep_w=True)`` left it, and ``out`` is the logits."""
    dtype, vocab = stats.r1.dtype, logits.shape[1]
    a, c, b, t, h, target = coefficients
    y = targets[:, None]
    if link.softcap:
        z_y = logits.gather(1, y)[:, 0].to(dtype)
        target = torch.where(z_y == -torch.inf, 0.0, target * link.slope(z_y))
    if kept_w:  # p = r1 w
        if h is not None:
            a, h = a + h * stats.r1.clamp_min(torch.finfo(dtype).tiny).log(), h * stats.r1
        a, c = a * stats.r1, None if c is None else c * stats.r1.pow(2 if order is None else order)
    a, c = (None if x is None else F.hardshrink(x, _FACTOR_FLOOR) for x in (a, c))
    a, c, b, t, h, target = (None if x is None else x[:, None] for x in (a, c, b, t, h, target))
    # -inf takes no part in b; asking costs a wait on CUDA, so there every row is looked at.
    ragged = t is not None or (b is not None and (logits.is_cuda or bool((stats.support != vocab).any())))
    size = _group_size(logits)
    wide = out.dtype != dtype or link != PLAIN

    def work(buffers, start, z, g):
        rows = slice(start, start + len(z))
        buffers = iter(buffers if len(z) == size else [x[: len(z)] for x in buffers])
        p = z if kept_w else next(buffers)
        result = next(buffers) if wide else g
        factor = next(buffers) if kept_w else result
        live = z > -torch.inf if ragged else None
        slope = link.slope(z.to(dtype)) if link.softcap else None
        if not kept_w:
            torch.softmax(link.apply_(result.copy_(z)) if wide else z, -1, out=p)
        if t is not None:
            p_j = p * stats.r1[rows, None] if kept_w else p
            in_tail = (p_j < (tail / stats.support[rows])[:, None]) & live
        # a + c p^(order - 1) + h log p, in passes of their own: with two broadcast operands none is vectorised.
        if h is not None:
            log_p = torch.log(p, out=next(buffers)).clamp_min_(_LOG_FLOOR)
            torch.mul(log_p, h[rows], out=factor).add_(a[rows])
            if c is not None:
                powers = log_p.copy_(p) if order is None else log_p.mul_(order - 1).exp_()
                factor.add_(powers.mul_(c[rows]))
        elif c is not None and order is not None:
            torch.log(p, out=factor).mul_(order - 1).exp_().mul_(c[rows]).add_(a[rows])
        elif c is not None:
            torch.mul(p, c[rows], out=factor).add_(a[rows])
        torch.mul(p, a[rows] if c is None and h is None else factor, out=result)
        if b is not None:
            result.add_(b[rows] if live is None else torch.where(live, b[rows], 0.0))
        if t is not None:
            result.add_(torch.where(in_tail, t[rows], 0.0))
        if slope is not None:
            result.mul_(slope)
        if wide:
            g.copy_(result)

    groups = list(zip(range(0, len(out), size), logits.split(size), out.split(size), strict=False))
    _for_each_group(work, groups, size, logits, dtype, 1 + wide + (h is not None))
    out.scatter_(1, y, target.to(out.dtype))
    # An ignored row and its coefficients may hold anything: no product makes it 0.
    if mask is not None and logits.is_cuda:
        out.masked_fill_(~mask[:, None], 0.0)
    elif mask is not None:
        out[~mask] = 0.0


def _group_size(logits: Tensor) -> int:
    """Rows a group."""
    n, vocab = logits.shape
    elements = CPU_ELEMENTS if torch.get_num_threads() == 1 else 2 * CPU_ELEMENTS
    return max(1, min((CUDA_ELEMENTS if logits.is_cuda else elements) // vocab, n))


def _for_each_group(work: Callable, groups: list[tuple], size: int, like: Tensor, dtype: torch.dtype, count: int):
    """work(buffers, *group) for each group, with ``count`` buffers [size, V] of scratch. On CPU as many groups at a
    time as torch has threads, each in a thread that works alone."""
    waiting = iter(groups)  # shared: Python's lock makes next() atomic

    def run():
        buffers = [torch.empty(size, like.shape[1], dtype=dtype, device=like.device) for _ in range(count)]
        with torch.no_grad():  # a thread does not inherit it
            for group in waiting:
                work(buffers, *group)

    threads = 1 if like.is_cuda else min(torch.get_num_threads(), len(groups))
    if threads == 1:
        return run()
    pool = _pool(torch.get_num_threads())
    for future in [pool.submit(run) for _ in range(threads)]:
        future.result()


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads whose own torch operations use one thread each."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix="kernels")
    together = threading.Barrier(threads)

    def start():
        # Holds for this thread, and for threads that start before the caller sets it back.
        torch.set_num_threads(1)
        together.wait()

    for future in [pool.submit(start) for _ in range(threads)]:
        future.result()
    torch.set_num_threads(threads)
    if hasattr(os, "register_at_fork"):  # where there are forks
        os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has no such threads
    return pool
