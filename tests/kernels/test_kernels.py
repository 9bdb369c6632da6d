"""The moments, their gradients and the linear head, against float64 autograd of the literal formulas."""

import contextlib
import csv
import json
import logging
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import kernels.impl
import kernels.torch_impl
from kernels import Moments, linear_moments, linear_score, losses, softmax_moments, token_fisher
from kernels.bench import timing
from kernels.bench.__main__ import main
from kernels.bench.providers import FROM_HIDDEN, FROM_LOGITS
from kernels.bench.timing import Shape, make_inputs, measure_memory_apart

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = ("torch", "triton")
VALUES = ("log_p", "r1", "r2", "mean_log_p", "r3", "r4", "entropy", "confidence")

EPS, GAMMA, ALPHA, TAIL = 0.1, 2.0, 0.3, 0.3


def literal(name, logits, targets):
    """Each loss as its paper writes it, on the whole distribution."""
    V = logits.shape[-1]
    log_p = logits.log_softmax(-1)
    p, one_hot = log_p.exp(), F.one_hot(targets, V).to(logits.dtype)
    p_y, ce = (p * one_hot).sum(-1), -(log_p * one_hot).sum(-1)
    norm = p.square().sum(-1).sqrt()
    brier, spherical = (p - one_hot).square().sum(-1), 1 - p_y / norm
    in_tail = p.detach() < TAIL / V
    tail = TAIL * torch.where(in_tail, log_p, 0.0).sum(-1) / V

    def smoothed(score_of_all):  # score_of_all[:, j] = S(p, j)
        return (1 - TAIL) * score_of_all.gather(1, targets[:, None])[:, 0] + TAIL * score_of_all.mean(-1) - tail

    return {
        "ce": lambda: ce,
        "brier": lambda: brier,
        "spherical": lambda: spherical,
        "dpsm": lambda: (1 - ALPHA) * ce + ALPHA * brier,
        "focal": lambda: (1 - p_y) ** GAMMA * ce,
        "smoothing": lambda: -(log_p * ((1 - EPS) * one_hot + EPS / V)).sum(-1),
        "brier-tail": lambda: smoothed(norm.square()[:, None] - 2 * p + 1),
        "spherical-tail": lambda: smoothed(1 - p / norm[:, None]),
    }[name]()


SCORES = {
    "ce": losses.ce,
    "brier": losses.brier,
    "spherical": losses.spherical,
    "dpsm": losses.dpsm(ALPHA),
    "focal": losses.focal(GAMMA),
    "smoothing": losses.smoothing(EPS),
    "brier-tail": losses.tail_smoothed("brier", TAIL),
    "spherical-tail": losses.tail_smoothed("spherical", TAIL),
}
PLAIN = [name for name in SCORES if not name.endswith("tail")]


def tail_of(name):
    return TAIL if name.endswith("tail") else 0.0


def literal_moments(logits, targets):
    """The moments from their definitions, in float64, detached."""
    z = logits.detach().double()
    log_p, y = z.log_softmax(-1), targets[:, None]
    p = log_p.exp()
    off = p.scatter(1, y, 0.0)
    return SimpleNamespace(
        log_p=log_p.gather(1, y)[:, 0],
        r1=off.sum(-1),
        r2=off.pow(2).sum(-1),
        r3=off.pow(3).sum(-1),
        r4=off.pow(4).sum(-1),
        mean_log_p=log_p.mean(-1),
        entropy=-(p * log_p).sum(-1),
        confidence=p.amax(-1),
        correct=z.argmax(-1) == targets,
    )


def make(n, v, dtype=torch.float32, seed=0, scale=4.0, ignored=(1,)):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(n, v, generator=generator) * scale).to(dtype)
    targets = torch.randint(v, (n,), generator=generator)
    if n > 3:
        targets[3] = logits[3].float().argmax()  # a token that is right
    for i in ignored:
        targets[i] = -100
    upstream = torch.rand(n, generator=generator) + 0.1
    return logits.to(DEVICE), targets.to(DEVICE), upstream.to(DEVICE)


def literal_gradient(name, logits, targets, upstream):
    """(loss, gradient) in float64, 0 for the ignored tokens."""
    z = logits.detach().double().requires_grad_()
    valid = targets != -100
    loss = torch.where(valid, literal(name, z, torch.where(valid, targets, 0)), 0.0)
    (loss * upstream.double()).sum().backward()
    return loss.detach(), z.grad


def close(got, want, relative, floor=0.0):
    error = (got.double() - want.double()).abs() - relative * want.double().abs()
    assert not got.isnan().any() and error.max() <= floor, f"off by {error.max().item():.3g} beyond the tolerance"


def floor_of(field):
    """Absolute error allowed: entropy is a difference of numbers as large as the logits, 20 * 2**-23 each."""
    return 1e-5 if field == "entropy" else 1e-6


# --- softmax_moments against the formulas -----------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", SCORES)
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


@pytest.mark.parametrize("impl", IMPLS)
def test_large_logits(impl):
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


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", SCORES)
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
    m = softmax_moments(logits.clone().requires_grad_(), targets, impl=impl)
    assert m.log_p.requires_grad and not any(getattr(m, f).requires_grad for f in ("r3", "r4", "entropy", "confidence"))
    assert m.tail_log_p is None


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


class Largest(TorchDispatchMode):
    """Elements of the largest storage an operation returned, other than those of ``known``."""

    def __init__(self, *known):
        super().__init__()
        self.known, self.elements = {x.untyped_storage().data_ptr() for x in known}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in self.known:
                self.elements = max(self.elements, x.untyped_storage().nbytes() // 4)
        return out


@contextlib.contextmanager
def threads(n):
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(DEVICE == "cuda", reason="the size of the groups is that of the CPU path")
def test_scratch_stays_small():
    logits, targets, _ = make(4000, 500)
    logits.requires_grad_()
    with threads(1), Largest(logits) as seen:  # what other threads do is not seen
        m = softmax_moments(logits, targets, inplace_backward=True, impl="torch")
        torch.autograd.grad(losses.dpsm(ALPHA)(m).sum(), logits)
    most = kernels.torch_impl.CPU_ELEMENTS
    assert seen.elements <= most, "more than one group's scratch was allocated at once"
    assert most < logits.numel() / 10, "this test needs larger logits"


@pytest.mark.skipif(DEVICE == "cuda", reason="groups run in threads on CPU only")
def test_threads_change_nothing():
    logits, targets, upstream = make(1500, 500)
    results = []
    for n in (1, 3):
        with threads(n):
            z = logits.clone().requires_grad_()
            m = softmax_moments(z, targets, impl="torch")
            (losses.smoothing(EPS)(m) * upstream).sum().backward()
            assert torch.get_num_threads() == n
            results.append((m, z.grad))
    (a, grad_a), (b, grad_b) = results
    assert torch.equal(grad_a, grad_b) and all(torch.equal(getattr(a, f), getattr(b, f)) for f in VALUES)


@pytest.mark.skipif(DEVICE == "cuda", reason="groups run in threads on CPU only")
def test_errors_in_threads_come_out():
    def work(buffers, number):
        raise ArithmeticError(number)

    with threads(2), pytest.raises(ArithmeticError):
        like = torch.zeros(4, 3)
        kernels.torch_impl._for_each_group(work, [(0,), (1,)], 2, like, like.dtype, 1)


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's high-water mark")
def test_peak_memory_of_a_fresh_process():
    one = 2048 * 8192 * 4
    assert measure_memory_apart("ours DPSM in place", Shape(2048, 8192), "fp32", 1) <= 0.1 * one
    # the gradient itself, and the scratch
    assert measure_memory_apart("ours DPSM", Shape(2048, 8192), "fp32", 1) <= 1.1 * one


# --- token_fisher -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*PLAIN, "custom"])
@pytest.mark.parametrize("padded", [False, True])
def test_fisher_is_the_squared_norm_of_the_gradient(name, padded):
    score = SCORES.get(name, lambda m: losses.ce(m) * m.r1 - m.mean_log_p * m.r2 + m.entropy)
    logits, targets, _ = make(12, 80, torch.float64)
    if padded:
        logits = F.pad(logits, (0, 5), value=-math.inf)
    z = logits.requires_grad_()
    m = softmax_moments(z, targets, impl="torch")
    score(m).sum().backward()  # the gradient is held against autograd of the formulas above
    close(token_fisher(m, score), z.grad.square().sum(-1), 1e-11, floor=1e-15)


def test_fisher_of_cross_entropy_is_the_brier_score():
    logits, targets, _ = make(12, 80)
    m = softmax_moments(logits, targets)
    close(token_fisher(m, losses.ce), losses.brier(m), 1e-6)


def test_fisher_refuses_the_tail():
    logits, targets, _ = make(4, 30)
    m = softmax_moments(logits, targets, tail=TAIL)
    assert token_fisher(m, losses.ce).shape == (4,)
    with pytest.raises(ValueError, match="tail_log_p"):
        token_fisher(m, SCORES["brier-tail"])


# --- linear_score -----------------------------------------------------------------------------------


def make_head(n=23, v=57, d=16, dtype=torch.float32, weight_dtype=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=generator).to(DEVICE, dtype).requires_grad_()
    weight = torch.randn(v, d, generator=generator).to(DEVICE, weight_dtype or dtype).requires_grad_()
    targets = torch.randint(v, (n,), generator=generator)
    targets[[2, 11]] = -100
    upstream = torch.rand(n, generator=generator) + 0.1
    return hidden, weight, targets.to(DEVICE), upstream.to(DEVICE)


def gradients(loss, *leaves):
    return [g.double() for g in torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("chunk", [None, 1, 8, 23, 100])  # 8 leaves a last chunk of 7
@pytest.mark.parametrize("name", ["ce", "dpsm", "smoothing", "brier-tail"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_linear_score_is_the_score_of_the_logits(reduction, name, chunk):
    hidden, weight, targets, upstream = make_head()
    score, tail = SCORES[name], tail_of(name)
    m = softmax_moments(F.linear(hidden, weight), targets, tail=tail)
    losses_N = score(m)
    loss, got = linear_score(hidden, weight, targets, score, reduction=reduction, tail=tail, chunk=chunk)
    count = (targets != -100).sum()
    want = {"mean": losses_N.sum() / count, "sum": losses_N.sum(), "none": losses_N}[reduction]
    close(loss.detach(), want.detach(), 1e-5, floor=1e-6)  # the products round differently by chunk
    # An upstream other than 1, and for "none" another one for each token.
    scale = upstream if reduction == "none" else 0.37
    for g, w in zip(
        gradients((loss * scale).sum(), hidden, weight), gradients((want * scale).sum(), hidden, weight), strict=True
    ):
        close(g, w, 1e-5, floor=1e-5 * w.abs().max())
    for field in (*VALUES, "correct", "valid", "support") + (("tail_log_p",) if tail else ()):
        close(getattr(got, field).double(), getattr(m, field).detach().double(), 1e-4, floor_of(field))
        assert not getattr(got, field).requires_grad
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("impl", IMPLS)
def test_linear_score_with_ties_and_large_offsets(impl):
    hidden, weight, targets, _ = make_head()
    with torch.no_grad():
        hidden[:, 0], weight[:, 0] = 1.0, 500.0  # every logit near 500
        weight[30:] = weight[:27]  # every row has ties
        targets[targets != -100] = (hidden @ weight.t()).argmax(-1)[targets != -100]
        targets[::3] += 30 * (targets[::3] < 27) * (targets[::3] >= 0)
    want = literal_moments(F.linear(hidden, weight), targets.clamp_min(0))
    _, got = linear_score(hidden, weight, targets, losses.ce, chunk=9, impl=impl)
    assert torch.equal(got.correct, want.correct & got.valid) and 0 < got.correct.sum() < got.valid.sum()
    close(got.entropy[got.valid], want.entropy[got.valid], 0, floor=2e-4)  # logits of 500 are good to 3e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear_score_triton_matches_torch(reduction, dtype):
    hidden, weight, targets, upstream = make_head(dtype=dtype)
    grads = []
    for impl in IMPLS:
        loss, _ = linear_score(hidden, weight, targets, SCORES["dpsm"], reduction=reduction, chunk=9, impl=impl)
        grads.append(gradients((loss * (upstream if reduction == "none" else 1)).sum(), hidden, weight))
    for a, b in zip(*grads, strict=True):
        # bf16: the gradient of the logits may differ in its last of 8 bits.
        relative, floor = (1e-5, 1e-6) if dtype == torch.float32 else (2**-6, 2**-7)
        close(a, b, relative, floor=floor * b.abs().max())


def test_denominator_is_a_tensor_of_the_callers():
    hidden, weight, targets, _ = make_head()
    denominator = torch.tensor(40.0, device=DEVICE)
    mean, _ = linear_score(hidden, weight, targets, losses.ce, denominator=denominator)
    total, _ = linear_score(hidden, weight, targets, losses.ce, reduction="sum")
    assert torch.allclose(mean, total / 40)
    want = gradients(total / 40, hidden, weight)
    denominator.fill_(1.0)  # the next micro-batch's, before this one's backward
    a, b = gradients(mean, hidden, weight), want
    assert all(torch.allclose(x, y) for x, y in zip(a, b, strict=True))
    with pytest.raises(ValueError, match="denominator"):
        linear_score(hidden, weight, targets, losses.ce, reduction="sum", denominator=denominator)


def test_nothing_in_the_loss_is_zero_not_nan():
    hidden, weight, targets, _ = make_head()
    loss, m = linear_score(hidden, weight, torch.full_like(targets, -100), losses.dpsm(0.5))
    d_hidden, d_weight = gradients(loss, hidden, weight)
    assert loss == 0 and (d_hidden == 0).all() and (d_weight == 0).all() and not m.valid.any()
    loss, _ = linear_score(hidden[:0], weight, targets[:0], losses.ce)
    assert loss == 0 and (gradients(loss, weight)[0] == 0).all()


def test_a_score_need_not_be_zero_for_ignored_tokens():
    hidden, weight, targets, _ = make_head()
    for reduction in ("sum", "none"):
        loss, _ = linear_score(hidden, weight, targets, lambda m: m.r1.sqrt() + 5, reduction=reduction)
        want = 5 * 21 + softmax_moments(F.linear(hidden, weight), targets).r1.sqrt().sum()
        assert torch.allclose(loss.sum(), want)
        assert all(g.isfinite().all() for g in gradients(loss.sum(), hidden, weight))


def test_tied_weights_get_both_gradients():
    _, weight, targets, _ = make_head(d=16)
    tokens = torch.arange(23, device=DEVICE) % 57

    def total(loss_of):
        hidden = torch.tanh(F.embedding(tokens, weight))
        return gradients(loss_of(hidden), weight)[0]

    got = total(lambda h: linear_score(h, weight, targets, losses.ce)[0])
    close(got, total(lambda h: F.cross_entropy(F.linear(h, weight), targets)), 1e-5, floor=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_what_is_wanted_is_computed(reduction):
    hidden, weight, targets, _ = make_head()
    frozen, _ = linear_score(hidden, weight.detach(), targets, losses.ce, reduction=reduction)
    full, _ = linear_score(hidden, weight, targets, losses.ce, reduction=reduction)
    assert torch.equal(gradients(frozen.sum(), hidden)[0], gradients(full.sum(), hidden)[0])
    loss, _ = linear_score(hidden.detach(), weight.detach(), targets, losses.ce, reduction=reduction)
    assert not loss.requires_grad
    with torch.no_grad(), Largest(hidden, weight) as seen:
        loss, _ = linear_score(hidden, weight, targets, losses.ce, reduction=reduction, chunk=2)
    assert not loss.requires_grad
    assert seen.elements < weight.numel(), "a gradient of the weight was made though no one asked"


def test_linear_score_never_holds_all_logits():
    hidden, weight, targets, upstream = make_head(n=600, v=900, d=8)
    for reduction in ("mean", "none"):
        with Largest(hidden, weight) as seen:
            loss, _ = linear_score(hidden, weight, targets, losses.dpsm(0.5), chunk=60, reduction=reduction)
            torch.autograd.grad((loss * upstream).sum() if reduction == "none" else loss, (hidden, weight))
        assert seen.elements <= 60 * 900


def test_gradient_in_forward_runs_back_once():
    hidden, weight, targets, _ = make_head()
    loss, _ = linear_score(hidden, weight, targets, losses.ce)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="reduction='none'"):
        loss.backward()


def test_alpha_tensor_is_read_at_every_call():
    hidden, weight, targets, _ = make_head()
    alpha = torch.zeros((), device=DEVICE)
    score = losses.dpsm(alpha)
    for value, same in ((0.0, losses.ce), (1.0, losses.brier)):
        alpha.fill_(value)
        a, b = (linear_score(hidden, weight, targets, s)[0] for s in (score, same))
        assert torch.equal(a, b)
    # For "none" the gradient is that of the alpha of the forward, whatever it is by the backward.
    loss, _ = linear_score(hidden, weight, targets, score, reduction="none")
    alpha.fill_(0.0)
    want, _ = linear_score(hidden, weight, targets, losses.brier, reduction="none")
    a, b = gradients(loss.sum(), hidden, weight), gradients(want.sum(), hidden, weight)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_bf16_hidden_with_fp32_weight():
    hidden, weight, targets, _ = make_head(n=256, d=32, dtype=torch.bfloat16, weight_dtype=torch.float32)

    def d_weight(chunk):
        loss, _ = linear_score(hidden, weight, targets, losses.ce, reduction="sum", chunk=chunk)
        d_hidden, d = torch.autograd.grad(loss, (hidden, weight))
        assert d_hidden.dtype == torch.bfloat16 and d.dtype == torch.float32
        return d.double()

    h, w = hidden.detach().double(), weight.detach().bfloat16().double().requires_grad_()
    F.cross_entropy(h @ w.t(), targets, reduction="sum").backward()
    error = [(d_weight(chunk) - w.grad).norm() / w.grad.norm() for chunk in (256, 2)]
    # One bf16 rounding of logits and gradient: 2**-8 each. 128 chunks summed in bf16 would be some 10 times worse.
    assert error[0] < 2**-7 and error[1] < 1.5 * error[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradients_in_the_dtype_of_a_16_bit_head(reduction, dtype):
    hidden, weight, targets, _ = make_head(n=128, d=32, dtype=dtype)
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    want = F.cross_entropy(h @ w.t(), targets, reduction=reduction).sum() * 0.37
    eager = F.cross_entropy(hidden @ weight.t(), targets, reduction=reduction).sum() * 0.37
    want, eager = gradients(want, h, w), gradients(eager, hidden, weight)
    for chunk in (128, 30):
        loss, _ = linear_score(hidden, weight, targets, losses.ce, reduction=reduction, chunk=chunk)
        got = torch.autograd.grad((loss * 0.37).sum(), (hidden, weight))
        assert [g.dtype for g in got] == [dtype, dtype]
        for g, e, exact in zip(got, eager, want, strict=True):
            error, reference = ((x.double() - exact).norm() / exact.norm() for x in (g, e))
            assert error <= reference + 1e-3  # as asked of the device


def test_under_autocast_it_computes_as_linear_does():
    hidden, weight, targets, _ = make_head(d=32)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        loss, _ = linear_score(hidden, weight, targets, losses.ce)
        want = F.cross_entropy(F.linear(hidden, weight).float(), targets)
    assert torch.allclose(loss, want, atol=1e-6)  # the same bf16 logits
    got = torch.autograd.grad(loss, (hidden, weight))
    assert [g.dtype for g in got] == [torch.float32, torch.float32]
    for g, w in zip(got, gradients(want, hidden, weight), strict=True):
        close(g, w, 2**-6, floor=2**-7 * w.abs().max())


def test_weight_used_beside_a_ddp_module(tmp_path):
    dist = pytest.importorskip("torch.distributed")
    if dist.is_initialized() or not dist.is_gloo_available():
        pytest.skip("needs a process group of its own, and gloo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        body = torch.nn.Embedding(57, 16)
        targets = torch.randint(57, (23,))
        model = torch.nn.parallel.DistributedDataParallel(body)
        for _ in range(2):
            body.zero_grad()
            linear_score(torch.tanh(model(torch.arange(23))), body.weight, targets, losses.ce)[0].backward()
        got = body.weight.grad.clone()
        body.zero_grad()
        F.cross_entropy(F.linear(torch.tanh(body(torch.arange(23))), body.weight), targets).backward()
        close(got, body.weight.grad, 1e-5, floor=1e-6)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("scale", [1.0, 0.5, "tensor"])
def test_linear_moments(scale):
    hidden, weight, targets, _ = make_head()
    scale = torch.tensor(0.7, device=DEVICE) if scale == "tensor" else scale
    got = linear_moments(hidden, weight, targets, scale=scale, chunk=5)
    want = softmax_moments(F.linear(hidden, weight).detach() * scale, targets)
    for field in VALUES:
        close(getattr(got, field), getattr(want, field), 1e-5, floor_of(field))
        assert not getattr(got, field).requires_grad
    assert torch.equal(got.correct, want.correct)


# --- arguments, choice of implementation, compilation -----------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(logits=torch.zeros(2, 3, 4)), "flatten batch and time"),
        (dict(logits=torch.zeros(2, 0)), "V >= 1"),
        (dict(logits=torch.zeros(2, 4, dtype=torch.int64)), "got torch.int64"),
        (dict(targets=torch.zeros(3, dtype=torch.int64)), r"shape \(2,\)"),
        (dict(targets=torch.zeros(2)), "integers"),
        (dict(targets=torch.tensor([0, 4])), "target 4 is outside"),
        (dict(targets=torch.tensor([-100, -1])), "target -1 is outside"),
        (dict(impl="cuda"), "unknown impl 'cuda'"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = dict(logits=torch.zeros(2, 4), targets=torch.zeros(2, dtype=torch.int64)) | change
    with pytest.raises(ValueError, match=message):
        softmax_moments(arguments.pop("logits"), arguments.pop("targets"), **arguments)


def test_bad_arguments_of_linear_score_are_named():
    hidden, weight, targets, _ = make_head()
    for arguments, message in (
        ((hidden, weight[:, :3], targets, losses.ce), "hidden must be"),
        ((hidden, weight, targets[:4], losses.ce), "one a row"),
        ((hidden, weight, targets, lambda m: m.r1.sum()), "one loss a token"),
        ((hidden, weight, targets, lambda m: 3), "got int"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_score(*arguments)
    with pytest.raises(ValueError, match="unknown reduction"):
        linear_score(hidden, weight, targets, losses.ce, reduction="batchmean")
    with pytest.raises(ValueError, match="chunk"):
        linear_score(hidden, weight, targets, losses.ce, chunk=0)


def test_ignore_index_inside_the_vocabulary():
    logits, targets, _ = make(6, 20, ignored=())
    targets[2] = 7
    m = softmax_moments(logits, targets, ignore_index=7)
    assert torch.equal(m.valid, targets != 7) and m.log_p[2] == 0


def test_impl_is_what_was_asked_for():
    z = torch.zeros(1, 4, device=DEVICE)
    names = [kernels.impl.choose_impl(impl, z).__name__ for impl in (*IMPLS, "auto")]
    assert names[:2] == ["kernels.torch_impl", "kernels.triton_impl"] and names[2] == names[DEVICE == "cuda"]


def test_triton_on_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="needs CUDA tensors"):
        softmax_moments(torch.zeros(1, 4), torch.tensor([0]), impl="triton")


def test_auto_says_once_what_it_chose(caplog):
    kernels.impl._automatic.cache_clear()
    with caplog.at_level(logging.INFO, logger="scorecast"):
        for _ in range(3):
            softmax_moments(torch.zeros(1, 4), torch.tensor([0]))
    said = [r.getMessage() for r in caplog.records if r.name == "scorecast"]
    assert len(said) == 1 and "torch" in said[0] and "cpu" in said[0]


def test_kernels_compile_for_gpus_without_one(tmp_path):
    # In a process of its own: under the interpreter the kernels are not compilable functions. bf16 at the
    # vocabularies that matter is in test_fused.
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [
        sys.executable,
        "-m",
        "kernels.audit",
        "--vocab",
        "1000",
        "--dtype",
        "fp32",
        "--capability",
        "80",
        "--kernel",
        "tail",
    ]
    done = subprocess.run([*command, "--json", tmp_path / "a.json"], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert len(rows) == 2 and all(r["registers"] > 0 and r["spill_bytes"] == 0 for r in rows)
    env["TRITON_INTERPRET"] = "1"
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "unset it" in done.stderr


def test_bench_writes_its_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(timing, "measure_memory_apart", lambda *args: 4 * 32 * 100)
    files = {k: tmp_path / f"bench.{k}" for k in ("json", "csv", "png")}
    shape = ["--n", "32", "--v", "100", "--d", "8", "--repeats", "1", "--device", "cpu"]
    files_to = ["--json", str(files["json"]), "--csv", str(files["csv"]), "--plot", str(files["png"])]
    assert main([*shape, *files_to]) == 0
    rows = {r["provider"]: r for r in json.loads(files["json"].read_text())}
    assert set(rows) >= {*FROM_LOGITS, *FROM_HIDDEN}
    assert rows["literal DPSM"]["ratio_to_literal"] == 1 and rows["ours DPSM"]["peak_logits"] == 1
    with open(files["csv"]) as file:
        assert [r["provider"] for r in csv.DictReader(file)] == list(rows)
    assert files["png"].read_bytes()[:4] == b"\x89PNG"
    # fp32 against float64: some hundred operations of 2**-24 each.
    assert all(r["gradient_error"] < 1e-5 for r in rows.values() if r.get("gradient_error") is not None)
    assert rows["Liger CE"]["missing"] == "needs CUDA"
    shown = capsys.readouterr().out
    assert "linear_score DPSM, Fisher" in shown and "Liger CE" in shown and "needs CUDA" in shown


def test_audit_of_2000_tokens(tmp_path, capsys):
    file, traces = tmp_path / "audit.csv", tmp_path / "traces"
    small = ["--v", "64", "--d", "8", "--repeats", "1", "--device", "cpu"]
    assert main(["--audit-2k", *small, "--csv", str(file), "--trace", str(traces)]) == 0
    with open(file) as opened:
        rows = {r["loss"]: r for r in csv.DictReader(opened)}
    assert len(rows) == 8 and len(list(traces.iterdir())) == 8
    # Three products of 2000 x 64 x 8, whatever the score.
    assert {int(r["flops"]) for r in rows.values()} == {3 * 2 * 2000 * 64 * 8}
    assert main(["--nvtx", "--device", "cpu"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_bench_providers_compute_the_same_loss():
    leaves, targets = make_inputs(Shape(16, 50), "fp32", "cpu")
    names = ("literal DPSM", "ours DPSM", "ours DPSM by moments", "ours DPSM in place")
    values = [FROM_LOGITS[n](*leaves, targets).item() for n in names]
    leaves, targets = make_inputs(Shape(16, 50, 8), "fp32", "cpu")
    values2 = [FROM_HIDDEN[n](*leaves, targets).item() for n in ("linear + literal DPSM", "linear_score DPSM")]
    assert max(values) - min(values) < 1e-5 and max(values2) - min(values2) < 1e-5


def test_moments_can_be_made_by_hand():
    # Calibration and tests elsewhere build them without the optional fields.
    z = torch.zeros(2)
    m = Moments(z, z, z, z, z, z, z, z, z.bool(), z.bool(), vocab_size=5)
    assert m.tail_log_p is None and torch.equal(token_fisher(m, losses.ce), z)
