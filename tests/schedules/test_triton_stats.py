"""FoT's dot products as one kernel: the figures of torch's operations, and a sample's bytes."""

import json
import os
import subprocess
import sys

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="Triton has wheels for Linux alone")

from schedules import gradient_stats, triton_stats
from schedules.gradient_stats import GradientStats

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("micro", [True, False])
@pytest.mark.parametrize("begin", [True, False])
def test_one_kernel_gives_the_sums_of_torch(begin, micro):
    generator = torch.Generator().manual_seed(0)
    piece = triton_stats.BLOCK * triton_stats.LOOPS
    held = []
    for n in (1, 7, 1024, piece, piece + 5, 3 * piece - 1):
        g, m, v, o = (torch.randn(n, generator=generator).to(DEVICE) for _ in range(4))
        v = v.square() * 1e-3
        v[::3] = 0  # a row of an embedding that was never seen
        m[::3] = 0
        held.append([g, m, v] + ([o.bfloat16()] if micro else []))
    scalars = torch.tensor(1e-8, device=DEVICE, dtype=torch.float64), torch.tensor(3e-8, device=DEVICE).double(), 0.7
    got, want = (f(held, *scalars, begin) for f in (triton_stats.dots, gradient_stats._dots))
    assert got.shape == want.shape == (6 if begin else 1,) and got.dtype == torch.float64
    # Sums of 32 k products of both signs in fp32, in another order: 2^-24 sqrt(n) of the sum of their sizes.
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))


def test_a_run_s_samples_are_the_same(monkeypatch):
    found = []
    for dots in (gradient_stats._dots, triton_stats.dots):
        monkeypatch.setattr(gradient_stats, "_dots_of", lambda device, dots=dots: dots)
        torch.manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(shape, device=DEVICE)) for shape in ((30, 40), (40,), (2, 3, 4))]
        optimizer = torch.optim.AdamW(weights, lr=1e-2)
        stats = GradientStats(optimizer)
        for step in range(12):
            for w in weights:
                w.grad = w.detach() * 0.3 + torch.randn_like(w)
            if step % 4 == 1:
                stats.micro(0.5)
            for w in weights:
                w.grad = w.grad + w.detach() * 0.3 + torch.randn_like(w)
            stats.sample(step % 2 == 1, 1e-2)
            optimizer.step()
        found.append(stats.sums)
    assert found[0][0] == 5
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


def test_the_kernel_reads_every_number_once_and_spills_nothing(tmp_path):
    """The machine code for an H100: a lane has 8 of the 1024 elements at a time."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = """
import json, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels.audit import read_code
from schedules.triton_stats import BLOCK, LOOPS, WARPS, sums_kernel
types = dict(table_ptr="*i64", pieces_ptr="*i64", scalars_ptr="*fp32", out_ptr="*fp32")
signature = {name: types.get(name, "constexpr") for name in sums_kernel.arg_names}
constants = dict(BEGIN=True, MICRO=True, BLOCK=BLOCK, LOOPS=LOOPS)
source = ASTSource(fn=sums_kernel, signature=signature, constexprs=constants, attrs={})
options = dict(num_warps=WARPS, enable_fp_fusion=True)
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
print(json.dumps(read_code(compiled, dict(R=32 * WARPS, W=1), BLOCK)))
"""
    done = subprocess.run([sys.executable, "-c", command], env=env, capture_output=True, text=True, check=True)
    code = json.loads(done.stdout.splitlines()[-1])
    assert (
        code["spill_bytes"] == code["spill_instructions"] == 0 and code["registers"] <= 128
    )  # four programs at a time
    # g, m and v in fp32 and o in bf16; beside them the piece, the addresses and three scalars.
    assert code["loads"]["16"] == 8 and code["loads"]["32"] == 3 * 8 + 3 and code["stores"] == {"32": 6}
