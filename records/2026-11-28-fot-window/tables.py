"""The record's table: python records/2026-11-28-fot-window/tables.py [RUNS], from the root of a checkout.

With RUNS, which has pico/RUN, runs.csv is made of it first. The score of a run is the mean of its NLL on the held-out
set and on the test set.
"""

import csv
import runpy
import sys
from pathlib import Path

HERE = Path(__file__).parent
sizes = runpy.run_path(str(HERE.parent / "2026-11-28-fot-sizes" / "tables.py"))


def arm_of(file: Path, config: dict) -> dict:
    return {"part": config["optimizer"], "arm": f"window {config['fot_window']}"}


def main() -> None:
    if len(sys.argv) > 1:
        sizes["collect"](Path(sys.argv[1]).glob("pico/*/summary.json"), HERE / "runs.csv", arm_of)
    rows = list(csv.DictReader((HERE / "runs.csv").open()))
    for part in sorted({r["part"] for r in rows}):
        print(f"\nFoT, {part}: window, mean score by rate, mean regret, best rate; window 8 less it in both")
        sizes["table"]([r for r in rows if r["part"] == part], "window 8")


if __name__ == "__main__":
    main()
