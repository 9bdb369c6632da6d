"""Run folders with invented numbers, round where a test computes with them, and what a test looks up in a report."""

import json
import math
from pathlib import Path

from eval.report import claims, tables
from eval.report import runs as compare

STEPS = (100, 200, 300, 400, 500, 600, 700, 800, 900, 1000)
CONFIG = {
    "script": "train_lm.py",
    "out": "",
    "seed": 1,
    "data": "fixture",
    "tokenizer": "gpt2",
    "seq_len": 128,
    "model": "nano",
    "loss": "ce",
    "warmup": 0.1,
    "alpha_schedule": "linear",
    "alpha_max": 1.0,
    "gamma": 2.0,
    "eps": 0.1,
    "tail_smoothing": 0.0,
    "steps": 1000,
    "batch": 16,
    "lr": 0.001,
    "dtype": "auto",
    "wandb": "",
    "log_every": 50,
}
ENVIRONMENT = {
    "time": "2025-01-02T03:04:05+00:00",
    "command": "train_lm.py --fixture",
    "python": "3.11.0",
    "world_size": 1,
    "device": "fixture device",
    "packages": {"torch": "0.0", "triton": None},
    "git_commit": "f1x7u2e" * 5,
}
SUMMARY = {
    "val_examples": 200, "val_rouge1": 30.0, "val_rouge1_low": 29.0, "val_rouge1_high": 31.0, "val_rouge2": 10.0,
    "val_rougeL": 20.0, "val_rougeLsum": 25.0, "val_files2rouge_1": 30.1, "val_ended": 0.975, "val_words": 21.5,
    "val_distinct_1": 0.2, "val_length_ratio": 0.98, "val_empty": 0, "val_bits_per_byte": None, "distinct_1": None,
    "distinct_2": None,
}  # fmt: skip


def falling(final: float, seconds: float = 100.0, speed: float = 4.0) -> list[tuple[int, float, float]]:
    """(step, seconds, PPL) of a plausible validation curve that ends near ``final``."""
    return [(s, seconds * s / 1000, final * math.exp(3 * math.exp(-speed * s / 300))) for s in STEPS]


def bins(sharpness: float, tokens: int = 200_000) -> dict:
    """300 base bins with a humped count; accuracy is confidence ** sharpness, so 1 is calibrated."""
    weight = [(c := (k + 0.5) / 300) * math.exp(-4 * c) + 0.02 for k in range(300)]
    count = [round(tokens * w / sum(weight)) for w in weight]
    centre = [(k + 0.5) / 300 for k in range(300)]
    correct = [round(n * c**sharpness) for n, c in zip(count, centre, strict=True)]
    return {
        "count": count,
        "confidence_sum": [n * c for n, c in zip(count, centre, strict=True)],
        "correct_sum": correct,
    }


def bands(nll: float) -> dict:
    """What summary.json says of targets by how often the training text has them."""
    found = {}
    for name, least, most, more in (("frequent", 5000, 90000, -1.0), ("middle", 60, 4999, 0.2), ("rare", 0, 59, 0.8)):
        numbers = {"tokens": 66_000, "nll": nll + more, "ece10": 0.05, "accuracy": 0.3, "confidence": 0.25}
        of_set = numbers | {f"{key}_t": value for key, value in numbers.items() if key != "tokens"}
        found[name] = {"times": [least, most], "types": most - least, "val": of_set}
    return found


def write_run(folder: Path, *, config=None, summary=None, curve=None, events=(), samples=(), sharpness=1.3, env=None):
    """A run folder as a training script leaves it; ``summary=None`` leaves it unfinished."""
    folder.mkdir(parents=True)
    config = CONFIG | {"out": str(folder)} | (config or {})
    curve = falling(30.0) if curve is None else curve
    ece, wobble, rows = (summary or {}).get("val_ece10", 0.04), 0.02 * config["seed"], []
    for step, seconds, ppl in curve:
        ramp = min(1.0, step / max(config["warmup"] * config["steps"], 1)) if config["loss"] == "dpsm" else 0.0
        shared = {
            "step": step,
            "tokens": step * 2048,
            "train_seconds": seconds,
            "nll": math.log(ppl),
            "ppl": ppl,
            "ece10": ece * (1 + 2 * math.exp(-step / 150) + wobble * math.sin(step)),
            "brier": 0.8,
            "accuracy": 0.3,
        }
        rates = {"lr": 1e-3 * (1 - step / 1100), "grad_norm": 0.5 + 300 / step, "clip_rate": 50 / step, "alpha": ramp}
        rows.append({"kind": "train", "loss": (1 - ramp) * math.log(ppl) + 0.8 * ramp, **shared, **rates})
        rows.append({"kind": "val", "bits_per_byte": math.log2(ppl) / 4, **shared})
    rows += [{"kind": "event", **event} for event in events]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT | (env or {})))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if summary is not None:
        step, seconds, ppl = curve[-1]
        values = {
            "loss": config["loss"], "seed": config["seed"], "steps": step, "tokens_seen": step * 2048, "divergences": 0,
            "val_nll": math.log(ppl), "val_ppl": ppl, "val_bits_per_byte": math.log2(ppl) / 4, "val_brier": 0.8,
            "val_ece10": 0.04, "val_ece100": 0.041, "val_ece10_mass": 0.039, "val_spherical": 0.5, "val_accuracy": 0.3,
            "temperature": 1.1, "val_nll_t": math.log(ppl) - 0.01, "val_ppl_t": 0.99 * ppl, "val_ece10_t": 0.01,
            "val_ece100_t": 0.012, "val_brier_t": 0.79, "val_accuracy_t": 0.3, "test_nll": None, "test_ppl": None,
            "tokens_per_second": 20000.0, "ms_per_step_median": 102.4, "peak_memory_bytes": 1_000_000_000,
            "train_seconds": seconds, "flops_per_token": 6e7, "mfu": None, "energy_joules": None, "distinct_1": 0.41,
            "distinct_2": 0.83, "bands": bands(math.log(ppl)),
        }  # fmt: skip
        (folder / "summary.json").write_text(json.dumps(values | summary))
        both = {"raw": bins(sharpness), "scaled": bins(1.02)}
        both |= {band: bins(sharpness + more) for band, more in (("frequent", -0.3), ("middle", 0.0), ("rare", 0.5))}
        (folder / "calibration.json").write_text(json.dumps({"val": both, "test": None}))
        (folder / "samples.json").write_text(json.dumps(list(samples)))
    return folder


def arms_of(*folders) -> list[compare.Arm]:
    return compare.group_arms([compare.load_run(folder) for folder in folders])[0]


def three_losses(root: Path, seeds=(1, 2, 3)) -> list[Path]:
    """CE, Brier and DPSM over ``seeds``, with seed noise; DPSM calibrated like Brier, a little behind CE in PPL."""
    folders = []
    for seed in seeds:
        noise = 0.02 * (seed - 2)
        for loss, final, speed, ece in (("ce", 30, 4.0, 0.04), ("brier", 36, 2.6, 0.0202), ("dpsm", 30.2, 3.8, 0.0204)):
            text = f"a fixture's text of {loss} <b>&amp;</b> | pipe\nsecond line " + "words and more words " * 12
            samples = [{"prompt": "The <river> & the|hill", "text": text}, {"prompt": "Second prompt", "text": text}]
            curve = falling(final + noise * (1 + (loss == "dpsm")), 100 + 3 * (loss == "dpsm") + seed, speed)
            summary = {"val_ece10": ece + 0.01 * noise, "val_brier": 0.8 - 0.01 * (loss != "ce")}
            sharpness = {"ce": 1.35, "brier": 1.05, "dpsm": 1.08}[loss]
            config = {"loss": loss, "seed": seed}
            folder = root / f"{loss}-s{seed}"
            write_run(folder, config=config, summary=summary, curve=curve, samples=samples, sharpness=sharpness)
            folders.append(folder)
    return folders


def pairs(root: Path, ce: list[dict], other: list[dict], loss: str = "dpsm") -> list[compare.Arm]:
    """A CE arm and one of ``loss``, a summary a seed."""
    folders = [write_run(root / f"ce{i}", config={"seed": i}, summary=s) for i, s in enumerate(ce)]
    folders += [write_run(root / f"o{i}", config={"seed": i, "loss": loss}, summary=s) for i, s in enumerate(other)]
    return arms_of(*folders)


def row(table: tables.Table, label: str) -> dict[str, tables.Cell]:
    """Column name and unit -> cell, of one arm."""
    names = [f"{cell.text} {cell.sub}".replace("\u00a0", " ").strip() for cell in table.head]
    line = next(line for line in table.rows if line[0].text == label)
    return dict(zip(names, line, strict=True))


def judged(n: int, arms: list[compare.Arm]) -> claims.Verdict:
    return next(v for v in claims.verdicts(arms) if v.criterion.number == n)
