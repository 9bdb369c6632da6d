"""The page is one self-contained file that shows all of a report, hostile text included."""

import base64
import hashlib
import re
from html.parser import HTMLParser

import pytest
from invented_runs import falling, three_losses, write_run

from eval.report import build as rp
from eval.report import charts


class Page(HTMLParser):
    """Everything a page could fetch, its tags, its text outside styles, and whether tags are balanced."""

    VOID = ("meta", "img", "br", "hr")

    def __init__(self, text):
        super().__init__()
        self.links, self.tags, self.text, self.open = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "srcset", "action", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """One full report: three losses over two seeds, an unfinished run, hostile text everywhere."""
    root = tmp_path_factory.mktemp("page")
    folders = three_losses(root, seeds=(1, 2))
    hostile = {"loss": "focal", "data": "a<b>|&c"}
    events = [{"step": 300, "event": "nonfinite_loss", "note": "<i>|"}, {"step": 320, "event": "nonfinite_loss"}]
    folders.append(write_run(root / "half", config=hostile, curve=falling(33)[:4], events=events))
    report = rp.build(folders, "A <title> & more")
    rp.write(report, root / "out")
    return report


def test_html_is_one_file_that_fetches_nothing(page):
    text = (page.out / "report.html").read_text()
    parsed = Page(text)
    assert not parsed.open
    assert all(link.startswith("#part-") for link in parsed.links) and len(parsed.links) > 6  # the contents
    assert not set(parsed.tags) & {"link", "iframe", "object", "base", "img"} and parsed.tags.count("script") == 2
    addresses = re.findall(r"https?:[^ ]*", text)
    assert "url(" not in text and "@import" not in text and addresses == ["https://github.com/leeoniya/uPlot"]
    script = text.rpartition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = re.search('Content-Security-Policy" content="([^"]*)"', text)[1].replace("&#39;", "'")
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy
    assert "Permission is hereby granted, free of charge" in script  # uPlot's licence goes with it
    assert set(page.figures) == {"curves", "training", "reliability_val", "bands_val", "frontier", "forecasts"}
    for name in page.figures:
        assert (page.out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert b"<svg" in (page.out / f"{name}.svg").read_bytes()


def test_html_shows_hostile_text_as_text(page):
    parsed = Page((page.out / "report.html").read_text())
    text = "".join(parsed.text)
    assert "A <title> & more" in text and "The <river> & the|hill" in text and "<b>&amp;</b> | pipe" in text
    assert "a<b>|&c" in text and "note <i>|" in text
    assert "river" not in parsed.tags and "i" not in parsed.tags


def test_markdown_tables_keep_their_columns_and_pictures_exist(page):
    text = (page.out / "report.md").read_text()
    tables = re.findall(r"(?:^\|.*\n)+", text, re.M)
    assert len(tables) >= 6
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1, table
    assert "a\\<b\\>\\|\\&c" in text
    names = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert names == [f"{name}.png" for name in page.figures] and all((page.out / name).exists() for name in names)


def test_the_page_says_what_was_run(page):
    text = "".join(Page((page.out / "report.html").read_text()).text)
    for fact in (
        "fixture device",
        "python train_lm.py --fixture",
        ("f1x7u2e" * 5)[:10],
        "torch 0.0",
        "7 runs (6 finished)",
    ):
        assert fact in text
    assert "nonfinite_loss" in text and "300 to 320" in text
    assert "Distinct-2" in text and "0.830" in text and "MB = 1e6 bytes" in text


def test_an_unfinished_run_is_in_the_curves_only(page):
    focal = next(arm for arm in page.arms if arm.loss == "focal")
    assert not focal.finished and charts.points(focal.runs[0], "val", "step", "ppl")
    assert any("UNFINISHED" in w and "half" in w and "step 400 of 1000" in w for w in page.warnings)
    tables = [block[1] for block in page.blocks if block[0] == "table"]
    results = next(t for t in tables if t.head[1] == ("n", "seeds", False, "", ""))
    assert [line[0].text for line in results.rows] == ["ce", "ce + temperature", "brier", "dpsm"]
