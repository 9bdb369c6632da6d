"""Everything that only a device tells, in one time-boxed run: the decisive parts first, each on file as it comes.

    python -m races.device --out FOLDER --data TEXTS --tokenizer GPT2_FILES
    python -m races.device --out FOLDER --only probes,claims --seconds 240
    python -m races.device --out FOLDER --device cpu --tiny            # shows that all parts run, no more

races.carry makes a folder of what it needs on a machine without a network.

probes    races.probes: ceilings, and the kernels beside the bytes that they must move
claims    races.train_step, then kernels.bench --claims, compiled in parallel first: every claim's verdict
train     train_lm.py, GPT-2 124M on --data for 60 steps, with its micro-batch and with the widest: tokens/s and MFU
tests     the values of the kernels on the device, compiled in parallel (pytest -m gpu)
paths     kernels.bench --paths: how a row is held, tokens a chunk
fot       races.fot_overhead, GPT-2 124M
peft      races.peft_gsm8k: a LoRA step of Qwen3-0.6B's shape beside peft
nanogpt   races.nanogpt beside the checkout --nanogpt
ncu       Nsight Compute's account of score_kernel, where its command ncu is installed

A part ends at its limit or with the time that is left, and the next one begins; what it had written stays. FOLDER gets
at most eight files: log.txt with all that was printed, parts.json with each part's seconds and end, the parts' own CSV
and JSON lines, and results.jsonl with what the runs of whole scripts left.
"""

import sys

if not __package__:  # a file by its name finds no package
    print("python -m races.device: error: type it like this, in the folder that holds races/", file=sys.stderr)
    sys.exit(2)

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import torch

from races.common import check_new, here_and_now, race_parser
from runtime.cli import user_errors
from runtime.folder import write_json
from schedules.commandline import alive
from schedules.textlines import read_text

LAST_WORDS = 8  # seconds between asking a part to stop and ending it
LIMITS = dict(probes=110, claims=200, train=160, tests=180, paths=60, fot=100, peft=120, nanogpt=150, ncu=60)  # seconds
TESTS = ("tests/kernels/test_gpu.py", "tests/kernels/test_ignored_rows.py", "tests/test_finetune_gsm8k_gpu.py")
TESTS += ("tests/model/test_varlen.py", "tests/runtime/test_graph.py")
# Of one launch at V = 50257, after one that warmed up: what binds it, and where its warps wait.
NCU = ["--kernel-name", "score_kernel", "--launch-skip", "1", "--launch-count", "1"]
NCU += [word for name in ("SpeedOfLight", "MemoryWorkloadAnalysis", "WarpStateStats") for word in ("--section", name)]


def commands(args) -> dict[str, list[list[str]]]:
    """{part: its command lines}. Each is run in this folder; those of a part share its limit."""
    work, out, device = args.work, args.out, ["--device", args.device]
    python, tiny = sys.executable, args.tiny
    workers = str(min(14, os.cpu_count() or 1))
    spread = ["--dist", "worksteal"]
    chosen = ["-k", args.tests] if args.tests else []
    text = [] if not args.data else ["--data", str(args.data)]
    text += ["--tokenizer", str(args.tokenizer)] if args.tokenizer else []
    lm = ["--model", "pico", "--steps", "4"] if tiny else ["--model", "gpt2", "--steps", "60", "--batch", "64"]
    train = ["train_lm.py", *device, *lm, *text, "--loss", "dpsm", "--cache", str(work / "cache")]
    train += ["--eval-every", "1000"]
    wide = ["--micro-batch", "64", "--head-memory", "2000"]
    few = ["--repeats", "1"] if tiny else ["--repeats", "15"]
    step_csv, head = str(out / "step.csv"), ["--n", "32", "--v", "64", "--d", "8"] if tiny else []
    warm = [] if tiny else ["--warm", workers]
    claims = [] if tiny else ["--claims", "--train-step-csv", step_csv]
    shape = ["--shape", "pico" if tiny else "gpt2"] + (
        ["--steps", "16", "--window", "8"] if tiny else ["--steps", "64"]
    )
    lora = ["--shape", "tiny", "--base", "fp32"] if tiny else ["--shape", "0.6b", "--base", "nf4"]
    lora += ["--batch", "4"] if tiny else ["--batch", "32"]
    lora += ["--steps", "1", "--prompts", "0", "--rounds", "1", "--seq-len", "32" if tiny else "512"]
    race = ["--model", "pico" if tiny else "gpt2", "--steps", "20", "--rounds", "1", "--batch", "2" if tiny else "16"]
    race += ["--seq-len", "32" if tiny else "1024", "--cache", str(work / "cache"), "--out", str(work / "nanogpt")]
    found = {
        "probes": [["-m", "races.probes", *device, "--jsonl", str(out / "probes.jsonl")]],
        "claims": [
            ["-m", "races.train_step", *device, *few, "--csv", step_csv],
            ["-m", "kernels.bench", *device, *few, *head, *claims, *warm, "--csv", str(out / "bench.csv")],
        ],
        "train": [[*train, "--out", str(work / "run")], [*train, *wide, "--out", str(work / "run-wide")]],
        "tests": [["-m", "pytest", "-o", "addopts=-v", "-m", "gpu", "-n", workers, *spread, *TESTS, *chosen]],
        "paths": [["-m", "kernels.bench", "--paths", *device, "--repeats", "10", "--csv", str(out / "paths.csv")]],
        "fot": [["-m", "races.fot_overhead", *shape, *device, "--csv", str(out / "fot.csv")]],
        "peft": [["-m", "races.peft_gsm8k", *device, *lora, "--out", str(work / "peft")]],
        "nanogpt": [["-m", "races.nanogpt", str(args.nanogpt), *device, *race, *text]],
    }
    if args.device == "cpu":
        del found["paths"], found["tests"]  # of a GPU alone
    if not args.nanogpt:
        del found["nanogpt"]
    found = {part: [[python, *line] for line in lines] for part, lines in found.items()}
    if args.device == "cuda" and (ncu := shutil.which("ncu")):
        found["ncu"] = [[ncu, *NCU, python, "-m", "races.probes", *device, "--only", "ties"]]
    return found


def run(line: list[str], seconds: float, log) -> str:
    """How a command ended within ``seconds``: "done", "stopped at its limit", or its exit code. ``log``: a file for
    what it prints."""
    started = subprocess.Popen(line, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        code = started.wait(max(0.0, seconds))
    except subprocess.TimeoutExpired:
        started.send_signal(signal.SIGINT)  # tests and runs say what they have
        with contextlib.suppress(subprocess.TimeoutExpired):
            started.wait(LAST_WORDS)
        with contextlib.suppress(ProcessLookupError):  # what it has started, too
            os.killpg(started.pid, signal.SIGKILL)
        started.wait()
        return "stopped at its limit"
    return "done" if code == 0 else f"exit code {code}"


def keep(args, part: str) -> None:
    """What a part has left in the work folder and a reader wants, as lines of results.jsonl: part, file, text."""
    wanted = dict(train="run*/summary.json", peft="peft/race.csv", nanogpt="nanogpt/race.json")
    for path in sorted(args.work.glob(wanted[part])) if part in wanted else ():
        line = dict(part=part, file=str(path.relative_to(args.work)), text=read_text(path))
        with open(args.out / "results.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")


def run_parts(args, parts: dict[str, list[list[str]]]) -> dict:
    """{part: {seconds, end}} of all parts, on file after each."""
    end, report = time.monotonic() + args.seconds, {}
    about = here_and_now(torch.device(args.device))
    with open(args.out / "log.txt", "ab") as log:
        for part, lines in parts.items():
            began, how = time.monotonic(), "no time left"
            limit = min(LIMITS[part], end - began)
            for line in lines if limit >= min(5, LIMITS[part]) else ():
                log.write(f"\n=== {part}: {' '.join(line[1:])}\n".encode())
                log.flush()
                how = run(line, limit - (time.monotonic() - began), log)
            keep(args, part)
            report[part] = dict(seconds=round(time.monotonic() - began, 1), end=how)
            print(f"{part}: {how}, {report[part]['seconds']} s", flush=True)
            write_json(args.out / "parts.json", about | dict(parts=report))
    return report


@alive()
def main(argv=None) -> int:
    parser = race_parser("device", __doc__)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--work", type=Path, default=Path("runs/device"), help="folder for runs and caches; new")
    parser.add_argument("--data", type=Path, help="folder of text to train on (default: train_lm.py's)")
    parser.add_argument("--tokenizer", type=Path, help="folder of vocab.json and merges.txt (default: train_lm.py's)")
    parser.add_argument("--nanogpt", type=Path, help="checkout of nanoGPT; without it that part is left out")
    parser.add_argument("--tests", default="", help="tests by name, as pytest -k takes them (default: all)")
    parser.add_argument("--seconds", type=float, default=540, help="of all parts together (default: %(default)s)")
    parser.add_argument("--only", default="", help="names of parts, with commas, in the order given")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device)
    parser.add_argument("--tiny", action=argparse.BooleanOptionalAction, default=False, help="the smallest shapes")
    args = parser.parse_args(argv)
    with user_errors():
        check_new(args.work, "--work")
        parts = commands(args)
        names = [name for name in args.only.split(",") if name] or list(parts)
        if unknown := [name for name in names if name not in parts]:
            raise ValueError(f"--only {unknown[0]}: the parts here are {', '.join(parts)}")
        args.out.mkdir(parents=True, exist_ok=True)
        args.work.mkdir(parents=True)
    report = run_parts(args, {name: parts[name] for name in names})
    return 0 if all(part["end"] == "done" for part in report.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
