"""A report is built of the tables, grids and figures that its runs call for, and is written whole."""

import json
import math

import pytest
from invented_runs import SUMMARY, arms_of, write_run

from eval.report import build as rp
from eval.report import plots, tables


def test_a_grid_is_drawn_for_exactly_two_numeric_settings(tmp_path):
    def arms(name, configs):
        return arms_of(*(write_run(tmp_path / name / str(i), config=c, summary={}) for i, c in enumerate(configs)))

    two = arms("two", [{"loss": "dpsm", "lr": lr, "warmup": w} for lr in (1e-3, 2e-3) for w in (0.1, 0.3)])
    ((loss, x, y, cells, split),) = rp.grids(two)
    assert (loss, x, y, split) == ("dpsm", "warmup", "lr", "val") and set(cells) == {
        (0.1, 1e-3),
        (0.1, 2e-3),
        (0.3, 1e-3),
        (0.3, 2e-3),
    }
    assert cells[0.1, 1e-3] == {"ppl": pytest.approx(30.0, rel=1e-4), "ece10": 0.04}  # falling() ends near 30
    assert plots.heat_maps(loss, x, y, cells).startswith(b"\x89PNG")
    assert not rp.grids(arms("unset", [{"lr": lr, "clip": c} for lr in (1e-3, 2e-3) for c in (None, 1.0)]))
    assert not rp.grids(arms("one", [{"lr": lr} for lr in (1e-3, 2e-3)]))
    assert not rp.grids(arms("words", [{"lr": lr, "tokenizer": t} for lr in (1e-3, 2e-3) for t in ("gpt2", "bpe:64")]))


def test_three_settings_of_summaries_make_a_grid_for_each_value_of_the_third(tmp_path):
    """recipes/seq2seq.toml's axes: ROUGE, ECE and NLL over learning rate and warm-up, one figure a label smoothing."""
    folders = []
    for lr in (1e-5, 3e-5, 5e-5):
        for eps in (0.0, 0.1):
            for w in (0.1, 0.2, 0.3):
                config = {"loss": "dpsm", "label_smoothing": eps, "warmup": w, "lr": lr}
                values = SUMMARY | {"val_rouge1": 30 + 1e5 * lr + w + eps}
                folders.append(write_run(tmp_path / f"{len(folders)}", config=config, summary=values))
    found = rp.grids(arms_of(*folders))
    assert [(g[0], g[1], g[2], g[4]) for g in found] == [
        ("dpsm, label_smoothing 0", "warmup", "lr", "val"),
        ("dpsm, label_smoothing 0.1", "warmup", "lr", "val"),
    ]
    for (*_, cells, _), eps in zip(found, (0.0, 0.1), strict=True):
        assert len(cells) == 9 and set(cells[0.2, 3e-5]) == {"rouge1", "rouge2", "rougeL", "rougeLsum", "ece10", "nll"}
        assert cells[0.2, 3e-5]["rouge1"] == pytest.approx(33.2 + eps) and cells[0.2, 3e-5]["ece10"] == 0.04
    assert plots.heat_maps(*found[0][:4], "validation").startswith(b"\x89PNG")
    nothing = {(0.1, 1e-5): {"rouge1": None, "ece10": math.inf}}
    assert plots.heat_maps("dpsm", "warmup", "lr", nothing).startswith(b"\x89PNG")


def test_summaries_have_their_table_and_nothing_empty_is_shown(tmp_path):
    rows = [{"index": i, "prediction": f"it says {i}", "reference": f"it said {i}"} for i in range(5)]
    folders = []
    about = {"train": {"set": "x", "partial": ""}, "test": {"set": "x", "partial": "a sample: 5 of 9 rows"}}
    for loss, ended in (("ce", 1.0), ("dpsm", 0.975)):
        config = {"loss": loss, "model": "", "size": "bart-tiny"}
        values = SUMMARY | {"val_ended": ended, "data": about, "examples_limit": {"val": 200}}
        folders.append(write_run(tmp_path / loss, config=config, summary=values))
        (folders[-1] / "samples.json").unlink()
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folders[-1] / "predictions-val.jsonl").write_text(text)
    report = rp.build(folders)
    arms = report.arms
    assert "Not of whole sets: x test is a sample: 5 of 9 rows; val: the first 200 pairs." in report.warnings
    assert report.blocks[0][1].startswith("bart-tiny on fixture.")
    made = tables.summary_table(arms, "val")
    heads = [(cell.text, cell.sub.split("\u00a0")[0]) for cell in made.head]
    assert ("ROUGE-1", "F1, %") in heads and ("BERTScore", "F1, %") not in heads  # which nobody measured
    cells = dict(zip(heads, made.rows[1], strict=True))
    assert (
        cells["ROUGE-1", "F1, %"][:2] == ("30.00", "29.00 to 31.00") and cells["R1", "as files2rouge"].text == "30.10"
    )
    assert cells["ended", "% of searches"].text == "97.5" and cells["texts", ""].text == "200"
    assert "bits/byte" not in [cell.text for cell in tables.final_table(arms, "val").head]
    assert tables.summary_table(arms, "test") is None
    samples = [block for block in report.blocks if block[0] == "samples"]
    assert samples[0][1] == "reference: it said 0" and len(samples) == 3
    assert not any(
        block[0] == "table"
        and any(c.text == "Distinct-1" for c in block[1].head)
        and block[1].left == 1
        and len(block[1].head) == 3
        for block in report.blocks
    )
    (folders[0] / "predictions-val.jsonl").write_text('{"index": 0}\n')
    with pytest.raises(ValueError, match="predictions-val.jsonl holds no summaries"):
        rp.build(folders)


def test_many_arms_leave_the_best_of_each_loss_in_a_figure(tmp_path):
    configs = [({"lr": lr}, {"val_nll": 3 + lr}) for lr in (1.0, 2.0, 3.0)] + [({"loss": "dpsm"}, {"val_nll": 9.0})]
    arms = arms_of(*(write_run(tmp_path / str(i), config=c, summary=s) for i, (c, s) in enumerate(configs)))
    assert [arm.label for arm in rp.best_arms(arms, 2)] == ["ce lr=1", "dpsm"]
    assert [arm.label for arm in rp.best_arms(arms, 3)] == ["ce lr=1", "ce lr=2", "dpsm"]


def test_a_second_report_replaces_the_first_and_leaves_other_files(undrawn, tmp_path):
    folder, out = write_run(tmp_path / "run", summary={}), tmp_path / "deep/out"
    rp.write(rp.build([folder], "report one"), out)
    (out / "notes.txt").write_text("mine")
    rp.write(rp.build([folder], "report two"), out)
    assert "report two" in (out / "report.html").read_text() and "report one" not in (out / "report.md").read_text()
    assert (out / "notes.txt").read_text() == "mine"
    figures = ("curves", "training", "reliability_val", "bands_val", "forecasts")
    pictures = {f"{name}.{kind}" for name in figures for kind in ("png", "svg")}
    names = {"notes.txt", "report.md", "report.html", "results.csv", "results.tex"} | pictures
    assert {path.name for path in out.iterdir()} == names
