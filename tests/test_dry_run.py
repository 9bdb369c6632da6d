"""--dry-run of the three scripts: what it says, what it times, and that nothing is left behind."""

import json
import re
import tempfile
from types import SimpleNamespace

import pytest
import torch
from number_words import words

import finetune_gsm8k
import finetune_seq2seq
import train_lm
from model.gpt2 import GPT2, GPT2Config, flops_per_token
from runtime.dry_run import Aside, estimate, size, span, weight_count
from runtime.folder import load_checkpoint
from runtime.machine import World

CPU = World(0, 1, torch.device("cpu"))
SCRIPTS = {"train_lm": train_lm, "finetune_seq2seq": finetune_seq2seq, "finetune_gsm8k": finetune_gsm8k}
WITHOUT_CACHE = ("finetune_gsm8k",)  # by words: it tokenises its problems anew each time


@pytest.fixture(scope="module")
def flags(lm_base, base, tmp_path_factory):
    """script -> flags without --cache of a run of a second or two."""
    sums = tmp_path_factory.mktemp("sums")
    for split, first, count in (("train", 3, 40), ("validation", 1003, 8), ("test", 2003, 8)):
        texts = [[f"{words(i + k)} and {words(k)} make {words(i + 2 * k)}." for k in range(6)] for i in range(count)]
        rows = [{"article": f"{first} " + " ".join(lines), "highlights": lines[0]} for lines in texts]
        (sums / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    seq2seq = (
        f"--data {sums} --size bart-tiny --random-start --tokenizer bpe:300 --preset none --batch 8 --micro-batch 4 "
        "--steps 9 --lr 3e-3 --eval-every 3 --min-words 20 --max-source 96 --max-target 48 --device cpu".split()
    )
    all_flags = {"train_lm": lm_base, "finetune_seq2seq": seq2seq, "finetune_gsm8k": base}
    without = {}
    for name, given in all_flags.items():
        at = given.index("--cache") if "--cache" in given else len(given)
        without[name] = [*given[:at], *given[at + 2 :]]
    return without


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder to run in, and the folder of temporary files in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path


def said(capsys) -> dict[str, str]:
    """First word of a line -> the rest, of what a dry run says."""
    lines = capsys.readouterr().out.split("dry run: nothing is written\n")[1].splitlines()
    return {m[1].strip(): m[2] for m in (re.fullmatch(r"  (.{13}) (.*)", line) for line in lines) if m[1].strip()}


def everything(folder) -> set:
    return {p.relative_to(folder) for p in folder.rglob("*")}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_plan_is_said_and_nothing_is_written(name, flags, place, capsys):
    assert SCRIPTS[name].main([*flags[name], "--dry-run", "--out", "runs/x"]) == 0
    plan = said(capsys)
    assert list(plan) == ["model", "parameters", "training set", "steps", "all of it", "FLOPs", "memory"]
    assert ("made for this, and dropped" in plan["training set"]) == (name not in WITHOUT_CACHE)
    assert everything(place) == {place.relative_to(place) / "tmp"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_two_steps_are_timed(name, flags, place, capsys):
    assert SCRIPTS[name].main([*flags[name], "--dry_run", "timed", "--steps", "1e3", "--out", "runs/x"]) == 0
    plan = said(capsys)
    assert re.match(r"[\d.e-]+ and [\d.e-]+ s, after 1 that is not timed; [\d,]+ tokens/s", plan["a step"])
    assert re.match(r"1,000 steps .*, and \d+ validations about ", plan["the whole"])
    assert "at its peak: the whole process" in plan["memory"]
    assert everything(place) == {place.relative_to(place) / "tmp"}


def test_the_numbers_are_those_of_the_run(flags, place, capsys):
    """Against the run itself: parameters, tokens of a step, FLOPs; and what the cache holds is read, not dropped."""
    given = [*flags["train_lm"], "--cache", "cache"]
    assert train_lm.main([*given, "--out", "run"]) == 0
    before = everything(place)
    assert train_lm.main([*given, "--dry-run", "--out", "other"]) == 0
    plan, summary = said(capsys), json.loads((place / "run" / "summary.json").read_text())
    assert everything(place) == before
    assert plan["parameters"] == "{0:,} trained of {0:,}".format(summary["parameters"])
    assert plan["steps"] == "12, of 256 tokens over all ranks"
    assert plan["FLOPs"].startswith(f"{summary['flops_per_token']:.3g} a token, ")
    tokens = int(plan["training set"].removesuffix(" tokens").replace(",", ""))
    assert plan["all of it"] == f"3,072 tokens, {3072 / tokens:.3g} epochs"


def test_a_run_that_is_there_is_left_alone(flags, place, capsys):
    """Refused as the run would be; with --resume the rest is planned, and the folder stays as it is, lock and all."""
    given = [*flags["train_lm"], "--cache", "cache", "--schedule", "constant", "--out", "run"]
    assert train_lm.main(given) == 0
    before = {p: p.stat().st_mtime_ns for p in place.joinpath("run").rglob("*")}
    with pytest.raises(SystemExit) as stopped:
        train_lm.main([*given, "--dry-run"])
    assert stopped.value.code == 2 and "already holds a run" in capsys.readouterr().err
    assert train_lm.main([*given, "--resume", "--steps", "20", "--dry-run", "timed"]) == 0
    assert said(capsys)["steps"].startswith("8 more, from step 12,")
    assert {p: p.stat().st_mtime_ns for p in place.joinpath("run").rglob("*")} == before
    assert load_checkpoint(place / "run" / "last.pt")["step"] == 12


def test_a_run_of_one_step_is_not_timed(flags, place, capsys):
    assert train_lm.main([*flags["train_lm"], "--dry-run", "timed", "--steps", "1"]) == 0
    assert said(capsys)["a step"] == "not timed: the run has no step after the first 1"


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--dry-run", "tmied"], "invalid choice: 'tmied' (choose from plan, timed); did you mean timed?"),
        (["--dry-run", "--profile", "3"], "--dry-run and --profile 3 are two things"),
    ],
)
def test_what_does_not_go_together(more, says, flags, place, capsys):
    with pytest.raises(SystemExit) as stopped:
        finetune_seq2seq.main([*flags["finetune_seq2seq"], *more])
    assert stopped.value.code == 2 and says in capsys.readouterr().err
    assert everything(place) == {place.relative_to(place) / "tmp"}


def test_a_cache_aside_reads_what_is_there_and_writes_elsewhere(tmp_path):
    cache = tmp_path / "cache"
    (cache / "sub").mkdir(parents=True)
    (cache / "sub" / "a").write_text("old")
    aside = Aside(cache, CPU)
    assert (aside.folder / "sub" / "a").read_text() == "old" and aside.says() == ""
    (aside.folder / "sub" / "b").write_text("new")
    assert str(cache) in aside.says()
    aside.close()
    assert not aside.folder.exists() and [p.name for p in (cache / "sub").iterdir()] == ["a"]


def test_the_estimate_of_memory():
    """What autograd saves is linear in the rows; recomputing blocks saves most of it; AdamW keeps two numbers."""
    config = GPT2Config(vocab_size=64, block_size=32, n_layer=6, n_head=2, n_embd=32, dropout=0.0)
    model = GPT2(config, torch.float32)
    cfg = SimpleNamespace(optimizer="adamw", head_memory=0)

    def forwards(n, world):
        yield model(torch.zeros(n, 32, dtype=torch.long)).flatten(0, 1), None

    found = {rows: estimate(model, cfg, forwards, rows, CPU) for rows in (1, 2, 8)}
    parameters = sum(p.numel() for p in model.parameters())
    assert found[8].weights == found[8].gradients == 4 * parameters and found[8].optimizer == 8 * parameters
    a = {rows: m.activations for rows, m in found.items()}
    assert a[8] - a[2] == 6 * (a[2] - a[1]) > 0
    floats = a[8] / 4 / (8 * 32 * 32 * config.n_layer)  # a token, feature and block
    assert 10 < floats < 40  # Korthikanti et al. (2022) count 17 of them in 16 bits without attention's scores
    model.checkpoint_activations = True
    assert estimate(model, cfg, forwards, 8, CPU).activations < 0.6 * a[8]
    assert model.checkpoint_activations and weight_count(model) == (parameters, parameters)
    tailed = SimpleNamespace(optimizer="muon", tail_average=0.1, head_memory=0)
    assert estimate(model, tailed, forwards, 1, CPU).optimizer == 8 * parameters
    assert found[1].head == 4 * (32 * 64 + 64 * 32) and flops_per_token(config, 32) > 0


def test_numbers_for_people():
    assert [size(n) for n in (12, 1200, 3.456e6, 7.5e9)] == ["12 B", "1.2 kB", "3.46 MB", "7.5 GB"]
    assert [span(s) for s in (0.4, 59.6, 3661, 90000)] == ["0 s", "1 min 0 s", "1 h 1 min", "1 d 1 h"]
