"""Word lists are read from files and folders, and a broken one names its line."""

import os
from pathlib import Path

import numpy as np
import pytest
from word_lists import folder_of_lists

from data.wordlists import WordLists, load_lists, read_neighbours


def test_antonyms_and_synonyms():
    near = {"old": ["young", "aged", "Aged", "old", "on-line", "ancient"]}
    assert WordLists(near).candidates("OLD") == ["young", "aged", "ancient"]
    for pair in (("old", "young"), ("young", "old")):
        assert WordLists(near, antonyms=frozenset([pair])).candidates("old") == ["aged", "ancient"]
        assert WordLists(near, synonyms=frozenset([pair])).candidates("old") == ["young"]


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
        ("counterfitted_neighbors.json", '{"a": ["b"],\n"c" ["d"]}', "line 2: not JSON .*, column 5"),
        ("counterfitted_neighbors.json", '{"a": ["b"],\n"c": "d"}', "line 2: the neighbours of 'c' are no list"),
        ("counterfitted_neighbors.json", '["a"]', "line 1: expected an object"),
        ("counterfitted_neighbors.json", None, "cannot read"),
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


VECTORS = {"good": [0.1, 0.2, 0.3], "fine": [0.1, 0.2, 0.29], "bad": [-0.1, 0.5, 0.1]}


def lines_of(vectors: dict, end="\n") -> str:
    return "".join(f"{word} {' '.join(map(str, x))}{end}" for word, x in vectors.items())


@pytest.mark.parametrize(
    "text",
    [
        lines_of(VECTORS),
        "3 3\n" + lines_of(VECTORS),  # word2vec
        "3 3\n" + lines_of(VECTORS, " \n"),  # fastText
        "\ufeff3 3\r\n" + lines_of(VECTORS, "\r\n"),
        "# vectors of somebody's, made in May\n# 3 words\n" + lines_of(VECTORS),
        lines_of({". . .": [0.9, -0.4, 0.1], "#": [0.5, -0.2, 0.1], "1900": [-0.1, -0.2, -0.9]} | VECTORS),  # GloVe
        lines_of({"3": [3, 3, 3.5]} | VECTORS),  # a number is a word too
    ],
)
def test_every_form_of_vectors(tmp_path, text):
    (tmp_path / "v.txt").write_text(text, encoding="utf-8", newline="")
    lists, _ = load_lists(tmp_path / "v.txt", "none")
    assert lists.candidates("good") == ["fine"] and lists.candidates("bad") == []


@pytest.mark.parametrize(
    "text, said",
    [
        ("4 3\n" + lines_of(VECTORS), "line 1: it counts 4 words of 3 numbers, there are 3 words of 3 numbers"),
        ("3 2\n" + lines_of(VECTORS), "line 1: it counts 3 words of 2 numbers"),
        (lines_of(VECTORS | {"short": [0.1, 0.2]}), "line 4: expected a word and 3 numbers"),
        (lines_of(VECTORS | {"long": [0.1] * 4}), "line 4: expected a word and 3 numbers"),
        (lines_of(VECTORS | {"endless": [0.1, 0.2, float("inf")]}), "line 4: the vector of 'endless' is not finite"),
        ("old 1900 1901\nnew 2000\n", "line 2: expected a word and 2 numbers"),
        ("old old OLD\nnew new\n", "gives no word another"),
        ("old on-line\nnew 2nd\n", "gives no word another"),
    ],
)
def test_vectors_and_neighbours_that_are_none(tmp_path, text, said):
    (tmp_path / "v.txt").write_text(text)
    with pytest.raises(ValueError, match=said) as error:
        load_lists(tmp_path / "v.txt", "none")
    assert "v.txt" in str(error.value)


def test_a_vector_of_one_number(tmp_path):
    (tmp_path / "v.txt").write_text("up 0.5\nhigh 2\ndown -1\n")
    assert load_lists(tmp_path / "v.txt", "none")[0].candidates("up") == ["high"]
