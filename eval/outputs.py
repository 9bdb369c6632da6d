"""Outputs of GSM8K's problems in the layouts in which people publish them.

A row is a line of JSONL, or an element of a list in a .json file: an object with what a model wrote and of which
problem it is, or what it wrote alone. LAYOUTS shows those that are known.

Of which problem: that of the ``question``, blanks aside; else of ``id``, ``idx`` or ``doc_id``, the row of the split
from 0; where no row has any, of its place, and then there must be one for each. What was written: the first of FIELDS
that is there; a list is of several samples. The harness writes a row for each of its filters: those of the first count.
A row with neither, such as a prompt alone, is passed over and counted.
"""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from eval.rows import rows_with_places

FIELDS = ("output", "outputs", "resps", "generated", "generation", "generated_text", "code", "completion", "response")
FIELDS += ("model_output", "prediction")
KEYS = ("id", "idx", "doc_id")
EXPECTED = "with id and a text output, or another of the layouts in --help"
LAYOUTS = """
    {"id": "test/17", "output": "16 - 3 - 4 = 9 ... #### 18"}         finetune_gsm8k.py's; or "id": 17, the row from 0
    {"question": "Janet's ducks lay ...", "output": "... #### 18"}    told by the question
    {"doc_id": 17, "doc": {...}, "resps": [["... #### 18"]], ...}     samples_*.jsonl of lm-evaluation-harness
    {"question": "...", "generated": ["eggs = 16\\nans = eggs + 2"]}  Program-of-Thought, for --format code
    {"idx": 17, "question": "...", "code": ["```python ..."]}         ToRA
    "... #### 18"                                                     one for each problem, in the split's order
"""


class Sample(NamedTuple):
    id: str
    output: str


def read_outputs(
    path: str | Path, ids: Sequence[str], questions: Sequence[str] = (), *, field: str = "", said: list | None = None
) -> list[Sample]:
    """The samples of a file, see above, for the problems ``ids``, which ask ``questions``.

    ``field``: the one that holds what was written, by default the first of FIELDS. ``said`` gets a line of how a file
    of another layout than ours was read, and of what was left out. Raises ValueError, with the line, for a row of no
    such problem or without text, and where rows are told by their place and are not as many as the problems."""
    asked = Counter(map(_words, questions))
    by_question = {_words(q): i for q, i in zip(questions, ids, strict=bool(questions)) if asked[_words(q)] == 1}
    known, split, samples = set(ids), ids[0].partition("/")[0], []
    ways, places, rest, first = Counter(), [], Counter(), None
    path = Path(path)
    path = path / "outputs.jsonl" if path.is_dir() else path  # of a run
    for where, row in rows_with_places(path):
        row = row if isinstance(row, dict) else {"output": row}
        column = field or next((name for name in FIELDS if name in row), "")
        key = next((name for name in KEYS if name in row), None)
        question = (row["doc"] if isinstance(row.get("doc"), dict) else row).get("question")
        if column not in row and key is None:
            rest["rows without an output are passed over"] += 1
            continue
        if not (texts := _texts(row.get(column))):
            raise ValueError(f"{where}: expected an object {EXPECTED}")
        first = first or str(row.get("filter", ""))
        if str(row.get("filter", "")) != first:
            rest[f"rows of other filters than {first} are the same outputs and left out"] += 1
            continue
        if isinstance(question, str) and by_question:
            key, name = "question", by_question.get(_words(question))
            if name is None:
                raise ValueError(f"{where}: the question is that of no problem, or of two: {question.strip()[:60]!r}")
        elif key is not None:
            name = f"{split}/{row[key]}" if re.fullmatch(r"\d+", str(row[key])) else str(row[key])
            if name not in known:
                expected = f"{ids[0]} to {ids[-1]}, the number alone, or the question"
                raise ValueError(f"{where}: unknown {key} {row[key]!r}, expected {expected}")
        else:
            key, name = "place", ids[len(places)] if len(places) < len(ids) else ""
            places.append(where)
        ways[f"by {key}, field {column}"] += len(texts)
        samples += [Sample(name, _that_prints(text) if column == "generated" else text) for text in texts]
    if places and len(places) != (count := sum(ways.values())):
        raise ValueError(f"{places[0]}: expected an object {EXPECTED}, as the other {count - len(places)} have")
    if places and len(places) != len(ids):
        have = f"{len(places)} outputs without id or question"
        raise ValueError(f"{path}: {have}, expected one for each of the {len(ids)} problems, in their order")
    if not samples:
        also = "".join(f"; {count:,} {what}" for what, count in rest.items())
        raise ValueError(f"{path} holds no outputs{also}; expected objects {EXPECTED}")
    if said is not None and (rest or set(ways) != {"by id, field output"}):
        how = [f"{count:,} outputs {way}" for way, count in ways.items()] + [
            f"{n:,} {what}" for what, n in rest.items()
        ]
        said.append(f"{path}: {'; '.join(how)}")
    return samples


def _texts(value) -> list[str]:
    """The samples in a field: a text, a list of texts, or the harness' list of such lists. [] for anything else."""
    found = [value] if isinstance(value, str) else value if isinstance(value, list) else [None]
    found = found[0] if len(found) == 1 and isinstance(found[0], list) else found
    return found if all(isinstance(text, str) for text in found) else []


def _that_prints(program: str) -> str:
    """A program of Program-of-Thought, which leaves its answer in ``ans``, with a line that prints it."""
    assigns = re.search(r"^ans\s*=", program, re.MULTILINE) and "print(" not in program
    return f"{program.rstrip()}\nprint(ans)\n" if assigns else program


def _words(question: str) -> str:
    return " ".join(question.split())
