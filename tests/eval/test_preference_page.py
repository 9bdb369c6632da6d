"""The page of the human study in a real browser, by keyboard alone."""

import json
import time

import pytest
from browser import Browser

from eval.preference.__main__ import main
from eval.preference.study import Text, build, to_html

GONE = "document.title = 'gone'"
EVIL = f'</script><script>{GONE}</script><img src=x onerror="{GONE}"> <!-- \u202e \u2028 {{{{data}}}} \\'
PAIRS = 5  # and 2 checks; two questions each


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The folder of a study: arms "good" and "poor" with hostile texts, one of them empty, and long sources."""
    folder = tmp_path_factory.mktemp("study")
    for arm in ("good", "poor"):
        rows = [{"id": i, "prediction": f"a {arm} text on subject {i} {EVIL}"} for i in range(PAIRS)]
        rows[0]["prediction"] = "a good text, long enough for its words to be shuffled" if arm == "good" else ""
        (folder / f"{arm}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [{"id": i, "source": f"{EVIL} " + "long " * (150 if i else 3)} for i in range(PAIRS)]
    (folder / "sources.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sources))
    arms = [str(folder / f"{arm}.jsonl") for arm in ("good", "poor")]
    flags = ["--checks", "2", "--sources", str(folder / "sources.jsonl"), "--out", str(folder)]
    main(["make", *arms, *flags])
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture
def page(browser, study):
    """The study, opened for the first time."""
    browser.anew()
    browser.look(1280, 800)
    browser.open(study / "study.html")
    return browser


def shown(page) -> dict:
    """What a rater sees."""
    texts = "({left: $('left').innerText, right: $('right').innerText, count: $('count').innerText,"
    pressed = "pressed: [...document.querySelectorAll('[aria-pressed=true]')].map(b => b.dataset.choice),"
    return page.value(f"{texts} {pressed} active: active, says: $('says').innerText, place: order[at]}})")


def better(page, study) -> str:
    """The key of a rater who likes "good" best and sees which text is whole."""
    key = {e["item"]: e for e in json.loads((study / "KEY.json").read_text())["items"]}
    entry = key[page.value("STUDY.items[order[at]].item")]
    if "broken" in entry:
        return "3" if entry["broken"] == "left" else "1"
    return "1" if " good " in shown(page)["left"] else "3"


def downloaded(page, name: str) -> dict:
    """The votes in the file that the last download left."""
    path = page.downloads / name
    for _ in range(500):
        if path.exists():
            break
        time.sleep(0.02)
    found = json.loads(path.read_text())
    path.unlink()
    return found


def test_a_rater_goes_through_the_study_by_keyboard_alone(page, study, capsys):
    assert page.value("document.activeElement.id") == "name"
    page.press("Enter")
    assert page.value("!$('start').hidden")  # a name is asked for
    page.press(*" A B", "Enter")
    assert shown(page)["count"] == f"1 of {PAIRS + 2}"
    page.press("Enter")  # not before the questions are answered
    assert (
        shown(page)["count"] == f"1 of {PAIRS + 2}"
        and "Not answered yet: Which text is more fluent?" in shown(page)["says"]
    )
    for place in range(PAIRS + 2):
        assert shown(page)["count"] == f"{place + 1} of {PAIRS + 2}"
        choice = better(page, study)
        assert page.value("document.images.length") == 0
        page.press({"1": "ArrowLeft", "3": "ArrowRight"}[choice] if place % 2 else choice)
        assert shown(page)["active"] == 1
        page.press("2" if place == 3 else choice)
        page.press("Enter")
    assert page.value("$('end').innerText").startswith("All pairs are done") and page.value("!$('end').hidden")
    page.press("Enter", "1", "d")
    study_id = page.value("STUDY.study")
    votes = downloaded(page, f"votes-{study_id}-A_B.json")
    assert page.value("$('got').innerText") == f"Downloaded 14 of 14 votes: votes-{study_id}-A_B.json"
    assert votes.keys() == {"study", "rater", "votes"} and votes["rater"] == "A B" and votes["study"] == study_id
    assert all(v.keys() == {"item", "question", "choice", "seconds", "order"} for v in votes["votes"])
    assert [v["order"] for v in votes["votes"]] == [1 + i // 2 for i in range(14)]
    assert all(0 <= v["seconds"] < 60 for v in votes["votes"])
    (study / "votes.json").write_text(json.dumps(votes))
    main(["tally", str(study / "votes.json")])
    out = capsys.readouterr().out
    assert "rater A B: 14 of 14 votes, failed 0 of 2 checks" in out
    fluent, informative = (line for line in out.splitlines() if "good over poor" in line)
    assert "100.0 %" in fluent and "in 5 votes on 5 items" in informative
    # Nothing was fetched, nothing in the texts ran, and the page's own policy had nothing to refuse.
    assert page.fetched() == [(study / "study.html").as_uri()] * len(page.fetched()) and not page.said()
    assert page.value("document.title") == "Which text is better?"


def test_it_goes_back_and_goes_on_after_a_reload(page, study):
    page.press("x", "Enter", "1", "2", "Enter", "3")
    before = shown(page)
    assert before["count"] == "2 of 7" and before["pressed"] == ["right"] and before["active"] == 1
    page.reload("rater === 'x' && $('count').innerText === '2 of 7'")
    assert shown(page) == before  # the same pair, half answered
    page.press("Backspace")  # to the first question
    assert shown(page)["active"] == 0
    page.press("Backspace")  # to the first pair
    assert shown(page)["count"] == "1 of 7" and shown(page)["pressed"] == ["left", "tie"]
    page.press("Backspace", "3")  # its first question again, another answer
    assert shown(page)["pressed"] == ["right", "tie"]
    page.press("Enter")
    assert shown(page) == before | {"active": 1}
    page.press("d")
    votes = downloaded(page, f"votes-{page.value('STUDY.study')}-x.json")["votes"]
    assert [(v["order"], v["choice"]) for v in votes] == [(1, "right"), (1, "tie"), (2, "right")]
    assert "Downloaded 3 of 14 votes" in shown(page)["says"]


def test_raters_have_other_orders_and_the_same_sides(page):
    seen = {}
    for name in ("one", "two", "one"):
        page.press(*name, "Enter")
        order, at = page.value("order"), page.value("at")
        assert sorted(order) == list(range(7)) and seen.setdefault(name, order) == order
        assert at == (1 if name == "one" and "two" in seen else 0)  # who comes back goes on
        item = page.value("STUDY.items[order[at]]")
        assert [shown(page)[side].strip()[:9] for side in ("left", "right")] == [
            (item[side].strip() or "(no text)")[:9] for side in ("left", "right")
        ]
        page.press("1", "1", "Enter")
        page.value("document.querySelector('[data-do=leave]').focus()")
        page.press("Enter")
        assert page.value("document.activeElement.id") == "name"
    assert seen["one"] != seen["two"]


def test_two_tabs_of_a_rater_keep_what_both_answered(page):
    page.press("x", "Enter", "1", "1", "Enter")
    # As the other tab writes it, and as the browser tells this one.
    page.value("""{
        const kept = JSON.parse(localStorage.getItem(HERE + ":x"));
        kept[STUDY.items[order[5]].item] = { 0: { choice: "tie", seconds: 1 } };
        localStorage.setItem(HERE + ":x", JSON.stringify(kept));
        dispatchEvent(new StorageEvent("storage", { key: HERE + ":x" }));
    }""")
    page.press("3")
    assert page.value("Object.keys(JSON.parse(localStorage.getItem(HERE + ':x'))).length") == 3


def test_a_source_folds_and_the_keys_that_are_not_ours_do_nothing(page):
    page.press("x", "Enter")
    while page.value("$('fold').open"):
        page.press("1", "1", "Enter")
    assert "words)" in page.value("$('label').innerText")
    page.press("s")
    assert page.value("$('fold').open")
    page.press("1", "1", "Enter")
    assert page.value("$('fold').open")  # as the rater wanted it
    before = shown(page)
    page.press("4", "x", "ArrowDown", "ArrowUp")
    page("Input.dispatchKeyEvent", type="keyDown", key="1", modifiers=2)  # Ctrl+1 is the browser's
    assert shown(page) == before


def test_tab_reaches_every_button_and_shows_where_it_is(page):
    page.press("x", "Enter")
    names, outlines = [], set()
    while len(names) < 20:
        page.press("Tab")
        if page.value("document.activeElement === document.body"):
            break
        names.append(page.value("document.activeElement.firstChild.textContent").strip())
        outlines.add(page.value("getComputedStyle(document.activeElement).outlineStyle"))
        if names[-1] == "Same" and not shown(page)["pressed"]:
            page.press(" ")
    assert outlines == {"solid"} and shown(page)["pressed"] == ["tie"]
    assert names[-9:] == ["A", "Same", "B", "A", "Same", "B", "Back", "Next", "Download votes"]


def test_a_phone_shows_all_in_light_and_dark(page):
    page.press("x", "Enter", "1")
    colours = set()
    for dark in (False, True):
        page.look(360, 640, dark=dark, phone=True)
        assert page.value("document.documentElement.scrollWidth") == 360
        assert page.value(
            "[...document.querySelectorAll('button')].every(b => b.offsetHeight === 0 || "
            "b.getBoundingClientRect().right <= 360)"
        )
        assert page.value("$('left').getBoundingClientRect().bottom < $('right').getBoundingClientRect().top")
        colours.add(page.value("getComputedStyle(document.body).backgroundColor"))
    assert len(colours) == 2


def test_what_a_browser_kept_wrongly_is_said_and_asked_again(page):
    page.press("x", "Enter", "1", "1", "Enter")
    for kept in ("{", "[[3]]", '{"1": {"0": {"choice": "up", "seconds": 1}}, "no": {"0": {}}}', "7"):
        page.value(f"localStorage.setItem(HERE + ':x', {json.dumps(kept)})")
        page.reload(f"localStorage.getItem(HERE + ':x') === {json.dumps(kept)}")
        assert shown(page)["count"] == "1 of 7" and not page.said()
        assert kept == "7" or "could not be read" in page.value("$('trouble').innerText")
    page.value("Storage.prototype.setItem = () => { throw new Error('full'); }")
    page.press("1")
    assert "does not keep your answers" in page.value("$('trouble').innerText") and shown(page)["pressed"] == ["left"]


def test_questions_of_any_number_and_kind(browser, tmp_path):
    arms = {name: {str(i): Text(f"{name} {i}") for i in range(3)} for name in "ab"}
    (tmp_path / "study.html").write_text(to_html(build(arms, checks=0, questions=[EVIL, *map(str, range(9))]).page))
    browser.anew()
    browser.look(800, 600)
    browser.open(tmp_path / "study.html")
    browser.press("x", "Enter", *"1231231231", "Enter")
    assert shown(browser)["count"] == "2 of 3" and browser.value("document.title") == "Which text is better?"
    assert browser.value("$('panel').offsetHeight <= 360 && $('fold').hidden")
