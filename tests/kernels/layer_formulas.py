"""The layers' formulas, and how a kernel's values and gradients are held against their float64 autograd."""

import torch
from formulas import DEVICE, IMPLS

from kernels import rms_norm

EPS = 1e-5
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Beside the error of torch's operations in the same dtype, to the largest value: fp32 sums in another order, or a
# rounding of the result (the interpreter cuts where the GPU rounds).
ALLOWED = {torch.float32: 1e-6, torch.bfloat16: 2**-8 if DEVICE == "cuda" else 2**-7, torch.float16: 2**-11}


def normed(s, gain):
    return s / (s.square().mean(-1, keepdim=True) + EPS).sqrt() * gain


def turned(x, cos, sin, gain=None):
    """Component i with i + K/2, after the norm where there is a gain."""
    x = x if gain is None else normed(x, gain)
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def exact_norm(x, delta, gain):
    s = x if delta is None else x + delta
    return normed(s, gain), s


def exact_swiglu(gate, up):
    return gate / (1 + (-gate).exp()) * up


def draw(*shape, dtype=torch.float32, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed + 7 * len(shape) + shape[-1])
    return (scale * torch.randn(shape, generator=generator)).to(DEVICE, dtype)


def angles(batch, time, width, dtype=torch.float32):
    at = draw(batch, time, 1, width // 2, scale=3.0, seed=3)
    return at.cos().to(dtype), at.sin().to(dtype)


def outcome(function, inputs, frozen=()):
    """The outputs and the gradients of everything but the ``frozen``, of the same random weights each time."""
    leaves = [None if x is None else x.detach().requires_grad_(i not in frozen) for i, x in enumerate(inputs)]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    sum((draw(*y.shape, dtype=torch.bfloat16, seed=i).to(y) * y).sum() for i, y in enumerate(outputs)).backward()
    assert all(leaves[i].grad is None for i in frozen)
    return [y.detach() for y in outputs] + [x.grad for x in leaves if x is not None and x.grad is not None]


def holds(function, exact, inputs, frozen=()):
    """Errs no more than torch's operations do, or than is their right; each result in its input's dtype."""
    allowed = ALLOWED[inputs[0].dtype]
    reference = outcome(exact, [None if x is None else x.double() for x in inputs], frozen)
    of = {impl: outcome(lambda *x, impl=impl: function(*x, impl=impl), inputs, frozen) for impl in IMPLS}
    assert len(of["triton"]) == len(of["torch"]) == len(reference)
    for got, peer, want in zip(of["triton"], of["torch"], reference, strict=True):
        assert got.dtype == peer.dtype and got.shape == peer.shape == want.shape
        if want.numel():
            allowed_here = allowed * want.abs().max()
            error, right = ((y.double() - want).abs().max() for y in (got, peer))
            assert error <= min(right, 4 * allowed_here) + allowed_here, (error, right, allowed_here)


def norm(x, delta, gain, impl):
    return rms_norm(x, delta, gain, EPS, impl=impl)
