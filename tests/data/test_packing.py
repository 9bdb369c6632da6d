"""Packing loses no example, changes no loss and visits every example once an epoch."""

import numpy as np
import pytest
import torch

from data.packing import IGNORE_INDEX, Example, batch_indices, fit, pack, target_counts
from kernels import linear_score
from kernels.losses import brier
from model.decoder_hub import load_decoder


def examples(count: int, longest: int, vocab: int = 50, seed: int = 0) -> list[Example]:
    r = np.random.default_rng(seed)
    made = []
    for i in range(count):
        n = int(r.integers(3, longest + 2))
        made.append(Example(str(i), r.integers(0, vocab, n).tolist(), int(r.integers(1, n - 1))))
    return made


@pytest.mark.parametrize("seed", range(5))
def test_rows_hold_every_example_once_and_nothing_else(seed):
    made = examples(40, 60, seed=seed)
    limit = 64
    bins = fit([e.length for e in made], limit)
    assert sorted(i for group in bins for i in group) == list(range(40))
    total = sum(e.length for e in made)
    # First-fit leaves at most one row half empty.
    assert all(sum(made[i].length for i in group) <= limit for group in bins) and len(bins) <= 2 * total / limit + 1
    rows = pack(made, limit)
    assert rows.tokens == total and rows.padding == pytest.approx(1 - total / rows.tokens_RT.numel())
    assert int(rows.answer_RT.sum()) == sum(e.targets("answer") for e in made)
    found = set()
    for tokens, targets, documents, answer in zip(
        rows.tokens_RT, rows.targets_RT, rows.documents_RT, rows.answer_RT, strict=True
    ):
        for number in documents.unique().tolist():
            here = documents == number
            if number < 0:
                assert (targets[here] == -100).all() and not answer[here].any()
            else:
                found.add((tuple(tokens[here].tolist()), tuple(targets[here].tolist()), int(answer[here].sum())))
    assert found == {(tuple(e.tokens[:-1]), tuple(e.tokens[1:]), e.targets("answer")) for e in made}


@pytest.mark.parametrize("loss_on", ["answer", "all"])
def test_targets_are_counted_as_packed_rows_have_them(loss_on):
    made = examples(30, 40)
    seen = pack(made, 64).seen(loss_on)
    assert target_counts(made, loss_on, 60).tolist() == torch.bincount(seen.targets, minlength=60).tolist()


def test_packing_changes_no_loss(model):
    """Each token's loss in a packed row is the one it has alone, and so is its adapter's gradient. The tolerance is
    fp32's for sums in another order."""
    qwen = load_decoder(model)
    made = examples(9, 40, vocab=300)
    packed = pack(made, 96)
    alone = [pack([e], 96, multiple=1) for e in made]
    assert len(packed) < len(made)

    def losses(rows, documents):
        hidden = qwen(rows.tokens_RT, documents_BT=rows.documents_RT if documents else None).flatten(0, 1)
        loss, _ = linear_score(hidden, qwen.head_weight, rows.targets_RT.flatten(), brier, reduction="none")
        return loss[rows.answer_RT.flatten()]

    with torch.no_grad():
        together, apart = losses(packed, True), torch.cat([losses(rows, False) for rows in alone])
    torch.testing.assert_close(together.sort().values, apart.sort().values, rtol=0, atol=2e-5)


def test_batches_are_permutations_one_epoch_after_the_other():
    seen = [i for step in range(7) for i in batch_indices(10, step, 4, seed=3)]
    assert sorted(seen[:10]) == sorted(seen[10:20]) == list(range(10)) and seen[:10] != seen[10:20]
    assert batch_indices(10, 2, 4, seed=3) == seen[8:12] and batch_indices(10, 2, 4, seed=4) != seen[8:12]
    assert sorted(batch_indices(3, 0, 9, seed=0)) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize(
    "call",
    [
        lambda: pack([], 8),
        lambda: pack([Example("a", [1] * 10, 2)], 8),
        lambda: fit([0], 8),
        lambda: batch_indices(0, 0, 4, 0),
        lambda: batch_indices(4, 0, 0, 0),
    ],
)
def test_packing_refuses(call):
    with pytest.raises(ValueError):
        call()


def test_targets_are_padded_with_places_of_none():
    rows = pack([Example("a", [5, 6, 7, 8], 2), Example("b", [5, 9], 1)], 8)
    seen = rows.seen("answer")
    padded = seen.padded(4)
    assert [len(x) for x in padded] == [4] * 4 and len(seen.at) == 3
    assert all(torch.equal(x[:3], y) for x, y in zip(padded, seen, strict=True))
    assert padded.targets[3] == IGNORE_INDEX and not padded.inside[3] and not padded.answer[3]
    assert all(torch.equal(x, y) for x, y in zip(seen.padded(3), seen, strict=True))
