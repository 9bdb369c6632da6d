"""Batches out of a TokenSet: windows, their order, and label noise, pure functions of (seed, step).

Randomness is raw Philox output under the key (seed, counter), which numpy guarantees never to change.
"""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch

from data.cache import TokenSet

IGNORE_INDEX = -100  # of targets outside the loss, as in torch.nn.functional.cross_entropy
LABEL_NOISE_COUNTER = 1 << 63  # a stream of random numbers apart from the epochs' orders under the same seed


def random_uint64(seed: int, counter: int, n: int) -> np.ndarray:
    """``n`` uint64 of the stream (seed, counter)."""
    return np.random.Philox(key=np.array([seed, counter], dtype=np.uint64)).random_raw(n)


def permutation(seed: int, counter: int, n: int) -> np.ndarray:
    """A permutation of ``n``, int64 [n]."""
    return np.argsort(random_uint64(seed, counter, n), kind="stable")


@lru_cache(2)  # a batch touches two epochs at most, unless it is larger than the data
def _kept_permutation(seed: int, counter: int, n: int) -> np.ndarray:
    order = permutation(seed, counter, n)
    order.flags.writeable = False  # it is shared
    return order


def epoch_blocks(order: Callable[[int], np.ndarray], count: int, step: int, batch: int) -> np.ndarray:
    """The ``batch`` rows of ``count`` that optimizer step ``step`` reads, int64 [batch].

    Steps read the concatenation of order(0), order(1), ... in blocks of ``batch``, across epochs."""
    at, end, parts = step * batch, (step + 1) * batch, []
    while at < end:
        epoch, offset = divmod(at, count)
        parts.append(order(epoch)[offset : offset + end - at])
        at += len(parts[-1])
    return np.concatenate(parts)


def _check(least: int, **counts: int) -> None:
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
            raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")


def token_counts(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """How often ``tokens`` (whole numbers [n]) has each of the vocabulary: int64 [vocab_size]."""
    counts, size = np.zeros(vocab_size, np.int64), 1 << 22  # at a time: bincount makes a copy as int64
    for at in range(0, len(tokens), size):
        counts += np.bincount(tokens[at : at + size], minlength=vocab_size)
    return counts


class Windows:
    """Non-overlapping windows of ``length`` inputs over a TokenSet; every token is a target exactly once an epoch.

    The end-of-text token comes before the first token, as before every document's. The last window is padded: inputs
    eos_id, targets -100. Raises ValueError where ``length`` exceeds the tokens."""

    def __init__(self, tokens: TokenSet, length: int):
        _check(1, **{"the sequence length": length})
        self._data = np.asarray(tokens.tokens)  # a plain view of the map: np.memmap's own indexing is slower
        if length > len(self._data):
            longer = f"longer than {tokens.name or 'the data'}, which has {len(self._data)}"
            raise ValueError(f"a sequence of {length} tokens is {longer}; take a shorter one")
        self.length, self.eos_id, self.bytes = length, tokens.eos_id, tokens.text_bytes

    def __len__(self) -> int:
        return -(-len(self._data) // self.length)

    def get(self, indices) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets ``[B, T]`` int64 of the windows ``indices`` (whole numbers in [0, len(self)))."""
        indices, T = np.asarray(indices, dtype=np.int64).reshape(-1), self.length
        if indices.size and not (0 <= indices.min() and indices.max() < len(self)):
            raise ValueError(f"window {indices.min()}..{indices.max()} is outside 0..{len(self) - 1}")
        rows = np.full((len(indices), T + 1), self.eos_id, np.int64)
        for row, i in zip(rows, indices.tolist(), strict=True):
            tokens = self._data[max(i * T - 1, 0) : i * T + T]
            begin = int(i == 0)  # the first window has no token before it
            row[begin : begin + len(tokens)] = tokens
        x_BT, y_BT = (torch.from_numpy(part.copy()) for part in (rows[:, :-1], rows[:, 1:]))
        y_BT.numpy()[np.arange(T) >= len(self._data) - T * indices[:, None]] = IGNORE_INDEX
        return x_BT, y_BT

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """The permutation of the windows in ``epoch``: int64 [len(self)], read-only, a pure function of both."""
        _check(0, seed=seed, epoch=epoch)
        return _kept_permutation(seed, epoch, len(self))

    def batch_indices(self, step: int, batch: int, seed: int) -> np.ndarray:
        """The windows of optimizer step ``step``, see ``epoch_blocks``. There is no state to save or to lose."""
        _check(0, step=step)
        _check(1, batch=batch)
        return epoch_blocks(lambda epoch: self.order(seed, epoch), len(self), step, batch)


def flip_labels(
    y_BT: torch.Tensor, vocab_size: int, share: float, step_share: float, seed: int, step: int, *, first_row: int = 0
) -> tuple[torch.Tensor, int]:
    """Label noise: targets with flips, and how many were flipped.

    In a share ``step_share`` of the steps each target (never one of -100) becomes, with probability ``share``, another
    token, uniformly. The draw depends on (seed, step) and the place in the GLOBAL batch, of which ``y_BT``, int64 on
    the CPU, holds the rows from ``first_row`` on. It is not written to; where nothing is flipped it is returned itself.
    """
    for name, value in dict(share=share, step_share=step_share).items():
        if not 0 <= value <= 1:
            raise ValueError(f"label noise: {name} must be between 0 and 1, not {value!r}")
    _check(2, vocab_size=vocab_size)
    _check(0, seed=seed, step=step, first_row=first_row)
    if y_BT.dtype != torch.int64 or y_BT.device.type != "cpu" or y_BT.dim() != 2:
        raise ValueError(f"label noise: targets must be int64 [B, T] on the CPU, not {y_BT.dtype} on {y_BT.device}")
    if not share or not step_share:
        return y_BT, 0
    counter = LABEL_NOISE_COUNTER | step
    if (random_uint64(seed, counter, 1)[0] >> np.uint64(11)) * 2.0**-53 >= step_share:
        return y_BT, 0
    skip = 1 + first_row * y_BT.shape[1]
    raw = random_uint64(seed, counter, skip + y_BT.numel())[skip:].reshape(y_BT.shape)
    y = y_BT.numpy()
    # High half: flip or not. Low half: how far to move, 1 .. V-1, so never onto itself; uniform to V / 2^32.
    flip = ((raw >> np.uint64(32)) * 2.0**-32 < share) & (y != IGNORE_INDEX)
    move = ((raw & np.uint64(0xFFFFFFFF)) * np.uint64(vocab_size - 1) >> np.uint64(32)).astype(np.int64) + 1
    return torch.from_numpy(np.where(flip, (y + move) % vocab_size, y)), int(flip.sum())
