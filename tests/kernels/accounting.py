"""What linear_score should need in memory, and the largest storage that was made, for the tests that measure it."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.chunks import row_stride, weight_bytes_beside


def bytes_beside(n: int, v: int, d: int, rows: int, hidden_bytes: int, weight_bytes: int) -> int:
    """Peak bytes of linear_score's step (mean or sum, both gradients) beside inputs and gradients, less what is of size
    N. In the forward: a chunk of logits and ``weight_bytes_beside``; in backward: the fp32 sum while it is narrowed.
    One chunk that is all needs no sum for a bf16 weight."""
    summed = rows < n or weight_bytes == 4
    forward = min(rows, n) * row_stride(v) * hidden_bytes
    forward += weight_bytes_beside(v, d, hidden_bytes, weight_bytes, summed)
    sum_bytes = max(4, hidden_bytes)
    return max(forward, v * d * sum_bytes if summed and weight_bytes != sum_bytes else 0)


class Largest(TorchDispatchMode):
    """Elements of the largest storage an operation returned, other than those of ``known``."""

    def __init__(self, *known):
        super().__init__()
        self.known, self.elements = {x.untyped_storage().data_ptr() for x in known}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in self.known:
                self.elements = max(self.elements, x.untyped_storage().nbytes() // 4)
        return out
