"""A command as a process: signals, streams that are gone, errors of the disk, children that end with their parent."""

import errno
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runtime.cli import user_errors
from runtime.process import StopRequest, command
from runtime.staging import HELD, take_lock

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)], ids=lambda n: str(n)
)
def test_a_signal_ends_a_command_with_a_line_and_its_code(number, code, capsys, tmp_path):
    before = signal.getsignal(number)

    @command
    def main(argv=None):
        take_lock(tmp_path)
        (tmp_path / "last.pt").touch()
        signal.raise_signal(number)
        time.sleep(1)
        raise AssertionError("not reached")

    assert main() == code and signal.getsignal(number) is before and not HELD
    says = f"{signal.Signals(number).name}: stopped; the same command with --resume goes on from {tmp_path}/last.pt\n"
    assert capsys.readouterr().err == says


def test_an_error_of_the_disk_is_one_line(capsys):
    @command
    def main(argv=None):
        raise OSError(errno.ENOSPC, "cannot be written", "x.pt")

    assert main() == 1
    assert capsys.readouterr().err.endswith("error: [Errno 28] cannot be written: 'x.pt'\n")


def test_a_loop_is_asked_and_a_second_interrupt_is_at_once(capsys):
    @command
    def main(argv=None):
        stop = StopRequest()
        for number in (signal.SIGHUP, signal.SIGTERM):
            signal.raise_signal(number)
        assert stop.signal == "SIGTERM"  # the loop went on
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("not reached")

    assert main() == 130


def test_an_interrupt_of_a_command_without_a_loop_is_one_line(capsys):
    with pytest.raises(SystemExit) as stopped, user_errors():
        signal.raise_signal(signal.SIGINT)  # to this thread: os.kill's may come to another, and a pause then never ends
        raise AssertionError("not reached")
    assert stopped.value.code == 130
    assert capsys.readouterr().err.endswith(": stopped; the same command does it again\n")


def test_what_is_ignored_stays_ignored(capsys):
    """As nohup has it."""
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:

        @command
        def main(argv=None):
            stop = StopRequest()
            signal.raise_signal(signal.SIGHUP)
            assert stop.signal is None
            return 0

        assert main() == 0
    finally:
        signal.signal(signal.SIGHUP, old)


# Writes to a stream that is gone until the other end is surely closed, then says in a file how it got on.
TALKS = """
import sys, time
from pathlib import Path
from runtime.process import command
@command
def main(argv=None):
    for i in range(200):
        print("line", i, "x" * 200, file=getattr(sys, sys.argv[1]), flush=i % 2 == 0)
        time.sleep(0.001)
    with open(sys.argv[2], "w") as file:
        file.write(f"{file.fileno() > 2}")
    print("done")
    return 7
sys.exit(main())
"""


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("how", ["| head -1", "full device", "closed"])
def test_a_stream_that_is_gone_does_not_end_a_command(tmp_path, stream, how):
    number = {"stdout": 1, "stderr": 2}[stream]
    redirect = {"full device": f"{number}>/dev/full", "closed": f"{number}>&-"}
    line = f"{sys.executable} -c '{TALKS}' {stream} {tmp_path / 'says'}"
    if how == "| head -1":
        line = f"{line} {'2>&1 >&3 3>&-' if number == 2 else ''} | head -1; exit ${{PIPESTATUS[0]}}"
        line = f"exec 3>&1; {line}" if number == 2 else line
    else:
        line = f"{line} {redirect[how]}"
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 7 and (tmp_path / "says").read_text() == "True"
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    if how != "closed":
        other = done.stderr if number == 1 else done.stdout
        assert other.count(f"{stream} is gone (") == 1 and "goes on without it" in other


PARENT = """
import subprocess, sys, time
from runtime.process import end_with_parent
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"], preexec_fn=end_with_parent)
print(child.pid, flush=True)
time.sleep(100)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_child_ends_with_a_parent_that_is_killed():
    parent = subprocess.Popen([sys.executable, "-c", PARENT], cwd=ROOT, stdout=subprocess.PIPE)
    child = int(parent.stdout.readline())
    assert alive(child)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    ends = time.monotonic() + 10
    while alive(child) and time.monotonic() < ends:
        time.sleep(0.02)
    assert not alive(child)


def alive(pid: int) -> bool:
    """Whether there is such a process, and it is no zombie that nobody waits for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
