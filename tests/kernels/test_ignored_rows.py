"""linear_score leaves ignored rows out before the head: the same figures, and no product for them."""

import pytest
import torch
from formulas import DEVICE, IMPLS
from named_scores import head, same_moments

from kernels import linear_score, losses
from kernels.head_pass import HeadPass


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignored", [(), (0, 1, 5, 12), range(13)], ids=["none", "some", "all"])
def test_the_figures_are_those_of_all_rows(ignored, reduction, impl):
    hidden, weight, bias, targets, weights = head(ignored=ignored)
    kept = targets != -100
    logits = hidden @ weight.T + bias
    each = torch.nn.functional.cross_entropy(logits, targets, reduction="none") * weights
    want = {"none": each, "sum": each.sum(), "mean": each.sum() / (weights[kept].sum() if kept.any() else 1)}[reduction]
    expected = torch.autograd.grad(want.sum(), (hidden, weight, bias))
    given = dict(bias=bias, weights=weights, reduction=reduction, chunk=4, fisher=True, predictions=True, impl=impl)
    loss, m = linear_score(hidden, weight, targets, losses.ce, **given)
    torch.testing.assert_close(loss, want)
    for got, right in zip(torch.autograd.grad(loss.sum(), (hidden, weight, bias)), expected, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-6)
    assert torch.equal(m.valid, kept)
    for name in ("log_p", "r1", "entropy", "lse", "fisher", "predicted", "confidence", "support"):
        assert not getattr(m, name)[~kept].any(), name
    if kept.any():
        some = targets.new_tensor(range(13))[kept]
        _, fewer = linear_score(hidden[some], weight, targets[some], losses.ce, **given | dict(weights=weights[some]))
        whole = type(m)(**{k: v[some] if isinstance(v, torch.Tensor) else v for k, v in vars(m).items()})
        same_moments(whole, fewer)
        torch.testing.assert_close(whole.fisher, fewer.fisher)


def test_the_head_sees_only_rows_in_the_loss():
    hidden, weight, _, targets, _ = head(ignored=range(9))
    seen = HeadPass(hidden, weight, targets, ignore_index=-100, chunk=None, impl="torch")
    assert seen.n == 4 and seen.h.shape == (4, 8) and seen.mask is None and seen.chunks == [slice(0, 4)]


def test_a_wrong_number_of_tokens_is_refused():
    hidden, weight, _, targets, _ = head(ignored=(1, 6))
    linear_score(hidden, weight, targets, losses.ce, tokens=11)
    with pytest.raises(ValueError, match="tokens=10, but 11 targets are in the loss"):
        linear_score(hidden, weight, targets, losses.ce, tokens=10)
    with pytest.raises(ValueError, match="at most 13; got 14"):
        linear_score(hidden, weight, targets, losses.ce, tokens=14)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_a_gpu_skips_by_the_number_of_tokens_without_a_wait():
    hidden, weight, _, targets, _ = head(ignored=(1, 6))
    want, _ = linear_score(hidden, weight, targets, losses.ce)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got, _ = linear_score(hidden, weight, targets, losses.ce, tokens=11)
        wrong, _ = linear_score(hidden, weight, targets, losses.ce, tokens=10)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(got, want)
    assert wrong.isnan()
