"""kernels.audit: the kernels' machine code for an A100, and for rows that are longer than the registers."""

import pytest
from machine_code import no_spills_and_wide_accesses


@pytest.mark.parametrize("capability, vocab", [(80, 25129), (90, 151936)])
def test_no_spills_and_wide_accesses(capability, vocab, tmp_path):
    """On an A100 rows of half the length, which compile in half the time; `python -m kernels.audit` compiles all."""
    no_spills_and_wide_accesses(capability, vocab, tmp_path)
