"""Where text comes from: a named set or a folder, as splits of documents.

A split is read as a stream, so that a corpus need not fit in memory, and more than once: to be hashed, to train a
tokenizer, to be tokenised. Documents that hold nothing but white space are left out.

A new named set is one entry in TEXT_SETS, at the end of this file.
"""

import hashlib
import itertools
import logging
import os
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np

from data.files import lm_data, load_hub
from schedules.commandline import nearest
from schedules.textlines import fault, read_lines, read_rows, read_text

log = logging.getLogger("scorecast")

TEXT_SPLITS = ("train", "val", "test")
WIKITEXT_FILES = {
    "train": ("train.txt", "wiki.train.raw", "wiki.train.tokens"),
    "val": ("validation.txt", "valid.txt", "wiki.valid.raw", "wiki.valid.tokens"),
    "test": ("test.txt", "wiki.test.raw", "wiki.test.tokens"),
}
_TITLE = re.compile(r"\s*= (?!= ).+ =\s*")  # of an article; those of its sections begin with = =
VAL_FROM, TEST_FROM = 0.9, 0.95  # where val and test begin among the places, 0 to 1, of text without named splits
SUFFIXES = (".txt", ".md", ".py", ".jsonl")
# train.txt, validation/, test-00001-of-00004.jsonl; not train_prefix.txt, testimony.md
_SPLIT_NAME = re.compile(r"(train|val|test)(?:ing|id|idation)?(?:[-_.]?(?:\d|part|shard|split).*)?", re.IGNORECASE)
# Kept out of pydoc: other people's packages, tests, and tables that a program wrote.
PYDOC_SKIPS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3", "encodings"}
PYDOC_SKIPS |= {"html/entities.py", "stringprep.py", "pydoc_data/topics.py", "sitecustomize.py", "usercustomize.py"}


@dataclass(frozen=True)
class Split:
    documents: Callable[[], Iterator[str]]  # a fresh stream of non-blank texts
    hash: str  # SHA-256 hex of the content
    bytes: int | None  # size of the text where known, for progress bars


@dataclass(frozen=True)
class Source:
    name: str  # fit for a file name
    origin: str  # for people: what it is and where it was read
    splits: dict[str, Split]  # those of train, val, test that were asked for and exist; "all" from open_all


def open_source(name_or_folder: str, splits: Iterable[str] = TEXT_SPLITS) -> Source:
    """The splits of a named set or a folder. A missing test split is left out; a missing train or val is an error.

    A name in TEXT_SETS is that set; a set of the hub is read from its folder in $LM_DATA where there is one. WikiText's
    documents are articles, wherever it is read. A folder gives every .txt, .md, .py (a document each) and .jsonl (a
    document a line, field "text"), packed as .gz too, recursively in the order of the paths, hidden ones aside. Files
    or folders at its top that are named train, val or test (shards such as train-00001 too) are the splits, and others
    are not read. Without such, documents are split 90/5/5 by the hash of path and line, and where there are only one or
    two, each is cut by position at line ends. What is not read is named in the log. Raises ValueError, one line, for an
    unknown name, a split that is not there, and text that cannot be read."""
    splits = tuple(splits)
    for split in splits:
        if split not in TEXT_SPLITS:
            raise ValueError(f"unknown split {split!r}; expected some of {', '.join(TEXT_SPLITS)}")
    if name_or_folder in TEXT_SETS:
        return TEXT_SETS[name_or_folder](name_or_folder, splits)
    folder = _folder(name_or_folder)
    return _open_folder(_file_name(folder), folder, splits)


def open_all(name_or_folder: str) -> Source:
    """One split, "all": the test split of a named set (or of a WikiText folder), or all text of a folder."""
    folder = None if name_or_folder in TEXT_SETS else _folder(name_or_folder)
    if folder is None or _is_wikitext(folder):
        source = open_source(name_or_folder, ("test",))
        if "test" not in source.splits:
            raise ValueError(f"{name_or_folder} has no test split ({source.origin})")
        return Source(f"{source.name}-test", source.origin, {"all": source.splits["test"]})
    return Source(_file_name(folder), str(folder), {"all": _whole(partial(_documents, folder, _text_files(folder)))})


def open_hub(
    name: str, splits: tuple, *, repository: str, configuration=None, folder: str, column="text", documents=iter
) -> Source:
    """The set in $LM_DATA/``folder``, else ``repository`` on the hub. ``documents`` makes documents of the texts in
    ``column``; by default each is one."""
    if local := lm_data(folder):
        return _open_folder(name, local, splits)
    way_out = f"put train.txt, validation.txt and test.txt in $LM_DATA/{folder}"
    loaded = load_hub(name, way_out, repository, configuration)
    found = {}
    for split in splits:
        rows = loaded.get("validation" if split == "val" else split)
        if rows is not None:
            texts = partial(_hub_documents, rows, column, documents)
            # The hub's fingerprint stands for repository, revision and split; plain rows are hashed.
            fingerprint = getattr(rows, "_fingerprint", None)
            hashed = hashlib.sha256(f"{configuration} {fingerprint}".encode()).hexdigest()
            found[split] = Split(texts, hashed, None) if fingerprint else _whole(lambda d=texts: enumerate(d()))
        elif split != "test":
            raise ValueError(f"{name} has no {split} split on the hub ({repository}); {way_out}")
    return Source(name, f"hub, {repository} {configuration or ''}".rstrip(), found)


def _hub_documents(rows, column: str, documents: Callable[[Iterable[str]], Iterator[str]]) -> Iterator[str]:
    batches = rows.iter(1000) if hasattr(rows, "iter") else [{column: [row[column] for row in rows]}]
    return filter(str.strip, documents(text for batch in batches for text in batch[column]))


def _open_wikitext_folder(name: str, folder: Path, splits: tuple[str, ...]) -> Source:
    found, word_level = {}, False
    for split in splits:
        path = next((folder / f for f in WIKITEXT_FILES[split] if (folder / f).is_file()), None)
        if path:
            try:
                with open(path, "rb") as file:
                    word_level |= b" <unk> " in file.read(1 << 20)
                    file.seek(0)
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                raise ValueError(f"cannot read {path} ({error.strerror})") from None
            found[split] = Split(lambda path=path: articles(read_lines(path, ends=True)), digest, path.stat().st_size)
        elif split != "test":
            prefix = " (train_prefix.txt is a sample of it, not the split)" if split == "train" else ""
            raise ValueError(
                f"{folder} has no {split} split: none of {', '.join(WIKITEXT_FILES[split])}{prefix}; put it there, or "
                "unset LM_DATA to load the set from the hub"
            )
    note = " (word level, rare words are <unk>: not comparable with raw WikiText)" if word_level else ""
    return Source(name, f"{folder}{note}", found)


def articles(lines: Iterable[str]) -> Iterator[str]:
    """WikiText's lines, joined to articles; together they are the text unchanged.

    An article begins at `` = Title = `` between blank lines, for there are formulas and legends that look like a title.
    What precedes the first title belongs to the first article."""
    article: list[str] = []
    titled = False
    around = itertools.chain([""], lines, ["the end"])
    for (before, line), (_, after) in itertools.pairwise(itertools.pairwise(around)):
        if _TITLE.fullmatch(line) and not before.strip() and not after.strip():
            if titled:
                yield "".join(article)
                article = []
            titled = True
        article.append(line)
    if (text := "".join(article)).strip():
        yield text


def hub_articles(texts: Iterable[str]) -> Iterator[str]:
    """Articles of the hub's rows: the file's lines, but that a blank one, " \\n" in the file, became ""."""
    return articles(text if text.endswith("\n") else (text or " ") + "\n" for text in texts)


def _is_wikitext(folder: Path) -> bool:
    """By what its files are called, or by the title that its validation or test text begins with."""
    texts = [folder / name for split in ("val", "test") for name in WIKITEXT_FILES[split] if name.endswith(".txt")]
    begins = (itertools.islice(read_lines(path), 3) for path in texts if path.is_file())
    titles = (next(filter(str.strip, lines), "") for lines in begins)
    return any(folder.glob("wiki.t*.*")) or any(map(_TITLE.fullmatch, titles))


def _open_pydoc(name: str, splits: tuple[str, ...]) -> Source:
    from pydoc_data import topics

    root = Path(sysconfig.get_path("stdlib"))
    # config-3.x-platform and _sysconfigdata hold the build's own paths: not the same on two machines
    files = _text_files(root, (".py",), PYDOC_SKIPS, (".", "config-", "_sysconfigdata"))

    def documents() -> Iterator[tuple[str, str]]:
        yield from ((f"pydoc_data/topics/{topic}", text) for topic, text in sorted(topics.topics.items()))
        yield from _documents(root, files)

    return _hash_split(name, f"the library of Python {sysconfig.get_python_version()} in {root}", splits, documents)


def _open_folder(name: str, folder: Path, splits: tuple[str, ...]) -> Source:
    if _is_wikitext(folder):
        return _open_wikitext_folder(name, folder, splits)
    files = _text_files(folder)
    named = {split: [f for f in files if _split_of(f) == split] for split in TEXT_SPLITS}
    if not any(named.values()):
        return _hash_split(name, str(folder), splits, partial(_documents, folder, files))
    for split in splits:
        if not named[split] and split != "test":
            like = [f for f in files if Path(f).name.lower().startswith(split)]
            raise ValueError(
                f"{folder} names its splits ({', '.join(s for s in TEXT_SPLITS if named[s])}) but has no {split}"
                + (f" ({Path(like[0]).name} is not one)" if like else "")
                + f"; add {split}.txt, or take the names away to have the documents split by hash"
            )
    if unnamed := [f for f in files if _split_of(f) is None]:
        _not_read(folder, unnamed, len(files))
    found = {split: _whole(partial(_documents, folder, named[split])) for split in splits if named[split]}
    return Source(name, str(folder), found)


def _folder(given: str) -> Path:
    folder = Path(given).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if folder.is_file():
        raise ValueError(f"{given} is a file; give the folder that holds it")
    expected = f"{', '.join(TEXT_SETS)}, or a folder of text{nearest(given, TEXT_SETS)}"
    raise ValueError(f"unknown data {given!r}; expected {expected}")


def _file_name(folder: Path) -> str:
    return re.sub(r"[^\w.-]+", "_", folder.name) or "root"


def _text_files(folder: Path, suffixes=SUFFIXES, skips: Iterable[str] = (), hidden=(".",)) -> list[str]:
    """Paths below ``folder``, recursively and in order, but those that are, or are in folders called, one of ``skips``
    and those with a name that begins like one of ``hidden``.

    Suffixes are of any case, and .gz after them is unpacked. Links to folders are followed, after all that lies in
    ``folder`` itself; a folder that is reached twice is read once. What else is there is named in the log."""

    def fail(error: OSError):
        raise ValueError(f"cannot read {error.filename} ({error.strerror})")

    files, others, tops, seen = [], [], [folder], set()
    while tops:
        for base, folders, names in os.walk(tops.pop(0), onerror=fail):
            here = Path(base)
            if (real := os.path.realpath(base)) in seen:
                others.append(here.relative_to(folder).as_posix() + "/ (read already)")
                folders.clear()
                continue
            seen.add(real)
            shown = [d for d in sorted(folders) if d not in skips and not d.startswith(hidden)]
            tops += [here / d for d in shown if os.path.islink(here / d)]
            folders[:] = [d for d in shown if not os.path.islink(here / d)]
            for name in (n for n in names if not n.startswith(hidden)):
                kept = files if _suffix(name) in suffixes else others
                kept.append((here / name).relative_to(folder).as_posix())
    if not files:
        raise ValueError(f"{folder} holds no text: no {', '.join(suffixes)} file")
    if suffixes == SUFFIXES and others:
        _not_read(folder, others, len(others) + len(files))
    return sorted(set(files).difference(skips))


def _not_read(folder: Path, names: list[str], of: int) -> None:
    some = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
    log.warning("%s: %d of %d files are not read: %s", folder, len(names), of, some)


def _suffix(name: str) -> str:
    """Of a file's name, in lower case and before .gz."""
    return Path(name.lower().removesuffix(".gz")).suffix


def _split_of(file: str) -> str | None:
    top, _, inside = file.partition("/")
    stem = Path(top.lower().removesuffix(".gz")).stem
    match = _SPLIT_NAME.fullmatch(top if inside else stem)
    return match[1].lower() if match else None


def _documents(folder: Path, files: list[str]) -> Iterator[tuple[str, str]]:
    """(identity, text): the path relative to ``folder``, and the line in a .jsonl. Those of blanks alone are left out,
    and their number is said."""
    blank = []
    for identity in files:
        file = folder / identity
        if _suffix(identity) != ".jsonl":
            if (text := read_text(file)).strip():
                yield identity, text
            else:
                blank.append(identity)
            continue
        for number, row in read_rows(file, nan=True):
            text = row.get("text") if isinstance(row, dict) else None
            if not isinstance(text, str):
                raise fault(file, number, 'no object with "text"')
            if text.strip():
                yield f"{identity}#{number}", text
            else:
                blank.append(f"{identity}#{number}")
    if blank:
        _say_blank(folder, len(blank), blank[0])


@cache  # a folder is read more than once
def _say_blank(folder: Path, count: int, first: str) -> None:
    log.warning("%s: documents without text are left out: %d, the first is %s", folder, count, first)


def _whole(documents: Callable[[], Iterable[tuple[str, str]]]) -> Split:
    """All of ``documents`` as one split; reads them once, for the hash."""
    digest, size = hashlib.sha256(), 0
    for identity, text in documents():
        raw = text.encode()
        digest.update(f"{identity}\0{len(raw)}\0".encode() + raw)
        size += len(raw)
    return Split(lambda: (text for _, text in documents()), digest.hexdigest(), size)


def _unit(identity: str) -> float:
    return int.from_bytes(hashlib.sha256(identity.encode()).digest()[:6], "big") / 2**48


def _hash_split(
    name: str, origin: str, splits: tuple[str, ...], documents: Callable[[], Iterable[tuple[str, str]]]
) -> Source:
    """Train, val and test by the place of each document's identity between 0 and 1: below 0.9, below 0.95, above.

    Where val or test would be empty, the documents nearest to it move. One or two documents are cut, each, by position
    at line ends: 90 % train, 5 % val, 5 % test."""
    units = np.sort([_unit(identity) for identity, _ in documents()])
    if not len(units):
        raise ValueError(f"{name} holds no text ({origin})")
    if len(units) < len(TEXT_SPLITS):
        parts_of = _cut_by_position
    else:
        tests = max(1, int((units >= TEST_FROM).sum()))
        vals = max(1, int(((units >= VAL_FROM) & (units < TEST_FROM)).sum()))
        while tests + vals >= len(units):  # keeps a document for train, in corpora of a handful
            tests, vals = (tests - 1, vals) if tests >= vals else (tests, vals - 1)
        test_from, val_from = units[-tests], units[-tests - vals]

        def parts_of(identity: str, text: str) -> dict[str, str]:
            unit = _unit(identity)
            return {"test" if unit >= test_from else "val" if unit >= val_from else "train": text}

    def stream(split: str) -> Iterator[tuple[str, str]]:
        return ((i, part) for i, text in documents() if (part := parts_of(i, text).get(split, "")).strip())

    found = {split: _whole(partial(stream, split)) for split in splits}
    for split, part in found.items():
        if not part.bytes:
            raise ValueError(
                f"{name} is too short to cut a {split} split from its last lines; add documents, or name train.txt, "
                "val.txt and test.txt"
            )
    return Source(name, origin, found)


def _cut_by_position(_: str, text: str) -> dict[str, str]:
    """At line ends; where these leave a part without text, as in one long line, at blanks, else anywhere."""
    for mark in ("\n", " ", ""):

        def end(share: float, least: int = 0, mark=mark) -> int:
            at = max(least, int(len(text) * share))
            return at if not mark else text.find(mark, at) + 1 or len(text)

        first = end(VAL_FROM)
        second = end(TEST_FROM, first)
        parts = {"train": text[:first], "val": text[first:second], "test": text[second:]}
        if all(part.strip() for part in parts.values()):
            break
    return parts


_wikitext = partial(open_hub, repository="Salesforce/wikitext", documents=hub_articles)

# Name -> what opens its splits: called with the name and the splits, it gives a Source.
TEXT_SETS: dict[str, Callable[[str, tuple[str, ...]], Source]] = {
    "pydoc": _open_pydoc,
    "wikitext2": partial(_wikitext, configuration="wikitext-2-raw-v1", folder="wikitext-2"),
    "wikitext103": partial(_wikitext, configuration="wikitext-103-raw-v1", folder="wikitext-103"),
}
TEXT_NAMES = tuple(TEXT_SETS)
