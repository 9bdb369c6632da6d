"""What the Triton kernels do with one row: where it lies in memory, its sums, its Stats, its gradient.

See triton_impl for the kernels, and for why rows are read as they are.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Under this e t is 0 in fp32, and e times minus infinity would not be a number.
T_MIN = tl.constexpr(-1000.0)


@triton.jit
def log1p_exp(x):
    """log(1 + exp(x)) for x <= 0, to full relative precision.

    log(1 + u) = 2 atanh(u / (2 + u)), by its series: the argument is at most 1/3, and the first term
    left out below 2e-9 of the sum. The hardware's log has an absolute error of 2e-7 near 1.
    """
    u = tl.exp2(x * LOG2E)
    s = u / (2.0 + u)
    t = s * s
    series = 1.0 / 15 + t * (1.0 / 17)
    series = 1.0 / 13 + t * series
    series = 1.0 / 11 + t * series
    series = 1.0 / 9 + t * series
    series = 1.0 / 7 + t * series
    series = 1.0 / 5 + t * series
    series = 1.0 / 3 + t * series
    return 2.0 * s * (1.0 + t * series)


@triton.jit
def place(row, stride, V, W: tl.constexpr):
    """(lo, shift, end) of a row: it starts ``shift`` elements after the W-aligned element ``lo`` of the
    tensor, and slots lo ... lo + end cover it, end a multiple of W."""
    start = row * stride
    lo = tl.multiple_of(start // W * W, W)
    shift = (start - lo).to(tl.int32)
    return lo, shift, tl.multiple_of((shift + V + W - 1) // W * W, W)


@triton.jit
def slot_numbers(K: tl.constexpr, R: tl.constexpr, W: tl.constexpr):
    """[K, R, W] consecutive slots. W lie beside each other in one lane, and K such groups belong to it."""
    k, r, w = tl.arange(0, K), tl.arange(0, R), tl.arange(0, W)
    return (k[:, None, None] * R + r[None, :, None]) * W + w[None, None, :]


@triton.jit
def per_lane(x):
    return tl.sum(tl.sum(x, 2), 0)


@triton.jit
def is_broken(start, shift, V, y, BLOCK: tl.constexpr):
    """Whether the block of slots at ``start`` holds slots outside the row, or the target."""
    at = y + shift - start
    return (start < shift) | (start + BLOCK > shift + V) | ((at >= 0) & (at < BLOCK))


@triton.jit
def off_target(z, j, V, y):
    return tl.where((j >= 0) & (j < V) & (j != y), z, float("-inf"))


@triton.jit
def add_powers(t, finite, s1, s2, s3, s4, s_et):
    """Adds exp(t)^k, k = 1 ... 4, and exp(t) t to the lanes' sums; ``finite`` is t, and anything finite for -inf."""
    e = tl.exp2(t * LOG2E)
    e2 = e * e
    s1 += per_lane(e)
    s2 += per_lane(e2)
    s3 += per_lane(e2 * e)
    s4 += per_lane(e2 * e2)
    s_et += per_lane(e * finite)
    return s1, s2, s3, s4, s_et


@triton.jit
def sum_of(t, broken, K: tl.constexpr, R: tl.constexpr, W: tl.constexpr):
    """Per lane the sum of t and the number of its elements. -inf counts in a block inside the row, where
    it makes the sum -inf (the row is then scanned again), and not in a broken one."""
    count = tl.full([R], K * W, tl.float32)
    total = per_lane(t)
    if broken:
        live = t != float("-inf")
        count = per_lane(live.to(tl.float32))
        total = per_lane(tl.where(live, t, 0.0))
    return total, count


@triton.jit
def scan_row(z_ptr, lo, shift, end, V, y, z_y, ref, slots, BLOCK: tl.constexpr):
    """For the rows that need it: entries that beat or tie the target from before it, live ones, and their
    sum relative to ref."""
    ahead = 0
    live_count = 0.0
    total = 0.0
    for start in range(0, end, BLOCK):
        i = start + slots
        z = tl.load(z_ptr + lo + i, mask=i < end, other=float("-inf")).to(tl.float32)
        j = i - shift
        z = off_target(z, j, V, y)
        live = z != float("-inf")
        ahead += tl.sum(per_lane(((z > z_y) | ((z == z_y) & (j < y) & live)).to(tl.int32)), 0)
        live_count += tl.sum(per_lane(live.to(tl.float32)), 0)
        total += tl.sum(per_lane(tl.where(live, z - ref, 0.0)), 0)
    return ahead, live_count, total


@triton.jit
def finish_row(out, stride, correct_ptr, keep, z_ptr, lo, shift, end, V, y, z_y, top, sums, slots, BLOCK: tl.constexpr):
    """The row's Stats from its sums, stored, 0 where ``keep`` is false; those that the callers go on with."""
    s1, s2, s3, s4, s_et, s_t, live = sums
    minus_inf = float("-inf")
    ref = tl.where(top == minus_inf, 0.0, top)
    beaten = z_y <= top
    if ((z_y == top) & (top != minus_inf)) | (s_t == minus_inf):
        ahead, live, s_t = scan_row(z_ptr, lo, shift, end, V, y, z_y, ref, slots, BLOCK)
        beaten = ahead > 0
    alone = s1 == 0.0  # no other entry in the vocabulary: V = 1, or all others at -inf
    beaten = beaten & (alone == 0)
    log_sum = tl.log2(tl.where(alone, 1.0, s1)) * LN2
    d = tl.where(alone, minus_inf, (ref - z_y) + log_sum)
    softplus = log1p_exp(-tl.abs(d))
    log_p = -(tl.maximum(d, 0.0) + softplus)
    log_r1 = -(tl.maximum(-d, 0.0) + softplus)
    u = tl.exp2(-tl.abs(d) * LOG2E)
    big = 1.0 / (1.0 + u)
    r1 = tl.where(d < 0, u * big, big)
    p_y = tl.where(d < 0, big, u * big)
    y_live = (z_y != minus_inf).to(tl.float32)
    n = live + y_live
    total = tl.where(alone, 1.0, s1)
    w = r1 / total
    w2 = w * w
    # log p_j = (z_j - ref) + (log_r1 - log_sum) off target; a row with no other entry has r1 = 0.
    off = tl.where(alone, 0.0, log_r1 - log_sum)
    target_log_p = tl.where(y_live > 0, log_p, 0.0)
    r2 = w2 * s2
    r3 = w2 * w * s3
    r4 = w2 * w2 * s4
    mean_log_p = (s_t + live * off + target_log_p) / n
    tl.store(out, tl.where(keep, log_p, 0.0))
    tl.store(out + stride, tl.where(keep, r1, 0.0))
    tl.store(out + 2 * stride, tl.where(keep, r2, 0.0))
    tl.store(out + 3 * stride, tl.where(keep, mean_log_p, 0.0))
    tl.store(out + 5 * stride, tl.where(keep, r3, 0.0))
    tl.store(out + 6 * stride, tl.where(keep, r4, 0.0))
    tl.store(out + 7 * stride, tl.where(keep, -(w * s_et + r1 * off + p_y * target_log_p), 0.0))
    tl.store(out + 8 * stride, tl.where(keep, tl.maximum(p_y, w), 0.0))
    tl.store(out + 9 * stride, tl.where(keep, n, 0.0))
    tl.store(out + 10 * stride, tl.where(keep, p_y, 0.0))
    tl.store(out + 13 * stride, tl.where(keep, ref, 0.0))
    tl.store(out + 14 * stride, tl.where(keep, total, 0.0))
    tl.store(correct_ptr, (beaten == 0) & keep)
    return ref, w, log_p, r1, p_y, n, r2, r3, r4, mean_log_p, off, target_log_p, y_live


@triton.jit
def online_sums(z_ptr, lo, shift, end, V, y, slots, K: tl.constexpr, R: tl.constexpr, W: tl.constexpr):
    """One pass over a row: its maximum, and the sums relative to it."""
    BLOCK: tl.constexpr = K * R * W
    minus_inf = float("-inf")
    zero = tl.zeros([R], tl.float32)
    top = zero + minus_inf
    s1, s2, s3, s4, s_et, s_t, live = zero, zero, zero, zero, zero, zero, zero
    for start in range(0, end, BLOCK):
        i = start + slots
        z = tl.load(z_ptr + lo + i, mask=i < end, other=minus_inf).to(tl.float32)
        broken = is_broken(start, shift, V, y, BLOCK)
        if broken:
            z = off_target(z, i - shift, V, y)
        new_top = tl.maximum(top, tl.max(tl.max(z, 2), 0))
        ref = tl.where(new_top == minus_inf, 0.0, new_top)  # -inf - -inf is not a number
        shrink = tl.exp2((top - ref) * LOG2E)
        moved = tl.where(top == minus_inf, 0.0, top - ref)
        shrink2 = shrink * shrink
        s_t += moved * live
        s_et = shrink * (s_et + moved * s1)
        s1 *= shrink
        s2 *= shrink2
        s3 *= shrink2 * shrink
        s4 *= shrink2 * shrink2
        t = z - ref[None, :, None]
        s1, s2, s3, s4, s_et = add_powers(t, tl.maximum(t, T_MIN), s1, s2, s3, s4, s_et)
        part, count = sum_of(t, broken, K, R, W)
        s_t += part
        live += count
        top = new_top
    # The lanes together.
    most = tl.max(top, 0)
    ref = tl.where(most == minus_inf, 0.0, most)
    shrink = tl.exp2((top - ref) * LOG2E)
    moved = tl.where(top == minus_inf, 0.0, top - ref)
    shrink2 = shrink * shrink
    s_et = tl.sum(shrink * (s_et + moved * s1), 0)
    s_t = tl.sum(s_t + moved * live, 0)
    s3, s4 = tl.sum(shrink2 * shrink * s3, 0), tl.sum(shrink2 * shrink2 * s4, 0)
    return most, (tl.sum(shrink * s1, 0), tl.sum(shrink2 * s2, 0), s3, s4, s_et, s_t, tl.sum(live, 0))


@triton.jit
def store_row(out_ptr, lo, start, slots, shift, V, g, broken, W: tl.constexpr):
    """g over the block of slots at ``start``: whole vectors at once, and in a broken block the rest one by one."""
    # Relative to the block, so that all blocks share the lane's few slot numbers.
    first = tl.multiple_of((shift > 0).to(tl.int32) * W - start, W)
    last = tl.multiple_of((shift + V) // W * W - start, W)
    whole = (slots >= first) & (slots < last)
    tl.store(out_ptr + lo + start + slots, g, mask=whole)
    if W > 1:
        if broken:
            inside = (slots >= shift - start) & (slots < shift + V - start)
            tl.store(out_ptr + lo + start + slots, g, mask=inside & (whole == 0))


@triton.jit
def unpacked(z, zero, PACKED: tl.constexpr):
    """z in fp32. PACKED, for bf16: two at a time by a byte permutation whose selectors contain ``zero``, a 0
    that the compiler does not know to be one, so that it cannot keep what another pass has unpacked."""
    if PACKED:
        bits = tl.inline_asm_elementwise(
            "prmt.b32 $0, $2, 0, $4; prmt.b32 $1, $2, 0, $5;",
            "=r,=r,r,r,r,r,r",
            [z, zero + 0x1044, zero + 0x3244],
            dtype=tl.int32,
            is_pure=True,
            pack=2,
        )
        return bits.to(tl.float32, bitcast=True)
    return z.to(tl.float32)


@triton.jit
def held_piece(z, zero, slots, shift, V, y, at_end: tl.constexpr, PACKED: tl.constexpr):
    """A piece of a row in fp32, -inf at the target and, where it can reach beyond the row, outside of it.
    Done anew at each use: an unpacked copy would take twice the registers."""
    z = unpacked(z, zero, PACKED)
    if at_end:
        z = tl.where((slots >= shift) & (slots < shift + V), z, float("-inf"))
    return tl.where(slots == shift + y, float("-inf"), z)


@triton.jit
def gradient_of(z, ref, aw, cw, b, on, HAS_B: tl.constexpr):
    """e (aw + cw e) + b with e = exp(z - ref), 0 unless ``on``. The target's place is for the caller to fill."""
    e = tl.exp2((z - ref) * LOG2E)
    g = e * (aw + cw * e)
    if HAS_B:
        g += tl.where(z != float("-inf"), b, 0.0)
    return tl.where(on, g, 0.0)
