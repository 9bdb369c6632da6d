"""Files and folders appear whole or not at all; one process holds a folder, and a dead one does not."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.staging import LOCK, probe, release_lock, staged, sweep, take_lock, write_bytes

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("last", [None, "b"], ids=["file", "folder"])
def test_what_is_staged_is_there_whole_or_not_at_all(tmp_path, last):
    path = tmp_path / ("ü n" + 250 * "x")  # the longest name has room for its temporary one

    def fill(temporary, text):
        for file in [temporary] if last is None else [temporary / "a", temporary / last]:
            file.write_text(text)

    with pytest.raises(RuntimeError, match="half"), staged(path, last) as temporary:
        fill(temporary, "half")
        raise RuntimeError("half")
    assert not list(tmp_path.iterdir())
    for text in ("one", "two"):
        with staged(path, last) as temporary:
            fill(temporary, text)
            assert temporary.parent == tmp_path
    assert list(tmp_path.iterdir()) == [path]
    assert {f.read_text() for f in ([path] if last is None else path.iterdir())} == {"two"}
    if last is not None:
        (tmp_path / "file").touch()
        with pytest.raises(ValueError, match="is a file"), staged(tmp_path / "file", last):
            pass


def test_an_error_of_the_disk_names_the_file_and_the_way_out(tmp_path):
    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"cannot be written \(No space left on device\); free some space: '.*x.json'"):
        write_bytes(tmp_path / "x.json", full)
    with pytest.raises(OSError, match="its folder is gone: '.*gone/x.json'"):
        write_bytes(tmp_path / "gone" / "x.json", full)

    def other(file):
        open(tmp_path / "input")

    with pytest.raises(OSError, match="No such file or directory: '.*input'"):  # that is not what is written
        write_bytes(tmp_path / "x.json", other)
    assert not list(tmp_path.iterdir())


def test_a_sweep_takes_what_killed_writes_left_files_and_folders(tmp_path):
    for folder in (tmp_path, tmp_path / "adapter"):
        for name in (".tmp-0123", "kept.json"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).touch()
    (tmp_path / ".tmp-4567").mkdir()
    (tmp_path / ".tmp-4567" / "half").touch()
    (tmp_path / ".adapter.12.tmp").mkdir()  # names of before
    (tmp_path / "last.pt.tmp12").touch()
    sweep(tmp_path)
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")) == [
        "adapter",
        "adapter/kept.json",
        "kept.json",
    ]


def test_a_place_where_nothing_can_be_written_is_found_out_and_left_as_it_was(tmp_path):
    (tmp_path / "file").touch()
    for bad in (tmp_path / "file" / "run", Path("/dev/null/run"), tmp_path / (256 * "x"), Path("/proc/run")):
        with pytest.raises(OSError):
            probe(bad)
    probe(tmp_path / "new" / "run")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


HOLDS = "import sys, time; from pathlib import Path; from runtime.staging import take_lock\n"
HOLDS += "take_lock(Path(sys.argv[1])); print('held', flush=True); time.sleep(100)"


def test_one_process_holds_a_folder_until_it_dies(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDS, tmp_path], cwd=ROOT, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    host = os.uname().nodename
    with pytest.raises(ValueError, match=rf"is in use by process {holder.pid} of {host} since 20\d\d-.*another --out"):
        take_lock(tmp_path)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    take_lock(tmp_path)
    take_lock(tmp_path)  # a process may, again
    assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()
    release_lock(tmp_path)
