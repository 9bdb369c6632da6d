"""Training and generation beside transformers' own BART: same shapes, batch, dtype and optimizer, random weights.

    python -m races.transformers_seq2seq bart-base                                        # one GPU: 64 x 1024, bf16
    python -m races.transformers_seq2seq bart-large --compile both --rounds 5 --out runs/race_large
    python -m races.transformers_seq2seq bart-tiny --batch 4 --source 64 --target 16      # a CPU, in seconds

The sides take turns: transformers, ours with CE, ours with DPSM, transformers, and so on. Each turn builds its model
anew, so that peak memory is its own, and warms up before it is timed. A step is forward, loss, backward, clipping and
fused AdamW, on full batches without padding. Tokens are those of sources and targets. Where memory ends, the batch is
halved for all sides. Generation runs every row to --new-tokens. In bf16, transformers trains under autocast, as its
Trainer does, and both generate from bf16 weights. Peak memory is measured on CUDA only.
"""

import sys

if not __package__:  # a file by its name finds no package
    print(
        "python -m races.transformers_seq2seq: error: type it like this, in the folder that holds races/",
        file=sys.stderr,
    )
    sys.exit(2)

import argparse
import statistics
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from kernels import linear_score
from kernels.bench.timing import time_once
from kernels.losses import make_score
from model.beam import Decoding
from model.generate import generate
from model.gpt2 import decay_groups
from model.seq2seq import SIZES, Seq2Seq, Seq2SeqConfig
from races import common
from runtime.cli import user_errors
from runtime.folder import environment, write_json
from runtime.machine import device_name
from schedules.commandline import alive, package

SIDES = ("transformers", "ce", "dpsm")


def their_model(config: Seq2SeqConfig, dtype: torch.dtype, device: torch.device):
    """transformers' BART of the same shape and rates, randomly initialised."""
    library = package("transformers", "the race")
    theirs = library.BartConfig(**asdict(config), forced_eos_token_id=None, attn_implementation="sdpa")
    return library.BartForConditionalGeneration(theirs).to(device, dtype)


def train_turn(side: str, config: Seq2SeqConfig, batch: int, args) -> float:
    """Median milliseconds of --steps training steps after --warm ones, of one side."""
    device, theirs = args.device, side == "transformers"
    model = their_model(config, torch.float32, device) if theirs else Seq2Seq(config, args.dtype).to(device)
    model.train()
    if args.compile == "both" and theirs:
        model.compile()
    elif args.compile != "none" and not theirs:
        for layer in (*model.encoder.layers, *model.decoder.layers):
            layer.encode, layer.decode = torch.compile(layer.encode), torch.compile(layer.decode)
    optimizer = torch.optim.AdamW(decay_groups(model, 0.01), lr=3e-5, fused=True)
    score = make_score("dpsm" if side == "dpsm" else "ce", alpha=torch.tensor(0.5, device=device))
    source = torch.randint(5, config.vocab_size, (batch, args.source), device=device)
    labels = torch.randint(5, config.vocab_size, (batch, args.target), device=device)

    def step() -> None:
        if theirs:
            with torch.autocast(device.type, args.dtype, enabled=args.dtype != torch.float32):
                loss = model(input_ids=source, labels=labels).loss
        else:
            hidden = model(source, None, model.shift_right(labels)).flatten(0, 1)
            loss, _ = linear_score(hidden, model.head_weight, labels.flatten(), score, bias=model.head_bias)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    seconds = [time_once(step, device.type) for _ in range(args.warm + args.steps)]
    return 1000 * statistics.median(seconds[args.warm :])


@torch.no_grad()
def generate_turn(side: str, config: Seq2SeqConfig, batch: int, args) -> float:
    """Milliseconds of generating --new-tokens for a whole batch, the faster of two after one that warms up."""
    device, n, theirs = args.device, args.new_tokens, side == "transformers"
    model = their_model(config, args.dtype, device) if theirs else Seq2Seq(config, args.dtype).to(device, args.dtype)
    model.eval()
    source = torch.randint(5, config.vocab_size, (batch, args.source), device=device)
    options = Decoding(n, n, args.beams, eos_id=config.eos_token_id, pad_id=config.pad_token_id)
    like = dict(num_beams=args.beams, min_new_tokens=n, max_new_tokens=n, do_sample=False, early_stopping=False)
    lengths = []

    def run() -> None:
        if theirs:
            made = model.generate(source, attention_mask=torch.ones_like(source), **like)[:, 1:]
        else:
            made = generate(model, source, options, compile=None if args.compile == "none" else {}).tokens
        lengths.append(made.shape[-1])

    seconds = [time_once(run, device.type) for _ in range(3)]
    if set(lengths) != {n}:
        raise ValueError(f"{side} generated {lengths} tokens, expected {n}: there is nothing to compare")
    return 1000 * min(seconds[1:])


# Of a task: how a turn is measured, and who takes part. A score does not change decoding.
TASKS = {"train": (train_turn, SIDES), "generate": (generate_turn, SIDES[:2])}


def turns(task: str, config: Seq2SeqConfig, args, batch: int) -> dict[str, tuple[float, int | None]]:
    """{side: (milliseconds, peak bytes on CUDA)}, a turn each."""
    return {side: turn(task, side, config, args, batch) for side in TASKS[task][1]}


def turn(task: str, side: str, config: Seq2SeqConfig, args, batch: int) -> tuple[float, int | None]:
    """(milliseconds, peak bytes on CUDA)"""
    common.forget_peak(args.device)
    torch.manual_seed(0)
    return TASKS[task][0](side, config, batch, args), common.cuda_peak(args.device)


@alive()
def main(argv: list[str] | None = None) -> int:
    parser = common.race_parser("transformers_seq2seq", __doc__)
    parser.add_argument("model", choices=[name for name in SIZES if name.startswith("bart")])
    parser.add_argument("--batch", type=int, default=64, help="pairs in a step, halved until they fit (default: 64)")
    parser.add_argument("--source", type=int, default=1024, help="tokens of a source (default: 1024)")
    parser.add_argument("--target", type=int, default=128, help="tokens of a target (default: 128)")
    parser.add_argument("--vocab", type=int, default=50265, help="tokens in the vocabulary (default: BART's)")
    parser.add_argument("--dropout", type=float, default=0.1, help="both rates, as in the recipe (default: 0.1)")
    parser.add_argument("--steps", type=int, default=10, help="timed training steps a turn (default: 10)")
    parser.add_argument("--warm", type=int, default=3, help="steps before them (default: 3)")
    parser.add_argument("--beams", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--generate-batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    compiled = "torch.compile of training; ours' decoding too"
    parser.add_argument("--compile", choices=("none", "ours", "both"), default="none", help=compiled)
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: bf16 on CUDA")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, default=Path("runs/race_transformers"))
    common.add_limits(parser, TASKS)
    args = parser.parse_args(argv)
    with user_errors():
        common.check_least(args, batch=1, source=1, target=1, steps=1, warm=0, beams=2, new_tokens=1, generate_batch=1)
        common.check_least(args, rounds=1, vocab=16, rows=0, seconds=0)
        common.check_new(args.out)
        args.device = torch.device(args.device)
        bf16 = args.dtype == "bfloat16" or (args.dtype == "auto" and args.device.type == "cuda")
        args.dtype = torch.bfloat16 if bf16 else torch.float32
        longest = max(args.source, args.target, args.new_tokens + 1)
        config = SIZES[args.model](vocab_size=args.vocab, dropout=args.dropout, attention_dropout=args.dropout)
        if longest > config.max_position_embeddings:
            raise ValueError(f"{longest} tokens are more than the {config.max_position_embeddings} positions of BART")
        their_model(SIZES["bart-tiny"](vocab_size=16), torch.float32, torch.device("cpu"))  # is the package there?
        batches = {"train": args.batch, "generate": args.generate_batch}
        batches = {task: batches[task] for task in common.chosen(args.only, TASKS)}
        args.out.mkdir(parents=True)
    rows = common.Turns(args.out / "race.csv", about(args), args.seconds, args.rows)
    if args.device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        trial = argparse.Namespace(**vars(args) | {"steps": 1})
        complaint = "a batch of one does not fit on this device; choose a smaller model"
        for task, batch in list(batches.items()):
            try:
                batches[task] = common.largest_that_fits(partial(turns, task, config, trial), batch, complaint)
            except Exception as e:  # the other task may go through
                rows.fail({"task": task}, e)
                del batches[task]
    tokens = {"train": args.source + args.target, "generate": args.new_tokens}  # of a row of the batch
    for i in range(args.rounds):
        for task, batch in batches.items():
            shown = []
            for side in TASKS[task][1]:
                key = {"round": i, "task": task, "side": side, "batch": batch}

                def measure(task=task, side=side, batch=batch) -> dict:
                    ms, peak = turn(task, side, config, args, batch)
                    rate = 1000 * batch * tokens[task] / ms
                    return {"ms": ms, "tokens_per_second": rate, "peak_memory_bytes": peak}

                if row := rows.take(key, measure):
                    peak = row["peak_memory_bytes"]
                    shown.append(
                        f"{side} {row['tokens_per_second']:,.0f}" + (f" ({peak / 1e9:.2f} GB)" if peak else "")
                    )
            if shown:
                print(f"round {i + 1}, {task}, tokens/s at batch {batch}: {', '.join(shown)}", flush=True)
    write_results(rows, args)
    return rows.ended()


def about(args) -> dict:
    """What is the same in all rows: sizes, where and when."""
    import transformers

    same = {"model": args.model, "source": args.source, "target": args.target, "dtype": str(args.dtype).split(".")[1]}
    same |= {"compile": args.compile, "beams": args.beams, "new_tokens": args.new_tokens}
    same |= {"device": device_name(args.device, threads=True), "torch": torch.__version__}
    return same | {"transformers": transformers.__version__, "date": common.today()}


def write_results(rows: common.Turns, args) -> None:
    """race.json, with the rows and the ratios that are printed."""
    env = environment(args.device) | {"git_diff": None}

    def ratio(task: str, side: str, base: str) -> float:
        return common.median_ratio((row for row in rows if row["task"] == task), "tokens_per_second", side, base)

    compared = (("ce", "transformers"), ("dpsm", "transformers"), ("dpsm", "ce"))
    ratios = {f"train_{side}_over_{base}": ratio("train", side, base) for side, base in compared}
    ratios["generate_over_transformers"] = ratio("generate", "ce", "transformers")
    ratios = {name: value for name, value in ratios.items() if value is not None}
    write_json(args.out / "race.json", rows.same | ratios | {"rows": rows, "environment": env})
    shown = ", ".join(f"{name} {value:.3f}" for name, value in ratios.items())
    print(f"tokens/s as a ratio, medians of {args.rounds} rounds: {shown} ({args.out / 'race.csv'})")


if __name__ == "__main__":
    sys.exit(main())
