"""The report in a real browser: pointed at, clicked through, on a phone and in the dark."""

import json

import pytest
from browser import Browser
from invented_runs import three_losses, write_run

from eval.report import build as rp

GONE = "document.title = 'gone'"
EVIL = f'</script><script>{GONE}</script><img src=x onerror="{GONE}"> <!-- \u202e \u2028 {{{{7*7}}}} {{% raw %}} \\'


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A report with hostile texts in titles, arms, prompts and samples, and 14 columns of results."""
    root = tmp_path_factory.mktemp("page")
    folders = three_losses(root, seeds=(1, 2))
    config = {"loss": EVIL, "data": "fixture"}
    samples = [{"prompt": EVIL, "text": EVIL}]
    folders.append(write_run(root / "evil'><b>run", config=config, summary={}, samples=samples))
    report = rp.build(folders, EVIL)
    report.figures.clear()
    rp.write(report, root / "out")
    with Browser(tmp_path_factory.mktemp("browser")) as browser:
        browser.look(1280, 900)
        browser.open(root / "out" / "report.html")
        browser.until("document.documentElement.dataset.ready")
        yield browser


def panel(title: str) -> str:
    return f"PANELS.find(p => p.chart.title === {json.dumps(title)})"


def point(page, title: str, x: float) -> str:
    """What the chart says with the mouse at ``x``."""
    chart = panel(title)
    page.value(f"{chart}.box.scrollIntoView({{block: 'center'}})")
    at = page.value(
        f"(() => {{ const p = {chart}.plot, r = p.over.getBoundingClientRect();"
        f" return [r.left + p.valToPos({x}, 'x'), r.top + r.height / 2] }})()"
    )
    for shift in (-4, -2):  # from the left, as the last step is at the edge
        page("Input.dispatchMouseEvent", type="mouseMoved", x=at[0] + shift, y=at[1])
    page.until(f"!{chart}.tip.hidden && {chart}.tip.textContent")
    return page.value(f"{chart}.tip.innerText")


def test_pointing_at_a_chart_says_the_values_and_the_legend_switches_arms(page):
    said = point(page, "Perplexity by step", 1000)
    # falling() of CE, seeds 1 and 2: 30 * exp(3 exp(-4 * 1000 / 300)), less 0.02 for the first seed
    assert "ce: 29.99 [29.98, 30] at 1000" in said and "brier: 36" in said, said
    assert page.value(f"{panel('Perplexity by step')}.log") == "y"
    button = "[...document.querySelector('[data-name=curves]').querySelectorAll('.legend button')][0]"
    assert page.value(f"{button}.innerText") == "ce"
    page.value(f"{button}.click()")
    assert page.value(f"{button}.getAttribute('aria-pressed')") == "false"
    said = point(page, "Perplexity by step", 900)
    assert "ce:" not in said and "brier: 36" in said, said
    assert "ce:" not in point(page, "ECE by step", 900)  # in all charts of the group
    page.value(f"{button}.click()")
    assert "ce: 29.99" in point(page, "Perplexity by step", 1000)


def test_a_logarithmic_axis_has_ticks_where_the_data_are(page):
    ticks = page.value(f"{panel('Perplexity by step')}.plot.axes[1]._splits")
    low, high = page.value(f"(s => [s.min, s.max])({panel('Perplexity by step')}.plot.scales.y)")
    inside = [tick for tick in ticks if low <= tick <= high]
    assert len(inside) >= 5 and inside[0] < low * (high / low) ** 0.34, (inside, low, high)
    head = f"{panel('Perplexity by step')}.box.querySelector('button')"
    page.value(f"{head}.click()")
    assert page.value(f"{panel('Perplexity by step')}.plot.scales.y.distr") == 1
    page.value(f"{head}.click()")


def test_tables_sort_by_their_numbers_and_back(page):
    find = "[...document.querySelectorAll('table.data')].find(t => t.tHead.innerText.startsWith('arm') && "
    table = f"({find}t.tHead.innerText.includes('PPL')))"
    column = f"[...{table}.tHead.rows[0].cells].findIndex(c => c.innerText.startsWith('PPL'))"
    values = f"[...{table}.tBodies[0].rows].map(r => parseFloat(r.cells[{column}].innerText))"
    first = page.value(values)
    page.value(f"{table}.tHead.rows[0].cells[{column}].click()")
    assert page.value(values) == sorted(first) != first
    page.value(f"{table}.tHead.rows[0].cells[{column}].click()")
    assert page.value(values) == sorted(first, reverse=True)
    page.value(f"{table}.tHead.rows[0].cells[{column}].click()")
    assert page.value(values) == first


def test_a_phone_reads_every_column_and_keeps_the_arm_in_sight(page):
    page.look(390, 800, phone=True)
    try:
        page.until("innerWidth === 390")
        assert page.value("document.documentElement.scrollWidth") == 390  # the page itself does not scroll sideways
        page.until(
            f"Math.abs({panel('Perplexity by step')}.plot.width - {panel('Perplexity by step')}.at.clientWidth) < 2"
        )
        assert page.value(f"{panel('Perplexity by step')}.plot.width") > 330
        box = "[...document.querySelectorAll('.wide')].find(w => w.scrollWidth > 2 * w.clientWidth)"
        page.value(f"{box}.scrollTo({{left: 1e4}})")
        cells = f"{box}.querySelector('tbody tr').cells"
        left, last, right = (
            page.value(f"{cells}[0].getBoundingClientRect().left"),
            page.value(f"[...{cells}].at(-1).getBoundingClientRect().right"),
            page.value(f"{box}.getBoundingClientRect().right"),
        )
        assert abs(left - page.value(f"{box}.getBoundingClientRect().left")) < 1 and last <= right + 1
        assert page.value(f"{cells}[0].offsetWidth") < 160
    finally:
        page.look(1280, 900)


def test_dark_is_dark_for_tables_and_charts(page):
    def colours():
        back = page.value("getComputedStyle(document.querySelector('table.data td')).backgroundColor")
        return back, page.value(f"{panel('NLL')}.plot.series[1].stroke()")

    light = colours()
    page.look(1280, 900, dark=True)
    page.until(f"{panel('NLL')}.plot.series[1].stroke() !== {json.dumps(light[1])}")
    assert light == ("rgb(255, 255, 255)", "rgba(51,51,51,1)")
    assert colours() == ("rgb(22, 24, 26)", "rgba(133,133,133,1)")  # 0.6 * 51 + 102
    page.look(1280, 900)


def test_on_paper_charts_stay_in_their_panels_and_nothing_is_folded(page):
    """A4 or Letter is narrower than the window for which the charts were drawn."""
    fits = "[...document.querySelectorAll('.panel canvas')].every(c => c.getBoundingClientRect().right <= "
    fits += "c.closest('.panel').getBoundingClientRect().right + 1)"
    page.value("document.querySelector('main').append(document.createElement('details'))")
    page("Emulation.setEmulatedMedia", media="print")
    page("Emulation.setDeviceMetricsOverride", width=720, height=1000, deviceScaleFactor=1, mobile=False)
    assert page.value(fits)
    assert page.value("getComputedStyle(document.querySelector('.swatch')).printColorAdjust") == "exact"
    page("Emulation.setEmulatedMedia", media="")
    page("Page.printToPDF")
    assert page.value("[...document.querySelectorAll('details')].every(fold => fold.open)")
    page.look(1280, 900)


def test_hostile_text_stays_text_and_nothing_is_fetched(page):
    assert page.value("document.title") == " ".join(EVIL.split(" ")) != "gone"
    assert page.value("document.querySelectorAll('main img, main b > script').length") == 0
    assert EVIL.split(" ")[0] in page.value("document.querySelector('main').innerText")
    assert "{{7*7}}" in page.value("document.querySelector('h1').innerText")
    assert page.said() == []
    assert [url for url in page.fetched() if not url.startswith("file://")] == []
    assert len(page.fetched()) == 1
