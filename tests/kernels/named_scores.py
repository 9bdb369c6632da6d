"""The scores that have a kernel, one that has none, and a small head to compute them on."""

import torch
from formulas import DEVICE, PLAIN, SCORES

from kernels import losses

ALPHA = torch.tensor(0.3, device=DEVICE)
# Of the formulas' scores one reads a tensor here, and one has a power that is no integer.
NAMED = {name: SCORES[name] for name in PLAIN} | {"dpsm": losses.dpsm(ALPHA), "focal": losses.focal(1.5)}
VECTORS = ("log_p", "r1", "r2", "mean_log_p", "r3", "r4", "entropy", "confidence", "support")


def custom(m):
    return m.r1 * m.log_p.square() + m.r2.sqrt()


def head(n=13, d=8, v=37, seed=0, dtype=torch.float32, ignored=(1, 6)):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=generator)
    weight = torch.randn(v, d, generator=generator)
    bias = torch.randn(v, generator=generator)
    targets = torch.randint(v, (n,), generator=generator)
    weights = torch.rand(n, generator=generator) * 2
    weights[3] = 0.0
    targets[list(ignored)] = -100
    leaves = [x.to(DEVICE, dtype).requires_grad_() for x in (hidden, weight, bias)]
    return *leaves, targets.to(DEVICE), weights.to(DEVICE)


def same_moments(got, want, tolerance=3e-5):
    for name in VECTORS:
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=tolerance, atol=2e-6, msg=name)
    assert torch.equal(got.correct, want.correct) and torch.equal(got.valid, want.valid)
