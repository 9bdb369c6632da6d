"""The vocabulary over ranks gives what the whole head gives."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from formulas import DEVICE
from named_scores import NAMED, custom, head, same_moments

from kernels import linear_score, parallel_linear_score


def _part(rank, file, sizes, impl, seed):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=len(sizes))
    hidden, weight, _, targets, _ = head(v=sum(sizes), seed=seed)
    weight = weight.detach()
    weight[0], weight[9] = weight[4], weight[4]  # ties within a rank and between ranks
    first = sum(sizes[:rank])
    targets[0], targets[2], targets[4] = 4, 9, 0  # the last of them is the first of the tied
    with torch.no_grad():
        hidden[[0, 2, 4]] = 5 * weight[4]
    for name in ("dpsm", "smoothing", "custom"):
        score = NAMED.get(name, custom)
        whole_h, whole_w = hidden.detach().clone().requires_grad_(), weight.clone().requires_grad_()
        want, w = linear_score(whole_h, whole_w, targets, score, fisher=True, impl="torch")
        (want * 2).backward()
        h = hidden.detach().clone().requires_grad_()
        mine = weight[first : first + sizes[rank]].clone().requires_grad_()
        got, m = parallel_linear_score(h, mine, targets, score, fisher=True, chunk=5, impl=impl)
        (got * 2).backward()
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        same_moments(m, w)
        assert m.correct[[0, 2, 4]].tolist() == [False, False, True]
        torch.testing.assert_close(m.fisher, w.fisher, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(h.grad, whole_h.grad, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(mine.grad, whole_w.grad[first : first + sizes[rank]], rtol=1e-4, atol=1e-6)
    dist.destroy_process_group()


@pytest.mark.skipif(DEVICE == "cuda", reason="two gloo ranks on CPU")
@pytest.mark.parametrize("sizes, impl", [((20, 17), "torch"), ((36, 1), "torch"), ((11, 26), "triton")])
def test_vocabulary_over_ranks_is_the_whole_head(tmp_path, sizes, impl):
    mp.spawn(_part, (tmp_path / "store", sizes, impl, 2), nprocs=len(sizes))
