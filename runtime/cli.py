"""The command line: a dataclass of flags that say everything about themselves, and errors of one line.

    @dataclass(frozen=True)
    class Config:
        steps: int = opt(1000, "optimizer steps", within="[1, inf)", role="setting", group="optimizer")
        gamma: float = opt(2.0, "exponent", within="[0, inf)", only={"loss": ("focal",)})

How numbers and names are read is in `schedules.commandline`. Nothing here knows a flag by its name.
"""

import argparse
import contextlib
import dataclasses
import math
import os
import sys
import typing
from pathlib import Path

from schedules.commandline import Parser

# What a difference between two runs in this flag means.
ROLES = {
    "setting": "the runs answer different questions: nothing is compared across it",
    "knob": "the runs are different arms of one experiment",
    "system": "speed and memory are not comparable; may change when a run is resumed",
    "where": "nothing; may change when a run is resumed",
    "bookkeeping": "nothing; stays as it is when a run is resumed",
}


def opt(default, help: str, choices=None, *, within="", role="knob", only=None, group="", alias="", unlike="", bare=""):
    """A dataclass field that is a flag, with its one-line help.

    ``choices``: the values that a string may take, a tuple. ``within``: an interval such as "[0, 1)" that a number must
    lie in. ``role``: a key of ROLES. ``only``: {other flag: values} under which this one is read; all must hold, and
    given elsewhere it is refused. ``group``: begins a section of --help. ``alias``: another name. ``unlike``: what the
    flag is not, where other code bases call something else so; --help and its errors say it. ``bare``: the value of the
    flag that is given without one."""
    if role not in ROLES:
        raise ValueError(f"role {role!r}; expected one of {', '.join(ROLES)}")
    about = dict(help=help, choices=choices, within=within, role=role, only=only or {}, group=group)
    return dataclasses.field(default=default, metadata=about | dict(alias=alias, unlike=unlike, bare=bare))


def flag_name(field: str) -> str:
    return "--" + field.replace("_", "-")


def roles(cls) -> dict[str, dict]:
    """{flag: {"role", "only", "default"}} of a Config, as a run folder keeps it for the report."""
    about = {f.name: {"role": f.metadata["role"], "only": dict(f.metadata["only"])} for f in dataclasses.fields(cls)}
    return {f.name: about[f.name] | {"default": f.default} for f in dataclasses.fields(cls)}


def changeable(cls) -> tuple[str, ...]:
    """Flags that a resumed run may change: where and how it computes, not what."""
    return tuple(f.name for f in dataclasses.fields(cls) if f.metadata["role"] in ("where", "system"))


def outside(value, interval: str) -> str:
    """What is wrong with a number that has to lie in ``interval``, "" where nothing is."""
    low, high = (float(x) for x in interval[1:-1].split(","))
    if low < value < high or (value, interval[0]) == (low, "[") or (value, interval[-1]) == (high, "]"):
        return ""
    if high < math.inf:
        return f"is outside {interval}"
    above = f"must be finite and above {low:g}" if interval[0] == "(" else f"must be at least {low:g}"
    return "must be finite and not negative" if interval.startswith("[0,") else above


def parser_of(cls, description: str = "", *, exits: bool = True) -> Parser:
    """The parser of a Config: ``seq_len`` is ``--seq-len``; a bool gives ``--x`` and ``--no-x``; ``T | None`` takes a
    T. Flags that are not given are not in its namespace."""
    parser = Parser(exits, description=description)
    hints, section = typing.get_type_hints(cls), parser
    for f in dataclasses.fields(cls):
        about = f.metadata
        section = parser.add_argument_group(about["group"]) if about["group"] else section
        kind = next((t for t in typing.get_args(hints[f.name]) if t is not type(None)), hints[f.name])
        choices = ", ".join(c or repr(c) for c in about["choices"] or ())
        default = "" if f.default in (None, "") else f"default: {f.default}"
        notes = "; ".join(filter(None, (choices, about["within"], default)))
        help = "; ".join(filter(None, (about["help"], about["unlike"]))) + (f" ({notes})" if notes else "")
        names = filter(None, (flag_name(f.name), about["alias"]))
        how = {"dest": f.name, "default": argparse.SUPPRESS, "help": help.replace("%", "%%")}
        metavar = "NAME" if choices else kind.__name__.upper()
        takes = {"type": kind, "choices": about["choices"], "metavar": metavar}
        takes |= {"nargs": "?", "const": about["bare"]} if about["bare"] else {}
        section.add_argument(*names, **how, **({"action": argparse.BooleanOptionalAction} if kind is bool else takes))
    return parser


def parse_config(cls, argv: list[str] | None = None, description="", complete=lambda values: values, *, exits=True):
    """An instance of the dataclass ``cls`` from the command line.

    ``complete`` takes the values by name and gives them back with what depends on other flags, such as a preset's.
    A flag that is unknown, outside of its range, no choice, or given where nothing reads it prints one line and exits
    with code 2; with ``exits`` False it raises ValueError."""
    parser = parser_of(cls, description, exits=exits)
    given = vars(parser.parse_args(argv))
    values = complete({f.name: given.get(f.name, f.default) for f in dataclasses.fields(cls)})
    for f in dataclasses.fields(cls):
        value, interval = values[f.name], f.metadata["within"]
        if not interval and isinstance(value, float) and not math.isfinite(value):
            parser.error(f"{flag_name(f.name)} {value} must be finite")
        if interval and value is not None and (wrong := outside(value, interval)):
            parser.error("; ".join(filter(None, (f"{flag_name(f.name)} {value} {wrong}", f.metadata["unlike"]))))
    for f in dataclasses.fields(cls):
        for other, allowed in f.metadata["only"].items():
            if f.name in given and values[other] not in allowed:
                flag, may = flag_name(other), " or ".join(map(str, allowed))
                why = f"is read by {flag} {may} alone, not by {flag} {values[other]}"
                wrong = f"{flag_name(f.name)} {f'needs {flag}' if allowed == (True,) else why}"
                parser.error("; ".join(filter(None, (wrong, f.metadata["unlike"]))))
    return cls(**values)


def program() -> str:
    """What runs, as an error begins and as one types it: train_lm.py, python -m eval.report."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return f"python -m {spec.name.removesuffix('.__main__')}" if spec else Path(sys.argv[0]).name


@contextlib.contextmanager
def user_errors():
    """Around set-up: turns a ValueError or OSError into one line on stderr and exit code 2, Ctrl-C into one and 130."""
    try:
        yield
    except (ValueError, OSError) as e:
        if os.environ.get("SCORECAST_TRACEBACK"):
            raise
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"{program()}: error: {' '.join(str(e).split())}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt as e:
        if type(e) is not KeyboardInterrupt:
            raise  # of `runtime.process.command`
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"{program()}: stopped; the same command does it again", file=sys.stderr, flush=True)
        sys.exit(130)
