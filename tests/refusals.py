"""A command that must refuse what it is given."""

import re

import pytest


def refused(capsys, match, run, out) -> None:
    """``run()`` ends with exit code 2 and one line on stderr that matches, and changes nothing in ``out``."""
    before = sorted(out.rglob("*")) if out.exists() else None
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run()
    err = capsys.readouterr().err
    assert stopped.value.code == 2
    assert re.search(match, err), err
    # One line, the last; before it only notes of caches that had to be made.
    errors = [line for line in err.strip().splitlines() if ": error: " in line]
    assert errors == err.strip().splitlines()[-1:] and "Traceback" not in err, err
    assert (sorted(out.rglob("*")) if out.exists() else None) == before
