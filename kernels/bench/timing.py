"""What every bench measures with: inputs, one timer, peak memory and joules."""

import argparse
import multiprocessing
import os
import re
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .limits import add_limits
from .providers import providers

# Of the package beside this one, as which both are installed: schedules, or scorecast.schedules.
commandline = import_module(f"{__name__.removesuffix('kernels.bench.timing')}schedules.commandline")
Parser, alive = commandline.Parser, commandline.alive
DTYPE_OF = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
REPEATS = {"cuda": 30, "cpu": 7}  # rounds that count
WARM_UPS = {"cuda": 3, "cpu": 1}  # rounds that do not count: they compile, and fill the allocator's pools
AHEAD = 8_000_000  # clocks that the device spins while a job is queued behind: some 4 ms
TIED = 100  # of so many rows of logits one has its target tied with the maximum
DRAWN = 2**25  # logits at a time that targets are drawn from


class Shape(NamedTuple):
    n: int  # tokens
    v: int  # vocabulary
    d: int | None = None  # hidden size of a linear head; None for logits


HEADS = {"gpt2": Shape(8192, 50257, 768), "qwen3": Shape(8192, 151936, 1024)}


def add_options(parser: argparse.ArgumentParser) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--dtype", choices=DTYPE_OF, help="of logits, hidden and weight (bf16 on a GPU, else fp32)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device)
    parser.add_argument("--repeats", type=int, default=0, help="rounds that count (30 on a GPU, else 7)")
    parser.add_argument("--csv", metavar="FILE", help="also write the rows there, after each")
    add_limits(parser)


def fill_options(args: argparse.Namespace) -> str | None:
    """Puts the defaults of a device in. Gives what is wrong with the options, None where nothing is."""
    args.dtype = args.dtype or ("bf16" if args.device == "cuda" else "fp32")
    args.repeats = args.repeats or REPEATS[args.device]
    if args.device == "cuda" and not torch.cuda.is_available():
        return "--device cuda, and torch sees no CUDA device"
    return next((f"--{k} {v}" for k, v in vars(args).items() if isinstance(v, int) and v < 0), None)


def make_inputs(shape: Shape, dtype: str, device: str) -> tuple[list[Tensor], Tensor]:
    """Leaves that require a gradient, logits or hidden and weight, and targets drawn from their softmax, as a trained
    model's are. One row of logits in TIED has its target tied with the maximum."""
    n, v, d = shape
    new = dict(device=device, generator=torch.Generator(device).manual_seed(0))
    sizes = [(n, v, 3)] if d is None else [(n, d, 1), (v, d, 0.02)]  # rows, columns, standard deviation
    leaves = [torch.randn(r, c, dtype=DTYPE_OF[dtype], **new).mul_(s) for r, c, s in sizes]
    targets = torch.empty(n, dtype=torch.int64, device=device)
    for part in torch.arange(n).split(max(1, DRAWN // v)):
        z = leaves[0][part[0] : part[-1] + 1]
        z = z if d is None else z @ leaves[1].t()
        targets[part[0] : part[-1] + 1] = z.float().softmax(1).multinomial(1, generator=new["generator"])[:, 0]
    if d is None:
        tied = torch.arange(0, n, TIED, device=device)
        leaves[0][tied, targets[tied]] = leaves[0][tied].amax(1)
    return [leaf.requires_grad_() for leaf in leaves], targets


def drop_gradients(leaves) -> None:
    for leaf in leaves:
        leaf.grad = None


def run_once(function: Callable, leaves, targets, forward: bool = False) -> None:
    """One step of a loss, or its ``forward`` alone without gradient."""
    drop_gradients(leaves)
    with torch.set_grad_enabled(not forward):
        loss = function(*leaves, targets)
    if not forward:
        loss.backward()


def time_once(job: Callable[[], object], device: str, queued: bool = False) -> float:
    """Seconds of one call: on CUDA between events, the device idle before and after. ``queued``: the device is kept
    busy until all of the job is in its queue, so that what the host takes to launch it does not count; a job that is
    not there in time is queued again behind a longer wait."""
    if device == "cuda":
        ahead, late = AHEAD, True
        while late:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            if queued:
                torch.cuda._sleep(ahead)
            begin.record()
            job()
            end.record()
            late, ahead = queued and begin.query() and ahead < 64 * AHEAD, 2 * ahead
            torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1000
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def time_in_turns(
    jobs: dict[object, Callable], device: str, repeats: int, between: Callable | None = None, queued: bool = False
) -> dict[object, list[float]]:
    """Seconds of every job in each of ``repeats`` rounds, in which they take turns: what else the machine does falls on
    all of them. ``between`` runs after each job and is not timed. ``queued`` as in ``time_once``."""
    times = {name: [] for name in jobs}
    for turn in range(repeats + WARM_UPS[device]):
        for name, job in jobs.items():
            seconds = time_once(job, device, queued)
            if turn >= WARM_UPS[device]:
                times[name].append(seconds)
            if between:
                between()
    return times


def median_ms(times: dict, name) -> float:
    return 1e3 * statistics.median(times[name])


def median_ratio(times: dict, name, base) -> float | None:
    """Median over rounds of one job's time over the base job's: what slows a round slows both. None without base."""
    if base not in times:
        return None
    return statistics.median(a / b for a, b in zip(times[name], times[base], strict=True))


def cuda_peak(job: Callable[[], object]) -> int:
    """Peak bytes that a call allocates beyond what was allocated before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    job()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure_memory(function: Callable, shape: Shape, dtype: str, device: str) -> int:
    """Peak bytes beyond the inputs of one step. On CPU run it in a process of its own."""
    small = make_inputs(Shape(8, 64, shape.d), dtype, device)
    run_once(function, *small)  # what the libraries load and keep once
    leaves, targets = make_inputs(shape, dtype, device)
    if device == "cuda":
        run_once(function, leaves, targets)
        drop_gradients(leaves)
        return cuda_peak(lambda: run_once(function, leaves, targets))
    before = _resident("VmRSS")
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    run_once(function, leaves, targets)
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    """Bytes of this process by the kernel: VmRSS now, VmHWM at most."""
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def _provider(name: str, linear: bool) -> Callable:
    return providers(linear, "cpu")[0][name]


def _memory_of(find: Callable[[], Callable], shape: Shape, dtype: str, threads: int) -> int:
    torch.set_num_threads(threads or torch.get_num_threads())
    return measure_memory(find(), shape, dtype, "cpu")


def measure_memory_apart(
    name: str, shape: Shape, dtype: str, threads: int = 0, find: Callable | None = None, imported: tuple[str, ...] = ()
) -> int:
    """``measure_memory`` on CPU in a fresh process, of the provider ``name``, or of what ``find()`` gives there.
    ``imported``: modules that a server imports once for all these processes, which are forked from it."""
    find = find or partial(_provider, name, shape.d is not None)
    os.environ["MALLOC_ARENA_MAX"] = "1"  # for the new process: an allocator reads it when it starts
    context = multiprocessing.get_context("forkserver" if imported else "spawn")
    if imported:
        context.set_forkserver_preload(list(imported))
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(_memory_of, find, shape, dtype, threads).result()


def measure_joules(job: Callable[[], object], device: str) -> float | None:
    """Joules of one call, from a second of calls, by NVML's counter; None, not measured, where there is none or NVML
    refuses, as some virtual machines do."""
    if device != "cuda":
        return None
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode())
        before, calls = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle), 0  # millijoules
        stop = time.perf_counter() + 1.0  # the counter moves in steps of milliseconds
        while time.perf_counter() < stop:
            job()
            torch.cuda.synchronize()
            calls += 1
        return (pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) - before) / 1000 / calls
    except pynvml.NVMLError:
        return None
