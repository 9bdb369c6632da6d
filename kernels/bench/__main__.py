"""Time, memory, bandwidth and error of DPSM's loss beside every peer that is installed.

    python -m kernels.bench                        # on a GPU GPT-2's and Qwen3's heads, bf16; on CPU 2048 x 50257
    python -m kernels.bench --n 3072 --v 512 --d 384 --dtype fp32 --csv bench.csv
    python -m kernels.bench --csv bench.csv --plot bench.png
    python -m kernels.bench --audit-2k --trace traces   # one batch of 2,000 tokens through every score
    python -m kernels.bench --diagnostics --csv figures.csv # entropy, accuracy, calibration, Fisher beside the loss
    python -m kernels.bench --paths --csv paths.csv     # how a row is held, sizes of chunks (GPU)
    python -m kernels.bench --claims --csv all.csv      # all shapes, then every claim's verdict (GPU)
    python -m kernels.bench --claims-of all.csv         # the verdicts again, from rows measured before

The providers take turns in one process, so that what else the machine does falls on all of them. Times are medians:
"forward" without gradient, "step" forward and backward. On a GPU they are the device's, with the work queued before it
begins; "eager" is a step with what the host takes to launch it. Targets are drawn from the softmax; of the rows of
logits one in a hundred has its target tied with the maximum.

of copy      speed of one read and one write of the logits over that of copying them, in the same turns
x products   a linear loss's time over that of its bare matrix products
peak         memory of a step beyond the inputs, in logits tensors; on CPU in a fresh process, from the high-water mark
             of resident memory. "beside MB" is the peak less the gradients
x loss alone time of a step with figures over that of the same provider's loss, forward and backward in both
error        |gradient - exact| / |exact| in the 2-norm, of the leaf where it is larger, on 64 tokens (512 on a GPU);
             exact is float64 autograd of the same loss; linear_score's in 8 chunks. Of d_weight beside it

What is not installed, or fails, is named, and has its row in the CSV, which is written after each row; where what fails
is ours the exit code is 1. --seconds and --rows end a run early, and what they leave out is counted. "In place"
overwrites the logits: later rounds see other values, but do the same work. python -m races.train_step times a whole
training step.
"""

import sys

if "." not in (__package__ or ""):  # a file by its name finds no package
    print("python -m kernels.bench: error: type it like this, in the folder that holds kernels/", file=sys.stderr)
    sys.exit(2)

import argparse
from importlib.util import find_spec

import torch

from .claims import TRAIN_STEP, print_verdicts
from .compare import audit_scores, compare, warm
from .diagnostics import diagnose
from .limits import Limits
from .paths import time_choices
from .rows import Rows, read_csv, write_plot
from .timing import HEADS, Parser, Shape, add_options, alive, fill_options


def parse(argv) -> argparse.Namespace:
    parser = Parser(prog="python -m kernels.bench", usage=None, description=__doc__)
    parser.add_argument("--shape", choices=HEADS, nargs="+", help="on a GPU by default all")
    parser.add_argument("--n", type=int, default=0, help="tokens, in place of --shape")
    parser.add_argument("--v", type=int, default=0, help="vocabulary")
    parser.add_argument("--d", type=int, default=0, help="hidden size; above 0 also times the linear head")
    add_options(parser)
    parser.add_argument("--warm", type=int, default=0, help="compile first, so many processes at a time (GPU)")
    parser.add_argument("--only", default="", help="what has this in its name; ratios to others are then empty")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
    parser.add_argument("--json", metavar="FILE", help="likewise, as JSON")
    parser.add_argument("--plot", metavar="FILE", help="step times as a PNG")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--audit-2k", action="store_true", help="one batch, 2,000 tokens without --n, through every score instead"
    )
    mode.add_argument("--diagnostics", action="store_true", help="what entropy, accuracy and others cost, instead")
    mode.add_argument("--paths", action="store_true", help="ways to hold a row, and sizes of chunks, instead (GPU)")
    mode.add_argument("--claims", action="store_true", help="all shapes, then verdicts (GPU)")
    mode.add_argument("--claims-of", metavar="FILE", nargs="+", help="verdicts from rows on file; measures nothing")
    parser.add_argument("--train-step-csv", metavar="FILE", help=f"with --claims: what {TRAIN_STEP} wrote")
    parser.add_argument("--trace", metavar="FOLDER", help="with --audit-2k: torch.profiler traces")
    parser.add_argument("--nvtx", action="store_true", help="with --audit-2k: an NVTX range a score, for Nsight")
    return parser.parse_args(argv)


def what_is_wrong(args) -> str | None:
    """Why these modes do not go together, None where they do."""
    cpu = args.device != "cuda"
    other = args.audit_2k or args.diagnostics or args.paths or args.claims or args.claims_of
    no_gpu = "needs a GPU; torch sees no CUDA device or --device is cpu"
    checks = {
        "--only, --seconds and --rows measure; leave out --claims-of": args.claims_of
        and (args.only or args.seconds or args.rows),
        "--trace and --nvtx go with --audit-2k": (args.trace or args.nvtx) and not args.audit_2k,
        "--nvtx needs a CUDA device": args.nvtx and cpu,
        "--warm is of the bench and of --claims": args.warm and other and not args.claims,
        "--plot is of the bench; leave out --audit-2k, --diagnostics, --paths, --claims and --claims-of": args.plot
        and other,
        "--plot needs the package matplotlib: pip install matplotlib": args.plot and find_spec("matplotlib") is None,
        f"--paths {no_gpu}": args.paths and cpu,
        f"--claims {no_gpu}": args.claims and cpu,
        f"--claims is about bf16, got --dtype {args.dtype}": args.claims and args.dtype != "bf16",
        "--train-step-csv goes with --claims; --claims-of takes several files": args.train_step_csv and not args.claims,
    }
    return next((why for why, wrong in checks.items() if wrong), None)


def heads_of(args, default: Shape) -> list[Shape]:
    """The heads that are asked for. ``default`` is that of a CPU, and has what --n, --v and --d leave open."""
    heads = [HEADS[name] for name in args.shape or (HEADS if args.device == "cuda" else ())]
    if not args.claims and (args.n or args.v or args.d or not heads):
        heads = [Shape(args.n or default.n, args.v or default.v, args.d or default.d)]
    return heads


def shapes_to_compare(args) -> list[Shape]:
    """Each head as logits, then each that has a hidden size as a linear head, whose peers compile longer."""
    heads = heads_of(args, Shape(2048, 50257))
    return [head._replace(d=None) for head in heads] + [head for head in heads if head.d]


@alive()
def main(argv=None) -> int:
    args = parse(argv)
    wrong = fill_options(args) or what_is_wrong(args)
    try:
        known = [row for file in args.claims_of or [args.train_step_csv] if file for row in read_csv(file)]
    except (OSError, ValueError) as e:
        wrong = wrong or e
    if wrong:
        print(f"python -m kernels.bench: error: {wrong}", file=sys.stderr)
        return 2
    if args.claims_of:
        print_verdicts(known)
        return 0
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = Rows(args.device, args.csv, args.json, Limits(args.seconds, args.rows))
    if args.audit_2k:
        audit_scores(args, rows)
    elif args.paths:
        time_choices(args, rows)
    else:
        shapes = heads_of(args, Shape(512, 50257, 256)) if args.diagnostics else shapes_to_compare(args)
        if args.warm:
            warm(shapes, args)
        for shape in shapes:
            with rows.part("all providers", **shape._asdict(), dtype=args.dtype):
                (diagnose if args.diagnostics else compare)(shape, args, rows)
    rows.limits.say()
    if not rows and not rows.limits.left_out:
        print(f"nothing has {args.only!r} in its name")
    if args.claims:
        print_verdicts([*rows, *known])
    if args.plot and any(row.get("step_ms") for row in rows):
        write_plot(rows, args.plot)
    return int(rows.failed)


if __name__ == "__main__":
    sys.exit(main())
