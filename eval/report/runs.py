"""Reads run folders, and makes arms of them: runs that differ only in seed and bookkeeping.

What a flag's difference means is its role, a key of `runtime.cli.ROLES`. Each run folder says its flags' roles in
``flags.json``; older folders do not, and have those of ``roles_before.json``. Statistics over seeds are eval.stats'.
"""

import itertools
import json
import logging
import math
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from eval.metrics import Metric
from eval.report.sources import other_files, read_sources, usual
from eval.stats import summarize
from kernels import Calibration
from kernels.losses import LOSSES
from runtime.cli import ROLES
from schedules import textlines

log = logging.getLogger("scorecast")


@dataclass
class Run:
    """One run folder, read. ``summary`` is empty while the run is unfinished."""

    path: Path
    config: dict
    environment: dict
    flags: dict  # {flag: {"role", "only"}}, empty in an older folder
    train: list[dict]
    val: list[dict]
    events: list[dict]
    fot: list[dict]  # what a rule that measures decided
    summary: dict
    calibration: dict[tuple[str, str], Calibration]  # by split and "raw" or "scaled"
    samples: list[dict]
    source: dict[str, int]  # see eval.report.sources

    @property
    def finished(self) -> bool:
        return bool(self.summary)

    @property
    def state(self) -> str:
        """finished, or where and, as far as its events say, why it stands."""
        why = [e["event"] for e in self.events if e.get("event") in ("diverged", "stopped")]
        return "finished" if self.finished else f"{why[-1] if why else 'unfinished'} at step {self.last_step}"

    @property
    def diverged(self) -> bool:
        return bool(self.number("divergences")) or any(e.get("event") == "diverged" for e in self.events)

    @property
    def seed(self):
        return self.config.get("seed")

    @property
    def last_step(self) -> int:
        return max(row["step"] for row in self.train + self.val)

    def number(self, key: str) -> float | None:
        """A finite number of the summary, or None."""
        return finite(self.summary.get(key))

    def curve(self) -> list[tuple[float, float]]:
        """(training seconds, validation PPL) of every validation."""
        pairs = [(finite(row.get("train_seconds")), finite(row.get("ppl"))) for row in self.val]
        return [(seconds, ppl) for seconds, ppl in pairs if seconds is not None and ppl]


def finite(v) -> float | None:
    """``v`` as a float if it is a finite number, else None."""
    return float(v) if isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) else None


def grouped(items, key) -> dict[object, list]:
    """Items by ``key(item)``, in their order."""
    groups = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return groups


def read_json(path: Path, kind: type):
    """The file's value, or an empty ``kind`` where there is no file. Raises ValueError naming a broken one."""
    if not path.exists():
        return kind()
    return textlines.read_json(path, kind)


def read_rows(path: Path, unfinished: bool) -> dict[str, list[dict]]:
    """Rows of a metrics.jsonl by kind. Raises ValueError naming the file and the line that is broken.

    An ``unfinished`` run may have been killed while it wrote: a half-written last line is dropped. A row at a step that
    its kind has passed means that the run went back to a checkpoint: it replaces what came after that."""
    rows = {kind: [] for kind in ("train", "val", "event", "fot")}
    half = [] if unfinished else None
    found = textlines.read_rows(path, half=half, advice="repair or remove that line") if path.exists() else ()
    for n, row in found:
        if not isinstance(row, dict) or not isinstance(row.get("kind"), str) or not isinstance(row.get("step"), int):
            raise ValueError(f"{path}, line {n}: no row, expected an object with kind and an integer step")
        kept = rows.setdefault(row["kind"], [])
        while row["kind"] != "event" and kept and kept[-1]["step"] >= row["step"]:
            kept.pop()
        kept.append(row)
    if half:
        log.warning("%s: line %d is half-written, as a kill leaves it; left out", path, half[0])
    return rows


def read_bins(path: Path) -> dict[tuple[str, str], Calibration]:
    """Calibration by (split, "raw" | "scaled"). Raises ValueError naming the file where bins are no bins."""
    sets = read_json(path, dict)
    try:
        parts = {(split, which): part for split, pair in sets.items() for which, part in (pair or {}).items()}
        return {key: Calibration.from_bins(part) for key, part in parts.items() if part is not None}
    except (TypeError, AttributeError, ValueError, RuntimeError, OverflowError) as e:  # the last two are torch's
        raise ValueError(f"{path}: {str(e).splitlines()[0]}") from e


def read_flags(path: Path) -> dict[str, dict]:
    """{flag: {"role", "only", "default"}}, of older folders without a default. Raises ValueError naming the file and
    the flag whose entry is broken."""
    flags = read_json(path, dict)
    for flag, about in flags.items():
        if not isinstance(about, dict) or about.get("role") not in [*ROLES] or not isinstance(about.get("only"), dict):
            raise ValueError(f"{path}: {flag} has no role and only; expected one of {', '.join(ROLES)}")
    return flags


def read_summaries(folder: Path, count: int = 3) -> list[dict]:
    """The first generated summaries of a run, with the references as prompts; none where it generated none."""
    for path in (p for split in ("test", "val") if (p := folder / f"predictions-{split}.jsonl").is_file()):
        try:
            rows = [row for _, row in itertools.islice(textlines.read_rows(path, nan=True), count)]
            return [{"prompt": f"reference: {row['reference']}", "text": row["prediction"]} for row in rows]
        except (TypeError, KeyError) as e:
            raise ValueError(f"{path} holds no summaries ({e}); remove it, or let the run write it again") from e
    return []


def with_bands(summary: dict, path: Path) -> dict:
    """The summary, and in it the numbers of its ``bands`` as SET_BAND_KEY. Raises ValueError naming the file ``path``
    where they are none."""
    out = dict(summary)
    try:
        for band, about in (summary.get("bands") or {}).items():
            (least, most), types = about["times"], about["types"]
            if not all(isinstance(number, int) for number in (least, most, types)):
                raise TypeError("times and types are no whole numbers")
            sets = {name: numbers for name, numbers in about.items() if isinstance(numbers, dict)}
            out |= {f"{name}_{band}_{key}": v for name, numbers in sets.items() for key, v in numbers.items()}
    except (TypeError, KeyError, AttributeError, ValueError) as e:
        raise ValueError(f"{path}: bands are no bands ({e}); let the run write it again") from e
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
    files["summary"] = with_bands(files["summary"], folder / "summary.json")
    return Run(
        folder,
        **files,
        **{"train": rows["train"], "val": rows["val"], "events": rows["event"], "fot": rows["fot"]},
        flags=read_flags(folder / "flags.json"),
        calibration=read_bins(folder / "calibration.json"),
        samples=read_json(folder / "samples.json", list) or read_summaries(folder),
        source=read_sources(folder),
    )


@dataclass
class Arm:
    """Runs of one configuration over seeds. ``config``: the flags that make an arm and that are read in it."""

    loss: str
    config: dict
    runs: list[Run]
    roles: dict[str, str] = field(default_factory=dict)  # flag -> role
    unread: frozenset[str] = frozenset()  # flags that nothing reads under this config
    of_loss: frozenset[str] = frozenset()  # flags that this loss reads, and not all do
    code: str = ""  # what tells it from an arm of the same config that ran other code
    label: str = ""
    tempered: bool = False  # the metrics of it are those after the fitted temperature
    colour: str = "#333333"
    style: object = "-"

    @property
    def finished(self) -> list[Run]:
        return [run for run in self.runs if run.finished]

    @property
    def source(self) -> dict[str, int]:
        """The code that ran; its runs agree on every file that two of them hold."""
        return {name: code for run in self.runs for name, code in run.source.items()}

    @property
    def plain(self) -> bool:
        """Whether the loss is what its name says, without smoothing and other additions: all of its flags are off."""
        return not any(self.config.get(flag) for flag in self.of_loss)

    def label_of(self, name: str, flags: list[str]) -> str:
        """``name``, the values of ``flags``, and what tells the arm's code apart."""
        values = (f"{k}={show(self.config.get(k))}" for k in flags)
        return " ".join([name, *values]) + (f", {self.code}" if self.code else "")

    def values(self, key: str) -> dict:
        """seed -> the summary's ``key``, for finished runs where it is a finite number."""
        return {run.seed: v for run in self.finished if (v := run.number(key)) is not None}

    def measured(self, metric: Metric, split: str = "val") -> dict:
        """seed -> value in the metric's unit. ``split``: val, test or ood; "" for a number that is of no set."""
        key = metric.key
        if key != "temperature":  # one for all sets; a second "_t" is in no summary
            key = f"{split}_" * bool(split) + key + "_t" * self.tempered
        return {seed: metric.scale * v for seed, v in self.values(key).items()}

    def mean(self, key: str) -> float:
        """Mean over seeds, inf where nothing was measured (so that it sorts last)."""
        values = self.values(key).values()
        return summarize(values).mean if values else math.inf


def roles_before() -> dict[str, dict]:
    """Roles in run folders that do not say them."""
    return read_json(Path(__file__).with_name("roles_before.json"), dict)["flags"]


def make_arm(run: Run, flags: dict[str, dict]) -> Arm:
    """An arm for ``run``, without it; ``flags`` as `read_flags` has them. A flag that is not known is a knob; one that
    ``run`` does not know, being of before it, has its default, as where such a run is resumed."""
    config, roles, unread, of_loss = {}, {}, set(), set()
    given = run.config | {k: v["default"] for k, v in flags.items() if k not in run.config and "default" in v}
    for flag, value in given.items():
        about = flags.get(flag, {"role": "knob", "only": {}})
        roles[flag] = about["role"]
        if any(other in given and given[other] not in values for other, values in about["only"].items()):
            unread.add(flag)
        elif about["role"] not in ("where", "bookkeeping"):
            config[flag] = value
            of_loss |= {flag} if "loss" in about["only"] else set()
    return Arm(str(config.get("loss", "run")), config, [], roles, frozenset(unread), frozenset(of_loss))


def group_arms(runs: list[Run]) -> tuple[list[Arm], list[str]]:
    """Arms in the order of losses.LOSSES, runs by seed, with labels; and warnings on repeated seeds.

    Runs of one config that ran other code are arms of their own, as far as both folders hold the file. A flag's role
    is that of the run that knows it: of its own folder, else of another of the same script."""
    runs = list({run.path.resolve(): run for run in runs}.values())
    known, groups, warnings = defaultdict(roles_before), defaultdict(list), []
    for run in runs:
        known[run.config.get("script")] |= run.flags
    for run in runs:
        new = make_arm(run, known[run.config.get("script")] | run.flags)
        same_config = groups[json.dumps(new.config, sort_keys=True)]
        arm = next((a for a in same_config if not other_files(a.source, run.source)), None)
        if arm is None:
            same_config.append(arm := new)
        twin = next((r for r in arm.runs if r.seed == run.seed), None)
        keep, drop = (twin, run) if twin and twin.finished and not run.finished else (run, twin)
        if drop:  # the same data twice would shrink every standard deviation
            warnings.append(f"{drop.path} repeats seed {run.seed} of {keep.path} and is left out.")
        arm.runs = [r for r in arm.runs if r is not twin] + [keep]
    base = usual([run.source for run in runs])
    for arm in (arm for same_config in groups.values() if len(same_config) > 1 for arm in same_config):
        files = other_files(arm.source, base)
        arm.code = f"other {some(files, 1)}" if files else ""
    return label_arms([*itertools.chain(*groups.values())]), warnings


def label_arms(arms: list[Arm]) -> list[Arm]:
    """Sorts arms and their runs. A label has the loss, the flags in which arms of one loss differ, and the code."""
    order = {loss: i for i, loss in enumerate(LOSSES)}
    flags = {loss: differing([a for a in arms if a.loss == loss]) for loss in {a.loss for a in arms}}

    def rank(arm):
        values = [arm.config.get(k) for k in flags[arm.loss]]
        numbers = [(finite(v) is None, finite(v) or 0.0, str(v)) for v in values]
        return order.get(arm.loss, len(order)), arm.loss, numbers, arm.code

    arms = sorted(arms, key=rank)
    for i, arm in enumerate(arms):
        arm.runs.sort(key=lambda run: (run.seed is None, run.seed))
        arm.label = arm.label_of(arm.loss, flags[arm.loss])
        if arm.label in [a.label for a in arms[:i]]:  # long values are shown by their ends
            arm.label += f" ({i + 1})"
    return arms


def show(v) -> str:
    """A flag's value in a label or a table, its end where it is long."""
    text = f"{v:g}" if isinstance(v, float) else "-" if v is None or v == "" else str(v)
    return text if len(text) <= 28 else "..." + text[-25:]


def some(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def differing(arms: list[Arm], *, unread: bool = False) -> list[str]:
    """Flags, in config order, whose value is not the same in all of ``arms``.

    Arms that do not read a flag are no difference in it, unless ``unread``."""
    flags = dict.fromkeys(k for arm in arms for k in arm.config)
    shown = {k: {json.dumps(a.config.get(k)) for a in arms if unread or k not in a.unread} for k in flags}
    return [k for k in flags if len(shown[k]) > 1]


def setting_differences(*arms: Arm) -> list[str]:
    return [k for k in differing(list(arms)) if any(arm.roles.get(k) == "setting" for arm in arms)]


def system_differences(a: Arm, b: Arm) -> list[str]:
    """Why speed and memory of two arms are not comparable: flags, "device" (or world size), "dtype"."""
    out = [k for k in differing([a, b]) if "system" in (a.roles.get(k), b.roles.get(k))]
    places = [{(r.environment.get("device"), r.environment.get("world_size")) for r in arm.finished} for arm in (a, b)]
    dtypes = [{r.summary["dtype"] for r in arm.finished if r.summary.get("dtype")} for arm in (a, b)]
    out += ["device"] * (places[0] != places[1])
    return out + ["dtype"] * (all(dtypes) and dtypes[0] != dtypes[1] and "dtype" not in out)


def reference(arm: Arm, arms: list[Arm], loss: str) -> tuple[Arm | None, str]:
    """The arm of ``loss`` to compare ``arm`` with, or None and why.

    It has the same setting, and is plain where one of them is. Of several it is the one that ran the same code, then
    the one with the fewest differences of the system, then that of the lowest validation NLL: what the setting does not
    fix is tuned for each loss."""
    found = [a for a in arms if a.loss == loss and a.finished]
    if not found:
        unfinished = any(a.loss == loss for a in arms)
        return None, f"missing: {'no finished' if unfinished else 'no'} run with --loss {loss}"
    same = [a for a in found if not setting_differences(a, arm)]
    if not same:
        sides = [(k, show(arm.config.get(k)), show(found[0].config.get(k))) for k in setting_differences(found[0], arm)]
        return None, "not comparable: " + ", ".join(f"{k} {ours} / {theirs}" for k, ours, theirs in sides)

    def rank(a):
        return not a.plain, bool(other_files(a.source, arm.source)), len(system_differences(a, arm)), a.mean("val_nll")

    return min(same, key=rank), ""
