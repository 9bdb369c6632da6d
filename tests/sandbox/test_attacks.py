"""The attacks of attacks.py, run where they may be: see confined.py."""

import pytest
from confined import run, why_not


@pytest.mark.parametrize("root", [False, True], ids=["a user without privileges", "root's programs"])
def test_attacks(root):
    try:
        able = run("-c", "import pytest, sandbox", root=root)
    except OSError as error:
        pytest.skip(f"{why_not() or 'this process may try them itself'} ({error})")
    if able.returncode:
        pytest.skip(f"an ordinary user cannot run the tests here: {able.stderr.strip()[-200:]}")
    command = ["-m", "pytest", "--noconftest", "-p", "no:cacheprovider", "-rs", "tests/sandbox/attacks.py"]
    command += ["-k", "limits and (true or root or bomb)"] * root  # where its programs have another user
    done = run(*command, root=root)
    print(done.stdout)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-8000:] + done.stderr[-2000:]
