"""Checkpoints: torch.save's zip, whose comment holds the SHA-256 of all before it; read only where it is right."""

import hashlib
import zipfile
from pathlib import Path

import torch

from runtime.staging import staged

SAYS, DIGITS = b"scorecast sha256 ", 64
TAIL = 2 + len(SAYS) + DIGITS  # the comment's length, two bytes, and the comment


class _Hashed:
    """A file to write to, in order, that knows the SHA-256 of all but the last two bytes: the length of the comment.
    torch.save makes another error of one of the disk; ``error`` keeps it."""

    def __init__(self, file):
        self.file, self.sha, self.held, self.error = file, hashlib.sha256(), b"", None

    def write(self, data) -> int:
        try:
            self.file.write(data)
        except OSError as e:
            self.error = e
            raise
        end = self.held + bytes(data[-2:])
        if len(data) > 2:
            self.sha.update(self.held)
            self.sha.update(data[:-2])
        elif len(end) > 2:
            self.sha.update(end[:-2])
        self.held = end[-2:]
        return len(data)

    def flush(self) -> None:
        self.file.flush()


def save_checkpoint(path: Path, state: dict, before=lambda: None) -> None:
    """Writes ``state`` atomically; ``before()`` is called when all of it is on the disk, right before it gets its name.
    Raises OSError where the disk takes no more: what stood at ``path`` is still there."""
    with staged(path) as temporary:
        with open(temporary, "wb") as f:
            hashed = _Hashed(f)
            try:
                torch.save(state, hashed)
            except Exception:
                if hashed.error is not None:
                    raise hashed.error from None
                raise
            f.seek(-2, 2)
            f.write((TAIL - 2).to_bytes(2, "little") + SAYS + hashed.sha.hexdigest().encode())
        before()


def load_checkpoint(path: str | Path) -> dict:
    """Reads a checkpoint after its checksum. One of before, without a checksum, is read by its zip's own. Raises
    ValueError naming the file, and an older good one beside it, when it is missing, truncated, corrupt or another's."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no checkpoint {path}{_older(path)}")
    if not _intact(path):
        raise ValueError(f"checkpoint {path} is truncated or corrupt{_older(path)}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # whatever a stranger's bytes do to an unpickler
        raise ValueError(f"{path} is no checkpoint of ours ({(str(e) or repr(e)).splitlines()[0]})") from e
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no checkpoint of ours: it holds no dict")
    return content


def not_finite(value, name: str) -> str:
    """The name of the first tensor in ``value``, tensors in dicts and lists, that is not finite; "" where all are."""
    if isinstance(value, torch.Tensor):
        return "" if not value.is_floating_point() or torch.isfinite(value).all() else name
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return next((found for key, part in parts if (found := not_finite(part, f"{name}: {key}"))), "")


def _older(path: Path) -> str:
    older = path.with_name("previous.pt")
    return f"; an older good one is {older} (pass --resume-from {older})" if older != path and _intact(older) else ""


def _intact(path: Path) -> bool:
    """Whether a checkpoint is what was written: by its SHA-256, or, where it has none, by the zip's CRC-32s."""
    try:
        with open(path, "rb") as f:
            size = f.seek(0, 2)
            f.seek(max(size - TAIL, 0))
            comment = f.read()[2:]
            if not comment.startswith(SAYS):
                whole = comment[-22:-18] == b"PK\x05\x06" and comment[-2:] == b"\0\0"  # ends, and with no comment
                with zipfile.ZipFile(path) as z:
                    return whole and z.testzip() is None
            f.seek(0)
            return _digest(f, size - TAIL).encode() == comment[len(SAYS) :]
    except Exception:  # a damaged zip raises what it likes
        return False


def _digest(f, count: int) -> str:
    """The SHA-256 of the next ``count`` bytes."""
    sha = hashlib.sha256()
    while count and (data := f.read(min(count, 2**24))):
        sha.update(data)
        count -= len(data)
    return sha.hexdigest()
