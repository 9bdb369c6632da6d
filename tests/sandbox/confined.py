"""Where hostile programs are tried: by users without privileges, in a cgroup with at most 64 tasks and a limit on
memory, until a deadline. Everything else refuses to try them.

Root makes such a place for tests/sandbox/attacks.py (`run`, which test_attacks.py calls). Others bring one:

    systemd-run --user --scope -p TasksMax=64 -p MemoryMax=3G .venv/bin/python -m pytest tests/sandbox/attacks.py
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
TASKS, MEMORY, SECONDS = 64, 3 << 30, 240
USER = 61183  # the last of those that the jailer gives programs to, and nobody's
CGROUPS = Path("/sys/fs/cgroup")
HOW = (__doc__ or "").strip().splitlines()[-1].strip()
# $1: the interpreter's folder; $2: the first folder above it that is closed to others, or empty. In its own mounts.
OPEN = """
if [ -n "$2" ]; then
    held=$(mktemp -d) && mount --bind "$1" "$held" && mount -t tmpfs -o mode=755 tmpfs "$2" || exit 125
    mkdir -p "$1" && mount --bind "$held" "$1" && umount "$held" && rmdir "$held" || exit 125
fi
shift 2; exec "$@"
"""


def why_not() -> str:
    """Why hostile programs may not be tried in this process; empty where they may."""
    found = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, names, path = line.split(":", 2)
        for name in names.split(",") if names else [""]:
            for folder in (CGROUPS / name / path.lstrip("/"), *(CGROUPS / name / path.lstrip("/")).parents):
                for file in ("pids.max", "memory.max", "memory.limit_in_bytes"):
                    with contextlib.suppress(OSError, ValueError):  # none there, or "max"
                        kind = file.partition(".")[0]
                        found[kind] = min(int((folder / file).read_text()), found.get(kind, 1 << 62))
    if found.get("pids", 1 << 62) > TASKS or found.get("memory", 1 << 62) > 4 * MEMORY:
        return f"hostile programs are tried only in a cgroup with at most {TASKS} tasks and a limit on memory: {HOW}"
    return ""


@contextlib.contextmanager
def _cgroups() -> Iterator[list[Path]]:
    """Cgroups with the limits; whatever is left in them is killed at the end. Raises OSError."""
    made, name = [], f"scorecast-{os.getpid()}"
    together = (CGROUPS / "cgroup.controllers").exists()
    try:
        for kind, file, value in (("pids", "pids.max", TASKS), ("memory", "memory.limit_in_bytes", MEMORY)):
            folder = CGROUPS / name if together else CGROUPS / kind / name
            folder.mkdir(exist_ok=together)
            made += [folder] * (folder not in made)
            (folder / ("memory.max" if together and kind == "memory" else file)).write_text(str(value))
        yield made
    finally:
        for folder in made:
            deadline = time.monotonic() + 10
            while (left := (folder / "cgroup.procs").read_text().split()) and time.monotonic() < deadline:
                for pid in left:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)
                time.sleep(0.05)
            folder.rmdir()


def run(*arguments: str, root: bool = False) -> subprocess.CompletedProcess:
    """Runs our interpreter with ``arguments`` in such a place, as USER, or as root, whose programs have users of their
    own. Raises OSError where root here may not make one."""
    if os.geteuid() != 0:
        raise OSError("only root can make the place")
    base = Path(os.path.realpath(sys.base_prefix))
    closed = [str(p) for p in (*reversed(base.parents), base) if not p.stat().st_mode & 1]
    command = ["unshare", "--mount", "sh", "-c", OPEN, "sh", str(base), (closed or [""])[0]]
    command += ["timeout", "-k", "5", str(SECONDS)]
    if not root:
        command += ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups", "--inh-caps=-all"]
        command += ["--no-new-privs"]
    with _cgroups() as cgroups, tempfile.TemporaryDirectory() as home:
        os.chmod(home, 0o777)

        def enter() -> None:
            for folder in cgroups:
                (folder / "cgroup.procs").write_text(str(os.getpid()))

        environment = {"PATH": os.defpath, "HOME": home, "TMPDIR": home, "PYTHONDONTWRITEBYTECODE": "1"}
        how = dict(cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS + 30)
        return subprocess.run([*command, sys.executable, *arguments], preexec_fn=enter, **how)
