"""What only a device shows: the compiled kernels over the full grid, the layers' too, tensors beyond 2^31 elements, the
memory of linear_score, and that nothing waits for the device.

    pytest -m gpu tests/kernels/test_gpu.py -n 8     # pytest-xdist: most of the time is spent compiling kernels
"""

import time

import pytest
import torch
from accounting import bytes_beside
from layer_formulas import EPS, angles, draw, exact_norm, exact_swiglu, holds, norm, turned

from kernels import linear_score, logits_score, losses, rms_norm, rope, swiglu
from kernels.bench.providers import ALPHA, FROM_HIDDEN, FROM_LOGITS
from kernels.bench.timing import HEADS, make_inputs, measure_memory
from kernels.chunks import ALLOWANCE, cuda_chunk
from kernels.moments import new_stats
from model.decoder import Decoder, DecoderConfig
from model.lora import LoRAConfig, add_lora

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs a CUDA device; TRITON_INTERPRET covers a small grid"
    ),
]
SCORES = {
    "ce": losses.ce,
    "dpsm": losses.dpsm(0.3),
    "spherical": losses.spherical,
    "smoothing": losses.smoothing(0.1),
    "power": losses.power(1.25),
    "deft": losses.deft,
    "custom": lambda m: m.r1 * m.log_p.square(),
}


def rows(kind, n, v, dtype):
    generator = torch.Generator("cuda").manual_seed(v)
    z = torch.randn(n, v, device="cuda", generator=generator) * 4
    if kind == "equal":
        z = torch.full_like(z, 3.0)
    elif kind == "extreme":
        z = torch.where(z > 0, 1e4, -1e4)
    elif kind == "one live":
        z.fill_(-torch.inf)
        z[:, v // 2] = 1.0
    targets = torch.randint(v, (n,), device="cuda", generator=generator)
    targets[::5] = -100
    return z.to(dtype), targets


@pytest.mark.parametrize("shape", HEADS)
@pytest.mark.parametrize(
    "name", [name for name in (*FROM_LOGITS, *FROM_HIDDEN) if name.startswith(("ours", "linear_"))]
)
def test_the_benchs_losses_at_its_heads(name, shape):
    """What kernels.bench times, of fewer tokens: the loss is that of float64. First, as the others wait for these."""
    _, v, d = HEADS[shape]
    leaves, targets = make_inputs(HEADS[shape]._replace(n=260, d=d if name in FROM_HIDDEN else None), "bf16", "cuda")
    exact = leaves[0].detach().double()
    exact = exact @ leaves[1].detach().double().t() if name in FROM_HIDDEN else exact
    log_p = exact.log_softmax(1)
    log_p_y = log_p.gather(1, targets[:, None])[:, 0]
    share = 0.0 if name.endswith("CE") else ALPHA
    brier = log_p.exp().square().sum(1) - 2 * log_p_y.exp() + 1
    want = ((1 - share) * -log_p_y + share * brier).mean()
    function = (FROM_HIDDEN if name in FROM_HIDDEN else FROM_LOGITS)[name]
    loss = function(*(leaf.detach().clone().requires_grad_() for leaf in leaves), targets)
    loss.backward()
    # The product's logits are rounded to bf16.
    torch.testing.assert_close(loss.double(), want, rtol=2e-3 if name in FROM_HIDDEN else 2e-5, atol=0)


@pytest.mark.parametrize("kind", ["random", "equal", "extreme", "one live"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("v", [1, 2, 128, 507, 4095, 50257, 50304, 151936])
@pytest.mark.parametrize("n", [1, 3, 4097])
def test_triton_gives_what_torch_gives(n, v, dtype, kind):
    if n == 4097 and (kind != "random" or (v == 151936 and dtype != torch.bfloat16)):
        pytest.skip("large and of one kind is enough")
    z, targets = rows(kind, n, v, dtype)
    for name, score in SCORES.items():
        if kind == "one live" and name in ("ce", "dpsm", "smoothing", "deft", "custom"):
            continue  # infinite for nearly every target
        got_z, want_z = z.clone().requires_grad_(), z.clone().requires_grad_()
        got, m = logits_score(got_z, targets, score, impl="triton")
        want, w = logits_score(want_z, targets, score, impl="torch")
        got.backward()
        want.backward()
        torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-6, msg=f"{name}")
        torch.testing.assert_close(m.log_p, w.log_p, rtol=2e-5, atol=1e-5)
        torch.testing.assert_close(m.entropy, w.entropy, rtol=1e-4, atol=1e-4)
        assert torch.equal(m.correct, w.correct)
        # A 16-bit gradient is rounded once by each; its entries cancel against the largest.
        scale = want_z.grad.abs().max().float()
        tolerance = {torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}[dtype]
        assert ((got_z.grad.float() - want_z.grad.float()).abs() <= tolerance * scale + 1e-7).all(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("v", [507, 50257, 151936])
def test_softcap_order_entropy_predictions_and_the_likeliest(v, dtype):
    z, targets = rows("random", 9, v, dtype)

    def everything(m):
        return m.s - m.log_p + 0.3 * m.entropy + 0.01 * m.lse.square()

    everything.order = torch.tensor(1.5, device="cuda")
    for score, how in ((losses.dpsm(0.3), {}), (everything, dict(predictions=True, topk=20))):
        found = {}
        for impl in ("triton", "torch"):
            leaf = z.clone().requires_grad_()
            loss, m = logits_score(leaf, targets, score, scale=0.5, softcap=20.0, impl=impl, **how)
            loss.backward()
            found[impl] = loss, leaf.grad.float(), m
        (got, slope, m), (want, wanted, w) = found["triton"], found["torch"]
        torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-6)
        tolerance = 2e-5 if dtype == torch.float32 else 2**-7
        assert ((slope - wanted).abs() <= tolerance * wanted.abs().max() + 1e-7).all()
    assert torch.equal(m.predicted, w.predicted) and torch.equal(m.top_ids, w.top_ids)
    torch.testing.assert_close(m.top_log_p, w.top_log_p, rtol=2e-5, atol=1e-5)
    torch.testing.assert_close(m.top_entropy, w.top_entropy, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("v", [507, 50257, 151936])
def test_the_second_kernel_is_for_rare_rows_alone(v, monkeypatch):
    """Ordinary rows and those with ties are the first kernel's. It marks what it leaves with 2 in ``correct``."""
    from kernels import triton_impl

    class Nothing:
        def __getitem__(self, grid):
            return lambda **arguments: None

    monkeypatch.setattr(triton_impl, "rest_kernel", Nothing())
    z, targets = rows("random", 64, v, torch.bfloat16)
    targets = targets.clamp_min(0)
    z[::2].scatter_(1, targets[::2, None], z[::2].amax(1, keepdim=True))
    z[5, 3] = float("-inf")
    stats, correct = new_stats(z, len(z))
    rest = dict(stats=stats, correct=correct, losses=stats[0].clone(), fisher=stats[0].clone(), out=torch.empty_like(z))
    triton_impl.fused_score("dpsm", 0.5, z, targets, None, None, **rest)
    assert (correct.view(torch.uint8) == 2).nonzero()[:, 0].tolist() == [5]


def of_last_rows(z, targets, score, upstream):
    last = z[-2:].clone().requires_grad_()
    loss, m = logits_score(last, targets[-2:], score, reduction="sum", impl="torch")
    (loss * upstream).backward()
    return last.grad.float(), m


@pytest.mark.parametrize("v", [50257, 151936])
@pytest.mark.parametrize("way", ["score kernel in place", "score kernel, rescaled", "moments and gradient kernels"])
def test_more_elements_than_fit_32_bits(way, v):
    """Offsets of the last rows beyond 2^31 in each kernel, at a held and at a twice read row length."""
    n = 2**31 // v + 260
    z = torch.empty(n, v, device="cuda", dtype=torch.bfloat16).normal_()
    targets = torch.randint(v, (n,), device="cuda")
    score = (lambda m: losses.brier(m)) if way.startswith("moments") else losses.brier
    upstream = 3.0 if "rescaled" in way else 1.0
    want, w = of_last_rows(z, targets, score, upstream)
    inplace = way != "score kernel, rescaled"
    loss, m = logits_score(z.requires_grad_(), targets, score, reduction="sum", inplace=inplace)
    (loss * upstream).backward()
    # One rounding to bf16 by each, two where rescaled.
    torch.testing.assert_close(z.grad[-2:].float(), want, rtol=2**-6, atol=1e-9)
    torch.testing.assert_close(m.log_p[-2:], w.log_p, rtol=2e-5, atol=1e-5)
    assert m.log_p.isfinite().all()


@pytest.mark.parametrize("v", [507, 50257])
@pytest.mark.parametrize("layout", ["padded rows", "odd start", "every other row", "transposed", "every other column"])
def test_views(layout, v):
    """Any layout gives what a contiguous copy gives; one that is not contiguous along V is copied."""
    wide = torch.randn(12, 2 * v + 64, device="cuda").bfloat16()
    z = {
        "padded rows": wide[:5, :v],
        "odd start": wide[:5, 3 : v + 3],
        "every other row": wide[:10:2, :v],
        "transposed": wide[:5, :v].t().contiguous().t(),
        "every other column": wide[:5, : 2 * v : 2],
    }[layout]
    targets = torch.randint(v, (5,), device="cuda")
    got_z, want_z = z.detach().requires_grad_(), z.clone(memory_format=torch.contiguous_format).requires_grad_()
    for leaf, impl in ((got_z, "triton"), (want_z, "torch")):
        logits_score(leaf, targets, losses.dpsm(0.3), impl=impl)[0].backward()
    scale = want_z.grad.abs().max().float()
    assert ((got_z.grad.float() - want_z.grad.float()).abs() <= 2**-7 * scale).all()


@pytest.mark.parametrize("dtypes", ["bf16", "fp16", "bf16, fp32 weight", "fp32"])
@pytest.mark.parametrize("v", [507, 50257, 151936])
def test_linear_score_against_fp64(v, dtypes):
    """At most the error of the eager reference in the same dtypes plus 1e-3, in one chunk and in many."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtypes[:4]]
    weight_dtype = torch.float32 if "fp32" in dtypes else dtype
    h = torch.randn(512, 256, device="cuda", dtype=dtype)
    w = (torch.randn(v, 256, device="cuda") * 0.1).to(weight_dtype)
    b = torch.randn(v, device="cuda", dtype=weight_dtype)
    targets = torch.randint(v, (512,), device="cuda")
    rounded = h, w.to(dtype), b.to(dtype)
    exact = [x.double().requires_grad_() for x in rounded]
    eager = [x.clone().requires_grad_() for x in rounded]
    ours = [x.clone().requires_grad_() for x in (h, w, b)]
    logits_score(exact[0] @ exact[1].T + exact[2], targets, losses.ce, impl="torch")[0].backward()
    torch.nn.functional.cross_entropy(torch.nn.functional.linear(*eager), targets).backward()
    for reduction in ("mean", "none"):
        for chunk in (None, 100):
            for x in ours:
                x.grad = None
            loss, _ = linear_score(*ours[:2], targets, losses.ce, bias=ours[2], chunk=chunk, reduction=reduction)
            loss.mean().backward()
            for x, e, c in zip(ours, eager, exact, strict=True):
                assert x.grad.dtype == x.dtype
                error, reference = ((y.grad.double() - c.grad).norm() / c.grad.norm() for y in (x, e))
                assert error <= reference + 1e-3


@pytest.mark.parametrize("shape", ["gpt2", "qwen3"])
def test_memory_of_linear_score(shape):
    n, v, d = HEADS[shape]
    peak = measure_memory(FROM_HIDDEN["linear_score DPSM, Fisher"], HEADS[shape], "bf16", "cuda")
    beside = peak - 2 * (n + v) * d
    rows = cuda_chunk(n, v, d, 2, 2, torch.device("cuda", torch.cuda.current_device()), direct=True)
    # What the accounting leaves out is of size N: statistics, targets, masks, some 200 bytes a token; and the
    # allocator hands out up to 1 MB more than was asked for, of some large tensors.
    assert abs(beside - bytes_beside(n, v, d, rows, 2, 2)) <= 400 * n + 8 * 2**20
    if shape == "gpt2":
        assert beside <= ALLOWANCE


def test_nothing_waits_for_the_device_and_a_moving_alpha_compiles_nothing():
    alpha = torch.zeros((), device="cuda")
    score = losses.dpsm(alpha)
    h = torch.randn(300, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(1000, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(1000, (300,), device="cuda")

    def step():
        linear_score(h, w, targets, score, fisher=True)[0].backward()
        logits_score((h @ w.t()).float(), targets, score)[0].backward()

    step()  # compiles, and asks for the free memory of this shape
    torch.cuda.synchronize()
    start = time.perf_counter()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            alpha.add_(0.1)
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert time.perf_counter() - start < 1.0, "a kernel takes seconds to compile"


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_inside_torch_compile(reduction):
    def step(h, w, targets):
        return linear_score(h * 2, w, targets, losses.brier, reduction=reduction)[0].sum()

    grads = []
    for function in (step, torch.compile(step, fullgraph=True)):
        generator = torch.Generator("cuda").manual_seed(0)
        h, w = (torch.randn(n, 64, device="cuda", generator=generator).bfloat16() for n in (300, 1000))
        targets = torch.arange(300, device="cuda")
        leaves = h.requires_grad_(), w.requires_grad_()
        function(*leaves, targets).backward()
        grads.append([x.grad.float() for x in leaves])
    for got, want in zip(*grads, strict=True):
        assert (got - want).abs().max() <= 2**-7 * want.abs().max()  # a rounding to bf16 each


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])


@DTYPES
@pytest.mark.parametrize("d", [1, 30, 576, 1024, 4096, 8192])
@pytest.mark.parametrize("n", [1, 3, 2049])
def test_norm_against_fp64(n, d, dtype):
    x, delta, gain = draw(n, d, dtype=dtype), draw(n, d, dtype=dtype, seed=1), draw(d, dtype=dtype, seed=2)
    for second, frozen in ((delta, ()), (delta, (2,)), (None, ()), (None, (2,))):
        holds(norm, exact_norm, [x, second, gain], frozen)


@DTYPES
@pytest.mark.parametrize("heads, width", [(16, 128), (8, 128), (9, 64), (3, 12), (1, 256)])
@pytest.mark.parametrize("batch", [1, 3], ids=["shared positions", "positions a row"])
def test_rope_against_fp64(batch, heads, width, dtype):
    x, gain = draw(3, 257, heads, width, dtype=dtype), draw(width, dtype=dtype, seed=1)
    cos, sin = angles(batch, 257, width, dtype)
    for second, frozen in ((gain, ()), (gain, (1,)), (None, ())):
        holds(
            lambda x, gain, impl: rope(x, cos, sin, gain, EPS, impl=impl),
            lambda x, gain: turned(x, cos.double(), sin.double(), gain),
            [x, second],
            frozen,
        )


@DTYPES
@pytest.mark.parametrize("shape", [(1, 1), (3, 7, 999), (2049, 3072)])
def test_swiglu_against_fp64(shape, dtype):
    holds(swiglu, exact_swiglu, [draw(*shape, dtype=dtype, scale=3.0), draw(*shape, dtype=dtype, seed=1)])


def test_layers_of_more_elements_than_fit_32_bits():
    """The last rows, forward and backward, are those of the rows alone."""
    n = 2**31 // 1024 + 40
    x = torch.empty(n, 1024, device="cuda", dtype=torch.bfloat16).normal_()
    gain = torch.rand(1024, device="cuda", dtype=torch.bfloat16)
    cos, sin = angles(1, n, 128, torch.bfloat16)

    def layers(x, cos, sin, impl):
        return (
            lambda: rms_norm(x, None, gain, EPS, impl=impl)[0],
            lambda: rope(x.view(1, -1, 8, 128), cos, sin, gain[:128], EPS, impl=impl),
            lambda: swiglu(x, x, impl=impl),
        )

    x.requires_grad_()
    last = x.detach()[-9:].requires_grad_()
    whole, alone = layers(x, cos, sin, "triton"), layers(last, cos[:, -9:], sin[:, -9:], "triton")
    for large, small in zip(whole, alone, strict=True):
        got, want = large(), small()
        assert torch.equal(got.view(n, -1)[-9:], want.view(9, -1))
        (slope,) = torch.autograd.grad(got, x, got.detach())
        (wanted,) = torch.autograd.grad(want, last, want.detach())
        assert torch.equal(slope[-9:], wanted)
        del got, slope


def decoder_step(impl, dtype=torch.bfloat16):
    """A step of a Qwen3 of two blocks with adapters, to be called again and again; and its adapters."""
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(97, 256, 640, 2, 4, 2, head_dim=64), dtype).cuda()
    add_lora(model, LoRAConfig(r=8))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    model.set_layers(impl)
    tokens = torch.arange(300, device="cuda").view(2, 150) % 97
    weights = torch.randn(2, 150, 256, device="cuda", generator=torch.Generator("cuda").manual_seed(1))

    def step():
        (model(tokens) * weights).sum().backward()

    return step, [p for p in model.parameters() if p.requires_grad]


def test_a_decoder_of_fused_layers_errs_no_more_than_torchs():
    found = {}
    for name, impl, dtype in (("exact", "torch", torch.float32), ("torch", "torch", None), ("triton", "triton", None)):
        step, adapters = decoder_step(impl, dtype or torch.bfloat16)
        step()
        found[name] = torch.cat([p.grad.flatten() for p in adapters])
    of_torch, of_triton = ((found[name] - found["exact"]).norm() for name in ("torch", "triton"))
    assert of_triton <= 1.1 * of_torch  # both round at about the same places


def test_the_layers_wait_for_nothing():
    step, _ = decoder_step("triton")
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_layers_inside_torch_compile():
    cos, sin = angles(1, 300, 64, torch.bfloat16)

    def step(x, gain):
        y, s = rms_norm(x * 2, x, gain, EPS)
        y = swiglu(y, s).view(1, 300, 4, 64)
        return (rope(y, cos, sin, gain[:64]) * 2 + s.view_as(y)).float().sin().sum()

    grads = []
    for function in (step, torch.compile(step, fullgraph=True)):
        leaves = [draw(*n, dtype=torch.bfloat16).requires_grad_() for n in ((300, 256), (256,))]
        function(*leaves).backward()
        grads.append([t.grad.float() for t in leaves])
    for got, want in zip(*grads, strict=True):
        assert (got - want).abs().max() <= 2**-6 * want.abs().max()  # a rounding to bf16 each, of sums of two
