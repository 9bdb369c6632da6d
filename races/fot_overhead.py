"""What FoT costs a training step, as a ratio within one run. The claim: under 0.2 % on a GPU, under 1 % on a CPU.

    python -m races.fot_overhead --shape gpt2 --csv runs/overhead-gpt2.csv              # GPT-2 124M, on a GPU
    python -m races.fot_overhead --shape gpt2 --batch 256 --steps 96                    # train_lm.py's own batch
    python -m races.fot_overhead --shape qwen3 --csv runs/overhead-qwen3.csv            # Qwen3-0.6B's shape, LoRA
    python -m races.fot_overhead --shape qwen3 --base nf4
    python -m races.fot_overhead --shape mini --device cpu --csv runs/overhead-mini.csv

Two models of the same weights take turns on the same random batches, because machines are shared and drift: one under
the linear schedule, one under FoT with every part that applies. The training step is that of train_lm.py or of
finetune_gsm8k.py without its log lines, which cost both the same. FoT's cost is concentrated in a few steps (two
measurements and a decision every W), so the shares are of whole windows of W steps; a window begins between two
decisions, so that the wait for the device in one falls within. On a GPU a turn is a window without a synchronisation
from outside, and the parts of a step are timed by CUDA events in further windows that are not counted. On a CPU a turn
is one step, and beside the time that passes stands the process's CPU time, in which other programs have no part: on a
machine with others on it the claim is judged by that. The parts are in CPU time too.

What FoT costs hardly depends on the tokens of a step, its share therefore does: say the batch with the share.
"""

import argparse
import copy
import csv
import datetime
import io
import math
import statistics
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
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
from model.qwen3 import Qwen3
from model.qwen3_hub import save_qwen3
from races.peft_gsm8k import SHAPES as QWEN3
from races.peft_gsm8k import versions
from runtime.cli import user_errors
from runtime.folder import write_bytes
from runtime.machine import start_world, to_device
from schedules.fot import FoT
from schedules.rules import lr_factor

CLAIM = {"cuda": 0.2, "cpu": 1.0}  # per cent of the step
# Vocabulary, tokens of a row, batch (sequences; problems for Qwen3), rows of a micro-batch.
SHAPES = {
    "pico": (512, 32, 8, 8),
    "nano": (4096, 128, 16, 16),
    "mini": (8192, 256, 8, 8),
    "gpt2": (50257, 1024, 64, 16),
    "qwen3-tiny": (300, 64, 8, 4),
    "qwen3-mini": (8192, 320, 16, 8),
    "qwen3": (151936, 512, 64, 16),
}
SIDES = ("linear", "fot")
PARTS = ("forward and backward", "observe", "gradient statistics", "clipping", "optimizer", "schedule", "decision",
         "forecasts")  # fmt: skip
FIELDS = ("part", "linear_ms", "fot_ms", "added_percent", "low_percent", "high_percent")


class Clock:
    """Splits the time of a step into parts: ``mark(part)`` ends the part that began at the last mark. By CPU time on a
    CPU; on a GPU by CUDA events, which wait for nothing and measure the device's time, its idling included."""

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
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        total = defaultdict(float)
        for (_, before), (part, now) in zip(self.marks, self.marks[1:], strict=False):
            if part:
                total[part] += before.elapsed_time(now) if self.device.type == "cuda" else 1000 * (now - before)
        self.marks = []
        return total


@dataclass
class Side:
    """One of the two runs: what a script holds."""

    name: str
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    parameters: list[torch.nn.Parameter]
    lr: float
    total: int  # steps that the schedule is made for
    clock: Clock
    fot: FoT | None = None
    steps: int = 0
    # Of the turns that count: (window, seconds, of them on a CPU).
    turns: list[tuple[int, float, float]] = field(default_factory=list)

    def __post_init__(self):
        if self.fot is None:
            return
        stats, forecaster = self.fot.stats, self.fot.forecaster

        def sample(*args, _sample=stats.sample):
            self.clock.mark("optimizer")
            _sample(*args)
            self.clock.mark("gradient statistics")

        def forecast(*args, _forecast=forecaster.forecast):
            self.clock.mark("decision")
            found = _forecast(*args)
            self.clock.mark("forecasts")
            return found

        stats.sample, forecaster.forecast = sample, forecast


# ----------------------------------------------------------------------------------------------
# the training steps, as in the scripts


def lm_step(side: Side, tokens_BT: torch.Tensor, micro: int) -> None:
    """train_lm.py's step; tokens [B, T + 1] on the CPU."""
    model, fot, device = side.model, side.fot, side.clock.device
    x, y = (to_device(t.contiguous(), device) for t in (tokens_BT[:, :-1], tokens_BT[:, 1:]))
    denominator = to_device(torch.tensor(float(y.numel())), device)
    begin(side)
    measured = fot is not None and fot.wants_micro
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
                fot.micro(min(rows, len(x)) / len(x))
                side.clock.mark("gradient statistics")
    end(side, loss)


def lora_step(side: Side, rows: Rows, micro: int) -> None:
    """finetune_gsm8k.py's step, the loss on the answers."""
    model, fot, device = side.model, side.fot, side.clock.device
    count = int(rows.answer_RT.sum())
    begin(side)
    deciding = fot is not None and (side.steps + 1) % fot.every == 0
    measured = fot is not None and fot.wants_micro and len(rows) > 1
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
        part_loss, moments = linear_score(
            hidden.flatten(0, 1).index_select(0, at), model.head_weight, y, ce, denominator=denominator,
            weights=answer.float() if deciding else None, fisher=deciding,
        )  # fmt: skip
        part_loss.backward()
        loss += part_loss.detach()
        side.clock.mark("forward and backward")
        if fot:
            if deciding:
                fot.observe_segments(moments.fisher, ~answer, answer)
            valid = moments.valid & answer
            fot.observe(-moments.log_p.where(valid, 0).sum(), valid.sum())
            side.clock.mark("observe")
            if measured and i == 0:
                fot.micro(len(part.positions("answer")) / count)
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
        side.fot.step()
        side.clock.mark("decision" if side.fot.decided else "schedule")


# ----------------------------------------------------------------------------------------------
# models and batches


def zipf(shape: tuple[int, ...], vocab: int, seed: int) -> torch.Tensor:
    """Tokens with word-like frequencies, p(rank) ~ 1 / rank: a loss that falls, so that there is something to forecast.
    A function of its arguments."""
    weights = 1.0 / torch.arange(1, vocab + 1)
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(weights, math.prod(shape), replacement=True, generator=generator).view(shape)


def make_batches(args) -> Callable[[int], torch.Tensor | Rows]:
    """The batch of a step, on the CPU; lengths of problems as GSM8K's with Qwen3's tokenizer, in shares of a row."""
    vocab = SHAPES[args.shape][0]
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
        first = GPT2(GPT2Config(SHAPES[args.shape][0], args.seq_len, **SIZES[args.shape]), dtype).to(device)
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


# ----------------------------------------------------------------------------------------------
# the race


def race(sides: list[Side], batch_of: Callable, args, windows: int, *, count: bool = True) -> None:
    """``windows`` windows of W steps of every side, in turns. Who begins a turn alternates from turn to turn, and for
    the same step of a window from window to window."""
    train_step = lm_step if args.shape in SIZES else lora_step
    device = sides[0].clock.device
    for window in range(windows):
        for turn in range(args.window // args.turn):
            first = sides[0].steps
            batches = [batch_of(step) for step in range(first, first + args.turn)]
            for side in sides if (window + turn) % 2 == 0 else sides[::-1]:
                synchronize(device)
                began, began_cpu = time.perf_counter(), time.process_time()
                for batch in batches:
                    train_step(side, batch, args.micro_batch)
                synchronize(device)
                took = time.perf_counter() - began, time.process_time() - began_cpu
                if count:
                    side.turns.append((window, *took))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def synchronisations(side: Side, batch_of: Callable, args) -> int:
    """How often the host waits for the GPU in a window's steps."""
    train_step = lm_step if args.shape in SIZES else lora_step
    batches = [batch_of(step) for step in range(side.steps, side.steps + args.window)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for batch in batches:
                train_step(side, batch, args.micro_batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(w.message) for w in caught)


def interval(shares: list[float]) -> tuple[float, float, float]:
    """The median of the windows' shares and its 95 % bootstrap interval, 10,000 resamples of whole windows."""
    drawn = np.random.default_rng(0).choice(shares, (10_000, len(shares)))
    return statistics.median(shares), *(float(q) for q in np.quantile(np.median(drawn, axis=1), (0.025, 0.975)))


def verdict(low: float, high: float, claim: float, windows: int) -> str:
    if windows < 5:  # the whole range of 5 has the median inside with 15 in 16
        return f"open: {windows} windows are too few for an interval"
    return "held" if high < claim else "failed" if low > claim else "open: the interval has it inside"


def table(sides: list[Side], parts: list[dict[str, float]], steps: int, args, cpu: bool) -> Iterator[dict]:
    """Rows of FIELDS: the median step, and in CPU time on a CPU; FoT's own parts together; then every part."""
    for column, name in ((1, "step"), (2, "step, CPU time"))[: 2 if cpu else 1]:
        windows = [defaultdict(float), defaultdict(float)]
        for side, sums in zip(sides, windows, strict=True):
            for turn in side.turns:
                sums[turn[0]] += turn[column]
        found = interval([100 * (fot / linear - 1) for linear, fot in zip(*(w.values() for w in windows), strict=True)])
        medians = (1000 * statistics.median(turn[column] for turn in side.turns) / args.turn for side in sides)
        yield dict(zip(FIELDS, (name, *medians, *found), strict=True))
    whole = sum(parts[0].values())
    own = ("observe", "gradient statistics", "decision", "forecasts")
    timed = sum(parts[1][name] for name in own)
    yield {"part": "timed alone", "linear_ms": 0.0, "fot_ms": timed / steps, "added_percent": 100 * timed / whole}
    for name in PARTS:
        a, b = parts[0][name], parts[1][name]
        yield {"part": name, "linear_ms": a / steps, "fot_ms": b / steps, "added_percent": 100 * (b - a) / whole}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    with user_errors():
        _, *sizes = SHAPES[args.shape]
        for name, size in zip(("seq_len", "batch", "micro_batch"), sizes, strict=True):
            if getattr(args, name) is None:
                setattr(args, name, min(size, args.batch) if name == "micro_batch" else size)
        for name, least in (("batch", 2), ("micro_batch", 1), ("seq_len", 16), ("rank", 1), ("window", 8)):
            if getattr(args, name) < least:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected at least {least}")
        if args.window % 2:
            raise ValueError(f"--window {args.window}: expected an even number, windows are counted from half to half")
        if args.steps < 2 * args.window or args.steps % args.window:
            raise ValueError(f"--steps {args.steps}: expected a multiple of --window {args.window}, two or more")
        if args.shape in SIZES and args.batch % args.micro_batch:
            raise ValueError(f"--batch {args.batch} is not a multiple of --micro-batch {args.micro_batch}")
        device = start_world(args.device).device
        args.turn = 1 if device.type == "cpu" else args.window
        if args.compile is None:
            args.compile = device.type == "cuda"
        if args.base == "auto":
            args.base = "bf16" if device.type == "cuda" else "fp32"
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        windows = args.steps // args.window
        further = 0 if device.type == "cpu" else max(1, windows // 4)
        # Twice what is run: the middle of a run, where FoT plans and no learning rate is 0.
        sides = make_sides(args, device, 2 * (args.steps + (3 + further) * args.window))
    batch_of = make_batches(args)
    print(f"{args.shape}, {args.batch} x {args.seq_len} in micro-batches of {args.micro_batch}, W = {args.window}: "
          f"{sum(p.numel() for p in sides[0].parameters) / 1e6:.2f} M trained parameters on {name_of(device)}",
          flush=True)  # fmt: skip

    # A window and a half that do not count: compilation, the optimizer's state, the first measurement and decision.
    train_step = lm_step if args.shape in SIZES else lora_step
    for step in range(args.window + args.window // 2):
        for side in sides:
            train_step(side, batch_of(step), args.micro_batch)
    for side in sides:
        side.clock.on = device.type == "cpu"  # two readings of a clock cost nothing there
    race(sides, batch_of, args, windows)
    syncs = None
    if device.type == "cuda":
        for side in sides:
            side.clock.on = True
        race(sides, batch_of, args, further, count=False)
    parts = [side.clock.take() for side in sides]
    for side in sides:
        side.clock.on = False
    if device.type == "cuda":
        syncs = {side.name: synchronisations(side, batch_of, args) for side in sides}
    cpu = device.type == "cpu"
    rows = list(table(sides, parts, (further or windows) * args.window, args, cpu))
    print(f"{'':22} {'linear ms':>10} {'FoT ms':>10} {'added %':>9}")
    for row in rows:
        bounds = f"   {row['low_percent']:.3f} to {row['high_percent']:.3f}" if "low_percent" in row else ""
        print(f"{row['part']:22} {row['linear_ms']:10.3f} {row['fot_ms']:10.3f} {row['added_percent']:9.3f}{bounds}")
    if syncs:
        print(f"synchronisations in {args.window} steps: {syncs['linear']} under linear, {syncs['fot']} under FoT")
    judged, claim = rows[1 if cpu else 0], CLAIM[device.type]
    low, high = judged["low_percent"], judged["high_percent"]
    print(f"FoT adds {judged['added_percent']:.3f} % {'of CPU time ' if cpu else ''}(median of {windows} windows, 95 % "
          f"bootstrap interval {low:.3f} to {high:.3f}); claim: under {claim} %: {verdict(low, high, claim, windows)}",
          flush=True)  # fmt: skip
    if args.csv:
        write_csv(args.csv, rows, args, device, syncs or {})
        print(args.csv)
    return 0


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def write_csv(path: Path, rows: list[dict], args, device: torch.device, syncs: dict[str, int]) -> None:
    """A row a part, with the sizes, the device, the date and the versions."""
    names = ("shape", "batch", "micro_batch", "seq_len", "base", "rank", "steps", "window", "compile")
    same = {name: getattr(args, name) for name in names}
    if args.shape in SIZES:
        same |= {"base": "", "rank": ""}
    else:
        same["compile"] = ""
    same |= {f"syncs_{side}": syncs.get(side, "") for side in SIDES}
    same |= {"device": name_of(device), "versions": versions()}
    same |= {"date": datetime.datetime.now(datetime.UTC).date().isoformat()}
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [*FIELDS, *same])
    writer.writeheader()
    writer.writerows(row | same for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, lambda file: file.write(text.getvalue().encode()))


if __name__ == "__main__":
    sys.exit(main())
