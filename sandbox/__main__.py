"""python -m sandbox --probe: how this machine contains generated programs."""

import argparse
import sys
from dataclasses import asdict

from . import Limits, probe


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m sandbox", description="How generated programs are contained.")
    parser.add_argument("--probe", action="store_true", required=True, help="find out and print it")
    parser.parse_args(arguments)
    try:
        found = probe()
    except ValueError as error:
        sys.exit(f"error: {error}")
    for mode, why in found.refused.items():
        print(f"{mode:20}refused: {why}")
    print(f"{found.mode:20}in force")
    for name, note in found.notes.items():
        print(f"{name:20}{note}")
    for name, value in asdict(Limits()).items():
        print(f"{name:20}{value:,}")


if __name__ == "__main__":
    main()
