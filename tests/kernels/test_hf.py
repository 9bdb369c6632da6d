"""ScoreTrainer and ScoreSFTTrainer: the losses of a plain loop, its figures in the logs, on ranks, resumed, refused."""

import importlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from readme import python_examples
from tiny_hf import V, samples, tiny
from torch.nn.functional import pad

from kernels import Calibration, ProperScoreLoss, alpha_at, linear_score, make_score
from kernels import hf as ours
from kernels.hf import patch, unpatch

transformers = pytest.importorskip("transformers", reason="needs transformers (requirements-dev.txt)")
pytest.importorskip("accelerate", reason="needs accelerate (requirements-dev.txt)")
STEPS, EVERY, LR = 12, 3, 5e-3
EPS = 1e-3  # of AdamW: a usual one has it take the rounding of a small gradient to a part of a step
WEIGHTS = 1e-5  # after 12 steps of up to 5e-3
FIGURES = {"entropy": "entropy", "accuracy": "accuracy", "ece": "ece10", "brier": "brier", "nll": "nll"}
PLAIN = dict(learning_rate=LR, lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=0.0, optim="adamw_torch")
PLAIN |= dict(adam_epsilon=EPS)
QUIET = dict(report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", logging_steps=EVERY)


def arguments(folder, kind=None, **given):
    kind = kind or transformers.TrainingArguments
    return kind(str(folder), **PLAIN | QUIET | dict(max_steps=STEPS, per_device_train_batch_size=2) | given)


class Recorder:
    """A collator that keeps what it gave, so that another loop trains on the same batches in the same order."""

    def __init__(self, collate=None):
        self.collate, self.batches = collate or transformers.default_data_collator, []

    def __call__(self, rows):
        self.batches.append(self.collate(rows))
        return self.batches[-1]


def shifted(model, labels):
    return labels if model.config.is_encoder_decoder else pad(labels[:, 1:], (0, 1), value=-100)


def forward(model, inputs):
    """(hidden states, bias) by the model's parts."""
    if model.config.is_encoder_decoder:
        decoder = model.prepare_decoder_input_ids_from_labels(inputs["labels"])
        how = dict(attention_mask=inputs["attention_mask"], decoder_input_ids=decoder)
        return model.model(inputs["input_ids"], **how).last_hidden_state, model.final_logits_bias[0]
    return model.base_model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state, None


def plain_loop(model, batches, accumulation, score="dpsm", steps=STEPS, warmup=0.5, prior=None, share=0.0):
    """Rows as the Trainer logs them: torch's AdamW and linear_score, smoothed by ``share`` towards ``prior``."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR, eps=EPS, weight_decay=0.0)
    rows, window, total = [], Calibration(), 0.0
    for step in range(steps):
        micro = batches[step * accumulation : (step + 1) * accumulation]
        targets = [shifted(model, b["labels"]) for b in micro]
        tokens = torch.tensor(float(sum((t != -100).sum() for t in targets)))
        alpha = (1 - share) * alpha_at(step, steps, warmup=warmup)
        for inputs, target in zip(micro, targets, strict=True):
            hidden, bias = forward(model, inputs)
            loss, moments = linear_score(
                hidden.flatten(0, 1),
                model.get_output_embeddings().weight,
                target.flatten(),
                make_score(score, alpha=alpha),
                bias=bias,
                denominator=tokens,
            )
            if share:
                z = hidden @ model.get_output_embeddings().weight.T + (0.0 if bias is None else bias)
                gap = z.gather(-1, target.clamp_min(0)[..., None])[..., 0] - z @ prior
                loss = loss + share * gap[target != -100].sum() / tokens
            loss.backward()
            window.update(moments)
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % EVERY == 0:
            numbers = window.compute()
            row = {name: numbers[key] for name, key in FIGURES.items()}
            rows.append(row | dict(step=step + 1, loss=total / EVERY, alpha=alpha))
            window, total = Calibration(), 0.0
    return rows


def assert_logged(log, rows):
    logged = [row for row in log if "loss" in row]
    assert [row["step"] for row in logged] == [row["step"] for row in rows]
    for got, want in zip(logged, rows, strict=True):  # fp32 losses and moments, sums in another order
        assert {k: got[k] for k in want} == pytest.approx(want, rel=1e-5, abs=1e-6)


def same_weights(model, other):
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        if name.endswith("k_proj.bias"):  # has no effect: its gradient is rounding, which Adam takes to full steps
            continue
        torch.testing.assert_close(p, q, rtol=0, atol=WEIGHTS, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name, accumulation", [("llama", 1), ("llama", 2), ("gpt2", 2), ("bart", 2)])
def test_a_run_is_that_of_a_plain_loop(tmp_path, name, accumulation):
    """Losses, figures, alpha and weights; prompts and padding make each micro-batch's number of tokens another."""
    recorder = Recorder()
    trainer = ours.ScoreTrainer(
        tiny(name),
        arguments(tmp_path, gradient_accumulation_steps=accumulation),
        score=ProperScoreLoss("dpsm", warmup=0.5),
        train_dataset=samples(60),
        data_collator=recorder,
    )
    trainer.train()
    model = tiny(name)
    rows = plain_loop(model, recorder.batches, accumulation)
    assert rows[-1]["loss"] < rows[0]["loss"] and rows[0]["alpha"] == pytest.approx(1 / 3) and rows[1]["nll"] > 1
    assert_logged(trainer.state.log_history, rows)
    same_weights(trainer.model, model)


def test_evaluation_gives_the_figures_of_its_set(tmp_path):
    data, model = samples(7, seed=5), tiny("llama")
    how = dict(eval_strategy="steps", eval_steps=6, per_device_eval_batch_size=3, logging_steps=4)
    args = arguments(tmp_path, metric_for_best_model="eval_ece", **how)
    trainer = ours.ScoreTrainer(model, args, score="brier", train_dataset=samples(20), eval_dataset=data)

    def of_set():
        inputs = transformers.default_data_collator(data)
        model.eval()
        with torch.no_grad():
            logits = model(inputs["input_ids"], inputs["attention_mask"]).logits
        from kernels import softmax_moments

        found = Calibration()
        found.update(softmax_moments(logits.flatten(0, 1), shifted(model, inputs["labels"]).flatten()))
        return {f"eval_{name}": found.compute()[key] for name, key in FIGURES.items()}

    want, got = of_set(), trainer.evaluate()
    assert {k: got[k] for k in want} == pytest.approx(want, rel=1e-5)
    assert trainer.evaluate({"a": data, "b": data[:2]})["eval_a_ece"] == got["eval_ece"]
    trainer.train()
    rows = [row for row in trainer.state.log_history if "eval_ece" in row and row["step"] > 0]
    assert [row["step"] for row in rows] == [6, 12]
    assert not any("alpha" in row for row in trainer.state.log_history)  # Brier reads none
    assert {k: rows[-1][k] for k in want} == pytest.approx(of_set(), rel=1e-5)
    alone = ours.ScoreTrainer(
        tiny("llama"), arguments(tmp_path, logging_steps=4), score="brier", train_dataset=samples(20)
    )
    alone.train()
    windows = [[r["nll"] for r in t.state.log_history if "loss" in r] for t in (trainer, alone)]
    assert windows[0] == windows[1] and len(windows[0]) == 3  # what was evaluated is in none of them
    assert trainer.predict(data).predictions is None


def test_a_resumed_run_goes_on_with_the_same_alpha_and_losses(tmp_path):
    def trainer(**given):
        torch.manual_seed(0)
        args = arguments(tmp_path, save_strategy="steps", save_steps=6, **given)
        score = ProperScoreLoss("dpsm", warmup=1.0, schedule="cosine")
        return ours.ScoreTrainer(tiny("llama"), args, score=score, train_dataset=samples(60))

    whole = trainer()
    whole.train()
    again = trainer()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    want = [r for r in whole.state.log_history if "loss" in r]
    got = [r for r in again.state.log_history if "loss" in r]
    assert [r["step"] for r in got] == [3, 6, 9, 12]
    for name in ("loss", "alpha", "nll", "ece"):
        assert [r[name] for r in got] == [r[name] for r in want]
    assert want[-1]["alpha"] == pytest.approx(alpha_at(11, 12, warmup=1.0, schedule="cosine"))
    same_weights(again.model, whole.model)


def frequencies(data, shift):
    labels = torch.cat([row["labels"][shift:] for row in data])
    counts = torch.bincount(labels[labels != -100], minlength=V) + 1.0
    return counts / counts.sum()


@pytest.mark.parametrize("name, score", [("llama", "dpsm"), ("bart", "ce")])
def test_a_share_of_the_unigram_is_that_of_a_plain_loop(tmp_path, name, score):
    """The labels are counted as they are predicted, once each, and the batches come as they do without it."""
    recorder, data = Recorder(), samples(25)
    how = dict(train_dataset=data, score=ProperScoreLoss(score, **dict(warmup=0.5) if score == "dpsm" else {}))
    args = arguments(tmp_path, max_steps=6)
    trainer = ours.ScoreTrainer(tiny(name), args, data_collator=recorder, unigram=0.3, **how)
    before = torch.get_rng_state()
    trainer._label_counts()
    assert torch.equal(torch.get_rng_state(), before)
    recorder.batches.clear()
    trainer.train()
    counted = -(-len(data) // trainer.args.eval_batch_size)  # batches that were collated for it
    used, alone = recorder.batches[counted : counted + 6], Recorder()
    ours.ScoreTrainer(tiny(name), arguments(tmp_path, max_steps=3), data_collator=alone, **how).train()
    assert all(torch.equal(a["labels"], b["labels"]) for a, b in zip(used[:3], alone.batches[:3], strict=True))
    model, prior = tiny(name), frequencies(data, shift=name == "llama")
    rows = plain_loop(model, used, 1, score, steps=6, prior=prior, share=0.3)
    for row in rows:
        if score == "ce":
            del row["alpha"]
    assert_logged(trainer.state.log_history, [r | dict(unigram=0.3) for r in rows])
    same_weights(trainer.model, model)


def test_a_driven_share_follows_the_evaluations_also_when_resumed(tmp_path):
    def trainer():
        args = arguments(tmp_path, eval_strategy="steps", eval_steps=EVERY, save_strategy="steps", save_steps=6)
        data = dict(train_dataset=samples(60), eval_dataset=samples(6, seed=5))
        return ours.ScoreTrainer(tiny("llama"), args, score="ce", unigram=0.4, unigram_gain=0.5, **data)

    whole, again = trainer(), trainer()
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    share, found = 0.0, []
    for row in whole.state.log_history:
        if "unigram" in row:
            found.append((row["unigram"], share))
        elif "eval_confidence" in row:
            share = min(max(share + 0.5 * (row["eval_confidence"] - row["eval_accuracy"]), 0.0), 0.4)
    assert [got for got, _ in found] == [want for _, want in found]
    assert len(found) == 4 and found[0][0] == 0 < found[1][0] < found[2][0]
    for got, want in zip(again.state.log_history, whole.state.log_history, strict=False):
        for name in ("loss", "unigram", "eval_loss", "eval_confidence"):
            assert got.get(name) == want.get(name), (got["step"], name)
    same_weights(again.model, whole.model)


def test_an_alpha_that_is_given_stays(tmp_path):
    score = ProperScoreLoss("dpsm", alpha=0.25)
    trainer = ours.ScoreTrainer(tiny("llama"), arguments(tmp_path, max_steps=3), score=score, train_dataset=samples(9))
    trainer.train()
    assert [row["alpha"] for row in trainer.state.log_history if "loss" in row] == [0.25]


def test_lora_and_a_model_made_by_model_init(tmp_path):
    peft = pytest.importorskip("peft", reason="needs peft (requirements-dev.txt)")

    def adapted():
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        return peft.get_peft_model(tiny("llama"), config)

    recorder = Recorder()
    how = dict(score=ProperScoreLoss("dpsm", warmup=0.5), train_dataset=samples(60), data_collator=recorder)
    trainer = ours.ScoreTrainer(args=arguments(tmp_path), model_init=adapted, **how)
    trainer.train()
    torch.manual_seed(trainer.args.seed)
    model = adapted()
    rows = plain_loop(model.base_model.model, recorder.batches, 1)
    assert_logged(trainer.state.log_history, rows)
    assert rows[-1]["loss"] != rows[0]["loss"]


def test_bf16_autocast_trains(tmp_path):
    given = dict(bf16=True, gradient_checkpointing=True)
    trainer = ours.ScoreTrainer(tiny("llama"), arguments(tmp_path, **given), score="ce", train_dataset=samples(60))
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert rows[-1]["loss"] < rows[0]["loss"] and rows[0]["loss"] == pytest.approx(rows[0]["nll"], rel=0.1)


# ------------------------------------------------------------------------------------------------
# ranks


RANKS = """
import sys
import torch.multiprocessing as mp
sys.path[:0] = [".", "tests", "tests/kernels"]
import transformers.trainer
import test_hf
mp.start_processes(test_hf._rank, (sys.argv[1], sys.argv[2]), nprocs=2, start_method="fork")  # one import for both
"""


def _rank(rank, folder, port):
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    os.environ |= dict(MASTER_PORT=port, LOCAL_WORLD_SIZE="2")
    torch.set_num_threads(1)
    torch.save(_on_ranks(f"{folder}/{rank}", 1, ddp_backend="gloo"), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def _on_ranks(folder, batch_size, **how):
    """Six steps of 4 samples on all ranks together, and an evaluation of 5."""
    how |= dict(gradient_accumulation_steps=2, per_device_train_batch_size=batch_size, max_steps=6)
    how |= dict(train_sampling_strategy="sequential", per_device_eval_batch_size=batch_size)
    score = ProperScoreLoss("dpsm", warmup=0.5)
    data = dict(train_dataset=samples(25), eval_dataset=samples(5, seed=5))  # of the 25 the last is counted alone
    trainer = ours.ScoreTrainer(tiny("llama"), arguments(folder, **how), score=score, unigram=0.3, **data)
    trainer.train()
    found = trainer.evaluate()
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    return dict(log=trainer.state.log_history, found=found, weights=weights)


def test_two_ranks_are_one(tmp_path):
    """Same losses, figures and weights; the fifth sample of the evaluation, which a sampler repeats, counts once."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    command, root = [sys.executable, "-c", RANKS, str(tmp_path), port], Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    one = _on_ranks(tmp_path / "one", 2)
    ranks = [torch.load(tmp_path / f"{r}.pt", weights_only=False) for r in range(2)]
    names = ("step", "loss", "alpha", *FIGURES)
    rows = [{k: row[k] for k in names} for row in one["log"] if "loss" in row]
    for rank in ranks:
        assert_logged(rank["log"], rows)
        want = {f"eval_{k}": one["found"][f"eval_{k}"] for k in FIGURES}
        assert {k: rank["found"][k] for k in want} == pytest.approx(want, rel=1e-5)
        for name, p in rank["weights"].items():
            torch.testing.assert_close(p, one["weights"][name], rtol=0, atol=WEIGHTS)


# ------------------------------------------------------------------------------------------------
# trl


@pytest.fixture(scope="module")
def tokenizer():
    """Words w0 to w93 and four others: the vocabulary of the models."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: i for i, word in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *(f"w{i}" for i in range(V - 4))])}
    found = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    found.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=found, **special)


def texts(n):
    def words(start, count):
        return " ".join(f"w{(7 * start + j) % 90}" for j in range(count))

    datasets = pytest.importorskip("datasets", reason="needs datasets (requirements.txt)")
    return datasets.Dataset.from_list(
        [dict(prompt=words(i, 3 + i % 4), completion=" " + words(i + 1, 2 + i % 5)) for i in range(n)]
    )


@pytest.fixture
def trl():
    return pytest.importorskip("trl", reason="needs trl (requirements-dev.txt)")


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
def test_sft_is_a_plain_loop_over_the_completions(tmp_path, trl, tokenizer, lora):
    args = arguments(tmp_path, trl.SFTConfig, gradient_accumulation_steps=2, bf16=False)
    how = dict(score=ProperScoreLoss("dpsm", warmup=0.5), train_dataset=texts(60), processing_class=tokenizer)
    if lora:
        peft = pytest.importorskip("peft", reason="needs peft (requirements-dev.txt)")
        how["peft_config"] = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    trainer = ours.ScoreSFTTrainer(tiny("llama"), args=args, unigram=0.0 if lora else 0.2, **how)
    recorder = trainer.data_collator = Recorder(trainer.data_collator)
    initial = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    calls = []
    trainer.model.get_output_embeddings().register_forward_hook(
        lambda m, i, logits: calls.append(logits.shape[:2].numel())
    )
    trainer.train()
    model = trainer.model.base_model.model if lora else trainer.model
    assert len(calls) == 2 * STEPS and max(calls) <= 2  # one forward a micro-batch, and no logits of its tokens
    trained = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    with torch.no_grad():
        for name, p in trainer.model.named_parameters():
            p.copy_(initial[name])
    prior, share = (None, 0.0) if lora else (trainer._unigram.prior, 0.2)
    if share:
        counted = recorder.batches[: -(-60 // trainer.args.eval_batch_size)]
        del recorder.batches[: len(counted)]
        torch.testing.assert_close(prior, frequencies([dict(labels=x) for b in counted for x in b["labels"]], 1))
    rows = plain_loop(model, recorder.batches, 2, prior=prior, share=share)
    assert_logged(trainer.state.log_history, rows)
    for name, p in trainer.model.named_parameters():
        torch.testing.assert_close(p, trained[name], rtol=0, atol=WEIGHTS)
    logged = [row for row in trainer.state.log_history if "loss" in row]
    assert logged[-1]["mean_token_accuracy"] == logged[-1]["accuracy"]
    assert logged[-1]["num_tokens"] == sum(b["attention_mask"].sum().item() for b in recorder.batches[: 2 * STEPS])
    prompts = recorder.batches[0]["labels"] == -100
    assert prompts[:, :3].all() and not prompts.all()


def test_sft_evaluates_and_says_what_it_cannot(tmp_path, trl, tokenizer):
    how = dict(train_dataset=texts(6), eval_dataset=texts(5), processing_class=tokenizer)

    def trainer(model="llama", **given):
        args = arguments(tmp_path, trl.SFTConfig, bf16=False, **given)
        return ours.ScoreSFTTrainer(tiny(model), args=args, score="brier", **how)

    found = trainer().evaluate()
    assert found["eval_brier"] == pytest.approx(found["eval_loss"], rel=0.1)
    assert found["eval_mean_token_accuracy"] == found["eval_accuracy"] and found["eval_ece"] > 0
    with pytest.raises(ValueError, match="loss_type='dft' and score are two losses"):
        trainer(loss_type="dft")
    with pytest.raises(ValueError, match="set router_aux_loss_coef=0.0"):
        trainer("mixtral")


@pytest.mark.parametrize("order", ["before", "before lora", "after"])
def test_trls_own_trainer_on_a_patched_model_is_an_error(tmp_path, trl, tokenizer, order):
    """It would train on its own loss."""
    model, how = tiny("llama"), {}
    if order == "before lora":
        peft = pytest.importorskip("peft", reason="needs peft (requirements-dev.txt)")
        how["peft_config"] = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    if order != "after":
        patch(model, "brier")
    args = arguments(tmp_path, trl.SFTConfig, bf16=order == "before")  # accelerate wraps the forward for bf16
    trainer = trl.SFTTrainer(model, args=args, train_dataset=texts(6), processing_class=tokenizer, **how)
    if order == "after":
        patch(model, "brier")
    with pytest.raises(ValueError, match="with trl use ScoreSFTTrainer") as caught:
        trainer.train()
    assert "\n" not in str(caught.value)
    unpatch(model)
    trainer.train()


# ------------------------------------------------------------------------------------------------
# refusals, and the README


def test_bad_arguments_are_named(tmp_path):
    def trainer(score="brier", model=None, data=None, given=None, **how):
        args = arguments(tmp_path, **given or {})
        return ours.ScoreTrainer(model or tiny("llama"), args, score=score, train_dataset=data or samples(4), **how)

    for given, words in (
        (dict(score=ProperScoreLoss("brier", reduction="sum")), "divides by the number of tokens; got reduction='sum'"),
        (dict(score="hinge"), "unknown loss 'hinge'"),
        (dict(score=torch.nn.CrossEntropyLoss()), "got CrossEntropyLoss"),
        (dict(compute_metrics=print), "compute_metrics reads logits"),
        (dict(preprocess_logits_for_metrics=print), "preprocess_logits_for_metrics reads logits"),
        (dict(compute_loss_func=print), "are two losses"),
        (dict(unigram=0.2), "smooths the score 'ce' or 'dpsm' by its mix, without a tail; got 'brier'"),
        (dict(score="ce", unigram=1.2), "unigram=1.2, unigram_gain=0.0: expected a share in .0, 1. and a gain"),
        (dict(score="ce", unigram_gain=3.0), "unigram=0.0, unigram_gain=3.0: expected a share"),
        (dict(score="ce", unigram=0.2, model=tiny("gemma2")), "nor with a softcap"),
        (dict(score="ce", unigram=0.2, data=iter([])), "labels of train_dataset, which must have a length"),
        (dict(score="ce", unigram=0.2, unigram_gain=1.0, eval_dataset={"a": samples(2)}), "give one eval_dataset"),
        (dict(score="ce", unigram=0.2, unigram_gain=1.0, eval_dataset=samples(2)), "evaluations; set eval_strategy"),
        (dict(given=dict(label_smoothing_factor=0.1)), "ProperScoreLoss.'smoothing', eps=...."),
        (dict(model=torch.nn.Linear(3, 3)), "expected a model of transformers, got Linear"),
    ):
        with pytest.raises(ValueError, match=words):
            trainer(**given)
    bare = [{k: v for k, v in row.items() if k != "labels"} for row in samples(4)]
    with pytest.raises(ValueError, match="the batch has no labels; take DataCollatorForLanguageModeling"):
        trainer(data=bare).train()
    replaced = trainer()
    replaced.model.forward = type(replaced.model).forward.__get__(replaced.model)  # as Liger does
    with pytest.raises(ValueError, match="forward was replaced after the patch"):
        replaced.train()
    several = arguments(tmp_path)
    several._n_gpu = 2
    with pytest.raises(ValueError, match="one GPU a process; start it with torchrun"):
        ours._Scores._check_arguments(type("T", (), dict(args=several, compute_loss_func=None))())


@pytest.mark.parametrize(
    "name, package", [("ScoreTrainer", "transformers"), ("ScoreSFTTrainer", "trl"), ("patch", "transformers")]
)
def test_a_missing_package_is_named_where_it_is_used(monkeypatch, name, package):
    """The module itself is imported without either."""
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(vars(ours), name, raising=False) if name != "patch" else None
    importlib.import_module("kernels.hf")
    with pytest.raises(ImportError, match=f"{name} needs {package}: pip install {package}"):
        patch(torch.nn.Linear(2, 2)) if name == "patch" else getattr(ours, name)
    with pytest.raises(AttributeError, match="no attribute 'ScoreDPOTrainer'"):
        _ = ours.ScoreDPOTrainer


@pytest.mark.parametrize("what", ["patch", "ScoreTrainer", "ScoreSFTTrainer"])
def test_the_readmes_examples_run(tmp_path, monkeypatch, what):
    """As they stand; tests/test_readme.py runs the others."""
    if what == "ScoreSFTTrainer":
        pytest.importorskip("trl", reason="needs trl (requirements-dev.txt)")
    monkeypatch.chdir(tmp_path)
    [code] = [c for c in python_examples() if f"from kernels.hf import {what}\n" in c]
    names = {}
    exec(code, names)
    if what != "patch":
        assert names["trainer"].state.global_step == 20
        assert {"eval_ece", "eval_brier", "eval_nll"} <= set(names["figures"])
