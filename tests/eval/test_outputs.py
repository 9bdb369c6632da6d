"""Outputs in the layouts of others, each of the same six sums: told by id, by question, by place."""

import json

import pytest
from tiny_gsm8k import write_sums

from data.gsm8k import load_gsm8k
from eval.gsm8k import main
from eval.outputs import LAYOUTS, Sample, read_outputs

QUESTIONS = [f"What is {i} and 10?" for i in range(6)]
IDS = [f"test/{i}" for i in range(6)]
WROTE = [f"That makes {i + 10}.\n#### {i + 10}" for i in range(6)]
EXPECTED = [Sample(i, text) for i, text in zip(IDS, WROTE, strict=True)]


def harness(i: int, filter: str | None = None) -> dict:
    row = {"doc_id": i, "doc": {"question": QUESTIONS[i], "answer": f"#### {i + 10}"}, "target": f"#### {i + 10}"}
    row |= {"arguments": {"gen_args_0": {"arg_0": "Q"}}, "resps": [[WROTE[i]]], "filtered_resps": [str(i + 10)]}
    return row | ({"filter": filter} if filter else {})


LAYOUT = {
    "ours": [{"id": IDS[i], "output": WROTE[i], "sample": 0} for i in range(6)],
    "numbers": [{"id": i, "output": WROTE[i]} for i in range(6)],
    "numbers as text": [{"idx": str(i), "output": WROTE[i]} for i in range(6)],
    "question": [{"question": f"  {QUESTIONS[i]}\n", "output": WROTE[i]} for i in range(6)],
    "question before a number of theirs": [
        {"idx": 5 - i, "question": QUESTIONS[i], "completion": WROTE[i]} for i in range(6)
    ],
    "harness": [harness(i) for i in range(6)],
    "harness with filters": [harness(i, f) for f in ("strict-match", "flexible-extract") for i in range(6)],
    "tora": [
        {"idx": i, "question": QUESTIONS[i], "gt": str(i + 10), "code": [WROTE[i]], "pred": ["1"]} for i in range(6)
    ],
    "texts in order": WROTE,
    "lists of texts": [[text] for text in WROTE],
    "objects in order": [{"response": text, "model": "m"} for text in WROTE],
    "a prompt first": [{"prompt": "Question: ..."}, *({"id": i, "generated_text": WROTE[i]} for i in range(6))],
}


def write(folder, rows, name="outputs.jsonl"):
    path = folder / name
    text = json.dumps(rows) if name.endswith(".json") else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", ["outputs.jsonl", "outputs.json"])
@pytest.mark.parametrize("layout", LAYOUT)
def test_layouts_of_others(tmp_path, layout, name):
    said = []
    assert read_outputs(write(tmp_path, LAYOUT[layout], name), IDS, QUESTIONS, said=said) == EXPECTED
    assert bool(said) == (layout not in ("ours", "numbers")), "how it was read is said"


def test_what_is_left_out_is_said(tmp_path):
    said = []
    for layout in ("harness with filters", "a prompt first", "question"):
        read_outputs(write(tmp_path, LAYOUT[layout]), IDS, QUESTIONS, said=said)
    assert "6 outputs by question, field resps; 6 rows of other filters than strict-match" in said[0]
    assert "6 outputs by id, field generated_text; 1 rows without an output are passed over" in said[1]
    assert said[2].endswith("6 outputs by question, field output")


def test_several_samples_of_one_problem(tmp_path):
    rows = [{"doc_id": i, "resps": [["a", "b"]]} for i in range(6)]
    assert read_outputs(write(tmp_path, rows), IDS) == [Sample(i, text) for i in IDS for text in "ab"]


def test_a_runs_folder_is_taken(tmp_path):
    write(tmp_path, LAYOUT["ours"])
    assert read_outputs(tmp_path, IDS) == EXPECTED


def test_a_field_may_be_named(tmp_path):
    rows = [{"id": i, "output": "no", "final": WROTE[i]} for i in range(6)]
    assert read_outputs(write(tmp_path, rows), IDS, field="final") == EXPECTED
    with pytest.raises(ValueError, match="line 1: expected an object with id and a text output"):
        read_outputs(write(tmp_path, rows), IDS, field="finally")


@pytest.mark.parametrize(
    "rows, error",
    [
        ([{"question": "What is 7 and 10?", "output": ""}], "line 1: the question is that of no problem, or of two"),
        ([{"doc_id": 6, "resps": [["5"]]}], "line 1: unknown doc_id 6, expected test/0 to test/5, the number alone"),
        (WROTE[:5], "5 outputs without id or question, expected one for each of the 6 problems, in their order"),
        ([*WROTE, "more"], "7 outputs without id or question"),
        ([{"id": 0, "output": "5"}, "6"], "line 2: expected an object with id .*, as the other 1 have"),
        ([{"id": 0, "resps": [["5"], ["6"]]}], "line 1: expected an object with id"),
        ([{"prompt": "Q"}], "holds no outputs; 1 rows without an output are passed over; expected objects with id"),
    ],
)
def test_what_is_no_output_is_named_by_its_line(tmp_path, rows, error):
    with pytest.raises(ValueError, match=error):
        read_outputs(write(tmp_path, rows), IDS, QUESTIONS)


def test_program_of_thought_is_run_for_its_ans(tmp_path, capsys):
    """Its programs print nothing: the answer stands in ans. One that prints is left as it is."""
    write_sums(tmp_path)
    programs = [f"n = {i}\nans = n + 10" for i in range(5)] + ["ans = 0\nprint(15)"]
    rows = [{"question": q, "answer": 1.0, "executed": None, "generated": [p]} for q, p in zip(QUESTIONS, programs)]  # noqa: B905
    main([str(write(tmp_path, rows)), "--data", str(tmp_path), "--format", "code", "--workers", "1"])
    assert "100.00 %" in capsys.readouterr().out


def test_the_first_problems_alone(tmp_path, capsys):
    """As a run with --eval-problems answers them; beside a file with all, whose later outputs are left out."""
    write_sums(tmp_path)
    few, all_six = write(tmp_path, LAYOUT["ours"][:2], "few.jsonl"), write(tmp_path, LAYOUT["ours"], "all.jsonl")
    main([str(few), "--data", str(tmp_path)])
    assert "missing, graded wrong    4  test/2, test/3, test/4, test/5; --problems 2" in capsys.readouterr().out
    main([str(few), str(all_six), "--data", str(tmp_path), "--problems", "2"])
    said = capsys.readouterr()
    assert said.out.count("2 outputs for 2 of 2 problems") == 2 and "missing" not in said.out
    assert "all.jsonl: 4 outputs of later problems than the first 2 are left out" in said.err
    for count in ("7", "-1"):
        with pytest.raises(SystemExit):
            main([str(few), "--data", str(tmp_path), "--problems", count])
        assert f"--problems {count}: expected 0 to 6" in capsys.readouterr().err


def test_help_shows_every_layout_and_each_is_read(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert LAYOUTS in capsys.readouterr().out
    write_sums(tmp_path)
    problems = load_gsm8k(tmp_path, "test")
    for line in LAYOUTS.strip().splitlines():
        row, _ = json.JSONDecoder().raw_decode(line.strip().replace("{...}", "{}").replace(", ...}", "}"))
        if isinstance(row, dict):
            row = {k: QUESTIONS[0] if k == "question" else v for k, v in row.items()}
            row |= {k: k == "id" and "test/0" or 0 for k in ("id", "idx", "doc_id") if k in row}
        rows = [row] * (6 if isinstance(row, str) else 1)
        assert read_outputs(write(tmp_path, rows), [p.id for p in problems], QUESTIONS)
