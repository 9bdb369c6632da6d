"""train_lm.py with bad input: one line, exit code 2, nothing written."""

import json
import shutil

import pytest
import torch
from lm_runs import fails, train, weights

import train_lm
from runtime.cli import parse_config
from runtime.folder import load_checkpoint
from runtime.machine import World


@pytest.mark.parametrize(
    "match, more",
    [
        (r"no-such-data", ("--data", "no-such-data")),
        (r"seq(uence)?.*long", ("--seq-len", 1000000)),
        (r"--warmup 1.5 is outside \[0, 1\]", ("--warmup", 1.5)),
        (r"--warmup nan", ("--warmup", "nan")),
        (r"--alpha-max -0.1 is outside", ("--alpha-max", -0.1)),
        (r"--alpha-start 2.0 is outside", ("--alpha-start", 2)),
        (r"--steps 0", ("--steps", 0)),
        (r"--seed -1", ("--seed", -1)),
        (r"--loss.*invalid choice.*hinge", ("--loss", "hinge")),
        (r"unrecognized arguments: --los", ("--los", "ce")),
        (r"tail-smoothing", ("--loss", "ce", "--tail-smoothing", 0.1)),
        (r"--unigram-gain 1.0 needs its limit", ("--loss", "ce", "--unigram-gain", 1)),
        (r"--unigram 0.1 is for --path mix", ("--loss", "dpsm", "--path", "order", "--unigram", 0.1)),
        (r"--unigram is read by", ("--loss", "brier", "--unigram", 0.1)),
        (r"--fsdp needs more than one rank", ("--fsdp",)),
        (r"no run in", ("--resume",)),
        (r"triton needs a CUDA device", ("--kernels", "triton")),
    ],
)
def test_bad_flags(match, more, lm_base, tmp_path, capsys):
    fails(capsys, match, lm_base, tmp_path / "run", *more)


def resolved(*flags):
    return parse_config(train_lm.Config, list(map(str, flags)), complete=train_lm.complete)


def test_what_is_not_given_fits_the_size_and_what_is_given_wins(lm_base, tmp_path, capsys):
    nano, large = resolved("--model", "nano"), resolved("--model", "gpt2-large")
    assert (nano.tokenizer, nano.seq_len, nano.batch, nano.steps) == ("bpe:4096", 128, 16, 500)
    assert (large.tokenizer, large.seq_len, large.batch, large.steps) == ("gpt2", 1024, 256, 20000)
    assert resolved() == resolved("--model", "gpt2") and resolved("--model", "nano", "--batch", 256).batch == 256
    with pytest.raises(SystemExit):
        resolved("--model", "nano", "--batch", 0)
    assert "--batch 0 must be at least 1" in capsys.readouterr().err
    # Said at the start. A run of before had GPT-2's numbers in its config, and goes on with them.
    at = lm_base.index("--batch")
    flags, out = lm_base[:at] + lm_base[at + 2 :], tmp_path / "run"
    assert train(lm_base, out, "--steps", 4) == 0
    assert "as --model nano" not in capsys.readouterr().out
    assert train(flags, out, "--steps", 4, "--resume") == 0
    assert json.loads((out / "config.json").read_text())["batch"] == 8
    fails(capsys, "batch was 8, now 16", flags, out, "--steps", 4, "--resume", "--batch", 16)
    assert train(flags, tmp_path / "new", "--steps", 1) == 0
    assert "as --model nano has it where it is not given: --batch 16" in capsys.readouterr().out


def test_bad_text(lm_base, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    fails(capsys, "empty", lm_base, tmp_path / "run", "--data", tmp_path / "empty")
    (tmp_path / "blank").mkdir()
    (tmp_path / "blank" / "a.txt").write_text("")
    fails(capsys, "blank", lm_base, tmp_path / "run", "--data", tmp_path / "blank")


def test_a_folder_in_use_is_refused(lm_run, lm_base, tmp_path, capsys):
    flags, out = lm_run
    fails(capsys, "already holds a run", flags, out)
    fails(capsys, "of a different run.*lr was 0.003, now 0.1", flags, out, "--resume", "--lr", 0.1)
    fails(capsys, "of a different run.*model was 'nano', now 'gpt2'", flags, out, "--resume", "--model", "gpt2")
    fails(capsys, "best.pt holds weights only", flags, out, "--resume", "--resume-from", out / "best.pt")
    assert train(lm_base, tmp_path / "other") == 0
    fails(
        capsys,
        "dpsm/last.pt is of a different run",
        lm_base,
        tmp_path / "other",
        "--resume",
        "--resume-from",
        out / "last.pt",
    )
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    fails(capsys, "not an empty folder", lm_base, tmp_path / "mine")


def test_broken_checkpoints_are_named(lm_base, tmp_path, capsys):
    out = tmp_path / "run"
    assert train(lm_base, out) == 0
    good = (out / "last.pt").read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 0x40
    says = r"last\.pt is truncated or corrupt; an older good one is .*previous\.pt"
    for bad in (good[: len(good) // 2], good[:-1], bytes(flipped), b""):
        (out / "last.pt").write_bytes(bad)
        fails(capsys, says, lm_base, out, "--resume")
    assert train(lm_base, out, "--resume", "--resume-from", out / "previous.pt") == 0
    assert load_checkpoint(out / "last.pt")["step"] == 12


def test_changed_text_is_noticed(lm_base, corpus, tmp_path, capsys):
    flags = [str(tmp_path / "text") if f == str(corpus) else f for f in lm_base]
    shutil.copytree(corpus, tmp_path / "text")
    assert train(flags, tmp_path / "run") == 0
    with open(tmp_path / "text" / "train.txt", "a") as f:
        f.write("one times one is one.\n")
    fails(capsys, "not the text that .* was trained on", flags, tmp_path / "run", "--resume")


def test_a_run_of_ours_is_a_start(lm_base, lm_run, tmp_path, capsys):
    """Its folder or a checkpoint gives its weights; another tokenizer is refused before anything is trained."""
    kept = load_checkpoint(lm_run[1] / "best.pt")["model"]
    for start in (lm_run[1], lm_run[1] / "best.pt"):
        out = tmp_path / f"from-{start.name}"
        assert train(lm_base, out, "--init-from", start, "--steps", 1, "--lr", 0) == 0
        assert all(torch.equal(w, kept[name]) for name, w in weights(out).items())
    assert load_checkpoint(out / "last.pt")["model_config"]["activation_function"] == "gelu_new"
    says = "was trained with --activation gelu_new; give that"
    fails(capsys, says, lm_base, tmp_path / "run", "--init-from", lm_run[1], "--activation", "gelu")
    for size in ("bpe:319", "bpe:400"):
        flags = [size if f == "bpe:320" else f for f in lm_base]
        says = rf"--tokenizer {size} is not that of --init-from .*: the tokens differ"
        fails(capsys, says, flags, tmp_path / "run", "--init-from", lm_run[1])
    other = tmp_path / "other.pt"
    torch.save({"model": {}}, other)
    fails(capsys, "is no checkpoint of a GPT-2 of ours", lm_base, tmp_path / "run", "--init-from", other)


def test_what_the_samples_cannot_use_is_found_out_before_training(lm_base, tmp_path, capsys):
    fails(capsys, r"--prompt '\\udcff' has no tokens", lm_base, tmp_path / "run", "--prompt", "\udcff")
    files = {"vocab.json": {}, "merges.txt": "#version: 0.2\n"}
    from data.tokenizer import _byte_characters

    files["vocab.json"] = {c: i for i, c in enumerate(_byte_characters())} | {"<|endoftext|>": 300}
    (tmp_path / "gap").mkdir()
    (tmp_path / "gap" / "vocab.json").write_text(json.dumps(files["vocab.json"]))
    (tmp_path / "gap" / "merges.txt").write_text(files["merges.txt"])
    flags = [str(tmp_path / "gap") if f == "bpe:320" else f for f in lm_base]
    fails(capsys, r"not all ids below 301 are tokens of it .*without gaps", flags, tmp_path / "run")


def test_tokenizer_larger_than_the_model(lm_base, lm_run, tmp_path, capsys):
    from model import gpt2_hub as hub

    hub.main([str(lm_run[1] / "best.pt"), str(tmp_path / "hf")])
    flags = ["bpe:400" if f == "bpe:320" else f for f in lm_base]
    fails(capsys, "bpe:400 is not that of --init-from", flags, tmp_path / "run", "--init-from", tmp_path / "hf")


def test_ranks_must_divide_the_batch(lm_base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_lm, "start_world", lambda *args, **how: World(0, 2, torch.device("cpu")))
    says = "--batch 7 is not divisible by the 2 ranks"
    fails(capsys, says, lm_base, tmp_path / "run", "--batch", 7)
