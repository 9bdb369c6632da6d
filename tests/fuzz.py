"""Text as models write it when they go wrong: pieces of a parser's own language, in any order, some without end.

And files as others leave them: a good one in which values, names and bytes were exchanged.

SCORECAST_FUZZ=100000 is the long form: that many inputs a parser, a reader and a command, at random by their numbers.
Without it the same 150 texts, and 25 files and lines of words, each time.
"""

import copy
import gc
import json
import os
import random
import time
from functools import partial

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

LONGEST = 6000  # characters
MOST = 0.05  # seconds of this thread an input may take, whatever the machine does besides
INPUTS = int(os.environ.get("SCORECAST_FUZZ", 0))

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


def many(strategy, draw, use, short: int) -> None:
    """``use`` of many inputs: ``short`` of hypothesis' strategy, always the same ones and made small where one fails,
    or INPUTS of ``draw(random.Random(number))``."""
    if not INPUTS:
        how = dict(max_examples=short, derandomize=True, database=None, deadline=None)
        settings(**how, suppress_health_check=list(HealthCheck))(given(strategy)(lambda value: use(value)))()
        return
    for number in range(INPUTS):
        value = draw(random.Random(number))
        try:
            use(value)
        except BaseException as error:
            error.add_note(f"input {number}: {str(value)[:2000]}")
            raise


def many_texts(use, *languages: str) -> None:
    """Texts of the blank-separated pieces of a language, blanks, newlines and other characters, each 1 to thousands of
    times."""
    pieces = [[*language.split(), " ", "\n", "\t"] for language in languages]
    often = (1, 2, 3, 25, 300, 3000)

    def joined(parts) -> str:
        return "".join(piece * n for piece, n in parts)[:LONGEST]

    def of(known: list[str]) -> st.SearchStrategy[str]:
        part = st.tuples(st.sampled_from(known) | st.text(max_size=3), st.sampled_from(often))
        return st.lists(part, max_size=12).map(joined)

    def draw(numbers: random.Random) -> str:
        known = numbers.choice(pieces)
        return joined(
            (characters(numbers, 3) if numbers.random() < 0.3 else numbers.choice(known), numbers.choice(often))
            for _ in range(numbers.randrange(13))
        )

    many(st.one_of(*map(of, pieces)), draw, use, 150)


def many_words(use, words: list[str]) -> None:
    """Lists of the words, and of texts that are none."""
    other = st.text(st.characters(exclude_categories=["Cs"]), max_size=4)

    def draw(numbers: random.Random) -> list[str]:
        drawn = range(numbers.randrange(9))
        return [characters(numbers, 4) if numbers.random() < 0.1 else numbers.choice(words) for _ in drawn]

    many(st.lists(st.sampled_from(words) | other, max_size=8), draw, use, 25)


def many_files(use, value, *more) -> None:
    """Files like the one that holds ``value``: bytes, a text, JSON, or, for a tuple, a row of JSON for each part.
    ``more``: functions from edits to other files."""
    makes = [*makers(value), *more]
    edits = st.lists(st.tuples(*3 * [st.integers(0, 10**6)]), min_size=1, max_size=4)
    strategy = st.tuples(st.sampled_from(makes), edits).map(lambda drawn: drawn[0](drawn[1]))

    def draw(numbers: random.Random) -> bytes:
        edit = range(numbers.randint(1, 4))
        return numbers.choice(makes)([tuple(numbers.randrange(10**6) for _ in range(3)) for _ in edit])

    many(strategy, draw, use, 25)


def characters(numbers: random.Random, most: int) -> str:
    """Up to ``most`` characters, half of them of ASCII, without half surrogates."""
    found = (numbers.randrange(128 if numbers.random() < 0.5 else 0x110000) for _ in range(numbers.randint(0, most)))
    return "".join(chr(c) for c in found if not 0xD800 <= c < 0xE000)


def places(value) -> list[tuple]:
    """(container, key) of all that is in a value of JSON."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, part in parts for place in [(value, key), *places(part)]]


def harmed(value, edits):
    """``value``, of dicts and lists, in which some parts are odd, gone, or where another one was."""
    value = copy.deepcopy(value)
    for where, what, _ in edits[:3]:
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


def damaged(raw: bytes, edits) -> bytes:
    """``raw`` with some bytes exchanged, put in or cut out, a stretch doubled, or its end gone."""
    for where, how, what in edits:
        at, how, piece = where % (len(raw) + 1), how % 5, BYTES[what % len(BYTES)]
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


def content_of(value) -> bytes:
    """A file: bytes or a text as it is, a row of JSON for each part of a tuple, else JSON."""
    if isinstance(value, bytes | str):
        return value if isinstance(value, bytes) else value.encode()
    rows = [json.dumps(row) + "\n" for row in value] if isinstance(value, tuple) else [json.dumps(value)]
    return "".join(rows).encode()


def makers(value) -> list:
    """Functions from edits to a file in which something is wrong, by its bytes and by its values."""
    found = [partial(damaged, content_of(value))]
    if isinstance(value, tuple):
        found.append(lambda edits: content_of(tuple(harmed(list(value), edits))))
    elif not isinstance(value, bytes | str):
        found.append(lambda edits: content_of(harmed(value, edits)))
    return found


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
            if tried:
                time.sleep(0.1 * tried)
            started = time.thread_time()
            found = parser(*inputs)
            if time.thread_time() - started < MOST:
                return found
    finally:
        gc.enable()
    raise AssertionError(f"{parser.__name__} took more than {1000 * MOST:.0f} ms eight times")
