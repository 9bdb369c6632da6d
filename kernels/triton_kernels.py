"""The Triton kernels: triton_impl launches them, triton_rows has the parts of a row.

Accesses have 16 bytes for any V. The first and last vector of a row may belong to another row as well. These two and
the target's are dealt to lanes one element at a time (triton_rows.edge), so no element of another vector is masked.

An element takes 22 instructions for loss, moments, Fisher and gradient; an H100 issues 38 while its memory reads and
writes a bf16 logit. What only a rare row needs is in a kernel of its own. ``python -m kernels.audit`` checks both.

One of two programs of a multiprocessor loads while the other computes. No lane waits for another before its part of the
row is done: each has its own maximum, and moves its sums to another by a power of two.
"""

import triton
import triton.language as tl

from . import triton_rows as rows

LEFT = tl.constexpr(2)  # what score_kernel writes to ``correct`` of a row that it has left to rest_kernel


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
    PACKED: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
):
    """One program a row, one read: its Stats, in the rows of ``stats``."""
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(targets_ptr + row).to(tl.int32)
    z_y = tl.load(z_ptr + row * z_stride + y).to(tl.float32)
    at = rows.place(row, z_stride, V, y, W)
    none = tl.zeros([R], tl.float32)
    z_e, _places, _mine, off = rows.edge(z_ptr, at, V, y, R, W)
    lanes = rows.add_edge((none + rows.FILL, none, (none, none, none, none, none, none)), z_e, off, R)
    top, sums = rows.over_lanes(rows.add_blocks(z_ptr, at, 0, lanes, K, R, W, PACKED))
    live, beaten = V - 1.0, z_y <= top
    if rows.needs_care(top, sums[5], z_y):
        top, sums, live, beaten = rows.careful_sums(z_ptr, at, V, y, z_y, True, R, W)
    to = stats_ptr + row, stats_stride, correct_ptr + row
    found = top, sums, live, beaten
    moments, ref, w, rest = rows.finish_row(to, True, z_y, found)
    if TAIL:
        # A second read, of a row that is still in the cache.
        p_y, n = moments[6], moments[7]
        off_log, target_log_p, y_live = rest
        k = tl.zeros([R, 4], tl.float32)
        tail_t = tl.zeros([R, 4], tl.float32)
        for start in range(0, at[3] + 1, R):
            for half in tl.static_range(W // 4):
                z, _j = rows.element(z_ptr, at, start + tl.arange(0, R), half, V, y, W)
                inside = (tl.exp2((z - ref) * rows.LOG2E) * w < tail / n) & (z != float("-inf"))
                k += inside.to(tl.float32)
                tail_t += tl.where(inside, z - ref, 0.0)
        k = tl.sum(tl.sum(k, 1), 0)
        tail_t = tl.sum(tl.sum(tail_t, 1), 0)
        y_in = tl.where(p_y < tail / n, y_live, 0.0)
        rows.put(to, rows.TAIL_LOG_P, True, (tail_t + k * off_log + y_in * target_log_p) / n)
        rows.put(to, rows.TAIL_COUNT, True, k + y_in)
        rows.put(to, rows.TAIL_OFF, True, k)


@triton.jit
def any_gradient(z, ref, scale, a, c, b, t, limit):
    """p (a + c p) + b + t [p < limit] with p = scale exp(z - ref), of any z, 0 for -inf. c, b and t may be None."""
    p = tl.exp2((z - ref) * rows.LOG2E) * scale
    g = p * (a if c is None else tl.fma(p, c, a))
    if b is not None:
        g += tl.where(z != float("-inf"), b, 0.0)
    if t is not None:
        g += tl.where((p < limit) & (z != float("-inf")), t, 0.0)
    return g


@triton.jit
def store_any_gradient(ptr, at, v, live, word, on, ref, scale, a, c, b, t, limit):
    """``any_gradient`` of [R, 4] words over whole vectors of the same dtype, 0 where not ``on``."""
    low = any_gradient(rows.part_of(word, 0, 0, ptr.dtype.element_ty), ref, scale, a, c, b, t, limit)
    high = any_gradient(rows.part_of(word, 1, 0, ptr.dtype.element_ty), ref, scale, a, c, b, t, limit)
    rows.store_words(ptr, at, v, live, tl.where(on, low, 0.0), tl.where(on, high, 0.0))


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
    K: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
):
    """One program K vectors a lane of a row, one read and one write over or beside the logits:
    p_j (a + c p_j) + b + t [p_j in tail], and ``target`` at y."""
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(targets_ptr + row).to(tl.int32)
    at = rows.place(row, z_stride, V, y, W)
    # An ignored row and its coefficients may hold anything.
    on = tl.load(mask_ptr + row) != 0 if mask_ptr is not None else True
    ref = tl.load(ref_ptr + row)
    scale = tl.load(r1_ptr + row) / tl.load(sum_ptr + row)
    c = tl.load(c_ptr + row) if c_ptr is not None else None
    b = tl.load(b_ptr + row) if b_ptr is not None else None
    t = tl.load(t_ptr + row) if t_ptr is not None else None
    a = tl.load(a_ptr + row)
    limit = tail / tl.maximum(tl.load(support_ptr + row), 1.0)
    start = tl.program_id(1) * (K * R)
    lane = tl.arange(0, R)
    for k in tl.static_range(K):
        v = start + k * R + lane
        live = rows.is_whole(v, at, True, True)
        word = rows.load_words(z_ptr, at, v, live)
        store_any_gradient(out_ptr, at, v, live, word, on, ref, scale, a, c, b, t, limit)
    if tl.program_id(1) == 0:
        z, places, mine, off = rows.edge(z_ptr, at, V, y, R, W)
        g = tl.where(off, any_gradient(z, ref, scale, a, c, b, t, limit), tl.load(target_ptr + row))
        tl.store(out_ptr + places, tl.where(on, g, 0.0).to(out_ptr.dtype.element_ty), mask=mine)


@triton.jit
def scored(to, loss_ptr, fisher_ptr, knob_ptr, keep, z_y, found, SCORE: tl.constexpr):
    """Stores Stats, loss and Fisher of a row. Returns ((a, c, b), target, ref): its gradient is e (a + c e) + b with
    e = exp(z - ref), and ``target`` at the target."""
    moments, ref, w, _rest = rows.finish_row(to, keep, z_y, found)
    log_p, r1, r2, r3, r4, mean_log_p, p_y, n, entropy = moments
    loss, g0, g1, g2, gm = SCORE(log_p, r1, r2, mean_log_p, p_y, entropy, n, tl.load(knob_ptr))
    tl.store(loss_ptr, tl.where(keep, loss, 0.0))
    # As derived at the head of moments.py.
    c = 2.0 * g2
    a = -g0 + g1 * p_y - c * r2 - gm
    b = gm / n
    target = -(a * r1 + c * r2 + (n - 1.0) * b)
    fisher = a * a * r2 + 2.0 * a * c * r3 + c * c * r4 + 2.0 * b * (a * r1 + c * r2) + (n - 1.0) * b * b
    tl.store(fisher_ptr, tl.where(keep, fisher + target * target, 0.0))
    return (a * w, c * w * w, b), target, ref


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
    PIECES: tl.constexpr,
    MORE: tl.constexpr,
    PACKED: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
):
    """One program a row: Stats, the loss, |dL/dz|^2, and the gradient of weight * loss to ``out``.

    The first PIECES vectors of each lane are held in registers and read once: all of 50257 bf16 logits, half of 151936.
    MORE: what follows is read K vectors a lane at a time, and again for the gradient, from the row's end, where the
    cache still has it. What is rare is left to rest_kernel, and said so in ``correct``."""
    DTYPE: tl.constexpr = z_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    correct_ptr += row
    if mask_ptr is not None:
        if tl.load(mask_ptr + row) == 0:
            tl.store(correct_ptr, LEFT)
            return
    y = tl.load(targets_ptr + row).to(tl.int32)
    at = rows.place(row, z_stride, V, y, W)
    lane = tl.arange(0, R)
    # Straight code, no branch between the pieces: the assembler would spill the row at each of them.
    held = ()
    for k in tl.static_range(PIECES):
        live = rows.is_whole(k * R + lane, at, k == 0, MORE or k >= PIECES - 2)
        held = held + (rows.load_words(z_ptr, at, k * R + lane, live),)
    new_top = rows.top_of(held, PIECES, R, DTYPE, PACKED)
    base = rows.base_of(new_top)
    fresh = rows.no_sums(R)
    for k in tl.static_range(PIECES):
        live = rows.is_whole(k * R + lane, at, k == 0, MORE or k >= PIECES - 2)
        fresh = rows.add_word(held[k], live, base, tl.num_programs(1) - 1, fresh, R, DTYPE)
    sums = rows.per_lane(fresh)
    count = rows.entries_of(lane, tl.minimum(at[3], PIECES * R), at, R, W)
    z_e, _places, _mine, off = rows.edge(z_ptr, at, V, y, R, W)
    lanes = rows.add_edge((new_top, count, sums), z_e, off, R)
    if MORE:
        lanes = rows.add_blocks(z_ptr, at, PIECES * R, lanes, K, R, W, PACKED)
    top, sums = rows.over_lanes(lanes)
    z_y = tl.load(z_ptr + row * z_stride + y).to(tl.float32)
    if rows.needs_care(top, sums[5], z_y):
        tl.store(correct_ptr, LEFT)
        return
    to = stats_ptr + row, stats_stride, correct_ptr
    found = top, sums, V - 1.0, z_y <= top
    rule, target, ref = scored(to, loss_ptr + row, fisher_ptr + row, knob_ptr, True, z_y, found, SCORE)
    if out_ptr is not None:
        # Read back, so that the compiler holds the row as it was loaded and not its exponentials.
        tl.debug_barrier()
        ref = tl.load(stats_ptr + row + rows.ROW_MAX * stats_stride, volatile=True)
        zero = tl.num_programs(2) - 1
        # The row's place anew, for the compiler another one: kept since above it would cost registers.
        row += zero
        lane += zero
        y = tl.load(targets_ptr + row).to(tl.int32)
        at = rows.place(row, z_stride, V, y, W)
        a, c, b = rule
        if weights_ptr is not None:
            weight = tl.load(weights_ptr + row)
            on = weight != 0.0  # 0 times an infinite loss is no gradient
            a, c = tl.where(on, a * weight, 0.0), tl.where(on, c * weight, 0.0)
            b, target = tl.where(on, b * weight, 0.0), tl.where(on, target * weight, 0.0)
        tl.store(out_ptr + row * z_stride + y, target.to(out_ptr.dtype.element_ty))
        base = rows.base_of(ref)
        # Exponentials are relative to base, coefficients to the maximum.
        scale = tl.exp2(tl.fma(-ref, rows.LOG2E, base))
        rule = a * scale, c * scale * scale, b
        if MORE:
            blocks = (tl.maximum(at[3] - PIECES * R, 0) + K * R - 1) // (K * R)
            for n_block in range(0, blocks):
                start = PIECES * R + (blocks - 1 - n_block) * (K * R)
                for k in tl.static_range(K):
                    v = start + k * R + lane
                    live = rows.is_whole(v, at, True, True)
                    word = rows.load_words(z_ptr, at, v, live)
                    rows.store_gradient(out_ptr, at, v, live, word, 0, base, rule, HAS_B)
        for k in tl.static_range(PIECES):
            live = rows.is_whole(k * R + lane, at, k == 0, MORE or k >= PIECES - 2)
            rows.store_gradient(out_ptr, at, k * R + lane, live, held[k], zero, base, rule, HAS_B)
        z_e, places, _mine, off = rows.edge(z_ptr, at, V, y, R, W)
        g = rows.gradient_of(tl.fma(z_e, rows.LOG2E, -base), rule, HAS_B)
        tl.store(out_ptr + places, g.to(out_ptr.dtype.element_ty), mask=off)


@triton.jit(do_not_specialize=["stats_stride"])
def rest_kernel(
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
    R: tl.constexpr,
    W: tl.constexpr,
):
    """What score_kernel has left, slowly and carefully: rows outside of the loss, which get 0 everywhere whatever they
    hold, and those that ``needs_care`` names."""
    row = tl.program_id(0).to(tl.int64)
    correct_ptr += row
    if tl.load(correct_ptr) != LEFT:
        return
    y = tl.load(targets_ptr + row).to(tl.int32)
    at = rows.place(row, z_stride, V, y, W)
    lane = tl.arange(0, R)
    keep = tl.load(mask_ptr + row) != 0 if mask_ptr is not None else True
    z_y = tl.load(z_ptr + row * z_stride + y).to(tl.float32)
    found = rows.careful_sums(z_ptr, at, V, y, z_y, keep, R, W)
    to = stats_ptr + row, stats_stride, correct_ptr
    rule, target, ref = scored(to, loss_ptr + row, fisher_ptr + row, knob_ptr, keep, z_y, found, SCORE)
    on = keep
    if out_ptr is not None:
        a, c, b = rule
        if weights_ptr is not None:
            weight = tl.load(weights_ptr + row)
            on = on & (weight != 0.0)  # 0 times an infinite loss is no gradient
            a, c, b, target = a * weight, c * weight, b * weight, target * weight
        if not HAS_B:
            b = None
        origin, shift, first, last, ty = at
        to_read = origin, shift, first, tl.where(on, last, 0), ty
        for start in range(0, last, R):
            v = start + lane
            live = rows.is_whole(v, at, True, True)
            word = rows.load_words(z_ptr, at, v, rows.is_whole(v, to_read, True, True))
            store_any_gradient(out_ptr, at, v, live, word, on, ref, 1.0, a, c, b, None, 0.0)
        z_e, places, mine, off = rows.edge(z_ptr, at, V, y, R, W)
        g = tl.where(off, any_gradient(z_e, ref, 1.0, a, c, b, None, 0.0), target)
        tl.store(out_ptr + places, tl.where(on, g, 0.0).to(out_ptr.dtype.element_ty), mask=mine)


@triton.jit
def rescale_kernel(g_ptr, stride, scale_ptr, V, BLOCK: tl.constexpr):
    """g *= scale, in place; nothing is read or written where scale is 1."""
    scale = tl.load(scale_ptr).to(tl.float32)
    if scale != 1.0:
        j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        at = g_ptr + tl.program_id(0).to(tl.int64) * stride + j
        g = tl.load(at, mask=j < V, other=0.0).to(tl.float32)
        tl.store(at, (g * scale).to(g_ptr.dtype.element_ty), mask=j < V)
