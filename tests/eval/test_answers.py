"""write_answers hands the calculator and the stop strings to decoding."""

import torch

from data.prompts import Prompter
from model.decode import Finished
from runtime.machine import World


def test_the_calculator_and_the_stop_strings_reach_decoding(model, problems, tmp_path, monkeypatch):
    """What generate hands to decode, in tokens: an open annotation is worked out, text after a stop string cut off."""
    import eval.answers
    from data.gsm8k import load_gsm8k

    prompter = Prompter(str(model), "plain", "text")
    text = "Ann has 26+10 = <<26+10=36>>36 coins.\n#### 36\nQuestion: Ben has"

    def scripted(qwen, wanted, rows, *, eos_ids, stop, insert):
        assert wanted[0].temperature == 0 and prompter.decode(wanted[0].prompt).endswith("\nAnswer:")
        opened = prompter.encode("Ann has 26+10 = <<26+10=")
        assert prompter.decode(insert(opened)) == "36>>" and insert(prompter.encode("26+10 =")) == []
        assert stop(prompter.encode(text[:-8])) and not stop(prompter.encode(text[:-20]))
        yield [Finished(0, prompter.encode(text), "stop")]

    monkeypatch.setattr(eval.answers, "decode", scripted)
    made = eval.answers.write_answers(
        None,
        load_gsm8k(problems, "test")[:1],
        prompter,
        tmp_path,
        World(0, 1, torch.device("cpu")),
        max_new_tokens=60,
        batch=1,
        stop=["Question:"],
        calculator=True,
    )
    assert made.rows[0]["output"] == "Ann has 26+10 = <<26+10=36>>36 coins.\n#### 36" and made.reused == 0
