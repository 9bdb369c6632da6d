"""The record's tables: python records/2026-11-28-ood-texts/tables.py, from the root of a checkout.

Of passes.csv and tuned.csv, which eval.ood has written: by text and arm the mean over seeds of NLL (nats), ECE (per
cent) and Brier score, the same after the run's own temperature (the Brier score where it was measured), and the driven
rule less CE and less CE after its temperature, with the 95 % interval of Student's t.
"""

import csv
import re
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from eval.stats import t_interval  # noqa: E402

HERE = Path(__file__).parent
ARMS = {"ce": "CE", "ce-unigram": "CE, unigram driven", "smoothing": "smoothing 0.1", "dpsm": "DPSM, ramp 0.1"}
PERCENT = {"nll": 1, "ece10": 100, "brier": 1, "nll_t": 1, "ece10_t": 100, "brier_t": 1}


def read(path: Path) -> dict[str, dict[str, dict[str, dict]]]:
    """text -> arm -> seed -> the numbers of PERCENT."""
    out: dict = {}
    for row in csv.DictReader(path.open()):
        name = Path(row["run"]).name
        arm = max((a for a in ARMS if name.startswith(a)), key=len)
        seed = re.search(r"seed(\d+)", name)[1]
        text = Path(row["text"]).name
        out.setdefault(text, {}).setdefault(arm, {})[seed] = {
            k: float(row[k]) * by for k, by in PERCENT.items() if row.get(k)
        }
    return out


def less(ours: dict, theirs: dict, key: str, against: str, digits: int) -> str:
    deltas = [ours[s][key] - theirs[s][against] for s in sorted(ours.keys() & theirs.keys())]
    low, high = t_interval(deltas)
    return f"{statistics.fmean(deltas):+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"


def main() -> None:
    for part in ("passes", "tuned"):
        for text, arms in read(HERE / f"{part}.csv").items():
            print(f"\n{part}, {text}: NLL, ECE, Brier, after T NLL and ECE; {len(arms['ce'])} seeds")
            for arm, by_seed in sorted(arms.items(), key=lambda item: list(ARMS).index(item[0])):
                known = [k for k in PERCENT if all(k in v for v in by_seed.values())]
                mean = {k: statistics.fmean(v[k] for v in by_seed.values()) for k in known}
                print(f"| {ARMS[arm]} | {mean['nll']:.3f} | {mean['ece10']:.2f} | {mean['brier']:.4f} |", end="")
                brier = f", {mean['brier_t']:.4f}" if "brier_t" in mean else ""
                print(f" {mean['nll_t']:.3f}, {mean['ece10_t']:.2f}{brier} |")
            driven, ce = arms["ce-unigram"], arms["ce"]
            for end, name in (("", "CE"), ("_t", "CE + temperature")):
                nll, ece = less(driven, ce, "nll", f"nll{end}", 3), less(driven, ce, "ece10", f"ece10{end}", 2)
                print(f"driven less {name}: NLL {nll}, ECE {ece}, Brier {less(driven, ce, 'brier', f'brier{end}', 4)}")


if __name__ == "__main__":
    main()
