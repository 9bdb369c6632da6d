"""Softmax moments, scores over a linear head without its logits, and the Fisher of each token."""

from kernels.linear import linear_moments, linear_score
from kernels.moments import Moments, softmax_moments, token_fisher

__all__ = ["Moments", "linear_moments", "linear_score", "softmax_moments", "token_fisher"]
