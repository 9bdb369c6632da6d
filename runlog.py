"""What every script needs around its loop: command line, distributed start-up, run folder, checkpoints.

Leaf helpers only. Nothing here knows about models, losses or data, and nothing here owns a loop.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import datetime
import json
import logging
import os
import pickle
import platform
import shutil
import signal
import subprocess
import sys
import typing
import zipfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from schedules import averaged

# ----------------------------------------------------------------------------------------------
# command line


def opt(default, help: str, choices: tuple[str, ...] | None = None):
    """A dataclass field with its one-line help and, for a string, the values it may take."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


class _Parser(argparse.ArgumentParser):
    def error(self, message):  # one line, not the whole usage
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


def parse_config(cls, argv: list[str] | None = None, description: str = ""):
    """An instance of the dataclass ``cls`` from the command line; each field is a flag.

    ``seq_len`` becomes ``--seq-len``; a bool gives ``--x`` and ``--no-x``; ``T | None`` takes a T.
    A bad flag prints one line and exits with code 2.
    """
    parser = _Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        kind = next((t for t in typing.get_args(hints[f.name]) if t is not type(None)), hints[f.name])
        default = "" if f.default is None or f.default == "" else f" (default: {f.default})"
        kwargs = {"default": f.default, "help": f.metadata["help"].replace("%", "%%") + default}
        if kind is bool:
            kwargs["action"] = argparse.BooleanOptionalAction
        else:
            kwargs |= {"type": kind, "choices": f.metadata["choices"]}
            kwargs["metavar"] = None if f.metadata["choices"] else kind.__name__.upper()
        parser.add_argument("--" + f.name.replace("_", "-"), **kwargs)
    return cls(**vars(parser.parse_args(argv)))


@contextlib.contextmanager
def user_errors():
    """Around set-up: turns a ValueError or OSError into one line on stderr and exit code 2."""
    try:
        yield
    except (ValueError, OSError) as e:
        if os.environ.get("SCORECAST_TRACEBACK"):
            raise
        if int(os.environ.get("RANK", 0)) == 0:
            message = " ".join(str(e).split())
            print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


class StopRequest:
    """Ctrl-C or SIGTERM asks the loop to save and stop; a second Ctrl-C stops at once."""

    def __init__(self):
        self.signal: str | None = None
        self._old = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}

    def _handle(self, number, frame):
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name

    def restore(self):
        """Gives the signals back to whoever had them."""
        for number, old in self._old.items():
            signal.signal(number, old)


# ----------------------------------------------------------------------------------------------
# processes and device


@dataclasses.dataclass(frozen=True)
class World:
    """This process among its peers: ``rank`` of ``size``, on ``device``."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0

    def all_reduce(self, x: Tensor, op=dist.ReduceOp.SUM) -> Tensor:
        """In place over all ranks; nothing to do for one process."""
        if self.size > 1:
            dist.all_reduce(x, op)
        return x

    @contextlib.contextmanager
    def main_first(self):
        """Rank 0 runs the body alone, the others after it: for caches that are written once."""
        if self.size > 1 and not self.main:
            dist.barrier()
        yield
        if self.size > 1 and self.main:
            dist.barrier()


def start_world(device: str = "auto") -> World:
    """Joins torchrun's process group when there is one (NCCL on CUDA, gloo on CPU).

    ``device`` is auto, cpu or cuda. Raises ValueError when cuda is asked for and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but torch sees no CUDA device; use --device cpu or check the driver")
    cuda = device != "cpu" and torch.cuda.is_available()
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_RANK", 0))
    if cuda and local >= torch.cuda.device_count():
        raise ValueError(f"local rank {local} has no GPU: {torch.cuda.device_count()} visible; lower --nproc_per_node")
    here = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(here)
    else:
        keep_freed_memory()
    if "RANK" in os.environ and not dist.is_initialized():
        # NCCL for tensors on the GPU, gloo for the Python objects that checkpoints gather.
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    log = logging.getLogger("scorecast")  # what the modules have to say, once, on rank 0
    log.handlers = [logging.StreamHandler()]  # of the stderr that is there now
    log.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    log.propagate = False  # a package that gives the root logger a handler, as absl does, would double each line
    return World(rank, size, here)


def keep_freed_memory() -> None:
    """Tells glibc to keep freed activations for the next step instead of giving them back to the kernel.

    By default each large tensor is mapped anew and its pages are faulted in and zeroed, some 4 % of a
    training step on CPU. Nothing happens where the C library is another one.
    """
    libc = ctypes.CDLL(None)
    if platform.libc_ver()[0] == "glibc":
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no request is a mapping of its own
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: nothing is given back


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Dense tensor-core peak in FLOP/s from NVIDIA's data sheets (SXM), None where it is not known."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    name = torch.cuda.get_device_name(device)
    sheet = {"H200": 989.4e12, "GH200": 989.4e12, "H100 PCIe": 756e12, "H100": 989.4e12, "A100": 312e12}
    return next((v for k, v in sheet.items() if k in name), None)


class EnergyMeter:
    """Joules of this process's GPU from NVML's counter; ``read()`` is None where there is none."""

    def __init__(self, device: torch.device):
        self._handle = None
        if device.type == "cuda":
            try:
                import pynvml
            except ImportError:
                return  # optional package; the summary then says null
            pynvml.nvmlInit()
            uuid = str(torch.cuda.get_device_properties(device).uuid)
            self._nvml, self._handle = pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode())

    def read(self) -> float | None:
        if self._handle is None:
            return None
        return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1000  # millijoules


def peak_memory(device: torch.device) -> int:
    """Peak bytes: allocated by torch on CUDA, resident set of the process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class DivergenceWatch:
    """Counts non-finite steps and divergences on the device, without a synchronisation.

    A divergence is a non-finite loss, or a loss above twice its exponential moving average (decay
    0.99) for 32 steps running; the average stands still while the loss is above it.
    """

    FIELDS = ("ema", "steps", "over", "skipped", "streak", "worst_streak", "divergences")

    def __init__(self, device: torch.device):
        self.state = torch.zeros(len(self.FIELDS), dtype=torch.float64, device=device)

    def update(self, loss: Tensor, finite: Tensor) -> None:
        """``loss`` 0-d, ``finite`` 0-d bool: whether this step's loss and gradient norm were finite."""
        ema, steps, over, skipped, streak, worst, events = self.state.unbind()
        loss = loss.double()
        high = finite & (steps > 0) & (loss > 2 * ema)
        new_over = torch.where(high, over + 1, torch.zeros_like(over))
        moved = torch.where(steps > 0, 0.99 * ema + 0.01 * loss, loss)
        bad = (~finite).double()
        new_streak = (streak + 1) * bad
        self.state = torch.stack(
            [
                torch.where(finite & ~high, moved, ema),
                steps + finite,
                new_over,
                skipped + bad,
                new_streak,
                torch.maximum(worst, new_streak),
                events + bad + (new_over == 32),
            ]
        )

    def read(self) -> dict[str, float]:
        """The counters on the host (synchronises)."""
        return dict(zip(self.FIELDS, self.state.tolist(), strict=True))


def to_device(t: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on ``device``, through pinned memory and without waiting where that is CUDA."""
    return t.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else t


# ----------------------------------------------------------------------------------------------
# training state: full, unsharded and on the CPU, so that any number of ranks can read it


def training_state(model, optimizer) -> tuple[dict, dict]:
    """State dicts of a plain, DDP or FSDP2 model and its optimizer; of Schedule-Free the weights are the averages, and
    the optimizer's holds the iterate. Every rank must call it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    if hasattr(optimizer, "eval"):  # Schedule-Free, whose step torch's way of loading cannot take; it is never sharded
        # What goes on is not what is evaluated.
        iterate = {k: v.detach().clone() for k, v in model.state_dict().items()}
        with averaged(optimizer):
            weights = {k: v.detach().clone() for k, v in model.state_dict().items()}
        return weights, optimizer.state_dict() | {"iterate": iterate}

    return get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def restore_training_state(model, optimizer, checkpoint: dict) -> None:
    """Loads what ``training_state`` gave, under the checkpoint's keys model and optimizer."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

    if hasattr(optimizer, "eval"):
        model.load_state_dict(checkpoint["optimizer"]["iterate"])
        optimizer.load_state_dict({k: v for k, v in checkpoint["optimizer"].items() if k != "iterate"})
        return
    set_state_dict(
        model,
        optimizer,
        model_state_dict=checkpoint["model"],
        optim_state_dict=checkpoint["optimizer"],
        options=StateDictOptions(full_state_dict=True),
    )


def rng_states(world: World) -> list[dict]:
    """The generator states of every rank, in rank order. Every rank must call it."""
    mine = {"cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        mine["cuda"] = torch.cuda.get_rng_state(world.device)
    if world.size == 1:
        return [mine]
    states = [None] * world.size
    dist.all_gather_object(states, mine)
    return states


def set_rng_states(states: list[dict], world: World) -> bool:
    """Restores this rank's generators; False, and nothing done, where they are of another number of ranks."""
    if len(states) != world.size:
        return False
    mine = states[world.rank]
    torch.set_rng_state(mine["cpu"])
    if "cuda" in mine and world.device.type == "cuda":
        torch.cuda.set_rng_state(mine["cuda"], world.device)
    return True


# ----------------------------------------------------------------------------------------------
# files


def write_bytes(path: Path, writer) -> None:
    """Atomic: ``writer(file)`` fills a temporary file, which is flushed to disk and renamed to ``path``."""
    tmp = path.with_name(f"{path.name}.tmp{os.getpid()}")
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
            run = subprocess.run(["git", *args], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=20)
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

    def start(self, config: dict, sources: list[Path], resume_step: int | None) -> None:
        """Creates the folder, or, resuming, drops the metrics after ``resume_step``."""
        if not self.world.main:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        metrics = self / "metrics.jsonl"
        if resume_step is None:
            write_json(self / "environment.json", environment(self.world.device))
            (self / "source").mkdir(exist_ok=True)
            for source in sources:
                shutil.copy(source, self / "source" / source.name)
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


def system_entries(world: World, dtype: torch.dtype, memory: int | None, joules: float | None, health: dict) -> dict:
    """Entries of summary.json that every script has. ``health``: what ``DivergenceWatch.read`` gave at the end."""
    cuda = world.device.type == "cuda"
    return {
        "peak_memory_bytes": memory,
        "peak_memory_of": "CUDA allocations" if cuda else "process resident set",
        "energy_joules": joules,
        "divergences": int(health["divergences"]),
        "skipped_steps": int(health["skipped"]),
        "device": torch.cuda.get_device_name(world.device) if cuda else "CPU",
        "world_size": world.size,
        "dtype": str(dtype).removeprefix("torch."),
    }


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
