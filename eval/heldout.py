"""One evaluation for all scripts: calibration of next-token probabilities on a set, before and after a temperature.

A script hands over its forwards: an iterable of (hidden [N, D], targets [N]) of this rank's part of a set, made as it
is read, with the model in eval mode and without gradients. Every rank must make each call.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch import distributed as dist
from tqdm import tqdm

from data.windows import token_counts
from eval import metrics
from eval.calibration import fit_temperature, temperature_sums
from eval.stats import ece_interval
from kernels import Calibration, linear_moments, linear_score

CHUNK = 1024  # tokens whose logits are held at a time where a temperature is fitted
ECE_BINS = 10
BANDS = ("frequent", "middle", "rare")
Forwards = Iterable[tuple[Tensor, Tensor]]


class Bands(NamedTuple):
    """Tokens by how often the training text has them, see `frequency_bands`."""

    of: Tensor  # int64 [V], on the CPU: the place in BANDS of a token
    about: dict[str, dict]  # band -> {"times": [least, most] in the training text, "types": its different tokens}


class Heldout(NamedTuple):
    raw: Calibration
    scaled: Calibration | None  # of the logits times the scale
    loss: float | None  # mean of the score that was asked for
    bands: dict[str, tuple[Calibration, Calibration | None]] = {}  # raw and scaled of each band of targets


def frequency_bands(text: np.ndarray, vocab_size: int) -> Bands:
    """Three bands of tokens, each a third of the training ``text`` (whole numbers [n], one token or more) as nearly as
    can be: tokens that occur equally often stay together, and go where the middle of their share lies. Tokens that do
    not occur are rare. A band that one frequent token leaves without tokens is not in ``about``."""
    times, index, types = np.unique(token_counts(text, vocab_size), return_inverse=True, return_counts=True)
    share = times * types
    up_to = share.cumsum()
    middle = 2 * (up_to[-1] - up_to) + share  # twice the tokens of the text that occur more often, and half of its own
    band = (len(BANDS) * middle // (2 * up_to[-1])).clip(max=len(BANDS) - 1)
    about = {}
    for k, name in enumerate(BANDS):
        if (mine := band == k).any():
            ends = times[mine]
            about[name] = {"times": [int(ends[0]), int(ends[-1])], "types": int(types[mine].sum())}
    return Bands(torch.from_numpy(band[index.reshape(-1)]), about)


@torch.no_grad()
def evaluate(
    model,
    forwards: Forwards,
    world,
    *,
    scale: float | None = None,
    score: Callable | None = None,
    unigram=None,
    tail: float = 0.0,
    keep: list | None = None,
    marks: dict[str, list] | None = None,
    bands: Bands | None = None,
    impl: str = "auto",
    memory: int | None = None,
    says: str = "",
    count: int | None = None,
) -> Heldout:
    """Calibration of ``model`` on every target that is not -100.

    ``model``: with head_weight [V, D] and, where it has one, head_bias [V]. ``world``: runtime.machine.World.
    ``scale``: 1 / temperature, for a second calibration. ``score``: a loss of the Moments, whose mean is given as well,
    with the part of ``unigram``, a `kernels.UnigramSmoothing`; ``tail``, ``impl`` and ``memory`` as
    `kernels.linear_score` has them. ``keep`` collects hidden and targets of this rank. ``marks`` collects, under raw
    and scaled, what `ece_ci95` takes. ``bands``: of targets that are told apart as well.
    ``says``: what a bar is of, with ``count`` forwards; without it there is none."""
    was_training = model.training
    model.eval()
    raw, scaled = Calibration(world.device), Calibration(world.device) if scale else None
    names, of = (BANDS, bands.of.to(world.device)) if bands else ((), None)
    parts = [(Calibration(world.device, 300), Calibration(world.device, 300) if scale else None) for _ in names]
    total = torch.zeros(2, dtype=torch.float64, device=world.device)  # of the score, and targets
    how = dict(desc=says, total=count, unit="batch", leave=False, dynamic_ncols=True)
    for hidden, y in tqdm(forwards, disable=not (says and world.main), **how):
        # The head is read after the forward, which is when FSDP has gathered it.
        head = dict(weight=model.head_weight, targets=y, bias=getattr(model, "head_bias", None))
        head |= dict(impl=impl, memory=memory)
        if score is None:
            moments = linear_moments(hidden, **head)
        else:
            loss, moments = linear_score(hidden, score=score, reduction="sum", tail=tail, **head)
            if unigram is not None:
                loss = loss + unigram.term(hidden, model.head_weight, y, bias=head["bias"], denominator=1)
            total += torch.stack([loss.double(), moments.valid.sum().double()])
        valid = moments.valid
        for which, whole in enumerate((raw, scaled)):
            if whole is None:
                continue
            moments = linear_moments(hidden, **head, scale=scale) if which else moments
            whole.update(moments)
            for k, part in enumerate(parts):
                part[which].update(dataclasses.replace(moments, valid=valid & (of[y.clamp_min(0)] == k)))
        if marks is not None:
            for which, calibration in (("raw", raw), ("scaled", scaled)):
                marks.setdefault(which, []).extend([] if calibration is None else [so_far(calibration)])
        if keep is not None:
            keep.append((hidden[y != -100], y[y != -100]))
    model.train(was_training)
    for calibration in filter(None, (raw, scaled, *(c for part in parts for c in part))):
        calibration.all_reduce()
    loss, count = world.all_reduce(total).tolist()
    found = dict(zip(names, parts, strict=True))
    return Heldout(raw, scaled, None if score is None else loss / count, found)


def so_far(calibration: Calibration) -> Tensor:
    """Float64 [11]: the sum of confidence - correct in each of ten bins, and the tokens; without a synchronisation."""
    gaps = calibration.confidence_sum - calibration.correct_sum
    return torch.cat([gaps.view(ECE_BINS, -1).sum(1), calibration.count.sum()[None].double()])


def ece_ci95(marks: list[Tensor], world) -> list[float | None]:
    """95 % interval of the ECE of ten bins, see `eval.stats.ece_interval`. Its blocks are the forwards of all ranks, of
    which ``marks`` has `so_far` of this rank's. [None, None] for too few. Every rank must call it."""
    count = world.all_reduce(torch.tensor(len(marks), device=world.device), dist.ReduceOp.MAX)
    blocks = torch.zeros(world.size, int(count), ECE_BINS + 1, dtype=torch.float64, device=world.device)
    if marks:
        blocks[world.rank, : len(marks)] = torch.stack(marks).diff(dim=0, prepend=torch.zeros_like(marks[0])[None])
    blocks = world.all_reduce(blocks).flatten(0, 1).cpu().numpy()
    blocks = blocks[blocks[:, ECE_BINS] > 0]  # with targets
    ends = ece_interval(blocks[:, :ECE_BINS], blocks[:, ECE_BINS])
    return [None if math.isnan(end) else end for end in ends]


def fitted(model, kept: list[tuple[Tensor, Tensor]], world):
    """The TemperatureFit of what `evaluate` has kept, on all ranks together."""
    weight, bias = model.head_weight, getattr(model, "head_bias", None)

    @torch.no_grad()
    def sums(beta: float) -> Tensor:
        total = torch.zeros(1, 4, dtype=torch.float64, device=world.device)  # all that a rank without a batch has
        parts = [total]
        for hidden, targets in kept:
            head = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
            for h, y in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True):
                parts.append(temperature_sums(F.linear(h, *head), y, beta)[None])
        return world.all_reduce(torch.cat(parts).sum(0))

    return fit_temperature(sums)


def of_band(raw: Calibration, scaled: Calibration | None) -> dict:
    """The numbers of a band: its tokens, and if there are some its metrics, with _t behind them after temperature."""
    tokens, keys = int(raw.count.sum()), [m.key for m in metrics.shown(metrics.TOKENS, "band")]
    found = {end: c.compute() for end, c in (("", raw), ("_t", scaled)) if c is not None and tokens}
    return {"tokens": tokens} | {f"{key}{end}": numbers[key] for end, numbers in found.items() for key in keys}


def final_metrics(
    model,
    sets: dict[str, Callable[[], Forwards] | None],
    world,
    *,
    pieces,
    sizes: dict | None = None,
    counts: dict | None = None,
    text: np.ndarray | None = None,
    impl: str = "auto",
) -> tuple[dict, dict]:
    """Temperature on ``sets["val"]``, then every set before and after it: (entries of summary.json, reliability bins).

    ``sets``: name -> what makes its forwards. ``pieces``: runtime.folder.Pieces, which keeps what is done, so that a
    later call makes the rest. ``sizes``: name -> bytes of its text, for bits per byte. ``counts``: name -> forwards,
    for the bar. ``text``: the token ids of the training text [n], for the entry ``bands``: each set by how often the
    text has its targets, {band: `Bands.about` | {name of a set: its numbers}}. A set that is None has its entries,
    which are None; so has a temperature where the weights yield nan or inf."""
    counts, bands = counts or {}, None if text is None else frequency_bands(text, len(model.head_weight))

    def fit_on_val() -> dict:
        kept: list = []
        bar = dict(says="temperature", count=counts.get("val"))
        finite = math.isfinite(evaluate(model, sets["val"](), world, keep=kept, impl=impl, **bar).raw.compute()["nll"])
        fit = fitted(model, kept, world) if finite else None
        return {"temperature": fit and fit.temperature, "temperature_at_bound": fit and fit.at_bound}

    entries = pieces.get("temperature", fit_on_val)
    scale = entries["temperature"] and 1 / entries["temperature"]

    def measured(name: str) -> dict:
        bar, marks = dict(says=name, count=counts.get(name)), {"raw": [], "scaled": []}
        found = evaluate(model, sets[name](), world, scale=scale, impl=impl, marks=marks, bands=bands, **bar)
        size = (sizes or {}).get(name)
        before, after = metrics.measure(found.raw, size=size), {}
        before["ece10_ci95"] = ece_ci95(marks["raw"], world)
        if found.scaled:
            after = metrics.measure(found.scaled, size=size) | {"ece10_ci95": ece_ci95(marks["scaled"], world)}
        bins = {"raw": found.raw.bins(300), "scaled": found.scaled and found.scaled.bins(300)}
        by_band = {band: of_band(*part) for band, part in found.bands.items()}
        for band, part in found.bands.items():
            bins |= {f"{band}{end}": c and c.bins(ECE_BINS) for end, c in zip(("", "_scaled"), part, strict=True)}
        return {"before": before, "after": after, "bins": bins, "bands": by_band}

    entries, keys, bins = dict(entries), [], {}
    entries |= {"bands": {band: dict(about) for band, about in bands.about.items()}} if bands else {}
    for name, forwards in sets.items():
        if forwards is None:
            entries |= {f"{name}_{key}{suffix}": None for key in keys for suffix in ("", "_t")}
            entries |= {f"{name}_ece10{suffix}_ci95": None for suffix in ("", "_t")}
            continue
        found = pieces.get(name, lambda name=name: measured(name))
        before, after, bins[name] = found["before"], found["after"], found["bins"]
        for band, about in entries.get("bands", {}).items():
            about[name] = found.get("bands", {}).get(band)
        keys = [m.key for m in metrics.shown(metrics.TOKENS, "final") if m.key in before]
        entries |= {f"{name}_{key}": before[key] for key in keys} | {f"{name}_{key}_t": after.get(key) for key in keys}
        entries |= {f"{name}_ece10{end}_ci95": of.get("ece10_ci95") for end, of in (("", before), ("_t", after))}
        entries[f"{name}_tokens"] = before["eval_tokens"]
    return entries, bins
