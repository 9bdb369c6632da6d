from pathlib import Path

import pytest


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The name of a toy script in the working directory, an empty folder but for it."""
    import toy_campaign

    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parents[2]}")  # for processes that start from there
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    module = toy_campaign.write_toy(tmp_path)
    yield f"{module.__name__}.py"
    toy_campaign.drop(module)
