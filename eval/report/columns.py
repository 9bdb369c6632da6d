"""The columns of the report's tables: which numbers of summary.json, under what name, unit and digits."""

from typing import NamedTuple


class Cell(NamedTuple):
    text: str
    sub: str = ""  # smaller, after or under the text
    bold: bool = False
    tone: str = ""  # "good", "bad" or "unsure"
    colour: str = ""  # of the arm, as in the figures


class Column(NamedTuple):
    key: str  # in summary.json, without val_, test_ or ood_
    name: str
    unit: str
    better: str  # "lower", "higher" or ""
    scale: float = 1.0
    digits: int = 4

    @property
    def head(self) -> Cell:
        arrow = {"lower": "↓", "higher": "↑", "": ""}[self.better]
        return Cell(self.name, f"{self.unit}\u00a0{arrow}".strip())

    def format(self, v: float) -> str:
        return f"{v:,.{self.digits}f}" if abs(v) < 1e7 else f"{v:.3e}"


QUALITY = (
    Column("ppl", "PPL", "per token", "lower", digits=2),
    Column("nll", "NLL", "nats per token", "lower"),
    Column("bits_per_byte", "bits/byte", "bits", "lower"),
    Column("ece10", "ECE", "10 bins, %", "lower", 100, 2),
    Column("ece100", "ECE", "100 bins, %", "lower", 100, 2),
    Column("ece10_mass", "ECE", "10 equal-mass bins, %", "lower", 100, 2),
    Column("brier", "Brier", "0 to 2", "lower"),
    Column("spherical", "Spherical", "loss, 0 to 1", "lower"),
    Column("accuracy", "Accuracy", "%", "higher", 100, 2),
    Column("temperature", "T", "fitted", "", 1, 3),
    Column("nll_t", "NLL after T", "nats per token", "lower"),
    Column("ece10_t", "ECE after T", "10 bins, %", "lower", 100, 2),
)
DELTAS = ("ppl", "nll", "ece10", "brier", "accuracy", "nll_t", "ece10_t")
COST = (
    Column("ms_per_step_median", "step", "ms, median", "lower", 1, 1),
    Column("tokens_per_second", "throughput", "tokens/s", "higher", 1, 0),
    Column("peak_memory_bytes", "peak memory", "MB = 1e6 bytes", "lower", 1e-6, 0),
    Column("train_seconds", "training", "s", "lower", 1, 1),
    Column("flops_per_token", "FLOPs a token", "1e9", "lower", 1e-9, 3),
    Column("mfu", "MFU", "%", "higher", 100, 1),
    Column("energy_joules", "energy", "kJ", "lower", 1e-3, 2),
)
# Of generated summaries, see eval.summaries. They are searched for without the temperature.
SUMMARIES = (
    Column("rouge1", "ROUGE-1", "F1, %", "higher", digits=2),
    Column("rouge2", "ROUGE-2", "F1, %", "higher", digits=2),
    Column("rougeL", "ROUGE-L", "F1, %", "higher", digits=2),
    Column("rougeLsum", "ROUGE-Lsum", "F1, %", "higher", digits=2),
    Column("files2rouge_1", "R1", "as files2rouge", "higher", digits=2),
    Column("files2rouge_2", "R2", "as files2rouge", "higher", digits=2),
    Column("files2rouge_L", "RL", "as files2rouge", "higher", digits=2),
    Column("bertscore_f1", "BERTScore", "F1, %", "higher", 100, 2),
    Column("distinct_1", "Distinct-1", "words / all", "", digits=3),
    Column("distinct_2", "Distinct-2", "pairs / all", "", digits=3),
    Column("ended", "ended", "% of searches", "higher", 100, 1),
    Column("words", "words", "a summary", "", digits=1),
    Column("length_ratio", "length", "words / reference's", "", digits=3),
    Column("sentences", "sentences", "a summary", "", digits=2),
    Column("empty", "empty", "summaries", "lower", digits=0),
    Column("generate_tokens_per_second", "decoding", "tokens/s", "higher", digits=0),
)
