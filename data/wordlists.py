"""Word lists for an attack by synonyms: neighbours, stop words, antonyms, synonyms, all in lower case here.

``load_lists`` takes a folder as TextFooler's material comes in

    counterfitted_neighbors.json                      {word: [nearest first, ...]}
    stopwords_textfooler.txt                          one word a line
    counter_fitting_constraints/ppdb_antonyms.txt     two words a line
    counter_fitting_constraints/wordnet_antonyms.txt

or a file of neighbours with the others beside it: JSON as above; text lines "word neighbour neighbour ...", nearest
first; or vectors, "word x1 x2 ...", as counter-fitted-vectors.txt has them, whose neighbours are then computed.
A broken line is a ValueError with its number.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

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
        return [c for c in found if c != word and c.isalpha() and c not in self.stop_words and self._allowed(word, c)]

    def _allowed(self, a: str, b: str) -> bool:
        if (a, b) in self.antonyms or (b, a) in self.antonyms:
            return False
        return self.synonyms is None or (a, b) in self.synonyms or (b, a) in self.synonyms


class Vectors:
    """Neighbours of a word by the cosine of word vectors: at most NEAREST of at least MIN_COSINE, nearest first."""

    def __init__(self, words: list[str], vectors_ND: np.ndarray):
        self.words, self.index = words, {word: i for i, word in enumerate(words)}
        norms = np.linalg.norm(vectors_ND, axis=1, keepdims=True)
        self.vectors_ND = vectors_ND / np.maximum(norms, 1e-12)  # a zero vector is near nothing
        self._found: dict[str, list[str]] = {}

    def get(self, word: str, default: Sequence[str] = ()) -> Sequence[str]:
        if word not in self.index:
            return default
        if word not in self._found:
            cosine_N = self.vectors_ND @ self.vectors_ND[self.index[word]]
            cosine_N[self.index[word]] = -2
            order = np.argsort(-cosine_N, kind="stable")[:NEAREST]
            self._found[word] = [self.words[i] for i in order if cosine_N[i] >= MIN_COSINE]
        return self._found[word]


def load_lists(
    words: str | os.PathLike | None = None,
    stop_words: str | os.PathLike | None = None,
    antonyms: Iterable[str | os.PathLike] = (),
    synonyms: Iterable[str | os.PathLike] = (),
) -> tuple[WordLists, dict[str, str]]:
    """The lists, and the SHA-256 of each file that was read, by its name.

    ``words``: a folder, a file of neighbours, or None for $LM_DATA/textfooler. ``stop_words``: a file, None for the
    folder's, or "none". ``antonyms`` replace the folder's. Raises ValueError, with file and line, for what cannot be
    read, and where neighbours or stop words are named nowhere.
    """
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
    lists = WordLists(
        neighbours=read_neighbours(words),
        stop_words=frozenset().union(*map(read_words, stop)),
        antonyms=frozenset().union(*map(read_pairs, antonyms)),
        synonyms=frozenset().union(*map(read_pairs, synonyms)) if synonyms else None,
    )
    files = [words, *stop, *antonyms, *synonyms]
    return lists, {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def read_words(path: str | os.PathLike) -> frozenset[str]:
    """A file with one word a line."""
    return frozenset(word for (word,) in _rows(path, 1, "one word"))


def read_pairs(path: str | os.PathLike) -> frozenset[tuple[str, ...]]:
    """A file with two words a line."""
    return frozenset(_rows(path, 2, "two words"))


def _rows(path, width: int, expected: str) -> Iterator[tuple[str, ...]]:
    for number, line in _lines(path):
        row = tuple(line.lower().split())
        if len(row) != width:
            raise ValueError(f"{path} line {number}: {_short(line)}; expected {expected} a line")
        yield row


def read_neighbours(path: str | os.PathLike) -> "Mapping[str, Sequence[str]] | Vectors":
    """Neighbours from a .json file, else from lines of words or of vectors (told apart by the first line)."""
    if Path(path).suffix == ".json":
        return _neighbours_json(path)
    lines = _lines(path)
    first = lines[0][1].split()
    if len(first) > 2 and all(map(_is_number, first[1:])):
        return _vectors(path, lines, len(first) - 1)
    found: dict[str, list[str]] = {}
    for number, line in lines:
        word, *near = line.lower().split()
        if not near:
            raise ValueError(f"{path} line {number}: {_short(line)}; expected a word and its neighbours")
        if word in found:
            raise ValueError(f"{path} line {number}: {word!r} is there twice; expected one line a word")
        found[word] = near
    return found


def _neighbours_json(path) -> dict[str, list[str]]:
    text = _read(path)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} line {error.lineno} column {error.colno}: not JSON ({error.msg})") from None
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path} line 1: expected an object of words with their lists of neighbours")
    found = {}
    for word, near in content.items():
        if not isinstance(near, list) or not all(isinstance(n, str) for n in near):
            line = text.count("\n", 0, max(0, text.find(json.dumps(word, ensure_ascii=False)))) + 1
            raise ValueError(f"{path} line {line}: the neighbours of {_short(word)} are no list of words")
        found[word.lower()] = near
    return found


def _vectors(path, lines: list[tuple[int, str]], width: int) -> Vectors:
    words, rows = [], np.empty((len(lines), width), np.float32)
    for i, (number, line) in enumerate(lines):
        word, *values = line.split()
        try:
            rows[i] = [float(v) for v in values]
        except ValueError:  # not numbers, or another number of them
            raise ValueError(f"{path} line {number}: expected a word and {width} numbers") from None
        if not np.isfinite(rows[i]).all():
            raise ValueError(f"{path} line {number}: the vector of {word!r} is not finite")
        words.append(word.lower())
    return Vectors(words, rows)


def _lines(path) -> list[tuple[int, str]]:
    """Numbered lines that hold something."""
    found = [(n, line) for n, line in enumerate(_read(path).split("\n"), 1) if line.strip()]
    if not found:
        raise ValueError(f"{path} is empty; expected a word list")
    return found


def _read(path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"cannot read the word list {path} ({error.strerror})") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path} line {line}: not UTF-8 text") from None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")
