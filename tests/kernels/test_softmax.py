"""softmax_moments: the moments and their gradients against float64 autograd of the literal formulas."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from formulas import (
    ALPHA,
    DEVICE,
    IMPLS,
    PLAIN,
    SCORES,
    TAIL,
    VALUES,
    close,
    floor_of,
    literal_gradient,
    literal_moments,
    make,
    tail_of,
)

from kernels import losses, softmax_moments

# What the kernels give and take differs by the moments that a score reads; interpreted, a few stand for all.
READ_OTHERS = ("dpsm", "spherical-tail", "smoothing", "mile", "power")
CASES = [(name, impl) for impl in IMPLS for name in SCORES if impl == "torch" or DEVICE != "cpu" or name in READ_OTHERS]


@pytest.mark.parametrize("name, impl", CASES)
def test_loss_and_gradient_match_autograd_of_the_formula(name, impl):
    # V odd and no multiple of a block; upstream different for every token; two tokens ignored.
    logits, targets, upstream = make(8, 507, ignored=(1, 6))
    want_loss, want = literal_gradient(name, logits, targets, upstream)
    logits.requires_grad_()
    loss = SCORES[name](softmax_moments(logits, targets, tail=tail_of(name), impl=impl))
    (loss * upstream).sum().backward()
    # fp32: some 500 additions and a handful of operations, each half of 2**-23.
    close(loss.detach(), want_loss, 3e-6, floor=1e-6)
    close(logits.grad, want, 3e-6, floor=1e-6)
    assert (logits.grad[[1, 6]] == 0).all() and (loss[[1, 6]] == 0).all()


@pytest.mark.parametrize("name", SCORES)
def test_formulas_are_exact_in_float64(name):
    logits, targets, upstream = make(16, 203, torch.float64)
    want_loss, want = literal_gradient(name, logits, targets, upstream)
    logits.requires_grad_()
    loss = SCORES[name](softmax_moments(logits, targets, tail=tail_of(name), impl="torch"))
    (loss * upstream).sum().backward()
    close(loss.detach(), want_loss, 1e-12)  # 2**-53 and some hundred operations
    close(logits.grad, want, 1e-12, floor=1e-14)


# 50257: GPT-2's, odd, and 13 blocks of the kernel; 507: no multiple of anything; 128: exactly one block; 1: no
# off-target entry at all.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("vocab", [50257, 507, 128, 1])
def test_implementations_agree_with_the_definitions(vocab, dtype):
    logits, targets, upstream = make(4 if vocab > 1000 else 16, vocab, dtype)
    valid = targets != -100
    want = literal_moments(logits, targets.clamp_min(0))
    _, want_grad = literal_gradient("dpsm", logits, targets, upstream)
    for impl in IMPLS:
        z = logits.clone().requires_grad_()
        m = softmax_moments(z, targets, impl=impl)
        (losses.dpsm(ALPHA)(m) * upstream).sum().backward()
        for name in VALUES:
            # torch.softmax adds a row up in fp32, lane by lane: 50257 terms are good to about 5e-6, and r4
            # takes that to the fourth power. The floor is for r1 and entropy where V = 1 makes them 0.
            close(getattr(m, name).detach(), torch.where(valid, getattr(want, name), 0.0), 4e-5, floor_of(name))
        assert torch.equal(m.correct, want.correct & valid) and torch.equal(m.valid, valid)
        # A bf16 gradient is rounded once, to 8 bits (the interpreter cuts where the GPU rounds).
        relative = 1e-5 if dtype == torch.float32 else 2**-7
        close(z.grad, want_grad, relative, floor=1e-6)
        assert z.grad.dtype == dtype


@pytest.mark.parametrize("impl", IMPLS)
def test_sure_predictions_keep_their_digits(impl):
    # The target far above the rest: 1 - p_y would cancel, log_p = z_y - lse would round to 0.
    logits, targets, upstream = make(5, 300, scale=1.0, ignored=())
    logits[torch.arange(5), targets] += torch.tensor([10.0, 20.0, 30.0, 60.0, 1e4], device=DEVICE)
    want = literal_moments(logits, targets)
    m = softmax_moments(logits, targets, impl=impl)
    off = logits.double().scatter(1, targets[:, None], -math.inf)
    r1 = (off.logsumexp(-1) - logits.double().gather(1, targets[:, None])[:, 0]).sigmoid()
    close(m.r1, r1, 1e-5)  # the exponent of a logit of 60 is good to 60 * 2**-23
    close(m.log_p, -torch.log1p(r1 / (1 - r1)), 1e-5)
    close(m.r2[:3], want.r2[:3], 3e-5)
    close(m.entropy, want.entropy, 1e-4, floor=1e-12)
    for name in PLAIN:
        _, want_grad = literal_gradient(name, logits, targets, upstream)
        # The formulas cancel at the target even in float64; the entries of a row add up to 0.
        want_grad.scatter_(1, targets[:, None], 0.0)
        want_grad.scatter_(1, targets[:, None], -want_grad.sum(-1, keepdim=True))
        z = logits.clone().requires_grad_()
        loss = SCORES[name](softmax_moments(z, targets, impl=impl))
        (loss * upstream).sum().backward()
        # Against each row's own largest entry, 1e-20 for Brier in the third row already.
        size = want_grad.abs().amax(-1, keepdim=True)
        assert ((z.grad.double() - want_grad).abs() <= 1e-4 * size)[:3].all(), name
        assert name == "smoothing" or z.grad[3:].abs().max() < 1e-22, name


@pytest.fixture
def rounds_once(monkeypatch):
    """tl.fma as on a GPU: the interpreter of Triton 3.7 rounds the product too. fp64 holds an fp32 product exactly."""
    if DEVICE == "cpu":
        interpreter = pytest.importorskip("triton.runtime.interpreter")

        def fma(self, x, y, z):
            exact = np.multiply(x.data, y.data, dtype=np.float64) + z.data
            return interpreter.TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", fma)


@pytest.mark.parametrize("impl", IMPLS)
def test_large_logits(impl, rounds_once):
    logits, targets, upstream = make(6, 100, ignored=())
    base = literal_moments(logits, targets)
    logits[1] += 1e4
    logits[2] -= 1e4
    logits[3, 5] = -1e4
    logits[4, 7] = 1e4
    want = literal_moments(logits, targets)
    _, want_grad = literal_gradient("dpsm", logits, targets, upstream)
    z = logits.requires_grad_()
    m = softmax_moments(z, targets, impl=impl)
    (losses.dpsm(ALPHA)(m) * upstream).sum().backward()
    for name in VALUES:
        close(getattr(m, name).detach(), getattr(want, name), 1e-5, floor_of(name))
    close(z.grad, want_grad, 1e-5, floor=1e-6)
    # Moved by 1e4, the logits themselves lose digits (2**-11), the moments must not lose more.
    close(m.entropy.detach()[1:3], base.entropy[1:3], 5e-3)


@pytest.mark.parametrize("name, impl", CASES)
def test_minus_infinity_is_outside_the_vocabulary(name, impl):
    # A head padded from 100 to 128 entries gives what the head of 100 gives.
    logits, targets, upstream = make(6, 100)
    padded = F.pad(logits, (0, 28), value=-math.inf).requires_grad_()
    logits.requires_grad_()
    tail = tail_of(name)
    short, long = (softmax_moments(z, targets, tail=tail, impl=impl) for z in (logits, padded))
    for field in VALUES + (("tail_log_p",) if tail else ()):
        close(getattr(long, field).detach(), getattr(short, field).detach(), 3e-6, floor_of(field))
    assert torch.equal(long.correct, short.correct)
    assert long.support.unique().tolist() == [0, 100]  # 0 for the ignored token
    long.vocab_size = 100
    for m in (short, long):
        (SCORES[name](m) * upstream).sum().backward()
    assert (padded.grad[:, 100:] == 0).all()
    close(padded.grad[:, :100], logits.grad, 3e-6, floor=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_impossible_and_only_targets(impl):
    logits, targets, _ = make(3, 50, ignored=())
    logits[0, targets[0]] = -math.inf  # the target is impossible
    logits[1] = -math.inf
    logits[1, targets[1]] = -3.0  # nothing but the target is possible
    logits.requires_grad_()
    m = softmax_moments(logits, targets, impl=impl)
    assert m.log_p[0] == -math.inf and m.r1[0] == 1 and m.log_p[1] == 0 and m.r1[1] == 0
    assert m.correct.tolist()[:2] == [False, True] and m.support.tolist() == [49, 1, 50]
    assert m.entropy[1] == 0 and m.mean_log_p[1] == 0 and m.mean_log_p[0].isfinite() and m.entropy[0].isfinite()
    losses.brier(m).sum().backward()
    assert logits.grad.isfinite().all() and (logits.grad[1] == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_first_index_wins_a_tie(impl):
    logits = torch.zeros(4, 40, device=DEVICE)
    logits[:, [7, 30]] = 2.5
    targets = torch.tensor([7, 30, 0, 7], device=DEVICE)
    logits[3, 3] = 2.5
    assert softmax_moments(logits, targets, impl=impl).correct.tolist() == [True, False, False, False]


@pytest.mark.parametrize("impl", IMPLS)
def test_ignored_tokens_may_hold_anything(impl):
    logits, targets, upstream = make(5, 60, ignored=(0, 2))
    logits[0], logits[2, 3] = math.nan, math.inf
    logits.requires_grad_()
    m = softmax_moments(logits, targets, tail=TAIL, impl=impl)
    for name in (*VALUES, "tail_log_p", "correct", "valid", "support"):
        assert (getattr(m, name)[[0, 2]] == 0).all(), name
    # A score whose partials are infinite at the zeros of an ignored token.
    loss = m.r1.log() + m.r2.sqrt() + m.mean_log_p + m.tail_log_p
    torch.where(m.valid, loss * upstream, 0.0).sum().backward()
    assert (logits.grad[[0, 2]] == 0).all() and logits.grad.isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_logits_are_not_hidden(impl):
    logits, targets, _ = make(2, 60, ignored=())
    logits[0, 11] = math.nan
    m = softmax_moments(logits, targets, impl=impl)
    assert m.log_p[0].isnan() and m.r1[0].isnan() and m.entropy[0].isnan() and not m.log_p[1].isnan()


@pytest.mark.parametrize("impl", IMPLS)
def test_only_used_moments_get_a_gradient(impl):
    logits, targets, upstream = make(4, 70, ignored=())
    for field in ("log_p", "r1", "r2", "mean_log_p"):
        z = logits.clone().requires_grad_()
        (getattr(softmax_moments(z, targets, impl=impl), field) * upstream).sum().backward()
        want = logits.double().requires_grad_()
        log_p, y = want.log_softmax(-1), targets[:, None]
        off = log_p.exp().scatter(1, y, 0.0)
        value = {"log_p": log_p.gather(1, y)[:, 0], "r1": off.sum(-1), "r2": off.square().sum(-1)}
        (value.get(field, log_p.mean(-1)) * upstream).sum().backward()
        close(z.grad, want.grad, 3e-6, floor=1e-7)
    assert softmax_moments(logits, targets, impl=impl).tail_log_p is None
    for field in ("r3", "r4", "confidence"):
        m = softmax_moments(logits.clone().requires_grad_(), targets, impl=impl)
        with pytest.raises(ValueError, match=f"{field} with a gradient, and it has none"):
            (getattr(m, field) + m.log_p).sum().backward()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_inplace_backward_writes_over_the_logits(dtype, impl):
    whole, targets, upstream = make(6, 96, dtype)
    logits = whole[:, :90].detach()  # strided rows: what lies between them is not ours
    _, want = literal_gradient("dpsm", logits, targets, upstream)
    beside = whole[:, 90:].clone()
    targets = targets.clamp_max(89)
    _, want = literal_gradient("dpsm", logits, targets, upstream)
    logits.requires_grad_()
    m = softmax_moments(logits, targets, inplace_backward=True, impl=impl)
    (grad,) = torch.autograd.grad((losses.dpsm(ALPHA)(m) * upstream).sum(), logits)
    assert grad.data_ptr() == logits.data_ptr() and grad.stride() == logits.stride()
    close(grad, want, 1e-5 if dtype == torch.float32 else 2**-7, floor=1e-6)
    assert torch.equal(whole[:, 90:], beside)


def test_inplace_backward_cannot_run_twice():
    logits, targets, _ = make(3, 20)
    loss = losses.ce(softmax_moments(logits.requires_grad_(), targets, inplace_backward=True)).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("layout", ["transposed", "expanded", "padded rows", "every other column"])
def test_any_layout(layout, inplace, impl):
    logits, targets, upstream = make(6, 80)
    targets = targets.clamp_max(39)
    logits = {
        "transposed": logits[:, :40].t().contiguous().t(),
        "expanded": logits[:1, :40].expand(6, 40),
        "padded rows": logits[:, :40],
        "every other column": logits[:, ::2],
    }[layout]
    _, want = literal_gradient("brier", logits, targets, upstream)
    z = logits.detach().requires_grad_()
    m = softmax_moments(z, targets, inplace_backward=inplace, impl=impl)
    (grad,) = torch.autograd.grad((losses.brier(m) * upstream).sum(), z)
    close(grad, want, 3e-6, floor=1e-6)


def test_no_tokens():
    logits = torch.zeros(0, 9, device=DEVICE, requires_grad=True)
    m = softmax_moments(logits, torch.zeros(0, dtype=torch.long, device=DEVICE))
    losses.dpsm(0.5)(m).sum().backward()
    assert m.log_p.shape == (0,) and logits.grad.shape == (0, 9)


def test_ignore_index_inside_the_vocabulary():
    logits, targets, _ = make(6, 20, ignored=())
    targets[2] = 7
    m = softmax_moments(logits, targets, ignore_index=7)
    assert torch.equal(m.valid, targets != 7) and m.log_p[2] == 0
