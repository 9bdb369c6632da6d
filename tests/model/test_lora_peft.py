"""Adapters and peft: parity in both directions, and adapter files that do not fit."""

import json
from dataclasses import asdict

import pytest
import torch
from lora_models import LOGITS_TOLERANCE, adapted, assert_gradients_agree, logits_of, nll, theirs, tokens_of
from safetensors.torch import load_file, save_file

from model import lora
from model.decoder_hub import load_decoder, save_decoder
from model.lora import LoRAConfig, LoRALinear, add_lora, load_base
from model.lora_hub import adapter_tensors, load_adapter, save_adapter


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
    assert_gradients_agree({n: p.grad for n, p in adapter_tensors(ours).items()}, peers)


ADAPTERS = {
    "lora": dict(),
    "rslora": dict(rslora=True),
    "alpha 3 on two layers": dict(alpha=3, targets=("v_proj", "down_proj")),
    "a regex": dict(targets=r".*\.1\.(self_attn\.[qk]|mlp\.up)_proj"),
    "the whole name of one, the end of another": dict(targets=("layers.0.mlp.up_proj", "self_attn.o_proj")),
    "one block": dict(layers=(1,), targets=("q_proj", "down_proj")),
    "ranks and alphas by pattern": dict(
        rslora=True,
        rank_pattern={"q_proj": 2, r"layers\.0\.mlp\..*": 6, "up_proj": 3},
        alpha_pattern={"model.layers.1.self_attn.q_proj": 5.0, "v_proj": 7},
    ),
}
PEFT_NAMES = dict(alpha="lora_alpha", rslora="use_rslora", targets="target_modules", layers="layers_to_transform")


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


@pytest.mark.parametrize("base", ["fp32", "nf4"])
def test_biases_of_the_base_stay_under_an_adapter(biased, tmp_path, base):
    """Some of the layers adapted, the others plain or NF4, all with a bias: as peft, and in the merged export."""
    PeftModel = pytest.importorskip("peft").PeftModel

    ours = adapted(biased, base, targets=("k_proj", "o_proj", "up_proj", "down_proj"))
    save_adapter(ours, tmp_path / "adapter", str(biased))
    peer = PeftModel.from_pretrained(theirs(biased, base), tmp_path / "adapter", is_trainable=True)
    assert_peft_agrees(ours, peer.train())
    before = logits_of(ours.eval(), tokens_of())
    save_decoder(ours, tmp_path / "merged")
    for plain in (lora.merged(ours), load_decoder(tmp_path / "merged")):
        torch.testing.assert_close(logits_of(plain, tokens_of()), before, rtol=0, atol=LOGITS_TOLERANCE)


@pytest.mark.parametrize("config", ADAPTERS.values(), ids=ADAPTERS)
def test_we_load_pefts_adapter(folder, tmp_path, config):
    peft = pytest.importorskip("peft")

    names = dict(lora_alpha=16, target_modules="all-linear") | {PEFT_NAMES.get(k, k): v for k, v in config.items()}
    names = {name: list(value) if isinstance(value, tuple) else value for name, value in names.items()}
    peer = peft.get_peft_model(theirs(folder), peft.LoraConfig(r=4, task_type="CAUSAL_LM", **names))
    with torch.no_grad():
        for name, p in peer.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.1)
    peer.save_pretrained(tmp_path / "theirs")
    ours = load_decoder(folder)
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


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(r=0), "rank 0 would train nothing"),
        (dict(r=8), r"lora_A.weight is \(4, 64\) instead of \(8, 64\)"),
        (dict(use_dora=True), "use_dora=True is not supported"),
        (dict(bias="all"), "bias='all' is not supported"),
        ({"r\nk_pattern": 2}, r"'r\\nk_pattern'=2 is not supported"),
        (dict(peft_type="IA3"), "peft_type='IA3'"),
        (dict(init_lora_weights="pissa"), "init_lora_weights='pissa'"),
        (dict(rank_pattern={"q_proj": 2}), r"q_proj.lora_A.weight is \(4, 64\) instead of \(2, 64\)"),
        (dict(rank_pattern={"q_proj": 0}), "rank r=0"),
        (dict(rank_pattern=[2]), "expected objects from names to numbers"),
        (dict(alpha_pattern={"(": 2}), r"'\(' is no regular expression"),
        (dict(modules_to_save=["lm_head"]), "modules_to_save=.*lm_head.*: whole modules trained beside LoRA are not"),
        (dict(layers_to_transform=[0]), "unexpected base_model.model.model.layers.1"),
        (dict(layers_to_transform=[7]), r"name no layer in layers \[7\] of 2"),
        (dict(layers_to_transform=[0], layers_pattern="h"), "layers_pattern='h'"),
        (dict(exclude_modules=["q_proj"]), "exclude_modules="),
        (dict(target_modules=["q_proj"]), "unexpected base_model.model.model.layers.0.mlp"),
        (dict(target_modules=["query"]), r"targets=\('query',\)"),
        (dict(target_modules=".*head"), "targets='.*head' name no layer"),
        (dict(target_modules=".*q_proj", layers_to_transform=[0]), "with a regex as targets"),
        (dict(target_modules=[]), r"target_modules=\[\]: expected names, a regex or 'all-linear'"),
        (dict(target_modules=None), "does not say target_modules"),
        (
            dict(base_model_name_or_path="Qwen/Qwen3-4B", r=8),
            r"is no adapter of this base \(it names 'Qwen/Qwen3-4B'\)",
        ),
    ],
)
def test_an_adapter_that_does_not_fit_is_one_line_and_changes_nothing(folder, tmp_path, change, says):
    save_adapter(adapted(folder), tmp_path, str(folder))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    model = load_decoder(folder)
    with pytest.raises(ValueError, match=says) as error:
        load_adapter(model, tmp_path, str(folder))
    assert "\n" not in str(error.value)
    assert not any(isinstance(m, LoRALinear) for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_adapter_files_that_are_missing_or_damaged_are_one_line(folder, tmp_path):
    model = load_decoder(folder)
    with pytest.raises(ValueError, match="has no adapter_config.json"):
        load_adapter(model, tmp_path)
    save_adapter(adapted(folder), tmp_path, "Qwen/Qwen3-0.6B")
    load_adapter(load_decoder(folder), tmp_path, "/models/Qwen3-0.6B")  # a local copy of the hub's
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


@pytest.mark.parametrize("rslora", [False, True])
def test_pissa_starts_at_the_base_and_its_adapter_fits_the_base(folder, tmp_path, rslora):
    peft = pytest.importorskip("peft")
    kept = dict(rank_pattern={"q_proj": 3}, alpha_pattern={"k_proj": 5.0})
    config = LoRAConfig(r=4, alpha=6, rslora=rslora, init="pissa", **kept)
    before = logits_of(load_decoder(folder), tokens_of())
    ours = load_decoder(folder)
    add_lora(ours, config)
    torch.testing.assert_close(logits_of(ours, tokens_of()), before, rtol=0, atol=LOGITS_TOLERANCE)
    # peft's own start: the same product of A and B, whose signs are anyone's.
    how = dict(target_modules="all-linear", use_rslora=rslora, init_lora_weights="pissa", **kept)
    peer = peft.get_peft_model(theirs(folder), peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **how))
    for path, layer in lora.adapted(ours).items():
        other = peer.get_submodule(f"base_model.model.model.{path}")
        product = other.lora_B["default"].weight @ other.lora_A["default"].weight
        # Two SVDs of one matrix in fp32: 1e-4 of the largest entry.
        allowed = 1e-4 * product.abs().max().item()
        torch.testing.assert_close(layer.lora_B @ layer.lora_A, product, rtol=0, atol=allowed)
    with torch.no_grad():
        for i, p in enumerate(p for p in ours.parameters() if p.requires_grad):
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    moved = logits_of(ours, tokens_of())
    assert (moved - before).abs().max() > 0.1
    save_adapter(ours, tmp_path, str(folder))
    loaded = load_decoder(folder)
    load_adapter(loaded, tmp_path, str(folder))
    torch.testing.assert_close(logits_of(loaded, tokens_of()), moved, rtol=0, atol=LOGITS_TOLERANCE)
    assert loaded.lora.r == 8 and loaded.lora.scale("x") == pytest.approx(config.scale("x"))


def test_pissa_over_nf4_keeps_the_largest_components_exact(folder):
    """QPiSSA: only what is left is quantised, so the start is nearer to the weights than NF4 alone."""
    pytest.importorskip("bitsandbytes")
    exact, models = load_decoder(folder), [load_base(folder, "nf4", torch.float32) for _ in range(2)]
    add_lora(models[1], LoRAConfig(r=16, init="pissa"))
    for path in lora.adapted(models[1]):
        W, *others = (m.get_submodule(path).dense(torch.float32) for m in (exact, *models))
        # The parts were taken from the dequantised weights: the sum is them but for a smaller second rounding.
        assert (others[1] - others[0]).norm() < (others[0] - W).norm()


def test_lora_plus_is_another_learning_rate_for_b(folder):
    model = adapted(folder)
    whole = lora.optimizer_groups(model, False, 1e-3)
    assert [p for p in model.parameters() if p.requires_grad] == whole[0]["params"] and len(whole) == 1
    first, second = lora.optimizer_groups(model, False, 1e-3, 16.0)
    assert (first["lr"], second["lr"]) == (1e-3, 16e-3)
    assert {id(p) for p in first["params"]} == {id(m.lora_A) for m in lora.adapted(model).values()}
    assert {id(p) for p in second["params"]} == {id(m.lora_B) for m in lora.adapted(model).values()}
    by_block = lora.optimizer_groups(model, True, 1e-3, 4.0)
    assert [g["block"] for g in by_block] == [0, 0, 1, 1] and [g["lr"] for g in by_block] == [1e-3, 4e-3] * 2


def test_an_adapter_of_a_checkpoint_of_an_earlier_version_is_read():
    earlier = dict(r=8, alpha=16.0, dropout=0.0, targets=["q_proj", "v_proj"], rslora=True)
    assert LoRAConfig.kept(earlier) == LoRAConfig(8, 16.0, 0.0, ("q_proj", "v_proj"), True)
    now = LoRAConfig(targets=".*q_proj", rank_pattern={"q_proj": 2}, init="pissa")
    assert LoRAConfig.kept(asdict(now)) == now
