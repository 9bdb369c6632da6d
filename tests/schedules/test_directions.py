"""What FoT reads of optimizers that are not Adam, what it says of those that it cannot read, and that it steers all."""

import logging
import re

import pytest
import torch

from runtime.optim import Muon
from schedules import FoT, ScheduleFreePlus, make_rule, schedule_free_adamw
from schedules.directions import direction, kinds
from schedules.gradient_stats import GradientStats


def measured(make, lr, steps=300, begin=60, noise=0.3, far=0.3, seed=0, rates=(1.0,)):
    """An optimizer on sum h W^2 / 2 with white noise, W [20, 30]: means of (slope, curvature, best step) as measured in
    half-batches, and as they are along the true step, by the squared learning rate, which is lr times one of rates."""
    generator = torch.Generator().manual_seed(seed)
    h = torch.logspace(-1, 1, 600).view(20, 30)
    W = torch.nn.Parameter(far * torch.randn(20, 30, generator=generator))
    optimizer = make([W], lr)
    stats, truth, n = GradientStats(optimizer), torch.zeros(2, dtype=torch.float64), 0
    for t in range(steps):
        before, optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"], lr * rates[t // 2 % len(rates)]
        rate = optimizer.param_groups[0]["lr"]
        G = h * W.detach()
        parts = [G + 1.4 * noise * torch.randn(20, 30, generator=generator) for _ in range(2)]
        asked = t >= begin and t % 2 == 0
        W.grad = parts[0] / 2
        if asked:
            stats.micro(0.5)
        W.grad = sum(parts) / 2
        stats.sample(asked, before)
        old = W.detach().clone()
        optimizer.step()
        if asked:
            u = (old - W.detach()) / rate
            truth += rate**2 * torch.stack([(G * u).sum(), (u * h * u).sum()]).double()
            n += rate**2
    got, true = stats.unweighted(stats.means(stats.sums.tolist())), (truth / n).tolist()
    return got, dict(slope=true[0], curvature=true[1])


def best(x):
    return x["slope"] / x["curvature"]


@pytest.mark.parametrize("momentum, nesterov", [(0.0, False), (0.9, False), (0.9, True)])
def test_sgds_best_step_is_that_of_a_quadratic(momentum, nesterov):
    lr = 0.03 if momentum else 0.1
    got, true = measured(lambda p, lr: torch.optim.SGD(p, lr, momentum=momentum, nesterov=nesterov), lr)
    # 120 pairs of noisy gradients: some 5 % of each (4 and 11 % on two seeds); both are unbiased.
    assert got["slope"] == pytest.approx(true["slope"], rel=0.15)
    assert got["curvature"] == pytest.approx(true["curvature"], rel=0.15)
    assert got["noise"] == pytest.approx(600 * 0.0882, rel=0.05)  # 600 coordinates of (1.4 * 0.3)^2 / 2


def test_muons_best_step_is_that_of_a_quadratic():
    got, true = measured(lambda p, lr: torch.optim.Muon(p, lr, adjust_lr_fn="match_rms_adamw", weight_decay=0.0), 0.03)
    assert best(got) == pytest.approx(best(true), rel=0.2)  # as with Adam, sampling; m's bounds are factors of 2


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("name", ["SGD", "Muon"])
def test_a_direction_is_the_step_that_is_made(name, nesterov):
    p = torch.nn.Parameter(torch.randn(6, 4, generator=torch.Generator().manual_seed(1)))
    how = dict(weight_decay=0.1, dampening=0.0 if nesterov else 0.2) if name == "SGD" else dict(weight_decay=0.0)
    optimizer = getattr(torch.optim, name)([p], 0.1, momentum=0.9, nesterov=nesterov, **how)
    for _ in range(3):
        p.grad, old = p.detach() ** 3, p.detach().clone()
        ahead = direction(optimizer.param_groups[0], optimizer.state[p], p, p.grad)
        optimizer.step()
        torch.testing.assert_close(old - p.detach(), 0.1 * ahead, rtol=1e-5, atol=1e-6)  # fp32 of the difference


def test_schedule_frees_direction_is_the_step_of_its_base_point():
    pytest.importorskip("schedulefree")
    p = torch.nn.Parameter(torch.randn(6, 4, generator=torch.Generator().manual_seed(1)))
    optimizer = schedule_free_adamw([p], 0.1, betas=(0.9, 0.95), weight_decay=0.1)
    for _ in range(3):
        p.grad, old = p.detach() ** 3, optimizer.state[p].get("z", p.detach()).clone()
        ahead = direction(optimizer.param_groups[0], optimizer.state[p], p, p.grad)
        optimizer.step()
        torch.testing.assert_close(old - optimizer.state[p]["z"], 0.1 * ahead, rtol=1e-5, atol=1e-6)


def test_a_warm_ups_first_steps_do_not_decide_the_curvature():
    """Every other step has a thousandth of the learning rate: (slope - after) / lr of such a one is noise alone."""
    got, true = measured(torch.optim.SGD, 0.1, steps=600, rates=(1.0, 1e-3))
    assert (got["slope"], got["curvature"]) == pytest.approx((true["slope"], true["curvature"]), rel=0.15)


def test_eight_bit_adamw_is_read_like_adamw():
    bnb = pytest.importorskip("bitsandbytes")

    def eight_bit(p, lr):
        return bnb.optim.AdamW8bit(p, lr, betas=(0.9, 0.95), weight_decay=0.0, min_8bit_size=256)

    got, _ = measured(eight_bit, 0.01)
    exact, _ = measured(lambda p, lr: torch.optim.AdamW(p, lr, betas=(0.9, 0.95), weight_decay=0.0), 0.01)
    # The same noise: what differs is 8 bits of each moment, 1 % of it.
    for name in ("slope", "curvature", "noise", "g2"):
        assert got[name] == pytest.approx(exact[name], rel=0.1), name


class Lion(torch.optim.Optimizer):
    """Chen et al. (2023): a step of somebody's own."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                p.sub_(group["lr"] * (0.9 * mean + 0.1 * p.grad).sign())
                mean.lerp_(p.grad, 0.01)


ANY = {
    "SGD": lambda p: torch.optim.SGD(p, 0.2),
    "SGD, momentum": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, 0.05),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.05),
    "Muon": lambda p: torch.optim.Muon(p, 0.05),
    "Muon and AdamW": lambda p: Muon([{"params": p}], {id(p[0])}, 0.05, 0.95, betas=(0.9, 0.95)),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 0.05),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.05),
    "Adamax": lambda p: torch.optim.Adamax(p, 0.05),
    "NAdam": lambda p: torch.optim.NAdam(p, 0.05),
    "Lion": lambda p: Lion(p, 0.05),
    "Schedule-Free": lambda p: pytest.importorskip("schedulefree") and schedule_free_adamw(p, 0.05, betas=(0.9, 0.95)),
}
READ = ("SGD", "SGD, momentum", "Adam", "AdamW", "Muon", "Muon and AdamW", "Schedule-Free")


@pytest.mark.parametrize("name", ANY)
def test_fot_watches_and_steers_any_optimizer(name, caplog):
    """In two micro-batches a step: measured, or one line says that it is not, and what steers then."""
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 5, bias=False)
    target = torch.randn(6, 5)

    class Loss(torch.nn.Module):
        def forward(self, x):
            return {"loss": (model(x) - x @ target - torch.randn(len(x), 5)).square().mean()}

    loss = Loss()
    optimizer = ANY[name](list(model.parameters()))
    with caplog.at_level(logging.WARNING, "scorecast"):
        fot = FoT(optimizer, 80, every=8, warmup=0.1)
    fot.watch(loss)
    losses, lrs = [], []
    for _ in range(80):
        lrs.append(optimizer.param_groups[0]["lr"])
        for i in range(2):
            found = loss(torch.randn(16, 6))["loss"]
            (found / 2).backward()
            if fot.splits and i == 0:
                fot.stats.micro(0.5)
        optimizer.step()
        optimizer.zero_grad()
        fot.step()
        losses.append(found.item())
    assert fot.forecaster.points == 72 and fot.counts["decisions"] == 9 and sum(losses[-8:]) < sum(losses[:8])
    if name == "Schedule-Free":
        assert "envelope" not in fot.parts and lrs[-1] == 0.05 * fot.multiplier
    else:
        assert lrs[-1] < max(lrs) and fot.get_last_lr() == [0.0] * len(optimizer.param_groups)
    if name in READ:
        assert not caplog.text and fot.decision["eta_opt"] is not None and fot.decision["noise"] > 0
        assert fot.m != 1.0
    else:
        assert kinds(optimizer) == [] and fot.decision["eta_opt"] is None and fot.m == 1.0
        says = (
            rf"{type(optimizer).__name__} keeps no readable moments: .* the forecast and the envelope steer, m stays 1"
        )
        assert re.search(says, caplog.text) and len(caplog.records) == 1


def test_what_needs_micro_batches_says_so_once(caplog):
    p = torch.nn.Parameter(torch.ones(4, 3))
    fot = FoT(torch.optim.Muon([p], 0.01), 200, every=4)
    with caplog.at_level(logging.WARNING, "scorecast"):
        for _ in range(100):
            p.grad = p.detach().clone()
            fot.optimizer.step()
            fot.step()
    assert len(caplog.records) == 1 and "in micro-batches alone" in caplog.text
    assert fot.decision["eta_opt"] is None and fot.m == 1.0


@pytest.mark.parametrize("cut", [9, 21])
@pytest.mark.parametrize("name", [*READ, "Lion"])
def test_resumed_anywhere_the_weights_are_the_same_bits(name, cut):
    """Step 9 is between the halves of a sample."""

    def run(start, stop, state=None):
        w = torch.nn.Parameter(torch.linspace(-1, 1, 20).view(4, 5))
        optimizer = ANY[name]([w])
        fot = make_rule("fot", optimizer, 40, every=4, warmup=0.1)
        if state:
            w.data.copy_(state[0])
            optimizer.load_state_dict(state[1])
            fot.restore(state[2], start)
        for t in range(start, stop):
            generator = torch.Generator().manual_seed(t)
            parts = [w.detach() + torch.randn(4, 5, generator=generator) for _ in range(2)]
            w.grad = parts[0] / 2
            fot.observe(2 + 3 / (1 + t) ** 0.5, 1, share=0.5)
            w.grad = sum(parts) / 2
            fot.observe(2 + 3 / (1 + t) ** 0.5, 1)
            optimizer.step()
            fot.step()
        return w.detach().clone(), optimizer.state_dict(), fot.state_dict()

    whole = run(0, 36)
    assert torch.equal(run(cut, 36, run(0, cut))[0], whole[0])


def test_schedule_free_plus_is_not_read():
    p = torch.nn.Parameter(torch.ones(2))
    assert kinds(ScheduleFreePlus([p])) == [] and kinds(torch.optim.SGD([p], 0.1)) == ["formula"]
