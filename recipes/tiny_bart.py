"""A small BART that was pre-trained as the published one: a folder in Hugging Face's layout, for --model.

    python -m recipes.tiny_bart runs/tiny-bart --data novels --data web                # for a GPU
    python -m recipes.tiny_bart runs/tiny-bart --data novels --size bart-micro --steps 1000 --batch 16 --seq-len 128
    python -m recipes.tiny_bart runs/tiny-bart --data novels --data web --resume       # go on after a signal
    python finetune_seq2seq.py --model runs/tiny-bart --preset none --data scitldr --max-source 256 --max-target 64

The folders are read as train_lm.py reads them: of their documents a twentieth, or the split named val, is held out to
validate, as many to test. On the rest a byte-level BPE is trained, and with it finetune_seq2seq.py --denoise trains
random weights to undo the noise of data/denoising.py (Lewis et al., 2020): 30 % of a block's tokens masked in spans,
its sentences permuted. That run's folder is FOLDER-run, and its best weights become FOLDER. bart-mini has 4 + 4 layers,
256 wide, 10.0 M parameters with 8192 tokens; bart-micro 2 + 2 layers, 128 wide, 2.2 M. A GPU is taken by itself.
"""

import sys

if not __package__:  # a file by its name finds no package
    print("python -m recipes.tiny_bart: error: type it like this, in the folder that holds recipes/", file=sys.stderr)
    sys.exit(2)

import functools
import hashlib
import itertools
import json
import subprocess
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from tokenizers.processors import TemplateProcessing

from data.denoising import MASK, one_line, open_text
from data.files import write_cached
from data.sources import Source
from data.summaries import SPECIALS
from data.tokenizer import TOKENIZER_CONFIG, byte_level_bpe
from model.gpt2 import parameter_count
from model.seq2seq import SIZES
from model.seq2seq_hub import export
from runtime.cli import Parser, user_errors
from runtime.process import command, end_with_parent, give_back, handled
from schedules.commandline import alive

SCRIPT = Path(__file__).resolve().parents[1] / "finetune_seq2seq.py"
MASKED = 0.3  # share of the tokens (the paper, section 2.2)
NAMES = dict(zip(("bos_token", "pad_token", "eos_token"), SPECIALS, strict=True)) | dict(mask_token=MASK)
LEAST = 256 + len(NAMES)


def train_tokenizer(sources: list[Source], size: int, cache: Path) -> Path:
    """The folder in ``cache`` of a byte-level BPE of at most ``size`` tokens, trained on the ``sources``' train splits,
    as transformers reads it: <s>, <pad>, </s>, <mask> are 0 to 3, and every word begins with its blank, the first too.
    One that is there is taken."""
    trains = [source.splits["train"] for source in sources]
    digest = hashlib.sha256(" ".join(part.hash for part in trains).encode()).hexdigest()[:12]
    folder = cache / f"bart-bpe{size}-{digest}"
    if not (folder / TOKENIZER_CONFIG).is_file():
        print(f"training a tokenizer of {size} tokens into {folder}", file=sys.stderr, flush=True)
        backend = byte_level_bpe(itertools.chain.from_iterable(map(one_line, trains)), size, tuple(NAMES.values()))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        bos, eos = NAMES["bos_token"], NAMES["eos_token"]
        around = [(token, backend.token_to_id(token)) for token in (bos, eos)]
        backend.post_processor = TemplateProcessing(single=f"{bos} $A {eos}", special_tokens=around)
        plain = dict(tokenizer_class="PreTrainedTokenizerFast", clean_up_tokenization_spaces=False)
        files = {"tokenizer.json": backend.to_str(), TOKENIZER_CONFIG: json.dumps(NAMES | plain, indent=2)}
        for name, text in files.items():
            write_cached(folder / name, lambda file, text=text: file.write(text.encode()))
    return folder


def run_script(flags: list[str]) -> int:
    """The exit code of finetune_seq2seq.py with ``flags``. A signal reaches it once, through this process, with which
    it ends."""
    how = dict(preexec_fn=end_with_parent) if sys.platform == "linux" else {}  # Windows takes none
    child = subprocess.Popen([sys.executable, str(SCRIPT), *flags], start_new_session=True, **how)
    old = handled(lambda number, frame: child.send_signal(number))
    try:
        code = child.wait()
    finally:
        give_back(old)
    return 128 - code if code < 0 else code


@functools.partial(command, speaks=False)  # the script does
def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m recipes.tiny_bart", usage=None, description=__doc__)
    sizes = [name for name in SIZES if name.startswith("bart")]
    add = parser.add_argument
    add("folder", type=Path, help="folder to write")
    add(
        "--data",
        action="append",
        required=True,
        metavar="FOLDER",
        help="text, as train_lm.py takes it; may be repeated",
    )
    add("--size", default="bart-mini", choices=sizes, metavar="NAME", help=f"{', '.join(sizes)} (default: %(default)s)")
    add("--vocab", type=int, default=8192, help="tokens (default: %(default)s)")
    add("--seq-len", type=int, default=256, help="tokens of a block, <s> and </s> included (default: %(default)s)")
    add("--steps", type=int, default=10_000, help="optimizer steps (default: %(default)s)")
    add("--batch", type=int, default=64, help="blocks in a step (default: %(default)s)")
    add("--lr", type=float, default=1e-3, help="peak learning rate (default: %(default)s)")
    add("--seed", type=int, default=1, help="(default: %(default)s)")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to run (default: %(default)s)")
    add("--cache", type=Path, default=Path("cache"), help="folder of tokenizers and tokens (default: %(default)s)")
    add("--resume", action="store_true", help="go on with FOLDER-run")
    given = parser.parse_args(argv)
    run = given.folder.with_name(f"{given.folder.name}-run")
    with user_errors(), alive():
        if (given.folder.is_dir() and any(given.folder.iterdir())) or given.folder.is_file():
            raise ValueError(f"{given.folder} exists and is not an empty folder; give another one")
        if given.vocab < LEAST:
            raise ValueError(f"--vocab {given.vocab}: expected at least {LEAST}, bytes and special tokens")
        tokenizer = train_tokenizer(open_text(",".join(given.data)), given.vocab, given.cache)
    on_cpu = given.device == "cpu" or not torch.cuda.is_available()
    flags = dict(
        out=run, data=",".join(given.data), denoise=MASKED, tokenizer=tokenizer, size=given.size, preset="none"
    )
    flags |= {name: getattr(given, name) for name in ("steps", "batch", "lr", "seed", "device", "cache")}
    flags |= dict(max_source=given.seq_len, max_target=given.seq_len, max_new_tokens=given.seq_len - 1)
    flags |= dict(micro_batch=min(given.batch, 16) if on_cpu else given.batch, eval_every=max(1, given.steps // 10))
    flags |= dict(validation_examples=256, test_examples=32, beams=1, no_repeat_ngram=0)
    line = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    if code := run_script([*line, "--random-start", *(["--resume"] if given.resume else [])]):
        return code
    with user_errors():
        _, model = export(run, given.folder)
    tokens = f"{model.config.vocab_size} tokens"
    print(f"{given.folder}: {given.size}, {parameter_count(model) / 1e6:.2f} M parameters, {tokens}, from {run}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
