"""Where a run logs to beside its folder: Weights & Biases, or trackio, which keeps everything on this machine.

--track trackio          --track wandb          --track wandb:PROJECT          --wandb PROJECT
"""

import contextlib
import importlib
import os
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

from runtime.staging import write_bytes
from schedules import textlines

PROJECT = "scorecast"
TRACKERS = ("trackio", "wandb")
OFFLINE = ("offline", "dryrun", "disabled")  # values of WANDB_MODE that ask for no key


class Tracker:
    """One of TRACKERS. ``flag`` is how it was asked for, as errors say it."""

    def __init__(self, name: str, project: str, flag: str):
        self.name, self.project, self.flag, self._open = name, project, flag, None

    def check(self) -> None:
        """Raises ValueError where the package is missing or W&B has no key: found out before anything is written."""
        if importlib.util.find_spec(self.name) is None:
            raise ValueError(f"{self.flag} needs the package {self.name}: pip install -r requirements-optional.txt")
        if self.name == "wandb" and os.environ.get("WANDB_MODE") not in OFFLINE:
            with self.errors():
                importlib.import_module("wandb").login()  # asks for a key where there is a terminal

    def start(self, folder: Path, config: dict, *, resumed: bool) -> None:
        """Opens the run of ``folder`` there, or goes on with it. Raises ValueError."""
        own = run_id(folder, resumed=resumed)
        with self.errors():
            module = importlib.import_module(self.name)
            if self.name == "wandb":
                how = dict(name=folder.name, id=own, dir=str(folder))
            else:  # which knows a run by its name
                how = dict(name=folder.name if own == folder.name else f"{folder.name}-{own[:8]}")
            self._open = module.init(project=self.project, config=config, resume="allow", **how)

    def log(self, row: dict, step: int) -> None:
        self._tell(lambda run: run.log(row, step=step))

    def summarise(self, summary: dict, step: int) -> None:
        """W&B has a place for it; at trackio its numbers are the last row."""
        if self.name == "wandb":
            self._tell(lambda run: run.summary.update(summary))
        else:
            numbers = {f"summary/{k}": v for k, v in summary.items() if isinstance(v, int | float)}
            self._tell(lambda run: run.log(numbers, step=step))

    def finish(self, code: int) -> None:
        self._tell(lambda run: run.finish(exit_code=code) if self.name == "wandb" else run.finish())

    def _tell(self, what: Callable) -> None:
        """A tracker that fails on the way costs no run: a line, and nothing more goes there."""
        if self._open is None:
            return
        try:
            with self.errors():
                what(self._open)
        except ValueError as e:
            self._open = None
            print(f"{e}. Nothing more is logged there; the run goes on", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def errors(self):
        """Turns what the package raises, its own errors among them, into a ValueError of one line that says what else
        can be done."""
        try:
            yield
        except Exception as e:  # no key, no network, a setting it does not know
            says = " ".join(str(e).split())[:200].rstrip(".")
            way = "wandb login keeps a key, WANDB_MODE=offline needs none"
            way = way if self.name == "wandb" else f"without {self.flag} the folder has all of it"
            raise ValueError(f"{self.flag}: {says}; {way}") from e


def tracker_of(cfg) -> Tracker | None:
    """What the flags ask for. Raises ValueError for a tracker that is unknown, and for two."""
    track, wandb = getattr(cfg, "track", ""), getattr(cfg, "wandb", "")
    if track and wandb:
        raise ValueError(f"--wandb {wandb} is --track wandb:{wandb}; give one of the two")
    if wandb:
        return Tracker("wandb", wandb, f"--wandb {wandb}")
    if not track:
        return None
    name, _, project = track.partition(":")
    if name not in TRACKERS:
        raise ValueError(f"--track {track}: expected {' or '.join(TRACKERS)}, with :PROJECT or without")
    return Tracker(name, project or PROJECT, f"--track {track}")


def run_id(folder: Path, *, resumed: bool) -> str:
    """The id of a run, under which it goes on there when it is resumed: drawn once and kept in the folder, as two
    folders may have one name. A run of before, which kept none, has its folder's name."""
    kept = folder / "wandb" / "id.txt"
    if not resumed:
        kept.parent.mkdir(exist_ok=True)
        write_bytes(kept, lambda file: file.write(uuid.uuid4().hex[:16].encode()))
    return textlines.read_text(kept) if kept.exists() else folder.name
