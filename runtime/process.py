"""A command as a process: its signals, its streams, its parent, and the one line with which it fails.

Exit codes: 0 done, 1 failed, 2 bad input, 128 + the signal's number where a signal stopped it.
"""

import contextlib
import ctypes
import functools
import os
import signal
import sys
import threading
from pathlib import Path

from runtime.staging import HELD, release_lock
from schedules.commandline import alive

SIGNALS = tuple(s for s in signal.Signals if s.name in ("SIGINT", "SIGTERM", "SIGHUP"))  # Windows has no SIGHUP


class Stopped(KeyboardInterrupt):
    """A signal, by its name, where nothing waits for a good moment: what is on the disk stays."""


def code_of(name: str) -> int:
    """The exit code of a process that the signal ``name`` has stopped."""
    return 128 + signal.Signals[name].value


def handled(handler) -> dict:
    """Gives the SIGNALS to ``handler``, but those that whoever started us ignores, as nohup does. What had them."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {s: signal.signal(s, handler) for s in SIGNALS if signal.getsignal(s) is not signal.SIG_IGN}


def give_back(old: dict) -> None:
    for number, handler in old.items():
        signal.signal(number, handler)


class StopRequest:
    """Ctrl-C, SIGTERM or SIGHUP, of a terminal that is gone, asks a loop to save and stop; a second Ctrl-C stops at
    once. ``signal``: the name of the first that came, or None."""

    def __init__(self):
        self.signal: str | None = None
        self._old = handled(self._handle)

    def _handle(self, number, frame):
        name = signal.Signals(number).name
        if self.signal and number == signal.SIGINT:
            raise Stopped(name)
        self.signal = name

    def restore(self):
        """Gives the signals back to whoever had them."""
        give_back(self._old)


def end_with_parent() -> None:
    """This process gets SIGTERM when the one that started it dies, however it dies. On Linux; elsewhere it goes on."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


class _Steady:
    """A standard stream whose reader may go: what nobody takes is dropped, and that is said once, on the other one."""

    def __init__(self, stream, number: int, other: int):
        self._stream = stream if stream is not None else open(os.devnull, "w")  # noqa: SIM115 - for the process's life
        self._number, self._other, self._lost = number, other, False

    def write(self, text: str) -> int:
        self._safely(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._safely(self._stream.flush)

    def _safely(self, do, *args) -> None:
        try:
            do(*args)
        except (OSError, ValueError) as e:  # ValueError: closed
            if self._lost:
                return
            self._lost = True
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._number)  # for what the libraries write, and for what waits in the buffer
            os.close(nowhere)
            name, other = ("stdout", "stderr") if self._number == 1 else ("stderr", "stdout")
            print(f"{name} is gone ({e}): goes on without it", file=getattr(sys, other), flush=True)

    def retire(self) -> None:
        """The last flush: what a log handler writes later is no concern of ours."""
        self.flush()
        self._lost = True

    def __getattr__(self, name):
        return getattr(self._stream, name)


def command(main, speaks: bool = True):
    """Around the ``main(argv) -> exit code`` of a command.

    It is never silent for long, see `schedules.commandline.alive`, unless others speak for it (``speaks`` False). A
    signal ends it with one line, and so does an error of the file system, the network of the ranks among them; a
    stream that is gone does not end it. Locks are let go."""

    @functools.wraps(main)
    def run(argv: list[str] | None = None) -> int:
        def stop(number, frame):
            raise Stopped(signal.Signals(number).name)

        while (free := os.open(os.devnull, os.O_RDWR)) <= 2:  # a closed stream's number is no place for a file of ours
            pass
        os.close(free)
        old, streams = handled(stop), (sys.stdout, sys.stderr)
        sys.stdout, sys.stderr = _Steady(sys.stdout, 1, 2), _Steady(sys.stderr, 2, 1)
        try:
            with alive() if speaks else contextlib.nullcontext():
                return main(argv)
        except Stopped as e:
            code, says = code_of(str(e)), f"{e}: stopped"
        except OSError as e:
            if os.environ.get("SCORECAST_TRACEBACK"):
                raise
            code, says = 1, f"{Path(sys.argv[0]).name}: error: {' '.join(str(e).split())}"
        finally:
            folders = list(HELD)
            for folder in folders:
                release_lock(folder)
            give_back(old)
            for stream in (sys.stdout, sys.stderr):
                stream.retire()
            sys.stdout, sys.stderr = streams
        if int(os.environ.get("RANK", 0)) == 0:
            saved = [f for f in folders if (f / "last.pt").exists()]
            more = "".join(f"; the same command with --resume goes on from {f / 'last.pt'}" for f in saved)
            print(says + more, file=sys.stderr, flush=True)
        ranks = sys.modules.get("torch.distributed")
        if ranks and ranks.is_initialized():
            os._exit(code)  # the other ranks may be gone, and leaving the group would wait for them
        return code

    return run
