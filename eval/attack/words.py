"""The words of a text, one of which may be exchanged: where they stand, their capitals, their part of speech."""

import contextlib
import re
from collections.abc import Callable

# Punctuation, the word, a possessive and punctuation. All but the word stays when the word is exchanged.
_WORD = re.compile(r"(\W*)([^\W\d_]+)((?:['’]s)?\W*)")
_SENTENCE_END = re.compile(r"[.!?:][\"'”’)\]]*$")


class Words:
    """A text as chunks between white space; ``cores[i]`` is the word in chunk i, "" where there is not exactly one.

    `render` gives the text back, character for character where nothing is exchanged."""

    def __init__(self, text: str):
        parts = re.split(r"(\S+)", text)
        self.chunks, self.gaps = parts[1::2], parts[::2]  # of gaps one more than of chunks
        found = [_WORD.fullmatch(chunk) for chunk in self.chunks]
        self.edges = [(m[1], m[3]) if m else ("", "") for m in found]
        self.cores = [m[2] if m else "" for m in found]

    def chunk(self, i: int, core: str) -> str:
        return self.edges[i][0] + core + self.edges[i][1]

    def render(self, changes: dict[int, str]) -> str:
        chunks = [self.chunk(i, changes[i]) if i in changes else chunk for i, chunk in enumerate(self.chunks)]
        return self.gaps[0] + "".join(a + b for a, b in zip(chunks, self.gaps[1:], strict=True))

    def without(self, i: int) -> str:
        """The text less word i: punctuation after it moves to the word before; a possessive goes with it."""
        before, after = self.edges[i]
        left = before + re.sub(r"^['’]s", "", after)
        chunks, gaps = self.chunks[:i] + [left] + self.chunks[i + 1 :], list(self.gaps)
        if not left:  # one of the two gaps around it goes too
            gaps[i + 1 if i < len(chunks) - 1 else i] = ""
        elif not before and i:
            gaps[i] = ""
        return gaps[0] + "".join(a + b for a, b in zip(chunks, gaps[1:], strict=True))

    def window(self, i: int, size: int, changes: dict[int, str]) -> str:
        """``size`` chunks around i, fewer at the ends of the text."""
        first = max(0, i - size // 2)
        near = range(first, min(len(self.chunks), first + size))
        return " ".join(self.chunk(j, changes[j]) if j in changes else self.chunks[j] for j in near)

    def starts_sentence(self, i: int) -> bool:
        return i == 0 or "\n" in self.gaps[i] or bool(_SENTENCE_END.search(self.chunks[i - 1]))


def like(old: str, new: str) -> str:
    """``new``, lower case, with the capitals of ``old``: none, the first, or all."""
    if old.islower():
        return new
    return new.upper() if old.isupper() and len(old) > 1 else new.capitalize()


def exchangeable(words: Words, i: int, keep_names: bool) -> bool:
    """Whether chunk i is one word in plain capitals (word, Word, WORD). With ``keep_names``, a capital is taken for a
    name's unless it is the only one of the word and begins a sentence."""
    core = words.cores[i]
    if not core or not (core.islower() or core.isupper() or core.istitle()):
        return False
    return not keep_names or core.islower() or (core.istitle() and words.starts_sentence(i))


_ENDINGS = {
    "adverb": "ly",
    "-ing": "ing",
    "-ed": "ed",
    "noun": "tion|sion|ment|ness|ity|ism|ship|hood|ance|ence",
    "adjective": "ous|ful|less|able|ible|ive|ical|ic|ish",
    "superlative": "est",
    "-s": "(?<![sui])s",
}


def suffix_class(word: str) -> str:
    """What the ending says about a word: a key of _ENDINGS, or base.

    The first with a known ending after at least three letters counts. Words in -ss, -us and -is are no plurals. It
    stands in for a tagger: it is coarse and has no context, and irregular forms are "base"."""
    return next((name for name, ends in _ENDINGS.items() if re.search(f"...({ends})$", word.lower())), "base")


SameClass = Callable[[Words, int, list[str]], list[bool]]  # (words, position, candidates) -> which may stand there


def same_suffix_class(words: Words, i: int, candidates: list[str]) -> list[bool]:
    own = suffix_class(words.cores[i])
    return [suffix_class(c) == own for c in candidates]


def by_tagger(tag: Callable[[list[list[str]]], list[list[str]]], window: int = 15) -> SameClass:
    """The published check: the candidate has the word's tag in its place, where noun and verb count as one.

    ``tag``: sentences of words -> a coarse tag for each word. It sees ``window`` words around."""

    def same(words: Words, i: int, candidates: list[str]) -> list[bool]:
        first = max(0, i - window // 2)
        near = [core or chunk for core, chunk in zip(words.cores, words.chunks, strict=True)][first : first + window]
        at = i - first
        own, *tags = (s[at] for s in tag([[*near[:at], w, *near[at + 1 :]] for w in (near[at], *candidates)]))
        return [t == own or {t, own} <= {"NOUN", "VERB"} for t in tags]

    return same


POS = ("auto", "nltk", "spacy", "suffix", "none")
_PENN = {"NN": "NOUN", "VB": "VERB", "JJ": "ADJ", "RB": "ADV"}


def part_of_speech(rule: str) -> tuple[str, SameClass | None]:
    """The name, for the output, and the check called nltk, spacy, suffix or none; "auto" is the first that works here.

    Raises ValueError where the package or its data is not there."""
    if rule not in POS:
        raise ValueError(f"--pos {rule!r}; expected one of {', '.join(POS)}")
    if rule == "auto":
        for name in ("nltk", "spacy"):
            with contextlib.suppress(ValueError):
                return part_of_speech(name)
    if rule == "none":
        return "none", None
    try:
        if rule == "nltk":
            import nltk

            tagger = nltk.tag.PerceptronTagger()  # once: it reads its weights anew each time
            name = f"nltk {nltk.__version__} PerceptronTagger"
            return name, by_tagger(lambda texts: [[_PENN.get(t[:2], t) for _, t in tagger.tag(s)] for s in texts])
        if rule == "spacy":
            import spacy
            from spacy.tokens import Doc

            nlp = spacy.load("en_core_web_sm", disable=["parser", "ner", "lemmatizer"])

            def tag(sentences):
                docs = nlp.pipe(Doc(nlp.vocab, words=s) for s in sentences)
                return [["NOUN" if t.pos_ == "PROPN" else t.pos_ for t in doc] for doc in docs]

            return f"spacy {spacy.__version__} en_core_web_sm", by_tagger(tag)
    except (ImportError, LookupError, OSError):
        data = {"nltk": "its data averaged_perceptron_tagger_eng", "spacy": "its model en_core_web_sm"}[rule]
        raise ValueError(f"--pos {rule} needs {rule} and {data}; or take --pos suffix") from None
    return "suffix classes (no tagger)", same_suffix_class
