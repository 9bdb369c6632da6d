"""Two variants of this tree beside each other: as it is here, and with a patch. Of each figure of races.probes the
median ratio.

    python -m races.ab records/2026-11-27-device-predictions/as_measured.patch --only ties,passes
    python -m races.ab variant.patch --only memory --rounds 5 --out ab.csv

The patched tree is a copy in a temporary folder. Both take turns, a process each, and who begins changes with the
round. A turn that fails has its reason in the CSV, which is whole after every turn.
"""

import sys

if not __package__:  # a file by its name finds no package
    print("python -m races.ab: error: type it like this, in the folder that holds races/", file=sys.stderr)
    sys.exit(2)

import json
import shutil
import statistics
import subprocess
import tempfile
from pathlib import Path

import torch

from races.common import (
    Turns,
    add_limits,
    check_least,
    chosen,
    command,
    here_and_now,
    median_ratio,
    output_of,
    race_parser,
)
from races.probes import PROBES
from runtime.cli import user_errors
from schedules.commandline import alive

ROOT = Path(__file__).resolve().parents[1]
SIDES = ("here", "patched")
LEFT_OUT = shutil.ignore_patterns(".*", "runs", "cache", "records", "tests", "__pycache__", "*.egg-info")


def patched(patch: Path, folder: Path) -> Path:
    """A copy of this tree in the new ``folder``, patched. Raises ValueError where the patch does not fit."""
    shutil.copytree(ROOT, folder, ignore=LEFT_OUT)
    line = ["git", "apply", "--exclude=records/*", "--exclude=tests/*", str(patch.resolve())]
    ran = subprocess.run(line, cwd=folder, capture_output=True, text=True)
    if ran.returncode:
        raise ValueError(f"{patch} does not fit this tree: {' '.join(ran.stderr.split())}")
    return folder


def figures(tree: Path, device: str, only: str) -> dict[str, float]:
    """{probe and case: value} of races.probes in ``tree``. Raises ValueError where a probe fails."""
    printed = output_of(command("-m", "races.probes", device=device, only=only), f"races.probes in {tree}", cwd=tree)
    rows = [json.loads(line) for line in printed.splitlines()]
    return {f"{row['probe']}: {row['case']}, {row['unit']}": row["value"] for row in rows}


def report(turns: list[dict]) -> list[str]:
    """A line a figure: both medians, and the median over rounds of the patched one's by the other's."""
    lines = []
    for case in dict.fromkeys(key for row in turns for key in row if key not in ("round", "side", "failed")):
        ratio = median_ratio(turns, case, "patched", "here")
        if ratio is not None:
            both = (statistics.median(r[case] for r in turns if r["side"] == s and case in r) for s in SIDES)
            lines.append("{}: {:.4g} here, {:.4g} patched, {:.3f} x".format(case, *both, ratio))
    return lines


@alive()
def main(argv: list[str] | None = None) -> int:
    parser = race_parser("ab", __doc__)
    parser.add_argument("patch", type=Path, help="as git diff writes it, from the root of the tree")
    parser.add_argument("--out", type=Path, default=Path("runs/ab.csv"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add_limits(parser, PROBES)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="scorecast-") as folder:
        with user_errors():
            check_least(args, rounds=1, rows=0, seconds=0)
            only = ",".join(chosen(args.only, PROBES)) if args.only else ""
            if not only:
                raise ValueError(f"--only: expected some of {', '.join(PROBES)}, separated by commas")
            if not args.patch.is_file():
                raise ValueError(f"{args.patch}: there is no such file")
            trees = {"here": ROOT, "patched": patched(args.patch, Path(folder) / "tree")}
        turns = Turns(args.out, here_and_now(torch.device(args.device)), args.seconds, args.rows)
        for i in range(args.rounds):
            for side in SIDES if i % 2 == 0 else SIDES[::-1]:
                turns.take(dict(round=i, side=side), lambda side=side: figures(trees[side], args.device, only))
                print(f"round {i + 1}, {side}: done", flush=True)
    print("\n".join(report(turns)))
    return turns.ended()


if __name__ == "__main__":
    sys.exit(main())
