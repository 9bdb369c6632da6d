"""Experiment 3: Qwen3 with LoRA over a quantised base on GSM8K, from the problems to pass@1 by words or by programs.

    python finetune_gsm8k.py --model Qwen/Qwen3-0.6B --schedule cosine --steps 2000                  # one GPU
    python finetune_gsm8k.py --model Qwen/Qwen3-0.6B --format code --loss dpsm --warmup 0.1
    torchrun --nproc_per_node 8 finetune_gsm8k.py --model Qwen/Qwen3-8B --checkpoint-activations
    python finetune_gsm8k.py --model FOLDER --base bf16 --samples 8 --k 1,8                          # pass@8 as well
    python finetune_gsm8k.py --out runs/NAME ... --resume                                            # go on exactly

Top to bottom: config, data, model, loss, optimizer, loop, evaluation. Everything a run leaves behind is in its
folder; `python -m eval.gsm8k runs/A/outputs.jsonl runs/B/outputs.jsonl` compares two runs' answers.
"""

import contextlib
import hashlib
import json
import math
import re
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from data.gsm8k import FORMATS, load_gsm8k, split_heldout
from data.packing import batch_indices, pack
from data.prompts import PROMPTS, Prompter, make_examples, make_targets
from eval.answers import examine, forget, heldout_metrics
from eval.calibration import Calibration
from kernels import linear_score
from kernels.losses import ALPHA_SCHEDULES, LOSSES, alpha_at, make_score
from model.decode import Request, cache_length
from model.lora import (
    BASES,
    TARGETS,
    LoRAConfig,
    adapter_tensors,
    add_lora,
    block_parameters,
    flops_per_token,
    load_adapter,
    load_base,
    merged,
    save_adapter,
    segment_rms,
    set_segments,
)
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
from schedules.fot import FoT, parse_parts
from schedules.rules import ADAPTIVE, RULES, averaged, lr_factor, schedule_free_adamw
from schedules.rules import FREE as SCHEDULE_FREE

# ----------------------------------------------------------------------------------------------
# config


@dataclass(frozen=True)
class Config:
    out: str = opt("", "run folder; default runs/gsm8k-MODEL-FORMAT-LOSS-sSEED")
    resume: bool = opt(False, "go on with the run in --out, exactly where its last checkpoint stands")
    resume_from: str = opt("", "with --resume: this checkpoint instead of OUT/last.pt")
    seed: int = opt(1, "seeds the adapter, the data order, dropout and the sampled answers")
    # data
    data: str = opt("gsm8k", "gsm8k ($LM_DATA/gsm8k, else the hub's), or a folder of train.jsonl and test.jsonl")
    format: str = opt("text", "train on the solutions' words, or on programs made of them", FORMATS)
    calculator: bool = opt(True, "text: keep the <<48/2=24>> annotations, and work them out while decoding")
    prompt: str = opt("chat", "Qwen3's chat turns, or plain 'Question: ... Answer:'", PROMPTS)
    loss_on: str = opt("answer", "which tokens the loss is of", ("answer", "all"))
    heldout: int = opt(256, "problems of train that are held out for validation")
    seq_len: int = opt(512, "tokens in a packed row; a problem that is longer is left out and counted")
    cache: str = opt("cache", "folder for the programs of --format code")
    # model
    model: str = opt("Qwen/Qwen3-0.6B", "a dense Qwen3: a folder or a hub id")
    base: str = opt("nf4", "how the frozen weights are kept", BASES)
    rank: int = opt(64, "LoRA: rank")
    lora_alpha: float = opt(16.0, "LoRA: alpha; the adapter is scaled by alpha / rank")
    lora_dropout: float = opt(0.0, "LoRA: dropout on the adapters' input")
    rslora: bool = opt(False, "scale by alpha / sqrt(rank) instead")
    targets: str = opt("all", f"LoRA: layers that get adapters: all, or some of {','.join(TARGETS)}")
    adapter: str = opt("", "start from this PEFT adapter of --model, which then sets rank, alpha, dropout and targets")
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
    steps: int = opt(2000, "optimizer steps")
    batch: int = opt(64, "problems in an optimizer step, over all ranks")
    micro_batch: int = opt(16, "packed rows in one forward of one rank, at most; the rest is accumulated")
    optimizer: str = opt("adamw", "paged-adamw8bit is bitsandbytes', on CUDA", ("adamw", "paged-adamw8bit"))
    lr: float = opt(2e-4, "peak learning rate")
    schedule: str = opt("cosine", "learning-rate schedule (or --lr-schedule); snac, bacon, fot and fot-literal measure "
                        "and decide as they go, see fot.py", RULES)
    lr_warmup: float = opt(0.03, "learning-rate warm-up, as a fraction of the steps")
    lr_floor: float = opt(0.0, "learning rate at the end, as a fraction of the peak; fot and bacon fall to 0")
    fot_parts: str = opt("envelope,noise,forecast,gate,blocks", "fot: the parts of the rule that are on, or none")
    fot_window: int = opt(32, "snac, bacon, fot: steps between two decisions")
    fot_beta: float = opt(0.9, "snac, bacon, fot: averaging of the measurements over decisions")
    weight_decay: float = opt(0.0, "AdamW weight decay of the adapters")
    beta1: float = opt(0.9, "AdamW beta1")
    beta2: float = opt(0.999, "AdamW beta2")
    clip: float = opt(1.0, "clip the gradient to this norm; 0 is off")
    # evaluation
    eval_every: int = opt(250, "steps between validations and checkpoints")
    log_every: int = opt(10, "steps between lines of metrics.jsonl; the last step of each measures the prompt too")
    segment_rms: bool = opt(False, "log each block's gradient RMS over prompt and over answer rows, of rank 0's share")
    eval_problems: int = opt(0, "test problems to generate answers for, the first ones; 0 is all")
    eval_batch: int = opt(64, "answers that are generated at a time, on each rank")
    generate_tokens: int = opt(256, "tokens in a generated answer, at most")
    stop: str = opt("Question:", "strings that end a generated answer, separated by |; empty is none")
    samples: int = opt(0, "sampled answers a problem, for pass@k, beside the greedy one")
    k: str = opt("1", "pass@k of the sampled answers, for these k, separated by commas")
    temperature: float = opt(0.8, "temperature of the sampled answers")
    merge: bool = opt(True, "generate with the adapter merged into dense weights: faster, more memory")
    # system
    device: str = opt("auto", "where to run", ("auto", "cpu", "cuda"))
    dtype: str = opt("auto", "dtype of the activations; auto is bfloat16 on CUDA", ("auto", "float32", "bfloat16"))
    kernels: str = opt("auto", "implementation of the scores", ("auto", "triton", "torch"))
    checkpoint_activations: bool = opt(False, "recompute each block in backward to save memory")
    wandb: str = opt("", "Weights & Biases project to log to as well (WANDB_MODE=offline works)")


# Settings that a resumed run may change: where and how it computes, not what.
FREE = ("out", "resume", "resume_from", "cache", "wandb", "micro_batch", "device", "kernels", "checkpoint_activations",
        "eval_batch")


def check(cfg: Config, world: World) -> None:
    """Raises ValueError, one line, for settings that cannot be meant."""
    for name in ("warmup", "alpha_max", "alpha_start", "lr_warmup", "lr_floor", "eps", "tail_smoothing"):
        if not 0 <= getattr(cfg, name) <= 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(cfg, name)} is outside [0, 1]")
    for name in ("rank", "steps", "batch", "micro_batch", "seq_len", "heldout", "eval_every", "log_every", "eval_batch",
                 "generate_tokens", "fot_window"):
        if getattr(cfg, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(cfg, name)} must be at least 1")
    for name in ("seed", "lr", "weight_decay", "clip", "gamma", "eval_problems", "samples", "temperature"):
        if not 0 <= getattr(cfg, name) < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(cfg, name)} must be finite and not negative")
    for name in ("beta1", "beta2", "fot_beta"):
        if not 0 <= getattr(cfg, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(cfg, name)} is outside [0, 1)")
    if cfg.schedule == SCHEDULE_FREE and cfg.optimizer != "adamw":
        raise ValueError(f"--schedule {cfg.schedule} is an optimizer of its own, not --optimizer {cfg.optimizer}")
    if cfg.schedule in ADAPTIVE and cfg.lr_warmup == 1:
        raise ValueError(f"--lr-warmup 1 leaves no step to --schedule {cfg.schedule}")
    if cfg.tail_smoothing and "gate" in fot_measures(cfg):
        raise ValueError(f"--schedule {cfg.schedule} reads a Fisher that --tail-smoothing {cfg.tail_smoothing} has "
                         "not; leave gate out of fot's --fot-parts")
    if cfg.batch % world.size:
        raise ValueError(f"--batch {cfg.batch} is not divisible by the {world.size} ranks; change one of them")
    if cfg.tail_smoothing and cfg.loss not in ("brier", "spherical"):
        raise ValueError(f"--tail-smoothing is defined for brier and spherical, not --loss {cfg.loss}")
    if cfg.resume_from and not cfg.resume:
        raise ValueError("--resume-from needs --resume")
    if cfg.kernels == "triton" and world.device.type != "cuda":
        raise ValueError("--kernels triton needs a CUDA device; use --kernels torch or auto")
    if cfg.samples and max(ks(cfg)) > cfg.samples:
        raise ValueError(f"--k {cfg.k}: pass@{max(ks(cfg))} needs as many --samples, which are {cfg.samples}")
    if cfg.samples and not cfg.temperature:
        raise ValueError(f"--samples {cfg.samples} at --temperature 0 would all be the greedy answer")


def ks(cfg: Config) -> list[int]:
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", cfg.k):
        raise ValueError(f"--k {cfg.k!r}: expected whole numbers above 0, separated by commas")
    return [int(k) for k in cfg.k.split(",")]


def fot_measures(cfg: Config) -> set[str]:
    """What the rule of --schedule reads beyond the loss: "gate", the Fisher of both segments; "blocks", their RMS."""
    parts = parse_parts(cfg.fot_parts)
    reads = {"fot": ("gate", "blocks"), "bacon": ("blocks",)}.get(cfg.schedule, ())
    return {part for part in reads if part in parts} | ({"gate"} if cfg.schedule == "fot-literal" else set())


# ----------------------------------------------------------------------------------------------
# the experiment


def main(argv: list[str] | None = None) -> int:
    argv = [a.replace("--lr-schedule", "--schedule", 1) for a in (sys.argv[1:] if argv is None else argv)]
    cfg = parse_config(Config, argv, __doc__)
    with user_errors():
        world = start_world(cfg.device)
        check(cfg, world)
        device = world.device
        name = f"gsm8k-{Path(cfg.model).name}-{cfg.format}-{cfg.loss}-s{cfg.seed}"
        out = Path(cfg.out or f"runs/{name}")
        run = RunFolder(out, world)
        run.check(asdict(cfg), cfg.resume, FREE)
        checkpoint = None
        if cfg.resume:
            path = Path(cfg.resume_from or run / "last.pt")
            checkpoint = load_checkpoint(path)
            same_config(path, checkpoint["config"], asdict(cfg), FREE)

        # -- data ------------------------------------------------------------------------------
        with world.main_first():
            prompter = Prompter(cfg.model, cfg.prompt, cfg.format)
        problems, heldout = split_heldout(load_gsm8k(cfg.data, "train"), cfg.heldout)
        test = load_gsm8k(cfg.data, "test")[: cfg.eval_problems or None]
        cache_length([Request(prompter.prompt(p), cfg.generate_tokens) for p in test], prompter.positions)
        with world.main_first():
            made = make_targets(problems + heldout, cfg.format, annotations=cfg.calculator, cache=cfg.cache,
                                progress=world.main and sys.stderr.isatty())
        train = make_examples(problems, made, prompter, cfg.seq_len, "training")
        held = make_examples(heldout, made, prompter, cfg.seq_len, "held-out")
        heldout_rows = pack(held, cfg.seq_len, pad_id=prompter.end)
        data_hash = hashlib.sha256(json.dumps([train, held]).encode()).hexdigest()
        if checkpoint and checkpoint["data_hash"] != data_hash:
            raise ValueError(f"--resume: {cfg.data} or the tokenizer of {cfg.model} is not what {out} was trained on; "
                             "restore it")

        # -- model: frozen base, adapters in fp32, activations in dtype ------------------------
        bf16 = cfg.dtype == "bfloat16" or (cfg.dtype == "auto" and device.type == "cuda")
        dtype = torch.bfloat16 if bf16 else torch.float32
        chosen = TARGETS if cfg.targets == "all" else tuple(cfg.targets.split(","))
        lora = LoRAConfig(cfg.rank, cfg.lora_alpha, cfg.lora_dropout, chosen, cfg.rslora)
        with world.main_first():
            model = load_base(cfg.model, cfg.base, dtype, device)
        if cfg.seq_len > model.config.max_position_embeddings:
            raise ValueError(f"--seq-len {cfg.seq_len} is longer than the {model.config.max_position_embeddings} "
                             f"positions of {cfg.model}")
        torch.manual_seed(cfg.seed)
        if checkpoint:
            add_lora(model, LoRAConfig(**checkpoint["lora"] | {"targets": tuple(checkpoint["lora"]["targets"])}))
            with torch.no_grad():
                for key, tensor in adapter_tensors(model).items():
                    tensor.copy_(checkpoint["model"][key])
        elif cfg.adapter:
            load_adapter(model, cfg.adapter, cfg.model)
        else:
            add_lora(model, lora)
        trainable = [p for p in model.parameters() if p.requires_grad]

        # -- optimizer: a group for each block where the rule gives each its own multiplier ----
        reads = fot_measures(cfg)
        groups = [{"params": p, "block": i} for i, p in enumerate(block_parameters(model))]
        optimizer = make_optimizer(cfg, groups if "blocks" in reads else trainable, device)
        fot = None
        if cfg.schedule in ADAPTIVE:  # fed the NLL, which stays one score while dpsm's mixture moves
            fot = FoT(optimizer, cfg.steps, rule=cfg.schedule, parts=parse_parts(cfg.fot_parts), warmup=cfg.lr_warmup,
                      every=cfg.fot_window, beta=cfg.fot_beta, same_units=cfg.loss == "ce", ranks=world.size,
                      reduce=world.all_reduce,
                      block_rms=(lambda: segment_rms(model, reset=False)) if "blocks" in reads else None)

    model.checkpoint_activations = cfg.checkpoint_activations
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    trained = model
    if world.size > 1:  # the base is the same file everywhere and never changes: nothing of it is broadcast
        trained = torch.nn.parallel.DistributedDataParallel(
            model, device_ids=[device.index] if device.type == "cuda" else None, broadcast_buffers=False,
            gradient_as_bucket_view=True)

    # -- loss ----------------------------------------------------------------------------------
    alpha = torch.zeros((), device=device)  # filled each optimizer step; the score reads it on the device
    score = make_score(cfg.loss, alpha=alpha, gamma=cfg.gamma, eps=cfg.eps, tail=cfg.tail_smoothing)

    def alpha_of(step: int) -> float:
        if cfg.loss != "dpsm":
            return 0.0
        return alpha_at(step, cfg.steps, warmup=cfg.warmup, schedule=cfg.alpha_schedule, alpha_max=cfg.alpha_max,
                        start=cfg.alpha_start)

    # -- state: everything that a resumed run needs ----------------------------------------------
    step, tokens_seen, train_seconds, joules = 0, 0, 0.0, 0.0
    window = Calibration(device)  # calibration of the targets trained on since the last log line
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # likewise: steps, loss, gradient norm, clipped
    room = torch.zeros(2, dtype=torch.float64)  # likewise, on the CPU and this rank: positions, those without a token
    watch = DivergenceWatch(device)
    if checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer"])
        fot is None or fot.load_state_dict(checkpoint["fot"])
        step, tokens_seen = checkpoint["step"], checkpoint["tokens_seen"]
        train_seconds, joules = checkpoint["train_seconds"], checkpoint["joules"]
        sums.copy_(checkpoint["sums"])
        room.copy_(checkpoint["room"])
        watch.state.copy_(checkpoint["watch"])
        if world.main:  # a sum over ranks goes on at one of them
            window.load_state_dict(checkpoint["window"])
        if not set_rng_states(checkpoint["rng"], world) and cfg.lora_dropout and world.main:
            print(f"resuming {len(checkpoint['rng'])} ranks on {world.size}: dropout masks will differ from here on")
    run.start(asdict(cfg) | {"script": "finetune_gsm8k.py"}, step if checkpoint else None)
    if checkpoint:
        run.log("event", step, event="resumed", world_size=world.size)
    if world.main and step < cfg.steps:
        forget(run.path)
    energy = EnergyMeter(device)
    stop = StopRequest()
    wandb_run = start_wandb(cfg.wandb, out, asdict(cfg)) if cfg.wandb and world.main else None
    parameters = sum(p.numel() for p in trainable)
    if world.main:
        first = pack([train[i] for i in batch_indices(len(train), 0, cfg.batch, cfg.seed)], cfg.seq_len)
        print(f"{out}: {cfg.model}, base {cfg.base}, LoRA of rank {model.lora.r} with {parameters / 1e6:.2f} M "
              f"parameters, loss {cfg.loss}, {dtype} on {world.size} x {device.type}, {len(train)} training and "
              f"{len(held)} held-out problems; the first batch packs into {len(first)} rows, "
              f"{100 * first.padding:.1f} % padding")

    def save() -> None:
        """last.pt. All ranks take part; rank 0 writes."""
        total = Calibration(device)
        total.load_state_dict(window.state_dict())
        total.all_reduce()
        run.save("last.pt", {
            "model": {key: t.detach().cpu() for key, t in adapter_tensors(model).items()}, "lora": asdict(model.lora),
            "config": asdict(cfg), "step": step, "data_hash": data_hash, "optimizer": optimizer.state_dict(),
            "alpha": alpha_of(step), "tokens_seen": tokens_seen, "train_seconds": train_seconds, "joules": joules,
            "sums": sums.cpu(), "room": room, "watch": watch.state.cpu(), "window": total.state_dict(),
            "fot": fot and fot.state_dict(), "rng": rng_states(world)})

    def log_row(kind: str, **values) -> None:
        row = run.log(kind, step, tokens=tokens_seen, train_seconds=train_seconds, **values)
        if wandb_run:
            wandb_run.log({f"{kind}/{k}": v for k, v in row.items() if k not in ("kind", "step")}, step=step)

    # -- loop ----------------------------------------------------------------------------------
    from tqdm import tqdm

    share = cfg.batch // world.size
    mine = slice(world.rank * share, (world.rank + 1) * share)
    bar = tqdm(total=cfg.steps, initial=step, desc=out.name, unit="step", dynamic_ncols=True, disable=not world.main)
    ending = None  # why the loop ended before cfg.steps
    trained.train()
    clock, meter, clocked = time.perf_counter(), energy.read(), tokens_seen
    while step < cfg.steps and ending is None:
        batch = [train[i] for i in batch_indices(len(train), step, cfg.batch, cfg.seed)]  # a function of the step
        rows = pack(batch[mine], cfg.seq_len, pad_id=prompter.end)
        count = sum(e.targets(cfg.loss_on) for e in batch)  # the global batch's targets
        room += torch.tensor([rows.targets_RT.numel(), rows.targets_RT.numel() - rows.tokens])
        alpha.fill_(alpha_of(step))
        # FoT has set the groups' own; what is logged is without the multipliers of blocks.
        lr = fot.planned(step) if fot else cfg.lr * lr_factor(cfg.schedule, step, cfg.steps, warmup=cfg.lr_warmup,
                                                              floor=cfg.lr_floor)
        for group in optimizer.param_groups if fot is None else ():
            group["lr"] = lr

        # The loss is the sum over the global batch's targets divided by their number. DDP averages gradients over
        # ranks, hence the world size. In a probe, the last step of a log line or before a decision, the head also sees
        # the targets outside the loss, with weight 0, so that the prompt has its Fisher; the gradient is the same.
        probe, deciding = (step + 1) % cfg.log_every == 0, fot is not None and (step + 1) % cfg.fot_window == 0
        gated = deciding and "gate" in reads
        everything = probe or gated
        segments = (probe and cfg.segment_rms) or (deciding and "blocks" in reads)
        if segments:
            segment_rms(model)  # begins anew: both readers want this step's alone
        measured, size = fot is not None and fot.wants_micro and len(rows) > 1, cfg.micro_batch
        if measured:  # a part is compared with the whole, a random one: pack puts the longest examples first
            rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(step))]
            size = min(size, math.ceil(len(rows) / 2))
        fisher = torch.zeros(4, dtype=torch.float64, device=device)  # sum and number, of the prompt and of the answer
        denominator = to_device(torch.tensor(count / world.size), device)
        loss = torch.zeros((), device=device)
        for i in range(0, len(rows), size):
            part = rows[i : i + size]
            if cfg.segment_rms or "blocks" in reads:
                set_segments(model, part.answer_RT if segments else None)
            # For the gate alone an eighth of the prompt's targets will do: their head costs as much as the answer's.
            thin = 8 if gated and not probe and cfg.loss_on != "all" else 1
            at = part.positions("all" if everything else cfg.loss_on, thin)
            answer = part.answer_RT.flatten()[at]
            inside = to_device(answer | (cfg.loss_on == "all"), device)
            y, answer = to_device(part.targets_RT.flatten()[at], device), to_device(answer, device)
            at = to_device(at, device)
            last = i + size >= len(rows)
            with contextlib.nullcontext() if last or world.size == 1 else trained.no_sync():
                hidden = trained(to_device(part.tokens_RT, device),
                                 documents_BT=to_device(part.documents_RT, device))
                part_loss, moments = linear_score(
                    hidden.flatten(0, 1).index_select(0, at), model.head_weight, y, score, denominator=denominator,
                    weights=inside.float() if everything else None, fisher=everything and not cfg.tail_smoothing,
                    tail=cfg.tail_smoothing, impl=cfg.kernels)
                part_loss.backward()
            loss += part_loss.detach() / world.size
            if moments.fisher is not None:
                by = torch.stack([~answer, answer]).double()  # [2, N]
                fisher += torch.stack([by @ moments.fisher.double(), by.sum(1)], dim=1).flatten()
                if gated:
                    fot.observe_segments(moments.fisher, ~answer, answer)
            moments.valid = moments.valid & inside
            window.update(moments)
            if fot:
                fot.observe(-moments.log_p.where(moments.valid, 0).sum(), moments.valid.sum())
                if measured and i == 0:
                    fot.micro(len(part.positions(cfg.loss_on)) / count)
        world.all_reduce(loss)
        norm = torch.nn.utils.clip_grad_norm_(trainable, cfg.clip or math.inf)
        finite = torch.isfinite(norm) & torch.isfinite(loss)
        if fot:
            fot.clipped_by = (norm / (cfg.clip or math.inf)).clamp(min=1)
        if isinstance(optimizer, torch.optim.AdamW):
            optimizer.found_inf = (~finite).float()  # fused AdamW leaves everything as it is where this is 1
            optimizer.step()
        elif finite:  # the others know no such flag: one synchronisation a step
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        watch.update(loss, finite)
        clipped = (norm > (cfg.clip or math.inf)).float()
        sums += torch.where(finite, torch.stack([torch.ones_like(loss), loss, norm, clipped]), 0.0)
        tokens_seen += sum(e.length for e in batch)
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
            extra = {}
            if probe and not cfg.tail_smoothing:
                total = world.all_reduce(fisher).tolist()
                extra = {f"fisher_{of}": total[i] / total[i + 1] if total[i + 1] else None
                         for of, i in (("prompt", 0), ("answer", 2))}
            if probe and cfg.segment_rms:
                rms = segment_rms(model, reset=False).t().tolist()
                extra |= {"block_rms_prompt": rms[0], "block_rms_answer": rms[1]}
            if n:
                m = window.compute()
                mean_loss, mean_norm, clip_rate = (v / n for v in means)
                shown = {k: m[k] for k in ("nll", "ppl", "ece10", "brier", "accuracy", "entropy")}
                used_alpha = alpha.item()  # the value that the last step was computed with
                log_row("train", loss=mean_loss, **shown, alpha=used_alpha, lr=lr, grad_norm=mean_norm,
                        clip_rate=clip_rate, steps=n, skipped=health["skipped"], tokens_per_second=rate,
                        padding=float(room[1] / room[0]), epoch=step * cfg.batch / len(train), **extra)
                bar.set_postfix_str(f"loss {mean_loss:.3f} {f'| {fot} | ' if fot else ''}ppl {m['ppl']:.2f} "
                                    f"ece {m['ece10']:.3f} a {used_alpha:.2f} lr {lr:.1e} {rate:,.0f} tok/s")
            window.reset()
            sums.zero_()
            room.zero_()
        if health["worst_streak"] >= 3:
            ending = "diverged"
            break
        if at_eval:
            with averaged(optimizer):
                m = heldout_metrics(model, heldout_rows, score, cfg.loss_on, world, rows=cfg.micro_batch,
                                    tail=cfg.tail_smoothing, impl=cfg.kernels)
            log_row("val", **m)
            bar.write(f"step {step}: held-out loss {m['loss']:.4f}, nll {m['nll']:.4f}, ece {m['ece10']:.4f}",
                      file=sys.stderr)
        if stopping:
            ending = "stopped"
        # A step whose loss was not finite changed nothing, but weights that yield one are no good place to stop.
        if (at_eval or stopping) and health["streak"] == 0:
            save()
        clock, meter = time.perf_counter(), energy.read()  # evaluation and checkpoints are not training time
    bar.close()
    if (code := ends_here(run, ending, step, stop.signal)) is not None:
        stop.restore()
        return finish(run, wandb_run, code)

    # -- final evaluation: answers to the test problems, and what they are worth ------------------
    memory = peak_memory(device)
    set_segments(model, None)
    with user_errors(), averaged(optimizer):
        if world.main:
            save_adapter(model, run / "adapter", cfg.model)
        final = (merged(model) if cfg.merge else model).eval()
        graded = examine(final, test, prompter, run.path, world, format=cfg.format, k=ks(cfg),
                         max_new_tokens=cfg.generate_tokens, batch=cfg.eval_batch, samples=cfg.samples,
                         temperature=cfg.temperature, seed=cfg.seed, stop=[s for s in cfg.stop.split("|") if s],
                         calculator=cfg.format == "text" and cfg.calculator, stopping=lambda: bool(stop.signal))
    stop.restore()
    if graded is None:
        if world.main:
            print(f"{stop.signal}: stopped while generating; the same command with --resume goes on from its answers")
        return finish(run, wandb_run, 0)
    if not world.main:
        return finish(run, wandb_run, 0)
    rows, vals = (read_metrics(run / "metrics.jsonl", kind) for kind in ("train", "val"))
    # The first window pays for compilation and cold caches.
    rates = [r["tokens_per_second"] for r in (rows[1:] or rows)]
    rate, finals = statistics.median(rates) if rates else None, vals[-1] if vals else {}
    inside = sum(e.targets(cfg.loss_on) for e in train) / sum(e.length for e in train)
    flops, peak = flops_per_token(model.config, model.lora, cfg.seq_len, inside), peak_flops(device, dtype)
    summary = {
        "script": "finetune_gsm8k.py", "loss": cfg.loss, "alpha_schedule": cfg.alpha_schedule if cfg.loss == "dpsm"
        else None, "format": cfg.format, "steps": step, "seed": cfg.seed, "parameters": parameters,
        "tokens_seen": tokens_seen, **graded,
        "final_train_loss": rows[-1]["loss"] if rows else None,
        "final_heldout_loss": finals.get("loss"), **{f"{name}_{k}": finals.get(k) for name in ("final_heldout", "val")
                                                     for k in ("nll", "ppl", "ece10", "brier", "accuracy", "entropy")},
        "tokens_per_second": rate, "train_seconds": train_seconds, "flops_per_token": flops,
        "mfu": rate * flops / (peak * world.size) if peak and rate else None,
        "padding": statistics.fmean(r["padding"] for r in rows) if rows else None,
        **system_entries(world, dtype, memory, joules if meter is not None else None, watch.read()),
        "base": cfg.base,
        **({f"{cfg.schedule}_{k}": v for k, v in fot.counts.items()} if fot else {}),
    }
    write_json(run / "summary.json", summary)
    if wandb_run:
        wandb_run.summary.update(summary)
    ways = ", ".join(f"{rule} {100 * v:.2f} %" for rule in ("strict", "flexible", "code")
                     if (v := graded[f"pass_at_1_{rule}"]) is not None)
    print(f"{out}: pass@1 {ways} on {len(test)} problems; held-out loss {finals.get('loss', math.nan):.4f}; "
          f"{rate or 0:,.0f} tokens/s in training, "
          f"{graded['generated_tokens_per_second']:,.0f} in generation")
    print(f"compare answers: python -m eval.gsm8k {run / 'outputs.jsonl'} OTHER/outputs.jsonl --format {cfg.format}")
    return finish(run, wandb_run, 0)


def make_optimizer(cfg: Config, parameters: list, device: torch.device) -> torch.optim.Optimizer:
    """Raises ValueError where bitsandbytes' paged optimizer cannot run, or where a package is missing."""
    settings = {"lr": cfg.lr, "betas": (cfg.beta1, cfg.beta2), "weight_decay": cfg.weight_decay}
    if cfg.schedule == SCHEDULE_FREE:
        return schedule_free_adamw(parameters, **settings)
    if cfg.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **settings)
    if device.type != "cuda":
        raise ValueError(f"--optimizer {cfg.optimizer} needs a CUDA device; use --optimizer adamw")
    try:
        from bitsandbytes.optim import PagedAdamW8bit
    except ImportError as error:
        raise ValueError(f"--optimizer {cfg.optimizer} needs bitsandbytes ({error}); use --optimizer adamw") from None
    return PagedAdamW8bit(parameters, **settings)


if __name__ == "__main__":
    sys.exit(main())
