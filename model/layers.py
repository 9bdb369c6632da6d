"""Layers that several models share, their first values, and the cache of keys and values.

No layer needs autocast: each casts its parameters to the dtype of what comes in.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

gelu_tanh = partial(F.gelu, approximate="tanh")
# By the names of a config.json's activation_function; two of them are the tanh form.
ACTIVATIONS = dict(gelu=F.gelu, gelu_new=gelu_tanh, gelu_pytorch_tanh=gelu_tanh, relu=F.relu, silu=F.silu, swish=F.silu)


class Linear(nn.Module):
    """y = x W^T + b, W [out, in], computed in its input's dtype.

    Others read W through ``shape`` and ``dense``: a layer that stores W in another form has them too (model/lora.py).
    """

    def __init__(self, n_in: int, n_out: int, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in))
        self.bias = nn.Parameter(torch.empty(n_out)) if bias else None

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.weight.shape)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] as one tensor of ``dtype``."""
        return self.weight.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dense(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class Embedding(nn.Embedding):
    """nn.Embedding that leaves its first values to ``draw_weights``."""

    def reset_parameters(self):
        pass


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the last dimension, eps 1e-5.

    The input is not upcast: torch's kernels take mean and variance in fp32 whatever the input is, so fp32 copies of the
    activations would buy only the rounding of the gain, 2^-9 in bf16."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class Backbone(nn.Module):
    """A model without a loss: tokens in, hidden states out.

    ``dtype`` is the activations'. Parameters are created in torch's default dtype, fp32, and drawn from torch's global
    CPU generator; a model built on the meta device needs ``to_empty`` and ``init_weights``, or ``load_state_dict``.
    ``checkpoint_activations = True`` recomputes each block in backward: memory for a third more work. ``draws_random``:
    a block has dropout for it to replay; saving the generator's state costs a sync."""

    length_field: str  # what the config calls the longest sequence

    def __init__(self, config, dtype: torch.dtype, draws_random: bool = False):
        super().__init__()
        if not dtype.is_floating_point:
            raise ValueError(f"dtype={dtype}: expected a floating-point dtype for the activations")
        self.config, self.dtype, self.draws_random = config, dtype, draws_random
        self.checkpoint_activations = False

    def run(self, block: Callable[..., Tensor], *inputs) -> Tensor:
        """The block's output, recomputed in backward where asked for."""
        if not (self.checkpoint_activations and torch.is_grad_enabled()):
            return block(*inputs)
        return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=self.draws_random)

    def check_tokens(self, tokens_BT: Tensor) -> None:
        """Raises ValueError unless tokens are [B, T] and T is at most the longest sequence."""
        longest = getattr(self.config, self.length_field)
        if tokens_BT.ndim != 2:
            raise ValueError(f"tokens of shape {tuple(tokens_BT.shape)}: expected two dimensions, [batch, time]")
        if tokens_BT.shape[1] > longest:
            raise ValueError(f"sequence of {tokens_BT.shape[1]} tokens: expected at most {self.length_field}={longest}")

    def empty_cache(self, layers: int, rows: int, length: int, heads: int, width: int) -> "KVCache":
        """Zeros in the activations' dtype: a masked value is multiplied by 0, which must not meet a NaN. Raises
        ValueError for no rows, and for a length that is not 1 to the longest sequence."""
        longest = getattr(self.config, self.length_field)
        if rows < 1 or not 1 <= length <= longest:
            expected = f"expected one row or more of 1 to {self.length_field}={longest} positions"
            raise ValueError(f"cache of {rows} x {length}: {expected}")
        shape, like = (layers, rows, length, heads, width), dict(dtype=self.dtype, device=self.head_weight.device)
        return KVCache(torch.zeros(shape, **like), torch.zeros(shape, **like))


@torch.no_grad()
def draw_weights(model: nn.Module, std: Callable[[str], float], generator: torch.Generator | None = None) -> None:
    """Biases 0, gains 1, matrices and embeddings N(0, ``std(name)``), in parameter order. Call it before sharding.

    Normals are drawn in fp32 on the CPU, from ``generator`` (a CPU one) or torch's global one, then copied: a seed
    gives one model, whatever the device or dtype."""
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            p.zero_()
        elif p.ndim == 1:
            p.fill_(1)
        else:
            p.copy_(torch.empty(p.shape, dtype=torch.float32, device="cpu").normal_(0, std(name), generator=generator))


@dataclass
class KVCache:
    """Keys and values of every layer, [layers, rows, positions, heads, K] each. A forward writes them in place."""

    k: Tensor
    v: Tensor

    def first(self, positions: int) -> "KVCache":
        """The same storage, read and written up to ``positions`` only."""
        return KVCache(self.k[:, :, :positions], self.v[:, :, :positions])


VALID: dict[str, Callable[[object], bool]] = {
    "a positive integer": lambda x: isinstance(x, int) and not isinstance(x, bool) and x >= 1,
    # Of a model: what a config may say before a module is built by it.
    "an integer from 1 to 10,000": lambda x: VALID["a positive integer"](x) and x <= 10_000,
    "an integer from 1 to 2^24": lambda x: VALID["a positive integer"](x) and x <= 2**24,
    "an integer of 0 or more": lambda x: isinstance(x, int) and not isinstance(x, bool) and x >= 0,
    "a positive number": lambda x: isinstance(x, int | float) and 0 < x < math.inf,
    "a probability in [0, 1)": lambda x: isinstance(x, int | float) and 0 <= x < 1,
    "true or false": lambda x: isinstance(x, bool),
}


def check_fields(config, expected: str, *names: str) -> None:
    """Raises ValueError unless each of these fields of ``config`` is what ``expected``, a key of VALID, says."""
    for name in names:
        check_value(name, getattr(config, name), expected)


def check_value(name: str, value, expected: str) -> None:
    if not VALID[expected](value):
        raise ValueError(f"{name}={value!r}: expected {expected}")


def check_activation(name: str) -> None:
    """Raises ValueError unless ``name`` is a key of ACTIVATIONS."""
    if name not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ValueError(f"activation_function={name!r} is not supported; expected {known}")
