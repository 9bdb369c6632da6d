"""The tokenizer of a GGUF file as tokenizer.json, and the other way: llama.cpp's "gpt2" and "llama".

"gpt2" is a byte-level BPE whose text is cut into words first, in a way that has a name. "llama" is SentencePiece's BPE:
no list of pairs but a score for each token, of which the best that two neighbours make is joined first; blanks are
"▁", one is put in front of a text, and what is no token goes by its bytes (Kudo and Richardson, 2018).
"""

import json
import os
from collections.abc import Callable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from model.decoder import DecoderConfig
from model.weights import first_line, tokenizer_config
from schedules.textlines import parse_json

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # tokenizer.ggml.token_type
BLANK = "\u2581"

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


def read_tokenizer(value: Callable, path: str, positions: int) -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json, the chat template in it. ``value(key, default=None)`` gives an entry of
    the file ``path``, ``positions`` is the model's context. Raises ValueError for a kind that is not read."""
    kind, pre = value("tokenizer.ggml.model"), value("tokenizer.ggml.pre", "default")
    if kind != "llama" and (kind != "gpt2" or pre not in PRE):
        known = f"expected 'llama', or 'gpt2' cut as one of {', '.join(PRE)}"
        way_out = "put the weights into a folder with the model's own tokenizer.json"
        raise ValueError(f"{path}: a tokenizer {kind!r} cut as {pre!r} is not read, {known}; {way_out}")
    tokens, second = value("tokenizer.ggml.tokens"), "merges" if kind == "gpt2" else "scores"
    kinds, order = value("tokenizer.ggml.token_type") or [NORMAL] * len(tokens or ()), value(f"tokenizer.ggml.{second}")
    if not tokens or not order or len(kinds) != len(tokens) or (kind == "llama" and len(order) != len(tokens)):
        raise ValueError(f"{path} lacks the tokens, their types or the {second} of its tokenizer")
    added = [(t, k) for t, k in zip(tokens, kinds, strict=True) if k in (UNKNOWN, CONTROL, USER_DEFINED)]
    try:
        if kind == "gpt2":
            vocab = {token: i for i, token in enumerate(tokens) if kinds[i] != UNUSED}
            pairs = [tuple(pair.split(" ", 1)) for pair in order]
            backend = Tokenizer(models.BPE(vocab, pairs, ignore_merges=pre == "llama-bpe"))
            if pre == "qwen2":
                backend.normalizer = normalizers.NFC()
            backend.pre_tokenizer, backend.decoder = pre_tokenizers.Sequence(PRE[pre]()), decoders.ByteLevel()
        else:
            if odd := [t for t, k in added if k == USER_DEFINED and BLANK in t]:
                raise ValueError(f"a token of the user's with a blank, {odd[0]!r}, is not supported")
            backend = _sentencepiece(tokens, kinds, order, value("tokenizer.ggml.add_space_prefix", True))
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"{path}: its tokens and {second} make no tokenizer ({first_line(error)})") from None
    backend.add_tokens([AddedToken(t, special=k != USER_DEFINED, normalized=False) for t, k in added])
    named = {}
    for name in ("bos", "eos", "unknown", "padding"):
        i = value(f"tokenizer.ggml.{name}_token_id")
        if i is not None and 0 <= i < len(tokens):
            named[dict(unknown="unk", padding="pad").get(name, name) + "_token"] = tokens[i]
    if value("tokenizer.ggml.add_bos_token", kind == "llama") and "bos_token" in named:
        bos = named["bos_token"]
        ids = [(bos, backend.token_to_id(bos))]
        backend.post_processor = processors.TemplateProcessing(single=[bos, "$A"], special_tokens=ids)
    fields = dict(tokenizer_class="PreTrainedTokenizerFast", clean_up_tokenization_spaces=False) | named
    fields["model_max_length"] = positions
    if template := value("tokenizer.chat_template"):
        fields["chat_template"] = template
    config = json.dumps(fields, indent=2, ensure_ascii=False) + "\n"
    return {"tokenizer.json": backend.to_str().encode(), "tokenizer_config.json": config.encode()}


def _sentencepiece(tokens: list[str], kinds: list[int], scores: list[float], prefix: bool) -> Tokenizer:
    vocab = {token: i for i, token in enumerate(tokens)}
    joined = sorted((t for t, k in zip(tokens, kinds, strict=True) if k == NORMAL), key=lambda t: -scores[vocab[t]])
    pairs, unknown = _splits(joined, vocab), next((t for t, k in zip(tokens, kinds, strict=True) if k == UNKNOWN), None)
    backend = Tokenizer(models.BPE(vocab, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=BYTE in kinds))
    front = [normalizers.Prepend(BLANK)] * prefix
    backend.normalizer = normalizers.Sequence([*front, normalizers.Replace(" ", BLANK)])
    back = [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*back, *[decoders.Strip(" ", 1, 0)] * prefix])
    return backend


def _splits(joined: list[str], vocab: dict[str, int]) -> list[tuple[str, str]]:
    """All pairs of tokens that make one of ``joined``, in its order."""
    cut = ((t[:i], t[i:]) for t in joined for i in range(1, len(t)))
    return [pair for pair in cut if pair[0] in vocab and pair[1] in vocab]


def tokenizer_values(files: dict[str, bytes], config: DecoderConfig, path: str | os.PathLike) -> dict:
    """The entries that ``read_tokenizer`` reads, of the tokenizer.json among a model's ``files``. Raises ValueError,
    naming the file ``path`` that was to be written, for a tokenizer that the format has no name for."""
    if "tokenizer.json" not in files:
        raise ValueError(f"{path}: the model has no tokenizer.json, without which a GGUF file is of no use")
    content, size = parse_json(files["tokenizer.json"], f"{path}: tokenizer.json"), config.vocab_size
    vocab, more = content["model"]["vocab"], content.get("added_tokens", [])
    if content["model"]["type"] != "BPE":
        raise ValueError(f"{path}: a tokenizer of type {content['model']['type']} is not written as GGUF, BPE alone")
    if (held := max([*vocab.values(), *(added["id"] for added in more)]) + 1) > size:
        raise ValueError(f"{path}: the tokenizer has {held} tokens, the model only {size}; take the model's own")
    tokens, kinds = [f"[PAD{i}]" for i in range(size)], [UNUSED] * size
    for token, i in vocab.items():
        tokens[i], kinds[i] = token, NORMAL
    for added in more:
        tokens[added["id"]], kinds[added["id"]] = added["content"], CONTROL if added["special"] else USER_DEFINED
    pairs = [tuple(pair.split(" ", 1)) if isinstance(pair, str) else tuple(pair) for pair in content["model"]["merges"]]
    if content["model"].get("byte_fallback"):
        values = _of_sentencepiece(content, tokens, kinds, pairs, path)
    else:
        values = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": _way_of_cutting(content, path)}
        values["tokenizer.ggml.merges"] = [" ".join(pair) for pair in pairs]
    values |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}
    first = Tokenizer.from_buffer(files["tokenizer.json"]).encode("a").ids[:1]
    values["tokenizer.ggml.add_bos_token"] = first == [config.bos_token_id]
    template = tokenizer_config(files, path)["chat_template"]
    return values | ({"tokenizer.chat_template": template} if template else {})


def _way_of_cutting(content: dict, path: str | os.PathLike) -> str:
    cut, known = _cut(content.get("pre_tokenizer")), Tokenizer(models.BPE())
    for pre, parts in PRE.items():
        known.pre_tokenizer = pre_tokenizers.Sequence(parts())
        if pre != "default" and _cut(json.loads(known.to_str())["pre_tokenizer"]) == cut:
            return pre
    ways = ", ".join(name for name in PRE if name != "default")
    raise ValueError(f"{path}: the tokenizer cuts text in none of the ways that are written as GGUF: {ways}")


def _cut(pre_tokenizer: dict | None) -> list[dict]:
    """What of a tokenizer.json decides where text is cut."""
    parts = pre_tokenizer.get("pretokenizers", [pre_tokenizer]) if pre_tokenizer else []
    return [{k: v for k, v in part.items() if k not in ("trim_offsets", "invert")} for part in parts]


def _of_sentencepiece(content: dict, tokens: list[str], kinds: list[int], pairs: list, path) -> dict:
    """The entries of a BPE by scores; the types of bytes and of the unknown token are put into ``kinds``."""
    vocab, unknown = content["model"]["vocab"], content["model"].get("unk_token")
    for i in range(256):
        if (byte := vocab.get(f"<0x{i:02X}>")) is not None:
            kinds[byte] = BYTE
    if unknown in vocab:
        kinds[vocab[unknown]] = UNKNOWN
    ranks = {}
    for pair in pairs:
        ranks.setdefault("".join(pair), len(ranks))
    if len(pairs) != len(_splits([t for t in ranks if kinds[vocab[t]] == NORMAL], vocab)):
        raise ValueError(f"{path}: the tokenizer has bytes to fall back to, and not all pairs that SentencePiece has")
    scores = [-float(ranks.get(t, len(ranks) + i)) for i, t in enumerate(tokens)]
    prefix = _prefix(content)
    if prefix is None:
        raise ValueError(f"{path}: the tokenizer changes text in another way than SentencePiece's BPE of a GGUF file")
    return {"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": scores, "tokenizer.ggml.add_space_prefix": prefix}


def _prefix(content: dict) -> bool | None:
    """Whether a blank is put in front; None where something else happens to a text. tokenizers' Metaspace puts none in
    front of a text that begins with one, SentencePiece and llama.cpp do."""
    normalizer, cut = content.get("normalizer"), content.get("pre_tokenizer")
    parts = (normalizer or {}).get("normalizers", [normalizer]) if normalizer else []
    blanks = {"type": "Replace", "pattern": {"String": " "}, "content": BLANK}
    if cut is None and parts == [{"type": "Prepend", "prepend": BLANK}, blanks]:
        return True
    if cut is None and parts == [blanks]:
        return False
    if not parts and cut and cut.get("type") == "Metaspace" and cut["replacement"] == BLANK and not cut["split"]:
        return cut["prepend_scheme"] != "never"
    return None
