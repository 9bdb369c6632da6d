"""What can be told of the direction in which an optimizer moves the weights: by Adam's two moments, or by a formula.

| optimizer | what is read |
|---|---|
| torch's Adam and AdamW | both moments |
| bitsandbytes' 8-bit Adam and AdamW, paged or not | both moments, dequantised |
| torch's SGD, with any momentum | its formula |
| torch's Muon | its formula, with the shape's factor on the learning rate |
| schedulefree's AdamW | the formula of its base point's step; gradients are taken between it and the average |
| one that is made of such ``parts`` | each part's |

Of any other one nothing is read.
"""

import torch
from torch import Tensor

EIGHT_BIT = ("Adam8bit", "AdamW8bit", "PagedAdam8bit", "PagedAdamW8bit")


def parts(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """The optimizers of one that holds several under one list of groups, else itself."""
    return getattr(optimizer, "parts", [optimizer])


def is_schedule_free(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it is AdamW of the package schedulefree, whose averages stand for a falling learning rate."""
    return type(optimizer).__module__.startswith("schedulefree.") and type(optimizer).__name__ == "AdamWScheduleFree"


def kind_of(optimizer: torch.optim.Optimizer) -> str:
    """ "adam", "formula", or "" for one whose step cannot be read."""
    if isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        return "adam"
    if type(optimizer).__module__.startswith("bitsandbytes.") and type(optimizer).__name__ in EIGHT_BIT:
        return "adam"
    by_formula = isinstance(optimizer, (torch.optim.SGD, getattr(torch.optim, "Muon", ())))
    return "formula" if by_formula or is_schedule_free(optimizer) else ""


def kinds(optimizer: torch.optim.Optimizer) -> list[str]:
    """The `kind_of` each group of ``optimizer``; [] where one of them cannot be read."""
    found = [kind_of(part) for part in parts(optimizer) for _ in part.param_groups]
    return found if all(found) else []


def moments(state: dict) -> tuple[Tensor, Tensor] | None:
    """Adam's means of the gradient and of its square, not bias-corrected, or None before the first step."""
    if "exp_avg_sq" in state:
        return state["exp_avg"], state["exp_avg_sq"]
    if "state2" not in state:
        return None
    if state["state2"].dtype != torch.uint8:  # small parameters are not quantised
        return state["state1"], state["state2"]
    from bitsandbytes.functional import dequantize_blockwise

    kept = [(state[f"state{i}"], dict(absmax=state[f"absmax{i}"], code=state[f"qmap{i}"])) for i in (1, 2)]
    mean, square = (dequantize_blockwise(x, blocksize=256, **how).float() for x, how in kept)
    return mean, square


def direction(group: dict, state: dict, p: Tensor, gradient: Tensor) -> Tensor:
    """What SGD or Muon would take off ``p`` for ``gradient``, per unit of the learning rate, Muon's weight decay aside;
    Schedule-Free AdamW off its base point z, which is not ``p``. Of ``p``'s shape. Nothing is changed."""
    if "weight_lr_power" in group:  # Schedule-Free's alone
        beta2, square = group["betas"][1], state.get("exp_avg_sq")
        square = (0.0 if square is None else beta2 * square) + (1 - beta2) * gradient**2
        bias = 1 - beta2 ** (group["k"] + 1)
        return gradient / ((square / bias).sqrt() + group["eps"]) + group["weight_decay"] * p.detach()
    held, decay = state.get("momentum_buffer"), group["momentum"]
    if "ns_steps" not in group:
        gradient = gradient + group["weight_decay"] * p.detach()
        if decay == 0:
            return gradient
        held = gradient if held is None else decay * held + (1 - group["dampening"]) * gradient
        return gradient + decay * held if group["nesterov"] else held
    # torch's own, so that this is the step that it makes. Both are private to it: a torch without them fails loudly.
    from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz

    held = (torch.zeros_like(gradient) if held is None else held).lerp(gradient, 1 - decay)
    update = gradient.lerp(held, decay) if group["nesterov"] else held
    update = _zeropower_via_newtonschulz(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
    return update.float() * _adjust_lr(1.0, group["adjust_lr_fn"], p.shape)
