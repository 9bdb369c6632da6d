"""Safetensors in and out of a folder, one tensor or one shard at a time, and folders that appear whole or not at all.

Reading goes through the file's memory map, so that the memory a load needs is that of what it keeps,
and a folder's contents are known and checked before the first tensor is read.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from model.gpt2_hub import INDEX, WEIGHTS, _read_json


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the files that model.safetensors.index.json names. ValueError where there is neither."""
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if not (folder / INDEX).exists():
        raise ValueError(f"{folder} has neither {WEIGHTS} nor {INDEX}; other formats are not read")
    shards = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(shards, dict) or not all(
        isinstance(name, str) and name == os.path.basename(name) for name in shards.values()
    ):
        raise ValueError(f"{folder / INDEX}: expected a weight_map from tensors to files of the same folder")
    if lacking := [name for name in sorted(set(shards.values())) if not (folder / name).is_file()]:
        raise ValueError(f"{folder} lacks {', '.join(lacking)}, which {INDEX} names; copy it there")
    return [folder / name for name in sorted(set(shards.values()))]


@contextmanager
def _opened(path: Path):
    """safe_open with its errors as one-line ValueErrors that name the file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except FileNotFoundError:
        raise ValueError(f"{path.parent} has no {path.name}") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error


def read_shapes(paths: list[Path]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor in the files, from their headers alone. ValueError for a damaged file, a
    truncated one included, and for a tensor that two files hold."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in paths:
        with _opened(path) as file:
            for name in file.keys():
                if name in shapes:
                    raise ValueError(f"{path} holds {name}, and so does another file of {path.parent}; remove one")
                shapes[name] = tuple(file.get_slice(name).get_shape())
    return shapes


def read_tensors(paths: list[Path]) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor, one after another. A tensor is a view of the mapped file: copy what is to be kept."""
    for path in paths:
        with _opened(path) as file:
            for name in file.keys():
                yield name, file.get_tensor(name)


def check_shapes(found: Mapping[str, tuple], expected: Mapping[str, tuple], says: str) -> None:
    """Raises ValueError, ``says`` and what is missing, unexpected or misshapen, three names of each kind at most."""

    def some(items: list[str]) -> str:
        return ", ".join(items[:3]) + (f" and {len(items) - 3} more" if len(items) > 3 else "")

    wrong = []
    if missing := [name for name in expected if name not in found]:
        wrong.append("missing " + some(missing))
    if unexpected := [name for name in found if name not in expected]:
        wrong.append("unexpected " + some(unexpected))
    if misshapen := [
        f"{name} is {tuple(found[name])} instead of {tuple(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]:
        wrong.append(some(misshapen))
    if wrong:
        raise ValueError(f"{says}: " + "; ".join(wrong))


def write_tensors(folder: Path, sizes: Mapping[str, int], tensor_of: Callable[[str], Tensor], max_bytes: int) -> None:
    """Writes one model.safetensors, or shards of at most ``max_bytes`` with their index, into ``folder``.

    ``sizes``: bytes of each tensor, in the order to write; ``tensor_of(name)`` is asked for a tensor when
    its shard is written, so that no more than one shard is held. A tensor above ``max_bytes`` has a file
    of its own.
    """
    from safetensors.torch import save_file

    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    weight_map = {}
    for i, names in enumerate(shards):
        file = WEIGHTS if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: tensor_of(name).detach().cpu().contiguous() for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = dict(metadata=dict(total_size=sum(sizes.values())), weight_map=weight_map)
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


@contextmanager
def staged(folder: Path, last: str):
    """A temporary folder beside ``folder`` to write to; what it holds moves to ``folder`` when the block ends well.

    A new ``folder`` appears whole or not at all; in one that exists each file is replaced whole, ``last``
    after all others. Raises ValueError where ``folder`` is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; expected the name of a folder to write to")
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.parent / f".{folder.name}.{os.getpid()}.tmp"
    try:
        temporary.mkdir()
        yield temporary
        if not folder.exists():
            os.replace(temporary, folder)
        else:
            for path in sorted(temporary.iterdir(), key=lambda p: p.name == last):
                os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
