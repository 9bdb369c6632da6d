"""Sampling from a language model that maps tokens to hidden states. No key-value cache: each new
token runs the whole window again."""

import torch
from torch import Tensor


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

    ``prompt_BT``: integers [B, T] with T >= 1, all prompts of one length, or one prompt as a list of
    ids. ``temperature`` 0 takes the most probable token, the first one on a tie; otherwise logits are
    divided by it, then cut to the ``top_k`` largest (0: all), then to the nucleus of mass ``top_p``
    (1: all). Past block_size tokens the model sees the last block_size only, at positions from 0 on.
    A row ends at ``eos_id`` and is filled with it from there on; when all rows have ended, so does the
    sampling. ``generator`` may live on another device than the model, so that a seed on the CPU gives
    the same draws everywhere. Dropout is off, whatever mode the model is in.

    ``model``: a module with ``model(tokens) -> hidden [B, T, D]``, ``head_weight`` [V, D], and
    ``config.block_size``. Raises ValueError for arguments out of range and for logits that are not
    finite.
    """
    V, device = model.head_weight.shape[0], model.head_weight.device
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
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens}: expected 0 or more")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature={temperature}: expected 0 (greedy) or a positive number")
    if top_k < 0 or top_k != int(top_k):
        raise ValueError(f"top_k={top_k}: expected a positive integer, or 0 for all tokens")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}: expected a probability mass in (0, 1]")

    was_training = model.training
    model.eval()
    try:
        ended = torch.zeros(len(tokens), dtype=torch.bool, device=device)
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
                if generator is not None:
                    p_BV = p_BV.to(generator.device)
                next_B = torch.multinomial(p_BV, 1, generator=generator)[:, 0].to(device)
            if eos_id is not None:
                next_B = next_B.masked_fill(ended, eos_id)
                ended |= next_B == eos_id
            tokens = torch.cat([tokens, next_B[:, None]], dim=1)
            if eos_id is not None and ended.all():
                break
    finally:
        model.train(was_training)
    return tokens


def filter_logits(logits_BV: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Logits [B, V] with the tokens that may not be drawn at -inf: first all below the ``top_k``-th
    largest (ties with it stay), then all outside the nucleus, the smallest set of most probable tokens
    whose mass reaches ``top_p`` (Holtzman et al., 2020). At least one token always stays."""
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
