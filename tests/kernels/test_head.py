"""linear_score and linear_moments against the scores and moments of logits that are there."""

import pytest
import torch
import torch.nn.functional as F
from accounting import Largest
from formulas import DEVICE, IMPLS, SCORES, VALUES, close, floor_of, literal_moments, tail_of
from named_scores import NAMED, custom, head

from kernels import linear_moments, linear_score, losses, softmax_moments, token_fisher
from kernels.head_pass import HeadPass


def make_head(n=23, v=57, d=16, dtype=torch.float32, weight_dtype=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=generator).to(DEVICE, dtype).requires_grad_()
    weight = torch.randn(v, d, generator=generator).to(DEVICE, weight_dtype or dtype).requires_grad_()
    targets = torch.randint(v, (n,), generator=generator)
    targets[[2, 11]] = -100
    upstream = torch.rand(n, generator=generator) + 0.1
    return hidden, weight, targets.to(DEVICE), upstream.to(DEVICE)


def gradients(loss, *leaves):
    return [g.double() for g in torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("chunk", [None, 1, 8, 23, 100])  # 8 leaves a last chunk of 7
@pytest.mark.parametrize("name", ["ce", "dpsm", "smoothing", "brier-tail"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_linear_score_is_the_score_of_the_logits(reduction, name, chunk):
    hidden, weight, targets, upstream = make_head()
    score, tail = SCORES[name], tail_of(name)
    m = softmax_moments(F.linear(hidden, weight), targets, tail=tail)
    losses_N = score(m)
    loss, got = linear_score(hidden, weight, targets, score, reduction=reduction, tail=tail, chunk=chunk)
    count = (targets != -100).sum()
    want = {"mean": losses_N.sum() / count, "sum": losses_N.sum(), "none": losses_N}[reduction]
    close(loss.detach(), want.detach(), 1e-5, floor=1e-6)  # the products round differently by chunk
    # An upstream other than 1, and for "none" another one for each token.
    scale = upstream if reduction == "none" else 0.37
    for g, w in zip(
        gradients((loss * scale).sum(), hidden, weight), gradients((want * scale).sum(), hidden, weight), strict=True
    ):
        close(g, w, 1e-5, floor=1e-5 * w.abs().max())
    for field in (*VALUES, "correct", "valid", "support") + (("tail_log_p",) if tail else ()):
        close(getattr(got, field).double(), getattr(m, field).detach().double(), 1e-4, floor_of(field))
        assert not getattr(got, field).requires_grad
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("impl", IMPLS)
def test_linear_score_with_ties_and_large_offsets(impl):
    hidden, weight, targets, _ = make_head()
    with torch.no_grad():
        hidden[:, 0], weight[:, 0] = 1.0, 500.0  # every logit near 500
        weight[30:] = weight[:27]  # every row has ties
        targets[targets != -100] = (hidden @ weight.t()).argmax(-1)[targets != -100]
        targets[::3] += 30 * (targets[::3] < 27) * (targets[::3] >= 0)
    want = literal_moments(F.linear(hidden, weight), targets.clamp_min(0))
    _, got = linear_score(hidden, weight, targets, losses.ce, chunk=9, impl=impl)
    assert torch.equal(got.correct, want.correct & got.valid) and 0 < got.correct.sum() < got.valid.sum()
    close(got.entropy[got.valid], want.entropy[got.valid], 0, floor=2e-4)  # logits of 500 are good to 3e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear_score_triton_matches_torch(reduction, dtype):
    hidden, weight, targets, upstream = make_head(dtype=dtype)
    grads = []
    for impl in IMPLS:
        loss, _ = linear_score(hidden, weight, targets, SCORES["dpsm"], reduction=reduction, chunk=9, impl=impl)
        grads.append(gradients((loss * (upstream if reduction == "none" else 1)).sum(), hidden, weight))
    for a, b in zip(*grads, strict=True):
        # bf16: the gradient of the logits may differ in its last of 8 bits.
        relative, floor = (1e-5, 1e-6) if dtype == torch.float32 else (2**-6, 2**-7)
        close(a, b, relative, floor=floor * b.abs().max())


def test_denominator_is_a_tensor_of_the_callers():
    hidden, weight, targets, _ = make_head()
    denominator = torch.tensor(40.0, device=DEVICE)
    mean, _ = linear_score(hidden, weight, targets, losses.ce, denominator=denominator)
    total, _ = linear_score(hidden, weight, targets, losses.ce, reduction="sum")
    assert torch.allclose(mean, total / 40)
    want = gradients(total / 40, hidden, weight)
    denominator.fill_(1.0)  # the next micro-batch's, before this one's backward
    a, b = gradients(mean, hidden, weight), want
    assert all(torch.allclose(x, y) for x, y in zip(a, b, strict=True))
    with pytest.raises(ValueError, match="denominator"):
        linear_score(hidden, weight, targets, losses.ce, reduction="sum", denominator=denominator)


def test_nothing_in_the_loss_is_zero_not_nan():
    hidden, weight, targets, _ = make_head()
    loss, m = linear_score(hidden, weight, torch.full_like(targets, -100), losses.dpsm(0.5))
    d_hidden, d_weight = gradients(loss, hidden, weight)
    assert loss == 0 and (d_hidden == 0).all() and (d_weight == 0).all() and not m.valid.any()
    loss, _ = linear_score(hidden[:0], weight, targets[:0], losses.ce)
    assert loss == 0 and (gradients(loss, weight)[0] == 0).all()


def test_a_score_need_not_be_zero_for_ignored_tokens():
    hidden, weight, targets, _ = make_head()
    for reduction in ("sum", "none"):
        loss, _ = linear_score(hidden, weight, targets, lambda m: m.r1.sqrt() + 5, reduction=reduction)
        want = 5 * 21 + softmax_moments(F.linear(hidden, weight), targets).r1.sqrt().sum()
        assert torch.allclose(loss.sum(), want)
        assert all(g.isfinite().all() for g in gradients(loss.sum(), hidden, weight))


def test_tied_weights_get_both_gradients():
    _, weight, targets, _ = make_head(d=16)
    tokens = torch.arange(23, device=DEVICE) % 57

    def total(loss_of):
        hidden = torch.tanh(F.embedding(tokens, weight))
        return gradients(loss_of(hidden), weight)[0]

    got = total(lambda h: linear_score(h, weight, targets, losses.ce)[0])
    close(got, total(lambda h: F.cross_entropy(F.linear(h, weight), targets)), 1e-5, floor=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_what_is_wanted_is_computed(reduction):
    hidden, weight, targets, _ = make_head()
    frozen, _ = linear_score(hidden, weight.detach(), targets, losses.ce, reduction=reduction)
    full, _ = linear_score(hidden, weight, targets, losses.ce, reduction=reduction)
    assert torch.equal(gradients(frozen.sum(), hidden)[0], gradients(full.sum(), hidden)[0])
    loss, _ = linear_score(hidden.detach(), weight.detach(), targets, losses.ce, reduction=reduction)
    assert not loss.requires_grad
    with torch.no_grad(), Largest(hidden, weight) as seen:
        loss, _ = linear_score(hidden, weight, targets, losses.ce, reduction=reduction, chunk=2)
    assert not loss.requires_grad
    assert seen.elements < weight.numel(), "a gradient of the weight was made though no one asked"


def test_linear_score_never_holds_all_logits():
    hidden, weight, targets, upstream = make_head(n=600, v=900, d=8)
    for reduction in ("mean", "none"):
        with Largest(hidden, weight) as seen:
            loss, _ = linear_score(hidden, weight, targets, losses.dpsm(0.5), chunk=60, reduction=reduction)
            torch.autograd.grad((loss * upstream).sum() if reduction == "none" else loss, (hidden, weight))
        assert seen.elements <= 60 * 900


def test_memory_is_that_of_a_chunk_of_logits():
    hidden, weight, targets, _ = make_head(n=600, v=900, d=8)
    targets = targets.clamp_min(0)  # none ignored
    found = []
    for memory in (None, 100 * 900 * 4):
        with Largest(hidden, weight) as seen:
            found.append(linear_score(hidden, weight, targets, losses.ce, memory=memory)[0])
        assert seen.elements == (600 if memory is None else 100) * 900
    torch.testing.assert_close(*found)


def test_gradient_in_forward_runs_back_once():
    hidden, weight, targets, _ = make_head()
    loss, _ = linear_score(hidden, weight, targets, losses.ce)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="reduction='none'"):
        loss.backward()


def test_alpha_tensor_is_read_at_every_call():
    hidden, weight, targets, _ = make_head()
    alpha = torch.zeros((), device=DEVICE)
    score = losses.dpsm(alpha)
    for value, same in ((0.0, losses.ce), (1.0, losses.brier)):
        alpha.fill_(value)
        a, b = (linear_score(hidden, weight, targets, s)[0] for s in (score, same))
        assert torch.equal(a, b)
    # For "none" the gradient is that of the alpha of the forward, whatever it is by the backward.
    loss, _ = linear_score(hidden, weight, targets, score, reduction="none")
    alpha.fill_(0.0)
    want, _ = linear_score(hidden, weight, targets, losses.brier, reduction="none")
    a, b = gradients(loss.sum(), hidden, weight), gradients(want.sum(), hidden, weight)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_bf16_hidden_with_fp32_weight():
    hidden, weight, targets, _ = make_head(n=256, d=32, dtype=torch.bfloat16, weight_dtype=torch.float32)

    def d_weight(chunk):
        loss, _ = linear_score(hidden, weight, targets, losses.ce, reduction="sum", chunk=chunk)
        d_hidden, d = torch.autograd.grad(loss, (hidden, weight))
        assert d_hidden.dtype == torch.bfloat16 and d.dtype == torch.float32
        return d.double()

    h, w = hidden.detach().double(), weight.detach().bfloat16().double().requires_grad_()
    F.cross_entropy(h @ w.t(), targets, reduction="sum").backward()
    error = [(d_weight(chunk) - w.grad).norm() / w.grad.norm() for chunk in (256, 2)]
    # One bf16 rounding of logits and gradient: 2**-8 each. 128 chunks summed in bf16 would be some 10 times worse.
    assert error[0] < 2**-7 and error[1] < 1.5 * error[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradients_in_the_dtype_of_a_16_bit_head(reduction, dtype):
    hidden, weight, targets, _ = make_head(n=128, d=32, dtype=dtype)
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    want = F.cross_entropy(h @ w.t(), targets, reduction=reduction).sum() * 0.37
    eager = F.cross_entropy(hidden @ weight.t(), targets, reduction=reduction).sum() * 0.37
    want, eager = gradients(want, h, w), gradients(eager, hidden, weight)
    for chunk in (128, 30):
        loss, _ = linear_score(hidden, weight, targets, losses.ce, reduction=reduction, chunk=chunk)
        got = torch.autograd.grad((loss * 0.37).sum(), (hidden, weight))
        assert [g.dtype for g in got] == [dtype, dtype]
        for g, e, exact in zip(got, eager, want, strict=True):
            error, reference = ((x.double() - exact).norm() / exact.norm() for x in (g, e))
            assert error <= reference + 1e-3  # as asked of the device


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_d_weight_summed_in_bf16(reduction):
    """The loss and d_hidden to the bit; d_weight in no wider tensor, with a rounding more for each of 16 chunks."""
    hidden, weight, targets, _ = make_head(n=256, v=300, d=32, dtype=torch.bfloat16)
    score, chunk = losses.dpsm(0.5), 16
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    _, want = gradients(linear_score(*exact, targets, score, reduction=reduction)[0].sum(), *exact)
    values, grads = [], []
    for accum_dtype, dtype in ((None, torch.float32), (torch.bfloat16, torch.bfloat16)):
        how = dict(chunk=chunk, accum_dtype=accum_dtype)
        loss, _ = linear_score(hidden, weight, targets, score, reduction=reduction, **how)
        values.append(loss.detach())
        grads.append(gradients(loss.sum(), hidden, weight))
        head_pass = HeadPass(hidden, weight, targets, ignore_index=-100, impl="auto", trained=True, **how)
        assert head_pass.new_grads((False, True, False))[1].dtype == dtype
    assert torch.equal(*values) and torch.equal(grads[0][0], grads[1][0])
    fp32, bf16 = (((g - want).norm() / want.norm()).item() for _, g in grads)
    # 2**-9 / sqrt(3) a rounding, sqrt(17 / 2) of it for 16: 0.0033 beside what the bf16 logits cost both.
    assert fp32 < bf16 < (fp32**2 + 0.0033**2) ** 0.5


def test_under_autocast_it_computes_as_linear_does():
    hidden, weight, targets, _ = make_head(d=32)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        loss, _ = linear_score(hidden, weight, targets, losses.ce)
        want = F.cross_entropy(F.linear(hidden, weight).float(), targets)
    assert torch.allclose(loss, want, atol=1e-6)  # the same bf16 logits
    got = torch.autograd.grad(loss, (hidden, weight))
    assert [g.dtype for g in got] == [torch.float32, torch.float32]
    for g, w in zip(got, gradients(want, hidden, weight), strict=True):
        close(g, w, 2**-6, floor=2**-7 * w.abs().max())


def test_weight_used_beside_a_ddp_module(tmp_path):
    dist = pytest.importorskip("torch.distributed")
    if dist.is_initialized() or not dist.is_gloo_available():
        pytest.skip("needs a process group of its own, and gloo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        body = torch.nn.Embedding(57, 16)
        targets = torch.randint(57, (23,))
        model = torch.nn.parallel.DistributedDataParallel(body)
        for _ in range(2):
            body.zero_grad()
            linear_score(torch.tanh(model(torch.arange(23))), body.weight, targets, losses.ce)[0].backward()
        got = body.weight.grad.clone()
        body.zero_grad()
        F.cross_entropy(F.linear(torch.tanh(body(torch.arange(23))), body.weight), targets).backward()
        close(got, body.weight.grad, 1e-5, floor=1e-6)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("scale", [1.0, 0.5, "tensor"])
def test_linear_moments(scale):
    hidden, weight, targets, _ = make_head()
    scale = torch.tensor(0.7, device=DEVICE) if scale == "tensor" else scale
    got = linear_moments(hidden, weight, targets, scale=scale, chunk=5)
    want = softmax_moments(F.linear(hidden, weight).detach() * scale, targets)
    for field in VALUES:
        close(getattr(got, field), getattr(want, field), 1e-5, floor_of(field))
        assert not getattr(got, field).requires_grad
    assert torch.equal(got.correct, want.correct)


def test_bad_arguments_of_linear_score_are_named(monkeypatch):
    hidden, weight, targets, _ = make_head()
    for arguments, message in (
        ((hidden, weight[:, :3], targets, losses.ce), "hidden must be"),
        ((hidden, weight, targets[:4], losses.ce), "one a row"),
        ((hidden, weight, targets, lambda m: m.r1.sum()), "one loss a token"),
        ((hidden, weight, targets, lambda m: 3), "got int"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_score(*arguments)
    with pytest.raises(ValueError, match="unknown reduction"):
        linear_score(hidden, weight, targets, losses.ce, reduction="batchmean")
    with pytest.raises(ValueError, match="memory must be a positive number of bytes"):
        linear_score(hidden, weight, targets, losses.ce, memory=0)
    with pytest.raises(ValueError, match="chunk"):
        linear_score(hidden, weight, targets, losses.ce, chunk=0)
    for given, message in ((torch.float16, "expected torch.bfloat16"), (torch.bfloat16, "got torch.float32 and")):
        with pytest.raises(ValueError, match=message):
            linear_score(hidden, weight, targets, losses.ce, accum_dtype=given)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(ValueError, match="inside torch.compile d_weight is summed in fp32"):
        linear_score(hidden, weight, targets, losses.ce, accum_dtype=torch.bfloat16)


# --- weights, bias, Fisher, checkpointing ---------------------------------------------------------------


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", ["dpsm", "smoothing", "custom"])
def test_linear_score_with_weights_and_bias(name, reduction, impl):
    score = NAMED.get(name, custom)
    hidden, weight, bias, targets, weights = head()
    want_inputs = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    logits = want_inputs[0] @ want_inputs[1].T + want_inputs[2]
    valid = targets != -100
    m = softmax_moments(logits, targets, impl="torch")
    each = torch.where(valid, score(m) * weights.double(), 0.0)
    upstream = torch.rand(len(targets), generator=torch.Generator().manual_seed(5)).to(DEVICE)
    got, moments = linear_score(
        hidden, weight, targets, score, bias=bias, weights=weights, reduction=reduction, chunk=5, fisher=True, impl=impl
    )
    if reduction == "none":
        (each * upstream).sum().backward()
        (got * upstream).sum().backward()
    else:
        want = each.sum() / (weights[valid].sum() if reduction == "mean" else 1)
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
        (want * 3).backward()
        (got * 3).backward()
    for a, b in zip((hidden, weight, bias), want_inputs, strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-4, atol=1e-5)
    # A token of weight 0 has moments and Fisher, one outside the targets has none.
    want_fisher = token_fisher(m, score)
    torch.testing.assert_close(moments.fisher.double(), want_fisher, rtol=1e-4, atol=1e-7)
    assert moments.fisher[3] > 0 and (moments.fisher[[1, 6]] == 0).all()


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(bias=torch.zeros(3)), "bias must be"),
        (dict(weights=torch.ones(3)), "weights must be"),
        (dict(reduction="none", denominator=torch.tensor(2.0)), "denominator is for"),
    ],
)
def test_bad_arguments_are_named(change, message):
    hidden, weight, _, targets, _ = head()
    with pytest.raises(ValueError, match=message):
        linear_score(hidden, weight, targets, losses.ce, **change)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_under_activation_checkpointing(reduction):
    from torch.utils.checkpoint import checkpoint

    results = []
    for checkpointed in (False, True):
        *leaves, targets, weights = head()

        def run(hidden, weight, bias, targets=targets):
            return linear_score(hidden.tanh(), weight, targets, NAMED["dpsm"], bias=bias, reduction=reduction)[0]

        loss = checkpoint(run, *leaves, use_reentrant=False) if checkpointed else run(*leaves)
        loss.sum().backward()
        results.append([loss.detach(), *(x.grad for x in leaves)])
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_padded_rows_of_the_weight_change_nothing(reduction, impl, monkeypatch):
    """As on a GPU where a row of logits is no multiple of 16 bytes."""
    found = []
    for rows in (lambda v, *_: v, lambda v, *_: v + 7):
        monkeypatch.setattr("kernels.head_pass.padded_rows", rows)
        hidden, weight, bias, targets, weights = head(ignored=(1, 6))
        how = dict(bias=bias, weights=weights, reduction=reduction, chunk=5, fisher=True, impl=impl)
        loss, m = linear_score(hidden, weight, targets, losses.dpsm(0.3), **how)
        loss.sum().backward()
        moments = linear_moments(hidden, weight, targets, bias=bias, impl=impl)
        found.append((loss, m.fisher, m.entropy, moments.lse, hidden.grad, weight.grad, bias.grad))
    for plain, padded in zip(*found, strict=True):
        assert padded.shape == plain.shape
        torch.testing.assert_close(padded, plain, rtol=1e-5, atol=1e-6)
