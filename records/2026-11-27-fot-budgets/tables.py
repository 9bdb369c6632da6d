"""The record's tables: python records/2026-11-27-fot-budgets/tables.py [RUNS], from the root of a checkout.

With RUNS, a folder with a folder of runs for each budget, runs.csv is made of it first.
"""

import csv
import json
import math
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from eval.report.forecasts import WIDE, grade  # noqa: E402
from eval.report.runs import load_run  # noqa: E402
from eval.stats import t_interval  # noqa: E402

HERE = Path(__file__).parent
ARMS = ("fot", "linear", "wsd", "schedule-free")
DIVERGED = math.log(512)


def collect(runs: Path) -> None:
    rows = []
    for file in sorted(runs.glob("*/*/summary.json")):
        config, summary = (json.loads((file.parent / f"{name}.json").read_text()) for name in ("config", "summary"))
        ok = not summary["stopped_early"] and summary["val_nll"] and summary["test_nll"]
        row = {k: config[k] for k in ("steps", "schedule", "lr", "seed")}
        row |= {k: summary[k] for k in ("val_nll", "test_nll", "stopped_early", "divergences", "train_seconds")}
        row |= {"score": (summary["val_nll"] + summary["test_nll"]) / 2 if ok else DIVERGED}
        row |= {k: summary.get(f"fot_{k}") for k in ("decisions", "bound", "infeasible")}
        for g in grade(load_run(file.parent)) if config["schedule"] == "fot" else ():
            if g.mean is not None:
                row |= {f"error_{g.fraction:g}": g.error, f"in68_{g.fraction:g}": int(g.inside(1.0))}
                row |= {f"in95_{g.fraction:g}": int(g.inside(WIDE))}
        rows.append(row)
    names = list(dict.fromkeys(k for row in rows for k in row))
    with (HERE / "runs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in r.items()} for r in rows)


def interval(deltas: list[float]) -> str:
    low, high = t_interval(deltas)
    return f"{statistics.fmean(deltas):+.3f} ({low:+.3f} to {high:+.3f})"


def best_of(scores: dict, arm: str) -> tuple[float, list[float]]:
    """(peak, its scores by seed) with the lowest mean."""
    return min(((lr, by_seed) for (a, lr), by_seed in scores.items() if a == arm), key=lambda x: statistics.fmean(x[1]))


def main() -> None:
    if len(sys.argv) > 1:
        collect(Path(sys.argv[1]))
    rows = list(csv.DictReader((HERE / "runs.csv").open()))
    budgets = {}
    for steps in sorted({int(r["steps"]) for r in rows}):
        mine = sorted((r for r in rows if int(r["steps"]) == steps), key=lambda r: int(r["seed"]))
        scores: dict = {}
        for r in mine:
            scores.setdefault((r["schedule"], float(r["lr"])), []).append(float(r["score"]))
        if len({len(v) for v in scores.values()}) > 1:
            print(f"\n{steps} steps: not whole, {len(mine)} runs")
            continue
        budgets[steps] = scores
        peaks = sorted({lr for _, lr in scores})
        lowest = [min(v[i] for v in scores.values()) for i in range(3)]
        print(f"\n| {steps} steps: mean score | " + " | ".join(f"{lr:g}" for lr in peaks), end="")
        print(" | mean regret | FoT's less it (95 %) | at its best peak | FoT's less it (95 %) |")
        print("|---" * (len(peaks) + 5) + "|")
        regrets = {a: [statistics.fmean(scores[a, lr][i] - lowest[i] for lr in peaks) for i in range(3)] for a in ARMS}
        for arm in ARMS:
            lr, at_best = best_of(scores, arm)
            cells = [f"{statistics.fmean(scores[arm, p]):.3f}" for p in peaks] + [
                f"{statistics.fmean(regrets[arm]):.3f}"
            ]
            own = best_of(scores, "fot")[1]
            cells += [
                "" if arm == "fot" else interval([f - r for f, r in zip(regrets["fot"], regrets[arm], strict=True)])
            ]
            cells += [f"{statistics.fmean(at_best):.3f} at {lr:g}"]
            cells += ["" if arm == "fot" else interval([f - r for f, r in zip(own, at_best, strict=True)])]
            print(f"| {arm} | " + " | ".join(cells) + " |")
        fot = [r for r in mine if r["schedule"] == "fot"]
        for at in ("0.1", "0.25", "0.5", "0.75"):
            made = [r for r in fot if r.get(f"error_{at}")]
            if made:
                error = statistics.median(abs(float(r[f"error_{at}"])) for r in made)
                inside = [100 * statistics.fmean(int(r[f"{w}_{at}"]) for r in made) for w in ("in68", "in95")]
                print(f"forecasts from {at}: {len(made)} of {len(fot)}, {error:.2f} % off in the median, ", end="")
                print(f"{inside[0]:.0f} % inside 68 %, {inside[1]:.0f} % inside 95 %")
        decisions, bound, bad = (sum(int(r[k]) for r in fot) for k in ("decisions", "bound", "infeasible"))
        gone = {a: sum(bool(r["stopped_early"]) for r in mine if r["schedule"] == a) for a in ARMS}
        print(f"decisions {decisions}, at a bound {bound}, infeasible {bad}; ended early: {gone}")
    if 600 not in budgets:
        return
    at_600 = {arm: best_of(budgets[600], arm)[1] for arm in ARMS}
    target = statistics.fmean(at_600["linear"])
    sd = math.sqrt(statistics.fmean(statistics.variance(v) for v in at_600.values()))
    print(f"\nsteps to a score of {target:.3f}; a run's sd {sd:.4f}")
    for arm in ARMS:
        means = {k: statistics.fmean(best_of(s, arm)[1]) for k, s in budgets.items()}
        passed = [k for k, m in means.items() if (target - m) * math.sqrt(3) >= 3.1 * sd]
        ends = sorted(means.items())
        cross = next(
            (
                math.exp(math.log(a) + (x - target) / (x - y) * math.log(b / a))
                for (a, x), (b, y) in zip(ends, ends[1:], strict=False)
                if x > target >= y
            ),
            None,
        )
        print(f"| {arm} | {passed[0] if passed else '-'} | {'-' if cross is None else round(cross)} |")


if __name__ == "__main__":
    main()
