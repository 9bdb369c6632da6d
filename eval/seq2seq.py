"""What finetune_seq2seq.py measures: calibration on the references, a temperature, generated summaries, cost of a step.

Nothing here trains. Sets are split over the ranks of ``world``, and every rank must make each call.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from data.summaries import SummaryTokenizer, TokenPairs
from eval.rows import write_rows
from eval.summaries import (
    ROUGE,
    bert_model,
    bert_score,
    confidence_metrics,
    files2rouge_scores,
    rouge_scores,
    summary_metrics,
    write_predictions,
)
from kernels import linear_score
from model.beam import Decoding
from model.seq2seq import Seq2Seq, Seq2SeqConfig, training_flops
from runtime.folder import load_checkpoint
from runtime.machine import EnergyMeter, World, device_name, peak_flops, peak_memory, to_device

PROFILE_WARM_UP = 3  # steps


def load_finetuned(run_folder: str | Path, checkpoint: str = "best.pt", device: str | torch.device = "cpu"):
    """The model of a run, in eval mode and without dropout, its SummaryTokenizer, and what else the checkpoint holds.

    Raises ValueError, one line, for a folder without a whole checkpoint of that name."""
    kept = load_checkpoint(Path(run_folder) / checkpoint)
    model = Seq2Seq(Seq2SeqConfig(**kept["model_config"]), getattr(torch, kept["dtype"]))
    model.load_state_dict(kept["model"])
    return model.to(device).eval(), SummaryTokenizer.from_state(kept["tokenizer"]), kept


def decoding(settings, tokenizer: SummaryTokenizer) -> Decoding:
    """The search of the final evaluation. ``settings`` has finetune_seq2seq.py's decoding flags as attributes.

    EOS is not forced at the limit, because the share of beams that end is measured."""
    names = ("max_new_tokens", "min_new_tokens", "length_penalty", "no_repeat_ngram", "early_stopping")
    ids = dict(eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id, forced_bos_id=tokenizer.bos_id)
    return Decoding(num_beams=settings.beams, **{name: getattr(settings, name) for name in names}, **ids)


def check_packages(bertscore: str) -> None:
    """Raises ValueError where a package or a model that the final evaluation needs cannot be had."""
    rouge_scores(["a"], ["a"])
    files2rouge_scores(["a"], ["a"])
    if bertscore:
        bert_model(bertscore)


def multiple_of(device: torch.device) -> int:
    """Lengths of batches are padded to a multiple of this: tensor cores like 8."""
    return 8 if device.type == "cuda" else 1


def forward(model, source: Tensor, mask: Tensor | None, labels: Tensor, device: torch.device, shift: Callable):
    """Hidden states [N, D] and labels [N] of a collated batch, N = batch x target length, on ``device``."""
    source, mask, labels = (t if t is None else to_device(t, device) for t in (source, mask, labels))
    return model(source, mask, shift(labels)).flatten(0, 1), labels.flatten()


def generation_metrics(
    rows: list[dict],
    speed: float | None,
    *,
    bertscore: str = "",
    device: str = "cpu",
    words: str = "ascii",
    path: Path | None = None,
) -> dict:
    """All of eval.summaries about ``rows`` (of write_predictions), ROUGE of ``words``, BERTScore where ``bertscore``
    names a model, the share of searches that ended before the limit, tokens a summary, and what a summary's probability
    tells of its ROUGE-Lsum. ``path``: gets the rows, each with its ROUGE. Raises ValueError for a model that cannot be
    loaded."""
    texts = [[row[name] for row in rows] for name in ("prediction", "reference")]
    scores = rouge_scores(*texts, words=words)
    if path:
        write_rows(path, [row | {name: of[i] for name, of in scores.items()} for i, row in enumerate(rows)])
    out = summary_metrics(*texts, words=words, scores=scores)
    sums, tokens = ([row.get(name) for row in rows] for name in ("log_p", "tokens"))  # older rows have no log_p
    out |= confidence_metrics(sums, tokens, scores["rougeLsum"])
    out |= {"ended": statistics.fmean(r["ended"] for r in rows), "generate_tokens_per_second": speed}
    out["summary_tokens"] = statistics.fmean(r["tokens"] for r in rows)
    return out | (bert_score(*texts, bertscore, device=device) if bertscore else {})


def summarise(
    model: Seq2Seq, sets: dict[str, TokenPairs | None], options: Decoding, folder: Path, world: World, **how
) -> dict[str, tuple[list[dict], float | None]]:
    """`write_predictions` of each set that is summarised, into ``folder``: the test sets and ood, or, where there is no
    test set, as when a fold selects, the validation set and ood. ``how``: its key and its batch."""
    names = ["val" if sets["test"] is None else "test"] + ["ood"] * (sets["ood"] is not None)
    paths = {name: folder / f"predictions-{name}.jsonl" for name in names}
    how |= dict(multiple=multiple_of(world.device))
    return {name: write_predictions(model, sets[name], options, path, world, **how) for name, path in paths.items()}


def describe(name: str, summary: dict) -> list[str]:
    """The last lines of a run, from its summary: validation before and after the temperature, then a line for each set
    that was summarised."""
    s = summary
    after = "; at temperature {temperature:.3f} nll {val_nll_t:.4f}, ece {val_ece10_t:.4f}" if s["temperature"] else ""
    out = [
        f"{name}: validation ppl {s['val_ppl']:.3f}, nll {s['val_nll']:.4f}, ece {s['val_ece10']:.4f}, brier "
        f"{s['val_brier']:.4f}{after.format(**s)}; {s['tokens_per_second'] or 0:,.0f} tokens/s"
    ]
    for split in ("val", "test", "ood"):
        count = s.get(f"{split}_examples")
        if count is None:
            continue
        of = s["data"][{"val": "train" if s["fold"] else "validation"}.get(split, split)]
        notes = [f"part {s['fold']}"] if split == "val" and s["fold"] else []
        notes += [of["partial"]] if of["partial"] else []
        notes += [f"the first {count}"] if s["examples_limit"].get(split) == count else []
        notes = "; ".join(notes)
        rouge = {k: s[f"{split}_{k}"] for k in ROUGE}
        scores = ", ".join(f"{k} {'not measured' if v is None else f'{v:.2f}'}" for k, v in rouge.items())
        out.append(
            f"{of['set']} {split}{f' ({notes})' if notes else ''}, {count} summaries: {scores}, "
            f"{100 * s[f'{split}_ended']:.0f} % ended, {s[f'{split}_generate_tokens_per_second'] or 0:,.0f} tokens/s"
        )
    return out


def profile(
    trained, model: Seq2Seq, score: Callable, batch: tuple, world: World, *, unigram, steps: int, **scoring
) -> dict:
    """The cost of forward and backward of one fixed, collated ``batch``, over ``steps`` after some that warm up.

    ``trained`` is ``model`` or what wraps it; ``unigram`` the `kernels.UnigramSmoothing` of the loss. GPU utilisation
    and joules come from NVML and are None without it; so is mfu on a device whose peak FLOP/s are not known. Gradients
    are dropped."""
    device, seconds, busy, energy = world.device, [], [], EnergyMeter(world.device)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for step in range(-PROFILE_WARM_UP, steps):
        if step == 0:
            start = energy.read()
        wait()
        clock = time.perf_counter()
        hidden, y = forward(trained, *batch, device, model.shift_right)
        loss, _ = linear_score(hidden, model.head_weight, y, score, bias=model.head_bias, **scoring)
        loss = loss + unigram.term(hidden, model.head_weight, y, bias=model.head_bias)
        loss.backward()
        wait()
        if step >= 0:
            seconds.append(time.perf_counter() - clock)
            if energy.read() is not None:
                busy.append(torch.cuda.utilization(device))
        model.zero_grad(set_to_none=True)
    end = energy.read()
    joules = None if start is None or end is None else (end - start) / steps
    source, mask, labels = batch
    tokens = int(source.numel() if mask is None else mask.sum()) + int((labels != -100).sum())
    flops = float(len(source) * training_flops(model.config, source.shape[1], labels.shape[1]))
    median, peak = statistics.median(seconds), peak_flops(device, model.dtype)
    cost = {"pairs": len(source), "source_tokens": source.shape[1], "target_tokens": labels.shape[1], "tokens": tokens}
    return cost | {
        "ms_forward_backward": 1000 * median,
        "tokens_per_second": tokens / median,
        "peak_memory_bytes": peak_memory(device),
        "gpu_utilisation": statistics.fmean(busy) if busy else None,
        "joules_per_step": joules,
        "flops": flops,
        "flops_per_second": flops / median,
        "mfu": flops / median / peak if peak else None,
        "device": device_name(device),
    }
