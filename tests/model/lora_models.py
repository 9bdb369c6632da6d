"""Tiny models with adapters, ours and its peers', and gradients to compare, for the tests of LoRA."""

import pytest
import torch
import torch.nn.functional as F

from model.lora import LoRAConfig, add_lora, load_base

# As in test_decoder.py: the order of fp32 sums costs under 1e-5 of logits of order 1 to 10; 1e-4 is promised.
LOGITS_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 1e-4  # of a gradient's largest entry, where a wrong term would show as order 1


def theirs(folder, base="fp32"):
    import transformers

    if base == "fp32":
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    nf4 = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return transformers.AutoModelForCausalLM.from_pretrained(
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
