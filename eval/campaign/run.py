"""The loop of a campaign: begins runs, watches them, ends those that are hopeless, counts what they cost."""

import signal
import sys
import time

from eval.campaign.engines import LET_GO, in_use
from eval.campaign.progress import Ledger, Run
from eval.campaign.pruning import Pruner
from eval.campaign.table import Table
from runtime.dry_run import span
from runtime.process import code_of, handled
from runtime.secrets import hide

LOOK, KEEP = 1.0, 5.0  # seconds between two looks into the folders, and between two writes of campaign.json


class Campaign:
    """``runs`` by name; ``line_of(run)``: its command line now; ``engine``: see `eval.campaign.engines`.

    ``devices``: ids of the GPUs, [] for none; a run has ``ranks`` of them, or one, and where there are more ``jobs``
    than GPUs they share. ``size(run)`` is equal for runs that cost alike."""

    def __init__(self, runs, line_of, engine, ledger: Ledger, pruner: Pruner, *, jobs, devices, ranks, size):
        self.runs: dict[str, Run] = runs
        self.line_of, self.engine, self.ledger, self.pruner = line_of, engine, ledger, pruner
        self.jobs, self.devices, self.ranks, self.size = jobs, devices, ranks, size
        self.table, self.failed, self.stopped, self.full = Table(), 0, [], False
        self.waits: dict[str, float] = {}  # since when a run's folder was found in use
        self.looked = self.kept = 0.0

    @property
    def going(self) -> list[Run]:
        return [run for run in self.runs.values() if run.handle]

    @property
    def queue(self) -> list[Run]:
        return [run for run in self.runs.values() if run.state == "waiting" and not run.handle]

    def run(self) -> int:
        """Until nothing is left to do. Returns 0, the exit code of the first run that failed, or that of a signal."""
        handled(self._stop)
        clock = time.monotonic()
        while True:
            now = time.monotonic()
            self._count(now - clock)
            clock = now
            self._reap()
            if not self.stopped and not self.full:
                self._begin(now)
            if not self.going and (self.stopped or self.full or not self.queue):
                break
            self._look(now)
            self.table.show(list(self.runs.values()), lambda at=now: self.foot(at))
            time.sleep(0.05)
        self.ledger.write(self.runs)
        self.table.end(list(self.runs.values()), self.foot(time.monotonic()))
        if self.stopped:
            print(f"{self.stopped[0]}: stopped; the same command goes on from here", file=sys.stderr, flush=True)
            return code_of(self.stopped[0])
        return self.failed

    def _stop(self, number, _) -> None:
        """Every run saves and stops; a second Ctrl-C ends them at once."""
        self.stopped.append(signal.Signals(number).name)
        first = len(self.stopped) == 1
        for run in self.going if first or number == signal.SIGINT else ():
            run.handle.stop(signal.SIGTERM if first else signal.SIGINT)

    def _count(self, seconds: float) -> None:
        for run in self.going:
            run.seconds += seconds
            run.gpu_seconds += seconds * self.held

    # -- begins and ends -------------------------------------------------------------------------

    def _begin(self, now: float) -> None:
        for run in self.queue:
            if self.stopped or len(self.going) >= self.jobs or self._too_much(run, now):
                return
            if in_use(run.folder):
                if run.name not in self.waits:
                    self.waits[run.name] = now
                    self.table.say(f"{run.name} waits: a process of before still has its folder")
                if now - self.waits[run.name] < LET_GO:
                    continue
            run.folder.parent.mkdir(parents=True, exist_ok=True)
            line = self.line_of(run)
            run.look()
            run.began, run.first = now, run.step if "--resume" in line else 0
            run.exit, run.why = None, None
            self.pruner.asked[run.name] = run.share if run.first else 0.0
            self.table.say(f"begins {run.name}: {hide(' '.join(line[1:]))}")
            run.handle = self.engine.start(line, f"{run.folder}.log", self._free(run))
            if self.stopped:  # the signal came in this moment
                run.handle.stop(signal.SIGTERM)
            self.ledger.write(self.runs)

    def _free(self, run: Run) -> list[str] | None:
        """The GPUs of ``run``: those that are used least; None where there are none, or all are its own."""
        run.gpus = []
        if not self.devices or (self.ranks > 1 and self.ranks >= len(self.devices)):
            return None
        used = [gpu for other in self.going for gpu in other.gpus]
        run.gpus = sorted(self.devices, key=lambda gpu: (used.count(gpu), self.devices.index(gpu)))[: self.ranks]
        return run.gpus

    def _reap(self) -> None:
        for run in self.going:
            code = run.handle.code()
            if code is None:
                continue
            run.handle = None
            run.look()
            if run.done and (code == 0 or self.stopped):  # the summary comes last
                run.state, run.exit = "finished", 0
                self.table.say(f"{run.name} has finished in {span(run.seconds)}")
            elif run.state == "pruned":
                run.exit = code
            elif not self.stopped:
                run.state, run.exit = "failed", code or 1
                run.why = (run.tail(1) or ["it said nothing"])[-1]
                self.failed = self.failed or run.exit
                said = "\n".join(f"    {text}" for text in run.tail())
                name = f"{run.folder} has not finished (exit code {code}), see {run.folder}.log"
                self.table.say(f"{name}; the others go on, the same command tries it again\n{said}")
            self.ledger.write(self.runs)

    def _look(self, now: float) -> None:
        if now - self.looked < LOOK:
            return
        self.looked = now
        for run in self.going:
            if not run.look() or run.state == "pruned":
                continue
            if why := self.pruner.why(run, list(self.runs.values())):
                run.state, run.why = "pruned", why
                self.table.say(f"{run.name} is stopped: {why}")
                run.handle.stop(signal.SIGTERM)
        if now - self.kept >= KEEP:
            self.kept = now
            self.ledger.write(self.runs)

    # -- what it takes ---------------------------------------------------------------------------

    def wholes(self, now: float) -> dict[object, float]:
        """size -> mean seconds of a whole run, of those that have finished or run at a known pace."""
        found: dict[object, list[float]] = {}
        for run in self.runs.values():
            left = run.left(now) if run.handle else 0.0 if run.state == "finished" and run.seconds else None
            if left is not None:
                found.setdefault(self.size(run), []).append(run.seconds + left)
        return {size: sum(seconds) / len(seconds) for size, seconds in found.items()}

    def expected(self, run: Run, now: float, wholes: dict[object, float]) -> float | None:
        """Seconds that ``run`` will still take: by its own pace, else as those that cost alike; None if unknown."""
        if run.handle and (left := run.left(now)) is not None:
            return left
        whole = wholes.get(self.size(run))
        return None if whole is None else max(whole - run.seconds, 0.0)

    def cost(self, seconds: float) -> float:
        """Hours, of GPUs where there are some, of so many seconds of runs."""
        return seconds / 3600 * (self.held if self.devices else 1)

    @property
    def held(self) -> float:
        """GPUs of a run; a part of one where jobs share."""
        count = len(self.devices)
        return min(count / self.jobs, 1.0) if self.ranks == 1 else min(self.ranks, count)

    def spent(self) -> float:
        """Hours so far, of GPUs where there are some."""
        return self.ledger.spent(self.runs)[bool(self.devices)] / 3600

    def _too_much(self, run: Run, now: float) -> bool:
        """Whether ``run`` would pass the budget, with what has been spent and what the others will still take."""
        budget = self.ledger.budget
        if budget is None:
            return False
        wholes = self.wholes(now)
        would = self.spent() + self.cost(sum(self.expected(r, now, wholes) or 0.0 for r in (*self.going, run)))
        self.full = would > budget or self.spent() >= budget
        if self.full:
            left = len(self.queue)
            runs = f"{left} run does" if left == 1 else f"{left} runs do"
            says = f"{self.spent():.3g} of {budget:g} {self.unit} are spent, with the next run it would be {would:.3g}"
            self.table.say(f"budget: {says}: {runs} not begin; the same command with a larger --budget goes on")
        return self.full

    @property
    def unit(self) -> str:
        return "GPU hours" if self.devices else "hours"

    def foot(self, now: float) -> str:
        """How many of which state, when all is done and what it will have cost."""
        states = [r.state for r in self.runs.values() if not r.handle]
        counts = {name: states.count(name) for name in ("finished", "failed", "pruned", "waiting")}
        parts = [f"{counts['finished']} of {len(self.runs)} finished"]
        parts += [f"{len(self.going)} running"] * bool(self.going)
        parts += [f"{n} {name}" for name, n in counts.items() if n and name != "finished"]
        wholes = self.wholes(now)
        left = [self.expected(r, now, wholes) for r in (*self.going, *(() if self.full else self.queue))]
        text, spent = ", ".join(parts), self.spent()
        known = [seconds for seconds in left if seconds is not None]
        if not left:
            return f"{text}; {spent:.3g} {self.unit}"
        if len(known) < len(left):
            return f"{text}; {spent:.3g} {self.unit} so far, how much is left is not known yet"
        ends = max(sum(known) / min(self.jobs, len(left)), max(known))
        clock = time.strftime("%a %H:%M", time.localtime(time.time() + ends))
        whole = spent + self.cost(sum(known))
        return f"{text}; all done in {span(ends)}, {clock}, for {whole:.3g} {self.unit} in all"


def settle(runs: dict[str, Run], ledger: Ledger, prune: bool) -> None:
    """What earlier starts have left: finished is what has its summary; the rest waits, what was pruned only without
    pruning."""
    ledger.read(runs)
    for run in runs.values():
        run.look()
        if run.done:
            run.state, run.exit, run.why = "finished", 0, None
            run.seconds = run.seconds or run.trained  # of a campaign that was killed before it could say so
        elif run.state != "pruned" or not prune:
            run.state = "waiting"
