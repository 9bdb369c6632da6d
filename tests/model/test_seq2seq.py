"""BART and PEGASUS: parity with transformers in logits and gradients, padding, the cache, and Hugging Face's layout."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from refusals import refused

from data.tokenizer import train_bpe
from model.gpt2 import parameter_count
from model.seq2seq import SIZES, Seq2Seq, bart_config, pegasus_config, sinusoids
from model.seq2seq_hub import load_seq2seq, main, save_seq2seq

# fp32 logits of two implementations of one small network differ by the order of their sums: 1e-6 is what
# we see at logits of order 1; 1e-4 is the promise we make to users.
LOGITS_TOLERANCE = 1e-4

TINY = dict(
    vocab_size=67,
    d_model=32,
    encoder_layers=2,
    decoder_layers=3,
    encoder_attention_heads=4,
    decoder_attention_heads=2,
    encoder_ffn_dim=48,
    decoder_ffn_dim=40,
    max_position_embeddings=24,
)

SWITCHES = [
    {},
    dict(scale_embedding=True),
    dict(activation_function="relu"),
    dict(activation_function="gelu_new"),
    dict(activation_function="silu", scale_embedding=True),
    dict(pad_token_id=3, decoder_start_token_id=5, eos_token_id=4),
]


@pytest.fixture(scope="session")
def transformers():
    return pytest.importorskip("transformers")


def hf_model(transformers, kind="bart", seed=0, **options):
    """transformers' own model with every parameter and the logits' bias off its initial value."""
    torch.manual_seed(seed)
    name = dict(bart="Bart", pegasus="Pegasus")[kind]
    config = getattr(transformers, f"{name}Config")(**TINY | options)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # PEGASUS's sinusoids are fixed
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.final_logits_bias.normal_()
    return model


def small(kind="bart", seed=0, dtype=torch.float32, **changes):
    torch.manual_seed(seed)
    make = dict(bart=bart_config, pegasus=pegasus_config)[kind]
    shape = dict(vocab_size=67, max_position_embeddings=24, init_std=0.2)
    return Seq2Seq(make(2, 32, 4, **shape | changes), dtype).eval()


def batch(B=3, S=17, T=9, seed=1):
    """Source, mask with right padding, and labels that end in -100."""
    g = torch.Generator().manual_seed(seed)
    source = torch.randint(6, 67, (B, S), generator=g)
    labels = torch.randint(6, 67, (B, T), generator=g)
    mask = torch.arange(S) < torch.tensor([S, S - 5, S - 9])[:B, None]
    labels[1, 6:] = -100
    return source, mask, labels


def logits_of(model, source, mask, labels):
    hidden = model(source, mask, model.shift_right(labels))
    logits = hidden.float() @ model.head_weight.T
    return logits if model.head_bias is None else logits + model.head_bias


def difference(a, b):
    return (a - b).abs().max().item()


def read(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def write(folder, tensors):
    from safetensors.torch import save_file

    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def saved(transformers, tmp_path):
    hf_model(transformers).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


# ---------------------------------------------------------------- parity with transformers


@pytest.mark.parametrize("kind", ["bart", "pegasus"])
@pytest.mark.parametrize("options", SWITCHES, ids=str)
def test_logits_and_gradients_are_those_of_transformers(transformers, tmp_path, kind, options):
    theirs = hf_model(transformers, kind, **options)
    theirs.save_pretrained(tmp_path)
    ours = load_seq2seq(tmp_path).eval()
    source, mask, labels = batch()
    expected = theirs(input_ids=source, attention_mask=mask.long(), labels=labels)
    logits = logits_of(ours, source, mask, labels)
    assert expected.logits.std() > 0.5  # of a size at which the tolerance means something
    assert difference(logits, expected.logits) < LOGITS_TOLERANCE

    expected.loss.backward()
    F.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    gradients = {name.removeprefix("model."): p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    assert gradients.keys() == {name for name, _ in ours.named_parameters()}
    for name, p in ours.named_parameters():
        # Sums in another order, over gradients that reach order 1.
        assert difference(p.grad, gradients[name]) < 1e-5 * (1 + gradients[name].abs().max()), name


@pytest.mark.parametrize("kind", ["bart", "pegasus"])
def test_without_a_mask_too(transformers, tmp_path, kind):
    theirs = hf_model(transformers, kind)
    theirs.save_pretrained(tmp_path)
    source, _, labels = batch()
    expected = theirs(input_ids=source, labels=labels).logits
    assert difference(logits_of(load_seq2seq(tmp_path), source, None, labels), expected) < LOGITS_TOLERANCE


@pytest.mark.parametrize("kind", ["bart", "pegasus"])
@pytest.mark.parametrize("bias", [False, True])
def test_transformers_loads_what_is_saved(transformers, tmp_path, kind, bias):
    ours = small(kind, logits_bias=bias)
    if bias:
        ours.final_logits_bias.normal_()
    save_seq2seq(ours, tmp_path / "out", {"vocab.json": b"{}"})
    loader = getattr(transformers, dict(bart="Bart", pegasus="Pegasus")[kind] + "ForConditionalGeneration")
    theirs, report = loader.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    source, mask, labels = batch()
    expected = theirs.eval()(input_ids=source, attention_mask=mask.long(), labels=labels).logits
    assert difference(logits_of(ours, source, mask, labels), expected) < LOGITS_TOLERANCE
    again = load_seq2seq(tmp_path / "out")
    assert again.config == dataclasses.replace(ours.config) and again.state_dict().keys() == ours.state_dict().keys()
    assert all(torch.equal(t, ours.state_dict()[name]) for name, t in again.state_dict().items())
    assert (tmp_path / "out" / "vocab.json").read_bytes() == b"{}"


def test_shift_right_is_that_of_transformers(transformers):
    from transformers.models.bart.modeling_bart import shift_tokens_right

    labels, before = batch()[2], batch()[2]
    model = small(pad_token_id=3, decoder_start_token_id=5)
    assert torch.equal(model.shift_right(labels), shift_tokens_right(labels, 3, 5))
    assert torch.equal(labels, before)


# ---------------------------------------------------------------- properties


@pytest.mark.parametrize("kind", ["bart", "pegasus"])
def test_padding_changes_nothing(kind):
    model = small(kind)
    source, mask, labels = batch()
    logits = logits_of(model, source, mask, labels)
    other = torch.where(mask, source, 7)
    assert torch.equal(logits_of(model, other, mask, labels), logits)  # what stands at padding is never read
    alone = logits_of(model, source[2:, :8], None, labels[2:])
    assert difference(alone, logits[2:]) < 1e-5  # attention over 8 keys or over 17 of which 9 weigh 0
    labels[1, 6:] = 11  # behind the others, where nothing looks
    assert torch.equal(logits_of(model, source, mask, labels)[1, :6], logits[1, :6])


@pytest.mark.parametrize("kind", ["bart", "pegasus"])
def test_a_cache_gives_what_the_whole_gives(kind):
    model = small(kind)
    source, mask, labels = batch()
    beams = 2
    target = model.shift_right(labels).repeat_interleave(beams, 0)
    target[1::beams, 1:] = target[1::beams, 1:].flip(1)  # the beams of a source differ
    with torch.no_grad():
        memory = model.encode(source, mask)
        whole = model.decode(target, memory.repeat_interleave(beams, 0), mask.repeat_interleave(beams, 0))
        cache = model.new_cache(memory, beams, 12)
        addresses = [cache.k.data_ptr(), cache.v.data_ptr()]
        parts = [
            model.decode(target[:, i:j], memory, mask, cache, torch.arange(i, j))
            for i, j in [(0, 4), (4, 5), (5, 6), (6, 9)]
        ]
    assert difference(torch.cat(parts, 1), whole) < 1e-5  # hidden states of order 1
    assert addresses == [cache.k.data_ptr(), cache.v.data_ptr()]
    assert len(cache.source_k[0]) == len(source)  # not copied per beam


@pytest.mark.parametrize("kind", ["bart", "pegasus"])
def test_recomputed_activations_give_the_same_gradients(kind):
    source, mask, labels = batch()
    gradients = []
    for recompute in (False, True):
        model = small(kind, dropout=0.1, attention_dropout=0.1, activation_dropout=0.1).train()
        model.checkpoint_activations = recompute
        torch.manual_seed(3)
        logits_of(model, source, mask, labels).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in gradients[0])


@pytest.mark.parametrize("rate", ["dropout", "attention_dropout", "activation_dropout"])
def test_each_dropout_acts_in_training_only(rate):
    source, mask, labels = batch()
    model = small(**{rate: 0.5})
    plain = logits_of(small(), source, mask, labels)
    assert torch.equal(logits_of(model, source, mask, labels), plain)
    assert difference(logits_of(model.train(), source, mask, labels), plain) > 1e-3


@pytest.mark.parametrize("kind", ["bart", "pegasus"])
def test_bf16_activations_over_fp32_parameters(kind):
    source, mask, labels = batch()
    model, exact = small(kind, dtype=torch.bfloat16), small(kind)
    hidden = model(source, mask, model.shift_right(labels))
    assert hidden.dtype == torch.bfloat16 and {p.dtype for p in model.parameters()} == {torch.float32}
    reference = exact(source, mask, exact.shift_right(labels))
    # 2^-8 is bf16's step; ten layers of rounding at random.
    assert (hidden.float() - reference).norm() < 10 * 2**-8 * reference.norm()


def test_initial_values():
    model = Seq2Seq(bart_config(2, 64, 4, vocab_size=512, max_position_embeddings=64))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif p.ndim == 1:
            assert (p == 1).all(), name
        else:
            assert abs(p.std() / 0.02 - 1) < 0.05, name  # at least 4096 values: 1.1 % is one standard error
    assert not model.shared.weight[1].any()
    a, b = (Seq2Seq(model.config) for _ in range(2))
    for copy in (a, b):
        copy.init_weights(torch.Generator().manual_seed(4))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_published_sizes(transformers):
    def count(size, **changes):
        with torch.device("meta"):
            return parameter_count(Seq2Seq(SIZES[size](**changes)))

    # Counts of the published checkpoints; PEGASUS's without its sinusoids.
    assert count("bart-base") == 139_420_416
    assert count("bart-large") == 406_291_456
    # What recipes.tiny_bart says of its own.
    assert count("bart-mini", vocab_size=8192) == 9_996_288 and count("bart-micro", vocab_size=8192) == 2_237_440
    with torch.device("meta"):
        config = transformers.PegasusConfig(
            vocab_size=96103, encoder_layers=16, decoder_layers=16, activation_function="relu", scale_embedding=True
        )
        theirs = transformers.PegasusForConditionalGeneration(config)
    assert count("pegasus-large") == sum(p.numel() for p in theirs.parameters() if p.requires_grad)


def test_sinusoids_are_those_of_the_paper():
    table = sinusoids(50, 8)
    assert table[0].tolist() == [0] * 4 + [1] * 4
    assert abs(table[7, 1] - torch.tensor(7 / 10000 ** (2 / 8)).sin()) < 1e-6
    assert abs(table[7, 7] - torch.tensor(7 / 10000 ** (6 / 8)).cos()) < 1e-6


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("layout", ["sharded", "bin", "no prefix", "tied copies", "half"])
def test_other_layouts_of_the_same_weights(transformers, tmp_path, layout):
    theirs = hf_model(transformers, "pegasus")
    if layout == "half":
        theirs = theirs.bfloat16().float()
    source, mask, labels = batch()
    expected = theirs(input_ids=source, attention_mask=mask, labels=labels).logits
    theirs.save_pretrained(tmp_path, **(dict(max_shard_size="20KB") if layout == "sharded" else {}))
    assert (tmp_path / "model.safetensors.index.json").exists() == (layout == "sharded")
    if layout != "sharded":
        tensors = read(tmp_path)
    if layout == "bin":
        (tmp_path / "model.safetensors").unlink()
        shared = tensors["model.shared.weight"]
        torch.save(
            tensors | {"lm_head.weight": shared, "encoder.version": torch.ones(1)}, tmp_path / "pytorch_model.bin"
        )
    elif layout == "no prefix":
        write(tmp_path, {name.removeprefix("model."): t for name, t in tensors.items()})
    elif layout == "tied copies":
        shared = tensors.pop("model.shared.weight")
        names = ("lm_head.weight", "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight")
        without = {name: t for name, t in tensors.items() if "embed_positions" not in name}
        write(tmp_path, without | {name: shared.clone() for name in names})
    elif layout == "half":
        write(tmp_path, {name: t.bfloat16() for name, t in tensors.items()})
    ours = load_seq2seq(tmp_path)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    # final_logits_bias is rounded too; the table of positions here is the exact one.
    assert difference(logits_of(ours, source, mask, labels), expected) < (0.1 if layout == "half" else LOGITS_TOLERANCE)


def test_no_bias_and_a_bias_of_zeros_are_the_same(saved):
    tensors = read(saved)
    bias = tensors.pop("final_logits_bias")
    for content in (tensors, tensors | {"final_logits_bias": torch.zeros_like(bias)}):
        write(saved, content)
        assert load_seq2seq(saved).head_bias is None
    write(saved, tensors | {"final_logits_bias": bias})
    assert torch.equal(load_seq2seq(saved).head_bias, bias[0])


def test_every_wrong_tensor_is_named(saved):
    tensors = read(saved)
    del tensors["model.decoder.layers.1.encoder_attn.k_proj.bias"], tensors["model.encoder.layernorm_embedding.weight"]
    tensors["model.encoder.layers.2.fc1.bias"] = torch.zeros(48)
    tensors["model.shared.weight"] = torch.zeros(68, 32)
    write(saved, tensors)
    with pytest.raises(ValueError) as error:
        load_seq2seq(saved)
    message = str(error.value)
    assert "decoder.layers.1.encoder_attn.k_proj.bias" in message and "encoder.layernorm_embedding.weight" in message
    assert "unexpected encoder.layers.2.fc1.bias" in message and "\n" not in message
    assert "shared.weight is (68, 32) instead of (67, 32)" in message


def test_an_untied_head_is_refused(saved):
    tensors = read(saved)
    write(saved, tensors | {"lm_head.weight": tensors["model.shared.weight"] + 1})
    with pytest.raises(ValueError, match="lm_head.weight differs from shared.weight"):
        load_seq2seq(saved)


def test_other_positions_are_refused(transformers, tmp_path):
    hf_model(transformers, "pegasus").save_pretrained(tmp_path)
    tensors = read(tmp_path)
    write(tmp_path, tensors | {"model.encoder.embed_positions.weight": torch.zeros(24, 32)})
    with pytest.raises(ValueError, match="encoder.embed_positions.weight is not the sinusoidal table"):
        load_seq2seq(tmp_path)


@pytest.mark.parametrize(
    "field, value",
    [
        ("activation_function", "tanh"),
        ("tie_word_embeddings", False),
        ("is_encoder_decoder", False),
        ("normalize_before", True),
        ("static_position_embeddings", True),
        ("model_type", "t5"),
        ("encoder_attention_heads", 5),
        ("decoder_layers", 0),
        ("decoder_start_token_id", 67),
        ("eos_token_id", [2, 3]),
        ("scale_embedding", 2.0),
        ("vocab_size", 66),
    ],
)
def test_options_we_do_not_have_are_refused(saved, field, value):
    edit_config(saved, **{field: value})
    with pytest.raises(ValueError, match="66, 32" if field == "vocab_size" else field) as error:
        load_seq2seq(saved)
    assert "\n" not in str(error.value)


def test_damaged_or_missing_files(saved):
    weights = saved / "model.safetensors"
    content = weights.read_bytes()
    for damaged in (content[:-100], content[:20], b""):
        weights.write_bytes(damaged)
        with pytest.raises(ValueError, match="model.safetensors is damaged") as error:
            load_seq2seq(saved)
        assert "\n" not in str(error.value)
    weights.unlink()
    with pytest.raises(ValueError, match="has none of model.safetensors"):
        load_seq2seq(saved)
    for damaged in (b"", b"not a checkpoint", content):
        (saved / "pytorch_model.bin").write_bytes(damaged)
        with pytest.raises(ValueError, match="pytorch_model.bin is damaged") as error:
            load_seq2seq(saved)
        assert "\n" not in str(error.value)
    (saved / "config.json").unlink()
    with pytest.raises(ValueError, match="has no config.json"):
        load_seq2seq(saved)


class Stranger:
    """Pickled, it creates a file where it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_bin_file_cannot_run_code(saved, tmp_path):
    (saved / "model.safetensors").unlink()
    torch.save({"model.shared.weight": Stranger(str(tmp_path / "created"))}, saved / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin is damaged"):
        load_seq2seq(saved)
    assert not (tmp_path / "created").exists()


def test_a_hub_model_with_only_a_bin_file(monkeypatch, saved):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    torch.save(read(saved), saved / "kept.bin")
    (saved / "model.safetensors").unlink()

    def snapshot(name, allow_patterns):
        if "pytorch_model.bin" in allow_patterns:
            (saved / "kept.bin").rename(saved / "pytorch_model.bin")
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert load_seq2seq("google/pegasus-xsum").config.vocab_size == 67


def test_a_failed_save_leaves_nothing_behind(monkeypatch, tmp_path):
    import safetensors.torch

    def full(tensors, path, **_):
        path.write_bytes(b"half of it")
        raise OSError("No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError):
        save_seq2seq(small(), tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_save_refuses_bad_arguments(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        save_seq2seq(small(), tmp_path / "file")
    for name in ("../vocab.json", "config.json"):
        with pytest.raises(ValueError, match="extra file"):
            save_seq2seq(small(), tmp_path / "out", {name: b""})
    with pytest.raises(ValueError, match="holds str"):
        save_seq2seq(small(), tmp_path / "out", {"vocab.json": "{}"})
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(kind="t5"), "kind='t5'"),
        (dict(d_model=30), "d_model=30 is not a multiple"),
        (dict(encoder_layers=0), "encoder_layers=0"),
        (dict(vocab_size=1.5), "vocab_size=1.5"),
        (dict(dropout=1.0), "dropout=1.0"),
        (dict(init_std=0.0), "init_std=0.0"),
        (dict(pad_token_id=-1), "pad_token_id=-1"),
    ],
)
def test_config_refuses_what_cannot_be_built(change, says):
    with pytest.raises(ValueError, match=says):
        dataclasses.replace(small().config, **change)


def test_forward_refuses_bad_input():
    model = small()
    with pytest.raises(ValueError, match="25 tokens: expected at most max_position_embeddings=24"):
        model.encode(torch.zeros(1, 25, dtype=torch.long))
    with pytest.raises(ValueError, match="two dimensions"):
        model.encode(torch.zeros(5, dtype=torch.long))
    with pytest.raises(ValueError, match="source mask of shape .1, 4.: expected .1, 5."):
        model.encode(torch.zeros(1, 5, dtype=torch.long), torch.ones(1, 4))
    with pytest.raises(ValueError, match="cache for 25 tokens"):
        model.new_cache(torch.zeros(1, 5, 32), 1, 25)
    with pytest.raises(ValueError, match="int64"):
        Seq2Seq(model.config, torch.int64)


def test_the_command_exports_a_run(tmp_path, capsys):
    """best.pt before last.pt; the tokens that a random start has added are special ones of the tokenizer."""
    definition, ids = train_bpe(["one two"], 257), dict(bos_token_id=257, pad_token_id=258, eos_token_id=259)
    model = Seq2Seq(
        bart_config(1, 32, 2, vocab_size=260, max_position_embeddings=24, **ids, decoder_start_token_id=259)
    )
    state = dict(model=model.state_dict(), model_config=dataclasses.asdict(model.config))
    state["tokenizer"] = dict(files={"tokenizer.json": definition})
    run, out = tmp_path / "run", tmp_path / "out"
    run.mkdir()
    torch.save(state, run / "best.pt")
    torch.save({}, run / "last.pt")
    assert main([str(run), str(out)]) == 0 and "best.pt" in capsys.readouterr().out
    loaded = load_seq2seq(out).state_dict()
    assert all(torch.equal(weight, loaded[name]) for name, weight in model.state_dict().items())
    added = {
        t["id"]: (t["content"], t["special"]) for t in json.loads((out / "tokenizer.json").read_text())["added_tokens"]
    }
    assert [added[i] for i in (257, 258, 259)] == [("<s>", True), ("<pad>", True), ("</s>", True)] and 0 in added
    settings = json.loads((out / "tokenizer_config.json").read_text())
    assert [settings[f"{name}_token"] for name in ("bos", "pad", "eos")] == ["<s>", "<pad>", "</s>"]

    def stopped(match, **changes):
        torch.save(state | changes, run / "best.pt")
        refused(capsys, match, lambda: main([str(run), str(tmp_path / "bad")]), tmp_path / "bad")

    stopped("has no tokenizer.json", tokenizer={})
    stopped("must hold a state_dict", model={"a": 1})
    stopped("d_model=33 is not a multiple", model_config=state["model_config"] | dict(d_model=33))
    stopped("best.pt", model_config=dict(kind="bart"))
    stopped("does not hold the model of its config", model={})
