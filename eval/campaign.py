"""Runs a recipe: every cell of a grid of script flags, then the report over all of them.

    python -m eval.campaign recipes/demo.toml
    python -m eval.campaign recipes/wikitext103.toml --nproc 8 --set steps=1000
    python -m eval.campaign recipes/wikitext103.toml --dry-run
    python -m eval.campaign recipes/fot_small.toml --jobs 2          # small runs side by side on one machine or GPU

A recipe is a TOML file: ``script``, ``out``, a table ``flags`` that all cells share, a table ``grid`` of lists whose
product is taken, and optionally ``arm``, an array of tables of flags, each an arm of its own. A shared flag is left out
of the cells whose loss or schedule does not read it. All flags are checked before the first run starts. Cells that have
finished are left alone and cells that were interrupted go on, so the same command continues a grid.
"""

import dataclasses
import functools
import importlib
import itertools
import multiprocessing.connection
import os
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from runtime.cli import Parser, flag_name, parse_config, parser_of, user_errors
from runtime.process import code_of, command, end_with_parent, handled
from runtime.secrets import hide
from schedules.commandline import nearest
from schedules.textlines import read_toml


class Job(NamedTuple):
    """One run of a recipe. ``shared``: flags of every cell, ``own``: those that tell this one apart."""

    name: str
    shared: dict
    own: dict


# What stands in a recipe.
KEYS = {
    "script": "a text",
    "out": "a text",
    "title": "a text",
    "flags": "a table of values",
    "grid": "a table of lists that have a value or more",
    "arm": "tables of values, each below its [[arm]]",
}


def _fits(key: str, found) -> bool:
    """Whether ``found`` is what KEYS says."""

    def values(found) -> bool:
        return all(isinstance(value, str | int | float) for value in found)

    if key == "flags":
        return isinstance(found, dict) and values(found.values())
    if key == "grid":
        return isinstance(found, dict) and all(isinstance(v, list) and v and values(v) for v in found.values())
    if key == "arm":
        return isinstance(found, list) and found != [] and all(_fits("flags", arm) for arm in found)
    return isinstance(found, str)


def read_recipe(path: Path) -> dict:
    """The tables of a recipe. Raises ValueError naming the key that is unknown, missing or of another type."""
    recipe = read_toml(path)
    unknown = sorted(set(recipe) - set(KEYS))
    if unknown or not {"script", "out"} <= set(recipe):
        near = nearest(unknown[0], KEYS) if unknown else ""
        raise ValueError(f"{path} needs script and out, and knows flags, grid, arm and title; check {unknown}{near}")
    for key, found in recipe.items():
        if not _fits(key, found):
            raise ValueError(f"{path}: {key} is {str(found)[:80]!r}, expected {KEYS[key]}")
    return recipe


def cells(recipe: dict, extra: dict) -> list[Job]:
    """Every run, the last grid axis fastest. ``extra`` overrides the flags of every cell."""
    grid, out = recipe.get("grid", {}), {}
    for arm, values in itertools.product(recipe.get("arm", [{}]), itertools.product(*grid.values())):
        own = arm | dict(zip(grid, values, strict=True))
        name = "-".join(f"{v}" if k == "loss" else f"{k}{v}" for k, v in own.items()).replace("/", "_") or "run"
        if name in out:
            raise ValueError("two cells of the recipe have the same flags")
        out[name] = Job(name, recipe.get("flags", {}) | extra, {k: v for k, v in own.items() if k not in extra})
    return list(out.values())


def load_script(script: str):
    """The module of a recipe's script. Raises ValueError where there is none, or none with a Config."""
    module = importlib.import_module(Path(script).stem) if Path(script).is_file() else None
    if not hasattr(module, "Config"):
        raise ValueError(f"script {script!r} is not a script with a Config in this folder")
    return module


def fit(script, todo: list[Job]) -> tuple[list[Job], str]:
    """The cells without the shared flags that they do not read, and a line that says which these are, or "".

    ``script`` is a module: its ``Config``, and its ``complete`` where flags depend on others as in
    `runtime.cli.parse_config`. Raises ValueError naming the cell whose flags the script refuses."""
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
            parse_config(script.Config, arguments(cell.shared | cell.own), complete=complete, exits=False)
        except ValueError as e:
            raise ValueError(f"cell {cell.name}: {e}") from e
        fitted.append(cell)
        for flag, value in unread.items():
            left_out[flag][str(value)] = None
    says = ", ".join(f"{flag} ({', '.join(values)})" for flag, values in left_out.items())
    return fitted, f"left out where nothing reads them: {says}" if says else ""


def arguments(flags: dict) -> list[str]:
    """Flags as a command line has them."""
    out = []
    for name, value in zip(map(flag_name, flags), flags.values(), strict=True):
        out += [name if value else f"--no-{name[2:]}"] if isinstance(value, bool) else [name, str(value)]
    return out


def command_line(script: str, folder: Path, flags: dict, ranks: int) -> list[str]:
    """The command line of one cell; it resumes where the folder already holds an unfinished run."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    resume = ["--resume"] * any((folder / f).exists() for f in ("last.pt", "previous.pt"))
    return [sys.executable, *torchrun, script, "--out", str(folder), *arguments(flags), *resume]


def in_turn(commands: dict[Path, list[str]]) -> int:
    """Runs what has not finished, one after the other. Returns 0, or the exit code of the run that failed or that a
    signal has stopped. A run ends with this process, however it ends."""
    child, stopped = None, []

    def stop(number, _):
        stopped.append(signal.Signals(number).name)
        if child and number == signal.SIGTERM:  # a terminal sends the others to the run as well
            child.send_signal(number)

    handled(stop)
    for i, (folder, line) in enumerate(commands.items(), 1):
        done = (folder / "summary.json").exists()
        print(f"[{i}/{len(commands)}] {f'{folder} has finished already' if done else hide(' '.join(line))}", flush=True)
        if done:
            continue
        if stopped:
            print("stopped between two runs; the same command goes on from here", file=sys.stderr)
            return code_of(stopped[0])
        before = end_with_parent if sys.platform == "linux" else None  # Windows takes none
        child = subprocess.Popen(line, env=os.environ | {"PYTHONUNBUFFERED": "1"}, preexec_fn=before)
        code = as_shells_say(child.wait())
        if code or not (folder / "summary.json").exists():
            print(f"{folder} has not finished (exit code {code}); the same command goes on from here", file=sys.stderr)
            return code or 1
    return 0


def side_by_side(script: str, commands: dict[Path, list[str]], jobs: int) -> int:
    """Runs what has not finished, ``jobs`` at a time, the output of each in FOLDER.log.

    Returns 0, or the exit code of the first run that failed. Those beside it go on to their end, and no new one begins.
    SIGINT, SIGTERM and SIGHUP make all of them save and stop, and so does the end of this process."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // jobs, 1)))
    ways = multiprocessing.get_all_start_methods()  # Windows has "spawn" alone
    context = multiprocessing.get_context("forkserver" if "forkserver" in ways else "spawn")
    context.set_forkserver_preload([Path(script).stem])  # imported once: a small run takes little longer than that
    wanted = [folder for folder in commands if not (folder / "summary.json").exists()]
    bar = tqdm(total=len(commands), initial=len(commands) - len(wanted), unit="run", dynamic_ncols=True)
    running, failed, stopped = {}, 0, []

    def stop(number, _):
        stopped.append(signal.Signals(number).name)
        for process in running.values() if number == signal.SIGTERM else ():  # a terminal's go to them as well
            process.terminate()

    handled(stop)
    while running or (wanted and not failed and not stopped):
        while wanted and len(running) < jobs and not failed and not stopped:
            folder = wanted.pop(0)
            folder.parent.mkdir(parents=True, exist_ok=True)
            running[folder] = context.Process(target=run_cell, args=(commands[folder][1:], f"{folder}.log"))
            running[folder].start()
        time.sleep(0.05)
        for folder, process in [(f, p) for f, p in running.items() if p.exitcode is not None]:
            del running[folder]
            code = as_shells_say(process.exitcode)
            if code or not (folder / "summary.json").exists():
                says = f"{folder} has not finished (exit code {code}), see {folder}.log"
                bar.write(f"{says}; the same command goes on from here", file=sys.stderr)
                failed = failed or code or 1
            else:
                bar.update()
                bar.set_postfix_str(folder.name)
    bar.close()
    return failed or (code_of(stopped[0]) if stopped else 0)


def as_shells_say(code: int) -> int:
    """128 + the number of the signal that ended a child, which Python gives as a negative one; else its exit code."""
    return 128 - code if code < 0 else code


def end_with_campaign() -> None:
    """SIGTERM to this process when the campaign dies; its parent, the forkserver, would live on."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


def run_cell(line: list[str], log: str) -> None:
    """One run, a script and its flags, in a process of its own, its output in the file ``log``."""
    threading.Thread(target=end_with_campaign, daemon=True).start()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = line
    sys.exit(importlib.import_module(Path(line[0]).stem).main(line[1:]))


@functools.partial(command, speaks=False)  # its runs do
def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m eval.campaign", usage="%(prog)s RECIPE [flags]", description=__doc__)
    add = parser.add_argument
    add("recipe", type=Path)
    add("--nproc", type=int, default=1, help="ranks per run, through torchrun (default: 1)")
    add("--out", type=Path, help="folder of the runs (default: the recipe's)")
    add("--set", action="append", default=[], metavar="FLAG=VALUE", help="override a flag in every cell")
    add("--jobs", type=int, default=1, help="runs side by side, their output in FOLDER.log (default: 1)")
    add("--dry-run", action="store_true", help="print the commands only")
    args = parser.parse_args(argv)
    with user_errors():
        recipe = read_recipe(args.recipe)
        if bad := [s for s in args.set if "=" not in s]:
            raise ValueError(f"--set {bad[0]}: expected FLAG=VALUE")
        if args.jobs < 1 or (args.jobs > 1 and args.nproc > 1):
            raise ValueError(f"--jobs {args.jobs} with --nproc {args.nproc}: expected 1 or more, and not both above 1")
        extra = {k.replace("-", "_"): v for k, v in (s.split("=", 1) for s in args.set)}
        try:
            todo, says = fit(load_script(recipe["script"]), cells(recipe, extra))
            if useless := [flag for flag in extra if not any(flag in (cell.shared | cell.own) for cell in todo)]:
                raise ValueError(f"--set {useless[0]}: no cell reads it")
        except ValueError as e:
            raise ValueError(f"{args.recipe}: {e}") from e
    root = args.out or Path(recipe["out"])
    commands = {
        root / c.name: command_line(recipe["script"], root / c.name, c.shared | c.own, args.nproc) for c in todo
    }
    if says:
        print(says, file=sys.stderr, flush=True)
    if args.dry_run:
        print(*map(" ".join, commands.values()), sep="\n")
        return 0
    run = side_by_side(recipe["script"], commands, args.jobs) if args.jobs > 1 else in_turn(commands)
    title = ["--title", recipe["title"]] if "title" in recipe else []
    line = [sys.executable, "-m", "eval.report", *map(str, commands), "--out", str(root / "report"), *title]
    return run or subprocess.call(line)


if __name__ == "__main__":
    sys.exit(main())
