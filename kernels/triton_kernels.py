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
    ids_ptr,
    order_ptr,
    tail,
    scale,
    softcap,
    V,
    TAIL: tl.constexpr,
    LINK: tl.constexpr,
    PACKED: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
):
    """One program a row, one read: its Stats, in the rows of ``stats``."""
    row = tl.program_id(0).to(tl.int64)
    ORDER: tl.constexpr = order_ptr is not None
    link = scale, softcap
    g = tl.load(order_ptr) if ORDER else 2.0
    y = tl.load(targets_ptr + row).to(tl.int32)
    z_y = rows.linked(tl.load(z_ptr + row * z_stride + y).to(tl.float32), link, LINK, False)
    at = rows.place(row, z_stride, V, y, W)
    none = tl.zeros([R], tl.float32)
    z_e, _places, _mine, off = rows.edge(z_ptr, at, V, y, R, W)
    lanes = none + rows.FILL, none, rows.no_sums_a_lane(R)
    lanes = rows.add_edge(lanes, rows.linked(z_e, link, LINK, True), off, g, R, ORDER)
    lanes = rows.add_blocks(z_ptr, at, 0, lanes, link, g, K, R, W, PACKED, 1, LINK, ORDER)
    top, sums = rows.over_lanes(lanes, g, ORDER)
    live, beaten = V - 1.0, z_y < top
    if rows.needs_care(top, sums[5], LINK):
        top, sums, live, beaten = rows.careful_sums(z_ptr, at, V, y, z_y, True, link, g, R, W, LINK, ORDER)
    elif z_y == top:
        beaten = rows.tied_before(z_ptr, at, V, y, z_y, link, R, W, LINK)
    to = stats_ptr + row, stats_stride, correct_ptr + row
    found = top, sums, live, beaten
    moments, ref, powers, rest = rows.finish_row(to, True, z_y, found, g, ORDER)
    w = powers[0]
    if ids_ptr is not None:
        tl.store(ids_ptr + row, rows.first_place(z_ptr, at, V, y, z_y, top, link, R, W, LINK))
    if TAIL:
        # A second read, of a row that is still in the cache.
        p_y, n = moments[6], moments[7]
        off_log, target_log_p, y_live = rest
        k = tl.zeros([R, 4], tl.float32)
        tail_t = tl.zeros([R, 4], tl.float32)
        for start in range(0, at[3] + 1, R):
            for half in tl.static_range(W // 4):
                z, _j = rows.element(z_ptr, at, start + tl.arange(0, R), half, V, y, W)
                z = rows.linked(z, link, LINK, False)
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
def any_gradient(z, ref, scale, a, c, b, t, h, tail_limit, link, g, LINK: tl.constexpr, ORDER: tl.constexpr):
    """p (a + c p^(g-1) + h log p) + b + t [p < tail_limit], with p = scale exp(linked z - ref), of any z, 0 for -inf.
    All but a may be None. Without ORDER g is 2."""
    shaped = rows.linked(z, link, LINK, False)
    p = tl.exp2((shaped - ref) * rows.LOG2E) * scale
    if c is None:
        found = p * a
    elif ORDER:
        power = tl.where(p > 0, tl.exp2(((shaped - ref) * rows.LOG2E + tl.log2(scale)) * g), 0.0)
        found = p * a + c * power
    else:
        found = p * tl.fma(p, c, a)
    if h is not None:
        found += tl.where(p > 0, p * h * ((shaped - ref) + tl.log2(scale) * rows.LN2), 0.0)
    if b is not None:
        found += tl.where(z != float("-inf"), b, 0.0)
    if t is not None:
        found += tl.where((p < tail_limit) & (z != float("-inf")), t, 0.0)
    if LINK == rows.CAPPED:
        found *= rows.slope_of(z, link)
    return found


@triton.jit
def store_any_gradient(
    ptr, at, v, live, word, on, ref, scale, a, c, b, t, h, tail_limit, link, g, LINK: tl.constexpr, ORDER: tl.constexpr
):
    """``any_gradient`` of [R, 4] words over whole vectors of the same dtype, 0 where not ``on``."""
    DTYPE: tl.constexpr = ptr.dtype.element_ty
    low = any_gradient(rows.part_of(word, 0, 0, DTYPE), ref, scale, a, c, b, t, h, tail_limit, link, g, LINK, ORDER)
    high = any_gradient(rows.part_of(word, 1, 0, DTYPE), ref, scale, a, c, b, t, h, tail_limit, link, g, LINK, ORDER)
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
    h_ptr,
    target_ptr,
    order_ptr,
    tail,
    link_scale,
    softcap,
    V,
    LINK: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
):
    """One program K vectors a lane of a row, one read and one write over or beside the logits: ``any_gradient``, and
    ``target`` at y."""
    row = tl.program_id(0).to(tl.int64)
    ORDER: tl.constexpr = order_ptr is not None
    link = link_scale, softcap
    g = tl.load(order_ptr) if ORDER else 2.0
    y = tl.load(targets_ptr + row).to(tl.int32)
    at = rows.place(row, z_stride, V, y, W)
    # An ignored row and its coefficients may hold anything.
    on = tl.load(mask_ptr + row) != 0 if mask_ptr is not None else True
    ref = tl.load(ref_ptr + row)
    scale = tl.load(r1_ptr + row) / tl.load(sum_ptr + row)
    c = tl.load(c_ptr + row) if c_ptr is not None else None
    b = tl.load(b_ptr + row) if b_ptr is not None else None
    t = tl.load(t_ptr + row) if t_ptr is not None else None
    h = tl.load(h_ptr + row) if h_ptr is not None else None
    a = tl.load(a_ptr + row)
    limit = tail / tl.maximum(tl.load(support_ptr + row), 1.0)
    start = tl.program_id(1) * (K * R)
    lane = tl.arange(0, R)
    for k in tl.static_range(K):
        v = start + k * R + lane
        live = rows.is_whole(v, at, True, True)
        word = rows.load_words(z_ptr, at, v, live)
        store_any_gradient(out_ptr, at, v, live, word, on, ref, scale, a, c, b, t, h, limit, link, g, LINK, ORDER)
    if tl.program_id(1) == 0:
        z, places, mine, off = rows.edge(z_ptr, at, V, y, R, W)
        found = tl.where(
            off, any_gradient(z, ref, scale, a, c, b, t, h, limit, link, g, LINK, ORDER), tl.load(target_ptr + row)
        )
        tl.store(out_ptr + places, tl.where(on, found, 0.0).to(out_ptr.dtype.element_ty), mask=mine)


@triton.jit
def scored(
    to,
    loss_ptr,
    fisher_ptr,
    knob_ptr,
    keep,
    z_y,
    found,
    link,
    g,
    SCORE: tl.constexpr,
    LINK: tl.constexpr,
    ORDER: tl.constexpr,
):
    """Stores Stats, loss and Fisher of a row. Returns ((a, c, b), target, ref): its gradient is ``gradient_of`` with
    e = exp(z - ref), and ``target`` at the target."""
    moments, ref, powers, _rest = rows.finish_row(to, keep, z_y, found, g, ORDER)
    log_p, r1, r2, r3, r4, mean_log_p, p_y, n, s, entropy = moments
    loss, g0, g1, gs, gm = SCORE(log_p, r1, s, mean_log_p, p_y, entropy, n, tl.load(knob_ptr))
    tl.store(loss_ptr, tl.where(keep, loss, 0.0))
    # As derived at the head of moments.py.
    c = g * gs
    a = -g0 + g1 * p_y - c * s - gm
    b = gm / n
    target = -(a * r1 + c * s + (n - 1.0) * b)
    fisher = a * a * r2 + 2.0 * a * c * r3 + c * c * r4 + 2.0 * b * (a * r1 + c * s) + (n - 1.0) * b * b
    tl.store(fisher_ptr, tl.where(keep, fisher + target * target, 0.0))
    if LINK:
        a, b, c, target = a * link[0], b * link[0], c * link[0], target * link[0]
    return (a * powers[0], c * powers[1], b), target, ref


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
    order_ptr,
    link_scale,
    V,
    SCORE: tl.constexpr,
    LINK: tl.constexpr,
    HAS_B: tl.constexpr,
    PIECES: tl.constexpr,
    MORE: tl.constexpr,
    PACKED: tl.constexpr,
    STAGES: tl.constexpr,
    HINTS: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
):
    """One program a row: Stats, the loss, |dL/dz|^2, and the gradient of weight * loss to ``out``.

    The first PIECES vectors of each lane are held in registers and read once: all of 50257 bf16 logits, half of 151936.
    MORE: what follows is read K vectors a lane at a time, and again for the gradient, from the row's end, where the
    cache still has it, in loops of STAGES. HINTS tell the cache which is which. What is rare is left to rest_kernel,
    and said so in ``correct``."""
    DTYPE: tl.constexpr = z_ptr.dtype.element_ty
    ORDER: tl.constexpr = order_ptr is not None
    ONCE: tl.constexpr = "evict_first" if HINTS else ""
    AGAIN: tl.constexpr = "evict_last" if HINTS else ""
    link = link_scale, 0.0  # no softcap here, see triton_impl.fused_score
    g = tl.load(order_ptr) if ORDER else 2.0
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
    EIGHTS: tl.constexpr = PIECES // 8
    held = ()
    for k in tl.static_range(0, 8 * EIGHTS, 8):
        held = held + rows.load_eight(z_ptr, at, k * R, R, k == 0, MORE or k >= PIECES - 9, ONCE)
    for k in tl.static_range(8 * EIGHTS, PIECES):
        live = rows.is_whole(k * R + lane, at, k == 0, MORE or k >= PIECES - 2)
        held = held + (rows.load_words(z_ptr, at, k * R + lane, live, ONCE),)
    new_top = rows.linked(rows.top_of(held, PIECES, R, DTYPE, PACKED), link, LINK, True)
    base = rows.base_of(new_top)
    fresh = rows.no_sums(R)
    zero = tl.num_programs(1) - 1  # so that no comparison is kept since above
    for k in tl.static_range(PIECES):
        live = rows.is_whole(k * R + (lane + zero), at, k == 0, MORE or k >= PIECES - 2)
        fresh = rows.add_word(held[k], live, base, zero, fresh, link, g, R, DTYPE, LINK, ORDER)
    sums = rows.per_lane(fresh)
    count = rows.entries_of(lane, tl.minimum(at[3], PIECES * R), at, R, W)
    z_e, _places, _mine, off = rows.edge(z_ptr, at, V, y, R, W)
    lanes = rows.add_edge((new_top, count, sums), rows.linked(z_e, link, LINK, True), off, g, R, ORDER)
    if MORE:
        lanes = rows.add_blocks(z_ptr, at, PIECES * R, lanes, link, g, K, R, W, PACKED, STAGES, LINK, ORDER, AGAIN)
    top, sums = rows.over_lanes(lanes, g, ORDER)
    z_y = rows.linked(tl.load(z_ptr + row * z_stride + y).to(tl.float32), link, LINK, False)
    if rows.needs_care(top, sums[5], LINK):
        tl.store(correct_ptr, LEFT)
        return
    to = stats_ptr + row, stats_stride, correct_ptr
    found = top, sums, V - 1.0, z_y < top
    rule, target, ref = scored(
        to, loss_ptr + row, fisher_ptr + row, knob_ptr, True, z_y, found, link, g, SCORE, LINK, ORDER
    )
    # Read back, so that the compiler holds the row as it was loaded and not its exponentials.
    tl.debug_barrier()
    ref = tl.load(stats_ptr + row + rows.ROW_MAX * stats_stride, volatile=True)
    zero = tl.num_programs(2) - 1
    # The row's place anew, for the compiler another one: kept since above it would cost registers.
    row += zero
    lane += zero
    y = tl.load(targets_ptr + row).to(tl.int32)
    at = rows.place(row, z_stride, V, y, W)
    if z_y == top:
        # Before the gradient, which may be written over the row.
        tl.store(correct_ptr, rows.tied_before(z_ptr, at, V, y, z_y, link, R, W, LINK) == 0)
    if out_ptr is not None:
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
        power = tl.exp2(g * tl.fma(-ref, rows.LOG2E, base)) if ORDER else scale * scale
        rule = a * scale, c * power, b
        z_e, places, _mine, off = rows.edge(z_ptr, at, V, y, R, W)
        found = rows.gradient_at(z_e, base, rule, link, g, HAS_B, LINK, ORDER)
        tl.store(out_ptr + places, found.to(out_ptr.dtype.element_ty), mask=off)
        row += zero  # and anew, for the same reason
        at = rows.place(row, z_stride, V, tl.load(targets_ptr + row).to(tl.int32), W)
        if MORE:
            blocks = (tl.maximum(at[3] - PIECES * R, 0) + K * R - 1) // (K * R)
            for n_block in tl.range(0, blocks, num_stages=STAGES):
                start = PIECES * R + (blocks - 1 - n_block) * (K * R)
                for k in tl.static_range(K):
                    v = start + k * R + lane
                    live = rows.is_whole(v, at, True, True)
                    word = rows.load_words(z_ptr, at, v, live, ONCE)
                    rows.store_gradient(out_ptr, at, v, live, word, 0, base, rule, link, g, HAS_B, LINK, ORDER, ONCE)
        for k in tl.static_range(PIECES):
            live = rows.is_whole(k * R + lane, at, k == 0, MORE or k >= PIECES - 2)
            v = k * R + lane
            if MORE and k % 6 == 5:
                tl.debug_barrier()  # the assembler would put off stores, and spill what they store
            rows.store_gradient(out_ptr, at, v, live, held[k], zero, base, rule, link, g, HAS_B, LINK, ORDER, ONCE)


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
    order_ptr,
    link_scale,
    V,
    SCORE: tl.constexpr,
    LINK: tl.constexpr,
    HAS_B: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
):
    """What score_kernel has left, slowly and carefully: rows outside of the loss, which get 0 everywhere whatever they
    hold, and those that ``needs_care`` names."""
    ORDER: tl.constexpr = order_ptr is not None
    link = link_scale, 0.0  # no softcap here, see triton_impl.fused_score
    g = tl.load(order_ptr) if ORDER else 2.0
    row = tl.program_id(0).to(tl.int64)
    correct_ptr += row
    if tl.load(correct_ptr) != LEFT:
        return
    y = tl.load(targets_ptr + row).to(tl.int32)
    at = rows.place(row, z_stride, V, y, W)
    lane = tl.arange(0, R)
    keep = tl.load(mask_ptr + row) != 0 if mask_ptr is not None else True
    z_y = rows.linked(tl.load(z_ptr + row * z_stride + y).to(tl.float32), link, LINK, False)
    found = rows.careful_sums(z_ptr, at, V, y, z_y, keep, link, g, R, W, LINK, ORDER)
    to = stats_ptr + row, stats_stride, correct_ptr
    rule, target, ref = scored(
        to, loss_ptr + row, fisher_ptr + row, knob_ptr, keep, z_y, found, link, g, SCORE, LINK, ORDER
    )
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
            store_any_gradient(out_ptr, at, v, live, word, on, ref, 1.0, a, c, b, None, None, 0.0, link, g, LINK, ORDER)
        z_e, places, mine, off = rows.edge(z_ptr, at, V, y, R, W)
        found = tl.where(off, any_gradient(z_e, ref, 1.0, a, c, b, None, None, 0.0, link, g, LINK, ORDER), target)
        tl.store(out_ptr + places, tl.where(on, found, 0.0).to(out_ptr.dtype.element_ty), mask=mine)


@triton.jit(do_not_specialize=["blocks"])
def rescale_kernel(g_ptr, stride, scale_ptr, blocks, V, BLOCK: tl.constexpr):
    """g *= scale in place, in ``blocks`` of BLOCK elements, dealt to the programs in turn. Where scale is 1 it reads
    nothing else and writes nothing."""
    scale = tl.load(scale_ptr).to(tl.float32)
    if scale != 1.0:
        a_row = tl.cdiv(V, BLOCK)
        for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
            row = block // a_row
            j = (block - row * a_row) * BLOCK + tl.arange(0, BLOCK)
            at = g_ptr + row.to(tl.int64) * stride + j
            g = tl.load(at, mask=j < V, other=0.0).to(tl.float32)
            tl.store(at, (g * scale).to(g_ptr.dtype.element_ty), mask=j < V)
