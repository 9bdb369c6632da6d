"""One rule for every command line: numbers as people type them, the nearest name, errors of one line.

    --steps 1000   --steps 1_000   --steps 1e3   --lr 3e-4     numbers
    --seq_len 128  --seq-len=128                               one flag
    --stesp 3                                                  "unrecognized arguments: --stesp; did you mean --steps?"

`runtime.cli` reads the scripts' flags with it, and a recipe's; the commands of kernels/ and schedules/, which are
installed without runtime/, take it from here.
"""

import argparse
import contextlib
import difflib
import importlib
import os
import re
import shutil
import sys
import threading
import time
from functools import partial

# Endings that people mean two things by, or that change with the country.
ENDINGS = {"k": (1000, 1024), "m": (1000**2, 1024**2), "g": (1000**3, 1024**3), "b": (1000**3, 1024**3)}


SILENCE = 9.0  # seconds without a word after which a command says that it is at work


class _Heard:
    """A standard stream that remembers when it was last written to."""

    last = 0.0  # of all streams together, monotonic

    def __init__(self, stream):
        self._stream = stream

    def write(self, text: str) -> int:
        _Heard.last = time.monotonic()
        return self._stream.write(text)

    def __getattr__(self, name):
        return getattr(self._stream, name)


@contextlib.contextmanager
def alive():
    """While the block runs no `SILENCE` is longer: a bar that stands still is shown again with its clock, and where
    there is none a line on stderr says how long nothing was said. On rank 0."""
    if int(os.environ.get("RANK", 0)):
        yield
        return
    streams, done, began = (sys.stdout, sys.stderr), threading.Event(), time.monotonic()
    sys.stdout, sys.stderr = map(_Heard, streams)
    _Heard.last = began

    def watch() -> None:
        while not done.wait(min(1.0, SILENCE / 4)):
            now = time.monotonic()
            if now - _Heard.last < SILENCE:
                continue
            _Heard.last = now
            bars = [bar for bar in getattr(sys.modules.get("tqdm"), "tqdm", _NoBars)._instances if not bar.disable]
            for bar in bars:
                bar.refresh()
            if not bars:
                print(f"... at work for {now - began:.0f} s", file=streams[1], flush=True)

    watcher = threading.Thread(target=watch, daemon=True, name="alive")
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
        sys.stdout, sys.stderr = streams


class _NoBars:
    _instances = ()


def number(text: str) -> float:
    """3e-4, 1_000.5, inf. Raises ArgumentTypeError that says what else to write."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number{_meant(text)}") from None


def whole(text: str) -> int:
    """1000, 1_000, 1e3, 1000.0. Raises ArgumentTypeError for what is no whole number, or one beyond 2^53 not written
    in digits, as a float would change it."""
    try:
        return int(text)
    except ValueError:
        value = number(text)
    if not value.is_integer():
        raise argparse.ArgumentTypeError(f"{text} is no whole number; expected one such as 1000, 1_000 or 1e3")
    if abs(value) > 2**53:
        raise argparse.ArgumentTypeError(f"{text} is beyond 2^53; write it in digits")
    return int(value)


def _meant(text: str) -> str:
    """What may be meant by a number that none is, with the words before it."""
    if re.fullmatch(r"[+-]?\d{1,3}(,\d{3})+", text):
        return f"; without commas it is {text.replace(',', '')} or {text.replace(',', '_')}"
    if found := re.fullmatch(r"([+-]?[\d_.]+)([kKmMgGbB])", text):
        with_ending = [float(found[1].replace("_", "")) * size for size in ENDINGS[found[2].lower()]]
        return f"; {found[2]} may mean two things: write {' or '.join(f'{value:.0f}' for value in with_ending)}"
    return "; expected one such as 1000, 1_000, 1e3 or 0.001"


def nearest(given: str, known) -> str:
    """ "; did you mean NAME?" with the nearest name of ``known``, or ""."""
    found = difflib.get_close_matches(given.replace("_", "-"), [str(k) for k in known if k], n=1)
    found = found or difflib.get_close_matches(given, [str(k) for k in known if k], n=1)
    return f"; did you mean {found[0]}?" if found else ""


def package(module: str, what: str, pip: str = "", otherwise: str = ""):
    """The ``module`` of an optional package. Raises ValueError, one line with pip's command for ``pip`` (default: the
    module's name), and what else can be done, where it cannot be imported: ``what`` needs it."""
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        pip = pip or module.partition(".")[0]
        why = (str(error).splitlines() or [type(error).__name__])[0]
        way = f"pip install {pip}" + f", or {otherwise}" * bool(otherwise)
        raise ValueError(f"{what} needs the package {pip} ({why}): {way}") from None


class Parser(argparse.ArgumentParser):
    """An ArgumentParser by the rule above. An error ends the process with exit code 2; with ``exits`` False it raises
    ValueError instead. ``type=int`` is `whole`, ``type=float`` is `number`."""

    def __init__(self, exits: bool = True, **how):
        self.exits, width = exits, min(shutil.get_terminal_size().columns, 120)
        form = partial(argparse.RawDescriptionHelpFormatter, max_help_position=34, width=width)
        super().__init__(**{"formatter_class": form, "usage": "%(prog)s [flags]"} | how, allow_abbrev=False)
        self._negative_number_matcher = re.compile(r"-\.?\d")  # argparse's takes -1e3 for a flag
        self.register("type", int, whole)
        self.register("type", float, number)

    def error(self, message):
        message = " ".join(message.split())  # what was given may hold line ends
        if not self.exits:
            raise ValueError(message)
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")

    def _check_value(self, action, value):
        if action.choices is not None and value not in action.choices:
            known = [str(choice) for choice in action.choices if choice != ""]
            says = f"invalid choice: {value!r} (choose from {', '.join(known)}){nearest(str(value), known)}"
            raise argparse.ArgumentError(action, says)

    def parse_known_args(self, args=None, namespace=None):
        """As argparse's, but an unknown flag is an error here: it is said before what else is missing, and by the
        parser of a sub-command, which knows its flags."""
        given = list(sys.argv[1:] if args is None else args)
        end = given.index("--") if "--" in given else len(given)
        flags = given[:end] = [self._spelled(arg) for arg in given[:end]]
        unknown = [arg for arg in flags if re.match(r"--?[A-Za-z]", arg) and " " not in arg and not self._known(arg)]
        if unknown and self._subparsers is None:
            self._unknown(unknown)
        return super().parse_known_args(given, namespace)

    def parse_args(self, args=None, namespace=None):
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self._unknown(unknown)
        return found

    def _spelled(self, arg: str) -> str:
        """--seq_len as --seq-len."""
        name, equals, value = arg.partition("=")
        dashed = name.replace("_", "-")
        return dashed + equals + value if name.startswith("--") and dashed in self._option_string_actions else arg

    def _known(self, arg: str) -> bool:
        """Whether argparse reads ``arg`` as a flag of this parser: -x3 is -x 3."""
        known = self._option_string_actions
        return arg.partition("=")[0] in known or (arg[1] != "-" and arg[:2] in known)

    def _unknown(self, args: list[str]) -> None:
        near = [nearest(arg.partition("=")[0], self._option_string_actions) for arg in args]
        self.error(f"unrecognized arguments: {' '.join(args)}{next(filter(None, near), '')}")
