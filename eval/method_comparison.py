"""A finished run as a row of PEFT's comparison of fine-tuning methods (method_comparison/MetaMathQA in its repository).

    python -m eval.method_comparison runs/NAME FILE.json
    python finetune_gsm8k.py ... --method-comparison FILE.json

The keys are those of that folder's results/*.json; accuracy, memory and seconds are what its table shows. Filled:

- run_info: created_at, experiment_name, train_config (the keys of theirs that we have; scorecast: all our flags),
  peft_config (the run's own adapter_config.json), error_msg;
- train_info: accelerator_memory_max (peak of CUDA's allocations, where theirs is of its reservations; null on a CPU),
  train_time (without validations), file_size of the adapter, num_trainable_params, status; metrics: a row a validation
  with train loss and train samples, and the last one with test accuracy, under "rule" the rule it is by;
- meta_info: package_info (versions), system_info.

Null, because we do not measure or know it: peft_branch, total_time, accelerator_memory_reserved_avg and _99th,
num_total_params, the validations' accuracy unless --best-by pass@1 measured it, memory by step, forgetting, hashes of
commits, model_info, dataset_info.

Their table (processing.load_df) REFUSES the row as it is: it reads total_time, accelerator_memory_max and
accelerator_memory_reserved_avg and _99th as numbers, and refuses a null and a missing key alike. Put numbers of your
own there; none are made up here.

NOT COMPARABLE as it stands: theirs trains on MetaMathQA, 5,000 steps of 4, and answers with Llama-3.2-3B by a parser
of its own. A run of ours on GSM8K's train split stands beside it as what it is; train_config says the data.
"""

import sys

if not __package__:  # a file by its name finds no package
    print("python -m eval.method_comparison: error: type it like this, in the folder that holds eval/", file=sys.stderr)
    sys.exit(2)

import platform
from collections.abc import Mapping
from pathlib import Path

from eval.answers import main_rule
from runtime.cli import Parser, user_errors
from runtime.folder import read_metrics, write_json
from schedules.textlines import read_json

PACKAGES = ("transformers", "peft", "datasets", "bitsandbytes", "torch")


def _read(path: Path):
    if not path.is_file():
        raise ValueError(f"{path} is missing; give the folder of a finished run of finetune_gsm8k.py")
    return read_json(path, dict)


def row(run: Path) -> dict:
    """The row of a run folder. Raises ValueError for a folder that is no finished run of finetune_gsm8k.py, or one of
    before its summary had what is read here."""
    config, summary, environment = (_read(run / f"{name}.json") for name in ("config", "summary", "environment"))
    if summary.get("script") != "finetune_gsm8k.py":
        raise ValueError(f"{run} is a run of {summary.get('script')}, expected one of finetune_gsm8k.py")
    try:
        return _row(run, config, summary, environment)
    except KeyError as error:
        raise ValueError(
            f"{run} is a run of an older finetune_gsm8k.py, which kept no {error}; train it again"
        ) from None


def _row(run: Path, config: dict, summary: dict, environment: dict) -> dict:
    adapter = run / "adapter" / "adapter_model.safetensors"
    on_device = summary["peak_memory_of"].startswith("CUDA allocations")
    rule = main_rule(config["format"])
    versions: Mapping = environment.get("packages") or {}
    return {
        "run_info": {
            "created_at": environment.get("time"),
            "total_time": None,
            "experiment_name": f"scorecast/{run.resolve().name}",
            "peft_branch": None,
            "train_config": _train_config(config, summary),
            "peft_config": _read(run / "adapter" / "adapter_config.json"),
            "error_msg": "",
        },
        "train_info": {
            "accelerator_memory_reserved_avg": None,
            "accelerator_memory_max": summary["peak_memory_bytes"] if on_device else None,
            "accelerator_memory_reserved_99th": None,
            "train_time": summary["train_seconds"],
            "file_size": adapter.stat().st_size,
            "num_trainable_params": summary["parameters"],
            "num_total_params": None,
            "status": "success",
            "metrics": [*_validations(run, config, rule), _last(config, summary, rule)],
        },
        "meta_info": {
            "model_info": {"sha": None, "created_at": None},
            "dataset_info": {"metamath": {"sha": None, "created_at": None}, "gsm8k": {"sha": None, "created_at": None}},
            "package_info": {f"{p}-version": versions.get(p) for p in PACKAGES}
            | {f"{p}-commit-hash": None for p in PACKAGES},
            "system_info": {
                "system": platform.system(),
                "release": platform.release(),
                "version": platform.version(),
                "machine": platform.machine(),
                "processor": platform.processor(),
                "accelerator": summary["device"] if on_device else None,
            },
            "pytorch_info": None,
        },
    }


def _train_config(config: dict, summary: dict) -> dict:
    betas = [config["beta1"], config["beta2"]]
    return {
        "model_id": config["model"],
        "dtype": "int4" if config["base"] == "nf4" else summary["dtype"],
        "max_seq_length": config["seq_len"],
        "batch_size": config["batch"],
        "batch_size_eval": config["eval_batch"],
        "max_steps": config["steps"],
        "eval_steps": config["eval_every"],
        "compile": False,
        "use_gc": config["checkpoint_activations"],
        "query_template": None,
        "seed": config["seed"],
        "grad_norm_clip": config["clip"],
        "optimizer_type": "AdamW" if config["optimizer"] == "adamw" else config["optimizer"],
        "optimizer_kwargs": {"lr": config["lr"], "weight_decay": config["weight_decay"], "betas": betas},
        "lr_scheduler": config["schedule"],
        "use_amp": False,
        "autocast_adapter_dtype": True,  # our adapters are in fp32
        "generation_kwargs": {"max_length": None, "max_new_tokens": config["generate_tokens"]},
        "attn_implementation": None,
        "init_kv_cache_prefix": None,
        "scorecast": config,
    }


def _validations(run: Path, config: dict, rule: str) -> list[dict]:
    """A row a validation, with the training loss of the last log line before it."""
    train, rows, before = read_metrics(run / "metrics.jsonl", "train"), [], 0.0
    for val in read_metrics(run / "metrics.jsonl", "val"):
        at = [r for r in train if r["step"] <= val["step"]][-1:] or [{}]
        rows.append(
            {
                "step": val["step"],
                "valid accuracy": val.get(f"pass_at_1_{rule}"),
                "train loss": at[0].get("loss"),
                "train samples": val["step"] * config["batch"],
                "train time": val["train_seconds"] - before,
                "eval time": None,
                "tokens / sec": at[0].get("tokens_per_second"),
                "mem allocated avg": None,
                "mem reserved avg": None,
                "elapsed time": None,
            }
        )
        before = val["train_seconds"]
    return rows


def _last(config: dict, summary: dict, rule: str) -> dict:
    return {
        "step": summary["reported_step"],
        "test accuracy": summary[f"pass_at_1_{rule}"],
        "rule": rule,
        "test problems": summary["eval_problems"],
        "train loss": summary["final_train_loss"],
        "train samples": summary["steps"] * config["batch"],
        "train total tokens": summary["tokens_seen"],
        "forgetting": None,
    }


def write(run: str | Path, out: str | Path) -> None:
    """Writes the row of the run folder ``run`` to the file ``out``, atomically. Raises ValueError as `row` does."""
    write_json(Path(out), row(Path(run)))


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(
        usage=None, prog="python -m eval.method_comparison", description="A run as PEFT's comparison has it."
    )
    parser.add_argument("run", help="folder of a finished run of finetune_gsm8k.py")
    parser.add_argument("out", type=Path, help="JSON file to write")
    given = parser.parse_args(arguments)
    with user_errors():
        if not given.out.parent.is_dir():
            raise ValueError(f"{given.out}: there is no folder {given.out.parent}")
        write(given.run, given.out)


if __name__ == "__main__":
    sys.exit(main())
