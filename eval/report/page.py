"""The report's page as HTML, self-contained, and as Markdown. Cells, tables and blocks are those of build.py."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from schedules.textlines import read_text

HERE = Path(__file__).parent
VENDOR = HERE / "vendor"  # uPlot 1.6.32, MIT, as it came from npm


def every_block(blocks: list[tuple]) -> Iterator[tuple]:
    """The blocks, and those that are folded into others."""
    for block in blocks:
        yield block
        yield from every_block(block[2]) if block[0] == "fold" else ()


def to_html(report, refresh: int = 0) -> str:
    """One file that fetches nothing and runs no script but its own: others' texts are data in it. ``refresh``: seconds
    after which the page reads itself again; 0: never."""
    script, license = (read_text(VENDOR / name) for name in ("uPlot.iife.min.js", "LICENSE.uPlot.txt"))
    script = f"/* uPlot: {license} */\n{script}\n{read_text(HERE / 'page.js')}"
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = "default-src 'none'; base-uri 'none'; form-action 'none'; style-src 'unsafe-inline'"
    policy += f"; script-src 'sha256-{digest}'"
    groups = {block[1]: block[2] for block in every_block(report.blocks) if block[0] == "charts"}
    data = json.dumps(groups, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    heads = dict.fromkeys(block[1] for block in report.blocks if block[0] == "h")
    page = Environment(autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True)
    return page.from_string(read_text(HERE / "page.html")).render(
        report=report,
        refresh=refresh,
        policy=policy,
        ids={text: f"part-{i}" for i, text in enumerate(heads, 1)},
        css=Markup(read_text(VENDOR / "uPlot.min.css") + read_text(HERE / "page.css")),
        data=Markup(data),
        script=Markup(script),
    )


def to_markdown(report) -> str:
    """The same page; pictures are the PNG files beside it."""
    return f"# {plain(report.title)}\n\n" + "\n\n".join(markdown_block(block) for block in report.blocks) + "\n"


def markdown_block(block: tuple) -> str:
    match block:
        case ("h" | "h3" | "p") as kind, text:
            return {"h": "## ", "h3": "### ", "p": ""}[kind] + plain(text)
        case "code", text:
            return indented(text)
        case "answer", texts:
            return "\n\n".join(f"**{plain(text)}**" for text in texts)
        case "warn", texts:
            return "\n".join(f"> - {plain(text)}" for text in texts)
        case "table", table:
            return markdown_table(table)
        case (("charts" | "map"), name, _, caption):
            return f"![{name}]({name}.png)\n\n{plain(caption)}"
        case "samples", prompt, texts:
            cards = (f"{plain(cell.text)}:\n\n{indented(text)}" for cell, text in texts)
            return "\n\n".join(["Prompt:", indented(prompt), *cards])
        case "glossary", terms:
            return "\n".join(f"- **{plain(term)}**: {plain(text)}" for term, text in terms)
        case "fold", title, blocks:
            return "\n\n".join([f"### {plain(title)}", *map(markdown_block, blocks)])
    raise ValueError(f"no such block: {block[0]!r}")


def markdown_table(table) -> str:
    def cell(c) -> str:
        text = plain(c.text + (" " if c.sub.startswith("±") else ", " if c.sub else "") + c.sub)
        return f"**{text}**" if c.bold else text

    rule = [":--" if i < table.left else "--:" for i in range(len(table.head))]
    rows = [[cell(c) for c in table.head], rule, *([cell(c) for c in row] for row in table.rows)]
    text = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return text + (f"\n\n{plain(table.note)}" if table.note else "")


def plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`*|<>\[\]&])", r"\\\1", " ".join(text.split()))


def indented(text: str) -> str:
    """A code block; indented, because a sample may hold any fence."""
    return "\n".join("    " + line for line in text.splitlines() or [""])
