"""The record's tables: python records/2026-11-27-smollm2-epochs/tables.py [RUNS ...], from the root of a checkout.

With RUNS, folders of runs of finetune_gsm8k.py, runs.csv is made of them first: a row a validation, and one a test.
"""

import csv
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from eval.stats import t_interval  # noqa: E402

HERE = Path(__file__).parent
KEYS = ("nll", "ece10", "brier", "confidence", "accuracy")


def arm_of(config: dict, folder: Path) -> str:
    if config["unigram_gain"]:
        return "driven, damped" if "damped" in folder.as_posix() else "driven"
    return config["loss"]


def collect(folders: list[Path]) -> None:
    rows = []
    for file in sorted(f for folder in folders for f in folder.glob("*/summary.json")):
        config, summary = (json.loads((file.parent / f"{name}.json").read_text()) for name in ("config", "summary"))
        one = {"arm": arm_of(config, file.parent), "seed": config["seed"]}
        for line in (file.parent / "metrics.jsonl").read_text().splitlines():
            row = json.loads(line)
            if row["kind"] == "val":
                best = int(row["step"] == summary["best_step"])
                rows.append(one | {"set": "held out", "step": row["step"], "best": best} | {k: row[k] for k in KEYS})
        test = {k: summary.get(f"test_{k}") for k in KEYS}
        test |= {
            "nll_t": summary["test_nll_t"],
            "ece10_t": summary["test_ece10_t"],
            "temperature": summary["temperature"],
        }
        rows.append(one | {"set": "test", "step": summary["reported_step"], "best": 1} | test)
    with (HERE / "runs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(k for row in rows for k in row)))
        writer.writeheader()
        writer.writerows({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in r.items()} for r in rows)


def scratch() -> None:
    rows = list(csv.DictReader((HERE / "scratch.csv").open()))
    for key in ("test_nll", "test_ece10", "last_val_nll", "last_val_ece10", "ood_ece10"):
        old, new = ({r["seed"]: float(r[key]) for r in rows if r["rule"] == rule} for rule in ("undamped", "damped"))
        deltas = [new[seed] - old[seed] for seed in old]
        low, high = t_interval(deltas)
        means = f"{statistics.fmean(old.values()):.5f} {statistics.fmean(new.values()):.5f}"
        print(f"from scratch, {key}: {means} {statistics.fmean(deltas):+.5f} ({low:+.5f} to {high:+.5f})")


def main() -> None:
    if len(sys.argv) > 1:
        collect([Path(p) for p in sys.argv[1:]])
    rows = list(csv.DictReader((HERE / "runs.csv").open()))
    for arm, seed in sorted({(r["arm"], r["seed"]) for r in rows}):
        own = [r for r in rows if (r["arm"], r["seed"]) == (arm, seed)]
        vals, (test,) = [r for r in own if r["set"] == "held out"], [r for r in own if r["set"] == "test"]
        (best,), last = [r for r in vals if r["best"] == "1"], vals[-1]
        shown = [best["step"], *(f"{float(r['nll']):.4f}, {100 * float(r['ece10']):.2f}" for r in (best, test, last))]
        gaps = [100 * (float(r["confidence"]) - float(r["accuracy"])) for r in vals]
        late = statistics.fmean(abs(g) for g, r in zip(gaps, vals, strict=True) if int(r["step"]) >= 96)
        after = f"{float(test['nll_t']):.4f}, {100 * float(test['ece10_t']):.2f}"
        print(f"| {arm} | {seed} | {' | '.join(shown)} | {after} | {late:.1f} |")
        print("   confidence less accuracy, points:", " ".join(f"{g:+.1f}" for g in gaps))
    scratch()


if __name__ == "__main__":
    main()
