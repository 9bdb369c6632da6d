"""The token cache: one file a split, a 128-byte header and a memory map of token ids.

The header is little-endian: magic (8 bytes), version u32, bytes a token u32, tokens u64, documents u64, text bytes u64,
vocabulary u32, end-of-text id u32, SHA-256 of the tokenizer's definition, SHA-256 of the source, CRC-32 of the payload
u32, unknown tokens u32, lost characters u32, CRC-32 of the header so far u32. Tokens are uint16 where the vocabulary
has at most 65,536 entries, else uint32. Opening verifies all of it, the payload too, at about 1 GB/s. A file that fails
is an error.
"""

import hashlib
import logging
import os
import re
import struct
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.files import write_cached

log = logging.getLogger("scorecast")

MAGIC = b"SCORETOK"
VERSION = 1
HEADER = struct.Struct("<8sIIQQQII32s32sIII")  # the header's own CRC-32 follows
HEADER_BYTES = HEADER.size + 4


@dataclass(frozen=True)
class TokenSet:
    """The tokens of one split, each document followed by the end-of-text token."""

    tokens: np.ndarray  # 1-D uint16 or uint32 np.memmap, read-only
    documents: int  # how many; the number of end-of-text tokens
    bytes: int  # of the text alone in UTF-8, the denominator of bits per byte
    vocab_size: int
    eos_id: int
    name: str
    path: Path
    hash: str  # SHA-256 hex over the source's hash, the tokenizer's and the tokens' CRC
    tokenizer_hash: str
    unknown: int = 0  # tokens that stand for text without a token
    lost: int = 0  # characters that no token holds, white space aside

    @property
    def text_bytes(self) -> int | None:
        """``bytes``; None where tokens are not all of the text, so that bits per byte would be those of another."""
        return None if self.unknown or self.lost else self.bytes

    @property
    def losses(self) -> str:
        """What of the text is not in the tokens, for people; empty where all is."""
        if not (self.unknown or self.lost):
            return ""
        share = f"{100 * self.unknown / len(self.tokens):.2f} %"
        return f"{self.unknown:,} tokens ({share}) are unknown ones, {self.lost:,} characters lost"


def write_tokens(
    path: Path, documents: Iterable[str], tokenizer, source_hash: str, *, total_bytes=None, title: str = "tokens"
) -> None:
    """Tokenise ``documents`` into the cache file ``path``, which appears whole or not at all.

    A progress bar appears after two seconds; ``total_bytes`` of text is its length where known. Raises ValueError where
    there is no text or the folder cannot be written."""
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")

    def write(file) -> None:
        tokens = count = size = crc = 0
        unknown = lost = 0
        waiting = deque()  # texts whose tokens are still to come, of a tokenizer that may lose some of them

        def counted() -> Iterator[str]:
            nonlocal count, size
            for text in documents:
                waiting.extend([] if tokenizer.whole else [text])
                length = len(text.encode())
                count += 1
                size += length
                bar.update(length)
                yield text

        file.write(bytes(HEADER_BYTES))
        with tqdm(total=total_bytes, desc=title, unit="B", unit_scale=True, delay=2.0, leave=False) as bar:
            for ids in tokenizer.encode_documents(counted()):
                if waiting:
                    one = tokenizer.lost(waiting.popleft(), ids)
                    unknown, lost = unknown + one[0], lost + one[1]
                payload = np.append(ids, tokenizer.eos_id).astype(dtype).tobytes()
                tokens += len(ids) + 1
                crc = zlib.crc32(payload, crc)
                file.write(payload)
        if not count:
            raise ValueError(f"{title}: no text, so no tokens")
        about = tokens, count, size, tokenizer.vocab_size, tokenizer.eos_id
        hashes = bytes.fromhex(tokenizer.hash), bytes.fromhex(source_hash)
        gone = (min(n, 2**32 - 1) for n in (unknown, lost))
        header = HEADER.pack(MAGIC, VERSION, dtype.itemsize, *about, *hashes, crc, *gone)
        file.seek(0)
        file.write(header + struct.pack("<I", zlib.crc32(header)))

    write_cached(Path(path), write)


def open_tokens(
    path: Path, *, name: str = "", tokenizer_hash: str | None = None, source_hash: str | None = None
) -> TokenSet:
    """Open and verify a cache file; the hashes, where given, must be the header's. Raises ValueError, naming the file,
    what is wrong with it and the way out."""
    path = Path(path)

    def check(ok: bool, what: str) -> None:
        if not ok:
            raise ValueError(f"token cache {path} {what}; delete the file and it will be made again")

    try:
        with open(path, "rb") as file:
            raw = file.read(HEADER_BYTES)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise ValueError(f"cannot read the token cache {path} ({error.strerror})") from None
    check(len(raw) == HEADER_BYTES, f"is cut short ({size} bytes)")
    check(raw[:8] == MAGIC, f"is not a token cache (it begins with {raw[:8]!r})")
    check(zlib.crc32(raw[: HEADER.size]) == struct.unpack("<I", raw[HEADER.size :])[0], "has a damaged header")
    _, version, itemsize, count, *about, tokenizer_sha, source_sha, payload_crc, unknown, lost = HEADER.unpack(raw[:-4])
    check(version == VERSION, f"has version {version}, this code reads {VERSION}")
    check(tokenizer_hash in (None, tokenizer_sha.hex()), "was made with another tokenizer")
    check(source_hash in (None, source_sha.hex()), "was made from other text")
    expected = HEADER_BYTES + count * itemsize
    check(size == expected, f"has {size} bytes where its header promises {expected}")
    tokens = np.memmap(path, dtype=f"<u{itemsize}", mode="r", offset=HEADER_BYTES, shape=(count,))
    check(zlib.crc32(tokens) == payload_crc, "has damaged tokens (checksum)")
    digest = hashlib.sha256(source_sha + tokenizer_sha + struct.pack("<QI", count, payload_crc)).hexdigest()
    documents, text_bytes, vocab_size, eos_id = about
    named = dict(name=name or path.stem, path=path, hash=digest, tokenizer_hash=tokenizer_sha.hex())
    return TokenSet(tokens, documents, text_bytes, vocab_size, eos_id, **named, unknown=unknown, lost=lost)


def cached_tokens(
    cache: str | Path, name: str, split: str, text: Callable[[], Iterable[str]], tokenizer, source_hash: str, **writing
) -> TokenSet:
    """The tokens of a split's ``text``, from the folder ``cache`` or made there, ``writing`` as write_tokens takes it.

    The file's name holds both hashes, so that a change of the text or of the tokenizer makes a new file."""
    kind = re.sub(r"[^\w.-]+", "", tokenizer.name)[-40:]
    counted = "" if tokenizer.whole else "-counted"  # older files do not say what was lost
    path = Path(cache) / f"{name}-{split}-{source_hash[:12]}-{kind}-{tokenizer.hash[:12]}{counted}.tokens"
    title = f"{name} {split}"
    if not path.exists():
        log.info("tokenising %s with %s into %s", title, tokenizer.name, path)
        write_tokens(path, text(), tokenizer, source_hash, title=title, **writing)
    found = open_tokens(path, name=title, tokenizer_hash=tokenizer.hash, source_hash=source_hash)
    if found.losses:
        of = f"perplexity is that of what {tokenizer.name} keeps of the text, and there are no bits per byte"
        log.warning("%s: %s; %s", title, found.losses, of)
    return found
