"""Softmax moments, scores over logits or over a linear head without its logits, and the Fisher of each token."""

from kernels.compiled import compilable
from kernels.head import linear_moments, linear_score
from kernels.logits import ProperScoreLoss, logits_score
from kernels.moments import Moments, softmax_moments, token_fisher
from kernels.parallel import parallel_linear_score

from ._huggingface import __getattr__  # what Hugging Face's package of this name offers

__all__ = [
    "Moments",
    "ProperScoreLoss",
    "compilable",
    "linear_moments",
    "linear_score",
    "logits_score",
    "parallel_linear_score",
    "softmax_moments",
    "token_fisher",
]
