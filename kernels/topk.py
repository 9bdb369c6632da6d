"""The k most likely tokens of each row: log-probabilities, ids, and the entropy of the distribution over these k alone.

Ties take the smaller id. Both implementations order entries by one integer each, the logit's bits above, V - 1 - id
below; logits of one value differ in the lower part only. Nothing here has a gradient.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import torch_impl
from .impl import check_logits, choose_impl
from .moments import Link, make_link

TRITON_MOST = 64  # entries that a program of the kernel keeps


class TopK(NamedTuple):
    log_p: Tensor  # [N, k] fp32 (fp64 for fp64 logits), descending; nats, of the whole distribution
    ids: Tensor  # [N, k] int64
    entropy: Tensor  # [N], in nats, of the k probabilities divided by their sum: between 0 and log k


@torch.no_grad()
def topk_log_probs(
    logits: Tensor,
    k: int,
    *,
    lse: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    impl: str = "auto",
) -> TopK:
    """The k most likely tokens of softmax(logits), [N, k] each, and the entropy over them [N], without gradient.

    logits [N, V] fp32, bf16 or fp16 (fp64: torch only); rows may be strided, logits that are not contiguous along V are
    copied. The distribution is softmax(softcap * tanh(scale * z / softcap)), without softcap softmax(scale * z); scale
    must be positive. ``lse`` [N]: its logsumexp where it is known. Rows where ``mask`` [N] is False are 0 everywhere.

    Of equal logits the smaller id comes first. A logit of -inf is outside the vocabulary: its log_p is -inf, and it has
    no part in the entropy. The entropy over k = 20 is what Entropy-Adaptive Fine-Tuning weighs tokens by, as a fraction
    of log k (Diao et al., 2026). ``impl`` as in ``softmax_moments``; the Triton kernel takes k up to 64, "auto" uses
    torch above. Raises ValueError for arguments that do not fit together."""
    module = choose_impl(impl, logits)
    check_logits(logits, module)
    n, vocab = logits.shape
    link, module = make_link(scale, softcap), check_top(k, vocab, impl, module)
    for name, x in (("lse", lse), ("mask", mask)):
        if x is not None and x.shape != (n,):
            raise ValueError(f"{name} must be [N], one a row of logits, {n}; got {tuple(x.shape)}")
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool, got {mask.dtype}; compare the targets with ignore_index")
    out = new_top(logits, n, k)
    fill_top(logits, lse, mask, link, out, module)
    return out


def check_top(k: int, vocab: int, impl: str, module):
    """The module that computes the k most likely, ``module`` or torch_impl. Raises ValueError as ``topk_log_probs``."""
    if not 1 <= k <= vocab:
        raise ValueError(f"k must be between 1 and the number of logits, {vocab}; got {k}")
    if impl == "triton" and k > TRITON_MOST:
        raise ValueError(f"the Triton kernel takes k up to {TRITON_MOST}, got {k}; use impl='torch'")
    return torch_impl if k > TRITON_MOST else module


def topk_of(score, topk: int, vocab: int) -> int:
    """How many of the likeliest tokens are to be kept: ``topk``, or what the score's attribute ``topk`` asks for, all
    where the vocabulary has fewer. Raises ValueError where both ask and differ."""
    wanted = min(getattr(score, "topk", 0), vocab)
    if topk and wanted and topk != wanted:
        raise ValueError(f"the score reads the {wanted} likeliest tokens, and topk={topk}; leave topk out")
    return topk or wanted


def with_top(top: TopK | None, lse: Tensor) -> dict:
    """The fields of Moments that ``top`` has, of which log_p was taken with an lse of 0."""
    if top is None:
        return {}
    return dict(top_log_p=top.log_p - lse[:, None], top_ids=top.ids, top_entropy=top.entropy)


def new_top(like: Tensor, tokens: int, k: int) -> TopK:
    """Uninitialised buffers for ``tokens`` rows."""
    wide = dict(dtype=torch.float64 if like.dtype == torch.float64 else torch.float32, device=like.device)
    ids = torch.empty(tokens, k, dtype=torch.int64, device=like.device)
    return TopK(torch.empty(tokens, k, **wide), ids, torch.empty(tokens, **wide))


def fill_top(logits, lse, mask, link: Link, out: TopK, module) -> None:
    """Fills ``out`` from a chunk's logits, which stay as they are. ``module`` is of ``check_top``."""
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    if module is not torch_impl:
        from .triton_topk import fill  # Triton is optional

        return fill(logits, lse, mask, link, out)
    size = torch_impl._group_size(logits)
    for start in range(0, len(logits), size):
        rows = slice(start, start + size)
        z = logits[rows].to(out.log_p.dtype)
        ids = _first_ids(z, out.ids.shape[1])
        top = link.apply_(z.gather(1, ids))
        # H = -sum q log q with q = e^t / S, t = z - max z: log S - sum e^t t / S, two terms of one sign.
        t = top - top[:, :1]
        e = t.exp()
        others = e[:, 1:].sum(1)
        out.entropy[rows] = others.log1p() - torch.where(e > 0, e * t, e).sum(1) / (1 + others)
        whole = link.apply_(z.clone()).logsumexp(1) if lse is None else lse[rows]
        out.log_p[rows], out.ids[rows] = top - whole[:, None], ids
    if mask is not None:
        for x in out:
            x.masked_fill_(~mask.view(-1, *[1] * (x.dim() - 1)), 0)


def _first_ids(z: Tensor, k: int) -> Tensor:
    """[n, k]: the places of the k largest of each row, of equal ones the first. torch.topk promises neither which of
    equal values it takes nor their order: on CPU what it took is put in order, and a row whose k-th and next are equal
    is done again. On CUDA that would be a wait, so that every row goes the slower way."""
    if z.is_cuda:
        return _first_ids_of_ties(z, k)
    values, ids = z.topk(min(k + 1, z.shape[1]))
    tied = (values[:, k] == values[:, k - 1]).nonzero()[:, 0] if values.shape[1] > k else []
    ids, order = ids[:, :k].sort(1)
    ids = ids.gather(1, values.gather(1, order).sort(dim=1, descending=True, stable=True).indices)
    if len(tied):
        ids[tied] = _first_ids_of_ties(z[tied], k)
    return ids


def _first_ids_of_ties(z: Tensor, k: int) -> Tensor:
    """The same for any row, from integers without ties; fp64 does not fit into them."""
    if z.dtype == torch.float64:
        return z.sort(dim=1, descending=True, stable=True).indices[:, :k]
    bits = (z + 0.0).view(torch.int32)  # + 0.0: the bits of -0.0 are those of 0.0 then
    bits ^= (bits >> 31).bitwise_and_(0x7FFFFFFF)  # as integers in the order of the floats
    last = z.shape[1] - 1
    keys = bits.long().bitwise_left_shift_(32).bitwise_or_(torch.arange(last, -1, -1, device=z.device))
    return last - (keys.topk(k).values & 0xFFFFFFFF)
