"""Experiment 1: a GPT-2 from scratch under any proper score, from raw text to a calibrated number.

    python train_lm.py --model nano --data pydoc --tokenizer bpe:4096 --seq-len 128 --batch 16 --steps 500 --loss dpsm
    python train_lm.py --model gpt2 --data wikitext103 --loss dpsm --warmup 0.1                      # one GPU
    torchrun --nproc_per_node 8 train_lm.py --loss dpsm --warmup 0.1                                 # one node
    torchrun --nproc_per_node 8 train_lm.py --model gpt2-1.3b --fsdp --checkpoint-activations --loss brier
    python train_lm.py --out runs/NAME ... --resume                                                  # go on exactly

Top to bottom: config, data, model, loss, optimizer, loop, evaluation. Everything a run leaves behind
is in its folder; `python -m eval.report runs/A runs/B --out DIR` compares runs.
"""

import contextlib
import math
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from data.lm import NAMES, load_corpus, load_text_set
from data.windows import Windows, flip_labels
from eval.calibration import Calibration, fit_temperature, temperature_sums
from eval.text import distinct_n
from kernels import linear_moments, linear_score
from kernels.losses import ALPHA_SCHEDULES, LOSSES, alpha_at, make_score
from model.generate import sample
from model.gpt2 import GPT2, SIZES, GPT2Config, decay_groups, flops_per_token, parameter_count
from model.gpt2_hub import load_hf
from runtime.cli import StopRequest, opt, parse_config, user_errors
from runtime.folder import (
    RunFolder,
    ends_here,
    finish,
    load_checkpoint,
    read_metrics,
    same_config,
    start_wandb,
    write_json,
)
from runtime.machine import (
    EnergyMeter,
    World,
    peak_flops,
    peak_memory,
    rng_states,
    set_rng_states,
    start_world,
    system_entries,
    to_device,
)
from runtime.meter import DivergenceWatch
from runtime.optim import restore_training_state, training_state
from schedules.fot import FoT, parse_parts
from schedules.rules import ADAPTIVE, FREE, RULES, averaged, lr_factor, schedule_free_adamw

# ----------------------------------------------------------------------------------------------
# config


@dataclass(frozen=True)
class Config:
    out: str = opt("", "run folder; default runs/DATA-MODEL-LOSS-sSEED")
    resume: bool = opt(False, "go on with the run in --out, exactly where its last checkpoint stands")
    resume_from: str = opt("", "with --resume: this checkpoint instead of OUT/last.pt")
    seed: int = opt(1, "seeds the initialisation, the data order, dropout and the label noise")
    # data
    data: str = opt("wikitext103", f"{', '.join(NAMES)}, or a folder of text")
    tokenizer: str = opt("gpt2", "gpt2, bpe:SIZE (byte-level BPE trained on the corpus), or a folder with its files")
    cache: str = opt("cache", "folder for token caches and trained tokenizers")
    ood: str = opt("", "out-of-domain text to evaluate at the end: a folder or a data name")
    seq_len: int = opt(1024, "tokens in a sequence")
    label_noise: float = opt(0.0, "share of target tokens replaced by a random other one, in the steps it happens in")
    label_noise_steps: float = opt(1.0, "share of the steps in which label noise happens")
    # model
    model: str = opt("gpt2", "model size", tuple(SIZES))
    init_from: str = opt("", "start from a Hugging Face GPT-2 of the size --model: a folder or a hub id")
    dropout: float = opt(0.0, "dropout on embeddings, attention and residuals")
    # loss
    loss: str = opt("ce", "training loss", LOSSES)
    warmup: float = opt(0.1, "dpsm: alpha's ramp, as a fraction of the steps")
    alpha_schedule: str = opt("linear", "dpsm: shape of the ramp; fixed holds --alpha-max", ALPHA_SCHEDULES)
    alpha_max: float = opt(1.0, "dpsm: share of Brier at the end of the ramp")
    alpha_start: float = opt(0.0, "dpsm: where the ramp begins, as a fraction of the steps")
    gamma: float = opt(2.0, "focal: exponent")
    eps: float = opt(0.1, "smoothing: share of the uniform distribution")
    tail_smoothing: float = opt(0.0, "brier, spherical: Shao's score smoothing with a logarithmic tail; 0 is off")
    # optimizer
    steps: int = opt(20000, "optimizer steps")
    batch: int = opt(256, "sequences in an optimizer step, over all ranks")
    micro_batch: int = opt(16, "sequences in one forward of one rank, at most; the rest is accumulated")
    lr: float = opt(6e-4, "peak learning rate")
    schedule: str = opt("cosine", "learning-rate schedule (or --lr-schedule); snac, bacon and fot measure and decide "
                        "as they go, see fot.py", RULES)
    lr_warmup: float = opt(0.02, "learning-rate warm-up, as a fraction of the steps")
    lr_floor: float = opt(0.1, "learning rate at the end, as a fraction of the peak; fot and bacon fall to 0")
    fot_parts: str = opt("envelope,noise,forecast,gate,blocks", "fot: the parts of the rule that are on, or none")
    fot_window: int = opt(32, "snac, bacon, fot: steps between two decisions")
    fot_beta: float = opt(0.9, "snac, bacon, fot: averaging of the measurements over decisions")
    weight_decay: float = opt(0.1, "AdamW weight decay of the matrices")
    beta1: float = opt(0.9, "AdamW beta1")
    beta2: float = opt(0.95, "AdamW beta2")
    clip: float = opt(1.0, "clip the gradient to this norm; 0 is off")
    # evaluation
    eval_every: int = opt(500, "steps between validations and checkpoints")
    log_every: int = opt(10, "steps between lines of metrics.jsonl")
    patience: int = opt(0, "stop after this many validations without a better NLL; 0 is off")
    report: str = opt("last", "which weights the final metrics are of", ("last", "best"))
    prompt: str = opt("", "prompt of the final samples; default: the beginnings of validation sequences")
    sample_tokens: int = opt(100, "tokens in a final sample")
    temperature: float = opt(0.8, "sampling temperature")
    top_k: int = opt(0, "sample among the k likeliest tokens; 0 is all")
    top_p: float = opt(0.95, "sample among the likeliest tokens that hold this probability")
    # system
    device: str = opt("auto", "where to run", ("auto", "cpu", "cuda"))
    dtype: str = opt("auto", "dtype of the activations; auto is bfloat16 on CUDA", ("auto", "float32", "bfloat16"))
    kernels: str = opt("auto", "implementation of the scores", ("auto", "triton", "torch"))
    compile: bool | None = opt(None, "torch.compile the model; default: on CUDA")
    checkpoint_activations: bool = opt(False, "recompute each block in backward to save memory")
    fsdp: bool = opt(False, "shard parameters and optimizer over the ranks (FSDP2) instead of DDP")
    wandb: str = opt("", "Weights & Biases project to log to as well (WANDB_MODE=offline works)")


# Settings that a resumed run may change: where and how it computes, not what.
CHANGEABLE = ("out", "resume", "resume_from", "cache", "wandb", "micro_batch", "device", "kernels", "compile", "fsdp",
        "checkpoint_activations")


def check(cfg: Config, world: World) -> None:
    """Raises ValueError, one line, for settings that cannot be meant."""
    for name in ("warmup", "alpha_max", "alpha_start", "label_noise", "label_noise_steps", "lr_warmup", "lr_floor",
                 "eps", "tail_smoothing"):
        if not 0 <= getattr(cfg, name) <= 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(cfg, name)} is outside [0, 1]")
    for name in ("steps", "batch", "micro_batch", "seq_len", "eval_every", "log_every", "sample_tokens", "fot_window"):
        if getattr(cfg, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(cfg, name)} must be at least 1")
    for name in ("seed", "lr", "weight_decay", "clip", "gamma", "patience", "temperature", "top_k"):
        if not 0 <= getattr(cfg, name) < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(cfg, name)} must be finite and not negative")
    for name in ("dropout", "beta1", "beta2", "fot_beta"):
        if not 0 <= getattr(cfg, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(cfg, name)} is outside [0, 1)")
    if cfg.schedule in ADAPTIVE and cfg.lr_warmup == 1:
        raise ValueError(f"--lr-warmup 1 leaves no step to --schedule {cfg.schedule}")
    if cfg.schedule == FREE and cfg.fsdp:
        raise ValueError(f"--schedule {FREE} knows no --fsdp; use DDP, or another schedule")
    parse_parts(cfg.fot_parts)
    if not 0 < cfg.top_p <= 1:
        raise ValueError(f"--top-p {cfg.top_p} is outside (0, 1]")
    if cfg.batch % world.size:
        raise ValueError(f"--batch {cfg.batch} is not divisible by the {world.size} ranks; change one of them")
    if cfg.tail_smoothing and cfg.loss not in ("brier", "spherical"):
        raise ValueError(f"--tail-smoothing is defined for brier and spherical, not --loss {cfg.loss}")
    if cfg.fsdp and world.size == 1:
        raise ValueError("--fsdp needs more than one rank; start with torchrun --nproc_per_node N")
    if cfg.resume_from and not cfg.resume:
        raise ValueError("--resume-from needs --resume")
    if cfg.kernels == "triton" and world.device.type != "cuda":
        raise ValueError("--kernels triton needs a CUDA device; use --kernels torch or auto")


# ----------------------------------------------------------------------------------------------
# evaluation: the whole fixed token set, in order, split over the ranks


@torch.no_grad()
def evaluate(model: GPT2, windows: Windows, cfg: Config, world: World, scale: float | None = None,
             keep: list | None = None) -> tuple[Calibration, Calibration | None]:
    """Calibration of ``model`` on every token of ``windows``; with ``scale`` = 1/temperature a second one
    of the scaled logits. ``keep`` collects (hidden [N, D], targets [N]) pairs, for the temperature fit."""
    was_training = model.training
    model.eval()
    raw, scaled = Calibration(world.device), Calibration(world.device) if scale else None
    rows = min(cfg.micro_batch, math.ceil(len(windows) / world.size))
    for begin in range(0, len(windows), rows * world.size):
        # Every rank runs the same number of equal forwards (FSDP gathers in lockstep): pad with nothing.
        mine = torch.arange(begin + world.rank * rows, begin + (world.rank + 1) * rows)
        x, y = windows.get(mine.clamp(max=len(windows) - 1).numpy())
        y[mine >= len(windows)] = -100
        hidden = model(x.to(world.device)).flatten(0, 1)
        y, head = y.to(world.device).flatten(), model.head_weight  # after forward: FSDP has gathered it
        raw.update(linear_moments(hidden, head, y, impl=cfg.kernels))
        if scaled is not None:
            scaled.update(linear_moments(hidden, head, y, scale=scale, impl=cfg.kernels))
        if keep is not None:
            keep.append((hidden, y))
    model.train(was_training)
    if world.size > 1:
        for c in (raw, scaled):
            c is None or c.all_reduce()
    return raw, scaled


def numbers(c: Calibration, windows: Windows) -> dict[str, float]:
    """What is reported of one evaluation; bits per byte counts the bytes of the text, EOS tokens' cost included."""
    m = c.compute()
    m["eval_tokens"] = m.pop("tokens")
    m["bits_per_byte"] = m["nll"] * m["eval_tokens"] / math.log(2) / windows.bytes
    return m


def final_metrics(model: GPT2, sets: dict[str, Windows | None], cfg: Config, world: World):
    """Temperature on validation, then every set before and after it: (summary entries, reliability bins)."""
    head, kept = model.head_weight, []
    finite = math.isfinite(evaluate(model, sets["val"], cfg, world, keep=kept)[0].compute()["nll"])

    def sums(beta: float) -> Tensor:
        parts = [temperature_sums(h @ head.to(h.dtype).t(), y, beta) for hs, ys in kept
                 for h, y in zip(hs.split(1024), ys.split(1024), strict=True)]
        return world.all_reduce(torch.stack(parts).sum(0))

    with torch.no_grad():
        fit = fit_temperature(sums) if finite else None  # weights that yield inf or nan have no temperature
    kept.clear()
    entries, bins = {"temperature": fit and fit.temperature, "temperature_at_bound": fit and fit.at_bound}, {}
    keys = ("nll", "ppl", "bits_per_byte", "ece10", "ece100", "ece10_mass", "brier", "spherical", "accuracy", "entropy")
    for name, windows in sets.items():
        if windows is None:
            entries |= {f"{name}_{k}{suffix}": None for k in keys for suffix in ("", "_t")}
            continue
        raw, scaled = evaluate(model, windows, cfg, world, scale=fit and 1 / fit.temperature)
        bins[name] = {"raw": raw.bins(300), "scaled": scaled and scaled.bins(300)}
        before, after = numbers(raw, windows), numbers(scaled, windows) if scaled else {}
        entries |= {f"{name}_{k}": before[k] for k in keys} | {f"{name}_{k}_t": after.get(k) for k in keys}
        entries[f"{name}_tokens"] = before["eval_tokens"]
    return entries, bins


# ----------------------------------------------------------------------------------------------
# the experiment


def main(argv: list[str] | None = None) -> int:
    argv = [a.replace("--lr-schedule", "--schedule", 1) for a in (sys.argv[1:] if argv is None else argv)]
    cfg = parse_config(Config, argv, __doc__)
    with user_errors():
        world = start_world(cfg.device)
        check(cfg, world)
        device = world.device
        out = Path(cfg.out or f"runs/{Path(cfg.data).name}-{cfg.model}-{cfg.loss}-s{cfg.seed}")
        run = RunFolder(out, world)
        run.check(asdict(cfg), cfg.resume, CHANGEABLE)
        checkpoint = None
        if cfg.resume:
            path = Path(cfg.resume_from or run / "last.pt")
            checkpoint = load_checkpoint(path)
            if "optimizer" not in checkpoint:
                raise ValueError(f"{path} holds weights only; resume from last.pt or previous.pt")
            same_config(path, checkpoint["config"], asdict(cfg), CHANGEABLE)

        # -- data ------------------------------------------------------------------------------
        with world.main_first():
            corpus = load_corpus(cfg.data, tokenizer=cfg.tokenizer, cache=cfg.cache)
            ood = load_text_set(cfg.ood, corpus.tokenizer, cfg.cache) if cfg.ood else None
        train = Windows(corpus.train, cfg.seq_len)
        sets = {k: t and Windows(t, cfg.seq_len)
                for k, t in {"val": corpus.val, "test": corpus.test, "ood": ood}.items()}

        # -- model: parameters in fp32, activations in dtype -----------------------------------
        bf16 = cfg.dtype == "bfloat16" or (cfg.dtype == "auto" and device.type == "cuda")
        dtype = torch.bfloat16 if bf16 else torch.float32
        torch.manual_seed(cfg.seed)
        shape = GPT2Config(vocab_size=corpus.tokenizer.vocab_size, block_size=cfg.seq_len, dropout=cfg.dropout,
                           **SIZES[cfg.model])
        if cfg.init_from and not checkpoint:
            model = load_hf(cfg.init_from, dtype=dtype, dropout=cfg.dropout)
            shape = model.config
            check_start(shape, cfg)
        else:
            if checkpoint:
                shape = GPT2Config(**checkpoint["model_config"])
            model = GPT2(shape, dtype)
        if corpus.tokenizer.vocab_size > shape.vocab_size:
            raise ValueError(f"the tokenizer has {corpus.tokenizer.vocab_size} tokens, the model only "
                             f"{shape.vocab_size}; use the tokenizer that the model was trained with")
        if checkpoint and checkpoint["data_hash"] != corpus.train.hash:
            raise ValueError(f"--resume: {cfg.data} is not the text that {out} was trained on; restore it")

    model.to(device).checkpoint_activations = cfg.checkpoint_activations
    parameters = parameter_count(model)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    if cfg.compile or (cfg.compile is None and device.type == "cuda"):
        for part in model.h if cfg.fsdp else [model]:
            part.compile()  # in place: names and checkpoints stay as they are
    trained = model
    if cfg.fsdp:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = init_device_mesh(device.type, (world.size,))
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        for block in model.h:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        # The root stays gathered after forward: the loss uses its tied head.
        fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    elif world.size > 1:
        trained = torch.nn.parallel.DistributedDataParallel(
            model, device_ids=[device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True)

    # -- loss ----------------------------------------------------------------------------------
    alpha = torch.zeros((), device=device)  # filled each optimizer step; the score reads it on the device
    score = make_score(cfg.loss, alpha=alpha, gamma=cfg.gamma, eps=cfg.eps, tail=cfg.tail_smoothing)

    def alpha_of(step: int) -> float:
        if cfg.loss != "dpsm":
            return 0.0
        return alpha_at(step, cfg.steps, warmup=cfg.warmup, schedule=cfg.alpha_schedule, alpha_max=cfg.alpha_max,
                        start=cfg.alpha_start)

    # -- optimizer -----------------------------------------------------------------------------
    groups = decay_groups(model, cfg.weight_decay)
    betas = cfg.beta1, cfg.beta2
    with user_errors():
        optimizer = (schedule_free_adamw(groups, cfg.lr, betas=betas) if cfg.schedule == FREE
                     else torch.optim.AdamW(groups, lr=cfg.lr, betas=betas, fused=True))
    fot = None
    if cfg.schedule in ADAPTIVE:  # fed the NLL, which stays one score while dpsm's mixture moves; only CE's is the loss
        fot = FoT(optimizer, cfg.steps, rule=cfg.schedule, parts=parse_parts(cfg.fot_parts), warmup=cfg.lr_warmup,
                  every=cfg.fot_window, beta=cfg.fot_beta, same_units=cfg.loss == "ce", ranks=world.size,
                  reduce=world.all_reduce)

    # -- state: everything that a resumed run needs ----------------------------------------------
    step, tokens_seen, train_seconds, joules = 0, 0, 0.0, 0.0
    best, stale = {"step": None, "nll": math.inf}, 0
    window = Calibration(device)  # calibration of the tokens trained on since the last log line
    sums = torch.zeros(5, dtype=torch.float64, device=device)  # likewise: steps, loss, gradient norm, clipped, flipped
    watch = DivergenceWatch(device)
    if checkpoint:
        restore_training_state(model, optimizer, checkpoint)
        step, tokens_seen = checkpoint["step"], checkpoint["tokens_seen"]
        train_seconds, joules = checkpoint["train_seconds"], checkpoint["joules"]
        best, stale = checkpoint["best"], checkpoint["stale"]
        fot is None or fot.load_state_dict(checkpoint["fot"])
        sums.copy_(checkpoint["sums"])
        watch.state.copy_(checkpoint["watch"])
        if world.main:  # a sum over ranks goes on at one of them
            window.load_state_dict(checkpoint["window"])
        if not set_rng_states(checkpoint["rng"], world) and cfg.dropout and world.main:
            print(f"resuming {len(checkpoint['rng'])} ranks on {world.size}: dropout masks will differ from here on")
    run.start(asdict(cfg) | {"script": "train_lm.py"}, step if checkpoint else None)
    if checkpoint:
        run.log("event", step, event="resumed", world_size=world.size)
    energy = EnergyMeter(device)
    stop = StopRequest()
    wandb_run = start_wandb(cfg.wandb, out, asdict(cfg)) if cfg.wandb and world.main else None
    tokens_per_step = cfg.batch * cfg.seq_len
    if world.main:
        print(f"{out}: {cfg.model}, {parameters / 1e6:.1f} M parameters, loss {cfg.loss}, {dtype} on {world.size} x "
              f"{device.type}, {len(corpus.train.tokens) / 1e6:.2f} M training tokens ({corpus.origin}), "
              f"{tokens_per_step} a step")

    def save(is_best: bool) -> None:
        """last.pt and, if these are the best weights so far, best.pt. All ranks take part; rank 0 writes."""
        weights, moments = training_state(model, optimizer)
        state = {"model": weights, "model_config": asdict(shape), "config": asdict(cfg), "step": step, "best": best,
                 "data_hash": corpus.train.hash,
                 "tokenizer": {"files": corpus.tokenizer.files(), "eos_id": corpus.tokenizer.eos_id}}
        if is_best:
            run.save("best.pt", state)
        total = Calibration(device)
        total.load_state_dict(window.state_dict())
        total.all_reduce()
        run.save("last.pt", state | {
            "optimizer": moments, "alpha": alpha_of(step), "tokens_seen": tokens_seen,
            "stale": stale, "train_seconds": train_seconds, "joules": joules, "sums": sums.cpu(),
            "watch": watch.state.cpu(), "window": total.state_dict(), "fot": fot and fot.state_dict(),
            "rng": rng_states(world)})

    def log_row(kind: str, **values) -> None:
        row = run.log(kind, step, tokens=tokens_seen, train_seconds=train_seconds, **values)
        if wandb_run:
            wandb_run.log({f"{kind}/{k}": v for k, v in row.items() if k not in ("kind", "step")}, step=step)

    # -- loop ----------------------------------------------------------------------------------
    from tqdm import tqdm

    share = cfg.batch // world.size
    micro = next(m for m in range(min(cfg.micro_batch, share), 0, -1) if share % m == 0)
    mine = slice(world.rank * share, (world.rank + 1) * share)
    bar = tqdm(total=cfg.steps, initial=step, desc=out.name, unit="step", dynamic_ncols=True, disable=not world.main)
    ending = "early_stop" if cfg.patience and stale >= cfg.patience else None  # why the loop ended before cfg.steps
    trained.train()
    clock, meter, clocked = time.perf_counter(), energy.read(), step
    while step < cfg.steps and ending is None:
        x, y = train.get(train.batch_indices(step, cfg.batch, cfg.seed))  # the global batch, a function of the step
        flipped = 0
        if cfg.label_noise:
            y, flipped = flip_labels(y, shape.vocab_size, cfg.label_noise, cfg.label_noise_steps, cfg.seed, step)
        count = (y != -100).sum()
        x, y = to_device(x[mine], device), to_device(targets := y[mine], device)
        alpha.fill_(alpha_of(step))
        lr = fot.get_last_lr()[0] if fot else cfg.lr * lr_factor(cfg.schedule, step, cfg.steps, warmup=cfg.lr_warmup,
                                                                 floor=cfg.lr_floor)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # The loss is the sum over the global batch's targets divided by their number. DDP and FSDP
        # average gradients over ranks, hence the world size.
        denominator = to_device(count.float() / world.size, device)
        loss = torch.zeros((), device=device)
        measured = fot is not None and fot.wants_micro and not cfg.fsdp  # FSDP has no gradient of a micro-batch
        rows = math.ceil(share / 2) if measured and micro == share else micro  # it compares a part with the whole
        for i in range(0, share, rows):
            last = i + rows >= share
            if cfg.fsdp:
                model.set_requires_gradient_sync(last)
            with contextlib.nullcontext() if last or world.size == 1 or cfg.fsdp else trained.no_sync():
                hidden = trained(x[i : i + rows]).flatten(0, 1)
                part, moments = linear_score(hidden, model.head_weight, y[i : i + rows].flatten(), score,
                                             denominator=denominator, tail=cfg.tail_smoothing, impl=cfg.kernels)
                part.backward()
            loss += part.detach() / world.size
            window.update(moments)
            if fot:
                fot.observe(-moments.log_p.sum(), moments.valid.sum())
                if measured and i == 0 and not last:
                    fot.micro(float(targets[:rows].ne(-100).sum() / count))
        world.all_reduce(loss)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip or math.inf)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        finite = torch.isfinite(norm) & torch.isfinite(loss)
        optimizer.found_inf = (~finite).float()  # fused AdamW leaves everything as it is where this is 1
        if fot:
            fot.clipped_by = (norm / (cfg.clip or math.inf)).clamp(min=1)
        if cfg.schedule != FREE or finite:  # Schedule-Free reads no found_inf: a synchronisation for it
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        watch.update(loss, finite)
        clipped = (norm > (cfg.clip or math.inf)).float()
        seen = torch.stack([torch.ones_like(loss), loss, norm, clipped, torch.full_like(loss, flipped)])
        sums += torch.where(finite, seen, 0.0)
        tokens_seen += int(count)  # of a tensor on the CPU
        step += 1
        bar.update()
        if fot:
            fot.step()
            if fot.decided:
                log_row("fot", **fot.decision)

        # Ranks see a signal at different moments: several of them agree at log lines.
        at_log, at_eval = step % cfg.log_every == 0, step % cfg.eval_every == 0 or step == cfg.steps
        stopping = bool(stop.signal) if world.size == 1 else False
        if world.size > 1 and (at_log or at_eval):
            stopping = bool(world.all_reduce(torch.tensor(int(bool(stop.signal)), device=device)))
        if not (at_log or at_eval or stopping):
            continue

        # -- log: the one synchronisation of these steps ---------------------------------------
        health = watch.read()
        seconds, clock = time.perf_counter() - clock, time.perf_counter()
        train_seconds += seconds
        rate = (step - clocked) / seconds
        clocked = step
        if meter is not None:
            used = torch.tensor(energy.read() - meter, dtype=torch.float64, device=device)
            joules += float(world.all_reduce(used))
        if at_log or at_eval:
            n, *means = sums.tolist()
            window.all_reduce()
            if n:
                m = window.compute()
                mean_loss, mean_norm, clip_rate, flips = (v / n for v in means)
                shown = {k: m[k] for k in ("nll", "ppl", "ece10", "brier", "accuracy", "entropy")}
                used_alpha = alpha.item()  # the value that the last step was computed with
                log_row("train", loss=mean_loss, **shown, alpha=used_alpha, lr=lr, grad_norm=mean_norm,
                        clip_rate=clip_rate, flipped_tokens=flips * n, steps=n, skipped=health["skipped"],
                        tokens_per_second=rate * tokens_per_step)
                bar.set_postfix_str(f"loss {mean_loss:.3f} {f'| {fot} | ' if fot else ''}ppl {m['ppl']:.1f} "
                                    f"ece {m['ece10']:.3f} a {used_alpha:.2f} lr {lr:.1e} "
                                    f"{rate * tokens_per_step:,.0f} tok/s")
            window.reset()
            sums.zero_()
        if health["worst_streak"] >= 3:
            ending = "diverged"
            break
        if at_eval:
            windows = sets["val"]
            with averaged(optimizer):
                m = numbers(evaluate(model, windows, cfg, world)[0], windows)
            log_row("val", **m)
            bar.write(f"step {step}: validation ppl {m['ppl']:.3f}, nll {m['nll']:.4f}, ece {m['ece10']:.4f}, "
                      f"brier {m['brier']:.4f}", file=sys.stderr)
            stale = 0 if m["nll"] < best["nll"] else stale + 1
            if stale == 0:
                best = {"step": step, "nll": m["nll"]}
            if cfg.patience and stale >= cfg.patience:
                ending = "early_stop"
        if stopping:
            ending = "stopped"
        # A step whose loss was not finite changed nothing, but weights that yield one are no good place to stop.
        if (at_eval or stopping) and health["streak"] == 0:
            save(is_best=at_eval and stale == 0)
        clock, meter = time.perf_counter(), energy.read()  # evaluation and checkpoints are not training time
    bar.close()
    stop.restore()
    if (code := ends_here(run, ending, step, stop.signal)) is not None:
        return finish(run, wandb_run, code)

    # -- final evaluation: of the file that stays, on every rank -----------------------------------
    memory = peak_memory(device)
    if world.size > 1:
        torch.distributed.barrier()
    kept = load_checkpoint(run / f"{cfg.report}.pt")
    final = GPT2(shape, dtype)
    final.load_state_dict(kept["model"])
    final.to(device).eval()
    entries, bins = final_metrics(final, sets, cfg, world)
    if not world.main:
        return finish(run, wandb_run, 0)
    samples = write_samples(final, corpus.tokenizer, sets["val"], cfg) if entries["temperature"] else []
    rows = read_metrics(run / "metrics.jsonl", "train")
    total = sum(r["steps"] for r in rows)
    # The first window pays for compilation and cold caches.
    milliseconds = [1000 * tokens_per_step / r["tokens_per_second"] for r in (rows[1:] or rows)]
    median = statistics.median(milliseconds) if milliseconds else None
    rate = tokens_per_step * 1000 / median if median else None
    flops, peak = flops_per_token(shape, cfg.seq_len), peak_flops(device, dtype)
    summary = {
        "script": "train_lm.py", "loss": cfg.loss, "alpha_schedule": cfg.alpha_schedule if cfg.loss == "dpsm" else None,
        "steps": step, "seed": cfg.seed, "parameters": parameters, "tokens_seen": tokens_seen, "reported": cfg.report,
        "reported_step": kept["step"], "best_step": best["step"], "best_val_nll": best["nll"], "stopped_early": ending,
        **entries,
        **{f"distinct_{n}": distinct_n([s["text"] for s in samples], n) for n in (1, 2)},
        "tokens_per_second": rate, "ms_per_step_median": median, "train_seconds": train_seconds,
        "flops_per_token": flops, "mfu": rate * flops / (peak * world.size) if peak and rate else None,
        "clip_rate": sum(r["clip_rate"] * r["steps"] for r in rows) / total if total else None,
        **system_entries(world, dtype, memory, joules if meter is not None else None, watch.read()),
        **({f"{cfg.schedule}_{k}": v for k, v in fot.counts.items()} if fot else {}),
    }
    write_json(run / "calibration.json", bins)
    write_json(run / "samples.json", samples)
    write_json(run / "summary.json", summary)
    if wandb_run:
        wandb_run.summary.update(summary)
    e = entries
    after = "; at temperature {temperature:.3f} nll {val_nll_t:.4f}, ece {val_ece10_t:.4f}" if samples else ""
    print(f"{out}: validation ppl {e['val_ppl']:.3f}, nll {e['val_nll']:.4f}, ece {e['val_ece10']:.4f}, brier "
          f"{e['val_brier']:.4f}{after.format(**e)}; {rate or 0:,.0f} tokens/s")
    print(f"compare runs with: python -m eval.report {out} ... --out DIR")
    return finish(run, wandb_run, 0)


def check_start(have: GPT2Config, cfg: Config) -> None:
    """Raises ValueError when --init-from is not a model of the size that --model and --seq-len ask for."""
    if any(getattr(have, k) != v for k, v in SIZES[cfg.model].items()):
        raise ValueError(f"--init-from {cfg.init_from} has {have.n_layer} layers, {have.n_head} heads, width "
                         f"{have.n_embd}: not --model {cfg.model}")
    if have.block_size < cfg.seq_len:
        raise ValueError(f"--seq-len {cfg.seq_len} is longer than the {have.block_size} positions of {cfg.init_from}")


def write_samples(model: GPT2, tokenizer, windows: Windows, cfg: Config) -> list[dict]:
    """Continuations of --prompt, or of the first 16 tokens of three validation sequences; seeded."""
    if cfg.prompt:
        prompts = torch.tensor([tokenizer.encode(cfg.prompt)])
    else:
        picks = sorted({len(windows) * i // 3 for i in range(3)})
        prompts = windows.get(picks)[0][:, :16]
    generator = torch.Generator().manual_seed(cfg.seed)
    tokens = sample(model, prompts, cfg.sample_tokens, temperature=cfg.temperature, top_k=cfg.top_k, top_p=cfg.top_p,
                    generator=generator)
    at = prompts.shape[1]
    return [{"prompt": tokenizer.decode(t[:at]), "text": tokenizer.decode(t[at:])} for t in tokens.tolist()]


if __name__ == "__main__":
    sys.exit(main())
