"""Files that others wrote: whatever is in them, a reader reads it, or refuses it in a line, in time and without
much memory. One good file for each reader, and in it something is wrong."""

import dataclasses
import functools
import json
import math
import resource
import struct
import zlib
from pathlib import Path

import pytest
import torch
from fuzz import ODD, content_of, damaged, many_files, many_words, refusal, timely
from other_logs import event_file, trackio
from safetensors.torch import save
from tiny_gsm8k import problem

import finetune_gsm8k
import finetune_seq2seq
import train_lm
from data.cache import HEADER, open_tokens, write_tokens
from data.gsm8k import load_gsm8k
from data.sources import open_source
from data.summaries import load_summaries
from data.tokenizer import load_tokenizer, train_bpe
from data.wordlists import read_neighbours
from eval import campaign
from eval.gsm8k import read_outputs
from eval.report.runs import load_run, read_summaries
from eval.verdicts import read_verdicts
from kernels import Calibration
from model import decoder, decoder_hub, gguf_hub, gpt2, gpt2_hub, lora_hub, seq2seq, seq2seq_hub, weights
from runtime.checkpoint import load_checkpoint
from runtime.cli import flag_name, parse_config, roles
from runtime.folder import read_metrics
from schedules.logs import read_curves

IDS = [f"test/{i}" for i in range(9)]
TEXT = "The farm has two sheep and a cow. " * 20


def text_folder(folder: Path):
    for split in open_source(str(folder)).splits.values():
        list(split.documents())


def tensors_of(folder: Path):
    weights.read_shapes([folder / "model.safetensors"])
    for _, tensor in weights.read_tensors([folder / "model.safetensors"]):
        tensor.sum()


def gguf_of(folder: Path):
    file = gguf_hub.GGUF(folder / "model.gguf")
    file.tokenizer_files()
    for _, values in file.tensors():
        values.sum()


def with_weights(kind: str, folder: Path) -> dict:
    """The files of a tiny model."""
    if kind == "gpt2":
        gpt2_hub.save_hf(gpt2.GPT2(gpt2.GPT2Config(99, 32, 1, 2, 8)), folder / "made")
    elif kind == "qwen3":
        decoder_hub.save_decoder(decoder.Decoder(decoder.DecoderConfig(99, 8, 16, 1, 2, 1, 4, 32)), folder / "made")
    else:
        config = {"bart": seq2seq.bart_config, "pegasus": seq2seq.pegasus_config}[kind]
        seq2seq_hub.save_seq2seq(seq2seq.Seq2Seq(config(1, 8, 2, max_position_embeddings=32)), folder / "made")
    found = {path.name: path.read_bytes() for path in (folder / "made").iterdir()}
    return found | {"config.json": json.loads(found["config.json"])}


def recipe_of(folder: Path):
    recipe = campaign.read_recipe(folder / "recipe.toml")
    campaign.fit(train_lm, campaign.cells(recipe, {}))


@functools.cache
def token_cache() -> bytes:
    path = Path("/dev/shm" if Path("/dev/shm").is_dir() else "/tmp") / f"tokens-{id(HEADER)}"
    tokenizer = load_tokenizer("bpe:260", documents=lambda: ["a b c"] * 9, cache=path.parent, corpus=f"{id(HEADER)}")
    write_tokens(path, ["one two", "three"], tokenizer, "0" * 64)
    raw = path.read_bytes()
    for file in (path, path.parent / f"bpe260-{id(HEADER)}.json"):
        file.unlink()
    return raw


def with_its_checksum(raw: bytes) -> bytes:
    """A damaged header whose own checksum is right all the same."""
    return raw[: HEADER.size] + struct.pack("<I", zlib.crc32(raw[: HEADER.size])) + raw[HEADER.size + 4 :]


def gguf_file(folder: Path) -> bytes:
    import gguf

    writer = gguf.GGUFWriter(folder / "made.gguf", "qwen3")
    numbers = dict(embedding_length=8, block_count=1, feed_forward_length=16, context_length=32)
    for name, value in (numbers | {"attention.head_count": 2, "attention.head_count_kv": 2}).items():
        writer.add_uint32(f"qwen3.{name}", value)
    writer.add_float32("qwen3.attention.layer_norm_rms_epsilon", 1e-6)
    writer.add_string("tokenizer.ggml.model", "gpt2")
    writer.add_string("tokenizer.ggml.pre", "qwen2")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "ab", "<end>"])
    writer.add_array("tokenizer.ggml.token_type", [1, 1, 1, 3])
    writer.add_array("tokenizer.ggml.merges", ["a b"])
    writer.add_uint32("tokenizer.ggml.eos_token_id", 3)
    writer.add_tensor("token_embd.weight", torch.zeros(4, 8).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return (folder / "made.gguf").read_bytes()


ADAPTER = dict(peft_type="LORA", r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["q_proj", "v_proj"], bias="none")
ADAPTER |= dict(rank_pattern={"q_proj": 2}, alpha_pattern={}, layers_to_transform=[0, 1], base_model_name_or_path="x")
QWEN3 = dict(model_type="qwen3", vocab_size=99, hidden_size=8, intermediate_size=16, num_hidden_layers=2, head_dim=4)
QWEN3 |= dict(num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=32, rope_theta=1e4, eos_token_id=0)
QWEN3 |= dict(rms_norm_eps=1e-6, rope_scaling=dict(rope_type="linear", factor=2.0), layer_types=["full_attention"] * 2)
SMOLLM3 = QWEN3 | dict(model_type="smollm3", no_rope_layers=[1, 0], no_rope_layer_interval=4, rope_scaling=None)
ROW = dict(
    loss=3.0, nll=3.0, ppl=20.0, tokens=10, train_seconds=1.0, lr=1e-3, steps=1, skipped=0, tokens_per_second=9.0
)
ROWS = tuple({"kind": kind, "step": step} | ROW for step in (1, 2, 3) for kind in ("train", "val"))
CONFIG = dataclasses.asdict(train_lm.Config()) | {"script": "train_lm.py"}
BINS = {"val": {"raw": Calibration().bins(300), "scaled": None}}
STATE = {
    "log_history": [{"step": s, "loss": 3.0, "learning_rate": 1e-3, "epoch": s / 9} for s in (1, 2, 3)],
    "max_steps": 9,
}
RECIPE = 'script = "train_lm.py"\nout = "runs/x"\n[flags]\nsteps = 9\n[grid]\nloss = ["ce", "dpsm"]\nseed = [1, 2]\n'
RECIPE += "[[arm]]\nlr = 1e-3\n"
RUN = {"config.json": CONFIG, "metrics.jsonl": ROWS, "summary.json": {"val_nll": 3.0, "steps": 3, "seed": 1}}
RUN |= {
    "environment.json": {"packages": {}, "git_diff": ""},
    "flags.json": roles(train_lm.Config),
    "calibration.json": BINS,
}
CSV = "Step,run - train/loss,lr\n1,3.0,1e-3\n2,2.9,1e-3\n3,2.8,\n"

# name -> (the files of a folder, the one in which something is wrong, the reader of the folder)
READERS = {
    "text": (
        {"train.jsonl": ({"text": TEXT}, {"text": "x"}), "val.jsonl": ({"text": TEXT},)},
        "train.jsonl",
        text_folder,
    ),
    "gsm8k": ({"train.jsonl": tuple(map(problem, range(3)))}, "train.jsonl", load_gsm8k),
    "summaries": (
        {"train.jsonl": tuple({"id": "1", "article": TEXT, "highlights": ["a cow", "sheep"]} for _ in range(2))},
        "train.jsonl",
        lambda folder: load_summaries(str(folder), ("train",)),
    ),
    "summaries, table": (
        {"train.csv": f'id,article,summary\n1,"{TEXT}",a cow\n2,"{TEXT}",sheep\n'},
        "train.csv",
        lambda folder: load_summaries(str(folder), ("train",)),
    ),
    "outputs": (
        {"o.jsonl": tuple({"id": name, "output": "#### 5", "sample": 0} for name in IDS[:3])},
        "o.jsonl",
        lambda folder: read_outputs(folder / "o.jsonl", IDS),
    ),
    "verdicts": (
        {"v.jsonl": tuple({"id": name, "correct": {"strict": True}, "sample": 0} for name in IDS[:3])},
        "v.jsonl",
        lambda folder: read_verdicts(folder / "v.jsonl"),
    ),
    "predictions": (
        {"predictions-val.jsonl": ({"index": 0, "prediction": "a cow", "reference": "sheep"},) * 3},
        "predictions-val.jsonl",
        read_summaries,
    ),
    "recipe": ({"recipe.toml": RECIPE}, "recipe.toml", recipe_of),
    "metrics": ({"metrics.jsonl": ROWS}, "metrics.jsonl", lambda folder: read_metrics(folder / "metrics.jsonl")),
    **{f"run: {name}": (RUN, name, load_run) for name in RUN},
    "trainer state": ({"s.json": STATE}, "s.json", lambda folder: read_curves(folder / "s.json")),
    "log": ({"l.jsonl": ROWS}, "l.jsonl", lambda folder: read_curves(folder / "l.jsonl")),
    "curve": ({"c.csv": CSV}, "c.csv", lambda folder: read_curves(folder / "c.csv")),
    "llm.c": (
        {"main.log": "s:0 tel:9.1\ns:1 trl:9.0 lr:0.1\ns:2 trl:8.0 lr:0.1\n"},
        "main.log",
        lambda f: read_curves(f / "main.log"),
    ),
    "adapter": ({"adapter_config.json": ADAPTER}, "adapter_config.json", lora_hub.read_adapter_config),
    **{
        f"config of {config['model_type']}": (
            {"config.json": config},
            "config.json",
            lambda folder: decoder_hub.read_config(folder / "config.json"),
        )
        for config in (QWEN3, SMOLLM3)
    },
    "safetensors": (
        {"model.safetensors": save({"a": torch.ones(2, 3), "b": torch.ones(4)})},
        "model.safetensors",
        tensors_of,
    ),
    "neighbours": (
        {"n.txt": "3 2\ngood 0.1 0.2\nfine 0.1 0.3\nbad 1 2\n"},
        "n.txt",
        lambda f: read_neighbours(f / "n.txt"),
    ),
    "synonyms": ({"n.json": {"good": ["fine"], "bad": ["poor"]}}, "n.json", lambda f: read_neighbours(f / "n.json")),
    "tokenizer": (
        {"tokenizer.json": json.loads(train_bpe(["a b c ab abc"] * 9, 262))},
        "tokenizer.json",
        lambda folder: load_tokenizer(str(folder)).encode("a b"),
    ),
}


def tried(folder: Path, files: dict, wrong: str, read, *more) -> None:
    """Reads the good file, and many in which something is wrong; ``more``: as of `many_files`."""
    for name, value in files.items():
        (folder / name).write_bytes(content_of(value))
    assert not (says := refusal(lambda: read(folder))), says
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def use(content):
        (folder / wrong).write_bytes(content)
        timely(refusal, lambda: read(folder))

    many_files(use, files[wrong], *more)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000, "KiB"


@pytest.mark.parametrize("name", READERS)
def test_any_file_is_read_or_refused_in_a_line(name, tmp_path):
    files, wrong, read = READERS[name]
    tried(tmp_path, files, wrong, read)


@pytest.mark.parametrize("kind", ["gpt2", "bart", "pegasus", "qwen3"])
def test_any_config_beside_weights_is_read_or_refused_in_a_line(kind, tmp_path):
    files = with_weights(kind, tmp_path)
    loaders = {"gpt2": gpt2_hub.load_hf, "qwen3": decoder_hub.load_decoder}
    read = loaders.get(kind, seq2seq_hub.load_seq2seq)
    tried(tmp_path, files, "config.json", read)


def test_any_token_cache_is_read_or_refused_in_a_line(tmp_path):
    raw = token_cache()

    def other_header(edits) -> bytes:
        head = damaged(raw[: HEADER.size], edits)
        return with_its_checksum(head[: HEADER.size].ljust(HEADER.size) + raw[HEADER.size :])

    tried(tmp_path, {"a.tokens": raw}, "a.tokens", lambda folder: open_tokens(folder / "a.tokens"), other_header)


def test_any_gguf_file_is_read_or_refused_in_a_line(tmp_path):
    pytest.importorskip("gguf")
    raw = gguf_file(tmp_path)
    tried(tmp_path, {"model.gguf": raw}, "model.gguf", gguf_of)


@pytest.mark.parametrize("kind", ["events", "trackio"])
def test_any_log_of_a_tracker_is_read_or_refused_in_a_line(kind, tmp_path):
    row = json.dumps({"train/loss": 3.0, "lr": 0.1})
    make = {"events": event_file, "trackio": lambda path: trackio(path, *(("a", step, row) for step in (1, 2, 3)))}
    path = make[kind](tmp_path / {"events": "events.out.tfevents.1.x", "trackio": "p.db"}[kind])
    raw = path.read_bytes()
    tried(tmp_path, {path.name: raw}, path.name, lambda folder: read_curves(folder / path.name))


def test_any_checkpoint_is_read_or_refused_in_a_line(tmp_path):
    torch.save({"model": {"w": torch.ones(3)}, "step": 3}, tmp_path / "x")
    raw = (tmp_path / "x").read_bytes()
    tried(tmp_path, {"last.pt": raw}, "last.pt", lambda folder: load_checkpoint(folder / "last.pt"))


@pytest.mark.parametrize("script", [train_lm, finetune_seq2seq, finetune_gsm8k], ids=lambda script: script.__name__)
def test_any_flags_are_taken_or_refused_in_a_line(script):
    """Flags of the script in any order, with values that fit, nearly fit and do not; and words that are none."""
    values = [
        *map(str, ODD[:-2]),
        "0.1",
        "1e-3",
        "-3",
        "1_000",
        "٣",
        "²",
        "nan",
        "inf",
        "ce",
        "dpsm",
        "fot",
        "--steps",
        "-x",
        "=",
    ]
    names = [flag_name(f.name) for f in dataclasses.fields(script.Config)]
    names += [f"--no-{name[2:]}" for name in names] + ["--", "-h2", "--loss=", "--steps=3", "--step", "word"]
    complete = getattr(script, "complete", lambda given: given)

    def use(argv):
        found = []
        says = timely(refusal, lambda: found.append(parse_config(script.Config, argv, complete=complete, exits=False)))
        assert says or all(not isinstance(v, float) or math.isfinite(v) for v in vars(found[-1]).values())

    many_words(use, [*names, *values])
