"""Summaries as data: reading, tokens, buckets, noise, folds."""

import csv
import gzip
import io
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from number_words import words

from data import summaries
from data.summaries import (
    Bucketed,
    Pair,
    Summaries,
    SummaryTokenizer,
    collate,
    encode_pairs,
    fold,
    in_order,
    load_summaries,
    padding_share,
    swapped_references,
    tokenizer_for_training,
    tokenizer_of_model,
)
from model.seq2seq import bart_config, pegasus_config


def article(n: int, length: int = 60) -> str:
    return " ".join(words(n * 31 + k) for k in range(length))


def write(folder: Path, split: str, rows: list[dict]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


# ----------------------------------------------------------------------------------------------
# reading


@pytest.mark.parametrize(
    "row",
    [
        dict(article=article(1), highlights="One.\nTwo."),
        dict(document=article(1), summary="One.\nTwo."),
        dict(source=[article(1, 30), " ".join(article(1).split()[30:])], target=["One.\nTwo.", "Another."]),
    ],
)
def test_columns(row, tmp_path):
    """CNN/DailyMail's, XSum's and SciTLDR's columns; the first of several summaries counts."""
    got = load_summaries(write(tmp_path, "validation", [row]))
    assert got["train"] is None and got["test"] is None
    (pair,) = got["validation"].pairs
    assert pair.id == "validation/0" and pair.summary == "One.\nTwo."
    if "source" not in row:
        assert pair.article == article(1)


def test_csv_and_jsonl_are_one_set(tmp_path):
    rows = [dict(id=str(i), article=f'{article(i)}, "quoted",\nand a line', highlights=f"Sum {i}.") for i in range(4)]
    write(tmp_path, "train", rows)
    (tmp_path / "csv").mkdir()
    with open(tmp_path / "csv" / "train.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    a, b = (load_summaries(folder, ("train",))["train"] for folder in (tmp_path, tmp_path / "csv"))
    assert a.pairs == b.pairs and len(a.pairs) == 4 and '"quoted",\nand' in a.pairs[0].article


def test_what_is_left_out_is_counted(tmp_path):
    rows = [dict(article=article(i, n), highlights=h) for i, (n, h) in enumerate([(60, "a"), (49, "b"), (50, "c")])]
    rows += [
        dict(article="  ", highlights="d"),
        dict(article=article(4), highlights=""),
        dict(article=None, summary=""),
    ]
    part = load_summaries(write(tmp_path, "test", rows), ("test",))["test"]
    assert [p.id for p in part.pairs] == ["test/0", "test/2"] and part.removed == {"empty": 3, "short": 1}
    assert "removed 3 empty, 1 short" in part.label and not part.partial
    assert len(load_summaries(tmp_path, ("test",), min_words=0)["test"].pairs) == 3


def test_a_part_of_a_published_set_says_so(tmp_path, monkeypatch):
    write(tmp_path / "xsum", "test", [dict(document=article(1), summary="s")])
    monkeypatch.setenv("LM_DATA", str(tmp_path))
    assert load_summaries("xsum")["test"].partial == "a sample: 1 of 11,334 rows"
    assert "a sample: 1 of 11,334 rows" in load_summaries(tmp_path / "xsum")["test"].label  # by path as well
    monkeypatch.setenv("LM_DATA", str(tmp_path / "elsewhere"))
    other = load_summaries(tmp_path / "xsum")["test"]  # somebody's, which is called so
    assert (other.name, other.partial) == ("folder-xsum", "")


@pytest.mark.parametrize(
    "text, match",
    [
        ('{"text": "a", "highlights": "b"}', r"line 1 has no column article or document or source.*text, highlights"),
        ('{"article": "a"}', r"no column highlights or summary or target"),
        ('{"article": "a", "highlights": "b"', r"line 1: not JSON"),
        ('["a", "b"]', r"is not an object"),
        ('{"article": 3, "highlights": "b"}', r"article is int"),
        ('{"article": "too short", "highlights": "b"}', r"all 1 rows were left out"),
        ("", r"it has no rows"),
    ],
)
def test_broken_rows_are_named(text, match, tmp_path):
    (tmp_path / "test.jsonl").write_text(text)
    with pytest.raises(ValueError, match=match):
        load_summaries(tmp_path, ("test",))


def test_a_set_that_is_not_there(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="expected cnn_dailymail, xsum, or a folder"):
        load_summaries("reddit")
    with pytest.raises(ValueError, match="has none of train.jsonl"):
        load_summaries(tmp_path, ("train",))
    write(tmp_path, "dev", [dict(article=article(1), summary="a")])
    write(tmp_path, "validation", [dict(article=article(1), summary="a")])
    with pytest.raises(ValueError, match="both dev.jsonl and validation.jsonl"):
        load_summaries(tmp_path)


def test_a_named_set_is_one_entry_in_one_table(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.delenv("LM_DATA", raising=False)
    monkeypatch.setitem(summaries.SUMMARY_SETS, "tldr", summaries.PublishedSet("someone/tldr", "small", dict(test=3)))
    asked = []

    def load_dataset(*arguments, split):
        asked.append((*arguments, split))
        return [dict(source=article(1), target="s"), dict(source=article(2), target="t")]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    part = load_summaries("tldr", ("test",))["test"]
    assert asked == [("someone/tldr", "small", "test")] and part.partial == "a sample: 2 of 3 rows"
    assert [p.id for p in part.pairs] == ["test/0", "test/1"] and part.origin == "the hub's someone/tldr"
    monkeypatch.setenv("LM_DATA", str(tmp_path))
    write(tmp_path / "tldr", "test", [dict(source=article(i), target="s") for i in range(3)])
    local = load_summaries("tldr", ("test",))["test"]
    assert len(local.pairs) == 3 and not local.partial and len(asked) == 1

    def offline(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ValueError, match=r"xsum cannot be loaded .*no route\).* put test.jsonl into \$LM_DATA/xsum"):
        load_summaries("xsum", ("test",))


@pytest.mark.parametrize("n, parts", [(23, 5), (5, 5), (1000, 2)])
def test_folds_are_a_partition(n, parts):
    held = [fold(n, f"{k}/{parts}") for k in range(1, parts + 1)]
    assert sorted(np.concatenate([h for _, h in held]).tolist()) == list(range(n))
    assert all(sorted([*kept, *h]) == list(range(n)) for kept, h in held)
    assert max(len(h) for _, h in held) - min(len(h) for _, h in held) <= 1
    for bad in ("0/5", "6/5", "1/1", "2", "a/b"):
        with pytest.raises(ValueError, match="--fold"):
            fold(n, bad)


# ----------------------------------------------------------------------------------------------
# tokens


@pytest.fixture
def part():
    rng = random.Random(0)
    pairs = [Pair(str(i), article(i, rng.randint(3, 60)), article(i, rng.randint(1, 8))) for i in range(200)]
    return Summaries("made", "train", "here", "", pairs, {})


@pytest.fixture
def pairs(part, tmp_path):
    tokenizer = tokenizer_for_training("bpe:300", part, tmp_path, bos=True)
    return encode_pairs(part, tokenizer, tmp_path, 600, 64)


def test_tokens_are_the_texts(pairs, part):
    tokenizer = pairs.tokenizer
    assert len({tokenizer.bos_id, tokenizer.pad_id, tokenizer.eos_id, tokenizer.base.eos_id}) == 4
    longest = 0
    for i, pair in enumerate(part.pairs):
        for side, text, limit in ((0, pair.article, 600), (1, pair.summary, 64)):
            ids = pairs.ids(side, i)
            whole = tokenizer.base.encode(text)
            assert ids[0] == tokenizer.bos_id and ids[-1] == tokenizer.eos_id
            assert ids[1:-1].tolist() == whole[: limit - 2]
            assert len(ids) == (pairs.source_lengths, pairs.target_lengths)[side][i] <= limit
            longest += len(whole) + 2 > limit
    assert sum(pairs.truncated.values()) == longest > 0
    shortest = int(pairs.target_lengths.argmin())
    assert tokenizer.decode([*pairs.ids(1, shortest), tokenizer.pad_id]) == part.pairs[shortest].summary


def test_a_tokenizer_survives_a_checkpoint(pairs):
    again = SummaryTokenizer.from_state(pairs.tokenizer.state())
    assert again.base.hash == pairs.tokenizer.base.hash and again.vocab_size == pairs.tokenizer.vocab_size
    assert again.decode(pairs.ids(1, 3)) == pairs.tokenizer.decode(pairs.ids(1, 3))


def test_barts_files_encode_as_in_transformers(tmp_path):
    """vocab.json in fairseq's order (specials first, ids not in the order of the merges) and merges.txt."""
    transformers = pytest.importorskip("transformers")
    from data.tokenizer import train_bpe

    trained = json.loads(train_bpe([article(i) for i in range(20)], 400))["model"]
    tokens = [t for t in trained["vocab"] if t != "<|endoftext|>"]
    random.Random(0).shuffle(tokens)
    vocab = {t: i for i, t in enumerate(["<s>", "<pad>", "</s>", "<unk>", *tokens, "<mask>"])}
    merges = [" ".join(m) if isinstance(m, list) else m for m in trained["merges"]]
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    theirs = transformers.BartTokenizer(vocab=vocab, merges=[tuple(m.split(" ")) for m in merges])
    config = bart_config(1, 32, 2, vocab_size=len(vocab))
    text = "twenty-one times forty is eight hundred and forty; </s> is text: naïve €5\n done"
    made = Summaries("made", "train", "", "", [Pair("0", article(1), "s")], {})
    for ours in (tokenizer_of_model(tmp_path, config), tokenizer_for_training(str(tmp_path), made, tmp_path, bos=True)):
        assert (ours.bos_id, ours.pad_id, ours.eos_id) == (0, 1, 2) and ours.vocab_size == len(vocab)
        plain = text.replace("</s>", "")  # transformers reads a literal </s> as the token itself
        assert ours.wrap(ours.base.encode(plain), 1000).tolist() == theirs(plain)["input_ids"]
        assert ours.eos_id not in ours.base.encode(text) and ours.decode(ours.base.encode(text)) == text
    with pytest.raises(ValueError, match="the model only 100"):
        tokenizer_of_model(tmp_path, bart_config(1, 32, 2, vocab_size=100))
    with pytest.raises(ValueError, match="has no tokenizer.json"):
        tokenizer_of_model(tmp_path / "..", config)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<pad>"}')
    with pytest.raises(ValueError, match="ends a text with <pad>, the model with its token 2, </s>"):
        tokenizer_of_model(tmp_path, config)


def test_pegasus_has_no_bos_and_keeps_lines(tmp_path):
    """A Unigram tokenizer.json: text and </s>, and <n> for a line break."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pieces = ["<pad>", "</s>", "<unk>", "<n>", "▁", *("▁" + w for w in "one two".split()), *"entow"]
    backend = Tokenizer(models.Unigram([(p, -float(i > 6) - 1) for i, p in enumerate(pieces)], unk_id=2))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["<pad>", "</s>"])
    (tmp_path / "tokenizer.json").write_text(backend.to_str())
    ours = tokenizer_of_model(tmp_path, pegasus_config(1, 32, 2, vocab_size=len(pieces)))
    assert ours.bos_id is None and ours.eos_id == 1 and ours.pad_id == 0
    made = Summaries("made", "train", "", "", [Pair("0", "one two", "one\ntwo")], {})
    ids = encode_pairs(made, ours, tmp_path / "cache", 16, 16).ids(1, 0)
    assert ids[-1] == 1 and 3 in ids and ours.decode(ids).split("\n") == ["one", "two"]


# ----------------------------------------------------------------------------------------------
# batches


def test_every_pair_once_an_epoch_and_steps_decide(pairs):
    a, b = Bucketed(pairs, 8, seed=1), Bucketed(pairs, 8, seed=1)
    epoch = np.concatenate([a.indices(s) for s in range(25)])
    assert sorted(epoch.tolist()) == list(range(200))
    assert not np.array_equal(a.indices(0), a.indices(25))  # another epoch, another order
    assert np.array_equal(b.indices(30), a.indices(30))  # whatever was asked for before
    assert not np.array_equal(Bucketed(pairs, 8, seed=2).indices(0), a.indices(0))
    lengths = pairs.source_lengths[a.indices(3)]
    assert list(lengths) == sorted(lengths, reverse=True)
    with pytest.raises(ValueError, match="--batch 201 is more than the 200"):
        Bucketed(pairs, 201, 1)


def test_padding_is_counted_and_small(pairs):
    """The share is that of the tensors; unsorted batches of these lengths are far above a tenth."""
    batches = [Bucketed(pairs, 8, 1).indices(s) for s in range(25)]
    cells = tokens = 0
    for rows in batches:
        source, mask, labels = collate(pairs, rows)
        cells += source.numel() + labels.numel()
        tokens += (source.numel() if mask is None else int(mask.sum())) + int((labels != -100).sum())
    assert padding_share(pairs, batches) == pytest.approx(1 - tokens / cells, abs=1e-12)
    unsorted = padding_share(pairs, np.arange(200).reshape(25, 8))
    assert padding_share(pairs, batches) < 0.1 < unsorted


@pytest.mark.parametrize("name, batch", [("scitldr", 16), ("cnn_dailymail", 4)])
def test_padding_of_real_summaries(name, batch, tmp_path):
    root = os.environ.get("LM_DATA")
    if not root or not (Path(root) / name).is_dir():
        pytest.skip(f"LM_DATA is unset or has no {name}")
    part = load_summaries(Path(root) / name, ("train",))["train"]
    tokenizer = tokenizer_for_training("bpe:1000", part, tmp_path, bos=True)
    pairs = encode_pairs(part, tokenizer, tmp_path, 1024, 128)
    bucketed = Bucketed(pairs, batch, 1)
    assert padding_share(pairs, map(bucketed.indices, range(bucketed.per_epoch))) < 0.1


def test_collate(pairs):
    rows = np.array([3, 7, 11])
    source, mask, labels = collate(pairs, rows, np.array([7, 3, 11]), multiple=8)
    assert source.shape[1] % 8 == 0 and source.dtype == labels.dtype == torch.int64
    for k, (i, j) in enumerate(zip(rows, (7, 3, 11), strict=True)):
        assert source[k][mask[k]].tolist() == pairs.ids(0, i).tolist()
        assert labels[k][labels[k] != -100].tolist() == pairs.ids(1, j).tolist()
        assert (source[k][~mask[k]] == pairs.tokenizer.pad_id).all()
    assert collate(pairs, np.array([3]))[1] is None  # nothing is padded
    assert sorted(np.concatenate(in_order(pairs, 7)).tolist()) == list(range(200))


def test_targets_are_counted_as_batches_have_them(pairs):
    labels = collate(pairs, np.arange(len(pairs)))[2]
    counts = torch.bincount(labels[labels != -100], minlength=pairs.tokenizer.vocab_size)
    assert pairs.target_counts().tolist() == counts.tolist() and counts[pairs.tokenizer.eos_id] == len(pairs)


@pytest.mark.parametrize("rate, batch", [(0.15, 8), (0.15, 3), (0.01, 4), (0.5, 2), (1.0, 5), (0.0, 1)])
def test_noise_is_exact_and_seeded(rate, batch):
    steps = [swapped_references(batch, rate, 7, s) for s in range(100)]
    moved = [(places != np.arange(batch)).sum() for places in steps]
    assert np.cumsum(moved).tolist() == [int(np.floor(rate * batch * n + 0.5)) for n in range(1, 101)]
    for places, n in zip(steps, moved, strict=True):
        if n != 1:  # an exchange: no summary is lost
            assert sorted(places.tolist()) == list(range(batch))
    assert all(np.array_equal(p, swapped_references(batch, rate, 7, s)) for s, p in enumerate(steps))
    if 0 < rate < 1:
        assert any(not np.array_equal(p, swapped_references(batch, rate, 8, s)) for s, p in enumerate(steps))
    where = np.concatenate([np.flatnonzero(p != np.arange(batch)) for p in steps])
    if len(where) > 100:  # no place is spared
        assert len(set(where.tolist())) == batch


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
def test_a_noise_rate_out_of_range(rate):
    with pytest.raises(ValueError, match=r"outside \[0, 1\]"):
        swapped_references(8, rate, 1, 0)


def test_gpt2s_vocabulary_gets_three_more_tokens(tmp_path):
    if not os.environ.get("LM_DATA"):
        pytest.skip("LM_DATA is unset")
    made = Summaries("made", "train", "", "", [Pair("0", article(1), "s")], {})
    for spec in ("gpt2", str(Path(os.environ["LM_DATA"]) / "tokenizers" / "gpt2")):
        ours = tokenizer_for_training(spec, made, tmp_path, bos=True)
        assert (ours.bos_id, ours.pad_id, ours.eos_id) == (50257, 50258, 50259) and ours.vocab_size == 50260
        assert ours.decode(ours.wrap(ours.base.encode("Hello, world"), 9)) == "Hello, world"


def test_tables_of_every_spelling(tmp_path):
    row = ("a", "word " * 60, "Two lines\nof a summary.")
    spelled = {"test.csv": ",", "TEST.CSV": ",", "test.tsv": "\t", "test.csv.gz": ",", "Test.TSV.gz": "\t"}
    for name, mark in spelled.items():
        text = io.StringIO()
        csv.writer(text, delimiter=mark, lineterminator="\r\n").writerows([("id", "article", "highlights"), row])
        content = b"\xef\xbb\xbf" + text.getvalue().encode()
        path = tmp_path / name / name
        path.parent.mkdir()
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        (pair,) = load_summaries(path.parent, ("test",))["test"].pairs
        assert (pair.id, pair.article, pair.summary) == (row[0], row[1].strip(), row[2])
    (tmp_path / "test.csv" / "test.jsonl.gz").write_bytes(gzip.compress(b"{}"))
    with pytest.raises(ValueError, match="has both test.csv and test.jsonl.gz for test; remove one"):
        load_summaries(tmp_path / "test.csv", ("test",))
