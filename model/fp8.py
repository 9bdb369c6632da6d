"""Products of training in FP8: other numbers than bf16's, and on a GPU with FP8 units twice its rate of products.

A layer's input and weight become e4m3 and the gradient of its output e5m2 (Micikevicius et al., 2022, "FP8 Formats for
Deep Learning"), each divided by a scale of its own, so that its largest magnitude is the format's. The scale is that of
the tensor at hand: nothing is carried from step to step, and a run resumes exactly. Products are accumulated in fp32;
what leaves them has the dtype of the input, the weight's gradient that of the weight. What is kept for backward is the
input in FP8, half of bf16's bytes. Only training does so: a model in eval() computes as it would have without.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MULTIPLE = 16  # of rows, as of widths: what products in FP8 take
CAPABILITY = (8, 9)  # of the first NVIDIA GPUs that have them: Ada, Hopper


def scaled(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(``x`` / scale in ``dtype``, the scale: fp32, 0-d), the largest magnitude that of ``dtype``."""
    scale = (x.abs().amax().float() / torch.finfo(dtype).max).clamp(min=torch.finfo(torch.float32).tiny)
    return (x.float() / scale).to(dtype), scale


def product(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype, fast: bool = False) -> Tensor:
    """``a`` [M, K] @ ``b`` [K, N], both in FP8, in ``dtype``. GPUs take a by rows and b by columns, so they are copied
    where they lie otherwise. ``fast``: accumulated with fewer bits, as Hopper's tensor cores do it."""
    whole = F.ScalingType.TensorWise
    a, b = a.contiguous(), b.t().contiguous().t()
    return F.scaled_mm(a, b, scale_a, whole, scale_b, whole, output_dtype=dtype, use_fast_accum=fast)


class Product(torch.autograd.Function):
    """x [N, in], weight [out, in] -> x @ weight.T [N, out]; forward and both gradients in FP8."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        x8, of_x = scaled(x, torch.float8_e4m3fn)
        w8, of_w = scaled(weight, torch.float8_e4m3fn)
        ctx.save_for_backward(x8, of_x, w8, of_w)
        ctx.dtypes = x.dtype, weight.dtype
        return product(x8, w8.t(), of_x, of_w, x.dtype, fast=x.is_cuda)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, Tensor]:
        x8, of_x, w8, of_w = ctx.saved_tensors
        g8, of_g = scaled(g, torch.float8_e5m2)
        of_input, of_weight = ctx.dtypes
        return product(g8, w8, of_g, of_w, of_input), product(g8.t(), x8, of_g, of_x, of_weight)


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [..., in] @ ``weight`` [out, in].T + ``bias`` [out], in the dtype of ``x``."""
    return Product.apply(x.flatten(0, -2), weight).view(*x.shape[:-1], -1) + bias.to(x.dtype)


def switch_on(blocks: nn.Module) -> None:
    """From now on the layers in ``blocks`` that can be are trained so."""
    for layer in blocks.modules():
        if hasattr(layer, "fp8"):
            layer.fp8 = True


def check(cfg, device: torch.device) -> None:
    """Raises ValueError, one line, for an --fp8 that cannot be had here, or not with such rows."""
    if not cfg.fp8:
        return
    if not hasattr(F, "scaled_mm"):
        raise ValueError(f"--fp8 needs torch.nn.functional.scaled_mm, which torch {torch.__version__} has not")
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < CAPABILITY:
        raise ValueError(f"--fp8 needs FP8 units; {torch.cuda.get_device_name(device)} has none; leave it out")
    if cfg.seq_len % MULTIPLE:
        raise ValueError(f"--fp8 takes rows by {MULTIPLE}: --seq-len {cfg.seq_len} is no multiple of it")
