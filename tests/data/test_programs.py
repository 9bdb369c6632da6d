"""GSM8K's solutions as programs, and the programs on disk: what a change of the problems or of the code that makes
programs does to them."""

import shutil
from fractions import Fraction
from pathlib import Path

import pytest
from tiny_gsm8k import solved

from data import numbers, programs
from data.programs import Problem, code_targets, coverage_table, to_program, work_out
from data.prompts import make_targets


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
    made = to_program(solved(answer, "There are 10 of them."))
    assert made.program, made.reason
    code = [line for line in made.program.split("\n") if " = " in line and not line.startswith("#")]
    assert [line.partition(" = ")[2] for line in code] == lines
    kept, refused = code_targets([solved(answer)], workers=1, progress=False)
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
    made = to_program(solved(answer))
    assert made.program is None and made.reason.startswith(reason)


def test_what_a_program_says_is_executed_and_checked(monkeypatch):
    import data.programs
    from data.programs import Conversion

    programs = {"train/0": "print(5)", "train/1": "print(6)", "train/2": "1/0", "train/3": None}
    monkeypatch.setattr(data.programs, "to_program", lambda p: Conversion(programs[p.id], "none"))
    problems = [solved("#### 5", name=name) for name in programs]
    kept, refused = code_targets(problems, workers=1, progress=False)
    assert kept == {"train/0": "print(5)"}
    reasons = ["its run printed another answer", "its run ended in status error", "none"]
    assert refused == list(zip(("train/1", "train/2", "train/3"), reasons, strict=True))
    table = coverage_table(4, refused)
    assert "1 of 4" in table and "25.00 %" in table and "train/2" in table


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


@pytest.fixture
def problems():
    return [Problem(f"train/{i}", f"What is {i} and 2?", f"It is <<{i}+2={i + 2}>>.", str(i + 2)) for i in range(3)]


def test_programs_are_made_once(problems, tmp_path, monkeypatch):
    first = make_targets(problems, "code", cache=tmp_path)
    assert first["train/1"] == "# It is .\nstep_1 = 1 + 2\nprint(step_1)\n"
    (kept,) = tmp_path.iterdir()
    monkeypatch.setattr("data.prompts.code_targets", None)  # it is not called again
    assert make_targets(problems, "code", cache=tmp_path) == first
    with monkeypatch.context() as patch:  # no sandbox: found out before training, not by the answers
        patch.setattr("data.prompts.probe", lambda: int("no sandbox"))
        with pytest.raises(ValueError, match="no sandbox"):
            make_targets(problems, "code", cache=tmp_path)
    kept.write_text("{")
    with pytest.raises(ValueError, match="line 1: not JSON .*; delete it, it is made again"):
        make_targets(problems, "code", cache=tmp_path)


@pytest.mark.parametrize("module", [programs, numbers], ids=["programs", "numbers"])
def test_a_change_of_the_compiler_makes_them_anew(problems, tmp_path, monkeypatch, module):
    make_targets(problems, "code", cache=tmp_path / "cache")
    copy = shutil.copy(module.__file__, tmp_path / "copy.py")
    monkeypatch.setattr(module, "__file__", str(copy))
    make_targets(problems, "code", cache=tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 1  # the same code in another place
    Path(copy).write_text(Path(copy).read_text() + "# another rule\n")
    make_targets(problems, "code", cache=tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 2
