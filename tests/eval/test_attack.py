"""Synonym attack: the best attack on a loss that is known, the bounds, the words that must stay, and the lists."""

import importlib.util
import json
import os
import random
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import eval.attack.run as script
from data.summaries import Pair, Summaries, tokenizer_for_training
from data.wordlists import WordLists, load_lists, read_neighbours
from eval.attack.run import Target, attack_all, chosen
from eval.attack.textfooler import AttackOptions, attack_article, attack_group
from eval.attack.words import Words, by_tagger, like, part_of_speech, suffix_class
from eval.seq2seq import decoding
from finetune_seq2seq import Config, complete
from model.seq2seq import Seq2Seq, bart_config
from model.seq2seq_hub import save_seq2seq

NEIGHBOURS = {
    "film": ["movie", "flick", "picture"],
    "old": ["aged", "elderly"],
    "big": ["huge", "vast"],
    "the": ["les"],
    "town": ["city", "the"],
}
LISTS = WordLists(NEIGHBOURS, stop_words=frozenset(["the", "a", "of"]))
TEXT = 'The old film, "Big Town", was a film of\nthe BIG old town.  End'
UNBOUNDED = dict(max_changed=1.0, goal=float("inf"), keep_names=False)


class Toy:
    """A loss that is a sum over words: what each adds, its position aside; it counts what it was asked."""

    def __init__(self, **harm):
        self.harm, self.texts, self.calls = harm, [], 0

    def __call__(self, texts):
        self.texts += texts
        self.calls += 1
        return [1 + sum(self.harm.get(w.lower(), 0.0) for w in Words(t).cores) for t in texts]


def attack(loss, text=TEXT, seed=0, lists=LISTS, **options):
    return attack_article(text, loss, lists, AttackOptions(**(UNBOUNDED | options)), random.Random(seed))


def test_the_best_attack_on_an_additive_loss():
    """Words add up, so that the best attack exchanges every word for its worst neighbour: brute force agrees."""
    loss = Toy(film=-0.5, flick=0.25, movie=0.125, old=0.0, aged=-0.25, elderly=-0.5, vast=0.5, huge=0.25, city=1.0)
    found = attack(loss)
    worst = {w: max([w, *near], key=lambda x: loss.harm.get(x, 0.0)) for w, near in NEIGHBOURS.items() if w != "the"}
    best = 1 + sum(loss.harm.get(worst.get(w.lower(), w.lower()), 0.0) for w in Words(TEXT).cores)
    assert found.loss_after == best == loss([found.text])[0]
    assert [(old.lower(), new.lower()) for _, old, new in found.changed] == [
        (w.lower(), worst[w.lower()]) for w in Words(TEXT).cores if w.lower() in worst and worst[w.lower()] != w.lower()
    ]
    assert found.stop == "words" and found.loss_before == loss([TEXT])[0]


def test_the_most_important_words_come_first():
    """Deleting "film" raises this loss most: with room for one change it is the one, though "town" gives more."""
    found = attack(Toy(film=-1.0, old=-0.5, town=-0.25, city=5.0, movie=0.0), text="old film town", max_changed=0.34)
    assert found.text == "old movie town" and found.stop == "share" and found.rate == 1 / 3


def test_the_goal_ends_it_with_the_nearest_neighbour_that_reaches_it():
    loss = Toy(film=-1.0, movie=-0.75, flick=0.0, picture=3.0, town=-0.5)
    found = attack(loss, text="film town", goal=0.5)
    assert found.text == "flick town" and found.stop == "goal" and found.loss_after - found.loss_before == 1
    assert found.queries == 1 + 2 + 3 == len(loss.texts)


@pytest.mark.parametrize("budget", [1, 2, 3, 4, 5, 8, 13, 17, 22, 23, 24, 1000])
def test_the_budget_is_kept_to_the_query(budget):
    loss = Toy(movie=0.5, vast=0.25)
    found = attack(loss, queries=budget)
    # 1 for the text; 8 words to rank; film twice 3, old twice 1 (elderly: adverb), big twice 2, town twice 1
    full = 1 + 8 + 2 * 3 + 2 * 1 + 2 * 2 + 2 * 1
    assert found.queries == len(loss.texts) <= budget
    if budget >= full:
        assert found.queries == full and found.stop == "words"
    elif budget >= 3:
        assert found.queries == budget and found.stop == "budget"


def test_all_candidates_of_a_word_are_asked_in_one_call():
    loss = Toy(movie=1.0)
    attack(loss, text="old film town")
    assert loss.calls == 1 + 1 + 3


def test_stop_words_stay_and_are_no_candidates():
    loss = Toy(les=100.0, the=50.0)
    found = attack(loss)
    assert not any("les" in Words(t).cores for t in loss.texts)
    assert all(sum(w.lower() == "the" for w in Words(t).cores) <= 2 for t in loss.texts) and not found.changed


def test_the_same_seed_gives_the_same_attack():
    """Only a budget too small for all words leaves something to chance."""
    results = [attack(Toy(movie=0.5, vast=0.25, city=0.125), seed=seed, queries=7) for seed in (*range(8), 0)]
    assert results[0] == results[-1]
    assert len({r.text for r in results}) > 1
    wide = [attack(Toy(movie=0.5, vast=0.25, city=0.125), seed=seed) for seed in range(3)]
    assert wide[0] == wide[1] == wide[2]


def test_a_group_gives_what_each_article_alone_gives():
    loss = Toy(movie=0.5, vast=0.25, city=0.125, film=-0.25)
    texts = [TEXT, "", "old town", "nothing here", "the film of the old big town"]
    options, seeds = AttackOptions(**(UNBOUNDED | dict(queries=9))), range(len(texts))
    group = attack_group(
        texts, lambda asked: loss([t for _, t in asked]), LISTS, options, [random.Random(s) for s in seeds]
    )
    assert group == [
        attack_article(t, loss, LISTS, options, random.Random(s)) for t, s in zip(texts, seeds, strict=True)
    ]


def test_capitals_and_punctuation_are_kept():
    found = attack(Toy(movie=1.0, aged=1.0, huge=1.0, city=1.0))
    assert found.text == 'The aged movie, "Huge City", was a movie of\nthe HUGE aged city.  End'
    assert like("I", "you") == "You" and like("US", "we") == "WE"


def test_names_stay_unless_they_may_change():
    found = attack(Toy(huge=1.0, city=1.0), text="Big town. Big Town, BIG town", keep_names=True)
    assert found.text == "Huge city. Huge Town, BIG city"
    assert attack(Toy(huge=1.0), text="iBig bIG film2 non-big").changed == ()


@pytest.mark.parametrize(
    ("text", "i", "expected"),
    [
        ("one two three", 1, "one three"),
        ("one two three", 0, "two three"),
        ("one two\n", 1, "one\n"),
        ("one two. Three", 1, "one. Three"),
        ("one (two) three", 1, "one () three"),
        ("one's two", 0, "two"),
        ("one\ntwo three", 1, "one\nthree"),
        (" one ", 0, " "),
    ],
)
def test_deletion(text, i, expected):
    words = Words(text)
    assert words.without(i) == expected
    assert words.render({}) == text


def test_text_without_changes_is_the_text():
    rng = random.Random(3)
    for _ in range(200):
        text = "".join(rng.choice("ab é\n\t  .,'’(-_9") for _ in range(rng.randrange(30)))
        words = Words(text)
        assert words.render({}) == text
        assert words.render({i: core for i, core in enumerate(words.cores) if core}) == text


def test_the_share_bounds_the_changes():
    harm = Toy(movie=1.0, aged=1.0, huge=1.0, city=1.0)
    for share in (0.0, 0.1, 0.25, 0.5):
        found = attack(harm, max_changed=share)
        assert len(found.changed) == min(int(share * 14), 7) and found.words == 14
    limited = attack_article(TEXT, harm, LISTS, AttackOptions(**UNBOUNDED), random.Random(0), limit=3)
    assert limited.words == 3 and [i for i, _, _ in limited.changed] == [1, 2]


def test_the_similarity_bound_compares_windows_with_the_original():
    """Vectors that count letters of "movie" and "huge" make those candidates far; others have cosine 1."""

    def embed(texts):
        assert all(len(t.split()) <= 3 for t in texts)
        return torch.tensor([[1.0, sum(t.count(w) for w in ("movie", "huge"))] for t in texts])

    harm = Toy(movie=3.0, huge=3.0, flick=1.0, vast=1.0, film=-1.0)
    options = AttackOptions(**(UNBOUNDED | dict(min_similarity=0.9, window=3)))
    found = attack_article("big old film", harm, LISTS, options, random.Random(0), embed_of=embed)
    assert found.text == "vast old flick"
    # 1 + 3 ranked + flick, picture + aged + vast: what is too far is not asked
    assert found.queries == 1 + 3 + 2 + 1 + 1
    with pytest.raises(ValueError, match="go together"):
        attack_article("old", harm, LISTS, options, random.Random(0))


def test_small_changes_of_meaning_add_up():
    """Each change moves the vector of the window; against the text so far none would be too much, against the
    original the third is: cos((1, 0), (1, 0.4 n)) is 0.93, 0.78, 0.64 for n = 1, 2, 3."""

    def embed(texts):
        return torch.tensor([[1.0, 0.4 * sum(w not in NEIGHBOURS for w in t.split())] for t in texts])

    harm = Toy(movie=1.0, huge=1.0, city=1.0)
    options = AttackOptions(**(UNBOUNDED | dict(min_similarity=0.75, window=9)))
    found = attack_article("big film town", harm, LISTS, options, random.Random(0), embed_of=embed)
    assert len(found.changed) == 2 and found.stop == "words"


def test_part_of_speech():
    assert [suffix_class(w) for w in ("Running", "sing", "quickly", "films", "glass", "station", "famous", "best")] == [
        "-ing",
        "base",
        "adverb",
        "-s",
        "base",
        "noun",
        "adjective",
        "base",
    ]
    lists = WordLists({"film": ["filming", "movie"], "films": ["movie", "movies"]})
    found = attack(Toy(filming=5.0, movie=2.0, movies=1.0), text="film films", lists=lists)
    assert found.text == "movie movies"

    def tag(sentences):  # "to" before a word makes it a verb; it is asked in context
        return [
            ["VERB" if i and s[i - 1] == "to" else "ADJ" if w == "filmic" else "NOUN" for i, w in enumerate(s)]
            for s in sentences
        ]

    same = by_tagger(tag, window=3)
    assert same(Words("a long film, to film it"), 2, ["movie", "filmic"]) == [True, False]
    assert same(Words("a long film, to film it"), 4, ["movie", "filmic"]) == [True, True]
    assert part_of_speech("suffix")[0] == "suffix classes (no tagger)" and part_of_speech("none")[1] is None
    with pytest.raises(ValueError, match="expected one of auto, nltk, spacy"):
        part_of_speech("brill")


def test_the_tagger_of_nltk(monkeypatch):
    nltk = pytest.importorskip("nltk")

    class Tagger:
        def tag(self, words):
            return [(w, {"film": "NN", "show": "VBP", "filmic": "JJ", "films": "NNS"}.get(w, "XX")) for w in words]

    monkeypatch.setattr(nltk.tag, "PerceptronTagger", Tagger)
    name, same = part_of_speech("auto")
    assert name == f"nltk {nltk.__version__} PerceptronTagger"
    assert same(Words("the film"), 1, ["show", "filmic", "films", "strange"]) == [True, False, True, False]

    def missing():
        raise LookupError("averaged_perceptron_tagger_eng")

    monkeypatch.setattr(nltk.tag, "PerceptronTagger", missing)
    with pytest.raises(ValueError, match="--pos nltk needs nltk and its data"):
        part_of_speech("nltk")


def test_antonyms_and_synonyms():
    near = {"old": ["young", "aged", "Aged", "old", "on-line", "ancient"]}
    assert WordLists(near).candidates("OLD") == ["young", "aged", "ancient"]
    for pair in (("old", "young"), ("young", "old")):
        assert WordLists(near, antonyms=frozenset([pair])).candidates("old") == ["aged", "ancient"]
        assert WordLists(near, synonyms=frozenset([pair])).candidates("old") == ["young"]


@pytest.mark.parametrize(
    ("loss", "message"),
    [(lambda t: [float("nan")] * len(t), "the loss of an article is nan"), (lambda t: [1.0], "gave 1 losses for")],
)
def test_a_broken_loss_is_refused(loss, message):
    with pytest.raises(ValueError, match=message):
        attack(loss)


@pytest.mark.parametrize(
    "bad", [dict(queries=0), dict(max_changed=1.5), dict(goal=0.0), dict(min_similarity=2.0), dict(window=1.5)]
)
def test_options_out_of_range(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))}=.*expected"):
        AttackOptions(**bad)


# ----------------------------------------------------------------------------------------------
# lists


def folder_of_lists(path: Path, **files) -> Path:
    content = {
        "counterfitted_neighbors.json": json.dumps(NEIGHBOURS),
        "stopwords_textfooler.txt": "the\na\nof\n",
        "counter_fitting_constraints/ppdb_antonyms.txt": "old young \nold  aged\n",
    } | files
    (path / "counter_fitting_constraints").mkdir(parents=True)
    for name, text in content.items():
        if text is not None:
            (path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_lists_from_a_folder_and_from_files(tmp_path, monkeypatch):
    folder = folder_of_lists(tmp_path / "textfooler")
    lists, hashes = load_lists(folder)
    assert lists.candidates("old") == ["elderly"] and lists.stop_words == {"the", "a", "of"}
    assert len(hashes) == 3 and lists.synonyms is None
    monkeypatch.setenv("LM_DATA", str(tmp_path))
    assert load_lists() == (lists, hashes)
    text = tmp_path / "near.txt"
    text.write_text("old aged elderly\nfilm movie\n")
    assert load_lists(text, "none")[0].candidates("old") == ["aged", "elderly"]
    with pytest.raises(ValueError, match="no stop words beside"):
        load_lists(text)
    monkeypatch.delenv("LM_DATA")
    with pytest.raises(ValueError, match="give --words a folder or file, or set LM_DATA"):
        load_lists()


def test_neighbours_of_vectors(tmp_path):
    path = tmp_path / "vectors.txt"
    rng = np.random.default_rng(0)
    base = rng.normal(size=8)
    rows = {"near": base * 3 + 0.1, "word": base, "nearer": base * 2, "far": -base, "zero": base * 0}
    path.write_text("".join(f"{w} {' '.join(map(str, v))}\n" for w, v in rows.items()))
    found = read_neighbours(path)
    assert found.get("word") == ["nearer", "near"] and found.get("unknown", ()) == ()
    path.write_text(path.read_text() + "short 1.0 2.0\n")
    with pytest.raises(ValueError, match="line 6: expected a word and 8 numbers"):
        read_neighbours(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("counterfitted_neighbors.json", '{"a": ["b"],\n"c" ["d"]}', "line 2 column 5: not JSON"),
        ("counterfitted_neighbors.json", '{"a": ["b"],\n"c": "d"}', "line 2: the neighbours of 'c' are no list"),
        ("counterfitted_neighbors.json", '["a"]', "line 1: expected an object"),
        ("counterfitted_neighbors.json", None, "cannot read the word list"),
        ("stopwords_textfooler.txt", "the\n\nof a\n", "line 3: 'of a'; expected one word a line"),
        ("stopwords_textfooler.txt", b"the\n\xff\n", "line 2: not UTF-8"),
        ("stopwords_textfooler.txt", "\n", "is empty"),
        ("counter_fitting_constraints/ppdb_antonyms.txt", "a b\na b c\n", "line 2: 'a b c'; expected two words"),
    ],
)
def test_broken_lists_name_their_line(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message) as error:
        load_lists(folder_of_lists(tmp_path / "x", **{name: content}))
    assert Path(name).name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.skipif(not os.environ.get("LM_DATA"), reason="LM_DATA is not set")
def test_the_real_lists():
    folder = Path(os.environ["LM_DATA"]) / "textfooler"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    lists, hashes = load_lists()
    assert len(hashes) == 4 and len(lists.stop_words) > 200 and len(lists.antonyms) > 10_000
    assert lists.candidates("movie")[0] == "film" and lists.candidates("The") == []
    with pytest.raises(ValueError, match="line 1: .*expected two words"):
        load_lists(synonyms=[folder / "counter_fitting_constraints" / "SimLex-999.txt"])
    synonyms = folder / "counter_fitting_constraints" / "ppdb_synonyms.txt"
    assert 0 < len(load_lists(synonyms=[synonyms])[0].candidates("movie")) < len(lists.candidates("movie"))


# ----------------------------------------------------------------------------------------------
# files


def toy_rows(pairs):
    """What attack_pairs gives, with a toy loss and in the same shape."""
    rows = []
    for pair in pairs:
        found = attack(Toy(movie=0.5, city=0.25), text=pair.article, seed=pair.id, queries=9)
        row = {"id": pair.id, "article": found.text} | {f: getattr(found, f) for f in script.KEPT}
        rows.append(json.loads(json.dumps(row | {"summary_before": pair.article, "summary_after": found.text})))
    return rows


ARTICLES = [Pair(f"test/{i}", f"the old film of town {i} – a big film é", "a film") for i in range(10)]


@pytest.mark.parametrize("half_a_line", [b"", b'{"id": "test/6", "arti'])
def test_an_interrupted_attack_goes_on_to_the_same_file(tmp_path, half_a_line):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    rows = attack_all(whole, ARTICLES, 3, toy_rows, resume=False)
    calls = []

    def dies(pairs):
        calls.append(pairs)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return toy_rows(pairs)

    with pytest.raises(KeyboardInterrupt):
        attack_all(broken, ARTICLES, 3, dies, resume=False)
    path = broken / "attack.jsonl"
    assert len(path.read_text().splitlines()) == 6  # two groups are on disk
    path.write_bytes(path.read_bytes() + half_a_line)
    again = []
    resumed = attack_all(broken, ARTICLES, 3, lambda p: again.append(len(p)) or toy_rows(p), resume=True)
    assert resumed == rows and path.read_bytes() == (whole / "attack.jsonl").read_bytes() and again == [3, 1]
    # A finished one is left as it is, with its last, smaller group.
    assert attack_all(broken, ARTICLES, 3, None, resume=True) == rows
    # A group of which only a part is there is done again.
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:5]))
    again.clear()
    attack_all(broken, ARTICLES, 3, lambda p: again.append(len(p)) or toy_rows(p), resume=True)
    assert again == [3, 3, 1] and path.read_bytes() == (whole / "attack.jsonl").read_bytes()


def test_resume_refuses_rows_of_other_articles(tmp_path):
    attack_all(tmp_path, ARTICLES, 3, toy_rows, resume=False)
    with pytest.raises(ValueError, match="line 1 is of another article"):
        attack_all(tmp_path, ARTICLES[1:], 3, toy_rows, resume=True)
    (tmp_path / "attack.jsonl").write_text("{}}\n")
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        attack_all(tmp_path, ARTICLES, 3, toy_rows, resume=True)


def test_figures_are_means_over_articles(tmp_path):
    pytest.importorskip("rouge_score")
    rows = toy_rows(ARTICLES)
    got = script.figures(rows, [p.article for p in ARTICLES], 0.5)
    rates = [len(r["changed"]) / r["words"] for r in rows]
    assert got["articles"] == 10 and got["perturbation_rate"] == pytest.approx(np.mean(rates))
    assert got["loss_rise"] == pytest.approx(got["loss_after"] - got["loss_before"])
    assert got["loss_rise_low"] <= got["loss_rise"] <= got["loss_rise_high"] and got["queries_per_article"] <= 9
    # The toy's summaries are the texts, and the references the articles.
    assert got["rouge_drop"]["rouge1"] == pytest.approx(got["rouge_before"]["rouge1"] - got["rouge_after"]["rouge1"])
    assert got["rouge_drop"]["rouge1"] > 0 and sum(got["stopped_by"].values()) == 10


def test_the_articles_are_drawn_by_the_seed():
    assert chosen(ARTICLES, 500, 0) == ARTICLES
    some = chosen(ARTICLES, 4, 0)
    assert some == chosen(ARTICLES, 4, 0) == sorted(some) and len(set(some)) == 4
    assert len({tuple(chosen(ARTICLES, 4, seed)) for seed in range(5)}) > 1


# ----------------------------------------------------------------------------------------------
# a model


@pytest.fixture(scope="module")
def tiny(corpus, tmp_path_factory):
    """A run folder of finetune_seq2seq.py with a random BART, wide weights so that words matter, and its data."""
    folder = tmp_path_factory.mktemp("tiny")
    lines = (corpus / "train.txt").read_text().splitlines()
    pairs = [Pair(f"test/{i}", " ".join(lines[i : i + 8]), lines[i]) for i in range(0, 96, 8)]
    part = Summaries("arithmetic", "train", "", "", pairs, {})
    tokenizer = tokenizer_for_training("bpe:300", part, folder / "cache", bos=True)
    ids = dict(pad_token_id=tokenizer.pad_id, eos_token_id=tokenizer.eos_id, bos_token_id=tokenizer.bos_id)
    shape = dict(decoder_start_token_id=tokenizer.eos_id, vocab_size=tokenizer.vocab_size, init_std=0.2)
    torch.manual_seed(0)
    model = Seq2Seq(bart_config(1, 32, 2, **ids, **shape, max_position_embeddings=256))
    config = Config(
        data="arithmetic",
        size="bart-tiny",
        random_start=True,
        preset="none",
        max_source=192,
        max_target=24,
        max_new_tokens=12,
    )
    config = Config(**complete(asdict(config)))
    run = folder / "run"
    run.mkdir()
    state = {"model": model.state_dict(), "model_config": model.config.__dict__, "config": config.__dict__}
    torch.save(state | {"tokenizer": tokenizer.state(), "dtype": "float32", "step": 1}, run / "best.pt")
    (run / "config.json").write_text(json.dumps(config.__dict__))
    data = folder / "arithmetic"
    data.mkdir()
    rows = [{"id": p.id, "article": p.article, "summary": p.summary} for p in pairs]
    (data / "test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    numbers = "three four five six seven eight nine ten eleven twelve".split()
    near = {w: [n for n in numbers if n != w][:3] for w in numbers} | {"times": ["plus", "minus"]}
    lists = folder_of_lists(folder / "lists", **{"counterfitted_neighbors.json": json.dumps(near)})
    return Target(model, tokenizer, decoding(config, tokenizer), 192, 24, batch=4), pairs, run, data, lists


def test_losses_are_the_mean_nll_of_the_reference(tiny):
    """Against one text at a time, without padding, in plain PyTorch; fp32 sums in another order: 1e-5."""
    target, pairs, *_ = tiny
    texts, references = [p.article for p in pairs], [p.summary for p in pairs]
    expected = []
    for text, reference in zip(texts, references, strict=True):
        source, labels = (
            torch.from_numpy(target.tokenizer.wrap(target.tokenizer.base.encode(t), n))[None]
            for t, n in ((text, 192), (reference, 24))
        )
        hidden = target.model(source, None, target.model.shift_right(labels))
        expected.append(F.cross_entropy(hidden[0] @ target.model.head_weight.T, labels[0]).item())
    assert target.losses(texts, references) == pytest.approx(expected, rel=1e-5)
    tokens = [min(len(target.tokenizer.base.encode(r)) + 2, 24) for r in references]
    measured = target.calibration(texts, references)
    assert measured["tokens"] == sum(tokens)
    assert measured["nll"] == pytest.approx(np.average(expected, weights=tokens), rel=1e-5)


def test_the_model_reads_so_many_words(tiny):
    target, pairs, *_ = tiny
    text = " ".join(p.article for p in pairs)
    read = target.words_read(text)
    words = text.split()
    assert 0 < read < len(words) - 9
    changed = " ".join(words[: read + 1] + ["zero"] * 9), " ".join(words[: read - 2] + ["zero"] * 200)
    same, beyond, within = target.losses([text, *changed], ["ten"] * 3)
    assert same == beyond != within
    assert target.words_read("one two") == 2 and target.words_read("") == 0


def test_embeddings_do_not_depend_on_the_batch(tiny):
    target, pairs, *_ = tiny
    texts = ["one", "one two three times four", *(p.article for p in pairs)]
    alone = torch.cat([target.embed([t]) for t in texts])
    torch.testing.assert_close(target.embed(texts), alone, rtol=1e-4, atol=1e-5)  # fp32, other shapes


def run_main(tiny, out, *more):
    _, _, run, data, lists = tiny
    script.main(
        [
            str(run),
            "--data",
            str(data),
            "--out",
            str(out),
            "--words",
            str(lists),
            "--articles",
            "7",
            "--queries",
            "40",
            "--group",
            "3",
            "--goal",
            "0.2",
            "--max-changed",
            "0.3",
            "--pos",
            "none",
            "--device",
            "cpu",
            *more,
        ]
    )


def test_the_command_attacks_resumes_and_reports(tiny, tmp_path, capsys):
    run_main(tiny, tmp_path / "a", "--min-similarity", "0.5")
    text = capsys.readouterr().out
    assert "how this differs from the published recipe" in text and "No part-of-speech check" in text
    assert "own mean encoder states" in text
    done = json.loads((tmp_path / "a" / "attack.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "a" / "attack.jsonl").read_text().splitlines()]
    figures = done["figures"]
    assert done["state"] == "finished" and len(rows) == figures["articles"] == 7
    assert figures["loss_rise"] > 0 and figures["queries_max"] <= 40 and 0 < figures["perturbation_rate"] <= 0.3
    # The calibration under attack is of the texts in attack.jsonl: its NLL rises with the losses.
    assert done["calibration_after"]["nll"] > done["calibration_before"]["nll"]
    assert {"rouge1", "rougeLsum_low"} <= set(figures["rouge_before"])
    for row in rows:
        assert row["loss_after"] >= row["loss_before"]
        assert (row["stop"] == "goal") == (row["loss_after"] - row["loss_before"] >= 0.2)
    # Killed in the second group, then resumed.
    lines = (tmp_path / "a" / "attack.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "a" / "attack.jsonl").write_bytes(b"".join(lines[:5]) + lines[5][:40])
    running = {k: done[k] for k in ("config", "environment", "differences")} | {"state": "running"}
    (tmp_path / "a" / "attack.json").write_text(json.dumps(running))
    run_main(tiny, tmp_path / "a", "--min-similarity", "0.5", "--resume")
    assert (tmp_path / "a" / "attack.jsonl").read_bytes() == b"".join(lines)
    again = json.loads((tmp_path / "a" / "attack.json").read_text())
    for name in ("figures", "calibration_before", "calibration_after"):
        assert again[name] == done[name]


def test_a_plain_model_folder_is_attacked_with_the_published_search(tiny, corpus, tmp_path):
    from tokenizers import ByteLevelBPETokenizer

    _, _, _, data, lists = tiny
    vocabulary = ByteLevelBPETokenizer()
    vocabulary.train([str(corpus / "train.txt")], vocab_size=300, special_tokens=["<s>", "<pad>", "</s>"])
    ids = dict(vocab_size=vocabulary.get_vocab_size(), bos_token_id=0, pad_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    model = Seq2Seq(bart_config(1, 32, 2, **ids, decoder_start_token_id=2, max_position_embeddings=160))
    extra = {"tokenizer.json": vocabulary.to_str().encode(), "tokenizer_config.json": b'{"eos_token": "</s>"}'}
    save_seq2seq(model, tmp_path / "bart", extra)
    script.main(
        [
            str(tmp_path / "bart"),
            "--data",
            str(data),
            "--out",
            str(tmp_path / "out"),
            "--words",
            str(lists),
            "--articles",
            "2",
            "--queries",
            "12",
            "--pos",
            "none",
            "--device",
            "cpu",
        ]
    )
    config = json.loads((tmp_path / "out" / "attack.json").read_text())["config"]
    assert config["max_source"] == 160  # of a recipe's 1024, what the model has
    assert config["decoding"]["num_beams"] == 4 and config["decoding"]["max_new_tokens"] == 141
    assert list(config["weights"]) == ["model.safetensors"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--words", "nowhere.json"], "no word list nowhere.json"),
        (["--pos", "spacy"], "--pos spacy needs spacy"),
        (["--queries", "0"], "queries=0: expected a whole number"),
        (["--articles", "0"], "--articles 0: expected 1 or more"),
        (["--split", "validation"], "has none of validation.jsonl"),
        (["--checkpoint", "last.pt"], "last.pt"),
        (["--group", "0"], "--group 0: expected 1 or more"),
        (["--resume"], "--resume: no attack in"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tiny, tmp_path, capsys, more, message):
    if "spacy" in more and importlib.util.find_spec("spacy"):
        pytest.skip("spacy is installed")
    with pytest.raises(SystemExit) as stop:
        run_main(tiny, tmp_path / "out", *more)
    error = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and message in error[-1] and not (tmp_path / "out").exists()


def test_a_broken_list_exits_with_its_line(tiny, tmp_path, capsys):
    (tmp_path / "near.txt").write_text("old aged\nfilm\n")
    with pytest.raises(SystemExit) as stop:
        run_main(tiny, tmp_path / "out", "--words", str(tmp_path / "near.txt"), "--stop-words", "none")
    error = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(error) == 1 and "near.txt line 2: 'film'; expected" in error[0]


def test_an_attack_without_a_goal_can_be_resumed(tiny, tmp_path, capsys):
    run_main(tiny, tmp_path / "a", "--articles", "2", "--goal", "inf", "--queries", "6")
    assert "no goal" in capsys.readouterr().out
    before = (tmp_path / "a" / "attack.jsonl").read_bytes()
    run_main(tiny, tmp_path / "a", "--articles", "2", "--goal", "inf", "--queries", "6", "--resume")
    assert (tmp_path / "a" / "attack.jsonl").read_bytes() == before
    assert json.loads((tmp_path / "a" / "attack.json").read_text())["figures"]["success_rate"] is None


def test_a_folder_in_use_and_another_config_are_refused(tiny, tmp_path, capsys):
    run_main(tiny, tmp_path / "a", "--articles", "2")
    before = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    for more, message in (
        ([], "exists and is not an empty folder"),
        (["--resume", "--seed", "9"], "seed was 1, now 9"),
    ):
        with pytest.raises(SystemExit) as stop:
            run_main(tiny, tmp_path / "a", "--articles", "2", *more)
        assert stop.value.code == 2 and message in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == before
