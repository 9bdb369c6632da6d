"""The moments and the row gradient as Triton kernels: one read of a row forward, one read and write back.

Same functions and the same mathematics as torch_impl (see its head): sums over the row without its
target, relative to the running maximum, then r1, p_y and log_p from d = logsumexp_off - z_y. Runs on
CUDA, and on CPU tensors under TRITON_INTERPRET=1, which must be set before this module is imported.
"""

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.moments import Coefficients, Stats

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CAN_KEEP_W = False

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _log1p_exp(x):
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
    BLOCK: tl.constexpr,
):
    """One program a row; the rows of stats are those of moments.Stats."""
    row = tl.program_id(0).to(tl.int64)
    z_row = z_ptr + row * z_stride
    y = tl.load(targets_ptr + row).to(tl.int32)
    z_y = tl.load(z_row + y).to(tl.float32)
    cols = tl.arange(0, BLOCK)
    minus_inf = float("-inf")

    # The running maximum is one number, the sums one a lane, so that a block costs one reduction.
    top = minus_inf
    s1 = tl.zeros([BLOCK], tl.float32)
    s2 = tl.zeros([BLOCK], tl.float32)
    s3 = tl.zeros([BLOCK], tl.float32)
    s4 = tl.zeros([BLOCK], tl.float32)
    s_et = tl.zeros([BLOCK], tl.float32)  # sum e t, with t = z - top and e = exp(t)
    s_t = tl.zeros([BLOCK], tl.float32)
    live = tl.zeros([BLOCK], tl.int32)
    ahead = tl.zeros([BLOCK], tl.int32)  # entries that beat the target, or tie with a lower index
    for start in range(0, V, BLOCK):
        j = start + cols
        z = tl.load(z_row + j, mask=j < V, other=minus_inf).to(tl.float32)
        z = tl.where(j == y, minus_inf, z)
        ahead |= ((z > z_y) | ((z == z_y) & (j < y) & (z > minus_inf))).to(tl.int32)
        new_top = tl.maximum(top, tl.max(z, 0))
        ref = tl.where(new_top == minus_inf, 0.0, new_top)  # -inf - -inf is not a number
        is_live = z != minus_inf
        t = z - ref
        e = tl.exp2(t * LOG2E)
        t = tl.where(is_live, t, 0.0)
        shrink = tl.exp2((top - ref) * LOG2E)
        moved = tl.where(top == minus_inf, 0.0, top - ref)
        shrink2 = shrink * shrink
        e2 = e * e
        s_t += moved * live + t
        live += is_live.to(tl.int32)
        s_et = shrink * (s_et + moved * s1) + e * t
        s1 = shrink * s1 + e
        s2 = shrink2 * s2 + e2
        s3 = shrink2 * shrink * s3 + e2 * e
        s4 = shrink2 * shrink2 * s4 + e2 * e2
        top = new_top

    ref = tl.where(top == minus_inf, 0.0, top)
    sum1 = tl.sum(s1, 0)
    alone = sum1 == 0.0  # no other entry in the vocabulary: V = 1, or all others at -inf
    log_sum = tl.log2(tl.where(alone, 1.0, sum1)) * LN2
    d = tl.where(alone, minus_inf, (ref - z_y) + log_sum)
    softplus = _log1p_exp(-tl.abs(d))
    log_p = -(tl.maximum(d, 0.0) + softplus)
    log_r1 = -(tl.maximum(-d, 0.0) + softplus)
    u = tl.exp2(-tl.abs(d) * LOG2E)
    big = 1.0 / (1.0 + u)
    r1 = tl.where(d < 0, u * big, big)
    p_y = tl.where(d < 0, big, u * big)
    y_live = (z_y != minus_inf).to(tl.float32)
    n = tl.sum(live, 0).to(tl.float32) + y_live
    w = r1 / tl.where(alone, 1.0, sum1)
    w2 = w * w
    # log p_j = (z_j - ref) + (log_r1 - log_sum) off target; a row with no other entry has r1 = 0.
    off = tl.where(alone, 0.0, log_r1 - log_sum)
    target_log_p = tl.where(y_live > 0, log_p, 0.0)
    out = stats_ptr + row
    tl.store(out, log_p)
    tl.store(out + stats_stride, r1)
    tl.store(out + 2 * stats_stride, w2 * tl.sum(s2, 0))
    tl.store(out + 3 * stats_stride, (tl.sum(s_t, 0) + (n - y_live) * off + target_log_p) / n)
    tl.store(out + 5 * stats_stride, w2 * w * tl.sum(s3, 0))
    tl.store(out + 6 * stats_stride, w2 * w2 * tl.sum(s4, 0))
    tl.store(out + 7 * stats_stride, -(w * tl.sum(s_et, 0) + r1 * off + p_y * target_log_p))
    tl.store(out + 8 * stats_stride, tl.maximum(p_y, w))
    tl.store(out + 9 * stats_stride, n)
    tl.store(out + 10 * stats_stride, p_y)
    tl.store(out + 13 * stats_stride, ref)
    tl.store(out + 14 * stats_stride, tl.where(alone, 1.0, sum1))
    tl.store(correct_ptr + row, tl.sum(ahead, 0) == 0)
    if TAIL:
        # A second read, of a row that is still in the cache.
        count = tl.zeros([BLOCK], tl.int32)
        tail_t = tl.zeros([BLOCK], tl.float32)
        for start in range(0, V, BLOCK):
            j = start + cols
            z = tl.load(z_row + j, mask=j < V, other=minus_inf).to(tl.float32)
            z = tl.where(j == y, minus_inf, z)
            inside = (tl.exp2((z - ref) * LOG2E) * w < tail / n) & (z != minus_inf)
            count += inside.to(tl.int32)
            tail_t += tl.where(inside, z - ref, 0.0)
        k = tl.sum(count, 0).to(tl.float32)
        y_in = tl.where(p_y < tail / n, y_live, 0.0)
        tl.store(out + 4 * stats_stride, (tl.sum(tail_t, 0) + k * off + y_in * target_log_p) / n)
        tl.store(out + 11 * stats_stride, k + y_in)
        tl.store(out + 12 * stats_stride, k)


@triton.jit
def gradient_kernel(
    z_ptr,
    z_stride,
    out_ptr,
    out_stride,
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
    BLOCK: tl.constexpr,
):
    """One program a block of a row: p_j (a + c p_j) + b + t [p_j in tail], and ``target`` at y."""
    row = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(targets_ptr + row).to(tl.int32)
    z = tl.load(z_ptr + row * z_stride + j, mask=j < V, other=float("-inf")).to(tl.float32)
    z = tl.where(j == y, float("-inf"), z)
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
    is_live = z != float("-inf")
    if HAS_B:
        g += tl.where(is_live, tl.load(b_ptr + row), 0.0)
    if HAS_T:
        in_tail = (p < tail / tl.maximum(tl.load(support_ptr + row), 1.0)) & is_live
        g += tl.where(in_tail, tl.load(t_ptr + row), 0.0)
    g = tl.where(j == y, tl.load(target_ptr + row), g)
    if HAS_MASK:  # an ignored row and its coefficients may hold anything
        g = tl.where(in_loss, g, 0.0)
    tl.store(out_ptr + row * out_stride + j, g.to(out_ptr.dtype.element_ty), mask=j < V)


def forward(logits: Tensor, targets: Tensor, stats: Tensor, correct: Tensor, tail: float) -> None:
    """Fills ``stats`` [15, N] (the rows of moments.Stats) and ``correct`` [N] from logits [N, V]."""
    n, vocab = logits.shape
    if n == 0:
        return
    block = _block(vocab)
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
            BLOCK=block,
            num_warps=_warps(block),
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
    """Writes the gradient of the rows to ``out`` [N, V], which may be the logits themselves."""
    n, vocab = logits.shape
    if n == 0:
        return
    a, c, b, t, target = (None if x is None else x.contiguous() for x in coefficients)
    block = _block(vocab)
    with _on(logits):
        gradient_kernel[(n, triton.cdiv(vocab, block))](
            logits,
            logits.stride(0),
            out,
            out.stride(0),
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
            BLOCK=block,
            num_warps=_warps(block),
        )


def compile_kernels(capability: int, dtype: str, vocab: int, *, tail: bool = True) -> dict:
    """Both kernels compiled for a CUDA compute capability (80, 90) on any machine, by name.

    ``dtype`` is Triton's name of the logits' type: "fp32", "bf16" or "fp16". Needs TRITON_INTERPRET unset.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    block = _block(vocab)
    vectors = dict.fromkeys(
        ("stats_ptr", "ref_ptr", "sum_ptr", "r1_ptr", "support_ptr", "a_ptr", "c_ptr", "b_ptr", "t_ptr", "target_ptr"),
        "*fp32",
    )
    types = vectors | {
        "z_ptr": f"*{dtype}",
        "out_ptr": f"*{dtype}",
        "targets_ptr": "*i64",
        "mask_ptr": "*u8",
        "correct_ptr": "*u8",
        "z_stride": "i64",
        "out_stride": "i64",
        "stats_stride": "i64",
        "tail": "fp32",
        "V": "i32",
    }
    flags = {"BLOCK": block, "TAIL": tail, "HAS_C": True, "HAS_B": tail, "HAS_T": tail, "HAS_MASK": True}
    compiled = {}
    for kernel in (moments_kernel, gradient_kernel):
        signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
        constexprs = {name: flags[name] for name in kernel.arg_names if name in flags}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs)
        options = {"num_warps": _warps(block)}
        compiled[kernel.fn.__name__] = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return compiled


def _block(vocab: int) -> int:
    return max(16, min(4096, triton.next_power_of_2(vocab)))


def _warps(block: int) -> int:
    """16 elements a thread, so that the accumulators stay in registers."""
    return max(1, min(8, block // 512))


def _on(tensor: Tensor):
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
