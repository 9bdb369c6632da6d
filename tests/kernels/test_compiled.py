"""linear_score inside torch.compile: whole graphs, a graph a score, sound operators."""

import pytest
import torch
from formulas import DEVICE
from named_scores import NAMED, custom, head

from kernels import compilable, linear_score, losses


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
    options |= dict(scale=0.5, softcap=20.0, predictions=True, topk=3, tokens=None)
    for reduction in ("mean", "none"):
        o = compiled._Options(**options, reduction=reduction, impl="auto")
        last = None if name == "linear_score" else torch.ones(13, device=DEVICE)
        arguments = (hidden, weight, targets, bias, weights, None, last, *o)
        op = getattr(compiled, f"_{name}")
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))
