"""Scores of a real order g, entropy and log-sum with their gradients, scale and softcap, and what has no gradient:
against float64 autograd of the whole softmax."""

import math

import pytest
import torch
from formulas import DEVICE, IMPLS, close, make
from named_scores import head

from kernels import (
    linear_moments,
    linear_score,
    linear_sequence_log_p,
    logits_score,
    losses,
    softmax_moments,
    token_fisher,
)

ORDERS = {"near 1": 1.000001, "1.25": 1.25, "2": 2.0, "3": 3.0, "on the device": torch.tensor(1.5, device=DEVICE)}
LINKS = {"as given": (1.0, None), "scaled": (0.3, None), "capped": (1.0, 5.0), "both": (0.5, 30.0)}


def everything(g, m):
    """A score that reads each moment that has a gradient."""
    power = 3 * m.s - 0.5 * m.log_p + 0.3 * m.r1 + 0.1 * m.mean_log_p
    return power + 0.7 * m.entropy + 0.05 * m.lse.square()


def of_order(g, function=everything):
    def score(m):
        return function(g, m)

    score.order = g
    return score


def literal_link(z, link):
    scale, softcap = link
    return scale * z if softcap is None else softcap * torch.tanh(scale * z / softcap)


def literal(z, targets, g, link):
    """(``everything``, lse, entropy, s) of float64 logits as given."""
    z = literal_link(z, link)
    log_p, y = z.log_softmax(-1), targets[:, None]
    p, target = log_p.exp(), log_p.gather(1, y)[:, 0]
    s = p.scatter(1, y, 0.0).pow(float(g)).sum(-1)
    entropy, lse = -torch.special.xlogy(p, p).sum(-1), z.logsumexp(-1)
    power = 3 * s - 0.5 * target + 0.3 * (1 - target.exp()) + 0.1 * log_p.mean(-1)
    return power + 0.7 * entropy + 0.05 * lse.square(), lse, entropy, s


def wanted(logits, targets, upstream, g, link=(1.0, None)):
    """(losses, gradient of their weighted sum), 0 for ignored tokens."""
    z = logits.detach().double().requires_grad_()
    valid = targets != -100
    loss = torch.where(valid, literal(z, torch.where(valid, targets, 0), g, link)[0], 0.0)
    (loss * upstream).sum().backward()
    return loss.detach(), z.grad


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", [*ORDERS, *LINKS])
def test_value_and_gradient_of_every_moment(name, impl):
    g, link = ORDERS.get(name, 1.25), LINKS.get(name, (1.0, None))
    for n, vocab in ((1, 1), (2, 2), (4, 131)):
        logits, targets, upstream = make(n, vocab, ignored=range(1, n, 2))
        want, gradient = wanted(logits, targets, upstream, g, link)
        z = logits.clone().requires_grad_()
        how = dict(scale=link[0], softcap=link[1], impl=impl)
        loss, m = logits_score(z, targets, of_order(g), reduction="none", **how)
        (loss * upstream).sum().backward()
        close(loss, want, 2e-5, floor=2e-5)
        close(z.grad, gradient, 2e-5, floor=4e-6)
        assert m.order is None if isinstance(g, float) and g == 2 else float(m.order) == pytest.approx(float(g))
        # A head of logits: gradient in the forward, and for reduction "none" again in the backward.
        weight = torch.eye(vocab, device=DEVICE)
        for reduction in ("sum", "none"):
            h = logits.clone().requires_grad_()
            given = dict(reduction=reduction, chunk=3, weights=upstream)
            total, _ = linear_score(h, weight, targets, of_order(g), **given, **how)
            total.sum().backward()
            close(h.grad, gradient, 2e-5, floor=4e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_orders_and_softcaps_in_sixteen_bits(dtype, impl):
    logits, targets, upstream = make(5, 300, dtype, ignored=(1, 2))
    logits[0, 7], logits[4, :290] = -math.inf, -60000.0  # outside of the vocabulary; so low that it may be a fill
    how = dict(scale=0.01, softcap=3.0, impl=impl)
    z = logits.clone().requires_grad_()
    loss, _ = logits_score(z, targets, of_order(1.25), reduction="none", **how)
    (loss * upstream).sum().backward()
    valid = targets != -100
    want = logits.double()
    outside = want == -math.inf
    want = torch.where(outside, 0.0, want).requires_grad_()
    shaped = torch.where(outside, -math.inf, literal_link(want, (0.01, 3.0)))
    live = ~outside
    log_p, y = shaped.log_softmax(-1), torch.where(valid, targets, 0)[:, None]
    safe = torch.where(live, log_p, 0.0)
    p, target = log_p.exp(), log_p.gather(1, y)[:, 0]
    s = p.scatter(1, y, 0.0).clamp_min(1e-300).pow(1.25).sum(-1)
    mean, entropy = safe.sum(-1) / live.sum(-1), -(p * safe).sum(-1)
    exact = 3 * s - 0.5 * target + 0.3 * (1 - target.exp()) + 0.1 * mean + 0.7 * entropy
    exact = torch.where(valid, exact + 0.05 * shaped.logsumexp(-1).square(), 0.0)
    (exact * upstream).sum().backward()
    close(loss, exact, 2e-5, floor=1e-5)
    close(z.grad, want.grad, 2**-7 if dtype == torch.bfloat16 else 2**-10, floor=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_moving_order_is_read_when_the_score_is_evaluated(impl):
    g = torch.tensor(1.5, device=DEVICE)
    score = of_order(g, lambda g, m: m.s)
    for value in (1.5, 2.5):
        g.fill_(value)
        logits, targets, _ = make(4, 20, ignored=())
        got, _ = logits_score(logits, targets, score, reduction="none", impl=impl)
        close(got, literal(logits.double(), targets, value, (1.0, None))[3], 2e-5, floor=1e-7)


@pytest.mark.parametrize("g", [1.25, 3.0])
def test_fisher_of_an_order_is_the_squared_norm_of_the_gradient(g):
    logits, targets, _ = make(9, 40, torch.float64, ignored=())
    score = of_order(g, lambda g, m: m.s + losses.ce(m) * m.r1 + 0.1 * m.lse - 0.2 * m.mean_log_p)
    for link in LINKS.values():
        z = literal_link(logits, link).detach().requires_grad_()
        m = softmax_moments(z, targets, order=g)
        score(m).sum().backward()
        want = z.grad.square().sum(-1)  # with respect to the logits of the softmax
        close(token_fisher(m, score), want, 1e-11, floor=1e-15)
        weight = torch.eye(40, dtype=torch.float64, device=DEVICE)
        how = dict(scale=link[0], softcap=link[1], fisher=True)
        close(linear_score(logits, weight, targets, score, **how)[1].fisher, want, 1e-11, floor=1e-15)
        close(logits_score(logits, targets, score, **how)[1].fisher, want, 1e-11, floor=1e-15)
    for other in (None, 2.5):
        with pytest.raises(ValueError, match="ask for them with order="):
            token_fisher(softmax_moments(logits, targets, order=other), score)


@pytest.mark.parametrize("impl", IMPLS)
def test_entropy_keeps_its_gradient_where_a_row_is_sure(impl):
    """p_y from 1 - 1e-3 to 1 - 1e-13: each entry of the gradient to its own digits, from logits and from a head."""
    logits = torch.tensor([[float(top), 0.0, 0.5, -1.0] for top in (8, 16, 24, 31)], device=DEVICE)
    targets, weight = torch.zeros(4, dtype=torch.int64, device=DEVICE), torch.eye(4, device=DEVICE)
    z = logits.double().requires_grad_()
    p = z.softmax(-1)
    (p * z.log_softmax(-1)).sum().backward()
    off = z.grad[:, 1:]
    for call in (
        lambda leaf: logits_score(leaf, targets, lambda m: -m.entropy, reduction="sum", impl=impl),
        lambda leaf: linear_score(leaf, weight, targets, lambda m: -m.entropy, reduction="sum", impl=impl),
    ):
        leaf = logits.clone().requires_grad_()
        call(leaf)[0].backward()
        torch.testing.assert_close(leaf.grad[:, 1:].double(), off, rtol=1e-4, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_predicted_ids_and_the_first_of_a_tie(impl):
    logits, targets, _ = make(7, 70, ignored=(1,))
    logits[0, [5, 60]] = 30.0
    targets[0] = 60
    logits[2, [9, 60]] = 30.0
    targets[2] = 9
    logits[4, :] = 0.0
    want = torch.where(targets == -100, 0, logits.argmax(-1))
    for got in (
        softmax_moments(logits, targets, predictions=True, impl=impl),
        logits_score(logits, targets, losses.ce, predictions=True, impl=impl)[1],
        linear_score(logits, torch.eye(70), targets, losses.ce, predictions=True, chunk=3, impl=impl)[1],
        linear_moments(logits, torch.eye(70), targets, predictions=True, softcap=50.0, impl=impl),
    ):
        assert torch.equal(got.predicted, want) and got.predicted.dtype == torch.int64
        assert torch.equal(got.correct, (want == targets) & (targets != -100))
    assert softmax_moments(logits, targets, impl=impl).predicted is None


@pytest.mark.parametrize("impl", IMPLS)
def test_class_weights_are_those_of_torch(impl):
    hidden, weight, bias, targets, _ = head()
    classes = torch.rand(37, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    logits = hidden @ weight.T + bias
    want = torch.nn.functional.cross_entropy(logits, targets, weight=classes)
    expected = torch.autograd.grad(want, (hidden, weight, bias))
    loss, _ = linear_score(hidden, weight, targets, losses.ce, bias=bias, class_weights=classes, impl=impl)
    torch.testing.assert_close(loss, want)
    for got, right in zip(torch.autograd.grad(loss, (hidden, weight, bias)), expected, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-6)
    z = logits.detach().requires_grad_()
    torch.testing.assert_close(logits_score(z, targets, losses.ce, class_weights=classes, impl=impl)[0], want)
    module = losses.ProperScoreLoss("ce", class_weights=classes, impl=impl)
    torch.testing.assert_close(module(z, targets), want)


@pytest.mark.parametrize("impl", IMPLS)
def test_log_probability_of_a_sequence_and_its_gradient(impl):
    hidden, weight, bias, _, _ = head(n=12)
    targets = torch.randint(37, (3, 4), generator=torch.Generator().manual_seed(5)).to(DEVICE)
    targets[0, 2:], targets[2] = -100, -100
    states = hidden.view(3, 4, 8)
    got, m = linear_sequence_log_p(states, weight, targets, bias=bias, softcap=7.0, chunk=5, impl=impl)
    each = literal_link(states @ weight.T + bias, (1.0, 7.0)).log_softmax(-1).gather(2, targets.clamp_min(0)[..., None])
    want = torch.where(targets == -100, 0.0, each[..., 0]).sum(1)
    torch.testing.assert_close(got, want)
    assert got[2] == 0 and torch.equal(m.valid, (targets != -100).flatten())
    scale = torch.tensor([1.0, -2.0, 3.0], device=DEVICE)
    for right, found in zip(
        torch.autograd.grad((want * scale).sum(), (hidden, weight, bias)),
        torch.autograd.grad((got * scale).sum(), (hidden, weight, bias)),
        strict=True,
    ):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="hidden must be .B, T, D. and targets .B, T., got"):
        linear_sequence_log_p(hidden, weight, targets)


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("g", [1.0, 0.5, -2.0, math.inf, math.nan])
def test_an_order_must_be_above_one_and_finite(g):
    hidden, weight, _, targets, _ = head()
    with pytest.raises(ValueError, match="must be above 1 and finite"):
        linear_score(hidden, weight, targets, of_order(g))
    with pytest.raises(ValueError, match="must be above 1 and finite"):
        softmax_moments(hidden, targets.clamp(-100, 7), order=g)


@pytest.mark.parametrize("name", ["r3", "r4", "confidence"])
def test_a_moment_without_gradient_must_be_detached(name):
    hidden, weight, _, targets, _ = head()
    with pytest.raises(ValueError, match=f"reads {name} with a gradient, and it has none; read m.{name}.detach"):
        linear_score(hidden, weight, targets, lambda m: losses.ce(m) * getattr(m, name))
    loss, _ = linear_score(hidden, weight, targets, lambda m: losses.ce(m) * getattr(m, name).detach())
    loss.backward()
    assert hidden.grad.abs().sum() > 0


def test_r2_has_no_gradient_under_an_order():
    hidden, weight, _, targets, _ = head()
    with pytest.raises(ValueError, match="reads r2 with a gradient, and it has none under an order; write"):
        linear_score(hidden, weight, targets, of_order(1.5, lambda g, m: m.r2 + m.s))
    with pytest.raises(ValueError, match="reads r2 with a gradient"):
        logits_score(hidden, targets.clamp(-100, 7), of_order(1.5, lambda g, m: m.r2 + m.s))[0].backward()


def test_a_score_that_is_nan_at_probability_zero_names_row_and_token():
    logits, bias = torch.zeros(4, 5, device="cpu"), torch.tensor([0.0, 0.0, 0.0, -math.inf, 0.0])
    targets = torch.tensor([-100, 1, 3, 0])
    for call in (
        lambda score: linear_score(logits, torch.eye(5), targets, score, bias=bias, chunk=1),
        lambda score: logits_score(logits + bias, targets, score),
    ):
        with pytest.raises(ValueError, match="NaN at row 2, token 3, where p_y = 0"):
            call(lambda m: m.log_p * m.log_p.exp())
        assert call(losses.ce)[0] == math.inf


@pytest.mark.parametrize("how", [dict(scale=0.0), dict(scale=-1.0), dict(softcap=0.0), dict(softcap=math.inf)], ids=str)
def test_scale_and_softcap_must_be_positive(how):
    hidden, weight, _, targets, _ = head()
    for call in (linear_moments, lambda *x, **k: linear_score(*x, losses.ce, **k)):
        with pytest.raises(ValueError, match="must be positive and finite"):
            call(hidden, weight, targets, **how)


def test_class_weights_must_be_one_a_class():
    hidden, weight, _, targets, _ = head()
    with pytest.raises(ValueError, match="class_weights must be .V., one a token id, 37"):
        linear_score(hidden, weight, targets, losses.ce, class_weights=torch.ones(36))
