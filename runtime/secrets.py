"""Keys, tokens and passwords, which have no place in a run folder: it is shown, copied and sent to others."""

import os
import re

# What holds one, by the name of the variable, and what one looks like: no path, no word, no number of a setting.
NAMES = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD)S?$", re.IGNORECASE)
VALUES = re.compile(r"(?=.*[0-9])[^\s/~.]\S{15,}")
# What is one by its form: Hugging Face's, Weights & Biases', GitHub's, OpenAI's and its kin's, AWS's, a URL's password.
FORMS = [r"hf_[A-Za-z0-9]{20,}", r"wandb_v1_\w{20,}", r"gh[pousr]_[A-Za-z0-9]{20,}", r"github_pat_\w{20,}"]
FORMS = [re.compile(form) for form in (*FORMS, r"sk-[\w-]{20,}", r"AKIA[A-Z0-9]{16}")]
URL = re.compile(r"://[^\s/:@]*:[^\s/@]+@")


def held() -> list[str]:
    """The secrets that this process was given in its environment, the longest first."""
    found = {v.strip() for name, v in os.environ.items() if NAMES.search(name) and VALUES.fullmatch(v.strip())}
    return sorted(found, key=len, reverse=True)


def hide(text: str) -> str:
    """``text`` with *** for each secret of the environment, and for what has the form of one."""
    for secret in held():
        text = text.replace(secret, "***")
    for form in FORMS:
        text = form.sub("***", text)
    return URL.sub("://***@", text)


def refuse(flags: dict) -> None:
    """Raises ValueError, which does not say it, where the value of a flag, by its name, holds a secret."""
    for name, value in flags.items():
        if isinstance(value, str) and hide(value) != value:
            ways = "give it in the environment (HF_TOKEN, WANDB_API_KEY) or in ~/.netrc"
            raise ValueError(f"--{name.replace('_', '-')} holds a key or a password, which a run folder keeps; {ways}")
