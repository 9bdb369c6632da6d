"""The record's tables: python records/2026-11-28-fot-sizes/tables.py [RUNS], from the root of a checkout.

With RUNS, which has mini/STEPS/RUN and smollm2/STEPS/RUN, runs.csv is made of it first. The score of a run is the mean
of its NLL on the held-out set and on the test set.
"""

import csv
import json
import math
import runpy
import sys
from pathlib import Path

HERE = Path(__file__).parent
DIVERGED = math.log(512)  # of mini's vocabulary
table = runpy.run_path(str(HERE.parent / "2026-11-28-fot-samples" / "tables.py"))["table"]


def collect(files, out: Path, about) -> None:
    """A row of ``out`` for each of the summary.json ``files``; ``about`` (file, config): its part and arm."""
    rows = []
    for file in sorted(files):
        config, summary = (json.loads((file.parent / f"{name}.json").read_text()) for name in ("config", "summary"))
        row = about(file, config) | {k: config[k] for k in ("steps", "lr", "seed")}
        held_out, test = (summary.get(name) for name in ("val_nll", "test_nll"))
        ok = not summary["stopped_early"] and held_out and test
        row |= {"held_out_nll": held_out, "test_nll": test, "score": (held_out + test) / 2 if ok else DIVERGED}
        rows.append(row | {k: summary.get(k) for k in ("divergences", "fot_decisions", "fot_bound", "fot_infeasible")})
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in r.items()} for r in rows)


def arm_of(file: Path, config: dict) -> dict:
    over = " over schedule-free" * (config["schedule"] == "fot" and config["optimizer"] == "schedule-free")
    return {"part": file.parts[-4], "arm": config["schedule"] + over}


def main() -> None:
    if len(sys.argv) > 1:
        collect(Path(sys.argv[1]).glob("*/*/*/summary.json"), HERE / "runs.csv", arm_of)
    rows = list(csv.DictReader((HERE / "runs.csv").open()))
    for part, first, whole in (("mini", "fot over schedule-free", 20), ("smollm2", "fot", 9)):
        for steps in sorted({int(r["steps"]) for r in rows if r["part"] == part}):
            cell = [r for r in rows if r["part"] == part and int(r["steps"]) == steps]
            seeds = sorted({r["seed"] for r in cell if sum(o["seed"] == r["seed"] for o in cell) == whole})
            print(
                f"\n{part}, {steps} steps, seeds {', '.join(seeds) or 'none that is whole'}: arm, mean score by rate,"
            )
            print(f"mean regret, best rate; of several seeds {first} less it, in regret and at the best of each")
            if seeds:
                table([r for r in cell if r["seed"] in seeds], first)
            mine = [r for r in cell if r["arm"].startswith("fot")]
            total = {k: sum(int(r[f"fot_{k}"] or 0) for r in mine) for k in ("decisions", "bound", "infeasible")}
            print(f"FoT's decisions: {total}; divergences of all arms: {sum(int(r['divergences'] or 0) for r in cell)}")


if __name__ == "__main__":
    main()
