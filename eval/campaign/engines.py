"""Where the runs of a campaign are: processes of this machine, tasks of Ray, or an array job of Slurm.

The first two give ``start(line, log, gpus)`` -> a handle with ``code()``, None while it runs, then the exit code as
shells say it, and ``stop(number)``, which sends a signal. Every run is in a session of its own: a terminal's signals
reach the campaign alone, which passes them on once. A run ends with its campaign, however that ends.
"""

import contextlib
import importlib
import multiprocessing.connection
import multiprocessing.forkserver
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from runtime.folder import CHECKPOINTS
from runtime.process import end_with_parent
from runtime.staging import release_lock, take_lock, write_bytes
from schedules.commandline import package

ENGINES = ("local", "ray", "slurm")
RETRIES = 3  # of a task of Ray whose worker has died
LET_GO = 60.0  # seconds that a run of a campaign that was killed has to save and let its folder go


def as_shells_say(code: int) -> int:
    """128 + the number of the signal that ended a child, which Python gives as a negative one; else its exit code."""
    return 128 - code if code < 0 else code


def visible(gpus: list[str] | None) -> dict[str, str]:
    """The environment that shows a run these ``gpus`` alone; None leaves it as it is."""
    return {} if gpus is None else {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}


def in_use(folder: Path) -> bool:
    """Whether another process holds the folder of a run."""
    if not folder.is_dir():
        return False
    try:
        take_lock(folder)
    except ValueError:
        return True
    release_lock(folder)
    return False


class Spawned:
    """A run as a process of its own, its output in the file ``log``."""

    def __init__(self, line: list[str], log: str, gpus: list[str] | None = None):
        how = dict(preexec_fn=end_with_parent) if sys.platform == "linux" else {}  # Windows takes none
        with open(log, "ab") as file:
            how |= dict(stdout=file, stderr=file, stdin=subprocess.DEVNULL, start_new_session=True)
            self.process = subprocess.Popen(line, env=os.environ | visible(gpus), **how)

    def code(self) -> int | None:
        code = self.process.poll()
        return None if code is None else as_shells_say(code)

    def stop(self, number: int) -> None:
        with contextlib.suppress(OSError):  # it has ended
            self.process.send_signal(number)


class Forked:
    """A run as a fork of a process that has imported its script, which a small run takes little longer than."""

    def __init__(self, context, line: list[str], log: str, gpus: list[str] | None = None):
        self.process = context.Process(target=run_cell, args=(line[1:], log, visible(gpus)))
        self.process.start()

    def code(self) -> int | None:
        code = self.process.exitcode
        return None if code is None else as_shells_say(code)

    def stop(self, number: int) -> None:
        with contextlib.suppress(OSError):
            os.kill(self.process.pid, number)


class Local:
    """Processes of this machine. ``script``: what its forks have imported."""

    def __init__(self, script: str, jobs: int):
        if jobs > 1:
            os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // jobs, 1)))
        ways = multiprocessing.get_all_start_methods()  # Windows has "spawn" alone
        self.context = multiprocessing.get_context("forkserver" if "forkserver" in ways else "spawn")
        self.context.set_forkserver_preload([Path(script).stem, __name__])
        self.started = False

    def start(self, line: list[str], log: str, gpus: list[str] | None = None):
        if gpus or line[1].startswith("-"):  # CUDA reads what is visible once in a process; torchrun makes its own
            return Spawned(line, log, gpus)
        if not self.started and sys.platform != "win32":
            # A signal to the whole group must not end the parent of the runs before they have saved.
            old = {s: signal.signal(s, signal.SIG_IGN) for s in (signal.SIGTERM, signal.SIGHUP)}
            multiprocessing.forkserver.ensure_running()
            for number, handler in old.items():
                signal.signal(number, handler)
        self.started = True
        return Forked(self.context, line, log, gpus)


def end_with_campaign() -> None:
    """SIGTERM to this process when the campaign dies; its parent, the forkserver, would live on."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


def run_cell(line: list[str], log: str, environment: dict[str, str]) -> None:
    """One run, a script and its flags, in a process of its own, its output in the file ``log``."""
    if sys.platform != "win32":
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=end_with_campaign, daemon=True).start()
    os.environ.update(environment)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = line
    sys.exit(importlib.import_module(Path(line[0]).stem).main(line[1:]))


class Ray:
    """Tasks of Ray, on this machine or, with RAY_ADDRESS, on a cluster that shares the folder. A run whose worker dies
    is tried again and goes on from its checkpoint."""

    def __init__(self, gpus: int):
        """``gpus``: of a run."""
        self.ray = package("ray", "--engine ray", otherwise="take --engine local")
        if not self.ray.is_initialized():
            self.ray.init(log_to_driver=False, include_dashboard=False, logging_level="error")
        how = dict(num_cpus=1, num_gpus=gpus, max_retries=RETRIES)
        self.task = self.ray.remote(**how)(ray_task)

    def start(self, line: list[str], log: str, gpus: list[str] | None = None):
        """``gpus`` are Ray's to give."""
        return RayTask(self.ray, self.task.remote(line, log, str(Path.cwd())))


class RayTask:
    def __init__(self, ray, reference):
        self.ray, self.reference, self.stopped = ray, reference, False

    def code(self) -> int | None:
        if not self.ray.wait([self.reference], timeout=0)[0]:
            return None
        try:
            return self.ray.get(self.reference)
        except Exception as e:  # of Ray: cancelled, or its worker has died too often
            return 128 + signal.SIGTERM if self.stopped else self._lost(e)

    def _lost(self, error: Exception) -> int:
        print(f"ray: {' '.join(str(error).split())[:300]}", file=sys.stderr, flush=True)
        return 1

    def stop(self, number: int) -> None:
        self.stopped = True
        self.ray.cancel(self.reference, force=False)


def ray_task(line: list[str], log: str, where: str) -> int:
    """The run of ``line`` in the folder ``where``, with --resume where an attempt before it has left a checkpoint."""
    os.chdir(where)
    out = Path(line[line.index("--out") + 1])
    out.parent.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + LET_GO
    while in_use(out) and time.monotonic() < until:  # what the dead worker has started is saving
        time.sleep(0.2)
    if (out / "summary.json").exists():
        return 0
    resume = ["--resume"] * any((out / name).exists() for name in CHECKPOINTS)
    child = Spawned([*(word for word in line if word != "--resume"), *resume], log)
    try:
        return as_shells_say(child.process.wait())
    except BaseException:  # Ray's cancelling interrupts
        child.stop(signal.SIGTERM)
        child.process.wait()
        raise


SLURM = """#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --array=0-{last}%{jobs}
#SBATCH --output={root}/slurm-%A_%a.log
#SBATCH --requeue
# Written by python -m eval.campaign: a task is a run. One that has finished is left alone, one that was interrupted
# goes on from its checkpoint.
cd {here} || exit 1
case "$SLURM_ARRAY_TASK_ID" in
{cases}
*) echo "no run number $SLURM_ARRAY_TASK_ID" >&2; exit 2 ;;
esac
if [ -e "$out/summary.json" ]; then echo "$out has finished already"; exit 0; fi
if [ -e "$out/last.pt" ] || [ -e "$out/previous.pt" ] || [ -e "$out/best.pt" ]; then set -- "$@" --resume; fi
exec "$@"
"""


def submit(lines: dict[Path, list[str]], root: Path, jobs: int, more: str) -> str:
    """Writes ROOT/array.sh, a task for each command line by its run's folder, and gives it to sbatch with the arguments
    ``more``; ``jobs`` run at a time. What sbatch says. Raises ValueError where there is no sbatch, or it fails."""
    if not shutil.which("sbatch"):
        raise ValueError("--engine slurm needs sbatch, which is not on PATH; start on a login node of the cluster")
    cases = "\n".join(
        f"{i}) out={shlex.quote(str(folder))}; set -- {shlex.join(w for w in line if w != '--resume')} ;;"
        for i, (folder, line) in enumerate(lines.items())
    )
    about = dict(name=shlex.quote(f"scorecast-{root.name}"), last=len(lines) - 1, jobs=jobs, root=root.resolve())
    text = SLURM.format(**about, here=shlex.quote(str(Path.cwd())), cases=cases)
    root.mkdir(parents=True, exist_ok=True)
    write_bytes(root / "array.sh", lambda file: file.write(text.encode()))
    line = ["sbatch", *shlex.split(more), str(root / "array.sh")]
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"sbatch failed (exit code {done.returncode}): {' '.join(done.stderr.split())[:300]}")
    return " ".join(done.stdout.split())
