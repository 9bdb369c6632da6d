"""GGUF files read: llama.cpp's format of one file for weights, config, tokenizer and chat template.

The package gguf reads the file and turns quantised blocks into numbers. Here stand the names of Hugging Face's layout,
the order of rows, and the tokenizer. A file is checked before its first tensor is read.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from model.decoder import DecoderConfig
from model.weights import first_line

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
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # tokenizer.ggml.token_type

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|"
_WORDS += r"\s*[\r\n]+|\s+(?!\S)|\s+"


def _split(digits: str):
    """Words, then numbers of so many digits, then what is neither."""
    split = pre_tokenizers.Split(Regex(_WORDS.format(digits)), "isolated")
    return [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]


# tokenizer.ggml.pre: how text is cut before pairs are joined.
PRE = {
    "default": lambda: [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "gpt-2": lambda: [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm": lambda: [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "qwen2": lambda: _split(""),
    "llama-bpe": lambda: _split("{1,3}"),
}


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
        self.held = {t.name: t for t in self.reader.tensors}
        if "token_embd.weight" not in self.held:
            raise ValueError(f"{self.path} holds no token_embd.weight")
        self.config = self._config()
        self.shapes = {_name(n): tuple(map(int, t.shape[::-1])) for n, t in self.held.items() if n != ROPE_FACTORS}

    def value(self, key: str, default=None):
        field = self.reader.get_field(key)
        return default if field is None else field.contents()

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
        kind = self.of_model("rope.scaling.type", "none")
        if ROPE_FACTORS in self.held:
            return self._llama3(theta, K)
        if kind == "none":
            return None
        rope = dict(rope_type=kind, factor=self.of_model("rope.scaling.factor"))
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
        kind, pre = self.value("tokenizer.ggml.model"), self.value("tokenizer.ggml.pre", "default")
        if kind != "gpt2" or pre not in PRE:
            known = f"expected 'gpt2' cut as one of {', '.join(PRE)}"
            way_out = "put the weights into a folder with the model's own tokenizer.json"
            raise ValueError(f"{self.path}: a tokenizer {kind!r} cut as {pre!r} is not read, {known}; {way_out}")
        tokens, merges = self.value("tokenizer.ggml.tokens"), self.value("tokenizer.ggml.merges")
        kinds = self.value("tokenizer.ggml.token_type") or [1] * len(tokens or ())
        if not tokens or not merges or len(kinds) != len(tokens):
            raise ValueError(f"{self.path} lacks the tokens, their types or the merges of its tokenizer")
        vocab = {token: i for i, token in enumerate(tokens) if kinds[i] != UNUSED}
        pairs = [tuple(pair.split(" ", 1)) for pair in merges]
        try:
            backend = Tokenizer(models.BPE(vocab, pairs, ignore_merges=pre == "llama-bpe"))
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"{self.path}: its tokens and merges make no tokenizer ({first_line(error)})") from None
        if pre == "qwen2":
            backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.Sequence(PRE[pre]()), decoders.ByteLevel()
        added = [(t, k == CONTROL) for t, k in zip(tokens, kinds, strict=True) if k in (CONTROL, USER_DEFINED)]
        backend.add_tokens([AddedToken(t, special=special, normalized=False) for t, special in added])
        named = {}
        for name in ("bos", "eos", "unknown", "padding"):
            i = self.value(f"tokenizer.ggml.{name}_token_id")
            if i is not None and 0 <= i < len(tokens):
                named[dict(unknown="unk", padding="pad").get(name, name) + "_token"] = tokens[i]
        if self.value("tokenizer.ggml.add_bos_token", False) and "bos_token" in named:
            bos = named["bos_token"]
            ids = [(bos, backend.token_to_id(bos))]
            backend.post_processor = processors.TemplateProcessing(single=[bos, "$A"], special_tokens=ids)
        fields = dict(tokenizer_class="PreTrainedTokenizerFast", clean_up_tokenization_spaces=False) | named
        fields["model_max_length"] = self.config.max_position_embeddings
        if template := self.value("tokenizer.chat_template"):
            fields["chat_template"] = template
        config = json.dumps(fields, indent=2, ensure_ascii=False) + "\n"
        return {"tokenizer.json": backend.to_str().encode(), "tokenizer_config.json": config.encode()}


def _name(name: str) -> str:
    """Hugging Face's name of a tensor; of one that is not known, its own."""
    found = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if not found or found[2] not in NAMES:
        return name
    block = "" if found[1] is None else f"model.layers.{found[1]}."
    return f"{block}{NAMES[found[2]]}.{found[3]}"


def unpair(rows: Tensor, heads: int) -> Tensor:
    """The rows of queries or keys from llama.cpp's order, where a pair that turns together stands side by side, to
    Hugging Face's, where component i turns with i + K/2."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()


class _Refused(ValueError):
    pass


def _open(path: Path):
    """gguf's reader of the file; its errors, and a quantisation that is not read, as one line."""
    try:
        import gguf
    except ImportError as error:
        raise ValueError(f"{path} needs the package gguf ({first_line(error)}); pip install gguf") from None
    types = {int(gguf.GGMLQuantizationType[name]) for name in QUANTISATIONS}

    class Reader(gguf.GGUFReader):
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
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError, OSError) as error:
        raise ValueError(f"{path} is no GGUF file, damaged or cut short ({first_line(error)})") from error
