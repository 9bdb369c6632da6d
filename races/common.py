"""What the races share: checks of flags, timing, peak memory, processes, and the files that they write.

Machines are shared and drift. So the sides of a race take turns, each round gives one ratio a pair, and medians count.
"""

import argparse
import contextlib
import datetime
import gc
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from kernels.bench import limits
from kernels.bench.rows import reason
from kernels.bench.rows import write_csv as rows_to_file
from runtime.cli import Parser, flag_name
from runtime.machine import device_name


def race_parser(name: str, doc: str) -> Parser:
    return Parser(prog=f"python -m races.{name}", usage=None, description=doc)


def check_least(args: argparse.Namespace, **least: int) -> None:
    """Raises ValueError for a flag that is below its least value."""
    for name, value in least.items():
        if getattr(args, name) < value:
            raise ValueError(f"{flag_name(name)} {getattr(args, name)}: expected at least {value}")


def check_new(out: Path, flag: str = "--out") -> None:
    """Raises ValueError where the folder is there already."""
    if out.exists():
        raise ValueError(f"{out} exists; give another {flag}")


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def forget_peak(device: torch.device) -> None:
    """Frees what the last turn held, and lets the peak of CUDA memory begin anew."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def largest_that_fits(run: Callable[[int], object], batch: int, complaint: str) -> int:
    """The largest of ``batch``, its half, its quarter, ... whose ``run`` does not end the memory.

    Raises ValueError, the ``complaint``, where a batch of one does."""
    while batch:
        with contextlib.suppress(torch.OutOfMemoryError):
            run(batch)
            return batch
        torch.cuda.empty_cache()  # once the error is gone, whose traceback holds the activations
        batch //= 2
    raise ValueError(complaint)


def cuda_peak(device: torch.device) -> int | None:
    """Peak bytes that torch allocated; None on a CPU, where the resident set belongs to all sides."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def median_ratio(rows: Iterable[dict], column: str, side: str, base: str) -> float | None:
    """The median over rounds of ``side``'s value by ``base``'s; rows have a round, a side and, unless the turn failed,
    the column. None where no round has both."""
    value = {(row["round"], row["side"]): row[column] for row in rows if row.get(column) is not None}
    both = [i for i in {i for i, _ in value} if (i, side) in value and (i, base) in value]
    return statistics.median(value[i, side] / value[i, base] for i in both) if both else None


def add_limits(parser: argparse.ArgumentParser, parts: Iterable[str] = ()) -> None:
    """--seconds and --rows as in kernels.bench, and --only for a race of several parts."""
    limits.add_limits(parser)
    if parts:
        names = ", ".join(parts)
        parser.add_argument("--only", default="", help=f"some of {names}, separated by commas (default: all)")


def chosen(only: str, parts: Iterable[str]) -> list[str]:
    """The parts that --only names, all where it names none. Raises ValueError for an unknown one."""
    parts, names = [*parts], [name.strip() for name in only.split(",") if name.strip()]
    if unknown := [name for name in names if name not in parts]:
        raise ValueError(f"--only {unknown[0]}: expected some of {', '.join(parts)}")
    return [name for name in parts if name in names] or parts


class Turns(list):
    """The rows of a race, in the CSV ``path`` after each, with what is the ``same`` in all.

    A turn that fails is a row that says why, and the next one begins, until ``seconds`` from now or ``rows`` are
    reached (0 is no limit)."""

    def __init__(self, path: Path, same: dict, seconds: float = 0, rows: int = 0):
        super().__init__()
        self.path, self.same, self.limits = path, same, limits.Limits(seconds, rows)

    def take(self, key: dict, measure: Callable[[], dict]) -> dict | None:
        """``key`` and what ``measure`` gives as a row; None where that failed, or the limits left no room for it."""
        if not self.limits.admit([" ".join(map(str, key.values()))], len(self)):
            return None
        try:
            row = key | measure()
        except Exception as e:  # the next one may go through
            self.fail(key, e)
            return None
        self.add(row)
        return row

    def fail(self, key: dict, error: Exception) -> None:
        """A row that says why there is none."""
        row = key | {"failed": reason(error)}
        print(" ".join(map(str, row.values())), file=sys.stderr, flush=True)
        self.add(row)

    def add(self, row: dict) -> None:
        self.append(row)
        write_csv(self.path, self, self.same)

    def ended(self) -> int:
        """Says what was left out. The exit code: 1 where a turn failed or nothing was measured."""
        self.limits.say()
        return int(not self or any("failed" in row for row in self))


def command(*words, **flags) -> list[str]:
    """A command of this interpreter; ``seq_len=8`` becomes --seq-len 8."""
    given = [word for name, value in flags.items() for word in (flag_name(name), value)]
    return [str(word) for word in (sys.executable, *words, *given)]


def output_of(line: list[str], complaint: str, cwd: Path | None = None) -> str:
    """What a process prints. Raises ValueError, the ``complaint`` with its last error line, where it fails."""
    ran = subprocess.run(line, capture_output=True, text=True, cwd=cwd)
    if ran.returncode:
        raise ValueError(f"{complaint}: {' '.join(ran.stderr.strip().splitlines()[-1:])}")
    return ran.stdout


def today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def here_and_now(device: torch.device) -> dict[str, str]:
    """The last columns of a CSV: the device, the versions that decide a race, and the date."""
    found = dict.fromkeys(("torch", "transformers", "peft", "bitsandbytes"), "none")
    for package in found:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    versions = " ".join(map(" ".join, found.items()))
    return {"device": device_name(device, threads=True), "versions": versions, "date": today()}


def write_csv(path: Path, rows: list[dict], same: dict) -> None:
    """A row a measurement, with what is the ``same`` in every row last."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows_to_file([row | same for row in rows], str(path))
