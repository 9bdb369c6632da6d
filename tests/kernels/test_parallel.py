"""The vocabulary over ranks gives what the whole head gives."""

import pytest
import torch
import torch.distributed as dist
from formulas import DEVICE
from interpreter import work_out_once
from named_scores import NAMED, custom, head, same_moments
from on_ranks import on_ranks

from kernels import linear_score, losses, parallel_linear_score


def everything(m):
    return 3 * m.s - 0.5 * m.log_p + 0.3 * m.r1 + 0.1 * m.mean_log_p + 0.7 * m.entropy + 0.05 * m.lse.square()


everything.order = 1.25


def part(sizes, impl, seed=2):
    rank = dist.get_rank()
    hidden, weight, _, targets, _ = head(v=sum(sizes), seed=seed)
    weight = weight.detach()
    weight[0], weight[9] = weight[4], weight[4]  # ties within a rank and between ranks
    first = sum(sizes[:rank])
    targets[0], targets[2], targets[4] = 4, 9, 0  # the last of them is the first of the tied
    with torch.no_grad():
        hidden[[0, 2, 4]] = 5 * weight[4]
    scores = {name: NAMED.get(name, custom) for name in ("dpsm", "smoothing", "custom")}
    for name, score in (scores | dict(power=losses.power(1.5), everything=everything)).items():
        how = dict(softcap=20.0, scale=0.5) if name == "everything" else dict(fisher=True)
        whole_h, whole_w = hidden.detach().clone().requires_grad_(), weight.clone().requires_grad_()
        want, w = linear_score(whole_h, whole_w, targets, score, impl="torch", **how)
        (want * 2).backward()
        h = hidden.detach().clone().requires_grad_()
        mine = weight[first : first + sizes[rank]].clone().requires_grad_()
        got, m = parallel_linear_score(h, mine, targets, score, chunk=5, impl=impl, **how)
        (got * 2).backward()
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        same_moments(m, w)
        assert m.correct[[0, 2, 4]].tolist() == [False, False, True]
        torch.testing.assert_close(m.lse, w.lse)
        if name != "everything":
            torch.testing.assert_close(m.fisher, w.fisher, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(h.grad, whole_h.grad, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(mine.grad, whole_w.grad[first : first + sizes[rank]], rtol=1e-4, atol=1e-6)


def parts(_) -> None:
    work_out_once()
    dist.init_process_group("gloo")
    for sizes, impl in (((20, 17), "torch"), ((36, 1), "torch"), ((11, 26), "triton")):
        part(sizes, impl)
        print("the whole head")
    dist.destroy_process_group()


@pytest.mark.skipif(DEVICE == "cuda", reason="two gloo ranks on CPU")
def test_vocabulary_over_ranks_is_the_whole_head():
    assert on_ranks(2, parts).count("the whole head") == 6
