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
