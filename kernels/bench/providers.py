"""The losses that kernels.bench sets side by side: the literal DPSM, PyTorch's, ours, and the published kernels.

A provider takes leaves that require a gradient, (logits,) or (hidden, weight), and targets, and gives the mean loss.
Peers are made on demand: what is not installed raises ImportError, which the bench names.
"""

import functools
import importlib
import os
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from ..chunks import padded_rows
from ..head import linear_score
from ..logits import logits_score
from ..losses import LOSSES, ce, dpsm, make_score
from ..softmax import softmax_moments

ALPHA = 0.5


def literal_loss(logits, targets):
    """(1 - alpha) CE + alpha Brier as the formulas read, with log_softmax, exp and a one-hot."""
    log_p = F.log_softmax(logits.float(), dim=-1)
    p = log_p.exp()
    one_hot = F.one_hot(targets, logits.shape[-1]).float()
    ce = -(one_hot * log_p).sum(-1)
    brier = ((p - one_hot) ** 2).sum(-1)
    return ((1 - ALPHA) * ce + ALPHA * brier).mean()


@functools.lru_cache(maxsize=1)
def _padded_weight(rows: int, d: int, dtype: torch.dtype, device: torch.device):
    return torch.randn(rows, d, dtype=dtype, device=device) * 0.02


class MatrixProducts(torch.autograd.Function):
    """The three products of a head and its backward, without any loss: what no linear loss can be faster than. With
    the rows of ``padded_rows``, of a weight that is at hand: an odd V alone would slow them down."""

    @staticmethod
    def forward(ctx, hidden, weight, targets):
        rows = padded_rows(len(weight), hidden.itemsize, hidden.device)
        padded = weight if rows == len(weight) else _padded_weight(rows, *weight.shape[1:], weight.dtype, weight.device)
        ctx.save_for_backward(hidden, weight, padded)
        ctx.logits = hidden @ padded.t()
        return ctx.logits.new_zeros(())

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, padded = ctx.saved_tensors
        logits, ctx.logits = ctx.logits, None
        return logits @ padded, (logits.t() @ hidden)[: len(weight)], None


# Named for what they compute; "ours" with every moment that calibration and Fisher need.
FROM_LOGITS: dict[str, Callable] = {
    "literal DPSM": literal_loss,
    "torch CE": F.cross_entropy,
    "ours CE": lambda z, y: logits_score(z, y, ce)[0],
    "ours DPSM": lambda z, y: logits_score(z, y, dpsm(ALPHA))[0],
    "ours DPSM in place": lambda z, y: logits_score(z, y, dpsm(ALPHA), inplace=True)[0],
    "ours DPSM by moments": lambda z, y: dpsm(ALPHA)(softmax_moments(z, y)).mean(),
}
FROM_HIDDEN: dict[str, Callable] = {
    "linear + literal DPSM": lambda h, w, y: literal_loss(F.linear(h, w), y),
    "linear + torch CE": lambda h, w, y: F.cross_entropy(F.linear(h, w), y),
    "matrix products": MatrixProducts.apply,
    "linear_score CE": lambda h, w, y, **how: linear_score(h, w, y, ce, **how)[0],
    "linear_score DPSM": lambda h, w, y, **how: linear_score(h, w, y, dpsm(ALPHA), **how)[0],
    "linear_score DPSM, Fisher": lambda h, w, y, **how: linear_score(h, w, y, dpsm(ALPHA), fisher=True, **how)[0],
}
FROM_BF16_HIDDEN: dict[str, Callable] = {
    "linear_score DPSM, bf16 sum": partial(FROM_HIDDEN["linear_score DPSM"], accum_dtype=torch.bfloat16)
}
# The scores of the efficiency audit, through the head: every named loss at its defaults.
AUDITED = {name: make_score(name) for name in LOSSES}


def peer(module: str, name: str):
    """What another project calls ``name``. Raises ImportError where it is not there."""
    try:
        return getattr(importlib.import_module(module), name)
    except AttributeError as e:
        raise ImportError(f"{module} has no {name}") from e


def liger(module: str, name: str):
    """``peer`` of liger-kernel, which from 0.8.5 on chooses among kernels, and falls back from one to another: here to
    Triton's unless a call asks for another, and never back."""
    os.environ.update(LIGER_KERNEL_IMPL="nvidia-triton", LIGER_KERNEL_STRICT="1")
    return peer(module, name)


def _liger_linear_ce():
    loss = liger("liger_kernel.transformers", "LigerFusedLinearCrossEntropyLoss")()
    return lambda h, w, y: loss(w, h, y)


def _liger_linear_ce_cute():
    """Its chunks' losses by CuTe's kernel: sm_90 or newer, the package nvidia-cutlass-dsl, rows of 16 bytes."""
    loss = liger("liger_kernel.functional", "fused_linear_cross_entropy")
    return lambda h, w, y: loss(h, w, y, impl="nvidia-cutedsl")[0]


def _chunked_linear_ce():
    """torch's own in chunks; without options it is F.cross_entropy of all the logits, unchunked."""
    options = peer("torch.nn", "LinearCrossEntropyOptions")()
    return partial(peer("torch.nn.functional", "linear_cross_entropy"), options=options)


def _flash_attn_ce():
    loss = peer("flash_attn.ops.triton.cross_entropy", "cross_entropy_loss")
    return lambda z, y: loss(z, y)[0].mean()


PEERS_FROM_LOGITS: dict[str, Callable[[], Callable]] = {
    "torch.compile CE": lambda: torch.compile(F.cross_entropy, dynamic=False),  # V a constant
    "Liger CE": lambda: liger("liger_kernel.transformers", "LigerCrossEntropyLoss")(),
    "QuACK CE": lambda: peer("quack.cross_entropy", "cross_entropy"),
    "flash-attn CE": _flash_attn_ce,
}


def _cut(**how):
    """By its Triton kernels; elsewhere than on Linux its default is torch.compile."""
    return partial(peer("cut_cross_entropy", "linear_cross_entropy"), impl="cce", **how)


PEERS_FROM_HIDDEN: dict[str, Callable[[], Callable]] = {
    "torch.compile linear CE": lambda: torch.compile(FROM_HIDDEN["linear + torch CE"], dynamic=False),
    "F.linear_cross_entropy, unchunked": lambda: peer("torch.nn.functional", "linear_cross_entropy"),
    "F.linear_cross_entropy, chunked": _chunked_linear_ce,
    "Liger linear CE, Triton": _liger_linear_ce,
    "Liger linear CE, CuTe": _liger_linear_ce_cute,
    "Cut Cross-Entropy": _cut,
    "Cut Cross-Entropy, no filter": lambda: _cut(filter_eps=None),  # of small gradients
}
ON_CPU_TOO = {
    "F.linear_cross_entropy, unchunked",
    "F.linear_cross_entropy, chunked",
}  # the other peers are kernels for CUDA


def providers(linear: bool, device: str, dtype: str = "bf16") -> tuple[dict[str, Callable], dict[str, str]]:
    """({name: function}, {name: why it is not there})."""
    found, missing = dict(FROM_HIDDEN if linear else FROM_LOGITS), {}
    if linear and dtype == "bf16":
        found |= FROM_BF16_HIDDEN
    elif linear:
        missing |= dict.fromkeys(FROM_BF16_HIDDEN, "needs bf16")
    for name, make in (PEERS_FROM_HIDDEN if linear else PEERS_FROM_LOGITS).items():
        if name not in ON_CPU_TOO and device != "cuda":
            missing[name] = "needs CUDA"
            continue
        try:
            found[name] = make()
        except ImportError as e:
            missing[name] = f"not installed: {e}".splitlines()[0]
    return found, missing
