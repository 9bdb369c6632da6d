"""Logging to Weights & Biases and trackio beside the folder: what is asked for, what fails and when, and one id."""

import json
import sqlite3
import sys
from types import SimpleNamespace

import pytest
from run_folders import Config, folder_at, start

from runtime import tracking


class Heard:
    """A tracker's module and run in one, which keeps what it is told."""

    __spec__ = object()

    def __init__(self):
        self.inits, self.rows, self.summary, self.ended = [], [], {}, []

    def init(self, **given):
        self.inits.append(given)
        return self

    def log(self, row, step):
        self.rows.append((step, row))

    def login(self):
        pass

    def finish(self, **how):
        self.ended.append(how)


@pytest.mark.parametrize(
    "flags, name, project",
    [
        (dict(wandb="mine"), "wandb", "mine"),
        (dict(track="wandb:mine"), "wandb", "mine"),
        (dict(track="wandb"), "wandb", "scorecast"),
        (dict(track="trackio"), "trackio", "scorecast"),
        (dict(track="trackio:a:b"), "trackio", "a:b"),
    ],
)
def test_rows_and_the_summary_go_to_what_is_asked_for(flags, name, project, tmp_path, monkeypatch):
    heard = Heard()
    monkeypatch.setitem(sys.modules, name, heard)
    run = start(tmp_path / "run", Config(out=str(tmp_path / "run"), **flags))
    run.log("train", 3, loss=1.5, spike=float("nan"))
    run.log("event", 3, event="resumed")
    run.summarise(dict(steps=4, test_nll=1.25, model="nano"))
    run.finish(0)
    (given,) = heard.inits
    assert given["project"] == project and given["resume"] == "allow" and given["config"]["out"].endswith("run")
    numbers = {"summary/steps": 4, "summary/test_nll": 1.25}
    rows = [(3, {"train/loss": 1.5, "train/spike": None})]
    assert heard.rows == (rows if name == "wandb" else [*rows, (4, numbers)])
    assert heard.ended == ([dict(exit_code=0)] if name == "wandb" else [{}])
    assert heard.summary == (dict(steps=4, test_nll=1.25, model="nano") if name == "wandb" else {})


@pytest.mark.parametrize("flags, asked", [(dict(wandb="p"), "--wandb p"), (dict(track="trackio"), "--track trackio")])
def test_a_missing_package_is_found_out_before_anything_is_written(flags, asked, tmp_path, monkeypatch):
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"^{asked} needs the package (wandb|trackio): pip install"):
        start(tmp_path / "run", Config(out=str(tmp_path / "run"), **flags))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "flags, says",
    [
        (dict(track="mlflow"), "--track mlflow: expected trackio or wandb, with :PROJECT or without"),
        (dict(track="trackio", wandb="p"), "--wandb p is --track wandb:p; give one of the two"),
    ],
)
def test_what_cannot_be_asked_for(flags, says, tmp_path):
    with pytest.raises(ValueError, match=f"^{says}$"):
        start(tmp_path / "run", Config(out=str(tmp_path / "run"), **flags))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fails", ["login", "init"])
def test_wandb_without_a_key_or_a_network_leaves_nothing(tmp_path, monkeypatch, fails):
    """`login` before anything is written, `init` with all of it taken away again; offline asks for no key."""

    def no(*args, **given):
        raise RuntimeError("No API key\nconfigured.")

    stub = SimpleNamespace(login=lambda: True, init=lambda **given: None, __spec__=object())
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(**vars(stub) | {fails: no}))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    cfg = Config(out=str(tmp_path / "run"), wandb="project")
    says = "^--wandb project: No API key configured; wandb login keeps a key, WANDB_MODE=offline needs none$"
    run = folder_at(cfg.out)
    if fails == "init":
        assert run.enter(cfg) is None
    with pytest.raises(ValueError, match=says):
        run.enter(cfg) if fails == "login" else run.start(cfg, "train.py", None)
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert run.enter(cfg) is None


def test_a_tracker_that_fails_on_the_way_costs_no_run(tmp_path, monkeypatch, capsys):
    heard = Heard()
    monkeypatch.setitem(sys.modules, "trackio", heard)
    run = start(tmp_path / "run", Config(out=str(tmp_path / "run"), track="trackio"))
    monkeypatch.setattr(heard, "log", lambda row, step: 1 / 0)
    for step in (1, 2):
        run.log("train", step, loss=1.0)
    run.summarise({"steps": 2})
    assert run.finish(0) == 0 and len(run.rows("train")) == 2
    says = capsys.readouterr().err.splitlines()
    assert len(says) == 1 and says[0].startswith("--track trackio: division by zero") and "the run goes on" in says[0]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_run_has_an_id_of_its_own(name, tmp_path, monkeypatch):
    """Of two folders with one name, and of one that W&B would refuse; a resumed run has the same, one of before its
    folder's name. trackio knows a run by its name."""
    heard = Heard()
    monkeypatch.setitem(sys.modules, name, heard)
    folders = [tmp_path / name for name in ("a/dpsm-seed1", "b/dpsm-seed1", "lr=3e-4: a #1?/100%")]
    for path in (*folders, *folders):
        run = folder_at(path)
        run.start(Config(out=str(path), track=name), "s.py", {"step": 0} if (path / "config.json").exists() else None)
        run.finish(0)
    ids = [given["id" if name == "wandb" else "name"] for given in heard.inits]
    assert len(set(ids[:3])) == 3 and ids[:3] == ids[3:]
    if name == "wandb":
        assert all(i.isalnum() for i in ids)
        assert [given["name"] for given in heard.inits[:3]] == [path.name for path in folders]
    (folders[0] / "wandb" / "id.txt").unlink()
    folder_at(folders[0]).start(Config(out="", track=name), "s.py", {"step": 0})
    assert heard.inits[-1]["name"] == "dpsm-seed1"


def test_trackio_itself_has_the_rows(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    run = start(tmp_path / "run", Config(out=str(tmp_path / "run"), track="trackio:mine"))
    for step in range(3):
        run.log("train", step, loss=3.0 - step)
    run.summarise({"steps": 3, "test_nll": 0.5})
    run.finish(0)
    (base,) = (tmp_path / "trackio").rglob("mine*.db")
    with sqlite3.connect(base) as opened:
        rows = [json.loads(text) for (text,) in opened.execute("SELECT metrics FROM metrics ORDER BY step, id")]
    assert [row["train/loss"] for row in rows if "train/loss" in row] == [3.0, 2.0, 1.0]
    assert rows[-1]["summary/test_nll"] == 0.5
