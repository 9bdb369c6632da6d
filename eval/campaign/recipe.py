"""Recipes: grids of a script's flags as TOML files, checked as a whole before anything starts.

A recipe has ``script``, ``out``, a table ``flags`` that all cells share, a table ``grid`` of lists whose product is
taken, and optionally ``arm``, an array of tables of flags, each an arm of its own. An axis of the grid is a list of a
flag's values, or, under a name of yours, of tables of flags that change together. A shared flag is left out of the
cells whose loss or schedule does not read it. ``keep`` lists the arms that are never pruned, each as a loss or as
FLAG=VALUE of a flag that the recipe gives.
"""

import dataclasses
import importlib
import itertools
import math
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import torch

from runtime.cli import flag_name, parse_config, parser_of
from runtime.folder import CHECKPOINTS
from runtime.machine import World
from schedules.commandline import nearest
from schedules.textlines import read_text, read_toml


class Job(NamedTuple):
    """One run of a recipe. ``shared``: flags of every cell, ``own``: those that tell this one apart; ``arm``: the
    number of its [[arm]], from 0; ``config``: the value of every flag of the script, from `fit`."""

    name: str
    shared: dict
    own: dict
    arm: int = 0
    config: dict = {}


# What stands in a recipe.
KEYS = {
    "script": "a text",
    "out": "a text",
    "title": "a text",
    "keep": "a list of losses, or FLAG=VALUE, of arms that are never pruned",
    "flags": "a table of values",
    "grid": "a table of lists that have a value or more, or tables of flags",
    "arm": "tables of values, each below its [[arm]]",
}

# Flags that take a file or a folder, beside names; those of data sets and of the hub are not looked for here.
PATHS = ("data", "ood", "eval_data", "model", "adapter", "init_from", "tokenizer")


def _fits(key: str, found) -> bool:
    """Whether ``found`` is what KEYS says."""

    def values(found) -> bool:
        return all(isinstance(value, str | int | float) for value in found)

    if key == "flags":
        return isinstance(found, dict) and values(found.values())
    if key == "grid":
        axes = found.values() if isinstance(found, dict) else [None]
        return all(isinstance(axis, list) and axis and (values(axis) or _fits("arm", axis)) for axis in axes)
    if key == "arm":
        return isinstance(found, list) and found != [] and all(_fits("flags", arm) for arm in found)
    if key == "keep":
        return isinstance(found, list) and all(isinstance(name, str) for name in found)
    return isinstance(found, str)


def read_recipe(path: Path) -> dict:
    """The tables of a recipe. Raises ValueError naming the key that is unknown, missing or of another type, and its
    line."""
    recipe, text = read_toml(path), read_text(path)
    unknown = sorted(set(recipe) - set(KEYS))
    if unknown or not {"script", "out"} <= set(recipe):
        near = nearest(unknown[0], KEYS) if unknown else ""
        known = f"needs script and out, and knows flags, grid, arm, keep and title; check {unknown}{near}"
        raise ValueError(f"{place(path, text, unknown[0] if unknown else '')} {known}")
    for key, found in recipe.items():
        if not _fits(key, found):
            raise ValueError(f"{place(path, text, key)}: {key} is {str(found)[:80]!r}, expected {KEYS[key]}")
    return recipe


def line_of(text: str, key: str, section: str = "", number: int = 0) -> int | None:
    """The line of a recipe's ``text``, from 1, where ``key`` of the table ``section`` ("" is none) stands, or the
    table ``key`` itself; of [[arm]] tables the one of that ``number``. None where it is not found: a table may be
    written in other ways."""
    here, seen = "", defaultdict(int)
    for at, line in enumerate(text.split("\n"), 1):
        if head := re.match(r"\s*\[\[?\s*([\w-]+)\s*\]\]?", line):
            here = head[1]
            seen[here] += 1
            if here == key and not section:
                return at
        elif (found := re.match(r"""\s*["']?([\w.-]+)["']?\s*=""", line)) and here == section:
            if found[1].replace("-", "_") == key.replace("-", "_") and seen[here] in (0, number + 1):
                return at
    return None


def place(path: Path, text: str, key: str, section: str = "", number: int = 0) -> str:
    """ "FILE, line N" of a key, or FILE where its line is not found."""
    at = line_of(text, key, section, number) if key else None
    return f"{path}, line {at}" if at else f"{path}"


def cells(recipe: dict, extra: dict) -> list[Job]:
    """Every run, the last grid axis fastest. ``extra`` overrides the flags of every cell; those that it makes alike are
    one."""
    grid, out = recipe.get("grid", {}), {}
    for (number, arm), values in itertools.product(
        enumerate(recipe.get("arm", [{}])), itertools.product(*grid.values())
    ):
        own = dict(arm)
        for axis, value in zip(grid, values, strict=True):
            own |= value if isinstance(value, dict) else {axis: value}
        left = {k: v for k, v in own.items() if k.replace("-", "_") not in extra}
        name = "-".join(f"{v}" if k == "loss" else f"{k}{v}" for k, v in left.items()).replace("/", "_") or "run"
        if name in out and len(left) == len(own):
            raise ValueError(f"two cells of the recipe have the same flags: {name}")
        out.setdefault(name, Job(name, recipe.get("flags", {}) | extra, left, number))
    return list(out.values())


def load_script(script: str):
    """The module of a recipe's script. Raises ValueError where there is none, or none with a Config."""
    if not Path(script).is_file():
        here = "start from the folder where the scripts are" if Path(script).name == script else "check its path"
        raise ValueError(f"script {script!r} is not a script with a Config in this folder; {here}")
    module = importlib.import_module(Path(script).stem)
    if not hasattr(module, "Config"):
        raise ValueError(f"script {script!r} is not a script with a Config in this folder")
    return module


def fit(script, todo: list[Job], where=lambda cell, flag: "") -> tuple[list[Job], str]:
    """The cells without the shared flags that they do not read, each with its ``config``, and a line that says which
    flags these are, or "".

    ``script`` is a module: its ``Config``, and its ``complete`` where flags depend on others as in
    `runtime.cli.parse_config`. Raises ValueError naming the cell whose flags the script refuses, behind
    ``where(cell, flag)``, which says the place of a flag in the file."""
    complete = getattr(script, "complete", dict)
    defaults = {f.name: f.default for f in dataclasses.fields(script.Config)}
    only = {f.name: f.metadata["only"] for f in dataclasses.fields(script.Config)}
    fitted, left_out = [], defaultdict(dict)
    for cell in todo:
        try:
            given = vars(parser_of(script.Config, exits=False).parse_args(arguments(cell.shared | cell.own)))
            values = complete(defaults | given)
            # flag -> the value under which nothing reads it, such as ce of the loss
            reads = {k: only.get(k.replace("-", "_"), {}) for k in cell.shared if k not in cell.own}
            unread = {k: values[o] for k, others in reads.items() for o, may in others.items() if values[o] not in may}
            cell = cell._replace(shared={k: v for k, v in cell.shared.items() if k not in unread})
            cfg = parse_config(script.Config, arguments(cell.shared | cell.own), complete=complete, exits=False)
        except ValueError as e:
            raise ValueError(f"{where(cell, _named(str(e), cell))}cell {cell.name}: {e}") from e
        fitted.append(cell._replace(config=dataclasses.asdict(cfg)))
        for flag, value in unread.items():
            left_out[flag][str(value)] = None
    says = ", ".join(f"{flag} ({', '.join(values)})" for flag, values in left_out.items())
    return fitted, f"left out where nothing reads them: {says}" if says else ""


def _named(message: str, cell: Job) -> str:
    """The flag of ``cell`` that an error names first, as the recipe has it, or ""."""
    given = {flag_name(k): k for k in cell.shared | cell.own}
    return next((given[flag] for flag in re.findall(r"--[\w-]+", message) if flag in given), "")


def check(
    path: Path, extra: dict, ranks: int = 1, device: str = "cpu", seeds: list[int] = ()
) -> tuple[dict, list[Job], str]:
    """The recipe of a file, its cells and what `fit` says of them.

    ``extra`` as `cells` takes it; ``ranks`` and ``device`` ("cpu", "cuda") of a run; ``seeds``: in the place of the
    recipe's. Raises ValueError, one line with the line of the file, for all that can be told without the data: a flag,
    a value, flags that do not go together."""
    recipe, text = read_recipe(path), read_text(path)
    if seeds:
        recipe["grid"] = recipe.get("grid", {}) | {"seed": list(seeds)}

    def where(cell: Job, flag: str) -> str:
        if "arm" in recipe and flag in recipe["arm"][cell.arm]:
            return f"{place(path, text, flag, 'arm', cell.arm)}: "
        together = [n for n, axis in recipe.get("grid", {}).items() if any(flag in v for v in axis if type(v) is dict)]
        key, section = (
            (together[0], "grid") if together else (flag, "grid" if flag in recipe.get("grid", ()) else "flags")
        )
        return f"{place(path, text, key, section)}: "

    try:
        script = load_script(recipe["script"])
    except ValueError as e:
        raise ValueError(f"{place(path, text, 'script')}: {e}") from e
    try:
        made = cells(recipe, extra)
    except ValueError as e:
        raise ValueError(f"{place(path, text, 'arm' if 'arm' in recipe else 'grid')}: {e}") from e
    todo, says = fit(script, made, where)
    whole = len(recipe.get("arm", [{}])) * math.prod(map(len, recipe.get("grid", {}).values()))
    if len(todo) < whole:
        says = "\n".join(filter(None, [says, f"--set makes {whole} cells of the recipe {len(todo)}"]))
    world = World(0, ranks, torch.device(device))
    for cell in todo:
        if hasattr(script, "check"):
            try:
                cfg = script.Config(**cell.config)
                on_cpu = getattr(cfg, "device", "") == "cpu"
                script.check(cfg, World(0, ranks, torch.device("cpu")) if on_cpu else world)
            except ValueError as e:
                raise ValueError(f"{where(cell, _named(str(e), cell))}cell {cell.name}: {e}") from e
    if useless := [flag for flag in extra if not any(flag in (cell.shared | cell.own) for cell in todo)]:
        raise ValueError(f"{path}: --set {useless[0]}: no cell reads it")
    for name in recipe.get("keep", ()):
        if not any(keeps(name, cell) for cell in todo):
            has = sorted({str(cell.config.get("loss")) for cell in todo})
            raise ValueError(f"{place(path, text, 'keep')}: keep: no cell has {name!r}{nearest(name, has)}")
    return recipe, todo, says


def missing(todo: list[Job]) -> str:
    """A flag of a cell whose value is written as a path, which leads nowhere; "" for none."""
    for cell in todo:
        for flag, value in cell.config.items():
            if flag in PATHS and re.match(r"/|\.|~|runs/", str(value)) and not Path(value).expanduser().exists():
                return f"cell {cell.name}: {flag_name(flag)} {value}: there is no such file or folder"
    return ""


def keeps(name: str, cell: Job) -> bool:
    """Whether an entry of ``keep``, a loss or FLAG=VALUE, names the arm of ``cell``."""
    if "=" not in name:
        return cell.config.get("loss") == name
    given = {k.replace("-", "_"): str(v) for k, v in (cell.shared | cell.own).items()}
    flag, _, value = name.partition("=")
    return given.get(flag.replace("-", "_")) == value


def alike(script, cell: Job, *kinds: str) -> tuple:
    """The values of the flags whose role is one of ``kinds``: of "setting", equal for runs that answer one question."""
    return tuple(cell.config[f.name] for f in dataclasses.fields(script.Config) if f.metadata["role"] in kinds)


def arguments(flags: dict) -> list[str]:
    """Flags as a command line has them."""
    out = []
    for name, value in zip(map(flag_name, flags), flags.values(), strict=True):
        out += [name if value else f"--no-{name[2:]}"] if isinstance(value, bool) else [name, str(value)]
    return out


def command_line(script: str, folder: Path, flags: dict, ranks: int) -> list[str]:
    """The command line of one cell; it resumes where the folder holds an unfinished run. One with best.pt alone, of a
    kill between the first best.pt and last.pt, begins anew under --resume only."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    resume = ["--resume"] * any((folder / name).exists() for name in CHECKPOINTS)
    return [sys.executable, *torchrun, script, "--out", str(folder), *arguments(flags), *resume]
