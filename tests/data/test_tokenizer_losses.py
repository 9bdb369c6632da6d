"""Tokenizers that others made: what they do not hold of a text is counted, and no text steers a model."""

import json
import logging
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_files import fill, message
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from data import tokenizer as module
from data.lm import load_corpus, main
from data.tokenizer import EOS, EVERY_BYTE, Definition, load_tokenizer, train_bpe
from eval.metrics import measure
from kernels import Calibration

WORDS = "the cat sat on the mat and sold nine tarts. "


def trained(model, trainer, pre, decoder, normalizer=None) -> Tokenizer:
    backend = Tokenizer(model)
    backend.pre_tokenizer, backend.decoder = pre, decoder
    if normalizer:
        backend.normalizer = normalizer
    backend.train_from_iterator([WORDS * 40], trainer)
    return backend


def bytes_seen() -> Tokenizer:
    """Of bytes, those of the training text alone: others vanish."""
    trainer = trainers.BpeTrainer(vocab_size=90, special_tokens=[EOS], show_progress=False)
    pre = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return trained(models.BPE(), trainer, pre, decoders.ByteLevel())


def characters(unk="<unk>") -> Tokenizer:
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=[EOS, *[unk] * bool(unk)], show_progress=False)
    return trained(
        models.BPE(**{"unk_token": unk} if unk else {}), trainer, pre_tokenizers.Metaspace(), decoders.Metaspace()
    )


def word_pieces() -> Tokenizer:
    trainer = trainers.WordPieceTrainer(vocab_size=80, special_tokens=["[UNK]", EOS], show_progress=False)
    how = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(), normalizers.BertNormalizer(lowercase=True)
    return trained(models.WordPiece(unk_token="[UNK]"), trainer, *how)


def whole_words() -> Tokenizer:
    trainer = trainers.WordLevelTrainer(special_tokens=["[UNK]", EOS], show_progress=False)
    how = pre_tokenizers.WhitespaceSplit(), decoders.Fuse()
    return trained(models.WordLevel(unk_token="[UNK]"), trainer, *how)


def unigram(**more) -> Tokenizer:
    """SentencePiece's kind, in whose model the control tokens are pieces like others."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), (EOS, 0.0), ("▁", -3.0)]
    pieces += [(c, -4.0) for c in sorted(set(WORDS) - {" "}) + list("</>|_xfk[]INST")] + [("▁the", -2.0)]
    pieces += [(f"<0x{b:02X}>", -8.0) for b in range(256)] if more else []
    backend = Tokenizer(models.Unigram(pieces, 0, bool(more)))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    if more:
        backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("</s>", EOS)])
    return backend


def raw(backend: Tokenizer) -> bytes:
    return backend.to_str().encode()


@pytest.mark.parametrize(
    "make, text, unknown, lost",
    [
        (bytes_seen, "the caf\u00e9 cat JUDY", 0, 6),  # f, e with its accent, four capitals
        (bytes_seen, "the cat", 0, 0),
        (characters, "the cafe\u0301 X", 3, 3),
        (lambda: characters(""), "the cat X9", 0, 2),
        (word_pieces, "The cat", 0, 1),  # a capital is another character
        (word_pieces, "the cat \u00b5", 1, 1),
        (whole_words, "the dog sat", 1, 3),
        (unigram, "the cat \u4eac", 1, 1),
        (unigram, "the cat", 0, 0),
    ],
)
def test_what_is_not_in_the_tokens_is_counted(make, text, unknown, lost):
    definition = Definition(raw(make()), "a tokenizer")
    assert not definition.whole and definition.lost(text) == (unknown, lost)


def test_a_tokenizer_of_all_bytes_is_whole():
    definition = Definition(train_bpe([WORDS], 300), "t")
    assert definition.whole and definition.lost("\ud55c JUDY") == (0, 0)
    assert {*range(0x80), *range(0x80, 0xC0), *range(0xC2, 0xF5)} == set(EVERY_BYTE.encode())
    assert Definition(raw(unigram(byte_fallback=True)), "t").whole
    partly = json.loads(train_bpe([WORDS], 300))
    name = next(token for token, i in partly["model"]["vocab"].items() if i == 200)  # any byte of the 256
    del partly["model"]["vocab"][name]
    partly["model"]["merges"] = [m for m in partly["model"]["merges"] if name not in "".join(m)]
    assert not Definition(json.dumps(partly).encode(), "t").whole


@pytest.mark.parametrize("state", ["truncation", "padding"])
@pytest.mark.parametrize("make", [bytes_seen, characters, word_pieces, whole_words, unigram])
def test_what_another_program_left_in_a_definition_changes_nothing(make, state):
    backend = make()
    plain = Definition(raw(backend), "t").encode([WORDS, "the"])
    backend.enable_truncation(2) if state == "truncation" else backend.enable_padding(length=99)
    assert Definition(raw(backend), "t").encode([WORDS, "the"]) == plain
    assert backend.encode(WORDS).ids != plain[0]


CONTROLS = ["</s>", EOS, "<think>", "<tool_call>", "[INST]", "[/INST]"]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([*CONTROLS, "<", "th", ">", " ", "cat", "[", "s>", "\u4eac"]), max_size=8).map("".join))
@pytest.mark.parametrize("make", [bytes_seen, unigram, characters])
def test_no_text_holds_a_control_token(make, text):
    backend = make()
    backend.add_special_tokens([AddedToken(EOS, special=True)])
    backend.add_tokens([AddedToken(t, special=False) for t in CONTROLS[2:]])
    definition = Definition(raw(backend), "t")
    assert definition.control.keys() >= set(CONTROLS[1:])
    assert definition.control.keys() & set(CONTROLS) == {t for t in CONTROLS if t in definition.added}
    assert set(definition.control.values()).isdisjoint(definition.encode([text])[0])
    if make is unigram and "\u4eac" not in text:  # and yet all characters are there
        assert "".join(definition.decode(definition.encode([text])[0]).split()) == "".join(text.split())


def test_only_special_tokens_are_left_out_of_an_answer():
    backend = bytes_seen()
    backend.add_tokens([AddedToken("<think>", special=False)])
    definition = Definition(raw(backend), "t")
    ids = [definition.added["<think>"], *definition.encode(["the"])[0], definition.added[EOS]]
    assert definition.decode(ids, special=False) == "<think>the" and definition.decode(ids) == f"<think>the{EOS}"


@pytest.mark.parametrize(
    "content, said",
    [
        (b"{", "line 1: not JSON"),
        (b"[]", "not a JSON object"),
        (b"{}", "cannot be loaded"),
        (b'{"model": {"type": "BPE", "vocab": [], "merges": 3}}', "cannot be loaded"),
        (b"\xff", "not UTF-8"),
        (b'{"model":' * 100_000, "nested too deeply"),
    ],
)
def test_a_broken_definition_is_one_line(content, said, tmp_path):
    message(lambda: Definition(content, "my folder"), "my folder: tokenizer.json", said)
    message(lambda: load_tokenizer(str(fill(tmp_path, {"tokenizer.json": content}))), said)


def test_what_the_library_raises_is_one_line():
    backend = Tokenizer(
        models.WordLevel({"the": 0, EOS: 1}, unk_token="nope")
    )  # a word it does not know is an Exception
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    message(lambda: Definition(raw(backend), "my folder"), "my folder: tokenizer.json cannot tokenise the text")


def test_a_corpus_says_what_its_tokens_do_not_hold(tmp_path, capsys, caplog):
    fill(tmp_path / "lossy", {"tokenizer.json": raw(bytes_seen())})
    fill(tmp_path / "text", {"train.txt": WORDS * 50, "val.txt": WORDS * 20 + "caf\u00e9 JUDY"})
    for _ in range(2):  # made, and opened again
        caplog.clear()
        with caplog.at_level(logging.WARNING, "scorecast"):
            how = dict(tokenizer=str(tmp_path / "lossy"), cache=tmp_path / "cache")
            corpus = load_corpus(str(tmp_path / "text"), **how)
        assert (corpus.val.unknown, corpus.val.lost, corpus.train.losses) == (0, 6, "")
        assert corpus.val.text_bytes is None and corpus.train.text_bytes == corpus.train.bytes == 50 * len(WORDS)
        assert "text val: 0 tokens (0.00 %) are unknown ones, 6 characters lost" in caplog.text
    main([str(tmp_path / "text"), "--tokenizer", str(tmp_path / "lossy"), "--cache", str(tmp_path / "cache")])
    assert "6 characters lost" in capsys.readouterr().out
    bits = [measure(counted(), size=tokens.text_bytes).get("bits_per_byte") for tokens in (corpus.val, corpus.train)]
    assert bits[0] is None and bits[1] > 0


def counted() -> Calibration:
    """Of two tokens."""
    import torch

    from kernels import softmax_moments

    calibration = Calibration(torch.device("cpu"))
    calibration.update(softmax_moments(torch.randn(2, 5), torch.tensor([1, 2])))
    return calibration


@pytest.mark.parametrize("kind", ["words", "one word"])
def test_a_long_line_takes_bounded_memory(kind, monkeypatch):
    """Cut by position; what is waiting is some batches, not the text."""
    monkeypatch.setattr(module, "PIECE_CHARACTERS", 1 << 12)
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 1 << 14)
    size = 1 << 21
    text = "a b" * (size // 3) if kind == "words" else "ab" * (size // 2)
    pieces = list(module._pieces(text, module.PIECE_CHARACTERS))
    assert "".join(piece for piece, _ in pieces) == text and max(len(p) for p, _ in pieces) <= 3 << 12
    tokenizer = load_tokenizer_of(WORDS)
    tracemalloc.start()
    (ids,) = tokenizer.encode_documents([text])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert tokenizer.decode(ids) == text
    assert peak < 12 * len(ids) + (1 << 22)  # the ids twice, as they are joined, and one batch


def load_tokenizer_of(text: str):
    return module.Tokenizer.from_files({"tokenizer.json": train_bpe([text], 300)}, "bpe:300")
