"""Tensors that a wrapped model saved, adapters of a base with many names, and errors that stay short."""

import json
import logging
import shutil
import time

import pytest
import torch
from gpt2_models import build, logits_of, tokens_for
from lora_models import adapted
from safetensors.torch import load_file, save_file

from model import weights
from model.decoder import Decoder, DecoderConfig
from model.decoder_hub import load_decoder, save_decoder
from model.gpt2_hub import export, load_hf, save_hf
from model.lora_hub import load_adapter, save_adapter
from model.seq2seq import Seq2Seq, Seq2SeqConfig, bart_config
from model.seq2seq_hub import load_seq2seq, save_seq2seq

NAMES = {
    "compile": lambda n: f"_orig_mod.{n}",
    "DDP": lambda n: f"module.{n}",
    "DDP of compile": lambda n: f"module._orig_mod.{n}",
    "compile of DDP": lambda n: f"_orig_mod.module.{n}",
    "DDP twice": lambda n: f"module.module.{n}",
    "compiled blocks": lambda n: n.replace("layers.0.", "layers.0._orig_mod.").replace("h.0.", "h.0._orig_mod."),
    "FSDP": lambda n: f"_fsdp_wrapped_module.{n.replace('.0.', '.0._checkpoint_wrapped_module.')}",
}
WRAPPED = pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)


def rename(path, name) -> None:
    save_file({name(n): t for n, t in load_file(path).items()}, path, metadata={"format": "pt"})


@WRAPPED
def test_gpt2_from_a_wrapped_model(tmp_path, name):
    model, tokens = build(), tokens_for()
    save_hf(model, tmp_path)
    rename(tmp_path / "model.safetensors", name)
    assert torch.equal(logits_of(load_hf(tmp_path), tokens), logits_of(model, tokens))
    state = {name(n): t for n, t in model.state_dict().items()}
    torch.save({"model": state, "model_config": vars(model.config)}, tmp_path / "run.pt")
    export(tmp_path / "run.pt", tmp_path / "out")
    assert torch.equal(logits_of(load_hf(tmp_path / "out"), tokens), logits_of(model, tokens))


@WRAPPED
def test_a_decoder_from_a_wrapped_model(folder, tmp_path, name):
    copy = shutil.copytree(folder, tmp_path / "copy")
    rename(copy / "model.safetensors", name)
    x = torch.arange(9)[None]
    assert torch.equal(load_decoder(copy)(x), load_decoder(folder)(x))


@WRAPPED
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_bart_from_a_wrapped_model(tmp_path, name, file):
    shape = dict(vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2)
    shape |= dict(decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=24)
    shape |= dict(pad_token_id=1, eos_token_id=2, decoder_start_token_id=2)
    model = Seq2Seq(Seq2SeqConfig(kind="bart", **shape))
    save_seq2seq(model, tmp_path)
    rename(tmp_path / "model.safetensors", name)
    if file.endswith(".bin"):
        torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / file)
        (tmp_path / "model.safetensors").unlink()
    again = load_seq2seq(tmp_path).state_dict()
    assert all(torch.equal(again[n], t) for n, t in model.state_dict().items())


@WRAPPED
def test_an_adapter_from_a_wrapped_model(folder, tmp_path, name):
    model = adapted(folder)
    save_adapter(model, tmp_path, str(folder))
    rename(tmp_path / "adapter_model.safetensors", name)
    again = load_decoder(folder)
    load_adapter(again, tmp_path)
    x = torch.arange(9)[None]
    assert torch.equal(again(x), model(x))


def test_two_that_become_one_are_an_error(tmp_path):
    save_hf(build(), tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"module.transformer.wpe.weight": tensors["transformer.wpe.weight"].clone()}, path)
    with pytest.raises(ValueError, match="wpe.weight with and without a wrapper's prefix"):
        weights.read_shapes([path])


@pytest.mark.parametrize("plain", ["module_list.0.weight", "submodule.weight", "a.module.b", "x_orig_mod.y"])
def test_other_names_stay(plain):
    assert weights.plain_name(plain) == plain


def test_no_error_names_more_than_three_of_a_kind():
    many = {f"layers.{i}.weight": (2, 3) for i in range(500)}
    for found in ({}, {f"other.{n}": s for n, s in many.items()}, dict.fromkeys(many, (3, 2))):
        with pytest.raises(ValueError) as error:
            weights.check_shapes(found, many, "m")
        assert len(str(error.value)) < 400 and "and 497 more" in str(error.value)


NAMES_OF_ONE_BASE = [
    "Qwen/Qwen3-0.6B",
    "unsloth/qwen3-0.6b-unsloth-bnb-4bit",
    "/content/outputs/checkpoint-500",
    "/root/.cache/hub/models--Qwen--Qwen3-0.6B/snapshots/c1899de",
    "{folder}/",
    "{folder}",
    None,
]


@pytest.mark.parametrize("trained_on", NAMES_OF_ONE_BASE)
def test_an_adapter_is_told_by_its_shapes(folder, tmp_path, trained_on, caplog):
    model = adapted(folder)
    save_adapter(model, tmp_path, "")
    path = tmp_path / "adapter_config.json"
    named = trained_on and trained_on.format(folder=folder)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": named}))
    again = load_decoder(folder)
    with caplog.at_level(logging.WARNING, "scorecast"):
        load_adapter(again, tmp_path, folder)
    x = torch.arange(9)[None]
    assert torch.equal(again(x), model(x))
    differs = trained_on is not None and "{folder}" not in trained_on
    assert (f"trained on {named!r}" in caplog.text) == differs == bool(caplog.text)


@pytest.mark.parametrize("kind", ["gpt2", "bart", "qwen3"])
def test_a_config_of_many_blocks_is_refused_before_they_are_built(kind, tmp_path):
    if kind == "gpt2":
        save_hf(build(), tmp_path / "m")
    elif kind == "bart":
        save_seq2seq(Seq2Seq(bart_config(1, 8, 2, max_position_embeddings=32)), tmp_path / "m")
    else:
        save_decoder(Decoder(DecoderConfig(99, 8, 16, 1, 2, 1, 4, 32)), tmp_path / "m")
    load, field = {
        "gpt2": (load_hf, "n_layer"),
        "bart": (load_seq2seq, "encoder_layers"),
        "qwen3": (load_decoder, "num_hidden_layers"),
    }[kind]
    path = tmp_path / "m" / "config.json"
    fields = json.loads(path.read_text())
    for blocks, says in (
        (9999, r"\d+,\d+ blocks by its config, \d in its files"),
        (10**30, "an integer from 1 to 10,000"),
    ):
        path.write_text(json.dumps(fields | {field: blocks}))
        started = time.thread_time()
        with pytest.raises(ValueError, match=says):
            load(tmp_path / "m")
        assert time.thread_time() - started < 0.5
