"""Folders in Hugging Face's layout: config.json, safetensors and a tokenizer's files, read and written.

A folder is checked before its first tensor is read, and a folder that is written appears whole or not at all. Tensors
are read through the file's memory map, one after the other, so that a load needs the memory of what it keeps.
"""

import json
import math
import os
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from runtime.staging import staged
from schedules import textlines

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
# What wraps a model puts this into its tensors' names: torch.compile, FSDP and activation checkpointing anywhere,
# DataParallel and DDP in front.
WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.|^(?:module\.)+")
MODEL_FILES = (CONFIG, WEIGHTS, INDEX, "model-*.safetensors")


def first_line(error: BaseException) -> str:
    """The first line of what an error says."""
    return str(error).strip().split("\n")[0]


def folder_of(folder_or_hub_id: str | os.PathLike, files: tuple[str, ...] = MODEL_FILES) -> Path:
    """The local folder itself, or the local copy of those ``files`` (patterns) of a repository on the hub. Raises
    ValueError for what is neither, and for a hub that cannot be reached."""
    folder, name = Path(folder_or_hub_id), str(folder_or_hub_id)
    if folder.is_dir():
        return folder
    way_out = f"pass a local folder that holds {' and '.join(files[:2])}"
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name) or folder.exists():
        raise ValueError(f"{name!r} is neither a folder nor a model's name on the hub; {way_out}")
    try:
        import huggingface_hub

        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(files)))
    except Exception as error:  # no package, no network, no such model, no access: all have the same way out
        missing = f"no folder {name!r} here, and the hub gave none ({first_line(error)})"
        raise ValueError(f"{missing}; {way_out}") from error


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises ValueError for a file that is missing or holds anything else."""
    if not path.exists():
        raise ValueError(f"{path.parent} has no {path.name}; expected a folder in Hugging Face's layout")
    return textlines.read_json(path, dict, advice="copy the model's again")


def tokenizer_config(files: Mapping[str, bytes], where: str | os.PathLike) -> dict:
    """What tokenizer_config.json among a model's ``files`` (name -> content) says, and as "chat_template" the source of
    the template, from whatever file: chat_template.jinja goes before, of several the one named default is taken, and
    None is none. ``where`` names the model in errors. Raises ValueError for anything else."""
    name = f"{where}: tokenizer_config.json"
    config = textlines.parse_json(files.get("tokenizer_config.json", b"{}"), name, advice="copy the model's")
    if not isinstance(config, dict):
        raise ValueError(f"{name} is no JSON object; copy the model's")
    source = config.get("chat_template")
    if "chat_template.jinja" in files:
        source = textlines.decoded(files["chat_template.jinja"], f"{where}: chat_template.jinja")
    if isinstance(source, list):
        named = (t for t in source if isinstance(t, dict) and t.get("name") == "default")
        source = next(named, {}).get("template", source)
    if source and not isinstance(source, str):
        raise ValueError(f"{where}: chat_template of tokenizer_config.json is no text, and none is named 'default'")
    return config | {"chat_template": source or None}


def check_fields(path: Path, fields: dict, required: Iterable[str], allowed: Mapping[str, tuple]) -> None:
    """Raises ValueError for a ``required`` field that is missing and for an option that has no ``allowed`` value.

    The allowed values of an option mean the same function; the first of them is what a missing option means."""
    if missing := [name for name in required if fields.get(name) is None]:
        raise ValueError(f"{path} does not say {', '.join(missing)}")
    for name, values in allowed.items():
        if fields.get(name, values[0]) not in values:
            raise ValueError(f"{path}: {name}={fields[name]!r} is not supported; expected {values[0]!r}")


@contextmanager
def kinds_of(path: Path):
    """Around what reads the values of a config: one of the wrong kind is a ValueError of one line as well."""
    try:
        yield
    except (TypeError, AttributeError, LookupError, ArithmeticError) as error:
        says = f"{path} holds a value of the wrong kind ({first_line(error)}); copy the model's again"
        raise ValueError(says) from error


def weight_files(folder: Path, single: str = WEIGHTS, index: str = INDEX) -> list[Path]:
    """The file ``single``, or the files that ``index`` names. ValueError where there is neither."""
    if (folder / single).exists():
        return [folder / single]
    if not (folder / index).exists():
        raise ValueError(f"{folder} has neither {single} nor {index}; other formats are not read")
    shards = read_json(folder / index).get("weight_map")
    names = shards.values() if isinstance(shards, dict) else [None]
    if not all(isinstance(name, str) and name == os.path.basename(name) for name in names):
        raise ValueError(f"{folder / index}: expected a weight_map from tensors to files of the same folder")
    paths = [folder / name for name in sorted(set(names))]
    if lacking := [path.name for path in paths if not path.is_file()]:
        raise ValueError(f"{folder} lacks {', '.join(lacking)}, which {index} names; copy it there")
    return paths


@contextmanager
def _opened(path: Path):
    """safe_open with its errors as one-line ValueErrors that name the file."""
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except FileNotFoundError:
        raise ValueError(f"{path.parent} has no {path.name}") from None
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error


def plain_name(name: str) -> str:
    """A tensor's name without what wraps the model that saved it."""
    while (plain := WRAPPERS.sub("", name)) != name:
        name = plain
    return name


def plain_names(tensors: Mapping, where: str | os.PathLike) -> dict:
    """The same under `plain_name`. Raises ValueError where two become one."""
    out = {plain_name(name): tensor for name, tensor in tensors.items()}
    if len(out) < len(tensors):
        twice = next(n for n, count in Counter(map(plain_name, tensors)).items() if count > 1)
        raise ValueError(f"{where} holds {twice} with and without a wrapper's prefix; remove one")
    return out


def read_shapes(paths: list[Path]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor in the files, by `plain_name`, from their headers alone. Raises ValueError for a
    damaged file, a truncated one included, and for a tensor that is there twice."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in paths:
        with _opened(path) as file:
            found = plain_names({name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}, path)
        if twice := next((name for name in found if name in shapes), None):
            raise ValueError(f"{path} holds {twice}, and so does another file of {path.parent}; remove one")
        shapes |= found
    return shapes


def read_tensors(paths: list[Path]) -> Iterator[tuple[str, Tensor]]:
    """`plain_name` and tensor, one after another. A tensor is a view of the mapped file: copy what is to be kept."""
    for path in paths:
        with _opened(path) as file:
            for name in file.keys():
                yield plain_name(name), file.get_tensor(name)


def load_pickled(path: str | os.PathLike, says: str, **how):
    """torch.load onto the CPU that runs no code. Raises ValueError, ``says`` and why, for a file it cannot read."""
    if not Path(path).is_file():
        raise ValueError(f"{path} {says}: {'it is a folder' if Path(path).is_dir() else 'there is no such file'}")
    zipped = zipfile.is_zipfile(path)  # a file of torch before 1.6 is none, and cannot be mapped
    try:
        return torch.load(path, map_location="cpu", weights_only=True, **(how if zipped else {}))
    except Exception as error:  # whatever a stranger's bytes do to an unpickler
        why = first_line(error) if zipped or isinstance(error, OSError) else "torch.save has not written it"
        raise ValueError(f"{path} {says}: {why}") from error


def read_checkpoint(run: str | os.PathLike) -> tuple[Path, dict, dict]:
    """(the file, its content, what that says of the tokenizer) of a training checkpoint, or of a run's folder, best.pt,
    else last.pt: a ``torch.save`` dict with "model", a state_dict, whose names come plain, and "model_config". Raises
    ValueError for what is none; a stranger's file cannot run code."""
    if Path(run).is_dir():
        there = [Path(run) / name for name in ("best.pt", "last.pt") if (Path(run) / name).is_file()]
        if not there:
            raise ValueError(f"{run} holds neither best.pt nor last.pt; expected a run's folder or a checkpoint")
        run = there[0]
    content = load_pickled(run, "cannot be read as a checkpoint", mmap=True)
    if not isinstance(content, dict) or not {"model", "model_config"} <= content.keys():
        raise ValueError(f"{run} is no training checkpoint: expected a dict with 'model' and 'model_config'")
    if not holds_tensors(content["model"]) or not isinstance(content["model_config"], dict):
        raise ValueError(f"{run}: 'model' must hold a state_dict, names and tensors, and 'model_config' a dict")
    if not isinstance(tokenizer := content.get("tokenizer") or {}, dict):
        raise ValueError(f"{run}: 'tokenizer' must hold a dict of 'files' and 'eos_id'")
    return Path(run), content | {"model": plain_names(content["model"], run)}, tokenizer


def holds_tensors(content) -> bool:
    return isinstance(content, dict) and all(isinstance(t, Tensor) for t in content.values())


def check_layers(names: Iterable[str], expected: int, says: str) -> None:
    """Raises ValueError, which begins with ``says``, where a config has more blocks than the files ``names`` come from:
    before a model of a million of them is built. Blocks are "h.0", "layers.0", an encoder's and a decoder's apart."""
    found = {match[0] for name in names if (match := re.search(r"(.*\.)?(h|layers)\.\d+\.", name))}
    if expected > len(found):
        raise ValueError(f"{says}: {expected:,} blocks by its config, {len(found):,} in its files")


def check_shapes(found: Mapping[str, Tensor | tuple], expected: Mapping[str, Tensor | tuple], says: str) -> None:
    """Raises ValueError: ``says``, then the tensors that are missing, unexpected or misshapen, three of a kind. Either
    side gives each tensor itself or its shape."""
    found, expected = ({n: tuple(getattr(t, "shape", t)) for n, t in side.items()} for side in (found, expected))
    wrong = {
        "missing ": [n for n in expected if n not in found],
        "unexpected ": [n for n in found if n not in expected],
        "": [f"{n} is {found[n]} instead of {s}" for n, s in expected.items() if found.get(n, s) != s],
    }
    parts = [
        kind + ", ".join(items[:3]) + (f" and {len(items) - 3} more" if len(items) > 3 else "")
        for kind, items in wrong.items()
        if items
    ]
    if parts:
        raise ValueError(f"{says}: " + "; ".join(parts))


def drop_tied(tensors: dict[str, Tensor], name: str, copies: Iterable[str], folder: Path) -> None:
    """Leaves tensor ``name`` alone where the file holds ``copies`` of it too. Raises ValueError where one differs."""
    for copy in copies:
        tied = tensors.pop(copy, None)
        if tied is not None and not torch.equal(tied, tensors.setdefault(name, tied)):
            raise ValueError(f"{folder}: {copy} differs from {name}; the model here ties the two")


def write_model(
    folder: str | os.PathLike,
    fields: dict,
    dtype: torch.dtype,
    tensors: Mapping[str, Tensor],
    files: Mapping[str, bytes] | None,
    tensor_of: Callable[[str], Tensor] | None = None,
    max_bytes: float = math.inf,
    what: str = "tokenizer file",
) -> None:
    """Writes config.json with ``fields``, the tensors in ``dtype``, and ``files`` (name -> content) beside them.

    ``tensors`` stand in the order to write: in one model.safetensors, or shards of at most ``max_bytes`` with their
    index; a larger tensor has a file of its own. With ``tensor_of`` they say sizes alone: ``tensor_of(name)`` is asked
    for each when its shard is written, so that no more than one shard is held. Raises ValueError, before anything is
    written, for ``files`` (each a ``what``) that cannot stand beside the model's own."""
    for name, content in (files or {}).items():
        own = name in ("", ".", "..", INDEX, CONFIG) or name.endswith(".safetensors")
        if own or name != os.path.basename(name):
            raise ValueError(f"{what} {name!r}: expected a plain file name that is not one of the model's own")
        if not isinstance(content, bytes):
            raise ValueError(f"{what} {name!r} holds {type(content).__name__}: expected bytes")
    shards, filled, total, weight_map = [[]], 0, 0, {}
    for name, tensor in tensors.items():
        size = tensor.numel() * dtype.itemsize
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled, total = filled + size, total + size
    tensor_of = tensor_of or tensors.__getitem__
    with staged(Path(folder), last=CONFIG) as temporary:
        for i, names in enumerate(shards):
            file = WEIGHTS if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            save_tensors(((name, tensor_of(name).to(dtype)) for name in names), temporary / file)
            weight_map |= dict.fromkeys(names, file)
        for name, content in (files or {}).items():
            (temporary / name).write_bytes(content)
        if len(shards) > 1:
            write_json(dict(metadata=dict(total_size=total), weight_map=weight_map), temporary / INDEX)
        write_json(fields | dict(torch_dtype=str(dtype).removeprefix("torch.")), temporary / CONFIG)


def write_json(content: dict, path: Path) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def save_tensors(tensors: Iterable[tuple[str, Tensor]], path: Path) -> None:
    """One safetensors file of the tensors, each copied to the CPU as it comes."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors}
    try:
        safetensors.torch.save_file(contiguous, path, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:  # of a full disk too, which `staged` says what to do about
        number = re.search(r"os error (\d+)", str(error))
        if not number:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from None
