"""Reads run folders and writes runs.csv, a row a run: python runs.py OUT.csv FOLDER... (a folder of runs each).

"best" is the checkpoint with the lowest validation NLL, "last" the end of the run; "_t" is after a temperature that was
fitted on the validation set at the best checkpoint.
"""

import csv
import json
import sys
from pathlib import Path

ARM = ("loss", "path", "order", "warmup", "alpha_schedule", "alpha_start", "alpha_max", "uniform", "gap_gain", "eps")
SETTING = ("model", "dropout", "lr", "steps", "seed")
FINAL = ("nll", "ece10", "ece10_mass", "brier", "accuracy", "nll_t", "ece10_t", "brier_t")


def row(folder: Path) -> dict:
    config, summary = (json.loads((folder / f"{name}.json").read_text()) for name in ("config", "summary"))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    val = [r for r in lines if r["kind"] == "val"]
    best, last = min(val, key=lambda r: r["nll"]), val[-1]
    found = {"grid": folder.parent.name, "run": folder.name}
    found |= {name: config.get(name) for name in (*ARM, *SETTING)}
    for name, at in (("best", best), ("last", last)):
        found |= {f"{name}_step": at["step"]} | {f"{name}_{key}": at[key] for key in ("nll", "ece10", "brier")}
    for part in ("val", "test", "ood"):
        found |= {f"{part}_{key}": summary.get(f"{part}_{key}") for key in FINAL}
    target = best["nll"] / 0.95  # the NLL at which 95 % of its own final is reached
    found["step_95"] = next(r["step"] for r in val if r["nll"] <= target)
    return found | {k: summary[k] for k in ("temperature", "clip_rate", "divergences", "train_seconds")}


def main(out: str, *folders: str) -> None:
    runs = sorted(path.parent for folder in folders for path in Path(folder).glob("*/summary.json"))
    table = [row(folder) for folder in runs]
    with open(out, "w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in r.items()} for r in table)
    print(f"{out}: {len(table)} runs")


if __name__ == "__main__":
    main(*sys.argv[1:])
