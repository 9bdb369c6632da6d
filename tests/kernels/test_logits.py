"""logits_score: its logits in place, its alpha, tokens of weight 0, and its memory."""

import os

import pytest
import torch
from formulas import DEVICE

from kernels import linear_score, logits_score, losses
from kernels.bench.timing import Shape, measure_memory_apart


def test_inplace_logits_cannot_be_used_again():
    z = torch.randn(3, 40, device=DEVICE, requires_grad=True)
    used = z.square()
    loss, _ = logits_score(z, torch.tensor([1, 2, 3], device=DEVICE), losses.ce, inplace=True, impl="triton")
    loss.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        used.sum().backward()


def test_a_moving_alpha_needs_no_new_score():
    alpha = torch.zeros((), device=DEVICE)
    score = losses.dpsm(alpha)
    z, targets = torch.randn(4, 33, device=DEVICE), torch.tensor([1, 2, 3, 4], device=DEVICE)
    for value in (0.0, 0.4, 1.0):
        alpha.fill_(value)
        leaf = z.clone().requires_grad_()
        got, _ = logits_score(leaf, targets, score, impl="triton")
        want, _ = logits_score(z, targets, losses.dpsm(value), impl="torch")
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("name", ["dpsm", "power", "smoothing"])
def test_a_scale_is_that_of_logits_scaled_before(name, impl):
    """In one kernel too, and for what that leaves to the next: a tie, an entry outside, one as low as a fill."""
    score = {"dpsm": losses.dpsm(0.3), "power": losses.power(1.25), "smoothing": losses.smoothing(0.1)}[name]
    z = torch.randn(6, 90, generator=torch.Generator().manual_seed(4)).mul_(40).to(DEVICE)
    targets = torch.tensor([3, 80, -100, 7, 0, 89], device=DEVICE)
    z[0, 50] = z[0, 3] = z[0].max()
    z[1, 20], z[3, 20] = -torch.inf, -1e5
    scaled = (z * 0.05).double().requires_grad_()
    want, w = logits_score(scaled, targets, score, fisher=True, impl="torch")
    want.backward()
    leaf = z.clone().requires_grad_()
    got, m = logits_score(leaf, targets, score, scale=0.05, fisher=True, impl=impl)
    got.backward()
    torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=0)
    torch.testing.assert_close(leaf.grad.double(), 0.05 * scaled.grad, rtol=1e-4, atol=2e-8)
    torch.testing.assert_close(m.fisher.double(), w.fisher, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(m.mean_log_p.double(), w.mean_log_p, rtol=1e-5, atol=1e-5)
    assert torch.equal(m.correct, w.correct)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("path", losses.PATHS)
def test_an_alpha_refilled_before_backward_changes_no_gradient(path, impl):
    alpha = torch.tensor(0.7, device=DEVICE)
    generator = torch.Generator().manual_seed(6)
    hidden, weight = (torch.randn(n, 8, generator=generator).to(DEVICE).requires_grad_() for n in (5, 33))
    targets = torch.tensor([1, 2, 3, 4, 5], device=DEVICE)
    want = linear_score(hidden, weight, targets, losses.dpsm(0.7, path), reduction="none", impl="torch")[0]
    expected = torch.autograd.grad(want.sum(), (hidden, weight))
    loss, _ = linear_score(hidden, weight, targets, losses.dpsm(alpha, path), reduction="none", impl=impl)
    alpha.fill_(0.0)
    for got, right in zip(torch.autograd.grad(loss.sum(), (hidden, weight)), expected, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_vectors_may_be_strided(impl):
    """Targets, weights and an upstream gradient that is one number for all."""
    generator = torch.Generator().manual_seed(7)
    hidden, weight = (torch.randn(n, 8, generator=generator).to(DEVICE).requires_grad_() for n in (5, 33))
    targets = torch.randint(33, (5, 3), generator=generator).to(DEVICE)[:, 1]
    weights = torch.rand(5, 2, generator=generator).to(DEVICE)[:, 0]
    for reduction in ("none", "sum"):
        found = []
        for y, w in ((targets, weights), (targets.clone(), weights.clone())):
            loss, _ = linear_score(hidden, weight, y, losses.brier, weights=w, reduction=reduction, impl=impl)
            found.append((loss.detach(), *torch.autograd.grad(loss.sum(), (hidden, weight))))
        for got, want in zip(*found, strict=True):
            torch.testing.assert_close(got, want)
        logits = (hidden @ weight.T).detach().requires_grad_()
        loss, _ = logits_score(logits, targets, losses.brier, weights=weights, reduction=reduction, impl=impl)
        torch.testing.assert_close(loss.detach(), found[0][0])


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_weight_zero_ignores_even_an_infinite_loss(impl):
    logits = torch.zeros(2, 5, device=DEVICE)
    logits[0, 2] = -torch.inf
    targets, weights = torch.tensor([2, 1], device=DEVICE), torch.tensor([0.0, 1.0], device=DEVICE)
    for score in (losses.ce, losses.focal(2.0), lambda m: -m.log_p):
        z = logits.clone().requires_grad_()
        loss, _ = logits_score(z, targets, score, weights=weights, impl=impl)
        loss.backward()
        want, _ = logits_score(logits[1:], targets[1:], score, impl=impl)
        torch.testing.assert_close(loss, want)
        assert z.grad.isfinite().all() and (z.grad[0] == 0).all()
        hidden, head_weight = torch.zeros(2, 3, device=DEVICE, requires_grad=True), torch.ones(5, 3, device=DEVICE)
        loss, _ = linear_score(hidden, head_weight, targets, score, bias=logits[0], weights=weights, impl=impl)
        loss.backward()
        assert loss.isfinite() and hidden.grad.isfinite().all()


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's high-water mark")
def test_peak_memory_of_a_fresh_process():
    one = 2048 * 8192 * 4
    assert measure_memory_apart("ours DPSM in place", Shape(2048, 8192), "fp32", 1) <= 0.1 * one
    # the gradient itself, and the scratch
    assert measure_memory_apart("ours DPSM", Shape(2048, 8192), "fp32", 1) <= 1.1 * one
