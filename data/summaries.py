"""Articles and summaries: a named set or a folder -> pairs -> tokens -> batches of like lengths.

A batch, its order and its noise are pure functions of (seed, step), as in data/windows.py, so that a run resumes with
the same batches on any number of ranks. A new named set is one entry in SUMMARY_SETS.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import AddedToken
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data.cache import cached_tokens
from data.files import is_set, lm_data, load_hub, one_file
from data.tokenizer import TOKENIZER_FILES, Definition, Tokenizer, byte_level, load_tokenizer, merges_of, read_files
from data.windows import IGNORE_INDEX, permutation, random_uint64, token_counts
from model.weights import first_line, folder_of
from schedules.commandline import nearest
from schedules.textlines import parse_json, read_csv, read_rows

STEMS = {"train": ("train",), "validation": ("validation", "val", "valid", "dev"), "test": ("test",)}  # of its files
SUMMARY_SPLITS = tuple(STEMS)
ARTICLE = ("article", "document", "source")
SUMMARY = ("highlights", "summary", "target")


class PublishedSet(NamedTuple):
    repository: str  # on the hub
    configuration: str | None
    rows: dict[str, int]  # of the full set, by which a part is told from the whole


SUMMARY_SETS = {
    "cnn_dailymail": PublishedSet("abisee/cnn_dailymail", "3.0.0", dict(train=287113, validation=13368, test=11490)),
    "xsum": PublishedSet("EdinburghNLP/xsum", None, dict(train=204045, validation=11332, test=11334)),
}
POOL = 100  # batches whose examples are sorted by length together
# Streams of random numbers apart from the epochs' under the same seed.
FOLD_COUNTER, SWAP_COUNTER = 2**63, 2**62
SPECIALS = ("<s>", "<pad>", "</s>")  # BART's names of bos, pad and eos


class Pair(NamedTuple):
    id: str  # the set's own, or "test/17": split and row from 0
    article: str
    summary: str


@dataclass(frozen=True)
class Summaries:
    """One split of a set."""

    name: str
    split: str
    origin: str
    partial: str  # what is missing, "a sample: 100 of 287,113 rows"; empty where nothing is known to be
    pairs: list[Pair]
    removed: dict[str, int]  # rows left out: "empty" (article or summary), "short" (article)

    @property
    def label(self) -> str:
        """For people: what it is, how much of it, and what was left out."""
        left_out = ", ".join(f"{n} {what}" for what, n in self.removed.items() if n)
        notes = [f"{len(self.pairs):,} pairs", self.partial, left_out and f"removed {left_out}"]
        return f"{self.name} {self.split} ({'; '.join(filter(None, notes))})"


def load_summaries(
    name_or_folder: str, splits: Iterable[str] = SUMMARY_SPLITS, *, min_words: int = 50
) -> dict[str, Summaries | None]:
    """The asked-for splits of a set, each None where the set has no such split.

    A name in SUMMARY_SETS is $LM_DATA/NAME where that is a folder, else the hub's set through ``datasets``. Another is
    a folder, or one in $LM_DATA. A folder has {train,validation,test}.jsonl, .csv or .tsv, or these as .gz, with
    article (or document, source) and highlights (or summary, target) a row. Lists of sentences are joined; of several
    summaries the first counts. Rows without article or summary, or with an article of fewer than ``min_words`` words,
    are left out and counted. Raises ValueError, one line, for a set that cannot be had, a broken row or a missing
    column (with its line), and a split left empty."""
    name = str(name_or_folder)
    here = name not in SUMMARY_SETS and Path(name).is_dir()
    folder = Path(name) if here else lm_data(name) or Path(name)
    local = folder.is_dir()
    if not local and name not in SUMMARY_SETS:
        expected = f"{', '.join(SUMMARY_SETS)}, or a folder with train.jsonl, validation.jsonl ..."
        raise ValueError(f"no data {name!r}: expected {expected}{nearest(name, SUMMARY_SETS)}")
    known = next((known for known in SUMMARY_SETS if is_set(name, known)), "")
    label = known or folder.resolve().name
    label = label if known or label not in SUMMARY_SETS else f"folder-{label}"  # another that is called so
    published = SUMMARY_SETS.get(known, PublishedSet("", None, {}))
    out: dict[str, Summaries | None] = dict.fromkeys(splits)
    for split in out:
        if not local:
            way_out = f"put {split}.jsonl into $LM_DATA/{name}"
            loaded = load_hub(name, way_out, published.repository, published.configuration, split=split)
            origin, rows = f"the hub's {published.repository}", enumerate(loaded, 1)
        elif path := one_file(folder, STEMS[split], (".jsonl", ".csv", ".tsv")):
            table = path.name.lower().removesuffix(".gz").endswith((".csv", ".tsv"))
            origin, rows = str(path), read_csv(path) if table else read_rows(path, nan=True)
        else:
            continue
        pairs, removed = _pairs(rows, split, origin, min_words)
        count = len(pairs) + sum(removed.values())
        full = published.rows.get(split, count)
        missing = f"a sample: {count:,} of {full:,} rows" if count != full else ""
        out[split] = Summaries(label, split, origin, missing, pairs, removed)
    if not any(out.values()):
        raise ValueError(f"{folder} has none of {', '.join(f'{s}.jsonl' for s in out)} (or .csv); expected one")
    return out


def _pairs(rows, split: str, origin: str, min_words: int) -> tuple[list[Pair], dict[str, int]]:
    """The pairs of numbered rows, and how many rows were left out and why."""
    pairs, removed = [], {"empty": 0, "short": 0}
    for i, (line, row) in enumerate(rows):
        article, summary = (_text(row, names, f"{origin}, line {line}") for names in (ARTICLE, SUMMARY))
        if not article or not summary:
            removed["empty"] += 1
        elif len(article.split()) < min_words:
            removed["short"] += 1
        else:
            pairs.append(Pair(str(row.get("id") or f"{split}/{i}"), article, summary))
    if not pairs:
        count = sum(removed.values())
        why = f"all {count} rows were left out, {removed}" if count else "it has no rows"
        raise ValueError(f"{origin} holds no article with a summary ({why})")
    return pairs, removed


def _text(row, names: tuple[str, ...], where: str) -> str:
    if not isinstance(row, dict):
        raise ValueError(f"{where} is not an object with an article and a summary")
    column = next((name for name in names if name in row), None)
    if column is None:
        have = ", ".join(map(str, row)) or "none"
        raise ValueError(f"{where} has no column {' or '.join(names)} (its columns: {have}); rename yours")
    value = "" if row[column] is None else row[column]
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        value = " ".join(value if names is ARTICLE else value[:1])
    if not isinstance(value, str):
        raise ValueError(f"{where}: {column} is {type(value).__name__}, expected text or a list of texts")
    return value.strip()


def load_texts(cfg) -> dict[str, Summaries | None]:
    """The splits that a run of finetune_seq2seq.py's ``cfg`` reads: all of data, only train where a fold of that is
    held out, and ood, the test split of eval_data. Raises ValueError without a split to train or to validate on."""
    texts = load_summaries(cfg.data, ("train",) if cfg.fold else SUMMARY_SPLITS, min_words=cfg.min_words)
    if texts["train"] is None or not (cfg.fold or texts["validation"]):
        lacks = "training" if texts["train"] is None else "validation"
        raise ValueError(f"{cfg.data} has no {lacks} split; add its file, or validate on a part with --fold 1/5")
    ood = load_summaries(cfg.eval_data, ("test",), min_words=cfg.min_words)["test"] if cfg.eval_data else None
    return texts | {"ood": ood}


def fold(n: int, spec: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a training set of ``n`` to train and to validate on, both sorted, for "K/M": part K of M, from 1.

    The parts are the same for every seed, so that seeds compare. Raises ValueError for another form."""
    match = re.fullmatch(r"(\d+)/(\d+)", spec)
    k, parts = map(int, match.groups()) if match else (0, 0)
    if not 1 <= k <= parts or parts < 2:
        raise ValueError(f"--fold {spec}: expected K/M with 1 <= K <= M and M at least 2, for example 1/5")
    if n < parts:
        raise ValueError(f"--fold {spec}: {n} training pairs are fewer than the {parts} parts")
    held = np.argsort(permutation(0, FOLD_COUNTER, n)) % parts == k - 1
    return np.flatnonzero(~held), np.flatnonzero(held)


@dataclass(frozen=True)
class SummaryTokenizer:
    """A Tokenizer with the tokens around a source or target: [bos] text eos, and pad after it.

    ``bos_id`` is None for PEGASUS. ``newline`` is what a line break in a summary becomes before it is encoded: a space,
    as in fairseq's CNN/DailyMail, or PEGASUS's own "<n>", which decoding turns back."""

    base: Tokenizer
    bos_id: int | None
    pad_id: int
    eos_id: int
    newline: str = " "

    @property
    def vocab_size(self) -> int:
        return max(self.base.vocab_size, self.pad_id + 1, self.eos_id + 1, (self.bos_id or 0) + 1)

    def wrap(self, ids, limit: int) -> np.ndarray:
        """int64 [n] of at most ``limit`` ids: the first of ``ids``, with bos and eos around them."""
        front = [] if self.bos_id is None else [self.bos_id]
        room = limit - len(front) - 1
        return np.concatenate([front, np.asarray(ids[:room], np.int64), [self.eos_id]]).astype(np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids`` without the tokens around it."""
        outside = {self.bos_id, self.pad_id, self.eos_id}
        text = self.base.decode(i for i in map(int, ids) if i not in outside and i < self.base.vocab_size)
        return (text.replace(self.newline, "\n") if self.newline.strip() else text).strip()

    def state(self) -> dict:
        """What a checkpoint keeps; ``from_state`` is the inverse."""
        ids = dict(bos_id=self.bos_id, pad_id=self.pad_id, eos_id=self.eos_id, newline=self.newline)
        return ids | {"files": self.base.files(), "name": self.base.name}

    @classmethod
    def from_state(cls, state: dict) -> "SummaryTokenizer":
        ids = (state[key] for key in ("bos_id", "pad_id", "eos_id", "newline"))
        return cls(Tokenizer.from_files(state["files"], state["name"]), *ids)


def tokenizer_for_training(spec: str, train: Summaries | None, cache: str | Path, *, bos: bool) -> SummaryTokenizer:
    """For a model from a random start: ``gpt2``, ``bpe:N`` trained on ``train``, or a folder, as data.tokenizer takes.

    A vocabulary that has <s>, <pad> and </s> (BART's vocab.json and merges.txt) keeps its ids; to any other they are
    added after its last. ``bos``: whether texts begin with <s>."""
    folder = Path(spec).expanduser()
    if "tokenizer.json" not in (files := read_files(folder)) and "vocab.json" in files:
        base = Tokenizer.from_files(_with_definition(files, folder, None), folder.name)
    else:
        how = {}
        if train:
            corpus = f"{train.name}-{_hash(train.pairs, '')[:12]}"
            how = dict(documents=partial(_texts, train.pairs), cache=cache, corpus=corpus)
        base = load_tokenizer(spec, **how)
    known, new = vocabulary(base.files()), range(base.vocab_size, base.vocab_size + len(SPECIALS))
    bos_id, pad_id, eos_id = [known[name] for name in SPECIALS] if known.keys() >= set(SPECIALS) else new
    return SummaryTokenizer(base, bos_id if bos else None, pad_id, eos_id)


def tokenizer_of_model(folder_or_hub_id: str, config) -> SummaryTokenizer:
    """The tokenizer.json, or BART's vocab.json and merges.txt, in the folder (or hub repository) of a BART or PEGASUS
    whose Seq2SeqConfig is ``config``. Raises ValueError where neither is there or the vocabulary is not the model's."""
    folder = folder_of(folder_or_hub_id, TOKENIZER_FILES)
    files = read_files(folder)
    if "tokenizer.json" not in files and not {"vocab.json", "merges.txt"} <= set(files):
        way_out = "put the model's there (of a spiece.model, transformers' AutoTokenizer saves a tokenizer.json)"
        raise ValueError(f"{folder} has no tokenizer.json, nor vocab.json and merges.txt; {way_out}")
    base = Tokenizer.from_files(_with_definition(files, folder, config.eos_token_id), str(folder_or_hub_id))
    if base.vocab_size > config.vocab_size:
        sizes = f"has {base.vocab_size} tokens, the model only {config.vocab_size}"
        raise ValueError(f"the tokenizer in {folder} {sizes}; use the tokenizer that the model was trained with")
    bos, newline = (config.bos_token_id, " ") if config.kind == "bart" else (None, "<n>")
    return SummaryTokenizer(base, bos, config.pad_token_id, config.eos_token_id, newline)


def vocabulary(files: dict[str, bytes]) -> dict[str, int]:
    """Token -> id of the tokenizer.json in ``files``; nothing without one."""
    return Definition(files["tokenizer.json"], "tokenizer").vocab if "tokenizer.json" in files else {}


def _with_definition(files: dict[str, bytes], folder: Path, eos_id: int | None) -> dict[str, bytes]:
    """``files`` with a tokenizer.json, and with the end-of-text token named: the one of ``eos_id``, else </s>.

    The tokenizer.json is made of vocab.json and merges.txt where those are BART's: fairseq's order of the ids is not
    that of the merges."""
    try:
        if "tokenizer.json" not in files:
            vocab = parse_json(files["vocab.json"], "vocab.json")
            if eos_id is None and not set(SPECIALS) <= set(vocab):
                return files  # GPT-2's kind
            backend = byte_level(vocab=vocab, merges=merges_of(files["merges.txt"]))
            names = [name for name in (*SPECIALS, "<unk>", "<mask>") if name in vocab]
            backend.add_special_tokens([AddedToken(name, special=True) for name in names])
            files = files | {"tokenizer.json": backend.to_str().encode()}
        known = vocabulary(files)
        eos_id = known.get("</s>") if eos_id is None else eos_id
        eos = next((token for token, i in known.items() if i == eos_id), None)
        settings = parse_json(files.get("tokenizer_config.json", b"{}"), "tokenizer_config.json")
    except Exception as error:  # tokenizers raises bare Exception
        reason = first_line(error)[:100]
        raise ValueError(f"the tokenizer files in {folder} are damaged or of another kind ({reason})") from None
    if eos is None:
        raise ValueError(f"the tokenizer in {folder} has no token {eos_id}, the model's end of text; it is another's")
    named = settings.get("eos_token")
    named = named["content"] if isinstance(named, dict) else named
    if named not in (None, eos):
        ends = f"ends a text with {named}, the model with its token {eos_id}, {eos}"
        raise ValueError(f"the tokenizer in {folder} {ends}; use the tokenizer that the model was trained with")
    return files | {"tokenizer_config.json": json.dumps(settings | {"eos_token": eos}).encode()}


@dataclass
class TokenPairs:
    """Sources and targets of one split as token ids, cut to their limits; ``truncated`` counts those that were longer.
    Lengths, int64 [pairs], include bos and eos."""

    data: np.ndarray  # all tokens of the split
    pairs: Sequence[Pair]
    tokenizer: SummaryTokenizer
    limits: tuple[int, int]  # of source and target
    spans: list[tuple[np.ndarray, np.ndarray]]  # begin and end in data of every source, of every target
    hash: str  # changes with texts, tokenizer and limits

    def __post_init__(self):
        extra = 1 + (self.tokenizer.bos_id is not None)
        full = [end - start + extra for start, end in self.spans]
        self.source_lengths, self.target_lengths = map(np.minimum, full, self.limits)
        sides = zip(("sources", "targets"), full, self.limits, strict=True)
        self.truncated = {side: int((lengths > limit).sum()) for side, lengths, limit in sides}

    def __len__(self) -> int:
        return len(self.target_lengths)

    def at(self, rows: np.ndarray, epoch: int) -> "TokenPairs":
        """The pairs at ``rows`` as they are in the pass ``epoch`` over the set: here the same in each."""
        return self.take(rows)

    def take(self, rows: np.ndarray) -> "TokenPairs":
        """The pairs at ``rows``, over the same tokens."""
        digest = hashlib.sha256(self.hash.encode() + np.asarray(rows, "<i8").tobytes()).hexdigest()
        spans = [(start[rows], end[rows]) for start, end in self.spans]
        return dataclasses.replace(self, pairs=[self.pairs[i] for i in rows], spans=spans, hash=digest)

    def ids(self, side: int, i: int) -> np.ndarray:
        """The source (``side`` 0) or target (1) of pair ``i``, int64 [n]."""
        start, end = (edge[i] for edge in self.spans[side])
        return self.tokenizer.wrap(self.data[start:end], self.limits[side])

    def target_counts(self) -> np.ndarray:
        """How often each token of the vocabulary is a target, with bos and eos: int64 [vocab_size]."""
        ids = np.concatenate([self.ids(1, i) for i in range(len(self))])
        return token_counts(ids, self.tokenizer.vocab_size)


def encode_pairs(
    part: Summaries, tokenizer: SummaryTokenizer, cache: str | Path, max_source: int, max_target: int
) -> TokenPairs:
    """Tokens of a split, through a verified token cache of whole texts, which other limits share."""
    texts = partial(_texts, part.pairs, tokenizer.newline)
    tokens = cached_tokens(cache, part.name, part.split, texts, tokenizer.base, _hash(part.pairs, tokenizer.newline))
    data, limits = np.asarray(tokens.tokens), (max_source, max_target)
    ends = np.flatnonzero(data == tokens.eos_id)
    if len(ends) != 2 * len(part.pairs):
        raise ValueError(f"{tokens.path} holds {len(ends)} texts for {len(part.pairs)} pairs; delete the file")
    starts = np.concatenate([[0], ends[:-1] + 1])
    spans = [(starts[side::2], ends[side::2]) for side in (0, 1)]
    digest = hashlib.sha256(f"{tokens.hash} {limits} {tokenizer.bos_id}".encode()).hexdigest()
    return TokenPairs(data, part.pairs, tokenizer, limits, spans, digest)


def _texts(pairs: Sequence[Pair], newline: str = "\n") -> Iterator[str]:
    """Every article and its summary, whose line breaks become ``newline``."""
    for pair in pairs:
        yield pair.article
        yield pair.summary.replace("\n", newline)


def _hash(pairs: Sequence[Pair], newline: str) -> str:
    digest = hashlib.sha256(newline.encode())
    for text in map(str.encode, _texts(pairs)):
        digest.update(len(text).to_bytes(8, "little") + text)
    return digest.hexdigest()


def encode_sets(
    texts: dict[str, Summaries | None], *encoding, part: str = "", limits: dict[str, int]
) -> tuple[TokenPairs, dict[str, TokenPairs | None], dict[str, dict]]:
    """(training pairs, {val, test, ood}, what is recorded of each split in ``texts``).

    ``encoding``: tokenizer, cache, max_source and max_target, as `encode_pairs` takes them. ``part``: "K/M" holds part
    K of M of the training pairs out as val, see `fold`. ``limits``: at most so many pairs of a set, the first; 0 is
    all. Of a split that is partial or cut its record says so."""
    tokens = {name: text and encode_pairs(text, *encoding) for name, text in texts.items()}
    train, sets = tokens["train"], {"val": tokens.get("validation"), "test": tokens.get("test"), "ood": tokens["ood"]}
    if part:
        kept, held = fold(len(train), part)
        train, sets["val"] = train.take(kept), train.take(held)
    for name, limit in limits.items():
        if sets[name] is not None and 0 < limit < len(sets[name]):
            sets[name] = sets[name].take(np.arange(limit))
    about = {}
    for name, text in texts.items():
        if text is not None:
            (source, target), truncated = tokens[name].limits, tokens[name].truncated
            cut = ", ".join(f"{n:,} {what}" for what, n in truncated.items())
            label = f"{text.label}; cut to {source} and {target} tokens: {cut}"
            about[name] = dict(set=text.name, origin=text.origin, pairs=len(text.pairs), partial=text.partial)
            about[name] |= dict(removed=text.removed, truncated=truncated, label=label)
    return train, sets, about


class Bucketed:
    """Training batches of like lengths: ``indices(step)`` are the rows of a global batch, the longest first.

    An epoch is a permutation, cut into pools of POOL batches. A pool is sorted by source length, neighbours in that
    order by target length, then cut into batches, whose order is shuffled. The rest of an epoch, less than a batch, is
    not used. Raises ValueError where there are fewer pairs than a batch."""

    def __init__(self, pairs: TokenPairs, batch: int, seed: int):
        if batch > len(pairs):
            raise ValueError(f"--batch {batch} is more than the {len(pairs)} training pairs; take a smaller one")
        self.pairs, self.batch, self.seed = pairs, batch, seed
        self.per_epoch = len(pairs) // batch
        self._of_epoch = lru_cache(1)(self._order)

    def indices(self, step: int) -> np.ndarray:
        epoch, place = divmod(step, self.per_epoch)
        return self._of_epoch(epoch)[place]

    def _order(self, epoch: int) -> np.ndarray:
        source, target = self.pairs.source_lengths, self.pairs.target_lengths
        kept = permutation(self.seed, 2 * epoch, len(self.pairs))[: self.per_epoch * self.batch]
        batches = []
        for pool in _cut(kept, POOL * self.batch):
            for near in _cut(_longest_first(pool, source), 2 * self.batch):
                batches += [_longest_first(rows, source) for rows in _cut(_longest_first(near, target), self.batch)]
        return np.stack(batches)[permutation(self.seed, 2 * epoch + 1, len(batches))]


def in_order(pairs: TokenPairs, batch: int) -> list[np.ndarray]:
    """Rows of evaluation batches: every pair once, the longest sources first, so that memory is known at once."""
    return _cut(np.lexsort((-pairs.target_lengths, -pairs.source_lengths)), batch)


def _cut(rows: np.ndarray, size: int) -> list[np.ndarray]:
    return np.split(rows, range(size, len(rows), size))


def _longest_first(rows: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    return rows[np.argsort(-lengths[rows], kind="stable")]


def collate(
    pairs: TokenPairs, rows: np.ndarray, target_rows: np.ndarray | None = None, multiple: int = 1
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Sources int64 [B, S], their mask bool [B, S] (None where nothing is padded) and labels int64 [B, T], padded on
    the right with pad_id and -100 to the longest, rounded up to a ``multiple``. ``target_rows``: whose targets the rows
    get, their own by default."""

    def padded(side: int, picks: np.ndarray, fill: int) -> Tensor:
        ids_BT = pad_sequence([torch.from_numpy(pairs.ids(side, i)) for i in picks], True, fill)
        width = min(-(-ids_BT.shape[1] // multiple) * multiple, pairs.limits[side])
        return F.pad(ids_BT, (0, width - ids_BT.shape[1]), value=fill)

    source_BS = padded(0, rows, pairs.tokenizer.pad_id)
    mask_BS = torch.arange(source_BS.shape[1]) < torch.from_numpy(pairs.source_lengths[rows])[:, None]
    targets_BT = padded(1, rows if target_rows is None else target_rows, IGNORE_INDEX)
    return source_BS, None if bool(mask_BS.all()) else mask_BS, targets_BT


def padding_share(pairs: TokenPairs, batches: Iterable[np.ndarray]) -> float:
    """Padding over all positions, sources and targets together, of ``batches`` that are padded to their longest."""
    lengths = [side[rows] for rows in batches for side in (pairs.source_lengths, pairs.target_lengths)]
    return 1 - sum(int(n.sum()) for n in lengths) / sum(int(n.max()) * len(n) for n in lengths)


def swapped_references(batch: int, rate: float, seed: int, step: int) -> np.ndarray:
    """For each place in the global batch of ``step`` the place whose summary it gets, int64 [batch].

    After n steps exactly round(rate * batch * n) places have had another's summary. Those of one step exchange theirs
    in a circle; a single one gets a copy. Raises ValueError for a rate outside [0, 1] and for a batch of one."""
    if not 0 <= rate <= 1:
        raise ValueError(f"--noise-references {rate} is outside [0, 1]")
    if rate and batch < 2:
        raise ValueError(f"--noise-references {rate} swaps summaries within a batch; --batch {batch} has one only")
    places = np.arange(batch)
    before, after = (int(np.floor(rate * batch * n + 0.5)) for n in (step, step + 1))
    count = after - before
    draws = random_uint64(seed, SWAP_COUNTER + step, batch + 1)
    chosen = np.argsort(draws[:batch])[:count]
    if count == 1:
        places[chosen] = (chosen + 1 + int(draws[batch] % np.uint64(batch - 1))) % batch
    else:
        places[chosen] = np.roll(chosen, 1)
    return places
