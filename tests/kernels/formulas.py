"""Every loss and moment as its paper writes it, in float64, for the tests that hold the kernels against them."""

import math
from types import SimpleNamespace

import mpmath
import torch
import torch.nn.functional as F

from kernels import losses

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = ("torch", "triton")
VALUES = ("log_p", "r1", "r2", "mean_log_p", "r3", "r4", "entropy", "confidence")

EPS, GAMMA, ALPHA, TAIL, Q, MILE, THRESHOLD, ORDER = 0.1, 2.0, 0.3, 0.3, 0.7, 1.5, 0.05, 2.0
ORDERS = (1.000001, 1.1, 1.5, 2.0, 3.0)  # of the power score
TOP = 20


def literal(name, logits, targets, order=ORDER):
    """Each loss as its paper writes it, on the whole distribution."""
    V = logits.shape[-1]
    log_p = logits.log_softmax(-1)
    p, one_hot = log_p.exp(), F.one_hot(targets, V).to(logits.dtype)
    p_y, ce = (p * one_hot).sum(-1), -(log_p * one_hot).sum(-1)
    norm = p.square().sum(-1).sqrt()
    brier, spherical = (p - one_hot).square().sum(-1), 1 - p_y / norm
    concentration, entropy = p.square().sum(-1).detach(), -(p * log_p).sum(-1).detach()
    top = logits.detach().topk(min(TOP, V), -1).values.log_softmax(-1)
    top_entropy = -(top.exp() * top).sum(-1)
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
        "power": lambda: (p.pow(order).sum(-1) - 1) / order - (p_y ** (order - 1) - 1) / (order - 1),
        "gce": lambda: (1 - p_y**Q) / Q,
        "dft": lambda: p_y.detach() * ce,
        "deft": lambda: (1 - p_y**concentration) / concentration,
        "entropy_gated": lambda: entropy / math.log(V) * ce if V > 1 else 0 * ce,
        "eaft": lambda: top_entropy / math.log(TOP) * ce,
        "mile": lambda: (1 + entropy) ** MILE * ce,
        "ce_above": lambda: (p_y >= THRESHOLD) * ce,
        "ce_below": lambda: (p_y <= THRESHOLD) * ce,
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
    "power": losses.power(ORDER),
    "gce": losses.gce(Q),
    "dft": losses.dft,
    "deft": losses.deft,
    "entropy_gated": losses.entropy_gated,
    "mile": losses.mile(MILE),
    "ce_above": losses.ce_above(THRESHOLD),
    "ce_below": losses.ce_below(THRESHOLD),
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


def moments_of(logits, targets, order=None):
    """What a score reads, from the definitions, with a gradient to the logits [N, V]."""
    log_p, y = logits.log_softmax(-1), targets[:, None]
    p = log_p.exp()
    off = p.scatter(1, y, 0.0)
    r1 = off.sum(-1)
    top = logits.topk(min(TOP, logits.shape[1]), -1).values.log_softmax(-1)
    return SimpleNamespace(
        log_p=torch.where(r1 < 0.5, torch.log1p(-r1), log_p.gather(1, y)[:, 0]),
        r1=r1,
        r2=off.pow(2).sum(-1),
        s=None if order is None else off.pow(order).sum(-1),
        mean_log_p=log_p.mean(-1),
        entropy=-(p * log_p).sum(-1),
        top_entropy=-(top.exp() * top).sum(-1),
        support=torch.full_like(r1, logits.shape[1]).detach(),
        valid=torch.ones_like(targets, dtype=torch.bool),
        vocab_size=logits.shape[1],
    )


def power_cases(orders=ORDERS):
    """(order, moments, power score, its derivatives at log_p and at s) with 60 digits, p_y from 1 - 1e-26 to 1e-26; s
    is 0, as it would hide what the target adds."""
    with mpmath.workdps(60):
        for order in orders:
            g, rows = mpmath.mpf(order), []
            for tenth in range(-600, 601, 7):
                r1 = 1 / (1 + mpmath.exp(-mpmath.mpf(tenth) / 10))
                p = 1 - r1
                loss = (1 - p ** (g - 1)) / (g - 1) - (1 - p**g) / g
                rows.append([float(x) for x in (mpmath.log(p), r1, 0, loss, -r1 * p ** (g - 1), 1 / g)])
            log_p, r1, s, *want = torch.tensor(rows, dtype=torch.float64, device=DEVICE).unbind(1)
            yield order, SimpleNamespace(log_p=log_p, r1=r1, s=s), want


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
