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
