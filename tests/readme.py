"""README's examples and commands, for the tests that run them."""

import re
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text()


def python_examples() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, re.S)
