"""Runs a function on several ranks of this machine, forked from one process: what they need is imported once."""

import importlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent


def on_ranks(count: int, function: Callable[[list[str]], int | None], arguments: list[str] = ()) -> str:
    """``function``, which its module has by name, with ``arguments`` on ``count`` ranks, in the environment in which
    torchrun starts them: what they said. The failure of one fails the test."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        env = os.environ | dict(MASTER_ADDR="localhost", MASTER_PORT=str(s.getsockname()[1]), OMP_NUM_THREADS="1")
    env |= dict(WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count), PYTHONPATH=os.pathsep.join(sys.path))
    line = [sys.executable, __file__, function.__module__, function.__name__, *arguments]
    how = dict(cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    done = subprocess.run(line, timeout=240, **how)
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def main() -> int:
    from runtime.process import end_with_parent

    module, name, *arguments = sys.argv[1:]
    function = getattr(importlib.import_module(module), name)
    ranks = []
    for rank in map(str, range(int(os.environ["WORLD_SIZE"]))):
        ranks.append(os.fork())
        if not ranks[-1]:
            end_with_parent()
            os.environ |= dict(RANK=rank, LOCAL_RANK=rank)
            return function(arguments)
    return max(abs(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])) for pid in ranks)


if __name__ == "__main__":
    sys.exit(main())
