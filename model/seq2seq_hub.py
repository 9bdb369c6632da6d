"""BART and PEGASUS in and out of Hugging Face's layout: config.json and safetensors in one folder.

Nothing here needs transformers; reading a model by its name on the hub needs huggingface_hub.
"""

import json
import os
import pickle
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor

from model.gpt2_hub import CONFIG, INDEX, WEIGHTS, _folder, _read_json
from model.seq2seq import SHAPE, TOKEN_IDS, Seq2Seq, Seq2SeqConfig, sinusoids
from model.weights import read_tensors, staged, weight_files, write_tensors

ARCHITECTURES = dict(bart="BartForConditionalGeneration", pegasus="PegasusForConditionalGeneration")

# Options of older config.json files that the kind of model settles; another value is another function.
SETTLED = dict(
    bart=dict(
        normalize_before=False, normalize_embedding=True, add_final_layer_norm=False, static_position_embeddings=False
    ),
    pegasus=dict(
        normalize_before=True, normalize_embedding=False, add_final_layer_norm=True, static_position_embeddings=True
    ),
)

BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
TIED = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
POSITIONS = ("encoder.embed_positions.weight", "decoder.embed_positions.weight")
VERSIONS = ("encoder.version", "decoder.version")  # markers that fairseq's conversion left in some files


def load_seq2seq(
    folder_or_hub_id: str | os.PathLike,
    dtype: torch.dtype = torch.float32,
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
    activation_dropout: float = 0.0,
) -> Seq2Seq:
    """A BART or PEGASUS from a folder in Hugging Face's layout, or from its name on the hub
    ("facebook/bart-base"): safetensors, or pytorch_model.bin (read without running code) where a folder
    has only that.

    Parameters come as fp32 masters on the CPU; ``dtype`` is that of the activations; dropout is the
    caller's, as the rates in config.json belong to someone else's training. Names with or without the
    "model." prefix are read (the published bart-base has none); a file without final_logits_bias means
    no bias, and one with only zeros too. Raises ValueError, naming what is wrong, for options that are not
    supported, for missing, unexpected or misshapen tensors, for untied embeddings, and for files that
    are missing or damaged.
    """
    folder = _folder(folder_or_hub_id)
    rates = dict(dropout=dropout, attention_dropout=attention_dropout, activation_dropout=activation_dropout)
    options = _read_options(folder / CONFIG) | rates
    tensors = {}
    for name, tensor in _weights(folder, str(folder_or_hub_id)).items():
        name = name.removeprefix("model.")
        if name not in VERSIONS:
            tensors[name] = tensor
    for name in TIED:
        tied = tensors.pop(name, None)
        if tied is not None and not torch.equal(tied, tensors.setdefault("shared.weight", tied)):
            raise ValueError(f"{folder}: {name} differs from shared.weight; the model here ties the two")
    bias = tensors.get("final_logits_bias")
    if bias is not None and not bias.any():
        del tensors["final_logits_bias"]
    config = Seq2SeqConfig(**options, logits_bias="final_logits_bias" in tensors)
    if config.kind == "pegasus":
        _check_sinusoids(tensors, config, folder)
    with torch.device("meta"):
        model = Seq2Seq(config, dtype)
    _check_names(tensors, model.state_dict(), folder)
    # Copies, even where nothing changes: the tensors are views of the file.
    model.load_state_dict({name: t.float().clone() for name, t in tensors.items()}, assign=True)
    if config.kind == "pegasus":  # not in the state_dict
        for stack in (model.encoder, model.decoder):
            stack.positions = sinusoids(config.max_position_embeddings, config.d_model)
    return model


def _check_names(tensors: dict[str, Tensor], expected: dict[str, Tensor], folder: Path) -> None:
    wrong = []
    if missing := [name for name in expected if name not in tensors]:
        wrong.append("missing " + ", ".join(missing))
    if unexpected := [name for name in tensors if name not in expected]:
        wrong.append("unexpected " + ", ".join(unexpected))
    for name in expected:
        if name in tensors and tensors[name].shape != expected[name].shape:
            wrong.append(f"{name} is {tuple(tensors[name].shape)} instead of {tuple(expected[name].shape)}")
    if wrong:
        raise ValueError(f"{folder} does not hold the model of its config: " + "; ".join(wrong))


def _check_sinusoids(tensors: dict[str, Tensor], config: Seq2SeqConfig, folder: Path) -> None:
    """Takes the position tables out of ``tensors``: some files hold them, ours are computed."""
    table = sinusoids(config.max_position_embeddings, config.d_model)
    for name in POSITIONS:
        saved = tensors.pop(name, table)
        # 2^-8 is the step of bf16 below 1: what a table saved in half precision may be off by.
        if saved.shape != table.shape or not torch.allclose(saved.float(), table, rtol=0, atol=2**-8):
            raise ValueError(f"{folder}: {name} is not the sinusoidal table that PEGASUS uses")


def _read_options(path: Path) -> dict:
    content = _read_json(path)
    kind = content.get("model_type")
    if kind not in TOKEN_IDS:
        raise ValueError(f"{path}: model_type={kind!r}; expected 'bart' or 'pegasus'")
    if missing := [name for name in (*SHAPE, "vocab_size") if name not in content]:
        raise ValueError(f"{path} does not say {', '.join(missing)}")
    for name, value in (SETTLED[kind] | dict(tie_word_embeddings=True, is_encoder_decoder=True)).items():
        if content.get(name, value) != value:
            raise ValueError(f"{path}: {name}={content[name]!r} is not supported in a {kind}; expected {value!r}")
    options = dict(kind=kind) | TOKEN_IDS[kind]
    names = [field.name for field in fields(Seq2SeqConfig) if field.name not in ("kind", "logits_bias")]
    return options | {name: content[name] for name in names if name in content and "dropout" not in name}


def _weights(folder: Path, name: str) -> dict[str, Tensor]:
    if (folder / WEIGHTS).exists() or (folder / INDEX).exists():
        return dict(read_tensors(weight_files(folder)))
    if not Path(name).is_dir():  # from the hub, and there without safetensors
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(name, allow_patterns=[BIN, BIN_INDEX, "pytorch_model-*.bin"]))
        except Exception as error:  # network, access, disk: all have the same way out
            reason = str(error).strip().split("\n")[0]
            raise ValueError(f"the hub gave no weights of {name} ({reason}); pass a local folder") from error
    if (folder / BIN).exists():
        files = [BIN]
    elif (folder / BIN_INDEX).exists():
        shards = _read_json(folder / BIN_INDEX).get("weight_map")
        if not isinstance(shards, dict) or not all(file == os.path.basename(file) for file in shards.values()):
            raise ValueError(f"{folder / BIN_INDEX}: expected a weight_map from tensors to files of the same folder")
        files = sorted(set(shards.values()))
    else:
        raise ValueError(f"{folder} has none of {WEIGHTS}, {INDEX} and {BIN}; other formats are not read")
    tensors = {}
    for file in files:
        try:
            content = torch.load(folder / file, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            reason = str(error).strip().split("\n")[0]
            raise ValueError(f"{folder / file} is damaged, missing, or more than plain tensors: {reason}") from error
        if not isinstance(content, dict) or not all(isinstance(t, Tensor) for t in content.values()):
            raise ValueError(f"{folder / file}: expected names and tensors")
        tensors |= content
    return tensors


def save_seq2seq(model: Seq2Seq, folder: str | os.PathLike, extra_files: dict[str, bytes] | None = None) -> None:
    """Writes ``model`` as transformers' BartForConditionalGeneration or PegasusForConditionalGeneration
    reads it, in its parameters' dtype; ``extra_files`` (name -> content, a tokenizer's) go beside it.

    A new ``folder`` appears whole or not at all; in one that exists each file is replaced whole,
    config.json last. Raises ValueError for arguments that cannot make a valid folder, before anything is
    written.
    """
    folder, config, files = Path(folder), model.config, extra_files or {}
    for name, content in files.items():
        if name != os.path.basename(name) or name in ("", ".", "..", WEIGHTS, INDEX, CONFIG):
            raise ValueError(f"extra file {name!r}: expected a plain file name that is not one of the model's own")
        if not isinstance(content, bytes):
            raise ValueError(f"extra file {name!r} holds {type(content).__name__}: expected bytes")
    dtype = model.shared.weight.dtype
    state = model.state_dict()
    bias = state.pop("final_logits_bias", torch.zeros(1, config.vocab_size))
    if config.kind == "pegasus":
        state |= {name: sinusoids(config.max_position_embeddings, config.d_model) for name in POSITIONS}
    tensors = {f"model.{name}": t for name, t in state.items()} | dict(final_logits_bias=bias)
    sizes = {name: t.numel() * dtype.itemsize for name, t in tensors.items()}

    content = {field.name: getattr(config, field.name) for field in fields(config)}
    del content["kind"], content["logits_bias"]
    content |= dict(model_type=config.kind, architectures=[ARCHITECTURES[config.kind]], is_encoder_decoder=True)
    content |= dict(tie_word_embeddings=True, forced_eos_token_id=config.eos_token_id)
    content |= dict(torch_dtype=str(dtype).removeprefix("torch."))
    with staged(folder, last=CONFIG) as temporary:
        write_tensors(temporary, sizes, lambda name: tensors[name].to(dtype), sum(sizes.values()))
        for name, data in files.items():
            (temporary / name).write_bytes(data)
        (temporary / CONFIG).write_text(json.dumps(content, indent=2) + "\n")
