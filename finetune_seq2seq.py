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
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import runlog
from data.summaries import (
    SETS,
    Bucketed,
    SummaryTokenizer,
    TokenPairs,
    collate,
    encode_pairs,
    fold,
    in_order,
    load_summaries,
    padding_share,
    swapped_references,
    tokenizer_for_training,
    tokenizer_of_model,
)
from eval.calibration import Calibration, fit_temperature, temperature_sums
from eval.summaries import bert_model, bert_score, rouge_scores, summary_metrics, write_predictions
from kernels import linear_moments, linear_score
from losses import ALPHA_SCHEDULES, LOSSES, alpha_at, brier, make_score, smoothing
from model.beam import Decoding
from model.gpt2 import decay_groups, parameter_count
from model.seq2seq import SIZES as PUBLISHED
from model.seq2seq import Seq2Seq, Seq2SeqConfig, bart_config, pegasus_config
from model.seq2seq_hub import load_seq2seq
from runlog import opt
from schedules import SCHEDULES, lr_factor

SIZES = PUBLISHED | {  # for tests and runs on a CPU
    "bart-tiny": lambda **changes: bart_config(2, 128, 4, **changes),
    "pegasus-tiny": lambda **changes: pegasus_config(2, 128, 4, **changes),
}

# fmt: off
# ----------------------------------------------------------------------------------------------
# config

# bart: fairseq's fine-tuning recipe for CNN/DailyMail (examples/bart/README.summarization.md; 65,536 tokens a step,
# some 80 pairs), decoding as transformers' configuration of bart-large-cnn. Lengths count <s> and </s>.
# pegasus: after the paper's appendix C; its numbers, XSUM below and BART's decoding are from memory and have still to
# be checked against their sources. The paper used Adafactor and Google's length penalty, ((5 + n) / 6)^0.8; here
# every preset has AdamW, this one without weight decay, and n^0.8.
# none: plain values for small models from a random start.
PRESETS = {
    "bart": dict(
        steps=20000, batch=80, lr=3e-5, schedule="polynomial", lr_warmup=0.025, weight_decay=0.01, beta2=0.999,
        clip=0.1, dropout=0.1, attention_dropout=0.1, label_smoothing=0.1, max_source=1024, max_target=128,
        beams=4, length_penalty=2.0, min_new_tokens=55, max_new_tokens=141, no_repeat_ngram=3, early_stopping=True,
    ),
    "pegasus": dict(
        steps=210000, batch=256, lr=5e-5, schedule="constant", lr_warmup=0.0, weight_decay=0.0, beta2=0.999,
        clip=0.0, dropout=0.1, attention_dropout=0.1, label_smoothing=0.1, max_source=1024, max_target=128,
        beams=8, length_penalty=0.8, min_new_tokens=0, max_new_tokens=127, no_repeat_ngram=0, early_stopping=False,
    ),
    "none": dict(
        steps=1000, batch=32, lr=1e-3, schedule="linear", lr_warmup=0.05, weight_decay=0.01, beta2=0.98,
        clip=1.0, dropout=0.0, attention_dropout=0.0, label_smoothing=0.0, max_source=1024, max_target=128,
        beams=4, length_penalty=1.0, min_new_tokens=0, max_new_tokens=127, no_repeat_ngram=3, early_stopping=True,
    ),
}
# Where the published recipe for XSum is another one.
XSUM = {
    "bart": dict(steps=15000, beams=6, length_penalty=1.0, min_new_tokens=10, max_new_tokens=61),
    "pegasus": dict(steps=130000, lr=1e-4, max_source=512, max_target=64, max_new_tokens=63),
    "none": {},
}
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
    schedule: str | None = opt(None, "learning-rate schedule (or --lr-schedule)", (*SCHEDULES, "polynomial"))
    lr_power: float = opt(1.0, "polynomial: exponent of the decay")
    lr_warmup: float | None = opt(None, "learning-rate warm-up, as a fraction of the steps")
    lr_floor: float = opt(0.0, "learning rate at the end, as a fraction of the peak")
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
FREE = ("out", "resume", "resume_from", "cache", "wandb", "micro_batch", "generate_batch", "device", "kernels",
        "compile", "checkpoint_activations", "bertscore")


def with_preset(cfg: Config) -> Config:
    """``cfg`` with every None replaced by its preset's value for the data; label smoothing is the CE baseline's."""
    values = PRESETS[cfg.preset] | (XSUM[cfg.preset] if Path(cfg.data).name == "xsum" else {})
    if cfg.loss != "ce":
        values = values | {"label_smoothing": 0.0}
    return dataclasses.replace(cfg, **{k: v for k, v in values.items() if getattr(cfg, k) is None})


def check(cfg: Config, world: runlog.World) -> None:
    """Raises ValueError, one line, for settings that cannot be meant."""
    for name in ("warmup", "alpha_max", "alpha_start", "noise_references", "lr_warmup", "lr_floor", "label_smoothing",
                 "tail_smoothing"):
        if not 0 <= getattr(cfg, name) <= 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(cfg, name)} is outside [0, 1]")
    for name in ("steps", "batch", "micro_batch", "eval_every", "log_every", "generate_batch"):
        if getattr(cfg, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(cfg, name)} must be at least 1")
    for name in ("seed", "lr", "lr_power", "weight_decay", "clip", "gamma", "patience", "min_words", "profile",
                 "validation_examples", "test_examples"):
        if not 0 <= getattr(cfg, name) < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(cfg, name)} must be finite and not negative")
    for name in ("dropout", "attention_dropout", "beta1", "beta2"):
        if not 0 <= getattr(cfg, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(cfg, name)} is outside [0, 1)")
    for name in ("max_source", "max_target"):
        if getattr(cfg, name) < 3:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(cfg, name)} leaves no room for text; at least 3")
    if cfg.batch % world.size:
        raise ValueError(f"--batch {cfg.batch} is not divisible by the {world.size} ranks; change one of them")
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


def decoding(cfg: Config, tokenizer: SummaryTokenizer) -> Decoding:
    """The search of the final evaluation. EOS is not forced at the limit: the share of beams that end is measured."""
    return Decoding(
        cfg.max_new_tokens, cfg.min_new_tokens, cfg.beams, cfg.length_penalty, cfg.no_repeat_ngram,
        cfg.early_stopping, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id, forced_bos_id=tokenizer.bos_id,
    )


def lr_at(cfg: Config, step: int) -> float:
    """The learning rate before ``step``; polynomial is linear raised to --lr-power after the warm-up (fairseq)."""
    if cfg.schedule != "polynomial":
        return cfg.lr * lr_factor(cfg.schedule, step, cfg.steps, warmup=cfg.lr_warmup, floor=cfg.lr_floor)
    factor = lr_factor("linear", step, cfg.steps, warmup=cfg.lr_warmup)
    if step >= cfg.lr_warmup * cfg.steps:
        factor = cfg.lr_floor + (1 - cfg.lr_floor) * factor**cfg.lr_power
    return cfg.lr * factor


# ----------------------------------------------------------------------------------------------
# model, loss and cost


def random_model(cfg: Config, tokenizer: SummaryTokenizer, dtype: torch.dtype) -> Seq2Seq:
    """Random weights of --size around the vocabulary of ``tokenizer``."""
    start = tokenizer.eos_id if cfg.size.startswith("bart") else tokenizer.pad_id
    ids = dict(pad_token_id=tokenizer.pad_id, eos_token_id=tokenizer.eos_id, decoder_start_token_id=start,
               bos_token_id=tokenizer.bos_id, vocab_size=tokenizer.vocab_size)
    rates = dict(dropout=cfg.dropout, attention_dropout=cfg.attention_dropout)
    return Seq2Seq(SIZES[cfg.size](**ids, **rates), dtype)


def check_fit(model: Seq2Seq, cfg: Config) -> None:
    """Raises ValueError for a model that the preset or the limits cannot be used with."""
    what, kind, longest = cfg.model or cfg.size, model.config.kind, model.config.max_position_embeddings
    if cfg.preset not in (kind, "none"):
        raise ValueError(f"{what} is a {kind}: --preset {cfg.preset} is not its recipe; use {kind} or none")
    for name in ("max_source", "max_target", "max_new_tokens"):
        if getattr(cfg, name) > longest:
            flag = f"--{name.replace('_', '-')} {getattr(cfg, name)}"
            raise ValueError(f"{flag} is more than the {longest} positions of {what}; lower it")


def score_of(cfg: Config, alpha: Tensor) -> Callable:
    """The training loss of a token, from its Moments."""
    if not cfg.label_smoothing:
        return make_score(cfg.loss, alpha=alpha, gamma=cfg.gamma, tail=cfg.tail_smoothing)
    smoothed = smoothing(cfg.label_smoothing)
    return smoothed if cfg.loss == "ce" else lambda m: (1 - alpha) * smoothed(m) + alpha * brier(m)


def training_flops(config: Seq2SeqConfig, S, T):
    """FLOPs of one training step on a pair of ``S`` source and ``T`` target tokens (numbers or arrays).

    A multiply-add is 2, forward once and backward twice; the decoder's attention is not discounted for its causal
    half, an embedding look-up multiplies nothing, and recomputation does not count, as in PaLM's appendix B.
    """
    D, E, G = config.d_model, config.encoder_ffn_dim, config.decoder_ffn_dim
    encoder = config.encoder_layers * (S * (4 * D * D + 2 * D * E) + 2 * S * S * D)
    decoder = config.decoder_layers * (T * (6 * D * D + 2 * D * G) + S * 2 * D * D + 2 * T * (T + S) * D)
    return 6 * (encoder + decoder + T * D * config.vocab_size)


def load_finetuned(run_folder: str | Path, checkpoint: str = "best.pt", device: str | torch.device = "cpu"):
    """The model of a run, in eval mode and without dropout, its SummaryTokenizer, and its config as a dict.

    Raises ValueError, one line, for a folder without a whole checkpoint of that name.
    """
    kept = runlog.load_checkpoint(Path(run_folder) / checkpoint)
    dtype = getattr(torch, kept["dtype"])
    model = Seq2Seq(Seq2SeqConfig(**kept["model_config"]), dtype)
    model.load_state_dict(kept["model"])
    return model.to(device).eval(), SummaryTokenizer.from_state(kept["tokenizer"]), kept["config"]


# ----------------------------------------------------------------------------------------------
# evaluation: token-level on the references, then of generated summaries; both split over the ranks


def multiple_of(device: torch.device) -> int:
    return 8 if device.type == "cuda" else 1  # what tensor cores like


def forward(model, source: Tensor, mask: Tensor | None, labels: Tensor, device: torch.device, shift: Callable):
    """Hidden states [N, D] and labels [N] of a collated batch, N = batch x target length, on ``device``."""
    source, labels = runlog.to_device(source, device), runlog.to_device(labels, device)
    mask = mask if mask is None else runlog.to_device(mask, device)
    return model(source, mask, shift(labels)).flatten(0, 1), labels.flatten()


@torch.no_grad()
def evaluate(model: Seq2Seq, pairs: TokenPairs, cfg: Config, world: runlog.World, scale: float | None = None,
             keep: list | None = None) -> tuple[Calibration, Calibration | None]:
    """Calibration of ``model`` on every token of the references of ``pairs``, given those before it; with ``scale`` =
    1/temperature a second one of the scaled logits. ``keep`` collects (hidden [N, D], targets [N]) of this rank."""
    was_training = model.training
    model.eval()
    raw, scaled = Calibration(world.device), Calibration(world.device) if scale else None
    for rows in in_order(pairs, cfg.micro_batch)[world.rank :: world.size]:
        batch = collate(pairs, rows, multiple=multiple_of(world.device))
        hidden, y = forward(model, *batch, world.device, model.shift_right)
        head = dict(weight=model.head_weight, targets=y, bias=model.head_bias, impl=cfg.kernels)
        raw.update(linear_moments(hidden, **head))
        if scaled is not None:
            scaled.update(linear_moments(hidden, **head, scale=scale))
        if keep is not None:
            keep.append((hidden[y != -100], y[y != -100]))
    model.train(was_training)
    if world.size > 1:
        for c in (raw, scaled):
            c is None or c.all_reduce()
    return raw, scaled


def numbers(c: Calibration) -> dict[str, float]:
    m = c.compute()
    m["eval_tokens"] = m.pop("tokens")
    return m


def final_metrics(model: Seq2Seq, sets: dict[str, TokenPairs | None], cfg: Config, world: runlog.World):
    """Temperature on validation, then every set before and after it: (summary entries, reliability bins)."""
    head, bias, kept = model.head_weight, model.head_bias, []
    finite = math.isfinite(evaluate(model, sets["val"], cfg, world, keep=kept)[0].compute()["nll"])

    def sums(beta: float) -> Tensor:
        parts = [temperature_sums(F.linear(h, head.to(h.dtype), bias if bias is None else bias.to(h.dtype)), y, beta)
                 for hs, ys in kept for h, y in zip(hs.split(1024), ys.split(1024), strict=True)]
        none = torch.zeros(1, 4, dtype=torch.float64, device=world.device)  # of a rank without a batch
        return world.all_reduce(torch.cat([none, *(p[None] for p in parts)]).sum(0))

    with torch.no_grad():
        fit = fit_temperature(sums) if finite else None  # weights that yield inf or nan have no temperature
    kept.clear()
    entries, bins = {"temperature": fit and fit.temperature, "temperature_at_bound": fit and fit.at_bound}, {}
    keys = ("nll", "ppl", "ece10", "ece100", "ece10_mass", "brier", "spherical", "accuracy", "entropy")
    for name, pairs in sets.items():
        if pairs is None:
            entries |= {f"{name}_{k}{suffix}": None for k in keys for suffix in ("", "_t")}
            continue
        raw, scaled = evaluate(model, pairs, cfg, world, scale=fit and 1 / fit.temperature)
        bins[name] = {"raw": raw.bins(300), "scaled": scaled and scaled.bins(300)}
        before, after = numbers(raw), numbers(scaled) if scaled else {}
        entries |= {f"{name}_{k}": before[k] for k in keys} | {f"{name}_{k}_t": after.get(k) for k in keys}
        entries[f"{name}_tokens"] = before["eval_tokens"]
    return entries, bins


# ----------------------------------------------------------------------------------------------
# the experiment


def main(argv: list[str] | None = None) -> int:
    argv = [a.replace("--lr-schedule", "--schedule", 1) for a in (sys.argv[1:] if argv is None else argv)]
    cfg = with_preset(runlog.parse_config(Config, argv, __doc__))
    with runlog.user_errors():
        world = runlog.start_world(cfg.device)
        check(cfg, world)
        device = world.device
        named = Path(cfg.model or cfg.size).name
        out = Path(cfg.out or f"runs/{Path(cfg.data).name}-{named}-{cfg.loss}-s{cfg.seed}")
        run = runlog.RunFolder(out, world)
        run.check(asdict(cfg), cfg.resume, FREE)
        checkpoint = None
        if cfg.resume:
            path = Path(cfg.resume_from or run / "last.pt")
            checkpoint = runlog.load_checkpoint(path)
            if "optimizer" not in checkpoint:
                raise ValueError(f"{path} holds weights only; resume from last.pt or previous.pt")
            runlog.same_config(path, checkpoint["config"], asdict(cfg), FREE)

        # -- data ------------------------------------------------------------------------------
        texts = load_summaries(cfg.data, ("train",) if cfg.fold else ("train", "validation", "test"),
                               min_words=cfg.min_words)
        if texts["train"] is None or not (cfg.fold or texts["validation"]):
            lacks = "training" if texts["train"] is None else "validation"
            raise ValueError(f"{cfg.data} has no {lacks} split; add its file, or validate on a part with --fold 1/5")
        texts["ood"] = None
        if cfg.eval_data:
            texts["ood"] = load_summaries(cfg.eval_data, ("test",), min_words=cfg.min_words)["test"]

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
        check_fit(model, cfg)
        options = decoding(cfg, tokenizer)
        with world.main_first():
            tokens = {name: part and encode_pairs(part, tokenizer, cfg.cache, cfg.max_source, cfg.max_target)
                      for name, part in texts.items()}
        train, sets = tokens["train"], {"val": tokens.get("validation"), "test": tokens.get("test")}
        if cfg.fold:
            kept, held = fold(len(train), cfg.fold)
            train, sets["val"] = train.take(kept), train.take(held)
        sets["ood"] = tokens["ood"]
        for name, limit in (("val", cfg.validation_examples), ("test", cfg.test_examples), ("ood", cfg.test_examples)):
            if sets[name] is not None and 0 < limit < len(sets[name]):
                sets[name] = sets[name].take(np.arange(limit))
        batches = Bucketed(train, cfg.batch, cfg.seed)
        if checkpoint and checkpoint["data_hash"] != train.hash:
            raise ValueError(f"--resume: {cfg.data} is not the text that {out} was trained on; restore it")

    share = cfg.batch // world.size
    micro = next(m for m in range(min(cfg.micro_batch, share), 0, -1) if share % m == 0)

    def micro_batches(rows: np.ndarray, rank: int) -> list[np.ndarray]:
        """Places of the global batch, which is sorted by length, that ``rank`` runs together."""
        return [rows[rank :: world.size][i : i + micro] for i in range(0, share, micro)]

    padding = padding_share(train, (part for step in range(batches.per_epoch) for rank in range(world.size)
                                    for part in micro_batches(batches.indices(step), rank)))
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
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), fused=True)

    # -- state: everything that a resumed run needs ----------------------------------------------
    step, tokens_seen, train_seconds, joules = 0, 0, 0.0, 0.0
    best, stale = {"step": None, "nll": math.inf}, 0
    window = Calibration(device)  # calibration of the tokens trained on since the last log line
    sums = torch.zeros(6, dtype=torch.float64, device=device)  # likewise: steps, loss, norm, clipped, swapped, tokens
    watch = runlog.DivergenceWatch(device)
    if checkpoint:
        runlog.restore_training_state(model, optimizer, checkpoint)
        step, tokens_seen = checkpoint["step"], checkpoint["tokens_seen"]
        train_seconds, joules = checkpoint["train_seconds"], checkpoint["joules"]
        best, stale = checkpoint["best"], checkpoint["stale"]
        sums.copy_(checkpoint["sums"])
        watch.state.copy_(checkpoint["watch"])
        if world.main:  # a sum over ranks goes on at one of them
            window.load_state_dict(checkpoint["window"])
        if not runlog.set_rng_states(checkpoint["rng"], world) and cfg.dropout and world.main:
            print(f"resuming {len(checkpoint['rng'])} ranks on {world.size}: dropout masks will differ from here on")
    run.start(asdict(cfg) | {"script": "finetune_seq2seq.py"},
              [Path(__file__), Path(__file__).with_name("losses.py")], step if checkpoint else None)
    if checkpoint:
        run.log("event", step, event="resumed", world_size=world.size)
    energy = runlog.EnergyMeter(device)
    about = {}
    for name, part in texts.items():
        if part is None:
            continue
        pairs = tokens[name]
        about[name] = {"set": part.name, "origin": part.origin, "pairs": len(part.pairs), "partial": part.partial,
                       "removed": part.removed, "truncated": pairs.truncated}
        if world.main:
            cut = ", ".join(f"{n:,} {what}" for what, n in pairs.truncated.items())
            print(f"{part.label}; cut to {cfg.max_source} and {cfg.max_target} tokens: {cut}")
    if world.main:
        print(f"{out}: {named}, {parameters / 1e6:.1f} M parameters, loss {cfg.loss}, {dtype} on {world.size} x "
              f"{device.type}, {len(train):,} pairs, {cfg.batch} a step, padding {100 * padding:.1f} %")

    if cfg.profile:
        trained.train()
        alpha.fill_(alpha_of(cfg.steps - 1))
        batch = collate(train, micro_batches(batches.indices(0), world.rank)[0], multiple=multiple_of(device))
        cost = profile(trained, model, score, batch, cfg, world, energy)
        if world.main:
            peak = runlog.peak_flops(device, dtype)
            cost["mfu"] = cost["flops_per_second"] / peak if peak else None
            runlog.write_json(run / "profile.json", cost)
            print("\n".join(f"{k:24} {v}" for k, v in cost.items()))
        return runlog.finish(run, None, 0)

    stop = runlog.StopRequest()
    wandb_run = runlog.start_wandb(cfg.wandb, out, asdict(cfg)) if cfg.wandb and world.main else None

    def save(is_best: bool) -> None:
        """last.pt and, if these are the best weights so far, best.pt. All ranks take part; rank 0 writes."""
        weights, moments_of_adam = runlog.training_state(model, optimizer)
        state = {"model": weights, "model_config": asdict(shape), "config": asdict(cfg), "step": step, "best": best,
                 "data_hash": train.hash, "tokenizer": tokenizer.state(),
                 "dtype": str(dtype).removeprefix("torch.")}
        if is_best:
            run.save("best.pt", state)
        total = Calibration(device)
        total.load_state_dict(window.state_dict())
        total.all_reduce()
        run.save("last.pt", state | {
            "optimizer": moments_of_adam, "alpha": alpha_of(step), "tokens_seen": tokens_seen, "stale": stale,
            "train_seconds": train_seconds, "joules": joules, "sums": sums.cpu(), "watch": watch.state.cpu(),
            "window": total.state_dict(), "rng": runlog.rng_states(world)})

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
        lr = lr_at(cfg, step)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # The loss is the sum over the global batch's target tokens divided by their number. DDP averages
        # gradients over ranks, hence the world size.
        denominator = torch.full((), count / world.size, device=device)
        loss = torch.zeros((), device=device)
        parts = micro_batches(np.arange(cfg.batch), world.rank)
        for i, part in enumerate(parts):
            batch = collate(train, rows[part], targets[part], multiple_of(device))
            last = i + 1 == len(parts)
            with contextlib.nullcontext() if last or world.size == 1 else trained.no_sync():
                hidden, y = forward(trained, *batch, device, model.shift_right)
                piece, moments = linear_score(hidden, model.head_weight, y, score, bias=model.head_bias,
                                              denominator=denominator, tail=cfg.tail_smoothing, impl=cfg.kernels)
                piece.backward()
            loss += piece.detach() / world.size
            window.update(moments)
        world.all_reduce(loss)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip or math.inf)
        finite = torch.isfinite(norm) & torch.isfinite(loss)
        optimizer.found_inf = (~finite).float()  # fused AdamW leaves everything as it is where this is 1
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        watch.update(loss, finite)
        clipped = (norm > (cfg.clip or math.inf)).float()
        new = [torch.ones_like(loss), loss, norm, clipped, torch.full_like(loss, swapped), torch.full_like(loss, seen)]
        sums += torch.where(finite, torch.stack(new), 0.0)
        tokens_seen += seen
        step += 1
        bar.update()

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
                bar.set_postfix_str(f"loss {mean_loss:.3f} ppl {m['ppl']:.1f} ece {m['ece10']:.3f} "
                                    f"a {used_alpha:.2f} lr {lr:.1e} {rate:,.0f} tok/s")
            window.reset()
            sums.zero_()
        if health["worst_streak"] >= 3:
            ending = "diverged"
            break
        if at_eval:
            m = numbers(evaluate(model, sets["val"], cfg, world)[0])
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
    if ending:
        run.log("event", step, event=ending, signal=stop.signal)
    if ending == "diverged":
        if world.main:
            good = next((p for p in (run / "last.pt", run / "best.pt") if p.exists()), None)
            advice = f"Last good checkpoint: {good}" if good else "No checkpoint had been written; lower --lr"
            print(f"{out}: the loss was not finite in three steps running; stopped at step {step}. {advice}",
                  file=sys.stderr)
        return runlog.finish(run, wandb_run, 1)
    if ending == "stopped":
        if world.main:
            print(f"{stop.signal}: saved {run / 'last.pt'} at step {step}; the same command with --resume goes on")
        return runlog.finish(run, wandb_run, 0)

    # -- final evaluation: of the file that stays, on every rank -----------------------------------
    memory = runlog.peak_memory(device)
    if world.size > 1:
        torch.distributed.barrier()
    if cfg.report == "best" and best["step"] is None:
        if world.main:
            print(f"{out}: no validation had a finite NLL, so there are no best weights; lower --lr", file=sys.stderr)
        return runlog.finish(run, wandb_run, 1)
    kept = runlog.load_checkpoint(run / f"{cfg.report}.pt")
    final, _, _ = load_finetuned(out, f"{cfg.report}.pt", device)
    entries, bins = final_metrics(final, sets, cfg, world)
    # What is summarised: the test sets; without one, and to select on a fold, the validation set.
    todo = [name for name in ("test", "ood") if sets[name] is not None] if entries["temperature"] else []
    if entries["temperature"] and sets["test"] is None:
        todo = ["val", *todo]
    written, speeds = {}, {}
    for name in todo:
        path = run / f"predictions-{name}.jsonl"
        written[name], speeds[name] = write_predictions(final, sets[name], options, path, world, key=kept["step"],
                                                        batch=cfg.generate_batch, multiple=multiple_of(device))
    if not world.main:
        return runlog.finish(run, wandb_run, 0)
    for name, rows in written.items():
        predictions, references = ([r[k] for r in rows] for k in ("prediction", "reference"))
        measured = summary_metrics(predictions, references)
        measured |= {"ended": statistics.fmean(r["ended"] for r in rows), "generate_tokens_per_second": speeds[name],
                     "summary_tokens": statistics.fmean(r["tokens"] for r in rows)}
        if cfg.bertscore:
            with runlog.user_errors():  # the summaries are on the disk; --resume takes another --bertscore
                measured |= bert_score(predictions, references, cfg.bertscore, device=device.type)
        entries |= {f"{name}_{k}": v for k, v in measured.items()}
    rows = runlog.read_metrics(run / "metrics.jsonl", "train")
    total = sum(r["steps"] for r in rows)
    # The first window pays for cold caches.
    later = rows[1:] or rows
    milliseconds = [1000 * r["step_tokens"] / r["tokens_per_second"] for r in later]
    median = statistics.median(milliseconds) if milliseconds else None
    rate = statistics.median(r["tokens_per_second"] for r in later) if later else None
    peak = runlog.peak_flops(device, dtype)
    cut = {"val": cfg.validation_examples, "test": cfg.test_examples, "ood": cfg.test_examples}
    summary = {
        "script": "finetune_seq2seq.py", "loss": cfg.loss, "label_smoothing": cfg.label_smoothing,
        "alpha_schedule": cfg.alpha_schedule if cfg.loss == "dpsm" else None, "preset": cfg.preset,
        "steps": step, "seed": cfg.seed, "parameters": parameters, "tokens_seen": tokens_seen, "reported": cfg.report,
        "reported_step": kept["step"], "best_step": best["step"], "best_val_nll": best["nll"], "stopped_early": ending,
        "data": about, "partial": any(a["partial"] for a in about.values()), "fold": cfg.fold or None,
        "examples_limit": {name: n for name, n in cut.items() if n and sets[name] is not None},
        **entries,
        "padding": padding, "swapped_references": sum(r["swapped_references"] for r in rows),
        "tokens_per_second": rate, "ms_per_step_median": median, "train_seconds": train_seconds,
        "peak_memory_bytes": memory,
        "peak_memory_of": "CUDA allocations" if device.type == "cuda" else "process resident set",
        "flops_per_token": flops_per_token,
        "mfu": rate * flops_per_token / (peak * world.size) if peak and rate else None,
        "energy_joules": joules if meter is not None else None,
        "divergences": int(watch.read()["divergences"]), "skipped_steps": int(watch.read()["skipped"]),
        "clip_rate": sum(r["clip_rate"] * r["steps"] for r in rows) / total if total else None,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU", "world_size": world.size,
        "dtype": str(dtype).removeprefix("torch."),
    }
    runlog.write_json(run / "calibration.json", bins)
    runlog.write_json(run / "summary.json", summary)
    if wandb_run:
        wandb_run.summary.update(summary)
    e = entries
    after = "; at temperature {temperature:.3f} nll {val_nll_t:.4f}, ece {val_ece10_t:.4f}" if e["temperature"] else ""
    print(f"{out}: validation ppl {e['val_ppl']:.3f}, nll {e['val_nll']:.4f}, ece {e['val_ece10']:.4f}, brier "
          f"{e['val_brier']:.4f}{after.format(**e)}; {rate or 0:,.0f} tokens/s")
    for name in written:
        of = about[{"val": "train" if cfg.fold else "validation"}.get(name, name)]
        notes = [f"part {cfg.fold}" if name == "val" and cfg.fold else "", of["partial"]]
        notes += [f"the first {cut[name]}" if 0 < cut[name] == len(sets[name]) else ""]
        notes = "; ".join(note for note in notes if note)
        scores = ", ".join(f"{k} {e[f'{name}_{k}']:.2f}" for k in ("rouge1", "rouge2", "rougeL", "rougeLsum"))
        print(f"{of['set']} {name}{f' ({notes})' if notes else ''}, {e[f'{name}_examples']} summaries: {scores}, "
              f"{100 * e[f'{name}_ended']:.0f} % ended, {speeds[name] or 0:,.0f} tokens/s")
    print(f"compare runs with: python -m eval.report {out} ... --out DIR")
    return runlog.finish(run, wandb_run, 0)


def profile(trained, model: Seq2Seq, score: Callable, batch: tuple, cfg: Config, world: runlog.World, energy) -> dict:
    """The cost of forward and backward of one fixed micro-batch, over --profile steps after three that warm up.

    GPU utilisation and joules come from NVML and are None where there is none. Gradients accumulate and are dropped.
    """
    device, seconds, busy = world.device, [], []
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for step in range(cfg.profile + 3):
        if step == 3:
            start = energy.read()
        wait()
        clock = time.perf_counter()
        hidden, y = forward(trained, *batch, device, model.shift_right)
        loss, _ = linear_score(hidden, model.head_weight, y, score, bias=model.head_bias, tail=cfg.tail_smoothing,
                               impl=cfg.kernels)
        loss.backward()
        wait()
        if step >= 3:
            seconds.append(time.perf_counter() - clock)
            if energy.read() is not None:
                busy.append(torch.cuda.utilization(device))
        model.zero_grad(set_to_none=True)
    joules = None if start is None else (energy.read() - start) / cfg.profile
    source, mask, labels = batch
    tokens = int(source.numel() if mask is None else mask.sum()) + int((labels != -100).sum())
    flops = float(len(source) * training_flops(model.config, source.shape[1], labels.shape[1]))
    median = statistics.median(seconds)
    return {
        "pairs": len(source), "source_tokens": source.shape[1], "target_tokens": labels.shape[1],
        "tokens": tokens, "ms_forward_backward": 1000 * median, "tokens_per_second": tokens / median,
        "peak_memory_bytes": runlog.peak_memory(device), "gpu_utilisation": statistics.fmean(busy) if busy else None,
        "joules_per_step": joules, "flops": flops, "flops_per_second": flops / median,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
    }


if __name__ == "__main__":
    sys.exit(main())
