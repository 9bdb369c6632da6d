"""The report over runs that answer GSM8K, and the recipes around them: a tiny base, and the race with peft."""

import csv
import json

import pytest
import torch

from eval.report.gsm8k import answer_table, confidences, paired_table
from eval.report.runs import group_arms, load_run
from eval.report.terminal import main
from races import peft_gsm8k as race_peft
from recipes import tiny_qwen3

ENVIRONMENT = {"time": "2025-01-02T03:04:05+00:00", "command": "fixture", "device": "fixture device"}


def write_run(folder, schedule: str, seed: int, right: set[int], format: str = "text", problems: int = 40):
    """A run folder as finetune_gsm8k.py leaves it, invented: the problems in ``right`` are answered."""
    folder.mkdir(parents=True)
    config = {"script": "finetune_gsm8k.py", "loss": "ce", "schedule": schedule, "seed": seed, "format": format}
    config |= {"steps": 10, "data": "gsm8k", "model": "tiny", "lr": 1e-3}
    row = {"kind": "val", "step": 10, "train_seconds": 3.0, "nll": 2.0 + seed / 100, "ppl": 7.4, "loss": 2.0}
    rules = ("strict", "flexible") if format == "text" else ("code",)
    value = len(right) / problems
    summary = {"steps": 10, "seed": seed, "val_nll": 2.0 + seed / 100, "val_ppl": 7.4, "invalid_programs": None}
    summary |= dict.fromkeys(("pass_at_1_strict", "pass_at_1_flexible", "pass_at_1_code"))
    for rule in rules:
        interval = [value / 2, 2 * value] if problems > 1 else [None, None]  # as the grader has it of one problem
        summary |= {f"pass_at_1_{rule}": value, f"pass_at_1_{rule}_ci95": interval}
    verdicts = [
        {"id": f"test/{i}", "correct": {rule: i in right for rule in rules}, "sample": 0} for i in range(problems)
    ] + [{"id": "test/0", "correct": {rule: True for rule in rules}, "sample": 1}]
    files = {"config.json": config, "environment.json": ENVIRONMENT, "summary.json": summary}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "metrics.jsonl").write_text(json.dumps(row | {"kind": "train"}) + "\n" + json.dumps(row) + "\n")
    (folder / "verdicts.jsonl").write_text("".join(json.dumps(v) + "\n" for v in verdicts))
    return folder


def cells(rows) -> list[list[str]]:
    return [[cell.text for cell in row] for row in rows]


def test_confidences_of_seeds_are_pooled_and_those_before_training_are_their_own(tmp_path):
    """Two seeds of an arm together; before/ has its own verdicts, and a run without them is left out."""
    for seed, confidence in ((1, 0.5), (2, 0.75)):
        folder = write_run(tmp_path / f"{seed}", "cosine", seed, {0})
        for place, sure, right in ((folder, confidence, True), (folder / "before", 0.25, False)):
            place.mkdir(exist_ok=True)
            row = {"id": "test/0", "sample": 0, "correct": {"strict": right}, "confidence": {"token": sure}}
            (place / "verdicts.jsonl").write_text(json.dumps(row) + "\n")
    write_run(tmp_path / "3", "fot", 1, {0})
    arms, _ = group_arms([load_run(tmp_path / name) for name in "123"])
    for when, sure, right in (("", [0.5, 0.75], True), ("before", [0.25, 0.25], False)):
        ((arm, by),) = confidences(arms, when)
        assert arm.config["schedule"] == "cosine" and list(by) == ["token"]
        assert sorted(by["token"].confidence) == sure and by["token"].right.tolist() == [right, right]


def test_arms_are_compared_by_problem(tmp_path):
    """One seed: McNemar's exact p by hand, 2 * (1 + 9 + 36) / 2^9 for 2 against 7 problems. Sampled answers count
    nowhere, and the programs' arm is compared by its own rule."""
    write_run(tmp_path / "a", "cosine", 1, {0, 1, *range(10, 20)})
    write_run(tmp_path / "b", "fot", 1, {*range(10, 20), *range(30, 37)})
    write_run(tmp_path / "c", "fot", 1, {*range(10, 21), 0, 1}, "code")
    arms, _ = group_arms([load_run(tmp_path / name) for name in "abc"])
    table = paired_table(arms)
    (b, c) = sorted(cells(table.rows), key=lambda row: row[5] != "7")
    assert [cell for cell in b[2:7]] == ["1", "40", "+12.50", "7", "2"]
    assert float(b[7]) == pytest.approx(2 * 2 * 46 / 512, abs=5e-4)  # times 2: Holm of two rows
    assert c[4:7] == ["+2.50", "1", "0"]
    shown = {row[0].text: row for row in answer_table(arms).rows}
    assert len(shown) == 3
    assert any(cell.text == "30.00" and cell.sub == "[15.00, 60.00]" for row in shown.values() for cell in row)


def test_one_problem_has_no_interval(tmp_path):
    write_run(tmp_path / "a", "cosine", 1, {0}, problems=1)
    [row] = answer_table(group_arms([load_run(tmp_path / "a")])[0]).rows
    assert [(c.text, c.sub) for c in row if c.text == "100.00"] == [("100.00", "")] * 2


def test_none_right_has_an_interval_also_in_a_run_that_wrote_none(tmp_path):
    """0 of 40, whose run holds a bootstrap's [0, 0]: Wilson's where it says of how many problems, else nothing."""
    for name, schedule, fields in (("a", "cosine", {"eval_problems": 40}), ("b", "fot", {})):
        path = write_run(tmp_path / name, schedule, 1, set()) / "summary.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    arms, _ = group_arms([load_run(tmp_path / name) for name in "ab"])
    old = next(i for i, arm in enumerate(arms) if arm.config["schedule"] == "fot")
    shown = [{(c.text, c.sub) for c in row if c.text == "0.00"} for row in answer_table(arms).rows]
    assert shown[old] == {("0.00", "")} and shown[1 - old] == {("0.00", "[0.00, 8.76]")}  # 1.96^2 / (40 + 1.96^2)
    [row] = paired_table(arms).rows
    assert (row[4].text, row[4].sub) == ("+0.00", "[-8.76, +8.76]")


def test_report_of_runs_on_gsm8k(tmp_path, capsys):
    """No verdicts of DPSM where there is no DPSM, no warning of a missing validation NLL; seeds are an arm."""
    for schedule, shift in (("cosine", 0), ("fot", 5)):
        for seed in (1, 2):
            write_run(tmp_path / f"{schedule}{seed}", schedule, seed, set(range(shift + seed)))
    folders = [str(p) for p in sorted(tmp_path.iterdir())]
    assert main([*folders, "--out", str(tmp_path / "report")]) == 0
    page = (tmp_path / "report" / "report.md").read_text()
    assert "## GSM8K, pass@1" in page and "### Arms compared by problem" in page
    assert "The claims of DPSM" not in page and "without a finite validation NLL" not in page
    assert "claims of" not in capsys.readouterr().out
    assert "| +12.50" in page  # 5 of 40 problems in both seeds
    (tmp_path / "fot1" / "verdicts.jsonl").write_text('{"id": 1}\n')
    with pytest.raises(SystemExit) as end:
        main([*folders, "--out", str(tmp_path / "again")])
    assert end.value.code == 2 and "verdicts.jsonl, line 1 is no verdict" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


@pytest.fixture
def problems(tmp_path):
    folder = tmp_path / "problems"
    folder.mkdir()
    for split in ("train", "test"):
        rows = [
            {
                "question": f"Ann has {i} apples and gets {j} more. How many has she?",
                "answer": f"She has {i}+{j}=<<{i}+{j}={i + j}>>{i + j} apples.\n#### {i + j}",
            }
            for i in range(20)
            for j in range(20)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def test_the_tiny_base_is_a_model_and_the_same_again(problems, tmp_path, capsys):
    """A folder that is read as any other, whose base knows its text better than a drawn one, bit for bit again."""
    from data.prompts import Prompter
    from model.decoder_hub import load_decoder

    def make(name: str, *more) -> torch.Tensor:
        flags = f"{tmp_path / name} --data {problems} --vocab 320 --hidden 64 --layers 1 --batch 8".split()
        assert tiny_qwen3.main([*flags, *more]) == 0
        return load_decoder(tmp_path / name).embed_tokens.weight

    first, again, drawn = make("a", "--steps", "12"), make("b", "--steps", "12"), make("c", "--steps", "0")
    assert torch.equal(first, again) and not torch.equal(first, drawn)
    losses = [
        float(line.split(" nats")[0].split()[-1]) for line in capsys.readouterr().out.splitlines() if "nats" in line
    ]
    assert losses[0] == losses[1] < 5.5  # log 320 = 5.77 at the start
    prompter = Prompter(str(tmp_path / "a"), "chat", "text")
    assert prompter.decode(prompter.encode("Ann has 3+4=<<3+4=7>>7")) == "Ann has 3+4=<<3+4=7>>7"
    assert prompter.eos_ids == [0, 2]


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--vocab", "100"], "a vocabulary of 100"),
        (["--hidden", "100"], "--hidden 100"),
        (["--layers", "0"], "--layers 0"),
        (["--lr", "0"], "--lr 0"),
        (["--data", "/no/such"], "expected a folder"),
    ],
)
def test_a_tiny_base_that_cannot_be_made(problems, tmp_path, capsys, flags, says):
    with pytest.raises(SystemExit) as end:
        tiny_qwen3.main([str(tmp_path / "model"), "--data", str(problems), *flags])
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and says in lines[-1] and not (tmp_path / "model").exists()


RACE = "--shape tiny --base fp32 --rank 4 --batch 2 --seq-len 16 --steps 1 --prompt-tokens 8 --new-tokens 4".split()
RACE += ["--rounds", "1", "--device", "cpu", "--eval-batches", "2,3"]


def test_race_with_peft(tmp_path, capsys):
    """Training turns are processes and leave a row each; evaluation turns, here in this process, one JSON line."""
    pytest.importorskip("peft", reason="the race is against peft")
    out = tmp_path / "race"
    assert race_peft.main([*RACE, "--prompts", "0", "--out", str(out)]) == 0
    assert "train: tokens/s, ours over theirs" in capsys.readouterr().out
    rows = list(csv.DictReader((out / "race.csv").open()))
    assert [(r["part"], r["side"]) for r in rows] == [("train", "theirs"), ("train", "ours")]
    assert all(float(r["tokens_per_second"]) > 0 and "peft" in r["versions"] and r["device"] for r in rows)
    for side in race_peft.SIDES:
        assert (
            race_peft.main([*RACE, "--prompts", "3", "--model", str(out / "model"), "--turn", f"evaluate:{side}"]) == 0
        )
        row = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert row["batch"] in (2, 3) and row["tokens_per_second"] > 0


def test_both_sides_of_the_race_compute_the_same_loss(tmp_path):
    """Over 24 tokens of the same random weights, B being 0: a race of two different computations would show nothing."""
    pytest.importorskip("peft", reason="the race is against peft")
    from model.decoder import Decoder
    from model.decoder_hub import save_decoder

    torch.manual_seed(0)
    save_decoder(Decoder(race_peft.SHAPES["tiny"]), tmp_path / "model", dtype=torch.float32)
    tokens = torch.randint(300, (2, 13))
    losses = []
    for make in (race_peft.our_loss, race_peft.their_loss):
        _, loss = make(tmp_path / "model", "fp32", 4, torch.float32, torch.device("cpu"))
        losses.append(loss(tokens).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    pytest.importorskip("bitsandbytes", reason="NF4 needs bitsandbytes")
    for dtype in (torch.float32, torch.bfloat16):  # of all that is not quantised
        model, _ = race_peft.their_loss(tmp_path / "model", "nf4", 4, dtype, torch.device("cpu"))
        assert model.get_input_embeddings().weight.dtype == dtype


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--rounds", "0"], "--rounds 0"),
        (["--eval-batches", "8,x"], "'8,x'"),
        (["--turn", "train"], "train or evaluate"),
    ],
)
def test_race_refuses(tmp_path, capsys, flags, says):
    with pytest.raises(SystemExit) as end:
        race_peft.main([*RACE, "--out", str(tmp_path / "race"), *flags])
    assert end.value.code == 2 and says in capsys.readouterr().err and not (tmp_path / "race").exists()
