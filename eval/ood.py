"""Finished runs of train_lm.py on further texts, out of domain. Nothing is trained again, the runs stay as they are.

    python -m eval.ood runs/A runs/B --on wikitext2 other_texts/
    python -m eval.ood runs/* --on lambada/ --csv ood.csv

A text is a named set, of which it is the test split, or a folder, of which it is all text, as train_lm.py's --ood. The
weights are those that the run's summary.json reports, the tokenizer is the checkpoint's, and windows are as long as in
training. After NLL, PPL, ECE and Brier score come NLL, ECE and Brier score after the run's own temperature, which was
fitted on its validation set: one that suits the domain may not suit another. NLL is in nats a token, and tokenizers
that differ are compared by bits per byte.
"""

import sys

if not __package__:  # a file by its name finds no package
    print("python -m eval.ood: error: type it like this, in the folder that holds eval/", file=sys.stderr)
    sys.exit(2)

import csv
import math
from collections.abc import Iterator
from io import TextIOWrapper
from pathlib import Path

import torch
from torch import Tensor

from data.lm import load_text_set
from data.sources import open_all
from data.tokenizer import Tokenizer
from data.windows import Windows
from eval import metrics
from eval.heldout import evaluate
from model.gpt2 import GPT2
from model.gpt2_hub import load_start
from runtime.cli import Parser, user_errors
from runtime.machine import World, start_world
from runtime.staging import write_bytes
from schedules.commandline import alive
from schedules.textlines import read_json

COLUMNS = {"nll": "NLL", "ppl": "PPL", "bits_per_byte": "bits/byte", "ece10": "ECE, %", "brier": "Brier"}
SCALED = {"nll_t": "NLL, T", "ece10_t": "ECE, %, T", "brier_t": "Brier, T"}


def forwards(model: GPT2, windows: Windows, rows: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """(hidden [N, D], targets [N]) of all windows, ``rows`` at a time."""
    for begin in range(0, len(windows), rows):
        x_BT, y_BT = windows.get(range(begin, min(begin + rows, len(windows))))
        yield model(x_BT.to(device)).flatten(0, 1), y_BT.to(device).flatten()


def read_run(run: Path) -> tuple[dict, dict]:
    """config.json and summary.json of a finished run of train_lm.py. Raises ValueError for a folder that is none, or
    that does not say what is needed here."""
    files = [run / f"{name}.json" for name in ("config", "summary")]
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file} is missing; give the folder of a finished run of train_lm.py")
    config, summary = (read_json(file, dict) for file in files)
    if summary.get("script") != "train_lm.py":
        raise ValueError(f"{run} is a run of {summary.get('script')}, expected one of train_lm.py")
    if lacks := [k for k in ("reported", "temperature") if k not in summary] + ["seq_len"] * ("seq_len" not in config):
        raise ValueError(f"{run} does not say its {', '.join(lacks)}; it was made by an older train_lm.py")
    if not (weights := run / f"{summary['reported']}.pt").is_file():
        raise ValueError(f"{weights}, of which the summary is, is missing; put it back")
    scale, length = summary["temperature"], config["seq_len"]
    if not (scale is None or (isinstance(scale, float) and scale > 0)) or type(length) is not int:
        raise ValueError(f"{run}: temperature {scale!r}, seq_len {length!r}; expected a number above 0, a whole number")
    return config, summary


def measured(run: Path, texts: list[str], *, rows: int, cache: Path, dtype: str, world: World) -> Iterator[dict]:
    """A row for each of ``texts``: the run, the text, its tokens, and the numbers of COLUMNS and SCALED."""
    config, summary = read_run(run)
    model, files = load_start(run / f"{summary['reported']}.pt", world.dtype(dtype))
    model.to(world.device).eval()
    tokenizer = Tokenizer.from_files(files, "of-a-run")
    scale = summary["temperature"] and 1 / summary["temperature"]
    for text in texts:
        windows = Windows(load_text_set(text, tokenizer, cache), config["seq_len"])
        bar = dict(says=f"{run.name}, {text}", count=math.ceil(len(windows) / rows))
        found = evaluate(model, forwards(model, windows, rows, world.device), world, scale=scale, **bar)
        numbers = metrics.measure(found.raw, size=windows.bytes)
        row = {"run": str(run), "text": text, "tokens": int(numbers["eval_tokens"])}
        row |= {name: numbers.get(name) for name in COLUMNS}
        scaled = metrics.measure(found.scaled, size=windows.bytes) if found.scaled else {}
        yield row | {name: scaled.get(name.removesuffix("_t")) for name in SCALED}


def line(row: dict, wide: int) -> str:
    shown = {k: row[k] * 100 if k.startswith("ece") and row[k] is not None else row[k] for k in (*COLUMNS, *SCALED)}
    cells = [
        f"{'-':>10}" if v is None else f"{v:10.2f}" if k[:3] in ("ece", "ppl") else f"{v:10.4f}"
        for k, v in shown.items()
    ]
    return f"{row['run']:{wide}} {row['tokens']:10,} " + " ".join(cells)


def write_rows(file, rows: list[dict]) -> None:
    """As CSV to a binary ``file``; an empty field where there is no number."""
    text = TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
    table = csv.DictWriter(text, list(rows[0]))
    table.writeheader()
    table.writerows(rows)
    text.detach()


@alive()
def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m eval.ood", usage=None, description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of finished runs of train_lm.py")
    parser.add_argument("--on", nargs="+", required=True, metavar="TEXT", help="named sets, or folders of text")
    parser.add_argument("--csv", type=Path, help="file for the rows, written anew with each")
    parser.add_argument("--rows", type=int, default=16, help="windows in a forward (default: %(default)s)")
    parser.add_argument("--cache", type=Path, default="cache", help="folder of the token files (default: %(default)s)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="(default: %(default)s)")
    kinds = ("auto", "bfloat16", "float32")
    parser.add_argument("--dtype", default="auto", choices=kinds, help="of the activations (default: %(default)s)")
    given = parser.parse_args(argv)
    wide = max(len(str(run)) for run in given.runs)
    with user_errors():
        if given.rows < 1:
            raise ValueError(f"--rows {given.rows}: expected 1 or more")
        for run in given.runs:  # what is wrong with the last, or the last text, is said before the first is measured
            read_run(run)
        for text in given.on:
            open_all(text)
        world, found = start_world(given.device, fixed_shapes=True), []
        if world.size > 1:
            raise ValueError(f"{world.size} ranks: this is one process' work; start it without torchrun")
        how = dict(rows=given.rows, cache=given.cache, dtype=given.dtype, world=world)
        print(f"{'':{wide}} {'tokens':>10} " + " ".join(f"{name:>10}" for name in (COLUMNS | SCALED).values()))
        for run in given.runs:
            for row in measured(run, given.on, **how):
                found.append(row)
                print(line(row, wide), row["text"], flush=True)
                if given.csv:
                    write_bytes(given.csv, lambda file: write_rows(file, found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
