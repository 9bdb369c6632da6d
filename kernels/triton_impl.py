"""The moments, the row gradient and the named scores as Triton kernels: how they are launched.

Same functions and mathematics as torch_impl; the kernels are in triton_kernels. Runs on CUDA, and on CPU tensors under
TRITON_INTERPRET=1, which must be set before this module is imported.
"""

import os

import torch
import triton
from torch import Tensor

from .moments import PLAIN, Link, Stats
from .triton_kernels import gradient_kernel, moments_kernel, rescale_kernel, rest_kernel, score_kernel
from .triton_rows import CAPPED, SCALED
from .triton_scores import FUSED_SCORES, READS_MEAN

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CAN_KEEP_W = False

VECTOR_BYTES = 16
# kernels.audit shows what fits without spilling, kernels.bench --paths what is fast.
HELD = 25  # vectors of 4 registers that a lane of score_kernel holds of a row, where that is the whole row
HELD_OF_MORE = 18  # the same where more follows
STAGES = 1  # of the loops over what follows; 2 copies the next vectors to shared memory meanwhile: not measured yet
REGISTERS = 128  # a lane: so two programs of 8 warps (V up to 51 k in bf16) or one of 16 fit a multiprocessor
MOST_WARPS = 16
RESCALED = 4096  # elements that a program of rescale_kernel takes at a time
RESCALERS = 1056  # its programs: 8 for each of 132 multiprocessors, and few to start where the scale is 1


def forward(logits, targets, stats, correct, tail, *, order=None, link=PLAIN, predicted=None) -> None:
    """Fills ``stats`` [17, N] (the rows of moments.Stats), ``correct`` and, unless None, ``predicted`` [N] from logits
    [N, V], of which ``link`` makes those of the softmax."""
    logits, _ = _aligned(logits)
    rows = _rows(logits, targets) | _results(stats, correct) | dict(ids_ptr=predicted, scale=link.scale)
    rows |= dict(order_ptr=_scalar(order, logits), softcap=link.softcap, LINK=_kind(link))
    _run(moments_kernel, logits, **rows, tail=tail, TAIL=tail > 0, **_shape(logits.shape[1], logits.dtype))


def gradient(logits, targets, mask, stats: Stats, coefficients, tail, out, *, order=None, link=PLAIN) -> None:
    """Writes the gradient of the rows to ``out`` [N, V], which may be the logits themselves; 0 where ``mask`` is False.
    Raises ValueError where ``out`` has other strides than the logits."""
    vocab = logits.shape[1]
    a, c, b, t, h, target = coefficients
    if link.softcap:
        z_y = logits.gather(1, targets[:, None])[:, 0].float()
        target = torch.where(z_y == -torch.inf, 0.0, target * link.slope(z_y))
    a, c, b, t, h, target = (None if x is None else x.contiguous() for x in (a, c, b, t, h, target))
    shape = _shape(vocab, logits.dtype, "PACKED")
    logits, result = _aligned(logits, out)
    programs = triton.cdiv(vocab + shape["W"] - 1, shape["K"] * shape["R"] * shape["W"])  # of a row
    pointers = dict(ref_ptr=stats.row_max, sum_ptr=stats.row_sum, r1_ptr=stats.r1, support_ptr=stats.support)
    pointers |= dict(a_ptr=a, c_ptr=c, b_ptr=b, t_ptr=t, h_ptr=h, target_ptr=target)
    pointers |= dict(out_ptr=result, mask_ptr=_bytes(mask), order_ptr=_scalar(order, logits))
    pointers |= dict(link_scale=link.scale, softcap=link.softcap, LINK=_kind(link))
    _run(gradient_kernel, logits, programs, **_rows(logits, targets), **pointers, tail=tail, **shape)
    if result is not out:
        out.copy_(result)


def fused_score(
    name: str,
    knob,
    logits,
    targets,
    mask,
    weights,
    *,
    stats,
    correct,
    losses,
    fisher,
    out,
    order=None,
    link: Link = PLAIN,
    shape: dict | None = None,
) -> None:
    """The score ``name`` of triton_scores, with its ``knob``; that and ``order`` are numbers or 0-d fp32 tensors.

    ``link`` scales alone: under a softcap score_kernel would spill, so that the other two kernels are for it.

    logits [N, V] and int64 targets [N]; ``mask`` [N] bool and ``weights`` [N] fp32, or None. Fills stats [17, N],
    correct, losses and fisher [N], 0 where ``mask`` is False, and ``out`` with the gradient of sum(weights * losses);
    ``out`` may be the logits, None is no gradient. ``shape``: launch constants to measure, for ``score_shape``'s."""
    vocab = logits.shape[1]
    knob, order = _scalar(knob, logits), _scalar(order, logits)
    logits, result = _aligned(logits, out)
    arguments = _rows(logits, targets) | _results(stats, correct) | dict(loss_ptr=losses, fisher_ptr=fisher)
    arguments |= dict(SCORE=FUSED_SCORES[name], HAS_B=name in READS_MEAN, knob_ptr=knob)
    arguments |= dict(mask_ptr=_bytes(mask), weights_ptr=_one_a_row(weights), out_ptr=result, order_ptr=order)
    assert not link.softcap, link
    arguments |= dict(link_scale=link.scale, LINK=_kind(link))
    _run(score_kernel, logits, **arguments, **(shape or score_shape(vocab, logits.dtype)))
    _run(rest_kernel, logits, **arguments, **_shape(vocab, logits.dtype, "K", "PACKED"))
    if result is not out:
        out.copy_(result)


def rescale(gradient: Tensor, scale: Tensor) -> None:
    """gradient [N, V] times the 0-d ``scale``, in place, without waiting for its value."""
    rows, vocab = gradient.shape
    blocks = rows * triton.cdiv(vocab, RESCALED)
    if blocks:
        with torch.cuda.device_of(gradient):
            grid = (min(blocks, RESCALERS),)
            rescale_kernel[grid](gradient, gradient.stride(0), scale, blocks, vocab, BLOCK=RESCALED)


def _run(kernel, rows: Tensor, programs: int = 1, **arguments) -> None:
    """Launches ``programs`` of the kernel for each of the [N, V] rows, on their device."""
    if len(rows):
        with torch.cuda.device_of(rows):
            kernel[(len(rows), programs)](**arguments)


def _rows(logits: Tensor, targets: Tensor) -> dict:
    return dict(z_ptr=logits, z_stride=logits.stride(0), targets_ptr=_one_a_row(targets), V=logits.shape[1])


def _results(stats: Tensor, correct: Tensor) -> dict:
    return dict(stats_ptr=stats, stats_stride=stats.stride(0), correct_ptr=correct.view(torch.uint8))


def _scalar(value, like: Tensor) -> Tensor | None:
    """A 0-d fp32 tensor beside ``like``."""
    if value is None:
        return None
    if isinstance(value, Tensor):
        return value.to(like.device, torch.float32)
    return torch.full((), float(value), device=like.device)


def _kind(link: Link) -> int:
    """The kernels' LINK."""
    return CAPPED.value if link.softcap else SCALED.value if link.scale != 1 else 0


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else _one_a_row(mask).view(torch.uint8)


def _one_a_row(vector: Tensor | None) -> Tensor | None:
    """[N] as the kernels read it, one after the other: an upstream gradient may be one number, expanded."""
    return None if vector is None else vector.contiguous()


def _aligned(logits: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Both as they are where they start at multiples of 16 bytes, else copies: the kernels read no others."""
    if out is not None and out.stride() != logits.stride():
        raise ValueError(f"the gradient's strides {out.stride()} are not those of the logits, {logits.stride()}")
    if any(x is not None and x.data_ptr() % VECTOR_BYTES for x in (logits, out)):
        logits = logits.clone(memory_format=torch.contiguous_format)
        out = None if out is None else torch.empty_like(logits)
    return logits, out


def _vectors(vocab: int, dtype: torch.dtype) -> int:
    """The vectors that a row can touch."""
    width = VECTOR_BYTES // dtype.itemsize
    return triton.cdiv(vocab + width - 1, width)


def _launch(dtype: torch.dtype, warps: int, per_go: int) -> dict:
    packed = dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") != "1"  # no assembly there
    constants = dict(PACKED=packed, K=per_go, R=32 * warps, W=VECTOR_BYTES // dtype.itemsize)
    return constants | dict(num_warps=warps, enable_fp_fusion=True)


def _shape(vocab: int, dtype: torch.dtype, *without: str) -> dict:
    """Launch constants of the other kernels, which read K vectors a lane at a time; those that one has not left out."""
    warps = max(1, min(8, triton.next_power_of_2(_vectors(vocab, dtype)) // 128))
    return {name: value for name, value in _launch(dtype, warps, per_go=4).items() if name not in without}


def score_shape(
    vocab: int, dtype: torch.dtype, warps: int = 0, held: int | None = None, stages: int = STAGES, hints: bool = False
) -> dict:
    """Launch constants of score_kernel: the fewest warps whose lanes hold the row in HELD vectors each, or ``warps``;
    MORE where the row is longer than that. ``held``: vectors a lane instead of HELD or HELD_OF_MORE. ``stages``:
    1 is no prefetch. ``hints``: to the cache, what is read again and what is not."""
    vectors = _vectors(vocab, dtype)
    if not warps:
        warps = min(MOST_WARPS, triton.next_power_of_2(triton.cdiv(vectors, 32 * HELD)))
    pieces = triton.cdiv(vectors, 32 * warps)
    if held is None:
        held = HELD if pieces <= HELD else HELD_OF_MORE
    constants = dict(PIECES=min(pieces, held), MORE=pieces > held, STAGES=stages, HINTS=hints)
    return constants | dict(maxnreg=REGISTERS) | _launch(dtype, warps, per_go=2)
