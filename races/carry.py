"""A folder with what races.device needs on a machine without a network: packages, text, tokenizer, nanoGPT.

    python -m races.carry luggage --data NOVELS --tokenizer GPT2_FILES --nanogpt nanoGPT
    PYTHONPATH=luggage/site python -m races.device --out figures --data luggage/text --tokenizer luggage/tokenizer

The packages are those of PACKAGES, as wheels for Linux and --python, unpacked; of bitsandbytes' libraries the one for
--cuda stays (4 MB of 150). Of the text so many million characters are taken as come first in --data, by file name, and
two files for validation and test. Nothing of it is ours to commit.
"""

import sys

if not __package__:  # a file by its name finds no package
    print("python -m races.carry: error: type it like this, in the folder that holds races/", file=sys.stderr)
    sys.exit(2)

import argparse
import shutil
import subprocess
import tempfile
import zipfile
from pathlib import Path

from races.common import check_new, race_parser
from runtime.cli import user_errors
from schedules.commandline import alive
from schedules.textlines import read_text

PACKAGES = ("bitsandbytes", "liger-kernel", "cut-cross-entropy", "schedulefree")
PLATFORMS = [f"manylinux_2_{n}_x86_64" for n in (35, 34, 31, 28, 27, 24, 17)] + ["manylinux2014_x86_64"]
TOKENIZER = ("vocab.json", "merges.txt")
NANOGPT = ("train.py", "model.py", "configurator.py")
HELD_OUT = 100_000  # characters of the validation and the test text
LIMIT = 64 * 2**20  # bytes that such a machine may take


def fetch_packages(site: Path, python: str, cuda: str) -> None:
    """Unpacks the wheels of PACKAGES. Raises ValueError where pip finds none or bitsandbytes has no such library."""
    with tempfile.TemporaryDirectory() as folder:
        line = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", folder]
        line += ["--python-version", python, "--implementation", "cp"]
        line += [word for platform in PLATFORMS for word in ("--platform", platform)]
        done = subprocess.run([*line, *PACKAGES], capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"pip found no wheels: {(done.stderr.strip().splitlines() or ['no word'])[-1]}")
        for wheel in sorted(Path(folder).glob("*.whl")):
            with zipfile.ZipFile(wheel) as opened:
                opened.extractall(site)
    kept = f"libbitsandbytes_cuda{cuda}.so"
    if not (site / "bitsandbytes" / kept).is_file():
        raise ValueError(f"--cuda {cuda}: bitsandbytes has no {kept}")
    for library in (site / "bitsandbytes").glob("libbitsandbytes_*.so"):
        if library.name not in (kept, "libbitsandbytes_cpu.so"):
            library.unlink()


def copy_text(data: Path, folder: Path, characters: int) -> None:
    """train.txt, val.txt and test.txt of the texts in ``data``. Raises ValueError for fewer than three."""
    files = sorted(data.glob("*.txt"))
    if len(files) < 3:
        raise ValueError(f"--data {data} has {len(files)} texts (*.txt), expected three or more")
    folder.mkdir(parents=True)
    for name, file in zip(("val", "test"), files, strict=False):
        (folder / f"{name}.txt").write_text(read_text(file)[:HELD_OUT])
    texts, size = [], 0
    for file in files[2:]:
        texts.append(read_text(file)[: characters - size])
        size += len(texts[-1])
        if size >= characters:
            break
    (folder / "train.txt").write_text("\n\n".join(texts))


def copy_files(source: Path, folder: Path, names: tuple[str, ...], flag: str) -> None:
    if missing := [name for name in names if not (source / name).is_file()]:
        raise ValueError(f"{flag} {source} has no {missing[0]}")
    folder.mkdir(parents=True)
    for name in names:
        shutil.copy(source / name, folder / name)


@alive()
def main(argv=None) -> int:
    parser = race_parser("carry", __doc__)
    parser.add_argument("folder", type=Path, help="to make; new")
    parser.add_argument("--data", type=Path, required=True, help="folder of texts")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of vocab.json and merges.txt")
    parser.add_argument("--nanogpt", type=Path, help="checkout of nanoGPT")
    parser.add_argument("--million", type=int, default=22, help="million characters of text (default: %(default)s)")
    parser.add_argument("--python", default="3.12", help="version of that machine's Python (default: %(default)s)")
    parser.add_argument("--cuda", default="130", help="its CUDA, as bitsandbytes names it (default: %(default)s)")
    parser.add_argument("--packages", action=argparse.BooleanOptionalAction, default=True, help="fetch them")
    args = parser.parse_args(argv)
    with user_errors():
        check_new(args.folder, "folder")
        try:
            copy_text(args.data, args.folder / "text", args.million * 1_000_000)
            copy_files(args.tokenizer, args.folder / "tokenizer", TOKENIZER, "--tokenizer")
            if args.nanogpt:
                copy_files(args.nanogpt, args.folder / "nanoGPT", NANOGPT, "--nanogpt")
                (args.folder / "nanoGPT" / "data").mkdir()
            if args.packages:
                fetch_packages(args.folder / "site", args.python, args.cuda)
        except (ValueError, OSError):
            shutil.rmtree(args.folder, ignore_errors=True)
            raise
    size = sum(p.stat().st_size for p in args.folder.rglob("*") if p.is_file())
    beyond = f", more than the {LIMIT / 2**20:.0f} MiB that it may have: lower --million" if size > LIMIT else ""
    print(f"{args.folder}: {size / 2**20:.1f} MiB{beyond}")
    return 1 if beyond else 0


if __name__ == "__main__":
    sys.exit(main())
