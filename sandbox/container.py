"""The jailer's container: namespaces of our own making, and the command of bubblewrap for the same.

Not for import: jailer.py loads it beside itself.
"""

import ctypes
import os
import platform
import shutil
import signal
import sys

from confine import PR_SET_PDEATHSIG, call, call_filter, libc

NOBODY = 65534  # whom programs are in namespaces
SYSTEM = ("/usr/lib", "/usr/lib32", "/usr/lib64", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/nix/store")
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
SCRATCH_BYTES = 32 << 20  # of the scratch folder, in memory
# Of linux/sched.h and mount.h.
NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC = 1, 2, 4, 8, 32, 4096, 16384
MS_PRIVATE, MS_RELATIME, MNT_DETACH = 1 << 18, 1 << 21, 2
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}  # no wrapper in the C library


def mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    try:
        call("mount", source, target, kind, flags, data)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror} ({source} on {target})") from None


def visible(packages: list[str]) -> list[str]:
    """Folders and files that a program may read. Those inside others are left out."""
    wanted = [os.path.realpath(p) for p in (sys.base_prefix, sys.base_exec_prefix, os.path.dirname(sys.executable))]
    wanted = sorted({*wanted, *packages, *(p for p in SYSTEM if os.path.exists(p))})
    return [p for p in wanted if not any(p.startswith(q.rstrip("/") + "/") for q in wanted)]


def enter_namespaces(root: bool, packages: list[str]) -> dict:
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
    call("unshare", NEWUSER | NEWNS | NEWNET | NEWUTS | NEWIPC)
    os.write(inside_w, b"+")
    os.close(mapped_w)
    if (told := os.read(mapped_r, 200)) != b"+":
        raise OSError(f"users could not be mapped: {told.decode() or 'the outer process died'}")
    for fd in (inside_r, inside_w, mapped_r):
        os.close(fd)
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL)  # after unshare, which clears it
    try:
        _put("/proc/sys/user/max_user_namespaces", "0")
        notes = {"nested namespaces": "refused"}
    except OSError as error:
        notes = {"nested namespaces": f"possible ({error.strerror})"}
    _build_root(visible(packages))
    return notes


def _put(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def _build_root(visible: list[str]) -> None:
    """Makes a new root and lets the old one go. It holds ``visible``, read-only, the devices, and places for /proc and
    the scratch folder."""
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    sources = {path: os.open(path, os.O_PATH) for path in (*visible, *DEVICES)}  # /tmp is about to be covered
    links = {path: os.readlink(path) for path in SYSTEM if os.path.islink(path)}
    new = "/tmp"
    mount("root", new, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for path, fd in sources.items():
        target = new + path
        if path in links:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.symlink(links[path], target)
            continue
        _place(target, folder=os.path.isdir(f"/proc/self/fd/{fd}"))
        mount(f"/proc/self/fd/{fd}", target, None, MS_BIND | MS_REC)
        # A mount made by the owner of another namespace keeps the restrictions it came with.
        flags = os.statvfs(target).f_flag  # ST_ and MS_ flags have the same values, but for relatime
        kept = flags & (MS_NOSUID | MS_NODEV | MS_NOEXEC | os.ST_NOATIME | os.ST_NODIRATIME)
        relative = MS_RELATIME if flags & os.ST_RELATIME else 0
        device = 0 if path in DEVICES else MS_RDONLY | MS_NODEV
        mount(None, target, None, MS_REMOUNT | MS_BIND | MS_NOSUID | kept | relative | device)
    for fd in sources.values():
        os.close(fd)
    # The kernel mounts a fresh /proc only where it can see one. Each program's own /proc covers this one.
    _place(f"{new}/proc", folder=True)
    mount("/proc", f"{new}/proc", None, MS_BIND | MS_REC)
    _place(f"{new}/jail", folder=True)
    os.chdir(new)
    if libc().syscall(ctypes.c_long(PIVOT_ROOT[platform.machine()]), b".", b"."):
        raise OSError(ctypes.get_errno(), f"pivot_root: {os.strerror(ctypes.get_errno())}")
    call("umount2", ".", MNT_DETACH)
    os.chdir("/")
    mount(None, "/", None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)


def furnish() -> None:
    """What each program has of its own, in its own namespaces: /proc, and /jail for the scratch folder."""
    try:
        mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    except OSError:  # a container that masks /proc; then there is none
        mount("none", "/proc", "tmpfs", MS_RDONLY)
    # Not over /tmp, where the packages that the program may import can lie.
    mount("scratch", "/jail", "tmpfs", MS_NOSUID | MS_NODEV, f"size={SCRATCH_BYTES},nr_inodes=4096,mode=755")


def _place(path: str, *, folder: bool) -> None:
    os.makedirs(path if folder else os.path.dirname(path), exist_ok=True)
    if not folder:
        open(path, "w").close()


def bubblewrap(program: str, scratch: str, packages: list[str], filtered: bool) -> list[str]:
    command = [shutil.which("bwrap"), "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    command += ["--uid", str(NOBODY), "--gid", str(NOBODY), "--proc", "/proc", "--dev", "/dev", "--dir", "/tmp"]
    for path in visible(packages):
        link = os.path.islink(path) and path in SYSTEM
        command += ["--symlink", os.readlink(path), path] if link else ["--ro-bind", path, path]
    command += ["--bind", scratch, "/tmp/scratch", "--ro-bind", program, "/tmp/program.py"]
    if filtered:
        held = os.memfd_create("filter", 0)
        os.write(held, call_filter(False))
        os.lseek(held, 0, os.SEEK_SET)
        command += ["--seccomp", str(held)]
    return [*command, "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/tmp/scratch", "--"]
