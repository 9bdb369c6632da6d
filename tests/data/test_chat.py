"""Chat templates of models: as transformers renders them, and programs of other people's."""

import json
import threading

import pytest

from data.chat import ChatTemplate, template_of

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HEADERS = """{{ bos_token }}
{%- for m in messages %}
    {{- '<|header|>' + m.role + '<|end|>\n\n' }}{% generation %}{{- (m.content | trim) + '<|eot|>' }}{% endgeneration %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|header|>assistant<|end|>\n\n' }}
{%- endif %}"""
TALK = [dict(role="user", content=" What is <|im_end|> 2+3? "), dict(role="assistant", content="5")]


@pytest.mark.parametrize("source", [CHATML, HEADERS], ids=["chatml", "headers"])
@pytest.mark.parametrize("answer_next", [True, False])
def test_pieces_are_what_transformers_renders(source, answer_next):
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    messages = TALK[:1] if answer_next else TALK
    found = ChatTemplate(source, {"bos_token": "<s>"}, "m").pieces(messages, answer_next=answer_next)
    stripped = [m | {"content": m["content"].strip()} for m in messages]
    how = dict(chat_template=source, add_generation_prompt=answer_next, bos_token="<s>")
    (want,), _ = utils.render_jinja_template([stripped], **how)
    assert "".join(text for text, _ in found) == want
    assert [text for text, by in found if by] == [m["content"] for m in stripped]
    assert not any("\ue000" in text for text, _ in found)


def test_the_template_of_a_folder():
    def config(**entries):
        return {"tokenizer_config.json": json.dumps(entries).encode()}

    assert template_of({}, "m") is None and template_of(config(bos_token="<s>"), "m") is None
    ask = [dict(role="user", content="Q")]
    several = [dict(name="tools", template="x"), dict(name="default", template=HEADERS)]
    for files in (
        config(chat_template=HEADERS, bos_token="<s>"),
        config(chat_template=several, bos_token={"content": "<s>"}),
        config(chat_template="not this", bos_token="<s>") | {"chat_template.jinja": HEADERS.encode()},
    ):
        (first, by), *_ = template_of(files, "m").pieces(ask, answer_next=True)
        assert first == "<s><|header|>user<|end|>\n\n" and not by
    for content, said in (
        (b"{", ", line 1: not JSON"),
        (b"[]", " is no JSON object"),
        (b"\xff", ", line 1: not UTF-8"),
    ):
        with pytest.raises(ValueError, match=f"m: tokenizer_config.json{said}.*; "):
            template_of({"tokenizer_config.json": content}, "m")
    for template in (several[:1], {"default": "x"}, ["x"]):
        with pytest.raises(ValueError, match="m: chat_template .* is no text, and none is named 'default'"):
            template_of(config(chat_template=template), "m")


@pytest.mark.parametrize(
    "source, why",
    [
        ("{% for m in messages %}", "is no Jinja"),
        ("{{ raise_exception('roles must alternate') }}", "fails .roles must alternate."),
        ("{{ messages[7].content }}", "fails"),
        ("{{ ''.__class__.__mro__ }}{{ messages.__class__.__init__.__globals__ }}", "fails"),
        ("{{ messages[0].update({'content': 'x'}) }}", "fails"),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "leaves out the user's words"),
        ("{{ messages[0].content }}{{ messages[0].content }}", "repeats the user's words"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "runs on after 0.2 seconds"),
    ],
    ids=["broken", "raises", "out of range", "escapes", "writes", "silent", "twice", "loops"],
)
def test_a_bad_template_is_one_line(source, why, monkeypatch):
    monkeypatch.setattr("data.chat.SECONDS", 0.2)
    with pytest.raises(ValueError, match=why) as error:
        ChatTemplate(source, {}, "m").pieces([dict(role="user", content="Q")], answer_next=True)
    assert "--prompt plain" in str(error.value) and "\n" not in str(error.value)


def test_it_renders_outside_the_main_thread():
    found = []
    ask = [dict(role="user", content="Q")]
    thread = threading.Thread(target=lambda: found.append(ChatTemplate(CHATML, {}, "m").pieces(ask, answer_next=False)))
    thread.start()
    thread.join()
    assert ("Q", True) in found[0]
