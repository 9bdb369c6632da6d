"""Llama, Qwen2, Qwen3, Mistral and SmolLM3 in plain PyTorch: tokens in, hidden states out; the caller has the loss.

One architecture with switches: RMSNorm before each sub-layer, grouped-query attention with rotary positions, SwiGLU, a
head that is tied to the embedding or not (Touvron et al., "Llama 2", 2023, section 2.2). What sets the families apart
is in DecoderConfig: Qwen2 ("Qwen2", 2024) has biases on queries, keys and values, Qwen3 ("Qwen3", 2025) none but a norm
of each head's queries and keys, and SmolLM3 leaves some layers without positions (Yang et al., "Rope to Nope", 2025).
Attention sees the whole sequence: there is no sliding window. Parameters carry Hugging Face's names without the
"model." prefix; model/decoder_hub.py reads and writes that layout. Values follow transformers'. Mixed precision is that
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

from kernels.layers import rms_norm, rope, swiglu
from model import layers
from model.layers import Embedding, KVCache, Linear
from model.varlen import Bounds, attend_within, bounds_of, choose_varlen
from schedules.textlines import shown

# What a token sees: 0 and -inf by position, the tokens before it in its document, or all before it in its row.
Mask = Tensor | Bounds | None
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
# What rope_scaling holds beside rope_type: needed, and known.
ROPE = {
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
}


@dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder, in the names of its config.json. Raises ValueError for a shape that cannot be built."""

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
    model_type: str = "qwen3"  # one of FAMILIES
    attention_bias: bool = False  # on all four projections; Qwen2's three are its family's
    mlp_bias: bool = False
    rope_scaling: dict | None = None  # None is the default; rope_type and its numbers otherwise, see ROPE
    no_rope_layers: list[int] | None = None  # SmolLM3: 0 for each layer without positions

    def __post_init__(self):
        layers.check_fields(self, "an integer from 1 to 10,000", "num_hidden_layers")
        layers.check_fields(self, "an integer from 1 to 2^24", *(field.name for field in dataclasses.fields(self)[:8]))
        layers.check_fields(self, "a positive number", "rms_norm_eps", "rope_theta")
        layers.check_fields(self, "true or false", "tie_word_embeddings", "attention_bias", "mlp_bias")
        if self.model_type not in FAMILIES:
            raise ValueError(f"model_type={self.model_type!r}; expected one of {', '.join(FAMILIES)}")
        heads, shared = self.num_attention_heads, self.num_key_value_heads
        if heads % shared:
            wrong = f"num_attention_heads={heads} is not a multiple of num_key_value_heads={shared}"
            raise ValueError(f"{wrong}; query heads share the others evenly")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim}: expected an even number, rotary positions turn pairs")
        if self.no_rope_layers is not None and len(self.no_rope_layers) != self.num_hidden_layers:
            raise ValueError(f"no_rope_layers={self.no_rope_layers}: expected {self.num_hidden_layers} of 0 and 1")
        check_rope(self.rope_scaling)

    @property
    def block_size(self) -> int:
        """The longest sequence, under the name that GPT2Config gives it."""
        return self.max_position_embeddings

    def rotates(self, layer: int) -> bool:
        """Whether the layer's queries and keys know their positions."""
        return self.no_rope_layers is None or bool(self.no_rope_layers[layer])


def check_rope(rope: dict | None) -> None:
    """Raises ValueError for a rope_scaling that is not one of ROPE, says too little or holds what is not known."""
    if rope is None:
        return
    kind = rope.get("rope_type") if isinstance(rope, dict) else None
    if kind not in ROPE:
        raise ValueError(f"rope_scaling={rope!r} is not supported; expected rope_type default, {', '.join(ROPE)}")
    needed, known = ROPE[kind]
    if missing := [name for name in needed if name not in rope]:
        raise ValueError(f"rope_scaling of rope_type {kind!r} does not say {', '.join(missing)}")
    if unknown := sorted(set(rope) - {"rope_type", *needed, *known}):
        raise ValueError(f"rope_scaling of rope_type {kind!r} holds {shown(unknown)}, which is not supported")
    for name, value in rope.items():
        if name not in ("rope_type", "truncate") and not (value is None and name in known):
            layers.check_value(f"rope_scaling's {name}", value, "a positive number")
    if kind == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        raise ValueError(f"rope_scaling={rope!r}: expected a low_freq_factor below the high_freq_factor")


class RMSNorm(nn.RMSNorm):
    """(y, s) of `kernels.rms_norm`: what is normed, and the sum of both inputs that it is the norm of."""

    impl = "torch"

    def forward(self, x: Tensor, delta: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return rms_norm(x, delta, self.weight, self.eps, impl=self.impl)


def frequencies(config: DecoderConfig, device: torch.device) -> tuple[Tensor, float]:
    """Radians per position of each pair of components, fp32 [K/2], and a factor of all cosines and sines.

    theta^(-2i/K) (Su et al., "RoFormer", 2021), for longer texts than those of pre-training stretched by a factor:
    linear divides all of them (Chen et al., "Position Interpolation", 2023); llama3 those that turn at most
    low_freq_factor times in the old length, and none above high_freq_factor; yarn those below beta_slow turns and none
    above beta_fast, and sharpens attention (Peng et al., "YaRN", 2023, sections 3.2 and 3.4)."""
    K, rope = config.head_dim, config.rope_scaling or {}
    pair = torch.arange(0, K, 2, dtype=torch.float32, device=device)
    f, kind, stretch = 1.0 / config.rope_theta ** (pair / K), rope.get("rope_type"), rope.get("factor", 1.0)
    if kind == "linear":
        return f / stretch, 1.0
    if kind == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = rope["original_max_position_embeddings"] * f / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return f * (kept + (1 - kept) / stretch), 1.0
    if kind == "yarn":

        def pair_of(turns: float) -> float:
            """The pair, as a fraction, that turns so often in the old length."""
            length = rope["original_max_position_embeddings"]
            return K * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

        def sharper(weight: float) -> float:
            return 0.1 * weight * math.log(stretch) + 1 if stretch > 1 else 1.0

        first, last = pair_of(rope.get("beta_fast") or 32), pair_of(rope.get("beta_slow") or 1)
        if rope.get("truncate", True):
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, K - 1)
        stretched = ((pair / 2 - first) / ((last - first) or 1e-3)).clamp(0, 1)
        one, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
        factor = sharper(one) / sharper(all_dim) if one and all_dim else sharper(1)
        given = rope.get("attention_factor")
        return f * (1 - stretched + stretched / stretch), factor if given is None else given
    return f, 1.0


def rotary(positions_BT: Tensor, config: DecoderConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, T, 1, K/2] of position * ``frequencies``, angles in fp32."""
    per_position, factor = frequencies(config, positions_BT.device)
    angles = positions_BT.float()[:, :, None, None] * per_position
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


class Attention(nn.Module):
    impl = "torch"  # of kernels.rope

    def __init__(self, config: DecoderConfig, rotates: bool):
        super().__init__()
        D, K, H, J = config.hidden_size, config.head_dim, config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.rotates = K, rotates
        bias = config.attention_bias or config.model_type == "qwen2"
        self.q_proj, self.k_proj, self.v_proj = (Linear(D, heads * K, bias) for heads in (H, J, J))
        self.o_proj = Linear(H * K, D, config.attention_bias)
        normed = config.model_type == "qwen3"
        self.q_norm, self.k_norm = (RMSNorm(K, config.rms_norm_eps) if normed else None for _ in range(2))

    def heads(self, x_BTD: Tensor, linear: nn.Module, norm: nn.Module | None, cos: Tensor, sin: Tensor) -> Tensor:
        """Queries or keys [B, T, heads, K]: projected, normed and turned where this model does."""
        x_BTHK = linear(x_BTD).view(*x_BTD.shape[:2], -1, self.head_dim)
        if self.rotates:
            norm_of_heads = () if norm is None else (norm.weight, norm.eps)
            return rope(x_BTHK, cos, sin, *norm_of_heads, impl=self.impl)
        return x_BTHK if norm is None else norm(x_BTHK)[0]

    def forward(self, x_BTD: Tensor, cos: Tensor, sin: Tensor, mask: Mask, slot: tuple | None) -> Tensor:
        B, T, _ = x_BTD.shape
        q_BTHK = self.heads(x_BTD, self.q_proj, self.q_norm, cos, sin)
        k_BTJK = self.heads(x_BTD, self.k_proj, self.k_norm, cos, sin)
        v_BTJK = self.v_proj(x_BTD).view(B, T, -1, self.head_dim)
        if slot is not None:
            k_cache, v_cache, where, rows_B = slot
            k_cache[where], v_cache[where] = k_BTJK, v_BTJK
            k_BTJK, v_BTJK = (k_cache, v_cache) if rows_B is None else (k_cache[rows_B], v_cache[rows_B])
        if isinstance(mask, Bounds):
            return self.o_proj(attend_within(q_BTHK, k_BTJK, v_BTJK, mask).reshape(B, T, -1))
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
    impl = "torch"  # of kernels.swiglu

    def __init__(self, config: DecoderConfig):
        super().__init__()
        D, wide = config.hidden_size, config.intermediate_size
        self.gate_proj, self.up_proj = Linear(D, wide, config.mlp_bias), Linear(D, wide, config.mlp_bias)
        self.down_proj = Linear(wide, D, config.mlp_bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x_BTD), self.up_proj(x_BTD), impl=self.impl))


class Block(nn.Module):
    def __init__(self, config: DecoderConfig, rotates: bool):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, rotates)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x_BTD: Tensor, cos: Tensor, sin: Tensor, mask: Mask, slot: tuple | None) -> Tensor:
        h_BTD, x_BTD = self.input_layernorm(x_BTD)
        h_BTD, x_BTD = self.post_attention_layernorm(x_BTD, self.self_attn(h_BTD, cos, sin, mask, slot))
        return x_BTD + self.mlp(h_BTD)


class Decoder(layers.Backbone):
    """A decoder as a layers.Backbone: without a loss. Whoever puts dropout into a layer sets ``draws_random``.

    ``varlen = False`` has packed rows masked also where torch can attend within documents, see model/varlen.py."""

    length_field = "max_position_embeddings"

    def __init__(self, config: DecoderConfig, dtype: torch.dtype = torch.float32):
        super().__init__(config, dtype)
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, config.rotates(i)) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size)
        self.varlen = True
        if not self.embed_tokens.weight.is_meta:
            self.init_weights()

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Gains 1, matrices and embeddings N(0, 0.02), transformers' initializer_range; see ``draw_weights``."""
        layers.draw_weights(self, lambda name: 0.02, generator)

    def set_layers(self, impl: str) -> None:
        """How norms, rotations and SwiGLU are computed, forward and backward: by torch, as a new model has it, by
        Triton's kernels, or "auto"; see kernels/layers.py."""
        for module in self.modules():
            if isinstance(module, RMSNorm | Attention | MLP):
                module.impl = impl

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
        bounds: Bounds | None = None,
    ) -> Tensor:
        """int32 or int64 [B, T] -> hidden states [B, T, D] after the final norm, in the activations' dtype.

        ``positions_BT``: rotary positions; without them 0 to T-1, counted anew in each document.
        ``documents_BT``: a number per token, equal within a document (0 0 0 1 1 2 ...). Attention is causal within
        documents, and without it over the whole row.
        ``cache``: keys and values are written at ``positions_BT`` of each row, and each token sees the cached positions
        up to its own. A row needs no clearing: a new sequence overwrites what it sees before it sees it. All shapes are
        static. Positions must be below the cache's length, not checked on a GPU. Runs without gradients.
        ``rows_B`` int64: the cache rows these sequences are, without it all in order.
        ``bounds``: those of ``documents_BT``, not checked on a GPU. With them scores between documents are not
        computed where torch can do without; without them, and elsewhere, they are masked.

        Raises ValueError for other shapes and for combinations without a meaning."""
        self.check_tokens(tokens_BT)
        B, T = tokens_BT.shape
        for name, given in (("positions", positions_BT), ("documents", documents_BT)):
            if given is not None and given.shape != tokens_BT.shape:
                raise ValueError(f"{name} of shape {tuple(given.shape)}: expected the tokens', {(B, T)}")
        if cache is not None:
            self._check_cache(B, positions_BT, documents_BT, cache, rows_B)
        if bounds is not None:
            self._check_bounds(documents_BT, bounds)

        index_T = torch.arange(T, device=tokens_BT.device)
        mask = None
        if cache is not None:
            where = (torch.arange(B, device=index_T.device) if rows_B is None else rows_B)[:, None], positions_BT
            mask = self._additive(torch.arange(cache.k.shape[2], device=index_T.device) <= positions_BT[:, :, None])
        elif documents_BT is not None:
            if choose_varlen(bounds, self.varlen, self.dtype, self.config.head_dim):
                mask = bounds
            else:
                same_BTT = documents_BT[:, :, None] == documents_BT[:, None, :]
                mask = self._additive(same_BTT & (index_T[:, None] >= index_T))
            if positions_BT is None:
                starts = F.pad(documents_BT[:, 1:] != documents_BT[:, :-1], (1, 0))
                positions_BT = index_T - (starts * index_T).cummax(dim=1).values
        if positions_BT is None:
            positions_BT = index_T[None]
        cos, sin = rotary(positions_BT, self.config, self.dtype)

        x_BTD = self.embed_tokens(tokens_BT).to(self.dtype)
        for i, block in enumerate(self.layers):
            slot = None if cache is None else (cache.k[i], cache.v[i], where, rows_B)
            x_BTD = self.run(block, x_BTD, cos, sin, mask, slot)
        return self.norm(x_BTD)[0]

    def _additive(self, visible_BTL: Tensor) -> Tensor:
        """0 where visible and -inf elsewhere, [B, 1, H/J * T, L], built once for all layers."""
        groups = self.config.num_attention_heads // self.config.num_key_value_heads
        mask = torch.zeros(visible_BTL.shape, dtype=self.dtype, device=visible_BTL.device)
        return mask.masked_fill_(~visible_BTL, -math.inf).repeat(1, groups, 1)[:, None]

    def _check_bounds(self, documents_BT: Tensor | None, bounds: Bounds) -> None:
        if documents_BT is None:
            raise ValueError("bounds without documents_BT: expected both, or documents_BT alone")
        if documents_BT.device.type == "cpu":
            wanted = bounds_of(documents_BT).padded(len(bounds.cu_seqlens), bounds.max_seqlen)
            least = int(wanted.cu_seqlens.diff().max())
            if bounds.max_seqlen < least or not torch.equal(wanted.cu_seqlens, bounds.cu_seqlens):
                raise ValueError("bounds are not those of documents_BT; expected model.varlen.bounds_of(documents_BT)")

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
