"""The code that a run ran: what its folder's ``source/`` holds, compared by meaning and not by letter.

A run keeps every module of the tree that it imported, by its path. Comments, formatting and docstrings are no
difference. A file that is no Python, as far as this interpreter can tell, is compared as text.
"""

import ast
import functools
import warnings
from collections import Counter
from pathlib import Path

from runtime.folder import source_folders
from schedules import textlines

DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def read_sources(run: Path) -> dict[str, int]:
    """Path in the tree -> what `meaning` says of the file that the run folder ``run`` has of it, the last one where the
    run was resumed under other code; empty where it keeps none."""
    files = [
        (f.relative_to(folder).as_posix(), f) for folder in source_folders(run) for f in sorted(folder.rglob("*.py"))
    ]
    return {name: meaning(textlines.read_text(f)) for name, f in files}


@functools.lru_cache(maxsize=4096)
def meaning(text: str) -> int:
    """A number that two texts share if they are the same program, up to docstrings."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of escapes in strings, which are not ours to report
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return hash(text)
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    return hash(ast.dump(tree))


def other_files(a: dict[str, int], b: dict[str, int]) -> list[str]:
    """Files that both sides hold and that are not the same program."""
    return sorted(name for name in a.keys() & b.keys() if a[name] != b[name])


def usual(sources: list[dict[str, int]]) -> dict[str, int]:
    """Of each file what most runs ran; of equally many the first."""
    names = {name for source in sources for name in source}
    return {n: Counter(source[n] for source in sources if n in source).most_common(1)[0][0] for n in names}
