"""Time and memory of DPSM's loss, forward and backward, beside its literal form and cross-entropy.

    python -m kernels.bench                          # 2048 x 50257, fp32
    python -m kernels.bench --n 3072 --v 512 --json bench.json
    python -m kernels.bench --d 768                  # and from hidden states, with the head's matrix products

The providers take turns in one process, so that what else the machine does falls on all of them, and
the table gives medians and their ratio to the literal form. Peak memory is what a fresh process needs
beyond the logits and their targets, in units of one logits tensor: on CPU from the kernel's high-water
mark of resident memory, on CUDA from the allocator. ``inplace`` overwrites the logits, so its later
rounds see other values; the work does not depend on them.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime

import torch
import torch.nn.functional as F

from kernels import linear_score, softmax_moments
from losses import dpsm

ALPHA = 0.5
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def literal_loss(logits, targets):
    """(1 - alpha) CE + alpha Brier as the formulas read, with log_softmax, exp and a one-hot."""
    log_p = F.log_softmax(logits.float(), dim=-1)
    p = log_p.exp()
    one_hot = F.one_hot(targets, logits.shape[-1]).float()
    ce = -(one_hot * log_p).sum(-1)
    brier = ((p - one_hot) ** 2).sum(-1)
    return ((1 - ALPHA) * ce + ALPHA * brier).mean()


def ours_loss(logits, targets):
    return dpsm(ALPHA)(softmax_moments(logits, targets)).mean()


def inplace_loss(logits, targets):
    return dpsm(ALPHA)(softmax_moments(logits, targets, inplace_backward=True)).mean()


LOSSES = {"literal": literal_loss, "cross_entropy": F.cross_entropy, "ours": ours_loss, "inplace": inplace_loss}

LINEAR = {
    "linear+literal": lambda h, w, y: literal_loss(F.linear(h, w), y),
    "linear+cross_entropy": lambda h, w, y: F.cross_entropy(F.linear(h, w), y),
    "linear_score(ce)": lambda h, w, y: linear_score(h, w, y, lambda m: -m.log_p)[0],
    "linear_score(dpsm)": lambda h, w, y: linear_score(h, w, y, dpsm(ALPHA))[0],
}


def make_inputs(name: str, args) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Leaves that require a gradient (logits, or hidden and weight) and targets."""
    generator = torch.Generator(args.device).manual_seed(0)
    new = dict(device=args.device, generator=generator)
    targets = torch.randint(args.v, (args.n,), **new)
    if name in LOSSES:
        leaves = [torch.randn(args.n, args.v, dtype=DTYPES[args.dtype], **new).mul_(3)]
    else:
        leaves = [torch.randn(rows, args.d, dtype=DTYPES[args.dtype], **new) for rows in (args.n, args.v)]
        leaves[1].mul_(0.02)
    return [x.requires_grad_() for x in leaves], targets


def run_once(name: str, leaves, targets) -> None:
    for leaf in leaves:
        leaf.grad = None
    {**LOSSES, **LINEAR}[name](*leaves, targets).backward()


def measure_times(names, args) -> dict[str, list[float]]:
    """Seconds of each of ``--repeats`` rounds, the providers taking turns within a round."""
    kinds = {n: ("logits" if n in LOSSES else "hidden") for n in names}
    inputs = {kind: make_inputs(next(n for n in names if kinds[n] == kind), args) for kind in set(kinds.values())}
    if "inplace" in names:  # its own copy, as it destroys it
        leaves, targets = inputs["logits"]
        inputs["inplace"] = [leaves[0].detach().clone().requires_grad_()], targets
    wait = torch.cuda.synchronize if args.device == "cuda" else lambda: None
    times = {name: [] for name in names}
    for turn in range(args.repeats + 1):
        for name in names:
            leaves, targets = inputs["inplace" if name == "inplace" else kinds[name]]
            wait()
            start = time.perf_counter()
            run_once(name, leaves, targets)
            wait()
            if turn:  # the first round warms up
                times[name].append(time.perf_counter() - start)
            for leaf in leaves:
                leaf.grad = None
    return times


def measure_memory(name: str, args) -> int:
    """Peak bytes beyond the inputs during one forward and backward. Run it in a process of its own."""
    small = argparse.Namespace(**{**vars(args), "n": 8, "v": 64})
    run_once(name, *make_inputs(name, small))  # what the libraries load and keep once
    leaves, targets = make_inputs(name, args)
    if args.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run_once(name, leaves, targets)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    before = _resident("VmRSS")
    peak = None
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the high-water mark starts again from here
        peak = lambda: _resident("VmHWM")  # noqa: E731
    except OSError:
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # noqa: E731
    run_once(name, leaves, targets)
    return peak() - before


def _resident(field: str) -> int:
    with open("/proc/self/status") as file:
        line = next(x for x in file if x.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def measure_memory_apart(name: str, argv) -> int:
    command = [sys.executable, "-m", "kernels.bench", *argv, "--memory-of", name]
    env = {**os.environ, "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {name} failed: {done.stderr.strip().splitlines()[-1]}")
    return int(done.stdout.split()[-1])


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=2048, help="tokens")
    parser.add_argument("--v", type=int, default=50257, help="vocabulary")
    parser.add_argument("--d", type=int, default=0, help="hidden size; above 0 also times the linear head")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of logits, hidden and weight")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
    parser.add_argument("--repeats", type=int, default=7, help="rounds that count")
    parser.add_argument("--json", metavar="FILE", help="also write the rows there")
    parser.add_argument("--memory-of", choices=(*LOSSES, *LINEAR), help=argparse.SUPPRESS)
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.memory_of:
        print(measure_memory(args.memory_of, args))
        return

    names = [*LOSSES, *(LINEAR if args.d else ())]
    one_logits = args.n * args.v * DTYPES[args.dtype].itemsize
    memory = {name: measure_memory_apart(name, argv) for name in names}
    times = measure_times(names, args)
    device = torch.cuda.get_device_name() if args.device == "cuda" else cpu_name()
    print(f"N={args.n} V={args.v} D={args.d} {args.dtype} on {device}, {torch.get_num_threads()} threads")
    print(f"{'provider':22} {'median ms':>10} {'x literal':>10} {'peak beyond the inputs, in logits tensors':>42}")
    rows = []
    for name in names:
        group = "literal" if name in LOSSES else "linear+literal"
        # Ratios within a round first: what slows a round down slows both.
        ratio = statistics.median(a / b for a, b in zip(times[name], times[group], strict=True))
        row = dict(provider=name, median_ms=1e3 * statistics.median(times[name]), ratio_to_literal=ratio)
        row |= dict(best_ms=1e3 * min(times[name]), peak_logits=memory[name] / one_logits, peak_bytes=memory[name])
        row |= dict(n=args.n, v=args.v, d=args.d, dtype=args.dtype, device=device, threads=torch.get_num_threads())
        row |= dict(repeats=args.repeats, torch=torch.__version__, date=datetime.now(UTC).isoformat(timespec="seconds"))
        rows.append(row)
        print(f"{name:22} {row['median_ms']:10.2f} {ratio:10.3f} {row['peak_logits']:42.3f}")
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
