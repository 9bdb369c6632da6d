"""A command of a package that is started as a file, or beside its package, says in one line how to start it."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# sandbox/jailer.py is started as a file by sandbox/run.py; tests are no commands, nor is what a run's folder keeps.
PACKAGES = "data eval kernels model races recipes runtime sandbox schedules".split()
FILES = [
    path
    for path in sorted(p.relative_to(ROOT) for package in PACKAGES for p in (ROOT / package).rglob("*.py"))
    if path.as_posix() != "sandbox/jailer.py"
]
COMMANDS = [path for path in FILES if '\nif __name__ == "__main__":\n' in (ROOT / path).read_text()]
OF_PACKAGE = ("eval.attack", "eval.campaign")  # python -m attack imports their __init__ first: the line is Python's own


def test_they_are_found():
    assert len(COMMANDS) > 20 and Path("eval/report/__main__.py") in COMMANDS and Path("eval/gsm8k.py") in COMMANDS


@pytest.mark.parametrize("path", COMMANDS, ids=str)
def test_one_line_says_how(path, tmp_path):
    parts = path.with_suffix("").parts
    name = ".".join(part for part in parts if part != "__main__")
    starts = [([str(path)], ROOT), ([str(ROOT / path)], tmp_path)]
    if name not in OF_PACKAGE and "." in name:
        starts.append((["-m", name.partition(".")[2]], ROOT / parts[0]))  # in its package's folder
    for words, where in starts:
        done = subprocess.run([sys.executable, *words, "--help"], cwd=where, capture_output=True, text=True, timeout=60)
        expected = f"python -m {name}: error: type it like this, in the folder that holds {parts[0]}/\n"
        assert (done.returncode, done.stdout, done.stderr) == (2, "", expected), words
