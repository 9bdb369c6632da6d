"""What the fixed choices should be on this GPU: one read of a row or two, and tokens a chunk of linear_score.

    python -m kernels.bench --paths --csv paths.csv

triton_impl decides by the elements of a row that a lane would hold (RESIDENT_*). This times DPSM with its gradient
both ways, in turns, wherever a row could be held at all, and prints the largest number of elements a lane at which
one read won: what the constant should be on this device. Then linear_score at the bench's shapes in chunks of many
sizes, over the bare matrix products, beside what chunks.chunk_rows chooses.
"""

import statistics

import torch

from kernels import linear_score
from kernels.bench import DTYPES, SHAPES, make_inputs, run_once, time_once, where_and_when
from kernels.chunks import TILE, cuda_chunk
from kernels.providers import ALPHA, matrix_products
from losses import dpsm

VOCABULARIES = (32000, 50257, 65536, 128256, 151936)
TOKENS = 4096
MOST_REGISTERS = 200  # of a lane's 255, for the row alone; beyond it the compiler would spill most of the row


def time_paths(v: int, dtype: torch.dtype, device: str, repeats: int) -> dict:
    """Milliseconds of one read, two reads and copying the logits, and the elements a lane would hold; one read is
    None where the row could not be held."""
    from kernels import triton_impl as impl
    from kernels.moments import new_stats

    z = torch.randn(TOKENS, v, dtype=dtype, device=device)
    y = torch.randint(v, (TOKENS,), device=device)
    out, (stats, correct) = torch.empty_like(z), new_stats(z, TOKENS)
    losses, fisher = torch.empty_like(stats[0]), torch.empty_like(stats[0])
    knob = torch.full((), 0.5, device=device)
    held = impl.held_shape(v, impl._vector(z), dtype)
    lane = held["PIECES"] * held["W"]

    def score(shape):
        impl.fused_score("dpsm", knob, z, y, None, None, stats, correct, losses, fisher, out, shape=shape)

    plain = impl._shape(v, impl._vector(z)) | {"PIECES": 0, "PACKED": False}
    jobs = {"two_reads": lambda: score(plain), "copy": lambda: out.copy_(z)}
    if lane * z.element_size() / 4 <= MOST_REGISTERS:
        jobs["one_read"] = lambda: score(held)
    times = {name: [] for name in jobs}
    for turn in range(repeats + 3):  # the first rounds compile
        for name, job in jobs.items():
            seconds = time_once(job, device)
            if turn >= 3:
                times[name].append(1e3 * seconds)
    ms = {f"{name}_ms": statistics.median(x) for name, x in times.items()}
    chosen = impl._resident_shape(v, impl._vector(z), dtype, impl._capability(z.device))
    now = "one read" if chosen["PIECES"] else "two reads"
    return dict(one_read_ms=None) | ms | dict(elements_a_lane=lane, now=now)


def time_chunks(n: int, v: int, d: int, dtype: str, device: str, repeats: int, sizes) -> dict[int, float]:
    """{tokens a chunk: median over rounds of linear_score's time over that of its bare matrix products}."""
    leaves, targets = make_inputs(True, n, v, d, dtype, device)
    score = dpsm(ALPHA)
    jobs = {
        size: lambda h, w, y, size=size: linear_score(h, w, y, score, fisher=True, chunk=size)[0] for size in sizes
    } | {0: matrix_products}
    times = {size: [] for size in jobs}
    for turn in range(repeats + 3):
        for size, job in jobs.items():
            seconds = time_once(lambda job=job: run_once(job, leaves, targets), device)
            if turn >= 3:
                times[size].append(seconds)
    products = times.pop(0)
    return {size: statistics.median(a / b for a, b in zip(x, products, strict=True)) for size, x in times.items()}


def paths(args, add) -> None:
    """Calls ``add`` with one row a dtype and vocabulary, and one a shape and size of chunk, printed as tables.
    Needs CUDA."""
    from kernels import triton_impl as impl

    about, best = where_and_when(args.device), {}
    print(f"one read of a row against two, DPSM and gradient, N={TOKENS} on {about['device']}")
    print(
        f"{'dtype':6} {'V':>7} {'a lane':>7} {'one read ms':>12} {'two reads ms':>13} {'copy ms':>8} {'now':>10} faster"
    )
    for dtype in ("bf16", "fp32"):
        for v in VOCABULARIES:
            row = dict(provider="score_kernel", n=TOKENS, v=v, d=None, dtype=dtype)
            row |= time_paths(v, DTYPES[dtype], args.device, args.repeats)
            one, two = row["one_read_ms"], row["two_reads_ms"]
            row["faster"] = "one read" if one is not None and one < two else "two reads"
            if row["faster"] == "one read":
                best[dtype] = max(best.get(dtype, 0), row["elements_a_lane"])
            add(row | dict(repeats=args.repeats) | about)
            one = "does not fit" if one is None else f"{one:.3f}"
            print(
                f"{dtype:6} {v:7} {row['elements_a_lane']:7} {one:>12} {two:13.3f} {row['copy_ms']:8.3f} "
                f"{row['now']:>10} {row['faster']}",
                flush=True,
            )
    hopper = impl._capability(torch.device(args.device)) >= 90
    for dtype, name in (("bf16", "RESIDENT_HOPPER" if hopper else "RESIDENT_AMPERE"), ("fp32", "RESIDENT_FP32")):
        print(f"{name} = {getattr(impl, name)} now; one read won up to {best.get(dtype, 0)} elements a lane")
    sizes = [TILE << i for i in range(7)]  # 128 ... 8192
    print("linear_score over its matrix products, bf16, by tokens a chunk")
    for name, (n, v, d) in SHAPES.items():
        chosen = cuda_chunk(n, v, d, 2, 2, torch.device("cuda", torch.cuda.current_device()))
        ratios = time_chunks(n, v, d, "bf16", args.device, args.repeats, sorted({*sizes, chosen}))
        for size, ratio in ratios.items():
            row = dict(provider="linear_score", n=n, v=v, d=d, dtype="bf16", chunk=size, ratio_to_products=ratio)
            add(row | dict(chosen=size == chosen, repeats=args.repeats) | about)
            print(f"{name:6} {size:6} {ratio:7.3f}{'  chosen' if size == chosen else ''}", flush=True)
