"""Neighbours of a few words, and a folder of lists with them as the synonym attack reads it."""

import json
from pathlib import Path

NEIGHBOURS = {
    "film": ["movie", "flick", "picture"],
    "old": ["aged", "elderly"],
    "big": ["huge", "vast"],
    "the": ["les"],
    "town": ["city", "the"],
}


def folder_of_lists(path: Path, **files) -> Path:
    content = {
        "counterfitted_neighbors.json": json.dumps(NEIGHBOURS),
        "stopwords_textfooler.txt": "the\na\nof\n",
        "counter_fitting_constraints/ppdb_antonyms.txt": "old young \nold  aged\n",
    } | files
    (path / "counter_fitting_constraints").mkdir(parents=True)
    for name, text in content.items():
        if text is not None:
            (path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return path
