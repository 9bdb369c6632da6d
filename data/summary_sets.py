"""The sets of one summarisation run: which splits are read, what is held out of them, and what is recorded of them."""

from pathlib import Path

import numpy as np

from data.summaries import Summaries, SummaryTokenizer, TokenPairs, encode_pairs, fold, load_summaries


def load_texts(data: str, eval_data: str = "", *, folded: bool, min_words: int) -> dict[str, Summaries | None]:
    """The splits that a run reads: train, validation and test of ``data``, only train where a part of it is held out
    (``folded``), and ood, the test split of ``eval_data``. Raises ValueError where there is nothing to train on or to
    validate on, and as `load_summaries`."""
    texts = load_summaries(data, ("train",) if folded else ("train", "validation", "test"), min_words=min_words)
    if texts["train"] is None or not (folded or texts["validation"]):
        lacks = "training" if texts["train"] is None else "validation"
        raise ValueError(f"{data} has no {lacks} split; add its file, or validate on a part with --fold 1/5")
    ood = load_summaries(eval_data, ("test",), min_words=min_words)["test"] if eval_data else None
    return texts | {"ood": ood}


def encode_sets(
    texts: dict[str, Summaries | None],
    tokenizer: SummaryTokenizer,
    cache: str | Path,
    max_source: int,
    max_target: int,
    *,
    part: str = "",
    limits: dict[str, int],
) -> tuple[TokenPairs, dict[str, TokenPairs | None], dict[str, dict]]:
    """(training pairs, {val, test, ood}, what is recorded of each split in ``texts``).

    ``part``: "K/M" holds part K of M of the training pairs out as val, see `data.summaries.fold`. ``limits``: at most
    so many pairs of a set, the first; 0 is all. Of a split that is partial or cut its record says so.
    """
    tokens = {name: t and encode_pairs(t, tokenizer, cache, max_source, max_target) for name, t in texts.items()}
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
            truncated = tokens[name].truncated
            cut = ", ".join(f"{n:,} {what}" for what, n in truncated.items())
            label = f"{text.label}; cut to {max_source} and {max_target} tokens: {cut}"
            about[name] = dict(set=text.name, origin=text.origin, pairs=len(text.pairs), partial=text.partial)
            about[name] |= dict(removed=text.removed, truncated=truncated, label=label)
    return train, sets, about
