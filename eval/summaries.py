"""Generated summaries: written as they are made, and measured: ROUGE with an interval, BERTScore, Distinct-n, lengths.

ROUGE is rouge-score's F1 with Porter stemming, in percent, as papers print it. Of its two ROUGE-L, `rougeL` takes a
summary as one sequence and `rougeLsum` takes the union over sentences (Lin, 2004, section 3.2), which is the "RL" of
CNN/DailyMail's tables. It reads sentences as lines; `sentences` makes the lines. Beside it stand the scores in the
convention that BART's published numbers follow, files2rouge's.
"""

import json
import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from data.summaries import collate, in_order
from eval.stats import bootstrap_interval
from eval.text import distinct_n
from model.generate import generate
from runtime.folder import write_bytes

ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")

# An end of a sentence: . ! or ?, closing quotes or brackets, blanks, then a capital, a digit or an opening quote.
_END = re.compile(r"([.!?][\"'”’)\]]*)\s+(?=[\"'“‘(\[]?[A-Z0-9])")
_ABBREVIATION = re.compile(
    r"(?:\b(?:Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|Gen|Col|Sgt|Lt|Capt|Rep|Sen|Gov|Rev|No|Inc|Ltd|Co|vs|etc|al|e\.g|i\.e)"
    r"|(?<![A-Za-z])[A-Z](?:\.[A-Z])*)\.$"
)


def sentences(text: str) -> list[str]:
    """The sentences of a summary: its lines where it has several, else split by rule at . ! ? before a capital.

    CNN/DailyMail's references come a sentence a line, most models' outputs in one line. The rule keeps titles,
    initials and the usual abbreviations; it needs no data. No sentence is blank.
    """
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if len(lines) != 1:
        return lines
    out, start, line = [], 0, lines[0]
    for end in _END.finditer(line):
        if not _ABBREVIATION.search(line[start : end.end(1)]):
            out.append(line[start : end.end(1)])
            start = end.end()
    return [*out, line[start:]]


def rouge_scores(predictions: Sequence[str], references: Sequence[str]) -> dict[str, list[float]]:
    """F1 in percent of each pair, for every name in ROUGE, as rouge-score computes it from newline-split sentences
    with ``use_stemmer=True``. A prediction without a word scores 0. Raises ValueError where the numbers of texts
    differ or there is none, and where the package is missing.
    """
    _check_pairs(predictions, references)
    try:
        from rouge_score.rouge_scorer import RougeScorer
        from rouge_score.tokenizers import DefaultTokenizer
    except ImportError:
        raise ValueError("ROUGE needs the package rouge-score; pip install rouge-score==0.1.2") from None
    # Without a tokenizer it makes this same one, and a log line that gives the root logger a handler.
    scorer = RougeScorer(list(ROUGE), tokenizer=DefaultTokenizer(use_stemmer=True))
    out = {name: [] for name in ROUGE}
    for prediction, reference in zip(predictions, references, strict=True):
        scores = scorer.score("\n".join(sentences(reference)), "\n".join(sentences(prediction)))
        for name in ROUGE:
            out[name].append(100 * scores[name].fmeasure)
    return out


def files2rouge_scores(predictions: Sequence[str], references: Sequence[str]) -> dict[str, list[float]]:
    """F1 in percent of each pair in the convention of BART's published numbers: files2rouge_1, _2 and _L.

    fairseq's README tokenises both sides with Stanford's PTBTokenizer and calls files2rouge, which starts a line behind
    each " ." and runs ROUGE-1.5.5 with -c 95 -r 1000 -n 2 -a -m; its ROUGE-L is that of lines, `rougeLsum` here. What
    differs from `rouge_scores`: brackets count as words (-LRB-), contractions come apart (do n't), sentences end at
    full stops only, and the stemmer is Porter's own, not NLTK's. Three things differ from the Perl script: NLTK's
    Treebank rules stand for Stanford's, it looks irregular forms up in WordNet's exceptions first (went: go), and an
    empty prediction scores 0 where files2rouge stops. Raises as `rouge_scores`.
    """
    _check_pairs(predictions, references)
    try:
        from nltk.stem.porter import PorterStemmer
        from nltk.tokenize.treebank import TreebankWordTokenizer
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise ValueError("ROUGE needs the package rouge-score; pip install rouge-score==0.1.2") from None
    treebank, stemmer = TreebankWordTokenizer(), PorterStemmer(PorterStemmer.MARTIN_EXTENSIONS)

    class Words:
        def tokenize(self, text: str) -> list[str]:
            found = re.findall(r"[a-z0-9]+", text.lower())
            return [stemmer.stem(word) if len(word) > 3 else word for word in found]

    def lines(text: str) -> str:
        words = (w for sentence in sentences(text) for w in treebank.tokenize(sentence, convert_parentheses=True))
        return " ".join(words).replace(" .", " .\n")

    scorer = RougeScorer(["rouge1", "rouge2", "rougeLsum"], tokenizer=Words())
    scores = [scorer.score(lines(r), lines(p)) for p, r in zip(predictions, references, strict=True)]
    names = {"files2rouge_1": "rouge1", "files2rouge_2": "rouge2", "files2rouge_L": "rougeLsum"}
    return {name: [100 * score[theirs].fmeasure for score in scores] for name, theirs in names.items()}


def rouge(predictions: Sequence[str], references: Sequence[str], *, resamples: int = 1000) -> dict[str, float]:
    """The mean of each ROUGE over pairs and its 95 % percentile bootstrap interval over pairs, seeded:
    rouge1, rouge1_low, rouge1_high and so on. Both ends are None for a single pair. Errors as in `rouge_scores`.
    """
    out = {}
    for name, values in rouge_scores(predictions, references).items():
        low, high = bootstrap_interval(values, resamples=resamples)
        ends = {f"{name}_low": low, f"{name}_high": high}
        out |= {name: math.fsum(values) / len(values)} | {k: v if v == v else None for k, v in ends.items()}
    return out


def lengths(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Words (what white space separates) and sentences a text: means, the predictions' standard deviation, and
    ``length_ratio``, the words of all predictions over those of all references. Errors as in `rouge_scores`."""
    _check_pairs(predictions, references)
    mine, theirs = ([len(text.split()) for text in texts] for texts in (predictions, references))
    return {
        "words": statistics.fmean(mine),
        "words_sd": statistics.stdev(mine) if len(mine) > 1 else None,
        "reference_words": statistics.fmean(theirs),
        "length_ratio": sum(mine) / max(sum(theirs), 1),
        "sentences": statistics.fmean(len(sentences(text)) for text in predictions),
        "reference_sentences": statistics.fmean(len(sentences(text)) for text in references),
        "empty": sum(not words for words in mine),
    }


def summary_metrics(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """All of the above for one set of pairs, files2rouge's as means, and distinct_1 and distinct_2 of predictions and
    references."""
    out = {"examples": len(predictions)} | rouge(predictions, references) | lengths(predictions, references)
    out |= {k: math.fsum(v) / len(v) for k, v in files2rouge_scores(predictions, references).items()}
    for n in (1, 2):
        out[f"distinct_{n}"] = distinct_n(predictions, n)
        out[f"reference_distinct_{n}"] = distinct_n(references, n)
    return out


def bert_score(
    predictions: Sequence[str], references: Sequence[str], model: str, *, device: str = "cpu", batch: int = 64
) -> dict[str, float | str]:
    """BERTScore (Zhang et al., 2020) through bert-score: mean precision, recall and F1, without rescaling, and the
    package's hash, without which values cannot be compared. An empty prediction scores 0.

    ``model`` is a name that the package knows, or a local folder, either with ``:LAYER`` to choose the layer; a folder
    named as a known model (roberta-large) has that model's layer. Raises ValueError for a folder without either, a
    model that cannot be loaded, or a missing package.
    """
    _check_pairs(predictions, references)
    name, layer = bert_model(model)
    from bert_score import BERTScorer

    try:
        scorer = BERTScorer(model_type=name, num_layers=layer, device=device, batch_size=batch)
    except (OSError, ValueError, KeyError) as error:  # transformers', for a folder or a name it cannot load
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"--bertscore {model} cannot be loaded: {reason}") from error
    texts = [(p, r) for p, r in zip(predictions, references, strict=True) if p.strip() and r.strip()]
    sums = [0.0, 0.0, 0.0]
    if texts:
        sums = [t.double().sum().item() for t in scorer.score(*map(list, zip(*texts, strict=True)))]
    names = ("bertscore_precision", "bertscore_recall", "bertscore_f1")
    means = {name: total / len(predictions) for name, total in zip(names, sums, strict=True)}
    return means | {"bertscore_hash": scorer.hash}


def bert_model(model: str) -> tuple[str, int]:
    """Name or folder, and layer, of a ``--bertscore`` value; ValueError, one line, where they cannot be told."""
    try:
        from bert_score.utils import model2layers
    except ImportError:
        raise ValueError("--bertscore needs the package bert-score; pip install bert-score==0.3.13") from None
    name, _, layer = model.rpartition(":") if re.search(r":\d+$", model) else (model, "", "")
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise ValueError(f"--bertscore {model}: there is no folder {name}; expected one in Hugging Face's layout")
    name = str(Path(name).expanduser()) if name.startswith("~") else name
    known = name if name in model2layers else Path(name).name
    if not layer and known not in model2layers:
        raise ValueError(f"--bertscore {model}: bert-score has no layer for it; add one, for example {model}:9")
    return name, int(layer) if layer else model2layers[known]


def _check_pairs(predictions: Sequence[str], references: Sequence[str]) -> None:
    if isinstance(predictions, str) or isinstance(references, str):
        raise ValueError("predictions and references must be lists of strings, one a text, got one string")
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references; expected one each")
    if not predictions:
        raise ValueError("no predictions to measure; expected at least one")


# ----------------------------------------------------------------------------------------------
# summaries as they are made


def read_predictions(paths: Sequence[Path], key: str | int) -> dict[int, dict]:
    """Rows of predictions files by index, those made under ``key``; what a kill left half-written at the end of a file
    is left out."""
    rows = {}
    for path in paths:
        for line in path.read_text(encoding="utf-8").split("\n"):
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                break
            if row["key"] == key:
                rows[row["index"]] = row
    return rows


def write_predictions(
    model,
    pairs,
    options,
    path: Path,
    world,
    *,
    key: str | int = 0,
    batch: int = 16,
    multiple: int = 1,
) -> tuple[list[dict], float | None]:
    """Summaries of all of ``pairs`` (data.summaries.TokenPairs) by ``model`` (Seq2Seq) under ``options`` (Decoding), as
    rows in the order of the pairs, and the new tokens a second of this process, None where none were new.

    Each batch is appended to this rank's part file beside ``path`` when it is done; what the parts of an earlier,
    killed call hold under the same ``key`` (say, the step of the weights) is not made again. When all is there ``path``
    gets it in one piece and the parts go. ``world``: machine.World; every rank must call it. ``multiple``: sources are
    padded to a multiple of it. A row has index, id, key, prediction, reference, tokens (EOS included), ended (by EOS,
    not by the limit) and score.
    """
    from tqdm import tqdm

    def parts() -> list[Path]:
        return sorted(path.parent.glob(f"{path.stem}.part*.jsonl"))

    def lines(rows: dict[int, dict]) -> bytes:
        return "".join(json.dumps(rows[i], ensure_ascii=False) + "\n" for i in sorted(rows)).encode()

    def barrier() -> None:
        if world.size > 1:
            torch.distributed.barrier()

    if path.exists() and len(done := read_predictions([path], key)) == len(pairs):
        return [done[i] for i in range(len(pairs))], None
    done, mine = read_predictions(parts(), key), path.with_name(f"{path.stem}.part{world.rank}.jsonl")
    own = read_predictions([mine], key) if mine.exists() else {}
    barrier()  # all have read before one writes
    write_bytes(mine, lambda f: f.write(lines(own)))
    todo = np.array([i for rows in in_order(pairs, len(pairs)) for i in rows if i not in done])
    batches = [todo[i : i + batch] for i in range(0, len(todo), batch)][world.rank :: world.size]
    tokens, seconds = 0, 0.0
    with open(mine, "a", encoding="utf-8") as file:
        for rows in tqdm(batches, desc=path.stem, disable=not world.main, leave=False):
            source, mask, _ = collate(pairs, rows, multiple=multiple)
            made = generate(model, source, options, mask)
            tokens, seconds = tokens + made.new_tokens, seconds + made.seconds
            for row, i in enumerate(rows.tolist()):
                pair, n = pairs.pairs[i], int(made.lengths[row, 0])
                fields = {
                    "index": i,
                    "id": pair.id,
                    "key": key,
                    "prediction": pairs.tokenizer.decode(made.tokens[row, 0, :n].tolist()),
                    "reference": pair.summary,
                    "tokens": n,
                    "ended": bool(made.ended[row, 0]),
                    "score": float(made.scores[row, 0]),
                }
                file.write(json.dumps(fields, ensure_ascii=False) + "\n")
            file.flush()
    barrier()
    done = read_predictions(parts(), key)
    barrier()  # all have read before one removes
    if world.main:
        write_bytes(path, lambda f: f.write(lines(done)))
        for part in parts():
            part.unlink()
    return [done[i] for i in range(len(pairs))], tokens / seconds if seconds else None
