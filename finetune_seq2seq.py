"""Experiment 2: BART or PEGASUS learns to summarise under any proper score, from articles to ROUGE and calibration.

    python finetune_seq2seq.py --model facebook/bart-base --data cnn_dailymail --loss dpsm --warmup 0.1     # one GPU
    torchrun --nproc_per_node 8 finetune_seq2seq.py --model facebook/bart-large --data xsum --loss dpsm     # one node
    python finetune_seq2seq.py --model google/pegasus-large --preset pegasus --loss ce --eval-data xsum
    python finetune_seq2seq.py --size bart-tiny --random-start --tokenizer bpe:2000 --preset none --data FOLDER
    python finetune_seq2seq.py --model facebook/bart-base --profile 20 --micro-batch 64              # cost of a step
    python finetune_seq2seq.py --out runs/NAME ... --resume                                          # go on exactly

Top to bottom: config, data, model, loss, optimizer, loop, evaluation. A flag that is not given has its preset's
value, and config.json holds them all. Everything a run leaves behind is in its folder, the summaries it wrote too;
`python -m eval.report runs/A runs/B --out DIR` compares runs.
"""

import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.summaries import (
    SETS,
    Bucketed,
    SummaryTokenizer,
    collate,
    padding_share,
    swapped_references,
    tokenizer_for_training,
    tokenizer_of_model,
)
from data.summary_sets import encode_sets, load_texts
from eval import seq2seq as measure
from eval.calibration import Calibration
from eval.summaries import bert_model, rouge_scores
from kernels import linear_score
from kernels.losses import ALPHA_SCHEDULES, LOSSES, alpha_at, brier, make_score, smoothing
from model.gpt2 import decay_groups, parameter_count
from model.seq2seq import SIZES, Seq2Seq, training_flops
from model.seq2seq_hub import load_seq2seq
from recipes.presets import PAPER_SCHEDULES, PRESETS, check_fit, paper_lr_factor, preset_values
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
)
from runtime.meter import DivergenceWatch
from runtime.optim import restore_training_state, training_state
from schedules.fot import FoT, parse_parts
from schedules.rules import ADAPTIVE, FREE, RULES, averaged, lr_factor, schedule_free_adamw

# fmt: off
# ----------------------------------------------------------------------------------------------
# config

TRAINING_LOSSES = tuple(name for name in LOSSES if name != "smoothing")  # here a flag of ce and dpsm


@dataclass(frozen=True)
class Config:
    out: str = opt("", "run folder; default runs/DATA-MODEL-LOSS-sSEED")
    resume: bool = opt(False, "go on with the run in --out, exactly where its last checkpoint stands")
    resume_from: str = opt("", "with --resume: this checkpoint instead of OUT/last.pt")
    seed: int = opt(1, "seeds the initialisation, the data order, dropout and the noise")
    preset: str = opt("bart", "recipe for the flags without a default of their own", tuple(PRESETS))
    # data
    data: str = opt("cnn_dailymail", f"{', '.join(SETS)}, or a folder with train.jsonl, validation.jsonl, test.jsonl")
    eval_data: str = opt("", "a second set, whose test split is summarised at the end without training on it")
    fold: str = opt("", "K/M: train on all but part K of M of the training set, validate on it, leave the test set")
    tokenizer: str = opt("", "default: --model's; for a random start gpt2, bpe:SIZE or a folder with its files")
    cache: str = opt("cache", "folder for token caches and trained tokenizers")
    min_words: int = opt(50, "leave out articles with fewer words")
    max_source: int | None = opt(None, "tokens of an article, at most; the rest is cut off")
    max_target: int | None = opt(None, "tokens of a summary, at most; the rest is cut off")
    noise_references: float = opt(0.0, "share of training summaries swapped with another's of the same batch")
    # model
    model: str = opt("", "a BART or PEGASUS to start from: a folder in Hugging Face's layout or a hub id")
    size: str = opt("", "with --random-start: the size instead", ("", *SIZES))
    random_start: bool = opt(False, "start from random weights of --size")
    dropout: float | None = opt(None, "dropout on embeddings and residuals")
    attention_dropout: float | None = opt(None, "dropout on attention")
    # loss
    loss: str = opt("ce", "training loss", TRAINING_LOSSES)
    label_smoothing: float | None = opt(None, "ce, dpsm's ce part: share of the uniform distribution (preset: ce only)")
    warmup: float = opt(0.1, "dpsm: alpha's ramp, as a fraction of the steps")
    alpha_schedule: str = opt("linear", "dpsm: shape of the ramp; fixed holds --alpha-max", ALPHA_SCHEDULES)
    alpha_max: float = opt(1.0, "dpsm: share of Brier at the end of the ramp")
    alpha_start: float = opt(0.0, "dpsm: where the ramp begins, as a fraction of the steps")
    gamma: float = opt(2.0, "focal: exponent")
    tail_smoothing: float = opt(0.0, "brier, spherical: Shao's score smoothing with a logarithmic tail; 0 is off")
    # optimizer
    steps: int | None = opt(None, "optimizer steps")
    batch: int | None = opt(None, "pairs in an optimizer step, over all ranks")
    micro_batch: int = opt(8, "pairs in one forward of one rank, at most; the rest is accumulated")
    lr: float | None = opt(None, "peak learning rate")
    schedule: str | None = opt(None, "learning-rate schedule (or --lr-schedule); snac, bacon and fot measure and "
                               "decide as they go, see fot.py", (*RULES, *PAPER_SCHEDULES))
    fot_parts: str = opt("envelope,noise,forecast,gate,blocks", "fot: the parts of the rule that are on, or none")
    fot_window: int = opt(32, "snac, bacon, fot: steps between two decisions")
    fot_beta: float = opt(0.9, "snac, bacon, fot: averaging of the measurements over decisions")
    lr_power: float = opt(1.0, "polynomial: exponent of the decay")
    lr_warmup: float | None = opt(None, "learning-rate warm-up, as a fraction of the steps")
    lr_floor: float = opt(0.0, "learning rate at the end, as a fraction of the peak; fot and bacon fall to 0")
    weight_decay: float | None = opt(None, "AdamW weight decay of the matrices")
    beta1: float = opt(0.9, "AdamW beta1")
    beta2: float | None = opt(None, "AdamW beta2")
    clip: float | None = opt(None, "clip the gradient to this norm; 0 is off")
    # evaluation
    eval_every: int = opt(500, "steps between validations and checkpoints")
    log_every: int = opt(10, "steps between lines of metrics.jsonl")
    patience: int = opt(0, "stop after this many validations without a better NLL; 0 is off")
    report: str = opt("best", "which weights the final metrics are of", ("last", "best"))
    validation_examples: int = opt(0, "validate on the first so many pairs; 0 is all")
    test_examples: int = opt(0, "test, and --eval-data, on the first so many pairs; 0 is all")
    beams: int | None = opt(None, "beams of the search")
    length_penalty: float | None = opt(None, "a hypothesis scores (sum of log p) / length^this")
    min_new_tokens: int | None = opt(None, "no end before so many tokens")
    max_new_tokens: int | None = opt(None, "tokens of a summary at most")
    no_repeat_ngram: int | None = opt(None, "no n-gram of this size twice in a summary; 0 is off")
    early_stopping: bool | None = opt(None, "end a search at --beams finished hypotheses")
    generate_batch: int = opt(16, "articles summarised at a time by one rank; what a kill can lose")
    bertscore: str = opt("", "also BERTScore with this model: a name bert-score knows, or FOLDER:LAYER")
    profile: int = opt(0, "time so many steps of one fixed micro-batch instead of training")
    # system
    device: str = opt("auto", "where to run", ("auto", "cpu", "cuda"))
    dtype: str = opt("auto", "dtype of the activations; auto is bfloat16 on CUDA", ("auto", "float32", "bfloat16"))
    kernels: str = opt("auto", "implementation of the scores", ("auto", "triton", "torch"))
    compile: bool = opt(False, "torch.compile the layers, with dynamic shapes")
    checkpoint_activations: bool = opt(False, "recompute each layer in backward to save memory")
    wandb: str = opt("", "Weights & Biases project to log to as well (WANDB_MODE=offline works)")


# Settings that a resumed run may change: where and how it computes, not what.
CHANGEABLE = ("out", "resume", "resume_from", "cache", "wandb", "micro_batch", "generate_batch", "device",
              "kernels", "compile", "checkpoint_activations", "bertscore")


def with_preset(cfg: Config) -> Config:
    """``cfg`` with every None replaced by its preset's value for the data; label smoothing is the CE baseline's."""
    values = preset_values(cfg.preset, cfg.data, cfg.loss)
    return dataclasses.replace(cfg, **{k: v for k, v in values.items() if getattr(cfg, k) is None})


def check(cfg: Config, world: World) -> None:
    """Raises ValueError, one line, for settings that cannot be meant."""
    bounds = (
        ("warmup alpha_max alpha_start noise_references lr_warmup lr_floor label_smoothing tail_smoothing",
         lambda v: 0 <= v <= 1, "is outside [0, 1]"),
        ("steps batch micro_batch eval_every log_every generate_batch fot_window",
         lambda v: v >= 1, "must be at least 1"),
        ("seed lr lr_power weight_decay clip gamma patience min_words profile validation_examples test_examples",
         lambda v: 0 <= v < math.inf, "must be finite and not negative"),
        ("dropout attention_dropout beta1 beta2 fot_beta", lambda v: 0 <= v < 1, "is outside [0, 1)"),
        ("max_source max_target", lambda v: v >= 3, "leaves no room for text; at least 3"),
    )
    for names, holds, wrong in bounds:
        for name in names.split():
            if not holds(getattr(cfg, name)):
                raise ValueError(f"--{name.replace('_', '-')} {getattr(cfg, name)} {wrong}")
    if cfg.batch % world.size:
        raise ValueError(f"--batch {cfg.batch} is not divisible by the {world.size} ranks; change one of them")
    if cfg.schedule in ADAPTIVE and cfg.lr_warmup == 1:
        raise ValueError(f"--lr-warmup 1 leaves no step to --schedule {cfg.schedule}")
    parse_parts(cfg.fot_parts)
    swapped_references(cfg.batch, cfg.noise_references, cfg.seed, 0)
    if cfg.tail_smoothing and cfg.loss not in ("brier", "spherical"):
        raise ValueError(f"--tail-smoothing is defined for brier and spherical, not --loss {cfg.loss}")
    if cfg.label_smoothing and cfg.loss not in ("ce", "dpsm"):
        raise ValueError(f"--label-smoothing is defined for ce and dpsm, not --loss {cfg.loss}")
    if cfg.random_start != bool(cfg.size) or bool(cfg.size) == bool(cfg.model):
        raise ValueError("give --model FOLDER_OR_HUB_ID, or --size NAME with --random-start, and not both")
    if cfg.random_start and not cfg.tokenizer:
        raise ValueError("--random-start needs --tokenizer: gpt2, bpe:SIZE or a folder with a tokenizer's files")
    if cfg.resume_from and not cfg.resume:
        raise ValueError("--resume-from needs --resume")
    if cfg.kernels == "triton" and world.device.type != "cuda":
        raise ValueError("--kernels triton needs a CUDA device; use --kernels torch or auto")
    rouge_scores(["a"], ["a"])  # the package is there: found out now, not after the training
    if cfg.bertscore:
        bert_model(cfg.bertscore)


def lr_at(cfg: Config, step: int) -> float:
    """The learning rate before ``step``."""
    factor, more = (paper_lr_factor, {"power": cfg.lr_power}) if cfg.schedule in PAPER_SCHEDULES else (lr_factor, {})
    return cfg.lr * factor(cfg.schedule, step, cfg.steps, warmup=cfg.lr_warmup, floor=cfg.lr_floor, **more)


# ----------------------------------------------------------------------------------------------
# model, loss and cost


def random_model(cfg: Config, tokenizer: SummaryTokenizer, dtype: torch.dtype) -> Seq2Seq:
    """Random weights of --size around the vocabulary of ``tokenizer``."""
    start = tokenizer.eos_id if cfg.size.startswith("bart") else tokenizer.pad_id
    ids = dict(pad_token_id=tokenizer.pad_id, eos_token_id=tokenizer.eos_id, decoder_start_token_id=start,
               bos_token_id=tokenizer.bos_id, vocab_size=tokenizer.vocab_size)
    rates = dict(dropout=cfg.dropout, attention_dropout=cfg.attention_dropout)
    return Seq2Seq(SIZES[cfg.size](**ids, **rates), dtype)


def score_of(cfg: Config, alpha: Tensor) -> Callable:
    """The training loss of a token, from its Moments."""
    if not cfg.label_smoothing:
        return make_score(cfg.loss, alpha=alpha, gamma=cfg.gamma, tail=cfg.tail_smoothing)
    smoothed = smoothing(cfg.label_smoothing)
    return smoothed if cfg.loss == "ce" else lambda m: (1 - alpha) * smoothed(m) + alpha * brier(m)


# ----------------------------------------------------------------------------------------------
# the experiment


def main(argv: list[str] | None = None) -> int:
    argv = [a.replace("--lr-schedule", "--schedule", 1) for a in (sys.argv[1:] if argv is None else argv)]
    cfg = with_preset(parse_config(Config, argv, __doc__))
    with user_errors():
        world = start_world(cfg.device)
        check(cfg, world)
        device = world.device
        named = Path(cfg.model or cfg.size).name
        out = Path(cfg.out or f"runs/{Path(cfg.data).name}-{named}-{cfg.loss}-s{cfg.seed}")
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
        texts = load_texts(cfg.data, cfg.eval_data, folded=bool(cfg.fold), min_words=cfg.min_words)
        limits = dict(val=cfg.validation_examples, test=cfg.test_examples, ood=cfg.test_examples)

        # -- model: parameters in fp32, activations in dtype -----------------------------------
        bf16 = cfg.dtype == "bfloat16" or (cfg.dtype == "auto" and device.type == "cuda")
        dtype = torch.bfloat16 if bf16 else torch.float32
        torch.manual_seed(cfg.seed)
        if cfg.model:
            model = load_seq2seq(cfg.model, dtype, cfg.dropout, cfg.attention_dropout)
            with world.main_first():
                tokenizer = tokenizer_of_model(cfg.tokenizer or cfg.model, model.config)
        else:
            bos = cfg.size.startswith("bart")
            with world.main_first():
                tokenizer = tokenizer_for_training(cfg.tokenizer, texts["train"], cfg.cache, bos=bos)
            model = random_model(cfg, tokenizer, dtype)
        check_fit(cfg, model.config, cfg.model or cfg.size)
        options = measure.decoding(cfg, tokenizer)
        with world.main_first():
            train, sets, about = encode_sets(texts, tokenizer, cfg.cache, cfg.max_source, cfg.max_target,
                                             part=cfg.fold, limits=limits)
        batches = Bucketed(train, cfg.batch, cfg.seed)
        if checkpoint and checkpoint["data_hash"] != train.hash:
            raise ValueError(f"--resume: {cfg.data} is not the text that {out} was trained on; restore it")

    share = cfg.batch // world.size
    micro = next(m for m in range(min(cfg.micro_batch, share), 0, -1) if share % m == 0)

    def micro_batches(rank: int, mixed: bool = False) -> list[np.ndarray]:
        """Places of the global batch, which is sorted by length, that ``rank`` runs together: of like lengths, or
        ``mixed``, of every length and in two parts at least, where a part is measured against the whole."""
        mine, n = np.arange(cfg.batch)[rank :: world.size], max(2, share // micro)
        return [mine[i::n] for i in range(n)] if mixed else np.split(mine, share // micro)

    padding = padding_share(train, (batches.indices(step)[part] for step in range(batches.per_epoch)
                                    for rank in range(world.size) for part in micro_batches(rank)))
    shape = dataclasses.replace(model.config, dropout=0.0, attention_dropout=0.0)  # of the model, not its training
    model.to(device).checkpoint_activations = cfg.checkpoint_activations
    parameters = parameter_count(model)
    flops = float(training_flops(shape, train.source_lengths.astype(float), train.target_lengths.astype(float)).sum())
    flops_per_token = flops / float(train.source_lengths.sum() + train.target_lengths.sum())
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    if cfg.compile:
        for stack in (model.encoder, model.decoder):
            for layer in stack.layers:
                layer.encode = torch.compile(layer.encode, dynamic=True)
                layer.decode = torch.compile(layer.decode, dynamic=True)
    trained = model
    if world.size > 1:
        trained = torch.nn.parallel.DistributedDataParallel(
            model, device_ids=[device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True)
    torch.manual_seed(cfg.seed + 2**32 * (1 + world.rank))  # dropout differs between ranks

    # -- loss ----------------------------------------------------------------------------------
    alpha = torch.zeros((), device=device)  # filled each optimizer step; the score reads it on the device
    score = score_of(cfg, alpha)

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
                  every=cfg.fot_window, beta=cfg.fot_beta, same_units=cfg.loss == "ce" and not cfg.label_smoothing,
                  ranks=world.size, reduce=world.all_reduce)

    # -- state: everything that a resumed run needs ----------------------------------------------
    step, tokens_seen, train_seconds, joules = 0, 0, 0.0, 0.0
    best, stale = {"step": None, "nll": math.inf}, 0
    window = Calibration(device)  # calibration of the tokens trained on since the last log line
    sums = torch.zeros(6, dtype=torch.float64, device=device)  # likewise: steps, loss, norm, clipped, swapped, tokens
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
    run.start(asdict(cfg) | {"script": "finetune_seq2seq.py"}, step if checkpoint else None)
    if checkpoint:
        run.log("event", step, event="resumed", world_size=world.size)
    energy = EnergyMeter(device)
    if world.main:
        print("\n".join(split["label"] for split in about.values()))
        print(f"{out}: {named}, {parameters / 1e6:.1f} M parameters, loss {cfg.loss}, {dtype} on {world.size} x "
              f"{device.type}, {len(train):,} pairs, {cfg.batch} a step, padding {100 * padding:.1f} %")

    if cfg.profile:
        trained.train()
        alpha.fill_(alpha_of(cfg.steps - 1))
        batch = collate(train, batches.indices(0)[micro_batches(world.rank)[0]], multiple=measure.multiple_of(device))
        cost = measure.profile(trained, model, score, batch, world, energy, steps=cfg.profile, tail=cfg.tail_smoothing,
                       impl=cfg.kernels)
        if world.main:
            write_json(run / "profile.json", cost)
            print("\n".join(f"{k:24} {v}" for k, v in cost.items()))
        return finish(run, None, 0)

    stop = StopRequest()
    wandb_run = start_wandb(cfg.wandb, out, asdict(cfg)) if cfg.wandb and world.main else None

    def save(is_best: bool) -> None:
        """last.pt and, if these are the best weights so far, best.pt. All ranks take part; rank 0 writes."""
        weights, moments = training_state(model, optimizer)
        state = {"model": weights, "model_config": asdict(shape), "config": asdict(cfg), "step": step, "best": best,
                 "data_hash": train.hash, "tokenizer": tokenizer.state(),
                 "dtype": str(dtype).removeprefix("torch.")}
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

    bar = tqdm(total=cfg.steps, initial=step, desc=out.name, unit="step", dynamic_ncols=True, disable=not world.main)
    ending = "early_stop" if cfg.patience and stale >= cfg.patience else None  # why the loop ended before cfg.steps
    trained.train()
    clock, meter, clocked = time.perf_counter(), energy.read(), tokens_seen
    while step < cfg.steps and ending is None:
        rows = batches.indices(step)  # the global batch, a function of the step
        places = swapped_references(cfg.batch, cfg.noise_references, cfg.seed, step)
        swapped = int((places != np.arange(cfg.batch)).sum())
        targets = rows[places]
        count = int(train.target_lengths[targets].sum())
        seen = count + int(train.source_lengths[rows].sum())
        alpha.fill_(alpha_of(step))
        lr = fot.get_last_lr()[0] if fot else lr_at(cfg, step)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # The loss is the sum over the global batch's target tokens divided by their number. DDP averages
        # gradients over ranks, hence the world size.
        denominator = torch.full((), count / world.size, device=device)
        loss = torch.zeros((), device=device)
        measured = fot is not None and fot.wants_micro and share > 1
        parts = micro_batches(world.rank, mixed=measured)
        for i, part in enumerate(parts):
            batch = collate(train, rows[part], targets[part], measure.multiple_of(device))
            last = i + 1 == len(parts)
            with contextlib.nullcontext() if last or world.size == 1 else trained.no_sync():
                hidden, y = measure.forward(trained, *batch, device, model.shift_right)
                piece, moments = linear_score(hidden, model.head_weight, y, score, bias=model.head_bias,
                                              denominator=denominator, tail=cfg.tail_smoothing, impl=cfg.kernels)
                piece.backward()
            loss += piece.detach() / world.size
            window.update(moments)
            if fot:
                fot.observe(-moments.log_p.sum(), moments.valid.sum())
                if measured and i == 0:
                    fot.micro(int(train.target_lengths[targets[part]].sum()) / count)
        world.all_reduce(loss)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip or math.inf)
        finite = torch.isfinite(norm) & torch.isfinite(loss)
        optimizer.found_inf = (~finite).float()  # fused AdamW leaves everything as it is where this is 1
        if fot:
            fot.clipped_by = (norm / (cfg.clip or math.inf)).clamp(min=1)
        if cfg.schedule != FREE or finite:  # Schedule-Free reads no found_inf: a synchronisation for it
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        watch.update(loss, finite)
        clipped = (norm > (cfg.clip or math.inf)).float()
        new = [torch.ones_like(loss), loss, norm, clipped, torch.full_like(loss, swapped), torch.full_like(loss, seen)]
        sums += torch.where(finite, torch.stack(new), 0.0)
        tokens_seen += seen
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
        rate = (tokens_seen - clocked) / seconds
        clocked = tokens_seen
        if meter is not None:
            used = torch.tensor(energy.read() - meter, dtype=torch.float64, device=device)
            joules += float(world.all_reduce(used))
        if at_log or at_eval:
            n, *means = sums.tolist()
            window.all_reduce()
            if n:
                m = window.compute()
                mean_loss, mean_norm, clip_rate, swaps, step_tokens = (v / n for v in means)
                shown = {k: m[k] for k in ("nll", "ppl", "ece10", "brier", "accuracy", "entropy")}
                used_alpha = alpha.item()  # the value that the last step was computed with
                log_row("train", loss=mean_loss, **shown, alpha=used_alpha, lr=lr, grad_norm=mean_norm,
                        clip_rate=clip_rate, swapped_references=swaps * n, steps=n, step_tokens=step_tokens,
                        skipped=health["skipped"], tokens_per_second=rate)
                bar.set_postfix_str(f"loss {mean_loss:.3f} {f'| {fot} | ' if fot else ''}ppl {m['ppl']:.1f} "
                                    f"ece {m['ece10']:.3f} a {used_alpha:.2f} lr {lr:.1e} {rate:,.0f} tok/s")
            window.reset()
            sums.zero_()
        if health["worst_streak"] >= 3:
            ending = "diverged"
            break
        if at_eval:
            with averaged(optimizer):
                now, _ = measure.evaluate(model, sets["val"], world, batch=cfg.micro_batch, impl=cfg.kernels)
            m = measure.numbers(now)
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
    if cfg.report == "best" and best["step"] is None:
        if world.main:
            print(f"{out}: no validation had a finite NLL, so there are no best weights; lower --lr", file=sys.stderr)
        return finish(run, wandb_run, 1)
    kept = load_checkpoint(run / f"{cfg.report}.pt")
    final, _, _ = measure.load_finetuned(out, f"{cfg.report}.pt", device)
    entries, bins = measure.final_metrics(final, sets, world, batch=cfg.micro_batch, impl=cfg.kernels)
    written = {}  # of weights that yield inf or nan there is nothing to read
    if entries["temperature"]:
        written = measure.summarise(final, sets, options, out, world, key=kept["step"], batch=cfg.generate_batch)
    if not world.main:
        return finish(run, wandb_run, 0)
    for name, (rows, speed) in written.items():
        with user_errors():  # the summaries are on the disk; --resume takes another --bertscore
            measured = measure.generation_metrics(rows, speed, bertscore=cfg.bertscore, device=device.type)
        entries |= {f"{name}_{k}": v for k, v in measured.items()}
    summary = {
        "script": "finetune_seq2seq.py", "loss": cfg.loss, "label_smoothing": cfg.label_smoothing,
        "alpha_schedule": cfg.alpha_schedule if cfg.loss == "dpsm" else None, "preset": cfg.preset,
        "steps": step, "seed": cfg.seed, "parameters": parameters, "tokens_seen": tokens_seen, "reported": cfg.report,
        "reported_step": kept["step"], "best_step": best["step"], "best_val_nll": best["nll"], "stopped_early": ending,
        "data": about, "partial": any(a["partial"] for a in about.values()), "fold": cfg.fold or None,
        "examples_limit": {name: n for name, n in limits.items() if n and sets[name] is not None},
        **entries,
        **measure.efficiency(read_metrics(run / "metrics.jsonl", "train"), flops_per_token,
                     peak_flops(device, dtype), world.size),
        "padding": padding, "train_seconds": train_seconds,
        **system_entries(world, dtype, memory, joules if meter is not None else None, watch.read()),
        **({f"{cfg.schedule}_{k}": v for k, v in fot.counts.items()} if fot else {}),
    }
    write_json(run / "calibration.json", bins)
    write_json(run / "summary.json", summary)
    if wandb_run:
        wandb_run.summary.update(summary)
    print("\n".join(measure.describe(out.as_posix(), summary)))
    print(f"compare runs with: python -m eval.report {out} ... --out DIR")
    return finish(run, wandb_run, 0)


if __name__ == "__main__":
    sys.exit(main())
