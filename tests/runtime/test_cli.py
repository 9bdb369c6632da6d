"""Flags that say everything about themselves: parsing, ranges, readers, sections of --help, and the shared ones."""

import dataclasses
from dataclasses import dataclass

import pytest

import finetune_gsm8k
import finetune_seq2seq
import train_lm
from runtime.cli import ROLES, changeable, opt, outside, parse_config, roles
from runtime.flags import FLAGS, flag

SCRIPTS = (train_lm, finetune_seq2seq, finetune_gsm8k)


@dataclass(frozen=True)
class Config:
    lr: float = opt(0.1, "a rate, in % of nothing", within="(0, 1]", group="optimizer")
    steps: int = opt(3, "steps", within="[1, inf)", role="setting")
    mode: str = opt("a", "mode", ("alpha", "beta"), alias="--way", group="system")
    fast: bool = opt(False, "fast", role="system")
    faster: float = opt(1.0, "how much faster", only={"fast": (True,)})
    knob: float = opt(0.5, "of beta", only={"mode": ("beta",)})
    place: str = opt("", "place", role="where")
    compile: bool | None = opt(None, "compile")
    warmup: float = opt(0.1, "share", within="[0, 1]", only={"mode": ("beta",)}, unlike="the rate's is --rise")


def refused(flags: str, capsys, **how) -> str:
    with pytest.raises(SystemExit) as stopped:
        parse_config(Config, flags.split(), **how)
    assert stopped.value.code == 2
    text = capsys.readouterr().err.strip()
    assert len(text.splitlines()) == 1
    return text


def test_config_from_flags():
    assert parse_config(Config, []) == Config()
    c = parse_config(Config, "--lr 1e-3 --steps 5 --mode beta --fast --faster 2 --knob 1 --no-compile".split())
    assert c == Config(1e-3, 5, "beta", True, 2.0, 1.0, "", False)
    assert parse_config(Config, ["--way", "beta"]).mode == "beta"


def test_help_is_grouped_and_says_ranges_choices_and_defaults(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_config(Config, ["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert all(f"--{n}" in text for n in ("lr", "steps", "mode", "way", "fast", "no-compile"))
    assert "share; the rate's is --rise ([0, 1]; default: 0.1)" in " ".join(text.split())
    assert "(0, 1]; default: 0.1" in text and "alpha, beta" in text and "% of nothing" in text
    places = [text.index(part) for part in ("optimizer:", "--lr", "--steps", "system:", "--mode", "--compile")]
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--steps x", "argument --steps: 'x' is no number; expected one such as 1000, 1_000, 1e3"),
        ("--lr", "expected one argument"),
        ("--nope 1", "unrecognized arguments: --nope"),
        ("--stesp 3", "did you mean --steps?"),
        ("--ste 3", "unrecognized"),
        ("--mode alhpa", "invalid choice: 'alhpa' (choose from alpha, beta); did you mean alpha?"),
        ("--steps 0", "--steps 0 must be at least 1"),
        ("--lr 0", "--lr 0.0 is outside (0, 1]"),
        ("--lr nan", "--lr nan is outside (0, 1]"),
        ("--lr inf", "--lr inf is outside (0, 1]"),
        ("--mode beta --knob 1e999", "--knob inf must be finite"),
        ("--knob 1", "--knob is read by --mode beta alone, not by --mode a"),
        ("--knob 0.5", "--knob is read by --mode beta alone"),  # also at its default: it was given
        ("--faster 3", "--faster needs --fast"),
        ("--warmup 0.2", "--warmup is read by --mode beta alone, not by --mode a; the rate's is --rise"),
        ("--mode beta --warmup 500", "--warmup 500.0 is outside [0, 1]; the rate's is --rise"),
    ],
)
def test_a_bad_flag_is_one_line(flags, says, capsys):
    assert says in refused(flags, capsys)


def test_what_is_completed_is_checked_too(capsys):
    def complete(values):
        return values | {"mode": "beta", "steps": 0 if values["place"] else 7}

    assert parse_config(Config, ["--knob", "1"], complete=complete).steps == 7
    assert "--steps 0" in refused("--place x", capsys, complete=complete)


@pytest.mark.parametrize("interval", ["[0, 1]", "[0, 1)", "(0, 1]", "[3, inf)", "[0, inf)"])
def test_intervals(interval):
    low, high = float(interval[1]), float(interval[4:-1])
    assert not outside(high / 2 if high < 10 else 5, interval)
    assert bool(outside(low, interval)) == (interval[0] == "(") and bool(outside(high, interval)) == (
        interval[-1] == ")"
    )
    assert outside(low - 1, interval) and outside(float("nan"), interval)


def test_a_lower_bound_is_named():
    assert outside(0.2, "[0.5, inf)") == "must be at least 0.5"
    assert outside(-1, "[0, inf)") == "must be finite and not negative"


def test_roles_say_what_a_difference_means():
    found = roles(Config)
    assert found["steps"] == {"role": "setting", "only": {}, "default": 3}
    assert found["knob"]["only"] == {"mode": ("beta",)}
    assert changeable(Config) == ("fast", "place")
    with pytest.raises(ValueError, match="role 'nonsense'"):
        opt(1, "x", role="nonsense")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.__name__)
def test_every_flag_of_a_script_is_described(script):
    fields = {f.name: f for f in dataclasses.fields(script.Config)}
    for f in fields.values():
        assert f.metadata["help"] and f.metadata["role"] in ROLES
        for other, allowed in f.metadata["only"].items():
            choices = fields[other].metadata["choices"]
            assert not choices or set(allowed) & set(choices), (f.name, other)
        if isinstance(f.default, int | float) and not isinstance(f.default, bool) and f.metadata["within"]:
            assert not outside(f.default, f.metadata["within"]), f.name
    groups = [f.metadata["group"] for f in fields.values() if f.metadata["group"]]
    assert groups == ["run", "data", "model", "loss", "optimizer", "evaluation", "system"]


def test_shared_flags_mean_the_same_everywhere():
    for script in SCRIPTS:
        for f in dataclasses.fields(script.Config):
            if f.name in FLAGS and f.name != "report":
                about = {k: v for k, v in f.metadata.items() if k not in ("help", "choices")}
                assert about == {k: v for k, v in FLAGS[f.name].metadata.items() if k not in ("help", "choices")}, (
                    f.name
                )
    assert flag("lr", 3.0).default == 3.0 and flag("lr", help="x").metadata["help"] == "x"


@pytest.mark.parametrize(
    ("script", "flags", "says"),
    [
        (train_lm, "--gamma 2", "--gamma is read by --loss focal alone"),
        (train_lm, "--loss dpsm --eps 0.1", "--eps is read by --loss smoothing alone"),
        (train_lm, "--loss dpsm --alpha-schedule fixed --warmup 0.1", "--warmup is read by --alpha-schedule"),
        (train_lm, "--schedule fot --lr-floor 0.1", "--lr-floor is read by --schedule"),
        (train_lm, "--schedule cosine --fot-window 8", "--fot-window is read by --schedule snac or bacon or fot"),
        (train_lm, "--schedule snac --fot-parts none", "--fot-parts is read by --schedule fot or bacon alone"),
        (train_lm, "--resume-from x", "--resume-from needs --resume"),
        (finetune_seq2seq, "--loss brier --label-smoothing 0.1", "--label-smoothing is read by --loss ce or dpsm"),
        (finetune_seq2seq, "--preset bart --fot-window 4", "not by --schedule polynomial"),  # of the preset
        (finetune_gsm8k, "--loss ce --tail-smoothing 0.1", "--tail-smoothing is read by --loss brier or spherical"),
    ],
)
def test_a_flag_that_nothing_reads_is_refused(script, flags, says, capsys):
    with pytest.raises(SystemExit) as stopped:
        script.main(flags.split())
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and says in error and len(error.strip().splitlines()) == 1
