"""Pruning: which runs are stopped, which never, and what becomes of them."""

import json
from pathlib import Path

import numpy as np
import pytest

from eval.campaign import __main__ as campaign
from eval.campaign import check
from eval.campaign.progress import Run, curve_of, forecast_of
from eval.campaign.pruning import Pruner, kept, loss_at
from schedules.forecast import student_quantile
from schedules.learn import final_loss
from schedules.rules import lr_factor

CONFIG = dict(steps=1000, schedule="linear", lr=1e-3, lr_warmup=0.0, lr_floor=0.0)


def rows(floor: float, steps: int, noise: float = 0.004) -> list[dict]:
    """Rows of a run whose loss falls to about ``floor``, a row a ten steps."""
    drawn = np.random.default_rng(round(1000 * floor))
    at = range(10, steps + 1, 10)
    loss = [floor * (1 + 4.0 * s**-0.6 + noise * drawn.normal()) for s in at]
    lr = [1e-3 * lr_factor("linear", s - 1, 1000) for s in at]
    return [dict(step=s, loss=float(a), nll=float(a), lr=b) for s, a, b in zip(at, loss, lr, strict=True)]


def run(name: str, floor: float, steps: int, state: str = "waiting", **config) -> Run:
    made = Run(name, Path(name), CONFIG | config, state, step=steps)
    made.curve = curve_of(name, rows(floor, steps))
    made.forecast = forecast_of(made.curve, [], made.config)
    return made


def question(run: Run):
    return run.config.get("data")


def test_a_run_that_will_hardly_win_is_stopped_by_its_forecast():
    best = run("best", 3.0, 1000, "finished")
    bad, good = run("bad", 4.5, 300), run("good", 2.9, 300)
    why = Pruner("forecast", set(), question).why(bad, [best, bad, good])
    assert why.startswith("P(better than 3.") and "of best) = " in why and "at 30%: forecast" in why
    assert Pruner("forecast", set(), question).why(good, [best, bad, good]) == ""
    for rule, keep, runs in (
        ("", set(), [best, bad]),
        ("forecast", {"bad"}, [best, bad]),
        ("forecast", set(), [good, bad]),
    ):
        assert Pruner(rule, keep, question).why(bad, runs) == ""  # off; kept; nothing has ended
    other = run("other", 3.0, 1000, "finished", data="other")
    assert Pruner("forecast", set(), question).why(bad, [other, bad]) == ""  # another question


@pytest.mark.parametrize("chance, stopped", [(0.015, True), (0.025, False)])
def test_it_is_stopped_below_two_per_cent(chance, stopped):
    best, bad = run("best", 3.0, 1000, "finished"), run("bad", 4.5, 300)
    final = final_loss(best.curve)[1]
    bad.forecast = bad.forecast._replace(mean=final + student_quantile(1 - chance) * bad.forecast.sd)
    assert bad.forecast.better_than(final) == pytest.approx(chance, rel=1e-6)
    assert bool(Pruner("forecast", set(), question).why(bad, [best, bad])) == stopped


def test_a_run_that_began_from_trained_weights_is_forecast_as_one():
    curve = curve_of("run", rows(4.5, 300))
    scratch, *tuned = (
        forecast_of(curve, [], CONFIG | how).mean
        for how in ({"init_from": ""}, {"init_from": "runs/start"}, {"random_start": False}, {"adapter": ""})
    )
    assert tuned[0] == tuned[1] == tuned[2] != scratch == forecast_of(curve, [], CONFIG).mean


def test_a_run_is_asked_once_a_share():
    best, bad = run("best", 3.0, 1000, "finished"), run("bad", 4.5, 90)
    pruner = Pruner("forecast", set(), question)
    assert pruner.why(bad, [best, bad]) == ""  # before the first share
    assert pruner.why(run("bad", 4.5, 300), []) == ""  # nothing has ended yet; asked at 30 %
    assert pruner.why(run("bad", 4.5, 390), [best]) == "" != pruner.why(run("bad", 4.5, 400), [best])


def test_asha_stops_all_but_the_best_third_at_a_third():
    pruner = Pruner("asha", set(), question)
    field = [run(f"r{i}", 3.0 + i / 10, 400) for i in range(6)]
    stopped = {r.name: pruner.why(r, field) for r in field}
    assert [bool(why) for why in stopped.values()] == [False, False, True, True, True, True]
    assert stopped["r2"].startswith("NLL ") and "at 33% is number 3 of 6, not among the best 1 / 3" in stopped["r2"]
    two = field[-2:]
    assert not any(Pruner("asha", set(), question).why(r, two) for r in two)  # too few to say
    early = run("r9", 9.0, 300)
    assert Pruner("asha", set(), question).why(early, [*field, early]) == ""


def test_the_loss_at_a_step():
    curve = curve_of("x", [dict(step=s, loss=float(s), nll=float(s), lr=1.0) for s in range(1, 11)])
    assert loss_at(curve, 5, 100) == 4.5 and loss_at(curve, 0, 100) == np.inf


def test_a_forecast_that_the_run_has_logged_comes_first():
    curve = curve_of("x", rows(3.0, 300))
    logged = forecast_of(curve, [{"forecast": 1.5, "sd": 0.1}], CONFIG)
    own = forecast_of(curve, [], CONFIG)
    assert (logged.mean, logged.sd) == (1.5, 0.1) and own.planned and 3.0 < own.mean < 3.3
    assert not forecast_of(curve, [], CONFIG | {"schedule": "fot"}).planned


def test_which_arms_are_kept(toy):
    def of(text: str) -> set[str]:
        Path("r.toml").write_text(f'script = "{toy}"\nout = "runs"\n{text}')
        recipe, todo, _ = check(Path("r.toml"), {})
        return kept(recipe, todo)

    losses = '[grid]\nloss = ["ce", "focal", "dpsm"]\n'
    assert of(losses) == {"ce", "dpsm"} and of('keep = ["focal"]\n' + losses) == {"focal"}
    assert of("[grid]\nlevel = [1.0, 2.0]\n") == set()  # one loss: nothing that a criterion compares
    assert of('keep = ["level=2.0"]\n[grid]\nlevel = [1.0, 2.0]\n') == {"level2.0"}


def test_a_pruned_run_saves_is_marked_and_comes_back_only_without_pruning(toy, monkeypatch, capsys):
    monkeypatch.setattr(campaign.subprocess, "call", lambda line: 0)
    flags = 'lr = 1e-3\npace = 0.01\nsteps = 100\nloss = "focal"\n[grid]\nlevel = [2.0, 9.0]\n'
    Path("r.toml").write_text(f'script = "{toy}"\nout = "runs"\n[flags]\n{flags}')
    monkeypatch.setattr("eval.campaign.run.LOOK", 0.0)
    for _ in range(2):
        assert campaign.main(["r.toml", "--prune", "forecast"]) == 0
        assert "1 of 2 finished, 1 pruned" in capsys.readouterr().out
    runs = json.loads(Path("runs/campaign.json").read_text())["runs"]
    assert runs["level9.0"]["state"] == "pruned" and runs["level9.0"]["why"].startswith("P(better than 2.")
    assert runs["level9.0"]["exit"] == 143 and 10 <= int(Path("runs/level9.0/last.pt").read_text()) < 100
    assert campaign.main(["r.toml"]) == 0
    assert len(Path("runs/level9.0/began").read_text().split()) == 2 and Path("runs/level9.0/summary.json").exists()
    assert {run["state"] for run in json.loads(Path("runs/campaign.json").read_text())["runs"].values()} == {"finished"}


@pytest.mark.parametrize("rule", ["forecast", "asha"])
def test_nothing_to_prune_is_said(toy, monkeypatch, capsys, rule):
    monkeypatch.setattr(campaign.subprocess, "call", lambda line: 0)
    Path("r.toml").write_text(f'script = "{toy}"\nout = "runs"\n[grid]\nloss = ["ce", "brier"]\n')
    assert campaign.main(["r.toml", "--prune", rule]) == 0
    assert f"--prune {rule}: every run is of an arm that is kept" in capsys.readouterr().err
