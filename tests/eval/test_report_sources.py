"""Runs of other code are other arms, and the report says so; comments and formatting are no difference."""

from pathlib import Path

import pytest
from invented_runs import arms_of, judged, write_run

from eval.report import build as rp
from eval.report import runs as compare
from eval.report.sources import other_files, read_sources

TRAIN = '"""Trains."""\nimport math\n\n\ndef main(lr=1e-3):\n    """Runs."""\n    return math.sin(lr)\n'


def ran(folder: Path, seed: int, text: str = TRAIN, *, loss: str = "ce", **more: str) -> Path:
    """A run that keeps its source: train_lm.py and model/gpt2.py."""
    write_run(folder, config={"seed": seed, "loss": loss}, summary={})
    for name, code in ({"train_lm.py": text, "model/gpt2.py": "WIDTH = 768\n"} | more).items():
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "source" / name).write_text(code)
    return folder


def test_a_hacked_script_is_an_arm_of_its_own_and_not_another_seed(tmp_path):
    runs = [ran(tmp_path / f"r{s}", s) for s in (1, 2)]
    hacked = ran(tmp_path / "hacked", 3, TRAIN.replace("sin", "cos"))
    arms, warnings = compare.group_arms([compare.load_run(p) for p in (*runs, hacked)])
    assert [(a.label, len(a.runs)) for a in arms] == [("ce", 2), ("ce, other train_lm.py", 1)] and not warnings
    (says,) = rp.code_warnings(arms)
    assert says.startswith("OTHER CODE") and "train_lm.py differs" in says
    assert all(str(p) in says for p in (*runs, hacked))
    same_seed = ran(tmp_path / "again", 1, TRAIN.replace("sin", "cos"))  # the same seed is no repetition
    first = [a.label for a in arms_of(hacked, *runs, same_seed)]
    assert sorted(first) == ["ce", "ce, other train_lm.py"]
    deep = ran(tmp_path / "deep", 4, TRAIN.replace("1e-3", "1"), **{"model/gpt2.py": "WIDTH = 2"})
    labels = [a.label for a in arms_of(*runs, deep)]
    assert labels == ["ce", "ce, other model/gpt2.py and 1 more"]


@pytest.mark.parametrize(
    "text",
    [
        TRAIN.replace("import math\n", "import math  # for the sine\n\n# A comment\n"),
        TRAIN.replace("lr=1e-3", "\n    lr=0.001,\n").replace("    return", "\n    return"),
        TRAIN.replace('"""Trains."""', "'A longer docstring.'").replace('    """Runs."""\n', ""),
    ],
)
def test_comments_formatting_and_docstrings_are_no_difference(tmp_path, text):
    arms, warnings = compare.group_arms(
        [compare.load_run(ran(tmp_path / n, s, t)) for n, s, t in (("a", 1, TRAIN), ("b", 2, text))]
    )
    assert [len(a.runs) for a in arms] == [2] and not warnings and not rp.find_warnings(arms)


def test_only_files_that_both_have_are_compared(tmp_path):
    bare = write_run(tmp_path / "bare", config={"seed": 4}, summary={})  # no source/, as in old records
    flat = ran(tmp_path / "flat", 5, **{"losses.py": "ce = 1"})
    deep = ran(tmp_path / "deep", 6, **{"kernels/losses.py": "ce = 2"})
    assert [len(a.runs) for a in arms_of(bare, flat, deep)] == [3]


def test_a_file_that_is_no_python_is_compared_as_text(tmp_path):
    broken = [ran(tmp_path / f"{s}", s, text) for s, text in enumerate(("if:", "if:", "if :"))]
    assert sorted(len(a.runs) for a in arms_of(*broken)) == [1, 2]


def test_arms_that_are_compared_and_ran_other_code_are_said(tmp_path):
    ces = [ran(tmp_path / f"ce{s}", s) for s in (1, 2)]
    dpsm = ran(tmp_path / "dpsm", 1, TRAIN.replace("sin", "cos"), loss="dpsm")
    arms = arms_of(*ces, dpsm)
    assert [a.label for a in arms] == ["ce", "dpsm"]
    (says,) = (w for w in rp.find_warnings(arms) if w.startswith("OTHER CODE"))
    assert "dpsm ran another train_lm.py" in says
    hacked = ran(tmp_path / "hacked", 1, TRAIN.replace("sin", "cos"))
    assert judged(1, arms_of(*ces, dpsm, hacked)).against == "ce, other train_lm.py"  # which ran what dpsm ran
    page = rp.build([*ces, hacked])
    assert any("OTHER CODE" in w for w in page.warnings)


def write(folder, **files):
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)


def test_a_run_that_went_on_under_other_code_is_not_the_run_that_did_not(tmp_path):
    """What counts is the last code of each file; comments, formatting and docstrings are no difference."""
    for name in ("same", "other"):
        write(tmp_path / name / "source", script='"""Doc."""\nx = 1\n', model="y = 2\n")
    write(tmp_path / "same" / "source-10", script="# a comment\nx  =  1\n")
    assert other_files(*(read_sources(tmp_path / name) for name in ("same", "other"))) == []
    write(tmp_path / "other" / "source-9", script="x = 3\n")
    assert other_files(*(read_sources(tmp_path / name) for name in ("same", "other"))) == ["script.py"]
    write(tmp_path / "other" / "source-10", script="x = 1\n")  # after 9, although not by name
    assert other_files(*(read_sources(tmp_path / name) for name in ("same", "other"))) == []


def test_a_folder_without_sources_tells_nothing_apart(tmp_path):
    assert read_sources(tmp_path) == {}
