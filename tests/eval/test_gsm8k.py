"""Grading of outputs for GSM8K: verdicts on texts and programs, pass@k, and the command line."""

import itertools
import json
import sys
from pathlib import Path

import pytest
from tiny_gsm8k import json_rows, write_sums

import sandbox
from eval.gsm8k import (
    Sample,
    check_counts,
    describe_difference,
    grade_code,
    grade_text,
    main,
    pass_at_k,
    read_outputs,
    scores,
)
from sandbox import Limits

GOLDS = {"test/0": "5", "test/1": "6", "test/2": "7"}


@pytest.fixture
def folder(tmp_path):
    return write_sums(tmp_path)


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


def test_none_right_and_no_difference_have_an_interval():
    """Wilson's for 0 of n, z^2 / (n + z^2); and of two files that agree, as many problems either way."""
    golds = {f"test/{i}": "1" for i in range(96)}
    wrong = grade_text([Sample(i, "#### 2") for i in golds], golds)
    strict, *rest = scores(wrong, list(golds))
    top = 1.959964**2 / (96 + 1.959964**2)
    assert (strict.value, strict.low) == (0, 0) and strict.high == pytest.approx(top, rel=1e-6)
    says = describe_difference([strict, *rest], [strict, *rest], one_sample=True)
    assert f"+0.00 pp  95 % [-{100 * top:.2f}, +{100 * top:.2f}]  McNemar exact p 1 (0 only first" in says


@pytest.mark.parametrize(
    "line, error",
    [
        ('{"id": "test/0"', "line 2: not JSON"),
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


def test_programs_run_with_ones_own_rights_only_where_asked(folder, capsys, caplog):
    code = write_outputs(folder / "code.jsonl", {i: f"import os; print(10 + {i} + 0 * os.getuid())" for i in range(6)})
    sandbox.run._warn.cache_clear()
    main([code, "--data", str(folder), "--format", "code", "--workers", "1", "--unsafe-run-as-me"])
    assert "100.00 %" in capsys.readouterr().out
    assert "mode unsafe-run-as-me, without another user: programs may do what user" in caplog.text


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
