"""Word lists for an attack by synonyms: neighbours, stop words, antonyms, synonyms, all in lower case here.

``load_lists`` takes a folder as TextFooler's material comes in

    counterfitted_neighbors.json                      {word: [nearest first, ...]}
    stopwords_textfooler.txt                          one word a line
    counter_fitting_constraints/ppdb_antonyms.txt     two words a line
    counter_fitting_constraints/wordnet_antonyms.txt

or a file of neighbours with the others beside it: JSON as above; text lines "word neighbour neighbour ...", nearest
first; or vectors, "word x1 x2 ...", as counter-fitted-vectors.txt, GloVe, word2vec and fastText have them, whose
neighbours are then computed.
A broken line is a ValueError with its number.
"""

import functools
import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from schedules.textlines import parse_json, read_bytes, read_lines, read_text

NEIGHBOURS = "counterfitted_neighbors.json"
STOP_WORDS = "stopwords_textfooler.txt"
ANTONYMS = ("counter_fitting_constraints/ppdb_antonyms.txt", "counter_fitting_constraints/wordnet_antonyms.txt")
NEAREST, MIN_COSINE = 50, 0.7  # of vectors: N and delta of Jin et al. (2020), "Is BERT Really Robust?"


@dataclass(frozen=True)
class WordLists:
    """What may stand for a word. Everything is in lower case."""

    neighbours: "Mapping[str, Sequence[str]] | Vectors"  # word -> candidates, nearest first
    stop_words: frozenset[str] = frozenset()
    antonyms: frozenset[tuple[str, ...]] = frozenset()  # pairs that are never exchanged, in either order
    synonyms: frozenset[tuple[str, ...]] | None = None  # the only pairs that are exchanged; None: any

    def candidates(self, word: str) -> list[str]:
        """What may stand for ``word``, nearest first, in lower case; stop words neither give nor are candidates."""
        word = word.lower()
        if word in self.stop_words:
            return []
        found = dict.fromkeys(c.lower() for c in self.neighbours.get(word, ()))  # in order, each once
        found = [c for c in found if c != word and c.isalpha() and c not in self.stop_words]
        found = [c for c in found if self.antonyms.isdisjoint([(word, c), (c, word)])]
        return [c for c in found if self.synonyms is None or not self.synonyms.isdisjoint([(word, c), (c, word)])]


class Vectors:
    """Neighbours of a word by the cosine of word vectors: at most NEAREST of at least MIN_COSINE, nearest first."""

    def __init__(self, words: list[str], vectors_ND: np.ndarray):
        self.words, self.index = words, {word: i for i, word in enumerate(words)}
        norms = np.linalg.norm(vectors_ND.astype(np.float64), axis=1, keepdims=True)
        self.vectors_ND = (vectors_ND / np.maximum(norms, 1e-12)).astype(np.float32)  # a zero vector is near nothing
        self._near = functools.cache(self._neighbours)

    def get(self, word: str, default: Sequence[str] = ()) -> Sequence[str]:
        return self._near(self.index[word]) if word in self.index else default

    def _neighbours(self, i: int) -> list[str]:
        cosine_N = self.vectors_ND @ self.vectors_ND[i]
        cosine_N[i] = -2  # not the word itself
        nearest = np.argsort(-cosine_N, kind="stable")[:NEAREST]
        return [self.words[k] for k in nearest if cosine_N[k] >= MIN_COSINE]


def load_lists(words=None, stop_words=None, antonyms: Iterable = (), synonyms: Iterable = ()):
    """WordLists, and {name: SHA-256} of the files that were read; of two files with one name it is the path.

    ``words``: a folder, a file of neighbours, or None for $LM_DATA/textfooler. ``stop_words``: a file, None for the
    folder's, or "none". ``antonyms``, files as ``synonyms``, replace the folder's. Raises ValueError, with file and
    line, for what cannot be read, and where neighbours or stop words are named nowhere."""
    if words is None:
        if not os.environ.get("LM_DATA"):
            raise ValueError("no word lists: give --words a folder or file, or set LM_DATA to one with textfooler/")
        words = Path(os.environ["LM_DATA"]) / "textfooler"
    words, antonyms, synonyms = Path(words), [Path(p) for p in antonyms], [Path(p) for p in synonyms]
    if not words.exists():
        raise ValueError(f"no word list {words}: give --words a folder with {NEIGHBOURS}, or a file of neighbours")
    if words.is_dir():
        antonyms = antonyms or [words / name for name in ANTONYMS if (words / name).exists()]
        stop_words = stop_words or words / STOP_WORDS
        words = words / NEIGHBOURS
    if stop_words is None:
        raise ValueError(f"no stop words beside {words}: give --stop-words a file with one word a line, or none")
    stop = [] if str(stop_words) == "none" else [Path(stop_words)]
    near = read_neighbours(words)
    stopped = frozenset(word for path in stop for (word,) in _rows(path, 1))
    opposite, alike = (frozenset(pair for path in paths for pair in _rows(path, 2)) for paths in (antonyms, synonyms))
    lists = WordLists(near, stopped, opposite, alike if synonyms else None)
    if not isinstance(near, Vectors) and not any(map(lists.candidates, near)):
        raise ValueError(
            f"{words} gives no word another to stand for it: its neighbours are no words, or left out by "
            "stop words, antonyms or synonyms"
        )
    files = [words, *stop, *antonyms, *synonyms]
    names = Counter(path.name for path in files)
    called = {path: path.name if names[path.name] == 1 else str(path) for path in files}
    return lists, {called[path]: hashlib.sha256(read_bytes(path)).hexdigest() for path in files}


def read_neighbours(path: str | os.PathLike) -> "Mapping[str, Sequence[str]] | Vectors":
    """Neighbours from a .json file, else from lines of words or of vectors, which end in numbers.

    A line of two numbers at the head, COUNT WIDTH as word2vec's and fastText's files have it, is checked and passed
    over, as are lines of comment ("# ...") there. A word of vectors may hold blanks, as GloVe's ". . ." does."""
    if Path(path).suffix.lower() == ".json":
        return _neighbours_json(path)
    lines = _lines(path)
    counted = _header(lines[0][1])
    if counted:
        lines = lines[1:]
    while len(lines) > 1 and lines[0][1].startswith("#") and not _width(lines[0][1]):
        lines = lines[1:]
    width = Counter(_width(line) for _, line in lines[:100]).most_common(1)[0][0] if lines else 0
    if counted and (len(lines), width) != counted:
        found = f"{len(lines)} words of {width} numbers"
        raise ValueError(f"{path}, line 1: it counts {counted[0]} words of {counted[1]} numbers, there are {found}")
    if width:
        return _vectors(path, lines, width)
    found: dict[str, list[str]] = {}
    for number, line in lines:
        word, *near = line.lower().split()
        if not near:
            raise ValueError(f"{path}, line {number}: {_short(line)}; expected a word and its neighbours")
        if word in found:
            raise ValueError(f"{path}, line {number}: {word!r} is there twice; expected one line a word")
        found[word] = near
    return found


def _header(line: str) -> tuple[int, int] | None:
    """COUNT WIDTH."""
    parts = line.split()
    return (int(parts[0]), int(parts[1])) if len(parts) == 2 and all(map(str.isdecimal, parts)) else None


def _width(line: str) -> int:
    """How many numbers the line ends in, its first word aside."""
    return sum(1 for _ in itertools.takewhile(_is_number, reversed(line.split()[1:])))


def _is_number(text: str) -> bool:
    try:
        return float(text) is not None
    except ValueError:
        return False


def _neighbours_json(path) -> dict[str, list[str]]:
    text = read_text(path)
    content = parse_json(text, path)
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path}, line 1: expected an object of words with their lists of neighbours")
    for word, near in content.items():
        if not isinstance(near, list) or not all(isinstance(n, str) for n in near):
            line = text.count("\n", 0, max(0, text.find(json.dumps(word, ensure_ascii=False)))) + 1
            raise ValueError(f"{path}, line {line}: the neighbours of {_short(word)} are no list of words")
    return {word.lower(): near for word, near in content.items()}


def _vectors(path, lines: list[tuple[int, str]], width: int) -> Vectors:
    rows_ND, words = np.empty((len(lines), width), np.float32), []
    for row, (number, line) in zip(rows_ND, lines, strict=True):
        parts = line.split()
        if _width(line) != width:
            raise ValueError(f"{path}, line {number}: expected a word and {width} numbers")
        with np.errstate(over="ignore"):  # of fp32: it is not finite then
            row[:] = [float(v) for v in parts[-width:]]
        words.append(" ".join(parts[:-width]).lower())
        if not np.isfinite(row).all():
            raise ValueError(f"{path}, line {number}: the vector of {words[-1]!r} is not finite")
    return Vectors(words, rows_ND)


def _rows(path, width: int) -> list[tuple[str, ...]]:
    """The words of each line, of which there must be ``width``."""
    rows = []
    for number, line in _lines(path):
        rows.append(tuple(line.lower().split()))
        if len(rows[-1]) != width:
            expected = "one word" if width == 1 else "two words"
            raise ValueError(f"{path}, line {number}: {_short(line)}; expected {expected} a line")
    return rows


def _lines(path) -> list[tuple[int, str]]:
    """Numbered lines that hold something."""
    found = [(n, line) for n, line in enumerate(read_lines(path), 1) if line.strip()]
    if not found:
        raise ValueError(f"{path} is empty; expected a word list")
    return found


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")
