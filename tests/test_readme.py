"""README is true: its examples run as they stand."""

import pytest
from readme import python_examples

HERE = [code for code in python_examples() if "kernels.hf" not in code]  # the others need transformers: test_hf.py


def test_all_examples_are_found():
    assert len(HERE) >= 4 and len(python_examples()) >= len(HERE) + 3


@pytest.mark.parametrize("code", HERE, ids=lambda code: code.splitlines()[1])
def test_an_example_runs_in_a_fresh_namespace(tmp_path, monkeypatch, code):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    assert not list(tmp_path.iterdir())
    figure = names["forecast"].mean if "forecast" in names else names["loss"].item()
    assert 0 < figure < 100
