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

from .moments import Coefficients, Stats

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CAN_KEEP_W = True

# Elements a group: three fp32 buffers of 0.5 MB fit the 2 MB of level-2 cache of a server core. Several threads take
# twice as much, for Python's lock. On CUDA a group only has to be large enough to hide the launches.
CPU_ELEMENTS = 2**17
CUDA_ELEMENTS = 2**26

# w below this adds nothing to the sums of powers, but its powers would be denormal, and a CPU some 20 times slower.
_W_FLOOR = 1e-9
# A row whose factors are below this has a gradient far under any rounding; left alone, it is denormal.
_FACTOR_FLOOR = 1e-28
# Where |log sum exp z| is beyond this, sum w z loses digits, and the row is done again.
_LSE_MAX = 256.0


def forward(
    logits: Tensor, targets: Tensor, stats: Tensor, correct: Tensor, tail: float, *, keep_w=False, rows_again=None
) -> None:
    """Fills ``stats`` [15, N] (the rows of moments.Stats) and ``correct`` [N] from logits [N, V].

    ``keep_w`` leaves w in the logits' storage, 0 at the target, for ``gradient`` to go on from. It takes logits in the
    dtype of stats; ``rows_again(index)`` must then give back the logits of the few rows that need more care."""
    vocab = logits.shape[1]
    y = targets[:, None]
    z_y = logits.gather(1, y).to(stats.dtype)[:, 0]
    raw = torch.empty(10 if tail else 7, len(logits), dtype=stats.dtype, device=logits.device)
    low = torch.finfo(stats.dtype).min
    size = _group_size(logits)

    def work(buffers, z, y_, z_y_, rows):
        w, q, *copy = buffers if len(z) == size else [b[: len(z)] for b in buffers]
        z_top, w_top, z_sum, wz, w2, w3, w4, *tails = rows.unbind(0)
        if not keep_w:
            z = copy[0].copy_(z)
        # Finite rather than -inf, so that a row with no other entry is not 0/0.
        z.scatter_(1, y_, low)
        torch.amax(z, -1, out=z_top)
        torch.softmax(z, -1, out=w)
        torch.amax(w, -1, out=w_top)
        w.scatter_(1, y_, 0.0)
        z.scatter_(1, y_, 0.0)
        torch.sum(z, -1, out=z_sum)
        torch.sum(torch.mul(w, z, out=q), -1, out=wz)
        if tail:
            _tail_sums(z, w, y_, z_y_, z_top, w_top, tail, tails)
        if keep_w:
            z.copy_(w)
        w.clamp_min_(_W_FLOOR)
        torch.sum(torch.mul(w, w, out=q), -1, out=w2)
        torch.linalg.vector_norm(q, dim=-1, out=w4)
        torch.sum(q.mul_(w), -1, out=w3)

    groups = zip(logits.detach().split(size), y.split(size), z_y.split(size), raw.split(size, 1), strict=True)
    _for_each_group(work, list(groups), size, logits, stats.dtype, 2 if keep_w else 3)
    z_top, w_top, z_sum, wz, w2, w3, w4, *tails = raw.unbind(0)
    tail_log_p, tail_count, tail_off = tails or [torch.zeros_like(z_y)] * 3
    log_w_top = w_top.log()
    d = (z_top - z_y) - log_w_top
    r1, p_y = torch.sigmoid(d), torch.sigmoid(-d)
    log_r1, log_p = F.logsigmoid(d), F.logsigmoid(-d)
    lse = z_y - log_p
    total = z_sum + z_y
    r1_squared = r1 * r1
    values = dict(log_p=log_p, r1=r1, p_y=p_y, row_max=z_top, row_sum=1 / w_top, support=torch.full_like(r1, vocab))
    values |= dict(r2=r1_squared * w2, r3=r1_squared * r1 * w3, r4=(r1_squared * w4).square_())
    values |= dict(mean_log_p=total / vocab - lse, confidence=torch.maximum(p_y, r1 * w_top))
    values |= dict(entropy=r1 * (z_top - log_w_top - wz - log_r1) - p_y * log_p)
    values |= dict(tail_log_p=tail_log_p, tail_count=tail_count, tail_off=tail_off)
    torch.stack(Stats(**values), out=stats)
    torch.gt(z_y, z_top, out=correct)
    # Again: ties, -inf among the logits (total * 0 is NaN), large offsets; on CUDA every row, as finding the few would
    # wait for the device.
    plain = ((total * 0 + lse).abs() < _LSE_MAX) & (z_y != z_top)
    if logits.is_cuda or not bool(plain.all()):
        index = torch.arange(len(plain), device=plain.device) if logits.is_cuda else (~plain).nonzero()[:, 0]
        for i in index.split(size):
            z = (rows_again(i) if keep_w else logits[i]).to(stats.dtype)
            _careful(z, targets[i], i, Stats(*stats.unbind(0)), correct)


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


def _careful(z, targets, index, stats: Stats, correct: Tensor) -> None:
    """The rows ``index`` again: -inf left out, sums relative to the row's maximum, ties by first index."""
    live = z > -torch.inf
    support = live.sum(-1).to(z.dtype)
    # log p_j = (z_j - max z) + log max p
    log_p = z - z.amax(-1, keepdim=True) + stats.confidence[index].log()[:, None]
    p, log_p = log_p.exp(), torch.where(live | log_p.isnan(), log_p, 0.0)
    stats.entropy[index] = -(p * log_p).sum(-1)
    stats.mean_log_p[index] = log_p.sum(-1) / support
    stats.support[index] = support
    correct[index] = z.argmax(-1) == targets


def gradient(
    logits, targets, mask, stats: Stats, coefficients: Coefficients, tail: float, out: Tensor, *, kept_w=False
) -> None:
    """Writes the gradient of the rows to ``out`` [N, V], which may be the logits themselves; 0 where ``mask`` is False.
    ``kept_w``: the logits' storage holds w, as ``forward(keep_w=True)`` left it, and ``out`` is the logits."""
    dtype, vocab = stats.r1.dtype, logits.shape[1]
    a, c, b, t, target = coefficients
    if kept_w:  # p = r1 w
        a, c = a * stats.r1, None if c is None else c * stats.r1.square()
    a, c = (None if x is None else F.hardshrink(x, _FACTOR_FLOOR) for x in (a, c))
    a, c, b, t, target, y = (None if x is None else x[:, None] for x in (a, c, b, t, target, targets))
    # -inf takes no part in b; asking costs a wait on CUDA, so there every row is looked at.
    ragged = t is not None or (b is not None and (logits.is_cuda or bool((stats.support != vocab).any())))
    size = _group_size(logits)

    def work(buffers, start, z, g):
        rows = slice(start, start + len(z))
        p, *wide = buffers if len(z) == size else [x[: len(z)] for x in buffers]
        live = z > -torch.inf if ragged else None
        if kept_w:
            p, factor, result = z, p, z
        else:
            factor = result = wide[0] if wide else g
            torch.softmax(result.copy_(z) if wide else z, -1, out=p)
        if t is not None:
            p_j = p * stats.r1[rows, None] if kept_w else p
            in_tail = (p_j < (tail / stats.support[rows])[:, None]) & live
        if c is None:
            torch.mul(p, a[rows], out=result)
        else:
            # Three passes, as addcmul with two broadcast operands is not vectorised.
            torch.mul(torch.mul(p, c[rows], out=factor).add_(a[rows]), p, out=result)
        if b is not None:
            result.add_(b[rows] if live is None else torch.where(live, b[rows], 0.0))
        if t is not None:
            result.add_(torch.where(in_tail, t[rows], 0.0))
        if wide:
            g.copy_(result)

    groups = list(zip(range(0, len(out), size), logits.split(size), out.split(size), strict=False))
    _for_each_group(work, groups, size, logits, dtype, 1 if out.dtype == dtype else 2)
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
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has no such threads
    return pool
