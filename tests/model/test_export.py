"""model.export: merged folders in 16 bits and GGUF files, as transformers and our reader take them."""

import json
import subprocess
import sys

import pytest
import torch
from lora_models import adapted, logits_of
from safetensors.torch import load_file
from tiny_gsm8k import write_tokenizer

from model import export
from model.decoder_hub import config_and_tokenizer, load_decoder, save_decoder
from model.lora_hub import save_adapter

gguf = pytest.importorskip("gguf")

LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
LLAMA3 |= dict(original_max_position_embeddings=8192, rope_theta=5e5)
MODELS = {
    "llama, untied, llama3": ("Llama", dict(head_dim=32, rope_parameters=LLAMA3)),
    "llama, biases": ("Llama", dict(attention_bias=True, tie_word_embeddings=True)),
    "mistral, linear": (
        "Mistral",
        dict(sliding_window=None, rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=1e4)),
    ),
    "qwen2, yarn": (
        "Qwen2",
        dict(rope_parameters=dict(rope_type="yarn", factor=4.0, rope_theta=1e4, original_max_position_embeddings=16)),
    ),
    "qwen3": ("Qwen3", dict(head_dim=128, tie_word_embeddings=True)),
}


def write_model(folder, family="Llama", size=400, **more):
    """A tiny random model and its tokenizer, as transformers writes them."""
    import transformers

    folder.mkdir(exist_ok=True)
    write_tokenizer(folder, ["Ann has 12 apples and 345 plums, hasn't she?\n\n  She's 7."] * 3, size)
    shape = dict(vocab_size=size, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    shape |= dict(num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=2)
    torch.manual_seed(0)
    config = getattr(transformers, family + "Config")(**shape | dict(pad_token_id=None) | more)
    model = getattr(transformers, family + "ForCausalLM")(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(folder)
    return folder


def tokens_of():
    return torch.randint(97, (2, 20), generator=torch.Generator().manual_seed(1))


def exported(*arguments):
    assert export.main([str(a) for a in arguments]) == 0


@pytest.mark.parametrize("family, more", MODELS.values(), ids=MODELS)
def test_a_gguf_of_16_bits_is_the_model(tmp_path, family, more):
    import transformers

    folder, out = write_model(tmp_path / "model", family, **more), tmp_path / "out.gguf"
    exported(folder, out)
    before, after = load_decoder(folder), load_decoder(out)
    kept = dict(after.named_parameters())
    for name, p in before.named_parameters():
        assert torch.equal(kept[name], p if p.ndim == 1 else p.half().float()), name
    scaling = [(c.config.rope_scaling or dict(rope_type=None)).copy() for c in (before, after)]
    assert scaling[0].pop("rope_type") == scaling[1].pop("rope_type")
    assert scaling[1] == pytest.approx(scaling[0], rel=1e-5)
    for field in ("rms_norm_eps", "rope_theta", "head_dim", "tie_word_embeddings", "attention_bias", "eos_token_id"):
        assert getattr(after.config, field) == getattr(before.config, field)
    if family == "Qwen3":  # transformers reads no biases and no rope_scaling from a GGUF; the others are below
        peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=out.name, dtype=torch.float32)
        torch.testing.assert_close(logits_of(after, tokens_of()), peer(tokens_of()).logits, rtol=0, atol=1e-4)


def test_a_gguf_of_8_bits_is_read_by_transformers(tmp_path):
    import transformers

    exported(write_model(tmp_path / "model"), tmp_path / "out.gguf", "--quantise", "Q8_0")
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="out.gguf", dtype=torch.float32)
    ours = logits_of(load_decoder(tmp_path / "out.gguf"), tokens_of())
    torch.testing.assert_close(ours, peer(tokens_of()).logits, rtol=0, atol=1e-4)
    exact = logits_of(load_decoder(tmp_path / "model"), tokens_of())
    assert 0 < (ours - exact).abs().max() < 0.1 * exact.std()  # 8 bits of 7 matrices in 2 blocks
    held = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    assert held["blk.0.ffn_down.weight"] == "Q8_0" and held["blk.0.ffn_norm.weight"] == "F32"


def test_the_tokenizer_and_its_template_come_along(tmp_path):
    from tokenizers import Tokenizer

    folder, text = write_model(tmp_path / "model"), "Ann's 345 plums?\n\n <|im_end|> <think> naïve"
    several = [dict(name="tools", template="x"), dict(name="default", template="{{ messages }}")]
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(chat_template=several)))
    exported(folder, tmp_path / "new" / "out.gguf")
    files = config_and_tokenizer(tmp_path / "new" / "out.gguf")[1]
    before, after = Tokenizer.from_file(str(folder / "tokenizer.json")), Tokenizer.from_buffer(files["tokenizer.json"])
    assert before.encode(text).ids == after.encode(text).ids
    assert json.loads(files["tokenizer_config.json"])["chat_template"] == "{{ messages }}"


LLAMA_CPP = """
import json, sys, xllamacpp
p = xllamacpp.CommonParams()
p.model.path, p.n_ctx, p.n_parallel, p.warmup, p.cpuparams.n_threads = sys.argv[1], 64, 1, False, 1
ask = dict(prompt=sys.argv[2], max_tokens=12, temperature=0.0, top_k=1, ignore_eos=True, logprobs=1)
print(json.dumps(xllamacpp.Server(p).handle_completions(ask)))
"""


@pytest.mark.parametrize("family, more", MODELS.values(), ids=MODELS)
def test_llama_cpp_continues_a_text_as_we_do(tmp_path, family, more):
    pytest.importorskip("xllamacpp", reason="needs xllamacpp (requirements-parity.txt)")
    from tokenizers import Tokenizer

    folder, out = write_model(tmp_path / "model", family, **more), tmp_path / "out.gguf"
    exported(folder, out)
    command = [sys.executable, "-c", LLAMA_CPP, str(out), "Ann's 345 plums"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-500:]
    theirs = json.loads(done.stdout.splitlines()[-1])
    tokenizer = Tokenizer.from_buffer(config_and_tokenizer(out)[1]["tokenizer.json"])
    ids = tokenizer.encode("Ann's 345 plums").ids
    model = load_decoder(out).eval()
    for _ in range(12):
        ids.append(int(logits_of(model, torch.tensor([ids]))[0, -1].argmax()))
    assert theirs["usage"]["prompt_tokens"] == len(ids) - 12
    # It tells nothing of a token that is the beginning of a character which does not go on.
    found, ours = [token["id"] for token in theirs["choices"][0]["logprobs"]["content"]], iter(ids[-12:])
    assert len(found) >= 9 and all(token in ours for token in found), (found, ids[-12:])


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_merged_folder_holds_the_sum_in_16_bits(folder, tmp_path, dtype):
    model = adapted(folder)
    save_adapter(model, tmp_path / "run" / "adapter", str(folder))
    exported(folder, tmp_path / "merged", "--adapter", tmp_path / "run", "--dtype", dtype)
    tensors, name = load_file(tmp_path / "merged" / "model.safetensors"), "layers.1.mlp.up_proj"
    assert torch.equal(
        tensors[f"model.{name}.weight"], model.get_submodule(name).dense(torch.float32).to(export.DTYPES[dtype])
    )
    save_decoder(model, tmp_path / "exact")
    assert {n: t.shape for n, t in tensors.items()} == {
        n: t.shape for n, t in load_file(tmp_path / "exact" / "model.safetensors").items()
    }


def test_what_cannot_be_written_is_one_line_and_nothing_is(tmp_path, capsys):
    def refused(folder, says, *more):
        capsys.readouterr()
        before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
        with pytest.raises(SystemExit) as stop:
            exported(folder, tmp_path / "out.gguf", *more)
        said = capsys.readouterr().err
        assert stop.value.code == 2 and says in said and said.count("\n") == 1
        assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p != tmp_path} == before

    folder = write_model(tmp_path / "smollm3", "SmolLM3", num_hidden_layers=1)
    refused(folder, "a smollm3 is not written as GGUF; expected one of llama, qwen2, qwen3")
    folder = write_model(tmp_path / "model", num_hidden_layers=1)
    refused(folder, "has no adapter_config.json", "--adapter", tmp_path / "smollm3")
    refused(folder, "--dtype is not read where", "--dtype", "fp32")
    with pytest.raises(SystemExit):
        exported(folder, tmp_path / "merged", "--quantise", "Q8_0")
    assert "--quantise is not read where" in capsys.readouterr().err and not (tmp_path / "merged").exists()
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    one = content["added_tokens"][-1]
    more = [*content["added_tokens"], one | dict(id=407, content="x")]
    path.write_text(json.dumps(content | dict(added_tokens=more)))
    refused(folder, "the tokenizer has 408 tokens, the model only 400")
    path.write_text(json.dumps(content | dict(pre_tokenizer=dict(type="Whitespace"))))
    refused(folder, "the tokenizer cuts text in none of the ways that are written as GGUF: gpt-2, smollm")
    path.unlink()
    refused(folder, "the model has no tokenizer.json")
    (tmp_path / "out.gguf").write_bytes(b"here")
    refused(folder, "exists and is not an empty folder")
