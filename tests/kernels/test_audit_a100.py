"""kernels.audit: the kernels' machine code for an A100."""

import pytest
from machine_code import no_spills_and_wide_accesses


@pytest.mark.parametrize("vocab", [50257, 151936])
def test_no_spills_and_wide_accesses_on_a100(vocab, tmp_path):
    no_spills_and_wide_accesses(80, vocab, tmp_path)
