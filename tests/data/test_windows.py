"""Windows over tokens, their order in each epoch, and label noise."""

import types

import numpy as np
import pytest
import torch
from text_files import message

from data.windows import IGNORE_INDEX, Windows, flip_labels


def token_set(n: int, eos: int = 0):
    """Tokens 1..n-1 and the end-of-text token last, so that every target is recognisable."""
    tokens = np.concatenate([np.arange(1, n), [eos]]).astype(np.uint16)
    return types.SimpleNamespace(tokens=tokens, eos_id=eos, name="toy", text_bytes=3 * n)


@pytest.mark.parametrize(
    "n, length", [(100, 10), (101, 10), (99, 10), (10, 10), (11, 10), (19, 10), (20, 10), (7, 1), (1, 1)]
)
def test_windows_cover_each_token_once_as_a_target(n, length):
    data = token_set(n)
    windows = Windows(data, length)
    assert len(windows) == -(-n // length) and windows.bytes == data.text_bytes
    x, y = windows.get(range(len(windows)))
    assert x.dtype == y.dtype == torch.int64 and x.shape == y.shape == (len(windows), length)
    assert x.is_contiguous() and y.is_contiguous()
    flat = y.flatten()
    assert flat[flat != IGNORE_INDEX].tolist() == data.tokens.tolist()
    assert x.flatten()[:n].tolist() == [data.eos_id, *data.tokens[:-1].tolist()]  # a target's input precedes it
    assert (flat[n:] == IGNORE_INDEX).all() and (x.flatten()[n:] == data.eos_id).all()
    # Any order, with repeats, gives the same rows.
    some = np.array([len(windows) - 1, 0, len(windows) // 2, 0])
    x2, y2 = windows.get(some)
    assert torch.equal(x2, x[some]) and torch.equal(y2, y[some])


def test_window_errors():
    message(lambda: Windows(token_set(9), 10), "10", "toy", "has 9")
    message(lambda: Windows(token_set(9), 0), "0")
    windows = Windows(token_set(40), 10)
    message(lambda: windows.get([0, 4]), "outside 0..3")
    message(lambda: windows.get([-1]), "outside 0..3")
    message(lambda: windows.batch_indices(-1, 2, 0), "step", "-1")
    message(lambda: windows.batch_indices(0, 0, 0), "batch", "0")
    message(lambda: windows.order(0, 1.5), "epoch", "1.5")


def test_order_is_a_pure_function_of_seed_and_epoch():
    windows = Windows(token_set(1000), 10)
    orders = {(seed, epoch): windows.order(seed, epoch).tolist() for seed in (0, 1) for epoch in range(3)}
    assert all(sorted(order) == list(range(100)) for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) == 6
    again = Windows(token_set(1000), 10)
    for (seed, epoch), order in reversed(orders.items()):
        assert again.order(seed, epoch).tolist() == order
    # Fixed for good: a run resumed under another numpy must see the same batches.
    assert orders[0, 0][:8] == FIRST


FIRST = [66, 0, 54, 43, 69, 38, 21, 91]


@pytest.mark.parametrize("batch", [1, 7, 10, 25])
def test_batches_cross_epochs_and_need_no_history(batch):
    windows = Windows(token_set(100), 10)  # 10 windows, so that batches straddle epochs, or hold several
    steps = 40
    stream = np.concatenate([windows.batch_indices(step, batch, 5) for step in range(steps)])
    want = np.concatenate([windows.order(5, epoch) for epoch in range(steps * batch // 10 + 1)])[: len(stream)]
    assert stream.tolist() == want.tolist()
    for step in (39, 3, 17):  # out of order, from a fresh object: what a resumed run does
        fresh = Windows(token_set(100), 10).batch_indices(step, batch, 5)
        assert fresh.tolist() == stream[step * batch : (step + 1) * batch].tolist() and len(fresh) == batch


# ---- label noise


def test_flips_have_the_stated_rates_and_are_uniform():
    torch.manual_seed(0)
    vocab, share = 11, 0.3
    y = torch.randint(vocab, (500, 200))
    y[:, 150:] = IGNORE_INDEX
    noisy, flipped = flip_labels(y, vocab, share, 1.0, seed=3, step=7)
    changed = noisy != y
    assert flipped == int(changed.sum()) and not changed[:, 150:].any()
    n = 500 * 150
    assert abs(flipped - share * n) < 5 * (n * share * (1 - share)) ** 0.5  # five standard deviations
    moves = ((noisy - y) % vocab)[changed]
    counts = torch.bincount(moves, minlength=vocab)
    assert counts[0] == 0
    expected = flipped / (vocab - 1)
    assert float(((counts[1:] - expected) ** 2 / expected).sum()) < 27.9  # chi-square, 9 degrees, p = 0.001
    assert noisy[changed].min() == 0 and noisy.max() == vocab - 1


def test_flips_happen_in_a_share_of_the_steps():
    y = torch.zeros(4, 50, dtype=torch.int64)
    flips = [flip_labels(y, 100, 0.5, 0.25, seed=1, step=step)[1] for step in range(2000)]
    hit = sum(count > 0 for count in flips)  # 200 targets at 0.5: a noisy step without a flip has p = 2^-200
    assert abs(hit - 500) < 5 * (2000 * 0.25 * 0.75) ** 0.5
    assert flip_labels(y, 100, 0.0, 1.0, 1, 1)[1] == flip_labels(y, 100, 1.0, 0.0, 1, 1)[1] == 0
    assert flip_labels(y, 100, 1.0, 1.0, 1, 1)[1] == 200
    assert flip_labels(y, 2, 1.0, 1.0, 1, 1)[0].eq(1).all()


def test_flips_are_pure_and_do_not_depend_on_the_division_of_the_batch():
    y = torch.arange(16 * 33).reshape(16, 33) % 50
    kept = y.clone()
    whole, count = flip_labels(y, 50, 0.4, 1.0, 9, 123)
    assert torch.equal(y, kept)  # the caller's targets are not written to
    assert torch.equal(whole, flip_labels(y, 50, 0.4, 1.0, 9, 123)[0])
    for rows in (1, 4, 5):
        parts = [flip_labels(y[r : r + rows], 50, 0.4, 1.0, 9, 123, first_row=r) for r in range(0, 16, rows)]
        assert torch.equal(torch.cat([part for part, _ in parts]), whole) and sum(n for _, n in parts) == count
    for seed, step in ((10, 123), (9, 124)):
        assert not torch.equal(whole, flip_labels(y, 50, 0.4, 1.0, seed, step)[0])


def test_flip_errors():
    y = torch.zeros(2, 3, dtype=torch.int64)
    message(lambda: flip_labels(y, 10, 1.5, 0.1, 0, 0), "share", "1.5")
    message(lambda: flip_labels(y, 10, float("nan"), 0.1, 0, 0), "share", "nan")
    message(lambda: flip_labels(y, 10, 0.1, -0.1, 0, 0), "step_share", "-0.1")
    message(lambda: flip_labels(y, 1, 0.1, 0.1, 0, 0), "vocab_size", "1")
    message(lambda: flip_labels(y, 10, 0.1, 0.1, -1, 0), "seed", "-1")
    message(lambda: flip_labels(y, 10, 0.1, 0.1, 0, 0, first_row=-2), "first_row", "-2")
    message(lambda: flip_labels(y.float(), 10, 0.1, 0.1, 0, 0), "int64", "float32")
