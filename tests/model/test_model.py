"""GPT-2: its shape, initialisation, precision, memory options, and Hugging Face's layout."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import model.gpt2_hub as hub
from model.gpt2 import GPT2 as Model
from model.gpt2 import SIZES, GPT2Config, check_groups, decay_groups, flops_per_token, parameter_count
from model.gpt2_hub import load_hf, save_hf

TINY = GPT2Config(vocab_size=97, block_size=32, n_layer=2, n_head=4, n_embd=32)

# fp32 logits of two implementations of one small network differ by the order of their sums: 4e-7 is
# what we see at logits of order 1; 1e-4 is the promise we make to users.
LOGITS_TOLERANCE = 1e-4


def build(config=TINY, seed=0, dtype=torch.float32, spread=0.0):
    """A model from a seed; ``spread`` moves every parameter, biases and gains too, off its initial value."""
    g = torch.Generator().manual_seed(seed)
    model = Model(config, dtype)
    model.init_weights(g)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(spread * torch.randn(p.shape, generator=g))
    return model


def tokens_for(config=TINY, batch=2, time=None, seed=1):
    shape = (batch, time or config.block_size)
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def logits_of(model, tokens):
    return model(tokens).float() @ model.head_weight.T


def mean_nll(logits, tokens):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def gradients(model, tokens):
    model.zero_grad()
    mean_nll(logits_of(model, tokens), tokens).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


# ---------------------------------------------------------------- shape and arguments


@pytest.mark.parametrize(
    "field, value, says",
    [
        ("n_head", 3, "n_embd=32 is not a multiple of n_head=3"),
        ("n_layer", 0, "n_layer=0"),
        ("vocab_size", 1.5, "vocab_size=1.5"),
        ("dropout", 1.0, "dropout=1.0"),
    ],
)
def test_config_refuses_shapes_that_cannot_be_built(field, value, says):
    fields = dict(vocab_size=97, block_size=32, n_layer=2, n_head=4, n_embd=32) | {field: value}
    with pytest.raises(ValueError, match=says):
        GPT2Config(**fields)


def test_forward_refuses_bad_input():
    model = build()
    with pytest.raises(ValueError, match="33 tokens: expected at most block_size=32"):
        model(tokens_for(time=33))
    with pytest.raises(ValueError, match="two dimensions"):
        model(torch.zeros(8, dtype=torch.long))
    with pytest.raises(ValueError, match="int64"):
        Model(TINY, torch.int64)


def test_published_sizes():
    def count(size, vocab=50257, block=1024):
        with torch.device("meta"):
            return parameter_count(Model(GPT2Config(vocab_size=vocab, block_size=block, **SIZES[size])))

    # Counts of the published checkpoints, gpt2, gpt2-medium and gpt2-large.
    assert count("gpt2") == 124_439_808
    assert count("gpt2-medium") == 354_823_168
    assert count("gpt2-large") == 774_030_080
    D, L = 2048, 24  # GPT-3 XL's shape, from the formula
    assert count("gpt2-1.3b") == 50257 * D + 1024 * D + L * (12 * D * D + 13 * D) + 2 * D
    assert count("nano", vocab=512, block=128) < 1_000_000


def test_head_is_the_token_embedding():
    model = build()
    assert model.head_weight is model.wte.weight
    assert sum("wte" in name or "head" in name for name, _ in model.named_parameters()) == 1
    # A token that is not read still gets a gradient, as an output; one that is read gets both.
    tokens = torch.full((1, 8), 5)
    grad = gradients(model, tokens)["wte.weight"]
    assert grad.abs().sum(1).gt(0).all()


def test_causal():
    model, tokens = build(spread=0.1), tokens_for()
    other = tokens.clone()
    other[:, 20] = (other[:, 20] + 1) % TINY.vocab_size
    a, b = model(tokens), model(other)
    assert torch.equal(a[:, :20], b[:, :20])  # the same sums in the same order, so exact
    assert (a[:, 20:] - b[:, 20:]).abs().amax(-1).gt(0).all()


def test_a_gradient_reaches_every_parameter():
    for name, grad in gradients(build(), tokens_for()).items():
        assert grad.isfinite().all() and grad.abs().max() > 0, name


def test_flops_are_those_torch_counts():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model, tokens = build(), tokens_for(batch=3, time=16)
    # The math backend computes the whole square, which is the convention of the formula.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits_of(model, tokens).sum().backward()
    assert counter.get_total_flops() == tokens.numel() * flops_per_token(TINY, 16)


def test_dropout_acts_in_four_places_in_training_only(monkeypatch):
    model, tokens = build(GPT2Config(97, 32, 1, 4, 32, dropout=0.3), spread=0.1), tokens_for(batch=16)
    zeros = {}

    def watch(name):
        return lambda _, inputs, output=None: zeros.update({name: (inputs[0] if output is None else output) == 0})

    model.h[0].register_forward_pre_hook(watch("embeddings"))
    model.h[0].attn.register_forward_hook(watch("attn"))
    model.h[0].mlp.register_forward_hook(watch("mlp"))
    model(tokens)
    # 16 x 32 x 32 draws: 5 standard errors of the share of zeros are 0.018.
    shares = {name: z.float().mean().item() for name, z in zeros.items()}
    assert shares == {name: pytest.approx(0.3, abs=0.018) for name in ("embeddings", "attn", "mlp")}
    with monkeypatch.context() as patch:  # what stays random without those three is the attention weights
        patch.setattr(F, "dropout", lambda x, *_: x)
        assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), build(GPT2Config(97, 32, 1, 4, 32), spread=0.1)(tokens))


# ---------------------------------------------------------------- initialisation


def test_initial_values():
    config = GPT2Config(vocab_size=1000, block_size=512, n_layer=3, n_head=4, n_embd=128)
    for name, p in build(config).named_parameters():
        if p.ndim == 1:
            expected = torch.zeros_like(p) if name.endswith("bias") else torch.ones_like(p)
            assert torch.equal(p, expected), name
            continue
        std = 0.02 / math.sqrt(6) if "c_proj" in name else 0.01 if "wpe" in name else 0.02
        # The standard error of a standard deviation is std / sqrt(2 n), of a mean std / sqrt(n); 5 of them.
        assert abs(p.std() - std) < 5 * std / math.sqrt(2 * p.numel()), name
        assert abs(p.mean()) < 5 * std / math.sqrt(p.numel()), name


def test_a_seed_gives_one_model():
    a, b = build(seed=3).state_dict(), build(seed=3).state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["wte.weight"], build(seed=4).wte.weight)
    assert not torch.equal(a["wte.weight"], a["wte.weight"].bfloat16().float())
    # From the global generator, or in another dtype, or built on meta first: the same values.
    torch.manual_seed(3)
    global_ = Model(TINY)
    half = Model(TINY).to(torch.bfloat16)
    half.init_weights(torch.Generator().manual_seed(3))
    with torch.device("meta"):
        late = Model(TINY)
    late.to_empty(device="cpu").init_weights(torch.Generator().manual_seed(3))
    for name in a:
        assert torch.equal(global_.state_dict()[name], a[name])
        assert torch.equal(half.state_dict()[name], a[name].bfloat16())
        assert torch.equal(late.state_dict()[name], a[name])
    # A generator of one's own leaves the global one alone.
    before = torch.get_rng_state()
    late.init_weights(torch.Generator().manual_seed(3))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same_model():
    model = Model(TINY, torch.bfloat16).cuda()
    model.init_weights(torch.Generator().manual_seed(0))
    on_cpu, tokens = build(dtype=torch.bfloat16), tokens_for()
    assert all(torch.equal(p.cpu(), q) for p, q in zip(model.parameters(), on_cpu.parameters(), strict=True))
    a, b = model(tokens.cuda()).float().cpu(), on_cpu(tokens).float()
    assert (a - b).norm() < 0.02 * b.norm()  # as for bf16 against fp32 below


# ---------------------------------------------------------------- precision, memory, compiler


def count_casts(model, tokens):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counter(TorchDispatchMode):
        casts = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.casts += func is torch.ops.aten._to_copy.default
            return func(*args, **(kwargs or {}))

    with Counter() as counter:
        model(tokens).sum().backward()
    return counter.casts


def test_casts_cost_nothing_in_fp32():
    assert count_casts(build(), tokens_for()) == 0
    assert count_casts(build(dtype=torch.bfloat16), tokens_for()) > 0


def test_bf16_activations_over_fp32_parameters():
    tokens = tokens_for()
    model, reference = build(dtype=torch.bfloat16, spread=0.02), build(spread=0.02)
    hidden, exact = model(tokens), reference(tokens)
    assert hidden.dtype == torch.bfloat16 and exact.dtype == torch.float32
    # A bf16 rounding is up to 2^-9 of the value; about 20 of them in a row, adding as random steps do: 1 %.
    assert (hidden.float() - exact).norm() < 0.02 * exact.norm()
    hidden.float().square().sum().backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())


def test_layers_follow_parameters_and_inputs_that_are_bf16():
    model = build().to(torch.bfloat16)
    model.dtype = torch.bfloat16
    assert model(tokens_for()).dtype == torch.bfloat16


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_checkpointing_changes_no_gradient(dropout):
    model, tokens = build(GPT2Config(97, 32, 2, 4, 32, dropout)), tokens_for()
    calls = []
    model.h[0].ln_1.register_forward_hook(lambda *_: calls.append(1))
    torch.manual_seed(5)
    plain = gradients(model, tokens)
    assert len(calls) == 1
    model.checkpoint_activations = True
    torch.manual_seed(5)
    recomputed = gradients(model, tokens)
    assert len(calls) == 3  # forward once more, and again in backward
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)
    with torch.no_grad():
        model(tokens)
    assert len(calls) == 4


@pytest.mark.parametrize("dtype, recompute", [(torch.float32, False), (torch.bfloat16, True)])
def test_compiles_to_one_graph(dtype, recompute):
    torch._dynamo.reset()
    model, tokens = build(GPT2Config(97, 32, 1, 4, 32), dtype=dtype), tokens_for()
    eager = gradients(model, tokens)
    model.checkpoint_activations = recompute
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.zero_grad()
    mean_nll(compiled(tokens).float() @ model.head_weight.T, tokens).backward()
    # The compiler may decompose and reorder: fp32's rounding, or bf16's, a few times over.
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    for name, p in model.named_parameters():
        assert (p.grad - eager[name]).norm() <= tolerance * eager[name].norm(), name


def test_fsdp2_hands_out_bf16_parameters():
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if dist.is_initialized():
        pytest.skip("a process group is already up")
    tokens = tokens_for()
    expected_model = build(dtype=torch.bfloat16)
    expected = gradients_in_activation_dtype(expected_model, tokens)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for dtype in (torch.bfloat16, torch.float32):
            model, policy = build(dtype=dtype), MixedPrecisionPolicy(param_dtype=torch.bfloat16)
            for block in model.h:
                fully_shard(block, mesh=mesh, mp_policy=policy)
            fully_shard(model, mesh=mesh, mp_policy=policy)
            # Where FSDP2 casts a block's input, torch 2.11 does not cast it again when the block is recomputed.
            model.checkpoint_activations = dtype == torch.bfloat16 or torch.__version__ >= "2.12"
            got = gradients_in_activation_dtype(model, tokens)
            for name in expected:
                full = got[name].full_tensor()
                assert full.dtype == torch.float32
                # bf16 gradients of one computation, in another order of roundings: 2^-8, a few times.
                assert (full - expected[name]).norm() < 0.02 * expected[name].norm(), name
    finally:
        dist.destroy_process_group()


def gradients_in_activation_dtype(model, tokens):
    """Gradients with the head in bf16, as fully_shard leaves it after the forward."""
    hidden = model(tokens)
    mean_nll((hidden @ model.head_weight.to(hidden.dtype).T).float(), tokens).backward()
    return {name: p.grad for name, p in model.named_parameters()}


# ---------------------------------------------------------------- optimizer groups


def test_decay_groups_cover_the_model_once():
    model = build()
    decay, rest = decay_groups(model, 0.1)
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)].split(".")[-2] for p in decay["params"]} == {"wte", "wpe", "c_attn", "c_proj", "c_fc"}
    assert all("ln_" in names[id(p)] or names[id(p)].endswith("bias") for p in rest["params"])
    assert len(decay["params"]) + len(rest["params"]) == len(names)
    torch.optim.AdamW([decay, rest], lr=1e-3).step()

    model.wpe.weight.requires_grad_(False)
    decay, rest = decay_groups(model, 0.1)
    assert id(model.wpe.weight) not in map(id, decay["params"] + rest["params"])
    with pytest.raises(ValueError, match="weight_decay=-0.1"):
        decay_groups(model, -0.1)


def test_groups_that_do_not_cover_the_model_are_refused():
    model = build()
    everything = list(model.parameters())
    check_groups(model, [dict(params=everything)])
    with pytest.raises(ValueError, match="ln_f.bias is there 0 times instead of 1"):
        check_groups(model, [dict(params=everything[:-1])])
    with pytest.raises(ValueError, match="wte.weight is there 2 times instead of 1"):
        check_groups(model, [dict(params=everything), dict(params=everything[:1])])
    with pytest.raises(ValueError, match="1 tensors are no parameters"):
        check_groups(model, [dict(params=[*everything, nn.Parameter(torch.zeros(1))])])
    model.wpe.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="wpe.weight is there 1 times instead of 0"):
        check_groups(model, [dict(params=everything)])

    class Forgetful(nn.Linear):
        def parameters(self, recurse=True):
            return iter([self.weight])

    with pytest.raises(ValueError, match="bias is there 0 times"):  # decay_groups checks itself
        decay_groups(Forgetful(2, 2), 0.1)


# ---------------------------------------------------------------- Hugging Face's layout


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


def hf_model(transformers, **options):
    """A random GPT-2 as transformers builds it, every parameter moved off its initial value."""
    fields = dict(vocab_size=97, n_positions=32, n_layer=2, n_head=4, n_embd=32, bos_token_id=0, eos_token_id=0)
    torch.manual_seed(7)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**(fields | options))).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


@torch.no_grad()
def largest_difference(ours, theirs, tokens):
    return (logits_of(ours, tokens) - theirs(tokens).logits).abs().max().item()


def read_tensors(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def write_tensors(folder, tensors):
    from safetensors.torch import save_file

    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")


def edit_config(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


@pytest.fixture
def saved(tmp_path):
    """A tiny model of ours in Hugging Face's layout."""
    save_hf(build(spread=0.1), tmp_path / "saved")
    return tmp_path / "saved"


def test_transformers_reads_what_we_write(transformers, tmp_path):
    ours = build(spread=0.1)
    save_hf(ours, tmp_path / "out", eos_id=96)
    theirs, info = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert largest_difference(ours, theirs.eval(), tokens_for()) < LOGITS_TOLERANCE
    assert theirs.config.eos_token_id == 96 and theirs.dtype == torch.float32
    save_hf(ours, tmp_path / "plain")
    assert transformers.AutoConfig.from_pretrained(tmp_path / "plain").eos_token_id is None


@pytest.mark.parametrize("layout", ["prefixed", "unprefixed", "sharded"])
def test_we_read_what_transformers_writes(transformers, tmp_path, layout):
    theirs = hf_model(transformers)
    shards = dict(max_shard_size="40KB") if layout == "sharded" else {}
    (theirs.transformer if layout == "unprefixed" else theirs).save_pretrained(tmp_path, **shards)
    assert (tmp_path / "model.safetensors.index.json").exists() == (layout == "sharded")
    assert largest_difference(load_hf(tmp_path), theirs, tokens_for()) < LOGITS_TOLERANCE


def test_round_trip_is_exact(saved):
    before, after = build(spread=0.1).state_dict(), load_hf(saved).state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and after[name].is_contiguous() for name in before)
    model = load_hf(saved, dtype=torch.bfloat16, dropout=0.1)
    assert model.dtype == torch.bfloat16 and model.config.dropout == 0.1
    assert all(p.requires_grad for p in model.parameters())
    with torch.no_grad():  # training what was loaded must not reach into the file
        for p in model.parameters():
            p.zero_()
    assert torch.equal(load_hf(saved).wte.weight, before["wte.weight"])


def test_masks_are_ignored_and_half_precision_becomes_fp32(saved):
    tensors = {name.removeprefix("transformer."): t.bfloat16() for name, t in read_tensors(saved).items()}
    masks = {"h.0.attn.bias": torch.ones(1, 1, 32, 32), "h.1.attn.masked_bias": torch.tensor(-1e4)}
    write_tensors(saved, tensors | masks | {"lm_head.weight": tensors["wte.weight"].clone()})
    model = load_hf(saved)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.wte.weight, tensors["wte.weight"].float())


def test_every_wrong_tensor_is_named(saved):
    tensors = read_tensors(saved)
    del tensors["transformer.h.1.ln_2.bias"], tensors["transformer.wpe.weight"]
    tensors |= {"transformer.h.2.ln_1.bias": torch.zeros(32), "extra": torch.zeros(1)}
    tensors["transformer.h.0.mlp.c_fc.weight"] = torch.zeros(128, 32)  # [out, in]: not Conv1D's layout
    write_tensors(saved, tensors)
    with pytest.raises(ValueError) as error:
        load_hf(saved)
    message = str(error.value)
    assert "missing wpe.weight, h.1.ln_2.bias" in message and "\n" not in message
    assert "h.2.ln_1.bias" in message and "extra" in message
    assert "h.0.mlp.c_fc.weight is (128, 32) instead of (32, 128)" in message


def test_an_untied_head_is_refused(saved):
    tensors = read_tensors(saved)
    write_tensors(saved, tensors | {"lm_head.weight": tensors["transformer.wte.weight"] + 1})
    with pytest.raises(ValueError, match="lm_head.weight differs from wte.weight"):
        load_hf(saved)


@pytest.mark.parametrize(
    "field, value",
    [
        ("activation_function", "relu"),
        ("layer_norm_epsilon", 1e-6),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("add_cross_attention", True),
        ("tie_word_embeddings", False),
        ("n_inner", 100),
        ("model_type", "llama"),
        ("n_head", 5),
    ],
)
def test_options_we_do_not_have_are_refused(saved, field, value):
    edit_config(saved, **{field: value})
    with pytest.raises(ValueError, match=field):
        load_hf(saved)


def test_damaged_or_missing_files(saved):
    weights = saved / "model.safetensors"
    content = weights.read_bytes()
    for damaged in (content[:-100], content[:20], b"", b"\xff" * 64):
        weights.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model.safetensors is damaged") as error:
            load_hf(saved)
        assert "\n" not in str(error.value)
    weights.unlink()
    with pytest.raises(ValueError, match="neither model.safetensors nor"):
        load_hf(saved)
    index = saved / "model.safetensors.index.json"
    index.write_text(json.dumps(dict(weight_map={"wte.weight": "model-1.safetensors"})))
    with pytest.raises(ValueError, match="lacks model-1.safetensors"):
        load_hf(saved)
    index.write_text(json.dumps(dict(weight_map={"wte.weight": "../elsewhere.safetensors"})))
    with pytest.raises(ValueError, match="weight_map"):
        load_hf(saved)
    (saved / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json cannot be read as JSON"):
        load_hf(saved)
    (saved / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="model_type=None"):
        load_hf(saved)
    (saved / "config.json").unlink()
    with pytest.raises(ValueError, match="has no config.json"):
        load_hf(saved)


def test_a_hub_out_of_reach_names_the_way_out(monkeypatch, tmp_path):
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def unreachable(*_, **__):
        raise ConnectionError("Name or service not known\nMax retries exceeded")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    for name in ("gpt2", "someone/some-model", str(tmp_path / "absent"), "./absent"):
        with pytest.raises(ValueError, match="pass a local folder") as error:
            load_hf(name)
        assert name in str(error.value) and "\n" not in str(error.value)


def test_a_model_on_the_hub_is_loaded_from_its_local_copy(monkeypatch, saved):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(saved))
    assert torch.equal(load_hf("someone/some-model").wte.weight, build(spread=0.1).wte.weight)


def test_a_failed_save_leaves_nothing_behind(monkeypatch, tmp_path):
    import safetensors.torch

    def full(tensors, path, **_):
        path.write_bytes(b"half of it")
        raise OSError("No space left on device")

    save_hf(build(), tmp_path / "old")
    before = {p.name: p.read_bytes() for p in (tmp_path / "old").iterdir()}
    monkeypatch.setattr(safetensors.torch, "save_file", full)
    for name in ("new", "old"):
        with pytest.raises(OSError):
            save_hf(build(seed=1), tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == ["old"]
    assert {p.name: p.read_bytes() for p in (tmp_path / "old").iterdir()} == before


def test_saving_over_a_folder_replaces_the_model_and_keeps_the_rest(saved):
    (saved / "notes.txt").write_text("mine")
    save_hf(build(seed=9), saved, {"vocab.json": b"{}"})
    assert torch.equal(load_hf(saved).wte.weight, build(seed=9).wte.weight)
    assert (saved / "notes.txt").read_text() == "mine" and (saved / "vocab.json").read_bytes() == b"{}"
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


@pytest.mark.parametrize("name", ["../tokenizer.json", "a/b.json", "", "..", "config.json", "model.safetensors"])
def test_tokenizer_files_stay_in_the_folder(tmp_path, name):
    with pytest.raises(ValueError, match="tokenizer file"):
        save_hf(build(), tmp_path / "out", {name: b"{}"})
    assert not list(tmp_path.iterdir())


def test_save_refuses_bad_arguments(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        save_hf(build(), tmp_path / "file")
    with pytest.raises(ValueError, match="eos_id=97"):
        save_hf(build(), tmp_path / "out", eos_id=97)
    with pytest.raises(ValueError, match="holds str"):
        save_hf(build(), tmp_path / "out", {"vocab.json": "{}"})
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def write_checkpoint(path, **changes):
    model = build(spread=0.1)
    fields = dict(vocab_size=97, block_size=32, n_layer=2, n_head=4, n_embd=32, dropout=0.0)
    torch.save(dict(model=model.state_dict(), model_config=fields, step=3) | changes, path)
    return model


def test_a_checkpoint_is_exported_with_its_tokenizer(transformers, tmp_path, capsys):
    tokenizers = pytest.importorskip("tokenizers")
    words = {f"w{i}": i for i in range(96)} | {"<|endoftext|>": 96}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    # Without the second file transformers takes a GPT-2 to have GPT-2's own kind of tokenizer.
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    files = {"tokenizer.json": tokenizer.to_str().encode(), "tokenizer_config.json": json.dumps(kind).encode()}
    ours = write_checkpoint(tmp_path / "last.pt", tokenizer=dict(files=files, eos_id=96))
    assert hub.main([str(tmp_path / "last.pt"), str(tmp_path / "out")]) == 0
    assert "wrote" in capsys.readouterr().out
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert theirs.config.eos_token_id == 96
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("w3 w1 w4", return_tensors="pt").input_ids
    assert ids.tolist() == [[3, 1, 4]]
    assert largest_difference(ours, theirs, ids) < LOGITS_TOLERANCE


@pytest.mark.parametrize(
    "what", ["absent", "garbage", "tensor", "no model", "no field", "field", "key", "shape", "code"]
)
def test_a_bad_checkpoint_is_one_line_and_nothing_written(tmp_path, capsys, what):
    path, state = tmp_path / "last.pt", build().state_dict()
    config = dict(vocab_size=97, block_size=32, n_layer=2, n_head=4, n_embd=32)
    changes = {
        "no field": dict(model_config={"vocab_size": 97}),
        "field": dict(model_config=config | dict(n_head=5)),
        "key": dict(model={k: v for k, v in state.items() if k != "ln_f.bias"}),
        "shape": dict(model=state | {"wte.weight": torch.zeros(98, 32)}),
        "code": dict(model=nn.Linear(1, 1)),
        "state": dict(model={"wte.weight": 3}),
        "tokenizer": dict(tokenizer=[1]),
        "eos": dict(tokenizer=dict(files={}, eos_id=97)),
    }
    if what in changes:
        write_checkpoint(path, **changes[what])
    elif what == "garbage":
        path.write_bytes(b"no checkpoint")
    elif what != "absent":
        torch.save(torch.zeros(1) if what == "tensor" else {"step": 1}, path)
    assert hub.main([str(path), str(tmp_path / "out")]) == 2
    out = capsys.readouterr()
    assert out.err.startswith("model.gpt2_hub: ") and out.err.count("\n") == 1 and not out.out
    assert not (tmp_path / "out").exists()


class Stranger:
    """Pickled, it creates a file where it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_checkpoint_cannot_run_code(tmp_path):
    write_checkpoint(tmp_path / "last.pt", note=Stranger(str(tmp_path / "created")))
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        hub.export(tmp_path / "last.pt", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_command_line():
    def run(*arguments):
        return subprocess.run([sys.executable, "-m", "model.gpt2_hub", *arguments], capture_output=True, text=True)

    result = run("only-one")
    assert result.returncode == 2 and not result.stdout
    assert result.stderr == "usage: python -m model.gpt2_hub CHECKPOINT.pt FOLDER\n"
    assert hub.main(["--help"]) == 0 and hub.main(["a", "--b"]) == 2 and hub.main([]) == 2


# ---------------------------------------------------------------- perplexity, against transformers


def perplexity(logits_of_window, tokens, block):
    """Over non-overlapping windows, every token but each window's first."""
    total, count = 0.0, 0
    with torch.no_grad():
        for window in tokens[: len(tokens) // block * block].view(-1, block).split(8):
            total += mean_nll(logits_of_window(window), window).item() * window.numel() * (block - 1) / block
            count += window.numel() * (block - 1) / block
    return math.exp(total / count)


def compare_perplexity(transformers, tmp_path, tokens, **options):
    theirs = hf_model(transformers, **options)
    theirs.save_pretrained(tmp_path)
    ours, block = load_hf(tmp_path), theirs.config.n_positions
    a = perplexity(lambda w: logits_of(ours, w), tokens, block)
    b = perplexity(lambda w: theirs(w).logits, tokens, block)
    assert abs(a / b - 1) < 1e-4  # a mean of NLLs that differ by LOGITS_TOLERANCE at most


def test_perplexity_of_random_tokens(transformers, tmp_path):
    compare_perplexity(transformers, tmp_path, tokens_for(batch=1, time=2048)[0])


def test_perplexity_of_wikitext(transformers, tmp_path):
    data = os.environ.get("LM_DATA")
    if not data:
        pytest.skip("needs $LM_DATA with tokenizers/gpt2 and wikitext-2")
    files = {name: os.path.join(data, "tokenizers", "gpt2", name) for name in ("vocab.json", "merges.txt")}
    text = next((p for p in wikitext_files(data) if os.path.exists(p)), None)
    if text is None or not all(map(os.path.exists, files.values())):
        pytest.skip("$LM_DATA lacks tokenizers/gpt2 or a WikiText test file")
    tokenizer = transformers.GPT2TokenizerFast(vocab=files["vocab.json"], merges=files["merges.txt"])
    ids = tokenizer(open(text, encoding="utf-8").read(10_000)).input_ids
    assert len(ids) > 2048 and tokenizer.decode(ids[:50]) in open(text, encoding="utf-8").read(1000)
    compare_perplexity(transformers, tmp_path, torch.tensor(ids[:2048]), vocab_size=50257, n_positions=256)


def wikitext_files(data):
    return [os.path.join(data, name, "test.txt") for name in ("wikitext-2", "wikitext-103")]
