"""The named scores inside the Triton kernels against their PyTorch forms."""

import pytest
import torch
from formulas import DEVICE, power_cases
from named_scores import NAMED

from kernels import softmax_moments
from kernels.moments import Partials, score_partials


@pytest.mark.parametrize("name", [name for name in NAMED if name != "power"])
def test_kernel_form_of_a_score_is_its_torch_form(name):
    # Every partial derivative by itself, at moments of rows from sure to hopeless.
    from kernels import triton_scores

    logits = torch.randn(64, 11, generator=torch.Generator().manual_seed(1)).mul_(6).to(DEVICE)
    m = softmax_moments(logits, torch.arange(64, device=DEVICE) % 11, impl="torch")
    want, partials = score_partials(m, NAMED[name])
    function = triton_scores.FUSED_SCORES[name]
    values = (m.log_p, m.r1, m.r2, m.mean_log_p, m.log_p.exp(), m.entropy, m.support)
    got = _evaluate(function, values, NAMED[name].fused[1])
    torch.testing.assert_close(got[0], want, rtol=1e-5, atol=1e-6)
    for g, p in zip(got[1:], Partials(*partials)[:4], strict=True):
        torch.testing.assert_close(g, torch.zeros_like(want) if p is None else p, rtol=2e-5, atol=1e-6)
    assert (name in triton_scores.READS_MEAN) == (partials.mean_log_p is not None)


def test_kernel_form_of_the_power_score_keeps_its_digits():
    from kernels import triton_scores

    for order, m, want in power_cases((1.000001, 1.1, 1.5, 2.0, 3.0, 40.5)):
        log_p, r1, s = (x.float() for x in (m.log_p, m.r1, m.s))
        loss, slope, zero, at_s, none = _evaluate(triton_scores.power, (log_p, r1, s, s, log_p.exp(), s, s), order)
        for got, exact in zip((loss, slope, at_s), want, strict=True):
            torch.testing.assert_close(got.double(), exact, rtol=2e-5, atol=1e-35, msg=lambda x: f"{order}: {x}")  # noqa: B023
        assert (zero == 0).all() and (none == 0).all()


def test_nothing_becomes_nan_where_the_target_is_impossible():
    from kernels import triton_scores

    one = torch.ones(1, device=DEVICE)
    values = (-torch.inf * one, one, one, -one, 0 * one, 0 * one, one)  # the one other token has everything
    for name, score in NAMED.items():
        got = torch.stack(_evaluate(triton_scores.FUSED_SCORES[name], values, score.fused[1]))
        assert not got.isnan().any(), name
        assert got[1:].isfinite().all() or name == "focal", name  # its slope at r1 is infinite with its loss


def _evaluate(function, values, knob):
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(log_p, r1, r2, mean, p_y, entropy, live, knob, out, N, BLOCK: tl.constexpr, F: tl.constexpr):
        i = tl.arange(0, BLOCK)
        on = i < N
        z, a, b, c = (tl.load(x + i, mask=on, other=-1.0) for x in (log_p, r1, r2, mean))
        d, e, f = (tl.load(x + i, mask=on, other=-1.0) for x in (p_y, entropy, live))
        parts = F(z, a, b, c, d, e, f, tl.load(knob))
        for k in tl.static_range(5):
            tl.store(out + k * N + i, parts[k], mask=on)

    n = len(values[0])
    out = torch.empty(5, n, device=DEVICE)
    knob = torch.as_tensor(float(knob), device=DEVICE)
    values = [x.detach().contiguous() for x in values]
    kernel[(1,)](*values, knob, out, N=n, BLOCK=triton.next_power_of_2(n), F=function)
    return out.unbind(0)
