"""ROUGE of texts in any script: measured, or unmeasured and counted, never 0 for words that were not read."""

import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.summaries import FILES2ROUGE, ROUGE, intervals, rouge_scores, sentences, summary_metrics
from eval.summaries import files2rouge_scores as files2rouge
from eval.text import unicode_words

pytest.importorskip("rouge_score")
SCRIPTS = {
    "Greek": "Ο καιρός είναι καλός σήμερα.",
    "Hebrew": "מזג האוויר נאה היום.",
    "Hindi": "आज मौसम अच्छा है।",
    "Japanese": "今日はいい天気です。",
    "Thai": "วันนี้อากาศดี",
    "Korean": "오늘은 날씨가 좋다.",
}


@pytest.mark.parametrize("text", SCRIPTS.values(), ids=SCRIPTS)
def test_a_text_that_is_not_read_is_unmeasured_and_one_that_is_read_is_measured(text):
    english = "fine weather today"
    for scores, names in ((rouge_scores, ROUGE), (files2rouge, FILES2ROUGE)):
        found = scores([text, "", english], [text, text, english])
        assert found == {name: [None, None, pytest.approx(100)] for name in names}
    read = rouge_scores([text, "", english], [text, text, english], words="unicode")
    assert read == {name: [pytest.approx(100), 0, pytest.approx(100)] for name in ROUGE}


def test_half_of_a_summary_is_half(tmp_path):
    for whole, part in (("今日天気", "今日"), ("добрый день всем нам", "добрый день"), ("अच्छा है मौसम आज", "अच्छा है")):
        (f1,) = rouge_scores([part], [whole], words="unicode")["rouge1"]
        assert f1 == pytest.approx(100 * 2 / 3)  # precision 1, recall 1/2


def test_what_is_not_measured_is_counted_and_said(caplog):
    english, greek = "the weather is fine", SCRIPTS["Greek"]
    with caplog.at_level(logging.WARNING, "scorecast"):
        found = summary_metrics([english, greek, english], [english, greek, f"{english} {greek}"])
    letters = sum(c.isalnum() for c in english), sum(c.isalnum() for c in greek)
    assert found["rouge_unmeasured"] == 1 and found["rouge_unread"] == pytest.approx(letters[1] / sum(letters))
    assert 0 < found["rouge1"] <= 100 and found["files2rouge_1"] is not None
    assert "1 of 3 have no word at all" in caplog.text and "--rouge-words unicode" in caplog.text
    nothing = summary_metrics([greek], [greek])
    assert [nothing[name] for name in ("rouge1", "rouge1_low", "rougeLsum", "files2rouge_L")] == [None] * 4
    caplog.clear()
    with caplog.at_level(logging.WARNING, "scorecast"):
        plain = summary_metrics([english] * 3, [english] * 3)
    assert not caplog.text and (plain["rouge_unmeasured"], plain["rouge_unread"]) == (0, 0)
    with pytest.raises(ValueError, match="words='latin': expected one of ascii, unicode"):
        rouge_scores(["a"], ["a"], words="latin")


def test_intervals_are_of_what_was_measured():
    assert intervals({"x": [1.0, None, 3.0]}) == intervals({"x": [1.0, 3.0]})
    assert intervals({"x": [None]}) == {"x": None, "x_low": None, "x_high": None}


@pytest.mark.parametrize(
    "text, words",
    [
        ("It's 3.5 km, NAÏVE\u0301!", ["it", "s", "3", "5", "km", "naïv\u00e9"]),
        ("今日はx天", ["今", "日", "は", "x", "天"]),
        ("क्या है", ["क्या", "है"]),
        ("ดี มาก", ["ดี", "ม", "า", "ก"]),
        ("e\u0301te\u0301", ["été"]),
        ("... --", []),
    ],
)
def test_words_of_any_script(text, words):
    assert unicode_words(text) == words


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40))
def test_no_letter_is_lost(text):
    import unicodedata

    want = [c for c in unicodedata.normalize("NFC", text).casefold() if unicodedata.category(c)[0] in "LMN"]
    assert [c for word in unicode_words(text) for c in word] == want
    assert "".join("".join(sentences(text)).split()) == "".join(text.split())


def test_sentences_end_at_the_full_stops_of_other_scripts():
    assert sentences("今日は。明日も！「はい。」と言う") == ["今日は。", "明日も！", "「はい。」", "と言う"]
    assert sentences("मौसम अच्छा है। कल भी। 2.5 है") == ["मौसम अच्छा है।", "कल भी।", "2.5 है"]
