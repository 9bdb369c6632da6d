"""LoRA on a decoder's linear layers, over a base in fp32, bf16 or NF4, with adapters in PEFT's format.

A layer computes

    y = W x + b + s B A dropout(x)

with W and b (if there is one) frozen and A [r, in], B [out, r] trained (Hu et al., "LoRA", 2021, section 4.1). The
scale s is alpha / r, or alpha / sqrt(r) for rsLoRA (Kalajdzievski, 2023). B starts at 0, A uniform within 1 / sqrt(in),
which the authors' code and PEFT call Kaiming with a = sqrt(5).

NF4 is QLoRA's 4-bit base (Dettmers et al., 2023): blocks of 64 values share a scale, and double quantisation quantises
the scales too. The package bitsandbytes does it, on a GPU and on a CPU.

The backward also measures. After ``set_segments`` the gradient of each A and B is the sum of two products, over the
prompt's rows and over the answer's, at the cost of one. ``segment_rms`` reads the size of both, block by block.

Shapes in names: N rows (all tokens of the batch), r the rank.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model import weights
from model.decoder import Decoder, DecoderConfig
from model.decoder_hub import load_decoder
from model.layers import Linear, check_fields

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BASES = ("bf16", "fp32", "nf4")
NF4_BLOCK = 64  # values that share one scale, QLoRA's choice

ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"

# Fields of adapter_config.json: those with fixed values, those that are read, and those that cannot change what the
# adapter computes. Every other field is an extension of LoRA, and has to be empty.
FIXED = dict(peft_type=("LORA",), bias=("none",), init_lora_weights=(True, False, "gaussian", "orthogonal", "eva"))
READ = ("r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "base_model_name_or_path")
HARMLESS = ("task_type", "inference_mode", "auto_mapping", "revision", "peft_version", "megatron_core")
HARMLESS += ("qalora_group_size", "runtime_config")


@dataclass(frozen=True)
class LoRAConfig:
    """What is adapted and how. Raises ValueError for values that make no adapter."""

    r: int = 64
    alpha: float = 16
    dropout: float = 0.0  # of the adapter's input, never of the base's
    targets: tuple[str, ...] = TARGETS  # names of layers within each block
    rslora: bool = False

    def __post_init__(self):
        if not isinstance(self.r, int) or isinstance(self.r, bool) or self.r < 1:
            raise ValueError(f"rank r={self.r!r}: expected a positive integer; rank 0 would train nothing")
        check_fields(self, "a positive number", "alpha")
        check_fields(self, "a probability in [0, 1)", "dropout")
        if not self.targets or isinstance(self.targets, str) or not {*self.targets} <= {*TARGETS}:
            raise ValueError(f"targets={self.targets!r}: expected one or more of {', '.join(TARGETS)}")

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)


def _bitsandbytes():
    try:
        import bitsandbytes.functional

        return bitsandbytes.functional
    except (ImportError, OSError, RuntimeError) as error:
        raise ValueError(
            f"base 'nf4' needs the package bitsandbytes, which cannot be imported ({weights.first_line(error)}); "
            "pip install bitsandbytes, or take base 'bf16'"
        ) from error


class NF4Linear(nn.Module):
    """A frozen Linear whose weight [out, in] is kept in NF4 and dequantised anew for each product, backward's too.

    It quantises in the dtype and on the device of ``weight``, and is not part of a state_dict: the base is loaded from
    its files. Raises ValueError without bitsandbytes, and for rows that blocks of 64 do not divide."""

    def __init__(self, weight: Tensor, double_quant: bool = True):
        super().__init__()
        if weight.ndim != 2 or weight.shape[1] % NF4_BLOCK:
            expected = f"expected [out, in] with in a multiple of {NF4_BLOCK}"
            raise ValueError(f"NF4 of a weight {tuple(weight.shape)}: {expected}; take base 'bf16'")
        self.shape = tuple(weight.shape)
        packed, self.quant = _bitsandbytes().quantize_4bit(
            weight.contiguous(), blocksize=NF4_BLOCK, compress_statistics=double_quant, quant_type="nf4"
        )
        self.register_buffer("packed", packed, persistent=False)
        self.bias: nn.Parameter | None = None  # the loader's to set

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.quant.to(self.packed.device)
        return self

    @torch.no_grad()
    def dense(self, dtype: torch.dtype) -> Tensor:
        """The dequantised weight [out, in]."""
        return _bitsandbytes().dequantize_4bit(self.packed, self.quant).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        y = _LoRAProduct.apply(x, None, None, self, None, 1.0)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class _Segments:
    """Which rows of the batch are the answer's, and what backwards measured. All layers of a model share one."""

    def __init__(self, blocks: int):
        self.order_N: Tensor | None = None  # the prompt's rows, then the answer's
        self.n_prompt = 0
        self.squares = torch.zeros(blocks, 2)  # fp32, moved to the device by set_segments
        self.elements = [0] * blocks  # of gradient, per column of squares: known on the host

    def add(self, block: int, parts: list[Tensor]) -> None:
        """``parts``: gradients of one layer, [2, ...] each, prompt and answer."""
        norms = torch.stack([torch.linalg.vector_norm(p.flatten(1), dim=1, dtype=torch.float32) for p in parts])
        self.squares[block].add_(norms.square_().sum(0))
        self.elements[block] += sum(p[0].numel() for p in parts)


class _LoRAProduct(torch.autograd.Function):
    """W x + s B A dropout(x) for a frozen W.

    W is ``base``'s, dequantised anew if in NF4. ``layer`` is the LoRALinear of A and B; without one all three are None.
    Kept for the backward: x, which the layers that read the same x share, A x (r numbers a row) and dropout's mask, one
    byte a number."""

    @staticmethod
    def forward(ctx, x, A, B, base, layer: "LoRALinear | None", keep_p: float):
        rows = x.reshape(-1, x.shape[-1])
        y = rows @ base.dense(x.dtype).t()
        ctx.shape, ctx.base, ctx.layer, ctx.keep_p = x.shape, base, layer, keep_p
        if layer is not None:
            kept, h = None, rows
            if keep_p < 1:
                kept = torch.empty_like(rows, dtype=torch.bool).bernoulli_(keep_p)
                h = rows * kept.to(x.dtype).div_(keep_p)
            h = h @ A.to(x.dtype).t()
            y.addmm_(h, B.to(x.dtype).t(), alpha=layer.scale)
            ctx.save_for_backward(x, A, B, h, kept)
            # The rows that belong to THIS batch, whatever is set before its backward runs.
            ctx.order, ctx.n_prompt = layer.segments.order_N, layer.segments.n_prompt
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        dy = dy.reshape(-1, dy.shape[-1])
        dx = dy @ ctx.base.dense(dy.dtype) if ctx.needs_input_grad[0] else None
        saved = ctx.saved_tensors  # once: under activation checkpointing each look recomputes
        if not saved:
            return None if dx is None else dx.view(ctx.shape), None, None, None, None, None
        x, A, B, h, kept = saved
        rows, h = x.reshape(-1, x.shape[-1]), h * ctx.layer.scale
        dh = (dy @ B.to(dy.dtype)).mul_(ctx.layer.scale)
        if kept is not None:
            mask = kept.to(dy.dtype).div_(ctx.keep_p)
            rows = rows * mask
        if dx is not None:
            dx = dx.addmm_(dh, A.to(dy.dtype)) if kept is None else dx.add_((dh @ A.to(dy.dtype)).mul_(mask))
            dx = dx.view(ctx.shape)
        if ctx.order is None:
            dA, dB = dh.t() @ rows, dy.t() @ h
        else:
            # Rows sorted by segment, so that each part is one product of its own rows: the parts' sum is the
            # gradient, at the multiplications of the undivided product.
            dh, rows, dy, h = (z.index_select(0, ctx.order) for z in (dh, rows, dy, h))
            dA, dB = _two_parts(dh, rows, ctx.n_prompt), _two_parts(dy, h, ctx.n_prompt)
            ctx.layer.segments.add(ctx.layer.block, [dA, dB])
            dA, dB = dA.sum(0, dtype=A.dtype), dB.sum(0, dtype=B.dtype)
        return dx, dA.to(A.dtype), dB.to(B.dtype), None, None, None


def _two_parts(left: Tensor, right: Tensor, n: int) -> Tensor:
    """left^T right over the first n rows and over the others, [2, columns of left, columns of right]."""
    return torch.stack([left[:n].t() @ right[:n], left[n:].t() @ right[n:]])


class LoRALinear(nn.Module):
    """A frozen base layer with an adapter. ``base``: any module with ``shape`` and ``dense``."""

    def __init__(self, base: nn.Module, config: LoRAConfig, segments: _Segments, block: int, device: torch.device):
        super().__init__()
        self.base, self.shape, self.scale, self.dropout = base, base.shape, config.scale, config.dropout
        self.segments, self.block = segments, block
        n_out, n_in = base.shape
        self.lora_A = nn.Parameter(torch.zeros(config.r, n_in, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.zeros(n_out, config.r, dtype=torch.float32, device=device))

    @property
    def bias(self) -> nn.Parameter | None:
        return self.base.bias

    @torch.no_grad()
    def dense(self, dtype: torch.dtype) -> Tensor:
        """The merged weight [out, in]: base + s B A, summed in fp32."""
        base = self.base.dense(torch.float32)
        return torch.addmm(base, self.lora_B.float(), self.lora_A.float(), alpha=self.scale).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        order, tokens = self.segments.order_N, x[..., 0].numel()
        if order is not None and torch.is_grad_enabled() and tokens != len(order):
            sizes = f"a batch of {tokens} tokens, but the answer mask has {len(order)}"
            raise ValueError(f"{sizes}: call set_segments with this batch's mask, or with None")
        keep_p = 1 - self.dropout if self.training else 1.0
        y = _LoRAProduct.apply(x, self.lora_A, self.lora_B, self.base, self, keep_p)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def load_base(
    folder_or_hub_id: str | os.PathLike,
    base: str = "bf16",
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    double_quant: bool = True,
) -> Decoder:
    """A decoder whose parameters are kept as ``base`` says, ready for ``add_lora``. ``dtype`` is the activations'.

    "bf16" and "fp32" keep all parameters in that dtype. "nf4" quantises each linear layer within the blocks as it is
    loaded, on ``device``, and keeps the rest in ``dtype``; with ``double_quant`` at 4.13 bits a weight instead of 4.5.
    Raises ValueError as load_decoder does, for an unknown base, and for "nf4" without bitsandbytes."""
    if base not in BASES:
        raise ValueError(f"base={base!r}: expected one of {', '.join(BASES)}")
    if base != "nf4":
        return load_decoder(folder_or_hub_id, dtype, dict(bf16=torch.bfloat16, fp32=torch.float32)[base], device)
    _bitsandbytes()

    def quantised(name: str, weight: Tensor) -> NF4Linear:
        return NF4Linear(weight.to(device=device, dtype=dtype), double_quant)

    return load_decoder(folder_or_hub_id, dtype, device=device, convert=quantised)


@torch.no_grad()
def add_lora(model: Decoder, config: LoRAConfig, generator: torch.Generator | None = None) -> None:
    """Freezes ``model`` and wraps the targeted layers of every block. Only A and B, in fp32, train.

    A is drawn in fp32 on the CPU, in the layers' order, from ``generator`` or torch's global one: a seed gives one
    adapter on every device. Raises ValueError for a model that has adapters already."""
    _check_plain(model)
    model.requires_grad_(False)
    model.lora, model.draws_random = config, config.dropout > 0
    segments, device = _Segments(len(model.layers)), model.embed_tokens.weight.device
    for path, block, base in _targeted(model, config):
        layer = LoRALinear(base, config, segments, block, device)
        bound = 1 / math.sqrt(base.shape[1])
        layer.lora_A.copy_(torch.empty(layer.lora_A.shape).uniform_(-bound, bound, generator=generator))
        model.set_submodule(path, layer)


def _check_plain(model: Decoder) -> None:
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise ValueError("the model has LoRA adapters already; load the base anew to add others")


def _targeted(model: Decoder, config: LoRAConfig) -> list[tuple[str, int, nn.Module]]:
    """Path, block and layer of everything that ``config`` adapts."""
    return [
        (f"layers.{i}.{path}", i, module)
        for i, block in enumerate(model.layers)
        for path, module in block.named_modules()
        if isinstance(module, Linear | NF4Linear) and path.rpartition(".")[2] in config.targets
    ]


def _adapted(model: Decoder) -> dict[str, LoRALinear]:
    layers = {path: module for path, module in model.named_modules() if isinstance(module, LoRALinear)}
    if not layers:
        raise ValueError("the model has no LoRA adapters; call add_lora or load_adapter first")
    return layers


def merged(model: Decoder) -> Decoder:
    """A plain model of the same function on the same device, for generation; save_decoder needs no such copy.

    Each layer is one dense matrix in the activations' dtype, adapters summed in and NF4 dequantised. Embedding, head
    and norms are shared with ``model``, which is not changed."""
    with torch.device("meta"):
        plain = Decoder(model.config, model.dtype)
    for path, layer in plain.named_modules():
        source = model.get_submodule(path)
        if path.startswith("layers.") and isinstance(layer, Linear):
            layer.weight, layer.bias = nn.Parameter(source.dense(model.dtype), requires_grad=False), source.bias
        elif "weight" in layer._parameters:
            layer.weight = source.weight
    return plain.train(model.training)


def block_parameters(model: Decoder) -> list[list[nn.Parameter]]:
    """The trained parameters of each transformer block, in ``segment_rms``'s order: one optimizer group a block."""
    blocks: list[list[nn.Parameter]] = [[] for _ in model.layers]
    for layer in _adapted(model).values():
        blocks[layer.block] += [layer.lora_A, layer.lora_B]
    return blocks


def lora_flops_per_token(config: DecoderConfig, lora: LoRAConfig, block: int, loss_share: float = 1.0) -> float:
    """FLOPs of one LoRA training step per token at sequence length ``block``.

    PaLM's count (Chowdhery et al., 2022, appendix B), of what LoRA runs, recomputation aside. A multiply-add is 2.

    - Attention takes 12 L T H K, without a discount for its causal half.
    - A frozen matrix [out, in] takes 4 out in: forward and the gradient of its input, none of itself.
    - An adapter of rank r takes 6 r (in + out).
    - The head takes 4 V D for each target of the loss, ``loss_share`` of all tokens.
    - Before the first block's q, k and v nothing trains, so they have no gradient of an input. All three are taken to
      be adapted, or none.
    """
    with torch.device("meta"):
        layers = {path: m.shape for path, m in Decoder(config).named_modules() if isinstance(m, Linear) and "." in path}
    total = 0
    for path, (n_out, n_in) in layers.items():
        adapted = path.rpartition(".")[2] in lora.targets
        total += 4 * n_out * n_in + 6 * adapted * lora.r * (n_in + n_out)
        if path.startswith("layers.0.") and path.endswith(("q_proj", "k_proj", "v_proj")):
            total -= 2 * n_out * n_in + 2 * adapted * lora.r * n_in
    attention = 12 * config.num_hidden_layers * block * config.num_attention_heads * config.head_dim
    return total + attention + 4 * loss_share * config.vocab_size * config.hidden_size


def set_segments(model: Decoder, answer_mask: Tensor | None) -> None:
    """Says which tokens of the coming batch are the answer's: bool, one entry per token, usually [B, T]. Every other
    token, padding too, counts to the prompt. None stops measuring. Call it between a micro-batch's backward and the
    next one's forward. A mask on the GPU costs a synchronisation. Raises ValueError for a mask that is not boolean."""
    first = next(iter(_adapted(model).values()))
    segments, device = first.segments, first.lora_A.device
    if answer_mask is None:
        segments.order_N = None
        return
    if answer_mask.dtype != torch.bool:
        raise ValueError(f"answer mask of dtype {answer_mask.dtype}: expected bool, True where a token is the answer's")
    answer_N = answer_mask.flatten()
    segments.n_prompt = answer_N.numel() - int(answer_N.sum())
    # Stable, so that rows of a segment keep their order and the sums do not depend on the sort.
    segments.order_N = answer_N.to(torch.uint8).argsort(stable=True).to(device, non_blocking=True)
    segments.squares = segments.squares.to(device)


def segment_rms(model: Decoder, reset: bool = True) -> Tensor:
    """RMS gradient of each block's adapters, fp32 [blocks, 2]: over the prompt's rows, and over the answer's.

    It is the root of the mean squared gradient that those rows alone contribute, over all A and B of the block and the
    backward passes since the last reset. It stays on the device and is 0 where nothing was measured."""
    segments = next(iter(_adapted(model).values())).segments
    elements = torch.tensor(segments.elements, dtype=torch.float32).clamp_(min=1)
    elements = elements.to(segments.squares.device, non_blocking=True)
    rms = (segments.squares / elements[:, None]).sqrt_()
    if reset:
        segments.squares.zero_()
        segments.elements = [0] * len(segments.elements)
    return rms


def _peft_name(path: str, which: str) -> str:
    return f"base_model.model.model.{path}.{which}.weight"


def adapter_tensors(model: Decoder) -> dict[str, Tensor]:
    """The trained parameters themselves under PEFT's names; a training checkpoint holds these."""
    return {
        _peft_name(path, which): getattr(layer, which)
        for path, layer in _adapted(model).items()
        for which in ("lora_A", "lora_B")
    }


def save_adapter(model: Decoder, folder: str | os.PathLike, base_model: str) -> None:
    """Writes an adapter as PEFT does, as ``weights.staged`` says. ``base_model``: where the base was loaded from."""
    config: LoRAConfig = model.lora
    fields = dict(peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=str(base_model))
    fields |= dict(r=config.r, lora_alpha=config.alpha, lora_dropout=config.dropout, use_rslora=config.rslora)
    fields |= dict(target_modules=sorted(config.targets), bias="none", fan_in_fan_out=False, inference_mode=True)
    fields |= dict(init_lora_weights=True, modules_to_save=None, use_dora=False)
    with weights.staged(Path(folder), last=ADAPTER_CONFIG) as temporary:
        weights.save_tensors(adapter_tensors(model).items(), temporary / ADAPTER)
        weights.write_json(fields, temporary / ADAPTER_CONFIG)


def read_adapter_config(folder: str | os.PathLike) -> tuple[LoRAConfig, str | None]:
    """The LoRAConfig of a PEFT adapter, and the name of its base. Raises ValueError for other kinds of adapters."""
    path = Path(folder) / ADAPTER_CONFIG
    fields = weights.read_json(path)
    weights.check_fields(path, fields, ("r", "lora_alpha", "target_modules"), FIXED)
    for name, value in fields.items():
        if name not in (*READ, *HARMLESS, *FIXED) and value:
            raise ValueError(f"{path}: {name}={value!r} is not supported; only plain LoRA and rsLoRA adapters are")
    targets = list(TARGETS) if fields["target_modules"] == "all-linear" else fields["target_modules"]
    if not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
        raise ValueError(f"{path}: target_modules={targets!r}: expected a list of {', '.join(TARGETS)}")
    # PEFT may name each layer by its whole path; the tensors in the file then say whether all blocks have it.
    names = {name.rpartition(".")[2] for name in targets}
    targets = (*(name for name in TARGETS if name in names), *sorted(names.difference(TARGETS)))
    dropout, rslora = fields.get("lora_dropout", 0.0), bool(fields.get("use_rslora", False))
    try:
        config = LoRAConfig(fields["r"], fields["lora_alpha"], dropout, targets, rslora)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return config, fields.get("base_model_name_or_path")


def load_adapter(model: Decoder, folder: str | os.PathLike, base_model: str | None = None) -> None:
    """Adds a PEFT adapter, ours or PEFT's own, to ``model``; it is trainable.

    The last component of ``base_model``, where ``model`` was loaded from, has to be that of the base which the adapter
    names, so that a local copy of a hub model passes; None is not checked. Raises ValueError, before the model is
    changed, for another base, for tensors that do not fit it, and as read_adapter_config does."""
    _check_plain(model)
    folder = Path(folder)
    config, trained_on = read_adapter_config(folder)
    if base_model is not None and trained_on and Path(base_model).name != Path(trained_on).name:
        reason = f"is an adapter of {trained_on!r}, not of {str(base_model)!r}"
        raise ValueError(f"{folder} {reason}; load it on its own base")
    shapes = {path: base.shape for path, _, base in _targeted(model, config)}
    expected = {_peft_name(path, "lora_A"): (config.r, n_in) for path, (_, n_in) in shapes.items()}
    expected |= {_peft_name(path, "lora_B"): (n_out, config.r) for path, (n_out, _) in shapes.items()}
    weights.check_shapes(weights.read_shapes([folder / ADAPTER]), expected, f"{folder} is no adapter of this base")
    add_lora(model, config)
    tensors = adapter_tensors(model)
    with torch.no_grad():
        for name, tensor in weights.read_tensors([folder / ADAPTER]):
            tensors[name].copy_(tensor)
