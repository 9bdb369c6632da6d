"""Time, memory, bandwidth and error of DPSM's loss beside every peer that is installed.

    python -m kernels.bench                        # on a GPU GPT-2's and Qwen3's heads, bf16; on CPU 2048 x 50257
    python -m kernels.bench --n 3072 --v 512 --d 384 --dtype fp32 --csv bench.csv
    python -m kernels.bench --csv bench.csv --plot bench.png
    python -m kernels.bench --audit-2k --trace traces   # one batch of 2,000 tokens through every score
    python -m kernels.bench --train-step --csv step.csv # a whole training step, DPSM against torch's CE
    python -m kernels.bench --paths --csv paths.csv     # how a row is held, sizes of chunks (GPU)
    python -m kernels.bench --claims --csv all.csv      # shapes and training step, then every claim's verdict (GPU)

The providers take turns in one process, so that what else the machine does falls on all of them, and
the table gives medians and their ratio to the literal form. Forward is without gradient; step is forward
and backward. Peak memory is what one step needs beyond the inputs, in units of one logits tensor: on CUDA
from the allocator, on CPU in a fresh process from the high-water mark of resident memory. "of copy" is the
speed of one read and one write of the logits over that of copying them, measured in the same turns: how
close a step comes to the memory limit. "x products" is a linear loss's time over that of its bare matrix products, and
"beside MB" its peak less the gradients. The error is |gradient - exact| / |exact| in the 2-norm, of the leaf where it
is larger, on 64 tokens (512 on a GPU), exact being float64 autograd of the same loss.

What is not installed, or fails, is named, and has its row in the CSV, which is written anew after every row: a run
that is cut off keeps what it has. ``in place`` overwrites the logits, so its later rounds see other values;
the work does not depend on them.
"""

import argparse
import csv
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path

import torch

from kernels import linear_score
from kernels.providers import ALPHA, LINEAR, LOSSES, SCORES, providers

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHAPES = {"gpt2": (8192, 50257, 768), "qwen3": (8192, 151936, 1024)}  # tokens, vocabulary, hidden


def make_inputs(
    linear: bool, n: int, v: int, d: int, dtype: str, device: str
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Leaves that require a gradient, logits or hidden and weight, and targets."""
    generator = torch.Generator(device).manual_seed(0)
    new = dict(device=device, generator=generator)
    targets = torch.randint(v, (n,), **new)
    if linear:
        leaves = [torch.randn(rows, d, dtype=DTYPES[dtype], **new) for rows in (n, v)]
        leaves[1].mul_(0.02)
    else:
        leaves = [torch.randn(n, v, dtype=DTYPES[dtype], **new).mul_(3)]
    return [x.requires_grad_() for x in leaves], targets


def run_once(function, leaves, targets, forward: bool = False) -> None:
    for leaf in leaves:
        leaf.grad = None
    if forward:
        with torch.no_grad():
            function(*leaves, targets)
    else:
        function(*leaves, targets).backward()


def measure_times(functions: dict, leaves, targets, repeats: int, forward: bool, copy: bool) -> dict[str, list[float]]:
    """Seconds of each round, the providers taking turns within a round; "copy" is that of the first leaf."""
    own = {name: [leaves[0].detach().clone().requires_grad_()] for name in functions if name.endswith("in place")}
    cuda = leaves[0].is_cuda
    source = leaves[0].detach()
    target = torch.empty_like(source) if copy else None
    jobs = {
        name: lambda f=f, name=name: run_once(f, own.get(name, leaves), targets, forward)
        for name, f in functions.items()
    }
    if copy:
        jobs["copy"] = lambda: target.copy_(source)
    times = {name: [] for name in jobs}
    for turn in range(repeats + (3 if cuda else 1)):  # the first rounds warm up, and compile
        for name, job in jobs.items():
            seconds = time_once(job, "cuda" if cuda else "cpu")
            if turn >= (3 if cuda else 1):
                times[name].append(seconds)
            for leaf in (*leaves, *own.get(name, ())):
                leaf.grad = None
    return times


def time_once(job, device: str) -> float:
    """Seconds of one call: on CUDA between events, the device idle before and after."""
    if device == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        job()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1000
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def gradient_error(function, linear: bool, v: int, d: int, dtype: str, device: str, name: str) -> float:
    """Relative error of a leaf's gradient in the 2-norm, the larger of the leaves, on a few tokens."""
    leaves, targets = make_inputs(linear, 512 if device == "cuda" else 64, v, d, dtype, device)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    log_p = (exact[0] @ exact[1].t() if linear else exact[0]).log_softmax(-1)
    log_p_y = log_p.gather(1, targets[:, None])[:, 0]
    brier = log_p.exp().square().sum(-1) - 2 * log_p_y.exp() + 1
    alpha = ALPHA if "DPSM" in name else 0.0
    ((1 - alpha) * -log_p_y + alpha * brier).mean().backward()
    run_once(function, leaves, targets)
    pairs = zip(leaves, exact, strict=True)
    return max(((x.grad.double() - e.grad).norm() / e.grad.norm()).item() for x, e in pairs)


def measure_memory(function, linear: bool, n: int, v: int, d: int, dtype: str, device: str) -> int:
    """Peak bytes beyond the inputs of one step. On CPU run it in a process of its own."""
    small = make_inputs(linear, 8, 64, max(d, 1), dtype, device)
    run_once(function, *small)  # what the libraries load and keep once
    leaves, targets = make_inputs(linear, n, v, d, dtype, device)
    if device == "cuda":
        run_once(function, leaves, targets)
        for leaf in leaves:
            leaf.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run_once(function, leaves, targets)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    before = _resident("VmRSS")
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
        peak = lambda: _resident("VmHWM")  # noqa: E731
    except OSError:
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # noqa: E731
    run_once(function, leaves, targets)
    return peak() - before


def _resident(field: str) -> int:
    with open("/proc/self/status") as file:
        line = next(x for x in file if x.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def measure_memory_apart(name: str, n: int, v: int, d: int, dtype: str, threads: int = 0) -> int:
    """``measure_memory`` on CPU in a fresh process."""
    shape = ["--n", n, "--v", v, "--d", d, "--dtype", dtype, "--device", "cpu", "--threads", threads]
    command = [sys.executable, "-m", "kernels.bench", *map(str, shape), "--memory-of", name]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "MALLOC_ARENA_MAX": "1"})
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {name} failed: {done.stderr.strip().splitlines()[-1]}")
    return int(done.stdout.split()[-1])


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def where_and_when(device: str) -> dict:
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = None
    date = datetime.now(UTC).isoformat(timespec="seconds")
    machine = dict(device=device_name(device), threads=torch.get_num_threads())
    return machine | dict(torch=torch.__version__, triton=version, date=date)


def bench(linear: bool, n: int, v: int, d: int, args, add) -> None:
    """Calls ``add`` with one row a provider, printed as a table; a provider that is not there has its reason in
    ``missing``."""
    functions, missing = providers(linear, args.device)
    leaves, targets = make_inputs(linear, n, v, d, args.dtype, args.device)
    if args.device == "cuda":
        missing |= drop_failing(functions, leaves, targets)
    step = measure_times(functions, leaves, targets, args.repeats, forward=False, copy=not linear)
    forward = measure_times(functions, leaves, targets, args.repeats, forward=True, copy=False)
    gradient_bytes = sum(x.nbytes for x in leaves)
    del leaves
    copy = step.pop("copy", None)
    base = "linear + literal DPSM" if linear else "literal DPSM"
    logits_bytes = n * v * DTYPES[args.dtype].itemsize
    about = where_and_when(args.device)
    print(f"N={n} V={v} D={d if linear else '-'} {args.dtype} on {about['device']}, {about['threads']} CPU threads")
    print(
        f"{'provider':29} {'forward ms':>11} {'step ms':>9} {'x literal':>9} "
        f"{'x products' if linear else 'of copy':>10} {'peak, logits':>12} {'beside MB':>9} {'error':>9}"
    )

    def ratio_to(name, other):
        # Ratios within a round first: what slows a round down slows both.
        if other not in step:
            return None
        return statistics.median(a / b for a, b in zip(step[name], step[other], strict=True))

    shape = dict(n=n, v=v, d=d if linear else None, dtype=args.dtype)
    for name, function in functions.items():
        ratio, products = ratio_to(name, base), ratio_to(name, "matrix products")
        share = None
        if copy:
            share = statistics.median(c / t for c, t in zip(copy, step[name], strict=True))
        if args.device == "cuda":
            peak = measure_memory(function, linear, n, v, d, args.dtype, "cuda")
        else:
            peak = measure_memory_apart(name, n, v, d if linear else 0, args.dtype, args.threads)
        error = None
        if name != "matrix products":
            error = gradient_error(function, linear, v, d, args.dtype, args.device, name)
        row = dict(provider=name) | shape
        row |= dict(forward_ms=1e3 * statistics.median(forward[name]), step_ms=1e3 * statistics.median(step[name]))
        row |= dict(best_step_ms=1e3 * min(step[name]), ratio_to_literal=ratio, share_of_copy=share)
        row |= dict(ratio_to_products=products, beside_bytes=peak - gradient_bytes)
        row |= dict(gb_per_s=None if linear else 2e-9 * logits_bytes / statistics.median(step[name]))
        row |= dict(peak_bytes=peak, peak_logits=peak / logits_bytes, gradient_error=error, repeats=args.repeats)
        add(row | about)
        shown = ["" if x is None else f"{x:.3f}" for x in (ratio, products)]
        shown[1] = shown[1] if share is None else f"{100 * share:.0f} %"
        error = "" if error is None else f"{error:.1e}"
        print(
            f"{name:29} {row['forward_ms']:11.3f} {row['step_ms']:9.3f} {shown[0]:>9} {shown[1]:>10} "
            f"{row['peak_logits']:12.2f} {row['beside_bytes'] / 1e6:9.0f} {error:>9}",
            flush=True,
        )
    for name, why in missing.items():
        add(dict(provider=name) | shape | dict(missing=why) | about)
        print(f"{name:29} {why}")


def drop_failing(functions: dict, leaves, targets) -> dict[str, str]:
    """Runs each once and takes out of ``functions``: whatever does not fit in memory, and peers that fail.
    {name: why}."""
    missing = {}
    for name, function in list(functions.items()):
        try:
            own = [leaves[0].detach().clone().requires_grad_()] if name.endswith("in place") else leaves
            run_once(function, own, targets)
            run_once(function, own, targets, forward=True)
            torch.cuda.synchronize()
        except torch.OutOfMemoryError:
            missing[name] = "out of memory"
        except Exception as e:  # another project's kernel, on a version of its choice
            if name in LOSSES or name in LINEAR:
                raise
            missing[name] = f"failed: {type(e).__name__}: {e}".splitlines()[0][:200]
        if name in missing:
            del functions[name]
            for leaf in leaves:
                leaf.grad = None
            torch.cuda.empty_cache()
    return missing


def audit_2k(args, add) -> None:
    """One fixed batch of 2,000 tokens through every score: time, memory, FLOPs and joules of a step."""
    from torch.utils.flop_counter import FlopCounterMode

    from runtime.machine import EnergyMeter

    n, (v, d) = 2000, (args.v or 50257, args.d or 768)
    functions = {
        "linear + literal DPSM": LINEAR["linear + literal DPSM"],
        "linear + torch CE": LINEAR["linear + torch CE"],
    }
    for name, score in SCORES.items():
        functions[f"linear_score {name}"] = lambda h, w, y, s=score: linear_score(h, w, y, s, fisher=True)[0]
    leaves, targets = make_inputs(True, n, v, d, args.dtype, args.device)
    times = measure_times(functions, leaves, targets, args.repeats, forward=False, copy=False)
    meter, about = EnergyMeter(torch.device(args.device)), where_and_when(args.device)
    print(f"2,000 tokens, V={v} D={d} {args.dtype} on {about['device']}; ours with every moment and the Fisher")
    print(f"{'loss':29} {'step ms':>9} {'x torch CE':>10} {'peak MB':>9} {'GFLOP':>8} {'joules a step':>14}")
    for name, function in functions.items():
        ranges = torch.cuda.nvtx.range(name) if args.nvtx else nullcontext()
        before = meter.read()
        rounds = 0
        if before is not None:  # the counter moves in steps of milliseconds
            stop = time.perf_counter() + 1.0
            while time.perf_counter() < stop:
                run_once(function, leaves, targets)
                torch.cuda.synchronize()
                rounds += 1
        joules = None if before is None else (meter.read() - before) / rounds
        with ranges, FlopCounterMode(display=False) as flops:
            run_once(function, leaves, targets)
        if args.device == "cuda":
            peak = measure_memory(function, True, n, v, d, args.dtype, "cuda")
        else:
            peak = None  # kernels.bench without --audit-2k measures it in fresh processes
        if args.trace:
            write_trace(
                function, leaves, targets, Path(args.trace) / f"{name.replace(' ', '_').replace('+', 'and')}.json"
            )
        ratio = statistics.median(a / b for a, b in zip(times[name], times["linear + torch CE"], strict=True))
        row = dict(loss=name, n=n, v=v, d=d, dtype=args.dtype, step_ms=1e3 * statistics.median(times[name]))
        row |= dict(ratio_to_torch_ce=ratio, peak_bytes=peak, flops=flops.get_total_flops(), joules=joules)
        add(row | about)
        shown = ["" if x is None else x for x in (peak and f"{peak / 1e6:.0f}", joules and f"{joules:.3f}")]
        print(f"{name:29} {row['step_ms']:9.3f} {ratio:10.3f} {shown[0]:>9} {row['flops'] / 1e9:8.1f} {shown[1]:>14}")


def write_trace(function, leaves, targets, file: Path) -> None:
    """A torch.profiler trace of one step, for chrome://tracing or Perfetto."""
    from torch.profiler import ProfilerActivity, profile

    file.parent.mkdir(parents=True, exist_ok=True)
    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if leaves[0].is_cuda else [])
    with profile(activities=kinds) as profiler:
        run_once(function, leaves, targets)
    profiler.export_chrome_trace(str(file))


def write_csv(rows: list[dict], file: str) -> None:
    """All rows, with every column that one of them has; the file is replaced whole."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with open(f"{file}.tmp", "w", newline="") as opened:
        writer = csv.DictWriter(opened, columns)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(f"{file}.tmp", file)


def write_plot(rows: list[dict], file: str) -> None:
    """Step times of the providers, one panel a shape."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [r for r in rows if r.get("step_ms")]
    shapes = list(dict.fromkeys((r["n"], r["v"], r["d"]) for r in rows))
    figure, axes = plt.subplots(1, len(shapes), figsize=(6.5 * len(shapes), 4.2), squeeze=False, layout="constrained")
    for axis, shape in zip(axes[0], shapes, strict=True):
        shown = [r for r in rows if (r["n"], r["v"], r["d"]) == shape][::-1]
        colors = ["#1f77b4" if "ours" in r["provider"] or "linear_score" in r["provider"] else "#bbbbbb" for r in shown]
        axis.barh([r["provider"] for r in shown], [r["step_ms"] for r in shown], color=colors)
        for y, r in enumerate(shown):
            axis.text(r["step_ms"], y, f" {r['step_ms']:.3g} ms", va="center", fontsize=8)
        axis.margins(x=0.18)
        axis.set_xlabel("forward and backward, ms")
        head = f", D = {shape[2]}" if shape[2] else ", logits"
        axis.set_title(f"N = {shape[0]}, V = {shape[1]}{head}, {shown[0]['dtype']}", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{rows[0]['device']}, torch {rows[0]['torch']}, {rows[0]['date'][:10]}", fontsize=9)
    figure.savefig(file, dpi=150)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m kernels.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, nargs="+", help="on a GPU by default all")
    parser.add_argument("--n", type=int, default=0, help="tokens, in place of --shape")
    parser.add_argument("--v", type=int, default=0, help="vocabulary")
    parser.add_argument("--d", type=int, default=0, help="hidden size; above 0 also times the linear head")
    parser.add_argument("--dtype", choices=DTYPES, help="of logits, hidden and weight (bf16 on a GPU, else fp32)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
    parser.add_argument("--repeats", type=int, default=0, help="rounds that count (30 on a GPU, else 7)")
    parser.add_argument("--csv", metavar="FILE", help="also write the rows there")
    parser.add_argument("--json", metavar="FILE", help="likewise")
    parser.add_argument("--plot", metavar="FILE", help="step times as a PNG")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--audit-2k", action="store_true", help="2,000 tokens through every score instead")
    mode.add_argument("--train-step", action="store_true", help="a training step of GPT-2 instead (a tiny one on CPU)")
    mode.add_argument("--paths", action="store_true", help="ways to hold a row, and sizes of chunks, instead (GPU)")
    mode.add_argument("--claims", action="store_true", help="all shapes and the training step, then verdicts (GPU)")
    parser.add_argument("--trace", metavar="FOLDER", help="with --audit-2k: torch.profiler traces")
    parser.add_argument("--nvtx", action="store_true", help="with --audit-2k: an NVTX range a score, for Nsight")
    parser.add_argument("--memory-of", choices=(*LOSSES, *LINEAR, "F.linear_cross_entropy"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    wrong = next((f"--{k} {v}" for k, v in vars(args).items() if isinstance(v, int) and v < 0), None)
    if args.device == "cuda" and not torch.cuda.is_available():
        wrong = "--device cuda, and torch sees no CUDA device"
    elif (args.trace or args.nvtx) and not args.audit_2k:
        wrong = "--trace and --nvtx go with --audit-2k"
    elif args.nvtx and args.device != "cuda":
        wrong = "--nvtx needs a CUDA device"
    elif args.plot and (args.audit_2k or args.train_step or args.paths or args.claims):
        wrong = "--plot is of the bench; leave out --audit-2k, --train-step, --paths and --claims"
    elif (args.paths or args.claims) and args.device != "cuda":
        wrong = f"--{'paths' if args.paths else 'claims'} needs a GPU; torch sees no CUDA device or --device is cpu"
    elif args.claims and (args.dtype or "bf16") != "bf16":
        wrong = f"--claims is about bf16, got --dtype {args.dtype}"
    if wrong:
        print(f"kernels.bench: cannot do this: {wrong}", file=sys.stderr)
        return 2
    cuda = args.device == "cuda"
    args.dtype, args.repeats = args.dtype or ("bf16" if cuda else "fp32"), args.repeats or (30 if cuda else 7)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.memory_of:
        linear = args.memory_of not in LOSSES
        function = providers(linear, args.device)[0][args.memory_of]
        print(measure_memory(function, linear, args.n, args.v, args.d, args.dtype, args.device))
        return 0
    rows = []

    def add(row: dict) -> None:
        rows.append(row)
        if args.csv:
            write_csv(rows, args.csv)

    if args.audit_2k:
        audit_2k(args, add)
    elif args.paths:
        from kernels.paths import paths

        paths(args, add)
    elif not args.train_step:
        shapes = [SHAPES[s] for s in args.shape or (SHAPES if cuda else ())]
        if not args.claims and (args.n or args.v or args.d or not shapes):
            shapes = [(args.n or 2048, args.v or 50257, args.d)]
        for n, v, d in shapes:
            bench(False, n, v, d, args, add)
            if d:
                bench(True, n, v, d, args, add)
    if args.train_step or args.claims:
        from races.train_step import train_step

        train_step(args, add)
    if args.claims:
        from kernels.claims import print_table, verdicts

        print_table(verdicts(rows))
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
    if args.plot:
        write_plot(rows, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
