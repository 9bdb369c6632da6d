"""GPT-2 in plain PyTorch: tokens in, hidden states out; the loss belongs to the caller.

Architecture and parameter names are those of OpenAI's release (Radford et al., 2019, and github.com/openai/gpt-2,
src/model.py): learned positions, LayerNorm before each sub-layer, GELU in its tanh form (others by the config), biases
everywhere, the head tied to the token embedding. Layouts differ where Linear below says so; model/gpt2_hub.py
translates.

Mixed precision needs no autocast. Parameters stay as they are, fp32 masters by default. Activations have the ``dtype``
the model was given, and every layer casts its parameters to the dtype of what comes in, also under FSDP2.

Shapes in names: B sequences, T positions, D = n_embd, V = vocab_size, H heads of K, L cached positions.
"""

import math
from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import fp8, layers
from model.layers import Embedding, KVCache, LayerNorm

# GPT-2's published sizes, GPT-3 XL's shape (Brown et al., 2020, table 2.1), and two for a CPU.
SIZES: dict[str, dict] = {
    "pico": dict(n_layer=2, n_head=2, n_embd=64),
    "nano": dict(n_layer=4, n_head=4, n_embd=128),
    "mini": dict(n_layer=6, n_head=6, n_embd=384),
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-1.3b": dict(n_layer=24, n_head=16, n_embd=2048),
}


@dataclass(frozen=True)
class GPT2Config:
    """The shape of a GPT-2. Raises ValueError for a shape that cannot be built."""

    vocab_size: int
    block_size: int  # the longest sequence, one learned position each
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float = 0.0  # after the embeddings, on attention weights, and on both residual branches
    activation_function: str = "gelu_new"  # a key of layers.ACTIVATIONS; this is GPT-2's, GELU in its tanh form

    def __post_init__(self):
        layers.check_fields(self, "an integer from 1 to 2^24", "vocab_size", "block_size", "n_head", "n_embd")
        layers.check_fields(self, "an integer from 1 to 10,000", "n_layer")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}; heads share it evenly")
        layers.check_fields(self, "a probability in [0, 1)", "dropout")
        layers.check_activation(self.activation_function)


class Linear(nn.Module):
    """y = x W + b, computed in its input's dtype; W [in, out] where out > in, else stored as [out, in].

    The longer side is last because the gradient of the weight is then a product with long rows, which BLAS on a CPU
    computes faster (MKL in fp32, 384 <-> 1536: 14 % on that product). ``fp8``: training computes by model/fp8.py."""

    fp8 = False

    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.widens = n_out > n_in
        self.weight = nn.Parameter(torch.empty((n_in, n_out) if self.widens else (n_out, n_in)))
        self.bias = nn.Parameter(torch.empty(n_out))

    def forward(self, x: Tensor) -> Tensor:
        if self.fp8 and self.training:
            return fp8.linear(x, self.weight.t() if self.widens else self.weight, self.bias)
        weight = self.weight.to(x.dtype)
        return F.linear(x, weight.t() if self.widens else weight, self.bias.to(x.dtype))


class Attention(nn.Module):
    def __init__(self, config: GPT2Config):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)  # q, k and v beside each other
        self.c_proj = Linear(config.n_embd, config.n_embd)

    def forward(self, x_BTD: Tensor, slot: tuple | None = None) -> Tensor:
        """``slot``: this layer's cached keys and values, where these tokens stand in them, and the mask."""
        B, T, D = x_BTD.shape
        dropout = self.dropout if self.training else 0.0
        qkv = self.c_attn(x_BTD).split(D, dim=2)
        q_BHTK, k_BHTK, v_BHTK = (z_BTD.view(B, T, self.n_head, -1).transpose(1, 2) for z_BTD in qkv)
        mask = None
        if slot is not None:
            k_BLHK, v_BLHK, where, mask = slot
            k_BLHK[where], v_BLHK[where] = k_BHTK.transpose(1, 2), v_BHTK.transpose(1, 2)
            k_BHTK, v_BHTK = k_BLHK.transpose(1, 2), v_BLHK.transpose(1, 2)
        y_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, mask, dropout, is_causal=slot is None)
        return F.dropout(self.c_proj(y_BHTK.transpose(1, 2).reshape(B, T, D)), self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config: GPT2Config):
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)
        self.activation = layers.ACTIVATIONS[config.activation_function]

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTF = self.activation(self.c_fc(x_BTD))
        return F.dropout(self.c_proj(x_BTF), self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config: GPT2Config):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x_BTD: Tensor, slot: tuple | None = None) -> Tensor:
        x_BTD = x_BTD + self.attn(self.ln_1(x_BTD), slot)
        return x_BTD + self.mlp(self.ln_2(x_BTD))


class GPT2(layers.Backbone):
    """GPT-2 as a layers.Backbone: without a loss."""

    length_field = "block_size"

    def __init__(self, config: GPT2Config, dtype: torch.dtype = torch.float32):
        super().__init__(config, dtype, draws_random=config.dropout > 0)
        self.wte = Embedding(config.vocab_size, config.n_embd)
        self.wpe = Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = LayerNorm(config.n_embd)
        if not self.wte.weight.is_meta:
            self.init_weights()

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Biases 0, LayerNorm gains 1, matrices and token embeddings N(0, 0.02); see ``draw_weights``.

        The two projections of each block that write to the residual stream are N(0, 0.02 / sqrt(2 n_layer)) (Radford
        et al., 2019, section 2.3). Positions are N(0, 0.01), as in OpenAI's src/model.py; Hugging Face has 0.02."""
        stds = {"wpe": 0.01, "c_proj": 0.02 / math.sqrt(2 * self.config.n_layer)}
        layers.draw_weights(self, lambda name: stds.get(name.split(".")[-2], 0.02), generator)

    @property
    def head_weight(self) -> Tensor:
        """The output head [V, D]: the token embedding itself, tied. logits = hidden @ head_weight.T"""
        return self.wte.weight

    def new_cache(self, batch: int, length: int) -> KVCache:
        """A cache of ``batch`` rows of ``length`` positions; ValueError for a length beyond block_size."""
        c = self.config
        return self.empty_cache(c.n_layer, batch, length, c.n_head, c.n_embd // c.n_head)

    def forward(self, tokens_BT: Tensor, positions_BT: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """int32 or int64 [B, T], T <= block_size -> hidden states [B, T, D] after the final LayerNorm, in the
        activations' dtype. Raises ValueError for another shape of input.

        Without a ``cache`` the tokens stand at 0 to T - 1. With one they stand at ``positions_BT`` (int64, below the
        cache's length), are written there, and see the cached positions of their row up to their own."""
        self.check_tokens(tokens_BT)
        B, T = tokens_BT.shape
        if (cache is None) != (positions_BT is None):
            raise ValueError("positions_BT and cache belong together: expected both or neither")
        index_T = torch.arange(T, device=tokens_BT.device)
        x_TD = self.wpe(index_T if positions_BT is None else positions_BT).to(self.dtype)
        x_BTD = self.wte(tokens_BT).to(self.dtype) + x_TD
        x_BTD = F.dropout(x_BTD, self.config.dropout, self.training)
        if cache is not None:
            where = torch.arange(B, device=tokens_BT.device)[:, None], positions_BT
            seen_B1TL = torch.arange(cache.k.shape[2], device=tokens_BT.device) <= positions_BT[:, None, :, None]
        for i, block in enumerate(self.h):
            slot = None if cache is None else (cache.k[i], cache.v[i], where, seen_B1TL)
            x_BTD = self.run(block, x_BTD, slot)
        return self.ln_f(x_BTD)


def parameter_count(model: nn.Module) -> int:
    """All parameters, each tied one once. GPT-2 small: 124,439,808."""
    return sum(p.numel() for p in model.parameters())


def flops_per_token(config: GPT2Config, block: int) -> int:
    """FLOPs of one training step per token at sequence length ``block``: 6 N + 12 L T D.

    N counts the weights that a token is multiplied with, 12 D^2 a layer and V D for the head. A multiply-add is 2,
    forward once and backward twice. The causal half is not discounted, recomputation does not count (Chowdhery et al.,
    "PaLM", 2022, appendix B, so that MFU compares with published figures)."""
    L, D = config.n_layer, config.n_embd
    return 6 * (12 * L * D * D + config.vocab_size * D) + 12 * L * block * D


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """AdamW's parameter groups: weight decay on matrices and embeddings (two dimensions and more), none on biases and
    LayerNorm gains. Covers each trainable parameter exactly once, checked."""
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay={weight_decay!r}: expected 0 or more")
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        dict(params=[p for p in trainable if p.ndim >= 2], weight_decay=weight_decay),
        dict(params=[p for p in trainable if p.ndim < 2], weight_decay=0.0),
    ]
    check_groups(model, groups)
    return groups


def check_groups(model: nn.Module, groups: list[dict]) -> None:
    """Raises ValueError unless each parameter that requires a gradient is in ``groups`` exactly once, and nothing else
    is; names what is wrong."""
    counts = Counter(id(p) for group in groups for p in group["params"])
    wrong = []
    for name, p in model.named_parameters():
        n, expected = counts.pop(id(p), 0), int(p.requires_grad)
        if n != expected:
            wrong.append(f"{name} is there {n} times instead of {expected}")
    if counts:
        wrong.append(f"{len(counts)} tensors are no parameters of the model")
    if wrong:
        raise ValueError("optimizer groups do not cover the model: " + "; ".join(wrong))
