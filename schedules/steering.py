"""One interface for every learning-rate rule, so that a training loop looks the same under all of them.

    rule = make_rule("fot", optimizer, total=steps, warmup=0.02)
    for step in range(steps):
        ...                                # forward and backward, in two micro-batches at least where rule.splits
        rule.observe(nll_sum, tokens)      # after each backward
        optimizer.step()
        decision = rule.step()             # a dict where one was made

`Planned` is for schedules that are functions of the step, `FoT` for the rules that measure, `Greedy` follows the loss.
"""

import torch

from .fot import FoT, set_lrs
from .greedy import Greedy
from .rules import ADAPTIVE, GREEDY, RULES, lr_factor


class Planned:
    """A schedule that is a function of the step, with the arguments of `lr_factor`. The optimizer's groups hold the
    peak learning rates when it is made. It sets their ``lr`` for the coming step and adds no key to them."""

    splits = gates = weighs_blocks = False  # it measures nothing

    def __init__(self, name: str, optimizer: torch.optim.Optimizer, total: int, **arguments: float):
        self.name, self.optimizer, self.total, self.arguments = name, optimizer, total, arguments
        self.peaks = [float(group["lr"]) for group in optimizer.param_groups]
        self.counts: dict[str, int] = {}
        self.restore(None, 0)

    @property
    def lr(self) -> float:
        """The first group's learning rate for the coming step."""
        return self.peaks[0] * self.factor

    def observe(self, nll, tokens=1.0, *, share=None, fisher=None, prompt=None, answer=None) -> None:
        """Nothing of the run changes the plan."""

    def step(self) -> None:
        """After the optimizer's step: moves the groups to the learning rate of the next one."""
        self.restore(None, self.done + 1)

    def state_dict(self) -> None:
        """There is nothing to save that the number of the step does not say."""

    def restore(self, state: None, step: int) -> None:
        """Goes to where ``step`` steps are done. Call it after the optimizer's own state was loaded."""
        self.done = step
        self.factor = lr_factor(self.name, step, self.total, **self.arguments)
        set_lrs(self.optimizer, [peak * self.factor for peak in self.peaks])

    def __str__(self) -> str:
        return ""


def make_rule(
    name: str,
    optimizer: torch.optim.Optimizer,
    total: int,
    *,
    warmup=0.0,
    floor=0.0,
    decay=0.2,
    power=1.0,
    shape="linear",
    **measuring,
) -> FoT | Greedy | Planned:
    """The rule ``name`` (one of RULES) for a run of ``total`` optimizer steps. The groups hold the peak learning rates.

    ``floor``, ``decay`` and ``power`` are for the functions of the step, see `lr_factor`, ``shape`` is for wsd and fot,
    and ``measuring`` for the rules that measure, see `FoT`. A loop may give all of them under any rule. Raises
    ValueError for an unknown name."""
    if name not in RULES:
        raise ValueError(f"unknown learning-rate rule {name!r}; expected one of {', '.join(RULES)}")
    if unknown := set(measuring) - set(FoT.__init__.__kwdefaults__):
        raise TypeError(f"make_rule: unknown options {', '.join(sorted(unknown))}")
    if name in ADAPTIVE:
        return FoT(optimizer, total, rule=name, warmup=warmup, shape=shape, **measuring)
    if name == GREEDY:
        return Greedy(optimizer, total, warmup=warmup, reduce=measuring.get("reduce"))
    return Planned(name, optimizer, total, warmup=warmup, floor=floor, decay=decay, power=power, shape=shape)
