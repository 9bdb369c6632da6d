"""The run of everything that a device tells: parts in their order, within their time, on file as they come."""

import json
import sys
from types import SimpleNamespace

import pytest

import train_lm
from model import fp8
from races import device, probes
from runtime.cli import parse_config


@pytest.fixture
def args(tmp_path):
    out, work = tmp_path / "out", tmp_path / "work"
    out.mkdir(), work.mkdir()
    return SimpleNamespace(out=out, work=work, seconds=60.0, device="cpu")


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


HANGS = """
import time
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("what there is", flush=True)
    time.sleep(60)
"""


def test_a_part_that_fails_or_hangs_does_not_end_the_run(args, monkeypatch):
    monkeypatch.setitem(device.LIMITS, "paths", 1.0)
    monkeypatch.setattr(device, "LAST_WORDS", 1.0)
    parts = {
        "probes": [python("print('one'); raise SystemExit(3)")],
        "paths": [python(HANGS)],
        "train": [python("print('three')"), python("print('four')")],
    }
    report = device.run_parts(args, parts)
    assert [part["end"] for part in report.values()] == ["exit code 3", "stopped at its limit", "done"]
    assert report["paths"]["seconds"] < 10
    log = (args.out / "log.txt").read_text()
    wanted = ["one", "=== paths", "what there is", "=== train", "three", "four"]
    assert sorted(wanted, key=log.index) == wanted
    assert json.loads((args.out / "parts.json").read_text())["parts"] == report


def test_what_runs_of_whole_scripts_leave_is_kept(args):
    for name in ("run", "run-wide"):
        (args.work / name).mkdir()
        (args.work / name / "summary.json").write_text(f'{{"name": "{name}"}}\n')
    device.run_parts(args, {"probes": [python("print(1)")], "train": [python("print(2)")]})
    kept = [json.loads(line) for line in (args.out / "results.jsonl").read_text().splitlines()]
    assert [(k["part"], k["file"]) for k in kept] == [("train", f"{n}/summary.json") for n in ("run", "run-wide")]
    assert json.loads(kept[1]["text"])["name"] == "run-wide"


def test_what_no_time_is_left_for_is_said(args):
    args.seconds = 0.0
    assert device.run_parts(args, {"train": [python("print(1)")]})["train"]["end"] == "no time left"


def test_all_parts_run_on_a_cpu_in_their_smallest_shapes(tmp_path, monkeypatch):
    """One of them whole; the training run's flags as its script reads them."""
    out, work = tmp_path / "out", tmp_path / "work"
    where = ["--out", str(out), "--work", str(work), "--device", "cpu", "--tiny"]
    assert device.main([*where, "--only", "fot"]) == 0
    assert {p.name for p in out.iterdir()} == {"log.txt", "parts.json", "fot.csv"}
    how = SimpleNamespace(out=out, work=work, data=None, tokenizer=None, nanogpt=None, tests="")
    for how.device, how.tiny in (("cpu", True), ("cuda", False)):
        parts = device.commands(how)
        runs = [parse_config(train_lm.Config, line[2:], complete=train_lm.complete) for line in parts["train"]]
        assert [run.loss for run in runs] == ["dpsm", "dpsm"] and runs[0].micro_batch < runs[1].micro_batch
    assert {*parts} - {"ncu"} == {*device.LIMITS} - {"nanogpt", "ncu"}


def test_nsight_compute_is_a_part_where_it_is_installed(tmp_path, monkeypatch):
    how = SimpleNamespace(out=tmp_path, work=tmp_path, data=None, tokenizer=None, nanogpt=None, tests="", tiny=False)
    how.device = "cuda"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "ncu" not in device.commands(how)
    (tmp_path / "ncu").write_text("")
    (tmp_path / "ncu").chmod(0o755)
    (line,) = device.commands(how)["ncu"]
    assert line[0] == str(tmp_path / "ncu") and line[line.index(sys.executable) :][1:3] == ["-m", "races.probes"]
    how.device = "cpu"
    assert "ncu" not in device.commands(how)


def test_probes_are_lines_on_file(tmp_path, monkeypatch, capsys):
    def broken(bench):
        yield "first", 12.345678, "ms"
        raise ValueError("no such device")

    monkeypatch.setitem(probes.PROBES, "ties", broken)
    file = tmp_path / "probes.jsonl"
    assert probes.main(["--device", "cpu", "--only", "ties,host", "--jsonl", str(file)]) == 1
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["probe"] for row in rows] == ["ties", "ties", "host", "host"]
    assert rows[0]["value"] == 12.35 and rows[1]["unit"] == "ValueError: no such device" and rows[2]["value"] > 0
    assert all(row["device"] and row["date"] for row in rows)
    assert capsys.readouterr().out.count("\n") == 4
    file.unlink()
    assert probes.main(["--device", "cpu", "--only", "ties,host", "--jsonl", str(file), "--rows", "1"]) == 0
    assert [json.loads(line)["case"] for line in file.read_text().splitlines()] == ["first"]
    assert "--rows: 2, the first of them what ties has beyond first" in capsys.readouterr().err


def test_probes_of_the_kernels_run(capsys):
    assert probes.main(["--device", "cpu", "--only", "ties,passes,layers"]) == 0
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    cases = {row["case"] for row in shown}
    assert {"V=130, 1% tied", "V=258, of a copy", "V=130, rescale by 1", "V=258, gradient"} <= cases
    assert {"norm, torch, forward", "queries, triton, backward", "SwiGLU, triton, backward, the host"} <= cases


def test_a_block_is_probed_with_its_products_in_fp8_and_without(monkeypatch, capsys):
    linear, widths = fp8.linear, set()
    monkeypatch.setattr(fp8, "linear", lambda x, w, b: widths.add(tuple(w.shape)) or linear(x, w, b))
    assert probes.main(["--device", "cpu", "--only", "fp8"]) == 0
    assert widths == {(192, 64), (64, 64), (256, 64), (64, 256)}
    shown = {row["case"]: row["value"] for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert {*shown} == {f"64 wide, {what}, {how}" for what in ("product", "block") for how in ("bf16", "FP8")}
    assert all(value > 0 for value in shown.values())


def test_packed_rows_are_probed_with_a_mask_where_there_is_no_varlen_attn(capsys):
    assert probes.main(["--device", "cpu", "--only", "attention"]) == 0
    said = capsys.readouterr()
    assert "attention, no varlen_attn: tensors are on cpu\n" in said.err
    cases = {row["case"] for row in map(json.loads, said.out.splitlines())}
    assert {f"1 x 24 tokens, 2 documents, mask, {job}" for job in ("forward", "step", "step, the host")} <= cases


@pytest.mark.parametrize("command, flags", [(probes, ["--only", "tie"]), (device, ["--only", "clams", "--out", "x"])])
def test_unknown_names_are_one_line(command, flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        code = command.main(["--device", "cpu", *flags])
    except SystemExit as e:
        code = e.code
    assert code == 2 and capsys.readouterr().err.strip().count("\n") == 0
    assert not (tmp_path / "x").exists()
