"""Many run folders with long logs, to see how long a report of them takes.

python -m tests.eval.many_runs OUT --runs 500 --points 2000
time python -m eval.report OUT/runs/* --out OUT/report
"""

import argparse
import json
import math
from pathlib import Path

from eval.heldout import BANDS

LOSSES, SEEDS = ("ce", "brier", "dpsm", "spherical", "focal"), 5


def logged(run: int, points: int) -> str:
    """A metrics.jsonl of ``points`` rows of training and 20 of validation, with what our scripts write."""
    rows = []
    for i in range(1, points + 1):
        nll = 3 + 0.05 * (run % 7) + 4 * i**-0.5 + 0.02 * math.sin(i * (run + 1))
        about = {"step": 10 * i, "tokens": 20480 * i, "train_seconds": 0.31 * i + 0.001 * run}
        row = {"kind": "train", **about, "loss": nll, "nll": nll, "ppl": math.exp(nll), "ece10": 0.01 + 0.1 / i}
        row |= {
            "brier": 0.9,
            "accuracy": 0.2,
            "entropy": nll,
            "alpha": i / points,
            "lr": 3e-3 * (1 - i / points) + 1e-5,
        }
        rates = {"grad_norm": 1 + 9 / i, "clip_rate": 1 / i, "flipped_tokens": 0.0, "steps": 10.0, "skipped": 0.0}
        rows.append(row | rates | {"tokens_per_second": 66000.0 + run})
        if i % (points // 20) == 0:
            kept = ("loss", "nll", "ppl", "ece10", "brier", "accuracy")
            rows.append({"kind": "val", **about} | {key: row[key] for key in kept})
    return "".join(json.dumps(row) + "\n" for row in rows)


def make(out: Path, runs: int, points: int) -> list[Path]:
    """Folders of arms of five losses over learning rates, five seeds each."""
    folders = []
    for run in range(runs):
        seed, arm = run % SEEDS + 1, run // SEEDS
        loss, lr = LOSSES[arm % len(LOSSES)], 1e-3 * (1 + arm // len(LOSSES))
        folder = out / "runs" / f"{loss}-lr{lr:g}-seed{seed}"
        folder.mkdir(parents=True)
        config = {"script": "train_lm.py", "seed": seed, "data": "many", "model": "nano", "loss": loss, "lr": lr}
        text = logged(run, points)
        last = json.loads(text.rstrip().splitlines()[-1])
        keys = ("nll", "ppl", "ece10", "brier", "accuracy")
        summary = {f"val_{key}{t}": last[key] for key in keys for t in ("", "_t")} | {"temperature": 1.1}
        summary |= {"steps": 10 * points, "tokens_seen": last["tokens"], "train_seconds": last["train_seconds"]}
        bands = {"tokens": 10**5, "confidence": 0.2} | {key: last[key] for key in ("nll", "ece10", "accuracy")}
        summary["bands"] = {name: {"times": [1, 9], "types": 9, "val": bands} for name in BANDS}
        summary |= {"tokens_per_second": 66000.0, "peak_memory_bytes": 10**9, "divergences": 0}
        count = [1000 + k for k in range(300)]
        bins = {"count": count, "confidence_sum": [n * (k + 0.5) / 300 for k, n in enumerate(count)]}
        bins["correct_sum"] = [round(n * (k + 0.5) / 330) for k, n in enumerate(count)]
        samples = [{"prompt": f"prompt {i}", "text": "words " * 100} for i in range(4)]
        files = {"config": config | {"steps": 10 * points, "batch": 16}, "summary": summary, "samples": samples}
        files |= {
            "calibration": {"val": dict.fromkeys(("raw", "scaled", *BANDS), bins)},
            "environment": {"command": "train_lm.py"},
        }
        for name, value in files.items():
            (folder / f"{name}.json").write_text(json.dumps(value))
        (folder / "metrics.jsonl").write_text(text)
        folders.append(folder)
    return folders


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--points", type=int, default=2000)
    given = parser.parse_args()
    print(len(make(given.out, given.runs, given.points)), "run folders")
