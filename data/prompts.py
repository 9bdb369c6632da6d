"""GSM8K's problems as prompts and answers in tokens, with the tokenizer of the model's folder.

The prompt of an example has the tokens that it has in decoding: prompt and answer are encoded apart and joined.
"""

import hashlib
import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path

from data import numbers, programs
from data.chat import ChatTemplate, template_of
from data.files import write_cached
from data.gsm8k import FORMATS, text_target
from data.packing import Example
from data.programs import Problem, code_targets, coverage_table
from data.tokenizer import Definition
from model.decoder_hub import config_and_tokenizer
from sandbox.run import probe
from schedules.textlines import read_bytes, read_json

PROMPTS = ("chat", "plain", "eight-shot")
SHOTS = 8
# Qwen's turns, for a model without a template; what its models that can think get, so that they do not.
TURNS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
THOUGHT = "{% if add_generation_prompt %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
# What follows the question, by whether it is a chat and by what is asked for.
_ASK = {
    (True, "text"): "\nReason step by step and end with a line '#### NUMBER'.",
    (True, "code"): "\nWrite a Python program that prints the answer.",
    (False, "text"): "\nAnswer:",
    (False, "code"): "\nProgram:",
}

TOO_LARGE = 10**15  # a result that a calculator does not write out

log = logging.getLogger("scorecast")


class Prompter:
    """Text to tokens and back. ``end`` is the token that ends an answer, ``eos_ids`` are all that do in decoding.

    ``model`` is a folder, a hub id or a GGUF file. ``prompt`` "chat" is the model's own chat template, without a
    thought where it asks whether to think; for a model without a template Qwen's turns, with Qwen3's empty thought
    where the tokenizer knows it. "plain" is "Question: ... Answer: ...", as lm-evaluation-harness has it; "eight-shot"
    has the solved problems of ``show`` in front, with a blank line between. ``format`` is "text" or "code". Raises
    ValueError for a tokenizer that is missing, broken, larger than the head, or without the tokens that the format
    needs, and for a template that is broken."""

    def __init__(self, model: str, prompt: str = "chat", format: str = "text"):
        if prompt not in PROMPTS or format not in FORMATS:
            expected = f"expected one of {', '.join(PROMPTS)}, and of {', '.join(FORMATS)}"
            raise ValueError(f"prompt {prompt!r} and format {format!r}: {expected}")
        config, files = config_and_tokenizer(model)
        if "tokenizer.json" not in files:
            raise ValueError(f"{model} has no tokenizer.json; copy the model's there")
        self.definition = Definition(files["tokenizer.json"], model)
        self.tokenizer = self.definition.backend
        if self.definition.size > config.vocab_size:
            sizes = f"has {self.definition.size} tokens, the model only {config.vocab_size}"
            raise ValueError(f"{model}: tokenizer.json {sizes}; copy the model's own")
        eos = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        eos = [i for i in eos if i is not None]
        self.chat, self.shots, self.positions = prompt == "chat", prompt == "eight-shot", config.max_position_embeddings
        self.ask, self.shown = _ASK[self.chat, format], []
        self.special = self.definition.added
        # Longest first, as one may begin another.
        self.specials = re.compile("|".join(map(re.escape, sorted(self.special, key=len, reverse=True))) or r"(?!)")
        self.template = template_of(files, model) if self.chat else None
        if self.chat and self.template is None:
            if not {"<|im_start|>", "<|im_end|>"} <= set(self.special):
                what = "no chat template, and no tokens <|im_start|> and <|im_end|>"
                raise ValueError(f"{model} has {what} for --prompt chat; use --prompt plain")
            log.info(f"{model} has no chat template: --prompt chat writes the turns of Qwen's")
            thinks = {"<think>", "</think>"} <= set(self.special)
            self.template = ChatTemplate(TURNS + (THOUGHT if thinks else ""), {}, model)
        if not self.chat and not eos:
            raise ValueError(f"{model} names no eos_token_id, which ends an answer of --prompt plain; add it")
        self.end = self._end_of_turn(eos, model) if self.chat else eos[0]
        self.eos_ids = sorted({self.end, *eos})

    def encode(self, text: str) -> list[int]:
        """The tokens of a text. Special tokens that are written in it are characters like any others."""
        return self.definition.encode([text])[0]

    def _end_of_turn(self, eos: list[int], model: str) -> int:
        """The token that the template writes after an answer: the first special one. Without one the model's
        eos_token_id, which is said."""
        talk = [dict(role="user", content="Q"), dict(role="assistant", content="A")]
        (text, written), *_ = reversed(self.template.pieces(talk, answer_next=False))
        text = "" if written else text
        if found := self.specials.search(text):
            return self.special[found[0]]
        if not eos:
            raise ValueError(f"{model}: its chat template ends no answer, and it names no eos_token_id; add it")
        end = self.tokenizer.id_to_token(eos[0])
        log.info(f"{model}: its chat template ends an answer with {text!r}, no special token; {end!r} ends it here")
        return eos[0]

    def _of_pieces(self, pieces: list[tuple[str, bool]]) -> list[int]:
        """Special tokens where the template wrote them; what lies between is encoded as one text, as a model saw it."""
        ids, text = [], ""
        for piece, written in pieces:
            at = 0
            for found in () if written else self.specials.finditer(piece):
                ids += [*self.encode(text + piece[at : found.start()]), self.special[found[0]]]
                text, at = "", found.end()
            text += piece[at:]
        return ids + self.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self.definition.decode(ids, special=False)

    def show(self, problems: Sequence[Problem], targets: dict[str, str]) -> None:
        """Sets what "eight-shot" shows: the first of the training ``problems`` that have a target, id -> text. One more
        than eight, because a problem is not shown to itself. Does nothing for the other formats. Raises ValueError for
        fewer than nine."""
        if self.shots:
            solved = [(p.id, f"{self._asked(p)} {targets[p.id]}") for p in problems if p.id in targets]
            if len(solved) <= SHOTS:
                few = f"{len(solved)} of the training problems have a target"
                raise ValueError(f"--prompt eight-shot needs {SHOTS + 1} of them, and {few}; use --prompt plain")
            self.shown = solved[: SHOTS + 1]

    def _asked(self, problem: Problem) -> str:
        return f"Question: {problem.question.strip()}{self.ask}"

    def prompt(self, problem: Problem) -> list[int]:
        question = problem.question.strip()
        if not self.chat:
            shown = [text for name, text in self.shown if name != problem.id][:SHOTS]
            return self.encode("\n\n".join([*shown, self._asked(problem)]))
        ask = [dict(role="user", content=question + self.ask)]
        return self._of_pieces(self.template.pieces(ask, answer_next=True))

    def example(self, problem: Problem, target: str) -> Example:
        prompt = self.prompt(problem)
        answer = self.encode(target if self.chat else " " + target)
        return Example(problem.id, [*prompt, *answer, self.end], len(prompt))


def make_targets(
    problems: list[Problem], format: str, *, annotations: bool = True, cache="cache", progress: bool = False
) -> dict[str, str]:
    """id -> the text to train on; a problem without one is left out, and the coverage is logged. Programs are kept in a
    file under ``cache`` whose name changes with the problems and with the code that makes programs. Raises ValueError
    where programs cannot be run."""
    if format == "text":
        return {p.id: text_target(p, annotations=annotations) for p in problems}
    probe()  # kept programs need no sandbox, answers will
    key = hashlib.sha256(b"".join(read_bytes(module.__file__) for module in (programs, numbers)))
    for p in problems:
        key.update(f"{p.id}\0{p.question}\0{p.answer_text}\0".encode())
    path = Path(cache) / f"gsm8k-programs-{key.hexdigest()[:16]}.json"
    if not path.is_file():
        made = dict(zip(("programs", "refused"), code_targets(problems, progress=progress), strict=True))
        write_cached(path, lambda file: file.write((json.dumps(made, indent=1) + "\n").encode()))
    held = read_json(path, dict, advice="delete it, it is made again")
    log.info(coverage_table(len(problems), held["refused"]))
    return held["programs"]


def make_examples(
    problems: list[Problem], targets: dict[str, str], prompter: Prompter, seq_len: int, name: str, needed: bool = True
) -> list[Example]:
    """Examples that fit ``seq_len``. Longer ones are left out whole, because a truncated answer teaches to stop early,
    and their number is logged. Raises ValueError where none is left and some are ``needed``."""
    made = [prompter.example(p, targets[p.id]) for p in problems if p.id in targets]
    losses = [prompter.definition.lost(p.question + targets[p.id]) for p in problems if p.id in targets]
    if any(map(any, losses)):
        unknown, lost = map(sum, zip(*losses, strict=True))
        what = f"{unknown:,} tokens are unknown ones, {lost:,} characters lost"
        log.warning(f"{name}: {what}: the tokenizer has none for them, and the model reads other texts")
    fits = [e for e in made if e.length <= seq_len]
    full = sum(e.prompt >= seq_len for e in made)
    if needed and not fits:
        least = min((e.length for e in made), default=0)
        why = f"none of the {len(made)} {name} problems fits, {full} by their prompt alone, which leaves no room for an"
        raise ValueError(f"--seq-len {seq_len}: {why} answer; the shortest takes {least} tokens")
    if len(fits) < len(made):
        longer = f"{len(made) - len(fits)} of {len(made)} problems are longer than --seq-len {seq_len}"
        log.info(f"{name}: {longer}, left out, {full} of them by their prompt alone")
    return fits


def calculate(text: str) -> str:
    """What a calculator adds to ``text`` that ends in an open annotation, ``... <<48/2=``: the result and ``>>``.

    As in the GSM8K paper's decoding (Cobbe et al., 2021, section 2), whose calculator rounds to 4 decimals. Empty for
    any other text, and where the expression is no arithmetic: the model then goes on by itself."""
    found = re.search(r"<<([^<>=]+)=$", text)
    value = programs.work_out(found[1]) if found else None
    if value is None or abs(value) >= TOO_LARGE:
        return ""
    return (str(int(value)) if value.denominator == 1 else f"{float(value):.4f}".rstrip("0").rstrip(".")) + ">>"
