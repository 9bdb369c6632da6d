"""Grading of GSM8K: extraction, numeric comparison, pass@k, and the comparison of two files of outputs.

    python -m eval.gsm8k OUTPUTS.jsonl --data gsm8k
    python -m eval.gsm8k OURS.jsonl THEIRS.jsonl --data gsm8k --format code --out verdicts.jsonl

A file of outputs may be anyone's: `eval.outputs` reads ours, lm-evaluation-harness' samples, Program-of-Thought's,
ToRA's, and plain lists. An unknown id, a broken line or a missing field is an error, with its line. A problem without
an output is reported and graded wrong: leaving out the hard ones gains nothing; ``--problems 8`` grades the first 8
alone. Several outputs of one problem are an error, unless ``--k`` says that they are samples. Then each problem that
has outputs must have as many as the largest k, and pass@k is the mean of the unbiased estimator.

The rules, strict, flexible and boxed for text and code for programs, and what each does with which form of a number,
are in the head of `eval.extraction`. Every figure names its rule. ``--out`` writes each output's verdict by rule, and
`python -m eval.verdicts` compares two such files.

``--format code``: an output is a program, or holds some in fenced blocks, of which the last that runs counts. They run
in the sandbox, each alone. The answer is the last number that it printed, of a tuple or list its first element. A
program that did not end by itself with exit code 0 is invalid and wrong, whatever it printed; exit() is such an end.
"""

import sys

if not __package__:  # a file by its name finds no package
    print("python -m eval.gsm8k: error: type it like this, in the folder that holds eval/", file=sys.stderr)
    sys.exit(2)

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from functools import partial
from itertools import tee
from operator import gt, lt
from pathlib import Path
from typing import NamedTuple

from data.gsm8k import FORMATS, load_gsm8k
from data.numbers import last_number, parse_number, same_number
from eval.extraction import TEXT_RULES, programs_of
from eval.outputs import FIELDS, LAYOUTS, Sample, read_outputs
from eval.rows import write_rows
from eval.stats import mcnemar_exact, rate_difference_interval, rate_interval
from runtime.cli import Parser, user_errors
from sandbox import UNSAFE, Limits, run_many
from schedules.commandline import alive

PACKAGES_MEMORY = 2 << 30  # bytes of address space of a program that imports packages: numpy maps more than it uses

# ----------------------------------------------------------------------------------------------
# samples and scores


class Verdict(NamedTuple):
    """What became of one sample: ``answers`` and ``correct`` by rule, those of TEXT_RULES or "code"."""

    id: str
    answers: dict[str, str | None]
    correct: dict[str, bool]
    status: str  # of the program's run; empty for text


class Score(NamedTuple):
    """pass@k of one file under one rule, over all problems of the split."""

    rule: str
    k: int
    value: float
    low: float  # 95 %, see eval.stats.rate_interval: Wilson's of one answer a problem, else the bootstrap over problems
    high: float
    per_problem: tuple[float, ...]  # in the order of the problems


def check_counts(samples: Iterable[Sample], k: Sequence[int], *, name: str = "outputs") -> None:
    """Raises ValueError where a problem has two outputs and ``k`` is (1,), or fewer than the largest k."""
    counts = Counter(sample.id for sample in samples)
    if any(not isinstance(i, int) or i < 1 for i in k):
        raise ValueError(f"k={list(k)}, expected numbers of samples, 1 or more")
    for problem, count in counts.items():
        if count > 1 and tuple(k) == (1,):
            raise ValueError(f"{name}: id {problem} is there {count} times; give one output each, or --k for pass@k")
        if count < max(k):
            raise ValueError(f"{name}: id {problem} has {count} samples, pass@{max(k)} needs at least {max(k)}")


def grade_text(samples: Iterable[Sample], golds: Mapping[str, str]) -> list[Verdict]:
    """Verdicts of text outputs by every rule for text. ``golds``: id -> the gold answer."""
    verdicts = []
    for name, output in samples:
        answers = {rule: extract(output) for rule, (extract, _) in TEXT_RULES.items()}
        correct = {rule: right(read(answers[rule]), golds[name]) for rule, (_, read) in TEXT_RULES.items()}
        verdicts.append(Verdict(name, answers, correct, ""))
    return verdicts


def right(value: Fraction | None, gold: str) -> bool:
    return value is not None and same_number(value, parse_number(gold))


def grade_code(samples: Iterable[Sample], golds: Mapping[str, str], **how) -> list[Verdict]:
    """Runs each output's last program in the sandbox and compares what it printed last with the gold answer; where it
    is invalid, or prints no number, the program before it, and so on. The status is that of the program that counted,
    where none does that of the last.

    ``samples`` may be a generator that still makes them: it is read as workers get free. ``how``: workers, limits,
    progress and mode, as `sandbox.run_many` takes them."""
    source, taken = tee(samples)
    last = (programs_of(sample.output)[-1] for sample in source)
    if isinstance(samples, Sequence):
        last = list(last)  # of a known length, for the progress bar
    verdicts, earlier = [], []
    for i, (result, sample) in enumerate(zip(run_many(last, **how), taken, strict=False)):
        verdicts.append(_judge(sample.id, result, golds))
        earlier += [(i, programs_of(sample.output)[:-1])] * (verdicts[-1].status != "ok")
    while earlier := [(i, programs) for i, programs in earlier if programs]:
        results = run_many([programs.pop() for _, programs in earlier], **how)
        found = {i: _judge(verdicts[i].id, result, golds) for (i, _), result in zip(earlier, results, strict=True)}
        counts = {i: verdict for i, verdict in found.items() if verdict.status == "ok"}
        verdicts = [counts.get(i, verdict) for i, verdict in enumerate(verdicts)]
        earlier = [(i, programs) for i, programs in earlier if i not in counts]
    return verdicts


def _judge(name: str, result, golds: Mapping[str, str]) -> Verdict:
    """The verdict on one program's run."""
    value = last_number(result.stdout) if result.status == "ok" else None
    answer = None if value is None else result.stdout.rstrip().rpartition("\n")[2][:200]
    status = "no number" if result.status == "ok" and value is None else result.status
    return Verdict(name, {"code": answer}, {"code": right(value, golds[name])}, status)


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that one of k samples drawn from n, of which c are right, is right, in exact integers:

        1 - C(n-c, k) / C(n, k)

    The unbiased estimator of Chen et al., "Evaluating Large Language Models Trained on Code", 2021, equation 1. Raises
    ValueError unless 0 <= c <= n and 1 <= k <= n."""
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"n={n}, c={c}, k={k}: expected 0 <= c <= n and 1 <= k <= n")
    return float(1 - Fraction(math.comb(n - c, k), math.comb(n, k)))


def scores(verdicts: Sequence[Verdict], ids: Sequence[str], k: Sequence[int] = (1,), *, seed: int = 0) -> list[Score]:
    """pass@k for each rule and k; a problem of ``ids`` without a verdict counts 0. The interval is over problems."""
    out, n = [], Counter(v.id for v in verdicts)
    for rule in verdicts[0].correct:
        c = Counter(v.id for v in verdicts if v.correct[rule])
        for each in k:
            values = tuple(pass_at_k(n[i], c[i], each) if n[i] else 0.0 for i in ids)
            low, high = rate_interval(values, seed=seed)
            out.append(Score(rule, each, math.fsum(values) / len(values), low, high, values))
    return out


def percents(low: float, high: float, lead: str = " ", sign: str = "") -> str:
    """ " [1.20, 3.40]" of an interval of shares; "" where it is nan, as of one problem."""
    return "" if math.isnan(low) else f"{lead}[{100 * low:{sign}.2f}, {100 * high:{sign}.2f}]"


def describe_file(path: str, verdicts: Sequence[Verdict], ids: Sequence[str], found: Sequence[Score]) -> str:
    """Lines for people about one file."""
    answered = {v.id for v in verdicts}
    lines = [f"{path}: {len(verdicts):,} outputs for {len(answered):,} of {len(ids):,} problems"]
    if missing := [i for i in ids if i not in answered]:
        some = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        if len(answered) < len(ids) / 2 and missing == [*ids[len(answered) :]]:  # as --eval-problems leaves them
            some += f"; --problems {len(answered)} grades the first ones alone"
        lines.append(f"  missing, graded wrong    {len(missing):,}  {some}")
    for status, count in Counter(v.status for v in verdicts if v.status not in ("", "ok")).most_common():
        lines.append(f"  invalid program          {count:,}  {status}")
    for s in found:
        lines.append(f"  {s.rule:10}pass@{s.k:<4}{100 * s.value:11.2f} %{percents(s.low, s.high, '   95 % ')}")
    return "\n".join(lines)


def describe_difference(a: Sequence[Score], b: Sequence[Score], *, one_sample: bool) -> str:
    """Lines for people: first file minus second, problem by problem. McNemar needs one sample a problem."""
    lines = ["first minus second, paired by problem"]
    for x, y in zip(a, b, strict=True):
        ends = percents(*rate_difference_interval(x.per_problem, y.per_problem), "  95 % ", sign="+")
        line = f"  {x.rule:10}pass@{x.k:<4}{100 * (x.value - y.value):+11.2f} pp{ends}"
        if one_sample:
            first, second = (sum(map(op, x.per_problem, y.per_problem)) for op in (gt, lt))
            line += f"  McNemar exact p {mcnemar_exact(first, second):.4g} ({first} only first, {second} only second)"
        lines.append(line)
    return "\n".join(lines)


ABOUT = f"""Grade outputs for GSM8K, in any of these layouts, a line a sample, or in a .json file a list of them:
{LAYOUTS}
A problem without an output is graded wrong; --problems leaves later ones out."""


@alive()
def main(arguments: list[str] | None = None) -> None:
    parser = Parser(usage=None, prog="python -m eval.gsm8k", description=ABOUT)
    parser.add_argument("outputs", nargs="+", help="one or two files of outputs, .jsonl or .json, as above")
    known = f"what holds the output (default: the first of {', '.join(FIELDS)})"
    parser.add_argument("--field", default="", help=known)
    parser.add_argument("--data", default="gsm8k", help="gsm8k, or a folder of train.jsonl and test.jsonl")
    parser.add_argument("--split", default="test", choices=("train", "test"), help="(default: %(default)s)")
    parser.add_argument("--problems", type=int, default=0, help="grade the first so many problems alone; 0 is all")
    parser.add_argument("--format", default="text", choices=FORMATS, help="(default: %(default)s)")
    parser.add_argument("--k", type=int, nargs="+", default=[1], help="pass@k for several outputs an id (default: 1)")
    parser.add_argument("--workers", type=int, help="programs run at a time (default: one for each core)")
    parser.add_argument("--packages", action="store_true", help="programs may import installed packages, numpy for one")
    unsafe = "run programs with your own rights where the sandbox refuses to; it says what that gives away"
    parser.add_argument(f"--{UNSAFE}", action="store_true", help=unsafe)
    parser.add_argument("--out", type=Path, help="JSONL file to write: one verdict an output")
    given = parser.parse_args(arguments)
    with user_errors():
        if len(given.outputs) > 2:
            raise ValueError(f"{len(given.outputs)} files of outputs, expected one, or two to compare")
        if given.out and not given.out.parent.is_dir():
            raise ValueError(f"--out {given.out}: there is no folder {given.out.parent}")
        problems = load_gsm8k(given.data, given.split)
        if not 0 <= given.problems <= len(problems):
            raise ValueError(f"--problems {given.problems}: expected 0 to {len(problems)}, those of {given.data}")
        golds = {p.id: p.gold for p in problems[: given.problems or None]}
        ids, asked = list(golds), [p.question for p in problems]
        files, said = {}, []
        for path in given.outputs:  # all are read before any is graded: a bad second file costs no run
            found = read_outputs(path, [p.id for p in problems], asked, field=given.field, said=said)
            files[path] = [sample for sample in found if sample.id in golds]
            if left := len(found) - len(files[path]):
                said.append(f"{path}: {left:,} outputs of later problems than the first {len(ids)} are left out")
            if not files[path]:
                raise ValueError(f"{path} has no output of the first {len(ids)} problems")
            check_counts(files[path], given.k, name=path)
        print("\n".join(said), end="\n" * bool(said), file=sys.stderr)
        limits = Limits(packages=True, memory_bytes=PACKAGES_MEMORY) if given.packages else Limits()
        how = dict(workers=given.workers, limits=limits, progress="running programs" if sys.stderr.isatty() else "")
        how["mode"] = UNSAFE if given.unsafe_run_as_me else None
        grade = partial(grade_code, **how) if given.format == "code" else grade_text
        found, rows = [], []
        for path, samples in files.items():
            verdicts = grade(samples, golds)
            rows += [v._asdict() | {"file": path} for v in verdicts]
            found.append(scores(verdicts, ids, given.k))
            print(describe_file(path, verdicts, ids, found[-1]))
        if len(found) == 2:
            print(describe_difference(*found, one_sample=given.k == [1]))
        if given.out:
            write_rows(given.out, rows)


if __name__ == "__main__":
    main()
