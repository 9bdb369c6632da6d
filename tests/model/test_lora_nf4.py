"""NF4: bitsandbytes' own layer, the model of its dequantised weights, and bases that cannot be had."""

import sys

import pytest
import torch
from lora_models import adapted, assert_gradients_agree, backward, logits_of, tokens_of

from model import lora
from model.lora import NF4Linear, load_base


@pytest.mark.parametrize("double_quant", [False, True])
def test_nf4_is_bitsandbytes_own_layer(double_quant):
    bnb = pytest.importorskip("bitsandbytes")

    torch.manual_seed(0)
    weight, x = torch.randn(96, 128), torch.randn(3, 5, 128, requires_grad=True)
    ours = NF4Linear(weight, double_quant)
    peer = bnb.nn.Linear4bit(128, 96, bias=False, compress_statistics=double_quant, quant_type="nf4")
    peer.weight = bnb.nn.Params4bit(
        weight, requires_grad=False, compress_statistics=double_quant, quant_type="nf4", quant_storage=torch.uint8
    )
    peer = peer.to("cpu")
    dy = torch.randn(3, 5, 96)
    results = []
    for layer in (ours, peer):
        x.grad = None
        y = layer(x)
        y.backward(dy)
        results.append((y.detach(), x.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)  # the same 4-bit weights; sums of 128 terms of order 1
    dense = ours.dense(torch.float32)
    torch.testing.assert_close(results[0][0], x.detach() @ dense.T, rtol=0, atol=1e-4)
    torch.testing.assert_close(results[0][1], dy @ dense, rtol=0, atol=1e-4)
    # NF4's widest gap is 0.304 of a block's largest value, |w| <= 4.5 here; so half of it at most, and
    # double quantisation adds its own 1 %.
    assert (dense - weight).abs().max() < 0.16 * weight.abs().max()
    assert 0 < (dense - weight).square().mean().sqrt() < 0.12  # Dettmers et al.: about 0.09 for a normal weight


def test_double_quantisation_shrinks_the_scales():
    pytest.importorskip("bitsandbytes")
    layers = [NF4Linear(torch.randn(256, 256, generator=torch.Generator().manual_seed(0)), d) for d in (False, True)]
    assert [layer.quant.absmax.element_size() for layer in layers] == [4, 1]
    assert not torch.equal(*(layer.dense(torch.float32) for layer in layers))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_model_is_the_model_of_its_dequantised_weights(folder, dtype):
    """Quantised base with adapters against the dense base of the same values: function and gradients."""
    nf4 = adapted(folder, "nf4", dtype=dtype)
    dense = adapted(folder, {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype], dtype=dtype)
    for path, layer in lora.adapted(nf4).items():
        assert isinstance(layer.base, NF4Linear)
        dense.get_submodule(path).base.weight.data.copy_(layer.base.dense(dtype))
    a, b = logits_of(nf4, tokens_of()), logits_of(dense, tokens_of())
    assert torch.equal(a, b)
    assert_gradients_agree(backward(nf4, tokens_of()), backward(dense, tokens_of()), 0)
    assert (a - logits_of(adapted(folder, "fp32"), tokens_of())).abs().max() > 0.01  # it was quantised
    assert not any("packed" in name for name in nf4.state_dict())
    nf4.to(torch.bfloat16)  # a change of dtype has nothing to do with 4-bit values and their scales
    assert torch.equal(nf4.layers[0].mlp.up_proj.base.dense(dtype), dense.layers[0].mlp.up_proj.base.weight)


def test_layers_without_an_adapter_back_propagate_in_nf4_too(folder):
    a, b = (adapted(folder, "nf4", targets=("q_proj",)) for _ in range(2))
    for i, layer in enumerate(b.layers):
        for name in ("k_proj", "v_proj", "o_proj"):
            old = getattr(layer.self_attn, name)
            new = torch.nn.Linear(old.shape[1], old.shape[0], bias=False)
            new.weight = torch.nn.Parameter(old.dense(torch.float32), requires_grad=False)
            setattr(b.layers[i].self_attn, name, new)
    assert_gradients_agree(backward(a, tokens_of()), backward(b, tokens_of()))


def test_bases_that_cannot_be_had_are_one_line(folder, monkeypatch):
    with pytest.raises(ValueError, match="base='int8': expected one of bf16, fp32, nf4"):
        load_base(folder, "int8")
    with pytest.raises(ValueError, match="in a multiple of 64; take base 'bf16'"):
        NF4Linear(torch.zeros(64, 96))
    for name in [n for n in sys.modules if n.split(".")[0] == "bitsandbytes"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match="pip install bitsandbytes, or take base 'bf16'") as error:
        load_base(folder, "nf4")
    assert "\n" not in str(error.value)
