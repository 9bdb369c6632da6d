"""The folder for a machine without a network: what is in it, and what cannot be made."""

import subprocess
import zipfile
from pathlib import Path

import pytest
from refusals import refused

from races import carry


@pytest.fixture
def sources(tmp_path):
    """Four texts, a tokenizer's files, and three scripts."""
    for folder, names in (("texts", [f"{c}.txt" for c in "abcd"]), ("tok", carry.TOKENIZER), ("gpt", carry.NANOGPT)):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).write_text(f"{name} " * 10)
    return tmp_path


@pytest.fixture
def wheels(monkeypatch):
    """Instead of pip: wheels of two packages, one with bitsandbytes' libraries."""
    asked = []

    def run(line, **how):
        asked.append(line)
        folder = Path(line[line.index("-d") + 1])
        with zipfile.ZipFile(folder / "liger_kernel-1-py3-none-any.whl", "w") as made:
            made.writestr("liger_kernel/__init__.py", "")
        with zipfile.ZipFile(folder / "bitsandbytes-1-py3-none-any.whl", "w") as made:
            for kind in ("cpu", "cuda126", "cuda130", "rocm72"):
                made.writestr(f"bitsandbytes/libbitsandbytes_{kind}.so", kind)
        return subprocess.CompletedProcess(line, 0, "", "")

    monkeypatch.setattr(carry.subprocess, "run", run)
    return asked


def words(sources, out, **changed) -> list[str]:
    flags = {"data": "texts", "tokenizer": "tok", "nanogpt": "gpt"} | changed
    return [str(out), *(w for name, folder in flags.items() for w in (f"--{name}", str(sources / folder)))]


def test_everything_is_there_and_one_library_of_bitsandbytes(sources, wheels, monkeypatch, capsys):
    out = sources / "out"
    assert carry.main([*words(sources, out), "--python", "3.13"]) == 0
    found = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    kept = {f"bitsandbytes/libbitsandbytes_{kind}.so" for kind in ("cpu", "cuda130")}
    assert found == {
        *(f"text/{name}.txt" for name in ("train", "val", "test")),
        *(f"tokenizer/{name}" for name in carry.TOKENIZER),
        *(f"nanoGPT/{name}" for name in carry.NANOGPT),
        *(f"site/{name}" for name in {"liger_kernel/__init__.py", *kept}),
    }
    assert (out / "text" / "val.txt").read_text().startswith("a.txt") and (out / "nanoGPT" / "data").is_dir()
    train = (out / "text" / "train.txt").read_text()
    assert "c.txt" in train and "d.txt" in train and "b.txt" not in train
    assert wheels[0][wheels[0].index("--python-version") + 1] == "3.13" and set(carry.PACKAGES) <= set(wheels[0])
    assert "MiB" in capsys.readouterr().out
    monkeypatch.setattr(carry, "LIMIT", 100)
    assert carry.main(words(sources, sources / "large")) == 1 and "lower --million" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changed, more, says",
    [
        ({"data": "tok"}, [], r"tok has 1 texts \(\*\.txt\), expected three or more"),
        ({"tokenizer": "texts"}, [], "texts has no vocab.json"),
        ({"nanogpt": "tok"}, [], "tok has no train.py"),
        ({}, ["--cuda", "999"], "--cuda 999: bitsandbytes has no libbitsandbytes_cuda999.so"),
    ],
)
def test_what_cannot_be_made_is_one_line_and_leaves_nothing(changed, more, says, sources, wheels, capsys):
    out = sources / "out"
    refused(capsys, says, lambda: carry.main([*words(sources, out, **changed), *more]), out)
    assert not out.exists()


def test_pips_own_word_is_passed_on(sources, monkeypatch, capsys):
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: x\nERROR: no matching distribution\n")
    monkeypatch.setattr(carry.subprocess, "run", lambda *args, **how: failed)
    out = sources / "out"
    refused(capsys, "pip found no wheels: ERROR: no matching", lambda: carry.main(words(sources, out)), out)
