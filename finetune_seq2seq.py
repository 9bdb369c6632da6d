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

import dataclasses
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from data import denoising, summaries
from eval import metrics
from eval import seq2seq as measure
from eval.heldout import evaluate, final_metrics
from eval.summaries import ROUGE_WORDS
from kernels import Calibration, UnigramSmoothing, linear_score
from kernels.losses import LOSSES, brier, make_score, smoothing
from model.gpt2 import decay_groups, parameter_count
from model.seq2seq import SIZES, Seq2Seq, training_flops
from model.seq2seq_hub import load_seq2seq
from recipes.presets import PRESETS, check_fit, preset_values
from runtime import optim
from runtime.cli import opt, parse_config, user_errors
from runtime.flags import alpha_of, flag, knobs
from runtime.folder import RunFolder
from runtime.machine import start_world
from runtime.meter import Meter
from runtime.process import command
from schedules import averaged

# ----------------------------------------------------------------------------------------------
# config

TRAINING_LOSSES = tuple(name for name in LOSSES if name != "smoothing")  # here a flag of ce and dpsm


def by_preset(name: str, field: dataclasses.Field | None = None) -> dataclasses.Field:
    """The flag ``name``, ``field`` where it is this script's own, whose default is its preset's."""
    about = dict((field or flag(name, None)).metadata)
    values = [(preset_values(preset, "")[name], preset) for preset in PRESETS]
    shown = ", ".join(f"{value:g} of {of}" if isinstance(value, float) else f"{value} of {of}" for value, of in values)
    return opt(None, **about | {"help": f"{about['help']}; default: {shown}"})


@dataclass(frozen=True)
class Config:
    out: str = flag("out")
    resume: bool = flag("resume")
    resume_from: str = flag("resume_from")
    dry_run: str = flag("dry_run")
    seed: int = flag("seed", help="seeds the initialisation, the data order, dropout and the noise")
    preset: str = opt("bart", "recipe for the flags with a default of each; for xsum some differ", PRESETS)
    # data
    data: str = opt("cnn_dailymail", f"{', '.join(summaries.SUMMARY_SETS)}, or a folder", role="setting", group="data")
    eval_data: str = opt("", "a second set, whose test split is summarised without training on it", role="setting")
    fold: str = opt("", "K/M: validate on part K of M of the training set, leave the test set", role="setting")
    tokenizer: str = opt("", "default: --model's; else gpt2, bpe:SIZE or a folder with its files", role="setting")
    cache: str = flag("cache", help="folder for token caches and trained tokenizers")
    min_words: int = opt(50, "leave out articles with fewer words", within="[0, inf)", role="setting")
    max_source: int | None = by_preset(
        "max_source", opt(None, "tokens of an article; the rest is cut off", within="[3, inf)", role="setting")
    )
    max_target: int | None = by_preset(
        "max_target", opt(None, "tokens of a summary; the rest is cut off", within="[3, inf)", role="setting")
    )
    noise_references: float = opt(0.0, "share of summaries swapped in a batch", within="[0, 1]", role="setting")
    denoise: float = opt(0.0, "pre-train on text, --data A,B: share masked", within="[0, 1)", role="setting")
    # model
    model: str = opt("", "a BART or PEGASUS to start from: a folder or a hub id", role="setting", group="model")
    size: str = opt("", "with --random-start: the size instead", ("", *SIZES), role="setting")
    random_start: bool = opt(False, "start from random weights of --size", role="setting")
    dropout: float | None = by_preset("dropout", opt(None, "dropout on embeddings and residuals", within="[0, 1)"))
    attention_dropout: float | None = by_preset("attention_dropout", opt(None, "dropout on attention", within="[0, 1)"))
    # loss
    loss: str = flag("loss", choices=TRAINING_LOSSES)
    label_smoothing: float | None = by_preset(
        "label_smoothing",
        opt(
            None,
            "ce, dpsm's ce part: share of the uniform distribution (preset: ce without --unigram only)",
            within="[0, 1]",
            only={"loss": ("ce", "dpsm")},
        ),
    )
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
    tail_smoothing: float = flag("tail_smoothing")
    unigram: float = flag("unigram")
    unigram_gain: float = flag("unigram_gain")
    # optimizer
    steps: int | None = by_preset("steps")
    batch: int | None = by_preset("batch", flag("batch", None, help="pairs in an optimizer step, over all ranks"))
    micro_batch: int = flag("micro_batch", 8)
    optimizer: str = flag("optimizer")
    lr: float | None = by_preset("lr")
    step_factor: float = flag("step_factor")
    momentum: float = flag("momentum")
    schedule: str | None = by_preset("schedule")
    lr_power: float = opt(1.0, "exponent of the decay", within="[0, inf)", only={"schedule": ("polynomial",)})
    lr_warmup: float | None = by_preset("lr_warmup")
    lr_floor: float = flag("lr_floor", 0.0)
    decay_shape: str = flag("decay_shape")
    tail_average: float = flag("tail_average")
    fot_parts: str = flag("fot_parts")
    fot_window: int = flag("fot_window")
    fot_beta: float = flag("fot_beta")
    weight_decay: float | None = by_preset(
        "weight_decay", flag("weight_decay", None, help="AdamW weight decay of the matrices")
    )
    beta1: float = flag("beta1")
    beta2: float | None = by_preset("beta2")
    clip: float | None = by_preset("clip")
    # evaluation
    eval_every: int = flag("eval_every", 500)
    log_every: int = flag("log_every")
    patience: int = flag("patience")
    report: str = flag("report", "best")
    validation_examples: int = opt(0, "validate on the first pairs; 0 is all", within="[0, inf)", role="setting")
    test_examples: int = opt(0, "test on the first so many pairs; 0 is all", within="[0, inf)", role="setting")
    beams: int | None = by_preset("beams", opt(None, "beams of the search", within="[1, inf)", role="setting"))
    length_penalty: float | None = by_preset(
        "length_penalty", opt(None, "a hypothesis scores (sum of log p) / length^this", role="setting")
    )
    min_new_tokens: int | None = by_preset(
        "min_new_tokens", opt(None, "no end before so many tokens", within="[0, inf)", role="setting")
    )
    max_new_tokens: int | None = by_preset(
        "max_new_tokens", opt(None, "tokens of a summary at most", within="[1, inf)", role="setting")
    )
    no_repeat_ngram: int | None = by_preset(
        "no_repeat_ngram", opt(None, "no n-gram of this size twice; 0 is off", within="[0, inf)", role="setting")
    )
    early_stopping: bool | None = by_preset(
        "early_stopping", opt(None, "end a search at --beams finished hypotheses", role="setting")
    )
    generate_batch: int = opt(16, "articles that a rank summarises at a time", within="[1, inf)", role="where")
    rouge_words: str = opt("ascii", "words that ROUGE reads; papers: ascii", ROUGE_WORDS, role="setting")
    bertscore: str = opt("", "BERTScore with this model: a name bert-score knows, or FOLDER:LAYER", role="where")
    profile: int = opt(0, "time so many steps instead of training", within="[0, inf)", role="bookkeeping")
    # system
    device: str = flag("device")
    dtype: str = flag("dtype")
    kernels: str = flag("kernels")
    head_memory: int = flag("head_memory")
    compile: bool = opt(False, "torch.compile the layers, with dynamic shapes", role="system")
    checkpoint_activations: bool = flag("checkpoint_activations")
    wandb: str = flag("wandb")
    track: str = flag("track")


def complete(values: dict) -> dict:
    """Every None replaced by its preset's value for the data; label smoothing is the CE baseline's."""
    preset = preset_values(*(values[name] for name in ("preset", "data", "loss", "unigram")))
    return values | {name: value for name, value in preset.items() if values[name] is None}


def check(cfg: Config, world) -> None:
    """Raises ValueError, one line, for flags that do not go together, and where a package is missing."""
    world.check(cfg)
    optim.check_optimizer(cfg, world.device)
    summaries.swapped_references(cfg.batch, cfg.noise_references, cfg.seed, 0)
    if cfg.random_start != bool(cfg.size) or bool(cfg.size) == bool(cfg.model):
        raise ValueError("give --model FOLDER_OR_HUB_ID, or --size NAME with --random-start, and not both")
    if cfg.random_start and not cfg.tokenizer:
        raise ValueError("--random-start needs --tokenizer: gpt2, bpe:SIZE or a folder with a tokenizer's files")
    if cfg.unigram and cfg.label_smoothing:
        raise ValueError(f"--unigram {cfg.unigram} smooths already; leave out --label-smoothing {cfg.label_smoothing}")
    measure.check_packages(cfg.bertscore)  # found out now, not after the training


def make_model(cfg: Config, train: summaries.Summaries, dtype: torch.dtype, world):
    """The model and its SummaryTokenizer: those of --model, or random weights of --size around a tokenizer."""
    dropout, attention_dropout = cfg.dropout, cfg.attention_dropout
    if cfg.model:
        model = load_seq2seq(cfg.model, dtype, dropout, attention_dropout)
        with world.main_first():
            return model, summaries.tokenizer_of_model(cfg.tokenizer or cfg.model, model.config)
    bart = cfg.size.startswith("bart")
    with world.main_first():
        tokenizer = summaries.tokenizer_for_training(cfg.tokenizer, train, cfg.cache, bos=bart)
    config = SIZES[cfg.size](
        vocab_size=tokenizer.vocab_size,
        pad_token_id=tokenizer.pad_id,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        decoder_start_token_id=tokenizer.eos_id if bart else tokenizer.pad_id,
        dropout=dropout,
        attention_dropout=attention_dropout,
    )
    return Seq2Seq(config, dtype), tokenizer


def score_of(cfg: Config, alpha: torch.Tensor):
    """The training loss of a token, from its Moments."""
    plain = make_score(cfg.loss, alpha=alpha, **knobs(cfg))
    if not cfg.label_smoothing:
        return plain
    smoothed = smoothing(cfg.label_smoothing)
    return smoothed if cfg.loss == "ce" else lambda m: (1 - alpha) * smoothed(m) + alpha * brier(m)


def forwards(model: Seq2Seq, pairs, rows: int, world):
    """(hidden [N, D], targets [N]) of this rank's pairs, ``rows`` at a time, given the references before a token."""
    for batch in summaries.in_order(pairs, rows)[world.rank :: world.size]:
        collated = summaries.collate(pairs, batch, multiple=measure.multiple_of(world.device))
        yield measure.forward(model, *collated, world.device, model.shift_right)


# ----------------------------------------------------------------------------------------------
# the experiment


@command
def main(argv: list[str] | None = None) -> int:
    cfg = parse_config(Config, argv, __doc__, complete=complete)
    with user_errors():
        world = start_world(cfg.device)
        check(cfg, world)
        device, dtype = world.device, world.dtype(cfg.dtype)
        name = Path(cfg.model or cfg.size).name
        out = Path(cfg.out or f"runs/{Path(cfg.data).name}-{name}-{cfg.loss}-s{cfg.seed}")
        run = RunFolder(out, world)
        checkpoint, cfg = run.enter(cfg), run.aside(cfg)

        # -- data, and model: parameters in fp32, activations in dtype -------------------------
        texts = {"train": None} if cfg.denoise else summaries.load_texts(cfg)
        torch.manual_seed(cfg.seed)
        model, tokenizer = make_model(cfg, texts["train"], dtype, world)
        check_fit(cfg, model.config, cfg.model or cfg.size)
        options = measure.decoding(cfg, tokenizer)
        limits = dict(val=cfg.validation_examples, test=cfg.test_examples, ood=cfg.test_examples)
        with world.main_first():
            if cfg.denoise:
                train, sets, about = denoising.noised_sets(cfg, tokenizer, limits)
            else:
                encoding = tokenizer, cfg.cache, cfg.max_source, cfg.max_target
                train, sets, about = summaries.encode_sets(texts, *encoding, part=cfg.fold, limits=limits)
        counts = {name: -(-len(pairs) // (cfg.micro_batch * world.size)) for name, pairs in sets.items() if pairs}
        batches = summaries.Bucketed(train, cfg.batch, cfg.seed)
        if checkpoint and checkpoint["data_hash"] != train.hash:
            raise ValueError(f"--resume: {cfg.data} is not the text that {out} was trained on; restore it")
    shape = dataclasses.replace(model.config, dropout=0.0, attention_dropout=0.0)  # of the model, not its training
    parameters = parameter_count(model)
    lengths = train.source_lengths.astype(float), train.target_lengths.astype(float)
    flops_per_token = float(training_flops(shape, *lengths).sum() / sum(lengths).sum())
    model.to(device).checkpoint_activations = cfg.checkpoint_activations
    if cfg.compile:
        for layer in (*model.encoder.layers, *model.decoder.layers):
            layer.encode = torch.compile(layer.encode, dynamic=True)
            layer.decode = torch.compile(layer.decode, dynamic=True)
    trained = optim.on_ranks(model, world)
    torch.manual_seed(cfg.seed + 2**32 * (1 + world.rank))  # dropout differs between ranks

    # -- loss ----------------------------------------------------------------------------------
    alpha = torch.zeros((), device=device)  # filled each optimizer step; the score reads it on the device
    with user_errors():
        score = score_of(cfg, alpha)
    scoring = dict(tail=cfg.tail_smoothing, impl=cfg.kernels, memory=cfg.head_memory * 10**6 or None)
    unigram = UnigramSmoothing(cfg.unigram, cfg.unigram_gain, train.target_counts, device)

    # -- optimizer -----------------------------------------------------------------------------
    with user_errors():
        optimizer = optim.make_optimizer(decay_groups(model, cfg.weight_decay), cfg, model, device)
        rule = optim.rule_of(cfg, optimizer, world, power=cfg.lr_power)
    meter = Meter(run, Calibration(device), metrics, cfg, counted=("swapped_references", "step_tokens"))

    # -- state: everything that a resumed run needs ----------------------------------------------
    if checkpoint:
        optim.restore_training_state(model, optimizer, checkpoint)
        meter.load_state_dict(checkpoint, draws=cfg.dropout > 0)
        optim.restore_rule(rule, checkpoint["fot"], meter.step)
        unigram.share = checkpoint.get("unigram", unigram.share)

    def save(best: bool) -> None:
        """last.pt and, if these are the best weights so far, best.pt. All ranks take part; rank 0 writes."""
        weights, moments = optim.training_state(model, optimizer)
        state = {"model": weights, "model_config": asdict(shape), "config": asdict(cfg), "tokenizer": tokenizer.state()}
        state |= {"step": meter.step, "best": meter.best, "data_hash": train.hash}
        state["dtype"] = str(dtype).removeprefix("torch.")
        if best:
            run.save("best.pt", state)
        state |= meter.state_dict() | {"optimizer": moments, "fot": rule.state_dict(), "unigram": unigram.share}
        state["alpha"] = alpha_of(cfg, meter.step, unigram.share)
        run.save("last.pt", state)

    share = cfg.batch // world.size  # of a step's pairs, this rank's
    micro = next(m for m in range(min(cfg.micro_batch, share), 0, -1) if share % m == 0)

    def micro_batches(rank: int, mixed: bool = False) -> list[np.ndarray]:
        """Places of the global batch, which is sorted by length, that ``rank`` runs together: of like lengths, or
        ``mixed``, of every length and in two parts at least, where a part is measured against the whole."""
        mine, n = np.arange(cfg.batch)[rank :: world.size], max(2, share // micro)
        return [mine[i::n] for i in range(n)] if mixed else np.split(mine, share // micro)

    places = [part for rank in range(world.size) for part in micro_batches(rank)]
    padding = summaries.padding_share(train, (batches.indices(i)[p] for i in range(batches.per_epoch) for p in places))

    def validate() -> None:
        """Where one is due, a validation; where one is due, a checkpoint."""
        best = False
        if meter.at_eval:
            with averaged(optimizer):
                made = meter.watched(forwards(model, sets["val"], cfg.micro_batch, world), counts["val"])
                found = evaluate(model, made, world, impl=cfg.kernels)
            best = meter.judge(numbers := metrics.measure(found.raw))
            if not meter.owed:
                unigram.follow(numbers)
        if meter.saves(model, optimizer):
            save(best)
        meter.go_on()

    with user_errors():
        run.start(cfg, "finetune_seq2seq.py", checkpoint)
    if world.main:
        print("\n".join(split["label"] for split in about.values()))
        print(
            f"{out}: {name}, {parameters / 1e6:.1f} M parameters, loss {cfg.loss}, {dtype} on {world.size} x "
            f"{device.type}, {len(train):,} pairs, {cfg.batch} a step, padding {100 * padding:.1f} %"
        )
    trained.train()
    tokens, validated = (int(s.source_lengths.sum() + s.target_lengths.sum()) for s in (train, sets["val"]))
    plan = dict(name=name, tokens=tokens, step_tokens=tokens / len(train) * cfg.batch, validated=validated)
    plan |= dict(rows=micro, flops=flops_per_token)
    if meter.dry_run(cfg, model, partial(forwards, model, train), **plan):
        return run.finish(0)
    if cfg.profile:
        unigram.share = cfg.unigram  # the most that a driven one takes
        alpha.fill_(alpha_of(cfg, cfg.steps - 1, unigram.share))
        batch = summaries.collate(train, batches.indices(0)[places[0]], multiple=measure.multiple_of(device))
        cost = measure.profile(trained, model, score, batch, world, unigram=unigram, steps=cfg.profile, **scoring)
        if world.main:
            run.write("profile", cost)
            print("\n".join(f"{k:24} {v}" for k, v in cost.items()))
        return run.finish(0)

    # -- loop ----------------------------------------------------------------------------------
    meter.start(validate)
    while meter.running:
        step = meter.step
        pairs = train.at(batches.indices(step), step // batches.per_epoch)  # the global batch, a function of the step
        places = summaries.swapped_references(cfg.batch, cfg.noise_references, cfg.seed, step)
        count = int(pairs.target_lengths[places].sum())
        tokens = count + int(pairs.source_lengths.sum())
        alpha.fill_(alpha_of(cfg, step, unigram.share))
        lr = rule.lr

        # The loss is the sum over the global batch's target tokens divided by their number. DDP averages
        # gradients over ranks, hence the world size.
        denominator = torch.full((), count / world.size, device=device)
        measured = rule.splits and share > 1
        parts = micro_batches(world.rank, mixed=measured)
        for i, part in enumerate(parts):
            batch = summaries.collate(pairs, part, places[part], measure.multiple_of(device))
            last = i + 1 == len(parts)
            with optim.meeting(trained, last):
                hidden, y = measure.forward(trained, *batch, device, model.shift_right)
                predicted, how = (hidden, model.head_weight, y), dict(bias=model.head_bias, denominator=denominator)
                loss, moments = linear_score(*predicted, score, **how, **scoring)
                loss = loss + unigram.term(*predicted, **how)
                loss.backward()
            meter.add(loss, moments)
            tested = int(pairs.target_lengths[places[part]].sum()) / count if measured and i == 0 else None
            rule.observe(-moments.log_p.sum(), moments.valid.sum(), share=tested)
        norm = optim.take_step(optimizer, model.parameters(), cfg.clip, world.all_reduce(meter.loss))
        swapped = int((places != np.arange(cfg.batch)).sum())
        meter.end_step(norm, cfg.clip, tokens=tokens, swapped_references=swapped, step_tokens=tokens)
        if decision := rule.step():
            meter.log("fot", **decision)
        if not meter.due():
            continue

        if row := meter.row(str(rule), alpha=alpha.item(), **unigram.shown, lr=lr):
            meter.log("train", **row | {"step_tokens": row["step_tokens"] / row["steps"]})
        if meter.ending == "diverged":
            break
        validate()
    if (code := meter.end()) is not None:
        return run.finish(code)

    # -- evaluation: of the file that stays, on every rank ---------------------------------------
    world.wait()
    with user_errors():
        final, _, kept = measure.load_finetuned(out, f"{cfg.report}.pt", device)
    made = {
        name: (lambda pairs=pairs: forwards(final, pairs, cfg.micro_batch, world)) if pairs else None
        for name, pairs in sets.items()
    }
    how = dict(pieces=run.pieces(f"{cfg.report} {kept['step']}"), counts=counts, impl=cfg.kernels, text=train.data)
    entries, bins = final_metrics(final, made, world, **how)
    written = {}  # of weights that yield inf or nan there is nothing to read
    if entries["temperature"]:
        written = measure.summarise(final, sets, options, out, world, key=kept["step"], batch=cfg.generate_batch)
    if not world.main:
        return run.finish(0)
    for split, (rows, speed) in written.items():
        with user_errors():  # the summaries are on the disk; --resume takes another --bertscore
            how = dict(bertscore=cfg.bertscore, device=device.type, words=cfg.rouge_words)
            how["path"] = out / f"predictions-{split}.jsonl"
            found = measure.generation_metrics(rows, speed, **how)
        entries |= {f"{split}_{k}": v for k, v in found.items()}
    summary = {
        "script": "finetune_seq2seq.py",
        "loss": cfg.loss,
        "label_smoothing": cfg.label_smoothing,
        "alpha_schedule": cfg.alpha_schedule if cfg.loss == "dpsm" else None,
        "preset": cfg.preset,
        "seed": cfg.seed,
        "parameters": parameters,
        "reported": cfg.report,
        "reported_step": kept["step"],
        "data": about,
        "partial": any(a["partial"] for a in about.values()),
        "fold": cfg.fold or None,
        "examples_limit": {name: n for name, n in limits.items() if n and sets[name] is not None},
        **entries,
        **meter.summary(flops_per_token, dtype),
        "swapped_references": sum(r["swapped_references"] for r in run.rows("train")),
        "padding": padding,
        **{f"{cfg.schedule}_{k}": v for k, v in rule.counts.items()},
    }
    run.summarise(summary, calibration=bins)
    print("\n".join(measure.describe(out.as_posix(), summary)))
    print(f"compare runs with: python -m eval.report {out} ... --out DIR")
    return run.finish(0)


if __name__ == "__main__":
    sys.exit(main())
