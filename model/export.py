"""A model for other programs, an adapter merged into it: a folder in Hugging Face's layout, or a GGUF file.

    python -m model.export Qwen/Qwen3-0.6B merged --adapter runs/NAME             # 16 bit, for transformers
    python -m model.export runs/smollm2 tuned.gguf --adapter runs/NAME --quantise Q8_0  # for llama.cpp

MODEL is a folder, a name on the hub or a GGUF file. The sum of weights and adapter is made in fp32.
"""

import sys

if not __package__:  # a file by its name finds no package
    print("python -m model.export: error: type it like this, in the folder that holds model/", file=sys.stderr)
    sys.exit(2)

from pathlib import Path

import torch

from model import gguf_hub
from model.decoder_hub import config_and_tokenizer, load_decoder, plain_parameters, plain_tensor, save_decoder
from model.lora_hub import load_adapter
from runtime.cli import Parser, user_errors
from schedules.commandline import alive

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@alive()
def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m model.export", usage=None, description=__doc__)
    parser.add_argument("model", help="folder, hub id or GGUF file")
    parser.add_argument("out", type=Path, help="folder to write, or a file that ends in .gguf")
    parser.add_argument("--adapter", help="a PEFT adapter of that model, or a run's folder with one, merged into it")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="of a folder (default: bf16)")
    parser.add_argument("--quantise", choices=gguf_hub.WRITTEN, help="of a GGUF file (default: F16)")
    given = parser.parse_args(argv)
    to_gguf = given.out.suffix == ".gguf"
    if given.dtype if to_gguf else given.quantise:
        unread, other = ("--dtype", "a GGUF file") if to_gguf else ("--quantise", "a folder")
        parser.error(f"{unread} is not read where {given.out}, {other}, is written")
    with user_errors(), torch.no_grad():
        if given.out.exists() and (given.out.is_file() or any(given.out.iterdir())):
            raise ValueError(f"{given.out} exists and is not an empty folder; give another one")
        config, files = config_and_tokenizer(given.model)
        model = load_decoder(given.model)
        if given.adapter:
            load_adapter(model, given.adapter, given.model)
        if to_gguf:
            tensors = ((name, plain_tensor(model, name, torch.float32)) for name in plain_parameters(config))
            gguf_hub.save_gguf(given.out, config, tensors, files, given.quantise or "F16", Path(given.model).name)
        else:
            save_decoder(model, given.out, files, DTYPES[given.dtype or "bf16"])
    print(f"wrote {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
