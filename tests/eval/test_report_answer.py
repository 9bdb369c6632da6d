"""The first thing on the page: which claims of DPSM and of FoT the runs meet."""

import json
import math

import pytest
from invented_runs import arms_of, falling, three_losses, write_run

from eval.report import build as rp
from eval.report import fot_claims
from eval.report.answer import NONE
from eval.stats import t_interval


def answers(report) -> dict[str, list]:
    """Claim -> its cells in the first table."""
    table = next(block[1] for block in report.blocks if block[0] == "table")
    return {row[0].text: row for row in table.rows}


def test_dpsm_is_answered_first_with_what_was_claimed_and_measured(tmp_path):
    report = rp.build(three_losses(tmp_path))
    assert [block[0] for block in report.blocks[:4]] == ["p", "answer", "h", "table"]
    rows = answers(report)
    assert len(rows) == 6 and rows["PPL within 0.3 of CE"][1].text == "met"
    # 5 of 6: the arm needs 103 of CE's 100 seconds, and its curve falls more slowly
    states = [row[1].text for row in rows.values()]
    words = report.answers[0]
    assert words.startswith(f"DPSM (dpsm): {states.count('met')} of 6 claims met (")
    verdicts = {v.criterion.name: v for v in report.verdicts}
    for name, row in rows.items():
        v = verdicts[name]
        assert row[2].text == v.value and row[4].text == v.threshold
        low, high = t_interval(v.values)
        ends = [float(end) for end in row[3].text.split(" to ")]
        assert ends == [pytest.approx(low, abs=0.06), pytest.approx(high, abs=0.06)]
    assert f"{len(verdicts) - 2} claims are tested on this page" in report.blocks[3][1].note


def test_what_no_run_measured_is_not_run_and_without_either_method_nothing_is_claimed(tmp_path):
    alone = rp.build([write_run(tmp_path / "dpsm", config={"loss": "dpsm"}, summary={})])
    assert {(row[1].text, row[1].sub) for row in answers(alone).values()} == {
        ("not run", "no run with --loss ce"),
        ("not run", "no run with --loss brier"),
    }
    assert alone.answers == ["DPSM (dpsm): 0 of 6 claims met (6 not run); as a whole it is not decided."]
    plain = rp.build([write_run(tmp_path / "ce", summary={})])
    assert plain.answers == [NONE] and not plain.verdicts
    assert not any(block[0] == "h" and "claims" in block[1].lower() for block in plain.blocks)


def gsm8k(root, schedule, seed, rate, ms, steps=2000, nll=3.0, lr=1e-3):
    config = {"script": "finetune_gsm8k.py", "schedule": schedule, "seed": seed, "steps": steps, "lr": lr}
    summary = {"pass_at_1_strict": rate, "ms_per_step_median": ms, "val_nll": nll, "steps": steps}
    return write_run(root / f"{schedule}{lr}-{seed}", config=config, summary=summary, curve=falling(20.0))


def forecast(folder, mean):
    """A forecast at 900 of 2000 steps, and an end at 3.0."""
    rows = [{"kind": "fot", "step": 900, "forecast": mean, "sd": 0.1}]
    rows += [{"kind": "train", "step": 2000, "loss": 3.0, "nll": 3.0}]
    with open(folder / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def test_fots_claims_are_held_against_the_best_rival_at_its_own_peak(tmp_path):
    folders = []
    for seed in (1, 2, 3):
        wobble = 0.001 * (seed - 2)
        folders += [
            gsm8k(tmp_path, "fot", seed, 0.40 + wobble, 100.1),
            gsm8k(tmp_path, "cosine", seed, 0.30, 100.0 + wobble),
            gsm8k(tmp_path, "cosine", seed, 0.50, 100.0, nll=4.0, lr=9e-3),  # its NLL says to leave that peak
            gsm8k(tmp_path, "linear", seed, 0.33, 105.0),
        ]
        forecast(folders[-4], 3.06 + wobble)
    report = rp.build(folders)
    rows = answers(report)
    first = rows["+5 pp pass@1 at 2,000 steps"]
    assert (first[1].text, first[2].text) == ("met", "+7.0 ± 0.1 pp") and "linear" in first[4].sub  # 40 - 33
    assert (rows["+3 pp pass@1 at 4,000 steps"][1].text, rows["+3 pp pass@1 at 4,000 steps"][2].text) == (
        "not run",
        "-",
    )
    error = rows["forecast error below 3 %"]
    assert error[1].text == "met" and error[2].text == "2.0 ± 0.0 %" and error[2].sub.startswith("n = 3")
    assert (rows["no divergence"][1].text, rows["no divergence"][2].text) == (
        "met",
        "0 of 3 runs, 0 to 56 % by Wilson",  # 3.84 / 6.84
    )
    slow = rows["overhead below 0.2 %"]
    assert (slow[1].text, slow[2].text) == ("met", "+0.1 ± 0.0 %") and "cosine" in slow[4].sub
    assert report.answers == ["FoT (fot): 4 of 6 claims met (4 met, 2 not run); as a whole it is not decided."]
    assert not any("DPSM" in str(block[1]) for block in report.blocks if block[0] == "h")


def test_a_diverged_run_of_fot_fails_its_claim(tmp_path):
    good, bad = (gsm8k(tmp_path, "fot", seed, 0.4, 100.0) for seed in (1, 2))
    values = json.loads((bad / "summary.json").read_text()) | {"divergences": 1}
    (bad / "summary.json").write_text(json.dumps(values))
    found = {v.criterion.kind: v for v in fot_claims.decide(fot_claims.rows(arms_of(good, bad)))}
    assert (found["diverged"].verdict, found["diverged"].holds) == ("not met", "no")
    assert found["diverged"].value.startswith("1 of 2 runs") and math.isnan(found["diverged"].p)
    assert rp.build([good, bad]).answers[0].endswith("as a whole it is not met.")
