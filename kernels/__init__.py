"""Softmax moments, scores over logits or over a linear head without its logits, and the Fisher of each token."""

from .compiled import compilable
from .head import linear_moments, linear_score
from .logits import logits_score
from .losses import (
    ALPHA_SCHEDULES,
    LOSSES,
    ProperScoreLoss,
    alpha_at,
    brier,
    ce,
    dpsm,
    focal,
    knobs_of,
    make_score,
    smoothing,
    spherical,
    tail_smoothed,
)
from .moments import Moments, token_fisher
from .parallel import parallel_linear_score
from .softmax import softmax_moments

__all__ = [
    "ALPHA_SCHEDULES",
    "LOSSES",
    "Moments",
    "ProperScoreLoss",
    "alpha_at",
    "brier",
    "ce",
    "compilable",
    "dpsm",
    "focal",
    "knobs_of",
    "linear_moments",
    "linear_score",
    "logits_score",
    "make_score",
    "parallel_linear_score",
    "smoothing",
    "softmax_moments",
    "spherical",
    "tail_smoothed",
    "token_fisher",
]
