"""Compiles every Triton kernel for sm_80 and sm_90, on any machine, and reads the machine code.

    python -m kernels.audit
    python -m kernels.audit --vocab 32000 --dtype fp16 --json audit.json
    python -m kernels.audit --capability 100 --kernel norm

No GPU is needed: Triton's own assembler and disassembler do the work. Launch shapes are those of triton_impl and, for
the layers of Qwen3-0.6B, of triton_layers.

    V        the vocabulary, or the width of a layer's rows
    regs     registers a thread
    spill    bytes a thread that do not fit the registers (0 wanted)
    loads    loads of global memory in the code, by bits a thread
    copies   asynchronous copies of global to shared memory, the prefetch of a loop, in the same way
    stores   the same for stores; of the narrow ones a few belong to scalars and to the ends of a row
    instr/el instructions that a lane executes for its part of a row, over its elements. Hopper's 132 multiprocessors
             issue 128 a clock; at 1.7 GHz and 3 TB/s that is 38 while a bf16 logit is read and written
    sfu/el   the same for special functions, 16 a clock. score_kernel needs two (p for the sums and for the gradient)
    shared   bytes of shared memory a program
"""

import sys

if not __package__:  # a file by its name finds no package
    print("python -m kernels.audit: error: type it like this, in the folder that holds kernels/", file=sys.stderr)
    sys.exit(2)

import itertools
import json
import math
import os
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

from .bench.timing import DTYPE_OF, Parser, alive

CAPABILITIES = (80, 90)
VOCABULARIES = (50257, 151936)
D, HEADS, K, WIDE = 1024, 16, 128, 3072  # Qwen3-0.6B's width, query heads, width of a head and of SwiGLU
# Types of the kernels' arguments, beside logits, constants and pointers to fp32.
TYPES = {"targets_ptr": "*i64", "ids_ptr": "*i64", "mask_ptr": "*u8", "correct_ptr": "*u8"}
TYPES |= dict.fromkeys(("tail", "scale", "link_scale", "softcap", "eps"), "fp32")
TYPES |= dict.fromkeys(("z_stride", "stats_stride", "V", "N", "positions"), "i32")
OF_LAYERS = tuple(f"{x}_ptr" for x in "x delta gain y s dy ds cos sin gate up d_gate d_up".split())  # of the dtype
LINE = "{:40} {:>3} {:>7} {:>5} {:>5} {:22} {:6} {:22} {:>8} {:>6} {:>6}"
HEADINGS = ("kernel", "sm", "V", "regs", "spill", "loads", "copies", "stores", "instr/el", "sfu/el", "shared")
# One instruction a line: /*0040*/  @P0 LDG.E.128 R4, ...
OPCODE = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
OPTIONS = ("num_warps", "maxnreg", "enable_fp_fusion")  # of a launch; its other constants are the kernel's


def variants(capability: int, vocab: int, dtype: str) -> list[tuple[str, object, dict]]:
    """(label, kernel, constants) of everything that is launched for logits [N, vocab] of Triton's ``dtype``."""
    from . import triton_impl as impl
    from . import triton_topk

    shape = vocab, DTYPE_OF[dtype]
    plain, score_shape = impl._shape(*shape), impl.score_shape(*shape)
    usual = dict(LINK=0, order_ptr=None)
    moments = dict(ids_ptr=None) | usual | plain
    gradient = dict(h_ptr=None) | usual | plain
    capped, ordered = dict(LINK=impl.CAPPED.value), ("order_ptr",)  # an order is a pointer, not a constant
    found = [
        ("moments_kernel", impl.moments_kernel, dict(TAIL=False) | moments),
        ("moments_kernel, tail", impl.moments_kernel, dict(TAIL=True) | moments),
        ("moments_kernel, softcap", impl.moments_kernel, dict(TAIL=False) | moments | capped),
        ("moments_kernel, order", impl.moments_kernel, _without(dict(TAIL=False) | moments, ordered)),
        ("gradient_kernel", impl.gradient_kernel, dict(b_ptr=None, t_ptr=None) | gradient),
        ("gradient_kernel, tail", impl.gradient_kernel, gradient),
        ("gradient_kernel, softcap", impl.gradient_kernel, dict(b_ptr=None, t_ptr=None) | gradient | capped),
        ("gradient_kernel, order", impl.gradient_kernel, _without(dict(b_ptr=None, t_ptr=None) | gradient, ordered)),
        (
            "gradient_kernel, entropy",
            impl.gradient_kernel,
            _without(dict(b_ptr=None, t_ptr=None) | gradient, ["h_ptr"]),
        ),
    ]
    for name, score in impl.FUSED_SCORES.items():
        flags = _without(usual, ordered if name == "power" else ()) | dict(SCORE=score, HAS_B=name in impl.READS_MEAN)
        read = "part of it twice" if score_shape["MORE"] else "one read"
        found.append((f"score_kernel, {name}, {read}", impl.score_kernel, flags | score_shape))
        found.append((f"rest_kernel, {name}", impl.rest_kernel, flags | impl._shape(*shape, "K", "PACKED")))
    width = impl.VECTOR_BYTES // DTYPE_OF[dtype].itemsize
    vectors = dict(R=32, W=width, K=triton_topk.BLOCK // 32 // width, PADDED=True)  # rows as linear_score has them
    found.append(("topk_kernel, k = 20", triton_topk.topk_kernel, vectors | triton_topk.shape(20, 0)))
    return found


def layer_variants(dtype: str) -> list[tuple[str, object, dict]]:
    """The same of what is launched for layers in Triton's ``dtype``."""
    from . import triton_layers as impl

    frozen, plain = dict(sums_ptr=None), dict(gain_ptr=None)
    norm, rope, swiglu = dict(D=D) | impl.shape(D), impl.rope_shape(HEADS, K), impl.swiglu_shape() | dict(WIDTH=WIDE)
    found = [
        ("norm_kernel", impl.norm_kernel, norm),
        ("norm_kernel, no delta", impl.norm_kernel, norm | dict(delta_ptr=None)),
        ("norm_backward_kernel", impl.norm_backward_kernel, norm | frozen),
        ("norm_backward_kernel, gain", impl.norm_backward_kernel, norm),
        ("rope_kernel", impl.rope_kernel, rope | plain),
        ("rope_kernel, norm", impl.rope_kernel, rope),
        ("rope_backward_kernel", impl.rope_backward_kernel, rope | frozen | plain | dict(x_ptr=None)),
        ("rope_backward_kernel, norm", impl.rope_backward_kernel, rope | frozen),
        ("rope_backward_kernel, gain", impl.rope_backward_kernel, rope),
        ("swiglu_kernel", impl.swiglu_kernel, swiglu),
        ("swiglu_backward_kernel", impl.swiglu_backward_kernel, swiglu),
    ]
    common = dict(W=16 // DTYPE_OF[dtype].itemsize, LANE=impl.LANE, enable_fp_fusion=True)
    return [(label, kernel, common | dict(R=32 * c["num_warps"]) | c) for label, kernel, c in found]


def _without(constants: dict, names) -> dict:
    return {name: value for name, value in constants.items() if name not in names}


def compile_for(kernel, constants: dict, capability: int, dtype: str, vocab: int):
    """Triton's compiled kernel for a CUDA compute capability (80, 90). TRITON_INTERPRET must be unset."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = TYPES | dict.fromkeys(("z_ptr", "out_ptr", *OF_LAYERS), f"*{dtype}") | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "*fp32") for name in kernel.arg_names}
    whole = ("z_ptr", "out_ptr", "knob_ptr", "sums_ptr", *OF_LAYERS)
    if "WIDTH" in constants:
        whole += ("N",)  # rows of that width
    if constants.get("PADDED"):
        whole += ("z_stride",)
    elif vocab % 16 == 0:
        whole += ("z_stride", "V")
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name in whole}
    constexprs = {name: constants[name] for name in kernel.arg_names if name in constants}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    options = {name: constants[name] for name in OPTIONS if name in constants}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def executed(lines: list[str], vectors_a_go: int, rounds: int) -> list[str]:
    """The opcodes of nvdisasm's ``lines`` that a lane executes, as often as it does: those of a loop that loads or
    copies ``vectors_a_go`` vectors ``rounds`` times, those of other loops (for rare rows) not at all. Where a jump goes
    back over the kernel's end, out of code that stands behind it, that code alone is the loop, but within one that
    loads."""
    labels, opcodes, loops, last = {}, [], [], 0
    for line in lines:
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(opcodes)
        elif code := OPCODE.match(line):
            opcodes.append(code[1])
            target = re.search(r"BRA\b.*`\((\.L_x_\d+)\)", line)
            if re.match(r"\s*/\*[0-9a-f]+\*/\s+EXIT\b", line):  # without a condition
                last = len(opcodes)
            if target and -1 < labels.get(target[1], -1) < len(opcodes) - 1:
                loops.append((labels[target[1]], len(opcodes), last))

    def loads(begin: int, end: int) -> bool:
        return vectors_a_go == sum(op.startswith("LDG") and op.endswith("128") for op in opcodes[begin:end])

    times, that_load = [1] * len(opcodes), [(begin, end) for begin, end, _ in loops if loads(begin, end)]
    for begin, end, last in loops:
        if not any(outer <= begin < over for outer, over in that_load):
            begin = max(begin, last)
        times[begin:end] = [rounds if (begin, end) in that_load else 0] * (end - begin)
    return [op for op, n in zip(opcodes, times, strict=True) for _ in range(n)]


def read_code(compiled, constants: dict, vocab: int) -> dict:
    """What a compiled kernel's machine code shows, for rows of ``vocab`` logits, or for LANE elements a lane."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

    def tool(name, *arguments):
        done = subprocess.run([tools / name, *arguments], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{name} failed: {done.stderr.strip()}")
        return done.stdout

    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        code, usage = tool("nvdisasm", "-c", str(cubin)), tool("cuobjdump", "-res-usage", str(cubin))
    opcodes = [found[1] for line in code.splitlines() if (found := OPCODE.match(line))]
    if not opcodes:
        raise RuntimeError("no instruction found in nvdisasm's output; its format has changed")

    def widths(prefix: str) -> dict[int, int]:
        sizes = [re.search(r"\.[US]?(128|64|16|8)\b", op) for op in opcodes if op.split(".")[0] == prefix]
        return dict(sorted(Counter(int(size[1]) if size else 32 for size in sizes).items(), reverse=True))

    lanes, width, a_go = constants["R"], constants["W"], constants.get("K", 1)
    if lane := constants.get("LANE"):  # a tile of a layer, all code once
        run, elements = opcodes, lane
    else:
        more = max(0, math.ceil(vocab / width / lanes) - constants.get("PIECES", 0))  # vectors that are not held
        run = executed(code.splitlines(), a_go, math.ceil(more / a_go))
        # Of a lane. A program of gradient_kernel is part of a row, without loops.
        elements = a_go * width if compiled.metadata.name == "gradient_kernel" else vocab / lanes
    special, local = sum(op.startswith("MUFU") for op in run), sum(op.split(".")[0] in ("LDL", "STL") for op in opcodes)
    usage = {name: int(n) for name, n in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    figures = dict(registers=usage["REG"], spill_bytes=usage["STACK"] + usage["LOCAL"], spill_instructions=local)
    figures |= dict(loads=widths("LDG"), copies=widths("LDGSTS"), stores=widths("STG"))
    figures |= dict(shared_bytes=compiled.metadata.shared)
    figures |= dict(instructions_per_element=len(run) / elements, special_per_element=special / elements)
    return figures | dict(instructions=len(opcodes))


def audit(capability: int, vocab: int | None, dtype: str, only: str = "", labels=None) -> list[dict]:
    """A row of figures for each kernel whose label holds ``only``, and is one of ``labels`` where these are given.
    Without ``vocab`` those of the layers."""
    rows = []
    for label, kernel, constants in variants(capability, vocab, dtype) if vocab else layer_variants(dtype):
        if only in label and (labels is None or label in labels):
            width = vocab or constants.get("WIDTH") or constants["D"]
            compiled = compile_for(kernel, constants, capability, dtype, width)
            shape = {k: constants.get(k, 0) for k in ("K", "R", "W", "PIECES", "num_warps")}
            where = dict(kernel=label, capability=capability, vocab=width, dtype=dtype)
            rows.append(where | shape | read_code(compiled, constants, width))
    return rows


@alive()
def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m kernels.audit", usage=None, description=__doc__)
    parser.add_argument(
        "--capability", type=int, nargs="+", default=CAPABILITIES, help="80: A100, 90: H100, H200, 100: B200"
    )
    parser.add_argument("--vocab", type=int, nargs="+", default=VOCABULARIES)
    parser.add_argument("--dtype", choices=DTYPE_OF, default="bf16", help="of the logits")
    parser.add_argument("--kernel", default="", help="only kernels whose label holds this")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the rows there")
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set, so that Triton does not compile; unset it")
    try:
        import triton
    except ImportError:
        parser.error("triton is not installed (it has wheels for Linux); pip install triton")
    rows = []
    print(f"triton {triton.__version__}, {args.dtype}", LINE.format(*HEADINGS), sep="\n")
    for vocab, capability in itertools.product((*args.vocab, None), args.capability):
        for row in audit(capability, vocab, args.dtype, args.kernel):
            rows.append(row)
            accesses = [" ".join(f"{n}x{bits}" for bits, n in row[k].items()) for k in ("loads", "copies", "stores")]
            figures = f"{row['instructions_per_element']:.1f}", f"{row['special_per_element']:.2f}"
            sizes = capability, row["vocab"], row["registers"], row["spill_bytes"]
            print(LINE.format(row["kernel"], *sizes, *accesses, *figures, row["shared_bytes"]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(dict(triton=triton.__version__, rows=rows), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
