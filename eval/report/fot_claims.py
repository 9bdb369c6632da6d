"""The claims of the FoT proposal: of `fot` and, where it ran, of `fot-literal`, the rule as the proposal writes it."""

import math
from collections.abc import Sequence

from eval.report.claims import FOT_CRITERIA, Criterion, Verdict, criterion_value, decided, row_of
from eval.report.forecasts import grade
from eval.report.runs import Arm, setting_differences, system_differences
from eval.stats import holm_level, proportion_interval
from schedules.rules import ADAPTIVE

RULES = ("fot", "fot-literal")
HALF = 0.5  # of the steps, when the forecast of claim 4 is made


def rows(arms: list[Arm]) -> list[Verdict]:
    """Every claim of each rule that ran, ``verdict`` empty where it takes the level of `decide`; [] without FoT."""
    ran = [(rule, [arm for arm in arms if arm.config.get("schedule") == rule]) for rule in RULES]
    return [judge(c, rule, mine, arms) for rule, mine in ran if mine for c in FOT_CRITERIA]


def decide(found: list[Verdict], others: Sequence[float] = ()) -> list[Verdict]:
    """The rows at Holm's level over them and ``others``, the p-values of the page's other claims."""
    level = holm_level([*(row.p for row in found), *others])
    return [decided(row, level) for row in found]


def judge(c: Criterion, rule: str, mine: list[Arm], arms: list[Arm]) -> Verdict:
    runs = [run for arm in mine for run in arm.runs]
    if c.kind == "forecast":
        grades = [g for run in runs if run.fot for g in grade(run) if g.fraction == HALF and g.mean is not None]
        why = "" if grades else "missing: no run that ended has a forecast from half of its steps"
        return row_of(c, rule, c.against, [abs(g.error) for g in grades], len(runs), why)
    if c.kind == "diverged":
        over = [run for run in runs if run.finished or run.diverged]
        if not over:
            return row_of(c, rule, "", [], len(runs), "missing: no finished run")
        bad, state = sum(run.diverged for run in over), "not met" if any(run.diverged for run in over) else "met"
        low, high = (100 * end for end in proportion_interval(bad, len(over)))
        text = f"{bad} of {len(over)} runs, {low:.0f} to {high:.0f} % by Wilson"
        return Verdict(c, rule, "", [], len(runs), text, "none", "no" if bad else "yes", state)
    pair = of_equal_steps(c, mine, arms) if c.steps else slowed(c, mine, arms)
    if pair is None:
        what = f"answers to GSM8K after {c.steps:,} steps" if c.steps else "steps timed on the same device"
        return row_of(c, rule, c.against, [], len(runs), f"missing: no two schedules with {what}")
    arm, other, key = pair
    theirs = {run.seed: run for run in other.finished}
    both = [(run, theirs[run.seed]) for run in arm.finished if run.seed in theirs]
    values = [v for a, b in both if (v := criterion_value(c._replace(keys=(key, key)), a, b)) is not None]
    why = "" if values else "missing: no seed that both arms finished"
    return row_of(c, arm.label, other.label, values, len(arm.runs), why)


def rivals(arm: Arm, arms: list[Arm]) -> list[Arm]:
    """Finished arms of the same loss and setting whose schedule is neither of RULES."""
    found = [a for a in arms if a.finished and a.loss == arm.loss and a.config.get("schedule") not in (*RULES, None)]
    return [a for a in found if not setting_differences(arm, a)]


def of_equal_steps(c: Criterion, mine: list[Arm], arms: list[Arm]) -> tuple[Arm, Arm, str] | None:
    """FoT at its best peak, and of the other schedules at theirs the one with the highest pass@1; by validation NLL,
    so that the test problems choose no peak of ours."""
    for key in ("pass_at_1_code", "pass_at_1_strict"):
        done = [arm for arm in mine if arm.values(key) and arm.config.get("steps") == c.steps]
        arm = min(done, key=lambda a: a.mean("val_nll"), default=None)
        best: dict[str, Arm] = {}
        for other in rivals(arm, arms) if arm else ():
            name = other.config["schedule"]
            if other.values(key) and other.mean("val_nll") <= (
                best[name].mean("val_nll") if name in best else math.inf
            ):
                best[name] = other
        if best:
            return arm, max(best.values(), key=lambda a: a.mean(key)), key
    return None


def slowed(c: Criterion, mine: list[Arm], arms: list[Arm]) -> tuple[Arm, Arm, str] | None:
    """The FoT arm of most seeds, and the fastest arm on the same system whose schedule measures nothing."""
    key = c.keys[0]
    for arm in sorted((a for a in mine if a.values(key)), key=lambda a: -len(a.finished)):
        others = [a for a in rivals(arm, arms) if a.values(key) and a.config["schedule"] not in ADAPTIVE]
        if others := [a for a in others if not system_differences(arm, a)]:
            return arm, min(others, key=lambda a: a.mean(key)), key
    return None
