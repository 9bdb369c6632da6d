"""Ranks that watch each other: one that is stopped, or whose machine is gone, is named, and the others do not wait."""

import os
import sys
import threading
import time
from collections.abc import Callable

BEAT, SAYS, ENDS = 5.0, 60.0, 600.0  # seconds between two signs of life, and without one until it is said, and ended


class Pulse(threading.Thread):
    """Gives signs of life of ``rank`` to ``store`` (a torch.distributed Store) and looks for those of the next rank.

    Without one for SAYS seconds that is said, with the rank's number; after ENDS, ``end`` is called: the process ends
    with exit code 1, and torchrun ends the others. A rank that computes or waits gives its signs all the same. Time
    in which this rank was stopped itself, or its clock jumped, does not count."""

    def __init__(self, rank: int, size: int, store, end: Callable[[], None] = lambda: os._exit(1)):
        super().__init__(daemon=True, name="pulse")
        self.rank, self.next, self.store, self.end = rank, (rank + 1) % size, store, end
        self.done = threading.Event()

    def run(self) -> None:
        beats, seen, silent, clock, said = 0, None, 0.0, time.monotonic(), False
        while not self.done.wait(BEAT):
            beats += 1
            try:
                self.store.set(f"pulse {self.rank}", str(beats))
                key = f"pulse {self.next}"
                found = self.store.get(key) if self.store.check([key]) else None
            except RuntimeError:  # the store has gone with torchrun
                return
            clock, before = time.monotonic(), clock
            silent += min(clock - before, 2 * BEAT)
            if found != seen:
                seen, silent, said = found, 0.0, False
            who = f"rank {self.next} has given no sign of life for {silent:.0f} s: stopped, or its machine is gone"
            if silent > SAYS and not said:
                said = True
                print(f"{who}; ends after {ENDS:.0f} s", file=sys.stderr, flush=True)
            if silent > ENDS:
                print(f"{who}; this rank ends, --resume goes on from last.pt", file=sys.stderr, flush=True)
                return self.end()

    def stop(self) -> None:
        self.done.set()
        self.join()
