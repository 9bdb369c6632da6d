"""Starts finetune_seq2seq.py in this process on summaries that the tests write, and reads what a run left."""

import json
from pathlib import Path

from number_words import words
from refusals import refused

import finetune_seq2seq
from runtime.folder import load_checkpoint, read_metrics

CLOCK = {"train_seconds", "tokens_per_second", "ms_per_step_median", "peak_memory_bytes"}


def write_set(folder: Path, train=64, validation=12, test=10, sums=6) -> Path:
    """Sums in words, two lines of which are the summary."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, first, count in (("train", 3, train), ("validation", 1003, validation), ("test", 2003, test)):
        rows = []
        for i in range(first, first + count):
            lines = [f"{words(i + k)} and {words(k + 2)} make {words(i + 2 * k + 2)}." for k in range(sums + i % 9)]
            rows.append({"id": f"{split}-{i}", "article": " ".join(lines), "highlights": "\n".join(lines[:2])})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def train(flags, out, *more) -> int:
    return finetune_seq2seq.main([*flags, "--out", str(out), *map(str, more)])


def summary_of(out) -> dict:
    return json.loads((out / "summary.json").read_text())


def rows(out, kind) -> list[dict]:
    """Metrics without what depends on the clock."""
    return [{k: v for k, v in r.items() if k not in CLOCK} for r in read_metrics(Path(out) / "metrics.jsonl", kind)]


def weights(out, name="last.pt") -> dict:
    return load_checkpoint(Path(out) / name)["model"]


def predictions(out, name="test") -> list[dict]:
    return [json.loads(line) for line in (out / f"predictions-{name}.jsonl").read_text().splitlines()]


def fails(capsys, match, flags, out, *more) -> None:
    refused(capsys, match, lambda: train(flags, out, *more), out)
