"""GPT-2 in and out of Hugging Face's layout: config.json and safetensors in one folder.

    python -m model.gpt2_hub CHECKPOINT.pt FOLDER

exports a training checkpoint, its tokenizer with it, so that transformers' GPT2LMHeadModel and
AutoTokenizer load FOLDER. Nothing here needs transformers; reading a model by its name on the hub
needs huggingface_hub.

Our parameters carry Hugging Face's names without the "transformer." prefix. Hugging Face keeps
OpenAI's Conv1D layout, [in, out], for every matrix; ours are [out, in] where they do not widen
(gpt2.Linear), and those are transposed on the way.
"""

import dataclasses
import json
import os
import pickle
import re
import shutil
import sys
from pathlib import Path

import torch
from torch import Tensor

from model.gpt2 import GPT2, GPT2Config

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"

# Our fields beside Hugging Face's.
SHAPE = dict(vocab_size="vocab_size", block_size="n_positions", n_layer="n_layer", n_head="n_head", n_embd="n_embd")

# What GPT2 fixes: the values of each option that mean the same function, the first of them the default
# of transformers' GPT2Config. n_inner is checked apart, and dropout does not change the function.
FIXED = dict(
    activation_function=("gelu_new", "gelu_pytorch_tanh"),
    layer_norm_epsilon=(1e-5,),
    scale_attn_weights=(True,),
    scale_attn_by_inverse_layer_idx=(False,),
    add_cross_attention=(False,),
    tie_word_embeddings=(True,),
)

# Causal masks that older versions of transformers saved beside the weights.
BUFFERS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")
TRANSPOSED = re.compile(r"h\.\d+\.(attn|mlp)\.c_proj\.weight")


def save_hf(
    model: GPT2,
    folder: str | os.PathLike,
    tokenizer_files: dict[str, bytes] | None = None,
    eos_id: int | None = None,
) -> None:
    """Writes ``model`` to ``folder`` as transformers' GPT2LMHeadModel reads it, in its parameters' dtype.

    ``tokenizer_files`` (name -> content, such as tokenizer.json, or vocab.json and merges.txt) are
    written beside it as they are. ``eos_id`` becomes bos_token_id and eos_token_id, as in GPT-2.
    Everything is written to a temporary folder first: a new ``folder`` appears whole or not at all,
    and in one that exists each file is replaced whole, config.json last. Raises ValueError for
    arguments that cannot make a valid folder, before anything is written.
    """
    _save(model.state_dict(), model.config, Path(folder), tokenizer_files or {}, eos_id)


def _save(state: dict[str, Tensor], config: GPT2Config, folder: Path, files: dict[str, bytes], eos_id: int | None):
    from safetensors.torch import save_file

    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; expected the name of a folder to write the model to")
    if eos_id is not None and not 0 <= eos_id < config.vocab_size:
        raise ValueError(f"eos_id={eos_id}: expected a token id below vocab_size={config.vocab_size}")
    for name, content in files.items():
        if name != os.path.basename(name) or name in ("", ".", "..", WEIGHTS, INDEX, CONFIG):
            raise ValueError(f"tokenizer file {name!r}: expected a plain file name that is not one of the model's own")
        if not isinstance(content, bytes):
            raise ValueError(f"tokenizer file {name!r} holds {type(content).__name__}: expected bytes")

    tensors = {"transformer." + name: p.detach().cpu().contiguous() for name, p in _to_hf(state).items()}
    fields = dict(architectures=["GPT2LMHeadModel"], model_type="gpt2")
    fields |= {theirs: getattr(config, ours) for ours, theirs in SHAPE.items()}
    fields |= {name: allowed[0] for name, allowed in FIXED.items()} | dict(n_inner=None)
    fields |= dict(embd_pdrop=config.dropout, attn_pdrop=config.dropout, resid_pdrop=config.dropout)
    fields |= dict(bos_token_id=eos_id, eos_token_id=eos_id)
    fields |= dict(torch_dtype=str(tensors["transformer.wte.weight"].dtype).removeprefix("torch."))

    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.absolute().parent / f".{folder.absolute().name}.{os.getpid()}.tmp"
    try:
        temporary.mkdir()
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        for name, content in files.items():
            (temporary / name).write_bytes(content)
        (temporary / CONFIG).write_text(json.dumps(fields, indent=2) + "\n")
        if not folder.exists():
            os.replace(temporary, folder)
        else:
            for name in (WEIGHTS, *files, CONFIG):
                os.replace(temporary / name, folder / name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_hf(folder_or_hub_id: str | os.PathLike, dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> GPT2:
    """A GPT2 from a folder in Hugging Face's layout, or from a model's name on the hub ("gpt2").

    Parameters come as fp32 masters on the CPU whatever the files hold; ``dtype`` is that of the
    activations. ``dropout`` is the caller's: the rates in config.json, which belong to someone else's
    training, are not read. Raises ValueError, naming what is wrong, for options of config.json that
    GPT2 does not have, for missing, unexpected or misshapen tensors, for files that are missing or
    damaged, and for a hub that cannot be reached.
    """
    folder = _folder(folder_or_hub_id)
    config = _read_config(folder / CONFIG, dropout)
    tensors = {}
    for name, tensor in _read_weights(folder).items():
        name = name.removeprefix("transformer.")
        if not BUFFERS.fullmatch(name):
            tensors[name] = tensor
    head = tensors.pop("lm_head.weight", None)
    if head is not None and not torch.equal(head, tensors.setdefault("wte.weight", head)):
        raise ValueError(f"{folder}: lm_head.weight differs from wte.weight; GPT2 here ties the two")
    with torch.device("meta"):
        model = GPT2(config, dtype)
    _check_tensors(tensors, _to_hf(model.state_dict()), folder)
    model.load_state_dict({name: t.float().contiguous() for name, t in _to_hf(tensors).items()}, assign=True)
    return model


def _to_hf(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """From our layout to Hugging Face's and, being its own inverse, back."""
    return {name: t.t() if TRANSPOSED.fullmatch(name) else t for name, t in state.items()}


def _check_tensors(tensors: dict[str, Tensor], expected: dict[str, Tensor], source: str | os.PathLike) -> None:
    """Raises ValueError that names every missing, unexpected or misshapen tensor."""
    wrong = []
    if missing := [name for name in expected if name not in tensors]:
        wrong.append("missing " + ", ".join(missing))
    if unexpected := [name for name in tensors if name not in expected]:
        wrong.append("unexpected " + ", ".join(unexpected))
    for name in expected.keys() & tensors.keys():
        if tensors[name].shape != expected[name].shape:
            wrong.append(f"{name} is {tuple(tensors[name].shape)} instead of {tuple(expected[name].shape)}")
    if wrong:
        raise ValueError(f"{source} does not hold the GPT-2 of its config: " + "; ".join(wrong))


def _folder(folder_or_hub_id: str | os.PathLike) -> Path:
    """The local folder itself, or the local copy of a model on the hub."""
    folder = Path(folder_or_hub_id)
    if folder.is_dir():
        return folder
    name = str(folder_or_hub_id)
    way_out = "pass a local folder that holds config.json and model.safetensors"
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name) or folder.exists():
        raise ValueError(f"{name!r} is neither a folder nor a model's name on the hub; {way_out}")
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS, INDEX, "model-*.safetensors"]))
    except Exception as error:  # a missing package, no network, no such model, no access: all have the same way out
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"no folder {name!r} here, and the hub gave none ({reason}); {way_out}") from error


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path.parent} has no {path.name}; expected a folder in Hugging Face's layout") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object")
    return content


def _read_config(path: Path, dropout: float) -> GPT2Config:
    fields = _read_json(path)
    if fields.get("model_type") != "gpt2":
        raise ValueError(f"{path}: model_type={fields.get('model_type')!r}; expected 'gpt2'")
    if missing := [name for name in SHAPE.values() if name not in fields]:
        raise ValueError(f"{path} does not say {', '.join(missing)}")
    for name, allowed in FIXED.items():
        if fields.get(name, allowed[0]) not in allowed:
            raise ValueError(f"{path}: {name}={fields[name]!r} is not supported; expected {allowed[0]!r}")
    if fields.get("n_inner") not in (None, 4 * fields["n_embd"]):
        raise ValueError(f"{path}: n_inner={fields['n_inner']!r} is not supported; expected 4 * n_embd")
    return GPT2Config(**{ours: fields[theirs] for ours, theirs in SHAPE.items()}, dropout=dropout)


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors, or of the files that model.safetensors.index.json names."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if (folder / WEIGHTS).exists():
        files = [WEIGHTS]
    elif (folder / INDEX).exists():
        shards = _read_json(folder / INDEX).get("weight_map")
        if not isinstance(shards, dict) or not all(name == os.path.basename(name) for name in shards.values()):
            raise ValueError(f"{folder / INDEX}: expected a weight_map from tensors to files of the same folder")
        files = sorted(set(shards.values()))
    else:
        raise ValueError(f"{folder} has neither {WEIGHTS} nor {INDEX}; other formats are not read")
    tensors = {}
    for name in files:
        try:
            tensors |= load_file(folder / name)
        except FileNotFoundError:
            raise ValueError(f"{folder} lacks {name}, which {INDEX} names; copy it there") from None
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{folder / name} is damaged or no safetensors file: {error}") from error
    return tensors


def export(checkpoint: str | os.PathLike, folder: str | os.PathLike) -> None:
    """Writes a training checkpoint to ``folder`` in Hugging Face's layout.

    The checkpoint is a ``torch.save`` dict with "model" (GPT2's state_dict), "model_config"
    (GPT2Config's fields) and optionally "tokenizer" (dict of "files", name -> bytes, and "eos_id").
    It is read with ``weights_only``, so that a stranger's file cannot run code. Raises ValueError,
    before anything is written, for a file that is not that.
    """
    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{checkpoint} cannot be read as a checkpoint: {reason}") from error
    if not isinstance(content, dict) or not {"model", "model_config"} <= content.keys():
        raise ValueError(f"{checkpoint} is no training checkpoint: expected a dict with 'model' and 'model_config'")
    try:
        config = GPT2Config(**content["model_config"])
    except TypeError as error:
        fields = ", ".join(f.name for f in dataclasses.fields(GPT2Config))
        raise ValueError(f"{checkpoint}: 'model_config' must hold the fields {fields}: {error}") from error
    state, tokenizer = content["model"], content.get("tokenizer") or {}
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise ValueError(f"{checkpoint}: 'model' must hold GPT2's state_dict, names and tensors")
    if not isinstance(tokenizer, dict):
        raise ValueError(f"{checkpoint}: 'tokenizer' must hold a dict of 'files' and 'eos_id'")
    with torch.device("meta"):
        model = GPT2(config)
    _check_tensors(state, model.state_dict(), checkpoint)
    _save(state, config, Path(folder), tokenizer.get("files") or {}, tokenizer.get("eos_id"))


def main(arguments: list[str]) -> int:
    usage = "usage: python -m model.gpt2_hub CHECKPOINT.pt FOLDER"
    if arguments in (["-h"], ["--help"]):
        print(usage + "\nexports a training checkpoint to FOLDER in Hugging Face's layout")
        return 0
    if len(arguments) != 2 or any(a.startswith("-") for a in arguments):
        print(usage, file=sys.stderr)
        return 2
    try:
        export(*arguments)
    except (ValueError, OSError) as error:
        print(f"model.gpt2_hub: {error}", file=sys.stderr)
        return 2
    print(f"wrote {arguments[1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
