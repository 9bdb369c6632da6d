"""Shared fixtures. Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before import."""

import logging
import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402
from number_words import words  # noqa: E402


@pytest.fixture(autouse=True)
def heard():
    """machine.start_world keeps our log lines from the root logger, where caplog must hear them in the next test."""
    yield
    logging.getLogger("scorecast").propagate = True


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder of text that is the same on every machine: arithmetic in words, split into train, val and test."""
    folder = tmp_path_factory.mktemp("arithmetic")
    for split, first, count in (("train", 3, 120), ("val", 1003, 20), ("test", 2003, 20)):
        lines = [
            f"{words(i)} times {words(i + 7)} is {words(i * (i + 7) % 1000000)}.\n" for i in range(first, first + count)
        ]
        (folder / f"{split}.txt").write_text("".join(lines))
    return folder
