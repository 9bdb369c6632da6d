"""Every named loss, value and gradient, against float64 on rows of every length and kind."""

import functools

import pytest
import torch
from formulas import DEVICE, IMPLS, ORDERS, PLAIN, SCORES, literal, moments_of

from kernels import logits_score, losses

# 1: no other token; 128: one block of the kernel; 507: no multiple of anything; 50257: GPT-2's.
VOCABS = (1, 2, 128, 507, 50257)
KINDS = ("ordinary", "a tie", "some outside", "sure", "hopeless")
RELATIVE = 2e-5  # some 50257 additions, and powers of their sum
LONG = ("dpsm", "smoothing", 1.1)  # each reads other moments
CANCELS = ("brier", "spherical", "dpsm", "power")  # their gradient is a difference of terms of order 1


@functools.cache
def rows(vocab):
    """(logits fp32 [5, V], targets): one row of each of KINDS."""
    z = torch.randn(len(KINDS), vocab, generator=torch.Generator().manual_seed(vocab)) * 3
    y = torch.arange(len(KINDS)) * 37 % vocab
    each = torch.arange(len(KINDS))
    if vocab > 1:
        lse = z.scatter(1, y[:, None], -torch.inf).logsumexp(-1)
        z[each[1], y[1]] = z[1].max()
        z[2, torch.arange(vocab) % 3 == (y[2] + 1) % 3] = -torch.inf
        z[3, y[3]] = lse[3] + 7  # p_y = 0.9991
        z[4, y[4]] = lse[4] - 25  # p_y = 1e-11
    return z.to(DEVICE), y.to(DEVICE)


@functools.cache
def reference(name, vocab, order=None):
    """[(loss, gradient [V])] of ``rows`` in float64; a logit of -inf is no part of the distribution."""
    found = []
    for z, y in zip(*rows(vocab), strict=True):
        live = z > -torch.inf
        leaf = z[live].double()[None].requires_grad_()
        at = live[:y].sum()[None]
        loss = literal(name, leaf, at) if order is None else literal(name, leaf, at, order)
        loss.sum().backward()
        # At the target the formulas cancel even in float64; the entries of a row add up to 0.
        short = leaf.grad[0].index_fill(0, at, 0.0)
        short[at] = -short.sum()
        found.append(
            (loss[0].detach(), torch.zeros(vocab, dtype=torch.float64, device=DEVICE).masked_scatter(live, short))
        )
    return found


def check(got, want, name, label):
    (loss, grad), (want_loss, want_grad) = got, want
    # The entropy of a row that is sure is a difference as well, and the loss a multiple of it.
    floor = 2e-5 if name == "entropy_gated" else 1e-9
    assert (loss - want_loss).abs() <= RELATIVE * want_loss.abs() + floor, f"{label}: {loss} for {want_loss}"
    floor = 5e-7 if name in CANCELS else 1e-6 if name == "entropy_gated" else 1e-14
    error = (grad - want_grad).abs().max() - RELATIVE * want_grad.abs().max()
    assert error <= floor, f"{label}: {error} beyond the tolerance"


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("name", [*PLAIN, *ORDERS], ids=[*PLAIN, *(f"power-{g}" for g in ORDERS)])
def test_named_losses_match_float64(name, vocab, impl):
    if impl == "triton" and vocab == max(VOCABS) and name not in LONG and DEVICE == "cpu":
        pytest.skip("interpreted, five seconds a loss: a few stand for all that differ at scalars alone")
    order = None if name in PLAIN else name
    score, name = (SCORES[name], name) if order is None else (losses.power(order), "power")
    z, y = rows(vocab)
    upstream = torch.linspace(0.3, 1.9, len(z), device=DEVICE)
    for i, (kind, want) in enumerate(zip(KINDS, reference(name, vocab, order), strict=True)):
        row, which = z[i : i + 1].clone().requires_grad_(), slice(i, i + 1)
        loss, _ = logits_score(row, y[which], score, weights=upstream[which], reduction="sum", impl=impl)
        (loss * 1.7).backward()
        scale = 1.7 * upstream[i].double()
        check((loss.detach().double() / upstream[i], row.grad[0].double() / scale), want, name, kind)


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("order", [*ORDERS, None], ids=[*(f"power-{g}" for g in ORDERS), "eaft"])
def test_scores_of_fp32_moments_match_float64(order, vocab):
    """The scores by themselves: moments from their definitions in float64, rounded to what a kernel gives."""
    score, name = (losses.eaft, "eaft") if order is None else (losses.power(order), "power")
    z, y = rows(vocab)
    for i, (kind, want) in enumerate(zip(KINDS, reference(name, vocab, order), strict=True)):
        live = z[i] > -torch.inf
        leaf = z[i, live].double()[None].requires_grad_()
        m = moments_of(leaf, live[: y[i]].sum()[None], order)
        single = {
            k: v.float() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in vars(m).items()
        }
        loss = score(type(m)(**single))
        assert loss.dtype == torch.float32
        loss.sum().backward()
        grad = torch.zeros(vocab, dtype=torch.float64, device=DEVICE).masked_scatter(live, leaf.grad)
        check((loss[0].detach().double(), grad), want, name, kind)
