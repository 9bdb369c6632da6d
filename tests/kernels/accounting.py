"""What linear_score should need in memory, for the tests that measure it."""

from kernels.chunks import row_stride, weight_bytes_beside


def bytes_beside(n: int, v: int, d: int, rows: int, hidden_bytes: int, weight_bytes: int) -> int:
    """Peak bytes of linear_score's step (mean or sum, both gradients) beside inputs and gradients, less what is of size
    N. In the forward: a chunk of logits and ``weight_bytes_beside``; in backward: the fp32 sum while it is narrowed."""
    forward = min(rows, n) * row_stride(v) * hidden_bytes + weight_bytes_beside(v, d, hidden_bytes, weight_bytes)
    sum_bytes = max(4, hidden_bytes)
    return max(forward, v * d * sum_bytes if weight_bytes != sum_bytes else 0)
