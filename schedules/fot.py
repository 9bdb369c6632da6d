"""Forecast-On-Trajectory: a learning rate steered by a forecast of the loss that the run will end with.

The rule decides every W = 32 steps. With eta the learning rate, u Adam's direction, G the expected gradient and H the
Hessian, it sets

    lr       = peak * envelope * m * gate * block
    m        = clip(2 eta_opt / peak, 1/4, 4),      eta_opt = G'u / u'Hu
    envelope = a warm-up, then a fall to zero, linear unless another shape of rules.SHAPES is given
    gate     = 1.5 up to h = 0.7, 1 at h = 1, 0.7 from h = 1.3, linear between
    block    = sqrt(the answer's share of the block's squared gradient), in [1/2, 2] at geometric mean 1

m: eta_opt gains most of the noisy quadratic eta G'u - eta^2 u'Hu / 2. A step of 2 eta_opt gains nothing: there the loss
comes to rest under a constant learning rate, and the envelope's decay cashes in. Following eta_opt itself would decay
twice. m begins at 1/4 and doubles in 40 steps at most, so that a peak which is too high is found out on the way up: a
network that was thrown far away early does not come back. In a run of fewer than 320 steps, where eta_opt is measured
and finite, it doubles in an eighth of them. Unmeasured, m aims at 1.

Over Schedule-Free AdamW there is no envelope, because its averages stand for one; G and H are then those at the point
where it takes its gradients, and u moves its base point.

envelope: let D = l(now) - l(T) be the forecast descent. Where it is sure, sd(D) / D < 1/2, every second decision
compares four plans: hold the learning rate for 0, 1/4, 1/2 or 3/4 of the steps that are left, then fall to zero. The
plan whose forecast ends lowest is taken.

gate: h is the Fisher of an answer's token over that of a prompt's.

A decision also says which descent this step has to gain, D times its share of the envelope to come (``target``),
whether no step of the quadratic gains it (``infeasible``), and whether m stands at an end of its range (``bound``).
gradient_stats.py measures G'u and u'Hu.

"fot-literal" is the rule as published. It takes the largest learning rate with

    lr g^2 / (2 (sigma^2 + lam)) <= D / T_left,      sigma^2 = tr(Sigma) / B,      lam = u'Hu / u'u

where g^2 is the batch's squared gradient norm, and one Newton step on the last 150 losses gives D. Its gate multiplies
a state by 1.5 below h = 0.7 and by 0.7 above h = 1.3. Two guards are counted: a value that is not finite leaves the
learning rate as it was, and the learning rate is clipped to [peak / 100, peak]. "snac" and "bacon" are the rules of
rules.py on the same measurements.
"""

import logging
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from .directions import is_schedule_free
from .forecast import UNTRAINED, Forecast, Forecaster, Prior, literal_forecast
from .gradient_stats import STATISTICS, GradientStats
from .rules import (
    ADAPTIVE,
    SHAPES,
    bacon_factor,
    best_step,
    block_multipliers,
    can_gain,
    check_shape,
    gate_of,
    lr_factor,
    passed,
    snac_factor,
)

log = logging.getLogger("scorecast")

PARTS = ("envelope", "noise", "forecast", "gate", "blocks")
AIM, RANGE = 2.0, 4.0  # of m: its aim in eta_opt, and its bounds
DOUBLING, SHORT = 40.0, 1 / 8  # the fewest steps for m to double in, and the share of a short run
HOLDS, PLAN_EVERY = (0.0, 0.25, 0.5, 0.75), 2  # shares of the steps to come; decisions from plan to plan
SURE = 0.5  # the forecast steers where sd(D) / D is below it
ENVELOPE_POINTS = 64  # at which the envelope to come is averaged
SAMPLES, SAMPLE_EVERY = 2, 4  # measurements of the gradient between decisions, and the fewest steps between two
LITERAL_POINTS, LITERAL_LOWEST = 150, 0.01
# What a saved state must have in common with the scheduler that loads it, and the attributes that it holds.
SAME_SETTINGS = tuple("rule parts total warmup every beta same_units shape doubling sample_every".split())
SAVED = (
    "multiplier m level hold literal_gate blocks average weight reference lrs history decision counts previous_lr "
    "_began last_epoch _step_count _last_lr"
).split()
UNDECIDED = {"target": None, "infeasible": False, "hold": None, "eta_opt": None, "bound": False, "h": None, "gate": 1.0}


def parse_parts(parts: str | Sequence[str]) -> tuple[str, ...]:
    """Parts of the rule, from names or a comma-separated list; "none" is none. Raises ValueError for an unknown one."""
    text = parts if isinstance(parts, str) else ",".join(parts) or "none"
    names = tuple(p.strip() for p in text.split(",") if p.strip())
    if names == ("none",):
        return ()
    if not names or not set(names) <= set(PARTS):
        raise ValueError(f"FoT parts {text!r}: expected some of {','.join(PARTS)}, or none")
    return names


def rule_reads(rule: str, parts: str | Sequence[str]) -> set[str]:
    """What ``rule`` reads beyond loss and gradients: "gate", the Fisher of both segments; "blocks", their RMS."""
    parts = {"gate"} if rule == "fot-literal" else set(parse_parts(parts))
    return parts & {"fot": {"gate", "blocks"}, "fot-literal": {"gate"}, "bacon": {"blocks"}}.get(rule, set())


def set_lrs(optimizer: torch.optim.Optimizer, lrs: Sequence[float]) -> None:
    """Sets the learning rate of each group, in place where it is a tensor."""
    for group, lr in zip(optimizer.param_groups, lrs, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


class FoT(LRScheduler):
    """A torch learning-rate scheduler: call ``step()`` after each optimizer step, whatever the number of micro-batches.

    ``optimizer``: any; of some nothing can be measured and m stays 1, see directions.py. One line says so. ``total``:
    optimizer steps of the run. ``rule``: one of ADAPTIVE. ``parts``: of fot, see PARTS. ``warmup``: share of the steps.
    ``every``: W. ``beta``: how much of the averages over decisions stays. ``shape``: of the envelope's fall, one of
    SHAPES. ``same_units``: whether `observe` is given the trained loss itself. Where it is not (NLL beside a Brier
    run), the forecast is logged and does not steer. ``ranks``, ``reduce``: data-parallel ranks and an in-place sum over
    them. ``block_rms``: gives a tensor [blocks, 2], prompt and answer, for optimizer groups with a "block" key.

    ``decision`` is the last one, ``counts`` what decisions met. A loop that clips sets ``clipped_by`` to
    (norm / max_norm).clamp(min=1) before each optimizer step, here or on the optimizer. Raises ValueError for settings
    that cannot be meant."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        total: int,
        *,
        rule: str = "fot",
        parts: str | Sequence[str] = PARTS,
        warmup: float = 0.0,
        every: int = 32,
        beta: float = 0.9,
        same_units: bool = True,
        shape: str = "linear",
        ranks: int = 1,
        reduce: Callable[[Tensor], Tensor] | None = None,
        block_rms: Callable[[], Tensor] | None = None,
    ):
        if rule not in ADAPTIVE:
            raise ValueError(f"rule {rule!r}: expected one of {', '.join(ADAPTIVE)}")
        for name, value in (("total", total), ("every", every), ("ranks", ranks)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: expected a whole number of steps or ranks, at least 1")
        for name, value in (("warmup", warmup), ("beta", beta)):
            if not 0 <= value < 1:
                raise ValueError(f"{name}={value!r}: expected a share in [0, 1)")
        self.rule, self.parts, self.total, self.warmup = rule, parse_parts(parts), total, float(warmup)
        self.every, self.beta, self.same_units = every, float(beta), bool(same_units)
        self.shape = check_shape(shape)
        self.ranks, self.reduce, self.block_rms = ranks, reduce or (lambda x: x), block_rms
        if rule == "fot" and "envelope" in self.parts and is_schedule_free(optimizer):
            self.parts = tuple(part for part in self.parts if part != "envelope")
            log.info("fot: over Schedule-Free the learning rate does not fall: its averages stand for the envelope")
        if every >= total:
            log.warning("fot: W = %d is not shorter than the run of %d steps: nothing will be decided", every, total)
        self.reads = rule_reads(rule, self.parts)
        self.sample_every = min(max(SAMPLE_EVERY, every // SAMPLES), every)
        self.doubling = min(DOUBLING, SHORT * total) if rule == "fot" else DOUBLING  # of m where eta_opt is measured
        self.forecaster = Forecaster()
        self.stats = GradientStats(optimizer, ranks)
        self.measures = bool(self.stats.kinds)
        if not self.measures:
            name = type(optimizer).__name__
            what = (
                "the forecast and the envelope steer, m stays 1"
                if rule == "fot"
                else "its learning rate stays as it is"
            )
            log.warning("fot: %s keeps no readable moments: the step is not measured, %s", name, what)
        device = self.stats.sums.device
        self.points = torch.zeros(2, every, dtype=torch.float64, device=device)  # sum of NLL and tokens of each step
        self.fisher = torch.zeros(4, dtype=torch.float64, device=device)  # prompt: sum, tokens; answer: sum, tokens
        self.late, self.sent = device.type == "cuda", None  # what a decision is made of, on its way to the host
        self.clipped_by, self._began = None, False  # of the coming step; whether the last one began a sample
        self.careful = rule == "fot" and "noise" in self.parts and self.measures and every < total
        self.m = 1 / RANGE if self.careful else 1.0
        self.multiplier, self.literal_gate = self.m, 1.0
        self.level, self.hold = 1.0, self.warmup * total  # of the envelope, and the step until which it stays there
        self.average, self.weight = {}, 0.0  # of the measurements by name, not yet divided by the weight
        self.reference = [0.0, 0.0]  # sums of slope and curvature
        self.lrs, self.previous_lr = [], 0.0  # of this window's steps
        self.history: list[list[float]] = []  # fot-literal: step and loss
        self.blocks, self.decision = [], {}  # multipliers; the last decision
        self.counts = dict.fromkeys(("decisions", "bound", "infeasible", "clipped", "not_finite"), 0)
        optimizer.register_step_pre_hook(self._before_step)
        super().__init__(optimizer)

    def observe(self, nll, tokens=1.0, *, share=None, fisher=None, prompt=None, answer=None) -> None:
        """Tells of a micro-batch of the coming step. Tensors are read without a synchronisation.

        ``nll``, ``tokens``: the sum of the NLL (or of another score that stays the same during the run) over so many
        tokens; numbers or 0-d tensors. ``share``: the micro-batch's part of the tokens that the batch has on all ranks.
        Give it only after the first of several backwards, while ``.grad`` holds that part alone (DDP: under no_sync).
        ``fisher`` [N], ``prompt`` [N] bool, ``answer`` [N] bool: per-token Fisher (`kernels.token_fisher`) and which of
        the tokens are the prompt's and the answer's. They are read in steps that `gates` announces."""
        slot = self.last_epoch % self.every
        for row, value in enumerate((nll, tokens)):
            self.points[row, slot].add_(value.detach() if isinstance(value, Tensor) else value)
        if fisher is not None:
            masks = torch.stack([prompt, answer]).to(fisher.dtype)
            self.fisher += torch.stack([masks @ fisher.detach(), masks.sum(1)], 1).flatten()
        if share is not None and self.splits:
            self.stats.micro(share)

    @property
    def lr(self) -> float:
        """The first group's learning rate for the coming step, the multipliers of blocks aside."""
        return float(self.base_lrs[0]) * (self._share(self.last_epoch) * self.multiplier)

    @property
    def splits(self) -> bool:
        """Whether the coming step is measured: its batch must come in two micro-batches at least."""
        return self.measures and self.last_epoch > 0 and self.last_epoch % self.sample_every == 0

    @property
    def gates(self) -> bool:
        """Whether the coming step is the last before a decision that reads the Fisher of prompt and answer."""
        return "gate" in self.reads and self._closes_window()

    @property
    def weighs_blocks(self) -> bool:
        """Whether the coming step is the last before a decision that reads the RMS gradients of the blocks."""
        return "blocks" in self.reads and self.block_rms is not None and self._closes_window()

    def _closes_window(self) -> bool:
        return (self.last_epoch + 1) % self.every == 0

    def watch(self, model: torch.nn.Module):
        """Observes the loss of each training forward of ``model``, for a loop such as transformers.Trainer's.

        A model that is given labels has its loss first in a tuple, or as ``loss``. Where the Trainer divides by the
        batch's tokens itself, the forwards' parts are added up. Under compute_loss_func, or label smoothing, the model
        computes no loss: watch the loss module then, ``fot.watch(loss_fn)`` with a kernels.ProperScoreLoss, whose NLL
        is observed. Where a training forward shows no loss one line says so. Returns the hook."""
        seen = []

        def hook(module, args, kwargs, output):
            if (moments := getattr(module, "moments", None)) is not None:
                if torch.is_grad_enabled():
                    self.observe(-torch.where(moments.valid, moments.log_p, 0).sum(), moments.valid.sum())
                return
            if not module.training:
                return
            first = output[0] if isinstance(output, tuple) and kwargs.get("labels") is not None else None
            loss = output.get("loss") if hasattr(output, "get") else getattr(output, "loss", first)
            if not isinstance(loss, Tensor) or (loss is first and loss.numel() != 1):
                if not seen:
                    what = "a training forward shows no loss (compute_loss_func, label smoothing?)"
                    log.warning("fot: %s: nothing is observed; watch the loss module, fot.watch(loss_fn)", what)
                    seen.append(what)
                return
            count = kwargs.get("num_items_in_batch")
            if count is None:
                self.observe(loss.mean())
            else:
                self.observe(loss.mean() * count, (kwargs["labels"] != -100).sum())

        return model.register_forward_hook(hook, with_kwargs=True)

    def _before_step(self, optimizer, args, kwargs) -> None:
        clipped_by = vars(optimizer).pop("clipped_by", self.clipped_by)
        if self.splits or self._began:
            self.stats.sample(self.splits, self.previous_lr, clipped_by)
        self._began = self.splits
        self.clipped_by = None

    def step(self, epoch: int | None = None) -> dict | None:
        """After each optimizer step; every W steps it decides. Returns the decision where it made one.

        On a GPU it decides a step later: what was measured is on its way to the host meanwhile, and nobody waits."""
        decision = None
        if self.last_epoch >= 0:  # not the call that LRScheduler's constructor makes
            done = self.last_epoch + 1
            self.previous_lr = self.planned(self.last_epoch)
            self.lrs.append(self.previous_lr)
            decision = self._decide()  # of a window that ended a step ago
            if done % self.every == 0 and done < self.total:
                self._send(done)
                decision = decision if self.late else self._decide()
        super().step(epoch)
        return decision

    def get_lr(self) -> list[float]:
        share, block = self._share(self.last_epoch) * self.multiplier, dict(enumerate(self.blocks))
        groups = zip(self.base_lrs, self.optimizer.param_groups, strict=True)
        return [float(base) * share * block.get(group.get("block"), 1.0) for base, group in groups]

    def planned(self, step: float) -> float:
        """The first group's learning rate, block aside, before ``step``, if nothing is decided anew until then."""
        return float(self.base_lrs[0]) * self._share(step) * self.multiplier

    def _share(self, step: float) -> float:
        falls = self.rule == "bacon" or (self.rule == "fot" and "envelope" in self.parts)
        if not falls or step < self.warmup * self.total:
            return lr_factor("constant", step, self.total, warmup=self.warmup)
        return self.level * SHAPES[self.shape](passed(step, self.hold, self.total))

    def state_dict(self) -> dict:
        """Plain numbers, strings and lists; `load_state_dict` goes on bit for bit. Every rank must call it."""
        buffers = {k: self.reduce(b.clone()).tolist() for k, b in self._buffers().items()}
        state = {"settings": self._settings(), "forecaster": self.forecaster.state_dict(), "buffers": buffers}
        sent = {"sent": self.sent | {"host": self._arrived()}} if self.sent else {}
        return state | sent | {k: getattr(self, k) for k in SAVED}

    def load_state_dict(self, state_dict: dict) -> None:
        """Raises ValueError for the state of another rule or run length, and for what is not a state of FoT."""
        if missing := {"settings", "forecaster", "buffers", *SAVED} - set(state_dict):
            raise ValueError(f"this is no state of FoT: {', '.join(sorted(missing))} missing")
        theirs, ours = state_dict["settings"], self._settings()
        every = theirs.get("every", self.every)
        high = (state_dict["forecaster"].get("began") or 0.0) > UNTRAINED  # where forecasts were others before
        before = {"doubling": DOUBLING, "sample_every": min(max(8, every // SAMPLES), every)}  # of an older FoT
        theirs = before | {"early": 0.0 if high else ours["early"]} | theirs
        if other := [k for k in sorted({*theirs, *ours}) if theirs.get(k) != ours.get(k)]:
            told = ", ".join(f"{k} {theirs.get(k)} for {ours.get(k)}" for k in other)
            raise ValueError(f"FoT's state is of other settings or code ({told}): go on with those, or begin anew")
        self.forecaster.load_state_dict(state_dict["forecaster"])
        self.sent = state_dict.get("sent")
        for name, buffer in self._buffers().items():
            buffer.copy_(torch.tensor(state_dict["buffers"][name], dtype=torch.float64) / self.ranks)
        for name in SAVED:
            value = state_dict[name]
            setattr(self, name, value.copy() if isinstance(value, list | dict) else value)
        set_lrs(self.optimizer, self._last_lr)

    def restore(self, state: dict, step: int) -> None:
        """`load_state_dict`, for a loop that resumes any rule. Call it after the optimizer's own state was loaded."""
        self.load_state_dict(state)

    def _settings(self) -> dict:
        same = {k: list(v) if isinstance(v := getattr(self, k), tuple) else v for k in SAME_SETTINGS}
        same["early"] = Prior().early if self.rule == "fot" else 0.0  # of the others no forecast steers
        return same | {"measures": list(STATISTICS)}  # those of an older FoT are other sums

    def _buffers(self) -> dict[str, Tensor]:
        return {"points": self.points, "fisher": self.fisher, "sums": self.stats.sums, "pending": self.stats.pending}

    def __str__(self) -> str:
        if not self.decision:
            return f"forecast from step {self.every}"
        if self.decision["forecast"] is None:
            return "no forecast"
        return f"forecast {self.decision['forecast']:.4g} +- {self.decision['sd']:.2g} at step {self.total}"

    def _send(self, done: int) -> None:
        """What a decision after ``done`` steps reads, summed over ranks, on its way to the host: one reduction."""
        sums = self._buffers() | ({"rms": self.block_rms().to(self.points) / self.ranks} if self.weighs_blocks else {})
        flat, landed = self.reduce(torch.cat([v.flatten() for v in sums.values()])), None
        if flat.is_cuda:
            host, landed = torch.empty_like(flat, device="cpu", pin_memory=True), torch.cuda.Event()
            host.copy_(flat, non_blocking=True)
            landed.record()
        else:
            host = flat
        shapes = {name: list(v.shape) for name, v in sums.items()}
        self.sent = {"done": done, "lrs": self.lrs, "shapes": shapes, "host": (host, landed)}
        for name in ("points", "fisher", "sums"):
            sums[name].zero_()
        self.lrs = []

    def _arrived(self) -> list[float]:
        """What was sent, on the host; a list where it comes from a saved state."""
        if isinstance(self.sent["host"], list):
            return self.sent["host"]
        host, landed = self.sent["host"]
        if landed is not None:
            landed.synchronize()
        return host.tolist()

    def _decide(self) -> dict | None:
        """The decision of what was sent; None where nothing was."""
        if self.sent is None:
            return None
        flat = torch.tensor(self._arrived(), dtype=torch.float64)
        done, shapes, lrs = (self.sent[name] for name in ("done", "shapes", "lrs"))
        self.sent = None
        parts = flat.split([math.prod(shape) for shape in shapes.values()])
        host = {name: part.view(shape).tolist() for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        self._learn(done, lrs, *host["points"])
        warm = done >= self.warmup * self.total
        x = self._averaged(GradientStats.means(host["sums"]), warm)
        forecast = self._forecast()
        row = {"forecast": forecast.mean, "sd": forecast.sd, "reason": forecast.reason, "D": forecast.descent}
        row |= {"sd_D": forecast.sd} | UNDECIDED
        if min(host["fisher"]) > 0:
            prompt, prompt_tokens, answer, answer_tokens = host["fisher"]
            row["h"] = (answer / answer_tokens) / (prompt / prompt_tokens)
        row |= {k: x.get(k) for k in ("g2", "noise", "slope", "after", "curvature")}
        if x and self.rule in ("fot", "bacon"):
            row["eta_opt"] = best_step(x["slope"], x["curvature"])
        if self.rule == "fot":
            self._fot(done, warm, x, row)
        elif self.rule == "fot-literal":
            self._literal(done, warm, x, row)
        elif x and self.rule == "snac":
            self.multiplier = snac_factor(x["noise"], x["g2"])
        elif x:
            self.multiplier = bacon_factor(row["eta_opt"], best_step(*self.reference))
        if "rms" in host and warm and done >= 2 * self.every:  # LoRA's B, which begins at 0, has moved
            self.blocks = block_multipliers(host["rms"])
        self.counts["decisions"] += 1
        self.counts["bound"] += row["bound"]
        self.counts["infeasible"] += row["infeasible"]
        self.decision = row | {"multiplier": self.multiplier, "blocks": self.blocks, "lr": self.planned(done)}
        return self.decision

    def _averaged(self, means: dict[str, float] | None, warm: bool) -> dict[str, float]:
        """Averages of the measurements over decisions, now with these ``means``; {} before the first."""
        if means and (warm or self.careful) and all(map(math.isfinite, means.values())):
            beta, old = self.beta, self.average
            self.average = {k: beta * old.get(k, 0.0) + (1 - beta) * means[k] for k in STATISTICS[1:]}
            self.weight = beta * self.weight + 1 - beta
            self.reference = [self.reference[0] + means["slope"], self.reference[1] + means["drop"]]
        return GradientStats.unweighted({k: v / self.weight for k, v in self.average.items()}) if self.weight else {}

    def _forecast(self) -> Forecast:
        """Of the plan as it is: the learning rate of a point is that of the step before it."""
        return self.forecaster.forecast(self.total, lambda step: self.planned(step - 1))

    def _learn(self, done: int, lrs: list[float], nll: list[float], tokens: list[float]) -> None:
        """One point a step for the forecaster; steps that nobody observed are not points."""
        slots = [(step, step % self.every, lr) for step, lr in enumerate(lrs, done - len(lrs))]
        points = [(step + 1, nll[i] / tokens[i], lr) for step, i, lr in slots if tokens[i] > 0]
        if points:
            self.forecaster.extend(*zip(*points, strict=True))
        kept = [[step, loss] for step, loss, _ in points if math.isfinite(loss)]
        self.history = [*self.history, *kept][-LITERAL_POINTS:]

    def _fot(self, done: int, warm: bool, x: dict, row: dict) -> None:
        peak, left = float(self.base_lrs[0]), self.total - done
        D, sd = row["D"], row["sd_D"]
        if warm and D is not None and D > 0 and sd / D < SURE and self.same_units:
            if "forecast" in self.parts and "envelope" in self.parts and self.counts["decisions"] % PLAN_EVERY == 0:
                self._plan(done, row)
            middles = (done + (i + 0.5) / ENVELOPE_POINTS * left for i in range(ENVELOPE_POINTS))
            to_come = sum(map(self._share, middles)) / ENVELOPE_POINTS
            row["target"] = row["D"] * self._share(done) / max(to_come * left, self._share(done))
        aim = 1.0
        if x:
            row["infeasible"] = row["target"] is not None and not can_gain(row["target"], x["slope"], x["curvature"])
            aim = min(max(AIM * row["eta_opt"] / peak, 1 / RANGE), RANGE)
        if self.careful:
            measured = bool(x) and math.isfinite(row["eta_opt"])
            self.m = min(aim, self.m * 2 ** (self.every / (self.doubling if measured else DOUBLING)))
            row["bound"] = bool(x) and aim in (1 / RANGE, RANGE)
        row["gate"] = gate_of(row["h"]) if "gate" in self.parts else 1.0
        self.multiplier = self.m * row["gate"]

    def _plan(self, done: int, row: dict) -> None:
        """Holds the learning rate for as long as the forecast says that this ends lowest."""
        level, hold = self.level, self.hold
        falling, now = hold < done, self._share(done)
        plans = []
        for share in HOLDS:
            if falling and share == 0:
                self.level, self.hold = level, hold  # it goes on falling as it does
            else:
                self.level, self.hold = now if falling else level, done + share * (self.total - done)
            plans.append((self.level, self.hold, self._forecast()))
        self.level, self.hold, forecast = min(
            plans, key=lambda plan: math.inf if plan[2].mean is None else plan[2].mean
        )
        if forecast.mean is not None:
            row |= {"forecast": forecast.mean, "sd": forecast.sd, "sd_D": forecast.sd, "D": forecast.descent}
            row["hold"] = self.hold

    def _literal(self, done: int, warm: bool, x: dict, row: dict) -> None:
        h = row["h"]
        self.literal_gate *= 1.5 if h is not None and h < 0.7 else 0.7 if h is not None and h > 1.3 else 1.0
        row["gate"] = self.literal_gate
        steps, losses = zip(*self.history, strict=True) if self.history else ((), ())
        D = literal_forecast(steps, losses, done) - literal_forecast(steps, losses, self.total)
        row |= {"forecast": None, "sd": None, "reason": "", "sd_D": None, "D": D}
        lr = math.nan
        if x and x["batch2"] > 0 and x["step2"] > 0:
            row["target"] = D / (self.total - done)
            lr = 2 * (x["noise"] + x["curvature"] / x["step2"]) * row["target"] / x["batch2"] * self.literal_gate
        if not math.isfinite(lr) or not warm:
            self.counts["not_finite"] += not math.isfinite(lr)
            return
        wanted = lr / float(self.base_lrs[0])
        self.multiplier = min(max(wanted, LITERAL_LOWEST), 1.0)
        row["bound"] = wanted != self.multiplier
        self.counts["clipped"] += row["bound"]
