"""Starts finetune_gsm8k.py in this process and reads what a run left."""

import json
import os
import signal
from pathlib import Path

import pytest

import eval.answers
import finetune_gsm8k
from runtime.folder import read_metrics

TIMING = {"train_seconds", "tokens_per_second"}


def tune(flags, out, *more) -> int:
    return finetune_gsm8k.main([*flags, "--out", str(out), *map(str, more)])


def rows(out, kind) -> list[dict]:
    """Metrics without what depends on the clock."""
    return [{k: v for k, v in r.items() if k not in TIMING} for r in read_metrics(Path(out) / "metrics.jsonl", kind)]


def outputs(out, name="outputs.jsonl") -> list[dict]:
    return [json.loads(line) for line in (Path(out) / name).read_text().splitlines()]


def sigterm_at(monkeypatch, step):
    """SIGTERM while the batch of this step is looked up; the script looks up batch 0 once more, for its first line."""
    original = finetune_gsm8k.batch_indices

    def kill_then(count, now, *args):
        if now == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(count, now, *args)

    monkeypatch.setattr(finetune_gsm8k, "batch_indices", kill_then)


def sigterm_while_answering(monkeypatch):
    """SIGTERM at the fourth step of decoding."""
    original = eval.answers.decode

    def signalled(*args, **kwargs):
        for i, ended in enumerate(original(*args, **kwargs)):
            if i == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            yield ended

    monkeypatch.setattr(eval.answers, "decode", signalled)


def refused(capsys, out, *flags) -> str:
    """The one line that the script ends with, having written nothing."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        finetune_gsm8k.main([*map(str, flags), "--out", str(out)])
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and len(lines) == 1 and "error: " in lines[0], lines
    assert not out.exists() and not list(out.parent.glob(f"*{out.name}*"))
    return lines[0]
