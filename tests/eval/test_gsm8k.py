"""GSM8K: reading, targets as words and as programs, grading; against published outputs and verdicts where they are."""

import itertools
import json
import math
import os
import sys
from fractions import Fraction
from pathlib import Path

import pytest

from data.gsm8k import PUBLISHED_ROWS, load_gsm8k, split_heldout, text_target
from data.gsm8k import main as data_main
from data.numbers import last_number, parse_number, plain, same_number
from data.programs import Problem, code_targets, coverage_table, to_program, work_out
from eval.gsm8k import Sample, check_counts, grade_code, grade_text, main, pass_at_k, read_outputs, scores
from eval.stats import mcnemar_exact
from sandbox import Limits


def problem(answer: str, question: str = "How many?", name: str = "train/0") -> Problem:
    return Problem(name, question, answer, answer.rpartition("####")[2].strip())


@pytest.fixture
def folder(tmp_path):
    """A set of six problems in the published form, each its own sum."""
    for split in ("train", "test"):
        rows = [
            {"question": f"What is {i} and 10?", "answer": f"It is {i}+10=<<{i}+10={i + 10}>>{i + 10}.\n#### {i + 10}"}
            for i in range(6)
        ]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.fixture(scope="module")
def published():
    root = os.environ.get("LM_DATA")
    if not root or not (Path(root) / "gsm8k_outputs").is_dir():
        pytest.skip("LM_DATA is unset or has no gsm8k and gsm8k_outputs")
    return Path(root)


def json_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


# ----------------------------------------------------------------------------------------------
# reading


def test_folder(folder):
    problems = load_gsm8k(folder, "test")
    assert len(problems) == 6 and problems[2].id == "test/2" and problems[2].gold == "12"
    assert problems[2].solution == "It is 2+10=<<2+10=12>>12."
    assert text_target(problems[2]) == "It is 2+10=<<2+10=12>>12.\n#### 12"
    assert text_target(problems[2], annotations=False) == "It is 2+10=12.\n#### 12"


@pytest.mark.parametrize(
    "line, error",
    [
        ('{"question": "a"}', "line 3 has no text in field 'answer'"),
        ('{"question": 5, "answer": "#### 5"}', "line 3 has no text in field 'question'"),
        ('{"question": "a", "answer": "so 5"}', "line 3: its answer does not end in a line '#### NUMBER'"),
        ('{"question": "a", "answer": "#### many"}', "line 3: its answer does not end"),
        ('{"question": "a"', "line 3 is not JSON"),
        ("", "line 3 is not JSON"),
        ("[1]", "line 3 is not an object"),
    ],
)
def test_a_broken_row_is_named_by_its_line(folder, line, error):
    lines = (folder / "train.jsonl").read_text().split("\n")
    (folder / "train.jsonl").write_text("\n".join([*lines[:2], line, *lines[2:]]))
    with pytest.raises(ValueError, match=error):
        load_gsm8k(folder, "train")


@pytest.mark.parametrize(
    "written, gold",
    [("18", "18"), ("1,234", "1234"), ("$1,200", "1200"), ("$18.50", "18.5"), ("−5", "-5"), ("$-5", "-5"), ("+7", "7")]
    + [
        ("3/4", "0.75"),
        ("2/3", "2/3"),
        ("1e3", "1000"),
        ("45%", "45"),
        ("18 dollars", "18"),
        ("１８", "18"),
        ("5.", "5"),
    ],
)
def test_a_target_is_right_by_the_strict_rule(folder, written, gold):
    """What a model is trained to write is graded right when it writes it; sentences stay as published."""
    row = {"question": "How much?", "answer": f"It is ${written}.\n#### {written}"}
    (folder / "train.jsonl").write_text(json.dumps(row) + "\n")
    (p,) = load_gsm8k(folder, "train")
    assert p.gold == gold and text_target(p) == f"It is ${written}.\n#### {gold}"
    (verdict,) = grade_text([Sample(p.id, text_target(p))], {p.id: p.gold})
    assert verdict.correct["strict"] and verdict.correct["flexible"]


def test_half_a_character_is_named_by_its_line(folder):
    """JSON may hold half a surrogate pair; UTF-8 may not, and a tokenizer would end on it without a line."""
    for field in ("question", "answer"):
        row = {"question": "a", "answer": "#### 5"} | {field: "\ud83d #### 5"}
        (folder / "train.jsonl").write_text('{"question": "a", "answer": "#### 5"}\n' + json.dumps(row) + "\n")
        with pytest.raises(ValueError, match=f"train.jsonl line 2: its {field} holds half a surrogate pair"):
            load_gsm8k(folder, "train")
    path = folder / "outputs.jsonl"
    path.write_text(json.dumps({"id": "test/0", "output": "5 \ud83d"}) + "\n")
    with pytest.raises(ValueError, match="outputs.jsonl line 1: half a surrogate pair"):
        read_outputs(path, ["test/0"])


def test_what_claims_to_be_the_full_set_is_counted(folder, tmp_path, monkeypatch):
    (folder / "gsm8k").mkdir()
    (folder / "test.jsonl").rename(folder / "gsm8k" / "test.jsonl")
    monkeypatch.setenv("LM_DATA", str(folder))
    for source in ("gsm8k", folder / "gsm8k"):
        with pytest.raises(ValueError, match="has 6 rows, expected the full set's 1,319"):
            load_gsm8k(source, "test")
    with pytest.raises(ValueError, match="cannot read .*test.jsonl"):
        load_gsm8k(folder, "test")
    with pytest.raises(ValueError, match="unknown split 'val'"):
        load_gsm8k(folder, "val")
    (folder / "train.jsonl").write_text("")
    with pytest.raises(ValueError, match="holds no problems"):
        load_gsm8k(folder, "train")


def test_hub(monkeypatch, tmp_path):
    import datasets

    monkeypatch.delenv("LM_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    rows = [{"question": "a", "answer": "#### 5"}] * 1319
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, split: rows)
    assert len(load_gsm8k("gsm8k", "test")) == 1319

    def offline(name, config, split):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ValueError, match=r"\(ConnectionError: no route\); either give .* in \$LM_DATA/gsm8k"):
        load_gsm8k("gsm8k", "test")


def test_heldout_split_is_stable():
    problems = [problem("#### 1", f"Question {i}?", f"train/{i}") for i in range(200)]
    rest, held = split_heldout(problems, 20)
    assert len(held) == 20 and sorted(rest + held, key=problems.index) == problems
    # Order of the rows does not move it, more of it holds the less, another seed is another split.
    again = split_heldout(problems[::-1], 20)[1]
    assert {p.id for p in again} == {p.id for p in held} < {p.id for p in split_heldout(problems, 40)[1]}
    assert {p.id for p in split_heldout(problems, 20, seed=1)[1]} != {p.id for p in held}
    # Pinned: a change of the rule would mix training and validation of a resumed run.
    assert [p.id for p in held[:3]] == ["train/0", "train/48", "train/53"]
    assert split_heldout(problems, 0) == (problems, [])
    with pytest.raises(ValueError, match="200 problems held out of 200"):
        split_heldout(problems, 200)


def test_full_set(published):
    for split, count in PUBLISHED_ROWS.items():
        assert len(load_gsm8k(published / "gsm8k", split)) == count


# ----------------------------------------------------------------------------------------------
# programs


@pytest.mark.parametrize(
    "answer, lines",
    [
        # An earlier result gets its name, unless the question states the number.
        ("Sold 48/2=<<48/2=24>>24.\nAll 48+24=<<48+24=72>>72.\n#### 72", ["48 / 2", "48 + step_1"]),
        ("So 2*5=<<2*5=10>>10.\nSo 10+7=<<10+7=17>>17.\n#### 17", ["2 * 5", "10 + 7"]),
        # Rounded where the text rounds: nearest, down, up.
        ("<<20/3=6.67>>\n<<6.67*100=667>>\n#### 667", ["round(20 / 3, 2)", "step_1 * 100"]),
        ("<<20/3=6>>\n#### 6", ["math.floor(20 / 3)"]),
        ("<<22/3=8>>\n#### 8", ["math.ceil(22 / 3)"]),
        ("<<10/7=1.42>>\n<<1.42*100=142>>\n#### 142", ["math.floor((10 / 7) * 100) / 100", "step_1 * 100"]),
        # Signs.
        ("<<60*20%=12>>\n#### 12", ["60 * (20 / 100)"]),
        ("<<6x7=42>>\n#### 42", ["6 * 7"]),
        ("<<1,000-007=993>>\n#### 993", ["1000 - 7"]),
        ("<<2(3+4)=14>>\n#### 14", ["2 * (3 + 4)"]),
        ("<<-3+.5=-2.5>>\n<<-2.5*2=-5>>\n#### -5", ["-3 + 0.5", "-2.5 * 2"]),
        # What no annotation holds: a spelt equation, the percentage of the last sentence.
        ("It left 23 meters - 13 meters = 10 meters.\n#### 10", ["23 - 13"]),
        ("He pays $600/day * 5 days = $3000.\n#### 3000", ["600 * 5"]),
        ("<<5=5>>\n<<5*3=15>>\n#### 15", ["5 * 3"]),
        ("It is <<30/200=0.15>>0.15, or 15%.\n#### 15", ["30 / 200", "step_1 * 100"]),
    ],
)
def test_programs(answer, lines):
    made = to_program(problem(answer, "There are 10 of them."))
    assert made.program, made.reason
    code = [line for line in made.program.split("\n") if " = " in line and not line.startswith("#")]
    assert [line.partition(" = ")[2] for line in code] == lines
    kept, refused = code_targets([problem(answer)], workers=1, progress=False)
    assert list(kept) == ["train/0"] and not refused


@pytest.mark.parametrize(
    "answer, reason",
    [
        ("Let x be it. 3x = 30\nx = <<10=10>>10\n#### 10", "no step: "),  # the answer alone derives nothing
        ("It is <<2+3=5>>5.\nSo it is 8.\n#### 8", "no step equals the answer"),
        ("It is <<2+3=8>>8.\n#### 8", "an annotation is false"),
        ("It was 2 + 3 = 8.\n#### 8", "no step: "),
        ("It is <<1/0=8>>8.\n#### 8", "an annotation cannot be computed"),
        ("It is <<2+a=8>>8.\n#### 8", "an annotation holds more than arithmetic"),
        ("It is <<2+6=eight>>8.\n#### 8", "an annotation's result is not a number"),
        ("It is <<9**9**9=8>>8.\n#### 8", "an annotation cannot be computed"),
        ("It is <<__import__('os')*1=8>>8.\n#### 8", "an annotation holds more"),
        ("So 0.3 of it, <<1.5/5=0.3>>0.3\n#### 30", "no step equals the answer"),  # no percentage is stated
    ],
)
def test_no_program_without_a_derivation(answer, reason):
    made = to_program(problem(answer))
    assert made.program is None and made.reason.startswith(reason)


def test_what_a_program_says_is_executed_and_checked(monkeypatch):
    import data.programs
    from data.programs import Conversion

    programs = {"train/0": "print(5)", "train/1": "print(6)", "train/2": "1/0", "train/3": None}
    monkeypatch.setattr(data.programs, "to_program", lambda p: Conversion(programs[p.id], "none"))
    problems = [problem("#### 5", name=name) for name in programs]
    kept, refused = code_targets(problems, workers=1, progress=False)
    assert kept == {"train/0": "print(5)"}
    reasons = ["its run printed another answer", "its run ended in status error", "none"]
    assert refused == list(zip(("train/1", "train/2", "train/3"), reasons, strict=True))
    table = coverage_table(4, refused)
    assert "1 of 4" in table and "25.00 %" in table and "train/2" in table


def test_programs_from_the_official_solutions(published):
    """Coverage of all of train; that all programs print the gold answer is tried on every 60th, by its grader."""
    problems = load_gsm8k(published / "gsm8k", "train")
    made = {p.id: to_program(p).program for p in problems}
    found = [p for p in problems if made[p.id]]
    assert len(found) / len(problems) > 0.96
    assert [to_program(p).program for p in problems[:200]] == [made[p.id] for p in problems[:200]]
    for p in found:  # the answer is a derived name, whatever the solution says
        last = made[p.id].rstrip().rpartition("\n")[2]
        assert last.startswith("print(step_") or last == "print(percent)"
    some = found[::60]
    verdicts = grade_code([Sample(p.id, made[p.id]) for p in some], {p.id: p.gold for p in some})
    assert len(verdicts) > 100 and all(v.correct["code"] for v in verdicts)


def test_data_command_line(folder, capsys):
    out = folder / "programs.jsonl"
    data_main(["--data", str(folder), "--out", str(out), "--workers", "1"])
    assert "6 of 6" in capsys.readouterr().out
    rows = json_rows(out)
    assert [row["id"] for row in rows] == [f"train/{i}" for i in range(6)]
    assert rows[1]["target"] == "# It is 1+10=11.\nstep_1 = 1 + 10\nprint(step_1)\n" and rows[1]["gold"] == "11"
    data_main(["--data", str(folder), "--format", "text", "--no-annotations", "--out", str(out)])
    assert json_rows(out)[1]["target"] == "It is 1+10=11.\n#### 11"


# ----------------------------------------------------------------------------------------------
# numbers


@pytest.mark.parametrize(
    "text, value",
    [
        ("18", 18),
        (" 18. ", 18),
        ("1,234,567", 1234567),
        ("-3", -3),
        ("−3", -3),
        ("+3", 3),
        ("$1,200.50", 1200.5),
        ("-$5", -5),
        ("$-5", -5),
        ("€ 7", 7),
        ("7€", 7),
        ("45%", 45),
        ("45 %", 45),
        ("18 dollars", 18),
        ("12.5 km per hour", 12.5),
        ("3/4", 0.75),
        (".5", 0.5),
        ("5.", 5),
        ("1e3", 1000),
        ("007", 7),
        ("0.0", 0),
        ("1_200", 1200),
        ("6/1,000", 0.006),
    ],
)
def test_numbers(text, value):
    assert parse_number(text) == Fraction(str(value))


@pytest.mark.parametrize("text", [None, "", "...", "$", "nan", "inf", "1/0", "--3", "-$-3", "five", "5 = 5", "(7, 2)"])
def test_no_numbers(text):
    assert parse_number(text) is None


@pytest.mark.parametrize(
    "stdout, value",
    [("1\n2\n", 2), ("answer: $1,200.", 1200), ("1/2", 0.5), ("-7.0\n\n", -7), ("5\nnone", None), ("nan", None)]
    + [("18.", 18), ("18.0", 18), ("1_200", 1200), ("18 dollars", 18), ("in all 1_200 of them", 1200), ("45%", 45)]
    + [("", None), ("30.000000000000004", 30), ("x = -3", -3), ("1e+16", 1e16)]
    + [("(7, 2)", 7), ("[3.5, 'a']", 3.5), ("(7,)", 7), ("[7]", 7), ("(a, 5)", 5), ("(12 + 3) = [15]", 15)],
)
def test_last_number(stdout, value):
    found = last_number(stdout)
    assert found is None if value is None else same_number(found, Fraction(value))


@pytest.mark.parametrize(
    "value, text", [("1200", "1200"), ("-5", "-5"), ("3/4", "0.75"), ("-1/1024", "-0.0009765625"), ("2/3", "2/3")]
)
def test_a_value_in_digits(value, text):
    assert plain(Fraction(value)) == text and parse_number(text) == Fraction(value)


def test_tolerance_is_for_rounding_only():
    assert same_number(Fraction("0.30000000000000004"), Fraction("0.3"))
    assert same_number(Fraction("999999.9999999999"), Fraction(10**6))
    assert not same_number(Fraction("33.33"), Fraction("33.34"))
    assert not same_number(Fraction("0.001"), Fraction(0))
    assert not same_number(Fraction("33.3"), Fraction(100, 3))


# ----------------------------------------------------------------------------------------------
# grading


GOLDS = {"test/0": "5", "test/1": "6", "test/2": "7"}


def test_text_verdicts():
    outputs = ["#### 5.0", "$6", "#### seven"]
    verdicts = grade_text([Sample(i, o) for i, o in zip(GOLDS, outputs, strict=True)], GOLDS)
    assert [tuple(v.correct.values()) for v in verdicts] == [(True, True, False), (False, True, False), (False,) * 3]


def test_code_verdicts():
    outputs = ["print(5)\nimport os; os._exit(1)", "import time; print(6, flush=True)\nwhile 1: pass", "print('seven')"]

    def samples():
        yield from (Sample(i, o) for i, o in zip(GOLDS, outputs, strict=True))
        yield Sample("test/1", "Here:\n```python\nprint(6.0)\n```")

    verdicts = grade_code(samples(), GOLDS, workers=2, limits=Limits(seconds=1))
    assert [v.status for v in verdicts] == ["error", "timeout", "no number", "ok"]
    assert [v.correct["code"] for v in verdicts] == [False, False, False, True]
    assert [v.id for v in verdicts] == ["test/0", "test/1", "test/2", "test/1"]


def test_the_last_program_that_runs_counts():
    fence = "```"
    good, broken, silent = (f"{fence}python\n{code}\n{fence}\n" for code in ("print(5)", "print(undefined)", "x = 5"))
    other = f"{fence}python\nprint(6)\n{fence}\n"
    outputs = [good + broken, good + silent, other + good, good + other, broken + silent, other + broken + silent]
    verdicts = grade_code([Sample("test/0", o) for o in outputs], GOLDS, workers=2)
    assert [v.answers["code"] for v in verdicts] == ["5", "5", "5", "6", None, "6"]
    assert [v.correct["code"] for v in verdicts] == [True, True, True, False, False, False]
    assert [v.status for v in verdicts] == ["ok", "ok", "ok", "ok", "no number", "ok"]


@pytest.mark.parametrize(
    "end, status",
    [("exit()", "ok"), ("quit()", "ok"), ("exit(0)", "ok"), ("import sys; sys.exit()", "ok"), ("sys = 1", "ok")]
    + [("raise SystemExit", "ok"), ("exit(3)", "error"), ("quit('no')", "error")],
)
def test_a_program_may_end_by_exit(end, status):
    (verdict,) = grade_code([Sample("test/0", f"def main():\n    print(5)\n    {end}\n\nmain()")], GOLDS)
    assert verdict.status == status and verdict.correct["code"] == (status == "ok")


def test_pass_at_k_is_the_mean_over_all_draws():
    for n, c in ((1, 0), (1, 1), (5, 0), (5, 2), (5, 5), (6, 1)):
        right = [True] * c + [False] * (n - c)
        for k in range(1, n + 1):
            draws = list(itertools.combinations(right, k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws), rel=1e-15)  # exact but for /
    assert pass_at_k(1000, 1, 100) == 0.1  # no overflow
    for bad in ((3, 4, 1), (3, 1, 0), (3, 1, 4)):
        with pytest.raises(ValueError, match="expected 0 <= c <= n"):
            pass_at_k(*bad)


def test_mcnemar_matches_scipy():
    for a, b in ((0, 0), (1, 0), (5, 5), (0, 10), (12, 25), (300, 380)):
        p = mcnemar_exact(a, b)
        assert p == mcnemar_exact(b, a) and (p == 1) == (abs(a - b) <= 1)
    scipy_stats = pytest.importorskip("scipy.stats", reason="scipy is the reference here")
    for a, b in ((1, 0), (0, 10), (12, 25), (300, 380), (2, 1000)):
        # 1e-10 relative is what scipy's own binomial tail is good for.
        assert mcnemar_exact(a, b) == pytest.approx(scipy_stats.binomtest(a, a + b).pvalue, rel=1e-10)
    with pytest.raises(ValueError, match="expected counts"):
        mcnemar_exact(-1, 3)


def test_scores_count_missing_problems_as_wrong():
    verdicts = grade_text([Sample("test/0", "#### 5"), Sample("test/1", "#### 6")], GOLDS)
    strict, flexible, boxed = scores(verdicts, list(GOLDS))
    assert [strict.rule, flexible.rule, boxed.rule] == ["strict", "flexible", "boxed"] and boxed.value == 0
    assert strict.value == flexible.value == pytest.approx(2 / 3) and strict.per_problem == (1, 1, 0)
    assert strict.low < 2 / 3 < strict.high
    samples = [Sample("test/0", f"#### {x}") for x in (5, 4, 4, 5)] + [Sample("test/1", "#### 1")] * 4
    found = scores(grade_text(samples, GOLDS), list(GOLDS), (1, 2))
    assert [(s.rule, s.k) for s in found] == [("strict", 1), ("strict", 2), ("flexible", 1), ("flexible", 2)] + [
        ("boxed", 1),
        ("boxed", 2),
    ]
    assert found[0].value == pytest.approx(0.5 / 3) and found[1].value == pytest.approx((1 - 1 / 6) / 3)


@pytest.mark.parametrize(
    "line, error",
    [
        ('{"id": "test/0"', "line 2 is not JSON"),
        ('{"id": "test/0"}', "line 2: expected an object with id and a text output"),
        ('{"output": "5"}', "line 2: expected an object with id"),
        ('{"id": 0, "output": 5}', "line 2: expected an object with id and a text output"),
        ('{"id": "test/9", "output": "5"}', "line 2: unknown id 'test/9', expected test/0 to test/2"),
        ('{"id": 3, "output": "5"}', "line 2: unknown id 3"),
        ('{"id": "train/0", "output": "5"}', "line 2: unknown id 'train/0'"),
    ],
)
def test_bad_outputs_are_named_by_their_line(tmp_path, line, error):
    path = tmp_path / "outputs.jsonl"
    path.write_text('{"id": 1, "output": "#### 6"}\n' + line + "\n")
    with pytest.raises(ValueError, match=error):
        read_outputs(path, list(GOLDS))


def test_counts_of_samples():
    once, twice = [Sample("test/0", "")], [Sample("test/0", "")] * 2
    check_counts(once, (1,))
    check_counts(twice, (1, 2))
    with pytest.raises(ValueError, match="id test/0 is there 2 times; give one output each, or --k"):
        check_counts(twice, (1,))
    with pytest.raises(ValueError, match="id test/0 has 2 samples, pass@3 needs at least 3"):
        check_counts(twice, (1, 3))
    with pytest.raises(ValueError, match=r"k=\[0\]"):
        check_counts(once, (0,))


def write_outputs(path: Path, outputs: dict) -> str:
    path.write_text("".join(json.dumps({"id": i, "output": o}) + "\n" for i, o in outputs.items()))
    return str(path)


def test_command_line(folder, capsys):
    good = write_outputs(folder / "good.jsonl", {i: f"#### {i + 10}" for i in range(6)})
    poor = write_outputs(folder / "poor.jsonl", {i: f"#### {i + 10 - (i > 2)}" for i in range(5)})
    main([good, poor, "--data", str(folder), "--out", str(folder / "verdicts.jsonl")])
    out = capsys.readouterr().out
    assert "6 outputs for 6 of 6" in out and "missing, graded wrong    1  test/5" in out
    assert "100.00 %" in out and "50.00 %" in out and "+50.00 pp" in out
    assert "McNemar exact p 0.25 (3 only first, 0 only second)" in out  # 2 / 2^3
    rows = json_rows(folder / "verdicts.jsonl")
    assert (
        len(rows) == 11
        and rows[0]["correct"] == dict(strict=True, flexible=True, boxed=False)
        and rows[0]["file"] == good
    )
    code = write_outputs(folder / "code.jsonl", {i: f"print({i} + 10)" if i else "1/0" for i in range(6)})
    main([code, "--data", str(folder), "--format", "code", "--workers", "1"])
    out = capsys.readouterr().out
    assert "83.33 %" in out and "invalid program          1  error" in out


@pytest.mark.parametrize(
    "arguments, error",
    [
        (["{good}", "{good}", "{good}"], "3 files of outputs, expected one, or two"),
        (["{absent}"], "cannot read"),
        (["{good}", "--k", "2"], "pass@2 needs at least 2"),
        (["{good}", "--out", "{absent}/x.jsonl"], "there is no folder"),
    ],
)
def test_command_line_errors_are_one_line(folder, capsys, monkeypatch, arguments, error):
    monkeypatch.setattr(sys, "argv", ["gsm8k"])
    good = write_outputs(folder / "good.jsonl", {0: "#### 10"})
    arguments = [a.format(good=good, absent=folder / "absent") for a in arguments]
    with pytest.raises(SystemExit) as exit:
        main([*arguments, "--data", str(folder)])
    err = capsys.readouterr().err
    assert exit.value.code == 2 and error in err and err.count("\n") == 1


# ----------------------------------------------------------------------------------------------
# published outputs and verdicts


@pytest.mark.parametrize("model", ["6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification"])
def test_verdicts_of_the_papers_models(published, model):
    """All 1,319 verdicts of Cobbe et al.; their files mark the answer by "A: " instead of "#### "."""
    problems = load_gsm8k(published / "gsm8k", "test")
    rows = json_rows(published / "gsm8k" / "example_model_solutions.jsonl")
    assert [row["question"] for row in rows] == [p.question for p in problems]
    outputs = [row[model]["solution"].replace("\nA: ", "\n#### ") for row in rows]
    verdicts = grade_text(
        [Sample(p.id, o) for p, o in zip(problems, outputs, strict=True)], {p.id: p.gold for p in problems}
    )
    for rule in ("strict", "flexible"):
        assert [v.correct[rule] for v in verdicts] == [row[model]["is_correct"] for row in rows]


def test_toras_boxes(published):
    """ToRA took the last box, else the last number. By the boxed rule all 1,308 outputs that have one get the verdict
    of the prediction that ToRA recorded; the other 11 have none, and are wrong by this rule."""
    problems = load_gsm8k(published / "gsm8k", "test")
    golds = {p.id: p.gold for p in problems}
    rows = json_rows(published / "gsm8k_outputs" / "tora" / "tora-70b-v1.0_gsm8k.jsonl")
    pairs = list(zip(problems, rows, strict=True))
    ours = grade_text([Sample(p.id, row["code"][0]) for p, row in pairs], golds)
    theirs = grade_text([Sample(p.id, f"#### {row['pred'][0]}") for p, row in pairs], golds)
    boxed = [(a.correct["boxed"], b.correct["strict"]) for a, b in zip(ours, theirs, strict=True) if a.answers["boxed"]]
    assert len(boxed) == 1308 and all(a == b for a, b in boxed)


def test_tora_accuracy(published):
    problems = load_gsm8k(published / "gsm8k", "test")
    rows = json_rows(published / "gsm8k_outputs" / "tora" / "tora-70b-v1.0_gsm8k.jsonl")
    outputs = [Sample(p.id, f"#### {row['pred'][0]}") for p, row in zip(problems, rows, strict=True)]
    strict = scores(grade_text(outputs, {p.id: p.gold for p in problems}), [p.id for p in problems])[0]
    score = (published / "gsm8k_outputs" / "tora" / "tora-70b-v1.0_gsm8k.metrics").read_text()
    assert f"[{100 * strict.value:.1f}]" in score


def test_pot_programs_run_to_their_published_results(published):
    """Every 20th program of the few-shot file: what it prints is what was published, where that is a number."""
    problems = {p.question.strip(): p for p in load_gsm8k(published / "gsm8k", "test")}
    rows = [r for r in json_rows(published / "gsm8k_outputs" / "pot" / "gsm8K_s0_codex.jsonl") if "question" in r][::20]
    found = [problems[r["question"].strip()] for r in rows]
    programs = [Sample(p.id, r["generated"][0] + "\nprint(ans)") for p, r in zip(found, rows, strict=True)]
    verdicts = grade_code(programs, {p.id: p.gold for p in found})
    for row, verdict in zip(rows, verdicts, strict=True):
        right = row["executed"] is not None and math.isclose(row["executed"], row["answer"], rel_tol=1e-6)
        assert verdict.correct["code"] == right
    assert len(rows) > 60


def test_pot_programs_that_return_several_values(published):
    """Of the 1,317 verdicts of the zero-shot file two hang on a tuple. The project's rule (floatify_ans) takes the
    first element: so did they for test/856, which printed (7, 2) and has 7.0. For test/813 the file holds the tuple's
    text, which is equal to no number, against their own rule: there alone our verdict is another, and right."""
    problems = {p.question.strip(): p for p in load_gsm8k(published / "gsm8k", "test")}
    rows = json_rows(published / "gsm8k_outputs" / "pot" / "gsm8K_zs_codex.jsonl")
    rows = {problems[r["question"].strip()].id: r for r in rows if r.get("question", "").strip() in problems}
    assert len(rows) == 1317
    several = {i: r for i, r in rows.items() if isinstance(r["executed"], str) or i == "test/856"}
    assert rows["test/813"]["executed"] == "(7, 7)" and rows["test/856"]["executed"] == 7.0
    samples = [Sample(i, r["generated"] + "\nprint(ans)") for i, r in several.items()]
    limits = Limits(packages=True, memory_bytes=2 << 30)  # each imports numpy
    verdicts = grade_code(samples, {p.id: p.gold for p in problems.values()}, limits=limits, workers=2)
    assert [v.answers["code"] for v in verdicts if v.id == "test/856"] == ["(7, 2)"]
    theirs = {i: isinstance(r["executed"], float) and r["executed"] == r["answer"] for i, r in several.items()}
    assert {v.id for v in verdicts if v.correct["code"] != theirs[v.id]} == {"test/813"}


@pytest.mark.parametrize(
    "expression, value",
    [
        ("48/2", 24),
        ("$1,200 x 20%", 240),
        ("(3+5)%*50", 4),
        ("100*(50-20)%", 30),
        ("((10+10)+5)% * 8", 2),
        ("20%", 0.2),
        ("7%3", 1),
        ("2(3)", 6),
        ("5-7", -2),
        ("%5", None),
        ("(3", None),
        ("1/0", None),
        ("9**99999", None),
        ("3 cows", None),
        ("", None),
    ],
)
def test_expressions(expression, value):
    found = work_out(expression)
    assert found == (None if value is None else pytest.approx(Fraction(str(value))))


def test_an_endless_number_is_no_answer():
    problem = "1" + "7" * 5000
    assert parse_number(problem) is None and last_number(f"so {problem}") is None
    assert parse_number("1/" + problem) is None
