"""What triton_impl.score_shape and chunks.chunk_rows should choose on this GPU: how score_kernel holds a row, and how
many tokens a chunk of linear_score has."""

from functools import partial
from typing import NamedTuple

import torch

from ..chunks import TILE, cuda_chunk
from ..head import linear_score
from ..losses import dpsm
from ..moments import new_stats
from . import timing
from .providers import ALPHA, FROM_HIDDEN
from .rows import Rows
from .timing import Shape

LOGITS = (("bf16", 50257), ("bf16", 151936), ("fp32", 50257))
TOKENS = 4096


class Held(NamedTuple):
    """How score_kernel holds a row: warps, vectors that a lane holds (0: all is read twice), stages of the loops over
    what is read twice, hints to the cache."""

    warps: int
    held: int
    stages: int
    hints: bool


def shapes_of(v: int, dtype: torch.dtype) -> dict[Held, dict]:
    """{how: launch constants}, what score_shape chooses first."""
    from ..triton_impl import score_shape

    found = {}
    others = [dict(warps=w, held=h) for w in (8, 16) for h in (25, 18, 0)] + [dict(stages=2), dict(hints=True)]
    for given in ({}, *others):
        shape = score_shape(v, dtype, **given)
        stages = shape["STAGES"] if shape["MORE"] else 1
        found.setdefault(Held(shape["num_warps"], shape["PIECES"], stages, shape["HINTS"]), shape)
    return found


def time_paths(v: int, dtype: torch.dtype, device: str, repeats: int, keys: list[Held]) -> dict[Held | str, float]:
    """Milliseconds of DPSM with its gradient on TOKENS rows by the ``keys`` of ``shapes_of``, and of copying the logits
    ("copy")."""
    from ..triton_impl import fused_score

    z = torch.randn(TOKENS, v, dtype=dtype, device=device)
    y = torch.randint(v, (TOKENS,), device=device)
    out, (stats, correct) = torch.empty_like(z), new_stats(z, TOKENS)
    results = dict(stats=stats, correct=correct, losses=stats[0].clone(), fisher=stats[0].clone(), out=out)
    run = partial(fused_score, "dpsm", torch.full((), 0.5, device=device), z, y, None, None, **results)
    jobs = {key: partial(run, shape=shape) for key, shape in shapes_of(v, dtype).items() if key in keys}
    times = timing.time_in_turns(jobs | {"copy": lambda: out.copy_(z)}, device, repeats, queued=True)
    return {key: timing.median_ms(times, key) for key in times}


def time_chunks(shape: Shape, dtype: str, device: str, repeats: int, sizes) -> dict[int, float]:
    """{tokens a chunk: median over rounds of linear_score's time over that of its bare matrix products}."""
    leaves, targets = timing.make_inputs(shape, dtype, device)
    functions = {"products": FROM_HIDDEN["matrix products"]}
    for size in sizes:
        functions[size] = lambda *x, chunk=size: linear_score(*x, dpsm(ALPHA), fisher=True, chunk=chunk)[0]
    jobs = {key: partial(timing.run_once, function, leaves, targets) for key, function in functions.items()}
    times = timing.time_in_turns(jobs, device, repeats, queued=True)
    return {size: timing.median_ratio(times, size, "products") for size in sizes}


def time_choices(args, rows: Rows) -> None:
    """One row a dtype, vocabulary and shape, and one a size of chunk. Needs CUDA."""
    title = f"DPSM with its gradient, N={TOKENS}, on {rows.about['device']}"
    rows.begin(title, "provider", "dtype", "v", *Held._fields, "step_ms", "share_of_copy")
    for dtype, v in LOGITS:
        common = dict(n=TOKENS, v=v, d=None, dtype=dtype)
        with rows.part("score_kernel", **common):
            shapes = {f"score_kernel {dtype} {v} {key}": key for key in shapes_of(v, timing.DTYPE_OF[dtype])}
            chosen = next(iter(shapes.values()))
            keys = [shapes[name] for name in rows.admit(name for name in shapes if args.only in name)]
            times = time_paths(v, timing.DTYPE_OF[dtype], args.device, args.repeats, keys) if keys else {}
            copy, fastest = times.pop("copy", None), min(times, key=times.get, default=None)
            for key, ms in times.items():
                row = dict(provider="score_kernel", **common, **key._asdict(), step_ms=ms, copy_ms=copy)
                row |= dict(share_of_copy=copy / ms, chosen=key == chosen, repeats=args.repeats)
                rows.add(row, "  chosen" * (key == chosen) + "  fastest" * (key == fastest))
    sizes = [TILE << i for i in range(7)]  # 128 ... 8192
    title = "linear_score over its matrix products, bf16, by tokens a chunk"
    rows.begin(title, "provider", "v", "chunk", "ratio_to_products")
    for shape in timing.HEADS.values():
        common = shape._asdict() | dict(dtype="bf16")
        with rows.part("linear_score", **common):
            chosen = cuda_chunk(*shape, 2, 2, torch.device("cuda", torch.cuda.current_device()), direct=True)
            names = {f"linear_score {shape.v} chunk={size}": size for size in sorted({*sizes, chosen})}
            some = [names[name] for name in rows.admit(name for name in names if args.only in name)]
            ratios = time_chunks(shape, "bf16", args.device, args.repeats, some) if some else {}
            for size, ratio in ratios.items():
                row = dict(provider="linear_score", **common, chunk=size, ratio_to_products=ratio)
                rows.add(row | dict(chosen=size == chosen, repeats=args.repeats), "  chosen" * (size == chosen))
