"""Texts, folders of them and one-line errors, for the tests of sources, tokens and corpora."""

import os
from pathlib import Path

import pytest

LM_DATA = os.environ.get("LM_DATA")
needs_lm_data = pytest.mark.skipif(not LM_DATA, reason="LM_DATA is not set")

# Text that has broken tokenizers: literal special tokens, runs of white space, accents, emoji, control characters.
HARD = [
    "the end <|endoftext|> is not the end<|endoftext|>",
    "  two\t\ttabs \n\n\n and lines\r\n   trailing   ",
    "naïve café, 東京 𝔘𝔫𝔦 👩‍👩‍👧 e\u0301 \u00a0\u2028 \x00\x1c",
    "it's we'll I'VE IT'S x'Some 3.14159 !!!??? __init__(self, *args)",
    "\n",
    "x",
]
WIKI = (
    " \n = First = \n \n A line . \n a = b \n \n = = Part = = \n \n Text = x = \n"
    " = a formula = \n \n more \n \n = a legend = \n GP \n \n = Second = \n \n Words . \n"
)


def topics(n: int = 30) -> list[str]:
    from pydoc_data.topics import topics

    return [text for _, text in sorted(topics.items())][:n]


def fill(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def texts(source, split: str) -> list[str]:
    return list(source.splits[split].documents())


def message(call, *words: str) -> str:
    """The call's ValueError, which must be one line and hold each of ``words``."""
    with pytest.raises(ValueError) as caught:
        call()
    said = str(caught.value)
    assert "\n" not in said
    for word in words:
        assert word in said, f"{word!r} is not in {said!r}"
    return said
