"""The law of forecast.py fitted to the windows of a run: epochs levelled, the grid averaged, its misses scored."""

import math

import numpy as np

# The grid of the nonlinear parameters. b is a share of the S seen so far, tau is in steps.
ALPHAS = np.geomspace(0.12, 1.4, 9)
OFFSETS = np.geomspace(0.003, 1.0, 6)
ALPHA, OFFSET = (v.ravel() for v in np.meshgrid(ALPHAS, OFFSETS, indexing="ij"))
TAUS = np.array([30.0, 100.0, 300.0, 1000.0])
GROWTH = 0.3  # of the annealing gain with S
CLOCK = 0.5  # S runs at (lr / peak)^CLOCK
MAD_TO_SD = 1.4826  # of a Gaussian: from the median absolute deviation to the standard deviation
CUTS, OWN = (0.35, 0.5, 0.7), 3.0  # of S: where the forecaster scores itself, and what that weighs beside 1
LEAST = 0.3  # what the self-score leaves of the variance of the parameters, at the least
ROUNDS = 2  # of the robust fit
# A plateau: the change of the loss in a doubling of S, as a share of it, from which on it is one and where wholly so.
FLAT = (-0.015, -0.005)
# An epoch's end: the least fall of log loss, that in robust sds of such differences, and windows on a side.
JUMP, JUMPS, SIDE = 0.05, 5.0, 4
UNLIKE = 0.4  # the jumps of a run differ by this share at least
FADES = 0.9  # what is left of a jump for the next epoch's end
SCALE = 1.1416  # the 68 % quantile of Student's t with 4 degrees of freedom
TAILS = 0.93  # of the sds of a Gaussian, to be one that Student's t with 4 degrees of freedom has 68 % within


def median(values):
    """Of a vector [N], N of 1 or more; numpy's own takes ten times as long for so few."""
    ordered = np.sort(values)
    return 0.5 * float(ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2])


def smoothed(D, passed, down):
    """D [tau], then after each stretch [N, tau] of S: D += (1 - exp(-passed / tau)) (down - D), in closed form.

    The sums of growing exponentials are begun anew before they overflow."""
    out, S, begin = np.empty((len(passed), len(TAUS))), np.cumsum(passed), 0
    while begin < len(passed):
        reach = 300 * TAUS[0] + (S[begin - 1] if begin else 0.0)
        part = slice(begin, max(int(np.searchsorted(S, reach, "right")), begin + 1))
        fall = np.minimum(passed[part, None] / TAUS, 500.0)
        total = np.cumsum(fall, axis=0)
        gained = np.cumsum(-np.expm1(-fall) * down[part, None] * np.exp(total), axis=0)
        out[part] = (D + gained) * np.exp(-total)
        D, begin = out[part][-1], part.stop
    return out


def _jumps(y, at, side):
    """Means of ``side`` rows of ``y`` [N] from ``at`` on less those before, less what falls within the sides."""
    c, half = np.concatenate([[0.0], np.cumsum(y)]), side // 2
    rest = side - half
    inside = (c[at] - c[at - half]) / half - (c[at - rest] - c[at - side]) / half
    inside += (c[at + side] - c[at + rest]) / half - (c[at + half] - c[at]) / half
    slope = np.minimum(0.5 * inside / rest, 0.0)  # of a row
    return (c[at + side] - 2 * c[at] + c[at - side]) / side - slope * side


def _first_end(step, y):
    """The step at which the first epoch ended by a sudden fall of ``y``, log loss; None where there was none.

    Of the first that stands out, or of a half, third or quarter of it where all its multiples fell as well."""
    if len(y) < 3 * SIDE:
        return None
    at = np.arange(SIDE, len(y) - SIDE + 1)
    jumps, edges = _jumps(y, at, SIDE), 0.5 * (step[at - 1] + step[at])
    spread = MAD_TO_SD * median(np.abs(jumps - median(jumps)))
    found = np.flatnonzero(jumps < -max(JUMP, JUMPS * spread))
    if not len(found):
        return None
    first = found[found <= found[0] + SIDE]
    whole = float(edges[first[np.argmin(jumps[first])]])
    for parts in (4, 3, 2):
        near = [np.abs(edges - whole * k / parts) <= 1.5 * (step[1] - step[0]) for k in range(1, parts)]
        if all((jumps[here] < -max(JUMP, 0.5 * JUMPS * spread)).any() for here in near):
            return whole / parts
    return whole


def level(rows, steps, epoch, prior):
    """Epochs: the rows brought down by the jumps since, the log jumps to come by ``steps`` [17], their sd, and notes.

    Rows around an end weigh nothing. Of the jumps the mean is inferred under the prior's; each differs from it as those
    seen do from each other, by 5 % at least. An end that was passed a moment ago is still to come."""
    zero, notes = np.zeros(len(steps)), []
    step, loss, n = rows[:, 1], rows[:, 2], len(rows)
    if n < 2 or (loss <= 0).any():
        return rows, zero, zero, notes
    y = np.log(loss)
    if epoch is None:
        epoch = _first_end(step, y)
        if epoch is not None:
            notes.append(f"the sudden fall at step {epoch:.0f} is taken for the end of the first epoch")
    if epoch is None or not epoch < steps[-1]:
        return rows, zero, zero, notes
    width = (step[-1] - step[0]) / (n - 1)
    ends = epoch * np.arange(max(int(step[0] / epoch), 1), int(step[-1] / epoch) + 1)[-n:]
    rows, seen, shift, last = rows.copy(), [], np.zeros(n), math.ceil(step[0] / epoch) - 1
    for end in ends:
        i = int(np.searchsorted(step, end, side="right"))
        rows[np.abs(step - end) < 0.5 * width, 0] *= 1e-6
        side = min(SIDE, i, n - i, int(0.5 * epoch / width))
        if side >= 2:
            seen.append(float(_jumps(y, np.array([i]), side)[0]))
            shift[:i] += seen[-1]
            last = round(end / epoch)  # the last end with rows enough behind it
    rows[:, 2] *= np.exp(np.clip(shift, -100.0, 100.0))
    spread = max(float(np.std(seen)), UNLIKE * abs(float(np.mean(seen))), 0.05) if seen else 0.05
    certain = prior.jump_sd**-2 + len(seen) * spread**-2
    mean = (prior.jump * prior.jump_sd**-2 + sum(seen) * spread**-2) / certain
    count = np.maximum(np.floor((steps - 0.1 * epoch) / epoch) - last, 0.0)  # ends to come
    faded = (1 - FADES**count) / (1 - FADES)
    return rows, mean * faded, np.sqrt(faded**2 / certain + spread**2 * count), notes


def fit(rows, S_now, peak, S_end, D_end, prior):
    """Means and sds at the curve's points, the likeliest parameters and whether the loss is flat, or why there is none.

    c, a and k are linear, so they are projected out in closed form at every grid point (variable projection, Golub and
    Pereyra, 1973); the forecast averages the grid by likelihood. The first of the fits sees all rows, the others those
    up to CUTS. All arrays are [fits F, alpha-b G, tau D] or [.., windows N]."""
    count, _, loss, S = rows[:, :4].T
    if not 0 < S_now < math.inf:
        return "the learning rate has been 0 so far"
    if (loss < 0).any():
        return "the loss is negative: the law has c >= 0"
    z, n = S / S_now, len(loss)
    seen = np.array([1.0, *(cut for cut in CUTS if (z <= cut).sum() >= 4)])
    inside = z <= seen[:, None] + 1e-9
    last = np.maximum(np.where(inside, z, 0.0).max(1), 1e-9)
    weight = count / count.max() * np.clip(z / last[:, None], 1e-6, 1.0) ** prior.discount * inside
    scale = float(weight[0] @ loss / weight[0].sum())
    if not scale > 1e-200:
        return "the loss is 0"
    y, points = loss / scale, inside.sum(1)
    if n >= 8:
        x, yc = z - z @ weight[0] / weight[0].sum(), y - y @ weight[0] / weight[0].sum()
        if x @ (weight[0] * yc) > 0.5 * math.sqrt(x**2 @ weight[0] * (yc**2 @ weight[0]) + 1e-30):
            return "the loss rises"  # it is correlated with time

    def power(x):  # ((x + b) / (1 + b))^-alpha: 1 at the present
        logs = np.log((x + OFFSETS[:, None]) / (1 + OFFSETS[:, None]))
        return np.exp(-ALPHAS[:, None, None] * logs).reshape(len(ALPHA), -1)

    p, d = power(z), rows[:, 4:].T / peak * (S / S_end[-1]) ** GROWTH
    p_end, d_end = power(S_end / S_now), D_end / peak * (S_end / S_end[-1]) ** GROWTH
    k_mean, a_mean, p2 = prior.k_mean, prior.a_mean, p * p
    log_prior = -0.5 * (np.log(ALPHA / prior.alpha) / prior.alpha_spread)[:, None] ** 2
    log_prior = log_prior - 0.5 * (np.log(TAUS / prior.tau) / prior.tau_spread) ** 2
    variance, phi, tail, robust = np.full(len(seen), 1e-4), np.ones(len(seen)), np.ones(len(seen)), np.ones(n)
    for _ in range(ROUNDS):
        w = weight * robust
        total = w.sum(1)
        pm, dm, ym = w @ p.T / total[:, None], w @ d.T / total[:, None], w @ y / total
        yc, dc = y - ym[:, None], d - dm[:, :, None]
        wd, wy = w[:, None] * dc, w * yc
        pp = np.maximum(w @ p2.T - total[:, None] * pm**2, 0.0)[:, :, None]
        py, pd = (wy @ p.T)[:, :, None], np.moveaxis(wd @ p.T, 1, 2)
        dd, dy, yy = (wd * dc).sum(2)[:, None], (wd @ y[:, None])[:, None, :, 0], (wy * yc).sum(1)
        pm, dm = pm[:, :, None], dm[:, None]
        total_, ym_, yy, ratio, tail = (v[:, None, None] for v in (total, ym, yy, variance / phi, tail))
        ridge, damp = ratio / prior.k_sd**2, ratio / prior.a_sd**2 / tail  # of k and of a
        pp = pp + 1e-12 * total_
        a, k = _pair(pp + damp, pd, dd + ridge, py + damp * a_mean, ridge * k_mean - dy)
        c = ym_ - a * pm + k * dm
        if (c < 0).any():  # where c would be negative it is 0: the same sums, not centred
            pp0, pd0, dd0 = pp + total_ * pm**2 + damp, pd + total_ * pm * dm, dd + total_ * dm**2 + ridge
            py0, kd0 = py + total_ * pm * ym_ + damp * a_mean, ridge * k_mean - dy - total_ * dm * ym_
            a0, k0 = _pair(pp0, pd0, dd0, py0, kd0)
            a, k, c = np.where(c < 0, a0, a), np.where(c < 0, k0, k), np.maximum(c, 0.0)
        off = ym_ - c - a * pm + k * dm
        sse = total_ * off**2 + yy - 2 * a * py + 2 * k * dy + a**2 * pp - 2 * a * k * pd + k**2 * dd
        cost = sse + ridge * (k - k_mean) ** 2 + damp * (a - a_mean) ** 2 - 2 * ratio * log_prior
        each = np.arange(len(seen))
        g, t = np.unravel_index(cost.reshape(len(seen), -1).argmin(1), cost.shape[1:])
        best = each, g, t
        error = y - c[best][:, None] - a[best][:, None] * p[g] + k[best][:, None] * d[t]
        spread = MAD_TO_SD * median(np.abs(error[0]))
        robust = np.minimum(1.0, 1.5 * (spread + 1e-9) / np.maximum(np.abs(error[0]), 1e-300))
        variance = (sse[best] / total * points + 1e-4) / (np.maximum(points - 4.0, 0.0) + 1.0) * total / points
        variance = np.maximum(variance, 1e-10)
        tail = 0.5 + 0.5 * ((a[best] - a_mean) / prior.a_sd) ** 2  # the prior of a is Cauchy's
        u = error * np.sqrt(w)
        rho = (u[:, 1:] * u[:, :-1]).sum(1) / np.maximum((u * u).sum(1), 1e-300)
        rho = np.clip(rho, 0.0, 0.95) * points / (points + 6.0)
        phi = (1 - rho) / (1 + rho)
    likelihood = np.exp(-0.5 * (cost - cost.min((1, 2), keepdims=True)) / ratio)
    likelihood /= likelihood.sum((1, 2), keepdims=True)
    A, B = pp + damp, dd + ridge
    det = A * B - pd**2

    def ahead_of(i, px, dx):  # mean and variance [M] of fit i at p [G, M] and D [tau, M]
        ends = (c[i][..., None] + a[i][..., None] * px[:, None] - k[i][..., None] * dx).reshape(likelihood[i].size, -1)
        mean = likelihood[i].ravel() @ ends
        between = likelihood[i].ravel() @ (ends - mean) ** 2
        ga, gk, inverse = px - pm[i], dm[i].T - dx, likelihood[i] / det[i]
        within = inverse @ B[i, 0] @ ga**2 + A[i, :, 0] @ inverse @ gk**2
        within += 2 * (gk * ((inverse * pd[i]).T @ ga)).sum(0) + 1 / total[i]
        return mean, between + variance[i] / phi[i] * within

    def law(doublings):  # its variance
        return prior.floor**2 + (prior.young**2 * 100 / max(S_now, 3.0) + prior.drift**2) * doublings**2

    # The variance of one window about the law, which a final loss has too.
    residual = max((MAD_TO_SD * median(np.abs(error[0]))) ** 2, 0.25 * variance[0] * n / total[0])
    misses = []
    for i in range(1, len(seen)):
        held = z > 0.5 * (1 + seen[i])  # the second half of what it did not see
        if held.sum() >= 2:
            mean, known = ahead_of(i, p[:, held], d[:, held])
            share = weight[0, held] / weight[0, held].sum()
            own = (known + law(np.log2(z[held] / seen[i]))) @ share + residual / held.sum()
            misses.append(min(float((y[held] - mean) @ share) ** 2 / own, 100.0))
    factor = (1 + OWN * sum(misses) / len(misses)) / (1 + OWN) if misses else 1.0
    mean, known = ahead_of(0, p_end, d_end)
    doublings = np.log2(np.maximum(S_end / S_now, 1.0))
    flat = _flatness(z, y, count) if y[0] > 1.05 * y[-1] else 0.0
    stuck = prior.plateau * flat * min(1.0, math.sqrt(1000 / S_now)) * np.minimum(doublings, 2.0)
    sd = TAILS * np.sqrt(max(factor, LEAST) * known + factor * law(doublings) + stuck**2 + residual)
    (a, k, c), g, t = (float(v[0, g[0], t[0]]) for v in (a, k, c)), g[0], t[0]
    alpha, b = ALPHA[g], OFFSET[g]
    parameters = {"c": c * scale, "a": a * scale * (S_now * (1 + b)) ** alpha, "b": b * S_now}
    parameters |= {"alpha": alpha, "k": k * scale, "tau": TAUS[t]}
    mean = mean * np.exp(-prior.bend * doublings)
    return (
        mean * scale,
        sd * scale,
        {name: float(value) for name, value in parameters.items()},
        flat > 0.5 and prior.plateau > 0,
    )


def _flatness(z, y, count):
    """0 where the loss falls over the last doubling of S, up to 1 where it does not."""
    late = z >= 0.5
    if late.sum() < 4:
        return 0.0
    x, y, w = np.log2(z[late]), y[late], count[late] / count[late].sum()
    x = x - x @ w
    slope = (w * x) @ y / max((w * x) @ x, 1e-12)
    return float(np.clip((slope - FLAT[0]) / (FLAT[1] - FLAT[0]), 0.0, 1.0))


def _pair(pp, pd, dd, py, kd):
    """Minimum over a, k >= 0 of the quadratic with normal equations [pp, -pd; -pd, dd] (a, k) = (py, kd)."""
    det = pp * dd - pd**2
    a, k = (dd * py + pd * kd) / det, (pd * py + pp * kd) / det
    a, k = np.where(k < 0, py / pp, a), np.maximum(k, 0.0)
    k = np.where(a < 0, np.maximum(kd / dd, 0.0), k)
    return np.maximum(a, 0.0), k
