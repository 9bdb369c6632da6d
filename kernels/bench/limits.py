"""--seconds and --rows: how far a bench or a race goes, and what is said of the rest."""

import argparse
import math
import sys
import time
from collections.abc import Iterable


def add_limits(parser: argparse.ArgumentParser) -> None:
    """--seconds and --rows, 0 for no limit."""
    parser.add_argument("--seconds", type=float, default=0, help="begin nothing more after so long; 0 is no limit")
    parser.add_argument("--rows", type=int, default=0, help="end with so many rows of the file; 0 is no limit")


class Limits:
    """``seconds`` from now and ``rows``, 0 for no limit. ``left_out`` has the names of what they left no room for."""

    def __init__(self, seconds: float = 0, rows: int = 0):
        self.end = time.monotonic() + seconds if seconds else math.inf
        self.rows = rows or math.inf
        self.left_out = []

    def over(self) -> bool:
        """Whether no time is left."""
        return time.monotonic() >= self.end

    def admit(self, names: Iterable, rows: int, timed: bool = True) -> list:
        """Those of ``names``, a row each, that may begin where there are ``rows`` already. The others are left out: all
        of them once the time is over, unless they take none (``timed`` False)."""
        names = list(names)
        room = 0 if timed and self.over() else min(len(names), max(0, self.rows - rows))
        self.left_out += names[room:]
        return names[:room]

    def say(self) -> None:
        """How much was left out, on stderr."""
        if self.left_out:
            what = f"{len(self.left_out)}, the first of them {self.left_out[0]}"
            print(f"left out by --seconds or --rows: {what}", file=sys.stderr, flush=True)
