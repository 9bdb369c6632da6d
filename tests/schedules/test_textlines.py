"""schedules/textlines.py: one rule for every text file, and one line of error with file and line."""

import gzip
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schedules.textlines import BOM, parse_json, read_csv, read_json, read_lines, read_rows, read_text, read_toml

ROWS = '{"a": 1}\n\n{"a": "\u2028\x85\\u0000"}\n'
READERS = {  # suffix -> all of a file as its reader gives it
    "txt": read_text,
    "lines.txt": lambda path: list(read_lines(path)),
    "json": read_json,
    "jsonl": lambda path: list(read_rows(path)),
    "csv": lambda path: list(read_csv(path)),
    "tsv": lambda path: list(read_csv(path)),
    "toml": read_toml,
}


def put(folder, name: str, content: str | bytes):
    path = folder / name
    content = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(gzip.compress(content) if name.lower().endswith(".gz") else content)
    return path


@pytest.mark.parametrize("name", ["x", "x.gz", "x.GZ"])
@pytest.mark.parametrize(
    "suffix, content",
    [
        ("json", '{"a": [1,\n2.5e3]}'),
        ("jsonl", ROWS),
        ("csv", 'a,b\n\n1,"two\nlines, one\u2028cell"\n\n"",4\n'),
        ("tsv", "a\tb\n1\ttwo, one cell\n"),
        ("toml", 'a = 1\n[b]\nc = "\u2028"\n'),
        ("lines.txt", "one\n\n two\u2028\x0b\x85three \n"),
    ],
)
def test_mark_line_ends_and_packing_change_nothing(tmp_path, suffix, content, name):
    stem, _, gz = name.partition(".")
    name = f"{stem}.{suffix}.{gz}".rstrip(".")
    want = READERS[suffix](put(tmp_path, f"plain.{suffix}", content))
    assert want
    for mark in (b"", BOM):
        for end in ("\n", "\r\n"):
            # A cell's line end is its own.
            got = READERS[suffix](put(tmp_path, name, mark + content.replace("\n", end).encode()))
            assert str(got).replace("\\r\\n", "\\n") == str(want), (mark, end)
        assert READERS[suffix](put(tmp_path, name, mark + content.rstrip("\n").encode())) == want


def test_a_text_keeps_its_characters(tmp_path):
    text = "one\r\ntwo\0\rthree\n\n\ufeff four\u2028"
    path = put(tmp_path, "x.txt", BOM + text.encode())
    assert read_text(path) == text and "".join(read_lines(path, ends=True)) == text
    assert list(read_lines(path)) == ["one", "two\0\rthree", "", "\ufeff four\u2028"]
    assert read_text(put(tmp_path, "y.txt", BOM)) == "" and list(read_rows(put(tmp_path, "y.jsonl", BOM))) == []


def test_rows_are_numbered_by_their_lines(tmp_path):
    assert list(read_rows(put(tmp_path, "x.jsonl", "\n1\n\n[2]"))) == [(2, 1), (4, [2])]
    rows = list(read_csv(put(tmp_path, "x.csv", '\n a , b\n1,"x\ny"\n\n2,z\n')))
    assert rows == [(4, {"a": "1", "b": "x\ny"}), (6, {"a": "2", "b": "z"})]


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("x.jsonl", '{"a": 1}\n{"a": \n', "line 2: not JSON (Expecting value, column 7)"),
        ("x.jsonl", '{}\n\n{"a": NaN}\n', "line 3: NaN is no number of JSON"),
        ("x.jsonl", '{}\n{"a": -Infinity}', "line 2: -Infinity is no number of JSON"),
        ("x.jsonl", '{}\n{"a": 1e999}', "line 2: 1e999 is no number of JSON"),
        ("x.jsonl", "1" * 5000, "line 1: an integer of too many digits"),
        ("x.jsonl", '{}\n{"\\ud83d": 1}\n', "line 2: half a surrogate pair"),
        ("x.jsonl", '{}\n["\\uDE00 x"]\n', "line 2: half a surrogate pair"),
        ("x.jsonl", "{}\n" + "[" * 100_000, "line 2: JSON that is nested too deeply"),
        ("x.jsonl", b'{}\n{"a": "\xe9"}\n', "line 2: not UTF-8 text (the byte 0xe9)"),
        ("x.jsonl", b"{}\n\0\0\0\n", "line 2: not JSON"),
        ("x.json", '{"a": 1,\n"b" 2}', "line 2: not JSON (Expecting ':' delimiter, column 5)"),
        ("x.json", b"[1,\n\n\xff]", "line 3: not UTF-8 text (the byte 0xff)"),
        ("x.json", "[1]\n[2]", "line 2: not JSON (Extra data, column 1)"),
        ("x.json", "{} ".encode("utf-16"), "line 1: not UTF-8 text (UTF-16)"),
        ("x.json", '{"a":' * 100_000, "line 1: JSON that is nested too deeply"),
        ("x.txt", b"ok\nal\xff", "line 2: not UTF-8 text"),
        ("x.lines.txt", b"ok\r\nal\xed\xa0\x80", "line 2: not UTF-8 text"),  # a surrogate's bytes
        ("x.csv", "a,b\n1,2\n\n3\n", "line 4: 1 values, expected the 2 of the header"),
        ("x.csv", "a,b\n1,2,3\n", "line 2: 3 values, expected the 2"),
        ("x.csv", "a,b\n1,\0\n", "line 2: a NUL byte"),
        ("x.csv", 'a,b\n1,"2\n', "line 2: not CSV (unexpected end of data)"),
        ("x.csv", "a,b\n1,2\r3,4\n", "line 2: not CSV (new-line character"),
        ("x.csv", "step,loss,step\n", "line 1: two columns are called 'step'"),
        ("x.tsv", b"a\tb\n\xe9\t2\n", "line 2: not UTF-8"),
        ("x.toml", "a = 1\nb =\n", "not TOML (Invalid value (at line 2"),
        ("x.toml", "a = " + "[" * 100_000, "nested too deeply"),
    ],
)
@pytest.mark.parametrize("packed", ["", ".gz"])
def test_a_fault_is_one_line_with_file_and_line(tmp_path, name, content, said, packed):
    path = put(tmp_path, name + packed, content)
    with pytest.raises(ValueError) as caught:
        READERS[name.removeprefix("x.")](path)
    message = str(caught.value)
    assert message.startswith(str(path)) and said in message and "\n" not in message and len(message) < 400
    assert re.search(r"; [a-z ]+", message), "it says what to do"


def test_files_that_cannot_be_read(tmp_path):
    packed = put(tmp_path, "x.jsonl.gz", '{"a": 1}\n' * 1000)
    (tmp_path / "cut.jsonl.gz").write_bytes(packed.read_bytes()[:-9])
    (tmp_path / "plain.jsonl.gz").write_bytes(b"{}\n")
    broken = bytearray(packed.read_bytes())
    broken[12] ^= 255
    (tmp_path / "broken.jsonl.gz").write_bytes(broken)
    for name in ("cut.jsonl.gz", "plain.jsonl.gz", "broken.jsonl.gz", "none.jsonl", "none.gz", ""):
        with pytest.raises(ValueError, match=re.escape(f"cannot read {tmp_path / name} (")):
            list(read_rows(tmp_path / name))


@pytest.mark.parametrize("reader, content", [(read_rows, ROWS), (read_csv, 'a,b\n1,"ü, x"\n3,"y"\n')])
def test_what_a_kill_left_is_dropped_where_the_caller_counts_it(tmp_path, reader, content):
    raw = content.encode()
    rows = list(reader(put(tmp_path, "x.csv", raw)))
    start = raw.rindex(b"\n", 0, -1) + 1
    for end in range(start + 1, len(raw) - 1):
        path, half = put(tmp_path, "y.csv", raw[:end]), []
        found = list(reader(path, half=half))
        whole = found == rows or len(found) == len(rows)  # "3," has its two cells, the second cut
        assert whole or (found == rows[:-1] and half == [raw.count(b"\n", 0, start) + 1])
        if half:
            with pytest.raises(ValueError, match=f"line {half[0]}: "):
                list(reader(path))
    half = []
    assert list(read_rows(put(tmp_path, "z.jsonl", b'{}\n{"a": \xc3'), half=half)) == [(1, {})] and half == [2]
    with pytest.raises(ValueError, match="line 1: not JSON"):  # not at the end: not what a kill leaves
        list(read_rows(put(tmp_path, "z.jsonl", '{"a"\n{}\n'), half=half))


def test_numbers_that_json_has_not_are_read_where_a_log_may_have_them(tmp_path):
    path = put(tmp_path, "x.jsonl", "[NaN, Infinity, -Infinity, 1e999]\n")
    ((_, value),) = read_rows(path, nan=True)
    assert str(value) == "[nan, inf, -inf, inf]"


def test_a_whole_pair_and_a_kind(tmp_path):
    assert read_json(put(tmp_path, "x.json", '["\\ud83d\\ude00"]')) == ["\U0001f600"]
    with pytest.raises(ValueError, match="x.json: holds a list, expected an object; "):
        read_json(tmp_path / "x.json", dict)
    assert parse_json(b"\xef\xbb\xbf[1]", "a label") == [1]
    with pytest.raises(ValueError, match="^a label line 7: not JSON"):
        parse_json("[", "a label line 7", None)


PIECES = [b"\xef\xbb\xbf", b"\xff\xfe", b"\r", b"\n", b"\r\n", b"\0", b'"', b"\\", b"\\ud800", b"{", b"[", b"]", b"}"]
PIECES += [b":", b",", b"\t", b"=", b"a", b"NaN", b"1e999", b"-", b"9" * 400, b"\xc3", "é\u2028".encode(), b"[" * 3000]
BYTES = st.lists(st.one_of(st.sampled_from(PIECES), st.binary(max_size=6)), max_size=24).map(b"".join)


@settings(max_examples=100, deadline=None)
@given(BYTES)
def test_any_bytes_are_read_or_refused_in_one_line(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp()
    for suffix, read in READERS.items():
        path = put(folder, f"fuzz.{suffix}", content)
        try:
            value = read(path)
        except ValueError as error:
            assert type(error) is ValueError and str(path) in str(error) and "\n" not in str(error)
        else:
            json.dumps(value, ensure_ascii=False, default=str).encode()  # text all through
