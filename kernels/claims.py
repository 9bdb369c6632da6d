"""The project's speed claims as a table: criterion, required, measured, and whether it is met.

    python -m kernels.bench --claims --csv bench.csv     # measures everything on a GPU, then prints the table
    python -m kernels.claims bench.csv                   # the table again, from rows measured before

Every figure is a ratio within one run. What was not measured is said to be so, with the reason where the run
gave one (a peer that is not installed).
"""

import argparse
import csv
import sys

FULL = "linear_score DPSM, Fisher"
VOCABULARIES = (50257, 151936)
OF_COPY = {50257: 0.85, 151936: 0.75}
ALLOWANCE_MB = 300
TOKENS = 8192


def verdicts(rows: list[dict]) -> list[dict]:
    """One dict a criterion (criterion, required, measured, verdict) from the rows of kernels.bench and its
    --train-step, of which those in bf16 at 8192 tokens count; of two rows of one provider and shape the later.
    ``measured`` is a figure with its unit, or the reason why there is none."""
    rows = [r for r in rows if r.get("dtype") == "bf16" and r.get("n") == TOKENS]
    found = {(r["provider"], r["v"], bool(r.get("d"))): r for r in rows}
    table = []

    def get(provider: str, v: int, linear: bool, field: str):
        row = found.get((provider, v, linear))
        if row is None or row.get(field) is None:
            why = (row or {}).get("missing")
            raise LookupError(f"{provider}: {why}" if why else f"{provider}: no row with {field}")
        return row[field]

    def add(criterion: str, required: str, unit: str, value, holds) -> None:
        try:
            measured = value()
        except LookupError as e:
            table.append(dict(criterion=criterion, required=required, measured=e.args[0], verdict="not measured"))
            return
        verdict = "met" if holds(measured) else "not met"
        table.append(dict(criterion=criterion, required=required, measured=f"{measured:.3g}{unit}", verdict=verdict))

    def ratio(a: str, b: str, v: int, linear: bool, field: str = "step_ms"):
        return lambda: get(a, v, linear, field) / get(b, v, linear, field)

    for v, least in OF_COPY.items():
        add(f"DPSM from logits, V={v}, share of the copy bandwidth", f">= {least:.0%}", "",
            lambda v=v: get("ours DPSM", v, False, "share_of_copy"), lambda x, least=least: x >= least)  # fmt: skip
    for peer in ("Liger CE", "torch.compile CE"):
        for v in VOCABULARIES:
            add(f"{peer} over our DPSM, from logits, V={v}", ">= 1.5 x", " x", ratio(peer, "ours DPSM", v, False),
                lambda x: x >= 1.5)  # fmt: skip
    for v in VOCABULARIES:
        add(f"DPSM over our CE, from logits, V={v}", "<= 1.02 x", " x", ratio("ours DPSM", "ours CE", v, False),
            lambda x: x <= 1.02)  # fmt: skip
        add(f"DPSM with Fisher over our CE, linear_score, V={v}", "<= 1.02 x", " x",
            ratio(FULL, "linear_score CE", v, True), lambda x: x <= 1.02)  # fmt: skip
    for v in VOCABULARIES:
        add(f"linear_score over its matrix products, V={v}", "<= 1.10 x", " x",
            lambda v=v: get(FULL, v, True, "ratio_to_products"), lambda x: x <= 1.10)  # fmt: skip
        add(f"linear_score beside inputs and gradients, V={v}", f"<= {ALLOWANCE_MB} MB", " MB",
            lambda v=v: get(FULL, v, True, "beside_bytes") / 1e6, lambda x: x <= ALLOWANCE_MB)  # fmt: skip
        add(f"linear_score's error less the eager reference's, V={v}", "<= 1e-3", "",
            lambda v=v: get(FULL, v, True, "gradient_error")
            - get("linear + literal DPSM", v, True, "gradient_error"), lambda x: x <= 1e-3)  # fmt: skip
    for base in ("torch CE", "compiled torch CE"):
        for what, field in (("time", "step_ms"), ("peak memory", "peak_bytes")):
            add(f"GPT-2 124M step, DPSM over {base} through logits, {what}", "< 1 x", " x",
                ratio("step: DPSM, Fisher", f"step: {base}", 50257, True, field), lambda x: x < 1)  # fmt: skip
    return table


def print_table(table: list[dict]) -> None:
    width = max(len(r["criterion"]) for r in table)
    for r in table:
        measured = r["measured"] if r["verdict"] != "not measured" else ""
        why = f"  ({r['measured']})" if r["verdict"] == "not measured" else ""
        print(f"{r['criterion']:{width}}  {r['required']:>9}  {measured:>9}  {r['verdict']}{why}")


def read_rows(file: str) -> list[dict]:
    """Rows of a CSV of kernels.bench, numbers as numbers and empty cells as None. Raises ValueError for a file
    that is not one."""

    def number(text):
        if not text:
            return None
        try:
            return int(text)
        except ValueError:
            pass
        try:
            return float(text)
        except ValueError:
            return text

    with open(file, newline="") as opened:
        rows = [{k: number(x) for k, x in row.items()} for row in csv.DictReader(opened)]
    if not rows or not {"provider", "v", "dtype"} <= set(rows[0]):
        raise ValueError(f"{file} has no rows of kernels.bench; expected columns provider, v, d, dtype, step_ms")
    return rows


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m kernels.claims", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("csv", nargs="+", help="files that kernels.bench wrote")
    args = parser.parse_args(argv)
    try:
        rows = [row for file in args.csv for row in read_rows(file)]
    except (OSError, ValueError) as e:
        print(f"kernels.claims: {e}", file=sys.stderr)
        return 2
    print_table(verdicts(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
