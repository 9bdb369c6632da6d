"""The interval of the ECE that an evaluation gives: its blocks are the forwards of all ranks."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch

from eval.heldout import ece_ci95, evaluate, final_metrics
from eval.stats import ece_interval
from kernels import Calibration
from runtime.machine import World

WORLD = World(0, 1, torch.device("cpu"))


class Head(torch.nn.Module):
    """Hidden states are the logits."""

    def __init__(self, size: int = 8):
        super().__init__()
        self.head_weight = torch.nn.Parameter(torch.eye(size))


def batches(count: int, sharp: float = 1.0, empty: bool = False):
    """Logits and targets drawn from a softmax ``sharp`` times as flat, in forwards of several lengths."""
    random = torch.Generator().manual_seed(0)
    out = []
    for i in range(count):
        logits = 3 * torch.randn(20 + i % 3, 8, generator=random)
        y = torch.multinomial((logits / sharp).softmax(1), 1, generator=random)[:, 0]
        y[::5] = -100
        out.append((logits, y))
    return out + [(torch.zeros(4, 8), torch.full((4,), -100))] * empty


def test_the_interval_is_over_forwards():
    """By hand from each forward's tokens; one without a target is no block."""
    made, gaps, counts, marks = batches(30, sharp=2.0), [], [], {}
    for logits, y in made:
        sure, top = logits[y != -100].softmax(1).max(1)
        at = (sure * 10).ceil().long().sub(1).clamp(0, 9)
        gap = sure.double() - (top == y[y != -100]).double()
        gaps.append(torch.zeros(10, dtype=torch.float64).index_add_(0, at, gap).tolist())
        counts.append(len(gap))
    found = evaluate(Head(), iter(made + batches(0, empty=True)), WORLD, marks=marks)
    low, high = ece_ci95(marks["raw"], WORLD)
    assert (low, high) == pytest.approx(ece_interval(gaps, counts), abs=1e-7)  # fp32 confidences
    assert low < found.raw.ece(10) < high
    assert ece_ci95(marks["raw"][:9], WORLD) == ece_ci95([], WORLD) == [None, None]


def test_the_interval_is_of_all_ranks_forwards():
    """Two ranks whose sums are added by hand have that of one rank with all forwards, as the order does not count."""
    made, whole = batches(31), {}
    evaluate(Head(), iter(made), WORLD, marks=whole)
    shares = []
    for rank in range(2):
        marks = {}
        evaluate(Head(), iter(made[rank::2]), WORLD, marks=marks)
        shares.append(marks["raw"])
    seen, blocks = [], []

    def rank(number: int):
        def all_reduce(x, *op):
            seen.append(copy.deepcopy(x))
            if x.ndim:  # the blocks of the other rank, which came before
                x += seen[-3] if number else 0
                blocks.append(int((x[..., 10] > 0).sum()))
                return x
            return torch.tensor(max(map(len, shares)))

        return SimpleNamespace(rank=number, size=2, device=WORLD.device, all_reduce=all_reduce)

    ece_ci95(shares[0], rank(0))
    both = ece_ci95(shares[1], rank(1))
    assert both == pytest.approx(ece_ci95(whole["raw"], WORLD), abs=0.02)  # blocks in another order: other draws
    assert blocks == [16, 31]


def test_a_summary_holds_the_interval_before_and_after_temperature():
    pieces = SimpleNamespace(get=lambda name, make: make())
    sets = {"val": lambda: iter(batches(30, sharp=2.0)), "test": None, "ood": lambda: iter(batches(3))}
    entries, _ = final_metrics(Head(), sets, WORLD, pieces=pieces)
    before, after = (entries[f"val_ece10{end}_ci95"] for end in ("", "_t"))
    assert before[0] < entries["val_ece10"] < before[1] and after[0] <= entries["val_ece10_t"] < after[1]
    assert after[1] < before[0] and not any(map(math.isnan, before + after))
    assert entries["test_ece10_ci95"] is None and entries["ood_ece10_ci95"] == [None, None]


def test_a_rank_without_a_forward_of_a_small_set_takes_part(monkeypatch):
    """As the second of two, whose set is one row: what it has is what the other gives."""
    other = evaluate(Head(), iter(batches(1)), WORLD).raw.state_dict()
    monkeypatch.setattr(Calibration, "all_reduce", lambda self: self.load_state_dict(other))
    pieces, sets = SimpleNamespace(get=lambda name, make: make()), {"val": lambda: iter(batches(3)), "test": tuple}
    entries, _ = final_metrics(Head(), sets, WORLD, pieces=pieces)
    assert entries["test_tokens"] == 16 and entries["test_ece10_ci95"] == [None, None]
