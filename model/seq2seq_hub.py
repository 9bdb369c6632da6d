"""BART and PEGASUS in and out of Hugging Face's layout: config.json and safetensors in one folder.

    python -m model.seq2seq_hub RUN FOLDER

exports a run of finetune_seq2seq.py, or one of its checkpoints, with its tokenizer, for transformers, and as --model.
"""

import sys

if not __package__:  # a file by its name finds no package
    print("python -m model.seq2seq_hub: error: type it like this, in the folder that holds model/", file=sys.stderr)
    sys.exit(2)

import json
import os
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor

from model import weights
from model.seq2seq import SHAPE_FIELDS, TOKEN_IDS, Seq2Seq, Seq2SeqConfig, sinusoids
from runtime.cli import Parser, user_errors
from schedules.commandline import alive
from schedules.textlines import parse_json

ARCHITECTURES = dict(bart="BartForConditionalGeneration", pegasus="PegasusForConditionalGeneration")

# Options that the kind of model fixes, and their allowed values, as weights.check_fields takes them. Several stand in
# older config.json files only.
FIXED = {
    kind: dict(
        tie_word_embeddings=(True,),
        is_encoder_decoder=(True,),
        normalize_before=(pegasus,),
        normalize_embedding=(not pegasus,),
        add_final_layer_norm=(pegasus,),
        static_position_embeddings=(pegasus,),
    )
    for kind, pegasus in (("bart", False), ("pegasus", True))
}

TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
TIED = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
POSITIONS = ("encoder.embed_positions.weight", "decoder.embed_positions.weight")
MAX_SINUSOIDS = 2**16  # positions of a PEGASUS, which has them computed
VERSIONS = ("encoder.version", "decoder.version")  # markers that fairseq's conversion left in some files


def load_seq2seq(
    folder_or_hub_id: str | os.PathLike,
    dtype: torch.dtype = torch.float32,
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
    activation_dropout: float = 0.0,
) -> Seq2Seq:
    """A BART or PEGASUS from a folder in Hugging Face's layout, or from its name on the hub ("facebook/bart-base").

    Read are safetensors, or pytorch_model.bin (without running code) where a folder has only that, with or without the
    "model." prefix of the names. A final_logits_bias that is missing or zero means none. Parameters come as fp32
    masters on the CPU; ``dtype`` is the activations'; dropout is the caller's. Raises ValueError as load_hf does."""
    folder = weights.folder_of(folder_or_hub_id)
    with weights.kinds_of(folder / weights.CONFIG):
        options = _read_options(folder / weights.CONFIG)
    tensors = {name.removeprefix("model."): t for name, t in _weights(folder, folder_or_hub_id).items()}
    tensors = {name: t for name, t in tensors.items() if name not in VERSIONS}
    weights.drop_tied(tensors, "shared.weight", TIED, folder)
    bias = tensors.get("final_logits_bias")
    if bias is not None and not bias.any():
        del tensors["final_logits_bias"]
    options |= dict(dropout=dropout, attention_dropout=attention_dropout, activation_dropout=activation_dropout)
    with weights.kinds_of(folder / weights.CONFIG), torch.device("meta"):
        config = Seq2SeqConfig(**options, logits_bias="final_logits_bias" in tensors)
        says = f"{folder} does not hold the model of its config"
        weights.check_layers(tensors, config.encoder_layers + config.decoder_layers, says)
        model = Seq2Seq(config, dtype)
    saved = {name: tensors.pop(name) for name in POSITIONS if name in tensors and config.kind == "pegasus"}
    weights.check_shapes(tensors, model.state_dict(), says)
    if config.kind == "pegasus":
        _check_sinusoids(saved, config, folder)
    # Copies, even where nothing changes: the tensors are views of the file.
    model.load_state_dict({name: t.float().clone() for name, t in tensors.items()}, assign=True)
    if config.kind == "pegasus":  # not in the state_dict
        for stack in (model.encoder, model.decoder):
            stack.positions = sinusoids(config.max_position_embeddings, config.d_model)
    return model


def _check_sinusoids(saved: dict[str, Tensor], config: Seq2SeqConfig, folder: Path) -> None:
    """``saved`` are position tables: some files hold them, ours are computed."""
    if (length := config.max_position_embeddings) > MAX_SINUSOIDS:
        raise ValueError(f"{folder}: max_position_embeddings={length:,}; expected at most {MAX_SINUSOIDS:,}")
    table = sinusoids(length, config.d_model)
    for name, found in saved.items():
        # 2^-8 is the step of bf16 below 1: what a table saved in half precision may be off by.
        if found.shape != table.shape or not torch.allclose(found.float(), table, rtol=0, atol=2**-8):
            raise ValueError(f"{folder}: {name} is not the sinusoidal table that PEGASUS uses")


def _read_options(path: Path) -> dict:
    content = weights.read_json(path)
    kind = content.get("model_type")
    if kind not in TOKEN_IDS:
        raise ValueError(f"{path}: model_type={kind!r}; expected 'bart' or 'pegasus'")
    weights.check_fields(path, content, (*SHAPE_FIELDS, "vocab_size"), FIXED[kind])
    names = [field.name for field in fields(Seq2SeqConfig) if field.name not in ("kind", "logits_bias")]
    given = {name: content[name] for name in names if name in content and "dropout" not in name}
    return dict(kind=kind) | TOKEN_IDS[kind] | given


def _weights(folder: Path, name: str | os.PathLike) -> dict[str, Tensor]:
    """Every tensor of the folder of model ``name``, from safetensors or, where there are none, from .bin files."""
    safe, pickled = (weights.WEIGHTS, weights.INDEX), (BIN, BIN_INDEX)
    if any((folder / file).exists() for file in safe):
        return dict(weights.read_tensors(weights.weight_files(folder)))
    folder = weights.folder_of(name, (*pickled, "pytorch_model-*.bin"))  # the hub was not asked for these so far
    if not any((folder / file).exists() for file in pickled):
        raise ValueError(f"{folder} has none of {', '.join(safe)} and {BIN}; other formats are not read")
    tensors = {}
    for path in weights.weight_files(folder, BIN, BIN_INDEX):
        content = weights.load_pickled(path, "is damaged, or more than plain tensors")
        if not weights.holds_tensors(content):
            raise ValueError(f"{path}: expected names and tensors")
        tensors |= weights.plain_names(content, path)
    return tensors


def save_seq2seq(model: Seq2Seq, folder: str | os.PathLike, extra_files: dict[str, bytes] | None = None) -> None:
    """Writes ``model`` as transformers' BartForConditionalGeneration or PegasusForConditionalGeneration reads it, in
    its parameters' dtype; ``extra_files`` (name -> content, a tokenizer's) go beside it. The folder appears as
    ``weights.staged`` says. Raises ValueError, before anything is written, for arguments that cannot make one."""
    config, state = model.config, model.state_dict()
    bias = state.pop("final_logits_bias", torch.zeros(1, config.vocab_size))
    if config.kind == "pegasus":
        state |= {name: sinusoids(config.max_position_embeddings, config.d_model) for name in POSITIONS}
    tensors = {f"model.{name}": t for name, t in state.items()} | dict(final_logits_bias=bias)
    content = {field.name: getattr(config, field.name) for field in fields(config)}
    del content["kind"], content["logits_bias"]
    content |= dict(model_type=config.kind, architectures=[ARCHITECTURES[config.kind]], is_encoder_decoder=True)
    content |= dict(tie_word_embeddings=True, forced_eos_token_id=config.eos_token_id)
    weights.write_model(folder, content, model.shared.weight.dtype, tensors, extra_files, what="extra file")


def export(run: str | os.PathLike, folder: str | os.PathLike) -> tuple[Path, Seq2Seq]:
    """Writes a checkpoint of finetune_seq2seq.py, or a run's best.pt, else last.pt, to ``folder``, as `load_seq2seq`
    and transformers read it, with its tokenizer. (The file that was taken, the model.)

    Raises ValueError, before anything is written, for what is none, and for a tokenizer without a tokenizer.json."""
    path, content, tokenizer = weights.read_checkpoint(run)
    with weights.kinds_of(path), torch.device("meta"):
        model = Seq2Seq(Seq2SeqConfig(**content["model_config"]))
    weights.check_shapes(content["model"], model.state_dict(), f"{path} does not hold the model of its config")
    model.load_state_dict(content["model"], assign=True)
    save_seq2seq(model, folder, _tokenizer_files(tokenizer.get("files") or {}, model.config, path))
    return path, model


def _tokenizer_files(files: dict[str, bytes], config: Seq2SeqConfig, path: Path) -> dict[str, bytes]:
    """``files`` with the tokens around a text, which a random start adds behind its vocabulary, as special ones."""
    if "tokenizer.json" not in files:
        have = ", ".join(files) or "no file"
        raise ValueError(f"{path}: its tokenizer has no tokenizer.json ({have}); only one that has is exported")
    definition, settings = (parse_json(files.get(name, b"{}"), f"{path}: {name}") for name in TOKENIZER)
    known = {i: token for token, i in (definition["model"].get("vocab") or {}).items()} if config.kind == "bart" else {}
    known |= {token["id"]: token["content"] for token in definition["added_tokens"]}
    plain = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    for name, usual in (("bos", "<s>"), ("pad", "<pad>"), ("eos", "</s>")):
        token_id = getattr(config, f"{name}_token_id")
        if config.kind == "bart" and token_id is not None:
            if token_id not in known:
                definition["added_tokens"].append(dict(id=token_id, content=usual) | plain)
            settings[f"{name}_token"] = known.get(token_id, usual)
    return files | {name: json.dumps(of).encode() for name, of in zip(TOKENIZER, (definition, settings), strict=True)}


@alive()
def main(argv: list[str] | None = None) -> int:
    about = "Exports a BART or PEGASUS of finetune_seq2seq.py to a folder in Hugging Face's layout, with its tokenizer."
    parser = Parser(prog="python -m model.seq2seq_hub", usage=None, description=about)
    parser.add_argument("run", help="a run's folder (best.pt, else last.pt), or one of its checkpoints")
    parser.add_argument("folder", help="folder to write")
    given = parser.parse_args(argv)
    with user_errors():
        taken, _ = export(given.run, given.folder)
    print(f"wrote {given.folder} from {taken}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
