"""GPT-2 in and out of Hugging Face's layout: config.json and safetensors in one folder.

    python -m model.gpt2_hub RUN FOLDER

exports a run of train_lm.py, or one of its checkpoints, with its tokenizer, for transformers' GPT2LMHeadModel and
AutoTokenizer.

Our parameters carry Hugging Face's names without the "transformer." prefix. Hugging Face keeps OpenAI's Conv1D layout,
[in, out], for every matrix. Ours are [out, in] where they do not widen (gpt2.Linear); those are transposed on the way.
"""

import sys

if not __package__:  # a file by its name finds no package
    print("python -m model.gpt2_hub: error: type it like this, in the folder that holds model/", file=sys.stderr)
    sys.exit(2)

import dataclasses
import os
import re
from pathlib import Path

import torch
from torch import Tensor

from model import weights
from model.gpt2 import GPT2, GPT2Config
from runtime.checkpoint import load_checkpoint
from runtime.cli import Parser, user_errors
from schedules.commandline import alive
from schedules.textlines import read_bytes

# Our fields beside Hugging Face's.
HF_FIELDS = dict(vocab_size="vocab_size", block_size="n_positions", n_layer="n_layer", n_head="n_head", n_embd="n_embd")

# Options that GPT2 fixes, and their allowed values, as weights.check_fields takes them. n_inner is checked apart, and
# dropout does not change the function.
FIXED = dict(
    layer_norm_epsilon=(1e-5,),
    scale_attn_weights=(True,),
    scale_attn_by_inverse_layer_idx=(False,),
    add_cross_attention=(False,),
    tie_word_embeddings=(True,),
)

# Causal masks that older versions of transformers saved beside the weights.
MASKS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")
TOKENIZER = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json")
TRANSPOSED = re.compile(r"h\.\d+\.(attn|mlp)\.c_proj\.weight")


def save_hf(
    model: GPT2, folder: str | os.PathLike, tokenizer_files: dict[str, bytes] | None = None, eos_id: int | None = None
) -> None:
    """Writes ``model`` as transformers' GPT2LMHeadModel reads it, in its parameters' dtype (``weights.write_model``).

    ``tokenizer_files`` (name -> content) go beside it. ``eos_id`` becomes bos_token_id and eos_token_id, as in GPT-2.
    Raises ValueError, before anything is written, for arguments that cannot make a valid folder."""
    config = model.config
    if eos_id is not None and not 0 <= eos_id < config.vocab_size:
        raise ValueError(f"eos_id={eos_id}: expected a token id below vocab_size={config.vocab_size}")
    tensors = {"transformer." + name: p for name, p in _transposed(model.state_dict()).items()}
    fields = dict(architectures=["GPT2LMHeadModel"], model_type="gpt2")
    fields |= {theirs: getattr(config, ours) for ours, theirs in HF_FIELDS.items()}
    fields |= {name: allowed[0] for name, allowed in FIXED.items()} | dict(n_inner=None)
    fields |= dict(activation_function=config.activation_function)
    fields |= dict(embd_pdrop=config.dropout, attn_pdrop=config.dropout, resid_pdrop=config.dropout)
    fields |= dict(bos_token_id=eos_id, eos_token_id=eos_id)
    weights.write_model(folder, fields, model.wte.weight.dtype, tensors, tokenizer_files)


def load_hf(folder_or_hub_id: str | os.PathLike, dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> GPT2:
    """A GPT2 from a folder in Hugging Face's layout, or from a model's name on the hub ("gpt2").

    Parameters come as fp32 masters on the CPU; ``dtype`` is the activations'. ``dropout`` is the caller's: the rates in
    config.json belong to someone else's training. Raises ValueError, naming what is wrong, for options that GPT2 does
    not have, for tensors that do not fit, for missing or damaged files, and for a hub that cannot be reached."""
    folder = weights.folder_of(folder_or_hub_id)
    with weights.kinds_of(folder / weights.CONFIG):
        config = _read_config(folder / weights.CONFIG, dropout)
    tensors = {name.removeprefix("transformer."): t for name, t in weights.read_tensors(weights.weight_files(folder))}
    tensors = {name: t for name, t in tensors.items() if not MASKS.fullmatch(name)}
    weights.drop_tied(tensors, "wte.weight", ["lm_head.weight"], folder)
    says = f"{folder} does not hold the GPT-2 of its config"
    weights.check_layers(tensors, config.n_layer, says)
    with weights.kinds_of(folder / weights.CONFIG), torch.device("meta"):
        model = GPT2(config, dtype)
    weights.check_shapes(tensors, _transposed(model.state_dict()), says)
    # Copies, even where nothing changes: the tensors are views of the file.
    copies = {name: t.float().clone(memory_format=torch.contiguous_format) for name, t in _transposed(tensors).items()}
    model.load_state_dict(copies, assign=True)
    return model


def load_start(
    start: str | os.PathLike, dtype: torch.dtype = torch.float32, dropout: float = 0.0
) -> tuple[GPT2, dict[str, bytes]]:
    """A GPT2 to start a training from, and its tokenizer's files, {} where there are none.

    ``start``: a run of ours (its folder, of which best.pt is taken, or one of its checkpoints), else as in `load_hf`.
    Raises ValueError for what is no GPT-2."""
    path = Path(start)
    path = path / "best.pt" if (path / "best.pt").is_file() else path
    if not path.is_file():
        model, folder = load_hf(start, dtype, dropout), weights.folder_of(start)
        return model, {name: read_bytes(folder / name) for name in TOKENIZER if (folder / name).is_file()}
    kept = load_checkpoint(path)
    try:
        model = GPT2(GPT2Config(**kept["model_config"] | {"dropout": dropout}), dtype)
        weights.check_shapes(kept["model"], model.state_dict(), f"{path} does not hold the GPT-2 of its config")
        model.load_state_dict(kept["model"])
        return model, kept["tokenizer"]["files"]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no checkpoint of a GPT-2 of ours ({type(error).__name__}: {error})") from None


def _read_config(path: Path, dropout: float) -> GPT2Config:
    fields = weights.read_json(path)
    if fields.get("model_type") != "gpt2":
        raise ValueError(f"{path}: model_type={fields.get('model_type')!r}; expected 'gpt2'")
    weights.check_fields(path, fields, HF_FIELDS.values(), FIXED)
    if fields.get("n_inner") not in (None, 4 * fields["n_embd"]):
        raise ValueError(f"{path}: n_inner={fields['n_inner']!r} is not supported; expected 4 * n_embd")
    shape = {ours: fields[theirs] for ours, theirs in HF_FIELDS.items()}
    try:
        return GPT2Config(**shape, dropout=dropout, activation_function=fields.get("activation_function", "gelu_new"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _transposed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """From our layout to Hugging Face's and, being its own inverse, back."""
    return {name: t.t() if TRANSPOSED.fullmatch(name) else t for name, t in state.items()}


def export(checkpoint: str | os.PathLike, folder: str | os.PathLike) -> Path:
    """Writes a training checkpoint to ``folder`` in Hugging Face's layout. Of a run's folder it is best.pt, else
    last.pt. The file that was taken.

    The checkpoint is a ``torch.save`` dict with "model" (GPT2's state_dict), "model_config" (GPT2Config's fields) and
    optionally "tokenizer" (dict of "files", name -> bytes, and "eos_id"). A stranger's file cannot run code. Raises
    ValueError, before anything is written, for a file that is not that."""
    path, content, tokenizer = weights.read_checkpoint(checkpoint)
    try:
        config = GPT2Config(**content["model_config"])
    except TypeError as error:
        fields = ", ".join(f.name for f in dataclasses.fields(GPT2Config))
        raise ValueError(f"{path}: 'model_config' must hold the fields {fields}: {error}") from error
    with torch.device("meta"):
        model = GPT2(config)
    weights.check_shapes(content["model"], model.state_dict(), f"{path} does not hold the GPT-2 of its config")
    model.load_state_dict(content["model"], assign=True)
    save_hf(model, folder, tokenizer.get("files"), tokenizer.get("eos_id"))
    return path


@alive()
def main(argv: list[str] | None = None) -> int:
    about = "Exports a GPT-2 of train_lm.py to a folder in Hugging Face's layout, with its tokenizer."
    parser = Parser(prog="python -m model.gpt2_hub", usage=None, description=about)
    parser.add_argument("run", help="a run's folder (best.pt, else last.pt), or one of its checkpoints")
    parser.add_argument("folder", help="folder to write")
    given = parser.parse_args(argv)
    with user_errors():
        taken = export(given.run, given.folder)
    print(f"wrote {given.folder} from {taken}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
