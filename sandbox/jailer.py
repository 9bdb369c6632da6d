"""The jailer: a process of its own that runs programs, one after the other, and holds nothing else.

Not for import. run.py starts this file as a script, by a clean ``python -I -S``, so it uses the standard library alone.
It has one thread, so that it may fork. It enters the namespaces once. Then each program has a process namespace, a
scratch folder and an interpreter of its own. Caller and jailer speak JSON lines through pipes: first a hello {notes,
missing}, or {error}, why the mode cannot be had; then an answer {stdout, stderr, status, code, seconds, missing} to
each request {code, stdin, limits}. ``missing`` names what the mode should contain and does not on this machine. The
jailer ends when its stdin does.

A program in mode ``namespaces`` is the grandchild of a guard:

    jailer      in its own user, mount, network, UTS and IPC namespace, entered once
      guard     makes process, mount and IPC namespaces for one program; ends when these do
        init    their first process: mounts /proc and the scratch folder, starts the program, reaps; when it ends,
          program   all the others in its namespace do

In the other modes the guard becomes the program, the leader of a process group that nothing in it can leave.
"""

import contextlib
import itertools
import json
import os
import resource
import select
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from types import SimpleNamespace

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import confine  # noqa: E402
import container  # noqa: E402
from confine import PR_SET_NO_NEW_PRIVS, PR_SET_PDEATHSIG, call  # noqa: E402
from container import NOBODY  # noqa: E402

USERS = range(60706, 61184)  # whom root gives programs to: systemd's table of user ids leaves these to nobody
UNSAFE = "unsafe-run-as-me"
PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER = 4, 36  # of linux/prctl.h
PATIENCE = 5  # seconds after which what cannot be killed is given up

# Limits under which an interpreter starts where it can start at all.
TRIAL = {"seconds": 10, "cpu_seconds": 5, "memory_bytes": 1 << 29, "processes": 8, "file_bytes": 1, "open_files": 64}
TRIAL |= {"output_bytes": 1 << 16, "packages": False}
WAYS_OUT = (
    "ways out: start as an ordinary user, with bubblewrap where there are no namespaces; an interpreter and packages "
    f"that every user may read, such as a copy under /opt; or mode {UNSAFE!r}, eval.gsm8k's --{UNSAFE}, which gives "
    "programs your own rights"
)


def _jailer(mode: str, packages: list[str]) -> None:
    """Says hello, then answers each line by a line until stdin ends."""
    try:
        if sys.platform != "linux":
            raise OSError(f"it needs Linux, this is {sys.platform}")
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        jail = _Jail(mode, packages)
        _answer({"notes": jail.notes, "missing": jail.missing})
    except OSError as error:
        _answer({"error": str(error)})
        return
    for line in sys.stdin.buffer:
        _answer(jail.run(json.loads(line)))


def _answer(value: dict) -> None:
    print(json.dumps(value), flush=True)  # ASCII, also where the program's output was not


class _Jail:
    """Raises OSError where the mode cannot be had: where programs would run as root, or a protection that is not named
    in ``missing`` would be."""

    def __init__(self, mode: str, packages: list[str]):
        self.mode, self.packages, self.missing = mode, packages, []
        root, me = os.geteuid() == 0, os.geteuid()
        self.filtered, self.locked = confine.takes_filter(), mode in ("limits", UNSAFE) and confine.has_landlock()
        self.shared = mode in ("limits", UNSAFE)  # with the processes and files of others
        self.user = None  # whom a program becomes
        self.notes = {"user": NOBODY if root and mode == "namespaces" else me}
        if mode == "namespaces":
            self.notes |= container.enter_namespaces(root, packages)
            self.user = NOBODY if root else None
        else:
            if mode == "bubblewrap" and not shutil.which("bwrap"):
                raise OSError("bwrap is not installed")
            call("prctl", PR_SET_DUMPABLE, 0)  # a program of the same user may not look into this process
            if root and mode != UNSAFE:
                self.user, self._claim = _claim_user()
                self.notes = {"user": f"{self.user}, of its own"}
        call("prctl", PR_SET_CHILD_SUBREAPER, 1)  # we adopt what leaves its parent
        # Without a user namespace the kernel counts all tasks of the user, whoever started them.
        self.tasks = 0 if mode == "namespaces" or self.user else _tasks(me)
        self._name_missing(root)
        if self.user and mode != "namespaces":
            self._try()

    def _name_missing(self, root: bool) -> None:
        """Fills ``missing``. Raises OSError for what mode limits must not be without."""
        if self.mode == "limits" and not self.filtered:
            raise OSError(f"this kernel takes no system call filter from us; {WAYS_OUT}")
        if not self.filtered:
            self.missing.append("a system call filter: namespaces of its own, System V memory and keys are open")
        if self.mode == UNSAFE:
            self.missing.append(f"another user: programs may do what user {os.geteuid()} may")
            if not self.filtered:
                self.missing.append("network; signals to other processes of the user")
            if root:
                self.missing.append("a limit on processes: root has none")
        if self.shared:
            self.missing.append("namespaces: what files and processes there are can be seen")
        if self.shared and not self.locked:
            if self.user:
                self.missing.append("Landlock: every file that all users may read or write is open")
            else:
                self.missing.append("Landlock: the user's files and the memory of the user's processes are open")

    def _try(self) -> None:
        """Raises OSError unless a program that reads the packages' folders runs and ends."""
        code = f"import os\nfor path in {self.packages!r}: os.listdir(path)"
        result = self.run({"code": code, "stdin": "", "limits": TRIAL})
        if result["status"] != "ok":
            why = (result["stderr"] or result["status"]).strip().rpartition("\n")[2]
            what = f"programs are never run as root, and user {self.user} cannot use {sys.executable} ({why})"
            raise OSError(what + (f"; {WAYS_OUT}" if self.mode == "limits" else ""))

    def run(self, job: dict) -> dict:
        """One program from start to the death of all it started."""
        limits = SimpleNamespace(**job["limits"])
        started = time.monotonic()
        pipes = {name: os.pipe() for name in ("stdout", "stderr", "exit")}
        folder = None if self.mode == "namespaces" else self._folder(job["code"])
        guard, alive = _fork()
        if not guard:
            try:
                self._guard(job, limits, folder, {name: ends[1] for name, ends in pipes.items()}, alive)
            except BaseException as error:  # the one way for a forked child to report anything
                os.write(pipes["exit"][1], f"!{type(error).__name__}: {error}\n".encode())
            finally:
                os._exit(0)
        for _, end in pipes.values():
            os.close(end)
        got = {name: bytearray() for name in pipes}
        streams = {pipes[name][0]: got[name] for name in pipes}
        ended = self._collect(guard, streams, limits, started + limits.seconds)
        raw, survivors = _kill_children(guard)
        os.close(alive)
        self._drain(streams, limits)
        missing = list(self.missing)
        if folder:
            try:
                if survivors:
                    raise OSError("its processes live on")
                _remove(folder)
            except OSError as error:
                missing.append(f"a clean end: {folder} could not be taken away ({error})")
        if ended == "abandoned":
            os._exit(1)
        if not ended and max(len(got["stdout"]), len(got["stderr"])) > limits.output_bytes:
            ended = "output"
        stdout, stderr = (got[name][: limits.output_bytes].decode("utf-8", "replace") for name in ("stdout", "stderr"))
        told = got["exit"].decode("utf-8", "replace")
        code = None
        if self.mode == "namespaces" and not told and not ended:
            status = "killed"  # init, which would have told, is dead: the kernel killed it for memory
        elif told.startswith("!") or survivors:
            status, stderr = "lost", told[1:].partition("\n")[0] or f"{survivors} processes could not be killed"
        else:
            if not ended:
                raw = int(told) if told else raw
                code = os.waitstatus_to_exitcode(raw)
                if self.mode == "bubblewrap" and code > 128:  # as a shell tells a signal
                    code = 128 - code
            status = ended or _status(code, stderr)
        seconds = time.monotonic() - started
        return {
            "stdout": stdout,
            "stderr": stderr,
            "status": status,
            "code": code,
            "seconds": seconds,
            "missing": missing,
        }

    def _collect(self, guard: int, streams: dict, limits: SimpleNamespace, deadline: float) -> str | None:
        """Reads until the program has ended, and then returns None. Returns a status, or "abandoned", where the program
        has to be ended for that reason."""
        end, poller = os.pidfd_open(guard), select.poll()
        for fd in (*streams, end):
            poller.register(fd, select.POLLIN)
        poller.register(0, 0)  # hang-up only: the caller is gone
        try:
            while (left := deadline - time.monotonic()) > 0:
                for fd, event in poller.poll(1000 * left):
                    if fd == 0 and event & (select.POLLHUP | select.POLLERR):
                        return "abandoned"
                    if fd == end:
                        return None
                    if fd in streams:
                        data = os.read(fd, 65536)
                        streams[fd] += data
                        if not data:
                            poller.unregister(fd)
                        if len(streams[fd]) > limits.output_bytes:
                            return "output"
            return "timeout"
        finally:
            os.close(end)

    def _drain(self, streams: dict, limits: SimpleNamespace) -> None:
        """Reads what is left in the pipes. Their writers are dead, but in mode limits one may have got away."""
        for fd, data in streams.items():
            os.set_blocking(fd, False)
            with contextlib.suppress(BlockingIOError):  # a writer lives; what it says later is not the program's output
                while len(data) <= limits.output_bytes and (more := os.read(fd, 65536)):
                    data += more
            os.close(fd)

    def _folder(self, code: str) -> str:
        folder = tempfile.mkdtemp(prefix="sandbox-")
        os.mkdir(f"{folder}/scratch", 0o700)
        _write_program(f"{folder}/program.py", code)
        if self.user:
            os.chmod(folder, 0o711)
            os.chown(f"{folder}/scratch", self.user, self.user)
        return folder

    # ---- below here runs in forked children -----------------------------------------------------------------------

    def _guard(self, job: dict, limits: SimpleNamespace, folder: str | None, ends: dict, jailer: int) -> None:
        stdin = os.memfd_create("stdin")
        os.write(stdin, job["stdin"].encode("utf-8", "replace"))
        os.lseek(stdin, 0, os.SEEK_SET)
        _die_with(jailer)
        if self.mode != "namespaces":
            self._become_program(limits, f"{folder}/program.py", f"{folder}/scratch", (stdin, ends), jailer)
        call("unshare", container.NEWPID | container.NEWIPC | container.NEWNS)
        init, guard = _fork()
        if init:
            os.waitpid(init, 0)  # returns when the whole namespace is dead
            os._exit(0)
        _die_with(guard)
        call("prctl", PR_SET_DUMPABLE, 0)
        container.furnish()
        _write_program("/jail/program.py", job["code"])
        os.mkdir("/jail/scratch", 0o700)
        os.chown("/jail/scratch", NOBODY, NOBODY)
        program = os.fork()
        if not program:
            self._become_program(limits, "/jail/program.py", "/jail/scratch", (stdin, ends), guard)
        while True:
            pid, raw = os.wait()
            if pid == program:
                os.write(ends["exit"], str(raw).encode())
                os._exit(0)  # the first process of its namespace: the kernel kills the others

    def _become_program(self, limits: SimpleNamespace, program: str, scratch: str, streams: tuple, parent: int) -> None:
        stdin, ends = streams
        environment = {"HOME": scratch, "TMPDIR": scratch, "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"}
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        command = [sys.executable, "-I", "-S", "-B", "-X", "utf8"]
        if self.mode == "bubblewrap":
            command = [*container.bubblewrap(program, scratch, self.packages, self.filtered), *command]
            program, environment["HOME"], environment["TMPDIR"] = "/tmp/program.py", "/tmp/scratch", "/tmp/scratch"
        # What `python program.py` has and -S leaves out: exit and quit. The module alone changes nothing else.
        start = "import runpy, site, sys; site.setquit(); n = int(sys.argv[1]); sys.path += sys.argv[2 : 2 + n]"
        command += ["-c", f"{start}; del sys.argv[: 2 + n]; runpy.run_path(sys.argv[0], run_name='__main__')"]
        command += [str(len(self.packages)), *self.packages, program]
        os.setsid()
        for fd, source in enumerate((stdin, ends["stdout"], ends["stderr"])):
            os.dup2(source, fd)
        os.chdir(scratch)
        os.umask(0o077)
        if self.user:
            os.setgroups([])
            os.setresgid(self.user, self.user, self.user)
            os.setresuid(self.user, self.user, self.user)
            _die_with(parent)  # a change of user clears it
        if self.locked:
            confine.lock_files([*container.visible(self.packages), program], container.DEVICES, [scratch, "/proc/self"])
        if self.mode != "bubblewrap":  # which does both itself, after gaining privileges where it is set-uid
            call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
            if self.filtered:
                confine.filter_calls(self.shared)
        # In a user namespace of an ordinary user the jailer's own three processes count as well.
        tasks = limits.processes + self.tasks + (3 if self.mode == "namespaces" and not self.user else 0)
        for kind, soft, hard in (
            (resource.RLIMIT_CORE, 0, 0),
            (resource.RLIMIT_CPU, limits.cpu_seconds, limits.cpu_seconds + 1),  # a signal, then the end
            (resource.RLIMIT_FSIZE, limits.file_bytes, limits.file_bytes),
            (resource.RLIMIT_NOFILE, limits.open_files, limits.open_files),
            (resource.RLIMIT_NPROC, tasks, tasks),
            (resource.RLIMIT_AS, limits.memory_bytes, limits.memory_bytes),
        ):
            most = resource.getrlimit(kind)[1]
            most = hard if most == resource.RLIM_INFINITY else min(hard, most)
            resource.setrlimit(kind, (min(soft, most), most))
        os.execve(command[0], command, environment)


def _fork() -> tuple[int, int]:
    """os.fork, and an end of a pipe: the child's, for `_die_with`, or the parent's, which the parent alone holds."""
    child, parent = os.pipe()
    pid = os.fork()
    os.close(child if pid else parent)
    return pid, parent if pid else child


def _die_with(parent: int) -> None:
    """This process is killed when its parent dies. Also when it has died before we could ask for that: files are closed
    before the children of what dies are told."""
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL)
    poller = select.poll()
    poller.register(parent, 0)  # hang-up only
    if poller.poll(0):
        os._exit(1)


def _status(code: int, stderr: str) -> str:
    if code == -signal.SIGXCPU:
        return "cpu"
    if code < 0:
        return "killed"
    if code and stderr.rstrip().rpartition("\n")[2].startswith("MemoryError"):
        return "memory"
    return "error" if code else "ok"


def _write_program(path: str, code: str) -> None:
    with open(path, "w", encoding="utf-8", errors="replace", newline="") as file:
        file.write(code)
    os.chmod(path, 0o644)


def _kill_children(guard: int) -> tuple[int, int]:
    """Kills and reaps all our descendants. Returns the guard's wait status, and how many could not be killed.

    The group dies at once, however fast it forks. We are the subreaper: the children of what dies become ours. So we
    kill our own children until there are none."""
    raw, patience = 0, time.monotonic() + PATIENCE
    with contextlib.suppress(ProcessLookupError):  # the guard leads no group, or not yet
        os.killpg(guard, signal.SIGKILL)
    while True:
        try:
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                raw = found[1] if found[0] == guard else raw
        except ChildProcessError:
            return raw, 0
        left = [pid for pid, parent in _parents() if parent == os.getpid()]
        if time.monotonic() > patience:
            return raw, max(1, len(left))
        for pid in left:
            with contextlib.suppress(ProcessLookupError):  # it ended by itself
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.001)


def _parents() -> Iterator[tuple[int, int]]:
    """(process, its parent) of all processes there are."""
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # ended meanwhile
                with open(f"/proc/{name}/stat", "rb") as file:
                    yield int(name), int(file.read().rpartition(b")")[2].split()[1])


def _tasks(user: int) -> int:
    """Processes and threads of a user."""
    count = 0
    for pid, _ in _parents():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # ended meanwhile
            if os.stat(f"/proc/{pid}").st_uid == user:
                count += len(os.listdir(f"/proc/{pid}/task"))
    return count


def _claim_user() -> tuple[int, socket.socket]:
    """A user that no process has, and what holds it for us until we end: a name that one process at a time can have."""
    for user in USERS:
        claim = socket.socket(socket.AF_UNIX)
        with contextlib.suppress(OSError):  # another jailer's
            claim.bind(f"\0sandbox-user-{user}")
            if not _tasks(user):
                return user, claim
        claim.close()
    raise OSError(f"no user from {USERS[0]} to {USERS[-1]} is free for programs, and they are never run as root")


def _remove(folder: str) -> None:
    """Takes a folder away, however deep: what lies in a folder is moved to the top, so that no path is long.

    Nothing of the program may live any more, or it could lead us elsewhere. It may have locked its own folders."""
    top = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    os.chmod(f"{folder}/scratch", 0o700)
    names, left = map(str, itertools.count()), ["scratch"]
    while left:
        name = left.pop()
        place = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=top)
        with os.scandir(place) as entries:
            found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
        for entry, is_folder in found:
            if is_folder:
                os.chmod(entry, 0o700, dir_fd=place)  # a folder is moved by who may write in it
                left.append(next(names))
                os.rename(entry, left[-1], src_dir_fd=place, dst_dir_fd=top)
            else:
                os.unlink(entry, dir_fd=place)
        os.close(place)
        os.rmdir(name, dir_fd=top)
    os.close(top)
    shutil.rmtree(folder)


if __name__ == "__main__":
    _jailer(sys.argv[1], sys.argv[2:])
