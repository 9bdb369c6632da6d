"""Prompts and answers have their format in tokens, and the calculator works out open annotations."""

import pytest

from data.prompts import Prompter, calculate


@pytest.mark.parametrize(
    "text, result",
    [
        ("so 48/2 = <<48/2=", "24>>"),
        ("<<48/2=24>> and <<3*4.5=", "13.5>>"),
        ("<<10/3=", "3.3333>>"),
        ("<<1,200*2=", "2400>>"),
        ("<<20%*50=", "10>>"),
        ("<<5-7=", "-2>>"),
        ("<<2x3=", "6>>"),
        ("48/2=", ""),
        ("<<48/2=2", ""),
        ("<<48/0=", ""),
        ("<<a*b=", ""),
        ("<<=", ""),
        ("<<9**99999=", ""),
        ("", ""),
    ],
)
def test_calculator(text, result):
    assert calculate(text) == result


@pytest.mark.parametrize("prompt", ["chat", "plain"])
def test_prompts_are_the_formats(model, prompt, problems):
    from data.gsm8k import load_gsm8k

    one = load_gsm8k(problems, "train")[0]
    prompter = Prompter(str(model), prompt, "text")
    example = prompter.example(one, "3+5 = <<3+5=8>>8\n#### 8")
    decode = lambda ids: prompter.tokenizer.decode(ids, skip_special_tokens=False)  # noqa: E731
    asked, answer = decode(example.tokens[: example.prompt]), decode(example.tokens[example.prompt :])
    if prompt == "chat":
        assert asked.startswith(f"<|im_start|>user\n{one.question}\n") and asked.count("<|im_end|>") == 1
        assert asked.endswith("<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")
        assert answer == "3+5 = <<3+5=8>>8\n#### 8<|im_end|>"
        assert prompter.eos_ids == [0, 2]
    else:
        assert asked == f"Question: {one.question}\nAnswer:"
        assert answer == " 3+5 = <<3+5=8>>8\n#### 8<|endoftext|>"
    assert example.tokens[: example.prompt] == prompter.prompt(one)
