"""Files and folders that appear whole or not at all, and a lock that a dead process does not hold."""

import datetime
import errno
import json
import logging
import os
import shutil
import socket
import uuid
from contextlib import contextmanager, suppress
from pathlib import Path

from schedules import textlines

try:
    import fcntl
except ImportError:  # Windows, where it is msvcrt that locks
    fcntl = None

# What begins so was cut off while it was written. Short, so that the longest name still has its temporary one.
TEMPORARY = ".tmp-"
LOCK = "lock"
HELD: dict[Path, int] = {}  # the locks of this process: folder -> open file


@contextmanager
def staged(path: Path, last: str | None = None):
    """A temporary name beside ``path`` to write to; what stands there becomes ``path`` when the block ends well.

    Without ``last`` the block writes a file. With it, it fills a folder that is there: a new ``path`` appears whole, in
    one that exists each file is replaced whole, ``last`` after all others. All is on the disk before it is renamed.
    After an error nothing is left; `sweep` removes what a kill leaves. Raises ValueError where a folder is wanted
    and ``path`` is a file, OSError naming ``path`` where it cannot be written."""
    path = Path(path).absolute()
    if last is not None and (path.is_symlink() or path.exists()) and not path.is_dir():
        raise ValueError(f"{path} is a file; expected the name of a folder to write to")
    temporary = path.with_name(f"{TEMPORARY}{uuid.uuid4().hex[:12]}")
    try:
        if last is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.mkdir()
        yield temporary
        for file in [temporary] if temporary.is_file() else (f for f in temporary.rglob("*") if f.is_file()):
            with open(file, "rb+") as f:  # Windows syncs what may be written to alone
                os.fsync(f.fileno())
        if last is None or not path.exists():
            os.replace(temporary, path)
        else:
            for file in sorted(temporary.iterdir(), key=lambda f: f.name == last):
                os.replace(file, path / file.name)
    except OSError as e:
        if e.filename and TEMPORARY not in str(e.filename):
            raise  # of another file, which the block reads
        raise OSError(e.errno, f"cannot be written ({e.strerror}){WAYS_OUT.get(e.errno, '')}", str(path)) from e
    finally:
        remove(temporary)


# What to do about an error of the file system, by its number.
WAYS_OUT = {
    errno.ENOSPC: "; free some space",
    errno.EDQUOT: "; free some of your quota",
    errno.EFBIG: "; raise the limit on a file's size (ulimit -f)",
    errno.EROFS: "; it is on a read-only file system",
    errno.ENOENT: "; its folder is gone",
}


def remove(path: Path) -> None:
    """Takes a file or a folder away, where there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Removes what killed writes left in ``folder``, files and folders, those of older versions too. Only for who holds
    its lock."""
    for path in [*folder.glob("*.tmp*"), *folder.rglob(f"{TEMPORARY}*")]:
        remove(path)


def write_bytes(path: Path, writer) -> None:
    """Atomic: ``writer(file)`` fills a temporary file, which is flushed to disk and renamed to ``path``."""
    with staged(path) as temporary, open(temporary, "wb") as f:
        writer(f)


def probe(path: Path) -> None:
    """Raises OSError, having left nothing, where no folder ``path`` can be made or written to."""
    there = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    temporary = there / f"{TEMPORARY}{uuid.uuid4().hex[:12]}"
    try:
        temporary.mkdir()
        (temporary / path.name).mkdir()  # a name too long, or with characters that are not allowed here
    except OSError as e:
        raise OSError(e.errno, f"cannot be written ({e.strerror})", str(path)) from e
    finally:
        remove(temporary)


def take_lock(folder: Path) -> None:
    """Holds ``folder`` until this process ends, however it ends, or `release_lock`. A process may take it again.

    Raises ValueError, saying who holds it, where another one does. Where the file system knows no locks a line says so
    and nothing is held."""
    folder = folder.absolute()
    release_lock(folder)
    while True:
        file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock(file)
        except BlockingIOError:
            says = os.read(file, 1000).decode(errors="replace")
            os.close(file)
            raise ValueError(f"{folder} is in use{_holder(says)}; let it end, or give another --out") from None
        except OSError as e:
            os.close(file)
            logging.getLogger("scorecast").warning(
                f"{folder} cannot be locked ({e.strerror}): start one run in it only"
            )
            return
        with suppress(OSError):
            if os.fstat(file).st_ino == os.stat(folder / LOCK).st_ino:
                break
        os.close(file)  # its folder was replaced in this moment
    HELD[folder] = file
    since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    os.ftruncate(file, 0)
    os.write(file, json.dumps({"host": socket.gethostname(), "process": os.getpid(), "since": since}).encode())


def _lock(file: int) -> None:
    """Locks an open file. Raises BlockingIOError where another process has it."""
    if fcntl:
        return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    import msvcrt

    os.lseek(file, 1 << 20, os.SEEK_SET)  # a byte behind the text: who may not have the lock may read whose it is
    try:
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
    except PermissionError:
        raise BlockingIOError from None
    finally:
        os.lseek(file, 0, os.SEEK_SET)


def _holder(says: str) -> str:
    try:
        held = json.loads(says)
        return f" by process {held['process']} of {held['host']} since {held['since']}"
    except (ValueError, KeyError, TypeError):
        return ""  # it has just been taken


def let_go(folder: Path) -> bool:
    """Whether the process that held ``folder`` last has ended, as its lock and this machine's list of processes say;
    False where they cannot. It takes no lock, so that nobody is refused because somebody looked."""
    try:
        held = textlines.read_json(folder / LOCK, dict)
    except (OSError, ValueError):
        return False
    if held.get("host") != socket.gethostname() or not os.path.exists("/proc/self"):
        return False
    return isinstance(held.get("process"), int) and not os.path.exists(f"/proc/{held['process']}")


def release_lock(folder: Path) -> None:
    """Lets ``folder`` go, where this process holds it."""
    if (file := HELD.pop(folder.absolute(), None)) is not None:
        os.close(file)
