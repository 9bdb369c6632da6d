"""Calibration: bins, sums and ranks, against brute force and netcal."""

import json
import math
import types

import numpy as np
import pytest
import torch
from on_ranks import on_ranks
from torch import distributed as dist

import kernels
from kernels import Calibration
from kernels.calibration import BASE_BINS


def make_moments(confidence, correct=None, valid=None, **scores):
    """Moments with the given confidences; scores that a test does not name are those of p_y = 1."""
    confidence = torch.as_tensor(confidence, dtype=torch.float32)
    n, device = len(confidence), confidence.device
    zeros, ones = torch.zeros(n, device=device), torch.ones(n, dtype=torch.bool, device=device)
    fields = dict(log_p=zeros, r1=zeros, r2=zeros, entropy=zeros)
    fields |= dict(correct=ones if correct is None else correct, valid=ones if valid is None else valid)
    return types.SimpleNamespace(confidence=confidence, **(fields | scores))


def moments_of_logits(logits, targets):
    """What kernels.softmax_moments returns, by the definitions, in float64."""
    p = logits.double().softmax(1)
    valid = targets != -100
    p_y = p.gather(1, targets.clamp_min(0)[:, None])
    off = p.scatter(1, targets.clamp_min(0)[:, None], 0)
    fields = dict(
        log_p=p_y[:, 0].log(),
        r1=off.sum(1),
        r2=(off**2).sum(1),
        entropy=-(p * p.log()).sum(1),
        confidence=p.amax(1),
        correct=p.argmax(1) == targets,
    )
    zeroed = {name: torch.where(valid, value, 0).to(torch.float32) for name, value in fields.items()}
    return types.SimpleNamespace(**(zeroed | dict(correct=fields["correct"] & valid, valid=valid)))


def random_moments(n, seed=0, edges=True):
    """Confidences all over [0, 1], a third of them at 1, and when asked every edge of 10, 15 and 100 bins."""
    g = torch.Generator().manual_seed(seed)
    confidence = torch.rand(n, generator=g)
    confidence[: n // 3] = 1 - confidence[: n // 3] ** 4 / 50
    if edges:
        on_edge = torch.cat([torch.arange(b + 1, dtype=torch.float64) / b for b in (10, 15, 100)]).float()
        confidence[-len(on_edge) :] = on_edge
    correct = torch.rand(n, generator=g) < 0.2 + 0.6 * confidence**2
    log_p, r1, r2, entropy = -torch.rand(4, n, generator=g)
    return make_moments(
        confidence, correct, torch.rand(n, generator=g) < 0.9, log_p=log_p, r1=-r1, r2=-r2, entropy=-entropy
    )


def take(moments, index):
    return types.SimpleNamespace(**{name: value[index] for name, value in vars(moments).items()})


def calibrated(moments):
    calibration = Calibration()
    calibration.update(moments)
    return calibration


def sums_close(a, b, rel=1e-12):
    """Integers equal; floats to the rounding of float64 sums of about 1e4 terms in another order."""
    assert torch.equal(a.count, b.count) and torch.equal(a.correct_sum, b.correct_sum)
    torch.testing.assert_close(a.confidence_sum, b.confidence_sum, rtol=rel, atol=0)
    torch.testing.assert_close(a.sums, b.sums, rtol=rel, atol=0)


# --------------------------------------------------------------------------------------------------
# Bins


def test_every_edge_belongs_to_the_bin_below():
    edges = (torch.arange(1, BASE_BINS + 1, dtype=torch.float64) / BASE_BINS).float()
    assert calibrated(make_moments(edges)).count.tolist() == [1] * BASE_BINS
    above = torch.nextafter(edges[:-1], torch.tensor(2.0))
    assert calibrated(make_moments(above)).count.tolist() == [0] + [1] * (BASE_BINS - 1)


def test_ends_of_the_range():
    inside = make_moments([0.0, 1e-38, 1.0, 1 + 2**-23])  # a softmax may exceed 1 by a rounding
    count = calibrated(inside).count
    assert count[0] == 2 and count[-1] == 2 and count.sum() == 4
    unsafe = calibrated(make_moments([math.nan, 0.5]))  # counted, visible in the sums, never out of bounds
    assert unsafe.count.sum() == 2 and math.isnan(unsafe.compute()["ece10"])


def brute_force_bins(moments, bins):
    """Lists of (confidence, correct) of each bin (lo, hi], edges rounded to fp32 as the confidences are."""
    keep = moments.valid.numpy()
    confidence, correct = moments.confidence.numpy()[keep], moments.correct.numpy()[keep]
    out = []
    for k in range(bins):
        lo, hi = np.float32(k / bins), np.float32((k + 1) / bins)
        inside = (confidence > lo if k else confidence >= 0) & (confidence <= hi)
        out.append((confidence[inside].astype(np.float64), correct[inside]))
    return out


@pytest.mark.parametrize("bins", [1, 10, 15, 100, 300, BASE_BINS])
def test_reliability_and_ece_match_brute_force(bins):
    moments = random_moments(4000)
    calibration, reference = calibrated(moments), brute_force_bins(moments, bins)
    diagram = calibration.reliability(bins)
    assert diagram["count"] == [len(c) for c, _ in reference]
    assert diagram["lo"][0] == 0 and diagram["hi"][-1] == 1 and diagram["lo"][1:] == diagram["hi"][:-1]
    for got, (c, y) in zip(zip(diagram["confidence"], diagram["accuracy"], strict=True), reference, strict=True):
        assert got == (pytest.approx((c.mean(), y.mean()), rel=1e-12) if len(c) else (None, None))
    total = sum(len(c) for c, _ in reference)
    expected = sum(len(c) * abs(c.mean() - y.mean()) for c, y in reference if len(c)) / total
    assert calibration.ece(bins) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("bins", [10, 15, 100])
@pytest.mark.parametrize("n", [50, 5000])
def test_ece_matches_netcal(bins, n):
    """netcal bins [lo, hi), so the two agree only away from the edges; there, to float64 rounding.

    It takes a vector of confidences as those of a binary event whose labels are `correct`: top-label ECE.
    """
    metrics = pytest.importorskip("netcal.metrics", reason="needs netcal and scikit-learn", exc_type=ImportError)
    moments = random_moments(n, seed=n, edges=False)
    keep = moments.valid & ((moments.confidence * bins - (moments.confidence * bins).round()).abs() > 1e-4)
    moments = take(moments, keep)
    confidence, correct = moments.confidence.double().numpy(), moments.correct.numpy().astype(int)
    expected = metrics.ECE(bins=bins).measure(confidence, correct)
    assert expected > 0.01
    # netcal clips confidences to 1 - 2.2e-16 and averages by numpy: 1e-12 is float64 rounding.
    assert calibrated(moments).ece(bins) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("bins", [10, 100])
def test_equal_mass_is_within_its_stated_error_of_sorting(bins):
    moments = random_moments(20_000, edges=False)
    calibration = calibrated(moments)
    confidence = moments.confidence[moments.valid].double().numpy()
    correct = moments.correct[moments.valid].double().numpy()
    order = np.argsort(confidence, kind="stable")
    groups = np.array_split(order, bins)
    expected = sum(abs((confidence[g] - correct[g]).sum()) for g in groups) / len(order)
    # Only tokens of base bins that hold a quantile can change bins, at most half of each such bin, and one
    # token moved changes two sums by at most 1 each. array_split puts quantiles within one token.
    straddled = {int(np.ceil(confidence[order[k]] * BASE_BINS)) for k in np.cumsum([len(g) for g in groups])[:-1]}
    bound = sum(int(calibration.count[b - 1]) + 2 for b in straddled) / len(order)
    error = abs(calibration.ece(bins, mass=True) - expected)
    assert error <= bound
    assert bins == 100 or error < 0.1 * expected  # the bound is loose; at 10 bins the agreement is close


@pytest.mark.parametrize("bins", [10, 100])
def test_equal_mass_edges_are_the_nearest_to_the_quantiles(bins):
    """Of the two ends of the base bin that holds a quantile, the edge is the one with fewer tokens between."""
    calibration = calibrated(random_moments(20_000, edges=False))
    base, merged = calibration.count.cumsum(0).tolist(), calibration._merged(bins, True)[0].cumsum(0).tolist()
    assert len(merged) == bins and merged[-1] == base[-1]
    for j in range(1, bins):
        quantile = base[-1] * j / bins
        assert abs(merged[j - 1] - quantile) == min(abs(n - quantile) for n in base)


def test_equal_mass_keeps_ties_together():
    """1000 tokens at confidence 0.9, 60 % of them correct, have a gap of 0.3 in any order and number of bins."""
    correct = torch.arange(1000) % 5 < 3
    for order in (torch.arange(1000), torch.randperm(1000, generator=torch.Generator().manual_seed(0))):
        metrics = calibrated(make_moments(torch.full((1000,), 0.9), correct[order])).compute()
        for name in ("ece10", "ece15", "ece100", "ece10_mass", "ece100_mass"):
            assert metrics[name] == pytest.approx(0.3, abs=1e-7)  # 0.9 in fp32


# --------------------------------------------------------------------------------------------------
# Sums


def test_scores_match_their_definitions():
    torch.manual_seed(0)
    logits, targets = 3 * torch.randn(300, 17), torch.randint(17, (300,))
    targets[::7] = -100
    got = calibrated(moments_of_logits(logits, targets)).compute()
    p, y = logits.double().softmax(1)[targets != -100], targets[targets != -100]
    one_hot = torch.nn.functional.one_hot(y, 17)
    p_y = (p * one_hot).sum(1)
    expected = {
        "tokens": len(y),
        "nll": -p_y.log().mean().item(),
        "ppl": math.exp(-p_y.log().mean().item()),
        "brier": ((p - one_hot) ** 2).sum(1).mean().item(),
        "spherical": (1 - p_y / p.norm(dim=1)).mean().item(),
        "entropy": torch.special.entr(p).sum(1).mean().item(),
        "accuracy": (p.argmax(1) == y).double().mean().item(),
        "confidence": p.amax(1).mean().item(),
    }
    # fp32 moments: 2^-24 relative each, a few operations, nll up to 12 in the exponent of ppl
    assert {name: got[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    assert set(got) == {*expected, "ece10", "ece15", "ece100", "ece10_mass", "ece100_mass"}
    assert all(type(value) in (int, float) for value in got.values())
    json.dumps(got, allow_nan=False)


def test_kernel_moments_are_accepted():
    torch.manual_seed(0)
    logits, targets = 3 * torch.randn(300, 17), torch.randint(17, (300,))
    targets[::7] = -100
    expected = calibrated(moments_of_logits(logits, targets)).compute()
    moments = kernels.softmax_moments(logits.requires_grad_(), targets, impl="torch")
    assert calibrated(moments).compute() == pytest.approx(expected, rel=1e-6)  # fp32 against float64, as above
    assert moments.log_p.requires_grad  # counting leaves the graph alone


def test_streaming_equals_one_shot():
    moments = random_moments(5000)
    whole, stream = calibrated(moments), Calibration()
    for part in torch.arange(5000).split([1, 0, 700, 2048, 2251]):
        stream.update(take(moments, part))
    sums_close(stream, whole)
    assert stream.compute() == pytest.approx(whole.compute(), rel=1e-12)
    stream.reset()
    stream.update(moments)
    sums_close(stream, whole, rel=0)  # reset leaves nothing, and the CPU is deterministic


def test_invalid_tokens_do_not_count():
    moments = random_moments(3000)
    garbage = types.SimpleNamespace(**{name: value.clone() for name, value in vars(moments).items()})
    for name in ("confidence", "log_p", "r1", "r2", "entropy"):
        getattr(garbage, name)[~moments.valid] = math.nan
    garbage.correct[~moments.valid] = True
    assert 0 < (~moments.valid).sum()
    sums_close(calibrated(garbage), calibrated(take(moments, moments.valid)))


def test_no_tokens_is_an_error():
    with pytest.raises(ValueError, match="no tokens"):
        Calibration().compute()
    with pytest.raises(ValueError, match="no tokens"):
        calibrated(make_moments([0.5], valid=torch.tensor([False]))).compute()
    assert Calibration().reliability(10)["count"] == [0] * 10


@pytest.mark.parametrize("bins", [7, 0, 6000])
def test_bins_must_divide(bins):
    with pytest.raises(ValueError, match=f"bins={bins} does not divide the 3000"):
        Calibration().reliability(bins)


def test_state_dict_round_trip():
    moments, other = random_moments(2000), random_moments(1000, seed=1)
    first = calibrated(moments)
    state = first.state_dict()
    first.update(other)
    second = Calibration()
    second.load_state_dict(state)
    sums_close(second, calibrated(moments), rel=0)  # the state is a copy
    second.update(other)
    sums_close(second, first, rel=0)
    with pytest.raises(ValueError, match="300 base bins, expected 3000"):
        second.load_state_dict(Calibration.from_bins(first.bins(300)).state_dict())


def test_bins_round_trip_through_json():
    calibration = calibrated(random_moments(3000))
    want = calibration.compute()
    loaded = Calibration.from_bins(json.loads(json.dumps(calibration.bins())))
    got = loaded.compute()
    assert loaded.reliability(15) == calibration.reliability(15)
    known = [name for name in want if name not in ("nll", "ppl", "brier", "spherical", "entropy")]
    assert {name: got[name] for name in known} == {name: want[name] for name in known}
    assert math.isnan(got["nll"]) and math.isnan(got["ppl"])
    small = Calibration.from_bins(calibration.bins(300))
    for bins in (10, 15, 100, 300):
        assert small.ece(bins) == pytest.approx(calibration.ece(bins), rel=1e-12)
    for broken in ({}, {"count": [1]}, {"count": [1], "confidence_sum": [1.0, 2.0], "correct_sum": [1]}):
        with pytest.raises(ValueError, match="three lists of one length"):
            Calibration.from_bins(broken)


def test_update_never_reads_the_device():
    """On the meta device there are no values to read: a host synchronisation raises."""
    meta = types.SimpleNamespace(**{name: value.to("meta") for name, value in vars(random_moments(300)).items()})
    Calibration("meta").update(meta)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_matches_cpu_without_synchronising():
    moments = random_moments(5000)
    on_device = types.SimpleNamespace(**{name: value.cuda() for name, value in vars(moments).items()})
    calibration = Calibration("cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        calibration.update(on_device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    sums_close(calibration._host(), calibrated(moments))
    assert calibration.compute() == pytest.approx(calibrated(moments).compute(), rel=1e-12)


def reduce_on_rank(arguments) -> None:
    dist.init_process_group("gloo")
    (folder,), rank = arguments, dist.get_rank()
    calibration = calibrated(take(random_moments(4000), slice(0, 1500) if rank == 0 else slice(1500, None)))
    before = calibration.state_dict()
    calls, all_reduce = [], dist.all_reduce
    dist.all_reduce = lambda *args, **kwargs: calls.append(1) or all_reduce(*args, **kwargs)
    calibration.all_reduce()
    torch.save((before, calibration.state_dict(), len(calls)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_all_reduce_over_two_processes(tmp_path):
    on_ranks(2, reduce_on_rank, [str(tmp_path)])
    whole = calibrated(random_moments(4000))
    for rank in range(2):
        before, after, calls = torch.load(tmp_path / f"{rank}.pt")
        assert before["count"].sum() < after["count"].sum() and calls == 1
        reduced = Calibration()
        reduced.load_state_dict(after)
        sums_close(reduced, whole)


def test_all_reduce_guards_against_counting_twice():
    calibration = calibrated(random_moments(300))
    calibration.all_reduce()  # no process group: the sums stay
    sums_close(calibration, calibrated(random_moments(300)), rel=0)
    with pytest.raises(ValueError, match="already"):
        calibration.all_reduce()
    with pytest.raises(ValueError, match="twice"):
        calibration.update(random_moments(300))
    calibration.reset()
    calibration.update(random_moments(300))
