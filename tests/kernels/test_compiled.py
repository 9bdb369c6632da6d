"""The scores and the layers inside torch.compile: whole graphs, a graph a score, sound operators."""

import pytest
import torch
from formulas import DEVICE
from named_scores import NAMED, custom, head

from kernels import ProperScoreLoss, compilable, impl, linear_score, logits_score, losses, rms_norm, rope, swiglu


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", ["dpsm", "custom"])
def test_compiled_without_a_graph_break(name, reduction):
    score = NAMED.get(name) or compilable(custom)

    def step(hidden, weight, bias, targets, weights):
        loss, m = linear_score(
            hidden * 1.5, weight, targets, score, bias=bias, weights=weights, reduction=reduction, fisher=True
        )
        return (loss * 2).sum(), m.entropy * 2, m.fisher

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        *leaves, targets, weights = head()
        loss, entropy, fisher = function(*leaves, targets, weights)
        loss.backward()
        results.append([loss.detach(), entropy, fisher, *(x.grad for x in leaves)])
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast_is_that_of_eager(reduction):
    score = losses.dpsm(0.5)

    def step(hidden, weight, bias, targets):
        with torch.autocast(hidden.device.type, torch.bfloat16):
            loss, m = linear_score(hidden, weight, targets, score, bias=bias, reduction=reduction)
        return loss.sum(), m.log_p

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        *leaves, targets, _ = head()
        loss, log_p = function(*leaves, targets)
        loss.backward()
        results.append([loss.detach(), log_p, *(x.grad for x in leaves)])
        assert {x.grad.dtype for x in leaves} == {torch.float32}
    # Products in bf16 in both: in fp32 the moments would differ by 2**-9. Of the gradient the one divides the rows, the
    # other their sum, and each entry is rounded to bf16.
    torch.testing.assert_close(results[0][:2], results[1][:2], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(*results, rtol=2**-7, atol=2**-9)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_logits_are_scored_without_a_graph_break(reduction, caplog):
    module = ProperScoreLoss("dpsm", alpha=0.5, reduction=reduction)
    weights = torch.rand(13, device=DEVICE)
    weights[2] = 0

    def of_module(z, targets):
        return module(z, targets).sum(), module.moments.entropy

    def of_function(z, targets):
        loss, m = logits_score(z, targets, losses.brier, weights=weights, reduction=reduction)
        return loss.sum(), m.entropy

    hidden, weight, bias, targets, _ = head()
    for step in (of_module, of_function):
        results = []
        for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
            impl._chosen.cache_clear()
            caplog.clear()
            z = (hidden @ weight.T + bias).detach().requires_grad_()
            with caplog.at_level("INFO", "scorecast"):
                loss, entropy = function(z, targets)
            assert sum("impl='auto'" in r.getMessage() for r in caplog.records) == 1, "said once"
            loss.backward()
            results.append([loss.detach(), entropy, z.grad])
        torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


def test_compiled_graphs_keep_scores_apart():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(hidden, weight, targets, score):
        return linear_score(hidden, weight, targets, score)[0]

    hidden, weight, _, targets, _ = head()
    alpha = torch.zeros((), device=DEVICE)
    moving = losses.dpsm(alpha)
    for score, value in ((moving, 0.0), (moving, 0.7), (losses.dpsm(0.2), None), (losses.brier, None), (moving, 0.1)):
        if value is not None:
            alpha.fill_(value)
        torch.testing.assert_close(
            step(hidden, weight, targets, score), linear_score(hidden, weight, targets, score)[0]
        )
    with pytest.raises(Exception, match="kernels.compilable"):
        step(hidden, weight, targets, lambda m: -m.log_p)


@pytest.mark.parametrize("name", ["linear_score", "linear_score_backward"])
def test_the_operators_are_sound(name):
    # Fake against real shapes and dtypes, no aliasing, no hidden mutation.
    from kernels import compiled

    hidden, weight, bias, targets, weights = head()
    options = dict(score=losses.ce.number, wants=[True] * 3, fisher=True, ignore_index=-100, tail=0.0, chunk=4)
    options |= dict(scale=0.5, softcap=20.0, predictions=True, topk=3, tokens=None, memory=None)
    for reduction in ("mean", "none"):
        o = compiled._Options(**options, reduction=reduction, impl="auto")
        last = None if name == "linear_score" else torch.ones(13, device=DEVICE)
        arguments = (hidden, weight, targets, bias, weights, None, last, *o)
        op = getattr(compiled, f"_{name}")
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("order", [None, 1.5])
def test_the_operators_of_the_moments_are_sound(order):
    from kernels import compiled_softmax

    z, targets = torch.randn(5, 9, device=DEVICE), torch.tensor([0, 8, -100, 3, 2], device=DEVICE)
    order = None if order is None else torch.tensor(order, device=DEVICE)
    how = order, 0.01, 0.5, 0.0, -100, "auto"
    *_, stats, _, _ = out = compiled_softmax._softmax_moments(z, targets, True, *how)
    upstream = [torch.ones_like(out[0]), None, None, None, torch.ones_like(out[0]), None, None, None]
    for op, arguments in (
        (compiled_softmax._softmax_moments, (z, targets, True, *how)),
        (compiled_softmax._softmax_gradient, (z, targets, stats, *upstream, *how)),
    ):
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_a_moment_without_a_gradient_is_refused_in_a_compiled_graph_too():
    third = compilable(lambda m: m.r3)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(z, targets):
        return logits_score(z, targets, third)[0]

    with pytest.raises(Exception, match="reads r3 with a gradient"):
        step(torch.randn(3, 7, requires_grad=True), torch.arange(3)).backward()


def test_layers_compile_without_a_graph_break():
    """With gains that train and gains that are frozen, with a residual and without."""
    generator = torch.Generator().manual_seed(0)
    x, delta, gain = (torch.randn(n, generator=generator).to(DEVICE) for n in ((2, 3, 16), (2, 3, 16), (8,)))
    cos, sin, frozen = x[:1, :, None, :4].cos(), x[:1, :, None, :4].sin(), gain.repeat(2)

    def step(x, delta, gain):
        y, s = rms_norm(x * 2, delta, gain.repeat(2), 1e-6, impl="triton")
        z, _ = rms_norm(s, None, frozen, 1e-6, impl="triton")
        heads = rope(swiglu(y, z, impl="triton").view(2, 3, 2, 8), cos, sin, gain, impl="triton")
        return (heads + rope(s.view(2, 3, 2, 8), cos, sin, impl="triton")).sin().sum() + s.square().sum()

    found = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [t.detach().requires_grad_() for t in (x, delta, gain)]
        total = function(*leaves)
        total.backward()
        found.append([total.detach(), *(t.grad for t in leaves)])
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("more", [True, False], ids=["all there is", "no more than needed"])
def test_the_operators_of_the_layers_are_sound(more):
    from kernels import compiled_layers

    x, gain, angle = (torch.rand(*n, device=DEVICE) for n in ((1, 3, 2, 8), (8,), (1, 3, 1, 4)))
    second = x.clone() if more else None
    head = gain if more else None
    for name, arguments in {
        "_norm": (x, second, gain, 1e-6),
        "norm_backward": (x, second, x, gain, 1e-6, more),
        "rope": (x, angle, angle, head, 1e-6),
        "rope_backward": (x, second, angle, angle, head, 1e-6, more),
        "swiglu": (x, x + 1),
        "swiglu_backward": (x, x, x + 1),
    }.items():
        op = getattr(compiled_layers, name)
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))
