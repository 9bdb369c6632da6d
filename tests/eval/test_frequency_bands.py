"""Calibration of targets by how often the training text has them: the bands, their sums, and where they are shown."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from invented_runs import arms_of, bands, write_run
from refusals import refused

from eval import metrics
from eval.heldout import BANDS, evaluate, final_metrics, frequency_bands
from eval.report import build, tables
from eval.report import terminal as report
from kernels import Calibration
from runtime.machine import World

WORLD = World(0, 1, torch.device("cpu"))


def text_of(*counts: int) -> np.ndarray:
    """Token k ``counts[k]`` times, as uint16 like a token cache."""
    return np.repeat(np.arange(len(counts), dtype=np.uint16), counts)


def test_bands_are_thirds_of_the_text():
    """Of 90 tokens 30 each; what does not occur is rare; equal counts stay together, by the middle of their share."""
    found = frequency_bands(text_of(1, 30, 4, 0, 15, 10, 15, 5, 10, 0), 12)
    assert found.of.tolist() == [2, 0, 2, 2, 1, 2, 1, 2, 2, 2, 2, 2]
    assert found.about == {
        "frequent": {"times": [30, 30], "types": 1},
        "middle": {"times": [15, 15], "types": 2},
        "rare": {"times": [0, 10], "types": 9},
    }
    assert set(frequency_bands(text_of(7, 7, 7, 7, 7), 5).of.tolist()) == {1}
    one = frequency_bands(text_of(1000, 1), 3)
    assert one.of.tolist() == [1, 2, 2] and list(one.about) == ["middle", "rare"]


def test_long_texts_are_counted_in_parts():
    counts = np.array([3_000_000, 2_000_000, 1_000_000])
    text = np.random.default_rng(0).permutation(text_of(*counts))
    assert frequency_bands(text, 3).about["frequent"]["times"] == [3_000_000, 3_000_000]


class Head(torch.nn.Module):
    """Hidden states are the logits."""

    def __init__(self, size: int = 9):
        super().__init__()
        self.head_weight = torch.nn.Parameter(torch.eye(size))


def batches(count: int = 6):
    random = torch.Generator().manual_seed(0)
    out = []
    for _ in range(count):
        logits, y = 3 * torch.randn(50, 9, generator=random), torch.randint(0, 9, (50,), generator=random)
        y[::5] = -100
        out.append((logits, y))
    return out


def test_a_band_is_the_set_without_other_targets():
    """Raw and scaled: the numbers of each band are those of an evaluation in which all other targets are ignored."""
    found_bands = frequency_bands(text_of(30, 1, 10, 2, 10, 5, 15, 0, 17), 9)
    made = batches()
    found = evaluate(Head(), iter(made), WORLD, scale=0.7, bands=found_bands)
    plain = evaluate(Head(), iter(made), WORLD, scale=0.7)
    assert found.raw.compute() == plain.raw.compute() and found.scaled.compute() == plain.scaled.compute()
    assert set(found_bands.of.tolist()) == {0, 1, 2}
    for k, band in enumerate(BANDS):
        alone = [(h, torch.where(found_bands.of[y.clamp_min(0)] == k, y, -100)) for h, y in made]
        other = evaluate(Head(), iter(alone), WORLD, scale=0.7)
        for mine, theirs in zip(found.bands[band], (other.raw, other.scaled), strict=True):
            ours, others = mine.compute(), theirs.compute()
            same = ("tokens", "nll", "ece10", "ece100", "accuracy", "confidence")
            assert [ours[key] for key in same] == pytest.approx([others[key] for key in same], abs=1e-6)  # fp32
            assert ours["tokens"] > 10
    assert sum(raw.count.sum() for raw, _ in found.bands.values()) == found.raw.count.sum()


def test_a_summary_holds_them():
    """Numbers of each set and band, bins of ten; a set without such targets says so; nothing without a text."""
    pieces, made = SimpleNamespace(get=lambda name, make: json.loads(json.dumps(make()))), batches()
    few = [(h, torch.where(y == 0, y, -100)) for h, y in made]
    sets = {"val": lambda: iter(made), "test": None, "ood": lambda: iter(few)}
    text = text_of(30, 1, 10, 2, 10, 5, 15, 0, 17)
    entries, bins = final_metrics(Head(), sets, WORLD, pieces=pieces, text=text)
    keys = [m.key for m in metrics.shown(metrics.TOKENS, "band")]
    assert keys == ["nll", "ece10", "accuracy", "confidence"]
    frequent, rare = (entries["bands"][band] for band in ("frequent", "rare"))
    assert frequent["times"] == [30, 30] and "test" not in frequent
    assert list(frequent["val"]) == ["tokens", *keys, *(f"{key}_t" for key in keys)]
    assert rare["ood"] == {"tokens": 0} and frequent["ood"]["tokens"] == sum(int((y == 0).sum()) for _, y in made)
    mean = sum(about["val"]["tokens"] * about["val"]["nll"] for about in entries["bands"].values())
    assert mean / entries["val_tokens"] == pytest.approx(entries["val_nll"])
    again = Calibration.from_bins(bins["val"]["frequent_scaled"])
    assert len(again.count) == 10 and again.ece(10) == pytest.approx(frequent["val"]["ece10_t"])
    entries, bins = final_metrics(Head(), sets, WORLD, pieces=pieces)
    assert "bands" not in entries and set(bins["val"]) == {"raw", "scaled"}


def test_the_page_shows_them_by_arm(tmp_path):
    folders = [write_run(tmp_path / f"ce{seed}", config={"seed": seed}, summary={}) for seed in (1, 2)]
    arms = arms_of(*folders)
    table = tables.band_table(arms, "val")
    assert [row[0].text for row in table.rows] == ["ce"] * 3 + ["ce + temperature"] * 3
    assert [[cell.text for cell in row[1:5]] for row in table.rows[:3]] == [
        ["frequent", "5,000 to 90,000", "85,000", "66,000"],
        ["middle", "60 to 4,999", "4,939", "66,000"],
        ["rare", "0 to 59", "59", "66,000"],
    ]
    assert table.rows[2][5].text == f"{math.log(falling_ppl(folders[0])) + 0.8:.4f}" and table.rows[2][6].text == "5.00"
    assert tables.band_table(arms, "test") is None
    made = build.build(folders)
    at = made.blocks.index(("h3", "By how often the training text has the target"))
    charts = next(block for block in made.blocks[at:] if block[0] == "charts")
    assert [chart["title"] for chart in charts[2]["charts"]] == [f"Reliability of {band} targets" for band in BANDS]
    assert "tokens, ECE" in charts[2]["charts"][2]["lines"][0]["notes"][0]


def falling_ppl(folder) -> float:
    return json.loads((folder / "summary.json").read_text())["val_ppl"]


@pytest.mark.parametrize("broken", [3, {"rare": 1}, {"rare": {"times": 2, "types": 1}}, {"rare": {"times": [1, 2]}}])
def test_broken_ones_are_one_line(tmp_path, capsys, broken):
    run = write_run(tmp_path / "run", summary={"bands": bands(3.0) | broken if isinstance(broken, dict) else broken})
    line = [str(run), "--out", str(tmp_path / "out")]
    refused(capsys, "summary.json: bands are no bands", lambda: report.main(line), tmp_path / "out")
