"""The flags that a run's folder reads, and a folder in which a run has begun."""

from dataclasses import dataclass

import torch

from runtime.cli import opt
from runtime.flags import flag
from runtime.folder import RunFolder
from runtime.machine import World


@dataclass(frozen=True)
class Config:
    out: str = flag("out")
    resume: bool = flag("resume")
    resume_from: str = flag("resume_from")
    wandb: str = flag("wandb")
    track: str = flag("track")
    lr: float = flag("lr")
    micro_batch: int = flag("micro_batch")
    newer: str = opt("old way", "a flag that runs of before did not have")


def folder_at(path) -> RunFolder:
    return RunFolder(path, World(0, 1, torch.device("cpu")))


def start(path, cfg=None) -> RunFolder:
    cfg = cfg or Config(out=str(path))
    run = folder_at(path)
    assert run.enter(cfg) is None
    run.start(cfg, "script.py", None)
    return run
