"""A summariser under attack by synonyms: TextFooler's recipe (textfooler.py) with the loss of the reference summary.

    python -m eval.attack RUN_FOLDER --data cnn_dailymail --out runs/attack
    python -m eval.attack RUN_FOLDER --data FOLDER --words counter-fitted-vectors.txt --stop-words s.txt --out DIR
    python -m eval.attack RUN_FOLDER --data cnn_dailymail --out runs/attack --resume

RUN_FOLDER is a run of finetune_seq2seq.py, or a BART or PEGASUS in Hugging Face's layout. Harm is the mean NLL of the
reference summary's tokens in nats, teacher-forced. The output lists what differs from the published recipe.

``--out`` holds attack.jsonl, a line an article, flushed to disk after each group of articles, and attack.json. That has
the config, and at the end ROUGE and calibration before and under attack, the share of words exchanged, queries an
article and the success rate. ``--resume`` goes on after the last whole group.
"""

import hashlib
import json
import math
import os
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from data.summaries import load_summaries, tokenizer_of_model
from data.windows import IGNORE_INDEX
from data.wordlists import WordLists, load_lists
from eval.attack.textfooler import AttackOptions, attack_group
from eval.attack.words import POS, SameClass, Words, exchangeable, part_of_speech
from eval.rows import json_line, write_rows
from eval.seq2seq import decoding, forward, load_finetuned
from eval.summaries import ROUGE, ROUGE_WORDS, intervals, rouge_scores
from kernels import Calibration, linear_moments
from model.generate import generate
from model.seq2seq_hub import load_seq2seq
from recipes.presets import preset_values
from runtime import secrets
from runtime.cli import Parser, user_errors
from runtime.folder import environment, same_config, write_json
from runtime.machine import start_world
from schedules.commandline import alive
from schedules.textlines import fault, read_json, read_rows

ROWS_FILE, RESULT_FILE = "attack.jsonl", "attack.json"
KEPT = ("changed", "queries", "loss_before", "loss_after", "words", "stop")  # of an Attack, in attack.jsonl


NOTHING = "no word of the {:,} articles has another to stand for it"
WAY_OUT = "give --words of the articles' language, or fewer --antonyms and --synonyms"


class Target:
    """A summarisation model as the attack sees it: the loss, the moments, the summary and the vector of texts.

    ``model`` is a model.seq2seq.Seq2Seq, ``tokenizer`` a data.summaries.SummaryTokenizer, ``decoding`` a
    model.beam.Decoding. Texts are cut at ``max_source`` and ``max_target`` tokens and go ``batch`` at a time."""

    def __init__(self, model, tokenizer, decoding, max_source: int, max_target: int, batch: int):
        self.model, self.tokenizer, self.decoding = model.eval(), tokenizer, decoding
        self.max_source, self.max_target, self.batch = max_source, max_target, batch
        self.device = model.head_weight.device

    def words_read(self, text: str) -> int:
        """How many of the text's words the model gets to see, the last perhaps in part."""
        (ids,) = self._ids([text], self.max_source)
        return min(len(self.tokenizer.decode(ids).split()), len(text.split()))

    @torch.no_grad()
    def moments(self, texts: Sequence[str], references: Sequence[str]):
        """Yields (places, Moments [n * T]) of the references' tokens in batches of texts of like lengths."""
        targets = self._ids([r.replace("\n", self.tokenizer.newline) for r in references], self.max_target)
        for places, source, mask in self._batches(texts):
            labels = pad_sequence([targets[i] for i in places], batch_first=True, padding_value=IGNORE_INDEX)
            hidden, y = forward(self.model, source, mask, labels, self.device, self.model.shift_right)
            yield places, linear_moments(hidden, self.model.head_weight, y, bias=self.model.head_bias)

    def losses(self, texts: Sequence[str], references: Sequence[str]) -> list[float]:
        """Mean NLL of each reference's tokens (its end among them) given its text, in nats."""
        out = {}
        for places, moments in self.moments(texts, references):
            nll_BT = torch.where(moments.valid, -moments.log_p, 0.0).view(len(places), -1).double()
            tokens_B = moments.valid.view(len(places), -1).sum(1)
            out |= zip(places, (nll_BT.sum(1) / tokens_B).tolist(), strict=True)
        return [out[i] for i in range(len(texts))]

    def calibration(self, texts: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        """Token-level calibration on the references, given the texts."""
        calibration = Calibration(self.device)
        for _, moments in self.moments(texts, references):
            calibration.update(moments)
        return calibration.compute()

    def summaries(self, texts: Sequence[str]) -> list[str]:
        """What the model writes, the best hypothesis of each text."""
        out = {}
        for places, source, mask in self._batches(texts):
            found = generate(self.model, source, self.decoding, mask)
            best = zip(found.tokens[:, 0].tolist(), found.lengths[:, 0].tolist(), strict=True)
            out |= zip(places, (self.tokenizer.decode(ids[:length]) for ids, length in best), strict=True)
        return [out[i] for i in range(len(texts))]

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """fp32 [n, D]: the mean over tokens of the encoder's last states."""
        out = {}
        for places, source, mask in self._batches(texts):
            weight = (torch.ones_like(source) if mask is None else mask).float()[:, :, None]
            states = self.model.encode(source, mask).float()
            means = torch.where(weight > 0, states, 0.0).sum(1) / weight.sum(1)
            out |= zip(places, means, strict=True)
        return torch.stack([out[i] for i in range(len(texts))])

    def _ids(self, texts: Sequence[str], limit: int) -> list[Tensor]:
        documents = self.tokenizer.base.encode_documents(texts)
        return [torch.from_numpy(self.tokenizer.wrap(ids, limit)) for ids in documents]

    def _batches(self, texts: Sequence[str]) -> Iterator[tuple[list[int], Tensor, Tensor | None]]:
        """Batches of texts of like lengths, on the device: (places, sources [n, S], mask, None without padding)."""
        sources = self._ids(texts, self.max_source)
        order = sorted(range(len(sources)), key=lambda i: -len(sources[i]))
        for start in range(0, len(order), self.batch):
            places = order[start : start + self.batch]
            rows = [sources[i] for i in places]
            padded = pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad_id)
            mask = torch.arange(padded.shape[1]) < torch.tensor([[len(row)] for row in rows])
            yield places, padded.to(self.device), None if mask.all() else mask.to(self.device)


def attack_pairs(
    target: Target, pairs, lists: WordLists, options: AttackOptions, seed: int, same_class: SameClass | None
) -> list[dict]:
    """Rows of attack.jsonl for a group of pairs (id, article, summary): attacked, and summarised before and after."""
    articles, references = [p.article for p in pairs], [p.summary for p in pairs]

    def loss_of(asked: list[tuple[int, str]]) -> list[float]:
        return target.losses([text for _, text in asked], [references[k] for k, _ in asked])

    rngs = [random.Random(f"{seed}/{p.id}") for p in pairs]  # of the article alone: the groups change nothing
    how = {"same_class": same_class, "embed_of": None if options.min_similarity is None else target.embed}
    how["limits"] = [target.words_read(article) for article in articles]
    attacks = attack_group(articles, loss_of, lists, options, rngs, **how)
    written = target.summaries([*articles, *(a.text for a in attacks)])
    before, after = written[: len(pairs)], written[len(pairs) :]
    return [
        {"id": pair.id, "article": found.text}
        | {name: getattr(found, name) for name in KEPT}
        | {"summary_before": was, "summary_after": now}
        for pair, found, was, now in zip(pairs, attacks, before, after, strict=True)
    ]


def attack_all(
    folder: Path, pairs, group: int, attack: Callable[[list], list[dict]], resume: bool, progress: bool = False
) -> list[dict]:
    """Attacks ``pairs``, ``group`` at a time, and syncs attack.jsonl after each group. ``resume`` keeps whole groups
    that are in the file. Raises ValueError where the file is of other articles."""
    path = folder / ROWS_FILE
    rows = finished_rows(path, pairs, group) if resume else []
    write_rows(path, rows)
    bar = tqdm(total=len(pairs), initial=len(rows), unit="article", dynamic_ncols=True, disable=not progress)
    with bar, open(path, "a", encoding="utf-8") as file:
        for start in range(len(rows), len(pairs), group):
            part = attack(pairs[start : start + group])
            file.write("".join(map(json_line, part)))
            file.flush()
            os.fsync(file.fileno())
            rows += part
            mean = {k: statistics.fmean(v) for k, v in by_article(rows).items()}
            bar.set_postfix_str(
                f"loss {mean['loss_before']:.3f} -> {mean['loss_after']:.3f}, goal reached {100 * mean['goal']:.0f} %, "
                f"{100 * mean['rate']:.1f} % of words, {mean['queries']:.0f} queries each"
            )
            bar.update(len(part))
    return rows


def finished_rows(path: Path, pairs, group: int) -> list[dict]:
    """The rows of the whole groups in ``path``. Its last line may be half-written; its last group is done again."""
    rows, anew = [], "attack anew into another --out"
    for number, row in read_rows(path, half=[], nan=True, advice=anew) if path.exists() else ():
        rows.append(row)
        if len(rows) > len(pairs) or not isinstance(row, dict) or row.get("id") != pairs[len(rows) - 1].id:
            raise fault(path, number, "of another article than asked for", anew)
    return rows if len(rows) == len(pairs) else rows[: len(rows) // group * group]


def by_article(rows: list[dict]) -> dict[str, list[float]]:
    """The measures of an attack, a value an article."""
    out = {name: [row[name] for row in rows] for name in ("loss_before", "loss_after", "queries", "words")}
    out["changed"] = [len(row["changed"]) for row in rows]
    out["rate"] = [len(row["changed"]) / max(row["words"], 1) for row in rows]
    out["rise"] = [row["loss_after"] - row["loss_before"] for row in rows]
    out["goal"] = [float(row["stop"] == "goal") for row in rows]
    return out


def untouched(row: dict) -> bool:
    """Whether no word of the article had another that might stand for it, so that nothing was tried."""
    return row["stop"] == "words" and row["queries"] == 1


def figures(rows: list[dict], references: Sequence[str], goal: float, words: str = "ascii") -> dict:
    """What the attack did: means over articles, ROUGE before and after, and 95 % intervals of the loss's rise and of
    ROUGE's drop. ``success_rate`` is the share that reached the goal, None without a goal. ``words``: ROUGE's."""
    values = by_article(rows)
    mean = {name: statistics.fmean(each) for name, each in values.items()}
    written = ([row[f"summary_{when}"] for row in rows] for when in ("before", "after"))
    before, after = (rouge_scores(each, references, words=words) for each in written)
    drops = {
        name: [None if a is None else a - b for a, b in zip(before[name], after[name], strict=True)] for name in ROUGE
    }
    return {
        "articles": len(rows),
        "articles_without_candidates": sum(map(untouched, rows)),
        "success_rate": mean["goal"] if math.isfinite(goal) else None,
        "perturbation_rate": mean["rate"],
        "queries_per_article": mean["queries"],
        "queries_max": max(values["queries"]),
        **intervals({"loss_rise": values["rise"]}),
        "stopped_by": dict(Counter(row["stop"] for row in rows)),
        **{name: mean[name] for name in ("loss_before", "loss_after", "words", "changed")},
        "rouge_unmeasured": before["rouge1"].count(None),  # references in which it finds no word
        "rouge_before": intervals(before, resamples=1000),
        "rouge_after": intervals(after, resamples=1000),
        "rouge_drop": intervals(drops),
    }


def differences(options: AttackOptions, pos: str, lists: dict[str, str]) -> list[str]:
    """How the attack differs from the published recipe, in sentences. ``lists``: the word lists' files, by name."""
    neighbours, similarity = next(iter(lists)), options.min_similarity
    success = f"success is a rise of it by {options.goal:g} nats per token, not a changed label."
    threshold = "" if "vectors" in neighbours else ", as listed there, without a cosine threshold of ours"
    said = [
        "The target is a summariser: harm is the mean NLL of the reference summary, not the probability of a class, "
        f"and {success if math.isfinite(options.goal) else 'no rise of it is called a success.'}",
        "Importance is measured by deleting the word from the text; words that could not be exchanged are not ranked.",
        f"At most {100 * options.max_changed:g} % of the words that the model reads are exchanged, and "
        f"{options.queries} texts are put through it; the published attack has no such bounds.",
        f"Neighbours are those of {neighbours}, at most {options.candidates} a word{threshold}; published: 50 of "
        "cosine 0.7 or more.",
        "No sentence encoder: the share of changed words alone stands for the similarity of meaning."
        if similarity is None
        else f"Similarity is the cosine of the attacked model's own mean encoder states over {options.window} words, "
        f"at least {similarity:g}, against the original text; published: the Universal Sentence Encoder, 0.7, against "
        "the text so far. Such states are alike for most texts, so that it binds less.",
        # False where one does not apply:
        pos == "none" and "No part-of-speech check.",
        "suffix" in pos
        and "Part of speech is a class of word endings (eval.attack.words.suffix_class), not a tagger's.",
        any("antonym" in name for name in lists)
        and "Listed antonyms are never exchanged; the published attack leaves that to the vectors.",
        options.keep_names
        and "Capitalised words inside a sentence are taken for names and stay; published: lower-case text.",
    ]
    return [sentence for sentence in said if sentence]


def summary_lines(content: dict) -> list[str]:
    """What attack.json holds, for people."""
    f, before, after = content["figures"], content["calibration_before"], content["calibration_after"]

    def line(name, a, b, form=".4f"):
        if a is None:
            return f"  {name:22}{'not measured':>30}"
        return f"  {name:22}{a:>10{form}}{b:>10{form}}{b - a:>+10{form}}"

    lines = ["", f"  {'':22}{'before':>10}{'after':>10}{'change':>10}"]
    lines += [line(name, before[name], after[name]) for name in ("nll", "ece15", "brier", "accuracy", "confidence")]
    lines += [line(f"ROUGE {name[5:]}", f["rouge_before"][name], f["rouge_after"][name], ".2f") for name in ROUGE]
    rate = "no goal" if f["success_rate"] is None else f"{100 * f['success_rate']:.1f} % reached the goal"
    lines.append(
        f"  {f['articles']:,} articles: {rate}, {100 * f['perturbation_rate']:.1f} % of words exchanged, "
        f"{f['queries_per_article']:.0f} queries an article"
    )
    if f["articles_without_candidates"]:
        lines.append(f"  {f['articles_without_candidates']:,} of them have no word with another to stand for it")
    if f["rouge_unmeasured"]:
        what = f"{f['rouge_unmeasured']:,} of {f['articles']:,} references have no word that it reads and are left out"
        lines.append(f"  ROUGE: {what}; --rouge-words unicode reads every script")
    return [*lines, "  how this differs from the published recipe:", *(f"  - {d}" for d in content["differences"])]


def load_target(run: Path, checkpoint: str, data: str, device: torch.device, batch: int) -> tuple[Target, dict]:
    """The model of a run of finetune_seq2seq.py with that run's limits and search, or a model's plain folder with the
    published ones of its kind; and what to record of it."""
    if "model_type" in _config_of(run):
        model = load_seq2seq(run, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32).to(device)
        tokenizer = tokenizer_of_model(str(run), model.config)
        files = sorted([*run.glob("*.safetensors"), *run.glob("pytorch_model*.bin")])
        settings = SimpleNamespace(**preset_values(model.config.kind, data))
        settings.max_source = min(settings.max_source, model.config.max_position_embeddings)
    else:
        model, tokenizer, kept = load_finetuned(run, checkpoint, device)
        settings, files = SimpleNamespace(**kept["config"]), [run / checkpoint]
    search = decoding(settings, tokenizer)
    about = {"decoding": asdict(search), "max_source": settings.max_source, "max_target": settings.max_target}
    about |= {"model_dtype": str(model.dtype).removeprefix("torch."), "tokenizer": tokenizer.base.hash, "weights": {}}
    about["rouge_words"] = getattr(settings, "rouge_words", "ascii")
    for path in files:  # a run that was trained further is another target
        with open(path, "rb") as file:
            about["weights"][path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return Target(model, tokenizer, search, settings.max_source, settings.max_target, batch), about


def _config_of(run: Path) -> dict:
    path = run / "config.json"
    if not path.is_file():
        raise ValueError(f"{run} has no config.json; expected a run of finetune_seq2seq.py, or a model's folder")
    return read_json(path, dict)


def chosen(pairs: list, count: int, seed: int) -> list:
    """``count`` of the pairs, drawn by ``seed``, in their order; all of them where there are no more."""
    drawn = random.Random(seed).sample(range(len(pairs)), min(count, len(pairs)))
    return [pairs[i] for i in sorted(drawn)]


def check_candidates(pairs: list, lists: WordLists, keep_names: bool) -> None:
    """Raises ValueError where no word of the articles, names aside, has another to stand for it: nothing would be
    attacked."""
    articles = [Words(pair.article) for pair in pairs]
    words = {w.cores[i] for w in articles for i in range(len(w.chunks)) if exchangeable(w, i, keep_names)}
    if not any(map(lists.candidates, sorted(words))):
        raise ValueError(f"{NOTHING.format(len(pairs))}; {WAY_OUT}")


def prepare_out(out: Path, config: dict, resume: bool, may_change: tuple[str, ...] = ()) -> None:
    """Refuses a folder that is in use, or, resuming, one of another attack. Writes nothing."""
    result = out / RESULT_FILE
    if not resume:
        if out.is_file() or (out.is_dir() and any(out.iterdir())):
            raise ValueError(f"{out} exists and is not an empty folder; give another --out, or --resume to go on")
        return
    if not result.is_file():
        raise ValueError(f"--resume: no attack in {out} (no {RESULT_FILE}); check --out or start without --resume")
    anew = "attack anew into another --out"
    old = read_json(result, dict, advice=anew).get("config")
    if not isinstance(old, dict):
        raise ValueError(f"{result} is damaged, it has no config; {anew}")
    same_config(out, old, config, may_change, {"rouge_words": "ascii"})  # of attacks of before


def parser() -> tuple[Parser, tuple[str, ...]]:
    """The parser, and the flags that a resumed attack may change: where it runs and what it shows."""
    default, out = AttackOptions(), Parser(prog="python -m eval.attack", usage=None, description=__doc__)
    add = out.add_argument
    add("run", type=Path, help="run folder of finetune_seq2seq.py, or a model's folder")
    where = add("--out", type=Path, required=True, help="folder for attack.json and attack.jsonl")
    add("--data", default="cnn_dailymail", help="a set's name or a folder, as finetune_seq2seq.py takes them")
    add("--split", default="test", choices=("train", "validation", "test"), help="(default: %(default)s)")
    add("--articles", type=int, default=500, help="how many, drawn by --seed (default: %(default)s)")
    add("--checkpoint", default="best.pt", help="of the run (default: %(default)s)")
    add("--words", help="folder of lists, or file of neighbours or vectors (default: $LM_DATA/textfooler)")
    add("--stop-words", help="file with one word a line, or none (default: the folder's)")
    add("--antonyms", nargs="+", default=[], help="files of pairs never exchanged (default: the folder's)")
    add("--synonyms", nargs="+", default=[], help="files of pairs; then no others are exchanged")
    add("--pos", default="auto", choices=POS, help="part-of-speech check (default: the first that works here)")
    add("--queries", type=int, default=default.queries, help="texts of one article put through the model, at most")
    add("--goal", type=float, default=default.goal, help="rise of the loss that ends an attack, nats; inf: none")
    add("--max-changed", type=float, default=default.max_changed, help="share of words exchanged, at most")
    add("--candidates", type=int, default=default.candidates, help="neighbours of a word tried, at most")
    add("--min-similarity", type=float, help="cosine of the model's own encoder states, at least (default: no check)")
    add("--rouge-words", choices=ROUGE_WORDS, help="words that ROUGE reads (default: the run's own, else ascii)")
    add("--names", action="store_true", help="exchange capitalised words inside sentences too")
    add("--seed", type=int, default=1, help="draws the articles, and the words where queries are few")
    add("--group", type=int, default=8, help="articles attacked at a time; what a kill can lose")
    batch = add("--batch", type=int, default=32, help="texts in one forward")
    device = add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="(default: %(default)s)")
    resume = add("--resume", action="store_true", help="go on with the attack in --out")
    return out, tuple(action.dest for action in (where, batch, device, resume))


@alive()
def main(arguments: list[str] | None = None) -> None:
    options_of, may_change = parser()
    given = options_of.parse_args(arguments)
    with user_errors():
        for name in ("articles", "group", "batch"):
            if getattr(given, name) < 1:
                raise ValueError(f"--{name} {getattr(given, name)}: expected 1 or more")
        same_names = ("queries", "goal", "max_changed", "candidates", "min_similarity")
        options = AttackOptions(**{name: getattr(given, name) for name in same_names}, keep_names=not given.names)
        rouge_scores(["a"], ["a"])  # the package is there: found out before the attack, not after
        pos, same_class = part_of_speech(given.pos)
        lists, sources = load_lists(given.words, given.stop_words, given.antonyms, given.synonyms)
        least = {k: v for k, v in _config_of(given.run).items() if k == "min_words"}  # the run's own rule
        part = load_summaries(given.data, [given.split], **least)[given.split]
        pairs = chosen(part.pairs, given.articles, given.seed)
        device = start_world(given.device).device
        target, about = load_target(given.run, given.checkpoint, given.data, device, given.batch)
        digest = hashlib.sha256(json.dumps(pairs).encode()).hexdigest()
        about["rouge_words"] = given.rouge_words or about["rouge_words"]
        config = vars(given) | {"pos": pos, "lists": sources, "set": part.label, "pairs": digest} | about
        config["goal"] = given.goal if math.isfinite(given.goal) else None  # JSON has no inf
        config = json.loads(json.dumps(config, default=str))  # as a resumed attack will read it
        secrets.refuse(config)
        prepare_out(given.out, config, given.resume, may_change)
        check_candidates(pairs, lists, options.keep_names)
        given.out.mkdir(parents=True, exist_ok=True)
        content = {"state": "running", "config": config, "environment": environment(device)}
        content["differences"] = differences(options, pos, sources)
        write_json(given.out / RESULT_FILE, content)
        print(f"attacking {len(pairs):,} articles of {part.label}; part of speech: {pos}", file=sys.stderr)
        start = time.perf_counter()
        attack = partial(attack_pairs, target, lists=lists, options=options, seed=given.seed, same_class=same_class)
        rows = attack_all(given.out, pairs, given.group, attack, given.resume, progress=sys.stderr.isatty())
        content |= {"state": "finished", "seconds": time.perf_counter() - start}  # of this call, resumed or not
        if all(map(untouched, rows)):
            raise ValueError(f"{NOTHING.format(len(rows))} of the same part of speech (--pos {pos}); {WAY_OUT}")
        references = [p.summary for p in pairs]
        content["figures"] = figures(rows, references, options.goal, about["rouge_words"])
        content["calibration_before"] = target.calibration([p.article for p in pairs], references)
        content["calibration_after"] = target.calibration([row["article"] for row in rows], references)
        write_json(given.out / RESULT_FILE, content)
    print("\n".join(summary_lines(content)))
    print(f"  {given.out / RESULT_FILE}, {given.out / ROWS_FILE}")
