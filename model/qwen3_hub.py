"""Qwen3 in and out of Hugging Face's layout: config.json and safetensors in one folder."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from model import weights
from model.layers import Linear
from model.qwen3 import Qwen3, Qwen3Config

# Options that Qwen3 fixes, and their allowed values, as weights.check_fields takes them. The rotary fields and
# layer_types are checked apart. attention_dropout is not read: it belongs to someone else's training.
FIXED = dict(
    hidden_act=("silu", "swish"),
    attention_bias=(False,),
    use_sliding_window=(False,),
    quantization_config=(None,),
    is_causal=(True,),
)


def read_config(path: str | os.PathLike) -> Qwen3Config:
    """The Qwen3Config of a config.json. Raises ValueError for another model_type, for a missing field, and for an
    option that changes the function and is not supported."""
    path = Path(path)
    fields = weights.read_json(path)
    if fields.get("model_type") != "qwen3":
        raise ValueError(f"{path}: model_type={fields.get('model_type')!r}; expected 'qwen3', the dense family")
    known = [field.name for field in dataclasses.fields(Qwen3Config)]
    if fields.get("num_key_value_heads", 0) is None:  # as in transformers: null means as many as there are heads
        fields["num_key_value_heads"] = fields.get("num_attention_heads")
    weights.check_fields(path, fields, known[:6], FIXED)
    if other := set(fields.get("layer_types") or []) - {"full_attention"}:
        raise ValueError(f"{path}: layer_types holds {sorted(other)}; only 'full_attention' is supported")
    values = {name: fields[name] for name in known if name in fields}
    values["rope_theta"] = _rope_theta(path, fields)
    try:
        return Qwen3Config(**values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _rope_theta(path: Path, fields: dict) -> float:
    """The rotary base from either layout: rope_theta beside rope_scaling, or both within rope_parameters."""
    found = [fields["rope_theta"]] if "rope_theta" in fields else []
    for name in ("rope_scaling", "rope_parameters"):
        rope = fields.get(name)
        if rope is None:
            continue
        if not isinstance(rope, dict) or rope.get("rope_type", rope.get("type", "default")) != "default":
            raise ValueError(f"{path}: {name}={rope!r} is not supported; expected rope_type 'default'")
        if unknown := set(rope) - {"rope_type", "type", "rope_theta"}:
            raise ValueError(f"{path}: {name} holds {sorted(unknown)}, not supported; expected rope_theta alone")
        if "rope_theta" in rope:
            found.append(rope["rope_theta"])
    if any(theta != found[0] for theta in found):
        raise ValueError(f"{path} gives rope_theta as {' and as '.join(map(repr, found))}; expected one value")
    return found[0] if found else Qwen3Config.rope_theta


def _plain_parameters(config: Qwen3Config) -> dict[str, Tensor]:
    """Every parameter of the plain model, without values, under Hugging Face's name."""
    with torch.device("meta"):
        parameters = Qwen3(config).named_parameters()
    return {name if name.startswith("lm_head.") else "model." + name: p for name, p in parameters}


def load_qwen3(
    folder_or_hub_id: str | os.PathLike,
    dtype: torch.dtype = torch.float32,
    param_dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    convert: Callable[[str, Tensor], nn.Module] | None = None,
) -> Qwen3:
    """A Qwen3 from a folder in Hugging Face's layout, or from a model's name on the hub ("Qwen/Qwen3-0.6B").

    ``dtype`` is the activations', ``param_dtype`` the parameters' (``dtype`` if None; pass fp32 for masters to train).
    Tensors go one by one from the mapped files to ``device``. ``convert(name, tensor)`` is called for the weight
    [out, in] of each linear layer within the blocks, in the file's dtype, on the CPU; the module it returns takes the
    layer's place. Raises ValueError, before any tensor is read, for a config or tensors that do not fit, damaged or
    missing files, and a hub that cannot be reached."""
    folder = weights.folder_of(folder_or_hub_id)
    config = read_config(folder / weights.CONFIG)
    with torch.device("meta"):
        model = Qwen3(config, dtype)
    expected, paths, head = _plain_parameters(config), weights.weight_files(folder), None
    found = weights.read_shapes(paths)
    # A tied head may be saved beside the embedding. It has to be the same, and is compared once both were read.
    if config.tie_word_embeddings and found.get("lm_head.weight") == expected["model.embed_tokens.weight"].shape:
        del found["lm_head.weight"]
    weights.check_shapes(found, expected, f"{folder} does not hold the Qwen3 of its config")
    for name, tensor in weights.read_tensors(paths):
        if name not in expected:
            head = tensor.clone()
            continue
        name = name.removeprefix("model.")
        path, _, attribute = name.rpartition(".")
        if convert is not None and path.startswith("layers.") and isinstance(model.get_submodule(path), Linear):
            model.set_submodule(path, convert(name, tensor))
        else:
            # A copy, even where nothing changes: the tensor is a view of the file.
            kept = tensor.to(device=device, dtype=param_dtype or dtype, copy=True)
            setattr(model.get_submodule(path), attribute, nn.Parameter(kept))
    if head is not None and not torch.equal(head.to(device, model.head_weight.dtype), model.head_weight):
        raise ValueError(f"{folder}: lm_head.weight differs from embed_tokens.weight, but its config ties the two")
    return model


@torch.no_grad()
def save_qwen3(
    model: Qwen3,
    folder: str | os.PathLike,
    tokenizer_files: dict[str, bytes] | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes ``model`` to ``folder`` as transformers' Qwen3ForCausalLM reads it, in ``dtype`` (None: its embedding's).

    This is also merge-and-export: each linear layer is written as the one matrix it computes with, a LoRA layer as base
    + scale * B A summed in fp32 before the cast, an NF4 base as its dequantised values. At most one shard is held
    beside the model. ``tokenizer_files`` (name -> content) go beside it. Raises ValueError, before anything is written,
    for file names that are the model's own and for a folder with weights that this export would not replace."""
    folder, dtype = Path(folder), dtype or model.embed_tokens.weight.dtype
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes={max_shard_bytes}: expected a positive number of bytes")
    fields = dict(architectures=["Qwen3ForCausalLM"], model_type="qwen3") | dataclasses.asdict(model.config)
    fields |= {name: allowed[0] for name, allowed in FIXED.items() if allowed[0] is not None} | dict(rope_scaling=None)
    plain = _plain_parameters(model.config)

    def tensor_of(name: str) -> Tensor:
        path, _, attribute = name.removeprefix("model.").rpartition(".")
        module = model.get_submodule(path)
        return module.dense(dtype) if hasattr(module, "dense") else getattr(module, attribute)

    old, size = {path.name for path in folder.glob("*.safetensors")}, sum(p.numel() for p in plain.values())
    if old - {weights.WEIGHTS} or (old and size * dtype.itemsize > max_shard_bytes):
        raise ValueError(f"{folder} already holds weights, {min(old)}; choose a new folder for the export")
    weights.write_model(folder, fields, dtype, plain, tokenizer_files, tensor_of, max_shard_bytes)
