"""Prompt-and-answer examples packed into rows.

A row holds several examples without a gap. ``documents`` numbers them, for block-diagonal attention (Krell et al.,
"Efficient Sequence Packing without Cross-contamination", 2021), so that packing does not change what is computed. Which
examples a step reads is a pure function of (seed, step). Shapes in names: R rows, T tokens of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.windows import IGNORE_INDEX, epoch_blocks, permutation, token_counts


class Example(NamedTuple):
    id: str
    tokens: list[int]  # the prompt, the answer, the token that ends it
    prompt: int  # how many of them are the prompt's

    @property
    def length(self) -> int:
        """Positions it takes in a row: every token but the last is an input."""
        return len(self.tokens) - 1

    def targets(self, loss_on: str) -> int:
        """How many of its tokens are targets, of the answer or of all."""
        return self.length if loss_on == "all" else len(self.tokens) - self.prompt


def targets_of(examples: Sequence[Example], loss_on: str) -> np.ndarray:
    """The targets that the loss is of, of the answers or of all, of every one of ``examples``: int64 [n]."""
    return np.concatenate([e.tokens[e.length - e.targets(loss_on) + 1 :] for e in examples])


def target_counts(examples: Sequence[Example], loss_on: str, vocab_size: int) -> np.ndarray:
    """How often each token of the vocabulary is such a target: int64 [vocab_size]."""
    return token_counts(targets_of(examples, loss_on), vocab_size)


class Seen(NamedTuple):
    """The targets of packed rows that go through the head."""

    at: Tensor  # [N] int64, places in the flattened rows
    targets: Tensor  # [N] int64
    answer: Tensor  # [N] bool, of the answer; else of the prompt
    inside: Tensor  # [N] bool, in the loss

    def padded(self, multiple: int) -> "Seen":
        """With places of no target up to the next multiple."""
        n, fills = -len(self.at) % multiple, (0, IGNORE_INDEX, False, False)
        return Seen(*(F.pad(x, (0, n), value=fill) for x, fill in zip(self, fills, strict=True)))


@dataclass(frozen=True)
class Rows:
    """Packed examples, on the CPU. Position t predicts the token after it: it is the answer's where its target is."""

    tokens_RT: Tensor  # int64
    targets_RT: Tensor  # int64; -100 in padding
    documents_RT: Tensor  # int64
    answer_RT: Tensor  # bool

    def __len__(self) -> int:
        return len(self.tokens_RT)

    def __getitem__(self, part: slice | Tensor) -> "Rows":
        return Rows(self.tokens_RT[part], self.targets_RT[part], self.documents_RT[part], self.answer_RT[part])

    def positions(self, loss_on: str, every: int = 1) -> Tensor:
        """Flat positions whose target the loss is of, the answers' or all; int64, on the CPU. Of all, only each
        ``every``-th that is not an answer's."""
        chosen = self.answer_RT
        if loss_on == "all":
            held = self.targets_RT != IGNORE_INDEX
            chosen = chosen | held & (torch.arange(held.shape[1]) % every == 0)
        return chosen.flatten().nonzero()[:, 0]

    def seen(self, loss_on: str, *, prompt: bool = False, thin: int = 1) -> "Seen":
        """The targets in the loss and, with ``prompt``, those outside as well, of which every ``thin``-th."""
        at = self.positions("all" if prompt else loss_on, thin)
        answer = self.answer_RT.flatten()[at]
        return Seen(at, self.targets_RT.flatten()[at], answer, answer | (loss_on == "all"))

    @property
    def tokens(self) -> int:
        """Positions that hold an example's token."""
        return int((self.targets_RT != IGNORE_INDEX).sum())

    @property
    def padding(self) -> float:
        """The share of positions that hold nothing."""
        return 1 - self.tokens / self.targets_RT.numel()


def fit(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Which lengths share a row: first-fit decreasing, at most ``limit`` tokens a row (11/9 of the fewest rows possible
    and at most one more, Dósa, 2007). Rows in the order they were opened, ties in the given order.

    Raises ValueError for a length above ``limit`` or below 1."""
    bins: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not 1 <= lengths[i] <= limit:
            raise ValueError(f"an example of {lengths[i]} tokens: expected 1 to the {limit} of a row")
        at = next((k for k, left in enumerate(room) if left >= lengths[i]), len(room))
        if at == len(room):
            bins.append([])
            room.append(limit)
        bins[at].append(i)
        room[at] -= lengths[i]
    return bins


def pack(examples: Sequence[Example], limit: int, *, pad_id: int = 0, multiple: int = 8) -> Rows:
    """The examples in rows of at most ``limit`` tokens, each exactly once. Rows are as long as the longest, rounded up
    to ``multiple`` where ``limit`` allows. Raises ValueError for no examples and as ``fit`` does."""
    if not examples:
        raise ValueError("no examples to pack")
    groups = [[examples[i] for i in group] for group in fit([e.length for e in examples], limit)]
    longest = max(sum(e.length for e in group) for group in groups)
    shape = len(groups), min(limit, -(-longest // multiple) * multiple)
    tokens, targets, documents = (torch.full(shape, fill) for fill in (pad_id, IGNORE_INDEX, -1))
    answer = torch.zeros(shape, dtype=torch.bool)
    for row, group in enumerate(groups):
        end = 0
        for number, e in enumerate(group):
            at, end = end, end + e.length
            ids = torch.tensor(e.tokens)
            tokens[row, at:end], targets[row, at:end], documents[row, at:end] = ids[:-1], ids[1:], number
            answer[row, at + e.prompt - 1 : end] = True
    return Rows(tokens, targets, documents, answer)


def batch_indices(count: int, step: int, batch: int, seed: int) -> list[int]:
    """The ``batch`` of ``count`` examples that optimizer step ``step`` reads, see ``epoch_blocks``."""
    if count < 1 or batch < 1:
        raise ValueError(f"batches of {batch} out of {count} examples: expected at least 1 of each")
    return epoch_blocks(lambda epoch: permutation(seed, epoch, count), count, step, batch).tolist()
