"""The training step of races.train_step: what its sides compute, and its rows on file."""

import csv

import torch

from kernels.bench.providers import FROM_HIDDEN
from races import train_step


def test_training_step_of_a_tiny_model(tmp_path, capsys):
    file = tmp_path / "step.csv"
    assert train_step.main(["--repeats", "1", "--device", "cpu", "--csv", str(file)]) == 0
    with open(file) as opened:
        rows = {r["provider"]: r for r in csv.DictReader(opened)}
    assert set(rows) == {"step: torch CE", "step: our CE", "step: DPSM, Fisher"}
    assert all(float(r["step_ms"]) > 0 and r["peak_bytes"] == "" for r in rows.values())
    assert "step: DPSM, Fisher" in capsys.readouterr().out


def test_a_side_that_fails_is_a_row_and_sides_are_chosen_by_name(tmp_path, monkeypatch, capsys):
    def fails(h, w, y):
        raise RuntimeError("no such kernel")

    sides = train_step.sides("cpu")
    monkeypatch.setattr(train_step, "sides", lambda device: sides | {"step: our CE": fails})
    file = tmp_path / "step.csv"
    assert train_step.main(["--repeats", "1", "--device", "cpu", "--csv", str(file), "--only", "our CE"]) == 1
    with open(file) as opened:
        (row,) = csv.DictReader(opened)
    assert row["provider"] == "step: our CE" and row["missing"] == "failed: RuntimeError: no such kernel"
    assert train_step.main(["--repeats", "1", "--device", "cpu", "--csv", str(file), "--rows", "2"]) == 1
    with open(file) as opened:
        assert [r["provider"] for r in csv.DictReader(opened)] == ["step: our CE", "step: torch CE"]
    assert "left out by --seconds or --rows: 1, the first of them step: DPSM, Fisher" in capsys.readouterr().err
    assert train_step.main(["--device", "cpu", "--only", "theirs"]) == 2
    assert "--only theirs: the sides are step: torch CE, step: our CE" in capsys.readouterr().err


def test_the_compiled_side_knows_v(monkeypatch):
    how = {}
    monkeypatch.setattr(torch, "compile", lambda function, **given: how.update(given) or function)
    assert "step: compiled torch CE" in train_step.sides("cuda") and how == dict(dynamic=False)


def test_sides_of_the_training_step_compute_their_loss():
    hidden, weight, targets = torch.randn(6, 8), torch.randn(30, 8), torch.randint(30, (6,))
    values = {name: loss_of(hidden, weight, targets) for name, loss_of in train_step.sides("cpu").items()}
    torch.testing.assert_close(values["step: torch CE"], values["step: our CE"])
    want = FROM_HIDDEN["linear + literal DPSM"](hidden, weight, targets)
    torch.testing.assert_close(values["step: DPSM, Fisher"], want)


def test_bad_options_are_one_line(capsys):
    assert train_step.main(["--repeats", "-1", "--device", "cpu"]) == 2
    assert "--repeats -1" in (err := capsys.readouterr().err) and err.count("\n") == 1
