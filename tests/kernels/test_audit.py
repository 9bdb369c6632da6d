"""kernels.audit: what the compiler makes of the kernels, and how their instructions are counted."""

import json
import os
import subprocess
import sys
from collections import Counter

from machine_code import no_spills_and_wide_accesses


def test_kernels_compile_for_gpus_without_one(tmp_path):
    # In a process of its own: under the interpreter the kernels are not compilable functions. bf16 at the
    # vocabularies that matter is the next test.
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [
        sys.executable,
        "-m",
        "kernels.audit",
        "--vocab",
        "1000",
        "--dtype",
        "fp32",
        "--capability",
        "80",
        "--kernel",
        "tail",
    ]
    done = subprocess.run([*command, "--json", tmp_path / "a.json"], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert len(rows) == 2 and all(r["registers"] > 0 and r["spill_bytes"] == 0 for r in rows)
    env["TRITON_INTERPRET"] = "1"
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "unset it" in done.stderr


def test_no_spills_and_wide_accesses_on_h100(tmp_path):
    no_spills_and_wide_accesses(90, 50257, tmp_path)


def test_instructions_are_counted_as_often_as_they_run():
    from kernels.audit import executed

    code = """
        /*0000*/                   S2R R1, SR_TID.X ;
.L_x_1:
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   LDG.E.128 R8, desc[UR4][R2.64+0x10] ;
        /*0030*/                   MUFU.EX2 R12, R4 ;
        /*0040*/               @P1 BRA `(.L_x_1) ;
        /*0050*/               @P2 BRA `(.L_x_3) ;
.L_x_2:
        /*0060*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0070*/               @P1 BRA `(.L_x_2) ;
.L_x_3:
        /*0080*/               @P3 BRA `(.L_x_5) ;
.L_x_6:
        /*0090*/                   EXIT ;
.L_x_5:
        /*00a0*/                   CALL.REL.NOINC `(f) ;
        /*00b0*/                   BRA `(.L_x_6) ;
.L_x_4:
        /*00c0*/                   BRA `(.L_x_4);
"""
    run = executed(code.splitlines(), 2, 3)
    loop = ["LDG.E.128", "LDG.E.128", "MUFU.EX2", "BRA"]
    # The last is padding behind the end; what stands there for rare rows is not counted.
    assert Counter(run) == Counter(["S2R", *3 * loop, *3 * ["BRA"], "EXIT"])
