"""Counts the votes of a study.

The item is the unit: an item's votes are averaged, a tie counts half. The interval of a win rate is Wilson's (1927)
over the items, 95 %, with their effective number. The sign test asks whether the items that each arm won are as many;
tied ones are left out. Holm's p is over all tests that are printed. With more than two arms there are Bradley and
Terry's (1952) strengths, log odds that sum to 0, whose 95 % intervals allow for the votes on one item going together.
Agreement is Krippendorff's alpha, nominal: for the first arm, for the second, a tie.
"""

import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, starmap
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.sparse.csgraph import connected_components
from scipy.stats import norm

from eval.preference.study import KEY
from eval.stats import holm, mcnemar_exact, wilson
from runtime.folder import write_json
from schedules.commandline import package
from schedules.textlines import read_json

CHOICES = ("left", "right", "tie")
LOST = "give the KEY.json that eval.preference make wrote"
BROKEN = "let the rater download it again"
Z = float(norm.ppf(0.975))


class Item(NamedTuple):
    """A pair of a study. ``left``, ``right``: numbers of arms. ``broken``: the shuffled side of a check, or ""."""

    id: str
    left: int
    right: int
    broken: str


class Key(NamedTuple):
    study: str
    arms: list[str]
    questions: list[str]
    items: dict[str, Item]


class Vote(NamedTuple):
    choice: str
    seconds: float


class Rater(NamedTuple):
    """``votes``: (item, question) -> vote."""

    name: str
    votes: dict[tuple[str, str], Vote]

    def checks(self, key: Key) -> tuple[int, int]:
        """(failed, answered) attention checks. One is failed where the broken text is preferred by any question, or the
        whole one by none."""
        failed = answered = 0
        for name, item in key.items.items():
            given = [v.choice for q in key.questions if item.broken and (v := self.votes.get((name, q)))]
            answered += bool(given)
            whole = "right" if item.broken == "left" else "left"
            failed += bool(given) and (item.broken in given or whole not in given)
        return failed, answered


class Result(NamedTuple):
    """What the votes on one question say of two arms. ``scores``: item -> the first arm's share of its votes."""

    question: str
    first: str
    second: str
    scores: dict[str, float]
    votes: int
    rate: float
    low: float
    high: float
    won: int  # items that the first has more votes on
    lost: int
    p: float  # sign test, two-sided
    holm: float
    alpha: float | None  # None where no two raters voted on one item, or all votes are the same
    raters: int


def add_flags(add) -> None:
    add("votes", nargs="+", type=Path, metavar="VOTES", help="files that the raters downloaded")
    add("--key", type=Path, help="KEY.json of the study (default: beside the first file of votes)")
    text = "leave out raters who failed more than N attention checks (0 without a number)"
    add("--drop-inattentive", type=int, nargs="?", const=0, metavar="N", help=text)
    add("--list", action="store_true", help="the votes item by item")
    add("--json", type=Path, metavar="FILE", help="write all of it, by item too")


def run(args) -> None:
    place = args.key or args.votes[0].parent / KEY
    key = read_key(place)
    raters, dropped = [read_votes(path, key) for path in args.votes], []
    for a, b in combinations(range(len(raters)), 2):
        if raters[a].name == raters[b].name:
            both = f"{args.votes[a]} and {args.votes[b]}"
            way = "give the later file alone, or, if they are two people, change one's name in it"
            raise ValueError(f"votes of rater {raters[a].name!r} twice, in {both}; {way}")
    shown = [describe_rater(rater, key) for rater in raters]
    if args.drop_inattentive is not None:
        dropped = [rater for rater in raters if rater.checks(key)[0] > args.drop_inattentive]
        raters = [rater for rater in raters if rater not in dropped]
        if not raters:
            raise ValueError(f"all {len(dropped)} raters failed more than {args.drop_inattentive} attention checks")
    results, says = tally(key, raters)
    strengths, more = ranking(key, raters) if len(key.arms) > 2 else ({}, [])
    if args.json and args.json.resolve() in {path.resolve() for path in (place, *args.votes)}:
        raise ValueError(f"--json {args.json} would write over what is read; give another name")
    if args.json:
        write_json(args.json, as_json(key, raters, dropped, results, strengths))
    checks = sum(bool(item.broken) for item in key.items.values())
    print(f"study {key.study}: {len(key.arms)} arms, {len(key.items) - checks} pairs and {checks} checks")
    print(*shown, sep="\n")
    for question in key.questions:
        print(f"\n{question}")
        print(*(describe(result) for result in results if result.question == question), sep="\n")
        if question in strengths:
            print("  Bradley-Terry strength, log odds: " + "; ".join(map(describe_strength, strengths[question])))
    if args.list:
        print("\nby item: the first arm's share of the votes, question by question")
        print(*by_item(key, results), sep="\n")
    said = [f"left out as inattentive: rater {r.name}, {len(r.votes)} votes" for r in dropped] + says + more
    if said:
        print(*said, sep="\n", file=sys.stderr)


def read_key(path: Path) -> Key:
    """The key of a study. Raises ValueError, one line, for a file that is none."""
    row = read_json(path, dict, advice=LOST)
    arms, questions = row.get("arms"), row.get("questions")
    for what, given, least in (("arms", arms, 2), ("questions", questions, 1)):
        texts = isinstance(given, list) and all(isinstance(text, str) for text in given)
        if not texts or len(set(given)) != len(given) or len(given) < least:
            raise ValueError(f"{path}: {what} are no list of {least} or more texts; {LOST}")
    items = {}
    for entry in row["items"] if isinstance(row.get("items"), list) else ():
        entry = entry if isinstance(entry, dict) else {}
        name, broken = entry.get("item"), entry.get("broken", "")
        item = Item(entry.get("id"), entry.get("left"), entry.get("right"), broken)
        numbers = all(type(side) is int and 0 <= side < len(arms) for side in (item.left, item.right))
        known = isinstance(name, str) and isinstance(item.id, str) and broken in ("", "left", "right")
        if not numbers or not known or name in items or (item.left == item.right) != bool(broken):
            raise ValueError(f"{path}: entry {len(items) + 1} of items is none; {LOST}")
        items[name] = item
    if not items or not isinstance(row.get("study"), str):
        raise ValueError(f"{path}: no study with items; {LOST}")
    return Key(row["study"], arms, questions, items)


def read_votes(path: Path, key: Key) -> Rater:
    """The votes in a file. Raises ValueError, one line, for what is none, for another study's, and for two on one
    question and item."""
    row = read_json(path, dict, advice=BROKEN)
    if row.get("study") != key.study:
        raise ValueError(f"{path}: votes of study {str(row.get('study'))[:40]!r}, the key is of {key.study!r}")
    name, given = row.get("rater"), row.get("votes")
    if not isinstance(name, str) or not name.strip() or not name.isprintable() or not isinstance(given, list):
        raise ValueError(f"{path}: no rater with a list of votes; {BROKEN}")
    votes = {}
    for number, vote in enumerate(given, 1):
        vote = vote if isinstance(vote, dict) else {}
        item, question, choice, seconds = (vote.get(k) for k in ("item", "question", "choice", "seconds"))
        known = isinstance(item, str) and item in key.items and question in key.questions and choice in CHOICES
        if not known or type(seconds) not in (int, float) or not 0 <= seconds < math.inf:
            raise ValueError(f"{path}: vote {number} is none of this study; {BROKEN}")
        if (item, question) in votes:
            raise ValueError(f"{path}: vote {number} is a second one on item {item}, {question!r}; {BROKEN}")
        votes[item, question] = Vote(choice, seconds)
    if not votes:
        raise ValueError(f"{path}: no votes yet of rater {name!r}")
    return Rater(name, votes)


def share(vote: Vote, item: Item, first: int) -> float:
    """1 where the vote is for the arm numbered ``first``, 0 for the other one, 1/2 for a tie."""
    if vote.choice == "tie":
        return 0.5
    return float((item.left if vote.choice == "left" else item.right) == first)


def win_rate(scores: Sequence[float]) -> tuple[float, float, float]:
    """The mean of items' shares in [0, 1] and its interval, Wilson's with the effective number of items.

    That is how many items of zeros and ones would have a mean of that variance (Kish's design effect; Dean and Pagano,
    Journal of Survey Statistics and Methodology, 2015): more than there are where votes tie or are averaged. Where all
    items have one share the variance says nothing, and it is their number."""
    rate = statistics.fmean(scores)
    spread = statistics.fmean((score - rate) ** 2 for score in scores)
    return rate, *wilson(rate, len(scores) * (rate * (1 - rate) / spread if spread else 1))


def tally(key: Key, raters: Sequence[Rater]) -> tuple[list[Result], list[str]]:
    """Every question and pair of arms that has votes, and a line for what could not be measured."""
    results, says = [], {}
    for question in key.questions:
        for a, b in combinations(range(len(key.arms)), 2):
            pairs = {n: item for n, item in key.items.items() if {item.left, item.right} == {a, b}}
            given = [
                {n: share(v, item, a) for n, item in pairs.items() if (v := rater.votes.get((n, question)))}
                for rater in raters
            ]
            scores = {n: statistics.fmean(s) for n in pairs if (s := [g[n] for g in given if n in g])}
            if not scores:
                says[f"no votes on {key.arms[a]} and {key.arms[b]}: {question}"] = None
                continue
            won, lost = sum(s > 0.5 for s in scores.values()), sum(s < 0.5 for s in scores.values())
            alpha, votes = None, sum(map(len, given))
            try:
                alpha = agreement(given)
            except ValueError as e:
                says[str(e)] = None
            p, of = mcnemar_exact(won, lost), (question, key.arms[a], key.arms[b], scores, votes)
            raters_here = sum(map(bool, given))
            results.append(Result(*of, *win_rate([*scores.values()]), won, lost, p, math.nan, alpha, raters_here))
    adjusted = holm([result.p for result in results])
    return [r._replace(holm=p) for r, p in zip(results, adjusted, strict=True)], list(says)


def agreement(raters: Sequence[Mapping[str, object]]) -> float | None:
    """Krippendorff's alpha (Content Analysis, 2004), nominal, of raters' values by unit. None where it is not defined:
    no unit with two values, or one value alone in those that have two. Raises ValueError without its package."""
    units = {unit for of in raters for unit in of if sum(unit in other for other in raters) > 1}
    values = sorted({of[unit] for of in raters for unit in of.keys() & units}, key=str)
    if len(values) < 2:
        return None
    counts = [[sum(of.get(unit) == value for of in raters if unit in of) for value in values] for unit in sorted(units)]
    krippendorff = package("krippendorff", "agreement between raters, which is left out,")
    return float(krippendorff.alpha(value_counts=counts, level_of_measurement="nominal"))


def bradley_terry(wins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Strengths [arms], log odds that sum to 0, and their covariance [arms, arms], from ``wins`` [items, arms, arms]:
    how often the row's arm beat the column's, a tie half a win for each.

    The maximum of the likelihood by Hunter's iteration (Annals of Statistics, 2004). The covariance is the sandwich
    over items, so votes on one item need not be independent. Raises ValueError where there is no maximum: arms that
    nobody compared with the others, or that never lost to them (Ford, 1957)."""
    total = wins.sum(0)
    if connected_components(total > 0, connection="strong")[0] > 1:
        raise ValueError("some arms never won against others, or were not compared with them")
    games, strength = total + total.T, np.ones(len(total))
    for _ in range(100_000):
        new = total.sum(1) / (games / (strength[:, None] + strength)).sum(1)
        new /= np.exp(np.log(new).mean())
        moved, strength = np.abs(np.log(new / strength)).max(), new
        if moved < 1e-12:
            break
    else:
        raise ValueError("some arms hardly ever won against others")
    chance = strength[:, None] / (strength[:, None] + strength)  # that the row beats the column
    spread = games * chance * chance.T
    bread = np.linalg.pinv(np.diag(spread.sum(1)) - spread)
    scores = (wins - (wins + wins.transpose(0, 2, 1)) * chance).sum(2)  # [items, arms]
    return np.log(strength), bread @ (scores.T @ scores) @ bread


class Strength(NamedTuple):
    arm: str
    strength: float
    low: float
    high: float


def ranking(key: Key, raters: Sequence[Rater]) -> tuple[dict[str, list[Strength]], list[str]]:
    """question -> the arms by strength, and a line for each question that has none."""
    out, says, places = {}, [], {name: i for i, name in enumerate(key.items)}
    for question in key.questions:
        wins = np.zeros((len(places), len(key.arms), len(key.arms)))
        for rater in raters:
            for (name, asked), vote in rater.votes.items():
                item = key.items[name]
                if asked == question and not item.broken:
                    won = share(vote, item, item.left)
                    wins[places[name], item.left, item.right] += won
                    wins[places[name], item.right, item.left] += 1 - won
        try:
            strength, covariance = bradley_terry(wins)
        except ValueError as e:
            says.append(f"no Bradley-Terry strengths: {e}: {question}")
            continue
        half = Z * np.sqrt(np.diag(covariance))
        found = zip(key.arms, *map(np.ndarray.tolist, (strength, strength - half, strength + half)), strict=True)
        out[question] = sorted(starmap(Strength, found), key=lambda s: -s.strength)
    return out, says


def describe_rater(rater: Rater, key: Key) -> str:
    """A line for people."""
    failed, answered = rater.checks(key)
    choices = [vote.choice for (item, _), vote in rater.votes.items() if not key.items[item].broken]
    decided = [choice for choice in choices if choice != "tie"]
    left = f"{100 * decided.count('left') / len(decided):.0f} %" if decided else "-"
    seconds = statistics.median(vote.seconds for vote in rater.votes.values())
    return (
        f"rater {rater.name}: {len(rater.votes)} of {len(key.items) * len(key.questions)} votes, failed {failed} of "
        f"{answered} checks, {len(choices) - len(decided)} ties, left in {left} of the others, {seconds:.1f} s a vote"
    )


def describe(r: Result) -> str:
    """Lines for people."""
    alpha = "-" if r.alpha is None else f"{r.alpha:.3f}"
    agree = f"; {r.raters} raters, alpha {alpha}" if r.raters > 1 else ""
    rate, tied = f"{100 * r.rate:.1f} % ({100 * r.low:.1f} to {100 * r.high:.1f})", len(r.scores) - r.won - r.lost
    return (
        f"  {r.first} over {r.second}: {rate} in {r.votes} votes on {len(r.scores)} items\n"
        f"    items won {r.won}, lost {r.lost}, tied {tied}; sign test p {r.p:.4g}, Holm {r.holm:.4g}{agree}"
    )


def describe_strength(s: Strength) -> str:
    return f"{s.arm} {s.strength:+.3f} ({s.low:+.3f} to {s.high:+.3f})"


def by_item(key: Key, results: Sequence[Result]) -> Iterator[str]:
    """A line an item that has votes."""
    shares = defaultdict(dict)
    for r in results:
        for name, value in r.scores.items():
            shares[name, f"{r.first} over {r.second}"][r.question] = f"{value:.2f}"
    for (name, pair), by_question in shares.items():
        shown = repr(key.items[name].id[:60])[1:-1]  # a prompt may have several lines
        yield f"  {shown}  {pair}  {'  '.join(by_question.get(q, '-') for q in key.questions)}"


def as_json(key: Key, raters, dropped, results: Sequence[Result], strengths: Mapping[str, list[Strength]]) -> dict:
    """All of a tally, for a file."""
    out = {"study": key.study, "arms": key.arms, "questions": key.questions, "raters": []}
    for rater in (*raters, *dropped):
        failed, answered = rater.checks(key)
        about = {"rater": rater.name, "votes": len(rater.votes), "checks_failed": failed, "checks": answered}
        out["raters"].append(about | {"left_out": rater in dropped})
    items = [{key.items[name].id: value for name, value in r.scores.items()} for r in results]
    out["results"] = [r._asdict() | {"scores": by_id} for r, by_id in zip(results, items, strict=True)]
    return out | {"strengths": {q: [s._asdict() for s in found] for q, found in strengths.items()}}
