"""Where the runs of a campaign stand: what their folders say, and what campaign.json keeps of their cost."""

import dataclasses
import math
from pathlib import Path

import numpy as np

from runtime.folder import whole_rows, write_json
from schedules.forecast import Forecast, Forecaster
from schedules.learn import feed
from schedules.logs import Curve, began_trained
from schedules.rules import SCHEDULES, lr_factor
from schedules.textlines import read_bytes, read_json

STATES = ("waiting", "finished", "failed", "pruned")  # one that runs is waiting in campaign.json
NONE = Forecast(None, None, np.zeros((0, 3)), {}, "nothing is logged yet", False)


@dataclasses.dataclass
class Run:
    """A cell on its way. ``seconds`` and ``gpu_seconds``: of all its attempts together."""

    name: str
    folder: Path
    config: dict
    state: str = "waiting"
    seconds: float = 0.0
    gpu_seconds: float = 0.0
    exit: int | None = None
    why: str | None = None
    handle: object = None  # of the engine, while it runs
    began: float = 0.0  # of this attempt, monotonic
    first: int = 0  # the step at which this attempt began
    gpus: tuple[str, ...] | list[str] = ()  # that it has to itself, or shares
    trained: float = 0.0  # seconds, as its last row says
    step: int = 0
    loss: float | None = None
    curve: Curve | None = None  # of the NLL
    forecast: Forecast = NONE
    _read: tuple = ()

    @property
    def done(self) -> bool:
        return (self.folder / "summary.json").exists()

    @property
    def steps(self) -> int:
        return int(self.config.get("steps") or 0)

    @property
    def share(self) -> float:
        """Of its steps, 0 to 1."""
        return min(self.step / self.steps, 1.0) if self.steps else 0.0

    def look(self) -> bool:
        """Reads what has been logged since the last look; whether there was something."""
        path = self.folder / "metrics.jsonl"
        try:
            stat = path.stat()
        except OSError:
            return False
        if (stat.st_size, stat.st_mtime_ns) == self._read:
            return False
        self._read = stat.st_size, stat.st_mtime_ns
        rows = whole_rows(path)[0]
        train = [row for row in rows if row["kind"] == "train"]
        if train:
            self.step, self.loss = train[-1]["step"], train[-1].get("loss")
            self.trained = train[-1].get("train_seconds") or 0.0
            self.curve = curve_of(self.name, train)
            self.forecast = forecast_of(self.curve, [row for row in rows if row["kind"] == "fot"], self.config)
        return bool(train)

    def left(self, now: float) -> float | None:
        """Seconds to its end at the pace of this attempt; None before there is one."""
        made = self.step - self.first
        return (now - self.began) * (self.steps - self.step) / made if made > 0 else None

    def tail(self, count: int = 4) -> list[str]:
        """The last lines of its log; a bar's last state is a line."""
        path = Path(f"{self.folder}.log")
        if not path.exists():
            return []
        text = read_bytes(path)[-8000:].decode(errors="replace")
        lines = [part.split("\r")[-1].rstrip() for part in text.rstrip().split("\n")]
        return [line for line in lines if line][-count:]


def curve_of(name: str, rows: list[dict]) -> Curve:
    """The NLL and the learning rates of rows of kind train."""
    rows = [r for r in rows if isinstance(r.get("nll", r.get("loss")), float) and isinstance(r.get("lr"), float)]
    kept = []
    for row in rows:
        if not kept or row["step"] > kept[-1]["step"]:
            kept.append(row)
    columns = [[float(r["step"]), r.get("nll", r.get("loss")), r["lr"]] for r in kept]
    step, loss, lr = np.array(columns, dtype=np.float64).reshape(-1, 3).T
    return Curve(name, "", step, loss, lr)


def forecast_of(curve: Curve, decisions: list[dict], config: dict) -> Forecast:
    """The forecast of the NLL at the run's last step: the last one that a rule which measures has logged in
    ``decisions``, else one from the ``curve``, given the learning rates to come where the schedule says them."""
    for row in decisions[-1:]:
        if isinstance(row.get("forecast"), float) and isinstance(row.get("sd"), float):
            mean, sd = row["forecast"], row["sd"]
            return NONE._replace(mean=mean, sd=sd, reason="", planned=True)
    steps, name, plan = config.get("steps") or 0, config.get("schedule"), None
    if name in SCHEDULES and len(curve.step):
        how = dict(warmup=config.get("lr_warmup", 0.0), floor=config.get("lr_floor", 0.0))
        how |= dict(power=config.get("lr_power", 1.0), shape=config.get("decay_shape", "linear"))

        def factor(step: float) -> float:
            return lr_factor(name, step - 1, steps, **how)

        at = factor(curve.step[-1])
        peak = curve.lr[-1] / at if at > 0 else curve.lr.max()
        plan = lambda step: peak * factor(step)  # noqa: E731 - one line of a plan
    forecaster = feed(Forecaster(finetune=began_trained(config)), curve, len(curve.step))
    return forecaster.forecast(steps, plan) if forecaster.step is not None else NONE


class Ledger:
    """campaign.json: what each run came to and what it has cost, kept over all starts of the campaign.

    {"runs": {NAME: {"state", "seconds", "exit", "why"}}, "gpu_hours", "hours", "budget_hours"}; hours are those of all
    runs together, gpu_hours null where there is no GPU."""

    def __init__(self, root: Path, gpus: bool, budget: float | None):
        self.path, self.gpus, self.budget, self.others = root / "campaign.json", gpus, budget, {}

    def read(self, runs: dict[str, Run]) -> None:
        """Gives the runs what an earlier start has kept. Raises ValueError for a file that is not ours."""
        if not self.path.exists():
            return
        held, advice = read_json(self.path, dict), "mend it, or take it away: then its cost counts from zero"
        kept = held.get("runs")
        if not isinstance(kept, dict) or not all(map(_sound, kept.values())):
            raise ValueError(f"{self.path}: no record of a campaign; {advice}")
        for name, entry in kept.items():
            if name in runs:
                run = runs[name]
                run.seconds, run.state, run.exit, run.why = (entry[k] for k in ("seconds", "state", "exit", "why"))
                run.gpu_seconds = entry.get("gpu_seconds", 0.0)
            else:
                self.others[name] = entry  # of a recipe that has changed; its cost stays

    def write(self, runs: dict[str, Run]) -> None:
        entries = {
            r.name: {"state": r.state, "seconds": round(r.seconds, 3), "exit": r.exit, "why": r.why}
            | ({"gpu_seconds": round(r.gpu_seconds, 3)} if self.gpus else {})
            for r in runs.values()
        }
        seconds, on_gpus = self.spent(runs)
        about = {"gpu_hours": on_gpus / 3600 if self.gpus else None, "hours": seconds / 3600}
        write_json(self.path, {"runs": self.others | entries} | about | {"budget_hours": self.budget})

    def spent(self, runs: dict[str, Run]) -> tuple[float, float]:
        """Seconds, and seconds of GPUs, of all runs so far."""
        others = self.others.values()
        return (
            sum(r.seconds for r in runs.values()) + sum(e["seconds"] for e in others),
            sum(r.gpu_seconds for r in runs.values()) + sum(e.get("gpu_seconds", 0.0) for e in others),
        )


def _sound(entry) -> bool:
    """Whether ``entry`` is one of a run in campaign.json."""
    if not isinstance(entry, dict) or entry.get("state") not in STATES:
        return False
    numbers = entry.get("seconds"), entry.get("gpu_seconds", 0.0)
    if not all(isinstance(n, int | float) and not isinstance(n, bool) and math.isfinite(n) and n >= 0 for n in numbers):
        return False
    return isinstance(entry.get("exit", ""), int | None) and isinstance(entry.get("why", 0), str | None)
