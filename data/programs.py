"""GSM8K's solutions as programs, by these rules and by no model.

- Each annotation with an operation is a step: ``step_1 = 48 / 2`` under a comment, its sentence. Signs such as x, ÷ and
  20% get Python's meaning (20% = 20 / 100). An annotation without an operation (``<<5=5>>``) derives nothing and is
  skipped.
- A number in a step that an earlier step has as its result becomes that step's name (the latest one's), unless the
  question states the number too.
- Where the annotation states a rounded result (``<<10/3=3.33>>``), the step is rounded as stated: by round, math.floor
  or math.ceil to the digits shown, the first that gives it. An annotation that none of them makes true is skipped.
- In a sentence without such an annotation, an equation that it spells out (``5 cows + 3 cows = 8``) is a step, if it is
  true once words and units are left out.
- The answer is the latest step that equals the gold answer, else a step times 100 if the last sentence states the
  answer as a percentage. No other arithmetic is added. The gold answer is never written into a program: a solution
  whose steps do not derive it is refused.
- Every program is run in the sandbox, and kept if what it prints equals the gold answer.
"""

import ast
import itertools
import math
import operator
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from data.numbers import last_number, parse_number, same_number
from sandbox.run import Limits, run_many

ANNOTATION = re.compile(r"<<([^<>]*)>>")
# What a calculation may hold: GSM8K's longest annotation has 30 characters, its longest sentence 350, 9 annotations.
MAX_EXPONENT, MAX_BITS, MAX_LENGTH, MAX_SENTENCE, MAX_TRIED = 64, 4096, 100, 1000, 30
_OPERATION = re.compile(r"[^\s(][-+*/x]")
_TOKEN = re.compile(r"\s*(?:(\d[\d,]*\.?\d*|\.\d+)|(\*\*|//|[-+*/()\[\]{}^xX×÷−–%]))")
_AMOUNT = r"[$€£]?\d[\d,]*(?:\.\d+)?%?|[$€£]?\.\d+%?"
# An equation in a sentence: at least one operation, then = and a number. Nothing is given back and tried again (*+).
_EQUATION = re.compile(
    rf"((?:[(]\s*+)*+(?:{_AMOUNT})(?:\s*+[-+*/x×÷−–()]\s*+[(]*+\s*+(?:{_AMOUNT})?+)++)\s*+=\s*+({_AMOUNT})"
)
# What stands between its numbers: "per" units (5/day), compounds (12-inch), words; x alone is a sign.
_WORDS = re.compile(r"(?<=[\d)%])\s*/\s*[A-Za-z]+|(?<=\d)-[A-Za-z]+|(?<![A-Za-z])(?![xX]\b)[A-Za-z][A-Za-z'’]*")
_PYTHON_SIGNS = {"x": "*", "X": "*", "×": "*", "÷": "/", "−": "-", "–": "-", "^": "**"}
_PYTHON_SIGNS |= {"[": "(", "]": ")", "{": "(", "}": ")"}
_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
_OPERATORS |= {ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.UAdd: operator.pos, ast.USub: operator.neg}


@dataclass(frozen=True)
class Problem:
    id: str  # "test/17": split and position in it, from 0
    question: str
    answer_text: str  # the official solution as published, annotations and #### line included
    gold: str  # the number after ####, as digits, a minus and a point

    @property
    def solution(self) -> str:
        """The sentences: what comes before the #### line."""
        return self.answer_text.partition("####")[0].rstrip()


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
    asked = {parse_number(number) for number in set(re.findall(r"\d[\d,]*(?:\.\d+)?|\.\d+", problem.question))}
    lines: list[str] = []
    steps: list[_Step] = []
    sentence, refused, tried = "", "", 0
    for sentence in filter(str.strip, problem.solution.split("\n")):
        annotations = [text for text in ANNOTATION.findall(sentence) if _OPERATION.search(text.rpartition("=")[0])]
        plain = ANNOTATION.sub("", sentence)
        lines.append(f"# {' '.join(plain.split())}")
        spelt = []
        if not annotations and len(plain) > MAX_SENTENCE:
            refused = refused or f"no step in a sentence of more than {MAX_SENTENCE} characters"
        elif not annotations:
            spelt = map("=".join, _EQUATION.findall(_WORDS.sub(" ", plain)))
        for equation in annotations or spelt:
            tried += 1
            if tried > MAX_TRIED:
                raise Refused(f"more than {MAX_TRIED} calculations")
            try:
                if found := _step(equation, steps, asked):
                    steps.append(found[0])
                    lines.append(found[1])
            except Refused as refusal:
                refused = refused or (str(refusal) if annotations else "")
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


def _step(equation: str, steps: list[_Step], asked: set) -> tuple[_Step, str] | None:
    """The step for ``expression=value`` and its line; None where it has no operation. Raises Refused."""
    parts = [part.strip() for part in equation.split("=")]
    stated = parse_number(parts[-1])
    if stated is None:
        raise Refused("an annotation's result is not a number")
    tokens = _tokens(parts[0])
    if parts[-1].endswith("%") and "%" in parts[0]:
        stated /= 100  # 40% + 20% = 60%
    if not any(token in ("+", "-", "*", "/", "**", "//", "%") for token in tokens[1:]):
        return None
    values, name = {step.name: step.value for step in steps}, f"step_{len(steps) + 1}"
    # The steps before may be unrounded where the sentence rounds: its own numbers are the fallback.
    for text in dict.fromkeys(map(_spaced, ([_reuse(token, steps, asked) for token in tokens], tokens))):
        value = _value(text, values)
        if found := _rounded(text, value, parts[-1], stated):
            return _Step(name, found[1], stated), f"{name} = {found[0]}"
    raise Refused("an annotation is false" if value is not None else "an annotation cannot be computed")


def work_out(expression: str) -> Fraction | None:
    """The exact value of what an annotation computes, "48/2" or "$1,200 x 20%"; None where it is no arithmetic, divides
    by zero, has an exponent above MAX_EXPONENT, more than MAX_LENGTH characters, or a value of more than MAX_BITS."""
    try:
        return _value("".join(_tokens(expression)), {})
    except Refused:
        return None


def _tokens(expression: str) -> list[str]:
    """Python tokens of an annotation's left side. Raises Refused for what is not arithmetic, or too long."""
    if len(expression) > MAX_LENGTH:
        raise Refused(f"an annotation has more than {MAX_LENGTH} characters")
    expression = re.sub(r"[$€£]", "", expression).rstrip()
    tokens: list[str] = []
    position = 0
    while position < len(expression):
        match = _TOKEN.match(expression, position)
        if not match:
            raise Refused("an annotation holds more than arithmetic")
        number, sign = match.groups()
        position = match.end()
        token = _PYTHON_SIGNS.get(sign, sign)
        if number:  # as Python takes it: 1,200 and 007. and .5 are 1200, 7 and 0.5
            token = number.replace(",", "").rstrip(".").lstrip("0")
            token = token if token[:1].isdigit() else "0" + token
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
    for i in reversed(range(len(tokens))):
        depth += (tokens[i] == ")") - (tokens[i] == "(")
        if depth <= 0:
            return i
    return 0


def _reuse(token: str, steps: list[_Step], asked: set) -> str:
    if not token[0].isdigit() or (value := Fraction(token)) in asked:
        return token
    return next((step.name for step in reversed(steps) if step.stated == value), token)


def _spaced(tokens: list[str]) -> str:
    """Tokens as people write them: spaces around binary operators only."""
    out = tokens[0]
    for before, token in itertools.pairwise(tokens):
        binary = (before[-1].isalnum() or before == ")") and token in ("+", "-", "*", "/", "//", "%")
        out += f" {token} " if binary else token
    return out


def _rounded(text: str, value: Fraction | None, shown: str, stated: Fraction) -> tuple[str, Fraction] | None:
    """(code, its value) of the plainest way to get the stated result from the expression; None where there is none."""
    if value is None:
        return None
    if same_number(value, stated):
        return text, value
    digits = len(shown.partition(".")[2].rstrip("%")) + 2 * shown.endswith("%")
    scale = 10**digits
    ways = {round: f"round({text}, {digits})" if digits else f"round({text})"}
    for function in (math.floor, math.ceil):
        call = f"math.{function.__name__}"
        ways[function] = f"{call}(({text}) * {scale}) / {scale}" if digits else f"{call}({text})"
    near = abs(value - stated) * scale < 1  # else it is more than a rounding away
    codes = (code for function, code in ways.items() if near and function(value * scale) == stated * scale)
    return next(((code, stated) for code in codes), None)


def _value(text: str, names: dict[str, Fraction]) -> Fraction | None:
    """Exact value over numbers and earlier steps; None where Python could not compute it either, or not at once."""
    try:
        return _evaluate(ast.parse(text, mode="eval").body, names)
    except (SyntaxError, ZeroDivisionError, OverflowError, RecursionError):
        return None


def _evaluate(node: ast.expr, names: dict[str, Fraction]) -> Fraction:
    """Raises SyntaxError for what is no arithmetic, OverflowError for a value that is too large."""
    value = _apply(node, names)
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise OverflowError("more than MAX_BITS")
    return value


def _apply(node: ast.expr, names: dict[str, Fraction]) -> Fraction:
    match node:
        case ast.Constant(value=int() | float() as value) if math.isfinite(value):
            return Fraction(str(value))
        case ast.Name(id=name):
            return names[name]
        case ast.UnaryOp(op=op, operand=operand) if function := _OPERATORS.get(type(op)):
            return function(_evaluate(operand, names))
        case ast.BinOp(left=left, op=op, right=right):
            a, b = _evaluate(left, names), _evaluate(right, names)
            if isinstance(op, ast.Pow) and b.denominator == 1 and abs(b) <= MAX_EXPONENT:
                return a ** int(b)
            if function := _OPERATORS.get(type(op)):
                return Fraction(function(a, b))
    raise SyntaxError("not arithmetic")


def code_targets(
    problems: Sequence[Problem], *, workers: int | None = None, progress: bool = True
) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """(id -> program, [(id, reason it has none)]): `to_program` for each problem, kept if its run prints the gold."""
    made = {p.id: to_program(p) for p in problems}
    tried = [p for p in problems if made[p.id].program]
    running = "running programs" if progress else ""
    results = run_many([made[p.id].program for p in tried], workers, Limits(), progress=running)
    refused = {name: conversion.reason for name, conversion in made.items() if not conversion.program}
    for problem, result in zip(tried, results, strict=True):
        value = last_number(result.stdout)
        if result.status != "ok":
            refused[problem.id] = f"its run ended in status {result.status}"
        elif value is None or not same_number(value, parse_number(problem.gold)):
            refused[problem.id] = "its run printed another answer"
    kept = {p.id: made[p.id].program for p in tried if p.id not in refused}
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
