"""Words are exchanged in place: capitals, punctuation, names and parts of speech stay."""

import random

import pytest
from toy_attack import Toy, attack

from data.wordlists import WordLists
from eval.attack.words import Words, by_tagger, like, part_of_speech, suffix_class


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
