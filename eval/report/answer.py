"""The first thing on the page: of each proposal whether its claims are met, in a sentence and a table."""

from eval.report.claims import Verdict, holm_words
from eval.report.tables import NOTES, Cell, Table, p_text, section, table_of, toned

STATES = ("met", "not met", "not powered", "not comparable", "not run")
NONE = "No run here tests a claim of DPSM or of FoT: none has --loss dpsm, --schedule fot or fot-literal."


def state_of(v: Verdict) -> tuple[str, str]:
    """(one of STATES, why)."""
    name, _, why = v.verdict.partition(": ")
    if name in STATES:
        return name, why or v.power[1]
    return "not run", why or v.verdict


def sentence(name: str, rows: list[Verdict]) -> str:
    """How many claims of the proposal called ``name`` are met, and what follows for it as a whole."""
    states, n = [state_of(v)[0] for v in rows], len(rows)
    counts = ", ".join(f"{states.count(state)} {state}" for state in STATES if state in states)
    if set(states) == {"met"}:
        whole = "all of it is met"
    elif "not met" in states:
        whole = "as a whole it is not met"
    else:
        whole = "as a whole it is not decided"
    return f"{name}: {states.count('met')} of {n} claims met ({counts}); {whole}."


def proposals(dpsm: list[Verdict], fot: list[Verdict]) -> list[tuple[str, list[Verdict]]]:
    """(name, the rows that are claims) of each proposal of which there are runs: DPSM's first arm, each rule of FoT."""
    found = []
    if dpsm:
        labels = list(dict.fromkeys(v.arm for v in dpsm))
        more = f", of {len(labels)} arms the one with most seeds and lowest NLL" if len(labels) > 1 else ""
        found.append((f"DPSM ({labels[0]}{more})", [v for v in dpsm if v.arm == labels[0] and v.criterion.claim]))
    size = len({v.criterion.number for v in fot})
    for start in range(0, len(fot), size or 1):
        rows = fot[start : start + size]
        rule = next(v.arm for v in rows if v.criterion.kind == "diverged")
        found.append((f"FoT ({rule})", rows))
    return found


def answer_table(found: list[tuple[str, list[Verdict]]]) -> Table | None:
    rows = []
    for name, verdicts in found:
        for v in verdicts:
            state, why = state_of(v)
            tested = [f"n = {v.count}"] * bool(v.values) + [f"p {p_text(v.p, '= ')}"] * (v.p == v.p)
            measured = Cell(v.value, ", ".join(tested))
            answer = toned(state, bold=True)._replace(sub=why)
            claim = Cell(v.criterion.name, name.split(",")[0] + ")" * ("," in name))
            rows.append(
                [
                    claim,
                    answer,
                    measured,
                    Cell(v.interval or "-"),
                    Cell(v.threshold, v.against and f"against {v.against}"),
                ]
            )
    heads = "claim", "answer", "measured", "interval|95 %", "claimed"
    return table_of(heads, rows, left=5, note=NOTES["answer"])


def answer_blocks(dpsm: list[Verdict], fot: list[Verdict], p_values: list[float]) -> list[tuple]:
    """``p_values``: of every claim that the page tests."""
    found = proposals(dpsm, fot)
    if not found:
        return [("answer", [NONE])]
    table, words = answer_table(found), holm_words(p_values)
    table = table._replace(note=table.note + words)
    return [("answer", [sentence(*proposal) for proposal in found]), *section("The claims", table)]
