"""A tiny GPT-2 from a seed, tokens for it and what comes of them, for the tests of the model and of its hub file."""

import torch
import torch.nn.functional as F

from model.gpt2 import GPT2 as Model
from model.gpt2 import GPT2Config

TINY = GPT2Config(vocab_size=97, block_size=32, n_layer=2, n_head=4, n_embd=32)


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
