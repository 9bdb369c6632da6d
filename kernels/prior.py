"""Label smoothing towards any distribution over the vocabulary, such as the tokens' own frequencies, at the price of
two vectors a token: no logit is computed anew."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def prior_gap(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    prior: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    denominator=None,
) -> Tensor:
    """Mean over the tokens in the loss of z_y - sum_j q_j z_j, with logits z = hidden @ weight.T + bias; 0-d fp32.

    A share u of it smooths the target of a score towards the prior q, because CE(q, p) = lse - sum_j q_j z_j and
    CE = lse - z_y:

        CE + u gap = (1 - u) CE + u CE(q, p)
        dpsm((1 - u) alpha) + u gap = (1 - u) dpsm(alpha) + u CE(q, p)

    So the score itself stays one kernel. Szegedy et al., 2016, section 7, with a prior u(k); Pereyra et al., 2017, with
    that of the unigram.

    hidden [N, D], weight [V, D], or with more rows that are no tokens', bias with an entry for each row, or None,
    targets [N], prior [V], without gradient, which sums to 1. ``denominator``: 0-d, in the place of the number of
    tokens. The prior's product with ``weight`` is in its dtype, all else in fp32. A weight without gradient, as that of
    a frozen head, gets none. Raises ValueError for a prior that is longer than the weight, or no vector, and a bias
    that does not fit the weight."""
    if prior.dim() != 1 or len(prior) > len(weight):
        raise ValueError(f"the prior must be [V], with V at most {len(weight)} rows of weight; got {list(prior.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"the bias must be [{len(weight)}], as the rows of weight; got {list(bias.shape)}")
    valid = targets != ignore_index
    at = targets.where(valid, 0)
    at_target = F.embedding(at, weight).float()
    at_prior = prior.detach().to(weight.device, weight.dtype) @ weight[: len(prior)]
    gaps = (hidden.float() * (at_target - at_prior.float())).sum(1)
    if bias is not None:
        of_rows = bias.float()
        gaps = gaps + of_rows[at] - prior.detach().to(bias.device, torch.float32) @ of_rows[: len(prior)]
    return gaps.where(valid, 0.0).sum() / (valid.sum().clamp_min(1) if denominator is None else denominator)


class UnigramSmoothing:
    """A ``share`` of a loss that is CE against how often each token is a target, fixed or as far as over-confidence
    asks for it.

    ``limit``: the share, in [0, 1); 0 is off. With ``gain`` above 0 it is the most: the share begins at 0, and `follow`
    moves it by gain times (mean confidence - accuracy) of a held-out set. ``counts``: gives how often each token is a
    target in training, whole numbers [V]; called once, and where ``limit`` is 0 never. The prior is their add-one
    frequency, fp32 on ``device``."""

    def __init__(self, limit: float, gain: float, counts: Callable, device: torch.device | str = "cpu"):
        self.limit, self.gain = limit, gain
        self.share = 0.0 if gain else limit
        if limit:
            counts_V = torch.as_tensor(counts()).double() + 1
            self.prior = (counts_V / counts_V.sum()).float().to(device)

    def term(self, hidden: Tensor, weight: Tensor, targets: Tensor, **how) -> Tensor | float:
        """What the share adds to a loss, 0-d: share times `prior_gap`, whose arguments these are, its prior aside. A
        score that has CE in it is then what `prior_gap` says; DPSM's alpha is to be (1 - share) times its own."""
        return self.share * prior_gap(hidden, weight, targets, self.prior, **how) if self.share else 0.0

    def follow(self, numbers: dict) -> None:
        """After a validation, of which ``numbers`` has the mean confidence and the accuracy. Nothing moves without a
        gain, or where one of them is not finite."""
        gap = numbers["confidence"] - numbers["accuracy"]
        if self.gain and math.isfinite(gap):
            self.share = min(max(self.share + self.gain * gap, 0.0), self.limit)

    @property
    def shown(self) -> dict[str, float]:
        """Its entry of a log row; none where it is off."""
        return {"unigram": self.share} if self.limit else {}
