"""The one reader of text files: lines, JSON, CSV and TOML, which others wrote.

It stands in schedules/ because that is taken along alone, imports nothing else of ours, and reads logs; runtime/,
model/, data/ and eval/ read by it too. It takes the standard library alone.

One rule for all files:

- A file is UTF-8, with a byte order mark or without; one whose name ends in .gz is unpacked first.
- A line ends with "\\n" or "\\r\\n", and with nothing else: U+2028 and its like are characters.
- Blank lines are nothing to rows of JSON and CSV. They count as lines.
- JSON is JSON: NaN, Infinity, and numbers too large for a float, are errors unless ``nan`` allows them. Integers of
  more than 308 digits always are, and half a surrogate pair, such as "\\ud83d" alone: it is valid JSON and no text,
  and cannot be encoded.
- NUL is a character of a text, and of a JSON string as "\\u0000"; in rows of CSV and in JSON as a byte it is an error.
- What a kill left at the end of a file is an error, unless the caller gives a list ``half``, which gets its line.

Every fault is a ValueError of one line: ``FILE, line N: what is wrong; what to do``.
"""

import csv
import gzip
import json
import os
import re
import tomllib
import zlib
from collections.abc import Callable, Iterable, Iterator
from math import isinf

BOM = b"\xef\xbb\xbf"
CONVERT, MEND = "convert it to UTF-8, or take it away", "mend the line, or take it away"
_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # may begin or be half a pair
_HUGE = re.compile(r"[eE]\+?[0-9]{3}|[0-9]{200}")  # may be beyond the largest float; only then each one is looked at
_LONG = re.compile(r"[0-9]{309}")  # may be an integer beyond the largest float
_PATH = str | os.PathLike


def fault(where: _PATH, line: int | None, what: str, advice: str = MEND) -> ValueError:
    """The error of a file's ``line``; None where ``where`` says the place already."""
    return ValueError(f"{where}{'' if line is None else f', line {line}'}: {what}; {advice}")


def one_line(error: Exception) -> str:
    """What a library says, which may quote line ends of the file that it read."""
    return " ".join(str(error).split())


def shown(names: Iterable[str]) -> str:
    """Names that somebody else has given, for a message of one line: those with line ends or the like as Python writes
    them."""
    return ", ".join(name if name.isprintable() else repr(name) for name in names)


def read_bytes(path: _PATH) -> bytes:
    """The content, unpacked where the name ends in .gz. Raises ValueError for what cannot be read."""
    return b"".join(_raw(path, lambda file: iter(lambda: file.read(1 << 24), b"")))


def read_text(path: _PATH) -> str:
    """The whole text without its byte order mark, the line ends as they are."""
    return decoded(read_bytes(path), path)


def decoded(raw: bytes, where: _PATH, line: int | None = 1) -> str:
    """UTF-8 ``raw`` as text, without a file's byte order mark. ``line``: that of its first byte, None where ``where``
    says the place already."""
    try:
        return (raw if line and line > 1 else raw.removeprefix(BOM)).decode()
    except UnicodeDecodeError as error:
        what = "UTF-16" if raw.startswith((b"\xff\xfe", b"\xfe\xff")) else f"the byte 0x{error.object[error.start]:02x}"
        line = line and line + error.object.count(b"\n", 0, error.start)
        raise fault(where, line, f"not UTF-8 text ({what})", CONVERT) from None


def read_lines(path: _PATH, *, ends: bool = False) -> Iterator[str]:
    """The lines, blank ones too, without their ends or, with ``ends``, as they are."""
    for number, raw in _numbered(path):
        line = decoded(raw, path, number)
        yield line if ends else line[:-2] if line.endswith("\r\n") else line.removesuffix("\n")


def parse_json(text: str | bytes, where: _PATH, line: int | None = 1, *, nan: bool = False, advice: str = MEND):
    """The value of ``text``, which begins in ``line`` of the file (or whatever it is) called ``where``."""
    text = decoded(text.removeprefix(BOM), where, line) if isinstance(text, bytes) else text

    def constant(name: str) -> float:
        if not nan:
            raise fault(where, line, f"{name[:40]} is no number of JSON", advice)
        return float(name)

    def number(digits: str) -> float:
        return constant(digits) if isinf(value := float(digits)) else value

    def integer(digits: str) -> int:
        if len(digits) > 308:
            raise fault(where, line, "an integer of too many digits", advice)
        return int(digits)

    try:
        more = {"parse_int": integer} if _LONG.search(text) else {}
        more |= {"parse_float": number} if _HUGE.search(text) else {}
        value = json.loads(text, parse_constant=constant, **more)
        if _HALF.search(text):
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except json.JSONDecodeError as error:
        line = line and line + error.lineno - 1
        raise fault(where, line, f"not JSON ({error.msg}, column {error.colno})", advice) from None
    except RecursionError:
        raise fault(where, line, "JSON that is nested too deeply", advice) from None
    except UnicodeEncodeError:
        raise fault(where, line, "half a surrogate pair, which is valid JSON and no text", advice) from None


def read_json(path: _PATH, kind: type | None = None, *, nan: bool = False, advice: str = "mend or replace the file"):
    """The value of a whole JSON file, which must be of ``kind``, dict for one, where that is given."""
    value = parse_json(read_bytes(path), path, nan=nan, advice=advice)
    if kind and not isinstance(value, kind):
        found, expected = (_KINDS.get(t, t.__name__) for t in (type(value), kind))
        raise ValueError(f"{path}: holds {found}, expected {expected}; {advice}")
    return value


_KINDS = {dict: "an object", list: "a list", str: "a text", int: "a number", float: "a number", bool: "true or false"}
_KINDS |= {type(None): "null"}


def read_rows(
    path: _PATH, *, half: list[int] | None = None, nan: bool = False, advice: str = MEND
) -> Iterator[tuple[int, object]]:
    """(line from 1, value) of a file with one JSON value a line. ``half`` gets the number of a last line that has no
    end and is not whole; without it that is an error as elsewhere."""
    for number, raw in _numbered(path):
        if raw.removeprefix(BOM).strip():
            try:
                value = parse_json(raw.rstrip(b"\r\n"), path, number, nan=nan, advice=advice)
            except ValueError:
                if half is None or raw.endswith(b"\n"):
                    raise
                half.append(number)
                return
            yield number, value


def read_csv(path: _PATH, *, half: list[int] | None = None) -> Iterator[tuple[int, dict[str, str]]]:
    """(line from 1, {column: cell}) of each row under the header; of a row of several lines it is the last.

    The columns of a .tsv, or .tsv.gz, end with a tab. Raises ValueError for rows that are longer or shorter than the
    header and for a column named twice. ``half`` gets the number of a last row without its end that is too short."""
    csv.field_size_limit(2**31 - 1)
    last = [""]
    tabs = os.fspath(path).lower().removesuffix(".gz").endswith(".tsv")

    def lines() -> Iterator[str]:
        for number, line in enumerate(read_lines(path, ends=True), 1):
            if "\0" in line:
                raise fault(path, number, "a NUL byte")
            last[0] = line
            yield line

    reader, header = csv.reader(lines(), strict=True, delimiter="\t" if tabs else ","), None
    try:
        for cells in reader:
            if not "".join(cells).strip() and len(cells) < 2:
                continue
            if header is None:
                header = [name.strip() for name in cells]
                if twice := next((name for i, name in enumerate(header) if name and name in header[:i]), None):
                    raise fault(path, reader.line_num, f"two columns are called {twice!r}", "rename one")
            elif len(cells) == len(header):
                yield reader.line_num, dict(zip(header, cells, strict=True))
            elif half is not None and len(cells) < len(header) and not last[0].endswith("\n"):
                half.append(reader.line_num)
            else:
                raise fault(path, reader.line_num, f"{len(cells)} values, expected the {len(header)} of the header")
    except csv.Error as error:
        if half is None or last[0].endswith("\n"):
            raise fault(path, reader.line_num, f"not CSV ({error})") from None
        half.append(reader.line_num)


def read_toml(path: _PATH) -> dict:
    """The table of a TOML file."""
    try:
        return tomllib.loads(read_text(path))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: not TOML ({error}); mend the file") from None
    except RecursionError:
        raise ValueError(f"{path}: TOML that is nested too deeply; mend the file") from None


def _numbered(path: _PATH) -> Iterator[tuple[int, bytes]]:
    return enumerate(_raw(path, iter), 1)


def _raw(path: _PATH, parts: Callable) -> Iterator[bytes]:
    """``parts`` of the open file."""
    try:
        with (gzip.open if os.fspath(path).lower().endswith(".gz") else open)(path, "rb") as file:
            yield from parts(file)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"cannot read {path} ({getattr(error, 'strerror', None) or error})") from None
