"""Compares runs: one page of tables, curves and verdicts, from run folders alone.

    python -m eval.report runs/A runs/B ... --out reports/NAME --title "DPSM on WikiText-103"

Runs that differ only in seed and bookkeeping form an arm (eval.report.runs). The page is written three times, as
`report.md`, as one self-contained `report.html`, and as a short table on the terminal. Every statistic over
seeds is eval.stats'; a number that was not measured is a dash.
"""

import argparse
import datetime
import math
import os
import tempfile
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from eval.report.columns import COST, DELTAS, QUALITY, SUMMARIES, Cell, Column
from eval.report.runs import (
    Arm,
    Verdict,
    differing,
    group_arms,
    load_run,
    number,
    reference,
    setting_differences,
    show,
    system_differences,
    verdicts,
)
from eval.stats import holm, paired, summarize
from runtime.cli import user_errors

# ----------------------------------------------------------------------------------------------
# tables


class Table(NamedTuple):
    head: list[Cell]
    rows: list[list[Cell]]
    left: int = 1  # columns of words, the others hold numbers
    note: str = ""


def table(head: str, rows: list[list[Cell]], *, columns: tuple = (), left: int = 1, note: str = "") -> Table:
    """A table with the headings in ``head``, separated by commas, and then those of ``columns``."""
    return Table([*map(Cell, head.split(", ")), *(column.head for column in columns)], rows, left, note)


class Row(NamedTuple):
    """An arm in the final table, or what temperature makes of the CE arm (``after``)."""

    label: str
    arm: Arm
    after: bool

    def values(self, column: Column, split: str = "val") -> dict:
        """seed -> value in the column's unit."""
        key = "temperature" if column.key == "temperature" else f"{split}_{column.key}"
        if self.after and column.key.endswith("_t"):
            return {}
        if self.after and column.key != "temperature":
            key += "_t"
        return {seed: column.scale * v for seed, v in self.arm.values(key).items()}


def final_rows(arms: list[Arm]) -> list[Row]:
    rows = []
    for arm in arms:
        if arm.finished:
            rows.append(Row(arm.label, arm, False))
            if arm.loss == "ce" and arm.values("val_nll_t"):
                rows.append(Row(f"{arm.label} + temperature", arm, True))
    return rows


def spread(column: Column, values: dict, runs: int) -> Cell:
    """Mean and, of several seeds, +- sd; says so where fewer than the arm's ``runs`` have a value."""
    if not values:
        return Cell("-")
    s = summarize(list(values.values()))
    parts = [f"± {column.format(s.sd)}"] * (s.n > 1) + [f"n = {s.n}"] * (s.n < runs)
    return Cell(column.format(s.mean), ", ".join(parts))


def best_row(column: Column, values: list[dict]) -> int | None:
    """The row whose mean is best by more than the two standard deviations of it and of every other, or None."""
    stats = [(i, summarize(list(v.values()))) for i, v in enumerate(values) if v]
    if len(stats) < 2 or not column.better:
        return None
    sign = 1 if column.better == "lower" else -1
    (i, first), *others = sorted(stats, key=lambda s: sign * s[1].mean)
    # The sd of one seed is nan: then nothing is clear.
    clear = all(sign * (other.mean - first.mean) > first.sd + other.sd for _, other in others)
    return i if clear else None


def final_table(arms: list[Arm], split: str) -> Table | None:
    """A row an arm. Nothing is bold where settings differ, because then no arm is better."""
    rows = final_rows(arms)
    if not any(row.values(column, split) for row in rows for column in QUALITY if column.key != "temperature"):
        return None
    comparable = not setting_differences(*(row.arm for row in rows))
    body = [[Cell(row.label, colour=row.arm.colour), Cell(str(len(row.arm.finished)))] for row in rows]
    columns = [column for column in QUALITY if any(row.values(column, split) for row in rows)]
    for column in columns:
        values = [row.values(column, split) for row in rows]
        best = best_row(column, values) if comparable else None
        for i, v in enumerate(values):
            cell = spread(column, v, len(rows[i].arm.finished))
            body[i].append(cell._replace(bold=i == best))
    note = (
        "Mean ± standard deviation over seeds. ↓ lower is better, ↑ higher is better. Bold: the best value, where it "
        "is further from every other than their two standard deviations together, which takes two seeds of each arm. "
        "T is fitted on validation."
    )
    return table("arm, seeds", body, columns=columns, note=note if split == "val" else "")


def summary_table(arms: list[Arm], split: str) -> Table | None:
    """What was generated for ``split``, a row an arm; a column that no arm has is left out, None where there is none.

    Of one seed a ROUGE has the bootstrap interval over texts that the run computed, of several +- sd over seeds.
    """
    arms = [arm for arm in arms if arm.values(f"{split}_rouge1")]
    columns = [c for c in SUMMARIES if any(arm.values(f"{split}_{c.key}") for arm in arms)]
    comparable = not setting_differences(*arms)
    body = [[Cell(a.label, colour=a.colour), Cell(f"{a.mean(f'{split}_examples'):,.0f}")] for a in arms]
    for column in columns:
        values = [Row("", arm, False).values(column, split) for arm in arms]
        best = best_row(column, values) if comparable else None
        for i, (arm, v) in enumerate(zip(arms, values, strict=True)):
            cell = spread(column, v, len(arm.finished))
            ends = [arm.values(f"{split}_{column.key}_{end}") for end in ("low", "high")]
            if len(v) == 1 and all(ends):
                low, high = (column.format(column.scale * next(iter(end.values()))) for end in ends)
                cell = cell._replace(sub=f"{low} to {high}")
            body[i].append(cell._replace(bold=i == best))
    hashes = {str(run.summary.get(f"{split}_bertscore_hash")) for arm in arms for run in arm.finished} - {"None"}
    note = SUMMARY_NOTE + "".join(f" BERTScore: {name}." for name in sorted(hashes))
    return table("arm, texts", body, columns=columns, note=note) if arms else None


def delta_table(arms: list[Arm]) -> Table | None:
    """Differences from CE over shared seeds, with p by paired t-test, Holm-corrected over the arms of a column."""
    columns = [c for c in (*QUALITY, *SUMMARIES) if c.key in DELTAS or c.key.startswith("rouge")]
    compared = [(row, reference(row.arm, arms, "ce")[0]) for row in final_rows(arms)]
    compared = [(row, ce) for row, ce in compared if ce and (row.after or ce is not row.arm)]
    body, tests = [], []
    for row, ce in compared:
        line = []
        for column in columns:
            mine, theirs = row.values(column), Row("", ce, False).values(column)
            seeds = [s for s in mine if s in theirs]
            line.append(paired([mine[s] for s in seeds], [theirs[s] for s in seeds]) if len(seeds) > 1 else None)
        if any(line):
            n = max(t.n for t in line if t)
            body.append([Cell(row.label, colour=row.arm.colour), Cell(ce.label), Cell(str(n))])
            tests.append(line)
    if not body:
        return None
    kept = [j for j, c in enumerate(columns) if c.key in DELTAS or any(line[j] for line in tests)]
    columns, tests = [columns[j] for j in kept], [[line[j] for j in kept] for line in tests]
    for j, column in enumerate(columns):
        corrected = holm([line[j].p if line[j] else math.nan for line in tests])
        for cells, line, p in zip(body, tests, corrected, strict=True):
            t = line[j]
            size = f"{'+' if t.mean >= 0 else '-'}{column.format(abs(t.mean))} ± {column.format(t.sd)}" if t else "-"
            cells.append(Cell(size, "" if not t else "p < 0.001" if p < 0.001 else f"p = {p:.3f}"))
    note = (
        "Mean ± standard deviation of the differences seed by seed. p: two-sided paired t-test, Holm-corrected over "
        "the arms within each column (not over columns)."
    )
    return table("arm, minus, pairs", body, columns=columns, left=2, note=note)


def cost_table(arms: list[Arm]) -> Table:
    """Speed, memory and energy, with the ratio to CE where both ran under the same conditions."""
    body = []
    for arm in (a for a in arms if a.finished):
        ce = reference(arm, arms, "ce")[0]
        ce = ce if ce is not arm and ce and not system_differences(arm, ce) else None
        cells = [Cell(arm.label, colour=arm.colour)]
        for column in COST:
            values = {seed: column.scale * v for seed, v in arm.values(column.key).items()}
            cell = spread(column, values, len(arm.finished))
            base = ce.mean(column.key) if ce and ce.values(column.key) else 0
            ratio = f"{arm.mean(column.key) / base:.3f} × CE" if base and cell.text != "-" else ""
            cells.append(Cell(f"{cell.text} {cell.sub}".strip(), ratio))
        body.append(cells)
    note = "Training only, without evaluation and checkpoints. A dash: not measured on this device."
    kinds = {str(run.summary.get("peak_memory_of")) for arm in arms for run in arm.finished} - {"None"}
    note += f" Peak memory is that of: {', '.join(sorted(kinds))}." if kinds else ""
    return table("arm", body, columns=COST, note=note)


TONES = {"met": "good", "not met": "bad", "not powered": "unsure", "yes": "good", "no": "bad"}


def verdict_table(rows: list[Verdict]) -> Table:
    body = []
    for v in rows:
        value = Cell(v.value, f"n = {v.count}" if v.values else "")
        words = (str(v.criterion.number), v.criterion.name, v.criterion.definition, v.against)
        tones = [TONES.get(text, "") for text in (v.holds, v.verdict)]
        state = Cell(v.verdict, bold=bool(tones[1]), tone=tones[1])
        body.append([*map(Cell, words), value, Cell(v.threshold), Cell(v.holds, tone=tones[0]), state])
    return table("#, criterion, definition, against, value, threshold, holds here, verdict", body, left=8)


# ----------------------------------------------------------------------------------------------
# the page: a list of blocks, ("h" | "p" | "code", text), ("warn", [text]), ("table", Table),
# ("figure", name, caption), ("samples", prompt, [(Cell, text)]), ("fold", title, blocks)


@dataclass
class Report:
    """Everything that is written or printed; ``out`` is set by `write`."""

    title: str
    arms: list[Arm]
    warnings: list[str]
    verdicts: list[Verdict]
    blocks: list[tuple] = field(default_factory=list)
    figures: dict[str, bytes] = field(default_factory=dict)  # name -> PNG
    out: Path | None = None


def find_warnings(arms: list[Arm]) -> list[str]:
    """What a reader must know before comparing anything, the gravest first."""
    out = []
    for k in setting_differences(*arms):
        groups = {}
        for arm in arms:
            groups.setdefault(show(arm.config.get(k)), []).append(arm.label)
        parts = "; ".join(f"{value}: {some(labels)}" for value, labels in groups.items())
        out.append(f"NOT COMPARABLE: the arms differ in {k} ({parts}). No verdict is given across that difference.")
    done = [arm for arm in arms if arm.finished]
    for k in sorted({k for arm in done for k in system_differences(done[0], arm)}):
        out.append(f"Speed and memory are NOT COMPARABLE between all arms: they differ in {k}.")
    for run in (run for arm in arms for run in arm.runs):
        name, steps = run.path.as_posix(), run.config.get("steps", "?")
        if not run.finished:
            out.append(f"UNFINISHED: {name}, {run.state} of {steps}. It is in the curves only.")
        elif (run.number("steps") or math.inf) < (number(steps) or 0):
            out.append(f"{name} ended at step {run.summary['steps']} of {steps}: its numbers are of a shorter run.")
        elif run.number("val_nll") is None:
            out.append(f"{name} finished without a finite validation NLL.")
        if run.number("divergences"):
            out.append(f"{name} diverged {run.summary['divergences']} time(s) on the way.")
        if run.summary.get("temperature_at_bound"):
            out.append(f"{name}: its temperature {run.summary.get('temperature')} stands at the bound of the search.")
    parts = []
    for run in (run for arm in done for run in arm.finished):
        sets = run.summary.get("data")
        for name, of in sets.items() if isinstance(sets, dict) else ():
            parts += [f"{of.get('set')} {name} is {of['partial']}"] if of.get("partial") else []
        limits = run.summary.get("examples_limit") or {}
        parts += [f"{name}: the first {n:,} pairs" for name, n in limits.items()]
    if parts:
        out.append(f"Not of whole sets: {'; '.join(dict.fromkeys(parts))}.")
    single = [arm.label for arm in done if len(arm.finished) < 2]
    if single:
        out.append(f"One seed only ({some(single)}): a difference may be chance, and no claim about it is powered.")
    commits = sorted({str(run.environment.get("git_commit"))[:10] for arm in arms for run in arm.runs})
    if len(commits) > 1:
        out.append(f"The runs are of different commits: {', '.join(commits)}.")
    return out


def some(labels: list[str]) -> str:
    return ", ".join(labels[:3]) + (f" and {len(labels) - 3} more" if len(labels) > 3 else "")


def facts(arms: list[Arm]) -> list[tuple]:
    """What was run, where, how, and what happened on the way."""
    body, events, commands, versions = [], {}, [], []
    for arm in arms:
        for run in arm.runs:
            env, path = run.environment, run.path.as_posix()
            commit = str(env.get("git_commit") or "-")[:10] + (" + changes" if env.get("git_dirty") else "")
            done, seen = run.summary.get("steps", run.last_step), run.number("tokens_seen")
            state = Cell(run.state, tone="" if run.finished else "unsure")
            device, time = run.summary.get("device") or env.get("device"), env.get("time")
            words = (str(device or "-"), commit, str(time or "-")[:16].replace("T", " "))
            numbers = (str(run.seed), f"{done} of {run.config.get('steps', '-')}", f"{seen:,.0f}" if seen else "-")
            body.append([Cell(path, colour=arm.colour), Cell(arm.label), state, *map(Cell, words + numbers)])
            commands += [str(env["command"])] if env.get("command") else []
            packages = {"python": env.get("python"), **(env.get("packages") or {})}
            versions.append(", ".join(f"{k} {v}" for k, v in packages.items() if v))
            for event in run.events:
                events.setdefault((path, str(event.get("event"))), []).append(event)
    blocks = [("table", table("run, arm, state, device, commit, started (UTC), seed, steps, tokens", body, left=6))]
    body = []
    for (path, event), found in events.items():
        detail = {k: v for k, v in found[0].items() if k not in ("kind", "step", "event") and v is not None}
        words = path, event, ", ".join(f"{k} {v}" for k, v in detail.items()) or "-"
        steps = str(found[0]["step"]) + (f" to {found[-1]['step']}" if len(found) > 1 else "")
        body.append([*map(Cell, (*words, steps, str(len(found))))])
    if body:
        blocks += [("h3", "Events"), ("table", table("run, event, detail of the first, step, times", body, left=3))]
    fields = differing([arm.config for arm in arms])
    if fields:
        rows = [[Cell(a.label, colour=a.colour), *(Cell(show(a.config.get(k))) for k in fields)] for a in arms]
        note = "Settings that make an arm; a dash: unset, or not read by that loss."
        blocks += [("h3", "Where the arms differ"), ("table", table(", ".join(["arm", *fields]), rows, note=note))]
    shared = ", ".join(f"{k} {show(v)}" for k, v in arms[0].config.items() if k not in fields)
    blocks += [("h3", "What they share"), ("p", shared + ".")] if shared else []
    blocks += [("h3", "Commands"), ("code", "\n".join(dict.fromkeys(commands)))] if commands else []
    versions = [v for v in dict.fromkeys(versions) if v]
    return blocks + ([("p", f"Versions: {'; '.join(versions)}.")] if versions else [])


def sample_blocks(arms: list[Arm]) -> list[tuple]:
    """Distinct-1 and -2 of each arm, and its first run's texts side by side, prompt by prompt."""
    columns = tuple(Column(f"distinct_{n}", f"Distinct-{n}", f"distinct {n}-grams / all", "", digits=3) for n in (1, 2))
    rows = [
        [Cell(a.label, colour=a.colour), *(spread(c, a.values(c.key), len(a.finished)) for c in columns)]
        for a in arms
        if any(a.values(c.key) for c in columns)
    ]
    blocks, texts = [("table", table("arm", rows, columns=columns))] if rows else [], {}
    for arm in arms:
        run = next((run for run in arm.finished if run.samples), None)
        for sample in (s for s in run.samples if isinstance(s, dict)) if run else ():
            text = str(sample.get("text", ""))
            cards = texts.setdefault(str(sample.get("prompt", "")), {})
            cards.setdefault(arm.label, (Cell(arm.label, colour=arm.colour), text if text.strip() else "(empty)"))
    return blocks + [("samples", prompt, list(found.values())) for prompt, found in texts.items()]


def shown(arms: list[Arm], limit: int) -> list[Arm]:
    """At most ``limit`` arms for a figure: the best of each loss by validation NLL, then the next best."""
    ranked = sorted(arms, key=lambda a: a.mean("val_nll"))
    first = [next(a for a in ranked if a.loss == loss) for loss in dict.fromkeys(a.loss for a in ranked)]
    kept = (first + [a for a in ranked if a not in first])[:limit]
    return [a for a in arms if a in kept]


def grids(arms: list[Arm]) -> list[tuple[str, str, str, dict, str]]:
    """(title, x, y, cells, split) for each loss whose arms vary in exactly two numeric fields, two values of each or
    more. Of three such fields the one with the fewest values goes into the title, a grid for each of its values.
    ``cells``: (x, y) -> means of PPL and ECE, or of ROUGE, ECE and NLL on the ``split`` that was summarised."""
    out = []
    for loss in dict.fromkeys(a.loss for a in arms):
        same = [a for a in arms if a.loss == loss and a.finished]
        fields = differing([a.config for a in same])
        values = {k: {number(a.config.get(k)) for a in same} for k in fields}
        if len(fields) not in (2, 3) or any(None in v or len(v) < 2 for v in values.values()):
            continue
        third = min(reversed(fields), key=lambda k: len(values[k])) if len(fields) == 3 else None
        x, y = (k for k in fields if k != third)
        split = next((s for s in SPLITS if any(a.values(f"{s}_rouge1") for a in same)), None)
        keys = ("rouge1", "rouge2", "rougeL", "rougeLsum", "ece10", "nll") if split else ("ppl", "ece10")
        for level in sorted(values[third]) if third else [None]:
            cells = {
                (number(a.config[x]), number(a.config[y])): {k: a.mean(f"{split or 'val'}_{k}") for k in keys}
                for a in same
                if third is None or number(a.config[third]) == level
            }
            out.append((f"{loss}, {third} {level:g}" if third else loss, x, y, cells, split or "val"))
    return out


def build(folders: list[str | Path], title: str = "") -> Report:
    """Reads the run folders and makes the whole report in memory. Raises ValueError, one line, for bad input."""
    from eval.report.bowl import bowl_blocks
    from eval.report.gsm8k import answer_blocks

    try:
        from eval.report import plots
    except ImportError as e:
        raise ValueError(f"the report needs matplotlib ({e}); pip install matplotlib") from e
    runs = [load_run(folder) for folder in folders]
    arms, warnings = group_arms(runs)
    plots.assign_colours(arms)
    done = [run for arm in arms for run in arm.finished]
    # The claims are of language models and of DPSM: without both there is nothing to hold against them.
    bowls, pictures = bowl_blocks(arms)
    trained = not bowls and any(a.config.get("script", "train_lm.py") == "train_lm.py" for a in arms)
    claimed = trained or any(a.loss == "dpsm" for a in arms)
    found = verdicts(arms) if claimed else []
    report = Report(title or "Scorecast report", arms, find_warnings(arms) + warnings, found)
    blocks = report.blocks

    def figure(name: str, data: bytes | None, caption: str) -> None:
        if data:
            report.figures[name] = data
            blocks.append(("figure", name, caption))

    what = ", ".join(
        dict.fromkeys(
            f"{show(a.config.get('model') or a.config.get('size'))} on {show(a.config.get('data'))}" for a in arms
        )
    )
    seeds = ", ".join(sorted({str(run.seed) for arm in arms for run in arm.runs}))
    devices = "; ".join(sorted({str(run.environment.get("device") or "-") for arm in arms for run in arm.runs}))
    total = sum(len(arm.runs) for arm in arms)
    count = f"{plural(len(arms), 'arm')}, {plural(total, 'run')} ({len(done)} finished), seeds {seeds}"
    blocks.append(("p", f"{what}. {count}, on {devices}. Written {datetime.datetime.now():%Y-%m-%d %H:%M}."))
    if report.warnings:
        blocks.append(("warn", report.warnings))
    blocks += bowls
    report.figures |= pictures
    for split, name in SPLITS.items():
        found = final_table(arms, split)
        blocks += section(f"Results, {name}", [("table", found)] if found else [], folded=bool(bowls))
        made = summary_table(arms, split)
        blocks += [("h3", f"Summaries, {name}"), ("table", made)] if made else []
    if not done:
        blocks.append(("p", "No run has finished: there are curves, and no final numbers yet."))
    blocks += answer_blocks(arms)
    deltas = None if bowls else delta_table(arms)  # of CE there would be as many as there are rules
    blocks += section("Differences from CE, validation", [("table", deltas)] if deltas else [])

    blocks += [("h", "The claims of DPSM"), ("p", VERDICT_NOTE)] if claimed else []
    for i, label in enumerate(dict.fromkeys(v.arm for v in report.verdicts)):
        part = ("table", verdict_table([v for v in report.verdicts if v.arm == label]))
        blocks += [("h3", label), part] if i == 0 else [("fold", label, [part])]

    few = shown(arms, 10)
    cut = f" {len(few)} of {len(arms)} arms: the best of each loss, then the next best." if few != arms else ""
    blocks.append(("h", "Learning curves"))
    figure("curves", plots.learning_curves(few), CURVES_NOTE + cut)
    figure("training", plots.training_curves(few), TRAINING_NOTE + cut)
    for k, (name, x, y, cells, split) in enumerate(grids(arms), 1):
        blocks.append(("h", f"{name}: {x} and {y}"))
        figure(f"grid_{k}", plots.heat_maps(name, x, y, cells, SPLITS[split]), GRID_NOTE)
    few, head = shown([arm for arm in arms if arm.finished], 6), len(blocks)
    for split, name in SPLITS.items():
        figure(f"reliability_{split}", plots.reliability(few, split), f"{name.capitalize()}. {RELIABILITY_NOTE}")
    blocks[head:head] = [("h", "Reliability before and after temperature")] if len(blocks) > head else []
    blocks += [("h", "Cost"), ("table", cost_table(arms))] if done else []
    samples = sample_blocks(shown(arms, 6)) if done else []
    blocks += [("h", "Samples"), *samples] if samples else []
    blocks += [("h", "What was run"), *facts(arms)]
    return report


SPLITS = {"val": "validation", "test": "test", "ood": "out of domain"}
VERDICT_NOTE = (
    "Each row compares a DPSM arm with another arm, over the seeds that both finished; where several CE or Brier "
    "arms have its setting, with the one of lowest validation NLL. Met, not met: the 95 % t interval of the mean "
    "over seeds lies on one side of the threshold. Not powered: the interval holds the threshold, or there is one"
    " seed; whether the mean itself satisfies the threshold is then under 'holds here'. The claim as a whole is "
    "rows 1 to 6, all met; rows 7 and 8 are for information."
)
CURVES_NOTE = (
    "Validation on the whole set. Line: mean over seeds; band: smallest to largest. The view leaves out the first"
    " fifth of the steps where it would flatten the rest."
)
TRAINING_NOTE = "Means since the row before. Losses of different scores have different scales: compare the NLL."
GRID_NOTE = "Means over seeds, the best in bold. It was chosen on the set that is shown: the best of many is flattered."
SUMMARY_NOTE = (
    "Of the generated summaries. ROUGE: rouge-score with stemming, Lsum on newline-split sentences; R1, R2 and RL as "
    "files2rouge has them, BART's published convention. Under a ROUGE of one seed: its 95 % bootstrap interval."
)
RELIABILITY_NOTE = (
    "Confidence of the likeliest token; bins of all seeds added up, ECE the mean over seeds as in the table. Bars"
    " under the diagonal: too sure; over it: too modest. A logarithmic count of tokens stands below each."
)


def plural(n: int, word: str) -> str:
    return f"{n} {word}" + ("s" if n != 1 else "")


def section(heading: str, blocks: list[tuple], folded: bool = False) -> list[tuple]:
    """``blocks`` under a heading, or to be unfolded; none where there are none."""
    if not blocks:
        return []
    return [("fold", heading, blocks)] if folded else [("h", heading), *blocks]


def write(report: Report, out: str | Path) -> None:
    """report.md, report.html and the PNGs into ``out``: whole into a temporary folder, then moved into place."""
    from eval.report.page import to_html, to_markdown

    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; give a folder")
    files = {"report.md": to_markdown(report).encode(), "report.html": to_html(report).encode()}
    files |= {f"{name}.png": data for name, data in report.figures.items()}
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".report-") as folder:
        for name, data in files.items():
            (Path(folder) / name).write_bytes(data)
        for name in files:
            os.replace(Path(folder) / name, out / name)
    report.out = out


# ----------------------------------------------------------------------------------------------
# terminal


def print_summary(report: Report) -> None:
    """Where the report is, its warnings, a row an arm, and the verdict of the best DPSM arm; 110 columns at most."""
    if report.out:
        print(f"report: {report.out / 'report.html'}\n        {report.out / 'report.md'}")
    for text in report.warnings[:6]:
        print(textwrap.fill(text, 108, initial_indent="! ", subsequent_indent="  "))
    if len(report.warnings) > 6:
        print(f"! and {len(report.warnings) - 6} more warnings in the report")
    columns = [c for c in QUALITY if c.key in ("ppl", "ece10", "brier", "nll_t", "ece10_t")]
    widths = (16, 13, 8, 9, 13)
    head = ("PPL", "ECE %", "Brier", "NLL at T", "ECE % at T")
    rows = final_rows(report.arms)
    if rows:
        names = "".join(f" {name:>{width}}" for name, width in zip(head, widths, strict=True))
        print(f"\n{'arm':<33} {'n':>2}{names} {'tokens/s':>9}")
    for row in rows:
        n, label = len(row.arm.finished), row.label
        if len(label) > 33:
            print(label)
            label = ""
        line = f"{label:<33} {n:>2}"
        for column, width in zip(columns, widths, strict=True):
            cell = spread(column, row.values(column), n)
            wide = column.key not in ("brier", "nll_t") and n > 1
            text = f"{cell.text} {cell.sub}".strip() if wide else cell.text
            line += f" {text.replace('±', '+-'):>{width}}"
        speed = {} if row.after else row.arm.values("tokens_per_second")
        print(f"{line} {spread(COST[1], speed, n).text:>9}")
    labels = list(dict.fromkeys(v.arm for v in report.verdicts))
    if not labels:
        return
    print(f"\n{'claims of ' + short(labels[0], 29):<39} {'value':<29} {'threshold':<16} {'holds':<5} verdict")
    for v in (v for v in report.verdicts if v.arm == labels[0]):
        start = f"{v.criterion.number} {v.criterion.name:<37}"
        if v.values:
            value = v.value.replace("±", "+-") + (f" (n={v.count})" if math.inf not in v.values else "")
            print(f"{start} {value:<29} {v.threshold:<16} {v.holds:<5} {v.verdict}")
        else:
            print(f"{start} {short(v.verdict, 70)}")
    if len(labels) > 1:
        print(f"{len(labels) - 1} more DPSM arms in the report")


def short(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 2] + ".."


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m eval.report", description=__doc__.split("\n")[0])
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message} (--help lists the flags)\n")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, finished or not")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for report.md, report.html and the figures")
    parser.add_argument("--title", default="", help="heading of the report")
    args = parser.parse_args(argv)
    with user_errors():
        report = build(args.runs, args.title)
        write(report, args.out)
    print_summary(report)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
