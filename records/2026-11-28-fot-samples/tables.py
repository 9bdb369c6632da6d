"""The record's tables: python records/2026-11-28-fot-samples/tables.py [CHOOSE JUDGE], from the root of a checkout.

CHOOSE has TRY/STEPS/RUN of the tries, JUDGE the same of the judged arms; with them runs.csv is made first. The score of
a run is the mean of its NLL on val and test. LoRA's table is of lora.csv.
"""

import csv
import json
import math
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from eval.stats import t_interval  # noqa: E402

HERE = Path(__file__).parent
DIVERGED = math.log(512)


def collect(folders: dict[str, Path]) -> None:
    rows = []
    for part, folder in folders.items():
        for file in sorted(folder.glob("*/*/*/summary.json")):
            config, summary = (json.loads((file.parent / f"{name}.json").read_text()) for name in ("config", "summary"))
            name, schedule = file.parts[-4], config["schedule"]
            arm = schedule if name == "rivals" and schedule != "fot" else "before" if name == "rivals" else name
            ok = not summary["stopped_early"] and summary["val_nll"] and summary["test_nll"]
            row = {"part": part, "arm": arm} | {k: config[k] for k in ("steps", "lr", "seed")}
            row |= {k: summary[k] for k in ("val_nll", "test_nll", "divergences", "train_seconds")}
            row |= {"score": (summary["val_nll"] + summary["test_nll"]) / 2 if ok else DIVERGED}
            rows.append(row | {k: summary.get(f"fot_{k}") for k in ("decisions", "bound", "infeasible")})
    with (HERE / "runs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in r.items()} for r in rows)


def interval(deltas: list[float]) -> str:
    low, high = t_interval(deltas)
    return f"{statistics.fmean(deltas):+.3f} ({low:+.3f} to {high:+.3f})"


def table(rows: list[dict], first: str) -> None:
    """Arms by peaks; regret is to the lowest score of any arm and peak with that seed."""
    seeds, peaks = (sorted({float(r[k]) for r in rows}) for k in ("seed", "lr"))
    score = {(r["arm"], float(r["seed"]), float(r["lr"])): float(r["score"]) for r in rows}
    arms = sorted({r["arm"] for r in rows}, key=lambda arm: (arm != first, arm))
    arms = [arm for arm in arms if all((arm, s, lr) in score for s in seeds for lr in peaks)]
    if first not in arms:
        print("not whole:", len(rows), "runs")
        return
    least = {s: min(score[arm, s, lr] for arm in arms for lr in peaks) for s in seeds}
    regret = {a: [statistics.fmean(score[a, s, lr] for lr in peaks) - least[s] for s in seeds] for a in arms}
    means = {a: [statistics.fmean(score[a, s, lr] for s in seeds) for lr in peaks] for a in arms}
    at = {a: min(range(len(peaks)), key=means[a].__getitem__) for a in arms}
    best = {a: [score[a, s, peaks[at[a]]] for s in seeds] for a in arms}
    for arm in arms:
        sd = statistics.stdev(best[arm]) if len(seeds) > 1 else 0.0
        row = [arm, *(f"{m:.3f}" for m in means[arm]), f"{statistics.fmean(regret[arm]):.3f}"]
        row += [f"{statistics.fmean(best[arm]):.3f} at {peaks[at[arm]]:g}, sd {sd:.3f}"]
        if len(seeds) > 1 and arm != first:
            row += [interval([x - y for x, y in zip(of[first], of[arm], strict=True)]) for of in (regret, best)]
        print("|", " | ".join(row), "|")


def lora() -> None:
    rows = [r for r in csv.DictReader((HERE / "lora.csv").open()) if r["part"] == "judge"]
    arms: dict[tuple, dict] = {}
    for r in rows:
        arms.setdefault((r["schedule"], r["optimizer"]), {})[r["seed"]] = r
    linear, over = arms["linear", "adamw"], arms["fot", "schedule-free"]
    print("\nLoRA, judge: held out and test: mean NLL, less linear's winner, FoT over Schedule-Free less it")
    for arm, own in arms.items():
        cells = []
        for key in ("heldout_nll", "test_nll"):
            values = {seed: float(r[key]) for seed, r in own.items()}
            less = [x - float(linear[seed][key]) for seed, x in values.items()]
            more = [float(over[seed][key]) - x for seed, x in values.items()]
            cells += [f"{statistics.fmean(values.values()):.3f}", interval(less), interval(more)]
        print("|", " | ".join([" over ".join(arm), *cells]), "|")


def main() -> None:
    if len(sys.argv) > 1:
        collect(dict(zip(("choose", "judge"), map(Path, sys.argv[1:]), strict=True)))
    rows = list(csv.DictReader((HERE / "runs.csv").open()))
    for part, first in (("choose", "over_schedule_free"), ("judge", "chosen")):
        for steps in sorted({int(r["steps"]) for r in rows if r["part"] == part}):
            print(f"\n{part}, {steps} steps: arm, mean score by peak, mean regret, best peak, {first} less it in both")
            table([r for r in rows if r["part"] == part and int(r["steps"]) == steps], first)
    lora()


if __name__ == "__main__":
    main()
