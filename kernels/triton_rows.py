"""What the Triton kernels do with one row: where it lies in memory, its sums, its Stats, its gradient.

A lane reads a row in vectors of 16 bytes, as [R, 4] words of 32 bits; a word is one fp32 logit or two of 16 bits. For
a vector that is not its own it has FILL, whose exponential is 0. ``edge`` takes the vectors that hold the target, or
begin or end outside of the row: at most three, an element a lane.

Three tuples go from function to function:

    at      (origin, shift, first, last, ty), where a row lies, as ``place`` says
    lanes   (top, count, sums) of each lane: its maximum, the number of its entries, and their sums as ``add_term``
    found   (top, sums, live, beaten) of the row, as ``careful_sums`` says

Two more say what the softmax and the sums are of: ``link`` (scale, softcap), which counts as LINK says, and ``g``, the
order, which counts with ORDER.
"""

import triton
import triton.language as tl

USUAL = tl.constexpr("")  # no hint to the cache
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
FILL = tl.constexpr(-(2.0**120))  # finite, also as a sum of many times LOG2E
FILL_BF16_TWICE = tl.constexpr(-0x047F0480)  # the same in both halves of a word, 0xFB80FB80
FILL_FP16_TWICE = tl.constexpr(-0x04000401)  # -65504 in both, 0xFBFFFBFF
# The rows of moments.Stats, in their order.
LOG_P, R1, R2, MEAN_LOG_P, TAIL_LOG_P, ENTROPY, LSE, S = (tl.constexpr(i) for i in range(8))
R3, R4, CONFIDENCE, SUPPORT = (tl.constexpr(i) for i in range(8, 12))
P_Y, TAIL_COUNT, TAIL_OFF, ROW_MAX, ROW_SUM = (tl.constexpr(i) for i in range(12, 17))
NO_TOP = tl.constexpr(-65300.0)  # a maximum up to here may be a FILL, or so near to one that its exponential counts


SCALED, CAPPED = tl.constexpr(1), tl.constexpr(2)  # LINK: the scale alone, or a softcap


@triton.jit
def linked(z, link, LINK: tl.constexpr, FILLS: tl.constexpr):
    """The softmax's logits, scale z or softcap tanh(scale z / softcap). -inf stays; with FILLS whatever is so low that
    it may be a FILL is one, and ``needs_care`` finds the row if it was none."""
    if LINK:
        scale, softcap = link
        if LINK == CAPPED:
            x = z * (scale / softcap)
            u = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
            t = (1.0 - u) / (1.0 + u)
            shaped = tl.where(x < 0, -softcap * t, softcap * t)
        else:
            shaped = z * scale
        if FILLS:
            z = tl.where(z <= NO_TOP, FILL, shaped)
        else:
            z = tl.where(z == float("-inf"), z, shaped)
    return z


@triton.jit
def slope_of(z, link):
    """d linked / d (scale z) under a softcap: 1 - tanh^2 without cancellation."""
    u = tl.exp2(tl.abs(z * (link[0] / link[1])) * (-2.0 * LOG2E))
    return 4.0 * u / ((1.0 + u) * (1.0 + u))


@triton.jit
def log1p_exp(x):
    """log(1 + exp(x)) for x <= 0 to full relative precision: 2 atanh(u / (2 + u)) by its series, the argument at most
    1/3, the first term left out below 2e-9 of the sum. The hardware's log has an absolute error of 2e-7 near 1."""
    u = tl.exp2(x * LOG2E)
    s = u / (2.0 + u)
    t = s * s
    series = 1.0 / 15 + t * (1.0 / 17)
    for k in tl.static_range(6):
        series = 1.0 / (13 - 2 * k) + t * series
    return 2.0 * s * (1.0 + t * series)


@triton.jit
def place(row, stride, V, y, W: tl.constexpr):
    """Where a row lies, in vectors of W elements. It starts ``shift`` elements after vector ``origin`` of the tensor.
    Counted from there its whole vectors are first ... last - 1, and the target is in vector ty."""
    start = row * stride
    origin = start // W
    shift = (start - origin * W).to(tl.int32)
    return origin, shift, (shift > 0).to(tl.int32), (shift + V) // W, (shift + y) // W


@triton.jit
def edge(ptr, at, V, y, R: tl.constexpr, W: tl.constexpr):
    """(z, places, mine, off), [R]: the elements of the vectors that are not whole or hold the target, one a lane (R is
    at least 3 W); their places in the tensor; whether there is one, and whether it is another than the target."""
    origin, shift, first, last, ty = at
    lane = tl.arange(0, R)
    which = lane // W
    vector = tl.where(which == 0, 0, tl.where(which == 1, ty, last))
    slot = vector * W + lane % W
    # Only comparisons of blocks: the interpreter takes no mask that was a scalar's.
    mine = (which == 1) | ((which < first) & (which < ty)) | ((which == 2) & (vector != ty))
    mine = mine & (slot >= shift) & (slot < shift + V)
    off = mine & (slot != shift + y)
    places = origin * W + slot
    z = tl.load(ptr + places, mask=off, other=0.0).to(tl.float32)
    return tl.where(off, z, FILL), places, mine, off


@triton.jit
def is_whole(v, at, START: tl.constexpr, END: tl.constexpr):
    """Whether vectors v are whole and without the target; START, END: whether the row's ends are among them."""
    _origin, _shift, first, last, ty = at
    live = v != ty
    if START:
        live = live & (v >= first)
    if END:
        live = live & (v < last)
    return live


@triton.jit
def entries_of(lane, upto, at, R: tl.constexpr, W: tl.constexpr):
    """How many entries a lane has in whole vectors up to ``upto``, of which it has every R-th."""
    _origin, _shift, first, _last, ty = at
    vectors = (tl.maximum(upto - lane, 0) + R - 1) // R
    vectors -= ((lane == 0) & (first > 0) & (upto > 0)).to(tl.int32)
    vectors -= ((ty >= first) & (ty < upto) & (ty % R == lane)).to(tl.int32)
    return (vectors * W).to(tl.float32)


@triton.jit
def places_of(ptr, at, v, W: tl.constexpr):
    """[R, W]: pointers to the elements of vectors v, W in each."""
    return ptr + tl.multiple_of(at[0] * W, W) + (v * W)[:, None] + tl.arange(0, W)[None, :]


@triton.jit
def words_of(ptr, at, v):
    return places_of(ptr.to(tl.pointer_type(tl.int32)), at, v, 4)


@triton.jit
def load_words(ptr, at, v, live, EVICT: tl.constexpr = USUAL):
    """[R, 4] words, FILL where not ``live``. EVICT: Triton's hint to the cache."""
    if ptr.dtype.element_ty == tl.float32:
        fill = tl.full([], FILL, tl.float32).to(tl.int32, bitcast=True)
    elif ptr.dtype.element_ty == tl.bfloat16:
        fill = FILL_BF16_TWICE
    else:
        fill = FILL_FP16_TWICE
    return tl.load(words_of(ptr, at, v), mask=live[:, None], other=fill, eviction_policy=EVICT)


@triton.jit
def load_eight(ptr, at, begin, R: tl.constexpr, START: tl.constexpr, END: tl.constexpr, EVICT: tl.constexpr):
    """``load_words`` of 8 R vectors from ``begin`` on, those of R at a time, by one load.

    For each load and store Triton (3.6 to 3.9) looks at the whole kernel anew: with a load a vector score_kernel takes
    half as long again to compile, to the same machine code."""
    v = begin + tl.arange(0, 8 * R)
    words = load_words(ptr, at, v, is_whole(v, at, START, END), EVICT)
    words = tl.permute(tl.reshape(words, [8, R, 4]), [1, 2, 0])
    even, odd = tl.split(tl.reshape(words, [R, 4, 4, 2]))
    first, third = tl.split(tl.reshape(even, [R, 4, 2, 2]))
    second, fourth = tl.split(tl.reshape(odd, [R, 4, 2, 2]))
    w0, w4 = tl.split(first)
    w1, w5 = tl.split(second)
    w2, w6 = tl.split(third)
    w3, w7 = tl.split(fourth)
    return w0, w1, w2, w3, w4, w5, w6, w7


@triton.jit
def part_of(word, half: tl.constexpr, zero, DTYPE: tl.constexpr):
    """The logits in one half of the words, in fp32; of fp32 words the whole. ``zero`` is a 0 of which the compiler does
    not know: it would otherwise keep what another pass over the words has unpacked, in twice the registers."""
    if DTYPE == tl.float16:
        z = (word >> (16 * half + zero)).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        if DTYPE == tl.bfloat16:
            word = word << (16 + zero) if half == 0 else word & (zero - 65536)
        z = word.to(tl.float32, bitcast=True)
    return z


@triton.jit
def store_words(ptr, at, v, live, low, high, EVICT: tl.constexpr = USUAL):
    """[R, 4] values of the words' halves (fp32: of the words, ``low``) over whole vectors."""
    if ptr.dtype.element_ty == tl.float32:
        tl.store(places_of(ptr, at, v, 4), low, mask=live[:, None], eviction_policy=EVICT)
    else:
        g = tl.reshape(tl.join(low, high).to(ptr.dtype.element_ty), [low.shape[0], 8])
        tl.store(places_of(ptr, at, v, 8), g, mask=live[:, None], eviction_policy=EVICT)


@triton.jit
def top_of(words, COUNT: tl.constexpr, R: tl.constexpr, DTYPE: tl.constexpr, PACKED: tl.constexpr):
    """[R]: the maximum of each lane's COUNT words; PACKED: two bf16 in one instruction."""
    if PACKED:
        most = tl.full([R, 4], FILL_BF16_TWICE, tl.int32)
        for k in tl.static_range(COUNT):
            most = tl.inline_asm_elementwise(
                "max.bf16x2 $0, $1, $2;", "=r,r,r", [most, words[k]], dtype=tl.int32, is_pure=True, pack=1
            )
        best = tl.maximum(part_of(most, 0, 0, DTYPE), part_of(most, 1, 0, DTYPE))
    else:
        best = tl.full([R, 4], FILL, tl.float32)
        for k in tl.static_range(COUNT):
            for half in tl.static_range(1 if DTYPE == tl.float32 else 2):
                best = tl.maximum(best, part_of(words[k], half, 0, DTYPE))
    return tl.max(best, 1)


@triton.jit
def base_of(top):
    """What exponents of two are relative to: an integer, so that sums move to another maximum without rounding."""
    return tl.floor(top * LOG2E)


@triton.jit
def add_term(z, base, sums, g, ORDER: tl.constexpr):
    """Adds e^k, k = 1 ... 4, e x, and x to the sums, with x = z LOG2E - base and e = 2^x. With ORDER e^(g+1) and e^(2g)
    are in the places of e^3 and e^4, and the last sum is of e^g."""
    s1, s2, s3, s4, s_ex, s_x, s_g = sums
    x = tl.fma(z, LOG2E, -base)
    e = tl.exp2(x)
    e2 = e * e
    if ORDER:
        power = tl.exp2(x * g)
        s_g += power
        s3, s4 = tl.fma(power, e, s3), tl.fma(power, power, s4)
    else:
        s3, s4 = tl.fma(e2, e, s3), tl.fma(e2, e2, s4)
    return s1 + e, s2 + e2, s3, s4, tl.fma(e, x, s_ex), s_x + x, s_g


@triton.jit
def add_word(
    word, live, base, zero, sums, link, g, R: tl.constexpr, DTYPE: tl.constexpr, LINK: tl.constexpr, ORDER: tl.constexpr
):
    """``add_term`` for [R, 4] words, to sums of [R, 2]; x counts only where ``live``."""
    s1, s2, s3, s4, s_ex, s_x, s_g = sums
    part = tl.zeros([R, 2], tl.float32)
    left, right = tl.split(tl.reshape(word, [R, 2, 2]))
    base = base[:, None]
    for half in tl.static_range(1 if DTYPE == tl.float32 else 2):
        z = linked(part_of(left, half, zero, DTYPE), link, LINK, True)
        s1, s2, s3, s4, s_ex, part, s_g = add_term(z, base, (s1, s2, s3, s4, s_ex, part, s_g), g, ORDER)
        z = linked(part_of(right, half, zero, DTYPE), link, LINK, True)
        s1, s2, s3, s4, s_ex, part, s_g = add_term(z, base, (s1, s2, s3, s4, s_ex, part, s_g), g, ORDER)
    return s1, s2, s3, s4, s_ex, s_x + tl.where(live, tl.sum(part, 1), 0.0), s_g


@triton.jit
def no_sums(R: tl.constexpr):
    none = tl.zeros([R, 2], tl.float32)
    return none, none, none, none, none, tl.zeros([R], tl.float32), none


@triton.jit
def rescaled(sums, count, moved, g, ORDER: tl.constexpr):
    """Sums relative to another base: the old less the new is ``moved``, at most 0."""
    s1, s2, s3, s4, s_ex, s_x, s_g = sums
    shrink = tl.exp2(moved)
    shrink2 = shrink * shrink
    # In this order, as a lane without entries has moved = -2^120, and 0 for its count and for shrink.
    s_ex = tl.fma(shrink * moved, s1, shrink * s_ex)
    if ORDER:
        power = tl.exp2(moved * g)
        s3, s4, s_g = power * shrink * s3, power * power * s4, power * s_g
    else:
        s3, s4 = shrink2 * shrink * s3, shrink2 * shrink2 * s4
    return shrink * s1, shrink2 * s2, s3, s4, s_ex, tl.fma(moved, count, s_x), s_g


@triton.jit
def per_lane(words):
    """[R]: sums of [R, 2] added up."""
    s1, s2, s3, s4, s_ex, s_x, s_g = words
    return tl.sum(s1, 1), tl.sum(s2, 1), tl.sum(s3, 1), tl.sum(s4, 1), tl.sum(s_ex, 1), s_x, tl.sum(s_g, 1)


@triton.jit
def added(a, b):
    return a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3], a[4] + b[4], a[5] + b[5], a[6] + b[6]


@triton.jit
def no_sums_a_lane(R: tl.constexpr):
    none = tl.zeros([R], tl.float32)
    return none, none, none, none, none, none, none


@triton.jit
def add_edge(lanes, z, off, g, R: tl.constexpr, ORDER: tl.constexpr):
    """``lanes`` with one entry more, the softmax's logit z, where ``off``."""
    top, count, sums = lanes
    new_top = tl.maximum(top, z)
    base = base_of(new_top)
    s1, s2, s3, s4, s_ex, s_x, s_g = add_term(z, base, no_sums_a_lane(R), g, ORDER)
    one = off.to(tl.float32)
    sums = rescaled(sums, count, base_of(top) - base, g, ORDER)
    new = s1 * one, s2 * one, s3 * one, s4 * one, s_ex * one, s_x * one, s_g * one
    return new_top, count + one, added(sums, new)


@triton.jit
def add_blocks(
    ptr,
    at,
    begin,
    lanes,
    link,
    g,
    K: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
    PACKED: tl.constexpr,
    STAGES: tl.constexpr,
    LINK: tl.constexpr,
    ORDER: tl.constexpr,
    EVICT: tl.constexpr = USUAL,
):
    """``lanes`` with the row's vectors from ``begin`` on, K a lane at a time, in a loop of STAGES."""
    DTYPE: tl.constexpr = ptr.dtype.element_ty
    top, count, sums = lanes
    lane = tl.arange(0, R)
    for start in tl.range(begin, at[3], K * R, num_stages=STAGES):
        words = ()
        for k in tl.static_range(K):
            v = start + k * R + lane
            words = words + (load_words(ptr, at, v, is_whole(v, at, True, True), EVICT),)
        new_top = tl.maximum(top, linked(top_of(words, K, R, DTYPE, PACKED), link, LINK, True))
        base = base_of(new_top)
        sums = rescaled(sums, count, base_of(top) - base, g, ORDER)
        fresh = no_sums(R)
        for k in tl.static_range(K):
            v = start + k * R + lane
            live = is_whole(v, at, True, True)
            fresh = add_word(words[k], live, base, 0, fresh, link, g, R, DTYPE, LINK, ORDER)
            count += tl.where(live, W * 1.0, 0.0)
        sums = added(sums, per_lane(fresh))
        top = new_top
    return top, count, sums


@triton.jit
def over_lanes(lanes, g, ORDER: tl.constexpr):
    """(maximum, sums) of the row: of exp(t)^k, exp(t) t and t, with t = z - maximum, and of exp(t)^g."""
    top, count, sums = lanes
    most = tl.max(top, 0)
    s1, s2, s3, s4, s_ex, s_x, s_g = rescaled(sums, count, tl.fma(-most, LOG2E, base_of(top)), g, ORDER)
    # One sum of all: each by itself would wait for the other warps, and have the assembler spill.
    low, high = tl.join(tl.join(s1, s2), tl.join(s3, s4)), tl.join(tl.join(s_ex, s_x), tl.join(s_g, s_g))
    low, high = tl.split(tl.sum(tl.join(low, high), 0))
    first, second = tl.split(low)
    third, fourth = tl.split(high)
    s1, s2 = tl.split(first)
    s3, s4 = tl.split(second)
    s_ex, s_x = tl.split(third)
    s_g, _s_g = tl.split(fourth)
    return most, (s1, s2, s3, s4, s_ex * LN2, s_x * LN2, s_g)


@triton.jit
def element(ptr, at, v, half: tl.constexpr, V, y, W: tl.constexpr):
    """(z, j), [R, 4]: entries of vectors that need not be whole, -inf outside of the row and at the target, and their
    places in the row."""
    shift = at[1]
    word = tl.load(words_of(ptr, at, v), mask=(v * W < shift + V)[:, None], other=0)
    j = (v * W)[:, None] + tl.arange(0, 4)[None, :] * (W // 4) + half - shift
    z = part_of(word, half, 0, ptr.dtype.element_ty)
    return tl.where((j >= 0) & (j < V) & (j != y), z, float("-inf")), j


@triton.jit
def careful_sums(
    ptr, at, V, y, z_y, keep, link, g, R: tl.constexpr, W: tl.constexpr, LINK: tl.constexpr, ORDER: tl.constexpr
):
    """(maximum, sums as ``over_lanes``, number of live entries, whether one beats the target or ties it from before it)
    of a row where any entry may be infinite, in two passes. Nothing is read unless ``keep``."""
    lane = tl.arange(0, R)
    minus_inf = float("-inf")
    end = tl.where(keep, at[3] + 1, 0)
    best = tl.full([R], minus_inf, tl.float32)
    for start in range(0, end, R):
        for half in tl.static_range(W // 4):
            z, _j = element(ptr, at, start + lane, half, V, y, W)
            best = tl.maximum(best, tl.max(linked(z, link, LINK, False), 1))
    top = tl.max(best, 0)
    ref = tl.where(top == minus_inf, 0.0, top)
    sums, count = no_sums_a_lane(R), tl.zeros([R], tl.float32)
    ahead = tl.zeros([R], tl.int32)
    for start in range(0, end, R):
        for half in tl.static_range(W // 4):
            z, j = element(ptr, at, start + lane, half, V, y, W)
            z = linked(z, link, LINK, False)
            live = z != minus_inf
            t = tl.where(live, z - ref, 0.0)
            e = tl.where(live, tl.exp2(t * LOG2E), 0.0)
            e2 = e * e
            third, fourth, power = e2 * e, e2 * e2, e2
            if ORDER:
                power = tl.where(live, tl.exp2(t * LOG2E * g), 0.0)
                third, fourth = power * e, power * power
            powers = tl.sum(e, 1), tl.sum(e2, 1), tl.sum(third, 1), tl.sum(fourth, 1)
            sums = added(sums, powers + (tl.sum(e * t, 1), tl.sum(t, 1), tl.sum(power, 1)))
            count += tl.sum(live.to(tl.float32), 1)
            ahead += tl.sum(((z > z_y) | ((z == z_y) & (j < y) & live)).to(tl.int32), 1)
    s1, s2, s3, s4, s_et, s_t, s_g = sums
    powers = tl.sum(s1, 0), tl.sum(s2, 0), tl.sum(s3, 0), tl.sum(s4, 0)
    sums = powers + (tl.sum(s_et, 0), tl.sum(s_t, 0), tl.sum(s_g, 0))
    return top, sums, tl.sum(count, 0), tl.sum(ahead, 0) > 0


@triton.jit
def tied_before(ptr, at, V, y, z_y, link, R: tl.constexpr, W: tl.constexpr, LINK: tl.constexpr):
    """Whether an entry before the target equals it. Reads the row up to there once more."""
    lane = tl.arange(0, R)
    ties = tl.zeros([R], tl.int32)
    for start in range(0, at[4] + 1, R):
        for half in tl.static_range(W // 4):
            z, j = element(ptr, at, start + lane, half, V, y, W)
            ties = tl.maximum(ties, tl.max(((linked(z, link, LINK, False) == z_y) & (j < y)).to(tl.int32), 1))
    return tl.max(ties, 0) > 0


@triton.jit
def needs_care(top, s_t, LINK: tl.constexpr):
    """Whether there may be entries that are not finite, or none at all."""
    # Not s_t - s_t: the compiler fuses it with the product that s_t is, and the difference is what that one rounded.
    rare = (tl.abs(s_t) < float("inf")) == 0
    rare = rare | (top <= NO_TOP)
    if LINK:
        rare = rare | (s_t < FILL / 2)  # an entry that ``linked`` took for a FILL
    return rare


@triton.jit
def put(to, STAT: tl.constexpr, keep, value):
    tl.store(to[0] + STAT * to[1], tl.where(keep, value, 0.0))


@triton.jit
def first_place(ptr, at, V, y, z_y, top, link, R: tl.constexpr, W: tl.constexpr, LINK: tl.constexpr):
    """The place of the row's maximum, of which that off target is ``top``; the first of several. One more read."""
    lane = tl.arange(0, R)
    first = tl.full([R], 2147483647, tl.int32)
    for start in range(0, at[3] + 1, R):
        for half in tl.static_range(W // 4):
            z, j = element(ptr, at, start + lane, half, V, y, W)
            j = tl.where((linked(z, link, LINK, False) == top) & (j >= 0) & (j < V) & (j != y), j, 2147483647)
            first = tl.minimum(first, tl.min(j, 1))
    j = tl.min(first, 0)
    return tl.where((z_y > top) | ((z_y == top) & (y < j)), y, j).to(tl.int64)


@triton.jit
def finish_row(to, keep, z_y, found, g, ORDER: tl.constexpr):
    """Stores the row's Stats, 0 where ``keep`` is false, in ``to``: (stats, their stride, correct).

    Returns (moments, ref, (w, w^g), rest). Moments are (log_p, r1, r2, r3, r4, mean_log_p, p_y, n, s, entropy), with n
    entries above -inf, and s = r2 without ORDER. Off target p_j = w exp(z_j - ref) and log p_j = z_j - ref + rest[0].
    The target's log_p, 0 where it is -inf, is rest[1], and whether it is above -inf, rest[2]."""
    top, sums, live, beaten = found
    minus_inf = float("-inf")
    s1, s2, s3, s4, s_et, s_t, s_g = sums
    ref = tl.where(top == minus_inf, 0.0, top)
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
    if ORDER:
        power = tl.where(alone, 0.0, tl.exp2(g * LOG2E * off))
        s, r3, r4 = power * s_g, power * w * s3, power * power * s4
    else:
        power = w2
        s, r3, r4 = r2, w2 * w * s3, w2 * w2 * s4
    mean_log_p = (s_t + live * off + target_log_p) / n
    entropy = -(w * s_et + r1 * off + p_y * target_log_p)
    put(to, LOG_P, keep, log_p)
    put(to, R1, keep, r1)
    put(to, R2, keep, r2)
    put(to, MEAN_LOG_P, keep, mean_log_p)
    put(to, ENTROPY, keep, entropy)
    put(to, LSE, keep, tl.where(y_live > 0, z_y - log_p, ref + log_sum))
    if ORDER:
        put(to, S, keep, s)
    put(to, R3, keep, r3)
    put(to, R4, keep, r4)
    put(to, CONFIDENCE, keep, tl.maximum(p_y, w))
    put(to, SUPPORT, keep, n)
    put(to, P_Y, keep, p_y)
    put(to, ROW_MAX, keep, ref)
    put(to, ROW_SUM, keep, total)
    tl.store(to[2], (beaten == 0) & keep)
    return (log_p, r1, r2, r3, r4, mean_log_p, p_y, n, s, entropy), ref, (w, power), (off, target_log_p, y_live)


@triton.jit
def gradient_of(x, rule, g, HAS_B: tl.constexpr, ORDER: tl.constexpr):
    """e (a + c e) + b with e = 2^x and ``rule`` (a, c, b); with ORDER a e + c e^g + b."""
    a, c, b = rule
    e = tl.exp2(x)
    if ORDER:
        found = tl.fma(c, tl.exp2(x * g), e * a)
    else:
        found = e * tl.fma(c, e, a)
    if HAS_B:
        found += b
    return found


@triton.jit
def gradient_at(z, base, rule, link, g, HAS_B: tl.constexpr, LINK: tl.constexpr, ORDER: tl.constexpr):
    """``gradient_of`` a logit as it was given, without a softcap, x relative to ``base``."""
    return gradient_of(tl.fma(linked(z, link, LINK, True), LOG2E, -base), rule, g, HAS_B, ORDER)


@triton.jit
def store_gradient(
    ptr,
    at,
    v,
    live,
    word,
    zero,
    base,
    rule,
    link,
    g,
    HAS_B: tl.constexpr,
    LINK: tl.constexpr,
    ORDER: tl.constexpr,
    EVICT: tl.constexpr,
):
    """``gradient_at`` the logits in [R, 4] words, over whole vectors of the same dtype."""
    DTYPE: tl.constexpr = ptr.dtype.element_ty
    low = gradient_at(part_of(word, 0, zero, DTYPE), base, rule, link, g, HAS_B, LINK, ORDER)
    high = gradient_at(part_of(word, 1, zero, DTYPE), base, rule, link, g, HAS_B, LINK, ORDER)
    store_words(ptr, at, v, live, low, high, EVICT)
