"""Sources of text: WikiText, the hub, pydoc and folders, how they are split, and bad ones."""

import gzip
import json
import logging
from functools import partial
from pathlib import Path

import pytest
from text_files import WIKI, fill, message, texts

from data import sources
from data.lm import load_corpus
from data.sources import articles, open_all, open_source
from data.tokenizer import EOS


def test_articles_are_cut_at_top_level_titles():
    lines = WIKI.splitlines(keepends=True)
    got = list(articles(lines))
    assert len(got) == 2 and "".join(got) == WIKI
    assert got[1] == " = Second = \n \n Words . \n"  # neither a formula nor a legend nor = = Part = = begins one
    assert list(articles([])) == [] and list(articles([" = End = \n"])) == [" = End = \n"]


def test_wikitext_is_known_by_its_text_and_not_by_what_a_folder_is_called(tmp_path):
    wiki = fill(tmp_path / "mine", {"train.txt": WIKI, "validation.txt": WIKI})
    assert len(texts(open_source(str(wiki)), "train")) == 2  # articles
    other = fill(tmp_path / "wikitext-2", {"train.txt": "a = b\n", "val.txt": "c\n"})
    assert texts(open_source(str(other)), "val") == ["c\n"]


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
    message(lambda: texts(open_source("wikitext2"), "train"), "train.txt, line 1: not UTF-8")


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
    message(
        lambda: open_source(str(fill(tmp_path / "c", {"x.txt": b"ok\xff"}))), "x.txt, line 1: not UTF-8", "byte 0xff"
    )
    lines = {'{"txt": "a"}': '"text"', "nonsense": "not JSON", '["a"]': '"text"', '{"text": 3}': '"text"'}
    for i, (line, said) in enumerate((lines | {'{"text": "\\ud83d"}': "half a surrogate pair"}).items()):
        folder = fill(tmp_path / f"j{i}", {"x.jsonl": '{"text": "fine"}\n' + line})
        message(lambda folder=folder: open_source(str(folder)), "x.jsonl, line 2", said)
    folder = fill(tmp_path / "l", {"x.txt": "x"})
    (folder / "gone.txt").symlink_to(tmp_path / "nowhere")
    message(lambda: open_source(str(folder)), "cannot read", "gone.txt")
    folder = fill(tmp_path / "wikitext-2", {"validation.txt": WIKI})
    message(lambda: open_all(str(folder)), "no test split")

    def refuse(top, onerror=None, **_):
        onerror(PermissionError(13, "Permission denied", str(top)))

    monkeypatch.setattr(sources.os, "walk", refuse)
    message(lambda: open_source(str(folder.parent / "l")), "cannot read", "Permission denied")


ROW = '{"text": "two"}\n'


@pytest.mark.parametrize(
    "name", ["b.txt", "b.TXT", "b.Md", "b.PY", "b.txt.gz", "b.TXT.GZ", "b.jsonl", "b.JSONL", "b.jsonl.gz"]
)
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_every_spelling_of_a_suffix_is_read(tmp_path, name, mark):
    content = mark + (ROW if "jsonl" in name.lower() else "two").encode()
    content = gzip.compress(content) if name.lower().endswith(".gz") else content
    folder = fill(tmp_path, {"a.txt": "one", name: content})
    assert texts(open_all(str(folder)), "all") == ["one", "two"]
    packed = fill(tmp_path / "split", {f"train{name[1:]}": content, "VAL.TXT": "v"})
    assert texts(open_source(str(packed)), "train") == ["two"]


def test_what_is_not_read_is_named_and_counted(tmp_path, caplog):
    folder = fill(
        tmp_path / "c", {"a.txt": "one", "b.pdf": "x", "deep/c.csv": "x", "d.parquet": "x", "e": "x", ".f": "x"}
    )
    with caplog.at_level(logging.WARNING, "scorecast"):
        assert texts(open_all(str(folder)), "all") == ["one"]
    assert "4 of 5 files are not read: b.pdf, d.parquet, deep/c.csv, ..." in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "scorecast"):
        open_all(str(fill(tmp_path / "all", {"a.txt": "one"})))
        open_source("pydoc", ("test",))
    assert not caplog.text
    with caplog.at_level(logging.WARNING, "scorecast"):
        open_source(str(fill(tmp_path / "named", {"train.txt": "t", "val.txt": "v", "README.md": "r"})))
    assert "1 of 3 files are not read: README.md" in caplog.text


def test_links_are_followed_and_loops_end(tmp_path, caplog):
    disk = fill(tmp_path / "disk", {"x.txt": "x", "deep/y.txt": "y"})
    folder = fill(tmp_path / "corpus", {"a.txt": "a", "z/b.txt": "b"})
    (folder / "big").symlink_to(disk)
    (disk / "deep" / "up").symlink_to(folder)  # a loop
    (folder / "0").symlink_to(folder / "z")  # what lies in the folder itself keeps its own name
    with caplog.at_level(logging.WARNING, "scorecast"):
        assert sources._text_files(folder) == ["a.txt", "big/deep/y.txt", "big/x.txt", "z/b.txt"]
    assert "0/ (read already)" in caplog.text and "big/deep/up/ (read already)" in caplog.text
    assert sorted(texts(open_all(str(folder)), "all")) == ["a", "b", "x", "y"]
    (folder / "gone").symlink_to(tmp_path / "unmounted")
    caplog.clear()
    with caplog.at_level(logging.WARNING, "scorecast"):
        open_all(str(folder))
    assert "gone" in caplog.text


@pytest.mark.parametrize("unit", ["word ", "x", "long line of its own kind, "])
def test_one_long_line_is_cut_by_position(tmp_path, unit):
    text = unit * (100_000 // len(unit))
    source = open_source(str(fill(tmp_path, {"one.txt": text})))
    split = [texts(source, name)[0] for name in ("train", "val", "test")]
    assert "".join(split) == text and [round(len(part) / len(text), 2) for part in split] == [0.9, 0.05, 0.05]


def test_a_text_is_kept_but_for_its_mark(tmp_path):
    text = "one\r\ntwo\0three\u2028\ufeff\r"
    folder = fill(tmp_path, {"train.txt": b"\xef\xbb\xbf" + text.encode(), "val.txt": "v"})
    assert texts(open_source(str(folder)), "train") == [text]
