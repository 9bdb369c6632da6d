"""Two variants of the tree beside each other."""

import csv
import subprocess

import pytest

from races import ab

PATCH = """--- a/races/probes.py
+++ b/races/probes.py
@@ -1 +1 @@
-{old}
+{new}
"""


def test_the_patched_tree_is_what_runs(tmp_path, monkeypatch):
    """A patch that gives a figure another unit. What is here does not run, to save the time."""
    text = (ab.ROOT / "races/probes.py").read_text()
    line = '        yield case, b.host_us(partial(timing.run_once, loss, leaves, y)), "us"'
    assert text.count(line) == 1
    (tmp_path / "races").mkdir()
    (tmp_path / "races/probes.py").write_text(text)
    git = dict(cwd=tmp_path, check=True, capture_output=True, text=True)
    subprocess.run(["git", "init", "-q"], **git)
    subprocess.run(["git", "add", "."], **git)
    (tmp_path / "races/probes.py").write_text(text.replace(line, line.replace(', "us"', ', "hours"')))
    patch = tmp_path / "hours.patch"
    patch.write_text(subprocess.run(["git", "diff"], **git).stdout)

    def figures(tree, *how):
        return {"host: none, us": 1.0} if tree == ab.ROOT else original(tree, *how)

    original, out = ab.figures, tmp_path / "ab.csv"
    monkeypatch.setattr(ab, "figures", figures)
    assert ab.main([str(patch), "--only", "host", "--rounds", "1", "--device", "cpu", "--out", str(out)]) == 0
    here, patched = csv.DictReader(out.open())
    assert (here["side"], here["host: none, us"]) == ("here", "1.0")
    assert any(k.endswith(", hours") and v for k, v in patched.items())


def test_ratios_are_medians_over_rounds():
    values = [(0, "here", 2.0), (0, "patched", 1.0), (1, "here", 4.0), (1, "patched", 3.0), (2, "here", 1.0)]
    turns = [{"round": i, "side": side, "x, ms": value} for i, side, value in values]
    turns += [{"round": 2, "side": "patched", "failed": "ValueError: no"}]
    assert ab.report(turns) == ["x, ms: 2 here, 2 patched, 0.625 x"]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["none.patch", "--only", "host"], "none.patch: there is no such file"),
        (["bad.patch", "--only", "host"], "bad.patch does not fit this tree"),
        (["bad.patch"], "--only: expected some of ceilings"),
        (["bad.patch", "--only", "tie"], "--only tie: expected some of ceilings"),
        (["bad.patch", "--only", "host", "--rounds", "0"], "--rounds 0: expected at least 1"),
    ],
)
def test_wrong_input_is_one_line(given, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.patch").write_text(PATCH.format(old="no such line", new="another"))
    with pytest.raises(SystemExit) as ended:
        ab.main(given)
    said = capsys.readouterr().err.strip()
    assert ended.value.code == 2 and says in said and said.count("\n") == 0
