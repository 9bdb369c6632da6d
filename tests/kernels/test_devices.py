"""What a caller gives as a 0-d tensor reaches a kernel on the logits' device: a stub that records stands for Triton."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from kernels import ProperScoreLoss, head_pass, linear_score, logits, logits_score, softmax
from kernels.losses import LOSSES, dpsm, focal, power, smoothing

META = torch.device("meta")  # another device than the CPU, on which nothing is computed


class Stub:
    """Records the devices of all tensors that any of its kernels is given, and refuses a tensor of another."""

    FUSED_SCORES = dict.fromkeys(LOSSES, 0)
    DTYPES, CAN_KEEP_W, IN_PLACE = (torch.float32,), False, True

    def __init__(self):
        self.seen = {}

    def __getattr__(self, name):
        def kernel(*given, **named):
            tensors = {str(i): v for i, v in [*enumerate(given), *named.items()] if isinstance(v, Tensor)}
            self.seen |= {f"{name} {key}": value.device for key, value in tensors.items()}

        return kernel


@pytest.fixture
def stub(monkeypatch):
    stub = Stub()
    for module in (logits, head_pass, softmax):
        monkeypatch.setattr(module, "choose_impl", lambda impl, tensor: stub)
        # On the CPU it reads values, and there are none on META.
        known = lambda targets, n, vocab, ignore, device: (targets, targets != ignore, None)  # noqa: E731
        monkeypatch.setattr(module, "check_targets", known)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)  # META has no autocast
    monkeypatch.setattr(torch, "autocast", lambda kind, enabled: nullcontext())
    return stub


def scalar(value: float) -> Tensor:
    return torch.tensor(value)


SCORES = {
    "dpsm": lambda: dpsm(scalar(0.5)),
    "dpsm, by order": lambda: dpsm(scalar(0.5), path="order"),
    "power": lambda: power(scalar(1.5)),
    "focal": lambda: focal(2.0),
    "smoothing": lambda: smoothing(0.1),
}


@pytest.mark.parametrize("make", SCORES.values(), ids=SCORES)
@pytest.mark.parametrize("denominator", [None, 3.0])
def test_scalars_of_the_cpu_are_brought_to_the_logits(stub, make, denominator):
    z = torch.empty(4, 10, device=META, requires_grad=True)
    targets = torch.zeros(4, dtype=torch.long, device=META)
    how = {} if denominator is None else dict(denominator=scalar(denominator))
    loss, _ = logits_score(z, targets, make(), **how)
    assert loss.device == META and set(stub.seen.values()) == {META}


@pytest.mark.parametrize("name", ["ce", "dpsm", "power", "smoothing"])
def test_a_module_need_not_be_moved(stub, name):
    loss_fn = ProperScoreLoss(name, class_weights=torch.ones(10))
    z = torch.empty(2, 2, 10, device=META, requires_grad=True)
    assert loss_fn(z, torch.zeros(2, 2, dtype=torch.long, device=META)).device == META
    assert set(stub.seen.values()) == {META} and loss_fn.alpha.device.type == "cpu"  # the module stays where it is


@pytest.mark.parametrize("make", SCORES.values(), ids=SCORES)
def test_scalars_are_brought_to_the_hidden_states(stub, make):
    hidden, weight = torch.empty(4, 6, device=META, requires_grad=True), torch.empty(10, 6, device=META)
    targets = torch.zeros(4, dtype=torch.long, device=META)
    loss, _ = linear_score(hidden, weight, targets, make(), denominator=scalar(4.0), chunk=4)
    assert loss.device == META and set(stub.seen.values()) == {META}


def test_the_value_is_the_callers():
    """Brought, not lost: refilled between two calls it counts as it is then."""
    z, targets = torch.randn(4, 10), torch.arange(4)
    loss_fn = ProperScoreLoss("dpsm", warmup=0.5)
    found = []
    for step in (0, 5, 9):
        loss_fn.set_step(step, 10)
        found.append(loss_fn.score(torch.device("meta")).fused[1].device.type)
        want = logits_score(z, targets, dpsm(loss_fn.alpha.item()))[0]
        torch.testing.assert_close(loss_fn(z, targets), want)
    assert found == ["meta"] * 3
