"""The choice of an implementation, and the arguments that every call refuses."""

import logging

import pytest
import torch
from formulas import DEVICE, IMPLS

import kernels.impl
from kernels import softmax_moments


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(logits=torch.zeros(2, 3, 4)), "flatten batch and time"),
        (dict(logits=torch.zeros(2, 0)), "V >= 1"),
        (dict(logits=torch.zeros(2, 4, dtype=torch.int64)), "got torch.int64"),
        (dict(targets=torch.zeros(3, dtype=torch.int64)), r"shape \(2,\)"),
        (dict(targets=torch.zeros(2)), "integers"),
        (dict(targets=torch.tensor([0, 4])), "target 4 is outside"),
        (dict(targets=torch.tensor([-100, -1])), "target -1 is outside"),
        (dict(impl="cuda"), "unknown impl 'cuda'"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = dict(logits=torch.zeros(2, 4), targets=torch.zeros(2, dtype=torch.int64)) | change
    with pytest.raises(ValueError, match=message):
        softmax_moments(arguments.pop("logits"), arguments.pop("targets"), **arguments)


def test_impl_is_what_was_asked_for():
    z = torch.zeros(1, 4, device=DEVICE)
    names = [kernels.impl.choose_impl(impl, z).__name__ for impl in (*IMPLS, "auto")]
    assert names[:2] == ["kernels.torch_impl", "kernels.triton_impl"] and names[2] == names[DEVICE == "cuda"]


def test_triton_on_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="needs CUDA tensors"):
        softmax_moments(torch.zeros(1, 4), torch.tensor([0]), impl="triton")


def test_auto_says_once_what_it_chose(caplog):
    kernels.impl._chosen.cache_clear()
    with caplog.at_level(logging.INFO, logger="scorecast"):
        for _ in range(3):
            softmax_moments(torch.zeros(1, 4), torch.tensor([0]))
    said = [r.getMessage() for r in caplog.records if r.name == "scorecast"]
    assert len(said) == 1 and "torch" in said[0] and "cpu" in said[0]
