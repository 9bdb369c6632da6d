"""Invented GSM8K problems, their files, and a tiny Qwen3 with its tokenizer."""

import json
import random
from pathlib import Path

import torch

from data.programs import Problem
from data.prompts import THOUGHT, TURNS

NAMES = "Ann Ben Cleo Dan Eve Finn Gus Hana".split()
THINGS = "apples books coins plums".split()


def problem(seed: int) -> dict:
    """One or two steps of arithmetic in GSM8K's format."""
    r = random.Random(seed)
    name, thing, a, b, c = r.choice(NAMES), r.choice(THINGS), r.randint(2, 30), r.randint(2, 30), r.randint(2, 5)
    total = a + b
    question = f"{name} has {a} {thing} and gets {b} more."
    answer = f"{name} has {a}+{b} = <<{a}+{b}={total}>>{total} {thing}.\n"
    if seed % 2:
        question += f" Then the {thing} become {c} times as many."
        answer += f"Then there are {total}*{c} = <<{total}*{c}={total * c}>>{total * c} {thing}.\n"
        total *= c
    return {"question": f"{question} How many {thing} does {name} have?", "answer": f"{answer}#### {total}"}


def solved(answer: str, question: str = "How many?", name: str = "train/0") -> Problem:
    return Problem(name, question, answer, answer.rpartition("####")[2].strip())


def write_sums(folder: Path) -> Path:
    """A set of six problems in the published form, each its own sum."""
    for split in ("train", "test"):
        rows = [
            {"question": f"What is {i} and 10?", "answer": f"It is {i}+10=<<{i}+10={i + 10}>>{i + 10}.\n#### {i + 10}"}
            for i in range(6)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def json_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def write_tokenizer(folder: Path, texts, size: int = 400) -> int:
    """A byte-level BPE with Qwen3's special tokens, trained on the texts, as tokenizer.json. Its number of tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer.get_vocab_size()


def write_model(folder: Path, texts, **shape) -> Path:
    """A tiny random Qwen3 as transformers saves one, with its tokenizer."""
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    size = write_tokenizer(folder, texts)
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(chat_template=TURNS + THOUGHT)))
    fields = dict(vocab_size=size + 5, hidden_size=64, intermediate_size=128, num_hidden_layers=2, head_dim=16)
    fields |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, eos_token_id=0)
    torch.manual_seed(0)
    config = transformers.Qwen3Config(**fields | dict(tie_word_embeddings=True, initializer_range=0.1) | shape)
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder
