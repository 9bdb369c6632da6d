"""Numbers in text: what is one, its value, the last of a program's output, and when two are the same."""

from fractions import Fraction

import pytest

from data.numbers import last_number, parse_number, plain, same_number


@pytest.mark.parametrize(
    "text, value",
    [
        ("18", 18),
        (" 18. ", 18),
        ("1,234,567", 1234567),
        ("-3", -3),
        ("−3", -3),
        ("+3", 3),
        ("$1,200.50", 1200.5),
        ("-$5", -5),
        ("$-5", -5),
        ("€ 7", 7),
        ("7€", 7),
        ("45%", 45),
        ("45 %", 45),
        ("18 dollars", 18),
        ("12.5 km per hour", 12.5),
        ("3/4", 0.75),
        (".5", 0.5),
        ("5.", 5),
        ("1e3", 1000),
        ("007", 7),
        ("0.0", 0),
        ("1_200", 1200),
        ("6/1,000", 0.006),
    ],
)
def test_numbers(text, value):
    assert parse_number(text) == Fraction(str(value))


@pytest.mark.parametrize("text", [None, "", "...", "$", "nan", "inf", "1/0", "--3", "-$-3", "five", "5 = 5", "(7, 2)"])
def test_no_numbers(text):
    assert parse_number(text) is None


@pytest.mark.parametrize(
    "stdout, value",
    [("1\n2\n", 2), ("answer: $1,200.", 1200), ("1/2", 0.5), ("-7.0\n\n", -7), ("5\nnone", None), ("nan", None)]
    + [("18.", 18), ("18.0", 18), ("1_200", 1200), ("18 dollars", 18), ("in all 1_200 of them", 1200), ("45%", 45)]
    + [("", None), ("30.000000000000004", 30), ("x = -3", -3), ("1e+16", 1e16)]
    + [("(7, 2)", 7), ("[3.5, 'a']", 3.5), ("(7,)", 7), ("[7]", 7), ("(a, 5)", 5), ("(12 + 3) = [15]", 15)],
)
def test_last_number(stdout, value):
    found = last_number(stdout)
    assert found is None if value is None else same_number(found, Fraction(value))


@pytest.mark.parametrize(
    "value, text", [("1200", "1200"), ("-5", "-5"), ("3/4", "0.75"), ("-1/1024", "-0.0009765625"), ("2/3", "2/3")]
)
def test_a_value_in_digits(value, text):
    assert plain(Fraction(value)) == text and parse_number(text) == Fraction(value)


def test_tolerance_is_for_rounding_only():
    assert same_number(Fraction("0.30000000000000004"), Fraction("0.3"))
    assert same_number(Fraction("999999.9999999999"), Fraction(10**6))
    assert not same_number(Fraction("33.33"), Fraction("33.34"))
    assert not same_number(Fraction("0.001"), Fraction(0))
    assert not same_number(Fraction("33.3"), Fraction(100, 3))


def test_an_endless_number_is_no_answer():
    problem = "1" + "7" * 5000
    assert parse_number(problem) is None and last_number(f"so {problem}") is None
    assert parse_number("1/" + problem) is None
