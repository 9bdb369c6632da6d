"""How many tokens linear_score takes at a time on a GPU, and what memory that needs: logic, not speed."""

import os
import weakref
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from accounting import bytes_beside
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import chunks, head_pass, linear_score, losses
from kernels.chunks import ALLOWANCE, TILE, chunk_rows, cuda_chunk, row_stride, weight_bytes_beside

HEADS = {"gpt2": (8192, 50257, 768), "qwen3": (8192, 151936, 1024)}
PLENTY = 80 * 10**9


@pytest.mark.parametrize("n", [0, 1, 127, 128, 129, 2000, 8192, 100_000])
@pytest.mark.parametrize("v", [1, 507, 50257, 151936, 2_000_000])
@pytest.mark.parametrize("d", [64, 768, 4096])
def test_chunks_fit_and_are_whole_tiles(n, v, d):
    for itemsize in (2, 4):
        for sms in (1, 108, 132):
            before = 0
            for free in (10**6, 10**8, 10**9, PLENTY):
                for beside in (0, 10**8):
                    rows = chunk_rows(n, v, d, itemsize, sms, free, beside)
                    assert 1 <= rows <= max(1, n)
                    assert rows == 1 or rows * row_stride(v) * itemsize <= min(ALLOWANCE - beside, free // 2)
                    if rows < n and rows > TILE:
                        assert rows % TILE == 0
                rows = chunk_rows(n, v, d, itemsize, sms, free)
                assert rows >= before, "less rows with more memory"
                before = rows


def test_chunks_do_not_grow_with_the_vocabulary():
    rows = [chunk_rows(8192, v, 768, 2, 132, PLENTY) for v in (1000, 32000, 50257, 65536, 128256, 151936, 500_000)]
    assert all(a >= b for a, b in pairwise(rows)) and rows[0] == 8192


def test_a_last_chunk_of_a_few_rows_is_avoided():
    # 1152 fit; 8 chunks of 1024 cost less than 7 of 1152 and one of 128.
    free = 2 * 1152 * row_stride(50257) * 2
    assert chunk_rows(8192, 50257, 768, 2, 128, free) == 1024


@pytest.mark.parametrize("name, rows, megabytes", [("gpt2", 1408, 296.0), ("qwen3", 1024, 622.3)])
def test_choice_at_the_heads_of_the_claims(name, rows, megabytes):
    # GPT-2's head is within the 300 MB, Qwen3's is not: the fp32 sum of d_weight alone takes 622.3 MB in backward.
    n, v, d = HEADS[name]
    chosen = chunk_rows(n, v, d, 2, 132, PLENTY, weight_bytes_beside(v, d, 2, 2))
    assert chosen == rows
    assert bytes_beside(n, v, d, chosen, 2, 2) / 1e6 == pytest.approx(megabytes, abs=0.1)
    assert bytes_beside(n, v, d, 1, 2, 2) == 4 * v * d + (2 * row_stride(v) if v % 8 else 0)  # no chunk goes below
    # With fp32 weights the sum is the gradient, and the bf16 copy of the weight is what is beside.
    assert bytes_beside(n, v, d, chosen, 2, 4) == chosen * row_stride(v) * 2 + 2 * v * d


@pytest.fixture
def device(monkeypatch):
    """A CUDA device that answers: 10 GB free, or as ``free`` says; ``asked`` counts the questions."""
    told = SimpleNamespace(cuda=torch.device("cuda", 0), free=10 * 10**9, asked=0)

    def memory(device):
        told.asked += 1
        return told.free, 80 * 10**9

    monkeypatch.setattr(torch.cuda, "mem_get_info", memory)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5 * 10**8)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 4 * 10**8)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    chunks._of_device.cache_clear()
    cuda_chunk.cache_clear()
    yield told
    chunks._of_device.cache_clear()
    cuda_chunk.cache_clear()


def test_the_device_is_asked_once_a_head_however_long_its_batches_are(device):
    ask = partial(cuda_chunk, v=50257, d=768, hidden_bytes=2, weight_bytes=2, device=device.cuda)
    assert [ask(n) for n in (8192, 8192, 9000, 16000)] == [1408] * 4 and device.asked == 1
    for n in range(1, 4096):
        ask(n)
    assert device.asked == 13, "once for each power of two"
    assert ask(8192, d=1024) and device.asked == 14, "another head"
    device.free = 2 * 10**8  # 200 MB of the driver's and 100 MB of the allocator's, of which half: 1490 rows
    assert ask(8193) == 1408 and ask(20000) <= 1490, "only a batch twice as long asks anew"


def test_a_frozen_head_has_no_gradient_to_make_room_for(device):
    ask = partial(cuda_chunk, 8192, 151936, 1024, 2, 2, device.cuda)
    assert ask() == 1024 and ask(trained=False) == 896  # 622 MB are needed anyway; 300 MB of logits
    assert weight_bytes_beside(151936, 1024, 2, 2, summed=False) == 0
    assert ask(trained=False, allowance=600_000_000) == 1664


def test_one_chunk_where_the_memory_is_allowed(device):
    ask = partial(cuda_chunk, 8192, 151936, 1024, 2, 2, device.cuda)
    whole = 8192 * row_stride(151936) * 2  # 2.5 GB
    assert ask(direct=True, allowance=whole) == 8192 and ask(direct=True, allowance=whole - 1) < 8192
    assert ask(allowance=whole) < 8192, "a sum in fp32 is beside the logits"
    device.free = whole
    chunks._of_device.cache_clear()
    cuda_chunk.cache_clear()
    assert ask(direct=True, allowance=whole) < 8192, "at most half of what is free"


def test_linear_score_says_whether_the_head_is_trained(monkeypatch):
    class Asked(Exception):
        pass

    def chunk_of(n, v, d, hidden_bytes, weight_bytes, device, trained, direct, allowance):
        raise Asked(trained, direct, allowance)

    monkeypatch.setattr(head_pass, "cuda_chunk", chunk_of)
    with FakeTensorMode():
        hidden = torch.empty(300, 16, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        weight, targets = torch.empty(1000, 16, device="cuda"), torch.zeros(300, dtype=torch.long, device="cuda")
        narrow = weight.bfloat16()
        for head, memory, said in (
            (weight, None, (False, False, None)),
            (weight.clone().requires_grad_(), 10**9, (True, False, 10**9)),
            (narrow, None, (False, False, None)),
            (narrow.clone().requires_grad_(), None, (True, True, None)),
        ):
            with pytest.raises(Asked) as found:
                linear_score(hidden, head, targets, losses.ce, memory=memory, impl="torch")
            assert found.value.args == said
        with pytest.raises(Asked) as found:  # a sum in bf16 is the gradient: nothing is beside
            linear_score(hidden, head, targets, losses.ce, accum_dtype=torch.bfloat16, impl="torch")
        assert found.value.args == (False, True, None)
        with pytest.raises(Asked) as found, torch.no_grad():
            linear_score(hidden, narrow.clone().requires_grad_(), targets, losses.ce, impl="torch")
        assert found.value.args == (False, False, None)


class Live(TorchDispatchMode):
    """Peak bytes of the storages alive that operations returned, other than those of ``known``."""

    def __init__(self, *known):
        super().__init__()
        self.known = {x.untyped_storage().data_ptr() for x in known}
        self.alive, self.peak, self.marks = {}, 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                key = storage._cdata
                if key not in self.alive and storage.data_ptr() not in self.known:
                    self.alive[key] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, key, None)
        self.peak = max(self.peak, sum(self.alive.values()))
        return out


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("rows", [8, 256])
def test_memory_is_what_the_accounting_says(rows, weight_dtype, monkeypatch):
    """The GPU's way on CPU tensors: a kernel without scratch, products written and added in fp32."""
    n, v, d = 256, 4096, 64
    hidden = torch.randn(n, d).bfloat16().requires_grad_()
    weight = torch.randn(v, d).to(weight_dtype).requires_grad_()
    targets = torch.randint(v, (n,))
    calls = []

    def mm(a, b, out_dtype=None, out=None, real=torch.mm):
        if out_dtype is None:
            return real(a, b, out=out)
        calls.append("mm")
        with torch.utils._python_dispatch._disable_current_modes():
            return out.copy_(a.float() @ b.float())

    def addmm(total, a, b, out_dtype=None, out=None):
        calls.append("addmm")
        assert out is total and out_dtype == torch.float32
        with torch.utils._python_dispatch._disable_current_modes():
            return out.add_(a.float() @ b.float())

    def fused_score(name, knob, logits, targets, mask, weights, stats, correct, losses, fisher, out, **how):
        for x in (stats, correct, losses, fisher, out):
            x.zero_()

    kernel = SimpleNamespace(FUSED_SCORES={"ce"}, DTYPES=(torch.bfloat16,), CAN_KEEP_W=False, fused_score=fused_score)
    monkeypatch.setattr(head_pass, "choose_impl", lambda impl, tensor: kernel)
    monkeypatch.setattr(head_pass, "products_widen", lambda device: True)
    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch, "addmm", addmm)
    with Live(hidden, weight, targets) as live:
        loss, _ = linear_score(hidden, weight, targets, losses.ce, chunk=rows)
        grads = torch.autograd.grad(loss, (hidden, weight))
    beside = live.peak - sum(g.nbytes for g in grads)
    want = bytes_beside(n, v, d, rows, 2, weight.element_size())
    # Beside it what is of size N, the 17 statistics of a token and a dozen vectors; the rows have V = 64 k here.
    assert want <= beside <= want + 200 * n, (beside, want)
    in_one = rows == n and weight_dtype == torch.bfloat16  # the product is the gradient
    assert calls == ([] if in_one else ["mm"] + ["addmm"] * (n // rows - 1))
