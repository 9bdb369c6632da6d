"""Runs a recipe: every cell of a grid of script flags, then the report over all of them.

    python -m recipes.run recipes/demo.toml
    python -m recipes.run recipes/wikitext103.toml --nproc 8 --set steps=1000
    python -m recipes.run recipes/wikitext103.toml --dry-run

A recipe is a TOML file: ``script``, ``out``, a table ``flags`` that all cells share, a table ``grid``
of lists whose product is taken, and optionally ``arm``, an array of tables of flags, each an arm of
its own. Cells that have finished are left alone and cells that were interrupted go on, so the same
command continues a grid.
"""

import argparse
import itertools
import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

from runlog import user_errors


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
        extra = {k.replace("-", "_"): v for k, v in (s.split("=", 1) for s in args.set)}
        todo = cells(recipe, extra)
    root = args.out or Path(recipe["out"])
    folders = [root / name for name, _ in todo]

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
    if args.dry_run:
        return 0
    report = [sys.executable, "-m", "eval.report", *map(str, folders), "--out", str(root / "report")]
    return subprocess.call(report + (["--title", recipe["title"]] if "title" in recipe else []))


if __name__ == "__main__":
    sys.exit(main())
