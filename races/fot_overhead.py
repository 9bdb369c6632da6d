"""What FoT costs a training step, as a ratio within one run. The claim: under 0.2 % on a GPU, under 1 % on a CPU.

    python -m races.fot_overhead --shape gpt2 --csv runs/overhead-gpt2.csv              # GPT-2 124M, on a GPU
    python -m races.fot_overhead --shape gpt2 --batch 256 --steps 96                    # train_lm.py's own batch
    python -m races.fot_overhead --shape qwen3 --csv runs/overhead-qwen3.csv            # Qwen3-0.6B's shape, LoRA
    python -m races.fot_overhead --shape qwen3 --base nf4
    python -m races.fot_overhead --shape mini --device cpu --csv runs/overhead-mini.csv

Two models of the same weights take turns on the same random batches: one under the linear schedule, one under FoT with
every part that applies. The training step is that of train_lm.py or finetune_gsm8k.py without its log lines. FoT's cost
is concentrated in a few steps: two measurements and a decision in a window of W steps. So the shares are of whole
windows, and a window begins between two decisions, so that the wait for the device in one falls within.

On a GPU a turn is a window, without a synchronisation from outside. CUDA events time the parts of a step in further
windows that do not count. On a CPU a turn is one step, and the claim is judged by the CPU time of the process, to which
other programs add nothing; the time that passes stands beside it. The parts are in CPU time too.

The CSV is written after each window, and once more with the rows of the parts. --seconds ends the windows, and on a GPU
leaves out the parts; --rows 1 is the step alone.

FoT's cost hardly depends on the tokens of a step, so its share does. Say the batch with the share.
"""

import sys

if not __package__:  # a file by its name finds no package
    print("python -m races.fot_overhead: error: type it like this, in the folder that holds races/", file=sys.stderr)
    sys.exit(2)

import argparse
import copy
import math
import tempfile
import time
import warnings
from collections import defaultdict, namedtuple
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial, wraps
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch

from data.packing import Example, Rows, batch_indices, pack
from eval.answers import hidden_at
from kernels import linear_score
from kernels.bench.limits import Limits
from kernels.bench.rows import reason
from kernels.losses import ce
from model.decoder import Decoder
from model.decoder_hub import save_decoder
from model.gpt2 import GPT2, SIZES, GPT2Config, decay_groups
from model.lora import BASES, LoRAConfig, add_lora, block_parameters, load_base, segment_rms, set_segments
from races import common
from races.peft_gsm8k import SHAPES as QWEN3
from runtime.cli import user_errors
from runtime.machine import device_name, start_world, to_device
from runtime.optim import take_step
from schedules import FoT, Planned, make_rule
from schedules.commandline import alive

CLAIM = {"cuda": 0.2, "cpu": 1.0}  # per cent of the step
SIDES = ("linear", "fot")
FOT_PARTS = ("observe", "gradient statistics", "decision", "forecasts")  # FoT's alone
STEP_PARTS = ("forward and backward", "observe", "gradient statistics", "clipping", "optimizer", "schedule")
STEP_PARTS += ("decision", "forecasts")
PARTS = ("timed alone", *STEP_PARTS)
COLUMNS = ("part", "linear_ms", "fot_ms", "added_percent", "low_percent", "high_percent")
THIN = 8  # of finetune_gsm8k.py: of the prompt's tokens every so many go through the head
FEWEST_WINDOWS = 5  # the whole range of five holds the median with a chance of 15 in 16

# Tokens in the vocabulary and of a row, the batch (sequences; problems for Qwen3), rows in one forward.
Shape = namedtuple("Shape", "vocab seq_len batch micro_batch")
SHAPES = {
    "pico": Shape(512, 32, 8, 8),
    "nano": Shape(4096, 128, 16, 16),
    "mini": Shape(8192, 256, 8, 8),
    "gpt2": Shape(50257, 1024, 64, 16),
    "qwen3-tiny": Shape(300, 64, 8, 4),
    "qwen3-mini": Shape(8192, 320, 16, 8),
    "qwen3": Shape(151936, 512, 64, 16),
}


class Clock:
    """Splits the time of a step into parts: ``mark(part)`` ends the part that began at the last mark. On a CPU it reads
    CPU time; on a GPU it records CUDA events, which wait for nothing and measure the device's time, idling included."""

    def __init__(self, device: torch.device):
        self.device, self.on = device, False
        self.marks: list[tuple[str, float | torch.cuda.Event]] = []

    def mark(self, part: str) -> None:
        if self.on and self.device.type == "cuda":
            self.marks.append((part, torch.cuda.Event(enable_timing=True)))
            self.marks[-1][1].record()
        elif self.on:
            self.marks.append((part, time.process_time()))

    def take(self) -> dict[str, float]:
        """Milliseconds of each part since the last call; "" begins anew and is no part."""
        common.synchronize(self.device)
        total = defaultdict(float)
        for (_, before), (part, now) in zip(self.marks, self.marks[1:], strict=False):
            if part:
                total[part] += before.elapsed_time(now) if self.device.type == "cuda" else 1000 * (now - before)
        self.marks = []
        return total


@dataclass
class Side:
    """What a script holds of one of the two runs."""

    name: str
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    rule: Planned | FoT
    clock: Clock
    turns: list[tuple[float, float]] = field(default_factory=list)  # those that count: (seconds, of them CPU time)

    def __post_init__(self):
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.mark_around(self.optimizer, "step", "clipping", "optimizer")
        if isinstance(self.rule, FoT):
            self.mark_around(self.rule, "observe", "forward and backward", "observe")
            self.mark_around(self.rule.stats, "micro", "observe", "gradient statistics")
            self.mark_around(self.rule.stats, "sample", "optimizer", "gradient statistics")
            self.mark_around(self.rule.forecaster, "forecast", "decision", "forecasts")

    def mark_around(self, owner, name: str, before: str, part: str) -> None:
        """Makes a method of ``owner`` a part of its own; ``before`` is the part that it interrupts."""
        method = getattr(owner, name)

        @wraps(method)
        def marked(*args, **how):
            self.clock.mark(before)
            found = method(*args, **how)
            self.clock.mark(part)
            return found

        setattr(owner, name, marked)


def lm_parts(side: Side, tokens_BT: torch.Tensor, micro: int) -> Iterator[tuple]:
    """train_lm.py's forwards of tokens [B, T + 1]: (loss, NLL, tokens, what else `observe` takes) of each part."""
    device, splits = side.clock.device, side.rule.splits
    x, y = (to_device(t.contiguous(), device) for t in (tokens_BT[:, :-1], tokens_BT[:, 1:]))
    denominator = to_device(torch.tensor(float(y.numel())), device)
    rows = math.ceil(len(x) / 2) if splits and micro == len(x) else micro
    for i in range(0, len(x), rows):
        hidden, targets = side.model(x[i : i + rows]).flatten(0, 1), y[i : i + rows].flatten()
        loss, moments = linear_score(hidden, side.model.head_weight, targets, ce, denominator=denominator)
        share = rows / len(x) if splits and i == 0 else None
        yield loss, -moments.log_p.sum(), moments.valid.sum(), {"share": share}


def lora_parts(side: Side, rows: Rows, micro: int) -> Iterator[tuple]:
    """The same of finetune_gsm8k.py, the loss on the answers."""
    model, rule, device = side.model, side.rule, side.clock.device
    answers = int(rows.answer_RT.sum())
    if measured := rule.splits and len(rows) > 1:
        rows = rows[torch.randperm(len(rows))]
        micro = min(micro, math.ceil(len(rows) / 2))
    if rule.weighs_blocks:
        segment_rms(model)
    denominator = to_device(torch.tensor(float(answers)), device)
    for i in range(0, len(rows), micro):
        part = rows[i : i + micro]
        at, y, answer, inside = (to_device(t, device) for t in part.seen("answer", prompt=rule.gates, thin=THIN))
        if isinstance(rule, FoT):
            set_segments(model, part.answer_RT if rule.weighs_blocks else None)
        hidden = hidden_at(model, part, at, device)
        how = {"weights": inside.float(), "fisher": True} if rule.gates else {}
        loss, moments = linear_score(hidden, model.head_weight, y, ce, denominator=denominator, **how)
        valid = moments.valid & inside
        more = {"fisher": moments.fisher, "prompt": ~answer, "answer": answer} if rule.gates else {}
        more["share"] = len(part.positions("answer")) / answers if measured and i == 0 else None
        yield loss, -moments.log_p.where(valid, 0).sum(), valid.sum(), more


def train_step(side: Side, batch: torch.Tensor | Rows, args) -> None:
    """A step of either script, without its log lines."""
    side.clock.mark("")
    total = torch.zeros((), device=side.clock.device)
    micro = args.micro_batch
    if args.compile and isinstance(side.rule, FoT) and micro == args.batch:  # as train_lm.py: one shape for all steps
        micro = max(m for m in range(1, args.batch // 2 + 1) if args.batch % m == 0)
    for loss, nll, tokens, more in (lm_parts if args.shape in SIZES else lora_parts)(side, batch, micro):
        loss.backward()
        total += loss.detach()
        side.clock.mark("forward and backward")
        side.rule.observe(nll, tokens, **more)
    take_step(side.optimizer, side.parameters, 1.0, total)
    side.clock.mark("optimizer")
    decision = side.rule.step()
    side.clock.mark("decision" if decision else "schedule")


def zipf(shape: tuple[int, ...], vocab: int, seed: int) -> torch.Tensor:
    """Random tokens with the frequencies of words, p(rank) ~ 1 / rank, so that the loss falls and can be forecast."""
    weights = 1.0 / torch.arange(1, vocab + 1)
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(weights, math.prod(shape), replacement=True, generator=generator).view(shape)


def make_batches(args) -> Iterator[torch.Tensor | Rows]:
    """The steps' batches, on the CPU. Problems are as long as GSM8K's with Qwen3's tokenizer, in shares of a row."""
    if args.shape in SIZES:
        yield from (zipf((args.batch, args.seq_len + 1), args.vocab, step) for step in count())
    lengths = np.random.default_rng(0).uniform(0.12, 0.28, (max(256, args.batch), 2))
    problems = [
        Example(str(i), zipf((prompt + answer,), args.vocab, i).tolist(), max(prompt, 1))
        for i, (prompt, answer) in enumerate((lengths * args.seq_len).astype(int).tolist())
    ]
    for step in count():
        yield pack([problems[i] for i in batch_indices(len(problems), step, args.batch, 0)], args.seq_len)


def make_sides(args, device: torch.device, total: int) -> list[Side]:
    """Both runs, of ``total`` steps, from the same weights."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    if args.shape in SIZES:
        first = GPT2(GPT2Config(args.vocab, args.seq_len, **SIZES[args.shape]), dtype).to(device)
        models = [first, copy.deepcopy(first)]
        groups, adam = [decay_groups(model, 0.1) for model in models], dict(lr=6e-4, betas=(0.9, 0.95))
        for model in models if args.compile else ():
            model.compile()
    else:
        with tempfile.TemporaryDirectory() as folder:
            base = Path(folder) / "model"
            save_decoder(
                Decoder(QWEN3[args.shape.removeprefix("qwen3").strip("-") or "0.6b"]), base, dtype=torch.bfloat16
            )
            models = [load_base(base, args.base, dtype, device) for _ in SIDES]
        for model in models:
            add_lora(model, LoRAConfig(args.rank), torch.Generator().manual_seed(1))
        blocks = [{"params": p, "block": i} for i, p in enumerate(block_parameters(models[1]))]
        groups = [[p for p in models[0].parameters() if p.requires_grad], blocks]
        adam = dict(lr=2e-4, betas=(0.9, 0.999))
    sides = []
    for name, model, some in zip(SIDES, models, groups, strict=True):
        optimizer = torch.optim.AdamW(some, fused=True, **adam)
        rms = None if args.shape in SIZES else partial(segment_rms, model, reset=False)
        rule = make_rule(name, optimizer, total, warmup=0.03, every=args.window, block_rms=rms)
        sides.append(Side(name, model.train(), optimizer, rule, Clock(device)))
    return sides


def race(
    sides: list[Side], batches: Iterator, args, windows: int, *, counted: bool = True, after: Callable = lambda: True
) -> int:
    """``windows`` windows of W steps of every side, in turns, as long as ``after`` each gives True; how many were run.
    Who begins a turn alternates from turn to turn, and for
    the same step of a window from window to window. Those that do not count are clocked; on a CPU all are, as two
    readings of a clock cost nothing there."""
    for side in sides:
        side.clock.on = not counted or side.clock.device.type == "cpu"
    for window in range(windows):
        for turn in range(args.window // args.turn):
            shared = list(islice(batches, args.turn))
            for side in sides if (window + turn) % 2 == 0 else sides[::-1]:
                common.synchronize(side.clock.device)
                began, began_cpu = time.perf_counter(), time.process_time()
                for batch in shared:
                    train_step(side, batch, args)
                common.synchronize(side.clock.device)
                if counted:
                    side.turns.append((time.perf_counter() - began, time.process_time() - began_cpu))
        if not after():
            return window + 1
    return windows


def synchronisations(side: Side, batches: list, args) -> int:
    """How often the host waits for the GPU in these steps."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for batch in batches:
                train_step(side, batch, args)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(w.message) for w in caught)


def interval(shares: Sequence[float]) -> list[float]:
    """The median of the windows' shares and its 95 % bootstrap interval, 10,000 resamples of whole windows."""
    drawn = np.random.default_rng(0).choice(shares, (10_000, len(shares)))
    return [float(np.median(shares)), *np.quantile(np.median(drawn, axis=1), (0.025, 0.975)).tolist()]


def judge(low: float, high: float, claim: float, windows: int) -> str:
    """What the interval says of the claim."""
    if windows < FEWEST_WINDOWS:
        return f"open: {windows} windows are too few for an interval"
    return "held" if high < claim else "failed" if low > claim else "open: the interval has it inside"


def step_rows(sides: list[Side], args, cpu: bool) -> Iterator[dict]:
    """Rows of COLUMNS: the median step, and in CPU time on a CPU."""
    took = np.array([side.turns for side in sides]).reshape(len(sides), -1, args.window // args.turn, 2)
    for clock, name in enumerate(("step", "step, CPU time")[: 2 if cpu else 1]):
        linear, fot = took[..., clock].sum(2)  # of each window
        medians = (1000 * np.median(took[..., clock], (1, 2)) / args.turn).tolist()
        yield dict(zip(COLUMNS, (name, *medians, *interval(100 * (fot / linear - 1))), strict=True))


def part_rows(parts: list[dict[str, float]], steps: int) -> Iterator[dict]:
    """FoT's own parts together; then every part."""
    whole = sum(parts[0].values())
    costs = {"timed alone": (0.0, sum(parts[1][name] for name in FOT_PARTS))}
    costs |= {name: (parts[0][name], parts[1][name]) for name in STEP_PARTS}
    for name, (a, b) in costs.items():
        yield {"part": name, "linear_ms": a / steps, "fot_ms": b / steps, "added_percent": 100 * (b - a) / whole}


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, torch.device]:
    """The flags, with what depends on the shape and the device filled in. Raises ValueError for one out of range."""
    parser = common.race_parser("fot_overhead", __doc__)
    parser.add_argument("--shape", default="gpt2", choices=SHAPES, help="(default: %(default)s)")
    parser.add_argument("--batch", type=int, help="sequences, or problems for Qwen3, in a step (default: the shape's)")
    parser.add_argument("--micro-batch", type=int, help="rows in one forward (default: the shape's)")
    parser.add_argument("--seq-len", type=int, help="tokens of a row (default: the shape's)")
    parser.add_argument("--base", default="auto", choices=("auto", *BASES), help="Qwen3's; auto is bf16, fp32 on a CPU")
    parser.add_argument("--rank", type=int, default=64, help="LoRA: rank (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=160, help="that are counted, of each side (default: %(default)s)")
    parser.add_argument("--window", type=int, default=32, help="W, steps between decisions (default: %(default)s)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="a GPT-2 (default: on CUDA)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--csv", type=Path, help="file to write, after each window")
    common.add_limits(parser)
    args = parser.parse_args(argv)
    shape = SHAPES[args.shape]
    args.vocab = shape.vocab
    args.seq_len = shape.seq_len if args.seq_len is None else args.seq_len
    args.batch = shape.batch if args.batch is None else args.batch
    args.micro_batch = min(shape.micro_batch, args.batch) if args.micro_batch is None else args.micro_batch
    common.check_least(args, batch=2, micro_batch=1, seq_len=16, rank=1, window=8, rows=0, seconds=0)
    if args.window % 2:
        raise ValueError(f"--window {args.window}: expected an even number, windows are counted from half to half")
    if args.steps < 2 * args.window or args.steps % args.window:
        raise ValueError(f"--steps {args.steps}: expected a multiple of --window {args.window}, two or more")
    if args.shape in SIZES and args.batch % args.micro_batch:
        raise ValueError(f"--batch {args.batch} is not a multiple of --micro-batch {args.micro_batch}")
    device = start_world(args.device).device
    cuda = device.type == "cuda"
    args.turn = args.window if cuda else 1  # steps
    args.compile = cuda if args.compile is None else args.compile
    if args.base == "auto":
        args.base = "bf16" if cuda else "fp32"
    return args, device


@alive()
def main(argv: list[str] | None = None) -> int:
    with user_errors():
        args, device = parse(argv)
        cpu = device.type == "cpu"
        windows = args.steps // args.window
        further = 0 if cpu else max(1, windows // 4)
        # Twice what is run: the middle of a run, where FoT plans and no learning rate is 0.
        sides = make_sides(args, device, 2 * (args.steps + (3 + further) * args.window))
    batches = make_batches(args)
    trained = sum(p.numel() for p in sides[0].parameters) / 1e6
    print(
        f"{args.shape}, {args.batch} x {args.seq_len} in micro-batches of {args.micro_batch}, W = {args.window}: "
        f"{trained:.2f} M trained parameters on {device_name(device, threads=True)}",
        flush=True,
    )

    # A window and a half that do not count: compilation, the optimizer's state, the first measurement and decision.
    for batch in islice(batches, args.window + args.window // 2):
        for side in sides:
            train_step(side, batch, args)
    limits = Limits(args.seconds, args.rows)

    def after() -> bool:
        write(args, step_rows(sides, args, cpu), device)
        return not limits.over()

    ran = race(sides, batches, args, windows, after=after)
    limits.left_out += [f"window {i + 1}" for i in range(ran, windows)]
    windows, syncs, failed = ran, {}, False
    rows = list(step_rows(sides, args, cpu))
    judged = rows[1 if cpu else 0]
    limits.left_out += [row["part"] for row in rows[args.rows or len(rows) :]]
    if wanted := limits.admit(PARTS, len(rows), timed=not cpu):
        try:
            race(sides, batches, args, further, counted=False)
            parts = part_rows([side.clock.take() for side in sides], (further or windows) * args.window)
            rows += [row for row in parts if row["part"] in wanted]
            if not cpu:
                shared = list(islice(batches, args.window))
                syncs = {side.name: synchronisations(side, shared, args) for side in sides}
        except Exception as e:  # what a step takes is known all the same
            failed = True
            print(f"the parts of a step: {reason(e)}", file=sys.stderr, flush=True)
    limits.say()
    print(f"{'':22} {'linear ms':>10} {'FoT ms':>10} {'added %':>9}")
    for row in rows:
        bounds = f"   {row['low_percent']:.3f} to {row['high_percent']:.3f}" if "low_percent" in row else ""
        print(f"{row['part']:22} {row['linear_ms']:10.3f} {row['fot_ms']:10.3f} {row['added_percent']:9.3f}{bounds}")
    if syncs:
        print(f"synchronisations in {args.window} steps: {syncs['linear']} under linear, {syncs['fot']} under FoT")
    claim, low, high = CLAIM[device.type], judged["low_percent"], judged["high_percent"]
    print(
        f"FoT adds {judged['added_percent']:.3f} % {'of CPU time ' if cpu else ''}(median of {windows} windows, 95 % "
        f"bootstrap interval {low:.3f} to {high:.3f}); claim: under {claim} %: {judge(low, high, claim, windows)}",
        flush=True,
    )
    write(args, rows, device, syncs)
    if args.csv:
        print(args.csv)
    return int(failed)


def write(args, rows: Iterable[dict], device: torch.device, syncs: dict[str, int] | None = None) -> None:
    """The CSV, if one was asked for, with the rows that there are so far and that --rows allows."""
    if args.csv:
        names = ("shape", "batch", "micro_batch", "seq_len", "base", "rank", "steps", "window", "compile")
        without = ("base", "rank") if args.shape in SIZES else ("compile",)
        same = {name: getattr(args, name) for name in names} | dict.fromkeys(without, "")
        same |= {f"syncs_{side}": (syncs or {}).get(side, "") for side in SIDES}
        common.write_csv(args.csv, [*rows][: args.rows or None], same | common.here_and_now(device))


if __name__ == "__main__":
    sys.exit(main())
