"""Tokenizers by a spec string: ``gpt2``, ``bpe:N`` (trained on the corpus), or a folder.

tiktoken does the work of GPT-2's kind (vocab.json and merges.txt), ``tokenizers`` that of a tokenizer.json, which is
loaded here alone, by `Definition`. A literal <|endoftext|> in a text is encoded as its characters, never as the token
that ends a document.
"""

import hashlib
import itertools
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tiktoken
import tiktoken.load
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from data.files import lm_data, write_cached
from model.weights import first_line
from schedules.textlines import BOM, decoded, one_line, parse_json, read_bytes

EOS = "<|endoftext|>"
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", TOKENIZER_CONFIG)
# GPT-2's files as OpenAI publishes them, which are also the ones tiktoken pins: name, address, SHA-256.
_GPT2 = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
GPT2_FILES = (
    ("vocab.json", _GPT2 + "encoder.json", "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"),
    ("merges.txt", _GPT2 + "vocab.bpe", "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"),
)
# GPT-2's pre-tokenisation. Possessive where backtracking cannot help: less stack on long runs of one kind.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
# After a newline and before a space, each between two visible characters, GPT-2's pattern always ends a match: a long
# document cut there has the same tokens, in less memory and in parallel. Where there is neither it is cut by position.
_CUTS = re.compile(r"\S\n(?=\S)"), re.compile(r"\S(?= \S)")
PIECE_CHARACTERS = 1 << 18
BATCH_CHARACTERS = 1 << 22
LONGEST = 1 << 24  # characters that a tokenizer of another pattern gets at once
# Added tokens that are no special ones and yet control a model: <think>, <tool_call>, [INST].
CONTROL = re.compile(r"<[^\s<>]+>|\[/?[A-Z_]+\]")
# A text with each byte that UTF-8 has; Unicode's normal form NFC, which tokenizers may make, leaves it as it is.
_LEADS = [(b & 31) << 6 | 16 for b in range(0xC4, 0xE0)] + [max(0x800, (b & 15) << 12 | 16) for b in range(0xE0, 0xF0)]
_LEADS += [max(0x10000, (b & 7) << 18 | 16) for b in range(0xF0, 0xF5)]
EVERY_BYTE = "".join(map(chr, range(256))) + " " + " ".join(map(chr, _LEADS))

log = logging.getLogger("scorecast")


@dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back."""

    name: str  # the spec's, for file names and run logs
    vocab_size: int  # highest id + 1
    eos_id: int  # ends a document
    hash: str  # SHA-256 hex of the defining files and eos_id: equal hash, equal tokens
    _files: dict[str, bytes] = field(repr=False)
    _encode: Callable[[list[str]], list] = field(repr=False)
    _decode: Callable[[list[int]], str] = field(repr=False)
    _can_cut: bool = field(repr=False)
    unknown_id: int | None = None  # stands for what has no token
    whole: bool = True  # whether every text comes back from its tokens

    @classmethod
    def from_files(cls, files: dict[str, bytes], name: str = "") -> "Tokenizer":
        """The tokenizer that ``files`` define: tokenizer.json, or else vocab.json and merges.txt. A document ends with
        tokenizer_config.json's eos_token, else <|endoftext|>. Raises ValueError where the files do not fit."""
        label = f"tokenizer {name}" if name else "tokenizer"
        config = _json(files.get(TOKENIZER_CONFIG, b"{}"), f"{label}: {TOKENIZER_CONFIG}")
        eos = config.get("eos_token") or EOS
        eos = eos["content"] if isinstance(eos, dict) else eos
        if "tokenizer.json" in files:
            kind, defining, through = "PreTrainedTokenizerFast", ["tokenizer.json"], _through_tokenizers
        elif {"vocab.json", "merges.txt"} <= set(files):
            kind = config.get("tokenizer_class", "GPT2Tokenizer")
            if kind not in ("GPT2Tokenizer", "GPT2TokenizerFast"):
                more = f"a {kind} is more than its vocab.json and merges.txt"
                raise ValueError(f"{label}: {more}; put its tokenizer.json beside them")
            defining, through = ["merges.txt", "vocab.json"], _through_tiktoken
            if not name and all(hashlib.sha256(files[part]).hexdigest() == sha for part, _, sha in GPT2_FILES):
                name = "gpt2"
        else:
            found = ", ".join(sorted(files)) or "nothing"
            raise ValueError(f"{label}: expected tokenizer.json, or vocab.json and merges.txt; found {found}")
        vocab_size, eos_id, *calls = through(files, eos, label)  # the fields from _encode on
        digest = hashlib.sha256(eos_id.to_bytes(4, "little"))
        for part in defining:
            digest.update(part.encode() + len(files[part]).to_bytes(8, "little") + files[part])
        # What AutoTokenizer needs on top, kept where it was given. Decoding must not tidy spaces away.
        plain = {"tokenizer_class": kind, "eos_token": eos, "bos_token": eos, "unk_token": eos}
        plain = json.dumps(plain | {"clean_up_tokenization_spaces": False}, indent=2).encode()
        kept = {part: files[part] for part in defining} | {TOKENIZER_CONFIG: files.get(TOKENIZER_CONFIG, plain)}
        return cls(name or "tokenizer", vocab_size, eos_id, digest.hexdigest(), kept, *calls)

    def files(self) -> dict[str, bytes]:
        """File name -> content: what ``from_files`` and transformers' AutoTokenizer load."""
        return dict(self._files)

    def encode(self, text: str) -> list[int]:
        """The ids of one text, without an end-of-text token."""
        return np.concatenate([np.zeros(0, np.uint32), *self.encode_documents([text])]).tolist()

    def encode_documents(self, documents: Iterable[str]) -> Iterator[np.ndarray]:
        """The ids of each document, uint32 [n], without end-of-text tokens, in order; reads some 4 MB ahead."""
        waiting: list[np.ndarray] = []  # ids of the document that is not complete yet
        for batch in _batches(documents, self._can_cut):
            for ids, (_, ends) in zip(self._encode([text for text, _ in batch]), batch, strict=True):
                waiting.append(np.asarray(ids, dtype=np.uint32))
                if ends:
                    yield np.concatenate(waiting)
                    waiting.clear()

    def lost(self, text: str, ids: np.ndarray) -> tuple[int, int]:
        """(unknown tokens among the ``ids`` of ``text``, characters of it that are in no token), white space aside."""
        return (0, 0) if self.whole else _lost(text, ids, self.unknown_id, self._decode)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``; bytes that are not UTF-8 become U+FFFD. Raises ValueError for an id out of range."""
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"token {i} is outside the {self.vocab_size} tokens of {self.name}")
        return self._decode(ids)


def load_tokenizer(
    spec: str | Tokenizer, *, documents: Callable[[], Iterable[str]] | None = None, cache=None, corpus: str = ""
) -> Tokenizer:
    """The tokenizer of ``spec``: ``gpt2``, ``bpe:N``, or a folder with tokenizer.json or vocab.json + merges.txt.

    ``gpt2`` is in $LM_DATA/tokenizers/gpt2, else tiktoken loads it; other files than the published ones are an error.
    ``bpe:N`` needs ``documents`` (the TRAIN split's), the folder ``cache``, where it is kept, and ``corpus`` (a name
    that changes with the text). Raises ValueError, one line, where there is no such tokenizer."""
    if isinstance(spec, Tokenizer):
        return spec
    if spec == "gpt2":
        return Tokenizer.from_files(_gpt2_files(), "gpt2")
    if match := re.fullmatch(r"bpe:(\d+)", spec):
        size = int(match[1])
        if size < 257:
            raise ValueError(f"tokenizer bpe:{size}: the 256 bytes and {EOS} need at least bpe:257")
        if documents is None:
            raise ValueError(f"tokenizer {spec} is trained on a corpus' train split, and there is none here")
        return _cached_bpe(size, documents, Path(cache) / f"bpe{size}-{corpus}.json")
    folder = Path(spec).expanduser()
    if folder.is_dir():
        return Tokenizer.from_files(read_files(folder), folder.name)
    expected = "gpt2, bpe:N (for example bpe:4096), or a folder with tokenizer.json or vocab.json and merges.txt"
    raise ValueError(f"unknown tokenizer {spec!r}; expected {expected}")


def read_files(folder: Path) -> dict[str, bytes]:
    """The files of a tokenizer that are in ``folder``, name -> content."""
    return {name: read_bytes(folder / name) for name in TOKENIZER_FILES if (folder / name).is_file()}


def merges_of(merges_txt: bytes) -> list[tuple[str, ...]]:
    """The pairs that merges.txt joins, in order."""
    lines = decoded(merges_txt, "merges.txt").replace("\r\n", "\n").split("\n")
    return [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]


def byte_level(**model) -> Backend:
    """A BPE over bytes, within GPT-2's pre-tokenisation; ``model`` as tokenizers.models.BPE takes it."""
    backend = Backend(models.BPE(**model))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def byte_level_bpe(documents: Iterable[str], size: int, special: tuple[str, ...]) -> Backend:
    """A byte-level BPE of at most ``size`` tokens: ``special``, the bytes, then merges by their frequency."""
    backend, alphabet = byte_level(), pre_tokenizers.ByteLevel.alphabet()
    how = dict(vocab_size=size, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(documents, trainers.BpeTrainer(**how))
    return backend


def train_bpe(documents: Iterable[str], size: int) -> bytes:
    """tokenizer.json of ``byte_level_bpe`` whose token 0 is <|endoftext|>; where the text has too few pairs, that is
    logged."""
    backend = byte_level_bpe(documents, size, (EOS,))
    if backend.get_vocab_size() < size:
        log.warning("the text is small: bpe:%d has only %d tokens", size, backend.get_vocab_size())
    return backend.to_str().encode()


def _cached_bpe(size: int, documents: Callable[[], Iterable[str]], path: Path) -> Tokenizer:
    name = f"bpe:{size}"
    if not path.exists():
        log.info("training %s into %s", name, path)
        definition = train_bpe(documents(), size)
        write_cached(path, lambda file: file.write(definition))
    try:
        return Tokenizer.from_files({"tokenizer.json": read_bytes(path)}, name)
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({one_line(error)}); delete the file and it will be made again") from None


def _gpt2_files() -> dict[str, bytes]:
    local = lm_data("tokenizers/gpt2")
    files = {}
    for name, url, sha in GPT2_FILES:
        if local:
            files[name] = read_bytes(local / name)
            if hashlib.sha256(files[name]).hexdigest() != sha:
                raise ValueError(f"{local / name} is not GPT-2's; to use another vocabulary, name its folder instead")
            continue
        try:
            files[name] = tiktoken.load.read_file_cached(url, sha)
        except Exception as error:  # requests' errors, a failed checksum
            reason = f"{type(error).__name__}: {first_line(error)[:100]}"
            raise ValueError(
                f"tokenizer gpt2 cannot be downloaded ({reason}); without a network give --tokenizer a folder with "
                "GPT-2's vocab.json and merges.txt, or put them in $LM_DATA/tokenizers/gpt2"
            ) from error
    return files


def _through_tiktoken(files: dict[str, bytes], eos: str, label: str) -> tuple:
    """(vocab_size, eos_id, encode, decode, can_cut) of vocab.json and merges.txt."""
    vocab = _json(files["vocab.json"], f"{label}: vocab.json")
    try:
        byte_of = {c: b for b, c in enumerate(_byte_characters())}
        ranks = {bytes([b]): vocab[c] for c, b in byte_of.items()}
        merged = [(vocab[left + right], left + right) for left, right in merges_of(files["merges.txt"])]
        ranks |= {bytes(byte_of[c] for c in word): rank for rank, word in merged}
        # tiktoken joins the pair of the lowest ID first: right only where ids grow in the order of the merges.
        ordered = all(a[0] < b[0] for a, b in itertools.pairwise(merged))
        if not ordered or len(ranks) != len(vocab) - 1 or eos not in vocab:
            raise KeyError("order of the ids")
    except (KeyError, TypeError, ValueError) as error:
        wrong = f"vocab.json and merges.txt are not a GPT-2 style byte-level BPE with {eos} ({one_line(error)})"
        raise ValueError(f"{label}: {wrong}; give its tokenizer.json") from None
    special = {eos: vocab[eos]}
    encoding = tiktoken.Encoding("scorecast", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special)

    def encode(texts: list[str]) -> list[np.ndarray]:
        try:
            with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
                return list(pool.map(lambda text: encoding.encode_to_numpy(text, disallowed_special=()), texts))
        except ValueError as error:  # hundreds of thousands of blanks in a row exhaust the regex engine
            raise ValueError(f"{label}: cannot tokenise ({one_line(error)}); is there a huge run of blanks?") from None

    return max(vocab.values()) + 1, vocab[eos], encode, encoding.decode, True


def _byte_characters() -> list[str]:
    """GPT-2's printable stand-in for each byte: itself where Latin-1 prints it, else the next from U+0100 on."""
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


class Definition:
    """A tokenizer.json, called ``label`` in errors, for texts that people wrote.

    What another program's last call left in it, truncation and padding, is taken off. ``control`` are the added tokens
    that steer a model, token -> id: the special ones and those that look it, such as <think>. In a text they are
    characters like any others. Raises ValueError, one line, for what the library does not load."""

    def __init__(self, raw: bytes, label: str):
        self.label = label
        self.parsed = _json(raw, f"{label}: tokenizer.json")
        with self._one_line("cannot be loaded"):
            self.backend = Backend.from_buffer(raw.removeprefix(BOM))
            self.backend.no_padding()
            self.backend.no_truncation()
            self.backend.encode_special_tokens = True
            added = self.backend.get_added_tokens_decoder()
            self.added = {token.content: i for i, token in added.items()}
            self.special = {i for i, token in added.items() if token.special}
            steer = {i: t.content for i, t in added.items() if t.special or CONTROL.fullmatch(t.content)}
            more = [AddedToken(token, normalized=False) for i, token in steer.items() if i not in self.special]
            self.backend.add_special_tokens(more)
            self.vocab = self.backend.get_vocab(with_added_tokens=True)
        model = self.parsed.get("model") or {}
        self.unknown_id = model.get("unk_id", self.vocab.get(model.get("unk_token")))
        self.control = {token: i for i, token in steer.items() if i != self.unknown_id}
        self._control_ids = frozenset(self.control.values())
        self._control = re.compile("|".join(map(re.escape, sorted(self.control, key=len, reverse=True))) or r"(?!)")
        ids = np.asarray(self.encode([EVERY_BYTE])[0], np.int64)
        self.whole = self.unknown_id not in ids and self.decode(ids.tolist()).removeprefix(" ") == EVERY_BYTE

    @property
    def size(self) -> int:
        """The highest id + 1."""
        return max(self.vocab.values(), default=-1) + 1

    def encode(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text, without any that controls a model."""
        with self._one_line("cannot tokenise the text"):
            found = [one.ids for one in self.backend.encode_batch_fast(texts, add_special_tokens=False)]
        return [
            ids if self._control_ids.isdisjoint(ids) else self._apart(text)
            for text, ids in zip(texts, found, strict=True)
        ]

    def _apart(self, text: str) -> list[int]:
        """The ids of a text in which the model itself, as a Unigram may, takes a control token for a word: each is cut
        after its first character."""
        cuts = [0, *(found.start() + 1 for found in self._control.finditer(text)), len(text)]
        ids = []
        for start, end in itertools.pairwise(cuts):
            ids += self.backend.encode(text[start:end], add_special_tokens=False).ids
        return [i for i in ids if i not in self._control_ids]

    def lost(self, text: str) -> tuple[int, int]:
        """What `Tokenizer.lost` gives."""
        return (0, 0) if self.whole else _lost(text, self.encode([text])[0], self.unknown_id, self.decode)

    def decode(self, ids: Iterable[int], *, special: bool = True) -> str:
        """The text of ``ids``, with the special tokens or without."""
        ids = [i for i in ids if special or i not in self.special]
        with self._one_line("cannot decode"):
            return self.backend.decode(ids, skip_special_tokens=False)

    @contextmanager
    def _one_line(self, what: str):
        """The library's bare Exception, and the panics of its Rust, as a ValueError."""
        try:
            yield
        except BaseException as error:
            if isinstance(error, Exception) or type(error).__name__ == "PanicException":
                raise ValueError(f"{self.label}: tokenizer.json {what} ({first_line(error)[:100]})") from None
            raise


def _through_tokenizers(files: dict[str, bytes], eos: str, label: str) -> tuple:
    """(vocab_size, eos_id, encode, decode, can_cut, unknown_id, whole) of tokenizer.json."""
    definition = Definition(files["tokenizer.json"], label)
    eos_id = definition.vocab.get(eos)
    if eos_id is None:
        raise ValueError(f"{label}: it has no {eos}; name its eos_token in {TOKENIZER_CONFIG} beside it")
    before = definition.parsed.get("pre_tokenizer") or {}
    plain = before.get("type") == "ByteLevel" and not before.get("add_prefix_space") and before.get("use_regex", True)
    can_cut = bool(plain and definition.parsed.get("normalizer") is None)
    calls = definition.encode, definition.decode, can_cut, definition.unknown_id, definition.whole
    return definition.size, eos_id, *calls


def _lost(text: str, ids: Iterable[int], unknown_id: int | None, decode: Callable) -> tuple[int, int]:
    """How many of ``ids`` are unknown, and how many characters the text of the others has not, or not as often."""
    known = [int(i) for i in ids if i != unknown_id]
    gone = Counter("".join(text.split())) - Counter("".join(decode(known).split()))
    return len(ids) - len(known), sum(gone.values())


def _batches(documents: Iterable[str], cut: bool) -> Iterator[list[tuple[str, bool]]]:
    """The documents, or their pieces, in lists of some BATCH_CHARACTERS; each with whether its document ends there."""
    batch, size = [], 0
    for document in documents:
        for piece in _pieces(document, PIECE_CHARACTERS if cut else LONGEST):
            batch.append(piece)
            size += len(piece[0])
            if size >= BATCH_CHARACTERS:
                yield batch
                batch, size = [], 0
    yield batch


def _pieces(text: str, size: int) -> Iterator[tuple[str, bool]]:
    """``text`` in pieces of ``size`` to three times as many characters, each with whether it is the last."""
    start = 0
    while len(text) - start > 3 * size:
        begin, reach = start + size, start + 3 * size
        found = (cut.search(text, begin, reach) for cut in _CUTS)
        end = next((cut.end() for cut in found if cut), reach)
        yield text[start:end], False
        start = end
    yield (text[start:] if start else text), True


def _json(raw: bytes, label: str) -> dict:
    parsed = parse_json(raw, label)
    if not isinstance(parsed, dict):
        raise ValueError(f"{label} is not a JSON object")
    return parsed
