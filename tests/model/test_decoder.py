"""Decoders: parity with transformers, packed documents, the key-value cache, and Hugging Face's layout."""

import json
import weakref

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from model.decoder import Decoder, DecoderConfig
from model.decoder_hub import load_decoder, read_config, save_decoder
from model.layers import Linear

# fp32 logits of two implementations of one small network differ by the order of their sums: under 5e-6 is what we
# see at logits of order 1 to 10; 1e-4 is the promise we make to users.
LOGITS_TOLERANCE = 1e-4

LLAMA3 = dict(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, rope_theta=1e4)
SHAPES = {
    "tied": dict(tie_word_embeddings=True),
    "untied": dict(tie_word_embeddings=False),
    "no groups, wide heads": dict(num_key_value_heads=4, head_dim=24),
    "one key head, narrow heads": dict(num_key_value_heads=1, head_dim=4, tie_word_embeddings=True),
    "other rotary base and eps": dict(rope_parameters=dict(rope_type="default", rope_theta=1e6), rms_norm_eps=1e-3),
    "qwen3, biases": dict(attention_bias=True),
    "qwen3, yarn": dict(rope_parameters=YARN | dict(beta_fast=8.0, beta_slow=2.0)),
    "llama": dict(family="llama"),
    "llama, tied": dict(family="llama", tie_word_embeddings=True, rms_norm_eps=1e-5),
    "llama, biases, wide heads": dict(family="llama", attention_bias=True, mlp_bias=True, head_dim=24),
    "llama, linear": dict(
        family="llama", rope_parameters=dict(rope_type="linear", factor=3.0, rope_theta=1e4), num_key_value_heads=None
    ),
    "llama, llama3": dict(family="llama", rope_parameters=LLAMA3 | dict(rope_type="llama3", rope_theta=5e2)),
    "qwen2": dict(family="qwen2"),
    "qwen2, tied, yarn": dict(family="qwen2", tie_word_embeddings=True, rope_parameters=YARN),
    "qwen2, yarn's other numbers": dict(
        family="qwen2", rope_parameters=YARN | dict(mscale=2.0, mscale_all_dim=0.5, truncate=False)
    ),
    "qwen2, yarn's factor": dict(family="qwen2", rope_parameters=YARN | dict(attention_factor=0.7)),
    "mistral": dict(family="mistral", sliding_window=None, head_dim=16),
    "mistral, a window as long as the positions": dict(family="mistral", sliding_window=64),
    "smollm3": dict(family="smollm3", num_hidden_layers=5, no_rope_layer_interval=2),
    "smollm3, listed": dict(family="smollm3", no_rope_layers=[0, 1], attention_bias=True, tie_word_embeddings=False),
}
FAMILIES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "mistral": "Mistral", "smollm3": "SmolLM3"}


def write_hf(folder, max_shard_size="1GB", seed=0, family="qwen3", **shape):
    """A tiny model of the family with every parameter off its initial value, written by transformers; returns it."""
    import transformers

    fields = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    fields |= dict(num_key_value_heads=2, max_position_embeddings=64, pad_token_id=None)
    fields |= (dict(head_dim=8) if family == "qwen3" else {}) | shape
    torch.manual_seed(seed)
    config = getattr(transformers, FAMILIES[family] + "Config")(**fields)
    model = getattr(transformers, FAMILIES[family] + "ForCausalLM")(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """One of each family: its folder, transformers' module."""
    folder = tmp_path_factory.mktemp(request.param)
    window = dict(sliding_window=None) if request.param == "mistral" else {}
    layers = dict(no_rope_layers=[1, 0]) if request.param == "smollm3" else {}
    return folder, write_hf(folder, family=request.param, **window, **layers)


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """The tied tiny model: its folder, transformers' module."""
    folder = tmp_path_factory.mktemp("tied")
    return folder, write_hf(folder, tie_word_embeddings=True)


def tokens_of(batch=2, time=20, seed=1, vocab=97):
    return torch.randint(vocab, (batch, time), generator=torch.Generator().manual_seed(seed))


def logits_of(model, tokens, **arguments):
    return model(tokens, **arguments).float() @ model.head_weight.float().T


def nll(logits, tokens):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def hf_name(name):
    return name if name.startswith("lm_head") else "model." + name


# ---------------------------------------------------------------- parity with transformers


@pytest.mark.parametrize("shard", ["1GB", "20KB"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_logits_and_gradients_are_those_of_transformers(tmp_path, shape, shard):
    theirs = write_hf(tmp_path, max_shard_size=shard, **shape)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "20KB")
    ours, tokens = load_decoder(tmp_path), tokens_of()
    a, b = logits_of(ours, tokens), theirs(tokens).logits
    assert b.std() > 0.5  # else the tolerance would say nothing
    torch.testing.assert_close(a, b, rtol=0, atol=LOGITS_TOLERANCE)

    nll(a, tokens).backward()
    nll(b, tokens).backward()
    expected = dict(theirs.named_parameters())
    names = dict(ours.named_parameters())
    assert {hf_name(name) for name in names} == expected.keys()
    for name, p in names.items():
        # Sums in another order again: 1e-4 of the largest entry, where a wrong term would show as order 1.
        g = expected[hf_name(name)].grad
        torch.testing.assert_close(
            p.grad, g, rtol=0, atol=1e-4 * g.abs().max().item(), msg=lambda m, n=name: f"{n} {m}"
        )


def test_bf16_activations_err_no_more_than_those_of_transformers(tied):
    folder, theirs = tied
    tokens = tokens_of(batch=4)
    exact = theirs(tokens).logits
    ours = load_decoder(folder, torch.bfloat16)
    assert ours(tokens).dtype == torch.bfloat16 and ours.norm.weight.dtype == torch.bfloat16
    masters = load_decoder(folder, torch.bfloat16, torch.float32)
    assert masters(tokens).dtype == torch.bfloat16 and masters.norm.weight.dtype == torch.float32
    import transformers

    peer = transformers.Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)(tokens).logits
    allowed = (peer - exact).square().mean().sqrt()
    for model in (ours, masters):
        # Both round at about the same places; 1.25 leaves room for where they do not.
        assert (logits_of(model, tokens) - exact).square().mean().sqrt() < 1.25 * allowed


def test_checkpointed_activations_change_no_gradient(tied):
    gradients = []
    for on in (False, True):
        model = load_decoder(tied[0])
        model.checkpoint_activations = on
        nll(logits_of(model, tokens_of()), tokens_of()).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# ---------------------------------------------------------------- packed documents


def test_packed_documents_are_separate_forwards(family):
    model, tokens = load_decoder(family[0]), tokens_of(batch=2, time=20)
    lengths = [[5, 1, 14], [12, 8]]
    documents = torch.stack([torch.repeat_interleave(torch.arange(len(n)), torch.tensor(n)) for n in lengths])
    packed = model(tokens, documents_BT=documents)
    for row, sizes in enumerate(lengths):
        alone = [model(part[None])[0] for part in tokens[row].split(sizes)]
        # Another path through attention: rounding only, as for the logits.
        torch.testing.assert_close(packed[row], torch.cat(alone), rtol=0, atol=1e-5)
    # Positions that do not restart turn queries and keys alike, so attention within a document is the same.
    running = torch.arange(20).expand(2, -1)
    again = model(tokens, positions_BT=running, documents_BT=documents)
    torch.testing.assert_close(again, packed, rtol=0, atol=1e-5)


def test_no_gradient_crosses_a_document(tied):
    model, tokens = load_decoder(tied[0]), tokens_of(batch=1, time=10)
    documents = torch.tensor([[0] * 6 + [1] * 4])
    model(tokens, documents_BT=documents)[:, 6:].square().sum().backward()
    used = set(tokens[0, 6:].tolist())
    touched = {i for i, row in enumerate(model.embed_tokens.weight.grad) if row.any()}
    assert touched == used


# ---------------------------------------------------------------- key-value cache


@torch.no_grad()
def test_cached_decoding_is_the_full_forward_whatever_each_row_is_at(family):
    model = load_decoder(family[0])
    sequences = tokens_of(batch=3, time=20)
    full = model(sequences)
    cache = model.new_cache(3, 24)
    before = cache.k.data_ptr()
    # Prompts of 7, 3 and 5 tokens in one right-padded forward: what the padding writes must never be seen.
    at = torch.tensor([7, 3, 5])
    padded = sequences[:, :7].clone()
    padded[torch.arange(7) >= at[:, None]] = 0
    hidden = model(padded, torch.arange(7).expand(3, -1), cache=cache)
    for row, n in enumerate(at.tolist()):
        torch.testing.assert_close(hidden[row, :n], full[row, :n], rtol=0, atol=1e-5)
    for _ in range(10):
        hidden = model(sequences.gather(1, at[:, None]), at[:, None], cache=cache)
        torch.testing.assert_close(hidden[:, 0], full[torch.arange(3), at], rtol=0, atol=1e-5)
        at = at + 1
    # Row 1 ends; another sequence takes its place without clearing, the others go on.
    fresh = tokens_of(batch=1, time=20, seed=9)
    expected = model(fresh)
    hidden = model(fresh[:, :4], torch.arange(4)[None], cache=cache, rows_B=torch.tensor([1]))
    torch.testing.assert_close(hidden, expected[:, :4], rtol=0, atol=1e-5)
    sequences[1], full[1], at[1] = fresh[0], expected[0], 4
    short = cache.first(20)  # a view of fewer positions decodes the same
    for _ in range(3):
        hidden = model(sequences.gather(1, at[:, None]), at[:, None], cache=short)
        torch.testing.assert_close(hidden[:, 0], full[torch.arange(3), at], rtol=0, atol=1e-5)
        at = at + 1
    assert cache.k.data_ptr() == before and cache.k.shape == (2, 3, 24, 2, 8)


def test_a_forward_that_cannot_be_meant_is_one_line(tied):
    model, tokens = load_decoder(tied[0]), tokens_of(batch=2, time=4)
    at = torch.arange(4).expand(2, -1)
    with pytest.raises(ValueError, match="two dimensions"):
        model(tokens[0])
    with pytest.raises(ValueError, match="max_position_embeddings=64"):
        model(tokens_of(time=65))
    with pytest.raises(ValueError, match=r"documents of shape \(2, 3\)"):
        model(tokens, documents_BT=at[:, :3])
    with pytest.raises(ValueError, match="to max_position_embeddings=64"):
        model.new_cache(2, 65)
    cache = model.new_cache(2, 8)
    with pytest.raises(ValueError, match="no_grad"):
        model(tokens, at, cache=cache)
    with torch.no_grad():
        with pytest.raises(ValueError, match="needs positions_BT"):
            model(tokens, cache=cache)
        with pytest.raises(ValueError, match="only one of the two"):
            model(tokens, at, documents_BT=at, cache=cache)
        with pytest.raises(ValueError, match="1 rows for 2 cache rows"):
            model(tokens[:1], at[:1], cache=cache)
        with pytest.raises(ValueError, match="positions 6 to 9: expected 0 to 7"):
            model(tokens, at + 6, cache=cache)


# ---------------------------------------------------------------- initial values


def test_a_seed_gives_one_model():
    config = DecoderConfig(97, 32, 48, 2, 4, 2, head_dim=8)
    model = Decoder(config)
    state = []
    for _ in range(2):
        model.init_weights(torch.Generator().manual_seed(3))
        state.append({name: p.clone() for name, p in model.state_dict().items()})
    assert all(torch.equal(state[0][name], state[1][name]) for name in state[0])
    assert (model.norm.weight == 1).all() and (model.layers[0].self_attn.q_norm.weight == 1).all()
    assert model.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.1)  # 3104 draws: sd of the sd 1.3 %


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("max_bytes", [10**9, 20_000])
def test_export_is_read_by_transformers_and_by_us(tmp_path, shape, max_bytes):
    import transformers

    theirs = write_hf(tmp_path / "theirs", **shape)
    ours, tokens = load_decoder(tmp_path / "theirs"), tokens_of()
    save_decoder(ours, tmp_path / "ours", {"tokenizer.json": b"{}"}, max_shard_bytes=max_bytes)
    assert (tmp_path / "ours" / "tokenizer.json").read_bytes() == b"{}"
    files = list((tmp_path / "ours").glob("*.safetensors"))
    assert (len(files) > 1) == (max_bytes == 20_000)
    assert all(f.stat().st_size < max_bytes + 4000 for f in files)  # headers are a few hundred bytes
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(peer) is type(theirs)
    assert all(torch.equal(p, q) for p, q in zip(peer.parameters(), theirs.parameters(), strict=True))
    assert torch.equal(peer(tokens).logits, theirs(tokens).logits)  # the config carries over as well
    again = load_decoder(tmp_path / "ours")
    assert again.config == ours.config and torch.equal(again(tokens), ours(tokens))


def test_an_export_replaces_its_own_files_and_no_others(tmp_path, tied):
    model = load_decoder(tied[0])
    save_decoder(model, tmp_path / "a")
    with torch.no_grad():
        model.norm.weight.add_(1)
    save_decoder(model, tmp_path / "a", dtype=torch.bfloat16)
    assert torch.equal(load_decoder(tmp_path / "a", torch.bfloat16).norm.weight, model.norm.weight.bfloat16())
    with pytest.raises(ValueError, match="already holds weights, model.safetensors"):
        save_decoder(model, tmp_path / "a", max_shard_bytes=20_000)
    with pytest.raises(ValueError, match="a plain file name"):
        save_decoder(model, tmp_path / "b", {"config.json": b""})
    with pytest.raises(ValueError, match="max_shard_bytes=0"):
        save_decoder(model, tmp_path / "b", max_shard_bytes=0)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_failed_export_leaves_nothing(tmp_path, tied, monkeypatch):
    model = load_decoder(tied[0])
    monkeypatch.setattr(Linear, "dense", lambda self, dtype: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_decoder(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_loading_holds_one_tensor_at_a_time_and_nothing_of_the_file(tmp_path):
    write_hf(tmp_path, max_shard_size="20KB")
    seen = []

    def convert(name, tensor):
        assert not any(ref() is not None for ref in seen[:-1])  # the loop may still name the last one
        seen.append(weakref.ref(tensor))
        layer = Linear(tensor.shape[1], tensor.shape[0])
        layer.weight.data.copy_(tensor)
        return layer

    model = load_decoder(tmp_path, convert=convert)
    assert len(seen) == 2 * 7
    plain = load_decoder(tmp_path)
    assert torch.equal(model(tokens_of()), plain(tokens_of()))
    before = plain(tokens_of())
    for path in tmp_path.glob("*.safetensors"):
        path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(plain(tokens_of()), before)


def test_the_published_form_of_the_config_is_read(tmp_path):
    """The layout of the released config.json files, rope_theta beside rope_scaling; the shape is Qwen3-0.6B's."""
    fields = dict(architectures=["Qwen3ForCausalLM"], attention_bias=False, attention_dropout=0.0, head_dim=128)
    fields |= dict(bos_token_id=151643, eos_token_id=151645, hidden_act="silu", hidden_size=1024, max_window_layers=28)
    fields |= dict(intermediate_size=3072, max_position_embeddings=40960, model_type="qwen3", num_attention_heads=16)
    fields |= dict(
        num_hidden_layers=28, num_key_value_heads=8, rms_norm_eps=1e-6, rope_scaling=None, rope_theta=1000000
    )
    fields |= dict(sliding_window=None, tie_word_embeddings=True, use_sliding_window=False, vocab_size=151936)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config = read_config(tmp_path / "config.json")
    with torch.device("meta"):
        model = Decoder(config)
    assert config.rope_theta == 1e6 and config.eos_token_id == 151645
    # 155,582,464 for the embedding, 440,466,432 in the blocks, 1,024 in the last norm: the published 0.6B, 0.44B of
    # them outside the embedding.
    assert sum(p.numel() for p in model.parameters()) == 596_049_920


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(model_type="qwen3_moe"), "model_type='qwen3_moe'; expected one of llama, mistral, qwen2, qwen3"),
        (dict(model_type=None), "model_type=None"),
        (dict(hidden_act="gelu"), "hidden_act='gelu' is not supported"),
        (dict(attention_bias=True), "missing model.layers.0.self_attn.q_proj.bias"),
        (dict(mlp_bias=True), "mlp_bias=True is not supported"),
        (dict(model_type="mistral", attention_bias=True), "attention_bias=True is not supported"),
        (dict(model_type="mistral", sliding_window=16), "sliding_window=16 of 64 positions is not supported"),
        (dict(model_type="qwen2"), "the qwen2 of its config: missing model.layers.0.self_attn.q_proj.bias"),
        (dict(model_type="llama"), "unexpected model.layers.0.self_attn.k_norm.weight"),
        (dict(model_type="smollm3", no_rope_layers=[1]), "no_rope_layers=[1]: expected 2 of 0 and 1"),
        (dict(use_sliding_window=True), "use_sliding_window=True is not supported"),
        (dict(layer_types=["full_attention", "sliding_attention"]), "sliding_attention"),
        (dict(quantization_config=dict(quant_method="fp8")), "quantization_config"),
        (dict(is_causal=False), "is_causal=False is not supported"),
        (dict(rope_parameters=dict(rope_type="dynamic", factor=4.0)), "expected rope_type default, linear, llama3"),
        (dict(rope_scaling=dict(type="linear")), "rope_type 'linear' does not say factor"),
        (dict(rope_scaling=dict(type="linear", factor="2")), "rope_scaling's factor='2': expected a positive number"),
        (dict(rope_scaling=dict(type="linear", factor=2.0, beta_fast=32)), "holds beta_fast, which is not supported"),
        (dict(rope_scaling={"type": "linear", "factor": 2.0, "a\nb": 1}), r"holds 'a\nb', which is not supported"),
        (dict(rope_scaling={"type": "default", "a\nb": 1}), r"holds 'a\nb', not supported"),
        (dict(rope_scaling=LLAMA3 | dict(type="llama3", high_freq_factor=1)), "a low_freq_factor below"),
        (dict(rope_scaling=[1.0]), "rope_scaling=[1.0]: expected an object"),
        (dict(rope_scaling=dict(type="linear", factor=2.0), rope_parameters=YARN), "and rope_parameters differ"),
        (dict(rope_parameters=dict(rope_theta=1e4, partial_rotary_factor=0.5)), "partial_rotary_factor"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor=0.5 is not supported"),
        (dict(rope_theta=5e5), "rope_theta is given as 500000.0 and as 10000.0; expected one value"),
        (dict(num_key_value_heads=3), "not a multiple of num_key_value_heads=3"),
        (dict(head_dim=7), "head_dim=7: expected an even number"),
        (dict(hidden_size=-1), "hidden_size=-1: expected an integer from 1 to 2^24"),
        (dict(rms_norm_eps="1e-6"), "rms_norm_eps='1e-6': expected a positive number"),
        (dict(tie_word_embeddings="yes"), "tie_word_embeddings='yes'"),
        (dict(intermediate_size=56), "is (48, 32) instead of (56, 32)"),
        (dict(num_hidden_layers=1), "unexpected model.layers.1."),
        (dict(num_hidden_layers=3), "3 blocks by its config, 2 in its files"),
        (dict(tie_word_embeddings=False), "missing lm_head.weight"),
        (dict(model_type="smollm3", num_hidden_layers=10**30), "expected an integer from 1 to 10,000"),
    ],
)
def test_a_config_that_changes_the_function_is_refused_in_one_line(tmp_path, tied, change, says):
    for path in tied[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    fields = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError) as error:
        load_decoder(tmp_path)
    assert says in str(error.value) and "\n" not in str(error.value) and str(tmp_path) in str(error.value)


# What this project wrote for a Qwen3 before it knew other families: config.json field by field.
EARLIER = dict(architectures=["Qwen3ForCausalLM"], model_type="qwen3", vocab_size=97, hidden_size=32)
EARLIER |= dict(intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
EARLIER |= dict(max_position_embeddings=64, rms_norm_eps=1e-6, rope_theta=10000.0, tie_word_embeddings=True)
EARLIER |= dict(bos_token_id=None, eos_token_id=None, hidden_act="silu", attention_bias=False, rope_scaling=None)
EARLIER |= dict(use_sliding_window=False, is_causal=True, torch_dtype="float32")


def test_a_folder_of_an_earlier_version_is_read(tmp_path, tied):
    (tmp_path / "model.safetensors").write_bytes((tied[0] / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(EARLIER))
    assert torch.equal(load_decoder(tmp_path)(tokens_of()), load_decoder(tied[0])(tokens_of()))


def test_a_llama_of_before_grouped_queries_is_read_as_transformers_reads_it(tmp_path):
    """Neither heads of keys, nor head_dim, nor a rotary base; rope_type under its old name; tensors that follow from
    the config."""
    import transformers

    write_hf(tmp_path, family="llama", num_key_value_heads=None)
    fields = json.loads((tmp_path / "config.json").read_text())
    for name in ("num_key_value_heads", "head_dim", "rope_parameters", "rope_theta", "attention_bias", "mlp_bias"):
        fields.pop(name, None)
    fields |= dict(rope_scaling=dict(type="linear", factor=2.0), pretraining_tp=1)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    path = tmp_path / "model.safetensors"
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.zeros(4) for i in range(2)}
    save_file(load_file(path) | extra, path, metadata={"format": "pt"})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ours = logits_of(load_decoder(tmp_path), tokens_of())
    torch.testing.assert_close(ours, theirs(tokens_of()).logits, rtol=0, atol=LOGITS_TOLERANCE)


def test_a_mistral_that_does_not_say_its_window_has_one(tmp_path):
    fields = EARLIER | dict(model_type="mistral", max_position_embeddings=8192)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="sliding_window=4096 of 8192 positions is not supported"):
        read_config(tmp_path / "config.json")
    (tmp_path / "config.json").write_text(json.dumps(fields | dict(sliding_window=None)))
    assert read_config(tmp_path / "config.json").max_position_embeddings == 8192


@pytest.mark.parametrize("field", ["vocab_size", "hidden_size", "num_key_value_heads"])
def test_a_config_that_says_too_little_is_refused(tmp_path, tied, field):
    fields = json.loads((tied[0] / "config.json").read_text())
    del fields[field]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=f"does not say {field}"):
        load_decoder(tmp_path)


def test_files_that_are_damaged_or_do_not_fit_are_one_line(tmp_path):
    write_hf(tmp_path, max_shard_size="20KB", tie_word_embeddings=True)
    shards = sorted(tmp_path.glob("*.safetensors"))
    whole = {path: path.read_bytes() for path in shards}

    def says(text):
        with pytest.raises(ValueError, match=text) as error:
            load_decoder(tmp_path)
        assert "\n" not in str(error.value)
        for path, content in whole.items():
            path.write_bytes(content)

    shards[1].write_bytes(whole[shards[1]][:-10])
    says(f"{shards[1].name} is damaged")
    shards[1].unlink()
    says(f"lacks {shards[1].name}, which model.safetensors.index.json names")
    tensors = load_file(shards[0])
    first = min(tensors)
    save_file({name: t for name, t in tensors.items() if name != first}, shards[0])
    says(f"missing {first}")
    save_file(tensors | {"score.weight": torch.zeros(2)}, shards[0])
    says("unexpected score.weight")
    other = min(load_file(shards[1]))
    save_file(tensors | {other: torch.zeros(2)}, shards[0])
    says(f"holds {other}, and so does another file")
    save_file(tensors | {"lm_head.weight": torch.zeros(97, 32)}, shards[0])
    says("lm_head.weight differs from embed_tokens.weight")
    load_decoder(tmp_path)
    for path in shards:
        path.unlink()
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match="neither model.safetensors nor"):
        load_decoder(tmp_path)
    with pytest.raises(ValueError, match="neither a folder nor a model's name"):
        load_decoder(tmp_path / "nothing here")


def test_a_folder_without_a_config_is_one_line(tmp_path, tied):
    (tmp_path / "model.safetensors").write_bytes((tied[0] / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="has no config.json; expected a folder in Hugging Face's layout"):
        load_decoder(tmp_path)


def test_a_head_saved_beside_the_embedding_it_is_tied_to_is_read(tmp_path):
    write_hf(tmp_path, tie_word_embeddings=True)
    plain = load_decoder(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(
        tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, tmp_path / "model.safetensors"
    )
    assert torch.equal(load_decoder(tmp_path)(tokens_of()), plain(tokens_of()))
