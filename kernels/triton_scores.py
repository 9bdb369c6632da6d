"""The named scores inside score_kernel: each a function of one row's moments, on scalars.

    f(log_p, r1, r2, mean_log_p, p_y, entropy, n, knob) -> (loss, d/d log_p, d/d r1, d/d r2, d/d mean_log_p)

n is the number of logits above -inf. For a score with an order r2 is the sum of that order, and the knob the order.
losses.py has the same scores in PyTorch, and the sources of the formulas. A new one here is a function, its name in
FUSED_SCORES, and ``named("my_score", ...)`` around its PyTorch form; the tests hold the two together.
"""

import triton
import triton.language as tl


@triton.jit
def ce(log_p, r1, r2, mean_log_p, p_y, entropy, n, knob):
    return -log_p, -1.0, 0.0, 0.0, 0.0


@triton.jit
def brier(log_p, r1, r2, mean_log_p, p_y, entropy, n, knob):
    return r1 * r1 + r2, 0.0, 2.0 * r1, 1.0, 0.0


@triton.jit
def spherical(log_p, r1, r2, mean_log_p, p_y, entropy, n, knob):
    norm = tl.sqrt(p_y * p_y + r2)
    slope = p_y / (norm * norm * norm)
    return r2 / (norm * (norm + p_y)), -r2 * slope, 0.0, 0.5 * slope, 0.0


@triton.jit
def dpsm(log_p, r1, r2, mean_log_p, p_y, entropy, n, knob):
    mixed = (1.0 - knob) * -log_p + knob * (r1 * r1 + r2)
    return mixed, knob - 1.0, 2.0 * knob * r1, knob, 0.0


@triton.jit
def focal(log_p, r1, r2, mean_log_p, p_y, entropy, n, knob):
    floored = tl.maximum(r1, 1.1754943508222875e-38)
    power = tl.exp2(knob * tl.log2(floored))
    slope = tl.where(r1 >= floored, -knob * power / floored * log_p, 0.0)
    return -power * log_p, -power, slope, 0.0, 0.0


@triton.jit
def smoothing(log_p, r1, r2, mean_log_p, p_y, entropy, n, knob):
    return -(1.0 - knob) * log_p - knob * mean_log_p, knob - 1.0, 0.0, 0.0, -knob


FUSED_SCORES = {score.__name__: score for score in (ce, brier, spherical, dpsm, focal, smoothing)}
READS_MEAN = {"smoothing"}  # the scores with a derivative at mean_log_p
