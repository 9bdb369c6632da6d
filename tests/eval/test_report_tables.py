"""The report's tables hold means, spreads and paired differences in the units of their heads."""

import pytest
from invented_runs import arms_of, pairs, row, write_run

from eval.report import tables
from eval.stats import stratified_bootstrap


def test_final_table_holds_mean_and_sd_in_the_units_of_its_head(tmp_path):
    summaries = [
        {
            "val_ppl": ppl,
            "val_ece10": ece,
            "val_accuracy": 0.25,
            "val_nll_t": 3.0,
            "val_ppl_t": ppl - 1,
            "test_ppl": 50.0,
        }
        for ppl, ece in ((30, 0.03), (31, 0.04), (32, 0.05))
    ]
    folders = [write_run(tmp_path / f"{i}", config={"seed": i}, summary=s) for i, s in enumerate(summaries)]
    folders.append(write_run(tmp_path / "one", config={"loss": "brier"}, summary={"val_spherical": None}))
    arms = arms_of(*folders)
    table = tables.final_table(arms, "val")
    ce, brier = row(table, "ce"), row(table, "brier")
    # By hand: mean and sd of 30, 31, 32 are 31 and 1; of 3, 4, 5 %, 4 and 1.
    assert ce["PPL per token ↓"][:2] == ("31.00", "± 1.00")
    assert ce["ECE 10 bins, % ↓"][:2] == ("4.00", "± 1.00")
    assert ce["Accuracy % ↑"][:2] == ("25.00", "± 0.00") and ce["n seeds"].text == "3"
    assert brier["PPL per token ↓"][:2] == ("30.00", "") and brier["Spherical loss, 0 to 1 ↓"].text == "-"
    after = row(table, "ce + temperature")
    assert after["PPL per token ↓"].text == "30.00" and after["NLL nats per token ↓"].text == "3.0000"
    assert after["ECE 10 bins, % ↓"].text == "1.00" and after["T fitted"].text == ce["T fitted"].text == "1.100"
    assert after["ECE 10 equal-mass bins, % ↓"].text == "-"
    assert row(tables.final_table(arms, "test"), "ce")["PPL per token ↓"].text == "50.00"
    assert tables.final_table(arms, "ood") is None


def test_an_ece_of_one_seed_has_an_interval(tmp_path):
    """The run's own; of a run without, as older ones, that of its bins, which it says. Of two seeds their sd."""
    own = {"val_ece10": 0.04, "val_ece10_ci95": [0.031, 0.052], "val_ece10_t_ci95": [0.0, 0.0123], "val_nll_t": 3.0}
    folders = [write_run(tmp_path / "ce", summary=own), write_run(tmp_path / "b", config={"loss": "brier"}, summary={})]
    for seed in (1, 2):
        folders.append(write_run(tmp_path / f"d{seed}", config={"loss": "dpsm", "seed": seed}, summary=own))
    arms = arms_of(*folders)
    shown = {
        name: row(tables.final_table(arms, "val"), name)["ECE 10 bins, % ↓"].sub for name in ("ce", "brier", "dpsm")
    }
    assert shown["ce"] == "[3.10, 5.20]" and shown["dpsm"] == "± 0.00"
    assert row(tables.final_table(arms, "val"), "ce + temperature")["ECE 10 bins, % ↓"].sub == "[0.00, 1.23]"
    low, high = map(float, shown["brier"].removesuffix(" by token").strip("[]").split(", "))
    ece = 100 * arms[1].runs[0].calibration["val", "raw"].ece(10)
    assert shown["brier"].endswith("] by token") and low < ece < high < low + 1  # 200,000 tokens


def test_a_seed_without_a_value_is_said(tmp_path):
    arms = pairs(tmp_path, [{"val_brier": 0.5}, {"val_brier": 0.7}, {"val_brier": None}], [])
    assert row(tables.final_table(arms, "val"), "ce")["Brier 0 to 2 ↓"][:2] == ("0.6000", "± 0.1414, n = 2")


@pytest.mark.parametrize(
    ("ours", "expected"),
    [
        ((29.0, 29.1), "dpsm"),  # 1 apart, sd 0.07 each
        ((29.9, 29.3), None),  # apart by less than the two sds
        ((29.0,), None),  # one seed has no sd
    ],
)
def test_best_is_bold_only_where_seeds_separate_it(tmp_path, ours, expected):
    theirs = [{"val_ppl": v, "val_ppl_t": v, "val_nll_t": None} for v in (30.0, 30.1)]
    table = tables.final_table(pairs(tmp_path, theirs, [{"val_ppl": v} for v in ours]), "val")
    bold = [line[0].text for line in table.rows if line[2].bold]
    assert bold == ([expected] if expected else [])


def test_nothing_is_bold_across_settings(tmp_path):
    folders = [write_run(tmp_path / f"a{s}", config={"seed": s}, summary={"val_ppl": 30 + s / 100}) for s in (1, 2)]
    configs = [{"seed": s, "loss": "dpsm", "steps": 2000} for s in (1, 2)]
    folders += [write_run(tmp_path / f"b{c['seed']}", config=c, summary={"val_ppl": 20.0}) for c in configs]
    assert not any(cell.bold for line in tables.final_table(arms_of(*folders), "val").rows for cell in line)


def test_differences_from_ce_are_paired_by_seed_and_holm_corrected(tmp_path):
    keys = {"val_ppl_t": None, "val_nll_t": None}  # no CE + temperature row: two arms in the column
    folders = [write_run(tmp_path / f"c{s}", config={"seed": s}, summary={"val_ppl": 30 + s, **keys}) for s in range(3)]
    folders.append(write_run(tmp_path / "c9", config={"seed": 9}, summary={"val_ppl": 99, **keys}))  # CE alone
    deltas = {"dpsm": (0.1, 0.2, 0.3), "brier": (2, 5, 2)}
    for loss, values in deltas.items():
        for s in (2, 0, 1):  # in another order than CE's
            config, summary = {"seed": s, "loss": loss}, {"val_ppl": 30 + s + values[s], **keys}
            folders.append(write_run(tmp_path / f"{loss}{s}", config=config, summary=summary))
    table = tables.delta_table(arms_of(*folders))
    # t = mean / (sd / sqrt 3) is 0.2 / (0.1 / sqrt 3) = 3.464 and 3 / (sqrt 3 / sqrt 3) = 3. With 2 degrees of freedom
    # p = 1 - t / sqrt(t^2 + 2): 0.0742 and 0.0955. Holm: the smaller counts for all 12 tests of the table, the larger
    # for the 11 that are left; the other metrics do not differ.
    assert row(table, "dpsm")["PPL per token ↓"][:2] == ("+0.20 ± 0.10", "p = 0.890")
    assert row(table, "brier")["PPL per token ↓"][:2] == ("+3.00 ± 1.73", "p = 1.000")
    assert row(table, "dpsm")["NLL after T nats per token ↓"].text == "-" and row(table, "dpsm")["n seeds"].text == "3"


def test_changes_over_settings_have_an_interquartile_mean(tmp_path):
    """Two settings of two seeds, each beside its own CE: changes of -40, -20 and 0, 100 % in the ECE, whose middle half
    is -20 and 0. One arm in one setting has no row, and a seed that CE lacks does not count."""
    folders = []
    for steps, eces in ((1000, (0.024, 0.032)), (500, (0.08, 0.16))):
        base = 0.04 if steps == 1000 else 0.08
        for seed, ece in enumerate(eces):
            for loss, value in (("ce", base), ("dpsm", ece)):
                config = {"loss": loss, "seed": seed, "steps": steps}
                path = tmp_path / f"{loss}{steps}{seed}"
                folders.append(write_run(path, config=config, summary={"val_ece10": value}))
    folders.append(write_run(tmp_path / "more", config={"loss": "dpsm", "seed": 9}, summary={"val_ece10": 9.0}))
    folders.append(write_run(tmp_path / "b", config={"loss": "brier", "seed": 0}, summary={}))
    [line] = tables.settings_table(arms_of(*folders)).rows
    cell = next(c for h, c in zip(tables.settings_table(arms_of(*folders)).head, line, strict=True) if h.text == "ECE")
    assert (line[0].text, line[1].text, cell.text) == ("dpsm", "2", "-10.0")
    low, high = stratified_bootstrap([[-40, -20], [0, 100]])
    assert cell.sub == f"[{low:+.1f}, {high:+.1f}]"
    assert tables.settings_table(arms_of(*(f for f in folders if "500" not in f.name))) is None


def test_no_differences_without_two_pairs(tmp_path):
    bare = {"val_nll_t": None}  # no CE + temperature row, which has a pair in every seed
    assert tables.delta_table(pairs(tmp_path, [bare, bare], [bare])) is None


def test_cost_is_beside_ces_and_unmeasured_is_a_dash(tmp_path):
    table = tables.cost_table(
        pairs(tmp_path, [{}], [{"tokens_per_second": 19000.0, "peak_memory_bytes": 1_250_000_000}])
    )
    line = row(table, "dpsm")
    assert line["throughput tokens/s ↑"][:2] == ("19,000", "0.950 × CE")
    assert line["peak memory MB = 1e6 bytes ↓"][:2] == ("1,250", "1.250 × CE")
    assert line["MFU % ↑"][:2] == ("-", "") and line["energy kJ ↓"].text == "-"
    assert row(table, "ce")["throughput tokens/s ↑"][:2] == ("20,000", "")
