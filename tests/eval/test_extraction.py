"""The rules' table in the head of eval.extraction holds, and fences are found as people and models write them."""

import itertools
import re
from fractions import Fraction

import pytest

from eval import extraction
from eval.extraction import TEXT_RULES, extract_boxed, extract_flexible, extract_strict, programs_of, read_latex

FENCE = "```"


def values(output: str) -> list[Fraction | None]:
    return [read(extract(output)) for extract, read in TEXT_RULES.values()]


def documented() -> list[tuple]:
    """(output, values) of each line of the table."""
    lines = re.findall(r"^    (\S.*?) {2,}(\S+) +(\S+) +(\S+)(?:  .*)?$", extraction.__doc__, re.MULTILINE)
    return [(output, [None if v == "-" else Fraction(v) for v in found]) for output, *found in lines[1:]]


@pytest.mark.parametrize("output, found", documented(), ids=[output for output, _ in documented()])
def test_the_table_is_true(output, found):
    assert values(output) == found


def test_the_table_names_the_forms():
    assert {"#### 2/3", "#### $18", "#### **8**", "####55", "#### 1,200.", "#### −5", "#### 45%"} <= {
        output for output, _ in documented()
    }


@pytest.mark.parametrize(
    "output, strict, flexible",
    [
        ("#### -1,234.50", "-1,234.50", "-1,234.50"),
        ("#### 5\nQuestion: 3?\n#### 7", "5", "7"),  # strict takes the first, flexible the last
        ("The answer is 18.", None, "18."),
        ("it costs $1,200.00 a day", None, "$1,200.00"),
        ("from 3 to 5", None, "5"),
        ("it is $5, or 5,000, $7", None, "$7"),
        ("none", None, None),
        ("", None, None),
    ],
)
def test_what_is_extracted(output, strict, flexible):
    assert (extract_strict(output), extract_flexible(output)) == (strict, flexible)


@pytest.mark.parametrize("text", ["$$", "$.", "$", ".", ",", "-", "−", "...", "#### $", "#### -", "#### .", "-$", "%"])
def test_a_sign_is_no_number(text):
    assert values(text) == [None, None, None]
    assert values(f"#### 7\n{text}") == [7, 7, None]  # nor does it hide one


def test_extraction_matches_the_harness():
    """Against the harness' own patterns, as its task publishes them, wherever its match holds a digit and nothing of
    a fraction or an exponent follows: the same text."""
    strict, flexible = re.compile(r"#### (\-?[0-9\.\,]+)"), re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
    numbers = ["5", "-1,000.5", "$18", "18 $", "$$7$$", "-$3.", "12-5", "a", "5,"]
    tried = 0
    for parts in itertools.product(["", "#### ", "$ ", "of 3, "], numbers, ["", ".", " 7", "\n#### 8", " cats."]):
        text = "".join(parts)
        if found := strict.search(text):
            assert extract_strict(text) == found[1], text
        if (last := [*flexible.finditer(text)]) and re.search(r"\d", last[-1][0]):
            assert extract_flexible(text) == last[-1][0], text
            tried += 1
    assert tried > 150


@pytest.mark.parametrize(
    "inside, value",
    [
        ("18", 18),
        (r"1{,}200", 1200),
        (r"1,200", 1200),
        (r"10\,000", 10000),
        (r"\$1,200.50", 1200.5),
        (r"\frac{3}{4}", 0.75),
        (r"\dfrac{1,200}{5}", 240),
        (r"\tfrac12", 0.5),
        (r"-\frac{1}{2}", -0.5),
        (r"\frac{-1}{2}", -0.5),
        (r"2\frac{1}{2}", 2.5),
        (r"\frac{\text{3}}{4}", 0.75),
        (r"18\text{ dollars}", 18),
        (r"\text{\$18 per day}", 18),
        (r"\mathbf{18}", 18),
        (r"x = 18", 18),
        (r"18^\circ", 18),
        (r"18^{\circ}", 18),
        (r"45\%", 45),
        (r"−7", -7),
        (r"\left(5\right)", None),
        (r"\sqrt{5}", None),
        (r"\frac{1}{0}", None),
        (r"5, 7", None),
        (r"\text{five}", None),
        ("", None),
    ],
)
def test_latex(inside, value):
    output = rf"It is 3. So \boxed{{{inside}}} is the answer to \frac{{1}}{{9}}."
    found = read_latex(extract_boxed(output))
    assert found == (None if value is None else Fraction(str(value)))


def test_the_last_box_that_closes_counts():
    assert extract_boxed(r"\boxed{1} and \boxed {\frac{2}{3}}") == r"\frac{2}{3}"
    assert extract_boxed(r"\boxed{1} and \boxed{2") == "1"  # cut off
    assert extract_boxed(r"\boxed{\{3\}} set") == r"\{3\}"
    assert extract_boxed("boxed{5}") is None


@pytest.mark.parametrize(
    "output, programs",
    [
        ("print(5)", ["print(5)"]),
        (
            f"So:\n{FENCE}python\nprint(5)\n{FENCE}\nbetter:\n{FENCE}py\nprint(6)\n{FENCE}\nDone",
            ["print(5)", "print(6)"],
        ),
        (f"So:\r\n{FENCE}python\r\nprint(5)\r\n{FENCE}\r\nDone", ["print(5)"]),
        (f"{FENCE}python\r\nprint(5)\r\n{FENCE}\r\n{FENCE}output\r\n5\r\n{FENCE}\r\n", ["print(5)"]),
        (f"{FENCE}\nprint(7)", ["print(7)"]),  # cut off before its end
        (f"{FENCE}python\nprint(7){FENCE}", ["print(7)"]),  # closed on the last line of code
        (f"{FENCE}python\nprint(7)\n{FENCE}", ["print(7)"]),
        ("~~~python\nprint(5)\n~~~\n", ["print(5)"]),
        (f"~~~\nprint(5)\n{FENCE}\n~~~\n", [f"print(5)\n{FENCE}"]),  # another sign does not close it
        (f"`{FENCE}py\na = '''\n{FENCE}\n'''\n`{FENCE}\n", [f"a = '''\n{FENCE}\n'''"]),  # nor fewer of the same
        (f"1. So\n   {FENCE}python\n   if 1:\n       print(5)\n   {FENCE}\n", ["if 1:\n    print(5)"]),
        (f"{FENCE} Python3.11 title=a.py\nprint(5)\n{FENCE}", ["print(5)"]),
        (f"{FENCE}{{python}}\nprint(5)\n{FENCE}", ["print(5)"]),
        (f"So\n{FENCE}output\n42\n{FENCE}\n{FENCE}\nprint(5)\n{FENCE}\n", ["print(5)"]),
        (f"{FENCE}output\n42\n{FENCE}\n", [f"{FENCE}output\n42\n{FENCE}\n"]),
        (f"print('{FENCE}')", [f"print('{FENCE}')"]),
    ],
    ids=itertools.count(),
)
def test_programs_of_an_output(output, programs):
    found = programs_of(output)
    assert found == programs or found == [f"{code}\n" for code in programs]


def test_what_a_model_repeats_without_end_is_read_at_once():
    """A quadratic pattern would take minutes over these."""
    for text in ("." * 300_000 + "x5", "$" * 300_000, "#### " + "," * 300_000, "-" * 300_000):
        extract_strict(text), extract_flexible(text)
