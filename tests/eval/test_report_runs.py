"""Runs become arms: by the settings that differ, by the roles of the flags, and without repeated seeds."""

import json
from pathlib import Path

import pytest
from invented_runs import SUMMARY, arms_of, judged, write_run

from eval.report import build as rp
from eval.report import plots
from eval.report import runs as compare


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


def test_arms_of_other_decoding_are_not_compared(tmp_path):
    """Summaries of other beams answer another question; BERTScore's model and the decoding batch do not."""
    base = {"beams": 4, "generate_batch": 16, "bertscore": ""}
    other = {"loss": "dpsm", "beams": 8, "generate_batch": 4, "bertscore": "x"}
    a, b = (write_run(tmp_path / str(i), config=c, summary=SUMMARY) for i, c in enumerate((base, other)))
    assert compare.setting_differences(*arms_of(a, b)) == ["beams"]
    same = write_run(tmp_path / "2", config=base | {"generate_batch": 1, "bertscore": "y", "seed": 2}, summary=SUMMARY)
    assert len(arms_of(a, same)) == 1


ROLES = {
    "prompt": "knob",
    "eval_batch": "where",
    "seed": "bookkeeping",
    "out": "where",
    "loss": "knob",
    "lr": "knob",
    "micro_batch": "system",
    "gamma": "knob",
    "schedule": "knob",
    "fot_window": "knob",
}
ROLES |= dict.fromkeys(("format", "base", "loss_on", "heldout", "eval_problems", "generate_tokens", "steps"), "setting")
ONLY = {"gamma": {"loss": ["focal"]}, "fot_window": {"schedule": ["fot", "snac"]}}
GSM8K = {
    "script": "finetune_gsm8k.py",
    "prompt": "chat",
    "eval_batch": 64,
    "format": "text",
    "base": "nf4",
    "loss_on": "answer",
    "heldout": 256,
    "eval_problems": 0,
    "generate_tokens": 256,
    "micro_batch": 16,
    "schedule": "cosine",
    "fot_window": 32,
}


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


@pytest.mark.parametrize(
    "flag, value",
    [
        ("format", "code"),
        ("base", "bf16"),
        ("loss_on", "all"),
        ("heldout", 64),
        ("eval_problems", 32),
        ("generate_tokens", 512),
        ("script", "other.py"),
    ],
)
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


@pytest.mark.parametrize("role", ["setting", "knob"])
def test_a_flag_that_is_newer_than_a_run_has_its_default_there(tmp_path, role):
    """As where such a run is resumed; of another value it is another question or another arm."""
    old = gsm8k_run(tmp_path / "old", loss="dpsm")
    folders = [gsm8k_run(tmp_path / value, seed=i, base_form=value) for i, value in enumerate(("plain", "new"), 5)]
    for folder in folders:
        flags = json.loads((folder / "flags.json").read_text())
        flags["base_form"] = {"role": role, "only": {}, "default": "plain"}
        (folder / "flags.json").write_text(json.dumps(flags))
    plain, new = ([arm for arm in arms_of(old, folder) if arm.loss == "ce"][0] for folder in folders)
    (was,) = [arm for arm in arms_of(old, folders[0]) if arm.loss == "dpsm"]
    assert compare.differing([was, plain]) == ["loss"] and compare.differing([was, new]) == ["loss", "base_form"]
    assert compare.setting_differences(was, plain) == []
    assert compare.setting_differences(was, new) == ["base_form"] * (role == "setting")


def test_roles_before_are_roles():
    flags = compare.roles_before()
    assert len(flags) > 50 and {about["role"] for about in flags.values()} <= set(compare.ROLES)
    assert all(other in ("loss", "schedule", "alpha_schedule") for about in flags.values() for other in about["only"])


def test_broken_roles_are_one_line(tmp_path):
    run = gsm8k_run(tmp_path / "run")
    (run / "flags.json").write_text('{"lr": {"role": "knbo", "only": {}}}')
    with pytest.raises(ValueError, match="flags.json: lr has no role"):
        compare.load_run(run)
