"""The moments, the row gradient and the named scores as Triton kernels.

Same functions and the same mathematics as torch_impl (see its head): sums over the row without its
target, relative to a maximum, then r1, p_y and log_p from d = logsumexp_off - z_y. Runs on CUDA, and on
CPU tensors under TRITON_INTERPRET=1, which must be set before this module is imported.

moments_kernel   one read of a row: its Stats
gradient_kernel  one read and one write: p_j (a + c p_j) + b + t [p_j in tail] over or beside the logits
score_kernel     a score of triton_scores from logits to Stats, loss, Fisher and gradient in one launch. A
                 row that fits on chip is read once and held as loaded; a longer one is read a second
                 time from its end, where the cache still has it.

What makes them fast, and what ``python -m kernels.audit`` checks without a GPU:

16-byte accesses for any V. A row of an odd number of 2-byte logits starts anywhere, so a program starts
at the last 16-byte boundary before its row (never before the tensor) and ends at the first one after it;
what is not of the row is masked in registers. Such an access shares its 16 bytes with a valid element, so
it cannot touch a page that the tensor does not. Only whole vectors of the row are stored 16 bytes at a
time, and the at most two broken ones element by element.

One exponential an element. A lane keeps its own running maximum over the K x W elements it reads at a
time, and rescales its sums once for all of them; no lane waits for another before the row is done.

No comparison an element. The target, the ends of the row, ties at the maximum and logits of -inf are
looked for in the few blocks, or rows, that can have them.
"""

import contextlib
import functools
import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import triton_scores
from kernels.moments import Coefficients, Stats
from kernels.triton_rows import (
    LOG2E,
    add_powers,
    finish_row,
    gradient_of,
    held_piece,
    is_broken,
    off_target,
    online_sums,
    per_lane,
    place,
    slot_numbers,
    store_row,
    unpacked,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CAN_KEEP_W = False
SCORES = triton_scores.SCORES

# Elements of a row that score_kernel holds in a lane's registers, 8 warps a row: bf16 as loaded, two to a
# register (V up to 51 k on Hopper; compiled for Ampere, the same code needs a few registers more than there
# are), other types in fp32 (V up to 16 k). kernels.audit shows what fits without spilling.
RESIDENT_HOPPER, RESIDENT_AMPERE, RESIDENT_FP32 = 200, 160, 64
VECTOR_BYTES = 16


# The number of tokens, which stats_stride is, says nothing of alignment: without this an odd one, or 1, compiles anew.
@triton.jit(do_not_specialize=["stats_stride"])
def moments_kernel(
    z_ptr,
    z_stride,
    targets_ptr,
    stats_ptr,
    stats_stride,
    correct_ptr,
    tail,
    V,
    TAIL: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
):
    """One program a row; the rows of stats are those of moments.Stats."""
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(targets_ptr + row).to(tl.int32)
    z_y = tl.load(z_ptr + row * z_stride + y).to(tl.float32)
    lo, shift, end = place(row, z_stride, V, W)
    slots = slot_numbers(K, R, W)
    BLOCK: tl.constexpr = K * R * W
    top, sums = online_sums(z_ptr, lo, shift, end, V, y, slots, K, R, W)
    out = stats_ptr + row
    ref, w, _log_p, _r1, p_y, n, _r2, _r3, _r4, _mean, off, target_log_p, y_live = finish_row(
        out, stats_stride, correct_ptr + row, True, z_ptr, lo, shift, end, V, y, z_y, top, sums, slots, BLOCK
    )
    if TAIL:
        # A second read, of a row that is still in the cache.
        k = 0.0
        tail_t = 0.0
        for start in range(0, end, BLOCK):
            i = start + slots
            z = tl.load(z_ptr + lo + i, mask=i < end, other=float("-inf")).to(tl.float32)
            z = off_target(z, i - shift, V, y)
            inside = (tl.exp2((z - ref) * LOG2E) * w < tail / n) & (z != float("-inf"))
            k += tl.sum(per_lane(inside.to(tl.float32)), 0)
            tail_t += tl.sum(per_lane(tl.where(inside, z - ref, 0.0)), 0)
        y_in = tl.where(p_y < tail / n, y_live, 0.0)
        tl.store(out + 4 * stats_stride, (tail_t + k * off + y_in * target_log_p) / n)
        tl.store(out + 11 * stats_stride, k + y_in)
        tl.store(out + 12 * stats_stride, k)


@triton.jit
def gradient_kernel(
    z_ptr,
    z_stride,
    out_ptr,
    targets_ptr,
    mask_ptr,
    ref_ptr,
    sum_ptr,
    r1_ptr,
    support_ptr,
    a_ptr,
    c_ptr,
    b_ptr,
    t_ptr,
    target_ptr,
    tail,
    V,
    HAS_C: tl.constexpr,
    HAS_B: tl.constexpr,
    HAS_T: tl.constexpr,
    HAS_MASK: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
):
    """One program a block of a row: p_j (a + c p_j) + b + t [p_j in tail], and ``target`` at y."""
    row = tl.program_id(0).to(tl.int64)
    BLOCK: tl.constexpr = K * R * W
    start = tl.program_id(1) * BLOCK
    y = tl.load(targets_ptr + row).to(tl.int32)
    lo, shift, end = place(row, z_stride, V, W)
    slots = slot_numbers(K, R, W)
    i = start + slots
    broken = is_broken(start, shift, V, y, BLOCK)
    z = tl.load(z_ptr + lo + i, mask=i < end, other=float("-inf")).to(tl.float32)
    if broken:
        z = off_target(z, i - shift, V, y)
    total = tl.load(sum_ptr + row)
    in_loss = True
    if HAS_MASK:
        in_loss = tl.load(mask_ptr + row) != 0
        total = tl.where(in_loss, total, 1.0)
    p = tl.exp2((z - tl.load(ref_ptr + row)) * LOG2E) * (tl.load(r1_ptr + row) / total)
    factor = tl.load(a_ptr + row)
    if HAS_C:
        factor += tl.load(c_ptr + row) * p
    g = p * factor
    if HAS_B:
        g += tl.where(z != float("-inf"), tl.load(b_ptr + row), 0.0)
    if HAS_T:
        in_tail = (p < tail / tl.maximum(tl.load(support_ptr + row), 1.0)) & (z != float("-inf"))
        g += tl.where(in_tail, tl.load(t_ptr + row), 0.0)
    if broken:
        g = tl.where(i - shift == y, tl.load(target_ptr + row), g)
    if HAS_MASK:  # an ignored row and its coefficients may hold anything
        g = tl.where(in_loss, g, 0.0)
    store_row(out_ptr, lo, start, slots, shift, V, g.to(out_ptr.dtype.element_ty), broken, W)


@triton.jit(do_not_specialize=["stats_stride"])
def score_kernel(
    z_ptr,
    z_stride,
    out_ptr,
    targets_ptr,
    mask_ptr,
    weights_ptr,
    knob_ptr,
    stats_ptr,
    stats_stride,
    correct_ptr,
    loss_ptr,
    fisher_ptr,
    V,
    SCORE: tl.constexpr,
    HAS_B: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    GRADIENT: tl.constexpr,
    PIECES: tl.constexpr,
    PACKED: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
):
    """One program a row: Stats, the loss, |dL/dz|^2, and the gradient of weight * loss to ``out``.

    PIECES > 0: the row is held on chip in that many blocks. A row outside the loss is not read at all.
    """
    row = tl.program_id(0).to(tl.int64)
    BLOCK: tl.constexpr = K * R * W
    minus_inf = float("-inf")
    y = tl.load(targets_ptr + row).to(tl.int32)
    keep = True
    if HAS_MASK:
        keep = tl.load(mask_ptr + row) != 0
    lo, shift, end = place(row, z_stride, V, W)
    slots = slot_numbers(K, R, W)
    read = end
    if HAS_MASK:
        read = tl.multiple_of(tl.where(keep, end, 0), W)

    if PIECES > 0:
        # Straight code, no branch between the pieces: ptxas would spill the row at each of them.
        held = ()
        lanes = tl.zeros([R], tl.float32) + minus_inf
        for k in tl.static_range(PIECES):
            left = tl.multiple_of(read - k * BLOCK, W)
            held = held + (tl.load(z_ptr + lo + k * BLOCK + slots, mask=slots < left, other=minus_inf),)
        for k in tl.static_range(PIECES):
            z = held_piece(held[k], 0, slots, shift - k * BLOCK, V, y, (k == 0) or (k >= PIECES - 2), PACKED)
            lanes = tl.maximum(lanes, tl.max(tl.max(z, 2), 0))
        top = tl.max(lanes, 0)
        ref = tl.where(top == minus_inf, 0.0, top)
        none = tl.zeros([R], tl.float32)
        s1, s2, s3, s4, s_et, s_t, live = none, none, none, none, none, none, none
        for k in tl.static_range(PIECES):
            z = held_piece(
                held[k], tl.num_programs(1) - 1, slots, shift - k * BLOCK, V, y, (k == 0) or (k >= PIECES - 2), PACKED
            )
            t = z - ref
            is_live = t != minus_inf
            finite = tl.where(is_live, t, 0.0)
            s1, s2, s3, s4, s_et = add_powers(t, finite, s1, s2, s3, s4, s_et)
            s_t += per_lane(finite)
            live += per_lane(tl.where(is_live, 1.0, 0.0))
        sums = (
            tl.sum(s1, 0), tl.sum(s2, 0), tl.sum(s3, 0), tl.sum(s4, 0), tl.sum(s_et, 0), tl.sum(s_t, 0), tl.sum(live, 0)
        )  # fmt: skip
    else:
        top, sums = online_sums(z_ptr, lo, shift, read, V, y, slots, K, R, W)

    z_y = tl.load(z_ptr + lo + shift + y).to(tl.float32)
    out = stats_ptr + row
    ref, w, log_p, r1, p_y, n, r2, r3, r4, mean_log_p, _off, _target_log_p, _y_live = finish_row(
        out, stats_stride, correct_ptr + row, keep, z_ptr, lo, shift, read, V, y, z_y, top, sums, slots, BLOCK
    )
    knob = tl.load(knob_ptr)
    loss, g0, g1, g2, gm = SCORE(log_p, r1, r2, mean_log_p, p_y, knob)
    tl.store(loss_ptr + row, tl.where(keep, loss, 0.0))
    # Coefficients of the gradient, as derived at the head of moments.py.
    c = 2.0 * g2
    a = -g0 + g1 * p_y - c * r2 - gm
    b = gm / n
    target = -(a * r1 + c * r2 + (n - 1.0) * b)
    fisher = a * a * r2 + 2.0 * a * c * r3 + c * c * r4 + 2.0 * b * (a * r1 + c * r2) + (n - 1.0) * b * b
    tl.store(fisher_ptr + row, tl.where(keep, fisher + target * target, 0.0))
    if GRADIENT:
        if HAS_WEIGHTS:
            weight = tl.load(weights_ptr + row)
            on = keep & (weight != 0.0)  # 0 times an infinite loss is no gradient
            a, b, c, target = a * weight, b * weight, c * weight, target * weight
        else:
            on = keep
        aw = a * w
        cw = c * w * w
        if PIECES > 0:
            # Read back, so that the compiler holds the row as it was loaded and not its exponentials.
            tl.debug_barrier()
            ref = tl.load(out + 13 * stats_stride, volatile=True)
            for k in tl.static_range(PIECES):
                g = gradient_of(unpacked(held[k], tl.num_programs(2) - 1, PACKED), ref, aw, cw, b, on, HAS_B)
                # The first piece and the last two can reach beyond the row.
                g = g.to(out_ptr.dtype.element_ty)
                store_row(out_ptr, lo, k * BLOCK, slots, shift, V, g, (k == 0) or (k >= PIECES - 2), W)
        else:
            blocks = (end + BLOCK - 1) // BLOCK
            for n_block in range(0, blocks):
                start = (blocks - 1 - n_block) * BLOCK
                i = start + slots
                z = tl.load(z_ptr + lo + i, mask=i < read, other=minus_inf).to(tl.float32)
                g = gradient_of(z, ref, aw, cw, b, on, HAS_B)
                broken = (start < shift) | (start + BLOCK > shift + V)
                store_row(out_ptr, lo, start, slots, shift, V, g.to(out_ptr.dtype.element_ty), broken, W)
        tl.debug_barrier()  # the lane that wrote there has written
        tl.store(out_ptr + lo + shift + y, tl.where(on, target, 0.0).to(out_ptr.dtype.element_ty))


def forward(logits: Tensor, targets: Tensor, stats: Tensor, correct: Tensor, tail: float) -> None:
    """Fills ``stats`` [15, N] (the rows of moments.Stats) and ``correct`` [N] from logits [N, V]."""
    n, vocab = logits.shape
    if n == 0:
        return
    with _on(logits):
        moments_kernel[(n,)](
            logits,
            logits.stride(0),
            targets,
            stats,
            stats.stride(0),
            correct.view(torch.uint8),
            tail,
            vocab,
            TAIL=tail > 0,
            **_shape(vocab, _vector(logits)),
        )


def gradient(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    stats: Stats,
    coefficients: Coefficients,
    tail: float,
    out: Tensor,
) -> None:
    """Writes the gradient of the rows to ``out`` [N, V], which may be the logits themselves.

    Raises ValueError where ``out`` has other strides than the logits.
    """
    n, vocab = logits.shape
    if n == 0:
        return
    _check_out(logits, out)
    a, c, b, t, target = (None if x is None else x.contiguous() for x in coefficients)
    shape = _shape(vocab, min(_vector(logits), _vector(out)))
    with _on(logits):
        gradient_kernel[(n, triton.cdiv(vocab + shape["W"] - 1, shape["K"] * shape["R"] * shape["W"]))](
            logits,
            logits.stride(0),
            out,
            targets,
            targets if mask is None else mask.view(torch.uint8),
            stats.row_max,
            stats.row_sum,
            stats.r1,
            stats.support,
            a,
            a if c is None else c,
            a if b is None else b,
            a if t is None else t,
            target,
            tail,
            vocab,
            HAS_C=c is not None,
            HAS_B=b is not None,
            HAS_T=t is not None,
            HAS_MASK=mask is not None,
            **shape,
        )


def fused_score(
    name: str,
    knob: Tensor,
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    stats: Tensor,
    correct: Tensor,
    losses: Tensor,
    fisher: Tensor,
    out: Tensor | None,
    shape: dict | None = None,
) -> None:
    """The score ``name`` of triton_scores on logits [N, V]: fills stats, correct, losses and fisher, all 0
    where ``mask`` is False, and writes the gradient of sum(weights * losses) to ``out`` (None: no gradient),
    which may be the logits themselves. ``knob``: its parameter, 0-d fp32 on the device. ``shape``: launch constants
    in place of ``_resident_shape``'s, to measure others."""
    n, vocab = logits.shape
    if n == 0:
        return
    if out is not None:
        _check_out(logits, out)
    width = _vector(logits) if out is None else min(_vector(logits), _vector(out))
    score = SCORES[name]
    with _on(logits):
        score_kernel[(n,)](
            logits,
            logits.stride(0),
            logits if out is None else out,
            targets,
            targets if mask is None else mask.view(torch.uint8),
            losses if weights is None else weights,
            knob,
            stats,
            stats.stride(0),
            correct.view(torch.uint8),
            losses,
            fisher,
            vocab,
            SCORE=score.function,
            HAS_B=score.reads_mean,
            HAS_MASK=mask is not None,
            HAS_WEIGHTS=weights is not None,
            GRADIENT=out is not None,
            **(shape or _resident_shape(vocab, width, logits.dtype, _capability(logits.device))),
        )


@triton.jit
def rescale_kernel(g_ptr, stride, scale_ptr, V, BLOCK: tl.constexpr):
    """g *= scale, in place; nothing is read or written where scale is 1."""
    scale = tl.load(scale_ptr).to(tl.float32)
    if scale != 1.0:
        j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        at = g_ptr + tl.program_id(0).to(tl.int64) * stride + j
        g = tl.load(at, mask=j < V, other=0.0).to(tl.float32)
        tl.store(at, (g * scale).to(g_ptr.dtype.element_ty), mask=j < V)


def rescale(gradient: Tensor, scale: Tensor) -> None:
    """gradient [N, V] times the 0-d ``scale``, in place, without waiting for its value."""
    n, vocab = gradient.shape
    if n == 0:
        return
    with _on(gradient):
        rescale_kernel[(n, triton.cdiv(vocab, 4096))](gradient, gradient.stride(0), scale, vocab, BLOCK=4096)


def _check_out(logits: Tensor, out: Tensor) -> None:
    if out.stride() != logits.stride():
        raise ValueError(f"the gradient's strides {out.stride()} are not those of the logits, {logits.stride()}")


def _vector(tensor: Tensor) -> int:
    """Elements of one access: 16 bytes where the tensor starts at a multiple of that, else one."""
    return 1 if tensor.data_ptr() % VECTOR_BYTES else VECTOR_BYTES // tensor.element_size()


def _shape(vocab: int, width: int) -> dict:
    """Blocks of K x R x W slots: 16 elements a lane, as its loads in flight and few enough registers."""
    warps = max(1, min(8, triton.next_power_of_2(vocab) // 512))
    return {"K": max(1, 16 // width), "R": 32 * warps, "W": width, "num_warps": warps}


def held_shape(vocab: int, width: int, dtype: torch.dtype) -> dict:
    """As ``_shape`` for a row held on chip in PIECES blocks, whether it fits or not; PACKED as unpacked."""
    plain = _shape(vocab, width)
    pieces = triton.cdiv(vocab + width - 1, 32 * plain["num_warps"] * width)
    packed = dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") != "1"  # no assembly there
    return plain | {"K": 1, "PIECES": pieces, "PACKED": packed}


def _resident_shape(vocab: int, width: int, dtype: torch.dtype, capability: int) -> dict:
    """``held_shape`` where a row fits on chip, else ``_shape`` with PIECES = 0."""
    held = held_shape(vocab, width, dtype)
    hopper = RESIDENT_HOPPER if capability >= 90 else RESIDENT_AMPERE
    most = hopper if dtype == torch.bfloat16 else RESIDENT_FP32
    if width == 1 or held["PIECES"] * width > most:
        return _shape(vocab, width) | {"PIECES": 0, "PACKED": False}
    return held


@functools.cache
def _capability(device: torch.device) -> int:
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _on(tensor: Tensor):
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
