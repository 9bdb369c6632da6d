"""Experiment 1: a GPT-2 from scratch under any proper score, from raw text to a calibrated number.

    python train_lm.py --model nano --data pydoc --loss dpsm               # a CPU: what is not given fits the size
    python train_lm.py --model gpt2 --data wikitext103 --loss dpsm --warmup 0.1                      # one GPU
    torchrun --nproc_per_node 8 train_lm.py --loss dpsm --warmup 0.1                                 # one node
    torchrun --nproc_per_node 8 train_lm.py --model gpt2-1.3b --fsdp --checkpoint-activations --loss brier
    python train_lm.py --out runs/NAME ... --resume                                                  # go on exactly

Top to bottom: config, data, model, loss, optimizer, loop, evaluation. Everything a run leaves behind
is in its folder; `python -m eval.report runs/A runs/B --out DIR` compares runs.
"""

import math
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from data.lm import TEXT_NAMES, load_corpus, load_text_set
from data.windows import Windows, flip_labels, token_counts
from eval import metrics
from eval.heldout import evaluate, final_metrics
from eval.text import distinct_n
from kernels import Calibration, UnigramSmoothing, linear_score
from kernels.losses import make_score
from model import fp8
from model.generate import sample
from model.gpt2 import GPT2, SIZES, GPT2Config, decay_groups, flops_per_token, parameter_count
from model.gpt2_hub import load_start
from model.layers import ACTIVATIONS
from runtime import optim
from runtime.cli import opt, parse_config, user_errors
from runtime.flags import alpha_of, flag, knobs
from runtime.folder import RunFolder
from runtime.graph import Replayed, check_graph
from runtime.machine import start_world, to_device
from runtime.meter import Meter
from runtime.process import command
from schedules import ADAPTIVE, averaged

# ----------------------------------------------------------------------------------------------
# config

# What is not given fits the size: the small ones are for a CPU.
USUAL = dict(tokenizer="gpt2", seq_len=1024, batch=256, steps=20000, eval_every=500)
FITTING = {
    "pico": dict(tokenizer="bpe:1024", seq_len=64, batch=16, steps=500, eval_every=100),
    "nano": dict(tokenizer="bpe:4096", seq_len=128, batch=16, steps=500, eval_every=100),
    "mini": dict(tokenizer="bpe:8192", seq_len=256, batch=32, steps=2000, eval_every=250),
}


def by_size(flag: str) -> str:
    """The default of a flag in words."""
    return (
        "default: " + ", ".join(f"{fits[flag]} of {size}" for size, fits in FITTING.items()) + f", else {USUAL[flag]}"
    )


@dataclass(frozen=True)
class Config:
    out: str = flag("out")
    resume: bool = flag("resume")
    resume_from: str = flag("resume_from")
    dry_run: str = flag("dry_run")
    seed: int = flag("seed", help="seeds the initialisation, the data order, dropout and the label noise")
    # data
    data: str = opt("wikitext103", f"{', '.join(TEXT_NAMES)}, or a folder of text", role="setting", group="data")
    tokenizer: str | None = opt(
        None, f"gpt2, bpe:SIZE (trained on the corpus), or a folder; {by_size('tokenizer')}", role="setting"
    )
    cache: str = flag("cache", help="folder for token caches and trained tokenizers")
    ood: str = opt("", "out-of-domain text to evaluate at the end: a folder or a data name", role="setting")
    seq_len: int | None = opt(None, f"tokens in a sequence; {by_size('seq_len')}", within="[1, inf)", role="setting")
    label_noise: float = opt(0.0, "share of targets replaced by a random token", within="[0, 1]", role="setting")
    label_noise_steps: float = opt(1.0, "share of the steps in which it happens", within="[0, 1]", role="setting")
    # model
    model: str = opt("gpt2", "model size", tuple(SIZES), role="setting", group="model")
    activation: str = opt(
        "gelu_new",
        "of the MLP; gelu_new is GPT-2's, in tanh form, gelu the exact one",
        tuple(ACTIVATIONS),
        role="setting",
    )
    init_from: str = opt("", "a GPT-2 of the size --model: a run of ours, a folder or a hub id", role="setting")
    dropout: float = opt(0.0, "dropout on embeddings, attention and residuals", within="[0, 1)")
    # loss
    loss: str = flag("loss")
    warmup: float = flag("warmup")
    alpha_schedule: str = flag("alpha_schedule")
    alpha_max: float = flag("alpha_max")
    alpha_start: float = flag("alpha_start")
    path: str = flag("path")
    order: float | None = flag("order")
    gamma: float = flag("gamma")
    mile_gamma: float = flag("mile_gamma")
    q: float = flag("q")
    threshold: float = flag("threshold")
    eps: float = flag("eps")
    tail_smoothing: float = flag("tail_smoothing")
    unigram: float = flag("unigram")
    unigram_gain: float = flag("unigram_gain")
    # optimizer
    steps: int | None = flag("steps", None, help=f"optimizer steps; {by_size('steps')}")
    batch: int | None = flag("batch", None, help=f"sequences in a step, over all ranks; {by_size('batch')}")
    micro_batch: int = flag("micro_batch", 16)
    optimizer: str = flag("optimizer")
    lr: float = flag("lr", 6e-4)
    step_factor: float = flag("step_factor")
    momentum: float = flag("momentum")
    schedule: str = flag("schedule")
    lr_warmup: float = flag("lr_warmup", 0.02)
    lr_floor: float = flag("lr_floor", 0.1)
    decay_shape: str = flag("decay_shape")
    tail_average: float = flag("tail_average")
    fot_parts: str = flag("fot_parts")
    fot_window: int = flag("fot_window")
    fot_beta: float = flag("fot_beta")
    weight_decay: float = flag("weight_decay", 0.1, help="AdamW weight decay of the matrices")
    beta1: float = flag("beta1")
    beta2: float = flag("beta2", 0.95)
    clip: float = flag("clip")
    # evaluation
    eval_every: int | None = flag(
        "eval_every", None, help=f"steps between validations and checkpoints; {by_size('eval_every')}"
    )
    log_every: int = flag("log_every")
    patience: int = flag("patience")
    report: str = flag("report", "last")
    prompt: str = opt("", "prompt of the samples; default: beginnings of validation sequences", role="bookkeeping")
    sample_tokens: int = opt(100, "tokens in a final sample", within="[1, inf)", role="bookkeeping")
    temperature: float = opt(0.8, "sampling temperature", within="[0, inf)", role="bookkeeping")
    top_k: int = opt(0, "sample among the k likeliest tokens; 0 is all", within="[0, inf)", role="bookkeeping")
    top_p: float = opt(0.95, "sample among the likeliest of this probability", within="(0, 1]", role="bookkeeping")
    # system
    device: str = flag("device")
    dtype: str = flag("dtype")
    fp8: bool = opt(False, "train the blocks' products in FP8: other numbers; not measured on a GPU yet")
    kernels: str = flag("kernels")
    head_memory: int = flag("head_memory")
    compile: bool | None = opt(None, "torch.compile the model; default: on CUDA", role="system")
    checkpoint_activations: bool = flag("checkpoint_activations")
    cuda_graph: bool = flag("cuda_graph")
    fsdp: bool = opt(False, "shard parameters and optimizer over the ranks (FSDP2) instead of DDP", role="system")
    wandb: str = flag("wandb")
    track: str = flag("track")


def folder(values: dict) -> Path:
    """The run's, --out or its default."""
    return Path(values["out"] or "runs/{}-{model}-{loss}-s{seed}".format(Path(values["data"]).name, **values))


def complete(values: dict) -> dict:
    """What is not given: of a run that is resumed as it has it, else as it fits the size."""
    usual = USUAL | FITTING.get(values["model"], {})
    held = RunFolder.config(folder(values)) if values["resume"] else {}
    return values | {k: held.get(k, v) for k, v in usual.items() if values[k] is None}


def check(cfg: Config, world) -> None:
    """Raises ValueError, one line, for flags that do not go together."""
    world.check(cfg)
    optim.check_optimizer(cfg, world.device)
    check_graph(cfg, world)
    fp8.check(cfg, world.device)
    if cfg.fsdp and world.size == 1:
        raise ValueError("--fsdp needs more than one rank; start with torchrun --nproc_per_node N")


def forwards(model: GPT2, windows: Windows, rows: int, world):
    """(hidden [N, D], targets [N]) of this rank's windows, ``rows`` at a time.

    Every rank makes the same number of equal forwards, because FSDP gathers in lockstep: what is missing is padded with
    targets outside the loss."""
    rows = min(rows, math.ceil(len(windows) / world.size))
    for begin in range(0, len(windows), rows * world.size):
        mine = torch.arange(begin + world.rank * rows, begin + (world.rank + 1) * rows)
        x_BT, y_BT = windows.get(mine.clamp(max=len(windows) - 1).numpy())
        y_BT[mine >= len(windows)] = -100
        yield model(x_BT.to(world.device)).flatten(0, 1), y_BT.to(world.device).flatten()


# ----------------------------------------------------------------------------------------------
# the experiment


@command
def main(argv: list[str] | None = None) -> int:
    cfg = parse_config(Config, argv, __doc__, complete=complete)
    with user_errors():
        world = start_world(cfg.device, fixed_shapes=True)
        check(cfg, world)
        device, dtype = world.device, world.dtype(cfg.dtype)
        out = folder(asdict(cfg))
        run = RunFolder(out, world)
        checkpoint, cfg = run.enter(cfg), run.aside(cfg)
        fits = [f"--{k.replace('_', '-')} {v}" for k, v in FITTING.get(cfg.model, {}).items() if getattr(cfg, k) == v]
        if world.main and fits and not checkpoint:
            print(f"{out}: as --model {cfg.model} has it where it is not given: {' '.join(fits)}", flush=True)

        # -- data ------------------------------------------------------------------------------
        with world.main_first():
            corpus = load_corpus(cfg.data, tokenizer=cfg.tokenizer, cache=cfg.cache)
            ood = load_text_set(cfg.ood, corpus.tokenizer, cfg.cache) if cfg.ood else None
        train = Windows(corpus.train, cfg.seq_len)
        tokens = {"val": corpus.val, "test": corpus.test, "ood": ood}
        sets = {name: Windows(t, cfg.seq_len) if t else None for name, t in tokens.items()}
        counts = {name: math.ceil(len(w) / (cfg.micro_batch * world.size)) for name, w in sets.items() if w}
        if checkpoint and checkpoint["data_hash"] != corpus.train.hash:
            raise ValueError(f"--resume: {cfg.data} is not the text that {out} was trained on; restore it")

        # -- model: parameters in fp32, activations in dtype -----------------------------------
        torch.manual_seed(cfg.seed)
        model = make_model(cfg, corpus, dtype, checkpoint)
        check_samples(cfg, corpus.tokenizer)  # found out now, not after the training
    shape, parameters = model.config, parameter_count(model)
    if cfg.fp8:
        fp8.switch_on(model.h)
    model.to(device).checkpoint_activations = cfg.checkpoint_activations
    if compiled := cfg.compile or (cfg.compile is None and device.type == "cuda"):
        for part in model.h if cfg.fsdp else [model]:
            part.compile()  # in place: names and checkpoints stay as they are
    trained = optim.on_ranks(model, world, blocks=model.h if cfg.fsdp else None, dtype=dtype)

    # -- loss ----------------------------------------------------------------------------------
    alpha = torch.zeros((), device=device)  # filled each optimizer step; the score reads it on the device
    with user_errors():
        score = make_score(cfg.loss, alpha=alpha, **knobs(cfg))
    scoring = dict(tail=cfg.tail_smoothing, impl=cfg.kernels, memory=cfg.head_memory * 10**6 or None)
    counted = partial(token_counts, corpus.train.tokens, shape.vocab_size)
    unigram = UnigramSmoothing(cfg.unigram, cfg.unigram_gain, counted, device)

    # -- optimizer -----------------------------------------------------------------------------
    with user_errors():
        optimizer = optim.make_optimizer(decay_groups(model, cfg.weight_decay), cfg, model, device)
        rule = optim.rule_of(cfg, optimizer, world)
    meter = Meter(run, Calibration(device), metrics, cfg, counted=("flipped_tokens",))

    # -- state: everything that a resumed run needs ----------------------------------------------
    if checkpoint:
        optim.restore_training_state(model, optimizer, checkpoint)
        meter.load_state_dict(checkpoint, draws=cfg.dropout > 0)
        optim.restore_rule(rule, checkpoint["fot"], meter.step)
        unigram.share = checkpoint.get("unigram", unigram.share)

    def save(best: bool) -> None:
        """last.pt and, if these are the best weights so far, best.pt. All ranks take part; rank 0 writes."""
        weights, moments = optim.training_state(model, optimizer)
        tokenizer = {"files": corpus.tokenizer.files(), "eos_id": corpus.tokenizer.eos_id}
        state = {"model": weights, "model_config": asdict(shape), "config": asdict(cfg), "tokenizer": tokenizer}
        state |= {"step": meter.step, "best": meter.best, "data_hash": corpus.train.hash}
        if best:
            run.save("best.pt", state)
        state |= meter.state_dict() | {"optimizer": moments, "fot": rule.state_dict(), "unigram": unigram.share}
        state |= {"alpha": alpha_of(cfg, meter.step, unigram.share)}
        run.save("last.pt", state)

    def validate() -> None:
        """Where one is due, a validation; where one is due, a checkpoint."""
        best = False
        if meter.at_eval:
            with averaged(optimizer):
                made = meter.watched(forwards(model, sets["val"], cfg.micro_batch, world), counts["val"])
                found = evaluate(model, made, world, impl=cfg.kernels)
            best = meter.judge(numbers := metrics.measure(found.raw, size=sets["val"].bytes))
            if not meter.owed:
                unigram.follow(numbers)
        if meter.saves(model, optimizer):
            save(best)
        meter.go_on()

    with user_errors():
        run.start(cfg, "train_lm.py", checkpoint)
    if world.main:
        print(
            f"{out}: {cfg.model}, {parameters / 1e6:.1f} M parameters, loss {cfg.loss}, {dtype} on {world.size} x "
            f"{device.type}, {len(corpus.train.tokens) / 1e6:.2f} M training tokens ({corpus.origin}), "
            f"{cfg.batch * cfg.seq_len} a step"
        )

    # -- loop ----------------------------------------------------------------------------------
    share = cfg.batch // world.size  # of a step's sequences, this rank's
    mine = slice(world.rank * share, (world.rank + 1) * share)
    # A measured step needs two micro-batches: where the model is compiled, of the shape that all have.
    most = max(1, share // 2) if compiled and cfg.schedule in ADAPTIVE and not cfg.fsdp else share
    micro = next(m for m in range(min(cfg.micro_batch, most), 0, -1) if share % m == 0)
    trained.train()

    def micro_step(x_BT, y_BT, denominator):
        """Forward and backward of some of a step's sequences: their part of its loss, 0-d, and their Moments."""
        predicted = trained(x_BT).flatten(0, 1), model.head_weight, y_BT.flatten()
        loss, moments = linear_score(*predicted, score, denominator=denominator, **scoring)
        loss = loss + unigram.term(*predicted, denominator=denominator)
        loss.backward()
        return loss.detach(), moments

    if cfg.cuda_graph:
        micro_step = Replayed(micro_step, model.parameters(), baked=lambda: unigram.share)
    plan = dict(name=cfg.model, tokens=len(corpus.train.tokens), step_tokens=cfg.batch * cfg.seq_len)
    plan |= dict(validated=len(corpus.val.tokens), rows=micro, flops=flops_per_token(shape, cfg.seq_len))
    if meter.dry_run(cfg, model, partial(forwards, model, train), **plan):
        return run.finish(0)
    meter.start(validate)
    while meter.running:
        step = meter.step
        x, y = train.get(train.batch_indices(step, cfg.batch, cfg.seed))  # the global batch, a function of the step
        y, flipped = flip_labels(y, shape.vocab_size, cfg.label_noise, cfg.label_noise_steps, cfg.seed, step)
        count, targets = (y != -100).sum(), y[mine]
        x, y = to_device(x[mine], device), to_device(targets, device)
        alpha.fill_(alpha_of(cfg, step, unigram.share))
        lr = rule.lr

        # The loss is the sum over the global batch's targets divided by their number. DDP and FSDP
        # average gradients over ranks, hence the world size.
        denominator = to_device(count.float() / world.size, device)
        measured = rule.splits and not cfg.fsdp  # FSDP has no gradient of a micro-batch
        rows = math.ceil(share / 2) if measured and micro == share else micro  # a part is compared with the whole
        for i in range(0, share, rows):
            last = i + rows >= share
            with optim.meeting(trained, last):
                loss, moments = micro_step(x[i : i + rows], y[i : i + rows], denominator)
            meter.add(loss, moments)
            part = float(targets[:rows].ne(-100).sum() / count) if measured and i == 0 and not last else None
            rule.observe(-moments.log_p.sum(), moments.valid.sum(), share=part)
        norm = optim.take_step(optimizer, model.parameters(), cfg.clip, world.all_reduce(meter.loss))
        meter.end_step(norm, cfg.clip, tokens=int(count), flipped_tokens=flipped)
        if decision := rule.step():
            meter.log("fot", **decision)
        if not meter.due():
            continue

        if row := meter.row(str(rule), alpha=alpha.item(), **unigram.shown, lr=lr):
            meter.log("train", **row)
        if meter.ending == "diverged":
            break
        validate()
    if (code := meter.end()) is not None:
        return run.finish(code)

    # -- evaluation: of the file that stays, on every rank ---------------------------------------
    world.wait()
    with user_errors():
        kept = run.load(f"{cfg.report}.pt")
    final = GPT2(shape, dtype)
    final.load_state_dict(kept["model"])
    final.to(device).eval()
    made = {name: (lambda w=w: forwards(final, w, cfg.micro_batch, world)) if w else None for name, w in sets.items()}
    sizes = {name: w.bytes for name, w in sets.items() if w}
    how = dict(pieces=run.pieces(f"{cfg.report} {kept['step']}"), sizes=sizes, counts=counts, impl=cfg.kernels)
    how |= dict(text=corpus.train.tokens)
    entries, bins = final_metrics(final, made, world, **how)
    entries |= {f"{name}_losses": t.losses for name, t in tokens.items() if t}  # of the text in tokenising
    if not world.main:
        return run.finish(0)
    samples = write_samples(final, corpus.tokenizer, sets["val"], cfg) if entries["temperature"] else []
    summary = {
        "script": "train_lm.py",
        "loss": cfg.loss,
        "alpha_schedule": cfg.alpha_schedule if cfg.loss == "dpsm" else None,
        "seed": cfg.seed,
        "parameters": parameters,
        "reported": cfg.report,
        "reported_step": kept["step"],
        **entries,
        **{f"distinct_{n}": distinct_n([s["text"] for s in samples], n) for n in (1, 2)},
        **meter.summary(flops_per_token(shape, cfg.seq_len), dtype),
        **{f"{cfg.schedule}_{k}": v for k, v in rule.counts.items()},
    }
    run.summarise(summary, calibration=bins, samples=samples)
    text = "{val_ppl:.3f}, nll {val_nll:.4f}, ece {val_ece10:.4f}, brier {val_brier:.4f}"
    text += "; at temperature {temperature:.3f} nll {val_nll_t:.4f}, ece {val_ece10_t:.4f}" if samples else ""
    text += "; {val_losses}" if entries["val_losses"] else ""
    rate = summary["tokens_per_second"] or 0
    print(f"{out}: validation ppl {text.format(**entries)}; {rate:,.0f} tokens/s")
    print(f"compare runs with: python -m eval.report {out} ... --out DIR")
    return run.finish(0)


def make_model(cfg: Config, corpus, dtype: torch.dtype, checkpoint: dict | None) -> GPT2:
    """The model of the checkpoint, of --init-from, or of the size --model, without the checkpoint's weights. Raises
    ValueError where --init-from is not of that size, or has another tokenizer."""
    size, vocab_size = SIZES[cfg.model], corpus.tokenizer.vocab_size
    if checkpoint:
        model = GPT2(GPT2Config(**checkpoint["model_config"]), dtype)
    elif cfg.init_from:
        model, files = load_start(cfg.init_from, dtype, cfg.dropout)
        has, start, ours = model.config, cfg.init_from, corpus.tokenizer
        text = ours.decode(corpus.val.tokens[:1000])
        if files and corpus.tokenizer.from_files(files, start).encode(text) != ours.encode(text):
            raise ValueError(f"--tokenizer {cfg.tokenizer} is not that of --init-from {start}: the tokens differ")
        if any(getattr(has, k) != v for k, v in size.items()):
            shape = f"{has.n_layer} layers, {has.n_head} heads, width {has.n_embd}"
            raise ValueError(f"--init-from {start} has {shape}: not --model {cfg.model}")
        if ACTIVATIONS[has.activation_function] is not ACTIVATIONS[cfg.activation]:
            raise ValueError(f"--init-from {start} was trained with --activation {has.activation_function}; give that")
        if has.block_size < cfg.seq_len:
            raise ValueError(f"--seq-len {cfg.seq_len} is longer than the {has.block_size} positions of {start}")
    else:
        more = dict(dropout=cfg.dropout, activation_function=cfg.activation)
        model = GPT2(GPT2Config(vocab_size=vocab_size, block_size=cfg.seq_len, **size, **more), dtype)
    if vocab_size != model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {vocab_size} tokens, the model {model.config.vocab_size}; use the tokenizer that the "
            "model was trained with"
        )
    return model


def check_samples(cfg: Config, tokenizer) -> None:
    """Raises ValueError for a prompt that has no tokens, and for a tokenizer with ids that are no token's."""
    try:
        empty = cfg.prompt and not tokenizer.encode(cfg.prompt)
    except (ValueError, TypeError):
        empty = True  # bytes of the command line that are no text
    if empty:
        raise ValueError(f"--prompt {cfg.prompt!r} has no tokens")
    try:
        tokenizer.decode(range(tokenizer.vocab_size))
    except KeyError as error:
        gap = f"not all ids below {tokenizer.vocab_size} are tokens of it ({error.args[0]})"
        raise ValueError(f"--tokenizer {cfg.tokenizer}: {gap}; number them without gaps") from None


def write_samples(model: GPT2, tokenizer, windows: Windows, cfg: Config) -> list[dict]:
    """Continuations of --prompt, or of the first 16 tokens of three validation sequences; seeded."""
    if cfg.prompt:
        prompts = torch.tensor([tokenizer.encode(cfg.prompt)])
    else:
        picks = sorted({len(windows) * i // 3 for i in range(3)})
        prompts = windows.get(picks)[0][:, :16]
    how = dict(temperature=cfg.temperature, top_k=cfg.top_k, top_p=cfg.top_p)
    tokens = sample(model, prompts, cfg.sample_tokens, generator=torch.Generator().manual_seed(cfg.seed), **how)
    at = prompts.shape[1]
    return [{"prompt": tokenizer.decode(t[:at]), "text": tokenizer.decode(t[at:])} for t in tokens.tolist()]


if __name__ == "__main__":
    sys.exit(main())
