"""The TextFooler recipe (Jin et al., "Is BERT Really Robust?", AAAI 2020) over any loss of a text.

Delete each word in turn, and rank the words by what that does to the loss. Then, the most important word first: try
its neighbours, keep those of its part of speech that leave the meaning close enough, and take the one that does most
harm. A query is one text through ``loss_of``.
"""

import math
import random
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from itertools import compress, islice

from torch import Tensor
from torch.nn.functional import cosine_similarity

from data.wordlists import WordLists
from eval.attack.words import SameClass, Words, exchangeable, like, same_suffix_class

ROUNDING = 1e-9  # 0.15 * 20 is 3


@dataclass(frozen=True)
class AttackOptions:
    """Bounds of the attack on one article. Raises ValueError for values out of range."""

    queries: int = 1000  # texts put through the model, the unchanged one among them
    goal: float = 0.5  # rise of the loss, nats per token, at which an attack has succeeded and ends; inf: none
    max_changed: float = 0.15  # share of the article's words that may be exchanged, rounded down
    candidates: int = 50  # of a word, the nearest first
    min_similarity: float | None = None  # cosine of the window around a word, before and after; needs embed_of
    window: int = 15  # words in it
    keep_names: bool = True  # capitalised words inside a sentence stay

    def __post_init__(self):
        for name in ("queries", "candidates", "window"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r}: expected a whole number, 1 or more")
        if not self.goal > 0:
            raise ValueError(f"goal={self.goal!r}: expected a rise of the loss above 0, or inf for no end")
        if not 0 <= self.max_changed <= 1:
            raise ValueError(f"max_changed={self.max_changed!r}: expected a share in [0, 1]")
        if self.min_similarity is not None and not -1 <= self.min_similarity <= 1:
            raise ValueError(f"min_similarity={self.min_similarity!r}: expected a cosine in [-1, 1]")


@dataclass(frozen=True)
class Attack:
    """What became of one article."""

    text: str
    changed: tuple[tuple[int, str, str], ...]  # (index, old, new)
    queries: int
    loss_before: float
    loss_after: float
    words: int  # those that the model reads, of which max_changed is the share that may be exchanged
    stop: str  # goal, budget (of queries), share (of changed words) or words (none left)

    @property
    def rate(self) -> float:
        """The share of the words that was exchanged."""
        return len(self.changed) / self.words if self.words else 0.0


def attack_article(
    text: str, loss_of: Callable[[list[str]], Sequence[float]], lists, options, rng, *, limit: int | None = None, **how
) -> Attack:
    """One article under attack, alone: ``loss_of`` gets texts. All else is as in `attack_group`."""

    def losses(asked):
        return loss_of([candidate for _, candidate in asked])

    return attack_group([text], losses, lists, options, [rng], limits=[limit], **how)[0]


def attack_group(
    texts: Sequence[str],
    loss_of: Callable[[list[tuple[int, str]]], Sequence[float]],
    lists: WordLists,
    options: AttackOptions,
    rngs: Sequence[random.Random],
    *,
    same_class: SameClass | None = same_suffix_class,
    embed_of: Callable[[list[str]], Tensor] | None = None,
    limits: Sequence[int | None] | None = None,
) -> list[Attack]:
    """Several articles under attack at a time, so that a GPU sees full batches.

    ``loss_of`` scores (article, text) of all that are still under attack in one call, each a query. ``rngs`` draw an
    article's words to rank where the budget is too small for all of them; half of it, less the first query, is for
    ranking. ``same_class`` is the part-of-speech check, None for none. ``embed_of`` gives vectors [n, D] of texts,
    which are no queries. Words from ``limits`` on, which the model does not read, stay as they are.

    Each result is that of an attack on the article alone, if ``loss_of`` scores a text whatever the others are (a
    model's loss depends on them by rounding). Raises ValueError for a loss that is not finite."""
    if (options.min_similarity is None) != (embed_of is None):
        raise ValueError("min_similarity and embed_of go together: give both or neither")
    limits = [None] * len(texts) if limits is None else limits
    each = zip(texts, rngs, limits, strict=True)
    searches = [_search(text, lists, options, rng, same_class, embed_of, limit) for text, rng, limit in each]
    waiting = {k: next(search) for k, search in enumerate(searches)}
    results: dict[int, Attack] = {}
    while waiting:
        asked = [(k, text) for k, wanted in waiting.items() for text in wanted]
        losses = [float(loss) for loss in loss_of(asked)]
        if len(losses) != len(asked):
            raise ValueError(f"loss_of gave {len(losses)} losses for {len(asked)} texts")
        if bad := [loss for loss in losses if not math.isfinite(loss)]:
            raise ValueError(f"the loss of an article is {bad[0]}, expected a finite number (a diverged model?)")
        answers = iter(losses)
        for k, wanted in list(waiting.items()):
            try:
                waiting[k] = searches[k].send(list(islice(answers, len(wanted))))
            except StopIteration as end:
                results[k] = end.value
                del waiting[k]
    return [results[k] for k in range(len(texts))]


def _search(text, lists, options, rng, same_class, embed_of, limit) -> Generator[list[str], list[float], Attack]:
    """One article's attack: yields texts, is sent their losses, returns the Attack."""
    words = Words(text)
    read = len(words.chunks) if limit is None else min(limit, len(words.chunks))
    found: dict[int, list[str]] = {}
    for i in range(read):
        if exchangeable(words, i, options.keep_names):
            near = [like(words.cores[i], c) for c in lists.candidates(words.cores[i])[: options.candidates]]
            if near and same_class is not None:
                near = list(compress(near, same_class(words, i, near)))
            if near:
                found[i] = near
    allowed = int(options.max_changed * read + ROUNDING)
    (before,) = yield [text]
    spent, loss, changes = 1, before, {}

    def end(stop: str) -> Attack:
        changed = tuple((i, words.cores[i], changes[i]) for i in sorted(changes))
        return Attack(words.render(changes), changed, spent, before, loss, read, stop)

    if not found or not allowed:
        return end("share" if found else "words")
    most = (options.queries - spent) // 2
    if most == 0:
        return end("budget")
    ranked = list(found) if len(found) <= most else sorted(rng.sample(list(found), most))
    losses = yield [words.without(i) for i in ranked]
    spent += len(ranked)
    importance = dict(zip(ranked, losses, strict=True))
    others = [i for i in found if i not in importance]
    rng.shuffle(others)
    cut = False  # whether the budget left something untried
    # Of equal words the earlier one comes first. Words that were not ranked come last, if any budget is left.
    for i in sorted(ranked, key=lambda i: -importance[i]) + others:
        if len(changes) == allowed:
            return end("share")
        if spent == options.queries:
            return end("budget")
        near = _similar(words, i, found[i], changes, options, embed_of) if embed_of else [(c, 0.0) for c in found[i]]
        cut |= len(near) > options.queries - spent
        near = near[: options.queries - spent]
        if not near:
            continue
        losses = yield [words.render(changes | {i: c}) for c, _ in near]
        spent += len(near)
        reached = [j for j, value in enumerate(losses) if value - before >= options.goal]
        # Of those that reach it the most similar; without similarities the nearest neighbour.
        best = max(reached, key=lambda j: near[j][1]) if reached else max(range(len(near)), key=losses.__getitem__)
        if losses[best] > loss:
            changes[i], loss = near[best][0], losses[best]
        if reached:
            return end("goal")
    return end("budget" if cut else "words")


def _similar(words, i, candidates, changes, options, embed_of) -> list[tuple[str, float]]:
    """The candidates whose window is near enough to that of the ORIGINAL text, with the cosine."""
    windows = [words.window(i, options.window, {})]
    windows += [words.window(i, options.window, changes | {i: c}) for c in candidates]
    vectors_ND = embed_of(windows).float()
    cosines = cosine_similarity(vectors_ND[1:], vectors_ND[:1]).tolist()
    return [(c, cos) for c, cos in zip(candidates, cosines, strict=True) if cos >= options.min_similarity]
