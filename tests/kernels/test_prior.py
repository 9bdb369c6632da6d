"""Smoothing towards a prior is CE against the smoothed target, in value and gradient, on top of any mixture."""

import pytest
import torch

from kernels import linear_score, make_score, prior_gap

N, V, D, SHARE = 50, 33, 16, 0.2


def drawn(dtype=torch.float64, rows=V):
    torch.manual_seed(0)
    hidden, weight = torch.randn(N, D, dtype=dtype), torch.randn(rows, D, dtype=dtype)
    targets = torch.randint(V, (N,))
    targets[::7] = -100
    prior = torch.rand(V, dtype=torch.float64)
    return hidden.requires_grad_(), weight.requires_grad_(), targets, prior / prior.sum()


def by_definition(hidden, weight, targets, prior, alpha):
    """(1 - u) ((1 - alpha) CE + alpha Brier) + u CE(q, p), mean over the tokens in the loss."""
    valid = targets != -100
    log_p = torch.log_softmax((hidden.double() @ weight.double()[:V].t())[valid], -1)
    p, log_p_y = log_p.exp(), log_p.gather(1, targets[valid][:, None])[:, 0]
    brier = (p * p).sum(1) - 2 * log_p_y.exp() + 1
    return ((1 - SHARE) * (alpha * brier - (1 - alpha) * log_p_y) - SHARE * (log_p * prior).sum(1)).mean()


@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_smoothed_towards_the_prior(alpha):
    hidden, weight, targets, prior = drawn()
    score = make_score("dpsm", alpha=(1 - SHARE) * alpha) if alpha else make_score("ce")
    loss, _ = linear_score(hidden, weight, targets, score)
    loss = loss + SHARE * prior_gap(hidden, weight, targets, prior)
    expected = by_definition(hidden, weight, targets, prior, alpha)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)  # the gap is a sum in fp32
    for ours, theirs in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (loss, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)


def test_uniform_is_label_smoothing():
    hidden, weight, targets, _ = drawn()
    loss, _ = linear_score(hidden, weight, targets, make_score("ce"))
    loss = loss + SHARE * prior_gap(hidden, weight, targets, torch.full((V,), 1 / V))
    expected, _ = linear_score(hidden, weight, targets, make_score("smoothing", eps=SHARE))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_low_precision_rows_beyond_the_vocabulary_and_a_denominator():
    hidden, weight, targets, prior = drawn(torch.bfloat16, rows=V + 5)
    gap = prior_gap(hidden, weight, targets, prior, denominator=torch.tensor(7.0))
    z = (hidden.double() @ weight.double()[:V].t())[targets != -100]
    at_y = z.gather(1, targets[targets != -100][:, None])[:, 0]
    expected = (at_y - z @ prior.bfloat16().double()).sum() / 7
    assert gap.dtype == torch.float32 and gap.item() == pytest.approx(expected.item(), rel=2e-2)
    gap.backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16 and not weight.grad[V:].any()
    assert not hidden.grad[targets == -100].any()


def test_no_token_in_the_loss_and_a_prior_that_does_not_fit():
    hidden, weight, targets, prior = drawn()
    assert prior_gap(hidden, weight, torch.full_like(targets, -100), prior).item() == 0
    with pytest.raises(ValueError, match=r"at most 33 rows of weight; got \[34\]"):
        prior_gap(hidden, weight, targets, torch.ones(34) / 34)
