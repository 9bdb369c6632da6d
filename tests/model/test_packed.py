"""model.packed: weights laid out for products on a CPU."""

import pytest
import torch
import torch.nn.functional as F

from model.decode import Request, decode
from model.decoder import Decoder, DecoderConfig
from model.layers import Linear
from model.packed import PackedLinear, pack, packs


def tiny() -> Decoder:
    torch.manual_seed(0)
    config = DecoderConfig(300, 64, 128, 2, 4, 2, 16, 512, tie_word_embeddings=True, attention_bias=True)
    return Decoder(config).eval().requires_grad_(False)


@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("rows", [(1,), (3, 5), (100,)])
def test_a_packed_layer_is_the_layer(dtype, error, rows):
    torch.manual_seed(0)
    weight, bias, x = torch.randn(48, 80).to(dtype) / 9, torch.randn(48).to(dtype), torch.randn(*rows, 80).to(dtype)
    if not packs(weight):
        pytest.skip(f"this CPU has no products of {dtype}")
    for b in (None, bias):
        layer = PackedLinear(weight, b)
        torch.testing.assert_close(layer(x), F.linear(x, weight, b), rtol=error, atol=error)
    assert layer.shape == (48, 80) and torch.equal(layer.dense(torch.float32), weight.float())


def test_a_packed_model_continues_as_before_and_holds_its_weights_once():
    model, requests = tiny(), [Request(list(range(1, n)), 12) for n in (4, 30, 9)]

    def texts():
        return {one.index: one.tokens for ended in decode(model, requests, 2) for one in ended}

    before, weight = texts(), model.layers[0].mlp.up_proj
    assert pack(model) is model and weight.weight is None
    assert not any(isinstance(m, Linear) for m in model.modules())
    assert texts() == before


def test_what_cannot_be_packed_stays(monkeypatch):
    assert not packs(torch.zeros(4, 4, dtype=torch.float64)) and not packs(torch.zeros(4, 4, device="meta"))
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    model = pack(tiny())
    assert isinstance(model.layers[0].mlp.up_proj, Linear)
    assert [one.tokens for ended in decode(model, [Request([1, 2], 3)], 1) for one in ended]
