"""Training throughput beside karpathy/nanoGPT: same tokens, model, batch, length and dtype, side by side in one run.

    git clone https://github.com/karpathy/nanoGPT
    python -m races.nanogpt nanoGPT --data pydoc --tokenizer bpe:257 --out runs/race
    python -m races.nanogpt nanoGPT --data FOLDER --tokenizer gpt2 --rounds 3

Processes take turns: nanoGPT, ours with CE, ours with DPSM, nanoGPT, and so on. Both sides have the same statistic:
the mean over ten steps, as one log line of ours covers, and of these means the median, the first left out. nanoGPT's
times are those it prints; ours come from metrics.jsonl by way of summary.json. On a CPU both run fp32, and without
torch.compile but with --compile, whose compilation falls into the steps that are left out. race.json is written after
each round, which is a row to --rows.
"""

import sys

if not __package__:  # a file by its name finds no package
    print("python -m races.nanogpt: error: type it like this, in the folder that holds races/", file=sys.stderr)
    sys.exit(2)

import argparse
import pickle
import re
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch

from data.lm import load_corpus
from kernels.bench.limits import Limits
from model.gpt2 import SIZES
from races.common import add_limits, check_least, check_new, command, output_of, race_parser
from runtime.cli import user_errors
from runtime.folder import environment, write_json
from schedules.commandline import alive
from schedules.textlines import read_json

WINDOW = 10  # steps of a log line of train_lm.py
TRAIN_TOKENS = 2_000_000
PRINTED_TIME = re.compile(r"^iter \d+: loss \S+, time ([\d.]+)ms", re.M)


def nanogpt_ms(dataset: str, args) -> float:
    """Milliseconds a step of one nanoGPT process: the median of ten-step means, the first left out."""
    flags = dict(dataset=dataset, device=args.device, compile=args.compile, out_dir=tempfile.mkdtemp())
    flags |= dict(block_size=args.seq_len, dropout=0.0, bias=True, **SIZES[args.model])
    flags |= dict(batch_size=args.batch, gradient_accumulation_steps=1, max_iters=args.steps)
    flags |= dict(learning_rate=1e-3, min_lr=1e-4, warmup_iters=10, lr_decay_iters=args.steps)
    flags |= dict(log_interval=1, eval_interval=10**9, eval_iters=1)
    line = command("train.py") + [f"--{name}={value}" for name, value in flags.items()]
    printed = output_of(line, "nanoGPT's train.py did not run", cwd=args.checkout)
    # Its iteration 0 is an evaluation and a step; the last one printed is step max_iters + 1.
    times = [float(t) for t in PRINTED_TIME.findall(printed)][: args.steps]
    if len(times) < args.steps:
        raise ValueError(f"nanoGPT's train.py printed {len(times)} times, expected {args.steps}")
    windows = [times[i : i + WINDOW] for i in range(WINDOW, args.steps, WINDOW)]
    return statistics.median(statistics.mean(w) for w in windows)


def our_ms(loss: str, folder: Path, args) -> float:
    same = {name: getattr(args, name) for name in ("data", "tokenizer", "model", "seq_len", "batch", "steps")}
    same |= dict(device=args.device, cache=args.cache, eval_every=args.steps, lr=1e-3, sample_tokens=1)
    same |= dict(activation="gelu")  # nanoGPT's; GPT-2's own is the tanh form
    compiled = "--compile" if args.compile else "--no-compile"
    output_of(command("train_lm.py", compiled, out=folder, loss=loss, **same), "train_lm.py did not run")
    return read_json(folder / "summary.json")["ms_per_step_median"]


def write_text(args) -> Path:
    """A folder of text that our side reads. There is little to validate on: this measures training."""
    corpus = load_corpus(args.data, tokenizer=args.tokenizer, cache=args.cache)
    folder = args.out / "text"
    folder.mkdir(parents=True)
    for name, count in (("train", TRAIN_TOKENS), ("val", 2 * args.seq_len), ("test", 2 * args.seq_len)):
        tokens = np.asarray(corpus.train.tokens[:count]).tolist()
        (folder / f"{name}.txt").write_text(corpus.tokenizer.decode(tokens))
    return folder


def write_dataset(args) -> tuple[str, int]:
    """The same tokens in the checkout's data folder: nanoGPT's name for them, and the size of the vocabulary."""
    corpus = load_corpus(args.data, tokenizer=args.tokenizer, cache=args.cache)
    folder, vocab = args.checkout / "data" / "scorecast_race", corpus.tokenizer.vocab_size
    folder.mkdir(exist_ok=True)
    for name, tokens in (("train", corpus.train), ("val", corpus.val)):
        np.asarray(tokens.tokens).astype(np.uint16).tofile(folder / f"{name}.bin")
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": vocab}))
    return folder.name, vocab


@alive()
def main(argv: list[str] | None = None) -> int:
    parser = race_parser("nanogpt", __doc__)
    parser.add_argument("checkout", type=Path, help="a checkout of nanoGPT")
    parser.add_argument("--data", default="pydoc")
    parser.add_argument("--tokenizer", default="bpe:257", help="fixes the vocabulary of both (default: bytes and EOS)")
    parser.add_argument("--model", default="mini", choices=SIZES)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--steps", type=int, default=30, help="steps of one process")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    compiles = dict(action=argparse.BooleanOptionalAction, default=None)
    parser.add_argument("--compile", **compiles, help="torch.compile on both sides (default: on CUDA)")
    parser.add_argument("--cache", default="cache")
    parser.add_argument("--out", type=Path, default=Path("runs/race"))
    add_limits(parser)
    args = parser.parse_args(argv)
    args.compile = args.device == "cuda" if args.compile is None else args.compile
    with user_errors():
        if not (args.checkout / "train.py").is_file():
            raise ValueError(f"{args.checkout} is no checkout of nanoGPT (no train.py)")
        if args.steps < 2 * WINDOW or args.steps % WINDOW:
            raise ValueError(f"--steps {args.steps}: give a multiple of {WINDOW}, at least {2 * WINDOW}")
        check_least(args, rounds=1, rows=0, seconds=0)
        check_new(args.out)
        args.data = str(write_text(args))
        dataset, vocab = write_dataset(args)
        limits, rounds, failed = Limits(args.seconds, args.rows), [], []
        for i in range(args.rounds):
            if not limits.admit([f"round {i + 1}"], len(rounds)):
                continue
            try:
                row = {"nanogpt": nanogpt_ms(dataset, args)}
                row |= {loss: our_ms(loss, args.out / f"{loss}{i}", args) for loss in ("ce", "dpsm")}
            except ValueError as e:  # the next one may go through
                failed.append(f"round {i + 1}: {e}")
                print(failed[-1], file=sys.stderr, flush=True)
                continue
            rounds.append(row)
            print(f"round {i + 1}: " + ", ".join(f"{k} {v:.1f} ms" for k, v in row.items()), flush=True)
            result = write_rounds(rounds, vocab, args)
        limits.say()
        if not rounds:
            raise ValueError(failed[-1] if failed else f"--seconds {args.seconds} left no time for a round")
    ratios = f"ours with CE to nanoGPT {result['ce_over_nanogpt']:.3f}, ours DPSM to CE {result['dpsm_over_ce']:.3f}"
    print(f"tokens/s, as a ratio: {ratios} (medians of {len(rounds)} rounds; {args.out}/race.json)")
    return int(bool(failed))


def write_rounds(rounds: list[dict], vocab: int, args) -> dict:
    """race.json: the rounds so far, and what they say."""
    tokens = args.batch * args.seq_len
    ce, dpsm = (statistics.median(r[a] / r[b] for r in rounds) for a, b in (("nanogpt", "ce"), ("ce", "dpsm")))
    result = {"model": args.model, "compile": args.compile, "vocab": vocab, "batch": args.batch}
    result |= {"seq_len": args.seq_len, "rounds_ms": rounds}
    result["tokens_per_second"] = {k: tokens * 1000 / statistics.median(r[k] for r in rounds) for k in rounds[0]}
    result |= {"ce_over_nanogpt": ce, "dpsm_over_ce": dpsm}
    result["environment"] = environment(torch.device(args.device)) | {"git_diff": None}
    write_json(args.out / "race.json", result)
    return result


if __name__ == "__main__":
    sys.exit(main())
