"""Loss curves from the logs that people have: one reader for all of them.

- transformers: trainer_state.json; LLaMA-Factory: trainer_log.jsonl
- our run folders; any JSONL with a step and a loss in its rows
- CSV: as wandb exports it (`Step`, `RUN - train/loss`; a column a run), TensorBoard (`Step`, `Value`), Lightning's
  metrics.csv, and any with a step and a loss; blank cells are no points
- llm.c: main.log; trackio: PROJECT.db; TensorBoard: event files, for which its package must be there

Points may be doubled (the last counts), and a run that was resumed repeats steps (the later ones count). Runs in one
file are told apart by a column `run` or `run_name`; a file that mixes them without one is refused.
"""

import math
import os
import re
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .commandline import package
from .textlines import one_line, parse_json, read_bytes, read_csv, read_json, read_lines, read_rows

STEP_NAMES = ("step", "_step", "current_steps", "global_step", "trainer/global_step", "iter", "iteration", "s")
LOSS_NAMES = ("loss", "train/loss", "train_loss", "train_loss_step", "trl", "val_loss", "eval_loss", "eval/loss", "tel")
LR_NAMES = ("lr", "learning_rate", "train/learning_rate", "train/lr", "optim/learning_rate_group0")
RUN_NAMES = ("run", "run_name", "run_id")
TOTAL_NAMES = ("total_steps", "max_steps")
SUFFIXES = (".csv", ".jsonl", ".json", ".log", ".db")
EVENT_FRAME = 16  # bytes around an event: its length, and two checksums
RESTARTS = 0.05  # of the rows may go back to an earlier step, or three: else they are of several runs


class Curve(NamedTuple):
    name: str
    family: str  # the folder in which it differs from the other files
    step: np.ndarray  # [N] float64, increasing
    loss: np.ndarray  # [N] float64, may hold nan and inf
    lr: np.ndarray | None  # [N] float64
    epoch: float | None = None  # steps in one
    total: float | None = None  # steps that the run was planned for, where the log says so
    notes: tuple[str, ...] = ()  # what was dropped or mended, counted
    finetune: bool | None = None  # whether it began from trained weights, where the log says so


def read_curves(
    path: str | Path, *, step: str = "", loss: str = "", lr: str = "", run: str = "", family: str = ""
) -> list[Curve]:
    """The curves of a file, one for each run in it.

    ``step``, ``loss``, ``lr``: their columns; by default the first of the usual names that is there. ``run``: only the
    run of that name. Raises ValueError, with the line, for what cannot be read, and for mixed runs."""
    path = Path(path)
    rows, known, names = list(_rows(path)), {}, {}
    if rows and "log_history" in rows[0][1]:
        rows, known = _trainer_state(path, rows[0][1])
    elif path.name == "metrics.jsonl" and (config := path.with_name("config.json")).exists():
        known = _total((values := read_json(config, dict)).get("steps")) | {"finetune": began_trained(values)}
    for _, row in rows:
        names.update(dict.fromkeys(row))
    if not rows:
        raise ValueError(f"{path}: no rows, expected a step and a loss in each")
    columns = _columns(path, names, step, loss, lr)
    named = next((name for name in names if name.lower() in RUN_NAMES), None)
    groups: dict[str, list] = {}
    for number, row in rows:
        groups.setdefault("" if named is None else str(row.get(named, "")), []).append((number, row))
    several = len(groups) * len(columns.loss) > 1
    curves = []
    for group, members in groups.items():
        for label, column in columns.loss.items():
            name = label or group
            if run and name != run:
                continue
            own = f"{_name(path)}:{name}" if several else _name(path)
            curves.append(_curve(path, own, family, members, columns._replace(loss=column), known))
    if not curves:
        raise ValueError(f"{path}: no run {run!r}, there are {', '.join([*groups, *columns.loss][:20])}")
    return curves


def log_files(paths: Iterable[str | Path]) -> list[Path]:
    """The files of ``paths`` as they are, and those in the folders among them that are logs by their names.

    Of a run folder that is its metrics.jsonl, of a trainer's checkpoints the last state. Raises ValueError for a folder
    without any."""
    found = []
    for path in map(Path, paths):
        if not path.is_dir():
            found.append(path)
            continue
        inside = []
        for folder, _, names in sorted(os.walk(path)):
            inside += _logs_of(Path(folder), sorted(names))
        if not inside:
            raise ValueError(f"{path}: no logs in this folder, expected {', '.join(SUFFIXES)} or event files")
        found += _last_checkpoints(inside)
    return found


def _logs_of(folder: Path, names: list[str]) -> list[Path]:
    for known in ("metrics.jsonl", "trainer_state.json", "trainer_log.jsonl"):
        if known in names:
            return [folder / known]
    logs = [n for n in names if n.endswith((".csv", ".jsonl", ".db")) or n == "main.log" or "tfevents" in n]
    return [folder / name for name in logs]


def _last_checkpoints(files: list[Path]) -> list[Path]:
    last = {}
    for file in files:
        number = re.fullmatch(r"checkpoint-(\d+)", file.parent.name)
        if number:
            key = file.parent.parent
            if key / file.name in files:
                continue  # the run's own is there
            if key not in last or last[key][0] < int(number[1]):
                last[key] = int(number[1]), file
    return [f for f in files if not re.fullmatch(r"checkpoint-\d+", f.parent.name)] + [f for _, f in last.values()]


def _name(path: Path) -> str:
    """A file's own name, or its folder's where all are called alike."""
    return path.parent.name if path.name in ("metrics.jsonl", "trainer_state.json", "trainer_log.jsonl") else path.stem


class _Columns(NamedTuple):
    step: str
    loss: dict[str, str] | str  # of each run, by its name
    lr: str | None


def _columns(path: Path, names: dict, step: str, loss: str, lr: str) -> _Columns:
    lower = {name.lower(): name for name in reversed(names)}

    def find(given: str, known: tuple[str, ...], ends: tuple[str, ...] = ()) -> str | None:
        if given:
            return given if given in names else None
        usual = (lower[name] for name in known if name in lower)
        return next(usual, next((name for name in names if name.lower().endswith(ends)), None) if ends else None)

    steps = find(step, STEP_NAMES, (" - _step",))
    if "Wall time" in names and not loss:
        losses = {"": "Value"} if "Value" in names else {}
    else:
        preferred = ("nll", *LOSS_NAMES) if path.name == "metrics.jsonl" else LOSS_NAMES
        one = find(loss, preferred)
        losses = {"": one} if one else _run_columns(names, loss) or {}
        if not losses and (one := find("", (), ("crossentropyloss", "/loss"))):
            losses = {"": one}
    if steps is None or not losses:
        expected = f"{step or 'step'} and {loss or 'a loss (' + ', '.join(LOSS_NAMES[:6]) + ', ...)'}"
        shown = ", ".join(list(names)[:12]) + (", ..." if len(names) > 12 else "")
        raise ValueError(f"{path}: columns {shown or 'none'}; expected {expected}, or name them: --step --loss --lr")
    rates = find(lr, LR_NAMES)
    if rates is None and not lr:
        rates = next((n for n in names if n.lower().startswith("lr-") or n.endswith(" - train/learning_rate")), None)
    if lr and rates is None:
        raise ValueError(f"{path}: no column {lr!r} for the learning rate")
    return _Columns(steps, losses, rates)


def _run_columns(names: dict, loss: str) -> dict[str, str]:
    """wandb's columns `RUN - train/loss`, without their __MIN and __MAX."""
    wanted = {loss} if loss else {"train/loss", "loss", "train_loss"}
    split = {name: name.rpartition(" - ") for name in names if not name.endswith(("__MIN", "__MAX"))}
    return {run: name for name, (run, dash, metric) in split.items() if dash and metric in wanted}


def _rows(path: Path) -> Iterator[tuple[int, dict]]:
    if path.is_dir():
        raise ValueError(f"{path} is a folder, expected a log")
    if "tfevents" in path.name:
        yield from _events(path)
    elif path.suffix == ".db":
        yield from _trackio(path)
    elif path.suffix == ".log":
        yield from _llm_c(path)
    elif path.suffix == ".json":
        yield 1, read_json(path, dict, nan=True)
    elif path.suffix == ".csv":
        yield from read_csv(path)
    else:
        kind = None
        for number, row in read_rows(path, nan=True):
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: {str(row)[:40]!r} is not an object, expected one a line")
            if "kind" in row:  # of our own logs: rows of training alone
                kind = kind or ("train" if path.name == "metrics.jsonl" else row["kind"])
                if row["kind"] != kind:
                    continue
            yield number, row


def _trainer_state(path: Path, state: dict) -> tuple[list, dict]:
    history = state["log_history"]
    if not isinstance(history, list) or not all(isinstance(row, dict) for row in history):
        raise ValueError(f"{path}: log_history is not a list of objects, expected transformers' trainer_state.json")
    epochs, known = state.get("num_train_epochs"), _total(state.get("max_steps"))
    if known and isinstance(epochs, int | float) and epochs > 1:
        known["epoch"] = known["total"] / epochs
    return list(enumerate(history, 1)), known


def began_trained(config: dict) -> bool | None:
    """Whether a run of ours with these flags began from trained weights; None where they are no run's of ours."""
    if "init_from" in config:  # train_lm.py
        return bool(config["init_from"])
    if "random_start" in config:  # finetune_seq2seq.py
        return not config["random_start"]
    return True if "adapter" in config else None  # finetune_gsm8k.py


def _total(steps) -> dict[str, float]:
    return {"total": float(steps)} if isinstance(steps, int | float) and steps > 0 else {}


def _llm_c(path: Path) -> Iterator[tuple[int, dict]]:
    for number, line in enumerate(read_lines(path), 1):
        if line.strip():
            pairs = [part.split(":") for part in line.split()]
            if not all(len(pair) == 2 for pair in pairs) or pairs[0][0] != "s":
                raise ValueError(f"{path}, line {number}: {line[:40]!r}, expected llm.c's s:STEP trl:LOSS lr:RATE ...")
            yield number, dict(pairs)


def _trackio(path: Path) -> Iterator[tuple[int, dict]]:
    try:
        with sqlite3.connect(f"file:{path.resolve()}?mode=ro", uri=True) as base:
            rows = base.execute("SELECT id, run_name, step, metrics FROM metrics ORDER BY id").fetchall()
    except (sqlite3.Error, UnicodeDecodeError) as error:  # the latter in a message that quotes damaged bytes
        raise ValueError(f"{path}: not a project of trackio ({one_line(error)})") from None
    for number, run, step, metrics in rows:
        try:
            values = dict(parse_json(metrics, path, nan=True))
        except (TypeError, ValueError):
            raise ValueError(f"{path}, row {number}: its metrics are not a JSON object") from None
        yield number, {"run_name": run, "step": step, **values}


def _events(path: Path) -> Iterator[tuple[int, dict]]:
    """A row for each event with scalars. An event that is cut by the file's end is of a run that goes on, or was
    killed; other bytes that cannot be read are refused, where TensorBoard takes them for the end."""
    loader = package("tensorboard.backend.event_processing.event_file_loader", f"{path}", otherwise="export CSV")
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
    from tensorboard.util.tensor_util import make_ndarray

    number = at = 0
    for number, record in enumerate(loader.RawEventFileLoader(str(path)).Load(), 1):
        at += len(record) + EVENT_FRAME
        try:
            event = Event.FromString(record)
            row = {v.tag: v.simple_value for v in event.summary.value if v.HasField("simple_value")}
            tensors = {v.tag: make_ndarray(v.tensor) for v in event.summary.value if v.HasField("tensor")}
        except (DecodeError, TypeError, ValueError) as error:
            raise ValueError(f"{path}, event {number} is none of TensorBoard's ({str(error)[:80]})") from None
        # How newer writers keep scalars; texts and histograms are tensors, too.
        row |= {tag: float(t.item()) for tag, t in tensors.items() if t.size == 1 and t.dtype.kind in "fiu"}
        if row:
            yield number, {"step": event.step} | row
    left = read_bytes(path)[at:]
    length, checksum = left[:8], left[8:12]
    sound = checksum == masked_crc32c(length).to_bytes(4, "little")
    cut = sound and int.from_bytes(length, "little") + EVENT_FRAME > len(left)
    if len(left) >= 12 and not cut:
        raise ValueError(f"{path}: event {number + 1}, at byte {at}, is damaged; export CSV from a copy that is whole")


def _curve(path: Path, name: str, family: str, rows: list, columns: _Columns, known: dict) -> Curve:
    """The points of one run: rows with a step and a loss, of which later ones replace earlier ones at their step on."""
    points, rates, epochs = [], [], []
    counts = dict.fromkeys(("without a step", "doubled", "repeated after a restart", "not finite"), 0)
    restarts, first, total = 0, math.nan, known.get("total")
    for number, row in rows:
        where = f"{path}, line {number}"
        step, loss, lr = (_number(where, column, row) for column in (columns.step, columns.loss, columns.lr))
        if step is None:
            counts["without a step"] += loss is not None
            continue
        if not math.isfinite(step):
            raise ValueError(f"{where}: step {step}, expected a finite number")
        if lr is not None:
            if not 0 <= lr < math.inf:
                raise ValueError(f"{where}: learning rate {lr}, expected a finite number, 0 or more")
            rates.append((step, lr))
        if total is None:
            total = next((float(row[key]) for key in TOTAL_NAMES if isinstance(row.get(key), int)), None)
        if loss is None:
            continue
        first = step if not points else first
        if points and step < points[-1][0]:
            restarts += 1
            if step <= first and len(points) > 1:
                raise ValueError(
                    f"{where}: step {step:g} after step {points[-1][0]:g}, back at the beginning: several runs in one "
                    "file; split it, or add a column run"
                )
            before = len(points)
            while points and points[-1][0] >= step:
                points.pop()
            counts["repeated after a restart"] += before - len(points)
        elif points and step == points[-1][0]:
            counts["doubled"] += 1
            points.pop()
        counts["not finite"] += not math.isfinite(loss)
        points.append((step, loss))
        epoch = _number(where, next((n for n in ("epoch", "train/epoch") if n in row), None), row)
        if epoch is not None and 0 < epoch < math.inf and epoch % 1:
            epochs.append(step / epoch)
    if restarts > max(3, RESTARTS * len(rows)):
        raise ValueError(f"{path}: the step goes back {restarts} times: several runs in one file; add a column run")
    if len(points) < 2:
        raise ValueError(f"{path}: {len(points)} points of {columns.loss}, expected at least 2")
    steps, losses = np.array(points).T
    lr = None
    if rates:
        at = dict(rates)  # the later one counts
        lr = np.interp(steps, sorted(at), [at[step] for step in sorted(at)])
    notes = tuple(f"{count} {what}" for what, count in counts.items() if count)
    epoch = float(np.median(epochs)) if len(epochs) > 1 else known.get("epoch")
    return Curve(name, family, steps, losses, lr, epoch, total, notes, known.get("finetune"))


def _number(where: str, name: str | None, row: dict) -> float | None:
    """The number in a cell; None for a blank or missing one."""
    value = None if name is None else row.get(name)
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        if isinstance(value, bool):
            raise ValueError
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{where}: {name} is {str(value)[:40]!r}, expected a number") from None
