"""Text from a model that maps tokens to hidden states.

``generate`` decodes with a static key-value cache: greedily, by sampling or by beam search. ``sample`` has no cache and
no limit: each new token runs the last block_size tokens again.
"""

import time
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from model.beam import Beams, Decoding, Draws, check_sampling, filter_logits

REORDERED = 64  # beams' caches are reordered up to the next multiple of so many positions


@dataclass
class Generated:
    """R hypotheses of each of B prompts, the best first. Where there are fewer, others have length 0 and score -inf."""

    tokens: Tensor  # int64 [B, R, max_new_tokens], filled with pad_id after a row's length
    lengths: Tensor  # int64 [B, R]: new tokens, the EOS among them
    scores: Tensor  # fp32 [B, R]: (sum of log p) / length^length_penalty
    ended: Tensor  # bool [B, R]: by EOS, not by the limit
    new_tokens: int  # the sum of lengths
    seconds: float  # wall time from the prompts on the device to the counts on the host
    steps: int  # decoder steps that were run

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / self.seconds


@contextmanager
def evaluating(model):
    """The model in eval mode, without dropout; its own mode comes back afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@torch.no_grad()
def generate(
    model,
    prompt: Tensor,
    options: Decoding,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
    compile: dict | None = None,
    check_every: int = 16,
) -> Generated:
    """Decodes as ``options`` say, with the tokens that transformers.generate would give.

    ``prompt`` int [B, T]. Of a decoder-only model it holds the tokens to continue, all rows of one length (padding on
    the left is not supported). Of an encoder-decoder it is the source, with ``mask`` [B, T] true at tokens where rows
    are padded on the right. A forced BOS is the first new token, whatever the prompt's length. Prompt and new tokens,
    less one, must fit the model's positions. ``generator`` as in ``sample``. Logits are computed in fp32.

    The first step runs the prompt, every later one a token per row, always in the same shapes. ``compile`` holds
    keyword arguments for torch.compile, which then compiles that step with fullgraph=True. Few lengths of sources and
    one size of batches keep the compiled versions few. The host waits for the device every ``check_every`` steps and
    nowhere else, to see whether all is done and whether every step had a token to go on with.

    ``model`` has ``head_weight`` [V, D], optionally ``head_bias`` [V] or None, and either ``new_cache(batch, length)``
    and ``model(tokens, positions_BT=, cache=)``, or Seq2Seq's ``encode``, ``new_cache`` and ``decode``. Raises
    ValueError for arguments out of range and for logits that are not finite."""
    weight, bias, beams = model.head_weight, getattr(model, "head_bias", None), options.num_beams
    (V, _), device = weight.shape, weight.device
    if check_every < 1:
        raise ValueError(f"check_every={check_every}: expected 1 or more steps")
    options.check_vocabulary(V)
    tokens_BT = checked_prompt(prompt, V, device)
    B, encodes = len(tokens_BT), hasattr(model, "encode")
    if mask is not None:
        mask = mask.to(device).bool()
        if not encodes:
            raise ValueError("a mask with a decoder-only model: its prompts are not padded, expected None")
        if mask.shape != tokens_BT.shape or not mask.any(1).all():
            raise ValueError(f"mask of shape {tuple(mask.shape)}: expected the prompt's, with a token in every row")

    with evaluating(model):
        start = time.perf_counter()
        if encodes:
            memory = model.encode(tokens_BT, mask)
            cache = model.new_cache(memory, beams, options.max_new_tokens)
            context = memory, mask, cache
            prompt_BP = torch.full((B, 1), model.config.decoder_start_token_id, device=device)
        else:
            cache = model.new_cache(B * beams, tokens_BT.shape[1] + options.max_new_tokens - 1)
            context, prompt_BP = (cache,), tokens_BT
        search = Draws(prompt_BP, options, V) if beams == 1 else Beams(prompt_BP, options, V)
        # The head in fp32 once, not once a step; fp32 masters are not copied.
        head = weight.float(), None if bias is None else bias.float()
        sampling, source = options.temperature > 0, device if generator is None else generator.device
        step = decode_step if compile is None else torch.compile(decode_step, fullgraph=True, **compile)
        P = prompt_BP.shape[1]
        for steps in range(1, options.max_new_tokens + 1):
            drawn = torch.empty(B, V, device=source).exponential_(generator=generator).to(device) if sampling else None
            if steps == 1:
                decode_step(model, context, head, search, P, drawn)
            else:
                step(model, context, head, search, 1, drawn)
            if beams > 1 and steps < options.max_new_tokens:
                reorder(cache, search.parents, P + steps - 1)
            if steps % check_every == 0 or steps == options.max_new_tokens:
                possible, done = torch.stack([search.possible, search.done_B.all()]).tolist()
                if not possible:
                    limits = f"no_repeat_ngram={options.no_repeat_ngram} and min_new_tokens={options.min_new_tokens}"
                    diverged = "the logits are not finite (a diverged model; use an earlier checkpoint)"
                    raise ValueError(f"no token could follow: {diverged}, or {limits} leave none")
                if done:
                    break
        tokens_BRL, lengths, scores = search.results()
        tokens = tokens_BRL[:, :, P:].contiguous()
        last = tokens.gather(2, (lengths - 1).clamp(min=0)[:, :, None])[:, :, 0]
        ended, count = search.is_eos_V[last] & (lengths > 0), int(lengths.sum())
        return Generated(tokens, lengths, scores, ended, count, time.perf_counter() - start, steps)


def decode_step(model, context: tuple, head: tuple, search, T: int, noise_NV: Tensor | None) -> None:
    """From the last T tokens of every row to the next: the unit that torch.compile gets. All changes are in place."""
    positions_T = search.length - T + torch.arange(T, device=search.length.device)
    tokens_NT = search.rows_NL.index_select(1, positions_T)
    if len(context) == 1:
        hidden_NTD = model(tokens_NT, positions_BT=positions_T.expand(tokens_NT.shape), cache=context[0])
    else:
        hidden_NTD = model.decode(tokens_NT, *context, positions_T)
    weight_VD, bias_V = head
    logits_NV = hidden_NTD[:, -1].float() @ weight_VD.T
    search.update(logits_NV if bias_V is None else logits_NV + bias_V, noise_NV)


def reorder(cache, rows_N: Tensor, filled: int) -> None:
    """Row n of the cache becomes what row rows_N[n] was, in place: a gather a layer of the ``filled`` positions,
    rounded up so that few sizes occur."""
    end = -(-filled // REORDERED) * REORDERED
    for layer in (*cache.k, *cache.v):
        layer[:, :end] = layer[:, :end].index_select(0, rows_N)


@torch.no_grad()
def sample(
    model,
    prompt_BT: Tensor | list[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    eos_id: int | None = None,
) -> Tensor:
    """Continues each prompt by up to ``max_new_tokens``; returns int64 [B, T + new], prompts included.

    ``prompt_BT``: integers [B, T] with T >= 1, all prompts of one length, or one prompt as a list of ids.
    ``temperature`` 0 takes the most probable token, the first one on a tie. Otherwise logits are divided by it, then
    filtered as ``filter_logits`` does. The model (``config.block_size``, ``head_weight`` [V, D]) sees the last
    block_size tokens only, at positions from 0 on. A row is filled with ``eos_id`` from the first one on; when all rows
    have ended, so does the sampling. ``generator`` may live on another device than the model, so that a seed on the CPU
    gives the same draws everywhere. Raises ValueError for arguments out of range and for logits that are not finite."""
    V, device = model.head_weight.shape[0], model.head_weight.device
    tokens = checked_prompt(prompt_BT, V, device)
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens}: expected 0 or more")
    check_sampling(temperature, top_k, top_p)
    ended = torch.zeros(len(tokens), dtype=torch.bool, device=device)
    with evaluating(model):
        for _ in range(max_new_tokens):
            hidden_BD = model(tokens[:, -model.config.block_size :])[:, -1]
            logits_BV = hidden_BD.float() @ model.head_weight.float().T
            if not logits_BV.isfinite().all():
                raise ValueError("the model's logits are not finite; it has diverged, sample an earlier checkpoint")
            if temperature == 0:
                next_B = logits_BV.argmax(-1)
            else:
                # Relative to the largest, so that no temperature, however low, makes an infinity of it.
                logits_BV -= logits_BV.amax(-1, keepdim=True)
                p_BV = filter_logits(logits_BV / temperature, top_k, top_p).softmax(-1)
                p_BV = p_BV.to(device if generator is None else generator.device)
                next_B = torch.multinomial(p_BV, 1, generator=generator)[:, 0].to(device)
            if eos_id is not None:
                next_B = next_B.masked_fill(ended, eos_id)
                ended |= next_B == eos_id
            tokens = torch.cat([tokens, next_B[:, None]], dim=1)
            if eos_id is not None and ended.all():
                break
    return tokens


def checked_prompt(prompt_BT: Tensor | list[int], V: int, device) -> Tensor:
    """int64 [B, T] on ``device``. Raises ValueError unless it holds ids below ``V``, one or more a row."""
    tokens = torch.as_tensor(prompt_BT, device=device)
    if tokens.ndim == 1 and not isinstance(prompt_BT, Tensor):
        tokens = tokens[None]
    if tokens.ndim != 2 or not tokens.numel():
        raise ValueError(f"prompt of shape {tuple(tokens.shape)}: expected [batch, time] with at least one token each")
    if tokens.is_floating_point():
        raise ValueError(f"prompt of dtype {tokens.dtype}: expected integers, token ids")
    tokens = tokens.long()
    if tokens.min() < 0 or tokens.max() >= V:
        raise ValueError(f"prompt holds ids {tokens.min()} to {tokens.max()}: expected 0 to {V - 1}")
    return tokens
