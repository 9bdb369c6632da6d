"""Every reader of a text file in one table: what an editor or an export does to a file changes nothing, and no bytes
are a traceback. FUZZ=10000 makes the long form."""

import csv
import io
import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.gsm8k import load_gsm8k
from data.sources import open_all
from data.summaries import load_summaries
from data.tokenizer import load_tokenizer
from data.wordlists import load_lists
from eval.answer_calibration import read_confidences
from eval.attack.run import finished_rows
from eval.campaign import read_recipe
from eval.gsm8k import read_outputs
from eval.report.runs import load_run
from eval.rows import whole_rows
from eval.verdicts import read_verdicts
from model.decoder_hub import read_config
from model.lora_hub import read_adapter_config
from schedules.logs import read_curves

IDS = ["test/0", "test/1"]
ARTICLE = "word " * 60
SHAPE = dict(model_type="qwen3", vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1)
SHAPE |= dict(num_attention_heads=1, num_key_value_heads=1, head_dim=8)
ADAPTER = dict(peft_type="LORA", r=2, lora_alpha=4, target_modules=["q_proj"])
BPE = dict(model=dict(type="BPE", vocab={"a": 0, "<|endoftext|>": 1}, merges=[]), added_tokens=[])


def rows(*values) -> str:
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)


def table(*values) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(values)
    return out.getvalue()


def curve(path) -> list:
    (found,) = read_curves(path)
    return [found.step.tolist(), found.loss.tolist()]


def run_of(path: Path):
    run = load_run(path.parent)
    return run.config, run.train, run.summary


def summaries(path: Path):
    return load_summaries(path.parent, ("test",))["test"].pairs


OUTPUTS = rows({"id": 0, "output": "a\u2028"}, {"id": 1, "output": "b"})
PAIR = {"id": "a", "article": ARTICLE, "highlights": "A summary\u2028 of two."}
METRICS = rows({"kind": "train", "step": 1, "loss": 2.0}, {"kind": "val", "step": 1, "nll": 2.0})
# name -> (file, its content, how it is read)
READERS = {
    "text": ("a.jsonl", rows({"text": "one\u2028"}, {"text": "two"}), lambda p: texts(p.parent)),
    "words": ("w.txt", "good fine\nbad poor\n", lambda p: load_lists(p, "none")[0].neighbours),
    "neighbours": ("w.json", rows({"good": ["fine"]}), lambda p: load_lists(p, "none")[0].neighbours),
    "vectors": ("v.txt", "good 1 2\nfine 1 2.1\n", lambda p: load_lists(p, "none")[0].candidates("good")),
    "gsm8k": ("test.jsonl", rows({"question": "q", "answer": "#### 1"}), lambda p: load_gsm8k(p.parent, "test")),
    "outputs": (
        "o.jsonl",
        rows({"id": 0, "output": "a\u2028"}, {"id": 1, "output": "b"}),
        lambda p: read_outputs(p, IDS),
    ),
    "verdicts": ("v.jsonl", rows({"id": "test/0", "correct": {"strict": True}}), read_verdicts),
    "confidences": (
        "v.jsonl",
        rows({"id": "0", "correct": {"strict": True}, "confidence": {"token": 0.5}}),
        lambda p: str(read_confidences(p)),
    ),
    "summaries": ("test.jsonl", rows(PAIR), summaries),
    "summaries, csv": ("test.csv", table(PAIR, PAIR.values()), summaries),
    "curve": ("c.jsonl", rows({"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}), curve),
    "curve, csv": ("c.csv", table(("step", "loss"), (1, 3.0), (2, 2.0)), curve),
    "metrics": ("metrics.jsonl", METRICS, run_of),
    "config": ("config.json", json.dumps({"seed": 1}, indent=1), run_of),
    "predictions": ("p.jsonl", rows({"index": 0, "prediction": "a\u2028"}), whole_rows),
    "attack": ("a.jsonl", rows({"id": "x"}), lambda p: finished_rows(p, [PairOf("x")], 1)),
    "recipe": ("r.toml", 'script = "train_lm.py"\nout = "o"\n', read_recipe),
    "model": ("config.json", json.dumps(SHAPE, indent=1), read_config),
    "adapter": ("adapter_config.json", json.dumps(ADAPTER), lambda p: read_adapter_config(p.parent)),
    "tokenizer": ("tokenizer.json", json.dumps(BPE, indent=1), lambda p: load_tokenizer(str(p.parent)).vocab_size),
}


class PairOf:
    def __init__(self, id):
        self.id = id


def texts(folder) -> list[str]:
    return list(open_all(str(folder)).splits["all"].documents())


def put(folder: Path, name: str, content: bytes) -> Path:
    """The file in a folder that holds what its reader needs beside it."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    if name in ("metrics.jsonl", "config.json"):
        for other, text in (("metrics.jsonl", METRICS), ("config.json", "{}"), ("summary.json", "{}")):
            if other != name:
                (folder / other).write_text(text)
    return folder / name


@pytest.mark.parametrize("name", READERS)
def test_an_editors_marks_change_nothing(tmp_path, name):
    file, content, read = READERS[name]
    want = read(put(tmp_path / "plain", file, content.encode()))
    assert want
    for i, mark in enumerate((b"", b"\xef\xbb\xbf")):
        for j, end in enumerate(("\n", "\r\n", "\n\n", "\r\n\r\n")):
            changed = mark + content.replace("\n", end).encode()
            assert read(put(tmp_path / f"{i}{j}", file, changed)) == want, (mark, end)


BAD = {
    "latin-1": lambda raw: raw.replace(b"a", b"\xe9"),
    "utf-16": lambda raw: raw.decode().encode("utf-16"),
    "a picture": lambda raw: bytes(range(256)),
    "cut": lambda raw: raw[: len(raw) // 2] + b"\xc3",
    "deep": lambda raw: b"[" * 50_000,
    "deep objects": lambda raw: b'{"a":' * 50_000,
    "nothing": lambda raw: b"",
    "a number": lambda raw: b"1" * 5000,
    "another value": lambda raw: b"[1]\n[2]\n",
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("name", READERS)
def test_what_is_none_is_one_line_that_names_the_file(tmp_path, name, kind):
    file, content, read = READERS[name]
    path = put(tmp_path / "x", file, BAD[kind](content.encode()))
    try:
        read(path)
    except ValueError as error:
        assert type(error) is ValueError and "\n" not in str(error) and "x" in str(error)
        assert kind in ("nothing", "another value") or file in str(error) or "tokenizer" in str(error)
    else:  # what a reader may well take: cut text, a file without rows, a word of strange characters
        assert kind in ("cut", "nothing", "deep", "deep objects", "a number", "another value", "latin-1")


PIECES = [
    b"\xef\xbb\xbf",
    b"\r\n",
    b"\n",
    b"\0",
    b'"',
    b"\\ud800",
    b"{",
    b"[",
    b"]",
    b"}",
    b":",
    b",",
    b"NaN",
    b"1e999",
]
PIECES += [b"-1", b"9" * 40, b"\xc3", "é\u2028".encode(), b"null", b"true", b'"a"', b"[" * 3000, b"#### ", b"=", b" "]
FUZZ = int(os.environ.get("FUZZ", 25))


@pytest.mark.parametrize("name", READERS)
@settings(max_examples=FUZZ, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_no_bytes_are_a_traceback(tmp_path_factory, name, data):
    """The right file with pieces put in, taken out and exchanged."""
    file, content, read = READERS[name]
    raw = content.encode()
    for _ in range(data.draw(st.integers(1, 3))):
        at, end = sorted(data.draw(st.tuples(*[st.integers(0, len(raw))] * 2)))
        raw = raw[:at] + data.draw(st.sampled_from([b"", *PIECES])) + raw[end:]
    path = put(tmp_path_factory.getbasetemp() / f"fuzz-{name}", file, raw)
    try:
        read(path)
    except ValueError as error:
        assert type(error) is ValueError and "\n" not in str(error)
