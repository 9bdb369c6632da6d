"""The short lists and the locks agree, and a lock leaves nothing open."""

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LOCKS = ("requirements-lock-cpu.txt", "requirements-lock-cuda.txt")


def lines(name: str) -> list[str]:
    """The requirements of a file, with continued lines as one and without comments."""
    text = (ROOT / name).read_text().replace("\\\n", " ")
    return [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]


def pins(name: str) -> dict[str, str]:
    """Name -> version of each requirement of a lock. What is no pin with a SHA-256 fails."""
    found = {}
    for line in lines(name):
        requirement, *hashes = line.split(" --hash=sha256:")
        assert hashes and all(re.fullmatch("[0-9a-f]{64}", h.strip()) for h in hashes), f"{name}: {line[:80]}"
        package = Requirement(requirement.strip())
        (pin,) = package.specifier
        assert pin.operator == "==" and canonicalize_name(package.name) not in found, f"{name}: {requirement}"
        found[canonicalize_name(package.name)] = pin.version
    return found


@pytest.mark.parametrize("lock", LOCKS)
def test_every_pin_of_the_short_list_is_in_the_locks(lock):
    locked, asked = pins(lock), [Requirement(line) for line in lines("requirements.txt")]
    assert len(asked) > 10 and len(locked) > len(asked)
    for package in asked:
        assert [s.operator for s in package.specifier] == ["=="], package
        assert locked[canonicalize_name(package.name)].removesuffix("+cpu") in package.specifier, package


def test_the_locks_differ_in_cuda_alone():
    cpu, cuda = (pins(lock) for lock in LOCKS)
    assert cpu.pop("torch") == cuda.pop("torch") + "+cpu"
    assert {name: version for name, version in cpu.items() if cuda.get(name) != version} == {}
    more = cuda.keys() - cpu.keys()
    assert {name for name in more if not name.startswith(("nvidia-", "cuda-"))} == {"colorama", "httpx2-jsfetch"}
    assert {"cuda-toolkit", "nvidia-cublas", "nvidia-nccl-cu13"} <= more  # colorama and jsfetch: not for Linux


def test_the_tests_run_on_what_the_locks_hold():
    """The other lists, of the tests and of options, pin nothing that a lock has otherwise."""
    locked, others = pins(LOCKS[1]), sorted(ROOT.glob("requirements-*.txt"))
    for file in (path for path in others if path.name not in LOCKS):
        for package in map(Requirement, (line for line in lines(file.name) if not line.startswith("-"))):
            version = locked.get(canonicalize_name(package.name))
            assert version is None or version in package.specifier, f"{file.name}: {package}, locked {version}"
