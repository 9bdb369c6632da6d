"""Learning-rate rules over a grid of peak learning rates: the bowl of each, its regret, and what the rules decided.

A rule is a `--schedule` with the settings that vary beside the peak learning rate and the seed. The regret of a run is
its validation NLL less the lowest mean over seeds of any rule at any peak, in nats. Averaged over the grid it says what
a rule costs a user who does not know the best peak.
"""

import itertools
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from eval.report.charts import Chart, Line
from eval.report.claims import holm_words, power_words
from eval.report.runs import Arm, Run, differing, finite, grouped, show
from eval.report.tables import NOTES, Cell, Table, p_text, section, shared, table_of, toned
from eval.stats import claim_p, holm_level, summarize, t_interval, verdict
from schedules.style import INK, PALETTE, STYLES


@dataclass
class Rule:
    """One learning-rate rule of a grid. ``runs``: (peak, seed) -> run, finished ones."""

    label: str
    config: dict
    runs: dict[tuple[float, object], Run] = field(default_factory=dict)
    diverged: set[float] = field(default_factory=set)  # peaks at which a run, finished or not, diverged

    @property
    def peaks(self) -> list[float]:
        return sorted({lr for lr, _ in self.runs})

    def nll(self, lr: float) -> dict:
        """seed -> validation NLL; inf for a run that diverged to no number."""
        values = {seed: run.number("val_nll") for (at, seed), run in self.runs.items() if at == lr}
        return {seed: math.inf if v is None else v for seed, v in values.items()}

    def mean(self, lr: float) -> float:
        return statistics.fmean(self.nll(lr).values() or [math.nan])

    @property
    def best(self) -> float:
        """The peak with the lowest mean."""
        return min(self.peaks, key=self.mean)


def bowls(arms: list[Arm]) -> list[tuple[str, list[Rule]]]:
    """(title, rules) of each setting in which two rules or more have run at two peaks or more, in the arms' order."""

    def setting(arm: Arm) -> str:
        flags = {k: v for k, v in arm.config.items() if arm.roles.get(k) == "setting" and v not in (None, "")}
        return json.dumps([flags, arm.loss], sort_keys=True)

    scheduled = [a for a in arms if finite(a.config.get("lr")) is not None and a.config.get("schedule")]
    groups = [g for g in grouped(scheduled, setting).values() if len({a.config["schedule"] for a in g}) > 1]
    vary = differing([group[0] for group in groups])
    out = []
    for group in groups:
        names = [k for k in differing(group) if k not in ("lr", "schedule")]
        rules = {}
        for arm in group:
            label = arm.label_of(str(arm.config["schedule"]), [k for k in names if k not in arm.unread])
            rule, lr = rules.setdefault(label, Rule(label, arm.config)), float(arm.config["lr"])
            rule.runs |= {(lr, run.seed): run for run in arm.finished}
            rule.diverged |= {lr for run in arm.runs if run.diverged}
        rules = [r for r in rules.values() if r.runs]
        if len(rules) > 1 and any(len(r.peaks) > 1 for r in rules):
            first = group[0]
            says = [f"{k} {show(first.config.get(k))}" for k in vary if k == "loss" or first.roles.get(k) == "setting"]
            out.append((", ".join(says), rules))
    return out


def regrets(rules: list[Rule]) -> dict[str, dict]:
    """label -> seed -> mean regret over the grid, nats a token.

    {} for a rule that lacks a part of the largest grid of peaks and seeds, because a run diverged or has not ended: a
    mean over easier peaks is no regret."""
    largest = max(rules, key=lambda r: len(r.runs))
    peaks, seeds = largest.peaks, sorted({seed for _, seed in largest.runs}, key=str)
    lowest = min(rule.mean(lr) for rule in rules for lr in rule.peaks)
    whole = [r for r in rules if set(itertools.product(peaks, seeds)) == largest.runs.keys() <= r.runs.keys()]
    found = {r.label: {s: statistics.fmean(r.nll(lr)[s] for lr in peaks) - lowest for s in seeds} for r in whole}
    return {r.label: {} for r in rules} | found


def mean_sd(values) -> str:
    """Mean ± sd with three decimals."""
    if not values:
        return "-"
    if not all(map(math.isfinite, values)):
        return "diverged"
    s = summarize(values)
    return f"{s.mean:.3f}" + (f" ± {s.sd:.3f}" if s.n > 1 else "")


def rule_table(rules: list[Rule]) -> Table:
    """A row a rule, the least regret first."""
    peaks, regret, rows = sorted({lr for r in rules for lr in r.peaks}), regrets(rules), []
    lowest = {lr: min(r.mean(lr) for r in rules if lr in r.peaks) for lr in peaks}
    for rule in sorted(rules, key=lambda r: statistics.fmean(regret[r.label].values() or [math.inf])):
        seconds = [v for run in rule.runs.values() if (v := run.number("train_seconds"))]
        seeds = sorted({len(rule.nll(lr)) for lr in rule.peaks})
        at_peaks = [Cell(mean_sd(rule.nll(lr).values()), bold=rule.mean(lr) == lowest[lr]) for lr in peaks]
        summary = mean_sd(regret[rule.label].values()), f"{rule.best:g}", mean_sd(rule.nll(rule.best).values())
        training = f"{statistics.fmean(seconds):,.1f}" if seconds else "-"
        rows.append([rule.label, "-".join(map(str, seeds)), *at_peaks, *summary, training])
    heads = "rule", "n|seeds", *(f"{lr:g}" for lr in peaks), "mean regret", "best peak", "NLL there", "training|s"
    return table_of(heads, rows, note=NOTES["rivals"])


def plain_fot(rules: list[Rule]) -> tuple[Rule | None, list[Rule], list[Rule]]:
    """Plain FoT, over AdamW where it ran so, its rivals, and those of them that are linear; none without plain FoT."""
    fots = [r for r in rules if r.config["schedule"] == "fot"]
    fots = [r for r in fots if r.config.get("optimizer", "adamw") == "adamw"] or fots
    mine = next((r for r in fots if len(fots) == 1 or "fot_parts" not in r.label or "blocks" in r.label), None)
    rivals = [r for r in rules if r.config["schedule"] != "fot"] if mine else []
    return mine, rivals, [r for r in rivals if r.config["schedule"] == "linear"]


def compared(rules: list[Rule]) -> list[tuple[str, list[float]]]:
    """Each claim of FoT with its differences, nats, one a seed that both sides have: it says that their mean is at
    most 0."""
    mine, rivals, linear = plain_fot(rules)
    regret = regrets(rules)
    sides = [(f"mean regret below {r.label}'s", regret[mine.label], regret[r.label]) for r in rivals]
    for r in linear:
        sides.append((f"no worse than {r.label} at the best peak of each", mine.nll(mine.best), r.nll(r.best)))
    out = []
    for name, *both in sides:
        ours, theirs = shared(*({s: v for s, v in side.items() if math.isfinite(v)} for side in both))
        out.append((name, [a - b for a, b in zip(ours, theirs, strict=True)]))
    return out


def claim_tests(grids: list[tuple[str, list[Rule]]]) -> list[float]:
    """The p-value of every claim of FoT, see `eval.stats.claim_p`."""
    return [claim_p(deltas, 0.0) for _, rules in grids for _, deltas in compared(rules) if deltas]


def claim_table(rules: list[Rule], p_values: Sequence[float] | None = None) -> Table | None:
    """FoT against every rival: regret over the grid, the best peak, divergences. None without plain FoT.

    ``p_values``: of all claims of the page, which Holm's procedure takes together; None: of these alone."""
    p_values = claim_tests([("", rules)]) if p_values is None else p_values
    mine, _, linear = plain_fot(rules)
    rows = [claim_row(*claim, holm_level(p_values)) for claim in compared(rules)]
    for rule in linear[:1]:
        grid = set(rule.peaks) - rule.diverged
        found = len(grid & mine.diverged)
        answers = toned("no" if found else "yes"), toned("not met" if found else "met", bold=True)
        rows.append([f"no divergence where {rule.label} has none", f"{found} of {len(grid)} peaks", *answers])
    note = NOTES["fot_claims"] + holm_words(p_values)
    return table_of(("claim of FoT", "difference|nats", "holds here", "verdict"), rows, note=note)


def claim_row(name: str, deltas: list[float], level: float) -> list:
    """Whether the mean of ``deltas`` is at most 0, at the ``level`` of the page's claims."""
    if not deltas:
        return [name, "-", "-", "not comparable"]
    mean, _, n = summarize(deltas)
    interval = " [{:+.3f}, {:+.3f}]".format(*t_interval(deltas)) if n > 1 else ""
    state, p = verdict(deltas, 0.0, alpha=level), claim_p(deltas, 0.0)
    power = power_words(deltas, 0.0, "nats", level, 3) if state == "not powered" else ()
    says = ", ".join(filter(None, [f"p {p_text(p, '= ')}" * (n > 1), *power]))
    answer = toned(state, bold=state != "not powered")._replace(sub=says)
    return [name, Cell(f"{mean:+.3f}{interval}", f"n = {n}"), toned("yes" if mean <= 0 else "no"), answer]


def forecast_errors(runs: list[Run]) -> tuple[list[float], list[bool]]:
    """Of each run that had a forecast by half of its steps: its relative error, and whether it lay within one sd."""
    errors, inside = [], []
    for run in runs:
        total, last = finite(run.config.get("steps")), finite(run.train[-1].get("nll")) if run.train else None
        early = [row for row in run.fot if total and row["step"] <= total / 2]
        mean, sd = (finite(early[-1].get(k)) for k in ("forecast", "sd")) if early else (None, None)
        if mean is not None and last:
            errors.append(abs(mean - last) / last)
            inside.append(abs(mean - last) <= sd)
    return errors, inside


def decided_table(rules: list[Rule]) -> Table | None:
    """What the rules that measure decided, and how well they forecast."""
    rows = []
    for rule in rules:
        made = [run for run in rule.runs.values() if run.fot]
        if not made:
            continue
        decisions = statistics.fmean(len(run.fot) for run in made)
        bound = statistics.fmean(statistics.fmean(bool(row.get("bound")) for row in run.fot) for run in made)
        errors, inside = forecast_errors(made)
        worst = f"worst {100 * max(errors):.1f}, n = {len(errors)}" if errors else ""
        error = Cell(f"{100 * statistics.median(errors):.2f}" if errors else "-", worst)
        share = f"{100 * statistics.fmean(inside):.0f}" if inside else "-"
        times = sum(int(run.number("divergences") or 0) for run in rule.runs.values())
        rows.append([rule.label, len(made), f"{decisions:.0f}", f"{100 * bound:.0f}", error, share, times])
    heads = "rule", "runs", "decisions", "at the bound|%", "forecast error|median, %", "inside|%", "diverged|times"
    return table_of(heads, rows, note=NOTES["decided"])


def bowl_chart(rules: list[Rule]) -> Chart:
    """Validation NLL over the peak learning rate, a line a rule."""
    lines, dashes = [], itertools.cycle(STYLES)  # tell the rules of ours apart, colours the others
    for k, rule in enumerate(rules):
        ours = rule.config["schedule"] == "fot"
        colour = INK if ours else PALETTE[k % len(PALETTE)]
        dash = next(dashes) if ours else STYLES[k // len(PALETTE) % len(STYLES)]
        peaks = [lr for lr in rule.peaks if math.isfinite(rule.mean(lr))]
        ys = [[f(rule.nll(lr).values()) for lr in peaks] for f in (statistics.fmean, min, max)]
        lines.append(Line(rule.label, colour, peaks, *ys, dash=dash, width=2.2 if ours else 1.3, dots=True))
    return Chart("", "peak learning rate", "validation NLL (nats a token)", lines, log="x")


DECISIONS = {"multiplier": "multiplier m", "gate": "gate", "lr": "learning rate", "D": "forecast descent D (nats)"}


def decision_charts(rules: list[Rule]) -> list[Chart]:
    """What rules that measure decided at each step, a line a run; all at their rule's best peak."""
    out = []
    for key, label in DECISIONS.items():
        lines = []
        for k, rule in enumerate(rules):
            runs = [run for (lr, _), run in rule.runs.items() if lr == rule.best and run.fot]
            for run in runs:
                rows = [
                    (row["step"], v, row.get("bound")) for row in run.fot if (v := finite(row.get(key))) is not None
                ]
                if len({v for _, v, _ in rows}) > 1:
                    xs, ys, bound = map(list, zip(*rows, strict=True))
                    notes = [run.path.name + ", at the bound" * bool(b) for b in bound]
                    lines.append(Line(rule.label, PALETTE[k % len(PALETTE)], xs, ys, notes=notes))
        if lines:
            out.append(Chart(label[0].upper() + label[1:], "optimizer step", label, lines))
    return out


def bowl_blocks(grids: list[tuple[str, list[Rule]]], others: Sequence[float], figure) -> list[tuple]:
    """Blocks of the report, of `bowls`. ``others``: the p-values of the page's other claims; ``figure``:
    `build.Report.charts`."""
    blocks = []
    p_values = [*claim_tests(grids), *others]
    for k, (title, rules) in enumerate(grids, 1):
        picture = figure(f"bowl_{k}", [bowl_chart(rules)], "Line: mean over seeds; band: smallest to largest.")
        heading = "Learning-rate rules" + (f": {title}" if title else "")
        decided = figure(f"decisions_{k}", decision_charts(rules), NOTES["decisions"])
        blocks += section(heading, picture, rule_table(rules), claim_table(rules, p_values))
        blocks += section("What the rules decided", decided_table(rules), decided, kind="h3")
    return blocks
