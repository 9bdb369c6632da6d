"""What finetune_gsm8k.py says of answers: their confidence before and after, best weights, epochs, and PEFT's table."""

import json
import shutil

import pytest
import torch
from gsm8k_runs import outputs, refused, rows, sigterm_while_answering, tune
from safetensors.torch import load_file

import finetune_gsm8k
from eval import method_comparison
from eval.report.build import build
from eval.report.page import to_markdown
from runtime.folder import load_checkpoint


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """A run that answers before and after, with samples, judged by held-out answers."""
    out = tmp_path_factory.mktemp("answers") / "run"
    flags = ["--before", "--samples", "2", "--best-by", "pass@1", "--method-comparison", out.parent / "row.json"]
    assert tune(base, out, *flags) == 0
    return out


def test_confidence_is_in_the_summary_before_and_after(run):
    summary = json.loads((run / "summary.json").read_text())
    assert summary["answers_rule"] == summary["before_answers_rule"] == "strict"
    for kind in ("sequence", "token", "agreement"):
        for when in ("", "before_"):
            about = {
                k: summary[f"{when}answers_{kind}_{k}"] for k in ("accuracy", "ece10", "brier", "aurc", "confidence")
            }
            assert all(0 <= v <= 1 for v in about.values()) and f"{when}answers_{kind}_auroc" in summary
            assert about["accuracy"] == summary[f"{when}pass_at_1_strict"]
    assert summary["before_answers_token_confidence"] < summary["answers_token_confidence"]  # it was a random model
    greedy = [v for v in outputs(run, "verdicts.jsonl") if not v["sample"]]
    assert all(set(v["confidence"]) == {"sequence", "token", "agreement"} for v in greedy)
    assert all("tokens" not in row for row in outputs(run)) and not list(run.rglob("*.part"))


def test_answers_before_are_the_bases(run, base, tmp_path):
    """LoRA's B is 0: what is answered before training is what a run without training answers."""
    assert tune(base, tmp_path / "none", "--steps", 1, "--lr", 0) == 0
    assert outputs(run / "before") == outputs(tmp_path / "none")
    assert not (tmp_path / "none" / "before").exists()


def test_a_signal_before_training_is_gone_on_from(run, base, tmp_path, monkeypatch, capsys):
    """SIGTERM while the base answers: nothing has been trained, and --resume ends as the whole run did."""
    out, flags = tmp_path / "cut", ["--before", "--samples", "2", "--best-by", "pass@1"]
    sigterm_while_answering(monkeypatch)
    assert tune(base, out, *flags) == 143
    monkeypatch.undo()
    assert "SIGTERM: stopped; the same command with --resume goes on" in capsys.readouterr().err and not rows(
        out, "train"
    )
    assert tune(base, out, *flags, "--resume") == 0
    assert rows(out, "val") == rows(run, "val")
    for name in ("before/outputs.jsonl", "outputs.jsonl", "before/verdicts.jsonl"):
        assert (out / name).read_bytes() == (run / name).read_bytes()


def test_a_signal_in_a_validation_by_answers_is_gone_on_from(run, base, tmp_path, monkeypatch):
    """SIGTERM while the held-out problems are answered: the validation is made again, as in the whole run."""
    out, flags = tmp_path / "cut", ["--before", "--samples", "2", "--best-by", "pass@1"]
    shutil.copytree(run, out)
    for name in ("last.pt", "best.pt", "summary.json"):
        (out / name).unlink()
    (out / "previous.pt").rename(out / "last.pt")  # of step 6
    sigterm_while_answering(monkeypatch)
    assert tune(base, out, *flags, "--resume") == 143
    monkeypatch.undo()
    assert load_checkpoint(out / "last.pt")["owed"] and [r["step"] for r in rows(out, "val")] == [6]
    assert tune(base, out, *flags, "--resume") == 0
    assert rows(out, "val") == rows(run, "val") and outputs(out) == outputs(run)


def test_training_is_the_same_with_answers_before_it(run, base, tmp_path):
    assert tune(base, tmp_path / "plain") == 0
    ours, theirs = (load_checkpoint(out / "last.pt")["model"] for out in (run, tmp_path / "plain"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_validations_say_their_epoch(run, base, tmp_path, capsys):
    assert [row["epoch"] for row in rows(run, "val")] == [6 * 8 / 32, 12 * 8 / 32]
    assert all(0 <= row["pass_at_1_strict"] <= 1 for row in rows(run, "val"))
    capsys.readouterr()
    assert tune(base, tmp_path / "short", "--steps", 3, "--eval-problems", 1) == 0
    assert "which 3 steps of 8 go through 0.8 times" in capsys.readouterr().out


@pytest.mark.parametrize("best_by", ["nll", "pass@1"])
def test_the_best_weights_are_reported(base, tmp_path, monkeypatch, best_by):
    """The first validation is made the best: its weights are exported and answer, though training went on."""
    original, better = finetune_gsm8k.Meter.judge, {"nll": 0.5, "pass@1": 0.9}[best_by]

    def judge(meter, numbers: dict, by: str) -> bool:
        assert by == {"nll": "nll", "pass@1": "pass_at_1_strict"}[best_by]
        return original(meter, numbers | {by: better if meter.step == 4 else 0.7}, by)

    monkeypatch.setattr(finetune_gsm8k.Meter, "judge", judge)
    flags = ["--report", "best", "--best-by", best_by, "--eval-every", 4, "--steps", 16]
    assert tune(base, tmp_path / "run", *flags, "--patience", 2) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["reported_step"] == summary["best_step"] == 4 and summary["stopped_early"] == "early_stop"
    best, last = (load_checkpoint(tmp_path / "run" / f"{name}.pt") for name in ("best", "last"))
    assert best["step"] == 4 and last["step"] == 12
    adapter = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(adapter[name], best["model"][name]) for name in adapter)
    assert any(not torch.equal(adapter[name], last["model"][name]) for name in adapter)


def test_the_report_shows_confidence_and_epochs(run):
    report = build([run])
    page = to_markdown(report)
    for kind in ("sequence", "token", "agreement"):
        assert f"Confidence of answers: {kind}, after training" in page
        assert f"Confidence of answers: {kind}, before training" in page
    for picture in ("confidence", "epochs"):
        assert report.figures[picture]().startswith(b"\x89PNG") and f"{picture}.png" in page


def test_the_row_for_pefts_comparison(run, model):
    """The keys of its results; of those that its table reads as numbers the ones said to be missing are null."""
    row = json.loads((run.parent / "row.json").read_text())
    summary = json.loads((run / "summary.json").read_text())
    assert set(row) == {"run_info", "train_info", "meta_info"}
    last = row["train_info"]["metrics"][-1]
    assert last["test accuracy"] == summary["pass_at_1_strict"] and last["rule"] == "strict"
    assert last["train samples"] == 12 * 8 and last["train total tokens"] == summary["tokens_seen"]
    assert [m["step"] for m in row["train_info"]["metrics"]] == [6, 12, 12]
    assert row["train_info"]["train_time"] == summary["train_seconds"] > 0 and row["train_info"]["status"] == "success"
    assert sum(m["train time"] for m in row["train_info"]["metrics"][:-1]) <= summary["train_seconds"] + 1e-9
    assert row["train_info"]["file_size"] == (run / "adapter" / "adapter_model.safetensors").stat().st_size
    numbers = row["train_info"] | last | {"total_time": row["run_info"]["total_time"]}
    memory = {f"accelerator_memory_{kind}" for kind in ("reserved_avg", "max", "reserved_99th")}
    for name in memory | {"total_time"}:
        assert (
            numbers.pop(name) is None and name.removeprefix("accelerator_memory_reserved") in method_comparison.__doc__
        )
    read = "train_time", "file_size", "test accuracy", "train loss", "train samples", "train total tokens"
    assert all(isinstance(numbers[name], int | float) for name in read)
    assert row["run_info"]["peft_config"]["peft_type"] == "LORA" and row["run_info"]["peft_config"]["r"] == 8
    assert row["run_info"]["train_config"]["model_id"] == str(model)
    packages = json.loads((run / "environment.json").read_text())["packages"]
    assert row["meta_info"]["package_info"]["torch-version"] == packages["torch"] is not None


def test_a_row_of_no_run_is_refused(run, tmp_path, capsys):
    for arguments, says in (
        ([tmp_path, tmp_path / "x.json"], "config.json is missing"),
        ([run, tmp_path / "no" / "x.json"], "there is no folder"),
    ):
        with pytest.raises(SystemExit) as end:
            method_comparison.main([*map(str, arguments)])
        err = capsys.readouterr().err
        assert end.value.code == 2 and says in err and err.count("\n") == 1
    method_comparison.main([str(run), str(tmp_path / "x.json")])
    shutil.copytree(run, tmp_path / "old")
    summary = json.loads((run / "summary.json").read_text())
    (tmp_path / "old" / "summary.json").write_text(
        json.dumps({k: v for k, v in summary.items() if "reported" not in k})
    )
    with pytest.raises(ValueError, match="old is a run of an older finetune_gsm8k.py, which kept no 'reported_step'"):
        method_comparison.row(tmp_path / "old")
    assert (tmp_path / "x.json").read_text() == (run.parent / "row.json").read_text()


def test_flags_that_do_not_go_together(base, tmp_path, capsys):
    assert "no folder" in refused(capsys, tmp_path / "run", *base, "--method-comparison", tmp_path / "no" / "x.json")
    assert "did you mean" in refused(capsys, tmp_path / "run", *base, "--best-by", "pass1")


def test_test_problems_whose_solutions_are_too_long_are_answered_all_the_same(base, problems, tmp_path, capsys):
    folder = shutil.copytree(problems, tmp_path / "problems")
    row = json.loads((folder / "test.jsonl").read_text().splitlines()[0])
    words, _, gold = row["answer"].rpartition("\n")
    (folder / "test.jsonl").write_text(json.dumps(row | {"answer": f"{words * 30}\n{gold}"}) + "\n")
    flags = [str(folder) if flag == str(problems) else flag for flag in base]
    assert tune(flags, tmp_path / "run", "--steps", 2) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["test_nll"] is None and summary["val_nll"] > 0 and summary["eval_problems"] == 1
    assert f"on 1 problems; val nll {summary['val_nll']:.4f}" in capsys.readouterr().out
