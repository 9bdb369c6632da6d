"""Outputs of a model: any text is searched for answers and programs in time, without an error."""

from fractions import Fraction

import pytest
from fuzz import many_texts, timely

from eval.extraction import MAX_NESTING, TEXT_RULES, programs_of, read_latex

ANSWERS = (
    r"#### $ , . - − 1 5 1/ /2 e3 \boxed{ \boxed \fbox{ \text{ \frac{ \frac \dfrac12 { } \{ \} ^ ^{ \circ \left ~ \$ ="
)
FENCES = "` ``` ```` ~ ~~~ ~~~~ python py output {python} print(5) x"


def read_as_output(text):
    for extract, read in TEXT_RULES.values():
        value = timely(read, timely(extract, text))
        assert value is None or isinstance(value, Fraction)
    value = timely(read_latex, text)
    assert value is None or isinstance(value, Fraction)
    found = timely(programs_of, text)
    assert found and all(isinstance(program, str) for program in found)


def test_any_output_is_read():
    many_texts(read_as_output, ANSWERS, FENCES)


@pytest.mark.parametrize(
    "text", ["```py\n" + "`" * 15000 + "x", "~" * 3000 + "`", "```py\n" + "```x" * 4000, "```" + " " * 15000 + "`"]
)
def test_fences_are_read_once(text):
    assert timely(programs_of, text)


def test_boxes_and_braces_are_read_once():
    extract, read = TEXT_RULES["boxed"]
    assert timely(extract, r"\boxed{" * 2500) is None
    assert timely(extract, r"\boxed{1}" + r"\boxed{" * 2500 + "2}" * 3).endswith("2")
    assert timely(read, r"\text{" * (MAX_NESTING - 1) + "5" + "}" * (MAX_NESTING - 1)) == 5
    assert timely(read, r"\text{" * 2000 + "5" + "}" * 2000) is None
    assert timely(read, "5^" + " " * 15000) is None
