"""The record's tables from runs.csv: python records/2026-11-27-dpsm-verdict/tables.py, from the root of a checkout.

Of the judged grids: means over seeds, differences from CE of the same seed with their 95 % interval (Student's t), and
what was claimed, decided at Holm's level over all claims of a grid.
"""

import csv
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from eval.stats import claim_p, holm_level, summarize, t_interval, verdict  # noqa: E402

GRIDS = {"judge_c": "many passes, text C", "judge": "many passes, text B"}
GRIDS |= {"one_pass": "one pass", "finetune": "fine-tuning", "sizes": "nano, many passes, text C"}
NAMES = {
    "ce": "CE",
    "brier": "Brier",
    "dpsm": "DPSM, ramp 0.1",
    "smoothing": "smoothing 0.1",
    "u2": "CE, unigram 0.2",
    "ug3": "CE, unigram driven",
    "uc2": "DPSM by confidence, unigram 0.2",
}
COLUMNS = (
    "NLL",
    "ECE, %",
    "Brier",
    "NLL after T",
    "ECE after T, %",
    "OOD NLL",
    "OOD ECE, %",
    "last NLL",
    "last ECE, %",
)
KEYS = ("test_nll", "test_ece10", "test_brier", "test_nll_t", "test_ece10_t", "ood_nll", "ood_ece10", "last_nll")
KEYS += ("last_ece10",)
# Name, key of the arm, key of CE, what is asked of the arm over CE, relative for ratios of means.
CLAIMS = (
    ("PPL at most 1 % above CE's", lambda a, c: a["test_nll"] - c["test_nll"], math.log(1.01)),
    ("ECE at most 0.75 of CE's", lambda a, c: a["test_ece10"] - 0.75 * c["test_ece10"], 0.0),
    ("Brier at most CE's", lambda a, c: a["test_brier"] - c["test_brier"], 0.0),
    ("NLL at most that of CE after T", lambda a, c: a["test_nll"] - c["test_nll_t"], 0.0),
    ("ECE at most that of CE after T", lambda a, c: a["test_ece10"] - c["test_ece10_t"], 0.0),
    ("last ECE at most 0.75 of CE's", lambda a, c: a["last_ece10"] - 0.75 * c["last_ece10"], 0.0),
    ("95 % of CE's final in 1.1 of its steps", lambda a, c: a["step_to_ce"] / c["step_to_ce"], 1.1),
)


def arm_of(row: dict) -> str:
    if row["unigram"] not in ("", "0.0", "0"):
        return "uc2" if row["loss"] == "dpsm" else "ug3" if float(row["gap_gain"] or 0) else "u2"
    return row["loss"]


def number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def read(folder: Path) -> dict:
    """grid -> arm -> seed -> numbers."""
    curves: dict = {}
    for row in csv.DictReader((folder / "curves.csv").open()):
        curves.setdefault((row["grid"], row["run"]), []).append((int(row["step"]), float(row["nll"])))
    found: dict = {}
    for row in csv.DictReader((folder / "runs.csv").open()):
        numbers = {k: number(v) for k, v in row.items()}
        numbers["curve"] = curves[row["grid"], row["run"]]
        found.setdefault(row["grid"], {}).setdefault(arm_of(row), {})[int(row["seed"])] = numbers
    return found


def against_ce(arms: dict, ce: str = "ce") -> None:
    """Gives each run the first validated step at which it has 95 % of what CE of its seed came to."""
    for seed, run in arms[ce].items():
        target = min(nll for _, nll in run["curve"]) / 0.95
        for runs in (r for r in arms.values() if seed in r):
            runs[seed]["step_to_ce"] = next((s for s, nll in runs[seed]["curve"] if nll <= target), math.inf)


def table(arms: dict) -> None:
    print("| arm | " + " | ".join(COLUMNS) + " |\n|---" * 1 + "|---" * len(COLUMNS) + "|")
    for name in (n for n in NAMES if n in arms):
        cells = []
        for key in KEYS:
            scale, digits = (100, 2) if "ece" in key else (1, 4)
            s = summarize([scale * run[key] for run in arms[name].values()])
            cells.append(f"{s.mean:.{digits}f} ± {s.sd:.{digits}f}")
        print(f"| {NAMES[name]} | " + " | ".join(cells) + " |")


def claims(arms: dict, ce: str = "ce") -> None:
    seeds, tests = sorted(arms[ce]), {}
    for name in (n for n in NAMES if n in arms and n != ce):
        for text, delta, threshold in CLAIMS:
            deltas = [delta(arms[name][seed], arms[ce][seed]) for seed in seeds]
            tests[name, text] = [min(d, 99.0) for d in deltas], threshold  # one that never came there
    level = holm_level([claim_p(*test) for test in tests.values()])
    print(f"\n{len(tests)} claims, Holm's level {level:.4f}; mean of the difference and its 95 % interval.\n")
    print("| arm | " + " | ".join(text for text, *_ in CLAIMS) + " |\n|---" + "|---" * len(CLAIMS) + "|")
    for name in (n for n in NAMES if n in arms and n != ce):
        cells = []
        for text, *_ in CLAIMS:
            deltas, threshold = tests[name, text]
            low, high = t_interval(deltas)
            scale, digits = (100, 2) if "ECE" in text else (1, 2 if "steps" in text else 4)
            ends = " to ".join(f"{scale * v:.{digits}f}" for v in (low, high))
            mean = f"{scale * summarize(deltas).mean:.{digits}f}"
            cells.append(f"**{verdict(deltas, threshold, alpha=level)}**, {mean} ({ends})")
        print(f"| {NAMES[name]} | " + " | ".join(cells) + " |")


def main() -> None:
    found = read(Path(__file__).parent)
    for grid, title in GRIDS.items():
        if grid in found:
            against_ce(found[grid])
            print(f"\n### {title}\n")
            table(found[grid])
            claims(found[grid])


if __name__ == "__main__":
    main()
