"""Long logs of many runs make a page that is small and opens at once. The long form: see many_runs.py."""

import time

from browser import Browser
from many_runs import make

from eval.report import build as rp


def test_twenty_runs_open_at_once(tmp_path):
    report = rp.build(make(tmp_path, runs=20, points=600))
    report.figures.clear()
    rp.write(report, tmp_path / "out")
    page = tmp_path / "out" / "report.html"
    lines = next(b[2] for b in report.blocks if b[0] == "charts" and b[1] == "training")["charts"][0]["lines"]
    assert len(lines) == 4 and all(200 < len(line["x"]) <= 301 and line["x"][-1] == 6000 for line in lines)
    assert page.stat().st_size < 1.5e6
    with Browser(tmp_path / "browser") as browser:
        browser.look(1280, 900)
        begun = time.monotonic()
        browser.open(page)
        browser.until("document.documentElement.dataset.ready")
        assert time.monotonic() - begun < 20  # a busy machine; the long form's 3 s are measured by hand
        assert browser.value("PANELS.every(p => p.plot.data[0].length > 0)") and browser.said() == []
