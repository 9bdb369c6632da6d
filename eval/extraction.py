r"""What counts as the answer in a text: the rules by which outputs for GSM8K are graded.

- strict: the first ``#### NUMBER``, lm-evaluation-harness' strict-match.
- flexible: the last number anywhere, its flexible-extract.
- boxed: the last ``\boxed{...}`` whose braces close; LaTeX's fractions, commas, units and signs are read.
- code: the last fenced block of Python that runs and prints a number (`programs_of`; `eval.gsm8k.grade_code` runs it).

Each reads a value, and the comparison is of values: 18.00 is 18. A dash: no answer, which is wrong.

    output             strict    flexible   boxed
    #### 18            18        18         -
    #### 1,200.        1200      1200       -
    #### $18           -         18         -        the pattern has no currency
    #### **8**         -         8          -        nor stars
    ####55             -         55         -        nor a missing space
    #### −5            -         -5         -        U+2212; the harness reads 5
    #### 45%           45        45         -        a percentage has the value of its digits, in every rule
    #### 2/3           2/3       2/3        -        the harness reads 2 and 3
    #### 1e3           1000      1000       -        the harness reads 1 and 3
    so 18 ...          -         18         -        a match needs a digit: not "...", "$$", "$." or a lone sign;
    it is 18 $.        -         18         -          in the harness these are answers, and wrong
    is $$1{,}200$$     -         200        -
    \boxed{1{,}200}    -         200        1200
    \boxed{\frac34}    -         34         3/4
    \boxed{5\%}        -         5          5

Where a line does not say otherwise, strict and flexible agree with the harness on the value.
"""

import re
import textwrap
from fractions import Fraction

from data.numbers import parse_number

# Task gsm8k of lm-evaluation-harness, filters strict-match and flexible-extract, but with a digit in every match, a
# minus that may be U+2212 (in flexible), and the rest of a fraction or an exponent.
_REST = r"(?:[eE][-+]?[0-9]{1,3}(?![0-9A-Za-z]))?(?:/[0-9]+(?:,[0-9]{3})*)?"
STRICT = re.compile(rf"#### (-?[.,]*[0-9][0-9.,]*{_REST})")
# A match begins with its run of signs, not within: what a model repeats without end would cost quadratic time.
FLEXIBLE = re.compile(rf"[-−]?(?<![$.,])[$.,]*+[0-9][$0-9.,]*{_REST}")
_OPEN = re.compile(r"[ \t]*+(`{3,}+|~{3,}+)[ \t]*+([^\s`]*+)[^`]*+")
_PYTHON = re.compile(r"|\{?\.?py(thon)?[0-9.]*\}?", re.IGNORECASE)  # a block's language
_NAMED = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox|boldsymbol|bm)\s*\{([^{}]*)\}")
_FRACTION = re.compile(r"\\[dtc]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))")
_NOTHING = re.compile(r"\\(?:left|right|displaystyle|[,!;: ])|\^\s*+(?:\{\s*+)?\\circ\s*+\}?|~")
MAX_NESTING = 20  # of LaTeX's braces around a number; one that is deeper is none
_MIXED = re.compile(r"([-−]?)\s*(\d+)\s+(\d+)/(\d+)")


def extract_strict(output: str) -> str | None:
    """The text of the first ``#### NUMBER``; None where there is none."""
    match = STRICT.search(output)
    return match[1] if match else None


def extract_flexible(output: str) -> str | None:
    """The last number, with the dollars, commas and full stops around it, as the harness has it. None without one."""
    found = FLEXIBLE.findall(output)
    return found[-1] if found else None


def extract_boxed(output: str) -> str | None:
    r"""What stands in the last ``\boxed{...}`` whose braces close, as it is written. None where there is none."""
    begins = {match.end() for match in re.finditer(r"\\(?:boxed|fbox)\s*\{", output)}
    opened, last = [], (0, 0)  # where what stands in the braces begins; the last box, and where it ends
    for brace in re.finditer(r"(?<!\\)[{}]", output):
        if brace[0] == "{":
            opened.append(brace.end())
        elif opened and (begin := opened.pop()) in begins:
            last = max(last, (begin, brace.start()))
    return output[slice(*last)].strip() if last[0] else None


def read_match(text: str | None) -> Fraction | None:
    """The value of what strict or flexible found. As in the harness, dollars and commas are no part of it."""
    return parse_number(text.replace("$", "").replace(",", "")) if text else None


def read_latex(text: str | None) -> Fraction | None:
    r"""The value of one number in LaTeX: ``1{,}200``, ``\frac{3}{4}``, ``2\frac12``, ``\$5``, ``18\text{ dollars}``,
    ``x = 5``. None for anything else."""
    text, before, depth = text or "", None, 0
    while text != before:  # from the inside out
        before, depth = text, depth + 1
        if depth > MAX_NESTING:
            return None
        text = _NAMED.sub(r" \1 ", text)
        text = _FRACTION.sub(lambda m: f" {m[1] or m[2] or ''}/{m[3] or m[4] or ''} ", text)
    text = _NOTHING.sub("", text.replace("{,}", ",").replace(r"\$", "$").replace(r"\%", "%"))
    text = re.sub(r"\\?[{}]", "", text).rpartition("=")[2].strip().strip("$").strip()
    if mixed := _MIXED.fullmatch(text):
        sign, *parts = mixed.groups()
        whole, part = parse_number(parts[0]), parse_number("/".join(parts[1:]))
        return None if None in (whole, part) else (-1 if sign else 1) * (whole + part)
    return parse_number(text)


# Rule -> what finds its answer in a text, and what reads the value of that.
TEXT_RULES = {
    "strict": (extract_strict, read_match),
    "flexible": (extract_flexible, read_match),
    "boxed": (extract_boxed, read_latex),
}
RULES = (*TEXT_RULES, "code")


def programs_of(output: str) -> list[str]:
    r"""The fenced blocks of Python in their order; the whole output where there is none.

    A fence is three or more of ` or ~, indented or not, closed by as many or more of the same on a line of their own,
    at the end of the last line of code, or by the end of the text. Lines may end in \r\n. A block without a language
    is Python; one of another language is none, and its fences are not taken for another's."""
    blocks, fence, label, code = [], "", "", []

    def close() -> None:
        if _PYTHON.fullmatch(label):
            blocks.append(textwrap.dedent("\n".join(code)) + "\n")

    for line in re.split(r"\r\n|\r|\n", output):
        if not fence:
            if opened := _OPEN.fullmatch(line):
                fence, label, code = opened[1], opened[2], []
            continue
        ended = line.rstrip(" \t")
        before = ended.rstrip(fence[0])
        if len(ended) - len(before) >= len(fence):
            code += [before] * bool(before.strip())
            close()
            fence = ""
        else:
            code.append(line)
    if fence:  # cut off before its end
        while code and not code[-1].strip():
            code.pop()
        close()
    return blocks or [output]
