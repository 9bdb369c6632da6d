"""Pruning by forecast: the rule itself, and the simulation beside ASHA on grids whose answers are known."""

import math

import numpy as np
import pytest

from schedules import pruning
from schedules.__main__ import main
from schedules.forecast import Forecast
from schedules.pruning import CHECKS, Arm, arm_of, hopeless, play_asha, play_forecasts, table


def said(mean, sd=0.1):
    return Forecast(mean, sd, np.zeros((0, 3)), {}, "", True)


def sure(final, sd=1e-6):
    """An arm whose forecasts and rungs say its end from the start."""
    return Arm(final, [said(final, sd)] * len(CHECKS), [final] * (pruning.RUNGS + 1))


def test_a_run_is_hopeless_when_it_can_hardly_win():
    assert hopeless(said(3.5), best=3.0) and not hopeless(said(3.1), best=3.0) and not hopeless(said(2.0), best=3.0)
    assert hopeless(said(3.1), best=3.0, chance=0.3)  # one sd: 16 %
    assert not hopeless(said(3.5), best=math.inf)  # nothing has ended yet
    assert not hopeless(said(None, None), best=0.0)  # and without a forecast nothing is known
    for chance in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="chance="):
            hopeless(said(3.0), best=2.0, chance=chance)


def test_sure_forecasts_cost_one_check_for_each_loser():
    arms = [sure(loss) for loss in (3.0, 3.1, 3.2, 3.3)]
    played = play_forecasts(arms, [0, 1, 2, 3], 0.02)
    assert played.final == 3.0 and played.compute == pytest.approx(1 + 3 * CHECKS[0])
    played = play_forecasts(arms, [3, 2, 1, 0], 0.02)  # each beats the one before: nothing can be saved
    assert played.final == 3.0 and played.compute == 4
    wrong = [*arms, Arm(2.0, [said(5.0, 0.1)] * len(CHECKS), [5.0] * 4)]
    assert play_forecasts(wrong, [0, 4, 1], 0.02).final == 3.0  # a forecast that is wrong and sure loses the best


def test_asha_promotes_the_best_third_of_each_rung():
    arms = [sure(3 + i / 10) for i in range(9)]
    for rungs in (1, 2, 3):
        played = play_asha(arms, range(9), rungs)
        assert played.final == 3.0  # rungs that agree with the end do not lose it
        assert played.compute < 9
    # One rung at a third, nine runs in order of their quality: three are promoted.
    assert play_asha(arms, range(9), 1).compute == pytest.approx(9 / 3 + 3 * 2 / 3)
    late = [sure(3.0)._replace(rungs=[9.0, 9.0, 9.0, 3.0]), *arms[1:]]  # begins slowly and ends best
    assert play_asha(late, range(9), 2).final == 3.1


def test_the_table_resamples_orders():
    arms = [sure(3 + i / 10) for i in range(6)]
    rows = {name: row for name, *row in table(arms, orders=200)}
    assert all(lost == regret == worst == 0 for _, lost, regret, worst in rows.values())
    # The expected number of records among 6 in random order is 1 + 1/2 + ... + 1/6 = 2.45; the others cost 0.1 each.
    assert rows["forecast, P < 0.02"][0] == pytest.approx(1 - (2.45 + 3.55 * 0.1) / 6, abs=0.03)


def write_grid(folder, n=5):
    t = np.arange(1, 201)
    lines = ["run,step,loss,lr"]
    for i in range(n):
        loss = 2.5 + 0.4 * i + 4 * (t + 30.0) ** -0.5
        lines += [f"r{i},{s},{x:.4f},0.1" for s, x in zip(t, loss, strict=True)]
    folder.mkdir()
    (folder / "grid.csv").write_text("\n".join(lines) + "\n")


def test_the_command_plays_a_recorded_grid(tmp_path, capsys):
    write_grid(tmp_path / "a")
    main(["prune", str(tmp_path / "a"), "--orders", "50"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert len(rows) == len(pruning.CHANCES) + pruning.RUNGS and {row[1] for row in rows} == {"5"}
    strict = next(row for row in rows if "0.01" in row)
    assert float(strict[-4]) > 15 and float(strict[-3]) == 0.0  # well apart: much is saved, the best never lost
    for flags, says in ((["--orders", "0"], "--orders 0"), (["--run", "r1"], "nothing to prune")):
        with pytest.raises(SystemExit) as stop:
            main(["prune", str(tmp_path / "a"), *flags])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and says in error and error.count("\n") == 1


def test_an_arm_is_asked_at_every_check(tmp_path):
    write_grid(tmp_path / "a", 1)
    arm = arm_of(pruning.read_all([str(tmp_path / "a")])[0])
    assert len(arm.forecasts) == len(CHECKS) and len(arm.rungs) == pruning.RUNGS + 1
    errors = [abs(f.mean - arm.final) / f.sd for f in arm.forecasts]
    assert max(errors) < 2.43 and arm.rungs == sorted(arm.rungs, reverse=True) and arm.rungs[-1] == arm.final
