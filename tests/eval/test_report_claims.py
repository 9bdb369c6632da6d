"""The claims of DPSM are judged by paired seeds, and only where the arms can be compared."""

import json
import math

import pytest
from invented_runs import arms_of, judged, pairs, row, write_run

from eval.report import build as rp
from eval.report import claims, tables
from eval.report.runs import reference


@pytest.mark.parametrize(
    ("n", "key", "ce", "dpsm", "value", "holds"),
    [
        (1, "val_ppl", 30.0, 30.25, 0.25, "yes"),
        (1, "val_ppl", 30.0, 30.35, 0.35, "no"),
        (1, "val_ppl", 30.0, 25.0, -5.0, "yes"),  # better than CE is within
        (2, "val_ece10", 0.04, 0.03, -25.0, "yes"),  # the threshold itself
        (2, "val_ece10", 0.04, 0.031, -22.5, "no"),
        (5, "tokens_per_second", 20000.0, 19700.0, -1.5, "yes"),
        (5, "tokens_per_second", 20000.0, 19000.0, -5.0, "no"),
        (6, "peak_memory_bytes", 10**9, 10**9 + 499 * 10**6, 499.0, "yes"),
        (6, "peak_memory_bytes", 10**9, 10**9 + 512 * 2**20, 536.870912, "no"),  # MB is 1e6 bytes
    ],
)
def test_one_seed_shows_the_value_and_is_not_powered(tmp_path, n, key, ce, dpsm, value, holds):
    v = judged(n, pairs(tmp_path, [{key: ce}], [{key: dpsm}]))
    assert v.values == pytest.approx([value], rel=1e-9)  # double rounding of a difference or ratio
    assert (v.holds, v.verdict) == (holds, "not powered")


@pytest.mark.parametrize(
    ("deltas", "holds", "verdict"),
    [
        ((0.10, 0.12, 0.11), "yes", "met"),
        ((0.50, 0.52, 0.51), "no", "not met"),
        ((0.10, 0.30, 0.45), "yes", "not powered"),  # mean 0.28, the interval holds 0.3
        ((0.20, 0.30, 0.55), "no", "not powered"),
    ],
)
def test_several_seeds_are_judged_by_their_interval(tmp_path, deltas, holds, verdict):
    ce = [{"val_ppl": 30.0 + i} for i in range(3)]
    arms = pairs(tmp_path, ce, [{"val_ppl": 30.0 + i + d} for i, d in enumerate(deltas)])
    v = judged(1, arms)
    assert v.values == pytest.approx(list(deltas)) and (v.holds, v.verdict) == (holds, verdict)


def test_all_claims_of_a_page_are_tested_together(tmp_path):
    """PPL alone would be decided: t = 0.15 / (0.05 / sqrt 3) = 5.20 of 3 seeds, p = 1 - t / sqrt(t^2 + 2) = 0.0351.
    The ECE, t = 2.5 / (7.5 / sqrt 3) = 0.577, has 0.622. Three of 5 have no spread: 0.05 / 2 is left as the level."""
    deltas, eces = (0.1, 0.2, 0.15), (0.028, 0.031, 0.034)
    ce = [{"val_ppl": 30.0, "val_ece10": 0.04}] * 3
    dpsm = [{"val_ppl": 30 + d, "val_ece10": e} for d, e in zip(deltas, eces, strict=True)]
    arms = pairs(tmp_path, ce, dpsm)
    found = {v.criterion.number: v for v in claims.verdicts(arms)}
    assert found[1].p == pytest.approx(0.0351, abs=5e-5) and found[2].p == pytest.approx(0.622, abs=5e-4)
    assert [found[n].p for n in (4, 5, 6)] == [0, 0, 0] and math.isnan(found[7].p)  # no spread; for information
    assert found[1].verdict == found[2].verdict == "not powered" and found[5].verdict == "met"
    report = rp.build([run.path for arm in arms for run in arm.runs])
    says = next(b[1] for b in report.blocks if b[0] == "p" and "Holm" in b[1])
    assert says.endswith(
        "5 claims are tested on this page; Holm's procedure over all decides those with p up to 0.025."
    )
    # Another claim of the page that is decided changes nothing, one that is not takes its share.
    assert claims.verdicts(arms, [1e-9])[0].verdict == "not powered"
    steady = pairs(tmp_path / "b", ce, [{"val_ppl": 30 + d} for d in deltas])  # the ECE has no spread: decided
    assert claims.verdicts(steady)[0].verdict == "met" and claims.verdicts(steady, [0.6])[0].verdict == "not powered"


def test_what_is_not_powered_says_what_would_be(tmp_path):
    """Deltas of mean 0.2 and sd 0.1 against 0.3, at 0.05: |mean - 0.3| / sd = 1 takes 10 seeds, and 3 seeds find 3.26
    sd. Both are G*Power's, see tests/eval/test_stats.py."""
    arms = pairs(tmp_path, [{"val_ppl": 30.0}] * 3, [{"val_ppl": 30 + d} for d in (0.1, 0.2, 0.3)])
    v = judged(1, arms)
    assert (v.verdict, v.power) == ("not powered", ("finds 0.326 PPL", "needs 10 seeds"))
    assert [c.sub for c in tables.verdict_table([v]).rows[0][4:]] == ["n = 3, p = 0.225", *v.power[:1], "", v.power[1]]
    close = judged(1, pairs(tmp_path / "b", [{"val_ppl": 30.0}] * 3, [{"val_ppl": 30 + d} for d in (0.2, 0.3, 0.4)]))
    assert close.power == ("finds 0.326 PPL", "needs over 1,000 seeds")
    one = judged(1, pairs(tmp_path / "c", [{}], [{}]))
    assert one.power == ("", "needs 2 or more") and tables.verdict_table([one]).rows[0][7].sub == "needs 2 or more"


def test_ece_is_compared_with_brier_and_with_ce_after_temperature(tmp_path):
    folders = [
        write_run(tmp_path / "ce", summary={"val_ece10": 0.04, "val_ece10_t": 0.016, "val_nll_t": 3.30}),
        write_run(tmp_path / "brier", config={"loss": "brier"}, summary={"val_ece10": 0.0200}),
        write_run(tmp_path / "dpsm", config={"loss": "dpsm"}, summary={"val_ece10": 0.0208, "val_nll_t": 3.29}),
    ]
    arms = arms_of(*folders)
    third, seventh, eighth = (judged(n, arms) for n in (3, 7, 8))
    assert third.values == pytest.approx([4.0]) and third.holds == "yes" and third.against == "brier"
    assert seventh.values == pytest.approx([30.0]) and (seventh.holds, seventh.verdict) == ("no", "information")
    assert eighth.values == pytest.approx([-0.01]) and (eighth.holds, eighth.verdict) == ("yes", "information")


def test_time_to_quality_is_interpolated_in_log_ppl():
    curve = [(0, 1000.0), (10, 10.0), (20, 20.0), (30, 5.0)]
    assert claims.time_to(curve, 100.0) == pytest.approx(5.0)  # half way from 1000 to 10 in the logarithm
    assert claims.time_to(curve, 10.0) == 10  # the first crossing, whatever comes after
    assert claims.time_to(curve, 2000.0) == 0  # there from the start
    assert claims.time_to(curve, 4.0) is None and claims.time_to([], 4.0) is None


@pytest.mark.parametrize(
    ("curve", "value", "holds"),
    [
        ([(1, 10, 80.0), (2, 20, 20.0), (3, 30, 19.9)], 100.0, "yes"),
        ([(1, 10, 80.0), (2, 30, 20.0), (3, 40, 19.9)], 150.0, "no"),
        ([(1, 10, 80.0), (2, 18, 40.0), (3, 26, 10.0)], 110.0, "yes"),  # half way from 40 to 10: at 22 s, the limit
        ([(1, 10, 80.0), (2, 20, 21.0), (3, 30, 20.5)], math.inf, "no"),
    ],
)
def test_time_to_95_percent_of_ces_quality(tmp_path, curve, value, holds):
    ce = write_run(
        tmp_path / "ce", summary={}, curve=[(1, 10, 40.0), (2, 20, 20.0), (3, 30, 19.0)]
    )  # level 19 / 0.95 = 20
    dpsm = write_run(tmp_path / "dpsm", config={"loss": "dpsm"}, summary={}, curve=curve)
    v = judged(4, arms_of(ce, dpsm))
    assert v.values == pytest.approx([value]) and (v.holds, v.verdict) == (holds, "not powered")
    assert ("never" in v.value) == (value == math.inf)


def test_a_level_never_reached_by_one_of_two_seeds_is_not_met(tmp_path):
    slow, fast = [(1, 10, 80.0), (2, 20, 50.0)], [(1, 10, 80.0), (2, 20, 19.0)]
    folders = [write_run(tmp_path / f"c{s}", config={"seed": s}, summary={}, curve=fast) for s in (1, 2)]
    for s, curve in ((1, fast), (2, slow)):
        folders.append(write_run(tmp_path / f"d{s}", config={"seed": s, "loss": "dpsm"}, summary={}, curve=curve))
    v = judged(4, arms_of(*folders))
    assert (v.value, v.holds, v.verdict) == ("never reached by 1 of 2", "no", "not met")


def test_seeds_that_failed_are_counted_beside_those_that_did_not(tmp_path):
    folders = [write_run(tmp_path / f"c{s}", config={"seed": s}, summary={}) for s in (1, 2, 3, 4)]
    for s, summary in ((1, {}), (2, {}), (3, {"val_ppl": None})):
        folders.append(write_run(tmp_path / f"d{s}", config={"seed": s, "loss": "dpsm"}, summary=summary))
    diverged = [{"step": 500, "event": "diverged"}]
    folders.append(write_run(tmp_path / "d4", config={"seed": 4, "loss": "dpsm"}, events=diverged))
    arms = arms_of(*folders)
    v = judged(1, arms)
    assert len(v.values) == 2 and v.count == "2 of 4"
    assert tables.verdict_table([v]).rows[0][4].sub.startswith("n = 2 of 4")
    assert any("d4, diverged at step 1000" in w for w in rp.find_warnings(arms))


def test_rows_without_their_arm_say_which_run_is_missing(tmp_path):
    ce = write_run(tmp_path / "ce", summary={})
    dpsm = write_run(tmp_path / "dpsm", config={"loss": "dpsm"}, summary={})
    other_seed = write_run(tmp_path / "dpsm7", config={"loss": "dpsm", "seed": 7}, summary={})
    brier = write_run(tmp_path / "brier", config={"loss": "brier"})  # unfinished
    assert judged(3, arms_of(ce, dpsm)).verdict == "missing: no run with --loss brier"
    assert judged(3, arms_of(ce, dpsm, brier)).verdict == "missing: no finished run with --loss brier"
    assert judged(1, arms_of(dpsm)).verdict == "missing: no run with --loss ce"
    assert claims.verdicts(arms_of(ce)) == []  # without DPSM nothing is claimed
    assert judged(1, arms_of(ce, other_seed)).verdict == "missing: no seed that both arms finished"
    assert judged(6, pairs(tmp_path / "p", [{"peak_memory_bytes": None}], [{}])).verdict == "not measured"


def test_arms_of_different_settings_are_not_compared(tmp_path):
    ce = write_run(tmp_path / "ce", config={"steps": 500}, summary={})
    dpsm = write_run(tmp_path / "dpsm", config={"loss": "dpsm"}, summary={})
    arms = arms_of(ce, dpsm)
    v = judged(1, arms)
    assert (v.verdict, v.value, v.holds) == ("not comparable: steps 1000 / 500", "-", "-")
    assert any(w.startswith("NOT COMPARABLE") and "steps (500: ce; 1000: dpsm)" in w for w in rp.find_warnings(arms))


def test_speed_is_not_compared_across_devices_but_quality_is(tmp_path):
    ce = write_run(tmp_path / "ce", summary={})
    dpsm = write_run(tmp_path / "dpsm", config={"loss": "dpsm"}, summary={}, env={"device": "another"})
    arms = arms_of(ce, dpsm)
    assert {judged(n, arms).verdict for n in (4, 5, 6)} == {"not comparable: device"}
    assert judged(1, arms).verdict == "not powered" and judged(1, arms).holds == "yes"
    assert row(tables.cost_table(arms), "dpsm")["throughput tokens/s ↑"].sub == ""
    assert any("Speed and memory are NOT COMPARABLE" in w and "device" in w for w in rp.find_warnings(arms))


def test_the_reference_has_the_same_setting_and_is_the_best_of_several(tmp_path):
    settings = [{"lr": 1e-3}, {"lr": 3e-4}, {"lr": 1e-4, "label_noise": 0.1}]
    nlls = (3.5, 3.4, 3.0)
    folders = [
        write_run(tmp_path / f"ce{i}", config=c, summary={"val_nll": nll})
        for i, (c, nll) in enumerate(zip(settings, nlls, strict=True))
    ]
    dpsm = write_run(tmp_path / "dpsm", config={"loss": "dpsm"}, summary={})
    assert judged(1, arms_of(*folders, dpsm)).against == "ce lr=0.0003 label_noise=-"


def test_ce_that_is_smoothed_is_an_arm_and_not_the_reference(tmp_path):
    """Though its NLL is lower: what DPSM is compared with is CE itself. Where all CE is smoothed, that is the CE."""
    about = {flag: {"role": "knob", "only": {}} for flag in ("loss", "warmup")}
    about |= {"unigram": {"role": "knob", "only": {"loss": ["ce", "dpsm"]}}}
    folders = []
    for name, config, nll in (
        ("plain", {"unigram": 0.0}, 3.4),
        ("smoothed", {"unigram": 0.4}, 3.2),
        ("dpsm", {"loss": "dpsm", "unigram": 0.0}, 3.5),
    ):
        folders.append(write_run(tmp_path / name, config=config, summary={"val_nll": nll, "val_ppl": math.exp(nll)}))
        (folders[-1] / "flags.json").write_text(json.dumps(about))
    arms = arms_of(*folders)
    plain, dpsm = (next(a for a in arms if a.runs[0].path.name == name) for name in ("plain", "dpsm"))
    assert reference(dpsm, arms, "ce") == (plain, "")
    assert judged(1, arms).values == pytest.approx([math.exp(3.5) - math.exp(3.4)])
    rest = [arm for arm in arms if arm is not plain]
    assert reference(dpsm, rest, "ce")[0].runs[0].path.name == "smoothed"
