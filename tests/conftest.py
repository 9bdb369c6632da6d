"""Shared fixtures. Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before import."""

import collections
import functools
import gc
import json
import logging
import os
import signal
import sys
from pathlib import Path

import torch

for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:  # as nohup and a shell's & start us; the tests send them
        signal.signal(number, handler)

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402
from interpreter import work_out_once  # noqa: E402
from number_words import words  # noqa: E402
from tiny_gsm8k import problem, write_model  # noqa: E402

# With --dist loadfile a worker takes a file at a time. pytest-xdist begins with those of the most tests, so that these,
# of few tests and ten to fifty seconds, would come last, one worker idle.
LONG = """
kernels/test_audit.py kernels/test_audit_more.py kernels/test_parallel.py kernels/test_hf_patch.py
sandbox/test_attacks.py eval/test_campaign_runs.py eval/test_campaign_engines.py eval/test_report_build.py
races/test_nanogpt.py runtime/test_ranks.py
test_drill.py test_other_systems.py test_finetune_gsm8k_adapters.py test_without_packages.py
""".split()


def pytest_configure(config):
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(config, items):
    if hasattr(config, "workerinput"):  # of pytest-xdist
        tests, here = collections.Counter(item.path for item in items), Path(__file__).parent
        first = {here / name for name in LONG}
        assert all(path.exists() for path in first), "a file of LONG has another name now"
        items.sort(key=lambda item: (item.path not in first, -tests[item.path]))


def pytest_collection_finish():
    """What is imported by now stays: the garbage collector need not look through it again, which each run asks for."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()  # nanobind counts what is not collected at the end as leaked


@pytest.fixture(scope="session", autouse=True)
def what_the_interpreter_replaces():
    work_out_once()


@pytest.fixture(autouse=True)
def heard():
    """machine.start_world keeps our log lines from the root logger, where caplog must hear them in the next test."""
    yield
    logging.getLogger("scorecast").propagate = True


@pytest.fixture(autouse=True)
def let_go():
    """A test that enters a run's folder and does not finish the run leaves its lock: a process has it until it ends."""
    yield
    if staging := sys.modules.get("runtime.staging"):
        for folder in [*staging.HELD]:
            staging.release_lock(folder)


@pytest.fixture(autouse=True)
def given_back():
    """What a test leaves to a handler of its own would swallow the signals of the next one."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    left = {number: now for number in before if (now := signal.getsignal(number)) is not before[number]}
    for number in left:
        signal.signal(number, before[number])
    assert not left, "a test ends with the handlers it began with"


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder of text that is the same on every machine: arithmetic in words, split into train, val and test."""
    folder = tmp_path_factory.mktemp("arithmetic")
    for split, first, count in (("train", 3, 120), ("val", 1003, 20), ("test", 2003, 20)):
        lines = [
            f"{words(i)} times {words(i + 7)} is {words(i * (i + 7) % 1000000)}.\n" for i in range(first, first + count)
        ]
        (folder / f"{split}.txt").write_text("".join(lines))
    return folder


@pytest.fixture(scope="session")
def problems(tmp_path_factory):
    """A folder of invented problems in GSM8K's files: 40 to train on and 6 to test."""
    folder = tmp_path_factory.mktemp("problems")
    for split, first, count in (("train", 0, 40), ("test", 1000, 6)):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(problem(first + i)) + "\n" for i in range(count)))
    return folder


@pytest.fixture(scope="session")
def model(problems, tmp_path_factory):
    """A folder with a tiny random Qwen3, whose tokenizer is trained on ``problems``."""
    rows = [json.loads(line) for line in (problems / "train.jsonl").read_text().splitlines()]
    return write_model(tmp_path_factory.mktemp("models") / "tiny-qwen3", [r["question"] + r["answer"] for r in rows])


@pytest.fixture(scope="session")
def base(problems, model, tmp_path_factory):
    """Flags of a run of finetune_gsm8k.py that takes about two seconds."""
    return (
        f"--data {problems} --model {model} --cache {tmp_path_factory.mktemp('cache')} --base fp32 --rank 8 --batch 8 "
        "--micro-batch 2 --seq-len 192 --steps 12 --lr 5e-3 --heldout 8 --eval-every 6 --log-every 3 --eval-batch 3 "
        "--generate-tokens 12 --device cpu".split()
    )


@pytest.fixture(scope="session")
def lm_base(corpus, tmp_path_factory):
    """Flags of a run that takes about a second."""
    cache = tmp_path_factory.mktemp("cache")
    return (
        f"--data {corpus} --cache {cache} --tokenizer bpe:320 --model nano --seq-len 32 --batch 8 --steps 12 --lr 3e-3 "
        "--eval-every 4 --log-every 3 --sample-tokens 12 --device cpu".split()
    )


@pytest.fixture(scope="session")
def lm_run(lm_base, tmp_path_factory):
    """An uninterrupted DPSM run with everything random switched on."""
    from lm_runs import train

    out = tmp_path_factory.mktemp("runs") / "dpsm"
    noisy = [*lm_base, "--loss", "dpsm", "--warmup", "0.5", "--dropout", "0.1", "--label-noise", "0.2"]
    assert train(noisy, out) == 0
    return noisy, out


@pytest.fixture(scope="session")
def sums(tmp_path_factory):
    """A folder of articles with summaries."""
    from seq2seq_runs import write_set

    return write_set(tmp_path_factory.mktemp("sets") / "sums")


@pytest.fixture(scope="session")
def seq2seq_base(sums, tmp_path_factory):
    """Flags of a run that takes a second or two, with `small_summarisers`."""
    cache = tmp_path_factory.mktemp("cache")
    return (
        f"--data {sums} --cache {cache} --size bart-tiny --random-start --tokenizer bpe:300 --preset none --batch 8 "
        "--micro-batch 4 --steps 9 --lr 3e-3 --eval-every 3 --log-every 2 --min-words 20 --max-source 96 "
        "--max-target 48 --max-new-tokens 12 --beams 2 --generate-batch 4 --device cpu".split()
    )


@pytest.fixture
def undrawn(monkeypatch):
    """A report's pictures are of nothing: drawing them takes most of its time, and most tests do not look at them."""
    from eval.report import plots

    picture = plots.Picture(b"\x89PNG")
    picture.svg = b"<svg/>"
    monkeypatch.setattr(plots, "png", lambda fig: picture)


@pytest.fixture(scope="module")
def small_summarisers():
    """bart-tiny and pegasus-tiny, smaller still."""
    import finetune_seq2seq
    from model.seq2seq import bart_config, pegasus_config

    with pytest.MonkeyPatch.context() as patch:
        for kind, build in (("bart", bart_config), ("pegasus", pegasus_config)):
            tiny = functools.partial(build, 1, 32, 2, max_position_embeddings=128)
            patch.setitem(finetune_seq2seq.SIZES, f"{kind}-tiny", tiny)
        yield
