"""Qwen3's dense family in plain PyTorch: tokens in, hidden states out; the loss belongs to the caller.

The architecture is the technical report's (Yang et al., "Qwen3", 2025, section 2): RMSNorm before each sub-layer,
grouped-query attention whose queries and keys are normalised per head, rotary positions, SwiGLU, no biases, the head
tied to the embedding in the small sizes. Parameters carry Hugging Face's names without the "model." prefix;
model/qwen3_hub.py reads and writes that layout. Values follow transformers' Qwen3ForCausalLM. Mixed precision is that
of model/gpt2.py.

Shapes in names: B sequences, T positions, D = hidden_size, H heads, J key-value heads, K = head_dim, L cached
positions, V = vocab_size.
"""

import dataclasses
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import layers
from model.layers import Embedding, KVCache, Linear


@dataclass(frozen=True)
class Qwen3Config:
    """The shape of a Qwen3, in the names of its config.json. Raises ValueError for a shape that cannot be built."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int = 128
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None  # the token ids do not enter the function; they are kept for the export
    eos_token_id: int | list[int] | None = None

    def __post_init__(self):
        layers.check_fields(self, "a positive integer", *(field.name for field in dataclasses.fields(self)[:8]))
        layers.check_fields(self, "a positive number", "rms_norm_eps", "rope_theta")
        layers.check_fields(self, "true or false", "tie_word_embeddings")
        heads, shared = self.num_attention_heads, self.num_key_value_heads
        if heads % shared:
            wrong = f"num_attention_heads={heads} is not a multiple of num_key_value_heads={shared}"
            raise ValueError(f"{wrong}; query heads share the others evenly")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim}: expected an even number, rotary positions turn pairs")

    @property
    def block_size(self) -> int:
        """The longest sequence, under the name that GPT2Config gives it."""
        return self.max_position_embeddings


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * gain over the last dimension; torch takes the mean in fp32 whatever x is."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def rotary(positions_BT: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, T, 1, K/2] of position * theta^(-2i/K) (Su et al., "RoFormer", 2021), angles in fp32."""
    steps = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions_BT.device) / head_dim
    angles = positions_BT.float()[:, :, None, None] * (1.0 / theta**steps)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns component i with component i + K/2, the pairing of Hugging Face's checkpoints."""
    a, b = x_BTHK.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Attention(nn.Module):
    def __init__(self, config: Qwen3Config):
        super().__init__()
        D, K, H, J = config.hidden_size, config.head_dim, config.num_attention_heads, config.num_key_value_heads
        self.head_dim = K
        self.q_proj, self.k_proj, self.v_proj = Linear(D, H * K), Linear(D, J * K), Linear(D, J * K)
        self.o_proj = Linear(H * K, D)
        self.q_norm, self.k_norm = RMSNorm(K, config.rms_norm_eps), RMSNorm(K, config.rms_norm_eps)

    def forward(self, x_BTD: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, slot: tuple | None) -> Tensor:
        B, T, _ = x_BTD.shape
        q_BTHK = rotate(self.q_norm(self.q_proj(x_BTD).view(B, T, -1, self.head_dim)), cos, sin)
        k_BTJK = rotate(self.k_norm(self.k_proj(x_BTD).view(B, T, -1, self.head_dim)), cos, sin)
        v_BTJK = self.v_proj(x_BTD).view(B, T, -1, self.head_dim)
        if slot is not None:
            k_cache, v_cache, where, rows_B = slot
            k_cache[where], v_cache[where] = k_BTJK, v_BTJK
            k_BTJK, v_BTJK = (k_cache, v_cache) if rows_B is None else (k_cache[rows_B], v_cache[rows_B])
        k_BJLK, v_BJLK = k_BTJK.transpose(1, 2), v_BTJK.transpose(1, 2)
        J = k_BJLK.shape[1]
        if mask is None:
            q = q_BTHK.transpose(1, 2)
            y = F.scaled_dot_product_attention(q, k_BJLK, v_BJLK, is_causal=True, enable_gqa=True).transpose(1, 2)
        else:
            # Query heads that share keys become further rows of one head: no copies of keys and values, and the
            # fused kernels that take a mask, which have no enable_gqa, still apply.
            q = q_BTHK.view(B, T, J, -1, self.head_dim).permute(0, 2, 3, 1, 4).reshape(B, J, -1, self.head_dim)
            y = F.scaled_dot_product_attention(q, k_BJLK, v_BJLK, attn_mask=mask)
            y = y.view(B, J, -1, T, self.head_dim).permute(0, 3, 1, 2, 4)
        return self.o_proj(y.reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, config: Qwen3Config):
        super().__init__()
        D, wide = config.hidden_size, config.intermediate_size
        self.gate_proj, self.up_proj, self.down_proj = Linear(D, wide), Linear(D, wide), Linear(wide, D)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


class Block(nn.Module):
    def __init__(self, config: Qwen3Config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x_BTD: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, slot: tuple | None) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), cos, sin, mask, slot)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class Qwen3(layers.Backbone):
    """Qwen3 as a layers.Backbone: without a loss. Whoever puts dropout into a layer sets ``draws_random``."""

    length_field = "max_position_embeddings"

    def __init__(self, config: Qwen3Config, dtype: torch.dtype = torch.float32):
        super().__init__(config, dtype)
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size)
        if not self.embed_tokens.weight.is_meta:
            self.init_weights()

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Gains 1, matrices and embeddings N(0, 0.02), transformers' initializer_range; see ``draw_weights``."""
        layers.draw_weights(self, lambda name: 0.02, generator)

    @property
    def head_weight(self) -> Tensor:
        """The output head [V, D], the token embedding itself where tied. logits = hidden @ head_weight.T"""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def new_cache(self, batch: int, length: int) -> KVCache:
        """A cache of ``batch`` rows of ``length`` positions; in bf16 a position takes 4 * layers * J * K bytes. Raises
        ValueError for a size that cannot be used."""
        c = self.config
        return self.empty_cache(c.num_hidden_layers, batch, length, c.num_key_value_heads, c.head_dim)

    def forward(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
        cache: KVCache | None = None,
        rows_B: Tensor | None = None,
    ) -> Tensor:
        """int32 or int64 [B, T] -> hidden states [B, T, D] after the final norm, in the activations' dtype.

        ``positions_BT``: rotary positions; without them 0 to T-1, counted anew in each document.
        ``documents_BT``: a number per token, equal within a document (0 0 0 1 1 2 ...). Attention is causal within
        documents, and without it over the whole row.
        ``cache``: keys and values are written at ``positions_BT`` of each row, and each token sees the cached positions
        up to its own. A row needs no clearing: a new sequence overwrites what it sees before it sees it. All shapes are
        static. Positions must be below the cache's length, not checked on a GPU. Runs without gradients.
        ``rows_B`` int64: the cache rows these sequences are, without it all in order.

        Raises ValueError for other shapes and for combinations without a meaning."""
        self.check_tokens(tokens_BT)
        B, T = tokens_BT.shape
        for name, given in (("positions", positions_BT), ("documents", documents_BT)):
            if given is not None and given.shape != tokens_BT.shape:
                raise ValueError(f"{name} of shape {tuple(given.shape)}: expected the tokens', {(B, T)}")
        if cache is not None:
            self._check_cache(B, positions_BT, documents_BT, cache, rows_B)

        index_T = torch.arange(T, device=tokens_BT.device)
        mask = None
        if cache is not None:
            where = (torch.arange(B, device=index_T.device) if rows_B is None else rows_B)[:, None], positions_BT
            mask = self._additive(torch.arange(cache.k.shape[2], device=index_T.device) <= positions_BT[:, :, None])
        elif documents_BT is not None:
            same_BTT = documents_BT[:, :, None] == documents_BT[:, None, :]
            mask = self._additive(same_BTT & (index_T[:, None] >= index_T))
            if positions_BT is None:
                starts = F.pad(documents_BT[:, 1:] != documents_BT[:, :-1], (1, 0))
                positions_BT = index_T - (starts * index_T).cummax(dim=1).values
        if positions_BT is None:
            positions_BT = index_T[None]
        cos, sin = rotary(positions_BT, self.config.head_dim, self.config.rope_theta, self.dtype)

        x_BTD = self.embed_tokens(tokens_BT).to(self.dtype)
        for i, block in enumerate(self.layers):
            slot = None if cache is None else (cache.k[i], cache.v[i], where, rows_B)
            x_BTD = self.run(block, x_BTD, cos, sin, mask, slot)
        return self.norm(x_BTD)

    def _additive(self, visible_BTL: Tensor) -> Tensor:
        """0 where visible and -inf elsewhere, [B, 1, H/J * T, L], built once for all layers."""
        groups = self.config.num_attention_heads // self.config.num_key_value_heads
        mask = torch.zeros(visible_BTL.shape, dtype=self.dtype, device=visible_BTL.device)
        return mask.masked_fill_(~visible_BTL, -math.inf).repeat(1, groups, 1)[:, None]

    def _check_cache(self, B: int, positions: Tensor | None, documents: Tensor | None, cache: KVCache, rows) -> None:
        if torch.is_grad_enabled():
            raise ValueError("a forward with a cache keeps no gradients: run it under torch.no_grad()")
        if documents is not None:
            raise ValueError("documents_BT with a cache: a cached row is one document, expected only one of the two")
        if positions is None:
            raise ValueError("a forward with a cache needs positions_BT, where in its row each token stands")
        n = cache.k.shape[1] if rows is None else len(rows)
        if n != B:
            raise ValueError(f"tokens of {B} rows for {n} cache rows: expected as many; name them with rows_B")
        if positions.device.type == "cpu" and positions.numel():
            least, most, last = int(positions.min()), int(positions.max()), cache.k.shape[2] - 1
            if least < 0 or most > last:
                raise ValueError(f"positions {least} to {most}: expected 0 to {last}, the cache's length less one")
