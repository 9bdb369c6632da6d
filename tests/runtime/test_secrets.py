"""Keys and passwords do not get into a run folder: planted ones in the environment, in files and in flags."""

import logging
import re
import traceback

import pytest
from lm_runs import train

from eval.report.build import build, write
from runtime.secrets import hide, refuse

# Invented, of the forms that the services give. In parts, as a run keeps this file, too.
PLANTED = {
    "WANDB_API_KEY": "0123abcd" * 5,
    "HF_TOKEN": "hf_" + "AbCd0123" * 4,
    "AWS_SECRET_ACCESS_KEY": "wJalr7UtnFEMI/K7MDENG/" + "bPxRfiCYINVENTED01",
    "OPENAI_API_KEY": "sk-proj-" + "Invented0" * 3,
    "MY_REGISTRY_PASSWORD": "correct-horse" + "-battery-1",
}
IN_NETRC, IN_FILE = "fedcba98" * 5, "hf_" + "ZyXw9876" * 4


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """A home with keys in the environment, in ~/.netrc and in Hugging Face's file. All of them."""
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    home = tmp_path / "home"
    home.mkdir()
    (home / ".netrc").write_text(f"machine api.wandb.ai login user password {IN_NETRC}\n")
    (home / "token").write_text(IN_FILE)
    for name, value in {"HOME": home, "NETRC": home / ".netrc", "HF_TOKEN_PATH": home / "token"}.items():
        monkeypatch.setenv(name, str(value))
    return [*PLANTED.values(), IN_NETRC, IN_FILE]


def found(secrets, *texts: str | bytes) -> list[str]:
    texts = [t.encode() if isinstance(t, str) else t for t in texts]
    return [s for s in secrets for t in texts if s.encode() in t]


def test_a_run_its_logs_and_its_report_hold_none(planted, lm_base, tmp_path, monkeypatch, capfd, caplog):
    """Every byte of the folder, W&B's own files too, the output, the log and the report; and a run that fails."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    caplog.set_level(logging.INFO)
    out = tmp_path / "run"
    assert train(lm_base, out, "--steps", 4, "--wandb", "scorecast") == 0
    write(build([out]), tmp_path / "report")
    files = [p for folder in (out, tmp_path / "report") for p in folder.rglob("*") if p.is_file()]
    assert len(files) > 20 and any(p.suffix == ".wandb" for p in files)
    assert not [p for p in files if found(planted, p.read_bytes())]
    monkeypatch.setenv("SCORECAST_TRACEBACK", "1")
    with pytest.raises(ValueError) as failed:
        train(lm_base, tmp_path / "none", "--data", tmp_path / "nowhere")
    said = capfd.readouterr()
    shown = "".join(traceback.format_exception(failed.value))
    assert "nowhere" in shown and not found(planted, said.out, said.err, caplog.text, shown)


@pytest.mark.parametrize("flag", ["--data", "--wandb", "--prompt", "--init-from"])
def test_a_flag_that_holds_one_is_refused_and_not_said(planted, lm_base, tmp_path, monkeypatch, capsys, flag):
    for secret in (*PLANTED.values(), "https://me:pass1word@example.org/text"):
        with monkeypatch.context() as m:
            if secret == PLANTED["HF_TOKEN"]:
                m.delenv("HF_TOKEN")  # by its form alone
            with pytest.raises(SystemExit) as stopped:
                train(lm_base, tmp_path / "run", flag, f"x {secret}")
        said = capsys.readouterr()
        assert stopped.value.code == 2 and f"{flag} holds a key or a password" in said.err
        assert not found([*planted, "pass1word"], said.out, said.err) and not (tmp_path / "run").exists()


def test_what_is_hidden_and_what_is_left(planted):
    text = "push https://me:pass1word@host/x with {HF_TOKEN} and {WANDB_API_KEY}".format(**PLANTED)
    assert hide(text) == "push https://***@host/x with *** and ***"
    harmless = "git 0a1b2c3d4e5f60718293a4b5c6d7e8f901234567 Qwen/Qwen3-0.6B https://host:8080/a@b ask-first hf_hub"
    assert hide(harmless) == harmless
    refuse({"data": "wikitext103", "seed": 3, "out": None})


def test_settings_of_the_environment_are_no_secrets(monkeypatch):
    """Else a word of the code would be hidden in the copy of it that a run keeps."""
    for value in ("training", "/home/me/key1.json", "4096", "a plain sentence 1"):
        monkeypatch.setenv("SOME_KEY", value)
        assert hide(value) == value and not re.search(r"\*\*\*", hide(f"x = {value!r}"))
