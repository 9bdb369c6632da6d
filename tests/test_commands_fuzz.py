"""Every command: whatever words follow it, they are taken or refused in a line."""

import contextlib
import importlib
import importlib.util
import io

import pytest
from fuzz import ODD, many_words

from schedules.commandline import Parser

COMMANDS = """data.gsm8k data.lm eval.attack eval.campaign eval.gsm8k eval.method_comparison eval.preference eval.report
eval.verdicts kernels.audit kernels.bench model.export model.gpt2_hub races.carry races.device races.fot_overhead
races.nanogpt races.peft_gsm8k races.probes races.train_step races.transformers_seq2seq recipes.smollm2
recipes.tiny_qwen3 schedules""".split()
VALUES = [
    *map(str, ODD[:-2]),
    "0.1",
    "1e-3",
    "-3",
    "1_000",
    "1,000",
    "10k",
    "٣",
    "²",
    "nan",
    "--steps",
    "-x",
    "=",
    "a.csv",
]


class Parsed(Exception):
    """The words were taken; nothing is done with them here."""


def main_of(command: str):
    package = importlib.util.find_spec(command).submodule_search_locations is not None
    return importlib.import_module(f"{command}.__main__" if package else command).main


def flags_of(parser) -> list[str]:
    """All of a parser, and its sub-commands with theirs."""
    found = [name for action in parser._actions for name in action.option_strings]
    for action in parser._subparsers._group_actions if parser._subparsers else ():
        found += [word for name, part in action.choices.items() for word in (name, *flags_of(part))]
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_any_words_are_taken_or_refused_in_a_line(command, monkeypatch):
    main, parsers, parse = main_of(command), [], Parser.parse_args

    def parse_args(self, args=None, namespace=None):
        parsers.append(self)
        parse(self, args, namespace)
        raise Parsed

    monkeypatch.setattr(Parser, "parse_args", parse_args)

    def said(argv) -> tuple[int | None, str]:
        """(exit code, what is on stderr); None where the words were taken."""
        with contextlib.redirect_stderr(io.StringIO()) as heard, contextlib.redirect_stdout(io.StringIO()):
            try:
                main(argv)
            except Parsed:
                return None, heard.getvalue()
            except SystemExit as stop:
                return stop.code, heard.getvalue()
        raise AssertionError(f"{command} {argv} went on without its parser")

    said([])
    flags = flags_of(parsers[0])
    words = [*flags, *(f"{name}=3" for name in flags), *VALUES, "--", "--no-such-flag"]

    def use(argv):
        code, heard = said(argv)
        assert code in (None, 0, 2), (argv, heard)
        if code == 2:  # beside what is said where other programs hold the processor for long
            lines = [line for line in heard.splitlines() if not line.startswith("... at work for")]
            assert len(lines) == 1 and ": error: " in lines[0] and heard.endswith("\n"), (argv, heard)

    many_words(use, words)
