"""Calibration of next-token probabilities: streaming sums and reliability bins.

Confidence is the largest probability of a token's softmax. A token is correct when that class is the target (top-label
calibration, Guo et al., "On Calibration of Modern Neural Networks", ICML 2017). Every metric is made of sums over
tokens, so `Calibration` keeps O(bins) numbers on the device and reads them back only in `compute`.

What to know before two values of ECE are compared:

- ECE is biased upwards. A perfectly calibrated model shows up to sqrt(2 B v / (pi n)) at n tokens in B bins, v the mean
  of c (1 - c) over the confidences: 0.011 for n = 8192, B = 10, v = 0.15. A training window shows this floor; a
  validation set of a million tokens hardly does.
- Bins are (lo, hi]. Confidences are fp32, and so are the edges they are compared with: fp32(k / 3000) lies ON the edge
  k / 3000 and belongs to the bin below it, the next fp32 number to the bin above.
"""

import math

import torch
from torch import Tensor
from torch import distributed as dist

from .losses import brier, ce, spherical

BASE_BINS = 3000
MEANS = ("nll", "brier", "spherical", "entropy")
BINNED = ("count", "confidence_sum", "correct_sum")  # sums of a bin each
SUMS = (*BINNED, "sums")


class Calibration:
    """Streaming calibration and proper scores of a stream of `kernels.Moments`.

    The sums live in 3000 base bins (k/3000, (k+1)/3000] of confidence, 0 in the first and 1 in the last: tokens and
    correct tokens as int64, the confidence as float64. Every number of equal-width bins that divides 3000 (10, 15,
    100, 300 ...) is an exact merge of base bins. Equal-mass bins merge them too: their edges are the sample's quantiles
    moved to the base grid, by less than 1/3000 each, and the error of the partition so defined is exact. A base bin is
    never split: equal confidences stay together, and the order of the tokens cannot matter. Where one base bin holds
    more than its share, fewer bins are left.

    With several ranks: update() on each, all_reduce() once, compute(), reset()."""

    def __init__(self, device: torch.device | str = "cpu", base_bins: int = BASE_BINS):
        self.count = torch.zeros(base_bins, dtype=torch.int64, device=device)
        self.correct_sum = torch.zeros_like(self.count)
        self.confidence_sum = torch.zeros_like(self.count, dtype=torch.float64)
        self.sums = torch.zeros(len(MEANS), dtype=torch.float64, device=device)  # of MEANS, over tokens
        lower = (torch.arange(base_bins, dtype=torch.float64) / base_bins).float()
        lower[0] = -math.inf  # a confidence of 0 stays in the first bin
        self._lower = lower.to(device)
        self._reduced = False

    @torch.no_grad()
    def update(self, moments) -> None:
        """Add the valid tokens of ``moments`` ([N] each), without a synchronisation. ValueError after all_reduce()."""
        if self._reduced:
            raise ValueError("update() after all_reduce() would count tokens twice; call reset() first")
        n, valid, confidence = len(self.count), moments.valid, moments.confidence.float()
        # fp32 times n is exact in float64: this is the bin [k/n, (k+1)/n). The lower edge itself, as fp32 has
        # it, belongs to the bin below. Clamped as integers, so that nan cannot index out of bounds.
        index = (confidence.double() * n).long().clamp_(0, n - 1)
        index -= (confidence <= self._lower[index]).long()
        rows = torch.stack([confidence, ce(moments), brier(moments), spherical(moments), moments.entropy])
        rows = torch.where(valid, rows, 0.0).double()  # [5, N]; where, not a product: 0 * nan is nan
        self.count.index_add_(0, index, valid.long())
        self.correct_sum.index_add_(0, index, (moments.correct & valid).long())
        self.confidence_sum.index_add_(0, index, rows[0])
        self.sums += rows[1:].sum(1)

    def all_reduce(self) -> None:
        """Sum over the ranks of the default process group, if any. Raises ValueError if called again before reset()."""
        if self._reduced:
            raise ValueError("all_reduce() was already called; reset() before counting again")
        self._reduced = True
        if dist.is_available() and dist.is_initialized():
            packed = self._packed()
            dist.all_reduce(packed)
            self._unpack(packed)

    def _packed(self) -> Tensor:
        """All sums in one float64 vector, which holds counts exactly to 2^53."""
        return torch.cat([part.double() for part in self._parts()])

    def _unpack(self, packed: Tensor) -> None:
        """The inverse of `_packed`, in place."""
        for part, total in zip(self._parts(), packed.split([len(part) for part in self._parts()]), strict=True):
            part.copy_(total)

    def _parts(self) -> list[Tensor]:
        return [getattr(self, name) for name in SUMS]

    def reset(self) -> None:
        for part in self._parts():
            part.zero_()
        self._reduced = False

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of this rank's sums; later updates leave it alone."""
        return {name: part.clone() for name, part in zip(SUMS, self._parts(), strict=True)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Replace the sums. Raises ValueError if the number of bins differs."""
        if len(state["count"]) != len(self.count):
            raise ValueError(f"state has {len(state['count'])} base bins, expected {len(self.count)}")
        for name, value in state.items():
            getattr(self, name).copy_(value)
        self._reduced = False

    def compute(self) -> dict[str, float]:
        """Every metric, as Python numbers; one synchronisation.

        nll and entropy in nats per token, ppl = exp(nll) per token of the tokenizer in use, brier
        sum p^2 - 2 p_y + 1 in 0..2, spherical 1 - p_y / ||p|| in 0..1, accuracy and confidence (the mean of max p) in
        0..1, ece10 / ece15 / ece100 over equal-width and ece10_mass / ece100_mass over equal-mass bins. After
        `from_bins` the four scores and ppl are nan: bins do not hold them. Raises ValueError when no token was counted.
        """
        host = self._host()
        tokens = host._tokens()
        out = {"tokens": tokens} | {k: v / tokens for k, v in zip(MEANS, host.sums.tolist(), strict=True)}
        out["ppl"] = math.exp(out["nll"]) if not out["nll"] > 709 else math.inf  # exp overflows above 709.8
        out["accuracy"] = host.correct_sum.sum().item() / tokens
        out["confidence"] = host.confidence_sum.sum().item() / tokens
        out |= {f"ece{bins}": host.ece(bins) for bins in (10, 15, 100)}
        return out | {f"ece{bins}_mass": host.ece(bins, mass=True) for bins in (10, 100)}

    def ece(self, bins: int, *, mass: bool = False) -> float:
        """Expected calibration error: sum_b n_b/n |accuracy_b - confidence_b| (Naeini et al., AAAI 2015).

        ``bins`` of equal width, or with ``mass`` of (nearly) equal numbers of tokens, the adaptive bins of Nguyen &
        O'Connor (EMNLP 2015). Raises ValueError when no token was counted or when equal-width ``bins`` do not divide
        the base bins."""
        host = self._host()
        tokens = host._tokens()
        _, confidence, correct = host._merged(bins, mass)
        return (confidence - correct).abs().sum().item() / tokens

    def reliability(self, bins: int = 10) -> dict[str, list]:
        """The reliability diagram: lists lo, hi, count, confidence and accuracy of each equal-width bin.

        Means are None where a bin is empty. Raises ValueError when ``bins`` does not divide the base bins."""
        count, confidence, correct = self.bins(bins).values()
        return {
            "lo": [k / bins for k in range(bins)],
            "hi": [(k + 1) / bins for k in range(bins)],
            "count": count,
            "confidence": [c / n if n else None for c, n in zip(confidence, count, strict=True)],
            "accuracy": [y / n if n else None for y, n in zip(correct, count, strict=True)],
        }

    def bins(self, bins: int | None = None) -> dict[str, list]:
        """Sums a bin, JSON-able: lists count, confidence_sum, correct_sum of the base bins, or of ``bins``
        equal-width merges of them (300 keep 10, 15 and 100 exact in a tenth of the space)."""
        parts = self._host()._merged(len(self.count) if bins is None else bins)
        return {name: part.tolist() for name, part in zip(BINNED, parts, strict=True)}

    @classmethod
    def from_bins(cls, bins: dict[str, list], device: torch.device | str = "cpu") -> "Calibration":
        """The inverse of `bins`. Raises ValueError for missing keys or lists of different lengths."""
        lengths = {key: len(bins[key]) if key in bins else None for key in BINNED}
        if len(set(lengths.values())) != 1 or not lengths["count"]:
            raise ValueError(f"bins have lengths {lengths}, expected three lists of one length, as from bins()")
        self = cls(device, lengths["count"])
        for key in BINNED:
            getattr(self, key).copy_(torch.tensor(bins[key], dtype=getattr(self, key).dtype))
        self.sums.fill_(math.nan)
        return self

    def _host(self) -> "Calibration":
        """This object when it is on the CPU, else a copy there (one transfer)."""
        if self.count.device.type == "cpu":
            return self
        host = Calibration(base_bins=len(self.count))
        host._unpack(self._packed().cpu())
        return host

    def _tokens(self) -> int:
        tokens = int(self.count.sum())
        if tokens == 0:
            raise ValueError("no tokens were counted; call update() with at least one valid token first")
        return tokens

    def _merged(self, bins: int, mass: bool = False) -> list[Tensor]:
        """The sums of BINNED [bins] of merged base bins, on the CPU."""
        n = len(self.count)
        if bins < 1 or (n % bins and not mass):
            raise ValueError(f"bins={bins} does not divide the {n} base bins; take for example 10, 15, 100 or 300")
        if mass:
            # A base bin goes where its median token goes. In integers: no edge depends on rounding.
            twice_median = 2 * self.count.cumsum(0) - self.count
            index = (twice_median * bins // (2 * self.count.sum().clamp_min(1))).clamp_max(bins - 1)
        else:
            index = torch.arange(n) // (n // bins)
        parts = (getattr(self, name) for name in BINNED)
        return [torch.zeros(bins, dtype=part.dtype).index_add_(0, index, part) for part in parts]
