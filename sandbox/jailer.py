"""The jailer: a process of its own that runs programs, one after the other, and holds nothing else.

Not for import. run.py starts this file as a script, by a clean ``python -I -S``, so it uses the standard library alone.
It has one thread, so that it may fork. It enters the namespaces once. Then each program has a process namespace, a
scratch folder and an interpreter of its own. Caller and jailer speak JSON lines through pipes: first a hello of what
the machine withholds, or of why the mode cannot be had; then an answer {stdout, stderr, status, code, seconds} to each
request {code, stdin, limits}. The jailer ends when its stdin does.

A program in mode ``namespaces`` is the grandchild of a guard:

    jailer      in its own user, mount, network, UTS and IPC namespace, entered once
      guard     makes process, mount and IPC namespaces for one program; ends when these do
        init    their first process: mounts /proc and the scratch folder, starts the program, reaps; when it ends,
          program   all the others in its namespace do
"""

import contextlib
import ctypes
import functools
import json
import os
import platform
import resource
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections.abc import Iterator
from types import SimpleNamespace

NOBODY = 65534
SCRATCH_BYTES = 32 << 20  # of the scratch folder, where it is in memory
PATIENCE = 5  # seconds after which what cannot be killed is given up
SYSTEM = ("/usr/lib", "/usr/lib32", "/usr/lib64", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/nix/store")
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
# Of linux/prctl.h, sched.h and mount.h.
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 36, 38
NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC = 1, 2, 4, 8, 32, 4096, 16384
MS_PRIVATE, MS_RELATIME, MNT_DETACH = 1 << 18, 1 << 21, 2
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}  # no wrapper in the C library
# Of linux/seccomp.h, bpf_common.h and audit.h. What mode limits refuses: socket, io_uring_setup; kill, tkill, tgkill,
# rt_sigqueueinfo, rt_tgsigqueueinfo, pidfd_send_signal; ptrace, process_vm_readv, process_vm_writev.
PR_SET_SECCOMP, SECCOMP_FILTER, KILL_PROCESS, REFUSE, ALLOW = 22, 2, 0x80000000, 0x50001, 0x7FFF0000
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
LOAD, JUMP_IF_EQUAL, JUMP_IF_AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06
CALL_NUMBER, ARCHITECTURE = 0, 4  # offsets in struct seccomp_data
X32 = 0x40000000  # of this number and above: the same calls under other numbers
REFUSED = {
    "x86_64": (41, 425, 62, 200, 234, 129, 297, 424, 101, 310, 311),
    "aarch64": (198, 425, 129, 130, 131, 138, 240, 424, 117, 270, 271),
}

# Limits under which an interpreter starts where it can start at all.
TRIAL = {"seconds": 10, "cpu_seconds": 5, "memory_bytes": 1 << 29, "processes": 8, "file_bytes": 1, "open_files": 64}
TRIAL |= {"output_bytes": 1 << 16, "packages": False}


def _jailer(mode: str, packages: list[str]) -> None:
    """Says hello, then answers each line by a line until stdin ends."""
    try:
        if sys.platform != "linux":
            raise OSError(f"it needs Linux, this is {sys.platform}")
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        root = os.geteuid() == 0
        notes = {"user": NOBODY if root else os.geteuid()}
        if mode == "namespaces":
            notes |= _enter_namespaces(root, packages)
        _call("prctl", PR_SET_CHILD_SUBREAPER, 1)  # we adopt what leaves its group and its parent
        jail = _Jail(mode, packages, root)
        if root and mode != "namespaces" and jail.run({"code": "", "stdin": "", "limits": TRIAL})["status"] != "ok":
            jail = _Jail(mode, packages, False)
            notes |= {"user": 0, "processes": f"not limited, user {NOBODY} cannot run {sys.executable}"}
        if mode == "limits" and not jail.filtered:
            notes |= {"network, signals": "not contained, this kernel takes no system call filter from us"}
        _answer(notes)
    except OSError as error:
        _answer({"error": str(error)})
        return
    for line in sys.stdin.buffer:
        _answer(jail.run(json.loads(line)))


def _answer(value: dict) -> None:
    print(json.dumps(value), flush=True)  # ASCII, also where the program's output was not


class _Jail:
    def __init__(self, mode: str, packages: list[str], drop: bool):
        self.mode, self.packages, self.drop = mode, packages, drop
        # Without a user namespace the kernel counts all tasks of the user, whoever started them.
        self.tasks = 0 if mode == "namespaces" else _tasks(NOBODY if drop else os.geteuid())
        self.filtered = mode == "limits" and _takes_filter()

    def run(self, job: dict) -> dict:
        """One program from start to the death of all it started."""
        limits = SimpleNamespace(**job["limits"])
        started = time.monotonic()
        pipes = {name: os.pipe() for name in ("stdout", "stderr", "exit")}
        folder = None if self.mode == "namespaces" else self._folder(job["code"])
        guard = os.fork()
        if not guard:
            try:
                self._guard(job, limits, folder, {name: ends[1] for name, ends in pipes.items()})
            except BaseException as error:  # the one way for a forked child to report anything
                os.write(pipes["exit"][1], f"!{type(error).__name__}: {error}".encode())
            finally:
                os._exit(0)
        for _, end in pipes.values():
            os.close(end)
        got = {name: bytearray() for name in pipes}
        streams = {pipes[name][0]: got[name] for name in pipes}
        ended = self._collect(guard, streams, limits, started + limits.seconds)
        raw, survivors = _kill_children(guard)
        self._drain(streams, limits)
        if folder:
            _remove(folder)
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
            status, stderr = "lost", told[1:] or f"{survivors} processes could not be killed"
        else:
            if not ended:
                raw = int(told) if told else raw
                code = os.waitstatus_to_exitcode(raw)
                if self.mode == "bubblewrap" and code > 128:  # as a shell tells a signal
                    code = 128 - code
            status = ended or _status(code, stderr)
        seconds = time.monotonic() - started
        return {"stdout": stdout, "stderr": stderr, "status": status, "code": code, "seconds": seconds}

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
        if self.drop:
            os.chmod(folder, 0o711)
            os.chown(f"{folder}/scratch", NOBODY, NOBODY)
        return folder

    # ---- below here runs in forked children -----------------------------------------------------------------------

    def _guard(self, job: dict, limits: SimpleNamespace, folder: str | None, ends: dict) -> None:
        stdin = os.memfd_create("stdin")
        os.write(stdin, job["stdin"].encode("utf-8", "replace"))
        os.lseek(stdin, 0, os.SEEK_SET)
        _call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL)
        if self.mode != "namespaces":
            self._become_program(limits, f"{folder}/program.py", f"{folder}/scratch", (stdin, ends))
        _call("unshare", NEWPID | NEWIPC | NEWNS)
        init = os.fork()
        if init:
            os.waitpid(init, 0)  # returns when the whole namespace is dead
            os._exit(0)
        _call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL)
        _call("prctl", PR_SET_DUMPABLE, 0)
        try:
            _mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
        except OSError:  # a container that masks /proc; then there is none
            _mount("none", "/proc", "tmpfs", MS_RDONLY)
        # Not over /tmp, where the packages that the program may import can lie.
        _mount("scratch", "/jail", "tmpfs", MS_NOSUID | MS_NODEV, f"size={SCRATCH_BYTES},nr_inodes=4096,mode=755")
        _write_program("/jail/program.py", job["code"])
        os.mkdir("/jail/scratch", 0o700)
        os.chown("/jail/scratch", NOBODY, NOBODY)
        program = os.fork()
        if not program:
            self._become_program(limits, "/jail/program.py", "/jail/scratch", (stdin, ends))
        while True:
            pid, raw = os.wait()
            if pid == program:
                os.write(ends["exit"], str(raw).encode())
                os._exit(0)  # the first process of its namespace: the kernel kills the others

    def _become_program(self, limits: SimpleNamespace, program: str, scratch: str, streams: tuple) -> None:
        stdin, ends = streams
        environment = {"HOME": scratch, "TMPDIR": scratch, "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"}
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        command = [sys.executable, "-I", "-S", "-B", "-X", "utf8"]
        if self.mode == "bubblewrap":
            command = [*_bubblewrap(program, scratch, self.packages), *command]
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
        if self.drop:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            _call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL)  # a change of user clears it
        if self.mode != "bubblewrap":  # which does so itself, after gaining privileges where it is set-uid
            _call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        if self.filtered:
            _filter_calls()
        # In a user namespace of an ordinary user the jailer's own three processes count as well.
        tasks = limits.processes + self.tasks + (3 if self.mode == "namespaces" and not self.drop else 0)
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


def _filter_calls() -> None:
    """From here on the system calls in REFUSED fail with EPERM, in this process and all it starts (seccomp(2))."""
    machine = platform.machine()
    refused = REFUSED[machine]
    lines = [  # operation, lines to jump over if true, if false, constant
        (LOAD, 0, 0, ARCHITECTURE),
        (JUMP_IF_EQUAL, 1, 0, AUDIT_ARCH[machine]),
        (RETURN, 0, 0, KILL_PROCESS),
        (LOAD, 0, 0, CALL_NUMBER),
        (JUMP_IF_AT_LEAST, len(refused) + 1, 0, X32),
        *((JUMP_IF_EQUAL, len(refused) - i, 0, number) for i, number in enumerate(refused)),
        (RETURN, 0, 0, ALLOW),
        (RETURN, 0, 0, REFUSE),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in lines))
    header = ctypes.create_string_buffer(struct.pack("HP", len(lines), ctypes.addressof(code)))
    _call("prctl", PR_SET_SECCOMP, SECCOMP_FILTER, header)


def _takes_filter() -> bool:
    """Whether a child of ours can be given the filter."""
    if platform.machine() not in REFUSED:
        return False
    pid = os.fork()
    if not pid:
        try:
            _call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
            _filter_calls()
            os._exit(0)
        except OSError:
            os._exit(1)
    return os.waitpid(pid, 0)[1] == 0


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

    We are the subreaper: the children of what dies become ours. So we kill our own children until there are none."""
    raw, patience = 0, time.monotonic() + PATIENCE
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


def _remove(folder: str) -> None:
    for top, folders, _ in os.walk(folder):
        for name in folders:
            path = os.path.join(top, name)
            if not os.path.islink(path):
                os.chmod(path, 0o700)  # before the walk goes into it: a program may have locked its own folders
    shutil.rmtree(folder)


# ---- namespaces ------------------------------------------------------------------------------------------------------


def _call(name: str, *arguments) -> None:
    """A function of the C library, whose failure is an OSError."""
    function = getattr(_libc(), name)
    values = [a.encode() if isinstance(a, str) else ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    if function(*values):
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    try:
        _call("mount", source, target, kind, flags, data)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror} ({source} on {target})") from None


def _visible(packages: list[str]) -> list[str]:
    """Folders and files that a program may read. Those inside others are left out."""
    wanted = [os.path.realpath(p) for p in (sys.base_prefix, sys.base_exec_prefix, os.path.dirname(sys.executable))]
    wanted = sorted({*wanted, *packages, *(p for p in SYSTEM if os.path.exists(p))})
    return [p for p in wanted if not any(p.startswith(q.rstrip("/") + "/") for q in wanted)]


def _enter_namespaces(root: bool, packages: list[str]) -> dict:
    """Moves the jailer, for good, to where there is no network, no file but the interpreter's and no privilege.

    A second process stays outside and waits. It writes the map of users, which root cannot write from inside."""
    if platform.machine() not in PIVOT_ROOT:
        raise OSError(f"not known for {platform.machine()}")
    inside_r, inside_w = os.pipe()
    mapped_r, mapped_w = os.pipe()
    pid = os.fork()
    if pid:
        os.close(inside_w)
        if os.read(inside_r, 1):
            try:
                if not root:
                    _put(f"/proc/{pid}/setgroups", "deny")
                # Root keeps itself, to read an interpreter that only root can, and gets a user to give programs to.
                for kind, own in (("gid", os.getegid()), ("uid", os.geteuid())):
                    _put(f"/proc/{pid}/{kind}_map", f"0 0 1\n{NOBODY} {NOBODY} 1" if root else f"{NOBODY} {own} 1")
                os.write(mapped_w, b"+")
            except OSError as error:
                os.write(mapped_w, str(error).encode())
        for fd in (0, 1, mapped_w):
            os.close(fd)
        os.waitpid(pid, 0)
        os._exit(0)
    _call("unshare", NEWUSER | NEWNS | NEWNET | NEWUTS | NEWIPC)
    os.write(inside_w, b"+")
    os.close(mapped_w)
    if (told := os.read(mapped_r, 200)) != b"+":
        raise OSError(f"users could not be mapped: {told.decode() or 'the outer process died'}")
    for fd in (inside_r, inside_w, mapped_r):
        os.close(fd)
    _call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL)  # after unshare, which clears it
    try:
        _put("/proc/sys/user/max_user_namespaces", "0")
        notes = {"nested namespaces": "refused"}
    except OSError as error:
        notes = {"nested namespaces": f"possible ({error.strerror})"}
    _build_root(_visible(packages))
    return notes


def _put(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def _build_root(visible: list[str]) -> None:
    """Makes a new root and lets the old one go. It holds ``visible``, read-only, the devices, and places for /proc and
    the scratch folder."""
    _mount(None, "/", None, MS_REC | MS_PRIVATE)
    sources = {path: os.open(path, os.O_PATH) for path in (*visible, *DEVICES)}  # /tmp is about to be covered
    links = {path: os.readlink(path) for path in SYSTEM if os.path.islink(path)}
    new = "/tmp"
    _mount("root", new, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for path, fd in sources.items():
        target = new + path
        if path in links:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.symlink(links[path], target)
            continue
        _place(target, folder=os.path.isdir(f"/proc/self/fd/{fd}"))
        _mount(f"/proc/self/fd/{fd}", target, None, MS_BIND | MS_REC)
        # A mount made by the owner of another namespace keeps the restrictions it came with.
        flags = os.statvfs(target).f_flag  # ST_ and MS_ flags have the same values, but for relatime
        kept = flags & (MS_NOSUID | MS_NODEV | MS_NOEXEC | os.ST_NOATIME | os.ST_NODIRATIME)
        relative = MS_RELATIME if flags & os.ST_RELATIME else 0
        device = 0 if path in DEVICES else MS_RDONLY | MS_NODEV
        _mount(None, target, None, MS_REMOUNT | MS_BIND | MS_NOSUID | kept | relative | device)
    for fd in sources.values():
        os.close(fd)
    # The kernel mounts a fresh /proc only where it can see one. Each program's own /proc covers this one.
    _place(f"{new}/proc", folder=True)
    _mount("/proc", f"{new}/proc", None, MS_BIND | MS_REC)
    _place(f"{new}/jail", folder=True)
    os.chdir(new)
    if _libc().syscall(ctypes.c_long(PIVOT_ROOT[platform.machine()]), b".", b"."):
        raise OSError(ctypes.get_errno(), f"pivot_root: {os.strerror(ctypes.get_errno())}")
    _call("umount2", ".", MNT_DETACH)
    os.chdir("/")
    _mount(None, "/", None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)


def _place(path: str, *, folder: bool) -> None:
    os.makedirs(path if folder else os.path.dirname(path), exist_ok=True)
    if not folder:
        open(path, "w").close()


def _bubblewrap(program: str, scratch: str, packages: list[str]) -> list[str]:
    command = shutil.which("bwrap")
    if not command:
        raise OSError("bwrap is not installed")
    command = [command, "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    command += ["--uid", str(NOBODY), "--gid", str(NOBODY), "--proc", "/proc", "--dev", "/dev", "--dir", "/tmp"]
    for path in _visible(packages):
        link = os.path.islink(path) and path in SYSTEM
        command += ["--symlink", os.readlink(path), path] if link else ["--ro-bind", path, path]
    command += ["--bind", scratch, "/tmp/scratch", "--ro-bind", program, "/tmp/program.py"]
    return [*command, "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/tmp/scratch", "--"]


if __name__ == "__main__":
    _jailer(sys.argv[1], sys.argv[2:])
