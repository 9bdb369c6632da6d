"""Averaged weights, which are evaluated in the place of the last ones: Schedule-Free's, and those of a run's end."""

import contextlib

import torch
from torch import Tensor

from .commandline import package


def schedule_free_adamw(groups, lr: float, *, betas: tuple[float, float], eps: float = 1e-8, weight_decay: float = 0.0):
    """AdamWScheduleFree of the package schedulefree (Defazio et al., 2024, "The Road Less Scheduled"), ready to train.

    It needs as much memory as Adam. The caller sets the groups' lr for a warm-up, and does not call ``step`` with a
    gradient that is not finite. Raises ValueError where the package is missing."""
    kind = package("schedulefree", "schedule-free").AdamWScheduleFree
    optimizer = kind(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
    optimizer.train()
    return optimizer


class TailAverage:
    """The mean of the weights after each step from ``begin`` on (Izmailov et al., 2018, "Averaging Weights Leads to
    Wider Optima and Better Generalization"; Sanyal et al., 2023, for language models): one more copy of the weights.

    It is the optimizer's ``tail`` from then on, and the loop calls ``step`` after each of the optimizer's."""

    def __init__(self, optimizer: torch.optim.Optimizer, begin: float):
        self.optimizer, self.begin, self.done, self.count = optimizer, begin, 0, 0
        self.mean: list[Tensor] = []
        optimizer.tail = self

    def step(self) -> None:
        self.done += 1
        if self.done <= self.begin:
            return
        self.count += 1
        weights = _weights(self.optimizer)
        if self.count == 1:
            self.mean = [p.clone() for p in weights]
        else:
            torch._foreach_lerp_(self.mean, weights, 1 / self.count)

    def state_dict(self) -> dict:
        return {"done": self.done, "count": self.count, "mean": self.mean}

    def load_state_dict(self, state: dict) -> None:
        self.done, self.count = state["done"], state["count"]
        self.mean = [m.to(p.device, copy=True) for m, p in zip(state["mean"], _weights(self.optimizer), strict=False)]


def _weights(optimizer) -> list[Tensor]:
    return [p.detach() for group in optimizer.param_groups for p in group["params"]]


def averages(optimizer) -> bool:
    """Whether ``optimizer`` has other weights to evaluate than those it goes on with, now or later."""
    return hasattr(optimizer, "eval") or hasattr(optimizer, "tail")


@contextlib.contextmanager
def averaged(optimizer):
    """Puts the averaged weights, Schedule-Free's or those of a `TailAverage`, in place for the block: they are the ones
    to evaluate and to export.

    Afterwards the weights are bit for bit what they were. This costs a copy of the weights meanwhile. Any other
    optimizer has no averages, and its weights stay as they are."""
    tail = getattr(optimizer, "tail", None)
    if not hasattr(optimizer, "eval") and not (tail and tail.count):
        yield
        return
    weights = _weights(optimizer)
    kept = [p.clone() for p in weights]
    if tail:
        for p, mean in zip(weights, tail.mean, strict=True):
            p.copy_(mean)
    else:
        optimizer.eval()
    try:
        yield
    finally:
        if not tail:
            optimizer.train()
        for p, was in zip(weights, kept, strict=True):
            p.copy_(was)  # the optimizer's own eval and train undo each other only up to rounding
