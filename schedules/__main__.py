"""The doors of schedules/: pictures of the schedules, and forecasts of recorded loss curves.

python -m schedules plot --out schedules.png
python -m schedules backtest runs curves/*.csv --out runs/backtest
python -m schedules forecast trainer_state.json --at 20000
python -m schedules prune runs
"""

import argparse
import os
import sys
from itertools import cycle
from pathlib import Path

from . import backtest, predict, pruning
from .rules import SCHEDULES, lr_factor, snac_factor
from .style import PALETTE, png, styled


@styled
def draw(total: int, warmup: float, floor: float, decay: float) -> bytes:
    """All schedules over ``total`` steps, as a PNG. BACON and FoT's m bend the linear one by at most a factor of 2."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6, 3.4), dpi=150, layout="constrained")
    axes = figure.subplots()
    steps = range(1, total + 1)
    for name, colour in zip(SCHEDULES, cycle(PALETTE), strict=False):
        lr = [lr_factor(name, step, total, warmup=warmup, floor=floor, decay=decay) for step in range(total)]
        # Two schedules may agree, as linear and polynomial do at power 1: the dashed line lets the other through.
        axes.plot(steps, lr, color=colour, label=name, linestyle="--" if name == "polynomial" else "-")
    # The measuring rules need a run; with a noise scale that grows like this, SNAC would do that.
    snac = [snac_factor(4 * s / total, 1.0) * lr_factor("constant", s, total, warmup=warmup) for s in range(total)]
    axes.plot(steps, snac, color="0.6", linestyle=":", label="snac at B_noise/B = 4t/T")
    axes.set(xlabel="optimizer step", ylabel="share of the peak learning rate", xlim=(0, total), ylim=(0, 1.04))
    figure.legend(loc="outside right center")
    return png(figure)


def add_plot(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="schedules.png", help="the picture (default: schedules.png)")
    parser.add_argument("--steps", type=int, default=1000, help="length of the run (default: 1000)")
    parser.add_argument("--warmup", type=float, default=0.05, help="share of the run (default: 0.05)")
    parser.add_argument("--floor", type=float, default=0.0, help="share of the peak it ends at (default: 0)")
    parser.add_argument("--decay", type=float, default=0.2, help="wsd: share of the run that decays (default: 0.2)")


def run_plot(args: argparse.Namespace) -> None:
    if args.steps < 1:
        raise ValueError(f"--steps {args.steps}, expected at least 1")
    for flag in ("warmup", "floor", "decay"):
        if not 0 <= getattr(args, flag) <= 1:
            raise ValueError(f"--{flag} {getattr(args, flag)}, expected a share in [0, 1]")
    backtest.write_atomically(Path(args.out), draw(args.steps, args.warmup, args.floor, args.decay))
    print(f"wrote {args.out}")


class OneLineParser(argparse.ArgumentParser):
    """Bad flags are one line on stderr and exit code 2."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(prog="python -m schedules", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, add, run, text in (
        ("plot", add_plot, run_plot, "draws every schedule as a function of the step"),
        ("backtest", backtest.add_flags, backtest.run, backtest.__doc__.splitlines()[0]),
        ("prune", pruning.add_flags, pruning.run, pruning.__doc__.splitlines()[0]),
        ("forecast", predict.add_flags, predict.run, predict.__doc__.splitlines()[0]),
    ):
        command = commands.add_parser(name, help=text, description=text)
        add(command)
        command.set_defaults(run=run)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except (ValueError, OSError) as e:
        if os.environ.get("SCORECAST_TRACEBACK"):
            raise
        print(f"python -m schedules {args.command}: error: {' '.join(str(e).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
