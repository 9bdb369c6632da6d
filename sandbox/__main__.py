"""python -m sandbox --probe: how this machine contains generated programs."""

import sys

if not __package__:  # a file by its name finds no package
    print("python -m sandbox: error: type it like this, in the folder that holds sandbox/", file=sys.stderr)
    sys.exit(2)

import argparse
import contextlib
from dataclasses import asdict

from . import UNSAFE, Limits, probe
from .run import _Jailer


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m sandbox", description="How generated programs are contained.")
    parser.add_argument("--probe", action="store_true", required=True, help="find out and print it")
    unsafe = f"show mode {UNSAFE} instead: what programs may do where run_many(..., mode={UNSAFE!r}) runs them"
    parser.add_argument(f"--{UNSAFE}", action="store_true", help=unsafe)
    given = parser.parse_args(arguments)
    try:
        if given.unsafe_run_as_me:
            with contextlib.closing(_Jailer(UNSAFE, False)) as jailer:
                mode, notes, missing, refused = UNSAFE, jailer.hello["notes"], jailer.missing, {}
        else:
            mode, notes, missing, refused = probe()
    except ValueError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        sys.exit(2)
    for name, why in refused.items():
        print(f"{name:20}refused: {why}")
    print(f"{mode:20}in force")
    for protection in missing:
        print(f"{'without':20}{protection}")
    for name, note in notes.items():
        print(f"{name:20}{note}")
    for name, value in asdict(Limits()).items():
        print(f"{name:20}{value:,}")


if __name__ == "__main__":
    main()
