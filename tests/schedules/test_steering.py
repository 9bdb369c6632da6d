"""One interface for all rules: what a loop may ask, under a function of the step and under a rule that measures."""

import pytest
import torch

from schedules import (
    ADAPTIVE,
    GREEDY,
    PARTS,
    RULES,
    SCHEDULE_FREE,
    SCHEDULES,
    FoT,
    Greedy,
    Planned,
    lr_factor,
    make_rule,
    rule_reads,
)
from schedules.gradient_stats import STATISTICS


def two_groups(lr=0.1):
    a, b = torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.ones(3))
    return torch.optim.AdamW([{"params": [a]}, {"params": [b], "lr": lr / 5}], lr=lr)


def one_step(rule, t):
    """A step as a loop makes it: (learning rate, the rule's questions, decision)."""
    generator = torch.Generator().manual_seed(t)
    optimizer = rule.optimizer
    asked = rule.lr, rule.splits, rule.gates, rule.weighs_blocks
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.randn(p.shape, generator=generator) / 2
    rule.observe(torch.tensor(3.0 - t / 50), torch.tensor(1), share=0.5 if rule.splits else None)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = p.grad + torch.randn(p.shape, generator=generator) / 2
    rule.observe(
        3.0 - t / 50,
        fisher=torch.rand(6, generator=generator) if rule.gates else None,
        prompt=torch.arange(6) < 3,
        answer=torch.arange(6) >= 3,
    )
    optimizer.clipped_by = torch.tensor(2.0)
    optimizer.step()
    return *asked, rule.step()


@pytest.mark.parametrize("name", RULES)
def test_every_rule_answers_the_same_loop(name):
    optimizer = two_groups()
    keys = set(optimizer.param_groups[0])
    rule = make_rule(name, optimizer, 20, warmup=0.1, every=4)
    assert isinstance(rule, FoT if name in ADAPTIVE else Greedy if name == GREEDY else Planned)
    seen = []
    for t in range(20):
        first, second = (group["lr"] for group in optimizer.param_groups)
        assert rule.lr == first and second == pytest.approx(first / 5, rel=1e-15)
        seen.append(one_step(rule, t))
    _, splits, gates, _, decisions = zip(*seen, strict=True)
    if name in ADAPTIVE:
        assert [t for t, s in enumerate(splits) if s] == [4, 8, 12, 16]
        assert [t for t, g in enumerate(gates) if g] == ([3, 7, 11, 15, 19] if "fot" in name else [])
        assert [t for t, d in enumerate(decisions) if d] == [3, 7, 11, 15]
        assert rule.counts["decisions"] == 4 and decisions[15] == rule.decision and str(rule)
        assert (decisions[15]["h"] is not None) == ("fot" in name) and decisions[15]["noise"] is not None
    elif name == GREEDY:
        assert not any((*splits, *gates, *decisions)) and rule.counts == {"raised": 1, "lowered": 0, "not_finite": 0}
    else:
        assert not any((*splits, *gates, *decisions)) and (rule.counts, rule.state_dict(), str(rule)) == ({}, None, "")
        assert [lr for lr, *_ in seen] == [0.1 * lr_factor(name, t, 20, warmup=0.1) for t in range(20)]
        assert set(optimizer.param_groups[0]) == keys


@pytest.mark.parametrize("name", ["wsd", "polynomial", "fot", "greedy"])
@pytest.mark.parametrize("cut", [1, 5, 13])
def test_restored_it_goes_on_with_the_same_bits(name, cut):
    def rule():
        return make_rule(name, two_groups(), 20, warmup=0.1, every=4, decay=0.5, power=2.0, floor=0.01)

    whole, first, second = rule(), rule(), rule()
    expected = [one_step(whole, t)[0] for t in range(20)]
    got = [one_step(first, t)[0] for t in range(cut)]
    for theirs, ours in zip(first.optimizer.param_groups, second.optimizer.param_groups, strict=True):
        for p, q in zip(theirs["params"], ours["params"], strict=True):
            q.data.copy_(p.data)
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.restore(first.state_dict(), cut)
    assert got + [one_step(second, t)[0] for t in range(cut, 20)] == expected


def test_what_clipping_divided_by_is_found_on_the_optimizer_or_the_rule_and_forgotten():
    found = []
    for place in ("optimizer", "rule", "nowhere"):
        rule = make_rule("fot", two_groups(), 20, every=4)
        for _ in range(6):
            for group in rule.optimizer.param_groups:
                for p in group["params"]:
                    p.grad = torch.full_like(p, 0.25)
            if place != "nowhere":
                (rule.optimizer if place == "optimizer" else rule).clipped_by = torch.tensor(2.0)
            rule.optimizer.step()
            assert rule.clipped_by is None and not hasattr(rule.optimizer, "clipped_by")
            rule.step()
        found.append(float(rule.stats.sums[STATISTICS.index("batch2")]))
    assert found[0] == found[1] == 4 * found[2]


def test_the_first_micro_batch_is_kept_in_steps_that_split_alone():
    rule, kept = make_rule("fot", two_groups(), 20, every=4), []
    rule.stats.micro = kept.append
    for t in range(8):
        rule.observe(3.0, share=t / 10)  # of every step's first micro-batch, and none of the second's
        rule.observe(3.0)
        rule.optimizer.step()
        rule.step()
    assert kept == [0.4]


def test_a_learning_rate_in_a_tensor_is_set_in_place():
    optimizer = two_groups()
    held = [torch.tensor(0.1), torch.tensor(0.02)]
    for group, lr in zip(optimizer.param_groups, held, strict=True):
        group["lr"] = lr
    rule = make_rule("linear", optimizer, 10)
    rule.step()
    assert [float(lr) for lr in held] == pytest.approx([0.09, 0.018]) and optimizer.param_groups[0]["lr"] is held[0]


def test_what_a_rule_reads():
    assert rule_reads("fot", PARTS) == {"gate", "blocks"} and rule_reads("fot", ("gate", "noise")) == {"gate"}
    assert rule_reads("fot-literal", ()) == {"gate"} and rule_reads("bacon", PARTS) == {"blocks"}
    assert not any(rule_reads(name, PARTS) for name in (*SCHEDULES, GREEDY, SCHEDULE_FREE, "snac"))
    blocks = torch.optim.AdamW([{"params": [torch.nn.Parameter(torch.ones(1))], "block": 0}])
    for rms, asks in ((None, False), (lambda: torch.ones(1, 2), True)):
        assert make_rule("bacon", blocks, 9, every=1, block_rms=rms).weighs_blocks is asks


def test_an_unknown_rule_is_named():
    with pytest.raises(ValueError, match="unknown learning-rate rule 'fott'; expected one of cosine, .*schedule-free"):
        make_rule("fott", two_groups(), 10)
