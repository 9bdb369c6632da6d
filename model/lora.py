"""LoRA on a decoder's linear layers, over a base in fp32, bf16 or NF4; PEFT's files are model/lora_hub.py's.

A layer computes

    y = W x + b + s B A dropout(x)

with W and b (if there is one) frozen and A [r, in], B [out, r] trained (Hu et al., "LoRA", 2021, section 4.1). The
scale s is alpha / r, or alpha / sqrt(r) for rsLoRA (Kalajdzievski, 2023). B starts at 0, A uniform within 1 / sqrt(in),
which the authors' code and PEFT call Kaiming with a = sqrt(5). PiSSA (Meng et al., 2024, section 3) starts s B A as the
r largest singular components of W instead, and freezes what is left of W; with an NF4 base that is quantised anew.

NF4 is QLoRA's 4-bit base (Dettmers et al., 2023): blocks of 64 values share a scale, and double quantisation quantises
the scales too. The package bitsandbytes does it, on a GPU and on a CPU.

The backward also measures. After ``set_segments`` the gradient of each A and B is the sum of two, over the prompt's
rows and over the answer's, of one product that reads the wide side once. ``segment_rms`` reads the size of both, block
by block.

Shapes in names: N rows (all tokens of the batch), r the rank.
"""

import math
import os
import re
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.decoder import Decoder, DecoderConfig
from model.decoder_hub import load_decoder
from model.layers import Linear, check_fields, check_value
from model.packed import pack
from schedules.commandline import package

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BASES = ("bf16", "fp32", "nf4")
INITS = ("zero", "pissa")
NF4_BLOCK = 64  # values that share one scale, QLoRA's choice


@dataclass(frozen=True)
class LoRAConfig:
    """What is adapted and how, as PEFT says it. Raises ValueError for values that make no adapter.

    A layer's name is its path ("model.layers.0.self_attn.q_proj"). ``targets`` are ends of names, or one regex of whole
    names; ``layers`` are the blocks that they apply to. A pattern is a name's end or a regex of it; the first that fits
    a layer sets its rank or alpha."""

    r: int = 64
    alpha: float = 16
    dropout: float = 0.0  # of the adapter's input, never of the base's
    targets: tuple[str, ...] | str = TARGETS
    rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    layers: tuple[int, ...] | None = None  # None: all
    init: str = "zero"  # one of INITS: B at 0, or PiSSA

    def __post_init__(self):
        for r in (self.r, *self.rank_pattern.values()):
            if not isinstance(r, int) or isinstance(r, bool) or r < 1:
                raise ValueError(f"rank r={r!r}: expected a positive integer; rank 0 would train nothing")
        if self.init not in INITS:
            raise ValueError(f"init={self.init!r}: expected one of {', '.join(INITS)}")
        check_fields(self, "a positive number", "alpha")
        for alpha in self.alpha_pattern.values():
            check_value("alpha_pattern's alpha", alpha, "a positive number")
        check_fields(self, "a probability in [0, 1)", "dropout")
        regexes = [*self.rank_pattern, *self.alpha_pattern]
        if isinstance(self.targets, str):
            regexes.append(self.targets)
            if self.layers is not None:
                raise ValueError(f"layers={self.layers} with a regex as targets: the regex names the layers, drop one")
        elif not self.targets or not {name.rpartition(".")[2] for name in self.targets} <= {*TARGETS}:
            raise ValueError(f"targets={self.targets!r}: expected one or more of {', '.join(TARGETS)}")
        for regex in regexes:
            try:
                re.compile(regex)
            except re.error as error:
                raise ValueError(f"{regex!r} is no regular expression: {error}") from None
        if self.layers is not None and not all(isinstance(i, int) and i >= 0 for i in self.layers):
            raise ValueError(f"layers={self.layers!r}: expected numbers of blocks, 0 and above")

    @classmethod
    def kept(cls, fields: dict) -> "LoRAConfig":
        """From what dataclasses.asdict made of one, in a checkpoint of this or an earlier version."""
        targets = fields["targets"]
        return cls(**fields | {"targets": targets if isinstance(targets, str) else tuple(targets)})

    def adapts(self, path: str) -> bool:
        """Whether the layer at ``path`` ("layers.0.self_attn.q_proj") has an adapter."""
        name = f"model.{path}"
        if isinstance(self.targets, str):
            return re.fullmatch(self.targets, name) is not None
        if self.layers is not None and int(path.split(".")[1]) not in self.layers:
            return False
        return any(name == target or name.endswith(f".{target}") for target in self.targets)

    def rank(self, path: str) -> int:
        return _matched(self.rank_pattern, path, self.r)

    def scale(self, path: str) -> float:
        r = self.rank(path)
        return _matched(self.alpha_pattern, path, self.alpha) / (math.sqrt(r) if self.rslora else r)


def _matched(patterns: dict, path: str, default):
    """The value of the first pattern that fits the end of a layer's name."""
    fits = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", f"model.{path}"))
    return next(fits, default)


def _bitsandbytes():
    return package("bitsandbytes.functional", "base 'nf4'", otherwise="take base 'bf16'")


class NF4Linear(nn.Module):
    """A frozen Linear whose weight [out, in] is kept in NF4 and dequantised anew for each product, backward's too.

    It quantises in the dtype and on the device of ``weight``, and is not part of a state_dict: the base is loaded from
    its files. Raises ValueError without bitsandbytes, and for rows that blocks of 64 do not divide."""

    def __init__(self, weight: Tensor, double_quant: bool = True):
        super().__init__()
        if weight.ndim != 2 or weight.shape[1] % NF4_BLOCK:
            expected = f"expected [out, in] with in a multiple of {NF4_BLOCK}"
            raise ValueError(f"NF4 of a weight {tuple(weight.shape)}: {expected}; take base 'bf16'")
        self.shape, self.double_quant = tuple(weight.shape), double_quant
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

    def without(self, part: Tensor) -> "NF4Linear":
        """A layer of the weight less ``part``, quantised anew."""
        left = NF4Linear((self.dense(torch.float32) - part).to(self.quant.dtype), self.double_quant)
        left.bias = self.bias
        return left

    def forward(self, x: Tensor) -> Tensor:
        y = _LoRAProduct.apply(x, None, None, self, None, 1.0)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class _Segments:
    """Which rows of the batch are the answer's, and what backwards measured. All layers of a model share one."""

    def __init__(self, blocks: int):
        self.parts_N2: Tensor | None = None  # bool: of the prompt, of the answer
        self.squares = torch.zeros(blocks, 2)  # fp32, moved to the device by set_segments
        self.elements = [0] * blocks  # of gradient, per column of squares: known on the host

    def add(self, block: int, parts: list[Tensor]) -> None:
        """``parts``: gradients of one layer, [2, ...] each, prompt and answer."""
        norms = torch.stack([torch.linalg.vector_norm(p.flatten(1), dim=1, dtype=torch.float32) for p in parts])
        self.squares[block].add_(norms.square_().sum(0))
        self.elements[block] += sum(p[0].numel() for p in parts)


class _Casts:
    """A and B of all layers in the activations' dtype while the model's forward runs: one multi-tensor copy, where each
    product would cast its own, and again in backward. The buffers stay; a forward fills them anew."""

    def __init__(self):
        self.layers: list[LoRALinear] = []
        self.buffers: list[Tensor] = []
        self.live = False

    @torch.no_grad()
    def begin(self, dtype: torch.dtype) -> None:
        wide = [p for layer in self.layers for p in (layer.lora_A, layer.lora_B)]
        if all(p.dtype == dtype for p in wide):
            return
        if [(b.dtype, b.device) for b in self.buffers] != [(dtype, p.device) for p in wide]:
            self.buffers = [torch.empty_like(p, dtype=dtype) for p in wide]
        torch._foreach_copy_(self.buffers, wide)
        self.live = True

    def end(self) -> None:
        self.live = False

    def of(self, layer: "LoRALinear", dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """(A, B) of a layer; None outside of the model's forward, as where an activation is computed again."""
        at = 2 * layer.number
        return tuple(self.buffers[at : at + 2]) if self.live and self.buffers[at].dtype == dtype else None


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
            ctx.narrow = layer.casts.of(layer, x.dtype)
            a, b = ctx.narrow or (A.to(x.dtype), B.to(x.dtype))
            h = h @ a.t()
            y.addmm_(h, b.t(), alpha=layer.scale)
            ctx.save_for_backward(x, A, B, h, kept)
            # The rows that belong to THIS batch, whatever is set before its backward runs.
            ctx.parts = layer.segments.parts_N2
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
        a, b = ctx.narrow or (A.to(dy.dtype), B.to(dy.dtype))
        dh = (dy @ b).mul_(ctx.layer.scale)
        if kept is not None:
            mask = kept.to(dy.dtype).div_(ctx.keep_p)
            rows = rows * mask
        if dx is not None:
            dx = dx.addmm_(dh, a) if kept is None else dx.add_((dh @ a).mul_(mask))
            dx = dx.view(ctx.shape)
        if ctx.parts is None:
            dA, dB = dh.t() @ rows, dy.t() @ h
        else:  # the parts' sum is the gradient
            dA, dB = _by_part(dh, rows, ctx.parts), _by_part(h, dy, ctx.parts).mT
            ctx.layer.segments.add(ctx.layer.block, [dA, dB])
            dA, dB = dA.sum(0, dtype=A.dtype), dB.sum(0, dtype=B.dtype)
        return dx, dA.to(A.dtype), dB.to(B.dtype), None, None, None


def _by_part(narrow_NR: Tensor, wide_NC: Tensor, parts_N2: Tensor) -> Tensor:
    """narrow^T wide over the prompt's rows and over the answer's, [2, R, C]. Masked is the narrow side, twice beside
    itself, so that the wide one is read once, where it stands, by one product."""
    masked = narrow_NR[:, None] * parts_N2[:, :, None].to(narrow_NR.dtype)
    return (masked.flatten(1).t() @ wide_NC).view(2, -1, wide_NC.shape[1])


class LoRALinear(nn.Module):
    """A frozen base layer with an adapter. ``base``: any module with ``shape`` and ``dense``."""

    def __init__(
        self, base: nn.Module, r: int, scale: float, dropout: float, segments: _Segments, block: int, casts: _Casts
    ):
        super().__init__()
        self.casts, self.number = casts, len(casts.layers)
        casts.layers.append(self)
        self.base, self.shape, self.scale, self.dropout = base, base.shape, scale, dropout
        self.segments, self.block = segments, block
        self.start: tuple[Tensor, Tensor] | None = None
        n_out, n_in = base.shape
        self.lora_A = nn.Parameter(torch.zeros(r, n_in, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.zeros(n_out, r, dtype=torch.float32))

    @property
    def bias(self) -> nn.Parameter | None:
        return self.base.bias

    @torch.no_grad()
    def take_components(self) -> None:
        """PiSSA's start. ``start`` keeps it on the CPU, for an adapter that fits the base as it was. Raises ValueError
        for a rank above the matrix'."""
        r, W = len(self.lora_A), self.base.dense(torch.float32)
        if r > min(W.shape):
            raise ValueError(f"PiSSA of rank {r} from a matrix {tuple(W.shape)}: expected at most {min(W.shape)}")
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        root = (S[:r] / self.scale).sqrt()
        self.lora_A.copy_(root[:, None] * Vh[:r])
        self.lora_B.copy_(U[:, :r] * root)
        self.start = self.lora_A.detach().cpu().clone(), self.lora_B.detach().cpu().clone()
        part = self.scale * self.lora_B @ self.lora_A
        if isinstance(self.base, NF4Linear):
            self.base = self.base.without(part)
        else:
            self.base.weight.copy_(W - part)

    @torch.no_grad()
    def dense(self, dtype: torch.dtype) -> Tensor:
        """The merged weight [out, in]: base + s B A, summed in fp32."""
        base = self.base.dense(torch.float32)
        return torch.addmm(base, self.lora_B.float(), self.lora_A.float(), alpha=self.scale).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        parts, tokens = self.segments.parts_N2, x[..., 0].numel()
        if parts is not None and torch.is_grad_enabled() and tokens != len(parts):
            sizes = f"a batch of {tokens} tokens, but the answer mask has {len(parts)}"
            raise ValueError(f"{sizes}: call set_segments with this batch's mask, or with None")
        keep_p = 1 - self.dropout if self.training else 1.0
        y = _LoRAProduct.apply(x, self.lora_A, self.lora_B, self.base, self, keep_p)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def targets_of(text: str) -> str | tuple[str, ...]:
    """The ``targets`` of a LoRAConfig that a flag names: "all", names of layers with commas between, or a regex."""
    if re.search(r"[^\w,]", text):
        return text
    return TARGETS if text == "all" else tuple(text.split(","))


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
    check_plain(model)
    model.requires_grad_(False)
    model.lora, model.draws_random = config, config.dropout > 0
    segments, casts, device = _Segments(len(model.layers)), _Casts(), model.embed_tokens.weight.device
    for path, block, base in targeted(model, config):
        layer = LoRALinear(base, config.rank(path), config.scale(path), config.dropout, segments, block, casts)
        bound = 1 / math.sqrt(base.shape[1])
        layer.lora_A.uniform_(-bound, bound, generator=generator)
        layer = layer.to(device)
        if config.init == "pissa":
            layer.take_components()
        model.set_submodule(path, layer)
    model.register_forward_pre_hook(lambda model, args: casts.begin(model.dtype))
    model.register_forward_hook(lambda *_: casts.end(), always_call=True)


def check_plain(model: Decoder) -> None:
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise ValueError("the model has LoRA adapters already; load the base anew to add others")


def targeted(model: Decoder, config: LoRAConfig) -> list[tuple[str, int, nn.Module]]:
    """Path, block and layer of everything that ``config`` adapts. ValueError where that is nothing."""
    found = [
        (f"layers.{i}.{path}", i, module)
        for i, block in enumerate(model.layers)
        for path, module in block.named_modules()
        if isinstance(module, Linear | NF4Linear) and config.adapts(f"layers.{i}.{path}")
    ]
    if not found:
        where = "" if config.layers is None else f" in layers {list(config.layers)} of {len(model.layers)}"
        raise ValueError(f"targets={config.targets!r} name no layer{where}; nothing would train")
    return found


def adapted(model: Decoder) -> dict[str, LoRALinear]:
    layers = {path: module for path, module in model.named_modules() if isinstance(module, LoRALinear)}
    if not layers:
        raise ValueError("the model has no LoRA adapters; call add_lora or load_adapter first")
    return layers


def merged(model: Decoder) -> Decoder:
    """A plain model of the same function on the same device, for generation; save_decoder needs no such copy.

    Each layer is one dense matrix in the activations' dtype, adapters summed in and NF4 dequantised, on a CPU packed
    (model/packed.py). Embedding, head and norms are shared with ``model``, which is not changed."""
    with torch.device("meta"):
        plain = Decoder(model.config, model.dtype)
    for path, layer in plain.named_modules():
        source = model.get_submodule(path)
        if path.startswith("layers.") and isinstance(layer, Linear):
            layer.weight, layer.bias = nn.Parameter(source.dense(model.dtype), requires_grad=False), source.bias
        elif "weight" in layer._parameters:
            layer.weight = source.weight
    return pack(plain).train(model.training)


def block_parameters(model: Decoder) -> list[list[nn.Parameter]]:
    """The trained parameters of each transformer block, in ``segment_rms``'s order: one optimizer group a block."""
    blocks: list[list[nn.Parameter]] = [[] for _ in model.layers]
    for layer in adapted(model).values():
        blocks[layer.block] += [layer.lora_A, layer.lora_B]
    return blocks


def optimizer_groups(model: Decoder, by_block: bool, lr: float, plus: float = 1.0) -> list[dict]:
    """The trained parameters as an optimizer's groups: one, or one a block with its number as "block". With ``plus``
    other than 1 each is two, all A at ``lr`` and all B at ``plus`` times it (Hayou et al., "LoRA+", 2024)."""
    blocks = block_parameters(model)
    groups = [{"params": p, "block": i} for i, p in enumerate(blocks)] if by_block else [{"params": sum(blocks, [])}]
    if plus == 1:
        return groups
    second = {id(layer.lora_B) for layer in adapted(model).values()}
    return [
        group | {"params": [p for p in group["params"] if (id(p) in second) == is_b], "lr": lr * (plus if is_b else 1)}
        for group in groups
        for is_b in (False, True)
    ]


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
        r = lora.rank(path) if lora.adapts(path) else 0
        total += 4 * n_out * n_in + 6 * r * (n_in + n_out)
        if path.startswith("layers.0.") and path.endswith(("q_proj", "k_proj", "v_proj")):
            total -= 2 * n_out * n_in + 2 * r * n_in
    attention = 12 * config.num_hidden_layers * block * config.num_attention_heads * config.head_dim
    return total + attention + 4 * loss_share * config.vocab_size * config.hidden_size


def set_segments(model: Decoder, answer_mask: Tensor | None) -> None:
    """Says which tokens of the coming batch are the answer's: bool, one entry per token, usually [B, T]. Every other
    token, padding too, counts to the prompt. None stops measuring. Call it between a micro-batch's backward and the
    next one's forward. Raises ValueError for a mask that is not boolean."""
    first = next(iter(adapted(model).values()))
    segments, device = first.segments, first.lora_A.device
    if answer_mask is None:
        segments.parts_N2 = None
        return
    if answer_mask.dtype != torch.bool:
        raise ValueError(f"answer mask of dtype {answer_mask.dtype}: expected bool, True where a token is the answer's")
    answer_N = answer_mask.flatten().to(device, non_blocking=True)
    segments.parts_N2 = torch.stack([~answer_N, answer_N], 1)
    segments.squares = segments.squares.to(device)


def segment_rms(model: Decoder, reset: bool = True) -> Tensor:
    """RMS gradient of each block's adapters, fp32 [blocks, 2]: over the prompt's rows, and over the answer's.

    It is the root of the mean squared gradient that those rows alone contribute, over all A and B of the block and the
    backward passes since the last reset. It stays on the device and is 0 where nothing was measured."""
    segments = next(iter(adapted(model).values())).segments
    elements = torch.tensor(segments.elements, dtype=torch.float32).clamp_(min=1)
    elements = elements.to(segments.squares.device, non_blocking=True)
    rms = (segments.squares / elements[:, None]).sqrt_()
    if reset:
        segments.squares.zero_()
        segments.elements = [0] * len(segments.elements)
    return rms
