"""BART's noise: its shares and lengths, what it leaves, that it is a function of (seed, epoch, block); its blocks."""

from types import SimpleNamespace

import numpy as np
import pytest

from data.denoising import MASK, cut, infilled, noised, noised_sets, open_text, sentence_starts, span_lengths
from data.summaries import TokenPairs, collate, tokenizer_for_training
from data.tokenizer import train_bpe
from data.windows import random_uint64
from recipes.tiny_bart import train_tokenizer

MASK_ID, SHARE = 9999, 0.3


@pytest.fixture
def text(tmp_path):
    """A folder of documents of all kinds, of which those named so are the splits."""
    folder, number = tmp_path / "text", iter(range(10**6))
    for split, count in (("train", 6), ("val", 3), ("test", 2)):
        (folder / split).mkdir(parents=True)
        for i in range(count):
            lines = (f"The {next(number)} birds\nsang {next(number)} songs." for _ in range(30 + i))
            (folder / split / f"{i}.txt").write_text("  ".join(lines))
        (folder / split / "no_stops.txt").write_text("one more thing and another " * 20)
        (folder / split / "one_word.txt").write_text("word")
        (folder / split / "blank.txt").write_text(" \n\t ")
    return folder


def settings(text, tmp_path, **changes):
    known = dict(data=str(text), denoise=SHARE, seed=1, cache=tmp_path / "cache", max_source=32, max_target=32)
    return SimpleNamespace(**known | dict(eval_data="", fold="", noise_references=0.0) | changes)


@pytest.fixture
def tokenizer(text, tmp_path):
    return tokenizer_for_training(str(train_tokenizer(open_text(str(text)), 300, tmp_path)), None, tmp_path, bos=True)


def test_three_tokens_in_ten_are_masked_in_spans_of_three():
    """Of 400 blocks of 250 tokens; the standard error of the mean of 10,000 Poisson(3) is 0.017, and the last span of a
    block, one of some 26, is cut."""
    lengths = [span_lengths(250, SHARE, random_uint64(1, i, 252)) for i in range(400)]
    assert {int(of.sum()) for of in lengths} == {75}
    every = np.concatenate(lengths)
    assert 2.8 < every.mean() < 3.05 and every.min() == 0
    whole = np.concatenate([of[:-1] for of in lengths])  # without those that are cut
    assert 2.6 < whole.var() < 3.4 and 0.03 < (whole == 0).mean() < 0.07  # Poisson(3) has variance 3, and 5 % are empty
    some = [int(span_lengths(1, SHARE, random_uint64(1, i, 3)).sum()) for i in range(2000)]
    assert set(some) == {0, 1} and 0.27 < np.mean(some) < 0.33  # rounded by lot: sd of the mean 0.01


def test_a_span_is_one_mask_and_the_rest_stays_in_order():
    ids, lengths = np.arange(100), np.array([3, 0, 5, 1])
    for i in range(50):
        out = infilled(ids, lengths, MASK_ID, random_uint64(2, i, 200))
        kept = out[out != MASK_ID]
        assert len(out) == 100 - 9 + 4 and len(kept) == 91 and (np.diff(kept) > 0).all()
        gone = np.split(out, np.flatnonzero(out == MASK_ID))  # between two masks nothing is missing
        assert all((np.diff(part[part != MASK_ID]) == 1).all() for part in gone)
    assert infilled(ids[:4], np.array([4]), MASK_ID, random_uint64(2, 0, 9)).tolist() == [MASK_ID]
    first = [
        int(np.flatnonzero(infilled(ids, lengths, MASK_ID, random_uint64(3, i, 200)) == MASK_ID)[0]) for i in range(400)
    ]
    assert min(first) == 0 and 15 < np.mean(first) < 21  # the least of 4 of 95 places: (95 - 4) / 5 = 18.2, sd 0.8


def test_every_sentence_is_there_once():
    ids, starts = np.arange(60), np.array([7, 20, 21, 44])
    orders = set()
    for i in range(100):
        out = noised(ids, starts, 0.0, MASK_ID, 5, i)
        parts = np.split(out, np.flatnonzero(np.isin(out, [0, *starts]))[1:])
        assert sorted(part.tolist() for part in parts) == [part.tolist() for part in np.split(ids, starts)]
        orders.add(tuple(part[0] for part in parts))
    assert len(orders) > 50  # of 120
    masked = noised(ids, starts, SHARE, MASK_ID, 5, 0)  # with both, what is kept of a sentence is still together
    kept = [int(np.searchsorted(starts, i, "right")) for i in masked[masked != MASK_ID]]
    assert len(set(kept)) == 1 + (np.diff(kept) != 0).sum() and len(masked[masked != MASK_ID]) == 42
    assert sorted(noised(ids, starts[:0], 0.0, MASK_ID, 5, 1)) == list(ids)  # text without full stops


def test_noise_is_a_function_of_seed_epoch_and_block(text, tokenizer, tmp_path):
    train, sets, _ = noised_sets(settings(text, tmp_path), tokenizer, dict(val=0, test=0))
    rows = np.array([5, 0, 11])
    first, again = (train.at(rows, 0) for _ in range(2))
    alone, later = train.at(rows[1:2], 0), train.at(rows, 1)
    other = noised_sets(settings(text, tmp_path, seed=2), tokenizer, dict(val=0, test=0))
    for i in range(3):
        assert first.ids(0, i).tolist() == again.ids(0, i).tolist() != later.ids(0, i).tolist()
        assert first.ids(0, i).tolist() != other[0].at(rows, 0).ids(0, i).tolist()
        assert first.ids(1, i).tolist() == later.ids(1, i).tolist() == train.ids(1, rows[i]).tolist()
    assert alone.ids(0, 0).tolist() == first.ids(0, 1).tolist()  # whatever else is in the batch
    long = np.flatnonzero(train.target_lengths > 20)
    epochs = [train.at(long, epoch) for epoch in range(8)]
    for i in range(len(long)):
        assert len({tuple(of.ids(0, i)) for of in epochs}) == 8
    alike = np.flatnonzero(train.target_lengths == 32)  # of one length, and masked in other places
    places = [tuple(np.flatnonzero(train.at(alike, 0).ids(0, i) == train.mask_id)) for i in range(len(alike))]
    assert len(set(places)) == len(alike) > 2
    source, padding, labels = collate(first, np.arange(3))
    assert (source == train.mask_id).any() and not (labels == train.mask_id).any()
    assert padding is None or padding.sum(1).tolist() == first.source_lengths.tolist()
    for name in ("val", "test"):  # held out: one noise for every seed
        mine, theirs = sets[name], other[1][name]
        assert type(mine) is TokenPairs and mine.data.tolist() == theirs.data.tolist()
        assert mine.pairs[0].summary == tokenizer.decode(mine.ids(1, 0))
    assert sets["val"].data.tolist() != sets["test"].data.tolist()


def test_blocks_are_all_of_the_text(text, tokenizer, tmp_path, caplog):
    """Texts of one word, without full stops and of nothing among them; line breaks go."""
    train, sets, about = noised_sets(settings(text, tmp_path), tokenizer, dict(val=4, test=0))
    said = [record.getMessage() for record in caplog.get_records("setup")]  # once, though it is read again
    for split in ("train", "val", "test"):
        assert said.count(f"{text}: documents without text are left out: 1, the first is {split}/blank.txt") == 1
    assert "without text" not in caplog.text
    starts, ends = train.spans[0]
    decoded = [tokenizer.base.decode(train.data[a:b].tolist()) for a, b in zip(starts, ends, strict=True)]
    files = sorted((text / "train").iterdir())
    whole = [" ".join(file.read_text().split()) for file in files]
    assert "".join(decoded).split() == " ".join(whole).split() and "\n" not in "".join(decoded)
    assert (train.target_lengths <= 32).all() and train.target_lengths.min() == len(tokenizer.base.encode("word")) + 2
    stops = np.array([part.endswith(".") for part in decoded])
    assert stops.mean() > 0.6 and len(sets["val"]) == 4  # the rest is the text without, and a document's last
    assert about["train"]["label"].startswith("text train: 8 documents in ")
    assert about["validation"]["pairs"] > 4 and 3 < about["validation"]["unigram_nll"] < np.log(300)
    edges = cut(np.array([10, 11, 14]), np.zeros(15, bool), np.zeros(15, bool), 4)  # no sentences and no words: at 4
    assert [*zip(*map(np.ndarray.tolist, edges), strict=True)] == [(0, 4), (4, 8), (8, 10), (12, 14)]


def test_where_sentences_begin(tokenizer):
    ids = np.array(tokenizer.base.encode('The "1." birds sang. (They 2.5 sang!) Who sang? sang.'))
    begins, words = sentence_starts(ids, tokenizer.base)
    texts = [tokenizer.base.decode(part.tolist()).strip() for part in np.split(ids, np.flatnonzero(begins))]
    assert texts == ['The "1."', "birds sang.", "(They 2.5 sang!)", "Who sang?", "sang."]
    assert words.sum() == 10


def test_what_does_not_go_together(text, tokenizer, tmp_path):
    def refused(match, *, of=tokenizer, **changes):
        with pytest.raises(ValueError, match=match):
            noised_sets(settings(text, tmp_path, **changes), of, dict(val=0, test=0))

    refused("leave out --eval-data, --fold", fold="1/5")
    refused("a source is as long as its target", max_source=16)
    refused("unknown data", data=f"{text},nowhere")
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "tokenizer.json").write_bytes(train_bpe(["one two three"], 260))
    refused(f"has no {MASK}", of=tokenizer_for_training(str(tmp_path / "plain"), None, tmp_path, bos=True))
    with pytest.raises(ValueError, match="there is none here"):
        tokenizer_for_training("bpe:300", None, tmp_path, bos=True)
