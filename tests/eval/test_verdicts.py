"""McNemar's test between two files of verdicts, rule by rule."""

import json

import pytest

from eval.verdicts import compare, main, read_verdicts


def write(path, by_rule: dict[str, str], **more) -> str:
    """A file of verdicts; ``by_rule``: rule -> a string of 1 and 0, a problem each."""
    count = len(next(iter(by_rule.values())))
    rows = [
        {"id": f"test/{i}", "correct": {r: v[i] == "1" for r, v in by_rule.items()}, "sample": 0} for i in range(count)
    ]
    path.write_text("".join(json.dumps(row | more) + "\n" for row in rows))
    return str(path)


def test_two_files(tmp_path, capsys):
    first = write(tmp_path / "a.jsonl", {"strict": "11110000", "flexible": "11110000"})
    second = write(tmp_path / "b.jsonl", {"strict": "00010001", "code": "11111111"})
    main([first, second, "--list"])
    out = capsys.readouterr()
    # 3 against 1: 2 * (1 + 4) / 2^4
    assert out.out.splitlines() == [
        "strict      50.00 %   25.00 %   of 8: both 1, only first 3, only second 1, neither 3; McNemar exact p 0.625",
        "          only first: test/0 test/1 test/2",
        "          only second: test/7",
    ]
    assert "not compared: flexible, code" in out.err


def test_a_runs_folder_is_taken(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    write(tmp_path / "run" / "verdicts.jsonl", {"strict": "1100"})
    main([str(tmp_path / "run"), write(tmp_path / "b.jsonl", {"strict": "1000"})])
    assert "of 4: both 1, only first 1" in capsys.readouterr().out


def test_problems_of_one_file_alone_are_counted(tmp_path, capsys):
    first, second = write(tmp_path / "a.jsonl", {"strict": "1101"}), write(tmp_path / "b.jsonl", {"strict": "10"})
    main([first, second, "--rule", "strict"])
    assert capsys.readouterr().out.splitlines()[1].strip() == "left out, in one file alone: 2, 0"


def test_samples_are_left_out(tmp_path):
    path = tmp_path / "a.jsonl"
    write(path, {"strict": "10"})
    sampled = write(tmp_path / "s.jsonl", {"strict": "01"}, sample=1)
    path.write_text(path.read_text() + (tmp_path / "s.jsonl").read_text())
    assert read_verdicts(path) == {"strict": {"test/0": True, "test/1": False}} and read_verdicts(sampled) == {}


@pytest.mark.parametrize(
    "line, says",
    [
        ('{"id": "test/0", "correct": {"strict": true}}', "line 2: a second verdict on test/0"),
        ('{"id": "test/1", "correct": true}', "line 2 is no verdict"),
        ('{"correct": {"strict": true}}', "line 2 is no verdict"),
        ("[]", "line 2 is no verdict"),
        ("{", "line 2: not JSON"),
    ],
)
def test_a_broken_file_is_one_line(tmp_path, capsys, line, says):
    good, bad = write(tmp_path / "a.jsonl", {"strict": "1"}), tmp_path / "b.jsonl"
    bad.write_text((tmp_path / "a.jsonl").read_text() + line + "\n")
    with pytest.raises(SystemExit) as end:
        main([good, str(bad)])
    err = capsys.readouterr().err
    assert end.value.code == 2 and says in err and "b.jsonl" in err and err.count("\n") == 1


def test_nothing_to_compare(tmp_path, capsys):
    text, code = write(tmp_path / "a.jsonl", {"strict": "1"}), write(tmp_path / "b.jsonl", {"code": "1"})
    with pytest.raises(SystemExit):
        main([text, code])
    assert "no rule to compare by" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no problem in common"):
        compare({"test/0": True}, {"test/1": True}, "strict")
