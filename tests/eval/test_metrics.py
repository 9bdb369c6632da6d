"""A metric is one entry of one table: measured, and shown in the report's tables, differences and terminal."""

import math

import pytest
import torch
from invented_runs import row, write_run

from eval import metrics
from eval.metrics import Metric
from eval.report import tables, terminal
from eval.report.build import build
from kernels import Calibration, softmax_moments

ECE25 = Metric(
    "ece25",
    "ECE",
    "25 bins, %",
    "lower",
    100,
    2,
    "train final table delta terminal",
    "e25 {:.3f}",
    of=lambda calibration, numbers: calibration.ece(25),
)


@pytest.fixture
def added(monkeypatch):
    """The table of metrics with one entry more."""
    monkeypatch.setattr(metrics, "TOKENS", (*metrics.TOKENS, ECE25))


@pytest.fixture
def calibration():
    """Of 200 tokens under random logits of 40 classes."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(200, 40, generator=generator)
    found = Calibration()
    found.update(softmax_moments(logits, torch.randint(40, (200,), generator=generator)))
    return found


def test_an_entry_is_measured(added, calibration):
    assert metrics.measure(calibration)["ece25"] == calibration.ece(25) > 0
    for place in ("train", "final", "table", "delta", "terminal"):
        assert metrics.shown(metrics.TOKENS, place)[-1] == ECE25
    assert ECE25 not in metrics.shown(metrics.TOKENS, "grid") and ECE25.bar.format(0.0123) == "e25 0.012"


def test_an_entry_is_in_the_report(added, undrawn, tmp_path, capsys):
    folders = []
    for loss, ece in (("ce", 0.04), ("dpsm", 0.03)):
        for seed in (1, 2, 3):
            values = {"val_ece25": ece + seed / 1000, "val_ece25_t": 0.02, "test_ece25": 0.5}
            folder = tmp_path / f"{loss}{seed}"
            folders.append(write_run(folder, config={"loss": loss, "seed": seed}, summary=values))
    arms = build(folders).arms
    final = tables.final_table(arms, "val")
    assert row(final, "ce")["ECE 25 bins, % ↓"][:2] == ("4.20", "± 0.10")
    assert row(final, "ce + temperature")["ECE 25 bins, % ↓"].text == "2.00"
    assert row(tables.final_table(arms, "test"), "dpsm")["ECE 25 bins, % ↓"].text == "50.00"
    assert row(tables.delta_table(arms), "dpsm")["ECE 25 bins, % ↓"].text == "-1.00 ± 0.00"
    assert terminal.main([*map(str, folders), "--out", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("arm "))
    assert lines[head].count("ECE %") == 2 and " ECE, 25 bins, % " in lines[head]
    assert max(map(len, lines[head:])) <= terminal.WIDTH
    assert lines[head + 1].split() == ["ce", "3", "30.00", "4.00", "0.8000", "4.20", "3.3912", "1.00", "20,000"]
    assert "| 25 bins" not in (tmp_path / "out/report.md").read_text()  # the unit is beside the name
    assert "ECE, 25 bins, %" in (tmp_path / "out/report.md").read_text()


def test_without_the_entry_nothing_of_it_is_shown(calibration):
    assert "ece25" not in metrics.measure(calibration)


def test_bits_per_byte_are_of_the_text(calibration):
    assert "bits_per_byte" not in metrics.measure(calibration)
    found = metrics.measure(calibration, size=1000)
    assert found["bits_per_byte"] == pytest.approx(200 * found["nll"] / math.log(2) / 1000)


def test_every_place_is_known():
    groups = (metrics.TOKENS, metrics.TEMPERED, metrics.COST, metrics.SUMMARIES, metrics.ANSWERS, metrics.SAMPLES)
    groups += tuple(metrics.ANSWER_CONFIDENCE.values())
    assert {place for group in groups for m in group for place in m.shown.split()} <= set(metrics.PLACES)
    with pytest.raises(ValueError, match="unknown place 'tabel'; expected one of train, line, final"):
        metrics.shown(metrics.TOKENS, "tabel")
