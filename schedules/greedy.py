"""GreedyLR: the learning rate follows the loss, up while it falls and down while it does not."""

import math

import torch
from torch import Tensor

from .fot import set_lrs
from .rules import lr_factor


class Greedy:
    """GreedyLR (Subramanian et al., 2025, "Dynamic Learning Rate Scheduling based on Loss Changes Leads to Faster
    Convergence"), with the settings that transformers.optimization.GreedyLR has by default.

    After each step the mean training loss of the last ``window`` steps is compared with the lowest so far. Where it has
    been lower by more than ``threshold`` in more than ``patience`` steps in a row, the learning rate is divided by
    ``factor``; where it has not been, as often, it is multiplied by it. It stays between ``low`` and ``high`` times
    the peak, which here are shares because the absolute bounds of transformers, 1e-3 and 1, are above what an Adam
    takes. The rule begins after the warm-up, on the optimizer's groups as they are when it is made.

    Left out: cooldown and warm-up after a change, which are 0 by default, and the restart after 500 reductions at the
    lowest rate. Each step reads its loss, which waits for the device. A loss that is not finite is counted and is no
    step of the rule."""

    splits = gates = weighs_blocks = False  # it asks for nothing but the loss

    def __init__(
        self, optimizer, total: int, *, warmup=0.0, reduce=None, factor=0.95, patience=10, threshold=1e-6, window=50,
        low=0.01, high=10.0,
    ):  # fmt: skip
        self.optimizer, self.total, self.warmup, self.reduce = optimizer, total, warmup, reduce or (lambda x: x)
        self.factor, self.patience, self.threshold, self.window = factor, patience, threshold, window
        self.low, self.high = low, high
        self.peaks = [float(group["lr"]) for group in optimizer.param_groups]
        device = optimizer.param_groups[0]["params"][0].device
        self.point = torch.zeros(2, dtype=torch.float64, device=device)  # sum of the NLL and tokens of the coming step
        self.counts = {"raised": 0, "lowered": 0, "not_finite": 0}
        self.losses: list[float] = []
        self.done, self.scale, self.best, self.good, self.bad = 0, 1.0, math.inf, 0, 0
        self._set()

    @property
    def lr(self) -> float:
        """The first group's learning rate for the coming step."""
        return self.peaks[0] * self._share()

    def _share(self) -> float:
        return self.scale * lr_factor("constant", self.done, self.total, warmup=self.warmup)

    def _set(self) -> None:
        set_lrs(self.optimizer, [peak * self._share() for peak in self.peaks])

    def observe(self, nll, tokens=1.0, *, share=None, fisher=None, prompt=None, answer=None) -> None:
        """A micro-batch of the coming step: the sum of its NLL over so many tokens."""
        for i, value in enumerate((nll, tokens)):
            self.point[i].add_(value.detach() if isinstance(value, Tensor) else value)

    def step(self) -> None:
        """After the optimizer's step. Every rank must call it."""
        nll, tokens = self.reduce(self.point.clone()).tolist()
        self.point.zero_()
        self.done += 1
        if self.done > self.warmup * self.total and tokens > 0:
            self._follow(nll / tokens)
        self._set()

    def _follow(self, loss: float) -> None:
        if not math.isfinite(loss):
            self.counts["not_finite"] += 1
            return
        self.losses = [*self.losses, loss][-self.window :]
        mean = sum(self.losses) / len(self.losses)
        if mean < self.best - self.threshold:
            self.best, self.good, self.bad = mean, self.good + 1, 0
        else:
            self.good, self.bad = 0, self.bad + 1
        if self.good > self.patience:
            self.scale, self.good = min(self.scale / self.factor, self.high), 0
            self.counts["raised"] += 1
        elif self.bad > self.patience:
            self.scale, self.bad = max(self.scale * self.factor, self.low), 0
            self.counts["lowered"] += 1

    def state_dict(self) -> dict:
        """Plain numbers and lists; `restore` goes on bit for bit."""
        kept = {k: getattr(self, k) for k in ("done", "scale", "best", "good", "bad")}
        return kept | {"losses": list(self.losses), "counts": dict(self.counts)}

    def restore(self, state: dict, step: int) -> None:
        """Goes to where ``step`` steps are done. Call it after the optimizer's own state was loaded."""
        for name, value in state.items():
            setattr(self, name, value.copy() if isinstance(value, list | dict) else value)
        self._set()

    def __str__(self) -> str:
        return ""
