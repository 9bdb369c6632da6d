"""The moments, the row gradient and the named scores as Triton kernels.

Same functions and the same mathematics as torch_impl (see its head): sums over the row without its
target, relative to a maximum, then r1, p_y and log_p from d = logsumexp_off - z_y. Runs on CUDA, and on
CPU tensors under TRITON_INTERPRET=1, which must be set before this module is imported.

moments_kernel   one read of a row: its Stats
gradient_kernel  one read and one write: p_j (a + c p_j) + b + t [p_j in tail] over or beside the logits
score_kernel     a score of triton_scores from logits to Stats, loss, Fisher and gradient in one launch. It holds the
                 beginning of a row in registers as loaded, and reads that once: all of 50257 bf16 logits, half of
                 151936. What is longer it reads a second time for the gradient, from its end, where the cache still
                 has it.
rest_kernel      the same, slowly and carefully, for the rows that score_kernel leaves to it: those outside of the
                 loss, and those with ties at the target or entries that are not finite

The kernels are in triton_kernels, with what makes them fast; here is how they are launched.
"""

import contextlib
import os

import torch
import triton
from torch import Tensor

from kernels import triton_scores
from kernels.moments import Coefficients, Stats
from kernels.triton_kernels import gradient_kernel, moments_kernel, rescale_kernel, rest_kernel, score_kernel

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CAN_KEEP_W = False
SCORES = triton_scores.SCORES

# Vectors of a row that score_kernel holds in a lane's registers, 4 each, where that is the whole row, and where more
# follows; and the registers that it may take: two programs of 8 warps (V up to 51 k in bf16) or one of 16 a
# multiprocessor. kernels.audit shows what fits without spilling, kernels.bench --paths what is fast.
HELD, HELD_OF_MORE, REGISTERS, MOST_WARPS = 25, 18, 128, 16
VECTOR_BYTES = 16


def forward(logits: Tensor, targets: Tensor, stats: Tensor, correct: Tensor, tail: float) -> None:
    """Fills ``stats`` [15, N] (the rows of moments.Stats) and ``correct`` [N] from logits [N, V]."""
    n, vocab = logits.shape
    if n == 0:
        return
    logits, _ = _aligned(logits)
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
            **_shape(vocab, logits.dtype),
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
    shape = _shape(vocab, logits.dtype)
    logits, result = _aligned(logits, out)
    with _on(logits):
        gradient_kernel[(n, triton.cdiv(vocab + shape["W"] - 1, shape["K"] * shape["R"] * shape["W"]))](
            logits,
            logits.stride(0),
            result,
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
            **{k: v for k, v in shape.items() if k != "PACKED"},
        )
    if result is not out:
        out.copy_(result)


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
    in place of ``score_shape``'s, to measure others."""
    n, vocab = logits.shape
    if n == 0:
        return
    if out is not None:
        _check_out(logits, out)
    logits, result = _aligned(logits, out)
    score = SCORES[name]
    arguments = (
        logits,
        logits.stride(0),
        logits if result is None else result,
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
    )
    constants = dict(
        SCORE=score.function,
        HAS_B=score.reads_mean,
        HAS_MASK=mask is not None,
        HAS_WEIGHTS=weights is not None,
        GRADIENT=out is not None,
    )
    with _on(logits):
        score_kernel[(n,)](*arguments, **constants, **(shape or score_shape(vocab, logits.dtype)))
        rest_kernel[(n,)](*arguments, **constants, **_rest_shape(vocab, logits.dtype))
    if result is not out:
        out.copy_(result)


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


def _aligned(logits: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Both as they are where they start at multiples of 16 bytes, else copies: the kernels read no others."""
    if any(x is not None and x.data_ptr() % VECTOR_BYTES for x in (logits, out)):
        logits = logits.clone(memory_format=torch.contiguous_format)
        out = None if out is None else torch.empty_like(logits)
    return logits, out


def _vectors(vocab: int, dtype: torch.dtype) -> tuple[int, int]:
    """Elements of a vector, and the vectors that a row can touch."""
    width = VECTOR_BYTES // dtype.itemsize
    return width, triton.cdiv(vocab + width - 1, width)


def _launch(dtype: torch.dtype, width: int, warps: int, per_go: int) -> dict:
    packed = dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") != "1"  # no assembly there
    constants = {"PACKED": packed, "K": per_go, "R": 32 * warps, "W": width}
    return constants | {"num_warps": warps, "enable_fp_fusion": True}


def _shape(vocab: int, dtype: torch.dtype) -> dict:
    """Launch constants of the kernels that read K vectors a lane at a time."""
    width, vectors = _vectors(vocab, dtype)
    return _launch(dtype, width, max(1, min(8, triton.next_power_of_2(vectors) // 128)), 4)


def _rest_shape(vocab: int, dtype: torch.dtype) -> dict:
    """Launch constants of rest_kernel."""
    return {name: value for name, value in _shape(vocab, dtype).items() if name not in ("K", "PACKED")}


def score_shape(vocab: int, dtype: torch.dtype, warps: int = 0, held: int | None = None) -> dict:
    """Launch constants of score_kernel: the fewest warps whose lanes hold the row in HELD vectors each, or ``warps``;
    MORE where the row is longer than that. ``held``: vectors a lane instead of HELD or HELD_OF_MORE."""
    width, vectors = _vectors(vocab, dtype)
    if not warps:
        warps = min(MOST_WARPS, triton.next_power_of_2(triton.cdiv(vectors, 32 * HELD)))
    pieces = triton.cdiv(vectors, 32 * warps)
    if held is None:
        held = HELD if pieces <= HELD else HELD_OF_MORE
    shape = {"PIECES": min(pieces, held), "MORE": pieces > held, "maxnreg": REGISTERS}
    return shape | _launch(dtype, width, warps, 2)


def _on(tensor: Tensor):
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
