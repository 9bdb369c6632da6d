"""The token cache: what is written is read, damage is found, and readers never see half a file."""

import struct
import threading
import types
import zlib

import numpy as np
import pytest
from text_files import HARD, fill, message, topics

from data.cache import HEADER, HEADER_BYTES, open_tokens, write_tokens

SOURCE = "ab" * 32


def test_cache_round_trip(bpe, tmp_path):
    path = tmp_path / "deep" / "a.tokens"
    write_tokens(path, HARD, bpe, SOURCE)
    got = open_tokens(path, name="a", tokenizer_hash=bpe.hash, source_hash=SOURCE)
    want = [i for text in HARD for i in [*bpe.encode(text), bpe.eos_id]]
    assert got.tokens.tolist() == want and got.tokens.dtype == np.uint16 and isinstance(got.tokens, np.memmap)
    assert not got.tokens.flags.writeable
    assert got.documents == len(HARD) == int((got.tokens == bpe.eos_id).sum())
    assert got.bytes == sum(len(text.encode()) for text in HARD)
    assert (got.name, got.vocab_size, got.eos_id) == ("a", 600, bpe.eos_id)
    write_tokens(tmp_path / "b.tokens", HARD, bpe, "cd" * 32)
    assert open_tokens(tmp_path / "b.tokens").hash != got.hash == open_tokens(path).hash


@pytest.mark.parametrize("vocab_size, dtype", [(65536, np.uint16), (65537, np.uint32)])
def test_cache_dtype_holds_every_id(vocab_size, dtype, tmp_path):
    last = vocab_size - 1
    fake = types.SimpleNamespace(vocab_size=vocab_size, eos_id=0, hash=SOURCE, whole=True)
    fake.encode_documents = lambda documents: (np.array([len(d), last], np.uint32) for d in documents)
    write_tokens(tmp_path / "x", ["a", "bc"], fake, SOURCE)
    tokens = open_tokens(tmp_path / "x").tokens
    assert tokens.tolist() == [1, last, 0, 2, last, 0] and tokens.dtype == dtype


def test_every_damaged_byte_is_found(bpe, tmp_path):
    """A flipped bit anywhere, a lost or an added byte: an error that names the file and the way out."""
    good = tmp_path / "good.tokens"
    write_tokens(good, ["short text"], bpe, SOURCE)
    raw = good.read_bytes()
    bad = tmp_path / "bad.tokens"
    damaged = [raw[:i] + bytes([raw[i] ^ 4]) + raw[i + 1 :] for i in range(len(raw))]
    damaged += [raw[:-1], raw[:-2], raw[:HEADER_BYTES], raw[: HEADER_BYTES - 1], b"", raw + b"\0", b"PK" + raw]
    for content in damaged:
        bad.write_bytes(content)
        message(lambda: open_tokens(bad), str(bad), "delete the file")
        assert bad.read_bytes() == content  # never repaired silently
    for content, word in [(b"NOTATOKEN" + raw, "not a token cache"), (raw[:50], "cut short"), (raw[:-2], "promises")]:
        bad.write_bytes(content)
        message(lambda: open_tokens(bad), word)
    fields = list(HEADER.unpack(raw[: HEADER.size]))
    fields[1] = 2
    header = HEADER.pack(*fields)
    bad.write_bytes(header + struct.pack("<I", zlib.crc32(header)) + raw[HEADER_BYTES:])
    message(lambda: open_tokens(bad), "version 2")
    message(lambda: open_tokens(good, tokenizer_hash=SOURCE), "another tokenizer")
    message(lambda: open_tokens(good, source_hash=bpe.hash), "other text")
    message(lambda: open_tokens(tmp_path / "none"), "cannot read")


def test_an_interrupted_write_leaves_nothing(bpe, tmp_path):
    path = tmp_path / "a.tokens"

    def documents():
        yield "some text"
        assert not path.exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_tokens(path, documents(), bpe, SOURCE)
    assert list(tmp_path.iterdir()) == []
    message(lambda: write_tokens(path, [], bpe, SOURCE, title="empty val"), "empty val", "no text")
    assert list(tmp_path.iterdir()) == []
    message(lambda: write_tokens(fill(tmp_path, {"f": "x"}) / "f" / "a", ["x"], bpe, SOURCE), "cannot write", "folder")


def test_readers_never_see_half_a_file(bpe, tmp_path):
    path, stop, errors = tmp_path / "a.tokens", threading.Event(), []
    write_tokens(path, topics(4), bpe, SOURCE)
    want = open_tokens(path).hash

    def write():
        while not stop.is_set():
            write_tokens(path, topics(4), bpe, SOURCE)

    writers = [threading.Thread(target=write) for _ in range(2)]
    for writer in writers:
        writer.start()
    for _ in range(200):
        try:
            errors += [] if open_tokens(path).hash == want else ["other content"]
        except ValueError as error:
            errors.append(str(error))
    stop.set()
    for writer in writers:
        writer.join()
    assert errors == [] and [p.name for p in tmp_path.iterdir()] == ["a.tokens"]
