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


def test_sides_of_the_training_step_compute_their_loss():
    hidden, weight, targets = torch.randn(6, 8), torch.randn(30, 8), torch.randint(30, (6,))
    values = {name: loss_of(hidden, weight, targets) for name, loss_of in train_step.sides("cpu").items()}
    torch.testing.assert_close(values["step: torch CE"], values["step: our CE"])
    want = FROM_HIDDEN["linear + literal DPSM"](hidden, weight, targets)
    torch.testing.assert_close(values["step: DPSM, Fisher"], want)


def test_bad_options_are_one_line(capsys):
    assert train_step.main(["--repeats", "-1", "--device", "cpu"]) == 2
    assert "--repeats -1" in (err := capsys.readouterr().err) and err.count("\n") == 1
