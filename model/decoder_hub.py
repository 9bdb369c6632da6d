"""Decoders in and out of Hugging Face's layout: config.json and safetensors in one folder."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from model import weights
from model.decoder import FAMILIES, Decoder, DecoderConfig
from model.gguf_hub import GGUF, is_gguf
from model.layers import VALID, Linear
from schedules.textlines import read_bytes, shown

# Options that change the function and are not built, and their allowed values, as weights.check_fields takes them: of
# all families, and of some. The rotary fields, layer_types and Mistral's window are checked apart. Dropout is not read:
# it belongs to someone else's training.
FIXED = dict(
    hidden_act=("silu", "swish"),
    use_sliding_window=(False,),
    quantization_config=(None,),
    is_causal=(True,),
    partial_rotary_factor=(None, 1),
)
NO_BIAS = {"mistral": ("attention_bias", "mlp_bias"), "qwen2": ("mlp_bias",), "qwen3": ("mlp_bias",)}
# What transformers takes for a field that a config.json leaves out, where it is not DecoderConfig's default.
ABSENT = {
    "llama": dict(max_position_embeddings=2048, bos_token_id=1, eos_token_id=2),
    "mistral": dict(max_position_embeddings=131072, bos_token_id=1, eos_token_id=2),
    "smollm3": dict(rope_theta=2e6, tie_word_embeddings=True, bos_token_id=128000, eos_token_id=128001),
}
UNREAD = "rotary_emb.inv_freq"  # tensors of old Llamas that follow from the config
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
MISTRAL_WINDOW = 4096  # of a mistral that does not say its sliding_window


def read_config(path: str | os.PathLike) -> DecoderConfig:
    """The DecoderConfig of a config.json. Raises ValueError for another model_type, for a missing field, and for an
    option that changes the function and is not supported."""
    path = Path(path)
    fields = weights.read_json(path)
    with weights.kinds_of(path):
        return _config_of(fields, path)


def _config_of(fields: dict, path: Path) -> DecoderConfig:
    family = fields.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"{path}: model_type={family!r}; expected one of {', '.join(FAMILIES)}")
    # As in transformers: null means as many as there are heads, which Llamas of before 2023 do not say at all.
    if fields.get("num_key_value_heads", None if family == "llama" else 0) is None:
        fields["num_key_value_heads"] = fields.get("num_attention_heads")
    known = [field.name for field in dataclasses.fields(DecoderConfig)]
    weights.check_fields(path, fields, known[:6], FIXED | dict.fromkeys(NO_BIAS.get(family, ()), (False,)))
    if other := set(fields.get("layer_types") or []) - {"full_attention"}:
        raise ValueError(f"{path}: layer_types holds {sorted(other)}; only 'full_attention' is supported")
    values = ABSENT.get(family, {}) | {name: fields[name] for name in known if name in fields}
    values["rope_scaling"] = None
    if values.get("head_dim") is None:
        values.pop("head_dim", None)
        heads, D = fields["num_attention_heads"], fields["hidden_size"]
        if family != "qwen3" and isinstance(heads, int) and isinstance(D, int) and heads > 0:
            values["head_dim"] = D // heads
    if family in ("qwen2", "mistral"):  # read by no one there; Qwen2's own biases come with its name
        values.pop("attention_bias", None)
    interval = fields.get("no_rope_layer_interval", 4)
    if family != "smollm3":
        values.pop("no_rope_layers", None)
    elif values.get("no_rope_layers") is None and VALID["an integer from 1 to 10,000"](fields["num_hidden_layers"]):
        values["no_rope_layers"] = [int((i + 1) % interval != 0) for i in range(fields["num_hidden_layers"])]
    try:
        config = DecoderConfig(**values)
        config = dataclasses.replace(config, **_rope(fields, config))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    window = fields.get("sliding_window", MISTRAL_WINDOW) if family == "mistral" else None
    if window is not None and window < config.max_position_embeddings:
        raise ValueError(
            f"{path}: sliding_window={window} of {config.max_position_embeddings} positions is not supported; expected "
            f"null, or max_position_embeddings of at most {window}"
        )
    return config


def _rope(fields: dict, config: DecoderConfig) -> dict:
    """rope_theta and rope_scaling from either layout: rope_theta beside rope_scaling, or both within rope_parameters.
    Older files call rope_type "type"."""
    thetas = [fields["rope_theta"]] if fields.get("rope_theta") is not None else []
    found = []
    for name in ("rope_scaling", "rope_parameters"):
        rope = fields.get(name)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            raise ValueError(f"{name}={rope!r}: expected an object with rope_type")
        rope = dict(rope)
        old = rope.pop("type", "default")
        rope.setdefault("rope_type", old)
        if (theta := rope.pop("rope_theta", None)) is not None:
            thetas.append(theta)
        if rope.get("partial_rotary_factor") == 1:
            del rope["partial_rotary_factor"]
        if rope["rope_type"] == "default":
            if unknown := sorted(set(rope) - {"rope_type"}):
                raise ValueError(f"{name} holds {shown(unknown)}, not supported with rope_type 'default'")
            continue
        if rope["rope_type"] in ("llama3", "yarn"):  # as transformers reads one that does not say
            rope.setdefault("original_max_position_embeddings", config.max_position_embeddings)
        found.append(rope)
    if any(theta != thetas[0] for theta in thetas):
        raise ValueError(f"rope_theta is given as {' and as '.join(map(repr, thetas))}; expected one value")
    if any(rope != found[0] for rope in found):
        raise ValueError("rope_scaling and rope_parameters differ; expected one of them")
    return dict(rope_theta=thetas[0] if thetas else config.rope_theta, rope_scaling=found[0] if found else None)


def config_fields(config: DecoderConfig) -> dict:
    """The content of config.json, as transformers reads it."""
    classes = {"qwen2": "Qwen2", "qwen3": "Qwen3", "smollm3": "SmolLM3"}
    name = classes.get(config.model_type, config.model_type.capitalize())
    fields = dict(architectures=[f"{name}ForCausalLM"]) | dataclasses.asdict(config)
    fields |= {name: allowed[0] for name, allowed in FIXED.items() if allowed[0] is not None}
    if config.model_type == "mistral":
        fields["sliding_window"] = None  # missing, it would be MISTRAL_WINDOW
    if config.no_rope_layers is None:
        del fields["no_rope_layers"]
    else:
        fields["pad_token_id"] = None  # missing, it would be 128004, whatever the vocabulary
    return fields


def plain_parameters(config: DecoderConfig) -> dict[str, Tensor]:
    """Every parameter of the plain model, without values, under Hugging Face's name."""
    with torch.device("meta"):
        parameters = Decoder(config).named_parameters()
    return {name if name.startswith("lm_head.") else "model." + name: p for name, p in parameters}


def load_decoder(
    folder_or_hub_id: str | os.PathLike,
    dtype: torch.dtype = torch.float32,
    param_dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    convert: Callable[[str, Tensor], nn.Module] | None = None,
) -> Decoder:
    """A decoder from a folder in Hugging Face's layout, a model's name on the hub ("Qwen/Qwen3-0.6B"), or a GGUF file.

    ``dtype`` is the activations', ``param_dtype`` the parameters' (``dtype`` if None; pass fp32 for masters to train).
    Tensors go one by one from the mapped files to ``device``. ``convert(name, tensor)`` is called for the weight
    [out, in] of each linear layer within the blocks, in the file's dtype, on the CPU; the module it returns takes the
    layer's place. Raises ValueError, before any tensor is read, for a config or tensors that do not fit, damaged or
    missing files, and a hub that cannot be reached."""
    if is_gguf(folder_or_hub_id):
        folder, file = Path(folder_or_hub_id), GGUF(folder_or_hub_id)
        config, found, tensors = file.config, dict(file.shapes), file.tensors()
    else:
        folder = weights.folder_of(folder_or_hub_id)
        config, paths = read_config(folder / weights.CONFIG), weights.weight_files(folder)
        found, tensors = weights.read_shapes(paths), weights.read_tensors(paths)
    found = {name: shape for name, shape in found.items() if not name.endswith(UNREAD)}
    says = f"{folder} does not hold the {config.model_type} of its config"
    weights.check_layers(found, config.num_hidden_layers, says)
    expected, head = plain_parameters(config), None
    with torch.device("meta"):
        model = Decoder(config, dtype)
    # A tied head may be saved beside the embedding. It has to be the same, and is compared once both were read.
    if config.tie_word_embeddings and found.get("lm_head.weight") == expected["model.embed_tokens.weight"].shape:
        del found["lm_head.weight"]
    weights.check_shapes(found, expected, says)
    for name, tensor in tensors:
        if name.endswith(UNREAD):
            continue
        if name not in expected:
            head = tensor.clone()
            continue
        name = name.removeprefix("model.")
        path, _, attribute = name.rpartition(".")
        layer = model.get_submodule(path)
        if convert is not None and path.startswith("layers.") and isinstance(layer, Linear) and attribute == "weight":
            converted = convert(name, tensor)
            converted.bias = layer.bias  # read already, or still to come
            model.set_submodule(path, converted)
        else:
            # A copy, even where nothing changes: the tensor is a view of the file.
            kept = tensor.to(device=device, dtype=param_dtype or dtype, copy=True)
            setattr(layer, attribute, nn.Parameter(kept))
    if head is not None and not torch.equal(head.to(device, model.head_weight.dtype), model.head_weight):
        raise ValueError(f"{folder}: lm_head.weight differs from embed_tokens.weight, but its config ties the two")
    return model


def config_and_tokenizer(folder_or_hub_id: str | os.PathLike) -> tuple[DecoderConfig, dict[str, bytes]]:
    """The config, and the tokenizer's files that there are (name -> content), from where ``load_decoder`` reads."""
    if is_gguf(folder_or_hub_id):
        file = GGUF(folder_or_hub_id)
        return file.config, file.tokenizer_files()
    config = read_config(weights.folder_of(folder_or_hub_id) / weights.CONFIG)
    folder = weights.folder_of(folder_or_hub_id, TOKENIZER)
    return config, {name: read_bytes(folder / name) for name in TOKENIZER if (folder / name).is_file()}


def plain_tensor(model: Decoder, name: str, dtype: torch.dtype) -> Tensor:
    """The value of one of ``plain_parameters``: of a linear layer the one matrix that it computes with."""
    path, _, attribute = name.removeprefix("model.").rpartition(".")
    module = model.get_submodule(path)
    dense = attribute == "weight" and hasattr(module, "dense")
    return module.dense(dtype) if dense else getattr(module, attribute)


@torch.no_grad()
def save_decoder(
    model: Decoder,
    folder: str | os.PathLike,
    tokenizer_files: dict[str, bytes] | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes ``model`` to ``folder`` as transformers reads it, in ``dtype`` (None: its embedding's).

    This is also merge-and-export: each linear layer is written as the one matrix it computes with, a LoRA layer as base
    + scale * B A summed in fp32 before the cast, an NF4 base as its dequantised values. At most one shard is held
    beside the model. ``tokenizer_files`` (name -> content) go beside it. Raises ValueError, before anything is written,
    for file names that are the model's own and for a folder with weights that this export would not replace."""
    folder, dtype = Path(folder), dtype or model.embed_tokens.weight.dtype
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes={max_shard_bytes}: expected a positive number of bytes")
    plain = plain_parameters(model.config)

    old, size = {path.name for path in folder.glob("*.safetensors")}, sum(p.numel() for p in plain.values())
    if old - {weights.WEIGHTS} or (old and size * dtype.itemsize > max_shard_bytes):
        raise ValueError(f"{folder} already holds weights, {min(old)}; choose a new folder for the export")
    weights.write_model(
        folder,
        config_fields(model.config),
        dtype,
        plain,
        tokenizer_files,
        lambda name: plain_tensor(model, name, dtype),
        max_shard_bytes,
    )
