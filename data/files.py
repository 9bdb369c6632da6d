"""Where the data modules find sets, and what they keep. Every error is a ValueError of one line that names the file or
the set. Text is read by schedules/textlines.py."""

import os
from collections.abc import Callable
from pathlib import Path

from model.weights import first_line
from runtime.folder import write_bytes
from schedules.commandline import package


def lm_data(name: str) -> Path | None:
    """The folder ``name`` in $LM_DATA, None where that is no folder."""
    root = os.environ.get("LM_DATA")
    return Path(root) / name if root and (Path(root) / name).is_dir() else None


def is_set(given: str | Path, name: str) -> bool:
    """Whether ``given`` is the set ``name``: that name, or the folder in $LM_DATA that it stands for. A folder that is
    called so elsewhere is another one."""
    there = lm_data(name)
    return str(given) == name or bool(there and Path(given).expanduser().resolve() == there.resolve())


def one_file(folder: Path, stems: tuple[str, ...], suffixes: tuple[str, ...]) -> Path | None:
    """The file in ``folder`` that is called one of ``stems`` with one of ``suffixes``, in any case and packed as .gz or
    not; None where there is none. Raises ValueError for two."""
    names = {stem + suffix for stem in stems for suffix in suffixes}
    files = folder.iterdir() if folder.is_dir() else ()
    have = sorted(p for p in files if p.name.lower().removesuffix(".gz") in names and p.is_file())
    if len(have) > 1:
        raise ValueError(f"{folder} has both {have[0].name} and {have[1].name} for {stems[0]}; remove one of them")
    return have[0] if have else None


def load_hub(name: str, way_out: str, *arguments, **options):
    """datasets.load_dataset. ``name`` and ``way_out`` are the error's."""
    datasets = package("datasets", f"{name} from the hub", otherwise=way_out)
    try:
        return datasets.load_dataset(*arguments, **options)
    except Exception as error:  # no network, no package, hub errors of several libraries
        why = f"cannot be loaded from the hub ({type(error).__name__}: {first_line(error)[:120]})"
        network = "either give this machine a network"
        raise ValueError(f"{name} {why}; {network}, or {way_out}") from error


def write_cached(path: Path, writer: Callable) -> None:
    """``writer(file)`` fills ``path``, whose folder is made. A reader sees all of the file or none of it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, writer)
    except OSError as error:
        raise ValueError(f"cannot write {path} ({error.strerror}); name another cache folder") from None
