"""Where will the loss end, and how sure is that? The forecaster of fot.py; numpy alone.

The law, with S the training time in steps at the peak learning rate, counted from the first point, and T the end:

    l = c + a (S + b)^-alpha - k D (S / S_T)^0.3,      a, c, k >= 0

S runs at sqrt(lr / peak). D in [0, 1] says how far the learning rate has come down from its peak, (peak - lr) / peak,
smoothed over ``tau`` of S. So k is what the loss falls when the learning rate falls to 0 at the end of the run. Without
learning rates S is the step and D is 0.

c + a S^-alpha with an annealing term that has momentum is from Tissue et al. (2024, "Scaling Law with Learning Rate
Annealing"), where S runs at lr. A smoothing that slows down as the learning rate falls is in the decay term of Luo et
al. (2025, "A Multi-Power Law for Loss Curve Prediction Across Learning Rate Schedules"). The square root in S and the
slow growth of the annealing gain are ours. With them k nearly agrees between cosine and WSD runs of a model, and a
prior can be carried from one to the other.

The interval scores itself: the law is fitted again to the first 35, 50 and 70 % of what was seen, each fit forecasts
the rest, and the interval is widened, or narrowed, by how far these forecasts missed. In runs of several epochs the
loss falls at each boundary; the windows before it are brought down by that jump, and the jumps to come are forecast
from those seen. Where the loss has hardly left an untrained model's, the forecast is lower than the law and wider.
"""

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .law import CLOCK, MAD_TO_SD, SCALE, TAILS, TAUS, fit, level, median, smoothed
from .learn import learn_prior
from .logs import log_files, read_curves
from .rules import SCHEDULES, lr_factor

MIN_POINTS = 2
SEGMENTS, CURVE = 128, 16  # of the planned schedule between now and T; every SEGMENTS / CURVE-th is on the curve
HUGE = 1e30  # a loss beyond it has diverged and counts as not finite
RECENT = 64  # points that tell the noise of a single one
BLOCK, CLIP, QUIET = 16, 8.0, 0.0075  # a point is clipped to CLIP sds around the median of the block before; least sd
NATS, NOISE = 3.5, 0.005  # fine-tuning begins at fewer nats than a model that knows nothing, and its points are noisier
UNTRAINED = 5.0  # nats: a log that begins above them begins with an untrained model
HIGH = 0.6, 0.8  # shares of the first loss: above the first one a loss is still high, at the second wholly so


class Prior(NamedTuple):
    """What a run cannot say of itself, above all how much the loss will fall with a learning rate that has not yet.

    ``k_mean`` and ``k_sd``: the spread over families of runs, not within one. The values were chosen over eight groups
    of recorded runs together; records/2026-11-26-forecast-intervals says how, and what they then forecast of them, and
    2026-11-28-forecast-early the same of ``early`` and ``early_sd``."""

    k_mean: float = 0.036  # of the loss
    k_sd: float = 0.012
    alpha: float = 0.65
    alpha_spread: float = 0.4  # sd of log alpha
    tau: float = 100.0
    tau_spread: float = 1.0  # sd of log tau
    a_mean: float = 0.15  # of the loss: what endless training at this learning rate would still bring
    a_sd: float = 0.08  # its scale: the prior is Cauchy's
    discount: float = 2.0  # a point weighs (S at it / S now)^discount: the law is a local one
    floor: float = 0.002  # sd of the law itself: a share of the loss,
    young: float = 0.018  # and in each doubling of S to come so much at S = 100, falling as its square root,
    drift: float = 0.0  # and so much at any S
    plateau: float = 0.035  # and so much more where the loss has stopped falling before the learning rate came down
    bend: float = 0.0  # of log loss in each doubling of S to come: by so much runs like it ended below the law
    jump: float = -0.15  # of log loss at an epoch's end, before one was seen
    jump_sd: float = 0.2
    early: float = 0.015  # as bend, where the loss is still high: `Forecaster._earliness`
    early_sd: float = 0.01  # and of the law itself there


FINETUNING = Prior(k_mean=0.010, k_sd=0.015, discount=1.0, drift=0.045, plateau=0.0, early=0.0, early_sd=0.0)


def student(x: float) -> float:
    """The distribution function at ``x`` of Student's t with 4 degrees of freedom, scaled to hold 68 % in [-1, 1]."""
    t = SCALE * x
    u = 1 + 0.25 * t * t
    return 0.5 + 0.375 * t / math.sqrt(u) * (1 - t * t / (12 * u))


def student_quantile(share: float) -> float:
    """The x with `student` (x) = ``share``, in (0, 1), in closed form (Shaw, 2006, J. Computational Finance 9)."""
    root = math.sqrt(4 * share * (1 - share))
    return math.copysign(2 * math.sqrt(max(math.cos(math.acos(root) / 3) / root - 1, 0.0)), share - 0.5) / SCALE


class Forecast(NamedTuple):
    """The smoothed loss at the end of the budget; ``mean`` and ``sd`` are None where ``reason`` says why.

    Misses have fat tails: 68 % of finals lie within one ``sd``, 95 % within 2.43 (`interval`)."""

    mean: float | None
    sd: float | None
    curve: np.ndarray  # [17, 3] float64: step, mean, sd from now to T; [0, 3] without a forecast
    parameters: dict[str, float]  # c, a, b, alpha, k, tau of the most likely grid point, in the loss's units and steps
    reason: str  # "" or why there is no forecast
    planned: bool  # whether a planned schedule was used; else the last learning rate is held
    notes: tuple[str, ...] = ()  # what the forecaster took the run for, where that matters

    @property
    def descent(self) -> float | None:
        """How much the smoothed loss will still fall."""
        return None if self.mean is None else float(self.curve[0, 1]) - self.mean

    def interval(self, share: float = 0.95) -> tuple[float, float] | None:
        """The middle interval that holds ``share`` of the finals, by Student's t with 4 degrees of freedom."""
        if not 0 < share < 1:
            raise ValueError(f"share={share}, expected more than 0 and less than 1")
        if self.mean is None:
            return None
        reach = student_quantile(0.5 + 0.5 * share) * self.sd
        return self.mean - reach, self.mean + reach

    def better_than(self, loss: float) -> float | None:
        """The probability that the run ends below ``loss``; None without a forecast."""
        if math.isnan(loss):
            raise ValueError("better than nan: give the loss to beat")
        return None if self.mean is None else student(max(min((loss - self.mean) / self.sd, 1e6), -1e6))

    def __str__(self) -> str:
        return f"no forecast: {self.reason}" if self.mean is None else f"forecast {self.mean:.4g} +- {self.sd:.2g}"


class Forecaster:
    """Loss points in, forecasts out. Memory is bounded: at most 2 * ``windows`` means, twice as wide when full.

    ``prior``: by default the one of pre-training or of fine-tuning. ``finetune`` says which; by default the data do: a
    loss in nats that began below 3.5, with noise of over half a per cent. ``epoch``: steps in an epoch, counted from
    step 0; by default the first sudden fall is taken for the end of one."""

    def __init__(
        self, windows: int = 32, prior: Prior | None = None, *, epoch: float | None = None, finetune: bool | None = None
    ):
        if windows < 16:
            raise ValueError(f"windows={windows}, expected at least 16")
        if epoch is not None and not 0 < epoch < math.inf:
            raise ValueError(f"epoch={epoch}, expected the steps of an epoch, more than 0")
        self.prior, self.epoch, self.finetune = prior, epoch, finetune
        self.rows = np.zeros((2 * windows, 4 + len(TAUS)))  # count, then means of step, loss, S, D by tau
        self.filled, self.width = 0, 1
        self.open = np.zeros(4 + len(TAUS))  # the window that is being filled
        self.points = self.skipped = self.clipped = 0
        self.step: float | None = None
        self.began: float | None = None  # the first loss
        self.lr = self.peak = self.S = 0.0
        self.D = np.zeros(len(TAUS))
        self.has_lr = False
        self.recent: list[float] = []  # the last losses, for the noise of a single point
        self.block: list[float] = []  # losses since the last full block, whose median and sd clip them
        self.level: list[float] = []

    @classmethod
    def from_runs(cls, folders: Sequence[str | os.PathLike], **options) -> "Forecaster":
        """A forecaster whose prior is the one that would have forecast these finished runs best.

        ``folders``: run folders, folders of them, or logs that logs.py reads. ``options``: of the constructor. A run
        folder of ours without its summary.json is not finished and passed over. Raises ValueError for fewer than two
        runs."""
        files = [file for file in log_files(folders) if file.name != "metrics.jsonl" or _finished(file)]
        curves = [curve for file in files for curve in read_curves(file)]
        windows = options.get("windows", 32)
        prior = learn_prior(curves, (Prior(), FINETUNING), lambda epoch: cls(windows, epoch=epoch))
        return cls(prior=prior, **options)

    def update(self, step: float, loss: float, lr: float | None = None) -> None:
        """One point: `extend` with one."""
        self.extend([step], [loss], None if lr is None else [lr])

    def extend(self, steps: Sequence[float], losses: Sequence[float], lrs: Sequence[float] | None = None) -> None:
        """Points [N]: the losses at ``steps``, and the learning rates there (always or never).

        A loss that is not finite (or beyond 1e30) is skipped and counted in ``skipped``; one that stands out of the 16
        before by eight standard deviations is clipped to that, and counted in ``clipped``. Raises ValueError, and takes
        none of the points, for steps that do not increase, and for a learning rate that is negative, not finite, or
        given only sometimes."""
        steps, losses = (np.asarray(v, dtype=np.float64) for v in (steps, losses))
        lr = np.ones(len(steps)) if lrs is None else np.asarray(lrs, dtype=np.float64)
        if not len(steps) == len(losses) == len(lr):
            raise ValueError(f"{len(steps)} steps, {len(losses)} losses and {len(lr)} learning rates, expected as many")
        if len(steps) == 0:
            return
        begun = self.step is not None
        before = np.concatenate([[self.step if begun else -math.inf], steps[:-1]])
        wrong = np.flatnonzero(~(np.isfinite(steps) & (steps > before)))
        if len(wrong):
            last = before[wrong[0]] if begun or wrong[0] else None
            raise ValueError(f"step {steps[wrong[0]]:g} after step {last}; expected steps that increase")
        if begun and self.has_lr != (lrs is not None):
            raise ValueError(f"step {steps[0]:g}: give the learning rate with every point or with none")
        wrong = np.flatnonzero(~(np.isfinite(lr) & (lr >= 0)))
        if len(wrong):
            at = f"{lr[wrong[0]]} at step {steps[wrong[0]]:g}"
            raise ValueError(f"learning rate {at}; expected a finite number, 0 or more")
        self.has_lr = lrs is not None
        S, D = self._clock(steps, lr, begun)
        self.step, self.lr = float(steps[-1]), float(lr[-1])
        keep = np.abs(losses) <= HUGE  # NaN is not
        self.skipped += int((~keep).sum())
        if not keep.any():
            return
        losses = losses[keep]
        self.began = float(losses[0]) if self.began is None else self.began
        self.points += len(losses)
        self.recent = [*self.recent, *losses[-RECENT:].tolist()][-RECENT:]
        self._store(np.column_stack([steps[keep], self._clip(losses), S[keep], D[keep]]))

    def _clock(self, steps, lr, begun):
        """S [N] and D [N, tau] at the points."""
        first = (self.step, self.lr) if begun else (steps[0], lr[0])
        dt, middle = np.diff(steps, prepend=first[0]), 0.5 * (lr + np.concatenate([[first[1]], lr[:-1]]))
        peak = np.maximum.accumulate(np.maximum(lr, self.peak))
        share = np.divide(middle, peak, out=np.zeros_like(lr), where=peak > 0)
        passed, down = dt * share**CLOCK, peak - middle
        S = self.S + np.cumsum(passed)
        D = smoothed(self.D, passed, down)
        self.S, self.D, self.peak = float(S[-1]), D[-1].copy(), float(peak[-1])
        return S, D

    def _clip(self, losses):
        """The losses with those clipped that stand out of the block before theirs."""
        start = len(self.block)
        values = np.concatenate([self.block, losses])
        full = len(values) // BLOCK
        blocks = values[: full * BLOCK].reshape(full, BLOCK)
        middle = np.median(blocks, 1)
        sd = np.maximum(MAD_TO_SD * np.median(np.abs(blocks - middle[:, None]), 1), QUIET * np.abs(middle))
        levels = np.vstack([self.level or [0.0, HUGE], np.column_stack([middle, sd])])  # of the block before each
        self.block = values[full * BLOCK :].tolist()
        self.level = levels[-1].tolist() if full or self.level else []
        middle, reach = np.repeat(levels, BLOCK, axis=0)[start : len(values)].T * np.array([[1.0], [CLIP]])
        out = np.clip(losses, middle - reach, middle + reach)
        self.clipped += int((out != losses).sum())
        return out

    def _store(self, points):
        while len(points):
            room = self.width - int(self.open[0])
            if self.open[0] or len(points) < room:
                part, points = points[:room], points[room:]
                count = self.open[0] + len(part)
                self.open[1:] += (part - self.open[1:]).sum(0) / count
                self.open[0] = count
                if count < self.width:
                    return
                self.rows[self.filled] = self.open
                self.open[:] = 0.0
                self.filled += 1
            else:
                n = min(len(points) // self.width, len(self.rows) - self.filled)
                part, points = points[: n * self.width], points[n * self.width :]
                self.rows[self.filled : self.filled + n, 0] = self.width
                self.rows[self.filled : self.filled + n, 1:] = part.reshape(n, self.width, -1).mean(1)
                self.filled += n
            if self.filled == len(self.rows):  # full: means of two windows each
                half = self.filled // 2
                self.rows[:half] = 0.5 * (self.rows[0::2] + self.rows[1::2])
                self.rows[half:] = 0.0
                self.filled, self.width = half, 2 * self.width
                self.rows[:half, 0] = self.width

    def forecast(
        self,
        total: float,
        schedule: Callable[[float], float] | Sequence[float] | str | None = None,
        window: float = math.inf,
    ) -> Forecast:
        """The loss at step ``total``.

        ``schedule``: the planned learning rate, a function of the step, one value for each step after the last point
        up to ``total``, in the unit of those given to `update`, or the name of one of SCHEDULES, which falls from the
        highest learning rate so far and has had its warm-up. Without it the last learning rate is held, and half of
        what bringing it down would gain is in ``sd``; where no learning rate was ever given it most often comes down,
        and that half, less in the second half of the run, is taken off the mean as well. ``window``: the number of
        points whose mean will be called the final loss, so that their noise is in ``sd``; by default the smooth curve
        itself is meant. Raises ValueError for a schedule without a learning rate history, of an unknown name, and
        with negative or non-finite values."""
        planned = schedule is not None
        if isinstance(schedule, str):
            if schedule not in SCHEDULES:
                others = "a function of the step, or a learning rate for each step to come"
                raise ValueError(f"schedule {schedule!r}: expected one of {', '.join(SCHEDULES)}, {others}")
            name, peak = schedule, self.peak
            schedule = lambda step: peak * lr_factor(name, step, total)  # noqa: E731 - one line of a plan
        if planned and not self.has_lr and self.points:
            raise ValueError("a planned schedule needs the learning rates so far; give lr to update()")
        none = Forecast(None, None, np.zeros((0, 3)), {}, "", planned)
        if self.points < MIN_POINTS:
            return none._replace(reason=f"{self.points} points, at least {MIN_POINTS} are needed")
        if not total > self.step or not math.isfinite(total):
            passed = f"step {total:g} has passed, the last point is at {self.step:g}"
            return none._replace(reason=passed if total <= self.step else f"no end is given (T = {total})")
        if self.peak <= 0:
            return none._replace(reason="the learning rate has been 0 so far")
        rows = np.vstack([self.rows[: self.filled], self.open])[: self.filled + bool(self.open[0])]
        # Second differences of a smooth curve are noise alone, with 6 times its variance where it is white.
        noise = MAD_TO_SD * median(np.abs(np.diff(self.recent, 2))) / math.sqrt(6) if self.points > 3 else 0.0
        prior, notes = self._regime(noise)
        steps, S, D, peak = self._path(total, schedule)
        rows, to_come, log_sd, jumped = level(rows, steps, self.epoch, prior)
        fitted = fit(rows, self.S, peak, S, D, prior)
        if isinstance(fitted, str):
            return none._replace(reason=fitted)
        mean, sd, parameters, flat = fitted
        early = self._earliness(mean[0]) * np.log2(np.maximum(S / self.S, 1.0))
        mean = mean * np.exp(-prior.early * early)
        sd = np.hypot(sd, TAILS * prior.early_sd * early * mean)
        notes += ["on a plateau: it may fall suddenly, or when the learning rate does"] * flat + jumped
        sd = np.exp(to_come) * np.hypot(np.hypot(sd, noise / math.sqrt(max(window, 1.0))), np.abs(mean) * log_sd)
        mean = np.exp(to_come) * mean
        if not planned:  # the learning rate may come down: about half of what that would bring, by the end
            half = 0.5 * prior.k_mean * self.lr / self.peak * (steps - self.step) / (total - self.step) * mean
            left = (
                0.0 if self.has_lr else min(1.0, max(0.0, 2 * (1 - self.step / total)))
            )  # unknown rates: not fallen yet
            mean, sd = mean - left * half, np.hypot(sd, half)
        if not (np.isfinite(mean).all() and np.isfinite(sd).all()):
            return none._replace(reason="the fit is not finite")
        if sd[-1] > abs(mean[-1]):
            return none._replace(reason=f"unidentified: {mean[-1]:.3g} +- {sd[-1]:.2g}")
        curve = np.stack([steps, mean, sd], 1)
        return Forecast(float(mean[-1]), float(sd[-1]), curve, parameters, "", planned, tuple(notes))

    def _regime(self, noise: float) -> tuple[Prior, list[str]]:
        """The prior in force, and a note where it is that of fine-tuning."""
        if self.prior is not None:
            return self.prior, []
        told = self.began < NATS and noise > NOISE * abs(float(np.mean(self.recent)))
        if self.finetune is None and told:
            return FINETUNING, ["taken for fine-tuning"]
        return FINETUNING if self.finetune else Prior(), []

    def _earliness(self, loss: float) -> float:
        """0 where the loss has come far down from an untrained model's, 1 where it has not: there a model has learnt
        little but how frequent its tokens are, and what it learns next no law of that knows."""
        low, high = HIGH
        return min(max((loss / self.began - low) / (high - low), 0.0), 1.0) if self.began > UNTRAINED else 0.0

    def _path(self, total, schedule):
        """Steps, S and D (both in units of the learning rate) at the curve's points, and the peak by then."""
        steps = np.linspace(self.step, total, SEGMENTS + 1)
        if schedule is None:
            lr = np.full(len(steps), self.lr)
        elif callable(schedule):
            lr = np.array([self.lr, *(float(schedule(step)) for step in steps[1:])])
        else:
            plan = np.asarray(schedule, dtype=np.float64)
            if plan.ndim != 1 or len(plan) == 0:
                raise ValueError(f"schedule of shape {plan.shape}, expected one learning rate a step up to {total:g}")
            lr = np.interp(steps, np.linspace(self.step, total, len(plan) + 1), np.concatenate([[self.lr], plan]))
        if not (np.isfinite(lr).all() and (lr >= 0).all()):
            raise ValueError("the planned learning rates have negative or non-finite values")
        peak = np.maximum.accumulate(np.maximum(lr[1:], self.peak))
        middle, dt = 0.5 * (lr[1:] + lr[:-1]), np.diff(steps)
        passed = dt * (middle / peak) ** CLOCK
        S = self.S + np.concatenate([[0.0], np.cumsum(passed)])
        D = np.vstack([self.D, smoothed(self.D, passed, peak - middle)])
        at = slice(0, None, SEGMENTS // CURVE)
        return steps[at], S[at], D[at].T, float(peak[-1])

    def state_dict(self) -> dict:
        """Plain numbers and lists; `load_state_dict` continues exactly."""
        state = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in vars(self).items() if k != "prior"}
        return state | {"prior": None if self.prior is None else list(self.prior)}

    def load_state_dict(self, state: dict) -> None:
        """Raises ValueError when the state lacks a field. One that it has beyond them, as of before, is passed over."""
        if not set(state) >= set(vars(self)):
            raise ValueError(f"forecaster state with fields {sorted(state)}, expected {sorted(vars(self))}")
        for name, now in vars(self).items():
            setattr(self, name, np.array(state[name]) if isinstance(now, np.ndarray) else state[name])
        self.prior = None if state["prior"] is None else Prior(*state["prior"])


def _finished(file: Path) -> bool:
    return (file.parent / "summary.json").exists()


def literal_forecast(steps: Sequence[float], losses: Sequence[float], total: float, points: int = 150) -> float:
    """The published rule: l(total) from l = a (t + b)^-alpha, one Newton step in log space on the last ``points``.

    The step starts from the least-squares line of log l over log t (b = 0), where the residual's Hessian is
    replaced by J'J (Gauss-Newton). nan where the step leaves the law's domain (t + b <= 0, overflow, losses that are
    not positive): the caller counts it. Kept to be compared with `Forecaster`."""
    t, loss = (np.asarray(v, dtype=np.float64)[-points:] for v in (steps, losses))
    keep = (t > 0) & (loss > 0) & np.isfinite(loss)
    t, log_l = t[keep], np.log(loss[keep])
    if len(t) < 4 or not total > 0:
        return math.nan
    A = np.stack([np.ones_like(t), -np.log(t)], 1)
    (log_a, alpha), *_ = np.linalg.lstsq(A, log_l, rcond=None)
    J = np.column_stack([A, -alpha / t])
    (da, dalpha, b), *_ = np.linalg.lstsq(J, log_l - A @ [log_a, alpha], rcond=None)
    log_a, alpha = log_a + da, alpha + dalpha
    if not min(t[0], total) + b > 0:
        return math.nan
    value = log_a - alpha * math.log(total + b)
    return math.exp(value) if abs(value) < 100 else math.nan
