"""Moments of softmax rows: the contract between the scores (losses.py) and the kernels (torch_impl, triton_impl).

Let p = softmax(z), y the target, r_k = sum_{j != y} p_j^k, and g0, g1, gs the partial derivatives of a loss
f(log_p, r1, s), where s = r_g is of the score's order g > 1, usually 2. From d log_p/dz_k = [k = y] - p_k and
d p_j/dz_k = p_j ([j = k] - p_k) its gradient is

    dL/dz_j = p_j (a + c p_j^(g-1)),  j != y        a = -g0 + g1 p_y - g gs s,    c = g gs
    dL/dz_y = -(a r1 + c s)

With derivatives gm at ``mean_log_p`` and gt at ``tail_log_p``, in a row of n logits, k of them in the tail,

    a loses gm + k gt/n,    every entry gains b = gm/n,    every tail entry gains t = gt/n

and the target's entry stays minus the sum of the others. With gl at ``lse`` every entry, the target's too, gains
gl p_j; with ge at ``entropy`` H it gains -ge p_j (log p_j + H). So an implementation only reduces a row to its moments
and writes p_j (a + c p_j^(g-1) + h log p_j) + b + t [p_j in tail]: torch_impl.forward and gradient.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

LEAST_ORDER = 1 + 1e-6  # an order on the device is not looked at, only kept from falling below


@dataclass
class Moments:
    """What a score may read about each token: vectors [N], fp32 (fp64 for fp64 logits).

    A token outside the loss (target == ignore_index) has 0 or False everywhere and gradient 0. A logit of -inf is an
    entry outside the vocabulary: mean_log_p, tail_log_p and entropy leave it out, with ``support`` in the place of V.
    """

    # Differentiable:
    log_p: Tensor  # log p_y, in nats
    r1: Tensor  # sum_{j != y} p_j, which is 1 - p_y without cancellation
    r2: Tensor  # sum_{j != y} p_j^2; without gradient where there is an order
    mean_log_p: Tensor  # mean over j of log p_j
    entropy: Tensor  # H = -sum_j p_j log p_j, in nats
    lse: Tensor  # log sum_j exp z_j
    s: Tensor  # sum_{j != y} p_j^order, r2 without an order
    # Without gradient: a score reads them detached, or gets an error.
    r3: Tensor  # off-target sums of p_j^3 and p_j^4, for the Fisher; under an order g of p_j^(g+1) and p_j^(2g)
    r4: Tensor
    confidence: Tensor  # max_j p_j
    correct: Tensor  # bool: argmax == target, the first index wins a tie
    valid: Tensor  # bool: target != ignore_index
    vocab_size: int  # V, the length of a row
    # (1/V) sum_{j: p_j < tail/V} log p_j, differentiable with its mask held constant; None unless asked for.
    tail_log_p: Tensor | None = None
    support: Tensor | None = None  # number of logits above -inf
    fisher: Tensor | None = None  # |dL/dz|^2 of the score that linear_score was given; None unless asked for
    predicted: Tensor | None = None  # int64: argmax_j p_j, the first index wins a tie; None unless asked for
    # Of the k likeliest tokens: log_p [N, k], ids [N, k], and the entropy of softmax over them alone, in nats; None
    # unless asked for. Without gradient.
    top_log_p: Tensor | None = None
    top_ids: Tensor | None = None
    top_entropy: Tensor | None = None
    order: Tensor | float | None = None  # g of ``s``, r3 and r4; None is 2

    def detach(self) -> "Moments":
        """The same without gradients."""
        return Moments(**{k: v.detach() if isinstance(v, Tensor) else v for k, v in vars(self).items()})


WITHOUT_GRADIENT = ("r3", "r4", "confidence", "top_log_p", "top_entropy")


class Stats(NamedTuple):
    """What a forward leaves behind about each token: the rows of one [17, N] buffer, ``Stats(*buffer)``."""

    log_p: Tensor
    r1: Tensor
    r2: Tensor
    mean_log_p: Tensor
    tail_log_p: Tensor
    entropy: Tensor
    lse: Tensor
    s: Tensor  # undefined without an order
    r3: Tensor
    r4: Tensor
    confidence: Tensor
    support: Tensor
    p_y: Tensor
    tail_count: Tensor  # entries in the tail, the target included; undefined, as tail_log_p, without a tail
    tail_off: Tensor  # the same without the target
    row_max: Tensor  # off target: max_j z_j and sum_j exp(z_j - max), so that w_j = exp(z_j - max) / sum
    row_sum: Tensor


IN_BOTH = tuple(name for name in Stats._fields if name in Moments.__dataclass_fields__)


class Partials(NamedTuple):
    """dL/d(moment) per token; None where the loss does not use the moment. The first of Stats, in their order."""

    log_p: Tensor | None
    r1: Tensor | None
    r2: Tensor | None
    mean_log_p: Tensor | None = None
    tail_log_p: Tensor | None = None
    entropy: Tensor | None = None
    lse: Tensor | None = None
    s: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> "Partials":
        return Partials(*(None if g is None else function(g) for g in self))


class Coefficients(NamedTuple):
    """The gradient of a row: p_j (a + c p_j^(g-1) + h log p_j) + b + t [p_j in tail] off target, ``target`` at y."""

    a: Tensor
    c: Tensor | None
    b: Tensor | None
    t: Tensor | None
    h: Tensor | None
    target: Tensor


class Link(NamedTuple):
    """How the softmax's logits follow from those that are given: softcap tanh(scale z / softcap), scale z without a
    softcap. -inf stays -inf."""

    scale: float = 1.0
    softcap: float = 0.0

    def apply_(self, z: Tensor) -> Tensor:
        """In place."""
        if not self.softcap:
            return z if self.scale == 1 else z.mul_(self.scale)
        out = z == -torch.inf
        z.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap)
        return z.masked_fill_(out, -torch.inf)

    def slope(self, z: Tensor) -> Tensor:
        """What the softcap multiplies the gradient at the given logits z by: 1 / cosh(scale z / softcap)^2."""
        return (z * (self.scale / self.softcap)).cosh_().square_().reciprocal_()


PLAIN = Link()


def make_link(scale: float, softcap: float | None) -> Link:
    """Raises ValueError where scale or softcap is not positive and finite."""
    for name, value in (("scale", scale), ("softcap", softcap)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value}")
    return Link(float(scale), float(softcap or 0.0))


def check_order(order: Tensor | float | None) -> Tensor | float | None:
    """The order as the kernels take it: None for 2, which r2 is. Raises ValueError for a number that is not above 1."""
    if callable(order):
        order = order()
    if order is None or isinstance(order, Tensor):
        return order if order is None else order.clamp_min(LEAST_ORDER)
    if not 1 < order < math.inf:
        raise ValueError(
            f"the order of a score must be above 1 and finite, got {order}; 1 is cross-entropy, 2 is Brier"
        )
    return None if order == 2 else float(order)


def order_of(score: Callable[[Moments], Tensor]) -> Tensor | float | None:
    """The order that the score carries as its attribute ``order``: a number, a 0-d tensor, or a function that gives
    one; None for 2."""
    return check_order(getattr(score, "order", None))


def gradient_coefficients(s: Stats, partials: Partials, order=None, link: Link = PLAIN) -> Coefficients:
    """Coefficients of the row gradients, as derived at the head of this module. Those of tokens outside the loss may be
    infinite or NaN: ``gradient`` and token_fisher mask rows. The slope of a softcap is left to ``gradient``."""
    a = -partials.log_p if partials.log_p is not None else torch.zeros_like(s.r1)
    b = c = t = h = None
    if partials.r1 is not None:
        a = a + partials.r1 * s.p_y
    others = 0  # what c, b and t add to the sum of the off-target entries
    powers = [g for g in (partials.r2, partials.s) if g is not None]
    if powers:
        g, total = (2, s.r2) if order is None else (order, s.s)
        c = g * sum(powers)
        a, others = a - c * total, c * total
    if partials.mean_log_p is not None:
        b = partials.mean_log_p / s.support
        a = a - partials.mean_log_p
        others = others + (s.support - 1) * b
    if partials.tail_log_p is not None:
        t = partials.tail_log_p / s.support
        a = a - s.tail_count * t
        others = others + s.tail_off * t
    target = -(a * s.r1 + others)
    if partials.lse is not None:
        a, target = a + partials.lse, target + partials.lse * s.p_y
    if partials.entropy is not None:
        h = -partials.entropy
        a = a + h * s.entropy
        log_p = torch.where(s.p_y > 0, s.log_p, 0.0)
        target = target + h * s.p_y * (log_p + s.entropy)
    found = Coefficients(a, c, b, t, h, target)
    return found if link.scale == 1 else Coefficients(*(None if x is None else x * link.scale for x in found))


def token_fisher(moments: Moments, score: Callable[[Moments], Tensor]) -> Tensor:
    """|dL/dz|^2 per token, [N]: the squared norm of the score's gradient over the vocabulary, with respect to the
    logits of the softmax, those after scale and softcap.

    With the coefficients at the head of this module it follows from the moments: the square of the target's entry plus

        sum_{j != y} (p_j (a + c p_j^(g-1)) + b)^2
            = a^2 r2 + 2 a c r_(g+1) + c^2 r_(2g) + 2 b (a r1 + c s) + (n - 1) b^2

    Raises ValueError for a score that reads tail_log_p or the entropy with its gradient, which need sums beside the
    moments, and for one of another order than the moments."""
    order = order_of(score)
    same = order == moments.order if isinstance(order, float) and isinstance(moments.order, float) else True
    if not same or (order is None) != (moments.order is None):
        here, there = ("2" if x is None else str(float(x)) for x in (order, moments.order))
        raise ValueError(f"the score's order is {here} and the moments are of order {there}; ask for them with order=")
    _, partials = score_partials(moments, score)
    check_fisher(partials)
    m, zeros = moments, Stats(*torch.zeros_like(moments.r1).expand(len(Stats._fields), -1))
    support = m.support if m.support is not None else torch.full_like(m.r1, m.vocab_size)
    p_y = torch.where(m.valid, m.log_p.detach().exp(), 0.0)
    known = {name: getattr(m, name).detach() for name in ("r1", "r2", "r3", "r4", "s")} | dict(support=support, p_y=p_y)
    return torch.where(m.valid, fisher_of(zeros._replace(**known), partials, order), 0.0).detach()


def check_fisher(partials: Partials) -> None:
    """Raises ValueError where the Fisher does not follow from the moments."""
    for name, way in (("tail_log_p", "leave out tail smoothing"), ("entropy", "detach it, or ask for no Fisher")):
        if getattr(partials, name) is not None:
            raise ValueError(f"the Fisher is not defined for a score that reads {name}; {way}")


def fisher_of(s: Stats, partials: Partials, order=None) -> Tensor:
    """|dL/dz|^2 [N] as in ``token_fisher``; undefined for tokens outside the loss."""
    a, c, b, _, _, target = gradient_coefficients(s, partials, order)
    c, b = (torch.zeros_like(a) if x is None else x for x in (c, b))
    total = s.r2 if order is None else s.s
    off = a * a * s.r2 + 2 * a * c * s.r3 + c * c * s.r4 + 2 * b * (a * s.r1 + c * total) + (s.support - 1) * b * b
    return off + target * target


def score_partials(moments: Moments, score: Callable[[Moments], Tensor], tokens=None) -> tuple[Tensor, Partials]:
    """Loss per token [N], detached, and its partial derivatives at the moments. The score must treat tokens
    independently. Raises ValueError where it does not return [N], where it reads a moment with a gradient that has
    none, and, on CPU, where it is NaN at a token of probability 0; ``tokens``: the rows' numbers and targets, [N] each,
    for that message."""
    given = {n: getattr(moments, n) for n in (*Partials._fields, *WITHOUT_GRADIENT)}
    with torch.enable_grad():
        leaves = {n: x.detach().requires_grad_() for n, x in given.items() if x is not None}
        loss = score(Moments(**vars(moments) | leaves))
        if not isinstance(loss, Tensor) or loss.shape != moments.r1.shape:
            got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"a score must return one loss a token, shape {tuple(moments.r1.shape)}; got {got}")
        grads = dict.fromkeys(given)
        if loss.requires_grad:
            found = torch.autograd.grad(loss, list(leaves.values()), torch.ones_like(loss), allow_unused=True)
            grads |= zip(leaves, found, strict=True)
    check_gradients(grads, moments.order)
    check_limit(loss, moments, tokens)
    return loss.detach(), Partials(**{n: grads.get(n) for n in Partials._fields})


def check_limit(loss: Tensor, moments: Moments, tokens=None) -> None:
    """Raises ValueError, on CPU, where a score is NaN at p_y = 0. ``tokens`` as in ``score_partials``."""
    if not loss.is_cuda and bool((odd := loss.isnan() & (moments.log_p == -torch.inf)).any()):
        row = int(odd.nonzero()[0, 0])
        if tokens is not None:
            row = "{}, token {}".format(*(int(x[row]) for x in tokens))
        raise ValueError(f"the score is NaN at row {row}, where p_y = 0; give it a limit there")


def check_gradients(grads: dict[str, Tensor | None], order) -> None:
    """Raises ValueError where one of ``grads``, by the names of moments, is of a moment that has none."""
    for name in (*WITHOUT_GRADIENT, *(("r2",) if order is not None else ())):
        if grads.get(name) is not None:
            raise ValueError(no_gradient(name))


def no_gradient(name: str) -> str:
    """The message for a score that reads a moment with a gradient that there is not."""
    way = "write the score with m.s" if name == "r2" else f"read m.{name}.detach()"
    return f"the score reads {name} with a gradient, and it has none{' under an order' * (name == 'r2')}; {way}"


def as_moments(
    stats: Stats, correct: Tensor, valid: Tensor, vocab_size: int, tail: float, order=None, **more
) -> Moments:
    """The public view of ``stats``; ``more``: fields of Moments that are not among them."""
    values = {name: getattr(stats, name) for name in IN_BOTH if tail or name != "tail_log_p"}
    values |= dict(correct=correct, valid=valid, vocab_size=vocab_size, order=order)
    return Moments(**values | (dict(s=stats.r2) if order is None else {}) | more)


def new_stats(like: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Uninitialised buffers for ``tokens`` rows: stats [17, N] fp32 (fp64 for fp64), correct [N] bool."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    stats = torch.empty(len(Stats._fields), tokens, dtype=dtype, device=like.device)
    return stats, torch.empty(tokens, dtype=torch.bool, device=like.device)


def mask_stats(stats: Tensor, correct: Tensor, mask: Tensor | None, predicted: Tensor | None = None) -> None:
    """Zeroes the tokens outside the loss, in place."""
    if mask is not None:
        stats.masked_fill_(~mask, 0.0)
        correct.logical_and_(mask)
        if predicted is not None:
            predicted.masked_fill_(~mask, 0)
