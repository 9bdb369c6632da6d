"""Every metric, once: its name, unit, direction and digits, how it is had, and where it is shown.

Evaluation, the rows of metrics.jsonl, summary.json, the progress bar, the report and a campaign read this table, so
that a metric is added by one entry here. A metric of a model's tokens has ``of``, which takes the `Calibration` of an
evaluation and the numbers that it has computed so far.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

PLACES = {
    "train": "rows of kind train in metrics.jsonl",
    "line": "the line that a validation prints",
    "final": "summary.json, of each set, before and after temperature",
    "table": "the report's table of its kind",
    "band": "summary.json's and the report's parts of a set by how often the training text has the target",
    "delta": "the report's differences from CE",
    "terminal": "the lines that the report prints",
    "grid": "the report's heat maps",
}


class Metric(NamedTuple):
    key: str  # in rows and, after val_, test_ or ood_ where it is of a set, in summary.json
    name: str  # heading
    unit: str
    better: str  # "lower", "higher" or ""
    scale: float = 1.0  # shown: the value times this
    digits: int = 4
    shown: str = "table"  # some of PLACES, separated by spaces
    bar: str = ""  # format in the progress bar, such as "ECE {:.3f}"
    of: Callable | None = None  # (calibration, numbers so far) -> float or None

    def format(self, v: float) -> str:
        """A value that was scaled already."""
        return f"{v:,.{self.digits}f}" if abs(v) < 1e7 else f"{v:.3e}"


def bits_per_byte(calibration, numbers: dict) -> float | None:
    """Compares tokenizers. The bytes are those of the text; what the ends of documents cost is included."""
    size = numbers.get("bytes")
    return numbers["nll"] * numbers["eval_tokens"] / math.log(2) / size if size else None


# Of next-token probabilities on a set. nll, ppl, brier, spherical, accuracy, entropy and ECE are in every Calibration.
TOKENS = (
    Metric("ppl", "PPL", "per token", "lower", 1, 2, "train line final table delta terminal grid", "PPL {:.1f}"),
    Metric("nll", "NLL", "nats per token", "lower", shown="train line final table band delta grid"),
    Metric("bits_per_byte", "bits/byte", "bits", "lower", shown="final table", of=bits_per_byte),
    Metric(
        "ece10", "ECE", "10 bins, %", "lower", 100, 2, "train line final table band delta terminal grid", "ECE {:.3f}"
    ),
    Metric("ece100", "ECE", "100 bins, %", "lower", 100, 2, "final table"),
    Metric("ece10_mass", "ECE", "10 equal-mass bins, %", "lower", 100, 2, "final table"),
    Metric("brier", "Brier", "0 to 2", "lower", shown="train line final table delta terminal"),
    Metric("spherical", "Spherical", "loss, 0 to 1", "lower", shown="final table"),
    Metric("accuracy", "Accuracy", "%", "higher", 100, 2, "train final table band delta"),
    Metric("confidence", "confidence", "mean, %", "", 100, 2, "band"),
    Metric("entropy", "Entropy", "nats", "", shown="train final"),
)
# After temperature: the key of TOKENS, then _t.
TEMPERED = (
    Metric("temperature", "T", "fitted", "", 1, 3),
    Metric("nll_t", "NLL after T", "nats per token", "lower", shown="table delta terminal"),
    Metric("ece10_t", "ECE after T", "10 bins, %", "lower", 100, 2, "table delta terminal"),
)
COST = (
    Metric("ms_per_step_median", "step", "ms, median", "lower", 1, 1),
    Metric("tokens_per_second", "throughput", "tokens/s", "higher", 1, 0, "table terminal"),
    Metric("peak_memory_bytes", "peak memory", "MB = 1e6 bytes", "lower", 1e-6, 0),
    Metric("train_seconds", "training", "s", "lower", 1, 1),
    Metric("flops_per_token", "FLOPs a token", "millions", "lower", 1e-6, 1),
    Metric("mfu", "MFU", "%", "higher", 100, 1),
    Metric("energy_joules", "energy", "kJ", "lower", 1e-3, 2),
)
# Of generated summaries, see eval.summaries. They are searched for without the temperature.
SUMMARIES = (
    *(Metric(f"rouge{n}", f"ROUGE-{n}", "F1, %", "higher", 1, 2, "table delta grid") for n in ("1", "2", "L", "Lsum")),
    *(Metric(f"files2rouge_{n}", f"R{n}", "as files2rouge", "higher", digits=2) for n in "12L"),
    Metric("rouge_unmeasured", "no words", "references, as ROUGE reads", "lower", digits=0),
    Metric("bertscore_f1", "BERTScore", "F1, %", "higher", 100, 2),
    Metric("distinct_1", "Distinct-1", "words / all", "", digits=3),
    Metric("distinct_2", "Distinct-2", "pairs / all", "", digits=3),
    Metric("ended", "ended", "% of searches", "higher", 100, 1),
    Metric("words", "words", "a summary", "", digits=1),
    Metric("length_ratio", "length", "words / reference's", "", digits=3),
    Metric("sentences", "sentences", "a summary", "", digits=2),
    Metric("empty", "empty", "summaries", "lower", digits=0),
    Metric("generate_tokens_per_second", "decoding", "tokens/s", "higher", digits=0),
)
# What a summary's probability, of all its tokens and a token, tells of its ROUGE-Lsum.
SUMMARY_CONFIDENCE = tuple(
    Metric(f"{key}_{kind}", name, f"log p {of}", "higher", digits=3)
    for kind, of in (("sequence", "of all"), ("token", "a token"))
    for key, name in (("spearman", "Spearman"), ("prr", "rejection ratio"))
)
# Of answers to GSM8K, see eval.answers.
ANSWERS = (
    Metric("pass_at_1_strict", "pass@1", "strict, %", "higher", 100, 2),
    Metric("pass_at_1_flexible", "pass@1", "flexible, %", "higher", 100, 2),
    Metric("pass_at_1_boxed", "pass@1", "boxed, %", "higher", 100, 2),
    Metric("pass_at_1_code", "pass@1", "programs, %", "higher", 100, 2),
    Metric("invalid_programs", "invalid", "programs", "lower", 1, 0),
    Metric("outputs_at_limit", "cut off", "% of answers", "lower", 100, 1),
    Metric("eval_seconds", "evaluation", "s", "lower", 1, 1),
    Metric("generated_tokens_per_second", "generation", "tokens/s", "higher", 1, 0),
    Metric("divergences", "diverged", "times", "lower", 1, 0),
    Metric("skipped_steps", "skipped", "steps", "lower", 1, 0),
)
# Of the confidence of those answers, see eval.answer_calibration; before_ in front: before training.
ANSWER_CONFIDENCE = {
    kind: tuple(
        Metric(f"answers_{kind}_{key}", name, unit, better, scale, digits)
        for key, name, unit, better, scale, digits in (
            ("accuracy", "right", "%", "higher", 100, 2),
            ("confidence", "confidence", "mean, %", "", 100, 2),
            ("ece10", "ECE", "10 bins, %", "lower", 100, 2),
            ("brier", "Brier", "0 to 1", "lower", 1, 4),
            ("brier_reliability", "reliability", "of Brier", "lower", 1, 4),
            ("brier_resolution", "resolution", "of Brier", "higher", 1, 4),
            ("brier_uncertainty", "uncertainty", "of Brier", "", 1, 4),
            ("brier_within", "within", "bins", "", 1, 4),
            ("auroc", "AUROC", "0.5 is chance", "higher", 1, 4),
            ("aurc", "AURC", "%", "lower", 100, 2),
        )
    )
    for kind in ("sequence", "token", "agreement")
}
# Of the samples of a language model.
SAMPLES = tuple(Metric(f"distinct_{n}", f"Distinct-{n}", f"distinct {n}-grams / all", "", digits=3) for n in (1, 2))


def shown(metrics: tuple[Metric, ...], place: str) -> tuple[Metric, ...]:
    """Those of ``metrics`` that are shown at ``place``, a key of PLACES."""
    if place not in PLACES:
        raise ValueError(f"unknown place {place!r}; expected one of {', '.join(PLACES)}")
    return tuple(m for m in metrics if place in m.shown.split())


def measure(calibration, *, size: int | None = None) -> dict[str, float]:
    """Everything that is known of one evaluation, by key: what `Calibration.compute` gives, and TOKENS' own.

    ``size``: bytes of the text, for bits per byte. Raises ValueError where no token was counted."""
    numbers = calibration.compute()
    numbers["eval_tokens"] = numbers.pop("tokens")
    about = numbers | {"bytes": size}
    for metric in TOKENS:
        if metric.of and (value := metric.of(calibration, about)) is not None:
            numbers[metric.key] = about[metric.key] = value
    return numbers
