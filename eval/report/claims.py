"""The claims of DPSM under test: criteria, and what the runs say of each. FoT's are in fot_claims.py.

Every criterion compares arms over the seeds that both finished. The verdict over seeds is `eval.stats.verdict`, at the
level that Holm's procedure leaves over all claims of a page.
"""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from eval.report.runs import Arm, Run, reference, system_differences
from eval.stats import claim_p, detectable, holm_level, seeds_needed, summarize, t_interval, verdict
from schedules.textlines import read_toml

QUALITY = 0.95  # criterion 4: CE's last PPL is this share of the level that is timed


class Criterion(NamedTuple):
    number: int
    name: str
    definition: str
    against: str  # the loss compared with, or the schedules
    kind: str  # "difference" a - b, "change" 100 (a / b - 1), "time"; of FoT "forecast" and "diverged" as well
    keys: tuple[str, str]  # of the two summaries
    direction: str
    threshold: float
    unit: str
    scale: float = 1.0
    system: bool = False  # needs the same device and settings of the system
    claim: bool = True  # False: for information
    steps: int = 0  # of the runs that it is about; 0: of any


_TABLES = read_toml(Path(__file__).with_name("claims.toml"))
CRITERIA, FOT_CRITERIA = (
    tuple(Criterion(**row | {"keys": tuple(row["keys"])}) for row in _TABLES[name]) for name in ("criterion", "fot")
)


class Verdict(NamedTuple):
    criterion: Criterion
    arm: str  # label
    against: str  # label
    values: list[float]  # one a shared seed; inf where the level was never reached
    seeds: int  # of the arm, runs that did not finish included
    value: str
    threshold: str
    holds: str  # "yes", "no" or "-": whether the point value satisfies the threshold
    verdict: str  # met, not met, not powered, information; or missing / not comparable / not measured and why
    p: float = math.nan  # of the mean being the threshold, before Holm; nan for what is not tested
    power: tuple[str, str] = ("", "")  # not powered: what these seeds would find; how many it needs

    @property
    def count(self) -> str:
        """How many seeds have a value, and of how many: those that failed must not go unseen."""
        return f"{len(self.values)}" + (f" of {self.seeds}" if len(self.values) < self.seeds else "")

    @property
    def interval(self) -> str:
        """Student's 95 % interval of the mean, "" where there is none."""
        if len(self.values) < 2 or not all(map(math.isfinite, self.values)):
            return ""
        sign, digits = "" if self.criterion.kind in ("time", "forecast") else "+", digits_of(self.criterion)
        return "{} to {}".format(*(f"{end:{sign}.{digits}f}" for end in t_interval(self.values)))


def time_to(curve: list[tuple[float, float]], level: float) -> float | None:
    """Seconds at which PPL first is at most ``level``, on the line through (seconds, log PPL); None if never.

    Where the first point is there already, its time: the curve does not say how much earlier."""
    if curve and curve[0][1] <= level:
        return curve[0][0]
    for (before, above), (seconds, ppl) in itertools.pairwise(curve):
        if ppl <= level:
            return before + (seconds - before) * math.log(above / level) / math.log(above / ppl)
    return None


def criterion_value(c: Criterion, a: Run, b: Run) -> float | None:
    """The criterion's value for one pair of runs, in its unit; None where a side was not measured."""
    if c.kind == "time":
        mine, theirs = a.curve(), b.curve()
        if not mine or not theirs:
            return None
        level = theirs[-1][1] / QUALITY
        base, seconds = time_to(theirs, level), time_to(mine, level)
        return None if not base else math.inf if seconds is None else 100 * seconds / base
    x, y = a.number(c.keys[0]), b.number(c.keys[1])
    if x is None or y is None or (c.kind == "change" and y == 0):
        return None
    return c.scale * (x - y) if c.kind == "difference" else 100 * (x / y - 1)


def power_words(values: Sequence[float], threshold: float, unit: str, level: float, digits: int) -> tuple[str, str]:
    """What a test of ``values``, one a seed, at ``level`` would find with a chance of 80 %, as a distance of the mean
    from ``threshold``; and how many seeds would find the one that is there. The true sd is taken to be theirs."""
    mean, sd, n = summarize(values)
    if n < 2 or sd == 0:
        return "", "needs 2 or more" if n < 2 else ""
    needed = seeds_needed((mean - threshold) / sd, alpha=level)
    return f"finds {sd * detectable(n, alpha=level):.{digits}f} {unit}", f"needs {needed or 'over 1,000'} seeds"


def holm_words(p_values: Sequence[float]) -> str:
    """What is said on the page of the tests of its claims; nan is none."""
    tests = sum(not math.isnan(p) for p in p_values)
    if not tests:
        return ""
    count, level = "1 claim is" if tests == 1 else f"{tests} claims are", holm_level(p_values)
    return f" {count} tested on this page; Holm's procedure over all decides those with p up to {level:.2g}."


def decided(row: Verdict, level: float) -> Verdict:
    """A claim's row with its verdict at ``level``."""
    c = row.criterion
    if row.verdict:
        return row
    if not c.claim:
        return row._replace(verdict="information")
    state = verdict(row.values, c.threshold, c.direction, alpha=level)
    words = power_words(row.values, c.threshold, c.unit, level, digits_of(c)) if state == "not powered" else ("", "")
    return row._replace(verdict=state, power=words)


def digits_of(c: Criterion) -> int:
    return 3 if c.unit in ("PPL", "nats") else 1


def judge(c: Criterion, arm: Arm, arms: list[Arm]) -> Verdict:
    """One row of the verdict, by shared seeds; ``verdict`` is empty where it takes the level of `decided`."""
    values, other, why = [], None, "missing: no finished run with --loss dpsm"
    if arm.finished:
        other, why = reference(arm, arms, c.against)
    if other and c.system and (apart := system_differences(arm, other)):
        why = f"not comparable: {', '.join(apart)}"
    if not why:
        theirs = {run.seed: run for run in other.finished}
        pairs = [(run, theirs[run.seed]) for run in arm.finished if run.seed in theirs]
        values = [v for a, b in pairs if (v := criterion_value(c, a, b)) is not None]
        why = "" if values else "not measured" if pairs else "missing: no seed that both arms finished"
    return row_of(c, arm.label, other.label if other else c.against, values, len(arm.runs), why)


def row_of(c: Criterion, arm: str, against: str, values: list[float], seeds: int, why: str = "") -> Verdict:
    """The row that ``values`` make, one a seed; ``why`` says why there is none."""
    sign = "" if c.kind in ("time", "forecast") else "+"
    limit = f"{c.direction} {c.threshold:{sign if c.threshold else ''}g} {c.unit}"
    of = c, arm, against, values, seeds
    if why:
        return Verdict(*of, "-", limit, "-", why)
    never, n = values.count(math.inf), len(values)
    if never:
        text, holds, p = f"never reached by {never} of {n}", False, math.nan
        state = "not met" if n > 1 else "not powered"
    else:
        mean, sd, _ = summarize(values)
        digits, state, p = digits_of(c), "", claim_p(values, c.threshold) if c.claim else math.nan
        text = f"{mean:{sign}.{digits}f}" + (f" ± {sd:.{digits}f}" if n > 1 else "") + f" {c.unit}"
        holds = mean <= c.threshold if c.direction == "at most" else mean >= c.threshold
    return Verdict(*of, text, limit, "yes" if holds else "no", state, p)


def verdicts(arms: list[Arm], others: Sequence[float] = ()) -> list[Verdict]:
    """All criteria for every DPSM arm, those with most seeds first, and of these the lowest validation NLL.

    ``others``: the p-values of the page's other claims, which Holm's procedure takes in."""
    under_test = [arm for arm in arms if arm.loss == "dpsm"]
    under_test.sort(key=lambda a: (-len(a.finished), a.mean("val_nll")))
    rows = [judge(c, arm, arms) for arm in under_test for c in CRITERIA]
    level = holm_level([*(row.p for row in rows), *others])
    return [decided(row, level) for row in rows]
