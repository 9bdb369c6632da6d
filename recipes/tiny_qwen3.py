"""A tiny Qwen3 for GSM8K on a CPU: a folder as the hub's, with a tokenizer of GSM8K's own words and a base that has
read some of them, so that a LoRA run of half a minute learns something to see.

    python -m recipes.tiny_qwen3 runs/tiny-qwen3                                     # two minutes on one core
    python finetune_gsm8k.py --model runs/tiny-qwen3 --base fp32 --rank 16 --lora-alpha 32 --batch 8 --steps 150 \\
        --lr 1e-2 --seq-len 320 --heldout 96 --eval-every 50 --fot-window 8 --eval-problems 4 --generate-tokens 16 \\
        --out runs/tiny-lora

The tokenizer is a byte-level BPE with Qwen3's special tokens. The base is drawn from the seed and then trained in full
on the questions of train and, apart from them, the words of the solutions without annotations: what belongs together,
and how the calculator is used, is left to the adapter. The 256 problems that finetune_gsm8k.py holds out by default are
not read. The same flags give the same folder, bit for bit on the same machine.
"""

import sys

if not __package__:  # a file by its name finds no package
    print("python -m recipes.tiny_qwen3: error: type it like this, in the folder that holds recipes/", file=sys.stderr)
    sys.exit(2)

import json
import math
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from tqdm import tqdm

from data.gsm8k import load_gsm8k, split_heldout, text_target
from data.packing import Example, batch_indices, pack
from data.prompts import THOUGHT, TURNS
from data.tokenizer import byte_level_bpe
from kernels import linear_score
from kernels.losses import ce
from model.decoder import Decoder, DecoderConfig
from model.decoder_hub import save_decoder
from model.gpt2 import parameter_count
from runtime.cli import Parser, user_errors
from runtime.machine import keep_freed_memory, to_device
from runtime.optim import take_step
from schedules import make_rule
from schedules.commandline import alive

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
HELDOUT = 256  # problems of train that the base does not read: finetune_gsm8k.py's default, and fewer nest in it
# What the base reads beside the questions, each a text of its own: nothing, the solutions' words, or with annotations.
TEXTS = {
    "questions": lambda problems: [],
    "words": lambda problems: [text_target(p, annotations=False) for p in problems],
    "solutions": lambda problems: [text_target(p) for p in problems],
}
ROW = 320  # tokens of a packed row in pre-training


def train_tokenizer(texts: Iterable[str], size: int):
    """A byte-level BPE (tokenizers.Tokenizer) of at most ``size`` tokens with Qwen3's special ones: id 0 ends a text,
    <think> and </think>, which are no special tokens to Qwen3 either, come last. Raises ValueError for too few."""
    least = 256 + len(SPECIAL)
    if size < least:
        raise ValueError(f"a vocabulary of {size}: expected at least {least}, bytes and special")
    tokenizer = byte_level_bpe(texts, size - 2, SPECIAL[:3])
    tokenizer.add_tokens(list(SPECIAL[3:]))
    return tokenizer


def pretrain(model: Decoder, rows: list[Example], steps: int, batch: int, lr: float, seed: int) -> float:
    """Trains every parameter, with all tokens of the examples as targets. Returns the mean loss of the last tenth of
    the steps, in nats per token."""
    device = model.embed_tokens.weight.device
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    rule = make_rule("cosine", optimizer, steps, warmup=0.05, floor=0.1)
    losses = []
    for step in tqdm(range(steps), desc="pre-training", unit="step", dynamic_ncols=True):
        part = pack([rows[i] for i in batch_indices(len(rows), step, batch, seed)], ROW)
        x, y, documents = (to_device(t, device) for t in (part.tokens_RT, part.targets_RT, part.documents_RT))
        hidden = model(x, documents_BT=documents)
        loss, _ = linear_score(hidden.flatten(0, 1), model.head_weight, y.flatten(), ce)
        loss.backward()
        losses.append(loss.detach())
        take_step(optimizer, model.parameters(), 1.0, losses[-1])
        rule.step()
    return float(torch.stack(losses[-max(1, steps // 10) :]).mean())


@alive()
def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m recipes.tiny_qwen3", usage=None, description=__doc__)
    parser.add_argument("folder", type=Path, help="folder to write")
    parser.add_argument("--data", default="gsm8k", help="gsm8k, or a folder of train.jsonl and test.jsonl")
    parser.add_argument("--text", default="words", choices=tuple(TEXTS), help="what the base reads (default: words)")
    parser.add_argument("--vocab", type=int, default=2048, help="tokens (default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=128, help="width, a multiple of 64 (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=400, help="of pre-training; 0 is none (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="texts in a step (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="(default: %(default)s)")
    given = parser.parse_args(argv)
    with user_errors():
        if (given.folder.is_dir() and any(given.folder.iterdir())) or given.folder.is_file():
            raise ValueError(f"{given.folder} exists and is not an empty folder; give another one")
        if given.hidden < 64 or given.hidden % 64:
            raise ValueError(f"--hidden {given.hidden}: expected a multiple of 64, NF4's block")
        for name, value in dict(layers=given.layers, batch=given.batch).items():
            if value < 1:
                raise ValueError(f"--{name} {value}: expected at least 1")
        if given.steps < 0 or not 0 < given.lr < math.inf:
            raise ValueError(f"--steps {given.steps} --lr {given.lr}: expected 0 or more, and a positive number")
        problems = load_gsm8k(given.data, "train")
        tokenizer = train_tokenizer((f"{p.question}\n{p.answer_text}" for p in problems), given.vocab)
        D, vocab = given.hidden, -(-tokenizer.get_vocab_size() // 64) * 64
        heads = dict(num_attention_heads=D // 32, num_key_value_heads=D // 64, head_dim=32)
        more = dict(max_position_embeddings=1024, tie_word_embeddings=True, eos_token_id=0)
        config = DecoderConfig(vocab, D, 2 * D, given.layers, **heads, **more)
        keep_freed_memory()
        torch.manual_seed(given.seed)
        model, end = Decoder(config), tokenizer.token_to_id(SPECIAL[0])
        read, _ = split_heldout(problems, min(HELDOUT, len(problems) // 2))
        texts = [p.question.strip() for p in read] + TEXTS[given.text](read)
        rows = [Example(str(i), [end, *tokenizer.encode(text).ids, end], 1) for i, text in enumerate(texts)]
        rows = [e for e in rows if e.length <= ROW]
        learnt, began = "", time.perf_counter()
        if given.steps:
            loss = pretrain(model, rows, given.steps, given.batch, given.lr, given.seed)
            seconds = time.perf_counter() - began
            learnt = f"; {given.steps} steps on {given.text} to {loss:.3f} nats per token in {seconds:.0f} s"
        about = json.dumps(dict(chat_template=TURNS + THOUGHT)).encode()
        files = {"tokenizer.json": tokenizer.to_str().encode(), "tokenizer_config.json": about}
        save_decoder(model, given.folder, files)
    print(f"{given.folder}: {parameter_count(model) / 1e6:.2f} M parameters, {vocab} tokens{learnt}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
