"""ProperScoreLoss where somebody else owns the loop: whose step alpha follows, what FoT sees, batches of no token."""

import logging

import pytest
import torch

from kernels import ProperScoreLoss
from kernels.losses import alpha_at
from schedules import FoT

transformers = pytest.importorskip("transformers")
STEPS = 24


def model_of():
    torch.manual_seed(0)
    shape = dict(vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape))


def trainer_of(folder, model=None, optimizers=(None, None), loss=None, **more):
    data = [{"input_ids": x, "labels": x.clone()} for x in (torch.arange(i, i + 12) % 32 for i in range(64))]
    how = dict(max_steps=STEPS, per_device_train_batch_size=4, report_to=[], use_cpu=True, disable_tqdm=True)
    how |= dict(logging_steps=1000, save_strategy="no", eval_strategy="no") | more
    args = transformers.TrainingArguments(str(folder), **how)
    given = dict(train_dataset=data, eval_dataset=data[:8], optimizers=optimizers, compute_loss_func=loss)
    return transformers.Trainer(model or model_of(), args, **given)


class Tuples(torch.nn.Module):
    """A model as those that return tuples: the loss first where it is given labels."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, input_ids, labels=None):
        return self.inner(input_ids=input_ids, labels=labels).to_tuple()


class Recorded(ProperScoreLoss):
    """Alpha of each training forward."""

    def forward(self, logits, *more):
        if logits.requires_grad:
            self.alphas.append(self.alpha.item())
        return super().forward(logits, *more)


def recorded(**how) -> Recorded:
    loss = Recorded("dpsm", **how)
    loss.alphas = []
    return loss


@pytest.mark.parametrize("ramp", [{}, dict(warmup=0.5), dict(warmup=0.5, start=0.25, alpha_max=0.5)])
def test_alpha_follows_the_trainers_step(tmp_path, ramp):
    """Under accumulation, with evaluations between, and resumed."""
    loss = recorded(**ramp)
    how = dict(gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=5, save_strategy="steps", save_steps=10)
    trainer_of(tmp_path, loss=loss.trainer_loss, **how).train()
    want = [alpha_at(step, STEPS, **ramp) for step in range(STEPS) for _ in range(2)]
    assert loss.alphas == pytest.approx(want)
    again = recorded(**ramp)
    trainer = trainer_of(tmp_path, loss=lambda *a, **k: again.trainer_loss(*a, **k), **how)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert again.alphas == pytest.approx(want[20:])


def test_what_the_caller_says_of_alpha_holds(tmp_path):
    fixed = recorded(alpha=0.25)
    trainer_of(tmp_path, loss=fixed.trainer_loss, max_steps=3).train()
    assert fixed.alphas == [0.25] * 3
    told = recorded(warmup=0.5)
    told.set_step(1, 4)
    trainer_of(tmp_path, loss=told.trainer_loss, max_steps=3).train()
    assert told.alphas == [0.5] * 3


def test_a_ramp_without_a_step_is_an_error():
    logits, targets = torch.randn(1, 4, 8, requires_grad=True), torch.zeros(1, 4, dtype=torch.long)
    loss = ProperScoreLoss("dpsm", warmup=0.1)
    with pytest.raises(ValueError, match=r"warmup=0.1: alpha's step is not known; call set_step\(step, total\)"):
        loss(logits, targets)
    with pytest.raises(ValueError, match="no transformers.Trainer calls"):
        ProperScoreLoss("dpsm").trainer_loss({"logits": logits}, targets)
    with torch.no_grad():
        loss(logits, targets)  # of an evaluation: at the ramp's end
    loss.set_step(0, 10)
    assert loss(logits, targets).item() == ProperScoreLoss("ce")(logits, targets).item()
    for steady in (ProperScoreLoss("dpsm"), ProperScoreLoss("dpsm", alpha=0.5, warmup=0.1), ProperScoreLoss("brier")):
        steady(logits, targets).backward()
    ProperScoreLoss("brier", warmup=0.1).trainer_loss({"logits": logits}, targets)  # reads no alpha


@pytest.mark.parametrize("name", ["ce", "dpsm", "focal", "power"])
@pytest.mark.parametrize("items", [0, torch.tensor(0), None])
def test_a_batch_without_a_token_is_0(name, items):
    logits = torch.randn(2, 5, 8, requires_grad=True)
    labels = torch.full((2, 5), -100)
    loss = ProperScoreLoss(name, **{"alpha": 0.5} if name == "dpsm" else {}).trainer_loss(
        {"logits": logits}, labels, items
    )
    loss.backward()
    assert loss.item() == 0 and logits.grad.abs().max() == 0


@pytest.mark.parametrize("how", ["model", "tuples", "loss module", "blind", "smoothing"])
def test_fot_sees_the_loss_or_says_that_it_does_not(tmp_path, how, caplog):
    model, loss = model_of(), ProperScoreLoss("dpsm")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    fot = FoT(optimizer, STEPS, every=4)
    model = Tuples(model) if how == "tuples" else model
    fot.watch(loss if how == "loss module" else model)
    own = loss.trainer_loss if how in ("loss module", "blind") else None
    more = dict(label_smoothing_factor=0.1) if how == "smoothing" else {}
    trainer = trainer_of(tmp_path, model, (optimizer, fot), own, gradient_accumulation_steps=2, logging_steps=1, **more)
    with caplog.at_level(logging.WARNING, "scorecast"):
        trainer.train()
    said = [r.getMessage() for r in caplog.records if "nothing is observed" in r.getMessage()]
    if how in ("blind", "smoothing"):
        assert len(said) == 1 and fot.forecaster.points == 0
    else:
        assert not said and fot.forecaster.points == STEPS - 4
    if how in ("model", "tuples"):
        logged = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        assert fot.forecaster.recent == pytest.approx(logged[: STEPS - 4], rel=1e-3)
