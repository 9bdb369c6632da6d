"""Starts a script on several ranks of this machine."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def on_ranks(count: int, arguments: list[str]) -> str:
    """Python with ``arguments`` on ``count`` ranks of this machine, in the environment in which torchrun starts them:
    what they said. The failure of one fails the test."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        env = os.environ | dict(MASTER_ADDR="localhost", MASTER_PORT=str(s.getsockname()[1]), OMP_NUM_THREADS="1")
    how = dict(cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    started = []
    for rank in map(str, range(count)):
        own = env | dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count))
        started.append(subprocess.Popen([sys.executable, *arguments], env=own, **how))
    try:
        said = [process.communicate(timeout=240)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    for process, text in zip(started, said, strict=True):
        assert process.returncode == 0, text[-3000:]
    return "".join(said)
