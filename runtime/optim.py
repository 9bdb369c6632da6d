"""A step of the optimizer, a model on several ranks, and the state of both: full and on the CPU, for any ranks."""

import contextlib
import copy
import math
import warnings

import torch
from torch import Tensor, nn

from runtime.machine import World
from schedules import SCHEDULE_FREE, averaged, make_rule, schedule_free_adamw


def adamw(groups, cfg, **settings) -> torch.optim.Optimizer:
    """AdamW with the flags lr, beta1 and beta2 of ``cfg``, or its Schedule-Free kin where --schedule asks for it.
    Raises ValueError where that one's package is missing."""
    settings |= dict(lr=cfg.lr, betas=(cfg.beta1, cfg.beta2))
    if cfg.schedule == SCHEDULE_FREE:
        return schedule_free_adamw(groups, **settings)
    return torch.optim.AdamW(groups, fused=True, **settings)


def rule_of(cfg, optimizer, world: World, **more):
    """The learning-rate rule of the flags schedule, lr_warmup, lr_floor and fot_*, see `schedules.make_rule`.

    A rule that measures is fed the NLL, which stays one score while a mixture moves; only CE's is the loss itself
    (``same_units``)."""
    how = dict(warmup=cfg.lr_warmup, floor=cfg.lr_floor, same_units=cfg.loss == "ce")
    how |= dict(parts=cfg.fot_parts, every=cfg.fot_window, beta=cfg.fot_beta)
    return make_rule(cfg.schedule, optimizer, cfg.steps, **how | more, ranks=world.size, reduce=world.all_reduce)


def plans_no_end(cfg, step: int, *totals: int) -> bool:
    """Whether what a run of ``cfg`` has done up to ``step``, and does from there on, is the same for each of these
    ``totals`` of steps: a constant learning rate, and warm-up, ramp and label noise behind it."""
    ramped = cfg.loss == "dpsm" and cfg.alpha_schedule != "fixed"
    until = max(cfg.lr_warmup, cfg.alpha_start + cfg.warmup if ramped else 0)
    noisy = getattr(cfg, "label_noise", 0) and getattr(cfg, "label_noise_steps", 1) < 1
    return cfg.schedule == "constant" and not noisy and all(step >= until * total for total in totals)


def take_step(optimizer, parameters, clip: float, loss: Tensor) -> Tensor:
    """Clips the gradient to the norm ``clip`` (0 is off), steps, and drops the gradient. Returns its norm, 0-d.

    Where ``loss`` (0-d, the same on all ranks) or the norm is not finite, weights and moments stay as they are. Nothing
    waits for the device, but for optimizers that know no ``found_inf``. ``optimizer.clipped_by`` says what the gradient
    was divided by."""
    limit = clip or math.inf
    norm = nn.utils.clip_grad_norm_(parameters, limit)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    finite = torch.isfinite(norm) & torch.isfinite(loss)
    optimizer.clipped_by = (norm / limit).clamp(min=1)
    if isinstance(optimizer, torch.optim.AdamW):
        optimizer.found_inf = (~finite).float()  # fused AdamW leaves everything as it is where this is 1
        optimizer.step()
    elif finite:
        optimizer.step()
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

    Of Schedule-Free the weights are the averages, and the optimizer's state holds the iterate."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    if hasattr(optimizer, "eval"):  # Schedule-Free, whose step torch's way of loading cannot take; it is never sharded
        iterate = copy.deepcopy(dict(model.state_dict()))  # what goes on is not what is evaluated
        with averaged(optimizer):
            weights = copy.deepcopy(dict(model.state_dict()))
        return weights, optimizer.state_dict() | {"iterate": iterate}
    return get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def restore_training_state(model, optimizer, checkpoint: dict) -> None:
    """Loads what ``training_state`` gave, under the checkpoint's keys model and optimizer."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

    if hasattr(optimizer, "eval"):
        model.load_state_dict(checkpoint["optimizer"]["iterate"])
        optimizer.load_state_dict({k: v for k, v in checkpoint["optimizer"].items() if k != "iterate"})
        return
    states = {"model_state_dict": checkpoint["model"], "optim_state_dict": checkpoint["optimizer"]}
    set_state_dict(model, optimizer, **states, options=StateDictOptions(full_state_dict=True))
