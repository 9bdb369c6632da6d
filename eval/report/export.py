"""The final metrics for other programs: a CSV of every run, and LaTeX tables of the arms."""

import csv
import io

from eval import metrics
from eval.report.runs import Arm
from eval.report.tables import Table, cost_table, final_table, summary_table

SPECIAL = {c: "\\" + c for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "×": r"$\times$",
    "↓": r"$\downarrow$", "↑": r"$\uparrow$", "<": r"\textless{}", ">": r"\textgreater{}", "\u00a0": " ",
}  # fmt: skip
SETS = (*metrics.TOKENS, *metrics.TEMPERED, *metrics.SUMMARIES, *metrics.SUMMARY_CONFIDENCE)
ALONE = (*metrics.COST, *metrics.ANSWERS, *metrics.SAMPLES)


def csv_text(arms: list[Arm]) -> str:
    """A row a run and metric: run, arm, loss, seed, set, metric, value, unit. Unscaled values, of finished runs."""
    file = io.StringIO()
    rows = csv.writer(file, lineterminator="\n")
    rows.writerow(["run", "arm", "loss", "seed", "set", "metric", "value"])
    for arm in arms:
        for run in arm.finished:
            of = [run.path.as_posix(), arm.label, arm.loss, run.seed]
            keys = [("", m.key, m.key) for m in ALONE]
            for split in ("val", "test", "ood"):
                keys += [(split, m.key, f"{split}_{m.key}") for m in SETS if m.key != "temperature"]
                keys += [
                    (split, f"{m.key}_t", f"{split}_{m.key}_t") for m in metrics.TOKENS if m.key not in ("nll", "ece10")
                ]
            keys += [("", "temperature", "temperature")]
            for name, key, place in keys:
                if (value := run.number(place)) is not None:
                    rows.writerow([*of, name, key, f"{value:.10g}"])
    return file.getvalue()


def tex(text: str) -> str:
    return "".join(SPECIAL.get(c, c) for c in text)


def latex_table(table: Table, caption: str) -> str:
    """A booktabs table; what stands under a value follows it, smaller."""

    def cell(c) -> str:
        text = rf"\textbf{{{tex(c.text)}}}" if c.bold else tex(c.text)
        return text + (rf" {{\scriptsize {tex(c.sub)}}}" if c.sub else "")

    lines = [" & ".join(map(cell, row)) + r" \\" for row in (table.head, *table.rows)]
    columns = "l" * table.left + "r" * (len(table.head) - table.left)
    body = [r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"]
    head = [r"\begin{table}", r"\centering", rf"\caption{{{tex(caption)}}}", rf"\begin{{tabular}}{{{columns}}}"]
    return "\n".join([*head, *body, r"\end{tabular}", r"\end{table}"])


def latex(arms: list[Arm], splits: dict[str, str]) -> str:
    """The tables of final metrics, summaries and efficiency; they need the package booktabs."""
    found = [(f"Results, {name}", final_table(arms, split)) for split, name in splits.items()]
    found += [(f"Summaries, {name}", summary_table(arms, split)) for split, name in splits.items()]
    found += [("Efficiency", cost_table(arms))]
    return "% needs \\usepackage{booktabs}\n" + "\n\n".join(latex_table(t, title) for title, t in found if t) + "\n"
