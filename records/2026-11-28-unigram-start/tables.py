"""The record's table: python records/2026-11-28-unigram-start/tables.py [RUNS], from the root of a checkout.

With RUNS, which has unigram_start/, arms/ and verdict/, runs.csv is made of it first: a row a run, those of other
records that it is paired with too.
"""

import csv
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from eval.stats import t_interval  # noqa: E402

HERE = Path(__file__).parent
KEYS = ("test_nll", "test_ece10", "test_brier", "test_nll_t", "test_ece10_t", "ood_nll")
ARMS = {"CE": "ce{}-seed{}", "smoothing": "smoothing-eps0.1{}-seed{}", "driven from 0": "ce-unigram0.4-{}{}-seed{}"}
PARTS = {
    "sixteenth": ("arms/low/sixteenth", range(11, 14)),
    "quarter": ("arms/low/quarter", range(11, 14)),
    "whole": ("arms/seeds", range(14, 19)),
    "one-pass": ("verdict/one_pass", range(11, 14)),
}


def collect(root: Path) -> None:
    rows = []
    for part, (others, seeds) in PARTS.items():
        for seed in seeds:
            gain, lr = ("gap_gain3.0", "-lr0.003") if part == "one-pass" else ("unigram_gain3.0", "")
            found = {"driven from 0.1": root / f"unigram_start/{part}/seed{seed}"}
            for arm, name in ARMS.items():
                rest = (gain, lr, seed) if arm.startswith("driven") else (lr, seed)
                found[arm] = root / others / name.format(*rest)
            for arm, folder in found.items():
                if not (folder / "summary.json").exists():
                    continue
                summary = json.loads((folder / "summary.json").read_text())
                row = {"part": part, "arm": arm, "seed": seed, "best_step": summary["reported_step"]}
                rows.append(row | {k: f"{summary[k]:.6g}" for k in KEYS})
    with (HERE / "runs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    if len(sys.argv) > 1:
        collect(Path(sys.argv[1]))
    rows = list(csv.DictReader((HERE / "runs.csv").open()))
    for part in PARTS:
        mine = {r["seed"]: r for r in rows if (r["part"], r["arm"]) == (part, "driven from 0.1")}
        print(f"\n{part}, {len(mine)} seeds: mean of the driven share from 0.1; it less each other, 95 % interval")
        for key in KEYS:
            line = [f"{statistics.fmean(float(r[key]) for r in mine.values()):.4f}"]
            for arm in ARMS:
                other = {r["seed"]: float(r[key]) for r in rows if (r["part"], r["arm"]) == (part, arm)}
                deltas = [float(r[key]) - other[seed] for seed, r in mine.items()]
                low, high = t_interval(deltas)
                line.append(f"{arm} {statistics.fmean(deltas):+.4f} ({low:+.4f} to {high:+.4f})")
            print(f"  {key}: " + "; ".join(line))


if __name__ == "__main__":
    main()
