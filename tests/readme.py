"""README's examples and commands, for the tests that run them."""

import re
import shlex
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text()


def fenced(language: str) -> list[str]:
    """The texts between ```language and ```."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.S | re.M)
    return [text for name, text in blocks if name == language]


def python_examples() -> list[str]:
    return fenced("python")


def commands() -> list[list[str]]:
    """Every command, in its words: of fences without a language, and of inline code that begins like one."""
    lines = [line.partition("  #")[0] for text in fenced("") for line in text.splitlines()]
    prose = re.sub(r"^```.*?^```$", "", README, flags=re.S | re.M)
    lines += re.findall(r"`((?:python|torchrun|make|pip) [^`]+)`", prose)
    return [shlex.split(line) for line in lines if line.strip()]
