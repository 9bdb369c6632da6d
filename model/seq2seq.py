"""BART and PEGASUS in plain PyTorch, one encoder-decoder for both; the loss belongs to the caller.

BART (Lewis et al., 2020) has LayerNorm after each sub-layer and after the embeddings, and learned positions whose table
starts at 2 (fairseq kept two rows for padding). PEGASUS (Zhang et al., 2020) has LayerNorm before each sub-layer and at
the end of each stack, and fixed sinusoidal positions. Parameters carry Hugging Face's names without the "model."
prefix, for model/seq2seq_hub.py. Mixed precision is that of model/gpt2.py.

Shapes in names: B sequences, S source positions, T target positions, D = d_model, V = vocab_size, H heads of K, L
cached positions, N = B * beams rows while decoding.
"""

import math
from dataclasses import dataclass, fields
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import layers
from model.layers import Embedding, LayerNorm, Linear

# What a config.json that leaves them out means, as in transformers' BartConfig and PegasusConfig.
TOKEN_IDS = dict(
    bart=dict(pad_token_id=1, bos_token_id=0, eos_token_id=2, decoder_start_token_id=2),
    pegasus=dict(pad_token_id=0, bos_token_id=None, eos_token_id=1, decoder_start_token_id=0),
)
# What all published sizes of a kind have.
PUBLISHED = dict(
    bart=dict(vocab_size=50265), pegasus=dict(vocab_size=96103, activation_function="relu", scale_embedding=True)
)


@dataclass(frozen=True)
class Seq2SeqConfig:
    """The shape of a BART or PEGASUS, names as in config.json. Raises ValueError for what cannot be built."""

    kind: str  # "bart" or "pegasus"
    vocab_size: int
    d_model: int
    encoder_layers: int
    decoder_layers: int
    encoder_attention_heads: int
    decoder_attention_heads: int
    encoder_ffn_dim: int
    decoder_ffn_dim: int
    max_position_embeddings: int
    pad_token_id: int
    eos_token_id: int
    decoder_start_token_id: int
    bos_token_id: int | None = None
    activation_function: str = "gelu"
    scale_embedding: bool = False  # token embeddings times sqrt(d_model)
    logits_bias: bool = False  # a fixed bias on the logits, final_logits_bias
    init_std: float = 0.02
    dropout: float = 0.0  # after the embeddings and on every residual branch
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0  # inside the feed-forward layers

    def __post_init__(self):
        if self.kind not in TOKEN_IDS:
            raise ValueError(f"kind={self.kind!r}: expected 'bart' or 'pegasus'")
        layers.check_fields(self, "an integer from 1 to 10,000", "encoder_layers", "decoder_layers")
        layers.check_fields(self, "an integer from 1 to 2^24", *SHAPE_FIELDS, "vocab_size")
        for name in ("encoder_attention_heads", "decoder_attention_heads"):
            heads = getattr(self, name)
            if self.d_model % heads:
                raise ValueError(f"d_model={self.d_model} is not a multiple of {name}={heads}; heads share it evenly")
        if self.kind == "pegasus" and self.d_model % 2:
            raise ValueError(f"d_model={self.d_model}: sinusoidal positions need an even width")
        layers.check_activation(self.activation_function)
        for name in TOKEN_IDS["bart"]:
            value = getattr(self, name)
            is_id = layers.VALID["an integer of 0 or more"](value) and value < self.vocab_size
            if not is_id and (name, value) != ("bos_token_id", None):
                raise ValueError(f"{name}={value!r}: expected a token id below vocab_size={self.vocab_size}")
        layers.check_fields(self, "true or false", "scale_embedding", "logits_bias")
        layers.check_fields(self, "a probability in [0, 1)", "dropout", "attention_dropout", "activation_dropout")
        layers.check_fields(self, "a positive number", "init_std")


SHAPE_FIELDS = [field.name for field in fields(Seq2SeqConfig)[2:10]]


def _symmetric(kind: str, layers: int, d_model: int, heads: int, **changes) -> Seq2SeqConfig:
    """A model of ``layers`` in each stack, feed-forward width 4 d_model. ``changes`` replace any field."""
    options = dict(kind=kind, d_model=d_model, max_position_embeddings=1024) | TOKEN_IDS[kind] | PUBLISHED[kind]
    for side in ("encoder", "decoder"):
        options |= {f"{side}_layers": layers, f"{side}_attention_heads": heads, f"{side}_ffn_dim": 4 * d_model}
    return Seq2SeqConfig(**(options | changes))


bart_config, pegasus_config = partial(_symmetric, "bart"), partial(_symmetric, "pegasus")

# The published sizes (BART: paper, section 2, and fairseq's bart.base; PEGASUS: paper, section 5), and some for a CPU.
# mini and micro, to be pre-trained, begin at 0.7 / sqrt(d_model): from 0.02, which suits 768, such narrow ones stand at
# the tokens' frequencies for hundreds of steps.
SIZES = {
    "bart-base": partial(bart_config, 6, 768, 12),
    "bart-large": partial(bart_config, 12, 1024, 16),
    "pegasus-large": partial(pegasus_config, 16, 1024, 16),
    "bart-mini": partial(bart_config, 4, 256, 4, init_std=0.044),
    "bart-micro": partial(bart_config, 2, 128, 4, init_std=0.062),
    "bart-tiny": partial(bart_config, 2, 128, 4),
    "pegasus-tiny": partial(pegasus_config, 2, 128, 4),
}


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (Linear(width, width, bias=True) for _ in range(4))

    def split(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] -> [B, H, T, K]"""
        return x_BTD.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def keys_values(self, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
        return self.split(self.k_proj(x_BSD)), self.split(self.v_proj(x_BSD))

    def forward(self, x_BTD: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, mask: Tensor | None, causal=False) -> Tensor:
        """``mask``: bool, broadcast to [B, H, T, S], True where a query may look."""
        q_BHTK, dropout = self.split(self.q_proj(x_BTD)), self.dropout if self.training else 0.0
        y_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BHSK, v_BHSK, mask, dropout, is_causal=causal)
        return self.out_proj(y_BHTK.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """What a layer of either stack has: self-attention, a feed-forward pair, and the place of the norms."""

    def __init__(self, config: Seq2SeqConfig, side: str):
        super().__init__()
        heads, width = getattr(config, f"{side}_attention_heads"), getattr(config, f"{side}_ffn_dim")
        self.pre_norm = config.kind == "pegasus"
        self.dropout, self.activation_dropout = config.dropout, config.activation_dropout
        self.activation = layers.ACTIVATIONS[config.activation_function]
        self.self_attn = Attention(config.d_model, heads, config.attention_dropout)
        self.self_attn_layer_norm = LayerNorm(config.d_model)
        if side == "decoder":
            self.encoder_attn = Attention(config.d_model, heads, config.attention_dropout)
            self.encoder_attn_layer_norm = LayerNorm(config.d_model)
        self.fc1 = Linear(config.d_model, width, bias=True)
        self.fc2 = Linear(width, config.d_model, bias=True)
        self.final_layer_norm = LayerNorm(config.d_model)

    def add(self, x_BTD: Tensor, norm: LayerNorm, branch) -> Tensor:
        """The residual stream after one branch: x + f(norm(x)) for PEGASUS, norm(x + f(x)) for BART."""
        y_BTD = F.dropout(branch(norm(x_BTD) if self.pre_norm else x_BTD), self.dropout, self.training)
        return x_BTD + y_BTD if self.pre_norm else norm(x_BTD + y_BTD)

    def feed_forward(self, x_BTD: Tensor) -> Tensor:
        return self.fc2(F.dropout(self.activation(self.fc1(x_BTD)), self.activation_dropout, self.training))

    def encode(self, x_BSD: Tensor, mask: Tensor | None) -> Tensor:
        attention = self.self_attn
        x_BSD = self.add(x_BSD, self.self_attn_layer_norm, lambda x: attention(x, *attention.keys_values(x), mask))
        return self.add(x_BSD, self.final_layer_norm, self.feed_forward)

    def decode(self, x_NTD: Tensor, memory_BSD: Tensor, source_mask: Tensor | None, cached=None) -> Tensor:
        """``cached``: this layer's keys and values, the source's, the positions [T] of x, and the causal mask."""

        def look_back(x_NTD):
            k, v = self.self_attn.keys_values(x_NTD)
            if cached is None:
                return self.self_attn(x_NTD, k, v, None, causal=True)
            keys, values, _, _, positions_T, mask = cached
            keys.index_copy_(1, positions_T, k.transpose(1, 2))
            values.index_copy_(1, positions_T, v.transpose(1, 2))
            return self.self_attn(x_NTD, keys.transpose(1, 2), values.transpose(1, 2), mask)

        def look_at_source(x_NTD):
            k, v = self.encoder_attn.keys_values(memory_BSD) if cached is None else cached[2:4]
            # The beams of one source are so many queries of it: its keys serve them all, uncopied.
            x_BTD = x_NTD.reshape(k.shape[0], -1, x_NTD.shape[2])
            return self.encoder_attn(x_BTD, k, v, source_mask).reshape(x_NTD.shape)

        x_NTD = self.add(x_NTD, self.self_attn_layer_norm, look_back)
        x_NTD = self.add(x_NTD, self.encoder_attn_layer_norm, look_at_source)
        return self.add(x_NTD, self.final_layer_norm, self.feed_forward)


class Stack(nn.Module):
    """The encoder or the decoder: positions, layers, and the norms around them."""

    def __init__(self, config: Seq2SeqConfig, side: str):
        super().__init__()
        D, length, self.kind, self.dropout = config.d_model, config.max_position_embeddings, config.kind, config.dropout
        self.layers = nn.ModuleList(Layer(config, side) for _ in range(getattr(config, f"{side}_layers")))
        if self.kind == "bart":
            self.embed_positions = Embedding(length + 2, D)
            self.layernorm_embedding, self.layer_norm = LayerNorm(D), nn.Identity()
        else:
            self.register_buffer("positions", sinusoids(length, D), persistent=False)
            self.layernorm_embedding, self.layer_norm = nn.Identity(), LayerNorm(D)

    def embed(self, x_BTD: Tensor, positions_T: Tensor) -> Tensor:
        """Token embeddings -> the input of the first layer."""
        places = self.embed_positions(positions_T + 2) if self.kind == "bart" else self.positions[positions_T]
        return F.dropout(self.layernorm_embedding(x_BTD + places.to(x_BTD.dtype)), self.dropout, self.training)


def sinusoids(length: int, width: int) -> Tensor:
    """fp32 [length, width]: sines, then cosines, of position / 10000^(2i / width) (Vaswani et al., 2017, section 3.5;
    there they alternate)."""
    rates = 10000.0 ** (torch.arange(0, width, 2, dtype=torch.float64, device="cpu") / -width)
    angles = torch.arange(length, dtype=torch.float64, device="cpu")[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()


@dataclass
class Cache(layers.KVCache):
    """Keys and values of the target's positions, [layers, N, L, H, K], and of the source, one [B, H, S, K] a layer."""

    source_k: list[Tensor]
    source_v: list[Tensor]


class Seq2Seq(layers.Backbone):
    """An encoder-decoder as a layers.Backbone: without a loss."""

    length_field = "max_position_embeddings"

    def __init__(self, config: Seq2SeqConfig, dtype: torch.dtype = torch.float32):
        super().__init__(config, dtype, max(config.dropout, config.attention_dropout, config.activation_dropout) > 0)
        self.shared = Embedding(config.vocab_size, config.d_model)
        self.encoder = Stack(config, "encoder")
        self.decoder = Stack(config, "decoder")
        if config.logits_bias:
            self.register_buffer("final_logits_bias", torch.zeros(1, config.vocab_size))
        if not self.shared.weight.is_meta:
            self.init_weights()

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Biases 0, LayerNorm gains 1, matrices and embeddings N(0, init_std), the row of the padding token 0, as in
        fairseq's BART; see ``draw_weights``."""
        layers.draw_weights(self, lambda name: self.config.init_std, generator)
        self.shared.weight[self.config.pad_token_id] = 0

    @property
    def head_weight(self) -> Tensor:
        """The output head [V, D], tied to the embeddings. logits = hidden @ head_weight.T (+ head_bias)"""
        return self.shared.weight

    @property
    def head_bias(self) -> Tensor | None:
        """The fixed bias of the logits [V], a buffer; None where the model has none."""
        return self.final_logits_bias[0] if self.config.logits_bias else None

    def embed(self, stack: Stack, tokens_BT: Tensor, positions_T: Tensor | None) -> Tensor:
        self.check_tokens(tokens_BT)
        if positions_T is None:
            positions_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        # The padding token's embedding gets no gradient as an input, as in the published models.
        x_BTD = F.embedding(tokens_BT, self.shared.weight, self.config.pad_token_id).to(self.dtype)
        if self.config.scale_embedding:
            x_BTD = x_BTD * math.sqrt(self.config.d_model)
        return stack.embed(x_BTD, positions_T)

    def encode(self, tokens_BS: Tensor, mask_BS: Tensor | None = None) -> Tensor:
        """Source tokens, int32 or int64 [B, S], S <= max_position_embeddings -> memory [B, S, D].

        ``mask_BS`` is true at tokens and false at padding, which stands on the right; each row has a token. None, no
        padding, lets attention use faster kernels. Values at padding are undefined. Raises ValueError for other shapes.
        """
        mask = attention_mask(mask_BS, tokens_BS)
        x_BSD = self.embed(self.encoder, tokens_BS, None)
        for layer in self.encoder.layers:
            x_BSD = self.run(layer.encode, x_BSD, mask)
        return self.encoder.layer_norm(x_BSD)

    def decode(
        self,
        tokens_NT: Tensor,
        memory_BSD: Tensor,
        mask_BS: Tensor | None = None,
        cache: Cache | None = None,
        positions_T: Tensor | None = None,
    ) -> Tensor:
        """Target tokens [N, T] and the memory of their sources -> hidden states [N, T, D].

        Without a cache N = B and the tokens stand at 0 to T - 1. With one (``new_cache``) they stand at ``positions_T``
        (int64), are written there and see what stands before. N may be a multiple of B, the rows of a source adjacent.
        """
        x_NTD = self.embed(self.decoder, tokens_NT, positions_T)
        mask = attention_mask(mask_BS, memory_BSD[:, :, 0])
        if cache is not None:
            causal_TL = torch.arange(cache.k.shape[2], device=x_NTD.device) <= positions_T[:, None]
        for i, layer in enumerate(self.decoder.layers):
            cached = None
            if cache is not None:
                cached = cache.k[i], cache.v[i], cache.source_k[i], cache.source_v[i], positions_T, causal_TL
            x_NTD = self.run(layer.decode, x_NTD, memory_BSD, mask, cached)
        return self.decoder.layer_norm(x_NTD)

    def forward(self, source_BS: Tensor, source_mask_BS: Tensor | None, target_in_BT: Tensor) -> Tensor:
        """Hidden states [B, T, D] of the decoder, in the activations' dtype. Targets need no mask: padded on the right,
        under causal attention, their padding is not seen."""
        return self.decode(target_in_BT, self.encode(source_BS, source_mask_BS), source_mask_BS)

    def new_cache(self, memory_BSD: Tensor, beams: int, length: int) -> Cache:
        """A cache for ``beams`` rows per source and ``length`` target positions, the source's part filled. Raises
        ValueError when ``length`` exceeds the model's positions."""
        longest, heads = self.config.max_position_embeddings, self.config.decoder_attention_heads
        if length > longest:
            raise ValueError(f"cache for {length} tokens: expected at most max_position_embeddings={longest}")
        source = [layer.encoder_attn.keys_values(memory_BSD) for layer in self.decoder.layers]
        keys, values = ([t.contiguous() for t in side] for side in zip(*source, strict=True))
        target = self.empty_cache(len(source), beams * len(memory_BSD), length, heads, self.config.d_model // heads)
        return Cache(target.k, target.v, keys, values)

    def shift_right(self, labels_BT: Tensor) -> Tensor:
        """Decoder inputs from labels: the start token, then all labels but the last, -100 as padding."""
        inputs_BT = labels_BT.roll(1, dims=1)
        inputs_BT[:, 0] = self.config.decoder_start_token_id
        return inputs_BT.masked_fill(inputs_BT == -100, self.config.pad_token_id)


def training_flops(config: Seq2SeqConfig, S, T):
    """FLOPs of one training step on a pair of ``S`` source and ``T`` target tokens (numbers or arrays).

    A multiply-add is 2, forward once and backward twice. As in PaLM's appendix B the decoder's causal half is not
    discounted, and recomputation does not count."""
    D, E, G = config.d_model, config.encoder_ffn_dim, config.decoder_ffn_dim
    encoder = config.encoder_layers * (S * (4 * D * D + 2 * D * E) + 2 * S * S * D)
    decoder = config.decoder_layers * (T * (6 * D * D + 2 * D * G) + S * 2 * D * D + 2 * T * (T + S) * D)
    return 6 * (encoder + decoder + T * D * config.vocab_size)


def attention_mask(mask_BS: Tensor | None, like_BS: Tensor) -> Tensor | None:
    """bool [B, 1, 1, S] for attention. Raises ValueError where the mask's shape is not the source's."""
    if mask_BS is None:
        return None
    if mask_BS.shape != like_BS.shape:
        raise ValueError(f"source mask of shape {tuple(mask_BS.shape)}: expected {tuple(like_BS.shape)}")
    return mask_BS.bool()[:, None, None, :]
