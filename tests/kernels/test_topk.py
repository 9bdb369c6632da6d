"""The k most likely tokens: against float64, by both implementations, and without a choice among ties."""

import math
import os
import subprocess
import sys

import pytest
import torch
from formulas import DEVICE, IMPLS
from formulas import literal as literal_loss
from named_scores import custom, head

from kernels import (
    linear_moments,
    linear_score,
    linear_topk,
    logits_score,
    losses,
    softmax_moments,
    topk_log_probs,
    torch_impl,
)
from kernels.topk import check_top

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def literal(logits, k, scale=1.0, softcap=None):
    """(log_p, ids, entropy) of each row in float64, by a stable sort of the whole row."""
    z = logits.double()
    shaped = z * scale if softcap is None else softcap * torch.tanh(z * scale / softcap)
    ids = z.sort(dim=1, descending=True, stable=True).indices[:, :k]
    log_p = shaped.log_softmax(1).gather(1, ids)
    q = log_p.softmax(1)
    return log_p, ids, -torch.special.xlogy(q, q).sum(1)


def check(got, want):
    """Both as they should be to some fp32 roundings of numbers of the size of the logits, here at most 32."""
    log_p, ids, entropy = want
    assert torch.equal(got.ids, ids) and got.ids.dtype == torch.int64
    torch.testing.assert_close(got.log_p.double(), log_p, rtol=1e-6, atol=5e-6)
    torch.testing.assert_close(got.entropy.double(), entropy, rtol=1e-6, atol=2e-6)


def rows(n, v, dtype=torch.float32, seed=0, scale=4.0):
    z = torch.randn(n, v, generator=torch.Generator().manual_seed(seed)) * scale
    return z.to(DEVICE, dtype)


# 7, 511: less than a block; 512: one; 1700: several and a part; 64 is the most that the kernel keeps.
@pytest.mark.parametrize("v, k", [(1, 1), (7, 7), (7, 3), (511, 20), (512, 64), (513, 1), (1700, 20), (1700, 64)])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("impl", IMPLS)
def test_against_float64(impl, dtype, v, k):
    logits = rows(3, v, dtype, seed=v + k)
    got = topk_log_probs(logits, k, impl=impl)
    assert got.log_p.dtype == got.entropy.dtype == torch.float32 and got.log_p.shape == (3, k)
    check(got, literal(logits, k))


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("impl", IMPLS)
def test_twenty_of_gpt2s_vocabulary(impl, dtype):
    logits = rows(2, 50257, dtype)
    check(topk_log_probs(logits, 20, impl=impl), literal(logits, 20))


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_that_rise(impl):
    # Every block has better ones than all before it.
    logits = (torch.arange(2 * 1100, device=DEVICE).view(2, 1100) % 1100) / 100.0
    check(topk_log_probs(logits, 20, impl=impl), literal(logits, 20))


@pytest.mark.parametrize("k", [1, 20, 64])
@pytest.mark.parametrize("impl", IMPLS)
def test_ties_take_the_smaller_id(impl, k):
    logits = torch.stack([torch.zeros(1300), rows(1, 1300, scale=1.0)[0].cpu().round(), torch.full((1300,), -2.0)])
    logits[0, ::2] = -0.0  # equal to 0.0
    logits[0, 1000] = logits[0, 90] = 1.0
    logits[2, 600:1200] = 3.0
    logits = logits.to(DEVICE)
    got = topk_log_probs(logits, k, impl=impl)
    check(got, literal(logits, k))
    assert got.ids[0, 0] == 90 and got.ids[2].tolist() == list(range(600, 600 + k))


@pytest.mark.parametrize("impl", IMPLS)
def test_minus_infinity_is_outside_of_the_vocabulary(impl):
    logits = rows(3, 900)
    logits[0, 5:] = -torch.inf  # five are left
    logits[1, 1:] = -torch.inf  # one
    logits[2, :890] = -torch.inf  # ten, in the second block
    got = topk_log_probs(logits, 20, impl=impl)
    for row, live in enumerate((5, 1, 10)):
        log_p, ids, entropy = literal(logits[row : row + 1], live)
        torch.testing.assert_close(got.log_p[row : row + 1, :live].double(), log_p, rtol=1e-6, atol=5e-6)
        assert torch.equal(got.ids[row : row + 1, :live], ids)
        assert (got.log_p[row, live:] == -torch.inf).all()
        torch.testing.assert_close(got.entropy[row].double(), entropy[0], rtol=1e-6, atol=2e-6)
    assert got.ids[0, 5:].tolist() == list(range(5, 20)) and got.ids[2, 10:].tolist() == list(range(10))
    assert got.entropy[1] == 0


@pytest.mark.parametrize("impl", IMPLS)
def test_entropy_of_a_nearly_sure_row_and_of_a_uniform_one(impl):
    logits = torch.zeros(2, 600, device=DEVICE)
    logits[0, 17] = 30.0  # its entropy, some 1e-11, is below the rounding of 1 + e^-30: no part of it may be negative
    entropy = topk_log_probs(logits, 20, impl=impl).entropy
    assert 0 < entropy[0] < 1e-10
    assert entropy[1].item() == pytest.approx(math.log(20), abs=1e-6)


@pytest.mark.parametrize("layout", ["padded rows", "columns", "broadcast"])
@pytest.mark.parametrize("impl", IMPLS)
def test_strided_logits(impl, layout):
    z = rows(3, 640, torch.bfloat16)
    logits = {"padded rows": z[:, :603], "columns": z.t().contiguous().t(), "broadcast": z[:1].expand(3, -1)}[layout]
    before = logits.clone()
    check(topk_log_probs(logits, 20, impl=impl), literal(logits, 20))
    assert torch.equal(logits, before)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_known_logsumexp_and_rows_that_are_left_out(impl):
    logits = rows(4, 700)
    mask = torch.tensor([True, False, True, False], device=DEVICE)
    logits[1] = torch.nan  # may hold anything
    lse = logits.logsumexp(1)
    for known in (None, lse):
        got = topk_log_probs(logits, 20, lse=known, mask=mask, impl=impl)
        check(type(got)(*(x[mask] for x in got)), literal(logits[mask], 20))
        assert all((x[~mask] == 0).all() for x in got)
    shifted = topk_log_probs(logits, 20, lse=lse + 1, mask=mask, impl=impl)
    torch.testing.assert_close(shifted.log_p[mask], got.log_p[mask] - 1)  # it is read
    assert torch.equal(shifted.entropy, got.entropy)


@pytest.mark.parametrize("softcap", [None, 1.5], ids=["no cap", "cap"])
@pytest.mark.parametrize("impl", IMPLS)
def test_scale_and_softcap(impl, softcap):
    logits = rows(3, 1100)
    logits[1, 40] = logits[1, 900] = 30.0  # the cap makes the 29 equal to them in fp32, and it still comes after them
    logits[1, 20] = 29.0
    check(topk_log_probs(logits, 20, scale=0.7, softcap=softcap, impl=impl), literal(logits, 20, 0.7, softcap))


def test_no_rows_and_float64():
    assert [x.shape for x in topk_log_probs(rows(0, 9), 3)] == [(0, 3), (0, 3), (0,)]
    logits = rows(3, 400).round().double()
    got = topk_log_probs(logits, 20, impl="torch")
    assert got.log_p.dtype == got.entropy.dtype == torch.float64
    torch.testing.assert_close(got[:2], literal(logits, 20)[:2])


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=NAMES.get)
@pytest.mark.parametrize("impl", IMPLS)
def test_over_a_linear_head(impl, dtype):
    hidden, weight, bias = (rows(*size, seed=i, scale=1.0) for i, size in enumerate([(11, 16), (601, 16), (1, 601)]))
    hidden, weight, bias = hidden.to(dtype).requires_grad_(), weight.to(dtype), bias[0].to(dtype)
    logits = torch.addmm(bias, hidden, weight.t()).detach()
    torch.testing.assert_close(linear_topk(hidden, weight, 20, impl=impl), topk_log_probs(hidden @ weight.t(), 20))
    got = linear_topk(hidden, weight, 20, bias=bias, scale=1.3, softcap=9.0, chunk=4, impl=impl)
    want = topk_log_probs(logits, 20, scale=1.3, softcap=9.0, impl=impl)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    assert not got.log_p.requires_grad and not got.entropy.requires_grad


def test_the_logits_are_never_there():
    from accounting import Largest

    hidden, weight = rows(64, 8), rows(1000, 8)
    with Largest(weight) as largest:
        linear_topk(hidden, weight, 5, chunk=4)
    assert 4 * 1000 <= largest.elements <= 2 * 4 * 1000  # a chunk, or its integers of 8 bytes each


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(k=0), "k must be between 1"),
        (dict(k=31), "number of logits, 30; got 31"),
        (dict(logits=torch.zeros(3)), "logits must be"),
        (dict(logits=torch.zeros(3, 30, dtype=torch.int64)), "logits must be one of"),
        (dict(lse=torch.zeros(2)), "lse must be"),
        (dict(mask=torch.zeros(3, 1, dtype=torch.bool)), "mask must be"),
        (dict(mask=torch.zeros(3)), "mask must be bool"),
        (dict(scale=0.0), "scale must be positive"),
        (dict(softcap=-1.0), "softcap must be positive"),
        (dict(impl="cuda"), "unknown impl"),
        (dict(logits=torch.zeros(3, 100), k=65, impl="triton"), "k up to 64, got 65"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = dict(logits=torch.zeros(3, 30), k=3) | change
    with pytest.raises(ValueError, match=message) as caught:
        topk_log_probs(arguments.pop("logits"), arguments.pop("k"), **arguments)
    assert "\n" not in str(caught.value)


def test_more_than_the_kernel_keeps():
    logits = rows(2, 300)
    check(topk_log_probs(logits, 100), literal(logits, 100))
    assert check_top(64, 300, "auto", "its module") == "its module"
    assert check_top(65, 300, "auto", "its module") is torch_impl
    with pytest.raises(ValueError, match="k must be between 1 and the number of logits, 9; got 20"):
        linear_topk(rows(2, 4), rows(9, 4), 20)


def test_the_kernel_compiles_without_spills_and_with_wide_loads(tmp_path):
    # In a process of its own: under the interpreter the kernel is not a compilable function.
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = """
from kernels.audit import audit, compile_for, read_code
from kernels.triton_topk import shape, topk_kernel
for capability, dtype in ((80, "fp32"), (90, "bf16")):
    (r,) = audit(capability, 50257, dtype, "topk_kernel")
    assert r["spill_bytes"] == r["spill_instructions"] == 0, r
    assert r["loads"][128] == r["K"], r
    assert r["instructions_per_element"] <= 14, r
    for k, capped in ((1, False), (64, True)):
        constants = shape(k, capped) | dict(R=32, W=8, lse_ptr=None, mask_ptr=None)
        r = read_code(compile_for(topk_kernel, constants, capability, dtype, 50257), constants, 50257)
        assert r["spill_bytes"] == r["spill_instructions"] == 0, r
"""
    done = subprocess.run([sys.executable, "-c", command], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1500:]


@pytest.mark.parametrize("impl", IMPLS)
def test_every_function_gives_the_likeliest_beside_the_moments(impl):
    hidden, weight, bias, targets, _ = head()
    want = linear_topk(hidden, weight, 5, bias=bias, softcap=9.0)
    off = (targets == -100)[:, None]
    logits = (hidden @ weight.T + bias).detach()
    how = dict(topk=5, softcap=9.0, impl=impl)
    for m in (
        linear_score(hidden, weight, targets, losses.ce, bias=bias, chunk=4, **how)[1],
        linear_score(hidden, weight, targets, custom, bias=bias, chunk=4, **how)[1],
        linear_moments(hidden, weight, targets, bias=bias, chunk=4, **how),
        logits_score(logits.clone().requires_grad_(), targets, losses.ce, **how)[1],
        softmax_moments(logits, targets, **how),
    ):
        torch.testing.assert_close(m.top_log_p, want.log_p.masked_fill(off, 0.0), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(m.top_entropy, want.entropy.masked_fill(off[:, 0], 0.0), rtol=1e-5, atol=1e-6)
        assert torch.equal(m.top_ids, want.ids.masked_fill(off, 0))
    assert softmax_moments(logits, targets, impl=impl).top_entropy is None


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("v", [13, 37])
def test_eaft_asks_for_its_own_twenty(v, impl):
    hidden, weight, _, targets, _ = head(v=v)
    loss, m = linear_score(hidden, weight, targets, losses.eaft, chunk=4, impl=impl)
    z = (hidden.detach().double() @ weight.detach().double().T).requires_grad_()
    want = (
        torch.where(targets == -100, 0.0, literal_loss("eaft", z, targets.clamp_min(0))).sum() / (targets != -100).sum()
    )
    torch.testing.assert_close(loss.double(), want, rtol=2e-5, atol=0)
    (got,) = torch.autograd.grad(loss, hidden)
    (slope,) = torch.autograd.grad(want, z)
    torch.testing.assert_close(got.double(), slope @ weight.detach().double(), rtol=1e-4, atol=1e-6)
    assert m.top_ids.shape == (13, min(20, v))
    with pytest.raises(ValueError, match="the score reads the 20 likeliest tokens, and topk=5"):
        linear_score(hidden, torch.cat([weight] * 3), targets, losses.eaft, topk=5)


@pytest.mark.parametrize("name", ["top_log_p", "top_entropy"])
def test_what_is_of_the_likeliest_has_no_gradient(name):
    hidden, weight, _, targets, _ = head()

    with pytest.raises(ValueError, match=f"reads {name} with a gradient, and it has none"):
        linear_score(
            hidden, weight, targets, lambda m: losses.ce(m) + getattr(m, name).view(len(m.r1), -1)[:, 0], topk=3
        )
    z = (hidden @ weight.T).detach().requires_grad_()
    m = softmax_moments(z, targets, topk=3)
    with pytest.raises(ValueError, match=f"reads {name} with a gradient, and it has none"):
        (losses.ce(m).sum() + getattr(m, name).sum()).backward()
