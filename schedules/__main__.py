"""The doors of schedules/: pictures of the schedules, and forecasts of recorded loss curves.

python -m schedules plot --out schedules.png
python -m schedules backtest runs curves/*.csv --out runs/backtest
python -m schedules forecast trainer_state.json --at 20000
python -m schedules prune runs
"""

import sys

if not __package__:  # a file by its name finds no package
    print("python -m schedules: error: type it like this, in the folder that holds schedules/", file=sys.stderr)
    sys.exit(2)

import argparse
import os

from . import backtest, plot, predict, pruning
from .commandline import Parser, alive


@alive()
def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m schedules", usage=None, description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, add, run, text in (
        ("plot", plot.add_flags, plot.run, plot.__doc__.splitlines()[0]),
        ("backtest", backtest.add_flags, backtest.run, backtest.__doc__.splitlines()[0]),
        ("prune", pruning.add_flags, pruning.run, pruning.__doc__.splitlines()[0]),
        ("forecast", predict.add_flags, predict.run, predict.__doc__.splitlines()[0]),
    ):
        how = {"epilog": f"the methods and the columns:\n{backtest.legend()}"} if name == "backtest" else {}
        form = argparse.RawDescriptionHelpFormatter
        command = commands.add_parser(name, help=text, usage=None, description=text, formatter_class=form, **how)
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
