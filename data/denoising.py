"""BART's pre-training: plain text -> blocks of whole sentences -> (noised, whole) pairs.

Lewis et al., 2020, section 2.2, text infilling and sentence permutation: the sentences of a block change places, and of
its tokens a share is masked in spans, whose lengths are Poisson(3); each span becomes one mask, and a span of none puts
a mask in. The noise of a block is a pure function of (seed, epoch, block), so that a run resumes with it. A sentence
ends at . ! or ?, with closing quotes or brackets behind it, before a blank, and so it does at an abbreviation's.
"""

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np

from data.cache import TokenSet, cached_tokens
from data.sources import TEXT_SPLITS, Source, Split, open_source
from data.summaries import Pair, SummaryTokenizer, TokenPairs, vocabulary
from data.windows import permutation, random_uint64

MASK = "<mask>"
MEAN_SPAN = 3.0
# P(length <= k), k = 0 to 31, of Poisson(3).
CUMULATIVE = np.cumsum([math.exp(-MEAN_SPAN) * MEAN_SPAN**k / math.factorial(k) for k in range(32)])
# A stream of random numbers for each block of each epoch, apart from those of data/summaries.py under the same seed:
# 2^36 blocks an epoch, 2^24 epochs, of which training does not come to the last.
NOISE_COUNTER, BLOCKS, HELD_OUT_EPOCH = 2**61, 2**36, 2**24 - len(TEXT_SPLITS)
HELD_OUT_SEED = 0  # whose noise validation and test have under every --seed
CLOSERS = "\"'”’)]}»"


def span_lengths(n: int, share: float, draws: np.ndarray) -> np.ndarray:
    """Lengths of the spans that are masked of ``n`` tokens, int64 [spans]: Poisson(3), until together they have
    ``share`` of the tokens, the last one cut. Where that is no whole number it is rounded by lot, so that its mean is
    right. ``draws``: uint64 [n + 2]."""
    uniform = (draws >> np.uint64(11)) * 2.0**-53
    masked = int(share * n + uniform[0])
    lengths = np.searchsorted(CUMULATIVE[:-1], uniform[1:], side="right")
    total = np.cumsum(lengths)
    count = int(np.searchsorted(total, masked)) if masked else 0
    before = int(total[count - 1]) if count else 0
    return np.append(lengths[:count], masked - before) if masked else lengths[:0]


def infilled(ids: np.ndarray, lengths: np.ndarray, mask_id: int, draws: np.ndarray) -> np.ndarray:
    """``ids`` [n] with spans of these ``lengths`` masked, one ``mask_id`` for each: int [n - sum + spans]. Every way to
    place spans among the tokens that stay is as likely as any other. ``draws``: a uint64 for each token of the result,
    or more."""
    size = len(ids) - int(lengths.sum()) + len(lengths)
    places = np.sort(np.argsort(draws[:size], kind="stable")[: len(lengths)])
    taken = np.ones(size, np.int64)  # tokens of the text that stand, or stood, at each place of the result
    taken[places] = lengths
    begins = np.cumsum(taken) - taken
    out = ids[np.minimum(begins, len(ids) - 1)]
    out[places] = mask_id
    return out


def permuted(ids: np.ndarray, starts: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """``ids`` [n] whose sentences have changed places; they begin at 0 and at the sorted ``starts``. ``draws``: uint64,
    one for each sentence, or more."""
    parts = np.split(ids, starts)
    return np.concatenate([parts[i] for i in np.argsort(draws[: len(parts)], kind="stable")])


def noised(ids: np.ndarray, starts: np.ndarray, share: float, mask_id: int, seed: int, counter: int) -> np.ndarray:
    """``ids`` [n] with their sentences permuted, then ``share`` of the tokens masked, by the stream (seed, counter)."""
    n = len(ids)
    for_order, for_lengths, for_places = np.split(random_uint64(seed, counter, 4 * n + 4), [n, 2 * n + 2])
    mixed = permuted(ids, starts, for_order)
    return infilled(mixed, span_lengths(n, share, for_lengths), mask_id, for_places)


@dataclass
class Denoised(TokenPairs):
    """Blocks of text; `at` gives them as pairs, each the target of its noise, which is another one in each epoch. Here
    their sources are the blocks themselves: source_lengths are those before the noise."""

    begins: np.ndarray  # bool, for each token of data: whether a sentence begins there
    share: float
    mask_id: int
    seed: int

    def at(self, rows: np.ndarray, epoch: int) -> TokenPairs:
        """The blocks at ``rows`` with their noise of the pass ``epoch``, 0 the first."""
        texts, sources = [], []
        for row, start, end in zip(rows, *(edge[rows] for edge in self.spans[1]), strict=True):
            ids, starts = self.data[start:end], np.flatnonzero(self.begins[start + 1 : end]) + 1
            counter = NOISE_COUNTER + epoch * BLOCKS + int(row)
            texts.append(ids)
            sources.append(noised(ids, starts, self.share, self.mask_id, self.seed, counter))
        ends = np.cumsum([len(ids) for ids in sources + texts])
        spans = np.concatenate([[0], ends[:-1]]), ends
        sides = [tuple(edge[part] for edge in spans) for part in (slice(len(rows)), slice(len(rows), None))]
        data = np.concatenate(sources + texts)
        return TokenPairs(data, (), self.tokenizer, self.limits, sides, f"{self.hash} {epoch}")


def sentence_starts(tokens: np.ndarray, tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """(whether a sentence begins at each of ``tokens``, whether a word does), bool [n]. ``tokenizer``: a
    data.tokenizer.Tokenizer whose words begin with their blank."""
    texts = [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]
    blank, closer, stop = (
        np.array([test(text) for text in texts])[tokens]
        for test in (
            lambda t: t[:1].isspace(),
            lambda t: bool(t) and not t.strip(CLOSERS),
            lambda t: t.rstrip(CLOSERS).endswith((".", "!", "?")),
        )
    )
    stop[1:] |= closer[1:] & stop[:-1]
    return blank & np.append(False, stop[:-1]), blank


def cut(ends: np.ndarray, begins: np.ndarray, words: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
    """(start, end) of each block, int64 [blocks]. Documents end at the sorted ``ends``, where their end-of-text tokens
    stand. A block has at most ``room`` tokens: it ends before the last sentence that does not fit, or the last word
    where that sentence begins in its first half, or else right there."""
    places = np.flatnonzero(begins), np.flatnonzero(words)
    starts, stops, start = [], [], 0
    for end in ends.tolist():
        while start < end:
            limit, stop = start + room, end
            if limit < end:
                found = (int(at[np.searchsorted(at, limit, "right") - 1]) if len(at) else 0 for at in places)
                stop = next((place for place in found if place > start + room // 2), limit)
            starts.append(start)
            stops.append(stop)
            start = stop
        start = end + 1
    return np.array(starts, np.int64), np.array(stops, np.int64)


def one_line(part: Split) -> Iterable[str]:
    """The documents of a split, their line breaks and runs of blanks as one blank, as in a summary."""
    return (" ".join(text.split()) for text in part.documents())


def open_text(folders: str) -> list[Source]:
    """The sets or folders of text that ``folders`` names, separated by commas, as train_lm.py's --data takes one."""
    return [open_source(name, TEXT_SPLITS) for name in folders.split(",")]


def noised_sets(
    cfg, tokenizer: SummaryTokenizer, limits: dict[str, int]
) -> tuple[Denoised, dict[str, TokenPairs | None], dict[str, dict]]:
    """What data.summaries.encode_sets gives, of plain text: the train, val and test splits of data in blocks of at most
    max_target tokens, <s> and </s> included, as finetune_seq2seq.py's ``cfg`` says. Blocks to measure stand in a random
    order and have one noise, whatever the seed; what is recorded of them has the NLL that the tokens' frequencies in
    train give. ``limits``: as there.

    Raises ValueError for a tokenizer without <mask>, flags that do not go together, and sets that cannot be had."""
    mask_id, extra = vocabulary(tokenizer.base.files()).get(MASK), 1 + (tokenizer.bos_id is not None)
    if mask_id is None:
        way = "give the folder of one, as recipes.tiny_bart trains it"
        raise ValueError(f"--denoise: tokenizer {tokenizer.base.name} has no {MASK}; {way}")
    if cfg.eval_data or cfg.fold or cfg.noise_references:
        raise ValueError("--denoise makes pairs of plain text: leave out --eval-data, --fold and --noise-references")
    if cfg.max_source < cfg.max_target:
        wrong = f"--max-source {cfg.max_source} is less than --max-target {cfg.max_target}"
        raise ValueError(f"--denoise: {wrong}; a source is as long as its target")
    limit = cfg.max_source, cfg.max_target
    sources, made, about = open_text(cfg.data), dict.fromkeys(TEXT_SPLITS), {}
    for number, split in enumerate(TEXT_SPLITS):
        parts = [_tokens(source, split, tokenizer, cfg.cache) for source in sources if split in source.splits]
        if not parts:
            continue
        data, seeded = np.concatenate([part.tokens for part in parts]), cfg.seed if split == "train" else HELD_OUT_SEED
        begins, words = sentence_starts(data, tokenizer.base)
        starts, ends = cut(np.flatnonzero(data == tokenizer.base.eos_id), begins, words, cfg.max_target - extra)
        digest = hashlib.sha256(f"{[part.hash for part in parts]} {limit} {cfg.denoise} {tokenizer.bos_id}".encode())
        noise = dict(begins=begins, share=cfg.denoise, mask_id=mask_id, seed=seeded)
        blocks = Denoised(data, (), tokenizer, limit, [(starts, ends)] * 2, digest.hexdigest(), **noise)
        name, key = "+".join(source.name for source in sources), {"val": "validation"}.get(split, split)
        documents = sum(part.documents for part in parts)
        label = f"{name} {key}: {documents:,} documents in {len(blocks):,} blocks of at most {cfg.max_target} tokens"
        origin = ", ".join(source.origin for source in sources)
        about[key] = dict(set=name, origin=origin, pairs=len(blocks), partial="", removed={}, truncated={}, label=label)
        if split != "train":
            about[key]["unigram_nll"] = unigram = unigram_nll(made["train"], blocks)
            about[key]["label"] += f"; their tokens' frequencies give {unigram:.3f} nats a token"
            order = permutation(HELD_OUT_SEED, NOISE_COUNTER - 1 - number, len(blocks))[: limits[split] or None]
            blocks = blocks.at(order, HELD_OUT_EPOCH + number)
            texts = [tokenizer.decode(blocks.ids(1, i)) for i in range(len(blocks))]
            blocks.pairs = [Pair(f"{split}/{i}", text, text) for i, text in zip(order.tolist(), texts, strict=True)]
        made[split] = blocks
    return made["train"], {"val": made["val"], "test": made["test"], "ood": None}, about


def unigram_nll(train: TokenPairs, held_out: TokenPairs) -> float:
    """Mean NLL, in nats, of a target token of ``held_out`` by the frequencies of ``train``'s targets, each plus one."""
    seen, asked = train.target_counts() + 1, held_out.target_counts()
    return float(-(asked * np.log(seen / seen.sum())).sum() / asked.sum())


def _tokens(source: Source, split: str, tokenizer: SummaryTokenizer, cache) -> TokenSet:
    part = source.splits[split]
    texts = partial(one_line, part)
    return cached_tokens(
        cache, f"{source.name}-one-line", split, texts, tokenizer.base, part.hash, total_bytes=part.bytes
    )
