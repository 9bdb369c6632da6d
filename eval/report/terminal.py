"""Compares runs: one page of tables, curves and verdicts, from run folders alone.

    python -m eval.report runs/A runs/B ... --out reports/NAME --title "DPSM on WikiText-103"
    python -m eval.report runs/* --out report --live 60           # anew every minute until all have ended
    python -m eval.report --compare runs/A runs/B                 # settings, code, place, results

Runs that differ only in seed and bookkeeping form an arm (eval.report.runs). The page is written as one self-contained
`report.html` and as `report.md`, with the final metrics as `results.csv` and `results.tex` and the figures as PNG and
SVG beside it, and as a short table on the terminal. Every statistic over seeds is eval.stats'; a number that was not
measured is a dash.
"""

import math
import sys
import textwrap
import time
from pathlib import Path

from eval import metrics
from eval.metrics import Metric
from eval.report.build import Report, build, write
from eval.report.compare import compared
from eval.report.cost import given_up
from eval.report.tables import final_rows, mean_cell
from runtime.cli import Parser, user_errors
from runtime.staging import LOCK, let_go
from schedules.commandline import alive
from schedules.textlines import read_rows

ENDED = ("finished", "diverged")  # states of a run that will not go on by itself
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


def has_begun(run: Path) -> bool:
    """Whether it has logged a row that a report can show."""
    path = run / "metrics.jsonl"
    rows = read_rows(path, half=[]) if path.is_file() else ()
    return any(isinstance(row, dict) and row.get("kind") in ("train", "val") for _, row in rows)


def left(run: Path) -> bool:
    """Whether nobody works on it any more: its process has ended, or if it has none yet its campaign."""
    campaign = run.parent
    if (campaign / LOCK).exists():  # which may still begin it
        return let_go(campaign) and (let_go(run) or not (run / LOCK).exists())
    return let_go(run)


def follow(args) -> Report:
    """Writes the report again and again until all runs have finished or ended, waiting for those that have not begun.
    Returns the last one. Raises ValueError where none has begun and none will."""
    while True:
        begun = [run for run in args.runs if has_begun(Path(run))]
        report = built(args, begun) if begun else None
        runs = [run for arm in report.arms for run in arm.runs] if report else []
        going = [run.path for run in runs if not run.state.startswith(ENDED) and not given_up(run)]
        waiting = [Path(run) for run in args.runs if run not in begun]
        stopped = [run for run in (*going, *waiting) if left(run)]
        counts = f"{len(runs) - len(going)} runs ended, {len(set(going) - set(stopped))} going on"
        counts += f", {len(set(waiting) - set(stopped))} not begun" + f", {len(stopped)} stopped" * bool(stopped)
        more = len(stopped) < len(going) + len(waiting)
        if report:
            write(report, args.out, refresh=args.live if more else 0)
        print(counts, file=sys.stderr, flush=True)
        if not more:
            if stopped:
                names = ", ".join(map(str, stopped))
                print(f"stopped before their end: {names}; --resume or their campaign goes on", file=sys.stderr)
            if not report:
                raise ValueError("no run has begun, and their campaign has stopped; start it again")
            return report
        time.sleep(args.live)


def built(args, runs: list[str]) -> Report:
    return build(runs, args.title, args.preference)


@alive()
def main(argv: list[str] | None = None) -> int:
    usage = "%(prog)s RUN [RUN ...] --out DIR [flags]\n       %(prog)s --compare A B"
    parser = Parser(prog="python -m eval.report", usage=usage, description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN", help="run folders, finished or not")
    add("--out", metavar="DIR", help="folder for report.html, report.md, results.csv, results.tex and the figures")
    add("--title", default="", help="heading of the report")
    text = "files of the human study, votes or eval.preference tally --json"
    add("--preference", nargs="+", default=[], metavar="VOTES", help=text)
    text = "write it anew every so many seconds until all runs have ended or were stopped (30 without a number)"
    add("--live", type=int, nargs="?", const=30, metavar="SECONDS", help=text)
    text = "print what differs between two runs in settings, code, place and results"
    add("--compare", nargs=2, metavar=("A", "B"), help=text)
    args = parser.parse_args(argv)
    with user_errors():
        if args.compare:
            if args.runs or args.out or args.live:
                raise ValueError("--compare takes two runs and nothing else")
            print(compared(*args.compare))
            return 0
        if not args.runs or not args.out:
            raise ValueError("give run folders and --out DIR, or --compare A B")
        if args.live is not None and args.live < 1:
            raise ValueError(f"--live {args.live}: expected seconds, 1 or more")
        if args.live:
            report = follow(args)
        else:
            report = built(args, args.runs)
            write(report, args.out)
    print_summary(report)
    return 0
