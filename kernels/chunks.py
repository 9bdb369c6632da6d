"""How many tokens linear_score takes at a time on a GPU, and the memory that it needs beside its inputs.

Wanted: at most 300 MB beside inputs and gradients, and a time near that of the bare matrix products. Three things
make small chunks slow: a chunk's part of d_weight is added to an fp32 [V, D] in memory, 8 bytes an entry; the
products round the chunk up to their tiles; and the row kernel, one program a row, to whole waves over the
multiprocessors. Large chunks cost memory, linearly.

With a bf16 gradient the fp32 sum of d_weight is itself beside it: 2 V D bytes while the chunks run, 4 V D while
backward narrows it. That is 154 MB at (V, D) = (50257, 768), within the allowance; but 622 MB at (151936, 1024), and
there no chunk helps. To need less, d_weight would have to be summed in bf16 (8192 tokens in 10 chunks: an error of
3.7e-3 in place of 1.7e-3, measured on a CPU at 8192 x 512), or a slice of the vocabulary finished at a time, which
takes its logits for all tokens: a second product, 4/3 of the work. So a chunk is then given as much as the sum takes
anyway. With fp32 weights the sum is the gradient, and the bf16 copy of the weight is what is beside it.
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


def weight_bytes_beside(v: int, d: int, hidden_bytes: int, weight_bytes: int) -> int:
    """Bytes of size [V, D] that are there for the length of the chunks: the fp32 sum beyond the weight's gradient,
    and the weight in the dtype of ``hidden`` where that is another. Sizes in bytes an element."""
    sum_bytes = max(4, hidden_bytes)
    return v * d * (sum_bytes - min(sum_bytes, weight_bytes) + (hidden_bytes if hidden_bytes != weight_bytes else 0))


def bytes_beside(n: int, v: int, d: int, rows: int, hidden_bytes: int, weight_bytes: int) -> int:
    """Peak bytes of linear_score's step (mean or sum, both gradients) beside inputs and gradients, without what is
    of size N: in the forward a chunk of logits and ``weight_bytes_beside``, in backward the fp32 sum while it is
    narrowed to the gradient."""
    forward = min(rows, n) * row_stride(v) * hidden_bytes + weight_bytes_beside(v, d, hidden_bytes, weight_bytes)
    sum_bytes = max(4, hidden_bytes)
    return max(forward, v * d * sum_bytes if weight_bytes != sum_bytes else 0)


def chunk_rows(n: int, v: int, d: int, dtype_bytes: int, sm_count: int, free_bytes: int, beside: int = 0) -> int:
    """Tokens a chunk for N tokens, V entries of ``dtype_bytes`` each, hidden size D, on ``sm_count`` multiprocessors.

    Of the multiples of 128 whose logits fit, and N itself if it fits, the one of least cost by the model below,
    the smaller of equals. What fits: ALLOWANCE less ``beside`` (weight_bytes_beside), or as many bytes as that
    where it leaves less; at most half of ``free_bytes``, so that the choice is one of shape alone as long as
    memory is not short; at least one row. Never shrinks as memory grows.
    """
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

    A product computes whole tiles and moves its largest matrix through memory, 2 bytes an entry of the weight
    against 2 FLOPs a token and entry, 8 bytes for d_weight; each hides most of the other (hypot). The row kernel
    moves 4 bytes a logit where a product does 2 D FLOPs, in whole waves.
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
