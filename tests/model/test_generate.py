"""Sampling, and the measures of what was sampled."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from eval.text import distinct_n
from model.generate import filter_logits, sample
from model.gpt2 import GPT2, GPT2Config

CONFIG = GPT2Config(vocab_size=61, block_size=16, n_layer=2, n_head=2, n_embd=16, dropout=0.5)


@pytest.fixture(scope="module")
def model():
    """A random GPT-2 in training mode, with logits wide enough that greedy choices are not ties."""
    torch.manual_seed(0)
    model = GPT2(CONFIG)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.add_(0.5 * torch.randn_like(p))
    return model.train()


class Fixed(nn.Module):
    """Gives the same logits at every position."""

    def __init__(self, logits):
        super().__init__()
        self.config = SimpleNamespace(block_size=8)
        self.head_weight = torch.eye(len(logits))
        self.logits = logits

    def forward(self, tokens_BT):
        return self.logits.expand(*tokens_BT.shape, -1)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_greedy_takes_the_largest_logit_and_sees_one_block_at_most(model):
    for length in (1, 14, 16, 17, 40):
        prompts = torch.randint(61, (32, length), generator=generator(length))
        got = sample(model, prompts, 3, temperature=0)
        assert got.shape == (32, length + 3) and got.dtype == torch.int64 and torch.equal(got[:, :length], prompts)
        model.eval()
        for t in range(length, length + 3):
            logits = model(got[:, max(0, t - 16) : t])[:, -1] @ model.head_weight.T
            assert torch.equal(logits.argmax(-1), got[:, t])
        model.train()
        assert got[:, length].unique().numel() > 2  # the prompts matter


def test_a_temperature_near_zero_is_greedy(model):
    greedy = sample(model, [1, 2, 3], 20, temperature=0)
    assert torch.equal(sample(model, [1, 2, 3], 20, temperature=1e-45, generator=generator()), greedy)


def test_rows_do_not_depend_on_each_other(model):
    prompts = torch.randint(61, (3, 5), generator=generator())
    together = sample(model, prompts, 12, temperature=0)
    assert all(
        torch.equal(sample(model, row.tolist(), 12, temperature=0)[0], together[i]) for i, row in enumerate(prompts)
    )


def test_dropout_is_off_and_the_mode_comes_back(model):
    a, b = (sample(model, [1, 2, 3], 12, generator=generator()) for _ in range(2))
    assert torch.equal(a, b) and model.training
    diverged = Fixed(torch.tensor([0.0, float("nan")])).train()
    with pytest.raises(ValueError):
        sample(diverged, [1], 1)
    assert diverged.training
    model.eval()
    sample(model, [1], 1)
    assert not model.training
    model.train()


def test_a_generator_is_used_and_the_global_one_left_alone(model):
    before = torch.get_rng_state()
    a = sample(model, [1, 2, 3], 20, generator=generator(1))
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(a, sample(model, [1, 2, 3], 20, generator=generator(2)))
    torch.manual_seed(1)
    assert torch.equal(sample(model, [1, 2, 3], 20), a)


@pytest.mark.parametrize("temperature, top_k, top_p", [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.0, 3, 1.0), (2.0, 5, 0.8)])
def test_draws_follow_the_distribution(temperature, top_k, top_p):
    logits, n = torch.tensor([2.0, 1.5, 1.0, 0.0, -1.0, -2.0]), 40_000
    expected = filter_logits(logits[None] / temperature, top_k, top_p)[0].softmax(-1)
    prompts = torch.zeros(n, 1, dtype=torch.long)
    drawn = sample(Fixed(logits), prompts, 1, temperature, top_k, top_p, generator())
    share = torch.bincount(drawn[:, 1], minlength=6) / n
    # Five binomial standard errors; exactly 0 for what was cut.
    assert ((share - expected).abs() <= 5 * (expected * (1 - expected) / n).sqrt()).all()
    if top_k == 3:
        assert (expected > 0).tolist() == [True] * 3 + [False] * 3


def test_filters_agree_with_transformers():
    transformers = pytest.importorskip("transformers")
    logits = 3 * torch.randn(64, 50, generator=generator())
    logits[:8] = logits[:8].round()  # ties
    for k in (1, 2, 10, 49, 50, 80):
        warped = transformers.TopKLogitsWarper(k)(None, logits)
        assert torch.equal(filter_logits(logits, top_k=k), warped)
        for p in (0.05, 0.5, 0.9, 0.999):
            # Among ties at the edge of the nucleus the choice is free: compare what is kept as values.
            ours, theirs = (
                f.sort().values for f in (filter_logits(logits, k, p), transformers.TopPLogitsWarper(p)(None, warped))
            )
            assert torch.equal(ours, theirs)


def test_nucleus_is_the_smallest_set_that_has_the_mass():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    kept = {
        p: filter_logits(logits, top_p=p).isfinite()[0].sum().item() for p in (1e-9, 0.49, 0.51, 0.79, 0.81, 0.96, 1)
    }
    assert kept == {1e-9: 1, 0.49: 1, 0.51: 2, 0.79: 2, 0.81: 3, 0.96: 4, 1: 4}


def test_rows_end_at_eos_and_so_does_the_sampling():
    logits = torch.tensor([0.0, 0.0, 0.0])
    got = sample(Fixed(logits), torch.zeros(40, 1, dtype=torch.long), 200, generator=generator(), eos_id=2)
    assert got.shape[1] < 200  # (2/3)^199 otherwise
    for row in got:
        first = (row == 2).nonzero()[0, 0]
        assert (row[first:] == 2).all() and (row[:first] != 2).all()
    assert (got[:, -2] != 2).any()  # it went on until the last row had ended
    assert sample(Fixed(logits), [2, 0], 5, temperature=0, eos_id=2).tolist() == [[2, 0, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize(
    "arguments, says",
    [
        (dict(prompt_BT=[]), "at least one token"),
        (dict(prompt_BT=torch.zeros(2, 0, dtype=torch.long)), "at least one token"),
        (dict(prompt_BT=torch.zeros(3, dtype=torch.long)), "expected .batch, time."),
        (dict(prompt_BT=[0.5]), "torch.float32"),
        (dict(prompt_BT=[0, 61]), "expected 0 to 60"),
        (dict(prompt_BT=[-1, 3]), "ids -1 to 3"),
        (dict(max_new_tokens=-1), "max_new_tokens=-1"),
        (dict(temperature=-0.1), "temperature=-0.1"),
        (dict(temperature=float("nan")), "temperature=nan"),
        (dict(top_k=-1), "top_k=-1"),
        (dict(top_k=1.5), "top_k=1.5"),
        (dict(top_p=0.0), "top_p=0.0"),
        (dict(top_p=1.1), "top_p=1.1"),
    ],
)
def test_bad_arguments_are_refused(model, arguments, says):
    with pytest.raises(ValueError, match=says) as error:
        sample(model, **(dict(prompt_BT=[1], max_new_tokens=2) | arguments))
    assert "\n" not in str(error.value)


def test_no_new_tokens_gives_the_prompt(model):
    assert sample(model, [4, 2], 0).tolist() == [[4, 2]]


def test_a_diverged_model_says_so():
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not finite"):
            sample(Fixed(torch.tensor([0.0, bad])), [0], 1)


# ---------------------------------------------------------------- distinct-n


def test_distinct_n_counts_over_all_texts():
    texts = ["a b a b", "b a", "", "A"]
    assert distinct_n(texts, 1) == 3 / 7  # a, b, A of seven words
    assert distinct_n(texts, 2) == 2 / 4  # (a b), (b a) of ab ba ab, ba; none across texts
    assert distinct_n(texts, 3) == 1.0
    assert distinct_n(iter(texts), 1) == 3 / 7
    assert distinct_n([" one\ttwo\n three "], 2) == 1.0


def test_distinct_n_of_nothing_is_nothing():
    assert distinct_n([], 1) is None and distinct_n(["a b"], 3) is None


def test_distinct_n_refuses_what_it_would_misread():
    with pytest.raises(ValueError, match="one string"):
        distinct_n("a b", 1)
    with pytest.raises(ValueError, match="n=0"):
        distinct_n(["a"], 0)
