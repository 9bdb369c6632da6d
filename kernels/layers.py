"""Three layers of a decoder, forward and backward: RMSNorm with the residual's sum, rotary positions, SwiGLU.

What stands between a decoder's products is bound by memory, and as separate operations of torch by the host as well.
With impl="triton" each layer is one kernel forward and one backward, which reads its inputs and writes its results,
nothing else. With impl="torch" it is the operations that stand here. Both take fp32, bf16 and fp16, torch fp64 too;
within a Triton kernel values are fp32, so that each result is rounded once.

Triton's backward is no function of autograd: a second derivative raises. Inside torch.compile(fullgraph=True) the
kernels are operators, those of compiled_layers.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import compiled_layers, torch_impl
from .impl import choose_impl

TRITON_MOST = 8192  # elements in a row that a program holds without spilling


def rms_norm(x: Tensor, delta: Tensor | None, gain: Tensor, eps: float, *, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """(y, s): s = x + delta and y = s / sqrt(mean(s^2) + eps) * gain, the mean over the last dimension in fp32.

    x [..., D] and the residual's ``delta`` of the same shape and dtype; without it s is x. gain [D] of any of the
    dtypes. Both inputs get the gradient of s, through y and through s itself; the gain gets one where it requires one.
    RMSNorm is Zhang and Sennrich's ("Root Mean Square Layer Normalization", 2019, equation 4).

    ``impl`` is "triton" (D up to 8192), "torch", or "auto": Triton for CUDA tensors, torch for others and for longer
    rows. Raises ValueError for shapes, dtypes, eps or impl that do not fit."""
    if gain.shape != x.shape[-1:]:
        raise ValueError(f"gain must be [D], one a feature of x {tuple(x.shape)}; got {tuple(gain.shape)}")
    if delta is not None:
        _check_twin("delta", delta, "x", x)
    _check_eps(eps)
    if _takes_triton(impl, x, gain):
        return _RMSNorm.apply(x, delta, gain, eps)
    s = x if delta is None else x + delta
    return F.rms_norm(s, gain.shape, gain.to(s.dtype), eps), s


def rope(
    x: Tensor, cos: Tensor, sin: Tensor, gain: Tensor | None = None, eps: float = 1e-6, *, impl: str = "auto"
) -> Tensor:
    """Queries or keys with their positions: x [B, T, heads, K], each head normed as ``rms_norm`` where there is a gain
    [K], then component i turned with component i + K/2, the pairing of Hugging Face's checkpoints.

    cos and sin [B or 1, T, 1, K/2] of the angles (Su et al., "RoFormer", 2021); they get no gradient. The
    norm of each head is Qwen3's ("Qwen3", 2025). ``impl`` and errors as ``rms_norm``."""
    batch, time, _, width = x.shape if x.dim() == 4 else (0, 0, 0, 1)
    if width % 2:
        raise ValueError(f"x must be [B, T, heads, K] with K even, as pairs are turned; got {tuple(x.shape)}")
    for name, t in (("cos", cos), ("sin", sin)):
        if t.shape[1:] != (time, 1, width // 2) or t.shape[0] not in (1, batch) or cos.shape != sin.shape:
            expected = f"[B or 1, T, 1, K/2] of x {tuple(x.shape)}, both alike"
            raise ValueError(f"{name} must be {expected}; got {tuple(t.shape)}")
    if gain is not None and gain.shape != (width,):
        raise ValueError(f"gain must be [K], one a component of a head, {width}; got {tuple(gain.shape)}")
    _check_eps(eps)
    if _takes_triton(impl, x, gain):
        return _RoPE.apply(x, cos, sin, gain, eps)
    x = x if gain is None else F.rms_norm(x, gain.shape, gain.to(x.dtype), eps)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def swiglu(gate: Tensor, up: Tensor, *, impl: str = "auto") -> Tensor:
    """silu(gate) * up, two tensors of one shape and dtype, which alone are kept for backward (Shazeer, "GLU Variants",
    2020): silu(gate) is as wide as the layer's widest activation, and is cheaper to compute again than to keep.

    ``impl`` and errors as ``rms_norm``; with torch too, a second derivative raises."""
    _check_twin("up", up, "gate", gate)
    return (_FusedSwiGLU if _takes_triton(impl, gate) else _SwiGLU).apply(gate, up)


def _check_twin(name: str, x: Tensor, of: str, like: Tensor) -> None:
    if x.shape != like.shape or x.dtype != like.dtype:
        got = f"{tuple(x.shape)} {x.dtype}"
        raise ValueError(f"{name} must have shape and dtype of {of}, {tuple(like.shape)} {like.dtype}; got {got}")


def _check_eps(eps: float) -> None:
    if not eps > 0:
        raise ValueError(f"eps={eps}: expected a positive number, for rows of zeros")


def _takes_triton(impl: str, x: Tensor, gain: Tensor | None = None) -> bool:
    """Whether the kernels are to compute a layer of ``x``, and of rows with a gain. Raises ValueError where they are
    asked for and cannot."""
    module = choose_impl(impl, x)
    if module is torch_impl or (impl == "auto" and gain is not None and len(gain) > TRITON_MOST):
        return False
    for t in (x, gain):
        if t is not None and t.dtype not in module.DTYPES:
            raise ValueError(f"the Triton kernels take {', '.join(map(str, module.DTYPES))}; got {t.dtype}")
    if gain is not None and len(gain) > TRITON_MOST:
        raise ValueError(f"the Triton kernels take rows of up to {TRITON_MOST}, got {len(gain)}; use impl='torch'")
    return True


def _launches():
    """The module whose functions launch the kernels, as operators while the compiler traces."""
    if torch.compiler.is_compiling():
        return compiled_layers
    from . import triton_layers  # Triton is optional

    return triton_layers


def _packed(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, delta, gain, eps):
        ctx.set_materialize_grads(False)
        gain = gain.contiguous()
        y, s = _launches().norm(x.contiguous(), _packed(delta), gain, eps)
        ctx.save_for_backward(s, gain)
        ctx.eps = eps
        return y, x if delta is None else s

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, ds):
        s, gain = ctx.saved_tensors
        dy = torch.zeros_like(s) if dy is None else dy.contiguous()
        _, shared, trains, _ = ctx.needs_input_grad
        out, d_gain = _launches().norm_backward(dy, _packed(ds), s, gain, ctx.eps, trains)
        return out, out if shared else None, d_gain if trains else None, None


class _RoPE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin, gain, eps):
        x, cos, sin, gain = (_packed(t) for t in (x, cos, sin, gain))
        ctx.save_for_backward(None if gain is None else x, cos, sin, gain)
        ctx.eps = eps
        return _launches().rope(x, cos, sin, gain, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        trains = ctx.needs_input_grad[3]
        out, d_gain = _launches().rope_backward(dy.contiguous(), *ctx.saved_tensors, ctx.eps, trains)
        return out, None, None, d_gain if trains else None, None


class _FusedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return _launches().swiglu(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return _launches().swiglu_backward(dy.contiguous(), *ctx.saved_tensors)


class _SwiGLU(torch.autograd.Function):
    """The same as operations of torch."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(dy * up, gate), dy * F.silu(gate)
