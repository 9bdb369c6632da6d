"""The PyTorch implementation: its scratch memory and its threads."""

import contextlib

import pytest
import torch
from accounting import Largest
from formulas import ALPHA, DEVICE, EPS, VALUES, make

import kernels.torch_impl
from kernels import losses, softmax_moments


@contextlib.contextmanager
def threads(n):
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(DEVICE == "cuda", reason="the size of the groups is that of the CPU path")
def test_scratch_stays_small():
    logits, targets, _ = make(4000, 500)
    logits.requires_grad_()
    with threads(1), Largest(logits) as seen:  # what other threads do is not seen
        m = softmax_moments(logits, targets, inplace_backward=True, impl="torch")
        torch.autograd.grad(losses.dpsm(ALPHA)(m).sum(), logits)
    most = kernels.torch_impl.CPU_ELEMENTS
    assert seen.elements <= most, "more than one group's scratch was allocated at once"
    assert most < logits.numel() / 10, "this test needs larger logits"


@pytest.mark.skipif(DEVICE == "cuda", reason="groups run in threads on CPU only")
def test_threads_change_nothing():
    logits, targets, upstream = make(1500, 500)
    results = []
    for n in (1, 3):
        with threads(n):
            z = logits.clone().requires_grad_()
            m = softmax_moments(z, targets, impl="torch")
            (losses.smoothing(EPS)(m) * upstream).sum().backward()
            assert torch.get_num_threads() == n
            results.append((m, z.grad))
    (a, grad_a), (b, grad_b) = results
    assert torch.equal(grad_a, grad_b) and all(torch.equal(getattr(a, f), getattr(b, f)) for f in VALUES)


@pytest.mark.skipif(DEVICE == "cuda", reason="groups run in threads on CPU only")
def test_errors_in_threads_come_out():
    def work(buffers, number):
        raise ArithmeticError(number)

    with threads(2), pytest.raises(ArithmeticError):
        like = torch.zeros(4, 3)
        kernels.torch_impl._for_each_group(work, [(0,), (1,)], 2, like, like.dtype, 1)
