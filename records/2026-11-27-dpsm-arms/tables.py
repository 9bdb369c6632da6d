"""The record's tables from runs.csv and curves.csv, and from those of ../2026-11-27-dpsm-verdict, whose seeds 11 to 13
of text C stand beside: python records/2026-11-27-dpsm-arms/tables.py, from the root of a checkout.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
BEFORE = HERE.parent / "2026-11-27-dpsm-verdict"
sys.path[:0] = [str(HERE.parents[1]), str(BEFORE)]

import tables as before  # noqa: E402

SEEDS, CE_STEPS = (11, 12, 13), 720  # Shao's second part begins after so many
POWERS = {"1.1": "power 1.1", "1.25": "power 1.25", "1.5": "power 1.5"}


def arm_of(row: dict) -> str:
    """An arm's name as the tables say it."""
    loss, schedule = row["loss"], row["alpha_schedule"]
    if float(row["unigram"] or 0):
        return f"{loss}, unigram {'driven' if float(row['gap_gain'] or 0) else row['unigram']}".replace("ce,", "CE,")
    if loss == "dpsm" and row["path"] == "order":
        return "order 1 to 2"
    if loss == "dpsm" and schedule == "fixed":
        return f"alpha {float(row['alpha_max']):g}"
    if loss == "dpsm" and float(row["alpha_start"]):
        return f"CE to {float(row['alpha_start']):.0%}, then Brier"
    if loss == "dpsm":
        return f"DPSM, {'cosine ' if schedule == 'cosine' else ''}ramp {float(row['warmup']):g}"
    return {"ce": "CE", "smoothing": "smoothing 0.1", "power": POWERS.get(row["order"], "power")}.get(loss, loss)


def shao(ours: dict) -> dict:
    """His arm of text C: the second parts' numbers, with the curve of both parts in one."""
    parts, found = ours.get("shao", {}), {}
    for seed in (s for s in SEEDS if s in parts.get("brier", {})):
        run = parts["brier"][seed]
        later = [(CE_STEPS + step, nll) for step, nll in run["curve"]]
        found[seed] = run | {"curve": parts["CE"][seed]["curve"] + later}
    return {"Shao: CE to 72%, then Brier, smoothed tail": found} if found else {}


def main() -> None:
    before.arm_of = arm_of
    ours, theirs = before.read(HERE), before.read(BEFORE)
    judged = theirs["judge_c"]
    four = {name: judged[name] for name in ("CE", "DPSM, ramp 0.1", "smoothing 0.1", "CE, unigram driven")}
    grids = {"the arms that were left, text C": ours.get("judge", {}) | shao(ours) | four}
    grids["eight seeds, text C"] = {n: runs | ours.get("seeds", {}).get(n, {}) for n, runs in four.items()}
    for grid, title in (("noise", "a tenth of the targets random"), ("quarter", "40 kB"), ("sixteenth", "10 kB")):
        grids[f"{title}, text C"] = ours.get(grid, {})
    for title, arms in grids.items():
        if "CE" not in arms:
            continue
        before.against_ce(arms, ce="CE")
        before.NAMES = {name: name for name in arms}
        print(f"\n### {title}\n")
        before.table(arms)
        before.claims(arms, ce="CE")


if __name__ == "__main__":
    main()
