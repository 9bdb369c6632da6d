"""A step of the optimizer, a model on several ranks, and the state of both: full and on the CPU, for any ranks."""

import contextlib
import copy
import math
import warnings

import torch
from torch import Tensor, nn

from runtime.cli import user_errors
from runtime.machine import World
from schedules import (
    ADAPTIVE,
    SCHEDULE_FREE,
    ScheduleFreePlus,
    TailAverage,
    averaged,
    averages,
    make_rule,
    rule_reads,
    schedule_free_adamw,
)
from schedules.commandline import package

# From name to what it is; the flag --optimizer takes these.
OPTIMIZERS = {
    "adamw": "torch's, fused",
    "muon": "torch's Muon for hidden matrices, AdamW for embeddings, head, norms and biases",
    "sgd": "torch's, with momentum and coupled weight decay",
    "adamw8bit": "bitsandbytes', on a CPU too",
    "paged-adamw8bit": "bitsandbytes', on CUDA",
    "schedule-free": "AdamW of the package schedulefree; fot finds its step and lets nothing fall",
    "schedule-free-plus": "finds its own step",
    "prodigy": "of the package prodigyopt; finds its own step",
}
OWN_STEP = ("schedule-free-plus", "prodigy")  # --step-factor scales it; there is no --lr
AVERAGING = ("schedule-free", "schedule-free-plus")  # evaluated at averages, which stand for a falling learning rate
SHARDED = ("adamw", "sgd")  # whose state FSDP2 keeps


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon for the hidden matrices and AdamW for the rest, as one optimizer: one state, one list of groups.

    ``groups``: for Muon and AdamW together. ``hidden``: ids of Muon's parameters, of two dimensions. Muon's updates
    are scaled to the RMS that AdamW's have (``match_rms_adamw``: 0.2 sqrt(max(rows, columns)); Liu et al., 2025, "Muon
    is Scalable for LLM Training"), so that one learning rate and one weight decay serve both. ``parts`` are the two."""

    def __init__(self, groups: list[dict], hidden: set[int], lr: float, momentum: float, **adam):
        sides = [
            [g | {"params": [p for p in g["params"] if (id(p) in hidden) == side]} for g in groups]
            for side in (True, False)
        ]
        matrices, others = ([g for g in side if g["params"]] for side in sides)
        decay = adam.get("weight_decay", 0.0)
        self.parts = []
        if matrices:
            how = dict(lr=lr, momentum=momentum, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
            self.parts.append(torch.optim.Muon(matrices, **how))
        if others:
            self.parts.append(torch.optim.AdamW(others, lr=lr, fused=True, **adam))
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        groups = iter(self.param_groups)
        for part in self.parts:
            part.state, part.param_groups = self.state, [next(groups) for _ in part.param_groups]

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._share()

    def step(self, closure=None) -> None:
        for part in self.parts:
            part.step()


def hidden_matrices(model: nn.Module) -> set[int]:
    """Ids of what Muon is for: trained matrices that are neither an embedding nor the output head."""
    outside = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    outside |= {id(head)} if (head := getattr(model, "head_weight", None)) is not None else set()
    return {id(p) for p in model.parameters() if p.requires_grad and p.ndim == 2 and id(p) not in outside}


def check_optimizer(cfg, device: torch.device) -> None:
    """Raises ValueError, one line with the way out, for an --optimizer that cannot run here or not with other flags."""
    name, own = cfg.optimizer, cfg.schedule == SCHEDULE_FREE
    if own and name not in ("adamw", "schedule-free"):
        raise ValueError(f"--schedule {cfg.schedule} is an optimizer of its own, not --optimizer {name}")
    name = "schedule-free" if own else name
    if getattr(cfg, "fsdp", False) and name not in SHARDED:
        raise ValueError(f"{_asked(cfg)} knows no --fsdp; use DDP, or --optimizer {' or '.join(SHARDED)}")
    if getattr(cfg, "tail_average", 0) and (getattr(cfg, "fsdp", False) or name in AVERAGING):
        why = "averages already" if name in AVERAGING else "with --fsdp would average shards"
        raise ValueError(f"--tail-average: {_asked(cfg)} {why}; leave it out")
    if name in AVERAGING and not own and cfg.schedule not in ("constant", *ADAPTIVE):
        way = "use --schedule constant or one that measures"
        raise ValueError(f"--optimizer {name} averages in the place of a schedule such as {cfg.schedule}; {way}")
    if name == "schedule-free" and cfg.schedule == "fot" and cfg.decay_shape != "linear":
        raise ValueError(f"--decay-shape {cfg.decay_shape}: over --optimizer {name} nothing falls; leave it out")
    if name in OWN_STEP and getattr(cfg, "lora_plus", 1) != 1:
        raise ValueError(f"--optimizer {name} finds one step for A and B; leave out --lora-plus")
    if name == "prodigy" and hasattr(cfg, "lora_plus") and "blocks" in rule_reads(cfg.schedule, cfg.fot_parts):
        raise ValueError(f"--optimizer {name} has one step for all blocks; leave blocks out of --fot-parts")
    if name == "paged-adamw8bit" and device.type != "cuda":
        raise ValueError(f"--optimizer {name} needs a CUDA device; use --optimizer adamw8bit or adamw")


def _asked(cfg) -> str:
    return f"--schedule {cfg.schedule}" if cfg.schedule == SCHEDULE_FREE else f"--optimizer {cfg.optimizer}"


def make_optimizer(groups: list, cfg, model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """The --optimizer of ``cfg`` for these groups, with the flags lr or step_factor, beta1, beta2, momentum and
    weight_decay (where a group does not say its own), and its average of the run's end where --tail-average asks for
    one. Raises ValueError as `check_optimizer` does, and where a package is missing."""
    check_optimizer(cfg, device)
    name = "schedule-free" if cfg.schedule == SCHEDULE_FREE else cfg.optimizer
    groups = [{"weight_decay": cfg.weight_decay} | g for g in groups]
    lr = cfg.step_factor if name in OWN_STEP else cfg.lr
    adam = dict(lr=lr, betas=(cfg.beta1, cfg.beta2))
    warm, otherwise = math.ceil(cfg.lr_warmup * cfg.steps), "use --optimizer adamw"
    if name == "muon":
        optimizer = Muon(groups, hidden_matrices(model), momentum=cfg.momentum, **adam)
    elif name == "sgd":
        optimizer = torch.optim.SGD(groups, lr=lr, momentum=cfg.momentum)
    elif name == "schedule-free":
        optimizer = schedule_free_adamw(groups, **adam)
    elif name == "schedule-free-plus":
        optimizer = ScheduleFreePlus(groups, average_after=warm, **adam)
    elif name == "prodigy":
        # Its authors: without the safeguard a warm-up makes it overestimate.
        how = dict(lr=1.0, d_coef=lr, safeguard_warmup=warm > 0, betas=adam["betas"])
        optimizer = package("prodigyopt", f"--optimizer {name}", otherwise=otherwise).Prodigy(groups, **how)
    elif name == "adamw":
        optimizer = torch.optim.AdamW(groups, fused=True, **adam)
    else:
        library = package("bitsandbytes.optim", f"--optimizer {name}", otherwise=otherwise)
        kind = library.PagedAdamW8bit if name == "paged-adamw8bit" else library.AdamW8bit
        optimizer = kind(groups, **adam)
    if share := getattr(cfg, "tail_average", 0):
        TailAverage(optimizer, (1 - share) * cfg.steps)
    return optimizer


def rule_of(cfg, optimizer, world: World, **more):
    """The learning-rate rule of the flags schedule, lr_warmup, lr_floor, decay_shape, fot_*: `schedules.make_rule`.

    A rule that measures is fed the NLL, which stays one score while a mixture moves; it is the loss itself
    (``same_units``) for CE alone, without label smoothing of either kind."""
    smoothed = getattr(cfg, "label_smoothing", 0) or getattr(cfg, "unigram", 0)
    how = dict(warmup=cfg.lr_warmup, floor=cfg.lr_floor, same_units=cfg.loss == "ce" and not smoothed)
    how |= dict(parts=cfg.fot_parts, every=cfg.fot_window, beta=cfg.fot_beta, shape=cfg.decay_shape)
    return make_rule(cfg.schedule, optimizer, cfg.steps, **how | more, ranks=world.size, reduce=world.all_reduce)


def restore_rule(rule, state: dict, step: int) -> None:
    """``rule`` goes on from ``state``; that of other settings or code is one line and exit code 2. Call it after the
    optimizer's own state was loaded."""
    with user_errors():
        rule.restore(state, step)


def plans_no_end(cfg, step: int, *totals: int) -> bool:
    """Whether what a run of ``cfg`` has done up to ``step``, and does from there on, is the same for each of these
    ``totals`` of steps: a constant learning rate, and warm-up, ramp and label noise behind it. A share of the unigram
    that follows the validations has followed the last one too, where --eval-every alone would not have asked for it."""
    ramped = cfg.loss == "dpsm" and cfg.alpha_schedule != "fixed"
    until = max(cfg.lr_warmup, cfg.alpha_start + cfg.warmup if ramped else 0)
    noisy = getattr(cfg, "label_noise", 0) and getattr(cfg, "label_noise_steps", 1) < 1
    followed = getattr(cfg, "unigram_gain", 0) and step in totals and step % cfg.eval_every
    if noisy or followed or getattr(cfg, "tail_average", 0):
        return False
    return cfg.schedule == "constant" and all(step >= until * total for total in totals)


def take_step(optimizer, parameters, clip: float, loss: Tensor) -> Tensor:
    """Clips the gradient to the norm ``clip`` (0 is off), steps, and drops the gradient. Returns its norm, 0-d.

    Where ``loss`` (0-d, the same on all ranks) or the norm is not finite, weights and moments stay as they are. Nothing
    waits for the device, but for optimizers that know no ``found_inf``. ``optimizer.clipped_by`` says what the gradient
    was divided by, ``optimizer.loss`` the loss to those that ask for it."""
    limit = clip or math.inf
    norm = nn.utils.clip_grad_norm_(parameters, limit)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    finite = torch.isfinite(norm) & torch.isfinite(loss)
    optimizer.clipped_by = (norm / limit).clamp(min=1)
    if isinstance(optimizer, torch.optim.AdamW):
        optimizer.found_inf = (~finite).float()  # fused AdamW leaves everything as it is where this is 1
        optimizer.step()
    elif finite:
        if hasattr(optimizer, "loss"):
            optimizer.loss = loss
        optimizer.step()
    if tail := getattr(optimizer, "tail", None):
        tail.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def on_ranks(model: nn.Module, world: World, blocks=None, dtype: torch.dtype | None = None, **ddp) -> nn.Module:
    """``model`` itself for one rank; else wrapped in DDP, or sharded in place (FSDP2) where its ``blocks`` are given.
    ``dtype``: of the activations, for FSDP. ``ddp``: further settings of DDP."""
    if blocks is not None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = init_device_mesh(world.device.type, (world.size,))
        how = dict(mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32))
        for block in blocks:
            fully_shard(block, **how)
        # The root stays gathered after forward: the loss uses its tied head.
        return fully_shard(model, **how, reshard_after_forward=False)
    if world.size == 1:
        return model
    ids = [world.device.index] if world.device.type == "cuda" else None
    with warnings.catch_warnings():  # what is to replace broadcast_buffers=False still broadcasts at the start
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        return nn.parallel.DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True, **ddp)


def meeting(trained: nn.Module, last: bool):
    """A context for forward and backward of a micro-batch: gradients meet over the ranks in the ``last`` one alone."""
    if hasattr(trained, "set_requires_gradient_sync"):  # FSDP
        trained.set_requires_gradient_sync(last)
    return contextlib.nullcontext() if last or not hasattr(trained, "no_sync") else trained.no_sync()


def training_state(model, optimizer) -> tuple[dict, dict]:
    """State dicts of a plain, DDP or FSDP2 model and of its optimizer. Every rank must call it.

    Where the averages are evaluated they are the weights, and the optimizer's state holds the iterate."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    if _by_name(optimizer):
        weights, state = get_state_dict(
            model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
        )
    else:
        weights, state = dict(model.state_dict()), optimizer.state_dict()
    if averages(optimizer):
        state = state | {"iterate": copy.deepcopy(weights)}  # what goes on is not what is evaluated
        with averaged(optimizer):
            weights = copy.deepcopy(dict(model.state_dict()))
    if hasattr(optimizer, "tail"):
        state["tail"] = optimizer.tail.state_dict()
    return weights, state


def restore_training_state(model, optimizer, checkpoint: dict) -> None:
    """Loads what ``training_state`` gave, under the checkpoint's keys model and optimizer."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

    state = dict(checkpoint["optimizer"])
    weights, tail = state.pop("iterate", checkpoint["model"]), state.pop("tail", None)
    if _by_name(optimizer):
        states = {"model_state_dict": weights, "optim_state_dict": state}
        set_state_dict(model, optimizer, **states, options=StateDictOptions(full_state_dict=True))
    else:
        model.load_state_dict(weights)
        optimizer.load_state_dict(state)
    if tail:
        optimizer.tail.load_state_dict(tail)


def _by_name(optimizer) -> bool:
    """Whether the state is kept under the parameters' names, as FSDP2 needs; torch's way of loading it makes a step,
    which only its own optimizers take."""
    return isinstance(optimizer, torch.optim.AdamW | torch.optim.SGD)
