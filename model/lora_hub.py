"""LoRA adapters in PEFT's format: adapter_config.json and safetensors in one folder."""

import dataclasses
import logging
import math
import os
from pathlib import Path

import torch
from torch import Tensor

from model import weights
from model.decoder import Decoder
from model.lora import TARGETS, LoRAConfig, adapted, add_lora, check_plain, targeted
from schedules.textlines import shown

log = logging.getLogger("scorecast")

ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"

# Fields of adapter_config.json: those with fixed values, those that are read, and those that cannot change what the
# adapter computes. Every other field is an extension of LoRA, and has to be empty.
FIXED = dict(peft_type=("LORA",), bias=("none",), init_lora_weights=(True, False, "gaussian", "orthogonal", "eva"))
READ = ("r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "base_model_name_or_path")
READ += ("rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern")
HARMLESS = ("task_type", "inference_mode", "auto_mapping", "revision", "peft_version", "megatron_core")
HARMLESS += ("qalora_group_size", "runtime_config")


def _peft_name(path: str, which: str) -> str:
    return f"base_model.model.model.{path}.{which}.weight"


def adapter_tensors(model: Decoder) -> dict[str, Tensor]:
    """The trained parameters themselves under PEFT's names; a training checkpoint holds these."""
    return {
        _peft_name(path, which): getattr(layer, which)
        for path, layer in adapted(model).items()
        for which in ("lora_A", "lora_B")
    }


@torch.no_grad()
def put_tensors(model: Decoder, tensors: dict[str, Tensor]) -> None:
    """Copies what ``adapter_tensors`` gave, of a checkpoint, into the model."""
    for name, parameter in adapter_tensors(model).items():
        parameter.copy_(tensors[name])


def _portable(model: Decoder) -> tuple[LoRAConfig, dict[str, Tensor]]:
    """The adapter for the base as it was loaded. After PiSSA that is the difference to its start, of twice the rank:
    s (B A - B0 A0) = s [B, -B0] [A; A0]."""
    config, tensors = model.lora, adapter_tensors(model)
    if config.init != "pissa":
        return config, tensors
    for path, layer in adapted(model).items():
        A, B = (start.to(layer.lora_A.device) for start in layer.start)
        tensors[_peft_name(path, "lora_A")] = torch.cat([layer.lora_A.detach(), A])
        tensors[_peft_name(path, "lora_B")] = torch.cat([layer.lora_B.detach(), -B], dim=1)
    more = math.sqrt(2) if config.rslora else 2  # so that the scale stays
    ranks = {name: 2 * r for name, r in config.rank_pattern.items()}
    alphas = {name: more * alpha for name, alpha in config.alpha_pattern.items()}
    doubled = dict(r=2 * config.r, alpha=more * config.alpha, rank_pattern=ranks, alpha_pattern=alphas, init="zero")
    return dataclasses.replace(config, **doubled), tensors


def save_adapter(model: Decoder, folder: str | os.PathLike, base_model: str) -> None:
    """Writes an adapter as PEFT does, as ``weights.staged`` says. ``base_model``: where the base was loaded from. After
    PiSSA it has twice the rank and fits that base; where bf16 or NF4 rounded what was left of it, up to that."""
    config, tensors = _portable(model)
    fields = dict(peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=str(base_model))
    fields |= dict(r=config.r, lora_alpha=config.alpha, lora_dropout=config.dropout, use_rslora=config.rslora)
    targets = config.targets if isinstance(config.targets, str) else sorted(config.targets)
    fields |= dict(rank_pattern=config.rank_pattern, alpha_pattern=config.alpha_pattern)
    fields |= dict(layers_to_transform=None if config.layers is None else list(config.layers))
    fields |= dict(target_modules=targets, bias="none", fan_in_fan_out=False, inference_mode=True)
    fields |= dict(init_lora_weights=True, modules_to_save=None, use_dora=False)
    with weights.staged(Path(folder), last=ADAPTER_CONFIG) as temporary:
        weights.save_tensors(tensors.items(), temporary / ADAPTER)
        weights.write_json(fields, temporary / ADAPTER_CONFIG)


def read_adapter_config(folder: str | os.PathLike) -> tuple[LoRAConfig, str | None]:
    """The LoRAConfig of a PEFT adapter, and the name of its base. Raises ValueError for other kinds of adapters."""
    path = Path(folder) / ADAPTER_CONFIG
    with weights.kinds_of(path):
        return _config_of(weights.read_json(path), path)


def _config_of(fields: dict, path: Path) -> tuple[LoRAConfig, str | None]:
    weights.check_fields(path, fields, ("r", "lora_alpha", "target_modules"), FIXED)
    if fields.get("modules_to_save"):
        saved = f"modules_to_save={fields['modules_to_save']!r}"
        raise ValueError(f"{path}: {saved}: whole modules trained beside LoRA are not supported; merge them with peft")
    for name, value in fields.items():
        if name not in (*READ, *HARMLESS, *FIXED) and value:
            what = f"{shown([name])}={value!r} is not supported"
            raise ValueError(f"{path}: {what}; only plain LoRA and rsLoRA adapters are")
    targets, layers = fields["target_modules"], fields.get("layers_to_transform")
    if fields.get("layers_pattern") not in (None, [], "layers", ["layers"]):
        raise ValueError(f"{path}: layers_pattern={fields['layers_pattern']!r}; the blocks here are called 'layers'")
    if targets == "all-linear":
        targets = TARGETS
    elif isinstance(targets, list) and targets and all(isinstance(name, str) for name in targets):
        # Names beside the seven of a block come with no adapter here; LoRAConfig says so.
        targets = tuple(sorted(targets, key=lambda name: ((*TARGETS, name).index(name), name)))
    elif not isinstance(targets, str):
        raise ValueError(f"{path}: target_modules={targets!r}: expected names, a regex or 'all-linear'")
    if layers is not None:
        layers = tuple(layers) if isinstance(layers, list) else (layers,)
    patterns = [fields.get(name) or {} for name in ("rank_pattern", "alpha_pattern")]
    if not all(isinstance(pattern, dict) for pattern in patterns):
        raise ValueError(f"{path}: rank_pattern and alpha_pattern: expected objects from names to numbers")
    dropout, rslora = fields.get("lora_dropout", 0.0), bool(fields.get("use_rslora", False))
    try:
        config = LoRAConfig(fields["r"], fields["lora_alpha"], dropout, targets, rslora, *patterns, layers or None)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return config, fields.get("base_model_name_or_path")


def load_adapter(model: Decoder, folder: str | os.PathLike, base_model: str | None = None) -> None:
    """Adds a PEFT adapter, ours or PEFT's own, to ``model``; it is trainable. ``folder`` may be a run's, which has its
    adapter in one of that name.

    ``base_model`` is where ``model`` was loaded from. One base has many names (on the hub, of a snapshot, of a copy in
    four bits), and many bases have one: the tensors' shapes decide, and a base of another name is a line in the log.
    Raises ValueError, before the model is changed, for tensors that do not fit it, and as read_adapter_config does."""
    check_plain(model)
    folder = Path(folder)
    if not (folder / ADAPTER_CONFIG).exists() and (folder / "adapter" / ADAPTER_CONFIG).exists():
        folder /= "adapter"
    config, trained_on = read_adapter_config(folder)
    expected: dict[str, tuple] = {}
    for path, _, base in targeted(model, config):
        (n_out, n_in), r = base.shape, config.rank(path)
        expected |= {_peft_name(path, "lora_A"): (r, n_in), _peft_name(path, "lora_B"): (n_out, r)}
    other = base_model is not None and trained_on and str(trained_on).rstrip("/") != str(base_model).rstrip("/")
    says = f"{folder} is no adapter of this base" + (f" (it names {trained_on!r})" if trained_on else "")
    weights.check_shapes(weights.read_shapes([folder / ADAPTER]), expected, says)
    if other:
        names = f"was trained on {trained_on!r} and is loaded on {str(base_model)!r}"
        log.warning("%s %s: the shapes fit; make sure that it is the same model", folder, names)
    add_lora(model, config)
    tensors = adapter_tensors(model)
    with torch.no_grad():
        for name, tensor in weights.read_tensors([folder / ADAPTER]):
            tensors[name].copy_(tensor)
