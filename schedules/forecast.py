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
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

# The grid of the nonlinear parameters. b is a share of the S seen so far, tau is in steps.
ALPHAS = np.geomspace(0.12, 1.4, 12)
OFFSETS = np.geomspace(0.003, 1.0, 9)
TAUS = np.array([30.0, 100.0, 300.0, 1000.0])
GROWTH = 0.3  # of the annealing gain with S
CLOCK = 0.5  # S runs at (lr / peak)^CLOCK
MIN_POINTS = 20
SEGMENTS, CURVE = 256, 16  # of the planned schedule between now and T; every SEGMENTS / CURVE-th is on the curve
MAD_TO_SD = 1.4826  # of a Gaussian: from the median absolute deviation to the standard deviation
HUGE = 1e30  # a loss beyond it has diverged and counts as not finite


class Prior(NamedTuple):
    """What a run cannot say of itself, above all how much the loss will fall with a learning rate that has not yet.

    ``k_mean``, ``k_sd`` and ``floor`` are what `schedules.backtest.learn_prior` finds on runs of three families
    (MultiPowerLaw's 25M and 100M, modded-nanogpt's 124M, OLMo's ladder of 190M to 1B), rounded. `python -m schedules
    backtest --leave-out` learns them on all families but the one that is forecast, and prints both: from half of a run
    the median error is 0.38 % either way, MultiPowerLaw's rises from 0.35 to 0.47 %. The other values were chosen on
    the three families together; each may be halved or raised by half, alpha by a fifth, with medians from 0.31 to
    0.42 %. So was the square root in S (`CLOCK`): 0.53 % with S running at lr, 0.56 % at its fourth root."""

    k_mean: float = 0.039  # of the loss
    k_sd: float = 0.008
    alpha: float = 0.5
    alpha_spread: float = 0.3  # sd of log alpha
    tau: float = 100.0
    tau_spread: float = 1.0  # sd of log tau
    discount: float = 2.0  # a point weighs (S at it / S now)^discount: the law is a local one
    misfit: float = 0.06  # sd of the law itself: a share of the change to come, times (doublings of S to come)^1.5
    floor: float = 0.002  # and a share of the loss


class Forecast(NamedTuple):
    """The smoothed loss at the end of the budget; ``mean`` and ``sd`` are None where ``reason`` says why."""

    mean: float | None
    sd: float | None
    curve: np.ndarray  # [17, 3] float64: step, mean, sd from now to T; [0, 3] without a forecast
    parameters: dict[str, float]  # c, a, b, alpha, k, tau of the most likely grid point, in the loss's units and steps
    reason: str  # "" or why there is no forecast
    planned: bool  # whether a planned schedule was used; else the last learning rate is held

    @property
    def descent(self) -> float | None:
        """How much the smoothed loss will still fall."""
        return None if self.mean is None else float(self.curve[0, 1]) - self.mean

    def __str__(self) -> str:
        return f"no forecast: {self.reason}" if self.mean is None else f"forecast {self.mean:.4g} +- {self.sd:.2g}"


class Forecaster:
    """Loss points in, forecasts out. Memory is bounded: at most 2 * ``windows`` means, twice as wide when full."""

    def __init__(self, windows: int = 64, prior: Prior = Prior()):  # noqa: B008 (a NamedTuple cannot change)
        if windows < MIN_POINTS:
            raise ValueError(f"windows={windows}, expected at least {MIN_POINTS}")
        self.prior = prior
        self.rows = np.zeros((2 * windows, 4 + len(TAUS)))  # count, then means of step, loss, S, D by tau
        self.filled, self.width = 0, 1
        self.open = np.zeros(4 + len(TAUS))  # the window that is being filled
        self.points = self.skipped = 0
        self.step: float | None = None
        self.lr = self.peak = self.S = 0.0
        self.D = np.zeros(len(TAUS))
        self.has_lr = False
        self.recent: list[float] = []  # the last losses, for the noise of a single point

    def update(self, step: float, loss: float, lr: float | None = None) -> None:
        """One point: the loss at ``step``, and the learning rate there (always or never).

        A loss that is not finite (or beyond 1e30) is skipped and counted in ``skipped``. Raises ValueError for a step
        that is not after the last one, and for a learning rate that is negative, not finite, or given only sometimes.
        """
        step, loss, begun = float(step), float(loss), self.step is not None
        if not math.isfinite(step) or (begun and step <= self.step):
            raise ValueError(f"step {step:g} after step {self.step}; expected steps that increase")
        if begun and self.has_lr != (lr is not None):
            raise ValueError(f"step {step:g}: give the learning rate with every point or with none")
        self.has_lr = lr is not None
        lr = float(lr) if self.has_lr else 1.0
        if not (math.isfinite(lr) and lr >= 0):
            raise ValueError(f"learning rate {lr} at step {step:g}; expected a finite number, 0 or more")
        self.peak = max(self.peak, lr)
        if begun and self.peak > 0:
            middle = 0.5 * (lr + self.lr)
            passed = (step - self.step) * (middle / self.peak) ** CLOCK
            down = self.peak - middle
            self.S += passed
            self.D = down + (self.D - down) * np.exp(-passed / TAUS)
        self.step, self.lr = step, lr
        if not abs(loss) <= HUGE:  # NaN too
            self.skipped += 1
            return
        self.recent = [*self.recent[-63:], loss]
        self.points += 1
        self.open[0] += 1
        self.open[1:] += (np.array([step, loss, self.S, *self.D]) - self.open[1:]) / self.open[0]
        if self.open[0] == self.width:
            self.rows[self.filled] = self.open
            self.open[:] = 0.0
            self.filled += 1
        if self.filled == len(self.rows):  # full: means of two windows each
            half = self.filled // 2
            self.rows[:half] = 0.5 * (self.rows[0::2] + self.rows[1::2])
            self.rows[half:] = 0.0
            self.filled, self.width = half, 2 * self.width
            self.rows[:half, 0] = self.width

    def forecast(
        self, total: float, schedule: Callable[[float], float] | Sequence[float] | None = None, window: float = math.inf
    ) -> Forecast:
        """The loss at step ``total``.

        ``schedule``: the planned learning rate, a function of the step or one value for each step after the last point
        up to ``total``, in the unit of those given to `update`. Without it the last learning rate is held, and half of
        what bringing it down would gain is in ``sd``. ``window``: the number of points whose mean will be called the
        final loss, so that their noise is in ``sd``; by default the smooth curve itself is meant. Raises ValueError for
        a schedule without a learning rate history, with negative or non-finite values."""
        planned = schedule is not None
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
        steps, S, D, peak = self._path(total, schedule)
        fit = _fit(rows, self.S, peak, S, D, self.prior)
        if isinstance(fit, str):
            return none._replace(reason=fit)
        mean, sd, parameters = fit
        # Second differences of a smooth curve are noise alone, with 6 times its variance where it is white.
        noise = MAD_TO_SD * float(np.median(np.abs(np.diff(self.recent, 2)))) / math.sqrt(6)
        sd = np.hypot(sd, noise / math.sqrt(max(window, 1.0)))
        if not planned:  # the learning rate may come down: about half of what that would bring, by the end
            ahead = (steps - self.step) / (total - self.step)
            sd = np.hypot(sd, 0.5 * self.prior.k_mean * self.lr / self.peak * ahead * mean)
        if not (np.isfinite(mean).all() and np.isfinite(sd).all()):
            return none._replace(reason="the fit is not finite")
        if sd[-1] > 0.25 * abs(mean[-1]):
            return none._replace(reason=f"unidentified: {mean[-1]:.3g} +- {sd[-1]:.2g}")
        return Forecast(float(mean[-1]), float(sd[-1]), np.stack([steps, mean, sd], 1), parameters, "", planned)

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
            lr = np.interp(steps, np.linspace(self.step, total, len(plan) + 1), [self.lr, *plan])
        if not (np.isfinite(lr).all() and (lr >= 0).all()):
            raise ValueError("the planned learning rates have negative or non-finite values")
        peak = np.maximum.accumulate(np.maximum(lr[1:], self.peak))
        middle, dt = 0.5 * (lr[1:] + lr[:-1]), np.diff(steps)
        at = slice(0, None, SEGMENTS // CURVE)
        X = np.concatenate([[0.0], np.cumsum(dt * (middle / peak) ** CLOCK)])
        # The filter of `update`, solved: a segment's pull has faded by exp(-(time since) / tau); before it, nothing.
        faded = np.exp(-np.maximum(X[at][:, None] - X, 0.0) / TAUS[:, None, None])  # [tau, curve, segment]
        D = self.D[:, None] * faded[:, :, 0] + np.diff(faded, axis=2) @ (peak - middle)
        return steps[at], self.S + X[at], D, float(peak[-1])

    def state_dict(self) -> dict:
        """Plain numbers and lists; `load_state_dict` continues exactly."""
        state = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in vars(self).items() if k != "prior"}
        return state | {"prior": list(self.prior)}

    def load_state_dict(self, state: dict) -> None:
        """Raises ValueError when the state lacks a field. One that it has beyond them, as of before, is passed over."""
        if not set(state) >= set(vars(self)):
            raise ValueError(f"forecaster state with fields {sorted(state)}, expected {sorted(vars(self))}")
        for name, now in vars(self).items():
            setattr(self, name, np.array(state[name]) if isinstance(now, np.ndarray) else state[name])
        self.prior = Prior(*state["prior"])


def _fit(rows, S_now, peak, S_end, D_end, prior):
    """Means and sds at the curve's points and the likeliest parameters, or the reason why not.

    c, a and k are linear, so they are projected out in closed form at every grid point (variable projection, Golub and
    Pereyra, 1973); the forecast averages the grid by likelihood. All arrays are [alpha-b G, tau D] or [.., windows N].
    """
    count, _, loss, S = rows[:, :4].T
    if not 0 < S_now < math.inf:
        return "the learning rate has been 0 so far"
    if (loss < 0).any():
        return "the loss is negative: the law has c >= 0"
    weight = count / count.max() * np.clip(S / S_now, 1e-6, 1.0) ** prior.discount
    scale = float(np.average(loss, weights=weight))
    if not scale > 1e-200:
        return "the loss is 0"
    y = loss / scale
    alpha, b = (v.ravel() for v in np.meshgrid(ALPHAS, OFFSETS, indexing="ij"))

    def power(z):  # ((z + b) / (1 + b))^-alpha: 1 at the present
        logs = np.log((z + OFFSETS[:, None]) / (1 + OFFSETS[:, None]))
        return np.exp(-ALPHAS[:, None, None] * logs).reshape(len(alpha), -1)

    p, d = power(S / S_now), rows[:, 4:].T / peak * (S / S_end[-1]) ** GROWTH
    p_end, d_end = power(S_end / S_now), D_end / peak * (S_end / S_end[-1]) ** GROWTH
    k_mean, variance, phi, robust = prior.k_mean, 1e-5, 1.0, np.ones_like(y)
    log_prior = -0.5 * (np.log(alpha / prior.alpha) / prior.alpha_spread)[:, None] ** 2
    log_prior = log_prior - 0.5 * (np.log(TAUS / prior.tau) / prior.tau_spread) ** 2
    for _ in range(3):
        w = weight * robust
        total = w.sum()
        ridge = variance / phi / prior.k_sd**2
        pm, dm, ym = p @ w / total, d @ w / total, y @ w / total
        pc, dc, yc = p - pm[:, None], d - dm[:, None], y - ym
        pw, dw = pc * w, dc * w
        pp, py, pd = np.einsum("gn,gn->g", pw, pc)[:, None], (pw @ yc)[:, None], pw @ dc.T
        dd, dy, yy = np.einsum("dn,dn->d", dw, dc), dw @ yc, float(yc**2 @ w)
        pp = pp + 1e-12 * total
        a, k = _pair(pp, pd, dd + ridge, py, ridge * k_mean - dy)
        c = ym - a * pm[:, None] + k * dm
        # Where c would be negative it is 0: the same sums, not centred.
        pp0, pd0, dd0 = pp + total * pm[:, None] ** 2, pd + total * pm[:, None] * dm, dd + total * dm**2 + ridge
        a0, k0 = _pair(pp0, pd0, dd0, py + total * pm[:, None] * ym, ridge * k_mean - dy - total * dm * ym)
        a, k, c = np.where(c < 0, a0, a), np.where(c < 0, k0, k), np.maximum(c, 0.0)
        off = ym - c - a * pm[:, None] + k * dm
        sse = total * off**2 + yy - 2 * a * py + 2 * k * dy + a**2 * pp - 2 * a * k * pd + k**2 * dd
        cost = sse + ridge * (k - k_mean) ** 2 - 2 * variance / phi * log_prior
        g, t = np.unravel_index(np.argmin(cost), cost.shape)
        error = y - c[g, t] - a[g, t] * p[g] + k[g, t] * d[t]
        spread = MAD_TO_SD * np.median(np.abs(error)) + 1e-9
        robust = np.minimum(1.0, 1.5 * spread / np.maximum(np.abs(error), 1e-300))
        variance = max(float(sse[g, t]) / max(total - 4 * total / len(y), 1.0), 1e-10)
        u = error * np.sqrt(w)
        rho = min(max(float(u[1:] @ u[:-1]) / max(float(u @ u), 1e-300), 0.0), 0.95)
        phi = (1 - rho) / (1 + rho)
    if a[g, t] == 0:
        x, yc = S - S @ weight / weight.sum(), y - y @ weight / weight.sum()
        if x @ (weight * yc) > 0.5 * math.sqrt(x**2 @ weight * (yc**2 @ weight) + 1e-30):  # correlated with time
            return "the loss rises"
    likelihood = np.exp(-0.5 * phi / variance * (cost - cost.min()))
    likelihood /= likelihood.sum()
    ends = c[..., None] + a[..., None] * p_end[:, None] - k[..., None] * d_end  # [G, tau, curve]
    mean = np.einsum("gt,gtm->m", likelihood, ends)
    between = np.einsum("gt,gtm->m", likelihood, (ends - mean) ** 2)
    ga, gk = p_end[:, None] - pm[:, None, None], dm[:, None] - d_end
    det = pp * (dd + ridge) - pd**2
    inside = (dd + ridge)[:, None] * ga**2 + 2 * pd[..., None] * ga * gk + pp[..., None] * gk**2
    within = variance / phi * (1 / total + np.einsum("gt,gtm->m", likelihood / det, inside))
    ahead = np.log2(np.maximum(S_end / S_now, 1.0))
    law = prior.misfit * np.abs(mean - mean[0]) * ahead**1.5 + prior.floor
    sd = np.sqrt(between + within + law**2)
    parameters = {"c": c[g, t] * scale, "a": a[g, t] * scale * (S_now * (1 + b[g])) ** alpha[g], "b": b[g] * S_now}
    parameters |= {"alpha": alpha[g], "k": k[g, t] * scale, "tau": TAUS[t]}
    return mean * scale, sd * scale, {name: float(value) for name, value in parameters.items()}


def _pair(pp, pd, dd, py, kd):
    """Minimum over a, k >= 0 of the quadratic with normal equations [pp, -pd; -pd, dd] (a, k) = (py, kd)."""
    det = pp * dd - pd**2
    a, k = (dd * py + pd * kd) / det, (pd * py + pp * kd) / det
    a, k = np.where(k < 0, py / pp, a), np.maximum(k, 0.0)
    k = np.where(a < 0, np.maximum(kd / dd, 0.0), k)
    return np.maximum(a, 0.0), k


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
