"""Schedule-Free AdamW, whose averaged weights are evaluated in the place of a decaying learning rate."""

import contextlib


def schedule_free_adamw(groups, lr: float, *, betas: tuple[float, float], eps: float = 1e-8, weight_decay: float = 0.0):
    """AdamWScheduleFree of the package schedulefree (Defazio et al., 2024, "The Road Less Scheduled"), ready to train.

    It needs as much memory as Adam. The caller sets the groups' lr for a warm-up, and does not call ``step`` with a
    gradient that is not finite. Raises ValueError where the package is missing."""
    try:
        from schedulefree import AdamWScheduleFree
    except ImportError as e:
        needs = f"--schedule schedule-free needs the package schedulefree ({e}): pip install schedulefree"
        raise ValueError(needs) from e
    optimizer = AdamWScheduleFree(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
    optimizer.train()
    return optimizer


@contextlib.contextmanager
def averaged(optimizer):
    """Puts Schedule-Free's averaged weights in place for the block: they are the ones to evaluate and to export.

    Afterwards the weights are bit for bit what they were. This costs a copy of the weights meanwhile. Any other
    optimizer has no averages, and its weights stay as they are."""
    if not hasattr(optimizer, "eval"):
        yield
        return
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    kept = [p.detach().clone() for p in weights]
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
        for p, was in zip(weights, kept, strict=True):
            p.detach().copy_(was)  # the optimizer's own eval and train undo each other only up to rounding
