"""ScheduleFree+: Schedule-Free AdamW that finds its own step."""

import math

import torch

MOMENTUM = 0.9  # of y: how much of the average x it has


class ScheduleFreePlus(torch.optim.Optimizer):
    """Defazio (2026), "ScheduleFree+: Scaling Learning-Rate-Free & Schedule-Free Learning to Large Language Models",
    with the constants of its authors' research code. Their package on PyPI, 1.4.1, does not have it yet.

    With f the loss and g its gradient at y, z the iterate, x its average and u Adam's direction for g, a step is

        a = lr max(0, f + 0.9 g'(z - x)) / (sqrt(pi / 2) sum |g|)      Polyak's step, by the 1-norm of g
        z <- z - a^2 weight_decay y - a u
        x <- (1 - c) x + c z,      c = 1 in the first ``average_after`` steps, then a_max^2 over the sum of all so far
        y <- 0.9 x + 0.1 z

    The weights are y while it trains and x between ``eval()`` and ``train()``. ``lr`` is a factor on Polyak's step, 1
    as published. ``weight_decay`` meets a^2, so that 20 is not much. It needs as much memory as Adam and one copy of
    the weights more. The loop sets ``loss`` (0-d or a number, of the whole batch) before each ``step``, and
    ``clipped_by`` where it clips: f and g are of the unclipped loss. ``step`` waits for the device."""

    def __init__(self, params, lr=1.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, average_after=0):
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay), ("average_after", average_after)):
            if not value >= 0:
                raise ValueError(f"{name}={value!r}: expected 0 or more")
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, average_after=average_after)
        super().__init__(params, defaults | dict(k=0, weight_sum=0.0, step_max=0.0, train_mode=True))
        self.loss = None

    @torch.no_grad()
    def step(self, closure=None):
        if closure is not None or self.loss is None:
            raise ValueError("ScheduleFreePlus takes no closure; set its attribute loss before each step")
        moved = [(g, p, self.state[p]) for g in self.param_groups for p in g["params"] if p.grad is not None]
        if not moved:
            return
        ahead = torch.zeros((), dtype=torch.float64, device=moved[0][1].device)
        for _, p, state in moved:
            if not state:
                state |= {"z": p.clone(), "x": p.clone(), "exp_avg": torch.zeros_like(p)}
                state["exp_avg_sq"] = torch.zeros_like(p)
            ahead += (p.grad * (state["z"] - state["x"])).sum()
        size = sum(p.grad.abs().sum() for _, p, _ in moved)
        by = torch.as_tensor(getattr(self, "clipped_by", 1.0), device=ahead.device)
        loss = torch.as_tensor(self.loss, device=ahead.device)
        loss, ahead, size = torch.stack([loss.to(ahead), ahead * by, size.to(ahead) * by]).tolist()
        self.loss = None
        polyak = max(0.0, loss + MOMENTUM * ahead) / (size * math.sqrt(math.pi / 2)) if size > 0 else 0.0
        for group in self.param_groups:
            k, (beta1, beta2) = group["k"], group["betas"]
            a = max(group["lr"], group["eps"]) * polyak
            group["step_max"] = max(a, group["step_max"], group["eps"])
            c = 1.0
            if k >= group["average_after"]:
                group["weight_sum"] += group["step_max"] ** 2
                c = group["step_max"] ** 2 / group["weight_sum"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                z, x, m, v = (state[name] for name in ("z", "x", "exp_avg", "exp_avg_sq"))
                z.sub_(p, alpha=a * a * group["weight_decay"])
                m.lerp_(p.grad, 1 - beta1)
                v.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                denominator = (v / (1 - beta2 ** (k + 1))).sqrt_().add_(group["eps"])
                z.addcdiv_(m, denominator, value=-a / (1 - beta1 ** (k + 1)))
                x.lerp_(z, c)
                torch.lerp(z, x, MOMENTUM, out=p.detach())
            group["k"] = k + 1

    @torch.no_grad()
    def eval(self) -> None:
        """Puts the averages x in place."""
        self._place("x", False)

    @torch.no_grad()
    def train(self) -> None:
        """Puts y back."""
        self._place("y", True)

    def _place(self, what: str, train_mode: bool) -> None:
        for group in self.param_groups:
            if group["train_mode"] is not train_mode:
                for p in group["params"]:
                    if state := self.state.get(p):
                        p.copy_(state["x"] if what == "x" else torch.lerp(state["z"], state["x"], MOMENTUM))
            group["train_mode"] = train_mode
