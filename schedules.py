"""Learning-rate schedules as functions of the optimizer step; nothing here needs a model."""

import math

SCHEDULES = ("cosine", "linear", "constant", "wsd")


def lr_factor(
    name: str, step: int, total: int, *, warmup: float = 0.0, floor: float = 0.0, decay: float = 0.2
) -> float:
    """The share of the peak learning rate before step ``step`` (0-based) of ``total``, in [0, 1].

    Linear warm-up over the first ``warmup * total`` steps, then: ``cosine`` to ``floor`` (Loshchilov
    and Hutter, 2017), ``linear`` to ``floor``, ``constant``, or ``wsd``: constant, then linear to
    ``floor`` over the last ``decay * total`` steps (warm-up, stable, decay; Hu et al., 2024).
    Raises ValueError for an unknown name.
    """
    if name not in SCHEDULES:
        raise ValueError(f"unknown schedule {name!r}; expected one of {', '.join(SCHEDULES)}")
    rise = warmup * total
    if step < rise:
        return (step + 1) / (math.ceil(rise) + 1)
    if name == "constant":
        return 1.0
    begin = max(rise, (1 - decay) * total) if name == "wsd" else rise
    x = min(max((step - begin) / max(total - begin, 1), 0.0), 1.0)
    falling = 0.5 * (1 + math.cos(math.pi * x)) if name == "cosine" else 1 - x
    return floor + (1 - floor) * falling
