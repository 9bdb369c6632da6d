"""Attention within each document of packed rows, through torch.nn.attention.varlen.

It runs FlashAttention (Dao, "FlashAttention-2", 2023) over a list of lengths and computes no score between two
documents, where a mask has all of a row's computed and most thrown away. torch has it from 2.10 on, on CUDA alone.
Shapes in names as in model/decoder.py; S documents in all rows together.
"""

import functools
import inspect
import logging
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16)
WIDEST = 192  # heads: above it FlashAttention's backward runs on some devices alone


class Bounds(NamedTuple):
    """Where the documents of packed rows begin and end, in FlashAttention's terms. A row's padding is one, too."""

    cu_seqlens: Tensor  # [S + 1] int32, on the tokens' device: the first token of each in the flattened rows, and B * T
    max_seqlen: int  # tokens of the longest, or more

    def padded(self, multiple: int, max_seqlen: int) -> "Bounds":
        """With documents of no token up to the next multiple, so that shapes recur, as a CUDA graph needs it."""
        n = -len(self.cu_seqlens) % multiple
        return Bounds(torch.cat((self.cu_seqlens, self.cu_seqlens[-1:].expand(n))), max_seqlen)


def bounds_of(documents_BT: Tensor) -> Bounds:
    """Those of documents numbered as for a Decoder. Both are on the CPU: a device would have to be waited for.

    Raises ValueError where a number comes back within its row: a mask would join the two runs."""
    first = torch.ones_like(documents_BT, dtype=torch.bool)
    first[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    row, at = first.nonzero(as_tuple=True)
    if len(set(zip(row.tolist(), documents_BT[row, at].tolist(), strict=True))) < len(row):
        raise ValueError("a document of packed rows lies in two pieces; expected equal numbers side by side")
    cu_seqlens = F.pad(row * documents_BT.shape[1] + at, (0, 1), value=documents_BT.numel())
    return Bounds(cu_seqlens.int(), int(cu_seqlens.diff().max()))


def choose_varlen(bounds: Bounds | None, allowed: bool, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether packed rows go through ``attend_within``, not a mask. What is chosen, and why, is logged once."""
    if bounds is None:
        why = "their bounds are not given"
    elif not allowed:
        why = "the model's varlen is False"
    else:
        why = lacking(bounds.cu_seqlens.device, dtype, head_dim)
    _log(why)
    return not why


@functools.cache
def lacking(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Why there is no varlen_attn for such tensors; empty where there is."""
    if device.type != "cuda":
        return f"tensors are on {device.type}"
    if dtype not in DTYPES:
        return f"tensors are {dtype}, not bfloat16 or float16"
    if head_dim % 8 or head_dim > WIDEST:
        return f"heads are {head_dim} wide, no multiple of 8 up to {WIDEST}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than FlashAttention's kernels"
    if not torch.backends.cuda.is_flash_attention_available():
        return f"torch {torch.__version__} is built without FlashAttention"
    return "" if operation() else f"torch {torch.__version__} has no varlen_attn, or one not known here"


@functools.cache  # so that each choice is logged once
def _log(why: str) -> None:
    how = f"with a mask ({why})" if why else "within documents (varlen_attn)"
    logging.getLogger("scorecast").info("packed rows: attention %s", how)


@functools.cache
def operation() -> tuple[Callable, bool] | None:
    """(torch's varlen_attn, causal; whether it takes fewer heads of keys than of queries), None where torch has none
    that is known: ``is_causal`` in 2.10, ``window_size`` after it, and then ``enable_gqa`` as well."""
    try:
        from torch.nn.attention.varlen import varlen_attn  # here, as it brings torch's compiler: seconds
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    for name, value in (("window_size", (-1, 0)), ("is_causal", True)):
        if name in known:
            return functools.partial(varlen_attn, **{name: value}), "enable_gqa" in known
    return None


def attend_within(q_BTHK: Tensor, k_BTJK: Tensor, v_BTJK: Tensor, bounds: Bounds) -> Tensor:
    """Causal attention within each document, [B * T, H, K]. H is a multiple of J, neighbours share keys."""
    run, shares = operation()
    q, k, v = (x.flatten(0, 1) for x in (q_BTHK, k_BTJK, v_BTJK))
    groups, more = q.shape[1] // k.shape[1], {}
    if groups > 1 and shares:
        more = {"enable_gqa": True}
    elif groups > 1:
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    cu_seqlens, max_seqlen = bounds
    return run(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **more)
