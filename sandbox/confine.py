"""What the kernel refuses to a program: system calls by a filter (seccomp(2)), files and other processes by Landlock
(landlock(7)). Both hold for a process and all it starts, and nothing takes them off again.

Not for import: jailer.py loads it beside itself. The filter's forty lines are our own, because the jailer runs where
nothing is installed; the tests hold the numbers of the calls against libseccomp's.
"""

import contextlib
import ctypes
import functools
import os
import platform
import struct
from collections.abc import Sequence

# Of linux/prctl.h, seccomp.h, bpf_common.h, audit.h and errno.h.
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, FILTER = 1, 38, 22, 2
KILL_PROCESS, ALLOW, REFUSE, UNKNOWN = 0x80000000, 0x7FFF0000, 0x50000 | 1, 0x50000 | 38  # the errors EPERM, ENOSYS
LOAD, AND, EQUAL, AT_LEAST, RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
NUMBER, ARCHITECTURE, ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data
MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

# Calls and their numbers on x86_64 and aarch64. In every mode: namespaces, memory and messages that outlive a program,
# keys, and what only has a history of faults.
EVERYWHERE = """
    unshare 272 97  setns 308 268  mount 165 40  umount2 166 39  pivot_root 155 41  chroot 161 51  move_mount 429 429
    open_tree 428 428  fsopen 430 430  fspick 433 433  mount_setattr 442 442  open_by_handle_at 304 265
    shmget 29 194  shmat 30 196  shmctl 31 195  semget 64 190  semop 65 193  semtimedop 220 192  semctl 66 191
    msgget 68 186  msgsnd 69 189  msgrcv 70 188  msgctl 71 187  mq_open 240 180  mq_unlink 241 181
    add_key 248 217  request_key 249 218  keyctl 250 219
    io_uring_setup 425 425  userfaultfd 323 282  perf_event_open 298 241  bpf 321 280  syslog 103 116
"""
# Where a program shares processes, files and network with others: sockets; signals; the memory, scheduling and watching
# of others; what Landlock leaves open in files; and leaving the process group, by which the jailer kills.
SHARED = """
    socket 41 198  connect 42 203  bind 49 200
    kill 62 129  tkill 200 130  tgkill 234 131  rt_sigqueueinfo 129 138  rt_tgsigqueueinfo 297 240
    pidfd_send_signal 424 424  setsid 112 157  setpgid 109 154
    ptrace 101 117  process_vm_readv 310 270  process_vm_writev 311 271  process_madvise 440 440
    process_mrelease 448 448  pidfd_getfd 438 438  kcmp 312 272  move_pages 279 239  migrate_pages 256 238
    sched_setscheduler 144 119  sched_setparam 142 118  sched_setaffinity 203 122  sched_setattr 314 274
    setpriority 141 140  ioprio_set 251 30  inotify_init 253 -  inotify_init1 294 26  fanotify_init 300 262
    chmod 90 -  fchmod 91 52  fchmodat 268 53  fchmodat2 452 452  chown 92 -  fchown 93 55  lchown 94 -  fchownat 260 54
    setxattr 188 5  lsetxattr 189 6  fsetxattr 190 7  removexattr 197 14  lremovexattr 198 15  fremovexattr 199 16
    utime 132 -  utimes 235 -  futimesat 261 -  utimensat 280 88
"""
FIRST_UNKNOWN = 463  # calls of this number and above are newer than this table; x32's are far above
CLONE3 = 435  # its flags lie in memory, where a filter cannot look; the C library then takes clone
# Calls refused by an argument: (name, numbers, which argument, mask, values, whether those are refused or all others).
# clone's are CLONE_NEW*; SOCK_STREAM alone cannot be pointed at another socket; process 0 is the caller.
BY_ARGUMENT = (
    ("clone", (56, 220), 0, 0x7E020000, (0,), False),
    ("prlimit64", (302, 261), 0, 0xFFFFFFFF, (0,), False),
    ("socketpair", (53, 199), 1, 0xF, (1,), False),
    ("fcntl", (72, 25), 1, 0xFFFFFFFF, (8, 10, 15), True),  # F_SETOWN, F_SETSIG, F_SETOWN_EX: signals by a pipe
    ("ioctl", (16, 29), 1, 0xFFFFFFFF, (0x8901, 0x8902, 0x5412, 0x541C), True),  # FIOSETOWN, SIOCSPGRP, typing for you
)

# Of linux/landlock.h. From version 3 on it refuses all that changes a file's content.
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
LEAST_LANDLOCK = 3
EXECUTE, WRITE, READ, LIST, TRUNCATE, DEVICES = 1, 2, 4, 8, 1 << 14, 1 << 15
ON_FILES = EXECUTE | WRITE | READ | TRUNCATE | DEVICES  # the rights that a file has; the others are a folder's


def calls(table: str) -> dict[str, tuple[int | None, int | None]]:
    """name -> numbers on x86_64 and aarch64, of a table above."""
    words = table.split()
    return {
        name: tuple(int(n) if n != "-" else None for n in numbers)
        for name, *numbers in zip(words[::3], words[1::3], words[2::3], strict=True)
    }


@functools.cache
def call_filter(shared: bool) -> bytes:
    """The filter as the kernel takes it, an array of struct sock_filter. Raises OSError on a machine unknown to us."""
    if (machine := platform.machine()) not in MACHINES:
        raise OSError(f"the system calls of {machine} are not known to us")
    column = list(MACHINES).index(machine)
    refused = calls(EVERYWHERE + SHARED if shared else EVERYWHERE).values()
    numbers = [pair[column] for pair in refused if pair[column] is not None]
    lines = [  # operation, lines to jump over if true, if false, constant
        (LOAD, 0, 0, ARCHITECTURE),
        (EQUAL, 1, 0, MACHINES[machine]),
        (RETURN, 0, 0, KILL_PROCESS),
        (LOAD, 0, 0, NUMBER),
        (AT_LEAST, 1, 0, FIRST_UNKNOWN),
        (EQUAL, 0, 1, CLONE3),
        (RETURN, 0, 0, UNKNOWN),
    ]
    for _, pair, argument, mask, values, bad in BY_ARGUMENT if shared else BY_ARGUMENT[:1]:
        lines += [
            (EQUAL, 0, len(values) + 4, pair[column]),
            (LOAD, 0, 0, ARGUMENTS + 8 * argument),  # the low half: both machines are little-endian
            (AND, 0, 0, mask),
            *((EQUAL, len(values) - i, 0, value) for i, value in enumerate(values)),
            (RETURN, 0, 0, ALLOW if bad else REFUSE),
            (RETURN, 0, 0, REFUSE if bad else ALLOW),
        ]
    lines += [(EQUAL, len(numbers) - i, 0, number) for i, number in enumerate(numbers)]
    lines += [(RETURN, 0, 0, ALLOW), (RETURN, 0, 0, REFUSE)]
    return b"".join(struct.pack("HBBI", *line) for line in lines)


def filter_calls(shared: bool) -> None:
    """From here on these calls fail with EPERM or ENOSYS. Raises OSError where the kernel takes no filter."""
    code = ctypes.create_string_buffer(content := call_filter(shared), len(content))
    header = ctypes.create_string_buffer(struct.pack("HP", len(content) // 8, ctypes.addressof(code)))
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    call("prctl", PR_SET_SECCOMP, FILTER, header)


def takes_filter() -> bool:
    """Whether a child of ours can be given the filter."""
    pid = os.fork()
    if not pid:
        with contextlib.suppress(OSError):
            filter_calls(True)
            os._exit(0)
        os._exit(1)
    return os.waitpid(pid, 0)[1] == 0


def has_landlock() -> bool:
    return _landlock() >= LEAST_LANDLOCK


def lock_files(readable: Sequence[str], writable: Sequence[str], owned: Sequence[str]) -> None:
    """From here on ``readable`` can be read and run, ``writable`` be written too, and ``owned``, folders, hold what the
    process likes. All else can be neither opened nor changed. Processes from before cannot be looked into or signalled.

    What there is can still be seen: names, sizes and dates. Changes of owner, mode and date are the filter's to refuse.
    """
    version = _landlock()
    everything = DEVICES - 1 | (DEVICES if version >= 5 else 0)
    # Files; from version 4 on TCP's bind and connect; from 6 on abstract UNIX sockets and signals.
    content = struct.pack("QQQ", everything, 3, 3)[: 8 if version < 4 else 16 if version < 6 else 24]
    rules = _system_call(CREATE_RULESET, content, len(content), 0)
    groups = (EXECUTE | READ | LIST, readable), (READ | LIST | WRITE | TRUNCATE | DEVICES, writable), (-1, owned)
    for rights, paths in groups:
        for path in paths:
            place = os.open(path, os.O_PATH)
            kind = -1 if os.path.isdir(path) else ON_FILES
            _system_call(ADD_RULE, rules, 1, struct.pack("=Qi", rights & kind & everything, place), 0)
            os.close(place)
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _system_call(RESTRICT_SELF, rules, 0)
    os.close(rules)


@functools.cache
def _landlock() -> int:
    """The version that the kernel has in force; 0 without."""
    with contextlib.suppress(OSError):
        return _system_call(CREATE_RULESET, None, 0, 1)
    return 0


def _system_call(number: int, *arguments) -> int:
    value = libc().syscall(*(ctypes.c_long(a) if isinstance(a, int) else a for a in (number, *arguments)))
    if value < 0:
        raise OSError(error := ctypes.get_errno(), f"system call {number}: {os.strerror(error)}")
    return value


def call(name: str, *arguments) -> None:
    """A function of the C library, whose failure is an OSError."""
    function = getattr(libc(), name)
    values = [a.encode() if isinstance(a, str) else ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    if function(*values):
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


@functools.cache
def libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
