"""finetune_gsm8k.py end to end on a tiny Qwen3: packing, decoding, resume, bad input, what a run leaves behind."""

import functools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import finetune_gsm8k
from data.packing import Example, batch_indices, fit, pack
from data.prompts import Prompter, calculate
from eval.report.build import build
from kernels import linear_score
from kernels.losses import brier
from model.decode import Finished, Request, decode
from model.qwen3_hub import load_qwen3
from runtime.cli import roles
from runtime.folder import load_checkpoint, read_metrics
from runtime.machine import World
from schedules import ADAPTIVE
from schedules.fot import block_multipliers, gate_of
from schedules.gradient_stats import GradientStats

ROOT = Path(__file__).parent.parent
TIMING = {"train_seconds", "tokens_per_second"}
SUMMARY_KEYS = """
pass_at_1_strict pass_at_1_flexible pass_at_1_code invalid_programs eval_seconds train_seconds tokens_per_second
peak_memory_bytes divergences final_train_loss final_heldout_loss
""".split()
NAMES = "Ann Ben Cleo Dan Eve Finn Gus Hana".split()
THINGS = "apples books coins plums".split()


def problem(seed: int) -> dict:
    """One or two steps of arithmetic in GSM8K's format."""
    r = random.Random(seed)
    name, thing, a, b, c = r.choice(NAMES), r.choice(THINGS), r.randint(2, 30), r.randint(2, 30), r.randint(2, 5)
    total = a + b
    question = f"{name} has {a} {thing} and gets {b} more."
    answer = f"{name} has {a}+{b} = <<{a}+{b}={total}>>{total} {thing}.\n"
    if seed % 2:
        question += f" Then the {thing} become {c} times as many."
        answer += f"Then there are {total}*{c} = <<{total}*{c}={total * c}>>{total * c} {thing}.\n"
        total *= c
    return {"question": f"{question} How many {thing} does {name} have?", "answer": f"{answer}#### {total}"}


@pytest.fixture(scope="session")
def problems(tmp_path_factory):
    folder = tmp_path_factory.mktemp("problems")
    for split, first, count in (("train", 0, 40), ("test", 1000, 6)):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(problem(first + i)) + "\n" for i in range(count)))
    return folder


def write_tokenizer(folder: Path, texts, size: int = 400) -> int:
    """A byte-level BPE with Qwen3's special tokens, trained on the texts, as tokenizer.json. Its number of tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer.get_vocab_size()


def write_model(folder: Path, texts, **shape) -> Path:
    """A tiny random Qwen3 as transformers saves one, with its tokenizer."""
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    size = write_tokenizer(folder, texts)
    fields = dict(vocab_size=size + 5, hidden_size=64, intermediate_size=128, num_hidden_layers=2, head_dim=16)
    fields |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, eos_token_id=0)
    torch.manual_seed(0)
    config = transformers.Qwen3Config(**fields | dict(tie_word_embeddings=True, initializer_range=0.1) | shape)
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model(problems, tmp_path_factory):
    rows = [json.loads(line) for line in (problems / "train.jsonl").read_text().splitlines()]
    return write_model(tmp_path_factory.mktemp("models") / "tiny-qwen3", [r["question"] + r["answer"] for r in rows])


@pytest.fixture(scope="session")
def base(problems, model, tmp_path_factory):
    """Flags of a run that takes about two seconds."""
    return (
        f"--data {problems} --model {model} --cache {tmp_path_factory.mktemp('cache')} --base fp32 --rank 8 --batch 8 "
        "--micro-batch 2 --seq-len 192 --steps 12 --lr 5e-3 --heldout 8 --eval-every 6 --log-every 3 --eval-batch 3 "
        "--generate-tokens 12 --device cpu".split()
    )


def tune(flags, out, *more) -> int:
    return finetune_gsm8k.main([*flags, "--out", str(out), *map(str, more)])


def rows(out, kind) -> list[dict]:
    """Metrics without what depends on the clock."""
    return [{k: v for k, v in r.items() if k not in TIMING} for r in read_metrics(Path(out) / "metrics.jsonl", kind)]


def outputs(out, name="outputs.jsonl") -> list[dict]:
    return [json.loads(line) for line in (Path(out) / name).read_text().splitlines()]


# -- packing ---------------------------------------------------------------------------------------


def examples(count: int, longest: int, vocab: int = 50, seed: int = 0) -> list[Example]:
    r = np.random.default_rng(seed)
    made = []
    for i in range(count):
        n = int(r.integers(3, longest + 2))
        made.append(Example(str(i), r.integers(0, vocab, n).tolist(), int(r.integers(1, n - 1))))
    return made


@pytest.mark.parametrize("seed", range(5))
def test_rows_hold_every_example_once_and_nothing_else(seed):
    made = examples(40, 60, seed=seed)
    limit = 64
    bins = fit([e.length for e in made], limit)
    assert sorted(i for group in bins for i in group) == list(range(40))
    total = sum(e.length for e in made)
    # First-fit leaves at most one row half empty.
    assert all(sum(made[i].length for i in group) <= limit for group in bins) and len(bins) <= 2 * total / limit + 1
    rows = pack(made, limit)
    assert rows.tokens == total and rows.padding == pytest.approx(1 - total / rows.tokens_RT.numel())
    assert int(rows.answer_RT.sum()) == sum(e.targets("answer") for e in made)
    found = set()
    for tokens, targets, documents, answer in zip(
        rows.tokens_RT, rows.targets_RT, rows.documents_RT, rows.answer_RT, strict=True
    ):
        for number in documents.unique().tolist():
            here = documents == number
            if number < 0:
                assert (targets[here] == -100).all() and not answer[here].any()
            else:
                found.add((tuple(tokens[here].tolist()), tuple(targets[here].tolist()), int(answer[here].sum())))
    assert found == {(tuple(e.tokens[:-1]), tuple(e.tokens[1:]), e.targets("answer")) for e in made}


def test_packing_changes_no_loss(model):
    """Each token's loss in a packed row is the one it has alone, and so is its adapter's gradient. The tolerance is
    fp32's for sums in another order."""
    qwen = load_qwen3(model)
    made = examples(9, 40, vocab=300)
    packed = pack(made, 96)
    alone = [pack([e], 96, multiple=1) for e in made]
    assert len(packed) < len(made)

    def losses(rows, documents):
        hidden = qwen(rows.tokens_RT, documents_BT=rows.documents_RT if documents else None).flatten(0, 1)
        loss, _ = linear_score(hidden, qwen.head_weight, rows.targets_RT.flatten(), brier, reduction="none")
        return loss[rows.answer_RT.flatten()]

    with torch.no_grad():
        together, apart = losses(packed, True), torch.cat([losses(rows, False) for rows in alone])
    torch.testing.assert_close(together.sort().values, apart.sort().values, rtol=0, atol=2e-5)


def test_batches_are_permutations_one_epoch_after_the_other():
    seen = [i for step in range(7) for i in batch_indices(10, step, 4, seed=3)]
    assert sorted(seen[:10]) == sorted(seen[10:20]) == list(range(10)) and seen[:10] != seen[10:20]
    assert batch_indices(10, 2, 4, seed=3) == seen[8:12] and batch_indices(10, 2, 4, seed=4) != seen[8:12]
    assert sorted(batch_indices(3, 0, 9, seed=0)) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("call", [
    lambda: pack([], 8), lambda: pack([Example("a", [1] * 10, 2)], 8), lambda: fit([0], 8),
    lambda: batch_indices(0, 0, 4, 0), lambda: batch_indices(4, 0, 0, 0),
])  # fmt: skip
def test_packing_refuses(call):
    with pytest.raises(ValueError):
        call()


# -- decoding --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def qwen(model):
    return load_qwen3(model).eval()


def requests(count: int, **more) -> list[Request]:
    r = random.Random(1)
    lengths = [1, 2, 40, *(r.randint(1, 30) for _ in range(count))][:count]
    return [Request([r.randrange(300) for _ in range(n)], r.randint(1, 24), **more) for n in lengths]


def run(qwen, wanted, rows, **more) -> dict[int, tuple]:
    made = [one for ended in decode(qwen, wanted, rows, **more) for one in ended]
    assert sorted(one.index for one in made) == list(range(len(wanted)))
    return {one.index: (one.tokens, one.reason) for one in made}


def by_argmax(qwen, request, eos=()) -> tuple[list[int], str]:
    """The definition: the whole sequence again for each token."""
    tokens = list(request.prompt)
    for _ in range(request.max_new_tokens):
        with torch.no_grad():
            best = int((qwen(torch.tensor([tokens]))[0, -1] @ qwen.head_weight.t()).argmax())
        if best in eos:
            return tokens[len(request.prompt) :], "eos"
        tokens.append(best)
    return tokens[len(request.prompt) :], "length"


def test_continuous_batching_is_greedy_decoding_one_by_one(qwen):
    wanted = requests(11)
    eos = set(by_argmax(qwen, max(wanted, key=lambda r: r.max_new_tokens))[0][3:4])  # one that does occur
    expected = {i: by_argmax(qwen, r, eos) for i, r in enumerate(wanted)}
    assert {reason for _, reason in expected.values()} == {"eos", "length"}
    for rows, refill in ((1, 1), (3, 1), (4, 3), (50, 1)):
        assert run(qwen, wanted, rows, eos_ids=eos, refill=refill) == expected


def test_a_row_is_filled_again_at_once(qwen):
    """Steps of a stream: no row idles while prompts are waiting."""
    wanted = requests(12)
    steps = sum(1 for _ in decode(qwen, wanted, 3))
    lengths = [r.max_new_tokens for r in wanted]
    at, free = 0, [0, 0, 0]  # the schedule of a list: each goes to the row that is free first
    for n in lengths:
        free.sort()
        free[0] += n
        at = max(at, free[0])
    assert steps == at < sum(max(lengths[i : i + 3]) for i in range(0, 12, 3))  # fewer than in fixed batches


def test_sampled_tokens_belong_to_their_request(qwen):
    wanted = [Request(r.prompt, r.max_new_tokens, 0.8 if i % 2 else 0.0, seed=i) for i, r in enumerate(requests(8))]
    together = run(qwen, wanted, 5)
    assert together == run(qwen, wanted, 1) == run(qwen, wanted, 2)
    assert {i: together[i] for i in range(0, 8, 2)} == {i: by_argmax(qwen, wanted[i]) for i in range(0, 8, 2)}
    other = run(qwen, [Request(r.prompt, r.max_new_tokens, 0.8, seed=99) for r in wanted], 5)
    assert sum(other[i] != together[i] for i in range(8)) >= 4


def test_samples_have_the_models_distribution(qwen):
    """First tokens of 4,000 seeds against softmax(logits / T): chi-square over 10 bins of about equal probability;
    27.9 is its 0.999 quantile for 9 degrees of freedom."""
    prompt, T, n = [5, 9, 200], 0.5, 4000
    with torch.no_grad():
        p = ((qwen(torch.tensor([prompt]))[0, -1] @ qwen.head_weight.t()).double() / T).softmax(0).numpy()
    order = np.argsort(-p)
    bins = np.minimum((np.cumsum(p[order]) - p[order] / 2) * 10, 9.999).astype(int)
    bin_of = np.empty_like(bins)
    bin_of[order] = bins
    drawn = run(qwen, [Request(prompt, 1, T, seed=i) for i in range(n)], 500)
    seen = np.bincount([bin_of[tokens[0]] for tokens, _ in drawn.values()], minlength=10)
    expected = np.bincount(bin_of, weights=p, minlength=10) * n
    assert expected.min() > 20 and ((seen - expected) ** 2 / expected).sum() < 27.9


def test_inserted_tokens_are_context_and_stop_ends(qwen):
    wanted = [Request([7, 8], 9), Request([3] * 20, 9), Request([11], 9)]

    def insert(new):
        return [100, 101] if len(new) == 3 else []

    def stop(new):
        return len(new) == 7

    def by_hand(request):
        tokens = list(request.prompt)
        for i in range(7):
            with torch.no_grad():
                best = int((qwen(torch.tensor([tokens]))[0, -1] @ qwen.head_weight.t()).argmax())
            tokens.append({3: 100, 4: 101}.get(i, best))
        return tokens[len(request.prompt) :], "stop"

    expected = {i: by_hand(r) for i, r in enumerate(wanted)}
    assert run(qwen, wanted, 2, insert=insert, stop=stop) == expected


@pytest.mark.parametrize("call, says", [
    (lambda q: Request([], 3), "0 prompt tokens"),
    (lambda q: Request([1], 0), "0 new ones"),
    (lambda q: Request([1], 1, -1.0), "temperature -1.0"),
    (lambda q: list(decode(q, [Request([1], 3)], 0)), "rows=0"),
    (lambda q: list(decode(q, [Request([1], 3), Request([1] * 250, 8)], 2)), "prompt 1 has 250 tokens"),
])  # fmt: skip
def test_decoding_refuses(qwen, call, says):
    with pytest.raises(ValueError, match=says):
        call(qwen)


def test_weights_that_yield_nan_are_no_answer(model):
    broken = load_qwen3(model)
    with torch.no_grad():
        broken.norm.weight[0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        list(decode(broken, requests(2), 2))


# -- prompts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, result", [
    ("so 48/2 = <<48/2=", "24>>"), ("<<48/2=24>> and <<3*4.5=", "13.5>>"), ("<<10/3=", "3.3333>>"),
    ("<<1,200*2=", "2400>>"), ("<<20%*50=", "10>>"), ("<<5-7=", "-2>>"), ("<<2x3=", "6>>"),
    ("48/2=", ""), ("<<48/2=2", ""), ("<<48/0=", ""), ("<<a*b=", ""), ("<<=", ""), ("<<9**99999=", ""), ("", ""),
])  # fmt: skip
def test_calculator(text, result):
    assert calculate(text) == result


@pytest.mark.parametrize("prompt", ["chat", "plain"])
def test_prompts_are_the_formats(model, prompt, problems):
    from data.gsm8k import load_gsm8k

    one = load_gsm8k(problems, "train")[0]
    prompter = Prompter(str(model), prompt, "text")
    example = prompter.example(one, "3+5 = <<3+5=8>>8\n#### 8")
    decode = lambda ids: prompter.tokenizer.decode(ids, skip_special_tokens=False)  # noqa: E731
    asked, answer = decode(example.tokens[: example.prompt]), decode(example.tokens[example.prompt :])
    if prompt == "chat":
        assert asked.startswith(f"<|im_start|>user\n{one.question}\n") and asked.count("<|im_end|>") == 1
        assert asked.endswith("<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")
        assert answer == "3+5 = <<3+5=8>>8\n#### 8<|im_end|>"
        assert prompter.eos_ids == [0, 2]
    else:
        assert asked == f"Question: {one.question}\nAnswer:"
        assert answer == " 3+5 = <<3+5=8>>8\n#### 8<|endoftext|>"
    assert example.tokens[: example.prompt] == prompter.prompt(one)


# -- the whole way -----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def text_run(base, tmp_path_factory):
    """An uninterrupted DPSM run with everything random switched on, and sampled answers."""
    out = tmp_path_factory.mktemp("runs") / "text"
    flags = [*base, "--loss", "dpsm", "--warmup", "0.5", "--lora-dropout", "0.1", "--segment-rms"]
    flags += ["--samples", "2", "--k", "1,2"]
    assert tune(flags, out) == 0
    return flags, out


def test_run_folder_is_complete(text_run):
    _, out = text_run
    summary = json.loads((out / "summary.json").read_text())
    measured = set(SUMMARY_KEYS) - {"pass_at_1_code", "invalid_programs"}  # of the other format
    assert not set(SUMMARY_KEYS) - set(summary) and not [k for k in measured if summary[k] is None]
    assert 0 <= summary["sampled_pass_at_1_strict"] <= summary["sampled_pass_at_2_strict"] <= 1
    for name in ("config.json", "environment.json", "last.pt", "verdicts.jsonl", "source/finetune_gsm8k.py"):
        assert (out / name).is_file(), name
    assert not list(out.glob("*.part")) and not list(out.glob("*.tmp*"))
    greedy, sampled = outputs(out), outputs(out, "outputs_sampled.jsonl")
    assert [r["id"] for r in greedy] == [f"test/{i}" for i in range(6)] and len(sampled) == 12
    for r in rows(out, "train"):
        assert 0 <= r["padding"] < 1 and len(r["block_rms_answer"]) == len(r["block_rms_prompt"]) == 2
        assert 0 < r["fisher_answer"] <= 2 and 0 < r["fisher_prompt"] <= 2
        assert min(r["block_rms_answer"]) > 0


def test_outputs_can_be_graded_by_the_command(text_run, problems, capsys):
    from eval import gsm8k

    _, out = text_run
    gsm8k.main([str(out / "outputs.jsonl"), "--data", str(problems)])
    assert "6 outputs for 6 of 6 problems" in capsys.readouterr().out


def test_the_adapter_is_the_trained_one(text_run, model):
    from model.lora import adapter_tensors, load_adapter, load_base

    _, out = text_run
    loaded = load_base(model, "fp32", torch.float32)
    load_adapter(loaded, out / "adapter", str(model))
    kept = load_checkpoint(out / "last.pt")["model"]
    tensors = adapter_tensors(loaded)
    assert set(kept) == set(tensors)
    assert all(torch.equal(kept[name], tensors[name]) for name in kept)


def sigterm_at(monkeypatch, step):
    """SIGTERM while the batch of this step is looked up; the script looks up batch 0 once more, for its first line."""
    original = finetune_gsm8k.batch_indices

    def kill_then(count, now, *args):
        if now == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(count, now, *args)

    monkeypatch.setattr(finetune_gsm8k, "batch_indices", kill_then)


@pytest.mark.parametrize("stop_at", [4, 6])  # within a window of the log, and where validation stands as well
def test_resume_is_exact(text_run, tmp_path, monkeypatch, stop_at):
    """SIGTERM in the middle, then --resume: every number of the log, every weight and every answer is the same."""
    flags, whole = text_run
    sigterm_at(monkeypatch, stop_at - 1)
    assert tune(flags, tmp_path / "cut") == 0
    monkeypatch.undo()
    assert load_checkpoint(tmp_path / "cut" / "last.pt")["step"] == stop_at
    assert not (tmp_path / "cut" / "summary.json").exists()
    assert tune(flags, tmp_path / "cut", "--resume") == 0
    for kind in ("train", "val"):
        assert rows(tmp_path / "cut", kind) == rows(whole, kind)
    ours, theirs = (load_checkpoint(out / "last.pt")["model"] for out in (tmp_path / "cut", whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for name in ("outputs.jsonl", "outputs_sampled.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (whole / name).read_bytes()


def test_a_kill_while_generating_loses_a_batch_at_most(text_run, tmp_path, monkeypatch):
    """The answers written before the kill are read again, without half a line, and the rest come out as before."""
    import eval.answers

    flags, whole = text_run
    original = eval.answers.decode

    class Killed(BaseException):
        pass

    def cut_short(*args, **kwargs):
        seen = 0
        for ended in original(*args, **kwargs):
            yield ended
            seen += len(ended)
            if seen >= 7:
                raise Killed

    out = tmp_path / "cut"
    monkeypatch.setattr(eval.answers, "decode", cut_short)
    with pytest.raises(Killed):
        tune(flags, out)
    monkeypatch.undo()
    part = out / "answers.0.part"
    assert len(part.read_text().splitlines()) >= 7 and not (out / "summary.json").exists()
    with open(part, "a") as file:
        file.write('{"id": "test/5", "sample": 2, "outp')
    assert tune(flags, out, "--resume") == 0
    assert json.loads((out / "summary.json").read_text())["outputs_reused"] >= 7
    for name in ("outputs.jsonl", "outputs_sampled.jsonl"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_a_signal_while_generating_ends_well(text_run, tmp_path, monkeypatch, capsys):
    import eval.answers

    flags, whole = text_run
    original = eval.answers.decode

    def signalled(*args, **kwargs):
        for i, ended in enumerate(original(*args, **kwargs)):
            if i == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            yield ended

    monkeypatch.setattr(eval.answers, "decode", signalled)
    assert tune(flags, tmp_path / "cut") == 0
    monkeypatch.undo()
    assert "stopped while generating" in capsys.readouterr().out
    assert not (tmp_path / "cut" / "summary.json").exists()
    assert tune(flags, tmp_path / "cut", "--resume") == 0
    assert (tmp_path / "cut" / "outputs.jsonl").read_bytes() == (whole / "outputs.jsonl").read_bytes()


@pytest.mark.parametrize("change", [
    ("--micro-batch", 8), ("--log-every", 1), ("--checkpoint-activations",), ("--seq-len", 250), ("--segment-rms",),
], ids=lambda c: c[0])  # fmt: skip
def test_how_it_computes_is_not_what_it_computes(base, plain_run, tmp_path, change):
    """Micro-batches, probes, rows of another length, recomputation: the same held-out losses. 2e-4 is fp32's rounding
    through 12 steps of Adam; leaving out one problem of a batch of 8 moves them by more than 1e-2."""
    assert tune(base, tmp_path / "run", *change) == 0
    for ours, theirs in zip(rows(tmp_path / "run", "val"), rows(plain_run, "val"), strict=True):
        assert ours["nll"] == pytest.approx(theirs["nll"], abs=2e-4)
        assert ours["eval_tokens"] == theirs["eval_tokens"]


@pytest.fixture(scope="session")
def plain_run(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "plain"
    assert tune(base, out, "--lr-schedule", "cosine") == 0
    return out


def test_loss_falls_and_is_of_the_answer(plain_run, base, tmp_path):
    losses = [r["loss"] for r in rows(plain_run, "train")]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.5
    assert tune(base, tmp_path / "all", "--loss-on", "all") == 0
    tokens = [rows(out, "val")[0]["eval_tokens"] for out in (plain_run, tmp_path / "all")]
    assert tokens[1] > 2 * tokens[0]
    # CE's Fisher is the Brier score: of the last step alone where each step is a line of the log.
    assert tune(base, tmp_path / "each", "--log-every", 1, "--steps", 2, "--eval-problems", 1) == 0
    for r in rows(tmp_path / "each", "train"):
        assert r["fisher_answer"] == pytest.approx(r["brier"], rel=1e-5)
        assert r["loss"] == pytest.approx(r["nll"], rel=1e-5)


def test_two_ranks_train_the_same(base, plain_run, tmp_path):
    """Half a batch on each of two ranks: the same losses to fp32's rounding, and every problem answered."""
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "finetune_gsm8k.py"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    line += [*base, "--out", str(tmp_path / "two")]
    done = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    for kind in ("train", "val"):
        for ours, theirs in zip(rows(tmp_path / "two", kind), rows(plain_run, kind), strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], abs=2e-4)
            for name in ("fisher_prompt", "fisher_answer") if kind == "train" else ():
                assert ours[name] == pytest.approx(theirs[name], rel=1e-3)
    assert outputs(tmp_path / "two") == outputs(plain_run)


@pytest.mark.parametrize("kind", ["nf4", "bf16"])
def test_quantised_bases_learn(base, tmp_path, kind):
    if kind == "nf4":
        pytest.importorskip("bitsandbytes", reason="NF4 needs bitsandbytes")
    assert tune(base, tmp_path / "run", "--base", kind, "--no-merge") == 0
    losses = [r["loss"] for r in rows(tmp_path / "run", "train")]
    assert losses[-1] < losses[0] - 0.5
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["base"] == kind


@pytest.mark.parametrize("kind, base_kind", [("text", "fp32"), ("code", "nf4")])
def test_what_is_learnt_by_heart_is_answered(tmp_path, monkeypatch, kind, base_kind):
    """Seven problems that are trained on until they are known, and one that is held out: quantised, adapted, trained,
    stopped, resumed, generated, run and graded, all seven are right."""
    if base_kind == "nf4":
        pytest.importorskip("bitsandbytes", reason="NF4 needs bitsandbytes")
    text = "".join(json.dumps(problem(i)) + "\n" for i in range(8))
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(text)
    write_model(tmp_path / "model", [problem(i)["question"] + problem(i)["answer"] for i in range(8)])
    flags = (
        f"--data {tmp_path} --model {tmp_path / 'model'} --cache {tmp_path / 'cache'} --base {base_kind} --rank 32 "
        "--lora-alpha 32 --batch 7 --seq-len 256 --steps 70 --lr 1e-2 --heldout 1 --eval-every 1000 --log-every 10 "
        f"--eval-batch 3 --generate-tokens 110 --device cpu --prompt plain --format {kind}"
    ).split()
    out = tmp_path / "run"
    sigterm_at(monkeypatch, 33)
    assert tune(flags, out) == 0
    monkeypatch.undo()
    assert tune(flags, out, "--resume") == 0
    summary = json.loads((out / "summary.json").read_text())
    right = [summary[f"pass_at_1_{rule}"] for rule in (("strict", "flexible") if kind == "text" else ("code",))]
    verdicts = outputs(out, "verdicts.jsonl")
    unseen = [v["id"] for v in verdicts if not all(v["correct"].values())]
    assert len(unseen) <= 1 and min(right) >= 7 / 8
    assert summary["invalid_programs"] == (None if kind == "text" else sum(v["status"] != "ok" for v in verdicts))
    losses = [r["loss"] for r in rows(out, "train")]
    assert losses[-1] < 0.3 * losses[0] and len(losses) == 7


def test_real_problems(tmp_path):
    """The published set: what is read, split and left out, and a loss that falls."""
    root = os.environ.get("LM_DATA")
    if not root or not (Path(root) / "gsm8k").is_dir():
        pytest.skip("needs $LM_DATA/gsm8k")
    texts = [json.loads(x) for x in (Path(root) / "gsm8k" / "train.jsonl").read_text().split("\n")[:400]]
    write_model(tmp_path / "model", [t["question"] + t["answer"] for t in texts], max_position_embeddings=1024)
    flags = (
        f"--model {tmp_path / 'model'} --base bf16 --rank 8 --batch 4 --seq-len 768 --steps 8 --lr 1e-2 --heldout 16 "
        "--eval-every 8 --log-every 2 --eval-problems 3 --generate-tokens 8 --device cpu"
    ).split()
    assert tune(flags, tmp_path / "run") == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert not set(SUMMARY_KEYS) - set(summary) and summary["eval_problems"] == 3
    losses = [r["loss"] for r in rows(tmp_path / "run", "train")]
    assert losses[-1] < losses[0] - 0.3
    assert rows(tmp_path / "run", "train")[-1]["epoch"] == pytest.approx(8 * 4 / (7473 - 16), rel=0.02)


def test_the_calculator_and_the_stop_strings_reach_decoding(model, problems, tmp_path, monkeypatch):
    """What generate hands to decode, in tokens: an open annotation is worked out, text after a stop string cut off."""
    import eval.answers
    from data.gsm8k import load_gsm8k

    prompter = Prompter(str(model), "plain", "text")
    text = "Ann has 26+10 = <<26+10=36>>36 coins.\n#### 36\nQuestion: Ben has"

    def scripted(qwen, wanted, rows, *, eos_ids, stop, insert):
        assert wanted[0].temperature == 0 and prompter.decode(wanted[0].prompt).endswith("\nAnswer:")
        opened = prompter.encode("Ann has 26+10 = <<26+10=")
        assert prompter.decode(insert(opened)) == "36>>" and insert(prompter.encode("26+10 =")) == []
        assert stop(prompter.encode(text[:-8])) and not stop(prompter.encode(text[:-20]))
        yield [Finished(0, prompter.encode(text), "stop")]

    monkeypatch.setattr(eval.answers, "decode", scripted)
    made = eval.answers.write_answers(
        None,
        load_gsm8k(problems, "test")[:1],
        prompter,
        tmp_path,
        World(0, 1, torch.device("cpu")),
        max_new_tokens=60,
        batch=1,
        stop=["Question:"],
        calculator=True,
    )
    assert made.rows[0]["output"] == "Ann has 26+10 = <<26+10=36>>36 coins.\n#### 36" and made.reused == 0


def test_divergence_ends_the_run(base, tmp_path, capsys):
    assert tune(base, tmp_path / "run", "--lr", 1e30, "--clip", 0) == 1
    assert "not finite in three steps running" in capsys.readouterr().err
    assert not (tmp_path / "run" / "summary.json").exists()


# -- learning-rate rules that measure ------------------------------------------------------------------


LONGER = "--log-every 2 --steps 16 --eval-every 8 --eval-problems 2".split()
FOT = [*LONGER, "--fot-window", "4"]


def flags_of(rule: str) -> list[str]:
    return [*(FOT if rule in ADAPTIVE else LONGER), "--schedule", rule]


USED: list[list[float]] = []  # learning rates of fot_run's groups, as each step of the optimizer found them


@pytest.fixture(scope="module")
def fot_run(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "fot"
    original = torch.optim.AdamW.step

    @functools.wraps(original)  # torch marks a step that runs the hooks already: they must not run twice
    def step(self, *args, **kwargs):
        USED.append([group["lr"] for group in self.param_groups])
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        assert tune([*base, *FOT], out, "--schedule", "fot", "--segment-rms") == 0
    return out


def test_gate_and_blocks_take_part(fot_run):
    """A decision every W steps, of the batch before it: h is the ratio of the two Fishers that the log has of the same
    step, its gate and the blocks' multipliers are in the learning rates that the optimizer then uses."""
    decided, logged = rows(fot_run, "fot"), {r["step"]: r for r in rows(fot_run, "train")}
    assert [r["step"] for r in decided] == [4, 8, 12]
    for r in decided:
        seen = logged[r["step"]]
        assert r["h"] == pytest.approx(seen["fisher_answer"] / seen["fisher_prompt"], rel=1e-6)
        assert r["gate"] == gate_of(r["h"])
        if r["step"] >= 8:  # B has moved, and a sample of the gradient has ended
            assert math.isfinite(r["g2"]) and math.isfinite(r["slope"])
            rms = list(zip(seen["block_rms_prompt"], seen["block_rms_answer"], strict=True))
            assert r["blocks"] == pytest.approx(block_multipliers(rms), rel=1e-5)
            assert len(r["blocks"]) == 2 and math.prod(r["blocks"]) == pytest.approx(1) and r["blocks"][0] != 1
    for r in decided:  # the step after a decision is the first that is taken with it
        blocks = r["blocks"] or (1, 1)
        assert USED[r["step"]] == pytest.approx([r["lr"] * b for b in blocks])
        seen = logged[r["step"] + 2]["lr"]  # of the line's last step, blocks aside
        assert USED[r["step"] + 1] == pytest.approx([seen * b for b in blocks])
    summary = json.loads((fot_run / "summary.json").read_text())
    assert summary["fot_decisions"] == 3 and {"fot_bound", "fot_clipped", "fot_not_finite"} <= set(summary)


@pytest.mark.parametrize("rule, stop_at", [("fot", 6), ("fot", 8), ("fot-literal", 9), ("schedule-free", 7)])
def test_rules_resume_exactly(base, fot_run, tmp_path, monkeypatch, rule, stop_at):
    """Cut within a window and where one ends: the same decisions, learning rates, weights and answers, bit for bit."""
    flags, whole = [*base, *flags_of(rule), "--segment-rms"], fot_run
    if rule != "fot":
        whole = tmp_path / "whole"
        assert tune(flags, whole) == 0
    sigterm_at(monkeypatch, stop_at - 1)
    assert tune(flags, tmp_path / "cut") == 0
    monkeypatch.undo()
    assert load_checkpoint(tmp_path / "cut" / "last.pt")["step"] == stop_at
    assert tune(flags, tmp_path / "cut", "--resume") == 0
    for kind in ("train", "val", "fot"):
        assert rows(tmp_path / "cut", kind) == rows(whole, kind)
    ours, theirs = (load_checkpoint(out / "last.pt") for out in (tmp_path / "cut", whole))
    assert all(torch.equal(ours["model"][name], theirs["model"][name]) for name in theirs["model"])
    rates = [[g["lr"] for g in kept["optimizer"]["param_groups"]] for kept in (ours, theirs)]
    assert rates[0] == rates[1]
    assert (tmp_path / "cut" / "outputs.jsonl").read_bytes() == (whole / "outputs.jsonl").read_bytes()


@pytest.mark.parametrize("rule", ["snac", "bacon", "fot-literal", "schedule-free"])
def test_every_rule_learns(base, tmp_path, rule):
    assert tune([*base, *flags_of(rule)], tmp_path / "run", "--eval-problems", 1) == 0
    losses = [r["loss"] for r in rows(tmp_path / "run", "train")]
    assert losses[-1] < losses[0] - 0.1
    decided = rows(tmp_path / "run", "fot")
    assert len(decided) == (3 if rule in ADAPTIVE else 0)
    for r in decided:  # only the literal rule has a gate, only bacon has blocks
        assert (r["h"] is not None) == (rule == "fot-literal")
        assert len(r["blocks"]) == (2 if rule == "bacon" and r["step"] >= 8 else 0)


def test_schedule_free_evaluates_its_averages(base, tmp_path):
    """The adapter that stays is the averaged x: the checkpoint's y, which was trained on, is (1 - beta1) z + beta1 x
    (Defazio et al., section 1), and the held-out loss is of x."""
    from model.lora import adapter_tensors, load_adapter, load_base

    assert tune([*base, *flags_of("schedule-free")], tmp_path / "run") == 0
    kept = load_checkpoint(tmp_path / "run" / "last.pt")
    adapter = tmp_path / "run" / "adapter"
    assert tune([*base, *LONGER], tmp_path / "again", "--adapter", adapter, "--lr", 0, "--steps", 1) == 0
    last = rows(tmp_path / "run", "val")[-1]["nll"]
    assert rows(tmp_path / "again", "val")[0]["nll"] == pytest.approx(last, rel=1e-6)
    model = next(f for i, f in enumerate(base) if base[i - 1] == "--model")
    loaded = load_base(model, "fp32", torch.float32)
    load_adapter(loaded, adapter, model)
    for i, (name, x) in enumerate(adapter_tensors(loaded).items()):
        y, z = kept["model"][name], kept["optimizer"]["state"][i]["z"]
        torch.testing.assert_close(0.9 * x + 0.1 * z, y, rtol=0, atol=1e-6)


def test_the_micro_batch_that_is_measured_is_a_random_part(base, tmp_path, monkeypatch):
    """pack puts the longest problems into the first rows: what is measured must not be these alone."""
    seen = []
    original = GradientStats.micro
    monkeypatch.setattr(GradientStats, "micro", lambda self, share: (seen.append(share), original(self, share)))
    flags = [*base, *FOT, *"--schedule fot --micro-batch 1 --fot-parts noise --fot-window 2".split()]
    assert tune(flags, tmp_path / "run") == 0
    assert len(seen) >= 5 and all(0 < s < 1 for s in seen)
    assert {r["h"] for r in rows(tmp_path / "run", "fot")} == {None}
    assert all(r["blocks"] == [] for r in rows(tmp_path / "run", "fot"))
    whole = tmp_path / "one"  # one micro-batch is split in two where it is measured
    seen.clear()
    assert tune([*flags, "--micro-batch", "64"], whole) == 0
    assert len(seen) >= 5 and 0.3 < sum(seen) / len(seen) < 0.7


# -- what a difference in a flag means ---------------------------------------------------------------


def test_the_report_knows_every_flag_by_its_role():
    """By the roles that a run of this script leaves: what makes another arm, another question, or nothing."""
    found = {name: about["role"] for name, about in roles(finetune_gsm8k.Config).items()}
    assert found["prompt"] == "knob" and found["eval_batch"] == "where" and found["seed"] == "bookkeeping"
    settings = "format base loss_on heldout eval_problems generate_tokens model data steps batch seq_len".split()
    assert {found[name] for name in settings} == {"setting"}


def test_two_prompts_are_two_arms_and_two_batches_of_answers_are_one(text_run, tmp_path):
    """Run folders as this script leaves them, one flag changed in each."""

    def copy(name: str, **changes) -> Path:
        out = tmp_path / name
        shutil.copytree(text_run[1], out)
        config = json.loads((out / "config.json").read_text()) | changes
        (out / "config.json").write_text(json.dumps(config))
        return out

    folders = [copy("a"), copy("b", prompt="plain"), copy("c", eval_batch=7, seed=2), copy("d", format="code")]
    report = build(folders)
    assert sorted(len(arm.runs) for arm in report.arms) == [1, 1, 2]
    assert any("prompt=plain" in arm.label for arm in report.arms)
    assert any(w.startswith("NOT COMPARABLE: the arms differ in format") for w in report.warnings)


# -- bad input ---------------------------------------------------------------------------------------


def refused(capsys, out, *flags) -> str:
    """The one line that the script ends with, having written nothing."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        finetune_gsm8k.main([*map(str, flags), "--out", str(out)])
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and len(lines) == 1 and "error: " in lines[0], lines
    assert not out.exists() and not list(out.parent.glob(f"*{out.name}*"))
    return lines[0]


@pytest.mark.parametrize("flags, says", [
    ("--rank 0", "--rank 0 must be at least 1"),
    ("--lora-dropout 1.0", "dropout"),
    ("--targets q_proj,head", "'head'"),
    ("--seq-len 60", "leaves no room for an answer"),
    ("--seq-len 300", "256 positions"),
    ("--generate-tokens 250", "leaves no room for 250 new ones"),
    ("--heldout 40", "40 problems held out of 40"),
    ("--batch 0", "--batch 0"),
    ("--lr nan", "--lr nan"),
    ("--warmup 2", "--warmup 2.0 is outside [0, 1]"),
    ("--tail-smoothing 0.1", "not by --loss ce"),
    ("--samples 2 --k 3", "pass@3"),
    ("--samples 2 --k 1,x", "'1,x'"),
    ("--samples 2 --temperature 0", "--temperature 0"),
    ("--optimizer paged-adamw8bit", "needs a CUDA device"),
    ("--kernels triton", "needs a CUDA device"),
    ("--resume-from x.pt", "needs --resume"),
    ("--resume", "no run in"),
    ("--model /no/such/folder", "pass a local folder"),
    ("--model no/such-model-anywhere", "pass a local folder"),
    ("--data /no/such/folder", "expected a folder with train.jsonl and test.jsonl"),
    ("--adapter /no/such/adapter", "adapter_config.json"),
    ("--format poem", "--format"),
    ("--schedule fot --fot-parts gate,speed", "FoT parts 'gate,speed': expected some of"),
    ("--schedule fot --fot-window 0", "--fot-window 0"),
    ("--schedule snac --fot-beta 1", "--fot-beta 1.0 is outside [0, 1)"),
    ("--schedule fot --lr-warmup 1", "leaves no step"),
    ("--schedule fot --loss brier --tail-smoothing 0.1", "leave gate out"),
    ("--schedule schedule-free --optimizer paged-adamw8bit", "an optimizer of its own"),
    ("--schedule never", "--schedule"),
])  # fmt: skip
def test_bad_settings(base, tmp_path, capsys, flags, says):
    assert says in refused(capsys, tmp_path / "run", *base, *flags.split())


def edit_config(folder: Path, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("harm, says", [
    (lambda f: edit_config(f, model_type="llama"), "model_type='llama'; expected 'qwen3'"),
    (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer.json"),
    (lambda f: (f / "tokenizer.json").write_text("{"), "is no tokenizer"),
    (lambda f: edit_config(f, vocab_size=100), "the model only 100"),
    (lambda f: (f / "model.safetensors").write_bytes(b"x" * 40), "damaged"),
    (lambda f: (f / "tokenizer.json").write_text((f / "tokenizer.json").read_text().replace("<|im_end|>", "<|e|>")),
     "use --prompt plain"),
])  # fmt: skip
def test_bad_models(base, model, tmp_path, capsys, harm, says):
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    harm(folder)
    assert says in refused(capsys, tmp_path / "run", *base, "--model", folder)


def test_plain_prompts_need_an_end(base, model, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    edit_config(folder, eos_token_id=None)
    assert "eos_token_id" in refused(capsys, tmp_path / "run", *base, "--model", folder, "--prompt", "plain")


@pytest.mark.parametrize("line, says", [
    ('{"question": "How many?"}', "train.jsonl line 3 has no text in field 'answer'"),
    ('{"question": "How', "train.jsonl line 3 is not JSON"),
    ('{"question": "How many?", "answer": "Three."}', "train.jsonl line 3: its answer does not end in"),
])  # fmt: skip
def test_bad_problems(base, problems, tmp_path, capsys, line, says):
    folder = tmp_path / "data"
    shutil.copytree(problems, folder)
    good = (folder / "train.jsonl").read_text().splitlines()
    (folder / "train.jsonl").write_text("\n".join([*good[:2], line, *good[2:]]) + "\n")
    assert says in refused(capsys, tmp_path / "run", *base, "--data", folder)


def test_bitsandbytes_missing(base, tmp_path, capsys, monkeypatch):
    for name in [n for n in sys.modules if n.partition(".")[0] == "bitsandbytes"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert "take base 'bf16'" in refused(capsys, tmp_path / "run", *base, "--base", "nf4")


def test_an_adapter_of_another_base(base, plain_run, model, problems, tmp_path, capsys):
    """By its name, and where the name is the same by its shapes; on its own base it starts where it ended."""
    adapter = plain_run / "adapter"
    other = tmp_path / "other"
    shutil.copytree(model, other)
    assert "load it on its own base" in refused(capsys, tmp_path / "run", *base, "--model", other, "--adapter", adapter)
    small = write_model(tmp_path / model.name, [problem(0)["question"]], hidden_size=32)
    assert "is no adapter of this base" in refused(
        capsys, tmp_path / "run", *base, "--model", small, "--adapter", adapter, "--prompt", "plain"
    )
    assert tune(base, tmp_path / "on", "--adapter", adapter, "--steps", 1, "--lr", 0, "--eval-problems", 1) == 0
    assert rows(tmp_path / "on", "val")[0]["nll"] == rows(plain_run, "val")[-1]["nll"]


def test_a_run_is_not_overwritten_nor_continued_by_another(base, plain_run, capsys):
    before = {p.name: p.stat().st_mtime_ns for p in plain_run.iterdir()}
    for flags, says in (([], "already holds a run"), (["--resume", "--rank", "4"], "rank was 8, now 4")):
        with pytest.raises(SystemExit) as end:
            tune(base, plain_run, *flags)
        assert end.value.code == 2 and says in capsys.readouterr().err
    assert before == {p.name: p.stat().st_mtime_ns for p in plain_run.iterdir()}


def test_problems_too_long_are_left_out_whole_and_counted(base, tmp_path, capsys):
    assert tune(base, tmp_path / "run", "--seq-len", 120, "--steps", 1, "--eval-problems", 1) == 0
    shown = capsys.readouterr()
    assert "18 of 32 problems are longer than --seq-len 120, left out" in shown.err
    assert "14 training and 6 held-out problems" in shown.out and "% padding" in shown.out
