"""The live table of a campaign: rewritten in place on a terminal, lines elsewhere."""

import shutil
import sys
import time
from collections.abc import Callable

from eval.campaign.progress import Run
from runtime.dry_run import span

REFRESH, SILENCE = 1.0, 8.0  # seconds between two tables, and between two lines where there is no terminal


class Table:
    """``stream``: by default stdout. On a terminal a table stands below what was said; elsewhere a line says each
    change, and after SILENCE without one where the runs stand."""

    def __init__(self, stream=None):
        self.stream = stream or sys.stdout
        self.live = self.stream.isatty()
        self.height, self.shown, self.spoke = 0, 0.0, time.monotonic()

    def say(self, text: str) -> None:
        """A line, or several, that stay."""
        self._write(self._cleared() + text + "\n")
        self.spoke, self.shown = time.monotonic(), 0.0

    def show(self, runs: list[Run], foot: Callable[[], str]) -> None:
        """Where the ``runs`` stand, with a last line ``foot()``, as often as it is worth it."""
        now = time.monotonic()
        if self.live and now - self.shown >= REFRESH:
            self.shown = self.spoke = now
            rows = self._rows(runs, now, foot())
            self._write(self._cleared() + "\n".join(rows) + "\n")
            self.height = len(rows)
        elif not self.live and now - self.spoke >= SILENCE:
            self.spoke = now
            going = "; ".join(" ".join(line(run, now).split()) for run in runs if run.handle)
            self._write(f"{foot()}{' | ' * bool(going)}{going}\n")

    def end(self, runs: list[Run], foot: str) -> None:
        """The last state."""
        self._write(self._cleared() + foot + "\n")

    def _rows(self, runs: list[Run], now: float, foot: str) -> list[str]:
        columns, lines = shutil.get_terminal_size()
        order = {"failed": 1, "waiting": 2, "pruned": 3, "finished": 4}
        rows = sorted(runs, key=lambda r: 0 if r.handle else order[r.state])
        room = max(lines - 4, 1)
        wide = max((len(r.name) for r in rows[:room]), default=4)
        shown = [HEAD.format("run", wide), *(line(run, now, wide) for run in rows[:room])]
        rest = [f"and {len(rows) - room} more"] * (len(rows) > room)
        return [text[: columns - 1] for text in (*shown, *rest, foot)]

    def _cleared(self) -> str:
        """What takes the table away, so that something else can stand there."""
        height, self.height = self.height, 0
        return f"\x1b[{height}F\x1b[J" if height else ""

    def _write(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()


HEAD = "{0:{1}}  state     step          loss    forecast           left"


def line(run: Run, now: float, wide: int = 0) -> str:
    """A run's row: state, step of steps, loss, forecast of the final NLL, time left."""
    state = "runs" if run.handle else run.state
    step = f"{run.step}/{run.steps}" if run.step else ""
    loss = f"{run.loss:.3f}" if isinstance(run.loss, float) and run.step else ""
    going = run.handle and run.forecast.mean is not None
    forecast = f"{run.forecast.mean:.3f} +- {run.forecast.sd:.2f}" if going else ""
    left = run.left(now) if run.handle else None
    rest = "" if left is None else f"{span(left)} left" if left else "its final evaluation"
    rest = rest if run.handle else run.why or ""
    text = f"{run.name:{wide or 1}}  {state:8}  {step:12}  {loss:6}  {forecast:17}  {rest}"
    return text.rstrip()
