"""The report says what the run folders hold: tables, verdicts, labels, one self-contained page, one-line errors.

The run folders here are fixtures: invented numbers, round where a test computes with them.
"""

import base64
import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from eval.calibration import Calibration
from eval.report import build as rp
from eval.report import claims, plots, tables, terminal
from eval.report import runs as compare

ROOT = Path(__file__).resolve().parents[2]
STEPS = (100, 200, 300, 400, 500, 600, 700, 800, 900, 1000)
CONFIG = {
    "script": "train_lm.py", "out": "", "seed": 1, "data": "fixture", "tokenizer": "gpt2", "seq_len": 128,
    "model": "nano", "loss": "ce", "warmup": 0.1, "alpha_schedule": "linear", "alpha_max": 1.0, "gamma": 2.0,
    "eps": 0.1, "tail_smoothing": 0.0, "steps": 1000, "batch": 16, "lr": 0.001, "dtype": "auto", "wandb": "",
    "log_every": 50,
}  # fmt: skip
ENVIRONMENT = {
    "time": "2025-01-02T03:04:05+00:00", "command": "train_lm.py --fixture", "python": "3.11.0", "world_size": 1,
    "device": "fixture device", "packages": {"torch": "0.0", "triton": None}, "git_commit": "f1x7u2e" * 5,
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


def write_run(folder: Path, *, config=None, summary=None, curve=None, events=(), samples=(), sharpness=1.3, env=None):
    """A run folder as a training script leaves it; ``summary=None`` leaves it unfinished."""
    folder.mkdir(parents=True)
    config = CONFIG | {"out": str(folder)} | (config or {})
    curve = falling(30.0) if curve is None else curve
    ece, wobble, rows = (summary or {}).get("val_ece10", 0.04), 0.02 * config["seed"], []
    for step, seconds, ppl in curve:
        ramp = min(1.0, step / max(config["warmup"] * config["steps"], 1)) if config["loss"] == "dpsm" else 0.0
        shared = {
            "step": step, "tokens": step * 2048, "train_seconds": seconds, "nll": math.log(ppl), "ppl": ppl,
            "ece10": ece * (1 + 2 * math.exp(-step / 150) + wobble * math.sin(step)), "brier": 0.8, "accuracy": 0.3,
        }  # fmt: skip
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
            "distinct_2": 0.83,
        }  # fmt: skip
        (folder / "summary.json").write_text(json.dumps(values | summary))
        both = {"raw": bins(sharpness), "scaled": bins(1.02)}
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


def criterion(n: int) -> claims.Criterion:
    return next(c for c in claims.CRITERIA if c.number == n)


def judged(n: int, arms: list[compare.Arm]) -> claims.Verdict:
    return next(v for v in claims.verdicts(arms) if v.criterion.number == n)


# ----------------------------------------------------------------------------------------------
# runs and arms


def test_seed_and_bookkeeping_do_not_make_an_arm_but_a_setting_does(tmp_path):
    same = [{"seed": 1}, {"seed": 2, "out": "elsewhere", "wandb": "p", "log_every": 7}, {"seed": 3, "warmup": 0.9}]
    folders = [write_run(tmp_path / f"same{i}", config=c, summary={}) for i, c in enumerate(same)]
    (arm,) = arms_of(*folders)  # CE does not read warmup
    assert arm.label == "ce" and [run.seed for run in arm.runs] == [1, 2, 3]
    low = write_run(tmp_path / "low", config={"lr": 3e-4}, summary={})
    assert [arm.label for arm in arms_of(*folders, low)] == ["ce lr=0.0003", "ce lr=0.001"]
    small = write_run(tmp_path / "small", config={"batch": 8}, summary={})
    assert [arm.label for arm in arms_of(*folders, small)] == ["ce batch=8", "ce batch=16"]  # as numbers


def test_labels_name_only_what_differs_within_a_loss_in_numeric_order(tmp_path):
    configs = [{"loss": "dpsm", "warmup": w, "alpha_schedule": s} for w, s in ((0.3, "linear"), (0.05, "linear"))]
    configs += [
        {"loss": "dpsm", "warmup": 0.7, "alpha_schedule": "fixed"},
        {"loss": "brier", "lr": 0.01},
        {"loss": "ce"},
    ]
    arms = arms_of(*(write_run(tmp_path / str(i), config=c, summary={}) for i, c in enumerate(configs)))
    assert [arm.label for arm in arms] == [
        "ce",
        "brier",  # another lr than the others, but the only Brier arm
        "dpsm warmup=0.05 alpha_schedule=linear",
        "dpsm warmup=0.3 alpha_schedule=linear",
        "dpsm warmup=- alpha_schedule=fixed",  # a fixed alpha has no warm-up
    ]
    plots.assign_colours(arms)
    assert len({arm.colour for arm in arms}) == len(arms)


def test_long_values_that_end_alike_keep_their_labels_apart(tmp_path):
    configs = [{"init_from": f"{x}/a/long/path/to/some/checkpoint"} for x in "ab"]
    arms = arms_of(*(write_run(tmp_path / str(i), config=c, summary={}) for i, c in enumerate(configs)))
    assert len({arm.label for arm in arms}) == 2


def test_one_run_given_twice_counts_once_and_a_repeated_seed_is_left_out_loudly(tmp_path):
    a = write_run(tmp_path / "a", summary={})
    b = write_run(tmp_path / "b", summary={})
    arms, warnings = compare.group_arms([compare.load_run(a), compare.load_run(f"{a}/../a")])
    assert len(arms[0].runs) == 1 and not warnings
    arms, warnings = compare.group_arms([compare.load_run(a), compare.load_run(b)])
    assert [run.path for run in arms[0].runs] == [b]
    assert len(warnings) == 1 and f"{a} repeats seed 1 of {b}" in warnings[0]


def test_rows_before_a_return_to_a_checkpoint_are_replaced(tmp_path):
    folder = write_run(tmp_path / "run", summary={}, curve=[(100, 1, 50), (200, 2, 40), (300, 3, 35)])
    with open(folder / "metrics.jsonl", "a") as f:
        f.write(json.dumps({"kind": "event", "step": 100, "event": "resumed"}) + "\n")
        f.write(json.dumps({"kind": "val", "step": 200, "train_seconds": 2.5, "ppl": 41}) + "\n")
    run = compare.load_run(folder)
    assert run.curve() == [(1, 50), (2.5, 41)]
    assert [row["step"] for row in run.train] == [100, 200, 300]  # each kind on its own


# ----------------------------------------------------------------------------------------------
# roles of flags


ROLES = {"prompt": "knob", "eval_batch": "where", "seed": "bookkeeping", "out": "where", "loss": "knob", "lr": "knob",
         "micro_batch": "system", "gamma": "knob", "schedule": "knob", "fot_window": "knob"}  # fmt: skip
ROLES |= dict.fromkeys(("format", "base", "loss_on", "heldout", "eval_problems", "generate_tokens", "steps"), "setting")
ONLY = {"gamma": {"loss": ["focal"]}, "fot_window": {"schedule": ["fot", "snac"]}}
GSM8K = {"script": "finetune_gsm8k.py", "prompt": "chat", "eval_batch": 64, "format": "text", "base": "nf4",
         "loss_on": "answer", "heldout": 256, "eval_problems": 0, "generate_tokens": 256, "micro_batch": 16,
         "schedule": "cosine", "fot_window": 32}  # fmt: skip


def gsm8k_run(folder: Path, new: bool = True, only=ONLY, env=None, **config) -> Path:
    """A finished run of finetune_gsm8k.py; ``new``: its folder says its flags' roles."""
    dtype = config.pop("ran_in", None)
    write_run(folder, config=GSM8K | config, summary={"dtype": dtype} if dtype else {}, env=env)
    if new:
        flags = {flag: {"role": role, "only": only.get(flag, {})} for flag, role in ROLES.items()}
        (folder / "flags.json").write_text(json.dumps(flags))
    return folder


def test_another_prompt_is_another_arm_and_another_batch_of_answers_is_none(tmp_path):
    """The report was wrong here once: one of two prompts was dropped as a repeated seed."""
    chat, plain = gsm8k_run(tmp_path / "chat"), gsm8k_run(tmp_path / "plain", prompt="plain")
    arms, warnings = compare.group_arms([compare.load_run(p) for p in (chat, plain)])
    assert [arm.label for arm in arms] == ["ce prompt=chat", "ce prompt=plain"] and not warnings
    assert not any("NOT COMPARABLE" in w for w in rp.find_warnings(arms))
    wide = gsm8k_run(tmp_path / "wide", eval_batch=128, seed=2)
    (arm,) = arms_of(chat, wide)
    assert [run.seed for run in arm.runs] == [1, 2]


@pytest.mark.parametrize("flag, value", [
    ("format", "code"), ("base", "bf16"), ("loss_on", "all"), ("heldout", 64), ("eval_problems", 32),
    ("generate_tokens", 512), ("script", "other.py"),
])  # fmt: skip
def test_arms_that_differ_in_a_setting_are_not_comparable(tmp_path, flag, value):
    other = gsm8k_run(tmp_path / "other", loss="dpsm", **{flag: value})
    arms = arms_of(gsm8k_run(tmp_path / "one"), other)
    says = f"NOT COMPARABLE: the arms differ in {flag} ({GSM8K[flag]}: ce; {value}: dpsm)"
    assert any(w.startswith(says) for w in rp.find_warnings(arms))
    assert judged(1, arms).verdict.startswith(f"not comparable: {flag} ")


def test_speed_is_not_compared_across_dtypes_and_flags_of_the_system(tmp_path):
    def differences(**config):
        folder = tmp_path / "-".join(map(str, config.values()))
        return compare.system_differences(*arms_of(one, gsm8k_run(folder, loss="dpsm", **config)))

    one = gsm8k_run(tmp_path / "one", ran_in="bfloat16")
    assert differences(ran_in="float32") == ["dtype"] and differences(ran_in="bfloat16") == []
    assert differences(seed=5) == []  # an older summary does not say it
    assert differences(ran_in="bfloat16", micro_batch=4) == ["micro_batch"]
    assert differences(ran_in="float32", micro_batch=8, env={"world_size": 2}) == ["micro_batch", "device", "dtype"]


def test_a_flag_that_nothing_reads_makes_no_arm_and_no_label(tmp_path):
    same = [gsm8k_run(tmp_path / f"s{i}", seed=i, fot_window=w, gamma=w) for i, w in enumerate((16, 32))]
    fots = [gsm8k_run(tmp_path / f"f{w}", schedule="fot", fot_window=w) for w in (16, 32)]
    assert [a.label for a in arms_of(*same, fots[0])] == ["ce schedule=cosine", "ce schedule=fot"]
    labels = [a.label for a in arms_of(*same, *fots)]
    assert labels == [
        "ce schedule=cosine fot_window=-",
        "ce schedule=fot fot_window=16",
        "ce schedule=fot fot_window=32",
    ]
    focal = gsm8k_run(tmp_path / "focal", loss="focal", gamma=3)
    assert [a.label for a in arms_of(*same, focal)] == ["ce", "focal"]


def test_folders_without_roles_keep_their_meaning_and_a_run_that_knows_a_flag_decides(tmp_path):
    old = [gsm8k_run(tmp_path / f"old{p}", new=False, prompt=p, seed=i) for i, p in enumerate(("chat", "plain"))]
    assert len(arms_of(*old)) == 1  # of before: prompt was bookkeeping, and format a knob
    other = gsm8k_run(tmp_path / "code", new=False, format="code", seed=7)
    assert compare.setting_differences(*arms_of(old[0], other)) == []
    new = gsm8k_run(tmp_path / "new", seed=9, prompt="chat")
    assert {a.label: len(a.runs) for a in arms_of(*old, new)} == {"ce prompt=chat": 2, "ce prompt=plain": 1}
    assert [k for k in compare.setting_differences(*arms_of(new, other))] == ["format"]
    lm = write_run(tmp_path / "lm", config={"prompt": "x", "seed": 3}, summary={})  # another script's prompt
    same = write_run(tmp_path / "lm2", config={"prompt": "y", "seed": 4}, summary={})
    assert len([a for a in arms_of(new, lm, same) if a.config["script"] == "train_lm.py"]) == 1


def test_roles_before_are_roles():
    flags = compare.roles_before()
    assert len(flags) > 50 and {about["role"] for about in flags.values()} <= set(compare.ROLES)
    assert all(other in ("loss", "schedule", "alpha_schedule") for about in flags.values() for other in about["only"])


# ----------------------------------------------------------------------------------------------
# the code that ran


TRAIN = '"""Trains."""\nimport math\n\n\ndef main(lr=1e-3):\n    """Runs."""\n    return math.sin(lr)\n'


def ran(folder: Path, seed: int, text: str = TRAIN, *, loss: str = "ce", **more: str) -> Path:
    """A run that keeps its source: train_lm.py and model/gpt2.py."""
    write_run(folder, config={"seed": seed, "loss": loss}, summary={})
    for name, code in ({"train_lm.py": text, "model/gpt2.py": "WIDTH = 768\n"} | more).items():
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "source" / name).write_text(code)
    return folder


def test_a_hacked_script_is_an_arm_of_its_own_and_not_another_seed(tmp_path):
    runs = [ran(tmp_path / f"r{s}", s) for s in (1, 2)]
    hacked = ran(tmp_path / "hacked", 3, TRAIN.replace("sin", "cos"))
    arms, warnings = compare.group_arms([compare.load_run(p) for p in (*runs, hacked)])
    assert [(a.label, len(a.runs)) for a in arms] == [("ce", 2), ("ce, other train_lm.py", 1)] and not warnings
    (says,) = rp.code_warnings(arms)
    assert says.startswith("OTHER CODE") and "train_lm.py differs" in says
    assert all(str(p) in says for p in (*runs, hacked))
    same_seed = ran(tmp_path / "again", 1, TRAIN.replace("sin", "cos"))  # the same seed is no repetition
    first = [a.label for a in arms_of(hacked, *runs, same_seed)]
    assert sorted(first) == ["ce", "ce, other train_lm.py"]
    deep = ran(tmp_path / "deep", 4, TRAIN.replace("1e-3", "1"), **{"model/gpt2.py": "WIDTH = 2"})
    labels = [a.label for a in arms_of(*runs, deep)]
    assert labels == ["ce", "ce, other model/gpt2.py and 1 more"]


@pytest.mark.parametrize("text", [
    TRAIN.replace("import math\n", "import math  # for the sine\n\n# A comment\n"),
    TRAIN.replace("lr=1e-3", "\n    lr=0.001,\n").replace("    return", "\n    return"),
    TRAIN.replace('"""Trains."""', "'A longer docstring.'").replace('    """Runs."""\n', ""),
])  # fmt: skip
def test_comments_formatting_and_docstrings_are_no_difference(tmp_path, text):
    arms, warnings = compare.group_arms([compare.load_run(ran(tmp_path / n, s, t)) for n, s, t in
                                         (("a", 1, TRAIN), ("b", 2, text))])  # fmt: skip
    assert [len(a.runs) for a in arms] == [2] and not warnings and not rp.find_warnings(arms)


def test_only_files_that_both_have_are_compared(tmp_path):
    bare = write_run(tmp_path / "bare", config={"seed": 4}, summary={})  # no source/, as in old records
    flat = ran(tmp_path / "flat", 5, **{"losses.py": "ce = 1"})
    deep = ran(tmp_path / "deep", 6, **{"kernels/losses.py": "ce = 2"})
    assert [len(a.runs) for a in arms_of(bare, flat, deep)] == [3]


def test_a_file_that_is_no_python_is_compared_as_text(tmp_path):
    broken = [ran(tmp_path / f"{s}", s, text) for s, text in enumerate(("if:", "if:", "if :"))]
    assert sorted(len(a.runs) for a in arms_of(*broken)) == [1, 2]


def test_arms_that_are_compared_and_ran_other_code_are_said(tmp_path):
    ces = [ran(tmp_path / f"ce{s}", s) for s in (1, 2)]
    dpsm = ran(tmp_path / "dpsm", 1, TRAIN.replace("sin", "cos"), loss="dpsm")
    arms = arms_of(*ces, dpsm)
    assert [a.label for a in arms] == ["ce", "dpsm"]
    (says,) = (w for w in rp.find_warnings(arms) if w.startswith("OTHER CODE"))
    assert "dpsm ran another train_lm.py" in says
    hacked = ran(tmp_path / "hacked", 1, TRAIN.replace("sin", "cos"))
    assert judged(1, arms_of(*ces, dpsm, hacked)).against == "ce, other train_lm.py"  # which ran what dpsm ran
    page = rp.build([*ces, hacked])
    assert any("OTHER CODE" in w for w in page.warnings)


def test_broken_roles_are_one_line(tmp_path):
    run = gsm8k_run(tmp_path / "run")
    (run / "flags.json").write_text('{"lr": {"role": "knbo", "only": {}}}')
    with pytest.raises(ValueError, match="flags.json: lr has no role"):
        compare.load_run(run)


# ----------------------------------------------------------------------------------------------
# tables


def test_final_table_holds_mean_and_sd_in_the_units_of_its_head(tmp_path):
    summaries = [
        {
            "val_ppl": ppl,
            "val_ece10": ece,
            "val_accuracy": 0.25,
            "val_nll_t": 3.0,
            "val_ppl_t": ppl - 1,
            "test_ppl": 50.0,
        }
        for ppl, ece in ((30, 0.03), (31, 0.04), (32, 0.05))
    ]
    folders = [write_run(tmp_path / f"{i}", config={"seed": i}, summary=s) for i, s in enumerate(summaries)]
    folders.append(write_run(tmp_path / "one", config={"loss": "brier"}, summary={"val_spherical": None}))
    arms = arms_of(*folders)
    table = tables.final_table(arms, "val")
    ce, brier = row(table, "ce"), row(table, "brier")
    # By hand: mean and sd of 30, 31, 32 are 31 and 1; of 3, 4, 5 %, 4 and 1.
    assert ce["PPL per token ↓"][:2] == ("31.00", "± 1.00")
    assert ce["ECE 10 bins, % ↓"][:2] == ("4.00", "± 1.00")
    assert ce["Accuracy % ↑"][:2] == ("25.00", "± 0.00") and ce["seeds"].text == "3"
    assert brier["PPL per token ↓"][:2] == ("30.00", "") and brier["Spherical loss, 0 to 1 ↓"].text == "-"
    after = row(table, "ce + temperature")
    assert after["PPL per token ↓"].text == "30.00" and after["NLL nats per token ↓"].text == "3.0000"
    assert after["ECE 10 bins, % ↓"].text == "1.00" and after["T fitted"].text == ce["T fitted"].text == "1.100"
    assert after["ECE 10 equal-mass bins, % ↓"].text == "-"
    assert row(tables.final_table(arms, "test"), "ce")["PPL per token ↓"].text == "50.00"
    assert tables.final_table(arms, "ood") is None


def test_a_seed_without_a_value_is_said(tmp_path):
    arms = pairs(tmp_path, [{"val_brier": 0.5}, {"val_brier": 0.7}, {"val_brier": None}], [])
    assert row(tables.final_table(arms, "val"), "ce")["Brier 0 to 2 ↓"][:2] == ("0.6000", "± 0.1414, n = 2")


@pytest.mark.parametrize(
    ("ours", "expected"),
    [
        ((29.0, 29.1), "dpsm"),  # 1 apart, sd 0.07 each
        ((29.9, 29.3), None),  # apart by less than the two sds
        ((29.0,), None),  # one seed has no sd
    ],
)
def test_best_is_bold_only_where_seeds_separate_it(tmp_path, ours, expected):
    theirs = [{"val_ppl": v, "val_ppl_t": v, "val_nll_t": None} for v in (30.0, 30.1)]
    table = tables.final_table(pairs(tmp_path, theirs, [{"val_ppl": v} for v in ours]), "val")
    bold = [line[0].text for line in table.rows if line[2].bold]
    assert bold == ([expected] if expected else [])


def test_nothing_is_bold_across_settings(tmp_path):
    folders = [write_run(tmp_path / f"a{s}", config={"seed": s}, summary={"val_ppl": 30 + s / 100}) for s in (1, 2)]
    configs = [{"seed": s, "loss": "dpsm", "steps": 2000} for s in (1, 2)]
    folders += [write_run(tmp_path / f"b{c['seed']}", config=c, summary={"val_ppl": 20.0}) for c in configs]
    assert not any(cell.bold for line in tables.final_table(arms_of(*folders), "val").rows for cell in line)


def test_differences_from_ce_are_paired_by_seed_and_holm_corrected(tmp_path):
    keys = {"val_ppl_t": None, "val_nll_t": None}  # no CE + temperature row: two arms in the column
    folders = [write_run(tmp_path / f"c{s}", config={"seed": s}, summary={"val_ppl": 30 + s, **keys}) for s in range(3)]
    folders.append(write_run(tmp_path / "c9", config={"seed": 9}, summary={"val_ppl": 99, **keys}))  # CE alone
    deltas = {"dpsm": (0.1, 0.2, 0.3), "brier": (2, 5, 2)}
    for loss, values in deltas.items():
        for s in (2, 0, 1):  # in another order than CE's
            config, summary = {"seed": s, "loss": loss}, {"val_ppl": 30 + s + values[s], **keys}
            folders.append(write_run(tmp_path / f"{loss}{s}", config=config, summary=summary))
    table = tables.delta_table(arms_of(*folders))
    # t = mean / (sd / sqrt 3) is 0.2 / (0.1 / sqrt 3) = 3.464 and 3 / (sqrt 3 / sqrt 3) = 3. With 2 degrees of freedom
    # p = 1 - t / sqrt(t^2 + 2): 0.0742 and 0.0955. Holm: the smaller doubles, the larger may not be smaller than that.
    assert row(table, "dpsm")["PPL per token ↓"][:2] == ("+0.20 ± 0.10", "p = 0.148")
    assert row(table, "brier")["PPL per token ↓"][:2] == ("+3.00 ± 1.73", "p = 0.148")
    assert row(table, "dpsm")["NLL after T nats per token ↓"].text == "-" and row(table, "dpsm")["pairs"].text == "3"


def test_no_differences_without_two_pairs(tmp_path):
    bare = {"val_nll_t": None}  # no CE + temperature row, which has a pair in every seed
    assert tables.delta_table(pairs(tmp_path, [bare, bare], [bare])) is None


def test_cost_is_beside_ces_and_unmeasured_is_a_dash(tmp_path):
    table = tables.cost_table(
        pairs(tmp_path, [{}], [{"tokens_per_second": 19000.0, "peak_memory_bytes": 1_250_000_000}])
    )
    line = row(table, "dpsm")
    assert line["throughput tokens/s ↑"][:2] == ("19,000", "0.950 × CE")
    assert line["peak memory MB = 1e6 bytes ↓"][:2] == ("1,250", "1.250 × CE")
    assert line["MFU % ↑"][:2] == ("-", "") and line["energy kJ ↓"].text == "-"
    assert row(table, "ce")["throughput tokens/s ↑"][:2] == ("20,000", "")


# ----------------------------------------------------------------------------------------------
# the claims


@pytest.mark.parametrize(
    ("n", "key", "ce", "dpsm", "value", "holds"),
    [
        (1, "val_ppl", 30.0, 30.25, 0.25, "yes"),
        (1, "val_ppl", 30.0, 30.35, 0.35, "no"),
        (1, "val_ppl", 30.0, 25.0, -5.0, "yes"),  # better than CE is within
        (2, "val_ece10", 0.04, 0.03, -25.0, "yes"),  # the threshold itself
        (2, "val_ece10", 0.04, 0.031, -22.5, "no"),
        (5, "tokens_per_second", 20000.0, 19700.0, -1.5, "yes"),
        (5, "tokens_per_second", 20000.0, 19000.0, -5.0, "no"),
        (6, "peak_memory_bytes", 10**9, 10**9 + 499 * 10**6, 499.0, "yes"),
        (6, "peak_memory_bytes", 10**9, 10**9 + 512 * 2**20, 536.870912, "no"),  # MB is 1e6 bytes
    ],
)
def test_one_seed_shows_the_value_and_is_not_powered(tmp_path, n, key, ce, dpsm, value, holds):
    v = judged(n, pairs(tmp_path, [{key: ce}], [{key: dpsm}]))
    assert v.values == pytest.approx([value], rel=1e-9)  # double rounding of a difference or ratio
    assert (v.holds, v.verdict) == (holds, "not powered")


@pytest.mark.parametrize(
    ("deltas", "holds", "verdict"),
    [
        ((0.10, 0.12, 0.11), "yes", "met"),
        ((0.50, 0.52, 0.51), "no", "not met"),
        ((0.10, 0.30, 0.45), "yes", "not powered"),  # mean 0.28, the interval holds 0.3
        ((0.20, 0.30, 0.55), "no", "not powered"),
    ],
)
def test_several_seeds_are_judged_by_their_interval(tmp_path, deltas, holds, verdict):
    ce = [{"val_ppl": 30.0 + i} for i in range(3)]
    arms = pairs(tmp_path, ce, [{"val_ppl": 30.0 + i + d} for i, d in enumerate(deltas)])
    v = judged(1, arms)
    assert v.values == pytest.approx(list(deltas)) and (v.holds, v.verdict) == (holds, verdict)


def test_ece_is_compared_with_brier_and_with_ce_after_temperature(tmp_path):
    folders = [
        write_run(tmp_path / "ce", summary={"val_ece10": 0.04, "val_ece10_t": 0.016, "val_nll_t": 3.30}),
        write_run(tmp_path / "brier", config={"loss": "brier"}, summary={"val_ece10": 0.0200}),
        write_run(tmp_path / "dpsm", config={"loss": "dpsm"}, summary={"val_ece10": 0.0208, "val_nll_t": 3.29}),
    ]
    arms = arms_of(*folders)
    third, seventh, eighth = (judged(n, arms) for n in (3, 7, 8))
    assert third.values == pytest.approx([4.0]) and third.holds == "yes" and third.against == "brier"
    assert seventh.values == pytest.approx([30.0]) and (seventh.holds, seventh.verdict) == ("no", "information")
    assert eighth.values == pytest.approx([-0.01]) and (eighth.holds, eighth.verdict) == ("yes", "information")


def test_time_to_quality_is_interpolated_in_log_ppl():
    curve = [(0, 1000.0), (10, 10.0), (20, 20.0), (30, 5.0)]
    assert claims.time_to(curve, 100.0) == pytest.approx(5.0)  # half way from 1000 to 10 in the logarithm
    assert claims.time_to(curve, 10.0) == 10  # the first crossing, whatever comes after
    assert claims.time_to(curve, 2000.0) == 0  # there from the start
    assert claims.time_to(curve, 4.0) is None and claims.time_to([], 4.0) is None


@pytest.mark.parametrize(
    ("curve", "value", "holds"),
    [
        ([(1, 10, 80.0), (2, 20, 20.0), (3, 30, 19.9)], 100.0, "yes"),
        ([(1, 10, 80.0), (2, 30, 20.0), (3, 40, 19.9)], 150.0, "no"),
        ([(1, 10, 80.0), (2, 18, 40.0), (3, 26, 10.0)], 110.0, "yes"),  # half way from 40 to 10: at 22 s, the limit
        ([(1, 10, 80.0), (2, 20, 21.0), (3, 30, 20.5)], math.inf, "no"),
    ],
)
def test_time_to_95_percent_of_ces_quality(tmp_path, curve, value, holds):
    ce = write_run(
        tmp_path / "ce", summary={}, curve=[(1, 10, 40.0), (2, 20, 20.0), (3, 30, 19.0)]
    )  # level 19 / 0.95 = 20
    dpsm = write_run(tmp_path / "dpsm", config={"loss": "dpsm"}, summary={}, curve=curve)
    v = judged(4, arms_of(ce, dpsm))
    assert v.values == pytest.approx([value]) and (v.holds, v.verdict) == (holds, "not powered")
    assert ("never" in v.value) == (value == math.inf)


def test_a_level_never_reached_by_one_of_two_seeds_is_not_met(tmp_path):
    slow, fast = [(1, 10, 80.0), (2, 20, 50.0)], [(1, 10, 80.0), (2, 20, 19.0)]
    folders = [write_run(tmp_path / f"c{s}", config={"seed": s}, summary={}, curve=fast) for s in (1, 2)]
    for s, curve in ((1, fast), (2, slow)):
        folders.append(write_run(tmp_path / f"d{s}", config={"seed": s, "loss": "dpsm"}, summary={}, curve=curve))
    v = judged(4, arms_of(*folders))
    assert (v.value, v.holds, v.verdict) == ("never reached by 1 of 2", "no", "not met")


def test_seeds_that_failed_are_counted_beside_those_that_did_not(tmp_path):
    folders = [write_run(tmp_path / f"c{s}", config={"seed": s}, summary={}) for s in (1, 2, 3, 4)]
    for s, summary in ((1, {}), (2, {}), (3, {"val_ppl": None})):
        folders.append(write_run(tmp_path / f"d{s}", config={"seed": s, "loss": "dpsm"}, summary=summary))
    diverged = [{"step": 500, "event": "diverged"}]
    folders.append(write_run(tmp_path / "d4", config={"seed": 4, "loss": "dpsm"}, events=diverged))
    arms = arms_of(*folders)
    v = judged(1, arms)
    assert len(v.values) == 2 and v.count == "2 of 4"
    assert tables.verdict_table([v]).rows[0][4].sub == "n = 2 of 4"
    assert any("d4, diverged at step 1000" in w for w in rp.find_warnings(arms))


def test_rows_without_their_arm_say_which_run_is_missing(tmp_path):
    ce = write_run(tmp_path / "ce", summary={})
    dpsm = write_run(tmp_path / "dpsm", config={"loss": "dpsm"}, summary={})
    other_seed = write_run(tmp_path / "dpsm7", config={"loss": "dpsm", "seed": 7}, summary={})
    brier = write_run(tmp_path / "brier", config={"loss": "brier"})  # unfinished
    assert judged(3, arms_of(ce, dpsm)).verdict == "missing: no run with --loss brier"
    assert judged(3, arms_of(ce, dpsm, brier)).verdict == "missing: no finished run with --loss brier"
    assert judged(1, arms_of(dpsm)).verdict == "missing: no run with --loss ce"
    assert {v.verdict for v in claims.verdicts(arms_of(ce))} == {"missing: no run with --loss dpsm"}
    assert judged(1, arms_of(ce, other_seed)).verdict == "missing: no seed that both arms finished"
    assert judged(6, pairs(tmp_path / "p", [{"peak_memory_bytes": None}], [{}])).verdict == "not measured"


def test_arms_of_different_settings_are_not_compared(tmp_path):
    ce = write_run(tmp_path / "ce", config={"steps": 500}, summary={})
    dpsm = write_run(tmp_path / "dpsm", config={"loss": "dpsm"}, summary={})
    arms = arms_of(ce, dpsm)
    v = judged(1, arms)
    assert (v.verdict, v.value, v.holds) == ("not comparable: steps 1000 / 500", "-", "-")
    assert any(w.startswith("NOT COMPARABLE") and "steps (500: ce; 1000: dpsm)" in w for w in rp.find_warnings(arms))


def test_speed_is_not_compared_across_devices_but_quality_is(tmp_path):
    ce = write_run(tmp_path / "ce", summary={})
    dpsm = write_run(tmp_path / "dpsm", config={"loss": "dpsm"}, summary={}, env={"device": "another"})
    arms = arms_of(ce, dpsm)
    assert {judged(n, arms).verdict for n in (4, 5, 6)} == {"not comparable: device"}
    assert judged(1, arms).verdict == "not powered" and judged(1, arms).holds == "yes"
    assert row(tables.cost_table(arms), "dpsm")["throughput tokens/s ↑"].sub == ""
    assert any("Speed and memory are NOT COMPARABLE" in w and "device" in w for w in rp.find_warnings(arms))


def test_the_reference_has_the_same_setting_and_is_the_best_of_several(tmp_path):
    settings = [{"lr": 1e-3}, {"lr": 3e-4}, {"lr": 1e-4, "label_noise": 0.1}]
    nlls = (3.5, 3.4, 3.0)
    folders = [
        write_run(tmp_path / f"ce{i}", config=c, summary={"val_nll": nll})
        for i, (c, nll) in enumerate(zip(settings, nlls, strict=True))
    ]
    dpsm = write_run(tmp_path / "dpsm", config={"loss": "dpsm"}, summary={})
    assert judged(1, arms_of(*folders, dpsm)).against == "ce lr=0.0003 label_noise=-"


# ----------------------------------------------------------------------------------------------
# figures


def test_the_band_is_mean_and_range_over_the_steps_that_all_seeds_have(tmp_path):
    curves = ([(1, 10, 8.0), (2, 20, 4.0), (3, 30, 2.0)], [(1, 14, 6.0), (2, 22, 5.0)])
    folders = [write_run(tmp_path / f"{s}", config={"seed": s}, summary={}, curve=c) for s, c in enumerate(curves)]
    (arm,) = arms_of(*folders)
    assert plots.band(arm.runs, "val", "train_seconds", "ppl") == ([12, 21], [7, 4.5], [6, 4], [8, 5])


def test_the_first_points_do_not_squash_the_view(tmp_path):
    curve = [(100 * k, k, 50_000.0 if k == 1 else 60.0 - k) for k in range(1, 11)]
    (arm,) = arms_of(write_run(tmp_path / "run", summary={}, curve=curve))
    assert plots.frame([arm], "val", "ppl", skip=0.2) == (50.0, 57.0)


def test_reliability_adds_the_bins_up_and_averages_the_ece(tmp_path):
    folders = [
        write_run(tmp_path / f"{s}", config={"seed": s}, summary={}, sharpness=sharpness)
        for s, sharpness in ((1, 1.0), (2, 1.5))
    ]
    (arm,) = arms_of(*folders)
    curve, ece = plots.pooled(arm, "val", "raw", 10)
    each = [Calibration.from_bins(bins(sharpness)) for sharpness in (1.0, 1.5)]
    assert curve["count"] == [2 * n for n in each[0].reliability(10)["count"]]  # the same confidences, twice
    assert ece == pytest.approx((each[0].ece(10) + each[1].ece(10)) / 2, rel=1e-12)  # a mean of two doubles
    assert plots.pooled(arm, "test", "raw", 10) is None


def test_a_run_without_a_temperature_has_the_reliability_before_it_alone(tmp_path):
    folder = write_run(tmp_path / "run", summary={"temperature": None})
    (folder / "calibration.json").write_text(json.dumps({"val": {"raw": bins(1.3), "scaled": None}, "test": None}))
    (arm,) = arms_of(folder)
    assert set(arm.runs[0].calibration) == {("val", "raw")} and plots.pooled(arm, "val", "scaled", 10) is None
    assert plots.reliability([arm], "val").startswith(b"\x89PNG")


def test_a_grid_is_drawn_for_exactly_two_numeric_settings(tmp_path):
    def arms(name, configs):
        return arms_of(*(write_run(tmp_path / name / str(i), config=c, summary={}) for i, c in enumerate(configs)))

    two = arms("two", [{"loss": "dpsm", "lr": lr, "warmup": w} for lr in (1e-3, 2e-3) for w in (0.1, 0.3)])
    ((loss, x, y, cells, split),) = rp.grids(two)
    assert (loss, x, y, split) == ("dpsm", "warmup", "lr", "val") and set(cells) == {
        (0.1, 1e-3),
        (0.1, 2e-3),
        (0.3, 1e-3),
        (0.3, 2e-3),
    }
    assert cells[0.1, 1e-3] == {"ppl": pytest.approx(30.0, rel=1e-4), "ece10": 0.04}  # falling() ends near 30
    assert plots.heat_maps(loss, x, y, cells).startswith(b"\x89PNG")
    assert not rp.grids(arms("unset", [{"lr": lr, "clip": c} for lr in (1e-3, 2e-3) for c in (None, 1.0)]))
    assert not rp.grids(arms("one", [{"lr": lr} for lr in (1e-3, 2e-3)]))
    assert not rp.grids(arms("words", [{"lr": lr, "tokenizer": t} for lr in (1e-3, 2e-3) for t in ("gpt2", "bpe:64")]))


SUMMARY = {
    "val_examples": 200, "val_rouge1": 30.0, "val_rouge1_low": 29.0, "val_rouge1_high": 31.0, "val_rouge2": 10.0,
    "val_rougeL": 20.0, "val_rougeLsum": 25.0, "val_files2rouge_1": 30.1, "val_ended": 0.975, "val_words": 21.5,
    "val_distinct_1": 0.2, "val_length_ratio": 0.98, "val_empty": 0, "val_bits_per_byte": None, "distinct_1": None,
    "distinct_2": None,
}  # fmt: skip


def test_three_settings_of_summaries_make_a_grid_for_each_value_of_the_third(tmp_path):
    """recipes/seq2seq.toml's axes: ROUGE, ECE and NLL over learning rate and warm-up, one figure a label smoothing."""
    folders = []
    for lr in (1e-5, 3e-5, 5e-5):
        for eps in (0.0, 0.1):
            for w in (0.1, 0.2, 0.3):
                config = {"loss": "dpsm", "label_smoothing": eps, "warmup": w, "lr": lr}
                values = SUMMARY | {"val_rouge1": 30 + 1e5 * lr + w + eps}
                folders.append(write_run(tmp_path / f"{len(folders)}", config=config, summary=values))
    found = rp.grids(arms_of(*folders))
    assert [(g[0], g[1], g[2], g[4]) for g in found] == [
        ("dpsm, label_smoothing 0", "warmup", "lr", "val"),
        ("dpsm, label_smoothing 0.1", "warmup", "lr", "val"),
    ]
    for (*_, cells, _), eps in zip(found, (0.0, 0.1), strict=True):
        assert len(cells) == 9 and set(cells[0.2, 3e-5]) == {"rouge1", "rouge2", "rougeL", "rougeLsum", "ece10", "nll"}
        assert cells[0.2, 3e-5]["rouge1"] == pytest.approx(33.2 + eps) and cells[0.2, 3e-5]["ece10"] == 0.04
    assert plots.heat_maps(*found[0][:4], "validation").startswith(b"\x89PNG")
    nothing = {(0.1, 1e-5): {"rouge1": None, "ece10": math.inf}}
    assert plots.heat_maps("dpsm", "warmup", "lr", nothing).startswith(b"\x89PNG")


def test_summaries_have_their_table_and_nothing_empty_is_shown(tmp_path):
    rows = [{"index": i, "prediction": f"it says {i}", "reference": f"it said {i}"} for i in range(5)]
    folders = []
    about = {"train": {"set": "x", "partial": ""}, "test": {"set": "x", "partial": "a sample: 5 of 9 rows"}}
    for loss, ended in (("ce", 1.0), ("dpsm", 0.975)):
        config = {"loss": loss, "model": "", "size": "bart-tiny"}
        values = SUMMARY | {"val_ended": ended, "data": about, "examples_limit": {"val": 200}}
        folders.append(write_run(tmp_path / loss, config=config, summary=values))
        (folders[-1] / "samples.json").unlink()
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folders[-1] / "predictions-val.jsonl").write_text(text)
    report = rp.build(folders)
    arms = report.arms
    assert "Not of whole sets: x test is a sample: 5 of 9 rows; val: the first 200 pairs." in report.warnings
    assert report.blocks[0][1].startswith("bart-tiny on fixture.")
    made = tables.summary_table(arms, "val")
    heads = [(cell.text, cell.sub.split("\u00a0")[0]) for cell in made.head]
    assert ("ROUGE-1", "F1, %") in heads and ("BERTScore", "F1, %") not in heads  # which nobody measured
    cells = dict(zip(heads, made.rows[1], strict=True))
    assert (
        cells["ROUGE-1", "F1, %"][:2] == ("30.00", "29.00 to 31.00") and cells["R1", "as files2rouge"].text == "30.10"
    )
    assert cells["ended", "% of searches"].text == "97.5" and cells["texts", ""].text == "200"
    assert "bits/byte" not in [cell.text for cell in tables.final_table(arms, "val").head]
    assert tables.summary_table(arms, "test") is None
    samples = [block for block in report.blocks if block[0] == "samples"]
    assert samples[0][1] == "reference: it said 0" and len(samples) == 3
    assert not any(block[0] == "table" and any(c.text == "Distinct-1" for c in block[1].head) and block[1].left == 1
                   and len(block[1].head) == 3 for block in report.blocks)  # fmt: skip
    (folders[0] / "predictions-val.jsonl").write_text('{"index": 0}\n')
    with pytest.raises(ValueError, match="predictions-val.jsonl holds no summaries"):
        rp.build(folders)


def test_arms_of_other_decoding_are_not_compared(tmp_path):
    """Summaries of other beams answer another question; BERTScore's model and the decoding batch do not."""
    base = {"beams": 4, "generate_batch": 16, "bertscore": ""}
    other = {"loss": "dpsm", "beams": 8, "generate_batch": 4, "bertscore": "x"}
    a, b = (write_run(tmp_path / str(i), config=c, summary=SUMMARY) for i, c in enumerate((base, other)))
    assert compare.setting_differences(*arms_of(a, b)) == ["beams"]
    same = write_run(tmp_path / "2", config=base | {"generate_batch": 1, "bertscore": "y", "seed": 2}, summary=SUMMARY)
    assert len(arms_of(a, same)) == 1


def test_many_arms_leave_the_best_of_each_loss_in_a_figure(tmp_path):
    configs = [({"lr": lr}, {"val_nll": 3 + lr}) for lr in (1.0, 2.0, 3.0)] + [({"loss": "dpsm"}, {"val_nll": 9.0})]
    arms = arms_of(*(write_run(tmp_path / str(i), config=c, summary=s) for i, (c, s) in enumerate(configs)))
    assert [arm.label for arm in rp.best_arms(arms, 2)] == ["ce lr=1", "dpsm"]
    assert [arm.label for arm in rp.best_arms(arms, 3)] == ["ce lr=1", "ce lr=2", "dpsm"]


# ----------------------------------------------------------------------------------------------
# the page


class Page(HTMLParser):
    """Everything a page could fetch, its tags, its text outside styles, and whether tags are balanced."""

    VOID = ("meta", "img", "br", "hr")

    def __init__(self, text):
        super().__init__()
        self.links, self.tags, self.text, self.open = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "srcset", "action", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """One full report: three losses over two seeds, an unfinished run, hostile text everywhere."""
    root = tmp_path_factory.mktemp("page")
    folders = three_losses(root, seeds=(1, 2))
    hostile = {"loss": "focal", "data": "a<b>|&c"}
    events = [{"step": 300, "event": "nonfinite_loss", "note": "<i>|"}, {"step": 320, "event": "nonfinite_loss"}]
    folders.append(write_run(root / "half", config=hostile, curve=falling(33)[:4], events=events))
    report = rp.build(folders, "A <title> & more")
    rp.write(report, root / "out")
    return report


def test_html_is_one_file_that_fetches_nothing(page):
    text = (page.out / "report.html").read_text()
    parsed = Page(text)
    assert not parsed.open
    assert {link.split(",")[0] for link in parsed.links} == {"data:image/png;base64"}
    assert not set(parsed.tags) & {"script", "link", "iframe", "object", "base"}
    assert "url(" not in text and "@import" not in text and not re.search(r"https?:", text)
    pictures = [base64.b64decode(link.split(",")[1]) for link in parsed.links]
    assert pictures == [(page.out / f"{name}.png").read_bytes() for name in page.figures]
    assert set(page.figures) == {"curves", "training", "reliability_val"}


def test_html_shows_hostile_text_as_text(page):
    parsed = Page((page.out / "report.html").read_text())
    text = "".join(parsed.text)
    assert "A <title> & more" in text and "The <river> & the|hill" in text and "<b>&amp;</b> | pipe" in text
    assert "a<b>|&c" in text and "note <i>|" in text
    assert "river" not in parsed.tags and "i" not in parsed.tags


def test_markdown_tables_keep_their_columns_and_pictures_exist(page):
    text = (page.out / "report.md").read_text()
    tables = re.findall(r"(?:^\|.*\n)+", text, re.M)
    assert len(tables) >= 6
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1, table
    assert "a\\<b\\>\\|\\&c" in text
    names = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert names == [f"{name}.png" for name in page.figures] and all((page.out / name).exists() for name in names)


def test_the_page_says_what_was_run(page):
    text = "".join(Page((page.out / "report.html").read_text()).text)
    for fact in ("fixture device", "train_lm.py --fixture", ("f1x7u2e" * 5)[:10], "torch 0.0", "7 runs (6 finished)"):
        assert fact in text
    assert "nonfinite_loss" in text and "300 to 320" in text
    assert "Distinct-2" in text and "0.830" in text and "MB = 1e6 bytes" in text


def test_an_unfinished_run_is_in_the_curves_only(page):
    focal = next(arm for arm in page.arms if arm.loss == "focal")
    assert not focal.finished and plots.points(focal.runs[0], "val", "step", "ppl")
    assert any("UNFINISHED" in w and "half" in w and "step 400 of 1000" in w for w in page.warnings)
    tables = [block[1] for block in page.blocks if block[0] == "table"]
    results = next(t for t in tables if t.head[1].text == "seeds")
    assert [line[0].text for line in results.rows] == ["ce", "ce + temperature", "brier", "dpsm"]


def test_unfinished_runs_alone_make_a_report_of_curves(tmp_path, capsys):
    folder = write_run(tmp_path / "run", config={"loss": "dpsm"}, curve=falling(30)[:3])
    with open(folder / "metrics.jsonl", "a") as f:
        f.write('{"kind": "train", "step": 400, "lo')  # killed while it wrote
    assert terminal.main([str(folder), "--out", str(tmp_path / "out")]) == 0
    assert "no final numbers yet" in (tmp_path / "out/report.md").read_text()
    assert (tmp_path / "out/curves.png").exists()
    assert "missing: no finished run with --loss dpsm" in capsys.readouterr().out


def test_a_second_report_replaces_the_first_and_leaves_other_files(tmp_path):
    folder, out = write_run(tmp_path / "run", summary={}), tmp_path / "deep/out"
    rp.write(rp.build([folder], "report one"), out)
    (out / "notes.txt").write_text("mine")
    rp.write(rp.build([folder], "report two"), out)
    assert "report two" in (out / "report.html").read_text() and "report one" not in (out / "report.md").read_text()
    assert (out / "notes.txt").read_text() == "mine"
    names = {"notes.txt", "report.md", "report.html", "curves.png", "training.png", "reliability_val.png"}
    assert {path.name for path in out.iterdir()} == names


# ----------------------------------------------------------------------------------------------
# the command line


def test_the_command_prints_a_table_that_fits(tmp_path):
    folders = three_losses(tmp_path, seeds=(1, 2))
    folders.append(write_run(tmp_path / "w", config={"loss": "dpsm", "warmup": 0.333, "alpha_max": 0.5}, summary={}))
    command = [sys.executable, "-m", "eval.report", *map(str, folders), "--out", str(tmp_path / "out"), "--title", "t"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"MPLBACKEND": ""})
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert str(tmp_path / "out/report.html") in lines[0] and str(tmp_path / "out/report.md") in lines[1]
    assert max(map(len, lines[2:])) <= 110
    ce = next(line for line in lines if line.startswith("ce "))
    assert re.split(r"  +", ce) == [
        "ce",
        "2",
        "29.99 +- 0.01",
        "3.99 +- 0.01",
        "0.8000",
        "3.3909",
        "1.00 +- 0.00",
        "20,000",
    ]
    assert any(line.startswith("2 ECE at least 25 %") and line.endswith("yes   met") for line in lines)
    assert "1 more DPSM arms in the report" in lines


def break_config(run):
    (run / "config.json").unlink()
    return "is not a run folder"


def break_metrics(run):
    (run / "metrics.jsonl").unlink()
    return "metrics.jsonl holds no train or val rows"


def break_line(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[3] = lines[3][:20]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return "metrics.jsonl line 4 is not JSON"


def break_last_line_of_a_finished_run(run):
    with open(run / "metrics.jsonl", "a") as f:
        f.write('{"kind": "val"')
    return "metrics.jsonl line 21 is not JSON"


def break_row(run):
    (run / "metrics.jsonl").write_text('{"kind": "val", "step": 1}\n{"step": 2}\n')
    return "metrics.jsonl line 2 is not a row"


def break_summary(run):
    (run / "summary.json").write_text('{\n "val_ppl": 3,\n}')
    return "summary.json line 3 is not JSON"


def break_samples(run):
    (run / "samples.json").write_text("{}")
    return "samples.json holds a dict, expected a list"


def break_calibration(run):
    (run / "calibration.json").write_text('{"val": {"raw": {"count": [1, 2], "correct_sum": [1]}}}')
    return "calibration.json: bins have lengths"


BREAKS = [break_config, break_metrics, break_line, break_last_line_of_a_finished_run, break_row, break_summary]


@pytest.mark.parametrize("damage", [*BREAKS, break_samples, break_calibration])
def test_broken_input_is_one_line_and_writes_nothing(tmp_path, capsys, damage):
    good, bad = write_run(tmp_path / "good", summary={}), write_run(tmp_path / "bad", config={"seed": 2}, summary={})
    message = damage(bad)
    with pytest.raises(SystemExit) as e:
        terminal.main([str(good), str(bad), "--out", str(tmp_path / "out")])
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.count("\n") == 1 and message in err
    assert str(bad) in err
    assert not (tmp_path / "out").exists()


def test_a_folder_of_runs_and_a_file_as_out_are_explained(tmp_path, capsys):
    run = write_run(tmp_path / "runs/one", summary={})
    (tmp_path / "file").write_text("")
    for argv, message in (
        ([str(tmp_path / "runs"), "--out", str(tmp_path / "out")], f"such as {run}"),
        ([str(run), "--out", str(tmp_path / "file")], "is a file; give a folder"),
        ([str(run)], "--out"),
    ):
        with pytest.raises(SystemExit) as e:
            terminal.main(argv)
        err = capsys.readouterr().err
        assert e.value.code == 2 and err.count("\n") == 1 and message in err
