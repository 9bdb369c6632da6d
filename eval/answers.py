"""What a model makes of problems it was not trained on: the loss of their answers, and answers of its own.

The answers are made in one stream, kept as they end, and graded by every rule. Each greedy one has a confidence, see
`eval.answer_calibration`.
"""

import hashlib
import math
import re
import shlex
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from data.gsm8k import Problem
from data.numbers import last_number, same_number
from data.packing import Example, Rows, fit, pack, targets_of
from data.prompts import Prompter, calculate
from eval import answer_calibration
from eval.extraction import RULES, TEXT_RULES
from eval.gsm8k import Sample, grade_code, grade_text, percents, scores
from eval.heldout import final_metrics
from eval.rows import Parts, json_line, write_rows
from kernels import linear_moments
from model.decode import Request, decode
from model.decoder import Decoder
from model.varlen import Bounds, bounds_of
from runtime.machine import World, to_device


def placed(part: Rows, device: torch.device, multiple: int = 1) -> tuple[Tensor, Tensor, Tensor, int]:
    """What a Decoder reads of packed rows, on ``device``: tokens [R, T], documents [R, T], and the documents' bounds,
    `model.varlen.Bounds`, of a length that is a ``multiple``; above 1 the row's length stands for the longest's."""
    bounds = bounds_of(part.documents_RT)  # on the host, which need not wait for the device
    if multiple > 1:
        bounds = bounds.padded(multiple, part.tokens_RT.shape[1])
    held = (to_device(x, device) for x in (part.tokens_RT, part.documents_RT, bounds.cu_seqlens))
    return *held, bounds.max_seqlen


def hidden_of(model, tokens_RT, documents_RT, cu_seqlens, max_seqlen: int, at_N: Tensor) -> Tensor:
    """Hidden states [N, D] at the places ``at_N`` of the flattened rows, which are ``placed``."""
    hidden = model(tokens_RT, documents_BT=documents_RT, bounds=Bounds(cu_seqlens, max_seqlen))
    return hidden.flatten(0, 1).index_select(0, at_N)


def hidden_at(model, part: Rows, at_N: Tensor, device: torch.device) -> Tensor:
    """The same of rows on the CPU."""
    return hidden_of(model, *placed(part, device), at_N)


def forwards(model: Decoder, heldout: Rows, loss_on: str, rows: int, world: World):
    """(hidden [N, D], targets [N]) of this rank's held-out rows, ``rows`` at a time: of the answers or of all."""
    for begin in range(world.rank * rows, len(heldout), world.size * rows):
        part = heldout[begin : begin + rows]
        at, targets = (to_device(x, world.device) for x in part.seen(loss_on)[:2])
        yield hidden_at(model, part, at, world.device), targets


def solutions(
    model: Decoder,
    sets: dict[str, Rows | None],
    loss_on: str,
    rows: int,
    world: World,
    *,
    pieces,
    train: list[Example],
    impl: str = "auto",
) -> tuple[dict, dict]:
    """`eval.heldout.final_metrics` of the reference solutions in each of ``sets``, name -> packed rows, which are read
    ``rows`` at a time, None where there are none; ``pieces`` keeps what is done. The training text is what the loss of
    ``train`` was of. Every rank must call it."""
    there = {name: part for name, part in sets.items() if part is not None}
    made = dict.fromkeys(sets) | {n: partial(forwards, model, part, loss_on, rows, world) for n, part in there.items()}
    counts = {name: -(-len(part) // (rows * world.size)) for name, part in there.items()}
    how = dict(pieces=pieces, counts=counts, text=targets_of(train, loss_on), impl=impl)
    return final_metrics(model, made, world, **how)


def ks(text: str) -> list[int]:
    """The k of pass@k that ``text`` names. Raises ValueError, one line, for anything else."""
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise ValueError(f"--k {text!r}: expected whole numbers above 0, separated by commas")
    return [int(k) for k in text.split(",")]


def check_samples(samples: int, text: str, temperature: float) -> None:
    """Raises ValueError, one line, for --samples that cannot give the pass@k of --k ``text``."""
    if samples and (most := max(ks(text))) > samples:
        raise ValueError(f"--k {text}: pass@{most} needs as many --samples, which are {samples}")
    if samples and not temperature:
        raise ValueError(f"--samples {samples} at --temperature 0 would all be the greedy answer")


class SegmentFisher:
    """The mean Fisher of a prompt's and of an answer's token in one step."""

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(2, 2, dtype=torch.float64, device=device)  # of prompt and answer: sum and number

    def add(self, fisher_N: Tensor | None, answer_N: Tensor) -> None:
        """Fisher of some tokens, None where it was not measured, and whether they are of the answer (bool)."""
        if fisher_N is not None:
            segments = torch.stack([~answer_N, answer_N]).double()  # [2, N]
            self.sums += torch.stack([segments @ fisher_N.double(), segments.sum(1)], dim=1)

    def entries(self, world: World) -> dict[str, float | None]:
        """Entries of a log line, over all ranks. Every rank must call it."""
        totals = dict(zip(("prompt", "answer"), world.all_reduce(self.sums).tolist(), strict=True))
        return {f"fisher_{of}": total / number if number else None for of, (total, number) in totals.items()}


PART_FILES = "answers.*.part"  # files of the answers that are there, one a rank
CHARACTER_BYTES = 4  # of UTF-8, at most


class Answers(NamedTuple):
    # {"id", "sample", "output", "ended", "tokens", the EOS included}, by sample, in the problems' order; 0 is greedy
    rows: list[dict]
    new_tokens: int  # generated by this call, on all ranks
    reused: int  # rows that an earlier call had made


def write_answers(
    model: Decoder,
    problems: list[Problem],
    prompter: Prompter,
    folder: Path,
    world: World,
    *,
    max_new_tokens: int,
    batch: int,
    samples: int = 0,
    temperature: float = 0.8,
    seed: int = 0,
    stop: Sequence[str] = (),
    calculator: bool = False,
    halt: Callable[[], bool] = lambda: False,
) -> Answers | None:
    """A greedy answer and ``samples`` random ones to each problem.

    Each rank appends an answer to its part file in ``folder`` as it ends, so that a kill loses only the ``batch`` that
    are being written; a later call makes what is missing. Every sample has random numbers of its own, so it does not
    depend on what else is made. ``stop``: strings that end an answer, and are cut off. ``calculator``: work out open
    <<annotations>>. ``halt`` is asked before each token: where it holds, this rank makes no more, and all get None."""
    parts, wanted = Parts(folder, PART_FILES, world), [(p.id, s) for s in range(samples + 1) for p in problems]
    done = _by_sample(parts.read())
    todo = [w for w in wanted if w not in done][world.rank :: world.size]
    prompts = {p.id: prompter.prompt(p) for p in problems}
    requests = []
    for name, s in todo:
        key = hashlib.sha256(f"{seed}\0{name}\0{s}".encode()).digest()
        requests.append(Request(prompts[name], max_new_tokens, temperature if s else 0.0, int.from_bytes(key[:7])))
    reach = max((len(s.encode()) for s in stop), default=0) + CHARACTER_BYTES  # in tokens, each a byte or more
    equals = {i for token, i in prompter.tokenizer.get_vocab().items() if token.endswith("=")}

    def stopped(new: list[int]) -> bool:
        tail = prompter.decode(new[-reach:])
        return any(s in tail for s in stop)

    def insert(new: list[int]) -> list[int]:
        result = calculate(prompter.decode(new)) if new[-1] in equals else ""
        return prompter.encode(result) if result else []

    hooks = dict(stop=stopped if stop else None, insert=insert if calculator else None)
    bar = tqdm(total=len(todo), desc="generating", unit="answer", dynamic_ncols=True, disable=not world.main)
    tokens, halted = 0, False
    with parts.append() as file, bar:
        for ended in decode(model, requests, batch, eos_ids=prompter.eos_ids, **hooks):
            if halted := halt():
                break
            for one in ended:
                name, s = todo[one.index]
                text = prompter.decode(one.tokens)
                cut = min((text.find(s) for s in stop if s in text), default=len(text))
                row = {"id": name, "sample": s, "output": text[:cut].strip(), "ended": one.reason}
                file.write(json_line(row | {"tokens": one.tokens + [one.end] * (one.reason == "eos")}))
                tokens += len(one.tokens)
                bar.update()
    total = int(world.all_reduce(torch.tensor(tokens, device=world.device)))
    if world.any(halted):
        return None
    made = _by_sample(parts.read())
    return Answers([made[w] for w in wanted], total, sum(w in done for w in wanted))


def examine(
    model: Decoder, problems, prompter, folder: Path, world: World, *, format: str, k: Sequence[int], **how
) -> dict:
    """Summary entries of the model's answers; empty on other ranks than 0.

    ``how`` are the arguments of `write_answers`; ``format`` says how to grade. Rank 0 writes ``folder``/outputs.jsonl,
    outputs_sampled.jsonl and verdicts.jsonl."""
    began = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    made = write_answers(model, problems, prompter, folder, world, **how)
    seconds = time.perf_counter() - began
    first = [row for row in made.rows if not row["sample"]]
    confidence = sure(model, first, problems, prompter, world, how["batch"])
    if not world.main:
        return {}
    entries, verdicts = grade(made.rows, problems, format, k)
    rule, greedy_verdicts = main_rule(format), [v for v in verdicts if not v["sample"]]
    agreeing = agreement(verdicts, rule)
    for verdict, likely in zip(greedy_verdicts, confidence, strict=True):
        verdict["confidence"] = likely | agreeing.get(verdict["id"], {})
    entries |= answer_calibration.entries(greedy_verdicts, rule)
    for row in made.rows:
        del row["tokens"]
    greedy, sampled = ([a for a in made.rows if bool(a["sample"]) == drawn] for drawn in (False, True))
    files = {"outputs": greedy} | ({"outputs_sampled": sampled} if sampled else {}) | {"verdicts": verdicts}
    for name, rows in files.items():
        write_rows(folder / f"{name}.jsonl", rows)
    forget(folder)
    return entries | {
        "eval_problems": len(problems),
        "eval_seconds": time.perf_counter() - began,
        "generate_seconds": seconds,
        "generated_tokens_per_second": made.new_tokens / seconds,
        "outputs_reused": made.reused,
        "outputs_at_limit": sum(a["ended"] == "length" for a in made.rows) / len(made.rows),
    }


def describe(name: str, summary: dict) -> str:
    """The last line of a run, from its summary."""
    s, of = summary, "test" if summary["test_nll"] is not None else "val"
    ways = []
    for way in ("strict", "flexible", "code"):
        rate, ends = s[f"pass_at_1_{way}"], s.get(f"pass_at_1_{way}_ci95") or [None]
        ways += [f"{way} {100 * rate:.2f} %{'' if None in ends else percents(*ends)}"] if rate is not None else []
    test = ""
    if s["temperature"]:
        nll, ece, brier, nll_t, ece_t = (s[f"{of}_{key}"] for key in ("nll", "ece10", "brier", "nll_t", "ece10_t"))
        test = f"; {of} nll {nll:.4f}, ece {ece:.4f}, brier {brier:.4f}"
        test += f"; at temperature {s['temperature']:.3f} nll {nll_t:.4f}, ece {ece_t:.4f}"
    speed = f"{s['tokens_per_second'] or 0:,.0f} tokens/s in training, {s['generated_tokens_per_second']:,.0f}"
    return f"{name}: pass@1 {', '.join(ways)} on {s['eval_problems']} problems{test}; {speed} in generation"


@torch.no_grad()
def sure(
    model: Decoder, rows: list[dict], problems: list[Problem], prompter: Prompter, world: World, batch: int
) -> list:
    """The confidence "sequence" and "token" of each answer, see `eval.answer_calibration`, at temperature 1.

    The tokens are those of the answer, what a calculator has put in and the EOS that the model chose included. They
    are scored in forwards of ``batch`` packed rows. Every rank must call it, and has all of it."""
    prompts = {p.id: prompter.prompt(p) for p in problems}
    made = [Example(r["id"], prompts[r["id"]] + r["tokens"], len(prompts[r["id"]])) for r in rows]
    limit = max(e.length for e in made)
    packed = pack(made, limit, pad_id=prompter.end)
    owner_RT = torch.zeros_like(packed.documents_RT)
    for row, group in enumerate(fit([e.length for e in made], limit)):
        for number, i in enumerate(group):
            owner_RT[row, packed.documents_RT[row] == number] = i
    log_p = torch.zeros(len(made), dtype=torch.float64)
    for begin in range(world.rank * batch, len(packed), world.size * batch):
        part = packed[begin : begin + batch]
        at, targets = part.seen("answer")[:2]
        hidden = hidden_at(model, part, to_device(at, world.device), world.device)
        moments = linear_moments(hidden, weight=model.head_weight, targets=to_device(targets, world.device))
        log_p.index_add_(0, owner_RT[begin : begin + batch].flatten()[at], moments.log_p.double().cpu())
    total = world.all_reduce(log_p.to(world.device)).tolist()
    return [answer_calibration.confidence_of(p, e.targets("answer")) for p, e in zip(total, made, strict=True)]


def main_rule(format: str) -> str:
    """The rule of the figures that have one alone."""
    return "code" if format == "code" else "strict"


def agreement(verdicts: list[dict], rule: str) -> dict[str, dict[str, float]]:
    """id -> the confidence "agreement" of its greedy answer: the share of the sampled ones that have its value. No
    answer agrees with nothing. {} where nothing was sampled."""
    read, drawn = last_number if rule == "code" else TEXT_RULES[rule][1], defaultdict(list)
    for v in verdicts:
        if v["sample"]:
            drawn[v["id"]].append(read(v["answers"][rule] or ""))
    shares = {}
    for v in verdicts:
        value, others = read(v["answers"][rule] or ""), drawn[v["id"]]
        if not v["sample"] and others:
            same = sum(None not in (value, other) and same_number(other, value) for other in others)
            shares[v["id"]] = {"agreement": same / len(others)}
    return shares


def pass_rate(
    model: Decoder, problems: list[Problem], prompter: Prompter, folder: Path, world: World, *, format: str, **how
) -> dict[str, float]:
    """pass@1 of greedy answers by the main rule, under its key, on every rank; {} where it was halted. ``how`` as
    `write_answers` takes it."""
    folder.mkdir(parents=True, exist_ok=True)
    world.wait()
    if world.main:
        forget(folder)  # of a kill, and of other weights
    world.wait()
    training, key = model.training, f"pass_at_1_{main_rule(format)}"
    made = write_answers(model.eval(), problems, prompter, folder, world, **how)
    model.train(training)
    if made is None:
        return {}
    value = grade(made.rows, problems, format, (1,))[0][key] if world.main else 0.0
    if world.main:
        forget(folder)
    return {key: float(world.all_reduce(torch.tensor(value, dtype=torch.float64, device=world.device)))}


def _by_sample(rows: list[dict]) -> dict[tuple[str, int], dict]:
    """Without those of runs from before that have no tokens: they are made again."""
    return {(row["id"], row["sample"]): row for row in rows if "tokens" in row}


def comparison(folder: Path, data: str, format: str, problems: int) -> str:
    """The command that grades a run's answers beside another's, on the problems that it has answered: the first
    ``problems`` of the test split, 0 is all."""
    flags = ["--data", data] * (data != "gsm8k") + ["--format", format] * (format != "text")
    flags += ["--problems", str(problems)] * bool(problems)
    return shlex.join(["python", "-m", "eval.gsm8k", str(folder / "outputs.jsonl"), "OTHER/outputs.jsonl", *flags])


def forget(folder: Path) -> None:
    """Removes the part files: their answers are final, or the weights have changed since."""
    for part in folder.glob(PART_FILES):
        part.unlink()


def grade(rows: list[dict], problems: list[Problem], format: str, k: Sequence[int]) -> tuple[dict, list[dict]]:
    """(summary entries, verdicts): pass@1 of the greedy answers by every rule, pass@k of the sampled ones, each with
    its 95 % interval, see `eval.gsm8k.Score`. An entry that ``format`` does not measure is None."""
    golds, ids = {p.id: p.gold for p in problems}, [p.id for p in problems]
    entries = dict.fromkeys([*(f"pass_at_1_{rule}" for rule in RULES), "invalid_programs"])
    verdicts = []
    for name in ("", "sampled_"):
        part = [row for row in rows if bool(row["sample"]) == bool(name)]
        if not part:
            continue
        given = [Sample(row["id"], row["output"]) for row in part]
        made = grade_code(given, golds) if format == "code" else grade_text(given, golds)
        for s in scores(made, ids, k if name else (1,)):
            ends = [None if math.isnan(end) else end for end in (s.low, s.high)]
            entries |= {f"{name}pass_at_{s.k}_{s.rule}": s.value, f"{name}pass_at_{s.k}_{s.rule}_ci95": ends}
        if format == "code":
            entries[f"{name}invalid_programs"] = sum(v.status != "ok" for v in made)
        verdicts += [v._asdict() | {"sample": row["sample"]} for v, row in zip(made, part, strict=True)]
    return entries, verdicts
