"""The cell with the lowest held-out NLL: python choose.py RUNS [FIELD...] prints flags for eval.campaign."""

import json
import sys
from pathlib import Path


def best_of(runs: str, *names: str) -> str:
    found = []
    for path in sorted(Path(runs).glob("*/summary.json")):
        summary, config = (json.loads((path.parent / f"{name}.json").read_text()) for name in ("summary", "config"))
        found.append((summary["val_nll"], [f"--set {name}={config[name]:g}" for name in names]))
    return " ".join(min(found)[1])


if __name__ == "__main__":
    print(best_of(*sys.argv[1:]))
