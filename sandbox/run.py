"""Runs generated programs apart from everything else: text in, text out, never unpickled.

    python -m sandbox --probe

prints which containment this machine allows. The strongest of three is used, found once by trying:

- ``namespaces``  Linux user, mount, network, process and IPC namespaces of our own making. The program sees the
  interpreter's files, read-only, an empty scratch folder in memory, /dev/null and its own processes; no other file, no
  process, no network. Everything it started dies with its process namespace, whatever it called.
- ``bubblewrap``  the same by the ``bwrap`` command, for machines where only it may make namespaces. The scratch
  folder is then on disk.
- ``limits``      where neither is to be had, as in most containers. The limits below hold, the environment is clean,
  set-uid programs gain nothing, a system call filter refuses sockets, signals (to the program's own children too) and
  looking into other processes' memory, and what outlives the deadline is found, setsid or not, and killed. NOT
  contained: reading every file that the user may read, /proc and so the environment of the user's other processes
  among them, and writing wherever the user may write. Started as root, programs run as user 65534, for whom most of
  this is out of reach. A program that forks faster than it is killed can outlive its deadline. Where the kernel does
  not take the filter the network and signals are open too, and the probe says so. Use it for models whose programs you
  would run by hand, or inside a container that holds nothing else.

All three: CPU seconds, address space, size of a file and number of open files are limited FOR EACH PROCESS, so that the
whole may reach ``processes`` times as much. Not contained by any: faults of the kernel itself, and what a program can
learn from timing. Root that cannot become user 65534 has no limit on processes; the probe says so.

How it works: eval/jailer.py, run as a script by a clean ``python -I -S``, is one process a worker that enters the
namespaces once and then runs one program after the other, each in a process namespace, scratch folder and interpreter
of its own. The caller and the jailer speak JSON lines through pipes. No thread, no fork of the caller.
"""

import functools
import json
import os
import select
import subprocess
import sys
import sysconfig
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

MODES = ("namespaces", "bubblewrap", "limits")
STATUSES = ("ok", "error", "memory", "timeout", "cpu", "output", "killed", "lost")
JAILER = Path(__file__).with_name("jailer.py").resolve()
GRACE = 20.0  # seconds past its deadline after which a jailer itself is given up


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
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name != "packages" and not value > 0:
                raise ValueError(f"{f.name}={value}, expected a limit above 0")


class Result(NamedTuple):
    """``status``: ok (exit code 0), error (another), memory (MemoryError), timeout (wall clock), cpu, output (too much
    of it), killed (by a signal, a crash for one), lost (the sandbox could not run it, or was itself destroyed; stderr
    says what is known). Output is UTF-8, malformed bytes replaced, and whatever came before the end, also of a program
    that was killed."""

    stdout: str
    stderr: str
    status: str
    code: int | None  # exit code, negative for a signal; None where there is none
    seconds: float


class Probe(NamedTuple):
    mode: str
    notes: dict  # what this machine withholds within the mode
    refused: dict  # stronger mode -> why it cannot be had


# ----------------------------------------------------------------------------------------------
# the caller's side


def run_program(code: str, stdin: str = "", limits: Limits | None = None, *, mode: str | None = None) -> Result:
    """Runs one Python program. ``mode`` is one of MODES, None the strongest there is.

    Starting a jailer costs some 60 ms: for many programs use `run_many`. Raises ValueError as `probe` does.
    """
    return next(iter(run_many([code], 1, limits, stdin=stdin, mode=mode)))


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

    Back-pressure: a program is taken from ``programs`` when a worker is free for it and fewer than 4 x workers results
    wait for an earlier one, so that a generator may make them as it goes. ``progress`` is the title of a progress bar,
    none where it is empty. Everything is killed when the iteration ends or is given up. Raises ValueError for workers
    below 1, for a program that is not text, and as `probe` does.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers={workers}, expected 1 or more")
    mode = _known(mode) or probe().mode
    workers = workers or len(os.sched_getaffinity(0))
    total = len(programs) if hasattr(programs, "__len__") else None
    return _run_many(iter(programs), min(workers, total or workers), limits or Limits(), stdin, mode, progress, total)


_END = object()


def _run_many(programs, workers, limits, stdin, mode, progress, total) -> Iterator[Result]:
    from tqdm import tqdm

    bar = tqdm(total=total, desc=progress or None, unit="program", dynamic_ncols=True, disable=not progress)
    jailers, idle = [], []
    slots: deque[list[Result]] = deque()  # of the programs taken and not yet yielded, in order; [] until it has ended
    running: dict[_Jailer, list[Result]] = {}
    more = True
    try:
        while True:
            while more and len(running) < workers and len(slots) < 4 * workers:
                code = next(programs, _END)
                if code is _END:
                    more = False
                    break
                if not isinstance(code, str):
                    raise ValueError(f"a program is a {type(code).__name__}, expected its source text")
                if not idle:
                    jailers.append(_Jailer(mode, limits.packages))
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


def _ready(running: dict) -> list:
    """Those whose result is there, or who are past all patience."""
    if not running:
        return []
    patience = max(0.0, min(jailer.given_up for jailer in running) - time.monotonic())
    return _wait(running, patience) or [j for j in running if j.given_up <= time.monotonic()]


def _wait(jailers: Iterable, seconds: float) -> list:
    """Those that have something to say (poll, because select refuses descriptors above 1023)."""
    poller, by_fd = select.poll(), {jailer.fileno(): jailer for jailer in jailers}
    for fd in by_fd:
        poller.register(fd, select.POLLIN)
    return [by_fd[fd] for fd, _ in poller.poll(1000 * seconds)]


class _Jailer:
    """The caller's end of a jailer process."""

    def __init__(self, mode: str, packages: bool):
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

    def fileno(self) -> int:
        return self._process.stdout.fileno()

    def send(self, code: str, stdin: str, limits: Limits) -> None:
        self._started, self.given_up = time.monotonic(), time.monotonic() + limits.seconds + GRACE
        try:
            self._process.stdin.write(json.dumps({"code": code, "stdin": stdin, "limits": asdict(limits)}).encode())
            self._process.stdin.write(b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self.alive = False  # receive() then finds the end of its output

    def receive(self) -> Result:
        answer = self._read()
        if answer is None:
            self.alive = False
            why = "the program destroyed its sandbox, or something outside did"
            return Result("", why, "lost", None, time.monotonic() - self._started)
        return Result(*(answer[name] for name in Result._fields))

    def _read(self) -> dict | None:
        """The next line; None where the jailer ended or does not answer."""
        if not _wait([self], max(0.0, self.given_up - time.monotonic())):
            return None
        line = self._process.stdout.readline()
        return json.loads(line) if line.endswith(b"\n") else None

    def close(self) -> None:
        with self._process as process:  # closes the pipes and reaps
            if not self.alive:
                process.kill()
            try:
                process.stdin.close()
            except BrokenPipeError:
                pass  # bytes of a request that nobody is left to read
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()


@functools.cache
def probe() -> Probe:
    """The strongest mode in which this machine runs a program, found by running one; once a process.

    Raises ValueError where not even limits work (anything but Linux 5.3 or newer).
    """
    refused = {}
    for mode in MODES:
        try:
            jailer = _Jailer(mode, False)
        except ValueError as error:
            refused[mode] = str(error).removeprefix(f"no sandbox of mode {mode}: ")
            continue
        try:
            jailer.send("print(6 * 7)", "", Limits())
            result = jailer.receive()
            if result.stdout == "42\n":
                return Probe(mode, jailer.hello, refused)
            refused[mode] = " ".join((result.stderr or result.status).split())[-200:]
        finally:
            jailer.close()
    raise ValueError(f"programs cannot be run apart on this machine: {refused}")


def _known(mode: str | None) -> str | None:
    if mode is not None and mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}, expected one of {', '.join(MODES)}")
    return mode


def main(arguments: list[str] | None = None) -> None:
    import argparse

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
