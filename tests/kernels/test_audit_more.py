"""kernels.audit: machine code for an A100, for rows that are longer than the registers, and of the layers."""

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


def test_the_layers_spill_nothing_and_move_16_bytes_at_a_time(tmp_path):
    """bf16 for an H100, at the widths of Qwen3-0.6B; `python -m kernels.audit` compiles them for others."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    # Of each tensor a lane has two vectors of 16 bytes; gains [D] beside them. The sum of a gain's gradient, once a
    # program, may be narrow. These three do all that the others do, and need the most registers.
    command = """
from kernels.audit import audit
most = {"norm_backward_kernel, gain": (7, 4), "rope_backward_kernel, gain": (8, 2), "swiglu_backward_kernel": (6, 4)}
rows = audit(90, None, "bf16", labels=most)
assert {r["kernel"] for r in rows} == set(most)
for r in rows:
    assert r["spill_bytes"] == r["spill_instructions"] == 0 and r["registers"] <= 128, r
    loads, stores = most[r["kernel"]]
    assert r["loads"] == {128: loads} and r["stores"].pop(128) == stores, r
    assert not r["stores"] or r["kernel"] == "rope_backward_kernel, gain", r
    assert r["instructions_per_element"] <= 38, r  # what an H100 issues while an element is read and written
"""
    done = subprocess.run([sys.executable, "-c", command], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1500:]
