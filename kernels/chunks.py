"""How many tokens linear_score takes at a time on a GPU, and the memory that it needs beside its inputs.

Small chunks are slow: each adds its part of d_weight to an fp32 [V, D] in memory, the products round a chunk up to
their tiles, and the row kernel to whole waves over the multiprocessors. Large chunks cost memory, linearly.

With a bf16 gradient the fp32 sum of d_weight is beside it as well: 2 V D bytes while the chunks run, 4 V D while
backward narrows it. That is 622 MB at (V, D) = (151936, 1024), where no chunk helps; then a chunk is given as much as
the sum takes. (A sum in bf16 doubled d_weight's error.) With fp32 weights the weight's bf16 copy is what is beside.
"""

import functools
import math

import torch

ALLOWANCE = 300_000_000  # bytes beside inputs and gradients
TILE = 128  # rows of a matrix product's tile
# bf16 products over memory bandwidth, FLOPs a byte: about 270 on an H100 (800 TFLOP/s, 3.0 TB/s), 185 on an H200.
FLOPS_PER_BYTE = 256


def row_stride(vocab: int) -> int:
    """Elements from row to row of the logits: rows on 16-byte boundaries whatever V is."""
    return -(-vocab // 64) * 64


def padded_rows(vocab: int, itemsize: int, device: torch.device) -> int:
    """Rows of the weight in the products: on CUDA those of ``row_stride`` where a row of logits is no multiple of 16
    bytes. On an H200 (torch 2.11) the three products at 8192 x 50257 x 768 ran at 150 TFLOP/s, others at 800."""
    return row_stride(vocab) if device.type == "cuda" and vocab * itemsize % 16 else vocab


def weight_bytes_beside(v: int, d: int, hidden_bytes: int, weight_bytes: int) -> int:
    """Bytes of size [V, D] beside what is the caller's while the chunks run: the fp32 sum beyond the weight's gradient,
    and the weight in the dtype of ``hidden`` where that is another, or with ``padded_rows``."""
    sum_bytes = max(4, hidden_bytes)
    copied = hidden_bytes != weight_bytes or v * hidden_bytes % 16
    return v * d * (sum_bytes - min(sum_bytes, weight_bytes) + (hidden_bytes if copied else 0))


def chunk_rows(n: int, v: int, d: int, dtype_bytes: int, sm_count: int, free_bytes: int, beside: int = 0) -> int:
    """Tokens a chunk for N tokens, V entries of ``dtype_bytes`` each, hidden size D, on ``sm_count`` multiprocessors.

    The candidates are the multiples of 128 whose logits fit, and N itself if it fits; the least cost wins, the smaller
    of equals. What fits is ALLOWANCE less ``beside`` (weight_bytes_beside), or ``beside`` where that is more, and at
    most half of ``free_bytes``: a choice of shape alone as long as memory is not short. At least one row."""
    fits = min(max(ALLOWANCE - beside, beside), free_bytes // 2)
    most = max(1, fits // (row_stride(v) * dtype_bytes))
    if n <= TILE:
        return max(1, min(n, most))
    sizes = [n] if n <= most else []
    sizes += range(TILE, min(most, n) + 1, TILE)
    if not sizes:
        return most
    return min(sizes, key=lambda rows: (_cost(n, rows, d, sm_count), rows))


def _cost(n: int, rows: int, d: int, sm_count: int) -> float:
    """Time of all chunks, in units of one product's time for one token.

    A product computes whole tiles, 2 FLOPs a token and entry of the weight, and moves its largest matrix, 2 bytes an
    entry (8 for d_weight); each hides most of the other (hypot). The row kernel moves 4 bytes a logit, in whole waves.
    """

    def chunk(m: int) -> float:
        tiles = -(-m // TILE) * TILE
        products = 2 * math.hypot(tiles, FLOPS_PER_BYTE) + math.hypot(tiles, 4 * FLOPS_PER_BYTE)
        return products + -(-m // sm_count) * sm_count * 2 * FLOPS_PER_BYTE / d

    full, rest = divmod(n, rows)
    return full * chunk(rows) + (chunk(rest) if rest else 0)


@functools.lru_cache(maxsize=256)
def cuda_chunk(n: int, v: int, d: int, hidden_bytes: int, weight_bytes: int, device: torch.device) -> int:
    """``chunk_rows`` for a CUDA device, which is asked for its free memory once a shape."""
    free = torch.cuda.mem_get_info(device)[0]
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # the allocator's own
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    beside = weight_bytes_beside(v, d, hidden_bytes, weight_bytes)
    return chunk_rows(n, v, d, hidden_bytes, sms, free, beside)


@functools.cache
def products_widen(device: torch.device) -> bool:
    """Whether a 16-bit matrix product can be written and added in fp32 (out_dtype=): on CUDA from sm_80 on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
