"""README is true: its examples run as they stand, its commands exist with their flags, and a test runs each."""

import re
import runpy
import sys
from pathlib import Path

import pytest
from readme import README, commands, python_examples

ROOT = Path(__file__).parent.parent
HERE = [code for code in python_examples() if "kernels.hf" not in code]  # the others need transformers: test_hf.py
# The test that runs each command, most of them in a short form: smaller models, fewer steps.
RUN_BY = {
    "train_lm": "test_train_lm.test_run_folder_is_complete",
    "finetune_seq2seq": "test_finetune_seq2seq.test_run_folder_is_complete",
    "finetune_gsm8k": "test_finetune_gsm8k.test_run_folder_is_complete",
    "data.lm": "data.test_lm.test_command",
    "eval.attack": "eval.test_attack_run.test_the_command_attacks_resumes_and_reports",
    "eval.campaign": "eval.test_campaign_runs.test_a_grid_of_small_runs_and_its_report",
    "eval.dependence": "eval.test_dependence.test_the_command",
    "eval.gsm8k": "eval.test_gsm8k.test_command_line",
    "eval.method_comparison": "test_finetune_gsm8k_answers.test_a_row_of_no_run_is_refused",
    "eval.ood": "eval.test_ood.test_a_run_has_the_numbers_of_its_own_ood",
    "eval.preference make": "eval.test_preference.test_folders_of_runs",
    "eval.preference tally": "eval.test_preference.test_votes_are_counted_for_the_arms",
    "eval.report": "eval.test_report_terminal.test_the_command_prints_a_table_that_fits",
    "eval.verdicts": "eval.test_verdicts.test_two_files",
    "kernels.audit": "kernels.test_audit.test_kernels_compile_for_gpus_without_one",
    "kernels.bench": "kernels.test_bench.test_audit_of_2000_tokens",
    "model.export": "model.test_export.test_a_merged_folder_holds_the_sum_in_16_bits",
    "model.gpt2_hub": "model.test_gpt2_hub.test_command_line",
    "model.seq2seq_hub": "model.test_seq2seq.test_the_command_exports_a_run",
    "races.ab": "races.test_ab.test_the_patched_tree_is_what_runs",
    "races.carry": "races.test_carry.test_everything_is_there_and_one_library_of_bitsandbytes",
    "races.device": "races.test_device.test_all_parts_run_on_a_cpu_in_their_smallest_shapes",
    "races.fot_overhead": "races.test_fot_overhead.test_the_table",
    "races.nanogpt": "races.test_nanogpt.test_a_round",
    "races.peft_gsm8k": "eval.test_gsm8k_tables.test_race_with_peft",
    "races.probes": "races.test_device.test_probes_of_the_kernels_run",
    "races.train_step": "races.test_train_step.test_training_step_of_a_tiny_model",
    "races.transformers_seq2seq": "races.test_transformers_seq2seq.test_every_side_is_timed_in_every_round",
    "recipes.smollm2": "recipes.test_smollm2.test_the_folder_is_one_that_the_script_takes",
    "recipes.tiny_bart": "recipes.test_tiny_bart.test_the_folder_is_one_that_the_script_and_transformers_take",
    "recipes.tiny_qwen3": "eval.test_gsm8k_tables.test_the_tiny_base_is_a_model_and_the_same_again",
    "sandbox": "sandbox.test_sandbox.test_probe",
    "schedules backtest": "schedules.test_backtest.test_backtest_command",
    "schedules forecast": "schedules.test_logs.test_the_forecast_command",
    "schedules plot": "schedules.test_schedules.test_plot_command",
    "schedules prune": "schedules.test_pruning.test_the_command_plays_a_recorded_grid",
    "tests.drill": "test_drill.test_nothing_is_lost_in_a_few_drills",
}
MADE_OF = {"demo": "recipes/demo.toml", "demo-finetune": "recipes/demo_finetune.toml", "test": "pytest", "clean": "rm"}


def called(words: list[str]) -> tuple[str, list[str]]:
    """What a command runs, as RUN_BY has it ("train_lm", "schedules plot"; "" for make, pip and pytest), and the words
    behind it: before a script stand torchrun's flags."""
    at = next((i for i, w in enumerate(words) if w == "-m" or w.endswith(".py")), None)
    if at is None or words[at + 1 : at + 2] == ["pytest"]:
        return "", []
    if words[at] != "-m":
        return words[at].removesuffix(".py"), words[at + 1 :]
    parts = 2 if words[at + 1] in ("schedules", "eval.preference") else 1
    return " ".join(words[at + 1 : at + 1 + parts]), words[at + 1 + parts :]


def test_all_examples_are_found():
    assert len(HERE) >= 4 and len(python_examples()) >= len(HERE) + 3


@pytest.mark.parametrize("code", HERE, ids=lambda code: code.splitlines()[1])
def test_an_example_runs_in_a_fresh_namespace(tmp_path, monkeypatch, code):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    assert not list(tmp_path.iterdir())
    figure = names["forecast"].mean if "forecast" in names else names["loss"].item()
    assert 0 < figure < 100


def test_a_test_runs_every_command():
    assert {called(words)[0] for words in commands()} - {""} == {*RUN_BY}
    for where in RUN_BY.values():
        path, _, name = where.rpartition(".")
        text = (ROOT / "tests" / (path.replace(".", "/") + ".py")).read_text()
        assert f"\ndef {name}(" in text, where


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")  # other tests have imported it
@pytest.mark.parametrize("command", sorted(RUN_BY))
def test_a_command_has_the_flags_that_readme_gives_it(command, monkeypatch, capsys):
    name, *part = command.split()
    monkeypatch.setattr(sys, "argv", [name, *part, "--help"])
    with pytest.raises(SystemExit) as ended:
        run = runpy.run_path if "." not in name and (ROOT / f"{name}.py").exists() else runpy.run_module
        run(f"{name}.py" if run is runpy.run_path else name, run_name="__main__")
    assert not ended.value.code
    said = capsys.readouterr().out
    behind = [called(words)[1] for words in commands() if called(words)[0] == command]
    given = {word.partition("=")[0] for words in behind for word in words if word[:2] == "--"}
    missing = {flag for flag in given if not re.search(rf"{flag}\b", said)}
    assert not missing, missing


def test_make_and_pip_find_what_readme_names():
    makefile = (ROOT / "Makefile").read_text()
    for words in commands():
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.M) and MADE_OF[words[1]] in makefile, words
        if words[0] == "pip":
            files = [after for flag, after in zip(words, words[1:], strict=False) if flag == "-r"]
            assert all((ROOT / file).is_file() for file in files) and words[1] == "install", words


def test_links_lead_somewhere():
    """To files of ours and to headings, as GitHub names them."""
    headings = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.+)$", README, re.M)}
    targets = re.findall(r"\]\(([^)\s]+)\)", README)
    assert {t[1:] for t in targets if t[0] == "#"} <= headings
    ours = [t for t in targets if t[0] != "#" and not t.startswith("https://")]
    assert len(ours) > 10 and not [t for t in ours if not (ROOT / t).exists()]
