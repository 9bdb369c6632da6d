"""finetune_gsm8k.py's options of LoRA: PiSSA's start, LoRA+ and layers by a regex, resumed; run folders from before."""

import json

import pytest
import torch
from gsm8k_runs import rows, sigterm_at, tune

from model.lora import LoRAConfig, add_lora, load_base
from model.lora_hub import adapter_tensors, load_adapter
from runtime.folder import load_checkpoint

OPTIONS = [
    "--lora-init",
    "pissa",
    "--lora-plus",
    "4",
    "--targets",
    r".*\.1\..*_proj",
    "--eval-problems",
    "1",
    "--lr-floor",
    "0.1",
]


def cut_and_resumed(base, folder, monkeypatch, *more):
    """A run that SIGTERM stops after 4 steps, and its end."""
    sigterm_at(monkeypatch, 3)
    assert tune(base, folder, *more) == 143
    monkeypatch.undo()
    assert tune(base, folder, *more, "--resume") == 0
    return rows(folder, "val")


def test_pissa_and_lora_plus_resume_exactly_and_leave_a_plain_adapter(base, model, tmp_path, monkeypatch):
    assert tune(base, tmp_path / "whole", *OPTIONS) == 0
    assert cut_and_resumed(base, tmp_path / "cut", monkeypatch, *OPTIONS) == rows(tmp_path / "whole", "val")
    kept = load_checkpoint(tmp_path / "cut" / "last.pt")
    first, second = (g["lr"] for g in kept["optimizer"]["param_groups"])
    assert second == pytest.approx(4 * first, rel=1e-6) and first > 0
    assert {name.split(".")[4] for name in kept["model"]} == {"1"}  # base_model.model.model.layers.1
    loaded, trained = (load_base(model, "fp32", torch.float32) for _ in range(2))
    load_adapter(loaded, tmp_path / "cut" / "adapter", str(model))
    assert loaded.lora.r == 16  # twice --rank 8, for the base as it was
    add_lora(trained, LoRAConfig.kept(kept["lora"]))
    for name, tensor in adapter_tensors(trained).items():
        tensor.data.copy_(kept["model"][name])
    weights = [m.layers[1].mlp.up_proj.dense(torch.float32) for m in (loaded, trained)]
    torch.testing.assert_close(*weights, rtol=0, atol=1e-5)  # fp32 sums in another order, of weights of order 0.1


def test_a_run_folder_of_before_these_options_goes_on(base, tmp_path, monkeypatch):
    new = ("init", "rank_pattern", "alpha_pattern", "layers"), ("lora_init", "lora_plus")

    def make_old(folder):
        for name in ("config.json", "flags.json"):
            fields = json.loads((folder / name).read_text())
            (folder / name).write_text(json.dumps({k: v for k, v in fields.items() if k not in new[1]}))
        state = load_checkpoint(folder / "last.pt")
        for part, names in zip(("lora", "config"), new, strict=True):
            state[part] = {k: v for k, v in state[part].items() if k not in names}
        torch.save(state, folder / "old.pt")

    more = ["--eval-problems", "1"]
    assert tune(base, tmp_path / "whole", *more) == 0
    sigterm_at(monkeypatch, 3)
    assert tune(base, tmp_path / "cut", *more) == 143
    monkeypatch.undo()
    make_old(tmp_path / "cut")
    assert tune(base, tmp_path / "cut", *more, "--resume", "--resume-from", tmp_path / "cut" / "old.pt") == 0
    assert rows(tmp_path / "cut", "val") == rows(tmp_path / "whole", "val")
