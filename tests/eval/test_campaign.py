"""Recipes: their grids, the flags that each cell reads, and runs one after the other or side by side."""

import os
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from eval import campaign
from eval.campaign import cells, fit, load_script
from runtime.cli import parse_config
from runtime.machine import World

ROOT = Path(__file__).parents[2]
SCRIPT = """
    import dataclasses, json, sys
    from pathlib import Path

    from runtime.cli import opt, parse_config

    @dataclasses.dataclass(frozen=True)
    class Config:
        out: str = opt("", "folder", role="where")
        resume: bool = opt(False, "go on", role="where")
        seed: int = opt(1, "seed", role="bookkeeping")
        steps: int = opt(10, "steps", within="[1, inf)")
        preset: str = opt("none", "preset", ("none", "fot"))
        loss: str = opt("ce", "loss", ("ce", "brier", "focal", "dpsm"))
        schedule: str = opt("", "schedule", ("", "cosine", "fot"))
        gamma: float = opt(2.0, "exponent", only={"loss": ("focal",)})
        warmup: float = opt(0.1, "ramp", within="[0, 1]", only={"loss": ("dpsm",)})
        fot_window: int = opt(32, "steps", only={"schedule": ("fot",)})
        fast: bool = opt(False, "fast")

    def complete(values):
        return values | {"schedule": values["schedule"] or {"none": "cosine"}.get(values["preset"], "fot")}

    def main(argv=None):
        cfg = parse_config(Config, argv, complete=complete)
        Path(cfg.out).mkdir(parents=True)
        (Path(cfg.out) / "summary.json").write_text(json.dumps(dataclasses.asdict(cfg)))
        return 0

    if __name__ == "__main__":
        sys.exit(main())
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A folder with a script of its own, toy.py, as the working directory."""
    (tmp_path / "toy.py").write_text(textwrap.dedent(SCRIPT))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield load_script("toy.py")
    sys.modules.pop("toy", None)


def dry(capsys, recipe: str, *argv: str) -> tuple[list[dict], str]:
    """Flags of every command that the recipe comes to, and what stands on stderr."""
    Path("r.toml").write_text(f'script = "toy.py"\nout = "runs/toy"\n{recipe}')
    assert campaign.main(["r.toml", "--dry-run", *argv]) == 0
    said = capsys.readouterr()
    lines = [shlex.split(line)[2:] for line in said.out.splitlines()]
    return [{k: v for k, v in zip(line, line[1:], strict=False) if k.startswith("--")} for line in lines], said.err


def refused(capsys, recipe: str, *argv: str) -> str:
    Path("r.toml").write_text(recipe)
    with pytest.raises(SystemExit) as stopped:
        campaign.main(["r.toml", *argv])
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.count("\n") == 1 and not Path("runs").exists()
    return err


def test_cells_are_the_product_of_arms_and_grid():
    recipe = {"flags": {"steps": 3, "lr": 1}, "arm": [{"loss": "ce"}, {"loss": "dpsm", "warmup": 0.1}]}
    found = cells(recipe | {"grid": {"lr": [1, 2], "seed": [7]}}, {"lr": "9"})
    assert [c.name for c in found] == [
        "ce-lr1-seed7",
        "ce-lr2-seed7",
        "dpsm-warmup0.1-lr1-seed7",
        "dpsm-warmup0.1-lr2-seed7",
    ]
    assert found[-1].shared == {"steps": 3, "lr": "9"} and found[-1].own == {"loss": "dpsm", "warmup": 0.1, "seed": 7}
    with pytest.raises(ValueError, match="same flags"):
        cells({"arm": [{"loss": "ce"}, {"loss": "ce"}]}, {})


def test_shared_flags_are_left_out_where_nothing_reads_them(toy, capsys):
    recipe = '[flags]\nwarmup = 0.3\nfot_window = 16\nfast = true\n[grid]\nloss = ["ce", "brier", "dpsm"]\n'
    found, said = dry(capsys, recipe)
    assert ["--warmup" in flags for flags in found] == [False, False, True] and found[2]["--warmup"] == "0.3"
    assert all("--fast" in flags and "--fot-window" not in flags for flags in found)
    assert said == "left out where nothing reads them: warmup (ce, brier), fot_window (cosine)\n"
    found, said = dry(capsys, recipe, "--set", "preset=fot", "--set", "loss=dpsm")  # a preset may decide what is read
    assert {flags["--fot-window"] for flags in found} == {"16"} and said == ""


def test_a_cells_own_flag_is_passed_as_it_is_and_refused_where_nothing_reads_it(toy, capsys):
    head = 'script = "toy.py"\nout = "runs/toy"\n'
    err = refused(capsys, head + '[flags]\ngamma = 1.0\n[[arm]]\nloss = "ce"\n[[arm]]\nloss = "brier"\ngamma = 3.0\n')
    assert "r.toml: cell brier-gamma3.0: --gamma is read by --loss focal alone" in err
    assert "cell ce: unrecognized arguments: --stepz; did you mean --steps?" in refused(
        capsys, head + '[flags]\nstepz = 3\n[grid]\nloss = ["ce"]\n'
    )
    assert "cell steps0: --steps 0" in refused(capsys, head + "[grid]\nsteps = [5, 0]\n")
    assert "cell run: argument --loss: invalid choice: 'brie'" in refused(capsys, head + '[flags]\nloss = "brie"\n')
    assert "--set gamma: no cell reads it" in refused(capsys, head, "--set", "gamma=3")
    assert "--set gamma: expected FLAG=VALUE" in refused(capsys, head, "--set", "gamma")
    assert "--jobs 0" in refused(capsys, head, "--jobs", "0")


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ("grid = [", "r.toml: not TOML"),
        ('out = "x"', "r.toml needs script and out"),
        ('script = "toy.py"\nout = "x"\nflag = 3', "check ['flag']"),
        ('script = "no.py"\nout = "x"', "r.toml: script 'no.py' is not a script"),
        ('script = 3\nout = "x"', "r.toml: script is '3', expected a text"),
        ('script = "toy.py"\nout = "x"\nflags = [1]', "flags is '[1]', expected a table of values"),
        ('script = "toy.py"\nout = "x"\n[flags]\nlr = [1]', "flags is \"{'lr': [1]}\", expected a table of values"),
        ('script = "toy.py"\nout = "x"\n[grid]\nlr = 1', "grid is \"{'lr': 1}\", expected a table of lists"),
        ('script = "toy.py"\nout = "x"\n[grid]\nloss = "ce"', "expected a table of lists that have a value or more"),
        ('script = "toy.py"\nout = "x"\n[grid]\nlr = []', "expected a table of lists that have a value or more"),
        ('script = "toy.py"\nout = "x"\n[arm]\nlr = 1', "expected tables of values, each below its [[arm]]"),
        ('script = "toy.py"\nout = "x"\narm = []', "expected tables of values, each below its [[arm]]"),
        ('script = "empty.py"\nout = "x"', "r.toml: script 'empty.py' is not a script with a Config"),
    ],
)
def test_a_broken_recipe_is_one_line(toy, capsys, recipe, says):
    Path("empty.py").write_text("")
    assert says in refused(capsys, recipe)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda p: p.stem)
def test_recipes_are_valid(path, monkeypatch):
    """Each cell's flags are parsed and read by the script, and no two cells have one folder."""
    monkeypatch.chdir(ROOT)
    recipe = campaign.read_recipe(path)
    script = load_script(recipe["script"])
    complete = getattr(script, "complete", dict)
    found, _ = fit(script, cells(recipe, {}))
    assert len({cell.name for cell in found}) == len(found) > 0
    for cell in found:
        cfg = parse_config(script.Config, campaign.arguments(cell.shared | cell.own), complete=complete)
        cfg = script.with_preset(cfg) if hasattr(script, "with_preset") else cfg
        if hasattr(script, "check"):
            script.check(cfg, World(0, 1, torch.device("cpu")))


def test_runs_one_after_the_other_go_on_and_stop_at_a_failure(toy, capfd, monkeypatch):
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    calls = []
    monkeypatch.setattr(subprocess, "call", lambda line: calls.append(line) or 0)
    Path("r.toml").write_text('script = "toy.py"\nout = "runs"\ntitle = "T"\n[grid]\nseed = [1, 2]\n')
    try:
        assert campaign.main(["r.toml"]) == 0 and campaign.main(["r.toml"]) == 0
        report = [sys.executable, "-m", "eval.report", "runs/seed1", "runs/seed2", "--out", "runs/report", "--title"]
        assert calls == [[*report, "T"]] * 2
        assert capfd.readouterr().out.count("has finished already") == 2
        Path("runs/seed2/summary.json").unlink()  # its folder is in the way: the run fails
        assert campaign.main(["r.toml"]) == 1 and len(calls) == 2
        assert "runs/seed2 has not finished (exit code 1)" in capfd.readouterr().err
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_an_unfinished_run_is_resumed(tmp_path):
    (tmp_path / "last.pt").touch()
    line = campaign.command_line("train_lm.py", tmp_path, {"fast": False, "lr_warmup": 0.1, "seed": 2}, 4)
    assert line[1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    assert line[6:] == f"train_lm.py --out {tmp_path} --no-fast --lr-warmup 0.1 --seed 2 --resume".split()


def test_recipes_run_side_by_side_go_on_and_say_what_failed(corpus, tmp_path, monkeypatch, capfd):
    """Two runs at a time, each in its folder with its log, then their report; what has finished is left alone, and a
    run that fails is named with its log."""
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    recipe = tmp_path / "two.toml"
    recipe.write_text(
        f'script = "train_lm.py"\nout = "{tmp_path / "runs"}"\n[flags]\ndata = "{corpus}"\n'
        f'cache = "{tmp_path / "cache"}"\n'
        'tokenizer = "bpe:320"\nmodel = "pico"\nseq_len = 32\nbatch = 4\nsteps = 3\nsample_tokens = 2\ndevice = "cpu"\n'
        "[grid]\nseed = [1, 2, 3]\n"
    )
    try:
        assert campaign.main([str(recipe), "--jobs", "2"]) == 0
        done = [tmp_path / "runs" / f"seed{seed}" for seed in (1, 2, 3)]
        assert all(
            (d / "summary.json").exists() and "validation ppl" in (d.parent / f"{d.name}.log").read_text() for d in done
        )
        assert (tmp_path / "runs" / "report" / "report.md").exists()
        before = [(d / "summary.json").stat().st_mtime_ns for d in done]
        capfd.readouterr()
        fails = tmp_path / "fails.toml"
        fails.write_text(recipe.read_text().replace("[1, 2, 3]", "[1]"))
        monkeypatch.setattr(campaign.subprocess, "call", lambda line: 0)  # a report again shows nothing more
        assert campaign.main([str(fails), "--jobs", "2", "--set", "data=/no/such", "--out", str(tmp_path / "b")]) != 0
        assert f"{tmp_path / 'b' / 'seed1'}.log" in capfd.readouterr().err
        assert campaign.main([str(recipe), "--jobs", "2"]) == 0
        assert before == [(d / "summary.json").stat().st_mtime_ns for d in done]
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


SLOW = """
    def main(argv=None):
        cfg = parse_config(Config, argv, complete=complete)
        folder = Path(cfg.out)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "began").write_text(f"{os.getpid()}")

        def saves(number, frame):
            (folder / "saved").touch()
            sys.exit(143)

        signal.signal(signal.SIGTERM, saves)
        time.sleep(100)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
@pytest.mark.parametrize("jobs", ["1", "2"])
def test_the_runs_of_a_campaign_that_is_killed_save_and_end(toy, jobs):
    """kill -9 of the campaign is SIGTERM to its runs: none is left to train beside the next start."""
    head, tail = textwrap.dedent(SCRIPT).split("def main", 1)
    head = head.replace("import dataclasses, json, sys", "import dataclasses, json, os, signal, sys, time")
    Path("toy.py").write_text(head + textwrap.dedent(SLOW) + tail[tail.index('\nif __name__ == "__main__"') :])
    Path("r.toml").write_text('script = "toy.py"\nout = "runs"\n[grid]\nseed = [1, 2]\n')
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{Path.cwd()}", "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "eval.campaign", "r.toml", "--jobs", jobs]
    killed = subprocess.Popen(line, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    folders = [Path(f"runs/seed{seed}") for seed in range(1, 1 + int(jobs))]
    wait_for(lambda: all((f / "began").exists() and (f / "began").read_text() for f in folders))
    time.sleep(0.2)  # until their handler stands
    killed.kill()
    killed.wait()
    wait_for(lambda: all((f / "saved").exists() for f in folders))
    wait_for(lambda: not any(Path(f"/proc/{(f / 'began').read_text()}").exists() for f in folders))


def wait_for(there, seconds: float = 30) -> None:
    ends = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < ends
        time.sleep(0.02)


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_campaign_that_is_stopped_ends_with_the_signals_code(toy, jobs, monkeypatch, capfd):
    """SIGTERM while the first run works: no second one begins, and the code is 128 + 15."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{Path.cwd()}")
    Path("toy.py").write_text(
        Path("toy.py")
        .read_text()
        .replace(
            "Path(cfg.out).mkdir",
            "import os, signal, time\n    os.kill(os.getppid(), "
            "signal.SIGTERM) if cfg.steps == 1 else None\n    time.sleep(1)\n    Path(cfg.out).mkdir",
        )
    )
    Path("r.toml").write_text('script = "toy.py"\nout = "runs"\n[flags]\nsteps = 1\n[grid]\nseed = [1, 2, 3]\n')
    if jobs == "2":  # there the parent is the forkserver: the signal is sent from here
        monkeypatch.setattr(campaign.time, "sleep", lambda s: os.kill(os.getpid(), signal.SIGTERM))
        Path("toy.py").write_text(Path("toy.py").read_text().replace("if cfg.steps == 1", "if False"))
    assert campaign.main(["r.toml", "--jobs", jobs]) == 143
    assert not Path("runs/seed3/summary.json").exists()
    assert "the same command goes on from here" in capfd.readouterr().err
