"""Run folders: atomic files, what a run keeps of itself, and what a resumed one may change."""

import json
import math
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from run_folders import Config, start

from runtime import folder
from runtime.folder import RunFolder, environment, read_metrics, same_config, write_bytes, write_json
from runtime.machine import World

ROOT = Path(__file__).parents[2]


def test_atomic_write_leaves_the_old_file_when_the_writer_fails(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})

    def half(f):
        f.write(b"{")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError):
        write_bytes(path, half)
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_json_has_no_nan(tmp_path):
    write_json(tmp_path / "x.json", {"a": [math.nan, math.inf, 1.5]})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [None, None, 1.5]}


def test_broken_metrics_name_their_line(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"kind": "train", "step": 1}\n{"kind": "tr')
    with pytest.raises(ValueError, match="line 2"):
        read_metrics(tmp_path / "m.jsonl")


def test_a_run_keeps_its_flags_and_every_module_that_it_imported(tmp_path):
    """A module of the tree that is imported is copied, by its path; one that is not is not."""
    run = start(tmp_path / "run")
    run.finish(0)
    kept = {p.relative_to(run / "source").as_posix() for p in (run / "source").rglob("*.py")}
    assert {"runtime/folder.py", "runtime/cli.py", "kernels/losses.py", "schedules/rules.py"} <= kept
    assert (run / "source/runtime/cli.py").read_bytes() == (ROOT / "runtime/cli.py").read_bytes()
    assert not any("site-packages" in name for name in kept)
    flags = json.loads((run / "flags.json").read_text())
    assert flags["lr"]["role"] == "knob" and flags["resume_from"]["only"] == {"resume": [True]}
    assert json.loads((run / "config.json").read_text())["script"] == "script.py"


def test_a_hacked_model_is_in_the_source(tmp_path):
    """What a script imports when it runs is what is kept, here of a process of its own."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import model.gpt2\n"
        "from runtime.folder import imported_sources, TREE\n"
        "print([str(p.relative_to(TREE)) for p in imported_sources()])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True, cwd=tmp_path)
    assert "'model/gpt2.py'" in done.stdout and "'model/seq2seq.py'" not in done.stdout, done.stderr


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A tree of three modules, of which two are imported so far; ``imported`` may grow."""
    root, imported = tmp_path / "tree", ["a.py", "b.py"]
    root.mkdir()
    for name in ("a", "b", "late"):
        (root / f"{name}.py").write_text(f"x = '{name}'\n")
    monkeypatch.setattr(folder, "TREE", root)
    monkeypatch.setattr(folder, "imported_sources", lambda: [root / name for name in imported])
    return root, imported


def test_a_module_that_is_imported_late_is_kept(tree, tmp_path, monkeypatch):
    """The Triton kernels are imported at the first loss, after the folder was made."""
    root, imported = tree
    run = start(tmp_path / "run")
    assert not (run / "source/late.py").exists()
    imported.append("late.py")
    monkeypatch.setitem(sys.modules, "late", folder)
    (root / "a.py").write_text("edited = 'while the run goes on: not what runs'\n")
    run.log("train", 1)
    run.finish(0)
    assert (run / "source/late.py").read_text() == "x = 'late'\n" and (run / "source/a.py").read_text() == "x = 'a'\n"


def test_a_run_that_is_resumed_under_other_code_keeps_both_and_says_so(tree, tmp_path, capsys):
    root, _ = tree
    cfg = Config(out=str(tmp_path / "run"))
    start(tmp_path / "run", cfg).finish(0)

    def resumed(step: int) -> list[dict]:
        run = RunFolder(tmp_path / "run", World(0, 1, torch.device("cpu")))
        run.start(replace(cfg, resume=True), "script.py", {"step": step})
        run.finish(0)
        return run.rows("event")

    assert resumed(3)[-1]["changed_code"] is None and not list((tmp_path / "run").glob("source-*"))
    (root / "b.py").write_text("hacked = True\n")
    assert resumed(5)[-1]["changed_code"] == "b.py" and "other code than before: b.py" in capsys.readouterr().out
    assert (tmp_path / "run/source/b.py").read_text() == "x = 'b'\n"
    assert (tmp_path / "run/source-5/b.py").read_text() == "hacked = True\n"
    assert resumed(7)[-1]["changed_code"] is None and len(list((tmp_path / "run").glob("source-*"))) == 1


def test_a_module_that_is_imported_late_in_a_resumed_run_is_compared_too(tree, tmp_path, monkeypatch, capsys):
    root, imported = tree
    cfg = Config(out=str(tmp_path / "run"))
    imported.append("late.py")
    start(tmp_path / "run", cfg).finish(0)
    imported.remove("late.py")
    (root / "late.py").write_text("hacked = True\n")
    run = RunFolder(tmp_path / "run", World(0, 1, torch.device("cpu")))
    run.start(replace(cfg, resume=True), "script.py", {"step": 3})
    assert not list((tmp_path / "run").glob("source-*"))
    imported.append("late.py")
    monkeypatch.setitem(sys.modules, "late", folder)
    (root / "a.py").write_text("edited = 'while the run goes on: not what runs'\n")
    run.log("train", 4)
    run.finish(0)
    assert (run / "source-3/late.py").read_text() == "hacked = True\n" and not (run / "source-3/a.py").exists()
    assert (run / "source/late.py").read_text() == "x = 'late'\n"
    assert "other code than before: late.py" in capsys.readouterr().out
    assert [row.get("changed_code") for row in run.rows("event")] == [None, "late.py"]


def test_a_key_in_the_code_is_not_kept_and_no_other_code(tree, tmp_path, capsys):
    root, _ = tree
    (root / "b.py").write_text("login('hf_AbCdEfGhIjKlMnOpQrStUvWxYz012345')  # \xe9\n", encoding="latin-1")
    cfg = Config(out=str(tmp_path / "run"))
    start(tmp_path / "run", cfg).finish(0)
    assert (tmp_path / "run/source/b.py").read_bytes() == b"login('***')  # \xe9\n"
    run = RunFolder(tmp_path / "run", World(0, 1, torch.device("cpu")))
    run.start(replace(cfg, resume=True), "script.py", {"step": 3})
    run.finish(0)
    assert "other code" not in capsys.readouterr().out


def test_untracked_files_are_in_the_git_state(tmp_path, monkeypatch):
    def git(*args):
        subprocess.run(["git", *args], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    (tmp_path / "tracked.py").write_text("a = 1\n")
    git("add", "tracked.py")
    git("-c", "user.name=x", "-c", "user.email=x@example.org", "commit", "-m", "x")
    monkeypatch.setattr(folder, "TREE", tmp_path)
    found = environment(torch.device("cpu"))
    assert found["git_dirty"] is False and found["git_untracked"] == []
    (tmp_path / "mine.py").write_text("b = 2\n")
    (tmp_path / "tracked.py").write_text("a = 2\nkey = 'hf_AbCdEfGhIjKlMnOpQrStUvWxYz012345'\n")
    monkeypatch.setattr(sys, "argv", ["train_lm.py", "--prompt", "hf_AbCdEfGhIjKlMnOpQrStUvWxYz012345"])
    found = environment(torch.device("cpu"))
    assert "hf_A" not in json.dumps(found) and "+key = '***'" in found["git_diff"] and "***" in found["command"]
    assert found["git_dirty"] is True and found["git_untracked"] == ["mine.py"] and "+a = 2" in found["git_diff"]


def test_what_a_resumed_run_may_change(tmp_path):
    cfg = Config(out=str(tmp_path / "run"))
    run = start(tmp_path / "run", cfg)
    run.save("last.pt", {"config": {"lr": cfg.lr}, "optimizer": {}, "step": 1})
    run.finish(0)
    again = replace(cfg, resume=True)
    assert run.enter(replace(again, micro_batch=1))["step"] == 1
    with pytest.raises(ValueError, match=r"of a different run \(lr was 0.001, now 0.5\)"):
        run.enter(replace(again, lr=0.5))
    with pytest.raises(ValueError, match="already holds a run"):
        run.enter(cfg)
    # A run of before does not know a newer flag: at its default it goes on.
    config = json.loads((run / "config.json").read_text())
    del config["newer"]
    write_json(run / "config.json", config)
    assert run.enter(again)["step"] == 1
    with pytest.raises(ValueError, match="newer was 'old way', now 'new way'"):
        run.enter(replace(again, newer="new way"))


def test_settings_without_defaults_must_be_there():
    with pytest.raises(ValueError, match="b was None, now 2"):
        same_config(Path("x"), {"a": 1}, {"a": 1, "b": 2}, ())
    same_config(Path("x"), {"a": 1, "b": 1}, {"a": 1, "b": 2}, ("b",))


def test_what_torchrun_starts_again_resumes(tmp_path, monkeypatch):
    """--max-restarts gives the same command, without --resume, to a run that has a checkpoint by then, or none."""
    cfg = Config(out=str(tmp_path / "run"))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    run = RunFolder(tmp_path / "run", World(0, 1, torch.device("cpu")))
    assert run.enter(cfg) is None  # it ended before it had a folder
    run.start(cfg, "script.py", None)
    run.save("last.pt", {"optimizer": {}, "config": asdict(cfg), "step": 3})
    run.finish(0)
    run = RunFolder(tmp_path / "run", World(0, 1, torch.device("cpu")))
    assert run.enter(cfg)["step"] == 3
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    with pytest.raises(ValueError, match="already holds a run"):
        RunFolder(tmp_path / "run", World(0, 1, torch.device("cpu"))).enter(cfg)


def test_a_folder_whose_run_left_no_checkpoint_begins_anew(tmp_path, capsys):
    """Whatever a kill before the first checkpoint leaves, the same command and --resume go on with."""
    cfg = Config(out=str(tmp_path / "run"))
    start(tmp_path / "run", cfg).finish(0)
    for left in (
        [],  # all that `start` writes
        ["config.json", "metrics.jsonl"],
        ["config.json", "flags.json", "metrics.jsonl", "environment.json"],
    ):
        for resume in (False, True):
            for name in left:
                (tmp_path / "run" / name).unlink(missing_ok=True)
            (tmp_path / "run" / ".tmp-01").touch()
            run = start(tmp_path / "run", replace(cfg, resume=resume))
            run.log("train", 1)
            run.finish(0)
            assert "begins anew" in capsys.readouterr().out and [r["step"] for r in run.rows("train")] == [1]
            assert not (run / ".tmp-01").exists() and (run / "source/runtime/folder.py").exists()
    with pytest.raises(ValueError, match=r"already holds a run: .* \(lr was 0.001, now 0.5\); give another --out"):
        run.enter(replace(cfg, lr=0.5))
    # best.pt of the moment between the first best.pt and last.pt is replaced; of a longer run it is kept.
    run = start(tmp_path / "run", cfg)
    run.log("val", 5)
    run.save("best.pt", {"step": 5})
    run.finish(0)
    capsys.readouterr()
    start(tmp_path / "run", replace(cfg, resume=True)).log("val", 5)
    assert "drops the 1 rows and its best.pt" in capsys.readouterr().out and not (run / "best.pt").exists()
    run.save("best.pt", {"step": 5})
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"kind": "val", "step": 10}\n')
    with pytest.raises(ValueError, match="has lost last.pt and previous.pt; best.pt holds weights only"):
        run.enter(replace(cfg, resume=True))


def test_a_place_that_cannot_hold_a_run_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    bad = {
        "file": (ValueError, "is not a folder"),
        "link": (ValueError, "is a link to .*gone, which is not there"),
        "file/run": (OSError, "cannot be written"),
        "x" * 256: (OSError, "too long"),
    }
    for name, (kind, says) in bad.items():
        with pytest.raises(kind, match=says):
            start(tmp_path / name)
    with pytest.raises(ValueError, match="/dev/null exists and is not a folder"):
        start(Path("/dev/null"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "link"]


TRAINS = """
import sys, time
from run_folders import start
start(sys.argv[1])
print("started", flush=True)
time.sleep(100)
"""


def test_a_second_run_in_a_folder_is_refused_while_the_first_one_lives(tmp_path):
    """Before its first checkpoint and after; also one that looked at the folder before the first one made it."""
    late = RunFolder(tmp_path / "run", World(0, 1, torch.device("cpu")))
    cfg = Config(out=str(tmp_path / "run"))
    assert late.enter(cfg) is None
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"}
    first = subprocess.Popen([sys.executable, "-c", TRAINS, tmp_path / "run"], env=env, stdout=subprocess.PIPE)
    assert first.stdout.readline() == b"started\n"
    for again in (cfg, replace(cfg, resume=True)):
        with pytest.raises(ValueError, match=f"is in use by process {first.pid}"):
            start(tmp_path / "run", again)
    with pytest.raises(ValueError, match=f"is in use by process {first.pid}"):
        late.start(cfg, "script.py", None)
    first.kill()
    first.wait()
    first.stdout.close()
    with pytest.raises(ValueError, match="already holds a run, which has begun since"):
        late.start(cfg, "script.py", None)
    start(tmp_path / "run", cfg).finish(0)


@pytest.mark.parametrize("damage", ["first line", "zeros", "no object", "gone"])
def test_rows_that_are_lost_are_counted_and_said(tmp_path, damage, capsys):
    cfg = Config(out=str(tmp_path / "run"))
    run = start(tmp_path / "run", cfg)
    for step in range(1, 6):
        run.log("train", step, loss=1.0)
    run.save("last.pt", {"config": {"lr": cfg.lr}, "optimizer": {}, "step": 5})
    run.log("train", 6, loss=1.0)  # after the checkpoint: it is made again
    run.finish(0)
    path = run / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    if damage == "gone":
        path.unlink()
    else:
        lines[0] = {"first line": b'{"kind"\n', "zeros": bytes(30) + b"\n", "no object": b"[5]\n"}[damage]
        path.write_bytes(b"".join(lines) + b'{"kind": "tr')  # a kill's last line is no loss
        with pytest.raises(ValueError, match="line 1 is no row of metrics"):
            read_metrics(path)
    again = RunFolder(run.path, run.world)
    again.start(replace(cfg, resume=True), "script.py", again.enter(replace(cfg, resume=True)))
    again.finish(0)
    lost = 5 if damage == "gone" else 1
    assert f"{lost} of the 5 rows up to step 5 are lost" in capsys.readouterr().out
    assert [r["step"] for r in again.rows("train")] == list(range(1 + lost, 6))
    assert again.rows("event")[-1]["lost_rows"] == lost


@pytest.mark.parametrize("held", [b"[1]", b"5", b'{"a": 1', b"\xff\xfe\x00", b"[" * 100_000], ids=lambda b: repr(b[:5]))
def test_a_config_that_is_no_object_is_one_line(tmp_path, held):
    cfg = Config(out=str(tmp_path / "run"), resume=True)
    run = start(tmp_path / "run", replace(cfg, resume=False))
    run.save("last.pt", {"config": {"lr": cfg.lr}, "optimizer": {}, "step": 5})
    run.finish(0)
    (run / "config.json").write_bytes(held)
    with pytest.raises(ValueError, match="config.json.*(the run cannot be resumed|not UTF-8 text)") as error:
        run.enter(cfg)
    assert "\n" not in str(error.value)


def test_a_checkpoint_of_something_else_is_one_line(tmp_path):
    cfg = Config(out=str(tmp_path / "run"))
    run = start(tmp_path / "run", cfg)
    run.finish(0)
    for state in ({"optimizer": {}}, {"optimizer": {}, "config": [1], "step": 1}, {"optimizer": {}, "config": {}}):
        run.save("last.pt", state)
        with pytest.raises(ValueError, match="is no checkpoint of ours"):
            run.enter(replace(cfg, resume=True))
