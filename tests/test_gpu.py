"""What only a device shows: the compiled kernels over the full grid, and rows beyond 2^31 elements.

pytest -m gpu
"""

import pytest
import torch

import losses
from kernels import linear_score, logits_score

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


@pytest.mark.parametrize("kind", ["random", "equal", "extreme", "one live"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("v", [1, 2, 128, 507, 4095, 50257, 50304, 151936])
@pytest.mark.parametrize("n", [1, 3, 4097])
def test_triton_gives_what_torch_gives(n, v, dtype, kind):
    if n == 4097 and (kind != "random" or v == 151936):
        pytest.skip("large and of one kind is enough")
    z, targets = rows(kind, n, v, dtype)
    for name, score in SCORES.items():
        if kind == "one live" and name in ("ce", "dpsm", "smoothing", "custom"):
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


def test_more_elements_than_fit_32_bits():
    n, v = 14400, 151936  # 2.2e9
    z = torch.empty(n, v, device="cuda", dtype=torch.bfloat16).normal_()
    targets = torch.randint(v, (n,), device="cuda")
    last = z[-2:].clone().requires_grad_()
    want, _ = logits_score(last, targets[-2:], losses.brier, reduction="sum")
    want.backward()
    _, m = logits_score(z.requires_grad_(), targets, losses.brier, reduction="sum", inplace=True)
    assert torch.equal(z.detach()[-2:], last.grad)
    assert m.log_p.isfinite().all()


@pytest.mark.parametrize("v", [50257, 151936])
def test_linear_score_in_bf16_against_fp64(v):
    h = torch.randn(512, 256, device="cuda", dtype=torch.bfloat16)
    w = (torch.randn(v, 256, device="cuda") * 0.1).bfloat16()
    targets = torch.randint(v, (512,), device="cuda")
    exact = [x.double().requires_grad_() for x in (h, w)]
    eager = [x.clone().requires_grad_() for x in (h, w)]
    ours = [x.clone().requires_grad_() for x in (h, w)]
    logits_score(exact[0] @ exact[1].T, targets, losses.ce, impl="torch")[0].backward()
    torch.nn.functional.cross_entropy(eager[0] @ eager[1].T, targets).backward()
    for chunk in (None, 100):
        for x in ours:
            x.grad = None
        linear_score(*ours, targets, losses.ce, chunk=chunk)[0].backward()
        for a, b, c in zip(ours, eager, exact, strict=True):
            scale = c.grad.abs().max()
            error, reference = ((x.grad.double() - c.grad).abs().max() / scale for x in (a, b))
            assert error <= reference + 1e-3
