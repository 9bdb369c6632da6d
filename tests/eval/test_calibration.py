"""The temperature fit, against autograd and scipy."""

import math

import numpy as np
import pytest
import torch

from eval.calibration import fit_temperature, temperature_sums


def sampled(n=4000, v=50, scale=1.5, seed=0, dtype=torch.float64):
    """Logits and targets drawn from their softmax: calibrated at T = 1."""
    g = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(n, v, generator=g, dtype=torch.float64)
    targets = torch.multinomial(logits.softmax(1), 1, generator=g)[:, 0]
    return logits.to(dtype), targets


def test_temperature_sums_match_autograd():
    logits, targets = sampled(200)
    targets[::9] = -100
    for value in (0.2, 1.0, 3.0):
        beta = torch.tensor(value, dtype=torch.float64, requires_grad=True)
        nll = torch.nn.functional.cross_entropy(logits * beta, targets, reduction="sum")
        (slope,) = torch.autograd.grad(nll, beta, create_graph=True)
        (curvature,) = torch.autograd.grad(slope, beta)
        expected = torch.stack([(targets != -100).sum().double(), nll, slope, curvature]).detach()
        for chunk in (None, 1, 7, 1000):
            got = temperature_sums(logits, targets, value, chunk=chunk)
            torch.testing.assert_close(got, expected, rtol=1e-11, atol=0)  # float64, sums of 200 x 50 terms
        torch.testing.assert_close(temperature_sums(logits, targets, beta), expected, rtol=1e-11, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_temperature_sums_in_low_precision(dtype):
    logits, targets = sampled(500, v=1001, dtype=dtype)
    got, expected = temperature_sums(logits, targets, 0.8), temperature_sums(logits.double(), targets, 0.8)
    assert got.dtype == torch.float64
    # fp32 sums of 1001 terms: sqrt(1001) * 2^-24 = 2e-6 a row, less over 500 rows; the slope cancels, so
    # its error is relative to the sum of |d| over rows, some 10 times |slope| at beta = 0.8.
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=0)


def test_temperature_sums_edge_rows():
    """Masked logits are absent, ignored rows may hold anything, and the ignore index is the caller's."""
    logits, targets = sampled(50)
    padded = torch.cat([logits, torch.full((50, 6), -math.inf)], 1)
    expected = temperature_sums(logits, targets, 1.3)
    torch.testing.assert_close(temperature_sums(padded, targets, 1.3), expected, rtol=1e-13, atol=0)
    more, more_targets = torch.cat([logits, torch.full((3, 50), math.nan)]), torch.cat([targets, torch.full((3,), -1)])
    torch.testing.assert_close(temperature_sums(more, more_targets, 1.3, ignore_index=-1), expected, rtol=1e-13, atol=0)
    kept = logits.clone()
    temperature_sums(kept, targets, 1.3)
    assert torch.equal(kept, logits)  # works in place on its own copy only
    with pytest.raises(ValueError, match="expected logits"):
        temperature_sums(logits, targets[:-1], 1.0)


def fit(logits, targets, **kwargs):
    return fit_temperature(lambda beta: temperature_sums(logits, targets, beta), **kwargs)


@pytest.mark.parametrize("factor", [0.1, 0.5, 1.0, 1.3, 4.0, 12.0])
def test_temperature_undoes_a_known_factor(factor):
    logits, targets = sampled()
    count, _, _, curvature = temperature_sums(logits, targets, 1.0).tolist()
    result, plain = fit(factor * logits, targets), fit(logits, targets)
    # Targets come from softmax(logits): 1 / T estimates 1 with standard error 1 / sqrt(sum of Var_p[z]).
    assert plain.temperature == pytest.approx(1, abs=4 / math.sqrt(curvature))
    assert result.temperature == pytest.approx(factor * plain.temperature, rel=2e-3)  # two fits, 1e-3 each
    assert result.nll_after == pytest.approx(plain.nll_after, abs=1e-5)  # tolerance^2 * beta^2 d2 / 2
    assert result.converged and not result.at_bound and result.nll_after <= result.nll_before
    assert result.passes <= (4 if 0.5 <= factor <= 1.3 else 8)


@pytest.mark.parametrize("seed", range(5))
def test_temperature_matches_scipy(seed):
    optimize = pytest.importorskip("scipy.optimize", reason="scipy is the reference here")
    rng = np.random.default_rng(seed)
    logits, _ = sampled(400, v=int(rng.integers(2, 80)), scale=float(rng.uniform(0.5, 8)), seed=seed)
    targets = sampled(400, v=logits.shape[1], scale=1.0, seed=seed)[1]  # other logits of the same seed: T far from 1
    reference = optimize.minimize_scalar(
        lambda log_t: temperature_sums(logits, targets, math.exp(-log_t))[1].item() / 400,
        bounds=(math.log(0.05), math.log(20)),
        method="bounded",
        options={"xatol": 1e-9},
    )
    result = fit(logits, targets, tolerance=1e-8)
    # A minimiser that sees values only finds the place to the root of float64 rounding, about 1e-7.
    assert math.log(result.temperature) == pytest.approx(reference.x, abs=1e-6)
    assert result.nll_after == pytest.approx(reference.fun, rel=1e-12)


def test_temperature_stops_at_its_bounds():
    logits, targets = sampled(300)
    certain = fit(logits, logits.argmax(1))  # all correct: the colder the better
    assert (certain.at_bound, certain.temperature) == (True, pytest.approx(0.05, rel=1e-12))
    useless = fit(logits, logits.argmin(1), bounds=(0.1, 5))  # worse than uniform: the hotter the better
    assert (useless.at_bound, useless.temperature) == (True, pytest.approx(5, rel=1e-12))
    for result in (certain, useless):
        assert result.converged and result.nll_after < result.nll_before
    # A Newton step that is cut short at a bound is no sign of convergence: one more pass, then at_bound.
    parabola = fit_temperature(lambda beta: torch.tensor([1, (beta - 0.5) ** 2, 2 * beta - 1, 2]), bounds=(1, 1.0005))
    assert (parabola.at_bound, parabola.temperature, parabola.passes) == (True, pytest.approx(1.0005, rel=1e-12), 2)
    pinned = fit(3 * logits, targets, bounds=(0.5, 1))
    assert pinned.at_bound and pinned.temperature == 1 and pinned.passes == 1


def test_temperature_survives_wrong_curvature():
    """Newton is only a proposal: with the second derivative off by up to 100 the bracket still finds it."""
    rng = np.random.default_rng(0)
    logits, targets = sampled(300)
    for factor in (0.3, 1.0, 5.0):
        best = fit(factor * logits, targets, tolerance=1e-6).temperature
        for wrong in (0.01, 0.1, 0.3, "random", "zero"):

            def sums(beta, factor=factor, wrong=wrong):
                out = temperature_sums(factor * logits, targets, beta)
                out[3] *= {"random": 10 ** rng.uniform(-2, 0), "zero": 0.0}.get(wrong, wrong)
                return out

            result = fit_temperature(sums, max_passes=60)
            assert result.converged and result.nll_after <= result.nll_before
            assert result.temperature == pytest.approx(best, rel=2e-3)


def test_temperature_is_never_worse_than_none():
    """Whatever the derivatives say: here their sign is wrong, and every step climbs."""
    logits, targets = sampled(300)

    def sums(beta):
        return temperature_sums(logits, targets, beta) * torch.tensor([1, 1, -1, 1])

    result = fit_temperature(sums)
    assert result.temperature == 1 and result.nll_after == result.nll_before and not result.at_bound
    once = fit(3 * logits, targets, max_passes=1)
    assert once.temperature == 1 and once.passes == 1 and not once.converged


def test_fit_temperature_errors():
    logits, targets = sampled(10)
    for bounds in ((1.5, 20), (0.05, 0.5), (-1, 2)):
        with pytest.raises(ValueError, match="must be positive and hold 1"):
            fit(logits, targets, bounds=bounds)
    with pytest.raises(ValueError, match="no tokens"):
        fit(logits, torch.full_like(targets, -100))
    logits[3] = math.nan
    with pytest.raises(ValueError, match="at temperature 1 is nan"):
        fit(logits, targets)


def test_temperature_sums_never_read_the_device():
    """On the meta device there are no values to read: a host synchronisation raises."""
    temperature_sums(torch.empty(5, 7, device="meta"), torch.empty(5, dtype=torch.int64, device="meta"), 1.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_temperature_sums_on_cuda_match_cpu_without_synchronising():
    logits, targets = torch.randn(64, 999), torch.arange(64)
    logits_cuda, targets_cuda = logits.cuda(), targets.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sums = temperature_sums(logits_cuda, targets_cuda, 0.9)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # fp32 row sums of 999 terms in another order
    torch.testing.assert_close(sums.cpu(), temperature_sums(logits, targets, 0.9), rtol=1e-5, atol=0)
