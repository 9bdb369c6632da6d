"""Decoding strategies: what is chosen from the logits of one step, in fixed shapes.

``Beams`` searches, ``Draws`` is greedy or samples. Either holds its state in tensors that are written in place, counts
its length on the device and branches on no tensor's value. So a step is the same program every time, for torch.compile
and CUDA graphs, and needs no answer from the device.

Shapes in names: B prompts, K = num_beams, N = B * K rows with the beams of a prompt adjacent, L prompt and new tokens,
C candidates of a prompt, V = vocab_size.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from model.layers import check_fields, check_value

IMPOSSIBLE = -1e9  # the score of a hypothesis that is not there; finite, so that sums and order stay defined


@dataclass(frozen=True)
class Decoding:
    """How to decode. Lengths count new tokens, the EOS among them: transformers' max_length and min_length of an
    encoder-decoder count the start token too and are one more. Raises ValueError for what cannot be."""

    max_new_tokens: int
    min_new_tokens: int = 0  # no EOS before so many
    num_beams: int = 1  # 1: greedy, or sampling where temperature > 0
    length_penalty: float = 1.0  # a hypothesis scores (sum of log p) / length^this
    no_repeat_ngram: int = 0  # no n-gram of this size twice in prompt and output; 0: off
    early_stopping: bool | str = False  # True: at num_beams hypotheses; False: a heuristic; "never": surely
    eos_id: int | tuple[int, ...] | None = None  # None: every row runs to the limit
    pad_id: int | None = None  # fills ended rows; None: the (first) EOS, or 0
    forced_bos_id: int | None = None  # the first new token
    forced_eos_id: int | None = None  # the last one the limit allows
    temperature: float = 0.0  # 0: the most probable token; else sampling
    top_k: int = 0
    top_p: float = 1.0
    num_return: int = 1  # hypotheses per prompt, the best first

    def __post_init__(self):
        check_fields(self, "a positive integer", "max_new_tokens", "num_beams", "num_return")
        check_fields(self, "an integer of 0 or more", "min_new_tokens", "no_repeat_ngram")
        if self.max_new_tokens < self.min_new_tokens:
            lengths = f"max_new_tokens={self.max_new_tokens} is below min_new_tokens={self.min_new_tokens}"
            raise ValueError(f"{lengths}; raise the limit or lower the minimum")
        if self.num_return > self.num_beams:
            raise ValueError(f"num_return={self.num_return}: expected at most num_beams={self.num_beams}")
        if not math.isfinite(self.length_penalty):
            raise ValueError(f"length_penalty={self.length_penalty!r}: expected a finite number")
        if not (isinstance(self.early_stopping, bool) or self.early_stopping == "never"):
            raise ValueError(f"early_stopping={self.early_stopping!r}: expected True, False or 'never'")
        check_sampling(self.temperature, self.top_k, self.top_p)
        if self.temperature > 0 and self.num_beams > 1:
            both = f"temperature={self.temperature!r} with num_beams={self.num_beams}"
            raise ValueError(f"{both}: sampling has no beams, expected 1")
        for name, value in self.token_ids():
            check_value(name, value, "an integer of 0 or more")

    def token_ids(self) -> list[tuple[str, int]]:
        """Name and value of every token id that is given."""
        ids = [(name, getattr(self, name)) for name in ("pad_id", "forced_bos_id", "forced_eos_id")]
        return [(name, i) for name, i in [*ids, *(("eos_id", eos) for eos in self.eos_ids)] if i is not None]

    @property
    def eos_ids(self) -> tuple[int, ...]:
        return () if self.eos_id is None else self.eos_id if isinstance(self.eos_id, tuple) else (self.eos_id,)

    @property
    def fill(self) -> int:
        return self.pad_id if self.pad_id is not None else self.eos_ids[0] if self.eos_ids else 0

    def check_vocabulary(self, V: int) -> None:
        """Raises ValueError for an id that a vocabulary of ``V`` tokens does not have."""
        for name, value in self.token_ids():
            if value >= V:
                raise ValueError(f"{name}={value}: expected a token id below the vocabulary's {V}")
        if V <= len(self.eos_ids):
            raise ValueError(f"eos_id={self.eos_id!r} is the whole vocabulary of {V} tokens; nothing can be generated")


def check_sampling(temperature: float, top_k: int, top_p: float) -> None:
    """Raises ValueError for what does not say how to draw a token."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature={temperature!r}: expected 0 (greedy) or a positive number")
    check_value("top_k", top_k, "an integer of 0 or more")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p!r}: expected a probability mass in (0, 1]")


def filter_logits(logits_BV: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Logits [B, V] with the tokens that may not be drawn at -inf. At least one token always stays.

    First go all below the ``top_k``-th largest (ties with it stay; 0 keeps all). Then go all outside the nucleus, the
    smallest set of most probable tokens whose mass reaches ``top_p`` (Holtzman et al., 2020; 1 keeps all)."""
    if 0 < top_k < logits_BV.shape[-1]:
        kth_B1 = logits_BV.topk(top_k).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth_B1, float("-inf"))
    if top_p < 1:
        sorted_BV, order_BV = logits_BV.sort(descending=True, stable=True)
        p_BV = sorted_BV.softmax(-1)
        # A token is outside when those before it already have the mass; the first has none before it.
        outside_BV = p_BV.cumsum(-1) - p_BV >= top_p
        logits_BV = logits_BV.masked_fill(outside_BV.scatter(-1, order_BV, outside_BV), float("-inf"))
    return logits_BV


def repeats(tokens_NL: Tensor, length: Tensor, n: int, V: int) -> Tensor:
    """bool [N, V]: tokens that would complete an n-gram which the first ``length`` tokens of the row hold."""
    L = tokens_NL.shape[1]
    windows_NWn = tokens_NL.unfold(1, n, 1)
    # The last n - 1 tokens, the start of the next n-gram. Before there are so many no window is complete either.
    tail = (length - (n - 1) + torch.arange(n - 1, device=length.device)).clamp(min=0)
    same_NW = (windows_NWn[..., :-1] == tokens_NL[:, None, tail]).all(-1)
    same_NW &= torch.arange(n, L + 1, device=length.device) <= length
    # Windows that do not match mark a column past the vocabulary.
    marked = torch.where(same_NW, windows_NWn[..., -1], V)
    banned = torch.zeros(len(tokens_NL), V + 1, dtype=torch.bool, device=tokens_NL.device)
    return banned.scatter_(1, marked, True)[:, :V]


def pick(tensor: Tensor, index_BC: Tensor) -> Tensor:
    """tensor[b, index[b, c]] for [B, K] and [B, K, L]."""
    return tensor.take_along_dim(index_BC if tensor.ndim == 2 else index_BC[:, :, None], dim=1)


class Search:
    """What Beams and Draws keep: tokens [B, K, L], their length, and whether every step had one to go on with."""

    def __init__(self, prompt_BP: Tensor, options: Decoding, V: int):
        (B, P), device = prompt_BP.shape, prompt_BP.device
        self.options, self.prompt_length = options, P
        self.tokens = torch.full((B, options.num_beams, P + options.max_new_tokens), options.fill, device=device)
        self.tokens[:, :, :P] = prompt_BP[:, None]
        self.length = torch.tensor([P], device=device)
        self.possible = torch.ones((), dtype=torch.bool, device=device)
        self.is_eos_V = torch.zeros(V, dtype=torch.bool, device=device)
        self.is_eos_V[list(options.eos_ids)] = True
        self.forced: list[tuple[int, Tensor]] = []  # number of the new token, and scores [V] that leave only it
        for step, token in ((0, options.forced_bos_id), (options.max_new_tokens - 1, options.forced_eos_id)):
            if token is not None:
                only_V = torch.full((V,), -math.inf, device=device)
                only_V[token] = 0.0
                self.forced.append((step, only_V))

    @property
    def rows_NL(self) -> Tensor:
        return self.tokens.flatten(0, 1)

    def allowed(self, logits_NV: Tensor) -> Tensor:
        """log p with what must not come at -inf: repeated n-grams, an early EOS, others than a forced token."""
        options, new, n = self.options, self.length - self.prompt_length, self.options.no_repeat_ngram
        log_p_NV = logits_NV.log_softmax(-1)
        if 0 < n <= self.tokens.shape[2]:
            log_p_NV = log_p_NV.masked_fill(repeats(self.rows_NL, self.length, n, log_p_NV.shape[1]), -math.inf)
        if options.min_new_tokens and options.eos_ids:
            log_p_NV = log_p_NV.masked_fill(self.is_eos_V & (new < options.min_new_tokens), -math.inf)
        for step, only_V in self.forced:
            log_p_NV = torch.where(new == step, only_V, log_p_NV)
        return log_p_NV


class Beams(Search):
    """Beam search over hypotheses that end at EOS or at the limit.

    In each step the 2 K best continuations of a prompt's K beams are candidates (more with several EOS ids, so that K
    remain that do not end). Those among the first K that end are finished hypotheses and compete by length-normalised
    score; the best K that do not end run on. These are transformers' definitions, so that both give the same tokens.
    A prompt that is done keeps its hypotheses whatever is run after: ``done_B`` may be looked at rarely."""

    def __init__(self, prompt_BP: Tensor, options: Decoding, V: int):
        super().__init__(prompt_BP, options, V)
        B, K, device = len(prompt_BP), options.num_beams, prompt_BP.device
        # All beams of a prompt are equal at first: only one of them may be continued.
        self.scores = torch.full((B, K), IMPOSSIBLE, device=device)
        self.scores[:, 0] = 0
        self.best_tokens = self.tokens.clone()
        self.best_scores = torch.full((B, K), IMPOSSIBLE, device=device)
        self.best_lengths = torch.zeros(B, K, dtype=torch.long, device=device)
        self.finished = torch.zeros(B, K, dtype=torch.bool, device=device)
        self.hopeful = torch.ones(B, 1, dtype=torch.bool, device=device)  # a running beam may yet beat a finished one
        self.offset = torch.arange(0, B * K, K, device=device)[:, None]
        self.parents = torch.arange(B * K, device=device)  # [N]: the row that each row continues

    @property
    def done_B(self) -> Tensor:
        done = ~self.hopeful[:, 0]
        return done | self.finished.all(1) if self.options.early_stopping is True else done

    def update(self, logits_NV: Tensor, noise_NV: Tensor | None = None) -> None:
        """One step from fp32 logits of the token after each row's last."""
        options, B, K, V = self.options, *self.scores.shape, logits_NV.shape[1]
        total = (self.allowed(logits_NV).view(B, K, V) + self.scores[:, :, None]).view(B, K * V)
        scores_BC, index_BC = total.topk(max(2, 1 + len(options.eos_ids)) * K)
        beam_BC, token_BC = index_BC // V, index_BC % V
        tokens_BCL = pick(self.tokens, beam_BC).index_copy_(2, self.length, token_BC[:, :, None])
        new = self.length + 1 - self.prompt_length
        ends_BC = self.is_eos_V[token_BC] | (new == options.max_new_tokens)

        frozen_B1 = self.done_B[:, None]
        # False for NaN, which topk puts first.
        self.possible.logical_and_(((scores_BC[:, :1] > -math.inf) | frozen_B1).all())
        ended_now = ends_BC & (torch.arange(ends_BC.shape[1], device=ends_BC.device) < K) & ~frozen_B1
        norm = (new.double() ** options.length_penalty).float()
        normed_BC = scores_BC / norm
        # A frozen prompt's candidates go below the empty places, which are IMPOSSIBLE already.
        normed_BC = normed_BC + torch.where(ended_now, 0.0, IMPOSSIBLE) + torch.where(frozen_B1, 2 * IMPOSSIBLE, 0.0)
        keep_BK = torch.cat([self.best_scores, normed_BC], 1).topk(K)[1]
        for best, candidates in (
            (self.best_scores, normed_BC),
            (self.best_tokens, tokens_BCL),
            (self.best_lengths, new.expand_as(index_BC)),
            (self.finished, ended_now),
        ):
            best.copy_(pick(torch.cat([best, candidates], 1), keep_BK))

        running_BC = scores_BC + torch.where(ends_BC, IMPOSSIBLE, 0.0)
        keep_BK = running_BC.topk(K)[1]
        self.scores.copy_(pick(running_BC, keep_BK))
        self.tokens.copy_(pick(tokens_BCL, keep_BK))
        self.parents.copy_((pick(beam_BC, keep_BK) + self.offset).flatten())
        self.length.add_(1)

        # The most a running beam can come to. Later log-probabilities only lower its sum; with a positive
        # penalty the norm of the longest output flatters it most, and False does not count on that.
        if options.early_stopping == "never" and options.length_penalty > 0:
            norm = options.max_new_tokens**options.length_penalty
        ceiling_B1 = self.scores[:, :1] / norm
        floor_BK = torch.where(self.finished, self.best_scores.amin(1, keepdim=True), IMPOSSIBLE)
        self.hopeful.logical_and_((ceiling_B1 > floor_BK).any(1, keepdim=True))

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens [B, R, L], new tokens [B, R] and scores [B, R] of the R = num_return best hypotheses.

        One that does not exist, as where two tokens are all that may come, has no new tokens and score -inf."""
        best = self.best_tokens, self.best_lengths, self.best_scores
        tokens, lengths, scores = (t[:, : self.options.num_return] for t in best)
        absent = scores < IMPOSSIBLE / 2
        tokens = tokens.masked_fill(absent[:, :, None], self.options.fill)
        return tokens, lengths.masked_fill(absent, 0), scores.masked_fill(absent, -math.inf)


class Draws(Search):
    """One row per prompt: the most probable token each time, or one drawn from the filtered distribution.

    Its score is that of a beam: the sum of the model's own log p (at temperature 1, unfiltered; 0 for a forced token)
    over length^length_penalty."""

    def __init__(self, prompt_BP: Tensor, options: Decoding, V: int):
        super().__init__(prompt_BP, options, V)
        B, device = len(prompt_BP), prompt_BP.device
        self.scores = torch.zeros(B, device=device)
        self.lengths = torch.zeros(B, dtype=torch.long, device=device)
        self.done_B = torch.zeros(B, dtype=torch.bool, device=device)

    def update(self, logits_NV: Tensor, noise_NV: Tensor | None = None) -> None:
        """``noise_NV``: Exp(1) draws where sampling; argmax p / noise is then a draw from p, without the check of p
        that torch.multinomial waits for."""
        options = self.options
        log_p_NV = self.allowed(logits_NV)
        best_N = log_p_NV.amax(-1)
        self.possible.logical_and_(((best_N > -math.inf) | self.done_B).all())
        if noise_NV is None:
            next_N = log_p_NV.argmax(-1)
        else:
            # Relative to the largest, so that no temperature, however low, makes an infinity of it.
            relative_NV = (log_p_NV - best_N[:, None]) / options.temperature
            cut_NV = filter_logits(relative_NV, options.top_k, options.top_p)
            next_N = (cut_NV.softmax(-1) / noise_NV).argmax(-1)
        gained_N = log_p_NV.gather(1, next_N[:, None])[:, 0]
        self.scores.add_(gained_N.masked_fill(self.done_B, 0.0))
        self.lengths.add_(~self.done_B)
        next_N = next_N.masked_fill(self.done_B, options.fill)
        self.rows_NL.index_copy_(1, self.length, next_N[:, None])
        self.done_B.logical_or_(self.is_eos_V[next_N])
        self.length.add_(1)

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """As Beams.results, with R = 1."""
        scores = self.scores / (self.lengths.double() ** self.options.length_penalty).float()
        return self.tokens, self.lengths[:, None], scores[:, None]
