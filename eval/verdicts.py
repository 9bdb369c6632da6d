"""Files of verdicts: what each problem's answer was by every rule, and McNemar's test between two files.

    python -m eval.verdicts runs/A runs/B
    python -m eval.verdicts runs/A runs/B/verdicts.jsonl --rule strict --list

A line is {"id", "correct": {rule: bool}}, as a run and `python -m eval.gsm8k --out` write it. Sampled answers ("sample"
above 0) are left out: the test needs one answer a problem. A rule that one file alone has is not compared, and said so.
"""

import sys

if not __package__:  # a file by its name finds no package
    print("python -m eval.verdicts: error: type it like this, in the folder that holds eval/", file=sys.stderr)
    sys.exit(2)

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from eval.extraction import RULES
from eval.stats import mcnemar_exact
from runtime.cli import Parser, user_errors
from schedules.textlines import read_rows


class Difference(NamedTuple):
    """Two lists of verdicts by one rule, on the problems that both have."""

    rule: str
    both: int
    only_first: list[str]  # ids of problems that the first alone has right
    only_second: list[str]
    neither: int
    p: float  # McNemar's exact test, two-sided

    @property
    def problems(self) -> int:
        return self.both + len(self.only_first) + len(self.only_second) + self.neither


def read_verdicts(path: str | Path) -> dict[str, dict[str, bool]]:
    """rule -> id -> whether the greedy answer is right, of a file or of a run's folder. Raises ValueError, with the
    line, for what is no verdict, and for two on one problem."""
    path, found = Path(path), {}
    path = path / "verdicts.jsonl" if path.is_dir() else path
    for number, row in read_rows(path, nan=True):
        correct = row.get("correct") if isinstance(row, dict) else None
        if not isinstance(correct, dict) or not isinstance(row.get("id"), str | int):
            raise ValueError(f"{path}, line {number} is no verdict; expected id and correct by rule")
        for rule, right in {} if row.get("sample") else correct.items():
            by_id = found.setdefault(rule, {})
            if row["id"] in by_id:
                raise ValueError(f"{path}, line {number}: a second verdict on {row['id']}; give a file of one an id")
            by_id[row["id"]] = bool(right)
    return found


def compare(first: Mapping[str, bool], second: Mapping[str, bool], rule: str) -> Difference:
    """Two lists of verdicts, id -> whether it is right. Raises ValueError where they have no problem in common."""
    ids = [i for i in first if i in second]
    if not ids:
        raise ValueError(f"rule {rule}: the two files have no problem in common")
    only = [i for i in ids if first[i] and not second[i]], [i for i in ids if second[i] and not first[i]]
    both = sum(first[i] and second[i] for i in ids)
    return Difference(rule, both, *only, len(ids) - both - sum(map(len, only)), mcnemar_exact(*map(len, only)))


def describe(found: Difference) -> str:
    """A line for people."""
    first, second = (100 * (found.both + len(ids)) / found.problems for ids in (found.only_first, found.only_second))
    return (
        f"{found.rule:10}{first:7.2f} % {second:7.2f} %   of {found.problems:,}: both {found.both:,}, only first "
        f"{len(found.only_first):,}, only second {len(found.only_second):,}, neither {found.neither:,}; "
        f"McNemar exact p {found.p:.4g}"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(usage=None, prog="python -m eval.verdicts", description="McNemar's test between two files.")
    parser.add_argument("verdicts", nargs=2, help='two JSONL files of {"id", "correct": {rule: bool}}, or runs')
    parser.add_argument("--rule", choices=RULES, help="compare by this rule alone (default: every rule of both)")
    parser.add_argument("--list", action="store_true", help="list the problems that one file alone has right")
    given = parser.parse_args(arguments)
    with user_errors():
        first, second = map(read_verdicts, given.verdicts)
        rules = [given.rule] if given.rule else [*dict.fromkeys([*first, *second])]
        shared = [rule for rule in rules if rule in first and rule in second]
        if not shared:
            one, other = (", ".join(rules) or "none" for rules in (first, second))
            raise ValueError(f"no rule to compare by: {given.verdicts[0]} has {one}, {given.verdicts[1]} {other}")
        for rule in shared:
            a, b = first[rule], second[rule]
            print(describe(found := compare(a, b, rule)))
            if a.keys() != b.keys():
                print(f"{'':10}left out, in one file alone: {len(a.keys() - b.keys())}, {len(b.keys() - a.keys())}")
            if given.list:
                print(f"{'':10}only first: {' '.join(found.only_first) or '-'}")
                print(f"{'':10}only second: {' '.join(found.only_second) or '-'}")
        if skipped := [rule for rule in rules if rule not in shared]:
            print(f"in one file alone, not compared: {', '.join(skipped)}", file=sys.stderr)


if __name__ == "__main__":
    main()
