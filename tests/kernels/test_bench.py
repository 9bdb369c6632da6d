"""kernels.bench: what it runs, writes and refuses: logic, not speed."""

import csv
import json
import os
import sys
from types import SimpleNamespace

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from matplotlib.figure import Figure

from kernels import losses
from kernels.bench import compare, diagnostics, paths, timing
from kernels.bench.__main__ import main
from kernels.bench.limits import Limits
from kernels.bench.paths import shapes_of, time_chunks
from kernels.bench.providers import (
    FROM_BF16_HIDDEN,
    FROM_HIDDEN,
    FROM_LOGITS,
    ON_CPU_TOO,
    PEERS_FROM_HIDDEN,
    PEERS_FROM_LOGITS,
    providers,
)
from kernels.bench.rows import Rows, write_plot
from kernels.bench.timing import Shape, make_inputs

# --- the bench itself -----------------------------------------------------------------------------------


def test_bench_writes_its_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(timing, "measure_memory_apart", lambda *args: 4 * 32 * 100)
    files = {k: tmp_path / f"bench.{k}" for k in ("json", "csv", "png")}
    shape = ["--n", "32", "--v", "100", "--d", "8", "--repeats", "1", "--device", "cpu"]
    files_to = ["--json", str(files["json"]), "--csv", str(files["csv"]), "--plot", str(files["png"])]
    assert main([*shape, *files_to]) == 0
    rows = {r["provider"]: r for r in json.loads(files["json"].read_text())}
    assert set(rows) >= {*FROM_LOGITS, *FROM_HIDDEN}
    assert rows["literal DPSM"]["ratio_to_literal"] == 1 and rows["ours DPSM"]["peak_logits"] == 1
    with open(files["csv"]) as file:
        assert [r["provider"] for r in csv.DictReader(file)] == list(rows)
    assert files["png"].read_bytes()[:4] == b"\x89PNG"
    # fp32 against float64: some hundred operations of 2**-24 each.
    assert all(r["gradient_error"] < 1e-5 for r in rows.values() if r.get("gradient_error") is not None)
    assert rows["Liger CE"]["missing"] == "needs CUDA"
    shown = capsys.readouterr().out
    assert "linear_score DPSM, Fisher" in shown and "Liger CE" in shown and "needs CUDA" in shown


def test_the_bench_of_some_providers_in_some_time(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(timing, "measure_memory_apart", lambda *args: 1)
    broken = {**FROM_LOGITS, "ours broken": lambda z, y: 1 / 0}
    monkeypatch.setattr(compare, "providers", lambda *_: (dict(broken), {"Liger CE": "needs CUDA"}))
    file, shape = tmp_path / "bench.csv", ["--n", "8", "--v", "20", "--repeats", "1", "--device", "cpu"]
    assert main([*shape, "--only", "ours", "--csv", str(file)]) == 0
    with open(file) as opened:
        rows = {r["provider"]: r for r in csv.DictReader(opened)}
    assert set(rows) == {name for name in broken if "ours" in name}
    assert (
        rows["ours broken"]["missing"] == "failed: ZeroDivisionError: division by zero" and rows["ours DPSM"]["step_ms"]
    )
    assert main([*shape, "--d", "4", "--only", "literal", "--seconds", "1e-9"]) == 0
    said = capsys.readouterr().err
    assert said == "left out by --seconds or --rows: 2, the first of them literal DPSM, 8 x 20\n"
    assert main([*shape, "--only", "nobody's"]) == 0 and 'nothing has "nobody\'s"' in capsys.readouterr().out


LOSSES = [*FROM_LOGITS, *FROM_HIDDEN, *FROM_BF16_HIDDEN, *PEERS_FROM_LOGITS, *PEERS_FROM_HIDDEN]


@pytest.mark.parametrize(
    "mode, all_rows", [([], len(LOSSES)), (["--audit-2k"], 3 + len(losses.LOSSES)), (["--diagnostics"], 12)]
)
def test_every_mode_ends_with_so_many_rows(mode, all_rows, tmp_path, monkeypatch, capsys):
    def absent(*_):
        raise ImportError

    monkeypatch.setattr(timing, "measure_memory_apart", lambda *args: 1)
    monkeypatch.setattr(diagnostics, "peer", absent)
    files = {k: tmp_path / f"bench.{k}" for k in ("csv", "json")}
    small = [*mode, *"--n 8 --v 20 --d 4 --repeats 1 --device cpu --rows 2".split()]
    assert main([*small, "--csv", str(files["csv"]), "--json", str(files["json"])]) == 0
    with open(files["csv"]) as file:
        times = [r["step_ms"] for r in csv.DictReader(file)]
    assert times == [str(r["step_ms"]) for r in json.loads(files["json"].read_text())] and len(times) == 2
    assert f"left out by --seconds or --rows: {all_rows - 2}, the first of them" in capsys.readouterr().err


def test_a_provider_that_fails_does_not_end_the_others(tmp_path, monkeypatch, capsys):
    """In its first step, or when its memory is measured; the exit code says so."""

    def memory(name, *_):
        if name == "torch CE":
            raise RuntimeError("ended by the system")
        return 1

    monkeypatch.setattr(timing, "measure_memory_apart", memory)
    monkeypatch.setitem(FROM_LOGITS, "ours DPSM", lambda z, y: 1 / 0)
    file = tmp_path / "bench.csv"
    assert main([*"--n 8 --v 20 --repeats 1 --device cpu --csv".split(), str(file)]) == 1
    with open(file) as opened:
        missing = {r["provider"]: r["missing"] for r in csv.DictReader(opened)}
    assert missing["torch CE"] == "failed: RuntimeError: ended by the system"
    assert missing["ours DPSM"] == "failed: ZeroDivisionError: division by zero"
    assert missing["ours DPSM by moments"] == missing["literal DPSM"] == "" and "Traceback" in capsys.readouterr().err


def test_a_shape_that_fails_does_not_end_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "measure_memory_apart", lambda *args: 1)
    logits, make = timing.make_inputs, []

    def inputs(shape, *how):
        make.append(shape)
        if shape.d is None:
            raise torch.OutOfMemoryError("8 GiB")
        return logits(shape, *how)

    monkeypatch.setattr(timing, "make_inputs", inputs)
    file = tmp_path / "bench.csv"
    small = "--n 8 --v 20 --d 4 --repeats 1 --device cpu --only literal --csv".split()
    assert main([*small, str(file)]) == 1
    with open(file) as opened:
        rows = [(r["provider"], r["d"], r["missing"]) for r in csv.DictReader(opened)]
    assert rows == [("all providers", "", "failed: OutOfMemoryError: 8 GiB"), ("linear + literal DPSM", "4", "")]


def test_a_sum_in_bf16_has_its_error_beside_the_one_in_fp32(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "measure_memory_apart", lambda *args: 1)
    small, file = "--n 8 --v 300 --d 16 --repeats 1 --device cpu --csv".split(), tmp_path / "bench.csv"
    for dtype in ("fp32", "bf16"):
        assert main([*small, str(file), "--dtype", dtype, "--only", "linear_score DPSM"]) == 0
        with open(file) as opened:
            rows = {r["provider"]: r for r in csv.DictReader(opened)}
        of_bf16 = rows["linear_score DPSM, bf16 sum"]
        if dtype == "fp32":
            assert of_bf16["missing"] == "needs bf16"
    # With one chunk there is no sum, and they would be equal.
    assert float(rows["linear_score DPSM"]["weight_error"]) < float(of_bf16["weight_error"]) < 0.02


def test_the_benchs_picture_says_whose_bars_they_are_and_times_in_words(tmp_path, monkeypatch):
    same = dict(n=32, v=100, d=0, dtype="float32", device="CPU", torch="2", date="2026-11-27T00:00")
    times = {"literal DPSM": 1580.3, "ours DPSM": 99.96, "Liger CE": 0.04211}
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **how: drawn.append(figure))
    write_plot([same | dict(provider=name, step_ms=ms) for name, ms in times.items()], str(tmp_path / "x.png"))
    texts = [text.get_text().strip() for text in drawn[0].axes[0].texts]
    assert sorted(texts) == sorted(["1,580 ms", "100 ms", "0.0421 ms"])
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["ours", "others"]


def test_audit_of_2000_tokens(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(timing, "measure_memory_apart", lambda *args: 1000)
    file, traces = tmp_path / "audit.csv", tmp_path / "traces"
    small = ["--v", "64", "--d", "8", "--repeats", "1", "--device", "cpu"]
    assert main(["--audit-2k", *small, "--csv", str(file), "--trace", str(traces)]) == 0
    with open(file) as opened:
        rows = {r["loss"]: r for r in csv.DictReader(opened)}
    assert len(rows) == 3 + len(losses.LOSSES) == len(list(traces.iterdir()))
    # Three products of 2000 x 64 x 8, whatever the score; of the rows in the loss alone.
    ignoring = rows.pop("linear_score brier, 3 of 4 rows ignored")
    assert {int(r["flops"]) for r in rows.values()} == {3 * 2 * 2000 * 64 * 8}
    assert int(ignoring["flops"]) == 3 * 2 * 500 * 64 * 8 and ignoring["peak_bytes"] == "1000"
    assert main(["--audit-2k", "--n", "12", *small, "--csv", str(file)]) == 0 and "12 tokens" in capsys.readouterr().out
    assert main(["--nvtx", "--device", "cpu"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_peers_are_named_for_the_kernel_that_runs(monkeypatch):
    """liger-kernel stood in for by one that chooses as 0.8.5 does: an argument, the environment, then CuTe; where CuTe
    cannot, Triton's runs in its place, unless it is strict."""
    ran = []

    def choose(hidden, weight, targets, impl=None):
        impl = impl or os.environ["LIGER_KERNEL_IMPL"] or "nvidia-cutedsl"
        if impl == "nvidia-cutedsl" and len(weight) % 8:
            if os.environ["LIGER_KERNEL_STRICT"] == "1":
                raise RuntimeError("17 is not divisible")
            impl = "nvidia-triton"
        ran.append(impl)
        return FROM_HIDDEN["linear + torch CE"](hidden, weight, targets), None, None, None

    def of_transformers():
        return lambda weight, hidden, targets: choose(hidden, weight, targets)[0]

    def cut(hidden, weight, targets, impl="torch_compile", filter_eps="auto"):
        ran.append((impl, filter_eps))

    monkeypatch.setattr(torch, "compile", lambda function, **how: function)  # importing the compiler takes seconds

    for name in ("LIGER_KERNEL_IMPL", "LIGER_KERNEL_STRICT"):
        monkeypatch.setenv(name, "")  # what the bench sets goes again
    modules = {"liger_kernel": {}, "liger_kernel.functional": dict(fused_linear_cross_entropy=choose)}
    modules["liger_kernel.transformers"] = dict(LigerFusedLinearCrossEntropyLoss=of_transformers)
    modules["cut_cross_entropy"] = dict(linear_cross_entropy=cut)
    for name, parts in modules.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**parts))
    found, _ = providers(True, "cuda")
    triton, cute = (found[f"Liger linear CE, {kernel}"] for kernel in ("Triton", "CuTe"))
    for v in (16, 17):
        leaves, targets = make_inputs(Shape(4, v, 8), "fp32", "cpu")
        missing = compare.drop_failing({"CuTe": cute}, leaves, targets, forward=False)
        assert missing == ({} if v == 16 else {"CuTe": "failed: RuntimeError: 17 is not divisible"})
        triton(*leaves, targets)
    assert ran == ["nvidia-cutedsl", "nvidia-triton", "nvidia-triton"]
    ran.clear()
    for name in ("Cut Cross-Entropy", "Cut Cross-Entropy, no filter"):
        found[name](None, None, None)
    assert ran == [("cce", "auto"), ("cce", None)]


def test_torchs_linear_cross_entropy_is_raced_both_ways_and_compiled_peers_know_v(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **how: compiled.append(how) or function)
    for linear in (False, True):
        providers(linear, "cuda")
    assert compiled == 2 * [dict(dynamic=False)]
    given = []
    monkeypatch.setattr(torch.nn.functional, "linear_cross_entropy", lambda *_, **how: given.append(how))
    found, _ = providers(True, "cpu")
    for name in ("F.linear_cross_entropy, unchunked", "F.linear_cross_entropy, chunked"):
        found[name](None, None, None)
    assert given[0] == {} and isinstance(given[1]["options"], torch.nn.LinearCrossEntropyOptions)


def test_bench_providers_compute_the_same_loss():
    leaves, targets = make_inputs(Shape(16, 50), "fp32", "cpu")
    names = ("literal DPSM", "ours DPSM", "ours DPSM by moments", "ours DPSM in place")
    values = [FROM_LOGITS[n](*leaves, targets).item() for n in names]
    leaves, targets = make_inputs(Shape(16, 50, 8), "fp32", "cpu")
    values2 = [FROM_HIDDEN[n](*leaves, targets).item() for n in ("linear + literal DPSM", "linear_score DPSM")]
    assert max(values) - min(values) < 1e-5 and max(values2) - min(values2) < 1e-5


# --- the bench's other modes ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--paths", "--device", "cpu"], "--paths needs a GPU"),
        (["--claims", "--device", "cpu"], "--claims needs a GPU"),
        (["--audit-2k", "--plot", "x.png"], "--plot is of the bench"),
        (["--diagnostics", "--plot", "x.png"], "--plot is of the bench"),
        (["--train-step-csv", "x.csv"], "--train-step-csv goes with --claims"),
        (["--n", "-1"], "--n -1"),
    ],
)
def test_modes_that_cannot_be_say_so_in_one_line(arguments, message, capsys):
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and message in err


def test_a_peer_that_fails_is_named_and_one_of_ours_is_not_hidden(monkeypatch):
    def fails(*_):
        raise AttributeError("no such kernel\nsecond line")

    def too_large(*_):
        raise torch.OutOfMemoryError("8 GiB")

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    leaves, targets = make_inputs(Shape(4, 9), "fp32", "cpu")
    functions = {"ours CE": FROM_LOGITS["ours CE"], "Liger CE": fails, "literal DPSM": too_large}
    missing = compare.drop_failing(functions, leaves, targets)
    assert missing == {"Liger CE": "failed: AttributeError: no such kernel", "literal DPSM": "out of memory"}
    assert list(functions) == ["ours CE"]
    for ours in (["ours CE"], ["another"]):  # a failure of ours is the run's
        rows = Rows("cpu")
        compare.add_missing(rows, {"ours CE": "failed: AttributeError"}, {}, ours)
        assert rows.failed is (ours == ["ours CE"]) and rows[0]["missing"] == "failed: AttributeError"


def test_rows_are_on_file_as_they_come(tmp_path, monkeypatch):
    # Cut off after the second provider: its row and the first one's are there, whole.
    file, seen = tmp_path / "bench.csv", []

    def memory(name, *_):
        seen.append(name)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return 10**6

    monkeypatch.setattr(timing, "measure_memory_apart", memory)
    with pytest.raises(KeyboardInterrupt):
        main(["--n", "8", "--v", "30", "--d", "4", "--repeats", "1", "--device", "cpu", "--csv", str(file)])
    with open(file) as opened:
        assert [r["provider"] for r in csv.DictReader(opened)] == seen[:2]


def test_every_shape_of_the_score_kernel_gives_the_same_numbers():
    """What --paths forces, by the interpreter: a row held whole, in part, and not at all."""
    triton_impl = pytest.importorskip("kernels.triton_impl")
    if torch.cuda.is_available():
        pytest.skip("the device tests cover it")
    v, knob, dtype = 2900, torch.tensor(0.4), torch.bfloat16
    z = torch.randn(3, v, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = torch.tensor([0, v // 2, v - 1])
    shapes = [triton_impl.score_shape(v, dtype, warps=1, held=held) for held in (25, 9, 3, 0)]
    shapes.append(triton_impl.score_shape(v, dtype, warps=1, held=9, stages=2, hints=True))
    assert [s["MORE"] for s in shapes] == [False, True, True, True, True]
    assert [s["PIECES"] for s in shapes][1:] == [9, 3, 0, 9]
    results = []
    for shape in shapes:
        stats, correct = torch.empty(17, 3), torch.empty(3, dtype=torch.bool)
        loss, fisher, out = torch.empty(3), torch.empty(3), torch.empty_like(z)
        filled = dict(stats=stats, correct=correct, losses=loss, fisher=fisher, out=out)
        triton_impl.fused_score("dpsm", knob, z, y, None, None, **filled, shape=shape)
        results.append([loss, fisher, out, *stats[[0, 1, 2, 3, 5, 6, 8, 9, 10]]])
    for other in results[1:]:
        torch.testing.assert_close(other[2], results[0][2], rtol=2**-8 if dtype == torch.bfloat16 else 2e-5, atol=1e-9)
        torch.testing.assert_close(other[:2] + other[3:], results[0][:2] + results[0][3:], rtol=2e-6, atol=1e-7)


def test_paths_begin_with_the_shape_that_is_chosen():
    triton_impl = pytest.importorskip("kernels.triton_impl")

    for v in (50257, 151936):
        shapes = shapes_of(v, torch.bfloat16)
        assert next(iter(shapes.values())) == triton_impl.score_shape(v, torch.bfloat16)
        assert len(shapes) >= 4 and (8, 0, 1, False) in shapes and (16, 0, 1, False) in shapes


def test_memory_in_a_process_that_has_its_imports():
    peak = timing.measure_memory_apart("", Shape(64, 5000, 4), "fp32", 1, find=_a_large_tensor, imported=(__name__,))
    assert 38e6 < peak < 60e6  # 40e6 and what the libraries keep; the kernel counts pages late


def _a_large_tensor():
    return lambda hidden, weight, targets: (
        (hidden.sum() + weight.sum()) * (torch.ones(10_000_000) if len(hidden) > 8 else torch.ones(1)).sum()
    )


def test_what_fails_among_the_paths_does_not_end_the_others_and_rows_do(tmp_path, monkeypatch, capsys):
    """The GPU's part of --paths stood in for: a vocabulary that fails is a row, and the next one begins."""
    held, asked = [paths.Held(8, n, 1, False) for n in (25, 18)], []

    def times(v, dtype, device, repeats, keys):
        asked.append((v, keys))
        if v == 151936:
            raise RuntimeError("no such kernel")
        return {key: 1.0 for key in keys} | {"copy": 0.5}

    for name, stand_in in dict(
        shapes_of=lambda *_: dict.fromkeys(held), time_paths=times, cuda_chunk=lambda *_, **__: 128
    ).items():
        monkeypatch.setattr(paths, name, stand_in)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(paths, "time_chunks", lambda *args: dict.fromkeys(args[-1], 1.5))
    args = SimpleNamespace(device="cpu", repeats=1, only="")
    rows = Rows("cpu", str(tmp_path / "paths.csv"), limits=Limits(rows=7))
    paths.time_choices(args, rows)
    assert [(r["provider"], r["v"]) for r in rows][:5] == [
        ("score_kernel", v) for v in (50257, 50257, 151936, 50257, 50257)
    ]
    assert rows[2]["missing"] == "failed: RuntimeError: no such kernel" and rows.failed
    assert [r["chunk"] for r in rows[5:]] == [128, 256] and len(rows.limits.left_out) == 5 + 7
    args.only, asked[:] = "fp32 50257 Held(warps=8, held_=18", []
    paths.time_choices(args, Rows("cpu"))
    assert not asked  # no such name
    args.only = "held=18"
    paths.time_choices(args, Rows("cpu"))
    assert [keys for _, keys in asked] == 3 * [held[1:]]


def test_chunks_are_timed_beside_the_products():
    ratios = time_chunks(Shape(8, 30, 4), "fp32", "cpu", 1, (2, 8))
    assert list(ratios) == [2, 8] and all(x > 0 for x in ratios.values())


def test_what_a_gpu_compiles_is_run_once_in_processes_of_their_own(monkeypatch, capsys):
    """Every loss of ours and every peer at each shape; one that fails does not end the bench."""
    ran = []

    class Pool:
        def __init__(self, *args, **how):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *args):
            pass

        def submit(self, run, *job):
            ran.append((run, job))

    monkeypatch.setattr(compare, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(timing, "measure_memory_apart", lambda *args: 1000)
    assert main(["--n", "8", "--v", "20", "--d", "4", "--repeats", "1", "--device", "cpu", "--warm", "2"]) == 0
    assert {job[0] for _, job in ran} == {*FROM_LOGITS, *FROM_HIDDEN, *ON_CPU_TOO} - compare.NOT_COMPILED
    for run, job in ran:
        run(*job)
    assert main(["--audit-2k", "--warm", "2", "--device", "cpu"]) == 2
