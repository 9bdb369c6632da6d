"""A campaign on its way: failures, stops, kills, budget, what it shows, what it keeps."""

import fcntl
import io
import json
import multiprocessing.forkserver
import os
import random
import re
import signal
import sys
import time
from pathlib import Path

import pytest

from eval.campaign import __main__ as campaign
from eval.campaign import run as loop
from eval.campaign.progress import Run
from eval.campaign.table import SILENCE, Table


@pytest.fixture
def reports(monkeypatch):
    """The command lines of the reports, which are not made."""
    calls = []
    monkeypatch.setattr(campaign.subprocess, "call", lambda line: calls.append(line) or 0)
    return calls


def recipe(toy: str, rest: str, out: str = "runs") -> None:
    Path("r.toml").write_text(f'script = "{toy}"\nout = "{out}"\n{rest}')


def held(name: str = "runs") -> dict:
    return json.loads(Path(name, "campaign.json").read_text())


def begun(seed: int | str) -> int:
    """How often the run of a seed has begun."""
    path = Path(f"runs/{seed if isinstance(seed, str) else f'seed{seed}'}/began")
    return len(path.read_text().split()) if path.exists() else 0


def test_a_failure_is_told_the_others_go_on_and_the_same_command_tries_it_again(toy, reports, capsys):
    recipe(toy, 'title = "T"\n[[arm]]\nseed = 1\n[[arm]]\nseed = 2\nfails = true\n[[arm]]\nseed = 3\n')
    assert campaign.main(["r.toml"]) == 3
    said = capsys.readouterr().out
    assert "runs/seed2-failsTrue has not finished (exit code 3), see runs/seed2-failsTrue.log" in said
    assert "    it is broken here" in said and "2 of 3 finished, 1 failed" in said
    runs = held()["runs"]
    assert [run["state"] for run in runs.values()] == ["finished", "failed", "finished"]
    assert runs["seed2-failsTrue"] | {"seconds": 0} == dict(state="failed", exit=3, why="it is broken here", seconds=0)
    Path("runs/mended").touch()
    assert campaign.main(["r.toml"]) == 0
    assert [begun(name) for name in ("seed1", "seed2-failsTrue", "seed3")] == [1, 2, 1]
    folders = ["runs/seed1", "runs/seed2-failsTrue", "runs/seed3", "--out", "runs/report", "--title", "T"]
    assert [line[3:] for line in reports] == [folders] * 2
    assert Path("runs/seed2-failsTrue.log").read_text().count("begins") == 2


def test_a_second_campaign_in_the_folder_is_refused(toy, capsys):
    recipe(toy, "[grid]\nseed = [1]\n")
    Path("runs").mkdir()
    with open("runs/lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(SystemExit) as stopped:
            campaign.main(["r.toml"])
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.count("\n") == 1 and "runs is in use" in err and not begun(1)


def test_a_run_whose_folder_is_in_use_waits_for_it(toy, reports, capsys, monkeypatch):
    """As after kill -9 of a campaign, whose runs save and let go a little later."""
    recipe(toy, "[grid]\nseed = [1, 2]\n")
    Path("runs/seed1").mkdir(parents=True)
    file = open("runs/seed1/lock", "w")  # noqa: SIM115 - let go below
    fcntl.flock(file, fcntl.LOCK_EX)
    say = Table.say

    def let_go(self, text):
        if "seed2 has finished" in text:
            assert not begun(1)
            file.close()
        say(self, text)

    monkeypatch.setattr(Table, "say", let_go)
    assert campaign.main(["r.toml"]) == 0 and begun(1) == begun(2) == 1
    assert "seed1 waits: a process of before" in capsys.readouterr().out


def test_the_budget_stops_what_has_not_begun(toy, reports, capsys):
    """The first run begins, as nothing is known of its cost; with a larger budget the same command goes on."""
    recipe(toy, "[flags]\npace = 0.02\n[grid]\nseed = [1, 2, 3]\n")
    assert campaign.main(["r.toml", "--budget", "1e-4"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"budget: .* of 0.0001 hours are spent, with the next run .*: 2 runs do not begin", said)
    kept = held()
    assert [run["state"] for run in kept["runs"].values()] == ["finished", "waiting", "waiting"]
    assert kept["budget_hours"] == 1e-4 and kept["gpu_hours"] is None
    spent = [run["seconds"] for run in kept["runs"].values()]
    assert spent[0] > 0.2 and spent[1:] == [0, 0] and kept["hours"] == pytest.approx(spent[0] / 3600, rel=0.01)
    assert campaign.main(["r.toml", "--budget", "1"]) == 0
    assert [begun(seed) for seed in (1, 2, 3)] == [1, 1, 1] and held()["hours"] > kept["hours"]


def test_what_was_interrupted_costs_too(toy, reports):
    """Seconds of earlier starts stay, and those of runs that the recipe no longer has."""
    recipe(toy, "[grid]\nseed = [1]\n")
    Path("runs").mkdir()
    entry = {"state": "waiting", "seconds": 7200.0, "exit": None, "why": None}
    Path("runs/campaign.json").write_text(json.dumps({"runs": {"seed1": entry, "old": entry}}))
    assert campaign.main(["r.toml", "--budget", "3.9"]) == 0 and not begun(1)
    assert campaign.main(["r.toml", "--budget", "5"]) == 0 and begun(1) == 1
    assert held()["hours"] == pytest.approx(4, abs=0.01) and held()["runs"]["old"] == entry


@pytest.mark.parametrize(
    "text", ["[]", '{"runs": []}', '{"runs": {"seed1": 3}}', '{"runs": {"a": {"state": "done", "seconds": 1}}}', "{"]
)
def test_a_damaged_record_is_refused(toy, capsys, text):
    recipe(toy, "[grid]\nseed = [1]\n")
    Path("runs").mkdir()
    Path("runs/campaign.json").write_text(text)
    with pytest.raises(SystemExit) as stopped:
        campaign.main(["r.toml"])
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.count("\n") == 1 and "runs/campaign.json" in err and not begun(1)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--budget", "0"], "--budget 0.0: expected hours"),
        (["--jobs", "2", "--nproc", "2"], "expected one of them to be 1"),
        (["--engine", "slurm", "--prune", "asha"], "--budget and --prune need local or ray"),
        (["--sbatch", "x"], "--sbatch 'x' is read by --engine slurm alone"),
        (["--prune", "ahsa"], "did you mean asha?"),
        (["--dry-run", "comands"], "did you mean commands?"),
    ],
)
def test_flags_that_do_not_go_together(toy, capsys, flags, says):
    recipe(toy, "[grid]\nseed = [1]\n")
    with pytest.raises(SystemExit) as stopped:
        campaign.main(["r.toml", *flags])
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.count("\n") == 1 and says in err and not Path("runs").exists()


def test_a_gpu_for_each_job(toy, reports):
    """Ids that nobody has here: each run sees one, and it is the one that is used least; their hours are counted."""
    recipe(toy, "[flags]\npace = 0.05\n[grid]\nseed = [1, 2, 3]\n")
    assert campaign.main(["r.toml", "--jobs", "3", "--device", "5,7"]) == 0
    seen = [json.loads(Path(f"runs/seed{seed}/summary.json").read_text())["seen"] for seed in (1, 2, 3)]
    assert seen == ["5", "7", "5"]
    kept = held()
    assert kept["gpu_hours"] == pytest.approx(kept["hours"] * 2 / 3, rel=0.01)  # three jobs on two GPUs


def test_which_gpus_there_are(monkeypatch):
    monkeypatch.setattr(campaign.torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert (
        campaign.gpus("auto") == ["0", "1", "2"] and campaign.gpus("cpu") == [] and campaign.gpus("1,2") == ["1", "2"]
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-x,6")
    assert campaign.gpus("auto") == ["4", "GPU-x", "6"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def invented(state: str, name: str, **more) -> Run:
    return Run(name, Path(name), {"steps": 300, "schedule": "cosine"}, state, **more)


def test_the_table_on_a_terminal_is_rewritten_in_place(monkeypatch):
    monkeypatch.setattr("eval.campaign.table.shutil.get_terminal_size", lambda: os.terminal_size((90, 8)))
    table, clock = Table(Terminal()), time.monotonic()
    run = invented("waiting", "ce-seed1", handle=object(), began=clock - 10, step=100, loss=3.25)
    run.forecast = run.forecast._replace(mean=2.5, sd=0.25)
    others = [invented("waiting", f"brier-seed{i}") for i in range(9)]
    failed = invented("failed", "dpsm-seed1", why="it is broken here " * 9)
    table.show([*others, failed, run], lambda: "the foot")
    first = table.stream.getvalue().splitlines()
    assert re.match(r"ce-seed1 +runs +100/300 +3.250 +2.500 \+- 0.25 +(19|20|21) s left$", first[1])
    assert first[2].startswith("dpsm-seed1") and "it is broken here" in first[2] and max(map(len, first)) < 90
    assert first[-2:] == ["and 7 more", "the foot"] and len(first) <= 8
    table.shown = 0.0
    table.show([run], lambda: "the foot")
    assert f"\x1b[{len(first)}F\x1b[J" in table.stream.getvalue()


def test_lines_where_there_is_no_terminal_and_no_long_silence():
    table = Table(io.StringIO())
    run = invented("waiting", "ce-seed1", handle=object(), began=time.monotonic(), step=100, loss=3.25)
    table.show([run], lambda: "the foot")
    assert table.stream.getvalue() == ""
    table.spoke -= 8.5
    table.show([run], lambda: "the foot")
    assert table.stream.getvalue().startswith("the foot | ce-seed1 runs 100/300 3.250") and SILENCE < 10


def test_what_is_left_is_forecast_from_what_runs_alike(toy, reports, monkeypatch):
    """When all is done, and what for, at two jobs: the others cost what the one that runs will have cost."""
    clock = 1000.0
    runs = {n: invented("waiting", n) for n in ("a", "b", "c")}
    how = dict(jobs=2, devices=["0", "1"], ranks=1, size=lambda run: 1)
    ledger = campaign.Ledger(Path("."), True, None)
    made = loop.Campaign(runs, None, None, ledger, None, **how)
    runs["a"].handle, runs["a"].began, runs["a"].step, runs["a"].seconds = object(), clock - 100, 150, 100.0
    assert [made.expected(runs[n], clock, made.wholes(clock)) for n in "ab"] == [100.0, 200.0]
    runs["a"].gpu_seconds = 100.0
    assert "1 running, 2 waiting; all done in 4 min 10 s" in made.foot(clock)
    assert made.foot(clock).endswith("for 0.167 GPU hours in all")


def begin(*flags: str) -> multiprocessing.Process:
    """The campaign in a process of its own, which has a forkserver of its own."""

    def work():
        multiprocessing.forkserver._forkserver = server = multiprocessing.forkserver.ForkServer()
        for name in ("ensure_running", "get_inherited_fds", "connect_to_new_process", "set_forkserver_preload"):
            setattr(multiprocessing.forkserver, name, getattr(server, name))
        campaign.subprocess.call = lambda line: 0
        sys.exit(campaign.main(["r.toml", *flags]))

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def wait_for(there, seconds: float = 60) -> None:
    ends = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < ends
        time.sleep(0.02)


def alive(folder: Path) -> bool:
    return Path(f"/proc/{(folder / 'began').read_text().split()[-1]}").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_kill_9_of_a_campaign_loses_and_repeats_nothing(toy):
    """Three times while a run works: it saves and ends; what had finished is not begun again, and in the end all is as
    if nothing had been."""
    recipe(toy, "[flags]\npace = 0.03\nsteps = 40\n[grid]\nseed = [1, 2, 3, 4]\nlevel = [2.0]\n")
    folders, moments = [Path(f"runs/seed{seed}-level2.0") for seed in (1, 2, 3, 4)], random.Random(1)
    for count in range(3):
        killed = begin("--jobs", "2")
        wait_for(lambda c=count: sum((f / "began").exists() for f in folders) >= min(1 + c, 4))
        time.sleep(moments.uniform(0, 1))
        finished = {f: (f / "summary.json").stat().st_mtime_ns for f in folders if (f / "summary.json").exists()}
        killed.kill()
        killed.join()
        wait_for(lambda: not any(alive(f) for f in folders if (f / "began").exists()))
        assert all((f / "last.pt").exists() for f in folders if (f / "began").exists())
    last = begin("--jobs", "2")
    last.join(60)
    assert last.exitcode == 0
    assert all((f / "summary.json").stat().st_mtime_ns == at for f, at in finished.items())
    for folder in folders:
        rows = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == list(range(1, 41))
        assert json.loads((folder / "summary.json").read_text())["nll"] == rows[-1]["nll"]
        assert all(int(step) > 0 for step in (folder / "from").read_text().split()[1:])  # goes on, not anew
    assert {run["state"] for run in held()["runs"].values()} == {"finished"}
    assert sum(begun(f.name) for f in folders) > 4  # some were interrupted


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_campaign_that_is_stopped_ends_with_the_signals_code(toy, reports, monkeypatch, capsys, number):
    """The runs get one SIGTERM each, and save; no other begins."""
    recipe(toy, "[flags]\npace = 0.05\nsteps = 1000\n[grid]\nseed = [1, 2, 3]\n")
    look = loop.Campaign._look

    def send(self, now):
        look(self, now)
        if not self.stopped and all(Path(f"runs/seed{seed}/metrics.jsonl").exists() for seed in (1, 2)):
            os.kill(os.getpid(), number)

    monkeypatch.setattr(loop.Campaign, "_look", send)
    assert campaign.main(["r.toml", "--jobs", "2"]) == 128 + number and not reports
    assert [begun(seed) for seed in (1, 2, 3)] == [1, 1, 0]
    assert all(int(Path(f"runs/seed{seed}/last.pt").read_text()) > 0 for seed in (1, 2))
    assert "the same command goes on from here" in capsys.readouterr().err
    assert {run["state"] for run in held()["runs"].values()} == {"waiting"}
