"""The token losses of the field as functions of the Moments of one softmax row, DPSM's alpha, and ProperScoreLoss.

A score takes ``Moments`` (fp32 vectors [N], an entry a token) and returns the loss of each token, [N] fp32, lower is
better. Autograd gives its derivatives there, and the kernels turn them into the gradient over the vocabulary. A score
of your own is one line, for example CE plus spherical:

    loss, moments = linear_score(hidden, weight, targets, lambda m: ce(m) + spherical(m))

To give it a name, and so a ``--loss``, add it to SCORES. The scores that ``named`` marks are in triton_scores.py once
more, as parts of one kernel from logits to gradient. Any other runs through the moments, with the same result.

p = softmax(logits), y is the target, and r_k = sum_{j != y} p_j^k. r1 is 1 - p_y, without cancellation as p_y -> 1.

Each says whether it is proper. A loss is strictly proper if, for tokens drawn from any truth, its expectation is least
where p is the truth and nowhere else (Gneiting and Raftery, 2007). Where a weight is held constant in the gradient,
training ends where the expected gradient vanishes, not where the loss is least; those losses speak of both.

There is no Fenchel-Young loss here but CE (Blondel et al., 2020): each has its own map from logits to probabilities,
and only that of the Shannon entropy is softmax, of which the moments are. Entmax losses need another normaliser.
"""

import math
import sys
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .compiled import compilable
from .impl import check_reduction
from .logits import logits_score
from .moments import LEAST_ORDER, Moments, check_order, make_link

ALPHA_SCHEDULES = ("linear", "cosine", "fixed")
PATHS = ("mix", "order")  # from CE to a bounded score


def named(name: str, score: Callable[..., Tensor], knob: Tensor | float = 0.0) -> Callable[..., Tensor]:
    """``score`` itself, marked as ``name`` of triton_scores.py by its attribute ``fused``, (name, knob)."""
    score.fused = (name, knob)
    return compilable(score)


def ce(m: Moments) -> Tensor:
    """Cross-entropy, the logarithmic score: -log p_y, in nats (Good, 1952). Strictly proper."""
    return -m.log_p


def brier(m: Moments) -> Tensor:
    """Brier score sum_j (p_j - [j = y])^2 = sum p^2 - 2 p_y + 1, between 0 and 2 (Brier, 1950). Strictly proper."""
    return m.r1 * m.r1 + m.r2


def spherical(m: Moments) -> Tensor:
    """Spherical score as a loss, 1 - p_y / ||p||_2, between 0 and 1 (Good, 1971). Strictly proper. Written
    r2 / (n (n + p_y)) with n = ||p||_2, which does not cancel as p_y -> 1."""
    p = m.log_p.exp()
    norm = (p * p + m.r2).sqrt()
    return m.r2 / (norm * (norm + p))


for _score in (ce, brier, spherical):
    named(_score.__name__, _score)


def power(order: Tensor | float) -> Callable[..., Tensor]:
    """Power score of order g > 1, between CE and beyond Brier:

        (1 - p_y^(g-1)) / (g-1) - (1 - sum_j p_j^g) / g

    The density power divergence (Basu et al., 1998) and the score of Tsallis' entropy, up to a factor and a constant.
    Strictly proper for every g > 1: CE as g -> 1, half of the Brier score at g = 2; the larger g, the less a token that
    is nearly impossible counts. Between 0 and 1 / (g-1).

    ``order`` is a float, or a 0-d fp32 tensor on the device, which is read when the score is evaluated and counts as
    1 + 1e-6 where it is less. The score's attribute ``order`` tells the kernels which sum to take, Moments.s; at the
    float 2 there is none, and r2 is read. Raises ValueError for a float that is not finite and above 1."""
    if isinstance(order, Tensor):
        return compilable(_Power(lambda: order))
    if check_order(order) is None:
        return named("power", lambda m: 0.5 * brier(m), 2.0)
    order = max(float(order), LEAST_ORDER)
    score = named("power", lambda m: _power(m, order), order)
    score.order = order
    return score


class _Power:
    """``power`` at the order, a 0-d tensor, that ``read()`` gives; its attributes are those that ``named`` sets."""

    def __init__(self, read: Callable[[], Tensor]):
        self.read = read

    @property
    def order(self) -> Tensor:
        return self.read().clamp_min(LEAST_ORDER)

    @property
    def fused(self) -> tuple[str, Tensor]:
        return "power", self.order

    def __call__(self, m: Moments) -> Tensor:
        return _power(m, self.order)


def _power(m: Moments, order: Tensor | float) -> Tensor:
    if m.order is None:
        raise ValueError("the power score needs moments of its order; take them with linear_score, or with order=")
    return _TargetPart.apply(m.log_p, m.r1, order) + m.s / order


class _TargetPart(torch.autograd.Function):
    """f = (1 - p_y^(g-1)) / (g-1) - (1 - p_y^g) / g, what the target adds to the power score of order g.

    It is the integral of t (1-t)^(g-2) from 0 to r1. Near p_y = 1, where the two terms cancel, it is summed as the
    series sum_k c_k r1^(k+2) / (k+2), with c_0 = 1 and c_k = c_{k-1} (k+1-g) / k. The derivative at log p_y is
    -r1 p_y^(g-1), which stays finite as p_y -> 0; r1 gets none, as it is a function of log p_y."""

    @staticmethod
    def forward(ctx, log_p, r1, order):
        ctx.save_for_backward(-r1 * ((order - 1) * log_p).exp())
        term = r1 * r1
        series = term / 2
        for k in range(1, 13 if r1.dtype == torch.float32 else 27):  # 4^-13 and 4^-27 are below the rounding
            term = term * r1 * ((k + 1 - order) / k)
            series = series + term / (k + 2)
        direct = torch.expm1(order * log_p) / order - torch.expm1((order - 1) * log_p) / (order - 1)
        # A large order brings alternating signs: the series is for the p_y whose g-th power is not far from 1.
        return torch.where((r1 <= 0.25) & (r1 * order <= 1), series, direct)

    @staticmethod
    def backward(ctx, upstream):
        (slope,) = ctx.saved_tensors
        return upstream * slope, None, None


def dpsm(alpha: Tensor | float, path: str = "mix", order: float = 2.0) -> Callable[..., Tensor]:
    """Dynamic Proper-Score Mixing: from CE at alpha = 0 to a bounded score at alpha = 1, on one of two PATHS.

        mix:   (1 - alpha) * CE + alpha * Brier
        order:   the power score of order 1 + alpha * (order - 1), which ends at half of Brier with order 2

    Strictly proper for every alpha in [0, 1]. ``alpha`` is a float or a 0-d tensor on the device. The tensor is read
    when the score is evaluated: fill it in place to move the mixture, or the order. Raises ValueError for another path,
    and for an ``order`` that ``power`` does not take."""
    if path not in PATHS:
        raise ValueError(f"unknown path {path!r}; expected one of {', '.join(PATHS)}")
    if path == "mix":
        return named("dpsm", lambda m: (1 - alpha) * ce(m) + alpha * brier(m), alpha)
    end = power(order)  # a wrong order fails here
    if isinstance(alpha, Tensor):
        return compilable(_Power(lambda: 1 + alpha * (order - 1)))
    return end if alpha == 1 else power(max(1 + alpha * (order - 1), LEAST_ORDER))


def focal(gamma: float) -> Callable[..., Tensor]:
    """Focal loss (1 - p_y)^gamma * CE (Lin et al., 2017). Proper only at gamma = 0."""

    def score(m):
        # The floor keeps r1^(gamma - 1) finite for gamma < 1 where p_y rounds to 1.
        return m.r1.clamp_min(torch.finfo(torch.float32).tiny) ** gamma * ce(m)

    return named("focal", score, gamma)


def smoothing(eps: float) -> Callable[..., Tensor]:
    """Label smoothing: (1 - eps) * CE against y plus eps * CE against uniform (Szegedy et al., 2016). Improper on
    purpose: least at (1 - eps) times the truth plus eps / V. Proper only at eps = 0."""
    return named("smoothing", lambda m: (1 - eps) * ce(m) - eps * m.mean_log_p, eps)


def gce(q: float) -> Callable[..., Tensor]:
    """Generalised cross-entropy (1 - p_y^q) / q with q in (0, 1] (Zhang and Sabuncu, 2018), whose choice is 0.7.

    For wrong labels: bounded by 1 / q, and a token's gradient is p_y^q times CE's. Improper on purpose: least where
    p^(1-q) is proportional to the truth, so sharper than it; at q = 1, which is 1 - p_y, where the likeliest token has
    everything. CE as q -> 0. Raises ValueError for q outside (0, 1]."""
    if not 0 < q <= 1:
        raise ValueError(f"gce needs q in (0, 1], got {q}; use ce for q = 0")
    return named("gce", lambda m: _DeformedLog.apply(m.log_p, q), q)


class _DeformedLog(torch.autograd.Function):
    """(1 - p_y^a) / a. Autograd of expm1 would take p_y^a from a difference to 1, where it drowns as p_y -> 0."""

    @staticmethod
    def forward(ctx, log_p, a):
        ctx.save_for_backward(-(a * log_p).exp())
        return -torch.expm1(a * log_p) / a

    @staticmethod
    def backward(ctx, upstream):
        (slope,) = ctx.saved_tensors
        return upstream * slope, None


def _weighted_ce(m: Moments, weight: Tensor) -> Tensor:
    """weight * CE with the weight held constant in the gradient; 0 where it is 0, also where CE is infinite."""
    weight = weight.detach()
    return torch.where(weight == 0, 0.0, weight * ce(m))


def dft(m: Moments) -> Tensor:
    """Dynamic fine-tuning: p_y * CE, p_y held constant in the gradient (Wu et al., "On the Generalization of SFT",
    2025). For fine-tuning that follows the model's own likely tokens. Its gradient is that of 1 - p_y. Improper on
    purpose: training ends where the likeliest token has everything."""
    return _weighted_ce(m, m.log_p.exp())


def deft(m: Moments) -> Tensor:
    """Dynamic entropy fine-tuning: (1 - p_y^a) / a with a = sum_j p_j^2, held constant in the gradient (Wang et al.,
    "Gradients Must Earn Their Influence", 2026).

    a is exp of minus the Renyi entropy of order 2: where the model is unsure it is CE, where it is sure 1 - p_y. For
    fine-tuning a model that knows much already. Improper on purpose: sharper than the truth, as ``gce``. The authors'
    code adds 1e-6 to the divisor, which is left out here."""
    p = m.log_p.exp()
    return _DeformedLog.apply(m.log_p, (p * p + m.r2).detach())


def entropy_gated(m: Moments) -> Tensor:
    """CE times the entropy of the whole row over its maximum, H / log n of n possible tokens, held constant in the
    gradient. The idea of ``eaft`` without its selection of 20 tokens.

    For fine-tuning that spares what the model is sure of. The loss is improper: a sharp row lowers the weight. Its
    gradient is not: the weight is the same for every target, so the expected gradient is CE's times the weight, and
    vanishes at the truth, and beside that only where H = 0."""
    n = m.support if m.support is not None else torch.full_like(m.log_p, m.vocab_size)
    return _weighted_ce(m, torch.where(n > 1, m.entropy.clamp_min(0) / n.clamp_min(2).log(), 0.0))


def eaft(m: Moments) -> Tensor:
    """Entropy-adaptive fine-tuning: CE times H_20 / log 20, held constant in the gradient (Diao et al., 2026). H_20 is
    the entropy, in nats, of softmax over the 20 largest logits. The authors' code divides by 3.

    For fine-tuning without forgetting: a token that is unlikely in a row that is sure counts little. Propriety is that
    of ``entropy_gated``. Raises ValueError for moments without ``top_entropy``."""
    if m.top_entropy is None:
        raise ValueError("eaft needs Moments.top_entropy, the entropy of the 20 largest logits; or use entropy_gated")
    return _weighted_ce(m, m.top_entropy.clamp_min(0) / math.log(20))


def mile(gamma: float) -> Callable[..., Tensor]:
    """MiLe loss: (1 + H)^gamma * CE with the row's entropy H in nats, held constant in the gradient as in the authors'
    code (Su et al., 2024), who choose gamma = 1.

    For pre-training: tokens that are hard to foresee count more. The authors divide by the mean weight of the batch;
    here a token's loss is its own, and so larger than CE. Propriety is that of ``entropy_gated``, with a weight that is
    never 0: the expected gradient vanishes at the truth alone. CE at gamma = 0."""
    return named("mile", lambda m: _weighted_ce(m, (1 + m.entropy.clamp_min(0)) ** gamma), gamma)


def ce_above(threshold: float) -> Callable[..., Tensor]:
    """CE of the tokens with p_y >= threshold, 0 of the others (Li et al., "Beyond Log Likelihood", 2025). For
    fine-tuning a model that is right about most tokens, where the unlikely ones are noise. Improper on purpose: 0 where
    every probability is under the threshold. CE at 0. The default threshold is ours; we found none of the authors'.
    Raises ValueError for a threshold outside [0, 1]."""
    _check_threshold(threshold)
    return named("ce_above", lambda m: torch.where(m.log_p.exp() >= threshold, ce(m), 0.0), threshold)


def ce_below(threshold: float) -> Callable[..., Tensor]:
    """CE of the tokens with p_y <= threshold, 0 of the others: the other part of ``ce_above`` (Li et al., 2025). For
    learning what is not known yet. Improper on purpose: nothing pulls p_y on from the threshold. CE at 1. Raises
    ValueError for a threshold outside [0, 1]."""
    _check_threshold(threshold)
    return named("ce_below", lambda m: torch.where(m.log_p.exp() <= threshold, ce(m), 0.0), threshold)


def _check_threshold(threshold: float) -> None:
    if not 0 <= threshold <= 1:
        raise ValueError(f"the threshold is a probability in [0, 1], got {threshold}")


for _score in (dft, deft, entropy_gated):
    named(_score.__name__, _score)
eaft.topk = 20
compilable(eaft)


def tail_smoothed(base: str, eps: float) -> Callable[..., Tensor]:
    """Score smoothing with a logarithmic tail for ``base`` 'brier' or 'spherical'.

    (1 - eps) * S(p, y) + eps * mean_j S(p, j) - (eps / V) * sum_{j: p_j < eps / V} log p_j

    The last term pushes up tokens under the smoothed target eps / V, where bounded scores have almost no gradient; its
    mask is held constant in the gradient. Improper on purpose, as ``smoothing``. Needs moments taken with ``tail=eps``.
    From Shao et al., "Language Generation with Strictly Proper Scoring Rules", ICML 2024, section 4.3, as in the
    authors' code."""

    def score(m):
        if m.tail_log_p is None:
            raise ValueError(f"tail smoothing needs softmax_moments(..., tail={eps})")
        p = m.log_p.exp()
        norm2 = p * p + m.r2  # ||p||^2
        if base == "brier":
            target, uniform = brier(m), norm2 - 2 / m.vocab_size + 1
        else:
            target, uniform = spherical(m), 1 - norm2.rsqrt() / m.vocab_size
        # A token outside the loss has log_p = r1 = r2 = 0: its uniform part must be 0 as well.
        uniform = torch.where(m.valid, uniform, torch.zeros_like(uniform))
        return (1 - eps) * target + eps * uniform - eps * m.tail_log_p

    if base not in ("brier", "spherical"):
        raise ValueError(f"tail smoothing is defined for brier and spherical, not {base!r}")
    return compilable(score)


class Score(NamedTuple):
    make: Callable[..., Tensor | Callable[..., Tensor]]  # the score, or with knobs what makes it from them
    knobs: Mapping[str, float | str] = {}  # their names and defaults


SCORES = {
    "ce": Score(ce),
    "brier": Score(lambda tail: tail_smoothed("brier", tail) if tail else brier, {"tail": 0.0}),
    "spherical": Score(lambda tail: tail_smoothed("spherical", tail) if tail else spherical, {"tail": 0.0}),
    "power": Score(power, {"order": 1.5}),
    "dpsm": Score(dpsm, {"alpha": 1.0, "path": "mix", "order": 2.0}),
    "focal": Score(focal, {"gamma": 2.0}),
    "smoothing": Score(smoothing, {"eps": 0.1}),
    "gce": Score(gce, {"q": 0.7}),
    "dft": Score(dft),
    "deft": Score(deft),
    "entropy_gated": Score(entropy_gated),
    "eaft": Score(eaft),
    "mile": Score(mile, {"gamma": 1.0}),
    "ce_above": Score(ce_above, {"threshold": 0.1}),
    "ce_below": Score(ce_below, {"threshold": 0.1}),
}
LOSSES = tuple(SCORES)


def knobs_of(name: str) -> tuple[str, ...]:
    """The knobs that the named score reads, ("alpha",) for dpsm. Raises ValueError for an unknown name."""
    if name not in SCORES:
        raise ValueError(f"unknown loss {name!r}; expected one of {', '.join(SCORES)}")
    return tuple(SCORES[name].knobs)


def make_score(name: str, **knobs: Tensor | float | str | None) -> Callable[..., Tensor]:
    """The named score with its knobs. A missing one, or None, is its default in SCORES; one of another score is
    ignored. Raises ValueError for an unknown name, a knob that no score has or a value that this one does not take, and
    a tail for a score that has none."""
    reads = knobs_of(name)
    _check_knobs(knobs)
    if "tail" not in reads and knobs.get("tail"):
        raise ValueError(f"tail smoothing is defined for brier and spherical, not {name!r}")
    score, defaults = SCORES[name]
    if reads:
        given = {knob: value for knob, value in knobs.items() if knob in reads and value is not None}
        score = score(**(dict(defaults) | given))
    return score if hasattr(score, "number") else compilable(score)


def _check_knobs(knobs) -> None:
    known = dict.fromkeys(knob for score in SCORES.values() for knob in score.knobs)
    for knob in knobs:
        if knob not in known:
            raise ValueError(f"unknown knob {knob!r}; expected one of {', '.join(known)}")


def alpha_at(
    step: int, total: int, *, warmup: float = 0.1, schedule: str = "linear", alpha_max: float = 1.0, start: float = 0.0
) -> float:
    """DPSM's alpha before OPTIMIZER step ``step`` (0-based) of ``total``.

        alpha_max * ramp((step - start * total) / (warmup * total))

    The ramp is linear or half a cosine, clipped to [0, 1]; ``fixed`` is alpha_max at every step. ``warmup`` and
    ``start`` are fractions of ``total``; with warmup = 0 alpha jumps to alpha_max at ``start``."""
    if schedule not in ALPHA_SCHEDULES:
        raise ValueError(f"unknown alpha schedule {schedule!r}; expected one of {', '.join(ALPHA_SCHEDULES)}")
    if schedule == "fixed":
        return alpha_max
    since, length = step - start * total, warmup * total
    x = min(max(since / length, 0.0), 1.0) if length > 0 else float(since >= 0)
    return alpha_max * (x if schedule == "linear" else 0.5 * (1 - math.cos(math.pi * x)))


class ProperScoreLoss(nn.Module):
    """A score as a loss module, in the place of ``nn.CrossEntropyLoss``, and as HF Trainer's loss.

        loss_fn = ProperScoreLoss("dpsm", warmup=0.1)
        loss = loss_fn(logits, targets)                       # [..., V] and [...]
        Trainer(..., compute_loss_func=loss_fn.trainer_loss)  # causal=False for encoder-decoders

    ``score`` is a name of LOSSES with its ``knobs`` as in ``make_score``, or any function of the Moments. DPSM's alpha
    is a buffer, saved with the module: the number ``alpha``, by default 1, until ``set_step(step, total)``, before each
    optimizer step, moves it along the ramp of ``alpha_at`` (warmup, schedule, alpha_max, start; None is its default).
    ``trainer_loss`` takes the step from the Trainer, unless ``alpha`` is given or ``set_step`` was called. ``scale``,
    ``softcap`` and ``class_weights`` [V], a buffer, are as in ``linear_score``. ``causal``: ``trainer_loss`` shifts the
    labels by one token, as decoder-only models need it. Raises ValueError for an unknown name or knob, a knob out of
    place, and, when it is to train, for a ramp that was asked for and a step that nobody told."""

    def __init__(
        self,
        score: str | Callable[..., Tensor] = "dpsm",
        *,
        alpha: float | None = None,
        warmup: float | None = None,
        schedule: str | None = None,
        alpha_max: float | None = None,
        start: float | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        causal: bool = True,
        scale: float = 1.0,
        softcap: float | None = None,
        class_weights: Tensor | None = None,
        impl: str = "auto",
        **knobs: float | str | None,
    ):
        super().__init__()
        check_reduction(reduction)
        _check_knobs(knobs)
        self.tail = knobs.get("tail") or 0.0
        if self.tail and not isinstance(score, str):
            raise ValueError("tail is for a named score; build yours with losses.tail_smoothed")
        self.register_buffer("alpha", torch.tensor(1.0 if alpha is None else float(alpha)))
        self.register_buffer("class_weights", class_weights, persistent=False)
        self.scale, self.softcap = make_link(scale, softcap).scale, softcap
        self.given, self.knobs, self.built = score, knobs, (None, None)
        self.score()  # a wrong name fails here
        ramp = dict(warmup=warmup, schedule=schedule, alpha_max=alpha_max, start=start)
        self.ramp = {name: value for name, value in ramp.items() if value is not None}
        self.told = self.known = False  # whether set_step was called; whether alpha is that of a step
        self.follows = alpha is None and isinstance(score, str) and "alpha" in knobs_of(score)
        self.ignore_index, self.reduction, self.causal, self.impl = ignore_index, reduction, causal, impl
        self.moments: Moments | None = None  # of the last call, for diagnostics

    def score(self, device: torch.device | None = None) -> Callable[..., Tensor]:
        """The function of the Moments, reading this module's alpha; on another ``device`` as it is now."""
        if not isinstance(self.given, str):
            return self.given
        if device is not None and device != self.alpha.device:
            return make_score(self.given, alpha=self.alpha.to(device), **self.knobs)
        if self.built[0] != id(self.alpha):  # .to() and copy.deepcopy give the module another tensor
            self.built = id(self.alpha), make_score(self.given, alpha=self.alpha, **self.knobs)
        return self.built[1]

    def __getstate__(self):
        return self.__dict__ | {"built": (None, None), "moments": None}

    def set_step(self, step: int, total: int) -> float:
        """Sets alpha for optimizer step ``step`` (0-based) of ``total``, and returns it."""
        value = alpha_at(step, total, **self.ramp)
        self.alpha.fill_(value)
        self.told = self.known = True
        return value

    def check_step(self) -> None:
        """Raises ValueError where alpha is to follow a ramp and no step was told: it would stay at the ramp's end."""
        if self.follows and self.ramp and not self.known:
            asked = ", ".join(f"{name}={value!r}" for name, value in self.ramp.items())
            raise ValueError(
                f"{asked}: alpha's step is not known; call set_step(step, total) before each optimizer step"
            )

    def forward(self, logits: Tensor, targets: Tensor, denominator: Tensor | None = None) -> Tensor:
        """logits [..., V], targets [...]: the loss, 0-d, or [...] with reduction "none"."""
        if logits.requires_grad and torch.is_grad_enabled():
            self.check_step()
        rows = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
        how = dict(ignore_index=self.ignore_index, reduction=self.reduction, tail=self.tail, impl=self.impl)
        how |= dict(scale=self.scale, softcap=self.softcap, class_weights=self.class_weights)
        loss, self.moments = logits_score(*rows, self.score(logits.device), denominator=denominator, **how)
        return loss.view_as(targets) if self.reduction == "none" else loss

    def trainer_loss(self, outputs, labels: Tensor, num_items_in_batch=None) -> Tensor:
        """For ``transformers.Trainer(compute_loss_func=...)``: outputs with ``logits`` [B, T, V], labels [B, T].

        The sum is divided by ``num_items_in_batch``, the tokens in the loss of a whole optimizer step (0: the loss is
        0). The Trainer counts labels before the shift: mask the first label of each row, which predicts nothing. Alpha
        is that of the calling Trainer's ``state``; raises ValueError where no caller has one and none was told."""
        if self.reduction != "mean":
            raise ValueError(f"trainer_loss divides by the number of tokens; got reduction={self.reduction!r}")
        if self.follows and not self.told:
            state = _state_of_caller()
            if state is None:
                what = "no transformers.Trainer calls trainer_loss, so alpha's step is not known"
                raise ValueError(f"{what}; call set_step(step, total) before each optimizer step, or give alpha")
            if state.max_steps > 0:  # 0 where a Trainer only evaluates
                self.alpha.fill_(alpha_at(state.global_step, state.max_steps, **self.ramp))
                self.known = True
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs.logits
        if self.causal:
            labels = nn.functional.pad(labels[..., 1:], (0, 1), value=self.ignore_index)
        if num_items_in_batch is not None:
            num_items_in_batch = torch.as_tensor(num_items_in_batch, device=logits.device).float()
            num_items_in_batch = torch.where(num_items_in_batch == 0, 1.0, num_items_in_batch)
        return self(logits, labels.to(logits.device), num_items_in_batch)


def _state_of_caller():
    """The ``state`` of the transformers.Trainer among the callers, who hands a loss no more than outputs and labels."""
    frame = sys._getframe(1)
    while frame:
        state = getattr(frame.f_locals.get("self"), "state", None)
        if hasattr(state, "global_step") and hasattr(state, "max_steps"):
            return state
        frame = frame.f_back
    return None
