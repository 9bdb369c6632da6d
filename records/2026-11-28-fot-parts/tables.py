"""The record's tables: python records/2026-11-28-fot-parts/tables.py [RUNS], from the root of a checkout.

With RUNS, which has pico/RUN and lora/RUN, runs.csv is made of it first. The score of a run is the mean of its NLL on
the held-out set and on the test set.
"""

import csv
import json
import math
import runpy
import sys
from pathlib import Path

HERE = Path(__file__).parent
DIVERGED = math.log(512)
ALL = {"pico": "fot", "lora": "envelope,noise,forecast,gate,blocks"}
table = runpy.run_path(str(HERE.parent / "2026-11-28-fot-samples" / "tables.py"))["table"]


def collect(runs: Path) -> None:
    rows = []
    for file in sorted(runs.glob("*/*/summary.json")):
        config, summary = (json.loads((file.parent / f"{name}.json").read_text()) for name in ("config", "summary"))
        part = file.parts[-3]
        plain = config["schedule"] != "fot" or (
            part == "pico" and f"fot_parts{config['fot_parts']}" not in file.parts[-2]
        )
        row = {"part": part, "arm": config["schedule"] if plain else config["fot_parts"]}
        row |= {k: config[k] for k in ("steps", "lr", "seed")} | {k: summary[k] for k in ("val_nll", "test_nll")}
        ok = not summary["stopped_early"] and summary["val_nll"] and summary["test_nll"]
        row |= {"score": (summary["val_nll"] + summary["test_nll"]) / 2 if ok else DIVERGED}
        rows.append(row | {k: summary.get(k) for k in ("divergences", "fot_decisions", "fot_bound", "fot_infeasible")})
    with (HERE / "runs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in r.items()} for r in rows)


def main() -> None:
    if len(sys.argv) > 1:
        collect(Path(sys.argv[1]))
    rows = list(csv.DictReader((HERE / "runs.csv").open()))
    for part, first in ALL.items():
        print(f"\n{part}: arm, mean score by rate, mean regret, best rate; {first} less it in both")
        table([r for r in rows if r["part"] == part], first)


if __name__ == "__main__":
    main()
