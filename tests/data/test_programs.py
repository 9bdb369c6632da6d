"""GSM8K's programs on disk: what a change of the problems or of the code that makes programs does to them."""

import shutil
from pathlib import Path

import pytest

from data import numbers, programs
from data.programs import Problem
from data.prompts import make_targets


@pytest.fixture
def problems():
    return [Problem(f"train/{i}", f"What is {i} and 2?", f"It is <<{i}+2={i + 2}>>.", str(i + 2)) for i in range(3)]


def test_programs_are_made_once(problems, tmp_path, monkeypatch):
    first = make_targets(problems, "code", cache=tmp_path)
    assert first["train/1"] == "# It is .\nstep_1 = 1 + 2\nprint(step_1)\n"
    (kept,) = tmp_path.iterdir()
    monkeypatch.setattr("data.prompts.code_targets", None)  # it is not called again
    assert make_targets(problems, "code", cache=tmp_path) == first
    kept.write_text("{")
    with pytest.raises(ValueError, match="is not JSON .*; delete it, it is made again"):
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
