"""This process among its peers, its device, and what the device can say of itself."""

import contextlib
import ctypes
import dataclasses
import gc
import logging
import os
import platform
import sys

import torch
import torch.distributed as dist
from torch import Tensor

from runtime.process import end_with_parent
from schedules import ADAPTIVE, parse_parts


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

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.size > 1:
            dist.barrier()

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` holds on one rank or more. Every rank must call it."""
        return bool(self.all_reduce(torch.tensor(int(flag), device=self.device)))

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of the activations that --dtype means: auto is bfloat16 on CUDA and float32 elsewhere."""
        auto = "bfloat16" if self.device.type == "cuda" else "float32"
        return getattr(torch, auto if name == "auto" else name)

    def check(self, cfg) -> None:
        """Raises ValueError for flags that do not go together, or not with these ranks and this device."""
        if cfg.batch % self.size:
            raise ValueError(f"--batch {cfg.batch} is not divisible by the {self.size} ranks; change one of them")
        for name in ("kernels", "layers"):
            if getattr(cfg, name, "torch") == "triton" and self.device.type != "cuda":
                raise ValueError(f"--{name} triton needs a CUDA device; use --{name} torch")
        if cfg.schedule in ADAPTIVE and cfg.lr_warmup == 1:
            raise ValueError(f"--lr-warmup 1 leaves no step to --schedule {cfg.schedule}")
        parse_parts(cfg.fot_parts)

    @contextlib.contextmanager
    def main_first(self):
        """Rank 0 runs the body alone, the others after it: for caches that are written once. On a CPU what is freed in
        it goes back to the system: making a cache takes more than training, whose peak it would count in."""
        if not self.main:
            self.wait()
        if self.device.type == "cpu":
            keep_freed_memory(False)
        yield
        if self.device.type == "cpu":
            keep_freed_memory()
        if self.main:
            self.wait()


def start_world(device: str = "auto", fixed_shapes: bool = False) -> World:
    """Joins torchrun's process group when there is one (NCCL on CUDA, gloo on CPU).

    ``device`` is auto, cpu or cuda. Without ``fixed_shapes`` cuDNN's attention is switched off: it builds a plan for
    each new shape. Raises ValueError when cuda is asked for and there is none."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but torch sees no CUDA device; use --device cpu or check the driver")
    cuda = device != "cpu" and torch.cuda.is_available()
    torchrun = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    rank, size, local = (int(os.environ.get(name, default)) for name, default in torchrun)
    if cuda and local >= torch.cuda.device_count():
        raise ValueError(f"local rank {local} has no GPU: {torch.cuda.device_count()} visible; lower --nproc_per_node")
    here = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(here)
        torch.set_float32_matmul_precision("high")
        if not fixed_shapes:
            torch.backends.cuda.enable_cudnn_sdp(False)
    else:
        keep_freed_memory()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()  # of torchrun, which may be killed
    if "RANK" in os.environ and not dist.is_initialized():
        # NCCL for tensors on the GPU, gloo for the Python objects that checkpoints gather.
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", **meeting_point(rank, size))
    log = logging.getLogger("scorecast")  # what the modules have to say, once, on rank 0
    log.handlers = [logging.StreamHandler()]  # of the stderr that is there now
    log.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    log.propagate = False  # a package that gives the root logger a handler, as absl does, would double each line
    return World(rank, size, here)


def meeting_point(rank: int, size: int) -> dict:
    """Arguments of init_process_group for ranks that torchrun has started again; {} for others.

    torchrun keeps one store for all attempts, and in it the addresses of ranks that are dead: gloo would wait for them
    for ever. Each attempt has names of its own."""
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), size, is_master=False)
    return dict(store=dist.PrefixStore(f"attempt {attempt}", store), rank=rank, world_size=size)


def keep_freed_memory(keep: bool = True) -> None:
    """Tells glibc to keep freed activations for the next step; nothing happens where the C library is another one.

    By default each large tensor is mapped anew, and its pages are faulted in and zeroed: some 4 % of a step on CPU.
    Without ``keep`` every thread's heap gives back what is freed at its end, as far as 128 KiB."""
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0 if keep else 65536)  # M_MMAP_MAX: no request is a mapping of its own
        libc.mallopt(-1, -1 if keep else 131072)  # M_TRIM_THRESHOLD: nothing is given back


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Dense tensor-core peak in FLOP/s from NVIDIA's data sheets, SXM where the name says no other form; None where it
    is not known, as of a part of a GPU (MIG)."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    name = device_name(device)
    sheet = {"GB200": 2500e12, "B200": 2250e12, "H200 NVL": 835.5e12, "H200": 989.4e12, "GH200": 989.4e12}
    sheet |= {"H100 PCIe": 756e12, "H100 NVL": 835.5e12, "H100": 989.4e12, "H20": 148e12, "A100": 312e12}
    sheet |= {"L40S": 362.05e12}
    return None if "MIG" in name else next((v for k, v in sheet.items() if k in name), None)


class EnergyMeter:
    """Joules of this process's GPU from NVML's counter; ``read()`` is None where there is none, or NVML fails."""

    def __init__(self, device: torch.device):
        self._handle = None
        if device.type == "cuda":
            try:
                import pynvml
            except ImportError:
                return  # optional package; the summary then says null
            uuid, self._nvml = str(torch.cuda.get_device_properties(device).uuid), pynvml
            try:
                pynvml.nvmlInit()
                self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode())
            except pynvml.NVMLError as error:
                logging.getLogger("scorecast").warning("energy is not measured: NVML says %s", error)

    def read(self) -> float | None:
        if self._handle is None:
            return None
        try:
            return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1000  # millijoules
        except self._nvml.NVMLError as error:
            logging.getLogger("scorecast").warning("energy is not measured from here on: NVML says %s", error)
            self._handle = None
            return None


def device_name(device: torch.device, threads: bool = False) -> str:
    """The GPU's name, or CPU, with the number of torch's ``threads`` where asked for."""
    cpu = f"CPU, {torch.get_num_threads()} threads" if threads else "CPU"
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu


def peak_memory(device: torch.device) -> int | None:
    """Peak bytes: allocated by torch on CUDA, resident set of the process on CPU; None there on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def forget_peak(device: torch.device) -> bool:
    """Lets `peak_memory` count from now on; whether it does. On CPU that takes Linux's /proc/self/clear_refs, and what
    was freed goes back to the system first, as far as glibc can: it counts as resident. Of what a nano run took to make
    its tokenizer and tokens some 25 MB of 180 stay."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    gc.collect()
    with contextlib.suppress(AttributeError, OSError, TypeError):  # no glibc; Windows
        ctypes.CDLL(None).malloc_trim(0)
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return False
    return True


def to_device(t: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on ``device``, through pinned memory and without waiting where that is CUDA."""
    return t.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else t


def rng_states(world: World) -> list[dict]:
    """The generator states of every rank, in rank order. Every rank must call it."""
    states = [{"cpu": torch.get_rng_state()}] * world.size
    if world.device.type == "cuda":
        states[0]["cuda"] = torch.cuda.get_rng_state(world.device)
    if world.size > 1:
        dist.all_gather_object(states, states[0])
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
