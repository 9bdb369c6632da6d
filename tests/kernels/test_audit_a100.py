"""kernels.audit: the kernels' machine code for an A100."""

from machine_code import no_spills_and_wide_accesses


def test_no_spills_and_wide_accesses_on_a100(tmp_path):
    """Longer rows take the same loops; `python -m kernels.audit` compiles them too."""
    no_spills_and_wide_accesses(80, 50257, tmp_path)
