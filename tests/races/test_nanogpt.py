"""races/nanogpt.py beside a stand-in for nanoGPT's train.py: what is read, what is compared, and bad flags."""

import json

import numpy as np
import pytest

from races import nanogpt as race
from runtime.checkpoint import load_checkpoint

# Prints what nanoGPT does: an evaluation and a step of 900 ms, ten of 100 ms, then 20 and 30 ms in turn.
TRAIN = """
import pathlib, pickle, sys
flags = dict(word[2:].split("=") for word in sys.argv[1:])
folder = pathlib.Path("data") / flags["dataset"]
assert (folder / "val.bin").stat().st_size and flags["compile"] in ("False", "True") and flags["bias"] == "True"
pickle.loads((folder / "meta.pkl").read_bytes())["vocab_size"]
print("step 0: train loss 9.9, val loss 9.9")
for i in range(int(flags["max_iters"]) + 1):
    ms = 900 if i == 0 else 100 if i < 10 else 20 + 10 * (i % 2)
    print(f"iter {i}: loss 9.9000, time {ms:.2f}ms, mfu -100.00%")
"""
FLAGS = "--tokenizer bpe:257 --model pico --seq-len 16 --batch 2 --steps 20 --rounds 1 --device cpu".split()


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / "nanoGPT" / "data").mkdir(parents=True)
    (tmp_path / "nanoGPT" / "train.py").write_text(TRAIN)
    return tmp_path / "nanoGPT"


def test_a_round(checkout, corpus, tmp_path, capsys):
    out = tmp_path / "race"
    more = ["--data", str(corpus), "--cache", str(tmp_path / "cache"), "--out", str(out)]
    assert race.main([str(checkout), *FLAGS, *more]) == 0
    found = json.loads((out / "race.json").read_text())
    (row,) = found["rounds_ms"]
    assert row["nanogpt"] == 25 and list(row) == ["nanogpt", "ce", "dpsm"]  # the first ten steps are left out
    assert found["ce_over_nanogpt"] == pytest.approx(25 / row["ce"]) and found["vocab"] == 257
    assert found["tokens_per_second"]["nanogpt"] == pytest.approx(1000 * 2 * 16 / 25)
    assert "ours with CE to nanoGPT" in capsys.readouterr().out
    assert found["compile"] is False
    for loss in ("ce", "dpsm"):
        config = json.loads((out / f"{loss}0" / "config.json").read_text())
        assert (config["loss"], config["steps"], config["lr"], config["eval_every"]) == (loss, 20, 1e-3, 20)
        model = load_checkpoint(out / f"{loss}0" / "last.pt")["model_config"]
        assert model["activation_function"] == "gelu"  # nanoGPT's
    written = np.fromfile(checkout / "data" / "scorecast_race" / "train.bin", np.uint16)
    assert len(written) > 1000 and written.max() < 257


@pytest.mark.parametrize("flags, compiled", [("cpu", False), ("cuda", True), ("cpu --compile", True)])
def test_both_sides_are_compiled_or_none(checkout, corpus, tmp_path, monkeypatch, flags, compiled):
    lines, folder = [], tmp_path / "race"

    def output(line, complaint, cwd=None):
        lines.append(line)
        return "\n".join(f"iter {i}: loss 9.9, time 5ms" for i in range(21))

    monkeypatch.setattr(race, "output_of", output)
    monkeypatch.setattr(race, "read_json", lambda path: {"ms_per_step_median": 5.0})
    monkeypatch.setattr(race, "environment", lambda device: {})
    more = ["--data", str(corpus), "--cache", str(tmp_path / "cache"), "--out", str(folder)]
    assert race.main([str(checkout), *FLAGS[:-1], *flags.split(), *more]) == 0
    theirs, *ours = lines
    assert f"--compile={compiled}" in theirs and len(ours) == 2
    assert all(("--compile" in line, "--no-compile" in line) == (compiled, not compiled) for line in ours)
    assert json.loads((folder / "race.json").read_text())["compile"] is compiled


def test_a_checkout_that_fails_is_named(checkout, corpus, tmp_path, capsys):
    (checkout / "train.py").write_text("raise SystemExit('no such dataset')")
    more = ["--data", str(corpus), "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "race")]
    with pytest.raises(SystemExit) as stopped:
        race.main([str(checkout), *FLAGS, *more])
    assert stopped.value.code == 2 and "nanoGPT's train.py did not run: no such dataset" in capsys.readouterr().err


def test_a_round_that_fails_is_not_the_last_and_rows_are_rounds(checkout, tmp_path, monkeypatch, capsys):
    times = iter([10.0, ValueError("nanoGPT's train.py did not run"), 20.0])

    def theirs(*_):
        if isinstance(ms := next(times), ValueError):
            raise ms
        return ms

    for name, stand_in in dict(
        nanogpt_ms=theirs, our_ms=lambda *_: 5.0, write_text=lambda _: "text", write_dataset=lambda _: ("name", 257)
    ).items():
        monkeypatch.setattr(race, name, stand_in)
    out = tmp_path / "race"
    out.mkdir()
    monkeypatch.setattr(race, "check_new", lambda _: None)
    flags = [str(checkout), *FLAGS, "--rounds", "5", "--rows", "2", "--out", str(out)]
    assert race.main(flags) == 1
    assert json.loads((out / "race.json").read_text())["ce_over_nanogpt"] == 3.0  # the median of 2 and 4
    err = capsys.readouterr().err
    assert "round 2: nanoGPT's train.py did not run" in err and "--rows: 2, the first of them round 4" in err


@pytest.mark.parametrize(
    "match, more", [("--steps 15: give a multiple of 10", "--steps 15"), ("exists; give another --out", "--out tests")]
)
def test_bad_flags(match, more, checkout, capsys):
    with pytest.raises(SystemExit) as stopped:
        race.main([str(checkout), *FLAGS, *more.split()])
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and match in err and len(err.strip().splitlines()) == 1
