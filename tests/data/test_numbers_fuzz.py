"""Numbers, annotations and solutions that a model wrote: any text is read in time, without an error."""

from fractions import Fraction

import pytest
from fuzz import many_texts, timely

from data.numbers import last_number, parse_number, plain, same_number
from data.programs import MAX_BITS, Problem, to_program, work_out
from data.prompts import calculate

NUMBERS = "- + − $ € , . _ / % ° 1 55 1.5 .5 e5 E-3 ( [ ) ] dollars nan ="
ANNOTATIONS = "<< >> <<2+3=5>> 2+3=5 (1+2)=3 = + - * / // ** x % ( ) [ { 1 9 64 2.5 .5 1,000 cows $ #### -(-( 9**64 1e"
CALCULATIONS = {  # each was an error or had no end
    "a tower": "9" + "**64" * 20,
    "a tower in brackets": "(" * 20 + "9" + "**64)" * 20,
    "a long sum": "1+" * 1999 + "1",
    "signs": "-" * 3000 + "1",
    "brackets": "(" * 3000 + "1" + ")" * 3000,
    "factors": "1 " * 20000,
    "percents": "1" + "%" * 3000,
    "digits": "9" * 5000 + "*1",
    "no float": "1" + "0" * 400 + ".5",
    "a large exponent": "2**9999999999",
}


def read_as_number_and_as_solution(text):
    for parser in (parse_number, last_number):
        value = timely(parser, text)
        assert (
            value is None or isinstance(value, Fraction) and timely(plain, value) and timely(same_number, value, value)
        )
    value = timely(work_out, text)
    assert value is None or max(value.numerator.bit_length(), value.denominator.bit_length()) <= MAX_BITS
    for written in (text, f"It is <<{text}="):
        result = timely(calculate, written)
        assert result == "" or result.endswith(">>") and len(result) < 30
    made = timely(to_program, Problem("train/0", f"There are {text} of them.", f"{text}\n#### 5", "5"))
    assert bool(made.program) != bool(made.reason)


def test_any_text_is_read():
    many_texts(read_as_number_and_as_solution, NUMBERS, ANNOTATIONS)


@pytest.mark.parametrize("text", ["-" + " " * 1000, "-" + " " * 1000 + "x", "5" + " " * 5000 + "=", "$ " * 5000])
def test_blanks_are_read_once(text):
    assert timely(parse_number, text) is None


def test_numbers_beyond_floats_are_compared():
    assert same_number(Fraction(10**400 + 1), Fraction(10**400)) and not same_number(Fraction(1), Fraction(10**400))
    made = to_program(Problem("train/0", "", "2+3=5" + "64" * 300 + "\n#### 5", "5"))
    assert made.reason.startswith("no step")


def test_a_value_of_thousands_of_decimals_is_written_as_a_fraction():
    assert plain(Fraction(1, 2**5000)) == f"1/{2**5000}"


@pytest.mark.parametrize("expression", CALCULATIONS.values(), ids=CALCULATIONS)
def test_a_calculation_without_end_is_none(expression):
    assert timely(work_out, expression) is None
    assert timely(calculate, f"So <<{expression}=") == ""


def test_a_solution_without_end_is_refused():
    def reason(answer: str) -> str:
        return timely(to_program, Problem("train/0", "", answer, "8")).reason

    assert reason("1+" + "(" * 5000 + "\n#### 8").startswith("no step in a sentence of more than 1000")
    assert reason("<<2+3=5>>\n" * 150 + "#### 8") == "more than 30 calculations"
    assert reason(f"<<{'1+' * 300}1=301>>\n#### 8") == "an annotation has more than 100 characters"
    assert reason("1+" + "(" * 900 + "\n#### 8").startswith("no step: ")
