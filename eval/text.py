"""Measures of generated text."""

from collections import Counter
from collections.abc import Iterable


def distinct_n(texts: Iterable[str], n: int) -> float | None:
    """Distinct-n: different n-grams over all n-grams of ``texts`` taken together, in [0, 1]. None when no text has n
    words. The value falls as the texts grow: compare equal amounts of text only.

    Words are what whitespace separates, case and punctuation kept; an n-gram stays within a text. Li et al., "A
    Diversity-Promoting Objective Function for Neural Conversation Models", 2016, divide by the number of words. We
    divide by the number of n-grams, the usual choice since: texts without repetition then reach 1 for every n."""
    if isinstance(texts, str):
        raise ValueError("texts is one string; expected a list of strings, one a text")
    if n < 1:
        raise ValueError(f"n={n}: expected the length of an n-gram, 1 or more")
    split = map(str.split, texts)
    grams = Counter(tuple(words[i : i + n]) for words in split for i in range(len(words) - n + 1))
    return len(grams) / grams.total() if grams else None
