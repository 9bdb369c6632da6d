"""The command line: a dataclass of flags, one-line errors, and signals that ask a loop to stop."""

import argparse
import contextlib
import dataclasses
import os
import signal
import sys
import typing
from pathlib import Path


def opt(default, help: str, choices: tuple[str, ...] | None = None):
    """A dataclass field with its one-line help and, for a string, the values it may take."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


class _Parser(argparse.ArgumentParser):
    def error(self, message):  # one line, not the whole usage
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


def parse_config(cls, argv: list[str] | None = None, description: str = ""):
    """An instance of the dataclass ``cls`` from the command line; each field is a flag.

    ``seq_len`` becomes ``--seq-len``; a bool gives ``--x`` and ``--no-x``; ``T | None`` takes a T.
    A bad flag prints one line and exits with code 2.
    """
    parser = _Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        kind = next((t for t in typing.get_args(hints[f.name]) if t is not type(None)), hints[f.name])
        default = "" if f.default is None or f.default == "" else f" (default: {f.default})"
        kwargs = {"default": f.default, "help": f.metadata["help"].replace("%", "%%") + default}
        if kind is bool:
            kwargs["action"] = argparse.BooleanOptionalAction
        else:
            kwargs |= {"type": kind, "choices": f.metadata["choices"]}
            kwargs["metavar"] = None if f.metadata["choices"] else kind.__name__.upper()
        parser.add_argument("--" + f.name.replace("_", "-"), **kwargs)
    return cls(**vars(parser.parse_args(argv)))


@contextlib.contextmanager
def user_errors():
    """Around set-up: turns a ValueError or OSError into one line on stderr and exit code 2."""
    try:
        yield
    except (ValueError, OSError) as e:
        if os.environ.get("SCORECAST_TRACEBACK"):
            raise
        if int(os.environ.get("RANK", 0)) == 0:
            message = " ".join(str(e).split())
            print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


class StopRequest:
    """Ctrl-C or SIGTERM asks the loop to save and stop; a second Ctrl-C stops at once."""

    def __init__(self):
        self.signal: str | None = None
        self._old = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}

    def _handle(self, number, frame):
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name

    def restore(self):
        """Gives the signals back to whoever had them."""
        for number, old in self._old.items():
            signal.signal(number, old)
