"""The named scores inside score_kernel: each a function of one row's moments, on scalars.

    f(log_p, r1, r2, mean_log_p, p_y, entropy, n, knob) -> (loss, d/d log_p, d/d r1, d/d r2, d/d mean_log_p)

n is the number of logits above -inf; r2 is the sum of the score's order where it has one. losses.py has the same scores
in PyTorch, and the sources of the formulas. A new one here is a function, its name in FUSED_SCORES, and
``named("my_score", ...)`` around its PyTorch form; the tests hold the two together.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def one_minus_exp(x):
    """1 - exp(x) for x <= 0 to full relative precision: by its series, of which the first term left out is below 2e-9
    of the sum, down to -1/2."""
    series = 1.0 / 9
    for k in tl.static_range(7):
        series = (1.0 + x * series) / (8 - k)
    return tl.where(x > -0.5, -x * (1.0 + x * series), 1.0 - tl.exp2(x * LOG2E))


@triton.jit
def weighted_ce(weight, log_p):
    """weight * CE and its derivatives with the weight held constant; 0 where it is 0, also where CE is infinite."""
    return tl.where(weight == 0.0, 0.0, -weight * log_p), -weight, 0.0, 0.0, 0.0


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


@triton.jit
def power(log_p, r1, r2, mean_log_p, p_y, entropy, n, knob):
    # As losses._TargetPart.
    term = r1 * r1
    series = 0.5 * term
    for k in tl.static_range(1, 13):
        term *= r1 * ((k + 1.0 - knob) / k)
        series += term / (k + 2.0)
    direct = one_minus_exp((knob - 1.0) * log_p) / (knob - 1.0) - one_minus_exp(knob * log_p) / knob
    target = tl.where((r1 <= 0.25) & (r1 * knob <= 1.0), series, direct)
    return target + r2 / knob, -r1 * tl.exp2((knob - 1.0) * log_p * LOG2E), 0.0, 1.0 / knob, 0.0


@triton.jit
def gce(log_p, r1, r2, mean_log_p, p_y, entropy, n, knob):
    return one_minus_exp(knob * log_p) / knob, -tl.exp2(knob * log_p * LOG2E), 0.0, 0.0, 0.0


@triton.jit
def dft(log_p, r1, r2, mean_log_p, p_y, entropy, n, knob):
    return weighted_ce(p_y, log_p)


@triton.jit
def deft(log_p, r1, r2, mean_log_p, p_y, entropy, n, knob):
    a = p_y * p_y + r2
    return one_minus_exp(a * log_p) / a, -tl.exp2(a * log_p * LOG2E), 0.0, 0.0, 0.0


@triton.jit
def entropy_gated(log_p, r1, r2, mean_log_p, p_y, entropy, n, knob):
    most = tl.log2(tl.maximum(n, 2.0)) * LN2
    return weighted_ce(tl.where(n > 1.0, tl.maximum(entropy, 0.0) / most, 0.0), log_p)


@triton.jit
def mile(log_p, r1, r2, mean_log_p, p_y, entropy, n, knob):
    return weighted_ce(tl.exp2(knob * tl.log2(1.0 + tl.maximum(entropy, 0.0))), log_p)


@triton.jit
def ce_above(log_p, r1, r2, mean_log_p, p_y, entropy, n, knob):
    return weighted_ce(tl.where(p_y >= knob, 1.0, 0.0), log_p)


@triton.jit
def ce_below(log_p, r1, r2, mean_log_p, p_y, entropy, n, knob):
    return weighted_ce(tl.where(p_y <= knob, 1.0, 0.0), log_p)


_SCORES = (ce, brier, spherical, power, dpsm, focal, smoothing, gce, dft, deft, entropy_gated, mile, ce_above, ce_below)
FUSED_SCORES = {score.__name__: score for score in _SCORES}
READS_MEAN = {"smoothing"}  # the scores with a derivative at mean_log_p
