"""Every --optimizer: it learns, is resumed bit for bit under FoT, covers each parameter once, or is refused by name."""

import importlib.util
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from lm_runs import fails, rows, same_run, train

from data.windows import Windows
from model.gpt2 import GPT2, GPT2Config, decay_groups
from runtime import optim
from runtime.flags import FLAGS
from runtime.machine import World

CPU = torch.device("cpu")
PACKAGES = {"adamw8bit": "bitsandbytes", "schedule-free": "schedulefree", "prodigy": "prodigyopt"}


def config(name, **more):
    flags = {k: f.default for k, f in FLAGS.items()} | dict(
        steps=24, lr=3e-3, fot_window=4, lr_warmup=0.1, dtype="float32"
    )
    return SimpleNamespace(**flags | dict(optimizer=name, schedule="fot", fot_parts="envelope,noise,forecast") | more)


def needed(name):
    if (package := PACKAGES.get(name)) and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


def network():
    torch.manual_seed(0)
    return GPT2(GPT2Config(vocab_size=40, block_size=16, n_layer=2, n_head=2, n_embd=32), torch.float32)


def loss_of(model, step, half):
    generator = torch.Generator().manual_seed(2 * step + half)
    first = torch.randint(0, 20, (8, 1), generator=generator)
    x = (first + torch.arange(16)) % 40  # counting: easy to learn
    logits = model(x[:, :-1]) @ model.head_weight.T
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten())


def run(cfg, start=0, stop=None, checkpoint=None):
    """Steps ``start`` to ``stop``: (losses, what a loop saves, the model, the optimizer)."""
    model, world = network(), World(0, 1, CPU)
    optimizer = optim.make_optimizer(decay_groups(model, cfg.weight_decay), cfg, model, CPU)
    rule, losses = optim.rule_of(cfg, optimizer, world), []
    if checkpoint:
        optim.restore_training_state(model, optimizer, checkpoint)
        rule.restore(checkpoint["fot"], start)
    for step in range(start, stop or cfg.steps):
        total = 0.0
        for half in range(2):
            loss = loss_of(model, step, half) / 2
            loss.backward()
            rule.observe(2 * loss, 1, share=0.5 if rule.splits and half == 0 else None)
            total = total + loss.detach()
        optim.take_step(optimizer, model.parameters(), cfg.clip, total)
        rule.step()
        losses.append(float(total))
    weights, state = optim.training_state(model, optimizer)
    return losses, {"model": weights, "optimizer": state, "fot": rule.state_dict()}, model, optimizer


@pytest.mark.parametrize("name", [name for name in optim.OPTIMIZERS if name != "paged-adamw8bit"])
def test_it_learns_and_goes_on_with_the_same_bits(name, tmp_path):
    """Cut between the halves of a measurement; through a file, as a checkpoint goes."""
    needed(name)
    how = {"sgd": dict(lr=0.3, momentum=0.9), "schedule-free-plus": dict(step_factor=0.3), "prodigy": dict(steps=60)}
    cfg = config(name, **how.get(name, {}))
    losses, end, _, _ = run(cfg)
    assert sum(losses[-4:]) < sum(losses[:4])
    first, state, _, _ = run(cfg, stop=9)
    torch.save(state, tmp_path / "last.pt")
    rest, resumed, _, _ = run(cfg, 9, checkpoint=torch.load(tmp_path / "last.pt"))
    assert first + rest == losses
    assert all(torch.equal(w, resumed["model"][k]) for k, w in end["model"].items())
    assert resumed["fot"] == end["fot"]


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_tail_average_is_kept_and_goes_on(name):
    cfg = config(name, tail_average=0.25, schedule="wsd", decay_shape="sqrt")
    losses, end, model, optimizer = run(cfg)
    assert optimizer.tail.count == 6
    assert any(not torch.equal(w, model.state_dict()[k]) for k, w in end["model"].items())
    assert all(torch.equal(w, model.state_dict()[k]) for k, w in end["optimizer"]["iterate"].items())
    for cut in (9, 21):  # before and in the average
        first, state, _, _ = run(cfg, stop=cut)
        rest, resumed, _, _ = run(cfg, cut, checkpoint=state)
        assert first + rest == losses and all(torch.equal(w, resumed["model"][k]) for k, w in end["model"].items())


def test_muon_has_the_hidden_matrices_and_adamw_the_rest():
    model = network()
    optimizer = optim.make_optimizer(decay_groups(model, 0.1), config("muon"), model, CPU)
    names = {id(p): name for name, p in model.named_parameters()}
    muon, adamw = ([names[id(p)] for g in part.param_groups for p in g["params"]] for part in optimizer.parts)
    assert sorted([*muon, *adamw]) == sorted(names.values())
    assert muon and all(n.startswith("h.") and n.endswith(".weight") and "ln" not in n for n in muon)
    assert {"wte.weight", "wpe.weight"} < set(adamw) and all(
        p.ndim < 2 for n, p in model.named_parameters() if n in adamw and n[0] == "h"
    )
    # A first step of Muon's has the RMS of AdamW's, lr, up to Newton and Schulz's own spread of singular values.
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for group in optimizer.param_groups:
        group |= {"lr": 1e-3, "weight_decay": 0.0}
    loss_of(model, 0, 0).backward()
    optimizer.step()
    moved = {n: (p.detach() - before[n]).square().mean().sqrt() / 1e-3 for n, p in model.named_parameters()}
    # 0.2 sqrt(rank) times singular values of 0.7 to 1.2, by sqrt(max / (rows columns)): 0.2 each where none is missing.
    assert all(0.1 < moved[n] < 0.3 for n in muon) and 0.5 < moved["wte.weight"] <= 1.01


def test_a_step_that_is_not_finite_moves_nothing():
    for name in ("adamw", "muon", "sgd", "schedule-free-plus"):
        model = network()
        optimizer = optim.make_optimizer(decay_groups(model, 0.1), config(name), model, CPU)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        loss_of(model, 0, 0).backward()
        optim.take_step(optimizer, model.parameters(), 1.0, torch.tensor(math.nan))
        assert all(torch.equal(p.detach(), before[n]) for n, p in model.named_parameters()), name


@pytest.mark.parametrize(
    "more, says",
    [
        (dict(optimizer="paged-adamw8bit"), "paged-adamw8bit needs a CUDA device; use --optimizer adamw8bit or adamw"),
        (dict(optimizer="muon", fsdp=True), "--optimizer muon knows no --fsdp; use DDP, or --optimizer adamw or sgd"),
        (dict(optimizer="adamw", schedule="schedule-free", fsdp=True), "--schedule schedule-free knows no --fsdp"),
        (dict(optimizer="muon", schedule="schedule-free"), "is an optimizer of its own, not --optimizer muon"),
        (dict(optimizer="schedule-free-plus", schedule="cosine"), "averages in the place of a schedule such as cosine"),
        (
            dict(optimizer="schedule-free", tail_average=0.1),
            "--tail-average: --optimizer schedule-free averages already",
        ),
        (dict(optimizer="adamw", tail_average=0.1, fsdp=True), "would average shards; leave it out"),
        (
            dict(optimizer="schedule-free", schedule="fot", decay_shape="sqrt"),
            "--decay-shape sqrt: over --optimizer schedule-free nothing falls; leave it out",
        ),
        (dict(optimizer="prodigy", lora_plus=4.0), "prodigy finds one step for A and B; leave out --lora-plus"),
        (dict(optimizer="prodigy", fot_parts="blocks", lora_plus=1.0), "leave blocks out of --fot-parts"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(more, says):
    with pytest.raises(ValueError, match="^[^\n]+$") as caught:
        optim.check_optimizer(
            config(**{"name": more["optimizer"]} | {k: v for k, v in more.items() if k != "optimizer"}), CPU
        )
    assert says in str(caught.value)


@pytest.mark.parametrize("name, module", [("adamw8bit", "bitsandbytes.optim"), ("prodigy", "prodigyopt")])
def test_a_missing_package_is_named_with_the_way_out(name, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    model = network()
    with pytest.raises(
        ValueError, match=f"--optimizer {name} needs the package .*: pip install .*, or use --optimizer adamw"
    ):
        optim.make_optimizer(decay_groups(model, 0.1), config(name), model, CPU)


def test_train_lm_under_muon_resumes_exactly_and_says_what_it_does_not_read(lm_base, tmp_path, monkeypatch, capsys):
    flags = [*lm_base, *"--optimizer muon --schedule fot --fot-window 4 --decay-shape sqrt --tail-average 0.4".split()]
    assert train(flags, tmp_path / "whole") == 0
    original = Windows.batch_indices

    def stop(self, step, *args):
        if step == 8:
            raise KeyboardInterrupt
        return original(self, step, *args)

    with monkeypatch.context() as m:
        m.setattr(Windows, "batch_indices", stop)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            sys.exit(train(flags, tmp_path / "cut"))
    assert train(flags, tmp_path / "cut", "--resume") == 0
    same_run(tmp_path / "whole", tmp_path / "cut")
    assert rows(tmp_path / "whole", "fot")[-1]["slope"] is not None
    for more, says in (
        ("--optimizer sgd --beta1 0.5", "--beta1 is read by --optimizer adamw or"),
        ("--optimizer prodigy", "--lr is read by --optimizer adamw or"),
        ("--step-factor 2", "--step-factor is read by --optimizer schedule-free-plus or prodigy alone"),
        ("--momentum 0.5", "--momentum is read by --optimizer muon or sgd alone"),
        ("--schedule cosine --decay-shape sqrt", "--decay-shape is read by --schedule wsd or fot alone"),
        ("--optimizer lion", "invalid choice: 'lion'"),
    ):
        fails(capsys, says, lm_base, tmp_path / "none", *more.split())


def test_a_run_with_a_tail_average_cannot_get_more_steps():
    constant = dict(schedule="constant", lr_warmup=0.0)
    assert optim.plans_no_end(config("adamw", **constant), 20, 24, 48)
    assert not optim.plans_no_end(config("adamw", tail_average=0.1, **constant), 20, 24, 48)


def test_a_validation_that_only_the_end_asked_for_has_moved_the_share_of_the_unigram():
    """A longer run would not have made it: step 24 of 24, with --eval-every 10."""
    driven = config("adamw", schedule="constant", lr_warmup=0.0, unigram=0.4, unigram_gain=3.0, eval_every=10)
    assert not optim.plans_no_end(driven, 24, 24, 48)
    assert optim.plans_no_end(driven, 20, 24, 48)
    driven.eval_every = 12
    assert optim.plans_no_end(driven, 24, 24, 48)


@pytest.mark.parametrize(
    "flags, same", [({}, True), ({"loss": "dpsm"}, False), ({"unigram": 0.1}, False), ({"label_smoothing": 0.1}, False)]
)
def test_the_nll_is_the_loss_of_plain_ce_alone(flags, same):
    model = network()
    rule = optim.rule_of(config("adamw", **flags), torch.optim.AdamW(model.parameters()), World(0, 1, CPU))
    assert rule.same_units is same
