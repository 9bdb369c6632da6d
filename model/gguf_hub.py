"""GGUF files read and written: llama.cpp's format of one file for weights, config, tokenizer and chat template.

The package gguf reads the file and turns quantised blocks into numbers. Here stand the names of Hugging Face's layout
and the order of rows; the tokenizer is in `model.gguf_tokenizer`. A file is checked before its first tensor is read;
one that is written appears whole or not at all.
"""

import dataclasses
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model.decoder import DecoderConfig, frequencies
from model.gguf_tokenizer import read_tokenizer, tokenizer_values
from model.weights import first_line
from schedules.commandline import package

ARCHITECTURES = ("llama", "qwen2", "qwen3")  # a Mistral is written as a llama
QUANTISATIONS = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q6_K")
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FACTORS = "rope_freqs.weight"  # what llama3's rope_scaling divides each frequency by
# Keys of an architecture that change the function and are not built; 0 is none.
REFUSED = ("expert_count", "attention.sliding_window", "attention.clamp_kqv", "attention.max_alibi_bias", "logit_scale")
REFUSED += tuple(f"rope.scaling.yarn_{name}" for name in ("ext_factor", "attn_factor", "beta_fast", "beta_slow"))
REFUSED += ("rope.scaling.yarn_log_multiplier",)
WRITTEN = ("F16", "Q8_0")  # what matrices are written as; vectors stay in F32


def is_gguf(name: str | os.PathLike) -> bool:
    return str(name).endswith(".gguf") and Path(name).is_file()


class GGUF:
    """An open file. ``config``, ``shapes`` (Hugging Face's name -> shape), ``tensors``, ``tokenizer_files``.

    Raises ValueError, one line, for a file that is damaged or cut short, for another architecture, for a quantisation
    that is not read, and for what the decoder does not do."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.reader = _open(self.path)
        self.architecture = self.value("general.architecture")
        if self.architecture not in ARCHITECTURES:
            expected = f"expected one of {', '.join(ARCHITECTURES)}"
            raise ValueError(f"{self.path}: architecture {self.architecture!r}; {expected}")
        if (self.value("split.count", 0) or 0) > 1:
            raise ValueError(f"{self.path} is one of {self.value('split.count')} parts; merge them to one file first")
        for key in REFUSED:
            if found := self.of_model(key, 0):
                raise ValueError(f"{self.path}: {self.architecture}.{key}={found} is not supported")
        if not self.of_model("attention.causal", True):
            raise ValueError(f"{self.path}: {self.architecture}.attention.causal=False is not supported")
        self.held = {t.name: t for t in self.reader.tensors}
        if "token_embd.weight" not in self.held:
            raise ValueError(f"{self.path} holds no token_embd.weight")
        if len(shape := self.held["token_embd.weight"].shape) != 2:
            raise ValueError(f"{self.path}: token_embd.weight has {len(shape)} dimensions, expected 2")
        self.config = self._config()
        self.shapes = {_name(n): tuple(map(int, t.shape[::-1])) for n, t in self.held.items() if n != ROPE_FACTORS}

    def value(self, key: str, default=None):
        field = self.reader.get_field(key)
        try:
            return default if field is None else field.contents()
        except (UnicodeDecodeError, IndexError) as error:
            raise ValueError(f"{self.path}: {key} is damaged ({first_line(error)})") from None

    def of_model(self, key: str, *default):
        """A value of the architecture. A number of 32 bits is the shortest decimal that it may have been."""
        value = self.value(f"{self.architecture}.{key}", *default)
        if value is None and not default:
            raise ValueError(f"{self.path} does not say {self.architecture}.{key}")
        if isinstance(value, list):
            raise ValueError(f"{self.path}: {self.architecture}.{key} differs by layer, which is not supported")
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def _config(self) -> DecoderConfig:
        D, heads = self.of_model("embedding_length"), self.of_model("attention.head_count")
        K = self.of_model("attention.key_length", D // heads)
        for key in ("attention.value_length", "rope.dimension_count"):
            if (other := self.of_model(key, K)) != K:
                raise ValueError(f"{self.path}: {self.architecture}.{key}={other}; expected {K}, the width of a head")
        theta = self.of_model("rope.freq_base", 10000.0)
        try:
            return DecoderConfig(
                vocab_size=int(self.held["token_embd.weight"].shape[-1]),
                hidden_size=D,
                intermediate_size=self.of_model("feed_forward_length"),
                num_hidden_layers=self.of_model("block_count"),
                num_attention_heads=heads,
                num_key_value_heads=self.of_model("attention.head_count_kv", heads),
                head_dim=K,
                max_position_embeddings=self.of_model("context_length"),
                rms_norm_eps=self.of_model("attention.layer_norm_rms_epsilon"),
                rope_theta=theta,
                tie_word_embeddings="output.weight" not in self.held,
                bos_token_id=self.value("tokenizer.ggml.bos_token_id"),
                eos_token_id=self.value("tokenizer.ggml.eos_token_id"),
                model_type=self.architecture,
                attention_bias=self.architecture != "qwen2" and "blk.0.attn_q.bias" in self.held,
                mlp_bias="blk.0.ffn_up.bias" in self.held,
                rope_scaling=self._rope(theta, K),
            )
        except ValueError as error:
            says = str(error)
            raise ValueError(says if says.startswith(str(self.path)) else f"{self.path}: {says}") from None

    def _rope(self, theta: float, K: int) -> dict | None:
        # As llama.cpp: a factor, under its old name too, without a type is linear.
        factor = self.of_model("rope.scaling.factor", 0) or self.of_model("rope.scale_linear", 0)
        kind = self.of_model("rope.scaling.type", "linear" if factor else "none")
        if ROPE_FACTORS in self.held:
            return self._llama3(theta, K)
        if kind == "none":
            return None
        rope = dict(rope_type=kind, factor=factor)
        if kind == "yarn":
            rope["original_max_position_embeddings"] = self.of_model("rope.scaling.original_context_length")
            if (sharper := self.of_model("rope.scaling.attn_factor", 1.0)) != 1:
                rope["attention_factor"] = sharper * (0.1 * np.log(rope["factor"]).item() + 1)
        return rope

    def _llama3(self, theta: float, K: int) -> dict:
        """The rope_scaling of which only its factors are kept. All published Llama 3.1 to 3.3 have these other numbers;
        a file whose factors do not follow from them is refused."""
        factors = self._dense(self.held[ROPE_FACTORS]).double()
        rope = dict(rope_type="llama3", factor=float(factors.max()), low_freq_factor=1.0, high_freq_factor=4.0)
        rope["original_max_position_embeddings"] = old = 8192
        turns = old * theta ** (-torch.arange(0, K, 2).double() / K) / (2 * torch.pi)
        kept = ((turns - 1) / 3).clamp(0, 1)
        if factors.shape != turns.shape or not torch.allclose(1 / (kept + (1 - kept) / rope["factor"]), factors, 1e-4):
            raise ValueError(f"{self.path}: {ROPE_FACTORS} holds other factors than Llama 3's, which are not supported")
        return rope

    @staticmethod
    def _dense(tensor) -> Tensor:
        from gguf import dequantize

        # A copy: a tensor that is not quantised is a view of the file.
        return torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Hugging Face's name and the values in fp32, one after another."""
        for name, tensor in self.held.items():
            if name == ROPE_FACTORS:
                continue
            values, renamed = self._dense(tensor), _name(name)
            turned = re.search(r"self_attn\.([qk])_proj\.", renamed)
            if turned and self.architecture == "llama":
                heads = self.config.num_attention_heads if turned[1] == "q" else self.config.num_key_value_heads
                values = unpair(values, heads)
            yield renamed, values

    def tokenizer_files(self) -> dict[str, bytes]:
        """tokenizer.json and tokenizer_config.json, the chat template in it. ValueError for a kind that is not read."""
        return read_tokenizer(self.value, str(self.path), self.config.max_position_embeddings)


def _name(name: str) -> str:
    """Hugging Face's name of a tensor; of one that is not known, its own."""
    found = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if not found or found[2] not in NAMES:
        return name
    block = "" if found[1] is None else f"model.layers.{found[1]}."
    return f"{block}{NAMES[found[2]]}.{found[3]}"


def pair(rows: Tensor, heads: int) -> Tensor:
    """``unpair``'s inverse."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()


def unpair(rows: Tensor, heads: int) -> Tensor:
    """The rows of queries or keys from llama.cpp's order, where a pair that turns together stands side by side, to
    Hugging Face's, where component i turns with i + K/2."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()


class _Refused(ValueError):
    pass


def _package(path: Path):
    return package("gguf", str(path))


def _open(path: Path):
    """gguf's reader of the file; its errors, and a quantisation that is not read, as one line."""
    gguf = _package(path)
    types = {int(gguf.GGMLQuantizationType[name]) for name in QUANTISATIONS}

    class Reader(gguf.GGUFReader):
        def _get(self, offset, dtype, count=1, override_order=None):
            # Behind the end it gives fewer numbers than asked for, and a list of 2^40 of them never ends.
            if offset + int(count) * np.dtype(dtype).itemsize > len(self.data):
                raise ValueError(f"{int(count):,} numbers at byte {offset:,} lie behind its end")
            return super()._get(offset, dtype, count, override_order)

        def _build_tensors(self, start_offs, fields):
            for field in fields:
                if (kind := int(field.parts[4][0])) not in types:
                    known = {int(t): t.name for t in gguf.GGMLQuantizationType}
                    name, expected = known.get(kind, f"number {kind}"), f"expected one of {', '.join(QUANTISATIONS)}"
                    raise _Refused(f"{path}: {field.name} is quantised as {name}; {expected}")
            super()._build_tensors(start_offs, fields)

    try:
        return Reader(path)
    except _Refused:
        raise
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError, RecursionError, OSError) as error:
        raise ValueError(f"{path} is no GGUF file, damaged or cut short ({first_line(error)})") from error


def save_gguf(
    path: str | os.PathLike,
    config: DecoderConfig,
    tensors: Iterable[tuple[str, Tensor]],
    tokenizer_files: dict[str, bytes],
    kind: str = "F16",
    name: str = "",
) -> None:
    """Writes one file: ``tensors`` under Hugging Face's names, matrices as ``kind``, one of WRITTEN, or as F16 where
    blocks of 32 do not divide a row; and the tokenizer of ``tokenizer_files``. All of it is held in memory. Raises
    ValueError, before anything is written, for a model or a tokenizer that the format has no name for, and without the
    package gguf."""
    path, family = Path(path), "llama" if config.model_type == "mistral" else config.model_type
    if family not in ARCHITECTURES:
        raise ValueError(f"{path}: a {family} is not written as GGUF; expected one of {', '.join(ARCHITECTURES)}")
    if kind not in WRITTEN:
        raise ValueError(f"quantisation {kind!r}: expected one of {', '.join(WRITTEN)}")
    gguf = _package(path)
    tokens = tokenizer_values(tokenizer_files, config, path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        writer = gguf.GGUFWriter(temporary, family)
        for key, value in (_keys(config, family, name) | tokens).items():
            add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
            (writer.add_array if isinstance(value, list) else add[type(value)])(key, value)
        if config.rope_scaling is not None and config.rope_scaling["rope_type"] == "llama3":
            plain = dataclasses.replace(config, rope_scaling=None)
            stretched, unstretched = (frequencies(c, torch.device("cpu"))[0] for c in (config, plain))
            writer.add_tensor(ROPE_FACTORS, (unstretched / stretched).numpy())
        inverse = {ours: theirs for theirs, ours in NAMES.items()}
        for full, values in tensors:
            layer, attribute = full.rsplit(".", 1)
            block = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", layer)
            written = f"{f'blk.{block[1]}.' if block else ''}{inverse[block[2] if block else layer]}.{attribute}"
            values = values.detach().float().cpu()
            if (turned := re.search(r"self_attn\.([qk])_proj$", layer)) and family == "llama":
                values = pair(values, config.num_attention_heads if turned[1] == "q" else config.num_key_value_heads)
            if values.ndim == 1:
                writer.add_tensor(written, values.contiguous().numpy())
                continue
            blocks = kind == "F16" or values.shape[1] % 32 == 0
            as_type = gguf.GGMLQuantizationType[kind if blocks else "F16"]
            data = gguf.quantize(values.contiguous().numpy(), as_type)
            if as_type.name == "F16" and not np.isfinite(data).all():
                raise ValueError(f"{path}: {full} has values beyond F16's largest, 65504; take Q8_0")
            writer.add_tensor(written, data, raw_dtype=as_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _keys(config: DecoderConfig, family: str, name: str) -> dict:
    """The file's values of a model, in the order to write."""
    c, rope = config, config.rope_scaling or {}
    values = dict(context_length=c.max_position_embeddings, embedding_length=c.hidden_size, vocab_size=c.vocab_size)
    values |= {"block_count": c.num_hidden_layers, "feed_forward_length": c.intermediate_size}
    values |= {"attention.head_count": c.num_attention_heads, "attention.head_count_kv": c.num_key_value_heads}
    values |= {"attention.key_length": c.head_dim, "attention.value_length": c.head_dim}
    values |= {"attention.layer_norm_rms_epsilon": float(c.rms_norm_eps), "rope.freq_base": float(c.rope_theta)}
    values["rope.dimension_count"] = c.head_dim
    if rope.get("rope_type") in ("linear", "yarn"):
        values |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": float(rope["factor"])}
        if more := sorted(set(rope) - {"rope_type", "factor", "original_max_position_embeddings"}):
            raise ValueError(f"rope_scaling holds {', '.join(more)}, which is not written as GGUF")
    if "original_max_position_embeddings" in rope and rope["rope_type"] == "yarn":
        values["rope.scaling.original_context_length"] = int(rope["original_max_position_embeddings"])
    eos = c.eos_token_id[0] if isinstance(c.eos_token_id, list) else c.eos_token_id
    ids = {"tokenizer.ggml.bos_token_id": c.bos_token_id, "tokenizer.ggml.eos_token_id": eos}
    named = {"general.name": name} if name else {}
    return named | {f"{family}.{k}": v for k, v in values.items()} | {k: v for k, v in ids.items() if v is not None}
