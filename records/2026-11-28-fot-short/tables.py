"""The record's tables: python records/2026-11-28-fot-short/tables.py [RUNS], from the root of a checkout.

With RUNS, which has TRY/PART/RUN of the tries, before/smollm2/RUN and rivals/SCHEDULE/RUN, runs.csv is made of it
first. Runs of FoT as it is that ../2026-11-28-fot-sizes has are read there. The score of a run is the mean of its NLL
on the held-out set and on the test set.
"""

import csv
import runpy
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).parent
SIZES = HERE.parent / "2026-11-28-fot-sizes"
TRIES = {"always": "(a)", "measured": "(b)", "finite": "(c)"}
CELLS = (("smollm2", "32", "61"), ("mini", "150", "51"), ("smollm2", "32", "62"), ("mini", "150", "52"))
sizes = runpy.run_path(str(SIZES / "tables.py"))


def arm_of(file: Path, config: dict) -> dict:
    name = config["schedule"] + " over schedule-free" * (config["optimizer"] == "schedule-free")
    label = TRIES.get(file.parts[-4], "")
    return {"part": "mini" if config.get("model") == "mini" else "smollm2", "arm": f"{name} {label}".strip()}


def main() -> None:
    if len(sys.argv) > 1:
        sizes["collect"](Path(sys.argv[1]).glob("*/*/*/summary.json"), HERE / "runs.csv", arm_of)
    rows = [r for folder in (HERE, SIZES) for r in csv.DictReader((folder / "runs.csv").open())]
    for cell in CELLS:
        mine = [r for r in rows if (r["part"], r["steps"], r["seed"]) == cell]
        rates = sorted({float(r["lr"]) for r in mine})
        print(f"\n{cell[0]}, {cell[1]} steps, seed {cell[2]}: score at {', '.join(f'{lr:g}' for lr in rates)}; mean")
        for arm in sorted({r["arm"] for r in mine}):
            score = {float(r["lr"]): float(r["score"]) for r in mine if r["arm"] == arm}
            whole = f"{statistics.fmean(score.values()):.3f}" if len(score) == len(rates) else "not whole"
            print(f"{arm:28}", *(f"{score[lr]:.3f}" if lr in score else "    -" for lr in rates), " ", whole)
        print("divergences:", sum(int(r["divergences"] or 0) for r in mine))


if __name__ == "__main__":
    main()
