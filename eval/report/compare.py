"""Two runs side by side: what differs in their settings, the code that ran, where it ran, and what came out."""

import difflib
import json
from pathlib import Path

from eval import metrics
from eval.report.runs import Run, load_run, show
from eval.report.sources import other_files
from eval.verdicts import compare as compare_verdicts
from eval.verdicts import describe, read_verdicts
from runtime.folder import source_folders
from schedules.textlines import read_text

MOST_LINES = 120  # of a difference of code
WHERE = ("device", "cuda", "world_size", "python")
SETS = (*metrics.TOKENS, *metrics.SUMMARIES)
ALONE = (*metrics.TEMPERED, *metrics.COST, *metrics.ANSWERS)


def compared(a: str | Path, b: str | Path) -> str:
    """Text for a terminal. Raises ValueError, one line, for what is no run folder."""
    runs = load_run(a), load_run(b)
    parts = {"settings": settings(*runs), "code": code(*runs), "place": place(*runs), "results": results(*runs)}
    lines = [f"A {runs[0].path}: {runs[0].state}", f"B {runs[1].path}: {runs[1].state}"]
    for name, found in parts.items():
        lines += ["", name, *(f"  {line}" for line in found or ["no difference"])]
    return "\n".join(lines)


def aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)] if rows else []
    return ["  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def settings(a: Run, b: Run) -> list[str]:
    """Flags whose values differ, with their roles; a flag that one side does not know is so called."""

    def value(run: Run, flag: str) -> str:
        return show(run.config[flag]) if flag in run.config else "(unknown)"

    flags = dict.fromkeys([*a.config, *b.config])
    found = [k for k in flags if json.dumps(a.config.get(k, "?")) != json.dumps(b.config.get(k, "?"))]
    roles = a.flags | b.flags
    rows = [[k, value(a, k), value(b, k), roles.get(k, {}).get("role", "")] for k in found]
    return aligned([["flag", "A", "B", "role"], *rows]) if rows else []


def code(a: Run, b: Run) -> list[str]:
    """The commits, and a difference of the files that both kept; where they kept none, of their diffs to the commit."""
    sides = [run.environment for run in (a, b)]
    names = [f"{str(env.get('git_commit') or '?')[:12]}{' + changes' * bool(env.get('git_dirty'))}" for env in sides]
    out = [f"commit A {names[0]}, B {names[1]}"] if len({*names}) > 1 else [f"commit {names[0]}, both"]
    if a.source and b.source:
        files = other_files(a.source, b.source)
        only = [sorted(x.source.keys() - y.source.keys()) for x, y in ((a, b), (b, a))]
        out += [f"in {side} alone: {', '.join(names)}" for side, names in zip("AB", only, strict=True) if names]
        out += [] if files else ["the files that both kept are the same programs"]
        diff = [line for name in files for line in difference(kept(a, name), kept(b, name), name)]
    else:
        out.append("they kept no files of code; what their commits were changed by:")
        diff = difference(*(str(env.get("git_diff") or "") for env in sides), "git diff")
        out += [] if diff else ["the same, or nothing"]
    left = len(diff) - MOST_LINES
    return out + diff[:MOST_LINES] + ([f"... and {left:,} lines more"] if left > 0 else [])


def kept(run: Run, name: str) -> str:
    """The last text of a file that a run folder keeps."""
    return read_text([folder / name for folder in source_folders(run.path) if (folder / name).is_file()][-1])


def difference(a: str, b: str, name: str) -> list[str]:
    return list(difflib.unified_diff(a.splitlines(), b.splitlines(), f"A/{name}", f"B/{name}", lineterm="", n=2))


def place(a: Run, b: Run) -> list[str]:
    sides = [{k: run.environment.get(k) for k in WHERE} for run in (a, b)]
    for side, run in zip(sides, (a, b), strict=True):
        side |= {"dtype": run.summary.get("dtype")} | (run.environment.get("packages") or {})
    found = [k for k in dict.fromkeys([*sides[0], *sides[1]]) if sides[0].get(k) != sides[1].get(k)]
    return (
        aligned([["", "A", "B"], *([k, *(str(side.get(k) or "-") for side in sides)] for k in found)]) if found else []
    )


def results(a: Run, b: Run) -> list[str]:
    """Every metric that both have, and B - A; then McNemar's test where both answered problems."""
    if not a.finished or not b.finished:
        return ["a run that has not finished has none"]
    keys = [(f"{split} {m.name}, {m.unit}", f"{split}_{m.key}", m) for split in ("val", "test", "ood") for m in SETS]
    keys += [(f"{split} {m.name}, {m.unit}", f"{split}_{m.key}", m) for split in ("val", "test") for m in ALONE[1:3]]
    keys += [(f"{m.name}, {m.unit}", m.key, m) for m in ALONE]
    rows = []
    for name, key, m in keys:
        x, y = a.number(key), b.number(key)
        if x is not None and y is not None:
            change = m.scale * (y - x)
            word = "" if not change or not m.better else "better" if (change > 0) == (m.better == "higher") else "worse"
            text = f"{'+' if change >= 0 else '-'}{m.format(abs(change))}"
            rows.append([name, m.format(m.scale * x), m.format(m.scale * y), text, word])
    out = aligned([["metric", "A", "B", "B - A", ""], *rows]) if rows else ["no metric that both have"]
    paths = [run.path / "verdicts.jsonl" for run in (a, b)]
    if all(path.is_file() for path in paths):
        first, second = map(read_verdicts, paths)
        out += [describe(compare_verdicts(first[rule], second[rule], rule)) for rule in first if rule in second]
    return out
