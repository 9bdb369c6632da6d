"""Runs a recipe: every cell of a grid of script flags, then the report over all of them.

    python -m eval.campaign recipes/demo.toml
    python -m eval.campaign recipes/wikitext103.toml --nproc 8 --set steps=1000
    python -m eval.campaign recipes/wikitext103.toml --dry-run
    python -m eval.campaign recipes/fot_small.toml --jobs 2          # small runs side by side on one machine or GPU

A recipe is a TOML file: ``script``, ``out``, a table ``flags`` that all cells share, a table ``grid``
of lists whose product is taken, and optionally ``arm``, an array of tables of flags, each an arm of
its own. Cells that have finished are left alone and cells that were interrupted go on, so the same
command continues a grid.
"""

import argparse
import importlib
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

from runtime.cli import user_errors


def cells(recipe: dict, extra: dict) -> list[tuple[str, dict]]:
    """(name, flags) of every run, the last grid axis fastest. ``extra`` overrides every cell's flags."""
    grid = recipe.get("grid", {})
    out = []
    for arm in recipe.get("arm", [{}]):
        for values in itertools.product(*grid.values()):
            varied = arm | dict(zip(grid, values, strict=True))
            name = "-".join(f"{v}" if k == "loss" else f"{k}{v}" for k, v in varied.items()) or "run"
            out.append((name.replace("/", "_"), recipe.get("flags", {}) | varied | extra))
    names = [n for n, _ in out]
    if len(set(names)) < len(names):
        raise ValueError("two cells of the recipe have the same flags")
    return out


def command(script: str, out: Path, flags: dict, nproc: int) -> list[str]:
    """The command line of one cell; it resumes where the folder already holds an unfinished run."""
    line = [sys.executable]
    if nproc > 1:
        line += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(nproc)]
    line += [script, "--out", str(out)]
    for key, value in flags.items():
        name = key.replace("_", "-")
        line += [f"--{name}" if value else f"--no-{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    if any((out / f).exists() for f in ("last.pt", "previous.pt")):
        line.append("--resume")
    return line


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--nproc", type=int, default=1, help="ranks per run, through torchrun (default: 1)")
    parser.add_argument("--out", type=Path, help="folder of the runs (default: the recipe's)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FLAG=VALUE", help="override a flag in every cell"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs side by side, their output in FOLDER.log (default: 1)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands only")
    args = parser.parse_args(argv)
    with user_errors():
        try:
            recipe = tomllib.loads(args.recipe.read_text())
        except tomllib.TOMLDecodeError as e:
            raise ValueError(f"{args.recipe} is not TOML: {e}") from e
        unknown = set(recipe) - {"title", "script", "out", "flags", "grid", "arm"}
        if unknown or not {"script", "out"} <= set(recipe):
            raise ValueError(
                f"{args.recipe} needs script and out, and knows flags, grid, arm and title; check {sorted(unknown)}"
            )
        bad = [s for s in args.set if "=" not in s]
        if bad:
            raise ValueError(f"--set {bad[0]}: expected FLAG=VALUE")
        if args.jobs < 1 or (args.jobs > 1 and args.nproc > 1):
            raise ValueError(f"--jobs {args.jobs} with --nproc {args.nproc}: expected 1 or more, and not both above 1")
        extra = {k.replace("-", "_"): v for k, v in (s.split("=", 1) for s in args.set)}
        todo = cells(recipe, extra)
    root = args.out or Path(recipe["out"])
    folders = [root / name for name, _ in todo]

    if args.jobs > 1 and not args.dry_run:
        code = side_by_side(recipe["script"], folders, [flags for _, flags in todo], args.jobs)
        return code or report(folders, root, recipe)

    child = None
    signal.signal(signal.SIGINT, lambda *_: None)  # the terminal sends it to the run as well, which saves
    signal.signal(signal.SIGTERM, lambda *_: child and child.send_signal(signal.SIGTERM))
    for i, (folder, (_, flags)) in enumerate(zip(folders, todo, strict=True), 1):
        line = command(recipe["script"], folder, flags, args.nproc)
        if args.dry_run:
            print(" ".join(line))
            continue
        if (folder / "summary.json").exists():
            print(f"[{i}/{len(todo)}] {folder} has finished already", flush=True)
            continue
        print(f"[{i}/{len(todo)}] {' '.join(line)}", flush=True)
        child = subprocess.Popen(line, env=os.environ | {"PYTHONUNBUFFERED": "1"})
        code = child.wait()
        if code or not (folder / "summary.json").exists():
            print(f"{folder} has not finished (exit code {code}); the same command goes on from here", file=sys.stderr)
            return code or 1
    return 0 if args.dry_run else report(folders, root, recipe)


def report(folders: list[Path], root: Path, recipe: dict) -> int:
    line = [sys.executable, "-m", "eval.report", *map(str, folders), "--out", str(root / "report")]
    return subprocess.call(line + (["--title", recipe["title"]] if "title" in recipe else []))


def side_by_side(script: str, folders: list[Path], flags: list[dict], jobs: int) -> int:
    """Runs what has not finished, ``jobs`` at a time. Returns 0, or the exit code of the first run that failed; those
    beside it go on to their end, and no new one begins. SIGINT and SIGTERM make all of them save and stop."""
    from tqdm import tqdm

    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // jobs, 1)))
    context = multiprocessing.get_context("forkserver")  # imports once: a small run takes little longer than that
    context.set_forkserver_preload([Path(script).stem])
    wanted = [(folder, command(script, folder, f, 1)[2:]) for folder, f in zip(folders, flags, strict=True)
              if not (folder / "summary.json").exists()]  # fmt: skip
    bar = tqdm(total=len(folders), initial=len(folders) - len(wanted), unit="run", dynamic_ncols=True)
    running, failed, stopped = {}, 0, []

    def stop(number, _):
        stopped.append(number)
        for process in running.values():
            if number == signal.SIGTERM:  # a terminal's SIGINT goes to the runs as well
                process.terminate()

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    while running or (wanted and not failed and not stopped):
        while wanted and len(running) < jobs and not failed and not stopped:
            folder, line = wanted.pop(0)
            folder.parent.mkdir(parents=True, exist_ok=True)
            running[folder] = context.Process(target=run_cell, args=(script, line, f"{folder}.log"))
            running[folder].start()
        time.sleep(0.05)
        for folder, process in [(f, p) for f, p in running.items() if p.exitcode is not None]:
            del running[folder]
            if process.exitcode or not (folder / "summary.json").exists():
                bar.write(f"{folder} has not finished (exit code {process.exitcode}), see {folder}.log; the same "
                          "command goes on from here", file=sys.stderr)  # fmt: skip
                failed = failed or process.exitcode or 1
            else:
                bar.update()
                bar.set_postfix_str(folder.name)
    bar.close()
    return failed or bool(stopped)


def run_cell(script: str, line: list[str], log: str) -> None:
    """One run in a process of its own, its output in the file ``log``."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = [script, *line]
    sys.exit(importlib.import_module(Path(script).stem).main(line))


if __name__ == "__main__":
    sys.exit(main())
