"""Continuous batching: a fixed number of cache rows, each given the next prompt as soon as its text has ended.

Every step runs one token of every row, in the same shapes whatever the rows are doing: on a GPU it is a CUDA graph. Of
a new prompt all but the last token is written to the row's cache in one forward; the last one goes through the common
step, which yields the first new one. The host reads one token a row after each step, so it can end rows by text, and
put tokens into a row that the model has not chosen (``insert``).

A row's tokens depend on its request alone, up to the rounding of sums in batches of another size: random numbers are
each request's own stream.

Shapes in names: B rows, T prompt tokens, V = vocab_size.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile
from typing import NamedTuple

import torch
from torch import Tensor

from model.layers import KVCache
from model.packed import head

SPAN = 128  # attention reads the cache up to the next multiple of so many positions; on CUDA a graph each
# Prompts are padded to a multiple of so many tokens, so that few lengths occur, and share a forward while its padding
# is below that, about what a forward of its own costs (on a GPU by reckoning).
CPU_MULTIPLE, CPU_PADDING = 8, 8
GPU_MULTIPLE, GPU_PADDING = 32, 2048
COLDEST = 1e-6  # the lowest temperature that logits are divided by
PREFILL = 16384  # prompt tokens of one forward, at most


@dataclass(frozen=True)
class Request:
    prompt: Sequence[int]
    max_new_tokens: int
    temperature: float = 0.0  # 0: the most probable token
    seed: int = 0  # of its own random numbers

    def __post_init__(self):
        if not self.prompt or self.max_new_tokens < 1 or not 0 <= self.temperature < float("inf"):
            given = f"{len(self.prompt)} prompt tokens, {self.max_new_tokens} new ones, temperature {self.temperature}"
            raise ValueError(f"a request of {given}: expected at least 1 and 1, and a temperature of 0 or more")


class Finished(NamedTuple):
    index: int  # of the request
    tokens: list[int]  # new tokens, inserted ones included, without the EOS
    reason: str  # "eos", "stop" or "length"
    end: int | None = None  # the EOS, where that is the reason


class _Row:
    """What one cache row is doing."""

    def __init__(self, index: int, request: Request):
        self.index, self.request = index, request
        self.token, self.position = request.prompt[-1], len(request.prompt) - 1  # what the next step feeds
        self.new: list[int] = []
        self.inserted: deque[int] = deque()
        self.uniform: list[float] = []
        if request.temperature:
            generator = torch.Generator().manual_seed(request.seed)
            self.uniform = torch.rand(request.max_new_tokens, dtype=torch.float64, generator=generator).tolist()

    @property
    def feed(self) -> tuple[int, int, float, float]:
        """Of the next step: token, position, temperature, uniform number."""
        uniform = self.uniform[len(self.new)] if self.uniform else 0.0
        return self.token, self.position, self.request.temperature, uniform

    def take(self, token: int, eos: set[int], stop: Callable[[list[int]], bool] | None) -> str:
        """Adds the token; the reason why the row ends with it, empty where it goes on."""
        if token in eos:
            return "eos"
        self.new.append(token)
        self.token, self.position = token, self.position + 1
        if stop is not None and stop(self.new):
            return "stop"
        return "length" if len(self.new) == self.request.max_new_tokens else ""


def cache_length(requests: Sequence[Request], positions: int) -> int:
    """Positions of a cache for the requests. Raises ValueError, naming the first request that does not fit, above
    ``positions``, the model's."""
    needed = [len(r.prompt) + r.max_new_tokens - 1 for r in requests]  # the last new token is not fed
    for i, (request, n) in enumerate(zip(requests, needed, strict=True)):
        if n > positions:
            room = f"no room for {request.max_new_tokens} new ones in the model's {positions} positions; ask for fewer"
            raise ValueError(f"prompt {i} has {len(request.prompt)} tokens, which leaves {room}")
    return max(needed)


@torch.no_grad()
def decode(
    model,
    requests: Sequence[Request],
    rows: int,
    *,
    eos_ids: Sequence[int] = (),
    stop: Callable[[list[int]], bool] | None = None,
    insert: Callable[[list[int]], Sequence[int]] | None = None,
    refill: int = 1,
) -> Iterator[list[Finished]]:
    """Yields after every step the requests that it ended, mostly none; each request ends once.

    ``model``: a Decoder, in eval mode. A row ends at one of ``eos_ids``, where ``stop(new tokens)`` is true, or at its
    max_new_tokens. ``insert(new tokens)`` gives tokens that come next instead of what the model would choose. Both are
    called on the host after each new token, ``insert`` not while inserted tokens are still to come. ``refill``: prompts
    are taken in when so many rows are free; above 1 there are fewer, larger prompt forwards for a few idle rows.

    Logits have the activations' dtype. A random token is the one at which the cumulative probability, in fp64, passes
    the row's next uniform number. Raises ValueError for requests that do not fit and for logits that are not finite."""
    if rows < 1 or refill < 1:
        raise ValueError(f"rows={rows}, refill={refill}: expected at least 1 of each")
    if not requests:
        return
    length, rows = cache_length(requests, model.config.max_position_embeddings), min(rows, len(requests))
    step, slots = _Step(model, rows, length), [None] * rows
    eos, waiting = set(eos_ids), deque(enumerate(requests))
    while waiting or any(slots):
        free = [b for b, row in enumerate(slots) if row is None]
        if waiting and len(free) >= min(refill, rows):
            taken = free[: len(waiting)]
            for b in taken:
                slots[b] = _Row(*waiting.popleft())
            _prefill(model, step.cache, [(b, slots[b].request.prompt[:-1]) for b in taken])
        ended = []
        for b, token in enumerate(step(slots)):
            row = slots[b]
            if row is None:
                continue
            if token < 0:
                raise ValueError(f"the logits of request {row.index} are not finite; the weights are damaged")
            token = row.inserted.popleft() if row.inserted else token
            reason = row.take(token, eos, stop)
            if reason:
                ended.append(Finished(row.index, row.new, reason, token if reason == "eos" else None))
                slots[b] = None
            elif insert is not None and not row.inserted:
                row.inserted.extend(insert(row.new))
        yield ended


def _prefill(model, cache: KVCache, prompts: list[tuple[int, Sequence[int]]]) -> None:
    """Writes prompts to their cache rows, those of like length in one forward, so that padding is small."""
    device, limit = cache.k.device, cache.k.shape[2]
    on_cpu = device.type == "cpu"
    multiple, most_padding = (CPU_MULTIPLE, CPU_PADDING) if on_cpu else (GPU_MULTIPLE, GPU_PADDING)
    left = sorted(((b, tokens) for b, tokens in prompts if tokens), key=lambda p: -len(p[1]))
    while left:
        T = min(limit, -(-len(left[0][1]) // multiple) * multiple)
        most = max(1, PREFILL // T)
        padded = accumulate(T - len(tokens) for _, tokens in left[1:most])
        n = 1 + sum(1 for _ in takewhile(lambda total: total < most_padding, padded))
        group, left = left[:n], left[n:]
        tokens_BT = torch.tensor([[*tokens, *[0] * (T - len(tokens))] for _, tokens in group], device=device)
        rows_B = torch.tensor([b for b, _ in group], device=device)
        positions_BT = torch.arange(T, device=device).expand(len(group), T)
        model(tokens_BT, positions_BT=positions_BT, cache=cache.first(T), rows_B=rows_B)


class _Step:
    """One token of every row: the forward and the head, in static shapes, then the choice of the next tokens."""

    def __init__(self, model, rows: int, length: int):
        self.model, self.length, self.cache = model, length, model.new_cache(rows, length)
        self.device = self.cache.k.device
        self.head = head(model.head_weight.to(model.dtype))  # once, not in every step
        self.tokens_B1 = torch.zeros(rows, 1, dtype=torch.int64, device=self.device)
        self.positions_B1 = torch.zeros_like(self.tokens_B1)
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def forward(self, span: int) -> Tensor:
        hidden = self.model(self.tokens_B1, positions_BT=self.positions_B1, cache=self.cache.first(span))[:, 0]
        return self.head(hidden)  # [B, V]

    def logits(self, span: int) -> Tensor:
        if self.device.type != "cuda":
            return self.forward(span)
        if span not in self.graphs:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self.forward(span)  # libraries set themselves up outside the capture; it writes what the replay will
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = self.forward(span)
            self.graphs[span] = graph, out
        graph, out = self.graphs[span]
        graph.replay()
        return out

    def __call__(self, slots: list[_Row | None]) -> list[int]:
        """The next token of every row, -1 where its logits are not finite. An idle row repeats token 0 at 0."""
        feeds = [(0, 0, 0.0, 0.0) if row is None else row.feed for row in slots]
        state = torch.tensor(feeds, dtype=torch.float64).t()  # one copy to the device; integers are exact in it
        sampling, last = bool(state[2].any()), int(state[1].max())
        state = state.to(self.device)
        self.tokens_B1.copy_(state[0, :, None])
        self.positions_B1.copy_(state[1, :, None])
        logits_BV = self.logits(min(self.length, -(-(last + 1) // SPAN) * SPAN))
        best_B = logits_BV.argmax(dim=1)
        if sampling:
            warm_B = state[2].clamp_min(COLDEST)[:, None]
            cumulative_BV = (logits_BV.double() / warm_B).softmax(dim=1).cumsum_(dim=1)
            total_B1 = cumulative_BV[:, -1:]
            drawn_B = torch.searchsorted(cumulative_BV, state[3, :, None] * total_B1, right=True)[:, 0]
            best_B = torch.where(state[2] > 0, drawn_B.clamp_max(logits_BV.shape[1] - 1), best_B)
        best_B = torch.where(logits_BV.isfinite().all(dim=1), best_B, -1)
        return best_B.tolist()
