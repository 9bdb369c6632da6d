"""Numbers in text: what GSM8K's answers, outputs and annotations hold, as exact fractions."""

import re
from fractions import Fraction

TOLERANCE = 1e-6  # relative above 1, absolute below: a program's rounding, far under what a wrong answer misses by
MAX_DIGITS = 1000  # a number with more is no answer, and Python refuses to read one of more than 4300
_CURRENCY = "$€£¥₹"
# Blanks and digits are taken whole (*+), never given back and tried again: the text may be a model's, of any length.
_AMOUNT = re.compile(
    rf"(?P<sign>[-+−]?)\s*+(?:[{_CURRENCY}]\s*+)?(?P<inner>[-+−]?)\s*+"
    r"(?P<number>(?:\d[\d,_]*+(?:\.\d*+)?|\.\d++)(?:[eE][-+]?\d{1,3})?)(?:\s*+/\s*+(?P<below>\d[\d,]*+))?"
    rf"\s*+(?:[{_CURRENCY}%°]\s*+)?(?P<unit>[^\W\d_][^\d=+*/<>]*+)?"
)
_NUMBER = re.compile(r"[-−]?\d[\d,_]*(?:\.\d+)?(?:[eE][-+]?\d{1,3})?|[-−]?\.\d+(?:[eE][-+]?\d{1,3})?")
# A tuple or list as Python prints it, with a number in the first place.
_SEQUENCE = re.compile(r"[(\[]([-+]?[\d.][\d.eE+-]*),(?: [^()\[\]]*)?[)\]]")


def parse_number(text: str | None) -> Fraction | None:
    """The value of text that is one number: sign, currency, commas, decimals, a/b, exponent, percent and unit allowed,
    and 1_200.

    A percentage has the value of its digits (45% is 45), as in GSM8K's answers. None for anything else, not-a-number
    and infinity included."""
    match = _AMOUNT.fullmatch((text or "").strip().rstrip(".,").strip())
    if not match or (match["sign"] and match["inner"]):
        return None
    below = (match["below"] or "1").replace(",", "")
    if max(len(match["number"]), len(below)) > MAX_DIGITS or not int(below):
        return None
    value = Fraction(re.sub("[,_]", "", match["number"]).rstrip(".")) / int(below)
    return -value if (match["sign"] or match["inner"]) in ("-", "−") else value


def plain(value: Fraction) -> str:
    """A value as digits, a minus and a point alone, "1200", "-5", "0.75"; as a/b where no decimal is exact, "1/3", or
    where it would have more than 2 x MAX_DIGITS decimals."""
    numerator, denominator = value.as_integer_ratio()
    rest, counts = denominator, {2: 0, 5: 0}
    for prime in counts:
        while rest % prime == 0:
            rest, counts[prime] = rest // prime, counts[prime] + 1
    digits = max(counts.values())  # 10**digits is a multiple of the denominator
    if rest > 1 or digits > 2 * MAX_DIGITS:
        return f"{numerator}/{denominator}"
    whole, part = divmod(abs(numerator) * 10**digits // denominator, 10**digits)
    return ("-" if numerator < 0 else "") + f"{whole}.{part:0{digits}}".rstrip("0").rstrip(".")


def last_number(text: str) -> Fraction | None:
    """The last number in a program's last line, read as a whole first ("answer: 1/2" holds 2, "1/2" is 0.5).

    Of a line that is a tuple or a list, "(7, 2)", the first element counts: Program of Thoughts' rule (Chen et al.,
    2022; ``floatify_ans`` in their code). None where the line has no number, or nan or inf."""
    line = text.rstrip().rpartition("\n")[2]
    if (value := parse_number(line)) is not None:
        return value
    if several := _SEQUENCE.fullmatch(line.strip()):
        return parse_number(several[1])
    found = _NUMBER.findall(line)
    return parse_number(found[-1]) if found else None


def same_number(a: Fraction | float, b: Fraction | float) -> bool:
    """Equal to TOLERANCE, relative to ``b`` where that is above 1. Exact: a Fraction may be too large for a float."""
    return abs(a - b) <= Fraction(TOLERANCE) * max(1, abs(b))
