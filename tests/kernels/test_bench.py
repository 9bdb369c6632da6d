"""The size of linear_score's chunks and its memory, and what kernels.bench says of the claims: logic, not speed."""

import csv
import json
import os
import weakref
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from accounting import bytes_beside
from matplotlib.figure import Figure
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import chunks, head_pass, linear_score, losses
from kernels.bench import claims, compare, diagnostics, timing
from kernels.bench.__main__ import main
from kernels.bench.paths import shapes_of, time_chunks
from kernels.bench.providers import FROM_HIDDEN, FROM_LOGITS, ON_CPU_TOO
from kernels.bench.rows import write_csv, write_plot
from kernels.bench.timing import Shape, make_inputs
from kernels.chunks import ALLOWANCE, TILE, chunk_rows, cuda_chunk, row_stride, weight_bytes_beside

HEADS = {"gpt2": (8192, 50257, 768), "qwen3": (8192, 151936, 1024)}
PLENTY = 80 * 10**9

# --- the size of a chunk --------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 127, 128, 129, 2000, 8192, 100_000])
@pytest.mark.parametrize("v", [1, 507, 50257, 151936, 2_000_000])
@pytest.mark.parametrize("d", [64, 768, 4096])
def test_chunks_fit_and_are_whole_tiles(n, v, d):
    for itemsize in (2, 4):
        for sms in (1, 108, 132):
            before = 0
            for free in (10**6, 10**8, 10**9, PLENTY):
                for beside in (0, 10**8):
                    rows = chunk_rows(n, v, d, itemsize, sms, free, beside)
                    assert 1 <= rows <= max(1, n)
                    assert rows == 1 or rows * row_stride(v) * itemsize <= min(ALLOWANCE - beside, free // 2)
                    if rows < n and rows > TILE:
                        assert rows % TILE == 0
                rows = chunk_rows(n, v, d, itemsize, sms, free)
                assert rows >= before, "less rows with more memory"
                before = rows


def test_chunks_do_not_grow_with_the_vocabulary():
    rows = [chunk_rows(8192, v, 768, 2, 132, PLENTY) for v in (1000, 32000, 50257, 65536, 128256, 151936, 500_000)]
    assert all(a >= b for a, b in pairwise(rows)) and rows[0] == 8192


def test_a_last_chunk_of_a_few_rows_is_avoided():
    # 1152 fit; 8 chunks of 1024 cost less than 7 of 1152 and one of 128.
    free = 2 * 1152 * row_stride(50257) * 2
    assert chunk_rows(8192, 50257, 768, 2, 128, free) == 1024


@pytest.mark.parametrize("name, rows, megabytes", [("gpt2", 1408, 296.0), ("qwen3", 1024, 622.3)])
def test_choice_at_the_heads_of_the_claims(name, rows, megabytes):
    # GPT-2's head is within the 300 MB, Qwen3's is not: the fp32 sum of d_weight alone takes 622.3 MB in backward.
    n, v, d = HEADS[name]
    chosen = chunk_rows(n, v, d, 2, 132, PLENTY, weight_bytes_beside(v, d, 2, 2))
    assert chosen == rows
    assert bytes_beside(n, v, d, chosen, 2, 2) / 1e6 == pytest.approx(megabytes, abs=0.1)
    assert bytes_beside(n, v, d, 1, 2, 2) == 4 * v * d + (2 * row_stride(v) if v % 8 else 0)  # no chunk goes below
    # With fp32 weights the sum is the gradient, and the bf16 copy of the weight is what is beside.
    assert bytes_beside(n, v, d, chosen, 2, 4) == chosen * row_stride(v) * 2 + 2 * v * d


@pytest.fixture
def device(monkeypatch):
    """A CUDA device that answers: 10 GB free, or as ``free`` says; ``asked`` counts the questions."""
    told = SimpleNamespace(cuda=torch.device("cuda", 0), free=10 * 10**9, asked=0)

    def memory(device):
        told.asked += 1
        return told.free, 80 * 10**9

    monkeypatch.setattr(torch.cuda, "mem_get_info", memory)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5 * 10**8)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 4 * 10**8)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    chunks._of_device.cache_clear()
    cuda_chunk.cache_clear()
    yield told
    chunks._of_device.cache_clear()
    cuda_chunk.cache_clear()


def test_the_device_is_asked_once_a_head_however_long_its_batches_are(device):
    ask = partial(cuda_chunk, v=50257, d=768, hidden_bytes=2, weight_bytes=2, device=device.cuda)
    assert [ask(n) for n in (8192, 8192, 9000, 16000)] == [1408] * 4 and device.asked == 1
    for n in range(1, 4096):
        ask(n)
    assert device.asked == 13, "once for each power of two"
    assert ask(8192, d=1024) and device.asked == 14, "another head"
    device.free = 2 * 10**8  # 200 MB of the driver's and 100 MB of the allocator's, of which half: 1490 rows
    assert ask(8193) == 1408 and ask(20000) <= 1490, "only a batch twice as long asks anew"


def test_a_frozen_head_has_no_gradient_to_make_room_for(device):
    ask = partial(cuda_chunk, 8192, 151936, 1024, 2, 2, device.cuda)
    assert ask() == 1024 and ask(trained=False) == 896  # 622 MB are needed anyway; 300 MB of logits
    assert weight_bytes_beside(151936, 1024, 2, 2, summed=False) == 0
    assert ask(trained=False, allowance=600_000_000) == 1664


def test_one_chunk_where_the_memory_is_allowed(device):
    ask = partial(cuda_chunk, 8192, 151936, 1024, 2, 2, device.cuda)
    whole = 8192 * row_stride(151936) * 2  # 2.5 GB
    assert ask(direct=True, allowance=whole) == 8192 and ask(direct=True, allowance=whole - 1) < 8192
    assert ask(allowance=whole) < 8192, "a sum in fp32 is beside the logits"
    device.free = whole
    chunks._of_device.cache_clear()
    cuda_chunk.cache_clear()
    assert ask(direct=True, allowance=whole) < 8192, "at most half of what is free"


def test_linear_score_says_whether_the_head_is_trained(monkeypatch):
    class Asked(Exception):
        pass

    def chunk_of(n, v, d, hidden_bytes, weight_bytes, device, trained, direct, allowance):
        raise Asked(trained, direct, allowance)

    monkeypatch.setattr(head_pass, "cuda_chunk", chunk_of)
    with FakeTensorMode():
        hidden = torch.empty(300, 16, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        weight, targets = torch.empty(1000, 16, device="cuda"), torch.zeros(300, dtype=torch.long, device="cuda")
        narrow = weight.bfloat16()
        for head, memory, said in (
            (weight, None, (False, False, None)),
            (weight.clone().requires_grad_(), 10**9, (True, False, 10**9)),
            (narrow, None, (False, False, None)),
            (narrow.clone().requires_grad_(), None, (True, True, None)),
        ):
            with pytest.raises(Asked) as found:
                linear_score(hidden, head, targets, losses.ce, memory=memory, impl="torch")
            assert found.value.args == said
        with pytest.raises(Asked) as found, torch.no_grad():
            linear_score(hidden, narrow.clone().requires_grad_(), targets, losses.ce, impl="torch")
        assert found.value.args == (False, False, None)


class Live(TorchDispatchMode):
    """Peak bytes of the storages alive that operations returned, other than those of ``known``."""

    def __init__(self, *known):
        super().__init__()
        self.known = {x.untyped_storage().data_ptr() for x in known}
        self.alive, self.peak, self.marks = {}, 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                key = storage._cdata
                if key not in self.alive and storage.data_ptr() not in self.known:
                    self.alive[key] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, key, None)
        self.peak = max(self.peak, sum(self.alive.values()))
        return out


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("rows", [8, 256])
def test_memory_is_what_the_accounting_says(rows, weight_dtype, monkeypatch):
    """The GPU's way on CPU tensors: a kernel without scratch, products written and added in fp32."""
    n, v, d = 256, 4096, 64
    hidden = torch.randn(n, d).bfloat16().requires_grad_()
    weight = torch.randn(v, d).to(weight_dtype).requires_grad_()
    targets = torch.randint(v, (n,))
    calls = []

    def mm(a, b, out_dtype=None, out=None, real=torch.mm):
        if out_dtype is None:
            return real(a, b, out=out)
        calls.append("mm")
        with torch.utils._python_dispatch._disable_current_modes():
            return out.copy_(a.float() @ b.float())

    def addmm(total, a, b, out_dtype=None, out=None):
        calls.append("addmm")
        assert out is total and out_dtype == torch.float32
        with torch.utils._python_dispatch._disable_current_modes():
            return out.add_(a.float() @ b.float())

    def fused_score(name, knob, logits, targets, mask, weights, stats, correct, losses, fisher, out, **how):
        for x in (stats, correct, losses, fisher, out):
            x.zero_()

    kernel = SimpleNamespace(FUSED_SCORES={"ce"}, DTYPES=(torch.bfloat16,), CAN_KEEP_W=False, fused_score=fused_score)
    monkeypatch.setattr(head_pass, "choose_impl", lambda impl, tensor: kernel)
    monkeypatch.setattr(head_pass, "products_widen", lambda device: True)
    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch, "addmm", addmm)
    with Live(hidden, weight, targets) as live:
        loss, _ = linear_score(hidden, weight, targets, losses.ce, chunk=rows)
        grads = torch.autograd.grad(loss, (hidden, weight))
    beside = live.peak - sum(g.nbytes for g in grads)
    want = bytes_beside(n, v, d, rows, 2, weight.element_size())
    # Beside it what is of size N, the 17 statistics of a token and a dozen vectors; the rows have V = 64 k here.
    assert want <= beside <= want + 200 * n, (beside, want)
    in_one = rows == n and weight_dtype == torch.bfloat16  # the product is the gradient
    assert calls == ([] if in_one else ["mm"] + ["addmm"] * (n // rows - 1))


# --- the table of claims ----------------------------------------------------------------------------------


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
        ({claims.FULL: dict(ratio_to_products=1.11)}, 2),
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
    monkeypatch.setattr(compare, "providers", lambda linear, device: (dict(broken), {"Liger CE": "needs CUDA"}))
    file, shape = tmp_path / "bench.csv", ["--n", "8", "--v", "20", "--repeats", "1", "--device", "cpu"]
    assert main([*shape, "--only", "ours", "--csv", str(file)]) == 0
    with open(file) as opened:
        rows = {r["provider"]: r for r in csv.DictReader(opened)}
    assert set(rows) == {name for name in broken if "ours" in name}
    assert (
        rows["ours broken"]["missing"] == "failed: ZeroDivisionError: division by zero" and rows["ours DPSM"]["step_ms"]
    )
    assert main([*shape, "--d", "4", "--only", "literal", "--seconds", "1e-9"]) == 0
    assert "no time was left for 8 x 20 x 4" in capsys.readouterr().out
    assert main([*shape, "--diagnostics", "--only", "ours"]) == 2


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
    for name, ours in (("ours CE", {}), ("a name of another bench", dict(ours=["a name of another bench"]))):
        with pytest.raises(AttributeError):
            compare.drop_failing({name: fails}, leaves, targets, **ours)


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
    assert [s["MORE"] for s in shapes] == [False, True, True, True]
    assert [s["PIECES"] for s in shapes][1:] == [9, 3, 0]
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
        assert len(shapes) >= 4 and (8, 0) in shapes and (16, 0) in shapes


# --- what figures cost ------------------------------------------------------------------------------------


def figures_in_float64(hidden, weight, targets):
    logits = hidden.detach().double() @ weight.detach().double().t()
    log_p = logits.log_softmax(-1)
    p, correct = log_p.exp(), (logits.argmax(-1) == targets).double()
    confidence = p.amax(-1)
    bins = torch.linspace(0, 1, 301, dtype=torch.float64)
    ece = 0.0
    for low, high in pairwise(bins):
        inside = (confidence > low) & (confidence <= high)
        ece += (confidence[inside] - correct[inside]).sum().abs().item() / len(targets)
    one_hot = torch.nn.functional.one_hot(targets, len(weight))
    entropy, fisher = -(p * log_p).sum(-1).mean(), (p - one_hot).square().sum(-1).mean()
    return dict(entropy=entropy.item(), accuracy=correct.mean().item(), calibration=ece, fisher=fisher.item())


@pytest.mark.parametrize("provider", ["ours CE", "ours DPSM", "torch full logits", "TRL fused head", "TRL full logits"])
def test_every_provider_gives_the_figures_that_it_says(provider):
    if provider.startswith("TRL"):
        pytest.importorskip("trl")
    leaves, targets = make_inputs(Shape(64, 30, 8), "fp32", "cpu")
    with torch.no_grad():
        leaves[1].mul_(80)  # confidences from one end to the other
        targets[::2] = (leaves[0] @ leaves[1].t()).argmax(-1)[::2]
    want = figures_in_float64(*leaves, targets)
    names = {diagnostics.LOSS: (), diagnostics.SOME: ("entropy", "accuracy"), diagnostics.ALL: tuple(want)}
    literal = FROM_HIDDEN["linear + literal DPSM" if "DPSM" in provider else "linear + torch CE"]
    expected = torch.autograd.grad(literal(*leaves, targets), leaves)
    steps = diagnostics.MAKERS[provider]()
    assert list(steps) == list(names)[: 2 if provider.startswith("TRL") else 3]
    for which, step in steps.items():
        loss, figures = step(*leaves, targets)
        assert set(figures) == set(names[which])
        for name, value in figures.items():
            expected_value = want[name]
            if name == "fisher" and "DPSM" in provider:
                assert 0 < value < expected_value
                continue
            # fp32 logits of up to 10 and 64 terms: 2**-24 of each.
            assert value.item() == pytest.approx(expected_value, rel=1e-5) and not value.requires_grad
        torch.testing.assert_close(torch.autograd.grad(loss, leaves), expected, rtol=1e-4, atol=1e-6)


def test_a_confidence_on_an_edge_is_in_the_bin_below():
    confidence = torch.tensor([0.5, 0.501, 1.0, 0.0])  # 0.5 is the upper edge of the bin before 0.501's
    correct = torch.tensor([True, False, True, False])
    assert diagnostics.calibration(confidence, correct).item() == pytest.approx((0.5 + 0.501) / 4, rel=1e-6)


def test_liger_gives_token_accuracy_where_its_version_has_it(monkeypatch):
    class New:
        def __init__(self, return_token_accuracy=False):
            self.more = return_token_accuracy

        def __call__(self, weight, hidden, targets):
            loss = FROM_HIDDEN["linear + torch CE"](hidden, weight, targets)
            return SimpleNamespace(loss=loss, token_accuracy=torch.tensor(0.5)) if self.more else loss

    class Old(New):
        def __init__(self):
            super().__init__()

    inputs = make_inputs(Shape(4, 9, 2), "fp32", "cpu")
    for version, which in ((New, ["loss alone", "accuracy"]), (Old, ["loss alone"])):
        monkeypatch.setattr(diagnostics, "peer", lambda *_, version=version: version)
        steps = diagnostics.MAKERS["Liger linear CE"]()
        assert list(steps) == which
        results = [step(*inputs[0], inputs[1]) for step in steps.values()]
        assert all(loss == results[0][0] for loss, _ in results)
        assert [list(figures) for _, figures in results] == [[], ["accuracy"]][: len(which)]


def test_diagnostics_are_on_file_as_they_come(tmp_path, monkeypatch, capsys):
    file, asked, most = tmp_path / "figures.csv", [], 5

    def memory(name, *_):
        if len(asked) == most:
            raise KeyboardInterrupt
        asked.append(name)
        return 3 * 10**6

    def absent(module, name):
        raise ImportError("No module named 'trl'")

    once, forwards = timing.run_once, set()

    def run(function, leaves, targets, forward=False):
        forwards.add(forward)
        once(function, leaves, targets, forward)

    monkeypatch.setattr(timing, "run_once", run)
    monkeypatch.setattr(timing, "measure_memory_apart", memory)
    monkeypatch.setattr(diagnostics, "peer", absent)
    command = ["--diagnostics", "--n", "8", "--v", "30", "--d", "4", "--repeats", "1", "--device", "cpu"]
    command += ["--csv", str(file)]
    with pytest.raises(KeyboardInterrupt):
        main(command)
    with open(file) as opened:
        rows = list(csv.DictReader(opened))
    assert [f"{r['provider']}, {r['figures']}" for r in rows] == asked and len(rows) == 5
    assert forwards == {False}  # a step is forward and backward
    most = 100
    assert main(command) == 0
    with open(file) as opened:
        rows = list(csv.DictReader(opened))
    measured = [r for r in rows if not r["missing"]]
    assert [r["ratio_to_loss_alone"] for r in measured if r["figures"] == "loss alone"] == ["1.0"] * 3
    assert {r["provider"]: len([x for x in measured if x["provider"] == r["provider"]]) for r in measured} == {
        "ours CE": 3,
        "ours DPSM": 3,
        "torch full logits": 3,
    }
    assert {r["n"] for r in rows} == {"8"} and {r["peak_bytes"] for r in measured} == {"3000000"}
    gone = {r["provider"]: r["missing"] for r in rows if r["missing"]}
    why = "not installed: No module named 'trl'"
    assert gone == {"TRL fused head": why, "TRL full logits": why, "Liger linear CE": "needs CUDA"}
    shown = capsys.readouterr().out
    assert "x loss alone" in shown and "entropy, accuracy, calibration, Fisher" in shown and why in shown


def test_memory_in_a_process_that_has_its_imports():
    peak = timing.measure_memory_apart("", Shape(64, 5000, 4), "fp32", 1, find=_a_large_tensor, imported=(__name__,))
    assert 38e6 < peak < 60e6  # 40e6 and what the libraries keep; the kernel counts pages late


def _a_large_tensor():
    return lambda hidden, weight, targets: (
        (hidden.sum() + weight.sum()) * (torch.ones(10_000_000) if len(hidden) > 8 else torch.ones(1)).sum()
    )


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
