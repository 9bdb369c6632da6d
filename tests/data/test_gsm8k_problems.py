"""GSM8K's problems: reading, what of them is held out, and their targets in words."""

import itertools
import json

import pytest
from tiny_gsm8k import json_rows, solved, write_sums

from data.gsm8k import load_gsm8k, main, split_heldout, text_target
from data.numbers import parse_number
from eval.gsm8k import Sample, grade_text, read_outputs


@pytest.fixture
def folder(tmp_path):
    return write_sums(tmp_path)


def test_folder(folder):
    problems = load_gsm8k(folder, "test")
    assert len(problems) == 6 and problems[2].id == "test/2" and problems[2].gold == "12"
    assert problems[2].solution == "It is 2+10=<<2+10=12>>12."
    assert text_target(problems[2]) == "It is 2+10=<<2+10=12>>12.\n#### 12"
    assert text_target(problems[2], annotations=False) == "It is 2+10=12.\n#### 12"


@pytest.mark.parametrize(
    "line, error",
    [
        ('{"question": "a"}', "line 3 has no text in field 'answer'"),
        ('{"question": 5, "answer": "#### 5"}', "line 3 has no text in field 'question'"),
        ('{"question": "a", "answer": "so 5"}', "line 3: its answer does not end in a line '#### NUMBER'"),
        ('{"question": "a", "answer": "#### many"}', "line 3: its answer does not end"),
        ('{"question": "a"', "line 3: not JSON"),
        ("[1]", "line 3 is not an object"),
    ],
)
def test_a_broken_row_is_named_by_its_line(folder, line, error):
    lines = (folder / "train.jsonl").read_text().split("\n")
    (folder / "train.jsonl").write_text("\n".join([*lines[:2], line, *lines[2:]]))
    with pytest.raises(ValueError, match=error):
        load_gsm8k(folder, "train")


@pytest.mark.parametrize(
    "written, gold",
    [("18", "18"), ("1,234", "1234"), ("$1,200", "1200"), ("$18.50", "18.5"), ("−5", "-5"), ("$-5", "-5"), ("+7", "7")]
    + [
        ("3/4", "0.75"),
        ("2/3", "2/3"),
        ("1e3", "1000"),
        ("45%", "45"),
        ("18 dollars", "18"),
        ("１８", "18"),
        ("5.", "5"),
    ],
)
def test_a_target_is_right_by_the_strict_rule(folder, written, gold):
    """What a model is trained to write is graded right when it writes it; sentences stay as published."""
    row = {"question": "How much?", "answer": f"It is ${written}.\n#### {written}"}
    (folder / "train.jsonl").write_text(json.dumps(row) + "\n")
    (p,) = load_gsm8k(folder, "train")
    assert p.gold == gold and text_target(p) == f"It is ${written}.\n#### {gold}"
    (verdict,) = grade_text([Sample(p.id, text_target(p))], {p.id: p.gold})
    assert verdict.correct["strict"] and verdict.correct["flexible"]


def test_half_a_character_is_named_by_its_line(folder):
    """JSON may hold half a surrogate pair; UTF-8 may not, and a tokenizer would end on it without a line."""
    for field in ("question", "answer"):
        row = {"question": "a", "answer": "#### 5"} | {field: "\ud83d #### 5"}
        (folder / "train.jsonl").write_text('{"question": "a", "answer": "#### 5"}\n' + json.dumps(row) + "\n")
        with pytest.raises(ValueError, match="train.jsonl, line 2: half a surrogate pair"):
            load_gsm8k(folder, "train")
    path = folder / "outputs.jsonl"
    path.write_text(json.dumps({"id": "test/0", "output": "5 \ud83d"}) + "\n")
    with pytest.raises(ValueError, match="outputs.jsonl, line 1: half a surrogate pair"):
        read_outputs(path, ["test/0"])


def test_what_claims_to_be_the_full_set_is_counted(folder, tmp_path, monkeypatch):
    (folder / "gsm8k").mkdir()
    (folder / "test.jsonl").rename(folder / "gsm8k" / "test.jsonl")
    monkeypatch.setenv("LM_DATA", str(folder))
    for source in ("gsm8k", folder / "gsm8k"):
        with pytest.raises(ValueError, match="has 6 rows, expected the full set's 1,319"):
            load_gsm8k(source, "test")
    monkeypatch.setenv("LM_DATA", str(tmp_path / "elsewhere"))
    assert len(load_gsm8k(folder / "gsm8k", "test")) == 6  # what a folder is called claims nothing
    with pytest.raises(ValueError, match="cannot read .*test.jsonl"):
        load_gsm8k(folder, "test")
    with pytest.raises(ValueError, match="unknown split 'val'"):
        load_gsm8k(folder, "val")
    (folder / "train.jsonl").write_text("")
    with pytest.raises(ValueError, match="holds no problems"):
        load_gsm8k(folder, "train")


def test_hub(monkeypatch, tmp_path):
    import datasets

    monkeypatch.delenv("LM_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    rows = [{"question": "a", "answer": "#### 5"}] * 1319
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, split: rows)
    assert len(load_gsm8k("gsm8k", "test")) == 1319

    def offline(name, config, split):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ValueError, match=r"\(ConnectionError: no route\); either give .* in \$LM_DATA/gsm8k"):
        load_gsm8k("gsm8k", "test")


def test_heldout_split_is_stable():
    problems = [solved("#### 1", f"Question {i}?", f"train/{i}") for i in range(200)]
    rest, held = split_heldout(problems, 20)
    assert len(held) == 20 and sorted(rest + held, key=problems.index) == problems
    # Order of the rows does not move it, more of it holds the less, another seed is another split.
    again = split_heldout(problems[::-1], 20)[1]
    assert {p.id for p in again} == {p.id for p in held} < {p.id for p in split_heldout(problems, 40)[1]}
    assert {p.id for p in split_heldout(problems, 20, seed=1)[1]} != {p.id for p in held}
    # Pinned: a change of the rule would mix training and validation of a resumed run.
    assert [p.id for p in held[:3]] == ["train/0", "train/48", "train/53"]
    assert split_heldout(problems, 0) == (problems, [])
    with pytest.raises(ValueError, match="200 problems held out of 200"):
        split_heldout(problems, 200)


def test_data_command_line(folder, capsys):
    out = folder / "programs.jsonl"
    main(["--data", str(folder), "--out", str(out), "--workers", "1"])
    assert "6 of 6" in capsys.readouterr().out
    rows = json_rows(out)
    assert [row["id"] for row in rows] == [f"train/{i}" for i in range(6)]
    assert rows[1]["target"] == "# It is 1+10=11.\nstep_1 = 1 + 10\nprint(step_1)\n" and rows[1]["gold"] == "11"
    main(["--data", str(folder), "--format", "text", "--no-annotations", "--out", str(out)])
    assert json_rows(out)[1]["target"] == "It is 1+10=11.\n#### 11"


SIGNS = ["", "-", "+", "−", "–", "－", "- ", "−$", "$-", "-$"]
CURRENCIES = ["", "$", "€", "$ "]
DIGITS = ["18", "1,200", "1200.50", ".5", "5.", "007", "3/4", "2/3", "1e3", "1E-2", "１８", "1 200", "1_000", "½", "٣"]
DIGITS += ["\\frac{3}{4}", "1.200,50", "99999999999999999999", "1e400", "1/0", "2 1/2", "3:4", "1" * 2000, "inf", "nan"]
ENDS = ["", " dollars", "%", ".", "!", "**"]


def test_every_gold_answer_agrees_with_its_target_or_is_refused_with_its_line(tmp_path):
    """What loads, the target that is made of it and the strict rule agree, for every form that parse_number takes."""
    path, loaded = tmp_path / "train.jsonl", 0
    for written in map("".join, itertools.product(SIGNS, CURRENCIES, DIGITS, ENDS)):
        path.write_text(json.dumps({"question": "How much?", "answer": f"It is that.\n#### {written}"}) + "\n")
        try:
            (p,) = load_gsm8k(tmp_path, "train")
        except ValueError as error:
            assert f"{path}, line 1: its answer does not end in a line '#### NUMBER'" in str(error)
            continue
        loaded += 1
        (verdict,) = grade_text([Sample(p.id, text_target(p))], {p.id: p.gold})
        assert verdict.correct["strict"] and verdict.correct["flexible"], written
        assert parse_number(p.gold) == parse_number(written)
    assert loaded > 1000


def test_blank_lines_are_no_problems_and_lines_are_those_of_the_file(folder):
    lines = (folder / "train.jsonl").read_text().split("\n")
    plain = load_gsm8k(folder, "train")
    (folder / "train.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(lines).encode())
    assert load_gsm8k(folder, "train") == plain
    (folder / "train.jsonl").write_text("\n\n" + lines[0] + "\n\n{}\n")
    with pytest.raises(ValueError, match="train.jsonl, line 5 has no text in field 'question'"):
        load_gsm8k(folder, "train")
