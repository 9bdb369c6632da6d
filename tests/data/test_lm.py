"""Corpora of tokens: cached, following their text and tokenizer, and the command that lists them."""

import re
import subprocess
import sys
from pathlib import Path

from refusals import refused
from text_files import WIKI, fill, message, texts, topics

from data.cache import open_tokens
from data.lm import load_corpus, load_text_set, main
from data.sources import open_source
from data.tokenizer import EOS, Tokenizer, load_tokenizer, train_bpe

ROOT = Path(__file__).resolve().parents[2]


def test_corpus_is_cached_and_follows_its_text_and_tokenizer(tmp_path, bpe, monkeypatch):
    folder = fill(tmp_path / "text", {f"{i}.txt": f"{text}<|endoftext|>é" for i, text in enumerate(topics(12))})
    cache = tmp_path / "cache"
    first = load_corpus(str(folder), tokenizer="bpe:400", cache=cache)
    for part, split in zip((first.train, first.val, first.test), ("train", "val", "test"), strict=True):
        documents = texts(open_source(str(folder)), split)
        assert first.tokenizer.decode(part.tokens) == "".join(text + EOS for text in documents)
        assert part.bytes == sum(len(text.encode()) for text in documents) and part.documents == len(documents)
        assert part.tokens[-1] == part.eos_id and int((part.tokens == part.eos_id).sum()) == part.documents
        assert part.tokenizer_hash == first.tokenizer.hash
    # Trained on train alone.
    assert first.tokenizer.files()["tokenizer.json"] == train_bpe(texts(open_source(str(folder)), "train"), 400)
    made = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert len(made) == 4

    def never(*_):
        raise AssertionError("tokenised or trained again")

    with monkeypatch.context() as patch:
        patch.setattr("data.cache.write_tokens", never)
        patch.setattr("data.tokenizer.train_bpe", never)
        second = load_corpus(str(folder), tokenizer="bpe:400", cache=cache)
    assert (second.train.hash, second.tokenizer.hash) == (first.train.hash, first.tokenizer.hash)
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == made
    other = load_corpus(str(folder), tokenizer=bpe, cache=cache)
    assert other.val.hash != first.val.hash and other.tokenizer is bpe
    namesake = Tokenizer.from_files({"tokenizer.json": train_bpe(topics(5), 600)}, bpe.name)
    assert load_corpus(str(folder), tokenizer=namesake, cache=cache).val.hash not in (other.val.hash, first.val.hash)
    for name in folder.iterdir():
        name.write_text("changed")
    changed = load_corpus(str(folder), tokenizer=bpe, cache=cache)
    assert changed.train.hash != other.train.hash and "changed" in bpe.decode(changed.train.tokens)
    damaged = first.val.path
    damaged.write_bytes(damaged.read_bytes()[:-1])
    fill(folder, {f"{i}.txt": f"{text}<|endoftext|>é" for i, text in enumerate(topics(12))})
    message(lambda: load_corpus(str(folder), tokenizer="bpe:400", cache=cache), str(damaged), "delete the file")
    next(cache.glob("bpe400-*.json")).write_text("{")
    message(lambda: load_corpus(str(folder), tokenizer="bpe:400", cache=cache), "bpe400-", "delete the file")


def test_processes_racing_for_one_corpus(tmp_path):
    fill(tmp_path / "text", {f"{i}.txt": text for i, text in enumerate(topics(8))})
    command = [sys.executable, "-m", "data.lm", str(tmp_path / "text"), "--tokenizer", "bpe:400", "--cache"]
    command.append(str(tmp_path / "cache"))
    started = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    printed = [process.communicate()[0] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0]
    assert printed[0] == printed[1] == printed[2] and "text train" in printed[0] and "bpe:400" in printed[0]
    assert len(list((tmp_path / "cache").iterdir())) == 4  # the tokenizer and three splits, no remains


def test_text_set(tmp_path, bpe, monkeypatch):
    folder = fill(tmp_path / "ood", {"train.txt": "one", "test.txt": "two", "more/x.jsonl": '{"text": "three"}\n'})
    got = load_text_set(str(folder), bpe, tmp_path / "cache")
    assert bpe.decode(got.tokens) == f"three{EOS}two{EOS}one{EOS}" and got.bytes == 11
    monkeypatch.setenv("LM_DATA", str(tmp_path))
    fill(tmp_path / "wikitext-103", {"test.txt": WIKI, "train_prefix.txt": "never"})
    for name in ("wikitext103", str(tmp_path / "wikitext-103")):
        got = load_text_set(name, bpe, tmp_path / "cache")
        assert got.documents == 2 and got.bytes == len(WIKI.encode())
    message(lambda: load_text_set(str(folder), "bpe:400", tmp_path), "train split")


def test_command(tmp_path, capsys):
    folder = fill(tmp_path / "text", {f"{i}.txt": text for i, text in enumerate(topics(6))})
    main([str(folder), "--tokenizer", "bpe:400", "--cache", str(tmp_path / "cache")])
    printed = capsys.readouterr().out
    for split in ("train", "val", "test"):
        row = re.search(rf"text {split}\s+([\d,]+)\s+([\d,]+)\s+([\d,]+)\s+[\d.]+\s+(\S+)", printed)
        got = open_tokens(Path(row[4]))
        assert [int(row[i].replace(",", "")) for i in (1, 2, 3)] == [got.documents, len(got.tokens), got.bytes]
    saved = fill(tmp_path / "t", load_tokenizer("bpe:400", documents=topics, cache=tmp_path, corpus="x").files())
    main([str(folder), "--tokenizer", str(saved), "--cache", str(tmp_path / "cache"), "--one-set"])
    assert re.search(r"text all\s+6 ", capsys.readouterr().out)
    line = ["nowhere", "--tokenizer", str(saved)]
    refused(capsys, "error: unknown data 'nowhere'", lambda: main(line), tmp_path / "nothing")
