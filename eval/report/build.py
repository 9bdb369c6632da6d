"""Makes a report of run folders: one page of tables, curves and verdicts.

The page is a list of blocks: ("h" | "h3" | "p" | "code", text), ("warn", [text]), ("table", Table),
("figure", name, caption), ("samples", prompt, [(Cell, text)]), ("fold", title, blocks). A number that was not measured
is a dash.
"""

import datetime
import json
import math
import os
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from eval import metrics
from eval.answer_calibration import KINDS
from eval.report import plots, tables
from eval.report.bowl import bowl_blocks, bowls, claim_tests
from eval.report.claims import Verdict, holm_words, verdicts
from eval.report.forecasts import forecast_blocks
from eval.report.gsm8k import answer_blocks, confidences
from eval.report.page import to_html, to_markdown
from eval.report.runs import (
    Arm,
    Run,
    differing,
    finite,
    group_arms,
    grouped,
    load_run,
    setting_differences,
    show,
    some,
    system_differences,
)
from eval.report.sources import other_files, usual
from eval.report.summaries import summary_blocks
from eval.report.tables import NOTES, Cell, label_cell, section, table_of

SPLIT_NAMES = {"val": "validation", "test": "test", "ood": "out of domain"}
MOST_CURVES, MOST_PANELS = 10, 6  # arms in a figure of curves; in one of a panel an arm


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

    def figure(self, name: str, data: bytes | None, caption: str) -> tuple | None:
        """Keeps a picture, and gives its block; None where there is nothing to draw."""
        if data is None:
            return None
        self.figures[name] = data
        return "figure", name, caption


def find_warnings(arms: list[Arm]) -> list[str]:
    """What a reader must know before comparing anything, the gravest first."""
    out = []
    for k in setting_differences(*arms):
        groups = grouped(arms, lambda arm, k=k: show(arm.config.get(k)))
        parts = "; ".join(f"{value}: {some([arm.label for arm in same])}" for value, same in groups.items())
        out.append(f"NOT COMPARABLE: the arms differ in {k} ({parts}). No verdict is given across that difference.")
    done = [arm for arm in arms if arm.finished]
    for k in sorted({k for arm in done for k in system_differences(done[0], arm)}):
        out.append(f"Speed and memory are NOT COMPARABLE between all arms: they differ in {k}.")
    out += code_warnings(arms)
    for arm in arms:
        out += [warning for run in arm.runs for warning in run_warnings(run)]
    parts = {}  # as a set that keeps its order
    for run in (run for arm in done for run in arm.finished):
        sets = run.summary.get("data")
        for name, of in sets.items() if isinstance(sets, dict) else ():
            parts |= {f"{of.get('set')} {name} is {of['partial']}": None} if of.get("partial") else {}
        parts |= {f"{k}: the first {n:,} pairs": None for k, n in (run.summary.get("examples_limit") or {}).items()}
    if parts:
        out.append(f"Not of whole sets: {'; '.join(parts)}.")
    if single := [arm.label for arm in done if len(arm.finished) < 2]:
        out.append(f"One seed only ({some(single)}): a difference may be chance, and no claim about it is powered.")
    commits = sorted({str(run.environment.get("git_commit"))[:10] for arm in arms for run in arm.runs})
    if len(commits) > 1:
        out.append(f"The runs are of different commits: {', '.join(commits)}.")
    return out


def run_warnings(run: Run) -> Iterator[str]:
    name, steps = run.path.as_posix(), run.config.get("steps", "?")
    if not run.finished:
        yield f"UNFINISHED: {name}, {run.state} of {steps}. It is in the curves only."
    elif (run.number("steps") or math.inf) < (finite(steps) or 0):
        yield f"{name} ended at step {run.summary['steps']} of {steps}: its numbers are of a shorter run."
    elif run.number("val_nll") is None:
        yield f"{name} finished without a finite validation NLL."
    if run.number("divergences"):
        yield f"{name} diverged {run.summary['divergences']} time(s) on the way."
    if run.summary.get("temperature_at_bound"):
        yield f"{name}: its temperature {run.summary.get('temperature')} stands at the bound of the search."


def code_warnings(arms: list[Arm]) -> list[str]:
    """Arms of one config that ran other code, with their runs; and arms that ran other code than most."""
    out = []
    for first, *others in grouped(arms, lambda arm: json.dumps(arm.config, sort_keys=True)).values():
        for arm in others:
            sides = " and ".join(some([run.path.as_posix() for run in side.runs]) for side in (arm, first))
            files = some(other_files(arm.source, first.source))
            out.append(f"OTHER CODE: {sides} have the same settings, but {files} differs: they are two arms, not one.")
    base = usual([run.source for arm in arms for run in arm.runs])
    plain = [arm for arm in arms if not arm.code and other_files(arm.source, base)]
    for files, same in grouped(plain, lambda arm: some(other_files(arm.source, base))).items():
        labels = some([arm.label for arm in same])
        out.append(f"OTHER CODE: {labels} ran another {files} than most; a difference may be the code's.")
    return out


def run_row(arm: Arm, run: Run) -> list:
    """A run in the table of what was run."""
    env, seen = run.environment, run.number("tokens_seen")
    commit = str(env.get("git_commit") or "-")[:10] + " + changes" * bool(env.get("git_dirty"))
    device = run.summary.get("device") or env.get("device") or "-"
    time = str(env.get("time") or "-")[:16].replace("T", " ")
    steps = f"{run.summary.get('steps', run.last_step)} of {run.config.get('steps', '-')}"
    path, state = run.path.as_posix(), Cell(run.state, tone="" if run.finished else "unsure")
    tokens = f"{seen:,.0f}" if seen else "-"
    return [Cell(path, colour=arm.colour), arm.label, state, device, commit, time, run.seed, steps, tokens]


def fact_blocks(arms: list[Arm]) -> list[tuple]:
    """What was run, where, how, and what happened on the way."""
    runs, rows = [(arm, run) for arm in arms for run in arm.runs], []
    heads = "run", "arm", "state", "device", "commit", "started (UTC)", "seed", "steps", "tokens"
    blocks = section("What was run", table_of(heads, [run_row(*pair) for pair in runs], left=6))
    events = [(run.path.as_posix(), event) for _, run in runs for event in run.events]
    for kind, found in grouped(events, lambda pair: (pair[0], str(pair[1].get("event")))).items():
        first, last = found[0][1], found[-1][1]
        detail = (f"{k} {v}" for k, v in first.items() if k not in ("kind", "step", "event") and v is not None)
        steps = f"{first['step']} to {last['step']}" if len(found) > 1 else first["step"]
        rows.append([*kind, ", ".join(detail) or "-", steps, len(found)])
    heads = "run", "event", "detail of the first", "step", "times"
    blocks += section("Events", table_of(heads, rows, left=3), kind="h3")
    flags = differing(arms, unread=True)
    rows = [[label_cell(arm), *(show(arm.config.get(k)) for k in flags)] for arm in arms if flags]
    blocks += section("Where the arms differ", table_of(["arm", *flags], rows, note=NOTES["arms"]), kind="h3")
    shared = ", ".join(f"{k} {show(v)}" for k, v in arms[0].config.items() if k not in flags)
    blocks += section("What they share", shared and ("p", f"{shared}."), kind="h3")
    commands = dict.fromkeys(str(command) for _, run in runs if (command := run.environment.get("command")))
    blocks += section("Commands", commands and ("code", "\n".join(commands)), kind="h3")
    packages = [{"python": run.environment.get("python")} | (run.environment.get("packages") or {}) for _, run in runs]
    versions = dict.fromkeys(", ".join(f"{k} {v}" for k, v in each.items() if v) for each in packages)
    says = "; ".join(filter(None, versions))
    return blocks + ([("p", f"Versions: {says}.")] if says else [])


def sample_blocks(arms: list[Arm]) -> list[tuple]:
    """Distinct-1 and -2 of each arm, and its first run's texts side by side, prompt by prompt."""
    columns, texts = metrics.shown(metrics.SAMPLES, "table"), defaultdict(dict)
    rows = [arm for arm in arms if any(arm.values(m.key) for m in columns)]
    for arm in arms:
        samples = next((run.samples for run in arm.finished if run.samples), [])
        for sample in (s for s in samples if isinstance(s, dict)):
            text, cards = str(sample.get("text", "")), texts[str(sample.get("prompt", ""))]
            cards.setdefault(arm.label, (label_cell(arm), text if text.strip() else "(empty)"))
    cards = [("samples", prompt, list(found.values())) for prompt, found in texts.items()]
    return section("Samples", tables.metric_table(rows, {}, columns, ""), *cards)


def best_arms(arms: list[Arm], limit: int) -> list[Arm]:
    """At most ``limit`` arms for a figure: the best of each loss by validation NLL, then the next best."""
    ranked = sorted(arms, key=lambda a: a.mean("val_nll"))
    first = [next(a for a in ranked if a.loss == loss) for loss in dict.fromkeys(a.loss for a in ranked)]
    kept = (first + [a for a in ranked if a not in first])[:limit]
    return [a for a in arms if a in kept]


def grids(arms: list[Arm]) -> list[tuple[str, str, str, dict, str]]:
    """(title, x, y, cells, split) for each loss whose arms vary in two or three numeric flags, of two values or more.

    Of three flags the one with the fewest values goes into the title, a grid for each of its values. ``cells``: (x, y)
    -> means of the metrics that are shown in a grid, on the ``split`` that was summarised, else on validation."""
    out = []
    for loss in dict.fromkeys(a.loss for a in arms):
        same = [a for a in arms if a.loss == loss and a.finished]
        flags = differing(same)
        values = {k: {finite(a.config.get(k)) for a in same} for k in flags}
        if len(flags) not in (2, 3) or any(None in v or len(v) < 2 for v in values.values()):
            continue
        third = min(reversed(flags), key=lambda k: len(values[k])) if len(flags) == 3 else None
        x, y = (k for k in flags if k != third)
        split = next((s for s in SPLIT_NAMES if any(a.values(f"{s}_rouge1") for a in same)), None)
        # PPL is the NLL's exponential: one of the two is enough.
        keys = [m.key for m in metrics.shown(metrics.TOKENS, "grid") if m.key != ("ppl" if split else "nll")]
        keys += [m.key for m in metrics.shown(metrics.SUMMARIES, "grid")] if split else []
        for level in sorted(values[third]) if third else [None]:
            cells = {
                (finite(a.config[x]), finite(a.config[y])): {k: a.mean(f"{split or 'val'}_{k}") for k in keys}
                for a in same
                if third is None or finite(a.config[third]) == level
            }
            out.append((f"{loss}, {third} {level:g}" if third else loss, x, y, cells, split or "val"))
    return out


def head_line(arms: list[Arm]) -> str:
    """What the report is of."""
    runs = [run for arm in arms for run in arm.runs]
    models = [(a.config.get("model") or a.config.get("size"), a.config.get("data")) for a in arms]
    what = ", ".join(dict.fromkeys(f"{show(model)} on {show(data)}" for model, data in models))
    count = ", ".join(f"{len(of)} {word}" + "s" * (len(of) != 1) for of, word in ((arms, "arm"), (runs, "run")))
    seeds = ", ".join(sorted({str(run.seed) for run in runs}))
    devices = "; ".join(sorted({str(run.environment.get("device") or "-") for run in runs}))
    count += f" ({sum(run.finished for run in runs)} finished)"
    return f"{what}. {count}, seeds {seeds}, on {devices}. Written {datetime.datetime.now():%Y-%m-%d %H:%M}."


def build(folders: list[str | Path], title: str = "") -> Report:
    """Reads the run folders and makes the whole report in memory. Raises ValueError, one line, for bad input."""
    arms, warnings = group_arms([load_run(folder) for folder in folders])
    plots.assign_colours(arms)
    done = [arm for arm in arms if arm.finished]
    # The claims are of language models and of DPSM: without both there is nothing to hold against them.
    bowl = bowls(arms)
    fot_tests = claim_tests(bowl)
    trained = not bowl and any(a.config.get("script", "train_lm.py") == "train_lm.py" for a in arms)
    claimed = trained or any(a.loss == "dpsm" for a in arms)
    found = verdicts(arms, fot_tests) if claimed else []
    dpsm_tests = [v.p for v in found]
    rivals, pictures = bowl_blocks(bowl, dpsm_tests)
    report = Report(title or "Scorecast report", arms, find_warnings(arms) + warnings, found)
    report.blocks.append(("p", head_line(arms)))
    report.blocks += [("warn", report.warnings)] if report.warnings else []
    graded, grades = forecast_blocks(arms)
    report.blocks += rivals + graded
    report.figures |= pictures | grades
    for split, name in SPLIT_NAMES.items():
        report.blocks += section(f"Results, {name}", tables.final_table(arms, split), kind="fold" if rivals else "h")
        report.blocks += section(f"Summaries, {name}", tables.summary_table(arms, split), kind="h3")
        report.blocks += summary_blocks(arms, split, name)
    if not done:
        report.blocks.append(("p", "No run has finished: there are curves, and no final numbers yet."))
    report.blocks += answer_blocks(arms)
    few = best_arms(done, MOST_PANELS)
    sure = plots.answer_confidence(confidences(few), confidences(few, "before"), KINDS)
    report.blocks += filter(None, [report.figure("confidence", sure, NOTES["confidence_figure"])])
    if not rivals:  # with CE there would be as many as there are rules
        report.blocks += section("Differences from CE, validation", tables.delta_table(arms))
        report.blocks += section("Over all settings", tables.settings_table(arms), kind="h3")
    note = NOTES["verdict"] + holm_words([*fot_tests, *dpsm_tests])
    report.blocks += section("The claims of DPSM", claimed and ("p", note))
    for i, label in enumerate(dict.fromkeys(v.arm for v in found)):
        part = tables.verdict_table([v for v in found if v.arm == label])
        report.blocks += section(label, part, kind="fold" if i else "h3")
    few = best_arms(arms, MOST_CURVES)
    cut = f" {len(few)} of {len(arms)} arms: the best of each loss, then the next best." if few != arms else ""
    curves = report.figure("curves", plots.curves(few, "val"), NOTES["curves"] + cut)
    training = report.figure("training", plots.curves(few, "train"), NOTES["training"] + cut)
    epochs = report.figure("epochs", plots.curves(few, "val", "epoch"), NOTES["epochs"] + cut)
    report.blocks += section("Learning curves", curves, epochs, training)
    for k, (name, x, y, cells, split) in enumerate(grids(arms), 1):
        picture = plots.heat_maps(name, x, y, cells, SPLIT_NAMES[split])
        report.blocks += section(f"{name}: {x} and {y}", report.figure(f"grid_{k}", picture, NOTES["grid"]))
    few, reliability = best_arms(done, MOST_PANELS), []
    for split, name in SPLIT_NAMES.items():
        caption = f"{name.capitalize()}. {NOTES['reliability']}"
        reliability.append(report.figure(f"reliability_{split}", plots.reliability(few, split), caption))
    report.blocks += section("Reliability before and after temperature", *reliability)
    report.blocks += section("Cost", tables.cost_table(arms)) + sample_blocks(best_arms(arms, MOST_PANELS))
    report.blocks += fact_blocks(arms)
    return report


def write(report: Report, out: str | Path) -> None:
    """report.md, report.html and the PNGs into ``out``: whole into a temporary folder, then moved into place."""
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
