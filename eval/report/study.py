"""The human study on the page: a tally that `eval.preference tally --json` wrote, or the raters' own files of votes."""

from pathlib import Path

from eval.preference import tally
from eval.preference.study import KEY
from eval.report.tables import NOTES, Cell, p_text, section, table_of
from schedules.textlines import read_json

FIELDS = {"question", "first", "second", "rate", "low", "high", "won", "lost", "votes", "scores", "holm"}
BROKEN = "give a file of eval.preference tally --json, or votes with KEY.json beside them"


def read_results(paths: list[Path]) -> list[dict]:
    """The results of every tally among ``paths``, and of the files of votes together. Raises ValueError naming a file
    that is neither."""
    found, votes = [], []
    for path in paths:
        row = read_json(path, dict, advice=BROKEN)
        if "votes" in row:
            votes.append(path)
            continue
        results = row.get("results")
        if not isinstance(results, list) or not all(isinstance(r, dict) and r.keys() >= FIELDS for r in results):
            raise ValueError(f"{path} is no tally and no votes; {BROKEN}")
        found += results
    if votes:
        key = tally.read_key(votes[0].parent / KEY)
        found += [r._asdict() for r in tally.tally(key, [tally.read_votes(path, key) for path in votes])[0]]
    return found


def study_blocks(paths: list[str | Path]) -> list[tuple]:
    """Blocks of the report, none without files."""
    rows = []
    for r in read_results([Path(path) for path in paths]):
        rate = Cell(f"{100 * r['rate']:.1f}", f"[{100 * r['low']:.1f}, {100 * r['high']:.1f}]")
        sided = r["low"] > 0.5 or r["high"] < 0.5
        tone = ("good" if r["rate"] > 0.5 else "bad") if sided else "unsure"
        counts = r["won"], r["lost"], len(r["scores"]) - r["won"] - r["lost"], r["votes"]
        alpha = "-" if r.get("alpha") is None else f"{r['alpha']:.3f}"
        rows.append([r["question"], f"{r['first']} over {r['second']}", rate._replace(tone=tone), *counts])
        rows[-1] += [p_text(r["holm"]), alpha]
    heads = "question", "arms", "preferred|%, 95 %", "won|items", "lost|items", "tied|items", "votes", "p|Holm", "alpha"
    return section("Human study", table_of(heads, rows, left=2, note=NOTES["study"]))
