"""Label smoothing towards any distribution over the vocabulary, such as the tokens' own frequencies, at the price of
two vectors a token: no logit is computed anew."""

import torch.nn.functional as F
from torch import Tensor


def prior_gap(
    hidden: Tensor, weight: Tensor, targets: Tensor, prior: Tensor, *, ignore_index: int = -100, denominator=None
) -> Tensor:
    """Mean over the tokens in the loss of z_y - sum_j q_j z_j, with logits z = hidden @ weight.T; 0-d fp32.

    A share u of it smooths the target of a score towards the prior q, because CE(q, p) = lse - sum_j q_j z_j and
    CE = lse - z_y:

        CE + u gap = (1 - u) CE + u CE(q, p)
        dpsm((1 - u) alpha) + u gap = (1 - u) dpsm(alpha) + u CE(q, p)

    So the score itself stays one kernel. Szegedy et al., 2016, section 7, with a prior u(k); Pereyra et al., 2017, with
    that of the unigram.

    hidden [N, D], weight [V, D], or with more rows that are no tokens', targets [N], prior [V], without gradient, which
    sums to 1. ``denominator``: 0-d, in the place of the number of tokens. The prior's product with
    ``weight`` is in its dtype, all else in fp32. Raises ValueError for a prior that is longer than the weight, or no
    vector."""
    if prior.dim() != 1 or len(prior) > len(weight):
        raise ValueError(f"the prior must be [V], with V at most {len(weight)} rows of weight; got {list(prior.shape)}")
    valid = targets != ignore_index
    at_target = F.embedding(targets.where(valid, 0), weight).float()
    at_prior = prior.detach().to(weight.device, weight.dtype) @ weight[: len(prior)]
    gaps = (hidden.float() * (at_target - at_prior.float())).sum(1)
    return gaps.where(valid, 0.0).sum() / (valid.sum().clamp_min(1) if denominator is None else denominator)
