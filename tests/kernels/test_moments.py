"""Moments made by hand, and the Fisher of a token against the gradient itself."""

import math

import pytest
import torch
import torch.nn.functional as F
from formulas import PLAIN, SCORES, TAIL, close, make

from kernels import Moments, losses, softmax_moments, token_fisher


@pytest.mark.parametrize("name", [*PLAIN, "custom"])
@pytest.mark.parametrize("padded", [False, True])
def test_fisher_is_the_squared_norm_of_the_gradient(name, padded):
    score = SCORES.get(name, lambda m: losses.ce(m) * m.r1 - m.mean_log_p * m.r2 + m.lse * m.r1)
    logits, targets, _ = make(12, 80, torch.float64)
    if padded:
        logits = F.pad(logits, (0, 5), value=-math.inf)
    z = logits.requires_grad_()
    m = softmax_moments(z, targets, impl="torch")
    score(m).sum().backward()  # the gradient is held against autograd of the formulas in test_softmax
    close(token_fisher(m, score), z.grad.square().sum(-1), 1e-11, floor=1e-15)


def test_fisher_of_cross_entropy_is_the_brier_score():
    logits, targets, _ = make(12, 80)
    m = softmax_moments(logits, targets)
    close(token_fisher(m, losses.ce), losses.brier(m), 1e-6)


def test_fisher_refuses_the_tail_and_the_entropy():
    logits, targets, _ = make(4, 30)
    m = softmax_moments(logits, targets, tail=TAIL)
    assert token_fisher(m, losses.ce).shape == (4,)
    with pytest.raises(ValueError, match="reads tail_log_p"):
        token_fisher(m, SCORES["brier-tail"])
    with pytest.raises(ValueError, match="reads entropy; detach it"):
        token_fisher(m, lambda m: losses.ce(m) + m.entropy)


def test_moments_can_be_made_by_hand():
    # Calibration and tests elsewhere build them without the optional fields.
    z = torch.zeros(2)
    m = Moments(z, z, z, z, z, z, z, z, z, z, z.bool(), z.bool(), vocab_size=5)
    assert m.tail_log_p is None and torch.equal(token_fisher(m, losses.ce), z)
