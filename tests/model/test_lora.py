"""LoRA's layers: their start, what a forward keeps, the merged model, bad configurations and operations counted."""

import math

import pytest
import torch
from lora_models import LOGITS_TOLERANCE, adapted, answers_of, backward, logits_of, theirs, tokens_of
from torch.utils._python_dispatch import TorchDispatchMode

from model import lora
from model.decoder import Decoder, DecoderConfig
from model.decoder_hub import load_decoder, save_decoder
from model.lora import TARGETS, LoRAConfig, LoRALinear, NF4Linear, add_lora, load_base, lora_flops_per_token


def test_the_start_leaves_the_function_alone_and_trains_the_adapter_only(folder):
    plain, model = load_decoder(folder), load_decoder(folder)
    add_lora(model, LoRAConfig(r=8), torch.Generator().manual_seed(0))
    assert torch.equal(model(tokens_of()), plain(tokens_of()))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 7 and all(name.endswith(("lora_A", "lora_B")) for name in trained)
    assert backward(model, tokens_of()).keys() == trained
    blocks = lora.block_parameters(model)
    assert len(blocks) == 2 and {id(p) for block in blocks for p in block} == {
        id(p) for p in model.parameters() if p.requires_grad
    }
    again = load_decoder(folder)
    add_lora(again, LoRAConfig(r=8), torch.Generator().manual_seed(0))
    for path, layer in lora.adapted(model).items():
        A, bound = layer.lora_A, 1 / math.sqrt(layer.shape[1])
        assert torch.equal(A, again.get_submodule(path).lora_A) and not layer.lora_B.any()
        assert A.abs().max() <= bound
        # Uniform: sd is bound / sqrt(3); of 512 draws and more its own error is 2.8 % (kurtosis 1.8), here 4 of those.
        assert A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.08)


def test_bf16_activations_give_fp32_gradients_of_the_same_value(folder):
    # Rounded to bf16, so that all three start from one function.
    exact = load_decoder(folder, torch.float32)
    for p in exact.parameters():
        p.data = p.data.bfloat16().float()
    models = [exact, load_base(folder, "bf16"), load_base(folder, "fp32")]
    gradients = []
    for model in models:
        add_lora(model, LoRAConfig(r=8), torch.Generator().manual_seed(0))
        lora.set_segments(model, answers_of())
        gradients.append(backward(model, tokens_of()))
    for mixed in gradients[1:]:
        assert all(g.dtype == torch.float32 for g in mixed.values())
        for name, g in mixed.items():
            e = gradients[0][name]
            # bf16 keeps 8 bits: a few roundings of 2^-9 in each of two blocks; a wrong term is far from 5 %.
            assert (g - e).norm() <= 0.05 * e.norm(), name


class Casts(TorchDispatchMode):
    """How many adapter matrices, of rank 4, are cast one by one, and how many copies of many there are."""

    def __init__(self):
        super().__init__()
        self.alone = self.together = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.alone += func is torch.ops.aten._to_copy.default and args[0].dim() == 2 and 4 in args[0].shape
        self.together += func is torch.ops.aten._foreach_copy_.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("again", [False, True], ids=["kept", "recomputed"])
def test_adapters_are_cast_together_once_a_forward(folder, again, dropout, monkeypatch):
    results = []
    for together in (True, False):
        model = adapted(folder, "bf16", dtype=torch.bfloat16, dropout=dropout).train()
        model.checkpoint_activations = again
        if not together:
            monkeypatch.setattr(lora._Casts, "begin", lambda self, dtype: None)
        torch.manual_seed(3)
        found = []
        for _ in range(2):
            with Casts() as seen:
                found.append(backward(model, tokens_of()))
            with torch.no_grad():
                for p in model.parameters():
                    if p.requires_grad:
                        p.data.add_(0.1)  # as an optimizer would that torch's count of versions does not see
        gradients = 2 * 2 * 7  # of fp32 parameters, each cast from bf16
        assert seen.together == together and (again or (seen.alone == gradients) == together)
        results.append(found)
    for one, other in zip(*results, strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert any(not torch.equal(results[0][0][name], results[0][1][name]) for name in results[0][0])


def test_an_fp32_model_casts_nothing_and_a_forward_that_fails_leaves_nothing(folder):
    model = adapted(folder)
    with Casts() as seen:
        backward(model, tokens_of())
    assert seen.alone == seen.together == 0
    model = adapted(folder, "bf16", dtype=torch.bfloat16)
    with pytest.raises((IndexError, RuntimeError)):
        model(tokens_of() + 1000)
    assert not next(iter(lora.adapted(model).values())).casts.live


@pytest.mark.parametrize("base", ["fp32", "nf4"])
def test_the_forward_keeps_inputs_and_adapter_only(folder, base):
    """No weight [out, in] and no [rows, out] output is saved by the adapted layer."""
    layer = adapted(folder, base).layers[0].mlp.up_proj
    x = torch.randn(50, 64, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        layer(x)
    assert sorted(saved) == sorted([(50, 64), (4, 64), (128, 4), (50, 4)])


@pytest.mark.parametrize("base", ["fp32", "nf4"])
def test_the_merged_export_is_the_adapted_model(folder, tmp_path, base):
    model = adapted(folder, base, rslora=True).eval()
    before = logits_of(model, tokens_of())
    save_decoder(model, tmp_path / "merged")
    assert torch.equal(logits_of(model, tokens_of()), before)
    written = theirs(tmp_path / "merged")
    torch.testing.assert_close(written(tokens_of()).logits, before, rtol=0, atol=LOGITS_TOLERANCE)
    plain = lora.merged(model)
    assert not plain.training and not any(isinstance(m, LoRALinear | NF4Linear) for m in plain.modules())
    torch.testing.assert_close(logits_of(plain, tokens_of()), before, rtol=0, atol=LOGITS_TOLERANCE)
    assert plain.embed_tokens.weight is model.embed_tokens.weight
    assert torch.equal(logits_of(model, tokens_of()), before)
    assert (theirs(folder)(tokens_of()).logits - before).abs().max() > 0.1  # the adapter is in it


@pytest.mark.parametrize(
    "config, says",
    [
        (dict(r=0), "rank r=0: expected a positive integer; rank 0 would train nothing"),
        (dict(r=2.0), "rank r=2.0"),
        (dict(alpha=0), "alpha=0: expected a positive number"),
        (dict(dropout=1.0), "dropout=1.0: expected a probability"),
        (dict(targets=()), r"targets=\(\): expected one or more of q_proj"),
        (dict(targets=("q_proj", "lm_head")), "lm_head"),
        (dict(targets="("), "is no regular expression"),
        (dict(init="random"), "init='random': expected one of zero, pissa"),
    ],
)
def test_a_config_that_makes_no_adapter_is_refused(config, says):
    with pytest.raises(ValueError, match=says):
        LoRAConfig(**config)


@pytest.mark.parametrize("targets, share", [(TARGETS, 1.0), (("q_proj", "k_proj", "v_proj", "up_proj"), 0.25)])
def test_flops_are_those_torch_counts(targets, share):
    """Forward and backward of a tiny model, its loss on a share of the tokens, exactly: torch counts products only, and
    has to be told of the one in place."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from kernels import linear_score
    from kernels.losses import ce

    config = DecoderConfig(96, 32, 48, 3, 4, 2, head_dim=16, tie_word_embeddings=True)
    lora = LoRAConfig(r=4, targets=targets)
    torch.manual_seed(0)
    model = Decoder(config)
    add_lora(model, lora)
    tokens_BT = torch.randint(96, (2, 16))

    def in_place(_, left, right, *args, out_shape=None, **kwargs):
        return 2 * left[0] * left[1] * right[1]

    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place})
    with counter, sdpa_kernel(SDPBackend.MATH):
        hidden = model(tokens_BT).flatten(0, 1)[: int(32 * share)]
        loss, _ = linear_score(hidden, model.head_weight, tokens_BT.flatten()[: len(hidden)], ce, impl="torch")
        loss.backward()
    assert counter.get_total_flops() == 32 * lora_flops_per_token(config, lora, 16, share)
