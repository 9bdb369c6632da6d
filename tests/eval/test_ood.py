"""eval.ood: finished runs on further texts have the numbers that the run itself would have had of them."""

import csv
import json
import shutil

import pytest
import torch
from lm_runs import train
from refusals import refused

from eval.ood import main
from runtime.machine import World


@pytest.fixture(scope="module")
def run(lm_base, corpus, tmp_path_factory):
    """A run that has evaluated its own validation text as another set, and that text."""
    text = tmp_path_factory.mktemp("other") / "text"
    text.mkdir()
    shutil.copy(corpus / "val.txt", text / "all.txt")
    out = tmp_path_factory.mktemp("runs") / "run"
    assert train(lm_base, out, "--ood", text, "--report", "best") == 0
    return out, text


def test_a_run_has_the_numbers_of_its_own_ood(run, corpus, tmp_path, capsys):
    out, text = run
    before = {file: file.stat().st_mtime_ns for file in out.iterdir()}
    table, cache = tmp_path / "ood.csv", str(tmp_path / "cache")
    other = tmp_path / "third"
    other.mkdir()
    shutil.copy(corpus / "test.txt", other)
    given = [str(out), "--on", str(text), str(other), "--cache", cache, "--rows", "3", "--device", "cpu"]
    assert main([*given, "--csv", str(table)]) == 0
    assert {file: file.stat().st_mtime_ns for file in out.iterdir()} == before
    own, third = rows = list(csv.DictReader(table.open()))
    summary = json.loads((out / "summary.json").read_text())
    assert [row["text"] for row in rows] == [str(text), str(other)]
    for name in ("nll", "ppl", "bits_per_byte", "ece10", "brier", "nll_t", "ece10_t", "brier_t"):
        assert float(own[name]) == pytest.approx(summary[f"ood_{name}"], rel=1e-5), name
        assert float(third[name]) == pytest.approx(summary[f"test_{name}"], rel=1e-5), name
    assert float(own["nll_t"]) != float(own["nll"]) and int(own["tokens"]) == summary["ood_tokens"]
    head, first, second = capsys.readouterr().out.splitlines()[-3:]
    assert head.split("  ")[-1].strip() == "Brier, T" and first.endswith(str(text)) and str(out) in second
    assert f"{summary['ood_nll']:.4f}" in first and f"{100 * summary['test_ece10']:.2f}" in second


def test_a_run_without_a_temperature_has_none(run, tmp_path, capsys):
    out, text = run
    copy = tmp_path / "run"
    shutil.copytree(out, copy)
    summary = json.loads((copy / "summary.json").read_text())
    (copy / "summary.json").write_text(json.dumps(summary | {"temperature": None}))
    assert main([str(copy), "--on", str(text), "--cache", str(tmp_path), "--csv", str(tmp_path / "ood.csv")]) == 0
    (row,) = csv.DictReader((tmp_path / "ood.csv").open())
    assert row["nll_t"] == row["ece10_t"] == row["brier_t"] == "" and float(row["nll"]) > 0
    assert capsys.readouterr().out.splitlines()[-1].split()[-4:-1] == ["-", "-", "-"]


def test_what_is_wrong_is_said_before_anything_is_measured(run, tmp_path, capsys, monkeypatch):
    out, text = run
    table = tmp_path / "ood.csv"

    def given(*words):
        return lambda: main([str(out), *map(str, words), "--cache", str(tmp_path / "cache"), "--csv", str(table)])

    unfinished, other, older = (tmp_path / name for name in ("unfinished", "other", "older"))
    for folder in (unfinished, other, older):
        shutil.copytree(out, folder)
    (unfinished / "summary.json").unlink()
    summary = json.loads((out / "summary.json").read_text())
    (other / "summary.json").write_text(json.dumps(summary | {"script": "finetune_gsm8k.py"}))
    (older / "summary.json").write_text(json.dumps({"script": "train_lm.py"}))
    refused(capsys, "unfinished/summary.json is missing", given(unfinished, "--on", text), tmp_path)
    refused(capsys, "run of finetune_gsm8k.py", given(other, "--on", text), tmp_path)
    refused(capsys, "does not say its reported, temperature", given(older, "--on", text), tmp_path)
    refused(capsys, "--rows 0", given("--on", text, "--rows", 0), tmp_path)
    refused(capsys, "--on", given(), tmp_path)
    refused(capsys, "nowhere", given("--on", text, tmp_path / "nowhere"), tmp_path)
    for wrong in ({"temperature": 0.0}, {"temperature": "hot"}):
        (older / "summary.json").write_text(json.dumps(summary | wrong))
        refused(capsys, "expected a number above 0", given(older, "--on", text), tmp_path)
    (older / "summary.json").write_text(json.dumps(summary | {"reported": "../gone"}))
    refused(capsys, r"gone\.pt.*is missing", given(older, "--on", text), tmp_path)
    (older / "summary.json").write_text(json.dumps(summary | {"reported": "last"}))
    (older / "last.pt").write_bytes(b"no checkpoint")
    refused(capsys, r"last\.pt", lambda: main([str(older), "--on", str(text)]), tmp_path)
    monkeypatch.setattr("eval.ood.start_world", lambda *_, **__: World(0, 2, torch.device("cpu")))
    refused(capsys, "2 ranks: .* without torchrun", given("--on", text), tmp_path)
