"""The launches of triton_layers inside torch.compile(fullgraph=True): operators that the compiler does not look into.

Of the same names and arguments. An operator returns no argument and not None: an empty tensor stands for what does not
apply.
"""

import torch
from torch import Tensor


@torch.library.custom_op("scorecast::layer_norm", mutates_args=())
def _norm(x: Tensor, delta: Tensor | None, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    from .triton_layers import norm  # Triton is optional

    y, s = norm(x, delta, gain, eps)
    return y, x.new_empty(0) if delta is None else s


@_norm.register_fake
def _(x, delta, gain, eps):
    return torch.empty_like(x), x.new_empty(0) if delta is None else torch.empty_like(x)


def norm(x, delta, gain, eps):
    y, s = _norm(x, delta, gain, eps)
    return y, x if delta is None else s


@torch.library.custom_op("scorecast::layer_norm_backward", mutates_args=())
def norm_backward(
    dy: Tensor, ds: Tensor | None, s: Tensor, gain: Tensor, eps: float, trains: bool
) -> tuple[Tensor, Tensor]:
    from .triton_layers import norm_backward

    out, d_gain = norm_backward(dy, ds, s, gain, eps, trains)
    return out, d_gain if trains else gain.new_empty(0)


@norm_backward.register_fake
def _(dy, ds, s, gain, eps, trains):
    return torch.empty_like(s), torch.empty_like(gain) if trains else gain.new_empty(0)


@torch.library.custom_op("scorecast::layer_rope", mutates_args=())
def rope(x: Tensor, cos: Tensor, sin: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    from .triton_layers import rope

    return rope(x, cos, sin, gain, eps)


@rope.register_fake
def _(x, cos, sin, gain, eps):
    return torch.empty_like(x)


@torch.library.custom_op("scorecast::layer_rope_backward", mutates_args=())
def rope_backward(
    dy: Tensor, x: Tensor | None, cos: Tensor, sin: Tensor, gain: Tensor | None, eps: float, trains: bool
) -> tuple[Tensor, Tensor]:
    from .triton_layers import rope_backward

    out, d_gain = rope_backward(dy, x, cos, sin, gain, eps, trains)
    return out, d_gain if trains else dy.new_empty(0)


@rope_backward.register_fake
def _(dy, x, cos, sin, gain, eps, trains):
    return torch.empty_like(dy), torch.empty_like(gain) if trains else dy.new_empty(0)


@torch.library.custom_op("scorecast::layer_swiglu", mutates_args=())
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    from .triton_layers import swiglu

    return swiglu(gate, up)


@swiglu.register_fake
def _(gate, up):
    return torch.empty_like(gate)


@torch.library.custom_op("scorecast::layer_swiglu_backward", mutates_args=())
def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    from .triton_layers import swiglu_backward

    return swiglu_backward(dy, gate, up)


@swiglu_backward.register_fake
def _(dy, gate, up):
    return torch.empty_like(gate), torch.empty_like(up)
