"""Continuous batching decodes every request as it would be decoded alone."""

import random

import numpy as np
import pytest
import torch

from model.decode import Request, decode
from model.decoder_hub import load_decoder


@pytest.fixture(scope="module")
def qwen(model):
    return load_decoder(model).eval()


def requests(count: int, **more) -> list[Request]:
    r = random.Random(1)
    lengths = [1, 2, 40, *(r.randint(1, 30) for _ in range(count))][:count]
    return [Request([r.randrange(300) for _ in range(n)], r.randint(1, 24), **more) for n in lengths]


def run(qwen, wanted, rows, **more) -> dict[int, tuple]:
    made = [one for ended in decode(qwen, wanted, rows, **more) for one in ended]
    assert sorted(one.index for one in made) == list(range(len(wanted)))
    return {one.index: (one.tokens, one.reason) for one in made}


def by_argmax(qwen, request, eos=()) -> tuple[list[int], str]:
    """The definition: the whole sequence again for each token."""
    tokens = list(request.prompt)
    for _ in range(request.max_new_tokens):
        with torch.no_grad():
            best = int((qwen(torch.tensor([tokens]))[0, -1] @ qwen.head_weight.t()).argmax())
        if best in eos:
            return tokens[len(request.prompt) :], "eos"
        tokens.append(best)
    return tokens[len(request.prompt) :], "length"


def test_continuous_batching_is_greedy_decoding_one_by_one(qwen):
    wanted = requests(11)
    eos = set(by_argmax(qwen, max(wanted, key=lambda r: r.max_new_tokens))[0][3:4])  # one that does occur
    expected = {i: by_argmax(qwen, r, eos) for i, r in enumerate(wanted)}
    assert {reason for _, reason in expected.values()} == {"eos", "length"}
    for rows, refill in ((1, 1), (3, 1), (4, 3), (50, 1)):
        assert run(qwen, wanted, rows, eos_ids=eos, refill=refill) == expected
    made = [one for ended in decode(qwen, wanted, 3, eos_ids=eos) for one in ended]
    assert {(one.reason, one.end) for one in made} == {("length", None), ("eos", *eos)}


def test_a_row_is_filled_again_at_once(qwen):
    """Steps of a stream: no row idles while prompts are waiting."""
    wanted = requests(12)
    steps = sum(1 for _ in decode(qwen, wanted, 3))
    lengths = [r.max_new_tokens for r in wanted]
    at, free = 0, [0, 0, 0]  # the schedule of a list: each goes to the row that is free first
    for n in lengths:
        free.sort()
        free[0] += n
        at = max(at, free[0])
    assert steps == at < sum(max(lengths[i : i + 3]) for i in range(0, 12, 3))  # fewer than in fixed batches


def test_sampled_tokens_belong_to_their_request(qwen):
    wanted = [Request(r.prompt, r.max_new_tokens, 0.8 if i % 2 else 0.0, seed=i) for i, r in enumerate(requests(8))]
    together = run(qwen, wanted, 5)
    assert together == run(qwen, wanted, 1) == run(qwen, wanted, 2)
    assert {i: together[i] for i in range(0, 8, 2)} == {i: by_argmax(qwen, wanted[i]) for i in range(0, 8, 2)}
    other = run(qwen, [Request(r.prompt, r.max_new_tokens, 0.8, seed=99) for r in wanted], 5)
    assert sum(other[i] != together[i] for i in range(8)) >= 4


def test_samples_have_the_models_distribution(qwen):
    """First tokens of 4,000 seeds against softmax(logits / T): chi-square over 10 bins of about equal probability;
    27.9 is its 0.999 quantile for 9 degrees of freedom."""
    prompt, T, n = [5, 9, 200], 0.5, 4000
    with torch.no_grad():
        p = ((qwen(torch.tensor([prompt]))[0, -1] @ qwen.head_weight.t()).double() / T).softmax(0).numpy()
    order = np.argsort(-p)
    bins = np.minimum((np.cumsum(p[order]) - p[order] / 2) * 10, 9.999).astype(int)
    bin_of = np.empty_like(bins)
    bin_of[order] = bins
    drawn = run(qwen, [Request(prompt, 1, T, seed=i) for i in range(n)], 500)
    seen = np.bincount([bin_of[tokens[0]] for tokens, _ in drawn.values()], minlength=10)
    expected = np.bincount(bin_of, weights=p, minlength=10) * n
    assert expected.min() > 20 and ((seen - expected) ** 2 / expected).sum() < 27.9


def test_inserted_tokens_are_context_and_stop_ends(qwen):
    wanted = [Request([7, 8], 9), Request([3] * 20, 9), Request([11], 9)]

    def insert(new):
        return [100, 101] if len(new) == 3 else []

    def stop(new):
        return len(new) == 7

    def by_hand(request):
        tokens = list(request.prompt)
        for i in range(7):
            with torch.no_grad():
                best = int((qwen(torch.tensor([tokens]))[0, -1] @ qwen.head_weight.t()).argmax())
            tokens.append({3: 100, 4: 101}.get(i, best))
        return tokens[len(request.prompt) :], "stop"

    expected = {i: by_hand(r) for i, r in enumerate(wanted)}
    assert run(qwen, wanted, 2, insert=insert, stop=stop) == expected


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda q: Request([], 3), "0 prompt tokens"),
        (lambda q: Request([1], 0), "0 new ones"),
        (lambda q: Request([1], 1, -1.0), "temperature -1.0"),
        (lambda q: list(decode(q, [Request([1], 3)], 0)), "rows=0"),
        (lambda q: list(decode(q, [Request([1], 3), Request([1] * 250, 8)], 2)), "prompt 1 has 250 tokens"),
    ],
)
def test_decoding_refuses(qwen, call, says):
    with pytest.raises(ValueError, match=says):
        call(qwen)


def test_weights_that_yield_nan_are_no_answer(model):
    broken = load_decoder(model)
    with torch.no_grad():
        broken.norm.weight[0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        list(decode(broken, requests(2), 2))


def test_prompts_of_like_length_share_a_forward(qwen, monkeypatch):
    shapes = []
    forward = type(qwen).forward

    def counted(self, tokens_BT, **how):
        shapes.append(tuple(tokens_BT.shape))
        return forward(self, tokens_BT, **how)

    monkeypatch.setattr(type(qwen), "forward", counted)
    lengths = [41, 40, 39, 17, 16, 5, 3]
    requests = [Request(list(range(1, n + 1)), 1) for n in lengths]
    list(decode(qwen, requests, len(requests)))
    *prompts, step = shapes
    assert step == (len(requests), 1) and sum(B for B, _ in prompts) == len(requests)
    fed = sum(n - 1 for n in lengths)  # a prompt's last token goes through the step
    assert sum(B * T for B, T in prompts) - fed < 0.2 * fed and len(prompts) < len(requests)
