"""The scripts import, train and resume where Linux' own things are not: Windows and macOS, as far as stubs show it.

A stub takes away what Python's documentation says that the system has not, before anything of ours is imported. What
others' packages do there is not shown."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from lm_runs import ROOT

# What others' packages have chosen by the system at their import stays as it is: they come first.
BEFORE = """
import ctypes, importlib.abc, multiprocessing, os, signal, subprocess, sys
import jinja2, numpy, safetensors.torch, tokenizers, torch, torch.distributed.checkpoint.state_dict, tqdm
import scipy.stats, sysconfig, torch.distributed.device_mesh, torch.utils.data, tqdm.auto, concurrent.futures.thread
sysconfig.get_config_vars()
ours = [name for name in sys.modules if name.split(".")[0] in ("runtime", "kernels", "schedules", "data", "sandbox")]
assert not ours, ours

def without(system, modules, signals, functions):
    class Absent(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in modules:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    sys.meta_path.insert(0, Absent())
    for name in modules:
        sys.modules.pop(name, None)
    for name in functions:
        delattr(os, name)
    members = [s for s in signal.Signals if s.name not in signals]
    for name in signals:
        delattr(signal, name)
    import enum
    signal.Signals = enum.IntEnum("Signals", {s.name: s.value for s in members})
    sys.platform = system
"""
MACOS = """
without("darwin", ["triton", "bitsandbytes"], [], ["sched_getaffinity"])
"""
WINDOWS = """
from fcntl import LOCK_EX, LOCK_NB, flock
without(
    "win32", ["fcntl", "grp", "pwd", "resource", "termios", "triton", "bitsandbytes"],
    ["SIGHUP", "SIGALRM", "SIGKILL", "SIGCHLD", "SIGUSR1", "SIGUSR2", "SIGPIPE", "SIGQUIT", "SIGSTOP", "SIGCONT"],
    ["fork", "geteuid", "getuid", "getgid", "kill", "killpg", "register_at_fork", "sched_getaffinity", "setsid"],
)
load, fsync = ctypes.CDLL, os.fsync

class CDLL(load):
    def __init__(self, name, *args, **kwargs):
        if name is None:
            raise TypeError("argument of type 'NoneType' is not iterable")
        super().__init__(name, *args, **kwargs)

def synced(file):
    import io
    number = file if isinstance(file, int) else file.fileno()
    access = int(open(f"/proc/self/fdinfo/{number}").read().split("flags:")[1].split()[0], 8) & 3
    if not access:
        raise OSError(9, "Bad file descriptor")  # Windows flushes what may be written to alone
    fsync(file)

def locking(file, mode, count):
    try:
        flock(file, LOCK_EX | LOCK_NB)
    except BlockingIOError:
        raise PermissionError(13, "Permission denied")

ctypes.CDLL, os.fsync = CDLL, synced
sys.modules["msvcrt"] = type(sys)("msvcrt")
sys.modules["msvcrt"].locking, sys.modules["msvcrt"].LK_NBLCK = locking, 2
"""
AFTER = """
import importlib
sys.argv = ["train_lm.py"]
for script in ("finetune_gsm8k", "finetune_seq2seq", "train_lm"):
    module = importlib.import_module(script)
    try:
        module.main(["--help"])
    except SystemExit as end:
        assert end.code == 0, (script, end.code)
import eval.gsm8k, eval.campaign.__main__, eval.report.build, schedules.__main__
for more in ([], ["--resume"]):
    code = module.main([*FLAGS, *more])
    assert code == 0, (more, code)
    os.remove(OUT + "/summary.json")
from runtime.staging import _lock
files = [os.open(OUT + "/lock", os.O_RDWR) for _ in range(2)]
_lock(files[0])
try:
    _lock(files[1])
except BlockingIOError:
    print("held")
os.remove(OUT + "/config.json")
from data.chat import _time_limit
with _time_limit(1):
    pass
try:
    list(eval.gsm8k.grade_code([eval.gsm8k.Sample("test/0", "print(1)")], {"test/0": "1"}))
except ValueError as error:
    print(error)
"""


def on(system: str, flags: list, out: Path) -> subprocess.CompletedProcess:
    words = [*map(str, flags), "--out", str(out)]
    code = f"{BEFORE}{system}FLAGS, OUT = {words!r}, {str(out)!r}\n{textwrap.dedent(AFTER)}"
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize("system", [MACOS, WINDOWS], ids=["macos", "windows"])
def test_the_scripts_train_where_there_is_no_linux(lm_base, tmp_path, system):
    flags = [*lm_base, "--steps", "4", "--eval-every", "2", "--schedule", "fot", "--fot-window", "2"]
    done = on(system, flags, tmp_path / "run")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "held\n" in done.stdout and "run apart on Linux alone, and this is" in done.stdout
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "val"] == [2, 4]
