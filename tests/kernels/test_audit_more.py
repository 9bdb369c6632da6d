"""kernels.audit: the kernels' machine code for an A100, and for rows that are longer than the registers."""

import os
import subprocess
import sys

import pytest
from machine_code import no_spills_and_wide_accesses


@pytest.mark.parametrize("capability, vocab", [(80, 50257), (90, 151936)])
def test_no_spills_and_wide_accesses(capability, vocab, tmp_path):
    """On an A100 longer rows take the same loops; `python -m kernels.audit` compiles them too."""
    no_spills_and_wide_accesses(capability, vocab, tmp_path)


def test_a_loop_of_two_stages_copies_ahead(tmp_path):
    """What --paths measures: the next K vectors are on their way to shared memory. With nothing held, as that compiles
    in seconds."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = """
from kernels.audit import compile_for, read_code
from kernels.bench.timing import DTYPE_OF
from kernels import triton_impl as impl
shape = impl.score_shape(151936, DTYPE_OF["bf16"], held=0, stages=2)
constants = dict(LINK=0, order_ptr=None, SCORE=impl.FUSED_SCORES["dpsm"], HAS_B=False) | shape
r = read_code(compile_for(impl.score_kernel, constants, 90, "bf16", 151936), constants, 151936)
assert r["copies"] == {128: 4 * shape["K"]} and r["spill_bytes"] <= 48, r
"""
    done = subprocess.run([sys.executable, "-c", command], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1500:]
