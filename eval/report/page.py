"""The report's page as HTML, self-contained, and as Markdown. Cells, tables and blocks are those of build.py."""

import base64
import re
from html import escape
from pathlib import Path

from schedules.textlines import read_text

TAGS = {"h": "h2", "h3": "h3", "p": "p", "code": "pre"}


def to_html(report) -> str:
    """One file: styles inside, pictures as data, no script and nothing fetched."""
    title, css = escape(report.title), read_text(Path(__file__).with_name("page.css"))
    body = "\n".join(html_block(block, report.figures, lede=i == 0) for i, block in enumerate(report.blocks))
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    return (
        f'<!doctype html>\n<html lang="en">\n<head>{head}<style>\n{css}</style></head>\n'
        f"<body>\n<h1>{title}</h1>\n{body}\n</body>\n</html>\n"
    )


def html_block(block: tuple, figures: dict[str, bytes], lede: bool = False) -> str:
    match block:
        case ("h" | "h3" | "p" | "code") as kind, text:
            return f"<{TAGS[kind]}{' class=lede' if lede else ''}>{escape(text)}</{TAGS[kind]}>"
        case "warn", texts:
            return "<div class=warn><ul>" + "".join(f"<li>{escape(text)}</li>" for text in texts) + "</ul></div>"
        case "table", table:
            return html_table(table)
        case "figure", name, caption:
            data = base64.b64encode(figures[name]).decode()
            image = f'<img alt="{escape(name)}" src="data:image/png;base64,{data}">'
            return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"
        case "samples", prompt, texts:
            card = '<div class=sample style="border-color:{}"><b>{}</b><div class=text>{}</div></div>'
            cards = "".join(card.format(cell.colour, escape(cell.text), escape(text)) for cell, text in texts)
            return f'<div class="prompt text">{escape(prompt)}</div><div class=samples>{cards}</div>'
        case "fold", title, blocks:
            inner = "\n".join(html_block(b, figures) for b in blocks)
            return f"<details><summary>{escape(title)}</summary>{inner}</details>"
    raise ValueError(f"no such block: {block[0]!r}")


def html_table(table) -> str:
    def cell(c, column: int, tag: str) -> str:
        classes = ["words"] * (column < table.left) + ["long"] * (len(c.text) > 40) + [c.tone] * bool(c.tone)
        text = f"<b>{escape(c.text)}</b>" if c.bold else escape(c.text)
        swatch = f'<span class=swatch style="background:{c.colour}"></span>' if c.colour else ""
        small = f"<small>{escape(c.sub)}</small>" if c.sub else ""
        return f'<{tag} class="{" ".join(classes)}">{swatch}{text}{small}</{tag}>'

    rows = [(table.head, "th"), *((row, "td") for row in table.rows)]
    body = "\n".join("<tr>" + "".join(cell(c, i, tag) for i, c in enumerate(row)) + "</tr>" for row, tag in rows)
    note = f"<p class=note>{escape(table.note)}</p>" if table.note else ""
    return f"<div class=wide><table>\n{body}\n</table></div>{note}"


def to_markdown(report) -> str:
    """The same page; pictures are the PNG files beside it."""
    return f"# {plain(report.title)}\n\n" + "\n\n".join(markdown_block(block) for block in report.blocks) + "\n"


def markdown_block(block: tuple) -> str:
    match block:
        case ("h" | "h3" | "p") as kind, text:
            return {"h": "## ", "h3": "### ", "p": ""}[kind] + plain(text)
        case "code", text:
            return indented(text)
        case "warn", texts:
            return "\n".join(f"> - {plain(text)}" for text in texts)
        case "table", table:
            return markdown_table(table)
        case "figure", name, caption:
            return f"![{name}]({name}.png)\n\n{plain(caption)}"
        case "samples", prompt, texts:
            cards = (f"{plain(cell.text)}:\n\n{indented(text)}" for cell, text in texts)
            return "\n\n".join(["Prompt:", indented(prompt), *cards])
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
