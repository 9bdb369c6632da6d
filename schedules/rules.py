"""Learning-rate schedules as functions of the optimizer step; nothing here needs a model.

python -m schedules plot --out schedules.png
"""

import argparse
import contextlib
import math
import os
from pathlib import Path

SCHEDULES = ("cosine", "linear", "constant", "wsd", "rex")
ADAPTIVE = ("snac", "bacon", "fot", "fot-literal")  # they measure: fot.FoT runs them
FREE = "schedule-free"  # an optimizer of its own, under a constant learning rate
RULES = (*SCHEDULES, *ADAPTIVE, FREE)


def lr_factor(
    name: str, step: int, total: int, *, warmup: float = 0.0, floor: float = 0.0, decay: float = 0.2
) -> float:
    """The share of the peak learning rate before step ``step`` (0-based) of ``total``, in [0, 1].

    Linear warm-up over the first ``warmup * total`` steps, then: ``cosine`` to ``floor`` (Loshchilov
    and Hutter, 2017), ``linear`` to ``floor``, ``constant``, ``wsd``: constant, then linear to
    ``floor`` over the last ``decay * total`` steps (warm-up, stable, decay; Hu et al., 2024), or ``rex``:
    (1 - x) / (1 - x/2) to ``floor``, which stays high and falls late (Chen et al., 2022, "REX: Revisiting
    Budgeted Training with an Improved Schedule"); ``schedule-free`` is constant here. Raises ValueError for an
    unknown name.
    """
    if name not in (*SCHEDULES, FREE):
        raise ValueError(f"unknown schedule {name!r}; expected one of {', '.join((*SCHEDULES, FREE))}")
    rise = warmup * total
    if step < rise:
        return (step + 1) / (math.ceil(rise) + 1)
    if name in ("constant", FREE):
        return 1.0
    begin = max(rise, (1 - decay) * total) if name == "wsd" else rise
    x = min(max((step - begin) / max(total - begin, 1), 0.0), 1.0)
    falling = {"cosine": 0.5 * (1 + math.cos(math.pi * x)), "rex": (1 - x) / (1 - 0.5 * x)}.get(name, 1 - x)
    return floor + (1 - floor) * falling


def snac_factor(noise: float, signal: float) -> float:
    """SNAC's share of the peak learning rate: 1 / (1 + B_noise / B), in [1/100, 1].

    B_noise / B = ``noise`` / ``signal`` = (tr(Sigma) / B) / |G|^2, the simple noise scale of McCandlish et al. (2018)
    in batches. SNAC has no public definition: this is our reading, a learning rate scaled by the signal's share of the
    squared gradient. The lowest share, also where the signal is lost in the noise, is ours too: at 0 nothing moves.
    """
    noise = max(noise, 0.0)
    share = signal / (signal + noise) if signal > 0 and math.isfinite(signal + noise) else 0.0
    return min(max(share, 0.01), 1.0)


def bacon_factor(eta: float, reference: float) -> float:
    """BACON's factor on a linear decay: clip(eta_opt / eta_ref, 1/2, 2).

    ``eta``: the step that gains most of the noisy quadratic now (0 and inf are allowed); ``reference``: the same of the
    sums over the run so far. BACON has no public definition: this is our reading, a budget's linear decay bent by
    curvature. 1 where the reference sets no scale.
    """
    if not 0 < reference < math.inf or math.isnan(eta):
        return 1.0
    return min(max(eta / reference, 0.5), 2.0)


def schedule_free_adamw(groups, lr: float, *, betas: tuple[float, float], eps: float = 1e-8, weight_decay: float = 0.0):
    """AdamWScheduleFree of the package schedulefree (Defazio et al., 2024, "The Road Less Scheduled"), ready to train.

    It holds as many numbers as Adam: z in the place of the mean gradient. Its warm-up is left to the caller, who sets
    the groups' lr; it skips no step by itself, so do not call ``step`` with a gradient that is not finite.
    Raises ValueError where the package is missing.
    """
    try:
        from schedulefree import AdamWScheduleFree
    except ImportError as e:
        raise ValueError(f"--schedule {FREE} needs the package schedulefree ({e}): pip install schedulefree") from e
    optimizer = AdamWScheduleFree(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
    optimizer.train()
    return optimizer


@contextlib.contextmanager
def averaged(optimizer):
    """Inside, the weights are Schedule-Free's averages, which are the ones to evaluate and to export; after it they are
    bit for bit what they were. Nothing for any other optimizer. Costs a copy of the weights meanwhile."""
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
            p.detach().copy_(was)  # eval and train are inverse up to rounding only


def plot(out: str | Path, *, total: int = 1000, warmup: float = 0.05, floor: float = 0.0, decay: float = 0.2) -> None:
    """All schedules over ``total`` steps, as a PNG. BACON and FoT's m bend the linear one by at most a factor of 2."""
    from matplotlib.figure import Figure

    from eval.report.plots import HUES, styled

    @styled
    def draw():
        figure = Figure(figsize=(6.4, 3.4), dpi=150, layout="constrained")
        axes = figure.subplots()
        for name, colour in zip(SCHEDULES, HUES.values(), strict=False):
            lr = [lr_factor(name, step, total, warmup=warmup, floor=floor, decay=decay) for step in range(total)]
            axes.plot(range(1, total + 1), lr, color=colour, label=name)
        # The measuring rules need a run; with a noise scale that grows like this, SNAC would do that.
        snac = [snac_factor(4 * s / total, 1.0) * lr_factor("constant", s, total, warmup=warmup) for s in range(total)]
        axes.plot(range(1, total + 1), snac, color="0.6", linestyle=":", label="snac at B_noise/B = 4t/T")
        axes.set(xlabel="optimizer step", ylabel="share of the peak learning rate", xlim=(0, total), ylim=(0, 1.04))
        axes.legend(loc="lower left")
        figure.savefig(partial, format="png")

    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    draw()
    os.replace(partial, out)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m schedules", description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("plot",))
    parser.add_argument("--out", default="schedules.png", help="the picture (default: schedules.png)")
    parser.add_argument("--steps", type=int, default=1000, help="length of the run (default: 1000)")
    parser.add_argument("--warmup", type=float, default=0.05, help="share of the run (default: 0.05)")
    parser.add_argument("--floor", type=float, default=0.0, help="share of the peak it ends at (default: 0)")
    parser.add_argument("--decay", type=float, default=0.2, help="wsd: share of the run that decays (default: 0.2)")
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.exit(2, f"python -m schedules: error: --steps {args.steps}, expected at least 1\n")
    for flag in ("warmup", "floor", "decay"):
        if not 0 <= getattr(args, flag) <= 1:
            parser.exit(2, f"python -m schedules: error: --{flag} {getattr(args, flag)}, expected a share in [0, 1]\n")
    plot(args.out, total=args.steps, warmup=args.warmup, floor=args.floor, decay=args.decay)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
