"""Flags that more than one script has: each says here, once, what it is. A script names them, and its own defaults."""

import dataclasses

from kernels.chunks import ALLOWANCE
from kernels.head_pass import CPU_BUDGET
from kernels.losses import ALPHA_SCHEDULES, LOSSES, PATHS, alpha_at
from runtime.cli import opt
from runtime.optim import OPTIMIZERS, OWN_STEP
from schedules import ADAPTIVE, GREEDY, PARTS, RULES, SCHEDULE_FREE, SHAPES

DPSM = {"loss": ("dpsm",)}
BOUNDED = {"loss": ("brier", "spherical")}
RAMP = DPSM | {"alpha_schedule": ("linear", "cosine")}
MEASURING, IN_PARTS = {"schedule": ADAPTIVE}, {"schedule": ("fot", "bacon")}
FALLING = {"schedule": tuple(name for name in RULES if name not in (*ADAPTIVE, GREEDY, SCHEDULE_FREE, "constant"))}
WITH_LR = {"optimizer": tuple(name for name in OPTIMIZERS if name not in OWN_STEP)}
ADAMS = {"optimizer": tuple(name for name in OPTIMIZERS if name != "sgd")}
SHARE, COUNT, POSITIVE, DECAY = "[0, 1]", "[1, inf)", "[0, inf)", "[0, 1)"

FLAGS = {
    # the run
    "out": opt("", "run folder; default runs/DATA-MODEL-LOSS-sSEED", role="where", group="run"),
    "resume": opt(False, "go on with the run in --out, exactly where its last checkpoint stands", role="where"),
    "resume_from": opt("", "this checkpoint instead of OUT/last.pt", role="where", only={"resume": (True,)}),
    "dry_run": opt(
        "",
        "say what the run would be, and write nothing; timed: make two steps and say how long the whole would take",
        ("", "plan", "timed"),
        role="where",
        bare="plan",
    ),
    "seed": opt(1, "seeds whatever is random in a run", within=POSITIVE, role="bookkeeping"),
    "cache": opt("cache", "folder for caches of data", role="where"),
    # loss
    "loss": opt("ce", "training loss", LOSSES, group="loss"),
    "warmup": opt(
        0.1,
        "dpsm: alpha's ramp, as a fraction of the steps",
        within=SHARE,
        only=RAMP,
        unlike="the learning rate's warm-up is --lr-warmup",
    ),
    "alpha_schedule": opt(
        "linear", "dpsm: shape of the ramp; fixed holds --alpha-max from the first step", ALPHA_SCHEDULES, only=DPSM
    ),
    "alpha_max": opt(1.0, "dpsm: share of Brier at the end of the ramp", within=SHARE, only=DPSM),
    "alpha_start": opt(0.0, "dpsm: where the ramp begins, as a fraction of the steps", within=SHARE, only=RAMP),
    "path": opt(
        "mix",
        "dpsm: mix CE and Brier, or raise the order of the power score from CE's",
        PATHS,
        only=DPSM,
        unlike="folders are --out, --data and --model",
    ),
    "order": opt(
        None,
        "power, dpsm --path order: order of the power score, at the end of the ramp; near 1 it is ce, at 2 half of "
        "brier; default: 1.5 for power, 2 for dpsm",
        within="(1, inf)",
        only={"loss": ("power", "dpsm")},
    ),
    "gamma": opt(
        2.0, "focal: exponent", within=POSITIVE, only={"loss": ("focal",)}, unlike="no decay of the learning rate"
    ),
    "mile_gamma": opt(1.0, "mile: exponent of 1 + entropy", within=POSITIVE, only={"loss": ("mile",)}),
    "q": opt(0.7, "gce: exponent; 1 is 1 - p_y", within="(0, 1]", only={"loss": ("gce",)}),
    "threshold": opt(0.1, "ce_above, ce_below: probability", within=SHARE, only={"loss": ("ce_above", "ce_below")}),
    "eps": opt(
        0.1,
        "smoothing: share of the uniform distribution",
        within=SHARE,
        only={"loss": ("smoothing",)},
        unlike="AdamW's stays at 1e-8",
    ),
    "tail_smoothing": opt(
        0.0, "brier, spherical: Shao's score smoothing with a logarithmic tail; 0 is off", within=SHARE, only=BOUNDED
    ),
    "unigram": opt(
        0.0,
        "ce, dpsm: share of CE against how often each token is a target in training, label smoothing towards the "
        "unigram; dpsm mixes in the rest",
        within=DECAY,
        only={"loss": ("ce", "dpsm")},
    ),
    "unigram_gain": opt(
        0.0,
        "that share begins at 0, rises after each validation by this times its mean confidence less accuracy, and "
        "--unigram is its limit; 0: --unigram from the start",
        within=POSITIVE,
        only={"loss": ("ce", "dpsm")},
    ),
    # optimizer
    "steps": opt(1000, "optimizer steps", within=COUNT, role="setting", group="optimizer"),
    "batch": opt(64, "examples in an optimizer step, over all ranks", within=COUNT, role="setting"),
    "micro_batch": opt(
        16, "examples in one forward of one rank, at most; the rest is accumulated", within=COUNT, role="system"
    ),
    "optimizer": opt(
        "adamw", "; ".join(f"{name}: {what}" for name, what in OPTIMIZERS.items() if name != "adamw"), tuple(OPTIMIZERS)
    ),
    "lr": opt(1e-3, "peak learning rate", within=POSITIVE, only=WITH_LR),
    "step_factor": opt(
        1.0,
        "schedule-free-plus, prodigy: factor on the step that they find",
        within="(0, inf)",
        only={"optimizer": OWN_STEP},
    ),
    "momentum": opt(0.95, "muon, sgd: momentum", within=DECAY, only={"optimizer": ("muon", "sgd")}),
    "schedule": opt(
        "cosine",
        "learning-rate schedule; snac, bacon, fot and fot-literal measure and decide as they go, greedy follows the "
        "loss",
        RULES,
        alias="--lr-schedule",
    ),
    "lr_warmup": opt(0.02, "learning-rate warm-up, as a fraction of the steps", within=SHARE),
    "lr_floor": opt(0.0, "learning rate at the end, as a fraction of the peak", within=SHARE, only=FALLING),
    "decay_shape": opt(
        "linear",
        "wsd, fot: how the learning rate falls at the end: 1 - x, 1 - sqrt(x), 1 - x^0.4 or half a cosine",
        tuple(SHAPES),
        only={"schedule": ("wsd", "fot")},
    ),
    "tail_average": opt(0.0, "evaluate and keep the mean weights of this last share of the steps", within=DECAY),
    "fot_parts": opt(
        ",".join(PARTS), "fot, bacon: the parts of the rule that are on, separated by commas, or none", only=IN_PARTS
    ),
    "fot_window": opt(32, "steps between two decisions of a rule that measures", within=COUNT, only=MEASURING),
    "fot_beta": opt(0.9, "averaging of its measurements over decisions", within=DECAY, only=MEASURING),
    "weight_decay": opt(0.1, "AdamW weight decay", within=POSITIVE),
    "beta1": opt(0.9, "AdamW beta1", within=DECAY, only=ADAMS),
    "beta2": opt(0.95, "AdamW beta2", within=DECAY, only=ADAMS),
    "clip": opt(1.0, "clip the gradient to this norm; 0 is off", within=POSITIVE),
    # evaluation
    "eval_every": opt(
        500, "steps between validations and checkpoints", within=COUNT, role="bookkeeping", group="evaluation"
    ),
    "log_every": opt(10, "steps between lines of metrics.jsonl", within=COUNT, role="bookkeeping"),
    "patience": opt(0, "stop after this many validations without a better NLL; 0 is off", within=POSITIVE),
    "report": opt("last", "which weights the final metrics are of", ("last", "best"), role="setting"),
    # system
    "device": opt("auto", "where to run", ("auto", "cpu", "cuda"), role="where", group="system"),
    "dtype": opt("auto", "dtype of the activations; auto is bfloat16 on CUDA", ("auto", "float32", "bfloat16")),
    "head_memory": opt(
        0,
        "MB for a chunk of logits, on CUDA with what the head takes beside it; more is faster there; 0 is "
        f"{ALLOWANCE // 10**6} on CUDA, {round(CPU_BUDGET / 1e6)} on CPU",
        within=POSITIVE,
        role="system",
    ),
    "kernels": opt("auto", "implementation of the scores", ("auto", "triton", "torch"), role="system"),
    "layers": opt(
        "torch",
        "implementation of a decoder's norms, rotations and SwiGLU; triton has not been measured on a device yet",
        ("torch", "triton"),
        role="system",
    ),
    "checkpoint_activations": opt(False, "recompute each block in backward to save memory", role="system"),
    "cuda_graph": opt(
        False,
        "replay forward and backward as a CUDA graph: for models so small, or of so many adapters, that the host is "
        "slower than the device",
        role="system",
    ),
    "wandb": opt("", "Weights & Biases project to log to as well (WANDB_MODE=offline works)", role="where"),
    "track": opt("", "log to trackio, which stays on this machine, or wandb as well; :PROJECT behind it", role="where"),
}


def knobs(cfg) -> dict:
    """What the flags say of the knobs of ``kernels.losses.make_score``, DPSM's alpha aside. Raises ValueError for an
    --order that --path mix would not read, and a --unigram that --path order has no form for."""
    if cfg.loss == "dpsm" and cfg.path == "mix" and cfg.order is not None:
        raise ValueError(f"--order {cfg.order} is read by --path order, not by --path mix")
    if cfg.loss == "dpsm" and cfg.path != "mix" and getattr(cfg, "unigram", 0):
        raise ValueError(f"--unigram {cfg.unigram} is for --path mix, not for --path {cfg.path}")
    if getattr(cfg, "unigram_gain", 0) and not cfg.unigram:
        raise ValueError(f"--unigram-gain {cfg.unigram_gain} needs its limit; give --unigram, such as 0.4")
    gamma = cfg.mile_gamma if cfg.loss == "mile" else cfg.gamma
    rest = {name: getattr(cfg, name) for name in ("order", "path", "q", "threshold")}
    return rest | dict(gamma=gamma, eps=getattr(cfg, "eps", None), tail=cfg.tail_smoothing)


def alpha_of(cfg, step: int, smoothed: float = 0.0) -> float:
    """DPSM's alpha before optimizer step ``step``, by the ramp of the flags, of a loss of which the share ``smoothed``
    is CE against a prior; 0 for another loss. See `kernels.losses.alpha_at` and `kernels.prior_gap`."""
    ramp = dict(warmup=cfg.warmup, schedule=cfg.alpha_schedule, alpha_max=cfg.alpha_max, start=cfg.alpha_start)
    return (1 - smoothed) * alpha_at(step, cfg.steps, **ramp) if cfg.loss == "dpsm" else 0.0


def without_fisher(cfg) -> str:
    """The flag, as one types it, whose loss has a Fisher that does not follow from the Moments; "" where there is none.
    A tail needs sums beside them, and so does a prior: that of q_j p_j."""
    name = next((name for name in ("tail_smoothing", "unigram") if getattr(cfg, name)), "")
    return name and f"--{name.replace('_', '-')} {getattr(cfg, name)}"


def flag(name: str, default=dataclasses.MISSING, **changes) -> dataclasses.Field:
    """The flag ``name`` of FLAGS, with a script's own default, and its own words where ``changes`` has some (arguments
    of `runtime.cli.opt`)."""
    base = FLAGS[name]
    return opt(base.default if default is dataclasses.MISSING else default, **dict(base.metadata) | changes)
