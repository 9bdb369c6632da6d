"""What run folders say and what may be compared: runs, arms over seeds, and the claims under test.

Runs that differ only in seed and bookkeeping form an arm. Every statistic over seeds is eval.stats'.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from eval.calibration import Calibration
from eval.stats import summarize, verdict
from kernels.losses import LOSSES

# Config fields that do not make another arm.
BOOKKEEPING = set(
    "seed out resume resume_from cache device log_every eval_every prompt sample_tokens temperature top_k top_p "
    "generate_batch bertscore profile".split()
)
# Fields that only some losses read; elsewhere their value means nothing.
KNOBS = {
    "gamma": ("focal",),
    "eps": ("smoothing",),
    "tail_smoothing": ("brier", "spherical"),
}
KNOBS["label_smoothing"] = ("ce", "dpsm")
KNOBS |= dict.fromkeys(("warmup", "alpha_schedule", "alpha_max", "alpha_start"), ("dpsm",))
# Arms that differ in one of these answer different questions.
SETTING = (
    "script data tokenizer seq_len model init_from steps batch label_noise label_noise_steps report "
    "size fold min_words max_source max_target noise_references validation_examples test_examples "
    "beams length_penalty min_new_tokens max_new_tokens no_repeat_ngram early_stopping".split()
)
# Arms that differ in one of these cannot be compared in speed and memory.
SYSTEM = "dtype kernels compile micro_batch checkpoint_activations fsdp".split()


# ----------------------------------------------------------------------------------------------
# runs and arms


@dataclass
class Run:
    """One run folder, read. ``summary`` is empty while the run is unfinished."""

    path: Path
    config: dict
    environment: dict
    train: list[dict]
    val: list[dict]
    events: list[dict]
    summary: dict
    calibration: dict[tuple[str, str], Calibration]  # by split and "raw" or "scaled"
    samples: list[dict]
    fot: list[dict]  # what a rule that measures decided

    @property
    def finished(self) -> bool:
        return bool(self.summary)

    @property
    def state(self) -> str:
        """finished, or where and, as far as its events say, why it stands."""
        why = [e["event"] for e in self.events if e.get("event") in ("diverged", "stopped")]
        return "finished" if self.finished else f"{why[-1] if why else 'unfinished'} at step {self.last_step}"

    @property
    def seed(self):
        return self.config.get("seed")

    @property
    def last_step(self) -> int:
        return max(row["step"] for row in self.train + self.val)

    def number(self, key: str) -> float | None:
        """A finite number of the summary, or None."""
        return number(self.summary.get(key))

    def curve(self) -> list[tuple[float, float]]:
        """(training seconds, validation PPL) of every validation."""
        pairs = [(number(row.get("train_seconds")), number(row.get("ppl"))) for row in self.val]
        return [(seconds, ppl) for seconds, ppl in pairs if seconds is not None and ppl]


@dataclass
class Arm:
    """Runs of one configuration over seeds."""

    loss: str
    config: dict
    runs: list[Run]
    label: str = ""
    colour: str = "#333333"
    style: object = "-"

    @property
    def finished(self) -> list[Run]:
        return [run for run in self.runs if run.finished]

    def values(self, key: str) -> dict:
        """seed -> the summary's ``key``, for finished runs where it is a finite number."""
        return {run.seed: run.number(key) for run in self.finished if run.number(key) is not None}

    def mean(self, key: str) -> float:
        """Mean over seeds, inf where nothing was measured (so that it sorts last)."""
        values = list(self.values(key).values())
        return summarize(values).mean if values else math.inf


def number(v) -> float | None:
    return float(v) if isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) else None


def read_json(path: Path, kind: type):
    """The file's value, or an empty ``kind`` where there is no file. Raises ValueError naming a broken one."""
    if not path.exists():
        return kind()
    try:
        value = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except json.JSONDecodeError as e:
        raise ValueError(f"{path} line {e.lineno} is not JSON ({e.msg})") from e
    if not isinstance(value, kind):
        raise ValueError(f"{path} holds a {type(value).__name__}, expected a {kind.__name__}")
    return value


def read_rows(path: Path, unfinished: bool) -> dict[str, list[dict]]:
    """Rows of a metrics.jsonl by kind. Raises ValueError naming the file and the line that is broken.

    Of an ``unfinished`` run a last line without its newline is dropped: it was being written. A row at a step
    that its kind has passed means that the run went back to a checkpoint: what came after it is replaced.
    """
    rows = {"train": [], "val": [], "event": [], "fot": []}
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else [""]
    tail = lines.pop()
    if tail and not unfinished:
        lines.append(tail)
    for n, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as e:
            raise ValueError(f"{path} line {n} is not JSON ({e.msg}); repair or remove that line") from e
        if not isinstance(row, dict) or not isinstance(row.get("kind"), str) or not isinstance(row.get("step"), int):
            raise ValueError(f"{path} line {n} is not a row, expected an object with kind and an integer step")
        kept = rows.setdefault(row["kind"], [])
        while row["kind"] != "event" and kept and kept[-1]["step"] >= row["step"]:
            kept.pop()
        kept.append(row)
    return rows


def read_bins(path: Path) -> dict[tuple[str, str], Calibration]:
    """Calibration by (split, "raw" | "scaled"). Raises ValueError naming the file where bins are no bins."""
    out = {}
    try:
        for split, pair in read_json(path, dict).items():
            out |= {(split, which): Calibration.from_bins(part) for which, part in (pair or {}).items()}
    except (TypeError, AttributeError, ValueError) as e:
        raise ValueError(str(e) if str(path) in str(e) else f"{path}: {e}") from e
    return out


def load_run(folder: str | Path) -> Run:
    """Reads a run folder. Raises ValueError, one line, when it is none, is broken, or holds no metrics yet."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        inside = next(folder.glob("*/config.json"), None) if folder.is_dir() else None
        hint = f"give the folders inside it, such as {inside.parent}" if inside else "give folders as in runs/NAME"
        raise ValueError(f"{folder} is not a run folder (it has no config.json); {hint}")
    files = {name: read_json(folder / f"{name}.json", dict) for name in ("config", "environment", "summary")}
    rows = read_rows(folder / "metrics.jsonl", unfinished=not files["summary"])
    if not rows["train"] and not rows["val"]:
        raise ValueError(f"{folder / 'metrics.jsonl'} holds no train or val rows; the run has not logged anything yet")
    files["calibration"] = read_bins(folder / "calibration.json")
    samples = read_json(folder / "samples.json", list) or summaries_made(folder)
    found = {"train": rows["train"], "val": rows["val"], "events": rows["event"], "fot": rows["fot"]}
    return Run(folder, samples=samples, **found, **files)


def summaries_made(folder: Path, count: int = 3) -> list[dict]:
    """The first generated summaries of a run, with the references as prompts; none where it generated none."""
    path = next((p for s in ("test", "val") if (p := folder / f"predictions-{s}.jsonl").is_file()), None)
    if path is None:
        return []
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:count] if line]
        return [{"prompt": f"reference: {row['reference']}", "text": row["prediction"]} for row in rows]
    except (json.JSONDecodeError, TypeError, KeyError) as e:
        raise ValueError(f"{path} holds no summaries ({e}); remove it, or let the run write it again") from e


def arm_config(config: dict) -> dict:
    """The part of a config that makes an arm: no bookkeeping, no knob that its loss does not read."""
    loss, fixed = config.get("loss"), config.get("alpha_schedule") == "fixed"
    return {
        k: v
        for k, v in config.items()
        if k not in BOOKKEEPING and not k.startswith("wandb") and loss in KNOBS.get(k, (loss,))
        and not (fixed and k in ("warmup", "alpha_start"))
    }  # fmt: skip


def differing(configs: list[dict]) -> list[str]:
    """Fields, in config order, whose value is not the same in all of ``configs``."""
    fields = list(dict.fromkeys(k for c in configs for k in c))
    return [k for k in fields if len({json.dumps(c.get(k)) for c in configs}) > 1]


def show(v) -> str:
    text = f"{v:g}" if isinstance(v, float) else "-" if v is None or v == "" else str(v)
    return text if len(text) <= 28 else "..." + text[-25:]


def group_arms(runs: list[Run]) -> tuple[list[Arm], list[str]]:
    """Arms in the order of losses.LOSSES, runs by seed, with labels; and warnings on repeated seeds."""
    groups, warnings = {}, []
    for run in {run.path.resolve(): run for run in runs}.values():
        config = arm_config(run.config)
        key = json.dumps(config, sort_keys=True)
        arm = groups.setdefault(key, Arm(str(config.get("loss", "run")), config, []))
        twin = next((r for r in arm.runs if r.seed == run.seed), None)
        if twin:  # the same data twice would shrink every standard deviation
            keep, drop = (twin, run) if twin.finished and not run.finished else (run, twin)
            arm.runs = [r for r in arm.runs if r is not twin] + [keep]
            warnings.append(f"{drop.path} repeats seed {run.seed} of {keep.path} and is left out.")
        else:
            arm.runs.append(run)
    arms = list(groups.values())
    order = {loss: i for i, loss in enumerate(LOSSES)}
    fields = {loss: differing([a.config for a in arms if a.loss == loss]) for loss in {a.loss for a in arms}}

    def rank(arm):
        values = [arm.config.get(k) for k in fields[arm.loss]]
        numbers = [(number(v) is None, number(v) or 0.0, str(v)) for v in values]
        return order.get(arm.loss, len(order)), arm.loss, numbers

    arms.sort(key=rank)
    for i, arm in enumerate(arms):
        arm.label = " ".join([arm.loss, *(f"{k}={show(arm.config.get(k))}" for k in fields[arm.loss])])
        if arm.label in [a.label for a in arms[:i]]:  # long values are shown by their ends
            arm.label += f" ({i + 1})"
        arm.runs.sort(key=lambda run: (run.seed is None, run.seed))
    return arms, warnings


def reference(arm: Arm, arms: list[Arm], loss: str) -> tuple[Arm | None, str]:
    """The arm of ``loss`` to compare ``arm`` with, or None and why.

    It has the same SETTING; of several, the one with fewest differences in SYSTEM, then of the lowest
    validation NLL, because what is not fixed by the setting is tuned for each loss.
    """
    found = [a for a in arms if a.loss == loss and a.finished]
    if not found:
        unfinished = any(a.loss == loss for a in arms)
        return None, f"missing: {'no finished' if unfinished else 'no'} run with --loss {loss}"
    same = [a for a in found if not setting_differences(a, arm)]
    if not same:
        sides = [(k, show(arm.config.get(k)), show(found[0].config.get(k))) for k in setting_differences(found[0], arm)]
        return None, "not comparable: " + ", ".join(f"{k} {ours} / {theirs}" for k, ours, theirs in sides)
    return min(same, key=lambda a: (len(system_differences(a, arm)), a.mean("val_nll"))), ""


def setting_differences(*arms: Arm) -> list[str]:
    return [k for k in differing([arm.config for arm in arms]) if k in SETTING]


def system_differences(a: Arm, b: Arm) -> list[str]:
    places = [{(r.environment.get("device"), r.environment.get("world_size")) for r in arm.finished} for arm in (a, b)]
    return [k for k in differing([a.config, b.config]) if k in SYSTEM] + ["device"] * (places[0] != places[1])


# ----------------------------------------------------------------------------------------------
# the claims under test


class Criterion(NamedTuple):
    number: int
    name: str
    definition: str
    against: str  # the loss compared with
    kind: str  # "difference" a - b, "change" 100 (a / b - 1), or "time"
    keys: tuple[str, str]  # of the two summaries
    direction: str
    threshold: float
    unit: str
    scale: float = 1.0
    system: bool = False  # needs the same device and settings of the system
    claim: bool = True  # False: for information


CRITERIA = (
    Criterion(1, "PPL within 0.3 of CE", "validation PPL minus CE's; lower is fine",
              "ce", "difference", ("val_ppl", "val_ppl"), "at most", 0.3, "PPL"),
    Criterion(2, "ECE at least 25 % below CE's", "validation ECE, 10 bins, no temperature; change from CE's",
              "ce", "change", ("val_ece10", "val_ece10"), "at most", -25, "%"),
    Criterion(3, "ECE within 5 % of Brier's", "validation ECE, 10 bins; change from the Brier arm's; lower is fine",
              "brier", "change", ("val_ece10", "val_ece10"), "at most", 5, "%"),
    Criterion(4, "95 % of CE's quality in 110 % of time",
              "training seconds until validation PPL is at most CE's last / 0.95 (line through log PPL), "
              "as a share of CE's own seconds to that level",
              "ce", "time", ("", ""), "at most", 110, "%", system=True),
    Criterion(5, "throughput at most 2 % lower", "training tokens a second; change from CE's",
              "ce", "change", ("tokens_per_second", "tokens_per_second"), "at least", -2, "%", system=True),
    Criterion(6, "peak memory at most 500 MB more", "peak memory minus CE's; MB = 1e6 bytes",
              "ce", "difference", ("peak_memory_bytes", "peak_memory_bytes"), "at most", 500, "MB", 1e-6, system=True),
    Criterion(7, "ECE against CE + temperature", "ECE, 10 bins, no temperature; change from CE's after temperature",
              "ce", "change", ("val_ece10", "val_ece10_t"), "at most", 0, "%", claim=False),
    Criterion(8, "NLL after temperature, both", "validation NLL after temperature minus CE's after temperature",
              "ce", "difference", ("val_nll_t", "val_nll_t"), "at most", 0, "nats", claim=False),
)  # fmt: skip


class Verdict(NamedTuple):
    criterion: Criterion
    arm: str  # label
    against: str  # label
    values: list[float]  # one a shared seed; inf where the level was never reached
    seeds: int  # of the arm, runs that did not finish included
    value: str
    threshold: str
    holds: str  # "yes", "no" or "-": whether the point value satisfies the threshold
    verdict: str  # met, not met, not powered, information; or missing / not comparable / not measured and why

    @property
    def count(self) -> str:
        """How many seeds have a value, and of how many: those that failed must not go unseen."""
        return f"{len(self.values)}" + (f" of {self.seeds}" if len(self.values) < self.seeds else "")


def time_to(curve: list[tuple[float, float]], level: float) -> float | None:
    """Seconds at which PPL first is at most ``level``, on the line through (seconds, log PPL); None if never.

    Where the first point is there already, its time: the curve does not say how much earlier.
    """
    for i, (seconds, ppl) in enumerate(curve):
        if ppl <= level:
            if i == 0:
                return seconds
            before, above = curve[i - 1]
            return before + (seconds - before) * math.log(above / level) / math.log(above / ppl)
    return None


def measure(c: Criterion, a: Run, b: Run) -> float | None:
    """The criterion's value for one pair of runs, in its unit; None where a side was not measured."""
    if c.kind == "time":
        theirs, mine = b.curve(), a.curve()
        level = theirs[-1][1] / 0.95 if theirs and mine else None
        base = time_to(theirs, level) if level else None
        seconds = time_to(mine, level) if level else None
        return None if not base else 100 * seconds / base if seconds is not None else math.inf
    x, y = a.number(c.keys[0]), b.number(c.keys[1])
    if x is None or y is None or (c.kind == "change" and y == 0):
        return None
    return c.scale * (x - y) if c.kind == "difference" else 100 * (x / y - 1)


def judge(c: Criterion, arm: Arm | None, arms: list[Arm]) -> Verdict:
    """One row of the verdict, by shared seeds."""
    sign = "" if c.kind == "time" else "+"
    limit = f"{c.direction} {c.threshold:{sign if c.threshold else ''}g} {c.unit}"
    seeds = len(arm.runs) if arm else 0
    values, pairs, other = [], [], None
    if arm is None or not arm.finished:
        why = f"missing: no {'finished ' if arm else ''}run with --loss dpsm"
    else:
        other, why = reference(arm, arms, c.against)
        apart = system_differences(arm, other) if other and c.system else []
        why = f"not comparable: {', '.join(apart)}" if apart else why
    if not why:
        theirs = {run.seed: run for run in other.finished}
        pairs = [(run, theirs[run.seed]) for run in arm.finished if run.seed in theirs]
        values = [v for v in (measure(c, a, b) for a, b in pairs) if v is not None]
        why = "" if values else "not measured" if pairs else "missing: no seed that both arms finished"
    labels = arm.label if arm else "dpsm", other.label if other else c.against
    if why:
        return Verdict(c, *labels, [], seeds, "-", limit, "-", why)
    never, n = values.count(math.inf), len(values)
    if never:
        text, holds = f"never reached by {never} of {n}", False
        state = "not met" if n > 1 else "not powered"
    else:
        mean, sd, _ = summarize(values)
        digits = 3 if c.unit in ("PPL", "nats") else 1
        text = f"{mean:{sign}.{digits}f}" + (f" ± {sd:.{digits}f}" if n > 1 else "") + f" {c.unit}"
        holds = mean <= c.threshold if c.direction == "at most" else mean >= c.threshold
        state = verdict(values, c.threshold, c.direction)
    state = state if c.claim else "information"
    return Verdict(c, *labels, values, seeds, text, limit, "yes" if holds else "no", state)


def verdicts(arms: list[Arm]) -> list[Verdict]:
    """All criteria for every DPSM arm, those with most seeds first, and of these the lowest validation NLL."""
    under_test = [arm for arm in arms if arm.loss == "dpsm"] or [None]
    under_test.sort(key=lambda a: (-len(a.finished), a.mean("val_nll")) if a else ())
    return [judge(c, arm, arms) for arm in under_test for c in CRITERIA]
