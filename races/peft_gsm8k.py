"""LoRA fine-tuning and generation beside transformers + peft: same random weights, tokens and sizes, in one run.

    python -m races.peft_gsm8k --base nf4 --out runs/race-nf4                       # Qwen3-0.6B's shape, on a GPU
    python -m races.peft_gsm8k --base bf16 --batch 64 --seq-len 512 --out runs/race-bf16
    python -m races.peft_gsm8k --model runs/smollm2 --base fp32 --batch 2 --seq-len 256 --prompts 16 --new-tokens 32 \\
        --eval-batches 16 --rank 16 --device cpu --out runs/race-smollm2            # real weights, on a CPU
    python -m races.peft_gsm8k --shape mini --base fp32 --batch 4 --seq-len 128 --prompts 16 --new-tokens 32 \\
        --eval-batches 8,16 --device cpu --out runs/race-cpu

Turns are processes of their own and alternate: theirs, ours, theirs, and so on. A training turn takes the largest
micro-batch that fits, from --batch down by halves. Its time is the median step after two that are not counted, its
memory the peak of the process; where the sides' micro-batches differ, both run once more at the smaller, as memories
are compared at an equal batch alone, here and in evaluation: where batches differ, that is said in place of a ratio. An
evaluation turn generates from plain dense weights, as merged adapters are; ours are packed on a CPU, as a run's are. It
tries each of --eval-batches on two batches and takes the best. Every prompt gets all --new-tokens, so continuous
batching gains nothing from early ends; with --early-ends a prompt gets between a quarter of them and all, and a batch
of theirs goes on until its longest text has ended, as it does until the last EOS. Theirs is what their users run:
bfloat16 autocast over fp32 adapters, scaled_dot_product_attention, left padding. Both sides compute in --dtype: by
default bfloat16 on CUDA and where the base is bf16, else float32.
"""

import sys

if not __package__:  # a file by its name finds no package
    print("python -m races.peft_gsm8k: error: type it like this, in the folder that holds races/", file=sys.stderr)
    sys.exit(2)

import contextlib
import json
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from kernels import linear_score
from kernels.bench.timing import time_once
from kernels.losses import ce
from model.decode import Request, decode
from model.decoder import Decoder, DecoderConfig
from model.decoder_hub import config_and_tokenizer, load_decoder, save_decoder
from model.lora import BASES, LoRAConfig, add_lora, load_base
from model.packed import pack
from races import common
from runtime.cli import user_errors
from runtime.machine import World, peak_memory, start_world
from schedules.commandline import alive

SHAPES = {
    "0.6b": DecoderConfig(151936, 1024, 3072, 28, 16, 8, 128, 40960, rope_theta=1e6, tie_word_embeddings=True),
    "mini": DecoderConfig(8192, 512, 1536, 6, 8, 4, 64, 4096, rope_theta=1e6, tie_word_embeddings=True),
    "tiny": DecoderConfig(300, 64, 128, 2, 4, 2, 16, 512, tie_word_embeddings=True),
}
SIDES = ("theirs", "ours")


def our_loss(folder: Path, base: str, rank: int, dtype: torch.dtype, device: torch.device):
    model = load_base(folder, base, dtype, device)
    add_lora(model, LoRAConfig(rank))

    def loss(tokens_BT):
        hidden = model(tokens_BT[:, :-1]).flatten(0, 1)
        return linear_score(hidden, model.head_weight, tokens_BT[:, 1:].flatten(), ce)[0]

    return model, loss


def their_model(folder: Path, dtype: torch.dtype, device: torch.device, **more):
    from transformers import AutoModelForCausalLM

    how = dict(dtype=dtype, attn_implementation="sdpa", device_map={"": device})
    return AutoModelForCausalLM.from_pretrained(folder, **how, **more)


def their_loss(folder: Path, base: str, rank: int, dtype: torch.dtype, device: torch.device):
    import peft
    import transformers

    quantised = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    plain = {"fp32": torch.float32, "bf16": torch.bfloat16, "nf4": dtype}[base]  # what activations are kept in, too
    model = their_model(folder, plain, device, quantization_config=quantised if base == "nf4" else None)
    config = peft.LoraConfig(r=rank, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config)
    model.config.use_cache = False

    def loss(tokens_BT):
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            # The labels are shifted inside, and the last logits computed for nothing: so few that it does not count.
            return model(input_ids=tokens_BT, labels=tokens_BT).loss

    return model, loss


def vocab_of(folder: Path) -> int:
    return config_and_tokenizer(folder)[0].vocab_size


def dtype_of(args, world: World) -> torch.dtype:
    """Of the activations, on both sides."""
    return world.dtype("bfloat16" if (args.base, args.dtype) == ("bf16", "auto") else args.dtype)


def turn_row(batch: int, tokens: int, seconds: float, device: torch.device) -> dict:
    rate, peak = tokens / seconds, peak_memory(device)
    return {"batch": batch, "tokens_per_second": rate, "seconds": seconds, "peak_memory_bytes": peak}


def train_turn(args, side: str, world: World) -> dict:
    torch.manual_seed(0)
    device, make = world.device, our_loss if side == "ours" else their_loss
    model, loss_of = make(args.model, args.base, args.rank, dtype_of(args, world), device)
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(vocab_of(args.model), (args.batch, args.seq_len + 1), generator=generator).to(device)

    def step(micro: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        for part in tokens.split(micro):
            (loss_of(part) * len(part) / args.batch).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    complaint = f"{side}: not one sequence of {args.seq_len} tokens fits the memory"
    micro = common.largest_that_fits(step, min(args.micro_batch or args.batch, args.batch), complaint)
    common.forget_peak(device)
    seconds = [time_once(lambda: step(micro), device.type) for _ in range(args.steps + 1)]
    return turn_row(micro, args.batch * args.seq_len, statistics.median(seconds[1:]), device)


def requests_of(args) -> list[Request]:
    """Prompts of random tokens, seeded, and how long each is continued. GSM8K's questions have 60 to 220 tokens with
    Qwen3's tokenizer and chat turns."""
    generator = torch.Generator().manual_seed(2)

    def lengths(most: int) -> list[int]:
        return torch.randint(max(1, most // 4), most + 1, (args.prompts,), generator=generator).tolist()

    vocab = vocab_of(args.model)
    prompts = [torch.randint(1, vocab, (n,), generator=generator).tolist() for n in lengths(args.prompt_tokens)]
    new = lengths(args.new_tokens) if args.early_ends else [args.new_tokens] * args.prompts
    return [Request(*one) for one in zip(prompts, new, strict=True)]


def our_generate(folder: Path, dtype: torch.dtype, device: torch.device):
    model = pack(load_decoder(folder, dtype, dtype, device).eval())

    def generate(requests: list[Request], batch: int) -> int:
        return sum(len(one.tokens) for ended in decode(model, requests, batch) for one in ended)

    return generate


def their_generate(folder: Path, dtype: torch.dtype, device: torch.device):
    model = their_model(folder, dtype, device).eval()
    greedy = dict(do_sample=False, pad_token_id=0, eos_token_id=None)

    def generate(requests: list[Request], batch: int) -> int:
        made = 0
        ordered = sorted(requests, key=lambda r: len(r.prompt))  # of like lengths: as little padding as can be had
        for i in range(0, len(ordered), batch):
            part = ordered[i : i + batch]
            prompts, new = [torch.tensor(r.prompt) for r in part], [r.max_new_tokens for r in part]
            tokens = pad_sequence(prompts, batch_first=True, padding_side="left").to(device)  # none of a prompt is 0
            how = dict(attention_mask=tokens.ne(0).long(), max_new_tokens=max(new), min_new_tokens=max(new))
            length = model.generate(input_ids=tokens, **how, **greedy).shape[1] - tokens.shape[1]
            made += sum(min(n, length) for n in new)
        return made

    return generate


def evaluate_turn(args, side: str, world: World) -> dict:
    device, make = world.device, our_generate if side == "ours" else their_generate
    generate = make(args.model, dtype_of(args, world), device)
    requests = requests_of(args)

    def timed(some: list[Request], batch: int) -> tuple[int, float]:
        """(tokens, seconds)"""
        wanted, made = sum(r.max_new_tokens for r in some), []
        seconds = time_once(lambda: made.append(generate(some, batch)), device.type)
        if made != [wanted]:
            raise ValueError(f"{side} made {made[0]} tokens, expected {wanted}")
        return wanted, seconds

    rates = {}
    given = args.their_batches if side == "theirs" and args.their_batches else args.eval_batches
    batches = [int(b) for b in given.split(",")]
    generate([Request(r.prompt, 2) for r in requests[: batches[0]]], batches[0])  # libraries set themselves up
    for batch in batches if len(batches) > 1 else ():
        with contextlib.suppress(torch.OutOfMemoryError):  # a batch that is too large for this side has no rate
            tokens, seconds = timed(requests[: 2 * batch], batch)
            rates[batch] = tokens / seconds
        common.forget_peak(device)
    if len(batches) > 1 and not rates:
        raise ValueError(f"{side}: none of --eval-batches {args.eval_batches} fits the memory")
    best = max(rates, key=rates.get, default=batches[0])
    common.forget_peak(device)
    return turn_row(best, *timed(requests, best), device)


TURNS = {"train": train_turn, "evaluate": evaluate_turn}
EQUAL = "train, equal micro-batch"


def run_turn(turn: str, argv: list[str], model: Path) -> dict:
    line = common.command("-m", "races.peft_gsm8k", *argv, model=model, turn=turn)
    printed = common.output_of(line, f"the turn {turn} failed", cwd=Path(__file__).parent.parent)
    return json.loads(printed.strip().splitlines()[-1])


def compared(rows: list[dict]) -> Iterator[str]:
    """Ours over theirs in the rows of one part, as medians of the rounds; memory in rounds of an equal batch."""
    batches = {}
    for row in rows:
        batches.setdefault(row["round"], {})[row["side"]] = row.get("batch")
    equal = [row for row in rows if len(set(batches[row["round"]].values())) == 1]
    for key, word, some in (("tokens_per_second", "tokens/s", rows), ("peak_memory_bytes", "peak memory", equal)):
        if (ratio := common.median_ratio(some, key, "ours", "theirs")) is not None:
            yield f"{word}, ours over theirs {ratio:.3f} (median of the rounds)"
    if rows and not equal:
        at = ", ".join(f"{side} {batch or 'failed'}" for side, batch in batches[rows[0]["round"]].items())
        yield f"peak memory is not compared, as no round has an equal batch ({at})"


@alive()
def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = common.race_parser("peft_gsm8k", __doc__)
    parser.add_argument("--shape", default="0.6b", choices=SHAPES, help="(default: %(default)s, Qwen3-0.6B's)")
    parser.add_argument("--base", default="nf4", choices=BASES, help="(default: %(default)s)")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--batch", type=int, default=64, help="sequences in a training step (default: %(default)s)")
    parser.add_argument("--micro-batch", type=int, default=0, help="the first to try (default: the batch)")
    parser.add_argument("--seq-len", type=int, default=512, help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of a training turn (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=1319, help="0 is no evaluation (default: %(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=220, help="longest prompt (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=256, help="(default: %(default)s)")
    parser.add_argument("--eval-batches", default="64,128,256,512", help="(default: %(default)s)")
    parser.add_argument("--their-batches", default="", help="other ones for theirs; 1 is prompt by prompt")
    parser.add_argument("--early-ends", action="store_true", help="texts end after a quarter to all of --new-tokens")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float32"), help="of the activations")
    parser.add_argument("--out", type=Path, default=Path("runs/race-peft"))
    parser.add_argument("--model", type=Path, help="folder of the weights (default: random ones of --shape in --out)")
    common.add_limits(parser, TURNS)
    parser.add_argument("--turn", default="", help="PART:SIDE: that turn alone, in this process; its row as JSON")
    args = parser.parse_args(argv)
    with user_errors():
        common.check_least(args, rank=1, batch=1, seq_len=1, steps=1, new_tokens=1, rounds=1, prompt_tokens=1)
        common.check_least(args, rows=0, seconds=0)
        for name, given in (("eval", args.eval_batches), ("their", args.their_batches or "1")):
            if not all(b.isdigit() and int(b) for b in given.split(",")):
                raise ValueError(f"--{name}-batches {given!r}: expected batch sizes separated by commas")
        parts = common.chosen(args.only, TURNS if args.prompts else ("train",))
        world = start_world(args.device)
        if args.turn:
            part, _, side = args.turn.partition(":")
            if part not in TURNS or side not in SIDES:
                raise ValueError(f"--turn {args.turn!r}: expected train or evaluate, a colon, and theirs or ours")
            print(json.dumps(TURNS[part](args, side, world)))
            return 0
        common.check_new(args.out)
        args.out.mkdir(parents=True)
        if args.model is None:
            torch.manual_seed(0)
            save_decoder(Decoder(SHAPES[args.shape]), args.out / "model", dtype=torch.bfloat16)
        model = (args.model or args.out / "model").resolve()
        same = {
            "shape": args.model.name if args.model else args.shape,
            "base": args.base,
            "dtype": str(dtype_of(args, world)).removeprefix("torch."),
            "rank": args.rank,
            "step_batch": args.batch,
        }
        same |= {k: getattr(args, k) for k in ("seq_len", "prompts", "prompt_tokens", "new_tokens", "early_ends")}
    rows = common.Turns(args.out / "race.csv", same | common.here_and_now(world.device), args.seconds, args.rows)

    def take(round: int, part: str, side: str, *more: str) -> dict | None:
        turn = "train" if part == EQUAL else part
        row = rows.take(
            {"round": round, "part": part, "side": side}, lambda: run_turn(f"{turn}:{side}", [*argv, *more], model)
        )
        if row:
            print(
                f"round {round} {part} {side}: {row['tokens_per_second']:,.0f} tokens/s at batch {row['batch']}, peak "
                f"{row['peak_memory_bytes'] / 1e6:,.0f} MB",
                flush=True,
            )
        return row

    for i in range(args.rounds):
        for part in parts:
            sides = SIDES if i % 2 == 0 else SIDES[::-1]
            found = [take(i + 1, part, side) for side in sides]
            if part == "train" and all(found) and found[0]["batch"] != found[1]["batch"]:
                common_batch = min(row["batch"] for row in found)  # memory is compared where both do the same
                for side in sides:
                    take(i + 1, EQUAL, side, "--micro-batch", str(common_batch))
    for part in dict.fromkeys(row["part"] for row in rows):
        for line in compared([row for row in rows if row["part"] == part]):
            print(f"{part}: {line}")
    print(f"{args.out / 'race.csv'}")
    return rows.ended()


if __name__ == "__main__":
    sys.exit(main())
