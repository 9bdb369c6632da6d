"""finetune_gsm8k.py end to end on a tiny Qwen3: training, resume, answers, and what a run leaves behind."""

import json
import os
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from gsm8k_runs import outputs, refused, rows, sigterm_at, sigterm_while_answering, tune
from on_ranks import on_ranks
from tiny_gsm8k import problem, write_model

import finetune_gsm8k
from eval.report.build import build
from runtime.cli import roles
from runtime.folder import load_checkpoint

SUMMARY_KEYS = """
pass_at_1_strict pass_at_1_flexible pass_at_1_code invalid_programs eval_seconds train_seconds tokens_per_second
peak_memory_bytes divergences final_train_loss final_heldout_loss
""".split()


@pytest.fixture(scope="session")
def text_run(base, tmp_path_factory):
    """An uninterrupted DPSM run with everything random switched on, and sampled answers."""
    out = tmp_path_factory.mktemp("runs") / "text"
    flags = [*base, "--loss", "dpsm", "--warmup", "0.5", "--lora-dropout", "0.1", "--segment-rms"]
    flags += ["--samples", "2", "--k", "1,2"]
    assert tune(flags, out) == 0
    return flags, out


@pytest.fixture(scope="session")
def plain_run(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "plain"
    assert tune(base, out, "--lr-schedule", "cosine") == 0
    return out


def test_run_folder_is_complete(text_run):
    _, out = text_run
    summary = json.loads((out / "summary.json").read_text())
    measured = set(SUMMARY_KEYS) - {"pass_at_1_code", "invalid_programs"}  # of the other format
    assert not set(SUMMARY_KEYS) - set(summary) and not [k for k in measured if summary[k] is None]
    assert 0 <= summary["sampled_pass_at_1_strict"] <= summary["sampled_pass_at_2_strict"] <= 1
    for name in ("config.json", "environment.json", "last.pt", "verdicts.jsonl", "source/finetune_gsm8k.py"):
        assert (out / name).is_file(), name
    assert not list(out.glob("*.part")) and not list(out.glob("*.tmp*"))
    greedy, sampled = outputs(out), outputs(out, "outputs_sampled.jsonl")
    assert [r["id"] for r in greedy] == [f"test/{i}" for i in range(6)] and len(sampled) == 12
    last, bins = rows(out, "val")[-1], json.loads((out / "calibration.json").read_text())
    for key in ("nll", "brier", "ece10"):  # the solutions, held out and test, before and after a temperature
        assert summary[f"val_{key}"] == pytest.approx(last[key], rel=1e-5)
        assert summary[f"test_{key}"] != pytest.approx(summary[f"val_{key}"], rel=1e-3)
    assert summary["val_nll_t"] < summary["val_nll"] and sum(bins["test"]["scaled"]["count"]) == summary["test_tokens"]
    for r in rows(out, "train"):
        assert 0 <= r["padding"] < 1 and len(r["block_rms_answer"]) == len(r["block_rms_prompt"]) == 2
        assert 0 < r["fisher_answer"] <= 2 and 0 < r["fisher_prompt"] <= 2
        assert min(r["block_rms_answer"]) > 0


def test_the_command_that_a_run_ends_with_grades_what_it_answered(base, tmp_path, capsys):
    """The first 2 of 6 problems: nothing is missing, nothing twice."""
    from eval import gsm8k

    out = tmp_path / "a run"
    assert tune(base, out, "--steps", 1, "--eval-problems", 2) == 0
    command = capsys.readouterr().out.rpartition("compare answers: ")[2]
    words = shlex.split(command)
    assert words[:5] == ["python", "-m", "eval.gsm8k", str(out / "outputs.jsonl"), "OTHER/outputs.jsonl"]
    gsm8k.main([words[3], *words[5:]])
    said = capsys.readouterr()
    assert "2 outputs for 2 of 2 problems" in said.out and "missing" not in said.out


def test_the_adapter_is_the_trained_one(text_run, model):
    from model.lora import load_base
    from model.lora_hub import adapter_tensors, load_adapter

    _, out = text_run
    loaded = load_base(model, "fp32", torch.float32)
    load_adapter(loaded, out / "adapter", str(model))
    kept = load_checkpoint(out / "last.pt")["model"]
    tensors = adapter_tensors(loaded)
    assert set(kept) == set(tensors)
    assert all(torch.equal(kept[name], tensors[name]) for name in kept)


@pytest.mark.parametrize("stop_at", [4, 6])  # within a window of the log, and where validation stands as well
def test_resume_is_exact(text_run, tmp_path, monkeypatch, stop_at):
    """SIGTERM in the middle, then --resume: every number of the log, every weight and every answer is the same."""
    flags, whole = text_run
    sigterm_at(monkeypatch, stop_at - 1)
    assert tune(flags, tmp_path / "cut") == 143
    monkeypatch.undo()
    assert load_checkpoint(tmp_path / "cut" / "last.pt")["step"] == stop_at
    assert not (tmp_path / "cut" / "summary.json").exists()
    assert tune(flags, tmp_path / "cut", "--resume") == 0
    for kind in ("train", "val"):
        assert rows(tmp_path / "cut", kind) == rows(whole, kind)
    ours, theirs = (load_checkpoint(out / "last.pt")["model"] for out in (tmp_path / "cut", whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for name in ("outputs.jsonl", "outputs_sampled.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (whole / name).read_bytes()


def test_a_kill_while_generating_loses_a_batch_at_most(text_run, tmp_path, monkeypatch):
    """The answers written before the kill are read again, without half a line, and the rest come out as before."""
    import eval.answers

    flags, whole = text_run
    original = eval.answers.decode

    class Killed(BaseException):
        pass

    def cut_short(*args, **kwargs):
        seen = 0
        for ended in original(*args, **kwargs):
            yield ended
            seen += len(ended)
            if seen >= 7:
                raise Killed

    out = tmp_path / "cut"
    monkeypatch.setattr(eval.answers, "decode", cut_short)
    with pytest.raises(Killed):
        tune(flags, out)
    monkeypatch.undo()
    part = out / "answers.0.part"
    assert len(part.read_text().splitlines()) >= 7 and not (out / "summary.json").exists()
    with open(part, "a") as file:
        file.write('{"id": "test/5", "sample": 2, "outp')
    assert tune(flags, out, "--resume") == 0
    assert json.loads((out / "summary.json").read_text())["outputs_reused"] >= 7
    for name in ("outputs.jsonl", "outputs_sampled.jsonl"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_a_signal_while_generating_ends_well(text_run, tmp_path, monkeypatch, capsys):
    flags, whole = text_run
    sigterm_while_answering(monkeypatch)
    assert tune(flags, tmp_path / "cut") == 143
    monkeypatch.undo()
    assert "SIGTERM: stopped; the same command with --resume goes on" in capsys.readouterr().err
    assert not (tmp_path / "cut" / "summary.json").exists()
    assert tune(flags, tmp_path / "cut", "--resume") == 0
    assert (tmp_path / "cut" / "outputs.jsonl").read_bytes() == (whole / "outputs.jsonl").read_bytes()


@pytest.mark.parametrize(
    "change",
    [("--micro-batch", 8), ("--log-every", 1), ("--checkpoint-activations",), ("--seq-len", 250), ("--segment-rms",)],
    ids=lambda c: c[0],
)
def test_how_it_computes_is_not_what_it_computes(base, plain_run, tmp_path, change):
    """Micro-batches, probes, rows of another length, recomputation: the same held-out losses. 2e-4 is fp32's rounding
    through 12 steps of Adam; leaving out one problem of a batch of 8 moves them by more than 1e-2."""
    assert tune(base, tmp_path / "run", *change) == 0
    for ours, theirs in zip(rows(tmp_path / "run", "val"), rows(plain_run, "val"), strict=True):
        assert ours["nll"] == pytest.approx(theirs["nll"], abs=2e-4)
        assert ours["eval_tokens"] == theirs["eval_tokens"]


def test_loss_falls_and_is_of_the_answer(plain_run, base, tmp_path):
    losses = [r["loss"] for r in rows(plain_run, "train")]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.5
    assert tune(base, tmp_path / "all", "--loss-on", "all") == 0
    tokens = [rows(out, "val")[0]["eval_tokens"] for out in (plain_run, tmp_path / "all")]
    assert tokens[1] > 2 * tokens[0]
    # CE's Fisher is the Brier score: of the last step alone where each step is a line of the log.
    assert tune(base, tmp_path / "each", "--log-every", 1, "--steps", 2, "--eval-problems", 1) == 0
    for r in rows(tmp_path / "each", "train"):
        assert r["fisher_answer"] == pytest.approx(r["brier"], rel=1e-5)
        assert r["loss"] == pytest.approx(r["nll"], rel=1e-5)


def test_two_ranks_train_the_same(base, plain_run, tmp_path):
    """Half a batch on each of two ranks: the same losses to fp32's rounding, and every problem answered."""
    said = on_ranks(2, finetune_gsm8k.main, [*base, "--out", str(tmp_path / "two")])
    assert [said.count(f"step {step}: validation") for step in (6, 12)] == [1, 1] and "FutureWarning" not in said
    for kind in ("train", "val"):
        for ours, theirs in zip(rows(tmp_path / "two", kind), rows(plain_run, kind), strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], abs=2e-4)
            for name in ("fisher_prompt", "fisher_answer") if kind == "train" else ():
                assert ours[name] == pytest.approx(theirs[name], rel=1e-3)
    assert outputs(tmp_path / "two") == outputs(plain_run)


@pytest.mark.parametrize("kind", ["nf4", "bf16"])
def test_quantised_bases_learn(base, tmp_path, kind):
    if kind == "nf4":
        pytest.importorskip("bitsandbytes", reason="NF4 needs bitsandbytes")
    assert tune(base, tmp_path / "run", "--base", kind, "--no-merge") == 0
    losses = [r["loss"] for r in rows(tmp_path / "run", "train")]
    assert losses[-1] < losses[0] - 0.5
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["base"] == kind


@pytest.mark.parametrize("kind, base_kind", [("text", "fp32"), ("code", "nf4")])
def test_what_is_learnt_by_heart_is_answered(tmp_path, monkeypatch, kind, base_kind):
    """Seven problems that are trained on until they are known, and one that is held out: quantised, adapted, trained,
    stopped, resumed, generated, run and graded, all seven are right."""
    if base_kind == "nf4":
        pytest.importorskip("bitsandbytes", reason="NF4 needs bitsandbytes")
    text = "".join(json.dumps(problem(i)) + "\n" for i in range(8))
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(text)
    write_model(tmp_path / "model", [problem(i)["question"] + problem(i)["answer"] for i in range(8)])
    flags = (
        f"--data {tmp_path} --model {tmp_path / 'model'} --cache {tmp_path / 'cache'} --base {base_kind} --rank 32 "
        "--lora-alpha 32 --batch 7 --seq-len 256 --steps 70 --lr 1e-2 --heldout 1 --eval-every 1000 --log-every 10 "
        f"--eval-batch 3 --generate-tokens 110 --device cpu --prompt plain --format {kind}"
    ).split()
    out = tmp_path / "run"
    sigterm_at(monkeypatch, 33)
    assert tune(flags, out) == 143
    monkeypatch.undo()
    assert tune(flags, out, "--resume") == 0
    summary = json.loads((out / "summary.json").read_text())
    right = [summary[f"pass_at_1_{rule}"] for rule in (("strict", "flexible") if kind == "text" else ("code",))]
    verdicts = outputs(out, "verdicts.jsonl")
    unseen = [v["id"] for v in verdicts if not all(v["correct"][r] for r in v["correct"] if r != "boxed")]
    assert len(unseen) <= 1 and min(right) >= 7 / 8
    assert summary["invalid_programs"] == (None if kind == "text" else sum(v["status"] != "ok" for v in verdicts))
    losses = [r["loss"] for r in rows(out, "train")]
    assert losses[-1] < 0.3 * losses[0] and len(losses) == 7


def test_real_problems(tmp_path):
    """The published set: what is read, split and left out, and a loss that falls."""
    root = os.environ.get("LM_DATA")
    if not root or not (Path(root) / "gsm8k").is_dir():
        pytest.skip("needs $LM_DATA/gsm8k")
    texts = [json.loads(x) for x in (Path(root) / "gsm8k" / "train.jsonl").read_text().split("\n")[:400]]
    write_model(tmp_path / "model", [t["question"] + t["answer"] for t in texts], max_position_embeddings=1024)
    flags = (
        f"--model {tmp_path / 'model'} --base bf16 --rank 8 --batch 4 --seq-len 768 --steps 8 --lr 1e-2 --heldout 16 "
        "--eval-every 8 --log-every 2 --eval-problems 3 --generate-tokens 8 --device cpu"
    ).split()
    assert tune(flags, tmp_path / "run") == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert not set(SUMMARY_KEYS) - set(summary) and summary["eval_problems"] == 3
    losses = [r["loss"] for r in rows(tmp_path / "run", "train")]
    assert losses[-1] < losses[0] - 0.3
    assert rows(tmp_path / "run", "train")[-1]["epoch"] == pytest.approx(8 * 4 / (7473 - 16), rel=0.02)


def test_divergence_ends_the_run(base, tmp_path, capsys):
    assert tune(base, tmp_path / "run", "--lr", 1e30, "--clip", 0) == 1
    assert "not finite in three steps running" in capsys.readouterr().err
    assert not (tmp_path / "run" / "summary.json").exists()


def test_an_adapter_of_another_base(base, plain_run, model, problems, tmp_path, capsys):
    """It is told by its shapes, whatever the names; on its own base it starts where it ended."""
    adapter = plain_run / "adapter"
    small = write_model(tmp_path / model.name, [problem(0)["question"]], hidden_size=32)
    assert "is no adapter of this base" in refused(
        capsys, tmp_path / "run", *base, "--model", small, "--adapter", adapter, "--prompt", "plain"
    )
    assert tune(base, tmp_path / "on", "--adapter", adapter, "--steps", 1, "--lr", 0, "--eval-problems", 1) == 0
    assert rows(tmp_path / "on", "val")[0]["nll"] == rows(plain_run, "val")[-1]["nll"]


def test_a_run_is_not_overwritten_nor_continued_by_another(base, plain_run, capsys):
    before = {p.name: p.stat().st_mtime_ns for p in plain_run.iterdir() if p.name != "lock"}
    for flags, says in (([], "already holds a run"), (["--resume", "--rank", "4"], "rank was 8, now 4")):
        with pytest.raises(SystemExit) as end:
            tune(base, plain_run, *flags)
        assert end.value.code == 2 and says in capsys.readouterr().err
    assert before == {p.name: p.stat().st_mtime_ns for p in plain_run.iterdir() if p.name != "lock"}


def test_the_report_knows_every_flag_by_its_role():
    """By the roles that a run of this script leaves: what makes another arm, another question, or nothing."""
    found = {name: about["role"] for name, about in roles(finetune_gsm8k.Config).items()}
    assert found["prompt"] == "knob" and found["eval_batch"] == "where" and found["seed"] == "bookkeeping"
    settings = "format base loss_on heldout eval_problems generate_tokens model data steps batch seq_len".split()
    assert {found[name] for name in settings} == {"setting"}


def test_two_prompts_are_two_arms_and_two_batches_of_answers_are_one(text_run, tmp_path):
    """Run folders as this script leaves them, one flag changed in each."""

    def copy(name: str, **changes) -> Path:
        out = tmp_path / name
        shutil.copytree(text_run[1], out)
        config = json.loads((out / "config.json").read_text()) | changes
        (out / "config.json").write_text(json.dumps(config))
        return out

    folders = [copy("a"), copy("b", prompt="plain"), copy("c", eval_batch=7, seed=2), copy("d", format="code")]
    report = build(folders)
    assert sorted(len(arm.runs) for arm in report.arms) == [1, 1, 2]
    assert any("prompt=plain" in arm.label for arm in report.arms)
    assert any(w.startswith("NOT COMPARABLE: the arms differ in format") for w in report.warnings)
