"""gradient_stats' dot products on CUDA: one kernel over all parameters, which reads every number once.

Gradient, both moments and the micro-batch's gradient in bfloat16 take 14 bytes a parameter where a sample begins and
12 where it ends. As separate operations of torch the same sums move 134 and 40, and more for the copies that put small
parameters together. On CPU tensors under TRITON_INTERPRET=1 it runs too.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, LOOPS = 1024, 8  # elements at a time, and times a program: 8192 elements of one parameter
WARPS = 4


@triton.jit
def sums_kernel(
    table_ptr,
    pieces_ptr,
    scalars_ptr,
    out_ptr,
    BEGIN: tl.constexpr,
    MICRO: tl.constexpr,
    BLOCK: tl.constexpr,
    LOOPS: tl.constexpr,
):
    """Row i of ``out``: g'P m and, with BEGIN, the five others of gradient_stats._dots, over piece i.

    ``table``: the addresses of g, m, v and the micro-batch's gradient, and the length, for each parameter. ``pieces``:
    which parameter, and the first element. ``scalars``: eps / s, eps / new_s, and the weight of o^2 in the new v."""
    piece = tl.program_id(0).to(tl.int64)
    row = table_ptr + 5 * tl.load(pieces_ptr + 2 * piece)
    start = tl.load(pieces_ptr + 2 * piece + 1)
    g_ptr = tl.load(row).to(tl.pointer_type(tl.float32))
    m_ptr = tl.load(row + 1).to(tl.pointer_type(tl.float32))
    v_ptr = tl.load(row + 2).to(tl.pointer_type(tl.float32))
    o_ptr = tl.load(row + 3).to(tl.pointer_type(tl.bfloat16))
    n = tl.load(row + 4)
    eps, new_eps, new = tl.load(scalars_ptr), tl.load(scalars_ptr + 1), tl.load(scalars_ptr + 2)
    gm = tl.zeros([BLOCK], tl.float32)
    gg, oo, opo, mpmp, xpg = gm, gm, gm, gm, gm
    for i in tl.range(0, LOOPS):
        at = start + i * BLOCK + tl.arange(0, BLOCK)
        inside = at < n
        g = tl.load(g_ptr + at, mask=inside, other=0.0)
        m = tl.load(m_ptr + at, mask=inside, other=0.0)
        v = tl.load(v_ptr + at, mask=inside, other=1.0)
        mp = m / (tl.sqrt(v) + eps)
        gm += mp * g
        if BEGIN:
            if MICRO:
                o = tl.load(o_ptr + at, mask=inside, other=0.0).to(tl.float32)
            else:
                o = g
            op = o / (tl.sqrt(v + new * o * o) + new_eps)
            gg += g * g
            mpmp += mp * mp
            xpg += op * g
            if MICRO:
                oo += o * o
                opo += op * o
            else:
                oo += m * m
                opo += mp * m
    tl.store(out_ptr + piece, tl.sum(gm, 0))
    if BEGIN:
        pieces = tl.num_programs(0)
        tl.store(out_ptr + pieces + piece, tl.sum(gg, 0))
        tl.store(out_ptr + 2 * pieces + piece, tl.sum(oo, 0))
        tl.store(out_ptr + 3 * pieces + piece, tl.sum(opo, 0))
        tl.store(out_ptr + 4 * pieces + piece, tl.sum(mpmp, 0))
        tl.store(out_ptr + 5 * pieces + piece, tl.sum(xpg, 0))


def dots(held: list[list[Tensor]], eps: Tensor, new_eps: Tensor, new: float, begin: bool) -> Tensor:
    """gradient_stats._dots of tensors on one CUDA device, without waiting for it."""
    device = held[0][0].device
    rows = [[*(x.data_ptr() for x in tensors), *[0] * (4 - len(tensors)), tensors[0].numel()] for tensors in held]
    pieces = _pieces(tuple(row[-1] for row in rows), device)
    table = _sent(rows, device)
    scalars = torch.stack([eps, new_eps, torch.full_like(eps, new)]).float()
    out = torch.empty(6 if begin else 1, len(pieces), device=device)
    constants = dict(BEGIN=begin, MICRO=len(held[0]) > 3, BLOCK=BLOCK, LOOPS=LOOPS, num_warps=WARPS)
    if len(pieces):
        with torch.cuda.device_of(out):
            sums_kernel[(len(pieces),)](table, pieces, scalars, out, **constants)
    return out.sum(1, dtype=torch.float64)


@functools.lru_cache(maxsize=8)
def _pieces(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """[pieces, 2] int64: the parameter and the first element of each."""
    return _sent([[i, at] for i, n in enumerate(lengths) for at in range(0, n, BLOCK * LOOPS)], device)


def _sent(numbers: list[list[int]], device: torch.device) -> Tensor:
    found = torch.tensor(numbers, dtype=torch.int64).view(len(numbers), -1)
    return found.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else found
