"""Adapters and peft: parity in both directions, and adapter files that do not fit."""

import json

import pytest
import torch
from lora_models import LOGITS_TOLERANCE, adapted, assert_gradients_agree, logits_of, nll, theirs, tokens_of
from safetensors.torch import load_file, save_file

from model import lora
from model.decoder_hub import load_decoder, save_decoder
from model.lora import LoRAConfig, LoRALinear, add_lora, load_adapter, save_adapter


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
