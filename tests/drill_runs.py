"""Tiny runs of the three scripts in child processes, for the drills: what is done to a child before it begins, and what
of a finished run must not depend on what happened to it."""

import contextlib
import importlib
import json
import multiprocessing
import os
import random
import re
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from number_words import words
from tiny_gsm8k import problem, write_model

import train_lm
from model import lora, lora_hub
from runtime.folder import load_checkpoint, read_metrics

ROOT = Path(__file__).resolve().parents[1]
CLOCK = re.compile("seconds|per_second|ms_per_step|peak_memory|reused")
# What a tiny run imports, most of its time otherwise.
PRELOAD = ["train_lm", "finetune_seq2seq", "finetune_gsm8k", "torch.distributed.checkpoint.state_dict", "torch._dynamo"]
LIMIT = float(os.environ.get("SCORECAST_DRILL_LIMIT", 240))  # seconds after which a child is stuck


def write_data(place: Path) -> dict[str, list[str]]:
    """script -> flags of a run of a second or two, with its data under ``place``."""
    text, sums, problems = (place / name for name in ("text", "sums", "problems"))
    for folder in (text, sums, problems):
        folder.mkdir(parents=True)
    for split, first, count in (("train", 3, 120), ("val", 1003, 20), ("test", 2003, 20)):
        lines = (
            f"{words(i)} times {words(i + 7)} is {words(i * (i + 7) % 10**6)}.\n" for i in range(first, first + count)
        )
        (text / f"{split}.txt").write_text("".join(lines))
    for split, first, count in (("train", 3, 24), ("validation", 1003, 4), ("test", 2003, 4)):
        rows = []
        for i in range(first, first + count):
            parts = [f"{words(i + k)} and {words(k + 2)} make {words(i + 2 * k + 2)}." for k in range(6 + i % 3)]
            rows.append({"id": f"{i}", "article": " ".join(parts), "highlights": "\n".join(parts[:2])})
        (sums / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for split, first, count in (("train", 0, 40), ("test", 1000, 4)):
        (problems / f"{split}.jsonl").write_text("".join(json.dumps(problem(first + i)) + "\n" for i in range(count)))
    held = [json.loads(line) for line in (problems / "train.jsonl").read_text().splitlines()]
    model = write_model(place / "model", [row["question"] + row["answer"] for row in held])
    shared = f"--cache {place / 'cache'} --batch 4 --log-every 2 --eval-every 3 --steps 12 --device cpu --loss dpsm"
    text_flags = f"--data {text} --tokenizer bpe:320 --model pico --seq-len 32 --dropout 0.1 --sample-tokens 4"
    sums_flags = f"--data {sums} --size bart-tiny --random-start --tokenizer bpe:300 --preset none --min-words 20 "
    sums_flags += "--max-source 96 --max-target 48 --max-new-tokens 6 --beams 2 --generate-batch 2 --dropout 0.1"
    gsm8k_flags = f"--data {problems} --model {model} --base fp32 --rank 4 --seq-len 192 --heldout 8 --eval-batch 2 "
    gsm8k_flags += "--generate-tokens 8 --lora-dropout 0.1"
    return {
        "train_lm": [*text_flags.split(), *shared.split()],
        "finetune_seq2seq": [*sums_flags.split(), *shared.split()],
        "finetune_gsm8k": [*gsm8k_flags.split(), *shared.split()],
    }


def nothing() -> None:
    """Before a child: nothing."""


def no_readers() -> None:
    """Before a child: stdout is a pipe that nobody reads, stderr a full device."""
    read, write = os.pipe()
    os.close(read)
    os.dup2(write, 1)
    os.dup2(os.open("/dev/full", os.O_WRONLY), 2)


def no_room(size: int) -> None:
    """Before a child: no file may grow beyond ``size`` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def jumping_clock() -> None:
    """Before a child: the time of day jumps by up to twelve days, back and forth, at each look."""
    real, source = time.time, random.Random(1)
    time.time = lambda: real() + source.uniform(-1e6, 1e6)


def slow_validation() -> None:
    """Before a child: a batch of train_lm.py's validation takes four seconds more."""
    original = train_lm.forwards

    def slow(*args):
        for forward in original(*args):
            time.sleep(4)
            yield forward

    train_lm.forwards = slow


def load_model(place: str):
    return lora.load_base(place, "fp32", torch.float32, torch.device("cpu"))


def save_again(argv: list[str]) -> None:
    """Saves an adapter to the folder argv[0] for the model argv[1], for ever."""
    model = load_model(argv[1])
    lora.add_lora(model, lora.LoRAConfig(4, 8.0))
    while True:
        lora_hub.save_adapter(model, *argv)


def child(module: str, argv: list[str], log: str, before: Callable) -> None:
    """``main(argv)`` of a module, or of this one's `save_again`, its output in ``log``, after ``before()``."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    sys.argv = [module + ".py", *argv]
    before()
    sys.exit((save_again if module == "save_again" else importlib.import_module(module).main)(argv))


def start(module: str, argv: list[str], log: Path, before: Callable = nothing):
    """That child, as a process: a fork of a server that has imported the scripts, which takes no time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    log.touch()
    process = context.Process(target=child, args=(module, argv, str(log), before))
    with contextlib.chdir(ROOT):  # where the server finds what it imports
        process.start()
    return process


def end(process, seconds: float = LIMIT) -> int:
    """The exit code of a child, negative where a signal ended it. A stuck one is killed and has -99."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
        return -99
    return process.exitcode


def content(run: Path) -> dict:
    """All of a finished run that must not depend on what happened to it."""
    found = {}
    for kind in ("train", "val"):
        rows = read_metrics(run / "metrics.jsonl", kind)
        found[kind] = [{k: v for k, v in row.items() if not CLOCK.search(k)} for row in rows]
    summary = json.loads((run / "summary.json").read_text())
    found["summary"] = {k: v for k, v in summary.items() if not CLOCK.search(k)}
    found["texts"] = {p.name: p.read_text() for p in [*run.glob("outputs*.jsonl"), *run.glob("predictions*.jsonl")]}
    return found | {"weights": load_checkpoint(run / "last.pt")["model"]}


def differs(run: Path, whole: dict) -> str:
    """What of a finished run is not as in ``whole``, "" where nothing is."""
    try:
        found = content(run)
    except (OSError, ValueError) as e:
        return f"cannot be read: {e}"
    for part in ("train", "val", "summary", "texts"):
        if found[part] != whole[part]:
            return f"{part} differs"
    same = all(torch.equal(found["weights"][k], w) for k, w in whole["weights"].items())
    left = [p.name for p in run.rglob("*") if ".tmp" in p.name or p.suffix == ".part" or p.name == "evaluation.json"]
    return f"left {left[0]}" if left else "" if same else "weights differ"
