"""Engines: an array job through a fake sbatch that runs its tasks, and Ray with a worker that is killed."""

import fcntl
import json
import os
import signal
import stat
import textwrap
from pathlib import Path

import pytest

from eval.campaign import __main__ as campaign
from eval.campaign import engines

SBATCH = """
    #!/bin/bash
    # A cluster of one: runs the tasks of the array job, one after the other.
    echo "$@" >> sbatch.log
    script="${@: -1}"
    last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\)%.*/\\1/p' "$script")
    for task in $(seq 0 "$last"); do SLURM_ARRAY_TASK_ID=$task bash "$script" >> tasks.log 2>&1; done
    echo "Submitted batch job 7"
"""


@pytest.fixture
def cluster(toy, monkeypatch):
    """sbatch on PATH, and no report."""
    calls = []
    Path("bin").mkdir()
    Path("bin/sbatch").write_text(textwrap.dedent(SBATCH).lstrip())
    Path("bin/sbatch").chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{Path.cwd() / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(campaign.subprocess, "call", lambda line: calls.append(line) or 0)
    return toy, calls


def write(toy: str, rest: str, out: str = "runs") -> None:
    Path("r.toml").write_text(f'script = "{toy}"\nout = "{out}"\n{rest}')


def test_an_array_job_runs_what_is_not_finished(cluster, capsys, monkeypatch):
    """One that fails, and one that was interrupted; the same command submits the former, then makes the report."""
    toy, reports = cluster
    write(toy, "[[arm]]\nseed = 1\n[[arm]]\nseed = 2\nfails = true\n", "the runs")
    runs = Path("the runs")
    (runs / "seed1").mkdir(parents=True)
    (runs / "seed1" / "last.pt").write_text("5")
    (runs / "seed1" / "metrics.jsonl").write_text("")
    argv = ["r.toml", "--engine", "slurm", "--jobs", "3", "--sbatch", "--gpus=1 --comment='a b'"]
    assert campaign.main(argv) == 0 and not reports
    assert capsys.readouterr().out.startswith("Submitted batch job 7: 2 of 2 runs, the runs/array.sh\n")
    assert Path("sbatch.log").read_text() == "--gpus=1 --comment=a b the runs/array.sh\n"
    assert "#SBATCH --array=0-1%3" in (runs / "array.sh").read_text()
    assert [row["step"] for row in map(json.loads, (runs / "seed1/metrics.jsonl").open())] == [6, 7, 8, 9, 10]
    assert "it is broken here" in Path("tasks.log").read_text() and not (runs / "seed2-failsTrue/summary.json").exists()
    (runs / "mended").touch()
    assert campaign.main(argv) == 0 and not reports
    assert "1 of 2 runs" in capsys.readouterr().out
    assert campaign.main(argv) == 0 and len(reports) == 1 and len(Path("sbatch.log").read_text().splitlines()) == 2
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")  # as where the same command was given twice while the tasks waited
    assert engines.subprocess.run(["bash", runs / "array.sh"]).returncode == 0
    assert [len((runs / f / "began").read_text().split()) for f in ("seed1", "seed2-failsTrue")] == [1, 2]
    states = json.loads((runs / "campaign.json").read_text())["runs"]
    assert {run["state"] for run in states.values()} == {"finished"}


def test_without_sbatch_and_with_one_that_fails(cluster, monkeypatch, capsys):
    toy, _ = cluster
    write(toy, "[grid]\nseed = [1]\n")
    Path("bin/sbatch").write_text("#!/bin/bash\necho no such partition >&2\nexit 1\n")
    for path, says in (
        (os.environ["PATH"], "sbatch failed (exit code 1): no such partition"),
        ("/nowhere", "not on P"),
    ):
        monkeypatch.setenv("PATH", path)
        with pytest.raises(SystemExit) as stopped:
            campaign.main(["r.toml", "--engine", "slurm"])
        err = capsys.readouterr().err
        assert stopped.value.code == 2 and err.count("\n") == 1 and says in err


def test_without_ray(toy, capsys, monkeypatch):
    monkeypatch.setitem(engines.importlib.sys.modules, "ray", None)
    write(toy, "[grid]\nseed = [1]\n")
    with pytest.raises(SystemExit) as stopped:
        campaign.main(["r.toml", "--engine", "ray"])
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.count("\n") == 1
    assert "--engine ray needs the package ray" in err and "pip install ray, or take --engine local" in err


def test_ray_goes_on_where_a_worker_is_killed(toy, monkeypatch, capfd):
    """Two runs side by side; the worker of one is killed: another goes on from the checkpoint, once. A run that fails
    is a failure, and not tried again."""
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install -r requirements-optional.txt")
    monkeypatch.setattr(campaign.subprocess, "call", lambda line: 0)
    write(
        toy, "[flags]\npace = 0.1\nsteps = 60\n[[arm]]\nseed = 1\n[[arm]]\nseed = 2\n[[arm]]\nseed = 3\nfails = true\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{os.environ['PYTHONPATH']}:{Path.cwd()}")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    look, killed = campaign.Campaign._look, []

    def kill(self, now):
        look(self, now)
        last = Path("runs/seed1/last.pt")
        if not killed and last.exists() and int(last.read_text()) >= 10:
            run = int(Path("runs/seed1/began").read_text().split()[0])
            killed.append(int(Path(f"/proc/{run}/stat").read_text().rsplit(")")[1].split()[1]))  # its parent
            os.kill(killed[0], signal.SIGKILL)

    monkeypatch.setattr(campaign.Campaign, "_look", kill)
    try:
        assert campaign.main(["r.toml", "--engine", "ray", "--jobs", "2"]) == 3 and killed
    finally:
        ray.shutdown()
    steps = [[r["step"] for r in map(json.loads, Path(f"runs/seed{s}/metrics.jsonl").open())] for s in (1, 2)]
    assert steps == [list(range(1, 61))] * 2
    assert [len(Path(f"runs/{f}/began").read_text().split()) for f in ("seed1", "seed2", "seed3-failsTrue")] == [
        2,
        1,
        1,
    ]
    runs = json.loads(Path("runs/campaign.json").read_text())["runs"]
    assert [run["state"] for run in runs.values()] == ["finished", "finished", "failed"]
    assert "it is broken here" in capfd.readouterr().out


def test_a_folder_that_another_process_holds(tmp_path):
    assert not engines.in_use(tmp_path / "none") and not engines.in_use(tmp_path)
    with open(tmp_path / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert engines.in_use(tmp_path)
    assert not engines.in_use(tmp_path)
