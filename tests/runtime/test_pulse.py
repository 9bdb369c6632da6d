"""A rank that gives no sign of life is named and ends the others; one that goes on is left alone."""

import time

import pytest
import torch.distributed as dist

from runtime import pulse


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name, seconds in (("BEAT", 0.01), ("SAYS", 0.2), ("ENDS", 0.6)):
        monkeypatch.setattr(pulse, name, seconds)


def test_a_silent_rank_is_named_and_then_the_run_ends(capsys):
    store, ended = dist.HashStore(), []
    first, second = (pulse.Pulse(rank, 2, store, end=lambda rank=rank: ended.append(rank)) for rank in range(2))
    first.start()
    second.start()
    time.sleep(0.9)
    assert not ended and not capsys.readouterr().err
    second.stop()  # as SIGSTOP does to all of its threads
    first.join(5)
    said = capsys.readouterr().err
    assert ended == [0] and said.count("rank 1 has given no sign of life for") == 2 and "--resume goes on" in said


def test_time_in_which_this_rank_was_stopped_is_no_silence_of_the_other(capsys, monkeypatch):
    """Ctrl-Z of all ranks, or a machine that was suspended: an hour goes by between two looks of the same thread."""
    store, ended, jump = dist.HashStore(), [], [0.0]
    clock = time.monotonic
    monkeypatch.setattr(pulse.time, "monotonic", lambda: clock() + jump[0])
    first, second = (pulse.Pulse(rank, 2, store, end=lambda rank=rank: ended.append(rank)) for rank in range(2))
    first.start()
    second.start()
    for _ in range(3):
        time.sleep(0.1)
        jump[0] += 3600
    time.sleep(0.1)
    first.stop()
    second.stop()
    assert not ended and not capsys.readouterr().err


def test_it_ends_with_its_store_and_when_it_is_told(capsys):
    class Gone:
        def set(self, *_):
            raise RuntimeError("Connection reset by peer")

    watch = pulse.Pulse(0, 2, Gone())
    watch.start()
    watch.join(5)
    assert not watch.is_alive()
    watch = pulse.Pulse(1, 2, dist.HashStore())
    watch.start()
    watch.stop()
    assert not watch.is_alive() and not capsys.readouterr().err
