"""A script of its own for campaigns: it logs, saves where it is stopped, goes on, and fails if asked to."""

import itertools
import sys
import textwrap

from eval.campaign import load_script

NUMBER = itertools.count()  # a name for each test: what imported a script keeps it
SCRIPT = """
    import dataclasses, json, math, os, signal, sys, time
    from pathlib import Path

    from runtime.cli import opt, parse_config
    from runtime.staging import take_lock

    @dataclasses.dataclass(frozen=True)
    class Config:
        out: str = opt("", "folder", role="where")
        resume: bool = opt(False, "go on", role="where")
        seed: int = opt(1, "seed", role="bookkeeping")
        steps: int = opt(10, "steps", within="[1, inf)", role="setting")
        pace: float = opt(0.0, "seconds of a step", role="system")
        fails: bool = opt(False, "fail", role="bookkeeping")
        level: float = opt(2.0, "where the loss ends")
        preset: str = opt("none", "preset", ("none", "fot"))
        loss: str = opt("ce", "loss", ("ce", "brier", "focal", "dpsm"))
        schedule: str = opt("", "schedule", ("", "cosine", "fot"))
        lr: float = opt(1e-3, "learning rate")
        gamma: float = opt(2.0, "exponent", only={"loss": ("focal",)})
        warmup: float = opt(0.1, "ramp", within="[0, 1]", only={"loss": ("dpsm",)})
        fot_window: int = opt(32, "steps", only={"schedule": ("fot",)})
        fast: bool = opt(False, "fast")
        data: str = opt("words", "text", role="setting")

    def complete(values):
        return values | {"schedule": values["schedule"] or {"none": "cosine"}.get(values["preset"], "fot")}

    def main(argv=None):
        cfg = parse_config(Config, argv, complete=complete)
        folder, stopped = Path(cfg.out), []
        folder.mkdir(parents=True, exist_ok=True)
        take_lock(folder)
        signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
        with open(folder / "began", "a") as file:
            file.write(f"{os.getpid()}\\n")
        (folder / "config.json").write_text(json.dumps(dataclasses.asdict(cfg)))
        first = int((folder / "last.pt").read_text()) if cfg.resume else 0
        with open(folder / "from", "a") as file:
            file.write(f"{first}\\n")
        metrics = folder / "metrics.jsonl"
        rows, nll = map(json.loads, metrics.read_text().splitlines()) if first else (), 0.0
        rows = [row for row in rows if row["step"] <= first]
        metrics.write_text("".join(json.dumps(row) + "\\n" for row in rows))
        print("begins", flush=True)
        for step in range(first + 1, cfg.steps + 1):
            time.sleep(cfg.pace)
            nll = cfg.level + 3.0 * step**-0.5
            row = {"kind": "train", "step": step, "loss": nll, "nll": nll, "lr": cfg.lr, "train_seconds": 1.0 * step}
            with open(metrics, "a") as file:
                file.write(json.dumps(row) + "\\n")
            if stopped or step % 5 == 0:
                (folder / "tmp").write_text(str(step))
                (folder / "tmp").replace(folder / "last.pt")
            if stopped:
                return 143
        if cfg.fails and not (folder.parent / "mended").exists():
            print("it is broken here", file=sys.stderr)
            return 3
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        (folder / "tmp").write_text(json.dumps({"seed": cfg.seed, "nll": nll, "seen": seen}))
        (folder / "tmp").replace(folder / "summary.json")
        return 0

    if __name__ == "__main__":
        sys.exit(main())
"""


def write_toy(folder):
    """The module of the script toyN.py, in ``folder``, which has to be the working directory and on sys.path."""
    name = f"toy{next(NUMBER)}.py"
    (folder / name).write_text(textwrap.dedent(SCRIPT))
    return load_script(name)


def drop(module) -> None:
    sys.modules.pop(module.__name__, None)
