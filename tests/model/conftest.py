"""Fixtures of the tests of models."""

import pytest
import torch


def write_tiny(folder, family="Qwen3", **more):
    """A tiny model written by transformers, all parameters off their initial values, rows that NF4's blocks divide."""
    import transformers

    shape = dict(vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    shape |= dict(num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True) | more
    torch.manual_seed(0)
    model = getattr(transformers, family + "ForCausalLM")(getattr(transformers, family + "Config")(**shape))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny-qwen3"), head_dim=32)


@pytest.fixture(scope="session")
def biased(tmp_path_factory):
    """A Llama with a bias on every linear layer."""
    return write_tiny(tmp_path_factory.mktemp("tiny-llama"), "Llama", attention_bias=True, mlp_bias=True)
