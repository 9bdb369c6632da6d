"""The caller's side of the sandbox: starts jailers, hands them programs and yields the results in order."""

import contextlib
import functools
import json
import logging
import os
import subprocess
import sys
import sysconfig
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from multiprocessing.connection import wait  # polls: select refuses descriptors above 1023
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

MODES = ("namespaces", "bubblewrap", "limits")  # the strongest first
UNSAFE = "unsafe-run-as-me"  # only where it is asked for
STATUSES = ("ok", "error", "memory", "timeout", "cpu", "output", "killed", "lost")
JAILER = Path(__file__).with_name("jailer.py").resolve()
GRACE = 20.0  # seconds past its deadline after which a jailer itself is given up
BACKLOG = 4  # results per worker that may wait for an earlier one

log = logging.getLogger("scorecast")


@dataclass(frozen=True)
class Limits:
    """What a program may use. Raises ValueError for a limit that is not positive."""

    seconds: float = 10.0  # wall clock; then the program and all it started are killed
    cpu_seconds: int = 5  # of each process
    memory_bytes: int = 512 << 20  # address space of each process
    processes: int = 8  # processes and threads together
    file_bytes: int = 1 << 20  # of each file
    open_files: int = 64
    output_bytes: int = 64 << 10  # of stdout and of stderr; more ends the program
    packages: bool = False  # may import what is installed beside this interpreter; without, the standard library

    def __post_init__(self):
        for name, value in asdict(self).items():
            if name != "packages" and not value > 0:
                raise ValueError(f"{name}={value}, expected a limit above 0")


class Result(NamedTuple):
    """What became of a program. Output is UTF-8 with malformed bytes replaced; it is whatever came before the end.

    ``status``: ok (exit code 0), error (another), memory (a MemoryError), timeout (the wall clock), cpu, output (too
    much of it), killed (by a signal, as in a crash), or lost: the sandbox could not run it, or was itself destroyed;
    stderr says what is known. ``missing`` names the protections that this run was without, beside `namespaces`."""

    stdout: str
    stderr: str
    status: str
    code: int | None  # exit code, negative for a signal; None where there is none
    seconds: float
    missing: tuple[str, ...] = ()


class Probe(NamedTuple):
    mode: str
    notes: dict  # how the mode is had on this machine
    missing: tuple[str, ...]  # the protections that each run is without, and what that leaves open
    refused: dict  # stronger mode -> why it cannot be had


def run_program(code: str, stdin: str = "", limits: Limits | None = None, *, mode: str | None = None) -> Result:
    """Runs one Python program. ``mode`` is one of MODES, None the strongest there is, or UNSAFE.

    Starting a jailer costs some 60 ms: for many programs use `run_many`. Raises ValueError as `probe` does."""
    return next(run_many([code], 1, limits, stdin=stdin, mode=mode))


def run_many(
    programs: Iterable[str],
    workers: int | None = None,
    limits: Limits | None = None,
    *,
    stdin: str = "",
    mode: str | None = None,
    progress: str = "",
) -> Iterator[Result]:
    """Runs programs, ``workers`` at a time (None: one for each core), and yields their results in order.

    ``programs`` may be a generator that makes them as it goes: a program is taken when a worker is free for it and
    fewer than 4 x workers results wait for an earlier one. ``progress`` is the title of a progress bar; empty: no bar.
    Everything is killed when the iteration ends or is given up. What the mode does not contain here is logged once and
    stands in every result. Raises ValueError for workers below 1, for a program
    that is not text, and as `probe` does."""
    if workers is not None and workers < 1:
        raise ValueError(f"workers={workers}, expected 1 or more")
    if mode not in (None, *MODES, UNSAFE):
        raise ValueError(f"unknown mode {mode!r}, expected one of {', '.join((*MODES, UNSAFE))}")
    if sys.platform != "linux":
        raise ValueError(f"programs that a model wrote are run apart on Linux alone, and this is {sys.platform}")
    workers = workers or len(os.sched_getaffinity(0))
    total = len(programs) if hasattr(programs, "__len__") else None
    workers = min(workers, total or workers)
    bar = dict(total=total, desc=progress or None, unit="program", dynamic_ncols=True, disable=not progress)
    return _run_many(iter(programs), workers, limits or Limits(), stdin, mode or probe().mode, bar)


def _run_many(programs, workers: int, limits: Limits, stdin: str, mode: str, bar_options: dict) -> Iterator[Result]:
    bar, jailers, idle = tqdm(**bar_options), [], []
    slots: deque[list[Result]] = deque()  # of the programs taken and not yet yielded, in order; [] until it has ended
    running: dict[_Jailer, list[Result]] = {}
    try:
        while True:
            free = min(workers - len(running), BACKLOG * workers - len(slots))
            for code in islice(programs, free):
                if not isinstance(code, str):
                    raise ValueError(f"a program is a {type(code).__name__}, expected its source text")
                if not idle:
                    jailers.append(_Jailer(mode, limits.packages))
                    _warn(mode, jailers[-1].missing)
                    idle.append(jailers[-1])
                slots.append([])
                running[jailer := idle.pop()] = slots[-1]
                jailer.send(code, stdin, limits)
            if not slots:
                return
            for jailer in _ready(running):
                running.pop(jailer).append(jailer.receive())
                bar.update()
                if jailer.alive:
                    idle.append(jailer)
                else:
                    jailers.remove(jailer)
                    jailer.close()
            while slots and slots[0]:
                yield slots.popleft()[0]
    finally:
        bar.close()
        for jailer in jailers:
            jailer.close()


@functools.cache
def _warn(mode: str, missing: tuple[str, ...]) -> None:
    if missing:
        log.warning(f"sandbox: programs run in mode {mode}, without {'; without '.join(missing)}")


def _ready(running: Iterable["_Jailer"]) -> list["_Jailer"]:
    """The jailers whose result is there, or who are past all patience."""
    if not running:
        return []
    patience = min(jailer.given_up for jailer in running) - time.monotonic()
    return wait(running, max(0.0, patience)) or [j for j in running if j.given_up <= time.monotonic()]


class _Jailer:
    """The caller's end of a jailer process."""

    def __init__(self, mode: str, packages: bool):
        if sys.platform != "linux":
            raise ValueError(f"it needs Linux, and this is {sys.platform}")
        python = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
        paths = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")] if packages else []
        self._process = subprocess.Popen(
            [python, "-I", "-S", "-B", str(JAILER), mode, *dict.fromkeys(paths)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={},
            cwd="/",
            start_new_session=True,  # Ctrl-C is the caller's; the jailer ends when its stdin does
        )
        self.alive, self.given_up = True, time.monotonic() + GRACE
        self.hello = self._read() or {"error": "the jailer did not start"}
        if "error" in self.hello:
            self.close()
            raise ValueError(f"no sandbox of mode {mode}: {self.hello['error']}")
        self.missing = tuple(self.hello["missing"])

    def fileno(self) -> int:
        return self._process.stdout.fileno()

    def send(self, code: str, stdin: str, limits: Limits) -> None:
        self._started, self.given_up = time.monotonic(), time.monotonic() + limits.seconds + GRACE
        request = json.dumps({"code": code, "stdin": stdin, "limits": asdict(limits)}) + "\n"
        try:
            self._process.stdin.write(request.encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            self.alive = False  # receive() then finds the end of its output

    def receive(self) -> Result:
        answer = self._read()
        if answer is None:
            self.alive = False
            why = "the program destroyed its sandbox, or something outside did"
            return Result("", why, "lost", None, time.monotonic() - self._started, self.missing)
        return Result(**answer | {"missing": tuple(answer["missing"])})

    def _read(self) -> dict | None:
        """The next line; None where the jailer ended or does not answer."""
        if not wait([self], max(0.0, self.given_up - time.monotonic())):
            return None
        line = self._process.stdout.readline()
        return json.loads(line) if line.endswith(b"\n") else None

    def close(self) -> None:
        with self._process as process:  # closes the pipes and reaps
            if not self.alive:
                process.kill()
            with contextlib.suppress(BrokenPipeError):  # bytes of a request that nobody is left to read
                process.stdin.close()
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()


@functools.cache
def probe() -> Probe:
    """The strongest mode in which this machine runs a program, found by running one; once a process.

    UNSAFE is not tried. Raises ValueError, one line, where not even limits work: programs would run as root, the kernel
    takes no filter, or it is not Linux 5.3 or newer."""
    refused = {}
    for mode in MODES:
        try:
            with contextlib.closing(_Jailer(mode, False)) as jailer:
                jailer.send("print(6 * 7)", "", Limits())
                result = jailer.receive()
        except ValueError as error:
            refused[mode] = str(error).removeprefix(f"no sandbox of mode {mode}: ")
            continue
        if result.stdout == "42\n":
            return Probe(mode, jailer.hello["notes"], jailer.missing, refused)
        refused[mode] = " ".join((result.stderr or result.status).split())[-200:]
    why = "; ".join(f"{mode}: {reason}" for mode, reason in refused.items())
    raise ValueError(f"programs cannot be run apart on this machine. {why}")
