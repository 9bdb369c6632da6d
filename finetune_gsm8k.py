"""Experiment 3: a decoder with LoRA over a frozen base on GSM8K, from the problems to pass@1 by words or by programs.

    python finetune_gsm8k.py --model Qwen/Qwen3-0.6B --schedule cosine --steps 2000                  # one GPU
    python finetune_gsm8k.py --model Qwen/Qwen3-0.6B --format code --loss dpsm --warmup 0.1
    torchrun --nproc_per_node 8 finetune_gsm8k.py --model Qwen/Qwen3-8B --checkpoint-activations
    python finetune_gsm8k.py --model FOLDER --base bf16 --samples 8 --k 1,8                          # pass@8 as well
    python finetune_gsm8k.py --out runs/NAME ... --resume                                            # go on exactly

Top to bottom: config, data, model, loss, optimizer, loop, evaluation. Everything a run leaves behind is in its
folder; `python -m eval.gsm8k runs/A/outputs.jsonl runs/B/outputs.jsonl` compares two runs' answers.
"""

import hashlib
import json
import math
import statistics
import sys
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

from data.gsm8k import FORMATS, load_gsm8k, split_heldout
from data.packing import batch_indices, pack, target_counts
from data.prompts import PROMPTS, Prompter, make_examples, make_targets
from eval import answers, method_comparison, metrics
from eval.heldout import evaluate
from kernels import Calibration, UnigramSmoothing, linear_score
from kernels.losses import make_score
from model import lora, lora_hub
from model.decode import Request, cache_length
from runtime import optim
from runtime.cli import opt, parse_config, user_errors
from runtime.flags import alpha_of, flag, knobs, without_fisher
from runtime.folder import RunFolder
from runtime.graph import Replayed, check_graph
from runtime.machine import start_world, to_device
from runtime.meter import Meter
from runtime.process import command
from schedules import averaged, rule_reads

# For the gate alone one in so many of the prompt's targets will do: their head costs as much as the answer's.
THIN = 8
# With --cuda-graph rows, their targets and their documents are padded to multiples of it, so that shapes come again.
RECUR = 256

# ----------------------------------------------------------------------------------------------
# config


@dataclass(frozen=True)
class Config:
    out: str = flag("out", help="run folder; default runs/gsm8k-MODEL-FORMAT-LOSS-sSEED")
    resume: bool = flag("resume")
    resume_from: str = flag("resume_from")
    dry_run: str = flag("dry_run")
    seed: int = flag("seed", help="seeds the adapter, the data order, dropout and the sampled answers")
    # data
    data: str = opt("gsm8k", "gsm8k, or a folder of train.jsonl and test.jsonl", role="setting", group="data")
    format: str = opt("text", "train on the solutions' words, or on programs made of them", FORMATS, role="setting")
    calculator: bool = opt(True, "text: keep the <<48/2=24>> annotations, and work them out while decoding")
    prompt: str = opt("chat", "the model's chat template, 'Question: ... Answer:', or 8 solved ones first", PROMPTS)
    loss_on: str = opt("answer", "which tokens the loss is of", ("answer", "all"), role="setting")
    heldout: int = opt(256, "problems of train held out for validation", within="[1, inf)", role="setting")
    seq_len: int = opt(512, "tokens in a packed row; longer problems are left out", within="[1, inf)", role="setting")
    cache: str = flag("cache", help="folder for the programs of --format code")
    # model
    model: str = opt(
        "Qwen/Qwen3-0.6B",
        "a Llama, Mistral, Qwen2, Qwen3 or SmolLM3: a folder, a hub id or a GGUF file",
        role="setting",
        group="model",
    )
    base: str = opt("nf4", "how the frozen weights are kept", lora.BASES, role="setting")
    rank: int = opt(64, "LoRA: rank", within="[1, inf)")
    lora_alpha: float = opt(16.0, "LoRA: alpha; the adapter is scaled by alpha / rank")
    lora_dropout: float = opt(0.0, "LoRA: dropout on the adapters' input", within="[0, 1)")
    rslora: bool = opt(False, "scale by alpha / sqrt(rank) instead")
    targets: str = opt("all", f"LoRA: adapted layers: all, some of {','.join(lora.TARGETS)}, or a regex of names")
    lora_init: str = opt("zero", "LoRA: B starts at 0, or A and B at W's largest components (PiSSA)", lora.INITS)
    lora_plus: float = opt(1.0, "LoRA+: learning rate of every B over that of A, --lr", within="(0, inf)")
    adapter: str = opt("", "start from this PEFT adapter of --model, with its rank and targets", role="setting")
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
    steps: int = flag("steps", 2000)
    batch: int = flag("batch", 64, help="problems in an optimizer step, over all ranks")
    micro_batch: int = flag("micro_batch", 16, help="packed rows in one forward of one rank, at most")
    optimizer: str = flag("optimizer")
    lr: float = flag("lr", 2e-4)
    step_factor: float = flag("step_factor")
    momentum: float = flag("momentum")
    schedule: str = flag("schedule")
    lr_warmup: float = flag("lr_warmup", 0.03)
    lr_floor: float = flag("lr_floor", 0.0)
    decay_shape: str = flag("decay_shape")
    fot_parts: str = flag("fot_parts")
    fot_window: int = flag("fot_window")
    fot_beta: float = flag("fot_beta")
    weight_decay: float = flag("weight_decay", 0.0, help="AdamW weight decay of the adapters")
    beta1: float = flag("beta1")
    beta2: float = flag("beta2", 0.999)
    clip: float = flag("clip")
    # evaluation
    eval_every: int = flag("eval_every", 250)
    patience: int = flag("patience", help="stop after this many validations without better weights; 0 is off")
    best_by: str = opt("nll", "what best weights have: held-out NLL, or pass@1 of held-out answers", ("nll", "pass@1"))
    report: str = flag("report", help="whose answers are graded: the last weights', or the best ones' (best.pt)")
    before: bool = opt(False, "answer the test problems before training too, in OUT/before", role="bookkeeping")
    log_every: int = flag("log_every", help="steps between lines of metrics.jsonl; their last measures the prompt too")
    segment_rms: bool = opt(False, "log each block's gradient RMS, prompt and answer apart", role="bookkeeping")
    eval_problems: int = opt(0, "test problems to answer, the first ones; 0 is all", within="[0, inf)", role="setting")
    eval_batch: int = opt(64, "answers that are generated at a time, on each rank", within="[1, inf)", role="where")
    generate_tokens: int = opt(256, "tokens in a generated answer, at most", within="[1, inf)", role="setting")
    stop: str = opt("Question:", "strings that end an answer, separated by |; empty is none", role="setting")
    samples: int = opt(0, "sampled answers a problem, for pass@k", within="[0, inf)", role="bookkeeping")
    k: str = opt("1", "pass@k of the sampled answers, for these k, separated by commas", role="bookkeeping")
    temperature: float = opt(0.8, "temperature of the sampled answers", within="[0, inf)", role="setting")
    method_comparison: str = opt("", "JSON file to write for PEFT's comparison of methods", role="where")
    merge: bool = opt(True, "generate with the adapter merged into dense weights: faster, more memory", role="system")
    # system
    device: str = flag("device")
    dtype: str = flag("dtype")
    kernels: str = flag("kernels")
    layers: str = flag("layers")
    head_memory: int = flag("head_memory")
    checkpoint_activations: bool = flag("checkpoint_activations")
    cuda_graph: bool = flag("cuda_graph")
    wandb: str = flag("wandb")
    track: str = flag("track")


def check(cfg: Config, world) -> None:
    """Raises ValueError, one line, for flags that do not go together."""
    world.check(cfg)
    optim.check_optimizer(cfg, world.device)
    check_graph(cfg, world)
    if (given := without_fisher(cfg)) and "gate" in rule_reads(cfg.schedule, cfg.fot_parts):
        reads = f"--schedule {cfg.schedule} reads a Fisher that {given} has not"
        raise ValueError(f"{reads}; leave gate out of fot's --fot-parts")
    answers.check_samples(cfg.samples, cfg.k, cfg.temperature)
    if cfg.method_comparison and not Path(cfg.method_comparison).parent.is_dir():
        raise ValueError(f"--method-comparison {cfg.method_comparison}: there is no folder for it")


# ----------------------------------------------------------------------------------------------
# the experiment


@command
def main(argv: list[str] | None = None) -> int:
    cfg = parse_config(Config, argv, __doc__)
    with user_errors():
        world = start_world(cfg.device)
        check(cfg, world)
        device, dtype = world.device, world.dtype(cfg.dtype)
        name = f"gsm8k-{Path(cfg.model).name}-{cfg.format}-{cfg.loss}-s{cfg.seed}"
        out = Path(cfg.out or f"runs/{name}")
        run = RunFolder(out, world)
        checkpoint, cfg = run.enter(cfg), run.aside(cfg)

        # -- data ------------------------------------------------------------------------------
        with world.main_first():
            prompter = Prompter(cfg.model, cfg.prompt, cfg.format)
        problems, heldout = split_heldout(load_gsm8k(cfg.data, "train"), cfg.heldout)
        test = load_gsm8k(cfg.data, "test")[: cfg.eval_problems or None]
        with world.main_first():
            bar = world.main and sys.stderr.isatty()
            how = dict(annotations=cfg.calculator, cache=cfg.cache, progress=bar)
            made = make_targets(problems + heldout, cfg.format, **how) | make_targets(test, cfg.format, **how)
        prompter.show(problems, made)
        cache_length([Request(prompter.prompt(p), cfg.generate_tokens) for p in test], prompter.positions)
        train = make_examples(problems, made, prompter, cfg.seq_len, "training")
        held = make_examples(heldout, made, prompter, cfg.seq_len, "held-out")
        tested = make_examples(test, made, prompter, cfg.seq_len, "test", needed=False)
        heldout_rows = pack(held, cfg.seq_len, pad_id=prompter.end)
        test_rows = pack(tested, cfg.seq_len, pad_id=prompter.end) if tested else None
        data_hash = hashlib.sha256(json.dumps([train, held]).encode()).hexdigest()
        if checkpoint and checkpoint["data_hash"] != data_hash:
            changed = f"{cfg.data} or the tokenizer of {cfg.model}"
            raise ValueError(f"--resume: {changed} is not what {out} was trained on; restore it")

        # -- model: frozen base, adapters in fp32, activations in dtype ------------------------
        with world.main_first():
            model = lora.load_base(cfg.model, cfg.base, dtype, device)
        if cfg.seq_len > (longest := model.config.max_position_embeddings):
            raise ValueError(f"--seq-len {cfg.seq_len} is longer than the {longest} positions of {cfg.model}")
        torch.manual_seed(cfg.seed)
        adapt(model, cfg, checkpoint)
        trainable = [p for p in model.parameters() if p.requires_grad]
        parameters = sum(p.numel() for p in trainable)

        # -- optimizer: a group for each block where the rule gives each its own multiplier ----
        by_block = "blocks" in rule_reads(cfg.schedule, cfg.fot_parts)
        optimizer = optim.make_optimizer(
            lora.optimizer_groups(model, by_block, cfg.lr, cfg.lora_plus), cfg, model, device
        )
        block_rms = (lambda: lora.segment_rms(model, reset=False)) if by_block else None
        rule = optim.rule_of(cfg, optimizer, world, block_rms=block_rms)
    model.set_layers(cfg.layers)
    model.checkpoint_activations = cfg.checkpoint_activations
    # The base is the same file everywhere and never changes: nothing of it is broadcast.
    trained = optim.on_ranks(model, world, broadcast_buffers=False)

    # -- loss ----------------------------------------------------------------------------------
    alpha = torch.zeros((), device=device)  # filled each optimizer step; the score reads it on the device
    with user_errors():
        score = make_score(cfg.loss, alpha=alpha, **knobs(cfg))
    scoring = dict(tail=cfg.tail_smoothing, impl=cfg.kernels, memory=cfg.head_memory * 10**6 or None)
    counted = partial(target_counts, train, cfg.loss_on, prompter.definition.size)
    unigram = UnigramSmoothing(cfg.unigram, cfg.unigram_gain, counted, device)

    # -- state: everything that a resumed run needs ----------------------------------------------
    meter = Meter(run, Calibration(device), metrics, cfg)
    room = torch.zeros(2, dtype=torch.float64)  # on the CPU, of this rank: positions, and those without a token
    if checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer"])
        meter.load_state_dict(checkpoint, draws=cfg.lora_dropout > 0)
        optim.restore_rule(rule, checkpoint["fot"], meter.step)
        unigram.share = checkpoint.get("unigram", unigram.share)
        room.copy_(checkpoint["room"])

    def save(best: bool = False) -> None:
        """last.pt and, if these are the best weights so far, best.pt. All ranks take part; rank 0 writes."""

        def kept() -> dict:
            weights = {key: t.detach().cpu() for key, t in lora_hub.adapter_tensors(model).items()}
            return {"model": weights, "lora": asdict(model.lora), "config": asdict(cfg), "data_hash": data_hash}

        if best:
            with averaged(optimizer):
                run.save("best.pt", kept() | {"step": meter.step, "best": meter.best})
        state = kept() | meter.state_dict() | {"optimizer": optimizer.state_dict(), "fot": rule.state_dict()}
        state |= {"unigram": unigram.share, "alpha": alpha_of(cfg, meter.step, unigram.share)}
        run.save("last.pt", state | {"room": room})

    with user_errors():
        run.start(cfg, "finetune_gsm8k.py", checkpoint)
    first = pack([train[i] for i in batch_indices(len(train), 0, cfg.batch, cfg.seed)], cfg.seq_len)
    if world.main:
        if meter.step < cfg.steps and not cfg.dry_run:
            answers.forget(run.path)
        print(
            f"{out}: {cfg.model}, base {cfg.base}, LoRA of rank {model.lora.r} with {parameters / 1e6:.2f} M "
            f"parameters, loss {cfg.loss}, {dtype} on {world.size} x {device.type}, {len(train)} training and "
            f"{len(held)} held-out problems, which {cfg.steps} steps of {cfg.batch} go through "
            f"{cfg.steps * cfg.batch / len(train):.1f} times; the first batch packs into {len(first)} rows, "
            f"{100 * first.padding:.1f} % padding"
        )

    writing = dict(format=cfg.format, max_new_tokens=cfg.generate_tokens, batch=cfg.eval_batch)
    writing |= dict(stop=[s for s in cfg.stop.split("|") if s], calculator=cfg.format == "text" and cfg.calculator)

    def examined(folder: Path) -> tuple[dict, dict]:
        """The summary's entries of answers and of solutions, and reliability. A signal loses the answers of a batch."""
        lora.set_segments(model, None)
        sets = {"val": heldout_rows, "test": test_rows}
        how = dict(pieces=run.pieces(f"{folder.name} {cfg.report} {meter.step}"), impl=cfg.kernels, train=train)
        sure, bins = answers.solutions(model, sets, cfg.loss_on, cfg.micro_batch, world, **how)
        drawn = dict(samples=cfg.samples, temperature=cfg.temperature, seed=cfg.seed, k=answers.ks(cfg.k))
        with user_errors():
            subject = (lora.merged(model) if cfg.merge else model).eval()
            return answers.examine(subject, test, prompter, folder, world, **writing, **drawn) | sure, bins

    def held_right() -> dict:
        """pass@1 of the held-out problems, where that is what is best."""
        if cfg.best_by == "nll":
            return {}
        lora.set_segments(model, None)
        found = answers.pass_rate(model, heldout, prompter, run / "heldout", world, **writing, halt=meter.signalled)
        meter.owed |= not found
        return found

    epochs = cfg.batch / len(train)  # in a step

    def validate() -> None:
        """Where one is due, a validation; where one is due, a checkpoint."""
        best = False
        if meter.at_eval:
            # The last step's, also where a resumed run owes the validation.
            alpha.fill_(alpha_of(cfg, meter.step - 1, unigram.share))
            with averaged(optimizer):
                made = answers.forwards(model, heldout_rows, cfg.loss_on, cfg.micro_batch, world)
                made = meter.watched(made, count=-(-len(heldout_rows) // (cfg.micro_batch * world.size)))
                found = evaluate(model, made, world, score=score, unigram=unigram, **scoring)
                right = {} if meter.owed else held_right()
            numbers = {"loss": found.loss, "epoch": meter.step * epochs} | metrics.measure(found.raw) | right
            best = meter.judge(numbers, next(iter(right), "nll"))
            if not meter.owed:
                unigram.follow(numbers)
        if meter.saves(model, optimizer):
            save(best)
        meter.go_on()

    if cfg.before and not (run / "before" / "summary.json").exists():
        save()
        run.write("before/summary", examined(run / "before")[0])

    # -- loop ----------------------------------------------------------------------------------
    fishers = not without_fisher(cfg)
    share = cfg.batch // world.size  # of a step's problems, this rank's
    mine = slice(world.rank * share, (world.rank + 1) * share)
    trained.train()
    tokens, aimed = sum(e.length for e in train), sum(e.targets(cfg.loss_on) for e in train)
    flops = lora.lora_flops_per_token(model.config, model.lora, cfg.seq_len, aimed / tokens)
    plan = dict(name=cfg.model, tokens=tokens, step_tokens=tokens * epochs, validated=sum(e.length for e in held))
    plan |= dict(rows=min(cfg.micro_batch, math.ceil(len(first) / world.size)), flops=flops)
    if meter.dry_run(cfg, model, partial(answers.forwards, model, heldout_rows, cfg.loss_on), **plan):
        return run.finish(0)

    def micro_step(at_N, y_N, denominator, *placed, **how):
        """Forward and backward of packed rows: their part of the step's loss, 0-d, and their targets' Moments."""
        predicted = answers.hidden_of(trained, *placed, at_N), model.head_weight, y_N
        loss, moments = linear_score(*predicted, score, denominator=denominator, **scoring, **how)
        loss = loss + unigram.term(*predicted, denominator=denominator)
        loss.backward()
        return loss.detach(), moments

    replayed = Replayed(micro_step, trainable, baked=lambda: unigram.share) if cfg.cuda_graph else None
    meter.start(validate)
    while meter.running:
        step = meter.step
        batch = [train[i] for i in batch_indices(len(train), step, cfg.batch, cfg.seed)]  # a function of the step
        rounded = dict(multiple=RECUR) if replayed else {}
        rows, size = pack(batch[mine], cfg.seq_len, pad_id=prompter.end, **rounded), cfg.micro_batch
        count = sum(e.targets(cfg.loss_on) for e in batch)  # the global batch's targets
        room += torch.tensor([rows.targets_RT.numel(), rows.targets_RT.numel() - rows.tokens])
        alpha.fill_(alpha_of(cfg, step, unigram.share))
        lr = rule.lr
        if measured := rule.splits and len(rows) > 1:  # a part is compared with the whole: a random one, as pack sorts
            rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(step))]
            size = min(size, math.ceil(len(rows) / 2))

        # In a probe, the last step of a log line or before a decision, the head also sees the targets outside the loss,
        # with weight 0, so that the prompt has its Fisher; the gradient is the same.
        logged = (step + 1) % cfg.log_every == 0
        probe, thin = fishers and (logged or rule.gates), 1 if logged or cfg.loss_on == "all" else THIN
        segments = (logged and cfg.segment_rms) or rule.weighs_blocks
        if segments:
            lora.segment_rms(model)  # begins anew: both readers want this step's alone
        run_micro, multiple = (replayed, RECUR) if replayed and not (probe or segments) else (micro_step, 1)
        fisher = answers.SegmentFisher(device)
        # The loss is the sum over the global batch's targets divided by their number. DDP averages gradients over
        # ranks, hence the world size.
        denominator = to_device(torch.tensor(count / world.size), device)
        for i in range(0, len(rows), size):
            part = rows[i : i + size]
            seen = part.seen(cfg.loss_on, prompt=probe, thin=thin).padded(multiple)
            at, y, answer, inside = (to_device(x, device) for x in seen)
            if cfg.segment_rms or by_block:
                lora.set_segments(model, part.answer_RT if segments else None)
            with optim.meeting(trained, i + size >= len(rows)):
                how = dict(weights=inside.float(), fisher=True) if probe else {}
                loss, moments = run_micro(at, y, denominator, *answers.placed(part, device, multiple), **how)
            fisher.add(moments.fisher, answer)
            moments = replace(moments, valid=moments.valid & inside)
            meter.add(loss, moments)
            nll = -moments.log_p.where(moments.valid, 0).sum()
            tested = len(part.positions(cfg.loss_on)) / count if measured and i == 0 else None
            gate = dict(fisher=moments.fisher, prompt=~answer, answer=answer) if rule.gates else {}
            rule.observe(nll, moments.valid.sum(), share=tested, **gate)
        norm = optim.take_step(optimizer, trainable, cfg.clip, world.all_reduce(meter.loss))
        meter.end_step(norm, cfg.clip, tokens=sum(e.length for e in batch))
        if decision := rule.step():
            meter.log("fot", **decision)
        if not meter.due():
            continue

        more = fisher.entries(world) if logged and fishers else {}
        if logged and cfg.segment_rms:
            more["block_rms_prompt"], more["block_rms_answer"] = lora.segment_rms(model, reset=False).t().tolist()
        if row := meter.row(str(rule), alpha=alpha.item(), **unigram.shown, lr=lr, epoch=meter.step * epochs):
            meter.log("train", **row, padding=float(room[1] / room[0]), **more)
        if meter.at_log:
            room.zero_()
        if meter.ending == "diverged":
            break
        validate()
    if (code := meter.end()) is not None:
        return run.finish(code)

    # -- evaluation: answers to the test problems, and what they are worth -----------------------
    with user_errors(), averaged(optimizer):
        if cfg.report == "best":
            world.wait()
            lora_hub.put_tensors(model, run.load("best.pt")["model"])
        if world.main:
            lora_hub.save_adapter(model, run / "adapter", cfg.model)
        graded, bins = examined(run.path)
    if not world.main:
        return run.finish(0)
    rows, vals = run.rows("train"), run.rows("val")
    reported = meter.best["step"] if cfg.report == "best" else meter.step
    last = next((row for row in vals if row["step"] == reported), {})
    before = json.loads((run / "before" / "summary.json").read_text()) if cfg.before else {}
    summary = {
        "script": "finetune_gsm8k.py",
        "loss": cfg.loss,
        "alpha_schedule": cfg.alpha_schedule if cfg.loss == "dpsm" else None,
        **{key: getattr(cfg, key) for key in ("format", "base", "seed")},
        "parameters": parameters,
        **graded,
        **{f"before_{key}": value for key, value in before.items()},
        "reported_step": reported,
        "epochs": meter.step * epochs,
        "final_train_loss": rows[-1]["loss"] if rows else None,
        "final_heldout_loss": last.get("loss"),
        "padding": statistics.fmean(r["padding"] for r in rows) if rows else None,
        **meter.summary(flops, dtype),
        **{f"{cfg.schedule}_{k}": v for k, v in rule.counts.items()},
    }
    run.summarise(summary, calibration=bins)
    if cfg.method_comparison:
        method_comparison.write(run.path, cfg.method_comparison)
    print(answers.describe(str(out), summary))
    print(f"compare answers: {answers.comparison(run.path, cfg.data, cfg.format, cfg.eval_problems)}")
    return run.finish(0)


def adapt(model, cfg: Config, checkpoint: dict | None) -> None:
    """Gives the model its adapters: the checkpoint's, those of --adapter, or new ones."""
    if checkpoint:
        lora.add_lora(model, lora.LoRAConfig.kept(checkpoint["lora"]))
        lora_hub.put_tensors(model, checkpoint["model"])
    elif cfg.adapter:
        lora_hub.load_adapter(model, cfg.adapter, cfg.model)
    else:
        how = dict(targets=lora.targets_of(cfg.targets), rslora=cfg.rslora, init=cfg.lora_init)
        lora.add_lora(model, lora.LoRAConfig(cfg.rank, cfg.lora_alpha, cfg.lora_dropout, **how))


if __name__ == "__main__":
    sys.exit(main())
