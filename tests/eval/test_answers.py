"""write_answers hands the calculator and the stop strings to decoding."""

import json
import time

import pytest
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


def test_the_eos_that_the_model_chose_is_kept_and_scoring_is_no_generation(model, problems, tmp_path, monkeypatch):
    """Of two EOS the second ends the answer: its probability is the confidence's. A row of a run from before, which has
    no tokens, is made again. The seconds of generation do not hold those of the confidence."""
    import eval.answers
    from data.gsm8k import load_gsm8k

    prompter, scored = Prompter(str(model), "plain", "text"), []
    prompter.eos_ids = [prompter.end, prompter.end + 1]

    def slow(model, rows, *_):
        scored.extend(dict(row) for row in rows)
        time.sleep(0.3)
        return [{"sequence": 0.5, "token": 0.5}]

    def scripted(*_, **__):
        yield [Finished(0, prompter.encode("#### 5"), "eos", prompter.eos_ids[1])]

    monkeypatch.setattr(eval.answers, "sure", slow)
    monkeypatch.setattr(eval.answers, "decode", scripted)
    some, how = load_gsm8k(problems, "test")[:1], dict(max_new_tokens=60, batch=1, format="text", k=(1,))
    row = {"id": some[0].id, "sample": 0, "output": "5", "ended": "eos"}
    (tmp_path / "answers.0.part").write_text(json.dumps(row) + "\n")
    found = eval.answers.examine(None, some, prompter, tmp_path, World(0, 1, torch.device("cpu")), **how)
    assert scored[0]["output"] == "#### 5" and found["outputs_reused"] == 0
    assert found["generate_seconds"] < 0.3 < found["eval_seconds"]
    assert scored[0]["tokens"] == [*prompter.encode("#### 5"), prompter.eos_ids[1]]


def test_confidence_is_the_probability_of_the_answers_tokens(model, problems):
    """Of answers of several lengths in packed rows: the product of each token's probability, one forward an answer."""
    from data.gsm8k import load_gsm8k
    from eval.answers import sure
    from model.decoder_hub import load_decoder

    prompter, qwen = Prompter(str(model), "plain", "text"), load_decoder(model).eval()
    some = load_gsm8k(problems, "test")[:4]
    texts = ["Ann has 36.\n#### 36", "5", "It is 7 coins, and more. " * 10, ""]
    ends = [
        [prompter.end],
        [prompter.end],
        [],
        [max(prompter.eos_ids) + 1],
    ]  # the third was cut, the last is another EOS
    answers = [prompter.encode(text) + end for text, end in zip(texts, ends, strict=True)]
    rows = [{"id": p.id, "tokens": tokens} for p, tokens in zip(some, answers, strict=True)]
    found = sure(qwen, rows, some, prompter, World(0, 1, torch.device("cpu")), batch=2)
    for p, row, likely in zip(some, rows, found, strict=True):
        prompt, answer = prompter.prompt(p), row["tokens"]
        tokens = torch.tensor([prompt + answer])
        with torch.no_grad():
            logits = qwen(tokens)[0] @ qwen.head_weight.t()
        log_p = logits.log_softmax(1)[range(len(prompt) - 1, tokens.shape[1] - 1), answer].double().sum()
        # fp32 over some 10 tokens, in a forward of other rows.
        assert likely["sequence"] == pytest.approx(log_p.exp().item(), rel=1e-3)
        assert likely["token"] == pytest.approx((log_p / len(answer)).exp().item(), rel=1e-4)


def test_agreement_is_of_values():
    from eval.answers import agreement

    def verdict(name: str, sample: int, answer: str | None, rule: str = "strict") -> dict:
        return {"id": name, "sample": sample, "answers": {rule: answer}}

    drawn = ["18.00", "18", "17", None]
    verdicts = [verdict("test/0", 0, "18"), *(verdict("test/0", i, a) for i, a in enumerate(drawn, 1))]
    verdicts += [verdict("test/1", 0, None), verdict("test/1", 1, None)]
    assert agreement(verdicts, "strict") == {"test/0": {"agreement": 0.5}, "test/1": {"agreement": 0.0}}
    assert agreement([verdict("test/0", 0, "18")], "strict") == {}
    programs = [verdict("test/0", 0, "(7, 2)", "code"), verdict("test/0", 1, "7", "code")]
    assert agreement(programs, "code") == {"test/0": {"agreement": 1.0}}


def test_the_last_line_has_the_interval_of_pass_at_1():
    """0 of 96 is not 0 for certain; of one problem there is no interval."""
    import eval.answers
    from data.gsm8k import Problem

    summary = {"test_nll": None, "temperature": None, "tokens_per_second": 10.0, "generated_tokens_per_second": 20.0}
    for n, says in (
        (96, "strict 0.00 % [0.00, 3.85], flexible 0.00 % [0.00, 3.85] on 96"),
        (1, "flexible 0.00 % on 1"),
    ):
        problems = [Problem(f"test/{i}", "", "", "1") for i in range(n)]
        rows = [{"id": p.id, "sample": 0, "output": "#### 2"} for p in problems]
        entries, _ = eval.answers.grade(rows, problems, "text", (1,))
        assert n > 1 or entries["pass_at_1_strict_ci95"] == [None, None]
        assert says in eval.answers.describe("run", summary | entries | {"eval_problems": n})
