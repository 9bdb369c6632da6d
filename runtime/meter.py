"""What a loop measures while it runs: the clock, sums on the device, the best weights so far, when to stop.

The loop is the script's. It tells the meter of each micro-batch (`Meter.add`) and each step (`Meter.end_step`), asks
whether there is something to do (`Meter.due`), and reads (`Meter.row`): the one synchronisation between log lines.
"""

import math
import signal
import statistics
import sys
import time
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from runtime.dry_run import Rehearsal, estimate, weight_count
from runtime.machine import EnergyMeter, device_name, forget_peak, peak_flops, peak_memory, rng_states, set_rng_states
from runtime.process import Stopped, StopRequest
from runtime.pulse import Pulse

# A run ends after so many steps running without a finite loss.
HOPELESS = 3
# Ranks agree whether to stop at log lines, and at least every so many seconds, of training and of a validation:
# torchrun kills 30 s after its SIGTERM.
AGREE_SECONDS = 5.0
BAR = "step {n_fmt}/{total_fmt}{postfix}, {remaining} left{desc}"
# A checkpoint's entry -> the Meter's attribute.
SAVED = {"step": "step", "tokens_seen": "tokens", "train_seconds": "seconds"}
SAVED |= {name: name for name in ("joules", "best", "stale", "owed")}


class DivergenceWatch:
    """Counts non-finite steps and divergences on the device, without a synchronisation.

    A divergence is a non-finite loss, or a loss above twice its exponential moving average (decay 0.99) for 32 steps
    running; the average stands still while the loss is above it."""

    COUNTERS = ("ema", "steps", "over", "skipped", "streak", "worst_streak", "divergences")

    def __init__(self, device: torch.device):
        self.state = torch.zeros(len(self.COUNTERS), dtype=torch.float64, device=device)

    def update(self, loss: Tensor, finite: Tensor) -> None:
        """``loss`` 0-d, ``finite`` 0-d bool: whether this step's loss and gradient norm were finite."""
        ema, steps, over, skipped, streak, worst, events = self.state.unbind()
        loss, bad = loss.double(), (~finite).double()
        high = finite & (steps > 0) & (loss > 2 * ema)
        over, streak, worst = (over + 1) * high, (streak + 1) * bad, torch.maximum(worst, (streak + 1) * bad)
        moved = torch.where(steps > 0, 0.99 * ema + 0.01 * loss, loss)
        ema, events = torch.where(finite & ~high, moved, ema), events + bad + (over == 32)
        self.state = torch.stack([ema, steps + finite, over, skipped + bad, streak, worst, events])

    def read(self) -> dict[str, float]:
        """The counters on the host (synchronises)."""
        return dict(zip(self.COUNTERS, self.state.tolist(), strict=True))


class Agreement:
    """Whether a signal has reached one rank or more, and then all of them know its name.

    ``stop``: this rank's StopRequest. Ranks ask together, each at the same ``count`` of something that they do in step:
    steps, or forwards of a validation."""

    def __init__(self, stop: StopRequest, world, count: int = 0):
        self.stop, self.world = stop, world
        self.asked, self.clock, self.next = count, time.perf_counter(), count + 1

    def reached(self, count: int, now: bool = False) -> bool:
        """Asks ``now``, or where AGREE_SECONDS are over for the slowest rank, and otherwise says False. Alone there is
        nobody to ask, and the answer is always the present one."""
        if self.world.size == 1:
            return bool(self.stop.signal)
        if not now and count < self.next:
            return False
        clock = time.perf_counter()
        pace = (clock - self.clock) / max(count - self.asked, 1)
        mine = [signal.Signals[self.stop.signal].value if self.stop.signal else 0, pace]
        found = torch.tensor(mine, dtype=torch.float64, device=self.world.device)
        number, seconds = self.world.all_reduce(found, dist.ReduceOp.MAX).tolist()
        self.asked, self.clock, self.next = count, clock, count + max(int(AGREE_SECONDS / seconds), 1)
        self.stop.signal = signal.Signals(int(number)).name if number else None
        return bool(number)


class Meter:
    """The measurements of one training.

    ``run``: the RunFolder that rows go to. ``window``: a Calibration of the tokens trained on since the last log line.
    ``table``: eval.metrics, which measures it and says what a row shows. ``cfg``: with the flags steps, log_every,
    eval_every and, where there is a best, patience and report. ``counted``: names of further numbers of a step, given
    to `end_step`, whose sums a row shows."""

    def __init__(self, run, window, table, cfg, counted: tuple[str, ...] = ()):
        self.run, self.world, self.window, self.table = run, run.world, window, table
        self.steps, self.log_every, self.eval_every = cfg.steps, cfg.log_every, cfg.eval_every
        self.patience, self.counted = getattr(cfg, "patience", 0), counted
        self.reports_best = getattr(cfg, "report", "last") == "best"
        device = self.world.device
        self.step, self.tokens, self.seconds, self.joules = 0, 0, 0.0, 0.0
        self.best, self.stale = {"step": None, "nll": math.inf}, 0
        self.sums = torch.zeros(4 + len(self.counted), dtype=torch.float64, device=device)  # steps, loss, norm, clipped
        self.watch = DivergenceWatch(device)
        self.loss = torch.zeros((), device=device)  # of the step that is being computed
        self.ending: str | None = None  # why the loop ends before its last step
        self.stopping = self.at_log = self.at_eval = self.sound = False
        self.owed = False  # a signal has ended this step's validation, or the checkpoint says so
        self._energy, self.pulse = EnergyMeter(device), None
        self.rehearsal: Rehearsal | None = None  # of a dry run

    def state_dict(self) -> dict:
        """Entries of a checkpoint, on the CPU, of all ranks together. Every rank must call it."""
        window = type(self.window)(self.world.device)
        window.load_state_dict(self.window.state_dict())
        window.all_reduce()
        state = {key: getattr(self, name) for key, name in SAVED.items()}
        state |= {"sums": self.sums.cpu(), "watch": self.watch.state.cpu()}
        return state | {"window": window.state_dict(), "rng": rng_states(self.world)}

    def load_state_dict(self, state: dict, draws: bool = True) -> None:
        """``draws``: whether the training draws random numbers, so that another number of ranks goes on with others."""
        for key, name in SAVED.items():
            setattr(self, name, state.get(key, getattr(self, name)))
        self.sums.copy_(state["sums"])
        self.watch.state.copy_(state["watch"])
        if self.world.main:  # a sum over ranks goes on at one of them
            self.window.load_state_dict(state["window"])
        if not set_rng_states(state["rng"], self.world) and draws and self.world.main:
            print(f"resuming {len(state['rng'])} ranks on {self.world.size}: dropout masks will differ from here on")
        self.at_eval = self.owed
        if self.patience and self.stale >= self.patience:
            self.ending = "early_stop"

    def dry_run(self, cfg, model, forwards, *, rows: int, **about) -> bool:
        """In a dry run: says what the run would be; whether it ends with that. Every rank must call it.

        ``forwards``, ``rows``: as `runtime.dry_run.estimate` takes them; ``about``: fields of its Rehearsal."""
        if not cfg.dry_run:
            return False
        memory = estimate(model, cfg, forwards, rows, self.world)
        about |= dict(step=self.step, memory=memory, weights=weight_count(model), anew=self.run.dry.says())
        self.rehearsal = Rehearsal(cfg, self.world, **about)
        if self.world.main:
            print("\n".join(self.rehearsal.plan()))
        return cfg.dry_run != "timed" or not self.running

    def start(self, validate: Callable[[], None] = lambda: None) -> None:
        """Right before the loop: signals ask it to stop, ranks watch each other, the bar stands, the clock runs. Calls
        ``validate()`` where a checkpoint owes it."""
        from tqdm import tqdm

        how = dict(total=self.steps, initial=self.step, bar_format=BAR, dynamic_ncols=True)
        self.bar = tqdm(disable=not self.world.main or bool(self.rehearsal), **how)
        if not self.bar.disable:
            self._fill([], [self.run.path.name])
        self.stop = StopRequest()
        if dist.is_initialized():
            self.pulse = Pulse(self.world.rank, self.world.size, dist.distributed_c10d._get_default_store())
            self.pulse.start()
        self._clocked = self.tokens
        self._alone = forget_peak(self.world.device)  # what tokenising took is not training's
        self._steps = Agreement(self.stop, self.world, self.step)
        self.go_on()
        if self.owed:
            validate()

    def go_on(self) -> None:
        """After evaluation and checkpoints, which are not training time."""
        self._clock, self._read = time.perf_counter(), self._energy.read()

    @property
    def running(self) -> bool:
        return self.step < self.steps and self.ending is None

    def add(self, loss: Tensor, moments) -> None:
        """A micro-batch: its part of the loss of this rank (0-d), and the Moments of the tokens in the loss."""
        self.loss += loss.detach() / self.world.size
        self.window.update(moments)

    def end_step(self, norm: Tensor, clip: float, tokens: int, **counted: float) -> None:
        """After a step. ``norm``: of the gradient, 0-d; ``clip``: what it was clipped to, 0 is off; ``tokens``: of
        the global batch; ``counted``: the numbers that were named. A step that is not finite is skipped and counted."""
        loss, finite = self.loss, torch.isfinite(norm) & torch.isfinite(self.loss)
        self.watch.update(loss, finite)
        clipped = (norm > (clip or math.inf)).float()
        more = [torch.full_like(loss, counted[name]) for name in self.counted]
        self.sums += torch.where(finite, torch.stack([torch.ones_like(loss), loss, norm, clipped, *more]), 0.0)
        self.loss = torch.zeros_like(loss)
        self.tokens += tokens
        self.step += 1
        self.bar.update()
        if self.rehearsal and self.rehearsal.stepped():
            self.ending = "rehearsed"

    def due(self) -> bool:
        """Whether a log line, a validation or a stop is due after this step. Ranks see a signal at different moments,
        or one of them alone: several of them agree at log lines and every few seconds. In a dry run nothing is."""
        if self.rehearsal:
            if self.stop.signal:
                raise Stopped(self.stop.signal)
            return False
        self.at_eval = self.step % self.eval_every == 0 or self.step == self.steps
        self.at_log = self.step % self.log_every == 0 or self.at_eval
        self.stopping = self._steps.reached(self.step, now=self.at_log)
        return self.at_log or self.stopping

    def watched(self, forwards, count: int):
        """The ``forwards`` of a validation, until a signal has come: then the validation is owed, `judge` ends the run,
        and a resumed one makes it first. ``count``: of the forwards of the rank that has most."""
        self.owed, left, asked = False, iter(forwards), Agreement(self.stop, self.world)
        for number in range(1, count + 1):
            if (forward := next(left, None)) is not None:
                yield forward
            if asked.reached(number):
                self.owed = True
                return

    def signalled(self) -> bool:
        """Whether a signal has reached this rank: for work that its ranks do not do in step."""
        return bool(self.stop.signal)

    def row(self, says: str = "", **shown: float) -> dict | None:
        """What a log line holds, over the steps since the last one; None where none is due, or no step was finite.

        Reads the clock and the divergence watch, and ends the run where it is hopeless. ``shown``, alpha and lr at the
        least, goes into the row; ``says`` into the bar."""
        self.health = self.watch.read()
        seconds = time.perf_counter() - self._clock
        self.seconds += seconds
        rate, self._clocked = (self.tokens - self._clocked) / seconds, self.tokens
        if self.world.device.type == "cuda":  # every rank, as one alone may have lost its counter
            read = self._energy.read()
            used = math.nan if self._read is None or read is None else read - self._read
            self.joules += float(self.world.all_reduce(torch.tensor(used, dtype=torch.float64).to(self.world.device)))
        self.go_on()
        if self.health["worst_streak"] >= HOPELESS:
            self.ending = "diverged"
        elif self.stopping:
            self.ending = "stopped"
        if not self.at_log:
            return None
        n, loss, norm, clipped, *more = self.sums.tolist()
        self.window.all_reduce()
        row = None
        if n:
            m, metrics = self.table.measure(self.window), self.table.shown(self.table.TOKENS, "train")
            row = {"loss": loss / n} | {metric.key: m[metric.key] for metric in metrics} | shown
            row |= {"grad_norm": norm / n, "clip_rate": clipped / n} | dict(zip(self.counted, more, strict=True))
            row |= {"steps": n, "skipped": self.health["skipped"], "tokens_per_second": rate}
            if not self.bar.disable:
                self._show(row, metrics, says)
        self.window.reset()
        self.sums.zero_()
        return row

    def _show(self, row: dict, metrics, says: str) -> None:
        rest = [metric.bar.format(row[metric.key]) for metric in metrics if metric.bar]
        rest += [f"alpha {row['alpha']:.2f}"] * bool(row["alpha"]) + [f"lr {row['lr']:.1e}"]
        rest += [f"{row['tokens_per_second']:,.0f} tokens/s", self.run.path.name]
        says = says.removesuffix(f" at step {self.steps}")  # which the bar begins with
        self._fill([f"loss {row['loss']:.3f}", *filter(None, [says])], rest)

    def _fill(self, first: list[str], rest: list[str]) -> None:
        """Gives the bar what its terminal has room for, in this order; the time left stands between the two."""
        columns = self.bar.format_dict["ncols"] or 200  # None where it is no terminal
        room = columns - 1 - len(f"step {self.steps}/{self.steps}, 100:00:00 left")
        kept: list[list[str]] = [[], []]
        for part, parts in [(part, kept[0]) for part in first] + [(part, kept[1]) for part in rest]:
            if len(part) + 2 <= room:
                parts.append(part)
                room -= len(part) + 2
        self.bar.set_description_str("".join(f", {part}" for part in kept[1]), refresh=False)
        self.bar.set_postfix_str(", ".join(kept[0]))

    def judge(self, numbers: dict, by: str = "nll") -> bool:
        """Logs and prints a validation. Whether these are the best weights so far, by ``numbers[by]``, of which the
        NLL's lowest is the best, another's highest; ends the run where its patience is over, or a signal has ended the
        validation, which then counts for nothing."""
        if self.owed:
            self._steps.reached(self.step, now=True)
            self.at_eval, self.stopping, self.ending = False, True, "stopped"
            return False
        self.log("val", **numbers)
        if self.world.main:
            line = ["loss"] * ("loss" in numbers) + [m.key for m in self.table.shown(self.table.TOKENS, "line")]
            text = ", ".join(f"{key} {numbers[key]:.4f}" for key in line)
            self.bar.write(f"step {self.step}: validation {text}", file=sys.stderr)
        self.stale, self.sound = self.stale + 1, math.isfinite(numbers["nll"])
        value = numbers[by] if by == "nll" else -numbers[by]
        if best := value < self.best.get("value", self.best["nll"]):
            self.best, self.stale = {"step": self.step, "nll": numbers["nll"]}, 0
            self.best |= {"value": value} if by != "nll" else {}
        if self.patience and self.stale >= self.patience:
            self.ending = self.ending or "early_stop"
        return best

    def saves(self, model, optimizer=None) -> bool:
        """Whether a checkpoint is due, and these weights are a good place to go on from: all of them finite, and the
        moments of the ``optimizer``, and the NLL of their validation where there was one. Every rank must call it.

        Weights or moments that are not finite end the run, and so do those of the last step, or of a stop, that are not
        saved. A step whose loss was not finite has changed nothing, and does not keep its weights from being saved."""
        if not (self.at_eval or self.stopping):
            return False
        parts = [p for p in model.parameters() if p.requires_grad]
        moments = [m for state in (optimizer.state.values() if optimizer else ()) for m in state.values()]
        parts += [m for m in moments if torch.is_tensor(m) and m.is_floating_point()]
        parts = (getattr(p, "to_local", lambda p=p: p)() for p in parts)
        finite = torch.stack([torch.isfinite(p.detach()).all().to(self.world.device) for p in parts])
        broken = bool(self.world.all_reduce((~finite.all()).int()))
        if not broken and (self.sound or not self.at_eval):
            return True
        if broken or self.stopping or self.step == self.steps:
            self.ending = "not_finite"
        elif self.world.main:
            why = "the validation's NLL is not finite, but the weights are; goes on"
            self.bar.write(f"step {self.step}: no checkpoint: {why}", file=sys.stderr)
        self.log("event", event="not_saved")
        return False

    def log(self, kind: str, **values) -> None:
        """A row of metrics.jsonl, with the step, the tokens and the training seconds so far."""
        self.run.log(kind, self.step, tokens=self.tokens, train_seconds=self.seconds, **values)

    def end(self) -> int | None:
        """After the loop: the exit code of a run that ends with it (1 diverged, or without the best weights that it is
        to report, 128 + the signal's number), None where the final evaluation follows. That one a signal ends by an
        exception."""
        self.bar.close()
        self.stop.restore()
        if self.pulse:
            self.pulse.stop()
        self.memory = peak_memory(self.world.device)
        if self.rehearsal:
            if self.world.main:
                print("\n".join(self.rehearsal.timing()))
            return 0
        code = self.run.ended(self.ending, self.step, self.stop.signal)
        if code is None and self.stop.signal:
            raise Stopped(self.stop.signal)  # it came after the last step
        if code is None and self.reports_best and self.best["step"] is None:
            if self.world.main:
                why = "no validation had a finite NLL, so there are no best weights; lower --lr"
                print(f"{self.run.path}: {why}", file=sys.stderr)
            return 1
        return code

    def summary(self, flops_per_token: float, dtype: torch.dtype) -> dict:
        """Entries of summary.json that every script has. Speed is the median over log windows; the first pays for
        compilation and cold caches and is left out."""
        world, rows = self.world, self.run.rows("train")
        done = sum(r["steps"] for r in rows)
        rate = statistics.median(r["tokens_per_second"] for r in (rows[1:] or rows)) if rows else None
        windows = pairwise([{"step": 0, "tokens": 0}, *rows])
        tokens_per_step = [(b["tokens"] - a["tokens"]) / (b["step"] - a["step"]) for a, b in windows]
        ms = [1000 * n / r["tokens_per_second"] for n, r in zip(tokens_per_step, rows, strict=True)]
        peak, health = peak_flops(world.device, dtype), self.watch.read()
        return {
            "best_step": self.best["step"],
            "best_val_nll": None if self.best["step"] is None else self.best["nll"],
            "stopped_early": self.ending,
            "steps": self.step,
            "tokens_seen": self.tokens,
            "tokens_per_second": rate,
            "ms_per_step_median": statistics.median(ms[1:] or ms) if ms else None,
            "train_seconds": self.seconds,
            "flops_per_token": flops_per_token,
            "mfu": rate * flops_per_token / (peak * world.size) if peak and rate else None,
            "clip_rate": sum(r["clip_rate"] * r["steps"] for r in rows) / done if done else None,
            "peak_memory_bytes": self.memory,
            "energy_joules": self.joules if self._read is not None and math.isfinite(self.joules) else None,
            "divergences": int(health["divergences"]),
            "skipped_steps": int(health["skipped"]),
            "peak_memory_of": ("CUDA allocations" if world.device.type == "cuda" else "process resident set")
            + " of the loop alone" * self._alone,
            "device": device_name(world.device),
            "world_size": world.size,
            "dtype": str(dtype).removeprefix("torch."),
        }
