import json
import logging
import os
import re
import struct
import subprocess
import sys
import threading
import types
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from data import sources
from data.cache import HEADER, HEADER_BYTES, open_tokens, write_tokens
from data.lm import load_corpus, load_text_set, main
from data.sources import articles, open_all, open_source
from data.tokenizer import EOS, Tokenizer, load_tokenizer, train_bpe
from data.windows import IGNORE_INDEX, Windows, flip_labels

LM_DATA = os.environ.get("LM_DATA")
needs_lm_data = pytest.mark.skipif(not LM_DATA, reason="LM_DATA is not set")
ROOT = Path(__file__).resolve().parents[2]

# Text that has broken tokenizers: literal special tokens, runs of white space, accents, emoji, control characters.
HARD = [
    "the end <|endoftext|> is not the end<|endoftext|>",
    "  two\t\ttabs \n\n\n and lines\r\n   trailing   ",
    "naïve café, 東京 𝔘𝔫𝔦 👩‍👩‍👧 e\u0301 \u00a0\u2028 \x00\x1c",
    "it's we'll I'VE IT'S x'Some 3.14159 !!!??? __init__(self, *args)",
    "\n",
    "x",
]
WIKI = (
    " \n = First = \n \n A line . \n a = b \n \n = = Part = = \n \n Text = x = \n"
    " = a formula = \n \n more \n \n = a legend = \n GP \n \n = Second = \n \n Words . \n"
)


def topics(n: int = 30) -> list[str]:
    from pydoc_data.topics import topics

    return [text for _, text in sorted(topics.items())][:n]


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return Tokenizer.from_files({"tokenizer.json": train_bpe(topics(), 600)}, "bpe:600")


@pytest.fixture
def no_lm_data(monkeypatch):
    monkeypatch.delenv("LM_DATA", raising=False)


def fill(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def texts(source, split: str) -> list[str]:
    return list(source.splits[split].documents())


def message(call, *words: str) -> str:
    """The call's ValueError, which must be one line and hold each of ``words``."""
    with pytest.raises(ValueError) as caught:
        call()
    said = str(caught.value)
    assert "\n" not in said
    for word in words:
        assert word in said, f"{word!r} is not in {said!r}"
    return said


# ---- tokenizers


def test_bpe_round_trip_determinism_and_specials(bpe):
    assert train_bpe(topics(), 600) == train_bpe(topics(), 600)
    assert bpe.vocab_size == 600 and bpe.decode([bpe.eos_id]) == EOS
    for text in HARD + topics(3):
        ids = bpe.encode(text)
        assert bpe.decode(ids) == text
        assert bpe.eos_id not in ids  # a literal <|endoftext|> is ordinary text
    assert bpe.encode("") == []
    message(lambda: bpe.decode([600]), "600")
    message(lambda: bpe.decode([-1]), "-1")


def test_tokenizer_survives_its_files(bpe, tmp_path):
    again = Tokenizer.from_files(bpe.files(), bpe.name)
    assert again.hash == bpe.hash and again.files() == bpe.files() and again.name == bpe.name
    assert again.encode(HARD[0]) == bpe.encode(HARD[0])
    from_folder = load_tokenizer(str(fill(tmp_path / "mine", bpe.files())))
    assert from_folder.hash == bpe.hash and from_folder.name == "mine"
    other = Tokenizer.from_files({"tokenizer.json": train_bpe(topics(), 601)})
    assert other.hash != bpe.hash


def gpt2_style(folder: Path) -> Path:
    """vocab.json and merges.txt of a byte-level BPE with <|endoftext|> as token 0."""
    from tokenizers import Tokenizer as Backend

    folder.mkdir()
    Backend.from_buffer(train_bpe(topics(), 600)).model.save(str(folder))
    return folder


def test_tiktoken_and_tokenizers_agree(bpe, tmp_path):
    """The same merges through both libraries: two implementations of one definition."""
    other = load_tokenizer(str(gpt2_style(tmp_path / "g")))
    assert other.vocab_size == 600 and other.eos_id == bpe.eos_id
    for text in HARD + topics(5):
        assert other.encode(text) == bpe.encode(text)
        assert other.decode(other.encode(text)) == text
    assert other.decode([other.eos_id]) == EOS


def test_long_documents_are_cut_without_changing_tokens(bpe, tmp_path, monkeypatch):
    import data.tokenizer as module

    documents = ["\n".join(topics(10)), "".join(HARD) * 20, "a\nb\n\nc \nd\n 'll\n'll\r\n\ne" * 50, ""]
    tiktoken = load_tokenizer(str(gpt2_style(tmp_path / "g")))
    for tokenizer in (bpe, tiktoken):
        whole = [ids.tolist() for ids in tokenizer.encode_documents(documents)]
        monkeypatch.setattr(module, "PIECE_CHARACTERS", 7)
        monkeypatch.setattr(module, "BATCH_CHARACTERS", 50)
        assert len(list(module._pieces(documents[0]))) > 200  # it is in fact cut
        cut = [ids.tolist() for ids in tokenizer.encode_documents(documents)]
        monkeypatch.undo()
        assert cut == whole and len(whole) == len(documents) and whole[-1] == []


@needs_lm_data
def test_gpt2_agrees_with_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = load_tokenizer("gpt2")
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.name) == (50257, 50256, "gpt2")
    peer = transformers.GPT2TokenizerFast.from_pretrained(Path(LM_DATA) / "tokenizers" / "gpt2")
    documents = texts(open_source("wikitext2", ("test",)), "test")
    assert len(documents) == 60  # the articles of WikiText-2's test set, by its authors' count
    assert "".join(documents).encode() == (Path(LM_DATA) / "wikitext-2" / "test.txt").read_bytes()
    for document, ids in zip(documents, tokenizer.encode_documents(documents), strict=True):
        assert ids.tolist() == peer(document)["input_ids"]
    for text in HARD:
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.encode(text) == peer(text, split_special_tokens=True)["input_ids"]


@needs_lm_data
def test_gpt2_loads_tiktokens_own_ranks():
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    from data.tokenizer import GPT2_FILES, _byte_characters

    folder = Path(LM_DATA) / "tokenizers" / "gpt2"
    (_, _, vocab_sha), (_, _, merges_sha) = GPT2_FILES
    ranks = data_gym_to_mergeable_bpe_ranks(
        str(folder / "merges.txt"), str(folder / "vocab.json"), merges_sha, vocab_sha
    )
    vocab = json.loads((folder / "vocab.json").read_bytes())
    byte_of = {c: b for b, c in enumerate(_byte_characters())}
    assert {bytes(byte_of[c] for c in word): i for word, i in vocab.items() if word != EOS} == ranks


@pytest.mark.parametrize("kind", ["bpe", pytest.param("gpt2", marks=needs_lm_data)])
def test_files_load_in_autotokenizer(kind, bpe, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = bpe if kind == "bpe" else load_tokenizer("gpt2")
    peer = transformers.AutoTokenizer.from_pretrained(fill(tmp_path / "t", tokenizer.files()))
    assert peer.eos_token == EOS and peer.eos_token_id == tokenizer.eos_id and len(peer) == tokenizer.vocab_size
    for text in HARD[1:] + topics(2):
        ids = tokenizer.encode(text)
        assert peer(text)["input_ids"] == ids
        assert peer.decode(ids) == text
    # transformers 4 takes the spaces before punctuation away unless told not to.
    assert json.loads(tokenizer.files()["tokenizer_config.json"])["clean_up_tokenization_spaces"] is False


def test_tokenizer_errors(bpe, tmp_path, monkeypatch, no_lm_data):
    message(lambda: load_tokenizer("gpt3"), "gpt3", "bpe:4096", "folder")
    message(lambda: load_tokenizer("bpe:100", documents=topics, cache=tmp_path), "257")
    message(lambda: load_tokenizer("bpe:600"), "train split")
    message(lambda: load_tokenizer(str(fill(tmp_path / "a", {"vocab.json": "{}"}))), "merges.txt", "found vocab.json")
    message(lambda: load_tokenizer(str(fill(tmp_path / "b", {"tokenizer.json": "{"}))), "not JSON")
    message(lambda: load_tokenizer(str(fill(tmp_path / "c", {"tokenizer.json": "{}"}))), "cannot be loaded")
    files = {"vocab.json": '{"a": 0}', "merges.txt": "#version: 0.2\na b\n"}
    message(lambda: load_tokenizer(str(fill(tmp_path / "d", files))), "not a GPT-2 style")
    files["tokenizer_config.json"] = '{"tokenizer_class": "Qwen2Tokenizer"}'
    message(lambda: load_tokenizer(str(fill(tmp_path / "e", files))), "Qwen2Tokenizer", "tokenizer.json")
    files = bpe.files() | {"tokenizer_config.json": b'{"eos_token": "</s>"}'}
    message(lambda: Tokenizer.from_files(files, "f"), "</s>", "eos_token")
    # ids that do not follow the merges would be joined in the wrong order by tiktoken
    folder = gpt2_style(tmp_path / "swapped")
    vocab = json.loads((folder / "vocab.json").read_text())
    a, b = (next(word for word, i in vocab.items() if i == wanted) for wanted in (300, 301))
    vocab[a], vocab[b] = vocab[b], vocab[a]
    fill(folder, {"vocab.json": json.dumps(vocab)})
    message(lambda: load_tokenizer(str(folder)), "order of the ids")


def test_gpt2_without_network_or_with_other_files(tmp_path, monkeypatch, no_lm_data):
    import tiktoken.load

    def offline(*_):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(tiktoken.load, "read_file_cached", offline)
    message(lambda: load_tokenizer("gpt2"), "no route", "folder", "vocab.json and merges.txt")
    fill(tmp_path / "tokenizers" / "gpt2", {"vocab.json": "{}", "merges.txt": ""})
    monkeypatch.setenv("LM_DATA", str(tmp_path))
    message(lambda: load_tokenizer("gpt2"), "vocab.json is not GPT-2's")


def test_a_small_text_says_that_its_vocabulary_is_small(caplog):
    with caplog.at_level(logging.WARNING, "scorecast"):
        definition = train_bpe(["ab ab"], 1000)
    assert "bpe:1000 has only" in caplog.text
    assert 257 <= Tokenizer.from_files({"tokenizer.json": definition}).vocab_size < 1000


# ---- the token cache

SOURCE = "ab" * 32


def test_cache_round_trip(bpe, tmp_path):
    path = tmp_path / "deep" / "a.tokens"
    write_tokens(path, HARD, bpe, SOURCE)
    got = open_tokens(path, name="a", tokenizer_hash=bpe.hash, source_hash=SOURCE)
    want = [i for text in HARD for i in [*bpe.encode(text), bpe.eos_id]]
    assert got.tokens.tolist() == want and got.tokens.dtype == np.uint16 and isinstance(got.tokens, np.memmap)
    assert not got.tokens.flags.writeable
    assert got.documents == len(HARD) == int((got.tokens == bpe.eos_id).sum())
    assert got.bytes == sum(len(text.encode()) for text in HARD)
    assert (got.name, got.vocab_size, got.eos_id) == ("a", 600, bpe.eos_id)
    write_tokens(tmp_path / "b.tokens", HARD, bpe, "cd" * 32)
    assert open_tokens(tmp_path / "b.tokens").hash != got.hash == open_tokens(path).hash


@pytest.mark.parametrize("vocab_size, dtype", [(65536, np.uint16), (65537, np.uint32)])
def test_cache_dtype_holds_every_id(vocab_size, dtype, tmp_path):
    last = vocab_size - 1
    fake = types.SimpleNamespace(vocab_size=vocab_size, eos_id=0, hash=SOURCE)
    fake.encode_documents = lambda documents: (np.array([len(d), last], np.uint32) for d in documents)
    write_tokens(tmp_path / "x", ["a", "bc"], fake, SOURCE)
    tokens = open_tokens(tmp_path / "x").tokens
    assert tokens.tolist() == [1, last, 0, 2, last, 0] and tokens.dtype == dtype


def test_every_damaged_byte_is_found(bpe, tmp_path):
    """A flipped bit anywhere, a lost or an added byte: an error that names the file and the way out."""
    good = tmp_path / "good.tokens"
    write_tokens(good, ["short text"], bpe, SOURCE)
    raw = good.read_bytes()
    bad = tmp_path / "bad.tokens"
    damaged = [raw[:i] + bytes([raw[i] ^ 4]) + raw[i + 1 :] for i in range(len(raw))]
    damaged += [raw[:-1], raw[:-2], raw[:HEADER_BYTES], raw[: HEADER_BYTES - 1], b"", raw + b"\0", b"PK" + raw]
    for content in damaged:
        bad.write_bytes(content)
        message(lambda: open_tokens(bad), str(bad), "delete the file")
        assert bad.read_bytes() == content  # never repaired silently
    for content, word in [(b"NOTATOKEN" + raw, "not a token cache"), (raw[:50], "cut short"), (raw[:-2], "promises")]:
        bad.write_bytes(content)
        message(lambda: open_tokens(bad), word)
    fields = list(HEADER.unpack(raw[: HEADER.size]))
    fields[1] = 2
    header = HEADER.pack(*fields)
    bad.write_bytes(header + struct.pack("<I", zlib.crc32(header)) + raw[HEADER_BYTES:])
    message(lambda: open_tokens(bad), "version 2")
    message(lambda: open_tokens(good, tokenizer_hash=SOURCE), "another tokenizer")
    message(lambda: open_tokens(good, source_hash=bpe.hash), "other text")
    message(lambda: open_tokens(tmp_path / "none"), "cannot read")


def test_an_interrupted_write_leaves_nothing(bpe, tmp_path):
    path = tmp_path / "a.tokens"

    def documents():
        yield "some text"
        assert not path.exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_tokens(path, documents(), bpe, SOURCE)
    assert list(tmp_path.iterdir()) == []
    message(lambda: write_tokens(path, [], bpe, SOURCE, title="empty val"), "empty val", "no text")
    assert list(tmp_path.iterdir()) == []
    message(lambda: write_tokens(fill(tmp_path, {"f": "x"}) / "f" / "a", ["x"], bpe, SOURCE), "cannot write", "folder")


def test_readers_never_see_half_a_file(bpe, tmp_path):
    path, stop, errors = tmp_path / "a.tokens", threading.Event(), []
    write_tokens(path, topics(4), bpe, SOURCE)
    want = open_tokens(path).hash

    def write():
        while not stop.is_set():
            write_tokens(path, topics(4), bpe, SOURCE)

    writers = [threading.Thread(target=write) for _ in range(2)]
    for writer in writers:
        writer.start()
    for _ in range(200):
        try:
            errors += [] if open_tokens(path).hash == want else ["other content"]
        except ValueError as error:
            errors.append(str(error))
    stop.set()
    for writer in writers:
        writer.join()
    assert errors == [] and [p.name for p in tmp_path.iterdir()] == ["a.tokens"]


def test_processes_racing_for_one_corpus(tmp_path):
    fill(tmp_path / "text", {f"{i}.txt": text for i, text in enumerate(topics(8))})
    command = [sys.executable, "-m", "data.lm", str(tmp_path / "text"), "--tokenizer", "bpe:400", "--cache"]
    command.append(str(tmp_path / "cache"))
    started = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    printed = [process.communicate()[0] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0]
    assert printed[0] == printed[1] == printed[2] and "text train" in printed[0] and "bpe:400" in printed[0]
    assert len(list((tmp_path / "cache").iterdir())) == 4  # the tokenizer and three splits, no remains


# ---- sources


def test_articles_are_cut_at_top_level_titles():
    lines = WIKI.splitlines(keepends=True)
    got = list(articles(lines))
    assert len(got) == 2 and "".join(got) == WIKI
    assert got[1] == " = Second = \n \n Words . \n"  # neither a formula nor a legend nor = = Part = = begins one
    assert list(articles([])) == [] and list(articles([" = End = \n"])) == [" = End = \n"]


def test_wikitext_from_a_local_folder(tmp_path, monkeypatch, bpe):
    monkeypatch.setenv("LM_DATA", str(tmp_path))
    folder = fill(tmp_path / "wikitext-2", {"validation.txt": WIKI, "test.txt": WIKI * 2, "train_prefix.txt": WIKI})
    said = message(lambda: open_source("wikitext2"), "has no train", "train.txt", "train_prefix.txt is a sample", "hub")
    assert str(folder) in said
    message(lambda: load_corpus("wikitext2", tokenizer="bpe:300", cache=tmp_path, splits=("val",)), "has no train")
    message(lambda: open_source(str(folder)), "has no train")  # nor when the folder is named by its path
    corpus = load_corpus("wikitext2", tokenizer=bpe, cache=tmp_path / "cache", splits=("val", "test"))
    assert corpus.train is None and corpus.val.documents == 2 and corpus.test.documents == 4
    assert corpus.test.bytes == 2 * corpus.val.bytes == 2 * len(WIKI.encode())
    fill(folder, {"wiki.train.raw": WIKI})
    source = open_source("wikitext2")
    assert "".join(texts(source, "train")) == WIKI and "not comparable" not in source.origin
    fill(folder, {"train.txt": " a <unk> b \n"})
    assert "<unk>" in open_source("wikitext2").origin
    fill(folder, {"train.txt": b"caf\xe9 \n"})
    message(lambda: texts(open_source("wikitext2"), "train"), "train.txt is not UTF-8", "line 1")


def test_wikitext_from_the_hub(tmp_path, monkeypatch, no_lm_data, bpe):
    datasets = pytest.importorskip("datasets")
    asked = []
    # As the hub gives it: a row a line, blank lines emptied.
    rows = ["" if not line.strip() else line for line in WIKI.splitlines(keepends=True)]
    plain = {split: [{"text": text} for text in rows] for split in ("train", "validation", "test")}

    def load_dataset(*arguments):
        asked.append(arguments)
        return plain

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    corpus = load_corpus("wikitext103", tokenizer=bpe, cache=tmp_path)
    assert asked == [("Salesforce/wikitext", "wikitext-103-raw-v1")] and "hub" in corpus.origin
    assert [corpus.train.documents, corpus.train.bytes] == [2, len(WIKI.encode())]  # byte for byte the file
    assert bpe.decode(corpus.test.tokens) == (EOS.join(articles(WIKI.splitlines(keepends=True))) + EOS)
    real = {split: datasets.Dataset.from_dict({"text": rows}) for split in plain}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: real)
    source = open_source("wikitext2")
    assert "".join(texts(source, "val")) == WIKI
    assert source.splits["val"].bytes is None  # known by the set's fingerprint: not read to be hashed
    fresh = {split: datasets.Dataset.from_dict({"text": [*rows, " new \n"]}) for split in plain}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: fresh)
    assert open_source("wikitext2").splits["val"].hash != source.splits["val"].hash


def test_wikitext_without_network(monkeypatch, no_lm_data):
    datasets = pytest.importorskip("datasets")

    def offline(*_):
        raise ConnectionError("Couldn't reach the Hub\nretry")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    message(lambda: open_source("wikitext2"), "Couldn't reach the Hub", "network", "$LM_DATA/wikitext-2")


def test_a_named_set_is_one_entry_in_one_table(tmp_path, monkeypatch, no_lm_data, bpe):
    datasets = pytest.importorskip("datasets")
    stories = partial(sources.open_hub, repository="someone/stories", folder="stories", column="story")
    monkeypatch.setitem(sources.TEXT_SETS, "stories", stories)
    rows = {"train": ["Once.\nTwice.", " ", "Thrice."], "validation": ["Val."]}
    loaded = {split: datasets.Dataset.from_dict({"story": texts}) for split, texts in rows.items()}
    monkeypatch.setattr(datasets, "load_dataset", lambda repository, configuration: loaded)
    source = open_source("stories")
    assert texts(source, "train") == ["Once.\nTwice.", "Thrice."] and texts(source, "val") == ["Val."]
    assert set(source.splits) == {"train", "val"} and "someone/stories" in source.origin  # the hub has no test split
    message(lambda: open_all("stories"), "no test split")
    del loaded["validation"]
    message(lambda: open_source("stories"), "stories has no val split on the hub", "$LM_DATA/stories")
    assert load_corpus("stories", tokenizer=bpe, cache=tmp_path / "cache", splits=("train",)).train.documents == 2
    monkeypatch.setenv("LM_DATA", str(tmp_path))
    fill(tmp_path / "stories", {"train.txt": "here", "val.jsonl": '{"text": "too"}\n'})
    assert texts(open_source("stories"), "train") == ["here"]  # a local copy comes first
    message(lambda: open_source("storys"), "stories")  # the table is what an unknown name is told


def test_pydoc_is_real_text_and_splits_alike_everywhere(monkeypatch, tmp_path):
    source = open_source("pydoc")
    assert all(source.splits[split].bytes > 50_000 for split in ("train", "val", "test"))
    assert 5e6 < sum(part.bytes for part in source.splits.values()) < 2e7  # stays small enough for a demo
    seen = [texts(source, split) for split in ("train", "val", "test")]
    assert sum(map(len, seen)) > 400
    import textwrap
    from pydoc_data.topics import topics as entries

    everything = set().union(*seen)
    assert Path(textwrap.__file__).read_text() in everything and entries["with"] in everything
    assert Path(pytest.__file__).read_text() not in everything
    # The split of a path is fixed for good, whatever else an installation holds.
    places = {p: sources._unit(p) for p in ("textwrap.py", "json/decoder.py", "pydoc_data/topics/with")}
    assert places == pytest.approx(PLACES, abs=1e-10)  # ten digits are written below
    # An installation of four files: what is taken and what is not.
    kept = {"a.py": "a = 1\n", "json/b.py": "b = 2\n", "json/tests/t.py": "no", "site-packages/c.py": "no"}
    kept |= {"test/d.py": "no", "encodings/cp1.py": "no", "config-3.11-x/e.py": "no", "_sysconfigdata_x.py": "no"}
    fill(tmp_path, kept | {"__pycache__/f.py": "no", "notes.txt": "no", "empty.py": "\n"})
    monkeypatch.setattr(sources.sysconfig, "get_path", lambda _: str(tmp_path))
    found = {text for split in ("train", "val", "test") for text in texts(open_source("pydoc"), split)}
    assert found - set(entries.values()) == {"a = 1\n", "b = 2\n"}


PLACES = {"textwrap.py": 0.7870850796, "json/decoder.py": 0.2311742724, "pydoc_data/topics/with": 0.6695456813}


def test_folder_splits_by_hash_are_disjoint_complete_and_stable(tmp_path):
    files = {f"part{i % 7}/{i:03}.{'txt' if i % 2 else 'md'}": f"text {i}\r\n" for i in range(400)}
    folder = fill(tmp_path / "many", files | {".git/x.txt": "no", ".hidden.txt": "no", "image.bin": b"\xff"})
    fill(folder, {"z/rows.jsonl": "".join(json.dumps({"text": f"row {i}", "id": i}) + "\n\n" for i in range(50))})
    source = open_source(str(folder))
    split = {name: texts(source, name) for name in ("train", "val", "test")}
    together = [text for part in split.values() for text in part]
    assert sorted(together) == sorted([*files.values(), *(f"row {i}" for i in range(50))])
    assert 380 < len(split["train"]) < 430  # 405 expected of 450, sd 6.4: four of them
    # The same bytes elsewhere, another name for the folder: the same splits and hashes.
    moved = fill(
        tmp_path / "elsewhere" / "named",
        {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()},
    )
    assert {k: v.hash for k, v in open_source(str(moved)).splits.items()} == {
        k: v.hash for k, v in source.splits.items()
    }
    # A new document moves no other.
    fill(folder, {"new.txt": "new"})
    after = open_source(str(folder))
    for name in split:
        assert set(split[name]) == set(texts(after, name)) - {"new"}
    assert len(texts(open_all(str(folder)), "all")) == 451


@pytest.mark.parametrize("documents", [3, 4, 5, 8])
def test_few_documents_still_give_every_split(tmp_path, documents):
    for trial in range(30):
        folder = fill(tmp_path / str(trial), {f"{trial}-{i}.txt": f"{i}" for i in range(documents)})
        source = open_source(str(folder))
        split = [texts(source, name) for name in ("train", "val", "test")]
        assert min(map(len, split)) >= 1 and sorted(sum(split, [])) == [str(i) for i in range(documents)]


def test_train_keeps_a_document_where_all_hash_high(tmp_path):
    names = [f"{i}.txt" for i in range(200) if sources._unit(f"{i}.txt") >= 0.95][:3]
    source = open_source(str(fill(tmp_path, {name: name for name in names})))
    assert [len(texts(source, split)) for split in ("train", "val", "test")] == [1, 1, 1]


def test_one_document_is_cut_by_position_on_lines(tmp_path):
    text = "".join(f"line {i} of some length\n" for i in range(1000))
    source = open_source(str(fill(tmp_path / "one", {"input.txt": text})))
    split = [texts(source, name)[0] for name in ("train", "val", "test")]
    assert "".join(split) == text and all(part.endswith("\n") for part in split)
    assert [round(len(part) / len(text), 2) for part in split] == [0.9, 0.05, 0.05]
    message(lambda: open_source(str(fill(tmp_path / "line", {"input.txt": "one line"}))), "too short", "val")


def test_folder_with_named_splits(tmp_path):
    files = {
        "train-00000-of-00002.txt": "t0",
        "train-00001-of-00002.txt": "t1",
        "validation.txt": "v",
        "README.md": "no",
    }
    folder = fill(tmp_path / "a", files)
    source = open_source(str(folder))
    assert (
        texts(source, "train") == ["t0", "t1"]
        and texts(source, "val") == ["v"]
        and set(source.splits) == {"train", "val"}
    )
    folder = fill(
        tmp_path / "b",
        {"train/x.txt": "t", "train/deep/test.txt": "t2", "val/y.jsonl": '{"text": "v"}', "test.txt": "e"},
    )
    source = open_source(str(folder))
    assert [texts(source, s) for s in ("train", "val", "test")] == [["t2", "t"], ["v"], ["e"]]
    folder = fill(tmp_path / "c", {"train_prefix.txt": "sample", "validation.txt": "v", "test.txt": "e"})
    message(lambda: open_source(str(folder)), "has no train", "train_prefix.txt is not one")
    assert set(open_source(str(folder), ("val", "test")).splits) == {"val", "test"}
    folder = fill(tmp_path / "d", {"testimony.txt": "1", "values.md": "2", "trains.py": "3"})  # names, not splits
    assert sum(len(texts(open_source(str(folder)), s)) for s in ("train", "val", "test")) == 3


def test_source_errors(tmp_path, monkeypatch, no_lm_data):
    message(lambda: open_source("wikitext3"), "wikitext3", "pydoc", "wikitext2", "wikitext103", "folder")
    message(lambda: open_source("pydoc", ("valid",)), "valid", "train, val, test")
    message(lambda: open_source(str(fill(tmp_path / "a", {"x.bin": "x"}))), "holds no text", ".jsonl")
    message(lambda: open_source(str(tmp_path / "a" / "x.bin")), "is a file")
    message(lambda: open_source(str(fill(tmp_path / "b", {"x.txt": "", "y.txt": " \n"}))), "holds no text")
    message(lambda: open_source(str(fill(tmp_path / "c", {"x.txt": b"ok\xff"}))), "x.txt is not UTF-8", "byte 2")
    for i, line in enumerate(['{"txt": "a"}', "nonsense", '["a"]', '{"text": 3}', '{"text": "\\ud83d"}']):
        folder = fill(tmp_path / f"j{i}", {"x.jsonl": '{"text": "fine"}\n' + line})
        message(lambda folder=folder: open_source(str(folder)), "x.jsonl, line 2", '"text"')
    folder = fill(tmp_path / "l", {"x.txt": "x"})
    (folder / "gone.txt").symlink_to(tmp_path / "nowhere")
    message(lambda: open_source(str(folder)), "cannot read", "gone.txt")
    folder = fill(tmp_path / "wikitext-2", {"validation.txt": WIKI})
    message(lambda: open_all(str(folder)), "no test split")

    def refuse(top, onerror=None, **_):
        onerror(PermissionError(13, "Permission denied", str(top)))

    monkeypatch.setattr(sources.os, "walk", refuse)
    message(lambda: open_source(str(folder.parent / "l")), "cannot read", "Permission denied")


# ---- corpora


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
    with pytest.raises(SystemExit, match="^error: unknown data 'nowhere'"):
        main(["nowhere", "--tokenizer", str(saved)])


# ---- windows


def token_set(n: int, eos: int = 0):
    """Tokens 1..n-1 and the end-of-text token last, so that every target is recognisable."""
    tokens = np.concatenate([np.arange(1, n), [eos]]).astype(np.uint16)
    return types.SimpleNamespace(tokens=tokens, eos_id=eos, name="toy", bytes=3 * n)


@pytest.mark.parametrize(
    "n, length", [(100, 10), (101, 10), (99, 10), (10, 10), (11, 10), (19, 10), (20, 10), (7, 1), (1, 1)]
)
def test_windows_cover_each_token_once_as_a_target(n, length):
    data = token_set(n)
    windows = Windows(data, length)
    assert len(windows) == -(-n // length) and windows.bytes == data.bytes
    x, y = windows.get(range(len(windows)))
    assert x.dtype == y.dtype == torch.int64 and x.shape == y.shape == (len(windows), length)
    assert x.is_contiguous() and y.is_contiguous()
    flat = y.flatten()
    assert flat[flat != IGNORE_INDEX].tolist() == data.tokens.tolist()
    assert x.flatten()[:n].tolist() == [data.eos_id, *data.tokens[:-1].tolist()]  # a target's input precedes it
    assert (flat[n:] == IGNORE_INDEX).all() and (x.flatten()[n:] == data.eos_id).all()
    # Any order, with repeats, gives the same rows.
    some = np.array([len(windows) - 1, 0, len(windows) // 2, 0])
    x2, y2 = windows.get(some)
    assert torch.equal(x2, x[some]) and torch.equal(y2, y[some])


def test_window_errors():
    message(lambda: Windows(token_set(9), 10), "10", "toy", "has 9")
    message(lambda: Windows(token_set(9), 0), "0")
    windows = Windows(token_set(40), 10)
    message(lambda: windows.get([0, 4]), "outside 0..3")
    message(lambda: windows.get([-1]), "outside 0..3")
    message(lambda: windows.batch_indices(-1, 2, 0), "step", "-1")
    message(lambda: windows.batch_indices(0, 0, 0), "batch", "0")
    message(lambda: windows.order(0, 1.5), "epoch", "1.5")


def test_order_is_a_pure_function_of_seed_and_epoch():
    windows = Windows(token_set(1000), 10)
    orders = {(seed, epoch): windows.order(seed, epoch).tolist() for seed in (0, 1) for epoch in range(3)}
    assert all(sorted(order) == list(range(100)) for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) == 6
    again = Windows(token_set(1000), 10)
    for (seed, epoch), order in reversed(orders.items()):
        assert again.order(seed, epoch).tolist() == order
    # Fixed for good: a run resumed under another numpy must see the same batches.
    assert orders[0, 0][:8] == FIRST


FIRST = [66, 0, 54, 43, 69, 38, 21, 91]


@pytest.mark.parametrize("batch", [1, 7, 10, 25])
def test_batches_cross_epochs_and_need_no_history(batch):
    windows = Windows(token_set(100), 10)  # 10 windows, so that batches straddle epochs, or hold several
    steps = 40
    stream = np.concatenate([windows.batch_indices(step, batch, 5) for step in range(steps)])
    want = np.concatenate([windows.order(5, epoch) for epoch in range(steps * batch // 10 + 1)])[: len(stream)]
    assert stream.tolist() == want.tolist()
    for step in (39, 3, 17):  # out of order, from a fresh object: what a resumed run does
        fresh = Windows(token_set(100), 10).batch_indices(step, batch, 5)
        assert fresh.tolist() == stream[step * batch : (step + 1) * batch].tolist() and len(fresh) == batch


# ---- label noise


def test_flips_have_the_stated_rates_and_are_uniform():
    torch.manual_seed(0)
    vocab, share = 11, 0.3
    y = torch.randint(vocab, (500, 200))
    y[:, 150:] = IGNORE_INDEX
    noisy, flipped = flip_labels(y, vocab, share, 1.0, seed=3, step=7)
    changed = noisy != y
    assert flipped == int(changed.sum()) and not changed[:, 150:].any()
    n = 500 * 150
    assert abs(flipped - share * n) < 5 * (n * share * (1 - share)) ** 0.5  # five standard deviations
    moves = ((noisy - y) % vocab)[changed]
    counts = torch.bincount(moves, minlength=vocab)
    assert counts[0] == 0
    expected = flipped / (vocab - 1)
    assert float(((counts[1:] - expected) ** 2 / expected).sum()) < 27.9  # chi-square, 9 degrees, p = 0.001
    assert noisy[changed].min() == 0 and noisy.max() == vocab - 1


def test_flips_happen_in_a_share_of_the_steps():
    y = torch.zeros(4, 50, dtype=torch.int64)
    flips = [flip_labels(y, 100, 0.5, 0.25, seed=1, step=step)[1] for step in range(2000)]
    hit = sum(count > 0 for count in flips)  # 200 targets at 0.5: a noisy step without a flip has p = 2^-200
    assert abs(hit - 500) < 5 * (2000 * 0.25 * 0.75) ** 0.5
    assert flip_labels(y, 100, 0.0, 1.0, 1, 1)[1] == flip_labels(y, 100, 1.0, 0.0, 1, 1)[1] == 0
    assert flip_labels(y, 100, 1.0, 1.0, 1, 1)[1] == 200
    assert flip_labels(y, 2, 1.0, 1.0, 1, 1)[0].eq(1).all()


def test_flips_are_pure_and_do_not_depend_on_the_division_of_the_batch():
    y = torch.arange(16 * 33).reshape(16, 33) % 50
    kept = y.clone()
    whole, count = flip_labels(y, 50, 0.4, 1.0, 9, 123)
    assert torch.equal(y, kept)  # the caller's targets are not written to
    assert torch.equal(whole, flip_labels(y, 50, 0.4, 1.0, 9, 123)[0])
    for rows in (1, 4, 5):
        parts = [flip_labels(y[r : r + rows], 50, 0.4, 1.0, 9, 123, first_row=r) for r in range(0, 16, rows)]
        assert torch.equal(torch.cat([part for part, _ in parts]), whole) and sum(n for _, n in parts) == count
    for seed, step in ((10, 123), (9, 124)):
        assert not torch.equal(whole, flip_labels(y, 50, 0.4, 1.0, seed, step)[0])


def test_flip_errors():
    y = torch.zeros(2, 3, dtype=torch.int64)
    message(lambda: flip_labels(y, 10, 1.5, 0.1, 0, 0), "share", "1.5")
    message(lambda: flip_labels(y, 10, float("nan"), 0.1, 0, 0), "share", "nan")
    message(lambda: flip_labels(y, 10, 0.1, -0.1, 0, 0), "step_share", "-0.1")
    message(lambda: flip_labels(y, 1, 0.1, 0.1, 0, 0), "vocab_size", "1")
    message(lambda: flip_labels(y, 10, 0.1, 0.1, -1, 0), "seed", "-1")
    message(lambda: flip_labels(y, 10, 0.1, 0.1, 0, 0, first_row=-2), "first_row", "-2")
    message(lambda: flip_labels(y.float(), 10, 0.1, 0.1, 0, 0), "int64", "float32")
