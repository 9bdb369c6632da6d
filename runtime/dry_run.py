"""--dry-run: what a run would be, said before it is one; --dry-run timed makes a few steps of it.

Nothing is written: no run folder, no cache of data. What a cache holds is read; what it does not hold is made in a
temporary folder that goes when the run ends.
"""

import contextlib
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kernels.chunks import ALLOWANCE
from kernels.head_pass import CPU_BUDGET
from runtime.machine import World, peak_flops, peak_memory

# Bytes of state a parameter; two fp32 numbers, 8, for the others. Muon has one of its matrices, which are most.
STATE_BYTES = {"sgd": 4, "muon": 4, "adamw8bit": 2, "paged-adamw8bit": 2, "prodigy": 16, "schedule-free-plus": 16}
FIRST, TIMED = 1, 2  # steps that are not timed, and that are
LEFT_OUT = "left out: validation, generation, what a layer holds for a moment, what the allocator wastes"


class Aside:
    """A temporary folder that stands for the folder ``cache``: links to what that holds, and room for what it does
    not. The same one for all ranks of a machine; rank 0 removes it."""

    def __init__(self, cache: str | Path, world: World):
        self.cache, self._own = Path(cache).absolute(), tempfile.TemporaryDirectory(prefix="scorecast-")
        names = [self._own.name]
        if world.size > 1:
            dist.broadcast_object_list(names)
        self.folder = Path(names[0])
        for file in (f for f in self.cache.rglob("*") if world.main and f.is_file()):
            link = self.folder / file.relative_to(self.cache)
            link.parent.mkdir(parents=True, exist_ok=True)
            try:
                link.symlink_to(file)
            except OSError:  # Windows grants links to some users only
                shutil.copyfile(file, link)
        self._linked = set(self.folder.rglob("*")) if world.main else set()

    def says(self) -> str:
        """What has been made in it beside the links, or ""."""
        new = [f for f in self.folder.rglob("*") if f.is_file() and f not in self._linked]
        return f"; {self.cache} does not hold them: made for this, and dropped" if new else ""

    def close(self) -> None:
        self._own.cleanup()


@dataclass(frozen=True)
class Memory:
    """Bytes of a training step on one rank, by what holds them."""

    weights: int
    gradients: int
    optimizer: int
    activations: int  # what forward keeps of a micro-batch for backward, and what backward adds in a block
    head: int  # a chunk of logits, and the gradient of a trained head until it is the embedding's
    process: int  # on a CPU: libraries and data, as far as the process has been until now

    @property
    def total(self) -> int:
        return sum(vars(self).values())


def estimate(model: nn.Module, cfg, forwards: Callable[[int, World], Iterator], rows: int, world: World):
    """The Memory of a step of ``cfg`` whose micro-batch has ``rows``; ``forwards(n, world)`` yields (hidden [N, D],
    targets [N]) of n rows at a time, the longest first.

    Activations are measured, as what autograd saves of one row and of two beside the weights, and go on along that
    line. A block's gradients are taken to be as large as what it saves; one that is recomputed is there once more.

    On two CPU cores the peaks of nano-size runs of 0.7 to 1.4 GB were 10 to 20 % above the total: glibc's heap grows
    while it is cut up. On CUDA it has not been measured."""
    cuda, before = world.device.type == "cuda", peak_memory(world.device)
    tensors = [getattr(t, "to_local", lambda t=t: t)() for t in (*model.parameters(), *model.buffers())]
    weights, trained = sum(t.nbytes for t in tensors), [t for t in tensors if t.requires_grad]
    held = {t.untyped_storage().data_ptr() for t in tensors}

    def kept(n: int) -> tuple[int, Tensor]:
        with torch.compiler.set_stance("force_eager"), saved_storages(held) as found:  # compiling is not worth it
            hidden, _ = next(forwards(n, world))
        return sum(found.values()), hidden

    rows_of = (1, min(rows, 2))
    (one, _), (two, hidden) = map(kept, rows_of)
    blocks = sum(len(m) for m in model.modules() if isinstance(m, nn.ModuleList))
    whole, again = (one, two), model.checkpoint_activations
    if again:
        model.checkpoint_activations = False
        whole = [kept(n)[0] for n in rows_of]
        model.checkpoint_activations = True
    one, two = (a + (1 + again) * b // blocks for a, b in zip((one, two), whole, strict=True))
    head, tokens = model.head_weight, len(hidden) * rows // rows_of[1]
    most = cfg.head_memory * 10**6 or (ALLOWANCE if cuda else CPU_BUDGET)
    chunk = min(tokens * len(head) * hidden.itemsize, most)
    bytes_each = STATE_BYTES.get(cfg.optimizer, 8) + 4 * bool(getattr(cfg, "tail_average", 0))
    return Memory(
        weights=weights,
        gradients=sum(t.nbytes for t in trained),
        optimizer=bytes_each * sum(t.numel() for t in trained),
        activations=one + (rows - 1) * (two - one),
        head=chunk + 4 * head.numel() * head.requires_grad,
        process=0 if cuda else max(before - weights, 0),
    )


@contextlib.contextmanager
def saved_storages(held: set[int]):
    """{address: bytes} of the storages that autograd saves in the block, without those at the addresses ``held``."""
    found: dict[int, int] = {}
    alive = []  # so that no address is used twice

    def pack(t: Tensor) -> Tensor:
        storage = getattr(t, "to_local", lambda: t)().untyped_storage()
        if storage.data_ptr() not in held:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield found


@dataclass
class Rehearsal:
    """The run of ``cfg`` from its ``step`` on, and a few steps in the place of all of them."""

    cfg: object
    world: World
    name: str  # of the model
    step: int
    tokens: int  # of the training set
    step_tokens: float  # of an optimizer step, over all ranks
    validated: int  # tokens of a validation
    flops: float  # of a token
    memory: Memory
    weights: tuple[int, int]  # trained, all
    anew: str = ""  # of the data, `Aside.says`
    clocks: list[float] = field(default_factory=list)

    def plan(self) -> list[str]:
        """What the run would be, lines."""
        left, parts = self.cfg.steps - self.step, ", ".join(f"{k} {size(v)}" for k, v in vars(self.memory).items())
        whole, start = left * self.step_tokens, f" more, from step {self.step:,}" if self.step else ""
        return [
            "dry run: nothing is written",
            row("model", f"{self.name}, loss {self.cfg.loss}, on {self.world.size} x {self.world.device.type}"),
            row("parameters", "{:,} trained of {:,}".format(*self.weights)),
            row("training set", f"{self.tokens:,} tokens{self.anew}"),
            row("steps", f"{left:,}{start}, of {self.step_tokens:,.0f} tokens over all ranks"),
            row("all of it", f"{whole:,.0f} tokens, {whole / self.tokens:.3g} epochs"),
            row("FLOPs", f"{self.flops:.3g} a token, {self.flops * whole:.3g} in all"),
            row("memory", f"about {size(self.memory.total)} a rank: {parts}"),
            row("", LEFT_OUT),
        ]

    def stepped(self) -> bool:
        """After a step: whether it was the last one here."""
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)
        self.clocks.append(time.perf_counter())
        return len(self.clocks) == FIRST + TIMED or self.step + len(self.clocks) == self.cfg.steps

    def timing(self) -> list[str]:
        """What the steps took, and what the whole would, lines."""
        seconds = [b - a for a, b in zip(self.clocks[FIRST - 1 :], self.clocks[FIRST:], strict=False)]
        if not seconds:
            return [row("a step", f"not timed: the run has no step after the first {FIRST}")]
        each, left = sum(seconds) / len(seconds), self.cfg.steps - self.step
        rate = self.flops * self.step_tokens / each / self.world.size
        peak = peak_flops(self.world.device, self.world.dtype(self.cfg.dtype))
        share = f", {100 * rate / peak:.1f} % of its peak" if peak else ""
        speed = f"{self.step_tokens / each:,.0f} tokens/s, {rate:.3g} FLOP/s a device{share}"
        times = math.ceil(self.cfg.steps / self.cfg.eval_every) - self.step // self.cfg.eval_every
        checks = times * self.validated / self.step_tokens * each / 3  # a forward is a third of a step's FLOPs
        of = "CUDA allocations" if self.world.device.type == "cuda" else "the whole process"
        return [
            row("a step", f"{' and '.join(f'{s:.3g}' for s in seconds)} s, after {FIRST} that is not timed; {speed}"),
            row("the whole", f"{left:,} steps {span(left * each)}, and {times} validations about {span(checks)}"),
            row("", "without the final evaluation and what it generates"),
            row("memory", f"{size(peak_memory(self.world.device))} at its peak: {of}"),
        ]


def weight_count(model: nn.Module) -> tuple[int, int]:
    """(trained, all) parameters. Quantised weights, two in a byte of ``packed``, count as what they stand for."""
    parameters = list(model.parameters())
    quantised = sum(math.prod(m.shape) for m in model.modules() if hasattr(m, "packed"))
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters) + quantised


def row(name: str, text: str) -> str:
    return f"  {name:13} {text}"


def size(count: float) -> str:
    """Bytes in powers of 1000: 1.23 GB."""
    unit, name = next(((u, n) for u, n in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if count >= u), (1, "B"))
    return f"{count / unit:.3g} {name}"


def span(seconds: float) -> str:
    """43 s, 5 min 12 s, 3 h 20 min, 2 d 4 h."""
    seconds = round(seconds)
    for unit, lower, many, few in ((86400, 3600, "d", "h"), (3600, 60, "h", "min"), (60, 1, "min", "s")):
        if seconds >= unit:
            return f"{seconds // unit} {many} {seconds % unit // lower} {few}"
    return f"{seconds} s"
