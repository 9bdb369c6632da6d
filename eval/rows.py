"""Rows of JSON, a line each. Generated texts are appended as they are made, so that a kill loses little."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

from runtime.folder import write_bytes
from runtime.machine import World
from schedules.textlines import fault, read_json, read_rows


def json_line(row: dict) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    """Writes a file of rows, atomically."""
    write_bytes(path, lambda file: file.write("".join(map(json_line, rows)).encode()))


def rows_with_places(path: Path) -> Iterator[tuple[str, object]]:
    """(where it stands, row) of a list in a .json file, else of a JSONL file."""
    if path.suffix == ".json":
        yield from ((f"{path}, entry {i}", row) for i, row in enumerate(read_json(path, list, nan=True), 1))
    else:
        yield from ((f"{path}, line {number}", row) for number, row in read_rows(path, nan=True))


def whole_rows(path: Path) -> list[dict]:
    """The rows of a file, without the line that a kill left half-written at its end. None where there is no file."""
    rows = []
    for number, row in read_rows(path, half=[], nan=True) if path.exists() else ():
        if not isinstance(row, dict):
            raise fault(path, number, "no row of ours", "remove the file, it is made again")
        rows.append(row)
    return rows


class Parts:
    """Files of rows that the ranks make together, each appending to its own. Every rank must make each call.

    ``pattern`` names the files, with * for the rank."""

    def __init__(self, folder: Path, pattern: str, world: World):
        self.folder, self.pattern, self.world = folder, pattern, world

    def read(self) -> list[dict]:
        """The rows of all ranks: all have written before one reads, and all have read before one goes on."""
        self.world.wait()
        rows = [row for path in sorted(self.folder.glob(self.pattern)) for row in whole_rows(path)]
        self.world.wait()
        return rows

    def append(self) -> TextIO:
        """This rank's file, open for more rows."""
        mine = self.folder / self.pattern.replace("*", str(self.world.rank))
        write_rows(mine, whole_rows(mine))
        return open(mine, "a", buffering=1, encoding="utf-8")

    def remove(self) -> None:
        """Takes the files away, on rank 0."""
        for path in self.folder.glob(self.pattern) if self.world.main else ():
            path.unlink()
