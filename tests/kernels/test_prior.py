"""Smoothing towards a prior is CE against the smoothed target, in value and gradient, on top of any mixture."""

import math

import numpy as np
import pytest
import torch

from kernels import UnigramSmoothing, linear_score, make_score, prior_gap

N, V, D, SHARE = 50, 33, 16, 0.2


def drawn(dtype=torch.float64, rows=V):
    torch.manual_seed(0)
    hidden, weight = torch.randn(N, D, dtype=dtype), torch.randn(rows, D, dtype=dtype)
    targets = torch.randint(V, (N,))
    targets[::7] = -100
    prior = torch.rand(V, dtype=torch.float64)
    return hidden.requires_grad_(), weight.requires_grad_(), targets, prior / prior.sum()


def by_definition(hidden, weight, targets, prior, alpha, bias=None):
    """(1 - u) ((1 - alpha) CE + alpha Brier) + u CE(q, p), mean over the tokens in the loss."""
    valid = targets != -100
    z = hidden.double() @ weight.double()[:V].t() + (0 if bias is None else bias)
    log_p = torch.log_softmax(z[valid], -1)
    p, log_p_y = log_p.exp(), log_p.gather(1, targets[valid][:, None])[:, 0]
    brier = (p * p).sum(1) - 2 * log_p_y.exp() + 1
    return ((1 - SHARE) * (alpha * brier - (1 - alpha) * log_p_y) - SHARE * (log_p * prior).sum(1)).mean()


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_smoothed_towards_the_prior(alpha, biased):
    hidden, weight, targets, prior = drawn()
    bias = 3 * torch.randn(V, dtype=torch.float64) if biased else None
    leaves = (hidden, weight, bias.requires_grad_()) if biased else (hidden, weight)
    score = make_score("dpsm", alpha=(1 - SHARE) * alpha) if alpha else make_score("ce")
    loss, _ = linear_score(hidden, weight, targets, score, bias=bias)
    loss = loss + SHARE * prior_gap(hidden, weight, targets, prior, bias=bias)
    expected = by_definition(hidden, weight, targets, prior, alpha, bias)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)  # the gap is a sum in fp32
    for ours, theirs in zip(*(torch.autograd.grad(x, leaves) for x in (loss, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)


def test_uniform_is_label_smoothing():
    hidden, weight, targets, _ = drawn()
    loss, _ = linear_score(hidden, weight, targets, make_score("ce"))
    loss = loss + SHARE * prior_gap(hidden, weight, targets, torch.full((V,), 1 / V))
    expected, _ = linear_score(hidden, weight, targets, make_score("smoothing", eps=SHARE))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_low_precision_rows_beyond_the_vocabulary_and_a_denominator():
    hidden, weight, targets, prior = drawn(torch.bfloat16, rows=V + 5)
    bias = torch.randn(V + 5)
    gap = prior_gap(hidden, weight, targets, prior, bias=bias, denominator=torch.tensor(7.0))
    z = (hidden.double() @ weight.double()[:V].t() + bias[:V])[targets != -100]
    at_y = z.gather(1, targets[targets != -100][:, None])[:, 0]
    expected = (at_y - z @ prior.bfloat16().double()).sum() / 7
    assert gap.dtype == torch.float32 and gap.item() == pytest.approx(expected.item(), rel=2e-2)
    gap.backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16 and not weight.grad[V:].any()
    assert not hidden.grad[targets == -100].any()


def test_a_frozen_head_gets_no_gradient_and_nothing_of_its_size_is_held():
    hidden, weight, targets, prior = drawn()
    expected = torch.autograd.grad(prior_gap(hidden, weight, targets, prior), hidden)[0]
    wide = torch.cat([weight.detach(), torch.randn(5000, D)])
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t.numel()) or t, lambda t: t):
        gap = prior_gap(hidden, wide, targets, torch.cat([prior, torch.zeros(5000)]))
    assert wide.grad is None and sum(held) < 3 * N * D
    torch.testing.assert_close(torch.autograd.grad(gap, hidden)[0], expected)


def test_no_token_in_the_loss_and_a_prior_or_a_bias_that_does_not_fit():
    hidden, weight, targets, prior = drawn()
    bias = torch.randn(V)
    assert prior_gap(hidden, weight, torch.full_like(targets, -100), prior, bias=bias).item() == 0
    with pytest.raises(ValueError, match=r"at most 33 rows of weight; got \[34\]"):
        prior_gap(hidden, weight, targets, torch.ones(34) / 34)
    with pytest.raises(ValueError, match=r"bias must be \[33\].*got \[32\]"):
        prior_gap(hidden, weight, targets, prior, bias=bias[1:])


def test_a_share_of_the_unigram():
    """Its prior is (count + 1) / (tokens + V); fixed, its term is share times the gap, and a validation moves nothing;
    off, nothing is counted."""
    hidden, weight, targets, _ = drawn()
    counts = np.arange(V)[::-1] ** 3
    unigram = UnigramSmoothing(SHARE, 0.0, lambda: counts)
    prior = (torch.from_numpy(counts.copy()) + 1.0) / (counts.sum() + V)
    torch.testing.assert_close(unigram.prior, prior.float())
    how = dict(bias=torch.randn(V), denominator=torch.tensor(9.0))
    got, expected = unigram.term(hidden, weight, targets, **how), prior_gap(hidden, weight, targets, prior, **how)
    assert got.item() == pytest.approx(SHARE * expected.item(), rel=1e-6)
    unigram.follow({"confidence": 0.9, "accuracy": 0.1})
    assert unigram.shown == {"unigram": SHARE}
    off = UnigramSmoothing(0.0, 0.0, lambda: pytest.fail("counted"))
    assert off.term(hidden, weight, targets) == 0 and off.shown == {}


def test_a_share_that_follows_over_confidence():
    unigram, seen = UnigramSmoothing(0.4, 2.0, lambda: [3, 0, 1]), []
    for gap in (0.05, 0.1, math.nan, -0.06, -0.5, 0.01, 0.3):
        unigram.follow({"confidence": 0.5 + gap, "accuracy": 0.5})
        seen.append(unigram.share)
    assert seen == pytest.approx([0.1, 0.3, 0.3, 0.18, 0.0, 0.02, 0.4])
    assert UnigramSmoothing(0.4, 2.0, lambda: [3, 0, 1]).share == 0
