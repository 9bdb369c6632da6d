"""Text for language modelling: a named set or a folder -> cached tokens.

    python -m data.lm pydoc --tokenizer bpe:4096
    python -m data.lm wikitext103 --tokenizer gpt2
    python -m data.lm my_texts/ --tokenizer gpt2 --one-set

prepares the cache ahead of training and prints what is in it.
"""

import sys

if not __package__:  # a file by its name finds no package
    print("python -m data.lm: error: type it like this, in the folder that holds data/", file=sys.stderr)
    sys.exit(2)

from collections.abc import Iterable
from dataclasses import dataclass

from data.cache import TokenSet, cached_tokens
from data.sources import TEXT_NAMES, TEXT_SPLITS, Source, open_all, open_source
from data.tokenizer import Tokenizer, load_tokenizer
from runtime.cli import Parser, user_errors
from schedules.commandline import alive


@dataclass(frozen=True)
class Corpus:
    """The splits that were asked for and exist, and the tokenizer they were made with."""

    train: TokenSet | None
    val: TokenSet | None
    test: TokenSet | None
    tokenizer: Tokenizer
    name: str
    origin: str  # where the text was read, for the run's log


def load_corpus(
    name_or_folder: str, *, tokenizer: str | Tokenizer, cache, splits: Iterable[str] = TEXT_SPLITS
) -> Corpus:
    """The tokens of a named set or a folder, from the folder ``cache`` or made there.

    ``tokenizer`` is a Tokenizer or a spec: gpt2, bpe:N, a folder. ``splits`` are those of train, val and test that are
    wanted; a missing train or val is an error, a missing test is None. Local text is read and hashed at each call, to
    know whether the cache still holds it. Of several processes let one call this first; if all do, they make the same
    file. Raises ValueError, one line, for all that can be wrong."""
    splits = tuple(splits)
    if isinstance(tokenizer, str) and tokenizer.startswith("bpe:"):
        source = open_source(name_or_folder, dict.fromkeys(("train", *splits)))
        train = source.splits["train"]
        how = dict(documents=train.documents, cache=cache, corpus=f"{source.name}-{train.hash[:12]}")
    else:
        source, how = open_source(name_or_folder, splits), {}
    tokenizer = load_tokenizer(tokenizer, **how)
    sets = {split: _tokens(source, split, tokenizer, cache) for split in splits if split in source.splits}
    return Corpus(*(sets.get(split) for split in TEXT_SPLITS), tokenizer, source.name, source.origin)


def load_text_set(folder_or_name: str, tokenizer: str | Tokenizer, cache) -> TokenSet:
    """One evaluation set: all text of a folder, or the test split of a named set. A ``tokenizer`` bpe:N is refused;
    otherwise as load_corpus."""
    return _tokens(open_all(folder_or_name), "all", load_tokenizer(tokenizer), cache)


def _tokens(source: Source, split: str, tokenizer: Tokenizer, cache) -> TokenSet:
    part = source.splits[split]
    return cached_tokens(cache, source.name, split, part.documents, tokenizer, part.hash, total_bytes=part.bytes)


@alive()
def main(arguments: list[str] | None = None) -> None:
    parser = Parser(usage=None, prog="python -m data.lm", description="Prepare and list a corpus' token cache.")
    parser.add_argument("data", help=f"{', '.join(TEXT_NAMES)}, or a folder of text")
    parser.add_argument("--tokenizer", default="gpt2", help="gpt2, bpe:N or a folder (default: %(default)s)")
    parser.add_argument("--cache", default="cache", help="folder of the token files (default: %(default)s)")
    parser.add_argument("--splits", default=",".join(TEXT_SPLITS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--one-set", action="store_true", help="all text as one evaluation set, without splits")
    given = parser.parse_args(arguments)
    with user_errors():
        if given.one_set:
            tokenizer, origin = load_tokenizer(given.tokenizer), given.data
            sets = [load_text_set(given.data, tokenizer, given.cache)]
        else:
            splits = filter(None, given.splits.split(","))
            corpus = load_corpus(given.data, tokenizer=given.tokenizer, cache=given.cache, splits=splits)
            tokenizer, origin = corpus.tokenizer, corpus.origin
            sets = [s for s in (corpus.train, corpus.val, corpus.test) if s is not None]
    print(f"text       {origin}")
    print(f"tokenizer  {tokenizer.name}, {tokenizer.vocab_size} tokens, {tokenizer.hash[:12]}")
    print(f"{'split':24}{'documents':>12}{'tokens':>16}{'bytes':>16}{'bytes/token':>13}  file")
    for s in sets:
        ratio = s.bytes / (len(s.tokens) - s.documents)
        print(f"{s.name:24}{s.documents:12,}{len(s.tokens):16,}{s.bytes:16,}{ratio:13.3f}  {s.path}")
        if s.losses:
            print(f"{'':24}{s.losses}")


if __name__ == "__main__":
    main()
