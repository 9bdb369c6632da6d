"""Where the arms differ: python diagnose.py OUT.csv RUN..., from the root of the checkout that trained them.

For the best checkpoint of each run, validation tokens by how often the target occurs in the training text, by place in
the window and by confidence: tokens, NLL (nats), confidence, accuracy and their gap; the same of the training tokens as
a whole. And of the training log, by fifths of the run: gradient norm, share of clipped steps, training NLL.
"""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import torch

from data.lm import load_corpus
from data.windows import Windows
from kernels import linear_score
from kernels.losses import ce
from model.gpt2 import GPT2, GPT2Config
from runtime.folder import load_checkpoint

FREQUENCY = ((0, 0), (1, 3), (4, 15), (16, 63), (64, 10**9))
PLACES = ((0, 7), (8, 31), (32, 127))
CONFIDENCE = ((0.0, 0.1), (0.1, 0.2), (0.2, 0.4), (0.4, 0.7), (0.7, 1.0))


@torch.no_grad()
def tokens_of(model: GPT2, windows: Windows) -> dict[str, np.ndarray]:
    """A vector an entry a token: nll, confidence, correct, target, place."""
    parts = []
    for begin in range(0, len(windows), 16):
        x, y = windows.get(range(begin, min(begin + 16, len(windows))))
        _, m = linear_score(model(x).flatten(0, 1), model.head_weight, y.flatten(), ce, reduction="none")
        place = torch.arange(y.shape[1]).expand_as(y).flatten()
        parts.append(torch.stack([-m.log_p, m.confidence, m.correct.float(), y.flatten().float(), place])[:, m.valid])
    return dict(zip(("nll", "confidence", "correct", "target", "place"), torch.cat(parts, 1).numpy(), strict=True))


def bands(found: dict, counts: np.ndarray):
    """(kind, band, mask)."""
    yield "all", "", np.ones(len(found["nll"]), bool)
    of = counts[found["target"].astype(int)]
    for low, high in FREQUENCY:
        yield "frequency", f"{low}-{high}" if high < 10**9 else f"{low}+", (of >= low) & (of <= high)
    for low, high in PLACES:
        yield "place", f"{low}-{high}", (found["place"] >= low) & (found["place"] <= high)
    for low, high in CONFIDENCE:
        yield "confidence", f"{low:g}-{high:g}", (found["confidence"] > low) & (found["confidence"] <= high)


def rows(folder: Path):
    config = json.loads((folder / "config.json").read_text())
    corpus = load_corpus(config["data"], tokenizer=config["tokenizer"], cache=config["cache"])
    kept = load_checkpoint(folder / "best.pt")
    model = GPT2(GPT2Config(**kept["model_config"] | {"dropout": 0.0}), torch.float32)
    model.load_state_dict(kept["model"])
    model.eval()
    counts = np.bincount(np.asarray(corpus.train.tokens), minlength=corpus.tokenizer.vocab_size)
    about = {"grid": folder.parent.name, "run": folder.name}
    for name in ("val", "train"):
        found = tokens_of(model, Windows(getattr(corpus, name), config["seq_len"]))
        for kind, band, mask in bands(found, counts):
            if mask.any():
                values = {k: float(found[k][mask].mean()) for k in ("nll", "confidence", "correct")}
                values["gap"] = values["confidence"] - values["correct"]
                yield about | {"set": name, "kind": kind, "band": band, "tokens": int(mask.sum())} | values
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    train, steps = [r for r in lines if r["kind"] == "train"], config["steps"]
    for fifth in range(5):
        part = [r for r in train if fifth * steps / 5 < r["step"] <= (fifth + 1) * steps / 5]
        mean = {k: float(np.mean([r[k] for r in part])) for k in ("nll", "grad_norm", "clip_rate", "alpha")}
        yield about | {"set": "log", "kind": "fifth", "band": fifth + 1, "tokens": ""} | mean


def main(out: str, *folders: str) -> None:
    table = [row for folder in folders for row in rows(Path(folder))]
    names = list(dict.fromkeys(name for row in table for name in row))
    with open(out, "w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in table)


if __name__ == "__main__":
    main(*sys.argv[1:])
