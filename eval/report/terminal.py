"""Compares runs: one page of tables, curves and verdicts, from run folders alone.

    python -m eval.report runs/A runs/B ... --out reports/NAME --title "DPSM on WikiText-103"

Runs that differ only in seed and bookkeeping form an arm (eval.report.runs). The page is written three times: as
`report.md`, as one self-contained `report.html`, and as a short table on the terminal. Every statistic over seeds is
eval.stats'; a number that was not measured is a dash.
"""

import math
import textwrap

from eval import metrics
from eval.metrics import Metric
from eval.report.build import Report, build, write
from eval.report.tables import final_rows, mean_cell
from runtime.cli import Parser, user_errors
from schedules.commandline import alive

WIDTH = 110  # columns of the terminal
LABEL, WARNINGS = 33, 6  # columns of an arm's label; warnings that are printed


def column_head(metric: Metric) -> str:
    """ "ECE % at T" of a metric called "ECE after T" in %; a speed is known by its unit."""
    if metric in metrics.COST:
        return metric.unit
    name, _, after = metric.name.partition(" after ")
    return name + " %" * ("%" in metric.unit) + f" at {after}" * bool(after)


def print_results(arms: list) -> None:
    """A row an arm: the metrics that are shown on the terminal, ± sd where it fits and says something."""
    quality = metrics.shown(metrics.TOKENS + metrics.TEMPERED, "terminal")
    cost = metrics.shown(metrics.COST, "terminal")
    heads = {}
    for metric in (*quality, *cost):
        head = column_head(metric)
        heads[metric.key] = head if head not in heads.values() else f"{metric.name}, {metric.unit}"
    # A spread of four decimals says little. Percentages are short, perplexities are not.
    wide = {m.key: (13 if m.scale == 100 else 16) for m in quality if m.digits <= 2}
    widths = {key: max(8, len(head) + 1) for key, head in heads.items()} | wide
    if LABEL + 3 + sum(1 + width for width in widths.values()) > WIDTH:
        widths, wide = {key: max(8, len(head)) for key, head in heads.items()}, {}
    names = "".join(f" {head:>{widths[key]}}" for key, head in heads.items())
    print(f"\n{'arm':<{LABEL}} {'n':>2}{names}")
    for arm in final_rows(arms):
        runs, label = len(arm.finished), arm.label
        if len(label) > LABEL:
            print(label)
            label = ""
        line = f"{label:<{LABEL}} {runs:>2}"
        for metric in (*quality, *cost):
            cell = mean_cell(metric, arm.measured(metric, "" if metric in cost else "val"), runs)
            text = f"{cell.text} {cell.sub}".strip() if metric.key in wide and runs > 1 else cell.text
            line += f" {text.replace('±', '+-'):>{widths[metric.key]}}"
        print(line)


def print_verdicts(found: list) -> None:
    """The verdict of the best DPSM arm."""
    labels = list(dict.fromkeys(v.arm for v in found))
    print(f"\n{'claims of ' + short(labels[0], 29):<39} {'value':<29} {'threshold':<16} {'holds':<5} verdict")
    for v in (v for v in found if v.arm == labels[0]):
        value = v.value.replace("±", "+-") + (f" (n={v.count})" if math.inf not in v.values else "")
        says = f"{value:<29} {v.threshold:<16} {v.holds:<5} {v.verdict}" if v.values else short(v.verdict, 70)
        print(f"{v.criterion.number} {v.criterion.name:<37} {says}")
    if len(labels) > 1:
        print(f"{len(labels) - 1} more DPSM arms in the report")


def print_summary(report: Report) -> None:
    """Where the report is, its warnings, its results and the verdict; `WIDTH` columns at most."""
    if report.out:
        print(f"report: {report.out / 'report.html'}\n        {report.out / 'report.md'}")
    for text in report.warnings[:WARNINGS]:
        print(textwrap.fill(text, WIDTH - 2, initial_indent="! ", subsequent_indent="  "))
    if len(report.warnings) > WARNINGS:
        print(f"! and {len(report.warnings) - WARNINGS} more warnings in the report")
    if final_rows(report.arms):
        print_results(report.arms)
    print()
    for text in report.answers:
        print(textwrap.fill(text, WIDTH - 2, subsequent_indent="  "))
    if report.verdicts:
        print_verdicts(report.verdicts)


def short(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 2] + ".."


@alive()
def main(argv: list[str] | None = None) -> int:
    usage = "%(prog)s RUN [RUN ...] --out DIR [--title TITLE]"
    parser = Parser(prog="python -m eval.report", usage=usage, description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, finished or not")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for report.md, report.html and the figures")
    parser.add_argument("--title", default="", help="heading of the report")
    args = parser.parse_args(argv)
    with user_errors():
        report = build(args.runs, args.title)
        write(report, args.out)
    print_summary(report)
    return 0
