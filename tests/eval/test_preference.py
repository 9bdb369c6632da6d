"""The human study: who is shown beside whom, what the page may not say, and what the votes say."""

import json
import math
import random
import re
import sys
from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from fuzz import many_files, refusal
from refusals import refused
from scipy.stats import binomtest

from eval.preference.__main__ import main
from eval.preference.study import Text, build, read_arms, shuffled, to_html
from eval.preference.tally import agreement, bradley_terry, read_key, read_votes, win_rate
from eval.stats import wilson

WORDS = "the farm has two sheep and a cow which nobody has seen before".split()
EVIL = "</script><script>document.title = 'gone'</script><!--<img src=x onerror=alert(1)> {{data}} \u2028 & \\"


def text_of(arm: str, i: int) -> str:
    return f"{arm} says of {i}: " + " ".join(WORDS[i % 5 :])


def arms_of(*names: str, items: int = 40) -> dict[str, dict[str, Text]]:
    return {name: {f"test/{i}": Text(text_of(name, i), f"article {i}") for i in range(items)} for name in names}


def write_arm(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows_of(arm: str, items: int = 12) -> list[dict]:
    return [{"index": i, "id": f"test/{i}", "prediction": text_of(arm, i), "reference": f"r{i}"} for i in range(items)]


@pytest.fixture
def made(tmp_path):
    """(folder, KEY.json's content) of a study of two files, 12 items and 4 checks, one question."""
    files = [write_arm(tmp_path / f"{arm}.jsonl", rows_of(arm)) for arm in ("plain", "fancy")]
    main(["make", *files, "--out", str(tmp_path / "study"), "--checks", "4", "--question", "Better?"])
    return tmp_path / "study", json.loads((tmp_path / "study" / "KEY.json").read_text())


def vote(folder, name: str, choose, key: dict, **more) -> str:
    """A file of votes; ``choose``: entry of the key -> choice, None for no vote."""
    votes = [
        {"item": entry["item"], "question": question, "choice": choice, "seconds": 2.5, "order": n}
        for n, entry in enumerate(key["items"], 1)
        for question in key["questions"]
        if (choice := choose(entry))
    ]
    path = folder / f"votes-{name}.json"
    path.write_text(json.dumps({"study": key["study"], "rater": name, "votes": votes} | more))
    return str(path)


def prefers(arm: int):
    """The choices of a rater who likes ``arm`` best and sees what is broken."""
    return lambda e: ("right" if e["broken"] == "left" else "left") if "broken" in e else side_of(e, arm)


def side_of(entry: dict, arm: int) -> str:
    return "left" if entry["left"] == arm else "right"


def test_pairs_sides_and_checks_are_balanced():
    study = build(arms_of("a", "b", "c"), items=30, checks=6, seed=3)
    entries = [e for e in study.key["items"] if "broken" not in e]
    assert Counter((e["left"], e["right"]) for e in entries) == dict.fromkeys(permutations(range(3), 2), 5)
    assert len({e["id"] for e in entries}) == 30
    checks = [e for e in study.key["items"] if "broken" in e]
    assert Counter(e["broken"] for e in checks) == {"left": 3, "right": 3}
    assert Counter(e["left"] for e in checks) == {0: 2, 1: 2, 2: 2} and all(e["left"] == e["right"] for e in checks)
    assert not {e["id"] for e in checks} & {e["id"] for e in entries}  # there are ten items left for them
    # Shuffled: neither the items nor the sides nor the checks stand in an order.
    assert [e["id"] for e in entries] != sorted(e["id"] for e in entries) and {e["left"] for e in entries[:8]} != {0}
    assert study.key["items"][-6:] != checks


def test_the_page_shows_what_the_key_says():
    arms = arms_of("a", "b")
    study = build(arms, items=30, checks=5)
    for shown, entry in zip(study.page["items"], study.key["items"], strict=True):
        assert shown["item"] == entry["item"] and shown["source"] == arms["a"][entry["id"]].source
        for side in ("left", "right"):
            whole = arms["ab"[entry[side]]][entry["id"]].text
            if side == entry.get("broken"):
                assert shown[side] != whole and sorted(shown[side].split()) == sorted(whole.split())
            else:
                assert shown[side] == whole


def test_a_study_is_told_by_its_arguments():
    arms = arms_of("a", "b")
    study = build(arms)
    assert study == build(arms) and study.said == ["--items 200: there are 40, all of them are taken"]
    names = {s.key["study"] for s in (study, build(arms, seed=1), build(arms, questions=["?"]), build(arms, items=9))}
    assert len(names) == 4
    nine = [{e["id"] for e in build(arms, items=9, checks=0, seed=seed).key["items"]} for seed in (0, 1)]
    assert nine[0] != nine[1]  # a seed draws its items from all that there are


def test_the_page_does_not_tell_the_arms_apart():
    arms = arms_of("arm1", "arm2")
    for name, of in arms.items():
        arms[name] = {i: Text(t.text.replace(name, {"arm1": "this", "arm2": "that"}[name])) for i, t in of.items()}
    html = to_html(build(arms, seed=987654).page)
    data = json.loads(re.search('id="data">(.*?)</script>', html, re.S)[1])
    assert data.keys() == {"study", "questions", "items"}
    assert {tuple(item) for item in data["items"]} == {("item", "label", "source", "left", "right")}
    assert not re.search("arm1|arm2|test/|987654|broken", html)


def test_hostile_text_is_data():
    arms = {name: {"1": Text(f"{name} {EVIL}", EVIL)} for name in ("a", "b")}
    study = build(arms, checks=0, questions=[EVIL])
    html = to_html(study.page)
    assert html.count("<script") == 2 and html.count("</script") == 2 and "<!--" not in html
    assert json.loads(re.search('id="data">(.*?)</script>', html, re.S)[1]) == study.page


def test_what_has_no_partner_or_is_the_same_is_counted():
    arms = arms_of("a", "b", "c", items=10)
    arms["a"]["alone"] = Text("x")
    for i in range(4):
        arms["b"][f"test/{i}"] = arms["c"][f"test/{i}"] = arms["a"][f"test/{i}"]
    for i in range(4, 9):
        arms["c"][f"test/{i}"] = arms["b"][f"test/{i}"]
    study = build(arms, items=6, checks=0)
    assert not {f"test/{i}" for i in range(4)} & {e["id"] for e in study.key["items"]}
    assert study.said[0] == "left out, without a partner: 1 items of a"
    assert study.said[1] == "left out, all arms wrote the same: 4 of 10 items"
    assert re.fullmatch(
        "the pairs of arms are not balanced, .*: a and b [23], a and c [23], b and c [01]", study.said[2]
    )
    with pytest.raises(ValueError, match="wrote the same text for each of their 10 items"):
        build({"a": arms["a"], "b": arms["a"]} | {"b": {i: arms["a"][i] for i in [*arms["b"]]}})


@pytest.mark.parametrize("text", ["one two three four five", "short one", "日本語の文", "a b a b a b"])
def test_a_broken_text_has_its_words_in_another_order(text):
    broken = shuffled(text, random.Random(0))
    assert broken != text and Counter(broken.replace(" ", "")) == Counter(text.replace(" ", ""))
    assert shuffled("a a a a a", random.Random(0)) is None and shuffled("", random.Random(0)) is None


def test_rows_are_matched_by_what_tells_them_apart(tmp_path):
    """By id; by index where ids repeat or are missing; samples of train_lm.py by their prompts."""
    by_id = [rows_of("a", 3), rows_of("b", 3)[::-1]]
    repeated = [[row | {"id": "same"} for row in rows] for rows in by_id]
    samples = [[{"prompt": f"p{i}", "text": f"{arm}{i}"} for i in range(3)] for arm in "ab"]
    for rows, first in ((by_id, "test/0"), (repeated, "0"), (samples, "p0")):
        files = [tmp_path / f"{i}.jsonl" for i in range(2)]
        for file, content in zip(files, rows, strict=True):
            write_arm(file, content)
        arms = read_arms(files, ["a", "b"])
        assert arms["a"].keys() == arms["b"].keys() and arms["b"][first].text.startswith("b")
    assert arms["a"]["p1"].source == "p1"


def test_folders_of_runs(tmp_path, capsys):
    for arm in ("ce", "dpsm"):
        (tmp_path / arm).mkdir()
        write_arm(tmp_path / arm / "predictions-val.jsonl", rows_of(arm))
    write_arm(tmp_path / "ce" / "predictions-test.jsonl", rows_of("test"))  # of one run alone
    sources = write_arm(tmp_path / "articles.jsonl", [{"id": f"test/{i}", "article": f"long {i}"} for i in range(11)])
    runs = [str(tmp_path / arm) for arm in ("ce", "dpsm")]
    main(["make", *runs, "--items", "9", "--checks", "0", "--out", str(tmp_path / "s"), "--sources", sources])
    out = capsys.readouterr()
    assert "9 pairs of 2 arms and 0 checks" in out.out and "KEY.json says which side is which arm" in out.out
    key = json.loads((tmp_path / "s" / "KEY.json").read_text())
    assert key["arms"] == ["ce", "dpsm"] and len(key["questions"]) == 2
    html = (tmp_path / "s" / "study.html").read_text()
    assert "ce says of" in html and "test says of" not in html and '"label": "Source", "source": "long ' in html
    if "test/11" in [e["id"] for e in key["items"]]:
        assert "the reference is shown: 1 of 9 pairs" in out.err
    samples = [{"prompt": f"p{i}", "text": f"text {i} of a run"} for i in range(3)]
    for i in range(2):
        (tmp_path / f"lm{i}").mkdir()
        texts = [s | {"text": f"{i} {s['text']}"} for s in samples]
        (tmp_path / f"lm{i}" / "samples.json").write_text(json.dumps(texts))
    main(["make", *(str(tmp_path / f"lm{i}") for i in range(2)), "--checks", "1", "--out", str(tmp_path / "t")])
    assert "3 pairs of 2 arms and 1 checks" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, says",
    [
        ("{a}", "one arm"),
        ("{a} {a}", "is given twice"),
        ("{a} {folder}/../{name}/a.jsonl", "is given twice"),
        ("{a} {folder}/none.jsonl", "cannot read .*none.jsonl"),
        ("{a} {folder}", "no file that all runs have, .* for one; expected one of predictions-test.jsonl"),
        ("{a} {folder} --split ood", "expected one of predictions-ood.jsonl in each"),
        ("{a} {other}", "no item in common: a has 'test/0', other has 'else/0'"),
        ("{a} {moved}", "id test/0 has one reference in .*a.jsonl and another in .*moved.jsonl"),
        ("{a} {copy}", "wrote the same text for each of their 12 items"),
        ("{a} {damaged}", "damaged.jsonl, line 2: not JSON"),
        ("{a} {bare}", "bare.jsonl, line 1: no text, expected an object with id or index and prediction or text"),
        ("{a} {nameless}", "row 1 of .*nameless.jsonl has no id, row 1 of .*nameless.jsonl has no index"),
        ("{a} {twice}", "has id 'test/0' 2 times"),
        ("{a} {empty}", "empty.jsonl holds no rows"),
        ("{a} {b} --items 0", "--items 0"),
        ("{a} {b} --checks 99", "--checks 99: only 12 texts"),
        ("{a} {b} --question x --question x", "each another one"),
        ("{a} {b} --question=", "each another one"),
        ("{a} {b} --sources {a}", "expected an object with id or index and source or article"),
        ("{a} {b} --item 3", "did you mean --items"),
    ],
)
def test_bad_arms_are_refused_in_a_line(flags, says, tmp_path, capsys, monkeypatch):
    good = rows_of("a")
    content = {
        "a": good,
        "b": rows_of("b"),
        "other": [row | {"id": f"else/{i}"} for i, row in enumerate(good)],
        "moved": [row | {"reference": "r", "prediction": "x"} for row in good],
        "copy": good,
        "bare": [{"id": "test/0", "prediction": 3}],
        "nameless": [{"prediction": "x"}],
        "twice": [{"id": "test/0", "prediction": "x"}] * 2,
        "empty": [],
    }
    named = {name: write_arm(tmp_path / f"{name}.jsonl", rows) for name, rows in content.items()}
    (tmp_path / "damaged.jsonl").write_text(json.dumps(good[0]) + '\n{"id"\n')
    named |= {"folder": str(tmp_path), "name": tmp_path.name, "damaged": str(tmp_path / "damaged.jsonl")}
    out = tmp_path / "study"
    refused(capsys, says, lambda: main(["make", *flags.format(**named).split(), "--out", str(out)]), out)
    assert not out.exists() and not [p for p in tmp_path.iterdir() if p.name.startswith(".tmp")]


def test_a_study_is_never_written_over(made, capsys, tmp_path):
    folder, key = made
    files = [str(tmp_path / f"{arm}.jsonl") for arm in ("plain", "fancy")]
    same = ["make", *files, "--out", str(folder), "--checks", "4", "--question", "Better?"]
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "votes-x.json").write_text("{}")
    main(same)
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert after == before | {"votes-x.json": b"{}"}
    refused(capsys, "holds another study, " + key["study"], lambda: main([*same, "--seed", "1"]), folder)
    (folder / "KEY.json").unlink()
    refused(capsys, "holds another study; give another --out", lambda: main([*same, "--seed", "1"]), folder)
    assert (folder / "study.html").read_bytes() == before["study.html"]
    main(same)  # the key again
    assert (folder / "KEY.json").read_bytes() == before["KEY.json"]
    (folder / "KEY.json").write_text("[")
    refused(capsys, "KEY.json, line 1: not JSON", lambda: main(same), folder)


def test_votes_are_counted_for_the_arms(made, capsys, tmp_path):
    """Two raters for fancy, who differ on two items, one of them with a tie."""
    folder, key = made
    odd = [e["item"] for e in key["items"] if "broken" not in e][:2]
    one = vote(folder, "one", prefers(1), key)

    def other(entry):
        choice = prefers(1)(entry)
        return {odd[0]: "tie", odd[1]: {"left": "right", "right": "left"}[choice]}.get(entry["item"], choice)

    two = vote(folder, "two", other, key)
    main(["tally", one, two, "--list", "--json", str(tmp_path / "out.json")])
    out = capsys.readouterr()
    rate = (0.5 * 0.5 + 0.5 * 1) / 12  # of plain: shares of a quarter and a half, and ten of none
    low, high = (100 * end for end in win_rate([0.25, 0.5, *[0] * 10])[1:])
    lines = out.out.splitlines()
    assert f"  plain over fancy: {100 * rate:.1f} % ({low:.1f} to {high:.1f}) in 24 votes on 12 items" in lines
    p = binomtest(0, 11).pvalue
    assert any(f"items won 0, lost 11, tied 1; sign test p {p:.4g}, Holm {p:.4g}; 2 raters, alpha" in x for x in lines)
    assert re.search("rater one: 16 of 16 votes, failed 0 of 4 checks, 0 ties, left in .* %", lines[1])
    assert "rater two: 16 of 16 votes, failed 0 of 4 checks, 1 ties" in lines[2] and not out.err
    by_id = {e["item"]: e["id"] for e in key["items"]}
    assert (
        f"  {by_id[odd[0]]}  plain over fancy  0.25" in lines and f"  {by_id[odd[1]]}  plain over fancy  0.50" in lines
    )
    refused(capsys, "would write over", lambda: main(["tally", one, "--json", str(folder / "KEY.json")]), folder)
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["results"][0]["scores"][by_id[odd[1]]] == 0.5 and len(written["results"][0]["scores"]) == 12
    assert written["results"][0]["rate"] == pytest.approx(rate) and written["raters"][1]["left_out"] is False


def test_inattentive_raters(made, capsys):
    folder, key = made
    good = vote(folder, "good", prefers(0), key)
    blind = vote(folder, "blind", lambda e: e.get("broken") or side_of(e, 1), key)
    main(["tally", good, blind])
    out = capsys.readouterr()
    assert "rater blind: 16 of 16 votes, failed 4 of 4 checks" in out.out and "50.0 %" in out.out
    main(["tally", good, blind, "--drop-inattentive"])
    out = capsys.readouterr()
    assert "100.0 %" in out.out and out.err.splitlines() == ["left out as inattentive: rater blind, 16 votes"]
    main(["tally", good, blind, "--drop-inattentive", "4"])
    assert "50.0 %" in capsys.readouterr().out
    refused(capsys, "all 1 raters failed", lambda: main(["tally", blind, "--drop-inattentive"]), folder)


@pytest.mark.parametrize("choices, failed", [("wt", 0), ("ww", 0), ("tt", 1), ("wb", 1), ("bt", 1), ("w", 0), ("", 0)])
def test_a_check_is_failed_where_the_broken_text_is_preferred_or_the_whole_by_no_question(choices, failed):
    from eval.preference.tally import Item, Key, Rater, Vote

    key = Key("s", ["a", "b"], ["one", "two"], {"1": Item("x", 0, 0, "left"), "2": Item("y", 0, 1, "")})
    sides = {"w": "right", "b": "left", "t": "tie"}
    votes = {("1", q): Vote(sides[c], 1.0) for q, c in zip(key.questions, choices, strict=False)}
    assert Rater("r", votes | {("2", "one"): Vote("left", 1.0)}).checks(key) == (failed, bool(choices))


def test_three_arms_have_strengths(tmp_path, capsys):
    files = [write_arm(tmp_path / f"{arm}.jsonl", rows_of(arm, 40)) for arm in "abc"]
    main(["make", *files, "--items", "36", "--question", "Better?", "--out", str(tmp_path)])
    key = json.loads((tmp_path / "KEY.json").read_text())

    def mostly(entry):  # the lower number, but on every third item
        return prefers((max if int(entry["item"]) % 3 == 0 else min)(entry["left"], entry["right"]))(entry)

    main(["tally", vote(tmp_path, "r", mostly, key)])
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if "strength, log odds: " in line]
    found = re.findall(r"(\w) ([+-][\d.]+) \(", line)
    assert [arm for arm, _ in found] == ["a", "b", "c"]
    assert sum(float(strength) for _, strength in found) == pytest.approx(0, abs=2e-3)
    assert out.count(" over ") == 3
    main(["tally", vote(tmp_path, "s", prefers(0), key)])
    assert "no Bradley-Terry strengths: some arms never won" in capsys.readouterr().err


GOOD = {"item": "1", "question": "Better?", "choice": "left", "seconds": 1}


@pytest.mark.parametrize(
    "change, says",
    [
        ({"study": "0" * 12}, "votes of study '000000000000', the key is of"),
        ({"rater": " "}, "no rater with a list of votes"),
        ({"rater": "\x1b[2J"}, "no rater with a list of votes"),
        ({"votes": []}, "no votes yet of rater 'r'"),
        ({"votes": [GOOD | {"item": "99"}]}, "vote 1 is none of this study"),
        ({"votes": [GOOD | {"choice": "a"}]}, "vote 1 is none of this study"),
        ({"votes": [GOOD, GOOD | {"question": "?"}]}, "vote 2 is none of this study"),
        ({"votes": [GOOD | {"seconds": -1}]}, "vote 1 is none of this study"),
        ({"votes": [GOOD, GOOD]}, "vote 2 is a second one on item 1, 'Better[?]'"),
    ],
)
def test_bad_votes_are_refused_in_a_line(change, says, made, capsys):
    folder, key = made
    path = vote(folder, "r", prefers(0), key, **change)
    refused(capsys, says, lambda: main(["tally", path]), folder)


def test_votes_that_cannot_be_counted_together(made, capsys, tmp_path):
    folder, key = made
    path = vote(folder, "r", prefers(0), key)
    (tmp_path / "again.json").write_bytes((folder / "votes-r.json").read_bytes())
    again = str(tmp_path / "again.json")
    says = "votes of rater 'r' twice, in .*votes-r.json and .*again.json"
    refused(capsys, says, lambda: main(["tally", path, again]), folder)
    refused(capsys, "cannot read .*KEY.json", lambda: main(["tally", again]), folder)  # no key beside it
    main(["tally", again, "--key", str(folder / "KEY.json")])
    (folder / "votes-r.json").write_text('{"study": "')
    says = "votes-r.json, line 1: not JSON .*; let the rater download it again"
    refused(capsys, says, lambda: main(["tally", path]), folder)
    refused(capsys, "cannot read", lambda: main(["tally", str(folder / "none.json")]), folder)


def test_half_a_file_of_votes_counts_what_there_is(made, capsys):
    folder, key = made
    first = next(e for e in key["items"] if "broken" not in e)
    main(["tally", vote(folder, "r", lambda e: "left" if e is first else None, key)])
    out = capsys.readouterr().out
    assert (
        "rater r: 1 of 16 votes, failed 0 of 0 checks" in out and "in 1 votes on 1 items" in out and "alpha" not in out
    )


def test_damaged_keys_and_votes_are_refused_or_read(made, tmp_path):
    folder, content = made
    key = read_key(folder / "KEY.json")
    votes = json.loads(open(vote(folder, "r", prefers(0), content)).read())
    content["items"], votes["votes"] = content["items"][:5], votes["votes"][:5]
    path = tmp_path / "file.json"

    def reads(reader):
        def read(raw):
            path.write_bytes(raw)
            refusal(lambda: reader(path))

        return read

    many_files(reads(read_key), content)
    many_files(reads(lambda file: read_votes(file, key)), votes)


def test_the_interval_of_a_win_rate():
    """scipy's Wilson interval for wins and losses; and one that holds as often as it says for ties and averages."""
    for won, n in ((0, 5), (3, 10), (10, 10), (57, 100)):
        expected = binomtest(won, n).proportion_ci(method="wilson")
        found = win_rate([1.0] * won + [0.0] * (n - won))
        assert found == pytest.approx((won / n, expected.low, expected.high), abs=1e-12)
    assert win_rate([0.5] * 8)[1:] == wilson(0.5, 8) and win_rate([1.0]) == (1.0, *wilson(1.0, 1))
    rng = np.random.default_rng(0)
    for chances in ((0.1, 0.8, 0.1), (0.2, 0.2, 0.6)):  # of 0, a tie, 1; two raters who partly agree
        first = rng.choice(3, (2000, 60), p=chances)
        second = np.where(rng.random(first.shape) < 0.5, first, rng.choice(3, first.shape, p=chances))
        truth = (chances[1] + 2 * chances[2]) / 2
        ends = [win_rate(scores)[1:] for scores in ((first + second) / 4).tolist()]
        # A standard error of 2,000 draws at 95 % is 0.5 %.
        assert 0.935 < np.mean([low <= truth <= high for low, high in ends]) < 0.965


# Wins of the row's team over the column's: Milwaukee, Detroit, Toronto, New York, Boston, Cleveland, Baltimore in 1987
# (Agresti, Categorical Data Analysis, 2002, section 10.6).
BASEBALL = [
    [0, 7, 9, 7, 7, 9, 11],
    [6, 0, 7, 5, 11, 9, 9],
    [4, 6, 0, 7, 7, 8, 12],
    [6, 8, 6, 0, 6, 7, 10],
    [6, 2, 6, 7, 0, 7, 12],
    [4, 4, 5, 6, 6, 0, 6],
    [2, 4, 1, 3, 1, 7, 0],
]


def test_bradley_terry():
    """Agresti's table 10.11: strengths over Baltimore's, and standard errors of about 0.3."""
    wins = np.zeros((273, 7, 7))
    games = [(i, j) for i in range(7) for j in range(7) for _ in range(BASEBALL[i][j])]
    wins[np.arange(273), *np.array(games).T] = 1
    strength, covariance = bradley_terry(wins)
    assert np.round(strength - strength[-1], 2).tolist() == [1.58, 1.44, 1.29, 1.25, 1.11, 0.68, 0]
    errors = np.sqrt(np.diag(covariance) + covariance[-1, -1] - 2 * covariance[:, -1])
    assert np.round(errors[:-1], 1).tolist() == [0.3] * 6 and strength.sum() == pytest.approx(0, abs=1e-9)


def test_bradley_terry_of_two_arms_is_the_log_odds():
    """Seven wins, two losses and a tie: log(7.5 / 2.5). Each vote twice on its item is no more information."""
    shares = np.array([1.0] * 7 + [0.0] * 2 + [0.5])
    wins = np.zeros((10, 2, 2))
    wins[:, 0, 1], wins[:, 1, 0] = shares, 1 - shares
    strength, covariance = bradley_terry(wins)
    assert strength[0] - strength[1] == pytest.approx(math.log(3))
    # The sandwich by hand: sum of (share - p)^2 over (n p q)^2.
    by_hand = ((shares - 0.75) ** 2).sum() / (10 * 0.75 * 0.25) ** 2
    assert covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1] == pytest.approx(by_hand)
    again = bradley_terry(2 * wins)
    assert np.allclose(again[0], strength) and np.allclose(again[1], covariance)
    wins[7:] = 0
    with pytest.raises(ValueError, match="never won"):
        bradley_terry(wins)


def test_agreement():
    """The nominal example of Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011), part C: 0.743."""
    pytest.importorskip("krippendorff", reason="agreement needs krippendorff (requirements-dev.txt)")
    table = ["123321412...", "1233224125.3", ".3332342251.", "12332441251."]
    raters = [{unit: value for unit, value in enumerate(row) if value != "."} for row in table]
    assert round(agreement(raters), 3) == 0.743
    assert agreement(raters[:1]) is None and agreement([{1: "a"}, {2: "b"}]) is None
    assert agreement([{1: "a", 2: "a"}, {1: "a", 2: "a", 3: "b"}]) is None  # one value where two voted


def test_without_the_package_the_rest_is_said(made, capsys, monkeypatch):
    folder, key = made
    monkeypatch.setitem(sys.modules, "krippendorff", None)
    flip = {"left": "right", "right": "left"}
    files = [vote(folder, "a", prefers(0), key), vote(folder, "b", lambda e: flip[prefers(0)(e)], key)]
    main(["tally", *files])
    out = capsys.readouterr()
    assert "50.0 %" in out.out and "pip install krippendorff" in out.err and out.err.count("\n") == 1
