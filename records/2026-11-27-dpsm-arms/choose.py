"""The learning rate, or the dropout, with the lowest best-validation NLL.

python choose.py RUNS             prints it: the dropout of the runs in RUNS, or the rate of Shao's second part
python choose.py RUNS TUNE JUDGE  writes the grid JUDGE: the arms of TUNE, each at its best rate, three seeds
"""

import json
import sys
import tomllib
from pathlib import Path


def best_of(runs: Path) -> list[tuple[float, dict]]:
    """Of each finished run its lowest validation NLL and its config, the lowest first."""
    found = []
    for path in sorted(runs.glob("*/summary.json")):
        rows = [json.loads(line) for line in (path.parent / "metrics.jsonl").read_text().splitlines()]
        config = json.loads((path.parent / "config.json").read_text())
        found.append((min(r["nll"] for r in rows if r["kind"] == "val"), config))
    return sorted(found, key=lambda pair: pair[0])


def judged(tune: str, runs: list[tuple[float, dict]]) -> str:
    """``tune``'s text with a rate for each arm, three seeds and the text out of domain."""
    plan, lines, arm = tomllib.loads(tune), [], -1
    rates = [next(c["lr"] for _, c in runs if all(c[k] == v for k, v in arm.items())) for arm in plan["arm"]]
    for line in tune.splitlines():
        if line == "[[arm]]":
            arm += 1
            line += f"\nlr = {rates[arm]}"
        if not line.startswith("lr = ["):
            lines.append(line)
    text = "\n".join(lines) + "\n"
    text = text.replace("seed = [1]", "seed = [11, 12, 13]").replace("runs/arms/tune", "runs/arms/judge")
    text = text.replace("text A: the learning rate of each", "text C, each at its rate of text A")
    return text.replace("dropout = 0.1\n", 'dropout = 0.1\nood = "runs/verdict/ood"\n')


def main(runs: str, tune: str = "", judge: str = "") -> None:
    found = best_of(Path(runs))
    if judge:
        Path(judge).write_text(judged(Path(tune).read_text(), found))
        return
    if any(c["loss"] == "brier" for _, c in found):  # Shao's: the second part of the two
        print(next(c["lr"] for _, c in found if c["loss"] == "brier"))
    else:
        print(found[0][1]["dropout"])


if __name__ == "__main__":
    main(*sys.argv[1:])
