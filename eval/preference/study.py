"""Makes the page of a study, and the key that says which side is which arm.

An arm is a run's folder (its predictions-*.jsonl, or the samples of train_lm.py), or a file of rows {"id" or "index",
"prediction"}. Items are matched by id, else by index, else by prompt. Each item shows one pair of arms; the pairs are
spread evenly over the items, and each arm of a pair stands left on half of them. Some pairs more are attention checks:
a text beside itself with its words shuffled.
"""

import base64
import hashlib
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from eval.rows import rows_with_places
from runtime.folder import write_json
from runtime.staging import staged
from schedules.textlines import read_json, read_text

QUESTIONS = ("Which text is more fluent?", "Which text is more informative?")
SPLITS = ("test", "val", "ood")
KEYS = ("id", "index", "prompt")
TEXTS = ("prediction", "text")
SOURCES = ("source", "article", "document", "prompt")
PAGE, KEY = "study.html", "KEY.json"


class Text(NamedTuple):
    """What an arm wrote for one item. ``source`` and ``reference`` are "" where its file has none."""

    text: str
    source: str = ""
    reference: str = ""


class Study(NamedTuple):
    """``page``: what the raters' page shows, ``key``: what it must not show, ``said``: a line for each thing that was
    left out or done otherwise than asked for."""

    page: dict
    key: dict
    said: list[str]


def add_flags(add) -> None:
    add("arms", nargs="+", type=Path, metavar="RUN", help="two or more runs, or files of predictions")
    add("--items", type=int, default=200, help="pairs to judge (default: 200)")
    add("--checks", type=int, default=6, help="attention checks more (default: 6)")
    add("--question", action="append", metavar="TEXT", help="a question, repeatable (default: fluent, informative)")
    add("--sources", type=Path, metavar="FILE", help="rows with id or index and the source text, shown with each pair")
    add("--split", choices=SPLITS, help="whose predictions (default: the first of these that all runs have)")
    add("--seed", type=int, default=0, help="which items, pairs and sides (default: 0)")
    add("--out", type=Path, default=Path("preference"), help="folder of the study (default: preference)")


def run(args) -> None:
    files = files_of(args.arms, args.split)
    arms = read_arms(files, names_of(args.arms), args.sources)
    questions = args.question or QUESTIONS
    study = build(arms, items=args.items, checks=args.checks, questions=questions, seed=args.seed)
    write(args.out, study)
    for line in study.said:
        print(line, file=sys.stderr)
    shown = len(study.page["items"])
    print(f"{args.out / PAGE}: {shown - args.checks} pairs of {len(arms)} arms and {args.checks} checks")
    print(f"Give raters this file alone; {args.out / KEY} says which side is which arm and stays with you.")


def files_of(paths: Sequence[Path], split: str | None = None) -> list[Path]:
    """The file of each arm: of run folders the predictions of one split that all have, else their samples. Raises
    ValueError where there is none, for fewer than two arms and for one given twice."""
    runs = [path for path in paths if path.is_dir()]
    names = [f"predictions-{s}.jsonl" for s in ([split] if split else SPLITS)] + ["samples.json"] * (not split)
    name = next((n for n in names if all((run / n).is_file() for run in runs)), None)
    if name is None:
        bare = next(run for n in names for run in runs if not (run / n).is_file())
        raise ValueError(f"no file that all runs have, {bare} for one; expected one of {', '.join(names)} in each")
    files = [path / name if path.is_dir() else path for path in paths]
    if len(files) < 2:
        raise ValueError(f"one arm, {paths[0]}; expected two or more to compare")
    if twice := [str(path) for path, count in Counter(file.resolve() for file in files).items() if count > 1]:
        raise ValueError(f"{twice[0]} is given twice; give each arm once")
    return files


def names_of(paths: Sequence[Path]) -> list[str]:
    """The arms' names: their folders' or files', or their whole paths where two have one."""
    names = [path.resolve().name if path.is_dir() else path.stem for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def read_arms(files: Sequence[Path], names: Sequence[str], sources: Path | None = None) -> dict[str, dict[str, Text]]:
    """name -> item -> its text. ``sources``: a file of source texts, which go before the arms' own.

    Raises ValueError for a row without text, for rows that cannot be matched, and for an item whose reference or source
    is not the same in two arms, which then are of different data."""
    own = {file: _rows_of(file, TEXTS) for file in files}
    more = {sources: _rows_of(sources, SOURCES)} if sources else {}
    key = _key_of(own | more)
    given = {str(row[key]): _first(row, SOURCES) for rows in more.values() for row in rows}
    arms, seen = {}, {}
    for name, (file, rows) in zip(names, own.items(), strict=True):
        arms[name] = {}
        for row in rows:
            item = str(row[key])
            reference = _first(row, ("reference",)) or ""
            text = Text(_first(row, TEXTS), given.get(item) or _first(row, SOURCES) or "", reference)
            for what in ("source", "reference"):
                first, value = seen.setdefault((item, what), (file, getattr(text, what)))
                if value and getattr(text, what) and value != getattr(text, what):
                    raise ValueError(f"{key} {item} has one {what} in {first} and another in {file}: not the same data")
            arms[name][item] = text
    return arms


def _rows_of(file: Path, columns: Sequence[str]) -> list[dict]:
    """The objects of a JSONL file, or of a list in a .json file, each with a text in one of ``columns``."""
    rows = [*rows_with_places(file)]
    for where, row in rows:
        if not isinstance(row, dict) or _first(row, columns) is None:
            raise ValueError(f"{where}: no text, expected an object with id or index and {' or '.join(columns)}")
    if not rows:
        raise ValueError(f"{file} holds no rows")
    return [row for _, row in rows]


def _first(row: dict, columns: Sequence[str]) -> str | None:
    """The first text that ``row`` has."""
    return next((row[column] for column in columns if isinstance(row.get(column), str)), None)


def _key_of(files: Mapping[Path, list[dict]]) -> str:
    """The field that every row has and that tells the rows of each file apart."""
    why = []
    for key in KEYS:
        for file, rows in files.items():
            ids = [row.get(key) for row in rows]
            if bad := next((i for i, v in enumerate(ids, 1) if type(v) not in (str, int)), 0):
                why.append(f"row {bad} of {file} has no {key}")
                break
            if (most := Counter(map(str, ids)).most_common(1)[0])[1] > 1:
                why.append(f"{file} has {key} {most[0][:40]!r} {most[1]} times")
                break
        else:
            return key
    raise ValueError(f"the rows cannot be matched: {', '.join(why)}; expected id or index in each row, once a file")


def shuffled(text: str, rng: random.Random) -> str | None:
    """``text`` with its words in another order, or its characters where it has fewer than five words; None where there
    is no other order."""
    pieces, join = (words, " ") if len(words := text.split()) >= 5 else (list(text.strip()), "")
    for _ in range(20):
        mixed = rng.sample(pieces, len(pieces))
        if mixed != pieces and sum(a != b for a, b in zip(mixed, pieces, strict=True)) > len(pieces) / 2:
            return join.join(mixed)
    return None


def build(
    arms: Mapping[str, Mapping[str, Text]],
    *,
    items: int = 200,
    checks: int = 6,
    questions: Sequence[str] = QUESTIONS,
    seed: int = 0,
) -> Study:
    """A study of ``arms``, name -> item -> text, see the head of this file. The same arguments make the same one.

    Items on which two arms wrote the same text do not show them beside each other: such a pair has no answer. Raises
    ValueError where no item is left, where too few texts can be shuffled for the checks, and for numbers below their
    range and questions that are blank or equal."""
    if items < 1 or checks < 0:
        raise ValueError(f"--items {items}, --checks {checks}: expected 1 or more pairs and 0 or more checks")
    questions = [" ".join(question.split()) for question in questions]
    if not all(questions) or len(set(questions)) < len(questions):
        raise ValueError(f"questions {questions}: expected texts, each another one")
    names, texts, rng = list(arms), list(arms.values()), random.Random(seed)
    common = [item for item in texts[0] if all(item in of for of in texts)]
    if not common:
        some = ", ".join(f"{name} has {next(iter(of))[:40]!r}" for name, of in arms.items())
        raise ValueError(f"the arms have no item in common: {some}; give arms of the same data")
    alone = [f"{len(of) - len(common)} items of {name}" for name, of in arms.items() if len(of) > len(common)]
    said = [f"left out, without a partner: {some}" for some in alone]
    rng.shuffle(common)
    asked = _pairs(texts, common, items, rng, names, said)
    both = [(entry, "") for entry in asked] + _checks(texts, common, checks, rng, {entry["id"] for entry in asked})
    rng.shuffle(both)
    shown, keyed, referred = [], [], 0
    for number, (entry, broken) in enumerate(both, 1):
        sides = {side: texts[entry[side]][entry["id"]].text for side in ("left", "right")}
        sides |= {entry["broken"]: broken} if broken else {}
        found = [of[entry["id"]] for of in texts]
        source = next((text.source for text in found if text.source), "")
        reference = next((text.reference for text in found if text.reference), "")
        referred += bool(reference and not source)
        label = "Source" if source else "Reference"
        shown.append({"item": str(number), "label": label, "source": source or reference} | sides)
        keyed.append({"item": str(number)} | entry)
    bare = sum(not item["source"] for item in shown)
    for count, what in ((referred, "the reference is shown"), (bare, "and no reference either")):
        said += [f"no source text, {what}: {count} of {len(shown)} pairs (--sources FILE gives it)"] if count else []
    key = {"arms": names, "questions": questions, "seed": seed, "left_out": said, "items": keyed}
    page = {"questions": questions, "items": shown}
    name = hashlib.sha256(json.dumps([page, key]).encode()).hexdigest()[:12]
    return Study({"study": name} | page, {"study": name} | key, said)


def _pairs(texts, common: Sequence[str], items: int, rng: random.Random, names: Sequence[str], said: list[str]):
    """An entry of the key for each item that is asked about: its id and the arms on its sides."""
    pairs = rng.sample(every := list(combinations(range(len(texts)), 2)), len(every))
    taken, begin, asked, equal = dict.fromkeys(every, 0), {pair: rng.randrange(2) for pair in pairs}, [], 0
    for item in common:
        differ = [(a, b) for a, b in pairs if texts[a][item].text.split() != texts[b][item].text.split()]
        equal += not differ
        if differ and len(asked) < items:
            pair = min(differ, key=taken.__getitem__)
            left, right = pair if (taken[pair] + begin[pair]) % 2 else pair[::-1]
            taken[pair] += 1
            asked.append({"id": item, "left": left, "right": right})
    if not asked:
        raise ValueError(f"the arms wrote the same text for each of their {len(common)} items; nothing to compare")
    said += [f"left out, all arms wrote the same: {equal} of {len(common)} items"] if equal else []
    said += [f"--items {items}: there are {len(asked)}, all of them are taken"] if len(asked) < items else []
    if max(taken.values()) - min(taken.values()) > 1:
        counts = ", ".join(f"{names[a]} and {names[b]} {count}" for (a, b), count in taken.items())
        said.append(f"the pairs of arms are not balanced, where two wrote the same: {counts}")
    return asked


def _checks(texts, common: Sequence[str], checks: int, rng: random.Random, asked: set[str]) -> list[tuple[dict, str]]:
    """(entry of the key, shuffled text) of each check, of items that are not ``asked`` about as far as there are."""
    found, sides = [], rng.sample(("left", "right"), 2)
    for item in sorted(common, key=asked.__contains__):
        arm = len(found) % len(texts)
        if len(found) < checks and (broken := shuffled(texts[arm][item].text, rng)):
            found.append(({"id": item, "left": arm, "right": arm, "broken": sides[len(found) % 2]}, broken))
    if len(found) < checks:
        raise ValueError(f"--checks {checks}: only {len(found)} texts can be shuffled; give fewer checks")
    return found


def to_html(page: dict) -> str:
    """The page as one file, which fetches nothing and runs no script but its own: others' texts are data in it."""
    html = read_text(Path(__file__).with_name("page.html"))
    policy = "default-src 'none'; base-uri 'none'; form-action 'none'"
    for tag in ("style", "script"):
        digest = hashlib.sha256(re.search(f"<{tag}>(.*)</{tag}>", html, re.S)[1].encode()).digest()
        policy += f"; {tag}-src 'sha256-{base64.b64encode(digest).decode()}'"
    data = json.dumps(page, ensure_ascii=False).replace("<", "\\u003c")
    return html.replace("{{policy}}", policy).replace("{{data}}", data)


def write(out: Path, study: Study) -> None:
    """``out``/study.html and ``out``/KEY.json. Raises ValueError where another study is there."""
    name = study.key["study"]
    there = read_json(out / KEY, dict).get("study") if (out / KEY).exists() else None
    page = read_text(out / PAGE) if (out / PAGE).exists() else name
    if there not in (None, name) or name not in page:
        raise ValueError(f"{out} holds another study{f', {there}' if there else ''}; give another --out")
    with staged(out, last=PAGE) as folder:
        (folder / PAGE).write_text(to_html(study.page), encoding="utf-8", newline="\n")
        write_json(folder / KEY, study.key)
