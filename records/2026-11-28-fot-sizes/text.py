"""The text of this record: python text.py NOVELS OUT. The novels by file name, numbered from 0: every sixth from number
21 on is for training; the first 30,000 characters of numbers 19 and 25 are val.txt and test.txt."""

import sys
from pathlib import Path

source, out = Path(sys.argv[1]), Path(sys.argv[2])
texts = [f.read_text(encoding="utf-8", errors="replace") for f in sorted(source.glob("*.txt"))]
out.mkdir(parents=True)
(out / "train.txt").write_text("\n\n".join(texts[21::6]), encoding="utf-8")
for name, number in (("val", 19), ("test", 25)):
    (out / f"{name}.txt").write_text(texts[number][:30_000], encoding="utf-8")
