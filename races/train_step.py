"""A whole training step of a GPT-2, DPSM through linear_score against torch's cross-entropy through logits.

    python -m kernels.bench --train-step --csv step.csv

One model and one AdamW serve all sides, which take turns step by step: forward, loss, backward, optimizer. On a
GPU it is GPT-2 124M on 8 x 1024 random tokens, bf16 activations over fp32 weights, blocks under torch.compile; on
CPU a tiny one in fp32. Peak memory is what a step needs beyond weights and optimizer state.
"""

import statistics

import torch
import torch.nn.functional as F

from kernels import linear_score
from kernels.bench import DTYPES, time_once, where_and_when
from kernels.losses import ce, dpsm
from kernels.providers import ALPHA

GPU_SHAPE = dict(batch=8, block=1024, vocab_size=50257, n_layer=12, n_head=12, n_embd=768)
CPU_SHAPE = dict(batch=2, block=32, vocab_size=509, n_layer=2, n_head=2, n_embd=32)
BASE = "step: torch CE"


def sides(device: str) -> dict:
    """{name: loss of (hidden [N, D], weight [V, D], targets [N])}."""

    def through_logits(h, w, y):
        return F.cross_entropy(F.linear(h, w.to(h.dtype)), y)

    score = dpsm(ALPHA)
    found = {
        BASE: through_logits,
        "step: our CE": lambda h, w, y: linear_score(h, w, y, ce)[0],
        "step: DPSM, Fisher": lambda h, w, y: linear_score(h, w, y, score, fisher=True)[0],
    }
    if device == "cuda":
        found["step: compiled torch CE"] = torch.compile(through_logits)
    return found


def train_step(args, add) -> None:
    """Calls ``add`` with one row a side; args: device, repeats, dtype."""
    from model.gpt2 import GPT2, GPT2Config, decay_groups

    shape = dict(GPU_SHAPE if args.device == "cuda" else CPU_SHAPE)
    batch, block = shape.pop("batch"), shape.pop("block")
    torch.manual_seed(0)
    model = GPT2(GPT2Config(block_size=block, **shape), dtype=DTYPES[args.dtype]).to(args.device)
    if args.device == "cuda":
        for part in model.h:
            part.compile()
    optimizer = torch.optim.AdamW(decay_groups(model, 0.1), lr=1e-4, fused=True)
    tokens = torch.randint(shape["vocab_size"], (batch, block + 1), device=args.device)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].flatten()

    def step(loss_of):
        hidden = model(inputs).flatten(0, 1)
        loss_of(hidden, model.head_weight, targets).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    losses = sides(args.device)
    warm = 3 if args.device == "cuda" else 1
    times = {name: [] for name in losses}
    for turn in range(args.repeats + warm):  # the first rounds compile, and make the optimizer's state
        for name, loss_of in losses.items():
            seconds = time_once(lambda f=loss_of: step(f), args.device)
            if turn >= warm:
                times[name].append(seconds)
    peaks = dict.fromkeys(losses)
    if args.device == "cuda":
        for name, loss_of in losses.items():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step(loss_of)
            torch.cuda.synchronize()
            peaks[name] = torch.cuda.max_memory_allocated() - before
    about = where_and_when(args.device)
    print(f"training step, {batch} x {block} tokens, {shape['n_layer']} layers, D={shape['n_embd']}, "
          f"V={shape['vocab_size']}, {args.dtype} on {about['device']}")  # fmt: skip
    print(f"{'side':29} {'step ms':>9} {'x torch CE':>10} {'tokens/s':>10} {'peak MB':>9}")
    for name in losses:
        ratio = statistics.median(a / b for a, b in zip(times[name], times[BASE], strict=True))
        ms = 1e3 * statistics.median(times[name])
        row = dict(provider=name, n=batch * block, v=shape["vocab_size"], d=shape["n_embd"], dtype=args.dtype)
        row |= dict(step_ms=ms, ratio_to_torch_ce=ratio, tokens_per_s=1e3 * batch * block / ms, peak_bytes=peaks[name])
        add(row | dict(repeats=args.repeats) | about)
        peak = "" if peaks[name] is None else f"{peaks[name] / 1e6:.0f}"
        print(f"{name:29} {ms:9.3f} {ratio:10.3f} {row['tokens_per_s']:10.0f} {peak:>9}", flush=True)
