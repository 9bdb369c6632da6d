"""Learning-rate rules over a grid of peak learning rates: the bowl of each, its regret, and what the rules decided.

A rule is a `--schedule` with the settings that vary beside the peak learning rate and the seed. The regret of a run is
its validation NLL less the lowest mean over seeds of any rule at any peak, in nats; averaged over the grid it says what
a rule costs a user who does not know the best peak.
"""

import math
import statistics
from dataclasses import dataclass, field

from eval.report.columns import Cell
from eval.report.runs import SETTING, Arm, Run, differing, number, show
from eval.stats import paired, summarize, verdict

RIVALS_NOTE = (
    "Validation NLL, mean ± standard deviation over seeds, by peak learning rate; bold: the best of a column. Regret: "
    "NLL less the lowest cell of this table, averaged over the grid; a dash for a rule that has not finished all of it."
)
CLAIMS_NOTE = (
    "Regret: differences of the mean regret, seed by seed. Best peak: differences at each rule's own best peak. Met, "
    "not met: the 95 % t interval over seeds lies on one side of 0; else not powered, and 'holds here' is of the mean."
)
DECIDED_NOTE = (
    "Of rules that measure, means over runs. At the bound: share of decisions in which m (fot-literal: its learning "
    "rate) stands at an end of its range. Forecast error: of the forecast made at the last decision before half of the "
    "run, against the NLL of the last log line, over runs that had one; inside: share within one sd."
)


@dataclass
class Rule:
    """One learning-rate rule of a grid. ``runs``: peak -> seed -> run, finished ones."""

    label: str
    config: dict
    runs: dict[float, dict[object, Run]] = field(default_factory=dict)
    unfinished: list[Run] = field(default_factory=list)

    def nll(self, lr: float) -> dict:
        """seed -> validation NLL; inf for a run that diverged to no number."""
        values = {seed: run.number("val_nll") for seed, run in self.runs.get(lr, {}).items()}
        return {seed: math.inf if v is None else v for seed, v in values.items()}

    def mean(self, lr: float) -> float:
        values = self.nll(lr).values()
        return statistics.fmean(values) if values else math.nan

    @property
    def best(self) -> float:
        """The peak with the lowest mean."""
        return min((lr for lr in self.runs if not math.isnan(self.mean(lr))), key=self.mean)


def bowls(arms: list[Arm]) -> list[tuple[str, list[Rule]]]:
    """(title, rules) of each setting in which two rules or more have run at two peaks or more. Rules in the order of
    the arms."""
    out = {}
    for arm in arms:
        if number(arm.config.get("lr")) is not None and arm.config.get("schedule"):
            key = tuple(show(arm.config.get(k)) for k in (*SETTING, "loss"))
            out.setdefault(key, []).append(arm)
    groups = [group for group in out.values() if len({a.config["schedule"] for a in group}) > 1]
    vary = differing([group[0].config for group in groups])
    result = []
    for group in groups:
        others = [k for k in differing([a.config for a in group]) if k not in ("lr", "schedule")]
        rules = {}
        for arm in group:
            names = [str(arm.config["schedule"])]
            # Knobs of FoT alone mean nothing elsewhere; others say what was varied.
            names += [f"{k}={show(arm.config.get(k))}" for k in others
                      if not k.startswith("fot_") or arm.config["schedule"] == "fot"]  # fmt: skip
            rule = rules.setdefault(" ".join(names), Rule(" ".join(names), arm.config))
            rule.unfinished += [run for run in arm.runs if not run.finished]
            if arm.finished:
                rule.runs.setdefault(float(arm.config["lr"]), {}).update({run.seed: run for run in arm.finished})
        rules = [r for r in rules.values() if r.runs]
        if len(rules) > 1 and any(len(r.runs) > 1 for r in rules):
            says = ", ".join(f"{k} {show(group[0].config.get(k))}" for k in vary if k in (*SETTING, "loss"))
            result.append((says, rules))
    return result


def regrets(rules: list[Rule]) -> dict[str, dict]:
    """label -> seed -> mean regret over the grid, nats a token; {} for a rule that lacks a part of the largest grid of
    peaks and seeds, be it that a run diverged or has not ended: a mean over easier peaks is no regret."""
    cells = {r.label: {(lr, seed) for lr, by in r.runs.items() for seed in by} for r in rules}
    full = max(cells.values(), key=len)
    peaks, seeds = sorted({lr for lr, _ in full}), sorted({seed for _, seed in full}, key=str)
    lowest = min(rule.mean(lr) for rule in rules for lr in rule.runs)
    return {
        r.label: {s: statistics.fmean(r.nll(lr)[s] for lr in peaks) - lowest for s in seeds}
        if cells[r.label] >= full == {(lr, s) for lr in peaks for s in seeds}
        else {}
        for r in rules
    }


def spread(values: list[float], digits: int = 3) -> str:
    if not values:
        return "-"
    if not all(map(math.isfinite, values)):
        return "diverged"
    s = summarize(values)
    return f"{s.mean:.{digits}f}" + (f" ± {s.sd:.{digits}f}" if s.n > 1 else "")


def rule_rows(rules: list[Rule]) -> tuple[list[str], list[list[Cell]]]:
    """Heads and rows of the table, the least regret first."""
    peaks, regret = sorted({lr for r in rules for lr in r.runs}), regrets(rules)
    lowest = {lr: min((r.mean(lr) for r in rules if lr in r.runs), default=math.nan) for lr in peaks}
    seconds = {r.label: [v for by in r.runs.values() for run in by.values()
                         if (v := run.number("train_seconds"))] for r in rules}  # fmt: skip
    rows = []
    for rule in sorted(rules, key=lambda r: statistics.fmean(regret[r.label].values() or [math.inf])):
        count = sorted({len(by) for by in rule.runs.values()})
        cells = [Cell(rule.label), Cell("-".join(map(str, count)))]
        for lr in peaks:
            cells.append(Cell(spread(list(rule.nll(lr).values())), bold=rule.mean(lr) == lowest[lr]))
        cells += [Cell(spread(list(regret[rule.label].values()))), Cell(f"{rule.best:g}"),
                  Cell(spread(list(rule.nll(rule.best).values()))),
                  Cell(f"{statistics.fmean(seconds[rule.label]):,.1f}" if seconds[rule.label] else "-")]  # fmt: skip
        rows.append(cells)
    return ["rule", "seeds", *(f"{lr:g}" for lr in peaks), "mean regret", "best peak", "NLL there", "training|s"], rows


def claim_rows(rules: list[Rule]) -> list[list[Cell]]:
    """FoT against every rival: regret over the grid, the best peak, divergences. None without plain FoT."""
    fots = [r for r in rules if r.config["schedule"] == "fot"]
    mine = next((r for r in fots if len(fots) == 1 or "fot_parts" not in r.label or "blocks" in r.label), None)
    rivals = [r for r in rules if r.config["schedule"] != "fot"]
    if mine is None or not rivals:
        return []
    regret, rows = regrets(rules), []
    for rule in rivals:
        rows.append(claim(f"mean regret below {rule.label}'s", regret[mine.label], regret[rule.label]))
    linear = [r for r in rivals if r.config["schedule"] == "linear"]
    for rule in linear:
        rows.append(
            claim(f"no worse than {rule.label} at the best peak of each", mine.nll(mine.best), rule.nll(rule.best))
        )
    for rule in linear[:1]:
        grid = [lr for lr in rule.runs if not diverged(rule, lr)]
        found = [f"{lr:g}" for lr in grid if diverged(mine, lr)]
        rows.append([Cell(f"no divergence where {rule.label} has none"), Cell(f"{len(found)} of {len(grid)} peaks"),
                     Cell("no" if found else "yes", tone="bad" if found else "good"),
                     Cell("not met" if found else "met", bold=True, tone="bad" if found else "good")])  # fmt: skip
    return rows


def diverged(rule: Rule, lr: float) -> bool:
    runs = [*rule.runs.get(lr, {}).values(), *(r for r in rule.unfinished if number(r.config.get("lr")) == lr)]
    return any(run.number("divergences") or any(e.get("event") == "diverged" for e in run.events) for run in runs)


def claim(name: str, mine: dict, theirs: dict) -> list[Cell]:
    seeds = [s for s in mine if s in theirs and math.isfinite(mine[s]) and math.isfinite(theirs[s])]
    if not seeds:
        return [Cell(name), Cell("-"), Cell("-"), Cell("not comparable")]
    deltas = [mine[s] - theirs[s] for s in seeds]
    mean = statistics.fmean(deltas)
    text = f"{mean:+.3f}"
    if len(deltas) > 1:
        p = paired([mine[s] for s in seeds], [theirs[s] for s in seeds])
        text += f" [{p.low:+.3f}, {p.high:+.3f}]"
    said = verdict(deltas, 0.0) if len(deltas) > 1 else "not powered"
    tone = {"met": "good", "not met": "bad"}.get(said, "unsure")
    return [Cell(name), Cell(text, f"n = {len(deltas)}"), Cell("yes" if mean <= 0 else "no",
            tone="good" if mean <= 0 else "bad"), Cell(said, bold=said != "not powered", tone=tone)]  # fmt: skip


def decided_rows(rules: list[Rule]) -> list[list[Cell]]:
    """What the rules that measure decided, and how well they forecast."""
    rows = []
    for rule in rules:
        runs = [run for by in rule.runs.values() for run in by.values()]
        made = [run for run in runs if run.fot]
        if not made:
            continue
        bound = [statistics.fmean(bool(row.get("bound")) for row in run.fot) for run in made]
        errors, inside = [], []
        for run in made:
            total, last = number(run.config.get("steps")), [number(row.get("nll")) for row in run.train[-1:]]
            early = [row for row in run.fot if total and row["step"] <= total / 2]
            mean, sd = (number(early[-1].get(k)) for k in ("forecast", "sd")) if early else (None, None)
            if mean is not None and last and last[0]:
                errors.append(abs(mean - last[0]) / last[0])
                inside.append(abs(mean - last[0]) <= sd)
        rows.append([
            Cell(rule.label), Cell(str(len(made))), Cell(f"{statistics.fmean(len(run.fot) for run in made):.0f}"),
            Cell(f"{100 * statistics.fmean(bound):.0f}"),
            Cell(f"{100 * statistics.median(errors):.2f}" if errors else "-",
                 f"worst {100 * max(errors):.1f}, n = {len(errors)}" if errors else ""),
            Cell(f"{100 * statistics.fmean(inside):.0f}" if inside else "-"),
            Cell(str(sum(int(run.number("divergences") or 0) for run in runs))),
        ])  # fmt: skip
    return rows


def bowl_blocks(arms: list[Arm]) -> tuple[list[tuple], dict[str, bytes]]:
    """Blocks of the report and their figures, none where there is no such grid."""
    from eval.report import plots
    from eval.report.build import Table

    blocks, figures = [], {}

    def add(heads: list[str], rows: list[list[Cell]], note: str) -> None:
        if rows:
            blocks.append(("table", Table([Cell(*head.split("|")) for head in heads], rows, 1, note)))

    for k, (title, rules) in enumerate(bowls(arms), 1):
        blocks.append(("h", "Learning-rate rules" + (f": {title}" if title else "")))
        figures[f"bowl_{k}"] = plots.bowl(rules)
        blocks.append(("figure", f"bowl_{k}", "Line: mean over seeds; band: smallest to largest."))
        add(*rule_rows(rules), RIVALS_NOTE)
        add(["claim of FoT", "difference|nats", "holds here", "verdict"], claim_rows(rules), CLAIMS_NOTE)
        add(["rule", "runs", "decisions", "at the bound|%", "forecast error|median, %", "inside|%", "diverged|times"],
            decided_rows(rules), DECIDED_NOTE)  # fmt: skip
    return blocks, figures
