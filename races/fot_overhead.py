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

FoT's cost hardly depends on the tokens of a step, so its share does. Say the batch with the share.
"""

import argparse
import copy
import math
import sys
import tempfile
import time
import warnings
from collections import defaultdict, namedtuple
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch

from data.packing import Example, Rows, batch_indices, pack
from kernels import linear_score
from kernels.losses import ce
from model.gpt2 import GPT2, SIZES, GPT2Config, decay_groups
from model.lora import BASES, LoRAConfig, add_lora, block_parameters, load_base, segment_rms, set_segments
from model.qwen3 import Qwen3, save_qwen3
from races import common
from races.peft_gsm8k import SHAPES as QWEN3
from runtime.cli import user_errors
from runtime.machine import start_world, to_device
from schedules.fot import FoT
from schedules.rules import lr_factor

CLAIM = {"cuda": 0.2, "cpu": 1.0}  # per cent of the step
SIDES = ("linear", "fot")
FOT_PARTS = ("observe", "gradient statistics", "decision", "forecasts")  # FoT's alone
STEP_PARTS = ("forward and backward", "observe", "gradient statistics", "clipping", "optimizer", "schedule")
STEP_PARTS += ("decision", "forecasts")
COLUMNS = ("part", "linear_ms", "fot_ms", "added_percent", "low_percent", "high_percent")
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
    """Splits the time of a step into parts: ``mark(part)`` ends the part that began at the last mark.

    On a CPU it reads CPU time. On a GPU it records CUDA events, which wait for nothing; they measure the device's time,
    its idling included.
    """

    def __init__(self, device: torch.device):
        self.device, self.on = device, False
        self.marks: list[tuple[str, float | torch.cuda.Event]] = []

    def mark(self, part: str) -> None:
        if not self.on:
            return
        if self.device.type == "cuda":
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.process_time()
        self.marks.append((part, now))

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
    parameters: list[torch.nn.Parameter]
    lr: float
    total: int  # steps that the schedule is made for
    clock: Clock
    fot: FoT | None = None
    steps: int = 0
    turns: list[tuple[float, float]] = field(default_factory=list)  # those that count: (seconds, of them CPU time)

    def __post_init__(self):
        if self.fot:
            self.mark_around(self.fot.stats, "sample", "optimizer", "gradient statistics")
            self.mark_around(self.fot.forecaster, "forecast", "decision", "forecasts")

    def mark_around(self, owner, name: str, before: str, part: str) -> None:
        """Makes a method of ``owner`` a part of its own; ``before`` is the part that it interrupts."""
        method = getattr(owner, name)

        def marked(*args):
            self.clock.mark(before)
            found = method(*args)
            self.clock.mark(part)
            return found

        setattr(owner, name, marked)


def lm_step(side: Side, tokens_BT: torch.Tensor, micro: int) -> None:
    """train_lm.py's step; tokens [B, T + 1] on the CPU."""
    model, fot, device = side.model, side.fot, side.clock.device
    x, y = (to_device(t.contiguous(), device) for t in (tokens_BT[:, :-1], tokens_BT[:, 1:]))
    denominator = to_device(torch.tensor(float(y.numel())), device)
    begin(side)
    measured = fot is not None and fot.splits
    rows = math.ceil(len(x) / 2) if measured and micro == len(x) else micro
    loss = torch.zeros((), device=device)
    for i in range(0, len(x), rows):
        hidden = model(x[i : i + rows]).flatten(0, 1)
        part, moments = linear_score(hidden, model.head_weight, y[i : i + rows].flatten(), ce, denominator=denominator)
        part.backward()
        loss += part.detach()
        side.clock.mark("forward and backward")
        if fot:
            fot.observe(-moments.log_p.sum(), moments.valid.sum())
            side.clock.mark("observe")
            if measured and i == 0:
                fot.stats.micro(min(rows, len(x)) / len(x))
                side.clock.mark("gradient statistics")
    end(side, loss)


def lora_step(side: Side, rows: Rows, micro: int) -> None:
    """finetune_gsm8k.py's step, the loss on the answers."""
    model, fot, device = side.model, side.fot, side.clock.device
    count = int(rows.answer_RT.sum())
    begin(side)
    deciding = fot is not None and (side.steps + 1) % fot.every == 0
    measured = fot is not None and fot.splits and len(rows) > 1
    if deciding:
        segment_rms(model)
    if measured:
        rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(side.steps))]
        micro = min(micro, math.ceil(len(rows) / 2))
    denominator, loss = to_device(torch.tensor(float(count)), device), torch.zeros((), device=device)
    for i in range(0, len(rows), micro):
        part = rows[i : i + micro]
        if fot:
            set_segments(model, part.answer_RT if deciding else None)
        at = part.positions("all" if deciding else "answer")
        answer = to_device(part.answer_RT.flatten()[at], device)
        y, at = to_device(part.targets_RT.flatten()[at], device), to_device(at, device)
        hidden = model(to_device(part.tokens_RT, device), documents_BT=to_device(part.documents_RT, device))
        weights = answer.float() if deciding else None
        hidden = hidden.flatten(0, 1).index_select(0, at)
        part_loss, moments = linear_score(
            hidden, model.head_weight, y, ce, denominator=denominator, weights=weights, fisher=deciding
        )
        part_loss.backward()
        loss += part_loss.detach()
        side.clock.mark("forward and backward")
        if fot:
            if deciding:
                fot.observe(0.0, 0.0, fisher=moments.fisher, prompt=~answer, answer=answer)
            valid = moments.valid & answer
            fot.observe(-moments.log_p.where(valid, 0).sum(), valid.sum())
            side.clock.mark("observe")
            if measured and i == 0:
                fot.stats.micro(len(part.positions("answer")) / count)
                side.clock.mark("gradient statistics")
    end(side, loss)


def begin(side: Side) -> None:
    side.clock.mark("")
    if side.fot is None:
        for group in side.optimizer.param_groups:
            group["lr"] = side.lr * lr_factor("linear", side.steps, side.total, warmup=0.03)
    side.clock.mark("schedule")


def end(side: Side, loss: torch.Tensor) -> None:
    norm = torch.nn.utils.clip_grad_norm_(side.parameters, 1.0)
    if side.fot:
        side.fot.clipped_by = norm.clamp(min=1)
    side.optimizer.found_inf = (~(torch.isfinite(norm) & torch.isfinite(loss))).float()
    side.clock.mark("clipping")
    side.optimizer.step()
    side.optimizer.zero_grad(set_to_none=True)
    side.clock.mark("optimizer")
    side.steps += 1
    if side.fot:
        side.clock.mark("decision" if side.fot.step() else "schedule")


def zipf(shape: tuple[int, ...], vocab: int, seed: int) -> torch.Tensor:
    """Random tokens with the frequencies of words, p(rank) ~ 1 / rank, so that the loss falls and can be forecast."""
    weights = 1.0 / torch.arange(1, vocab + 1)
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(weights, math.prod(shape), replacement=True, generator=generator).view(shape)


def make_batches(args) -> Callable[[int], torch.Tensor | Rows]:
    """The batch of a step, on the CPU. Problems are as long as GSM8K's with Qwen3's tokenizer, in shares of a row."""
    vocab = SHAPES[args.shape].vocab
    if args.shape in SIZES:
        return lambda step: zipf((args.batch, args.seq_len + 1), vocab, step)
    lengths = np.random.default_rng(0).uniform(0.12, 0.28, (max(256, args.batch), 2))
    problems = []
    for i, (prompt, answer) in enumerate((lengths * args.seq_len).astype(int).tolist()):
        problems.append(Example(str(i), zipf((prompt + answer,), vocab, i).tolist(), max(prompt, 1)))
    return lambda step: pack([problems[i] for i in batch_indices(len(problems), step, args.batch, 0)], args.seq_len)


def make_sides(args, device: torch.device, total: int) -> list[Side]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    if args.shape in SIZES:
        first = GPT2(GPT2Config(SHAPES[args.shape].vocab, args.seq_len, **SIZES[args.shape]), dtype).to(device)
        models = [first, copy.deepcopy(first)]
        groups, lr, betas = [decay_groups(model, 0.1) for model in models], 6e-4, (0.9, 0.95)
        if args.compile:
            for model in models:
                model.compile()
    else:
        with tempfile.TemporaryDirectory() as folder:
            base = Path(folder) / "model"
            save_qwen3(Qwen3(QWEN3[args.shape.removeprefix("qwen3").strip("-") or "0.6b"]), base, dtype=torch.bfloat16)
            models = [load_base(base, args.base, dtype, device) for _ in SIDES]
        for model in models:
            add_lora(model, LoRAConfig(args.rank), torch.Generator().manual_seed(1))
        blocks = [{"params": p, "block": i} for i, p in enumerate(block_parameters(models[1]))]
        groups, lr, betas = [[p for p in models[0].parameters() if p.requires_grad], blocks], 2e-4, (0.9, 0.999)
    sides = []
    for name, model, some in zip(SIDES, models, groups, strict=True):
        model.train()
        optimizer = torch.optim.AdamW(some, lr=lr, betas=betas, fused=True)
        parameters, fot = [p for p in model.parameters() if p.requires_grad], None
        if name == "fot":
            rms = None if args.shape in SIZES else partial(segment_rms, model, reset=False)
            fot = FoT(optimizer, total, warmup=0.03, every=args.window, block_rms=rms)
        sides.append(Side(name, model, optimizer, parameters, lr, total, Clock(device), fot))
    return sides


def train_step_of(args) -> Callable[[Side, torch.Tensor | Rows], None]:
    return partial(lm_step if args.shape in SIZES else lora_step, micro=args.micro_batch)


def race(sides: list[Side], batch_of: Callable, args, windows: int, *, count: bool = True) -> None:
    """``windows`` windows of W steps of every side, in turns. Who begins a turn alternates from turn to turn, and for
    the same step of a window from window to window."""
    train_step = train_step_of(args)
    device = sides[0].clock.device
    for window in range(windows):
        for turn in range(args.window // args.turn):
            batches = [batch_of(sides[0].steps + i) for i in range(args.turn)]
            for side in sides if (window + turn) % 2 == 0 else sides[::-1]:
                common.synchronize(device)
                began, began_cpu = time.perf_counter(), time.process_time()
                for batch in batches:
                    train_step(side, batch)
                common.synchronize(device)
                if count:
                    side.turns.append((time.perf_counter() - began, time.process_time() - began_cpu))


def synchronisations(side: Side, batch_of: Callable, args) -> int:
    """How often the host waits for the GPU in a window's steps."""
    train_step = train_step_of(args)
    batches = [batch_of(side.steps + i) for i in range(args.window)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for batch in batches:
                train_step(side, batch)
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


def cost_rows(sides: list[Side], parts: list[dict[str, float]], steps: int, args, cpu: bool) -> Iterator[dict]:
    """Rows of COLUMNS: the median step, and in CPU time on a CPU; FoT's own parts together; then every part."""
    took = np.array([side.turns for side in sides]).reshape(len(sides), -1, args.window // args.turn, 2)
    for clock, name in enumerate(("step", "step, CPU time")[: 2 if cpu else 1]):
        linear, fot = took[..., clock].sum(2)  # of each window
        medians = (1000 * np.median(took[..., clock], (1, 2)) / args.turn).tolist()
        yield dict(zip(COLUMNS, (name, *medians, *interval(100 * (fot / linear - 1))), strict=True))
    whole = sum(parts[0].values())
    timed = sum(parts[1][name] for name in FOT_PARTS)
    yield {"part": "timed alone", "linear_ms": 0.0, "fot_ms": timed / steps, "added_percent": 100 * timed / whole}
    for name in STEP_PARTS:
        a, b = parts[0][name], parts[1][name]
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
    parser.add_argument("--csv", type=Path, help="file to write")
    args = parser.parse_args(argv)
    shape = SHAPES[args.shape]
    args.seq_len = shape.seq_len if args.seq_len is None else args.seq_len
    args.batch = shape.batch if args.batch is None else args.batch
    args.micro_batch = min(shape.micro_batch, args.batch) if args.micro_batch is None else args.micro_batch
    common.check_least(args, batch=2, micro_batch=1, seq_len=16, rank=1, window=8)
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


def main(argv: list[str] | None = None) -> int:
    with user_errors():
        args, device = parse(argv)
        cpu = device.type == "cpu"
        if not cpu:
            torch.set_float32_matmul_precision("high")
        windows = args.steps // args.window
        further = 0 if cpu else max(1, windows // 4)
        # Twice what is run: the middle of a run, where FoT plans and no learning rate is 0.
        sides = make_sides(args, device, 2 * (args.steps + (3 + further) * args.window))
    batch_of, train_step = make_batches(args), train_step_of(args)
    trained = sum(p.numel() for p in sides[0].parameters) / 1e6
    print(
        f"{args.shape}, {args.batch} x {args.seq_len} in micro-batches of {args.micro_batch}, W = {args.window}: "
        f"{trained:.2f} M trained parameters on {common.device_name(device)}",
        flush=True,
    )

    # A window and a half that do not count: compilation, the optimizer's state, the first measurement and decision.
    for step in range(args.window + args.window // 2):
        for side in sides:
            train_step(side, batch_of(step))
    for side in sides:
        side.clock.on = cpu  # two readings of a clock cost nothing there
    race(sides, batch_of, args, windows)
    if further:
        for side in sides:
            side.clock.on = True
        race(sides, batch_of, args, further, count=False)
    parts = [side.clock.take() for side in sides]
    for side in sides:
        side.clock.on = False
    syncs = {} if cpu else {side.name: synchronisations(side, batch_of, args) for side in sides}

    rows = list(cost_rows(sides, parts, (further or windows) * args.window, args, cpu))
    print(f"{'':22} {'linear ms':>10} {'FoT ms':>10} {'added %':>9}")
    for row in rows:
        bounds = f"   {row['low_percent']:.3f} to {row['high_percent']:.3f}" if "low_percent" in row else ""
        print(f"{row['part']:22} {row['linear_ms']:10.3f} {row['fot_ms']:10.3f} {row['added_percent']:9.3f}{bounds}")
    if syncs:
        print(f"synchronisations in {args.window} steps: {syncs['linear']} under linear, {syncs['fot']} under FoT")
    judged, claim = rows[1 if cpu else 0], CLAIM[device.type]
    low, high = judged["low_percent"], judged["high_percent"]
    print(
        f"FoT adds {judged['added_percent']:.3f} % {'of CPU time ' if cpu else ''}(median of {windows} windows, 95 % "
        f"bootstrap interval {low:.3f} to {high:.3f}); claim: under {claim} %: {judge(low, high, claim, windows)}",
        flush=True,
    )
    if args.csv:
        names = ("shape", "batch", "micro_batch", "seq_len", "base", "rank", "steps", "window", "compile")
        without = ("base", "rank") if args.shape in SIZES else ("compile",)
        same = {name: getattr(args, name) for name in names} | dict.fromkeys(without, "")
        same |= {f"syncs_{side}": syncs.get(side, "") for side in SIDES}
        common.write_csv(args.csv, rows, same | common.here_and_now(device))
        print(args.csv)
    return 0


if __name__ == "__main__":
    sys.exit(main())
