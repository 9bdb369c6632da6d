"""Run folders: config, environment, source, metrics, summary and checkpoints, written whole or not at all."""

import contextlib
import dataclasses
import datetime
import errno
import functools
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from importlib.metadata import distributions
from pathlib import Path

import torch
import torch.distributed as dist

from runtime import secrets
from runtime.checkpoint import load_checkpoint, not_finite, save_checkpoint
from runtime.cli import changeable, roles
from runtime.dry_run import Aside
from runtime.machine import World, device_name
from runtime.optim import plans_no_end
from runtime.process import code_of
from runtime.staging import LOCK, TEMPORARY, probe, release_lock, remove, staged, sweep, take_lock, write_bytes
from runtime.tracking import tracker_of
from schedules import textlines

TREE = Path(__file__).resolve().parents[1]
# Endings of a run that failed, and what to say.
FAILED = {
    "diverged": "the loss was not finite in three steps running",
    "not_finite": "the weights, the optimizer's moments or the validation are not finite and were not saved",
}
CHECKPOINTS = ("last.pt", "previous.pt", "best.pt")
# What a run writes before its first step.
BEGINNING = {LOCK, "environment.json", "source", "flags.json", "config.json", "metrics.jsonl", "wandb", "profile.json"}
PACKAGES = ("torch", "triton", "numpy", "tiktoken", "tokenizers", "datasets", "safetensors")


def write_json(path: Path, value) -> None:
    """Atomic, indented, with non-finite numbers as null (JSON has none)."""
    text = json.dumps(_finite(value), indent=1) + "\n"
    write_bytes(path, lambda f: f.write(text.encode()))


def _finite(value):
    return json.loads(json.dumps(value), parse_constant=lambda name: None)


def parse_json(text: str | bytes, where: str | Path, advice: str = ""):
    """The value of ``text``. Raises ValueError that says ``where`` it stands, and what to do."""
    line = 1 if isinstance(where, Path) else None
    return textlines.parse_json(text, where, line, **{"advice": advice.removeprefix("; ")} if advice else {})


def parse_object(text: str | bytes, where: str | Path, advice: str = "") -> dict:
    """`parse_json` of what has to be an object."""
    value = parse_json(text, where, advice)
    if not isinstance(value, dict):
        raise ValueError(f"{where} holds no JSON object{advice}")
    return value


def read_metrics(path: Path, kind: str | None = None) -> list[dict]:
    """Rows of a ``metrics.jsonl``, of one kind if given. Raises ValueError naming a broken line."""
    rows, broken = whole_rows(path)
    if broken:
        raise ValueError(
            f"{path} line {broken[0]} is no row of metrics; --resume leaves such lines out and counts them"
        )
    return [r for r in rows if kind is None or r["kind"] == kind]


def whole_rows(path: Path) -> tuple[list[dict], list[int]]:
    """The rows of a ``metrics.jsonl``, and the numbers of the lines that are none. ([], []) where there is no file."""
    rows, broken = [], []
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else (), 1):
        try:
            row = parse_object(line, path)
        except ValueError:
            row = {}
        if isinstance(row.get("step"), int) and isinstance(row.get("kind"), str):
            rows.append(row)
        else:
            broken.append(number)
    return rows, broken


def environment(device: torch.device) -> dict:
    """Versions, device, git state and command line, for the record, with *** for keys and passwords."""

    def git(*args):
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            how = dict(cwd=TREE, check=True, capture_output=True, text=True, timeout=20)
            return subprocess.run(["git", *args], **how).stdout.strip()

    cuda, status = device.type == "cuda", git("status", "--porcelain")
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": secrets.hide(" ".join([Path(sys.argv[0]).name, *sys.argv[1:]])),
        "python": platform.python_version(),
        "packages": {p: next((found.version for found in distributions(name=p)), None) for p in PACKAGES},
        "device": device_name(device, threads=True),
        "cuda": torch.version.cuda if cuda else None,
        "cudnn_attention": torch.backends.cuda.cudnn_sdp_enabled() if cuda else None,
        "world_size": int(os.environ.get("WORLD_SIZE", 1)),
        "git_commit": git("rev-parse", "HEAD"),
        "git_dirty": None if status is None else bool(status),
        "git_diff": secrets.hide(git("diff", "HEAD") or "") if status else "",
        "git_untracked": (git("ls-files", "--others", "--exclude-standard") or "").splitlines(),
    }


@functools.cache
def _in_tree(file: str) -> Path | None:
    """A module's file with links resolved, if it is of this tree and none that is installed in it."""
    path = Path(file).resolve()
    return path if TREE in path.parents and "site-packages" not in path.parts else None


def imported_sources() -> list[Path]:
    """Files of every module of this tree that has been imported, the script included."""
    files = {_in_tree(m.__file__) for m in list(sys.modules.values()) if getattr(m, "__file__", None)}
    return sorted(f for f in files if f and f.is_file())


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
        raise ValueError(f"{path} is of a different run ({what})")


class Pieces:
    """What a long piece of work has done, kept in ``path`` under ``key``: by rank 0, for every rank.

    A file of another key, say of other weights, is not read. Every rank must make each call."""

    def __init__(self, path: Path, key: str, world: World):
        self.path, self.key, self.world, self.done = path, key, world, {}
        world.wait()
        with contextlib.suppress(ValueError):  # a damaged file is as none: it is made again
            found = parse_object(path.read_bytes(), path) if path.is_file() else {}
            self.done = found["done"] if found.get("key") == key and isinstance(found.get("done"), dict) else {}

    def get(self, name: str, make):
        """``make()``, or what an earlier call has kept of it: numbers, lists and dicts of strings."""
        if name not in self.done:
            self.done[name] = make()
            content = json.dumps({"key": self.key, "done": self.done})  # with nan and inf as they are
            if self.world.main:
                write_bytes(self.path, lambda file: file.write(content.encode()))
        return self.done[name]


class RunFolder:
    """``runs/NAME``: config, flags, environment, source, metrics, summary and checkpoints of one run.

    Only rank 0 writes. `enter` looks and refuses, without writing; `start` creates or continues; `finish` closes."""

    def __init__(self, path: str | Path, world: World):
        self.path, self.world = Path(path), world
        self._metrics = self._tracker = None
        self._place, self._looked_at, self._modules = "source", set(), 0
        self._anew, self._rows = False, 0
        self.dry: Aside | None = None  # of a dry run, which writes nothing

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @staticmethod
    def config(path: Path) -> dict:
        """What config.json of the folder ``path`` says; {} where there is none or it is damaged, which `enter` says."""
        with contextlib.suppress(ValueError):
            return textlines.read_json(path / "config.json", dict) if (path / "config.json").is_file() else {}
        return {}

    def enter(self, cfg) -> dict | None:
        """The checkpoint that a run of ``cfg`` goes on from (flags out, resume, resume_from); None for a new run.

        A folder whose run ended before its first checkpoint begins anew, with --resume and without, where the config is
        the same. A command that torchrun starts again resumes. Raises ValueError: not resuming and the folder is in
        use, resuming and there is no run, resuming with another config, or from a file that is no whole checkpoint of a
        training or holds moments that are not finite, another process holds the folder, a flag holds a secret, a
        package is missing, or W&B has no key; OSError where nothing can be written there."""
        self._check_place(cfg)
        found = self._found()
        held, saved = self / "config.json", [name for name in CHECKPOINTS if name in found]
        if held.exists() and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
            cfg = dataclasses.replace(cfg, resume=True)  # torchrun --max-restarts starts the same command again
        if "config.json" not in found:
            if found - BEGINNING:
                what = "has no config.json" if cfg.resume else "exists and is not an empty folder"
                raise ValueError(f"{self.path} {what}; give another --out")
            if cfg.resume and not found:
                where = f"{self.path} (no config.json)"
                raise ValueError(f"--resume: no run in {where}; check --out or start without --resume")
            self._anew = bool(found)
            self._hold(cfg)
            return None
        self._hold(cfg)
        if saved and not cfg.resume:
            raise ValueError(f"{self.path} already holds a run; give another --out, or --resume to go on with it")
        defaults = {f.name: f.default for f in dataclasses.fields(cfg)}
        now = dict(new=dataclasses.asdict(cfg), free=changeable(type(cfg)), defaults=defaults)
        old = parse_object(held.read_bytes(), held, "; the run cannot be resumed")
        more = cfg.resume and old.get("steps", math.inf) < getattr(cfg, "steps", 0)  # more steps than it was to have
        longer = {"free": (*now["free"], "steps")} if more else {}
        try:
            same_config(self.path, old, **now | longer)
        except ValueError as e:
            raise e if cfg.resume else ValueError(f"{self.path} already holds a run: {e}; give another --out") from None
        if not cfg.resume_from and not set(saved) & {"last.pt", "previous.pt"}:
            validated = {row["step"] for row in whole_rows(self / "metrics.jsonl")[0] if row["kind"] == "val"}
            if saved and len(validated) > 1:  # best.pt, from more than the moment between its first and last.pt
                raise ValueError(f"{self.path} has lost last.pt and previous.pt; best.pt holds weights only")
            self._anew = True
            return None
        path = Path(cfg.resume_from or self / "last.pt")
        checkpoint = load_checkpoint(path)
        if "optimizer" not in checkpoint:
            raise ValueError(f"{path} holds weights only; resume from last.pt or previous.pt")
        if not isinstance(checkpoint.get("config"), dict) or not isinstance(checkpoint.get("step"), int):
            raise ValueError(f"{path} is no checkpoint of ours: it says neither config nor step")
        if broken := not_finite(checkpoint["optimizer"], "optimizer"):
            way = "resume from another one (--resume-from), or begin a new run"
            raise ValueError(f"{path} cannot be gone on from: {broken} is not finite; {way}")
        self._check_longer(cfg, old, checkpoint)
        same_config(path, checkpoint["config"], **now | longer)
        return checkpoint

    def aside(self, cfg):
        """``cfg`` of a run; in a dry run with a cache that goes with it, and without what writes answers before it.
        Raises ValueError for --profile, which is another thing. Every rank must call it."""
        if not cfg.dry_run:
            return cfg
        if getattr(cfg, "profile", 0):
            raise ValueError(f"--dry-run and --profile {cfg.profile} are two things; give one of them")
        self.dry = Aside(cfg.cache, self.world)
        answers = {"before": False} if hasattr(cfg, "before") else {}
        return dataclasses.replace(cfg, cache=str(self.dry.folder), **answers)

    def _check_longer(self, cfg, old: dict, checkpoint: dict) -> None:
        """Raises ValueError where the run of ``old`` cannot become one of more steps."""
        before, step = old.get("steps"), checkpoint["step"]
        if before is not None and cfg.steps != before and not plans_no_end(cfg, step, before, cfg.steps):
            way = "start a run from its weights (train_lm.py --init-from, finetune_gsm8k.py --adapter)"
            can = "only a run with --schedule constant, its warm-up and ramp behind it, can get more"
            raise ValueError(f"--steps was {before}, now {cfg.steps}: {can}; {way}")

    def _found(self) -> set[str]:
        """Names in the folder, without the lock and what a killed write left."""
        names = {p.name for p in self.path.iterdir()} if self.path.is_dir() else set()
        return {name for name in names - {LOCK} if not name.startswith(TEMPORARY)}

    def _hold(self, cfg) -> None:
        """The lock of a folder of ours that is there already; a dry run takes none. Raises ValueError where another
        process has it."""
        if self.world.main and self.path.is_dir() and not getattr(cfg, "dry_run", ""):
            take_lock(self.path)

    def _check_place(self, cfg) -> None:
        """Raises ValueError and OSError where no run can be in the folder, or none be logged as asked for, and where a
        flag holds a secret."""
        secrets.refuse(dataclasses.asdict(cfg))
        if self.path.is_symlink() and not self.path.exists():
            raise ValueError(f"{self.path} is a link to {self.path.readlink()}, which is not there; give another --out")
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path} exists and is not a folder; give another --out")
        if self.world.main:
            probe(self.path)
        if (tracker := tracker_of(cfg)) and self.world.main:
            tracker.check()

    def start(self, cfg, script: str, checkpoint: dict | None) -> None:
        """Creates the folder of ``script``'s run, or, resuming, drops the metrics after the ``checkpoint``. What is
        dropped otherwise is counted and said. Raises ValueError where another run has begun here since `enter`."""
        if self.dry or not self.world.main:
            return
        config, step = dataclasses.asdict(cfg), checkpoint and checkpoint["step"]
        metrics, lost = self / "metrics.jsonl", 0
        self.path.mkdir(parents=True, exist_ok=True)
        take_lock(self.path)
        if checkpoint is None and not self._anew and self._found():
            raise ValueError(f"{self.path} already holds a run, which has begun since; give another --out")
        sweep(self.path)
        rows, broken = whole_rows(metrics)
        if checkpoint is None:
            if self._anew:
                also = " and its best.pt" * (self / "best.pt").exists()
                rows_of = f"the {len(rows)} rows{also}" if rows or also else "nothing"
                why = "a run began here and left no checkpoint to go on from"
                print(f"{self.path}: {why}: begins anew, drops {rows_of}")
                for name in ("metrics.jsonl", "best.pt", "source"):
                    remove(self / name)
            write_json(self / "environment.json", environment(self.world.device))
            self._keep_sources()
            write_json(self / "flags.json", roles(type(cfg)))
            write_json(self / "config.json", config | {"script": script})  # last: a folder with a config is a run
        else:
            # A kill can leave a half-written last line; whatever is after the checkpoint is redone.
            kept = [row for row in rows if row["step"] <= step]
            last = len(rows) + len(broken)
            lost = max(checkpoint.get("rows", len(kept) + len([n for n in broken if n < last])) - len(kept), 0)
            write_bytes(metrics, lambda f: f.write("".join(json.dumps(row) + "\n" for row in kept).encode()))
            lines = f" (broken lines {', '.join(map(str, broken[:5]))}{', ...' * (len(broken) > 5)})" if broken else ""
            if lost:
                print(f"{metrics}: {lost} of the {len(kept) + lost} rows up to step {step} are lost{lines}")
            self._rows = len(kept)
            held = parse_object((self / "config.json").read_bytes(), self / "config.json")
            if held.get("steps") != config.get("steps"):  # the run has become longer
                print(f"{self.path}: --steps was {held['steps']}, is {config['steps']} from here on")
                remove(self / "summary.json")
                write_json(self / "config.json", held | {"steps": config["steps"]})
        self._metrics = open(metrics, "ab", buffering=0)  # noqa: SIM115 - closed by finish()
        if tracker := tracker_of(cfg):
            try:
                tracker.start(self.path, config, resumed=checkpoint is not None)
                self._tracker = tracker
            except ValueError:
                self._metrics.close()
                if checkpoint is None:  # no step has been made: no dead folder stays
                    release_lock(self.path)
                    remove(self.path)
                raise
        if checkpoint is not None:
            self._place = f"source-{step}"
            also = dict(world_size=self.world.size, changed_code=self._keep_sources() or None)
            self.log("event", step, event="resumed", **also, **({"lost_rows": lost} if lost else {}))

    def _keep_sources(self) -> str:
        """Copies the modules imported since the last call that are not kept yet, or not as what they are now; says and
        gives the names of the latter. One looked at before is left: a file edited since is not what runs. Keys and
        passwords become ***."""
        self._modules, new = len(sys.modules), [f for f in imported_sources() if f not in self._looked_at]
        self._looked_at.update(new)
        kept = {p.relative_to(folder): p for folder in source_folders(self.path) for p in folder.rglob("*.py")}
        other = []
        for source in new:
            name = source.relative_to(TREE)
            text = secrets.hide(source.read_bytes().decode(errors="surrogateescape"))
            text = text.encode(errors="surrogateescape")
            differs = name in kept and kept[name].read_bytes() != text
            other += [name.as_posix()] * differs
            if differs or name not in kept:
                (self / self._place / name).parent.mkdir(parents=True, exist_ok=True)
                (self / self._place / name).write_bytes(text)
        changed = ", ".join(other)
        if changed:
            print(f"{self.path}: goes on under other code than before: {changed}; kept in {self._place}")
        return changed

    def log(self, kind: str, step: int, **values) -> None:
        """Appends one row to ``metrics.jsonl`` (rank 0), and to the tracker that is asked for."""
        if self._metrics is None:
            return
        # Some are imported when they are needed, the Triton kernels for one.
        if len(sys.modules) != self._modules and (changed := self._keep_sources()):
            self.log("event", step, event="other_code", changed_code=changed)
        row = _finite(values)
        line = (json.dumps({"kind": kind, "step": step} | row) + "\n").encode()
        if self._metrics.write(line) < len(line):
            raise OSError(errno.ENOSPC, "a row of metrics was cut off; free some space", str(self / "metrics.jsonl"))
        self._rows += 1
        if self._tracker and kind != "event":
            self._tracker.log({f"{kind}/{k}": v for k, v in row.items()}, step)

    def rows(self, kind: str) -> list[dict]:
        """The rows of one kind so far."""
        return read_metrics(self / "metrics.jsonl", kind)

    def load(self, name: str) -> dict:
        """The checkpoint of that name, see `load_checkpoint`."""
        return load_checkpoint(self / name)

    def save(self, name: str, state: dict) -> None:
        """Writes a checkpoint atomically (rank 0), with the number of rows logged so far; ``last.pt`` keeps its
        predecessor as ``previous.pt``."""
        if not self.world.main:
            return
        path = self / name
        keep = self._keep_previous if name == "last.pt" and path.exists() else lambda: None
        save_checkpoint(path, state | {"rows": self._rows}, before=keep)

    def _keep_previous(self) -> None:
        """A second name for last.pt, not a move: there is a good last.pt at every moment."""
        with staged(self / "previous.pt") as link:
            try:
                os.link(self / "last.pt", link)
            except OSError:  # a file system without hard links
                shutil.copyfile(self / "last.pt", link)

    def ended(self, ending: str | None, step: int, signal_name: str | None) -> int | None:
        """Logs why the loop ended (diverged, stopped, early_stop; None: at its last step). The exit code of a run that
        ends with it, after a line on rank 0 that says how to go on; None where the final evaluation follows."""
        if ending:
            self.log("event", step, event=ending, signal=signal_name)
        if ending in FAILED and self.world.main:
            good = next((f"Last good checkpoint: {p}" for p in (self / "last.pt", self / "best.pt") if p.exists()), "")
            good = good or "No checkpoint had been written; lower --lr"
            print(f"{self.path}: {FAILED[ending]}; stopped at step {step}. {good}", file=sys.stderr)
        if ending == "stopped" and self.world.main:
            print(f"{signal_name}: saved {self / 'last.pt'} at step {step}; the same command with --resume goes on")
        return code_of(signal_name) if ending == "stopped" else 1 if ending in FAILED else None

    def write(self, name: str, content) -> None:
        """NAME.json, by rank 0."""
        if self.world.main:
            write_json(self / f"{name}.json", content)

    def pieces(self, key: str) -> Pieces:
        """Of the final evaluation of the weights ``key``. They go when the summary is written."""
        return Pieces(self / "evaluation.json", key, self.world)

    def summarise(self, summary: dict, **files) -> None:
        """Writes ``files``, name -> content of NAME.json, and, last, summary.json: then the run has finished."""
        for name, content in (files | {"summary": summary}).items():
            self.write(name, content)
        remove(self / "evaluation.json")
        if self._tracker:
            self._tracker.summarise(summary, summary.get("steps", 0))

    def finish(self, code: int) -> int:
        """Closes everything that a script opened; returns ``code``, the script's exit code."""
        release_lock(self.path)
        if self.dry:
            self.dry.close()
        if self._metrics is not None:
            self._metrics.close()
        if self._tracker:
            self._tracker.finish(code)
        if dist.is_initialized():
            dist.destroy_process_group()
            # FSDP keeps the group, so gloo's threads live on. One that still waits for the GIL to drop a tensor of the
            # last collective when the interpreter ends aborts the process (26 of 80 short programs; none after this).
            time.sleep(0.1)
        return code
