"""Softmax moments, scores over logits or a linear head without its logits, the Fisher of each token, calibration.

Beside them three layers of a decoder: RMSNorm with the residual's sum, rotary positions, SwiGLU.
"""

from ._huggingface import __getattr__  # what Hugging Face's package of this name offers
from .calibration import Calibration
from .compiled import compilable
from .head import linear_moments, linear_score, linear_sequence_log_p, linear_topk
from .layers import rms_norm, rope, swiglu
from .logits import logits_score
from .losses import (
    ALPHA_SCHEDULES,
    LOSSES,
    ProperScoreLoss,
    alpha_at,
    brier,
    ce,
    ce_above,
    ce_below,
    deft,
    dft,
    dpsm,
    eaft,
    entropy_gated,
    focal,
    gce,
    knobs_of,
    make_score,
    mile,
    power,
    smoothing,
    spherical,
    tail_smoothed,
)
from .moments import Moments, token_fisher
from .parallel import parallel_linear_score
from .prior import UnigramSmoothing, prior_gap
from .softmax import softmax_moments
from .topk import TopK, topk_log_probs
