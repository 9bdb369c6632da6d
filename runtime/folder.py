"""Run folders: config, environment, source, metrics, summary and checkpoints, written whole or not at all."""

import datetime
import json
import os
import pickle
import platform
import shutil
import subprocess
import sys
import uuid
import zipfile
from pathlib import Path

import torch
import torch.distributed as dist

from runtime.machine import World


def write_bytes(path: Path, writer) -> None:
    """Atomic: ``writer(file)`` fills a temporary file, which is flushed to disk and renamed to ``path``."""
    tmp = path.with_name(f"{path.name}.tmp{uuid.uuid4().hex}")
    try:
        with open(tmp, "wb") as f:
            writer(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def write_json(path: Path, value) -> None:
    """Atomic, indented, with non-finite numbers as null (JSON has none)."""
    text = json.dumps(_finite(value), indent=1) + "\n"
    write_bytes(path, lambda f: f.write(text.encode()))


def _finite(v):
    if isinstance(v, dict):
        return {k: _finite(x) for k, x in v.items()}
    if isinstance(v, list | tuple):
        return [_finite(x) for x in v]
    return None if isinstance(v, float) and v - v != 0 else v


def read_metrics(path: Path, kind: str | None = None) -> list[dict]:
    """Rows of a ``metrics.jsonl``, of one kind if given. Raises ValueError naming a broken line."""
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as e:
            raise ValueError(f"{path} line {number} is not JSON ({e.msg})") from e
    return [r for r in rows if kind is None or r["kind"] == kind]


def environment(device: torch.device) -> dict:
    """Versions, device, git state and command line, for the record."""
    from importlib.metadata import PackageNotFoundError, version

    def installed(package):
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    def git(*args):
        try:
            run = subprocess.run(["git", *args], cwd=TREE, capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return run.stdout.strip() if run.returncode == 0 else None

    cuda = device.type == "cuda"
    status = git("status", "--porcelain")
    packages = ("torch", "triton", "numpy", "tiktoken", "tokenizers", "datasets", "safetensors")
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "python": platform.python_version(),
        "packages": {p: installed(p) for p in packages},
        "device": torch.cuda.get_device_name(device) if cuda else f"CPU, {torch.get_num_threads()} threads",
        "cuda": torch.version.cuda if cuda else None,
        "world_size": int(os.environ.get("WORLD_SIZE", 1)),
        "git_commit": git("rev-parse", "HEAD"),
        "git_dirty": None if status is None else bool(status),
        "git_diff": git("diff", "HEAD") if status else "",
    }


TREE = Path(__file__).resolve().parents[1]


def imported_sources() -> list[Path]:
    """Files of every module of this tree that has been imported, the script included."""
    files = {Path(m.__file__).resolve() for m in list(sys.modules.values()) if getattr(m, "__file__", None)}
    return sorted(f for f in files if TREE in f.parents and "site-packages" not in f.parts and f.is_file())


def same_config(path: Path, old: dict, new: dict, free: tuple[str, ...]) -> None:
    """Raises ValueError, naming what differs, unless ``new`` continues ``old``; ``free`` settings may change."""
    diff = [k for k in new if k not in free and old.get(k) != new[k]]
    if diff:
        what = ", ".join(f"{k} was {old.get(k)!r}, now {new[k]!r}" for k in diff)
        raise ValueError(f"--resume: {path} is of a different run ({what})")


class RunFolder:
    """``runs/NAME``: config, environment, source, metrics, summary and checkpoints of one run.

    Only rank 0 writes. ``open`` looks and refuses, without writing; ``start`` creates or continues.
    """

    def __init__(self, path: str | Path, world: World):
        self.path, self.world = Path(path), world
        self._metrics = None

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def check(self, config: dict, resume: bool, free: tuple[str, ...]) -> None:
        """Refuses a folder that holds a different run; ``free`` names the settings that may change.

        Raises ValueError: not resuming and the folder is in use, resuming and there is no run, or
        resuming with another config.
        """
        held = self / "config.json"
        if not resume:
            if self.path.is_file() or (self.path.is_dir() and any(self.path.iterdir())):
                what = "already holds a run" if held.exists() else "exists and is not an empty folder"
                raise ValueError(f"{self.path} {what}; give another --out, or --resume to go on with it")
            return
        if not held.exists():
            raise ValueError(f"--resume: no run in {self.path} (no config.json); check --out or start without --resume")
        try:
            old = json.loads(held.read_text())
        except json.JSONDecodeError as e:
            raise ValueError(f"{held} is not JSON ({e.msg}); the run cannot be resumed") from e
        same_config(self.path, old, config, free)

    def start(self, config: dict, resume_step: int | None) -> None:
        """Creates the folder, or, resuming, drops the metrics after ``resume_step``."""
        if not self.world.main:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        metrics = self / "metrics.jsonl"
        if resume_step is None:
            write_json(self / "environment.json", environment(self.world.device))
            for source in imported_sources():
                kept = self / "source" / source.relative_to(TREE)
                kept.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, kept)
            write_json(self / "config.json", config)  # last: a folder with a config is a run
        else:
            for stale in self.path.glob("*.tmp*"):  # of a killed write
                stale.unlink()
            # A kill can leave a half-written last line; whatever is after the checkpoint is redone.
            kept = []
            for line in metrics.read_text().splitlines() if metrics.exists() else []:
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    break
                if row["step"] <= resume_step:
                    kept.append(line + "\n")
            write_bytes(metrics, lambda f: f.write("".join(kept).encode()))
        self._metrics = open(metrics, "a", buffering=1)  # noqa: SIM115 - closed by close()

    def log(self, kind: str, step: int, **values) -> dict:
        """Appends one row to ``metrics.jsonl`` (rank 0) and returns it."""
        row = {"kind": kind, "step": step} | _finite(values)
        if self._metrics:
            self._metrics.write(json.dumps(row) + "\n")
        return row

    def close(self) -> None:
        if self._metrics:
            self._metrics.close()
            self._metrics = None

    def save(self, name: str, state: dict) -> None:
        """Writes a checkpoint atomically (rank 0); ``last.pt`` keeps its predecessor as ``previous.pt``."""
        if not self.world.main:
            return
        path = self / name
        if name == "last.pt" and path.exists():
            # A second name for the old file, not a move: there is a good last.pt at every moment.
            link = self / "previous.pt.tmp"
            link.unlink(missing_ok=True)
            try:
                os.link(path, link)
            except OSError:  # a file system without hard links
                shutil.copyfile(path, link)
            os.replace(link, self / "previous.pt")
        write_bytes(path, lambda f: torch.save(state, f))


def start_wandb(project: str, out: Path, config: dict):
    """A Weights & Biases run that goes on under the same id when the run is resumed."""
    import wandb

    return wandb.init(project=project, name=out.name, id=out.name, dir=str(out), config=config, resume="allow")


def ends_here(run: RunFolder, ending: str | None, step: int, signal_name: str | None) -> int | None:
    """Logs why the loop ended (diverged, stopped, early_stop; None: at its last step). The exit code of a run that ends
    with it, after a line on rank 0 that says how to go on; None where the final evaluation follows."""
    if ending:
        run.log("event", step, event=ending, signal=signal_name)
    if ending == "diverged" and run.world.main:
        good = next((p for p in (run / "last.pt", run / "best.pt") if p.exists()), None)
        advice = f"Last good checkpoint: {good}" if good else "No checkpoint had been written; lower --lr"
        print(f"{run.path}: the loss was not finite in three steps running; stopped at step {step}. {advice}",
              file=sys.stderr)  # fmt: skip
    if ending == "stopped" and run.world.main:
        print(f"{signal_name}: saved {run / 'last.pt'} at step {step}; the same command with --resume goes on")
    return {"diverged": 1, "stopped": 0}.get(ending)


def finish(run: RunFolder, wandb_run, code: int) -> int:
    """Closes everything that a script opened; returns ``code``, the script's exit code."""
    run.close()
    if wandb_run:
        wandb_run.finish(exit_code=code)
    if dist.is_initialized():
        dist.destroy_process_group()
    return code


def load_checkpoint(path: str | Path) -> dict:
    """Reads a checkpoint written by ``RunFolder.save`` and verifies its checksums.

    Raises ValueError naming the file, and an older good one beside it, when it is missing,
    truncated or corrupt.
    """
    path = Path(path)
    older = [p for p in (path.with_name("previous.pt"), path.with_name("best.pt")) if p != path and _intact(p)]
    hint = next((f"; an older good one is {p} (pass --resume-from {p})" for p in older if p.name == "previous.pt"), "")
    if not path.is_file():
        raise ValueError(f"no checkpoint {path}{hint}")
    if not _intact(path):
        raise ValueError(f"checkpoint {path} is truncated or corrupt{hint}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as e:
        raise ValueError(f"{path} is no checkpoint of ours ({str(e).splitlines()[0]})") from e


def _intact(path: Path) -> bool:
    """Whether the zip that torch.save wrote is whole: directory present, every CRC-32 right."""
    try:
        with zipfile.ZipFile(path) as z:
            return z.testzip() is None
    except (zipfile.BadZipFile, OSError, EOFError):
        return False
