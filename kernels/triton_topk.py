"""The k most likely tokens of each row as a Triton kernel, beside the moments: off unless it is asked for.

One program a row reads it block by block and keeps the k best so far, each an int64: the logit as an integer of like
order above, V - 1 - id below, so that no two are equal and of equal logits the smaller id is the larger. A block with
nothing above the k-th best is passed over. From another the largest takes the place of the k-th best until none is
above it: in a row in random order about k (1 + log(V / k)) times, where sorting would move every entry of every block.
"""

import triton
import triton.language as tl
from torch import Tensor

from .moments import Link
from .triton_impl import _bytes, _kind, _run
from .triton_rows import LN2, LOG2E, linked

BLOCK = 512  # two 16-byte vectors of bf16 a lane of one warp; at least topk.TRITON_MOST, so that one block fills all k
LOWEST = tl.constexpr(-(2**63))
HIGHEST = tl.constexpr(2**63 - 1)
LOWER = tl.constexpr(0xFFFFFFFF)


def fill(logits: Tensor, lse, mask, link: Link, out) -> None:
    """Fills ``out``, a topk.TopK, from logits [N, V] that are contiguous along V."""
    pointers = dict(z_ptr=logits, lse_ptr=lse, mask_ptr=_bytes(mask))
    pointers |= dict(log_p_ptr=out.log_p, ids_ptr=out.ids, entropy_ptr=out.entropy)
    numbers = dict(z_stride=logits.stride(0), V=logits.shape[1], scale=link.scale, softcap=link.softcap)
    _run(topk_kernel, logits, **pointers, **numbers, **shape(out.ids.shape[1], _kind(link)))


def shape(k: int, link: int) -> dict:
    """Launch constants."""
    return dict(k=k, TOP=triton.next_power_of_2(k), BLOCK=BLOCK, LINK=link, num_warps=1)


@triton.jit
def topk_kernel(
    z_ptr,
    lse_ptr,
    mask_ptr,
    log_p_ptr,
    ids_ptr,
    entropy_ptr,
    z_stride,
    V,
    scale,
    softcap,
    k: tl.constexpr,
    TOP: tl.constexpr,
    BLOCK: tl.constexpr,
    LINK: tl.constexpr,
):
    """log_p and ids [N, k] and entropy [N] of logits [N, V]; TOP is a power of two, at least k."""
    row = tl.program_id(0).to(tl.int64)
    link = scale, softcap
    z_ptr += row * z_stride
    end = V
    if mask_ptr is not None:
        end = tl.where(tl.load(mask_ptr + row) != 0, V, 0)
    minus_inf = float("-inf")
    lane = tl.arange(0, TOP)
    # The k that are kept, in no order. The lanes above k hold what is never replaced.
    top = tl.where(lane < k, tl.full([TOP], LOWEST, tl.int64) + lane, HIGHEST)
    kth = tl.min(top, 0)
    kth_z = minus_inf
    most = minus_inf  # the largest logit so far, shaped, and the sum of exp(z - most)
    total = 0.0
    for start in range(0, end, BLOCK):
        j = start + tl.arange(0, BLOCK)
        inside = j < V
        if start + BLOCK <= V:  # without a mask the loads of aligned rows are vectors, whatever V is
            z = tl.load(z_ptr + j).to(tl.float32)
        else:
            z = tl.load(z_ptr + j, mask=inside, other=minus_inf).to(tl.float32)
        largest = tl.max(z, 0)
        if (start == 0) | (largest > kth_z):
            keys = tl.where(inside, keys_of(z, V - 1 - j), LOWEST)
            best = tl.max(keys, 0)
            while best > kth:
                top = tl.where(top == kth, best, top)
                kth = tl.min(top, 0)
                keys = tl.where(keys == best, LOWEST, keys)
                best = tl.max(keys, 0)
            kth_z = logits_of(kth)
        if lse_ptr is None:
            higher = tl.maximum(most, linked(largest, link, LINK, False))
            base = tl.where(higher == minus_inf, 0.0, higher)
            fresh = tl.exp2((linked(z, link, LINK, False) - base) * LOG2E)
            total = total * tl.exp2((most - base) * LOG2E) + tl.sum(tl.where(inside, fresh, 0.0), 0)
            most = higher
    if lse_ptr is None:
        lse = most + tl.log2(total) * LN2
    else:
        lse = tl.load(lse_ptr + row)
    mine = lane < k
    place = tl.sum(((top[None, :] > top[:, None]) & mine[None, :]).to(tl.int32), 1)
    z = linked(logits_of(top), link, LINK, False)
    t = z - tl.max(tl.where(mine, z, minus_inf), 0)
    e = tl.where(mine, tl.exp2(t * LOG2E), 0.0)
    others = tl.sum(tl.where(place > 0, e, 0.0), 0)
    entropy = tl.log2(1.0 + others) * LN2 - tl.sum(e * tl.where(e > 0, t, 0.0), 0) / (1.0 + others)
    log_p = z - lse
    ids = V - 1 - (top & LOWER)
    if mask_ptr is not None:
        entropy, log_p, ids = tl.where(end > 0, entropy, 0.0), tl.where(end > 0, log_p, 0.0), tl.where(end > 0, ids, 0)
        place = tl.where(end > 0, place, lane)
    tl.store(entropy_ptr + row, entropy)
    tl.store(log_p_ptr + row * k + place, log_p, mask=mine)
    tl.store(ids_ptr + row * k + place, ids, mask=mine)


@triton.jit
def keys_of(z, lower):
    """int64 in the order of (z, lower): z as an integer in the upper 32 bits."""
    bits = tl.where(z == 0.0, 0.0, z).to(tl.int32, bitcast=True)  # -0.0 is equal to 0.0
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (bits.to(tl.int64) << 32) | lower.to(tl.int64)


@triton.jit
def logits_of(keys):
    """The z of ``keys_of``."""
    bits = (keys >> 32).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
