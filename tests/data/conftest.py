"""Fixtures of the tests of data."""

import pytest
from text_files import topics

from data.tokenizer import Tokenizer, train_bpe


@pytest.fixture(scope="session")
def bpe() -> Tokenizer:
    return Tokenizer.from_files({"tokenizer.json": train_bpe(topics(), 600)}, "bpe:600")


@pytest.fixture
def no_lm_data(monkeypatch):
    monkeypatch.delenv("LM_DATA", raising=False)
