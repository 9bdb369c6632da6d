"""What LoRA's backward measures: the gradients of prompt rows and of answer rows."""

import pytest
import torch
import torch.nn.functional as F
from lora_models import adapted, answers_of, assert_gradients_agree, backward, logits_of, nll, tokens_of

from model import lora
from model.decoder_hub import load_decoder


def part_by_autograd(folder, select, tokens, **config):
    """Gradients that the rows in ``select`` contribute: adapters elsewhere compute the same with A and B detached."""
    model = adapted(folder, **config)

    def forward(layer, x):
        def product(A, B):
            return layer.scale * F.linear(F.linear(x, A), B)

        live, still = product(layer.lora_A, layer.lora_B), product(layer.lora_A.detach(), layer.lora_B.detach())
        return F.linear(x, layer.base.dense(x.dtype)) + torch.where(select[..., None], live, still)

    for layer in lora.adapted(model).values():
        layer.forward = lambda x, layer=layer: forward(layer, x)
    backward(model, tokens)
    return [[p.grad for p in block] for block in lora.block_parameters(model)]


def mean_square(blocks):
    return torch.tensor([sum(g.square().sum() for g in b) / sum(g.numel() for g in b) for b in blocks])


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("config", [dict(), dict(base="nf4", rslora=True), dict(targets=("q_proj", "down_proj"))])
def test_segment_rms_is_that_of_two_separate_backward_passes(folder, config, checkpointed):
    tokens, answers = tokens_of(), answers_of()
    model = adapted(folder, **config)
    model.checkpoint_activations = checkpointed
    undivided = backward(model, tokens)
    assert not lora.segment_rms(model).any()
    lora.set_segments(model, answers)
    # Sums in another order than the undivided product's: rounding only.
    assert_gradients_agree(backward(model, tokens), undivided, 1e-5)
    parts = [part_by_autograd(folder, select, tokens, **config) for select in (~answers, answers)]
    expected = torch.stack([mean_square(p) for p in parts], dim=1).sqrt()
    assert expected.min() > 0 and (expected[:, 0] / expected[:, 1] - 1).abs().min() > 0.01
    torch.testing.assert_close(lora.segment_rms(model, reset=False), expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(lora.segment_rms(model), expected, rtol=1e-4, atol=0)
    assert not lora.segment_rms(model).any()
    lora.set_segments(model, None)
    assert_gradients_agree(backward(model, tokens), undivided, 0)
    assert not lora.segment_rms(model).any()


@pytest.mark.parametrize("checkpointed", [False, True])
def test_micro_batches_accumulate(folder, checkpointed):
    model = adapted(folder)
    model.checkpoint_activations = checkpointed
    batches = [(tokens_of(seed=2), answers_of()), (tokens_of(batch=3, time=12, seed=3), answers_of(3, 12))]
    singles, gradients = [], []
    for tokens, answers in batches:
        lora.set_segments(model, answers)
        gradients.append(backward(model, tokens))
        singles.append(lora.segment_rms(model).square())
    model.zero_grad()
    for tokens, answers in batches:
        lora.set_segments(model, answers)
        nll(logits_of(model, tokens), tokens).backward()
    torch.testing.assert_close(lora.segment_rms(model), ((singles[0] + singles[1]) / 2).sqrt(), rtol=1e-5, atol=0)
    total = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert_gradients_agree(total, {name: gradients[0][name] + gradients[1][name] for name in total}, 1e-5)


def test_the_mask_of_a_forward_holds_for_its_own_backward(folder):
    """Two forwards before two backwards, as in an interleaved pipeline."""
    model, masks = adapted(folder), [answers_of(), ~answers_of()]
    expected = []
    for mask in masks:
        lora.set_segments(model, mask)
        backward(model, tokens_of())
        expected.append(lora.segment_rms(model))
    losses = []
    for mask in masks:
        lora.set_segments(model, mask)
        losses.append(nll(logits_of(model, tokens_of()), tokens_of()))
    for loss, rms in zip(losses, expected, strict=True):
        loss.backward()
        torch.testing.assert_close(lora.segment_rms(model), rms, rtol=0, atol=0)


@pytest.mark.parametrize("share", ["all", "none"])
def test_a_batch_of_one_segment_has_nothing_in_the_other(folder, share):
    model, mask = adapted(folder), torch.full((2, 20), share == "all")
    undivided = backward(model, tokens_of())
    lora.set_segments(model, mask)
    assert_gradients_agree(backward(model, tokens_of()), undivided, 1e-5)
    rms = lora.segment_rms(model)
    empty, full = (rms[:, 0], rms[:, 1]) if share == "all" else (rms[:, 1], rms[:, 0])
    assert not empty.any() and (full > 0).all()


def test_measuring_repeats_the_narrow_products_alone(folder):
    """The gradients of A and B twice as wide, 2 N r (in + out) operations a layer, and no other."""
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for mask in (None, answers_of()):
        model = adapted(folder)
        lora.set_segments(model, mask)
        with FlopCounterMode(display=False) as counter:
            backward(model, tokens_of())
        counts.append(counter.get_total_flops())
    rows = tokens_of().numel()
    sizes = [(len(layer.lora_A), sum(layer.shape)) for layer in lora.adapted(model).values()]
    assert counts[1] - counts[0] == sum(2 * rows * r * both for r, both in sizes) > 0


def test_dropout_and_checkpoints_measure_what_the_forward_drew(folder):
    results = []
    for checkpointed in (False, True):
        model = adapted(folder, dropout=0.3).train()
        model.checkpoint_activations = checkpointed
        lora.set_segments(model, answers_of())
        torch.manual_seed(4)
        results.append((backward(model, tokens_of()), lora.segment_rms(model)))
    assert_gradients_agree(results[0][0], results[1][0], 0)
    assert torch.equal(results[0][1], results[1][1])


def test_a_mask_that_does_not_fit_is_one_line(folder):
    model = adapted(folder)
    with pytest.raises(ValueError, match="dtype torch.int64: expected bool"):
        lora.set_segments(model, torch.ones(2, 20, dtype=torch.int64))
    lora.set_segments(model, answers_of(2, 19))
    with pytest.raises(ValueError, match="a batch of 40 tokens, but the answer mask has 38"):
        model(tokens_of())
    with torch.no_grad():
        model(tokens_of())  # evaluation between two steps needs no mask
    with pytest.raises(ValueError, match="no LoRA adapters"):
        lora.set_segments(load_decoder(folder), answers_of())
