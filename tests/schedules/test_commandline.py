"""Numbers as people type them, the nearest name, and one line: for every command."""

import argparse
import importlib
import re
import time

import pytest
from tqdm import tqdm

from schedules import commandline
from schedules.commandline import Parser, alive, nearest, number, whole


@pytest.mark.parametrize(
    ("text", "value"),
    [("1000", 1000), ("1_000", 1000), ("1e3", 1000), ("1E3", 1000), ("1000.0", 1000), ("-1e3", -1000), ("+2", 2)]
    + [(str(2**63 + 1), 2**63 + 1), ("2.5e3", 2500), ("1_0e2", 1000), ("0", 0)],
)
def test_whole_numbers(text, value):
    found = whole(text)
    assert found == value and type(found) is int


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("1.5", "1.5 is no whole number; expected one such as 1000, 1_000 or 1e3"),
        ("1e-3", "1e-3 is no whole number"),
        ("inf", "inf is no whole number"),
        ("nan", "nan is no whole number"),
        ("1e999", "is no whole number"),
        ("1e17", "beyond 2^53; write it in digits"),
        ("10k", "k may mean two things: write 10000 or 10240"),
        ("2M", "write 2000000 or 2097152"),
        ("1.5k", "write 1500 or 1536"),
        ("1,000", "without commas it is 1000 or 1_000"),
        ("1,5", "'1,5' is no number; expected one such as"),
        ("ten", "'ten' is no number"),
        ("", "'' is no number"),
        ("0x10", "'0x10' is no number"),
    ],
)
def test_what_is_no_whole_number_says_what_to_write(text, says):
    with pytest.raises(argparse.ArgumentTypeError) as error:
        whole(text)
    assert says in str(error.value)


def test_numbers():
    assert [number(t) for t in ("3e-4", "1_000.5", ".5", "-1e3")] == [3e-4, 1000.5, 0.5, -1000.0]
    with pytest.raises(argparse.ArgumentTypeError, match="'3e-4f' is no number"):
        number("3e-4f")


def test_the_nearest_name():
    assert nearest("--stesp", ["--steps", "--seed"]) == "; did you mean --steps?"
    assert nearest("--seq_length", ["--seq-len", "--steps"]) == "; did you mean --seq-len?"
    assert nearest("xyz", ["--steps", ""]) == ""


def parsed(*argv: str, **how):
    parser = Parser(exits=False, **how)
    parser.add_argument("file", nargs="?")
    parser.add_argument("--seq-len", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--way", choices=("alpha", "beta"))
    parser.add_argument("--resume-from")
    parser.add_argument("-n", type=int)
    parser.add_argument("--fast", action=argparse.BooleanOptionalAction)
    return parser.parse_args(argv)


def test_flags_are_taken_with_underscores():
    assert parsed("--seq_len", "1_024").seq_len == parsed("--seq_len=1024").seq_len == 1024
    assert parsed("--resume_from=a_b=--c_d").resume_from == "a_b=--c_d"
    assert parsed("a_b", "--no_fast").file == "a_b" and parsed("--no_fast").fast is False
    assert parsed("--", "--seq_len").file == "--seq_len"
    assert parsed("-n3").n == 3 and parsed("--lr", "-1e3").lr == -1000.0 and parsed("--lr", "-.5").lr == -0.5
    assert parsed("--resume-from", "-- a text").resume_from == "-- a text"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("--seqlen 3", "unrecognized arguments: --seqlen; did you mean --seq-len?"),
        ("--wy alpha --lrr 2", "unrecognized arguments: --wy --lrr; did you mean --way?"),
        ("-lr 3", "unrecognized arguments: -lr; did you mean --lr?"),
        ("--way bta", "argument --way: invalid choice: 'bta' (choose from alpha, beta); did you mean beta?"),
        ("--seq-len 1.5", "argument --seq-len: 1.5 is no whole number"),
        ("a b", "unrecognized arguments: b"),
    ],
)
def test_errors(argv, says):
    with pytest.raises(ValueError) as error:
        parsed(*argv.split())
    assert says in str(error.value)


COMMANDS = {
    "train_lm": ("--seq_len 1e1.5", "--seq-len"),
    "finetune_seq2seq": ("--max_source x", "--max-source"),
    "finetune_gsm8k": ("--generate_tokens 1.5", "--generate-tokens"),
    "data.lm": ("pydoc --cach x", "--cache"),
    "data.gsm8k": ("--workers 1.5", "--workers"),
    "eval.campaign": ("--nproc 1e-3 recipe.toml", "--nproc"),
    "eval.report": ("--ouut x", "--out"),
    "eval.dependence": ("run --shuffles 1.5", "--shuffles"),
    "eval.gsm8k": ("a.jsonl --k 1,8", "--k"),
    "eval.verdicts": ("a b --format x", "--"),
    "eval.method_comparison": ("--modell x", "--"),
    "eval.attack": ("run --outt x", "--out"),
    "kernels.bench": ("--n 1.5", "--n"),
    "kernels.audit": ("--dtyp bf16", "--dtype"),
    "model.export": ("--adaptr x", "--adapter"),
    "recipes.smollm2": ("--whel x", "--wheel"),
    "recipes.tiny_bart": ("x --data y --seq_len 10k", "--seq-len"),
    "recipes.tiny_qwen3": ("x --steps 10k", "--steps"),
    "races.train_step": ("--repeats 1.5", "--repeats"),
    "races.nanogpt": ("x --seq_len 1.5", "--seq-len"),
    "races.peft_gsm8k": ("--stesp 1", "--steps"),
    "races.transformers_seq2seq": ("bart-bse", "bart-base"),
    "races.fot_overhead": ("--shape gpt", "gpt2"),
    "schedules": ("forecast x --at 10k", "--at"),
}


MAIN = {"eval.report": "eval.report.terminal", "eval.attack": "eval.attack.run"}
MAIN |= {name: f"{name}.__main__" for name in ("schedules", "kernels.bench", "eval.campaign")}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_reads_its_line_so(command, capsys):
    argv, name = COMMANDS[command]
    module = importlib.import_module(MAIN.get(command, command))
    with pytest.raises(SystemExit) as stopped:
        module.main(argv.split())
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and name in error and len(error.splitlines()) == 1, error
    assert error.endswith("(--help lists the flags)") and "invalid int" not in error


@pytest.mark.parametrize(
    ("argv", "says"),
    [("forcast x", "did you mean forecast?"), ("prune x --ordres 3", "schedules prune: error: unrecognized")],
)
def test_a_sub_command_is_named(argv, says, capsys):
    import schedules.__main__ as schedules

    with pytest.raises(SystemExit):
        schedules.main(argv.split())
    assert says in capsys.readouterr().err


def test_no_silence_is_long(monkeypatch, capsys):
    """A line where nothing is said, none where something is, and a bar is shown again."""
    assert commandline.SILENCE < 10
    monkeypatch.setattr(commandline, "SILENCE", 0.4)
    with alive():
        print("begins")
        time.sleep(1.2)
    said = capsys.readouterr()
    assert said.out == "begins\n" and 1 <= len(re.findall(r"^\.\.\. at work for \d+ s$", said.err, re.M)) <= 3
    with alive():
        for _ in range(12):
            print("word")
            time.sleep(0.1)
    assert capsys.readouterr().err == ""
    with alive(), tqdm(total=3, desc="slow") as bar:
        bar.update()
        time.sleep(1.0)
    shown = capsys.readouterr().err
    assert shown.count("slow:") >= 3 and "at work" not in shown
