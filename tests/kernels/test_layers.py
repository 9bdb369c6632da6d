"""The three layers against float64 autograd of their formulas, and a decoder of them against one without."""

import pytest
import torch
import torch.nn.functional as F
from formulas import DEVICE, IMPLS
from layer_formulas import ALLOWED, DTYPES, EPS, angles, draw, exact_norm, exact_swiglu, holds, norm, outcome, turned

from kernels import layers, rms_norm, rope, swiglu
from model.decoder import Decoder, DecoderConfig
from model.lora import LoRAConfig, add_lora


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("n, d", [(5, 30), (1, 1), (0, 64), (7, 1100)])
def test_norm(n, d, dtype, monkeypatch):
    """Widths that are no power of two, rows that do not fill a tile, a gain that trains or is frozen."""
    monkeypatch.setattr("kernels.triton_layers.PROGRAMS", 2)  # so that each goes over several tiles
    x, delta, gain = draw(n, d, dtype=dtype), draw(n, d, dtype=dtype, seed=1), draw(d, dtype=dtype, seed=2)
    for second in (delta, None):
        for frozen in ((), (2,)):
            holds(norm, exact_norm, [x, second, gain], frozen)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("heads, width, batch", [(3, 64, 1), (2, 128, 2), (5, 12, 1), (5, 12, 2)])
def test_rope(heads, width, batch, dtype, monkeypatch):
    """Positions that the rows share, and positions of their own; heads of any even width."""
    monkeypatch.setattr("kernels.triton_layers.PROGRAMS", 2)
    x, gain = draw(2, 17, heads, width, dtype=dtype), draw(width, dtype=dtype, seed=1)
    cos, sin = angles(batch, 17, width, dtype)

    def layer(x, gain, impl):
        return rope(x, cos, sin, gain, EPS, impl=impl)

    def exact(x, gain):
        return turned(x, cos.double(), sin.double(), gain)

    for second, frozen in ((gain, ()), (gain, (1,)), (None, ())):
        holds(layer, exact, [x, second], frozen)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", [(3, 5, 96), (1, 1), (0, 8), (2, 2049)])
def test_swiglu(shape, dtype):
    holds(swiglu, exact_swiglu, [draw(*shape, dtype=dtype, scale=3.0), draw(*shape, dtype=dtype, seed=1)])


def test_no_rows_of_heads():
    x = torch.zeros(0, 7, 2, 8, device=DEVICE, requires_grad=True)
    gain = torch.ones(8, device=DEVICE, requires_grad=True)
    rope(x, *angles(1, 7, 8), gain, impl="triton").sum().backward()
    assert x.grad.shape == x.shape and (gain.grad == 0).all()


@pytest.mark.filterwarnings("ignore:overflow")  # of exp, in the interpreter
def test_large_values():
    """Squares that are near the end of fp32, a sigmoid that is 0 or 1: neither infinite nor no number."""
    x, gain = draw(4, 64, scale=1e18), draw(64, seed=1)
    holds(norm, exact_norm, [x, None, gain])
    cos, sin = angles(1, 1, 64)
    x = x.view(4, 1, 1, 64)
    holds(
        lambda x, gain, impl: rope(x, cos, sin, gain, EPS, impl=impl),
        lambda x, gain: turned(x, cos.double(), sin.double(), gain),
        [x, gain],
    )
    gate, up = torch.tensor([-1e4, -90.0, 90.0, 1e4, 0.0], device=DEVICE), draw(5)
    holds(swiglu, lambda gate, up: gate * gate.sigmoid() * up, [gate, up])


def test_a_gain_of_another_dtype_keeps_it():
    """As masters in fp32 under activations in bf16; the kernel does not round the gain."""
    x, gain = draw(5, 64, dtype=torch.bfloat16), draw(64, seed=1)
    y, s, dx, d_gain = outcome(lambda x, gain: norm(x, None, gain, "triton"), [x, gain])
    want = outcome(lambda x, gain: exact_norm(x, None, gain), [x.double(), gain.double()])
    assert y.dtype == s.dtype == dx.dtype == torch.bfloat16 and d_gain.dtype == torch.float32
    torch.testing.assert_close(y.double(), want[0], rtol=ALLOWED[torch.bfloat16], atol=0)
    torch.testing.assert_close(d_gain.double(), want[3], rtol=1e-5, atol=1e-5)


def test_layouts():
    """Inputs and gradients that are not contiguous: what torch makes of contiguous ones."""
    x, delta, gain = draw(12, 6).t(), draw(6, 24)[:, ::2], draw(24, seed=1)[::2]
    q, (cos, sin) = draw(2, 3, 5, 8).transpose(1, 2), angles(2, 5, 16)
    cos, sin = cos[..., ::2], sin[..., ::2]

    def everything(x, delta, gain, q, head, gate, up, impl="triton"):
        y, s = norm(x, delta, gain, impl)
        turned = rope(q, cos, sin, head, EPS, impl=impl)
        return y.t(), s.t(), turned.transpose(1, 2), swiglu(gate, up, impl=impl).t()

    given = [x, delta, gain, q, draw(16, seed=1)[::2], x, delta]
    assert not any(x.is_contiguous() for x in (*given, cos, sin))
    found = outcome(everything, given)
    cos, sin = cos.contiguous(), sin.contiguous()
    wanted = outcome(lambda *t: everything(*(x.contiguous() for x in t), impl="torch"), given)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_derivatives_are_differences():
    """Of random directions at random points, of the kernels alone; fp32 leaves three digits."""
    x, delta, gain = draw(3, 12), draw(3, 12, seed=1), draw(12, seed=2)
    q, (cos, sin) = draw(1, 3, 2, 12, seed=4), angles(1, 3, 12)

    def total(x, delta, gain, q):
        y, s = norm(x, delta, gain, "triton")
        return (y * y.sin() + swiglu(s, y, impl="triton")).sum() + rope(
            q, cos, sin, gain, EPS, impl="triton"
        ).sin().sum()

    leaves = [t.requires_grad_() for t in (x, delta, gain, q)]
    total(*leaves).backward()
    for i, leaf in enumerate(leaves):
        step = 1e-2 * draw(*leaf.shape, seed=5)
        with torch.no_grad():
            ends = [total(*(t + sign * step if j == i else t for j, t in enumerate(leaves))) for sign in (1, -1)]
        found = (ends[0] - ends[1]).item() / 2
        assert found == pytest.approx((leaf.grad * step).sum().item(), rel=2e-3, abs=2e-5)


@pytest.mark.parametrize("which", [0, 1], ids=["y", "s"])
def test_one_output_is_enough(which):
    """Only y, as after the last block, or only s, has a gradient."""
    x, delta, gain = draw(3, 12), draw(3, 12, seed=1), draw(12, seed=2)
    for second in (delta, None):
        inputs = [x, second, gain]
        got = outcome(lambda *t: norm(*t, "triton")[which], inputs, (2,))
        want = outcome(lambda *t: exact_norm(*t)[which], inputs, (2,))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layer", ["norm", "rope", "swiglu"])
def test_a_second_derivative_raises(layer):
    x = draw(1, 3, 2, 8).requires_grad_()
    y = {
        "norm": lambda: norm(x, None, torch.ones(8, device=DEVICE), "triton")[0],
        "rope": lambda: rope(x, *angles(1, 3, 8), impl="triton"),
        "swiglu": lambda: swiglu(x, x, impl="triton"),
    }[layer]()
    (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: rms_norm(x, None, torch.ones(4), EPS), r"gain must be \[D\]"),
        (lambda x: rms_norm(x, x[:1], torch.ones(8), EPS), "delta must have shape and dtype of x"),
        (lambda x: rms_norm(x, x.bfloat16(), torch.ones(8), EPS), "torch.bfloat16"),
        (lambda x: rms_norm(x, None, torch.ones(8), 0.0), "eps=0.0: expected a positive number"),
        (lambda x: rms_norm(x, None, torch.ones(8), EPS, impl="cuda"), "unknown impl 'cuda'"),
        (lambda x: rms_norm(x.double(), None, torch.ones(8), EPS, impl="triton"), "got torch.float64"),
        (lambda x: rms_norm(x.repeat(1, 1, 1, 2000), None, torch.ones(16000), EPS, impl="triton"), "rows of up to"),
        (lambda x: rope(x[0], *angles(1, 3, 8)), r"\[B, T, heads, K\]"),
        (lambda x: rope(x[..., :7], *angles(1, 3, 8)), "K even"),
        (lambda x: rope(x, *angles(1, 2, 8)), r"cos must be \[B or 1"),
        (lambda x: rope(x, angles(2, 3, 8)[0], angles(1, 3, 8)[1]), "both alike"),
        (lambda x: rope(x, *angles(1, 3, 8), torch.ones(4)), r"gain must be \[K\]"),
        (lambda x: swiglu(x, x[:1]), "up must have shape and dtype of gate"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 3, 2, 8))


def test_auto_leaves_long_rows_to_torch(monkeypatch):
    monkeypatch.setattr("kernels.impl._automatic", lambda *_: "triton")  # as on a GPU
    monkeypatch.setattr(layers, "TRITON_MOST", 3)
    monkeypatch.setattr(layers, "_launches", None)
    x = torch.ones(1, 1, 2, 4, device=DEVICE)
    gain = torch.ones(4, device=DEVICE)
    assert torch.equal(rms_norm(x, x, gain, EPS)[1], 2 * x)
    assert torch.equal(rope(x, *angles(1, 1, 4), gain), rope(x, *angles(1, 1, 4), gain, impl="torch"))


# ---------------------------------------------------------------- a decoder of them


@pytest.mark.parametrize("family, trained", [("qwen3", "adapters, recomputed"), ("qwen3", "all"), ("llama", "all")])
def test_a_decoder_is_the_same(family, trained):
    """Hidden states and every gradient, where everything trains, and with LoRA and activation checkpointing."""
    found = []
    for impl in IMPLS:
        torch.manual_seed(0)
        model = Decoder(DecoderConfig(31, 24, 40, 2, 4, 2, head_dim=8, model_type=family)).to(DEVICE)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
        if trained != "all":
            add_lora(model, LoRAConfig(r=2))
            model.checkpoint_activations = True
        model.set_layers(impl)
        tokens = torch.arange(14, device=DEVICE).view(2, 7) * 3 % 31
        positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6]], device=DEVICE)
        hidden = model(tokens, positions)
        (hidden * draw(*hidden.shape)).sum().backward()
        found.append([hidden.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 8
    for want, got in zip(*found, strict=True):
        # fp32 sums in another order through two blocks; a wrong term would show as order 1.
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()


def test_a_new_decoder_takes_torch(monkeypatch):
    """No device has been timed yet."""
    monkeypatch.setattr(layers, "_launches", None)
    Decoder(DecoderConfig(31, 24, 40, 1, 4, 2, head_dim=8))(torch.zeros(1, 3, dtype=torch.int64))


def test_the_twins_are_torchs_operations():
    """Bit for bit what they stand for, in fp32 and bf16."""
    for dtype in DTYPES.values():
        x, delta, gain = draw(5, 24, dtype=dtype), draw(5, 24, dtype=dtype, seed=1), draw(24, seed=2)
        y, s = norm(x, delta, gain, "torch")
        assert torch.equal(s, x + delta) and torch.equal(y, F.rms_norm(x + delta, (24,), gain.to(dtype), EPS))
        assert norm(x, None, gain, "torch")[1] is x
        assert torch.equal(swiglu(x, delta, impl="torch"), F.silu(x) * delta)
        q, (cos, sin), head = draw(2, 3, 4, 8, dtype=dtype), angles(1, 3, 8, dtype), draw(8, seed=1)
        a, b = F.rms_norm(q, (8,), head.to(dtype), EPS).chunk(2, -1)
        want = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
        assert torch.equal(rope(q, cos, sin, head, EPS, impl="torch"), want)
