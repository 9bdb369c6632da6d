"""Products in FP8: the formats and their scales, the gradients against the definition, and where a model has them."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from gpt2_models import build, logits_of, mean_nll, tokens_for

from model import fp8

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype, most, bits", [(E4M3, 448.0, 3), (E5M2, 57344.0, 2)])
@pytest.mark.parametrize("size", [1e-20, 1.0, 1e20])
def test_the_largest_number_is_the_formats_and_the_others_are_rounded_to_its_bits(dtype, most, bits, size):
    x = size * randn(64, 32)
    x8, scale = fp8.scaled(x, dtype)
    assert x8.dtype == dtype and x8.float().abs().max() == most
    back, large = x8.double() * scale.double(), x.abs() > x.abs().max() / 100  # normal numbers of both formats
    assert ((back - x).abs() <= 2.0 ** -(bits + 1) * 1.0001 * x.abs())[large].all()
    assert ((back - x).abs() > 2.0 ** -(bits + 3) * x.abs())[large].any()  # they are rounded


def test_of_zeros_there_is_a_scale():
    x8, scale = fp8.scaled(torch.zeros(16, 16), E4M3)
    assert scale > 0 and (x8.float() == 0).all()


def rounded(x, dtype):
    """float64, with the numbers that are left of x."""
    x8, scale = fp8.scaled(x, dtype)
    return x8.double() * scale.double()


@pytest.mark.parametrize("widens", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_those_of_the_rounded_numbers(dtype, widens):
    x, bias, g = randn(2, 16, 32).to(dtype), randn(48, seed=1), randn(2, 16, 48, seed=2).to(dtype)
    weight = randn(32, 48, seed=3).t() if widens else randn(48, 32, seed=3)  # as Linear stores it
    leaves = [leaf.detach().requires_grad_() for leaf in (x, weight, bias)]
    y = fp8.linear(*leaves)
    y.backward(g)
    x_, w_, g_ = rounded(x, E4M3).flatten(0, 1), rounded(weight, E4M3), rounded(g, E5M2).flatten(0, 1)
    close = dict(rtol=1e-5 if dtype == torch.float32 else 8e-3, atol=1e-4 if dtype == torch.float32 else 2e-2)
    assert y.dtype == dtype
    torch.testing.assert_close(y.flatten(0, 1).double(), x_ @ w_.T + bias.to(dtype).double(), **close)
    torch.testing.assert_close(leaves[0].grad.flatten(0, 1).double(), g_ @ w_, **close)
    assert leaves[1].grad.dtype == torch.float32  # the weight's, whatever the activations are
    torch.testing.assert_close(leaves[1].grad.double(), g_.T @ x_, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(leaves[2].grad, g.float().flatten(0, 1).sum(0), **close)


@pytest.fixture(scope="module")
def pair():
    """The same model without and with FP8, and tokens."""
    plain, quick = build(spread=0.1), build(spread=0.1)
    fp8.switch_on(quick.h)
    return plain, quick, tokens_for()


def test_the_blocks_are_trained_so_and_evaluated_as_without(pair):
    plain, quick, tokens = pair
    hidden, other = plain.train()(tokens), quick.train()(tokens)
    off = ((other - hidden).norm() / hidden.norm()).item()
    assert 0.005 < off < 0.2  # e4m3 keeps three bits
    assert torch.equal(quick.eval()(tokens), plain.eval()(tokens))
    quick.train()
    assert sum(getattr(part, "fp8", False) for part in quick.modules()) == 4 * len(quick.h)
    mean_nll(logits_of(quick, tokens), tokens).backward()
    mean_nll(logits_of(plain.train(), tokens), tokens).backward()
    for (name, p), (_, q) in zip(plain.named_parameters(), quick.named_parameters(), strict=True):
        turned = 1 - F.cosine_similarity(p.grad.flatten(), q.grad.flatten(), dim=0)
        assert turned < 0.05, name


def test_torchs_compiler_takes_it_whole_with_equal_numbers(pair):
    _, quick, tokens = pair
    compiled = torch.compile(quick.train(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens), quick(tokens), rtol=1e-5, atol=1e-5)


def test_recomputing_a_block_gives_the_same_gradients(pair):
    _, quick, tokens = pair
    found = []
    for quick.checkpoint_activations in (True, False):
        quick.train().zero_grad()
        mean_nll(logits_of(quick, tokens), tokens).backward()
        found.append([p.grad.clone() for p in quick.parameters()])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize(
    "seq_len, lacks, capability, says",
    [
        (100, "", None, "--fp8 takes rows by 16: --seq-len 100 is no multiple of it"),
        (64, "scaled_mm", None, "--fp8 needs torch.nn.functional.scaled_mm"),
        (64, "", (8, 0), "--fp8 needs FP8 units; NVIDIA A100 has none"),
    ],
)
def test_what_cannot_be_had_is_refused(monkeypatch, seq_len, lacks, capability, says):
    cfg = SimpleNamespace(fp8=True, seq_len=seq_len)
    device = torch.device("cuda" if capability else "cpu")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    if lacks:
        monkeypatch.delattr(F, lacks)
    with pytest.raises(ValueError, match=says):
        fp8.check(cfg, device)
    cfg.fp8 = False
    fp8.check(cfg, device)
