"""Attacks on the sandbox: every row of SECURITY.md's table in every mode that this machine allows, and the jailer's end
of them. Not collected by itself: test_attacks.py runs it where hostile programs may be tried (confined.py)."""

import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from confined import ROOT, why_not

from sandbox import MODES, Limits, confine, run_many, run_program
from sandbox import run as sandbox

if why := why_not():
    pytest.skip(why, allow_module_level=True)

BRIEF = Limits(seconds=0.5, cpu_seconds=1, memory_bytes=256 << 20)
SHORT = Limits(seconds=1, cpu_seconds=1, memory_bytes=256 << 20)
PATIENT = Limits(seconds=20, cpu_seconds=5, memory_bytes=256 << 20)
LIBC = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
LIBC += "def ok(v):\n    if v < 0: raise OSError(ctypes.get_errno(), 'refused')\n    return v\n"


def table() -> dict[str, dict[str, bool]]:
    """What a program tries -> mode -> whether it is contained, as SECURITY.md says."""
    rows = [line.strip("| ").split(" | ") for line in (ROOT / "SECURITY.md").read_text().splitlines() if "|" in line]
    names = [*rows[0][1:-1], "bare"]
    for row in rows[2:]:
        assert set(row[1:]) <= {"contained", "open"}, row
    return {row[0]: {name: cell == "contained" for name, cell in zip(names, row[1:], strict=True)} for row in rows[2:]}


@pytest.fixture(scope="module", params=[*MODES, "bare"])
def column(request, tmp_path_factory):
    """(column of the table, mode); "bare" is mode limits on a kernel without Landlock."""
    mode = "limits" if request.param == "bare" else request.param
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "bare":
            if os.geteuid() == 0:
                pytest.skip("the column is of an ordinary user's programs")
            copy = shutil.copytree(ROOT / "sandbox", tmp_path_factory.mktemp("old-kernel") / "sandbox")
            text = (copy / "confine.py").read_text()
            assert "LEAST_LANDLOCK = 3\n" in text
            (copy / "confine.py").write_text(text.replace("LEAST_LANDLOCK = 3\n", "LEAST_LANDLOCK = 99\n"))
            patch.setattr(sandbox, "JAILER", copy / "jailer.py")
        try:
            harmless = run_program("import os; print(os.getuid())", mode=mode)
        except ValueError as error:
            pytest.skip(str(error))
        if harmless.status != "ok":
            pytest.skip(f"mode {mode} runs nothing here: {harmless.stderr}")
        assert harmless.stdout.strip() != "0", "nothing hostile is run as root"
        assert any("Landlock" in name for name in harmless.missing) == (request.param == "bare")
        yield request.param, mode


@pytest.fixture(scope="module")
def mode(column):
    if column[0] == "bare":
        pytest.skip("as in mode limits")
    return column[1]


def named(comm: str) -> list[int]:
    """Processes of this machine that gave themselves the name ``comm``."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "comm").read_text().strip() == comm and "Z" not in (folder / "stat").read_text().split(")")[1][
                :3
            ]:
                found.append(int(folder.name))
        except (FileNotFoundError, ProcessLookupError):
            pass  # ended meanwhile
    return found


def rename(comm: str) -> str:
    """A program's first line: takes a name that its children inherit."""
    return f"import os, sys, time\nopen('/proc/self/comm', 'w').write({comm!r})\n"


def outside(target: str) -> str:
    """Runs statements, and prints the error that stopped them."""
    lines = "".join(f"    {line}\n" for line in target.split("\n"))
    code = f"import os, resource, signal, socket, fcntl, time\n{LIBC}try:\n{lines}    print('DONE')\n"
    return code + "except (OSError, MemoryError) as e:\n    print('refused', e)\n"


def attacks(victim: int, caller: int, folder: Path, parent: str) -> dict[str, list[str]]:
    """Row of the table -> programs that print DONE where they succeed. ``parent``: what the jailer is to a program."""
    secret, common = folder / "secret", folder / "common"
    memory = "f = open('/proc/{}/mem', 'r+b')"
    pipe = "r, w = os.pipe()\n"
    clone = "0x10000000 | 17, None, None, None, None"  # CLONE_NEWUSER, SIGCHLD
    number = {"x86_64": 56, "aarch64": 220}[os.uname().machine]
    return {
        "read your files": [f"open({str(secret)!r}).read()", f"open({__file__!r}).read()"],
        "write your files": [
            f"open({str(secret)!r}, 'r+').write('gone')",
            f"os.truncate({str(secret)!r}, 1)",
            f"os.link({str(secret)!r}, {str(secret) + '2'!r})",
            f"os.unlink({str(folder / 'spare')!r})",
            f"os.rename({str(secret)!r}, {str(secret) + '3'!r})",
        ],
        "change the mode, owner or date of your files": [
            f"os.chmod({str(secret)!r}, 0o777)",
            f"os.utime({str(secret)!r})",
            f"os.chown({str(secret)!r}, os.getuid(), os.getgid())",
            f"os.setxattr({str(secret)!r}, 'user.mark', b'x')",
            f"f = open({os.__file__!r}, 'rb'); os.fchmod(f.fileno(), 0o777)",
        ],
        "leave files where all may write": [f"open({str(common / 'left')!r}, 'w')", f"os.mkdir({str(common / 'd')!r})"],
        "see the names, sizes and dates of your files": [f"os.stat({str(common)!r})"],
        "see which processes there are": [f"os.stat('/proc/{victim}')", f"os.pidfd_open({victim})"],
        "read what other processes were started with": [
            f"open('/proc/{victim}/cmdline').read()",
            f"open('/proc/{victim}/environ').read()",
        ],
        "read or change the memory of the caller": [memory.format(caller), memory.format(victim)],
        "read or change the memory of its jailer": [
            f"f = open('/proc/%d/mem' % {parent}, 'r+b')",
            f"os.listdir('/proc/%d/fd' % {parent})",
            f"ok(libc.ptrace(16, {parent}, None, None))",
        ],
        "send signals": [
            f"os.kill({victim}, signal.SIGKILL)",
            f"os.kill({caller}, signal.SIGURG)",
            f"signal.pidfd_send_signal(os.pidfd_open({victim}), signal.SIGKILL)",
            f"ok(libc.tgkill({victim}, {victim}, 9))",
            f"ok(libc.sigqueue({victim}, 9, None))",
        ],
        "send signals through a pipe (F_SETOWN)": [
            f"{pipe}fcntl.fcntl(r, fcntl.F_SETOWN, {victim})",
            f"{pipe}fcntl.fcntl(r, 15, (1).to_bytes(4, 'little') + ({victim}).to_bytes(4, 'little'))",
            f"{pipe}fcntl.ioctl(r, 0x8901, ({victim}).to_bytes(4, 'little'))",
        ],
        "change limits or priority of other processes": [
            f"resource.prlimit({victim}, resource.RLIMIT_CPU, (1, 1))",
            f"resource.prlimit({victim}, resource.RLIMIT_CPU)",
            f"os.setpriority(os.PRIO_PROCESS, {victim}, 19)",
            f"os.sched_setaffinity({victim}, os.sched_getaffinity(0))",
            f"os.sched_setscheduler({victim}, os.SCHED_IDLE, os.sched_param(0))",
        ],
        "reach the network": [
            "socket.create_connection(('127.0.0.1', {port}), 1)",
            "socket.create_connection(('192.0.2.1', 53), 1)",
            "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 53))",
        ],
        "reach UNIX sockets": [
            "socket.socket(socket.AF_UNIX).connect('\\0scorecast{caller}')",
            "a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM); a.sendto(b'x', '\\0datagram{caller}')",
            "a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM); a.connect({path!r}); a.send(b'x')",
        ],
        "make namespaces of its own": [
            "ok(libc.unshare(0x10000000))",
            f"pid = ok(libc.syscall({number}, {clone}))\nif not pid: os._exit(0)",
            "ok(libc.syscall(435, ctypes.create_string_buffer((0x10000000).to_bytes(8, 'little') + bytes(80)), 88))",
            "ok(libc.mount(b'x', b'/tmp', b'tmpfs', 0, None))",
            "os.chroot('.')",
        ],
        "leave System V memory, queues or keys behind": [
            "ok(libc.shmget(0, 1 << 20, 0o1666))",
            "ok(libc.semget(0, 1, 0o1666))",
            "ok(libc.msgget(0, 0o1666))",
            "ok(libc.syscall({'x86_64': 240, 'aarch64': 180}[os.uname().machine], b'q', 0o102, 0o666, None))",
            "ok(libc.syscall({'x86_64': 248, 'aarch64': 217}[os.uname().machine], b'user', b'k', b'v', 1, -4))",
        ],
        "use more than 32 MiB of disk or memory for files": [
            "for i in range(40):\n    with open(str(i), 'wb') as f: f.write(bytes(1 << 20))"
        ],
        "use `processes` times the memory limit": [
            "for i in range(2):\n    r, w = os.pipe()\n    if not os.fork():\n        x = bytearray(150 << 20)\n"
            "        os.write(w, b'1'); time.sleep(9)\n    assert os.read(r, 1) == b'1'"
        ],
    }


OTHERWISE = {  # rows that tests of their own try
    "read or change the memory of another program",
    "outlive its deadline by forking",
    "leave a folder that cannot be taken away",
}


def test_the_table_names_what_is_tried(tmp_path):
    assert set(table()) == set(attacks(1, 1, tmp_path, "1")) | OTHERWISE


@pytest.fixture(scope="module")
def tried(column):
    """Row of the table -> [(program, result)]. What is contained is tried first, and has changed nothing outside."""
    name, mode = column
    folder = Path(tempfile.mkdtemp())  # not pytest's, which is closed to other users
    (folder / "secret").write_text("hunter2")
    (folder / "spare").write_text("")
    (folder / "common").mkdir()
    os.chmod(folder, 0o711)
    os.chmod(folder / "common", 0o777)
    seen = (folder / "secret").stat()
    listener, unix = socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX)
    datagrams = [socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(2)]
    path = str(folder / "common" / "socket")
    unix.bind(f"\0scorecast{os.getpid()}")
    unix.listen()
    datagrams[0].bind(f"\0datagram{os.getpid()}")
    datagrams[1].bind(path)
    os.chmod(path, 0o777)
    victim = subprocess.Popen(["sleep", "120"], env={"SECRET_TOKEN": "hunter2"})
    parent = "os.getppid()" if mode == "limits" else str(victim.pid)  # in a container it cannot even be named
    found = {}
    try:
        rows = attacks(victim.pid, os.getpid(), folder, parent)
        for row in rows:
            if row.startswith("reach"):
                place = dict(port=listener.getsockname()[1], caller=os.getpid(), path=path)
                rows[row] = [program.format(**place) for program in rows[row]]
        for contained in (True, False):
            programs = [(row, p) for row in rows if table()[row][name] == contained for p in rows[row]]
            results = run_many([outside(program) for _, program in programs], 2, PATIENT, mode=mode)
            for (row, program), result in zip(programs, results, strict=True):
                found.setdefault(row, []).append((program, result))
            if contained:
                now = (folder / "secret").stat()
                assert victim.poll() is None
                assert all(getattr(now, k) == getattr(seen, k) for k in ("st_mode", "st_mtime", "st_nlink", "st_size"))
                assert name == "bare" or [p.name for p in (folder / "common").iterdir()] == ["socket"]
                assert resource.prlimit(victim.pid, resource.RLIMIT_CPU)[0] == resource.RLIM_INFINITY
        yield found
    finally:
        victim.kill()
        victim.wait()
        for opened in (listener, unix, *datagrams):
            opened.close()
        shutil.rmtree(folder)


@pytest.mark.parametrize("row", [row for row in table() if row not in OTHERWISE])
def test_the_table_is_true(column, tried, row):
    """Each program of a row is stopped, or succeeds, as the table says."""
    expected = "refused" if table()[row][column[0]] else "DONE"
    for program, result in tried[row]:
        assert result.status == "ok" and result.stdout.startswith(expected), (program, result)


def test_another_program_is_out_of_reach(column):
    """Two at a time, of one user or each of its own: memory, signals and limits of the other."""
    name, mode = column
    comm = f"other{os.getpid()}"
    tried = []

    def programs():
        ends = "import os, signal\nsignal.signal(10, lambda *_: (print('whole', flush=True), os._exit(0)))\n"
        yield ends + rename(comm) + "time.sleep(15)"
        deadline = time.monotonic() + 10
        while not named(comm) and time.monotonic() < deadline:
            time.sleep(0.02)
        (other,) = named(comm)
        for attack in (f"open('/proc/{other}/mem', 'r+b')", f"os.kill({other}, 9)"):
            tried.append(attack)
            yield outside(attack)
        os.kill(other, signal.SIGUSR1)  # both have been tried

    first, *results = run_many(programs(), 2, PATIENT, mode=mode)
    assert len(tried) == 2 and (first.stdout, first.status) == ("whole\n", "ok")
    contained = table()["read or change the memory of another program"][name]
    assert [r.stdout.split()[0] for r in results] == ["refused" if contained else "DONE", "refused"]


def test_fork_bomb(mode):
    """Without a pause, in sessions of their own where they can be; and a chain whose links live for a moment each."""
    comm = f"bomb{os.getpid()}"
    leave = "    try: os.setsid()\n    except OSError: pass\n"
    bomb = "while True:\n    try:\n        if os.fork(): continue\n    except OSError: pass\n" + leave
    chain = "while True:\n    try:\n        if os.fork(): os._exit(0)\n    except OSError: continue\n" + leave
    chain = "if os.fork(): time.sleep(60)\n" + chain
    for code in (bomb, chain):
        result = run_program(rename(comm) + code, limits=BRIEF, mode=mode)
        assert result.status in ("timeout", "cpu") and named(comm) == [], (code, result)
    counted = "n = 0\nfor i in range(50):\n    try:\n        if not os.fork(): time.sleep(9)\n        n += 1\n"
    counted += "    except OSError: break\nprint(n)"
    result = run_program("import os, time\n" + counted, limits=PATIENT, mode=mode)
    # An ordinary user's limit counts all tasks of the user, which others may start and end meanwhile.
    shared = mode == "limits" and os.geteuid() != 0
    assert result.status == "ok" and (int(result.stdout) < SHORT.processes or shared)


def test_children_die_with_the_program(mode):
    comm = f"orphan{os.getpid()}"
    session = "    try: os.setsid()\n    except OSError: pass\n"
    code = (
        rename(comm) + f"if not os.fork():\n{session}    if not os.fork():\n        time.sleep(60)\n    os._exit(0)\n"
    )
    started = time.monotonic()
    done = run_program(code + "time.sleep(0.3); print('done')", limits=PATIENT, mode=mode)
    assert (done.stdout, done.status) == ("done\n", "ok") and named(comm) == []
    assert time.monotonic() - started < 10  # the orphan holds the output pipe, and is not waited for
    late = run_program(code + "time.sleep(60)", limits=SHORT, mode=mode)
    assert late.status == "timeout" and named(comm) == []


# In a container of namespaces it is memory, which goes with them.
@pytest.mark.parametrize("name", ["d", "long" * 60], ids=["1,500 levels", "120 long names"])
def test_deep_folders_are_taken_away(column, name):
    if column[0] not in ("namespaces", "limits"):
        pytest.skip("as in mode limits")
    _, mode = column
    left = set(Path(tempfile.gettempdir()).glob("sandbox-*"))
    levels = 1500 if name == "d" else 120
    code = f"import os\nfor i in range({levels}):\n    os.mkdir({name!r})\n    os.chdir({name!r})\n"
    code += "open('f', 'w').close(); os.symlink('/', 'up'); os.mkdir('locked', 0); print(i)"
    first, after = run_many([code, "print(2)"], 1, PATIENT, mode=mode)
    assert (first.stdout, first.status) == (f"{levels - 1}\n", "ok"), first
    assert (after.stdout, after.status) == ("2\n", "ok") and first.missing == after.missing
    assert set(Path(tempfile.gettempdir()).glob("sandbox-*")) == left


def test_every_call_of_the_filter_is_refused(mode):
    """With arguments that make it fail otherwise, so that only the filter's error is EPERM."""
    machine = list(confine.MACHINES).index(os.uname().machine)
    refused = confine.calls(confine.EVERYWHERE + (confine.SHARED if mode == "limits" else ""))
    numbers = {name: pair[machine] for name, pair in refused.items() if pair[machine] is not None}
    code = f"{LIBC}numbers = {numbers}\nfor name, number in numbers.items():\n"
    code += "    v = libc.syscall(ctypes.c_long(number), *[ctypes.c_long(-1)] * 6)\n"
    code += "    if v != -1 or ctypes.get_errno() != 1: print(name, v, ctypes.get_errno())\nprint('END')\n"
    code += "print(libc.syscall(ctypes.c_long(1000)), ctypes.get_errno(), libc.syscall(ctypes.c_long(435), None, 0))"
    assert run_program(code, mode=mode).stdout == "END\n-1 38 -1\n"


def test_nothing_outside_is_seen_or_touched(mode):
    """What only the modes that hide files claim."""
    if mode == "limits":
        pytest.skip("mode limits does not claim it")
    attacks = [
        "print(open('/etc/passwd').read())",
        "print(open('/proc/1/mem', 'rb').read(1))",
        "socket.getaddrinfo('localhost.example', 80)",
        f"open({os.path.join(sys.base_prefix, 'lib', 'planted')!r}, 'w')",
        "open('/planted', 'w')",
        "open('/usr/lib/planted', 'w')",
        "os.setuid(0)",
        "os.chroot('/proc/1/root')",
        "os.mknod('disk', 0o60600, os.makedev(8, 0))",
    ]
    for attack, result in zip(attacks, run_many(map(outside, attacks), 2, PATIENT, mode=mode), strict=True):
        assert result.stdout.startswith("refused") and result.status == "ok", (attack, result)
    # All that it may signal is its own.
    everybody = run_program("import os, signal\nos.kill(-1, signal.SIGKILL)\nprint('here')", mode=mode)
    assert everybody.status in ("ok", "error", "killed")


def test_no_privileges(mode):
    code = "print([line.split()[1] for line in open('/proc/self/status') if line.startswith(('CapEff', 'NoNewPrivs'))])"
    assert run_program(code, mode=mode).stdout == "['0000000000000000', '1']\n"


def test_signals_to_the_parent_change_nothing(mode):
    attack = "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\nos.kill(os.getppid(), signal.SIGSTOP)\nprint(1)"
    results = list(run_many([attack, "print(2)", attack, "print(4)"], 1, PATIENT, mode=mode))
    assert [r.stdout for r in results[1::2]] == ["2\n", "4\n"]
    assert {r.status for r in results[::2]} <= {"ok", "error"}


def test_packages_that_roots_programs_cannot_read_are_refused(mode, monkeypatch):
    if os.geteuid() != 0 or mode == "namespaces":
        pytest.skip("of root's programs that share the machine's users")
    with tempfile.TemporaryDirectory() as closed:
        monkeypatch.setattr(sandbox.sysconfig, "get_path", lambda name: closed)
        with pytest.raises(ValueError, match=f"programs are never run as root.*Permission denied.*{closed}"):
            run_program("print(1)", limits=Limits(packages=True), mode=mode)


def test_what_is_missing_is_named_in_every_result(column):
    name, mode = column
    expected = {"limits": ["namespaces"], "bare": ["namespaces", "Landlock"]}.get(name, [])
    for result in run_many(["print(1)", "1/0", "import time; time.sleep(60)"], 1, BRIEF, mode=mode):
        assert [what.partition(":")[0] for what in result.missing] == expected


def test_jailers_of_root_have_users_of_their_own(mode):
    if os.geteuid() != 0 or mode == "namespaces":
        pytest.skip("of root's programs that share the machine's users")
    jailers = [sandbox._Jailer(mode, False) for _ in range(2)]
    users = [re.match(r"\d+", jailer.hello["notes"]["user"])[0] for jailer in jailers]
    for jailer in jailers:
        jailer.close()
    assert len({*users, "0"}) == 3
