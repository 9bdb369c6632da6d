"""Reads run folders, and writes runs.csv, a row a run, and curves.csv, a row a validation, into OUT:
python runs.py OUT FOLDER... (a folder of runs each).

"best" is the checkpoint with the lowest validation NLL, "last" the end of the run; "_t" is after a temperature that was
fitted on the validation set at the best checkpoint.
"""

import csv
import json
import sys
from pathlib import Path

ARM = (
    "loss",
    "path",
    "order",
    "warmup",
    "alpha_schedule",
    "alpha_start",
    "alpha_max",
    "uniform",
    "unigram",
    "gap_gain",
    "eps",
    "tail_average",
)
SETTING = ("model", "dropout", "lr", "steps", "seed")
FINAL = ("nll", "ece10", "ece10_mass", "brier", "accuracy", "nll_t", "ece10_t", "brier_t")


def read(folder: Path) -> tuple[dict, list[dict]]:
    config, summary = (json.loads((folder / f"{name}.json").read_text()) for name in ("config", "summary"))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    val = [r for r in lines if r["kind"] == "val"]
    best, last = min(val, key=lambda r: r["nll"]), val[-1]
    found = {"grid": folder.parent.name, "run": folder.name}
    config.setdefault("gap_gain", config.get("unigram_gain"))  # its name in the package
    found |= {name: config.get(name) for name in (*ARM, *SETTING)}
    for name, at in (("best", best), ("last", last)):
        found |= {f"{name}_step": at["step"]} | {f"{name}_{key}": at[key] for key in ("nll", "ece10", "brier")}
    for part in ("val", "test", "ood"):
        found |= {f"{part}_{key}": summary.get(f"{part}_{key}") for key in FINAL}
    found |= {k: summary[k] for k in ("temperature", "clip_rate", "divergences", "train_seconds")}
    curve = [{k: r[k] for k in ("step", "nll", "ece10", "brier", "confidence", "accuracy")} for r in val]
    return found, [{"grid": folder.parent.name, "run": folder.name} | r for r in curve]


def write(path: Path, table: list[dict]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in r.items()} for r in table)
    print(f"{path}: {len(table)} rows")


def main(out: str, *folders: str) -> None:
    runs = [read(path.parent) for folder in folders for path in sorted(Path(folder).glob("*/summary.json"))]
    write(Path(out) / "runs.csv", [row for row, _ in runs])
    write(Path(out) / "curves.csv", [row for _, curve in runs for row in curve])


if __name__ == "__main__":
    main(*sys.argv[1:])
