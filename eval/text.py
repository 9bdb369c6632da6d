"""Measures of generated text."""

import unicodedata
from collections import Counter
from collections.abc import Iterable

# Scripts that put no blanks between words, as unicodedata begins their characters' names.
WITHOUT_BLANKS = ("CJK ", "HIRAGANA ", "KATAKANA ", "THAI ", "LAO ", "MYANMAR ", "KHMER ", "TIBETAN ")


def unicode_words(text: str) -> list[str]:
    """The words of a text in any script, without case: runs of letters, marks and digits. Of a script without blanks
    each letter is a word, with the marks on it."""
    words, open_ = [], False  # whether the last word may go on
    for c in unicodedata.normalize("NFC", text).casefold():
        kind = unicodedata.category(c)[0]
        alone = kind == "L" and unicodedata.name(c, "").startswith(WITHOUT_BLANKS)
        if kind not in "LMN":
            open_ = False
        elif words and (kind == "M" or (open_ and not alone)):
            words[-1] += c
        else:
            words.append(c)
            open_ = not alone
    return words


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
