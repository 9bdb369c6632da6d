"""Config from the command line, atomic files, schedules, the divergence watch, recipes."""

import importlib
import json
import math
import re
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from eval import campaign as recipe_run
from runtime.cli import opt, parse_config
from runtime.folder import read_metrics, write_bytes, write_json
from runtime.machine import World
from runtime.meter import DivergenceWatch
from schedules.rules import SCHEDULES, lr_factor

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Config:
    lr: float = opt(0.1, "a rate, in % of nothing")
    steps: int = opt(3, "steps")
    mode: str = opt("a", "mode", ("a", "b"))
    fast: bool = opt(False, "fast")
    compile: bool | None = opt(None, "compile")


def test_config_from_flags(capsys):
    assert parse_config(Config, []) == Config()
    c = parse_config(Config, "--lr 1e-3 --steps 5 --mode b --fast --no-compile".split())
    assert c == Config(1e-3, 5, "b", True, False)
    with pytest.raises(SystemExit) as stopped:
        parse_config(Config, ["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert all(f"--{n}" in text for n in ("lr", "steps", "mode", "fast", "no-compile")) and "default: 0.1" in text


@pytest.mark.parametrize("flags", ["--steps x", "--mode c", "--lr", "--nope 1", "--ste 3"])
def test_bad_flags_are_one_line(flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_config(Config, flags.split())
    assert stopped.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_atomic_write_leaves_the_old_file_when_the_writer_fails(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})

    def half(f):
        f.write(b"{")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError):
        write_bytes(path, half)
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_json_has_no_nan(tmp_path):
    write_json(tmp_path / "x.json", {"a": [math.nan, math.inf, 1.5]})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [None, None, 1.5]}


def test_broken_metrics_name_their_line(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"kind": "train", "step": 1}\n{"kind": "tr')
    with pytest.raises(ValueError, match="line 2"):
        read_metrics(tmp_path / "m.jsonl")


def watched(losses) -> dict:
    watch = DivergenceWatch(torch.device("cpu"))
    for loss in losses:
        loss = torch.tensor(loss)
        watch.update(loss, torch.isfinite(loss))
    return watch.read()


def test_divergence_is_counted_as_defined():
    assert watched([2.0] * 100)["divergences"] == 0
    assert watched([2.0] * 50 + [5.0] * 31 + [2.0])["divergences"] == 0  # 31 steps above twice the average: not yet
    assert watched([2.0] * 50 + [5.0] * 32)["divergences"] == 1
    assert watched([2.0] * 50 + [5.0] * 100)["divergences"] == 1  # one event, however long
    seen = watched([2.0, math.nan, 2.0, math.inf, math.nan, math.nan, 2.0])
    assert seen["divergences"] == seen["skipped"] == 4 and seen["worst_streak"] == 3 and seen["streak"] == 0


def test_schedules():
    for name in SCHEDULES:
        factors = [lr_factor(name, s, 100, warmup=0.1, floor=0.1) for s in range(100)]
        assert all(0 < f <= 1 for f in factors) and max(factors) == pytest.approx(1, abs=0.02)
        assert factors[:10] == sorted(factors[:10])  # warm-up rises
        assert factors[10:] == sorted(factors[10:], reverse=True)  # and the rest never does
    assert lr_factor("cosine", 55, 100, warmup=0.1) == pytest.approx(0.5)
    assert lr_factor("linear", 100, 100, floor=0.1) == pytest.approx(0.1)
    assert lr_factor("wsd", 79, 100) == 1 and lr_factor("wsd", 90, 100) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="cubic"):
        lr_factor("cubic", 0, 1)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda p: p.stem)
def test_recipes_are_valid(path, capsys):
    """Each cell's flags parse and are allowed."""
    assert recipe_run.main([str(path), "--dry-run"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    outs = set()
    for line in lines:
        script = importlib.import_module(Path(line.split()[1]).stem)
        cfg = parse_config(script.Config, line.split()[2:])
        cfg = script.with_preset(cfg) if hasattr(script, "with_preset") else cfg
        script.check(cfg, World(0, 1, torch.device("cpu")))
        outs.add(cfg.out)
    assert len(outs) == len(lines) > 0


def test_a_broken_recipe_is_one_line(tmp_path, capsys):
    (tmp_path / "r.toml").write_text("grid = [")
    with pytest.raises(SystemExit) as stopped:
        recipe_run.main([str(tmp_path / "r.toml")])
    assert stopped.value.code == 2 and re.search("r.toml is not TOML", capsys.readouterr().err)


def test_recipes_run_side_by_side_go_on_and_say_what_failed(corpus, tmp_path, monkeypatch, capfd):
    """Two runs at a time, each in its folder with its log, then their report; what has finished is left alone, and a
    run that fails is named with its log."""
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    recipe = tmp_path / "two.toml"
    recipe.write_text(
        f'script = "train_lm.py"\nout = "{tmp_path / "runs"}"\n[flags]\ndata = "{corpus}"\n'
        f'cache = "{tmp_path / "cache"}"\n'
        'tokenizer = "bpe:320"\nmodel = "pico"\nseq_len = 32\nbatch = 4\nsteps = 3\nsample_tokens = 2\ndevice = "cpu"\n'
        "[grid]\nseed = [1, 2, 3]\n"
    )
    try:
        assert recipe_run.main([str(recipe), "--jobs", "2"]) == 0
        done = [tmp_path / "runs" / f"seed{seed}" for seed in (1, 2, 3)]
        assert all((d / "summary.json").exists() and "validation ppl" in (d.parent / f"{d.name}.log").read_text()
                   for d in done)  # fmt: skip
        assert (tmp_path / "runs" / "report" / "report.md").exists()
        before = [(d / "summary.json").stat().st_mtime_ns for d in done]
        capfd.readouterr()
        assert (
            recipe_run.main([str(recipe), "--jobs", "2", "--set", "loss=nonsense", "--out", str(tmp_path / "b")]) != 0
        )
        assert f"{tmp_path / 'b' / 'seed1'}.log" in capfd.readouterr().err
        assert recipe_run.main([str(recipe), "--jobs", "2"]) == 0
        assert before == [(d / "summary.json").stat().st_mtime_ns for d in done]
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
