"""The bar of a run in a pseudo-terminal: one line that fits, what matters first, in words."""

import fcntl
import os
import pty
import re
import struct
import sys
import termios
import threading
from types import SimpleNamespace

import pytest
import torch

from eval import metrics
from kernels import Calibration, softmax_moments
from runtime.folder import RunFolder
from runtime.machine import World
from runtime.meter import Meter

FORECAST = "forecast 3.05 +- 0.04 at step 20000"


def shown(monkeypatch, columns: int, says: str) -> list[str]:
    """What the bar's line has held in a terminal of ``columns``, in a run that is long under way."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    text = bytearray()

    def read() -> None:
        try:
            while part := os.read(ours, 4096):
                text.extend(part)
        except OSError:  # Linux: the other end is closed
            return

    reader = threading.Thread(target=read)
    reader.start()
    world = World(0, 1, torch.device("cpu"))
    cfg = SimpleNamespace(steps=20000, log_every=1, eval_every=100, patience=0)
    with open(theirs, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        run = RunFolder("runs/wikitext103-gpt2-dpsm-s1-with-a-very-long-name", world)
        meter = Meter(run, Calibration(), metrics, cfg)
        meter.step = 11995
        meter.start()
        for _ in range(3):
            meter.add(torch.tensor(3.412), softmax_moments(torch.zeros(5, 70), torch.arange(5)))
            meter.end_step(torch.tensor(0.5), 1.0, tokens=10)
            assert meter.due()
            meter.row(says, alpha=0.5, lr=6e-4)
        meter.end()
    reader.join()
    os.close(ours)
    lines = re.split(r"[\r\n]+", text.decode().replace("\x1b[A", ""))
    return [line.rstrip() for line in lines if line.strip()]


@pytest.mark.parametrize("says", ["", FORECAST])
def test_the_bar_fits_80_columns_with_what_matters_first(says, monkeypatch):
    lines = shown(monkeypatch, 80, says)
    assert lines and max(map(len, lines)) < 80, lines  # some terminals wrap where the last column is filled
    assert lines[-1].startswith("step 11998/20000, loss 3.412, " + ("forecast 3.05 +- 0.04, " if says else "")), lines[
        -1
    ]
    assert re.search(r"(\d\d:\d\d|\d+:\d\d:\d\d|\?) left", lines[-1])
    if not says:
        assert "PPL 70.0, ECE " in lines[-1] and "alpha 0.50" in lines[-1]


def test_a_wide_terminal_shows_all_and_a_narrow_one_the_loss(monkeypatch):
    wide = shown(monkeypatch, 200, FORECAST)[-1]
    for word in (
        ", forecast 3.05 +- 0.04, ",
        " left",
        "PPL 70.0",
        "ECE ",
        "alpha 0.50",
        "lr 6.0e-04",
        "tokens/s",
        "wikitext103-gpt2",
    ):
        assert word in wide, word
    narrow = shown(monkeypatch, 50, FORECAST)
    assert max(map(len, narrow)) < 50 and narrow[-1].startswith("step 11998/20000, loss 3.412, ")
