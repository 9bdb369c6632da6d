"""eval/rows.py: what a kill leaves is read up to there and written on from there."""

import torch

from eval.rows import Parts, json_line, rows_with_places, whole_rows, write_rows
from runtime.machine import World

ROWS = [{"id": i, "text": text} for i, text in enumerate(("ü\u2028\x85", 'a "quoted"\nline', ""))]


def test_rows_come_back_and_half_a_line_does_not(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert whole_rows(path) == []
    write_rows(path, iter(ROWS))
    assert whole_rows(path) == ROWS and "ü" in path.read_text(encoding="utf-8")
    whole = path.read_bytes()
    for cut in range(len(json_line(ROWS[2])) - 1, 1, -1):  # as much of the last line as a kill may leave
        path.write_bytes(whole[:-cut])
        assert whole_rows(path) == ROWS[:2]


def test_parts_are_written_on_after_a_kill(tmp_path):
    first, second = (Parts(tmp_path, "answers.*.part", World(rank, 1, torch.device("cpu"))) for rank in (0, 1))
    for parts, row in ((first, ROWS[0]), (second, ROWS[1])):
        with parts.append() as file:
            file.write(json_line(row) + '{"id": 9, "te')
    with first.append() as file:
        file.write(json_line(ROWS[2]))
    assert (tmp_path / "answers.0.part").read_text(encoding="utf-8") == json_line(ROWS[0]) + json_line(ROWS[2])
    assert first.read() == second.read() == [ROWS[0], ROWS[2], ROWS[1]]
    second.remove()  # not the main rank
    assert len(list(tmp_path.iterdir())) == 2
    first.remove()
    assert first.read() == [] and not list(tmp_path.iterdir())


def test_rows_of_others_are_told_by_line_or_by_entry(tmp_path):
    lines, entries = tmp_path / "a.jsonl", tmp_path / "a.json"
    lines.write_text('{"x": 1}\n\n"text"\n')
    entries.write_text('[{"x": 1}, "text"]')
    assert [*rows_with_places(lines)] == [(f"{lines}, line 1", {"x": 1}), (f"{lines}, line 3", "text")]
    assert [*rows_with_places(entries)] == [(f"{entries}, entry 1", {"x": 1}), (f"{entries}, entry 2", "text")]
