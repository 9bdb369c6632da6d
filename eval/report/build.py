"""Makes a report of run folders: one page of tables, curves and verdicts.

The page is a list of blocks: ("h" | "h3" | "p" | "code", text), ("answer" | "warn", [text]), ("table", Table),
("charts", name, charts as page.js takes them, caption), ("map", name, [HeatMap], caption),
("glossary", [(term, text)]), ("samples", prompt, [(Cell, text)]), ("fold", title, blocks).
A number that was not measured is a dash.
"""

import datetime
import json
import math
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from eval import metrics
from eval.answer_calibration import KINDS
from eval.report import charts, export, fot_claims, plots, tables
from eval.report.answer import answer_blocks
from eval.report.bowl import bowl_blocks, bowls, claim_tests
from eval.report.charts import Chart
from eval.report.claims import Verdict, holm_words, verdicts
from eval.report.cost import campaign_blocks
from eval.report.forecasts import forecast_blocks
from eval.report.gsm8k import confidences, gsm8k_blocks
from eval.report.overfit import overfit_blocks
from eval.report.page import to_html, to_markdown
from eval.report.robustness import robustness_blocks
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
from eval.report.study import study_blocks
from eval.report.summaries import summary_blocks
from eval.report.tables import NOTES, Cell, label_cell, section, table_of
from schedules.textlines import read_toml

SPLIT_NAMES = {"val": "validation", "test": "test", "ood": "out of domain"}
MOST_CURVES, MOST_PANELS = 10, 6  # arms that a figure of curves draws at first; in one of a panel an arm
MOST_SHOWN = 24  # arms in the legend of a figure of curves
GLOSSARY = [*read_toml(Path(__file__).with_name("glossary.toml"))["terms"].items()]


@dataclass
class Report:
    """Everything that is written or printed; ``out`` is set by `write`."""

    title: str
    arms: list[Arm]
    warnings: list[str]
    verdicts: list[Verdict]
    answers: list[str] = field(default_factory=list)  # the sentences that the page begins with
    blocks: list[tuple] = field(default_factory=list)
    figures: dict[str, Callable[[], plots.Picture]] = field(default_factory=dict)  # name -> what draws it
    out: Path | None = None

    def charts(self, name: str, found: list[Chart], caption: str, off: frozenset[str] = frozenset()) -> tuple | None:
        """The block of a group of charts, whose picture `write` draws; None for none. ``off``: labels not drawn at
        first."""
        if not found:
            return None
        drawn = [c._replace(lines=[line for line in c.lines if line.label not in off]) for c in found]
        self.figures[name] = partial(plots.draw, drawn)
        return "charts", name, charts.as_json(found, off), caption


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
    heads = "run", "arm", "state", "device", "commit", "started (UTC)", "seed|number", "steps", "tokens"
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
    shared = ", ".join(f"{k} {show(v)}" for k, v in arms[0].config.items() if k not in flags and v not in (None, ""))
    blocks += section("What they share", shared and ("p", f"{shared}."), kind="h3")
    commands = dict.fromkeys(command for _, run in runs if (command := command_of(run)))
    blocks += section("Commands", commands and ("code", "\n".join(commands)), kind="h3")
    packages = [{"python": run.environment.get("python")} | (run.environment.get("packages") or {}) for _, run in runs]
    versions = dict.fromkeys(", ".join(f"{k} {v}" for k, v in each.items() if v) for each in packages)
    says = "; ".join(filter(None, versions))
    return blocks + ([("p", f"Versions: {says}.")] if says else [])


def command_of(run: Run) -> str:
    """The command line that ran, as it can be typed; "" where the run does not say."""
    said, ranks = str(run.environment.get("command") or ""), run.environment.get("world_size")
    many = isinstance(ranks, int) and ranks > 1
    return said and (f"torchrun --nproc_per_node {ranks} " if many else "python ") + said


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
    seeds = sorted({str(run.seed) for run in runs})
    devices = "; ".join(sorted({str(run.environment.get("device") or "-") for run in runs}))
    count += f" ({sum(run.finished for run in runs)} finished)"
    numbers = f"{len(seeds)} seed{'s' * (len(seeds) != 1)} (number{'s' * (len(seeds) != 1)} {', '.join(seeds)})"
    return f"{what}. {count}, {numbers}, on {devices}. Written {datetime.datetime.now():%Y-%m-%d %H:%M}."


def build(folders: list[str | Path], title: str = "", votes: list[str | Path] = ()) -> Report:
    """Reads the run folders, and files of the human study's ``votes``, and makes the whole report in memory. Raises
    ValueError, one line, for bad input."""
    runs = [load_run(folder) for folder in folders]
    arms, warnings = group_arms(runs)
    plots.assign_colours(arms)
    bowl = bowls(arms)
    # All claims of a page are decided together.
    rules, fot = claim_tests(bowl), fot_claims.rows(arms)
    fot_p = [v.p for v in fot]
    found = verdicts(arms, [*rules, *fot_p])
    dpsm_p = [v.p for v in found]
    fot = fot_claims.decide(fot, [*rules, *dpsm_p])
    report = Report(title or "Scorecast report", arms, find_warnings(arms) + warnings, found)
    report.blocks.append(("p", head_line(arms)))
    first = answer_blocks(found, fot, [*rules, *fot_p, *dpsm_p])
    report.answers = first[0][1]
    report.blocks += first
    report.blocks += [("warn", report.warnings)] if report.warnings else []
    report.blocks += bowl_blocks(bowl, [*fot_p, *dpsm_p], report.charts)
    report.blocks += curve_blocks(report) + result_blocks(report, folded=bool(bowl))
    if found:
        note = NOTES["verdict"] + holm_words([*rules, *fot_p, *dpsm_p])
        report.blocks += [("h", "The claims of DPSM, arm by arm"), ("p", note)]
    for i, label in enumerate(dict.fromkeys(v.arm for v in found)):
        part = tables.verdict_table([v for v in found if v.arm == label])
        report.blocks += section(label, part, kind="fold" if i else "h3")
    report.blocks += section("Efficiency", tables.cost_table(arms)) + campaign_blocks(runs)
    report.blocks += calibration_blocks(report) + sample_blocks(best_arms(arms, MOST_PANELS)) + study_blocks(votes)
    report.blocks += robustness_blocks(arms) + grid_blocks(report) + forecast_blocks(arms, report.charts)
    report.blocks += fact_blocks(arms)
    report.blocks += [("h", "Glossary"), ("glossary", GLOSSARY)]
    return report


def curve_blocks(report: Report) -> list[tuple]:
    """Learning curves; of many arms the best are drawn at first."""
    more, few = best_arms(report.arms, MOST_SHOWN), best_arms(report.arms, MOST_CURVES)
    off = frozenset(arm.label for arm in more if arm not in few)
    cut = f" {len(more)} of {len(report.arms)} arms: the best of each loss, then the next best." * (more != report.arms)
    cut += f" {len(off)} of them are switched off in the legend." if off else ""
    parts = [
        report.charts(name, charts.curves(more, kind, panels), NOTES[name] + cut, off)
        for name, kind, panels in (("curves", "val", ""), ("epochs", "val", "epoch"), ("training", "train", ""))
    ]
    return section("Learning curves", *parts)


def result_blocks(report: Report, folded: bool) -> list[tuple]:
    """Final metrics of each split, GSM8K's, and differences from CE. ``folded``: of a grid of learning-rate rules."""
    arms, blocks = report.arms, []
    for split, name in SPLIT_NAMES.items():
        blocks += section(f"Results, {name}", tables.final_table(arms, split), kind="fold" if folded else "h")
        blocks += section(f"Summaries, {name}", tables.summary_table(arms, split), kind="h3")
        blocks += summary_blocks(arms, split, name)
    done = [arm for arm in arms if arm.finished]
    if not done:
        blocks.append(("p", "No run has finished: there are curves, and no final numbers yet."))
    blocks += gsm8k_blocks(arms)
    few = best_arms(done, MOST_PANELS)
    sure = charts.answer_confidence(confidences(few), confidences(few, "before"), KINDS)
    blocks += filter(None, [report.charts("confidence", sure, NOTES["confidence_figure"])])
    if not folded:  # with CE there would be as many as there are rules
        blocks += overfit_blocks(arms)
        blocks += section("Differences from CE, validation", tables.delta_table(arms))
        blocks += section("Over all settings", tables.settings_table(arms), kind="h3")
    return blocks


def calibration_blocks(report: Report) -> list[tuple]:
    """Reliability of each split, also by how often its tokens are seen, and calibration beside perplexity."""
    done, parts, bands = [arm for arm in report.arms if arm.finished], [], []
    for split, name in SPLIT_NAMES.items():
        few = best_arms(done, MOST_PANELS)
        caption = f"{name.capitalize()}. {NOTES['reliability']}"
        if block := report.charts(f"reliability_{split}", charts.reliability(few, split), caption):
            report.figures[block[1]] = partial(plots.reliability, few, split)  # with bars and counts, as papers have it
            parts.append(block)
        if table := tables.band_table(best_arms(done, MOST_SHOWN), split):
            found = [] if bands else charts.reliability(few, split, charts.OFTEN)
            caption = f"{name.capitalize()}. {NOTES['bands_figure']}"
            bands += [("p", f"{name.capitalize()}:"), table, report.charts(f"bands_{split}", found, caption)]
    out = section("Reliability before and after temperature", *parts)
    out += section("By how often the training text has the target", *bands, kind="h3")
    more = best_arms(done, MOST_SHOWN)
    return out + section(
        "Perplexity and calibration", report.charts("frontier", charts.frontier(more, "val"), NOTES["frontier"])
    )


def grid_blocks(report: Report) -> list[tuple]:
    """Sensitivity: a map for each metric over two settings."""
    blocks = []
    for k, (name, x, y, cells, split) in enumerate(grids(report.arms), 1):
        report.figures[f"grid_{k}"] = partial(plots.heat_maps, name, x, y, cells, SPLIT_NAMES[split])
        maps = charts.heat_maps(x, y, cells)
        block = "map", f"grid_{k}", maps, f"{SPLIT_NAMES[split].capitalize()}. {NOTES['grid']}"
        blocks += section(f"Sensitivity of {name} to {x} and {y}", block)
    return blocks


def write(report: Report, out: str | Path, refresh: int = 0) -> None:
    """report.html, report.md, results.csv, results.tex and the figures as PNG and SVG into ``out``: whole into a
    temporary folder, then moved into place. ``refresh``: see `to_html`."""
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; give a folder")
    files = {"report.md": to_markdown(report), "report.html": to_html(report, refresh)}
    files |= {"results.csv": export.csv_text(report.arms), "results.tex": export.latex(report.arms, SPLIT_NAMES)}
    files = {name: text.encode() for name, text in files.items()}
    for name, draw in report.figures.items():
        picture = draw()
        files |= {f"{name}.png": picture, f"{name}.svg": picture.svg}
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".report-") as folder:
        for name, data in files.items():
            (Path(folder) / name).write_bytes(data)
        for name in files:
            os.replace(Path(folder) / name, out / name)
    report.out = out
