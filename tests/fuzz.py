"""Text as models write it when they go wrong: pieces of a parser's own language, in any order, some without end.

And files as others leave them: a good one in which values, names and bytes were exchanged.

SCORECAST_FUZZ=100000 is the long form: that many inputs a parser, at random, and a tenth of it files a reader. Without
it the same 150 and 25 each time.
"""

import copy
import gc
import json
import os
import time

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

LONGEST = 6000  # characters
MOST = 0.05  # seconds of this thread an input may take, whatever the machine does besides
INPUTS = int(os.environ.get("SCORECAST_FUZZ", 0))

HOW = dict(derandomize=not INPUTS, database=None, deadline=None, suppress_health_check=list(HealthCheck))
fuzzed = settings(max_examples=INPUTS or 150, **HOW)
fuzzed_files = settings(max_examples=INPUTS // 10 or 25, **HOW)
# Values that stand where another was meant, and bytes that do.
ODD = [
    None,
    True,
    False,
    0,
    -1,
    1,
    3,
    0.5,
    -0.5,
    1e308,
    10**30,
    10**400,
    "",
    "x",
    "nan",
    "1",
    "a.b",
    "\0",
    "\u2028",
    "x" * 9999,
]
ODD += [[], [1], [None], ["x"], [[]], [{}], {}, {"x": 1}, {"x": None}, {"default": "x"}, float("nan"), float("inf")]
BYTES = [
    b"\0",
    b"\xff",
    b"\n",
    b"\r\n",
    b'"',
    b"{",
    b"}",
    b"[",
    b",",
    b":",
    b" ",
    b"0",
    b"9" * 5000,
    b"[" * 3000,
    b"1e999",
]
BYTES += [b"\xef\xbb\xbf", b"NaN", b"null", b"\\ud83d", b"\xff" * 8, b"\0" * 8, b"\x7f", b"\x80", b"true"]


def texts(pieces: str) -> st.SearchStrategy[str]:
    """Texts of the blank-separated ``pieces``, blanks, newlines and other characters, each 1 to thousands of times."""
    piece = st.sampled_from([*pieces.split(), " ", "\n", "\t"]) | st.text(max_size=3)
    often = st.integers(1, 3) | st.sampled_from([25, 300, 3000])
    return st.lists(st.tuples(piece, often), max_size=12).map(lambda parts: "".join(p * n for p, n in parts)[:LONGEST])


def places(value) -> list[tuple]:
    """(container, key) of all that is in a value of JSON."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, part in parts for place in [(value, key), *places(part)]]


@st.composite
def harmed(draw, value):
    """``value``, of dicts and lists, in which one to three parts are odd, gone, or where another one was."""
    value = copy.deepcopy(value)
    for where, what in draw(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)), min_size=1, max_size=3)):
        if not (known := places(value)):
            break
        container, key = known[where % len(known)]
        if what % 5 == 0:
            del container[key]
        elif what % 5 == 1:
            other, name = known[what // 5 % len(known)]
            container[key] = copy.deepcopy(other[name])
        else:
            container[key] = copy.deepcopy(ODD[what % len(ODD)])
    return value


@st.composite
def damaged(draw, raw: bytes):
    """``raw`` with one to four bytes exchanged, put in or cut out, a stretch doubled, or its end gone."""
    edit = st.tuples(st.integers(0, 10**6), st.integers(0, 4), st.integers(0, 10**6))
    for where, how, what in draw(st.lists(edit, min_size=1, max_size=4)):
        at, piece = where % (len(raw) + 1), BYTES[what % len(BYTES)]
        length = 1 + what % 40
        middle = [
            raw[at : at + 1] and bytes([what % 256]),
            piece + raw[at : at + 1],
            b"",
            2 * raw[at : at + length],
            b"",
        ]
        rest = [raw[at + 1 :], raw[at + 1 :], raw[at + length :], raw[at + length :], b""]
        raw = raw[:at] + middle[how] + rest[how]
    return raw


def files_like(value) -> st.SearchStrategy[bytes]:
    """Files like the one that holds ``value``: bytes, a text, JSON, or, for a tuple, a row of JSON for each part."""
    if isinstance(value, bytes | str):
        return damaged(value if isinstance(value, bytes) else value.encode())
    if isinstance(value, tuple):
        rows = harmed(list(value)).map(lambda rows: "".join(json.dumps(row) + "\n" for row in rows).encode())
        return rows | damaged("".join(json.dumps(row) + "\n" for row in value).encode())
    return harmed(value).map(lambda v: json.dumps(v).encode()) | damaged(json.dumps(value).encode())


def refusal(read) -> str:
    """What a reader says of what it does not read, "" where it does: one line, and not one of Python's own."""
    try:
        read()
    except ValueError as error:
        assert not isinstance(error, UnicodeError | json.JSONDecodeError), repr(error)
        assert str(error) and "\n" not in str(error), repr(error)
        return str(error)
    return ""


def timely(parser, *inputs):
    """What the parser makes of the inputs, which it must do in time, at the best of eight tries, and without an error:
    the clock runs on while other programs hold the processor or its caches. Garbage is that of the whole test."""
    gc.disable()
    try:
        for tried in range(8):
            time.sleep(0.1 * tried)
            started = time.thread_time()
            found = parser(*inputs)
            if time.thread_time() - started < MOST:
                return found
    finally:
        gc.enable()
    raise AssertionError(f"{parser.__name__} took more than {1000 * MOST:.0f} ms eight times")
