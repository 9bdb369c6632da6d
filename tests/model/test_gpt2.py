"""GPT-2: its shape, initialisation, precision, memory options and optimizer groups."""

import math

import pytest
import torch
import torch.nn.functional as F
from gpt2_models import TINY, build, logits_of, mean_nll, tokens_for
from torch import nn

from model.gpt2 import GPT2 as Model
from model.gpt2 import SIZES, GPT2Config, check_groups, decay_groups, flops_per_token, parameter_count


def gradients(model, tokens):
    model.zero_grad()
    mean_nll(logits_of(model, tokens), tokens).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


# ---------------------------------------------------------------- shape and arguments


@pytest.mark.parametrize(
    "field, value, says",
    [
        ("n_head", 3, "n_embd=32 is not a multiple of n_head=3"),
        ("n_layer", 0, "n_layer=0"),
        ("vocab_size", 1.5, "vocab_size=1.5"),
        ("dropout", 1.0, "dropout=1.0"),
    ],
)
def test_config_refuses_shapes_that_cannot_be_built(field, value, says):
    fields = dict(vocab_size=97, block_size=32, n_layer=2, n_head=4, n_embd=32) | {field: value}
    with pytest.raises(ValueError, match=says):
        GPT2Config(**fields)


def test_forward_refuses_bad_input():
    model = build()
    with pytest.raises(ValueError, match="33 tokens: expected at most block_size=32"):
        model(tokens_for(time=33))
    with pytest.raises(ValueError, match="two dimensions"):
        model(torch.zeros(8, dtype=torch.long))
    with pytest.raises(ValueError, match="int64"):
        Model(TINY, torch.int64)


def test_published_sizes():
    def count(size, vocab=50257, block=1024):
        with torch.device("meta"):
            return parameter_count(Model(GPT2Config(vocab_size=vocab, block_size=block, **SIZES[size])))

    # Counts of the published checkpoints, gpt2, gpt2-medium and gpt2-large.
    assert count("gpt2") == 124_439_808
    assert count("gpt2-medium") == 354_823_168
    assert count("gpt2-large") == 774_030_080
    D, L = 2048, 24  # GPT-3 XL's shape, from the formula
    assert count("gpt2-1.3b") == 50257 * D + 1024 * D + L * (12 * D * D + 13 * D) + 2 * D
    assert count("nano", vocab=512, block=128) < 1_000_000


def test_head_is_the_token_embedding():
    model = build()
    assert model.head_weight is model.wte.weight
    assert sum("wte" in name or "head" in name for name, _ in model.named_parameters()) == 1
    # A token that is not read still gets a gradient, as an output; one that is read gets both.
    tokens = torch.full((1, 8), 5)
    grad = gradients(model, tokens)["wte.weight"]
    assert grad.abs().sum(1).gt(0).all()


def test_causal():
    model, tokens = build(spread=0.1), tokens_for()
    other = tokens.clone()
    other[:, 20] = (other[:, 20] + 1) % TINY.vocab_size
    a, b = model(tokens), model(other)
    assert torch.equal(a[:, :20], b[:, :20])  # the same sums in the same order, so exact
    assert (a[:, 20:] - b[:, 20:]).abs().amax(-1).gt(0).all()


def test_a_gradient_reaches_every_parameter():
    for name, grad in gradients(build(), tokens_for()).items():
        assert grad.isfinite().all() and grad.abs().max() > 0, name


def test_flops_are_those_torch_counts():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model, tokens = build(), tokens_for(batch=3, time=16)
    # The math backend computes the whole square, which is the convention of the formula.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits_of(model, tokens).sum().backward()
    assert counter.get_total_flops() == tokens.numel() * flops_per_token(TINY, 16)


def test_dropout_acts_in_four_places_in_training_only(monkeypatch):
    model, tokens = build(GPT2Config(97, 32, 1, 4, 32, dropout=0.3), spread=0.1), tokens_for(batch=16)
    zeros = {}

    def watch(name):
        return lambda _, inputs, output=None: zeros.update({name: (inputs[0] if output is None else output) == 0})

    model.h[0].register_forward_pre_hook(watch("embeddings"))
    model.h[0].attn.register_forward_hook(watch("attn"))
    model.h[0].mlp.register_forward_hook(watch("mlp"))
    model(tokens)
    # 16 x 32 x 32 draws: 5 standard errors of the share of zeros are 0.018.
    shares = {name: z.float().mean().item() for name, z in zeros.items()}
    assert shares == {name: pytest.approx(0.3, abs=0.018) for name in ("embeddings", "attn", "mlp")}
    with monkeypatch.context() as patch:  # what stays random without those three is the attention weights
        patch.setattr(F, "dropout", lambda x, *_: x)
        assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), build(GPT2Config(97, 32, 1, 4, 32), spread=0.1)(tokens))


# ---------------------------------------------------------------- initialisation


def test_initial_values():
    config = GPT2Config(vocab_size=1000, block_size=512, n_layer=3, n_head=4, n_embd=128)
    for name, p in build(config).named_parameters():
        if p.ndim == 1:
            expected = torch.zeros_like(p) if name.endswith("bias") else torch.ones_like(p)
            assert torch.equal(p, expected), name
            continue
        std = 0.02 / math.sqrt(6) if "c_proj" in name else 0.01 if "wpe" in name else 0.02
        # The standard error of a standard deviation is std / sqrt(2 n), of a mean std / sqrt(n); 5 of them.
        assert abs(p.std() - std) < 5 * std / math.sqrt(2 * p.numel()), name
        assert abs(p.mean()) < 5 * std / math.sqrt(p.numel()), name


def test_a_seed_gives_one_model():
    a, b = build(seed=3).state_dict(), build(seed=3).state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["wte.weight"], build(seed=4).wte.weight)
    assert not torch.equal(a["wte.weight"], a["wte.weight"].bfloat16().float())
    # From the global generator, or in another dtype, or built on meta first: the same values.
    torch.manual_seed(3)
    global_ = Model(TINY)
    half = Model(TINY).to(torch.bfloat16)
    half.init_weights(torch.Generator().manual_seed(3))
    with torch.device("meta"):
        late = Model(TINY)
    late.to_empty(device="cpu").init_weights(torch.Generator().manual_seed(3))
    for name in a:
        assert torch.equal(global_.state_dict()[name], a[name])
        assert torch.equal(half.state_dict()[name], a[name].bfloat16())
        assert torch.equal(late.state_dict()[name], a[name])
    # A generator of one's own leaves the global one alone.
    before = torch.get_rng_state()
    late.init_weights(torch.Generator().manual_seed(3))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same_model():
    model = Model(TINY, torch.bfloat16).cuda()
    model.init_weights(torch.Generator().manual_seed(0))
    on_cpu, tokens = build(dtype=torch.bfloat16), tokens_for()
    assert all(torch.equal(p.cpu(), q) for p, q in zip(model.parameters(), on_cpu.parameters(), strict=True))
    a, b = model(tokens.cuda()).float().cpu(), on_cpu(tokens).float()
    assert (a - b).norm() < 0.02 * b.norm()  # as for bf16 against fp32 below


# ---------------------------------------------------------------- precision, memory, compiler


def count_casts(model, tokens):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counter(TorchDispatchMode):
        casts = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.casts += func is torch.ops.aten._to_copy.default
            return func(*args, **(kwargs or {}))

    with Counter() as counter:
        model(tokens).sum().backward()
    return counter.casts


def test_casts_cost_nothing_in_fp32():
    assert count_casts(build(), tokens_for()) == 0
    assert count_casts(build(dtype=torch.bfloat16), tokens_for()) > 0


def test_bf16_activations_over_fp32_parameters():
    tokens = tokens_for()
    model, reference = build(dtype=torch.bfloat16, spread=0.02), build(spread=0.02)
    hidden, exact = model(tokens), reference(tokens)
    assert hidden.dtype == torch.bfloat16 and exact.dtype == torch.float32
    # A bf16 rounding is up to 2^-9 of the value; about 20 of them in a row, adding as random steps do: 1 %.
    assert (hidden.float() - exact).norm() < 0.02 * exact.norm()
    hidden.float().square().sum().backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())


def test_layers_follow_parameters_and_inputs_that_are_bf16():
    model = build().to(torch.bfloat16)
    model.dtype = torch.bfloat16
    assert model(tokens_for()).dtype == torch.bfloat16


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_checkpointing_changes_no_gradient(dropout):
    model, tokens = build(GPT2Config(97, 32, 2, 4, 32, dropout)), tokens_for()
    calls = []
    model.h[0].ln_1.register_forward_hook(lambda *_: calls.append(1))
    torch.manual_seed(5)
    plain = gradients(model, tokens)
    assert len(calls) == 1
    model.checkpoint_activations = True
    torch.manual_seed(5)
    recomputed = gradients(model, tokens)
    assert len(calls) == 3  # forward once more, and again in backward
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)
    with torch.no_grad():
        model(tokens)
    assert len(calls) == 4


@pytest.mark.parametrize("dtype, recompute", [(torch.float32, False), (torch.bfloat16, True)])
def test_compiles_to_one_graph(dtype, recompute):
    torch._dynamo.reset()
    model, tokens = build(GPT2Config(97, 32, 1, 4, 32), dtype=dtype), tokens_for()
    eager = gradients(model, tokens)
    model.checkpoint_activations = recompute
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.zero_grad()
    mean_nll(compiled(tokens).float() @ model.head_weight.T, tokens).backward()
    # The compiler may decompose and reorder: fp32's rounding, or bf16's, a few times over.
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    for name, p in model.named_parameters():
        assert (p.grad - eager[name]).norm() <= tolerance * eager[name].norm(), name


def test_fsdp2_hands_out_bf16_parameters():
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if dist.is_initialized():
        pytest.skip("a process group is already up")
    tokens = tokens_for()
    expected_model = build(dtype=torch.bfloat16)
    expected = gradients_in_activation_dtype(expected_model, tokens)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for dtype in (torch.bfloat16, torch.float32):
            model, policy = build(dtype=dtype), MixedPrecisionPolicy(param_dtype=torch.bfloat16)
            for block in model.h:
                fully_shard(block, mesh=mesh, mp_policy=policy)
            fully_shard(model, mesh=mesh, mp_policy=policy)
            # Where FSDP2 casts a block's input, torch 2.11 does not cast it again when the block is recomputed.
            model.checkpoint_activations = dtype == torch.bfloat16 or torch.__version__ >= "2.12"
            got = gradients_in_activation_dtype(model, tokens)
            for name in expected:
                full = got[name].full_tensor()
                assert full.dtype == torch.float32
                # bf16 gradients of one computation, in another order of roundings: 2^-8, a few times.
                assert (full - expected[name]).norm() < 0.02 * expected[name].norm(), name
    finally:
        dist.destroy_process_group()


def gradients_in_activation_dtype(model, tokens):
    """Gradients with the head in bf16, as fully_shard leaves it after the forward."""
    hidden = model(tokens)
    mean_nll((hidden @ model.head_weight.to(hidden.dtype).T).float(), tokens).backward()
    return {name: p.grad for name, p in model.named_parameters()}


# ---------------------------------------------------------------- optimizer groups


def test_decay_groups_cover_the_model_once():
    model = build()
    decay, rest = decay_groups(model, 0.1)
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)].split(".")[-2] for p in decay["params"]} == {"wte", "wpe", "c_attn", "c_proj", "c_fc"}
    assert all("ln_" in names[id(p)] or names[id(p)].endswith("bias") for p in rest["params"])
    assert len(decay["params"]) + len(rest["params"]) == len(names)
    torch.optim.AdamW([decay, rest], lr=1e-3).step()

    model.wpe.weight.requires_grad_(False)
    decay, rest = decay_groups(model, 0.1)
    assert id(model.wpe.weight) not in map(id, decay["params"] + rest["params"])
    with pytest.raises(ValueError, match="weight_decay=-0.1"):
        decay_groups(model, -0.1)


def test_groups_that_do_not_cover_the_model_are_refused():
    model = build()
    everything = list(model.parameters())
    check_groups(model, [dict(params=everything)])
    with pytest.raises(ValueError, match="ln_f.bias is there 0 times instead of 1"):
        check_groups(model, [dict(params=everything[:-1])])
    with pytest.raises(ValueError, match="wte.weight is there 2 times instead of 1"):
        check_groups(model, [dict(params=everything), dict(params=everything[:1])])
    with pytest.raises(ValueError, match="1 tensors are no parameters"):
        check_groups(model, [dict(params=[*everything, nn.Parameter(torch.zeros(1))])])
    model.wpe.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="wpe.weight is there 1 times instead of 0"):
        check_groups(model, [dict(params=everything)])

    class Forgetful(nn.Linear):
        def parameters(self, recurse=True):
            return iter([self.weight])

    with pytest.raises(ValueError, match="bias is there 0 times"):  # decay_groups checks itself
        decay_groups(Forgetful(2, 2), 0.1)
