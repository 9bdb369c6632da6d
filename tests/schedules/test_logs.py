"""Logs that people have, as curves: each format as it is written, what is mended and counted, what is refused."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from other_logs import event_file, trackio

from schedules.__main__ import main
from schedules.backtest import fot_at, read_all
from schedules.logs import Curve, log_files, read_curves
from schedules.predict import followed
from schedules.rules import lr_factor


def lines(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def one(path, **columns):
    curves = read_curves(path, **columns)
    assert len(curves) == 1
    return curves[0]


def check(curve, steps, losses, lrs=None):
    assert curve.step.tolist() == steps and curve.loss.tolist() == losses
    assert (None if curve.lr is None else curve.lr.tolist()) == lrs


def test_trainer_state(tmp_path):
    history = [
        {"epoch": 0.02 * i, "grad_norm": 1.0, "learning_rate": 1e-4 / i, "loss": 3 - i / 10, "step": 10 * i}
        for i in (1, 2, 3)
    ]
    history += [{"epoch": 0.06, "eval_loss": 2.5, "eval_runtime": 3.0, "step": 30}, {"train_loss": 2.8, "step": 30}]
    state = {"log_history": history, "max_steps": 1500, "num_train_epochs": 3, "global_step": 30}
    curve = one(lines(tmp_path / "run" / "trainer_state.json", state))
    check(curve, [10, 20, 30], [2.9, 2.8, 2.7], [1e-4, 5e-5, 1e-4 / 3])
    assert curve.epoch == pytest.approx(500) and curve.total == 1500 and curve.name == "run"
    check(
        one(tmp_path / "run" / "trainer_state.json", loss="grad_norm"), [10, 20, 30], [1, 1, 1], [1e-4, 5e-5, 1e-4 / 3]
    )
    endless = json.dumps(state).replace('"epoch": 0.02', '"epoch": Infinity', 1)
    assert one(lines(tmp_path / "endless" / "trainer_state.json", endless)).epoch == pytest.approx(500)
    nan = json.dumps(state).replace("2.8,", "NaN,", 1)
    curve = one(lines(tmp_path / "nan" / "trainer_state.json", nan))
    assert np.isnan(curve.loss[1]) and curve.notes == ("1 not finite",)


def test_llama_factory(tmp_path):
    rows = [
        {
            "current_steps": 10 * i,
            "total_steps": 90,
            "loss": 2 - i / 10,
            "lr": 1e-5 * i,
            "epoch": 0.3 * i,
            "percentage": 1.0,
        }
        for i in (1, 2, 3)
    ]
    rows.append({"current_steps": 30, "total_steps": 90, "eval_loss": 1.5, "epoch": 0.9})
    curve = one(lines(tmp_path / "x" / "trainer_log.jsonl", *rows))
    check(curve, [10, 20, 30], [1.9, 1.8, 1.7], [1e-5, 2e-5, 1e-5 * 3])
    assert curve.total == 90 and curve.epoch == pytest.approx(100 / 3) and curve.notes == ()


def test_wandb_csv(tmp_path):
    head = '"Step","sun-1 - train/loss","sun-1 - train/loss__MIN","sun-1 - train/loss__MAX"'
    check(one(lines(tmp_path / "a.csv", "\ufeff" + head, "10,3.0,2,4", "20,2.5,2,4")), [10, 20], [3.0, 2.5])
    head = '"Step","sun-1 - train/loss","sun-1 - train/loss__MIN","moon-2 - train/loss","moon-2 - train/loss__MAX"'
    path = lines(tmp_path / "b.csv", head, '10,3.0,2,"",', '20,2.5,2,"4.5",5', '30,,,"4.0",5')
    sun, moon = read_curves(path)
    check(sun, [10, 20], [3.0, 2.5])
    check(moon, [20, 30], [4.5, 4.0])
    assert (sun.name, moon.name) == ("b:sun-1", "b:moon-2")
    check(one(path, run="moon-2"), [20, 30], [4.5, 4.0])
    with pytest.raises(ValueError, match="no run 'mars', there are .*sun-1, moon-2"):
        read_curves(path, run="mars")


def test_tensorboard_csv_and_event_files(tmp_path, monkeypatch):
    check(one(lines(tmp_path / "a.csv", "Wall time,Step,Value", "1.5,10,3.0", "2.5,20,2.0")), [10, 20], [3.0, 2.0])
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "tensorboard.backend.event_processing.event_file_loader", None)
        with pytest.raises(ValueError, match="pip install tensorboard, or export CSV"):
            read_curves(lines(tmp_path / "events.out.tfevents.1.host", ""))
    file = event_file(tmp_path / "events.out.tfevents.2.host")
    check(one(file), [1, 2, 3], [3.0, 2.0, 1.0], [0.125] * 3)


def test_an_event_file_ends_early_or_is_damaged(tmp_path):
    """A half-written last event is left out; a damaged one is not taken for the end."""
    file = event_file(tmp_path / "events.out.tfevents.1.host")
    raw = file.read_bytes()
    file.write_bytes(raw[:-9])
    assert list(one(file).step) == [1, 2]
    for at in (275, 276, 283, 290, 313):  # of the last event its length, twice, a checksum, its value, a checksum
        file.write_bytes(raw[:at] + bytes([raw[at] ^ 64]) + raw[at + 1 :])
        with pytest.raises(ValueError, match=r"event 8, at byte 275, is damaged"):
            read_curves(file)


def test_trackio(tmp_path):
    rows = [
        (run, step, json.dumps({"train/loss": loss, "lr": 0.1})) for run in "ab" for step, loss in ((1, 3.0), (2, 2.0))
    ]
    a, b = read_curves(trackio(tmp_path / "p.db", *rows))
    check(a, [1, 2], [3.0, 2.0], [0.1, 0.1])
    assert (a.name, b.name) == ("p:a", "p:b")
    with pytest.raises(ValueError, match="row 1: its metrics are not a JSON object"):
        read_curves(trackio(tmp_path / "q.db", ("a", 1, "{")))
    damaged = tmp_path / "s.db"
    for name in (b"m\xd1trics", b"metr\nics"):  # the latter in the library's own words
        damaged.write_bytes(
            (tmp_path / "p.db").read_bytes().replace(b"tablemetricsmetrics", b"table" + name + b"metrics")
        )
        with pytest.raises(ValueError, match="not a project of trackio") as error:
            read_curves(damaged)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="not a project of trackio"):
        read_curves(lines(tmp_path / "r.db", "step,loss"))


def test_llm_c_and_lightning(tmp_path):
    log = lines(
        tmp_path / "main.log", "s:0 tel:10.95", "s:1 trl:10.9 lr:0.0001 norm:3.1", "s:2 trl:10.5 lr:0.0002 norm:3.0"
    )
    check(one(log), [1, 2], [10.9, 10.5], [0.0001, 0.0002])
    with pytest.raises(ValueError, match=r"line 2: 'step 3', expected llm.c's"):
        read_curves(lines(tmp_path / "x" / "main.log", "s:0 trl:3", "step 3"))
    # Lightning: learning rates and validations in rows of their own.
    head = "epoch,lr-AdamW,step,train_loss_step,val_loss"
    csv = lines(tmp_path / "metrics.csv", head, ",0.1,0,,", "0,,1,3.0,", ",0.3,2,,", "0,,2,2.5,", "0,,2,,2.8")
    check(one(csv), [1, 2], [3.0, 2.5], [0.2, 0.3])


def test_our_run_folders(tmp_path):
    rows = [{"kind": "train", "step": s, "loss": 3 - s / 100, "nll": 3.0, "lr": 0.1} for s in range(1, 40)]
    rows.insert(0, {"kind": "fot", "step": 5, "lr": 0.7})
    rows.insert(5, {"kind": "val", "step": 5, "nll": 2.0})
    file = lines(tmp_path / "run7" / "metrics.jsonl", *rows)
    lines(tmp_path / "run7" / "config.json", {"steps": 100})
    assert log_files([tmp_path]) == [file]
    curve = one(file)
    assert len(curve.step) == 39 and (curve.loss == 3.0).all() and (curve.lr == 0.1).all()  # nll before a mixed loss
    assert curve.name == "run7" and curve.total == 100
    assert one(file, loss="loss").loss[0] == 2.99


@pytest.mark.parametrize(
    "config, trained",
    [
        ({"init_from": "runs/start"}, True),  # train_lm.py
        ({"init_from": ""}, False),
        ({"random_start": True, "size": "bart-tiny"}, False),  # finetune_seq2seq.py
        ({"random_start": False, "model": "facebook/bart-base"}, True),
        ({"model": "Qwen/Qwen3-0.6B", "adapter": ""}, True),  # finetune_gsm8k.py
        ({"model": "gpt2"}, None),
    ],
)
def test_a_run_of_ours_says_whether_it_began_from_trained_weights(tmp_path, config, trained):
    lines(tmp_path / "run" / "metrics.jsonl", *({"step": i, "loss": 7.5 - 0.01 * i} for i in range(1, 101)))
    (curve,) = read_curves(tmp_path / "run" / "metrics.jsonl")
    assert curve.finetune is None
    lines(tmp_path / "run" / "config.json", config | {"steps": 200})
    (curve,) = read_curves(tmp_path / "run" / "metrics.jsonl")
    assert curve.finetune is trained and curve.total == 200
    held = fot_at(curve._replace(finetune=None), 0.5, planned=False, prior=None).mean
    assert (fot_at(curve, 0.5, planned=False, prior=None).mean != held) == (trained is True)


def test_the_last_checkpoint_of_a_trainer_is_its_log(tmp_path):
    state = {"log_history": [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}]}
    for name in ("a/checkpoint-90", "a/checkpoint-100", "b/checkpoint-5", "b"):
        lines(tmp_path / name / "trainer_state.json", state)
    found = {str(p.parent.relative_to(tmp_path)) for p in log_files([tmp_path])}
    assert found == {os.path.join("a", "checkpoint-100"), "b"}
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no logs in this folder"):
        log_files([tmp_path / "empty"])


def test_a_resumed_run_repeats_steps_and_doubled_ones_count_once(tmp_path):
    steps = [1, 2, 3, 4, 5, 3, 4, 5, 5, 6]
    curve = one(lines(tmp_path / "a.jsonl", *({"step": s, "loss": 10.0 * i} for i, s in enumerate(steps))))
    check(curve, [1, 2, 3, 4, 5, 6], [0, 10, 50, 60, 80, 90])
    assert curve.notes == ("1 doubled", "3 repeated after a restart")
    curve = one(lines(tmp_path / "b.csv", "step,loss", "1,3", ",2.5", "2,", "3,NaN", "4,inf", "5,2"))
    assert curve.step.tolist() == [1, 3, 4, 5] and curve.notes == ("1 without a step", "2 not finite")


def test_mixed_runs_are_told_apart_or_refused(tmp_path):
    rows = [{"step": s, "loss": 3.0 + r, "run": f"r{r}"} for s in range(1, 30) for r in (0, 1)]
    zero, first = read_curves(lines(tmp_path / "a.jsonl", *rows))
    assert len(zero.step) == 29 and zero.loss[0] == 3.0 and first.loss[0] == 4.0 and first.name == "a:r1"
    for row in rows:
        del row["run"]
    rows = [row for row in rows if row["step"] > 1 or row["loss"] == 3.0]  # interleaved, from different steps
    rows.sort(key=lambda row: row["step"] + (0 if row["loss"] == 3.0 else 2.5))
    with pytest.raises(ValueError, match="goes back .* times: several runs in one file; add a column run"):
        read_curves(lines(tmp_path / "b.jsonl", *rows))
    again = [{"step": s, "loss": 3.0} for s in (*range(5, 30), *range(5, 30))]
    with pytest.raises(ValueError, match="line 26: step 5 after step 29, back at the beginning: several runs"):
        read_curves(lines(tmp_path / "c.jsonl", *again))


def test_columns_can_be_named(tmp_path):
    path = lines(tmp_path / "a.csv", "t,loss,mine,rate,step", "1,9,3,.1,7", "2,9,2,.2,8")
    check(one(path, step="t", loss="mine", lr="rate"), [1, 2], [3, 2], [0.1, 0.2])
    check(one(path), [7, 8], [9, 9])
    with pytest.raises(ValueError, match="no column 'eta' for the learning rate"):
        read_curves(path, lr="eta")


@pytest.mark.parametrize(
    "name, text, says",
    [
        ("a.csv", "step,loss\n1,2\n2,x\n", "line 3: loss is 'x', expected a number"),
        ("a.csv", "step,loss\n1,2\n2\n", "line 3: 1 values, expected the 2"),
        ("a.csv", "step,loss\n1,2\n1,2\n", "1 points of loss, expected at least 2"),
        ("a.csv", "step,loss,lr\n1,2,-1\n", "line 2: learning rate -1.0"),
        ("a.csv", "step,loss\ninf,2\n", "line 2: step inf"),
        ("a.csv", "step,what\n1,2\n", "columns step, what; expected step and a loss"),
        ("a.csv", "step,loss\n", "no rows"),
        ("a.csv", "", "no rows"),
        ("a.csv", "step,loss\n1,2\n2,nan\n", "the final loss is nan"),
        ("a.jsonl", '{"step": 1, "loss": 2}\n{"step": 2, \n', "line 2: not JSON"),
        ("a.jsonl", '{"step": 1, "loss": 2}\n[1, 2]\n', "line 2: '[1, 2]' is not an object"),
        ("a.jsonl", '{"step": 1, "loss": 2}\n{"step": 2, "loss": [1]}\n', "line 2: loss is '[1]'"),
        ("a.jsonl", '{"step": 1, "loss": 2}\n{"step": 2, "loss": true}\n', "line 2: loss is 'True'"),
        ("a.jsonl", '{"step": 1, "loss": 2}\n\x00\x00\n', "line 2: "),
        ("trainer_state.json", '{"log_history": 3}', "log_history is not a list of objects"),
        ("trainer_state.json", '{"log_history": [}', "not JSON"),
        ("trainer_state.json", "[1]", "expected an object"),
        ("main.log", "s:0 trl:x\n", "line 1: trl is 'x'"),
    ],
)
def test_a_broken_log_is_one_line_and_exit_2(tmp_path, capsys, name, text, says):
    (tmp_path / name).write_text(text)
    for command in (["backtest"], ["forecast", "--at", "9"]):
        if "final loss" in says and command[0] == "forecast":
            continue
        with pytest.raises(SystemExit) as stop:
            main([command[0], str(tmp_path / name), *command[1:], "--out", str(tmp_path / "out")])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and says in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_in_a_folder_files_without_a_curve_are_passed_over_and_said(tmp_path, capsys):
    lines(tmp_path / "good.csv", "step,loss", "1,3", "2,2")
    lines(tmp_path / "sub" / "table.csv", "name,value", "a,1")
    assert [curve.name for curve in read_all([str(tmp_path)])] == ["good"]
    assert "passed over" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no curve in any of 1 files"):
        read_all([str(tmp_path / "sub")])
    lines(tmp_path / "lost.csv", "step,loss", "1,3", "2,nan")
    main(["backtest", str(tmp_path), "--out", str(tmp_path / "out")])
    assert "lost: 1 not finite, passed over, the final loss is nan" in capsys.readouterr().out


def test_the_forecast_command(tmp_path, capsys):
    t = np.arange(1, 300)
    rows = [{"step": int(s), "loss": 2.5 + 4 * (s + 30.0) ** -0.5, "lr": 0.1} for s in t]
    file = str(lines(tmp_path / "a.jsonl", *rows))
    main(["forecast", file, "--at", "1000", "--out", str(tmp_path / "fan.png")])
    held = capsys.readouterr().out
    assert "forecast 2.6" in held and "at step 1000 (68 %); 95 %: 2." in held
    assert (tmp_path / "fan.png").read_bytes()[:4] == b"\x89PNG"
    main(["forecast", file, "--at", "1000", "--schedule", "linear", "--out", str(tmp_path / "fan.png")])
    assert "forecast 2.5" in capsys.readouterr().out  # the decay is in it
    (tmp_path / "fan.png").unlink()
    main(["forecast", file, "--at", "100", "--out", str(tmp_path / "fan.png")])
    assert "no forecast: step 100 has passed" in capsys.readouterr().out and not (tmp_path / "fan.png").exists()
    bare = str(lines(tmp_path / "b.jsonl", *({k: row[k] for k in ("step", "loss")} for row in rows)))
    two = str(lines(tmp_path / "c.jsonl", *({"run": r} | row for row in rows for r in "ab")))
    for flags, says in (
        ([file], "say at which step: --at STEP"),
        ([bare, "--at", "900", "--schedule", "cosine"], "has no learning rates to begin from"),
        ([two, "--at", "900"], "has 2 runs, give the log of one, or --run NAME: a, b"),
        ([file, "--at", "900", "--floor", "2"], "--floor 2.0, expected a share"),
        ([file, "--at", "900", "--epoch", "-1"], "epoch=-1.0"),
        ([file, "--at", "900", "--learn", file], "1 finished runs with a finite loss, at least 2"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["forecast", *flags, "--out", str(tmp_path / "fan.png")])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and says in error and error.count("\n") == 1, error


@pytest.mark.parametrize(
    "name, floor", [("linear", 0.0), ("cosine", 0.0), ("cosine", 0.1), ("wsd", 0.0), ("constant", 0)]
)
def test_a_schedule_is_recognised_by_its_past(name, floor):
    """Of half a run; a constant rate may still come down or not, so nothing is claimed."""
    options = {} if name == "constant" else {"floor": floor}
    lr = np.array([3e-4 * lr_factor(name, s, 1000, warmup=0.1, **options) for s in range(1, 500)])
    found = followed(Curve("a", "", np.arange(1.0, 500.0), np.ones(499), lr), 1000)
    assert found is None if name in ("wsd", "constant") else (found[0], found[1]["floor"]) == (name, floor)
    assert followed(Curve("a", "", np.arange(1.0, 500.0), np.ones(499), lr), 700) is None  # it ends elsewhere


def test_public_fine_tuning_logs_are_read():
    folder = Path(os.environ.get("LM_DATA", "")) / "loss_curves" / "finetuning"
    if not folder.is_dir():
        pytest.skip("LM_DATA is unset or has no loss_curves/finetuning")
    curves = read_all([str(folder)])
    assert len(curves) == 10 and sum(curve.lr is None for curve in curves) == 1
