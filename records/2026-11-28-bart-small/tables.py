"""The record's tables: python records/2026-11-28-bart-small/tables.py [RUNS], from the root of a checkout.

With RUNS, the folder with tune/LR/RUN and judge/RUN, runs.csv is made of it first: a row a run.
"""

import csv
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from eval.stats import t_interval  # noqa: E402

HERE = Path(__file__).parent
SEEN = ("nll", "ece10", "brier", "nll_t", "ece10_t", "brier_t", "rouge1", "rougeL")
ARMS = ("ce", "smoothing", "driven", "dpsm", "brier")


def arm_of(config: dict) -> str:
    if config["unigram_gain"]:
        return "driven"
    return "smoothing" if config["label_smoothing"] else config["loss"]


def collect(root: Path) -> None:
    rows = []
    for file in sorted(root.rglob("summary.json")):
        config, summary = (json.loads((file.parent / f"{name}.json").read_text()) for name in ("config", "summary"))
        row = {"part": file.relative_to(root).parts[0], "arm": arm_of(config), "lr": config["lr"]}
        row |= {"noise": config["noise_references"], "seed": config["seed"], "step": summary["reported_step"]}
        row |= {"val_nll": summary["val_nll"]} | {f"test_{k}": summary.get(f"test_{k}") for k in SEEN}
        row |= {f"ood_{k}": summary.get(f"ood_{k}") for k in ("nll", "ece10", "rouge1")}
        rows.append(row)
    with (HERE / "runs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in r.items()} for r in rows)


def mean(rows: list[dict], key: str) -> str:
    return f"{statistics.fmean(float(r[key]) for r in rows):.4g}"


def less(rows: dict, arm: str, key: str, noise: str) -> str:
    """What ``arm`` has more than CE in ``key``, over seeds, with Student's interval where there are two or more."""
    mine = {seed: r for (a, n, seed), r in rows.items() if (a, n) == (arm, noise)}
    deltas = [float(r[key]) - float(rows["ce", noise, seed][key]) for seed, r in mine.items()]
    if len(deltas) < 2:
        return f"{deltas[0]:+.3f}" if deltas else "-"
    low, high = t_interval(deltas)
    return f"{statistics.fmean(deltas):+.3f} ({low:+.3f} to {high:+.3f})"


def main() -> None:
    if len(sys.argv) > 1:
        collect(Path(sys.argv[1]))
    every = list(csv.DictReader((HERE / "runs.csv").open()))
    print("tune, seed 0: validation NLL by learning rate")
    for arm in ARMS:
        found = {r["lr"]: r["val_nll"] for r in every if r["part"] == "tune" and r["arm"] == arm}
        print(f"  {arm}: {found}")
    rows = {(r["arm"], r["noise"], r["seed"]): r for r in every if r["part"] == "judge"}
    for noise in sorted({n for _, n, _ in rows}):
        print(f"\nswapped references {noise}: arm, seeds, then the mean of each")
        print("  " + ", ".join(f"test_{k}" for k in SEEN) + ", ood_nll, ood_ece10, ood_rouge1")
        for arm in ARMS:
            mine = [r for (a, n, _), r in rows.items() if (a, n) == (arm, noise)]
            if mine:
                keys = [f"test_{k}" for k in SEEN] + ["ood_nll", "ood_ece10", "ood_rouge1"]
                print(f"  {arm} ({len(mine)}): " + ", ".join(mean(mine, k) for k in keys))
        for key in ("test_nll", "test_ece10", "test_brier", "test_rougeL"):
            print(f"  more than CE in {key}: " + "; ".join(f"{arm} {less(rows, arm, key, noise)}" for arm in ARMS[1:]))
    print("\nwhat swapped references cost, mean over seeds: test_nll, test_rougeL")
    for arm in ARMS:
        seeds = {s for a, n, s in rows if a == arm and {(arm, "0", s), (arm, "0.15", s)} <= rows.keys()}
        cost = [
            statistics.fmean(float(rows[arm, "0.15", s][k]) - float(rows[arm, "0", s][k]) for s in seeds)
            for k in ("test_nll", "test_rougeL")
            if seeds
        ]
        print(f"  {arm} ({len(seeds)}): " + ", ".join(f"{c:+.4f}" for c in cost))


if __name__ == "__main__":
    main()
