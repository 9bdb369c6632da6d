"""kernels.bench --diagnostics: the figures beside a loss are what they say, whoever computes them."""

import csv
import os
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


from kernels.bench import diagnostics, timing
from kernels.bench.__main__ import main
from kernels.bench.providers import FROM_HIDDEN
from kernels.bench.timing import Shape, make_inputs


def figures_in_float64(hidden, weight, targets):
    logits = hidden.detach().double() @ weight.detach().double().t()
    log_p = logits.log_softmax(-1)
    p, correct = log_p.exp(), (logits.argmax(-1) == targets).double()
    confidence = p.amax(-1)
    bins = torch.linspace(0, 1, 301, dtype=torch.float64)
    ece = 0.0
    for low, high in pairwise(bins):
        inside = (confidence > low) & (confidence <= high)
        ece += (confidence[inside] - correct[inside]).sum().abs().item() / len(targets)
    one_hot = torch.nn.functional.one_hot(targets, len(weight))
    entropy, fisher = -(p * log_p).sum(-1).mean(), (p - one_hot).square().sum(-1).mean()
    return dict(entropy=entropy.item(), accuracy=correct.mean().item(), calibration=ece, fisher=fisher.item())


@pytest.mark.parametrize("provider", ["ours CE", "ours DPSM", "torch full logits", "TRL fused head", "TRL full logits"])
def test_every_provider_gives_the_figures_that_it_says(provider):
    if provider.startswith("TRL"):
        pytest.importorskip("trl")
    leaves, targets = make_inputs(Shape(64, 30, 8), "fp32", "cpu")
    with torch.no_grad():
        leaves[1].mul_(80)  # confidences from one end to the other
        targets[::2] = (leaves[0] @ leaves[1].t()).argmax(-1)[::2]
    want = figures_in_float64(*leaves, targets)
    names = {diagnostics.LOSS: (), diagnostics.SOME: ("entropy", "accuracy"), diagnostics.ALL: tuple(want)}
    literal = FROM_HIDDEN["linear + literal DPSM" if "DPSM" in provider else "linear + torch CE"]
    expected = torch.autograd.grad(literal(*leaves, targets), leaves)
    steps = diagnostics.MAKERS[provider]()
    assert list(steps) == list(names)[: 2 if provider.startswith("TRL") else 3]
    for which, step in steps.items():
        loss, figures = step(*leaves, targets)
        assert set(figures) == set(names[which])
        for name, value in figures.items():
            expected_value = want[name]
            if name == "fisher" and "DPSM" in provider:
                assert 0 < value < expected_value
                continue
            # fp32 logits of up to 10 and 64 terms: 2**-24 of each.
            assert value.item() == pytest.approx(expected_value, rel=1e-5) and not value.requires_grad
        torch.testing.assert_close(torch.autograd.grad(loss, leaves), expected, rtol=1e-4, atol=1e-6)


def test_a_confidence_on_an_edge_is_in_the_bin_below():
    confidence = torch.tensor([0.5, 0.501, 1.0, 0.0])  # 0.5 is the upper edge of the bin before 0.501's
    correct = torch.tensor([True, False, True, False])
    assert diagnostics.calibration(confidence, correct).item() == pytest.approx((0.5 + 0.501) / 4, rel=1e-6)


def test_liger_gives_token_accuracy_where_its_version_has_it(monkeypatch):
    class New:
        def __init__(self, return_token_accuracy=False):
            self.more = return_token_accuracy

        def __call__(self, weight, hidden, targets):
            loss = FROM_HIDDEN["linear + torch CE"](hidden, weight, targets)
            return SimpleNamespace(loss=loss, token_accuracy=torch.tensor(0.5)) if self.more else loss

    class Old(New):
        def __init__(self):
            super().__init__()

    inputs = make_inputs(Shape(4, 9, 2), "fp32", "cpu")
    for version, which in ((New, ["loss alone", "accuracy"]), (Old, ["loss alone"])):
        monkeypatch.setattr(diagnostics, "liger", lambda *_, version=version: version)
        steps = diagnostics.MAKERS["Liger linear CE, Triton"]()
        assert list(steps) == which
        results = [step(*inputs[0], inputs[1]) for step in steps.values()]
        assert all(loss == results[0][0] for loss, _ in results)
        assert [list(figures) for _, figures in results] == [[], ["accuracy"]][: len(which)]


def test_diagnostics_are_on_file_as_they_come(tmp_path, monkeypatch, capsys):
    file, asked, most = tmp_path / "figures.csv", [], 5

    def memory(name, *_):
        if len(asked) == most:
            raise KeyboardInterrupt
        asked.append(name)
        return 3 * 10**6

    def absent(module, name):
        raise ImportError("No module named 'trl'")

    once, forwards = timing.run_once, set()

    def run(function, leaves, targets, forward=False):
        forwards.add(forward)
        once(function, leaves, targets, forward)

    monkeypatch.setattr(timing, "run_once", run)
    monkeypatch.setattr(timing, "measure_memory_apart", memory)
    monkeypatch.setattr(diagnostics, "peer", absent)
    command = ["--diagnostics", "--n", "8", "--v", "30", "--d", "4", "--repeats", "1", "--device", "cpu"]
    command += ["--csv", str(file)]
    with pytest.raises(KeyboardInterrupt):
        main(command)
    with open(file) as opened:
        rows = list(csv.DictReader(opened))
    assert [f"{r['provider']}, {r['figures']}" for r in rows] == asked and len(rows) == 5
    assert forwards == {False}  # a step is forward and backward
    most = 100
    assert main(command) == 0
    with open(file) as opened:
        rows = list(csv.DictReader(opened))
    measured = [r for r in rows if not r["missing"]]
    assert [r["ratio_to_loss_alone"] for r in measured if r["figures"] == "loss alone"] == ["1.0"] * 3
    assert {r["provider"]: len([x for x in measured if x["provider"] == r["provider"]]) for r in measured} == {
        "ours CE": 3,
        "ours DPSM": 3,
        "torch full logits": 3,
    }
    assert {r["n"] for r in rows} == {"8"} and {r["peak_bytes"] for r in measured} == {"3000000"}
    gone = {r["provider"]: r["missing"] for r in rows if r["missing"]}
    why = "not installed: No module named 'trl'"
    assert gone == {"TRL fused head": why, "TRL full logits": why, "Liger linear CE, Triton": "needs CUDA"}
    shown = capsys.readouterr().out
    assert "x loss alone" in shown and "entropy, accuracy, calibration, Fisher" in shown and why in shown
