"""Which implementation computes a call, torch_impl or triton_impl, and what every call's arguments must be."""

import functools
import logging
import os
from types import ModuleType

import torch
from torch import Tensor

from . import torch_impl

IMPLS = ("auto", "triton", "torch")
REDUCTIONS = ("mean", "sum", "none")


def choose_impl(impl: str, tensor: Tensor) -> ModuleType:
    """The module behind ``impl``. Raises ValueError for a name or a device that cannot be had."""
    if impl not in IMPLS:
        raise ValueError(f"unknown impl {impl!r}; expected one of {', '.join(IMPLS)}")
    if impl == "triton" and not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        hint = "use impl='torch', or TRITON_INTERPRET=1 to interpret the kernels"
        raise ValueError(f"impl='triton' needs CUDA tensors, got {tensor.device}; {hint}")
    if impl == "auto":
        impl = _automatic(tensor.device.type, tensor.is_cuda and tensor.dtype == torch.float64)
    if impl == "torch":
        return torch_impl
    from . import triton_impl  # Triton is optional

    return triton_impl


def _automatic(device_type: str, cuda_float64: bool) -> str:
    return _chosen(device_type, cuda_float64)


# torch.compile runs it while it traces, and looks no further. All that torch.compiler.assume_constant_result does, but
# for the import of the compiler, half of the seconds in which a command starts.
_automatic._dynamo_marked_constant = True


@functools.cache  # so that each choice is logged once
def _chosen(device_type: str, cuda_float64: bool) -> str:
    name, why = "torch", "tensors are float64" if cuda_float64 else f"tensors are on {device_type}"
    if device_type == "cuda" and not cuda_float64:
        try:
            import triton  # noqa: F401

            name = "triton"
        except ImportError:
            why = "triton is not installed"
    logging.getLogger("scorecast").info("kernels: impl='auto' uses %s (%s)", name, why)
    return name


def brought(value, device: torch.device):
    """A number as it is, a 0-d tensor of the caller's on ``device``: a kernel cannot read another memory."""
    return value.to(device) if isinstance(value, Tensor) else value


def fused_form(score, module: ModuleType, device: torch.device, *more) -> tuple[str, Tensor | float] | None:
    """(name, knob on ``device``) of a named score that ``module`` has as one kernel; None for any other score, and
    where something of ``more`` is asked for, which that kernel does not give."""
    form = getattr(score, "fused", None)
    fits = form and not any(more) and form[0] in getattr(module, "FUSED_SCORES", ())
    return (form[0], brought(form[1], device)) if fits else None


def with_class_weights(weights: Tensor | None, class_weights: Tensor | None, targets: Tensor, vocab: int):
    """Each token's factor [N]: ``weights``, times that of its target's class; None where neither is given."""
    if class_weights is None:
        return weights
    if class_weights.shape != (vocab,):
        raise ValueError(f"class_weights must be [V], one a token id, {vocab}; got {tuple(class_weights.shape)}")
    of_targets = class_weights.detach().to(targets.device)[targets]
    return of_targets if weights is None else weights.detach() * of_targets


def check_reduction(reduction: str, denominator=None, weights: Tensor | None = None, tokens: Tensor | None = None):
    if reduction not in REDUCTIONS:
        raise ValueError(f"unknown reduction {reduction!r}; expected one of {', '.join(REDUCTIONS)}")
    if denominator is not None and reduction != "mean":
        raise ValueError(f"denominator is for reduction='mean', got reduction={reduction!r}; divide the loss yourself")
    if weights is not None and weights.shape != tokens.shape[:1]:
        raise ValueError(f"weights must be [N], one a token, {len(tokens)}; got {tuple(weights.shape)}")


def check_logits(logits: Tensor, module: ModuleType) -> None:
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits must be [N, V] with V >= 1, got shape {tuple(logits.shape)}; flatten batch and time")
    if logits.dtype not in module.DTYPES:
        raise ValueError(f"logits must be one of {', '.join(map(str, module.DTYPES))}, got {logits.dtype}")


def check_targets(
    targets: Tensor, n: int, vocab: int, ignore_index: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(targets as int64 with 0 for the ignored ones, which are in the loss, the same as a mask). The mask is None where
    all are known to be in the loss; on CUDA that is never known, as it would take a wait for the device."""
    if targets.shape != (n,) or targets.is_floating_point() or targets.dtype == torch.bool:
        got = f"{tuple(targets.shape)} {targets.dtype}"
        raise ValueError(f"targets must be integers of shape ({n},), one a row of logits; got {got}")
    if targets.device != device:
        raise ValueError(f"targets are on {targets.device} and the logits on {device}; move them together")
    valid = targets != ignore_index
    targets = targets.long()
    if n and not targets.is_cuda and not torch.compiler.is_compiling():
        low, high = (x.item() for x in targets.aminmax())
        if low >= 0 and high < vocab and not low <= ignore_index <= high:
            return targets, valid, None
        wrong = targets[valid & ((targets < 0) | (targets >= vocab))]
        if len(wrong):
            where = f"[0, {vocab}) or ignore_index={ignore_index}"
            raise ValueError(f"target {wrong[0].item()} is outside {where}; check the tokenizer against the head")
    return torch.where(valid, targets, 0), valid, valid
