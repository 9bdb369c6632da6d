"""finetune_gsm8k.py under the learning-rate rules: what they measure and decide, and that they resume exactly."""

import functools
import json
import math

import pytest
import torch
from gsm8k_runs import rows, sigterm_at, tune

from runtime.folder import load_checkpoint
from schedules import ADAPTIVE
from schedules.fot import block_multipliers, gate_of
from schedules.gradient_stats import GradientStats

LONGER = "--log-every 2 --steps 16 --eval-every 8 --eval-problems 2".split()
FOT = [*LONGER, "--fot-window", "4"]


def flags_of(rule: str) -> list[str]:
    return [*(FOT if rule.split()[0] in ADAPTIVE else LONGER), "--schedule", *rule.split()]


USED: list[list[float]] = []  # learning rates of fot_run's groups, as each step of the optimizer found them


@pytest.fixture(scope="module")
def fot_run(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "fot"
    original = torch.optim.AdamW.step

    @functools.wraps(original)  # torch marks a step that runs the hooks already: they must not run twice
    def step(self, *args, **kwargs):
        USED.append([group["lr"] for group in self.param_groups])
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        assert tune([*base, *FOT], out, "--schedule", "fot", "--segment-rms") == 0
    return out


def test_gate_and_blocks_take_part(fot_run):
    """A decision every W steps, of the batch before it: h is the ratio of the two Fishers that the log has of the same
    step, its gate and the blocks' multipliers are in the learning rates that the optimizer then uses."""
    decided, logged = rows(fot_run, "fot"), {r["step"]: r for r in rows(fot_run, "train")}
    assert [r["step"] for r in decided] == [4, 8, 12]
    for r in decided:
        seen = logged[r["step"]]
        assert r["h"] == pytest.approx(seen["fisher_answer"] / seen["fisher_prompt"], rel=1e-6)
        assert r["gate"] == gate_of(r["h"])
        if r["step"] >= 8:  # B has moved, and a sample of the gradient has ended
            assert math.isfinite(r["g2"]) and math.isfinite(r["slope"])
            rms = list(zip(seen["block_rms_prompt"], seen["block_rms_answer"], strict=True))
            assert r["blocks"] == pytest.approx(block_multipliers(rms), rel=1e-5)
            assert len(r["blocks"]) == 2 and math.prod(r["blocks"]) == pytest.approx(1) and r["blocks"][0] != 1
    for r in decided:  # the step after a decision is the first that is taken with it
        blocks = r["blocks"] or (1, 1)
        assert USED[r["step"]] == pytest.approx([r["lr"] * b for b in blocks])
        seen = logged[r["step"] + 2]["lr"]  # of the line's last step, blocks aside
        assert USED[r["step"] + 1] == pytest.approx([seen * b for b in blocks])
    summary = json.loads((fot_run / "summary.json").read_text())
    assert summary["fot_decisions"] == 3 and {"fot_bound", "fot_clipped", "fot_not_finite"} <= set(summary)


@pytest.fixture(scope="module")
def schedule_free_run(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "schedule-free"
    assert tune([*base, *flags_of("schedule-free")], out) == 0
    return out


@pytest.mark.parametrize("rule, stop_at", [("fot", 6), ("fot", 8), ("schedule-free", 7)])
def test_rules_resume_exactly(base, fot_run, schedule_free_run, tmp_path, monkeypatch, rule, stop_at):
    """Cut within a window and where one ends: the same decisions, learning rates, weights and answers, bit for bit.
    tests/schedules/test_fot.py has every rule."""
    whole = fot_run if rule == "fot" else schedule_free_run
    flags = [*base, *flags_of(rule), *["--segment-rms"] * (rule == "fot")]
    sigterm_at(monkeypatch, stop_at - 1)
    assert tune(flags, tmp_path / "cut") == 143
    monkeypatch.undo()
    assert load_checkpoint(tmp_path / "cut" / "last.pt")["step"] == stop_at
    assert tune(flags, tmp_path / "cut", "--resume") == 0
    for kind in ("train", "val", "fot"):
        assert rows(tmp_path / "cut", kind) == rows(whole, kind)
    ours, theirs = (load_checkpoint(out / "last.pt") for out in (tmp_path / "cut", whole))
    assert all(torch.equal(ours["model"][name], theirs["model"][name]) for name in theirs["model"])
    rates = [[g["lr"] for g in kept["optimizer"]["param_groups"]] for kept in (ours, theirs)]
    assert rates[0] == rates[1]
    assert (tmp_path / "cut" / "outputs.jsonl").read_bytes() == (whole / "outputs.jsonl").read_bytes()


@pytest.mark.parametrize(
    "rule", ["snac", "bacon", "fot-literal", "fot --optimizer muon --lr 3e-2", "greedy --optimizer adamw8bit"]
)
def test_every_rule_learns(base, tmp_path, rule):
    assert tune([*base, *flags_of(rule)], tmp_path / "run", "--eval-problems", 1) == 0
    losses = [r["loss"] for r in rows(tmp_path / "run", "train")]
    assert losses[-1] < losses[0] - 0.1
    decided = rows(tmp_path / "run", "fot")
    assert len(decided) == (3 if rule.split()[0] in ADAPTIVE else 0)
    for r in decided:  # the literal rule has a gate, bacon has blocks, and fot both
        assert (r["h"] is not None) == rule.startswith("fot")
        assert len(r["blocks"]) == (2 if rule.startswith(("bacon", "fot ")) and r["step"] >= 8 else 0)
    if "muon" in rule:
        assert decided[-1]["slope"] is not None  # of LoRA's A and B, which are all that there is


def test_schedule_free_learns_and_evaluates_its_averages(base, schedule_free_run, tmp_path):
    """The adapter that stays is the averaged x: the checkpoint's y, which was trained on, is (1 - beta1) z + beta1 x
    (Defazio et al., section 1), and the held-out loss is of x."""
    from model.lora import load_base
    from model.lora_hub import adapter_tensors, load_adapter

    losses = [r["loss"] for r in rows(schedule_free_run, "train")]
    assert losses[-1] < losses[0] - 0.1 and not rows(schedule_free_run, "fot")
    kept = load_checkpoint(schedule_free_run / "last.pt")
    adapter = schedule_free_run / "adapter"
    assert tune([*base, *LONGER], tmp_path / "again", "--adapter", adapter, "--lr", 0, "--steps", 1) == 0
    last = rows(schedule_free_run, "val")[-1]["nll"]
    assert rows(tmp_path / "again", "val")[0]["nll"] == pytest.approx(last, rel=1e-6)
    model = next(f for i, f in enumerate(base) if base[i - 1] == "--model")
    loaded = load_base(model, "fp32", torch.float32)
    load_adapter(loaded, adapter, model)
    for i, (name, x) in enumerate(adapter_tensors(loaded).items()):
        y, z = kept["model"][name], kept["optimizer"]["state"][i]["z"]
        torch.testing.assert_close(0.9 * x + 0.1 * z, y, rtol=0, atol=1e-6)


def test_the_micro_batch_that_is_measured_is_a_random_part(base, tmp_path, monkeypatch):
    """pack puts the longest problems into the first rows: what is measured must not be these alone."""
    seen = []
    original = GradientStats.micro
    monkeypatch.setattr(GradientStats, "micro", lambda self, share: (seen.append(share), original(self, share)))
    flags = [*base, *FOT, *"--schedule fot --micro-batch 1 --fot-parts noise --fot-window 2".split()]
    assert tune(flags, tmp_path / "run") == 0
    assert len(seen) >= 5 and all(0 < s < 1 for s in seen)
    assert {r["h"] for r in rows(tmp_path / "run", "fot")} == {None}
    assert all(r["blocks"] == [] for r in rows(tmp_path / "run", "fot"))
    whole = tmp_path / "one"  # one micro-batch is split in two where it is measured
    seen.clear()
    assert tune([*flags, "--micro-batch", "64"], whole) == 0
    assert len(seen) >= 5 and 0.3 < sum(seen) / len(seen) < 0.7
