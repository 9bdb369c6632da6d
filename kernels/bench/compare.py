"""The two comparisons of kernels.bench: providers side by side at one shape, and every score on 2,000 tokens."""

import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..head import linear_score
from . import timing
from .providers import ALPHA, AUDITED, FROM_BF16_HIDDEN, FROM_HIDDEN, FROM_LOGITS, providers
from .rows import Rows, reason
from .timing import Shape

AUDIT_TOKENS = 2000
ERROR_TOKENS = {"cuda": 512, "cpu": 64}  # that the error is measured on
SLOW = 5  # seconds of a first call that are said
IGNORING = ", 3 of 4 rows ignored"
ERROR_CHUNKS = 8  # of linear_score where its error is measured: as many as it takes of 8192 tokens at V = 151936
NOT_COMPILED = {"literal DPSM", "torch CE", "linear + literal DPSM", "linear + torch CE", "matrix products"}
NOT_COMPILED |= {*FROM_BF16_HIDDEN}  # the kernels of another row


def time_losses(
    functions: dict, leaves, targets, repeats: int, forward: bool, copy: bool, queued: bool = True
) -> dict[str, list[float]]:
    """Seconds of each loss in each round; with ``copy``, "copy" is copying the first leaf. On a GPU the device's time
    alone, with what the host takes unless ``queued``."""
    device = leaves[0].device.type
    own = {name: [leaves[0].detach().clone().requires_grad_()] for name in functions if name.endswith("in place")}
    jobs = {name: partial(timing.run_once, f, own.get(name, leaves), targets, forward) for name, f in functions.items()}
    if copy:
        source = leaves[0].detach()
        target = torch.empty_like(source)
        jobs["copy"] = lambda: target.copy_(source)
    every = sum(own.values(), start=list(leaves))
    return timing.time_in_turns(jobs, device, repeats, between=lambda: timing.drop_gradients(every), queued=queued)


def gradient_errors(function, shape: Shape, dtype: str, device: str, alpha: float) -> list[float]:
    """Relative error of each leaf's gradient, in the 2-norm and on a few tokens, against float64 autograd of
    (1 - alpha) CE + alpha Brier."""
    leaves, targets = timing.make_inputs(shape._replace(n=ERROR_TOKENS[device]), dtype, device)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    log_p = (exact[0] if shape.d is None else exact[0] @ exact[1].t()).log_softmax(-1)
    log_p_y = log_p.gather(1, targets[:, None])[:, 0]
    brier = log_p.exp().square().sum(-1) - 2 * log_p_y.exp() + 1
    ((1 - alpha) * -log_p_y + alpha * brier).mean().backward()
    timing.run_once(function, leaves, targets)
    pairs = zip(leaves, exact, strict=True)
    return [((x.grad.double() - e.grad).norm() / e.grad.norm()).item() for x, e in pairs]


def compare(shape: Shape, args, rows: Rows) -> None:
    """One row a provider. One that is not there has its reason in ``missing``."""
    linear, size = shape.d is not None, " x ".join(str(x) for x in shape if x)
    functions, missing = providers(linear, args.device, args.dtype)
    if not (names := rows.admit([name for name in (*functions, *missing) if args.only in name], f", {size}")):
        return
    functions, missing = ({name: x[name] for name in names if name in x} for x in (functions, missing))
    leaves, targets = timing.make_inputs(shape, args.dtype, args.device)
    missing |= drop_failing(functions, leaves, targets)
    step = time_losses(functions, leaves, targets, args.repeats, forward=False, copy=not linear)
    forward = time_losses(functions, leaves, targets, args.repeats, forward=True, copy=False)
    eager = {}
    if args.device == "cuda":
        few = max(1, args.repeats // 3)
        eager = time_losses(functions, leaves, targets, few, forward=False, copy=False, queued=False)
    gradient_bytes = sum(x.nbytes for x in leaves)
    del leaves
    logits_bytes = shape.n * shape.v * timing.DTYPE_OF[args.dtype].itemsize
    base = "linear + literal DPSM" if linear else "literal DPSM"
    where = f"{args.dtype} on {rows.about['device']}, {rows.about['threads']} CPU threads"
    columns = (
        ["forward_ms", "step_ms"]
        + ["eager_step_ms"] * (args.device == "cuda")
        + ["ratio_to_literal", "ratio_to_products" if linear else "share_of_copy"]
    )
    columns += ["peak_logits", "beside_bytes", "gradient_error"] + ["weight_error"] * linear
    rows.begin(f"N={shape.n} V={shape.v} D={shape.d or '-'} {where}", "provider", *columns)
    common = shape._asdict() | dict(dtype=args.dtype)
    for name, function in functions.items():
        with rows.part(name, **common):
            if args.device == "cuda":
                peak = timing.measure_memory(function, shape, args.dtype, "cuda")
            else:
                peak = timing.measure_memory_apart(name, shape, args.dtype, args.threads)
            how = args.dtype, args.device, ALPHA if "DPSM" in name else 0.0
            if name.startswith("linear_score"):
                function = partial(function, chunk=ERROR_TOKENS[args.device] // ERROR_CHUNKS)
            errors = gradient_errors(function, shape, *how) if name != "matrix products" else [None]
            ms, share = timing.median_ms(step, name), None if linear else timing.median_ratio(step, "copy", name)
            row = dict(provider=name, **common, forward_ms=timing.median_ms(forward, name), step_ms=ms)
            row |= dict(eager_step_ms=timing.median_ms(eager, name) if eager else None)
            row |= dict(best_step_ms=1e3 * min(step[name]), ratio_to_literal=timing.median_ratio(step, name, base))
            row |= dict(share_of_copy=share, ratio_to_products=timing.median_ratio(step, name, "matrix products"))
            row |= dict(beside_bytes=peak - gradient_bytes, gb_per_s=None if linear else 2e-6 * logits_bytes / ms)
            row |= dict(peak_bytes=peak, peak_logits=peak / logits_bytes, gradient_error=max(errors))
            rows.add(row | dict(weight_error=errors[-1] if linear else None, repeats=args.repeats))
    add_missing(rows, missing, common)


def warm(shapes: list[Shape], args) -> None:
    """Compiles what ``compare`` will run, a provider and shape a process, ``args.warm`` at a time: the kernels stay in
    the compilers' caches on disk. What fails here fails, and is named, there."""
    jobs = [(name, shape) for shape in shapes for name in providers(shape.d is not None, args.device, args.dtype)[0]]
    jobs = [(name, shape) for name, shape in jobs if name not in NOT_COMPILED and args.only in name]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.warm, context, max_tasks_per_child=1) as pool:
        for job in jobs:
            pool.submit(_run_small, *job, args.dtype, args.device)


def _run_small(name: str, shape: Shape, dtype: str, device: str) -> None:
    # Ours are the same kernels for any number of tokens, the compiler's are for one alone.
    small = shape if "compile" in name else shape._replace(n=min(shape.n, 64))
    leaves, targets = timing.make_inputs(small, dtype, device)
    function = providers(shape.d is not None, device)[0][name]
    timing.run_once(function, leaves, targets)
    timing.run_once(function, leaves, targets, forward=True)


def add_missing(
    rows: Rows, missing: dict[str, str], common: dict, ours=(*FROM_LOGITS, *FROM_HIDDEN, *FROM_BF16_HIDDEN)
) -> None:
    """A row for each that is ``missing``; where one of ``ours`` failed, the run has."""
    for name, why in missing.items():
        rows.add({rows.name: name, **common, "missing": why})
        rows.failed |= name in ours and why.startswith("failed")


def drop_failing(functions: dict, leaves, targets, forward: bool = True) -> dict[str, str]:
    """Runs each once, with ``forward`` once more without gradient, and takes out of ``functions`` what fails or does
    not fit in memory: {name: why}."""
    missing = {}
    for name, function in list(functions.items()):
        began = time.monotonic()
        try:
            own = [leaves[0].detach().clone().requires_grad_()] if name.endswith("in place") else leaves
            timing.run_once(function, own, targets)
            if forward:
                timing.run_once(function, own, targets, forward=True)
            if leaves[0].is_cuda:
                torch.cuda.synchronize()
            if (took := time.monotonic() - began) > SLOW:
                print(f"{name}: {took:.0f} s to its first result, compilation included", file=sys.stderr, flush=True)
        except torch.OutOfMemoryError:
            missing[name] = "out of memory"
        except Exception as e:  # the others go through
            missing[name] = f"failed: {reason(e)}"
        if name in missing:
            del functions[name]
            timing.drop_gradients(leaves)
            torch.cuda.empty_cache()
    return missing


def audited(name: str) -> Callable:
    """A loss of the audit: one of FROM_HIDDEN, or "linear_score SCORE", with three of four rows ignored in IGNORING."""
    if name in FROM_HIDDEN:
        return FROM_HIDDEN[name]
    score = AUDITED[name.removesuffix(IGNORING).removeprefix("linear_score ")]

    def loss(h, w, y):
        if name.endswith(IGNORING):
            y = y.masked_fill(torch.arange(len(y), device=y.device) % 4 != 0, -100)
        return linear_score(h, w, y, score, fisher=True)[0]

    return loss


def audit_scores(args, rows: Rows) -> None:
    """One fixed batch, by default of 2,000 tokens, through every score: time, memory, FLOPs and joules of a step."""
    shape = Shape(args.n or AUDIT_TOKENS, args.v or 50257, args.d or 768)
    base, brier = "linear + torch CE", "linear_score brier"
    names = ["linear + literal DPSM", base, *(f"linear_score {name}" for name in AUDITED), brier + IGNORING]
    functions = {name: audited(name) for name in rows.admit(name for name in names if args.only in name)}
    leaves, targets = timing.make_inputs(shape, args.dtype, args.device)
    missing = drop_failing(functions, leaves, targets, forward=False)
    times = time_losses(functions, leaves, targets, args.repeats, forward=False, copy=False)
    where = f"V={shape.v} D={shape.d} {args.dtype} on {rows.about['device']}, {rows.about['threads']} CPU threads"
    columns = ("step_ms", "ratio_to_torch_ce", "ratio_to_brier", "peak_bytes", "flops", "joules")
    rows.begin(f"{shape.n:,} tokens, {where}; ours with every moment and the Fisher", "loss", *columns)
    common = shape._asdict() | dict(dtype=args.dtype)
    for name, function in functions.items():
        with rows.part(name, **common):
            joules = timing.measure_joules(partial(timing.run_once, function, leaves, targets), args.device)
            nvtx = torch.cuda.nvtx.range(name) if args.nvtx else nullcontext()
            with nvtx, FlopCounterMode(display=False) as flops:
                timing.run_once(function, leaves, targets)
            if args.device == "cuda":
                peak = timing.measure_memory(function, shape, args.dtype, "cuda")
            else:
                how = shape, args.dtype, args.threads, partial(audited, name), (__name__,)
                peak = timing.measure_memory_apart(name, *how)
            if args.trace:
                file = name.replace(" ", "_").replace("+", "and") + ".json"
                write_trace(function, leaves, targets, Path(args.trace) / file)
            row = dict(loss=name, **common, step_ms=timing.median_ms(times, name))
            row |= dict(ratio_to_torch_ce=timing.median_ratio(times, name, base))
            row |= dict(ratio_to_brier=timing.median_ratio(times, name, brier), repeats=args.repeats)
            rows.add(row | dict(peak_bytes=peak, flops=flops.get_total_flops(), joules=joules))
    add_missing(rows, missing, common, names)


def write_trace(function: Callable, leaves, targets, file: Path) -> None:
    """A torch.profiler trace of one step, for chrome://tracing or Perfetto."""
    from torch.profiler import ProfilerActivity, profile

    file.parent.mkdir(parents=True, exist_ok=True)
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * leaves[0].is_cuda) as profiler:
        timing.run_once(function, leaves, targets)
    profiler.export_chrome_trace(str(file))
