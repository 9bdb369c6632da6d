"""Tokenizers: round trips, agreement of tiktoken, tokenizers and transformers, their files, and bad ones."""

import json
import logging
from pathlib import Path

import pytest
from text_files import HARD, LM_DATA, fill, message, needs_lm_data, texts, topics

from data.sources import open_source
from data.tokenizer import EOS, Tokenizer, load_tokenizer, train_bpe


def test_bpe_round_trip_determinism_and_specials(bpe):
    assert train_bpe(topics(), 600) == train_bpe(topics(), 600)
    assert bpe.vocab_size == 600 and bpe.decode([bpe.eos_id]) == EOS
    for text in HARD + topics(3):
        ids = bpe.encode(text)
        assert bpe.decode(ids) == text
        assert bpe.eos_id not in ids  # a literal <|endoftext|> is ordinary text
    assert bpe.encode("") == []
    message(lambda: bpe.decode([600]), "600")
    message(lambda: bpe.decode([-1]), "-1")


def test_tokenizer_survives_its_files(bpe, tmp_path):
    again = Tokenizer.from_files(bpe.files(), bpe.name)
    assert again.hash == bpe.hash and again.files() == bpe.files() and again.name == bpe.name
    assert again.encode(HARD[0]) == bpe.encode(HARD[0])
    from_folder = load_tokenizer(str(fill(tmp_path / "mine", bpe.files())))
    assert from_folder.hash == bpe.hash and from_folder.name == "mine"
    other = Tokenizer.from_files({"tokenizer.json": train_bpe(topics(), 601)})
    assert other.hash != bpe.hash


def gpt2_style(folder: Path) -> Path:
    """vocab.json and merges.txt of a byte-level BPE with <|endoftext|> as token 0."""
    from tokenizers import Tokenizer as Backend

    folder.mkdir()
    Backend.from_buffer(train_bpe(topics(), 600)).model.save(str(folder))
    return folder


def test_tiktoken_and_tokenizers_agree(bpe, tmp_path):
    """The same merges through both libraries: two implementations of one definition."""
    other = load_tokenizer(str(gpt2_style(tmp_path / "g")))
    assert other.vocab_size == 600 and other.eos_id == bpe.eos_id
    for text in HARD + topics(5):
        assert other.encode(text) == bpe.encode(text)
        assert other.decode(other.encode(text)) == text
    assert other.decode([other.eos_id]) == EOS


def test_long_documents_are_cut_without_changing_tokens(bpe, tmp_path, monkeypatch):
    import data.tokenizer as module

    documents = ["\n".join(topics(10)), "".join(HARD) * 20, "a\nb\n\nc \nd\n 'll\n'll\r\n\ne" * 50, ""]
    documents += [" ".join(topics(4)).replace("\n", " "), "it's  2 -- x 'll\t" * 40]  # no line ends: cut at blanks
    tiktoken = load_tokenizer(str(gpt2_style(tmp_path / "g")))
    for tokenizer in (bpe, tiktoken):
        whole = [ids.tolist() for ids in tokenizer.encode_documents(documents)]
        monkeypatch.setattr(module, "PIECE_CHARACTERS", 40)
        monkeypatch.setattr(module, "BATCH_CHARACTERS", 50)
        assert min(len(list(module._pieces(documents[i], 40))) for i in (0, 4)) > 100  # they are in fact cut
        cut = [ids.tolist() for ids in tokenizer.encode_documents(documents)]
        monkeypatch.undo()
        assert cut == whole and len(whole) == len(documents) and whole[3] == []


@needs_lm_data
def test_gpt2_agrees_with_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = load_tokenizer("gpt2")
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.name) == (50257, 50256, "gpt2")
    peer = transformers.GPT2TokenizerFast.from_pretrained(Path(LM_DATA) / "tokenizers" / "gpt2")
    documents = texts(open_source("wikitext2", ("test",)), "test")
    assert len(documents) == 60  # the articles of WikiText-2's test set, by its authors' count
    assert "".join(documents).encode() == (Path(LM_DATA) / "wikitext-2" / "test.txt").read_bytes()
    for document, ids in zip(documents, tokenizer.encode_documents(documents), strict=True):
        assert ids.tolist() == peer(document)["input_ids"]
    for text in HARD:
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.encode(text) == peer(text, split_special_tokens=True)["input_ids"]


@needs_lm_data
def test_gpt2_loads_tiktokens_own_ranks():
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    from data.tokenizer import GPT2_FILES, _byte_characters

    folder = Path(LM_DATA) / "tokenizers" / "gpt2"
    (_, _, vocab_sha), (_, _, merges_sha) = GPT2_FILES
    ranks = data_gym_to_mergeable_bpe_ranks(
        str(folder / "merges.txt"), str(folder / "vocab.json"), merges_sha, vocab_sha
    )
    vocab = json.loads((folder / "vocab.json").read_bytes())
    byte_of = {c: b for b, c in enumerate(_byte_characters())}
    assert {bytes(byte_of[c] for c in word): i for word, i in vocab.items() if word != EOS} == ranks


@pytest.mark.parametrize("kind", ["bpe", pytest.param("gpt2", marks=needs_lm_data)])
def test_files_load_in_autotokenizer(kind, bpe, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = bpe if kind == "bpe" else load_tokenizer("gpt2")
    peer = transformers.AutoTokenizer.from_pretrained(fill(tmp_path / "t", tokenizer.files()))
    assert peer.eos_token == EOS and peer.eos_token_id == tokenizer.eos_id and len(peer) == tokenizer.vocab_size
    for text in HARD[1:] + topics(2):
        ids = tokenizer.encode(text)
        assert peer(text)["input_ids"] == ids
        assert peer.decode(ids) == text
    # transformers 4 takes the spaces before punctuation away unless told not to.
    assert json.loads(tokenizer.files()["tokenizer_config.json"])["clean_up_tokenization_spaces"] is False


def test_tokenizer_errors(bpe, tmp_path, monkeypatch, no_lm_data):
    message(lambda: load_tokenizer("gpt3"), "gpt3", "bpe:4096", "folder")
    message(lambda: load_tokenizer("bpe:100", documents=topics, cache=tmp_path), "257")
    message(lambda: load_tokenizer("bpe:600"), "train split")
    message(lambda: load_tokenizer(str(fill(tmp_path / "a", {"vocab.json": "{}"}))), "merges.txt", "found vocab.json")
    message(lambda: load_tokenizer(str(fill(tmp_path / "b", {"tokenizer.json": "{"}))), "not JSON")
    message(lambda: load_tokenizer(str(fill(tmp_path / "c", {"tokenizer.json": "{}"}))), "cannot be loaded")
    files = {"vocab.json": '{"a": 0}', "merges.txt": "#version: 0.2\na b\n"}
    message(lambda: load_tokenizer(str(fill(tmp_path / "d", files))), "not a GPT-2 style")
    files["tokenizer_config.json"] = '{"tokenizer_class": "Qwen2Tokenizer"}'
    message(lambda: load_tokenizer(str(fill(tmp_path / "e", files))), "Qwen2Tokenizer", "tokenizer.json")
    files = bpe.files() | {"tokenizer_config.json": b'{"eos_token": "</s>"}'}
    message(lambda: Tokenizer.from_files(files, "f"), "</s>", "eos_token")
    # ids that do not follow the merges would be joined in the wrong order by tiktoken
    folder = gpt2_style(tmp_path / "swapped")
    vocab = json.loads((folder / "vocab.json").read_text())
    a, b = (next(word for word, i in vocab.items() if i == wanted) for wanted in (300, 301))
    vocab[a], vocab[b] = vocab[b], vocab[a]
    fill(folder, {"vocab.json": json.dumps(vocab)})
    message(lambda: load_tokenizer(str(folder)), "order of the ids")


def test_gpt2_without_network_or_with_other_files(tmp_path, monkeypatch, no_lm_data):
    import tiktoken.load

    def offline(*_):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(tiktoken.load, "read_file_cached", offline)
    message(lambda: load_tokenizer("gpt2"), "no route", "folder", "vocab.json and merges.txt")
    fill(tmp_path / "tokenizers" / "gpt2", {"vocab.json": "{}", "merges.txt": ""})
    monkeypatch.setenv("LM_DATA", str(tmp_path))
    message(lambda: load_tokenizer("gpt2"), "vocab.json is not GPT-2's")


def test_a_small_text_says_that_its_vocabulary_is_small(caplog):
    with caplog.at_level(logging.WARNING, "scorecast"):
        definition = train_bpe(["ab ab"], 1000)
    assert "bpe:1000 has only" in caplog.text
    assert 257 <= Tokenizer.from_files({"tokenizer.json": definition}).vocab_size < 1000
