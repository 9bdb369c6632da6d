"""What training on after the best validation costs: every arm at its best and at its last validation."""

from eval.metrics import TOKENS
from eval.report.runs import Arm, Run, finite
from eval.report.tables import NOTES, label_cell, mean_cell, section, table_of

BY_KEY = {metric.key: metric for metric in TOKENS}
COLUMNS = tuple(BY_KEY[key] for key in ("ppl", "ece10", "brier"))


def ends(run: Run) -> tuple[dict, dict] | None:
    """The row of the validation with the lowest NLL and that of the last one, before temperature; None without any."""
    rows = [row for row in run.val if finite(row.get("nll")) is not None]
    return (min(rows, key=lambda row: row["nll"]), rows[-1]) if rows else None


def overfit_blocks(arms: list[Arm]) -> list[tuple]:
    """A row an arm, means over the seeds; nothing where every run ended at its best validation."""
    found = {arm.label: {run.seed: pair for run in arm.finished if (pair := ends(run))} for arm in arms}
    if all(best is last for pairs in found.values() for best, last in pairs.values()):
        return []
    heads, rows = ["arm", "best at|step"], []
    for which in ("best", "last"):
        heads += [f"{m.name} {which}|{m.unit}" for m in COLUMNS]
    for arm in (arm for arm in arms if found[arm.label]):
        pairs = found[arm.label]
        steps = sorted({best["step"] for best, _ in pairs.values()})
        row = [label_cell(arm), " to ".join(f"{s:,}" for s in dict.fromkeys((steps[0], steps[-1])))]
        for which in (0, 1):
            for metric in COLUMNS:
                values = {seed: finite(pair[which].get(metric.key)) for seed, pair in pairs.items()}
                values = {seed: metric.scale * v for seed, v in values.items() if v is not None}
                row.append(mean_cell(metric, values, len(pairs)))
        rows.append(row)
    return section("At the best and at the last validation", table_of(heads, rows, note=NOTES["overfit"]), kind="h3")
