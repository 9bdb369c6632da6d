"""How many tokens linear_score takes at a time on a GPU, and the memory that it needs beside its inputs.

Small chunks are slow: each adds its part of d_weight to an fp32 [V, D] in memory, the products round a chunk up to
their tiles, and the row kernel to whole waves over the multiprocessors. Large chunks cost memory, linearly.

With a bf16 gradient the fp32 sum of d_weight is beside it as well: 2 V D bytes while the chunks run, 4 V D while
backward narrows it. That is 622 MB at (V, D) = (151936, 1024), where no chunk helps; then a chunk is given as much as
the sum takes. Where one chunk is all there is no sum: its product is the gradient. With fp32 weights the weight's bf16
copy is what is beside.

Of K chunks the first writes the fp32 sum, the others read and write it, and backward reads it and writes bf16: (8 K +
2) V D bytes. With linear_score's accum_dtype=torch.bfloat16 the sum is the gradient: (4 K - 2) V D bytes and nothing
beside. But each chunk rounds it: with parts of equal size that point anywhere the error is sqrt((K + 1) / 2) times that
of one rounding, 2.1 at K = 8, and more where they add up (kernels.bench has both). A second bf16 tensor that keeps what
the roundings lose would not save: 4 bytes an entry again, and no product can add to both, so that each chunk's d_weight
would be written and read on its own, 12 V D bytes a chunk for 8.
"""

import functools
import math

import torch

ALLOWANCE = 300_000_000  # bytes beside inputs and gradients, where linear_score's ``memory`` says no other number
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


def weight_bytes_beside(v: int, d: int, hidden_bytes: int, weight_bytes: int, summed: bool = True) -> int:
    """Bytes of size [V, D] beside what is the caller's while the chunks run: the fp32 sum beyond the weight's gradient,
    if it is ``summed``, and the weight in the dtype of ``hidden`` where that is another, or with ``padded_rows``."""
    sum_bytes = max(4, hidden_bytes)
    copied = hidden_bytes != weight_bytes or v * hidden_bytes % 16
    summed = sum_bytes - min(sum_bytes, weight_bytes) if summed else 0
    return v * d * (summed + (hidden_bytes if copied else 0))


def chunk_rows(
    n: int,
    v: int,
    d: int,
    dtype_bytes: int,
    sm_count: int,
    free_bytes: int,
    beside: int = 0,
    alone: int | None = None,
    allowance: int = ALLOWANCE,
) -> int:
    """Tokens a chunk for N tokens, V entries of ``dtype_bytes`` each, hidden size D, on ``sm_count`` multiprocessors.

    The candidates are the multiples of 128 whose logits fit, and N itself if it fits; the least cost wins, the smaller
    of equals. What fits is ``allowance`` less ``beside`` (weight_bytes_beside; ``alone`` where one chunk is all), or
    twice ``beside`` less that where it is more, and at most half of ``free_bytes``: a choice of shape alone as long as
    memory is not short. At least one row."""
    alone = beside if alone is None else alone
    room = max(allowance, 2 * beside)
    most, most_alone = (
        max(1, min(room - x, free_bytes // 2) // (row_stride(v) * dtype_bytes)) for x in (beside, alone)
    )
    if n <= TILE:
        return max(1, min(n, most_alone if n <= most_alone else most))
    sizes = [n] if n <= most_alone else []
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


@functools.lru_cache(maxsize=4096)
def cuda_chunk(
    n: int,
    v: int,
    d: int,
    hidden_bytes: int,
    weight_bytes: int,
    device: torch.device,
    trained: bool = True,
    direct: bool = False,
    allowance: int | None = None,
) -> int:
    """``chunk_rows`` for a CUDA device. ``trained``: the weight gets a gradient; ``direct``: in one chunk without a sum
    in fp32. ``allowance``: bytes, by default ALLOWANCE."""
    free, sms = _of_device(n.bit_length(), v, d, trained, device)
    beside, alone = (
        weight_bytes_beside(v, d, hidden_bytes, weight_bytes, summed) for summed in (trained, trained and not direct)
    )
    return chunk_rows(n, v, d, hidden_bytes, sms, free, beside, alone, ALLOWANCE if allowance is None else allowance)


@functools.lru_cache(maxsize=256)
def _of_device(bits: int, v: int, d: int, trained: bool, device: torch.device) -> tuple[int, int]:
    """(free bytes, multiprocessors). The driver, which takes its time, is asked once a head and number of binary digits
    of N, ``bits``: anew for the first batch that is twice as long."""
    free = torch.cuda.mem_get_info(device)[0]
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # the allocator's own
    return free, torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def products_widen(device: torch.device) -> bool:
    """Whether a 16-bit matrix product can be written and added in fp32 (out_dtype=): on CUDA from sm_80 on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
