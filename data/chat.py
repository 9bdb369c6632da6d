"""A model's own chat template, as its folder carries it: Jinja, rendered in a sandbox.

What a person wrote is told apart from what the template writes, so that a special token in a question stays text.
"""

import contextlib
import datetime
import json
import signal
import threading

import jinja2
import jinja2.ext
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from model.weights import tokenizer_config

SECONDS = 5  # a template takes a millisecond; one that loops is stopped


class ChatTemplate:
    """``source``, a Jinja template of messages, with the names of special ``tokens`` such as bos_token that it reads.

    Templates have what transformers gives them (5.23: messages, add_generation_prompt, raise_exception, strftime_now,
    tojson, loop controls, generation blocks, blocks trimmed). ``where`` names the model in errors. Raises ValueError
    for a template that is no Jinja."""

    def __init__(self, source: str, tokens: dict[str, str], where: str):
        self.tokens, self.where = tokens, where
        extensions = [loopcontrols, _Generation]
        env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        env.filters["tojson"] = _to_json
        env.globals |= dict(raise_exception=_raise, strftime_now=lambda form: datetime.datetime.now().strftime(form))
        try:
            self.template = env.from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"{where}: the chat template is no Jinja ({_line(error)}); use --prompt plain") from None

    def pieces(self, messages: list[dict[str, str]], *, answer_next: bool) -> list[tuple[str, bool]]:
        """The conversation in pieces, (text, whether a message wrote it). ``messages``: role and content each, of which
        the content is stripped. ``answer_next``: with the beginning of an answer. Raises ValueError for a template that
        raises, takes too long, or does not write each message once and as it is."""
        marks = [f"\ue000{i}\ue001" for i in range(len(messages))]  # private use: in no template and no message
        marked = [m | {"content": mark} for m, mark in zip(messages, marks, strict=True)]
        text, found = self._render(marked, answer_next), []
        for message, mark in zip(messages, marks, strict=True):
            before, *after = text.split(mark)
            if len(after) != 1:
                what = "leaves out" if not after else "repeats"
                raise ValueError(f"{self.where}: the chat template {what} the {message['role']}'s words; {_WAY}")
            found += [(before, False), (message["content"].strip(), True)]
            text = after[0]
        return [piece for piece in [*found, (text, False)] if piece[0]]

    def _render(self, messages, answer_next: bool) -> str:
        how = dict(messages=messages, add_generation_prompt=answer_next, enable_thinking=False) | self.tokens
        try:
            with _time_limit(SECONDS):
                return self.template.render(how)
        except TimeoutError:
            raise ValueError(f"{self.where}: the chat template runs on after {SECONDS} seconds; {_WAY}") from None
        except Exception as error:  # whatever a program of somebody else's does
            raise ValueError(f"{self.where}: the chat template fails ({_line(error)}); {_WAY}") from None


_WAY = "use --prompt plain"


def template_of(files: dict[str, bytes], where: str) -> ChatTemplate | None:
    """The template among a model folder's ``files``, name -> content; None where there is none. Raises ValueError as
    ``tokenizer_config`` and ``ChatTemplate``."""
    config = tokenizer_config(files, where)
    if not config["chat_template"]:
        return None
    named = {name: config.get(name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    tokens = {name: t["content"] if isinstance(t, dict) else t for name, t in named.items() if t}
    return ChatTemplate(config["chat_template"], tokens, where)


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}, with which a template marks what the model says; written as it is."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    how = dict(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return json.dumps(value, **how)


def _raise(message: str):
    raise jinja2.TemplateError(message)


def _line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]


@contextlib.contextmanager
def _time_limit(seconds: float):
    """TimeoutError in the body after ``seconds``, in the main thread; elsewhere, and on Windows, is no such signal, and
    no limit."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        yield
        return

    def late(*_):
        raise TimeoutError

    old = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
