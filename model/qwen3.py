"""Qwen3's dense family in plain PyTorch: tokens in, hidden states out; the loss belongs to the caller.

The architecture is the technical report's (Yang et al., "Qwen3", 2025, section 2): RMSNorm before each
sub-layer, grouped-query attention whose queries and keys are normalised per head, rotary positions,
SwiGLU, no biases, the head tied to the embedding in the small sizes. Parameters carry Hugging Face's
names without the "model." prefix. Values follow transformers' Qwen3ForCausalLM.

Mixed precision is as in model/gpt2.py: activations have the ``dtype`` the model was given, and every
layer casts its parameters to the dtype of what comes in.

Shapes in names: B sequences, T positions, D = hidden_size, H heads, J key-value heads, K = head_dim,
L cached positions, V = vocab_size.
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.gpt2_hub import CONFIG, INDEX, WEIGHTS, _folder, _read_json
from model.weights import check_shapes, read_shapes, read_tensors, staged, weight_files, write_tensors

# What Qwen3 here fixes: the values of each option of config.json that mean the same function, the first of them
# transformers' default. The rotary fields and layer_types are checked apart. attention_dropout is not read: it
# belongs to someone else's training.
FIXED = dict(
    hidden_act=("silu", "swish"),
    attention_bias=(False,),
    use_sliding_window=(False,),
    quantization_config=(None,),
    is_causal=(True,),
)


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
        for field in dataclasses.fields(self)[:8]:
            value = getattr(self, field.name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{field.name}={value!r}: expected a positive integer")
        for name in ("rms_norm_eps", "rope_theta"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"{name}={value!r}: expected a positive number")
        if not isinstance(self.tie_word_embeddings, bool):
            raise ValueError(f"tie_word_embeddings={self.tie_word_embeddings!r}: expected true or false")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}; query heads share the others evenly"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim}: expected an even number, rotary positions turn pairs")

    @property
    def block_size(self) -> int:
        """The longest sequence, under the name that GPT2Config gives it."""
        return self.max_position_embeddings


def read_config(path: str | os.PathLike) -> Qwen3Config:
    """The Qwen3Config of a Hugging Face config.json. Raises ValueError for another model_type, for a field that
    is missing, and for every option that changes the function and is not supported."""
    path = Path(path)
    fields = _read_json(path)
    if fields.get("model_type") != "qwen3":
        raise ValueError(f"{path}: model_type={fields.get('model_type')!r}; expected 'qwen3', the dense family")
    for name, allowed in FIXED.items():
        if fields.get(name, allowed[0]) not in allowed:
            raise ValueError(f"{path}: {name}={fields[name]!r} is not supported; expected {allowed[0]!r}")
    if other := set(fields.get("layer_types") or []) - {"full_attention"}:
        raise ValueError(f"{path}: layer_types holds {sorted(other)}; only 'full_attention' is supported")
    known = [field.name for field in dataclasses.fields(Qwen3Config)]
    values = {name: fields[name] for name in known if name in fields}
    values["rope_theta"] = _rope_theta(path, fields)
    if values.get("num_key_value_heads", 0) is None:  # as in transformers: null means as many as there are heads
        values["num_key_value_heads"] = values.get("num_attention_heads")
    if missing := [f.name for f in dataclasses.fields(Qwen3Config)[:6] if f.name not in values]:
        raise ValueError(f"{path} does not say {', '.join(missing)}")
    try:
        return Qwen3Config(**values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _rope_theta(path: Path, fields: dict) -> float:
    """The rotary base from either layout: rope_theta beside rope_scaling, or both within rope_parameters."""
    found = [fields["rope_theta"]] if "rope_theta" in fields else []
    for name in ("rope_scaling", "rope_parameters"):
        rope = fields.get(name)
        if rope is None:
            continue
        if not isinstance(rope, dict) or rope.get("rope_type", rope.get("type", "default")) != "default":
            raise ValueError(f"{path}: {name}={rope!r} is not supported; expected rope_type 'default'")
        if unknown := set(rope) - {"rope_type", "type", "rope_theta"}:
            raise ValueError(f"{path}: {name} holds {sorted(unknown)}, not supported; expected rope_theta alone")
        if "rope_theta" in rope:
            found.append(rope["rope_theta"])
    if any(theta != found[0] for theta in found):
        raise ValueError(f"{path} gives rope_theta as {' and as '.join(map(repr, found))}; expected one value")
    return found[0] if found else Qwen3Config.rope_theta


class Linear(nn.Module):
    """y = x W^T, W [out, in], computed in its input's dtype. ``dense`` is what replaces weight access elsewhere:
    a layer that stores its weight otherwise (model/lora.py) has the same method."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in))

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.weight.shape)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] as one tensor of ``dtype``."""
        return self.weight.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dense(x.dtype))


class Embedding(nn.Embedding):
    """nn.Embedding that leaves its initialisation to Qwen3.init_weights."""

    def reset_parameters(self):
        pass


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * gain over the last dimension; torch takes the mean in fp32 whatever x is."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps)


@dataclass
class KVCache:
    """Keys and values of every layer, [layers, B, L, J, K] each, zero at first: a masked key still multiplies its
    value by 0, which must not be a NaN. Storage of a fixed shape, which the forward writes in place. A cache of
    ``KVCache(cache.k[:, :, :n], cache.v[:, :, :n])`` shares it and reads n positions only."""

    k: Tensor
    v: Tensor


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
        D, K = config.hidden_size, config.head_dim
        self.head_dim = K
        self.q_proj = Linear(D, config.num_attention_heads * K)
        self.k_proj = Linear(D, config.num_key_value_heads * K)
        self.v_proj = Linear(D, config.num_key_value_heads * K)
        self.o_proj = Linear(config.num_attention_heads * K, D)
        self.q_norm = RMSNorm(K, config.rms_norm_eps)
        self.k_norm = RMSNorm(K, config.rms_norm_eps)

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
            q_BHTK = q_BTHK.transpose(1, 2)
            y = F.scaled_dot_product_attention(q_BHTK, k_BJLK, v_BJLK, is_causal=True, enable_gqa=True)
            y_BTHK = y.transpose(1, 2)
        else:
            # Query heads that share keys become further rows of one head: no copies of keys and values, and the
            # fused kernels that take a mask, which have no enable_gqa, still apply.
            q = q_BTHK.view(B, T, J, -1, self.head_dim).permute(0, 2, 3, 1, 4).reshape(B, J, -1, self.head_dim)
            y = F.scaled_dot_product_attention(q, k_BJLK, v_BJLK, attn_mask=mask)
            y_BTHK = y.view(B, J, -1, T, self.head_dim).permute(0, 3, 1, 2, 4)
        return self.o_proj(y_BTHK.reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, config: Qwen3Config):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

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


class Qwen3(nn.Module):
    """Qwen3 without a loss. ``dtype`` is the activations' dtype; parameters are created in torch's default dtype,
    fp32, and initialised from torch's global CPU generator. One built on the meta device is not initialised;
    ``load_qwen3`` fills it.

    ``checkpoint_activations = True`` recomputes each block in backward: memory for a third more work.
    ``draws_random`` is set by whoever puts dropout into a layer, so that the recomputation replays it.
    """

    def __init__(self, config: Qwen3Config, dtype: torch.dtype = torch.float32):
        super().__init__()
        if not dtype.is_floating_point:
            raise ValueError(f"dtype={dtype}: expected a floating-point dtype for the activations")
        self.config = config
        self.dtype = dtype
        self.checkpoint_activations = False
        self.draws_random = False
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size)
        if not self.embed_tokens.weight.is_meta:
            self.init_weights()

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Gains 1, matrices and embeddings N(0, 0.02) (transformers' initializer_range), drawn in fp32 on the CPU
        in parameter order from ``generator`` or torch's global one: a seed gives one model on every device."""
        for p in self.parameters():
            if p.ndim == 1:
                p.fill_(1)
            else:
                p.copy_(torch.empty(p.shape, dtype=torch.float32, device="cpu").normal_(0, 0.02, generator=generator))

    @property
    def head_weight(self) -> Tensor:
        """The output head [V, D], the token embedding itself where tied. logits = hidden @ head_weight.T"""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def new_cache(self, batch: int, length: int) -> KVCache:
        """An empty cache of ``batch`` rows of ``length`` positions, in the activations' dtype, on the model's device:
        4 * layers * J * K bytes a position in bf16. Raises ValueError for a size that cannot be used."""
        c = self.config
        if batch < 1 or not 1 <= length <= c.max_position_embeddings:
            raise ValueError(
                f"cache of {batch} rows x {length} positions: expected at least one row, "
                f"and 1 to max_position_embeddings={c.max_position_embeddings} positions"
            )
        shape = (c.num_hidden_layers, batch, length, c.num_key_value_heads, c.head_dim)
        device = self.embed_tokens.weight.device
        return KVCache(*(torch.zeros(shape, dtype=self.dtype, device=device) for _ in range(2)))

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
        ``documents_BT``: a number per token, equal within a document (0 0 0 1 1 2 ...); attention is then
        causal within documents. Without it, causal over the whole row.
        ``cache``: keys and values are written at ``positions_BT`` of each row, and each token sees the
        cached positions up to its own. So a row needs no clearing: a new sequence that begins at position 0
        overwrites what it can see, and what follows right-padding is overwritten before it is seen. All
        shapes are static; positions must be below the cache's length, which is not checked on a GPU.
        ``rows_B`` int64: the cache rows these sequences are, without it all in order. Runs without gradients.

        Raises ValueError for other shapes and for combinations without a meaning.
        """
        if tokens_BT.ndim != 2:
            raise ValueError(f"tokens of shape {tuple(tokens_BT.shape)}: expected two dimensions, [batch, time]")
        B, T = tokens_BT.shape
        if T > self.config.max_position_embeddings:
            raise ValueError(
                f"sequence of {T} tokens: expected at most max_position_embeddings="
                f"{self.config.max_position_embeddings}"
            )
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
            if self.checkpoint_activations and torch.is_grad_enabled():
                # Without dropout nothing random is replayed, and saving the generator's state would cost a sync.
                keep_rng = self.draws_random and self.training
                x_BTD = checkpoint(block, x_BTD, cos, sin, mask, slot, use_reentrant=False, preserve_rng_state=keep_rng)
            else:
                x_BTD = block(x_BTD, cos, sin, mask, slot)
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
            if positions.min() < 0 or positions.max() >= cache.k.shape[2]:
                raise ValueError(
                    f"positions {positions.min()} to {positions.max()}: expected 0 to {cache.k.shape[2] - 1}, "
                    "the cache's length less one"
                )


def _hf_name(name: str) -> str:
    return name if name.startswith("lm_head.") else "model." + name


def _plain_shapes(config: Qwen3Config) -> dict[str, tuple[int, ...]]:
    """Every parameter of the plain model, our names."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in Qwen3(config).named_parameters()}


def load_qwen3(
    folder_or_hub_id: str | os.PathLike,
    dtype: torch.dtype = torch.float32,
    param_dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    convert: Callable[[str, Tensor], nn.Module] | None = None,
) -> Qwen3:
    """A Qwen3 from a folder in Hugging Face's layout, or from a model's name on the hub ("Qwen/Qwen3-0.6B").

    ``dtype`` is the activations', ``param_dtype`` the parameters' (``dtype`` if None; pass fp32 for masters to
    train). Tensors go one by one from the mapped files to ``device``, so the host holds little more than one
    tensor beside what it keeps. ``convert(name, tensor)`` is called for the weight [out, in] of each linear
    layer within the blocks, in the file's dtype, on the CPU; the module it returns takes the layer's place.

    Raises ValueError, before any tensor is read, for a config that is not Qwen3's or has options not supported,
    for missing, unexpected or misshapen tensors, for files that are missing or damaged, and for a hub that
    cannot be reached.
    """
    folder = _folder(folder_or_hub_id)
    config = read_config(folder / CONFIG)
    with torch.device("meta"):
        model = Qwen3(config, dtype)
    ours = {_hf_name(name): name for name in _plain_shapes(config)}
    expected = {_hf_name(name): shape for name, shape in _plain_shapes(config).items()}
    paths = weight_files(folder)
    found = read_shapes(paths)
    # A tied head may be saved beside the embedding; it has to be the same, and is compared once both were read.
    head, head_shape = None, found.get("lm_head.weight")
    if config.tie_word_embeddings and head_shape == expected["model.embed_tokens.weight"]:
        del found["lm_head.weight"]
    check_shapes(found, expected, f"{folder} does not hold the Qwen3 of its config")
    for name, tensor in read_tensors(paths):
        if name not in ours:
            head = tensor.clone()
            continue
        path, _, attribute = ours[name].rpartition(".")
        if convert is not None and path.startswith("layers.") and isinstance(model.get_submodule(path), Linear):
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, convert(ours[name], tensor))
        else:
            # A copy, even where nothing changes: the tensor is a view of the file.
            kept = tensor.to(device=device, dtype=param_dtype or dtype, copy=True)
            setattr(model.get_submodule(path), attribute, nn.Parameter(kept))
    if head is not None and not torch.equal(head.to(device, model.head_weight.dtype), model.head_weight):
        raise ValueError(f"{folder}: lm_head.weight differs from embed_tokens.weight, but its config ties the two")
    return model


@torch.no_grad()
def save_qwen3(
    model: Qwen3,
    folder: str | os.PathLike,
    tokenizer_files: dict[str, bytes] | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes ``model`` to ``folder`` as transformers' Qwen3ForCausalLM reads it, in ``dtype`` (None: its embedding's).

    This is also merge-and-export: each linear layer is written as the one matrix it computes with, a LoRA
    layer as base + scale * B A summed in fp32 before the cast, an NF4 base as its dequantised values. The
    model itself is not changed, and at most one shard is held beside it.

    ``tokenizer_files``: name -> content, written beside as they are. Raises ValueError, before anything is
    written, for file names that are the model's own and for a folder with weights this export would not replace.
    """
    folder, config, files = Path(folder), model.config, tokenizer_files or {}
    dtype = dtype or model.embed_tokens.weight.dtype
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes={max_shard_bytes}: expected a positive number of bytes")
    for name in files:
        own = name in ("", ".", "..", INDEX, CONFIG) or name.endswith(".safetensors")
        if name != os.path.basename(name) or own:
            raise ValueError(f"tokenizer file {name!r}: expected a plain file name that is not one of the model's own")
    fields = dict(architectures=["Qwen3ForCausalLM"], model_type="qwen3") | dataclasses.asdict(config)
    fields |= {name: allowed[0] for name, allowed in FIXED.items() if allowed[0] is not None}
    fields |= dict(rope_scaling=None, torch_dtype=str(dtype).removeprefix("torch."))
    shapes = {_hf_name(name): shape for name, shape in _plain_shapes(config).items()}
    sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}

    def tensor_of(name: str) -> Tensor:
        path, _, attribute = name.removeprefix("model.").rpartition(".")
        module = model.get_submodule(path)
        return module.dense(dtype) if hasattr(module, "dense") else getattr(module, attribute).to(dtype)

    old = {path.name for path in folder.glob("*.safetensors")} if folder.is_dir() else set()
    if old - {WEIGHTS} or (old and sum(sizes.values()) > max_shard_bytes):
        raise ValueError(f"{folder} already holds weights, {min(old)}; choose a new folder for the export")
    with staged(folder, last=CONFIG) as temporary:
        write_tensors(temporary, sizes, tensor_of, max_shard_bytes)
        for name, content in files.items():
            (temporary / name).write_bytes(content)
        (temporary / CONFIG).write_text(json.dumps(fields, indent=2) + "\n")
