"""A few seconds of the drills: python -m tests.drill is the long form."""

import drill
import pytest


@pytest.mark.skipif(drill.sys.platform != "linux", reason="the drills are for Linux")
def test_nothing_is_lost_in_a_few_drills(tmp_path, monkeypatch):
    """A kill, lost streams, and two runs on one folder."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    table = drill.drills(3, 1, ("train_lm",), 0, 1, {"kill", "stream", "lock"}, tmp_path)
    assert not [lost for _, losses in table.values() for lost in losses], table
    assert sum(tried for tried, _ in table.values()) == 3


def test_a_loss_is_counted(tmp_path):
    """What a run that ended otherwise, or not at all, counts as."""
    whole = {"train": [1], "val": [], "summary": {}, "texts": {}, "weights": {}}
    assert drill.differs(tmp_path, whole).startswith("cannot be read")
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n')
    (tmp_path / "summary.json").write_text("{}")
    drill.torch.save({"model": {}}, tmp_path / "last.pt")
    assert drill.differs(tmp_path, whole) == "train differs"
    assert drill.differs(tmp_path, whole | {"train": [{"kind": "train", "step": 1}]}) == ""
    (tmp_path / ".tmp-1").touch()
    assert drill.differs(tmp_path, whole | {"train": [{"kind": "train", "step": 1}]}) == "left .tmp-1"
    assert drill.as_table({"a": [2, ["x"]], "b": [3, []]}).endswith("| a | 2 | 1 |\n| b | 3 | 0 |\n| all | 5 | 1 |")
