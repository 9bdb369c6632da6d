"""Runs a recipe: every cell of a grid of script flags, then the report over all of them.

    python -m eval.campaign recipes/demo.toml
    python -m eval.campaign recipes/demo.toml --seeds 1,2,3 --jobs 2      # goes on from the one seed of before
    python -m eval.campaign recipes/wikitext103.toml --nproc 8 --set steps=1000
    python -m eval.campaign recipes/wikitext103.toml --dry-run            # sizes, tokens, FLOPs, hours and memory
    python -m eval.campaign recipes/fot_small.toml --jobs 2               # small runs side by side on one machine
    python -m eval.campaign recipes/lm_scaling.toml --jobs 8 --budget 500 # on 8 GPUs, one a run
    python -m eval.campaign recipes/fot_search.toml --prune forecast
    python -m eval.campaign recipes/fot_study.toml --engine slurm --jobs 16 --sbatch="--gpus=1 --time=4:00:00"

A recipe is checked as a whole before the first run starts. A run that fails is reported with its last lines, and the
others go on. What has finished is left alone and what was interrupted goes on, so the same command continues a grid.
DIR/campaign.json keeps what each run came to and cost. The output of a run is in DIR/RUN.log.
"""

import sys

if "." not in (__package__ or ""):  # a file by its name finds no package
    print("python -m eval.campaign: error: type it like this, in the folder that holds eval/", file=sys.stderr)
    sys.exit(2)

import functools
import os
import subprocess
from pathlib import Path

import torch

from eval.campaign.engines import ENGINES, Local, Ray, submit
from eval.campaign.plan import tell
from eval.campaign.progress import Ledger, Run
from eval.campaign.pruning import RULES, Pruner, kept
from eval.campaign.recipe import alike, check, command_line, load_script, missing
from eval.campaign.run import Campaign, settle
from runtime.cli import Parser, user_errors
from runtime.process import command
from runtime.staging import probe, take_lock
from schedules.commandline import alive


def gpus(device: str) -> list[str]:
    """The ids of the GPUs that --device means: auto all that are visible, cpu none, else those it lists."""
    if device == "cpu":
        return []
    if device != "auto":
        return [name.strip() for name in device.split(",") if name.strip()]
    if "CUDA_VISIBLE_DEVICES" in os.environ and torch.cuda.device_count():
        return os.environ["CUDA_VISIBLE_DEVICES"].split(",")[: torch.cuda.device_count()]
    return [str(number) for number in range(torch.cuda.device_count())]


def parser_of_campaigns() -> Parser:
    parser = Parser(prog="python -m eval.campaign", usage="%(prog)s RECIPE [flags]", description=__doc__)
    add = parser.add_argument
    add("recipe", type=Path)
    add("--out", type=Path, metavar="DIR", help="folder of the runs (default: the recipe's)")
    add(
        "--set",
        action="append",
        default=[],
        metavar="FLAG=VALUE",
        help="override a flag in every cell, and its axis of the grid",
    )
    add("--seeds", default="", metavar="N,N,...", help="these seeds of every cell in the place of the recipe's")
    add("--jobs", type=int, default=1, help="runs side by side (default: 1)")
    add("--nproc", type=int, default=1, help="ranks per run, through torchrun (default: 1)")
    add("--device", default="auto", help="auto, cpu, or ids of GPUs such as 0,1; a run has one (default: auto)")
    add(
        "--dry-run",
        nargs="?",
        const="timed",
        default="",
        choices=("timed", "plan", "commands"),
        help="start nothing: say cells, tokens, FLOPs, memory and, from two measured steps of each size, hours; plan: "
        "without the steps; commands: print the command lines only",
    )
    add("--budget", type=float, metavar="HOURS", help="begin no run that would pass so many hours of runs, of GPUs")
    add("--prune", default="", choices=RULES, help="stop runs that will hardly win; see eval/campaign/pruning.py")
    add("--engine", default="local", choices=ENGINES, help="where the runs are (default: local)")
    add("--sbatch", default="", metavar="ARGS", help="--engine slurm: more arguments of sbatch")
    return parser


def check_flags(args) -> dict[str, str]:
    """What --set says. Raises ValueError for flags of a campaign that do not go together."""
    if bad := [s for s in args.set if "=" not in s]:
        raise ValueError(f"--set {bad[0]}: expected FLAG=VALUE")
    for name in ("jobs", "nproc"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: expected 1 or more")
    if args.jobs > 1 and args.nproc > 1 and args.engine == "local":
        raise ValueError(f"--jobs {args.jobs} with --nproc {args.nproc}: expected one of them to be 1")
    if args.budget is not None and not 0 < args.budget < float("inf"):
        raise ValueError(f"--budget {args.budget}: expected hours, more than 0")
    if args.engine == "slurm" and (args.budget is not None or args.prune):
        raise ValueError("--engine slurm submits all runs at once: --budget and --prune need local or ray")
    if args.sbatch and args.engine != "slurm":
        raise ValueError(f"--sbatch {args.sbatch!r} is read by --engine slurm alone")
    return {k.replace("-", "_"): v for k, v in (s.split("=", 1) for s in args.set)}


def seeds_of(text: str) -> list[int]:
    """The seeds that --seeds means, [] for none. Raises ValueError for what is no list of different whole numbers."""
    if not text:
        return []
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() for word in words) or len({*map(int, words)}) < len(words):
        raise ValueError(f"--seeds {text}: expected different whole numbers, such as 1,2,3")
    return list(map(int, words))


def report(runs: list[Run], root: Path, recipe: dict) -> int:
    """The report over the runs that have logged something; those without are named. Returns its exit code."""
    ready = [run for run in runs if (run.folder / "config.json").exists() and (run.look() or run.step)]
    if left := [run.name for run in runs if run not in ready]:
        print(f"not in the report, as nothing is logged: {', '.join(left)}", file=sys.stderr, flush=True)
    if not any(run.done for run in ready):
        return 0
    title = ["--title", recipe["title"]] if "title" in recipe else []
    folders = [str(run.folder) for run in ready]
    return subprocess.call([sys.executable, "-m", "eval.report", *folders, "--out", str(root / "report"), *title])


@functools.partial(command, speaks=False)  # its table does, and its runs
def main(argv: list[str] | None = None) -> int:
    args = parser_of_campaigns().parse_args(argv)
    with user_errors(), alive():
        extra = check_flags(args)
        devices = gpus(args.device)
        elsewhere = args.engine != "local"  # a cluster's GPUs are not here
        where = args.nproc, "cuda" if devices or elsewhere else "cpu"
        recipe, todo, says = check(args.recipe, extra, *where, seeds=seeds_of(args.seeds))
        script = load_script(recipe["script"])
        root = args.out or Path(recipe["out"])
        if all(cell.config.get("device") == "cpu" for cell in todo):
            devices = []
        if says:
            print(says, file=sys.stderr, flush=True)
        configs = {cell.name: cell for cell in todo}

        def line_of(run) -> list[str]:
            cell = configs[run.name]
            return command_line(recipe["script"], root / cell.name, cell.shared | cell.own, args.nproc)

        if args.dry_run == "commands":
            print(*(" ".join(line_of(cell)) for cell in todo), sep="\n")
            return 0
        if lost := missing(todo):
            raise ValueError(f"{args.recipe}: {lost}")
        if args.dry_run:
            return tell(script, recipe["script"], todo, root, args.nproc, args.jobs, args.dry_run)
        probe(root)
        root.mkdir(parents=True, exist_ok=True)
        take_lock(root)
        runs = {cell.name: Run(cell.name, root / cell.name, cell.config) for cell in todo}
        ledger = Ledger(root, bool(devices), args.budget)
        settle(runs, ledger, bool(args.prune))
        if args.engine == "slurm":
            return cluster(runs, line_of, root, args, recipe, ledger)
        never = kept(recipe, todo)
        if args.prune and len(never) == len(todo):
            print(f"--prune {args.prune}: every run is of an arm that is kept", file=sys.stderr, flush=True)

        def values(*kinds: str):
            found = {cell.name: alike(script, cell, *kinds) for cell in todo}
            return lambda run: found[run.name]

        engine = Ray(args.nproc if devices else 0) if args.engine == "ray" else Local(recipe["script"], args.jobs)
        pruner = Pruner(args.prune, never, values("setting"))
        how = dict(jobs=args.jobs, devices=devices, ranks=args.nproc, size=values("setting", "system"))
        campaign = Campaign(runs, line_of, engine, ledger, pruner, **how)
    code = campaign.run()
    if campaign.stopped:
        return code
    shown = report(list(runs.values()), root, recipe)
    return code or shown


def cluster(runs: dict[str, Run], line_of, root: Path, args, recipe: dict, ledger: Ledger) -> int:
    """Submits what has not finished; where all has, the report."""
    ledger.write(runs)
    lines = {run.folder: line_of(run) for run in runs.values() if run.state == "waiting"}
    if not lines:
        return report(list(runs.values()), root, recipe)
    said = submit(lines, root, args.jobs, args.sbatch)
    print(f"{said}: {len(lines)} of {len(runs)} runs, {root / 'array.sh'}")
    print("the same command submits again what has not finished, and makes the report when all has")
    return 0


if __name__ == "__main__":
    sys.exit(main())
