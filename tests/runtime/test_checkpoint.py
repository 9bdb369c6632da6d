"""Checkpoints: a changed byte is found before anything is read, an older good file is named, files of before load."""

import random
import resource
import signal

import pytest
import torch

from model.weights import save_tensors
from runtime.checkpoint import load_checkpoint, save_checkpoint
from runtime.staging import staged

STATE = {"model": {"w": torch.arange(40.0)}, "names": ["a", "b"], "step": 3}


def test_what_is_saved_is_read_by_us_and_by_torch(tmp_path):
    save_checkpoint(tmp_path / "last.pt", STATE)
    for read in (load_checkpoint(tmp_path / "last.pt"), torch.load(tmp_path / "last.pt")):
        assert torch.equal(read["model"]["w"], STATE["model"]["w"]) and read["names"] == ["a", "b"]
    torch.save(STATE, tmp_path / "old.pt")  # as runs of before have it
    assert load_checkpoint(tmp_path / "old.pt")["step"] == 3


def test_a_flipped_bit_is_an_error_or_changes_nothing(tmp_path):
    """Every byte once, of a file with a checksum; what is read nevertheless is what was written."""
    path, r = tmp_path / "x.pt", random.Random(0)
    save_checkpoint(path, STATE)
    good, found = path.read_bytes(), 0
    for i in range(0, len(good), 3):
        flipped = bytearray(good)
        flipped[i] ^= 1 << r.randrange(8)
        path.write_bytes(flipped)
        try:
            read = load_checkpoint(path)
            assert torch.equal(read["model"]["w"], STATE["model"]["w"]) and read["names"] == STATE["names"]
        except ValueError as e:
            found += "x.pt is truncated or corrupt" in str(e)
    assert found >= len(range(0, len(good), 3)) - 1  # the comment's length, in two bytes, is read by nobody


def test_flipped_bits_of_a_file_of_before_are_one_line(tmp_path):
    path, r = tmp_path / "x.pt", random.Random(1)
    torch.save(STATE, path)
    good = path.read_bytes()
    for i in range(0, len(good), 5):
        flipped = bytearray(good)
        flipped[i] ^= 1 << r.randrange(8)
        path.write_bytes(flipped)
        try:
            load_checkpoint(path)
        except ValueError as e:
            assert "\n" not in str(e)


def test_a_good_file_is_read_whatever_lies_beside_it_and_a_bad_one_names_the_older_one(tmp_path):
    last, previous = tmp_path / "last.pt", tmp_path / "previous.pt"
    save_checkpoint(last, STATE)
    save_checkpoint(previous, STATE | {"step": 2})
    good, older = last.read_bytes(), previous.read_bytes()
    previous.write_bytes(older[:4] + b"\xff\xff\xff" + older[7:])
    assert load_checkpoint(last)["step"] == 3
    for cut in (1, 9, 81, 82, 90, 110, 500, len(good)):
        last.write_bytes(good[:-cut])
        with pytest.raises(ValueError, match="last.pt is truncated or corrupt$"):
            load_checkpoint(last)
    previous.write_bytes(older)
    with pytest.raises(ValueError, match="last.pt is truncated or corrupt; an older good one is .*previous.pt"):
        load_checkpoint(last)
    last.unlink()
    with pytest.raises(ValueError, match="no checkpoint .*last.pt; an older good one is .*previous.pt"):
        load_checkpoint(last)
    torch.save([1, 2], last)
    with pytest.raises(ValueError, match="no checkpoint of ours: it holds no dict"):
        load_checkpoint(last)


def test_a_full_disk_is_an_error_of_the_disk_and_leaves_the_old_file(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(path, STATE)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, old[1]))
    try:
        with pytest.raises(OSError, match=r"cannot be written \(File too large\); raise the limit.*last.pt"):
            save_checkpoint(path, STATE | {"big": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert load_checkpoint(path)["step"] == 3 and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_in_a_folder_of_tensors_is_the_same_error(tmp_path):
    """safetensors has an error of its own for it."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, old[1]))
    try:
        with (
            pytest.raises(OSError, match=r"cannot be written \(File too large\); raise the limit.*/adapter'"),
            staged(tmp_path / "adapter", last="config") as temporary,
        ):
            save_tensors([("a", torch.zeros(100_000))], temporary / "x.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert not list(tmp_path.iterdir())
