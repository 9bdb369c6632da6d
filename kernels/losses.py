"""Proper scoring rules as functions of the Moments of one softmax row, DPSM's alpha schedule, and ProperScoreLoss.

A score takes ``Moments`` (fp32 vectors [N], an entry a token) and returns the loss of each token, [N] fp32, lower is
better. Autograd gives its derivatives there, and the kernels turn them into the gradient over the vocabulary. A score
of your own is one line, for example CE plus spherical:

    loss, moments = linear_score(hidden, weight, targets, lambda m: ce(m) + spherical(m))

To give it a name, and so a ``--loss``, add it to SCORES. The scores that ``named`` marks are in triton_scores.py once
more, as parts of one kernel from logits to gradient. Any other runs through the moments, with the same result.

p = softmax(logits), y is the target, and r_k = sum_{j != y} p_j^k. r1 is 1 - p_y, without cancellation as p_y -> 1.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .compiled import compilable
from .impl import check_reduction
from .logits import logits_score
from .moments import Moments, make_link

ALPHA_SCHEDULES = ("linear", "cosine", "fixed")


def named(name: str, score: Callable[..., Tensor], knob: Tensor | float = 0.0) -> Callable[..., Tensor]:
    """``score`` itself, marked as ``name`` of triton_scores.py by its attribute ``fused``, (name, knob)."""
    score.fused = (name, knob)
    return compilable(score)


def ce(m: Moments) -> Tensor:
    """Cross-entropy, the logarithmic score: -log p_y, in nats."""
    return -m.log_p


def brier(m: Moments) -> Tensor:
    """Brier score sum_j (p_j - [j = y])^2 = sum p^2 - 2 p_y + 1, between 0 and 2 (Brier, 1950)."""
    return m.r1 * m.r1 + m.r2


def spherical(m: Moments) -> Tensor:
    """Spherical score as a loss, 1 - p_y / ||p||_2, between 0 and 1 (Good, 1971). Written r2 / (n (n + p_y)) with
    n = ||p||_2, which does not cancel as p_y -> 1."""
    p = m.log_p.exp()
    norm = (p * p + m.r2).sqrt()
    return m.r2 / (norm * (norm + p))


for _score in (ce, brier, spherical):
    named(_score.__name__, _score)


def focal(gamma: float) -> Callable[..., Tensor]:
    """Focal loss (1 - p_y)^gamma * CE (Lin et al., 2017). Proper only at gamma = 0."""

    def score(m):
        # The floor keeps r1^(gamma - 1) finite for gamma < 1 where p_y rounds to 1.
        return m.r1.clamp_min(torch.finfo(torch.float32).tiny) ** gamma * ce(m)

    return named("focal", score, gamma)


def smoothing(eps: float) -> Callable[..., Tensor]:
    """Label smoothing: (1 - eps) * CE against y plus eps * CE against uniform (Szegedy et al., 2016)."""
    return named("smoothing", lambda m: (1 - eps) * ce(m) - eps * m.mean_log_p, eps)


def dpsm(alpha: Tensor | float) -> Callable[..., Tensor]:
    """Dynamic Proper-Score Mixing: (1 - alpha) * CE + alpha * Brier.

    Proper for every alpha in [0, 1]. ``alpha`` is a float or a 0-d tensor on the device. The tensor is read when the
    score is evaluated: fill it in place to move the mixture."""
    return named("dpsm", lambda m: (1 - alpha) * ce(m) + alpha * brier(m), alpha)


def tail_smoothed(base: str, eps: float) -> Callable[..., Tensor]:
    """Score smoothing with a logarithmic tail for ``base`` 'brier' or 'spherical'.

    (1 - eps) * S(p, y) + eps * mean_j S(p, j) - (eps / V) * sum_{j: p_j < eps / V} log p_j

    The last term pushes up tokens under the smoothed target eps / V, where bounded scores have almost no gradient; its
    mask is held constant in the gradient. Needs moments taken with ``tail=eps``. From Shao et al., "Language Generation
    with Strictly Proper Scoring Rules", ICML 2024, section 4.3, as in the authors' code."""

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
    knobs: Mapping[str, float] = {}  # their names and defaults


SCORES = {
    "ce": Score(ce),
    "brier": Score(lambda tail: tail_smoothed("brier", tail) if tail else brier, {"tail": 0.0}),
    "spherical": Score(lambda tail: tail_smoothed("spherical", tail) if tail else spherical, {"tail": 0.0}),
    "dpsm": Score(dpsm, {"alpha": 1.0}),
    "focal": Score(focal, {"gamma": 2.0}),
    "smoothing": Score(smoothing, {"eps": 0.1}),
}
LOSSES = tuple(SCORES)


def knobs_of(name: str) -> tuple[str, ...]:
    """The knobs that the named score reads, ("alpha",) for dpsm. Raises ValueError for an unknown name."""
    if name not in SCORES:
        raise ValueError(f"unknown loss {name!r}; expected one of {', '.join(SCORES)}")
    return tuple(SCORES[name].knobs)


def make_score(name: str, **knobs: Tensor | float) -> Callable[..., Tensor]:
    """The named score with its knobs. A missing one has its default in SCORES, one of another score is ignored. Raises
    ValueError for an unknown name, a knob that no score has, and a tail for a score that has none."""
    reads = knobs_of(name)
    _check_knobs(knobs)
    if "tail" not in reads and knobs.get("tail"):
        raise ValueError(f"tail smoothing is defined for brier and spherical, not {name!r}")
    score, defaults = SCORES[name]
    if reads:
        score = score(**{knob: knobs.get(knob, default) for knob, default in defaults.items()})
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
    is a buffer, saved with the module. ``set_step(step, total)`` before each optimizer step moves it along the ramp of
    ``alpha_at`` (warmup, schedule, alpha_max, start). ``scale``, ``softcap`` and ``class_weights`` [V], a buffer, are
    as in ``linear_score``. ``causal``: ``trainer_loss`` shifts the labels by one token, as decoder-only models need it.
    Raises ValueError for an unknown name or knob, or a knob out of place."""

    def __init__(
        self,
        score: str | Callable[..., Tensor] = "dpsm",
        *,
        alpha: float = 1.0,
        warmup: float = 0.1,
        schedule: str = "linear",
        alpha_max: float = 1.0,
        start: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "mean",
        causal: bool = True,
        scale: float = 1.0,
        softcap: float | None = None,
        class_weights: Tensor | None = None,
        impl: str = "auto",
        **knobs: float,
    ):
        super().__init__()
        check_reduction(reduction)
        _check_knobs(knobs)
        self.tail = knobs.get("tail", 0.0)
        if self.tail and not isinstance(score, str):
            raise ValueError("tail is for a named score; build yours with losses.tail_smoothed")
        self.register_buffer("alpha", torch.tensor(float(alpha)))
        self.register_buffer("class_weights", class_weights, persistent=False)
        self.scale, self.softcap = make_link(scale, softcap).scale, softcap
        self.given, self.knobs, self.built = score, knobs, (None, None)
        self.score()  # a wrong name fails here
        self.ramp = dict(warmup=warmup, schedule=schedule, alpha_max=alpha_max, start=start)
        self.ignore_index, self.reduction, self.causal, self.impl = ignore_index, reduction, causal, impl
        self.moments: Moments | None = None  # of the last call, for diagnostics

    def score(self) -> Callable[..., Tensor]:
        """The function of the Moments, reading this module's alpha."""
        if not isinstance(self.given, str):
            return self.given
        if self.built[0] != id(self.alpha):  # .to() and copy.deepcopy give the module another tensor
            self.built = id(self.alpha), make_score(self.given, alpha=self.alpha, **self.knobs)
        return self.built[1]

    def __getstate__(self):
        return self.__dict__ | {"built": (None, None), "moments": None}

    def set_step(self, step: int, total: int) -> float:
        """Sets alpha for optimizer step ``step`` (0-based) of ``total``, and returns it."""
        value = alpha_at(step, total, **self.ramp)
        self.alpha.fill_(value)
        return value

    def forward(self, logits: Tensor, targets: Tensor, denominator: Tensor | None = None) -> Tensor:
        """logits [..., V], targets [...]: the loss, 0-d, or [...] with reduction "none"."""
        rows = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
        how = dict(ignore_index=self.ignore_index, reduction=self.reduction, tail=self.tail, impl=self.impl)
        how |= dict(scale=self.scale, softcap=self.softcap, class_weights=self.class_weights)
        loss, self.moments = logits_score(*rows, self.score(), denominator=denominator, **how)
        return loss.view_as(targets) if self.reduction == "none" else loss

    def trainer_loss(self, outputs, labels: Tensor, num_items_in_batch=None) -> Tensor:
        """For ``transformers.Trainer(compute_loss_func=...)``: outputs with ``logits`` [B, T, V], labels [B, T].

        The sum is divided by ``num_items_in_batch``, the tokens in the loss of a whole optimizer step. The Trainer
        counts labels before the shift: mask the first label of each row, which predicts nothing."""
        if self.reduction != "mean":
            raise ValueError(f"trainer_loss divides by the number of tokens; got reduction={self.reduction!r}")
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs.logits
        if self.causal:
            labels = nn.functional.pad(labels[..., 1:], (0, 1), value=self.ignore_index)
        if num_items_in_batch is not None:
            num_items_in_batch = torch.as_tensor(num_items_in_batch, device=logits.device).float()
        return self(logits, labels.to(logits.device), num_items_in_batch)
