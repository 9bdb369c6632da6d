"""Fixtures of the tests of models."""

import pytest
import torch


@pytest.fixture(scope="session")
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
