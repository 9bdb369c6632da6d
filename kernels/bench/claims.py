"""The project's speed claims as a table: criterion, required, measured, and whether it is met.

Every figure is a ratio within one run. What was not measured is said to be so, with the reason where there is one.
"""

import operator

FULL = "linear_score DPSM, Fisher"
TRAIN_STEP = "python -m races.train_step --csv"
TOKENS = 8192
GPT2, QWEN3 = VOCABULARIES = (50257, 151936)
RELATIONS = {">=": operator.ge, "<=": operator.le, "<": operator.lt}


def verdicts(rows: list[dict]) -> list[dict]:
    """One dict a criterion (criterion, required, measured, verdict) from rows of kernels.bench and races.train_step, of
    which those in bf16 at 8192 tokens count. ``measured`` is a figure with its unit, or why there is none."""
    rows = [r for r in rows if r.get("dtype") == "bf16" and r.get("n") == TOKENS]
    found, table = {(r["provider"], r["v"], bool(r.get("d"))): r for r in rows}, []

    def get(provider: str, v: int, linear: bool, field: str, factor: float = 1.0) -> float:
        """A figure of a provider, from logits or of a ``linear`` head. LookupError says why there is none."""
        row = found.get((provider, v, linear), {})
        if row.get(field) is None:
            how = f"; {TRAIN_STEP} FILE, then --train-step-csv FILE" if provider.startswith("step: ") else ""
            raise LookupError(f"{provider}: {row.get('missing') or f'no row with {field}{how}'}")
        return row[field] * factor

    def ratio(a: str, b: str, v: int, linear: bool, field: str = "step_ms") -> float:
        return get(a, v, linear, field) / get(b, v, linear, field)

    def excess(a: str, b: str, v: int, linear: bool, field: str) -> float:
        return get(a, v, linear, field) - get(b, v, linear, field)

    def claim(criterion: str, required: str, figure, *of) -> None:
        """``required`` is a relation, a bound and its unit; figure(*of) is held to it."""
        relation, bound, *unit = required.split()
        least = float(bound.rstrip("%")) / (100 if bound.endswith("%") else 1)
        try:
            value = figure(*of)
            measured = " ".join([f"{value:.3g}", *unit])
            verdict = "met" if RELATIONS[relation](value, least) else "not met"
        except LookupError as e:
            measured, verdict = e.args[0], "not measured"
        table.append(dict(criterion=criterion, required=required, measured=measured, verdict=verdict))

    copy = "share of the copy bandwidth"
    for v, required in ((GPT2, ">= 85%"), (QWEN3, ">= 75%")):
        claim(f"DPSM from logits, V={v}, {copy}", required, get, "ours DPSM", v, False, "share_of_copy")
    for peer in ("Liger CE", "torch.compile CE"):
        for v in VOCABULARIES:
            claim(f"{peer} over our DPSM, from logits, V={v}", ">= 1.5 x", ratio, peer, "ours DPSM", v, False)
    for v in VOCABULARIES:
        claim(f"DPSM over our CE, from logits, V={v}", "<= 1.02 x", ratio, "ours DPSM", "ours CE", v, False)
        fisher = f"DPSM with Fisher over our CE, linear_score, V={v}"
        claim(fisher, "<= 1.02 x", ratio, FULL, "linear_score CE", v, True)
    for v, required in ((GPT2, "<= 1.15 x"), (QWEN3, "<= 1.10 x")):
        products, beside = f"linear_score over its matrix products, V={v}", "linear_score beside inputs and gradients"
        claim(products, required, get, FULL, v, True, "ratio_to_products")
        claim(f"{beside}, V={v}", "<= 300 MB", get, FULL, v, True, "beside_bytes", 1e-6)
        error = f"linear_score's error less the eager reference's, V={v}"
        claim(error, "<= 1e-3", excess, FULL, "linear + literal DPSM", v, True, "gradient_error")
    for base in ("torch CE", "compiled torch CE"):
        for what, field in (("time", "step_ms"), ("peak memory", "peak_bytes")):
            step = f"GPT-2 124M step, DPSM over {base} through logits, {what}"
            claim(step, "< 1 x", ratio, "step: DPSM, Fisher", f"step: {base}", GPT2, True, field)
    return table


def print_verdicts(rows: list[dict]) -> None:
    table = verdicts(rows)
    width = max(len(r["criterion"]) for r in table)
    for r in table:
        measured, why = r["measured"], ""
        if r["verdict"] == "not measured":
            measured, why = "", f"  ({measured})"
        print(f"{r['criterion']:{width}}  {r['required']:>9}  {measured:>9}  {r['verdict']}{why}")
