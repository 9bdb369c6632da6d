"""The named scores inside the Triton kernels against their PyTorch forms."""

import pytest
import torch
from formulas import DEVICE
from named_scores import NAMED

from kernels import softmax_moments
from kernels.moments import Partials, score_partials


@pytest.mark.parametrize("name", NAMED)
def test_kernel_form_of_a_score_is_its_torch_form(name):
    # Every partial derivative by itself, at moments of rows from sure to hopeless.
    from kernels import triton_scores

    logits = torch.randn(64, 11, generator=torch.Generator().manual_seed(1)).mul_(6).to(DEVICE)
    m = softmax_moments(logits, torch.arange(64, device=DEVICE) % 11, impl="torch")
    want, partials = score_partials(m, NAMED[name])
    function = triton_scores.FUSED_SCORES[name]
    got = _evaluate(function, m, NAMED[name].fused[1])
    torch.testing.assert_close(got[0], want, rtol=1e-5, atol=1e-6)
    for g, p in zip(got[1:], Partials(*partials)[:4], strict=True):
        torch.testing.assert_close(g, torch.zeros_like(want) if p is None else p, rtol=2e-5, atol=1e-6)
    assert (name in triton_scores.READS_MEAN) == (partials.mean_log_p is not None)


def _evaluate(function, m, knob):
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(values, knob, out, N: tl.constexpr, F: tl.constexpr):
        i = tl.arange(0, N)
        log_p, r1, r2, mean = (tl.load(values + k * N + i) for k in range(4))
        p_y, entropy, n = (tl.load(values + k * N + i) for k in range(4, 7))
        parts = F(log_p, r1, r2, mean, p_y, entropy, n, tl.load(knob))
        for k in tl.static_range(5):
            tl.store(out + k * N + i, parts[k])

    n = len(m.r1)
    out = torch.empty(5, n, device=DEVICE)
    knob = torch.as_tensor(float(knob), device=DEVICE)
    values = torch.stack((m.log_p, m.r1, m.s, m.mean_log_p, m.log_p.exp(), m.entropy, m.support))
    kernel[(1,)](values, knob, out, N=n, F=function)
    return out.unbind(0)
