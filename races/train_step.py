"""A whole training step of a GPT-2, DPSM through linear_score against torch's cross-entropy through logits.

    python -m races.train_step --csv step.csv
    python -m kernels.bench --claims --train-step-csv step.csv      # what is claimed of it

One model and one AdamW serve all sides, which take turns step by step: GPT-2 124M on 8 x 1024 random tokens, blocks
under torch.compile; on CPU a tiny one. Weights are fp32, --dtype is that of the activations. Peak memory is what a step
needs beyond weights and optimizer state.
"""

import sys

if not __package__:  # a file by its name finds no package
    print("python -m races.train_step: error: type it like this, in the folder that holds races/", file=sys.stderr)
    sys.exit(2)

from functools import partial

import torch
import torch.nn.functional as F

from kernels import ce, dpsm, linear_score
from kernels.bench import timing
from kernels.bench.limits import Limits
from kernels.bench.providers import ALPHA
from kernels.bench.rows import Rows
from model.gpt2 import GPT2, GPT2Config, decay_groups
from races.common import race_parser
from schedules.commandline import alive

GPU_SHAPE = GPT2Config(block_size=1024, vocab_size=50257, n_layer=12, n_head=12, n_embd=768)
CPU_SHAPE = GPT2Config(block_size=32, vocab_size=509, n_layer=2, n_head=2, n_embd=32)
BASE = "step: torch CE"


def sides(device: str) -> dict:
    """{name: loss of (hidden [N, D], weight [V, D], targets [N])}."""

    def through_logits(h, w, y):
        return F.cross_entropy(F.linear(h, w.to(h.dtype)), y)

    score = dpsm(ALPHA)
    found = {
        BASE: through_logits,
        "step: our CE": lambda h, w, y: linear_score(h, w, y, ce)[0],
        "step: DPSM, Fisher": lambda h, w, y: linear_score(h, w, y, score, fisher=True)[0],
    }
    if device == "cuda":
        found["step: compiled torch CE"] = torch.compile(through_logits, dynamic=False)  # V a constant
    return found


def train_step(device: str, dtype: str, repeats: int, rows: Rows, only: str = "") -> None:
    """Adds one row a side whose name holds ``only``; of one that fails the row says why."""
    batch, shape = (8, GPU_SHAPE) if device == "cuda" else (2, CPU_SHAPE)
    torch.manual_seed(0)
    model = GPT2(shape, dtype=timing.DTYPE_OF[dtype]).to(device)
    if device == "cuda":
        for part in model.h:
            part.compile()
    optimizer = torch.optim.AdamW(decay_groups(model, 0.1), lr=1e-4, fused=True)
    v, d, block = shape.vocab_size, shape.n_embd, shape.block_size
    tokens = torch.randint(v, (batch, block + 1), device=device)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].flatten()

    def step(loss_of):
        hidden = model(inputs).flatten(0, 1)
        loss_of(hidden, model.head_weight, targets).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    what = f"training step, {batch} x {block} tokens, {shape.n_layer} layers, D={d}, V={v}, {dtype}"
    columns = ("step_ms", "ratio_to_torch_ce", "tokens_per_s", "peak_bytes")
    rows.begin(f"{what} on {rows.about['device']}", "provider", *columns)
    common, jobs = dict(n=batch * block, v=v, d=d, dtype=dtype), {}
    for name, loss_of in sides(device).items():
        if only in name and rows.admit([name], beside=len(jobs)):
            with rows.part(name, **common):
                optimizer.zero_grad(set_to_none=True)
                step(loss_of)
                jobs[name] = partial(step, loss_of)
    with rows.part("all sides", **common):
        times = timing.time_in_turns(jobs, device, repeats)
        for name, job in jobs.items():
            ms, ratio = timing.median_ms(times, name), timing.median_ratio(times, name, BASE)
            row = dict(provider=name, **common, step_ms=ms, ratio_to_torch_ce=ratio)
            peak = timing.cuda_peak(job) if device == "cuda" else None
            rows.add(row | dict(tokens_per_s=1e3 * batch * block / ms, peak_bytes=peak, repeats=repeats))


@alive()
def main(argv=None) -> int:
    parser = race_parser("train_step", __doc__)
    timing.add_options(parser)
    parser.add_argument("--only", default="", help="sides whose name holds this (default: all)")
    args = parser.parse_args(argv)
    if wrong := timing.fill_options(args):
        print(f"python -m races.train_step: error: {wrong}", file=sys.stderr)
        return 2
    if not any(args.only in name for name in sides("cpu")):
        print(f"races.train_step: --only {args.only}: the sides are {', '.join(sides('cpu'))}", file=sys.stderr)
        return 2
    rows = Rows(args.device, args.csv, limits=Limits(args.seconds, args.rows))
    train_step(args.device, args.dtype, args.repeats, rows, args.only)
    rows.limits.say()
    return int(rows.failed)


if __name__ == "__main__":
    sys.exit(main())
