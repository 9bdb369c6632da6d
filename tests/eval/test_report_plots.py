"""The figures draw the bands, views and reliability that the run folders hold."""

import json

import pytest
from invented_runs import arms_of, bins, write_run

from eval.report import charts, plots
from kernels import Calibration


def test_the_band_is_mean_and_range_over_the_steps_that_all_seeds_have(tmp_path):
    curves = ([(1, 10, 8.0), (2, 20, 4.0), (3, 30, 2.0)], [(1, 14, 6.0), (2, 22, 5.0)])
    folders = [write_run(tmp_path / f"{s}", config={"seed": s}, summary={}, curve=c) for s, c in enumerate(curves)]
    (arm,) = arms_of(*folders)
    assert charts.band(arm.runs, "val", "train_seconds", "ppl") == ([12, 21], [7, 4.5], [6, 4], [8, 5])


def test_the_frontier_is_of_the_arms_that_no_other_beats_in_both(tmp_path):
    found = {"ce": (30.0, 0.04), "brier": (36.0, 0.02), "dpsm": (31.0, 0.05)}
    folders = [
        write_run(
            tmp_path / f"{loss}{s}", config={"loss": loss, "seed": s}, summary={"val_ppl": ppl + s, "val_ece10": ece}
        )
        for loss, (ppl, ece) in found.items()
        for s in (0, 2)
    ]
    [chart] = charts.frontier(arms_of(*folders), "val")
    lines = {line.label: line for line in chart.lines}
    assert lines["dpsm"].x == [31.0, 33.0] and lines["dpsm"].y == [5.0, 5.0] and not lines["dpsm"].joined
    edge = lines["frontier of the means"]
    assert (edge.x, edge.y, edge.notes) == ([31.0, 37.0], [4.0, 2.0], ["ce", "brier"])  # CE beats DPSM in both
    assert charts.frontier(arms_of(*folders[:2]), "val") == []


def test_a_long_line_is_thinned_and_keeps_its_ends():
    for n in (2, 300, 301, 302, 599, 2000):
        kept = charts.every_nth([*range(n)], 300)
        assert kept[0] == 0 and kept[-1] == n - 1 and min(n, 150) <= len(kept) <= 301
        assert charts.every_nth(kept, 300) == kept


def test_the_first_points_do_not_squash_the_view(tmp_path):
    curve = [(100 * k, k, 50_000.0 if k == 1 else 60.0 - k) for k in range(1, 11)]
    (arm,) = arms_of(write_run(tmp_path / "run", summary={}, curve=curve))
    assert charts.frame([arm], "val", "ppl", skip=0.2) == (50.0, 57.0)


def test_reliability_adds_the_bins_up_and_averages_the_ece(tmp_path):
    folders = [
        write_run(tmp_path / f"{s}", config={"seed": s}, summary={}, sharpness=sharpness)
        for s, sharpness in ((1, 1.0), (2, 1.5))
    ]
    (arm,) = arms_of(*folders)
    curve, ece = charts.pooled(arm, "val", "raw", 10)
    each = [Calibration.from_bins(bins(sharpness)) for sharpness in (1.0, 1.5)]
    assert curve["count"] == [2 * n for n in each[0].reliability(10)["count"]]  # the same confidences, twice
    assert ece == pytest.approx((each[0].ece(10) + each[1].ece(10)) / 2, rel=1e-12)  # a mean of two doubles
    assert charts.pooled(arm, "test", "raw", 10) is None


def test_a_run_without_a_temperature_has_the_reliability_before_it_alone(tmp_path):
    folder = write_run(tmp_path / "run", summary={"temperature": None})
    (folder / "calibration.json").write_text(json.dumps({"val": {"raw": bins(1.3), "scaled": None}, "test": None}))
    (arm,) = arms_of(folder)
    assert set(arm.runs[0].calibration) == {("val", "raw")} and charts.pooled(arm, "val", "scaled", 10) is None
    assert plots.reliability([arm], "val").startswith(b"\x89PNG")


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_every_chart_of_a_group_is_in_its_picture(monkeypatch, count):
    drawn, draw_chart = [], plots.draw_chart
    monkeypatch.setattr(plots, "draw_chart", lambda ax, chart: drawn.append(chart.title) or draw_chart(ax, chart))
    line = charts.Line("ce", "#333333", [1.0, 2.0], [3.0, 4.0])
    group = [charts.Chart(f"chart {i}", "x", "y", [line]) for i in range(count)]
    assert plots.draw(group).startswith(b"\x89PNG") and drawn == [chart.title for chart in group]
