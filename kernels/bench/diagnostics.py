"""What a step's figures cost: the loss alone, and with entropy, token accuracy, calibration and Fisher of its tokens.

A step takes (hidden, weight, targets) and gives the mean loss and {figure: its value, a tensor on the device}. Figures
are means over tokens; "calibration" is the sum of |confidence - accuracy| over 300 bins, in tokens, over all tokens:
ours from kernels.Calibration, as our scripts keep it, others' by the function here.
Each provider gives what it has; what it is not made for is left out, not written for it.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..calibration import Calibration
from ..head import linear_score
from ..losses import ce, dpsm
from . import timing
from .compare import add_missing, drop_failing, time_losses
from .providers import ALPHA, liger, peer
from .rows import Rows
from .timing import Shape

LOSS, SOME, ALL = "loss alone", "entropy, accuracy", "entropy, accuracy, calibration, Fisher"
BINS = 300
TRL = "trl.trainer.utils"
TRL_TILE = 32768  # entries of the vocabulary at a time, as trl's add_fused_lm_head has it


def calibration(confidence: Tensor, correct: Tensor) -> Tensor:
    """The expected calibration error of [N] confidences over BINS bins of equal width (Naeini et al., 2015), 0-d."""
    index = (confidence * BINS).ceil().long().sub_(1).clamp_(0, BINS - 1)
    gap = torch.zeros(BINS, device=confidence.device).index_add_(0, index, confidence.float() - correct.float())
    return gap.abs().sum() / len(confidence)


def figures_of(entropy: Tensor, correct: Tensor, confidence: Tensor | None = None, fisher: Tensor | None = None):
    """SOME of the figures, with ``confidence`` ALL, from vectors [N]."""
    figures = dict(entropy=entropy.mean(), accuracy=correct.float().mean())
    if confidence is not None:
        figures |= dict(calibration=calibration(confidence, correct), fisher=fisher.mean())
    return figures


def _ours(score) -> dict[str, Callable]:
    def step(h, w, y, which):
        loss, m = linear_score(h, w, y, score, fisher=which == ALL)
        if which == LOSS:
            return loss, {}
        figures = figures_of(m.entropy, m.correct)
        if which == ALL:
            kept = Calibration(h.device, BINS)
            kept.update(m)
            gap = (kept.confidence_sum - kept.correct_sum).abs().sum() / len(h)
            figures |= dict(calibration=gap, fisher=m.fisher.mean())
        return loss, figures

    return {which: partial(step, which=which) for which in (LOSS, SOME, ALL)}


def _torch() -> dict[str, Callable]:
    def step(h, w, y, which):
        logits = F.linear(h, w)
        loss = F.cross_entropy(logits, y)
        if which == LOSS:
            return loss, {}
        with torch.no_grad():
            log_p = logits.float().log_softmax(-1)
            p = log_p.exp()
            entropy, (confidence, top) = -(p * log_p).sum(-1), p.max(-1)
            if which == SOME:
                return loss, figures_of(entropy, top == y)
            fisher = p.square().sum(-1) - 2 * p.gather(1, y[:, None])[:, 0] + 1  # of CE
            return loss, figures_of(entropy, top == y, confidence, fisher)

    return {which: partial(step, which=which) for which in (LOSS, SOME, ALL)}


def _trl_head() -> dict[str, Callable]:
    """As SFTTrainer.compute_loss has it: the head in tiles, which are computed again in backward."""
    function = peer("trl.kernels", "ChunkedLogProbFunction")
    peer(TRL, "add_fused_lm_head")  # its backward imports from there

    def step(h, w, y, which):
        outputs = ("log_probs",) if which == LOSS else ("log_probs", "entropy", "is_top1")
        log_p, entropy, _, _, correct = function.apply(h, w, None, y, 1.0, TRL_TILE, None, 1.0, outputs)
        return -log_p.mean(), {} if which == LOSS else figures_of(entropy.detach(), correct)

    return {which: partial(step, which=which) for which in (LOSS, SOME)}


def _trl_logits() -> dict[str, Callable]:
    """From logits that are there, with TRL's functions for them."""
    log_softmax = peer(TRL, "selective_log_softmax")
    both = peer(TRL, "selective_log_softmax_and_entropy")

    def step(h, w, y, which):
        logits = F.linear(h, w)
        if which == LOSS:
            return -log_softmax(logits, y).mean(), {}
        log_p, entropy = both(logits, y, entropy_requires_grad=False)
        return -log_p.mean(), figures_of(entropy, logits.detach().argmax(-1) == y)

    return {which: partial(step, which=which) for which in (LOSS, SOME)}


def _liger() -> dict[str, Callable]:
    """Its fused head has no entropy, and token accuracy where its version has the option."""
    loss = liger("liger_kernel.transformers", "LigerFusedLinearCrossEntropyLoss")
    alone = loss()
    steps = {LOSS: lambda h, w, y: (alone(w, h, y), {})}
    try:
        with_accuracy = loss(return_token_accuracy=True)
    except TypeError:
        return steps

    def step(h, w, y):
        out = with_accuracy(w, h, y)
        return out.loss, dict(accuracy=out.token_accuracy)

    return steps | {"accuracy": step}


MAKERS: dict[str, Callable[[], dict[str, Callable]]] = {
    "ours CE": partial(_ours, ce),
    "ours DPSM": partial(_ours, dpsm(ALPHA)),
    "torch full logits": _torch,
    "TRL fused head": _trl_head,
    "TRL full logits": _trl_logits,
    "Liger linear CE, Triton": _liger,
}
OURS = ("ours CE", "ours DPSM", "torch full logits")  # and torch's: what fails there is a mistake of this file
CUDA_ONLY = ("Liger linear CE, Triton",)


def loss_of(provider: str, figures: str) -> Callable:
    """(hidden, weight, targets) -> the loss, for the timers; the figures are computed and dropped."""
    step = MAKERS[provider]()[figures]
    return lambda *inputs: step(*inputs)[0]


def available(device: str) -> tuple[dict[str, tuple[str, str]], dict[str, str]]:
    """({name of a job: (provider, figures)}, {provider: why it is not there})."""
    jobs, missing = {}, {}
    for provider, make in MAKERS.items():
        if provider in CUDA_ONLY and device != "cuda":
            missing[provider] = "needs CUDA"
            continue
        try:
            jobs |= {f"{provider}, {figures}": (provider, figures) for figures in make()}
        except ImportError as e:
            missing[provider] = f"not installed: {e}".splitlines()[0]
    return jobs, missing


def diagnose(shape: Shape, args, rows: Rows) -> None:
    """One row a provider and set of figures. A provider that is not there has its reason in ``missing``."""
    jobs, missing = available(args.device)
    size = " x ".join(map(str, shape))
    if not (names := rows.admit([name for name in (*jobs, *missing) if args.only in name], f", {size}")):
        return
    functions = {name: loss_of(*job) for name, job in jobs.items() if name in names}
    missing = {name: why for name, why in missing.items() if name in names}
    leaves, targets = timing.make_inputs(shape, args.dtype, args.device)
    missing |= drop_failing(functions, leaves, targets, forward=False)
    times = time_losses(functions, leaves, targets, args.repeats, forward=False, copy=False)
    del leaves
    where = f"{args.dtype} on {rows.about['device']}, {rows.about['threads']} CPU threads"
    title = f"figures of a step, N={shape.n} V={shape.v} D={shape.d} {where}"
    rows.begin(title, "provider", "step_ms", "ratio_to_loss_alone", "peak_bytes")
    common = shape._asdict() | dict(dtype=args.dtype)
    for name, function in functions.items():
        provider, figures = jobs[name]
        with rows.part(provider, figures=figures, **common):
            if args.device == "cuda":
                peak = timing.measure_memory(function, shape, args.dtype, "cuda")
            else:
                find = partial(loss_of, provider, figures)
                peak = timing.measure_memory_apart(name, shape, args.dtype, args.threads, find, (__name__, TRL))
            row = dict(provider=provider, figures=figures, **common, step_ms=timing.median_ms(times, name))
            row |= dict(ratio_to_loss_alone=timing.median_ratio(times, name, f"{provider}, {LOSS}"))
            rows.add(row | dict(peak_bytes=peak, repeats=args.repeats), f"  {figures}")
    add_missing(rows, missing, common, [name for name, (provider, _) in jobs.items() if provider in OURS])
