"""The tables of this record, from forecasts.csv and later.csv: `python records/2026-11-28-forecast-early/tables.py`."""

import csv
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

CHOSEN_ON = ("arms/tune", "fot_budgets", "fot_parts/pico", "public, modded", "public, multi", "public, olmo")
TUNED = "fot_parts/lora fot_samples_lora fot_search fot_sizes/smollm2 smollm2 verdict/finetune".split()
TUNED = (*TUNED, "arms/shao, pico, 280")  # whose Brier part begins with the weights of its CE part
STOPS = ("0.1", "0.25", "0.5", "0.75")
HOLDS_95 = 2.43  # sds


def cell(rows: list[dict], which: str) -> str:
    """The share with a forecast where that is not all, the median error in per cent of the final loss, and how many per
    cent of the finals lie in the 68 % and in the 95 % interval."""
    told = [row for row in rows if row[f"mean{which}"]]
    if not told:
        return "none"
    share = "" if len(told) == len(rows) else f"{100 * len(told) / len(rows):.0f} %: "
    final, mean, sd = (np.array([float(row[k]) for row in told]) for k in ("final", f"mean{which}", f"sd{which}"))
    off = np.abs(mean / final - 1)
    inside = [100 * np.mean(np.abs(mean - final) <= reach * sd) for reach in (1, HOLDS_95)]
    return f"{share}{100 * np.median(off):.1f}, {inside[0]:.0f}, {inside[1]:.0f}"


def read(name: str) -> list[dict]:
    with (Path(__file__).parent / name).open() as lines:
        return list(csv.DictReader(lines))


def show(families: dict[str, dict[str, list[dict]]]) -> None:
    print("| family (runs) | from 10 % | 25 % | half | 75 % |\n|---|---|---|---|---|")
    for family, stops in sorted(families.items()):
        count = max(map(len, stops.values()))
        if count < 5:
            continue
        cells = []
        for stop in STOPS:
            old, new = (cell(stops[stop], which) for which in ("_before", ""))
            cells.append(old if old == new else f"{old} -> {new}")
        print(f"| {family} ({count}) | " + " | ".join(cells) + " |")


def main() -> int:
    for name in ("forecasts.csv", "later.csv"):
        found = {part: defaultdict(lambda: defaultdict(list)) for part in ("chosen on", "judged on")}
        for row in read(name):
            family, kind = row["family"], "fine-tuned" if row["family"].startswith(TUNED) else "from scratch"
            part = "chosen on" if family.startswith(CHOSEN_ON) and name == "forecasts.csv" else "judged on"
            for shown in [family] + [f"all, {kind}"] * (not family.startswith("public")):
                found[part][shown][row["stop"]].append(row)
        for part, families in found.items():
            if families:
                print(f"\n{name}, {part}, before -> after\n")
                show(families)
    return 0


if __name__ == "__main__":
    sys.exit(main())
