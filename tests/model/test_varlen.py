"""Packed rows through varlen_attn are what a mask makes of them: hidden states, gradients, and which of the two runs.

On a CPU a loop over the documents stands in for torch's, under the signatures it has had; `pytest -m gpu` has the real
one.
"""

import inspect
import logging
import sys
from functools import cache, partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from data.packing import Example, pack
from eval.answers import hidden_at
from model import varlen
from model.decoder import Decoder, DecoderConfig
from model.lora import LoRAConfig, add_lora
from model.varlen import Bounds, bounds_of

T = 24
# Beside each other, rows whose last and first documents have one number; a document that fills a row; documents of one
# token; padding, and a row of nothing else.
LENGTHS = ([24], [10, 1, 13], [3, 5, 1, 7, 8], [12, 12], [24])
DOCUMENTS = torch.stack([torch.arange(len(n)).repeat_interleave(torch.tensor(n)) for n in LENGTHS])
DOCUMENTS[2, 16:] = DOCUMENTS[4] = -1


# ---------------------------------------------------------------- varlen_attn, as torch has had it


def loop(q, k, v, starts, starts_k, most, most_k, causal):
    assert starts is starts_k and starts.dtype == torch.int32 and starts[0] == 0 and starts[-1] == len(q) == len(k)
    lengths = starts.diff().tolist()
    assert min(lengths) >= 0 and most == most_k >= max(lengths)
    parts = zip(*(x.transpose(0, 1).split(lengths, dim=1) for x in (q, k, v)), strict=True)
    made = [F.scaled_dot_product_attention(*part, is_causal=causal, enable_gqa=True) for part in parts]
    return torch.cat(made, dim=1).transpose(0, 1)


def of_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    assert query.shape == key.shape == value.shape
    return loop(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal)


def of_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)):
    return of_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size == (-1, 0))


def of_2_13(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
    assert enable_gqa or query.shape == key.shape
    return loop(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size == (-1, 0))


TORCHS = {"2.10": of_2_10, "2.11": of_2_11, "2.13": of_2_13}


@pytest.fixture(autouse=True)
def nothing_is_known_yet():
    cached = varlen.operation, varlen.lacking, varlen._log
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


def put(monkeypatch, **module) -> None:
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", SimpleNamespace(**module))


@pytest.fixture(params=TORCHS)
def had(request, monkeypatch):
    """varlen_attn as this torch has it, and for tensors on the CPU."""
    put(monkeypatch, varlen_attn=TORCHS[request.param])
    monkeypatch.setattr(varlen, "lacking", cache(lambda *of: ""))


@cache
def decoder(family: str = "qwen3", shared: int = 2, dtype=torch.float32, head_dim: int = 8) -> Decoder:
    """Of two layers, and of SmolLM3's family one without positions; every parameter off its first value."""
    more = dict(no_rope_layers=[1, 0]) if family == "smollm3" else {}
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(97, 32, 48, 2, 4, shared, head_dim, model_type=family, **more), dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def tokens_of(documents):
    return torch.randint(97, documents.shape, generator=torch.Generator().manual_seed(1)).to(documents.device)


def step(model, bounds, documents=DOCUMENTS):
    """Hidden states and gradients of a loss that every token has a share in."""
    hidden = model(tokens_of(documents), documents_BT=documents, bounds=bounds)
    weight = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2)).to(hidden)
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad((hidden * weight).sum(), trained, allow_unused=True)
    return hidden.detach(), [g for g in gradients if g is not None]


def check_close(got, want):
    """fp32's rounding, of sums in another order: of the largest entry, and in gradients of two layers' worth."""
    for a, b in zip((got[0], *got[1]), (want[0], *want[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * b.abs().max().item())


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("family, shared", [("qwen3", 4), ("qwen3", 2), ("qwen3", 1), ("smollm3", 2), ("qwen2", 1)])
def test_hidden_states_and_gradients_are_those_of_a_mask(had, family, shared):
    model = decoder(family, shared)
    check_close(step(model, bounds_of(DOCUMENTS)), step(model, None))
    with torch.no_grad():
        hidden = model(tokens_of(DOCUMENTS), documents_BT=DOCUMENTS, bounds=bounds_of(DOCUMENTS))
    assert torch.equal(hidden, step(model, bounds_of(DOCUMENTS))[0])


def test_documents_of_no_token_change_nothing(had):
    bounds = bounds_of(DOCUMENTS).padded(16, T)
    assert len(bounds.cu_seqlens) == 16 and bounds.cu_seqlens[-1] == DOCUMENTS.numel()
    check_close(step(decoder(), bounds), step(decoder(), None))
    assert bounds_of(DOCUMENTS).padded(1, T).cu_seqlens.diff().min() > 0


def test_adapters_and_recomputed_activations(had):
    model = Decoder(decoder().config)
    add_lora(model, LoRAConfig(4))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    want, kept = step(model, None), step(model, bounds_of(DOCUMENTS))
    model.checkpoint_activations = True
    again = step(model, bounds_of(DOCUMENTS))
    check_close(kept, want)
    assert len(again[1]) == len(kept[1]) == 2 * 2 * 7
    assert all(torch.equal(a, b) for a, b in zip((again[0], *again[1]), (kept[0], *kept[1]), strict=True))


def test_packed_examples_come_with_their_bounds(had, monkeypatch):
    """``hidden_at``, which training and every evaluation go through, of all rows and of some."""
    asked = []
    attend = varlen.attend_within
    monkeypatch.setattr("model.decoder.attend_within", lambda *of: asked.append(of[3]) or attend(*of))
    rows = pack([Example(str(n), [n] * (n + 1), 1) for n in (30, 17, 9, 9, 4, 1)], 32)
    model, cpu = decoder(), torch.device("cpu")
    for part in (rows, rows[1:2]):
        got = hidden_at(model, part, torch.arange(part.tokens_RT.numel()), cpu)
        want = model(part.tokens_RT, documents_BT=part.documents_RT).flatten(0, 1)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert [a.cu_seqlens.tolist() for a in asked[::2]] == [[0, 30, 31, 32, 49, 58, 62, 64, 73, 96], [0, 17, 26, 30, 32]]
    assert [a.max_seqlen for a in asked[::2]] == [30, 17]


def test_bounds_are_those_of_runs_within_rows():
    cu_seqlens, max_seqlen = bounds_of(DOCUMENTS)
    assert cu_seqlens.tolist() == [0, 24, 34, 35, 48, 51, 56, 57, 64, 72, 84, 96, 120]
    assert cu_seqlens.dtype == torch.int32 and max_seqlen == 24
    assert bounds_of(torch.tensor([[5]])).cu_seqlens.tolist() == [0, 1]
    with pytest.raises(ValueError, match="in two pieces; expected equal numbers side by side"):
        bounds_of(torch.tensor([[0, 0, 1], [0, 1, 0]]))


# ---------------------------------------------------------------- which of the two runs


def said(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "scorecast"]


def test_without_varlen_attn_nothing_changes_and_the_choice_is_logged_once(caplog, monkeypatch):
    """On a CPU, where the model is told not to, and without bounds: the bits of a mask."""
    put(monkeypatch)
    caplog.set_level(logging.INFO, "scorecast")
    model, bounds = decoder(), bounds_of(DOCUMENTS)
    want = step(model, None)
    made = [step(model, bounds) for _ in range(2)]
    monkeypatch.setattr(varlen, "lacking", cache(lambda *of: ""))
    monkeypatch.setattr(model, "varlen", False)
    made.append(step(model, bounds))
    for got in made:
        assert all(torch.equal(a, b) for a, b in zip((got[0], *got[1]), (want[0], *want[1]), strict=True))
    assert said(caplog) == [
        f"packed rows: attention with a mask ({why})"
        for why in ("their bounds are not given", "tensors are on cpu", "the model's varlen is False")
    ]


def test_that_it_runs_is_logged_once(had, caplog):
    caplog.set_level(logging.INFO, "scorecast")
    for _ in range(2):
        step(decoder(), bounds_of(DOCUMENTS))
    assert said(caplog) == ["packed rows: attention within documents (varlen_attn)"]


def test_what_a_device_must_have(monkeypatch):
    """With torch's answers put in its mouth."""
    put(monkeypatch, varlen_attn=of_2_13)
    device = torch.device("cuda", 0)
    answers = dict(get_device_capability=(9, 0), get_device_name="an old GPU")
    for name in answers:
        monkeypatch.setattr(torch.cuda, name, lambda _, name=name: answers[name])
    built = [True]
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: built[0])
    lacking = varlen.lacking.__wrapped__
    assert lacking(device, torch.bfloat16, 128) == lacking(device, torch.float16, 64) == ""
    assert lacking(torch.device("cpu"), torch.bfloat16, 128) == "tensors are on cpu"
    assert "torch.float32, not bfloat16 or float16" in lacking(device, torch.float32, 128)
    assert "heads are 36 wide" in lacking(device, torch.bfloat16, 36)
    assert "no multiple of 8 up to 192" in lacking(device, torch.bfloat16, 256)
    answers["get_device_capability"] = (7, 5)
    assert lacking(device, torch.bfloat16, 128) == "an old GPU is older than FlashAttention's kernels"
    answers["get_device_capability"] = (8, 0)
    for module in ({}, dict(varlen_attn=lambda query, key, value, lengths: query)):
        put(monkeypatch, **module)
        varlen.operation.cache_clear()
        assert "has no varlen_attn, or one not known here" in lacking(device, torch.bfloat16, 128)
    built[0] = False
    assert "is built without FlashAttention" in lacking(device, torch.bfloat16, 128)


def test_the_installed_torch_takes_the_call():
    """Its own signature, where it has the operation at all."""
    pytest.importorskip("torch.nn.attention.varlen", reason="torch has varlen_attn from 2.10 on")
    run, shares = varlen.operation()
    more = dict(enable_gqa=True) if shares else {}
    inspect.signature(run.func).bind(*range(7), **run.keywords, **more)


def test_bounds_that_cannot_be_meant_are_one_line():
    model, tokens = decoder(), tokens_of(DOCUMENTS)
    cu_seqlens, max_seqlen = bounds_of(DOCUMENTS)
    with pytest.raises(ValueError, match="bounds without documents_BT: expected both"):
        model(tokens, bounds=Bounds(cu_seqlens, max_seqlen))
    for wrong in (
        Bounds(cu_seqlens[:-1], max_seqlen),
        Bounds(cu_seqlens, max_seqlen - 1),
        bounds_of(DOCUMENTS.flip(0)),
    ):
        with pytest.raises(ValueError, match="bounds are not those of documents_BT"):
            model(tokens, documents_BT=DOCUMENTS, bounds=wrong)


# ---------------------------------------------------------------- torch's own, on a device


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnADevice:
    @pytest.fixture(autouse=True)
    def torch_has_it(self):
        if why := varlen.lacking(torch.device("cuda", torch.cuda.current_device()), torch.bfloat16, 64):
            pytest.skip(why)

    @pytest.fixture
    def attended(self, monkeypatch) -> list:
        """What each call of ``attend_within`` was given."""
        calls, attend = [], varlen.attend_within
        monkeypatch.setattr("model.decoder.attend_within", lambda *of: calls.append(of) or attend(*of))
        return calls

    def here(self, documents):
        cu_seqlens, max_seqlen = bounds_of(documents)
        return documents.cuda(), Bounds(cu_seqlens.cuda(), max_seqlen)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
    @pytest.mark.parametrize("head_dim", [64, 128])
    @pytest.mark.parametrize("family, shared", [("qwen3", 4), ("qwen3", 2), ("qwen3", 1), ("smollm3", 2)])
    @pytest.mark.parametrize("longest", [24, 700])
    def test_it_errs_no_more_than_a_mask(self, attended, longest, family, shared, head_dim, dtype):
        """Both beside fp32 with a mask, of rows that take one of FlashAttention's tiles and of rows that take many.
        1.25 leaves room for where the two do not round alike, 1e-3 for gradients that are all rounding."""
        documents = DOCUMENTS
        if longest == 700:
            lengths = torch.tensor([[700, 1, 67], [129, 128, 511], [300, 300, 168]])
            documents = torch.stack([torch.arange(3).repeat_interleave(n) for n in lengths])
            documents[2, 600:] = -1
        exact = decoder(family, shared, torch.float32, head_dim).cuda()
        model = Decoder(exact.config, dtype).cuda()
        model.load_state_dict(exact.state_dict())
        documents, bounds = self.here(documents)
        want, masked = step(exact, None, documents), step(model, None, documents)
        assert not attended
        got = step(model, bounds, documents)
        assert len(attended) == 2
        for a, b, c in zip((got[0], *got[1]), (masked[0], *masked[1]), (want[0], *want[1]), strict=True):
            ours, theirs = ((x.float() - c).norm() / c.norm() for x in (a, b))
            assert ours <= 1.25 * theirs + 1e-3

    def test_nothing_waits_for_the_device(self, attended):
        model = Decoder(decoder(head_dim=64).config, torch.bfloat16).cuda()
        model.checkpoint_activations = True
        rows = pack([Example(str(n), [n] * (n + 1), 1) for n in (30, 17, 9, 9, 4, 1)], 32)
        device = torch.device("cuda", torch.cuda.current_device())
        at = torch.arange(rows.tokens_RT.numel(), device=device)
        run = partial(hidden_at, model, rows, at, device)
        run().sum().backward()  # what the first call sets up may wait
        torch.cuda.set_sync_debug_mode("error")
        try:
            run().sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert len(attended) == 2 * 2 * 2  # two layers, forward and again in backward, twice
