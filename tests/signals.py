"""A signal at a chosen moment of a run."""

import os
import signal
from contextlib import contextmanager


@contextmanager
def terminated_in_validation(monkeypatch, module, nth: int):
    """Within, SIGTERM comes when ``module``'s ``forwards`` are asked for the ``nth`` time."""
    original, made = module.forwards, []

    def signalled(*args):
        made.append(1)
        if len(made) == nth:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    with monkeypatch.context() as m:
        m.setattr(module, "forwards", signalled)
        yield
