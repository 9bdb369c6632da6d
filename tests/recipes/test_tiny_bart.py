"""recipes.tiny_bart from text to a folder that finetune_seq2seq.py and transformers take; signals and --resume."""

import json
import os
import signal
import sys

import pytest
import torch
from refusals import refused
from seq2seq_runs import rows, summary_of, weights

import finetune_seq2seq
from data.denoising import Denoised
from data.summaries import tokenizer_of_model
from model.seq2seq_hub import load_seq2seq
from recipes import tiny_bart

pytestmark = pytest.mark.usefixtures("small_summarisers")
TEXT = "Two birds sang of forty-one songs, and one heard them; then they were still."


@pytest.fixture
def flags(corpus, tmp_path, monkeypatch):
    """Of a run that takes a second, in this process."""
    few = "--log-every 2 --eval-every 4 --validation-examples 8 --test-examples 2".split()
    monkeypatch.setattr(tiny_bart, "run_script", lambda line: finetune_seq2seq.main([*line, *few]))
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "few.jsonl").write_text("".join(json.dumps(dict(text=TEXT * n)) + "\n" for n in range(12)))
    data = f"--data {corpus} --data {tmp_path / 'more'} --cache {tmp_path / 'cache'}"
    return f"{data} --size bart-tiny --vocab 300 --seq-len 32 --steps 8 --batch 4 --lr 3e-3 --device cpu".split()


def test_the_folder_is_one_that_the_script_and_transformers_take(flags, sums, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    out = tmp_path / "bart"
    assert tiny_bart.main([str(out), *flags]) == 0
    assert f"{out}: bart-tiny, " in capsys.readouterr().out
    summary, val = summary_of(tmp_path / "bart-run"), rows(tmp_path / "bart-run", "val")
    assert val[-1]["nll"] < val[0]["nll"] and "+more" in summary["data"]["train"]["set"]
    assert summary["data"]["validation"]["unigram_nll"] < 6
    # transformers: the same ids of a text, the same logits of a masked one.
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    peer = transformers.BartForConditionalGeneration.from_pretrained(out).eval()
    model = load_seq2seq(out).eval()
    ours = tokenizer_of_model(str(out), model.config)
    assert theirs(TEXT)["input_ids"] == ours.wrap(ours.base.encode(TEXT), 99).tolist()
    assert ours.decode(ours.base.encode(TEXT)) == TEXT == theirs.decode(theirs(TEXT)["input_ids"], True).strip()
    source = theirs(TEXT.replace("birds sang", theirs.mask_token), return_tensors="pt").input_ids
    assert (source == theirs.mask_token_id).sum() == 1
    target = torch.tensor([[2, *theirs(TEXT)["input_ids"][:-1]]])
    with torch.no_grad():
        logits = model(source, None, target) @ model.head_weight.t()
        torch.testing.assert_close(logits, peer(input_ids=source, decoder_input_ids=target).logits)  # fp32 defaults
    more = (
        "--preset none --steps 1 --batch 4 --min-words 20 --max-source 96 --max-target 48 --max-new-tokens 4 --beams 1"
    )
    line = f"--model {out} --data {sums} --cache {tmp_path / 'cache'} --test-examples 2 --device cpu {more}"
    assert finetune_seq2seq.main([*line.split(), "--out", str(tmp_path / "tuned")]) == 0
    refused(capsys, "is not an empty folder", lambda: tiny_bart.main([str(out), *flags]), out)


def test_a_stopped_run_resumes_exactly(flags, tmp_path, monkeypatch, capsys):
    """In the second epoch of blocks, whose noise is another."""
    flags = [*flags, "--batch", "48"]
    assert tiny_bart.main([str(tmp_path / "whole"), *flags]) == 0
    original, epochs = Denoised.at, []

    def stop(self, places, epoch):
        if len(places) == 48 and sys._getframe(1).f_code.co_name == "main":
            epochs.append(epoch)
            if len(epochs) == 5:
                os.kill(os.getpid(), signal.SIGTERM)
        return original(self, places, epoch)

    monkeypatch.setattr(Denoised, "at", stop)
    assert tiny_bart.main([str(tmp_path / "bart"), *flags]) == 143
    assert not (tmp_path / "bart").exists() and "--resume" in capsys.readouterr().out
    assert tiny_bart.main([str(tmp_path / "bart"), *flags, "--resume"]) == 0
    assert epochs == sorted(epochs) and len(epochs) == 8 and epochs[4] > epochs[0]
    a, b = tmp_path / "whole-run", tmp_path / "bart-run"
    assert rows(a, "train") == rows(b, "train") and rows(a, "val") == rows(b, "val")
    assert all(torch.equal(one, weights(b)[name]) for name, one in weights(a).items())
    whole, parts = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "bart"))
    assert whole == parts


def test_what_stops_it_is_one_line(flags, tmp_path, capsys):
    def stopped(match, *more):
        refused(capsys, match, lambda: tiny_bart.main([str(tmp_path / "out"), *flags, *more]), tmp_path / "out-run")
        assert not (tmp_path / "out").exists()

    stopped("--vocab 100: expected at least 260", "--vocab", "100")
    stopped("unknown data", "--data", str(tmp_path / "nothing"))
    stopped("no run in", "--resume")


def test_a_signal_reaches_the_script_once(tmp_path, monkeypatch):
    """The code of a script that counts them, as shells say it; one that a signal kills has one too."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal, sys, time\n"
        "if sys.argv[1] == 'killed': os.kill(os.getpid(), signal.SIGKILL)\n"
        "got = []\n"
        "signal.signal(signal.SIGINT, lambda *_: got.append(1))\n"
        "os.kill(os.getppid(), signal.SIGINT)\n"
        "time.sleep(0.3)\n"
        "sys.exit(40 + len(got))\n"
    )
    monkeypatch.setattr(tiny_bart, "SCRIPT", script)
    assert tiny_bart.run_script(["counts"]) == 41
    assert tiny_bart.run_script(["killed"]) == 137
