"""Without what only some runs need: help, a run, and one line that names the package before anything is written."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What requirements-cpu.txt leaves out, and what only summaries need.
LACKING = "bitsandbytes datasets pandas pyarrow triton matplotlib nltk rouge_score wandb transformers".split()
WITHOUT = f"""
import contextlib, sys
from importlib.machinery import PathFinder

find = PathFinder.find_spec

def present(name, *rest):
    return None if name.split(".")[0] in {LACKING} else find(name, *rest)

PathFinder.find_spec = staticmethod(present)
import finetune_gsm8k, finetune_seq2seq, train_lm
for script in (finetune_gsm8k, finetune_seq2seq, train_lm):
    with contextlib.suppress(SystemExit):
        script.main(["--help"])
sys.exit(train_lm.main(sys.argv[1:]))
"""


def test_help_of_all_three_and_a_tiny_run(lm_base, tmp_path):
    line = [sys.executable, "-c", WITHOUT, *lm_base, "--steps", "2", "--out", tmp_path / "run"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.count("--dry-run") == 3, done.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 2


@pytest.mark.parametrize(
    ("command", "flags", "says"),
    [
        ("train_lm", "--data wikitext2", "needs the package datasets ("),
        ("finetune_seq2seq", "--size bart-tiny --random-start --tokenizer bpe:300", "pip install rouge-score"),
        (
            "finetune_gsm8k",
            "--data {problems} --model {model} --heldout 8 --generate-tokens 9 --base nf4",
            "pip install bitsandbytes, or take base",
        ),
        ("schedules.__main__", "plot --out {out}", "the picture needs the package matplotlib ("),
        ("kernels.bench.__main__", "--plot {out}", "--plot needs the package matplotlib: pip install matplotlib"),
    ],
)
def test_what_is_missing_is_one_line_before_anything_is_written(
    command, flags, says, problems, model, tmp_path, monkeypatch, capsys
):
    module = importlib.import_module(command)
    for name in (*LACKING, *(m for m in list(sys.modules) if m.split(".")[0] in LACKING)):
        if not name.startswith("triton"):  # the kernels have it already
            monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delenv("LM_DATA", raising=False)
    given = flags.format(problems=problems, model=model, out=tmp_path / "out").split()
    if "__main__" not in command:
        given += ["--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache"), "--device", "cpu"]
    try:
        code = module.main(given)
    except SystemExit as stopped:
        code = stopped.code
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2 and says in last and not list(tmp_path.iterdir()), last
