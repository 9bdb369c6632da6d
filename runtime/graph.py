"""Forward and backward of a micro-batch as a CUDA graph: the host launches it at once, however many kernels it has.

What that is for: models so small, or layers so many and so narrow (LoRA over NF4), that the host needs longer to launch
a step than the device to do it.
"""

from collections.abc import Callable, Hashable, Iterable

import torch
from torch import Tensor, nn


def check_graph(cfg, world) -> None:
    """Raises ValueError, one line, for a --cuda-graph that cannot be had here or not with other flags."""
    if not cfg.cuda_graph:
        return
    if world.device.type != "cuda":
        raise ValueError(f"--cuda-graph needs a CUDA device, not {world.device.type}; leave it out")
    if world.size > 1:
        raise ValueError(
            f"--cuda-graph is for one process, not {world.size}: gradients meet outside of it; leave it out"
        )
    if cfg.checkpoint_activations:
        raise ValueError("--cuda-graph is for models that the host slows down, --checkpoint-activations for large ones")


def capture(run: Callable[[], object], pool) -> tuple[object, Callable[[], None]]:
    """What ``run`` returns, as tensors that each replay fills anew, and the replay. Nothing is computed yet."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        outputs = run()
    return outputs, graph.replay


class Replayed:
    """``step(*inputs)``, which adds to the gradients of ``parameters``, with the same results and fewer launches.

    Tensors of new shapes are given to ``step`` as they are; when the same shapes come again, with the same of what is
    no tensor, it is captured, and from then on replayed. What it returns is overwritten by the next call. ``step`` must
    not wait for the device, nor read numbers of the host that change, but for those that ``baked`` gives: where they
    have changed, what was captured is dropped. Every parameter has a gradient from then on, 0 where ``step`` gives it
    none."""

    def __init__(
        self,
        step: Callable[..., object],
        parameters: Iterable[nn.Parameter],
        baked: Callable[[], Hashable] = lambda: None,
    ):
        self.step, self.baked = step, baked
        self.parameters = [p for p in parameters if p.requires_grad]
        self.gradients: list[Tensor] = []
        self.seen, self.numbers = {}, baked()
        self.pool = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None

    def __call__(self, *inputs):
        if self.numbers != (numbers := self.baked()):
            self.seen, self.numbers = {}, numbers
        key = tuple((x.shape, x.dtype) if isinstance(x, Tensor) else x for x in inputs)
        if key not in self.seen:
            self.seen[key] = None
            return self.step(*inputs)
        self._hold_gradients()
        if self.seen[key] is None:
            places = [x.clone() if isinstance(x, Tensor) else x for x in inputs]
            self.seen[key] = places, *capture(lambda: self.step(*places), self.pool)
        places, outputs, replay = self.seen[key]
        for place, x in zip(places, inputs, strict=True):
            if isinstance(place, Tensor):
                place.copy_(x, non_blocking=True)
        replay()
        return outputs

    def _hold_gradients(self) -> None:
        """Gradients where a graph finds them again: 0 where the optimizer has dropped them, moved from where a call of
        ``step`` has left them."""
        if not self.gradients:
            self.gradients = [torch.empty_like(p) for p in self.parameters]
        pairs = list(zip(self.parameters, self.gradients, strict=True))
        if dropped := [g for p, g in pairs if p.grad is None]:
            torch._foreach_zero_(dropped)
        for p, g in pairs:
            if p.grad is not None and p.grad is not g:
                g.copy_(p.grad)
            p.grad = g
