"""The rows that a bench measures: printed and written to a CSV as they come, read again, drawn."""

import csv
import io
import json
import os
import platform
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib import metadata
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import torch

from .limits import Limits

# How a table shows figures: key of the row -> (heading, factor, format). Other keys are shown as they are.
COLUMNS = {
    "forward_ms": ("forward ms", 1, ".3f"),
    "step_ms": ("step ms", 1, ".3f"),
    "eager_step_ms": ("eager ms", 1, ".3f"),
    "ratio_to_literal": ("x literal", 1, ".3f"),
    "ratio_to_torch_ce": ("x torch CE", 1, ".3f"),
    "ratio_to_brier": ("x Brier", 1, ".3f"),
    "ratio_to_products": ("x products", 1, ".3f"),
    "ratio_to_loss_alone": ("x loss alone", 1, ".3f"),
    "share_of_copy": ("of copy", 1, ".0%"),
    "tokens_per_s": ("tokens/s", 1, ".0f"),
    "peak_logits": ("peak, logits", 1, ".2f"),
    "peak_bytes": ("peak MB", 1e-6, ".0f"),
    "beside_bytes": ("beside MB", 1e-6, ".0f"),
    "gradient_error": ("error", 1, ".1e"),
    "weight_error": ("of d_weight", 1, ".2e"),
    "flops": ("GFLOP", 1e-9, ".1f"),
    "joules": ("joules a step", 1, ".3f"),
}
NAME_WIDTH, CELL_WIDTH = 31, 9


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    with suppress(OSError, StopIteration), open("/proc/cpuinfo") as file:
        return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    return platform.processor() or platform.machine()


def where_and_when(device: str) -> dict:
    """Device, threads, versions and date: the last columns of every row."""
    about = dict(device=device_name(device), threads=torch.get_num_threads(), torch=torch.__version__, triton=None)
    with suppress(PackageNotFoundError):
        about["triton"] = metadata.version("triton")
    return about | dict(date=datetime.now(UTC).isoformat(timespec="seconds"))


def reason(error: Exception) -> str:
    """An error in one line, for a row."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


class Rows(list):
    """The rows of a run on ``device``, within its ``limits``. ``file``, a CSV, and ``json_file`` are whole after every
    row, so that a run may be cut off. ``failed``: whether a part did that must not."""

    def __init__(
        self, device: str, file: str | None = None, json_file: str | None = None, limits: Limits | None = None
    ):
        super().__init__()
        self.file, self.json_file, self.about = file, json_file, where_and_when(device)
        self.limits, self.failed, self.name = limits or Limits(), False, "provider"

    def admit(self, names: Iterable[str], where: str = "", beside: int = 0) -> list[str]:
        """Those of ``names`` that may be measured, a row each, beside so many others that have none yet."""
        names = list(names)
        return names[: len(self.limits.admit([f"{name}{where}" for name in names], len(self) + beside))]

    @contextmanager
    def part(self, name: str, **more) -> Iterator[None]:
        """The body is a part of the run: where it fails there is a row that says why, and the next part begins."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.failed = True
            self.add({self.name: name, **more, "missing": f"failed: {reason(error)}"})
        torch.cuda.empty_cache()

    def begin(self, title: str, name: str, *columns: str) -> None:
        """Starts a table: its lines begin with a row's ``name`` and show ``columns``, keys of the row."""
        self.name, self.columns = name, {key: COLUMNS.get(key, (key, 1, "")) for key in columns}
        print(title)
        self._print(name, [heading for heading, *_ in self.columns.values()])

    def add(self, row: dict, note: str = "") -> None:
        """A row for the file, and a line for the table: its figures, or why they are ``missing``, then ``note``."""
        self.append(row | self.about)
        if self.file:
            write_csv(self, self.file)
        if self.json_file:
            replace(self.json_file, json.dumps(self, indent=1) + "\n")
        if "missing" in row:
            print(f"{row[self.name]:{NAME_WIDTH}} {row['missing']}")
            return
        shown = [(row[key], factor, spec) for key, (_, factor, spec) in self.columns.items()]
        self._print(row[self.name], ["" if x is None else format(x * factor, spec) for x, factor, spec in shown], note)

    def _print(self, name: str, cells: list[str], note: str = "") -> None:
        widths = [max(CELL_WIDTH, len(heading)) for heading, *_ in self.columns.values()]
        line = " ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        print(f"{name:{NAME_WIDTH}} {line}{note}", flush=True)


def write_csv(rows: Iterable[dict], file: str) -> None:
    """All rows, with every column that one of them has; the file is replaced whole."""
    columns, text = list(dict.fromkeys(key for row in rows for key in row)), io.StringIO(newline="")
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    replace(file, text.getvalue())


def replace(file: str, text: str) -> None:
    """The file is what it was or the whole ``text``, whenever this is cut off."""
    Path(f"{file}.tmp").write_text(text, newline="")
    os.replace(f"{file}.tmp", file)


def read_csv(file: str) -> list[dict]:
    """What ``write_csv`` wrote, numbers as numbers and empty cells as None. Raises ValueError for another file."""

    def value(text: str | None):
        for read in (int, float):
            with suppress(ValueError):
                return read(text) if text else None
        return text

    with open(file, newline="") as opened:
        rows = [{key: value(text) for key, text in row.items()} for row in csv.DictReader(opened)]
    if not rows or not {"provider", "v", "dtype"} <= set(rows[0]):
        raise ValueError(f"{file} has no rows of kernels.bench; expected columns provider, v, d, dtype, step_ms")
    return rows


OURS, OTHERS = "#1f77b4", "#bbbbbb"  # colours of bars


def milliseconds(value: float) -> str:
    """A time in words: three digits at the least, none of them an exponent."""
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"


def write_plot(rows: list[dict], file: str) -> None:
    """Step times of the providers, one panel a shape."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    rows = [r for r in rows if r.get("step_ms")]
    panels = {}
    for r in reversed(rows):
        panels.setdefault((r["n"], r["v"], r["d"]), []).append(r)
    figure = Figure(figsize=(6.5 * len(panels), 4.2), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, ((n, v, d), shown) in zip(reversed(axes), panels.items(), strict=True):
        names = [r["provider"] for r in shown]
        colors = [OURS if "ours" in name or "linear_score" in name else OTHERS for name in names]
        bars = axis.barh(names, [r["step_ms"] for r in shown], color=colors)
        axis.bar_label(bars, [f" {milliseconds(r['step_ms'])}" for r in shown], fontsize=8)
        axis.margins(x=0.18)
        axis.set_xlabel("forward and backward, ms")
        axis.set_title(f"N = {n}, V = {v}, {f'D = {d}' if d else 'logits'}, {shown[0]['dtype']}", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(
        handles=[Patch(color=OURS, label="ours"), Patch(color=OTHERS, label="others")],
        loc="outside lower center",
        ncols=2,
        fontsize=8,
    )
    figure.suptitle(f"{rows[0]['device']}, torch {rows[0]['torch']}, {rows[0]['date'][:10]}", fontsize=9)
    figure.savefig(file, dpi=150)
