"""What a campaign would be, before it is one: each size asked by the script's own --dry-run."""

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from eval.campaign.recipe import Job, alike, arguments, command_line
from runtime.dry_run import row, span

UNITS = {"d": 86400, "h": 3600, "min": 60, "s": 1}


class Size(NamedTuple):
    """Cells that cost alike: their settings and what concerns the system are equal. Knobs are taken to cost nothing."""

    cells: list[Job]
    says: dict[str, str]  # the lines of the script's dry run, by their first word
    error: str

    @property
    def seconds(self) -> float | None:
        """Of a run of it; None where it was not timed."""
        found = re.match(r"[\d,]+ steps (.*), and \d+ validations about (.*)", self.says.get("the whole", ""))
        return sum(map(seconds_of, found.groups())) if found else None

    def lines(self) -> list[str]:
        """What a run of it is, for people."""
        first, count = self.cells[0].name, len(self.cells)
        head = f"{count} x {first}" + f" and alike: {', '.join(c.name for c in self.cells[1:])}" * (count > 1)
        if self.error:
            return [head, row("not measured", self.error)]
        keys = ("model", "parameters", "steps", "all of it", "FLOPs", "a step", "the whole", "memory")
        return [head, *(row(key, self.says[key]) for key in keys if key in self.says)]


def seconds_of(text: str) -> float:
    """The seconds of `runtime.dry_run.span`'s "3 h 20 min"."""
    return float(sum(int(n) * UNITS[unit] for n, unit in re.findall(r"(\d+) (d|h|min|s)\b", text)))


def sizes(script, todo: list[Job]) -> list[list[Job]]:
    """The cells by size, in their order."""
    found: dict[tuple, list[Job]] = {}
    for cell in todo:
        found.setdefault(alike(script, cell, "setting", "system"), []).append(cell)
    return list(found.values())


def measure(script: str, group: list[Job], root: Path, ranks: int, how: str) -> Size:
    """``how``: timed or plan, of the script's --dry-run, for the first cell of a size."""
    cell = group[0]
    line = command_line(script, root / f".{how}", cell.shared | cell.own, ranks)
    done = subprocess.run([*line, *arguments({"dry_run": how})], capture_output=True, text=True)
    rows = [re.fullmatch(r"  (.{13}) (.*)", text) for text in done.stdout.splitlines()]
    says: dict[str, str] = {}
    for found in filter(None, rows):
        says[found[1].strip()] = found[2]  # of two lines on memory the measured one is the last
    last = (done.stderr.strip() or "it said nothing").splitlines()[-1]
    return Size(group, says, f"exit code {done.returncode}: {last}" if done.returncode else "")


def tell(script, name: str, todo: list[Job], root: Path, ranks: int, jobs: int, how: str) -> int:
    """Prints the cells by size, and what all of them come to. Returns 0, or 1 where a size could not be asked."""
    groups = sizes(script, todo)
    print(f"runs: {len(todo)}, sizes: {len(groups)}; nothing is written", flush=True)
    asked = []
    for number, group in enumerate(groups, 1):
        print(f"[{number}/{len(groups)}] asks {group[0].name}", file=sys.stderr, flush=True)
        asked.append(measure(name, group, root, ranks, how))
        print("\n".join(asked[-1].lines()), flush=True)
    timed = [(size.seconds, len(size.cells)) for size in asked if size.seconds is not None]
    if timed:
        total = sum(seconds * count for seconds, count in timed)
        some = sum(count for _, count in timed)
        but = f", of {some} of {len(todo)} runs" * (some < len(todo))
        print(f"all runs: {span(total)}{but}, without final evaluations; {jobs} at a time about {span(total / jobs)}")
        if jobs > 1:
            print("a step was timed alone on this machine: side by side runs share its cores")
    return int(any(size.error for size in asked))
