"""The sandbox in every mode that this machine allows: what programs get, how they end, and what is refused."""

import ctypes.util
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest

from sandbox import MODES, UNSAFE, Limits, confine, probe, run_many, run_program
from sandbox import run as sandbox
from sandbox.__main__ import main

SHORT = Limits(seconds=1, cpu_seconds=1, memory_bytes=256 << 20)
PATIENT = replace(SHORT, seconds=20)  # where something else has to end the program, on a busy machine too


@pytest.fixture(scope="module", params=MODES)
def mode(request):
    try:
        jailer = sandbox._Jailer(request.param, False)
    except ValueError as error:
        pytest.skip(str(error))
    jailer.close()
    result = run_program("print(1)", mode=request.param)
    if result.status != "ok":
        pytest.skip(f"mode {request.param} runs nothing here: {result.stderr}")
    return request.param


def named(comm: str) -> list[int]:
    """Processes of this machine that gave themselves the name ``comm``."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "comm").read_text().strip() == comm:
                found.append(int(folder.name))
        except (FileNotFoundError, ProcessLookupError):
            pass  # ended meanwhile
    return [pid for pid in found if "Z" not in Path(f"/proc/{pid}/stat").read_text().split(")")[1][:3]]


def rename(comm: str) -> str:
    """A program's first line: takes a name that its children inherit."""
    return f"import os, sys, time\nopen('/proc/self/comm', 'w').write({comm!r})\n"


def test_text_in_text_out(mode):
    code = "import sys\nprint(sys.stdin.read().upper())\nprint('to stderr', file=sys.stderr)"
    result = run_program(code, "grüße\n", mode=mode)
    assert result[:4] == ("GRÜSSE\n\n", "to stderr\n", "ok", 0) and 0 < result.seconds < 10
    # Bytes that are no text, and text that is no UTF-8, arrive as something and break nothing.
    assert run_program(r"import os; os.write(1, b'\xff\x00ok')", mode=mode).stdout == "\ufffd\x00ok"
    assert run_program("print('a\ud800')", mode=mode).status == "ok"
    assert run_program("print(1)\0", mode=mode).status == "error"
    assert run_program("print(", mode=mode).status == "error"


@pytest.mark.parametrize("packages", [False, True], ids=["bare", "packages"])
def test_exit_and_quit_are_there(mode, packages):
    """As in a plain `python program.py`; the output before them has been written."""
    limits = Limits(packages=packages, memory_bytes=2 << 30)
    codes = ["print(1)\nexit()", "print(1)\nquit(0)", "print(1)\nexit(3)", "print(1, __name__)\nraise SystemExit"]
    found = [(r.stdout.split()[0], r.status, r.code) for r in run_many(codes, 1, limits, mode=mode)]
    assert found == [("1", "ok", 0), ("1", "ok", 0), ("1", "error", 3), ("1", "ok", 0)]


def test_environment_and_scratch_are_clean(mode, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    code = "import os, sys; print(os.environ, sys.argv[1:], sys.flags.isolated, sys.flags.no_site); print(os.listdir())"
    code += "\nprint(sorted(os.listdir('/proc/self/fd')))"  # the fourth is the listing's own
    code += "\nopen('left', 'w').write('x'); os.mkdir('locked', 0o000); print(os.getcwd())"
    first, second = run_many([code, code], 1, mode=mode)
    assert first.status == second.status == "ok", first.stderr
    shown, files, open_files, folder = first.stdout.splitlines()
    assert "hunter2" not in shown and shown.endswith("[] 1 1") and files == "[]"
    assert open_files == "['0', '1', '2', '3']"
    assert second.stdout.splitlines()[1] == "[]"
    if mode == "limits":
        assert not Path(folder).parent.exists()  # taken away, the locked folder too


@pytest.mark.parametrize(
    "code, status",
    [
        ("import os; print(7); os._exit(3)", "error"),
        ("import sys; sys.exit('no')", "error"),
        ("x = bytearray(10 << 30)", "memory"),
        ("while True: print('ha' * 1000)", "output"),
        ("import sys\nwhile True: sys.stderr.write('ha' * 1000)", "output"),
        ("import os; os.write(1, bytes(60000)); os.write(1, bytes(5537)); os._exit(0)", "output"),  # one byte too many
        ("import time; time.sleep(60)", "timeout"),
        ("while True: pass", "cpu"),
        ("def f(): f()\nf()", "error"),
        ("import ctypes; ctypes.string_at(0)", "killed"),
        ("open('big', 'wb').write(bytes(2 << 20))", "error"),
        ("files = [open('f', 'w') for i in range(100)]", "error"),
        ("import os; os.close(0); os.close(1); os.close(2)", "ok"),
    ],
)
def test_ends(mode, code, status):
    limits = SHORT if status == "timeout" else PATIENT
    result = run_program(code, limits=limits, mode=mode)
    assert result.status == status, result
    assert len(result.stdout) <= limits.output_bytes and len(result.stderr) <= limits.output_bytes
    # The deadline, plus starting and killing: 5 s for a machine that is busy with other things.
    assert result.seconds < limits.seconds + 5


def test_what_was_printed_before_the_end_comes_back(mode):
    hangs = run_program("print(42, flush=True)\nimport time\nwhile True: time.sleep(1)", limits=SHORT, mode=mode)
    assert (hangs.stdout, hangs.status, hangs.code) == ("42\n", "timeout", None)
    leaves = run_program("import os; print(42, flush=True); os._exit(0)", mode=mode)
    assert (leaves.stdout, leaves.status, leaves.code) == ("42\n", "ok", 0)
    # Recursion deeper than the stack: a crash of the interpreter, which is the program's and not ours.
    deep = run_program(
        "import sys; print(42, flush=True); sys.setrecursionlimit(10**9)\nclass A:\n"
        "    def __getattr__(self, n): return getattr(self, n + 'x')\nA().a",
        limits=SHORT,
        mode=mode,
    )
    assert deep.stdout == "42\n" and deep.status in ("killed", "error", "memory", "cpu", "timeout")


def test_a_lost_jailer_is_replaced():
    results = run_many(["print(0)", "import time; time.sleep(60)", "print(2)"], 1)
    assert next(results).stdout == "0\n"
    running = results.gi_frame.f_locals["jailers"][0]
    running._process.kill()  # as the machine's out-of-memory killer would
    lost, after = results
    assert (lost.status, lost.code) == ("lost", None) and after.stdout == "2\n"


@pytest.mark.parametrize("slow", ["_die_with(jailer)", "_die_with(guard)"], ids=["guard", "init"])
def test_what_is_just_starting_dies_with_its_jailer(mode, slow, tmp_path, monkeypatch):
    """It is killed before the new process could ask to be told."""
    copy = shutil.copytree(sandbox.JAILER.parent, tmp_path / "sandbox")
    text = (copy / "jailer.py").read_text()
    assert text.count(f"        {slow}\n") == 1
    (copy / "jailer.py").write_text(text.replace(slow, f"time.sleep(0.5); {slow}"))
    monkeypatch.setattr(sandbox, "JAILER", copy / "jailer.py")
    comm = f"young{os.getpid()}"
    jailer = sandbox._Jailer(mode, False)
    jailer.send(rename(comm) + "time.sleep(60)", "", PATIENT)
    time.sleep(0.2)
    jailer._process.kill()
    lost = jailer.receive()
    jailer.close()
    assert lost.status == "lost" and lost.seconds < 5 and named(comm) == []


def test_results_come_in_order_and_programs_are_taken_as_needed():
    taken = []

    def programs():
        for i in range(40):
            taken.append(i)
            yield f"import time; time.sleep({0.2 if i % 8 == 0 else 0}); print({i})"

    outputs = []
    for result in run_many(programs(), 2):
        outputs.append(int(result.stdout))
        assert len(taken) - len(outputs) <= 4 * 2
    assert outputs == list(range(40)) and list(run_many([])) == []


@pytest.mark.parametrize("how", ["given up", "an error of the source"])
def test_all_is_killed_when_the_iteration_ends(mode, how):
    comm = f"left{os.getpid()}"
    folders = set(Path(tempfile.gettempdir()).glob("sandbox-*"))

    def programs():
        yield "print(0)"
        yield rename(comm) + "time.sleep(60)"
        if how != "given up":
            raise KeyError("no more")

    results = run_many(programs(), 2, mode=mode)
    assert next(results).stdout == "0\n"
    if how == "given up":
        results.close()
    else:
        with pytest.raises(KeyError):
            list(results)
    wait_for_none(comm)
    assert set(Path(tempfile.gettempdir()).glob("sandbox-*")) <= folders


def test_nothing_is_left_when_the_caller_is_killed():
    comm = f"caller{os.getpid()}"
    code = f"from sandbox import run_program; run_program({rename(comm) + 'time.sleep(60)'!r})"
    caller = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    deadline = time.monotonic() + 20
    while not named(comm):
        assert time.monotonic() < deadline and caller.poll() is None, "the program did not start"
        time.sleep(0.05)
    caller.send_signal(signal.SIGKILL)
    caller.wait()
    wait_for_none(comm)


def wait_for_none(comm: str) -> None:
    deadline = time.monotonic() + 5  # the kill is not waited for; it takes milliseconds
    while named(comm):
        assert time.monotonic() < deadline, "a process is left"
        time.sleep(0.05)


def test_installed_packages_only_where_asked(mode):
    code = "import numpy, sys; print(numpy.arange(3).sum(), __name__, sys.argv[1:])"
    assert "ModuleNotFoundError" in run_program(code, mode=mode).stderr
    # numpy maps more than it uses: 2 GiB of addresses.
    result = run_program(code, limits=Limits(packages=True, memory_bytes=2 << 30), mode=mode)
    assert (result.stdout, result.status) == ("3 __main__ []\n", "ok"), result.stderr


def test_speed():
    """1,319 programs in 60 s on two cores are 132 in 12 s of processor time, whatever else the machine does."""

    def used() -> float:
        of_children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return of_children.ru_utime + of_children.ru_stime

    before = used()
    assert all(r.stdout == "3\n" for r in run_many(["print(1 + 2)"] * 132, 2))
    assert 0.5 < used() - before < 12


def test_bad_arguments():
    with pytest.raises(ValueError, match="unknown mode 'chroot', expected one of namespaces"):
        run_program("", mode="chroot")
    with pytest.raises(ValueError, match="workers=0"):
        run_many([], 0)
    with pytest.raises(ValueError, match="memory_bytes=0, expected a limit above 0"):
        Limits(memory_bytes=0)
    with pytest.raises(ValueError, match="a program is a bytes"):
        list(run_many([b"print(1)"]))


@pytest.fixture
def closed(tmp_path, monkeypatch):
    """Jailers are started by an interpreter that root alone can run."""
    if os.geteuid() != 0:
        pytest.skip("only root can be refused for what other users may not")
    monkeypatch.setattr(
        sys, "_base_executable", shutil.copy(os.path.realpath(sys._base_executable), tmp_path / "python")
    )
    tmp_path.chmod(0o700)


def test_programs_of_root_are_refused_where_they_would_run_as_root(closed):
    with pytest.raises(ValueError, match="no sandbox of mode limits: programs are never run as root, and user 60") as e:
        run_program("import os; print(os.getuid())", mode="limits")
    ways = ("an ordinary user", "bubblewrap", "every user may read", "--unsafe-run-as-me")
    assert "\n" not in str(e.value) and all(way in str(e.value) for way in ways)
    with pytest.raises(ValueError, match="bubblewrap: (bwrap is not installed|programs are never run as root)"):
        run_program("import os; print(os.getuid())", mode="bubblewrap")


def test_unsafe_is_asked_for_and_says_what_it_gives_away_each_time(caplog):
    sandbox._warn.cache_clear()
    results = list(run_many(["import os; print(os.getuid())"] * 3, 1, mode=UNSAFE))
    assert [r.stdout for r in results] == [f"{os.getuid()}\n"] * 3
    for result in results:
        assert any(f"user {os.getuid()} may" in what for what in result.missing)
        assert (os.getuid() == 0) == any("limit on processes" in what for what in result.missing)
    (said,) = [r.getMessage() for r in caplog.records if "sandbox" in r.getMessage()]
    assert said.startswith(f"sandbox: programs run in mode {UNSAFE}, without ") and results[0].missing[0] in said


def test_a_kernel_that_takes_no_filter(tmp_path, monkeypatch):
    """Mode limits is refused; the others name it in each result."""
    copy = shutil.copytree(sandbox.JAILER.parent, tmp_path / "sandbox")
    text = (copy / "confine.py").read_text()
    assert (machines := 'MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}\n') in text
    (copy / "confine.py").write_text(text.replace(machines, "MACHINES = {}\n"))
    monkeypatch.setattr(sandbox, "JAILER", copy / "jailer.py")
    with pytest.raises(ValueError, match="mode limits: this kernel takes no system call filter from us; ways out"):
        run_program("print(1)", mode="limits")
    try:
        results = list(run_many(["print(1)", "print(2)"], 1, mode="namespaces"))
    except ValueError as error:
        pytest.skip(str(error))
    assert [r.stdout for r in results] == ["1\n", "2\n"]
    assert all(any("system call filter" in what for what in r.missing) for r in results)


def test_the_filters_numbers_are_libseccomps():
    library = ctypes.util.find_library("seccomp")
    if not library:
        pytest.skip("libseccomp is not installed")
    resolve = ctypes.CDLL(library).seccomp_syscall_resolve_name_arch
    known = confine.calls(confine.EVERYWHERE + confine.SHARED) | {name: pair for name, pair, *_ in confine.BY_ARGUMENT}
    known["clone3"] = (confine.CLONE3,) * 2
    assert len(known) > 80
    for name, numbers in known.items():
        found = [resolve(architecture, name.encode()) for architecture in confine.MACHINES.values()]
        assert [n if n >= 0 else None for n in found] == list(numbers), name


def test_a_mode_that_cannot_be_had_says_why(monkeypatch):
    monkeypatch.setattr(sandbox, "JAILER", Path("/nonexistent/jailer.py"))
    with pytest.raises(ValueError, match="no sandbox of mode limits: the jailer did not start"):
        run_program("print(1)", mode="limits")


def test_probe(capsys):
    main(["--probe"])
    out = capsys.readouterr().out
    assert f"{probe().mode:20}in force" in out and "memory_bytes" in out
    assert all(f"{'without':20}{what}\n" in out for what in probe().missing)
    main(["--probe", f"--{UNSAFE}"])
    assert f"{UNSAFE:20}in force\n{'without':20}another user: " in capsys.readouterr().out


def test_none_among_the_programs_is_an_error():
    with pytest.raises(ValueError, match="NoneType"):
        list(run_many(["print(1)", None, "print(2)"], workers=1))
