"""What one device does, a line a figure: its ceilings, and each kernel beside the bytes that it must move.

    python -m races.probes --jsonl probes.jsonl
    python -m races.probes --only ceilings,ties

ceilings   a copy of 2 GB (bytes read and written a second), a product of 8192 cubed, those of both heads
ties       score_kernel with gradient, where no target ties with the maximum, 1 % do, 3 % do; its share of a copy
passes     moments_kernel, gradient_kernel and rescale_kernel (by 1, which reads nothing, and by 2) beside a copy
host       what the host takes to launch a loss: of 64 tokens, where the device has nothing to do
graph      linear_score, forward and backward, captured in a CUDA graph: its gradients are those of the eager call
memory     linear_score over the head's products, in 300 MB and where one chunk is all
fot        the sums of a sample of FoT's over 124 M parameters, torch's operations and the one kernel
casts      Qwen3-0.6B's adapters of rank 64 from fp32 to bf16, each alone and all together
layers     a decoder's layers at the shapes of Qwen3-0.6B, 8192 tokens, gains frozen but in the last: torch's operations
           and the one kernel, forward and backward, and what the host takes to launch both ways of 64 tokens
replay     forward and backward of the scripts' micro-batches, as they are and as CUDA graphs
fp8        a block of GPT-2 124M and 1.3B under torch.compile, forward and backward of 16 x 1024 tokens, its products in
           bf16 and in FP8; the widest product alone
attention  scaled_dot_product_attention of a shape seen before and of new ones, with cuDNN's and without; packed rows
           of GSM8K's lengths at Qwen3-0.6B's heads, a layer, with a mask and with varlen_attn

Every figure is a JSON line: probe, case, value, unit. A probe that fails has the reason and the next one begins. On a
CPU the shapes are tiny, and the Triton kernels need TRITON_INTERPRET=1: it shows that the probes run, no more.
"""

import sys

if not __package__:  # a file by its name finds no package
    print("python -m races.probes: error: type it like this, in the folder that holds races/", file=sys.stderr)
    sys.exit(2)

import contextlib
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from data.packing import Example, pack
from kernels import dpsm, linear_score, rms_norm, rope, swiglu
from kernels.bench import timing
from kernels.bench.limits import Limits
from kernels.bench.providers import ALPHA, MatrixProducts
from kernels.bench.rows import reason
from kernels.bench.timing import HEADS, Shape
from kernels.impl import choose_impl
from kernels.moments import Stats, new_stats
from model.decoder import Decoder, DecoderConfig
from model.fp8 import product, scaled, switch_on
from model.gpt2 import GPT2, SIZES, GPT2Config
from model.layers import Linear
from model.lora import LoRAConfig, NF4Linear, add_lora
from model.varlen import Bounds, bounds_of, lacking
from races.common import add_limits, check_least, here_and_now, race_parser
from runtime.cli import user_errors
from runtime.graph import Replayed
from schedules.commandline import alive

TINY = {"gpt2": Shape(4, 130, 32), "qwen3": Shape(4, 258, 32)}
Figures = Iterator[tuple[str, float, str]]  # case, value, unit


class Bench:
    """The device, its shapes, and its timer."""

    def __init__(self, device: str):
        self.device, self.cuda = device, device == "cuda"
        self.heads = HEADS if self.cuda else TINY
        self.dtype = torch.bfloat16 if self.cuda else torch.float32

    def ms(self, jobs: dict[str, Callable]) -> dict[str, float]:
        repeats = 20 if self.cuda else 1
        times = timing.time_in_turns(jobs, self.device, repeats, queued=True)
        return {name: timing.median_ms(times, name) for name in jobs}

    def host_us(self, job: Callable) -> float:
        """What the host takes to launch it, the device idle before."""
        seconds = []
        for _ in range(50 if self.cuda else 2):
            start = time.perf_counter()
            job()
            seconds.append(time.perf_counter() - start)
            if self.cuda:
                torch.cuda.synchronize()
        return 1e6 * statistics.median(seconds)

    def logits(self, v: int, tied: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and targets of a head's rows; ``tied``: the share of rows whose target ties with the maximum."""
        n = self.heads["gpt2"].n
        z = torch.randn(n, v, device=self.device, dtype=self.dtype).mul_(3)
        y = torch.randint(v, (n,), device=self.device)
        rows = torch.arange(n, device=self.device)
        z[rows, y] = -1.0
        z[rows, (y + 1) % v] = 20.0
        some = rows[: round(tied * n)]
        z[some, y[some]] = 20.0
        return z, y

    def scored(self, z, y, out) -> Callable:
        """DPSM with its gradient by the fused kernel."""
        triton = choose_impl("triton", z)
        stats, correct = new_stats(z, len(z))
        rest = dict(stats=stats, correct=correct, losses=stats[0].clone(), fisher=stats[0].clone(), out=out)
        knob = torch.full((), ALPHA, device=self.device)
        return partial(triton.fused_score, "dpsm", knob, z, y, None, None, **rest)


def ceilings(b: Bench) -> Figures:
    source = torch.randn(2**29 if b.cuda else 2**12, device=b.device, dtype=b.dtype)
    target, k = torch.empty_like(source), 8192 if b.cuda else 64
    x, w = (torch.randn(k, k, device=b.device, dtype=b.dtype) for _ in range(2))
    jobs = {"copy": lambda: target.copy_(source), f"{k} cubed": lambda: x @ w}
    flops = {f"{k} cubed": 2 * k**3}
    for name, (n, v, d) in b.heads.items():
        leaves, y = timing.make_inputs(Shape(n, v, d), "bf16" if b.cuda else "fp32", b.device)
        case = f"head's products, {name}"
        jobs[case] = partial(timing.run_once, MatrixProducts.apply, leaves, y)
        flops[case] = 6 * n * v * d
    ms = b.ms(jobs)
    yield "copy", 2e-6 * source.nbytes / ms["copy"], "GB/s"
    for case, count in flops.items():
        yield case, ms[case], "ms"
        yield case, 1e-9 * count / ms[case], "TFLOP/s"


def ties(b: Bench) -> Figures:
    for _, v, _ in b.heads.values():
        jobs, out = {}, None
        for share in (0.0, 0.01, 0.03):
            z, y = b.logits(v, share)
            out = torch.empty_like(z) if out is None else out
            jobs[f"V={v}, {share:.0%} tied"] = b.scored(z, y, out)
        jobs["copy"] = lambda z=z, out=out: out.copy_(z)
        ms = b.ms(jobs)
        for case in jobs:
            yield case if case != "copy" else f"V={v}, copy", ms[case], "ms"
        yield f"V={v}, of a copy", ms["copy"] / ms[f"V={v}, 0% tied"], "share"


def passes(b: Bench) -> Figures:
    for _, v, _ in b.heads.values():
        z, y = b.logits(v)
        triton, out, one = choose_impl("triton", z), torch.empty_like(z), torch.ones((), device=b.device)
        stats, correct = new_stats(z, len(z))
        triton.forward(z, y, stats, correct, 0.0)
        a = torch.ones(len(z), device=b.device)
        coefficients = (a, a, None, None, None, a)
        jobs = {
            "copy": lambda z=z, out=out: out.copy_(z),
            "moments": partial(triton.forward, z, y, stats, correct, 0.0),
            "gradient": partial(triton.gradient, z, y, None, Stats(*stats), coefficients, 0.0, out),
            "rescale by 1": partial(triton.rescale, out, one),
            "rescale by 2": partial(triton.rescale, out, 2 * one),
        }
        for case, value in b.ms(jobs).items():
            yield f"V={v}, {case}", value, "ms"


def host(b: Bench) -> Figures:
    leaves, y = timing.make_inputs(Shape(64, 1000, 64), "bf16" if b.cuda else "fp32", b.device)
    score = dpsm(ALPHA)
    losses = {
        "linear_score, DPSM with Fisher": lambda h, w, y: linear_score(h, w, y, score, fisher=True)[0],
        "torch, linear and cross-entropy": lambda h, w, y: F.cross_entropy(F.linear(h, w), y),
    }
    for case, loss in losses.items():
        yield case, b.host_us(partial(timing.run_once, loss, leaves, y)), "us"


def graph(b: Bench) -> Figures:
    for name, shape in b.heads.items():
        leaves, y = timing.make_inputs(shape._replace(n=2048), "bf16", b.device)
        alpha = torch.full((), ALPHA, device=b.device)
        score, denominator = dpsm(alpha), torch.full((), 2048.0, device=b.device)

        def step(h, w, y, score=score, denominator=denominator):
            return linear_score(h, w, y, score, fisher=True, denominator=denominator)[0]

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                timing.run_once(step, leaves, y)
        torch.cuda.current_stream().wait_stream(side)
        wanted = [x.grad.clone() for x in leaves]
        timing.drop_gradients(leaves)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            step(*leaves, y).backward()
        captured.replay()
        torch.cuda.synchronize()
        off = max(((x.grad - w).abs().max() / w.abs().max()).item() for x, w in zip(leaves, wanted, strict=True))
        yield f"{name}, gradients of the graph less the eager ones", off, "of the largest"
        yield f"{name}, replay", b.ms({"replay": captured.replay})["replay"], "ms"
        timing.drop_gradients(leaves)
        times = timing.time_in_turns({"eager": partial(timing.run_once, step, leaves, y)}, b.device, 20)
        yield f"{name}, eager", timing.median_ms(times, "eager"), "ms"
        del captured


def attention(b: Bench) -> Figures:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def inputs(batch, length):
        new = dict(device=b.device, dtype=b.dtype, requires_grad=True)
        return [torch.randn(batch, 12, length, 64, **new) for _ in range(3)]

    def step(qkv):
        F.scaled_dot_product_attention(*qkv, is_causal=True).sum().backward()

    kinds = {"as torch chooses": None, "flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
    for kind, backend in kinds.items() if b.cuda else [("as torch chooses", None)]:
        try:
            with sdpa_kernel(backend) if backend else contextlib.nullcontext():
                known = inputs(16 if b.cuda else 1, 1024 if b.cuda else 16)
                ms = b.ms({"known": lambda known=known: step(known)})["known"]
                yield f"{kind}, a shape seen before, 16 x 12 x 1024 x 64", ms, "ms"
                seconds = []
                for length in range(521, 527) if b.cuda else (17, 18):
                    fresh = inputs(16 if b.cuda else 1, length)
                    seconds.append(timing.time_once(lambda fresh=fresh: step(fresh), b.device))
                yield f"{kind}, a new length", 1e3 * statistics.median(seconds), "ms"
        except RuntimeError as e:
            print(f"attention, {kind}: {e}".splitlines()[0], file=sys.stderr)
    for length in (512, 1024) if b.cuda else (32,):
        yield from packed(b, length)


def packed(b: Bench, length: int) -> Figures:
    """Layers that are attention and little else: 16 components beside the heads, and no positions. GSM8K's problems
    have 206 of Qwen's tokens on average, most of them 120 to 337."""
    heads, lengths, layers = ((16, 8, 128), (75, 337), 4) if b.cuda else ((4, 2, 8), (4, 12), 1)
    shape = DecoderConfig(64, 16, 16, layers, *heads, length, model_type="smollm3", no_rope_layers=[0] * layers)
    model, draw = Decoder(shape, b.dtype).to(b.device), random.Random(0)
    rows = pack([Example("", [0] * draw.randint(*lengths), 1) for _ in range(length // 16)], length)
    cu_seqlens, max_seqlen = bounds_of(rows.documents_RT)
    tokens, documents, cu_seqlens = (t.to(b.device) for t in (rows.tokens_RT, rows.documents_RT, cu_seqlens))

    def forward(varlen: bool) -> torch.Tensor:
        model.varlen = varlen
        return model(tokens, documents_BT=documents, bounds=Bounds(cu_seqlens, max_seqlen))

    def step(varlen: bool) -> None:
        forward(varlen).sum().backward()

    kinds = {"mask": False, "varlen_attn": True}
    if why := lacking(cu_seqlens.device, b.dtype, shape.head_dim):
        print(f"attention, no varlen_attn: {why}", file=sys.stderr)
        del kinds["varlen_attn"]
    what = "{} x {} tokens, {} documents, {{}}".format(*tokens.shape, length // 16)
    jobs = {f"{k}, {job.__name__}": partial(job, v) for k, v in kinds.items() for job in (forward, step)}
    for case, value in b.ms(jobs).items():
        yield what.format(case), value / layers, "ms a layer"
    for case, job in jobs.items():
        yield what.format(f"{case}, the host"), b.host_us(job) / layers, "us a layer"


def memory(b: Bench) -> Figures:
    for name, shape in b.heads.items():
        leaves, y = timing.make_inputs(shape, "bf16" if b.cuda else "fp32", b.device)
        jobs = {"products": partial(timing.run_once, MatrixProducts.apply, leaves, y)}
        for case, given in (("300 MB", 3 * 10**8), ("one chunk", 4 * 10**9)):

            def loss(h, w, y, given=given):
                return linear_score(h, w, y, dpsm(ALPHA), fisher=True, memory=given)[0]

            jobs[case] = partial(timing.run_once, loss, leaves, y)
        ms = b.ms(jobs)
        for case, value in ms.items():
            yield f"{name}, {case}", value, "ms"
            yield f"{name}, {case}", value / ms["products"], "of the products"


def fot(b: Bench) -> Figures:
    from schedules import gradient_stats, triton_stats

    shapes = [(50257, 768), (1024, 768)] + 12 * [(768,), (2304, 768), (768, 768), (3072, 768), (768, 3072)]
    shapes = shapes if b.cuda else [(40, 30), (7,)]
    held = [[torch.randn(shape, device=b.device).flatten() for _ in range(3)] for shape in shapes]
    for tensors in held:
        tensors[2].square_()
        tensors.append(tensors[0].bfloat16())
    eps = torch.full((), 1e-8, device=b.device, dtype=torch.float64)
    for what, begin in (("begins", True), ("ends", False)):
        given = [x if begin else x[:3] for x in held], eps, eps, 0.5, begin
        jobs = {"torch": partial(gradient_stats._dots, *given), "one kernel": partial(triton_stats.dots, *given)}
        for case, value in b.ms(jobs).items():
            yield f"a sample {what}, {case}", value, "ms"


def casts(b: Bench) -> Figures:
    layers = [(2048, 1024), (1024, 1024), (1024, 1024), (1024, 2048), (3072, 1024), (3072, 1024), (1024, 3072)]
    layers = layers * 28 if b.cuda else layers[:1]  # Qwen3-0.6B's, of rank 64
    wide = [torch.randn(size, device=b.device) for n_out, n_in in layers for size in ((64, n_in), (n_out, 64))]
    narrow = [x.bfloat16() for x in wide]
    together = partial(torch._foreach_copy_, narrow, wide)
    for case, job in {"alone": lambda: [x.bfloat16() for x in wide], "together": together}.items():
        yield f"{case}, the device", b.ms({case: job})[case], "ms"
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            job()
            seconds.append(time.perf_counter() - start)
        yield f"{case}, the host", 1e3 * statistics.median(seconds), "ms"


def replay(b: Bench) -> Figures:
    """Micro-batches as the scripts have them, each as it is and as `runtime.graph.Replayed` has it."""
    for case, (model, tokens) in models(b).items():
        if case.endswith("NF4"):
            add_lora(model, LoRAConfig(64))
        trained = [p for p in model.parameters() if p.requires_grad]
        targets, alpha = tokens.flatten(), torch.full((), ALPHA, device=b.device)
        score, denominator = dpsm(alpha), torch.full((), float(tokens.numel()), device=b.device)

        def step(tokens, targets, model=model, score=score, denominator=denominator):
            hidden = model(tokens).flatten(0, 1)
            loss, moments = linear_score(hidden, model.head_weight, targets, score, denominator=denominator)
            loss.backward()
            return loss.detach(), moments

        jobs = {"as it is": step} | ({"replayed": Replayed(step, trained)} if b.cuda else {})
        for how, job in jobs.items():
            for _ in range(3):  # what is replayed is captured in the second
                job(tokens, targets)
            run = partial(job, tokens, targets)
            yield f"{case}, {how}", b.ms({how: run})[how], "ms"
            yield f"{case}, {how}, the host", b.host_us(run), "us"
            if b.cuda:
                times = timing.time_in_turns({how: run}, b.device, 20)
                yield f"{case}, {how}, with the host's lead", timing.median_ms(times, how), "ms"


def models(b: Bench) -> dict[str, tuple[torch.nn.Module, torch.Tensor]]:
    """Models on the device, with the tokens [B, T] of a micro-batch. Weights are drawn there, which takes no time."""
    shapes = {"nano": (16, 128, 4096), "mini": (16, 256, 8192), "gpt2": (16, 1024, 50257)}
    wide = (151936, 1024, 3072, 28, 16, 8, 128) if b.cuda else (130, 64, 64, 1, 2, 1, 32)
    found = {}
    with torch.device("meta"):
        for name, (rows, length, vocab) in shapes.items() if b.cuda else [("pico", (2, 16, 100))]:
            shape = GPT2Config(vocab_size=vocab, block_size=length, **SIZES[name])
            found[f"GPT-2 {name}, {rows} x {length}"] = GPT2(shape, b.dtype), (rows, length)
        decoder = Decoder(DecoderConfig(*wide, tie_word_embeddings=True), b.dtype).to(b.dtype)
        rows, length = (8, 512) if b.cuda else (2, 16)
    for case, (model, size) in found.items():
        found[case] = drawn(model, b), torch.randint(model.config.vocab_size, size, device=b.device)
    for path, layer in [*drawn(decoder, b).named_modules()]:
        if isinstance(layer, Linear):
            decoder.set_submodule(path, NF4Linear(layer.weight.detach()))
    tokens = torch.randint(wide[0], (rows, length), device=b.device)
    return found | {f"Qwen3-0.6B's shape, {rows} x {length}, NF4": (decoder, tokens)}


@torch.no_grad()
def drawn(model: torch.nn.Module, b: Bench) -> torch.nn.Module:
    for p in model.to_empty(device=b.device).parameters():
        p.normal_(0, 0.02) if p.ndim > 1 else p.fill_(1)
    return model


def fp8(b: Bench) -> Figures:
    for name in ("gpt2", "gpt2-1.3b") if b.cuda else ("pico",):
        rows, length, d = 16 if b.cuda else 1, 1024 if b.cuda else 16, SIZES[name]["n_embd"]
        shape = GPT2Config(vocab_size=16, block_size=length, **SIZES[name] | dict(n_layer=1))
        x = torch.randn(rows, length, d, device=b.device, dtype=b.dtype, requires_grad=True)
        w = torch.randn(4 * d, d, device=b.device, dtype=b.dtype)
        (x8, of_x), (w8, of_w) = (scaled(t.detach(), torch.float8_e4m3fn) for t in (x.flatten(0, 1), w))
        jobs = {"product, bf16": partial(torch.matmul, x.detach(), w.t())}
        jobs["product, FP8"] = partial(product, x8, w8.t(), of_x, of_w, b.dtype, fast=b.cuda)
        for how in ("bf16", "FP8"):
            with torch.device("meta"):
                model = GPT2(shape, b.dtype)
            drawn(model, b).train()
            if how == "FP8":
                switch_on(model.h)
            if b.cuda:
                model.h[0].compile()
            jobs[f"block, {how}"] = lambda block=model.h[0], x=x: block(x).sum().backward()
        for case, value in b.ms(jobs).items():
            yield f"{d} wide, {case}", value, "ms"


def layers(b: Bench) -> Figures:
    d, query_heads, key_heads, k, wide = (1024, 16, 8, 128, 3072) if b.cuda else (32, 2, 1, 8, 48)

    def new(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=b.device, dtype=b.dtype, requires_grad=True)

    def ways(tokens: int) -> Iterator[tuple[str, Callable, Callable]]:
        """Each layer's case, its forward, and its backward, of a graph that is kept."""
        x, delta, gain = new(tokens, d), new(tokens, d), new(d)
        angles = (new(1, tokens, 1, k // 2).detach() for _ in range(2))
        turned, frozen = (*angles, new(k).detach()), gain.detach()
        cases = {
            "norm": (rms_norm, (x, delta, frozen, 1e-6)),
            "queries": (rope, (new(1, tokens, query_heads, k), *turned)),
            "keys": (rope, (new(1, tokens, key_heads, k), *turned)),
            "SwiGLU": (swiglu, (new(tokens, wide), new(tokens, wide))),
            "norm with its gain": (rms_norm, (x, delta, gain, 1e-6)),
        }
        for impl in ("torch", "triton"):
            for case, (layer, given) in cases.items():
                forward = partial(layer, *given, impl=impl)
                out = forward()
                out = out if isinstance(out, tuple) else (out,)
                trained = [t for t in given if torch.is_tensor(t) and t.requires_grad]
                slopes = [torch.ones_like(y) for y in out]
                yield f"{case}, {impl}", forward, partial(torch.autograd.grad, out, trained, slopes, retain_graph=True)

    jobs = {}
    for case, forward, backward in ways(8192 if b.cuda else 4):
        jobs |= {f"{case}, forward": forward, f"{case}, backward": backward}
    for case, value in b.ms(jobs).items():
        yield case, value, "ms"
    for case, forward, backward in ways(64 if b.cuda else 4):
        yield f"{case}, forward, the host", b.host_us(forward), "us"
        yield f"{case}, backward, the host", b.host_us(backward), "us"


ALL = ceilings, ties, passes, host, graph, memory, fot, casts, layers, replay, fp8, attention
PROBES = {f.__name__: f for f in ALL}


@alive()
def main(argv=None) -> int:
    parser = race_parser("probes", __doc__)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device)
    parser.add_argument(
        "--only", default="", help="names of probes, with commas (default: all; on a CPU without graph)"
    )
    parser.add_argument("--jsonl", type=Path, help="also write the lines there, each as it comes")
    add_limits(parser)
    args = parser.parse_args(argv)
    with user_errors():
        check_least(args, rows=0, seconds=0)
    names = [name for name in args.only.split(",") if name]
    names = names or [name for name in PROBES if name != "graph" or args.device == "cuda"]
    if unknown := [name for name in names if name not in PROBES]:
        print(
            f"python -m races.probes: error: --only {unknown[0]}: expected names of {', '.join(PROBES)}",
            file=sys.stderr,
        )
        return 2
    where, limits, written, failed = here_and_now(torch.device(args.device)), Limits(args.seconds, args.rows), 0, 0

    def say(row: dict) -> None:
        nonlocal written
        written += 1
        print(json.dumps(row), flush=True)
        if args.jsonl:
            with args.jsonl.open("a") as file:
                file.write(json.dumps(row | where) + "\n")

    for name in names:
        if not limits.admit([name], written):
            continue
        try:
            for case, value, unit in PROBES[name](Bench(args.device)):
                say(dict(probe=name, case=case, value=float(f"{value:.4g}"), unit=unit))
                if written == limits.rows:
                    limits.left_out.append(f"what {name} has beyond {case}")
                    break
        except Exception as e:  # the next probe may go through
            failed += 1
            say(dict(probe=name, case="failed", value=None, unit=reason(e)))
        if args.device == "cuda":
            torch.cuda.empty_cache()
    limits.say()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
