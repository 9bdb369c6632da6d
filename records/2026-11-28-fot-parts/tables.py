"""The record's tables: python records/2026-11-28-fot-parts/tables.py [RUNS], from the root of a checkout.

With RUNS, which has pico/RUN and lora/RUN, runs.csv is made of it first. The score of a run is the mean of its NLL on
the held-out set and on the test set.
"""

import csv
import runpy
import sys
from pathlib import Path

HERE = Path(__file__).parent
ALL = {"pico": "fot", "lora": "envelope,noise,forecast,gate,blocks"}
sizes = runpy.run_path(str(HERE.parent / "2026-11-28-fot-sizes" / "tables.py"))
collect, table = sizes["collect"], sizes["table"]


def arm_of(file: Path, config: dict) -> dict:
    part, parts = file.parts[-3], config["fot_parts"]
    plain = config["schedule"] != "fot" or (part == "pico" and f"fot_parts{parts}" not in file.parts[-2])
    return {"part": part, "arm": config["schedule"] if plain else parts}


def main() -> None:
    if len(sys.argv) > 1:
        collect(Path(sys.argv[1]).glob("*/*/summary.json"), HERE / "runs.csv", arm_of)
    rows = list(csv.DictReader((HERE / "runs.csv").open()))
    for part, first in ALL.items():
        print(f"\n{part}: arm, mean score by rate, mean regret, best rate; {first} less it in both")
        table([r for r in rows if r["part"] == part], first)


if __name__ == "__main__":
    main()
