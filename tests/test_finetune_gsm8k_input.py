"""finetune_gsm8k.py refuses bad settings, models and problems in one line and leaves nothing behind."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from gsm8k_runs import refused, tune


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--rank 0", "--rank 0 must be at least 1"),
        ("--lora-dropout 1.0", "dropout"),
        ("--targets q_proj,head", "'head'"),
        ("--seq-len 60", "leaves no room for an answer"),
        ("--seq-len 300", "256 positions"),
        ("--generate-tokens 250", "leaves no room for 250 new ones"),
        ("--heldout 40", "40 problems held out of 40"),
        ("--batch 0", "--batch 0"),
        ("--lr nan", "--lr nan"),
        ("--warmup 2", "--warmup 2.0 is outside [0, 1]"),
        ("--tail-smoothing 0.1", "not by --loss ce"),
        ("--unigram-gain 1", "--unigram-gain 1.0 needs its limit"),
        ("--loss dpsm --path order --unigram 0.1", "--unigram 0.1 is for --path mix"),
        ("--loss brier --unigram 0.1", "--unigram is read by --loss ce or dpsm alone"),
        ("--unigram 0.1 --schedule fot", "reads a Fisher that --unigram 0.1 has not; leave gate out"),
        ("--samples 2 --k 3", "pass@3"),
        ("--samples 2 --k 1,x", "'1,x'"),
        ("--samples 2 --temperature 0", "--temperature 0"),
        ("--optimizer paged-adamw8bit", "needs a CUDA device"),
        ("--kernels triton", "--kernels triton needs a CUDA device"),
        ("--layers triton", "--layers triton needs a CUDA device"),
        ("--resume-from x.pt", "needs --resume"),
        ("--resume", "no run in"),
        ("--model /no/such/folder", "pass a local folder"),
        ("--model no/such-model-anywhere", "pass a local folder"),
        ("--data /no/such/folder", "expected a folder with train.jsonl and test.jsonl"),
        ("--adapter /no/such/adapter", "adapter_config.json"),
        ("--format poem", "--format"),
        ("--schedule fot --fot-parts gate,speed", "FoT parts 'gate,speed': expected some of"),
        ("--schedule fot --fot-window 0", "--fot-window 0"),
        ("--schedule snac --fot-beta 1", "--fot-beta 1.0 is outside [0, 1)"),
        ("--schedule fot --lr-warmup 1", "leaves no step"),
        ("--schedule fot --loss brier --tail-smoothing 0.1", "that --tail-smoothing 0.1 has not; leave gate out"),
        ("--schedule schedule-free --optimizer paged-adamw8bit", "an optimizer of its own"),
        ("--schedule never", "--schedule"),
        ("--targets .*lm_head", "name no layer; nothing would train"),
        ("--targets (", "is no regular expression"),
        ("--lora-plus 0", "--lora-plus 0"),
        ("--lora-init svd", "--lora-init"),
        ("--lora-init pissa --rank 65", "PiSSA of rank 65 from a matrix (64, 64): expected at most 64"),
    ],
)
def test_bad_settings(base, tmp_path, capsys, flags, says):
    assert says in refused(capsys, tmp_path / "run", *base, *flags.split())


def edit_config(folder: Path, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    "harm, says",
    [
        (lambda f: edit_config(f, model_type="gemma"), "model_type='gemma'; expected one of llama"),
        (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer.json"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer.json, line 1: not JSON"),
        (lambda f: edit_config(f, vocab_size=100), "the model only 100"),
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (lambda f: (f / "tokenizer_config.json").write_text('{"chat_template": "{% for"}'), "template is no Jinja"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 40), "damaged"),
        (
            lambda f: (
                (f / "tokenizer.json").write_text((f / "tokenizer.json").read_text().replace("<|im_end|>", "<|e|>")),
                (f / "tokenizer_config.json").unlink(),
            ),
            "use --prompt plain",
        ),
    ],
)
def test_bad_models(base, model, tmp_path, capsys, harm, says):
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    harm(folder)
    assert says in refused(capsys, tmp_path / "run", *base, "--model", folder)


def test_plain_prompts_need_an_end(base, model, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    edit_config(folder, eos_token_id=None)
    assert "eos_token_id" in refused(capsys, tmp_path / "run", *base, "--model", folder, "--prompt", "plain")


@pytest.mark.parametrize(
    "line, says",
    [
        ('{"question": "How many?"}', "train.jsonl, line 3 has no text in field 'answer'"),
        ('{"question": "How', "train.jsonl, line 3: not JSON"),
        ('{"question": "How many?", "answer": "Three."}', "train.jsonl, line 3: its answer does not end in"),
    ],
)
def test_bad_problems(base, problems, tmp_path, capsys, line, says):
    folder = tmp_path / "data"
    shutil.copytree(problems, folder)
    good = (folder / "train.jsonl").read_text().splitlines()
    (folder / "train.jsonl").write_text("\n".join([*good[:2], line, *good[2:]]) + "\n")
    assert says in refused(capsys, tmp_path / "run", *base, "--data", folder)


def test_bitsandbytes_missing(base, tmp_path, capsys, monkeypatch):
    for name in [n for n in sys.modules if n.partition(".")[0] == "bitsandbytes"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert "take base 'bf16'" in refused(capsys, tmp_path / "run", *base, "--base", "nf4")


def test_problems_too_long_are_left_out_whole_and_counted(base, tmp_path, capsys):
    assert tune(base, tmp_path / "run", "--seq-len", 120, "--steps", 1, "--eval-problems", 1) == 0
    shown = capsys.readouterr()
    assert "18 of 32 problems are longer than --seq-len 120, left out" in shown.err
    assert "14 training and 6 held-out problems" in shown.out and "% padding" in shown.out
