"""What a campaign did and cost: the `campaign.json` that eval.campaign writes beside its runs."""

from pathlib import Path

from eval.report.runs import Run, finite, read_json
from eval.report.tables import NOTES, Cell, section, table_of

NAME = "campaign.json"
TONES = {"finished": "good", "failed": "bad", "pruned": "unsure", "waiting": "unsure"}


def hours(value) -> str:
    return "-" if finite(value) is None else f"{value:,.2f}"


def campaign_blocks(runs: list[Run]) -> list[tuple]:
    """Blocks of every campaign that has one of ``runs``, none without. Raises ValueError naming a file that is none."""
    blocks = []
    for folder in dict.fromkeys(run.path.parent for run in runs):
        if (folder / NAME).is_file():
            blocks += of_file(folder / NAME)
    return [("h", "Campaign"), *blocks] if blocks else []


def given_up(run: Run) -> bool:
    """Whether its campaign will not go on with it: it failed, or was pruned."""
    path = run.path.parent / NAME
    runs = read_json(path, dict).get("runs") if path.is_file() else {}
    about = runs.get(run.path.name) if isinstance(runs, dict) else {}
    return isinstance(about, dict) and about.get("state") in ("failed", "pruned")


def of_file(path: Path) -> list[tuple]:
    row = read_json(path, dict)
    runs = row.get("runs")
    if not isinstance(runs, dict) or not all(isinstance(about, dict) for about in runs.values()):
        raise ValueError(f"{path}: runs is no table of runs; remove the file, eval.campaign writes it again")
    states = [str(about.get("state")) for about in runs.values()]
    counts = ", ".join(
        f"{states.count(state)} {state}" for state in dict.fromkeys([*TONES, *states]) if state in states
    )
    budget = f" of a budget of {hours(row['budget_hours'])}" if finite(row.get("budget_hours")) is not None else ""
    says = f"{path.parent}: {len(runs)} runs, {counts}; {hours(row.get('hours'))} hours, "
    says += f"{hours(row.get('gpu_hours'))} GPU hours{budget}."
    rows = []
    for name, about in runs.items():
        state, seconds, code = str(about.get("state")), finite(about.get("seconds")), about.get("exit")
        cells = f"{seconds:,.0f}" if seconds is not None else "-", "-" if code is None else str(code)
        rows.append([name, Cell(state, tone=TONES.get(state, "")), str(about.get("why") or "-"), *cells])
    table = table_of(("run", "state", "why", "seconds", "exit code"), rows, left=3, note=NOTES["campaign"])
    return [("p", says), *section("Its runs", table, kind="fold" if len(rows) > 12 else "h3")]
