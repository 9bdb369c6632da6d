"""What the data modules read and write. Every error is a ValueError of one line that names the file or the set."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from model.weights import first_line
from runtime.folder import parse_json, write_bytes


def lm_data(name: str) -> Path | None:
    """The folder ``name`` in $LM_DATA, None where that is no folder."""
    root = os.environ.get("LM_DATA")
    return Path(root) / name if root and (Path(root) / name).is_dir() else None


def load_hub(name: str, way_out: str, *arguments, **options):
    """datasets.load_dataset. ``name`` and ``way_out`` are the error's."""
    try:
        import datasets

        return datasets.load_dataset(*arguments, **options)
    except Exception as error:  # no network, no package, hub errors of several libraries
        why = f"cannot be loaded from the hub ({type(error).__name__}: {first_line(error)[:120]})"
        network = "either give this machine a network (and pip install datasets)"
        raise ValueError(f"{name} {why}; {network}, or {way_out}") from error


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {path} ({error.strerror})") from None


def read_text(path: Path) -> str:
    """The whole text, its line ends as they are."""
    try:
        return read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}); convert it or take it away") from None


def read_lines(path: Path) -> Iterator[str]:
    """The lines, each with its end as it is; at "\\n" alone, as text may hold others such as U+2028."""
    number = 0
    try:
        with open(path, "rb") as file:
            for line in file:
                number += 1
                yield line.decode()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text (line {number}); convert it or take it away") from None
    except OSError as error:
        raise ValueError(f"cannot read {path} ({error.strerror})") from None


def read_rows(path: Path, *, skip_blank: bool = True) -> Iterator[tuple[int, object]]:
    """(line from 1, value) of a file with one JSON value a line."""
    for number, line in enumerate(read_lines(path), 1):
        if line.strip() or not skip_blank:
            yield number, parse_json(line, f"{path} line {number}")


def write_cached(path: Path, writer: Callable) -> None:
    """``writer(file)`` fills ``path``, whose folder is made. A reader sees all of the file or none of it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, writer)
    except OSError as error:
        raise ValueError(f"cannot write {path} ({error.strerror}); name another cache folder") from None
