"""The attack's command on a tiny BART: its losses, its files, resume, figures and bad input."""

import importlib.util
import json
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from toy_attack import Toy, attack
from word_lists import folder_of_lists

import eval.attack.run as script
from data.summaries import Pair, Summaries, tokenizer_for_training
from data.wordlists import WordLists
from eval.attack.run import Target, attack_all, chosen
from eval.seq2seq import decoding
from finetune_seq2seq import Config, complete
from model.seq2seq import Seq2Seq, bart_config
from model.seq2seq_hub import save_seq2seq


def toy_rows(pairs):
    """What attack_pairs gives, with a toy loss and in the same shape."""
    rows = []
    for pair in pairs:
        found = attack(Toy(movie=0.5, city=0.25), text=pair.article, seed=pair.id, queries=9)
        row = {"id": pair.id, "article": found.text} | {f: getattr(found, f) for f in script.KEPT}
        rows.append(json.loads(json.dumps(row | {"summary_before": pair.article, "summary_after": found.text})))
    return rows


ARTICLES = [Pair(f"test/{i}", f"the old film of town {i} – a big film é", "a film") for i in range(10)]


@pytest.mark.parametrize("half_a_line", [b"", b'{"id": "test/6", "arti'])
def test_an_interrupted_attack_goes_on_to_the_same_file(tmp_path, half_a_line):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    rows = attack_all(whole, ARTICLES, 3, toy_rows, resume=False)
    calls = []

    def dies(pairs):
        calls.append(pairs)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return toy_rows(pairs)

    with pytest.raises(KeyboardInterrupt):
        attack_all(broken, ARTICLES, 3, dies, resume=False)
    path = broken / "attack.jsonl"
    assert len(path.read_text().splitlines()) == 6  # two groups are on disk
    path.write_bytes(path.read_bytes() + half_a_line)
    again = []
    resumed = attack_all(broken, ARTICLES, 3, lambda p: again.append(len(p)) or toy_rows(p), resume=True)
    assert resumed == rows and path.read_bytes() == (whole / "attack.jsonl").read_bytes() and again == [3, 1]
    # A finished one is left as it is, with its last, smaller group.
    assert attack_all(broken, ARTICLES, 3, None, resume=True) == rows
    # A group of which only a part is there is done again.
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:5]))
    again.clear()
    attack_all(broken, ARTICLES, 3, lambda p: again.append(len(p)) or toy_rows(p), resume=True)
    assert again == [3, 3, 1] and path.read_bytes() == (whole / "attack.jsonl").read_bytes()


def test_resume_refuses_rows_of_other_articles(tmp_path):
    attack_all(tmp_path, ARTICLES, 3, toy_rows, resume=False)
    with pytest.raises(ValueError, match="line 1: of another article"):
        attack_all(tmp_path, ARTICLES[1:], 3, toy_rows, resume=True)
    (tmp_path / "attack.jsonl").write_text("{}}\n")
    with pytest.raises(ValueError, match="line 1: not JSON"):
        attack_all(tmp_path, ARTICLES, 3, toy_rows, resume=True)


def test_figures_are_means_over_articles(tmp_path):
    pytest.importorskip("rouge_score")
    rows = toy_rows(ARTICLES)
    got = script.figures(rows, [p.article for p in ARTICLES], 0.5)
    rates = [len(r["changed"]) / r["words"] for r in rows]
    assert got["articles"] == 10 and got["perturbation_rate"] == pytest.approx(np.mean(rates))
    assert got["loss_rise"] == pytest.approx(got["loss_after"] - got["loss_before"])
    assert got["loss_rise_low"] <= got["loss_rise"] <= got["loss_rise_high"] and got["queries_per_article"] <= 9
    # The toy's summaries are the texts, and the references the articles.
    assert got["rouge_drop"]["rouge1"] == pytest.approx(got["rouge_before"]["rouge1"] - got["rouge_after"]["rouge1"])
    assert got["rouge_drop"]["rouge1"] > 0 and sum(got["stopped_by"].values()) == 10


def test_the_articles_are_drawn_by_the_seed():
    assert chosen(ARTICLES, 500, 0) == ARTICLES
    some = chosen(ARTICLES, 4, 0)
    assert some == chosen(ARTICLES, 4, 0) == sorted(some) and len(set(some)) == 4
    assert len({tuple(chosen(ARTICLES, 4, seed)) for seed in range(5)}) > 1


@pytest.fixture(scope="module")
def tiny(corpus, tmp_path_factory):
    """A run folder of finetune_seq2seq.py with a random BART, wide weights so that words matter, and its data."""
    folder = tmp_path_factory.mktemp("tiny")
    lines = (corpus / "train.txt").read_text().splitlines()
    pairs = [Pair(f"test/{i}", " ".join(lines[i : i + 8]), lines[i]) for i in range(0, 96, 8)]
    part = Summaries("arithmetic", "train", "", "", pairs, {})
    tokenizer = tokenizer_for_training("bpe:300", part, folder / "cache", bos=True)
    ids = dict(pad_token_id=tokenizer.pad_id, eos_token_id=tokenizer.eos_id, bos_token_id=tokenizer.bos_id)
    shape = dict(decoder_start_token_id=tokenizer.eos_id, vocab_size=tokenizer.vocab_size, init_std=0.2)
    torch.manual_seed(0)
    model = Seq2Seq(bart_config(1, 32, 2, **ids, **shape, max_position_embeddings=256))
    config = Config(
        data="arithmetic",
        size="bart-tiny",
        random_start=True,
        preset="none",
        max_source=192,
        max_target=24,
        max_new_tokens=12,
    )
    config = Config(**complete(asdict(config)))
    run = folder / "run"
    run.mkdir()
    state = {"model": model.state_dict(), "model_config": model.config.__dict__, "config": config.__dict__}
    torch.save(state | {"tokenizer": tokenizer.state(), "dtype": "float32", "step": 1}, run / "best.pt")
    (run / "config.json").write_text(json.dumps(config.__dict__))
    data = folder / "arithmetic"
    data.mkdir()
    rows = [{"id": p.id, "article": p.article, "summary": p.summary} for p in pairs]
    (data / "test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    numbers = "three four five six seven eight nine ten eleven twelve".split()
    near = {w: [n for n in numbers if n != w][:3] for w in numbers} | {"times": ["plus", "minus"]}
    lists = folder_of_lists(folder / "lists", **{"counterfitted_neighbors.json": json.dumps(near)})
    return Target(model, tokenizer, decoding(config, tokenizer), 192, 24, batch=4), pairs, run, data, lists


def test_losses_are_the_mean_nll_of_the_reference(tiny):
    """Against one text at a time, without padding, in plain PyTorch; fp32 sums in another order: 1e-5."""
    target, pairs, *_ = tiny
    texts, references = [p.article for p in pairs], [p.summary for p in pairs]
    expected = []
    for text, reference in zip(texts, references, strict=True):
        source, labels = (
            torch.from_numpy(target.tokenizer.wrap(target.tokenizer.base.encode(t), n))[None]
            for t, n in ((text, 192), (reference, 24))
        )
        hidden = target.model(source, None, target.model.shift_right(labels))
        expected.append(F.cross_entropy(hidden[0] @ target.model.head_weight.T, labels[0]).item())
    assert target.losses(texts, references) == pytest.approx(expected, rel=1e-5)
    tokens = [min(len(target.tokenizer.base.encode(r)) + 2, 24) for r in references]
    measured = target.calibration(texts, references)
    assert measured["tokens"] == sum(tokens)
    assert measured["nll"] == pytest.approx(np.average(expected, weights=tokens), rel=1e-5)


def test_the_model_reads_so_many_words(tiny):
    target, pairs, *_ = tiny
    text = " ".join(p.article for p in pairs)
    read = target.words_read(text)
    words = text.split()
    assert 0 < read < len(words) - 9
    changed = " ".join(words[: read + 1] + ["zero"] * 9), " ".join(words[: read - 2] + ["zero"] * 200)
    same, beyond, within = target.losses([text, *changed], ["ten"] * 3)
    assert same == beyond != within
    assert target.words_read("one two") == 2 and target.words_read("") == 0


def test_embeddings_do_not_depend_on_the_batch(tiny):
    target, pairs, *_ = tiny
    texts = ["one", "one two three times four", *(p.article for p in pairs)]
    alone = torch.cat([target.embed([t]) for t in texts])
    torch.testing.assert_close(target.embed(texts), alone, rtol=1e-4, atol=1e-5)  # fp32, other shapes


def run_main(tiny, out, *more):
    _, _, run, data, lists = tiny
    script.main(
        [
            str(run),
            "--data",
            str(data),
            "--out",
            str(out),
            "--words",
            str(lists),
            "--articles",
            "7",
            "--queries",
            "40",
            "--group",
            "3",
            "--goal",
            "0.2",
            "--max-changed",
            "0.3",
            "--pos",
            "none",
            "--device",
            "cpu",
            *more,
        ]
    )


def test_the_command_attacks_resumes_and_reports(tiny, tmp_path, capsys):
    run_main(tiny, tmp_path / "a", "--min-similarity", "0.5")
    text = capsys.readouterr().out
    assert "how this differs from the published recipe" in text and "No part-of-speech check" in text
    assert "own mean encoder states" in text
    done = json.loads((tmp_path / "a" / "attack.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "a" / "attack.jsonl").read_text().splitlines()]
    figures = done["figures"]
    assert done["state"] == "finished" and len(rows) == figures["articles"] == 7
    assert figures["loss_rise"] > 0 and figures["queries_max"] <= 40 and 0 < figures["perturbation_rate"] <= 0.3
    # The calibration under attack is of the texts in attack.jsonl: its NLL rises with the losses.
    assert done["calibration_after"]["nll"] > done["calibration_before"]["nll"]
    assert {"rouge1", "rougeLsum_low"} <= set(figures["rouge_before"])
    for row in rows:
        assert row["loss_after"] >= row["loss_before"]
        assert (row["stop"] == "goal") == (row["loss_after"] - row["loss_before"] >= 0.2)
    # Killed in the second group, then resumed.
    lines = (tmp_path / "a" / "attack.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "a" / "attack.jsonl").write_bytes(b"".join(lines[:5]) + lines[5][:40])
    running = {k: done[k] for k in ("config", "environment", "differences")} | {"state": "running"}
    (tmp_path / "a" / "attack.json").write_text(json.dumps(running))
    run_main(tiny, tmp_path / "a", "--min-similarity", "0.5", "--resume")
    assert (tmp_path / "a" / "attack.jsonl").read_bytes() == b"".join(lines)
    again = json.loads((tmp_path / "a" / "attack.json").read_text())
    for name in ("figures", "calibration_before", "calibration_after"):
        assert again[name] == done[name]


def test_a_plain_model_folder_is_attacked_with_the_published_search(tiny, corpus, tmp_path):
    from tokenizers import ByteLevelBPETokenizer

    _, _, _, data, lists = tiny
    vocabulary = ByteLevelBPETokenizer()
    vocabulary.train([str(corpus / "train.txt")], vocab_size=300, special_tokens=["<s>", "<pad>", "</s>"])
    ids = dict(vocab_size=vocabulary.get_vocab_size(), bos_token_id=0, pad_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    model = Seq2Seq(bart_config(1, 32, 2, **ids, decoder_start_token_id=2, max_position_embeddings=160))
    extra = {"tokenizer.json": vocabulary.to_str().encode(), "tokenizer_config.json": b'{"eos_token": "</s>"}'}
    save_seq2seq(model, tmp_path / "bart", extra)
    script.main(
        [
            str(tmp_path / "bart"),
            "--data",
            str(data),
            "--out",
            str(tmp_path / "out"),
            "--words",
            str(lists),
            "--articles",
            "2",
            "--queries",
            "12",
            "--pos",
            "none",
            "--device",
            "cpu",
        ]
    )
    config = json.loads((tmp_path / "out" / "attack.json").read_text())["config"]
    assert config["max_source"] == 160  # of a recipe's 1024, what the model has
    assert config["decoding"]["num_beams"] == 4 and config["decoding"]["max_new_tokens"] == 141
    assert list(config["weights"]) == ["model.safetensors"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--words", "nowhere.json"], "no word list nowhere.json"),
        (["--pos", "spacy"], "--pos spacy needs spacy"),
        (["--queries", "0"], "queries=0: expected a whole number"),
        (["--articles", "0"], "--articles 0: expected 1 or more"),
        (["--split", "validation"], "has none of validation.jsonl"),
        (["--checkpoint", "last.pt"], "last.pt"),
        (["--group", "0"], "--group 0: expected 1 or more"),
        (["--resume"], "--resume: no attack in"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tiny, tmp_path, capsys, more, message):
    if "spacy" in more and importlib.util.find_spec("spacy"):
        pytest.skip("spacy is installed")
    with pytest.raises(SystemExit) as stop:
        run_main(tiny, tmp_path / "out", *more)
    error = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and message in error[-1] and not (tmp_path / "out").exists()


def test_a_broken_list_exits_with_its_line(tiny, tmp_path, capsys):
    (tmp_path / "near.txt").write_text("old aged\nfilm\n")
    with pytest.raises(SystemExit) as stop:
        run_main(tiny, tmp_path / "out", "--words", str(tmp_path / "near.txt"), "--stop-words", "none")
    error = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(error) == 1 and "near.txt, line 2: 'film'; expected" in error[0]


def test_an_attack_that_could_exchange_no_word_is_an_error(tiny, tmp_path, capsys):
    (tmp_path / "near.txt").write_text("привет добрый\n", encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        run_main(tiny, tmp_path / "out", "--words", str(tmp_path / "near.txt"), "--stop-words", "none")
    error = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and "articles has another to stand for it; give --words of" in error[-1]
    assert not (tmp_path / "out").exists()


def test_words_that_are_never_exchanged_are_no_candidates(tiny, tmp_path, capsys):
    """Names alone have neighbours: with them kept there is nothing to attack, which is said before anything is done."""
    pairs = [SimpleNamespace(article="we saw Big Town", summary="s")]
    lists = WordLists({"big": ["large"], "town": ["city"]})
    script.check_candidates(pairs, lists, keep_names=False)
    with pytest.raises(ValueError, match="no word of the 1 articles has another to stand for it; give --words"):
        script.check_candidates(pairs, lists, keep_names=True)


def test_the_words_of_rouge_may_be_chosen_and_what_it_cannot_read_is_said(tiny, tmp_path, capsys):
    """The run's own choice, or --rouge-words; of references in another script ASCII's ROUGE measures none."""
    rows = [dict(row, summary_before="привет мир", summary_after="мир") for row in toy_rows(ARTICLES)]
    references = ["привет мир"] * len(rows)
    ascii_only = script.figures(rows, references, 0.5)
    assert ascii_only["rouge_unmeasured"] == 10 and ascii_only["rouge_before"]["rouge1"] is None
    read = script.figures(rows, references, 0.5, "unicode")
    assert read["rouge_unmeasured"] == 0 and read["rouge_before"]["rouge1"] == pytest.approx(100)
    few = ("--articles", "2", "--queries", "4", "--goal", "inf")
    for name, flags in (("run's", ()), ("given", ("--rouge-words", "unicode"))):
        run_main(tiny, tmp_path / name, *few, *flags)
        config = json.loads((tmp_path / name / "attack.json").read_text())["config"]
        assert config["rouge_words"] == ("unicode" if flags else "ascii")
    content = json.loads((tmp_path / "given" / "attack.json").read_text())
    content["figures"] |= {"rouge_unmeasured": 1, "articles_without_candidates": 1}
    said = "\n".join(script.summary_lines(content))
    assert "1 of 2 references have no word that it reads and are left out; --rouge-words unicode" in said
    assert "1 of them have no word with another to stand for it" in said


def test_an_attack_without_a_goal_can_be_resumed(tiny, tmp_path, capsys):
    run_main(tiny, tmp_path / "a", "--articles", "2", "--goal", "inf", "--queries", "6")
    assert "no goal" in capsys.readouterr().out
    before = (tmp_path / "a" / "attack.jsonl").read_bytes()
    run_main(tiny, tmp_path / "a", "--articles", "2", "--goal", "inf", "--queries", "6", "--resume")
    assert (tmp_path / "a" / "attack.jsonl").read_bytes() == before
    assert json.loads((tmp_path / "a" / "attack.json").read_text())["figures"]["success_rate"] is None


def test_a_folder_in_use_and_another_config_are_refused(tiny, tmp_path, capsys):
    run_main(tiny, tmp_path / "a", "--articles", "2")
    before = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    for more, message in (
        ([], "exists and is not an empty folder"),
        (["--resume", "--seed", "9"], "seed was 1, now 9"),
    ):
        with pytest.raises(SystemExit) as stop:
            run_main(tiny, tmp_path / "a", "--articles", "2", *more)
        assert stop.value.code == 2 and message in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == before
