"""Starts train_lm.py in this process, or on ranks, and reads what a run left."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from refusals import refused

import train_lm
from runtime.folder import load_checkpoint, read_metrics

ROOT = Path(__file__).parent.parent
TIMING = {"train_seconds", "tokens_per_second"}


def train(flags, out, *more) -> int:
    return train_lm.main([*flags, "--out", str(out), *map(str, more)])


def rows(out, kind) -> list[dict]:
    """Metrics without what depends on the clock."""
    return [{k: v for k, v in r.items() if k not in TIMING} for r in read_metrics(Path(out) / "metrics.jsonl", kind)]


def weights(out, name="last.pt") -> dict:
    return load_checkpoint(Path(out) / name)["model"]


def two_nodes(ranks, flags, out, *more) -> list[tuple[int, str]]:
    """Two torchruns of ``ranks`` each that meet at a port of this machine, as two machines would: (exit code, output)
    of each."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    line = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--nproc_per_node={ranks}"]
    line += ["--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{port}", "--rdzv_id=1", "train_lm.py", *flags]
    how = dict(cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True)
    how |= dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    nodes = [subprocess.Popen([*line, "--out", str(out), *map(str, more)], **how) for _ in range(2)]
    try:
        said = [node.communicate(timeout=240)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    return [(node.returncode, text) for node, text in zip(nodes, said, strict=True)]


def same_run(a, b) -> None:
    """Metrics (the clock's apart) and final weights are equal, bit for bit."""
    for kind in ("train", "val"):
        assert rows(a, kind) == rows(b, kind)
    wa, wb = weights(a), weights(b)
    assert all(torch.equal(wa[k], wb[k]) for k in wa)
    sa, sb = (json.loads((x / "summary.json").read_text()) for x in (a, b))
    clock = {"tokens_per_second", "ms_per_step_median", "train_seconds", "peak_memory_bytes"}
    assert {k: v for k, v in sa.items() if k not in clock} == {k: v for k, v in sb.items() if k not in clock}


def fails(capsys, match, flags, out, *more) -> None:
    refused(capsys, match, lambda: train(flags, out, *more), out)
