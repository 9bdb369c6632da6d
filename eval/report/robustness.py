"""Does an arm's advantage over CE hold in every setting? Settings are the flags that both sides read, such as the
learning rate, the data or the label noise; flags of the loss alone, such as DPSM's warm-up, make the arm."""

import statistics

from eval import metrics
from eval.metrics import Metric
from eval.report.runs import Arm, differing, show
from eval.report.tables import NOTES, Cell, Table, label_cell, section, shared, table_of
from eval.stats import proportion_interval, summarize

METRICS = (*metrics.shown(metrics.TOKENS, "grid"), *metrics.shown(metrics.SUMMARIES, "grid"))


def settings(arms: list[Arm]) -> dict[str, list[tuple[str, Arm, Arm]]]:
    """Label -> (setting, arm, the CE arm in that setting), for arms that ran beside CE in two settings or more."""
    done = [arm for arm in arms if arm.finished]
    flags, found = [k for k in differing(done) if k != "loss"], {}
    for arm in (arm for arm in done if arm.loss != "ce"):
        ces = [a for a in done if a.loss == "ce"]
        for ce in [a for a in ces if a.plain] or ces:
            both = [k for k in flags if k not in arm.unread | ce.unread and k in arm.config and k in ce.config]
            if both and all(arm.config[k] == ce.config[k] for k in both):
                own = [k for k in flags if k not in both and k in arm.config]
                where = ", ".join(f"{k} {show(arm.config[k])}" for k in both)
                found.setdefault(arm.label_of(arm.loss, own), []).append((where, arm, ce))
    return {label: pairs for label, pairs in found.items() if len({where for where, *_ in pairs}) > 1}


def advantage(metric: Metric, arm: Arm, ce: Arm) -> tuple[Cell, bool | None]:
    """The mean difference over shared seeds, and whether it is one for the better; None where nothing was measured."""
    mine, theirs = shared(arm.measured(metric), ce.measured(metric))
    if not mine:
        return Cell("-"), None
    s = summarize([a - b for a, b in zip(mine, theirs, strict=True)])
    better = s.mean > 0 if metric.better == "higher" else s.mean < 0
    sd = f" ± {metric.format(s.sd)}" if s.n > 1 else ""
    text = f"{'+' if s.mean >= 0 else '-'}{metric.format(abs(s.mean))}{sd}"
    word = "better" if better else "worse" if s.mean else "equal"
    return Cell(text, word, tone={"better": "good", "worse": "bad", "equal": ""}[word]), better


def robustness_table(pairs: list[tuple[str, Arm, Arm]]) -> Table | None:
    """A row a setting, and last the share of them in which the advantage holds."""
    columns = [m for m in METRICS if any(advantage(m, arm, ce)[1] is not None for _, arm, ce in pairs)]
    found = [[advantage(m, arm, ce) for m in columns] for _, arm, ce in pairs]
    rows = [
        [Cell(where, colour=label_cell(arm).colour), *(cell for cell, _ in row)]
        for (where, arm, _), row in zip(pairs, found, strict=True)
    ]
    last = [Cell("advantage holds in", bold=True)]
    for column in zip(*found, strict=True):
        held = [better for _, better in column if better is not None]
        low, high = proportion_interval(sum(held), len(held))
        ends = f"{100 * statistics.fmean(held):.0f} % [{100 * low:.0f}, {100 * high:.0f}]"
        last.append(Cell(f"{sum(held)} of {len(held)}", ends, bold=True))
    return table_of(["setting", *columns], [*rows, last], note=NOTES["robustness"], foot=1) if columns else None


def robustness_blocks(arms: list[Arm]) -> list[tuple]:
    blocks = []
    for label, pairs in settings(arms).items():
        blocks += section(f"{label} minus CE, setting by setting", robustness_table(pairs), kind="h3")
    return [("h", "Robustness"), *blocks] if blocks else []
