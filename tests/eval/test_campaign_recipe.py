"""Recipes: their grids, the flags that each cell reads, and what is refused before anything starts."""

import shlex
from pathlib import Path

import pytest

from eval import campaign
from eval.campaign import cells
from eval.campaign.__main__ import main
from eval.campaign.plan import seconds_of
from eval.campaign.recipe import command_line, line_of
from kernels.losses import LOSSES

ROOT = Path(__file__).parents[2]


def dry(capsys, script: str, recipe: str, *argv: str) -> tuple[list[dict], str]:
    """Flags of every command that the recipe comes to, and what stands on stderr."""
    Path("r.toml").write_text(f'script = "{script}"\nout = "runs/toy"\n{recipe}')
    assert main(["r.toml", "--dry-run", "commands", *argv]) == 0
    said = capsys.readouterr()
    lines = [shlex.split(line)[2:] for line in said.out.splitlines()]
    return [{k: v for k, v in zip(line, line[1:], strict=False) if k.startswith("--")} for line in lines], said.err


def refused(capsys, toy: str, recipe: str, *argv: str) -> str:
    Path("r.toml").write_text(recipe.replace("toy.py", toy))
    with pytest.raises(SystemExit) as stopped:
        main(["r.toml", *argv])
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.count("\n") == 1 and not Path("runs").exists()
    return err


def test_cells_are_the_product_of_arms_and_grid():
    recipe = {"flags": {"steps": 3, "lr": 1}, "arm": [{"loss": "ce"}, {"loss": "dpsm", "warmup": 0.1}]}
    found = cells(recipe | {"grid": {"lr": [1, 2], "seed": [7]}}, {"lr": "9"})
    assert [c.name for c in found] == ["ce-seed7", "dpsm-warmup0.1-seed7"]
    assert found[-1].shared == {"steps": 3, "lr": "9"} and found[-1].own == {"loss": "dpsm", "warmup": 0.1, "seed": 7}
    with pytest.raises(ValueError, match="same flags"):
        cells({"arm": [{"loss": "ce"}, {"loss": "ce"}]}, {})


def test_an_axis_of_flags_that_change_together(toy, capsys):
    grid = "[grid]\nsize = [{steps = 3, lr = 0.1}, {steps = 4, lr = 0.2}]\nseed = [1, 2]\n"
    found, _ = dry(capsys, toy, grid)
    assert [(f["--steps"], f["--lr"], f["--seed"]) for f in found] == [
        ("3", "0.1", "1"),
        ("3", "0.1", "2"),
        ("4", "0.2", "1"),
        ("4", "0.2", "2"),
    ]
    assert Path(found[3]["--out"]).name == "steps4-lr0.2-seed2"
    err = refused(capsys, toy, f'script = "{toy}"\nout = "runs/x"\n' + grid.replace("steps = 4", "stesp = 4"))
    assert "line 4: cell stesp4-lr0.2-seed1: unrecognized arguments: --stesp; did you mean --steps?" in err


def test_shared_flags_are_left_out_where_nothing_reads_them(toy, capsys):
    recipe = '[flags]\nwarmup = 0.3\nfot_window = 16\nfast = true\n[grid]\nloss = ["ce", "brier", "dpsm"]\n'
    found, said = dry(capsys, toy, recipe)
    assert ["--warmup" in flags for flags in found] == [False, False, True] and found[2]["--warmup"] == "0.3"
    assert all("--fast" in flags and "--fot-window" not in flags for flags in found)
    assert said == "left out where nothing reads them: warmup (ce, brier), fot_window (cosine)\n"
    found, said = dry(capsys, toy, recipe, "--set", "preset=fot", "--set", "loss=dpsm")
    assert [flags["--fot-window"] for flags in found] == ["16"] and said == "--set makes 3 cells of the recipe 1\n"


def test_an_axis_that_set_names_has_that_value_alone(toy, capsys):
    grid = '[grid]\nloss = ["ce", "dpsm"]\nsteps = [4, 5]\nlr = [0.1, 0.2]\n'
    found, said = dry(capsys, toy, grid, "--set", "lr=0.3", "--seeds", "1,2")
    assert [Path(flags["--out"]).name for flags in found] == [
        f"{loss}-steps{steps}-seed{seed}" for loss in ("ce", "dpsm") for steps in (4, 5) for seed in (1, 2)
    ]
    assert {flags["--lr"] for flags in found} == {"0.3"} and said == "--set makes 16 cells of the recipe 8\n"
    arms = '[[arm]]\nloss = "ce"\nsteps = 4\n[[arm]]\nloss = "ce"\nsteps = 5\n'
    found, _ = dry(capsys, toy, arms, "--set", "steps=6")
    assert [Path(flags["--out"]).name for flags in found] == ["ce"]


def test_a_cells_own_flag_is_passed_as_it_is_and_refused_where_nothing_reads_it(toy, capsys):
    head = 'script = "toy.py"\nout = "runs/toy"\n'
    err = refused(
        capsys, toy, head + '[flags]\ngamma = 1.0\n[[arm]]\nloss = "ce"\n[[arm]]\nloss = "brier"\ngamma = 3.0\n'
    )
    assert "r.toml, line 9: cell brier-gamma3.0: --gamma is read by --loss focal alone" in err
    assert "cell ce: unrecognized arguments: --stepz; did you mean --steps?" in refused(
        capsys, toy, head + '[flags]\nstepz = 3\n[grid]\nloss = ["ce"]\n'
    )
    assert "cell steps0: --steps 0" in refused(capsys, toy, head + "[grid]\nsteps = [5, 0]\n")
    assert "cell run: argument --loss: invalid choice: 'brie'" in refused(
        capsys, toy, head + '[flags]\nloss = "brie"\n'
    )
    assert "--set gamma: no cell reads it" in refused(capsys, toy, head, "--set", "gamma=3")
    assert "--set gamma: expected FLAG=VALUE" in refused(capsys, toy, head, "--set", "gamma")
    assert "--jobs 0" in refused(capsys, toy, head, "--jobs", "0")


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ("grid = [", "r.toml: not TOML"),
        ('out = "x"', "r.toml needs script and out"),
        ('script = "toy.py"\nout = "x"\nflag = 3', "check ['flag']"),
        ('script = "no.py"\nout = "x"', "r.toml, line 1: script 'no.py' is not a script"),
        ('script = 3\nout = "x"', "r.toml, line 1: script is '3', expected a text"),
        ('script = "toy.py"\nout = "x"\nflags = [1]', "flags is '[1]', expected a table of values"),
        ('script = "toy.py"\nout = "x"\n[flags]\nlr = [1]', "flags is \"{'lr': [1]}\", expected a table of values"),
        ('script = "toy.py"\nout = "x"\n[grid]\nlr = 1', "grid is \"{'lr': 1}\", expected a table of lists"),
        ('script = "toy.py"\nout = "x"\n[grid]\nloss = "ce"', "expected a table of lists that have a value or more"),
        ('script = "toy.py"\nout = "x"\n[grid]\nlr = []', "expected a table of lists that have a value or more"),
        ('script = "toy.py"\nout = "x"\n[arm]\nlr = 1', "expected tables of values, each below its [[arm]]"),
        ('script = "toy.py"\nout = "x"\narm = []', "expected tables of values, each below its [[arm]]"),
        ('script = "empty.py"\nout = "x"', "r.toml, line 1: script 'empty.py' is not a script with a Config"),
    ],
)
def test_a_broken_recipe_is_one_line(toy, capsys, recipe, says):
    Path("empty.py").write_text("")
    assert says in refused(capsys, toy, recipe)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda p: p.stem)
def test_recipes_are_valid(path, monkeypatch):
    """Each cell's flags are parsed and read by the script, and no two cells have one folder."""
    monkeypatch.chdir(ROOT)
    _, found, _ = campaign.check(path, {})
    assert len({cell.name for cell in found}) == len(found) > 0


def test_the_audit_has_every_loss_and_steps_of_2000_tokens(monkeypatch):
    monkeypatch.chdir(ROOT)
    _, found, _ = campaign.check(ROOT / "recipes" / "audit_2k.toml", {})
    assert {cell.config["loss"] for cell in found} == set(LOSSES)
    assert {cell.config["batch"] * cell.config["seq_len"] for cell in found} == {2000}


def test_the_line_of_a_fault_is_said(toy, capsys):
    """Of a flag in its table, of an arm in its own, of a value in the grid, of flags that do not go together."""
    two = f'script = "{toy}"\nout = "runs"\n'
    head = two + "[flags]\nlr = 1e-3\n"
    arms = '[[arm]]\nloss = "ce"\nlr = 2\n[[arm]]\nloss = "dpsm"\nwarmup = 3\n'

    def says(recipe: str) -> str:
        return refused(capsys, toy, recipe)

    assert "r.toml, line 10: cell dpsm-warmup3: --warmup 3.0" in says(head + arms)
    assert "line 7: cell ce-warmup0.2: --warmup is read by" in says(head + arms.replace("lr = 2", "warmup = 0.2"))
    assert "line 6: cell steps0: --steps 0" in says(head + "[grid]\nsteps = [5, 0]\n")
    assert "line 5: cell run: unrecognized arguments: --stesp; did you mean --steps?" in says(head + "stesp = 3")
    assert "line 3: script 'gone.py'" in says('\n\nscript = "gone.py"\nout = "x"')
    losses = 'keep = ["dpms"]\n[grid]\nloss = ["ce", "dpsm"]\n'
    assert "line 3: keep: no cell has 'dpms'; did you mean dpsm?" in says(two + losses)
    assert "line 3 needs script and out, and knows flags" in says(two + "kep = 3")
    assert "line 3: keep is '3', expected a list" in says(two + "keep = 3")
    assert "cell run: --data ./gone: there is no such file" in says(head + 'data = "./gone"')


def test_other_seeds_than_the_recipes(toy, capsys):
    """In the place of the grid's, or where it has none; the folders are those of the recipe, so that its run stays."""
    for axis in ("seed = [1]", ""):
        found, _ = dry(capsys, toy, f'[grid]\nloss = ["ce", "brier"]\n{axis}\n', "--seeds", "1, 2,3")
        assert [cell["--seed"] for cell in found] == ["1", "2", "3"] * 2
        assert found[0]["--out"] == "runs/toy/ce-seed1"
    for bad in ("1,1", "x", "1,,2", "-1", "1.5", "1,01"):
        says = refused(capsys, toy, f'script = "{toy}"\nout = "runs/toy"', f"--seeds={bad}")
        assert f"--seeds {bad}: expected different whole numbers" in says


@pytest.mark.parametrize("name", ["last.pt", "previous.pt", "best.pt"])
def test_a_run_with_any_checkpoint_is_resumed(tmp_path, name):
    """best.pt stands alone where a run was killed before its first last.pt: without --resume it is refused."""
    line = ["train_lm.py", tmp_path, {"seed": 1}, 1]
    assert "--resume" not in command_line(*line)
    (tmp_path / name).touch()
    assert command_line(*line)[-1] == "--resume"


def test_where_a_key_stands():
    text = 'out = 1\n[flags]\nseq_len = 3\n"b" = 1\n[[arm]]\nloss = "x"\n\n[[arm]]\nseq-len = 4\n'
    assert [line_of(text, "out"), line_of(text, "seq-len", "flags"), line_of(text, "b", "flags")] == [1, 3, 4]
    assert [line_of(text, "seq_len", "arm", 1), line_of(text, "loss", "arm", 0), line_of(text, "arm")] == [9, 6, 5]
    assert line_of(text, "loss", "arm", 1) is None and line_of(text, "seq_len", "grid") is None


def test_spans_are_read_back():
    assert [seconds_of(text) for text in ("0 s", "5 min 12 s", "3 h 20 min", "2 d 4 h")] == [0, 312, 12000, 187200]
