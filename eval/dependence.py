"""Whether summaries depend on their articles: their ROUGE beside that with the articles shuffled among the examples.

    python -m eval.dependence runs/A runs/B
    python -m eval.dependence runs/A/predictions-ood.jsonl --shuffles 20

A summary is made of its article alone. So that of an example that gets another's article is the one that was made of
that article, and nothing is generated anew: the predictions change places, the references stay. In each shuffle every
example gets another's. A model that writes what any article of the set could have has the same ROUGE in both columns;
what is gained by the own article is their difference, with a 95 % bootstrap interval over the examples.
"""

import sys

if not __package__:  # a file by its name finds no package
    print("python -m eval.dependence: error: type it like this, in the folder that holds eval/", file=sys.stderr)
    sys.exit(2)

from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.windows import permutation
from eval.stats import bootstrap_interval
from eval.summaries import ROUGE, ROUGE_WORDS, mean_of, rouge_scores
from runtime.cli import Parser, user_errors
from schedules.commandline import alive
from schedules.textlines import read_rows


class Dependence(NamedTuple):
    """ROUGE, in per cent, of one kind. The means are over the examples that were measured."""

    name: str
    own: float  # of each summary with its article's reference
    shuffled: float  # of summaries of other articles with it, in the mean of the shuffles
    low: float  # ends of the interval of own - shuffled
    high: float


def derangements(n: int, count: int) -> list[np.ndarray]:
    """``count`` permutations of ``n``, int64 [n] each, drawn anew by number, in which nothing stays: a circle through a
    random order of all. Raises ValueError for fewer than two."""
    if n < 2:
        raise ValueError(f"{n} summaries: expected two or more to shuffle")
    orders = [permutation(0, number, n) for number in range(count)]
    circles = [np.empty(n, np.int64) for _ in orders]
    for order, circle in zip(orders, circles, strict=True):
        circle[order] = np.roll(order, 1)
    return circles


def dependence(
    predictions: list[str], references: list[str], *, shuffles: int = 5, words: str = "ascii"
) -> list[Dependence]:
    """A Dependence for each of ROUGE, ``words`` as `eval.summaries.rouge_scores` reads them. Raises ValueError as that
    does, for fewer than two examples, and where no reference has a word."""
    own = rouge_scores(predictions, references, words=words)
    others = [
        rouge_scores([predictions[i] for i in places], references, words=words)
        for places in derangements(len(predictions), shuffles)
    ]
    out = []
    for name in ROUGE:
        known = [i for i, value in enumerate(own[name]) if value is not None]
        if not known:
            raise ValueError("no reference has a word that ROUGE reads; --words unicode reads any script")
        theirs = [mean_of(other[name][i] for other in others) for i in known]
        gained = [own[name][i] - their for i, their in zip(known, theirs, strict=True)]
        out.append(Dependence(name, mean_of(own[name]), mean_of(theirs), *bootstrap_interval(gained)))
    return out


def read_predictions(path: Path) -> tuple[Path, list[str], list[str]]:
    """(the file, predictions, references) of predictions-*.jsonl, or of a run's folder: its test's, else val's. Raises
    ValueError where there is none, and for a row, with its line, that lacks one."""
    if path.is_dir():
        files = [path / f"predictions-{split}.jsonl" for split in ("test", "val")]
        path = next((file for file in files if file.is_file()), files[0])
    rows = []
    for number, row in read_rows(path, nan=True):
        texts = [row.get(name) if isinstance(row, dict) else None for name in ("prediction", "reference")]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{path}, line {number} is no row of predictions; expected prediction and reference")
        rows.append(texts)
    return path, *([row[side] for row in rows] for side in (0, 1))


@alive()
def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m eval.dependence", usage=None, description=__doc__)
    parser.add_argument(
        "predictions", nargs="+", type=Path, help="runs of finetune_seq2seq.py, or files of predictions"
    )
    parser.add_argument("--shuffles", type=int, default=5, help="of the articles (default: %(default)s)")
    parser.add_argument("--words", default="ascii", choices=ROUGE_WORDS, help="words that ROUGE reads (default: ascii)")
    given = parser.parse_args(argv)
    with user_errors():
        if given.shuffles < 1:
            raise ValueError(f"--shuffles {given.shuffles}: expected 1 or more")
        for path in given.predictions:
            file, predictions, references = read_predictions(path)
            print(f"{file}: {len(predictions):,} summaries, {len(set(predictions)):,} different")
            print(f"{'':12}{'own article':>12}{'shuffled':>12}{'difference':>12}  95 % interval")
            for name, own, shuffled, low, high in dependence(
                predictions, references, shuffles=given.shuffles, words=given.words
            ):
                print(f"{name:12}{own:12.2f}{shuffled:12.2f}{own - shuffled:12.2f}  {low:.2f} to {high:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
