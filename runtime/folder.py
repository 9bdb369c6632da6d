"""Run folders: config, environment, source, metrics, summary and checkpoints, written whole or not at all."""

import contextlib
import dataclasses
import datetime
import json
import os
import pickle
import platform
import shutil
import subprocess
import sys
import time
import uuid
import zipfile
from importlib.metadata import distributions
from pathlib import Path

import torch
import torch.distributed as dist

from runtime.cli import changeable, roles
from runtime.machine import World, device_name

TREE = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "triton", "numpy", "tiktoken", "tokenizers", "datasets", "safetensors")


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


def _finite(value):
    return json.loads(json.dumps(value), parse_constant=lambda name: None)


def parse_json(text: str | bytes, where: str | Path, advice: str = ""):
    """The value of ``text``. Raises ValueError that says ``where`` it stands, and what to do."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        line = f" line {e.lineno}" if isinstance(where, Path) else ""
        raise ValueError(f"{where}{line} is not JSON ({e.msg}){advice}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{where} is not UTF-8{advice}") from None


def read_metrics(path: Path, kind: str | None = None) -> list[dict]:
    """Rows of a ``metrics.jsonl``, of one kind if given. Raises ValueError naming a broken line."""
    lines = enumerate(path.read_text().splitlines(), 1)
    rows = [parse_json(line, f"{path} line {number}") for number, line in lines]
    return [r for r in rows if kind is None or r["kind"] == kind]


def environment(device: torch.device) -> dict:
    """Versions, device, git state and command line, for the record."""

    def git(*args):
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            how = dict(cwd=TREE, check=True, capture_output=True, text=True, timeout=20)
            return subprocess.run(["git", *args], **how).stdout.strip()

    cuda, status = device.type == "cuda", git("status", "--porcelain")
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "python": platform.python_version(),
        "packages": {p: next((found.version for found in distributions(name=p)), None) for p in PACKAGES},
        "device": device_name(device, threads=True),
        "cuda": torch.version.cuda if cuda else None,
        "world_size": int(os.environ.get("WORLD_SIZE", 1)),
        "git_commit": git("rev-parse", "HEAD"),
        "git_dirty": None if status is None else bool(status),
        "git_diff": git("diff", "HEAD") if status else "",
        "git_untracked": (git("ls-files", "--others", "--exclude-standard") or "").splitlines(),
    }


def imported_sources() -> list[Path]:
    """Files of every module of this tree that has been imported, the script included."""
    files = {Path(m.__file__).resolve() for m in list(sys.modules.values()) if getattr(m, "__file__", None)}
    return sorted(f for f in files if TREE in f.parents and "site-packages" not in f.parts and f.is_file())


def source_folders(run: Path) -> list[Path]:
    """Where a run folder keeps its code: what it began with, then what was other code where it was resumed."""
    return [run / "source", *sorted(run.glob("source-*"), key=lambda p: int(p.name.removeprefix("source-")))]


def same_config(path: Path, old: dict, new: dict, free: tuple[str, ...], defaults: dict | None = None) -> None:
    """Raises ValueError, naming what differs, unless ``new`` continues ``old``. ``free`` settings may change; one that
    ``old`` does not know, as a run of before has it, must be at its default."""
    was = (defaults or {}) | old
    diff = [k for k in new if k not in free and was.get(k) != new[k]]
    if diff:
        what = ", ".join(f"{k} was {was.get(k)!r}, now {new[k]!r}" for k in diff)
        raise ValueError(f"--resume: {path} is of a different run ({what})")


class RunFolder:
    """``runs/NAME``: config, flags, environment, source, metrics, summary and checkpoints of one run.

    Only rank 0 writes. `enter` looks and refuses, without writing; `start` creates or continues; `finish` closes."""

    def __init__(self, path: str | Path, world: World):
        self.path, self.world = Path(path), world
        self._metrics = self._wandb = None
        self._place, self._looked_at, self._modules = "source", set(), 0

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def enter(self, cfg) -> dict | None:
        """The checkpoint that a run of ``cfg`` goes on from (flags out, resume, resume_from); None for a new run.

        Raises ValueError: not resuming and the folder is in use, resuming and there is no run, resuming with another
        config, or from a file that is no whole checkpoint of a training."""
        held = self / "config.json"
        if not cfg.resume:
            if self.path.is_file() or (self.path.is_dir() and any(self.path.iterdir())):
                what = "already holds a run" if held.exists() else "exists and is not an empty folder"
                raise ValueError(f"{self.path} {what}; give another --out, or --resume to go on with it")
            return None
        if not held.exists():
            raise ValueError(f"--resume: no run in {self.path} (no config.json); check --out or start without --resume")
        old = parse_json(held.read_text(), held, "; the run cannot be resumed")
        defaults = {f.name: f.default for f in dataclasses.fields(cfg)}
        now = dict(new=dataclasses.asdict(cfg), free=changeable(type(cfg)), defaults=defaults)
        same_config(self.path, old, **now)
        path = Path(cfg.resume_from or self / "last.pt")
        checkpoint = load_checkpoint(path)
        if "optimizer" not in checkpoint:
            raise ValueError(f"{path} holds weights only; resume from last.pt or previous.pt")
        same_config(path, checkpoint["config"], **now)
        return checkpoint

    def start(self, cfg, script: str, resume_step: int | None) -> None:
        """Creates the folder of ``script``'s run, or, resuming, drops the metrics after ``resume_step``."""
        if not self.world.main:
            return
        config = dataclasses.asdict(cfg)
        metrics = self / "metrics.jsonl"
        if resume_step is None:
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self / "environment.json", environment(self.world.device))
            self._keep_sources()
            write_json(self / "flags.json", roles(type(cfg)))
            write_json(self / "config.json", config | {"script": script})  # last: a folder with a config is a run
        else:
            for stale in self.path.glob("*.tmp*"):  # of a killed write
                stale.unlink()
            # A kill can leave a half-written last line; whatever is after the checkpoint is redone.
            kept = []
            with contextlib.suppress(json.JSONDecodeError):
                for line in metrics.read_text().splitlines() if metrics.exists() else []:
                    kept += [line + "\n"] if json.loads(line)["step"] <= resume_step else []
            write_bytes(metrics, lambda f: f.write("".join(kept).encode()))
        self._metrics = open(metrics, "a", buffering=1)  # noqa: SIM115 - closed by finish()
        if cfg.wandb:
            import wandb

            how = dict.fromkeys(("name", "id"), self.path.name)  # the same id when the run is resumed: it goes on there
            self._wandb = wandb.init(project=cfg.wandb, dir=str(self.path), config=config, resume="allow", **how)
        if resume_step is not None:
            self._place = f"source-{resume_step}"
            changed = self._keep_sources()
            self.log("event", resume_step, event="resumed", world_size=self.world.size, changed_code=changed or None)

    def _keep_sources(self) -> str:
        """Copies the modules imported since the last call that are not kept yet, or not as what they are now; says and
        gives the names of the latter. One looked at before is left: a file edited since is not what runs."""
        self._modules, new = len(sys.modules), [f for f in imported_sources() if f not in self._looked_at]
        self._looked_at.update(new)
        kept = {p.relative_to(folder): p for folder in source_folders(self.path) for p in folder.rglob("*.py")}
        other = []
        for source in new:
            name = source.relative_to(TREE)
            differs = name in kept and kept[name].read_bytes() != source.read_bytes()
            other += [name.as_posix()] * differs
            if differs or name not in kept:
                (self / self._place / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, self / self._place / name)
        changed = ", ".join(other)
        if changed:
            print(f"{self.path}: goes on under other code than before: {changed}; kept in {self._place}")
        return changed

    def log(self, kind: str, step: int, **values) -> None:
        """Appends one row to ``metrics.jsonl`` (rank 0), and to Weights & Biases where it is asked for."""
        if not self._metrics:
            return
        # Some are imported when they are needed, the Triton kernels for one.
        if len(sys.modules) != self._modules and (changed := self._keep_sources()):
            self.log("event", step, event="other_code", changed_code=changed)
        row = _finite(values)
        self._metrics.write(json.dumps({"kind": kind, "step": step} | row) + "\n")
        if self._wandb and kind != "event":
            self._wandb.log({f"{kind}/{k}": v for k, v in row.items()}, step=step)

    def rows(self, kind: str) -> list[dict]:
        """The rows of one kind so far."""
        return read_metrics(self / "metrics.jsonl", kind)

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

    def ended(self, ending: str | None, step: int, signal_name: str | None) -> int | None:
        """Logs why the loop ended (diverged, stopped, early_stop; None: at its last step). The exit code of a run that
        ends with it, after a line on rank 0 that says how to go on; None where the final evaluation follows."""
        if ending:
            self.log("event", step, event=ending, signal=signal_name)
        if ending == "diverged" and self.world.main:
            good = next((f"Last good checkpoint: {p}" for p in (self / "last.pt", self / "best.pt") if p.exists()), "")
            what = f"the loss was not finite in three steps running; stopped at step {step}"
            print(f"{self.path}: {what}. {good or 'No checkpoint had been written; lower --lr'}", file=sys.stderr)
        if ending == "stopped" and self.world.main:
            print(f"{signal_name}: saved {self / 'last.pt'} at step {step}; the same command with --resume goes on")
        return {"diverged": 1, "stopped": 0}.get(ending)

    def write(self, name: str, content) -> None:
        """NAME.json, by rank 0."""
        if self.world.main:
            write_json(self / f"{name}.json", content)

    def summarise(self, summary: dict, **files) -> None:
        """Writes ``files``, name -> content of NAME.json, and, last, summary.json: then the run has finished."""
        for name, content in (files | {"summary": summary}).items():
            self.write(name, content)
        if self._wandb:
            self._wandb.summary.update(summary)

    def finish(self, code: int) -> int:
        """Closes everything that a script opened; returns ``code``, the script's exit code."""
        if self._metrics:
            self._metrics.close()
        if self._wandb:
            self._wandb.finish(exit_code=code)
        if dist.is_initialized():
            dist.destroy_process_group()
            # FSDP keeps the group, so gloo's threads live on. One that still waits for the GIL to drop a tensor of the
            # last collective when the interpreter ends aborts the process (26 of 80 short programs; none after this).
            time.sleep(0.1)
        return code


def load_checkpoint(path: str | Path) -> dict:
    """Reads a checkpoint written by ``RunFolder.save`` and verifies its checksums. Raises ValueError naming the file,
    and an older good one beside it, when it is missing, truncated or corrupt."""
    path, older = Path(path), Path(path).with_name("previous.pt")
    hint = f"; an older good one is {older} (pass --resume-from {older})" if older != path and _intact(older) else ""
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
