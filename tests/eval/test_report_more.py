"""Robustness, campaign cost, the human study, exports, --live and --compare, from invented numbers."""

import csv
import io
import json
import os
import re
import socket
import subprocess
import threading
import time

import pytest
from invented_runs import arms_of, falling, write_run
from refusals import refused

from eval.report import build as rp
from eval.report import export, plots, terminal
from eval.report.charts import log_ticks
from eval.report.robustness import robustness_table, settings
from eval.stats import proportion_interval


def cells(table) -> list[list[str]]:
    return [[cell.text for cell in row] for row in table.rows]


def test_the_advantage_is_counted_setting_by_setting(tmp_path):
    """DPSM beside CE at three learning rates: a lower NLL at two of them, a lower ECE at one."""
    found = {1e-3: (-0.1, 0.01), 2e-3: (-0.2, 0.02), 3e-3: (0.3, -0.03)}
    folders = []
    for lr, deltas in found.items():
        for loss in ("ce", "dpsm"):
            nll, ece = deltas if loss == "dpsm" else (0, 0)
            for seed in (1, 2):
                config = {"loss": loss, "lr": lr, "seed": seed, "warmup": 0.3 if loss == "dpsm" else 0.1}
                summary = {"val_nll": 3.0 + nll + 0.01 * seed, "val_ece10": 0.05 + ece}
                folders.append(write_run(tmp_path / f"{len(folders)}", config=config, summary=summary))
    found = settings(arms_of(*folders))
    assert list(found) == ["dpsm"] and [where for where, *_ in found["dpsm"]] == ["lr 0.001", "lr 0.002", "lr 0.003"]
    table = robustness_table(found["dpsm"])
    names = [cell.text for cell in table.head]
    nll, ece = names.index("NLL"), names.index("ECE")
    assert [(row[nll].text, row[nll].sub) for row in table.rows[:3]] == [
        ("-0.1000 ± 0.0000", "better"),
        ("-0.2000 ± 0.0000", "better"),
        ("+0.3000 ± 0.0000", "worse"),
    ]
    low, high = proportion_interval(2, 3)
    assert table.foot == 1 and table.rows[3][nll].text == "2 of 3" and table.rows[3][ece].text == "1 of 3"
    assert table.rows[3][nll].sub == f"67 % [{100 * low:.0f}, {100 * high:.0f}]"
    assert settings(arms_of(*folders[:4])) == {}  # one setting is no robustness


CAMPAIGN = {
    "runs": {
        "a": {"state": "finished", "seconds": 1234.4, "exit": 0, "why": None},
        "b": {"state": "failed", "seconds": 5, "exit": 137, "why": "killed <b>"},
        "c": {"state": "waiting", "seconds": 0, "exit": None, "why": None},
    },
    "gpu_hours": None,
    "hours": 1.5,
    "budget_hours": 2.25,
}


def test_what_the_campaign_cost_is_shown_where_its_file_lies(tmp_path):
    run = write_run(tmp_path / "a", summary={})
    assert not any(block[1] == "Campaign" for block in rp.build([run]).blocks)
    (tmp_path / "campaign.json").write_text(json.dumps(CAMPAIGN))
    blocks = rp.build([run]).blocks
    at = blocks.index(("h", "Campaign"))
    says = (
        f"{tmp_path.as_posix()}: 3 runs, 1 finished, 1 failed, 1 waiting; 1.50 hours, - GPU hours of a budget of 2.25."
    )
    assert blocks[at + 1] == ("p", says)
    assert cells(blocks[at + 3][1]) == [
        ["a", "finished", "-", "1,234", "0"],
        ["b", "failed", "killed <b>", "5", "137"],
        ["c", "waiting", "-", "0", "-"],
    ]
    for broken in ("[]", '{"runs": [1]}', '{"runs": {"a": 3}}', "{"):
        (tmp_path / "campaign.json").write_text(broken)
        with pytest.raises(ValueError, match="campaign.json"):
            rp.build([run])


def test_the_human_study_stands_beside_the_metrics(tmp_path):
    run = write_run(tmp_path / "a", summary={})
    result = {"question": "fluent?", "first": "ce", "second": "dpsm", "rate": 0.7, "low": 0.55, "high": 0.82, "won": 6}
    result |= {"lost": 2, "votes": 20, "scores": {str(i): 0.5 for i in range(10)}, "holm": 0.031, "alpha": None}
    (tmp_path / "tally.json").write_text(json.dumps({"results": [result]}))
    key = {"study": "s", "arms": ["ce", "dpsm"], "questions": ["better?"]}
    key["items"] = [{"item": f"i{k}", "id": f"{k}", "left": k % 2, "right": 1 - k % 2} for k in range(4)]
    votes = [{"item": f"i{k}", "question": "better?", "choice": "left", "seconds": 2.0} for k in range(3)]
    (tmp_path / "KEY.json").write_text(json.dumps(key))
    (tmp_path / "votes.json").write_text(json.dumps({"study": "s", "rater": "one", "votes": votes}))
    blocks = rp.build([run], votes=[tmp_path / "tally.json", tmp_path / "votes.json"]).blocks
    table = blocks[blocks.index(("h", "Human study")) + 1][1]
    first, second = table.rows
    assert [c.text for c in first] == ["fluent?", "ce over dpsm", "70.0", "6", "2", "2", "20", "0.031", "-"]
    assert first[2].sub == "[55.0, 82.0]" and first[2].tone == "good"
    # ce is left in the items 0 and 2, right in 1: two of three
    assert [c.text for c in second][:7] == ["better?", "ce over dpsm", "66.7", "2", "1", "0", "3"]
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="other.json is no tally and no votes"):
        rp.build([run], votes=[tmp_path / "other.json"])


def test_exports_hold_every_run_and_what_latex_can_set(tmp_path):
    folders = [
        write_run(tmp_path / f"r{s}", config={"seed": s, "loss": "50%_off & more"}, summary={"val_nll": 3 + s / 10})
        for s in (1, 2)
    ]
    folders.append(write_run(tmp_path / "going", config={"loss": "brier"}))
    arms = arms_of(*folders)
    rows = list(csv.DictReader(io.StringIO(export.csv_text(arms))))
    nll = {row["seed"]: float(row["value"]) for row in rows if (row["set"], row["metric"]) == ("val", "nll")}
    assert nll == {"1": 3.1, "2": 3.2} and {row["arm"] for row in rows} == {"50%_off & more"}
    assert [row["value"] for row in rows if row["metric"] == "temperature"] == ["1.1", "1.1"]
    assert len({(row["run"], row["set"], row["metric"]) for row in rows}) == len(rows)
    text = export.latex(arms, rp.SPLIT_NAMES)
    assert r"50\%\_off \& more" in text and r"3.1500 {\scriptsize $\pm$ 0.0707}" in text
    assert not re.search(r"(?<!\\)[%_#]", re.sub(r"^%.*", "", text)) and text.count(r"\toprule") == 2
    for line in (line for line in text.splitlines() if line.endswith(r" \\")):
        columns = len(re.split(r"(?<!\\)&", line))
        assert columns in {len(re.search(r"tabular\}\{(\w+)\}", part)[1]) for part in text.split("\\end{table}")[:2]}


def test_a_logarithmic_axis_has_ticks_from_end_to_end():
    assert log_ticks(106, 530) == [120, 150, 200, 250, 300, 400, 500]  # CE ends at 113, where no tick was below 200
    assert log_ticks(1, 1e6) == [1, 10, 100, 1000, 10000, 100000, 1000000]
    assert log_ticks(2.25, 2.85) == pytest.approx([2.3, 2.4, 2.5, 2.6, 2.7, 2.8])
    for low, high in ((3.01, 3.02), (1e-7, 3e-3), (40, 43_000)):
        ticks = log_ticks(low, high)
        assert 5 <= len(ticks) <= 25 and low <= ticks[0] < low * (high / low) ** 0.4, (low, high, ticks)


def test_live_writes_again_until_every_run_has_ended(tmp_path, capsys, monkeypatch):
    picture = plots.Picture(b"")
    picture.svg = b""
    for name in ("draw", "reliability"):  # which take seconds, and are tested elsewhere
        monkeypatch.setattr(plots, name, lambda *about: picture)
    done = write_run(tmp_path / "done", summary={})
    going = write_run(tmp_path / "going", config={"seed": 2}, curve=falling(30)[:4])
    late, page = tmp_path / "late", tmp_path / "out/report.html"
    pages = []

    def others():
        while not page.exists():
            time.sleep(0.02)
        pages.append(page.read_text())
        write_run(late, config={"seed": 3}, curve=falling(30)[:2])
        (tmp_path / "campaign.json").write_text(json.dumps(CAMPAIGN | {"runs": {"late": {"state": "pruned"}}}))
        (going / "summary.json").write_text((done / "summary.json").read_text())

    thread = threading.Thread(target=others)
    thread.start()
    runs = [str(done), str(going), str(late)]
    assert terminal.main([*runs, "--out", str(tmp_path / "out"), "--live", "1"]) == 0
    thread.join()
    assert 'http-equiv="refresh" content="1"' in pages[0] and "2 runs (1 finished)" in pages[0]
    assert 'http-equiv="refresh"' not in page.read_text() and "3 runs (2 finished)" in page.read_text()
    said = [line for line in capsys.readouterr().err.splitlines() if "runs ended" in line]
    assert said[0] == "1 runs ended, 1 going on, 1 not begun" and said[-1] == "3 runs ended, 0 going on, 0 not begun"


def test_live_ends_where_runs_were_stopped(tmp_path, capsys, monkeypatch):
    """A run whose process is gone, and one that a campaign which is gone had not begun; not while it goes on."""
    monkeypatch.setattr(terminal, "write", lambda report, out, refresh=0: written.append(refresh))
    written, out = [], ["--out", str(tmp_path / "out"), "--live", "1"]
    gone = subprocess.Popen(["true"])
    gone.wait()
    stopped = write_run(tmp_path / "stopped", config={"seed": 2}, curve=falling(30)[:4])
    lock = {"host": socket.gethostname(), "process": gone.pid, "since": "then"}
    (stopped / "lock").write_text(json.dumps(lock))
    assert terminal.main([str(write_run(tmp_path / "done", summary={})), str(stopped), *out]) == 0
    said = capsys.readouterr().err
    assert "1 runs ended, 0 going on, 0 not begun, 1 stopped\n" in said and written == [0]
    assert f"stopped before their end: {stopped}; --resume or their campaign goes on" in said
    assert not terminal.left(tmp_path / "done")  # of which nothing is known
    for other in ({"host": "elsewhere"}, {"process": os.getpid()}, {"process": None}):
        (stopped / "lock").write_text(json.dumps(lock | other))
        assert not terminal.left(stopped)
    (stopped / "lock").write_text(json.dumps(lock))
    (tmp_path / "lock").write_text(json.dumps(lock | {"process": os.getpid()}))
    assert not terminal.left(stopped) and not terminal.left(tmp_path / "late")
    (tmp_path / "lock").write_text(json.dumps(lock))
    assert terminal.left(stopped) and terminal.left(tmp_path / "late")
    refused(capsys, "no run has begun", lambda: terminal.main([str(tmp_path / "late"), *out]), tmp_path / "out")


def kept(run, text, commit, **summary):
    folder = write_run(
        run, config={"lr": 0.1 if commit == "a" else 0.2}, summary=summary, env={"git_commit": commit * 40}
    )
    (folder / "source").mkdir()
    (folder / "source" / "train.py").write_text(text)
    return folder


def test_two_runs_are_compared_in_settings_code_place_and_results(tmp_path, capsys):
    a = kept(tmp_path / "a", "x = 1\ny = 2\n", "a", val_nll=3.0, val_accuracy=0.3)
    b = kept(tmp_path / "b", "x = 1\ny = 3\n", "b", val_nll=2.9, val_accuracy=0.25)
    assert terminal.main(["--compare", str(a), str(b)]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "lr 0.1 0.2" in lines and not any(line.startswith("warmup ") for line in lines)
    assert "commit A aaaaaaaaaaaa, B bbbbbbbbbbbb" in lines and "-y = 2" in lines and "+y = 3" in lines
    assert lines[lines.index("place") + 1] == "no difference"
    assert "val NLL, nats per token 3.0000 2.9000 -0.1000 better" in lines
    assert "val Accuracy, % 30.00 25.00 -5.00 worse" in lines
    assert terminal.main(["--compare", str(a), str(a)]) == 0
    assert capsys.readouterr().out.count("no difference") == 2
    for bad in (["--compare", str(a), str(tmp_path)], ["--compare", str(a), str(b), "--out", "x"], [str(a)]):
        with pytest.raises(SystemExit) as e:
            terminal.main(bad)
        assert e.value.code == 2 and capsys.readouterr().err.count("\n") == 1
