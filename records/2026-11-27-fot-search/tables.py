"""The record's tables: python records/2026-11-27-fot-search/tables.py [RUNS], from the root of a checkout.

With RUNS, the folder of the five folders of runs, runs.csv is made of it first.
"""

import csv
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from eval.stats import t_interval  # noqa: E402

HERE = Path(__file__).parent
SETTING, FIGURES = ("lr", "fot_window", "beta2", "seed"), ("val_nll", "test_nll", "fot_decisions", "fot_bound")


def collect(runs: Path) -> None:
    rows = []
    for path in sorted(runs.glob("*/*/summary.json")):
        summary, config = (json.loads((path.parent / f"{name}.json").read_text()) for name in ("summary", "config"))
        row = {"grid": path.parent.parent.name} | {k: config[k] for k in SETTING}
        rows.append(row | {k: summary.get(k) for k in FIGURES} | {"divergences": summary["divergences"]})
    with (HERE / "runs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in r.items()} for r in rows)


def mean(rows: list[dict], name: str = "val_nll") -> float:
    return statistics.fmean(float(r[name]) for r in rows)


def main() -> None:
    if len(sys.argv) > 1:
        collect(Path(sys.argv[1]))
    rows = list(csv.DictReader((HERE / "runs.csv").open()))
    grids: dict[str, list[dict]] = {}
    for row in rows:
        grids.setdefault(row["grid"], []).append(row)
    for name in ("search", "linear"):
        cells = sorted(grids[name], key=lambda r: float(r["val_nll"]))
        print(f"\n{name}: {len(cells)} runs, held-out NLL {cells[0]['val_nll']} to {cells[-1]['val_nll']}")
        for field in SETTING[:3] if name == "search" else ("lr", "beta2"):
            means = {v: mean([r for r in cells if r[field] == v]) for v in sorted({r[field] for r in cells}, key=float)}
            spread = max(means.values()) - min(means.values())
            print(f"| {field} | " + ", ".join(f"{v}: {m:.4f}" for v, m in means.items()) + f" | {spread:.4f} |")
        best = cells[0]
        print("lowest: " + ", ".join(f"{k} {best[k]}" for k in (*SETTING[:3], "val_nll", "test_nll")))
    at_default = mean([r for r in grids["search"] if float(r["lr"]) == 4e-3])
    print(f"the mean of the search's cells at 4e-3: {at_default:.4f}")
    judged = {n: sorted(grids.get(n, []), key=lambda r: int(r["seed"])) for n in ("winner", "default", "best-linear")}
    for name, runs in judged.items():
        if runs:
            print(f"| {name} | {mean(runs):.4f} | {mean(runs, 'test_nll'):.4f} | {[r['val_nll'] for r in runs]} |")
    for other in ("default", "best-linear"):
        for figure in ("val_nll", "test_nll"):
            pairs = zip(judged["winner"], judged[other], strict=True)
            deltas = [float(a[figure]) - float(b[figure]) for a, b in pairs]
            low, high = t_interval(deltas)
            print(f"winner less {other}, {figure}: {statistics.fmean(deltas):+.4f} ({low:+.4f} to {high:+.4f})")
    print("divergences", {n: sum(int(r["divergences"] or 0) for r in g) for n, g in grids.items()})


if __name__ == "__main__":
    main()
