"""make clean takes away what was set up and cached, and nothing that somebody trained."""

import shutil
import subprocess
from pathlib import Path

import pytest

MAKEFILE = Path(__file__).parents[1] / "Makefile"


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_clean_leaves_the_runs(tmp_path):
    shutil.copy(MAKEFILE, tmp_path)
    for folder in (".venv", "cache", "runs/mine"):
        (tmp_path / folder).mkdir(parents=True)
    subprocess.run(["make", "clean"], cwd=tmp_path, check=True, capture_output=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["Makefile", "runs"] and (tmp_path / "runs" / "mine").is_dir()
