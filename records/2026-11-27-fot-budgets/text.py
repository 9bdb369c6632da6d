"""The text of this record: python text.py NOVELS OUT. The novels by file name, numbered from 0: every sixth from number
6 on is for training; the first 60,000 characters of numbers 7 and 9 are val.txt and test.txt."""

import sys
from pathlib import Path

source, out = Path(sys.argv[1]), Path(sys.argv[2])
files = sorted(source.glob("*.txt"))
out.mkdir(parents=True)
texts = [f.read_text(encoding="utf-8", errors="replace") for f in files]
(out / "train.txt").write_text("\n\n".join(texts[6::6]), encoding="utf-8")
for name, number in (("val", 7), ("test", 9)):
    (out / f"{name}.txt").write_text(texts[number][:60_000], encoding="utf-8")
