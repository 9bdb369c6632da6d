"""Every schedule in one picture: those that are functions of the step, and what the rules that measure do in a run.

    python -m schedules plot --out schedules.png

The run is a real one, of Adam on a noisy quadratic of 200 parameters whose curvatures span 2.5 decades: small enough
to be made while one waits. It shows how a rule moves, not which one is better.
"""

import argparse
from pathlib import Path

import torch

from .backtest import write_atomically
from .fot import FoT
from .rules import SCHEDULES, lr_factor
from .style import INK, PALETTE, png, styled, thousands

RUN = 400  # steps of the simulated run, whatever the length asked for
PEAK = 0.03  # near where FoT puts the peak of the quadratic by itself
# What is drawn on the right: rule, its peak over PEAK, its line. FoT forgives a peak that is ten times off either way.
MEASURED = (
    ("fot", 1.0, dict(color=PALETTE[1], linewidth=2.6)),
    ("fot", 10.0, dict(color=PALETTE[1], linewidth=1.6, linestyle="--")),
    ("fot", 0.1, dict(color=PALETTE[1], linewidth=1.6, linestyle=":")),
    ("fot-literal", 1.0, dict(color=PALETTE[3])),
    ("bacon", 1.0, dict(color=PALETTE[0])),
    ("snac", 1.0, dict(color=PALETTE[2])),
)


def simulated(rule: str, peak: float, warmup: float, steps: int) -> list[float]:
    """The learning rates that ``rule`` sets on the noisy quadratic, given ``peak``, as shares of PEAK. Seeded."""
    generator = torch.Generator().manual_seed(0)
    h = torch.logspace(-1, 1.5, 200)
    w = torch.nn.Parameter(0.3 * torch.randn(200, generator=generator))
    optimizer = torch.optim.AdamW([w], lr=peak, betas=(0.9, 0.99), weight_decay=0.0)
    fot, shares = FoT(optimizer, steps, rule=rule, warmup=min(warmup, 0.9), every=16), []
    for _ in range(steps):
        shares.append(fot.lr / PEAK)
        loss, gradient = 2 + float(h @ w.detach().square()) / len(h), h * w.detach()
        parts = [gradient + 2.0 * torch.randn(200, generator=generator) for _ in range(2)]
        w.grad = parts[0] / 2
        fot.observe(loss, 1, share=0.5)
        w.grad = sum(parts) / 2
        fot.observe(loss, 1)
        optimizer.step()
        fot.step()
    return shares


@styled
def draw(total: int, warmup: float, floor: float, decay: float) -> bytes:
    """All schedules over ``total`` steps, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.6, 4.8), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    shown = [(name, name, 1.0) for name in SCHEDULES if name != "polynomial"]
    shown.append(("polynomial, power 2", "polynomial", 2.0))  # at power 1 it is linear
    for (label, name, power), colour in zip(shown, PALETTE, strict=False):
        how = dict(warmup=warmup, floor=floor, decay=decay, power=power)
        line = dict(linestyle="--", zorder=3) if name == "constant" else {}  # wsd runs below it, seen through the gaps
        left.plot([lr_factor(name, step, total, **how) for step in range(total)], color=colour, label=label, **line)
    scale = total / RUN
    for rule, off, line in MEASURED:
        label = rule if off == 1 else f"{rule}, given {off:g} times that peak"
        right.plot([step * scale for step in range(RUN)], simulated(rule, off * PEAK, warmup, RUN), label=label, **line)
    right.axhline(1.0, color=INK, linewidth=0.6)
    left.set_title("functions of the step")
    right.set_title("rules that measure: on a simulated noisy quadratic")
    for axes in (left, right):
        axes.set(xlabel="optimizer step", xlim=(0, total))
        axes.xaxis.set_major_formatter(thousands)
    left.set(ylabel="learning rate as a share of the peak", ylim=(0, 1.04))
    right.set(ylabel="learning rate over one and the same peak", yscale="log", ylim=(0.008, 6))
    for axes in (left, right):  # below, where no line is hidden
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3)
    return png(figure)


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="schedules.png", help="the picture (default: schedules.png)")
    parser.add_argument("--steps", type=int, default=1000, help="length of the run (default: 1000)")
    parser.add_argument("--warmup", type=float, default=0.05, help="share of the run (default: 0.05)")
    parser.add_argument("--floor", type=float, default=0.0, help="share of the peak it ends at (default: 0)")
    parser.add_argument("--decay", type=float, default=0.2, help="wsd: share of the run that decays (default: 0.2)")


def run(args: argparse.Namespace) -> None:
    if args.steps < 1:
        raise ValueError(f"--steps {args.steps}, expected at least 1")
    for flag in ("warmup", "floor", "decay"):
        if not 0 <= getattr(args, flag) <= 1:
            raise ValueError(f"--{flag} {getattr(args, flag)}, expected a share in [0, 1]")
    write_atomically(Path(args.out), draw(args.steps, args.warmup, args.floor, args.decay))
    print(f"wrote {args.out}")
