"""GSM8K: problems, a held-out split, and training targets as words or as programs.

    python -m data.gsm8k --format code --data gsm8k --out programs.jsonl
    python -m data.gsm8k --format text --data my_folder/ --split test --out answers.jsonl

The set is Cobbe et al., "Training Verifiers to Solve Math Word Problems", 2021. Its solutions are sentences with
calculator annotations, ``48/2 = <<48/2=24>>24 clips``, and end in a line ``#### 72``.
"""

import sys

if not __package__:  # a file by its name finds no package
    print("python -m data.gsm8k: error: type it like this, in the folder that holds data/", file=sys.stderr)
    sys.exit(2)

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

from data.files import is_set, lm_data, load_hub, one_file
from data.numbers import parse_number, plain
from data.programs import ANNOTATION, Problem, code_targets, coverage_table
from runtime.cli import Parser, user_errors
from runtime.folder import write_bytes
from schedules.commandline import alive
from schedules.textlines import read_rows

PUBLISHED_ROWS = {"train": 7473, "test": 1319}
FORMATS = ("text", "code")
GOLD = re.compile(r"####\s*(.*)")
LARGEST = 10**30  # of a gold answer; floats end at 10**308, and an exponent is soon mistyped
PLAIN = re.compile(r"-?[0-9]+(\.[0-9]+)?")


def load_gsm8k(source: str | Path = "gsm8k", split: str = "train") -> list[Problem]:
    """The problems of a split, "train" or "test", in the published order.

    ``source`` is a folder of train.jsonl and test.jsonl, or .jsonl.gz, with fields question and answer, or "gsm8k":
    that is $LM_DATA/gsm8k where it is a folder, else the hub's openai/gsm8k (main). "gsm8k", or that folder, must be
    the full set. Raises ValueError, one line, for a split that is not there, a wrong number of rows, and
    a broken row, with its line."""
    if split not in PUBLISHED_ROWS:
        raise ValueError(f"unknown split {split!r}, expected one of {', '.join(PUBLISHED_ROWS)}")
    named = str(source) == "gsm8k"
    folder = (lm_data("gsm8k") if named else None) or Path(source)
    if named and not folder.is_dir():
        way_out = "put train.jsonl and test.jsonl in $LM_DATA/gsm8k"
        loaded = load_hub("gsm8k", way_out, "openai/gsm8k", "main", split=split)
        origin, rows = "the hub's openai/gsm8k", enumerate(loaded, 1)
    else:
        path = one_file(folder, (split,), (".jsonl",))
        if path is None:
            here = folder / f"{split}.jsonl"
            raise ValueError(f"cannot read {here}; expected a folder with train.jsonl and test.jsonl")
        origin, rows = str(path), read_rows(path, nan=True)
    problems = [_problem(row, f"{split}/{i}", f"{origin}, line {line}") for i, (line, row) in enumerate(rows)]
    if not problems:
        raise ValueError(f"{origin} holds no problems")
    if is_set(source, "gsm8k") and len(problems) != PUBLISHED_ROWS[split]:
        rows = f"{len(problems):,} rows, expected the full set's {PUBLISHED_ROWS[split]:,}"
        raise ValueError(f"{origin} has {rows}; fetch it again, or give a sample a folder elsewhere")
    return problems


def _problem(row: dict, name: str, where: str) -> Problem:
    if not isinstance(row, dict):
        raise ValueError(f"{where} is not an object with question and answer")
    for field in ("question", "answer"):
        if not isinstance(row.get(field), str) or not row[field].strip():
            raise ValueError(f"{where} has no text in field {field!r}")
    found = GOLD.findall(row["answer"])
    value = parse_number(found[-1]) if found else None
    if value is None or abs(value) >= LARGEST:
        raise ValueError(f"{where}: its answer does not end in a line '#### NUMBER'")
    gold = found[-1].strip().replace(",", "")
    return Problem(name, row["question"], row["answer"], gold if PLAIN.fullmatch(gold) else plain(value))


def split_heldout(problems: Sequence[Problem], count: int, *, seed: int = 0) -> tuple[list[Problem], list[Problem]]:
    """(rest, held out), both in the given order: the ``count`` problems with the smallest SHA-256 of seed and question,
    so that two counts nest. Raises ValueError unless 0 <= count < number of problems."""
    if not 0 <= count < len(problems):
        raise ValueError(f"{count} problems held out of {len(problems)}, expected at least 0 and fewer than all")
    digest = {p.id: hashlib.sha256(f"{seed}\n{p.question}".encode()).digest() for p in problems}
    chosen = set(sorted(digest, key=lambda i: (digest[i], i))[:count])
    return [p for p in problems if p.id not in chosen], [p for p in problems if p.id in chosen]


def text_target(problem: Problem, *, annotations: bool = True) -> str:
    """The words to train on: the sentences as published and ``#### N``, which the strict rule reads: of "$1,200", "−5"
    and "3/4" N is 1200, -5 and 0.75. The ``annotations``, which a calculator in decoding needs, may be left out."""
    words = problem.solution if annotations else ANNOTATION.sub("", problem.solution)
    return f"{words}\n#### {problem.gold}"


@alive()
def main(arguments: list[str] | None = None) -> None:
    parser = Parser(usage=None, prog="python -m data.gsm8k", description="Make GSM8K's training targets.")
    parser.add_argument("--data", default="gsm8k", help="gsm8k, or a folder of train.jsonl and test.jsonl")
    parser.add_argument("--split", default="train", choices=tuple(PUBLISHED_ROWS), help="(default: %(default)s)")
    parser.add_argument("--format", default="code", choices=FORMATS, help="(default: %(default)s)")
    parser.add_argument("--no-annotations", action="store_true", help="text: without the <<...>> of the calculator")
    parser.add_argument("--workers", type=int, help="programs run at a time (default: one for each core)")
    parser.add_argument("--out", type=Path, help="JSONL file to write: id, question, target, gold")
    given = parser.parse_args(arguments)
    with user_errors():
        problems = load_gsm8k(given.data, given.split)
        if given.out and not given.out.parent.is_dir():
            raise ValueError(f"--out {given.out}: there is no folder {given.out.parent}")
        if given.format == "code":
            targets, refused = code_targets(problems, workers=given.workers, progress=sys.stderr.isatty())
            print(coverage_table(len(problems), refused))
        else:
            targets = {p.id: text_target(p, annotations=not given.no_annotations) for p in problems}
            print(f"targets {len(targets):,} of {len(problems):,}")
        if given.out:
            kept = [p for p in problems if p.id in targets]
            rows = [dict(id=p.id, question=p.question, target=targets[p.id], gold=p.gold) for p in kept]
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            write_bytes(given.out, lambda file: file.write(lines.encode()))


if __name__ == "__main__":
    main()
