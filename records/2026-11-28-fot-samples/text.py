"""The texts of this record: python text.py NOVELS OUT makes OUT/choose and OUT/judge.

The novels by file name, numbered from 0. choose (the first text of ../2026-11-27-fot-decay): every sixth from number 2
on is for training, the first 60,000 characters of numbers 0 and 1 are val.txt and test.txt. judge, which no record
trained or judged on: every sixth from number 11 on, numbers 13 and 15.
"""

import sys
from pathlib import Path

source, out = Path(sys.argv[1]), Path(sys.argv[2])
texts = [f.read_text(encoding="utf-8", errors="replace") for f in sorted(source.glob("*.txt"))]
for folder, first, held_out in ((out / "choose", 2, (0, 1)), (out / "judge", 11, (13, 15))):
    folder.mkdir(parents=True)
    (folder / "train.txt").write_text("\n\n".join(texts[first::6]), encoding="utf-8")
    for name, number in zip(("val", "test"), held_out, strict=True):
        (folder / f"{name}.txt").write_text(texts[number][:60_000], encoding="utf-8")
