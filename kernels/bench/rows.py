"""The rows that a bench measures: printed and written to a CSV as they come, read again, drawn."""

import csv
import os
import platform
from collections.abc import Iterable
from datetime import UTC, datetime

import torch

NAME_WIDTH, CELL_WIDTH = 29, 9


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def where_and_when(device: str) -> dict:
    """Device, threads, versions and date: the last columns of every row."""
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = None
    date = datetime.now(UTC).isoformat(timespec="seconds")
    machine = dict(device=device_name(device), threads=torch.get_num_threads())
    return machine | dict(torch=torch.__version__, triton=version, date=date)


class Rows(list):
    """The rows of a run on ``device``. ``file``: a CSV that is written anew after every row, so that a run that is cut
    off keeps what it has."""

    def __init__(self, device: str, file: str | None = None):
        super().__init__()
        self.file, self.about = file, where_and_when(device)

    def begin(self, title: str, *columns: tuple[str, str, float, str]) -> None:
        """Starts a table. A column is (heading, key of the row, factor, format); the first is its name, as it is."""
        self.columns = columns
        print(title)
        self._print([heading for heading, *_ in columns])

    def add(self, row: dict, note: str = "") -> None:
        """A row for the file and a line for the table; ``note`` ends the line. With ``missing``, the reason why there
        are no figures, the line is the reason."""
        self.append(row | self.about)
        if self.file:
            write_csv(self, self.file)
        (_, name, *_), *rest = self.columns
        if "missing" in row:
            print(f"{row[name]:{NAME_WIDTH}} {row['missing']}")
            return
        shown = ["" if row[key] is None else format(row[key] * factor, spec) for _, key, factor, spec in rest]
        self._print([row[name], *shown], note)

    def _print(self, cells: list[str], note: str = "") -> None:
        widths = [max(CELL_WIDTH, len(heading)) for heading, *_ in self.columns[1:]]
        line = " ".join(f"{cell:>{width}}" for cell, width in zip(cells[1:], widths, strict=True))
        print(f"{cells[0]:{NAME_WIDTH}} {line}{note}", flush=True)


def write_csv(rows: Iterable[dict], file: str) -> None:
    """All rows, with every column that one of them has; the file is replaced whole."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with open(f"{file}.tmp", "w", newline="") as opened:
        writer = csv.DictWriter(opened, columns)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(f"{file}.tmp", file)


def read_csv(file: str) -> list[dict]:
    """What ``write_csv`` wrote, numbers as numbers and empty cells as None. Raises ValueError for another file."""

    def value(text: str | None):
        for read in (int, float):
            try:
                return read(text) if text else None
            except ValueError:
                pass
        return text

    with open(file, newline="") as opened:
        rows = [{key: value(text) for key, text in row.items()} for row in csv.DictReader(opened)]
    if not rows or not {"provider", "v", "dtype"} <= set(rows[0]):
        raise ValueError(f"{file} has no rows of kernels.bench; expected columns provider, v, d, dtype, step_ms")
    return rows


def write_plot(rows: list[dict], file: str) -> None:
    """Step times of the providers, one panel a shape."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [r for r in rows if r.get("step_ms")]
    shapes = list(dict.fromkeys((r["n"], r["v"], r["d"]) for r in rows))
    figure, axes = plt.subplots(1, len(shapes), figsize=(6.5 * len(shapes), 4.2), squeeze=False, layout="constrained")
    for axis, (n, v, d) in zip(axes[0], shapes, strict=True):
        shown = [r for r in rows if (r["n"], r["v"], r["d"]) == (n, v, d)][::-1]
        ours = ["ours" in r["provider"] or "linear_score" in r["provider"] for r in shown]
        bars = axis.barh(
            [r["provider"] for r in shown],
            [r["step_ms"] for r in shown],
            color=["#1f77b4" if x else "#bbbbbb" for x in ours],
        )
        axis.bar_label(bars, fmt=" {:.3g} ms", fontsize=8)
        axis.margins(x=0.18)
        axis.set_xlabel("forward and backward, ms")
        head = f"D = {d}" if d else "logits"
        axis.set_title(f"N = {n}, V = {v}, {head}, {shown[0]['dtype']}", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{rows[0]['device']}, torch {rows[0]['torch']}, {rows[0]['date'][:10]}", fontsize=9)
    figure.savefig(file, dpi=150)
