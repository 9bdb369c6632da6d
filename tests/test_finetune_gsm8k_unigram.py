"""finetune_gsm8k.py with a share of its loss towards how often the answers have each token."""

import json

import numpy as np
import pytest
import torch
from gsm8k_runs import rows, tune
from signals import terminated_in_validation
from tiny_gsm8k import write_model

import eval.answers
from data.gsm8k import load_gsm8k, split_heldout
from data.packing import batch_indices, pack
from data.prompts import Prompter, make_examples, make_targets
from kernels.losses import alpha_at
from model import lora
from runtime.folder import load_checkpoint


@pytest.mark.parametrize("kind", ["fp32", "bf16", "nf4"])
def test_the_loss_is_smoothed_towards_the_answers_frequencies(base, model, problems, tmp_path, kind):
    """The loss of a step at lr 0, of micro-batches and with a frozen head, and that of its validation, against their
    definition in float64: (1 - u) (CE / 2 + Brier / 2) + u CE(q, p), with q the add-one frequencies of the answers'
    tokens. A base of 16 bits rounds q in its product with the head."""
    if kind == "nf4":
        pytest.importorskip("bitsandbytes", reason="NF4 needs bitsandbytes")
    more = "--loss dpsm --alpha-schedule fixed --alpha-max 0.5 --unigram 0.3 --lr 0 --steps 1 --log-every 1"
    assert tune([*base, "--base", kind], tmp_path / "run", *more.split(), "--eval-problems", 1) == 0
    kept, held = split_heldout(load_gsm8k(problems, "train"), 8)
    prompter, texts = Prompter(str(model)), make_targets(kept + held, "text")
    train, heldout = (make_examples(part, texts, prompter, 192, "") for part in (kept, held))
    q = np.bincount([t for e in train for t in e.tokens[e.prompt :]], minlength=prompter.definition.size) + 1.0
    q = torch.from_numpy(q / q.sum())
    decoder = lora.load_base(model, kind, torch.float32)

    @torch.no_grad()
    def by_definition(examples) -> tuple[float, float]:
        """(the loss, its NLL)."""
        packed = pack(examples, 192)
        at, y = packed.seen("answer")[:2]
        hidden = decoder(packed.tokens_RT, documents_BT=packed.documents_RT).flatten(0, 1)[at]
        log_p = torch.log_softmax(hidden.double() @ decoder.head_weight.double().t(), -1)
        ce, p = -log_p.gather(1, y[:, None])[:, 0], log_p.exp()
        brier = (p * p).sum(1) - 2 * (-ce).exp() + 1
        smooth = -log_p[:, : len(q)] @ q
        assert abs(smooth.mean() - ce.mean()) > 0.05
        return (0.35 * ce + 0.35 * brier + 0.3 * smooth).mean().item(), ce.mean().item()

    (step,), (val,) = rows(tmp_path / "run", "train"), rows(tmp_path / "run", "val")
    batch = [train[i] for i in batch_indices(len(train), 0, 8, 1)]
    rel = 2e-3 if kind == "bf16" else 1e-5
    for row, examples in ((step, batch), (val, heldout)):
        loss, nll = by_definition(examples)
        assert (row["loss"], row["nll"]) == pytest.approx((loss, nll), rel=rel)
    assert step["unigram"] == 0.3 and step["alpha"] == pytest.approx(0.35)
    assert not {"fisher_prompt", "fisher_answer"} & set(step)  # that of the smoothed loss is not known


def test_the_share_follows_over_confidence_and_resumes(base, problems, tmp_path, monkeypatch):
    """On a model that is sure of itself. SIGTERM in the third validation of four: what was measured by then moves
    nothing, and the run that goes on makes that validation first, to the shares, rows and weights of the whole one."""
    texts = [json.loads(line) for line in (problems / "train.jsonl").read_text().splitlines()]
    sure = write_model(tmp_path / "sure", [t["question"] + t["answer"] for t in texts], initializer_range=0.4)
    flags = [*base, "--model", sure, "--loss", "dpsm", "--warmup", 0.5, "--unigram", 0.4, "--unigram-gain", 0.3]
    flags = [*map(str, flags), *"--steps 8 --eval-every 2 --log-every 1 --lora-dropout 0.1 --eval-problems 1".split()]
    assert tune(flags, tmp_path / "whole") == 0
    share, expected, val = 0.0, {}, {r["step"]: r for r in rows(tmp_path / "whole", "val")}
    for step in range(1, 9):
        expected[step] = share
        if step in val:
            share = min(max(share + 0.3 * (val[step]["confidence"] - val[step]["accuracy"]), 0.0), 0.4)
    logged = rows(tmp_path / "whole", "train")
    assert {r["step"]: r["unigram"] for r in logged} == pytest.approx(expected)
    assert 0 == expected[2] < expected[5] < expected[7] < 0.4
    for r in logged:
        assert r["alpha"] == pytest.approx((1 - r["unigram"]) * alpha_at(r["step"] - 1, 8, warmup=0.5), rel=1e-6)
    with terminated_in_validation(monkeypatch, eval.answers, 3):
        assert tune(flags, tmp_path / "cut") == 143
    saved = load_checkpoint(tmp_path / "cut" / "last.pt")
    assert saved["step"] == 6 and saved["owed"] and saved["unigram"] == logged[5]["unigram"]
    assert tune(flags, tmp_path / "cut", "--resume") == 0
    for kind in ("train", "val"):
        assert rows(tmp_path / "cut", kind) == rows(tmp_path / "whole", kind)
    ours, theirs = (load_checkpoint(tmp_path / out / "last.pt") for out in ("cut", "whole"))
    assert all(torch.equal(ours["model"][name], theirs["model"][name]) for name in theirs["model"])
    assert ours["unigram"] == theirs["unigram"] == pytest.approx(share)
