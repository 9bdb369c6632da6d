"""The temperature that calibrates a model's next-token probabilities, fitted in a few passes over the data."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@torch.no_grad()
def temperature_sums(
    logits: Tensor, targets: Tensor, beta: float | Tensor, ignore_index: int = -100, chunk: int | None = None
) -> Tensor:
    """What one pass over the data tells `fit_temperature`, for logits times beta = 1 / T.

    logits [N, V] of any float dtype, targets [N] int64. Returns a float64 tensor [4] on their device, without a host
    synchronisation: the number of tokens, the sum of their NLL in nats, and its first and second derivative in beta.
    With p = softmax(beta z):

        NLL = logsumexp(beta z) - beta z_y,   d = E_p[z] - z_y,   d2 = Var_p[z] >= 0

    Rows are taken ``chunk`` at a time and computed in fp32 (float64 where the logits are): the memory beyond the logits
    is three times chunk x V. Masked logits (-inf) have probability 0."""
    if logits.ndim != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(f"expected logits [N, V] and targets [N], got {list(logits.shape)} and {list(targets.shape)}")
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    if chunk is None:  # about 64 MiB on an accelerator, where launches cost; 2 MiB on a CPU, which stays in cache
        chunk = max(1, (2**24 if logits.is_cuda else 2**19) // logits.shape[1])
    totals = torch.zeros(4, dtype=torch.float64, device=logits.device)
    for z, y in zip(logits.split(chunk), targets.split(chunk), strict=True):
        valid = y != ignore_index
        z = z.to(dtype)
        z = z - z.amax(1, keepdim=True)  # [n, V], at most 0
        z_y = z.gather(1, torch.where(valid, y, 0)[:, None]).squeeze(1)
        # A floor for -inf, which would give 0 * inf: exp(-1e4 beta) is 0 for any T below 90.
        z.clamp_min_(-1e4)
        p = (z * beta).exp_()
        total = p.sum(1)
        mean = (p * z).sum(1) / total
        variance = p.mul_(z.sub_(mean[:, None]).square_()).sum(1) / total
        rows = torch.stack([torch.ones_like(mean), total.log() - beta * z_y, mean - z_y, variance])
        totals += torch.where(valid, rows, 0.0).sum(1, dtype=torch.float64)
    return totals


@dataclass(frozen=True)
class TemperatureFit:
    temperature: float
    nll_before: float  # nats per token at T = 1
    nll_after: float  # nats per token at `temperature`; never above nll_before
    passes: int  # evaluations of `sums`, each a pass over the data
    at_bound: bool  # the NLL still falls beyond the bound at which the temperature stands
    converged: bool  # False when max_passes ran out first


def fit_temperature(
    sums: Callable[[float], Tensor],
    *,
    bounds: tuple[float, float] = (0.05, 20.0),
    tolerance: float = 1e-3,
    max_passes: int = 20,
) -> TemperatureFit:
    """The temperature T in ``bounds`` that minimises the NLL of softmax(logits / T) (Guo et al., 2017).

    ``sums(beta)`` returns `temperature_sums` of the whole set at beta = 1 / T, all-reduced by the caller where there
    are ranks. Newton's method in beta: there, not in log T, the NLL is convex (a sum of logsumexp(beta z) and linear
    terms), and nearly quadratic where logits spread like a Gaussian. T within 0.8..1.25 takes two to four passes. The
    sign of the slope brackets the minimum; a step that leaves the bracket is replaced by the bracket's geometric mean.
    The fit ends when the next step would move log T by less than ``tolerance``, with about tolerance^2 nats to gain.

    Returns the best value that was evaluated, T = 1 among them. Raises ValueError for bounds that exclude 1, for a set
    without tokens, and for an NLL that is not finite."""
    if not 0 < bounds[0] <= 1 <= bounds[1]:
        raise ValueError(f"temperature bounds {bounds} must be positive and hold 1, the uncalibrated temperature")
    lower, upper = 1 / bounds[1], 1 / bounds[0]
    left = right = None  # evaluated ends of the bracket: the slope is negative at left, positive at right
    beta, evaluated, converged, at_bound = 1.0, {}, False, False
    for _ in range(max_passes):
        count, nll, slope, curvature = sums(beta).tolist()
        if count == 0:
            raise ValueError("no tokens to fit a temperature on: every target is ignored")
        if not all(map(math.isfinite, (nll, slope, curvature))):
            raise ValueError(f"the NLL at temperature {1 / beta:.4g} is {nll / count}, expected a finite number")
        evaluated[beta] = nll / count
        at_bound = (slope > 0 and beta <= lower) or (slope < 0 and beta >= upper)
        if converged := at_bound or slope == 0:
            break
        left, right = (left, beta) if slope > 0 else (beta, right)
        newton = beta - slope / curvature if curvature > 0 else math.copysign(math.inf, -slope)
        proposal = min(max(newton, lower), upper)
        if left and right and not left < proposal < right:
            proposal = math.sqrt(left * right)
        if converged := abs(math.log(proposal / beta)) < tolerance and lower < proposal < upper:
            break
        beta = proposal
    best = min(evaluated, key=evaluated.get)  # of equals the first, T = 1
    return TemperatureFit(
        temperature=1 / best,
        nll_before=evaluated[1.0],
        nll_after=evaluated[best],
        passes=len(evaluated),
        at_bound=at_bound and best == beta,
        converged=converged,
    )
