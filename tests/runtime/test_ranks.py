"""linear_score and ProperScoreLoss under DDP and FSDP2, plain and with activation checkpointing: two gloo ranks with
half of a batch each get the gradients of one process with all of it."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from on_ranks import on_ranks
from torch import nn
from torch.utils.checkpoint import checkpoint

from kernels import ProperScoreLoss, linear_score, losses
from runtime.optim import Muon, hidden_matrices

V, D, T = 53, 16, 24
# (what, how, with activation checkpointing)
CASES = (
    ("linear_score, mean", "ddp", True),
    ("linear_score, mean", "fsdp2", False),
    ("linear_score, none", "ddp", False),
    ("linear_score, none", "fsdp2", True),
    ("module", "ddp", True),
    ("module", "fsdp2", True),
)


class Body(nn.Module):
    """Tokens to hidden states; the head is tied to the embedding."""

    def __init__(self):
        super().__init__()
        self.wte, self.layer = nn.Embedding(V, D), nn.Linear(D, D)
        self.checkpointed = False

    def forward(self, tokens):
        def run(x):
            return torch.tanh(self.layer(x))

        x = self.wte(tokens)
        return checkpoint(run, x, use_reentrant=False) if self.checkpointed else run(x)


def body(checkpointed: bool) -> Body:
    torch.manual_seed(0)
    model = Body()
    model.checkpointed = checkpointed
    return model


def batch():
    generator = torch.Generator().manual_seed(1)
    tokens, targets = (torch.randint(V, (2, T), generator=generator) for _ in range(2))
    targets[:, 3] = -100  # as many in the loss on each rank, so that the mean of means is the mean
    return tokens, targets


def loss_of(form: str, hidden, weight, targets):
    hidden, targets = hidden.flatten(0, -2), targets.flatten()
    if form == "module":
        return ProperScoreLoss("dpsm", alpha=0.3)(F.linear(hidden, weight), targets)
    score = losses.dpsm(0.3)
    if form == "linear_score, none":
        per_token = linear_score(hidden, weight, targets, score, reduction="none", chunk=7)[0]
        return per_token.sum() / (targets != -100).sum()
    return linear_score(hidden, weight, targets, score, chunk=7)[0]


def gradients(kind: str, form: str, checkpointed: bool, rows: slice) -> dict[str, torch.Tensor]:
    """{name: gradient} after one step; ``kind`` "one" is a single process."""
    model, (tokens, targets) = body(checkpointed), batch()
    trained = model
    if kind == "ddp":
        trained = nn.parallel.DistributedDataParallel(model)
    elif kind == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        fully_shard(model.layer, mesh=mesh)
        fully_shard(model, mesh=mesh, reshard_after_forward=False)  # the loss uses its tied head
    loss_of(form, trained(tokens[rows]), model.wte.weight, targets[rows]).backward()
    full = {name: p.grad for name, p in model.named_parameters()}
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in full.items()}


def after_muon(kind: str, rows: slice) -> dict[str, torch.Tensor]:
    """{name: weight} after three steps of Muon and AdamW."""
    model, (tokens, targets) = body(False), batch()
    optimizer = Muon([{"params": list(model.parameters())}], hidden_matrices(model), lr=0.01, momentum=0.9)
    trained = nn.parallel.DistributedDataParallel(model) if kind == "ddp" else model
    for _ in range(3):
        loss_of("linear_score, mean", trained(tokens[rows]), model.wte.weight, targets[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach() for name, p in model.named_parameters()}


def compare(_) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for form, kind, checkpointed in CASES:
        want = gradients("one", form, False, slice(None))
        got = gradients(kind, form, checkpointed, slice(rank, rank + 1))
        for name, g in got.items():
            # fp32: the halves' sums round differently.
            torch.testing.assert_close(
                g, want[name], rtol=1e-5, atol=1e-7, msg=lambda m, at=(form, kind, name): f"{at}: {m}"
            )
    want, got = (after_muon(kind, rows) for kind, rows in (("one", slice(None)), ("ddp", slice(rank, rank + 1))))
    for name, w in got.items():
        # Newton and Schulz in bfloat16, 2^-8 of an update of 0.01 in RMS, three times.
        torch.testing.assert_close(w, want[name], rtol=0, atol=3e-4, msg=lambda m, name=name: f"muon {name}: {m}")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
@pytest.mark.skipif(torch.cuda.is_available(), reason="two gloo ranks on CPU")
def test_ranks_with_half_a_batch_get_the_gradient_of_the_whole():
    on_ranks(2, compare)
