"""Text as models write it when they go wrong: pieces of a parser's own language, in any order, some without end.

SCORECAST_FUZZ=100000 is the long form: that many inputs a parser, at random. Without it the same 150 each time.
"""

import os
import time

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

LONGEST = 6000  # characters
MOST = 0.05  # seconds of this thread an input may take, whatever the machine does besides
INPUTS = int(os.environ.get("SCORECAST_FUZZ", 0))

fuzzed = settings(
    max_examples=INPUTS or 150,
    derandomize=not INPUTS,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


def texts(pieces: str) -> st.SearchStrategy[str]:
    """Texts of the blank-separated ``pieces``, blanks, newlines and other characters, each 1 to thousands of times."""
    piece = st.sampled_from([*pieces.split(), " ", "\n", "\t"]) | st.text(max_size=3)
    often = st.integers(1, 3) | st.sampled_from([25, 300, 3000])
    return st.lists(st.tuples(piece, often), max_size=12).map(lambda parts: "".join(p * n for p, n in parts)[:LONGEST])


def timely(parser, *inputs):
    """What the parser makes of the inputs, which it must do in time, at the best of three tries, and without an error:
    the clock runs on while other programs hold the processor's caches."""
    taken = MOST
    for _ in range(3):
        started = time.thread_time()
        found = parser(*inputs)
        taken = min(taken, time.thread_time() - started)
        if taken < MOST:
            return found
    raise AssertionError(f"{parser.__name__} took more than {1000 * MOST:.0f} ms three times")
