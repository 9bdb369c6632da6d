"""What kernels.bench says of the claims, from rows as a run leaves them."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


from kernels.bench import claims
from kernels.bench.__main__ import main
from kernels.bench.rows import write_csv


def figures(**changes):
    """Rows as a run would leave them in which every claim just holds."""
    rows = []
    for v, d in ((50257, 768), (151936, 1024)):
        common = dict(n=8192, v=v, dtype="bf16")
        logits = {"ours DPSM": 1.02, "ours CE": 1.0, "Liger CE": 1.53, "torch.compile CE": 1.53}
        for name, ms in logits.items():
            share = 0.85 if v == 50257 else 0.75
            rows.append(dict(provider=name, d=None, step_ms=ms, share_of_copy=share) | common)
        linear_rows = {claims.FULL: 1.02, "linear_score CE": 1.0, "linear + literal DPSM": 5.0}
        for name, ms in linear_rows.items():
            row = dict(provider=name, d=d, step_ms=ms, ratio_to_products=1.1, beside_bytes=300e6, gradient_error=0.004)
            rows.append(row | common)
        rows[-3]["gradient_error"] = 0.005
    for name in ("DPSM, Fisher", "torch CE", "compiled torch CE"):
        ours = name.startswith("DPSM")
        row = dict(provider=f"step: {name}", n=8192, v=50257, d=768, dtype="bf16", step_ms=99.0 if ours else 100.0)
        rows.append(row | dict(peak_bytes=9e9 if ours else 10e9))
    for row in rows:
        row |= changes.get(row["provider"], {})
    return rows


def by_verdict(rows):
    table = claims.verdicts(rows)
    return {v: [r for r in table if r["verdict"] == v] for v in ("met", "not met", "not measured")}


def test_every_claim_has_its_line():
    table = by_verdict(figures())
    assert len(table["met"]) == 20 and not table["not met"] and not table["not measured"]
    assert len(by_verdict([])["not measured"]) == 20


@pytest.mark.parametrize(
    "change, lines",
    [
        ({"ours DPSM": dict(share_of_copy=0.74)}, 2),
        ({"Liger CE": dict(step_ms=1.52)}, 2),
        ({"torch.compile CE": dict(step_ms=1.52)}, 2),
        ({"ours CE": dict(step_ms=0.99)}, 2),
        ({"linear_score CE": dict(step_ms=0.99)}, 2),
        ({claims.FULL: dict(ratio_to_products=1.16)}, 2),
        ({claims.FULL: dict(ratio_to_products=1.11)}, 1),  # allowed at D = 768
        ({claims.FULL: dict(beside_bytes=301e6)}, 2),
        ({claims.FULL: dict(gradient_error=0.0051)}, 2),
        ({"step: torch CE": dict(step_ms=98.0)}, 1),
        ({"step: DPSM, Fisher": dict(peak_bytes=11e9)}, 2),
    ],
)
def test_a_claim_that_does_not_hold_is_said_not_to(change, lines):
    table = by_verdict(figures(**change))
    assert len(table["not met"]) == lines and len(table["met"]) == 20 - lines


def test_a_missing_peer_is_named_and_other_runs_do_not_count(tmp_path, capsys):
    gone = dict(step_ms=None, missing="not installed: No module named 'liger_kernel'")
    rows = figures(**{"Liger CE": gone})
    rows += [r | dict(dtype="fp32", step_ms=0.1) for r in figures()] + [r | dict(n=64) for r in figures()]
    table = by_verdict(rows)
    assert len(table["not measured"]) == 2 and len(table["met"]) == 18
    assert all("liger_kernel" in r["measured"] for r in table["not measured"])
    # The same from the file, by the command.
    file = tmp_path / "rows.csv"
    write_csv(rows, str(file))
    assert main(["--claims-of", str(file)]) == 0
    shown = capsys.readouterr().out
    assert shown.count("not measured  (Liger CE: not installed: No module named 'liger_kernel')") == 2
    assert shown.count("  met") == 18


def test_claims_of_the_training_step_say_how_to_measure_them(tmp_path, capsys):
    files = {}
    for step in (False, True):
        rows = [r for r in figures() if r["provider"].startswith("step: ") == step]
        files[step] = tmp_path / f"{step}.csv"
        write_csv(rows, str(files[step]))
    assert main(["--claims-of", str(files[False])]) == 0
    shown = capsys.readouterr().out
    how = "python -m races.train_step --csv FILE, then --train-step-csv FILE"
    assert shown.count("not measured") == shown.count(how) == 4 and shown.count("  met") == 16
    assert main(["--claims-of", *map(str, files.values())]) == 0
    assert capsys.readouterr().out.count("  met") == 20


def test_claims_of_a_file_that_is_none(tmp_path, capsys):
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    for file in (other, tmp_path / "absent.csv"):
        assert main(["--claims-of", str(file)]) == 2
        assert capsys.readouterr().err.count("\n") == 1
