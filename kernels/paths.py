"""What the fixed choices should be on this GPU: how score_kernel holds a row, and tokens a chunk of linear_score.

    python -m kernels.bench --paths --csv paths.csv

triton_impl.score_shape decides with how many warps a row is read and how many vectors of it a lane holds (HELD,
HELD_OF_MORE, MOST_WARPS). This times DPSM with its gradient in other shapes beside that one, in turns, and beside
copying the logits. Then linear_score at the bench's shapes in chunks of many sizes, over the bare matrix products,
beside what chunks.chunk_rows chooses.
"""

import statistics

import torch

from kernels import linear_score
from kernels.bench import DTYPES, SHAPES, make_inputs, run_once, time_once, where_and_when
from kernels.chunks import TILE, cuda_chunk
from kernels.losses import dpsm
from kernels.providers import ALPHA, matrix_products

ROWS = (("bf16", 50257), ("bf16", 151936), ("fp32", 50257))
TOKENS = 4096


def shapes_of(v: int, dtype: torch.dtype) -> dict[tuple[int, int], dict]:
    """{(warps, vectors a lane holds): launch constants}, what score_shape chooses first; 0 vectors: the whole row is
    read twice."""
    from kernels.triton_impl import score_shape

    found = {}
    for given in ({}, *(dict(warps=w, held=h) for w in (8, 16) for h in (25, 18, 0))):
        shape = score_shape(v, dtype, **given)
        found.setdefault((shape["num_warps"], shape["PIECES"]), shape)
    return found


def time_paths(v: int, dtype: torch.dtype, device: str, repeats: int) -> tuple[dict[tuple[int, int], float], float]:
    """Milliseconds of DPSM with its gradient on TOKENS rows by ``shapes_of``, and of copying the logits."""
    from kernels import triton_impl as impl
    from kernels.moments import new_stats

    z = torch.randn(TOKENS, v, dtype=dtype, device=device)
    y = torch.randint(v, (TOKENS,), device=device)
    out, (stats, correct) = torch.empty_like(z), new_stats(z, TOKENS)
    losses, fisher = torch.empty_like(stats[0]), torch.empty_like(stats[0])
    knob = torch.full((), 0.5, device=device)
    jobs = {
        key: lambda shape=shape: impl.fused_score(
            "dpsm", knob, z, y, None, None, stats, correct, losses, fisher, out, shape=shape
        )
        for key, shape in shapes_of(v, dtype).items()
    } | {None: lambda: out.copy_(z)}
    times = {key: [] for key in jobs}
    for turn in range(repeats + 3):  # the first rounds compile
        for key, job in jobs.items():
            seconds = time_once(job, device)
            if turn >= 3:
                times[key].append(1e3 * seconds)
    ms = {key: statistics.median(x) for key, x in times.items()}
    return ms, ms.pop(None)


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
    """Calls ``add`` with one row a dtype, vocabulary and shape, and one a size of chunk, printed as tables. Needs
    CUDA."""
    about = where_and_when(args.device)
    print(f"DPSM with its gradient, N={TOKENS}, on {about['device']}")
    print(f"{'dtype':6} {'V':>7} {'warps':>6} {'held':>5} {'ms':>8} {'of copy':>8}")
    for dtype, v in ROWS:
        times, copy = time_paths(v, DTYPES[dtype], args.device, args.repeats)
        chosen, fastest = next(iter(times)), min(times, key=times.get)
        for (warps, held), ms in times.items():
            row = dict(provider="score_kernel", n=TOKENS, v=v, d=None, dtype=dtype, warps=warps, held=held)
            row |= dict(step_ms=ms, copy_ms=copy, share_of_copy=copy / ms, chosen=(warps, held) == chosen)
            add(row | dict(repeats=args.repeats) | about)
            marks = "  chosen" * ((warps, held) == chosen) + "  fastest" * ((warps, held) == fastest)
            print(f"{dtype:6} {v:7} {warps:6} {held:5} {ms:8.3f} {copy / ms:8.0%}{marks}", flush=True)
    sizes = [TILE << i for i in range(7)]  # 128 ... 8192
    print("linear_score over its matrix products, bf16, by tokens a chunk")
    for name, (n, v, d) in SHAPES.items():
        chosen = cuda_chunk(n, v, d, 2, 2, torch.device("cuda", torch.cuda.current_device()))
        ratios = time_chunks(n, v, d, "bf16", args.device, args.repeats, sorted({*sizes, chosen}))
        for size, ratio in ratios.items():
            row = dict(provider="linear_score", n=n, v=v, d=d, dtype="bf16", chunk=size, ratio_to_products=ratio)
            add(row | dict(chosen=size == chosen, repeats=args.repeats) | about)
            print(f"{name:6} {size:6} {ratio:7.3f}{'  chosen' if size == chosen else ''}", flush=True)
