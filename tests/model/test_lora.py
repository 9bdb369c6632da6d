"""LoRA and NF4: parity with peft and bitsandbytes in both directions, what the backward measures, and the files."""

import json
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from model import lora
from model.lora import (
    TARGETS,
    LoRAConfig,
    LoRALinear,
    NF4Linear,
    add_lora,
    load_adapter,
    load_base,
    lora_flops_per_token,
    save_adapter,
)
from model.qwen3 import Qwen3, Qwen3Config
from model.qwen3_hub import load_qwen3, save_qwen3

# As in tests/test_qwen3.py: the order of fp32 sums costs under 1e-5 of logits of order 1 to 10; 1e-4 is promised.
LOGITS_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 1e-4  # of a gradient's largest entry, where a wrong term would show as order 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Qwen3 written by transformers, all parameters off their initial values, rows that NF4's blocks divide."""
    import transformers

    shape = dict(vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    shape |= dict(num_key_value_heads=2, head_dim=32, max_position_embeddings=64, tie_word_embeddings=True)
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**shape))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    folder = tmp_path_factory.mktemp("tiny-qwen3")
    model.save_pretrained(folder)
    return folder


def theirs(folder, base="fp32"):
    import transformers

    if base == "fp32":
        return transformers.Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    nf4 = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return transformers.Qwen3ForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=nf4, device_map="cpu"
    )


def adapted(folder, base="fp32", seed=0, dtype=torch.float32, **config):
    """Ours with an adapter whose B has moved."""
    if base == "nf4":
        pytest.importorskip("bitsandbytes")
    model = load_base(folder, base, dtype)
    g = torch.Generator().manual_seed(seed)
    add_lora(model, LoRAConfig(**dict(r=4, alpha=16) | config), g)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("lora_B"):
                p.normal_(0, 0.1, generator=g)
    return model


def tokens_of(batch=2, time=20, seed=1):
    return torch.randint(97, (batch, time), generator=torch.Generator().manual_seed(seed))


def answers_of(batch=2, time=20):
    """True from some place in each row on, and another prompt after it."""
    at = torch.arange(time)
    return torch.stack([(at >= 5 + 4 * b) & (at < time - b) for b in range(batch)])


def logits_of(model, tokens):
    return model(tokens).float() @ model.head_weight.float().T


def nll(logits, tokens):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def backward(model, tokens):
    model.zero_grad()
    nll(logits_of(model, tokens), tokens).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_gradients_agree(ours, peers, tolerance=GRADIENT_TOLERANCE):
    assert ours.keys() == peers.keys() and ours
    for name, g in ours.items():
        allowed = tolerance * peers[name].abs().max().item()
        torch.testing.assert_close(g, peers[name], rtol=0, atol=allowed, msg=lambda m, n=name: f"{n} {m}")


def assert_peft_agrees(ours, peer, seed=None):
    """Logits and all adapter gradients, from one forward and backward of each."""
    tokens = tokens_of()
    results = []
    for model, logits in ((ours, lambda t: logits_of(ours, t)), (peer, lambda t: peer(t).logits)):
        if seed is not None:
            torch.manual_seed(seed)
        out = logits(tokens)
        model.zero_grad()
        nll(out, tokens).backward()
        results.append(out)
    torch.testing.assert_close(*results, rtol=0, atol=LOGITS_TOLERANCE)
    peers = {n.replace(".default.", "."): p.grad for n, p in peer.named_parameters() if p.requires_grad}
    assert_gradients_agree({n: p.grad for n, p in lora.adapter_tensors(ours).items()}, peers)


# ---------------------------------------------------------------- parity with peft

ADAPTERS = {
    "lora": dict(),
    "rslora": dict(rslora=True),
    "alpha 3 on two layers": dict(alpha=3, targets=("v_proj", "down_proj")),
}


@pytest.mark.parametrize("base", ["fp32", "nf4"])
@pytest.mark.parametrize("config", ADAPTERS.values(), ids=ADAPTERS)
def test_peft_loads_our_adapter(folder, tmp_path, config, base):
    PeftModel = pytest.importorskip("peft").PeftModel

    ours = adapted(folder, base, **config)
    save_adapter(ours, tmp_path / "adapter", str(folder))
    peer = PeftModel.from_pretrained(theirs(folder, base), tmp_path / "adapter", is_trainable=True)
    # In training mode, which changes nothing without dropout: outside it bitsandbytes repacks a layer for the bf16
    # instructions of some CPUs, and its products then err by 1e-3.
    assert_peft_agrees(ours, peer.train())


@pytest.mark.parametrize("config", ADAPTERS.values(), ids=ADAPTERS)
def test_we_load_pefts_adapter(folder, tmp_path, config):
    peft = pytest.importorskip("peft")

    names = dict(lora_alpha=config.get("alpha", 16), use_rslora=config.get("rslora", False))
    targets = list(config["targets"]) if "targets" in config else "all-linear"
    peer = peft.get_peft_model(
        theirs(folder), peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", **names)
    )
    with torch.no_grad():
        for name, p in peer.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.1)
    peer.save_pretrained(tmp_path / "theirs")
    ours = load_qwen3(folder)
    load_adapter(ours, tmp_path / "theirs", str(folder))
    assert_peft_agrees(ours, peer)
    # And back: the file we write of it holds the same names and values.
    save_adapter(ours, tmp_path / "ours", str(folder))
    a, b = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_dropout_is_pefts_down_to_the_draws(folder, tmp_path):
    PeftModel = pytest.importorskip("peft").PeftModel

    ours = adapted(folder, dropout=0.3)
    save_adapter(ours, tmp_path / "adapter", str(folder))
    peer = PeftModel.from_pretrained(theirs(folder), tmp_path / "adapter", is_trainable=True).train()
    assert_peft_agrees(ours.train(), peer, seed=5)
    first = logits_of(ours, tokens_of())
    assert not torch.equal(first, logits_of(ours, tokens_of()))
    ours.eval()
    assert torch.equal(logits_of(ours, tokens_of()), logits_of(ours, tokens_of()))


# ---------------------------------------------------------------- start


def test_the_start_leaves_the_function_alone_and_trains_the_adapter_only(folder):
    plain, model = load_qwen3(folder), load_qwen3(folder)
    add_lora(model, LoRAConfig(r=8), torch.Generator().manual_seed(0))
    assert torch.equal(model(tokens_of()), plain(tokens_of()))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 7 and all(name.endswith(("lora_A", "lora_B")) for name in trained)
    assert backward(model, tokens_of()).keys() == trained
    blocks = lora.block_parameters(model)
    assert len(blocks) == 2 and {id(p) for block in blocks for p in block} == {
        id(p) for p in model.parameters() if p.requires_grad
    }
    again = load_qwen3(folder)
    add_lora(again, LoRAConfig(r=8), torch.Generator().manual_seed(0))
    for path, layer in lora._adapted(model).items():
        A, bound = layer.lora_A, 1 / math.sqrt(layer.shape[1])
        assert torch.equal(A, again.get_submodule(path).lora_A) and not layer.lora_B.any()
        assert A.abs().max() <= bound
        # Uniform: sd is bound / sqrt(3); of 512 draws and more its own error is 2.8 % (kurtosis 1.8), here 4 of those.
        assert A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.08)


def test_bf16_activations_give_fp32_gradients_of_the_same_value(folder):
    # Rounded to bf16, so that all three start from one function.
    exact = load_qwen3(folder, torch.float32)
    for p in exact.parameters():
        p.data = p.data.bfloat16().float()
    models = [exact, load_base(folder, "bf16"), load_base(folder, "fp32")]
    gradients = []
    for model in models:
        add_lora(model, LoRAConfig(r=8), torch.Generator().manual_seed(0))
        lora.set_segments(model, answers_of())
        gradients.append(backward(model, tokens_of()))
    for mixed in gradients[1:]:
        assert all(g.dtype == torch.float32 for g in mixed.values())
        for name, g in mixed.items():
            e = gradients[0][name]
            # bf16 keeps 8 bits: a few roundings of 2^-9 in each of two blocks; a wrong term is far from 5 %.
            assert (g - e).norm() <= 0.05 * e.norm(), name


# ---------------------------------------------------------------- NF4


@pytest.mark.parametrize("double_quant", [False, True])
def test_nf4_is_bitsandbytes_own_layer(double_quant):
    bnb = pytest.importorskip("bitsandbytes")

    torch.manual_seed(0)
    weight, x = torch.randn(96, 128), torch.randn(3, 5, 128, requires_grad=True)
    ours = NF4Linear(weight, double_quant)
    peer = bnb.nn.Linear4bit(128, 96, bias=False, compress_statistics=double_quant, quant_type="nf4")
    peer.weight = bnb.nn.Params4bit(
        weight, requires_grad=False, compress_statistics=double_quant, quant_type="nf4", quant_storage=torch.uint8
    )
    peer = peer.to("cpu")
    dy = torch.randn(3, 5, 96)
    results = []
    for layer in (ours, peer):
        x.grad = None
        y = layer(x)
        y.backward(dy)
        results.append((y.detach(), x.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)  # the same 4-bit weights; sums of 128 terms of order 1
    dense = ours.dense(torch.float32)
    torch.testing.assert_close(results[0][0], x.detach() @ dense.T, rtol=0, atol=1e-4)
    torch.testing.assert_close(results[0][1], dy @ dense, rtol=0, atol=1e-4)
    # NF4's widest gap is 0.304 of a block's largest value, |w| <= 4.5 here; so half of it at most, and
    # double quantisation adds its own 1 %.
    assert (dense - weight).abs().max() < 0.16 * weight.abs().max()
    assert 0 < (dense - weight).square().mean().sqrt() < 0.12  # Dettmers et al.: about 0.09 for a normal weight


def test_double_quantisation_shrinks_the_scales():
    pytest.importorskip("bitsandbytes")
    layers = [NF4Linear(torch.randn(256, 256, generator=torch.Generator().manual_seed(0)), d) for d in (False, True)]
    assert [layer.quant.absmax.element_size() for layer in layers] == [4, 1]
    assert not torch.equal(*(layer.dense(torch.float32) for layer in layers))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_model_is_the_model_of_its_dequantised_weights(folder, dtype):
    """Quantised base with adapters against the dense base of the same values: function and gradients."""
    nf4 = adapted(folder, "nf4", dtype=dtype)
    dense = adapted(folder, {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype], dtype=dtype)
    for path, layer in lora._adapted(nf4).items():
        assert isinstance(layer.base, NF4Linear)
        dense.get_submodule(path).base.weight.data.copy_(layer.base.dense(dtype))
    a, b = logits_of(nf4, tokens_of()), logits_of(dense, tokens_of())
    assert torch.equal(a, b)
    assert_gradients_agree(backward(nf4, tokens_of()), backward(dense, tokens_of()), 0)
    assert (a - logits_of(adapted(folder, "fp32"), tokens_of())).abs().max() > 0.01  # it was quantised
    assert not any("packed" in name for name in nf4.state_dict())
    nf4.to(torch.bfloat16)  # a change of dtype has nothing to do with 4-bit values and their scales
    assert torch.equal(nf4.layers[0].mlp.up_proj.base.dense(dtype), dense.layers[0].mlp.up_proj.base.weight)


def test_layers_without_an_adapter_back_propagate_in_nf4_too(folder):
    a, b = (adapted(folder, "nf4", targets=("q_proj",)) for _ in range(2))
    for i, layer in enumerate(b.layers):
        for name in ("k_proj", "v_proj", "o_proj"):
            old = getattr(layer.self_attn, name)
            new = torch.nn.Linear(old.shape[1], old.shape[0], bias=False)
            new.weight = torch.nn.Parameter(old.dense(torch.float32), requires_grad=False)
            setattr(b.layers[i].self_attn, name, new)
    assert_gradients_agree(backward(a, tokens_of()), backward(b, tokens_of()))


@pytest.mark.parametrize("base", ["fp32", "nf4"])
def test_the_forward_keeps_inputs_and_adapter_only(folder, base):
    """No weight [out, in] and no [rows, out] output is saved by the adapted layer."""
    layer = adapted(folder, base).layers[0].mlp.up_proj
    x = torch.randn(50, 64, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        layer(x)
    assert sorted(saved) == sorted([(50, 64), (4, 64), (128, 4), (50, 4)])


# ---------------------------------------------------------------- prompt and answer rows


def part_by_autograd(folder, select, tokens, **config):
    """Gradients that the rows in ``select`` contribute: adapters elsewhere compute the same with A and B detached."""
    model = adapted(folder, **config)

    def forward(layer, x):
        def product(A, B):
            return layer.scale * F.linear(F.linear(x, A), B)

        live, still = product(layer.lora_A, layer.lora_B), product(layer.lora_A.detach(), layer.lora_B.detach())
        return F.linear(x, layer.base.dense(x.dtype)) + torch.where(select[..., None], live, still)

    for layer in lora._adapted(model).values():
        layer.forward = lambda x, layer=layer: forward(layer, x)
    backward(model, tokens)
    return [[p.grad for p in block] for block in lora.block_parameters(model)]


def mean_square(blocks):
    return torch.tensor([sum(g.square().sum() for g in b) / sum(g.numel() for g in b) for b in blocks])


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("config", [dict(), dict(base="nf4", rslora=True), dict(targets=("q_proj", "down_proj"))])
def test_segment_rms_is_that_of_two_separate_backward_passes(folder, config, checkpointed):
    tokens, answers = tokens_of(), answers_of()
    model = adapted(folder, **config)
    model.checkpoint_activations = checkpointed
    undivided = backward(model, tokens)
    assert not lora.segment_rms(model).any()
    lora.set_segments(model, answers)
    # Sums in another order than the undivided product's: rounding only.
    assert_gradients_agree(backward(model, tokens), undivided, 1e-5)
    parts = [part_by_autograd(folder, select, tokens, **config) for select in (~answers, answers)]
    expected = torch.stack([mean_square(p) for p in parts], dim=1).sqrt()
    assert expected.min() > 0 and (expected[:, 0] / expected[:, 1] - 1).abs().min() > 0.01
    torch.testing.assert_close(lora.segment_rms(model, reset=False), expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(lora.segment_rms(model), expected, rtol=1e-4, atol=0)
    assert not lora.segment_rms(model).any()
    lora.set_segments(model, None)
    assert_gradients_agree(backward(model, tokens), undivided, 0)
    assert not lora.segment_rms(model).any()


@pytest.mark.parametrize("checkpointed", [False, True])
def test_micro_batches_accumulate(folder, checkpointed):
    model = adapted(folder)
    model.checkpoint_activations = checkpointed
    batches = [(tokens_of(seed=2), answers_of()), (tokens_of(batch=3, time=12, seed=3), answers_of(3, 12))]
    singles, gradients = [], []
    for tokens, answers in batches:
        lora.set_segments(model, answers)
        gradients.append(backward(model, tokens))
        singles.append(lora.segment_rms(model).square())
    model.zero_grad()
    for tokens, answers in batches:
        lora.set_segments(model, answers)
        nll(logits_of(model, tokens), tokens).backward()
    torch.testing.assert_close(lora.segment_rms(model), ((singles[0] + singles[1]) / 2).sqrt(), rtol=1e-5, atol=0)
    total = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert_gradients_agree(total, {name: gradients[0][name] + gradients[1][name] for name in total}, 1e-5)


def test_the_mask_of_a_forward_holds_for_its_own_backward(folder):
    """Two forwards before two backwards, as in an interleaved pipeline."""
    model, masks = adapted(folder), [answers_of(), ~answers_of()]
    expected = []
    for mask in masks:
        lora.set_segments(model, mask)
        backward(model, tokens_of())
        expected.append(lora.segment_rms(model))
    losses = []
    for mask in masks:
        lora.set_segments(model, mask)
        losses.append(nll(logits_of(model, tokens_of()), tokens_of()))
    for loss, rms in zip(losses, expected, strict=True):
        loss.backward()
        torch.testing.assert_close(lora.segment_rms(model), rms, rtol=0, atol=0)


@pytest.mark.parametrize("share", ["all", "none"])
def test_a_batch_of_one_segment_has_nothing_in_the_other(folder, share):
    model, mask = adapted(folder), torch.full((2, 20), share == "all")
    undivided = backward(model, tokens_of())
    lora.set_segments(model, mask)
    assert_gradients_agree(backward(model, tokens_of()), undivided, 1e-5)
    rms = lora.segment_rms(model)
    empty, full = (rms[:, 0], rms[:, 1]) if share == "all" else (rms[:, 1], rms[:, 0])
    assert not empty.any() and (full > 0).all()


def test_measuring_costs_no_further_multiplications(folder):
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for mask in (None, answers_of()):
        model = adapted(folder)
        lora.set_segments(model, mask)
        with FlopCounterMode(display=False) as counter:
            backward(model, tokens_of())
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_dropout_and_checkpoints_measure_what_the_forward_drew(folder):
    results = []
    for checkpointed in (False, True):
        model = adapted(folder, dropout=0.3).train()
        model.checkpoint_activations = checkpointed
        lora.set_segments(model, answers_of())
        torch.manual_seed(4)
        results.append((backward(model, tokens_of()), lora.segment_rms(model)))
    assert_gradients_agree(results[0][0], results[1][0], 0)
    assert torch.equal(results[0][1], results[1][1])


def test_a_mask_that_does_not_fit_is_one_line(folder):
    model = adapted(folder)
    with pytest.raises(ValueError, match="dtype torch.int64: expected bool"):
        lora.set_segments(model, torch.ones(2, 20, dtype=torch.int64))
    lora.set_segments(model, answers_of(2, 19))
    with pytest.raises(ValueError, match="a batch of 40 tokens, but the answer mask has 38"):
        model(tokens_of())
    with torch.no_grad():
        model(tokens_of())  # evaluation between two steps needs no mask
    with pytest.raises(ValueError, match="no LoRA adapters"):
        lora.set_segments(load_qwen3(folder), answers_of())


# ---------------------------------------------------------------- merge and export


@pytest.mark.parametrize("base", ["fp32", "nf4"])
def test_the_merged_export_is_the_adapted_model(folder, tmp_path, base):
    model = adapted(folder, base, rslora=True).eval()
    before = logits_of(model, tokens_of())
    save_qwen3(model, tmp_path / "merged")
    assert torch.equal(logits_of(model, tokens_of()), before)
    written = theirs(tmp_path / "merged")
    torch.testing.assert_close(written(tokens_of()).logits, before, rtol=0, atol=LOGITS_TOLERANCE)
    plain = lora.merged(model)
    assert not plain.training and not any(isinstance(m, LoRALinear | NF4Linear) for m in plain.modules())
    torch.testing.assert_close(logits_of(plain, tokens_of()), before, rtol=0, atol=LOGITS_TOLERANCE)
    assert plain.embed_tokens.weight is model.embed_tokens.weight
    assert torch.equal(logits_of(model, tokens_of()), before)
    assert (theirs(folder)(tokens_of()).logits - before).abs().max() > 0.1  # the adapter is in it


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "config, says",
    [
        (dict(r=0), "rank r=0: expected a positive integer; rank 0 would train nothing"),
        (dict(r=2.0), "rank r=2.0"),
        (dict(alpha=0), "alpha=0: expected a positive number"),
        (dict(dropout=1.0), "dropout=1.0: expected a probability"),
        (dict(targets=()), r"targets=\(\): expected one or more of q_proj"),
        (dict(targets=("q_proj", "lm_head")), "lm_head"),
        (dict(targets="q_proj"), "targets='q_proj'"),
    ],
)
def test_a_config_that_makes_no_adapter_is_refused(config, says):
    with pytest.raises(ValueError, match=says):
        LoRAConfig(**config)


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(r=0), "rank 0 would train nothing"),
        (dict(r=8), r"lora_A.weight is \(4, 64\) instead of \(8, 64\)"),
        (dict(use_dora=True), "use_dora=True is not supported"),
        (dict(bias="all"), "bias='all' is not supported"),
        (dict(peft_type="IA3"), "peft_type='IA3'"),
        (dict(init_lora_weights="pissa"), "init_lora_weights='pissa'"),
        (dict(rank_pattern={"q_proj": 2}), "rank_pattern="),
        (dict(modules_to_save=["lm_head"]), "modules_to_save="),
        (dict(layers_to_transform=[0]), "layers_to_transform="),
        (dict(target_modules=["q_proj"]), "unexpected base_model.model.model.layers.0.mlp"),
        (dict(target_modules=["query"]), r"targets=\('query',\)"),
        (dict(target_modules=".*proj"), "target_modules='.*proj': expected a list"),
        (dict(target_modules=None), "does not say target_modules"),
        (dict(base_model_name_or_path="Qwen/Qwen3-4B"), "is an adapter of 'Qwen/Qwen3-4B', not of"),
    ],
)
def test_an_adapter_that_does_not_fit_is_one_line_and_changes_nothing(folder, tmp_path, change, says):
    save_adapter(adapted(folder), tmp_path, str(folder))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    model = load_qwen3(folder)
    with pytest.raises(ValueError, match=says) as error:
        load_adapter(model, tmp_path, str(folder))
    assert "\n" not in str(error.value)
    assert not any(isinstance(m, LoRALinear) for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_adapter_files_that_are_missing_or_damaged_are_one_line(folder, tmp_path):
    model = load_qwen3(folder)
    with pytest.raises(ValueError, match="has no adapter_config.json"):
        load_adapter(model, tmp_path)
    save_adapter(adapted(folder), tmp_path, "Qwen/Qwen3-0.6B")
    load_adapter(load_qwen3(folder), tmp_path, "/models/Qwen3-0.6B")  # a local copy of the hub's
    path = tmp_path / "adapter_model.safetensors"
    whole, tensors = path.read_bytes(), load_file(path)
    path.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="adapter_model.safetensors is damaged"):
        load_adapter(model, tmp_path)
    save_file({n: t for n, t in tensors.items() if "layers.1.mlp.up_proj" not in n}, path)
    with pytest.raises(ValueError, match="missing base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"):
        load_adapter(model, tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match="has no adapter_model.safetensors"):
        load_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="has LoRA adapters already"):
        load_adapter(adapted(folder), tmp_path)
    with pytest.raises(ValueError, match="has LoRA adapters already"):
        add_lora(adapted(folder), LoRAConfig())


def test_bases_that_cannot_be_had_are_one_line(folder, monkeypatch):
    with pytest.raises(ValueError, match="base='int8': expected one of bf16, fp32, nf4"):
        load_base(folder, "int8")
    with pytest.raises(ValueError, match="in a multiple of 64; take base 'bf16'"):
        NF4Linear(torch.zeros(64, 96))
    for name in [n for n in sys.modules if n.split(".")[0] == "bitsandbytes"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match="pip install bitsandbytes, or take base 'bf16'") as error:
        load_base(folder, "nf4")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("targets, share", [(TARGETS, 1.0), (("q_proj", "k_proj", "v_proj", "up_proj"), 0.25)])
def test_flops_are_those_torch_counts(targets, share):
    """Forward and backward of a tiny model, its loss on a share of the tokens, exactly: torch counts products only, and
    has to be told of the one in place."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from kernels import linear_score
    from kernels.losses import ce

    config = Qwen3Config(96, 32, 48, 3, 4, 2, head_dim=16, tie_word_embeddings=True)
    lora = LoRAConfig(r=4, targets=targets)
    torch.manual_seed(0)
    model = Qwen3(config)
    add_lora(model, lora)
    tokens_BT = torch.randint(96, (2, 16))

    def in_place(_, left, right, *args, out_shape=None, **kwargs):
        return 2 * left[0] * left[1] * right[1]

    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place})
    with counter, sdpa_kernel(SDPBackend.MATH):
        hidden = model(tokens_BT).flatten(0, 1)[: int(32 * share)]
        loss, _ = linear_score(hidden, model.head_weight, tokens_BT.flatten()[: len(hidden)], ce, impl="torch")
        loss.backward()
    assert counter.get_total_flops() == 32 * lora_flops_per_token(config, lora, 16, share)
