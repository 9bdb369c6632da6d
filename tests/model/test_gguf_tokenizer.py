"""Tokenizers of GGUF files: SentencePiece's BPE by scores, read and written."""

import json
import random

import pytest
from tokenizers import Tokenizer, normalizers, pre_tokenizers

from model.decoder import DecoderConfig
from model.gguf_tokenizer import read_tokenizer, tokenizer_values

WORDS = "apples books coins plums has gets more How many Then total Ann's Ben Cleo was were 12 345 7".split()
TEXTS = [
    "Ann's 345 plums",
    " two  blanks and\n\n lines\t",
    "naïve 日本 🙂",
    "",
    " ",
    "<s> </s> <unk>",
    "a" * 40,
    "▁ as such",
]


@pytest.fixture(scope="module", params=[True, False], ids=["blank in front", "none in front"])
def pieces(request, tmp_path_factory):
    """A small model of SentencePiece's, and what a GGUF file says of it."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="needs sentencepiece (requirements-parity.txt)")
    folder, chance = tmp_path_factory.mktemp("pieces"), random.Random(1)
    text = folder / "text"
    text.write_text("\n".join(" ".join(chance.choices(WORDS, k=12)) for _ in range(300)))
    how = dict(model_type="bpe", vocab_size=420, byte_fallback=True, normalization_rule_name="identity")
    how |= dict(remove_extra_whitespaces=False, add_dummy_prefix=request.param, minloglevel=2)
    sentencepiece.SentencePieceTrainer.train(input=str(text), model_prefix=str(folder / "m"), **how)
    peer = sentencepiece.SentencePieceProcessor(model_file=str(folder / "m.model"))
    ids = range(len(peer))
    kinds = [2 if peer.is_unknown(i) else 3 if peer.is_control(i) else 6 if peer.is_byte(i) else 1 for i in ids]
    values = dict(model="llama", tokens=[peer.id_to_piece(i) for i in ids], scores=[peer.get_score(i) for i in ids])
    values |= dict(token_type=kinds, bos_token_id=1, eos_token_id=2, unknown_token_id=0)
    values["add_space_prefix"] = request.param
    return peer, {f"tokenizer.ggml.{key}": value for key, value in values.items()}


def read(values) -> dict[str, bytes]:
    return read_tokenizer(lambda key, default=None: values.get(key, default), "m.gguf", 64)


def test_tokens_are_those_of_sentencepiece(pieces):
    peer, values = pieces
    files = read(values)
    ours, chance = Tokenizer.from_buffer(files["tokenizer.json"]), random.Random(2)
    ours.encode_special_tokens = True
    mixed = ["".join(chance.choices("aAnpls 1', \n<>xé日", k=30)) for _ in range(100)]
    for text in TEXTS + mixed + [" ".join(chance.choices(WORDS, k=8)) for _ in range(50)]:
        found = ours.encode(text, add_special_tokens=False).ids
        assert found == peer.encode(text), text
        assert ours.decode(found) == peer.decode(found), text
    assert ours.encode("Ann").ids[0] == 1, "the file says nothing of the first token, and the format's own is <s>"
    config = json.loads(files["tokenizer_config.json"])
    assert (config["bos_token"], config["eos_token"], config["unk_token"]) == ("<s>", "</s>", "<unk>")


@pytest.mark.parametrize("bos", [True, False])
def test_what_is_written_is_read_as_it_was(pieces, bos):
    files = read(pieces[1] | {"tokenizer.ggml.add_bos_token": bos})
    newer = bos and pieces[1]["tokenizer.ggml.add_space_prefix"]
    if newer:  # files of the hub say nearly the same in another way
        other = Tokenizer.from_buffer(files["tokenizer.json"])
        other.normalizer = normalizers.Sequence([])
        other.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        files["tokenizer.json"] = other.to_str().encode()
    config = DecoderConfig(430, 8, 8, 1, 1, 1, 8, 64, bos_token_id=1)
    values = tokenizer_values(files, config, "m.gguf") | {"tokenizer.ggml.bos_token_id": 1}
    assert values["tokenizer.ggml.model"] == "llama" and len(values["tokenizer.ggml.scores"]) == 430
    assert values["tokenizer.ggml.token_type"][: len(pieces[0])] == pieces[1]["tokenizer.ggml.token_type"]
    before, after = (Tokenizer.from_buffer(f["tokenizer.json"]) for f in (files, read(values)))
    for text in [t.lstrip() for t in TEXTS[:4]] if newer else TEXTS[:4]:
        assert before.encode(text).ids == after.encode(text).ids
    assert (after.encode("Ann").ids[0] == 1) == bos


def test_what_has_no_name_in_the_format_is_refused(pieces):
    files, config = read(pieces[1]), DecoderConfig(430, 8, 8, 1, 1, 1, 8, 64, bos_token_id=1)
    content = json.loads(files["tokenizer.json"])

    def says(text, **changes):
        changed = content | changes
        with pytest.raises(ValueError, match=f"m.gguf: .*{text}") as error:
            tokenizer_values(files | {"tokenizer.json": json.dumps(changed).encode()}, config, "m.gguf")
        assert "\n" not in str(error.value)

    pairs = content["model"]["merges"]
    made = ["".join(pair) for pair in pairs]
    several = next(i for i, token in enumerate(made) if made.count(token) > 1)
    says("not all pairs", model=content["model"] | dict(merges=pairs[:several] + pairs[several + 1 :]))
    says("changes text in another way", normalizer=dict(type="NFC"))
    says("of type Unigram is not written", model=dict(type="Unigram", vocab={}))
    with pytest.raises(ValueError, match="lacks the tokens, their types or the scores"):
        read({k: v for k, v in pieces[1].items() if not k.endswith("scores")})
    kinds = list(pieces[1]["tokenizer.ggml.token_type"])
    kinds[pieces[1]["tokenizer.ggml.tokens"].index("▁has")] = 4
    with pytest.raises(ValueError, match="a token of the user's with a blank"):
        read(pieces[1] | {"tokenizer.ggml.token_type": kinds})
