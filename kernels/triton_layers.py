"""RMSNorm with the residual's sum, rotary positions with the norm of each head, and SwiGLU as Triton kernels.

A program has a tile of ROWS whole rows, BLOCK elements each. Values are read once and computed in fp32; each result is
rounded once. The norms' backward computes 1 / sqrt(mean(x^2) + eps) again, as it has the row anyway. For a gain that
trains, PROGRAMS programs go over all rows, each with a sum of its own; torch adds these up.

No constant here has been measured on a device yet.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

LANE = 16  # elements of each tensor that a lane has, two vectors of bf16, where a row is not too long for that
WARPS = 4, 16  # of a program: fewest and most
ROWS_VARY = ["N", "positions"]  # arguments that change from batch to batch: no value of theirs compiles anew
PROGRAMS = 528  # that sum a gain's gradient: 4 for each of 132 multiprocessors


@triton.jit(do_not_specialize=ROWS_VARY)
def norm_kernel(
    x_ptr, delta_ptr, gain_ptr, y_ptr, s_ptr, N, eps, D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """s = x + delta, in their dtype, and y = s / sqrt(mean(s^2) + eps) * gain, of [N, D]. Without delta s is x."""
    places, inside = tile(tl.program_id(0) * ROWS, N, D, D, ROWS, BLOCK)
    s = tl.load(x_ptr + places, mask=inside, other=0.0).to(tl.float32)
    if delta_ptr is not None:
        s += tl.load(delta_ptr + places, mask=inside, other=0.0).to(tl.float32)
        rounded = s.to(s_ptr.dtype.element_ty)
        tl.store(s_ptr + places, rounded, mask=inside)
        s = rounded.to(tl.float32)
    y = s * tl.rsqrt(tl.sum(s * s, 1) / D + eps)[:, None] * vector(gain_ptr, D, BLOCK)
    tl.store(y_ptr + places, y, mask=inside)


@triton.jit(do_not_specialize=ROWS_VARY)
def norm_backward_kernel(
    dy_ptr, ds_ptr, s_ptr, gain_ptr, out_ptr, sums_ptr, N, eps, D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """out = the gradient of s through y, plus ds where there is one. ``sums`` [programs, D] fp32 or None: each
    program's part of the gain's gradient."""
    gain = vector(gain_ptr, D, BLOCK)
    if sums_ptr is None:
        norm_backward_tile(dy_ptr, ds_ptr, s_ptr, gain, out_ptr, tl.program_id(0) * ROWS, N, eps, D, ROWS, BLOCK)
    else:
        total = tl.zeros([ROWS, BLOCK], tl.float32)
        for start in tl.range(tl.program_id(0) * ROWS, N, tl.num_programs(0) * ROWS, num_stages=1):
            total += norm_backward_tile(dy_ptr, ds_ptr, s_ptr, gain, out_ptr, start, N, eps, D, ROWS, BLOCK)
        store_sum(sums_ptr + tl.program_id(0) * D, total, D, BLOCK)


@triton.jit
def norm_backward_tile(
    dy_ptr, ds_ptr, s_ptr, gain, out_ptr, start, N, eps, D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """The rows from ``start``. With n = s / sqrt(mean(s^2) + eps) and w = dy gain, out = (w - n mean(w n)) / sqrt(...)
    + ds. Returns dy n, what the gain's gradient is the sum of."""
    places, inside = tile(start, N, D, D, ROWS, BLOCK)
    dy = tl.load(dy_ptr + places, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(s_ptr + places, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(s * s, 1) / D + eps)[:, None]
    n, w = s * scale, dy * gain
    out = scale * (w - n * (tl.sum(w * n, 1) / D)[:, None])
    if ds_ptr is not None:
        out += tl.load(ds_ptr + places, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + places, out, mask=inside)
    return dy * n


@triton.jit(do_not_specialize=ROWS_VARY)
def rope_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    gain_ptr,
    y_ptr,
    N,
    positions,
    eps,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x [N, D], HEADS rows a position, normed where there is a gain [D], and turned: component i with i + D/2.

    cos and sin are [positions, D/2]; where the rows have more positions, those begin anew. BLOCK is at least D/2."""
    start = tl.program_id(0) * ROWS
    places, inside = tile(start, N, D, D // 2, ROWS, BLOCK)
    a = tl.load(x_ptr + places, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + places + D // 2, mask=inside, other=0.0).to(tl.float32)
    if gain_ptr is not None:
        scale = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / D + eps)[:, None]
        a = a * scale * vector(gain_ptr, D // 2, BLOCK)
        b = b * scale * vector(gain_ptr + D // 2, D // 2, BLOCK)
    cos, sin = turns(cos_ptr, sin_ptr, start, positions, inside, HEADS, D // 2, ROWS, BLOCK)
    tl.store(y_ptr + places, a * cos - b * sin, mask=inside)
    tl.store(y_ptr + places + D // 2, b * cos + a * sin, mask=inside)


@triton.jit(do_not_specialize=ROWS_VARY)
def rope_backward_kernel(
    dy_ptr,
    x_ptr,
    cos_ptr,
    sin_ptr,
    gain_ptr,
    out_ptr,
    sums_ptr,
    N,
    positions,
    eps,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = the gradient of x; ``sums`` [programs, D] as in ``norm_backward_kernel``. x and eps are read where there is
    a gain."""
    H: tl.constexpr = D // 2
    gains = None, None
    if gain_ptr is not None:
        gains = vector(gain_ptr, H, BLOCK), vector(gain_ptr + H, H, BLOCK)
    pointers = dy_ptr, x_ptr, cos_ptr, sin_ptr, out_ptr
    if sums_ptr is None:
        rope_backward_tile(pointers, gains, tl.program_id(0) * ROWS, N, positions, eps, HEADS, D, ROWS, BLOCK)
    else:
        total_a = tl.zeros([ROWS, BLOCK], tl.float32)
        total_b = tl.zeros([ROWS, BLOCK], tl.float32)
        for start in tl.range(tl.program_id(0) * ROWS, N, tl.num_programs(0) * ROWS, num_stages=1):
            a, b = rope_backward_tile(pointers, gains, start, N, positions, eps, HEADS, D, ROWS, BLOCK)
            total_a += a
            total_b += b
        store_sum(sums_ptr + tl.program_id(0) * D, total_a, H, BLOCK)
        store_sum(sums_ptr + tl.program_id(0) * D + H, total_b, H, BLOCK)


@triton.jit
def rope_backward_tile(
    pointers,
    gains,
    start,
    N,
    positions,
    eps,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The rows from ``start``, turned back and then as ``norm_backward_tile``. Returns both halves of dy n, or of dy
    where there is no gain."""
    dy_ptr, x_ptr, cos_ptr, sin_ptr, out_ptr = pointers
    places, inside = tile(start, N, D, D // 2, ROWS, BLOCK)
    dy_a = tl.load(dy_ptr + places, mask=inside, other=0.0).to(tl.float32)
    dy_b = tl.load(dy_ptr + places + D // 2, mask=inside, other=0.0).to(tl.float32)
    cos, sin = turns(cos_ptr, sin_ptr, start, positions, inside, HEADS, D // 2, ROWS, BLOCK)
    a, b = dy_a * cos + dy_b * sin, dy_b * cos - dy_a * sin
    out_a, out_b = a, b
    if gains[0] is not None:
        x_a = tl.load(x_ptr + places, mask=inside, other=0.0).to(tl.float32)
        x_b = tl.load(x_ptr + places + D // 2, mask=inside, other=0.0).to(tl.float32)
        scale = tl.rsqrt((tl.sum(x_a * x_a, 1) + tl.sum(x_b * x_b, 1)) / D + eps)[:, None]
        n_a, n_b = x_a * scale, x_b * scale
        w_a, w_b = a * gains[0], b * gains[1]
        shared = ((tl.sum(w_a * n_a, 1) + tl.sum(w_b * n_b, 1)) / D)[:, None]
        out_a, out_b = scale * (w_a - n_a * shared), scale * (w_b - n_b * shared)
        a, b = a * n_a, b * n_b
    tl.store(out_ptr + places, out_a, mask=inside)
    tl.store(out_ptr + places + D // 2, out_b, mask=inside)
    return a, b


@triton.jit
def swiglu_kernel(gate_ptr, up_ptr, y_ptr, N, BLOCK: tl.constexpr):
    """silu(gate) * up of N elements."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < N
    gate = tl.load(gate_ptr + places, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + places, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + places, gate * tl.sigmoid(gate) * up, mask=inside)


@triton.jit
def swiglu_backward_kernel(dy_ptr, gate_ptr, up_ptr, d_gate_ptr, d_up_ptr, N, BLOCK: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < N
    dy = tl.load(dy_ptr + places, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + places, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + places, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    tl.store(d_gate_ptr + places, dy * up * share * (1 + gate * (1 - share)), mask=inside)
    tl.store(d_up_ptr + places, dy * gate * share, mask=inside)


@triton.jit
def tile(start, N, STRIDE: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """(places, inside), [ROWS, BLOCK]: of the first D elements of rows that are STRIDE apart, from row ``start``."""
    rows, columns = start + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    places = rows.to(tl.int64)[:, None] * STRIDE + columns[None, :]
    return places, (rows < N)[:, None] & (columns < D)[None, :]


@triton.jit
def vector(ptr, D: tl.constexpr, BLOCK: tl.constexpr):
    """[1, BLOCK] fp32, 0 from D on."""
    columns = tl.arange(0, BLOCK)
    return tl.load(ptr + columns, mask=columns < D, other=0.0).to(tl.float32)[None, :]


@triton.jit
def store_sum(ptr, total, D: tl.constexpr, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    tl.store(ptr + columns, tl.sum(total, 0), mask=columns < D)


@triton.jit
def turns(
    cos_ptr,
    sin_ptr,
    start,
    positions,
    inside,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Cosines and sines of the rows from ``start``, [ROWS, BLOCK] fp32."""
    at = (start + tl.arange(0, ROWS)) // HEADS % positions
    places = at.to(tl.int64)[:, None] * HALF + tl.arange(0, BLOCK)[None, :]
    cos = tl.load(cos_ptr + places, mask=inside, other=0.0).to(tl.float32)
    return cos, tl.load(sin_ptr + places, mask=inside, other=0.0).to(tl.float32)


def norm(x: Tensor, delta: Tensor | None, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(y, s) of contiguous x and delta [..., D]; see layers.rms_norm. Without delta s is x itself."""
    y, s = torch.empty_like(x), x if delta is None else torch.empty_like(x)
    n, d = x.numel() // len(gain), len(gain)
    constants = shape(d)
    _run(norm_kernel, x, _tiles(n, constants), x, delta, gain, y, s, n, eps, D=d, **constants)
    return y, s


def norm_backward(
    dy: Tensor, ds: Tensor | None, s: Tensor, gain: Tensor, eps: float, trains: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradients of s, and of the gain where it ``trains``. All contiguous."""
    out, n, d = torch.empty_like(s), s.numel() // len(gain), len(gain)
    constants = shape(d)
    programs, sums = _sums(_tiles(n, constants), gain, trains)
    _run(norm_backward_kernel, s, programs, dy, ds, s, gain, out, sums, n, eps, D=d, **constants)
    return out, None if sums is None else sums.sum(0).to(gain.dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    """y of x [B, T, heads, K]; see layers.rope. All contiguous."""
    y, constants = torch.empty_like(x), rope_shape(*x.shape[2:])
    n, positions = _rows(x), _rows(cos)
    _run(rope_kernel, x, _tiles(n, constants), x, cos, sin, gain, y, n, positions, eps, **constants)
    return y


def rope_backward(
    dy: Tensor, x: Tensor | None, cos: Tensor, sin: Tensor, gain: Tensor | None, eps: float, trains: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradients of x, and of the gain where it ``trains``. All contiguous; x is for a gain alone."""
    out, constants = torch.empty_like(dy), rope_shape(*dy.shape[2:])
    n, positions = _rows(dy), _rows(cos)
    programs, sums = _sums(_tiles(n, constants), gain, trains)
    arguments = dy, x, cos, sin, gain, out, sums, n, positions, eps
    _run(rope_backward_kernel, dy, programs, *arguments, **constants)
    return out, None if sums is None else sums.sum(0).to(gain.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    y, constants = torch.empty_like(gate), swiglu_shape()
    programs = triton.cdiv(gate.numel(), constants["BLOCK"])
    _run(swiglu_kernel, gate, programs, gate, up, y, gate.numel(), **constants)
    return y


def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    d_gate, d_up, constants = torch.empty_like(gate), torch.empty_like(up), swiglu_shape()
    programs = triton.cdiv(gate.numel(), constants["BLOCK"])
    _run(swiglu_backward_kernel, gate, programs, dy, gate, up, d_gate, d_up, gate.numel(), **constants)
    return d_gate, d_up


@functools.cache  # small models wait for the host
def shape(width: int) -> dict:
    """Launch constants for rows of ``width``."""
    block = triton.next_power_of_2(width)
    warps = max(WARPS[0], min(WARPS[1], block // (32 * LANE)))
    return dict(ROWS=max(1, 32 * warps * LANE // block), BLOCK=block, num_warps=warps)


@functools.cache
def rope_shape(heads: int, width: int) -> dict:
    constants = shape(2 * triton.next_power_of_2(width // 2))  # each half is a block of its own
    return constants | dict(HEADS=heads, D=width, BLOCK=constants["BLOCK"] // 2)


def swiglu_shape() -> dict:
    return dict(BLOCK=32 * WARPS[0] * LANE, num_warps=WARPS[0])


def _rows(x: Tensor) -> int:
    """Of a tensor that may be empty."""
    return x.shape[:-1].numel()


def _tiles(rows: int, constants: dict) -> int:
    return triton.cdiv(rows, constants["ROWS"])


def _sums(tiles: int, gain: Tensor | None, trains: bool) -> tuple[int, Tensor | None]:
    """How many programs go over the tiles, and where they sum the gradient of a gain that trains."""
    if not trains:
        return tiles, None
    programs = min(tiles, PROGRAMS)
    return programs, torch.empty(programs, len(gain), dtype=torch.float32, device=gain.device)


def _run(kernel, like: Tensor, programs: int, *arguments, **constants) -> None:
    if programs:
        with torch.cuda.device_of(like):
            kernel[(programs,)](*arguments, **constants)
