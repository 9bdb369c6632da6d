"""Config from the command line, atomic files, schedules, the divergence watch."""

import json
import math
from dataclasses import dataclass

import pytest
import torch

from runtime.cli import opt, parse_config
from runtime.folder import read_metrics, write_bytes, write_json
from runtime.meter import DivergenceWatch
from schedules.rules import SCHEDULES, lr_factor


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
