"""Published recipes for summarisation, recipes/papers/*.toml, as flags of finetune_seq2seq.py."""

from pathlib import Path

from data.files import is_set
from schedules.textlines import read_toml

PAPERS = Path(__file__).with_name("papers")
PRESETS = tuple(sorted(path.stem for path in PAPERS.glob("*.toml")))


def preset_values(preset: str, data: str, loss: str = "ce", unigram: float = 0.0) -> dict:
    """The flags of ``preset`` for ``data`` (a set's name or folder); XSum, by its name, has its own. Label smoothing is
    the CE baseline's: 0 for any other loss, and where ``unigram`` takes its place. Raises ValueError for an unknown
    preset."""
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; expected one of {', '.join(PRESETS)}")
    values = read_toml(PAPERS / f"{preset}.toml")
    xsum = values.pop("xsum")  # where the published recipe for XSum is another one
    values |= xsum if is_set(data, "xsum") else {}
    values["lr_warmup"] = values.pop("warmup_steps") / values["steps"]
    return values if loss == "ce" and not unigram else values | {"label_smoothing": 0.0}


def check_fit(settings, config, what: str) -> None:
    """Raises ValueError where the preset or a limit of ``settings`` (anything with the script's flags as attributes)
    cannot be used with a model of ``config`` (model.seq2seq.Seq2SeqConfig), which is called ``what``."""
    if settings.preset not in (config.kind, "none"):
        raise ValueError(
            f"{what} is a {config.kind}: --preset {settings.preset} is not its recipe; use {config.kind} or none"
        )
    for name in ("max_source", "max_target", "max_new_tokens"):
        if getattr(settings, name) > config.max_position_embeddings:
            flag = f"--{name.replace('_', '-')} {getattr(settings, name)}"
            raise ValueError(f"{flag} is more than the {config.max_position_embeddings} positions of {what}; lower it")
