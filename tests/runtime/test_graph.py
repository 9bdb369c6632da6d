"""Micro-batches as CUDA graphs: by a stand-in for the capture on a CPU, and on a device."""

from types import SimpleNamespace

import pytest
import torch
from lm_runs import rows, same_run, train
from torch import Tensor, nn

import finetune_gsm8k
from runtime import graph
from runtime.graph import Replayed
from runtime.machine import World


def gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")(test))


def tensors_of(outputs) -> list[Tensor]:
    parts = outputs if isinstance(outputs, tuple) else [outputs]
    vectors = [vars(x).values() if hasattr(x, "__dict__") and not isinstance(x, Tensor) else [x] for x in parts]
    return [x for some in vectors for x in some if isinstance(x, Tensor)]


class Captures:
    """Stands for CUDA: a capture leaves nothing but places, which each replay fills."""

    def __init__(self, parameters):
        self.parameters, self.count, self.replays = parameters, 0, 0

    def __call__(self, run, pool):
        self.count += 1
        kept, random = [p.grad.clone() for p in self.parameters()], torch.get_rng_state()
        outputs = run()
        for p, was in zip(self.parameters(), kept, strict=True):
            p.grad.copy_(was)
        torch.set_rng_state(random)
        for x in tensors_of(outputs):
            x.fill_(True if x.dtype == torch.bool else 77)

        def replay() -> None:
            self.replays += 1
            for place, x in zip(tensors_of(outputs), tensors_of(run()), strict=True):
                place.copy_(x)

        return outputs, replay


@pytest.fixture
def stood_for(monkeypatch):
    """Captures of the models that Replayed is told of."""
    told = []

    def init(self, step, parameters, **more):
        told[:] = [p for p in parameters if p.requires_grad]
        original(self, step, told, **more)

    original = Replayed.__init__
    captures = Captures(lambda: told)
    monkeypatch.setattr(Replayed, "__init__", init)
    monkeypatch.setattr(graph, "capture", captures)
    return captures


def linear(seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(3, 1)


def stepped(model: nn.Module):
    def step(x: Tensor) -> Tensor:
        loss = model(x).square().sum()
        loss.backward()
        return loss.detach()

    return step


def test_gradients_and_losses_are_those_of_the_step(stood_for):
    ours, theirs = linear(), linear()
    step, replayed = stepped(theirs), Replayed(stepped(ours), ours.parameters())
    for number in range(6):
        for count in (4, 4, 2):  # micro-batches of one optimizer step, the last one of another shape
            x = torch.randn(count, 3)
            assert replayed(x) == step(x)
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad), number
            p.grad = q.grad = None
    assert stood_for.count == 2 and stood_for.replays == 6 * 3 - 2


def test_a_gradient_stays_where_it_is(stood_for):
    model = linear()
    replayed = Replayed(stepped(model), model.parameters())
    places = []
    for _ in range(4):
        replayed(torch.ones(2, 3))
        places.append(model.weight.grad.data_ptr())
        model.zero_grad(set_to_none=True)
    assert len(set(places[1:])) == 1


def test_a_number_of_the_host_that_changes_is_captured_anew(stood_for):
    model, factor = linear(), [1.0]

    def step(x: Tensor) -> Tensor:
        loss = factor[0] * model(x).sum()
        loss.backward()
        return loss.detach()

    replayed = Replayed(step, model.parameters(), baked=lambda: factor[0])
    for factor[0] in (1.0, 1.0, 1.0, 2.0, 2.0):
        assert replayed(torch.ones(2, 3)) == factor[0] * model(torch.ones(2, 3)).sum()
    assert stood_for.count == 2


def test_a_run_is_the_same(lm_base, stood_for, monkeypatch, tmp_path):
    """Of DPSM with a share of the unigram, dropout, and FoT's steps, which come in halves."""
    monkeypatch.setattr("train_lm.check_graph", lambda cfg, world: None)
    noisy = "--loss dpsm --warmup 0.5 --dropout 0.1 --unigram 0.3"
    flags = [*lm_base, *noisy.split(), *"--schedule fot --fot-window 3".split()]
    assert train(flags, tmp_path / "eager") == 0
    assert train(flags, tmp_path / "graph", "--cuda-graph") == 0
    assert stood_for.count == 2 and stood_for.replays > 8
    same_run(tmp_path / "eager", tmp_path / "graph")


def test_a_run_on_gsm8k_is_the_same(base, stood_for, monkeypatch, tmp_path):
    """Of packed rows whose lengths are padded, but for the steps that look at prompts or at blocks."""
    monkeypatch.setattr("finetune_gsm8k.check_graph", lambda cfg, world: None)
    monkeypatch.setattr("finetune_gsm8k.RECUR", 64)
    more = "--loss dpsm --warmup 0.5 --schedule fot --fot-window 6 --log-every 4".split()
    more += "--eval-problems 1 --steps 10".split()
    assert finetune_gsm8k.main([*base, *more, "--out", str(tmp_path / "eager")]) == 0
    assert finetune_gsm8k.main([*base, *more, "--out", str(tmp_path / "graph"), "--cuda-graph"]) == 0
    assert stood_for.count == 2 and stood_for.replays > 20  # without the padding 7 shapes, 12 replays
    for kind, key in (("train", "loss"), ("train", "nll"), ("train", "grad_norm"), ("val", "nll"), ("val", "ece10")):
        ours, theirs = (torch.tensor([row[key] for row in rows(tmp_path / name, kind)]) for name in ("graph", "eager"))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("device", "ranks", "recomputes", "why"),
    [("cpu", 1, False, "needs a CUDA device"), ("cuda", 2, False, "one process"), ("cuda", 1, True, "for large ones")],
)
def test_where_it_cannot_be_had(device, ranks, recomputes, why):
    cfg = SimpleNamespace(cuda_graph=True, checkpoint_activations=recomputes)
    with pytest.raises(ValueError, match=why):
        graph.check_graph(cfg, World(0, ranks, torch.device(device)))
    cfg.cuda_graph = False
    graph.check_graph(cfg, World(0, ranks, torch.device(device)))


@gpu
@pytest.mark.parametrize("more", ["--schedule fot --fot-window 3", "--dropout 0.1", "--unigram 0.3 --unigram-gain 3"])
def test_a_run_on_a_device(lm_base, tmp_path, more):
    flags = [*lm_base, "--device", "cuda", "--no-compile", "--dtype", "float32", *more.split()]
    assert train(flags, tmp_path / "eager") == 0
    assert train(flags, tmp_path / "graph", "--cuda-graph") == 0
    for kind in ("train", "val"):
        for ours, theirs in zip(rows(tmp_path / "graph", kind), rows(tmp_path / "eager", kind), strict=True):
            key = "loss" if kind == "train" else "nll"
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3)


@gpu
@pytest.mark.parametrize("kept", ["fp32", "nf4"])
def test_a_run_on_gsm8k_on_a_device(base, tmp_path, kept):
    flags = [*base, "--device", "cuda", "--base", kept, "--eval-problems", "1", "--log-every", "4"]
    assert finetune_gsm8k.main([*flags, "--out", str(tmp_path / "eager")]) == 0
    assert finetune_gsm8k.main([*flags, "--out", str(tmp_path / "graph"), "--cuda-graph"]) == 0
    for ours, theirs in zip(rows(tmp_path / "graph", "train"), rows(tmp_path / "eager", "train"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-2)  # bf16, in rows of another length
