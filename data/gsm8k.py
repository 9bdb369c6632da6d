"""GSM8K: problems, a held-out split, and training targets as words or as programs.

    python -m data.gsm8k --format code --data gsm8k --out programs.jsonl
    python -m data.gsm8k --format text --data my_folder/ --split test --out answers.jsonl

The set is Cobbe et al., "Training Verifiers to Solve Math Word Problems", 2021. Its solutions are sentences with
calculator annotations, ``48/2 = <<48/2=24>>24 clips``, and end in a line ``#### 72``.

``--format code`` turns a solution into a program by these rules, and by no model:

- Each annotation with an operation is a step: ``step_1 = 48 / 2`` under a comment, its sentence. Signs such as x, ÷ and
  20% get Python's meaning (20% = 20 / 100). An annotation without an operation (``<<5=5>>``) derives nothing and is
  skipped.
- A number in a step that an earlier step has as its result becomes that step's name (the latest one's), unless the
  question states the number too.
- Where the annotation states a rounded result (``<<10/3=3.33>>``), the step is rounded as stated: by round, math.floor
  or math.ceil to the digits shown, the first that gives it. An annotation that none of them makes true is skipped.
- In a sentence without such an annotation an equation that it spells out (``5 cows + 3 cows = 8``) is a step, if it is
  true once words and units are left out.
- The answer is the latest step that equals the gold answer. Where there is none, the last sentence may state one thing
  more: the answer as a percentage (a step times 100), which is the only arithmetic that is ever added. The gold answer
  is never written into a program: a solution whose steps do not derive it is refused.
- Every program is run in sandbox.run, and kept if what it prints equals the gold answer.
"""

import argparse
import ast
import hashlib
import json
import logging
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from eval.gsm8k import last_number, parse_number, same_number
from sandbox.run import Limits, run_many

ROWS = {"train": 7473, "test": 1319}
FORMATS = ("text", "code")
ANNOTATION = re.compile(r"<<([^<>]*)>>")
GOLD = re.compile(r"####\s*(.*)")
_TOKEN = re.compile(r"\s*(?:(\d[\d,]*\.?\d*|\.\d+)|(\*\*|//|[-+*/()\[\]{}^xX×÷−–%]))")
_NUMBER = r"[$€£]?\d[\d,]*(?:\.\d+)?%?|[$€£]?\.\d+%?"
# An equation in a sentence: at least one operation, then = and a number.
_EQUATION = re.compile(
    rf"((?:[(]\s*)*(?:{_NUMBER})(?:\s*[)])*(?:\s*(?:[-+*/x×÷−–]|[(]|[)])\s*[(]*\s*(?:{_NUMBER})?)+)\s*=\s*({_NUMBER})"
)
# What stands between its numbers: "per" units (5/day), compounds (12-inch), words; x alone is a sign.
_WORDS = re.compile(r"(?<=[\d)%])\s*/\s*[A-Za-z]+|(?<=\d)-[A-Za-z]+|(?<![A-Za-z])(?![xX]\b)[A-Za-z][A-Za-z'’]*")
_PYTHON = {
    "x": "*",
    "X": "*",
    "×": "*",
    "÷": "/",
    "−": "-",
    "–": "-",
    "^": "**",
    "[": "(",
    "]": ")",
    "{": "(",
    "}": ")",
}

log = logging.getLogger("scorecast")


@dataclass(frozen=True)
class Problem:
    id: str  # "test/17": split and position in it, from 0
    question: str
    answer_text: str  # the official solution as published, annotations and #### line included
    gold: str  # the number after ####, without commas

    @property
    def solution(self) -> str:
        """The sentences: what comes before the #### line."""
        return self.answer_text.partition("####")[0].rstrip()


# ----------------------------------------------------------------------------------------------
# reading


def load_gsm8k(source: str | Path = "gsm8k", split: str = "train") -> list[Problem]:
    """The problems of a split, "train" or "test", in the published order.

    ``source`` is "gsm8k", which is $LM_DATA/gsm8k where that is a folder and else the hub's openai/gsm8k (main) through
    ``datasets``, or a folder of train.jsonl and test.jsonl with fields question and answer. The first, and any folder
    called gsm8k, claims to be the full set and must have 7,473 or 1,319 rows. Raises ValueError, one line, for a split
    that is not there, a wrong number of rows, and a broken row, with its line.
    """
    if split not in ROWS:
        raise ValueError(f"unknown split {split!r}, expected one of {', '.join(ROWS)}")
    root = os.environ.get("LM_DATA")
    local = Path(root) / "gsm8k" if root and str(source) == "gsm8k" else Path(source)
    if str(source) == "gsm8k" and not local.is_dir():
        origin, rows = "the hub's openai/gsm8k", _hub_rows(split)
        full = True
    else:
        path = local / f"{split}.jsonl"
        origin, full = str(path), local.resolve().name == "gsm8k"
        rows = _file_rows(path)
    problems = [_problem(row, f"{split}/{i}", f"{origin} line {i + 1}") for i, row in enumerate(rows)]
    if not problems:
        raise ValueError(f"{origin} holds no problems")
    if full and len(problems) != ROWS[split]:
        raise ValueError(
            f"{origin} has {len(problems):,} rows, expected the full set's {ROWS[split]:,}; "
            "fetch it again, or give a sample a folder of another name"
        )
    return problems


def _hub_rows(split: str) -> Iterable[dict]:
    try:
        import datasets

        return datasets.load_dataset("openai/gsm8k", "main", split=split)
    except Exception as error:  # no network, no package, hub errors of several libraries
        reason = str(error).splitlines()[0][:120] if str(error) else ""
        raise ValueError(
            f"gsm8k cannot be loaded from the hub ({type(error).__name__}: {reason}); either give this machine a "
            f"network (and pip install datasets), or put train.jsonl and test.jsonl in $LM_DATA/gsm8k"
        ) from error


def _file_rows(path: Path) -> Iterable[dict]:
    try:
        # Not splitlines: the text holds characters, such as U+2028, that it would break at.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not UTF-8"
        raise ValueError(f"cannot read {path} ({why}); expected a folder with train.jsonl and test.jsonl") from None
    if not lines[-1]:
        lines.pop()
    for number, line in enumerate(lines, 1):
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} line {number} is not JSON ({error.msg})") from None


def _problem(row: dict, name: str, where: str) -> Problem:
    if not isinstance(row, dict):
        raise ValueError(f"{where} is not an object with question and answer")
    for field in ("question", "answer"):
        if not isinstance(row.get(field), str) or not row[field].strip():
            raise ValueError(f"{where} has no text in field {field!r}")
    found = GOLD.findall(row["answer"])
    value = parse_number(found[-1]) if found else None
    if value is None:
        raise ValueError(f"{where}: its answer does not end in a line '#### NUMBER'")
    return Problem(name, row["question"], row["answer"], found[-1].strip().replace(",", ""))


def split_heldout(problems: Sequence[Problem], count: int, *, seed: int = 0) -> tuple[list[Problem], list[Problem]]:
    """(rest, held out), both in the given order: the ``count`` problems with the smallest SHA-256 of seed and question.

    So a problem's place does not depend on the others' order, and two counts nest. Raises ValueError unless
    0 <= count < number of problems.
    """
    if not 0 <= count < len(problems):
        raise ValueError(f"{count} problems held out of {len(problems)}, expected at least 0 and fewer than all")
    digest = {p.id: hashlib.sha256(f"{seed}\n{p.question}".encode()).digest() for p in problems}
    chosen = set(sorted(digest, key=lambda i: (digest[i], i))[:count])
    return [p for p in problems if p.id not in chosen], [p for p in problems if p.id in chosen]


def text_target(problem: Problem, *, annotations: bool = True) -> str:
    """The words to train on: the sentences and ``#### N`` (without commas), as published.

    With ``annotations``, which a calculator in decoding needs, ``<<48/2=24>>`` is kept; without, it is taken out and
    nothing else is, so that ``48/2 = <<48/2=24>>24`` becomes ``48/2 = 24``.
    """
    words = problem.solution if annotations else ANNOTATION.sub("", problem.solution)
    return f"{words}\n#### {problem.gold}"


# ----------------------------------------------------------------------------------------------
# solutions as programs


class Conversion(NamedTuple):
    program: str | None
    reason: str  # why there is no program; empty where there is one


class Refused(ValueError):
    """A solution that does not say how its answer comes about; the message is the reason, the same for all alike."""


class _Step(NamedTuple):
    name: str
    value: Fraction  # as the program computes it
    stated: Fraction  # as the solution writes it; what later sentences use


def to_program(problem: Problem) -> Conversion:
    """The official solution as a Python program, by the rules at the head of this file. It has not been run."""
    try:
        return Conversion(_program(problem), "")
    except Refused as refusal:
        return Conversion(None, str(refusal))


def _program(problem: Problem) -> str:
    gold = parse_number(problem.gold)
    asked = {parse_number(number) for number in re.findall(r"\d[\d,]*(?:\.\d+)?|\.\d+", problem.question)}
    lines: list[str] = []
    steps: list[_Step] = []
    sentence, refused = "", ""
    for sentence in filter(str.strip, problem.solution.split("\n")):
        equations = [text for text in ANNOTATION.findall(sentence) if re.search(r"[^\s(][-+*/x].*=", text)]
        annotated = bool(equations)
        plain = ANNOTATION.sub("", sentence)
        if not annotated:
            equations = [f"{left}={right}" for left, right in _EQUATION.findall(_WORDS.sub(" ", plain))]
        lines.append(f"# {' '.join(plain.split())}")
        for equation in equations:
            try:
                step, code = _step(equation, steps, asked)
            except Refused as refusal:
                refused = refused or (str(refusal) if annotated else "")
                continue
            if step:
                steps.append(step)
                lines.append(code)
    if not steps:
        raise Refused(refused or "no step: the solution has no annotation with an operation")
    found = [step for step in steps if same_number(step.value, gold)]
    percent = [step for step in steps if same_number(100 * step.value, gold)]
    if found:
        lines.append(f"print({found[-1].name})")
    elif percent and re.search(rf"(?<![\d.]){re.escape(problem.gold)}\s*(%|percent)", sentence.replace(",", "")):
        lines += [f"percent = {percent[-1].name} * 100", "print(percent)"]
    else:
        raise Refused(refused or "no step equals the answer")
    if any("math." in line for line in lines if not line.startswith("#")):
        lines.insert(0, "import math\n")
    return "\n".join(lines) + "\n"


def _step(equation: str, steps: list[_Step], asked: set) -> tuple[_Step | None, str]:
    """The step for ``expression=value``; None where it has no operation. Raises Refused."""
    parts = [part.strip() for part in equation.split("=")]
    stated = parse_number(parts[-1])
    if stated is None:
        raise Refused("an annotation's result is not a number")
    tokens = _tokens(parts[0])
    if parts[-1].endswith("%") and "%" in parts[0]:
        stated /= 100  # 40% + 20% = 60%
    if not any(token in ("+", "-", "*", "/", "**", "//", "%") for token in tokens[1:]):
        return None, ""
    names = {step.name: step.value for step in steps}
    exact = evaluate(parts[0])
    words = [_reuse(token, steps, asked) for token in tokens]
    # The steps before may be unrounded where the sentence rounds: its own numbers are the fallback.
    for candidate in (words, tokens):
        text = _spaced(candidate)
        value = _value(text, names)
        for code, result in _roundings(text, value, parts[-1], stated):
            name = f"step_{len(steps) + 1}"
            return _Step(name, result, stated), f"{name} = {code}"
    raise Refused("an annotation is false" if exact is not None else "an annotation cannot be computed")


def evaluate(expression: str) -> Fraction | None:
    """The exact value of what an annotation computes, "48/2" or "$1,200 x 20%"; None where it is no arithmetic, or
    Python could not compute it either (a division by zero, an exponent above 64)."""
    try:
        return _value("".join(_tokens(expression)), {})
    except Refused:
        return None


def _tokens(expression: str) -> list[str]:
    """Python tokens of an annotation's left side. Raises Refused for what is not arithmetic."""
    expression = re.sub(r"[$€£]", "", expression)
    tokens: list[str] = []
    position = 0
    while position < len(expression.rstrip()):
        match = _TOKEN.match(expression, position)
        if not match:
            raise Refused("an annotation holds more than arithmetic")
        number, sign = match.groups()
        position = match.end()
        token = _literal(number) if number else _PYTHON.get(sign, sign)
        if token == "%" and not re.match(r"\s*[\d.(]", expression[position:]):  # else it is a remainder
            begin = _operand(tokens)
            tokens[begin:] = ["(", *tokens[begin:], "/", "100", ")"] if tokens else ["%"]
            continue
        if tokens and (number or token == "(") and (tokens[-1] == ")" or tokens[-1][-1].isdigit()):
            tokens.append("*")  # 2(3)
        tokens.append(token)
    if not tokens:
        raise Refused("an annotation has no expression")
    return tokens


def _operand(tokens: list[str]) -> int:
    """Where the last operand begins: at a number, or at the parenthesis that the last token closes."""
    depth = 0
    for i in range(len(tokens) - 1, -1, -1):
        depth += (tokens[i] == ")") - (tokens[i] == "(")
        if depth <= 0:
            return i
    return 0


def _literal(number: str) -> str:
    number = number.replace(",", "").rstrip(".")
    whole, point, digits = number.partition(".")
    return (whole.lstrip("0") or "0") + point + digits


def _reuse(token: str, steps: list[_Step], asked: set) -> str:
    if not token[0].isdigit() or (value := Fraction(token)) in asked:
        return token
    return next((step.name for step in reversed(steps) if step.stated == value), token)


def _spaced(tokens: list[str]) -> str:
    """Tokens as people write them: spaces around binary operators only."""
    out = ""
    for i, token in enumerate(tokens):
        binary = (
            token in ("+", "-", "*", "/", "//", "%") and i > 0 and (tokens[i - 1][-1].isalnum() or tokens[i - 1] == ")")
        )
        out += f" {token} " if binary else token
    return out


def _roundings(text: str, value: Fraction | None, shown: str, stated: Fraction) -> Iterable[tuple[str, Fraction]]:
    """(code, its value) of the ways to get the stated result from the expression, plainest first."""
    if value is None:
        return
    if same_number(value, stated):
        yield text, value
        return
    digits = len(shown.partition(".")[2].rstrip("%")) + 2 * shown.endswith("%")
    scale = 10**digits
    if abs(value - stated) * scale >= 1:  # more than a rounding away
        return
    if round(value * scale) == stated * scale:
        yield f"round({text}, {digits})" if digits else f"round({text})", stated
    for name, function in (("floor", math.floor), ("ceil", math.ceil)):
        if function(value * scale) == stated * scale:
            yield f"math.{name}(({text}) * {scale}) / {scale}" if digits else f"math.{name}({text})", stated


def _value(text: str, names: dict[str, Fraction]) -> Fraction | None:
    """Exact value of arithmetic over numbers and earlier steps; None where Python could not compute it either."""
    try:
        return _evaluate(ast.parse(text, mode="eval").body, names)
    except (SyntaxError, ZeroDivisionError, OverflowError):
        return None


def _evaluate(node: ast.expr, names: dict[str, Fraction]) -> Fraction:
    match node:
        case ast.Constant(value=int() | float() as value):
            return Fraction(str(value))
        case ast.Name(id=name):
            return names[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_evaluate(operand, names)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _evaluate(operand, names)
        case ast.BinOp(left=left, op=op, right=right):
            a, b = _evaluate(left, names), _evaluate(right, names)
            match op:
                case ast.Add():
                    return a + b
                case ast.Sub():
                    return a - b
                case ast.Mult():
                    return a * b
                case ast.Div():
                    return a / b
                case ast.FloorDiv():
                    return Fraction(a // b)
                case ast.Mod():
                    return a % b
                case ast.Pow() if b.denominator == 1 and abs(b) <= 64:
                    return a ** int(b)
    raise SyntaxError("not arithmetic")


def code_targets(
    problems: Sequence[Problem], *, workers: int | None = None, progress: bool = True
) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """(id -> program, [(id, reason it has none)]): `to_program` for each problem, kept if its run prints the gold."""
    made = {p.id: to_program(p) for p in problems}
    tried = [p for p in problems if made[p.id].program]
    refused = {p.id: made[p.id].reason for p in problems if not made[p.id].program}
    results = run_many(
        [made[p.id].program for p in tried], workers, Limits(), progress="running programs" if progress else ""
    )
    kept = {}
    for problem, result in zip(tried, results, strict=True):
        value = last_number(result.stdout)
        if result.status != "ok":
            refused[problem.id] = f"its run ended in status {result.status}"
        elif value is None or not same_number(value, parse_number(problem.gold)):
            refused[problem.id] = "its run printed another answer"
        else:
            kept[problem.id] = made[problem.id].program
    return kept, [(p.id, refused[p.id]) for p in problems if p.id in refused]


def coverage_table(problems: int, refused: Sequence[tuple[str, str]], *, examples: int = 5) -> str:
    """Lines for people: how many problems have a program, and why the others have none."""
    kept = problems - len(refused)
    lines = [f"{'programs':56}{kept:7,} of {problems:,}  {100 * kept / problems:6.2f} %"]
    for reason, count in Counter(reason for _, reason in refused).most_common():
        ids = [name for name, why in refused if why == reason]
        some = ", ".join(ids[:examples]) + (", ..." if count > examples else "")
        lines.append(f"  {reason:54}{count:7,}  {some}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    from runtime.cli import user_errors
    from runtime.folder import write_bytes

    parser = argparse.ArgumentParser(prog="python -m data.gsm8k", description="Make GSM8K's training targets.")
    parser.add_argument("--data", default="gsm8k", help="gsm8k, or a folder of train.jsonl and test.jsonl")
    parser.add_argument("--split", default="train", choices=tuple(ROWS), help="(default: %(default)s)")
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
            rows = [
                {"id": p.id, "question": p.question, "target": targets[p.id], "gold": p.gold}
                for p in problems
                if p.id in targets
            ]
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            write_bytes(given.out, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    main()
