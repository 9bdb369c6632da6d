"""The record's tables: python records/2026-11-28-fot-short/tables.py [RUNS], from the root of a checkout.

With RUNS, which has TRY/PART/RUN of the tries, before/smollm2/RUN and rivals/SCHEDULE/RUN, runs.csv is made of it
first. Runs of FoT as it was that ../2026-11-28-fot-sizes and fot-parts have are read there. The score of a run is the
mean of its NLL on the held-out set and on the test set.
"""

import csv
import runpy
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).parent
SIZES, PARTS = HERE.parent / "2026-11-28-fot-sizes", HERE.parent / "2026-11-28-fot-parts"
TRIES = {"always": "(a)", "measured": "(b)", "finite": "(c)"}
CELLS = (
    ("smollm2", "32", ["61"]),
    ("mini", "150", ["51"]),
    ("smollm2", "32", ["62"]),
    ("mini", "150", ["52"]),
    ("lora", "200", ["71", "72", "73"]),
)
sizes = runpy.run_path(str(SIZES / "tables.py"))


def arm_of(file: Path, config: dict) -> dict:
    name = config["schedule"] + " over schedule-free" * (config["optimizer"] == "schedule-free")
    part = file.parts[-3] if file.parts[-3] in ("mini", "lora") else "smollm2"
    return {"part": part, "arm": f"{name} {TRIES.get(file.parts[-4], '')}".strip()}


def main() -> None:
    if len(sys.argv) > 1:
        sizes["collect"](Path(sys.argv[1]).glob("*/*/*/summary.json"), HERE / "runs.csv", arm_of)
    rows = [r for folder in (HERE, SIZES, PARTS) for r in csv.DictReader((folder / "runs.csv").open())]
    rows = [r | {"arm": "fot"} if r["arm"] == "envelope,noise,forecast,gate,blocks" else r for r in rows]
    rows = [r for r in rows if r["arm"].startswith(("fot", "linear", "schedule-free", "wsd"))]
    for part, steps, seeds in CELLS:
        mine = [r for r in rows if r["part"] == part and r["steps"] == steps and r["seed"] in seeds]
        rates = sorted({float(r["lr"]) for r in mine})
        print(f"\n{part}, {steps} steps, seed {', '.join(seeds)}: mean score at {', '.join(map(str, rates))}; of all")
        for arm in sorted({r["arm"] for r in mine}):
            scores = [[float(r["score"]) for r in mine if (r["arm"], float(r["lr"])) == (arm, lr)] for lr in rates]
            whole = all(len(of_rate) == len(seeds) for of_rate in scores)
            means = [statistics.fmean(of_rate) for of_rate in scores if of_rate]
            over_all = f"{statistics.fmean(means):.3f}" if whole else "a part"
            print(f"{arm:28}", *(f"{x:.3f}" for x in means), " ", over_all)
        print("divergences:", sum(int(r["divergences"] or 0) for r in mine))


if __name__ == "__main__":
    main()
