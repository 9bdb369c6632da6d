"""What the compiler must make of the kernels. Two files of tests share it, so that two workers compile."""

import os
import subprocess
import sys


def no_spills_and_wide_accesses(capability, vocab, tmp_path):
    """bf16 rows of ``vocab`` for CUDA ``capability``, compiled here: asserts registers, accesses and instructions."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = f"""
import triton
from kernels.audit import audit
read = "part of it twice" if {vocab} == 151936 else "one read"
most = {{
    "moments_kernel": 20, "moments_kernel, tail": 20, "gradient_kernel": 17, "gradient_kernel, tail": 24,
    f"score_kernel, dpsm, {{read}}": 25 if {vocab} == 151936 else 23, "rest_kernel, dpsm": 65,
}}
powers = f"score_kernel, power, {{read}}"
if ({capability}, {vocab}) == (80, 50257):  # the H100's are compiled from the same loops: two stand for all
    most = {{"gradient_kernel": 17, powers: most[f"score_kernel, dpsm, {{read}}"] + 6}}  # at most 6 for a real order
elif {vocab} == 50257:  # their loops are the same for any length
    most |= {{"gradient_kernel, order": 23, "gradient_kernel, entropy": 24, "gradient_kernel, softcap": 48}}
    most |= {{"moments_kernel, softcap": 40}}
else:
    most = {{name: n for name, n in most.items() if name[:5] in ("score", "rest_")}}
rows = {{r["kernel"]: r for r in audit({capability}, {vocab}, "bf16", labels=set(most))}}
assert set(rows) == set(most), list(rows)
for name, r in rows.items():
    assert r["spill_bytes"] == r["spill_instructions"] == 0, r
    more = 1 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9) else 1.06
    vectors = r["PIECES"] or r["K"]
    # Every load of a row is a vector. Narrow ones: the target's and the edges' elements.
    assert r["loads"][128] >= vectors and r["loads"].get(16, 0) <= 3 and 64 not in r["loads"], r
    if "moments" not in name:
        assert r["stores"][128] >= vectors, r
    assert r["instructions_per_element"] <= more * most[name], r
    special = 2 if name[:5] in ("score", "rest_") else 1
    special = {{powers: 4, "gradient_kernel, order": 2}}.get(name, special)
    special = {{"moments_kernel, softcap": 3.5, "gradient_kernel, softcap": 4}}.get(name, special)
    assert special <= r["special_per_element"] <= special + 0.3, r
"""
    done = subprocess.run([sys.executable, "-c", command], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1500:]
