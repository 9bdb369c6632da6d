"""The one kernel from logits to gradient, on rows of every kind, length and alignment."""

import re
from pathlib import Path

import pytest
import torch
from formulas import DEVICE
from named_scores import NAMED, same_moments

from kernels import logits_score, losses, softmax_moments, triton_kernels


# bf16 507: held on chip; fp32 20011: read twice; 8: less than a vector; 1024: rows on 16-byte boundaries.
@pytest.mark.parametrize(
    "vocab, dtype", [(507, torch.bfloat16), (20011, torch.float32), (8, torch.float32), (1024, torch.bfloat16)]
)
@pytest.mark.parametrize("name", NAMED)
def test_one_kernel_gives_what_moments_and_gradient_give(name, vocab, dtype):
    generator = torch.Generator().manual_seed(vocab)
    logits = (torch.randn(5, vocab, generator=generator) * 4).to(DEVICE, dtype)
    targets = torch.tensor([0, vocab - 1, -100, vocab // 2, 3], device=DEVICE)
    weights = torch.tensor([1.0, 0.5, 1.0, 0.0, 2.0], device=DEVICE)
    if vocab == 20011:
        logits[4, 5000:15000] = -torch.inf  # whole blocks outside of the vocabulary
    if vocab == 507:
        logits[4, 100:200] = -torch.inf  # outside of the vocabulary
        logits[0, 7] = logits[0, 0] = logits[0].max() + 1  # a tie that the target wins
        logits[1, 7] = logits[1, vocab - 1] = logits[1].max() + 1  # and one that it loses
    got_z, want_z = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    got, m = logits_score(got_z, targets, NAMED[name], weights=weights, fisher=True, impl="triton")
    (got * 1.7).backward()
    want, w = logits_score(want_z, targets, NAMED[name], weights=weights, fisher=True, impl="torch")
    (want * 1.7).backward()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    same_moments(m, w)
    # Terms of order 1 cancel where a wrong entry is nearly sure.
    torch.testing.assert_close(m.fisher, w.fisher, rtol=1e-4, atol=2e-6)
    # bf16: each side rounds the gradient to 8 bits, and once more where backward scales it by 1.7.
    rtol = 2e-5 if dtype == torch.float32 else 2**-6
    torch.testing.assert_close(got_z.grad, want_z.grad, rtol=rtol, atol=5e-7)  # entries cancel against 1
    assert (got_z.grad[2] == 0).all() and (got_z.grad[3] == 0).all() and m.log_p[3] != 0


@pytest.mark.parametrize("layout", ["contiguous", "padded rows", "odd start"])
@pytest.mark.parametrize("inplace", [False, True])
def test_rows_of_any_alignment(layout, inplace):
    # A neighbour's element written, or an end of a row left out, shows in the gradient of the whole storage.
    store = torch.randn(4 * 80 + 3, generator=torch.Generator().manual_seed(3)).to(DEVICE, torch.bfloat16)
    strides = {"contiguous": (53, 1), "padded rows": (80, 1), "odd start": (53, 1)}[layout]
    z = store.clone()[1 if layout == "odd start" else 0 :].as_strided((4, 53), strides)
    whole = z.untyped_storage()
    before = torch.tensor([], dtype=z.dtype, device=DEVICE).set_(whole).clone()
    targets = torch.tensor([0, 52, 17, -100], device=DEVICE)
    reference = z.float().requires_grad_()
    logits_score(reference, targets, losses.brier, reduction="sum", impl="torch")[0].backward()
    leaf = z.requires_grad_() if layout == "contiguous" else z.detach().requires_grad_()
    logits_score(leaf, targets, losses.brier, reduction="sum", inplace=inplace, impl="triton")[0].backward()
    torch.testing.assert_close(leaf.grad.float(), reference.grad, rtol=2**-7, atol=1e-6)
    after = torch.tensor([], dtype=z.dtype, device=DEVICE).set_(whole)
    untouched = torch.ones(len(after), dtype=torch.bool, device=DEVICE)
    if inplace:
        untouched.as_strided((4, 53), strides, z.storage_offset()).fill_(False)
    assert torch.equal(after[untouched], before[untouched])
    assert inplace != torch.equal(after[~untouched], before[~untouched]) or not inplace


KINDS = {
    "ordinary": lambda z: z,
    "ties": lambda z: z.round(),
    "some outside": lambda z: torch.where(z < -2, -torch.inf, z),  # but for the target, which the test sets
    "masked with the least number": lambda z: torch.where(z < -2, torch.finfo(torch.bfloat16).min, z),
    "all the least number": lambda z: torch.full_like(z, torch.finfo(torch.bfloat16).min),
    "far from 0": lambda z: z + 300,
    "far apart": lambda z: 80 * z,
}


@pytest.mark.parametrize("held", [None, 2, 0])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_every_kind_and_length(kind, held, monkeypatch):
    """The target and the row's ends in the first, the last and a common vector; rows held whole, in part (there of
    every length), not at all; and rows that the fast kernel leaves to the other."""
    triton_impl = pytest.importorskip("kernels.triton_impl")
    if held is not None:
        shape = triton_impl.score_shape
        monkeypatch.setattr(triton_impl, "score_shape", lambda v, dtype: shape(v, dtype, warps=1, held=held))
    generator = torch.Generator().manual_seed(7)
    for v in (1, 2, 9, 16, 31, 777) if held == 2 else (16, 777):
        targets = torch.tensor([0, v - 1, v // 2, min(v - 1, 8)], device=DEVICE)
        z = KINDS[kind](torch.randn(4, v, generator=generator) * 4)
        z.scatter_(1, targets.cpu()[:, None], 1.0)
        z = z.to(DEVICE, torch.bfloat16)
        score = NAMED[["dpsm", "smoothing"][v % 2]]
        got_z, want_z = z.clone().requires_grad_(), z.double().requires_grad_()
        got, m = logits_score(got_z, targets, score, reduction="sum", fisher=True, impl="triton")
        want, w = logits_score(want_z, targets, score, reduction="sum", fisher=True, impl="torch")
        got.backward()
        want.backward()
        for name in ("log_p", "r1", "r2", "r3", "r4", "entropy", "confidence", "support"):
            value = getattr(w, name).float()
            torch.testing.assert_close(getattr(m, name), value, rtol=3e-5, atol=3e-6, msg=lambda x: f"{v} {name}: {x}")  # noqa: B023
        if "least" not in kind:  # their sum is beyond fp32
            torch.testing.assert_close(m.mean_log_p, w.mean_log_p.float(), rtol=3e-5, atol=3e-5)
        assert torch.equal(m.correct, w.correct)
        if "least" not in kind or v % 2 == 0:  # dpsm's does not read that sum
            torch.testing.assert_close(m.fisher, w.fisher.float(), rtol=1e-3, atol=3e-6)
        torch.testing.assert_close(got_z.grad.double(), want_z.grad, rtol=2**-7, atol=1e-6)


# Entries that tie with the target at 40, of 403: in the row's first vector, the target's own, the last, and others.
TIES = ([], [0], [39], [41], [402], [0, 402], [41, 300], [16, 17], [250], [3, 39, 41, 250])


@pytest.mark.parametrize(
    "held, name, scale", [(None, "dpsm", 1.0), (1, "smoothing", 0.3), (0, "power", 1.0), (1, "dpsm", 1.0)]
)
def test_the_first_of_a_tie_is_the_prediction(held, name, scale, monkeypatch):
    """The fast kernel decides it, of rows that it holds whole, in part or not at all: the other has no row."""
    triton_impl = pytest.importorskip("kernels.triton_impl")
    if held is not None:
        shape = triton_impl.score_shape
        monkeypatch.setattr(
            triton_impl, "score_shape", lambda v, dtype: shape(v, dtype, warps=1, held=held, hints=True)
        )
    monkeypatch.setattr(triton_impl, "rest_kernel", {(len(TIES) + 1, 1): lambda **arguments: None})
    z = torch.randn(len(TIES) + 1, 403, generator=torch.Generator().manual_seed(5))
    for row, places in zip(z, [*TIES, [41]], strict=True):
        row[[40, *places]] = row.max() + 1
    z[-1, 200] = z.max() + 1  # beats the target
    z = z.to(DEVICE, torch.bfloat16)
    targets = torch.full((len(z),), 40, device=DEVICE)
    how = dict(reduction="sum", fisher=True, scale=scale)
    found = {}
    for impl in ("triton", "torch"):
        leaf = z.clone().requires_grad_()
        loss, m = logits_score(leaf * 1, targets, NAMED[name], inplace=impl == "triton", impl=impl, **how)
        loss.backward()
        found[impl] = loss, m, leaf.grad
    (got, m, got_grad), (want, w, want_grad) = found.values()
    assert w.correct.tolist() == [not places or min(places) > 40 for places in TIES] + [False]
    same_moments(m, w)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got_grad, want_grad, rtol=2**-6, atol=5e-7)
    moments = softmax_moments(z, targets, scale=scale, impl="triton")
    assert torch.equal(moments.correct, w.correct)


def test_kernels_get_only_tensors_on_16_byte_boundaries():
    # The interpreter reads any address; a device does not.
    triton_impl = pytest.importorskip("kernels.triton_impl")
    z = torch.randn(8, 80).bfloat16()
    whole = z[1:, :50], z[1:, :50]
    assert all(a is b for a, b in zip(triton_impl._aligned(*whole), whole, strict=True))
    for logits, out in ((z[:4, 1:51], z[4:, :50]), (z[:4, :50], z[4:, 3:53])):
        got, result = triton_impl._aligned(logits, out)
        assert torch.equal(got, logits) and got.stride() == result.stride() and got.shape == result.shape
        assert got.data_ptr() % 16 == result.data_ptr() % 16 == 0


@pytest.mark.parametrize("programs", [3, 1056])  # fewer than blocks, and more
@pytest.mark.parametrize("scale", [1.0, 1.7, 0.0, float("nan")])
@pytest.mark.parametrize("rows, vocab", [(5, 37), (2, 64), (1, 7)])
def test_rescaling_takes_every_element_once(rows, vocab, scale, programs, monkeypatch):
    triton_impl = pytest.importorskip("kernels.triton_impl")
    monkeypatch.setattr(triton_impl, "RESCALED", 16)
    monkeypatch.setattr(triton_impl, "RESCALERS", programs)
    generator = torch.Generator().manual_seed(rows)
    for padding in (0, 11):
        whole = torch.randn(rows, vocab + padding, generator=generator).to(DEVICE)
        want = whole.clone()
        want[:, :vocab] *= scale
        triton_impl.rescale(whole[:, :vocab], torch.tensor(scale, device=DEVICE))
        torch.testing.assert_close(whole, want, rtol=0, atol=0, equal_nan=True)
    triton_impl.rescale(whole[:0], torch.tensor(2.0, device=DEVICE))


def test_no_difference_is_compared_with_zero():
    """A compiler fuses a product into the difference that follows: x - x of a rounded x = a * b is its rounding."""
    for file in sorted(Path(triton_kernels.__file__).parent.glob("triton_*.py")):
        code = re.sub("#.*", "", file.read_text())
        assert not re.search(r"(\w+(?:\[\d+\])?) - \1\b", code), file.name
