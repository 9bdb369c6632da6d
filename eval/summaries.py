"""Generated summaries: written as they are made, and measured: ROUGE with an interval, BERTScore, Distinct-n, lengths.

ROUGE is rouge-score's F1 with Porter stemming, in percent, as papers print it. It reads sentences as lines, which
`sentences` makes. There are two ROUGE-L: `rougeL` takes a summary as one sequence; `rougeLsum` takes the union over
sentences (Lin, 2004, section 3.2) and is the "RL" of CNN/DailyMail's tables. BART's published numbers follow another
convention, files2rouge's; those scores stand beside.

rouge-score and files2rouge read words of a-z and 0-9 alone. A reference in which they find no word is unmeasured, None
and counted, and so is the share of the references' letters that they pass over. ``words="unicode"`` reads any script,
and one without blanks letter by letter; such figures compare with none of a paper's.
"""

import logging
import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from tqdm import tqdm

from data.summaries import TokenPairs, collate, in_order
from eval.answer_calibration import rejection_ratio
from eval.rows import Parts, json_line, whole_rows, write_rows
from eval.stats import bootstrap_interval
from eval.text import distinct_n, unicode_words
from model.beam import Decoding
from model.generate import generate
from model.seq2seq import Seq2Seq
from runtime.machine import World
from schedules.commandline import package

log = logging.getLogger("scorecast")

ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
FILES2ROUGE = {"files2rouge_1": "rouge1", "files2rouge_2": "rouge2", "files2rouge_L": "rougeLsum"}  # as rouge-score's

ROUGE_WORDS = ("ascii", "unicode")

# An end of a sentence: . ! or ?, closing quotes or brackets, blanks, then a capital, a digit or an opening quote; or a
# full stop of a script without capitals.
_END = re.compile(r"([.!?][\"'”’)\]]*)\s+(?=[\"'“‘(\[]?[A-Z0-9])|([。！？।॥۔؟][\"'”’)\]」』]*)\s*(?=\S)")
_ABBREVIATION = re.compile(
    r"(?:\b(?:Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|Gen|Col|Sgt|Lt|Capt|Rep|Sen|Gov|Rev|No|Inc|Ltd|Co|vs|etc|al|e\.g|i\.e)"
    r"|(?<![A-Za-z])[A-Z](?:\.[A-Z])*)\.$"
)


def sentences(text: str) -> list[str]:
    """The sentences of a summary, none blank: its lines where it has several, as CNN/DailyMail's references do. One
    line is split by rule at . ! ? before a capital, and at the full stops of scripts without capitals; the rule knows
    titles, initials and the usual abbreviations."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if len(lines) != 1:
        return lines
    out, start, line = [], 0, lines[0]
    for end in _END.finditer(line):
        last = end.end(end.lastindex)
        if not _ABBREVIATION.search(line[start:last]):
            out.append(line[start:last])
            start = end.end()
    return [*out, line[start:]]


def rouge_scores(
    predictions: Sequence[str], references: Sequence[str], *, words: str = "ascii"
) -> dict[str, list[float | None]]:
    """F1 in percent of each pair, for every name in ROUGE, as rouge-score computes it from newline-split sentences
    with ``use_stemmer=True``. A prediction without a word scores 0; a reference that is not empty and in which no word
    is found gives None. ``words``: one of ROUGE_WORDS; "unicode" stems nothing.

    Raises ValueError where the numbers of texts differ, where there is none, and where the package is missing."""
    tokenizers = package("rouge_score.tokenizers", "ROUGE", "rouge-score")
    if words not in ROUGE_WORDS:
        raise ValueError(f"words={words!r}: expected one of {', '.join(ROUGE_WORDS)}")

    class Unicode:
        tokenize = staticmethod(unicode_words)

    # Without a tokenizer the scorer makes this same one, and a log line that gives the root logger a handler.
    tokenizer = Unicode() if words == "unicode" else tokenizers.DefaultTokenizer(use_stemmer=True)
    return _f1(predictions, references, {name: name for name in ROUGE}, tokenizer, lambda t: "\n".join(sentences(t)))


def files2rouge_scores(predictions: Sequence[str], references: Sequence[str]) -> dict[str, list[float | None]]:
    """F1 in percent of each pair in the convention of BART's published numbers: files2rouge_1, _2 and _L.

    fairseq's README tokenises both sides with Stanford's PTBTokenizer and calls files2rouge. That starts a line behind
    each " ." and runs ROUGE-1.5.5 with -c 95 -r 1000 -n 2 -a -m; its ROUGE-L is that of lines, our `rougeLsum`. Unlike
    in `rouge_scores`, brackets are words (-LRB-), contractions come apart (do n't), sentences end at full stops only,
    and the stemmer is Porter's own, not NLTK's. Unlike in the Perl script, NLTK's Treebank rules stand for Stanford's,
    irregular forms are not looked up in WordNet's exceptions (went: go), and an empty prediction scores 0, where
    files2rouge stops. None and errors as in `rouge_scores`."""
    porter = package("nltk.stem.porter", "files2rouge's ROUGE").PorterStemmer
    treebank = package("nltk.tokenize.treebank", "files2rouge's ROUGE").TreebankWordTokenizer()
    stemmer = porter(porter.MARTIN_EXTENSIONS)

    class Stemmed:
        def tokenize(self, text: str) -> list[str]:
            found = re.findall(r"[a-z0-9]+", text.lower())
            return [stemmer.stem(word) if len(word) > 3 else word for word in found]

    def lines(text: str) -> str:
        words = (w for sentence in sentences(text) for w in treebank.tokenize(sentence, convert_parentheses=True))
        return " ".join(words).replace(" .", " .\n")

    return _f1(predictions, references, FILES2ROUGE, Stemmed(), lines)


def _f1(predictions, references, names: dict, tokenizer, lines: Callable[[str], str]) -> dict[str, list[float | None]]:
    """F1 in percent of each pair. ``names``: our name of a score -> rouge-score's; ``lines`` makes a text's lines."""
    _check_pairs(predictions, references)
    scorer = package("rouge_score.rouge_scorer", "ROUGE", "rouge-score").RougeScorer(
        [*names.values()], tokenizer=tokenizer
    )
    pairs = [(lines(r), lines(p)) for p, r in zip(predictions, references, strict=True)]
    scores = [None if r.strip() and not tokenizer.tokenize(r) else scorer.score(r, p) for r, p in pairs]
    return {ours: [s and 100 * s[theirs].fmeasure for s in scores] for ours, theirs in names.items()}


def rouge(
    predictions: Sequence[str],
    references: Sequence[str],
    *,
    resamples: int = 1000,
    words: str = "ascii",
    scores: Mapping[str, Sequence[float | None]] | None = None,
) -> dict[str, float | None]:
    """`intervals` of `rouge_scores`, which ``scores`` are where they are known, how many pairs are unmeasured, and the
    share of the references' letters and digits that are in no word; a line in the log where there are any."""
    scores = scores or rouge_scores(predictions, references, words=words)
    letters = [c for text in references for c in text if c.isalnum()]
    passed = 0 if words == "unicode" else sum(not c.isascii() for c in letters)
    unmeasured, unread = scores["rouge1"].count(None), passed / max(len(letters), 1)
    if passed:
        what = f"{100 * unread:.1f} % of the references' letters are in no word, {unmeasured:,} of {len(references):,}"
        log.warning("ROUGE reads a-z and 0-9: %s have no word at all and are left out; --rouge-words unicode", what)
    return intervals(scores, resamples) | {"rouge_unmeasured": unmeasured, "rouge_unread": unread}


def mean_of(values: Iterable[float | None]) -> float | None:
    """Of those that were measured; None where none was."""
    found = [v for v in values if v is not None]
    return math.fsum(found) / len(found) if found else None


def intervals(scores: Mapping[str, Sequence[float | None]], resamples: int = 10_000) -> dict[str, float | None]:
    """The mean of each score and its 95 % bootstrap interval, over what was measured: rouge1, rouge1_low, rouge1_high
    and so on. Both ends are None for a single value."""
    out = {}
    for name, values in scores.items():
        found = [v for v in values if v is not None]
        low, high = bootstrap_interval(found, resamples=resamples) if len(found) > 1 else (None, None)
        out |= {name: mean_of(found), f"{name}_low": low, f"{name}_high": high}
    return out


def lengths(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Words (what white space separates) and sentences a text, as means; ``length_ratio`` is the words of all
    predictions over those of all references. Errors as in `rouge_scores`."""
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


def confidence_metrics(
    log_p: Sequence[float | None], tokens: Sequence[int], quality: Sequence[float | None], *, resamples: int = 500
) -> dict[str, float | None]:
    """What a summary's probability tells of its ``quality``, such as ROUGE: Spearman's rank correlation and the
    `rejection_ratio`, of the sum of log p (spearman_sequence, prr_sequence) and of its mean a token (.._token).

    Each has its 95 % percentile bootstrap interval over texts, _low and _high. Texts without one of the two numbers are
    left out. All is None for fewer than three texts, and where one side is the same in all."""
    known = [(p, p / max(1, n), q) for p, n, q in zip(log_p, tokens, quality, strict=True) if None not in (p, q)]
    sequence, token, good = np.array(known, dtype=np.float64).reshape(-1, 3).T
    picks = np.random.default_rng(0).integers(0, max(1, len(known)), size=(resamples, len(known)))
    measures = {"spearman": rank_correlation, "prr": rejection_ratio}
    out = {}
    for kind, sure in (("sequence", sequence), ("token", token)):
        for name, measure in measures.items():
            value, drawn = None, []
            if len(known) > 2 and np.ptp(sure) > 0 and np.ptp(good) > 0:
                value = measure(sure, good)
                drawn = [v for pick in picks if (v := measure(sure[pick], good[pick])) is not None]
            low, high = np.quantile(drawn, [0.025, 0.975]).tolist() if drawn else (None, None)
            out |= {f"{name}_{kind}": value, f"{name}_{kind}_low": low, f"{name}_{kind}_high": high}
    return out


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Spearman's, ties having their mean rank; None where one side is constant."""
    return float(stats.spearmanr(a, b).statistic) if np.ptp(a) > 0 and np.ptp(b) > 0 else None


def summary_metrics(
    predictions: Sequence[str], references: Sequence[str], *, words: str = "ascii", scores: Mapping | None = None
) -> dict[str, float | None]:
    """All of the above that texts alone tell, for one set of pairs, as means, and distinct_1 and distinct_2 of
    predictions and references. ``scores`` as in `rouge`."""
    out = {"examples": len(predictions)} | rouge(predictions, references, words=words, scores=scores)
    out |= lengths(predictions, references)
    out |= {k: mean_of(v) for k, v in files2rouge_scores(predictions, references).items()}
    for n in (1, 2):
        out[f"distinct_{n}"] = distinct_n(predictions, n)
        out[f"reference_distinct_{n}"] = distinct_n(references, n)
    return out


def bert_score(
    predictions: Sequence[str], references: Sequence[str], model: str, *, device: str = "cpu", batch: int = 64
) -> dict[str, float | str]:
    """BERTScore (Zhang et al., 2020) through bert-score: mean precision, recall and F1, without rescaling, and the
    package's hash: values of different hashes cannot be compared. An empty prediction scores 0.

    ``model`` is as in `bert_model`. Raises ValueError as that does, and for a model that cannot be loaded."""
    _check_pairs(predictions, references)
    name, layer = bert_model(model)
    from bert_score import BERTScorer

    try:
        scorer = BERTScorer(model_type=name, num_layers=layer, device=device, batch_size=batch)
    except (OSError, ValueError, KeyError) as error:  # transformers', for a folder or a name it cannot load
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"--bertscore {model} cannot be loaded: {reason}") from error
    texts = [(p, r) for p, r in zip(predictions, references, strict=True) if p.strip() and r.strip()]
    found = scorer.score(*map(list, zip(*texts, strict=True))) if texts else torch.zeros(3, 1)
    means = [each.double().sum().item() / len(predictions) for each in found]
    names = ("bertscore_precision", "bertscore_recall", "bertscore_f1")
    return dict(zip(names, means, strict=True)) | {"bertscore_hash": scorer.hash}


def bert_model(model: str) -> tuple[str, int]:
    """Name or folder, and layer, of a ``--bertscore`` value.

    That is a name which the package knows, or a local folder, either with ``:LAYER`` to choose the layer. Raises
    ValueError, one line, where neither says the layer, for a folder that is not there, and where the package is
    missing."""
    model2layers = package("bert_score.utils", "--bertscore", "bert-score").model2layers
    name, _, layer = model.rpartition(":") if re.search(r":\d+$", model) else (model, "", "")
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise ValueError(f"--bertscore {model}: there is no folder {name}; expected one in Hugging Face's layout")
    name = str(Path(name).expanduser()) if name.startswith("~") else name
    if not layer and name not in model2layers:
        like = model2layers.get(Path(name).name)  # what it is called says nothing of what it is
        known = f", {model}:{like} if it is the {Path(name).name} that bert-score knows" if like else ""
        raise ValueError(f"--bertscore {model}: bert-score has no layer for it; add one, for example {model}:9{known}")
    return name, int(layer) if layer else model2layers[name]


def _check_pairs(predictions: Sequence[str], references: Sequence[str]) -> None:
    if isinstance(predictions, str) or isinstance(references, str):
        raise ValueError("predictions and references must be lists of strings, one a text, got one string")
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references; expected one each")
    if not predictions:
        raise ValueError("no predictions to measure; expected at least one")


def by_index(rows: Iterable[dict], key: str | int) -> dict[int, dict]:
    """Rows of predictions by index, those made under ``key``."""
    return {row["index"]: row for row in rows if row["key"] == key}


def write_predictions(
    model: Seq2Seq,
    pairs: TokenPairs,
    options: Decoding,
    path: Path,
    world: World,
    *,
    key: str | int = 0,
    batch: int = 16,
    multiple: int = 1,
) -> tuple[list[dict], float | None]:
    """Summaries of all of ``pairs``, as rows in their order, and the new tokens a second of this process, None where
    none were new. Every rank must call it.

    Each batch is appended to this rank's part file beside ``path`` when it is done. What the parts of an earlier,
    killed call hold under the same ``key`` (say, the step of the weights) is not made again. When all is there ``path``
    gets it in one piece and the parts go. Sources are padded to a ``multiple``. A row has index, id, key, prediction,
    reference, tokens (EOS included), ended (by EOS, not by the limit), score, and log_p: the sum of its tokens' log p,
    nats, None without tokens."""
    everything = range(len(pairs))
    if len(done := by_index(whole_rows(path), key)) == len(pairs):
        return [done[i] for i in everything], None
    parts = Parts(path.parent, f"{path.stem}.part*.jsonl", world)
    done = by_index(parts.read(), key)
    todo = np.array([i for rows in in_order(pairs, len(pairs)) for i in rows if i not in done])
    batches = [todo[i : i + batch] for i in range(0, len(todo), batch)][world.rank :: world.size]
    tokens, seconds = 0, 0.0
    with parts.append() as file:
        for rows in tqdm(batches, desc=path.stem, disable=not world.main, leave=False):
            source, mask, _ = collate(pairs, rows, multiple=multiple)
            made = generate(model, source, options, mask)
            tokens, seconds = tokens + made.new_tokens, seconds + made.seconds
            for row, i in enumerate(rows.tolist()):
                pair, n = pairs.pairs[i], int(made.lengths[row, 0])
                text = pairs.tokenizer.decode(made.tokens[row, 0, :n].tolist())
                fields = {"index": i, "id": pair.id, "key": key, "prediction": text, "reference": pair.summary}
                fields |= {"tokens": n, "ended": bool(made.ended[row, 0]), "score": float(made.scores[row, 0])}
                log_p = fields["score"] * n**options.length_penalty if n else None
                file.write(json_line(fields | {"log_p": log_p}))
    done = by_index(parts.read(), key)
    if world.main:
        write_rows(path, (done[i] for i in everything))
    parts.remove()
    return [done[i] for i in everything], tokens / seconds if seconds else None
